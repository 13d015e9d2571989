"""The registry: named, numbered versions of models that runs made. It is MLflow's.

A version is the run's own export with a file that tells MLflow how to load it, and tags that
lead back to the run, its code and its data. A stage (staging, production, archived) is both
an alias, which names one version, and a tag, which says of every version where it stands.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from stoker import storage
from stoker.errors import BadInput, StokerError, nearest
from stoker.run import artifacts
from stoker.run.directory import RunDirectory
from stoker.run.view import RunView
from stoker.tracking import follower, ledger, store

Stage: TypeAlias = Literal["staging", "production", "archived"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,127}")
_STAGE_TAG = "stage"
CHECKSUMS = "SHA256SUMS"
_PATIENCE = 30.0  # seconds that a tracking server may take to have the run


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    version: int
    created: float
    """Seconds since 1970."""
    stage: str
    aliases: list[str]
    run: str
    """`experiment/id`."""
    step: int | None
    """The step of the checkpoint that it was made from; None for the run's final export."""
    lineage: dict[str, str] = field(default_factory=dict)
    """Where it comes from: code, data, artifacts used, config, metrics; by name."""
    source: str = ""


class Registry:
    """MLflow's model registry: the server's that the environment names, else the embedded store's."""

    def __init__(self, runs: Path) -> None:
        quiet = {
            **store.QUIET,
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
        }
        for name, value in {**quiet, **store.IMPATIENT}.items():
            os.environ.setdefault(name, value)
        self._runs = runs
        self._uri = store.server_uri() or store.embedded_uri(runs)

    def register(
        self, view: RunView, name: str, folder: Path, *, kind: str, about: Mapping[str, str]
    ) -> Version:
        """Make a folder of model files, with its checksums, the next version of a model.

        `about` is what the run does not say of it by itself. Raises BadInput, StokerError.
        """
        if not _NAME.fullmatch(name):
            raise BadInput(f"{name!r} is not a valid model name: use letters, digits, '.', '_' and '-'")
        run = self._shipped(view.directory)
        with self._said(), tempfile.TemporaryDirectory(prefix="stoker-model-") as scratch:
            packed = _packed(folder, Path(scratch) / "model", kind)
            place = f"registered/{name}/{uuid.uuid4().hex[:8]}"
            self._client.log_artifacts(run, str(packed), place)
            self._make_model(name)
            made = self._client.create_model_version(
                name, source=f"runs:/{run}/{place}", run_id=run, tags=_lineage_tags(view, kind, about)
            )
        return self.version(f"{name}@{made.version}")

    def models(self) -> list[Version]:
        """Every version of every model, by name, the newest first."""
        with self._said():
            return [version for name in self._names() for version in self._versions(name)]

    def versions(self, name: str) -> list[Version]:
        """The versions of a model, the newest first. Raises BadInput where there is none of that name."""
        from mlflow.exceptions import MlflowException

        with self._said():
            try:
                return self._versions(name)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
            names = self._names()
            known = f"; there are: {', '.join(names)}" if names else "; none is registered yet"
            raise BadInput(f"no model {name!r}{nearest(name, names) or known}")

    def _names(self) -> list[str]:
        return [model.name for model in _all(self._client.search_registered_models)]

    def version(self, reference: str) -> Version:
        """The version meant by `NAME@3`, `NAME@production`, or `NAME` for the newest. Raises BadInput."""
        name, _, which = reference.partition("@")
        found = self.versions(name)
        if not which:
            return found[0]
        for version in found:
            if which == str(version.version) or which in version.aliases:
                return version
        numbers = ", ".join(str(version.version) for version in reversed(found))
        aliases = sorted(alias for version in found for alias in version.aliases)
        also = f", and {', '.join(aliases)}" if aliases else ""
        raise BadInput(f"model {name!r} has no version {which!r}; it has {numbers}{also}")

    def promote(self, reference: str, stage: Stage) -> Version:
        """Give a version a stage. The one that had it before, if it is staging or production, is archived."""
        version = self.version(reference)
        with self._said():
            for other in self._versions(version.name):
                if other.version != version.version and other.stage == stage != "archived":
                    self._set_stage(other, "archived")
            for alias in set(STAGES) & set(version.aliases) - {stage}:
                self._client.delete_registered_model_alias(version.name, alias)
            self._set_stage(version, stage)
            self._client.set_registered_model_alias(version.name, stage, str(version.version))
        return self.version(f"{version.name}@{version.version}")

    def pull(self, reference: str, target: Path) -> Path:
        """Copy a version's files to a new or empty folder, checked; returns the folder. Raises BadInput."""
        version = self.version(reference)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise BadInput(f"{target} is there already: give another folder with -o")
        from mlflow import artifacts

        with self._said(), tempfile.TemporaryDirectory(prefix="stoker-model-") as scratch:
            where = self._client.get_model_version_download_uri(version.name, str(version.version))
            copied = artifacts.download_artifacts(where, dst_path=scratch, tracking_uri=self._uri)
            data = _data_of(Path(copied))
            _check(data, version)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(data, target, dirs_exist_ok=True)
        return target

    @functools.cached_property
    def _client(self) -> Any:
        """MLflow's client. Raises BadInput where no run was tracked yet."""
        if store.server_uri() is None and not store.database(self._runs).is_file():
            raise BadInput(f"nothing is tracked under {self._runs} yet: start a run first")
        from mlflow import MlflowClient

        if store.server_uri() is None:
            store.settle(self._runs)
        return MlflowClient(self._uri, self._uri)

    def _shipped(self, run: RunDirectory) -> str:
        """The run's id in MLflow, once MLflow has the run."""
        if not follower.follow(run, "mlflow", once=True, patience=_PATIENCE):
            known = ledger.load(ledger.file_of(run, "mlflow"))
            raise StokerError(
                f"run {run.id!r} cannot be shipped to {known.where or self._uri}: {known.error}"
            )
        found = ledger.load(ledger.file_of(run, "mlflow")).run
        assert found is not None, "a run that was shipped has an id"
        return found

    def _make_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _versions(self, name: str) -> list[Version]:
        aliases: dict[int, list[str]] = {}
        for alias, number in self._client.get_registered_model(name).aliases.items():
            aliases.setdefault(int(number), []).append(alias)
        found = _all(self._client.search_model_versions, filter_string=f"name='{name}'")
        versions = [_version(one, sorted(aliases.get(int(one.version), []))) for one in found]
        return sorted(versions, key=lambda v: -v.version)

    def _set_stage(self, version: Version, stage: Stage) -> None:
        if stage == "archived":
            for alias in version.aliases:
                if alias in STAGES:
                    self._client.delete_registered_model_alias(version.name, alias)
        self._client.set_model_version_tag(version.name, str(version.version), _STAGE_TAG, stage)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """What MLflow raises, as one line."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            where = store.without_credentials(self._uri)
            said = store.without_credentials(str(error)).splitlines()[0]
            raise StokerError(f"the registry at {where} refused the request: {said}") from error


def _all(search: Callable[..., Any], **query: str) -> Iterator[Any]:
    """What a search of MLflow's finds, of which an answer has one page."""
    token = None
    while True:
        page = search(**query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _packed(folder: Path, target: Path, kind: str) -> Path:
    """An MLflow model around a folder of files, which nothing unpickles."""
    from mlflow import pyfunc

    language = {"model": ["transformers"], "adapter": ["transformers", "peft"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example")
        pyfunc.save_model(
            str(target),
            loader_module="stoker.tracking.served",
            data_path=str(folder),
            pip_requirements=["stoker", "torch", "safetensors", *language.get(kind, [])],
            signature=_signature(artifacts.task_of(folder)),
        )
    return target


def _signature(task: str | None) -> Any:
    """Texts in, texts or labels out, and what may be said of how; None of what predicts nothing by itself."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    params = [ParamSpec("max_new_tokens", "long", 128), ParamSpec("do_sample", "boolean", False)]
    if task not in ("text-generation", "text-classification"):
        return None
    return ModelSignature(
        Schema([ColSpec("string")]),
        Schema([ColSpec("string")]),
        ParamSchema(params) if task == "text-generation" else None,
    )


def _lineage_tags(view: RunView, kind: str, about: Mapping[str, str]) -> dict[str, str]:
    """Where a version comes from, as MLflow's tags."""
    code = view.record.get("code") or {}
    name = f"{view.directory.experiment}/{view.directory.id}"
    tags = {
        "stoker.run": name,
        "stoker.path": str(view.directory.path.absolute()),
        "stoker.kind": kind,
        "stoker.code.commit": str(code.get("commit") or ""),
        "stoker.code.dirty": str(code.get("dirty") or False).lower(),
        **{f"stoker.{key}": value for key, value in view.tags.items() if key.startswith("fingerprint.")},
        **{
            f"stoker.used.{u.name}": f"{u.run['experiment']}/{u.run['id']}"
            for u in view.used.values()
            if u.run
        },
        **{f"stoker.{key}": value for key, value in about.items()},
    }
    return {key: value[:5000] for key, value in tags.items() if value}


def _version(found: Any, aliases: list[str]) -> Version:
    tags: Mapping[str, str] = found.tags
    step = tags.get("stoker.step", "")
    from_checkpoint = tags.get("stoker.from_checkpoint") == "true"
    return Version(
        name=found.name, version=int(found.version), created=found.creation_timestamp / 1000,
        stage=tags.get(_STAGE_TAG, ""), aliases=aliases, run=tags.get("stoker.run", ""),
        step=int(step) if from_checkpoint and step.isdigit() else None,
        lineage={k.removeprefix("stoker."): v for k, v in sorted(tags.items()) if k.startswith("stoker.")},
        source=found.source,
    )  # fmt: skip


def _data_of(packed: Path) -> Path:
    """The folder of an MLflow model that holds what was registered. Raises StokerError."""
    found = [file.parent for file in packed.rglob(CHECKSUMS)]
    if len(found) != 1:
        raise StokerError("this version has no checksums: it was not registered by stoker")
    return found[0]


def _check(data: Path, version: Version) -> None:
    """Refuse files that are not those that were registered. Raises StokerError."""
    for line in (data / CHECKSUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        if not (data / name).is_file() or storage.sha256(data / name) != digest:
            raise StokerError(f"{name} of {version.name}@{version.version} does not match its checksum")


def write_checksums(folder: Path) -> None:
    """Write what `sha256sum -c` reads."""
    lines = [
        f"{storage.sha256(file)}  {file.relative_to(folder)}\n"
        for file in storage.files_under(folder)
        if file.name != CHECKSUMS
    ]
    (folder / CHECKSUMS).write_text("".join(lines))
