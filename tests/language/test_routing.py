"""The loss that keeps a mixture's experts in even use: that of transformers, in training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loading_run
import peft
import pytest
import torch
from stoker.engine import activation, blocks
from stoker.errors import BadInput
from stoker.language import attention, objective
from torch._dynamo.testing import CompileCounter

import families
import ranks
from commands import Command
from support import SOAK

WITH_EXPERTS = [family for family in families.FAMILIES if family in ("mixtral", "phimoe", "qwen3_moe")]


def rows() -> dict[str, torch.Tensor]:
    """One document a row, the second with padding."""
    batch = families.documents()
    lengths = torch.tensor([[24], [19]])
    positions = torch.arange(24).expand(2, 24)
    return {**batch, "position_ids": positions, "documents": lengths}


def theirs(made: Any, batch: dict[str, torch.Tensor], **asked: Any) -> torch.Tensor:
    """The loss of plain transformers: a mean over the tokens that count, and its own loss of the routers."""
    real = (batch["position_ids"] < batch["documents"]).long()
    loss: torch.Tensor = made(
        input_ids=batch["input_ids"], attention_mask=real, labels=batch["labels"], use_cache=False, **asked
    ).loss
    return loss


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_the_loss_in_training_is_that_of_transformers(family: str, lora: bool) -> None:
    def built(kernel: str, **settings: Any) -> Any:
        made = families.model(family, router_aux_loss_coef=0.3, **settings).train()
        made.set_attn_implementation(kernel)
        if not lora:
            return made
        torch.manual_seed(0)
        return peft.get_peft_model(made, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))

    batch = rows()
    plain, made = built("eager"), built(attention.NAME)
    torch.manual_seed(1)  # Phi's routers are noisy in training
    expected = theirs(plain, batch, output_router_logits=True)
    called = objective.attach(made, 0.3)
    torch.manual_seed(1)
    total, counted = called.loss(made(**called.inputs(batch)), batch)
    assert (total / counted).item() == pytest.approx(expected.item(), rel=1e-5)
    torch.manual_seed(1)
    assert expected.item() > theirs(plain, batch).item() + 0.2, "it does count"
    (total / counted).backward()
    expected.backward()
    for ours, other in zip(made.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (other.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-5)

    made.eval()
    alone, counted = called.loss(made(**called.inputs(batch)), batch)
    assert (alone / counted).item() == pytest.approx(theirs(plain.eval(), batch).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "in_config", "weight"),
    [(None, True, 0.02), (None, False, 0), (0.0, True, 0), (0.5, False, 0.5)],
)
def test_what_is_not_given_is_what_the_model_s_config_says(
    asked: float | None, in_config: bool, weight: float
) -> None:
    made = families.model("mixtral", router_aux_loss_coef=0.02, output_router_logits=in_config)
    routing = objective.attach(made, asked).routing
    assert (routing.weight if routing is not None else 0) == weight


def test_a_model_without_experts_is_refused() -> None:
    assert objective.attach(families.model("llama")).routing is None
    with pytest.raises(BadInput, match=r"router_aux_loss=0\.1: transformers has no such loss for 'llama'"):
        objective.attach(families.model("llama"), 0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_blocks_are_compiled_and_recomputed_with_it() -> None:
    def losses(compiled: bool) -> list[float]:
        made = families.model("mixtral", num_hidden_layers=2).train()
        made.set_attn_implementation(attention.NAME)
        called, found = objective.attach(made, 0.3), []
        if compiled:
            activation.apply(blocks.find(made, ()), "full")
            for _, block in blocks.find(made, ()):
                block.compile(backend=CompileCounter())
        optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            total, counted = called.loss(made(**called.inputs(rows())), rows())
            (total / counted).backward()
            optimizer.step()
            found.append(total.item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "mixtral"
    settings = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "num_hidden_layers": 2}
    return families.save(folder, "mixtral", **settings)


@pytest.fixture(scope="module")
def alone(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    """Losses and weights of one process."""
    folder = tmp_path_factory.mktemp("alone")
    (found,) = ranks.run(loading_run.train, 1, folder, saved, folder, "single", "full")
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"] if SOAK else ["fsdp"])
def test_under_every_strategy_it_is_as_in_one_process(
    strategy: str, saved: Path, alone: tuple[list[float], dict[str, Any]], tmp_path: Path
) -> None:
    (losses, trained), _ = ranks.run(loading_run.train, 2, tmp_path, saved, tmp_path, strategy, "full")
    assert losses == pytest.approx(alone[0], rel=1e-5)
    for name, tensor in alone[1].items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_key_reaches_the_loss_and_what_cannot_have_it_says_so(
    stoker: Command, saved: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "some words {n} and {n * n} others"}}\n' for n in range(40)))
    given = ("train", "llm", f"model={saved}", f"data={data}", "sequence_length=64", "max_steps=2")
    short = ("precision=fp32", "generate_tokens=0", "eval_every=none", "validation=0", "test=0")
    losses = {}
    for weight in ("0", "0.3", "default"):
        asked = () if weight == "default" else (f"router_aux_loss={weight}",)
        done = stoker(*given, *short, *asked, "--json")
        assert done.code == 0, done.err
        losses[weight] = done.answer["metrics"]["loss"]
    assert losses["default"] == losses["0.3"] > losses["0"]
    for asked, said in (
        ("parallel=pipeline router_aux_loss=0.3", "no rank sees the routers of all stages"),
        ("model=tiny router_aux_loss=0.3", "transformers has no such loss for 'llama'"),
        ("router_aux_loss_coef=0.3", "router_aux_loss"),
    ):
        done = stoker(*given, *short, *asked.split())
        assert done.code == 2
        assert said in done.err
