"""The MLflow sink: each stoker run is one MLflow run, across all its attempts.

This module imports mlflow, so only a follower imports it. MLflow stores a metric with the same key, time,
step and value only once, so a batch can safely be sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import orjson
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking.context.default_context import DefaultRunContext
from mlflow.utils.mlflow_tags import MLFLOW_USER
from stoker import storage
from stoker.errors import StokerError
from stoker.run import finding, media
from stoker.run.directory import BEST, SWEEP, RunDirectory
from stoker.status import FAILED, FINISHED, RUNNING
from stoker.tracking import identity, sink, store
from stoker.tracking.sink import Batch, Ending, SinkRun

log = logging.getLogger(__name__)

_METRICS_PER_REQUEST = 1000
_TEXTS_PER_REQUEST = 50  # MLflow accepts 100, but only 1 MB per request
_LONGEST_PARAM = 6000
_LONGEST_TAG = 5000  # MLflow accepts 8000, some databases fewer
_LONGEST_KEY = 250
_LARGEST_SHOWN_TABLE = 10_000  # rows; a larger one is stored only as Parquet
_NOTE = "mlflow.note.content"
_LONGEST_DIGEST = 36
_OMITTED = "\n\n…\n\n"
_PARENT = "mlflow.parentRunId"
_IDENTITY = "stoker.run"
_EDITION = "stoker.edition"
_ENDED = "stoker.status"
_ERROR = "stoker.error"
_BEST = "stoker.best"
_REPLACED = "stoker.replaced_by"
_REFUSED = re.compile(r"[^\w./\- :]")
_MISREAD = re.compile(r"[#?%;\\\x00-\x1f\x7f]")  # in names of files: in requests they have a meaning
_SPELLED = {"@": "__at__", "%": "__percent__"}
_SPELLINGS = re.compile("|".join(_SPELLED.values()))
_MEANT = {spelling: character for character, spelling in _SPELLED.items()}
_STATUS = {FINISHED: "FINISHED", FAILED: "FAILED"}  # all others are KILLED

# Without this tag the UI opens an experiment at its GenAI traces instead of its runs.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

_REFUSALS = (
    "ENDPOINT_NOT_FOUND", "RESOURCE_DOES_NOT_EXIST", "NOT_IMPLEMENTED", "FEATURE_DISABLED",
    "INVALID_PARAMETER_VALUE", "BAD_REQUEST",
)  # fmt: skip
"""Errors of a server that will not do something, however often it is asked."""

T = TypeVar("T")


class MlflowSink:
    """A run in MLflow, on the server that the environment names or in the embedded store."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._record = directory.record()
        self._runs = directory.path.absolute().parent.parent
        self._uri = store.server_uri() or store.embedded_uri(self._runs)
        self._client: MlflowClient | None = None
        self._run = ""
        self._can_delete = self._takes_inputs = True
        self._names: dict[str, str] = {}

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        """Find the MLflow run by its id or tag, or create it; ship the params and tags of the record."""
        self._client = self._connected()
        run = self._located(known, edition) or self._found_or_made(started, edition)
        experiment, self._run = run.info.experiment_id, str(run.info.run_id)
        parent = self._sweep(experiment)
        there = run.data.params  # which cannot be changed
        params = {name: value for name, value in self._params().items() if key(name) not in there}
        self._log_texts(params, {**self._tags(), **({_PARENT: parent} if parent else {})})
        self._log_data()
        where = store.without_credentials(self._uri).rstrip("/")
        if where.startswith("http"):
            return SinkRun(self._run, store.page(where, f"/{experiment}/runs/{self._run}"))
        return SinkRun(self._run, f"{where} run {self._run}")

    def ship(self, batch: Batch) -> None:
        """Store points, media, artifacts, params, tags and notes."""
        if batch.attempt_started:
            self._mlflow.update_run(self._run, status="RUNNING")
            self._mlflow.set_tag(self._run, _ENDED, RUNNING)
            self._delete_tag(_ERROR)
        for chunk in _chunks(batch.points, _METRICS_PER_REQUEST):
            metrics = [Metric(self._named(p.metric), p.value, int(p.time * 1000), p.step) for p in chunk]
            self._mlflow.log_batch(self._run, metrics=metrics)
        for event in batch.media:
            self._ship_media(event)
        places = [self._ship_artifact(name, event) for name, event in batch.artifacts.items()]
        kept = {name: value for name, value in batch.tags.items() if value is not None}
        params, changed = self._new_params(batch.params)
        self._log_texts(params, {**kept, **changed, **{k: v for place in places for k, v in place.items()}})
        for name in batch.tags.keys() - kept.keys():
            self._delete_tag(key(name))
        self._log_inputs([_used(event) for event in batch.used])
        if batch.notes:  # MLflow shows them as the run's description
            notes = _without_middle("\n\n".join(batch.notes), _LONGEST_TAG)
            self._mlflow.set_tag(self._run, _NOTE, notes)

    def conclude(self, ending: Ending) -> None:
        """Set the MLflow run's final status and end time, and, as tags, what MLflow has no status for."""
        self._log_texts({}, {_ENDED: ending.status, **({_ERROR: ending.error} if ending.error else {})})
        self._log_data()
        status = _STATUS.get(ending.status, "KILLED")
        self._mlflow.set_terminated(self._run, status, int(ending.time * 1000))

    def conclude_sweep(self) -> None:
        """End the MLflow run of the search that this run is a trial of; it gets the best trial's value."""
        self._client = self._connected()
        parent = self._sweep(self._experiment())
        if parent is None:
            return
        file = self._directory.path.parent / BEST
        best = storage.read_json(file)
        if best:
            found = {_BEST: best["run"], **{f"{_BEST}.{name}": v for name, v in best["params"].items()}}
            tags = {key(name): _cut(str(value), _LONGEST_TAG) for name, value in found.items()}
            for name in self._mlflow.get_run(parent).data.tags:
                if name.startswith(f"{_BEST}.") and name not in tags:  # of a trial that was the best before
                    self._mlflow.delete_tag(parent, name)
            since = int(file.stat().st_mtime * 1000)
            metric = Metric(key(best["metric"]), best["value"], since, 0)
            told = [RunTag(*tag) for tag in tags.items()][:_TEXTS_PER_REQUEST]
            self._mlflow.log_batch(parent, metrics=[metric], tags=told)
        self._mlflow.set_terminated(parent)

    def close(self) -> None:
        """There is nothing to release."""

    def _connected(self) -> MlflowClient:
        if store.server_uri() is None:
            with storage.locked(store.lock_file(self._runs)):
                make_store(store.database(self._runs))
                store.settle(self._runs)
        return MlflowClient(self._uri)

    @property
    def _mlflow(self) -> MlflowClient:
        assert self._client is not None, "open comes first"
        return self._client

    @property
    def _identity(self) -> str:
        """The unique tag by which the MLflow run is found if its id was lost."""
        return identity.of(self._directory)

    def _located(self, known: str | None, edition: str) -> Run | None:
        """The MLflow run that the ledger names; None if it cannot be used."""
        if known is None:
            return None
        try:
            run = self._mlflow.get_run(known)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None  # this is a different store than last time
            raise
        if edition and run.data.tags.get(_EDITION) != edition:
            return None  # this MLflow run is being replaced
        who = run.data.tags.get(_IDENTITY, self._identity)
        if identity.is_anothers(who, self._directory):
            return None  # the run and its ledger are copies
        if run.info.lifecycle_stage == LifecycleStage.DELETED:
            self._experiment()  # raises if the whole experiment was deleted
            raise StokerError(
                f"its run {known} was deleted in MLflow: "
                f"restore it there, or create another with `{self._rebuild}`"
            )
        if who != self._identity:
            self._mlflow.set_tag(known, _IDENTITY, self._identity)  # the run was renamed
        return run

    def _found_or_made(self, started: float, edition: str) -> Run:
        """Find the MLflow run by its tags, or create it; with an edition, mark the runs that it replaces."""
        experiment = self._experiment(restored=bool(edition))
        query = f"tags.`{_IDENTITY}` = '{self._identity}'"
        found = self._mlflow.search_runs([experiment], query)
        standing = [run for run in found if _REPLACED not in run.data.tags]
        mine = [run for run in standing if not edition or run.data.tags.get(_EDITION) == edition]
        made = mine[0] if mine else self._made(experiment, started, edition)
        for other in standing if edition else ():
            if other.info.run_id != made.info.run_id:
                self._mlflow.set_tag(other.info.run_id, _REPLACED, made.info.run_id)
        return made

    def _made(self, experiment: str, started: float, edition: str) -> Run:
        tags = {_IDENTITY: self._identity, **_user(), **({_EDITION: edition} if edition else {})}
        return self._mlflow.create_run(
            experiment, start_time=int(started * 1000), tags=tags, run_name=self._directory.id
        )

    @property
    def _rebuild(self) -> str:
        at = finding.option(self._directory.runs)
        return f"stoker sync {self._directory.name} --rebuild{at}"

    def _sweep(self, experiment: str) -> str | None:
        """The MLflow run of this trial's search, found by its tags or created; None if this is no trial.

        Another search can have the same name: one whose folder was deleted, or one on the same server.
        """
        file = self._directory.path.parent / SWEEP
        about = storage.read_json(file)
        if not about:
            return None
        name = self._directory.experiment
        tags = {"stoker.sweep": name, "stoker.sweep.uid": str(about["uid"])}
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        for run in self._mlflow.search_runs([experiment], query, max_results=1):
            if run.info.status != "RUNNING":
                self._mlflow.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        began = int(file.stat().st_mtime * 1000)  # it is written once
        made = self._mlflow.create_run(experiment, start_time=began, tags={**tags, **_user()}, run_name=name)
        settings = {k: v for k, v in about.items() if k not in ("space", "tries", "format")}
        texts = {**settings, **{f"space.{k}": v for k, v in about["space"].items()}}
        params = [Param(key(k), _cut(str(v), _LONGEST_PARAM)) for k, v in texts.items()]
        self._mlflow.log_batch(made.info.run_id, params=params[:_TEXTS_PER_REQUEST])
        return str(made.info.run_id)

    def _experiment(self, *, restored: bool = False) -> str:
        """The experiment, found by name or created. Raises StokerError if it was deleted.

        With `restored`, a deleted experiment is restored, since MLflow does not allow another of its name.
        """
        name = self._directory.experiment
        found = self._mlflow.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == LifecycleStage.DELETED:
                if not restored:
                    raise StokerError(
                        f"its experiment {name!r} was deleted in MLflow: restore it there, or with "
                        f"`{self._rebuild}`"
                    )
                self._mlflow.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        root = None if store.server_uri() else (store.artifacts(self._runs) / name).as_uri()
        try:
            made = self._mlflow.create_experiment(name, artifact_location=root, tags=_EXPERIMENT_TAGS)
            return str(made)
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":  # by another run's follower
                return self._experiment()
            raise

    def _params(self) -> dict[str, str]:
        """The config without values of None: the run may set those later, and a param cannot be changed."""
        return {name: str(value) for name, value in self._record["config"].items() if value is not None}

    def _new_params(self, values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
        """Values as params; and as tags, those whose param has another value, which cannot be changed."""
        if not values:
            return {}, {}
        known = self._mlflow.get_run(self._run).data
        texts = {name: _cut(str(value), _LONGEST_PARAM) for name, value in values.items()}
        has_other = {
            name
            for name, text in texts.items()
            if known.params.get(key(name), text) != text or key(f"stoker.params.{name}") in known.tags
        }
        return (
            {name: value for name, value in texts.items() if name not in has_other},
            {f"stoker.params.{name}": texts[name] for name in has_other},
        )

    def _tags(self) -> dict[str, str]:
        code, recipe = self._record.get("code") or {}, self._record.get("recipe") or {}
        tags = {
            "mlflow.runName": self._directory.id,
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": recipe.get("reference") or recipe.get("name") or _script(self._record),
            "mlflow.source.git.commit": code.get("commit"),
            "mlflow.source.git.branch": code.get("branch"),
            "mlflow.source.git.repoURL": code.get("remote"),
            "stoker.code.dirty": code.get("dirty"),
            "stoker.path": self._directory.path.absolute(),
        }
        return {name: str(value) for name, value in tags.items() if value is not None}

    def _log_texts(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        for chunk in _chunks(list(params.items()), _TEXTS_PER_REQUEST):
            texts = [Param(key(name), _cut(value, _LONGEST_PARAM)) for name, value in chunk]
            self._mlflow.log_batch(self._run, params=texts)
        for chunk in _chunks(list(tags.items()), _TEXTS_PER_REQUEST):
            cut = [RunTag(key(name), _cut(value, _LONGEST_TAG)) for name, value in chunk]
            self._mlflow.log_batch(self._run, tags=cut)

    def _log_data(self) -> None:
        """The data that the run has recorded so far, as inputs; MLflow stores each once."""
        recorded = storage.read_json(self._directory.provenance / "data.json").items()
        self._log_inputs([
            _input(name, one.get("fingerprint") or one.get("revision", ""), one.get("path", name))
            for name, one in recorded
        ])  # fmt: skip

    def _log_inputs(self, inputs: list[DatasetInput]) -> None:
        """Log inputs, unless the server knows no such thing: then all else is shipped without them."""
        if not inputs or not self._takes_inputs:
            return
        try:
            self._mlflow.log_inputs(self._run, inputs)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            self._takes_inputs = False
            log.warning("this MLflow server takes no inputs of runs (%s): they are not shipped", error)

    def _named(self, metric: str) -> str:
        """The name of a metric in MLflow; logs it once if it differs."""
        if metric not in self._names:
            self._names[metric] = key(metric)
            if self._names[metric] != metric:
                log.warning(
                    "MLflow refuses %r as the name of a metric: there it is %r", metric, self._names[metric]
                )
        return self._names[metric]

    def _ship_media(self, event: Mapping[str, Any]) -> None:
        """Copy a media file to the artifacts; tables and figures also in a form that MLflow shows."""
        folder, about = f"{event['kind']}s/{_stored(_path(event['name']))}", event["about"]
        if event["file"] is None:
            self._mlflow.log_dict(self._run, about, f"{folder}/step-{event['step']:08d}.json")
            return
        file = self._directory.path / event["file"]["path"]
        if not file.is_file():
            log.warning("%s is missing and was not shipped", file)
            return
        self._mlflow.log_artifact(self._run, str(file), folder)
        if event["kind"] == "table" and about["rows"] <= _LARGEST_SHOWN_TABLE:
            columns, rows = media.read_table(file.read_bytes())
            content = {"columns": columns, "data": rows}
            self._mlflow.log_text(self._run, _json(content), f"{folder}/{file.stem}.json")
        if file.name.endswith(".plotly.json"):
            name = file.name.removesuffix(".plotly.json")
            self._mlflow.log_text(self._run, plotly_page(file.read_text()), f"{folder}/{name}.html")

    def _delete_tag(self, name: str) -> None:
        with contextlib.suppress(MlflowException):  # there is no such tag
            self._mlflow.delete_tag(self._run, name)

    def _ship_artifact(self, name: str, event: Mapping[str, Any]) -> dict[str, str]:
        """Copy an artifact's files; if they are too large, returns a tag with their path instead.

        Files of the artifacts that it replaces are deleted in MLflow, unless they are overwritten.
        """
        root, files, tag = self._directory.path.absolute(), event["files"], f"stoker.artifact.{name}"
        paths = [PurePosixPath(file["path"]) for file in files]
        places = [] if sink.is_too_large(files) else _places(name, paths)
        self._delete_replaced(name, event["replaced"], places)
        if sink.is_too_large(files):
            return {tag: os.path.commonpath([root / path for path in paths])}
        if any(sink.is_too_large(before) for before in event["replaced"]):
            self._delete_tag(key(tag))
        for path, place in zip(paths, places, strict=True):
            if (root / path).is_file():
                self._ship_file(root / path, place)
            else:
                log.warning("artifact %s: %s is missing and was not shipped", name, root / path)
        return {}

    def _ship_file(self, file: Path, place: PurePosixPath) -> None:
        """Copy a file to its place in the artifacts: MLflow gives it the name that it has here."""
        folder = None if len(place.parts) == 1 else str(place.parent)
        if file.name == place.name:
            self._mlflow.log_artifact(self._run, str(file), folder)
            return
        with tempfile.TemporaryDirectory() as there:
            renamed = Path(there) / place.name
            renamed.symlink_to(file)
            self._mlflow.log_artifact(self._run, str(renamed), folder)

    def _delete_replaced(
        self, name: str, replaced: Sequence[Sequence[Mapping[str, Any]]], places: Sequence[PurePosixPath]
    ) -> None:
        """Delete the files of replaced artifacts, and folders that are then empty.

        If MLflow cannot delete them, it says so once and keeps them: this must not stop the shipping.
        """
        before = {
            place
            for files in replaced
            if not sink.is_too_large(files)
            for place in _places(name, [PurePosixPath(file["path"]) for file in files])
        }
        gone = before - set(places)
        if not gone or not self._can_delete:
            return
        folders = {folder for place in gone for folder in place.parents if folder.parts}
        folders -= {folder for place in places for folder in place.parents}
        try:
            stored = get_artifact_repository(self._mlflow.get_run(self._run).info.artifact_uri, self._uri)
            for place in sorted(gone):
                stored.delete_artifacts(str(place))
            for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
                if not stored.list_artifacts(str(folder)):
                    stored.delete_artifacts(str(folder))
        except Exception as error:  # whatever the client of the artifacts' store raises
            self._can_delete = False
            log.warning(
                "MLflow cannot delete artifacts (%s): files of artifacts that were replaced stay beside the "
                "new ones, first %s of %s", error, min(gone), name,
            )  # fmt: skip


def _user() -> dict[str, str]:
    """Who creates a run, as MLflow's own client finds it; nothing if this user has no name."""
    try:
        return {MLFLOW_USER: str(DefaultRunContext().tags()[MLFLOW_USER])}
    except Exception:  # it asks the system, which may not know the user, as in a container
        return {}


def _script(record: Mapping[str, Any]) -> str | None:
    return next(iter(record.get("command") or ()), None)


def _used(event: Mapping[str, Any]) -> DatasetInput:
    """An artifact that the run uses as an input, identified by the checksums of its files."""
    made_by, files = event["run"], sorted((file["path"], file["sha256"]) for file in event["files"])
    source = f"{made_by['experiment']}/{made_by['id']}:{event['name']}" if made_by else event["name"]
    return _input(event["name"], hashlib.sha256(orjson.dumps(files)).hexdigest(), source)


def _input(name: str, fingerprint: str, source: str) -> DatasetInput:
    digest = str(fingerprint).rpartition(":")[2][:_LONGEST_DIGEST] or "unknown"
    where = orjson.dumps({"uri": str(source)}).decode()
    return DatasetInput(Dataset(_cut(name, _LONGEST_KEY), digest, "local", where))


def plotly_page(figure: str) -> str:
    """A self-contained HTML page that draws a Plotly figure from its JSON."""
    from plotly.offline import get_plotlyjs

    safe = figure.replace("</", "<\\/")
    draw = (
        f'const figure = {safe}; Plotly.newPlot("figure", figure.data, figure.layout, {{responsive: true}});'
    )
    return (
        '<!doctype html><meta charset="utf-8"><div id="figure"></div>'
        f"<script>{get_plotlyjs()}</script><script>{draw}</script>"
    )


def make_store(database: Path) -> None:
    """Create the embedded store atomically, since MLflow cannot continue an interrupted migration."""
    if database.exists():
        return
    fresh = database.with_name(f".{database.name}.new")
    for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
        leftover.unlink(missing_ok=True)
    MlflowClient(store.sqlite_uri(fresh)).search_experiments(max_results=1)
    storage.sync_file(fresh)
    fresh.replace(database)
    storage.sync_directory(database.parent)


def key(name: str) -> str:
    """A name as MLflow accepts it: unchanged if it does, else spelled out, else cleaned and with a hash.

    A function of the name alone, and names remain distinct: from what is spelled out, the name can be read
    back, and a name that would be read as another one gets a hash.
    """
    spelled = "".join(_SPELLED.get(character, character) for character in name)
    cleaned = _REFUSED.sub("_", spelled)
    is_accepted = str(_path(cleaned)) == spelled and len(spelled) <= _LONGEST_KEY
    if is_accepted and _SPELLINGS.sub(lambda found: _MEANT[found[0]], spelled) == name:
        return spelled
    cleaned = _REFUSED.sub("_", name)
    return identity.marked(str(_path(cleaned))[: _LONGEST_KEY - 7], name)


def _cut(text: str, longest: int) -> str:
    """A text of at most so many characters; it ends with `…` if that is not all of it."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _without_middle(text: str, longest: int) -> str:
    """The same, with `…` instead of the middle: what a run is for was noted first, what came of it last."""
    half = (longest - len(_OMITTED)) // 2
    return text if len(text) <= longest else text[:half] + _OMITTED + text[-half:]


def _path(name: str) -> PurePosixPath:
    """A name as a relative path without `..`."""
    return PurePosixPath(*[part for part in name.split("/") if part not in ("", ".", "..")] or ["_"])


def _json(content: Any) -> str:
    return orjson.dumps(content, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _places(name: str, paths: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Where each file of an artifact is in MLflow: below NAME; a single file of that name, at the top."""
    if len(paths) == 1 and paths[0].name == name:
        return [_stored(PurePosixPath(name))]
    base = PurePosixPath(os.path.commonpath([path.parent for path in paths])) if paths else PurePosixPath()
    if name in base.parts:  # the given folder, even if all files are deeper
        base = PurePosixPath(*base.parts[: base.parts.index(name) + 1])
    return [_stored(_path(name) / path.relative_to(base)) for path in paths]


def _stored(place: PurePosixPath) -> PurePosixPath:
    """A place in the artifacts without characters that MLflow's client or server reads as something else.

    A name that had some gets a hash. MLflow's server undoes any quoting, so that does not help.
    """
    return PurePosixPath(*[_stored_part(part) for part in place.parts])


def _stored_part(part: str) -> str:
    cleaned = PurePosixPath(_MISREAD.sub("_", part))
    if cleaned.name == part:
        return part
    return identity.marked(cleaned.stem, part) + cleaned.suffix


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
