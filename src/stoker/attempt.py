"""Attempt: one lifetime of a run in this process, from opening its directory to letting go of it.

Opening creates the run's directory or continues it, locks it, records what the run is made from,
and starts an attempt in the journal. From then on everything is an append. The follower that ships
the journal to the sinks starts with the first metric, so a run that is refused before it begins
leaves nothing behind.

User code sees a `Run` (`user_run.py`). A Trainer, a search and the commands use its `attempt`.
No torch is imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import operator
import os
import platform
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from stoker import config as configs
from stoker import disk, redaction, storage, supervision, threads, words
from stoker.checkpoint import manifest
from stoker.checkpoint.manifest import Checkpoint
from stoker.errors import EXIT_FAILED, BadInput, Stopped
from stoker.periodic import Periodic, Task
from stoker.reproduce import code_changes, provenance
from stoker.run import (
    artifacts,
    finding,
    journal,
    lease,
    messages,
    mirror,
    opening,
    rendezvous,
    reproducing,
    view,
)
from stoker.run.deferred import flatten
from stoker.run.held import Held
from stoker.run.launch_store import LaunchStore
from stoker.run.recorder import Recorder
from stoker.run.reduction import How
from stoker.run.series import Goal
from stoker.run.state import RunView
from stoker.status import FAILED, FINISHED, INTERRUPTED, STOPPED
from stoker.stopping import StopRequests
from stoker.supervision import Heart
from stoker.tracking.background import Background
from stoker.world import World

log = logging.getLogger("stoker")

Newest = tuple[Checkpoint | None, list[str]]
"""The newest valid checkpoint, and those passed over, each with the reason."""

_LOOKS = 0.1  # seconds between two looks for a rank that cannot take part
_LAST_WORDS = 10.0  # seconds to end because of it, whatever blocks that
_FINISH_SECONDS = 60.0  # for the checkpoint that is being written when a run fails


class Attempt:
    """This process's part in one attempt at a run; arguments and errors as for `Run`.

    Rank 0 writes the run. Other ranks write only the metrics that are reduced over ranks.
    """

    recorder: Recorder
    """Writes the journal of this process."""
    number: int
    """1 for the first attempt at the run."""
    continued: bool
    """Whether the run existed before."""
    samples_per_epoch: int | None = None
    """Samples per epoch in the previous attempt, if it used the same share of the data."""
    plan: Mapping[str, Any] = types.MappingProxyType({})
    """What a Trainer says of the steps it is going to make; see `plan_steps`."""
    profile: tuple[int, int] | None = None
    """First and last step that a Trainer profiles."""
    measure: int | None = None
    """The number of steps that a Trainer times before it stops; it writes `logs/timing-rank-N.json`."""
    until: int | None = None
    """The step after which a run that is being reproduced ends, with the status `stopped`."""
    warns_of_continuing = False
    """Whether the loop may begin at its start although the run is continued: nothing has been logged yet, and
    nobody has asked for the step."""
    heart: Heart | None = None
    """Says how far the loop is, to whoever supervises it; set by a Trainer, or by a search for its trial."""

    _newest: Future[Newest] | None = None
    """The checkpoint to resume from, which is verified while the model is built."""
    _waits_for_disk = True
    _ended = False
    _finish: Callable[[float], None] | None = None
    _conclude: Callable[[], None] | None = None
    _trained: Callable[[], int] | None = None
    _has_resumed = False
    _stepped_by_trainer = False
    _refusals: Periodic | None = None
    _launch_store: LaunchStore | None = None
    _listener: Callable[[int, Mapping[str, Any]], None] | None = None
    _compared: frozenset[str] = frozenset()
    _notes: frozenset[str] = frozenset()
    """The notes of the run so far, as they are recorded; only rank 0 knows them."""

    def __init__(
        self,
        experiment: str,
        name: str | None,
        *,
        config: Any,
        runs: Path | str | None,
        sources: Mapping[str, str] | None,
        recipe: Mapping[str, Any] | None,
        seed: int,
        code: Path | None,
        accept_drift: bool,
        provenance: Path | None,
    ) -> None:
        opening.refuse_in_import()
        asked = reproducing.taken(experiment, name, config, seed)
        if asked is not None:
            runs, experiment, name = asked.runs, asked.experiment, asked.id
            sources, recipe, provenance = asked.sources, asked.recipe, Path(asked.provenance)
        folder = finding.given_folder(runs).absolute()
        self.world = World.current()
        self.directory = finding.locate(folder, experiment, name or opening.new_id(self.world))
        self.seed = seed
        self._moved = 0
        """How many steps `log` has made."""
        self._moved_alone = False
        self.step = 0
        """The step that values are logged at; a Trainer moves it, or else `log` does."""
        self.begun_at = 0
        """The step that this attempt goes on from: the run's last, or that of a Trainer's checkpoint."""
        self.goals: dict[str, Goal] = {}
        """Whether metrics are better low or high, as far as the loop said so."""
        self.layout: dict[str, Any] = {}
        """How the previous attempt used the devices, if a Trainer ran it."""
        self.stop = StopRequests()
        self.made: set[str] = set()
        """The kinds of artifacts that this attempt has recorded."""
        self.recorded: dict[str, journal.Event] = {}
        """The artifacts of the run so far, by name; only rank 0 knows them."""
        self.watches: list[Any] = []
        """Those of `Run.watch`, which are closed with the attempt."""
        self.held = Held()
        """What a resumed run logs in a part of its script that it has been through."""
        self._before: RunView | None = None
        """The run as this attempt found it, until it is known at which step it goes on."""
        self._saved: frozenset[int] = frozenset()
        """The steps whose checkpoints were completed, and are not void."""
        self._descriptor, self._process = -1, os.getpid()
        self._lease: lease.Lease | None = None
        copy = mirror.of(self.directory)
        self._background = Background(self.directory, self.world.rank == 0, copy)
        self.mend = copy.fetch_checkpoint if copy is not None else None
        """Fetches files of a checkpoint that the object store has and this machine lacks."""
        self._logging: list[logging.Handler] = []
        parents = [asked.parent] if asked is not None else []
        record = opening.record(self.directory, config, sources, recipe, seed, parents)
        code = code or opening.script() or Path.cwd()
        if self.world.rank > 0:
            self._join(record, code if provenance is None else None)
        else:
            self._lead(record, code, accept_drift, provenance)
        if asked is not None:
            self._make_again(asked)
        atexit.register(self._end_with_script)

    # -- opening ------------------------------------------------------------------------

    def _lead(
        self, record: dict[str, Any], code: Path, accept_drift: bool, recorded_provenance: Path | None
    ) -> None:
        """Create or continue the directory, and begin an attempt."""
        mark = uuid.uuid4().hex
        with contextlib.ExitStack() as undo:
            self._descriptor = opening.take(self.directory, rendezvous.Opening(mark, self.world.launch))
            undo.callback(os.close, self._descriptor)
            self._lease = opening.lease_of(self.directory)
            if self._lease is not None:
                undo.callback(self._lease.release)
            self.continued = self.directory.exists()
            changes = self._open(record, code, accept_drift, recorded_provenance)
            if self._lease is not None:
                self._lease.keep(self._give_up)
            if self.continued:
                self._newest = threads.begun(self._verify, "verify")
            self.number, writer = journal.start_attempt(self.directory.journal)
            undo.callback(writer.close)
            self.recorder = Recorder(writer, self.world, self._begin)
            disk.bring_soon(self.directory.journal)
            self._logging = messages.write_to(self.directory.logs / "rank-0.log")
            undo.callback(self._stop_logging)
            self._note_attempt()
            other = self._other_code(code) if self.continued and recorded_provenance is None else {}
            self.recorder.event(
                "attempt_started", pid=os.getpid(), host=platform.node(), drift=changes,
                opening=mark, world=self.world.size, machines=self.world.machines, step=self.step,
                continued=self.continued, **({"code": other} if other else {}),
            )  # fmt: skip
            undo.pop_all()
        if self.world.size > 1:
            self._launch_store = LaunchStore(self.world, self.directory)
            until = time.monotonic() + rendezvous.TIMEOUT
            look = functools.partial(self._look_for_refusal, mark, self._launch_store, until)
            self._refusals = Periodic([Task(_LOOKS, look)], "refusals")

    def _look_for_refusal(self, mark: str, store: LaunchStore, until: float) -> None:
        """End the process if another rank cannot take part: the main thread may wait for it in C code.

        Args:
            mark: the id of this opening.
            store: where ranks speak that may not see the run.
            until: when to stop looking; by then all have joined that will.
        """
        store.say_opened()
        said = rendezvous.refusal(self.directory, mark) or store.refusal()
        if said:
            self._end_refused(said)
        elif (
            journal.ranks(self.directory.journal, self.number) >= self.world.size or time.monotonic() > until
        ) and self._refusals is not None:
            self._refusals.close()

    def _end_refused(self, said: str) -> None:
        """End because of a rank's refusal; a run that this attempt has created is deleted."""
        end = threading.Timer(_LAST_WORDS, os._exit, (BadInput.exit_code,))
        end.daemon = True
        end.start()
        log.error("%s", said)
        supervision.say_refused(said)
        try:
            rendezvous.end_refusal(self.directory)
            if self.continued or self.recorder.used:
                self.end(FAILED, said)
            self.discard_if_unused()
            sys.stdout.flush()
        finally:
            os._exit(BadInput.exit_code)

    def _join(self, record: dict[str, Any], code: Path | None) -> None:
        """Take part in the attempt that rank 0 of this launch begins.

        Raises BadInput if this machine does not see the run, or if rank 0 has another config or other code:
        ranks would train different models as one.
        """
        unshared = LaunchStore(self.world, self.directory).refuse_unshared
        self.number, begun = rendezvous.wait(
            self.directory, self.world.launch, self.world.rank, refused=unshared
        )
        found = opening.differences(record, self.directory.record(), begun["drift"])
        said = self._why_refused(found.refused, code, begun)
        if said:
            rendezvous.refuse(self.directory, begun["opening"], said)
            raise BadInput(said)
        writer = journal.join_attempt(self.directory.journal, self.number, self.world.rank)
        self.recorder = Recorder(writer, self.world, self._begin)
        disk.bring_soon(self.directory.journal)
        self.step = self.begun_at = begun["step"]
        self.continued = begun["continued"]
        self._logging = messages.write_to(self.directory.logs / f"rank-{self.world.rank}.log")
        self._note_attempt()
        if found.allowed and self.world.local_rank == 0:  # the others of a machine are given the same command
            log.warning("the config differs from that of rank 0 (there): %s", opening.said_of(found.allowed))

    def _why_refused(self, config: dict[str, Any], code: Path | None, begun: dict[str, Any]) -> str:
        """Why this rank cannot train together with rank 0; empty if it can.

        Args:
            config: how its config differs; see `opening.Differences`.
            code: its code, unless that is known.
            begun: the first event of the attempt.
        """
        rank, first = f"rank {self.world.rank} on {platform.node()}", f"rank 0 on {begun['host']}"
        if config:
            return (
                f"the config of {rank} (here) differs from that of {first} (there): "
                f"{opening.said_of(config)}; give the same command on every machine"
            )
        changed = code and code_changes.differs_from(self.directory.provenance, begun.get("code", {}), code)
        if changed:
            return (
                f"the code of {rank} differs from that of {first}: {words.some(changed)}; "
                "every machine needs the same version of it"
            )
        return ""

    def _note_attempt(self) -> None:
        """Mark in the log where an attempt begins, or which process is which."""
        if self.continued or self.world.size > 1:
            log.debug("attempt %d of %s, process %d", self.number, self.directory.path, os.getpid())

    def _open(
        self, record: dict[str, Any], code: Path, accept_drift: bool, recorded_provenance: Path | None
    ) -> dict[str, tuple[Any, Any]]:
        """Create or continue the directory; returns how the config has drifted."""
        if not self.continued:
            self.directory.prepare()
            record["code"] = self._record_code(code, recorded_provenance)
            self.directory.create(record)
            return {}
        if not self.directory.journal.is_dir():
            raise BadInput(
                f"{self.directory.path} has no journal, and without it nothing is known of the run: "
                "restore it, or use another name"
            )
        self.directory.logs.mkdir(exist_ok=True)  # somebody may have deleted it
        self._before = before = view.load(self.directory)
        shared = before.config.keys() & record["config"].keys()  # the code may have added keys since
        refused = {k: v for k, v in configs.drift(before.config, record["config"]).items() if k in shared}
        if refused and not accept_drift:
            raise BadInput(opening.explain_drift(self.directory, refused, bool(record["recipe"])))
        self.step = self.begun_at = before.step
        self.warns_of_continuing = self.step > 0
        self.goals.update(before.goals)
        self.recorded = dict(before.artifacts)
        self._notes = frozenset(text for _, text in before.notes)
        self.layout = before.attempts[-1].layout if before.attempts else {}
        if before.config.get("data_share") == record["config"].get("data_share"):
            self.samples_per_epoch = before.samples_per_epoch
        self._saved = frozenset(before.checkpoints)
        return configs.drift(before.record["config"], record["config"])

    def _other_code(self, code: Path) -> dict[str, str | None]:
        """The code files that have changed since the run began; warns of them once."""
        changed = code_changes.since_begun(self.directory.provenance, code)
        attempts = self._before.attempts if self._before is not None else ()
        if changed and changed != (attempts[-1].code if attempts else {}):
            log.warning(
                "the code has changed since the run began (%s): from here on the new code is used",
                words.some(list(changed)),
            )  # fmt: skip
        return changed

    def _record_code(self, code: Path, recorded_provenance: Path | None) -> dict[str, Any]:
        """Record what the run is made from; returns what `run.json` says of it."""
        if recorded_provenance:
            provenance.link(recorded_provenance, self.directory.provenance)
            if not (recorded_provenance / provenance.ENVIRONMENT).is_file():  # of a run that is reproduced
                provenance.write_environment(self.directory.provenance)
            return provenance.summary_of(recorded_provenance)
        runs = self.directory.runs
        return provenance.record(self.directory.provenance, code, runs, artifacts.store(runs))

    def _make_again(self, asked: reproducing.Again) -> None:
        """Compute as the reproduced run did, and end at its last step."""
        self.layout = dict(asked.layout)
        self.until = asked.until
        if asked.until is not None:
            self.listen(self._end_after)
        self.event("tags", tags={reproducing.TAG: f"{asked.of['experiment']}/{asked.of['id']}"})

    def _end_after(self, step: int, values: Mapping[str, Any]) -> None:
        """End a loop without a Trainer once it is past the last step; a Trainer ends by itself."""
        if not self._stepped_by_trainer and self.until is not None and step > self.until:
            self.stop.ask(STOPPED)

    # -- what is logged -----------------------------------------------------------------

    def log(self, values: Mapping[str, Any], step: int | None, reduce: How | None) -> None:
        """Write metrics; see `Run.log`."""
        if self.held.active and (step is None or step <= self.step):  # what is later is void
            taken = {key: _as_now(value) for key, value in flatten(values).items()}
            at = self.step if step is None else step
            self.held.do(functools.partial(self.log, taken, at, reduce))
            return
        values = flatten(values)
        if step is None:
            if self.warns_of_continuing:
                self._warn_of_continuing()
            if not self._stepped_by_trainer:
                self._move(reduces=reduce is not None)
            step = self.step
        if reduce is not None and self.world.size > 1 and not self._compared.isdisjoint(values):
            raise ValueError(
                f"trials are compared by {', '.join(self._compared)}, and with reduce={reduce!r} each rank "
                "has its own value of it: log the result of trainer.evaluate or trainer.measure"
            )
        self.recorder.log(values, step, reduce)
        if step > self.step and not self._stepped_by_trainer:
            self.step = operator.index(step)
            self.warns_of_continuing = False  # the loop goes on beyond what the run has
        if self._listener is not None:
            self._listener(step, values)

    def _move(self, *, reduces: bool) -> None:
        """Move to the next step, as each `log` without one does if there is no Trainer. Raises ValueError."""
        self.step += 1
        self._moved += 1
        if self.world.size > 1 and reduces and self._moved_alone:
            raise ValueError(
                "each run.log without step= moves this rank's step, also one without reduce=, and values are "
                "reduced with those of other ranks at the same step, so ranks that differ in their calls "
                "would mix the values of different steps: give step= to every run.log"
            )
        self._moved_alone |= not reduces

    def _warn_of_continuing(self) -> None:
        """Warn of a loop without a Trainer, which may begin at its start although the run is continued."""
        self.warns_of_continuing = False
        if not self._stepped_by_trainer and self.heart is None:
            log.warning(
                "run %r is continued, at step %d: begin the loop at run.step, or use another name for a new "
                "run",
                self.directory.id, self.step + 1,
            )  # fmt: skip

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append an event."""
        self.recorder.event(kind, **fields)

    def medium(self, kind: str, name: str, step: int, **fields: Any) -> None:
        """Record something to look at, such as an image."""
        self.event("media", kind=kind, name=name, step=step, **fields)
        self._keep()

    def artifact(self, name: str, kind: str, path: str, files: list[dict[str, Any]]) -> None:
        """Record an artifact, which replaces the one of the same name."""
        event = {"name": name, "kind": kind, "path": path, "files": files}
        self.event("artifact", **event)
        self._keep()
        self.recorded[name] = event
        self.made.add(kind)

    def _keep(self) -> None:
        """The run has something to keep, even if it never logs a metric."""
        if self.world.rank == 0:
            self.recorder.begin()

    def note(self, text: str) -> None:
        """Add a note, unless the run has it already."""
        if redaction.text(text) not in self._notes:
            self.event("note", text=text)
            self._notes |= {redaction.text(text)}

    def listen(
        self, listener: Callable[[int, Mapping[str, Any]], None], compared: Sequence[str] = ()
    ) -> None:
        """Call `listener` with every step and the values logged at it, on rank 0.

        Args:
            compared: the metrics that the listener decides by; their values must be those of all ranks.
        """
        self._compared = frozenset(compared)
        if self.world.rank == 0:
            self._listener = listener

    def flush(self) -> None:
        """Write every metric logged so far, waiting for the device, and sync the journal to disk.

        Raises OSError if any of it, now or earlier, was not stored.
        """
        self.recorder.write_arrived(wait=True)
        self.recorder.sync()
        disk.bring()  # the directories too

    # -- what a Trainer asks ------------------------------------------------------------

    def take_over_steps(
        self,
        finish: Callable[[float], None],
        conclude: Callable[[], None],
        heart: Heart,
        trained: Callable[[], int],
    ) -> None:
        """From now on a Trainer sets the step. Raises ValueError if another one already does.

        Args:
            finish: waits up to this many seconds for what the Trainer is still writing, however the run ends.
            conclude: saves the state of a loop that was left early without an error.
            heart: says how far the Trainer's loop is.
            trained: returns the number of steps that the run has made.
        """
        if self._stepped_by_trainer:
            raise ValueError(
                "a run has one Trainer, to which its checkpoints belong: put several models into one, such "
                "as torch.nn.ModuleDict({'first': ..., 'second': ...}), and give each its own optimizer, "
                "optimizer={'first': ..., 'second': ...}; or, for folds, open a run for each within train: "
                "with stoker.Run('folds', f'{run.directory.id}-{k}', runs=run.directory.runs) as fold: ..."
            )
        self._stepped_by_trainer = True
        if self._moved and self.world.rank == 0:
            log.warning(
                "run.log was called before the Trainer was created, where each call without step= is a step: "
                "the last of these values is at step %d. Create the Trainer first, or give step=0", self.step,
            )  # fmt: skip
        self.step -= self._moved
        self._finish, self._conclude, self._trained = finish, conclude, trained
        threads.at_end_of_script(self._conclude_script)
        self.heart = heart

    def plan_steps(self, **plan: Any) -> None:
        """A Trainer says which steps it is going to make: `total_steps`, `samples_per_step`, ..."""
        self.event("plan", **plan)
        self.plan = plan

    def checkpoint_made(self, step: int, path: str, size: int) -> None:
        """A checkpoint is on disk.

        Args:
            path: its folder in the run's directory.
            size: its bytes.
        """
        self.event("checkpoint", step=step, path=path, bytes=size)
        self._saved |= {step}
        self._background.uploads.begin()

    def resumed(self, step: int, passed_over: Sequence[str] = ()) -> None:
        """The run goes on from a step, and what it had logged beyond is void.

        Args:
            passed_over: the newer checkpoints that are not valid, each with the reason.
        """
        self.event("resumed", step=step, passed_over=passed_over)
        self.begun_at = step
        self._has_resumed = True
        self._saved = frozenset(saved for saved in self._saved if saved <= step)
        points = self._before.points if self._before is not None else {}
        newest = {name: s.newest(step) for name, s in points.items() if s.x[0] <= step}
        self.recorder.go_on_from(step, newest)
        self._before = None

    def newest_checkpoint(self, but: Set[int] = frozenset()) -> Newest:
        """The checkpoint to resume from.

        A continued run begins to verify it while it is opened, so the model is built meanwhile.

        Args:
            but: steps whose checkpoints are left out.

        Raises Unreachable; see `manifest.newest`.
        """
        ahead, self._newest = self._newest, None
        return ahead.result() if ahead is not None and not but else self._verify(but)

    def _verify(self, but: Set[int] = frozenset()) -> Newest:
        return manifest.newest(self.directory.checkpoints, self.mend, but, self._saved)

    def end_if_lost(self) -> None:
        """End the process if another machine has taken over the run, as it may while this one is suspended.

        Both would write checkpoints into one folder. Raises OSError if the lease cannot be read.
        """
        if self._lease is not None:
            self._lease.check(self._give_up)

    # -- ending -------------------------------------------------------------------------

    def conclude(self) -> None:
        """The user's code is over without an error: a Trainer saves what its loop left."""
        self.held.release()
        if self._conclude is not None and not self._ended:
            with self.stop.postponed():
                self._conclude()

    def leave(self, error: BaseException | None) -> None:
        """End with the status that an error means, or `finished` without one, and close the run."""
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
        try:
            if not self._ended:
                self.held.release()
            if self._finish is not None and not self.stop.at_once:
                self._finish_writing(self._finish)
            if isinstance(error, Stopped):
                self.end(error.status)
            elif isinstance(error, KeyboardInterrupt):
                self.end(INTERRUPTED)
            elif error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
                self.end(FINISHED)
            else:
                self.end(FAILED, f"{type(error).__name__}: {error}")
        finally:  # even if the disk is full: the lock must be released
            self.close()

    def _end_with_script(self) -> None:
        """The process ends without having closed the run: end it as the script ended, if that is known.

        In an interactive session an earlier error says nothing, since the session continued after it. The
        interpreter does not say at its end whether `sys.exit` was called: then the run counts as finished.
        """
        if not self._is_parents:
            self._leave(self._error_of_script())

    def _error_of_script(self) -> BaseException | None:
        raised = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
        if raised is None and self.stop.requested is not None:  # a SystemExit leaves no trace in sys
            raised = Stopped(self.stop.requested)
        return raised

    def _conclude_script(self) -> None:
        """The script has ended: save what its loop left, if it did so without an error."""
        if self._is_parents or self._error_of_script() is not None:
            return
        try:
            self.conclude()
        except Stopped:  # all is saved, and the script is over: it ends as one that nobody stopped
            self.stop = StopRequests()
        except Exception as unsaved:
            log.warning("what was trained since the newest checkpoint is not saved: %s", unsaved)

    @staticmethod
    def _finish_writing(finish: Callable[[float], None]) -> None:
        try:
            finish(_FINISH_SECONDS)
        except Exception as unwritten:
            log.warning("the last checkpoint was not written: %s", unwritten)

    @property
    def _is_parents(self) -> bool:
        """Whether this process was forked within the run; it must not end its parent's run."""
        return os.getpid() != self._process

    def end(self, status: str, error: str | None = None) -> None:
        """End the attempt with a status. Artifacts may still be recorded until `close`.

        Raises OSError if it cannot be written. In a forked process it does nothing.
        """
        if self._ended or self._is_parents:
            return
        if self.heart is not None:
            self.heart.pause()  # a loop without a Trainer does not say that it is over
        if status == FINISHED and self.world.rank == 0 and self.world.size > 1:
            rendezvous.wait_for_others(self.directory, self.number, self.world.size)
        if status == FINISHED and self.world.rank == 0:
            self.recorder.begin()  # it may have logged nothing, and is kept all the same
        self._ended = True
        for watch in self.watches:
            watch.close()
        self._background.sample(self.recorder, self.step)
        self._background.shipping.finish()
        made: dict[str, int] = {}
        if self._trained is not None and (self._has_resumed or not self.continued):
            made["step"] = self._trained()  # a Trainer that failed before it resumed does not know it
        self.recorder.event("attempt_ended", status=status, error=error, **made)
        self.recorder.write_arrived(wait=True)
        if self._waits_for_disk:
            self.recorder.sync()
            disk.bring()
        else:
            disk.bring_soon(self.recorder.file)
        if self.stop.requested is None:
            self._background.shipping.say_if_unanswered()

    def close(self) -> None:
        """Release the run. The follower continues by itself until everything is shipped.

        In a forked process it does nothing.
        """
        self._close(discard=False)

    def _close(self, *, discard: bool) -> None:
        if self._is_parents:
            return
        atexit.unregister(self._end_with_script)
        if self._refusals is not None:
            self._refusals.close()
        if self._launch_store is not None:
            self._launch_store.say_closed()
        self._background.close()
        self.recorder.close()
        self._stop_logging()
        if self._lease is not None:
            self._lease.end_keeping()  # whoever takes the lock next may take the lease: it was ours until now
        try:
            if discard and self._descriptor >= 0:
                mirror.remove(self.directory)  # while it is locked: nobody opens it in between
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if (self.recorder.used or self.continued) and not self.stop.at_once:
                self._background.uploads.finish(lambda: self.stop.requested is not None)
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    @property
    def uploaded(self) -> bool:
        """After `close`: whether the object store of the run, if it has one, has all of it."""
        return self._background.uploads.whole

    def discard_if_unused(self) -> None:
        """Undo the opening: delete a run that this attempt created and in which there is nothing to keep."""
        is_unused = self.world.rank == 0 and not self.continued and not self.recorder.used
        if is_unused and self._descriptor < 0 and not self._is_parents:
            self._lock_again()
        self._close(discard=is_unused)

    def _lock_again(self) -> None:
        """Lock the run after `close`, unless another process has opened it since."""
        with contextlib.suppress(FileNotFoundError):  # it is gone
            lock = storage.try_lock(self.directory.lock_file)
            if lock is not None and journal.goes_on(self.directory.journal, self.number):
                os.close(lock)
                lock = None
            self._descriptor = -1 if lock is None else lock

    def wait_for_sinks(self, timeout: float) -> list[Any]:
        """After `close`: wait for the follower up to `timeout` seconds; returns each sink's state."""
        return self._background.shipping.wait(timeout)

    def leave_shipping(self) -> None:
        """Let another process ship this run to its sinks, as the process of a search does for its trials."""
        self._background.leave_shipping()

    def leave_to_disk(self) -> None:
        """End without waiting for the disk: one of many short runs; the process ends with `disk.bring`."""
        self._waits_for_disk = False

    def _begin(self) -> None:
        self._background.begin(self.recorder, lambda: self.step)

    def _stop_logging(self) -> None:
        for handler in self._logging:
            log.removeHandler(handler)
            handler.close()
        self._logging = []

    def _give_up(self, reason: str) -> None:
        """End at once: the run belongs to another process now."""
        log.error("%s", reason)
        os._exit(EXIT_FAILED)


def _as_now(value: Any) -> Any:
    """A value to log later; a tensor may be written to meanwhile."""
    return value.detach().clone() if hasattr(value, "detach") else value
