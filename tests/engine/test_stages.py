"""Cutting models into stages, and finding their blocks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from stoker import BadInput
from stoker.engine import blocks, stages
from stoker.engine.random_state import seed_everything
from strategies_run import llama, resnet
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SMALL: dict[str, dict[str, Any]] = {
    family: {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "tie_word_embeddings": False,
        "sliding_window": 4, "pad_token_id": 0,
    }
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
}  # fmt: skip
SMALL["gpt2"] = {
    "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 64, "n_positions": 32, "embd_pdrop": 0.5,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("costs", "count", "expected"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([5, 1, 1, 1, 1], 2, [1, 4]),
        ([1, 1, 1, 9], 3, [2, 1, 1]),
        ([3, 3, 3], 3, [1, 1, 1]),
        ([7], 1, [1]),
    ],
)
def test_stages_are_balanced_by_their_costliest(costs: list[int], count: int, expected: list[int]) -> None:
    found = stages.balance(costs, count)
    heaviest = max(sum(costs[n] for n in part) for part in found)
    sizes = [0]
    for size in expected:
        sizes.append(sizes[-1] + size)
    assert heaviest == max(sum(costs[a:b]) for a, b in itertools.pairwise(sizes))
    assert [n for part in found for n in part] == list(range(len(costs)))
    assert all(part for part in found)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_stages_one_after_the_other_are_the_model(family: str, count: int) -> None:
    assert family in stages.FAMILIES
    seed_everything(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL[family])).eval()
    made = stages.cut(model, count)
    parts = [stages.take(model, made, [n]) for n in range(count)]
    names = [{name for name, _ in part.named_parameters()} for part in parts]
    assert set.union(*names) == {name for name, _ in model.named_parameters()}
    assert sum(len(n) for n in names) == len(set.union(*names)), "no parameter is on two stages"
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    more = {"position_ids": torch.arange(12)[None].repeat(2, 1), "use_cache": False}
    inner = made.prefix.rstrip(".").rpartition(".")[0]
    with torch.no_grad():
        expected = model(input_ids=ids, **more).logits
        flowing = parts[0].get_submodule(inner)(input_ids=ids, **more).last_hidden_state
        for part in parts[1:-1]:
            flowing = part.get_submodule(inner)(inputs_embeds=flowing, **more).last_hidden_state
        found = parts[-1](inputs_embeds=flowing, **more).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_sequential_is_cut_with_the_names_it_has() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    made = stages.cut(model, 2)
    names = [[n for n, _ in stages.take(model, made, [stage]).named_parameters()] for stage in range(2)]
    assert [n for part in names for n in part] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("model", "count", "said"),
    [
        (llama, 5, "5 pipeline stages, but the model has 4 blocks: use 4 or fewer"),
        (
            lambda: llama(tied=True),
            2,
            "stages would share a parameter, lm_head.weight = model.embed_tokens.weight",
        ),
        (resnet, 2, "cannot split a ResNetForImageClassification"),
        (lambda: nn.Linear(2, 2), 2, "cannot split a Linear"),
    ],
)
def test_what_cannot_be_cut_is_refused(model: Any, count: int, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        stages.cut(model(), count)


def test_blocks_are_found_by_the_structure() -> None:
    assert [name for name, _ in blocks.find(llama())] == [f"model.layers.{n}" for n in range(4)]
    found = blocks.find(resnet())
    assert found
    assert all("stages" in name for name, _ in found)
    assert blocks.find(nn.Linear(2, 2)) == []
    assert len(blocks.find(llama(), ["LlamaMLP"])) == 4
    with pytest.raises(BadInput, match="no module is a Nothing; the model has"):
        blocks.find(llama(), ["Nothing"])
