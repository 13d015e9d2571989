"""Scaling rotary position embeddings, so that a model reads longer texts than those it was trained on.

Cheap to import, because a config is read before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt
from stoker.errors import BadInput

FIELDS = ("rope_parameters", "max_position_embeddings")
"""What a scaling changes in a model's config."""
_FAR = "full_attention"  # the layers of Gemma 3 and 4 that see whole texts; the others have a window


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary position embeddings, to train a model on longer texts."""

    factor: Annotated[float, Gt(1)] | None = None
    """How many times more positions the model gets, such as 4; none: it keeps its own."""
    type: Literal["yarn", "linear"] = "yarn"
    """yarn (Peng et al. 2023, arXiv:2309.00071), or linear interpolation (Chen et al. 2023,
    arXiv:2306.15595)."""

    def __post_init__(self) -> None:
        if self.factor is None and self.type != type(self).type:
            raise ValueError(
                f"rope_scaling.type={self.type} without rope_scaling.factor: set the factor, such as 4, or "
                "omit the type"
            )

    @property
    def used(self) -> bool:
        """Whether positions are scaled."""
        return self.factor is not None

    def __str__(self) -> str:
        return f"rope_scaling.factor={self.factor:g} rope_scaling.type={self.type}"


UNSCALED = RopeScaling()


def scale(config: Any, scaling: RopeScaling, model: str) -> None:
    """Write a scaling into a transformers config, whose model gets `factor` times its positions.

    Args:
        model: what messages call it.

    Raises:
        BadInput: the model has no rotary embeddings, or they are scaled already.
    """
    if scaling.factor is None:
        return
    text = config.get_text_config()
    found, positions = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not found or positions is None:
        raise BadInput(f"{scaling}: {model} has no rotary position embeddings to scale: omit rope_scaling")
    far = found.get(_FAR, found)
    if far.get("rope_type", "default") != "default":
        own = f"{far['rope_type']}, factor {far.get('factor', '?')}"
        raise BadInput(
            f"{scaling}: {model} scales its positions already ({own}), which gives it {positions}: omit "
            "rope_scaling, or change rope_parameters in its config.json"
        )
    made = {**far, "rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "yarn":
        made["original_max_position_embeddings"] = positions
    text.rope_parameters = {**found, _FAR: made} if _FAR in found else made
    text.max_position_embeddings = math.floor(positions * scaling.factor)
