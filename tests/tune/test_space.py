from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import optuna
import pytest
from annotated_types import Ge, Gt, Lt, MultipleOf
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from stoker import config as configs
from stoker.duration import Duration
from stoker.errors import BadInput
from stoker.tune.domains import Choice, Number
from stoker.tune.space import Condition, Parameter, Space
from stoker.tune.space_reading import parse, parse_mapping, parse_tries

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: Annotated[int, Ge(0)] = 0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: Annotated[float, Gt(0)] | None = None
    batch_size: Annotated[int, Ge(1)] = 8
    micro_batch: Annotated[int, Ge(1)] | Literal["auto"] | None = None
    width: Annotated[int, MultipleOf(8)] = 64
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    shift: float = 0.0
    offset: int = 0
    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    model: str = "tiny"
    flip: bool = True
    max_steps: Duration | None = None
    sizes: tuple[int, ...] = ()
    lora: Lora = field(default_factory=Lora)


WHOLE = (
    "lr=log(1e-5, 1e-3)", "batch_size=[16, 32, 64]", "optimizer=[adamw, sgd]",
    "lora.rank=int(4, 64, log) if optimizer == adamw", "dropout=uniform(0.1, 0.5, step=0.1)",
    "(width, micro_batch)=[(64, auto), (128, none)]", "lora.targets=[[q, v], [q]] if lora.rank != 4",
    "model=small",
)  # fmt: skip


def _domain(*overrides: str) -> Number | Choice:
    return parse(overrides, Config).parameters[0].domain


def _trials(space: Space, count: int, **study: Any) -> list[tuple[optuna.trial.Trial, dict[str, Any]]]:
    asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **study)
    trials = [asked.ask() for _ in range(count)]
    return [(trial, space.suggest(trial)) for trial in trials]


@pytest.mark.parametrize(
    ("override", "domain"),
    [
        ("lr=log(1e-5, 1e-3)", Number(1e-5, 1e-3, False, log=True)),
        ("lr= log( 1e-5 ,1e-3 ) ", Number(1e-5, 1e-3, False, log=True)),
        ("shift=uniform(-1, 1)", Number(-1.0, 1.0, False)),
        ("dropout=uniform(0.1, 0.5, step=0.1)", Number(0.1, 0.5, False, step=0.1)),
        ("batch_size=int(1, 1_000)", Number(1, 1000, True)),
        ("batch_size=int(1e1, 1e2)", Number(10, 100, True)),
        ("lora.rank=int(4, 64, log)", Number(4, 64, True, log=True)),
        ("batch_size=int(4, 16, step=4)", Number(4, 16, True, step=4)),
        ("batch_size=int(4, 16, step=1)", Number(4, 16, True)),
        ("width=int(8, 64, step=8)", Number(8, 64, True, step=8)),
        ("lr=int(1, 3)", Number(1, 3, True)),
        ("micro_batch=int(1, 4)", Number(1, 4, True)),
        ("max_steps=int(100, 500)", Number(100, 500, True)),
        ("lr=log(1e-3, 1e-3)", Number(1e-3, 1e-3, False, log=True)),
        ("batch_size=[16, 32]", Choice((16, 32))),
        ("batch_size=[16, 32,]", Choice((16, 32))),
        ("batch_size=[16]", Choice((16,))),
        ("batch_size=choice(16, 32)", Choice((16, 32))),
        ("lr=[1e-3, none]", Choice((1e-3, None))),
        ("flip=[true, false]", Choice((True, False))),
        ("micro_batch=[auto, 4, none]", Choice(("auto", 4, None))),
        ("max_steps=[2ep, 100]", Choice(("2ep", "100"))),
        ("model=[tiny, 'a, b', \"f(x)\", 'it''s', don't]", Choice(("tiny", "a, b", "f(x)", "it's", "don't"))),
        ("model=[on, 12, 1e-3]", Choice(("on", "12", "1e-3"))),
        ("sizes=[[1, 2], [3], []]", Choice(([1, 2], [3], []))),
        ("sizes=choice(1, [2, 3])", Choice(([1], [2, 3]))),
        ("(lr, batch_size)=[(1e-3, 16), [1e-4, 32]]", Choice(((1e-3, 16), (1e-4, 32)))),
        ("(batch_size, lr)=[(16, 1e-3)]", Choice(((1e-3, 16),))),
        ("(lr, sizes)=[(1, [2, 3]), (none, 4)]", Choice(((1.0, [2, 3]), (None, [4])))),
    ],
)  # fmt: skip
def test_expressions_become_what_is_drawn_from(override: str, domain: Number | Choice) -> None:
    found = _domain(override)
    assert found == domain
    assert [type(v) for v in vars(found).values()] == [type(v) for v in vars(domain).values()]


