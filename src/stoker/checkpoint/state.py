"""Everything that must be restored, in one place: trainable parameters, buffers, optimizer state.

Tensors and JSON values are kept separate, so that no pickle is needed. Names are the model's own parameter
names. Frozen parameters are not saved, unless they have changed (`frozen`), since the model is built from the
same source again: a LoRA checkpoint is as small as its adapter.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

import torch
from stoker import words
from stoker.checkpoint import eight_bit, stateful, store, trees
from stoker.checkpoint.manifest import Checkpoint
from stoker.checkpoint.store import Tensors
from stoker.errors import StokerError
from stoker.tensors import local
from stoker.world import World
from torch.distributed.tensor import DTensor

log = logging.getLogger("stoker")

Groups = list[dict[str, Any]]

_NAMED = 5  # names of each kind in a message
_RATES = ("lr", "initial_lr")


def capture(
    model: torch.nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    built: Mapping[str, Groups],
    frozen: Set[str] = frozenset(),
) -> tuple[Tensors, dict[str, Any]]:
    """The state of a model and its optimizers: tensors by name, and JSON values.

    Args:
        built: the hyperparameters that the optimizers were created with, see `hyperparameters`.
        frozen: the parameters to save although they are not trained.
    """
    tensors = {f"model.{name}": t for name, t in model_tensors(model, frozen).items()}
    values: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        held, values[name] = optimizer_state(model, optimizer)
        tensors.update({f"optimizer.{name}.{key}": t for key, t in held.items()})
    return tensors, {"optimizers": values, "built": dict(built)}


def load(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    built: Mapping[str, Groups],
    world: World,
    elsewhere: frozenset[str] = frozenset(),
    *,
    waits: bool = False,
) -> tuple[Tensors, dict[str, Any], bool]:
    """Load a checkpoint into a model and its optimizers.

    Returns its other tensors, its values, and whether all of it is loaded. The other tensors do not include
    parameters that other ranks hold, other ranks' random state, and registered states (`stateful`). A
    hyperparameter that the user has changed since overrides the saved one.

    Args:
        elsewhere: names of the model's tensors that only other ranks hold.
        waits: leave out an optimizer that was given parameters after it was created, since the script may be
            about to give it these again.

    Raises:
        StokerError: the checkpoint is from a different model or different optimizers.
    """
    specs = store.shapes(checkpoint)
    of_model = {n.removeprefix("model."): shape for n, (shape, _) in specs.items() if n.startswith("model.")}
    fit_buffers(model, specs)
    model_now = {f"model.{name}": t for name, t in model_tensors(model, of_model.keys()).items()}
    _compare(
        {name: t.shape for name, t in model_now.items()},
        {f"model.{name}": shape for name, shape in of_model.items() if name not in elsewhere},
    )
    values = store.load_values(checkpoint)
    compare_optimizers(values, optimizers)
    for optimizer in optimizers.values():
        optimizer.state.clear()  # before there is memory for what is read
    others = _others(specs, model, optimizers, world, elsewhere)
    store.load_tensors(checkpoint, {**model_now, **others}, world)
    thawed = {n for n, trained in values.get("turned", {}).items() if trained}
    whole = True
    for name, optimizer in optimizers.items():
        held = inside(others, f"optimizer.{name}.")
        saved, then = values["optimizers"][name], values["built"][name]
        came = _what_came(model, optimizer, saved["groups"], len(then), thawed)
        if waits and came:
            whole = False
            continue
        _give(model, optimizer, came)
        names = _names_of_groups(model, optimizer)
        restore_groups(optimizer, names, saved["groups"], built[name], then, world, elsewhere)
        _restore_state(model, optimizer, held, saved["state"])
    return others, values, whole


def _what_came(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: Groups, made: int, thawed: Set[str]
) -> dict[int, list[str]]:
    """The parameters that an optimizer was given during training and does not have: names by group.

    They are those of whole groups that were added, and parameters that were unfrozen.

    Args:
        saved: the groups of the checkpoint.
        made: how many of them it was created with.
        thawed: names of parameters that were frozen when it was created.
    """
    parameters = dict(model.named_parameters())
    known = {name for group in _names_of_groups(model, optimizer) for name in group}
    came: dict[int, list[str]] = {}
    for number, group in enumerate(saved):
        new = [n for n in group["params"] if n in parameters and n not in known]
        if number >= max(made, len(optimizer.param_groups)):
            came[number] = new
        elif number < len(optimizer.param_groups) and (unfrozen := [n for n in new if n in thawed]):
            came[number] = unfrozen
    return came


def _give(model: torch.nn.Module, optimizer: torch.optim.Optimizer, came: Mapping[int, list[str]]) -> None:
    """Give an optimizer parameters by name, to existing groups or as new ones."""
    parameters = dict(model.named_parameters())
    for number, names in came.items():
        given = [parameters[name] for name in names]
        if number < len(optimizer.param_groups):
            optimizer.param_groups[number]["params"] += given
        else:
            optimizer.add_param_group({"params": given})


def _say_regrouped(names: list[list[str]], before: list[list[str]], built: Groups, then: Groups) -> None:
    now, was = _decayed(names, built), _decayed(before, then)
    if now and was and now != was:
        log.warning(
            "weight decay applies to different parameters than when the checkpoint was saved: to apply it to "
            "norms and biases too, as earlier versions did, set a recipe's decay_all=true"
        )


def _decayed(names: list[list[str]], made: Groups) -> set[str]:
    return {name for group, of in zip(made, names, strict=True) if group.get("weight_decay") for name in of}


def load_whole(checkpoint: Checkpoint, world: World) -> tuple[Tensors, dict[str, Any]]:
    """The tensors that `load` restores or returns, in full, and the values; each rank reads separately."""
    specs = store.shapes(checkpoint)
    tensors = {
        name: torch.empty(s, dtype=d) for name, (s, d) in specs.items() if not _is_left_out(name, world)
    }
    store.load_tensors(checkpoint, tensors)
    return tensors, store.load_values(checkpoint)


def compare_optimizers(values: Mapping[str, Any], optimizers: Mapping[str, Any]) -> None:
    """Raises StokerError if a checkpoint's optimizers have different names or kinds than these."""
    saved = {name: held.get("kind") for name, held in values["optimizers"].items()}
    now = {name: kind_of(optimizer) for name, optimizer in optimizers.items()}
    if saved.keys() != now.keys():
        raise StokerError(
            f"the checkpoint's optimizers are {', '.join(saved)}, but now they are {', '.join(now)}"
        )
    for name, kind in saved.items():
        if kind not in (None, now[name]):
            raise StokerError(
                f"the checkpoint's optimizer is {kind}, but now it is {now[name]}, whose state is different: "
                "resume with the same optimizer, or start a run with a new name from its weights"
            )


