"""Export folders of a run: its own export, or a checkpoint's weights in the same form.

The files are verified and copied to a folder, from which a model is registered, pushed, merged or used to
generate.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import storage
from stoker.checkpoint import manifest
from stoker.errors import BadInput, nearest
from stoker.run import artifacts, mirror
from stoker.run.journal import Event
from stoker.run.series import goal_of
from stoker.run.state import RunView

if TYPE_CHECKING:
    import torch

log = logging.getLogger("stoker")

ADAPTER = "adapter_config.json"
"""The file that marks a folder as that of an adapter."""
BASE = "base_model.json"
"""Saved with an adapter: which model it is for, by name and by its weights' checksums, and how the model's
positions were scaled."""
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
KINDS = ("model", "adapter")
SHAPE = "shape"
"""The artifact that describes the model of an unfinished run: an export without its weights."""


@dataclass(frozen=True)
class Exported:
    """A folder of model files."""

    folder: Path
    kind: str
    """model, adapter, or the kind of another artifact that was requested."""
    checkpoint: manifest.Checkpoint | None
    """The source of the weights; None: the run's final export."""


def make(
    seen: RunView,
    folder: Path,
    *,
    which: str | None = None,
    metric: str | None = None,
    artifact: str | None = None,
) -> Exported:
    """Fill an empty folder with what a run exported.

    Args:
        which: a checkpoint (best, last or a step) whose weights replace the final ones.
        metric: the metric that defines `best`; default: the one by which the run kept its best checkpoint.
        artifact: name of the artifact; default: the run's model or adapter.

    Raises:
        BadInput: there is no export, several, or a file differs from what was recorded.
    """
    found = exported(seen, artifact)
    checkpoint = chosen(seen, which, metric) if which else None
    if found is None and checkpoint is None:
        raise BadInput(
            f"run {seen.directory.id!r} has exported no model yet; give --checkpoint last or --artifact"
        )
    source = found or seen.artifacts.get(SHAPE)
    if source is not None:
        copy(seen, source, folder)
    elif _is_of_shipped_recipe(seen):
        run = seen.directory.id
        raise BadInput(
            f"run {run!r} has not recorded its model's config, without which the weights cannot be loaded: "
            f"resume it, which records it; `stoker checkpoints export {run} -o FILE.safetensors` exports the "
            "weights alone"
        )
    if checkpoint is not None:
        put_weights(checkpoint, folder)
    kind = "adapter" if is_adapter(folder) else "model"
    return Exported(folder, str(found["kind"]) if found else kind, checkpoint)


def _is_of_shipped_recipe(seen: RunView) -> bool:
    """Whether the run's recipe is one of stoker's, all of which describe their model.

    A checkpoint of any other run is exported as weights alone.
    """
    reference = seen.recipe_reference
    return reference is not None and ":" not in reference


def as_it_stands(seen: RunView) -> Path | None:
    """The folder of a run's own export, unverified; None if the run has exported no folder."""
    found = exported(seen, None)
    folder = None if found is None else seen.directory.path / found["path"]
    return folder if folder is not None and folder.is_dir() else None


def is_adapter(folder: Path) -> bool:
    """Whether a folder of model files holds an adapter."""
    return (folder / ADAPTER).is_file()


def chosen(seen: RunView, which: str, metric: str | None = None) -> manifest.Checkpoint:
    """The selected checkpoint, verified; see `make`. Raises BadInput."""
    path = meant(seen, which, metric)
    try:
        found = manifest.mended(path, mend(seen))
    except manifest.InvalidCheckpoint as error:
        raise BadInput(f"checkpoint {path.name} cannot be used: {error}") from error
    if which == "best":
        _warn_of_other_weights(seen, found, metric or seen.best)
    return found


