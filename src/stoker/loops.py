"""One loop over the steps of a run: which data it reads, where it counts from, and where it ends."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from stoker import distributed
from stoker.data.loader import Loader
from stoker.duration import Duration
from stoker.engine import counting
from stoker.engine.position import Position
from stoker.errors import BadInput

log = logging.getLogger("stoker")


@dataclass
class Loop:
    """A loop over steps, as `Trainer.steps` begins it."""

    number: int
    """Which loop of the script it is, from 1."""
    loader: Loader
    length: Duration
    from_here: bool
    """Whether the loop counts from where it begins, and not from the run's start."""
    first: tuple[int, int, float]
    """The steps, samples and tokens of the run from which it counts."""
    end: int
    """The step of the run with which the loop ends; one before those done, if the run is past it."""
    fingerprint: str
    """Of which samples its data are made."""
    early: bool
    """Whether that is earlier than the length says, since an earlier attempt finished the loop."""

    @property
    def stage(self) -> int:
        """Which order the loop has of its samples: that of the run, 0, or its own."""
        return self.number - 1 if self.first[1] else 0

    def samples(self, at: Position) -> int:
        """The samples done of those that the loop counts."""
        return at.samples - self.first[1]

    def epochs(self, at: Position) -> float:
        """The epochs that the loop counts, with the step that starts at a position."""
        return (self.samples(at) + self.loader.batch_size) / self.loader.samples_per_epoch

    def tokens(self, at: Position) -> int | None:
        """The tokens of the run, with the step that starts at a position; None if nobody counts them."""
        each = self.loader.tokens_per_sample
        return None if each is None else round((at.tokens or 0.0) + self.loader.batch_size * each)

    def move(self, at: Position) -> None:
        """Count the step that starts at a position as done."""
        samples = self.loader.batch_size
        at.move(samples, samples * (self.loader.tokens_per_sample or 0.0))

    def completes(self, every: Duration, at: Position) -> bool:
        """Whether the step that starts at a position completes another such duration."""
        return counting.completes(every, self.loader, at.step, self.samples(at))

    def plan(self, at: Position) -> dict[str, Any]:
        """How long the run becomes, and of which steps, as the journal records it."""
        tokens = self.loader.tokens_per_sample
        return {
            "total_steps": max(self.end, at.step), "samples_per_step": self.loader.batch_size,
            "tokens_per_step": tokens and tokens * self.loader.batch_size,
            "samples_per_epoch": self.loader.samples_per_epoch,
        }  # fmt: skip

    def say_what_is_odd(self, before: Loop | None, at: Position) -> None:
        """Say that a loop has nothing to do, or begins in the middle of data that no loop has read.

        Args:
            before: the loop of the script before this one.
        """
        if self.early and at.step >= self.end:
            log.info("the run was finished early, after step %d; give another length to go on", self.end)
        if at.step > self.end:
            log.info("a length of %s is over already: the run is at step %d", self.length, at.step)
        if before is None or self.from_here or at.step >= self.end:
            return
        was, now = before.loader.samples_per_epoch, self.loader.samples_per_epoch
        if was != now:
            log.warning(
                "this loop reads other data than the one before (%d samples, not %d), but begins at position "
                "%d of it, since lengths and positions count from the start of the run: "
                "steps(..., from_here=True) counts from where the loop begins",
                now, was, at.samples,
            )  # fmt: skip

    def warn_of_other_order(self, samples_per_epoch: int | None, at: Position) -> None:
        """Warn if a continued run has other samples, or another number of sources, which changes their order.

        Args:
            samples_per_epoch: what the run had before, if that is known.
        """
        now = self.loader.samples_per_epoch
        if samples_per_epoch not in (None, now):
            changed = f"an epoch had {samples_per_epoch:,} samples and has {now:,} now"
        elif not self.loader.knows(at.data):
            changed = "the number of the data's sources has changed, or which of them are streamed"
        elif at.chosen.get(self.number, self.fingerprint) != self.fingerprint:
            changed = (
                "the loop reads another subset than before the run was stopped (register the indices of one "
                "that is picked by what the model has learnt)"
            )
        else:
            return
        log.warning("%s: from step %d on the samples come in a different order", changed, at.step)


def begin(number: int, loader: Loader, length: Duration, at: Position, *, from_here: bool) -> Loop:
    """Begin a loop at a position, or find where an earlier attempt began it.

    Args:
        from_here: count from where the loop begins, not from the start of the run.

    Raises:
        ValueError: the loader cannot count the length.
        BadInput: ranks have other samples than others; all of them call it.
    """
    chosen = _same_on_all_ranks(loader.fingerprint())
    if at.tokens is None:  # of an old checkpoint
        at.tokens = at.samples * (loader.tokens_per_sample or 0.0)
    first = at.begin(number) if from_here else (0, 0, 0.0)
    if number in at.left:  # the state that was saved is of where the next loop began
        return Loop(number, loader, length, from_here, first, at.step - 1, chosen, early=False)
    step, samples, tokens = first
    left = counting.steps_in(length, loader, at.step - step, at.samples - samples, at.tokens - tokens)
    planned = step + left
    end = at.ended.get(planned, planned)
    return Loop(number, loader, length, from_here, first, end, chosen, early=end < planned)


def _same_on_all_ranks(fingerprint: str) -> str:
    if len({*distributed.gathered(fingerprint)}) > 1:
        raise BadInput(
            "the ranks have different samples for this loop: each draws from generators of its own, so "
            "draw a subset with one that is seeded alike, such as torch.Generator().manual_seed(epoch)"
        )
    return fingerprint


def length(epochs: float | None, max_steps: Duration | str | int | None) -> Duration:
    """How long to train, from the one that is given. Raises BadInput."""
    if epochs is not None and not epochs > 0:
        raise BadInput(f"epochs={epochs}: must be more than 0")
    if epochs is not None:
        return Duration(float(epochs), "epoch")
    try:
        return Duration.parse(max_steps)
    except ValueError as error:
        raise BadInput(f"max_steps: {error}") from error


def check_loader(loader: object) -> None:
    """Raises BadInput for anything but a Loader: other iterables can only begin at their start."""
    if not isinstance(loader, Loader):
        raise BadInput(
            f"trainer.steps() was given a {type(loader).__name__}, which cannot resume in the middle: make a "
            "loader with trainer.loader(dataset, batch_size=...)"
        )


def nothing_left(length: Duration, at: Position) -> str:
    """What is wrong with a loop whose steps the loops before it have made."""
    return (
        f"steps() of {length} has nothing left to do: the run is at step {at.step}, and a length counts from "
        'the start of the run. Use one loop for all steps (trainer.every("1ep") is true at the end of each '
        "epoch); or, for a stage of its own, give from_here=True, with which a loop counts from where it "
        "begins"
    )
