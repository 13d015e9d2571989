"""`stoker checkpoints`: what is there, whether it is whole, and its weights as a directory others load."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stoker import Run
from stoker.checkpoint import manifest
from stoker.checkpoint.store import export_model, load_tensors, shapes
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import Command, Start
from support import LONG, SOAK, loaded, slow_from, wait_for_points

LLM = (
    "train", "llm", "precision=fp32", "sequence_length=64", "batch_size=8", "max_steps=2000",
    "checkpoint_every=2", "generate_tokens=4", "vocab_size=400", "eval_every=2000",
)  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of this module share: data, and the run that `stopped` copies."""
    folder = tmp_path_factory.mktemp("here")
    lines = [
        json.dumps({"prompt": f"What is {n}?", "completion": "coal iron spark " * 20}) for n in range(60)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def data(here: Path) -> str:
    return f"data={here / 'pairs.jsonl'}"


@pytest.fixture
def stopped(start: Start, data: str, here: Path, tmp_path: Path) -> Path:
    """A run that was told to stop before its end: trained once, of which each test has a copy."""
    run, kept = tmp_path / "runs" / "llm" / "a", here / "a"
    if kept.exists():
        return shutil.copytree(kept, run)
    _stopped(start, tmp_path, "a", data, "model=tiny", "tie_embeddings=false")
    shutil.copytree(run, kept)
    return run


def _stopped(start: Start, folder: Path, name: str, *arguments: str) -> Path:
    run = folder / "runs" / "llm" / name
    process = start(*LLM, *arguments, "--name", name, first=slow_from(8))
    wait_for_points(process, run, 8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 75, err.decode()
    return run


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_has_not_ended_is_exported_as_a_directory_that_others_load(
    stopped: Path, start: Start, stoker: Command, data: str, tmp_path: Path
) -> None:
    done = stoker("checkpoints", "export", "a", "-o", "model", "--json")
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("What is 1?")["input_ids"]
    _assert_weights(model, stopped, adapter=False)

    run = _stopped(start, tmp_path, "b", data, f"model={tmp_path / 'model'}", "lora.rank=2")
    assert stoker("checkpoints", "export", "b", "-o", "adapter").code == 0
    from peft import AutoPeftModelForCausalLM

    _assert_weights(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), run, adapter=True)


KILLED = """
import os
from stoker.run import artifacts
artifacts.describe = lambda *given: os.kill(os.getpid(), 9)
"""


def test_a_run_whose_model_was_not_yet_described_when_it_was_killed_is_exported(
    start: Start, stoker: Command, data: str, tmp_path: Path
) -> None:
    given = (data, "model=tiny", "tie_embeddings=false")
    killed = start(*LLM, *given, "--name", "a", first=KILLED)
    killed.communicate(timeout=LONG)
    assert killed.returncode == -signal.SIGKILL
    shape = tmp_path / "runs" / "llm" / "a" / "artifacts" / "shape"
    assert (shape / "config.json").exists()
    (shape / "adapter_config.json").write_text("{")  # of an attempt that trained an adapter

    for target in ("first", "of-another-machine"):
        run = _stopped(start, tmp_path, "a", *given)
        done = stoker("checkpoints", "export", "a", "-o", target)
        assert done.code == 0, done.err
        _assert_weights(AutoModelForCausalLM.from_pretrained(tmp_path / target), run, adapter=False)
        shutil.rmtree(shape)


@pytest.mark.soak(small=False)
def test_what_is_as_it_was_described_is_not_described_again(
    stopped: Path, start: Start, data: str, tmp_path: Path
) -> None:
    _stopped(start, tmp_path, "a", data, "model=tiny", "tie_embeddings=false")
    assert ["artifact" in file.read_text() for file in _journals(stopped)] == [True, False]


@pytest.mark.parametrize("name", ["w.pt", "deep.er/w.ckpt"])
def test_a_file_of_a_format_that_is_not_written_is_refused_and_no_folder_is_made(
    stoker: Command, tmp_path: Path, name: str
) -> None:
    with Run("llm", "a", runs=tmp_path / "runs") as run:
        run.log(loss=1.0)
    refused = stoker("checkpoints", "export", "a", "-o", name)
    assert refused.code == 2
    plain = name.rpartition(".")[0]
    assert f"give {plain}.safetensors for one file, or {plain} for a folder" in refused.err
    assert not (tmp_path / name).exists()


def test_weights_that_nothing_describes_are_not_exported_as_a_model(
    stopped: Path, stoker: Command, tmp_path: Path
) -> None:
    (journal,) = _journals(stopped)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"artifact"' not in line))
    for command in (("checkpoints", "export", "a", "-o"), ("models", "push", "a", "--checkpoint", "last")):
        done = stoker(*command, "model")
        assert done.code == 2
        assert "run 'a' has not recorded its model's config" in done.err
        assert not (tmp_path / "model").exists()
    assert stoker("checkpoints", "export", "a", "-o", "a.safetensors").code == 0


def _journals(run: Path) -> list[Path]:
    return sorted((run / "journal").glob("*.rank-0.jsonl"))


def _assert_weights(model: torch.nn.Module, run: Path, *, adapter: bool) -> None:
    """The model has what the newest checkpoint has."""
    newest, _ = manifest.newest(run / "checkpoints")
    assert newest is not None
    saved = {n: torch.empty(s, dtype=d) for n, (s, d) in shapes(newest).items() if n.startswith("model.")}
    load_tensors(newest, saved)
    parameters = dict(model.named_parameters())
    compared = [name for name in saved if name.removeprefix("model.") in parameters]
    assert len(compared) == len([name for name in saved if not adapter or "lora_" in name])
    assert all(torch.equal(parameters[name.removeprefix("model.")], saved[name]) for name in compared)


def test_a_run_that_is_extended_exports_its_weights_anew(stoker: Command, tmp_path: Path) -> None:
    recipe = str(Path(__file__).with_name("ranked.py"))
    run = tmp_path / "runs" / "ranked" / "a"
    for command in (("train", recipe, "steps=20", "--name", "a"), ("resume", "a", "steps=40")):
        done = stoker(*command)
        assert done.code == 0, done.err
        newest, _ = manifest.newest(run / "checkpoints")
        assert newest is not None
        expected = load_file(export_model(newest, tmp_path / "expected.safetensors"))
        found = load_file(run / "artifacts" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


BY_SCORE = """
import torch
import stoker

def train(run: stoker.Run) -> None:
    trainer = stoker.Trainer(
        run, torch.nn.Linear(1, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss=lambda out, batch: (out.square().sum(), len(out)), best="val_accuracy",
        training=stoker.Training(checkpoint_every=1, keep_every=1),
    )
    for batch in trainer.steps(trainer.loader([torch.ones(1)] * 8, batch_size=2), max_steps=4):
        trainer.step(batch)
        step = run.step
        run.log(val_loss=1.0 + step, val_accuracy={3: 0.9}.get(step, 0.5))
"""


def test_the_best_is_that_by_the_metric_that_the_run_kept_its_best_by(
    stoker: Command, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(BY_SCORE, encoding="utf-8")
    done = stoker("train", "own.py", "--name", "a")
    assert done.code == 0, done.err
    for options, step in (((), 3), (("--metric", "val_loss"), 1)):
        target = f"{step}.safetensors"
        found = stoker("checkpoints", "export", "a", "best", "-o", target, *options, "--json")
        assert found.code == 0, found.err
        assert found.answer["checkpoint"]["step"] == step


def test_the_list_marks_the_best_and_says_from_when_a_metric_is(stoker: Command, tmp_path: Path) -> None:
    script = BY_SCORE.replace("run.log(val_loss", "run.log(loss=1.0)\n        if step != 4: run.log(val_loss")
    (tmp_path / "own.py").write_text(script, encoding="utf-8")
    assert stoker("train", "own.py", "--name", "a").code == 0
    *_, three, four = stoker("checkpoints", "a").out.splitlines()
    assert three.split()[3:] == ["1", "4", "0.9", "step-00000003,", "best", "by", "val_accuracy"]
    assert "4 (step 3)  0.9 (step 3)  step-00000004" in four
    answer = stoker("checkpoints", "a", "--json").answer
    assert answer["best_by"] == "val_accuracy"
    assert [row["best"] for row in answer["checkpoints"]] == [False, False, True, False]
    assert answer["checkpoints"][-1]["measured_at"] == {"loss": 4, "val_loss": 3, "val_accuracy": 3}


def test_an_export_of_weights_that_were_not_measured_is_said(stoker: Command, tmp_path: Path) -> None:
    """The value is of an earlier step, and the checkpoint was due later."""
    script = BY_SCORE.replace("run.log(val_loss", "if step != 4: run.log(val_loss")
    (tmp_path / "own.py").write_text(script, encoding="utf-8")
    assert stoker("train", "own.py", "--name", "a").code == 0
    done = stoker("checkpoints", "export", "a", "best", "-o", "best.safetensors")
    assert "that of its own weights is not known" not in done.err
    assert stoker("checkpoints", "rm", "a", "3").code == 0
    done = stoker("checkpoints", "export", "a", "best", "-o", "again.safetensors")
    assert "step-00000004 is the best by val_accuracy, which was measured at step 3" in done.err


def test_what_is_there_is_listed_verified_and_removed(stopped: Path, stoker: Command) -> None:
    listed = stoker("checkpoints", "a", "--json").answer["checkpoints"]
    assert listed == stoker("checkpoints", "list", "a", "--json").answer["checkpoints"]
    steps = [row["step"] for row in listed]
    assert steps == [manifest.step_of(path) for path in manifest.committed(stopped / "checkpoints")]
    shard = next(manifest.folder(stopped / "checkpoints", steps[-1]).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = stoker("checkpoints", "verify", "a")
    assert done.code == 1
    assert f"{shard.name} does not match its checksum" in done.out
    assert stoker("checkpoints", "rm", "a", str(steps[-1])).code == 0
    assert stoker("checkpoints", "verify", "a").code == 0
    for step in steps[:-2]:
        assert stoker("checkpoints", "rm", "a", str(step)).code == 0
    kept = stoker("checkpoints", "rm", "a", str(steps[-2]))
    assert kept.code == 2
    assert "is the only checkpoint of 'a', which has not finished" in kept.err
    assert stoker("checkpoints", "rm", "a", str(steps[-2]), "--yes").code == 0
    done = stoker("checkpoints", "rm", "a", "999")
    assert done.code == 2
    assert "has no checkpoint of step 999; it has" in done.err
    done = stoker("checkpoints", "lsit", "a")
    assert done.code == 2


WORSE = {  # with a rate at which the last weights are not the best
    "llm": (
        "model=tiny", "vocab_size=300", "sequence_length=64", "batch_size=2", "lr=0.3", "schedule=constant",
        "data=texts.jsonl", "generate_tokens=0",
    ),
    "image": ("data=digits", "lr=3", "workers=0", "schedule=constant"),
    "text": (
        "layers=2", "width=32", "vocab_size=300", "max_length=32", "lr=0.1", "schedule=constant",
        "data=texts.jsonl",
    ),
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("recipe", WORSE if SOAK else ["llm"])
def test_the_best_weights_are_tested_and_exported_where_they_are_asked_for(
    recipe: str, stoker: Command, tmp_path: Path
) -> None:
    rows = [{"text": f"{n} is {('even', 'odd')[n % 2]}", "label": "ab"[n % 2]} for n in range(200)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = stoker(
        "train", recipe, *WORSE[recipe], "precision=fp32", "max_steps=8", "eval_every=2", "warmup=0",
        "load_best=true", "--name", "a", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    view = loaded(Path(done.answer["run"]))
    measured = dict(view.points["val_loss" if recipe == "llm" else "val_accuracy"].items())
    sign = 1 if recipe == "llm" else -1
    best = min(sorted(measured.keys() - {0}), key=lambda step: sign * measured[step])
    assert best < 8, measured
    assert f"the model has the weights of step {best}, the best by" in done.err
    assert stoker("checkpoints", "export", "a", "best", "-o", "best").code == 0
    assert stoker("checkpoints", "export", "a", "last", "-o", "last").code == 0
    exported, of_best, of_last = (
        load_file(folder / "model.safetensors")
        for folder in (Path(done.answer["run"], "artifacts", "model"), tmp_path / "best", tmp_path / "last")
    )
    assert all(torch.equal(tensor, of_best[name]) for name, tensor in exported.items())
    assert any(not torch.equal(tensor, of_last[name]) for name, tensor in exported.items())
