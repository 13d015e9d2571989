"""What is exported of a whole model: the files that transformers would write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from stoker import exports
from stoker.checkpoint import manifest
from stoker.errors import BadInput
from transformers import AutoModelForCausalLM

import families


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "phimoe"])
def test_names_and_pieces_are_those_of_transformers_own_files(family: str, tmp_path: Path) -> None:
    model = families.model(family)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    save_torch_state_dict(exports.as_in_files(tmp_path / "ours", model.state_dict()), tmp_path / "ours")
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_mixture_is_exported_as_its_files_were_and_so_are_its_checkpoints(
    stoker: Callable[..., Any], tmp_path: Path
) -> None:
    base = families.save(tmp_path / "mixtral", "mixtral")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"a text {n}"}) + "\n" for n in range(40)))
    done = stoker(
        "train", "llm", f"model={base}", "data=d.jsonl", "sequence_length=32", "batch_size=2", "max_steps=2",
        "generate_tokens=2", "--name", "a", "--nproc", "2", "parallel=fsdp",
    )  # fmt: skip
    assert done.code == 0, done.err
    made = tmp_path / "runs" / "llm" / "a" / "artifacts" / "model"
    assert weights(made).keys() == weights(base).keys()
    assert stoker("models", "push", "a", "pushed", "--checkpoint", "last").code == 0
    last = weights(tmp_path / "pushed")
    assert all(torch.equal(last[name], tensor) for name, tensor in weights(made).items())
    loaded = AutoModelForCausalLM.from_pretrained(made)
    experts = loaded.model.layers[0].mlp.experts
    assert not torch.equal(
        experts.down_proj, AutoModelForCausalLM.from_pretrained(base).model.layers[0].mlp.experts.down_proj
    )
    assert torch.equal(experts.down_proj[1], last["model.layers.0.block_sparse_moe.experts.1.w2.weight"])


@pytest.mark.filterwarnings("ignore")
def test_of_a_model_that_sees_the_files_of_its_eyes_come_along(
    stoker: Callable[..., Any], tmp_path: Path
) -> None:
    base = families.that_sees(tmp_path / "gemma")
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"a text {n}"}) + "\n" for n in range(40)))
    done = stoker(
        "train", "llm", f"model={base}", "data=d.jsonl", "sequence_length=32", "batch_size=2", "max_steps=1",
        "generate_tokens=2", "--name", "a",
    )  # fmt: skip
    assert done.code == 0, done.err
    made = tmp_path / "runs" / "llm" / "a" / "artifacts" / "model"
    assert "Gemma3ImageProcessor" in (made / "preprocessor_config.json").read_text()
    assert weights(made).keys() == weights(base).keys()
    shape = made.with_name("shape")
    checkpoint = manifest.read(manifest.committed(made.parent.parent / "checkpoints")[-1])
    with pytest.raises(
        BadInput, match=r"and model\.vision_tower.* was not trained: export the model when the run has"
    ):
        exports.put_weights(checkpoint, shape)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_that_an_export_is_twice_as_large_as_its_base_is_said(
    kind: torch.dtype, stoker: Callable[..., Any], tmp_path: Path
) -> None:
    base = families.with_tokenizer(tmp_path / "base")
    families.model("llama").to(kind).save_pretrained(base)
    (tmp_path / "d.jsonl").write_text('{"text": "a text of some words"}\n' * 20)
    small = ("data=d.jsonl", "sequence_length=32", "batch_size=2", "max_steps=1", "validation=0", "test=0")
    done = stoker("train", "llm", f"model={base}", *small, "--name", "a")
    assert ("`stoker models push a DEST --dtype bf16`" in done.err) == (kind is torch.bfloat16), done.err
    made = weights(tmp_path / "runs" / "llm" / "a" / "artifacts" / "model")
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
