"""Which parts of a model are trained: those that text passes through, and the layers that get adapters."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stoker.errors import BadInput, nearest
from stoker.language.loading import Quantised
from stoker.language.lora import Lora, as_trained, without_adapters
from stoker.user_run import Run
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("stoker")

_OTHER_SENSES = ("vision", "visual", "image", "audio", "speech")
_LAYERS = (nn.Linear, Conv1D, Quantised)
_TAKES_ONE = (*_LAYERS, nn.Embedding, _ConvNd)
_ROUTERS = ("router", "gate", "gating")


def freeze_what_no_text_goes_through(model: Any) -> None:
    """Freeze the parts of a model for images or audio, which get no gradient from text."""
    is_of_text = _of_text(model)
    for name, parameter in model.named_parameters():
        if not is_of_text(name):
            parameter.requires_grad_(False)


def train_only(model: Any, patterns: Sequence[str], *, grown: bool = False) -> None:
    """Freeze all weights whose names match none of the regular expressions; without any, do nothing.

    Tied weights match by any of their names.

    Args:
        grown: the model has untrained tokens.

    Raises:
        BadInput: an expression matches no name, or the embeddings of untrained tokens would be frozen.
    """
    if not patterns:
        return
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(re.search(pattern, name) for name, _ in named):
            known = _last_parts(name.rpartition(".")[0] for name, _ in named)
            raise BadInput(
                f"train_only: no weight's name matches {pattern!r}{nearest(pattern, known)}; a name is for "
                f"example {named[0][0]}, and their modules end in {', '.join(known)}"
            )
    found = {id(p) for name, p in named if any(re.search(pattern, name) for pattern in patterns)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in found)
    frozen = [
        name for name in _of_tokens(model) if grown and not model.get_submodule(name).weight.requires_grad
    ]
    if frozen:
        raise BadInput(
            f"train_only leaves the new tokens of add_tokens untrained, all with the same embedding: add "
            f"{' and '.join(_last_parts(frozen))} to train_only, or omit add_tokens"
        )


def experts(model: Any) -> dict[str, nn.Parameter]:
    """The weights of a mixture's experts, many of them fused into one tensor (experts, a, b), by name."""
    is_of_text = _of_text(model)
    return {
        f"{place}.{name}": parameter
        for place, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, _ConvNd) and is_of_text(place)
    }


def hidden(model: Any) -> list[nn.Parameter]:
    """The weights between a model's ends: all but embeddings, convolutions, the head, and their adapters."""
    head = model.get_output_embeddings()
    ends = [m for m in model.modules() if m is head or isinstance(m, (nn.Embedding, _ConvNd))]
    others = {p for module in ends for p in module.parameters()}
    return [p for n, p in model.named_parameters() if p not in others and ".lora_embedding_" not in n]


def resolve(model: Any, lora: Lora) -> tuple[list[str], list[str]]:
    """What new adapters are put on: the names of modules, and of experts' weights, as peft takes them.

    A name selects all modules and weights whose names end in it. `all-linear` is every linear layer that
    text passes through, except the output layer and the layers that choose among experts. Experts are
    selected only by name, since peft recomputes all of their weights at every step.

    Args:
        model: without adapters; it can be on the meta device.

    Raises:
        BadInput: nothing has a given name, or peft cannot put an adapter on it.
    """
    is_of_text = _of_text(model)
    modules = {name: module for name, module in model.named_modules() if is_of_text(name)}
    layers = [name for name, module in modules.items() if isinstance(module, _LAYERS)]
    weights = experts(model)
    chosen, parameters = set[str](), []
    if lora.all_linear:
        head = model.get_output_embeddings()
        chosen = {n for n in layers if modules[n] is not head and not (weights and _chooses(n))}
    for target in lora.names:
        found = [n for n, module in modules.items() if _ends(n, target) and isinstance(module, _TAKES_ONE)]
        chosen.update(found)
        if any(_ends(name, target) for name in weights):
            parameters.append(target)
        elif not found:
            known = _last_parts([*layers, *weights])
            raise BadInput(
                f"lora.targets: the model has no layer {target!r}{nearest(target, known)}; its layers are "
                f"{', '.join(known)}"
            )
    kept = _kept_by_peft(model, _short(chosen, dict(model.named_modules()))) if chosen else []
    for target in lora.names:
        is_kept = any(_ends(name, target) or _ends(target, name) for name in kept)
        if not is_kept and target not in parameters:
            raise BadInput(
                f"lora.targets: in a {model.config.model_type}, peft treats {target!r} as part of the "
                f"experts: omit it, or give the names of the experts' weights, "
                f"{','.join(_last_parts(weights))}"
            )
    return sorted(kept), parameters


