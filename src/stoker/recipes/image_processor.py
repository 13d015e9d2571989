"""How images become a model's input: their size and normalisation, in the form that transformers has for it.

What a loaded model expects is found by giving its own image processor plain images, whatever its type, since
each has its own settings for the same thing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from stoker.data import augment
from stoker.errors import BadInput
from stoker.language import hub
from stoker.words import first_line

log = logging.getLogger("stoker")

FILE = "preprocessor_config.json"
_SIDE = 512  # pixels of a plain image
_DIGITS = 6  # of a mean, beyond which there is only rounding
_GREY = (0.5,)
_BILINEAR = int(Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class Processor:
    """The size and normalisation of a model's input."""

    size: int
    """Pixels per side."""
    mean: tuple[float, ...]
    """Of each channel, in values of 0 to 1."""
    std: tuple[float, ...]


DIGITS = Processor(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Also in colour, which is what a pipeline of transformers gives a model."""
PHOTOS = Processor(224, *augment.IMAGENET)


def of_model(folder: Path) -> Processor:
    """What the model in a directory was trained on: by its image processor, or as for ImageNet without one.

    Raises BadInput for an image processor that does not load.
    """
    shape = hub.read_json(folder, "config.json", "model")
    channels = shape.get("num_channels") or len(PHOTOS.mean)
    if not (folder / FILE).is_file():
        size = shape.get("image_size")
        mean, std = augment.IMAGENET if channels == len(PHOTOS.mean) else (_GREY, _GREY)
        return Processor(size if isinstance(size, int) else PHOTOS.size, mean, std)
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        black, white, red = (_plain(processor, value, channels) for value in (0, 255, (255, 0, 0)))
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise BadInput(f"{folder / FILE} cannot be used: {first_line(error)}") from error
    if channels > 1 and not np.allclose(red[0], white[0]):
        log.warning("the model was trained on images with their channels in another order than RGB")
    std = 1 / (white - black).mean(axis=(1, 2), dtype=np.float64)
    mean = -black.mean(axis=(1, 2), dtype=np.float64) * std
    return Processor(black.shape[-1], _rounded(mean), _rounded(std))


def written(processor: Processor) -> dict[str, Any]:
    """What an evaluation does to images (see `augment.Evaluate`), as settings of transformers."""
    size = {"height": processor.size, "width": processor.size}
    common = {
        "do_resize": True, "resample": _BILINEAR, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(processor.mean), "image_std": list(processor.std),
        "do_convert_rgb": len(processor.mean) > 1,
    }  # fmt: skip
    if processor.size <= augment.SMALL:
        return {"image_processor_type": "ViTImageProcessor", "size": size, **common}
    edge = {"shortest_edge": augment.shortest_edge(processor.size)}
    return {
        "image_processor_type": "CLIPImageProcessor", "size": edge, "do_center_crop": True, "crop_size": size,
        **common,
    }  # fmt: skip


def _plain(processor: Any, value: int | tuple[int, int, int], channels: int) -> NDArray[np.float32]:
    """(channels, size, size): what a processor makes of an image of one colour, or of one grey."""
    if channels > 1:
        colour = (value,) * channels if isinstance(value, int) else value
        image = Image.new("RGB", (_SIDE, _SIDE), colour)
    else:
        image = Image.new("L", (_SIDE, _SIDE), value if isinstance(value, int) else value[0])
    (pixels,) = processor(image, return_tensors="np")["pixel_values"]
    return np.asarray(pixels, np.float32)


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), _DIGITS) for value in values)
