"""Datasets on the Hugging Face hub, by their ids.

An id can say more than owner and name: `org/name@revision` is a branch, a tag or a commit, `org/name#config`
one of its configs, `org/name#config/split` a split other than train, and `org/name#/split` a split of the
default config. A split can be sliced as in `datasets`: `train[:20%]`, `train[1000:2000]`, `train[-5%:]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.data import called
from stoker.data.records import Record
from stoker.errors import BadInput, nearest
from stoker.words import counted, first_line, some

if TYPE_CHECKING:
    from datasets import DatasetBuilder

GATED = "is gated: accept its terms on the hub, and set HF_TOKEN to one of your tokens"
NO_REVISION = "has no revision {}: give one of its branches, tags or commits"
"""Follows the name of a dataset or a model in messages."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ENDINGS = {".jsonl", ".parquet", ".txt", ".json", ".csv", ".tsv", ".md", ".gz", ".zst", ".zip"}
_ANSWER = 10.0  # seconds
_SHOWN = 20  # configs or splits listed in a message
_MANY = 10**9  # rows of a split whose number is not known yet


@dataclass(frozen=True)
class Id:
    """The parts of an id; those not given are empty."""

    name: str
    """`org/name`, or just `name`."""
    revision: str
    config: str
    split: str


def parse(given: str) -> Id:
    """Split an id into its parts."""
    where, _, part = given.partition("#")
    name, _, revision = where.partition("@")
    config, _, split = part.partition("/")
    return Id(name, revision, config, split)


def is_a_file_name(name: str) -> bool:
    """Whether a name that does not exist here was meant as a file: ids can contain dots too."""
    return Path(name).suffix.lower() in _ENDINGS or not _NAME.fullmatch(parse(name).name)


def check(given: str, known: Sequence[str] = ()) -> None:
    """Ask the hub whether a dataset exists, with its revision, config and split.

    Args:
        known: other words that could have been meant.

    Raises:
        BadInput: it does not exist, access is not allowed, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = parse(given)
    try:
        about = HfApi().dataset_info(asked.name, revision=asked.revision or None, timeout=_ANSWER)
        if about.gated:  # its existence is public, its files are not
            HfApi().auth_check(asked.name, repo_type="dataset")
    except OfflineModeIsEnabled:
        return  # an earlier download may be enough
    except GatedRepoError as error:
        raise BadInput(f"dataset {asked.name} {GATED}") from error
    except RevisionNotFoundError as error:
        raise BadInput(f"dataset {asked.name} {NO_REVISION.format(asked.revision)}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInput(
            f"{asked.name} is neither a local file nor a dataset on the hub (if it is private, set HF_TOKEN)"
            f"{nearest(asked.name, known)}"
        ) from error
    except Exception as error:  # network, proxy and service raise all kinds of errors
        raise BadInput(
            f"{asked.name} is not a local file, and the hub cannot be reached "
            f"({first_line(error)}). Give a file; or set HF_ENDPOINT to a mirror, HTTPS_PROXY to a "
            f"proxy, or HF_HUB_OFFLINE=1 if it was downloaded before{nearest(asked.name, known)}"
        ) from error
    _split(given, _builder(given, known))


def read(given: str, known: Sequence[str] = ()) -> Iterator[Record]:
    """The records of a dataset's split, after the hub has answered. Raises BadInput like `check`."""
    check(given, known)
    builder = _builder(given, known)
    split = _split(given, builder)
    for number, row in enumerate(_prepared(given, builder, split), start=1):
        yield f"{given}, row {number}", called.of_a_column(row)


def splits(given: str, known: Sequence[str] = ()) -> Mapping[str, Any]:
    """The splits of a dataset by name, each a `datasets.Dataset`; an id with a split gives it as train.

    Raises BadInput.
    """
    builder = _builder(given, known)
    if parse(given).split:
        return {"train": _prepared(given, builder, _split(given, builder))}
    found: Mapping[str, Any] = _prepared(given, builder, None)
    return found


def files(given: str) -> tuple[str, list[str]]:
    """The URL of a dataset's folder at its current commit, and the files of the split in it.

    Raises BadInput, also if the hub is not asked.
    """
    builder = _builder(given, ())
    split = _split(given, builder)
    if not builder.config.data_files:
        raise BadInput(f"{given}: streaming reads from the hub, which is offline: omit streaming=true")
    folder = f"hf://datasets/{parse(given).name}@{builder.hash}"
    if split not in builder.config.data_files:
        raise BadInput(
            f"{given}: a slice cannot be streamed, since rows are not counted in advance: omit "
            "streaming=true, or name a whole split"
        )
    urls: Sequence[str] = builder.config.data_files[split]
    elsewhere = [url for url in urls if not url.startswith(f"{folder}/")]
    if elsewhere:
        raise BadInput(f"{given} has files outside the hub ({elsewhere[0]}): omit streaming=true")
    return folder, [url.removeprefix(f"{folder}/") for url in urls]


