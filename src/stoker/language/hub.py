"""Where a model, an adapter or a tokenizer is: a local directory, or an id on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from stoker import storage
from stoker.errors import BadInput

_DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.txt")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def find(reference: str, what: str = "model", *, known: Sequence[str] = (), weights: bool = True) -> Path:
    """The directory of a model: as given, or brought from the hub (or from what was brought before).

    Args:
        reference: a directory, or an id such as `org/name`, or `org/name@revision`.
        what: the key by which it was given, for messages.
        known: other words that could have been meant.
        weights: whether its weights are brought as well.

    Raises:
        BadInput: there is none, it may not be read, or the hub cannot be reached.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists() or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        or_size = f", or a size: {', '.join(known)}" if known else ""
        raise BadInput(f"{what} {reference} is not a directory; give a directory, or a hub id{or_size}")
    name, _, revision = reference.partition("@")
    patterns = [*_DESCRIPTION, *(WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError as error:
        raise BadInput(
            f"{what} {name} is gated: accept its terms on the hub, and set HF_TOKEN to a token of yours"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInput(
            f"{what} {name} is no directory here and not on the hub (or private: set HF_TOKEN)"
        ) from error
    except (OSError, HfHubHTTPError) as error:
        raise BadInput(
            f"{what} {reference} is no directory here, and the hub cannot be reached "
            f"({str(error).splitlines()[0]}). Give a local directory; or set HF_ENDPOINT to a mirror, "
            "HTTPS_PROXY to a proxy, or HF_HOME to where a machine with a network has downloaded it"
        ) from error


def read_json(folder: Path, name: str, what: str) -> dict[str, Any]:
    """A JSON file of a model's directory. Raises BadInput where it is not there, or is none."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise BadInput(f"{what} directory {folder} has no {name}; it holds {held}") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{folder / name} holds a {type(content).__name__}: it must be an object")
    return content


def fingerprint(folder: Path) -> str:
    """SHA-256 over the checksums of the weights in a directory."""
    sums = [storage.xxh3(file) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()
