"""Operations a token, against torch's own count of a forward and backward pass."""

from __future__ import annotations

import loading_run
import pytest
import torch
from stoker.engine import flops as device_flops
from stoker.language import flops
from stoker.language.lora import Lora
from torch.utils.flop_counter import FlopCounterMode

import families


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_they_are_those_that_torch_counts(family: str) -> None:
    """torch counts what its kernels are asked for: without attention, which is counted by the tokens seen."""
    model = families.model(family)
    model.set_attn_implementation("eager")
    ids = families.documents()["input_ids"]
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids).logits.sum().backward()
    by_product = counted.get_flop_counts()["Global"]
    attention = sum(count for op, count in by_product.items() if "bmm" in str(op))
    products = sum(by_product.values()) - attention
    seen = flops.per_token(model, context=0.0) * ids.numel()
    # The gradient of what goes into the first product is not asked for where that is an embedding frozen.
    assert seen == pytest.approx(products, rel=0.01)
    whole = flops.per_token(model, context=24.0) * ids.numel() - seen
    assert whole == pytest.approx(attention, rel=0.05)


def test_frozen_weights_need_a_third_less(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = families.save(tmp_path_factory.mktemp("m") / "llama", "llama")
    full, _ = loading_run.built(folder, "full")
    whole = flops.per_token(full, context=0.0)
    lora, _ = loading_run.built(folder, "lora", Lora(rank=1))
    adapters = sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)
    assert flops.per_token(lora, context=0.0) == pytest.approx(whole * 2 / 3 + 6 * adapters)
    quantised, _ = loading_run.built(folder, "qlora", Lora(rank=1))
    assert flops.per_token(quantised, context=0.0) == flops.per_token(lora, context=0.0)


def test_only_labelled_tokens_are_projected_and_few_experts_are_asked() -> None:
    model = families.model("llama")
    head = model.get_output_embeddings().weight.numel()
    half = flops.per_token(model, context=0.0, labelled=0.5)
    assert flops.per_token(model, context=0.0) - half == 3 * head
    some, all_ = (families.model("mixtral", num_experts_per_tok=n) for n in (2, 4))
    experts = sum(p.numel() for p in all_.parameters() if p.dim() == 3)
    assert flops.per_token(all_, context=0.0) - flops.per_token(some, context=0.0) == 6 * experts / 2


def test_a_peak_says_how_it_is_known() -> None:
    known = device_flops.peak(torch.device("cpu"), "fp32")
    assert known.flops > 1e9
    assert known.source.startswith("measured on ")


@pytest.mark.parametrize(
    ("name", "peak", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, "H100"),
        ("NVIDIA H100 PCIe", 756e12, "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", 312e12, "A100"),
        ("Tesla T4", 65e12, "T4"),
        ("NVIDIA L40", 181e12, "L40"),
        ("NVIDIA GB200", 2500e12, "GB200"),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_data_sheet(name: str, peak: float, sheet: str) -> None:
    assert device_flops.of_sheet(name, "bf16") == device_flops.Peak(peak, f"data sheet of {sheet}")


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA T400", "NVIDIA A1001"])
def test_a_gpu_whose_name_only_contains_another_is_measured(name: str) -> None:
    assert device_flops.of_sheet(name, "bf16") is None