def revision(given: str) -> str:
    """The commit of a dataset loaded last, according to the hub's cache; empty if it is not there."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    asked = parse(given)
    if _COMMIT.fullmatch(asked.revision):
        return asked.revision
    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=asked.name, repo_type="dataset")
        return (folder / "refs" / (asked.revision or "main")).read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # also for a name that is not an id
        return ""


def _builder(given: str, known: Sequence[str]) -> DatasetBuilder:
    """The builder of a dataset. Raises BadInput, listing the configs if the requested one does not exist."""
    from datasets import load_dataset_builder

    asked = parse(given)
    try:
        found = load_dataset_builder(asked.name, asked.config or None, revision=asked.revision or None)
    except Exception as error:  # a service and parsers for many formats raise all kinds of errors
        configs = _configs(asked) if isinstance(error, ValueError) else []
        if configs and asked.config not in configs:
            wrong = f"no config {asked.config}" if asked.config else "several configs"
            raise BadInput(
                f"dataset {asked.name} has {wrong}: use one of {some(configs, _SHOWN)}, as in "
                f"{_written(asked, configs[0])}{nearest(asked.config, configs)}"
            ) from error
        raise BadInput(
            f"{given} is not a local file, and cannot be loaded as a hub dataset: {error}"
            f"{nearest(given, known)}"
        ) from error
    if asked.revision and not found.config.data_files and found.hash != revision(given):  # from a cache
        raise BadInput(
            f"{given}: the hub was not asked, and the downloaded revision is a different one ({found.hash})"
        )
    return found


def _configs(asked: Id) -> list[str]:
    from datasets import get_dataset_config_names

    try:
        return list(get_dataset_config_names(asked.name, revision=asked.revision or None))
    except Exception:  # then the error says why the dataset cannot be loaded
        return []


def _split(given: str, builder: DatasetBuilder) -> str:
    """The requested split, or slice. Raises BadInput, listing the existing splits, if it does not exist."""
    asked = parse(given)
    split = asked.split or "train"
    names = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
    if _is_sliced(split):
        _check_slice(given, builder, split, names)
    elif names and split not in names:
        raise BadInput(
            f"dataset {given} has no split {split}: use one of {some(names, _SHOWN)}, as in "
            f"{_written(asked, asked.config, names[0])}{nearest(asked.split, names)}"
        )
    return split


def _is_sliced(split: str) -> bool:
    """Whether this is more than the name of a split: a slice, or a sum."""
    return "[" in split or "+" in split


def _check_slice(given: str, builder: DatasetBuilder, split: str, names: Sequence[str]) -> None:
    """Raises BadInput for a slice that `datasets` cannot read, or that is empty as far as rows are known.

    Args:
        names: the existing splits; empty if they are not known.
    """
    from datasets import ReadInstruction

    rows = {name: builder.info.splits[name].num_examples for name in builder.info.splits or ()}
    try:
        wanted = ReadInstruction.from_spec(split)
        parts = wanted.to_absolute({name: rows.get(name) or _MANY for name in names}) if names else []
    except ValueError as error:
        raise BadInput(
            f"dataset {given}: {str(error).rstrip('.')}; a slice is written as train[:20%], train[1000:2000] "
            "or train[-5%:]"
        ) from error
    for part in parts:
        known = rows.get(part.splitname)
        if known and part.to <= part.from_:
            raise BadInput(
                f"dataset {given}: the slice is empty: {part.splitname} has {counted(known, 'row')}"
            )


def _written(asked: Id, config: str, split: str = "") -> str:
    revision = f"@{asked.revision}" if asked.revision else ""
    return f"{asked.name}{revision}#{config}" + (f"/{split}" if split else "")


def _prepared(given: str, builder: DatasetBuilder, split: str | None) -> Any:
    """A split, or all splits by name, after downloading. Raises BadInput."""
    try:
        builder.download_and_prepare()
        if split is not None and _is_sliced(split):  # now the numbers of rows are known
            _check_slice(given, builder, split, list(builder.info.splits or ()))
        return builder.as_dataset(split)
    except BadInput:
        raise
    except Exception as error:  # as in `_builder`
        raise BadInput(f"dataset {given} cannot be loaded: {error.__cause__ or error}") from error
