"""The Weights & Biases sink, online and offline: a run of ours is one W&B run, across all attempts.

W&B appends whatever it is given, and keeps some of it in memory for a while. So nothing is
taken for granted: whenever the sink is opened it reads back which points W&B has, from the
server or from the files of the offline run, and is then given the whole journal again, of
which it adds what is not there. The environment says where and how, as W&B reads it:
WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL, WANDB_PROJECT, WANDB_ENTITY. Without a key it is
offline; the files stand in the run's directory, and `wandb sync` uploads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import wandb
from requests.utils import get_netrc_auth
from stoker.run import media, view
from stoker.run.directory import SWEEP, RunDirectory
from stoker.tracking import identity, sink, wandb_files
from stoker.tracking.feed import SYSTEM
from stoker.tracking.sink import Batch, Ending, Point, SinkRun

log = logging.getLogger(__name__)

LARGEST_ARTIFACT = 512 * 2**20  # bytes; what is larger stays where it is, and the summary says where
_LARGEST_TABLE = 10_000  # rows, what W&B shows
_WRITER_SECONDS = 10.0
_FLUSH_SECONDS = 1.0  # what W&B keeps in memory of an offline run; by default a quarter of a minute
_START_TIMEOUT = 30.0
_BEFORE = "https://api.wandb.ai"  # under which older versions of W&B keep the key of the same server
_STEP = "step"
_SAMPLE = f"{SYSTEM}sample"
_REFUSED = re.compile(r"[^\w.\-]")
_EXIT_CODES = {view.FINISHED: 0}  # all others are 1


class WandbSink:
    """A run directory's run in W&B."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._record = directory.record()
        self._id = ""
        self._run: Any = None
        self._present: set[tuple[str, int]] = set()
        self._artifacts: set[str] = set()

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        """Begin or go on with the W&B run, and learn what it has."""
        self._artifacts = set((mark or {}).get("artifacts", []))
        base = self._base(known)
        self._id = f"{base}-{edition}" if edition else base
        if known is not None and known.startswith(base) and not known.endswith(edition):
            self._mark_replaced(known, started)
        self._run, online = self._begun(self._id, started), mode() == "online"
        if online and self._run.resumed:
            self._present = set(_points_on_server(self._run))
        self._run.define_metric("*", step_metric=_STEP)
        self._run.define_metric(f"{SYSTEM}*", step_metric=_SAMPLE)
        self._run.config.update(self._about(), allow_val_change=True)
        where = self._run.url if online else str(self._directory.path / "wandb")
        return SinkRun(self._id, where, anew=known is not None)

    def _base(self, known: str | None) -> str:
        """What our ids begin with: the uid, and of a copy what tells it from its original."""
        uid = str(self._record["uid"])[:32]
        own = f"{uid}-{hashlib.sha256(identity.of(self._directory).encode()).hexdigest()[:8]}"
        is_copy = identity.is_anothers(identity.recorded(self._record), self._directory)
        return own if is_copy or (known or "").startswith(own) else uid

    def _begun(self, run: str, started: float) -> Any:
        """W&B's run of an id, begun or gone on with; of an offline one, what it has is read."""
        online = mode() == "online"
        if not online:
            files = wandb_files.of_run(self._directory.path, run)
            _wait_for_its_writer(files)
            self._present = set(_points_in(files))
            _wait_for_another_second(files)
        return wandb.init(
            id=run,
            name=self._directory.id,
            project=os.environ.get("WANDB_PROJECT") or self._directory.experiment,
            group=self._directory.experiment if (self._directory.path.parent / SWEEP).is_file() else None,
            config=self._record["config"],
            dir=str(self._directory.path),
            mode="online" if online else "offline",
            resume="allow",
            reinit="create_new",  # another thread of this process may have a run of its own
            settings=_settings(started),
        )

    def _about(self) -> dict[str, Any]:
        return {"stoker": {"path": str(self._directory.path), **(self._record.get("code") or {})}}

    def _mark_replaced(self, run: str, started: float) -> None:
        """Say of a run, in its config, which one stands for ours now."""
        about = self._about()
        about["stoker"]["replaced_by"] = self._id
        with contextlib.suppress(wandb.Error):  # it was deleted there
            replaced = self._begun(run, started)
            replaced.config.update(about, allow_val_change=True)
            replaced.finish()

    def ship(self, batch: Batch) -> Any:
        """Add the points, media and artifacts that are not there, and set config, tags and notes."""
        if batch.params:
            self._run.config.update(batch.params, allow_val_change=True)
        if batch.tags:
            self._set_tags(batch.tags)
        if batch.notes:
            self._run.notes = "\n\n".join(batch.notes)
        for row in _rows(point for point in batch.points if self._is_new(point.metric, point.step)):
            self._run.log(row)
        for event in batch.media:
            if self._is_new(sink.key(event), event["step"]):
                self._ship_media(event)
        for name, event in batch.artifacts.items():
            self._ship_artifact(name, event)
        return {"artifacts": sorted(self._artifacts)}

    def conclude(self, ending: Ending) -> None:
        """Finish the W&B run: everything is on disk, or uploaded, when this returns."""
        self._run.summary["stoker/status"] = ending.status
        if ending.status in (view.PREEMPTED, view.INTERRUPTED, view.PAUSED):
            self._run.mark_preempting()
        run, self._run = self._run, None
        run.finish(exit_code=_EXIT_CODES.get(ending.status, 1))

    def close(self) -> None:
        """Let go without an ending: W&B hears of one when there is one."""
        self._run = None

    def _is_new(self, name: str, step: int) -> bool:
        """Whether W&B has no such point; from now on it has."""
        if (name, step) in self._present:
            return False
        self._present.add((name, step))
        return True

    def _set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Ours have values and W&B's have none: they stand in its config, where its pages filter by them."""
        known = dict(self._run.config.get("tags") or {})
        known.update({key: value for key, value in tags.items() if value is not None})
        for key in (key for key, value in tags.items() if value is None):
            known.pop(key, None)
        self._run.config.update({"tags": known}, allow_val_change=True)

    def _ship_media(self, event: Mapping[str, Any]) -> None:
        shown = _shown(self._directory, event)
        if shown is None:
            log.warning("%s %s is missing and was not shipped", event["kind"], event["name"])
            return
        self._run.log({sink.key(event): shown, _STEP: event["step"], "_timestamp": event["time"]})

    def _ship_artifact(self, name: str, event: Mapping[str, Any]) -> None:
        files = [(file, self._directory.path / file["path"]) for file in event["files"]]
        identity = f"{name}:{event['time']}"
        if identity in self._artifacts:
            return
        if sum(file["size"] for file, _ in files) > LARGEST_ARTIFACT:
            place = os.path.commonpath([path for _, path in files])
            self._run.summary[f"stoker/artifacts/{name}"] = place
        else:
            made = wandb.Artifact(
                f"{_REFUSED.sub('_', name)[:80]}-{self._id[:8]}", _REFUSED.sub("_", event["kind"])
            )
            base = self._directory.path / str(event.get("path") or "")
            for _, path in files:
                if path.is_file():
                    inside = (
                        path.relative_to(base) if path != base and path.is_relative_to(base) else path.name
                    )
                    made.add_file(str(path), name=str(inside))
            self._run.log_artifact(made)
        self._artifacts.add(identity)


