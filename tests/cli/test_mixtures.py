"""Data as the language recipe takes it, end to end: mixed, streamed, unpacked, and out of reach."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import SOAK, loaded, slow_from, wait_for_points

SMALL = ("train", "llm", "model=tiny", "vocab_size=300", "sequence_length=64", "batch_size=4", "seed=2")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("here")


@pytest.fixture(scope="module")
def two(here: Path) -> tuple[Path, Path]:
    """Texts about numbers and texts about letters, in files of their own."""
    files = here / "numbers.jsonl", here / "letters.jsonl"
    for file, words in zip(files, ("one two three four", "a b c d e f"), strict=True):
        lines = [json.dumps({"text": f"{n} of {file.stem}: {words} {n % 7}"}) for n in range(600)]
        file.write_text("\n".join(lines) + "\n")
    return files


@pytest.fixture
def mixed(
    stoker: Callable[..., Any], two: tuple[Path, Path], here: Path
) -> Callable[[bool], tuple[tuple[str, ...], Path]]:
    """What trains on a mixture, as a stream or not, and its run that nobody stopped: once for this module."""

    def found(streaming: bool) -> tuple[tuple[str, ...], Path]:
        command = (
            *SMALL, f"data={two[0]}:3,{two[1]}:1", f"streaming={str(streaming).lower()}", "max_steps=24",
            "checkpoint_every=5", "eval_every=12", "generate_tokens=2", "--runs", str(here / "runs"),
        )  # fmt: skip
        whole = here / "runs" / "llm" / f"whole-{streaming}"
        if not (whole / "artifacts" / "report.html").exists():
            done = stoker(*command, "--name", whole.name)
            assert done.code == 0, done.err
        return command, whole

    return found


@pytest.mark.soak
@pytest.mark.parametrize("streaming", [False, True] if SOAK else [True])
def test_a_mixture_ends_in_the_same_bits_over_kills(
    stoker: Callable[..., Any], start: Callable[..., Any], mixed: Callable[..., Any], streaming: bool
) -> None:
    command, whole = mixed(streaming)
    cut = whole.with_name(f"cut-{streaming}")
    for moment in (random.SystemRandom().randint(2, 10) for _ in range(2)):
        process = start(*command, "--name", cut.name)
        wait_for_points(process, cut, moment)
        process.kill()
        process.wait()
    done = stoker(*command, "--name", cut.name)
    assert done.code == 0, done.err

    runs = [loaded(run) for run in (whole, cut)]
    assert runs[0].points["loss"] == runs[1].points["loss"]
    assert {"val_loss", "val_loss/numbers", "val_loss/letters"} <= runs[0].points.keys()
    weights = [(run / "artifacts" / "model" / "model.safetensors").read_bytes() for run in (whole, cut)]
    assert weights[0] == weights[1]


def test_a_stream_goes_on_on_two_ranks_where_one_left_it(
    stoker: Callable[..., Any], start: Callable[..., Any], mixed: Callable[..., Any]
) -> None:
    """The samples and their order are those of the run that nobody stopped, whatever the number of ranks."""
    command, whole = mixed(True)
    grown = whole.with_name("grown")
    process = start(*command, "--name", grown.name, first=slow_from(7))
    wait_for_points(process, grown, 7)
    process.kill()
    process.wait()
    done = stoker(*command, "--nproc", "2", "--name", grown.name)
    assert done.code == 0, done.err
    curves = [loaded(run).points["loss"] for run in (whole, grown)]
    assert list(curves[0]) == list(curves[1])
    assert list(curves[1].values()) == pytest.approx(list(curves[0].values()), rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("streaming", [False, True] if SOAK else [True])
def test_a_run_goes_on_with_another_number_of_sources(
    stoker: Callable[..., Any], tmp_path: Path, two: tuple[Path, Path], streaming: bool
) -> None:
    third = tmp_path / "third.jsonl"
    third.write_bytes(two[1].read_bytes())
    one, mixed = str(two[0]), f"{two[0]}:1,{two[1]}:1"
    before, after = (one, mixed) if streaming else (mixed, f"{mixed},{third}:1")
    place = ("--runs", str(tmp_path / "runs"))
    done = stoker(
        *SMALL, f"data={before}", f"streaming={str(streaming).lower()}", "max_steps=2", "generate_tokens=1",
        "--name", "grows", *place,
    )  # fmt: skip
    assert done.code == 0, done.err
    own = tmp_path / "runs" / "llm" / "grows" / "artifacts" / "shape"
    done = stoker("resume", "grows", f"data={after}", f"tokenizer={own}", "max_steps=4", *place)
    assert done.code == 0, done.err
    assert "from step 2 on the samples come in a different order" in done.err
    assert list(loaded(tmp_path / "runs" / "llm" / "grows").points["loss"]) == [1, 2, 3, 4]


def test_each_document_may_have_a_row_of_its_own(
    stoker: Callable[..., Any], tmp_path: Path, two: tuple[Path, Path]
) -> None:
    done = stoker(
        *SMALL, f"data={two[0]}", "packing=false", "max_steps=3", "generate_tokens=2",
        "--runs", str(tmp_path / "runs"), "--name", "rows", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    journal = tmp_path / "runs" / "llm" / "rows" / "journal" / "attempt-0001.rank-0.jsonl"
    (said,) = [line for line in journal.read_text().splitlines() if '"tokens_per_row"' in line]
    held_out = 600 - json.loads(said)["rows"]
    assert 20 < held_out < 120  # of 5% and 5%


def test_a_hub_dataset_out_of_reach_is_said(stoker: Callable[..., Any], tmp_path: Path) -> None:
    done = stoker(
        *SMALL, "data=someone/some-data", "max_steps=1", "--runs", str(tmp_path / "runs"),
        env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.code == 2
    assert "someone/some-data" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs" / "llm").exists()


@pytest.mark.parametrize("weights", ["a:0,b:1", "a:x,b:1", "python-docs:3,python-docs-qa"])
def test_weights_that_are_none_are_refused(stoker: Callable[..., Any], tmp_path: Path, weights: str) -> None:
    done = stoker(*SMALL, f"data={weights}", "max_steps=1", "--runs", str(tmp_path / "runs"))
    assert done.code == 2
    assert "weight" in done.err


@pytest.mark.soak
@pytest.mark.parametrize("streaming", [False, True] if SOAK else [True])
def test_how_many_documents_are_for_what_and_how_often_each_source_comes_is_said(
    stoker: Callable[..., Any], tmp_path: Path, two: tuple[Path, Path], streaming: bool
) -> None:
    few = tmp_path / "letters.jsonl"
    few.write_text("\n".join(two[1].read_text().splitlines()[:40]) + "\n")
    common = (
        *SMALL, "max_steps=1", "generate_tokens=1", f"streaming={str(streaming).lower()}", "--runs",
        str(tmp_path / "runs"),
    )  # fmt: skip
    done = stoker(*common, f"data={two[0]}:1,{few}:1", "--name", "often")
    assert done.code == 0, done.err
    looked_at = " sampled" if streaming else ""
    found = re.search(
        rf"640 documents{looked_at}: (\d+) trained on, (\d+) validation, (\d+) test\n", done.err
    )
    assert found is not None
    assert sum(map(int, found.groups())) == 640
    assert min(map(int, found.groups())) > 1
    times = [float(text) for text in re.findall(r", weight 1: seen ([\d.]+) times per epoch", done.err)]
    assert len(times) == 2
    assert times[0] < 1
    assert times[1] > 4
    assert f"data: letters is seen {times[1]:.3g} times per epoch and may be memorised" in done.err
    assert "data: numbers is passed" not in done.err

    done = stoker(*common, f"data={two[0]}", "validation=0", "test=0", "--name", "all")
    assert done.code == 0, done.err
    assert f"600 documents{looked_at}: 600 trained on\n" in done.err
    assert "times per epoch" not in done.err
