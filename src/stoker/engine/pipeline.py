"""Pipeline parallelism on torch.distributed.pipelining: GPipe, 1F1B and interleaved 1F1B.

Huang et al. 2019 (arXiv:1811.06965); Narayanan et al. 2021 (arXiv:2104.04473). Every rank of a
pipeline reads the same share of the batch; one tensor flows between stages. Schedules receive only
the numbers of micro-batches, and each stage looks up what it needs of a micro-batch by its number.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from stoker import distributed, tensors
from stoker.engine import batches, blocks, device, gradients, imagined, modes, parallel, stages
from stoker.engine.agreement import Agreement, Weight
from stoker.engine.replicas import Replicas
from stoker.engine.settings import Training
from stoker.engine.step import (
    Load,
    OptimizerFactory,
    Setting,
    apply,
    average_statistics,
    build_optimizers,
    named_trainable,
    parameters_of,
    running_statistics,
)
from stoker.engine.trained import Trained
from stoker.errors import BadInput
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B,
}  # fmt: skip

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class PipelineStep:
    """A model split into stages; see `Step`."""

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        setting: Setting,
        make: OptimizerFactory | Mapping[str, OptimizerFactory],
        load: Load,
    ) -> None:
        if isinstance(make, Mapping):
            raise BadInput("parallel=pipeline takes one optimizer for the model, not one per submodule")
        self._setting, self._mesh = setting, setting.mesh
        self._ranks = self._mesh.size("stage")
        self._count = self._ranks * training.pipeline.stages_of_a_rank
        made = stages.cut(model, self._count)
        self._held = list(range(self._mesh.stage, self._count, self._ranks))
        self.model = stages.take(model, made, self._held)
        device.move(self.model, self._mesh.device)
        planned = self._mesh.world.planned > 0  # the other ranks do not exist: this one has their stages too
        load(model if planned else self.model, self._mesh.device, "")
        known = [
            _Stage(stages.take(model, made, [n]), n, self._count, made.prefix, self)
            for n in (range(self._count) if planned else self._held)
        ]
        self._stages = [stage for stage in known if stage.index in self._held]
        self._own = {stage.index: stage for stage in self._stages}
        self._imagined = known if planned else []
        del model
        self._replicas: dict[int, Replicas] = {}
        if self._mesh.data.size > 1:
            for stage in self._stages:
                self._share_data(stage, training)
        self._trained = Trained(self.model)
        self.optimizers = build_optimizers(self.model, make)
        self.norm: torch.Tensor | float | None = None
        self._schedule_class = _SCHEDULES[training.pipeline.schedule]
        self._schedules: dict[tuple[int, Shapes], Any] = {}
        self._pipelined: list[PipelineStage] = []
        self._statistics = running_statistics(self.model) if self._mesh.data.size > 1 else []
        self.parts: Sequence[Any] = ()
        """The micro-batches of the current step."""
        self._collected: list[tuple[torch.Tensor, Weight]] = []

    @property
    def is_last(self) -> bool:
        """Whether this rank has the output and the loss."""
        return self._held[-1] == self._count - 1

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """See `Step`."""
        return contextlib.nullcontext() if self._stages[0].casts else self._setting.autocast()

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Step`."""
        return named_trainable(self.model)

    def publish(self) -> None:
        """See `Step`: the forward pass uses the weights themselves."""

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Step`."""
        return tensors.whole(tensor.detach())

    def gradients(self, parts: Sequence[Any], agreement: Agreement) -> None:
        """See `Step`. Raises BadInput if the micro-batches differ in shape."""
        shapes = [_shapes(part) for part in parts]
        if len(set(shapes)) > 1:
            raise BadInput(
                "parallel=pipeline needs micro-batches of equal shape: choose micro_batch so that it divides "
                f"a rank's share of the batch (currently {[s[0][0][0] for s in shapes if s]} samples)"
            )
        self.parts, self._collected = parts, []
        self._follow_trained()
        schedule = self._schedule(len(parts), shapes[0])
        numbers = torch.arange(len(parts))
        schedule.step(
            *([numbers] if self._held[0] == 0 else []),
            number=numbers,
            target=numbers if self.is_last else None,
            return_outputs=False,
        )
        loss_sum: torch.Tensor = torch.zeros((), device=self._mesh.device)
        weight: Weight = 0.0
        for part_sum, part_weight in self._collected:
            loss_sum, weight = loss_sum + part_sum, weight + part_weight
        agreement.start(loss_sum, weight)
        self.parts = ()

    @torch.no_grad()
    def forward(self, batch: Any) -> Any:
        """See `Step`: runs the stages in turn; the output on ranks of the last stage, else None."""
        self.parts = (batch,)
        output = None
        for stage in self._stages:
            received = None if stage.index == 0 else self._receive(stage.index - 1)
            output = stage(received, torch.zeros(1, dtype=torch.long))
            stage.seen = (received, output)
            if stage.index < self._count - 1:
                self._send(output, stage.index + 1)
        self.parts = ()
        return self._stages[-1].whole(output) if self.is_last else None

    def update(self, optimizers: Sequence[torch.optim.Optimizer], weight: torch.Tensor) -> bool:
        """See `Step`."""
        found = gradients.of(parameters_of(optimizers))
        stepped, self.norm = apply(found, optimizers, weight, self._setting)
        self.clear()
        average_statistics(self._statistics, self._mesh)
        return stepped

    def clear(self) -> None:
        """See `Step`."""
        self.model.zero_grad(set_to_none=True)

    def _follow_trained(self) -> None:
        """Fit what the schedules call to what is trained now. Nothing is sent: other stages may stay."""
        if not self._trained.changed():
            return
        for made in self._pipelined:  # what it has called so far goes before there is another
            made.submod = self._own[made.stage_index]
        for replicas in self._replicas.values():
            replicas.begin()
        for made in self._pipelined:
            made.submod = self._called(made.stage_index)

    def _called(self, index: int) -> nn.Module:
        return self._replicas[index].called if index in self._replicas else self._own[index]

    def _loss(self, output: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        loss_sum, weight = self._setting.loss_of(self._stages[-1].whole(output), self.part(number))
        self._collected.append((loss_sum.detach(), weight))
        return loss_sum * self._setting.scale.factor

    def _schedule(self, count: int, shapes: Shapes) -> Any:
        """The schedule for this many micro-batches of these shapes; what flows is measured once."""
        if (count, shapes) not in self._schedules:
            self._measure()
            options = {"loss_fn": self._loss, "scale_grads": False}
            made = [self._pipeline_stage(stage) for stage in self._stages]
            several = self._schedule_class is ScheduleInterleaved1F1B
            self._schedules[count, shapes] = self._schedule_class(
                made if several else made[0], count, **options
            )
        return self._schedules[count, shapes]

    def _measure(self) -> None:
        """Send the first micro-batch through the stages to learn the shapes of what they exchange."""
        parts = self.parts
        with modes.evaluating(self.model):  # no random numbers, no running statistics
            if self._imagined:
                self._imagine()
            else:
                self.forward(parts[0])
        self.parts = parts

    @torch.no_grad()
    def _imagine(self) -> None:
        """Like `forward`, in a plan: runs the stages of the imaginary ranks, which send nothing."""
        received = None
        with imagined.unfollowed():  # their weights are not this rank's, and must not be tracked
            for stage in self._imagined:
                stage.seen = (received, stage(received, torch.zeros(1, dtype=torch.long)))
                received = stage.seen[1]

    def part(self, number: torch.Tensor) -> Any:
        """A micro-batch of the current step; in a plan, which has no numbers, any of them."""
        return self.parts[0] if self._imagined else self.parts[int(number)]

    def _pipeline_stage(self, stage: _Stage) -> PipelineStage:
        received, output = stage.seen
        example = torch.zeros(1, dtype=torch.long) if received is None else _example(received)
        stage.seen = (None, None)
        made = PipelineStage(
            self._called(stage.index), stage.index, self._count, self._mesh.device,
            input_args=(example,), output_args=(_example(output),), group=self._mesh.group("stage"),
        )  # fmt: skip
        self._pipelined.append(made)
        return made

    def _share_data(self, stage: _Stage, training: Training) -> None:
        """Lay a stage out over the ranks that share the data."""
        if training.pipeline.data == "ddp":
            build = functools.partial(parallel.data_parallel, stage, training, self._mesh)
            self._replicas[stage.index] = Replicas(stage, build, self._mesh.group("replicate"))
        else:
            stage.casts = parallel.shard(stage, blocks.find(stage, training.blocks), training, self._setting)

    def _send(self, tensor: torch.Tensor, stage: int) -> None:
        if stage % self._ranks == self._mesh.stage:
            self._kept = tensor
            return
        group = self._mesh.group("stage")
        distributed.send(tensor, dist.get_global_rank(group, stage % self._ranks), group)

    def _receive(self, stage: int) -> torch.Tensor:
        if stage % self._ranks == self._mesh.stage:
            return self._kept
        group = self._mesh.group("stage")
        source = dist.get_global_rank(group, stage % self._ranks)
        return distributed.receive(source, self._mesh.device, group)


class _Stage(nn.Module):
    """One stage, called by the schedules with the previous stage's output and the micro-batch's number."""

    def __init__(self, module: nn.Module, index: int, count: int, prefix: str, step: PipelineStep) -> None:
        super().__init__()
        self.module = module
        self.index, self.count = index, count
        self.casts = False
        self.seen: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._inner = prefix.rstrip(".").rpartition(".")[0]  # the module that holds the list of blocks
        self._step = [step]  # in a list, so that it is not registered as a submodule

    def forward(self, received: torch.Tensor | None, number: torch.Tensor) -> Any:
        step = self._step[0]
        inputs = step._setting.inputs(step.part(number))
        with step.context():
            return self._output(inputs, received)

    def _output(self, inputs: Any, received: torch.Tensor | None) -> Any:
        if isinstance(self.module, nn.Sequential):
            first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
            return self.module(first if self.index == 0 else received)
        kwargs = dict(inputs)
        if self.index > 0:
            kwargs.pop("input_ids")
            kwargs["inputs_embeds"] = received
        if self.index < self.count - 1:
            return self.module.get_submodule(self._inner)(**kwargs).last_hidden_state
        return self.module(**kwargs).logits

    def whole(self, output: Any) -> Any:
        """The last stage's tensor, in the type of the model's own output."""
        if isinstance(self.module, nn.Sequential):
            return output
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=output)


def _shapes(part: Any) -> Shapes:
    found: list[tuple[torch.Size, torch.dtype]] = []
    batches.for_each_tensor(lambda t: found.append((t.shape, t.dtype)), part)
    return tuple(found)


def _example(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return torch.empty_like(tensor, device="meta").requires_grad_()