def mode() -> str:
    """online or offline: as WANDB_MODE says, else by whether there is a key."""
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("online", "offline"):
        return asked
    return "online" if key() else "offline"


def server() -> str:
    """Where W&B is."""
    return str(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url)


def key() -> str:
    """The key of the environment, else what `wandb login` has kept; empty where there is none."""
    places = (server(),) if os.environ.get("WANDB_BASE_URL") else (server(), _BEFORE)
    kept = (get_netrc_auth(place) for place in places)
    return os.environ.get("WANDB_API_KEY") or next((str(one[1]) for one in kept if one), "")


def _settings(started: float) -> Any:
    """W&B does what it is told, and nothing by itself: our journal has the rest."""
    return wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, save_code=False,
        disable_job_creation=True, x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True,
        x_save_requirements=False, x_start_time=started, init_timeout=_START_TIMEOUT,
        x_transaction_log_flush_interval=_FLUSH_SECONDS,
    )  # fmt: skip


def _rows(points: Iterable[Point]) -> Iterator[dict[str, Any]]:
    """Rows of history: what was logged by one call stands in one row, with its step and time."""

    def call(point: Point) -> tuple[int, float, bool]:
        return point.step, point.time, point.metric.startswith(SYSTEM)

    for (step, at, is_system), group in itertools.groupby(points, call):
        row = {point.metric: point.value for point in group}
        yield {**row, _SAMPLE if is_system else _STEP: step, "_timestamp": at}


def _wait_for_its_writer(files: Sequence[Path]) -> None:
    """W&B's own process outlives whoever was killed, and writes what it was told last: then it lets go."""
    until = time.monotonic() + _WRITER_SECONDS
    while files and time.monotonic() < until and _is_open(files[-1]):
        time.sleep(0.1)


def _is_open(file: Path) -> bool:
    """Whether some process of this machine that can be looked into has a file open."""
    path = str(file.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(held.path == path for held in process.open_files()):
                return True
    return False


def _wait_for_another_second(files: Iterable[Path]) -> None:
    """W&B names a folder by the second that it is begun in: one of the same second would be overwritten."""
    newest = max((file.parent.stat().st_mtime for file in files), default=0.0)
    time.sleep(min(max(0.0, newest + 1.1 - time.time()), 1.1))


def _points_in(files: Iterable[Path]) -> Iterator[tuple[str, int]]:
    """Metric and step of every point that offline files hold."""
    for file in files:
        for row in wandb_files.history(file):
            yield from _points_of(row)


def _points_on_server(run: Any) -> Iterator[tuple[str, int]]:
    """Metric and step of every point that the server holds."""
    stored = wandb.Api().run(f"{run.entity}/{run.project}/{run.id}")
    for row in stored.scan_history():
        yield from _points_of({key: value for key, value in row.items() if value is not None})


def _points_of(row: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    step = row.get(_SAMPLE, row.get(_STEP))  # W&B also gives a sample's row the newest step
    if step is not None:
        yield from (
            (key, int(step)) for key in row if key not in (_STEP, _SAMPLE) and not key.startswith("_")
        )


def _shown(directory: RunDirectory, event: Mapping[str, Any]) -> Any:
    """A media event as W&B shows it; None where its file is gone."""
    about = event["about"]
    if event["kind"] == "histogram":
        return wandb.Histogram(np_histogram=(about["counts"], about["edges"]))
    file = directory.path / event["file"]["path"]
    if not file.is_file():
        return None
    if event["kind"] == "table":
        columns, rows = media.read_table(file.read_bytes())
        return wandb.Table(columns=columns, data=rows[:_LARGEST_TABLE])
    if event["kind"] == "text":
        return wandb.Table(columns=["text"], data=[[file.read_text(encoding="utf-8")]])
    if file.suffix == ".png":
        return wandb.Image(str(file), caption=about.get("caption"))
    from plotly.io import from_json

    return wandb.Plotly(from_json(file.read_text(encoding="utf-8")))
