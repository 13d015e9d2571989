"""Checks of the Trainer's arguments, before anything is built from them.

Arguments written for a loop of plain PyTorch differ, and would fail later with errors that name none of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from stoker import tensors, words
from stoker.engine.settings import Training
from stoker.errors import BadInput, StokerError, nearest
from stoker.words import some
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_UNUSED = "Expected to have finished reduction"  # the beginning of DDP's error
_FREED = "setStorage"  # the beginning of autograd's error if FSDP has freed a weight that it needs
_NO_GRADIENT = "does not require grad"  # in autograd's error where nothing records what is computed
_NAMED = 4  # parameters named in a message
_LISTED = 20  # submodules listed in one


def check(training: object, model: object, optimizer: object, loss: object, schedule: object) -> None:
    """Raises BadInput, or TypeError, for arguments of a kind that Trainer does not take."""
    _check_training(training)
    if not isinstance(model, nn.Module):
        raise BadInput(_no_module(model))
    _check_model(model)
    for name in optimizer if isinstance(optimizer, Mapping) else ():
        _check_part(model, name)
    if optimizer is not None:
        for name, make in optimizer.items() if isinstance(optimizer, Mapping) else [("", optimizer)]:
            _check_optimizer(name, make)
    if loss is not None:
        _check_loss(loss)
    if schedule is not None:
        _check_schedule(schedule)


def check_built(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises BadInput for an optimizer that needs a closure, or has parameters that are not the model's.

    Args:
        model: as it is laid out over the ranks, by which a strategy may have replaced its parameters.
    """
    known = set(model.parameters())
    foreign = [p for group in optimizer.param_groups for p in group["params"] if p not in known]
    if foreign:
        raise BadInput(
            f"the optimizer has a parameter of shape {tuple(foreign[0].shape)} that is not the model's. If "
            "the model's own were grouped before the Trainer laid it out over the ranks: group them within "
            "optimizer=, where the model (under parallel=pipeline, what is given) has those of now. If it is "
            "another module's: make it part of the model, or give it an optimizer of its own, and register "
            "both for checkpointing"
        )
    if not _takes(optimizer.step):
        raise BadInput(
            f"{type(optimizer).__name__} needs a closure that computes the loss again within a step, but a "
            "step here has the gradients of one pass over the batch: use an optimizer that steps without it"
        )


def _check_training(training: object) -> None:
    if not isinstance(training, Training):
        name = type(training).__name__
        raise TypeError(
            f"training= is a {name}, which has no settings for devices, precision and checkpoints: give a "
            f"stoker.Training, or let {name} inherit from it"
        )


def _no_module(model: object) -> str:
    """What is wrong with a model that is no module, such as a list of several."""
    said = f"the model is {_named(model)}, but must be a torch.nn.Module"
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"{said}: give an instance, {model.__name__}(...)"
    return (
        f"{said}: put several models into one, such as torch.nn.ModuleDict({{'first': ..., 'second': ...}}), "
        "and give each its own optimizer, optimizer={'first': ..., 'second': ...}"
    )


def _check_part(model: nn.Module, name: str) -> None:
    """Raises BadInput for a submodule that does not exist, or that an optimizer has nothing to train of."""
    try:
        parameters = list(model.get_submodule(name).parameters())
    except AttributeError:
        known = [known for known, _ in model.named_modules() if known]
        children = some([child for child, _ in model.named_children()], _LISTED)
        raise BadInput(
            f"optimizer= names {name!r}, but {type(model).__name__} has no such submodule"
            f"{nearest(str(name), known)}; it has {children or 'none at all'}"
        ) from None
    if not parameters:
        raise BadInput(f"optimizer= names {name!r}, which has no parameters: leave it out")
    if not any(p.requires_grad for p in parameters):
        part = f"trainer.model.get_submodule({name!r}).requires_grad_"
        raise BadInput(
            f"optimizer= names {name!r}, whose parameters are all frozen: leave it out, or, if a later stage "
            f"trains it, freeze it only after the Trainer is created, {part}(False), and unfreeze it when "
            f"that stage begins, {part}(True)"
        )


def _check_model(model: nn.Module) -> None:
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise BadInput(
            "the model is what torch.compile has returned, whose weights have other names (_orig_mod...): "
            "give the model itself, with compile=True in training=, or after model.compile()"
        )
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise BadInput(
            f"parameters of the model have no shape yet ({some(lazy, _NAMED)}): call it once on a batch "
            "like those of the data, before the Trainer is created"
        )
    saved = tensors.saved_buffers(model)
    buffers = [(name, b) for name, b in model.named_buffers(remove_duplicate=False) if name in saved]
    sparse = [name for name, t in [*model.named_parameters(), *buffers] if tensors.is_sparse(t)]
    if sparse:
        raise BadInput(
            f"the model has sparse tensors ({some(sparse, _NAMED)}), which a checkpoint cannot hold: make "
            "them dense, or, if the script builds them anew at each start, buffers with persistent=False"
        )


