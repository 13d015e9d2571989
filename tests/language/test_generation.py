"""Continuations that a model in training generates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import loading_run
import pytest
import torch
from stoker import Run, Trainer, Training
from stoker.engine.precision import DTYPES
from stoker.language import generation, objective
from stoker.language.lora import Lora

import families

TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}  # bf16 is slow on most CPUs
LENGTH = 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_part_that_is_trained_whole_generates_beside_frozen_weights_and_each_token_is_progress(
    precision: Literal["fp32", "bf16"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = families.save(tmp_path / "tiny", "llama", **TINY)
    whole = Lora(rank=4, alpha=8.0, modules_to_save="lm_head")
    model, language = loading_run.built(folder, "lora", whole, DTYPES[precision])
    called = objective.attach(model)
    with Run("test", "a", runs=tmp_path) as run:
        trainer = Trainer(
            run, model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), inputs=called.inputs,
            loss=called.loss, training=Training(precision=precision), load=language.load,
        )  # fmt: skip
        beats: list[None] = []
        monkeypatch.setattr(trainer, "beat", lambda: beats.append(None))
        monkeypatch.setattr(language.generation_config, "eos_token_id", None)
        said = generation.generate(trainer, language, "no text", LENGTH)
    assert said
    assert len(beats) == LENGTH