@pytest.mark.parametrize(
    "override",
    ["optimizer=sgd", "sizes=[1, 2]", "sizes=[]", "model=log", "model=what if a == b", "model=f(x) and g(x)",
     "model=Hello (you)", "lora.targets=[q, 'v, w']", "max_steps=2ep", "lr=none"],
)  # fmt: skip
def test_what_is_no_expression_is_fixed_as_it_was_given(override: str) -> None:
    space = parse([override], Config)
    assert space.parameters == ()
    assert space.overrides({}) == [override]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch_sise=[1, 2]", "unknown key 'batch_sise' (command line); did you mean 'batch_size'?"),
        ("lora=[1, 2]", "lora (command line) is a group of keys"),
        ("(lr, batch_sise)=[(1, 2)]", "did you mean 'batch_size'?"),
        ("batch_size", "is not an override: write key=value"),
        ("lr=log(1e-3, 1e-5)", "low 0.001 is above high 1e-05: write 1e-05, 0.001"),
        ("lr=log(0, 1e-3)", "low 0.0: a log range needs a low above 0"),
        ("shift=log(-1, 1)", "a log range needs a low above 0"),
        ("offset=int(0, 8, log)", "a log range needs a low above 0"),
        ("dropout=uniform(0.1, 0.5, step=0.3)", "steps of 0.3 from 0.1 reach 0.4 and 0.7, not 0.5"),
        ("batch_size=int(4, 8, step=8)", "reach 4 and 12, not 8"),
        ("dropout=uniform(0.1, 0.5, step=0)", "step 0.0: must be above 0"),
        ("batch_size=int(4, 8, step=-1)", "step -1: must be above 0"),
        ("batch_size=uniform(1, 8)", "batch_size takes whole numbers: write int(low, high)"),
        ("batch_size=log(0.5, 8)", "batch_size takes whole numbers: write int(low, high, log)"),
        ("max_steps=uniform(1, 8)", "max_steps takes whole numbers"),
        ("batch_size=int(0.5, 8)", "0.5 is not a whole number: write uniform(low, high)"),
        ("batch_size=int(0, 8)", "batch_size=0 (batch_size=int(0, 8) (command line)): input should"),
        ("dropout=uniform(0, 1)", "input should be less than 1"),
        ("width=int(8, 64)", "input should be a multiple of 8"),
        ("model=int(1, 2)", "model does not take a range of numbers: list the choices, [a, b]"),
        ("flip=int(0, 1)", "flip does not take a range of numbers"),
        ("optimizer=uniform(0, 1)", "optimizer does not take a range of numbers"),
        ("optimizer=[adamw, sdg]", "did you mean 'sgd'?"),
        ("batch_size=[16, 0]", "batch_size=0 (batch_size=[16, 0] (command line)): input should be greater"),
        ("batch_size=[16, 1.5]", "batch_size is a whole number"),
        ("batch_size=[16, 32, 16]", "16 is listed twice"),
        ("lr=[1e-3, 0.001]", "0.001 is listed twice"),
        ("batch_size=[]", "the list of choices is empty"),
        ("batch_size=[1,, 2]", "nothing between two commas in"),
        ("batch_size=[1, 2", "missing ] at the end of [1, 2"),
        ("batch_size=[1, 2)", "unmatched ) in [1, 2)"),
        ("model=['a, b]", "the quote in 'a, b] is not closed"),
        ("model=['a' b]", "is not one quoted text"),
        ("batch_size=[1, 2] and more", "unexpected and more: only a condition can follow"),
        ("lr=log(1e-5)", "log(...) has 1 value: write log(low, high)"),
        ("lr=log(a, b)", "a is not a number"),
        ("shift=uniform(0, inf)", "inf is not a number"),
        ("lr=log(1e-5, 1e-3, step=2)", "unknown option step=2 in log(...): write log(low, high)"),
        ("lr=uniform(1e-5, 1e-3, log)", "for a log scale: log(low, high)"),
        ("lr=loguniform(1e-5, 1e-3)", "unknown loguniform(...); did you mean 'uniform'?"),
        ("model=choise(a, b)", "did you mean 'choice'?"),
        ("optimizer=sdg", "did you mean 'sgd'?"),
        ("lr=abc", "input should be a valid number"),
        ("lr=1e-5..1e-3", "to search it, write lr='uniform(a, b)', 'log(a, b)' or '[a, b]'"),
        ("lr=0:1", "to search it, write lr='uniform(a, b)'"),
        ("lr=-1..1", "to search it, write lr='uniform(a, b)'"),
        ("lr=(1E-5, 1E-3)", "to search it, write lr='uniform(a, b)'"),
        ("batch_size=8,16,32", "to search it, write batch_size='int(a, b)' or '[a, b]'"),
        ("batch_size=8-64", "to search it, write batch_size='int(a, b)' or '[a, b]'"),
        ("sizes=[[1], [b]]", "sizes is a list, each a whole number"),
        ("(lr, batch_size)=[(1e-3, 16), (1e-4,)]", "must have 2 values: write [(a, a), (b, b)]"),
        ("(lr, batch_size)=[1e-3, 16]", "row 1e-3 must have 2 values"),
        ("(lr, batch_size)=log(1, 2)", "paired keys take a list of rows"),
        ("(lr, batch_size)=[(1e-3, 16), (1e-3, 16)]", "(0.001, 16) is listed twice"),
        ("(lr, batch_size)=[(1e-3, 0)]", "greater than or equal to 1"),
        ("(lr, lr)=[(1, 2)]", "lr is given twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_with_what_to_change(override: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        parse([override], Config)
    assert said in str(error.value)


@pytest.mark.parametrize("override", ["lr=abc", "lr=1e-5x", "lr=1e-5", "sizes=8,b", "optimizer=1:2"])
def test_what_is_no_range_of_numbers_is_not_taken_for_one(override: str) -> None:
    assert "to search it" not in _refusal(override)


def _refusal(override: str) -> str:
    try:
        parse([override], Config)
    except BadInput as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.rank=[4] if optimiser == adamw"], "did you mean 'optimizer'?"),
        (["lora.rank=[4] if optimizer == adamw"], "optimizer in its condition is neither searched nor fixed"),
        (["lora.rank=[4] if optimizer == adam", "optimizer=sgd"], "did you mean 'adamw'?"),
        (["lora.rank=[4] if optimizer", "optimizer=sgd"], "optimizer is not a condition"),
        (["lora.rank=[4] if optimizer == sgd and lr == 1", "optimizer=sgd"], "more than one comparison"),
        (["lora.rank=[4] if model != a or optimizer==sgd", "model=b"], "more than one comparison"),
        (["lora.rank=[4] if model == a if optimizer in [sgd]", "model=b"], "more than one comparison"),
        (["lora.rank=4 if model == a and b", "model=b"], "write one, `if model == value`"),
        (["lora.rank=[4] if", "optimizer=sgd"], "nothing is not a condition"),
        (["lora.rank=[4] if optimizer in sgd", "optimizer=sgd"], "write `if optimizer in [a, b]`"),
        (["lora.rank=[4] if optimizer = sgd", "optimizer=sgd"], "is not a condition"),
        (["lora.rank=[4] if optimizer == sgd", "optimizer=[adamw, adafactor]"], "would never be drawn"),
        (["lora.rank=[4] if optimizer not in [sgd, adamw]", "optimizer=[adamw, sgd]"], "never be drawn"),
        (["lora.rank=[4] if batch_size == 2", "batch_size=int(4, 8)"], "never be drawn"),
        (["lora.rank=[4] if lr == 0.5", "lr=uniform(0.1, 0.9)"], "never be drawn"),
        (["lora.rank=[4] if lr == much", "lr=uniform(0.1, 0.9)"], "much is not a number"),
        (["lora.rank=[4] if lora.rank == 4"], "the conditions of lora.rank are circular"),
        (["lr=[1] if batch_size == 2", "batch_size=[2] if lr == 1"], "of lr, batch_size are circular"),
    ],
)  # fmt: skip
def test_conditions_that_cannot_hold_are_refused(overrides: Sequence[str], said: str) -> None:
    with pytest.raises(BadInput) as error:
        parse(overrides, Config)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("condition", "drawn_beside"),
    [
        ("optimizer == adamw", {"adamw"}), ("optimizer != adamw", {"sgd", "adafactor"}),
        ("optimizer in [adamw, 'sgd']", {"adamw", "sgd"}), ("optimizer not in [adamw, sgd]", {"adafactor"}),
        ("optimizer==adamw", {"adamw"}),
    ],
)  # fmt: skip
def test_a_conditional_key_is_drawn_only_where_its_condition_holds(
    condition: str, drawn_beside: set[str]
) -> None:
    # The conditional key is written first: it is still drawn after the one that it depends on.
    space = parse([f"lora.rank=int(4, 8) if {condition}", "optimizer=[adamw, sgd, adafactor]"], Config)
    seen = [values for _, values in _trials(space, 40)]
    assert {values["optimizer"] for values in seen} == {"adamw", "sgd", "adafactor"}
    assert all(("lora.rank" in values) == (values["optimizer"] in drawn_beside) for values in seen)


