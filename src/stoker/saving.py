"""Saving and restoring the state of a Trainer: the model with its optimizers (`model_state.py`), the
position, random states, and objects that a script registered. When a checkpoint is due, and which is best.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from stoker import distributed, words
from stoker.attempt import Attempt
from stoker.checkpoint import copies, frozen, manifest, state, store
from stoker.checkpoint.frozen import Frozen
from stoker.checkpoint.modes import Modes
from stoker.checkpoint.stateful import Registered
from stoker.checkpoint.store import Tensors
from stoker.data.loader import Loader
from stoker.duration import Duration
from stoker.engine import counting, parallel, random_state
from stoker.engine.loss_scale import LossScale
from stoker.engine.step import Step
from stoker.errors import StokerError, nearest
from stoker.model_state import ModelState
from stoker.run import view
from stoker.run.series import goal_of
from stoker.world import World

log = logging.getLogger("stoker")

_NAMED = 5  # names in a message
_MANY_UNUSED = 100  # steps whose gradients no update has used, from which it seems to be forgotten


class Restored(NamedTuple):
    """What was restored."""

    position: dict[str, Any]
    random: tuple[dict[str, torch.Tensor], dict[str, Any]] | None
    """The random state; None on a rank that did not exist when the checkpoint was saved."""
    whole: bool
    """False if an optimizer was left out."""
    between: dict[str, Any]
    """The random state with which the last loop that is over ended; empty if none is, or unknown."""


@dataclass(frozen=True)
class Saved:
    """The state from which a run is resumed."""

    world: World
    step: Step
    model: ModelState
    frozen: Frozen
    modes: Modes
    scale: LossScale
    registered: Registered
    between: dict[str, Any] = field(default_factory=dict)
    """The random state with which this rank's last loop ended."""

    def capture(self, position: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        """This rank's tensors, and the joined values of all ranks. All ranks call it."""
        parallel.gather_no_more(self.step.model)
        self.frozen.check(position["step"])
        kept, part = self.frozen.kept(), self.model.part
        parameters = dict(self.step.model.named_parameters())
        copies.check(
            {n: p for n, p in parameters.items() if p.requires_grad},
            {n: parameters[n] for n in kept},
            state.saved_buffers(self.step.model),
            part=part, whole=part[:1], step=position["step"], world=self.world,
        )  # fmt: skip
        tensors, values = self.model.capture(kept)
        own, registered = self.registered.capture()
        tensors.update(own)
        drawn, random = random_state.capture()
        tensors.update({f"random.{self.world.rank}.{key}": t for key, t in drawn.items()})
        changed = {"turned": self.frozen.turned(), "modes": self.modes.changed()}
        random = {**random, "between": self.between} if self.between else random
        parts = distributed.gathered({**values, "random": random, **changed})
        joined = state.joined(parts)
        joined["random"] = [part["random"] for part in parts]
        for key in changed:
            joined[key] = {name: value for part in parts for name, value in part[key].items()}
        if registered:
            joined["registered"] = registered
        return tensors, {**joined, "scale": self.scale.state(), "position": dict(position)}

    def restore(self, checkpoint: manifest.Checkpoint, *, waits: bool = False) -> Restored:
        """Restore a checkpoint, but for the random state, which must be restored last.

        Args:
            waits: see `state.load`.
        """
        tensors, values, whole = self.model.restore(checkpoint, waits=waits)
        self.scale.restore(values["scale"])
        self.frozen.turn(values.get("turned", {}))
        self.modes.restore(values.get("modes", {}))
        self.registered.restore(checkpoint, values.get("registered", {}))
        rank = self.world.rank
        random = None
        if rank < len(values["random"]):
            random = (state.inside(tensors, f"random.{rank}."), values["random"][rank])
        between = {} if random is None else random[1].get("between", {})
        return Restored(values["position"], random, whole, between)

    def checksums(self) -> dict[str, torch.Tensor]:
        """Checksums of the trained weights and the buffers that this rank holds, by name."""
        model = self.step.model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {**frozen.checksums(trained), **frozen.checksums(state.saved_buffers(model), integers=True)}


class Checkpoints:
    """Writes the checkpoints of a run in the background, and finds, restores and prunes them, on all ranks.

    Args:
        keep: the number of newest checkpoints to keep.
        every: checkpoints whose step is a multiple of this are kept too.
        best: the metric that defines the best checkpoint, which is kept too.
        done: called on rank 0 with the step of each checkpoint that is on disk, from the writing thread.
    """

    def __init__(
        self,
        attempt: Attempt,
        saved: Saved,
        *,
        keep: int,
        every: int | None,
        best: str,
        done: Callable[[int], None],
    ) -> None:
        self._attempt, self._saved, self._keep, self.best, self._done = attempt, saved, keep, best, done
        self._every = every
        self._folder = attempt.directory.checkpoints
        self._saver = store.Saver(
            self._folder, attempt.world, ours=attempt.end_if_lost, before=attempt.flush, done=self._on_disk
        )
        self._best_saved: float | None = None
        self._warned = False

    def wait(self, timeout: float | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until the current checkpoint is on disk, see `store.Saver.wait`."""
        self._saver.wait(timeout, meanwhile)

    def restore(self, checkpoint: manifest.Checkpoint, *, waits: bool = False) -> Restored:
        """Restore a checkpoint, but for the random state, see `Saved.restore`."""
        return self._saved.restore(checkpoint, waits=waits)

    def checksums(self) -> dict[str, torch.Tensor]:
        """Checksums of the trained weights and the buffers that this rank holds, by name."""
        return self._saved.checksums()

    def end_loop(self, between: dict[str, Any] | None = None) -> None:
        """A loop has ended: keep the random state, or one with which a loop that is passed by had ended."""
        self._saved.between.clear()
        self._saved.between.update(random_state.written() if between is None else between)

    def changed_besides(self) -> list[str]:
        """Rates and registered objects that the script has changed since they were restored."""
        return self._saved.registered.changed()

    def save(self, position: Mapping[str, Any], *, exact: bool = False) -> None:
        """Start to save the current state at a position: `step`, `samples`, and anything else.

        Args:
            exact: record the metric of the best checkpoint only if it was measured at this step.
        """
        tensors, values = self._saved.capture(position)
        if self.world.rank == 0 and self.improves():
            self._best_saved = self._attempt.recorder.latest[self.best]
        metrics = dict(self._attempt.recorder.latest)
        if exact and self._attempt.recorder.latest_at.get(self.best) != position["step"]:
            metrics.pop(self.best, None)
        about = store.About(position["step"], position["samples"], metrics)
        trained = (n for n, p in self._saved.step.model.named_parameters() if p.requires_grad)
        self._saver.save(tensors, values, about, finite=frozenset(f"model.{name}" for name in trained))

    @property
    def world(self) -> World:
        """The ranks."""
        return self._attempt.world

    @property
    def failed(self) -> bool:
        """Whether the checkpoint being written has failed; `wait` raises the error."""
        return self._saver.failed

    def newest(self, but: Set[int] = frozenset()) -> tuple[manifest.Checkpoint | None, list[str]]:
        """The newest checkpoint that rank 0 finds valid, on every rank; rank 0 also gets the skipped ones.

        Args:
            but: steps whose checkpoints are ignored.

        Raises Unreachable on every rank if an object store that may have a newer one cannot be reached.
        """
        found, passed_over = None, list[str]()

        def look() -> int | None:
            nonlocal found, passed_over
            found, passed_over = self._attempt.newest_checkpoint(but)
            return None if found is None else found.step

        agreed = distributed.done_by_rank_zero(self.world, look)
        for reason in passed_over:
            log.warning("skipped checkpoint %s", reason)
        if self.world.rank > 0 and agreed is not None:
            found = manifest.read(manifest.folder(self._folder, agreed))
        return found, passed_over

    def best_one(self) -> manifest.Checkpoint | None:
        """The best checkpoint, verified by rank 0, on every rank; None if none has the metric that decides.

        All ranks call it. Raises StokerError on each if it cannot be used.
        """

        def look() -> int | None:
            goal = goal_of(self.best, self._attempt.goals)
            path = manifest.best(self._folder, self.best, goal) if goal is not None else None
            try:
                return None if path is None else manifest.mended(path, self._attempt.mend).step
            except manifest.InvalidCheckpoint as error:
                raise StokerError(f"the best checkpoint cannot be used: {error}") from error

        step = distributed.done_by_rank_zero(self.world, look)
        return None if step is None else manifest.read(manifest.folder(self._folder, step))

    def warn_if_better_before(self, best: manifest.Checkpoint) -> None:
        """Warn if `best` was better before training than at any checkpoint; only on rank 0."""
        points = view.load(self._attempt.directory).points.get(self.best)
        before = math.nan if points is None else points.get(0, math.nan)
        value, low = best.metrics[self.best], goal_of(self.best, self._attempt.goals) == "min"
        if before < value if low else before > value:
            log.warning(
                "%s was better before training, %.6g, than at any checkpoint, of which the best has %.6g",
                self.best, before, value,
            )  # fmt: skip

    def check_none_lost(self, passed_over: Sequence[str]) -> None:
        """Raises StokerError if the run had checkpoints and none is left. All ranks call it.

        With an object store it only warns: `newest` has asked for each of them, and it has none that is
        whole. They may not have been uploaded.

        Args:
            passed_over: the reasons that `newest` returned.
        """
        attempt = self._attempt
        known = view.load(attempt.directory).checkpoints if attempt.world.rank == 0 else None
        lost = distributed.from_rank_zero(known)
        if not lost:
            return
        said = "; ".join(passed_over) or f"{self._folder} holds none"
        if attempt.mend is None:
            raise StokerError(
                f"run {attempt.directory.id} had checkpoints, the last at step {lost[-1]}, but none can be "
                f"used ({said}). Restore them (is a disk not mounted?), or start a run with another name"
            )
        if attempt.world.rank == 0:
            log.warning(
                "the object store has none of the run's checkpoints, the last at step %d, that can be used: "
                "training starts from the beginning",
                lost[-1],
            )

    def void_after(self, step: int) -> None:
        """Invalidate the checkpoints after a step, from which the run continues."""
        if self.world.rank == 0:
            for path in manifest.committed(self._folder):
                if manifest.step_of(path) > step:
                    manifest.void(path)

    def improves(self) -> bool:
        """Whether `best` was measured at this step and is better than in any checkpoint; only on rank 0."""
        value = self._attempt.recorder.latest.get(self.best)
        goal = goal_of(self.best, self._attempt.goals)
        if value is not None and goal is None:
            say = f'{self.best}="max"' if self.best.isidentifier() else f'**{{"{self.best}": "max"}}'
            self._warn_of_best(f"is not known to be better low or high: say which with run.goal({say})")
        is_old = self._attempt.recorder.latest_at.get(self.best) != self._attempt.step
        if value is None or goal is None or is_old or math.isnan(value):
            return False
        if self._best_saved is None and (there := manifest.best(self._folder, self.best, goal)):
            self._best_saved = manifest.metrics(there)[self.best]
        known = self._best_saved
        return known is None or (value < known if goal == "min" else value > known)

    def is_best(self) -> bool:
        """`improves`, on every rank. All ranks call it."""
        self.agree_on_metrics()
        return bool(distributed.from_rank_zero(self.world.rank == 0 and self.improves()))

    def agree_on_metrics(self) -> None:
        """Bring the metrics that are reduced over ranks into `run.latest`. All ranks call it."""
        if self.world.size > 1:
            recorder = self._attempt.recorder
            recorder.agree(distributed.gathered(recorder.unreduced))

    def warn_if_never_logged(self) -> None:
        """Warn if the metric that defines the best checkpoint was not logged in the whole run."""
        known = self._attempt.recorder.latest
        if self.world.rank == 0 and self.best not in known:
            self._warn_of_best(f"was not logged: name one with Trainer(best=...){nearest(self.best, known)}")

    def _warn_of_best(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("no best checkpoint is kept: its metric %s %s", self.best, why)

    def _on_disk(self, saved: manifest.Checkpoint) -> None:
        relative = str(saved.path.relative_to(self._attempt.directory.path))
        self._attempt.checkpoint_made(saved.step, relative, saved.bytes)
        goal = goal_of(self.best, self._attempt.goals)
        best = manifest.best(self._folder, self.best, goal) if goal else None
        # The process may have been suspended since it wrote the checkpoint.
        manifest.prune(self._folder, self._keep, best, self._every, ours=self._attempt.end_if_lost)
        self._done(saved.step)
        log.debug("checkpoint of step %d, %d bytes", saved.step, saved.bytes)


class Due:
    """Whether a checkpoint is due: asked for, by its interval, or because the weights are the best so far.

    Args:
        every: the interval; one of time is kept by the clock of rank 0.
        keeps_best: whether to save what has the best metric so far.
    """

    def __init__(self, checkpoints: Checkpoints, every: Duration, *, keeps_best: bool) -> None:
        self._checkpoints, self._every, self.keeps_best = checkpoints, every, keeps_best
        self.asked = False
        """Whether one is to be saved as soon as possible."""
        self.measured = False
        """Whether the current step may have measured the best's metric: true on all ranks, or on none."""
        self.saved_step: int | None = None
        """The step of the newest one."""
        self._warned = False
        self.begin()

    def begin(self) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def saved(self, step: int) -> None:
        """One was saved, or restored, of this step."""
        self.saved_step = step
        self.begin()

    def by_clock(self) -> bool:
        """Whether one is due by an interval of time."""
        seconds = self._every.seconds
        return seconds is not None and time.monotonic() - self._since >= seconds

    def after_step(self, loader: Loader, step: int, samples: int) -> bool:
        """Whether one is due between steps. It stays due until `asked` is cleared. All ranks call it.

        Args:
            step, samples: how far the run is, and the loop.
        """
        self.asked = self.asked or self._by_count(loader, step, samples) or self._is_best()
        return self.asked

    def put_off(self, step: int, unused: int) -> None:
        """One waits for accumulated gradients. Warns, once, if an update of them seems to be forgotten.

        Args:
            unused: how many steps have added to the gradients since the last update.
        """
        if unused < _MANY_UNUSED or self._warned or self._checkpoints.world.rank > 0:
            return
        self._warned = True
        log.warning(
            "by step %d no update has used the gradients of the last %d steps, and checkpoints and requests "
            "to stop wait for one: if none follows, call trainer.update() after trainer.backward(...)",
            step, unused,
        )  # fmt: skip

    def _by_count(self, loader: Loader, step: int, samples: int) -> bool:
        """Whether this step has completed an interval of steps, samples or tokens."""
        if self._every.seconds is not None:
            return False
        return counting.completes(self._every, loader, step - 1, samples - loader.batch_size)

    def _is_best(self) -> bool:
        """Whether this step's weights have the best metric so far, and are to be saved for it."""
        measured, self.measured = self.measured, False
        if not self.keeps_best or not (measured or self._checkpoints.world.size == 1):
            return False
        return self._checkpoints.is_best()


class Resumption:
    """What a resumed run has restored, until it goes on in a loop.

    A script does at each start what it does before its loop, and between two loops also if the run has left
    the first behind: it initialises, thaws, sets rates. All that was done before the checkpoint, and must not
    be done to it again.

    Args:
        whole: whether all of the checkpoint was restored.
        own: whether the checkpoint is the run's own. What begins from another's may be changed before it.
    """

    def __init__(
        self, restored: manifest.Checkpoint, checkpoints: Checkpoints, *, whole: bool, own: bool
    ) -> None:
        self._restored, self._checkpoints, self.whole, self._own = restored, checkpoints, whole, own
        self._before = checkpoints.checksums() if own else {}
        self.passes_by = False
        """Whether the run has left a loop of the script behind."""

    def restore_changed(self) -> None:
        """Restore the checkpoint again if the script has changed it. All ranks call it."""
        changed = self._changed() if self._own else []
        if any(distributed.gathered(bool(changed) or self.passes_by or not self.whole)):
            self._checkpoints.restore(self._restored)
        if changed and not self.passes_by:
            log.warning(
                "what the Trainer had restored was changed before the loop (%s): the run continues with what "
                "its checkpoint has",
                words.some(sorted(changed), _NAMED),
            )  # fmt: skip

    def _changed(self) -> list[str]:
        now = self._checkpoints.checksums()
        weights = [
            n for n, sums in now.items() if n in self._before and not torch.equal(sums, self._before[n])
        ]
        return [*weights, *self._checkpoints.changed_besides()]