def names(adapter: Any) -> list[str]:
    """The names that an adapter is put on, from its peft config."""
    on = adapter.target_modules
    return [on] if isinstance(on, str) else sorted({*on, *(adapter.target_parameters or ())})


def say(run: Run, model: Any) -> None:
    """Record how much of a model is trained, and log it on rank 0. The model is unsharded, possibly meta."""
    entries, trained = _counted(model)
    run.params(parameters=entries, trained_parameters=trained)
    if run.world.rank > 0:
        return
    adapter = model.peft_config["default"] if hasattr(model, "peft_config") else None
    share = "all" if trained == entries else f"{trained:,} ({trained / entries:.2%})"
    how = ""
    if adapter is not None:
        how = f", as rank-{adapter.r} adapters on {', '.join(_last_parts(names(adapter)))}"
        how += "".join(f", {name} whole" for name in _trained_whole(model))
    log.info("model: %s parameters, of which %s are trained%s", f"{entries:,}", share, how)


def _trained_whole(model: Any) -> list[str]:
    """The names of the modules that are trained whole next to adapters."""
    modules = dict(without_adapters(model).named_modules())
    return _short({name for name, module in modules.items() if as_trained(module) is not module}, modules)


def _counted(model: nn.Module) -> tuple[int, int]:
    """The number of parameters with adapters, tied ones counted once, and how many of them are trained."""
    found: dict[int, tuple[int, bool]] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, Quantised):  # its other tensors are bytes
            found[id(module)] = (module.plain().numel(), False)
            own = {"bias": own["bias"]} if "bias" in own else {}
        found.update({id(p): (p.numel(), p.requires_grad) for p in own.values()})
    entries = sum(count for count, _ in found.values())
    return entries, sum(count for count, is_trained in found.values() if is_trained)


def whole(model: Any, lora: Lora, *, grown: bool) -> list[str]:
    """The names of the modules that are trained in full alongside new adapters, as peft takes them.

    peft takes each module whose name ends in the same letters, as `input_layernorm` does in `norm`. Where
    that would be more than the modules of a name, these are given by their places.

    Args:
        grown: the model has untrained tokens, so its embeddings and output layer are among these modules.

    Raises:
        BadInput: the model has no such module, or keeps it in 4 bits.
    """
    modules = {n: module for n, module in model.named_modules() if any(True for _ in module.parameters())}
    chosen = set[str]()
    for name in lora.trained_whole:
        found = {place: module for place, module in modules.items() if _ends(place, name)}
        if not found:
            near = nearest(name, _last_parts(modules))
            raise BadInput(f"lora.modules_to_save: the model has no module {name!r}{near}")
        if any(isinstance(part, Quantised) for module in found.values() for part in module.modules()):
            raise BadInput(f"lora.modules_to_save: {name} is kept in 4 bits and cannot be trained: omit it")
        alone = all(_ends(place, name) for place, _ in model.named_modules() if place.endswith(name))
        chosen.update([name] if alone else found)
    return sorted({*chosen, *_last_parts(_of_tokens(model) if grown else ())})


def _of_tokens(model: Any) -> list[str]:
    """The names of the modules with one row per token: the embeddings and the output layer."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _of_text(model: Any) -> Callable[[str], bool]:
    """A function that tells from its name whether text passes through a part of a model."""
    through = (model.get_decoder(), model.get_output_embeddings())
    places = [name for name, module in model.named_modules() if any(module is part for part in through)]
    alone = model.config.get_text_config() is model.config

    def is_of_text(name: str) -> bool:
        if any(word in name for word in _OTHER_SENSES):
            return False
        return alone or any(not place or name == place or name.startswith(f"{place}.") for place in places)

    return is_of_text


def _chooses(name: str) -> bool:
    """Whether a layer of a mixture, by its name, chooses among experts."""
    return any(part in _ROUTERS for part in name.split("."))


def _short(chosen: set[str], names: Iterable[str]) -> list[str]:
    """Names shortened to their last part, where that is unambiguous."""
    last = set(_last_parts(chosen))
    same = all(name in chosen for name in names if name.rpartition(".")[2] in last)
    return sorted(last if same else chosen)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _kept_by_peft(model: Any, names: list[str]) -> list[str]:
    """The names that peft does not treat as parts of experts, which used to have such names."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=names)
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError as error:  # some of them are fused into one weight now
        raise BadInput(f"lora.targets: {error}") from error
    return list(config.target_modules or ())


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
