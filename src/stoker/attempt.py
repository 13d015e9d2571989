"""Run: one attempt at a run, as the code that trains sees it.

Opening one makes the run's directory, or continues it; takes its lock; records what it is
made from; and starts an attempt in the journal. After that everything is an append. The
follower that ships the journal to the sinks is started with the first metric, so that a run
which is refused before it begins leaves nothing behind. No torch is imported here.

    with stoker.Run("digits", config={"lr": 0.1}) as run:
        for step in range(100):
            run.log(loss=...)
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import platform
import sys
import types
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from stoker import config as configs
from stoker import disk, threads, words
from stoker.checkpoint import manifest
from stoker.checkpoint.manifest import Checkpoint
from stoker.errors import EXIT_FAILED, BadInput, Stopped
from stoker.periodic import Job, Periodic
from stoker.reproduce import data, provenance
from stoker.run import (
    again,
    artifacts,
    finding,
    journal,
    lease,
    lineage,
    messages,
    mirror,
    opening,
    rendezvous,
    view,
)
from stoker.run.recorder import Recorder
from stoker.run.reduction import How
from stoker.run.series import Goal, Series, Summary
from stoker.run.uploader import Uploads
from stoker.stopping import StopRequests
from stoker.supervision import Heart
from stoker.tracking import follower
from stoker.tracking.shipping import Shipping
from stoker.tracking.system import SystemSampler
from stoker.world import World

log = logging.getLogger("stoker")

Newest = tuple[Checkpoint | None, list[str]]
"""The newest valid checkpoint, and those passed over, each with the reason."""

_SYNC_SECONDS = 1.0  # what a power cut may take; the death of the process takes nothing
_SYSTEM_SECONDS = 10.0
_SINKS_SECONDS = 2.0
_FINISH_SECONDS = 60.0  # for the checkpoint that is being written when a run fails


class Run:
    """A run being trained by this process, or by this process and its peers.

    It ends with its `with` block; without one by `end` and `close`, or with the script.

    Of several processes (`torchrun`), rank 0 writes the run; the others log the metrics that
    are reduced over ranks, and nothing else of what they say is kept.

    Args:
        experiment: the folder of runs that belong together.
        name: the run's id; a run of that name is continued. By default a new id is made.
        config: a dataclass, or a dict of JSON values (dotted keys), kept in `run.json` without secrets.
        runs: the folder that runs stand under, or the URL of one in an object store (`s3://bucket/runs`);
            by default STOKER_RUNS, else `runs/`.
        sources: where each config value came from.
        recipe: what starts this run again: `name` and `reference`.
        seed: the seed that the run's randomness is a function of.
        code: the script whose code is recorded, or a folder of its git repository; by default the script that
            this process runs, or the working directory where it runs none.
        accept_drift: continue a run although its config was another, and record what changed.
        provenance: a folder in which what a run is made from stands already, as that of a search has it for
            all of its trials; by default it is gathered.

    Raises:
        BadInput: the directory cannot be written, another process trains this run, the run to
            continue has another config, or several processes have no name to agree on.
    """

    def __init__(
        self,
        experiment: str = "default",
        name: str | None = None,
        *,
        config: Any = None,
        runs: Path | str | None = None,
        sources: Mapping[str, str] | None = None,
        recipe: Mapping[str, Any] | None = None,
        seed: int = 0,
        code: Path | None = None,
        accept_drift: bool = False,
        provenance: Path | None = None,
    ) -> None:
        asked = again.taken(experiment, name, config, seed)
        if asked is not None:
            runs, experiment, name = asked.runs, asked.experiment, asked.id
            sources, recipe, provenance = asked.sources, asked.recipe, Path(asked.provenance)
        folder = finding.folder(
            runs if runs is not None else os.environ.get("STOKER_RUNS", "runs")
        ).absolute()
        self.world = World.current()
        self.directory = finding.locate(folder, experiment, name or opening.new_id(self.world))
        self.seed = seed
        self.step = 0
        """The step that values are logged at; a Trainer moves it."""
        self.goals: dict[str, Goal] = {}
        """Which way metrics are better, as far as it was said."""
        self.layout: dict[str, Any] = {}
        """How the attempt before this one used the devices, where a Trainer did."""
        self.stop = StopRequests()
        self.made: set[str] = set()
        """The kinds of artifacts that were recorded in this attempt."""
        sinks = follower.enabled()
        self._shipping = Shipping(self.directory, sinks if self.world.rank == 0 else ())
        self._before: Mapping[str, Series] = {}
        self._code_before: Mapping[str, str | None] = {}
        self._periodic: Periodic | None = None
        self._system: SystemSampler | None = None
        """Of a run that lasts a second: until then there is nothing to be seen."""
        self._watches: list[Any] = []
        self._descriptor, self._process = -1, os.getpid()
        self._lease: lease.Lease | None = None
        copy = mirror.of(self.directory)
        self._uploads = Uploads(self.directory, copy if self.world.rank == 0 else None)
        self.mend = copy.fetch_checkpoint if copy is not None else None
        """Puts files of a checkpoint in place that are in the object store whole."""
        self._logging: list[logging.Handler] = []
        parents = [asked.parent] if asked is not None else []
        record = opening.record(self.directory, config, sources, recipe, seed, parents)
        if self.world.rank > 0:
            self._join()
        else:
            self._lead(record, code or opening.script() or Path.cwd(), accept_drift, provenance)
        if asked is not None:
            self._make_again(asked)
        atexit.register(self._end_with_script)

    def __repr__(self) -> str:
        return f"Run({self.directory.experiment!r}, {self.directory.id!r})"

    def _lead(self, record: dict[str, Any], code: Path, accept_drift: bool, known: Path | None) -> None:
        """Open or continue the directory and begin an attempt."""
        mark = uuid.uuid4().hex
        with contextlib.ExitStack() as undo:
            self._descriptor = opening.take(self.directory, rendezvous.Opening(mark, self.world.launch))
            undo.callback(os.close, self._descriptor)
            self._lease = opening.lease_of(self.directory)
            if self._lease is not None:
                undo.callback(self._lease.release)
            self.continued = self.directory.exists()
            changes = self._open(record, code, accept_drift, known)
            if self._lease is not None:
                self._lease.keep(self._give_up)
            if self.continued:
                self._newest = threads.begun(self._verify, "verify")
            self.attempt, writer = journal.start_attempt(self.directory.journal)
            undo.callback(writer.close)
            self._recorder = Recorder(writer, self.world, self._begin)
            disk.bring_soon(self.directory.journal)
            self._logging = messages.write_to(self.directory.logs / "rank-0.log")
            undo.callback(self._stop_logging)
            self._note_attempt()
            other = self._other_code(code) if self.continued and known is None else {}
            self._recorder.event(
                "attempt_started", pid=os.getpid(), host=platform.node(), drift=changes,
                opening=mark, world=self.world.size, step=self.step, **({"code": other} if other else {}),
            )  # fmt: skip
            undo.pop_all()

    def _note_attempt(self) -> None:
        """Say in the log where an attempt begins, or which process is which."""
        if self.continued or self.world.size > 1:
            log.debug("attempt %d of %s, process %d", self.attempt, self.directory.path, os.getpid())

    def _make_again(self, asked: again.Again) -> None:
        """Compute as the run that is made again did, and end where it is to end."""
        self.layout = dict(asked.layout)
        self.until = asked.until
        if asked.until is not None:
            self.listen(self._end_after)
        self.tag(**{again.TAG: f"{asked.of['experiment']}/{asked.of['id']}"})

    def _end_after(self, step: int, values: Mapping[str, Any]) -> None:
        """End a loop of its own once it has left the last step; a Trainer sees by itself."""
        if not self._stepped_by_trainer and self.until is not None and step > self.until:
            self.stop.ask(view.STOPPED)

    def _join(self) -> None:
        """Take part in the attempt that rank 0 of this launch begins."""
        self.attempt, begun = rendezvous.wait(self.directory, self.world.launch, self.world.rank)
        writer = journal.join_attempt(self.directory.journal, self.attempt, self.world.rank)
        self._recorder = Recorder(writer, self.world, self._begin)
        disk.bring_soon(self.directory.journal)
        self.continued = self.attempt > 1
        self.step = begun["step"]
        self._logging = messages.write_to(self.directory.logs / f"rank-{self.world.rank}.log")
        self._note_attempt()

    def _open(
        self, record: dict[str, Any], code: Path, accept_drift: bool, known: Path | None
    ) -> dict[str, tuple[Any, Any]]:
        """Make or continue the directory; returns what the config drifted by."""
        changes: dict[str, tuple[Any, Any]] = {}
        if self.continued:
            if not self.directory.journal.is_dir():
                raise BadInput(
                    f"{self.directory.path} has no journal any more, which is all that is known of the run: "
                    "bring it back, or take another name"
                )
            self.directory.logs.mkdir(exist_ok=True)  # which somebody may have tidied up
            before = view.load(self.directory)
            shared = before.config.keys() & record["config"].keys()  # a key may be new in the code since
            refused = {k: v for k, v in configs.drift(before.config, record["config"]).items() if k in shared}
            if refused and not accept_drift:
                raise BadInput(opening.explain_drift(self.directory, refused, bool(record["recipe"])))
            changes = configs.drift(before.record["config"], record["config"])
            self.step = before.step
            self._goes_on_behind = self.step > 0
            self.goals.update(before.goals)
            self.layout = before.attempts[-1].layout if before.attempts else {}
            self._code_before = before.attempts[-1].code if before.attempts else {}
            if before.config.get("data_share") == record["config"].get("data_share"):
                self.samples_per_epoch = before.samples_per_epoch
            self._before = before.points
        else:
            self.directory.prepare()
            record["code"] = self._record_code(code, known)
            self.directory.create(record)
        return changes

    def _other_code(self, code: Path) -> dict[str, str | None]:
        """The files of code that are others than those the run began with; says so, where that is news."""
        from stoker.reproduce import code_changes

        changed = code_changes.since_begun(self.directory.provenance, code)
        if changed and changed != self._code_before:
            log.warning(
                "the code is not what it was when the run began (%s): what comes now is of the new one",
                words.some(list(changed)),
            )  # fmt: skip
        return changed

    def _record_code(self, code: Path, known: Path | None) -> dict[str, Any]:
        """Record what the run is made from; returns what its record says of it."""
        if known:
            provenance.link(known, self.directory.provenance)
            if not (known / provenance.ENVIRONMENT).is_file():  # of a run that is made again
                provenance.write_environment(self.directory.provenance)
            return provenance.summary_of(known)
        runs = self.directory.path.parent.parent
        return provenance.record(self.directory.provenance, code, runs, artifacts.store(runs))

    # -- what user code calls -----------------------------------------------------------

    def log(
        self,
        values: Mapping[str, Any] | None = None,
        /,
        *,
        step: int | None = None,
        reduce: How | None = None,
        **metrics: Any,
    ) -> None:
        """Log metrics at a step (by default the current one).

        Takes numbers, one-element tensors on any device, and nested dicts of these (joined
        by "/"). A tensor on an accelerator is copied in the background and written once it
        has arrived: the device is never waited for. A metric has one point a step: the first
        one stands. Without a Trainer, every call that names no step moves to the next one.

        Args:
            reduce: of several processes, keep the mean, sum, max or min over them; they log
                the same metrics at the same steps, in any order, and none waits for another.
                By default rank 0's value is kept.

        Raises:
            ValueError: a name with control characters or of more than 250 bytes, or a tensor
                of several elements.
            TypeError: a value that is no number.
        """
        flat = {**values, **metrics} if values and metrics else values or metrics
        if step is None:
            if self._goes_on_behind:
                self._warn_of_going_on()
            self.step += not self._stepped_by_trainer
            step = self.step
        if reduce is not None and self.world.size > 1 and not self._compared.isdisjoint(flat):
            raise ValueError(
                f"trials are compared by {', '.join(self._compared)}, of which each rank has a value of its "
                f"own with reduce={reduce!r}: log what trainer.evaluate or trainer.measure gives"
            )
        self._recorder.log(flat, step, reduce)
        if self._listener is not None:
            self._listener(step, flat)

    def _warn_of_going_on(self) -> None:
        """Of a run that is continued by its name, and may begin anew in its own loop."""
        self._goes_on_behind = False
        if not self._stepped_by_trainer and self.heart is None:
            log.warning(
                "run %r is continued, at step %d: begin the loop at run.step, or take another name for a run "
                "that begins anew",
                self.directory.id, self.step + 1,
            )  # fmt: skip

    def leave_shipping(self) -> None:
        """Have another process ship this run to its sinks, as that of a search does for its trials."""
        self._shipping = Shipping(self.directory, ())

    def leave_to_disk(self) -> None:
        """End without waiting for the disk: one of many short runs; the process ends with `disk.bring`."""
        self._waits_for_disk = False

    def listen(
        self, listener: Callable[[int, Mapping[str, Any]], None], compared: Sequence[str] = ()
    ) -> None:
        """Be called with every step and the values that were logged at it, on rank 0.

        Args:
            compared: metrics that the listener goes by: each logged value is to be that of all ranks.
        """
        self._compared = frozenset(compared)
        if self.world.rank == 0:
            self._listener = listener

    def params(self, **values: Any) -> None:
        """Record what the run's config did not know at its start: JSON values by name."""
        if values:
            self._recorder.event("params", values=values)

    def tag(self, **tags: str) -> None:
        """Set tags; a tag set again is replaced."""
        self._recorder.event("tags", tags={key: str(value) for key, value in tags.items()})

    def note(self, text: str) -> None:
        """Add a note in words."""
        self._recorder.event("note", text=text)

    def goal(self, **goals: Goal) -> None:
        """Say which way metrics are better: `run.goal(score="max", distance="min")`.

        Of a metric that is named after its kind (a loss, an accuracy) it is known already.
        """
        for metric, goal in goals.items():
            if goal not in ("min", "max"):
                raise ValueError(f"{metric}={goal!r}: a goal is 'min' or 'max'")
        self.goals.update(goals)
        self._recorder.event("goals", goals=goals)

    def table(self, name: str, rows: Any, columns: Sequence[str] | None = None) -> None:
        """Log a table at the current step, kept as Parquet.

        Args:
            rows: a list of dicts, a list of rows with `columns`, a dict of columns, or a table
                of pandas, Polars or Arrow.
        """
        from stoker.run import media

        self._media("table", name, lambda: media.table(rows, columns))

    def figure(self, name: str, figure: Any) -> None:
        """Log a Matplotlib or Plotly figure at the current step."""
        from stoker.run import media

        self._media("figure", name, lambda: media.figure(figure))

    def image(self, name: str, image: Any, caption: str | None = None) -> None:
        """Log an image at the current step: of Pillow, or an array or tensor.

        Arrays are (height, width), (height, width, channels) or (channels, height, width),
        of bytes, or of floats from 0 to 1.
        """
        from stoker.run import media

        self._media("image", name, lambda: media.image(image, caption))

    def text(self, name: str, text: str) -> None:
        """Log a text at the current step."""
        from stoker.run import media

        self._media("text", name, lambda: media.text(text))

    def histogram(self, name: str, values: Any, bins: int = 64) -> None:
        """Log how the values of an array or tensor are distributed, at the current step."""
        from stoker.run import media

        about = media.histogram(values, bins)
        self._recorder.event("media", kind="histogram", name=name, step=self.step, about=about)

    def artifact(self, path: Path | str, name: str | None = None, kind: str = "file") -> Path:
        """Record a file or folder that the run made, with checksums; returns where it stands in the run.

        One from outside is brought in, under its name or the one that is given, and its
        content is stored once however many runs have it.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: the name leads out of the run's artifacts.
        """
        source = Path(path).absolute()
        name = artifacts.checked_name(name or source.name)
        if self.world.rank > 0:
            return source
        if not source.resolve().is_relative_to(self.directory.path.resolve()):
            source = artifacts.bring_in(self.directory, source, name)
        files = artifacts.describe(self.directory, source)
        relative = str(source.resolve().relative_to(self.directory.path.resolve()))
        self._recorder.event("artifact", name=name, kind=kind, path=relative, files=files)
        self.made.add(kind)
        return source

    def use(self, artifact: Path | str) -> Path:
        """Record that the run uses an artifact of another run, or any file or folder; returns its path.

        Args:
            artifact: `RUN:NAME` (a run's id or `experiment/id`, and the artifact's name), or a path.

        Raises:
            BadInput: there is no such run, artifact or path.
        """
        found = lineage.resolve(self.directory.path.parent.parent, artifact)
        if self.world.rank == 0:
            self._recorder.event("used", name=found.name, run=found.maker, files=found.files)
            lineage.tell_maker(found, self.directory, self.directory.record()["uid"])
        return found.path

    def data(self, name: str, path: Path | str, *, fingerprint: str = "", revision: str = "") -> Path:
        """Record that the run reads a dataset, known by its content; returns its path.

        A file or folder is read for it once, and again when it has changed; of more than 1 GiB only samples
        are. Warns where the content is another than when the run began.

        Args:
            name: what the run calls it.
            path: a file or folder; or what names data that is elsewhere: an id of the hub, a URL.
            fingerprint: what tells the content of such data apart: with it nothing is read here.
            revision: of a dataset of the hub, the commit.

        Raises:
            BadInput: there is nothing at the path, or it cannot be read.
        """
        if self.world.rank > 0:
            return Path(path)
        try:
            about = data.describe(str(path), fingerprint, revision)
        except OSError as error:
            raise BadInput(
                f"data {name!r} cannot be read: {error.filename}: {error.strerror}; give a file or a folder, "
                "or with fingerprint= or revision= what names data that is elsewhere"
            ) from error
        before = data.record(self.directory.provenance / provenance.DATA, name, about, self.attempt)
        if before is not None:
            log.warning(
                "data %r is not what it was when the run began: %s, now %s", name, before,
                about.get("fingerprint"),
            )  # fmt: skip
        return Path(path)

    def watch(self, model: Any, *, every: int = 100, histograms: bool = False, bins: int = 64) -> None:
        """Log the norms of every parameter and its gradient, every so many optimizer steps.

        They join the next `log`, at its step: `gradients/NAME`, `parameters/NAME`, and
        `gradient_norm` over all. The device is never waited for.
        """
        from stoker.engine.watch import Watch

        self._watches.append(Watch(model, every, bins if histograms else 0, self._recorder.carry))

    @property
    def latest(self) -> dict[str, float]:
        """The newest value of every metric that this process wrote.

        Of one that is reduced over ranks it is there once they have agreed, see `agree`.
        """
        return self._recorder.latest

    @property
    def unreduced(self) -> dict[str, tuple[int, float, How]]:
        """Of metrics that are reduced over ranks: the step, this rank's newest value, and how."""
        self._recorder.write_arrived(wait=True)
        return self._recorder.unreduced

    def agree(self, of_ranks: Sequence[Mapping[str, tuple[int, float, How]]]) -> None:
        """Take what each rank has `unreduced`."""
        self._recorder.agree(of_ranks)

    def follow(self, metric: str) -> None:
        """Keep the step of the newest value of a metric: `followed_at`."""
        self._recorder.followed = metric

    @property
    def followed_at(self) -> int | None:
        """The step of the newest value that this attempt wrote of the metric that is followed."""
        return self._recorder.followed_at

    @property
    def summary(self) -> dict[str, Summary]:
        """What every metric of the run came to so far: last, min, max, best."""
        self._recorder.write_arrived(wait=True)
        return view.load(self.directory).summary()

    def fingerprint(self, name: str, value: str) -> None:
        """Record the fingerprint of something the run depends on; warns where it changed since the start.

        Rank 0 does.
        """
        if self.world.rank > 0:
            return
        tag = f"fingerprint.{name}"
        known = view.load(self.directory).tags.get(tag, value) if self.continued else value
        if known != value:
            log.warning("%s changed since the run began (%s, now %s)", name, known[:12], value[:12])
        self.tag(**{tag: value})

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_parents:
            return
        if error is None:
            try:
                self.conclude()
            except BaseException as failed:
                self._leave(failed)
                raise
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """End as an error says, or the lack of one, and let go of the run."""
        try:
            if self._finish is not None and not self.stop.at_once:
                self._finish_writing(self._finish)
            if isinstance(error, Stopped):
                self.end(error.status)
            elif isinstance(error, KeyboardInterrupt):
                self.end(view.INTERRUPTED)
            elif error is not None:
                self.end(view.FAILED, f"{type(error).__name__}: {error}")
            else:
                self.end(view.FINISHED)
        finally:  # a disk that is full keeps nobody from going on with the run
            self.close()

    def _end_with_script(self) -> None:
        """The process is over and has not closed the run: it ends as the script did, so far as that is known.

        An interactive session goes on after an error.
        """
        raised = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
        if raised is None and self.stop.requested is not None:  # by a SystemExit, of which nothing is kept
            raised = Stopped(self.stop.requested)
        if not self._is_parents:
            self._leave(raised)

    @staticmethod
    def _finish_writing(finish: Callable[[float], None]) -> None:
        try:
            finish(_FINISH_SECONDS)
        except Exception as unwritten:
            log.warning("the last checkpoint was not written: %s", unwritten)

    @property
    def _is_parents(self) -> bool:
        """Whether this process was made by fork within the run, which is not its own to end then."""
        return os.getpid() != self._process

    # -- what the loop and the commands call ----------------------------------------------

    samples_per_epoch: int | None = None
    """Samples of an epoch in the attempt before this one, where it was to have the same share of them."""
    plan: Mapping[str, Any] = types.MappingProxyType({})
    """What a Trainer says of the steps that it is going to make: `total_steps`, `samples_per_step`, ..."""
    profile: tuple[int, int] | None = None
    """First and last step that a Trainer profiles."""
    measure: int | None = None
    """How many steps a Trainer times before it stops, writing `logs/timing-rank-N.json`."""
    until: int | None = None
    """The step after which a run that is made again ends, as a stopped one."""
    heart: Heart | None = None
    """Says how far the loop is, where somebody looks: a Trainer, or a search whose trial it is."""
    _newest: Future[Newest] | None = None
    """The checkpoint that it goes on from, looked for while the model is built."""
    _waits_for_disk = True
    _ended = False
    _finish: Callable[[float], None] | None = None
    _conclude: Callable[[], None] | None = None
    _stepped_by_trainer = False
    _goes_on_behind = False
    """Whether it is continued, and nothing was logged yet without a step."""
    _listener: Callable[[int, Mapping[str, Any]], None] | None = None
    _compared: frozenset[str] = frozenset()

    def take_over_steps(
        self, finish: Callable[[float], None], conclude: Callable[[], None], heart: Heart
    ) -> None:
        """From now on a Trainer says which step it is. Raises ValueError where one does already.

        Args:
            finish: waits up to so many seconds for what the Trainer still writes, however the run ends.
            conclude: saves what a loop left that was ended early, where no error ended it.
            heart: says how far the Trainer's loop is.
        """
        if self._stepped_by_trainer:
            raise ValueError("a run has one Trainer: its checkpoints are that one's")
        self._stepped_by_trainer = True
        self._finish, self._conclude = finish, conclude
        self.heart = heart

    def conclude(self) -> None:
        """What is trained is over, and no error ended it: a Trainer saves what its loop left."""
        if self._conclude is not None and not self._ended:
            self._conclude()

    def newest_checkpoint(self, but: Set[int] = frozenset()) -> Newest:
        """The checkpoint to go on from.

        A run that is continued begins to verify it when it is opened, while the model is built.

        Args:
            but: steps whose checkpoints are left out.
        """
        ahead, self._newest = self._newest, None
        return ahead.result() if ahead is not None and not but else self._verify(but)

    def _verify(self, but: Set[int] = frozenset()) -> Newest:
        return manifest.newest(self.directory.checkpoints, self.mend, but=but)

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append an event of the loop: plan, resumed, checkpoint."""
        self._recorder.event(kind, **fields)
        if kind == "plan":
            self.plan = fields
        if kind == "checkpoint":
            self._uploads.begin()
        if kind == "resumed":
            step = fields["step"]
            newest = {name: s.until(step) for name, s in self._before.items() if s.x[0] <= step}
            self._recorder.go_on_from(step, newest)
            self._before = {}

    def flush(self) -> None:
        """Write every metric logged so far, waiting for the device, and bring the journal to the disk.

        Raises OSError where some of it did not come there, now or before.
        """
        self._recorder.write_arrived(wait=True)
        self._recorder.sync()
        disk.bring()  # by what names it is found

    def end_if_lost(self) -> None:
        """End the process where another machine has taken the run, which may have stood still for long.

        Its checkpoints stand in one folder with those of this one. Raises OSError where that cannot be seen.
        """
        if self._lease is not None:
            self._lease.check(self._give_up)

    def end(self, status: str, error: str | None = None) -> None:
        """End the attempt with a status. Artifacts may still be recorded until `close`.

        Raises OSError where it cannot be written. A process made by fork ends nothing.
        """
        if not self._ended and not self._is_parents:
            if status == view.FINISHED and self.world.rank == 0 and self.world.size > 1:
                rendezvous.wait_for_others(self.directory, self.attempt, self.world.size)
            self._ended = True
            for watch in self._watches:
                watch.close()
            self._sample_system()
            self._shipping.finish()
            self._recorder.event("attempt_ended", status=status, error=error)
            self._recorder.write_arrived(wait=True)
            if self._waits_for_disk:
                self._recorder.sync()
                disk.bring()
            else:
                disk.bring_soon(self._recorder.file)

    def close(self) -> None:
        """Let go of the run. The follower goes on by itself until everything is shipped.

        A process made by fork lets go of nothing.
        """
        if self._is_parents:
            return
        atexit.unregister(self._end_with_script)
        if self._periodic is not None:
            self._periodic.close()
        self._recorder.close()
        self._stop_logging()
        if self._lease is not None:
            self._lease.end_keeping()  # who takes the lock now may take the lease too: it was ours to the end
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if (self._recorder.used or self.continued) and not self.stop.at_once:
                self._uploads.finish()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _stop_logging(self) -> None:
        for handler in self._logging:
            log.removeHandler(handler)
            handler.close()
        self._logging = []

    def discard_if_unused(self) -> None:
        """Undo the opening: delete a run that this attempt made and never logged to."""
        self.close()
        if self.world.rank == 0 and not self.continued and not self._recorder.used and not self._is_parents:
            mirror.remove(self.directory)

    def wait_for_sinks(self, timeout: float) -> list[Any]:
        """After `close`: wait for the follower up to `timeout` seconds; returns each sink's state."""
        return self._shipping.wait(timeout)

    # -- the journal --------------------------------------------------------------------

    def _begin(self) -> None:
        """The first metric: from now on there is something to ship and to look after."""
        jobs = [Job(_SYNC_SECONDS, self._sync)]
        if self.world.rank == 0:
            self._shipping.begin()
            self._uploads.begin()
            jobs += [
                Job(_SINKS_SECONDS, self._shipping.look_after),
                Job(_SYSTEM_SECONDS, self._sample_system),
                Job(_SINKS_SECONDS, self._uploads.look_after),
            ]
        self._periodic = Periodic(jobs)

    def _media(self, kind: str, name: str, encode: Callable[[], Any]) -> None:
        """Write what is to be looked at as a file, and say so."""
        if self.world.rank > 0:
            return
        from stoker.run import media

        encoded = encode()
        file = media.write(self.directory, kind, name, self.step, encoded)
        self._recorder.event("media", kind=kind, name=name, step=self.step, file=file, about=encoded.about)

    # -- beside the loop ----------------------------------------------------------------

    def _sync(self) -> None:
        self._recorder.write_arrived(wait=False)
        self._recorder.sync()
        if self._system is None and self.world.rank == 0:
            self._system = SystemSampler(self.directory.path)

    def _sample_system(self) -> None:
        if self._system is None:
            return
        self._recorder.system(self.step, self._system.sample())

    def _give_up(self, reason: str) -> None:
        """End at once: what this process would write is another's to write now."""
        log.error("%s", reason)
        os._exit(EXIT_FAILED)
