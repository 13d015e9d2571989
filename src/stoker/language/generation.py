"""Continuations of prompts, by the model as it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from stoker import distributed
from stoker.engine import modes
from stoker.language import building
from stoker.language.building import Language
from stoker.loop import Trainer


@torch.no_grad()
def generate(trainer: Trainer, language: Language, prompt: str, length: int) -> str:
    """The most likely continuation of a prompt, up to `length` tokens. All ranks call it alike.

    It ends with the last of the model's positions at the latest. Raises BadInput where the prompt leaves
    none.
    """
    model: Any = trainer.model
    tokenizer, ends = language.tokenizer, language.generation_config.eos_token_id
    with modes.evaluating(model):
        encoded = tokenizer(
            prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False
        ).to(trainer.device)
        begun = encoded["input_ids"].shape[1]
        length = min(length, building.room(language.config, begun))
        if trainer.strategy == "pipeline":
            made = _continued(trainer, encoded["input_ids"], length, ends)
        else:
            with _cached_attention(model):
                made = model.generate(
                    **encoded, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=ends,
                )  # fmt: skip
    return str(tokenizer.decode(made[0, begun:], skip_special_tokens=True))


@contextlib.contextmanager
def _cached_attention(model: Any) -> Iterator[None]:
    """Attention to what was generated before, which attention within documents knows nothing of."""
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    trained_with = bare.config._attn_implementation
    bare.set_attn_implementation("sdpa" if bare._supports_sdpa else "eager")
    try:
        yield
    finally:
        bare.set_attn_implementation(trained_with)


def _continued(trainer: Trainer, ids: torch.Tensor, length: int, ends: Sequence[int]) -> torch.Tensor:
    """Token by token through the stages, which keep no cache; (1, seq) -> (1, seq + at most length)."""
    for _ in range(length):
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        output = trainer.forward({"input_ids": ids, "position_ids": positions})
        found = None if output is None else int(output.logits[0, -1].argmax())
        token = next(t for t in distributed.gathered(found) if t is not None)
        ids = torch.cat([ids, torch.tensor([[token]], device=ids.device)], dim=1)
        if token in ends:
            break
    return ids


def log_generations(trainer: Trainer, language: Language, prompts: Sequence[str], length: int) -> None:
    """Log a table of prompts with their continuations, where there are some of both. All ranks call it."""
    if not (prompts and length) or trainer.world.planned:
        return
    with trainer.evaluating():
        rows = [(prompt, generate(trainer, language, prompt, length)) for prompt in prompts]
    trainer.run.table("generations", rows, ["prompt", "completion"])
