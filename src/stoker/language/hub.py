"""Locates a model, an adapter or a tokenizer: a local directory, an object store's folder, or a hub id."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id
from stoker import exports, object_store, storage, store_urls
from stoker.checkpoint import manifest
from stoker.data import cached, hub_datasets
from stoker.errors import BadInput, nearest
from stoker.run import finding, view
from stoker.run.directory import RunDirectory
from stoker.run.state import RunView
from stoker.words import first_line

if TYPE_CHECKING:
    from stoker.user_run import Run

_DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.txt")
_OF_A_TOKENIZER = ("tokenizer*", "vocab*", "*.model")
_ANSWER = 10.0  # seconds
_SPARED = 60.0  # seconds for which a hub that did not answer is not asked again for what is already here
_SETTLED = 2 * 10**9  # nanoseconds
_NOT_REACHED = "the hub cannot be reached ({}). Set HF_ENDPOINT to a mirror, HTTPS_PROXY to a proxy"
_OURS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    exports.BASE,
    "chat_template.jinja",
)
_KINDS = {"lora.adapter": "adapter", "model or adapter": "model or adapter"}  # what is found, if not a model
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin",)


def find(
    reference: str,
    what: str = "model",
    *,
    known: Sequence[str] = (),
    weights: bool = True,
    pickles: bool = False,
) -> Path:
    """The directory of a model: as given, or downloaded.

    If the hub does not answer within 10 s, an earlier download is used; for a minute after that, no process
    of the user asks it again for what is already here.

    Args:
        reference: a directory (a run's directory means what the run has exported, that of a checkpoint its
            weights in the same form); a URL such as `s3://bucket/folder`; or an id such as `org/name`, or
            `org/name@revision`.
        what: the key by which it was given, for messages, and what is expected: `lora.adapter` is an adapter,
            `model or adapter` either, anything else a model.
        known: other words that could have been meant.
        weights: whether to download its weights too.
        pickles: whether to download them even if the hub has them only as pickles.

    Raises:
        BadInput: it does not exist, access is not allowed, there is no space, or the hub cannot be reached.
    """
    if not reference.strip():
        raise BadInput(f"{what} is empty: give a folder, a URL, or an id of the hub")
    if store_urls.is_url(reference):
        return _from_store(reference, what)
    path = Path(reference).expanduser()
    if path.is_dir():
        return _exported(path.absolute(), what)
    try:
        return _from_hub(reference, what, known, weights=weights, pickles=pickles)
    except BadInput as error:
        raise BadInput(f"{error}{_as_run(reference, what) or nearest(reference, known)}") from error


def record(run: Run, given: Mapping[str, str | None]) -> None:
    """Record the files and directories that keys name among the run's data, so that it can be repeated.

    Of a run's directory, which changes, that is what it has exported. A checkpoint is left out.

    Args:
        given: the values of keys such as `model`; those that are no paths are ignored.
    """
    for key, reference in given.items():
        path = Path(reference or "").expanduser().absolute()
        if not reference or store_urls.is_url(reference) or not path.exists():
            continue
        read = find(reference, key, weights=False) if path.is_dir() else path
        if read.is_relative_to(path):
            run.data(key, reference, part="" if read == path else str(read.relative_to(path)))


def _as_run(reference: str, what: str) -> str:
    """What to give where a reference is the name of a run in the default runs folder."""
    try:
        names = [finding.checked(name) for name in reference.split("/")]
    except BadInput:
        return ""
    where = "/".join(names if len(names) > 1 else ["*", *names])
    runs = (folder for folder in finding.given_folder(None).glob(where) if RunDirectory(folder).exists())
    return next((f"; for the run of that name give its folder: {what}={folder}" for folder in runs), "")


def _exported(folder: Path, what: str) -> Path:
    """The folder itself, or what its run has exported, or would have at a checkpoint. Raises BadInput."""
    run = RunDirectory(folder)
    if run.exists():
        found, of = exports.as_it_stands(view.load(run)), "run"
    elif (run := RunDirectory(folder.parent.parent)).exists() and folder.parent == run.checkpoints:
        found, of = _of_checkpoint(view.load(run), folder), "checkpoint of a run"
    else:
        return folder
    wanted = _KINDS.get(what, "model")
    if found is None:
        raise BadInput(f"{what} {folder} is a run without an exported {wanted}: it has exported nothing yet")
    kind = "adapter" if exports.is_adapter(found) else "model"
    if kind not in wanted:
        instead = (
            f"; to train it further, give it as lora.adapter={folder} beside its base as model; to merge it, "
            f"use `stoker models push {folder} DIRECTORY --merge`"
        )
        raise BadInput(
            f"{what} {folder} is a {of} without an exported {wanted}: it exported the {kind} {found}"
            f"{instead if (what, kind) == ('model', 'adapter') else ''}"
        )
    return found


def _of_checkpoint(seen: RunView, folder: Path) -> Path:
    """A checkpoint's weights as the files of a model or adapter, made once per content. Raises BadInput."""
    try:
        weights = manifest.sums(folder)
    except manifest.InvalidCheckpoint as error:
        raise BadInput(f"checkpoint {folder} cannot be used: {error}") from error
    form = exports.exported(seen, None) or {}
    named = cached.name(sorted(weights.items()), form.get("files"))

    def export(target: Path) -> None:
        target.mkdir()
        exports.make(seen, target, which=str(manifest.step_of(folder)))

    return cached.once(_in_cache(named), export)


