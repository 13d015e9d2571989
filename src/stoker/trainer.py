"""Trainer: the pieces of a training loop, joined so that a user's own loop reads from top to bottom.

It lays the model out over the ranks, builds the optimizer, restores the newest checkpoint, yields
batches from where the run stopped, makes one optimizer step from each global batch, and saves
checkpoints between steps. It calls only the functions that it is given, and never back into the
user's loop.

The loss is a sum and its weight. Gradients of sums are added up over micro-batches and ranks and
divided once by the weight of the whole global batch, so the result does not depend on how the
batch was divided.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from stoker import distributed, loops, model_state, storage, supervision, words
from stoker.checkpoint import state, stateful
from stoker.checkpoint.frozen import Frozen
from stoker.checkpoint.modes import Modes
from stoker.checkpoint.stateful import Registered
from stoker.data.loader import Collate, Loader
from stoker.duration import Duration
from stoker.engine import (
    arguments,
    batches,
    blocks,
    deepspeed_file,
    determinism,
    device,
    early_stopping,
    gradients,
    imagined,
    memory,
    mesh,
    modes,
    options,
    out_of_memory,
    position,
    precision,
    random_state,
    rehearsal,
    strategies,
    whole,
)
from stoker.engine.agreement import Agreement, Requests, Weight
from stoker.engine.cutting import MicroBatches
from stoker.engine.ema import Ema
from stoker.engine.loss_scale import LossScale
from stoker.engine.metrics import Mean, Metric
from stoker.engine.profiling import Profiler
from stoker.engine.schedule import Schedule, warn_of_no_peak
from stoker.engine.settings import Training
from stoker.engine.step import (
    Load,
    LossFunction,
    OptimizerFactory,
    PlainStep,
    Setting,
    only_loop_of_its_own,
    parameters_of,
    remember_rates,
)
from stoker.engine.timing import Timing
from stoker.engine.unheld import Unheld
from stoker.errors import OutOfMemory, StokerError, Stopped
from stoker.evaluation import Evaluation
from stoker.gauge import Gauge
from stoker.guard import Guard
from stoker.loops import Loop
from stoker.progress import ProgressDisplay, Reading
from stoker.run.series import goal_of
from stoker.saving import Checkpoints, Due, Resumption, Saved
from stoker.status import STOPPED
from stoker.user_run import Run
from torch.distributed.checkpoint.stateful import Stateful

T = TypeVar("T")

log = logging.getLogger("stoker")

_NO_OPTIMIZER = "this Trainer has no optimizer (optimizer=None): it can evaluate, but not train"


class Trainer:
    """One training loop over one model.

    Args:
        run: the run to train.
        model: is laid out over the devices of this run; use `trainer.model` from then on. It is put into
            training mode, except for parts of it that are in evaluation mode, such as a teacher. A part from
            `from_pretrained`, which leaves it so, stays so if it is frozen (`requires_grad_(False)`).
        optimizer: makes the optimizer from the model's trainable parameters, after the model has been laid
            out. For several optimizers: a dict from the name of a submodule to what makes its optimizer.
            None for a model that is only evaluated (`evaluate`, `measure`).
        loss: `(output, batch) -> (sum, weight)`: the loss summed over a micro-batch, a scalar tensor, and
            what to divide it by (the number of samples, or tokens), a number or scalar tensor. A loop that
            calls `backward` itself needs none.
        inputs: `batch -> what the model is called with`: a dict (arguments by name) or a tuple. By default a
            batch that is a dict, or the first item of a tuple.
        schedule: `(step, total steps) -> factor` for the learning rate; see `engine.schedule.build`.
        training: parallelism, precision, micro-batches, clipping, checkpoints: a `stoker.Training`, or a
            config that inherits from it.
        best: the metric whose best checkpoint is kept in addition to the newest, if it is logged; see
            `Run.goal`.
        load: `(model, device, prefix) -> None`, for a model on the meta device: allocates and fills
            everything below a dotted prefix. It is called after the model has been laid out, so no rank ever
            holds more than its own part.

    Raises:
        TypeError: `training` is not a `stoker.Training`.
        BadInput: the model cannot be trained with these settings or on this number of ranks, or an argument
            has the wrong type.
        StokerError: the newest valid checkpoint belongs to another model.
    """

    _resumption: Resumption | None = None
    """What was restored, if the run is resumed."""
    _between: dict[str, Any] | None = None
    """The random state with which the last loop that is over had ended, if the run is resumed."""
    _best_step: int | None = None
    """The step of the best checkpoint, once the model has its weights."""
    _unused = 0
    """How many steps have added to the gradients since the last update."""

    def __init__(
        self,
        run: Run,
        model: torch.nn.Module,
        *,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None,
        loss: LossFunction | None = None,
        inputs: Callable[[Any], Any] = batches.default_inputs,
        schedule: Schedule | None = None,
        training: Training = Training(),  # noqa: B008 (frozen)
        best: str = "val_loss",
        load: Load = lambda model, device, prefix: None,
    ) -> None:
        self.run, self._attempt = run, run.attempt
        self.world = run.world
        arguments.check(training, model, optimizer, loss, schedule)
        self.training = deepspeed_file.completed(training)
        options.check(self.training, ranks=self.world.size, gpus=device.count(self.world))
        if self.training.deterministic:
            determinism.require()
        self.device = device.pick(self.world)
        self._made, model, load = imagined.of(self.world, model, load)
        self.strategy, why = strategies.choose(model, self.training, self.world, self.device)
        distributed.join(self.world, training.backend, alone=self.strategy not in ("single", "pipeline"))
        self.mesh = mesh.build(self.world, self.device, self.training, self.strategy)
        self.precision = computed_in(run, self.training)
        precision.use_tf32(self.training.tf32)
        self._scale = LossScale(self.precision == "fp16")
        self._setting = setting = Setting(
            self.mesh, inputs, loss, self.precision, self._scale, self.training.clip_norm,
            guarded=self.training.on_bad_loss != "stop",
        )  # fmt: skip
        evaluating = modes.begin_training(model)
        # Before a strategy gives them other names.
        block = blocks.largest(blocks.find(model, self.training.blocks))
        self._step = strategies.lay_out(model, self.strategy, self.training, setting, optimizer or {}, load)
        self.model, self.optimizers = self._step.model, self._step.optimizers
        self._schedule = self._of_their_rates(schedule)
        decays = self.training.ema.decay is not None
        self._ema = Ema(self._step, self.training.ema) if decays else None
        self._made.holds(self._step, self._ema, self.training, self.strategy)
        self._unheld = Unheld(
            self.model, self.optimizers.values(),
            looks=self.mesh.data.rank == 0 and self.strategy != "deepspeed",  # whose optimizer has others
            changes=arguments.changes_of_updates(self.training, schedule), adding_up=lambda: self._adding_up,
        )  # fmt: skip
        built = {name: state.hyperparameters(o) for name, o in self.optimizers.items()}
        limit = self.training.hang_limit
        self._heart = supervision.Heart(limit.seconds if limit is not None else None)
        self._registered = Registered(self.world, self.device, self.optimizers)
        self._registered.add(stateful.extra(self.model))
        self._modes = Modes(self.model)
        self._checkpoints = Checkpoints(
            self._attempt,
            Saved(
                self.world, self._step, model_state.of(self._step, self.mesh, built, self._ema),
                Frozen(self.model), self._modes, self._scale, self._registered,
            ),
            keep=self.training.keep_checkpoints, every=self.training.keep_every, best=best,
            done=self._heart.saved,
        )  # fmt: skip
        self._at = position.Position()
        self._gauge = Gauge(self._attempt, self._step, self.device, self.training, self.precision)
        self._cut = MicroBatches(self._step, setting, self.training, self.strategy, block)
        self._guard = Guard(
            self._attempt, self._step, self._checkpoints, self.training, self._heart,
            at_once=self.device.type == "cpu",
        )  # fmt: skip
        self._loss: Weight = 0.0
        self._weight: Weight = 0.0
        self._loop: Loop | None = None
        self._begun = False
        self._random: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
        self._agreement = Agreement(self.world, self.device, self._asked)
        self._batch_is: Literal["", "handed out", "computed", "trained on"] = ""
        """What the loop has done so far with the current batch; empty between steps."""
        self._due = Due(
            self._checkpoints, self.training.checkpoint_every, keeps_best=bool(self.training.checkpoint_best)
        )
        self._attempt.take_over_steps(
            self._checkpoints.wait, self._leave_loop, self._heart,
            lambda: self.steps_done + (self._batch_is == "trained on"),
        )  # fmt: skip
        supervision.say_where(run.directory.path)
        self._say(why, evaluating)
        self._restore()
        self._restored_step = self.steps_done

    def _say(self, why: str, evaluating: Sequence[str]) -> None:
        if evaluating and self.world.rank == 0:
            log.warning(
                "trained in evaluation mode, without dropout, since the model came so: %s; before the "
                "Trainer is created, call train() on it, or requires_grad_(False) if it is not to be trained",
                words.some(evaluating),
            )
        if self.world.rank == 0:
            because = f" ({why})" if self.training.parallel == "auto" and self.world.size > 1 else ""
            log.info(
                "parallel=%s%s precision=%s on %d x %s",
                self.strategy, because, self.precision, self.world.size, device.name(self.device),
            )  # fmt: skip
        unused = options.unused(self.training, self.strategy)
        if unused and self.world.rank == 0:
            log.warning("parallel=%s: these settings are not used: %s", self.strategy, ", ".join(unused))
        self._attempt.event(
            "layout", parallel=self.strategy, why=why, precision=self.precision, ranks=self.world.size,
            device=device.name(self.device), data_ranks=self.mesh.data.size,
            memory_bytes=memory.of_a_rank(self.device, self.world),
        )  # fmt: skip

    def register_for_checkpointing(self, **states: Stateful) -> None:
        """Save the state of these objects with every checkpoint, and restore it now if the run is resumed.

        An object needs `state_dict()` and `load_state_dict()`: one of torch's schedulers for
        `trainer.optimizer`, a curriculum, an average, an optimizer of parameters outside the model. A state
        consists of tensors, NumPy arrays, numbers, strings, and lists, tuples, sets and dicts of these. A
        state that is the same on all ranks is restored on any number of ranks; if it differs, each rank has
        its own.

        Call it before the loop of steps: `trainer.register_for_checkpointing(scheduler=scheduler)`.

        Raises:
            ValueError: it is called within a step, or with a scheduler for the rate that `schedule` sets.
            BadInput: an object has no state, a name is taken, or a state has values that no checkpoint can
                hold.
        """
        if self._batch_is:
            raise ValueError("register_for_checkpointing() was called within a step: call it before the loop")
        schedulers = self._registered.schedulers(states)
        if schedulers and self._schedule is not None:
            raise ValueError(
                f"{next(iter(schedulers))} and schedule= would both set the learning rate: leave one out"
            )
        self._unheld.know(states.values())
        self._registered.add(states, whole=self._resumption is None or self._resumption.whole)

    @property
    def steps_done(self) -> int:
        """The number of steps that the run has made."""
        return self._at.step

    @property
    def samples_done(self) -> int:
        """The number of samples that the run has trained on, over all ranks."""
        return self._at.samples

    # -- the loop ---------------------------------------------------------------------------

    def loader(
        self,
        dataset: Any,
        *,
        batch_size: int,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        shuffle: bool = True,
        lengths: Sequence[float] | None = None,
    ) -> Loader:
        """Global batches of a map-style dataset, in an order that depends on the run's seed alone.

        Args:
            batch_size: samples per global batch, over all ranks.
            workers: processes that load samples; the batches are the same for any number.
            lengths: of each sample, in any unit: batches then have samples of similar length, in random
                order, so that padding a batch to its longest sample adds little.
        """
        options.check_batch(batch_size, self.mesh.data.size)
        share = batch_size // self.mesh.data.size
        if self.strategy == "pipeline":
            options.check_pipeline_batch(self.training, share, self.mesh.size("stage"))
        if self.training.micro_batch != "auto":
            parts = -(-share // (self.training.micro_batch or share))
            deepspeed_file.check_batch(
                self.training, batch_size=batch_size, ranks=self.world.size, parts=parts
            )
        loader = Loader(
            dataset, batch_size=batch_size, world=self.mesh.data, seed=self.run.seed,
            workers=workers, collate=collate, shuffle=shuffle, share=self.training.data_share,
            lengths=lengths,
        )  # fmt: skip
        if self.world.rank == 0:
            strategies.warn_of_batch_norm(
                self.model, batch_size=batch_size, share=share, training=self.training
            )
            loader.warn_of_repeats()
            loader.warn_of_set_epoch()
        return loader

    def steps(
        self,
        loader: Loader,
        *,
        epochs: float | None = None,
        max_steps: Duration | str | int | None = None,
        from_here: bool = False,
    ) -> Iterator[Any]:
        """Yield the remaining batches, one per step, from where the run stopped; the loop's body is the step.

        Checkpoints are saved between steps, and after the last one. When told to stop (SIGTERM, Ctrl-C), it
        saves one and raises Stopped, which ends the script. Epochs follow one another without a gap: a batch
        may span two of them, and every batch is full.

        Args:
            loader: what `Trainer.loader` returned.
            epochs, max_steps: the length, of which one is given. It counts from the start of the run.
            from_here: count the length, the epochs and the position in the data from where this loop begins,
                as for a second stage with other data. The order and the augmentations are others than those
                of the loops before. A schedule goes on counting the steps of the run.

        Raises:
            ValueError: both lengths are given, or neither; or an earlier loop of the script has already made
                all these steps.
            BadInput: the length or the loader is not valid.
        """
        if (epochs is None) == (max_steps is None):
            raise ValueError("give steps() either epochs or max_steps")
        if not self.optimizers:
            raise ValueError(_NO_OPTIMIZER)
        if self._best_step is not None:
            raise ValueError("steps() after load_best(): call that after the last loop")
        length = loops.length(epochs, max_steps)
        loops.check_loader(loader)
        self._leave_loop(another=True)
        before, loop = self._loop, self._next(loader, length, from_here=from_here)
        self._loop = loop
        self._cut.share = loader.batch_size // self.mesh.data.size
        if before is not None and self._restored_step < self.steps_done >= loop.end:
            raise ValueError(loops.nothing_left(length, self._at))
        if self.world.rank == 0:
            loop.say_what_is_odd(before, self._at)
        if self._resumption is not None:
            self._pass_by_or_go_on(self._resumption, loop)
        if self._schedule is not None and self.world.rank == 0 and self.steps_done < loop.end:
            warn_of_no_peak(self._schedule, loop.end)
        self._gauge.pace.count(loader.batch_size, loader.tokens_per_sample)
        self._attempt.plan_steps(
            **loop.plan(self._at), data_share=self.training.data_share, best=self._checkpoints.best
        )
        with self._attempt.stop.deferred(), self._progress():
            yield from self._remaining(loop)
            requests = self._agreement.requests()
        if requests.stop:  # during the last step; the next start continues after the loop
            raise Stopped(requests.stop)

    def _next(self, loader: Loader, length: Duration, *, from_here: bool) -> Loop:
        """The loop of the script that follows the one so far."""
        number = 1
        if self._loop is not None:
            self._at.behind.add(self._loop.number)
            number = self._loop.number + 1
        loop = loops.begin(number, loader, length, self._at, from_here=from_here)
        loop.end = self._made.end(loop.end)
        return loop

    @property
    def _in_loop(self) -> Loop:
        if self._loop is None:
            raise ValueError("every() and step_metrics() are for the body of the loop over steps()")
        return self._loop

    @property
    def _total(self) -> int:
        """The step with which the loop ends; 0 before the first one."""
        return self._loop.end if self._loop is not None else 0

    @property
    def _only_steps(self) -> bool:
        """Whether the loop is about steps alone: they are timed, or imagined."""
        return self._attempt.measure is not None or not self._made.is_real

    def _progress(self) -> contextlib.AbstractContextManager[Any]:
        is_past = self.steps_done > self._total
        if self.world.rank > 0 or self._only_steps or is_past:
            return contextlib.nullcontext()
        return ProgressDisplay(self.run.directory.id, self._reading)

    def _remaining(self, loop: Loop) -> Iterator[Any]:
        source = self._begin(loop)
        timing = Timing(self._attempt.measure, self.device) if self._attempt.measure is not None else None
        remembering = self.training.deterministic
        with contextlib.closing(
            Profiler(self._attempt.profile, self.run.directory.logs, self.world.rank, self.device)
        ) as profiler:
            while self.steps_done < loop.end:
                with self._gauge.pace.waiting():
                    batch = next(source)
                self._take_up(self.steps_done + 1)
                with determinism.remembering() if remembering else contextlib.nullcontext():
                    yield from self._handed_out(batch)
                remembering = False
                self._after_step(loop, batch, profiler, timing)
            self.run.step = self.steps_done
        self._save()
        self._end_loop()

    def _begin(self, loop: Loop) -> Iterator[Any]:
        """Begin a loop, and with the first one the attempt; returns the batches from here on."""
        source: Iterator[Any] = iter(())
        if self.steps_done <= loop.end:  # otherwise the run is past this loop
            place = None if self._begun else self._at.data
            source = loop.loader.batches(loop.samples(self._at), place, stage=loop.stage)
            self._begin_attempt(loop)
            self._at.data, self._at.chosen = None, {loop.number: loop.fingerprint}
        if self.steps_done < loop.end:
            self._registered.begin()
            self._modes.begin()
            self._unheld.begin()
        self._due.begin()
        self._gauge.pace.begin()
        self._heart.begin(self.steps_done)
        if self.training.on_bad_loss == "rewind":
            self._guard.needs_a_checkpoint(self.steps_done)
            self._save()  # one to rewind to
        return source

    def _after_step(self, loop: Loop, batch: Any, profiler: Profiler, timing: Timing | None) -> None:
        """Count a step, and save what is due. Raises Stopped if the loop ends with it."""
        pace, loader = self._gauge.pace, loop.loader
        self._batch_is = ""
        pace.step()
        loop.move(self._at)
        self._heart.beat(self.steps_done)
        profiler.step(self.steps_done)
        if found := self._made.result_after(self.steps_done):
            self._write_plan(batch, found)
            raise Stopped("planned")
        if timing is not None and (timed := timing.step(pace.waited)):
            self._gauge.write_timing(timed, loader)
            raise Stopped("measured")
        requests = self._agreement.requests()
        if requests.failed:
            self._checkpoints.wait()  # raises
        if requests.save:
            self._due.asked = True
        due = self._due.after_step(loader, self.steps_done, loop.samples(self._at))
        waits = self._adding_up  # a checkpoint does not hold accumulated gradients
        self._unused = self._unused + 1 if waits else 0
        if waits and (due or requests.stop):
            self._due.put_off(self.steps_done, self._unused)
        elif due:
            self._save()
            self._due.asked = False
        stop = None if waits else requests.stop
        stop = stop or (STOPPED if self.steps_done == self._attempt.until else None)
        if stop:
            self._end_loop()
            raise Stopped(stop)

    def _take_up(self, step: int) -> None:
        """Begin a step."""
        self.run.step = step
        self._batch_is = "handed out"
        self._keep_buffers()
        if not self._adding_up:  # a loop may have cleared the gradients of a loss that it did not like
            self._loss = self._weight = 0.0

    def _keep_buffers(self) -> None:
        if self._made.is_real and not self._adding_up:
            self._guard.keep_buffers()

    @property
    def _adding_up(self) -> bool:
        """Whether a user's own loop has accumulated gradients that no update has used yet."""
        return isinstance(self._step, PlainStep) and self._step.adding_up

    def _handed_out(self, batch: Any) -> Iterator[Any]:
        """Yield a batch to the loop's body; for a plan, one without values, and follow its allocations."""
        given = self._made.batch(batch)
        with self._made.step():
            yield given

    def _write_plan(self, batch: Any, found: dict[str, Any]) -> None:
        """Write the memory that a step of the planned ranks needs, for `stoker plan`."""
        share = batches.size(batch, self._cut.share)
        about = {
            "parallel": self.strategy, "precision": self.precision, "ranks": self.world.size,
            "rank": self.world.planned_rank, "memory": self.world.planned, "share": share,
            "micro_batch": self._cut.size or share,
        }  # fmt: skip
        storage.write_json(self.run.directory.logs / imagined.FILE, {**about, **found})
        imagined.remember(self.run.directory, self.world.size, found["peak"])

    def _leave_loop(self, *, another: bool = False) -> None:
        """Save the state of a loop that was left with `break`, if one was.

        Args:
            another: whether another loop follows; a run that resumes there is past this one. Otherwise the
                same script would go on with it.
        """
        if self.training.checkpoint_best and not another and self.steps_done == self._total:
            self._checkpoints.warn_if_never_logged()
        if self._batch_is in ("", "computed"):  # a step that failed half-way, and whose error was caught
            return
        loop = self._in_loop
        if self._batch_is == "trained on":
            self._agreement.requests()  # finish what the step began
            loop.move(self._at)
        self._batch_is = ""
        if another:
            self._at.left[loop.number] = self.steps_done
            self._at.behind.add(loop.number)
        if self.world.rank == 0:
            log.info("the loop was left at step %d of %d", self.steps_done, loop.end)
        self._save()
        self._end_loop()

    def _end_loop(self) -> None:
        with self._gauge.spending("checkpointing"):
            self._finish_saving()
        self._gauge.over()
        self._heart.pause()
        if self._begun:
            self._checkpoints.end_loop()
        elif self._between and self._in_loop.number == max(self._at.behind):
            # What the script draws for the loop in which the run goes on is what it has drawn before.
            random_state.restore_written(self._between)
            self._checkpoints.end_loop(self._between)

    def _begin_attempt(self, loop: Loop) -> None:
        """Begin the attempt with the first loop that has steps left."""
        if self._begun:
            return
        self._begun = True
        if self.steps_done and self.world.rank == 0:
            loop.warn_of_other_order(self._attempt.samples_per_epoch, self._at)
        if self._random is not None:  # last, so that nothing draws from it before the next step
            random_state.restore(*self._random)
            self._random = None
        elif self.world.rank > 0 or self.steps_done > 0:
            # Ranks have the same weights, but draw their own dropout.
            random_state.seed_everything(
                random_state.of_rank(self.run.seed, self.world.rank, self.steps_done)
            )

    def _pass_by_or_go_on(self, resumption: Resumption, loop: Loop) -> None:
        """A loop of a resumed run: it is one that the run has left behind, or the one in which it goes on.

        What the script does behind a loop that was left behind is in the checkpoint, and was logged.
        """
        if self.steps_done > loop.end and loop.number in self._at.behind:
            resumption.passes_by = True
            self._attempt.held.begin()
            return
        resumption.restore_changed()
        self._resumption = None
        self._attempt.held.drop()

    def _asked(self) -> Requests:
        """What this rank was asked to do. Checkpoints by time go by the clock of rank 0."""
        stop = self._attempt.stop.requested
        due = (self.world.rank == 0 and self._due.by_clock()) or self._attempt.stop.told_to_save()
        due |= self._guard.needs_a_checkpoint(self.run.step)
        asked = {stop: True} if stop is not None else {}
        return Requests(**asked, checkpoint=due, failed=self._checkpoints.failed)

    def every(self, duration: Duration | str | int) -> bool:
        """Whether the current step completes another such duration, e.g. `"1ep"`, `100`, `"1000000tok"`.

        Always False under `stoker bench` and `stoker plan`, which are about steps alone.
        """
        parsed = Duration.parse(duration)
        if parsed.seconds is not None:
            raise ValueError(
                f"every({str(parsed)!r}) depends on the machine's speed: count in steps, epochs or tokens"
            )
        loop = self._in_loop
        if self._only_steps:
            return False
        completes = loop.completes(parsed, self._at)
        self._due.measured |= completes
        return completes

    @property
    def last(self) -> bool:
        """Whether the current step is the last one."""
        return self.steps_done + 1 >= self._total

    # -- a step -----------------------------------------------------------------------------

    def step(self, batch: Any) -> torch.Tensor:
        """Make one optimizer step; returns the mean loss of the global batch, a scalar tensor on the device.

        `batch` is this rank's share. Raises StokerError if memory runs out, or if an operation has no
        deterministic form under `deterministic=true`; the message says what to change.
        """
        if self._setting.loss is None:
            raise ValueError("give Trainer a loss, or use micro, backward and update")
        with self._telling_what_fits(), determinism.explained(lambda: self._trace(batch)):
            if self.training.optimizer_in_backward:
                self._set_rates(self.optimizer)
            if self._ema is not None:
                self._ema.include()
            return self._judged_update([self.optimizer], *self._gradients(batch))

    def _note(self, done: Literal["computed", "trained on"]) -> None:
        if self._batch_is:
            self._batch_is = done

    def _gradients(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up the gradients of a global batch; returns its loss and weight.

        If memory runs out under `micro_batch=auto`, a single process tries again with smaller micro-batches.
        One of several ranks would leave the others waiting, so all ranks are restarted instead.
        """
        while True:
            try:
                with out_of_memory.as_on_a_gpu():
                    parts = list(self.micro(batch))
                    self._fit_scale(parts)
                    self._step.gradients(parts, self._agreement)
                    return self._agreement.finish()
            except torch.OutOfMemoryError as error:
                if not self._cut.take_smaller(batch):
                    raise OutOfMemory(self._cut.out_of_memory(error, batch)) from error
                if self.world.size > 1:
                    said = out_of_memory.said(error, self.world.rank)
                    raise OutOfMemory(f"{said} The next start takes {self._cut.size}", less=True) from error
                self._step.clear()
                self._guard.put_buffers_back()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                log.warning("step %d: out of memory; micro_batch=%d now", self.steps_done + 1, self._cut.size)

    def _trace(self, batch: Any) -> None:
        """Repeat a forward and a backward pass without any effect, to see where an error comes from.

        Skipped if ranks would have to do it together: a rank that failed alone would wait for the others.
        """
        if rehearsal.works_alone(self._step, self._setting, self.strategy):
            rehearsal.alone(self._step, self._setting, next(self.micro(batch)))

    def micro(self, batch: Any) -> Iterator[Any]:
        """This rank's share of a batch on the device, in micro-batches."""
        self._note("computed")
        on_device = batches.to_device(batch, self.device, channels_last=self.training.channels_last)
        return self._made.parts(self._cut.of(on_device), self.steps_done)

    def forward(self, batch: Any) -> Any:
        """The model's output for a batch on the device."""
        return self._step.forward(batch)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of `forward`, for calling submodules in the run's precision."""
        return self._step.context()

    def backward(self, loss_sum: torch.Tensor, weight: Weight) -> None:
        """Add the gradient of a summed loss, a scalar; `update` divides by the sum of the weights.

        Raises StokerError if an operation has no deterministic form under `deterministic=true`, or for a
        gradient of a gradient under fsdp.
        """
        step = only_loop_of_its_own(self._step)
        if step.was_cleared:  # as between the two passes of sharpness-aware minimisation
            self._loss = self._weight = 0.0
        self._note("computed")
        if self._scale.enabled and self._scale.divisor is None:
            self._scale.fit(self._over_ranks(weight))
        try:
            with determinism.explained():
                step.backward(loss_sum)
        except RuntimeError as error:
            arguments.explain_freed(self.strategy, error)
            raise
        self._loss = self._loss + gradients.counted(loss_sum.detach().float().sum(), weight)
        self._weight = self._weight + weight

    def update(self, *optimizers: torch.optim.Optimizer) -> None:
        """Step an optimizer (by default the only one) with the accumulated gradients, and clear them all.

        Several optimizers that step with the gradients of the same losses are given together: the gradients
        are divided once, and clipped by one norm over the weights of them all. The mean of the losses is
        judged as that of `step` is.

        Raises ValueError for an optimizer whose gradients an earlier update has cleared.
        """
        only_loop_of_its_own(self._step)
        if self._ema is not None:
            self._ema.include()
        self._agreement.start(torch.as_tensor(self._loss, device=self.device), self._weight)
        self._loss = self._weight = 0.0
        self._judged_update(optimizers or [self.optimizer], *self._agreement.finish())
        self._keep_buffers()  # a step can have several updates

    def _judged_update(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        loss_sum: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Step optimizers unless the loss or a gradient is bad; returns the mean loss."""
        loss = loss_sum / gradients.divisor(weight)
        wrong = self._guard.see(loss)
        if wrong:
            self._step.clear()
        elif not self._update(optimizers, weight) and not self._scale.enabled:
            wrong = "a gradient is not finite"
        if wrong:
            self._guard.answer(wrong, self._at, self._loop.loader.batch_size if self._loop is not None else 1)
        self._note("trained on")
        return loss

    def _update(self, optimizers: Sequence[torch.optim.Optimizer], weight: torch.Tensor) -> bool:
        for optimizer in optimizers:
            self._set_rates(optimizer)
        self._unheld.look(self.steps_done)
        with self._unheld.updating():
            stepped = self._step.update(optimizers, weight)
        if self._ema is not None and stepped:
            self._ema.update(self.steps_done, parameters_of(optimizers) if len(self.optimizers) > 1 else None)
        return stepped

    def _of_their_rates(self, schedule: Schedule | None) -> Schedule | None:
        """The schedule, for which each group keeps the rate that it was built with."""
        if schedule is not None:
            remember_rates(self.optimizers.values())
        return schedule

    def _set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        if self._schedule is not None:
            factor = self._schedule(self.steps_done, self._total)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def _fit_scale(self, parts: list[Any]) -> None:
        """Before the first step in fp16: fit the loss scale to the weight of a global batch."""
        if self._scale.enabled and self._scale.divisor is None:
            weight = rehearsal.weight_of(self._step, self._setting, parts[0])
            self._scale.fit(self._over_ranks(weight) * len(parts))

    def _over_ranks(self, weight: Weight) -> float:
        return math.fsum(distributed.gathered(float(weight)))

    @contextlib.contextmanager
    def _telling_what_fits(self) -> Iterator[None]:
        try:
            with out_of_memory.as_on_a_gpu():
                yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(self._cut.out_of_memory(error)) from error

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The only optimizer. Raises ValueError if there are several."""
        if not self.optimizers:
            raise ValueError(_NO_OPTIMIZER)
        if len(self.optimizers) != 1:
            raise ValueError(f"there are several optimizers: name one of {', '.join(self.optimizers)}")
        return next(iter(self.optimizers.values()))

    @property
    def lr(self) -> float:
        """The learning rate of the first optimizer's first group."""
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    def step_metrics(self) -> dict[str, Any]:
        """Metrics of the current step, to be logged with its loss.

        The learning rate (`lr`); the L2 norm of the gradient before clipping (`grad_norm`), if `clip_norm` or
        the precision needs it; and the epochs (`epoch`) and, if the dataset counts them, tokens (`tokens`)
        that the run has trained on, including this step. Tokens are samples times the mean of their dataset.
        """
        loop = self._in_loop
        found: dict[str, Any] = {"lr": self.lr, "epoch": loop.epochs(self._at)}
        if self._step.norm is not None:
            found["grad_norm"] = self._step.norm
        tokens = loop.tokens(self._at)
        return found if tokens is None else {**found, "tokens": tokens}

    @property
    def rate(self) -> float | None:
        """Tokens (if the dataset counts them) or samples per second over all ranks, over the last steps."""
        return self._gauge.pace.rate

    def performance(self, flops: float | None = None) -> dict[str, float]:
        """How fast this attempt is, as metrics to log; empty while that is not known yet.

        Tokens (if the dataset counts them) or samples per second, over all ranks and per rank; the share of
        the devices' peak FLOP/s that the model's own operations use (`mfu`, see `engine.flops`); and the
        seconds so far that the loop waited for batches, evaluated, and stood still for checkpoints.

        Args:
            flops: operations that training needs per token, or per sample.
        """
        return self._gauge.performance(flops)

    def say(self, flops: float | None = None, **metrics: float) -> None:
        """Rank 0 prints one line with these metrics and the loop's performance. All ranks call it.

        The performance is the rate and `mfu` of `performance`, the share of its time that this attempt waited
        for batches, and the peak memory of the rank with the most.

        Args:
            flops: see `performance`.
        """
        self._gauge.say(flops, metrics)

    def memory(self) -> list[tuple[int, float, float, float, float, float]]:
        """One row per rank, in GiB: rank, weights, gradients, optimizer state, rest of the peak, peak.

        All ranks call it. On CPUs the peak is that of the whole process.
        """
        return self._gauge.memory()

    # -- evaluation -------------------------------------------------------------------------

    def evaluate(self, dataset: Any, *, batch_size: int, collate: Collate | None = None) -> float:
        """The mean loss over a dataset, each sample once over all ranks, in evaluation mode."""
        loss = self._setting.loss
        if loss is None:
            raise ValueError("evaluate() needs the Trainer's loss")
        if not self._made.is_real:
            return math.nan
        measured = self.measure(
            dataset, lambda output, batch: {"loss": Mean(*loss(output, batch))},
            batch_size=batch_size, collate=collate,
        )  # fmt: skip
        return measured["loss"]

    def measure(
        self,
        dataset: Any,
        metrics: Callable[[Any, Any], Mapping[str, Metric]],
        *,
        batch_size: int,
        collate: Collate | None = None,
        workers: int | None = None,
    ) -> dict[str, float]:
        """Metrics over a dataset in evaluation mode, each sample once over all ranks; the same on every rank.

        If weights are averaged (`ema.decay`), the average is measured. A rank for which the last batch has no
        samples is given one that does not count, also to `metrics`: collect outputs with `predict` instead.

        Args:
            metrics: `(output, batch) -> {name: Mean, Sum, Max or Perplexity}` of a batch.
            batch_size: samples per batch over all ranks, rounded up to a multiple of the number of ranks; a
                rank computes at most `micro_batch` of them at once, so its batches are no larger.
            workers: processes that read samples; by default as many as the loader has.
        """
        if not self._made.is_real:
            return imagined.Unknown()
        with self.evaluating():
            return self._evaluation(batch_size, collate, workers).measure(dataset, metrics)

    def predict(
        self,
        dataset: Any,
        outputs: Callable[[Any, Any], T],
        *,
        batch_size: int,
        collate: Collate | None = None,
        workers: int | None = None,
    ) -> T:
        """What `outputs` returns for every sample of a dataset, in its order; the same on every rank.

        If weights are averaged (`ema.decay`), the average predicts.

        For metrics that need all samples at once (an AUC, an average precision), and tables of predictions.
        All of it is in the CPU memory of every rank.

        Args:
            outputs: `(output, batch) -> tensor, array or list` with one item per sample of the batch, or
                dicts or tuples of these.
            batch_size, collate, workers: as for `measure`.

        Returns:
            The same with one item per sample of the dataset; tensors are on the CPU.

        Raises:
            ValueError: there is not one item per sample, or the shapes of the items differ between batches.
        """
        if not self._made.is_real:
            raise StokerError(
                "stoker plan computes nothing that can be predicted: skip it before the first step, by "
                "`if not run.world.planned:`"
            )
        with self.evaluating():
            found: T = self._evaluation(batch_size, collate, workers).predict(dataset, outputs)
            return found

    def _evaluation(self, batch_size: int, collate: Collate | None, workers: int | None) -> Evaluation:
        if workers is None:
            workers = self._loop.loader.workers if self._loop is not None else 0
        return Evaluation(
            self._step, self._setting, batch_size=batch_size, at_once=self._cut.at_once, collate=collate,
            workers=workers, channels_last=self.training.channels_last, meanwhile=self._heart.beat,
        )  # fmt: skip

    def beat(self) -> None:
        """Say that this rank makes progress: in a loop's body that takes longer than `hang_limit` allows."""
        self._heart.beat()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the time within this block as evaluation; the model has its averaged weights, if any."""
        self._due.measured = True
        with self.averaged(), self._gauge.spending("evaluating"):
            yield

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within this block the model has its averaged weights, if `ema.decay` is set."""
        return self._ema.in_place() if self._ema is not None else contextlib.nullcontext()

    def state_dict(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
        """The whole model's parameters and buffers, for export; averaged if `ema.decay` is set.

        One with several names is in it once, as in `named_parameters()`: a model with tied weights loads it
        with `strict=False`. They are on the CPU of rank 0; other ranks get an empty dict. All ranks call it.

        Args:
            wanted: whether to include the tensor of this name; must be the same on every rank.
        """
        if not self._made.is_real:
            return {}
        with self.averaged():
            return whole.state_dict(self._step, self.mesh, wanted)

    def stale(self, metric: str, patience: int, min_delta: float = 0.0) -> bool:
        """Whether a metric has not improved over its last `patience` values; the same on every rank.

        Call it once after each evaluation, and end the loop with `finish`. The values so far are saved in
        checkpoints, so a resumed run decides as an uninterrupted one does. If it is the metric of the best
        checkpoint, one is saved at every new best value (`checkpoint_best`).

        Args:
            min_delta: the smallest change that counts as an improvement.

        Raises:
            ValueError: the metric was not logged, or it is not known whether it is better low or high.
        """
        if metric == self._checkpoints.best and self.training.checkpoint_best is None:
            self._due.keeps_best = True
        self._checkpoints.agree_on_metrics()
        return bool(distributed.from_rank_zero(self._is_stale(metric, patience, min_delta)))

    def _is_stale(self, metric: str, patience: int, min_delta: float) -> bool:
        if self.world.rank > 0:
            return False
        goal = goal_of(metric, self._attempt.goals)
        if metric not in self.run.latest or goal is None:
            why = "was not logged" if goal else "may be better low or high: say which with run.goal(...)"
            raise ValueError(f"stale({metric!r}): the metric {why}")
        if self._attempt.held.active:  # the run went on past this loop
            return False
        seen = self._at.history.setdefault(metric, [])
        seen.append((self.run.step, self.run.latest[metric]))
        return early_stopping.stale([value for _, value in seen], goal, patience, min_delta)

    def finish(self, reason: str = "finished early") -> None:
        """Make the current step the last one. All ranks call it.

        If the run is continued, it stays finished, unless `steps` is given another length.
        """
        if self._loop is not None and self.steps_done + 1 < self._loop.end:
            self._loop.end = self._at.end(self._loop.end)
            self._attempt.event("finish", step=self._loop.end, reason=reason)
            if self.world.rank == 0:
                log.info("step %d is the last: %s", self._loop.end, reason)

    # -- checkpoints ------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Save all that a resumed run needs; in a loop's body, at the end of its step. All ranks call it.

        Accumulated gradients are not included; the checkpoints that `steps` saves wait for their update.

        Training continues as soon as the state is copied to host memory, while a thread writes it; `steps`
        waits for the last one. Raises OSError if the previous checkpoint could not be written (a full disk).
        """
        if self._batch_is:
            self._due.asked = True
            return
        self._save()

    def load_best(self) -> int:
        """Give the model the weights of the best checkpoint, for a test or an export; returns its step.

        All ranks call it, after the last loop: the Trainer evaluates and exports from then on, and no longer
        trains. With `ema.decay` the averages of that checkpoint are measured and exported. The best is that
        of `Trainer(best=...)`; with `stale`, or `checkpoint_best=true`, its weights are those that were
        measured. A run that is continued still goes on from its newest checkpoint.

        Raises:
            ValueError: it is called within a loop.
            StokerError: no checkpoint has the metric, or the best one is damaged.
        """
        if self._attempt.stop.in_loop:
            raise ValueError("load_best() was called within a loop: call it after the last one")
        self._leave_loop()
        if not self._made.is_real:
            return self.steps_done
        self._finish_saving()
        found = self._checkpoints.best_one()
        if found is None:
            best = self._checkpoints.best
            raise StokerError(
                f"no checkpoint has the metric {best}, by which the best is known: log it before one is "
                "saved, or name another with Trainer(best=...); run.goal(...) says whether low or high is "
                "better"
            )
        self._checkpoints.restore(found)
        self._best_step = found.step
        if self.world.rank == 0:
            by = self._checkpoints.best
            log.info("the model has the weights of step %d, the best by %s", found.step, by)
            self._checkpoints.warn_if_better_before(found)
        return found.step

    def _save(self) -> None:
        """Save now, between steps."""
        if self._due.saved_step == self.steps_done or not self._made.is_real or self._best_step is not None:
            return
        if wrong := self._guard.look():
            raise StokerError(f"by step {self.steps_done} {wrong}; no checkpoint is saved of the result")
        if self._adding_up and self.world.rank == 0:
            log.warning(
                "the checkpoint of step %d lacks the accumulated gradients that no update has used yet",
                self.steps_done,
            )
        if self._loop is not None:
            self._at.data = self._loop.loader.place(self._loop.samples(self._at))
        self._checkpoints.agree_on_metrics()
        with self._gauge.spending("checkpointing"):
            self._finish_saving()
            self._checkpoints.save({**self._at.written(), **self._guard.state()}, exact=self._due.keeps_best)
        self._due.saved(self.steps_done)

    def _finish_saving(self) -> None:
        self._checkpoints.wait(meanwhile=self._heart.beat)  # it may take long without hanging

    def _restore(self) -> None:
        found, passed_over = self._checkpoints.newest()
        if found is None and self.run.continued:
            self._checkpoints.check_none_lost(passed_over)
        if found is not None:
            saved, self._random, is_whole, self._between = self._checkpoints.restore(found, waits=True)
            self._resumption = Resumption(found, self._checkpoints, whole=is_whole, own=self.run.continued)
            self._at = position.read(saved)
            if not self.run.continued:  # the checkpoint is another run's, which may have been finished early
                self._at.ended.clear()
                self._at.left.clear()
            self._guard.restore(saved)
            self._due.saved(self.steps_done)
            self._heart.saved(self.steps_done)
            if self.world.rank == 0:
                log.info("resumed %s from step %d", self.run.directory.id, self.steps_done)
        if self.run.continued:
            self._checkpoints.void_after(self.steps_done)
            self._attempt.resumed(self.steps_done, passed_over)
            self.run.step = self.steps_done
        elif found is not None:  # another run's checkpoint, put there for this run to begin from
            self._attempt.event("begun_from", step=self.steps_done)

    def _reading(self) -> Reading:
        return Reading(
            step=self.steps_done,
            total=self._total,
            loss=self.run.latest.get("loss"),
            rate=self.rate,
            unit=self._gauge.unit,
            seconds_left=self._gauge.pace.seconds_for(self._total - self.steps_done),
        )


def computed_in(run: Run, training: Training) -> precision.Resolved:
    """The precision of a run's forward passes. The ranks must have joined.

    It is the same on every rank and in every attempt, even if `precision=auto` measures.
    """
    asked = (
        run.attempt.layout.get("precision", "auto") if training.precision == "auto" else training.precision
    )
    if asked == "auto" and run.world.planned:
        return "bf16"  # what GPUs would use
    found = precision.resolve(asked, device.pick(run.world), storage.cache_folder())
    return cast("precision.Resolved", distributed.from_rank_zero(found))