def test_a_plain_value_may_have_a_condition() -> None:
    space = parse(["lora.rank=8 if optimizer == sgd", "optimizer=[adamw, sgd]"], Config)
    assert space.parameters[1] == Parameter(("lora.rank",), Choice((8,)), Condition("optimizer", ("sgd",)))
    space = parse(["sizes=[1, 2] if optimizer == sgd", "optimizer=[adamw, sgd]"], Config)
    assert space.parameters[1].domain == Choice(([1, 2],))


def test_a_text_in_quotes_may_look_like_several_comparisons() -> None:
    space = parse(["lora.rank=[4] if model == 'a and b'", "model=['a and b', c]"], Config)
    assert space.parameters[1].condition == Condition("model", ("a and b",))


def test_a_condition_on_a_fixed_key_is_settled_at_once() -> None:
    given = ["lora.rank=[4, 8] if optimizer == adamw", "lora.targets=[[q], [v]] if lora.rank == 4"]
    kept, dropped = (parse([*given, f"optimizer={name}"], Config) for name in ("adamw", "sgd"))
    assert kept.parameters[0] == Parameter(("lora.rank",), Choice((4, 8)))
    assert len(kept.parameters) == 2
    assert dropped.parameters == ()


def test_what_depends_on_a_key_that_is_not_drawn_is_not_drawn_either() -> None:
    space = parse(
        ["optimizer=[adamw, sgd]", "lora.rank=[4, 8] if optimizer == adamw", "flip=[true] if lora.rank != 4"],
        Config,
    )
    for _, values in _trials(space, 30):
        assert ("flip" in values) == (values.get("lora.rank") == 8)