def _in_cache(named: str) -> Path:
    """Where a model's folder is kept in the cache."""
    return storage.cache_folder() / "models" / named


def _below(url: str, found: Iterable[str]) -> str:
    """What to give instead of a run's URL."""
    exported = [kind for kind in exports.KINDS if any(key.startswith(f"artifacts/{kind}/") for key in found)]
    return f"give its export, {url}/artifacts/{exported[0]}" if exported else "it has exported nothing yet"


def _from_hub(reference: str, what: str, known: Sequence[str], *, weights: bool, pickles: bool) -> Path:
    path = Path(reference).expanduser()
    if path.exists() or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        or_size = f", or a size: {', '.join(known)}" if known else ""
        raise BadInput(f"{what} {reference} is not a directory: give a directory, or a hub id{or_size}")
    name, _, revision = reference.partition("@")
    wanted = [*_DESCRIPTION, *(WEIGHTS if weights else ())]
    bring = functools.partial(snapshot_download, name, revision=revision or None, allow_patterns=wanted)
    if time.time() - storage.modified(_silence()) / 1e9 < _SPARED and (here := _brought(bring)) is not None:
        return here
    try:
        about = HfApi().model_info(name, revision=revision or None, timeout=_ANSWER)
    except Exception as error:  # network, proxy and service raise all kinds of errors
        if isinstance(error, httpx2.TimeoutException):
            storage.try_to_write_json(_silence(), {"hub": constants.ENDPOINT})
        if not isinstance(error, RevisionNotFoundError) and (here := _brought(bring)) is not None:
            return here
        raise BadInput(_refusal(error, what, reference)) from error
    if pickles and not any(file.rfilename.endswith(".safetensors") for file in about.siblings or ()):
        wanted += _PICKLES
    try:
        return Path(bring())
    except Exception as error:  # and so does a disk
        raise BadInput(_unkept(error, what, reference) or _refusal(error, what, reference)) from error