def kind_of(optimizer: Any) -> str:
    """The class of an optimizer; for one that DeepSpeed wraps, of the wrapped one."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def restore_groups(
    optimizer: torch.optim.Optimizer,
    names: list[list[str]],
    saved: Groups,
    built: Groups,
    then: Groups,
    world: World,
    elsewhere: frozenset[str] = frozenset(),
) -> None:
    """Restore hyperparameters; those that differ from the ones they were created with are the user's change.

    If the same parameters are grouped differently only because of weight decay or learning rates, each group
    keeps those that it was created with. Groups that were added during training get all their saved values.

    Args:
        names: the parameters of each group.
        saved: the groups of the checkpoint.
        built: what the groups were created with now.
        then: what they were created with when the checkpoint was saved.
        elsewhere: names of parameters that only other ranks hold.

    Raises:
        StokerError: the groups differ.
    """
    before = [[n for n in group["params"] if n not in elsewhere] for group in saved]
    left_out = {"params"}
    if [set(group) for group in names] != [set(group) for group in before]:
        left_out |= _regrouped_by(names, before, built, then)
        if world.rank == 0:
            _say_regrouped(names, before, built, then)
        saved, then = [saved[0]] * len(names), [then[0]] * len(names)
    built, then = ([*made, *({} for _ in saved[len(made) :])] for made in (built, then))
    for group, was, now, made in zip(optimizer.param_groups, saved, built, then, strict=True):
        kept = {k: v for k, v in was.items() if k not in left_out}
        if now.get("lr") != made.get("lr"):
            kept.pop("initial_lr", None)  # that of a scheduler of torch, which begins with the changed rate
        group.update({k: as_before(group.get(k), v) for k, v in kept.items()})
        changed = {k: v for k, v in now.items() if k not in left_out and v != made.get(k)}
        group.update({k: as_before(group.get(k), v) for k, v in changed.items()})


def _regrouped_by(names: list[list[str]], before: list[list[str]], built: Groups, then: Groups) -> set[str]:
    """The hyperparameters that groups differ by: weight decay, and learning rates if there are several.

    Raises StokerError if they differ by more.
    """
    by = {k for k in _RATES if any(len({g.get(k) for g in of}) > 1 for of in (built, then))}
    by.add("weight_decay")

    def others(groups: Groups) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k not in by} for group in groups]

    same = sorted(n for group in names for n in group) == sorted(n for group in before for n in group)
    uniform = all(made == others(groups)[0] for groups in (built, then) for made in others(groups))
    apart = all(len({tuple(g.get(k) for k in by) for g in of}) == len(of) for of in (built, then))
    if not (same and uniform and apart):
        raise StokerError(
            f"the checkpoint's optimizer has groups of {[len(g) for g in before]} parameters, this one of "
            f"{[len(g) for g in names]}, or with different names: the model or its optimizer has changed"
        )
    return by


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of all ranks combined: each holds the optimizer state of its own parameters."""
    first = dict(parts[0])
    first["optimizers"] = {
        name: {
            **held,
            "state": {k: v for part in parts for k, v in part["optimizers"][name]["state"].items()},
            "groups": [
                {**group, "params": _names([part["optimizers"][name]["groups"][n] for part in parts])}
                for n, group in enumerate(held["groups"])
            ],
        }
        for name, held in first["optimizers"].items()
    }
    return first


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters of one group on all ranks, each once."""
    return list(dict.fromkeys(name for group in groups for name in group["params"]))


def _others(
    specs: Mapping[str, tuple[torch.Size, torch.dtype]],
    model: torch.nn.Module,
    optimizers: Mapping[str, Any],
    world: World,
    elsewhere: frozenset[str],
) -> Tensors:
    """Target tensors for this rank's part of everything but the model's own tensors. Raises StokerError."""
    parameters = dict(model.named_parameters())
    prefixes = ("ema.", *(f"optimizer.{name}." for name in sorted(optimizers, key=len, reverse=True)))
    found: Tensors = {}
    for name, (shape, dtype) in specs.items():
        if name.startswith("model.") or _is_left_out(name, world):
            continue
        owner = _owner(name, prefixes)
        if owner is None:
            found[name] = torch.empty(shape, dtype=dtype)
        elif owner in parameters:
            found[name] = _beside_shard(parameters[owner], shape, dtype)
        elif owner not in elsewhere:
            raise StokerError(f"the checkpoint has {name}, but the model has no parameter {owner}")
    return found


def _owner(name: str, prefixes: Sequence[str]) -> str | None:
    """The parameter that a state or average tensor belongs to: `optimizer.main.NAME.key`, `ema.NAME`.

    Args:
        prefixes: the possible beginnings; the names of optimizers and parameters can contain dots.
    """
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    if prefix is None:
        return None
    return name.removeprefix(prefix) if prefix == "ema." else _parted(name.removeprefix(prefix))[0]


def _parted(name: str) -> tuple[str, str, str]:
    """Parameter, key, and place within a value, of an optimizer's state: `0.weight`, `GG`, `[1]`."""
    found = re.fullmatch(r"(.*?)\.([^.\[]+)((?:\[.*\])?)", name)
    assert found is not None, name
    return found[1], found[2], found[3]


