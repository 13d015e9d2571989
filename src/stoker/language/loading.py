"""Loads weights from safetensors files into a model on the meta device, piece by piece.

The model can be wrapped by peft, sharded by FSDP, or split into stages: each of its tensors is found by its
name in the bare model. transformers' own loader does the reading, so that renamed and fused tensors arrive
as with `from_pretrained`; of a sharded tensor, a rank reads only its own rows. Loading proceeds block by
block, so that at most one block is in memory twice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from stoker.errors import BadInput
from stoker.exports import by_block
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

Build = Callable[[], Any]
"""Creates the bare model; within `torch.device("meta")` without memory."""

_ROWS_AT_ONCE = 8192

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Quantised(nn.Module):
    """A layer that stores a weight in a different form than the files."""

    def plain(self) -> torch.Tensor:
        """A meta tensor that describes the weight in the files: same shape, sharded as it is here."""
        raise NotImplementedError

    def take(self, weight: torch.Tensor) -> None:
        """Store a weight, given as `plain` describes it."""
        raise NotImplementedError


@dataclass
class _Slot:
    """Where a tensor of the bare model is in the trained one; a tied tensor is in several places."""

    tensor: torch.Tensor
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    quantised: Quantised | None = None


class Weights:
    """The weights of a model in a directory.

    Args:
        folder: contains `model.safetensors`, or several such files and their index.
        build: creates the bare model that they belong to.
        tokens: the number of the model's tokens that the files contain at most; the embeddings of others are
            created, see `_Grown`. None: all of them.

    Raises:
        BadInput: there are none, or a file is damaged.
    """

    def __init__(self, folder: Path, build: Build, *, tokens: int | None = None) -> None:
        self._folder, self._build, self._tokens = folder, build, tokens
        self._files = _files(folder)
        keys = [(key, file) for file in self._files for key in _keys(file)]
        with torch.device("meta"):
            skeleton = build()
        mapping = get_model_conversion_mapping(skeleton)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        expected = skeleton.state_dict()
        self._grown = _of_tokens(skeleton) if tokens is not None else frozenset()
        # What each tensor of the model is made of, by name.
        self._found: dict[str, list[tuple[str, Path]]] = {}
        self._fused: dict[str, tuple[str, ...]] = {}
        for key, file in sorted(keys, key=lambda pair: dot_natural_key(pair[0])):
            name, pattern = rename_source_key(
                key, renamings, converters, skeleton.base_model_prefix, expected
            )
            self._found.setdefault(name, []).append((key, file))
            if pattern is not None:
                converter = next(c for c in converters if pattern in c.source_patterns)
                self._fused[name] = tuple(
                    name.replace(converter.target_patterns[0], other) for other in converter.target_patterns
                )

    def load(self, model: nn.Module, device: torch.device, prefix: str = "") -> None:
        """Allocate and fill everything on the meta device below a name; by default the whole model.

        Args:
            model: the bare model, or what became of it.
            prefix: dotted, ending in a dot.

        Raises:
            BadInput: the files lack a tensor, or have it with a different shape.
        """
        slots = _slots(model, prefix)
        with torch.device("meta"):
            skeleton = self._build()
        with contextlib.ExitStack() as opened:
            readers = {f: opened.enter_context(_opened(f)) for f in self._files}
            for names in by_block(self._wanted(slots)):
                slices = {
                    key: self._slice(readers[file].get_slice(key), name, skeleton)
                    for name in names
                    for key, file in self._found[name]
                }
                for name, value in self._read(skeleton, names, slots, slices, device).items():
                    _put(slots[name], value, device)
        _initialise_buffers(model, skeleton, device, prefix)

    def _slice(self, there: Any, name: str, skeleton: Any) -> Any:
        if self._tokens is None or name not in self._grown:
            return there
        return _Grown(there, len(_get(skeleton, name)), self._tokens)

    def _wanted(self, slots: Mapping[str, _Slot]) -> list[str]:
        """The names of the tensors to read, as the files name them. Raises BadInput if some are missing."""
        made_with = {other: name for name, others in self._fused.items() for other in others}
        known = {n: made_with.get(n, n) for n in slots if made_with.get(n, n) in self._found}
        there = {id(slots[name].tensor) for name in known}
        missing = [name for name, slot in slots.items() if id(slot.tensor) not in there]
        if missing:
            some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise BadInput(
                f"the weights in {self._folder} lack {len(missing)} of the model's tensors: {some}"
            )
        return list(dict.fromkeys(known.values()))

    def _read(
        self,
        skeleton: Any,
        names: Sequence[str],
        slots: Mapping[str, _Slot],
        slices: dict[str, Any],
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        made = [n for name in names for n in self._fused.get(name, (name,)) if n in slots]
        for name in made:
            slot = slots[name]
            _set(skeleton, name, slot.quantised.plain() if slot.quantised is not None else slot.tensor)
        info, _ = convert_and_load_state_dict_in_model(
            skeleton, slices,
            LoadStateDictConfig(
                device_map={"": device}, dtype=torch.get_default_dtype(),
                weight_mapping=get_model_conversion_mapping(skeleton),
            ),
            None,
        )  # fmt: skip
        for name, found, expected in info.mismatched_keys:
            raise BadInput(
                f"the weights in {self._folder}: {name} is {tuple(found)}, the model's is {tuple(expected)}"
            )
        for name, said in info.conversion_errors.items():
            raise BadInput(f"the weights in {self._folder}: {name} cannot be created: {said}")
        read = {name: _get(skeleton, name).detach() for name in made}
        for name in made:
            _set(skeleton, name, slots[name].tensor.detach().to("meta"))
        return read


class _Grown:
    """A tensor of a file extended by rows: the unknown rows are the mean of the known ones.

    So an added token starts as likely as the others (Hewitt 2021, "Initializing new word embeddings for
    pretrained language models"). It is read like a safetensors slice.
    """

    def __init__(self, there: Any, rows: int, known: int) -> None:
        self._there, self._rows, self._known = there, rows, min(known, there.get_shape()[0])

    def get_shape(self) -> list[int]:
        """The shape of the extended tensor."""
        return [self._rows, *self._there.get_shape()[1:]]

    def get_dtype(self) -> str:
        """The dtype in the file."""
        return str(self._there.get_dtype())

    def __getitem__(self, key: Any) -> torch.Tensor:
        """All of it, with an ellipsis; or rows, and possibly columns, with slices."""
        rows, *others = (slice(None),) if key is ... else key if isinstance(key, tuple) else (key,)
        begin, end, _ = rows.indices(self._rows)
        own: torch.Tensor = self._there[(slice(min(begin, self._known), min(end, self._known)), *others)]
        more = end - max(begin, self._known)
        if more <= 0:
            return own
        return torch.cat(
            [own, self._mean().to(own.dtype)[(slice(0, 1), *others)].expand(more, *own.shape[1:])]
        )

    def _mean(self) -> torch.Tensor:
        """The mean of the known rows: (1, ...)."""
        bounds = [*range(0, self._known, _ROWS_AT_ONCE), self._known]
        parts = (self._there[first:last] for first, last in itertools.pairwise(bounds))
        total: torch.Tensor = torch.stack([part.double().sum(0) for part in parts]).sum(0)[None]
        return total.div(self._known)


def _of_tokens(model: Any) -> frozenset[str]:
    """The names of tensors with one row per token."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return frozenset(
        f"{place}.{name}"
        for place, module in model.named_modules(remove_duplicate=False)
        if any(module is end for end in ends)
        for name, _ in module.named_parameters(recurse=False)
    )


