"""Merges an adapter into the model it was trained on, into one model that transformers alone can load."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from stoker import exports, storage
from stoker.engine import quiet
from stoker.errors import BadInput
from stoker.language import building, hub, lora, rope, saved_adapters
from torch import nn


def base_of(adapter: Path) -> str:
    """The model that an adapter in a folder was trained on, as a directory or hub id. Raises BadInput."""
    config = hub.read_json(adapter, exports.ADAPTER, "adapter")
    found, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not found:
        raise BadInput(f"adapter {adapter} does not say which model it is for (base_model_name_or_path)")
    return f"{found}@{revision}" if revision else str(found)


def on_its_base(adapter: Path, base: str | None = None) -> Any:
    """An adapter on the model that it was trained on, loaded by transformers and peft.

    Weights keep the precision of the model's files; the whole model is in host memory.

    Args:
        base: where the model is now, if it has moved since the adapter was trained.

    Raises:
        BadInput: the model does not exist, or is not the one that the adapter was trained on.
    """
    folder = hub.find(base or base_of(adapter), "the adapter's base model")
    saved_adapters.check_weights(adapter, folder)
    quiet.before_deepspeed()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = building.load_config(folder)
    rope.scale(config, saved_adapters.scaling(adapter), str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto")
    _grow(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about adapters on tied weights
        return PeftModel.from_pretrained(model, adapter)


def _grow(model: Any, adapter: Path) -> None:
    """Extend a model by the tokens that its adapter brings, with embeddings for them."""
    if saved_adapters.trained_whole(adapter) and (adapter / "tokenizer.json").is_file():
        tokens = len(building.read_tokenizer(str(adapter)))
        if tokens > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(tokens, mean_resizing=False)


def _untie(model: Any) -> None:
    """Give the output layer its own weights if it shares them with an embedding and one has an adapter.

    Merging into shared weights would change the other one as well.
    """
    bare = model.get_base_model()
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    if head is None or not (lora.is_adapter(embedding) or lora.is_adapter(head)):
        return
    head = getattr(head, "base_layer", head)
    if head.weight is getattr(embedding, "base_layer", embedding).weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _say_untied(model: Any) -> None:
    """Record in a model's config that its output layer now has its own weights."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def merge(adapter: Path, target: Path, base: str | None = None) -> None:
    """Write the model with an adapter merged into its weights, and the tokenizer, into an empty folder.

    See `on_its_base`. Raises BadInput.
    """
    model = on_its_base(adapter, base)
    _untie(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about adapters on tied weights, which are no longer tied
        merged = model.merge_and_unload(safe_merge=True)
    _say_untied(merged)
    merged.generation_config = building.that_is_written(merged.generation_config)
    if (adapter / "tokenizer.json").is_file():
        tokenizer = building.load_tokenizer(str(adapter))
        merged.generation_config.eos_token_id = building.stop_tokens(tokenizer, merged.generation_config)
    merged.save_pretrained(target)
    storage.permit_as_folder(target)
    own = (exports.ADAPTER, saved_adapters.WEIGHTS, exports.BASE, "README.md")
    for file in adapter.iterdir():  # the tokenizer's files
        if file.is_file() and file.name not in own and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