def _is_left_out(name: str, world: World) -> bool:
    """Whether a tensor is another rank's random state, or belongs to a registered state, which reads it."""
    of_another = name.startswith("random.") and not name.startswith(f"random.{world.rank}.")
    return of_another or name.startswith((f"{stateful.PREFIX}.", f"{stateful.PREFIX}["))


def _beside_shard(parameter: torch.nn.Parameter, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor of a parameter: sharded like the parameter if their shapes agree."""
    if isinstance(parameter, DTensor) and parameter.shape == shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype)


def hyperparameters(optimizer: torch.optim.Optimizer) -> Groups:
    """An optimizer's hyperparameters, one dict per group."""
    return [{k: plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def inside(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """The tensors whose names begin with a prefix, without the prefix."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def model_tensors(model: torch.nn.Module, frozen: Set[str]) -> Tensors:
    """Trainable parameters and saved buffers by name, sharing the model's memory; tied ones once.

    Args:
        frozen: names of other parameters to include.
    """
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad or n in frozen}
    return {**tensors, **saved_buffers(model)}


def saved_buffers(model: torch.nn.Module) -> Tensors:
    """The buffers in a model's state, sharing its memory."""
    saved = model.state_dict(keep_vars=True)
    return {name: b.detach() for name, b in model.named_buffers() if name in saved}


def fit_buffers(model: torch.nn.Module, specs: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give a model's buffers the shapes they were saved with: one may have grown, or have been None.

    Args:
        specs: the shape and dtype of every tensor of a checkpoint.
    """
    for prefix, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            full_name = f"{prefix}.{name}".removeprefix(".")
            shape, dtype = specs.get(f"model.{full_name}", (None, None))
            if shape is not None and (buffer is None or buffer.shape != shape):
                beside = next(model.parameters()) if buffer is None else buffer
                setattr(module, name, torch.empty(shape, dtype=dtype, device=beside.device))


def optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Tensors, dict[str, Any]]:
    """An optimizer's state: tensors as `<parameter>.<key>`, and the rest as JSON values.

    Raises StokerError for values that a checkpoint cannot hold.
    """
    of_groups = _names_of_groups(model, optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: Tensors = {}
    scalars: dict[str, Any] = {}
    for parameter, state in cast("Mapping[torch.nn.Parameter, Any]", optimizer.state).items():
        if parameter not in names:
            raise StokerError(
                f"{type(optimizer).__name__}.state has the key {_shown(parameter)}, which is no parameter "
                "of the model, so a checkpoint has no place for it: values of no parameter belong into an "
                "optimizer's param_groups"
            )
        for key, value in state.items():
            name = f"{names[parameter]}.{key}"
            if isinstance(value, torch.Tensor) and eight_bit.is_quantised(optimizer, value):
                codes, scales = eight_bit.parts(optimizer, value)
                tensors |= {name + eight_bit.CODES: codes, name + eight_bit.SCALES: scales}
            elif isinstance(value, torch.Tensor):
                _refuse_quantised(name, value)
                tensors[name] = value
            else:
                scalars[name], inner = _apart(name, value)
                tensors.update({f"{name}{at}": tensor for at, tensor in inner.items()})
    groups = [
        {**{k: plain(v) for k, v in group.items()}, "params": of_group}
        for group, of_group in zip(optimizer.param_groups, of_groups, strict=True)
    ]
    return tensors, {"kind": kind_of(optimizer), "state": scalars, "groups": groups}


def _shown(key: object) -> str:
    return f"a tensor of shape {tuple(key.shape)}" if isinstance(key, torch.Tensor) else repr(key)


def _refuse_quantised(name: str, value: torch.Tensor) -> None:
    held = type(local(value))
    if held.__module__.startswith("torchao."):  # a copy of it would have other bits
        raise StokerError(
            f"the optimizer state {name} is a {held.__name__}, which a checkpoint cannot hold: of torchao's "
            "optimizers with small states take AdamW8bit (optimizer=adamw8bit)"
        )


def _apart(name: str, value: Any) -> tuple[Any, Tensors]:
    """An optimizer's state that is not a tensor, like `trees.apart`. Raises StokerError."""
    try:
        return trees.apart(value)
    except trees.Unsavable as error:
        raise StokerError(
            f"the optimizer state {name} has {error}, but a checkpoint can hold only {trees.ALLOWED}"
        ) from None


def _restore_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, values: Mapping[str, Any]
) -> None:
    """Restore an optimizer's state (`<parameter>.<key>`), after its groups."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for full_name, tensor in tensors.items():
        name, key, within = _parted(full_name)
        if name not in parameters:  # another rank's
            continue
        parameter = parameters[name]
        if not within:
            beside = _beside(parameter, group_of[parameter], key, tensor)
            optimizer.state[parameter][key] = eight_bit.as_made(optimizer, parameter, key, beside)
        elif within == eight_bit.CODES:
            scales = tensors[f"{name}.{key}{eight_bit.SCALES}"]
            optimizer.state[parameter][key] = eight_bit.together(optimizer, parameter, key, tensor, scales)
    for full_name, value in values.items():
        name, key, _ = _parted(full_name)
        if name in parameters:
            parameter = parameters[name]
            optimizer.state[parameter][key] = _together(full_name, value, tensors, parameter.device)


def _together(name: str, value: Any, tensors: Tensors, device: torch.device) -> Any:
    """Reassemble what `_apart` split."""
    found = {leaf["at"]: leaf.get("on", "cpu") for _, leaf in trees.leaves(value)}
    return trees.together(
        value, {at: tensors[f"{name}{at}"].to("cpu" if on == "cpu" else device) for at, on in found.items()}
    )


def _names_of_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The parameters of each group. Raises StokerError if one is not the model's."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if p not in names]
    if foreign:
        raise StokerError(
            f"the optimizer has a parameter of shape {tuple(foreign[0].shape)} that is not the model's, so a "
            "checkpoint has no name for it: make its module part of the model, or give it a separate "
            "optimizer, and register both for checkpointing"
        )
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def _beside(
    parameter: torch.nn.Parameter, group: Mapping[str, Any], key: str, value: torch.Tensor
) -> torch.Tensor:
    """Move state to its parameter's device, as `Optimizer.load_state_dict` does.

    Step counters stay on the CPU unless the step is fused or captured in a graph.
    """
    if key != "step":
        return value.to(parameter.device)
    on_device = group.get("fused") or group.get("capturable")
    return value.to(parameter.device, torch.float32) if on_device else value


def _compare(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    """Raises StokerError naming tensors that are missing, unexpected, or differ in shape."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{n} {tuple(found[n])} -> {tuple(s)}" for n, s in expected.items() if n in found and found[n] != s
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("with a different shape", shapes)]
    said = [f"{what}: {words.some(names, _NAMED)}" for what, names in problems if names]
    if said:
        raise StokerError("the checkpoint is from a different model; tensors " + "; ".join(said))


def as_before(current: Any, saved: Any) -> Any:
    """Convert a value from `plain` to the optimizer's type: JSON has no tuples, which betas are."""
    if isinstance(saved, dict) and saved.keys() == {"float"}:
        saved = float(saved["float"])
    if isinstance(current, torch.Tensor):  # torchao stores its learning rate in one
        return torch.as_tensor(saved, dtype=current.dtype, device=current.device)
    return tuple(saved) if isinstance(current, tuple) else saved


def plain(value: Any) -> Any:
    """A value as it comes back from JSON, which has no infinity: some optimizers have an infinite bound."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return list(value) if isinstance(value, tuple) else value
