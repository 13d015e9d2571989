"""The text recipe from end to end: real processes, real kills, plain transformers on what it exports."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from stoker import BadInput, Run, config, exports
from stoker.cli import sharing
from stoker.integrations import mlflow as served
from stoker.language import speaking
from stoker.recipes import text
from transformers import pipeline

from commands import Command, Start
from support import loaded, slow_from, wait_for_points

WORDS = {
    "smith": ["forge", "anvil", "tongs", "quench", "iron"],
    "baker": ["oven", "flour", "yeast", "crust", "dough"],
    "sailor": ["mast", "rope", "tide", "anchor", "harbour"],
}
TRAIN = (
    "train", "text", "layers=2", "width=64", "vocab_size=300", "max_length=64", "batch_size=16",
    "precision=fp32", "lr=5e-3", "epochs=none", "max_steps=40", "eval_every=20", "checkpoint_every=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of a trade's words among others of no trade, in three files; of very unequal lengths."""
    folder, drawn = tmp_path_factory.mktemp("trades"), random.Random(0)
    others = ["the", "a", "of", "old", "new", "man", "said", "day"]
    for name, count in (("train", 300), ("validation", 40), ("test", 60)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["said", "trade"])
            for _ in range(count):
                trade = drawn.choice(list(WORDS))
                words = [*drawn.choices(WORDS[trade], k=3), *drawn.choices(others, k=drawn.randrange(20))]
                drawn.shuffle(words)
                rows.writerow([" ".join(words), trade])
    return folder


