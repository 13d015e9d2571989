"""Evaluation data of one's own, end to end: trained on never, known by its content, kept over kills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stoker import storage

from support import SOAK, loaded, slow_from, wait_for_points

SMALL = ("train", "llm", "model=tiny", "vocab_size=300", "sequence_length=64", "batch_size=4", "seed=2")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Files of texts, pairs and conversations, the second half of `letters` being in `numbers` too."""
    words = [f"{n} of numbers: one two three four {n % 7}" for n in range(300)]
    letters = [*(f"{n} of letters: a b c d e f" for n in range(8)), *words[:8]]
    made = {
        "numbers": [{"text": text} for text in words],
        "letters": [{"text": text} for text in letters],
        "pairs": [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(9)],
    }
    for name, records in made.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.mark.soak
@pytest.mark.parametrize("streaming", ["false", "true"] if SOAK else ["true"])
def test_it_is_evaluated_on_alike_before_and_after_a_kill(
    stoker: Callable[..., Any], start: Callable[..., Any], files: Path, streaming: str
) -> None:
    command = (
        *SMALL, "data=numbers.jsonl", "validation_data=letters.jsonl,pairs.jsonl", "test_data=pairs.jsonl",
        f"streaming={streaming}", "max_steps=16", "eval_every=8", "checkpoint_every=5", "generate_tokens=2",
        "--runs", str(files / "runs"),
    )  # fmt: skip
    whole = stoker(*command, "--name", "whole")
    assert whole.code == 0, whole.err
    assert "validation_data: 8 documents are also in data, word for word, and trained on" in whole.err
    assert "test_data: pairs.jsonl, 9 documents" in whole.err
    cut = files / "runs" / "llm" / "cut"
    process = start(*command, "--name", "cut", first=slow_from(9))
    wait_for_points(process, cut, 9)
    process.kill()
    process.wait()
    done = stoker(*command, "--name", "cut")
    assert done.code == 0, done.err

    seen, again = (loaded(files / "runs" / "llm" / name) for name in ("whole", "cut"))
    for metric in ("loss", "val_loss", "val_loss/letters", "val_loss/pairs", "test_perplexity"):
        assert seen.points[metric] == again.points[metric], metric
    assert seen.attempts[-1].data["validation_data"] == [
        "letters.jsonl, 16 documents", "pairs.jsonl, 9 documents"
    ]  # fmt: skip
    assert {f"fingerprint.{name}" for name in ("data", "validation_data", "test_data")} <= seen.tags.keys()
    recorded = storage.read_json(seen.directory.provenance / "data.json")
    assert {name: about["path"] for name, about in recorded.items()} == {
        "data": "numbers.jsonl", "validation_data letters.jsonl": "letters.jsonl",
        "validation_data pairs.jsonl": "pairs.jsonl", "test_data": "pairs.jsonl",
    }  # fmt: skip

    other = stoker(*command, "validation_data=letters.jsonl", "--name", "cut")
    assert other.code == 2
    assert "validation_data" in other.err
    inspected = stoker("data", "inspect", str(files / "runs" / "llm" / "cut"), "--json")
    assert inspected.code == 0, inspected.err
    (source,) = inspected.answer["sources"]
    assert list(source["splits"]) == ["train"]
    assert source["splits"]["train"]["documents"] == 300
    assert [
        (part["key"], part["name"], {split: of["documents"] for split, of in part["splits"].items()})
        for part in inspected.answer["evaluation"]
    ] == [
        ("validation_data", "letters", {"validation": 16}), ("validation_data", "pairs", {"validation": 9}),
        ("test_data", "pairs", {"test": 9}),
    ]  # fmt: skip


def test_what_was_changed_since_the_run_began_is_said(
    stoker: Callable[..., Any], start: Callable[..., Any], files: Path
) -> None:
    command = (
        *SMALL, "data=numbers.jsonl", "test_data=pairs.jsonl", "data_share=0.5", "max_steps=12",
        "checkpoint_every=2", "generate_tokens=2", "--runs", str(files / "runs"), "--name", "a",
    )  # fmt: skip
    process = start(*command, first=slow_from(8))
    wait_for_points(process, files / "runs" / "llm" / "a", 8)
    process.kill()
    process.wait()
    with (files / "pairs.jsonl").open("a") as pairs:
        pairs.write(json.dumps({"prompt": "what is new?", "completion": "it is this"}) + "\n")
    done = stoker(*command)
    assert done.code == 0, done.err
    assert "test_data has changed since the run began" in done.err
    assert "\ndata changed" not in done.err
    shown = stoker("data", "inspect", *command[2:-4])
    assert "tokens per document, train" in shown.out
    assert "tokens per document, test" in shown.out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["validation_data=pairs.jsonl", "validation=0.1"],
            "validation=0.1 is the share of data to hold out, but validation_data replaces it",
        ),
        (
            ["test_data=pairs.jsonl", "test=0.1"],
            "test=0.1 is the share of data to hold out, but test_data replaces it",
        ),
        (["test_data=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["validation_data=pairs.jsonl:2"], "evaluation data takes no weights"),
        (["validation_data=pairs.jsonl", "test=-0.1"], "greater than or equal to 0"),
        (["validation=0.5"], "less than 0.5"),
    ],
)
def test_what_makes_no_sense_together_is_refused_before_anything_starts(
    stoker: Callable[..., Any], files: Path, given: list[str], said: str
) -> None:
    done = stoker(*SMALL, "data=numbers.jsonl", *given, "--json")
    assert done.code == 2
    assert said in done.err
    assert not (files / "runs").exists()