def _check_optimizer(name: str, make: object) -> None:
    if callable(make) and not isinstance(make, torch.optim.Optimizer):
        return
    kind = type(make).__name__ if isinstance(make, torch.optim.Optimizer) else "SGD"
    written = f"lambda parameters: {kind}(parameters, lr=...)"
    raise BadInput(
        f"optimizer= is {_named(make)}{f' for {name!r}' if name else ''}, but the optimizer is created after "
        f"the model is parallelised: give a function that creates it, optimizer="
        f"{f'{{{name!r}: {written}, ...}}' if name else written}"
    )


def _check_loss(loss: object) -> None:
    of_torch = isinstance(loss, nn.modules.loss._Loss) or (
        getattr(loss, "__module__", None) == "torch.nn.functional"
    )
    if callable(loss) and not of_torch:
        return
    raise BadInput(
        f"loss= is {_named(loss)}: give a function (output, batch) -> (sum, weight) that returns the loss "
        "summed over the batch and what to divide it by, such as "
        'lambda output, batch: (cross_entropy(output, batch[1], reduction="sum"), len(batch[1]))'
    )


def _check_schedule(schedule: object) -> None:
    if callable(schedule) and _takes(schedule, 0, 1):
        return
    said = f"{_named(schedule)}, which does not take these" if callable(schedule) else _named(schedule)
    raise BadInput(
        f"schedule= is {said}: give a function (step, total steps) -> learning rate factor, such as "
        'stoker.engine.schedule.build("cosine", warmup=0.05)'
    )


def explain_inputs(model: nn.Module, inputs: Mapping[str, Any], error: TypeError) -> None:
    """Raises BadInput if a model was called with batch items that it has no parameters for."""
    called = model.module if isinstance(model, DistributedDataParallel) else model
    if _takes(called.forward, **inputs):
        return
    taken = inspect.signature(called.forward).parameters
    ours = [key for key in inputs if key in taken]
    given = ", ".join(f'"{key}": batch["{key}"]' for key in ours or list(inputs)[:1])
    name = type(called).__name__
    raise BadInput(
        f"{name} was called with {', '.join(inputs)}, the items of a batch, but takes {', '.join(taken)}: "
        f"select its arguments with Trainer(..., inputs=lambda batch: {{{given}}})"
    ) from error


def explain_unused(names: Sequence[str], error: RuntimeError) -> None:
    """Raises StokerError if DDP waited for gradients of parameters that the loss does not depend on.

    Args:
        names: the parameters that DDP reduces, in its order.
    """
    if not str(error).startswith(_UNUSED):
        return
    found = re.search(r"did not receive grad for rank \d+:((?: \d+)+)", str(error))
    unused = [names[int(i)] for i in found[1].split() if int(i) < len(names)] if found else []
    said = f" ({some(unused, _NAMED)})" if unused else ""
    raise StokerError(
        f"parameters{said} did not contribute to the loss of a step, and the ranks are waiting for their "
        "gradients: add ddp.find_unused_parameters=true, or freeze them with requires_grad_(False)"
    ) from error


def explain_freed(strategy: str, error: RuntimeError) -> None:
    """Raises StokerError if a backward pass needed a whole weight that FSDP had freed."""
    if strategy != "fsdp" or not str(error).startswith(_FREED):
        return
    raise StokerError(
        "the backward pass needs a weight that parallel=fsdp has freed: a loss with a gradient of a gradient "
        "(create_graph=True, as for a gradient penalty) is not supported there: use parallel=ddp"
    ) from error


def changes_of_updates(training: Training, schedule: object) -> list[str]:
    """The keys and arguments that make an update more than an optimizer's step, if updates make the steps."""
    if training.optimizer_in_backward:
        return []
    given = {"schedule=": schedule, "clip_norm": training.clip_norm, "ema.decay": training.ema.decay}
    return [name for name, value in given.items() if value is not None]


def explain_evaluated(error: RuntimeError) -> None:
    """Raises StokerError if a metric asks for a gradient, which evaluation does not record."""
    if _NO_GRADIENT not in str(error):
        return
    raise StokerError(
        "a loss or metric asks for a gradient, but evaluation records none: leave such a term out there, by "
        "`if torch.is_grad_enabled():`"
    ) from error


def _takes(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> bool:
    """Whether the function can be called like this; assumed so if it has no signature."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


def _named(value: object) -> str:
    """A value for a message: a string as it is written, anything else as `words.named` says it."""
    return repr(value) if isinstance(value, str) else words.named(value)
