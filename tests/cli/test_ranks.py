"""The shipped recipes on several ranks: whatever the strategy, the same run comes out."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from commands import Command
from support import SOAK, loaded

LLM = (
    "train", "llm", "model=tiny", "tie_embeddings=false", "precision=fp32", "sequence_length=64",
    "batch_size=8", "max_steps=6", "eval_every=3", "generate_tokens=4", "vocab_size=400", "--json",
)  # fmt: skip
STRATEGIES = {
    "ddp": ("parallel=ddp",),
    "fsdp": ("parallel=fsdp", "activation_checkpointing=full"),
    "pipeline": ("parallel=pipeline", "micro_batch=2"),
    "zero-3": ("parallel=deepspeed", "deepspeed.stage=3", "micro_batch=2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("here")
    drawn = random.Random(0)
    words = ["forge", "coal", "iron", "spark", "bellows", "anvil", "tongs", "quench"]
    lines = [
        json.dumps({"prompt": f"What is {n}?", "completion": " ".join(drawn.choices(words, k=40))})
        for n in range(60)
    ]
    (here / "pairs.jsonl").write_text("\n".join(lines))
    return here / "runs"


@pytest.fixture
def alone(stoker: Command, runs: Path) -> Path:
    """The run of one process, once for this module."""
    run = runs / "llm" / "alone"
    if not (run / "artifacts" / "report.html").exists():
        done = stoker(*LLM, f"data={runs.parent / 'pairs.jsonl'}", "--name", "alone", "--runs", str(runs))
        assert done.code == 0, done.err
    return run


@pytest.mark.soak
@pytest.mark.parametrize("name", STRATEGIES if SOAK else ("zero-3",))
@pytest.mark.filterwarnings("ignore")
def test_a_language_model_comes_out_the_same(name: str, alone: Path, stoker: Command, runs: Path) -> None:
    data = f"data={runs.parent / 'pairs.jsonl'}"
    done = stoker(*LLM, data, *STRATEGIES[name], "--nproc", "2", "--name", name, "--runs", str(runs))
    assert done.code == 0, done.err
    expected, found = loaded(alone), loaded(runs / "llm" / name)
    for metric in ("loss", "val_loss", "test_perplexity"):
        assert list(found.points[metric].y) == pytest.approx(list(expected.points[metric].y), rel=1e-4)
    assert [m.name for m in found.media] == [m.name for m in expected.media]
    said = (found.directory.logs / "rank-0.log").read_text()
    assert re.search(r"step 3: val_perplexity \S+, \S+ tok/s \(\S+ per rank\), mfu", said)
    assert found.attempts[-1].layout["parallel"] == name.replace("zero-3", "deepspeed")
    model = AutoModelForCausalLM.from_pretrained(found.directory.artifacts / "model")
    for key, tensor in (
        AutoModelForCausalLM.from_pretrained(alone / "artifacts" / "model").state_dict().items()
    ):
        torch.testing.assert_close(model.state_dict()[key], tensor, atol=1e-4, rtol=0)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["fsdp", "pipeline"] if SOAK else ["fsdp"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_comes_out_the_same(name: str, alone: Path, stoker: Command, runs: Path) -> None:
    tune = (
        "train", "llm", f"model={alone / 'artifacts' / 'model'}", f"data={runs.parent / 'pairs.jsonl'}",
        "lora.rank=4", "lora.dropout=0", "precision=fp32", "sequence_length=64", "batch_size=8",
        "max_steps=4", "generate_tokens=2", "--json", "--runs", str(runs),
    )  # fmt: skip
    one = stoker(*tune, "--name", f"tuned-{name}-alone")
    two = stoker(*tune, *STRATEGIES[name], "--nproc", "2", "--name", f"tuned-{name}")
    assert (one.code, two.code) == (0, 0), two.err
    for metric in ("loss", "val_loss", "test_perplexity", "base_test_perplexity"):
        assert two.answer["metrics"][metric] == pytest.approx(one.answer["metrics"][metric], rel=1e-4)
    files = [{file.name for file in (runs / "llm" / f"tuned-{name}{end}" / "artifacts" / "adapter").iterdir()}
             for end in ("", "-alone")]  # fmt: skip
    assert files[0] == files[1]


@pytest.mark.filterwarnings("ignore")
def test_images_on_two_ranks(stoker: Command, tmp_path: Path) -> None:
    command = (
        "train", "image", "precision=fp32", "max_steps=12", "micro_batch=16", "batch_size=32", "workers=1",
        "--json",
    )  # fmt: skip
    one = stoker(*command, "--name", "one")
    two = stoker(*command, "--nproc", "2", "--name", "two")
    assert (one.code, two.code) == (0, 0), two.err
    curves = [list(loaded(tmp_path / "runs" / "image" / name).points["loss"].y) for name in ("one", "two")]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    model = AutoModelForImageClassification.from_pretrained(two.answer["artifacts"]["model"])
    assert model.config.num_labels == 10
