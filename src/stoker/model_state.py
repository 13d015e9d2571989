"""The model, its optimizers and the moving average, as a checkpoint has them.

Tensors are stored under the parameters' own names under every strategy, so a checkpoint does not depend on
the strategy that wrote it. Each rank writes and reads its parts of them. DeepSpeed partitions them in its own
way: under its stages 1 to 3, rank 0 writes them whole, and every rank reads them whole and takes what is its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from stoker import distributed
from stoker.checkpoint import manifest, state, trees
from stoker.checkpoint.store import Tensors
from stoker.engine.ema import Ema
from stoker.engine.mesh import Mesh
from stoker.engine.step import Step
from stoker.world import World

if TYPE_CHECKING:
    from stoker.engine.zero import DeepSpeedStep


class ModelState(Protocol):
    """What is saved of a step's model, its optimizers and the average. All ranks call its methods."""

    @property
    def part(self) -> tuple[int, ...]:
        """The part of the model that this rank holds: ranks with the same one hold copies."""
        ...

    def capture(self, kept: Set[str]) -> tuple[Tensors, dict[str, Any]]:
        """This rank's tensors and values; of frozen weights, only those with a name in `kept`."""
        ...

    def restore(
        self, checkpoint: manifest.Checkpoint, *, waits: bool
    ) -> tuple[Tensors, dict[str, Any], bool]:
        """Restore a checkpoint; returns its tensors and values, and False if an optimizer was left out.

        Args:
            waits: see `state.load`.
        """
        ...


def of(step: Step, mesh: Mesh, built: Mapping[str, state.Groups], ema: Ema | None) -> ModelState:
    """What is saved of a step, whose optimizers were created with the hyperparameters `built`."""
    from stoker.engine.zero import DeepSpeedStep

    if not isinstance(step, DeepSpeedStep):
        return InParts(step, mesh.world, built, ema, (mesh.stage, mesh.shard))
    alone = (mesh.world.rank,)  # DeepSpeed keeps copies the same by itself
    kind = InParts if step.stage == 0 else Whole
    return kind(step, mesh.world, built, ema, alone)


@dataclass(frozen=True)
class InParts:
    """Every rank saves and restores what it holds."""

    step: Step
    world: World
    built: Mapping[str, state.Groups]
    ema: Ema | None
    part: tuple[int, ...]

    def capture(self, kept: Set[str]) -> tuple[Tensors, dict[str, Any]]:
        """See `ModelState`."""
        tensors, values = state.capture(self.step.model, self.step.optimizers, self.built, kept)
        if self.ema is not None:
            tensors.update(_averaged(self.ema.values))
        return tensors, values

    def restore(
        self, checkpoint: manifest.Checkpoint, *, waits: bool
    ) -> tuple[Tensors, dict[str, Any], bool]:
        """See `ModelState`."""
        model = self.step.model
        own = frozenset(n for n, _ in (*model.named_parameters(), *model.named_buffers()))
        everywhere = frozenset(n for names in distributed.gathered(sorted(own)) for n in names)
        tensors, values, whole = state.load(
            checkpoint, model, self.step.optimizers, self.built, self.world, everywhere - own, waits=waits
        )
        if self.ema is not None:
            self.ema.restore(state.inside(tensors, "ema."))
        return tensors, values, whole


@dataclass(frozen=True)
class Whole:
    """Rank 0 saves all that DeepSpeed has partitioned; every rank restores its partition of it."""

    step: DeepSpeedStep
    world: World
    built: Mapping[str, state.Groups]
    ema: Ema | None
    part: tuple[int, ...]

    def capture(self, kept: Set[str]) -> tuple[Tensors, dict[str, Any]]:
        """See `ModelState`."""
        step, model = self.step, self.step.model
        parameters, held, others = step.capture()
        buffers = state.saved_buffers(model)
        frozen = {n: step.whole(p) for n, p in model.named_parameters() if n in kept}
        tensors = {f"model.{n}": t for n, t in {**parameters, **frozen, **buffers}.items()}
        tensors.update({f"optimizer.main.{n}": t for n, t in held.items()})
        kind, groups = state.kind_of(step.optimizers["main"]), step.groups()
        single = {name: trees.apart(value)[0] for name, value in others.items()}
        main = {"kind": kind, "state": single, "groups": groups}
        if self.ema is not None:
            with self.ema.in_place():
                tensors.update(_averaged(step.whole_weights()))
        values = {"optimizers": {"main": main}, "built": dict(self.built)}
        return (tensors if self.world.rank == 0 else {}), values

    def restore(
        self, checkpoint: manifest.Checkpoint, *, waits: bool
    ) -> tuple[Tensors, dict[str, Any], bool]:
        """See `ModelState`."""
        step = self.step
        tensors, values = state.load_whole(checkpoint, self.world)
        state.compare_optimizers(values, step.optimizers)
        single = {n: trees.together(v, {}) for n, v in values["optimizers"]["main"]["state"].items()}
        step.restore_state({**single, **state.inside(tensors, "optimizer.main.")})
        self._restore_weights(tensors)
        saved, then = values["optimizers"]["main"]["groups"], values["built"]["main"]
        names = [group["params"] for group in step.groups()]
        state.restore_groups(step.optimizers["main"], names, saved, self.built["main"], then, self.world)
        return tensors, values, True

    def _restore_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The average first: it is taken from the weights, which have its values until then."""
        step, model = self.step, self.step.model
        averaged = state.inside(tensors, "ema.")
        if self.ema is not None and averaged:
            step.restore_weights(averaged)
            self.ema.take()
        step.restore_weights(state.inside(tensors, "model."))
        if self.ema is not None and not averaged:
            self.ema.take()
        state.fit_buffers(model, {name: (t.shape, t.dtype) for name, t in tensors.items()})
        for name, buffer in state.saved_buffers(model).items():
            buffer.copy_(tensors[f"model.{name}"])
        for name, p in model.named_parameters():
            if not p.requires_grad and f"model.{name}" in tensors:
                step.use(p, tensors[f"model.{name}"])


def _averaged(weights: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"ema.{name}": tensor for name, tensor in weights.items()}
