"""Low-rank adapters on a model, with peft: new ones, or an existing one to continue.

The model can be on the meta device: then only the adapters have memory and values, and what they derive from
the model's weights (DoRA's magnitudes) is computed once those are loaded. Importing peft takes seconds, so it
is imported only if there are adapters.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stoker import exports
from stoker.engine import optimizers
from stoker.engine.memory import TooLarge
from stoker.errors import BadInput
from stoker.language import hub, saved_adapters, targets
from stoker.language.building import Language, Load
from stoker.language.loading import Quantised
from stoker.language.lora import Lora, as_trained, is_adapter, is_of_adapter
from stoker.language.rope import UNSCALED, RopeScaling
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("stoker")

_LENGTHS = "lora_magnitude_vector"


def adapted(language: Language, lora: Lora, *, compare: bool = True) -> Any:
    """The model with adapters and everything else frozen; the model itself if no adapters are used.

    Args:
        compare: whether to compare the model's weights with those that the adapter to continue was trained
            on, as far as the adapter records them. This reads all weights, so only one rank does it.

    Raises:
        BadInput: no module matches a name in `lora.targets`, or the adapter to continue is for a different
            model, or cannot be continued.
    """
    model = language.model
    if not lora.used:
        return model
    from peft import get_peft_model

    folder = hub.find(lora.adapter, "lora.adapter") if lora.adapter is not None else None
    config = _config(language, lora) if folder is None else _saved_config(folder, language, compare)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message=".*did not match any targeted module")
        warnings.filterwarnings("ignore", message="(?s).*ensure_weight_tying")
        try:
            made = get_peft_model(model, config)
        except ValueError as error:  # modules that do not support such an adapter
            if "lora_dropout" in str(error):
                raise BadInput(
                    f"lora.dropout={lora.dropout}: the experts of a {model.config.model_type} are fused into "
                    "one weight, so their adapters cannot use dropout: set lora.dropout=0, or leave them out "
                    "of lora.targets"
                ) from error
            given = f"lora.targets={lora.targets}" if folder is None else f"lora.adapter={lora.adapter}"
            raise BadInput(f"{given}: {error}") from error
    for layer in made.modules():
        if as_trained(layer) is not layer:
            _begin_whole(as_trained(layer), saved=folder is not None)
        if is_adapter(layer):
            _begin(layer, saved=folder is not None)
            if not layer.lora_variant:  # DoRA needs its input for more
                layer._cast_input_dtype = _as_adapters_take_it
    if folder is not None:
        _take(made, folder)
    return made


def settings(model: Any, lora: Lora) -> dict[str, Any]:
    """The settings of the continued adapter, by config key; empty for a new one."""
    if lora.adapter is None:
        return {}
    known = model.peft_config["default"]
    return {
        "lora.rank": known.r, "lora.alpha": known.lora_alpha, "lora.dropout": known.lora_dropout,
        "lora.targets": ",".join(targets.names(known)),
        "lora.modules_to_save": ",".join(sorted(known.modules_to_save or ())),
        "lora.rslora": known.use_rslora, "lora.dora": known.use_dora,
    }  # fmt: skip


def tokenizer_for(given: str | None, lora: Lora) -> str | None:
    """The given tokenizer; else the one saved with the adapter to continue, including its chat template.

    None if there is neither: then the model's is used. Raises BadInput if the adapter does not exist.
    """
    if given or lora.adapter is None:
        return given
    folder = hub.find(lora.adapter, "lora.adapter", weights=False)
    return str(folder) if (folder / "tokenizer.json").is_file() else None


def brings_tokens(lora: Lora) -> bool:
    """Whether the adapter to continue may have tokens that its model lacks. Raises BadInput."""
    if lora.adapter is None:
        return False
    folder = hub.find(lora.adapter, "lora.adapter", weights=False)
    return bool(saved_adapters.trained_whole(folder, "lora.adapter"))


def scaling_of(lora: Lora) -> RopeScaling:
    """How the model's positions were scaled for the adapter to continue. Raises BadInput."""
    if lora.adapter is None:
        return UNSCALED
    return saved_adapters.scaling(hub.find(lora.adapter, "lora.adapter", weights=False))


@contextlib.contextmanager
def advising(lora: Lora, quantisation: str) -> Iterator[None]:
    """If the model is too large, add to the error what would make it smaller. Raises BadInput."""
    try:
        yield
    except TooLarge as error:
        frozen = "quantisation=nf4 to keep the frozen weights in 4 bits"
        smaller = frozen if lora.used else f"train only adapters with lora.rank=16, and use {frozen}"
        raise BadInput(f"{error}; or {smaller}" if quantisation == "none" else str(error)) from error


def loading(load: Load) -> Load:
    """Extend a function that fills a model to one that also fills its adapters."""

    def both(model: nn.Module, device: torch.device, prefix: str) -> None:
        load(model, device, prefix)
        for name, layer in model.named_modules():
            if is_adapter(layer) and f"{name}.".startswith(prefix):
                _measure(layer)

    return both