def _warn_of_other_weights(seen: RunView, found: manifest.Checkpoint, metric: str) -> None:
    """Warn if the value by which a checkpoint is the best was measured before the steps that it has."""
    measured = measured_at(seen, metric, found.step)
    if measured is not None and measured != found.step:
        log.warning(
            "%s is the best by %s, which was measured at step %d: that of its own weights is not known. With "
            "checkpoint_best=true a run saves the weights that were measured",
            found.path.name, metric, measured,
        )  # fmt: skip


def measured_at(seen: RunView, metric: str, step: int) -> int | None:
    """The step at which the value of a metric that a checkpoint of a step has was measured."""
    steps = seen.points[metric].x if metric in seen.points else ()
    return max((int(one) for one in steps if one <= step), default=None)


def meant(seen: RunView, which: str, metric: str | None = None) -> Path:
    """The folder of the selected checkpoint, unverified; see `make`. Raises BadInput."""
    folder = seen.directory.checkpoints
    kept = {manifest.step_of(path): path for path in manifest.committed(folder)}
    if not kept:
        raise BadInput(f"run {seen.directory.id!r} has no checkpoint")
    if which == "best":
        return _best(seen, metric or seen.best)
    if which == "last":
        return kept[max(kept)]
    if which.isdigit() and int(which) in kept:
        return kept[int(which)]
    raise BadInput(
        f"no checkpoint {which!r}: give best, last, or one of the steps {', '.join(map(str, kept))}"
    )


def mend(seen: RunView) -> manifest.Mend | None:
    """A function that fetches a checkpoint's missing files from the run's object store; None without one."""
    copied = mirror.of(seen.directory)
    return copied.fetch_checkpoint if copied is not None else None


def _best(seen: RunView, metric: str) -> Path:
    goal = goal_of(metric, seen.goals)
    if goal is None:
        raise BadInput(
            f"it is not known whether low or high values of {metric!r} are better: say so in the script with "
            f"run.goal({metric}='min') or 'max'"
        )
    path = manifest.best(seen.directory.checkpoints, metric, goal)
    if path is None:
        raise BadInput(
            f"no checkpoint of run {seen.directory.id!r} has a value of {metric!r}; choose another metric "
            "with --metric"
        )
    return path


def exported(seen: RunView, name: str | None) -> Event | None:
    """The artifact of that name, by default the run's only model or adapter. Raises BadInput."""
    if name is not None and name not in seen.artifacts:
        known = nearest(name, seen.artifacts) or f"; it has: {', '.join(seen.artifacts) or 'none'}"
        raise BadInput(f"run {seen.directory.id!r} has no artifact {name!r}{known}")
    if name is not None:
        return seen.artifacts[name]
    models = [event for event in seen.artifacts.values() if event["kind"] in KINDS]
    if len(models) > 1:
        names = ", ".join(event["name"] for event in models)
        raise BadInput(f"run {seen.directory.id!r} has several models: choose one with --artifact: {names}")
    return models[0] if models else None


def copy(seen: RunView, artifact: Event, folder: Path) -> None:
    """Copy an artifact's files. Raises BadInput if one differs from what was recorded."""
    base = seen.directory.path / artifact["path"]
    for file in artifact["files"]:
        place = seen.directory.path / file["path"]
        if not place.is_file() or storage.sha256(place) != file["sha256"]:
            raise BadInput(f"{place} is missing, or differs from what the run recorded: it cannot be used")
        target = folder / (place.relative_to(base) if place != base else place.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place, target)


