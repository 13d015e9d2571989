"""The model registry: named, numbered versions of the models that runs made, stored in MLflow's registry.

A version is the run's own export, with a file that tells MLflow how to load it, and tags that identify the
run, its code and its data. A stage (staging, production, archived) is stored as an alias, which names at
most one version, and as a tag, which gives the stage of each version.
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
from stoker.run.state import RunView
from stoker.tracking import follower, ledger, store
from stoker.words import first_line

Stage: TypeAlias = Literal["staging", "production", "archived"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,127}")
_STAGE_TAG = "stage"
CHECKSUMS = "SHA256SUMS"
_PATIENCE = 30.0  # seconds for which shipping the run to a failing tracking server is retried


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
    """The step of the checkpoint that was registered; None for the run's final export."""
    lineage: dict[str, str] = field(default_factory=dict)
    """Its origin by name: code, data, artifacts used, config, metrics."""
    source: str = ""


class Registry:
    """MLflow's model registry, on the server that the environment names or in the embedded store."""

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
        """Register a folder of model files, including its checksums, as the next version of a model.

        `about` is added to the lineage taken from the run. Raises BadInput, StokerError.
        """
        if not _NAME.fullmatch(name):
            raise BadInput(f"{name!r} is not a valid model name: use letters, digits, '.', '_' and '-'")
        run = self._shipped(view.directory)
        with self._errors_translated(), tempfile.TemporaryDirectory(prefix="stoker-model-") as scratch:
            packed = _packed(folder, Path(scratch) / "model", kind)
            place = f"registered/{name}/{uuid.uuid4().hex[:8]}"
            self._client.log_artifacts(run, str(packed), place)
            self._make_model(name)
            made = self._client.create_model_version(
                name, source=f"runs:/{run}/{place}", run_id=run, tags=_lineage_tags(view, kind, about)
            )
        return self.version(f"{name}@{made.version}")

    def models(self) -> list[Version]:
        """Every version of every model, by model; the newest version of each first."""
        with self._errors_translated():
            return [version for name in self._names() for version in self._versions(name)]

    def versions(self, name: str) -> list[Version]:
        """The versions of a model, the newest first. Raises BadInput if there is no such model."""
        from mlflow.exceptions import MlflowException

        with self._errors_translated():
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
        """The version for `NAME@3`, `NAME@production`, or `NAME` (the newest). Raises BadInput."""
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
        """Move a version to a stage. Others that were in it are archived, if it is staging or production."""
        version = self.version(reference)
        with self._errors_translated():
            # First, in one request: at every moment, also after a kill, there is a version of that stage.
            self._client.set_registered_model_alias(version.name, stage, str(version.version))
            for known in self._versions(version.name):
                if known.version == version.version:
                    self._set_stage(known, stage)
                elif known.stage == stage != "archived":
                    self._set_stage(known, "archived")
        return self.version(f"{version.name}@{version.version}")

    def pull(self, reference: str, target: Path) -> Path:
        """Copy a version's files to a new or empty folder and check them. Raises BadInput, StokerError."""
        version = self.version(reference)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise BadInput(f"{target} is there already: give another folder with -o")
        from mlflow import artifacts

        with self._errors_translated(), tempfile.TemporaryDirectory(prefix="stoker-model-") as scratch:
            where = self._client.get_model_version_download_uri(version.name, str(version.version))
            copied = artifacts.download_artifacts(where, dst_path=scratch, tracking_uri=self._uri)
            data = _data_of(Path(copied))
            _check(data, version)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(data, target, dirs_exist_ok=True)
        return target

    @functools.cached_property
    def _client(self) -> Any:
        """MLflow's client. Raises BadInput if no run was tracked yet."""
        if store.server_uri() is None and not store.database(self._runs).is_file():
            raise BadInput(f"nothing is tracked under {self._runs} yet: start a run first")
        from mlflow import MlflowClient

        if store.server_uri() is None:
            store.settle(self._runs)
        return MlflowClient(self._uri, self._uri)

    def _shipped(self, run: RunDirectory) -> str:
        """Ship the rest of the run to MLflow; returns its id there. Raises StokerError."""
        if not follower.follow(run, "mlflow", once=True, patience=_PATIENCE, hurry=True):
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
        for alias in set(STAGES) & set(version.aliases) - {stage}:
            self._client.delete_registered_model_alias(version.name, alias)
        self._client.set_model_version_tag(version.name, str(version.version), _STAGE_TAG, stage)

    @contextlib.contextmanager
    def _errors_translated(self) -> Iterator[None]:
        """Turns an MLflow exception into a StokerError of one line."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            where = store.without_credentials(self._uri)
            if isinstance(error.__context__, OSError):  # those of requests are OSErrors
                raise StokerError(
                    f"the MLflow server at {where} does not answer: start it, or set MLFLOW_TRACKING_URI"
                ) from error
            said = store.without_credentials(first_line(error))
            raise StokerError(f"the registry at {where} refused the request: {said}") from error


def _all(search: Callable[..., Any], **query: str) -> Iterator[Any]:
    """All results of an MLflow search, page by page."""
    token = None
    while True:
        page = search(**query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _packed(folder: Path, target: Path, kind: str) -> Path:
    """Wrap a folder of files as an MLflow model, without pickle."""
    from mlflow import pyfunc

    language = {"model": ["transformers"], "adapter": ["transformers", "peft"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example")
        pyfunc.save_model(
            str(target),
            loader_module="stoker.integrations.mlflow",
            data_path=str(folder),
            pip_requirements=["stoker", "torch", "safetensors", *language.get(kind, [])],
            signature=_signature(artifacts.task_of(folder)),
        )
    return target


def _signature(task: str | None) -> Any:
    """The signature: texts to texts or labels, with parameters for generation; None for other tasks."""
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
    """The origin of a version, as MLflow tags."""
    code = view.record.get("code") or {}
    name = view.directory.name
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
    """The folder inside an MLflow model that holds the registered files. Raises StokerError."""
    found = [file.parent for file in packed.rglob(CHECKSUMS)]
    if len(found) != 1:
        raise StokerError("this version has no checksums: it was not registered by stoker")
    return found[0]


def _check(data: Path, version: Version) -> None:
    """Raises StokerError if a file differs from the registered one."""
    for line in (data / CHECKSUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        if not (data / name).is_file() or storage.sha256(data / name) != digest:
            raise StokerError(f"{name} of {version.name}@{version.version} does not match its checksum")


def write_checksums(folder: Path) -> None:
    """Write the checksum file, in the format of `sha256sum -c`."""
    lines = [
        f"{storage.sha256(file)}  {file.relative_to(folder)}\n"
        for file in storage.files_under(folder)
        if file.name != CHECKSUMS
    ]
    (folder / CHECKSUMS).write_text("".join(lines))
