"""What may not change when a run is resumed: what the numbers that its model has learned belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from stoker import distributed, exports
from stoker.checkpoint import manifest
from stoker.errors import BadInput
from stoker.run import view
from stoker.user_run import Run
from stoker.words import some


def check_classes(run: Run, classes: Iterable[str]) -> None:
    """Raises BadInput, on all ranks, if the trained model's outputs stand for other classes.

    Like `check_tokens`, it is called before the model is filled, whose sizes may differ too.
    """
    found = list(classes)
    _check(
        run, "classes", _digest(found),
        f"data= has other classes than the run was trained on (now {some(found, 5)}), and its model's "
        "outputs stand for those: resume it with the data it had, or train on this data as a new run",
    )  # fmt: skip


def check_tokens(run: Run, vocabulary: Mapping[str, int]) -> None:
    """Raises BadInput, on all ranks, if the embeddings of a model that was new belong to other tokens.

    Args:
        vocabulary: the id of each token; its tokenizer may have been trained on the run's data.
    """
    own = run.directory.artifacts / exports.SHAPE
    _check(
        run, "tokens", _digest(f"{token} {number}" for token, number in sorted(vocabulary.items())),
        "the tokenizer is not the one that the run's model was trained with (that of a new model is trained "
        f"on data=, which may have changed): resume it with the data it had, or with tokenizer={own}",
    )  # fmt: skip


def check_base(run: Run, fingerprint: str, *, frozen: bool) -> None:
    """Record the weights that a loaded model began with.

    Args:
        frozen: whether some of them are not trained, so that they are not in the run's checkpoints.

    Raises BadInput, on all ranks, if what was trained so far belongs to other frozen weights.
    """
    if not frozen:
        run.fingerprint("model", fingerprint)
        return
    _check(
        run, "model", fingerprint,
        "the weights of model= have changed, and what the run has trained belongs to those that it began "
        "with, of which some are frozen: restore them, or train on these as a new run",
    )  # fmt: skip


def _check(run: Run, name: str, value: str, otherwise: str) -> None:
    tag = f"fingerprint.{name}"

    def check() -> None:
        known = view.load(run.directory).tags.get(tag, value) if run.continued else value
        if known != value and manifest.committed(run.directory.checkpoints):
            raise BadInput(otherwise)
        run.tag(**{tag: value})

    distributed.done_by_rank_zero(run.world, check)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