def test_a_condition_may_be_on_a_paired_key() -> None:
    space = parse(["(lr, batch_size)=[(0.1, 16), (0.2, 32)]", "lora.rank=[4] if batch_size == 16"], Config)
    for _, values in _trials(space, 20):
        assert ("lora.rank" in values) == (values["batch_size"] == 16)
    assert space.params({"lr": 0.1, "lora.rank": 4}) == {"(lr, batch_size)": "(0.1, 16)", "lora.rank": 4}


@pytest.mark.parametrize(
    "overrides",
    [["lr=1e-3", "lr=log(1e-5, 1e-3)"], ["lr=1e-3", "(lr, batch_size)=[(1, 2)]"],
     ["(lr, batch_size)=[(1, 2)]", "(batch_size, lr)=[(1, 2)]"]],
)  # fmt: skip
def test_a_key_given_twice_is_refused(overrides: Sequence[str]) -> None:
    with pytest.raises(BadInput, match=r"is given twice, by .* and by "):
        parse(overrides, Config)


def test_a_key_without_default_must_be_given_or_searched() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needs:
        size: int

    with pytest.raises(BadInput, match="size needs a value"):
        parse([], Needs)
    assert parse(["size=[1, 2]"], Needs).parameters[0].domain == Choice((1, 2))


FILE = (
    "lr: log(1e-5, 1e-3)", "batch_size: [16, 32, 64]", "optimizer: [adamw, sgd]",
    "dropout: uniform(0.1, 0.5, step=0.1)",
    "'(width, micro_batch)': [[64, auto], [128, null]]", "model: small", "lora:",
    "  rank: int(4, 64, log) if optimizer == adamw", "  targets: '[[q, v], [q]] if lora.rank != 4'",
)  # fmt: skip


def test_a_file_and_a_mapping_say_the_same_as_the_command_line(
    write_file: Callable[[str, Sequence[str]], Path],
) -> None:
    space = parse(WHOLE, Config)
    assert parse([], Config, write_file("s.yaml", FILE)) == parse([], Config, write_file("t.yaml", FILE))
    assert parse([], Config, write_file("s.yaml", FILE)).described() == space.described()
    assert parse_mapping(dict(o.split("=", 1) for o in WHOLE), Config).described() == space.described()
    nested = {"lora": {"rank": [4, 8]}, "lr": 1e-3, "flip": True, "max_steps": None}
    found = parse_mapping(nested, Config)
    assert found.parameters[0].domain == Choice((4, 8))
    assert found.fixed == {"lr": "0.001", "flip": "true", "max_steps": "none"}


def test_rows_and_flat_lists_in_a_file(write_file: Callable[[str, Sequence[str]], Path]) -> None:
    lines = [
        "(lr, batch_size):",
        "  - (1e-3, 16)",
        "  - [1e-4, 32]",
        "sizes: [1, 2]",
        "lora.targets: [[q], ['a, b']]",
    ]
    space = parse([], Config, write_file("s.yaml", lines))
    assert space.parameters[0].domain == Choice(((1e-3, 16), (1e-4, 32)))
    assert space.parameters[1].domain == Choice((["q"], ["a, b"]))
    assert space.fixed == {"sizes": "[1, 2]"}


