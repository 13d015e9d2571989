"""The model of the image recipe: a new or loaded classifier, its loss, metrics and export."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stoker.data.image_source import Source
from stoker.engine.metrics import Mean, Metric
from stoker.errors import BadInput
from stoker.language import hub
from stoker.recipes import classifiers, image_processor
from stoker.recipes.image_processor import Processor
from stoker.recipes.image_shape import SIZES
from stoker.words import first_line
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification


@dataclass(frozen=True)
class Classifier:
    """A model with the files that are written next to its weights."""

    model: Any
    config: Any
    processor: Processor
    classes: tuple[str, ...]
    """In the order of the model's outputs."""
    said: str
    """What became of the last layer of a loaded model, see `classifiers.Loaded`."""


def build(reference: str, *, classes: Sequence[str], new: Processor, size: int | None = None) -> Classifier:
    """A new ResNet of a given size, or the model of a directory or hub id, with a new last layer if needed.

    Args:
        classes: those of the data. A loaded model that has the same ones keeps its own order.
        new: the input of a new model.
        size: pixels per side, instead of what a loaded model was trained on, or a new one has.

    Raises:
        BadInput: the model does not exist, does not load, or does not take images of this size.
    """
    if reference in SIZES:
        shape = ResNetConfig(**SIZES[reference], num_channels=len(new.mean), **classifiers.labels(classes))
        made = classifiers.Loaded(ResNetForImageClassification(shape), tuple(classes), "")
        processor = new
    else:
        folder = hub.find(reference, known=tuple(SIZES), pickles=True)
        made = classifiers.load(AutoModelForImageClassification, reference, folder, classes)
        processor = image_processor.of_model(folder)
        if size not in (None, processor.size):
            _check_size(reference, made.model, replace(processor, size=size))
    model = made.model
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    processor = replace(processor, size=size or processor.size)
    return Classifier(model, config, processor, made.classes, made.said)


def in_order(source: Source, classes: Sequence[str]) -> Source:
    """The same images, with their labels numbered in this order of the same classes."""
    number = {name: n for n, name in enumerate(classes)}
    numbers = np.array([*(number[name] for name in source.classes), -1])  # the last one for -1, no label
    made = copy.copy(source)
    made.labels, made.classes = numbers[source.labels], tuple(classes)
    return made


def _check_size(reference: str, model: Any, processor: Processor) -> None:
    """Raises BadInput if the model cannot take images of this size, such as one with a position per patch."""
    image = torch.zeros(1, len(processor.mean), processor.size, processor.size, device="meta")
    try:
        copy.deepcopy(model).to("meta").eval()(pixel_values=image)
    except (ValueError, RuntimeError) as error:
        raise BadInput(
            f"image_size={processor.size}: {reference} does not take images of this size "
            f"({first_line(error)}): omit image_size"
        ) from error


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The argument for the model: (batch, channels, size, size)."""
    return {"pixel_values": batch["pixel_values"]}


def metrics(output: Any, batch: dict[str, torch.Tensor]) -> dict[str, Metric]:
    """Cross-entropy without smoothing, and the share of images whose most likely class is correct."""
    logits, labels = output.logits.float(), batch["labels"]
    right = (logits.argmax(dim=1) == labels).sum()
    total = F.cross_entropy(logits, labels, reduction="sum")
    return {"loss": Mean(total, len(labels)), "accuracy": Mean(right, len(labels))}


def describe(made: Classifier, target: Path) -> None:
    """Write everything that goes next to the weights of an export."""
    made.config.save_pretrained(target)
    written = image_processor.written(made.processor)
    (target / image_processor.FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