def bare_name(name: str) -> str:
    """`base_model.model.lm_head.modules_to_save.default.weight` is `lm_head.weight` of the bare model."""
    bare = re.sub(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)", "", name)
    return bare.removeprefix("base_model.model.").removeprefix("base_model.model")


def _slots(model: nn.Module, prefix: str) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    by_tensor: dict[int, _Slot] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if not f"{module_name}.".startswith(prefix) or ".lora_" in module_name:  # the adapter's own
            continue
        bare = bare_name(module_name)
        if isinstance(module, Quantised):
            shape = module.plain()
            slots[f"{bare}.weight"] = _Slot(shape, quantised=module)
        saved = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **saved}.items():
            if tensor is None or not tensor.is_meta or (isinstance(module, Quantised) and key != "bias"):
                continue
            slot = by_tensor.setdefault(id(tensor), _Slot(tensor))
            slot.places.append((module, key))
            name = f"{bare}.{key}" if bare else key
            if name in slots and slots[name] is not slot:  # a copy that peft trains next to the original
                slots[name].places.append((module, key))
            else:
                slots[name] = slot
    return slots


def _put(slot: _Slot, value: torch.Tensor, device: torch.device) -> None:
    if slot.quantised is not None:
        slot.quantised.take(value)
        return
    made: dict[int, torch.Tensor] = {}
    for module, key in slot.places:
        old = getattr(module, key)
        if not old.is_meta:
            continue
        if isinstance(old, nn.Parameter):
            fresh = made.get(id(old))
            if fresh is None:
                copied = (value.clone() if made or not value.is_cuda else value).to(device, old.dtype)
                fresh = made[id(old)] = nn.Parameter(copied, requires_grad=old.requires_grad)
            module._parameters[key] = fresh  # type: ignore[assignment]
        else:
            module._buffers[key] = value


def _initialise_buffers(model: nn.Module, skeleton: Any, device: torch.device, prefix: str) -> None:
    """Initialise what is in no file, such as the frequencies of rotary embeddings, as transformers does."""
    places = [
        (module, key, f"{bare_name(name)}.{key}" if bare_name(name) else key)
        for name, module in model.named_modules(remove_duplicate=False)
        for key, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and f"{name}.".startswith(prefix)
    ]
    if not places:
        return
    for tensor in skeleton.parameters():
        tensor._is_hf_initialized = True
    skeleton._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
    skeleton.initialize_weights()
    buffers = dict(skeleton.named_buffers(remove_duplicate=False))
    for module, key, name in places:
        module._buffers[key] = buffers[name].to(device)


def _set(module: Any, name: str, tensor: torch.Tensor) -> None:
    path, _, key = name.rpartition(".")
    holder = module.get_submodule(path)
    if key in holder._buffers:
        holder._buffers[key] = tensor
    else:
        is_parameter = isinstance(tensor, nn.Parameter)
        holder._parameters[key] = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)


def _get(module: Any, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path), key)
    return found


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadInput(f"{folder / INDEX} is not a valid weight index: {error}") from error
        files = [folder / Path(name).name for name in names]
    else:
        files = [folder / SINGLE]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        others = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {others[0]} is a pickle, which is never read: convert it to safetensors" if others else ""
        raise BadInput(f"model directory {folder} has no {missing.name}{hint}")
    return files


def _keys(file: Path) -> list[str]:
    with _opened(file) as reader:
        return list(reader.keys())


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        reader = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error
    with reader as opened:
        yield opened
