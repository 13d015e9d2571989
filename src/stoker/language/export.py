"""Exporting a trained language model as an ordinary Hugging Face directory."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from stoker import exports, storage, words
from stoker.language import rope
from stoker.language.building import Language
from stoker.language.lora import is_of_adapter
from stoker.trainer import Trainer

log = logging.getLogger("stoker")

_OF_SENSES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Additional files of a model that also takes images, audio or video: how that input is processed."""


def export(trainer: Trainer, language: Language, model: Any) -> Path | None:
    """Write the model, or its adapter, as an ordinary Hugging Face directory under artifacts.

    All ranks call it; rank 0 writes.

    Args:
        model: as given to the Trainer: with a pipeline, a rank keeps only a part.
    """
    is_adapter = hasattr(model, "peft_config")
    tensors = trainer.state_dict(is_of_adapter if is_adapter else (lambda name: True))
    if trainer.world.rank > 0:
        return None
    name = "adapter" if is_adapter else "model"
    target = trainer.run.directory.artifacts / name
    if is_adapter:
        # Without embeddings, which are not among the tensors: otherwise peft asks the hub about the base
        # model's.
        model.save_pretrained(target, state_dict=tensors, save_embedding_layers=False)
        (target / "README.md").unlink(missing_ok=True)  # only a template; pushing writes a model card
        describe(model, language, target)
    else:
        describe(model, language, target)
        size = sum(tensor.nbytes for tensor in tensors.values())
        save_torch_state_dict(exports.as_in_files(target, tensors), target)
        _say_twice_as_large(language, trainer.run.directory.id, size)
    storage.permit_as_folder(target)
    return trainer.run.artifact(target, kind=name)


def _say_twice_as_large(language: Language, run: str, size: int) -> None:
    """If the model's files had 16 bits per weight, report that the export has 32, as it was trained."""
    if not isinstance(language.origin, Path):
        return
    config = storage.read_json(language.origin / "config.json") or {}
    kind = config.get("dtype") or config.get("torch_dtype")
    if kind in ("bfloat16", "float16"):
        log.info(
            "the exported weights are in float32, as they were trained: %s. `stoker models push %s DEST "
            "--dtype bf16` writes half as much", words.size(size), run,
        )  # fmt: skip


def describe(model: Any, language: Language, target: Path) -> None:
    """Write everything that `export` writes, except the weights."""
    target.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].save_pretrained(target)
        base: dict[str, Any] = {"model": language.config.name_or_path, "fingerprint": language.fingerprint}
        if language.rope_scaling.used:
            base["rope_scaling"] = dataclasses.asdict(language.rope_scaling)
            text = language.config.get_text_config()
            base["config"] = {name: getattr(text, name) for name in rope.FIELDS}
        storage.write_json(target / exports.BASE, base)
    else:
        language.config.save_pretrained(target)
        language.generation_config.save_pretrained(target)
        for name in _OF_SENSES:
            file = Path(language.origin, name)  # a new model has none
            if file.is_file():
                shutil.copyfile(file, target / name)
    language.tokenizer.save_pretrained(target)
