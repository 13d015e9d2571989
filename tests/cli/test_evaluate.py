"""`stoker evaluate`: what training measured is measured again, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import Command
from support import SOAK, loaded

SMALL = ("train", "llm", "vocab_size=300", "sequence_length=64", "batch_size=4", "max_steps=3", "lr=0.01")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, about in (("a", "letters"), ("b", "numbers")):
        lines = [json.dumps({"text": f"{n} of {about}: " + about * (n % 5 + 1)}) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.soak
def test_a_model_and_an_adapter_have_the_loss_that_training_measured(stoker: Command, files: Path) -> None:
    held_out = ("data=a.jsonl", "validation_data=a.jsonl,b.jsonl", "test=0", "generate_tokens=2")
    for name, more, layouts in (
        ("whole", (), ((1, "auto"), (2, "ddp"))),
        ("adapter", ("model=runs/llm/whole", "lora.rank=4"), ((2, "fsdp"), (1, "auto"))),
    ):
        done = stoker(*SMALL, *held_out, *more, "--name", name)
        assert done.code == 0, done.err
        trained = loaded(files / "runs" / "llm" / name).newest()
        for ranks, layout in layouts if SOAK else layouts[:1]:
            done = stoker(
                "evaluate", name, "data=a.jsonl,b.jsonl", f"parallel={layout}", "generate_tokens=2",
                "--nproc", str(ranks), "--name", f"{name}-{layout}", "--json",
            )  # fmt: skip
            assert done.code == 0, done.err
            found: dict[str, Any] = done.answer["metrics"]
            assert found["test_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)
            assert found["test_loss/b"] == pytest.approx(trained["val_loss/b"], rel=1e-5)
            assert found["test_perplexity"] == pytest.approx(trained["val_perplexity"], rel=1e-5)
    seen = loaded(files / "runs" / "evaluation" / "adapter-fsdp")
    assert seen.status == "finished"
    assert seen.directory.record()["sources"]["sequence_length"] == "run llm/adapter"
    assert seen.config["sequence_length"] == 64
    assert {media.name for media in seen.media} == {"generations", "memory"}
    moved = stoker("evaluate", "runs/llm/adapter/artifacts/adapter", "data=b.jsonl", "base=runs/llm/whole")
    assert moved.code == 0, moved.err


@pytest.mark.soak(small=False)
def test_a_checkpoint_has_the_loss_that_training_measured_then(stoker: Command, files: Path) -> None:
    measured = (
        "data=a.jsonl", "validation_data=b.jsonl", "test=0", "generate_tokens=0", "eval_every=1",
        "checkpoint_every=1",
    )  # fmt: skip
    for name, more in (("whole", ()), ("adapter", ("model=runs/llm/whole", "lora.rank=4"))):
        done = stoker(*SMALL, *measured, *more, "--name", name)
        assert done.code == 0, done.err
        losses = loaded(files / "runs" / "llm" / name).points["val_loss"]
        at = dict(zip(losses.x, losses.y, strict=True))
        for step in (2, 3):
            given = ("data=b.jsonl", "generate_tokens=0", "--checkpoint", str(step))
            done = stoker("evaluate", name, *given, "--name", f"{name}-{step}", "--json")
            assert done.code == 0, done.err
            assert done.answer["metrics"]["test_loss"] == pytest.approx(at[step], rel=1e-5)
        assert at[2] != pytest.approx(at[3], rel=1e-4)
    checkpoint = files / "runs" / "llm" / "adapter" / "checkpoints" / "step-00000002"
    assert loaded(files / "runs" / "evaluation" / "adapter-2").config["model"] == str(checkpoint)
    goes_on = (*SMALL, *measured, "model=runs/llm/whole", f"lora.adapter={checkpoint}", "--name", "more")
    assert stoker(*goes_on).code == 0
    for given, said in (
        (("whole", "data=b.jsonl", "--checkpoint", "7"), "no checkpoint '7': give best, last, or one of"),
        (
            ("runs/llm/whole/artifacts/model", "data=b.jsonl", "--checkpoint", "2"),
            "--checkpoint 2 needs a run",
        ),
    ):
        done = stoker("evaluate", *given)
        assert (done.code, said in done.err) == (2, True), done.err


def test_each_source_is_read_by_its_own_columns_as_in_training(stoker: Command, files: Path) -> None:
    lines = [json.dumps({"body": f"{n} of letters"}) for n in range(40)]
    (files / "c.jsonl").write_text("\n".join(lines) + "\n")
    (files / "mixed.yaml").write_text(
        "data: a.jsonl:1,c.jsonl:1\ncolumns: {c.jsonl: {text: body}}\n"
        "generate_tokens: 0\nvalidation: 0.1\ntest: 0\n"
    )
    mixed = (*SMALL, "--config", "mixed.yaml", "--name", "mixed")
    for _ in range(2):
        done = stoker(*mixed)
        assert done.code == 0, done.err
    assert len(loaded(files / "runs" / "llm" / "mixed").attempts) == 1  # the second found it finished
    for data in ("c.jsonl", "a.jsonl", "a.jsonl,c.jsonl"):
        done = stoker(
            "evaluate", "mixed", f"data={data}", "generate_tokens=0", "--name", data.replace(",", "-")
        )
        assert done.code == 0, done.err
    done = stoker("evaluate", "mixed", "data=c.jsonl", "columns={a.jsonl: {text: body}}")
    assert done.code == 2
    assert "columns: 'a.jsonl' is not a source of the data; did you mean 'c.jsonl'" in done.err


def test_what_cannot_be_evaluated_is_refused_before_anything_is_started(stoker: Command, files: Path) -> None:
    assert stoker(*SMALL, "data=a.jsonl", "--name", "a").code == 0
    done = stoker("evaluate", "a")
    assert (done.code, "data needs a value: add data=... to the command" in done.err) == (2, True), done.err
    (files / "runs" / "llm" / "a" / "artifacts" / "model").rename(files / "moved")
    for arguments, said in (
        (("a", "data=b.jsonl"), "run llm/a has exported no model yet"),
        (("moved",), "data needs a value"),
        (("moved", "data=c.jsonl"), "c.jsonl does not exist"),
        (
            ("moved", "data=a.jsonl:2,b.jsonl:1"),
            "data=a.jsonl:2,b.jsonl:1: evaluation data takes no weights: use data=a.jsonl,b.jsonl",
        ),
        (("moved", "data=b.jsonl", "base=moved"), "is a whole model"),
        (("moved", "data=b.jsonl", "parallel=pipeline"), "parallel"),
        (("moved", "data=b.jsonl", "sequence_length=4096"), "2048 positions of moved: shorten it\n"),
        (("nowhere", "data=b.jsonl"), "no run 'nowhere'"),
    ):
        done = stoker("evaluate", *arguments)
        assert (done.code, said in done.err) == (2, True), done.err
    assert not (files / "runs" / "evaluation").exists()


def test_it_is_a_job_with_the_options_of_training_and_is_reproduced(stoker: Command, files: Path) -> None:
    assert stoker(*SMALL, "data=a.jsonl", "--name", "a").code == 0
    asked = ("evaluate", "a", "data=b.jsonl", "generate_tokens=0", "--time", "4h", "--name", "b")
    here = stoker(*asked, "--retries", "2", "--dry-run")
    assert here.code == 0, here.err
    assert here.out.endswith(" --max-time 4h --max-restarts 2\n")
    done = stoker(*asked, "--on", "slurm", "--gpus", "1", "--dry-run")
    assert done.code == 0, done.err
    assert "-m stoker evaluate a data=b.jsonl generate_tokens=0 --name b" in done.out
    assert stoker(*here.out.partition(" -m stoker ")[2].split()).code == 0
    assert loaded(files / "runs" / "evaluation" / "b").status == "finished"
    again = stoker("reproduce", "evaluation/b")
    assert again.code == 0, again.err
    assert "\nbit-identical\n  compared     test_loss, test_perplexity\n" in again.out