def faster(model: nn.Module, lora: Lora) -> optimizers.Faster:
    """What learns at `lora.lr_ratio` times the learning rate (LoRA+): the B matrices.

    As in peft's `create_loraplus_optimizer`, so does what has one dimension, such as DoRA's magnitudes. An
    embedding's adapter does not: its A is what begins as zeros, and its B is random.
    """

    def found() -> list[nn.Parameter]:
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        return [p for name, p in named if ".lora_B." in name or optimizers.dimensions(p) <= 1]

    return optimizers.Faster(lora.lr_ratio, found)


def _config(language: Language, lora: Lora) -> Any:
    from peft import LoraConfig

    modules, parameters = targets.resolve(language.model, lora)
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora,
        use_dora=lora.dora, task_type="CAUSAL_LM", revision=language.revision,
        target_modules=modules, target_parameters=parameters or None,
        modules_to_save=targets.whole(language.model, lora, grown=language.added_tokens > 0) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in language.model.modules()),
    )  # fmt: skip


def _saved_config(folder: Path, language: Language, compare: bool) -> Any:
    from peft import PeftConfig

    name, origin = (
        language.config.name_or_path,
        language.origin if isinstance(language.origin, Path) else None,
    )
    quantised = any(isinstance(module, Quantised) for module in language.model.modules())
    saved_adapters.check(folder, model=name, origin=origin, quantised=quantised)
    if compare:
        saved_adapters.check_weights(folder, language.origin)
        other = saved_adapters.other_model(folder, name, origin)
        if other is not None and not (folder / exports.BASE).is_file():
            log.warning(
                "lora.adapter=%s says that it is for %s, and nothing shows that %s is that model: "
                "make sure that it is",
                folder, other, name or "a new model",
            )  # fmt: skip
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"lora.adapter={folder}: {error}") from error
    config.inference_mode = False
    config.base_model_name_or_path = name
    return config


def _take(model: Any, folder: Path) -> None:
    """Load a saved adapter's tensors. Raises BadInput if they do not match."""
    from peft import set_peft_model_state_dict

    tensors = load_file(folder / saved_adapters.WEIGHTS)
    for name in saved_adapters.of_the_model(tensors, model.peft_config["default"].modules_to_save or ()):
        del tensors[name]  # equal to the model's: `saved_adapters.check`
    try:
        found = set_peft_model_state_dict(model, tensors)
    except (RuntimeError, KeyError) as error:
        said = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise BadInput(f"lora.adapter={folder} is for a different model: {said}") from error
    missing = [name for name in found.missing_keys if is_of_adapter(name)]
    if missing or found.unexpected_keys:
        some = (missing or list(found.unexpected_keys))[0]
        raise BadInput(f"lora.adapter={folder} is for a different model: {some} is not in both")


def _as_adapters_take_it(given: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The input of an adapter; replaces peft's function, which casts it to the type of the weights.

    The weights are float32, and under autocast the product casts the input back at once: the input of every
    linear layer, and its gradient, would be copied to float32 and back.
    """
    if given is None or torch.is_autocast_enabled(given.device.type):
        return given
    return given.to(dtype)


def _begin_whole(module: nn.Module, *, saved: bool) -> None:
    """Train a full-precision copy of a module; it is filled from its original, or from a file."""
    module.to(torch.float32)
    for inner in module.modules() if saved else ():
        for name, held in (*inner._parameters.items(), *inner._buffers.items()):
            # What is in no file, such as the scale of Gemma's embeddings, stays on the meta device until that
            # of the original is computed.
            if held is None or not held.is_meta or name in inner._non_persistent_buffers_set:
                continue
            made = torch.empty_like(held, device="cpu")
            if isinstance(held, nn.Parameter):
                made = nn.Parameter(made, requires_grad=held.requires_grad)
            setattr(inner, name, made)


def _begin(layer: Any, *, saved: bool) -> None:
    """Allocate and initialise, on the CPU, an adapter that followed its layer to the meta device.

    Args:
        saved: whether its values come from a file, including DoRA's magnitudes, which otherwise wait for the
            weights.
    """
    names = [name for name in layer.adapter_layer_names if saved or name != _LENGTHS]
    held = [getattr(layer, name, None) for name in names]
    modules = [m for container in held if isinstance(container, nn.Module) for m in container.modules()]
    if not any(p.is_meta for module in modules for p in module.parameters(recurse=False)):
        return
    for module in modules:
        module.to_empty(device=torch.device("cpu"), recurse=False)
    with torch.no_grad():
        layer.reset_lora_parameters("default", True)


@torch.no_grad()
def _measure(layer: Any) -> None:
    """DoRA starts from the norms of the weight's rows: (out,), sharded like the weight."""
    vectors = getattr(layer, _LENGTHS)
    if "default" not in vectors or not vectors["default"].weight.is_meta:
        return
    weight, old = layer.get_base_layer().weight, vectors["default"].weight
    lengths = torch.linalg.norm((weight.T if layer.fan_in_fan_out else weight).float(), dim=1)
    if isinstance(lengths, DTensor):
        lengths = lengths.redistribute(placements=old.placements)
    vectors["default"].weight = nn.Parameter(lengths.to(old.dtype), requires_grad=old.requires_grad)
