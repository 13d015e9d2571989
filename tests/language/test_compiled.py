"""Blocks that are compiled: few times, whatever documents there are, and to the same losses.

What GPUs compile is shown without one: tensors without values go through the kernel that GPUs have for
documents of all lengths, and torch's compiler sees the block whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from stoker.engine import activation, blocks
from stoker.language import attention, objective
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import families
from support import SOAK

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's

WIDTHS = (1, 3, 2, 5, 1)
"""Most documents in a row, batch by batch."""


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches() -> list[dict[str, torch.Tensor]]:
    """Of two rows, whose documents are told by their lengths alone."""
    drawn = torch.Generator().manual_seed(5)
    found = []
    for most in WIDTHS:
        ids = torch.randint(2, families.VOCABULARY, (2, 20), generator=drawn)
        found.append({"input_ids": ids, "labels": ids, "documents": torch.full((2, most), 20 // most)})
    return found


def model(family: str) -> Any:
    made = families.model(family, num_hidden_layers=4 if SOAK else 2)
    made.set_attn_implementation(attention.NAME)
    return made


def losses(family: str, counter: CompileCounter | None = None) -> tuple[list[float], list[int]]:
    """And the graphs that there are after each."""
    made, counted = model(family).train(), []
    called = objective.attach(made)
    for _, block in blocks.find(made, ()) if counter else ():
        block.compile(backend=counter)
    found = []
    for batch in batches():
        total, _ = called.loss(made(**called.inputs(batch)), batch)
        total.backward()
        found.append(total.item())
        counted.append(counter.frame_count if counter else 0)
    return found, counted


@pytest.mark.soak
@pytest.mark.parametrize("family", ["llama", "gemma3"] if SOAK else ["gemma3"])
def test_blocks_compile_around_attention_and_not_again_for_each_number_of_documents(family: str) -> None:
    counter = CompileCounter()
    found, graphs = losses(family, counter)
    assert found == pytest.approx(losses(family)[0], rel=1e-5)
    assert 0 < graphs[1] == graphs[-1], graphs


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_varlen_takes", lambda *_: attention._has_flash())


@pytest.mark.soak
@pytest.mark.parametrize(("recomputed", "lora"), [("selective", True), *([("none", False)] if SOAK else [])])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"] if SOAK else ["gemma3"])
def test_a_block_on_a_gpu_is_one_graph(family: str, recomputed: str, lora: bool, as_on_a_gpu: None) -> None:
    made, fake = model(family).bfloat16(), FakeTensorMode(allow_non_fake_inputs=True)
    if lora:
        made = peft.get_peft_model(made, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    without_values(made, fake)
    called = objective.attach(made)
    counter, found = CompileCounter(), blocks.find(made, ())
    activation.apply(found, recomputed)
    for _, block in found:
        block.compile(backend=counter, fullgraph=True)
    graphs = []
    for batch in batches():
        del batch["labels"]  # the loss looks at values
        with fake:
            given = called.inputs(tree_map_only(torch.Tensor, fake.from_tensor, batch))
            made(**given).logits.sum().backward()
        graphs.append(counter.frame_count)
    assert 0 < graphs[1] == graphs[-1], graphs


def without_values(made: Any, fake: FakeTensorMode) -> None:
    for module in made.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None:
                    held[name] = fake.from_tensor(old)


class Calls(TorchDispatchMode):
    """Which operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, width)."""
        bounds = torch.tensor([0, 4], dtype=torch.int32)
        query = given * self.weight
        out = varlen_attn(query, query, query, bounds, bounds, 4, 4, window_size=(-1, 0))
        assert isinstance(out, torch.Tensor)
        return out.exp()


@pytest.mark.parametrize(("how", "times"), [("selective", 1), ("full", 2)])
def test_attention_within_documents_is_kept_where_products_are(how: str, times: int) -> None:
    with FakeTensorMode(), Calls() as calls:
        block = Block().train()
        activation.apply([("block", block)], how)
        block(torch.ones(4, 2, 8, requires_grad=True)).sum().backward()
    assert calls.seen.count("torch_attn._varlen_attn.default") == times
