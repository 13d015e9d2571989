"""Checks a saved adapter by its files: whether it can be continued, and on which model.

This needs no peft, so the result is known before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from stoker import exports
from stoker.errors import BadInput
from stoker.language import hub
from stoker.language.rope import UNSCALED, RopeScaling

WEIGHTS = "adapter_model.safetensors"
_MORE = (
    "bias", "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
    "use_bdlora", "use_qalora", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
    "megatron_config",
)  # fmt: skip
"""Fields of peft's LoraConfig that train or use weights other than low-rank matrices."""
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of its `init_lora_weights` that leave the model's own weights unchanged."""


def check(adapter: Path, *, model: str, origin: Path | None, quantised: bool) -> None:
    """Raises BadInput for an adapter folder that cannot be continued.

    Args:
        model: the model to put it on, as given.
        origin: the model's directory; None for a new model.
        quantised: whether the model's weights are kept in 4 bits.

    Raises:
        BadInput: it is not LoRA, has more than low-rank matrices and fully trained modules, does not work
            with a quantised model, or says that it is for a different model on the hub.
    """
    config = hub.read_json(adapter, exports.ADAPTER, "lora.adapter")
    if config.get("peft_type") != "LORA":
        raise BadInput(f"lora.adapter={adapter} is {config.get('peft_type')}: only LoRA can be continued")
    more = [f"{key}={config[key]}" for key in _MORE if config.get(key) not in (None, False, "none", [], {})]
    if config.get("init_lora_weights") not in _BEGINNINGS:
        more.append(f"init_lora_weights={config['init_lora_weights']}")
    more = more or _other_tensors(adapter, config.get("modules_to_save") or (), origin)
    if more:
        raise BadInput(
            f"lora.adapter={adapter} has {', '.join(more)}: only low-rank matrices and fully trained modules "
            "on top of an unchanged model can be continued; merge the adapter into its model with peft, and "
            "train a new one on the result"
        )
    if quantised and config.get("use_dora"):
        raise BadInput(
            "quantisation is for weights frozen under LoRA, but DoRA needs them in full precision, and "
            f"lora.adapter={adapter} is DoRA: omit quantisation"
        )
    other = other_model(adapter, model, origin)
    if other is not None and _is_id(other) and _is_id(model.partition("@")[0]):
        raise BadInput(
            f"lora.adapter={adapter} is for a different model, {other}: set model={other}, or give a local "
            f"copy of {model} if it has the same weights"
        )


def trained_whole(adapter: Path, what: str = "adapter") -> list[str]:
    """The modules that were trained in full alongside an adapter: they can include tokens of their own.

    Raises BadInput, naming the key `what`.
    """
    return list(hub.read_json(adapter, exports.ADAPTER, what).get("modules_to_save") or ())


def scaling(adapter: Path) -> RopeScaling:
    """How the positions of the model were scaled that an adapter was trained on. Raises BadInput."""
    if not (adapter / exports.BASE).is_file():
        return UNSCALED
    return RopeScaling(**hub.read_json(adapter, exports.BASE, "adapter").get("rope_scaling", {}))


def check_scaling(adapter: Path, given: RopeScaling) -> None:
    """Raises BadInput if an adapter was trained with another scaling of positions than the given one."""
    own = scaling(adapter)
    if own != given:
        was, change = (f"with {own}", "set the same") if own.used else ("without rope_scaling", "omit it")
        raise BadInput(f"lora.adapter={adapter} was trained {was}: {change}")


def check_weights(adapter: Path, origin: Path | str) -> None:
    """Raises BadInput if an adapter is known to be for different weights than a model has.

    Args:
        origin: the directory of the model, all of whose weights are read if the adapter's are known; or its
            size.
    """
    if not (adapter / exports.BASE).is_file():
        return
    base = hub.read_json(adapter, exports.BASE, "adapter")
    known = base.get("fingerprint")
    if known is not None and known != (hub.fingerprint(origin) if isinstance(origin, Path) else origin):
        raise BadInput(
            f"adapter {adapter} was trained on a different model, {base.get('model')}, whose weights are not "
            "those of the given model"
        )


def other_model(adapter: Path, model: str, origin: Path | None) -> str | None:
    """The model that an adapter says it is for, if that may differ from the given one; see `check`."""
    said = hub.read_json(adapter, exports.ADAPTER, "lora.adapter").get("base_model_name_or_path")
    if not said:
        return None
    names = [model.partition("@")[0], *(_names(origin) if origin is not None else ())]
    if said.casefold() in (name.casefold() for name in names):
        return None
    is_same = origin is not None and Path(said).is_dir() and origin.samefile(said)
    return None if is_same else str(said)


def _names(folder: Path) -> Iterator[str]:
    """The hub names of the model in a directory, if the directory records them."""
    yield str(hub.read_json(folder, "config.json", "model").get("_name_or_path"))
    cached = re.search(r"models--([^/]+)/snapshots/", str(folder))
    if cached is not None:
        yield cached.group(1).replace("--", "/")


def _is_id(name: str) -> bool:
    """Whether a name is a hub id, including the owner."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).is_dir()


def of_the_model(names: Iterable[str], whole: Iterable[str]) -> list[str]:
    """The names of an adapter's tensors that are neither low-rank matrices nor of fully trained modules.

    peft saves the embeddings beside adapters that are on them.
    """
    known = (".lora_", *(f"{name}." for name in whole))  # peft matches the ends of modules' names
    return [name for name in names if not any(part in name for part in known)]


def _other_tensors(adapter: Path, whole: Sequence[str], origin: Path | None) -> list[str]:
    """The names of those of them that are other than the model's own, as far as it is here; of many, some."""
    file = adapter / WEIGHTS
    try:
        with safe_open(file, framework="pt") as reader:
            names = of_the_model(reader.keys(), whole)
            if names and origin is not None:
                names = _other_than(origin, {name: reader.get_tensor(name) for name in names})
    except FileNotFoundError as error:
        raise BadInput(f"lora.adapter={adapter} has no {WEIGHTS}") from error
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error
    return names if len(names) <= 3 else [*names[:3], "..."]


def _other_than(origin: Path, tensors: Mapping[str, Any]) -> list[str]:
    """Those of the tensors of an adapter that a model does not have with these values, in their precision.

    None if its weights have not been downloaded.
    """
    from stoker.language.loading import bare_name

    names = {bare_name(name): name for name in tensors}
    files = sorted(origin.glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            found.update({name: reader.get_tensor(name) for name in names.keys() & reader.keys()})
    same = {
        name
        for bare, name in names.items()
        if bare in found and found[bare].to(tensors[name].dtype).equal(tensors[name])
    }
    return [name for name in tensors if files and name not in same]