def test_the_command_line_goes_over_the_file(write_file: Callable[[str, Sequence[str]], Path]) -> None:
    file = write_file("s.yaml", ["lr: log(1e-5, 1e-3)", "'(width, dropout)': [[64, 0.1]]", "model: small"])
    space = parse(["lr=1e-4", "(dropout, width)=[(0.2, 8), (0.3, 16)]"], Config, file)
    assert space.fixed == {"lr": "1e-4", "model": "small"}
    assert [p.domain for p in space.parameters] == [Choice(((8, 0.2), (16, 0.3)))]
    with pytest.raises(
        BadInput, match=r"width is given twice, by \(width, dropout\)=.*s\.yaml.*command line"
    ):
        parse(["width=8"], Config, file)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["lr: 1", "lr: 2"], "lr is given twice"),
        (["lora: {rank: 1}", "lora.rank: 2"], "lora.rank is given twice"),
        (["lrr: [1, 2]"], "did you mean 'lr'?"),
        (["- lr"], "holds a list"),
        (["batch_size: [0, 2]"], "greater than or equal to 1"),
        (["lora: {rank: int(4, 8)}"], "is part of an expression, not a key: quote the expression"),
    ],
)
def test_bad_files_are_refused(lines: list[str], said: str, write_file: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=r"s\.yaml") as error:
        parse([], Config, write_file("s.yaml", lines))
    assert said in str(error.value)


def test_every_suggestion_is_a_config_and_comes_back_as_the_params_of_its_trial() -> None:
    space = parse(WHOLE, Config)
    for trial, values in _trials(space, 60):
        record = configs.resolve(Config, space.overrides(values)).values
        assert {key: record[key] for key in values} == values
        assert record["model"] == "small"
        assert 1e-5 <= values["lr"] <= 1e-3
        assert values["dropout"] in (0.1, 0.2, 0.3, 0.4, 0.5)  # not 0.30000000000000004
        assert (values["width"], values["micro_batch"]) in ((64, "auto"), (128, None))
        params = space.params(values)
        assert params.keys() == trial.params.keys()
        for name, value in trial.params.items():
            assert params[name] == (pytest.approx(value) if isinstance(value, float) else value)


def test_suggestions_survive_optunas_storage_as_plain_values(tmp_path: Path) -> None:
    space = parse(WHOLE, Config)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    asked = _trials(space, 10, storage=url, study_name="s")
    kept = optuna.load_study(study_name="s", storage=url).get_trials()
    assert [t.params for t in kept] == [trial.params for trial, _ in asked]
    assert {type(v) for t in kept for v in t.params.values()} <= {bool, int, float, str, type(None)}


def test_values_asked_for_are_what_optuna_gives_back() -> None:
    space = parse(WHOLE, Config)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    tries = (
        "lr=1e-4,batch_size=16,dropout=0.3,optimizer=adamw,lora.rank=8,lora.targets=[q, v],micro_batch=auto"
    )
    study.enqueue_trial(space.params(parse_tries(tries)))
    study.enqueue_trial(space.params({"dropout": 0.1 + 0.2}))
    assert space.suggest(study.ask()) == {
        "lr": 1e-4, "batch_size": 16, "dropout": 0.3, "optimizer": "adamw", "lora.rank": 8,
        "lora.targets": ["q", "v"], "width": 64, "micro_batch": "auto",
    }  # fmt: skip
    assert space.suggest(study.ask())["dropout"] == 0.3


@pytest.mark.filterwarnings("ignore:Fixed parameter .* is out of range")  # Optuna says so
def test_a_value_that_was_enqueued_outside_the_range_is_the_one_that_optuna_records() -> None:
    space = parse(["lr=log(1e-5, 1e-3)", "dropout=uniform(0, 0.5, step=0.1)", "lora.rank=int(4, 64)"], Config)
    study = optuna.create_study()
    enqueued = {"lr": 0.1, "dropout": 0.25, "lora.rank": 128}
    study.enqueue_trial(enqueued)
    trial = study.ask()
    assert space.suggest(trial) == trial.params == enqueued


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": "0.5"}, "lr=0.5: outside the space, lr is searched in log(1e-05, 0.001)"),
        ({"lr": "abc"}, "abc is not a number; it is searched in log(1e-05, 0.001)"),
        ({"lr": math.nan}, "outside the space"),
        ({"batch_size": 24}, "batch_size=24: outside the space, batch_size is searched in [16, 32, 64]"),
        ({"batch_size": "x"}, "batch_size is a whole number"),
        ({"dropout": "0.25"}, "outside the space"),
        ({"lora.rank": "4.5", "optimizer": "adamw"}, "outside the space"),
        ({"lora.rank": True, "optimizer": "adamw"}, "outside the space"),
        ({"model": "tiny"}, "model is fixed at small"),
        ({"shift": 1}, "shift is not searched"),
        ({"batch_sise": 1}, "did you mean 'batch_size'?"),
        ({"lora.rank": 8}, "lora.rank=8: only drawn if optimizer == adamw"),
        ({"lora.rank": 8, "optimizer": "sgd"}, "only drawn if optimizer == adamw"),
        ({"width": 64, "micro_batch": None}, "matches no row of (micro_batch, width)=[(auto, 64), (none, "),
    ],
)  # fmt: skip
def test_values_outside_the_space_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as error:
        parse(WHOLE, Config).params(values)
    assert said in str(error.value)


