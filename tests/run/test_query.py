from __future__ import annotations

from pathlib import Path

import pytest
from stoker.errors import BadInput
from stoker.run.directory import RunDirectory
from stoker.run.query import Query, facts
from stoker.run.state import AttemptView, RunView

from support import series

FACTS = {
    "val_loss": 0.25, "lr": 3e-4, "lora.rank": 16, "optimizer": "adamw", "val/acc": 0.9,
    "best(val_loss)": 0.2, "nan": float("nan"), "status": "finished", "tags.team": "blue", "none": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("val_loss < 0.3 and lr > 1e-4", True),
        ("val_loss < 0.3 and lr > 1e-3", False),
        ("val_loss < 0.2 or optimizer == 'adamw'", True),
        ("not optimizer in ('sgd', 'lion')", True),
        ("lora.rank >= 16", True),
        ("0.1 < val_loss < 0.2", False),
        ("`val/acc` >= 0.9", True),
        ("best(val_loss) <= 0.2", True),
        ("tags.team == 'blue'", True),
        ("lr > -1", True),
        ("absent < 1", False),
        ("not absent < 1", True),
        ("absent < 1 or status == 'finished'", True),
        ("nan < 1 or nan >= 1", False),
        ("optimizer < 3", False),
        ("none == None", True),
        ("optimizer", True),
    ],
)
def test_a_query_is_true_or_false_of_a_runs_facts(text: str, true: bool) -> None:
    assert Query(text).matches(FACTS) is true


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr = 1", "write == to compare"),
        ("lr >", "cannot be read"),
        ("", "cannot be read"),
        ("__import__('os')", "neither a name nor a number"),
        ("lr < len(optimizer)", "neither a name nor a number"),
        ("lr[0] < 1", "neither a name nor a number"),
        ("(lambda: 1)() < 2", "neither a name nor a number"),
        ("lr is None", "cannot be read"),
        ("a.b() < 1", "cannot be read"),
        ("(" * 500 + "lr" + ")" * 500, "cannot be read"),
    ],
)
def test_what_is_no_query_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadInput, match="cannot be read") as caught:
        Query(text)
    assert said in str(caught.value)


def test_a_name_that_no_run_has_is_refused_with_the_nearest() -> None:
    query = Query("best(val_los) < 1")
    with pytest.raises(BadInput, match="'val_los'; did you mean 'val_loss'"):
        query.check_names(FACTS)
    Query("best(val_loss) < 1 and lora.rank > 2").check_names(FACTS)


@pytest.mark.parametrize("text", ["loss/train > 1", "acc@1 > 1", "`val/acc` > loss-1", "top-5 % > 1"])
def test_a_name_that_must_be_in_backticks_is_refused_with_how_to_write_it(text: str) -> None:
    with pytest.raises(BadInput, match="in backticks, such as `"):
        Query(text)


@pytest.mark.parametrize("text", ["status == failed", "0 < lr and status in ('finished', failed)"])
def test_a_text_without_quotes_is_refused_with_how_to_write_it(text: str) -> None:
    with pytest.raises(BadInput, match="tag 'failed'; a text is in quotes, 'failed'"):
        Query(text).check_names([*FACTS, "fold"])


def test_the_facts_of_a_run_are_its_metrics_config_params_and_tags() -> None:
    view = RunView(
        RunDirectory(Path("runs/llm/a")), {"config": {"lr": 0.1, "loss": "mse"}, "sources": {}},
        points=series(loss={1: 3.0, 2: 1.0, 3: 2.0}), params={"size": 7}, tags={"team": "blue"},
        attempts=[AttemptView(1, 1000.0, ended=1060.0, status="finished")],
    )  # fmt: skip
    found = facts(view)
    assert (found["loss"], found["config.loss"], found["best(loss)"], found["max(loss)"]) == (
        2.0,
        "mse",
        1.0,
        3.0,
    )
    assert (found["size"], found["tags.team"], found["id"], found["step"]) == (7, "blue", "a", 3)
