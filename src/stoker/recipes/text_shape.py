"""The shape of a new text classifier: one of BERT's sizes, or any number of layers, width and heads."""

from __future__ import annotations

from dataclasses import dataclass

from stoker.errors import BadInput

SIZES: dict[str, tuple[int, int]] = {
    "bert-tiny": (2, 128),
    "bert-mini": (4, 256),
    "bert-small": (4, 512),
    "bert-medium": (8, 512),
    "bert-base": (12, 768),
}
"""Layers and width of the models of Turc et al. 2019 (arXiv:1908.08962)."""

_OF_A_HEAD = 64  # width of one head, the same in all sizes


@dataclass(frozen=True)
class Shape:
    """The shape of an encoder: blocks, hidden size, attention heads and feed-forward units."""

    layers: int
    width: int
    heads: int
    feed_forward: int


def shape(
    model: str,
    *,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    feed_forward: int | None = None,
) -> Shape:
    """The shape of a size, with the given values instead of the size's own.

    By default heads are 64 wide, or the next larger size that divides the width, and the feed-forward layer
    has 4 times the width.

    Args:
        model: a key of SIZES.

    Raises:
        BadInput: `heads` does not divide the width.
    """
    layers, width = layers or SIZES[model][0], width or SIZES[model][1]
    dividing = [n for n in range(1, width + 1) if width % n == 0]
    if heads is None:
        heads = max(n for n in dividing if n <= max(1, width // _OF_A_HEAD))
    if heads not in dividing:
        raise BadInput(
            f"heads={heads} does not divide the width {width} evenly: use one of "
            f"{', '.join(map(str, dividing))}"
        )
    return Shape(layers, width, heads, feed_forward or 4 * width)
