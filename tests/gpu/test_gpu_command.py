"""The command on a GPU: ranks from the forkserver, restarts, profiles, what the machine does meanwhile."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path

import pytest

import families
from cli.test_launch import _ranks
from commands import Command, Start
from support import ON_A_GPU, loaded, wait_for_points

pytestmark = ON_A_GPU

SMALL = (
    "model=model", "data=texts.jsonl", "sequence_length=64", "batch_size=16", "micro_batch=8",
    "deterministic=true", "generate_tokens=4", "max_steps=400",
)  # fmt: skip


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> None:
    """A small model, and what it is to learn."""
    families.save(tmp_path / "model", "llama")
    texts = (f"The module number {n} has {n * 7 % 13} functions. " * 8 for n in range(400))
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")


def losses(tmp_path: Path, name: str) -> dict[int, float]:
    return dict(loaded(tmp_path / "runs" / "llm" / name).points["loss"].items())


@pytest.mark.parametrize(
    "setting", ["precision=bf16", "precision=fp32", "kernels=liger", "quantisation=nf4", "compile=true"]
)
def test_an_adapter_is_trained_killed_resumed_and_asked(
    setting: str, stoker: Command, start: Start, tmp_path: Path
) -> None:
    """What was killed and resumed has the losses of what was not, to the bit."""
    needs = {"kernels=liger": "liger_kernel", "quantisation=nf4": "bitsandbytes"}
    if setting in needs and importlib.util.find_spec(needs[setting]) is None:
        pytest.skip(f"{needs[setting]} is not installed")
    given = (
        "train", "llm", "lora.rank=8", "lora.dropout=0.1", *SMALL, "checkpoint_every=10", "eval_every=200",
        setting,
    )  # fmt: skip
    whole = stoker(*given, "--name", "whole")
    assert whole.code == 0, whole.err
    killed = start(*given, "--name", "parts")
    wait_for_points(killed, tmp_path / "runs" / "llm" / "parts", 25)
    assert killed.poll() is None, "it was not fast enough to kill it"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    parts = stoker(*given, "--name", "parts")
    assert parts.code == 0, parts.err
    assert len(losses(tmp_path, "whole")) == 400
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")
    said = stoker("generate", "whole", "--prompt", "The module", "--max-tokens", "8", "--json")
    assert said.code == 0, said.err


@pytest.mark.parametrize("parallel", ["single", "fsdp"])
def test_a_rank_that_is_killed_starts_again_from_the_forkserver(
    parallel: str, stoker: Command, start: Start, tmp_path: Path
) -> None:
    given = (
        "train", "llm", f"parallel={parallel}", "precision=bf16", *SMALL, "checkpoint_every=10",
    )  # fmt: skip
    whole = stoker(*given, "--name", "whole")
    assert whole.code == 0, whole.err
    process = start(*given, "--name", "parts", "--max-restarts", "1")
    wait_for_points(process, tmp_path / "runs" / "llm" / "parts", 25)
    assert process.poll() is None, "it was not fast enough to kill it"
    _ranks(process)[0].kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


def test_a_profile_and_what_the_gpu_does_are_kept(stoker: Command, tmp_path: Path) -> None:
    done = stoker("train", "llm", *SMALL, "--name", "a", "--profile", "5:8")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "llm" / "a"
    assert [file for file in run.rglob("*") if "profile" in file.name or "trace" in file.name]
    seen = loaded(run)
    assert any(name.endswith("gpu_0_memory_used_bytes") for name in seen.system), sorted(seen.system)
    assert any(name.endswith("mfu") for name in seen.points)
    report = stoker("report", "a")
    assert report.code == 0, report.err


def test_a_run_says_how_near_its_plan_came(stoker: Command, tmp_path: Path) -> None:
    given = "llm", *SMALL, "precision=bf16"
    assert stoker("plan", *given).code == 0
    done = stoker("train", *given, "--name", "planned")
    assert "; the plan was " in done.err
    events = loaded(tmp_path / "runs" / "llm" / "planned").directory.journal.glob("*.jsonl")
    assert any('"planned"' in file.read_text() for file in events)


def test_more_ranks_than_gpus_are_refused(stoker: Command) -> None:
    done = stoker("train", "llm", *SMALL, "batch_size=64", "--nproc", "64")
    assert done.code == 2
    assert "64 ranks on a machine with" in done.err