def as_in_files(
    folder: Path, tensors: dict[str, torch.Tensor], *, alone: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a model in the layout of its files.

    In memory, transformers keeps the experts of a mixture in one tensor; in files, which other programs read,
    each expert has its own.

    Args:
        folder: holds the model's config; the tensors of anything but a causal language model are returned
            unchanged.
        tensors: emptied during the conversion, so that only one block at a time is in memory twice.
        alone: these tensors are the whole model: nothing else will be in the files.

    Raises:
        BadInput: `alone`, but parameters of the model are missing.
    """
    if artifacts.task_of(folder) != "text-generation":
        return tensors
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    if alone:
        _check_whole(model, tensors)
    made: dict[str, torch.Tensor] = {}
    for names in by_block(tensors):
        converted = revert_weight_conversion(model, {name: tensors.pop(name) for name in names})
        for name, tensor in converted.items():
            is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
            made[name] = (tensor.clone() if is_part else tensor).contiguous()
    return made


def _check_whole(model: Any, trained: Mapping[str, torch.Tensor]) -> None:
    """Raises BadInput if the model has parameters that were not trained, which the files would lack."""
    lacks = [name for name, _ in model.named_parameters() if name not in trained]
    if lacks:
        raise BadInput(
            f"a checkpoint holds only trained weights, and {lacks[0]} was not trained: export the model when "
            "the run has ended, because only the run's own export is complete"
        )


def by_block(names: Iterable[str]) -> list[list[str]]:
    """Group names of tensors by their block; names outside any block form one group."""
    found: dict[str, list[str]] = {}
    for name in names:
        number = re.match(r"(.*?\.\d+)\.", name)
        found.setdefault(number[1] if number else "", []).append(name)
    return list(found.values())


def _by_peft(name: str) -> str:
    """The name of an adapter's tensor in peft's files, from its name in the model."""
    name = name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name
    return re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", name)


def cast(folder: Path, precision: str) -> None:
    """Convert a folder's weights to fp32, bf16 or fp16, and update its config.

    Raises BadInput if a value is too large for that precision.
    """
    from safetensors.torch import load_file, save_file
    from stoker.engine.precision import DTYPES

    dtype, total = DTYPES[precision], 0
    for file in sorted(folder.rglob("*.safetensors")):
        held = load_file(file)
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in held.items()}
        lost = next(
            (n for n, t in tensors.items() if not t.isfinite().all() and held[n].isfinite().all()), None
        )
        if lost is not None:
            raise BadInput(f"--dtype {precision}: {lost} has values outside its range; use bf16")
        save_file(tensors, file, {"format": "pt"})
        storage.permit_as_folder(file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if index := storage.read_json(folder / _INDEX):
        index["metadata"]["total_size"] = total
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if config := storage.read_json(folder / _CONFIG):
        name = str(dtype).removeprefix("torch.")
        parts = [config, *(part for part in config.values() if isinstance(part, dict) and "dtype" in part)]
        for part in parts:
            part["dtype"] = name
        (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def put_weights(checkpoint: manifest.Checkpoint, folder: Path) -> None:
    """Replace the exported weights with a checkpoint's, under the same names."""
    from safetensors.torch import load_file, save_file
    from stoker.checkpoint import store

    trained = load_file(store.export_model(checkpoint, folder / ".checkpoint.safetensors"))
    (folder / ".checkpoint.safetensors").unlink()
    there = sorted(folder.rglob("*.safetensors"))
    if is_adapter(folder):
        plain = {_by_peft(name): tensor for name, tensor in trained.items()}
    else:
        plain = as_in_files(folder, trained, alone=not there)
    if not there:
        file = folder / ("adapter_model.safetensors" if is_adapter(folder) else "model.safetensors")
        save_file(plain, file, {"format": "pt"})
        storage.permit_as_folder(file)
        return
    known = {name for file in there for name in load_file(file)}
    lost, kept = sorted(plain.keys() - known), sorted(known - plain.keys())
    if lost and kept:  # only `lost`: tied weights; only `kept`: weights that were not trained
        raise BadInput(
            f"weights have other names in the run's export ({kept[0]}) than in its checkpoint ({lost[0]}): "
            "to export them under the checkpoint's names, give -o FILE.safetensors"
        )
    for file in there:
        tensors = load_file(file)
        save_file({name: plain.get(name, old) for name, old in tensors.items()}, file, {"format": "pt"})
        storage.permit_as_folder(file)
