"""The model of the language recipe: built from scratch or loaded, adapted, sampled, exported."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stoker import storage
from stoker.attempt import Run
from stoker.data import tokenizer as tokenizers
from stoker.data.sources import Document
from stoker.errors import BadInput, nearest
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

# The Llama architecture; heads of 32 or 64, feed-forward of about 8/3 of the hidden size.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    },
    "base": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
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


def build(
    reference: str,
    *,
    tokenizer: str | None,
    vocab_size: int,
    sequence_length: int,
    documents: Sequence[Document],
) -> Language:
    """A new model of a size, or the one of a directory or hub id.

    Args:
        reference: a key of SIZES, a local directory, or a hub id.
        tokenizer: a directory or hub id; None: the model's own, or for a new model one of
            `vocab_size` tokens, trained on the documents.
        sequence_length: the longest row, in tokens.

    Raises:
        BadInput: there is no such model, it does not load, or its tokenizer does not fit it.
    """
    if reference in SIZES:
        made = _load_tokenizer(tokenizer) if tokenizer else _train_tokenizer(documents, vocab_size)
        return _new(reference, made, sequence_length)
    source = _source(reference)
    found = _load_tokenizer(tokenizer or source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise BadInput(f"model {reference} cannot be loaded: {error}{nearest(reference, SIZES)}") from error
    _check_fits(reference, model, found, sequence_length)
    return Language(model, found, pretrained=True, fingerprint=_fingerprint(source))


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
def generate(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """The most likely continuation of a prompt, up to `length` tokens."""
    was_training = model.training
    model.eval()
    try:
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        made = model.generate(
            **encoded, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    finally:
        model.train(was_training)
    return str(tokenizer.decode(made[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def log_generations(run: Run, model: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> None:
    """Log a table of prompts with their continuations."""
    rows = [(prompt, generate(model, tokenizer, prompt, length)) for prompt in prompts]
    run.table("generations", rows, ["prompt", "completion"])


def export(run: Run, model: Any, tokenizer: Any) -> Path:
    """Write the model, or its adapter, as an ordinary Hugging Face directory under artifacts."""
    name = "adapter" if hasattr(model, "peft_config") else "model"
    target = run.directory.artifacts / name
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return run.artifact(target, kind=name)


def _train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Any:
    trained = tokenizers.train_tokenizer((d.prompt + d.text for d in documents), vocab_size)
    return tokenizers.as_transformers(trained, max_length=_LONGEST)


def _new(size: str, tokenizer: Any, sequence_length: int) -> Language:
    shape = LlamaConfig(
        **SIZES[size],
        vocab_size=len(tokenizer),
        max_position_embeddings=max(_LONGEST, sequence_length),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Language(LlamaForCausalLM(shape), tokenizer, pretrained=False, fingerprint=size)


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