def test_part_of_a_row_is_enough_where_it_names_one() -> None:
    space = parse(["(lr, batch_size)=[(0.1, 16), (0.2, 32), (0.2, 64)]"], Config)
    assert space.params({"lr": "0.1"}) == {"(lr, batch_size)": "(0.1, 16)"}
    with pytest.raises(BadInput, match=r"lr=0\.2 matches 2 rows of .*: give batch_size too"):
        space.params({"lr": "0.2"})


@pytest.mark.parametrize(
    ("tries", "values"),
    [
        ("lr=1e-4,batch_size=16", {"lr": "1e-4", "batch_size": "16"}),
        (" lr = 1e-4 , lora.targets=[q, v]", {"lr": "1e-4", "lora.targets": "[q, v]"}),
        ("model=a=b", {"model": "a=b"}),
        ("\"model=a, b\",lr=1", {"model": "a, b", "lr": "1"}),
        ("", {}),
    ],
)  # fmt: skip
def test_tries_are_read(tries: str, values: dict[str, str]) -> None:
    assert parse_tries(tries) == values


@pytest.mark.parametrize(
    ("tries", "said"),
    [("lr=1,lr=2", "lr is given twice"), ("lr", "is not an override"), ("lr=[1", "every bracket and quote"),
     ("lr=1),b=2", "write values to try as in"), ("lr=1,,b=2", "write values to try as in"),
     ('"lr=1', "write values to try as in")],
)  # fmt: skip
def test_bad_tries_are_refused(tries: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_tries(tries)
    assert said in str(error.value)


def test_a_grid_goes_through_every_value() -> None:
    space = parse(
        ["batch_size=int(4, 8, step=2)", "dropout=uniform(0.1, 0.3, step=0.1)", "lr=log(1e-3, 1e-3)",
         "(width, optimizer)=[(8, sgd), (16, adamw)]", "lora.rank=int(1, 3, log)"],
        Config,
    )  # fmt: skip
    grid = space.grid()
    assert grid == {
        "batch_size": [4, 6, 8], "dropout": [0.1, 0.2, 0.3], "lr": [1e-3],
        "(width, optimizer)": ["(8, sgd)", "(16, adamw)"], "lora.rank": [1, 2, 3],
    }  # fmt: skip
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(grid, seed=0))
    seen = set()

    def objective(trial: optuna.trial.Trial) -> float:
        seen.add(json.dumps(space.suggest(trial)))
        return 0.0

    study.optimize(objective)
    assert len(seen) == 3 * 3 * 1 * 2 * 3


def test_a_grid_of_what_cannot_be_counted_says_what_to_write() -> None:
    space = parse(["lr=log(1e-5, 1e-3)", "dropout=uniform(0.1, 0.5)", "batch_size=[1, 2]"], Config)
    with pytest.raises(BadInput) as error:
        space.grid()
    assert "lr=log(1e-05, 0.001), dropout=uniform(0.1, 0.5) is continuous" in str(error.value)
    assert "lr='[1e-05, 0.0001, 0.001]' dropout='[0.1, 0.3, 0.5]'" in str(error.value)
    assert "batch_size" not in str(error.value)


EXPLORED: list[tuple[str, Any, tuple[float, float], set[Any]]] = [
    ("lr=log(1e-5, 1e-3)", 1e-4, (0.8, 1.2), {0.8e-4, 1.2e-4}),
    ("lr=log(1e-5, 1e-3)", 9e-4, (1.2, 1.2), {1e-3}),
    ("lr=log(1e-5, 1e-3)", 1.1e-5, (0.8, 0.8), {1e-5}),
    ("batch_size=int(1, 100)", 10, (0.8, 1.2), {8, 12}),
    ("batch_size=int(1, 100)", 2, (0.8, 1.2), {1, 3}),  # 1.6 and 2.4 both round to 2
    ("batch_size=int(1, 100)", 1, (0.8, 0.8), {1}),
    ("batch_size=int(4, 100, step=4)", 8, (0.8, 1.2), {4, 12}),
    ("offset=int(-10, 10)", -2, (0.8, 1.2), {-1, -3}),
    ("offset=int(-10, 10)", 0, (0.8, 1.2), {-1, 1}),
    ("dropout=uniform(0.1, 0.5, step=0.1)", 0.2, (0.8, 1.2), {0.1, 0.3}),
    ("batch_size=[16, 32, 64, 128]", 32, (0.8, 1.2), {16, 64}),
    ("batch_size=[16, 32, 64]", 16, (0.8, 1.2), {32}),
    ("batch_size=[16, 32, 64]", 64, (0.8, 1.2), {32}),
    ("batch_size=[16]", 16, (0.8, 1.2), {16}),
    ("batch_size=[16, 32]", 99, (0.8, 1.2), {16, 32}),  # the space has changed since
]


