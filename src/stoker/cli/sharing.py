"""Implements `stoker models push`: prepares a model's folder, and sends it to its destination."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stoker import exports, object_store, storage, store_urls
from stoker.errors import BadInput
from stoker.exports import Exported
from stoker.language.shape import SIZES
from stoker.recipes import image_shape, text_shape
from stoker.report import card
from stoker.run import artifacts
from stoker.run.state import RunView

log = logging.getLogger("stoker")

_HUB = "hub:"


@dataclass(frozen=True)
class Destination:
    """The destination of a model."""

    name: str
    """The name that others load the model by."""
    send: Callable[[Path], str]
    """Sends a folder there; returns the model's new location."""
    revision: str | None = None
    """The revision on the hub; None for the default."""


def destination(to: str, *, private: bool) -> Destination:
    """Parse `hub:org/name`, the URL of a folder in an object store, or a local folder. Raises BadInput.

    Args:
        private: whether a new repository on the hub is private.
    """
    if to.startswith(_HUB):
        reference = to.removeprefix(_HUB)
        name, _, revision = reference.partition("@")
        from stoker.language import hub

        hub.check_push(name)

        def push(folder: Path) -> str:
            return hub.push(folder, reference, private=private)

        return Destination(name, push, revision or None)
    if store_urls.is_url(to):
        store_urls.check(to)

        def upload(folder: Path) -> str:
            object_store.upload(folder, to)
            return to

        return Destination(to, upload)
    target = Path(to).expanduser()
    if target.exists():
        raise BadInput(
            f"{target} already exists: give a new folder, hub:org/name, or a URL such as s3://bucket/folder"
        )

    def move(folder: Path) -> str:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".push-") as scratch:
            shutil.copytree(folder, Path(scratch) / "model").rename(target)
        return str(target.absolute())

    return Destination(str(target), move)


def prepare(
    seen: RunView,
    made: Exported,
    merged: Path,
    *,
    name: str,
    merge: bool,
    base: str | None,
    revision: str | None = None,
) -> Path:
    """The folder to send, with its model card: the exported one, or a new one for a merged model.

    Args:
        merged: the folder for a merged model.
        name: the name that others load the model by.
        merge: whether to merge an adapter into its base model.
        base: the adapter's base model.
        revision: the revision on the hub; None for the default.

    Raises:
        BadInput: there is no adapter to merge, or its base model cannot be found.
    """
    adapter = exports.is_adapter(made.folder)
    if not adapter and (merge or base):
        raise BadInput(f"run {seen.directory.id!r} trained a full model: --merge and --base are for adapters")
    folder = made.folder
    of = _base(made.folder, base) if adapter else _trained_from(seen)
    if merge:
        from stoker.language import merging

        merging.merge(made.folder, merged, base)
        folder = merged
    elif adapter and not of:
        log.warning("the adapter does not say which model it is for: others need that to use it, give --base")
    elif of and adapter and Path(of).is_dir():
        log.warning(
            "the adapter's base model is the local folder %s: for others, give --base org/name or --merge",
            of,
        )
    about = card.About(
        name=name,
        revision=revision,
        kind="adapter" if adapter and not merge else "model",
        step=made.checkpoint.step if made.checkpoint else seen.step,
        base=of,
        merged=merge,
        task=artifacts.task_of(folder),
        chat=_has_template(folder),
        classes=_classes(folder),
        base_config=storage.read_json(folder / exports.BASE).get("config", {}),
        metrics=made.checkpoint.metrics if made.checkpoint else None,
    )
    card.write(seen, folder, about)
    return folder


def _classes(folder: Path) -> list[str]:
    """The labels of a classifier, in the order of its outputs."""
    if artifacts.task_of(folder) in (None, "text-generation"):
        return []
    names = storage.read_json(folder / "config.json").get("id2label") or {}
    return [str(names[number]) for number in sorted(names, key=int)]


def _base(adapter: Path, given: str | None) -> str | None:
    """The adapter's base model; if one is given, it is written to the adapter's config."""
    file = adapter / exports.ADAPTER
    config = json.loads(file.read_text(encoding="utf-8"))
    if given is not None:
        from stoker.language import hub

        config["base_model_name_or_path"], config["revision"] = hub.named(given, Path(given))
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        beside = adapter / exports.BASE
        if beside.is_file():
            known = json.loads(beside.read_text(encoding="utf-8"))
            beside.write_text(json.dumps({**known, "model": given}), encoding="utf-8")
    return config["base_model_name_or_path"] or None


def _trained_from(seen: RunView) -> str | None:
    """The model that a run fine-tuned in full; None if it trained from scratch."""
    model = seen.config.get("model")
    sizes = {"llm": set(SIZES), "text": set(text_shape.SIZES), "image": set(image_shape.SIZES)}
    new = sizes.get(seen.recipe_name or "")
    return str(model) if new is not None and model not in new else None


def _has_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and "chat_template" in json.loads(file.read_text(encoding="utf-8"))
