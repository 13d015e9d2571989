"""The Weights & Biases sink, online and offline: each stoker run is one W&B run, across all its attempts.

W&B appends whatever it receives, and buffers some of it in memory. So whenever the sink is opened, it reads
back which points W&B has, from the server or from the files of the offline run; it then receives the whole
journal again, and adds what is missing. W&B's own environment variables configure it: WANDB_MODE,
WANDB_API_KEY, WANDB_BASE_URL, WANDB_PROJECT, WANDB_ENTITY. Without a key it is offline: the files are
written to the run's directory, and `wandb sync` uploads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import shutil
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import psutil
import wandb
from requests.utils import get_netrc_auth
from stoker.errors import StokerError
from stoker.run import media
from stoker.run.directory import RunDirectory
from stoker.status import FINISHED, INTERRUPTED, PAUSED, PREEMPTED
from stoker.tracking import identity, sink, wandb_files
from stoker.tracking.feed import SYSTEM
from stoker.tracking.sink import Batch, Ending, Point, SinkRun
from wandb.sdk import wandb_setup
from wandb.sdk.interface.interface_sock import InterfaceSock

log = logging.getLogger(__name__)

_LARGEST_TABLE = 10_000  # rows that W&B shows
_WRITER_SECONDS = 10.0
_FLUSH_SECONDS = 1.0  # for which W&B buffers an offline run; by default 15
_START_TIMEOUT = 30.0
_GIVE_UP_TIMEOUT = 10.0
_BEFORE = "https://api.wandb.ai"  # the name under which older versions of W&B store the same key
_STEP = "step"
_SAMPLE = f"{SYSTEM}sample"
_ITS_OWN = {"_step", "_runtime", "_timestamp", "_wandb"}  # what W&B adds to each row by itself
_TAKEN = {*_ITS_OWN, _STEP, _SAMPLE}
_REFUSED = re.compile(r"[^\w.\-]|^(wandb-|job$)", re.ASCII)  # in names and kinds of artifacts
_LONGEST_NAME = 80
_HELD = (bool, int, float, str, date, Decimal)  # types of cells that W&B's tables hold
_EXIT_CODES = {FINISHED: 0}  # all others are 1


class WandbSink:
    """A run in W&B."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._record = directory.record()
        self._id = ""
        self._online = False
        self._run: Any = None
        self._present: set[tuple[str, int]] = set()
        self._artifacts: set[str] = set()

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        """Create or continue the W&B run, and find out which points it has."""
        how = mode()
        if how == "disabled":
            raise StokerError("W&B's settings file disables it: run `wandb enabled`, or change STOKER_SINKS")
        self._online = how == "online"
        self._artifacts = set((mark or {}).get("artifacts", []))
        base = self._base(known)
        self._id = f"{base}-{edition}" if edition else base
        if known is not None and known.startswith(base) and not known.endswith(edition):
            self._mark_replaced(known)
        self._run = self._begun(self._id)
        if self._online and self._run.resumed:
            self._present = set(_points_on_server(self._run))
        self._run.define_metric("*", step_metric=_STEP)
        self._run.define_metric(f"{SYSTEM}*", step_metric=_SAMPLE)
        self._run.config.update(self._about(), allow_val_change=True)
        where = self._run.url if self._online else str(self._directory.path / "wandb")
        return SinkRun(self._id, where, anew=known is not None)

    def _base(self, known: str | None) -> str:
        """The prefix of the W&B ids: the run's uid; for a copied run, also a hash of its identity."""
        uid = str(self._record["uid"])[:32]
        own = f"{uid}-{hashlib.sha256(identity.of(self._directory).encode()).hexdigest()[:8]}"
        is_copy = identity.is_anothers(identity.recorded(self._record), self._directory)
        return own if is_copy or (known or "").startswith(own) else uid

    def _begun(self, run: str) -> Any:
        """Create or continue the W&B run with this id; for an offline run, read which points it has."""
        if not self._online:
            files = wandb_files.of_run(self._directory.path, run)
            _wait_for_its_writer(files)
            self._present = set(_points_in(files))
            _wait_for_another_second(files)
        before = set(self._folders(run))
        try:
            return self._initialised(run)
        except BaseException:
            _give_up(run)
            for folder in set(self._folders(run)) - before:
                shutil.rmtree(folder, ignore_errors=True)  # nothing is in it yet
            raise

    def _folders(self, run: str) -> Iterator[Path]:
        return self._directory.path.glob(f"wandb/*run-*-{run}")

    def _initialised(self, run: str) -> Any:
        return wandb.init(
            id=run,
            name=self._directory.id,
            project=os.environ.get("WANDB_PROJECT") or self._directory.experiment,
            group=self._directory.experiment if self._directory.is_trial else None,
            config=self._record["config"],
            dir=str(self._directory.path),
            mode="online" if self._online else "offline",
            resume="allow",
            reinit="create_new",  # another thread of this process may have its own run
            settings=_settings(),
        )

    def _about(self) -> dict[str, Any]:
        return {"stoker": {"path": str(self._directory.path), **(self._record.get("code") or {})}}

    def _mark_replaced(self, run: str) -> None:
        """Record in the config of a W&B run which one replaces it."""
        about = self._about()
        about["stoker"]["replaced_by"] = self._id
        with contextlib.suppress(wandb.Error):  # the run was deleted in W&B
            replaced = self._begun(run)
            replaced.config.update(about, allow_val_change=True)
            replaced.finish()

    def ship(self, batch: Batch) -> Any:
        """Add missing points, media and artifacts, and set config, tags and notes."""
        if batch.params:
            self._run.config.update(batch.params, allow_val_change=True)
        if batch.tags:
            self._set_tags(batch.tags)
        if batch.notes:
            self._run.notes = "\n\n".join(batch.notes)
        for row in _rows(point for point in batch.points if self._is_new(named(point.metric), point.step)):
            self._run.log(row)
        for event in batch.media:
            if self._is_new(sink.key(event), event["step"]):
                with self._unless_refused(f"{sink.key(event)} of step {event['step']}"):
                    self._ship_media(event)
        for name, event in batch.artifacts.items():
            made = f"{name}:{event['time']}"
            if made not in self._artifacts:
                with self._unless_refused(f"the artifact {name}"):
                    self._ship_artifact(name, event)
                self._artifacts.add(made)
        return {"artifacts": sorted(self._artifacts)}

    def conclude(self, ending: Ending) -> None:
        """Finish the W&B run; returns when everything is on disk, or uploaded."""
        self._run.summary["stoker/status"] = ending.status
        if ending.status in (PREEMPTED, INTERRUPTED, PAUSED):
            self._run.mark_preempting()
        run, self._run = self._run, None
        run.finish(exit_code=_EXIT_CODES.get(ending.status, 1))

    def close(self) -> None:
        """Have W&B close the run, which is not over; `conclude` ends it."""
        run, self._run = self._run, None
        if run is not None:
            _leave(run)

    @contextlib.contextmanager
    def _unless_refused(self, what: str) -> Iterator[None]:
        """Say so if W&B's client refuses something for what it is: the rest is shipped all the same."""
        try:
            yield
        except (TypeError, ValueError, wandb.errors.UsageError) as error:
            if isinstance(error, OSError) or self._run._is_finished:  # of requests, or W&B: to be tried again
                raise
            log.warning("W&B refuses %s, which is not shipped: %s", what, textwrap.shorten(str(error), 300))

    def _is_new(self, name: str, step: int) -> bool:
        """Whether W&B does not have this point yet. Marks it as present."""
        if (name, step) in self._present:
            return False
        self._present.add((name, step))
        return True

    def _set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Store tags in the config, by which W&B can filter: tags have values here, but not in W&B."""
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
        files = [self._directory.path / file["path"] for file in event["files"]]
        if sink.is_too_large(event["files"]):
            place = os.path.commonpath(files)
            self._run.summary[f"stoker/artifacts/{name}"] = place
        else:
            made = wandb.Artifact(f"{_accepted(name)}-{self._id[:8]}", _accepted(event["kind"]))
            base = self._directory.path / event["path"]
            for path in files:
                if path.is_file():
                    inside = (
                        path.relative_to(base) if path != base and path.is_relative_to(base) else path.name
                    )
                    made.add_file(str(path), name=str(inside))
            self._run.log_artifact(made)


def mode() -> str:
    """online, offline or disabled, as W&B's own settings say; if they don't, online if there is a key."""
    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars({"WANDB_MODE": m.lower()} if (m := os.environ.get("WANDB_MODE")) else {})
    if "mode" not in settings.model_fields_set:
        return "online" if key() else "offline"
    return "disabled" if settings._noop else "offline" if settings._offline else "online"


def server() -> str:
    """The URL of the W&B server."""
    return str(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url)


def key() -> str:
    """The API key from the environment, or else from `wandb login`; empty if there is none."""
    places = (server(),) if os.environ.get("WANDB_BASE_URL") else (server(), _BEFORE)
    kept = (get_netrc_auth(place) for place in places)
    return os.environ.get("WANDB_API_KEY") or next((str(one[1]) for one in kept if one), "")


def named(metric: str) -> str:
    """The name of a metric in W&B: its own, or with a `_` after it where W&B or the sink uses that name.

    A name that already ends so gets one more, so that metrics of different names never share one.
    """
    return f"{metric}_" if metric.rstrip("_") in _TAKEN else metric


def _settings() -> Any:
    """Settings that turn off everything that W&B collects by itself."""
    return wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, save_code=False,
        disable_job_creation=True, x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True,
        x_save_requirements=False, init_timeout=_START_TIMEOUT,
        x_transaction_log_flush_interval=_FLUSH_SECONDS,
    )  # fmt: skip


def _accepted(name: str) -> str:
    """A name or kind of an artifact as W&B accepts it: with a hash if it is not the same."""
    accepted = _REFUSED.sub("_", name)[:_LONGEST_NAME]
    return name if accepted == name else identity.marked(accepted, name)


def _cell(value: Any) -> Any:
    """A cell of a table as W&B holds it: else as text. It wants one type of all dicts of a column."""
    if isinstance(value, list) and all(item is None or isinstance(item, _HELD) for item in value):
        return value
    if isinstance(value, dict | list):
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    return value if value is None or isinstance(value, _HELD) else str(value)


def _leave(run: Any) -> None:
    """Have W&B's own process write what it has of a run, and close it, but not end it.

    W&B has no call for that. This is `finish` without the message that says how the run ended. A run that
    is only dropped could not be opened again by this process, and would end as finished with it.
    """
    checker = run._run_status_checker
    if checker is not None:
        checker.stop()
    run._atexit_cleanup_called = True
    run.finish()


def _give_up(run: str) -> None:
    """Have W&B's own process forget a run that it could not open, or else W&B start another process.

    Without this W&B says from then on that the run is in use.
    """
    service = wandb_setup.singleton().ensure_service()
    try:
        run_there = InterfaceSock(service._asyncer, service._client, stream_id=run)
        run_there.deliver_exit(1).wait_or(timeout=_GIVE_UP_TIMEOUT)
        run_there.join()
        service.inform_finish(run_id=run)
    except Exception:  # it is gone, or says nothing
        if service.owns_service:
            service._proc._process.kill()
        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()


def _rows(points: Iterable[Point]) -> Iterator[dict[str, Any]]:
    """Rows of W&B history: one row per log call, with its step and time."""

    def call(point: Point) -> tuple[int, float, bool]:
        return point.step, point.time, point.metric.startswith(SYSTEM)

    for (step, at, is_system), group in itertools.groupby(points, call):
        row = {named(point.metric): point.value for point in group}
        yield {**row, _SAMPLE if is_system else _STEP: step, "_timestamp": at}


def _wait_for_its_writer(files: Sequence[Path]) -> None:
    """Wait until W&B's own process, which outlives a killed follower, has written its buffer."""
    until = time.monotonic() + _WRITER_SECONDS
    while files and time.monotonic() < until and _is_open(files[-1]):
        time.sleep(0.1)