@pytest.mark.parametrize(("override", "value", "factors", "expected"), EXPLORED)
def test_exploring_moves_a_value_to_what_is_near(
    override: str, value: Any, factors: tuple[float, float], expected: set[Any]
) -> None:
    space, key = parse([override], Config), override.partition("=")[0]
    random = np.random.default_rng(0)
    moved = [space.perturbed({key: value}, random, resample=0.0, factors=factors)[key] for _ in range(30)]
    assert sorted(set(moved)) == pytest.approx(sorted(expected))
    assert {type(v) for v in moved} == {type(next(iter(expected)))}


def test_exploring_resamples_from_the_whole_range_with_the_given_probability() -> None:
    space = parse(["lr=log(1e-5, 1e-3)"], Config)
    random = np.random.default_rng(0)
    seen = [
        space.perturbed({"lr": 1e-4}, random, resample=0.25, factors=(0.8, 1.2))["lr"] for _ in range(2000)
    ]
    anew = [lr for lr in seen if not math.isclose(lr, 0.8e-4) and not math.isclose(lr, 1.2e-4)]
    assert len(anew) / len(seen) == pytest.approx(0.25, abs=0.04)
    assert all(1e-5 <= lr <= 1e-3 for lr in anew)
    assert np.mean(np.log10(anew)) == pytest.approx(-4, abs=0.1)  # even on the log scale


def test_exploring_keeps_paired_values_together_and_looks_at_conditions_anew() -> None:
    space = parse(WHOLE, Config)
    random = np.random.default_rng(0)
    values = _trials(space, 1)[0][1]
    for _ in range(100):
        values = space.perturbed(values, random, resample=0.2, factors=(0.8, 1.2))
        assert ("lora.rank" in values) == (values["optimizer"] == "adamw")
        assert (values["width"], values["micro_batch"]) in ((64, "auto"), (128, None))
        space.params(values)  # refuses what is outside the space
        configs.resolve(Config, space.overrides(values))


def test_points_that_span_a_space_have_each_choice_and_both_ends() -> None:
    space = parse(["lr=log(1e-5, 1e-3)", "lora.rank=int(4, 64)", "lora.targets=[[q], [q, v], [v]]"], Config)
    points = list(space.spanning())
    assert [point["lora.targets"] for point in points] == [["q"], ["q", "v"], ["v"]]
    assert {(point["lr"], point["lora.rank"]) for point in points} == {(1e-5, 4), (1e-3, 64)}
    beside = parse(["lora.rank=[4, 8]", "lr=log(1e-5, 1e-3) if lora.rank == 8"], Config)
    assert list(beside.spanning()) == [{"lora.rank": 4}, {"lora.rank": 8, "lr": 1e-3}]


def test_drawing_a_whole_number_on_a_log_scale_reaches_both_ends() -> None:
    space = parse(["lora.rank=int(1, 4, log)"], Config)
    random = np.random.default_rng(0)
    drawn = [space.perturbed({}, random, resample=1.0, factors=(0.8, 1.2))["lora.rank"] for _ in range(4000)]
    shares = [drawn.count(rank) / len(drawn) for rank in (1, 2, 3, 4)]
    edges = np.log([0.5, 1.5, 2.5, 3.5, 4.5])
    assert shares == pytest.approx(list(np.diff(edges) / (edges[-1] - edges[0])), abs=0.03)