@pytest.fixture(scope="module")
def given(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    runs = tmp_path_factory.mktemp("here") / "runs"
    return (f"data={data}", "text_column=said", "label_column=trade", "--runs", str(runs))


@pytest.fixture
def whole(stoker: Command, given: tuple[str, ...]) -> Path:
    """The run that nobody interrupts, once for this module."""
    run = Path(given[-1]) / "text" / "whole"
    if not (run / "artifacts" / "report.html").exists():
        done = stoker(*TRAIN, *given, "--name", "whole")
        assert done.code == 0, done.err
    return run


def test_it_learns_and_logs_what_it_came_to(whole: Path) -> None:
    seen = loaded(whole)
    assert {"loss", "lr", "val_loss", "val_accuracy", "val_macro_f1", "tokens_per_second", "mfu"} <= {
        *seen.points
    }
    newest = seen.newest()
    assert newest["test_accuracy"] > 0.75
    assert newest["test_macro_f1"] > 0.75
    assert next(iter(seen.points["flops"].items()))[0] == 0
    assert newest["parameters"] > 20_000
    assert {"val_by_class", "test_by_class"} <= {medium.name for medium in seen.media}


def test_plain_transformers_has_the_same_accuracy_with_what_is_exported(whole: Path, data: Path) -> None:
    classify = pipeline("text-classification", model=str(whole / "artifacts" / "model"), truncation=True)
    with (data / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = [
        found["label"] == row["trade"]
        for found, row in zip(classify([row["said"] for row in rows], batch_size=7), rows, strict=True)
    ]
    assert sum(right) / len(rows) == pytest.approx(loaded(whole).newest()["test_accuracy"])


def test_killed_and_resumed_it_ends_in_the_same_bits(
    whole: Path, start: Start, stoker: Command, given: tuple[str, ...]
) -> None:
    run = whole.with_name("cut")
    process = start(*TRAIN, *given, "--name", "cut", first=slow_from(26))
    wait_for_points(process, run, 26)
    process.kill()
    process.wait()
    done = stoker(*TRAIN, *given, "--name", "cut")
    assert done.code == 0, done.err
    seen, expected = loaded(run), loaded(whole)
    assert len(seen.attempts) == 2
    assert seen.attempts[1].resumed_from >= 10
    for metric in ("loss", "lr", "val_loss", "val_accuracy", "test_loss", "flops", "parameters"):
        assert seen.points[metric] == expected.points[metric], metric
    weights = [(path / "artifacts" / "model" / "model.safetensors").read_bytes() for path in (run, whole)]
    assert weights[0] == weights[1]


@pytest.mark.filterwarnings("ignore")
def test_texts_that_are_cut_off_and_labels_that_hardly_repeat_are_said(
    stoker: Command, tmp_path: Path
) -> None:
    labels = [*range(30), *[99] * 20]
    with (tmp_path / "said.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["text", "label"], *([f"forge anvil tongs {n}", label] for n, label in enumerate(labels))]
        )
    short = ("batch_size=16", "epochs=none", "max_steps=1", "max_length=4", "eval_every=1")
    done = stoker("train", "text", f"data={tmp_path / 'said.csv'}", *TRAIN[2:5], *short)
    assert done.code == 0, done.err
    assert "50 of 50 texts are cut off at 4 tokens: increase max_length" in done.err
    assert "46 texts have 31 different labels" in done.err


def test_two_ranks_have_the_losses_of_one(stoker: Command, given: tuple[str, ...]) -> None:
    changed = ("dropout=0", "max_steps=12", "eval_every=12")
    runs = Path(given[-1])
    resolved = config.resolve(text.Config, (*TRAIN[2:], *given[:3], *changed, "micro_batch=8"), None)
    with Run("text", "one", runs=runs, config=resolved.config) as run:
        text.train(run, resolved.config)
    done = stoker(*TRAIN, *given, *changed, "parallel=fsdp", "--nproc", "2", "--name", "two")
    assert done.code == 0, done.err
    one, two = (loaded(runs / "text" / name).points for name in ("one", "two"))
    for metric in ("loss", "val_loss", "val_accuracy", "test_loss"):
        assert list(two[metric].y) == pytest.approx(list(one[metric].y), rel=1e-3), metric


def test_a_search_over_size_finds_the_best_accuracy(stoker: Command, given: tuple[str, ...]) -> None:
    done = stoker(
        "sweep", "text", *given[:3], "layers=[1, 2]", "width=[8, 16]", *TRAIN[4:9], "max_steps=5",
        "--metric", "val_accuracy", "--sampler", "grid", "--trials", "4", "--parallel", "2",
        "--json", *given[3:],
    )  # fmt: skip
    assert done.code == 0, done.err
    trials = done.answer["trials"]
    assert {trial["state"] for trial in trials} == {"complete"}
    assert done.answer["best"]["value"] == max(trial["value"] for trial in trials)
    sizes = {
        tuple(trial["params"].values()): loaded(Path(trial["run"])).newest()["flops"] for trial in trials
    }
    assert sizes[1, 8] < sizes[2, 8] < sizes[2, 16]


def test_it_is_shared_with_the_card_of_a_classifier_and_has_nothing_to_say(
    whole: Path, tmp_path: Path
) -> None:
    seen = loaded(whole)
    (tmp_path / "made").mkdir()
    made = exports.make(seen, tmp_path / "made")
    folder = sharing.prepare(seen, made, tmp_path / "merged", name="org/trades", merge=False, base=None)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "A text classifier, trained with stoker" in card
    assert 'pipeline("text-classification", model="org/trades", truncation=True)' in card
    assert "| macro F1 on the test set |" in card
    assert served._load_pyfunc(str(folder)).predict(["the anvil and the forge"]) == ["smith"]
    with pytest.raises(BadInput, match="is a bert that encodes, not a causal language model"):
        speaking.load(folder)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["width=32", "heads=5"], "heads=5 does not divide the width 32 evenly: use one of 1, 2, 4, 8"),
        (["parallel=pipeline", "--nproc", "2"], "use parallel=ddp or fsdp"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_no_run(
    overrides: list[str], said: str, stoker: Command, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a", "label": "b"}) + "\n")
    done = stoker("train", "text", "data=d.jsonl", *overrides, "--json")
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()
