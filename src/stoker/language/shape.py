"""The shapes of language models without loading them: sizes for new models, and what a directory says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from stoker import storage
from stoker.errors import BadInput, BadWorldSize

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


def check_stages(model: str, *, stages: int, tied: bool) -> None:
    """Refuse a model that is known not to be divisible into this many stages.

    Args:
        model: a key of SIZES, a local directory, or a hub id, about which nothing is known here.
        tied: whether a new model ties its embeddings.

    Raises:
        BadWorldSize: it has fewer blocks.
        BadInput: it ties its embeddings.
    """
    blocks, tied = _known(model, tied)
    if blocks is not None and stages > blocks:
        raise BadWorldSize(
            f"{stages} pipeline stages, but {model} has {blocks} blocks: use {blocks} or fewer"
        )
    if tied:
        change = "tie_embeddings=false" if model in SIZES else "tie_word_embeddings=false in its config.json"
        raise BadInput(
            f"{model} ties its embeddings, which would be on both the first and the last stage: "
            f"set {change}, or use parallel=ddp or fsdp"
        )


def check_positions(
    model: str, longest: int | None, sequence_length: int, scaled: float | None = 1.0
) -> None:
    """Raises BadInput if rows are longer than a model has positions, as far as these are known.

    Args:
        longest: the number of positions.
        scaled: how many times its own that is; None: they cannot be scaled here.
    """
    if longest is not None and sequence_length > longest:
        more = (
            ""
            if scaled is None
            else (
                ", or give a model with rotary embeddings more positions with "
                f"rope_scaling.factor={math.ceil(scaled * sequence_length / longest)}"
            )
        )
        raise BadInput(
            f"sequence_length={sequence_length} is more than the {longest} positions of {model}: "
            f"shorten it{more}"
        )


def positions(folder: Path) -> int | None:
    """The maximum number of tokens of a model, as far as its directory says."""
    config = _config(folder)
    config = config.get("text_config", config)
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def has_modules(folder: Path, names: Sequence[str]) -> bool:
    """Whether the tensors in a directory show that its model has modules of all these names.

    Modules that they do not show can still exist: some families name and split tensors differently in files.
    """
    tensors = list(_tensors(folder))
    return all(any(f".{name}." in f".{tensor}" for tensor in tensors) for name in names)


def _tensors(folder: Path) -> Iterator[str]:
    """The names of the tensors in a directory, as far as they can be read."""
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="np") as reader:
            yield from reader.keys()


def _known(model: str, tied: bool) -> tuple[int | None, bool]:
    if model in SIZES:
        return SIZES[model]["num_hidden_layers"], tied
    config = _config(Path(model).expanduser())
    return config.get("num_hidden_layers", config.get("n_layer")), bool(config.get("tie_word_embeddings"))


def _config(folder: Path) -> dict[str, Any]:
    """The config in a directory; empty if there is none that can be read."""
    return storage.read_json(folder / "config.json")
