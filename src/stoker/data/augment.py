"""Turns images into tensors: randomly for training, always the same way for evaluation.

A transform is a function of the image and a key, which the loader derives from (seed, epoch, sample):
neither workers nor restarts change it, and no global generator is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from stoker.data.order import uniforms

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of its channels."""

SMALL = 32
"""Pixels per side up to which images are augmented as for CIFAR; larger ones as for ImageNet."""
CENTRE = 224 / 256
"""The share of the short side that is evaluated of a larger image."""


def shortest_edge(size: int) -> int:
    """Pixels of the short side of a larger image, of which the central `size` pixels are evaluated."""
    return round(size / CENTRE)


@dataclass(frozen=True)
class Augment:
    """For training: a random resized crop, and a flip.

    Large images are cropped to 8 to 100% of the area (Szegedy et al. 2015, arXiv:1409.4842); small ones
    are shifted by up to an eighth of the size (He et al. 2016, arXiv:1512.03385).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True

    def __call__(self, image: Image.Image, key: int) -> torch.Tensor:
        drawn = uniforms(key)
        cropped = self._shifted(image, drawn) if self.size <= SMALL else self._cropped(image, drawn)
        if self.flip and next(drawn) < 0.5:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(cropped, self.mean, self.std)

    def _shifted(self, image: Image.Image, drawn: Iterator[float]) -> Image.Image:
        resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        reach = self.size // 8
        x, y = (_whole(drawn, -reach, reach) for _ in range(2))
        return resized.transform(resized.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))

    def _cropped(self, image: Image.Image, drawn: Iterator[float]) -> Image.Image:
        width, height = image.size
        for _ in range(10):
            area = width * height * (0.08 + 0.92 * next(drawn))
            ratio = (4 / 3) ** (2 * next(drawn) - 1)  # from 3:4 to 4:3, log-uniformly
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                x, y = _whole(drawn, 0, width - w), _whole(drawn, 0, height - h)
                return image.resize(
                    (self.size, self.size),
                    Image.Resampling.BILINEAR,
                    box=(x, y, x + w, y + h),
                    reducing_gap=2.0,
                )
        return _square(image, self.size)


@dataclass(frozen=True)
class Evaluate:
    """For evaluation: the whole image; of a large one, the central `CENTRE` of the short side.

    To the same pixels as transformers does it, by the settings that `image_processor.written` exports.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image, key: int = 0) -> torch.Tensor:
        """The same for any key."""
        if self.size <= SMALL:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        else:
            image = _centre(image, self.size)
        return to_tensor(image, self.mean, self.std)


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(channels, height, width), float32, scaled to 0..1 and normalised by mean and standard deviation.

    Grey or in colour, as the mean has one channel or three.
    """
    mode = "L" if len(mean) == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    pixels: NDArray[np.float32] = np.asarray(image, dtype=np.float32) / np.float32(255)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]  # (height, width, channels)
    scaled = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


def _whole(drawn: Iterator[float], low: int, high: int) -> int:
    """A whole number from `low` to `high`, both inclusive."""
    return low + int(next(drawn) * (high - low + 1))


def _square(image: Image.Image, size: int) -> Image.Image:
    """The central square, resized."""
    width, height = image.size
    side = min(width, height)
    x, y = (width - side) / 2, (height - side) / 2
    box = (x, y, x + side, y + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The central pixels of the image, resized so that its short side has `shortest_edge`."""
    short, (width, height) = shortest_edge(size), image.size
    if width <= height:
        resized = image.resize((short, int(short * height / width)), Image.Resampling.BILINEAR)
    else:
        resized = image.resize((int(short * width / height), short), Image.Resampling.BILINEAR)
    x, y = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((x, y, x + size, y + size))