SAME = [
    ("lr=log(1e-5, 1e-3)", " lr=log(0.00001,0.001) "),
    ("batch_size=[16, 32]", "batch_size=choice(16,'32')"),
    ("(lr, width)=[(1, 8)]", "(width, lr)=[[8, 1.0]]"),
    ("lr=1e-3", "lr=0.001"),
    ("sizes=[1, 2]", "sizes=[1,2]"),
    ("batch_size=int(1, 8, step=1)", "batch_size=int(1, 8)"),
    ("max_steps=2ep", "max_steps=2 epochs"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spaces_that_mean_the_same_are_described_the_same(one: str, other: str) -> None:
    assert parse([one], Config).described() == parse([other], Config).described()


def test_a_description_says_what_changed() -> None:
    described = parse(WHOLE, Config).described()
    assert described == {
        "model": "small", "lr": "log(1e-05, 0.001)", "batch_size": "[16, 32, 64]",
        "optimizer": "[adamw, sgd]", "lora.rank": "int(4, 64, log) if optimizer == adamw",
        "dropout": "uniform(0.1, 0.5, step=0.1)", "(micro_batch, width)": "[(auto, 64), (none, 128)]",
        "lora.targets": '[["q", "v"], ["q"]] if lora.rank != 4',
    }  # fmt: skip
    twice = ["lora.rank=[4] if optimizer in [{}]", "optimizer=[adamw, sgd, adafactor]"]
    one, other, single = (
        parse([o.format(names) for o in twice], Config).described()["lora.rank"]
        for names in ("sgd, adamw", "adamw, sgd, adamw", "sgd")
    )
    assert one == other == "[4] if optimizer in [adamw, sgd]"
    assert single == "[4] if optimizer == sgd"


texts = st.text(max_size=8).filter(lambda text: text.isprintable())
numbers = st.floats(min_value=1e-6, max_value=1e6)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"batch_size": range(4, 9)}, ["batch_size=int(4, 8)"]),
        ({"width": range(64, 7, -8)}, ["width=int(8, 64, step=8)"]),
        ({"width": range(8, 9), "lr": [1e-3, 1e-2]}, ["width=8", "lr=[1e-3, 1e-2]"]),
        (
            {("lr", "batch_size"): [(1e-3, np.int64(16)), (1e-2, np.int64(32))]},
            ["(lr, batch_size)=[(1e-3, 16), (1e-2, 32)]"],
        ),
        ({"lr": np.array([1e-3, 1e-2])}, ["lr=[1e-3, 1e-2]"]),
        ({"batch_size": list(np.array([16, 32]))}, ["batch_size=[16, 32]"]),
        ({"model": ("a", "b")}, ["model=[a, b]"]),
        ({"batch_size": (16, 32, 64)}, ["batch_size=[16, 32, 64]"]),
        ({"sizes": (1, 2), "lr": [1e-3, 1e-2]}, ["sizes=[1, 2]", "lr=[1e-3, 1e-2]"]),
        ({"lr": FloatDistribution(1e-5, 1e-3, log=True)}, ["lr=log(1e-5, 1e-3)"]),
        ({"dropout": FloatDistribution(0, 0.5, step=0.1)}, ["dropout=uniform(0, 0.5, step=0.1)"]),
        ({"dropout": FloatDistribution(0, 0.5)}, ["dropout=uniform(0, 0.5)"]),
        ({"batch_size": IntDistribution(4, 64, log=True)}, ["batch_size=int(4, 64, log)"]),
        ({"width": IntDistribution(8, 64, step=8)}, ["width=int(8, 64, step=8)"]),
        ({"optimizer": CategoricalDistribution(["adamw", "sgd"])}, ["optimizer=[adamw, sgd]"]),
    ],
)
def test_plain_objects_of_python_say_what_they_are(given: dict[str, Any], written: list[str]) -> None:
    assert parse_mapping(given, Config).described() == parse(written, Config).described()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"lr": (1e-3, 1e-1)},
            "write 'uniform(0.001, 0.1)' or 'log(0.001, 0.1)' for a range, [0.001, 0.1] for choices",
        ),
        ({"batch_size": (16, 64)}, "write 'int(16, 64)' for a range, [16, 64] for choices"),
        ({"lr": {1e-3, 1e-1}}, "write choices as a list, [a, b], and a range as a text: 'uniform(a, b)'"),
        ({"lr": object()}, "'log(a, b)' or 'int(a, b)'"),
    ],
)
def test_an_object_that_can_mean_several_things_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_mapping(given, Config)
    assert said in str(error.value)


@settings(max_examples=60)
@given(
    names=st.lists(texts, min_size=1, max_size=4, unique=True),
    lists=st.lists(st.lists(texts, max_size=3), min_size=1, max_size=3, unique_by=json.dumps),
    ends=st.tuples(numbers, numbers).map(sorted),
    rows=st.lists(st.tuples(st.integers(1, 99), st.floats(0, 0.99)), min_size=1, max_size=4, unique=True),
)
def test_a_description_reads_back_as_the_same_space(
    names: list[str], lists: list[list[str]], ends: list[float], rows: list[tuple[int, float]]
) -> None:
    mapping = {
        "model": names, "lora.targets": lists, "lr": f"log({ends[0]!r}, {ends[1]!r})",
        "(batch_size, dropout)": rows,
    }  # fmt: skip
    space = parse_mapping(mapping, Config)
    assert space.parameters[0].domain == Choice(tuple(names))
    assert space.parameters[1].domain == Choice(tuple(lists))
    assert parse([f"{name}={text}" for name, text in space.described().items()], Config) == space


@settings(max_examples=100)
@given(st.integers(-1000, 1000), st.integers(1, 50), st.integers(0, 100), st.data())
def test_stepped_ranges_hold_their_steps_and_nothing_else(
    low: int, step: int, count: int, data: st.DataObject
) -> None:
    """In hundredths, where binary fractions are off."""
    numbers = Number(low / 100, (low + step * count) / 100, False, step=step / 100)
    points = numbers.points
    assert points == [(low + step * k) / 100 for k in range(count + 1)]
    at = data.draw(st.integers(0, count))
    assert numbers.holds(numbers.low + at * numbers.step)  # type: ignore[operator]
    assert numbers.nearest(numbers.low + (at + 0.4) * numbers.step) == points[at]  # type: ignore[operator]
    assert not numbers.holds(numbers.low + (at + 0.4) * numbers.step)  # type: ignore[operator]