def _is_open(file: Path) -> bool:
    """Whether a process on this machine has a file open, as far as can be seen."""
    path = str(file.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(held.path == path for held in process.open_files()):
                return True
    return False


def _wait_for_another_second(files: Iterable[Path]) -> None:
    """Wait for the next second: W&B names folders by the second, and would overwrite the newest."""
    newest = max((file.parent.stat().st_mtime for file in files), default=0.0)
    time.sleep(min(max(0.0, newest + 1.1 - time.time()), 1.1))


def _points_in(files: Iterable[Path]) -> Iterator[tuple[str, int]]:
    """Metric and step of every point in offline files."""
    for file in files:
        for row in wandb_files.history(file):
            yield from _points_of(row)


def _points_on_server(run: Any) -> Iterator[tuple[str, int]]:
    """Metric and step of every point on the server."""
    stored = wandb.Api().run(f"{run.entity}/{run.project}/{run.id}")
    for row in stored.scan_history():
        yield from _points_of({key: value for key, value in row.items() if value is not None})


def _points_of(row: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    step = row.get(_SAMPLE, row.get(_STEP))  # W&B also gives a sample's row the newest step
    if step is not None:
        yield from ((key, int(step)) for key in row if key not in _TAKEN)


def _shown(directory: RunDirectory, event: Mapping[str, Any]) -> Any:
    """The W&B object for a media event; None if its file is missing."""
    about = event["about"]
    if event["kind"] == "histogram":
        return wandb.Histogram(np_histogram=(about["counts"], about["edges"]))
    file = directory.path / event["file"]["path"]
    if not file.is_file():
        return None
    if event["kind"] == "table":
        columns, rows = media.read_table(file.read_bytes())
        return wandb.Table(
            columns=columns, data=[[_cell(cell) for cell in row] for row in rows[:_LARGEST_TABLE]]
        )
    if event["kind"] == "text":
        return wandb.Table(columns=["text"], data=[[file.read_text(encoding="utf-8")]])
    if file.suffix == ".png":
        return wandb.Image(str(file), caption=about.get("caption"))
    from plotly.io import from_json

    return wandb.Plotly(from_json(file.read_text(encoding="utf-8")))
