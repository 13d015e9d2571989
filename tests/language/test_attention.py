"""Packed documents: the loss and gradients of each alone, and nothing of one seen by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stoker.language import attention, objective
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import families

WITH_EXPERTS = {"mixtral", "phimoe", "qwen3_moe"}


def packed(family: str, **settings: Any) -> tuple[Any, objective.Objective]:
    made = families.model(family, **settings).eval()
    assert attention.packs(made.config, type(made)._supports_attention_backend)
    made.set_attn_implementation(attention.NAME)
    return made, objective.attach(made)


def gradients(made: Any, total: torch.Tensor) -> list[torch.Tensor]:
    made.zero_grad()
    total.backward()
    return [p.grad.clone() for p in made.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_packed_documents_have_the_loss_and_the_gradients_of_each_alone(family: str) -> None:
    batch = families.documents()
    made, called = packed(family)
    total, count = called.loss(made(**called.inputs(batch)), batch)
    ours = gradients(made, total)
    other = families.model(family).eval()
    plain = families.alone(other, batch)
    theirs = gradients(other, plain)
    assert total.item() == pytest.approx(plain.item(), rel=1e-6)
    assert count == (batch["labels"][:, 1:] != -100).sum()
    largest = max(g.abs().max().item() for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * largest)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_change_in_one_document_moves_no_logit_of_its_neighbours(family: str) -> None:
    batch = families.documents()
    made, called = packed(family)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    with torch.no_grad():
        before = made(**called.inputs(inputs)).logits
        inputs["input_ids"] = batch["input_ids"].clone()
        inputs["input_ids"][0, 7:16] = 50  # the second document of the first row
        after = made(**called.inputs(inputs)).logits
    for same in ((0, slice(7)), (0, slice(16, None)), (1, slice(None))):
        if family in WITH_EXPERTS:  # these compute all documents' tokens in products of other shapes
            torch.testing.assert_close(before[same], after[same], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(before[same], after[same])
    assert not torch.allclose(before[0, 8:16], after[0, 8:16])


def test_documents_are_found_by_positions_where_their_lengths_are_not_said() -> None:
    batch = families.documents()
    made, called = packed("llama")
    del batch["labels"]
    with torch.no_grad():
        told = made(**called.inputs(batch)).logits
        seen = made(**called.inputs({k: v for k, v in batch.items() if k != "documents"})).logits
        whole = made(input_ids=batch["input_ids"][:, :7]).logits
    real = [slice(0, 24), slice(0, 19)]
    for row, part in enumerate(real):
        torch.testing.assert_close(told[row, part], seen[row, part])
    torch.testing.assert_close(told[0, :7], whole[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_is_that_of_a_mask(window: int | None, softcap: float | None) -> None:
    """Grouped heads, a window, a cap, a scale of one's own: against scores of the whole row under a mask."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    documents = torch.tensor([[5, 7], [4, 0]])
    mine, _ = attention.attend(
        torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, softcap=softcap,
        documents=documents,
    )  # fmt: skip
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    owner = torch.tensor([[0] * 5 + [1] * 7, [0] * 4 + [2] * 8])
    seen = torch.ones(12, 12, dtype=torch.bool).tril() & (owner[:, :, None] == owner[:, None, :])
    if window:
        seen &= torch.arange(12)[:, None] - torch.arange(12)[None] < window
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(mine[0], expected[0])
    torch.testing.assert_close(mine[1, :4], expected[1, :4])
    assert not mine[1, 4:].any(), "padding attends to nothing"


@pytest.mark.parametrize(
    ("width", "of_values", "takes"),
    [(64, 64, True), (256, 256, True), (512, 512, False), (192, 128, False), (100, 100, False)],
)
def test_heads_that_flash_attention_does_not_support_are_left_to_others(
    width: int, of_values: int, takes: bool
) -> None:
    """Those of Gemma 4, DeepSeek 3 and OpenLLaMA 3B would end in an error on a GPU."""
    with FakeTensorMode():
        query = torch.empty(1, 2, 8, width, device="cuda", dtype=torch.bfloat16)
        value = torch.empty(1, 2, 8, of_values, device="cuda", dtype=torch.bfloat16)
        assert attention._varlen_takes(query, value, 0.0, None) == takes


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_float32_weights_are_attended_in_the_precision_of_autocast(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in half precision does a GPU take one kernel for all documents."""
    seen = set()

    def takes(query: torch.Tensor, value: torch.Tensor, *_: object) -> bool:
        seen.add((query.dtype, value.dtype))
        return False

    monkeypatch.setattr(attention, "_varlen_takes", takes)
    model = families.model(family, num_hidden_layers=1)
    model.set_attn_implementation(attention.NAME)
    ids, documents = torch.randint(2, families.VOCABULARY, (1, 8)), torch.tensor([[5, 3]])
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, documents=documents)
    assert next(model.parameters()).dtype == torch.float32
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_models_that_cannot_keep_documents_apart_say_so() -> None:
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
    others = (
        transformers.BloomConfig(**small, n_head=4),  # no attention function: biases by distance
        transformers.MambaConfig(**small),  # a state along the row
        transformers.FalconConfig(**small, num_attention_heads=4),
    )
    for config in others:
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(config)
        assert not attention.packs(config, type(made)._supports_attention_backend), config.model_type


def test_a_family_with_attention_sinks_does_not_pack() -> None:
    """It would be trained without them. All families of the installed transformers are examined."""
    sources = Path(transformers.models.__file__).parent.glob("*/modeling_*.py")
    having = [file.parent.name for file in sources if "s_aux=" in file.read_text()]
    assert "gpt_oss" in having
    for name in [*having, "doge"]:  # which makes its own masks
        config = transformers.AutoConfig.for_model(name)
        kind = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
        assert kind is None or not attention.packs(config, kind._supports_attention_backend), name


def test_logits_that_are_more_than_the_head_s_are_left_to_the_model() -> None:
    """Gemma 2 caps them: its loss is computed from them, and is still the right one (above)."""
    assert not packed("gemma2")[1].in_head
    assert packed("gemma3")[1].in_head
    assert packed("qwen2")[1].in_head


def test_asked_for_no_loss_the_model_gives_logits() -> None:
    made, called = packed("llama")
    batch = families.documents()
    total, _ = called.loss(made(**called.inputs(batch)), batch)
    assert total.shape == ()
    ids = batch["input_ids"][:1, :7]
    logits = made(input_ids=ids).logits
    assert logits.shape == (1, 7, families.VOCABULARY)
    assert F.cross_entropy(logits[0, :-1], ids[0, 1:]).isfinite()
