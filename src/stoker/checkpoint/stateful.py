"""A script's own state that is saved and restored with the rest.

It is any object with `state_dict()` and `load_state_dict()`, such as torch's schedulers, optimizers and
modules (`Stateful` in torch.distributed.checkpoint). State that is the same on all ranks is saved once, and
restored on any number of them; state that differs is saved per rank.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash
from stoker import distributed
from stoker.checkpoint import store, trees
from stoker.checkpoint.manifest import Checkpoint
from stoker.checkpoint.store import Tensors
from stoker.errors import BadInput, StokerError
from stoker.world import World
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim.lr_scheduler import LRScheduler

log = logging.getLogger("stoker")

_LIBRARIES = ("torch", "torchao", "bitsandbytes", "transformers", "deepspeed", "stoker")
"""Of which the optimizers' state is known to be in `state`."""
PREFIX = "registered"
"""Prefix of its tensors' names in a checkpoint."""


class Registered:
    """The objects that a script has registered, by name.

    Args:
        world: the ranks; each registers its own objects.
        device: where tensors are restored that were not on the CPU.
        optimizers: their learning rates are restored after a scheduler's creation, which resets them.
    """

    def __init__(
        self, world: World, device: torch.device, optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> None:
        self._world, self._device, self._optimizers = world, device, optimizers
        self._objects: dict[str, Stateful] = {}
        self._checkpoint: Checkpoint | None = None
        self._held: dict[str, Any] = {}
        self._groups: dict[str, list[dict[str, Any]]] = {}
        self._restored: dict[str, str] = {}
        self._warned = False

    def schedulers(self, objects: Mapping[str, Stateful]) -> dict[str, LRScheduler]:
        """Those of the objects that set the learning rates of the Trainer's optimizers."""
        ours = list(self._scheduled().values())
        return {n: s for n, s in objects.items() if isinstance(s, LRScheduler) and s.optimizer in ours}

    def _scheduled(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers as schedulers take them: of ZeRO's, what it wraps."""
        return {name: getattr(made, "optimizer", made) for name, made in self._optimizers.items()}

    def add(self, objects: Mapping[str, Stateful], *, whole: bool = True) -> None:
        """Save these with every checkpoint from now on, and restore them from the one that was restored.

        Args:
            whole: whether all of that checkpoint was restored.

        Raises BadInput for objects that cannot be saved.
        """
        follow = {n: s for n, s in self.schedulers(objects).items() if whole and _began(s) == _remembered(s)}
        for name, given in objects.items():
            if name in self._objects:
                raise BadInput(f"{name} is already registered: give each state its own name")
            check(name, given)
        self._objects.update(objects)
        if self._checkpoint is None:
            return
        found = [name for name in objects if self._put(name)]
        for name, groups in self._groups.items() if found else ():
            now = self._optimizers[name].param_groups[: len(groups)]  # the script may have added others since
            for group, was in zip(now, groups, strict=True):
                group.update(copy.deepcopy(was))
        if self.schedulers(objects).keys() - found:  # it starts from scratch, with its own rates
            self._groups = self._groups_now()
        for name, scheduler in follow.items() if self._world.rank == 0 else ():
            now, began = _began(scheduler), _remembered(scheduler)
            if began != now:  # the config has changed, and the scheduler's state has the old rate
                log.warning(
                    "the learning rate is %s now, but %s continues from %s, the rate in its state",
                    now, name, began,
                )  # fmt: skip

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        """This rank's tensors by their checkpoint names, and the values of all ranks. All ranks call it."""
        taken = {name: _apart(name, given) for name, given in self._objects.items()}
        if self._world.size > 1:
            taken = {n: (v, {at: t.cpu() for at, t in tensors.items()}) for n, (v, tensors) in taken.items()}
        sums = {n: {at: _sum(t) for at, t in tensors.items()} for n, (_, tensors) in taken.items()}
        parts = distributed.gathered({n: (values, sums[n]) for n, (values, _) in taken.items()})
        known = list(dict.fromkeys(name for part in parts for name in part))
        joined = {name: _joined([part.get(name) for part in parts]) for name in known}
        found: Tensors = {}
        for name, (_, tensors) in taken.items():
            prefix = _prefix(name, None if "all" in joined[name] else self._world.rank)
            found.update({f"{prefix}{at}": tensor for at, tensor in tensors.items()})
        return found, joined

    def restore(self, checkpoint: Checkpoint, held: Mapping[str, Any]) -> None:
        """Restore what is registered now, and what will be registered before training begins.

        Args:
            held: the part of a checkpoint's values from `capture`.
        """
        again = self._checkpoint is not None  # before training has begun
        self._checkpoint, self._held = checkpoint, dict(held)
        self._groups = self._groups_now()
        for name in self._objects:
            if not again or name in self._held:
                self._put(name)

    def changed(self) -> list[str]:
        """What has another state than was restored, before training: objects, and rates of the optimizers."""
        found = [name for name, was in self._restored.items() if self._fingerprint(name) != was]
        for name, groups in self._groups.items():
            prefix = "optimizer" if len(self._groups) == 1 else name
            pairs = zip(groups, self._optimizers[name].param_groups, strict=False)  # some may have been added
            keys = {key: None for was, now in pairs for key in was if was[key] != now.get(key)}
            found += [f"{prefix}.{key}" for key in keys]
        return found

    def _fingerprint(self, name: str) -> str:
        """Of this rank's state of an object."""
        values, tensors = _apart(name, self._objects[name])
        return repr((values, {at: _sum(t) for at, t in tensors.items()}))  # in which NaN equals NaN

    def _groups_now(self) -> dict[str, list[dict[str, Any]]]:
        return {
            name: [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in made.param_groups]
            for name, made in self._optimizers.items()
        }

    def begin(self) -> None:
        """Training begins: later registered objects start fresh.

        Warns of saved states that were not restored, and of schedulers that will not be saved.
        """
        lost = [name for name in self._held if name not in self._objects]
        if lost and self._world.rank == 0:
            log.warning(
                "the checkpoint has state for %s, which is no longer registered: the next one will not",
                ", ".join(lost),
            )
        self._checkpoint, self._held, self._groups, self._restored = None, {}, {}, {}
        self._warn_of_schedulers()
        self._warn_of_more_state()

    def _warn_of_more_state(self) -> None:
        """Warn of optimizers whose `state_dict` is their own, or that have another one in them."""
        for name, optimizer in self._optimizers.items() if self._world.rank == 0 else ():
            at = "trainer.optimizer" if len(self._optimizers) == 1 else f"trainer.optimizers[{name!r}]"
            if type(optimizer).__module__.partition(".")[0] in _LIBRARIES:
                continue
            of_its_own = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
            apart = {at: optimizer} if of_its_own else _within(optimizer, at)
            known = {id(given) for given in self._objects.values()}
            lacking = [place for place, one in apart.items() if id(one) not in known]
            if lacking:
                log.warning(
                    "%s has more state than its attribute `state`, which is what checkpoints have: before "
                    "the loop, add trainer.register_for_checkpointing(%s=%s)",
                    type(optimizer).__name__, lacking[0].rpartition(".")[2].partition("[")[0], lacking[0],
                )  # fmt: skip

    def _warn_of_schedulers(self) -> None:
        """Warn, once, of an optimizer with one of torch's schedulers when none of its own is registered."""
        without = [
            name
            for name, optimizer in self._scheduled().items()
            if hasattr(optimizer.step, "_wrapped_by_lr_sched")
            and not any(_is_for(given, optimizer) for given in self._objects.values())
        ]
        if without and not self._warned and self._world.rank == 0:
            self._warned = True
            log.warning(
                "%s has a learning rate scheduler that is not registered: no checkpoint has its state, and a "
                "resumed run would train with other rates; before the loop, add "
                "trainer.register_for_checkpointing(scheduler=scheduler)",
                "the optimizer" if len(self._optimizers) == 1 else f"the optimizer of {', '.join(without)}",
            )  # fmt: skip

    def _put(self, name: str) -> bool:
        """Whether the checkpoint has a state for it."""
        assert self._checkpoint is not None
        held = self._held.get(name)
        if held is None:
            if self._world.rank == 0:
                log.warning("the checkpoint has no state for %s, which starts from scratch", name)
            return False
        rank = None if "all" in held else self._world.rank
        if rank == 0 and held["of"] != self._world.size:
            log.warning(
                "the state of %s differed between the %d ranks, and now there are %d: ranks that existed "
                "before get their own state, others start from scratch", name, held["of"], self._world.size,
            )  # fmt: skip
        if rank is not None and str(rank) not in held["ranks"]:
            return False
        values = held["all"] if rank is None else held["ranks"][str(rank)]
        tensors = _read(self._checkpoint, values, _prefix(name, rank), self._device)
        self._objects[name].load_state_dict(trees.together(values, tensors))
        self._restored[name] = self._fingerprint(name)
        return True


def _is_for(given: object, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an object is a scheduler of an optimizer, or has one in an attribute."""
    held = (given, *getattr(given, "__dict__", {}).values())
    return any(getattr(one, "optimizer", None) is optimizer for one in held)


def _within(optimizer: torch.optim.Optimizer, at: str) -> dict[str, torch.optim.Optimizer]:
    """The optimizers in its attributes that have a state of their own, by where they are."""
    return {
        f"{at}.{name}": held
        for name, held in vars(optimizer).items()
        if isinstance(held, torch.optim.Optimizer) and held.state is not optimizer.state
    }


def _began(scheduler: LRScheduler) -> list[Any]:
    """The learning rates that a scheduler's optimizer began with."""
    return [group.get("initial_lr") for group in scheduler.optimizer.param_groups]


def _remembered(scheduler: LRScheduler) -> list[Any]:
    """The same, as the scheduler remembers them."""
    return list(getattr(scheduler, "base_lrs", _began(scheduler)))


class _Extra:
    """A module's extra state, as in torch: `get_extra_state` and `set_extra_state`."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.state_dict, self.load_state_dict = module.get_extra_state, module.set_extra_state


def extra(model: torch.nn.Module) -> dict[str, Stateful]:
    """The extra states of a model's modules, by their names in its `state_dict()`."""
    none = torch.nn.Module.get_extra_state
    having = {name: m for name, m in model.named_modules() if type(m).get_extra_state is not none}
    return {f"{name}._extra_state".removeprefix("."): _Extra(module) for name, module in having.items()}


def check(name: str, given: object) -> None:
    """Raises BadInput for an object that a checkpoint cannot hold."""
    if isinstance(given, type) or not isinstance(given, Stateful):
        raise BadInput(
            f"{name} is {'the class' if isinstance(given, type) else 'an object of type'} "
            f"{getattr(given, '__name__', type(given).__name__)}: it must have state_dict(), which returns "
            "the state to restore, and load_state_dict(state), which restores it"
        )
    try:
        trees.apart(given.state_dict())
    except trees.Unsavable as error:
        raise BadInput(_refusal(name, error)) from None


def _apart(name: str, given: Stateful) -> tuple[Any, Tensors]:
    """Raises StokerError for a value that was added to a state after it was registered."""
    try:
        return trees.apart(given.state_dict())
    except trees.Unsavable as error:
        raise StokerError(_refusal(name, error)) from None


def _refusal(name: str, error: trees.Unsavable) -> str:
    return (
        f"the state of {name} has {error}, but a checkpoint can hold only {trees.ALLOWED}: leave it out of "
        "state_dict(), and recreate it in load_state_dict()"
    )


def _joined(of_ranks: Sequence[tuple[Any, dict[str, str]] | None]) -> dict[str, Any]:
    """A single state if it is bit-identical on all ranks; otherwise the state of each rank."""
    if all(one == of_ranks[0] for one in of_ranks) and of_ranks[0] is not None:
        return {"all": of_ranks[0][0]}
    own = {str(rank): one[0] for rank, one in enumerate(of_ranks) if one is not None}
    return {"ranks": own, "of": len(of_ranks)}


def _prefix(name: str, rank: int | None) -> str:
    """The prefix of a state's tensors; with a rank if each rank has its own."""
    return f"{PREFIX}.{name}" if rank is None else f"{PREFIX}[{rank}].{name}"


def _sum(tensor: torch.Tensor) -> str:
    flat = tensor.cpu().contiguous().reshape(-1)
    return xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy().data) if flat.numel() else ""


def _read(checkpoint: Checkpoint, values: Any, prefix: str, device: torch.device) -> Tensors:
    """The tensors of a state by their places, on their original devices."""
    found = list(trees.leaves(values))
    into = {
        f"{prefix}{leaf['at']}": torch.empty(leaf["shape"], dtype=getattr(torch, leaf["dtype"]))
        for _, leaf in found
    }
    if into:
        store.load_tensors(checkpoint, into)
    on = {leaf["at"]: torch.device("cpu") if leaf.get("on", "cpu") == "cpu" else device for _, leaf in found}
    return {at: into[f"{prefix}{at}"].to(where) for at, where in on.items()}
