"""Loads a trained classifier, with a new last layer if its own is for other classes; and its loss."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stoker.engine import quiet  # noqa: F401 (its import is its work)
from stoker.errors import BadInput
from stoker.language import building, hub
from stoker.user_run import Run
from stoker.words import first_line, some
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

log = logging.getLogger("stoker")

ONE_OF_SEVERAL = "single_label_classification"
"""transformers' name for a classifier trained with a softmax; by it, a pipeline turns logits into scores."""


@dataclass(frozen=True)
class Loaded:
    """A classifier that was trained before."""

    model: Any
    classes: tuple[str, ...]
    """In the order of its outputs."""
    said: str
    """What became of its last layer; empty if it serves as it is."""


def say(run: Run, said: str) -> None:
    """Log what became of the last layer, where a run begins; a run that goes on has its own weights."""
    if said and run.world.rank == 0 and not run.continued:
        log.warning("%s", said)


def labels(classes: Sequence[str]) -> dict[str, Any]:
    """The settings of a model's config that name its outputs, of which one is right."""
    names = dict(enumerate(classes))
    return {
        "id2label": names, "label2id": {name: n for n, name in names.items()}, "problem_type": ONE_OF_SEVERAL,
    }  # fmt: skip


def loss(smoothing: float) -> Callable[[Any, dict[str, torch.Tensor]], tuple[torch.Tensor, int]]:
    """The summed cross-entropy, in nats, and the number of samples."""

    def of_batch(output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        logits = output.logits.float()  # (batch, classes)
        total = F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing, reduction="sum")
        return total, len(batch["labels"])

    return of_batch


def load(auto: Any, reference: str, folder: Path, classes: Sequence[str]) -> Loaded:
    """Load a model, with a new last layer if its own stands for other classes.

    A model that has exactly these classes, in capitals or not, keeps its own order. Those of a model
    (`LABEL_0`, ...) or of data (`0`, ...) that have no names are taken for the other's, in order, if there
    are as many.

    Args:
        auto: the class of transformers that loads such models.
        classes: those of the data.

    Raises:
        BadInput: the model does not load, or its files lack weights of other layers.
    """
    config = building.load_config(folder, auto, "for which transformers has no classifier")
    known = _known(config)
    ordered = _ordered(known, classes)
    try:
        with _without_report():
            model, found = auto.from_pretrained(
                folder, **labels(ordered), ignore_mismatched_sizes=True, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"model {reference} cannot be loaded: {first_line(error)}") from error
    mismatched = {name for name, *_ in found["mismatched_keys"]}
    lacking = set(found["missing_keys"]) | mismatched
    last = _last_layer(auto, config)
    _check_whole(reference, folder, model, lacking, last)
    model.config.name_or_path, _ = hub.named(reference, folder)
    had = () if last & set(found["missing_keys"]) else known  # the classes that its files have outputs for
    if not last & lacking and not _stand_for(known, ordered):
        _renew(model, last)
        lacking |= last
    return Loaded(model, ordered, _what_became_of_the_layer(had, ordered, is_new=bool(last & lacking)))


def _known(config: Any) -> tuple[str, ...]:
    """The names of a model's outputs."""
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items()))


def _ordered(known: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """The data's classes in the order of a model's outputs, if these stand for them."""
    for spelled in (str, _spelled_alike):
        places = {spelled(name): n for n, name in enumerate(known)}
        own = [spelled(name) for name in classes]
        if len(places) == len(known) and sorted(places) == sorted(own):
            return tuple(sorted(classes, key=lambda name: places[spelled(name)]))
    if _are_numbers(classes) and len(known) == len(classes):
        return tuple(sorted(classes, key=int))
    return tuple(classes)


def _spelled_alike(name: str) -> str:
    return name.strip().casefold()


def _stand_for(known: Sequence[str], ordered: Sequence[str]) -> bool:
    """Whether a model's outputs stand for the data's classes, in this order."""
    if len(known) != len(ordered):
        return False
    return _is_same(known, ordered) or _is_nameless(known) or _are_numbers(ordered)


def _is_same(known: Sequence[str], ordered: Sequence[str]) -> bool:
    return [_spelled_alike(name) for name in known] == [_spelled_alike(name) for name in ordered]


def _is_nameless(classes: Sequence[str]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", name) for name in classes)


def _are_numbers(classes: Sequence[str]) -> bool:
    return sorted(classes) == sorted(str(n) for n in range(len(classes)))


def _what_became_of_the_layer(had: Sequence[str], classes: Sequence[str], *, is_new: bool) -> str:
    if is_new and had and len(had) == len(classes):
        return (
            f"the last layer is new: the model's was for other classes ({some(had)}) than the data's "
            f"({some(classes)})"
        )
    if is_new:
        before = f"{len(had)} -> " if had else ""
        return f"the last layer is new: {before}{len(classes)} classes"
    if not _is_same(had, classes):
        pairs = [f"{old} = {new}" for old, new in zip(had, classes, strict=True)]
        own, other = ("model's", "data's") if _is_nameless(had) else ("data's", "model's")
        return f"the {own} classes have no names, so they are taken for the {other}, in order: {some(pairs)}"
    return ""


def _last_layer(auto: Any, config: Any) -> set[str]:
    """The names of the weights whose shape depends on the number of classes."""
    shapes = []
    for count in (2, 3):
        own = copy.deepcopy(config)
        own.num_labels = count
        with torch.device("meta"):
            shapes.append({n: t.shape for n, t in auto.from_config(own).state_dict().items()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def _check_whole(
    reference: str, folder: Path, model: Any, lacking: Collection[str], last: Collection[str]
) -> None:
    """Raises BadInput if the files lack weights that a fine-tuning builds on.

    What comes after the body is often new, and so is a pooler, which language modelling does without.
    """
    body = next((name for name, module in model.named_modules() if module is model.base_model), "")
    lost = sorted(
        name
        for name in set(lacking) - set(last)
        if name.startswith(f"{body}." if body else "")
        and ".pooler." not in name
        and not name.endswith(".num_batches_tracked")  # older files have none; it is only counted
    )
    if lost:
        raise BadInput(
            f"model {reference} cannot be loaded: the weights in {folder} lack {len(lost)} of the model's "
            f"tensors, or have them in another shape: {some(lost, 3)}"
        )


def _renew(model: Any, names: Collection[str]) -> None:
    """Initialise weights as in a new model."""
    for owner in {name.rpartition(".")[0] for name in names}:
        module = model.get_submodule(owner)
        for tensor in module.parameters(recurse=False):
            tensor._is_hf_initialized = False  # else transformers leaves them as they are
        with torch.no_grad():
            model._init_weights(module)


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' table of what the files lack, in place of which `Loaded.said` is said."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
