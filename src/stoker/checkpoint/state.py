"""What must be restored, in one place: trainable parameters, buffers, optimizer state.

Tensors and JSON values are kept apart, so that nothing needs a pickle. Names are the
model's own parameter names. Frozen parameters are not saved: the model is built from the
same source again, so a LoRA checkpoint is as small as its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from stoker.errors import StokerError

Tensors = dict[str, torch.Tensor]


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


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, values: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` returned. Raises StokerError where the groups differ."""
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
        optimizer.state[parameters[name]][key] = value


def compare(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
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
