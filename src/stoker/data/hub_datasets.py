"""Datasets of the Hugging Face hub, by their ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker.data.records import Record
from stoker.errors import BadInput, nearest

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ENDINGS = {".jsonl", ".parquet", ".txt", ".json", ".csv", ".tsv", ".md", ".gz", ".zst", ".zip"}
_ANSWER = 10.0  # seconds


def is_a_file_name(name: str) -> bool:
    """Whether a name that does not exist here was meant as a file: an id may hold dots too."""
    return Path(name).suffix.lower() in _ENDINGS or not _ID.fullmatch(name)


def check(name: str, known: Sequence[str] = ()) -> None:
    """Ask the hub, at once, whether it has a dataset.

    Args:
        known: other words that could have been meant.

    Raises:
        BadInput: it has none, it may not be read, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        HfApi().dataset_info(name, timeout=_ANSWER)
    except OfflineModeIsEnabled:
        return  # what was downloaded before may do
    except GatedRepoError as error:
        raise BadInput(
            f"dataset {name} is gated: accept its terms on the hub, and set HF_TOKEN to a token of yours"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInput(
            f"{name} is no file here, and no dataset of the hub (or private: set HF_TOKEN)"
            f"{nearest(name, known)}"
        ) from error
    except Exception as error:  # of a network, a proxy, a service: there is no list of what they raise
        raise BadInput(
            f"{name} is no file here, and the hub cannot be reached "
            f"({str(error).splitlines()[0]}). Give a file; or set HF_ENDPOINT to a mirror, HTTPS_PROXY to a "
            f"proxy, or HF_HUB_OFFLINE=1 where it was downloaded before{nearest(name, known)}"
        ) from error


def read(name: str, known: Sequence[str] = ()) -> Iterator[Record]:
    """The records of a dataset's train split, once the hub has answered. Raises BadInput, as `check`."""
    check(name, known)
    yield from rows(name, known)


def rows(name: str, known: Sequence[str] = ()) -> Iterator[Record]:
    """The records of the train split of what `datasets` loads. Raises BadInput."""
    for number, row in enumerate(_loaded(name, known, split="train"), start=1):
        yield f"{name}, row {number}", row


def splits(name: str, known: Sequence[str] = ()) -> Mapping[str, Any]:
    """Every split of what `datasets` loads, a `datasets.Dataset` each, by name. Raises BadInput."""
    found: Mapping[str, Any] = _loaded(name, known)
    return found


def revision(name: str) -> str:
    """The commit of a dataset that was loaded last, as the hub's cache has it; empty where it has none."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")
        return (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # also of a name that is no id
        return ""


def _loaded(name: str, known: Sequence[str], **which: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, **which)
    except Exception as error:  # a service and a parser for any format: there is no list of what they raise
        raise BadInput(
            f"{name} is no file here, and as a dataset of the hub it cannot be loaded: {error}"
            f"{nearest(name, known)}"
        ) from error
