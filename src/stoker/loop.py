"""Trainer: the pieces of a training loop, joined so that a user's own loop reads downward.

It builds the optimizer, restores the newest checkpoint, hands out batches from where the
run was, makes one optimizer step from a global batch, and takes checkpoints at step
boundaries. It calls nothing of the user's but the functions given to it, and nothing calls
back into the user's loop.

The loss is a sum and its weight. Gradients of sums are added up over micro-batches and
divided once by the weight of the whole global batch, so the result does not depend on how
the batch was cut.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from stoker.attempt import Run
from stoker.checkpoint import manifest, state, store
from stoker.data.loader import Loader, evaluation_batches
from stoker.duration import Duration
from stoker.engine import batches, device, gradients, random_state
from stoker.engine.precision import Precision, autocast
from stoker.engine.precision import resolve as resolve_precision
from stoker.engine.schedule import Schedule
from stoker.errors import StokerError
from stoker.progress import ProgressDisplay, Rate, Reading
from stoker.run.series import guess_goal
from stoker.world import World

log = logging.getLogger("stoker")

Weight: TypeAlias = torch.Tensor | float
LossFunction: TypeAlias = Callable[[Any, Any], tuple[torch.Tensor, Weight]]
OptimizerFactory: TypeAlias = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Trainer:
    """One training loop over one model.

    Args:
        run: the run that is trained.
        model: moved to this rank's device.
        optimizer: makes the optimizer from the model's trainable parameters; for several, a
            dict from the name of a submodule to what makes its optimizer.
        loss: `(output, batch) -> (sum, weight)`: the loss summed over a micro-batch, a scalar
            tensor, and what to divide it by (samples, or tokens), a number or scalar tensor.
            Not needed by a loop that calls `backward` itself.
        inputs: `batch -> what the model is called with`, a dict (by name) or a tuple. By
            default a dict batch itself, or the first item of a tuple.
        schedule: `(step, total steps) -> factor` of the learning rate; see `engine.schedule.build`.
        clip_norm: the gradient's largest global L2 norm; larger ones are scaled down to it.
        precision: fp32, bf16 (autocast, float32 weights), or auto: bf16 on GPUs that have it.
        micro_batch: samples in one forward pass; by default the whole batch.
        checkpoint_every: a duration such as 500, "1ep", "1000000tok" or "10min".
        keep_checkpoints: how many of the newest checkpoints are kept.
        best: the metric by which the best checkpoint is kept as well, where it is logged; see `Run.goal`.

    Raises:
        StokerError: the newest valid checkpoint is of another model, or several processes train.
    """

    def __init__(
        self,
        run: Run,
        model: torch.nn.Module,
        *,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory],
        loss: LossFunction | None = None,
        inputs: Callable[[Any], Any] = batches.default_inputs,
        schedule: Schedule | None = None,
        clip_norm: float | None = None,
        precision: Precision = "fp32",
        micro_batch: int | None = None,
        checkpoint_every: Duration | str | int = "10min",
        keep_checkpoints: int = 3,
        best: str = "val_loss",
    ) -> None:
        self.run = run
        self.world = World.current()
        if self.world.size > 1:
            raise StokerError(f"{self.world.size} processes train one run: only one can, for now")
        self.device = device.pick(self.world)
        self.precision = resolve_precision(precision, self.device)
        self.model = model.to(self.device)
        self.model.train()
        self.optimizers = _build_optimizers(self.model, optimizer)
        self.steps_done = 0
        self.samples_done = 0
        self._loss = loss
        self._inputs = inputs
        self._schedule = schedule
        self._clip_norm = clip_norm
        self._micro_batch = micro_batch
        self._checkpoint_every = Duration.parse(checkpoint_every)
        self._keep = keep_checkpoints
        self._best = best
        self._built = {name: state.hyperparameters(o) for name, o in self.optimizers.items()}
        self._weight: Weight = 0.0
        self._loader: Loader | None = None
        self._total = 0
        self._rate = Rate()
        self._saved_at = time.monotonic()
        self._saved_step: int | None = None
        self._random: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
        run.take_over_steps()
        self._restore()

    # -- the loop ---------------------------------------------------------------------------

    def loader(
        self,
        dataset: Any,
        *,
        batch_size: int,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        shuffle: bool = True,
    ) -> Loader:
        """Global batches of a map-style dataset, in an order that is the run's seed's alone.

        Args:
            batch_size: samples of a global batch, over all ranks.
            workers: processes that load samples; any number gives the same batches.
        """
        return Loader(
            dataset, batch_size=batch_size, world=self.world, seed=self.run.seed,
            workers=workers, collate=collate, shuffle=shuffle,
        )  # fmt: skip

    def steps(
        self,
        loader: Loader,
        *,
        epochs: float | None = None,
        max_steps: Duration | str | int | None = None,
    ) -> Iterator[Any]:
        """The batches that are left, one a step, from where the run was; the body of the loop is the step.

        Checkpoints are taken between steps, and after the last one. Told to stop (SIGTERM,
        Ctrl-C), it takes one and raises Stopped, which ends the script. The epochs are of
        one endless order, so a batch may span two and every step has a full batch.
        """
        if (epochs is None) == (max_steps is None):
            raise ValueError("give steps() either epochs or max_steps")
        self._loader = loader
        duration = Duration.parse(max_steps) if epochs is None else Duration(float(epochs), "epoch")
        self._total = self.steps_in(duration, loader)
        self.run.event("plan", total_steps=self._total, samples_per_step=loader.batch_size)
        with self.run.stop.deferred(), ProgressDisplay(self.run.directory.id, self._reading):
            yield from self._remaining(loader)
        self.run.stop.raise_if_requested()

    def _remaining(self, loader: Loader) -> Iterator[Any]:
        source = loader.batches(self.samples_done)
        self._begin_attempt()
        while self.steps_done < self._total:
            batch = next(source)
            self.run.step = self.steps_done + 1
            yield batch
            self._rate.step()
            self.steps_done += 1
            self.samples_done += loader.batch_size
            if self._checkpoint_due() or self.run.stop.requested:
                self.checkpoint()
            self.run.stop.raise_if_requested()
        self.run.step = self.steps_done
        self.checkpoint()

    def _begin_attempt(self) -> None:
        if self._random is not None:  # last of all, so that nothing before the next step draws from it
            random_state.restore(*self._random)
            self._random = None
        self._saved_at = time.monotonic()
        self._rate.restart()

    def every(self, duration: Duration | str | int) -> bool:
        """Whether the step under way completes another such duration, e.g. `"1ep"`, `100`, `"1000000tok"`."""
        parsed = Duration.parse(duration)
        if parsed.seconds is not None:
            raise ValueError(
                f"every({str(parsed)!r}) depends on the machine's speed: count in steps, epochs or tokens"
            )
        assert self._loader is not None, "every() is asked within the loop of steps()"
        return self._completes(parsed, self.steps_done, self.samples_done)

    @property
    def last(self) -> bool:
        """Whether the step under way is the last one."""
        return self.steps_done + 1 >= self._total

    @staticmethod
    def steps_in(duration: Duration, loader: Loader) -> int:
        """How many steps a duration is, rounded up. Raises ValueError for one by the clock, or in
        tokens where the dataset does not count any."""
        if duration.unit == "step":
            return int(duration.count)
        per_sample = {"sample": 1.0, "epoch": 1 / loader.samples_per_epoch, "token": loader.tokens_per_sample}
        unit = per_sample.get(duration.unit)
        if unit is None:
            raise ValueError(f"{duration} cannot be counted here: {_why_uncountable(duration)}")
        # Rounded down by a hair first: 3 epochs of 10 samples are 30, not 30.000000000000004.
        return max(1, math.ceil(duration.count / unit / loader.batch_size - 1e-9))

    def _completes(self, every: Duration, steps: int, samples: int) -> bool:
        """Whether the step that begins at this position completes another such duration."""
        assert self._loader is not None
        before = self._amount(every.unit, steps, samples)
        after = self._amount(every.unit, steps + 1, samples + self._loader.batch_size)
        return _whole(after / every.count) > _whole(before / every.count)

    def _amount(self, unit: str, steps: int, samples: int) -> float:
        assert self._loader is not None
        if unit == "step":
            return steps
        if unit == "sample":
            return samples
        if unit == "epoch":
            return samples / self._loader.samples_per_epoch
        if self._loader.tokens_per_sample is None:
            raise ValueError(_why_uncountable(Duration(1, unit)))
        return samples * self._loader.tokens_per_sample

    # -- a step -----------------------------------------------------------------------------

    def step(self, batch: Any) -> torch.Tensor:
        """One optimizer step on a global batch; returns its mean loss, a scalar tensor on the device."""
        assert self._loss is not None, "give Trainer a loss, or use micro, backward and update"
        total: torch.Tensor | None = None
        weight: Weight = 0.0
        for part in self.micro(batch):
            with autocast(self.precision, self.device):
                part_sum, part_weight = self._loss(self.forward(part), part)
            self.backward(part_sum, part_weight)
            total = part_sum.detach() if total is None else total + part_sum.detach()
            weight = weight + part_weight
        self.update()
        assert total is not None, "the batch was empty"
        return total / weight

    def micro(self, batch: Any) -> Iterator[Any]:
        """The batch on the device, in micro-batches."""
        return batches.split(batches.to_device(batch, self.device), self._micro_batch)

    def forward(self, batch: Any) -> Any:
        """The model's output for a batch."""
        inputs = self._inputs(batch)
        with autocast(self.precision, self.device):
            return self.model(**inputs) if isinstance(inputs, Mapping) else self.model(*inputs)

    def backward(self, loss_sum: torch.Tensor, weight: Weight) -> None:
        """Add the gradient of a summed loss; `update` divides by the weights added up."""
        torch.autograd.backward(loss_sum)
        self._weight = self._weight + weight

    def update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Step an optimizer (by default the only one) with the gradients added up, and clear them all."""
        chosen = self.optimizer if optimizer is None else optimizer
        parameters = [p for group in chosen.param_groups for p in group["params"]]
        gradients.divide(parameters, self._weight)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        if self._schedule is not None:
            for group in chosen.param_groups:
                group["lr"] = group["initial_lr"] * self._schedule(self.steps_done, self._total)
        chosen.step()
        self.model.zero_grad(set_to_none=True)
        self._weight = 0.0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The only optimizer. Raises ValueError where there are several."""
        if len(self.optimizers) != 1:
            raise ValueError(f"there are several optimizers: name one of {', '.join(self.optimizers)}")
        return next(iter(self.optimizers.values()))

    @property
    def lr(self) -> float:
        """The learning rate of the first optimizer's first group."""
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    @property
    def rate(self) -> float | None:
        """Tokens (where the dataset counts them) or samples a second, over the last steps."""
        steps = self._rate.steps_per_second
        if steps is None or self._loader is None:
            return None
        return steps * self._loader.batch_size * (self._loader.tokens_per_sample or 1.0)

    @torch.no_grad()
    def evaluate(
        self, dataset: Any, *, batch_size: int, collate: Callable[[list[Any]], Any] | None = None
    ) -> float:
        """The mean loss over a dataset, each sample once, with the model in evaluation mode."""
        assert self._loss is not None, "evaluate() needs the Trainer's loss"
        total = torch.zeros((), dtype=torch.float64)
        weight = torch.zeros((), dtype=torch.float64)
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in evaluation_batches(dataset, batch_size, self.world, collate):
                on_device = batches.to_device(batch, self.device)
                with autocast(self.precision, self.device):
                    batch_sum, batch_weight = self._loss(self.forward(on_device), on_device)
                total += batch_sum.double().cpu()
                weight += torch.as_tensor(batch_weight).double().cpu()
        finally:
            self.model.train(was_training)
            self._rate.restart()
        return float(total / weight)

    # -- checkpoints ------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Save everything that a resumed run needs, at a step boundary. Raises OSError (a full disk)."""
        if self._saved_step == self.steps_done:
            return
        self.run.flush()  # what was logged up to here must outlive what is saved here
        tensors, values = self._capture()
        folder = self.run.directory.checkpoints
        saved = store.save(
            folder, tensors, values, step=self.steps_done, samples=self.samples_done, metrics=self.run.latest
        )
        relative = str(saved.path.relative_to(self.run.directory.path))
        self.run.event("checkpoint", step=saved.step, path=relative, bytes=saved.bytes)
        goal = self.run.goals.get(self._best) or guess_goal(self._best)
        manifest.prune(folder, self._keep, manifest.best(folder, self._best, goal) if goal else None)
        self._saved_at, self._saved_step = time.monotonic(), self.steps_done
        self._rate.restart()
        log.debug("checkpoint of step %d, %d bytes", saved.step, saved.bytes)

    def _checkpoint_due(self) -> bool:
        every = self._checkpoint_every
        if every.seconds is not None:
            return time.monotonic() - self._saved_at >= every.seconds
        assert self._loader is not None
        return self._completes(every, self.steps_done - 1, self.samples_done - self._loader.batch_size)

    def _capture(self) -> tuple[store.Tensors, dict[str, Any]]:
        tensors, values = state.capture(self.model, self.optimizers, self._built)
        random_tensors, random_values = random_state.capture()
        tensors.update({f"random.{key}": t for key, t in random_tensors.items()})
        position = {"step": self.steps_done, "samples": self.samples_done}
        return tensors, {**values, "position": position, "random": random_values}

    def _restore(self) -> None:
        found, passed_over = manifest.newest(self.run.directory.checkpoints)
        for reason in passed_over:
            log.warning("passed over checkpoint %s", reason)
        if found is not None:
            self._load(found)
            log.info("resumed %s from step %d", self.run.directory.id, self.steps_done)
        if self.run.continued:
            self.run.event("resumed", step=self.steps_done, passed_over=passed_over)
            self.run.step = self.steps_done

    def _load(self, checkpoint: manifest.Checkpoint) -> None:
        others, values = state.load(checkpoint, self.model, self.optimizers, self._built)
        self.steps_done, self.samples_done = values["position"]["step"], values["position"]["samples"]
        self._saved_step = self.steps_done
        self._random = (state.inside(others, "random."), values["random"])

    def _reading(self) -> Reading:
        steps = self._rate.steps_per_second
        tokens = self._loader is not None and self._loader.tokens_per_sample is not None
        return Reading(
            step=self.steps_done,
            total=self._total,
            loss=self.run.latest.get("loss"),
            rate=self.rate,
            unit="tok" if tokens else "samples",
            seconds_left=(self._total - self.steps_done) / steps if steps else None,
        )


def _build_optimizers(
    model: torch.nn.Module, factories: OptimizerFactory | Mapping[str, OptimizerFactory]
) -> dict[str, torch.optim.Optimizer]:
    if not isinstance(factories, Mapping):
        built = {"main": factories(_trainable(model))}
    else:
        built = {name: make(_trainable(model.get_submodule(name))) for name, make in factories.items()}
    for optimizer in built.values():
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    return built


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no parameter to train: every one has requires_grad=False"
        )
    return parameters


def _whole(ratio: float) -> int:
    """Rounded down, after a hair up: 0.3 epochs are three times 0.1, which floats do not say."""
    return math.floor(ratio + 1e-9)


def _why_uncountable(duration: Duration) -> str:
    if duration.unit == "token":
        return "the dataset does not say how many tokens a sample has; count in steps or epochs"
    return "it is by the clock, which differs from machine to machine; count in steps or epochs"
