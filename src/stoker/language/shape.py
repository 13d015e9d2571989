"""The shapes of language models, without loading any: sizes to start from, and what a directory says."""

from __future__ import annotations

import json
from pathlib import Path

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
    """Refuse a model that is known not to be cut into so many stages.

    Args:
        model: a key of SIZES, a local directory, or a hub id, of which nothing is known here.
        tied: whether a new model ties its embeddings.

    Raises:
        BadWorldSize: it has fewer blocks.
        BadInput: it ties its embeddings.
    """
    blocks, tied = _known(model, tied)
    if blocks is not None and stages > blocks:
        raise BadWorldSize(
            f"{stages} pipeline stages, and {model} has {blocks} blocks: give {blocks} or fewer"
        )
    if tied:
        change = "tie_embeddings=false" if model in SIZES else "tie_word_embeddings=false in its config.json"
        raise BadInput(
            f"{model} ties its embeddings, which would be on the first stage and on the last: "
            f"set {change}, or use parallel=ddp or fsdp"
        )


def _known(model: str, tied: bool) -> tuple[int | None, bool]:
    if model in SIZES:
        return SIZES[model]["num_hidden_layers"], tied
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None, False
    return config.get("num_hidden_layers", config.get("n_layer")), bool(config.get("tie_word_embeddings"))
