"""What must be restored, in one place: trainable parameters, buffers, optimizer state.

Tensors and JSON values are kept apart, so that nothing needs a pickle. Names are the
model's own parameter names. Frozen parameters are not saved: the model is built from the
same source again, so a LoRA checkpoint is as small as its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from stoker.checkpoint import store
from stoker.checkpoint.manifest import Checkpoint
from stoker.checkpoint.store import Tensors
from stoker.errors import StokerError

Groups = list[dict[str, Any]]


def capture(
    model: torch.nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], built: Mapping[str, Groups]
) -> tuple[Tensors, dict[str, Any]]:
    """The state of a model and its optimizers: tensors by name, and JSON values.

    `built` holds the hyperparameters that the optimizers were made with, see `hyperparameters`.
    """
    tensors = {f"model.{name}": t for name, t in model_tensors(model).items()}
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
) -> tuple[Tensors, dict[str, Any]]:
    """Put a checkpoint into a model and its optimizers; returns all its other tensors, and its values.

    A hyperparameter that the user has changed since wins over the saved one. Raises StokerError
    where the checkpoint is of another model or other optimizers.
    """
    specs = store.shapes(checkpoint)
    model_now = {f"model.{name}": t for name, t in model_tensors(model).items()}
    _compare(
        {name: t.shape for name, t in model_now.items()},
        {name: shape for name, (shape, _) in specs.items() if name.startswith("model.")},
    )
    others = {n: torch.empty(s, dtype=d) for n, (s, d) in specs.items() if n not in model_now}
    store.load_tensors(checkpoint, {**model_now, **others})
    values = store.load_values(checkpoint)
    for name, optimizer in optimizers.items():
        _restore_optimizer(model, optimizer, inside(others, f"optimizer.{name}."), values["optimizers"][name])
        for group, now, then in zip(optimizer.param_groups, built[name], values["built"][name], strict=True):
            group.update({key: value for key, value in now.items() if plain(value) != then.get(key)})
    return others, values


def hyperparameters(optimizer: torch.optim.Optimizer) -> Groups:
    """An optimizer's hyperparameters, a dict a group."""
    return [{k: plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def inside(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def model_tensors(model: torch.nn.Module) -> Tensors:
    """Trainable parameters and saved buffers by name, sharing the model's memory; a tied one once."""
    saved = model.state_dict(keep_vars=True)
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors.update({name: b.detach() for name, b in model.named_buffers() if name in saved})
    return tensors


def optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Tensors, dict[str, Any]]:
    """An optimizer's state: tensors as `<parameter>.<key>`, and the rest as JSON values."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: Tensors = {}
    scalars: dict[str, Any] = {}
    for parameter, state in cast("Mapping[torch.nn.Parameter, Any]", optimizer.state).items():
        for key, value in state.items():
            kept = tensors if isinstance(value, torch.Tensor) else scalars
            kept[f"{names[parameter]}.{key}"] = value
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return tensors, {"state": scalars, "groups": groups}


def _restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, values: Mapping[str, Any]
) -> None:
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    now = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    before = [group["params"] for group in values["groups"]]
    if now != before:
        raise StokerError(
            f"the checkpoint's optimizer has groups of {[len(g) for g in before]} parameters, "
            f"this one of {[len(g) for g in now]}, or with other names: the model or its optimizer changed"
        )
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        group.update({key: _as_before(group.get(key), v) for key, v in saved.items() if key != "params"})
    optimizer.state.clear()
    for full_name, value in {**tensors, **values["state"]}.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters[name]
        optimizer.state[parameter][key] = _beside(parameter, key, value)


def _beside(parameter: torch.nn.Parameter, key: str, value: Any) -> Any:
    """State lies on its parameter's device, but for step counters, which optimizers keep on the CPU."""
    return value.to(parameter.device) if isinstance(value, torch.Tensor) and key != "step" else value


def _compare(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    """Raises StokerError naming tensors that are missing, unexpected, or of another shape."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{n} {tuple(found[n])} -> {tuple(s)}" for n, s in expected.items() if n in found and found[n] != s
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    said = [f"{what}: {_some(names)}" for what, names in problems if names]
    if said:
        raise StokerError("the checkpoint is of another model; tensors " + "; ".join(said))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _as_before(current: Any, saved: Any) -> Any:
    """JSON has no tuples: betas come back as the type that the optimizer has."""
    return tuple(saved) if isinstance(current, tuple) else saved


def plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value
