"""The model of the language recipe: built from scratch or loaded, adapted, sampled, exported."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from stoker import distributed, storage
from stoker.data import tokenizer as tokenizers
from stoker.data.sources import Document
from stoker.errors import BadInput, nearest
from stoker.loop import Trainer
from stoker.recipes import quiet  # noqa: F401 (its import is its work)
from stoker.recipes.language_shape import SIZES
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # this command has one of its own

_LONGEST = 2048  # positions of a new model, unless rows are longer


@dataclass(frozen=True)
class Language:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any
    pretrained: bool
    fingerprint: str
    """Of what it was built from: a local directory's weights, a hub id, or a size."""
    config: Any
    """The model's config as it is written beside its weights."""
    generation_config: Any


def build(
    reference: str,
    *,
    tokenizer: str | None,
    vocab_size: int,
    sequence_length: int,
    documents: Sequence[Document],
    tie_embeddings: bool = True,
) -> Language:
    """A new model of a size, or the one of a directory or hub id.

    Args:
        reference: a key of SIZES, a local directory, or a hub id.
        tokenizer: a directory or hub id; None: the model's own, or for a new model one of
            `vocab_size` tokens, trained on the documents.
        sequence_length: the longest row, in tokens.
        tie_embeddings: of a new model, whether it predicts with its embeddings.

    Raises:
        BadInput: there is no such model, it does not load, or its tokenizer does not fit it.
    """
    if reference in SIZES:
        made = _load_tokenizer(tokenizer) if tokenizer else _train_tokenizer(documents, vocab_size)
        return _new(reference, made, sequence_length, tie_embeddings)
    source = _source(reference)
    found = _load_tokenizer(tokenizer or source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise BadInput(f"model {reference} cannot be loaded: {error}{nearest(reference, SIZES)}") from error
    _check_fits(reference, model, found, sequence_length)
    return _language(model, found, pretrained=True, fingerprint=_fingerprint(source))


def with_lora(model: Any, *, rank: int, alpha: float, dropout: float, targets: str) -> Any:
    """The model with adapters on it and everything else frozen; the model itself at rank 0.

    `targets` is `all-linear`, or names of modules joined by commas. Raises BadInput where none match.
    """
    if rank == 0:
        return model
    from peft import LoraConfig, get_peft_model

    modules = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    adapter = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, task_type="CAUSAL_LM"
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return get_peft_model(model, adapter)
    except ValueError as error:  # names that match no module
        raise BadInput(f"lora.targets={targets}: {error}") from error


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the model is called with. Positions that restart are what keeps documents apart."""
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


def loss(output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of the next token, in nats, and the number of tokens that count."""
    logits = output.logits[:, :-1]  # (batch, seq - 1, vocab)
    labels = batch["labels"][:, 1:]  # (batch, seq - 1)
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, (labels != -100).sum()


@torch.no_grad()
def generate(trainer: Trainer, tokenizer: Any, prompt: str, length: int) -> str:
    """The most likely continuation of a prompt, up to `length` tokens. All ranks call it alike."""
    model: Any = trainer.model
    was_training = model.training
    model.eval()
    try:
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(trainer.device)
        begun = encoded["input_ids"].shape[1]
        if trainer.strategy == "pipeline":
            made = _continued(trainer, encoded["input_ids"], length, tokenizer.eos_token_id)
        else:
            made = model.generate(
                **encoded, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
    finally:
        model.train(was_training)
    return str(tokenizer.decode(made[0, begun:], skip_special_tokens=True))


def _continued(trainer: Trainer, ids: torch.Tensor, length: int, end: int) -> torch.Tensor:
    """Token by token through the stages, which keep no cache; (1, seq) -> (1, seq + at most length)."""
    for _ in range(length):
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        output = trainer.forward({"input_ids": ids, "position_ids": positions})
        found = None if output is None else int(output.logits[0, -1].argmax())
        token = next(t for t in distributed.gathered(found) if t is not None)
        ids = torch.cat([ids, torch.tensor([[token]], device=ids.device)], dim=1)
        if token == end:
            break
    return ids


def log_generations(trainer: Trainer, tokenizer: Any, prompts: Sequence[str], length: int) -> None:
    """Log a table of prompts with their continuations. All ranks call it."""
    with trainer.averaged():
        rows = [(prompt, generate(trainer, tokenizer, prompt, length)) for prompt in prompts]
    trainer.run.table("generations", rows, ["prompt", "completion"])


def export(trainer: Trainer, language: Language) -> Path | None:
    """Write the model, or its adapter, as an ordinary Hugging Face directory under artifacts.

    All ranks call it; rank 0 writes.
    """
    model: Any = trainer.model
    is_adapter = hasattr(model, "peft_config")
    tensors = trainer.state_dict((lambda name: "lora_" in name) if is_adapter else (lambda name: True))
    if trainer.world.rank > 0:
        return None
    name = "adapter" if is_adapter else "model"
    target = trainer.run.directory.artifacts / name
    if is_adapter:
        model.save_pretrained(target, state_dict=tensors)
        language.tokenizer.save_pretrained(target)
    else:
        _describe(model, language, target)
        save_torch_state_dict(tensors, target)
    return trainer.run.artifact(target, kind=name)


def record_shape(trainer: Trainer, language: Language) -> None:
    """Write all of the directory that `export` will, but for the weights.

    With it a checkpoint of a run that has not ended can be exported too. Rank 0 does, in the first attempt.
    """
    if trainer.world.rank == 0 and not trainer.run.continued:
        target = trainer.run.directory.artifacts / "shape"
        _describe(trainer.model, language, target)
        trainer.run.artifact(target, kind="shape")


def _describe(model: Any, language: Language, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].save_pretrained(target)
    else:
        language.config.save_pretrained(target)
        language.generation_config.save_pretrained(target)
    language.tokenizer.save_pretrained(target)


def _language(model: Any, tokenizer: Any, *, pretrained: bool, fingerprint: str) -> Language:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    return Language(model, tokenizer, pretrained, fingerprint, config, model.generation_config)


def _train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Any:
    trained = tokenizers.train_tokenizer((d.prompt + d.text for d in documents), vocab_size)
    return tokenizers.as_transformers(trained, max_length=_LONGEST)


def _new(size: str, tokenizer: Any, sequence_length: int, tie_embeddings: bool) -> Language:
    shape = LlamaConfig(
        **SIZES[size],
        vocab_size=len(tokenizer),
        max_position_embeddings=max(_LONGEST, sequence_length),
        tie_word_embeddings=tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _language(LlamaForCausalLM(shape), tokenizer, pretrained=False, fingerprint=size)


def _source(reference: str) -> str:
    """A local directory as an absolute path, or a hub id. Raises BadInput on a path that is no model."""
    path = Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise BadInput(f"model directory {path} has no config.json; it holds {held}")
        return str(path.absolute())
    if path.exists() or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise BadInput(
            f"model {reference} is not a directory; "
            f"give a model's directory, a hub id, or a size: {', '.join(SIZES)}"
        )
    return reference


def _load_tokenizer(reference: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference)
    except (OSError, ValueError) as error:
        hint = nearest(reference, SIZES)
        raise BadInput(f"the tokenizer of {reference} cannot be loaded{hint}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokenizer of {reference} has no end-of-text token: "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_fits(reference: str, model: Any, tokenizer: Any, sequence_length: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise BadInput(
            f"sequence_length={sequence_length} is more than the {longest} positions of {reference}"
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise BadInput(
            f"the tokenizer has {len(tokenizer)} tokens, {reference} embeds only {rows}: "
            "they do not belong together"
        )


def _fingerprint(source: str) -> str:
    """SHA-256 over the weights of a local model; a hub id as it is."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(storage.sha256(file).encode())
    return digest.hexdigest()