def _brought(bring: Callable[..., str]) -> Path | None:
    """An earlier download, if there is one."""
    try:
        return Path(bring(local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _silence() -> Path:
    """A file of this user that is written whenever the hub does not answer."""
    hub = hashlib.sha256(constants.ENDPOINT.encode()).hexdigest()[:32]
    return storage.cache_folder() / "hub" / f"{hub}.silent"


def _refusal(error: Exception, what: str, reference: str) -> str:
    """The message if a model could not be downloaded from the hub."""
    name, _, revision = reference.partition("@")
    if isinstance(error, GatedRepoError):
        return f"{what} {name} {hub_datasets.GATED}"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"{what} {name} is neither a local directory nor on the hub (if it is private, set HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"{what} {name} {hub_datasets.NO_REVISION.format(revision)}"
    return (
        f"{what} {reference} is not a local directory, and {_NOT_REACHED.format(first_line(error))}, "
        "or HF_HOME to where a machine with a network has downloaded it; or give a local directory"
    )


def _unkept(error: Exception, what: str, reference: str) -> str:
    """The message if the disk is the reason that a model could not be downloaded; otherwise empty."""
    of_the_system = isinstance(error, OSError) and error.errno is not None
    if isinstance(error, ConnectionError) or not (of_the_system or os.strerror(errno.ENOSPC) in str(error)):
        return ""
    return (
        f"{what} {reference} cannot be stored in {constants.HF_HUB_CACHE} ({first_line(error)}): "
        "free space there, or set HF_HOME to a folder with enough"
    )


def _from_store(url: str, what: str) -> Path:
    """A folder of an object store, downloaded once per content. Raises BadInput, Unreachable."""
    store_urls.check(url, written=False)
    store = object_store.Store(url.rstrip("/"), "")
    found = store.objects()
    if not found:
        raise BadInput(f"{what} {url} is empty: give the folder that contains the model's files")
    if "run.json" in found:
        raise BadInput(f"{what} {url} is a run: {_below(url.rstrip('/'), found)}")
    named = cached.name(url, sorted(found.items()))

    def download(target: Path) -> None:
        for key in found:
            store.get(key, target / key)

    return cached.once(_in_cache(named), download)


def check_tokenizer(reference: str) -> None:
    """Raises BadInput if there is no tokenizer directory, local or on the hub."""
    folder = find(reference, "tokenizer", weights=False)
    if not has_tokenizer(folder):
        raise BadInput(f"tokenizer directory {folder} has no tokenizer.json or tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory has tokenizer files."""
    return any(any(folder.glob(pattern)) for pattern in _OF_A_TOKENIZER)


def named(reference: str, folder: Path) -> tuple[str, str | None]:
    """The name, and the hub revision, under which a model found in a folder can be found again."""
    if store_urls.is_url(reference):
        return reference, None
    if Path(reference).expanduser().is_dir():
        return str(folder), None
    name, _, revision = reference.partition("@")
    return name, revision or None


def push(folder: Path, reference: str, *, private: bool) -> str:
    """Upload a folder as a model on the hub, creating the model if needed; returns its address.

    Files of a different form of the model (full, or an adapter) are removed, all in one commit.

    Args:
        reference: `org/name`, or `org/name@revision`.
        private: whether a new model is private; an existing one is not changed.

    Raises:
        BadInput: the name is invalid, the token is missing or insufficient, or the hub cannot be reached.
    """
    name, _, revision = reference.partition("@")
    check_push(name)
    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision or None, commit_message="Pushed by stoker",
            delete_patterns=list(_OURS),
        )  # fmt: skip
    except HfHubHTTPError as error:
        raise BadInput(
            f"hub:{reference} refuses: {first_line(error)}; check what HF_TOKEN is allowed to do"
        ) from error
    except (OSError, httpx2.TransportError) as error:
        raise BadInput(f"hub:{reference}: {_NOT_REACHED.format(first_line(error))}") from error
    return str(made)


def check_push(name: str) -> None:
    """Raises BadInput if nothing can be pushed to a model of this name, or there is no token."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(f"hub:{name} is not a valid name: {first_line(error)}") from error
    if "/" not in name:
        raise BadInput(f"hub:{name}: give the owner too, as in hub:org/{name}")
    if get_token() is None:
        raise BadInput(f"hub:{name}: set HF_TOKEN to a token with write access (or run `hf auth login`)")


def read_json(folder: Path, name: str, what: str) -> dict[str, Any]:
    """A JSON file of a model's directory. Raises BadInput if it does not exist, or is invalid."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        held = ", ".join(sorted(p.name for p in folder.glob("*"))[:8]) or "nothing"
        adapter = what == "model" and (folder / exports.ADAPTER).is_file()
        hint = f": it is an adapter; give lora.adapter={folder}, and its base as model=" if adapter else ""
        raise BadInput(f"{what} directory {folder} has no {name}; it contains {held}{hint}") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{folder / name} contains a {type(content).__name__}: must be an object")
    return content


def fingerprint(folder: Path) -> str:
    """SHA-256 over the checksums of the weights in a directory.

    Files are read once on this machine until they change, since a launcher, its ranks and each restart of
    them ask for the same ones. Changes are detected from the file's metadata.
    """
    sums = [_checksum(file.resolve()) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def _checksum(file: Path) -> str:
    found = file.stat()
    state = (str(file), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    named = hashlib.sha256(repr(state).encode()).hexdigest()
    kept = storage.cache_folder() / "checksums" / f"{named}.json"
    known = storage.read_json(kept).get("xxh3")
    if known is None:
        known = storage.xxh3(file)
        if time.time_ns() - found.st_ctime_ns > _SETTLED:  # else it could change within a clock tick
            storage.try_to_write_json(kept, {"xxh3": known})
    return str(known)
