"""Adapters that go on from another, bases in 4 bits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loading_run
import pytest
import torch
from stoker.errors import BadInput
from stoker.language import adapters
from stoker.language.lora import Lora
from torch import nn
from transformers import AutoModelForCausalLM

import families

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(tmp_path_factory.mktemp("models") / "llama", "llama")


def filled(folder: Path, kind: str, lora: Lora | None = None) -> Any:
    model, language = loading_run.built(folder, kind, lora)
    language.load(model, CPU, "")
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    bare.set_attn_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=families.documents()["input_ids"]).logits
    return found


def trained_adapter(base: Path, folder: Path, kind: str) -> tuple[Path, torch.Tensor]:
    """An adapter whose weights are not those it began with, saved; and the logits with it."""
    model = filled(base, kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_is_gone_on_with_as_it_was(kind: str, base: Path, tmp_path: Path) -> None:
    folder, expected = trained_adapter(base, tmp_path / "adapter", kind)
    model = filled(base, kind, Lora(adapter=str(folder)))
    torch.testing.assert_close(logits(model), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_adapter_changes_nothing_yet(kind: str, base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(logits(filled(base, kind)), logits(plain.eval()))


def test_adapters_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    folder, _ = trained_adapter(base, tmp_path / "adapter", "lora")
    wider = families.save(tmp_path / "wider", "llama", hidden_size=128)
    with pytest.raises(BadInput, match="is for another model: size mismatch"):
        filled(wider, "lora", Lora(adapter=str(folder)))
    deeper = families.save(tmp_path / "deeper", "llama", num_hidden_layers=5)
    with pytest.raises(BadInput, match=r"is for another model: .*layers\.4.* is not on both"):
        filled(deeper, "lora", Lora(adapter=str(folder)))
    (folder / adapters.BASE).write_text(json.dumps({"model": "org/other", "fingerprint": "0" * 64}))
    with pytest.raises(BadInput, match="trained on another model, org/other"):
        filled(base, "lora", Lora(adapter=str(folder)))
    (folder / "adapter_model.safetensors").write_bytes(b"cut off")
    (folder / adapters.BASE).unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        filled(base, "lora", Lora(adapter=str(folder)))
    with pytest.raises(BadInput, match=r"has no adapter_config\.json"):
        filled(base, "lora", Lora(adapter=str(base)))


def test_names_that_match_no_module_are_refused(base: Path) -> None:
    with pytest.raises(BadInput, match=r"lora\.targets=q_proy"):
        loading_run.built(base, "lora", Lora(rank=4, targets="q_proy"))


def test_a_kind_without_a_rank_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"give them a lora\.rank"):
        Lora(dora=True)
    with pytest.raises(ValueError, match=r"has its own rank: leave out lora\.rank"):
        Lora(adapter="somewhere", rank=4)


def test_a_base_in_4_bits_is_that_of_bitsandbytes(base: Path) -> None:
    """The weights as transformers' own 4-bit loading has them: quantised by bitsandbytes, layer by layer."""
    from bitsandbytes import functional

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in plain.modules():
        if type(layer) is nn.Linear and layer is not plain.get_output_embeddings():
            codes, state = functional.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
            layer.weight.data = functional.dequantize_4bit(codes, state)
    model = filled(base, "qlora")
    torch.testing.assert_close(logits(model), logits(plain.eval()))
    packed = sum(
        p.nbytes for name, p in model.named_parameters() if ".layers." in name and "lora_" not in name
    )
    whole = sum(p.nbytes for name, p in plain.named_parameters() if ".layers." in name)
    assert packed < 0.16 * whole  # 4 bits and a 64th of 32 of 32


def test_gradients_go_through_a_base_in_4_bits_as_through_its_values(base: Path) -> None:
    from stoker.language.quantised import Linear4bit

    layer = next(m for m in filled(base, "qlora").modules() if isinstance(m, Linear4bit))
    inputs = torch.randn(5, layer.in_features, requires_grad=True)
    weight = layer(torch.eye(layer.in_features)).T.detach()
    expected = nn.functional.linear(inputs, weight)
    torch.testing.assert_close(layer(inputs), expected)
    (ours,) = torch.autograd.grad(layer(inputs).square().sum(), inputs)
    (theirs,) = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)
