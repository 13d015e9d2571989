"""The controller of a search: asks the study for trials, has them run, and decides after each report.

Everything known is in two places, each written once: the study has the trials and their values, and each
trial's run has what it reached. A controller that was killed reads both and continues; all its decisions are
a function of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial
from stoker import config as configs
from stoker import storage
from stoker.errors import StokerError
from stoker.run import additions, finding, view
from stoker.run.directory import RunDirectory
from stoker.run.series import pareto_front
from stoker.run.state import RunView
from stoker.status import FAILED, FINISHED, INTERRUPTED, KILLED, PAUSED, PREEMPTED, STOPPED
from stoker.tune import forking, record, seen
from stoker.tune import study as studies
from stoker.tune.entries import Entries
from stoker.tune.executor import Executor, TakesAhead
from stoker.tune.failures import Failures
from stoker.tune.peers import Peers
from stoker.tune.plan import SHARE, Plan
from stoker.tune.schedulers import Decision, Full, Known, PopulationBased, Scheduler, State, Trials
from stoker.tune.seen import Seen
from stoker.tune.space import Space
from stoker.tune.stores import Kept
from stoker.tune.tables import DatabaseAway
from stoker.tune.trial import Ended, Report, TrialJob

log = logging.getLogger("stoker")

_RESTARTS = 3
"""How often a trial whose process was killed is restarted without having made progress."""
_LOOK = 1.0
"""Seconds between looks for room, if there was none for any trial; or for a checkpoint to fork."""
_OF_A_RUN: dict[str, State] = {
    FINISHED: "complete", STOPPED: "pruned", PAUSED: "paused", FAILED: "failed"
}  # fmt: skip
_WAITING = (PAUSED, PREEMPTED, INTERRUPTED, KILLED)
"""The statuses of a run that is to be continued."""
_ANSWERS = {Decision.CONTINUE: "continue", Decision.PAUSE: "paused", Decision.STOP: "stopped"}


class Search:
    """One controller's part of a search.

    Args:
        peers: the other controllers of the study, if it may have any.
    """

    def __init__(
        self,
        plan: Plan,
        space: Space,
        study: Study,
        kept: Kept,
        scheduler: Scheduler,
        workers: Executor,
        peers: Peers | None = None,
    ) -> None:
        self.plan = plan
        self.trials: dict[int, Seen] = {}
        self._space, self._kept = space, kept
        self._scheduler, self._workers, self._peers = scheduler, workers, peers
        self._entries = Entries(plan, space, study, kept, peers)
        self._failures = Failures(plan, self.trials, scheduler.lengths)
        self._waits = not isinstance(scheduler, Full)
        """Whether a trial waits after each report for a decision."""
        known = not (self._waits or peers or plan.limited or studies.learns(study))
        self._takes = workers if known and isinstance(workers, TakesAhead) else None
        """What takes trials ahead; None if the next trial depends on what happens before it starts."""
        self._ahead: dict[int, Seen] = {}
        """Trials that were handed to the workers ahead, and start as soon as there is room."""
        self._changed: Callable[[], None] = lambda: None
        self._ending = False
        self._best: Seen | None = None
        """Among the complete trials."""
        self._table: dict[int, Known] = {}
        self._started: dict[int, float] = {}
        """When the processes of the running trials were started."""
        self._said_full = False
        self._disk_failed = ""
        """The error of a trial that the disk ended, if there was one."""
        for trial in self._entries.earlier():
            self._take_in(trial)

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Search until there is nothing left to do. Raises StokerError if it cannot continue."""
        self._failures.check_count()
        self._workers.prepare()
        try:
            self._until_over()
        except DatabaseAway:
            self._let_save()
            raise
        except BaseException:
            self._workers.kill()
            raise
        finally:
            self._workers.close()
        self._note_best()
        self._kept.sync()
        if self._disk_failed:
            raise StokerError(self._disk_failed)

    def _until_over(self) -> None:
        while True:
            full = self._fill()
            self._changed()
            if not self._workers.running and not self._awaits_others:
                if full and not self.over:
                    self._say_full()
                elif self._gives_up():
                    return
            self._hear()
            if self.overspent and not self._ending:
                self.stop()

    def _let_save(self) -> None:
        """Stop the trials with a checkpoint, and wait for their ends, which cannot be told to the study."""
        try:
            self.stop()
            waiting = self._workers.running if self._waits else []
            while self._workers.running:
                for number in waiting:
                    self._workers.answer(number, _ANSWERS[Decision.CONTINUE], save=False)
                happened = self._workers.wait()
                waiting = [one.number for one in happened if isinstance(one, Report) and self._waits]
        finally:
            self._workers.kill()

    def on_change(self, call: Callable[[], None]) -> None:
        """Call something after everything that happens."""
        self._changed = call

    def stop(self) -> None:
        """Start no more trials; running ones stop with a checkpoint, and resume when the search continues."""
        self._ending = True
        self._workers.stop()

    def _told_to_end(self) -> bool:
        """Whether `stop` was called, which a signal can do at any moment."""
        return self._ending

    def _say_full(self) -> None:
        if not self._said_full:
            self._said_full = True
            log.warning("no machine has room for a trial now: the search is waiting for one")

    def _gives_up(self) -> bool:
        """End the trials that can never continue; False if another controller may still let some continue."""
        if self._ending or self.overspent:
            return True
        for number in self._scheduler.given_up(self._known()):
            self._give_up(self.trials[number])
        return self._peers is None or all(trial.over for trial in self.trials.values())

    def _hear(self) -> None:
        """Wait for what happens next, and respond to it."""
        if self._peers is not None:
            self._peers.beat()
        if not self._workers.running:
            time.sleep(self._peers.patience if self._peers is not None else _LOOK)
        for happened in self._workers.wait(self._left()) if self._workers.running else ():
            if isinstance(happened, Report):
                self._decide(happened)
            elif isinstance(happened, Ended):
                self._end(happened)
                self._note_best()
            else:
                self.trials[happened.number] = self._ahead.pop(happened.number)
                self._started[happened.number] = time.monotonic()

    def _left(self) -> float | None:
        """Seconds until something must be done even if nothing happens; None: nothing must."""
        if self._ending:
            return None
        limits = [self._peers.patience] if self._peers is not None else []
        if isinstance(self._scheduler, PopulationBased) and forking.awaited(self.trials):
            limits.append(_LOOK)
        if self.plan.deadline is not None:
            limits.append(self.plan.deadline - time.monotonic())
        if self.plan.budget is not None and self.plan.budget.unit == "hour":
            ranks = len(self._started) * self.plan.ranks
            limits.append((self.plan.budget.amount - self.spent) * 3600 / max(ranks, 1))
        return max(0.0, min(limits)) if limits else None

    @property
    def _awaits_others(self) -> bool:
        """Whether another controller's trials may let a paused trial of this one continue."""
        if self._peers is None or self._ending or self.overspent or not self._peers.running:
            return False
        return any(trial.state == "paused" for trial in self.trials.values())

    # -- what has come of it -------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether every planned trial has ended."""
        if self._ahead or self._begun() < self.plan.trials:
            return False
        return all(trial.over for trial in self.trials.values())

    @property
    def best(self) -> Seen | None:
        """The complete trial with the best value, the first of equals; if none, among those furthest on."""
        if self._best is not None:
            return self._best
        known = [t for t in self.trials.values() if t.value is not None and t.state != "failed"]
        furthest = max((t.amount(t.step) for t in known), default=0.0)
        return min((t for t in known if t.amount(t.step) >= furthest), key=self._order, default=None)

    def _order(self, trial: Seen) -> tuple[float, int]:
        """The sort key of trials with a value, the best first."""
        return self.plan.first.lower(trial.value or 0.0), trial.number

    def _note_best(self) -> None:
        """Write down the best trial so far, which trackers are told."""
        if (best := self.best) is not None:
            about = {"run": best.run, "metric": self.plan.first.metric, "value": best.value}
            record.note_best(self.plan.folder, {**about, "params": best.params})

    def _is_over(self, trial: Seen, state: State) -> None:
        """Note that a trial has ended."""
        trial.state = state
        if trial.failed_at_once:
            trial.values, trial.others = {}, {}  # its donor's
        if state == "complete" and trial.value is not None:
            self._best = min(trial, self._best or trial, key=self._order)

    @property
    def front(self) -> list[Seen]:
        """The complete trials that no other one dominates; with one objective, the best."""
        points = {
            number: trial.lower(self.plan.objectives)
            for number, trial in self.trials.items() if trial.state == "complete"
        }  # fmt: skip
        return [self.trials[number] for number in pareto_front(points)]

    @property
    def overspent(self) -> bool:
        """Whether the time or the budget is used up."""
        if self.plan.deadline is not None and time.monotonic() >= self.plan.deadline:
            return True
        return self.plan.budget is not None and self.spent >= self.plan.budget.amount

    @property
    def spent(self) -> float:
        """What all trials have spent, in the unit of the budget."""
        budget = self.plan.budget
        if budget is not None and budget.unit == "hour":
            running = sum(time.monotonic() - begun for begun in self._started.values()) * self.plan.ranks
            own = (sum(t.spent for t in self.trials.values()) + running) / 3600
        else:
            own = sum(t.done for t in self.trials.values())
        unit = budget.unit if budget is not None else self.plan.unit
        return own + (self._peers.spent(unit) if self._peers is not None else 0.0)

    def _begun(self) -> int:
        """The number of planned trials that have begun, over all controllers."""
        own = sum(trial.parent is None for trial in self.trials.values()) + len(self._ahead)
        return own + (len(self._peers.trials) if self._peers is not None else 0)

    # -- which trial runs next -----------------------------------------------------------------

    def _fill(self) -> bool:
        """Start trials as long as there are any to start; returns whether it ended for lack of room.

        A cluster may lose all its machines while no trial runs, and get others.
        """
        while not self._ending and not self.overspent:
            if not self._workers.free:
                self._hand_over()
                return True
            number = self._next()
            if number is None:
                return False
            self._start(number)
        return False

    def _hand_over(self) -> None:
        """Hand the next trials to the workers ahead, if they are known and none is to resume."""
        if self._takes is None:
            return
        while self._takes.takes_ahead and self._begun() < self.plan.trials:
            if any(trial.resumes for trial in self.trials.values()):
                return
            asked = self._entries.ask(self._begun)
            if asked is None:
                return
            self._ahead[asked.number] = asked
            self._takes.ahead(self._job(asked))

    def _start(self, number: int) -> None:
        """Start a trial, unless the search was told to end in the meantime."""
        trial = self.trials[number]
        if self._told_to_end():
            trial.resumes = True
            return
        trial.state, trial.share = "running", self._next_share(trial)
        self._entries.publish(trial, paused=False)
        self._workers.start(self._job(trial))
        self._started[number] = time.monotonic()
        if self._told_to_end():  # during the start: this trial was not told
            self._workers.stop()

    def _next(self) -> int | None:
        """The trial to run now: an interrupted one, a fork, a promoted one, or a new one."""
        for trial in self.trials.values():
            if trial.resumes:
                trial.resumes = False
                if self._goes_on(trial):
                    return trial.number
        if (forked := self._fork()) is not None:
            return forked
        promoted = self._scheduler.resumes(self._known()) if self._waits else None
        if promoted is not None:
            return promoted
        asked = self._entries.ask(self._begun) if self._begun() < self.plan.trials else None
        if asked is None:
            return None
        self.trials[asked.number] = asked
        return asked.number

    def _goes_on(self, trial: Seen) -> bool:
        """Whether an interrupted trial is to run again.

        Its newest report may not have been decided on, and it will repeat the reports after the checkpoint
        that it resumes from.
        """
        if self.plan.unit == SHARE:
            return True
        run = self._run_of(trial)
        if run is not None:
            known = {**trial.values, **seen.points(run, self.plan.first.metric)}
            begins = seen.begins(run)
            trial.values = {step: value for step, value in sorted(known.items()) if step <= begins}
            self._table.pop(trial.number, None)
        trial.state = "running"
        if not trial.values:
            return True
        return self._continues(trial)

    def _continues(self, trial: Seen) -> bool:
        """Whether a trial without a process continues at once; otherwise it is paused or ended here."""
        decision = self._decision(trial)
        if decision is Decision.PAUSE:
            self._pause(trial)
        elif decision is Decision.STOP:
            self._give_up(trial)
        return decision is Decision.CONTINUE

    def _fork(self) -> int | None:
        """Begin a trial in place of one that population based training has stopped, if there is one."""
        rule = self._scheduler
        if not isinstance(rule, PopulationBased):
            return None
        fork = forking.due(
            rule, self.trials, self._known, self._entries.next_number,
            lambda number: self._directory(seen.run_id(number)),
        )  # fmt: skip
        if fork is None:
            return None
        trial = self._entries.fork(fork, forking.explored(fork, rule, self.trials, self._space, self.plan))
        self.trials[trial.number] = trial
        forking.inherit(trial, fork, self.trials)
        return trial.number

    # -- trials of an earlier controller -------------------------------------------------------

    def _take_in(self, found: FrozenTrial) -> None:
        """Take over a trial of an earlier controller, from the study and its run."""
        trial = self.trials[found.number] = self._entries.take_up(found)
        run = self._run_of_shares(trial) if self.plan.unit == SHARE else self._run_of(trial)
        if run is not None and self.plan.unit != SHARE:
            trial.values = seen.points(run, self.plan.first.metric)
            trial.others = seen.newest(run, self.plan.objectives)
            trial.per_step = seen.per_step(run, self.plan.unit) or 1.0
            trial.spent = seen.spent(run)
        elif found.state.is_finished():  # its run may have been deleted: it keeps its part in the search
            seen.recall(trial, found, self.plan)
        trial.spent = max(trial.spent, found.user_attrs.get("spent", {}).get("hour", 0.0) * 3600)
        trial.written = max(found.intermediate_values, default=-1.0)
        trial.furthest = trial.step
        forking.inherit(trial, forking.of(found), self.trials)
        if not found.state.is_finished():
            self._take_up(trial, run)
            return
        if (
            run is not None and self.plan.unit != SHARE
            and seen.trained_since(found, run, self.plan.objectives)
        ):  # fmt: skip
            self._is_over(trial, "complete")
            return
        self._is_over(trial, seen.ENDED[found.state])
        trial.error = str(found.user_attrs.get("error", ""))
        trial.trace = str(found.user_attrs.get("trace", ""))

    def _take_up(self, trial: Seen, run: RunView | None) -> None:
        """Find the state of a trial whose end the study was not told."""
        if self.plan.unit == SHARE and run is None and trial.values:
            self._share_done(trial)
            return
        state = _OF_A_RUN.get(run.status) if run is not None else None
        error = str(run.attempts[-1].error or "") if run is not None and run.attempts else ""
        if state == "failed" and storage.says_disk_failed(error):
            state = None
        if state == "paused":
            self._pause(trial)
        elif state is None:
            trial.resumes = True
        else:
            trial.error = error
            self._tell(trial, state)

    # -- trials on shares of the data ----------------------------------------------------------

    def _run_of_shares(self, trial: Seen) -> RunView | None:
        """Take in a trial's finished trainings; returns the one that has begun and not finished, if any."""
        while (share := self._next_share(trial)) is not None:
            trial.share = share
            run = self._run_of(trial)
            if run is None:
                return None
            trial.spent += seen.spent(run)
            values = list(seen.points(run, self.plan.first.metric).values())
            if run.status != FINISHED or not values:
                return run
            trial.values[share] = values[-1]
            trial.others = seen.newest(run, self.plan.objectives)
        return None

    def _next_share(self, trial: Seen) -> float | None:
        """The next share of the data to train a trial on; None if trials are not compared by shares."""
        if self.plan.unit != SHARE:
            return None
        return next((share for share in self._scheduler.lengths(trial.number) if share > trial.step), None)

    def _share_done(self, trial: Seen) -> None:
        """Decide on a trial that has been trained on a share of the data."""
        if self._next_share(trial) is None:
            self._tell(trial, "complete")
            return
        trial.state = "running"
        trial.resumes = self._continues(trial)

    # -- what happens to trials ----------------------------------------------------------------

    def _decide(self, report: Report) -> None:
        """Take in a report, and answer it if the trial waits."""
        trial = self.trials[report.number]
        trial.values[float(report.step)] = trial.others[self.plan.first.metric] = report.value
        trial.per_step = report.per_step
        self._advanced(trial, report.step)
        self._table.pop(report.number, None)
        self._entries.publish(trial, paused=False)
        if not self._waits:
            return
        decision = self._decision(trial)
        saves = isinstance(self._scheduler, PopulationBased)  # others may continue from there
        self._workers.answer(report.number, _ANSWERS[decision], save=saves)

    def _decision(self, trial: Seen) -> Decision:
        """The scheduler's decision; for a trial that a fork replaces, its donor is chosen with it."""
        known = self._known()
        decision = self._scheduler.decide(known, trial.number)
        if decision is Decision.STOP and isinstance(self._scheduler, PopulationBased):
            trial.donor = self._scheduler.donor(known, trial.number)
        return decision

    def _pause(self, trial: Seen) -> None:
        trial.state = "paused"
        self._entries.publish(trial, paused=True)

    def _give_up(self, trial: Seen) -> None:
        """End a trial that has no process; its run says so, unless somebody else trains that now."""
        run = self._run_of(trial)
        if run is not None and run.attempts and run.status in _WAITING:
            additions.add(run.directory, {"given_up": {"of": run.attempts[-1].number}})
        self._tell(trial, "pruned")

    def _end(self, ended: Ended) -> None:
        """Take in the end of a trial's processes."""
        trial = self.trials[ended.number]
        trial.spent += (time.monotonic() - self._started.pop(ended.number)) * self.plan.ranks
        trial.others |= ended.values
        if ended.status == "killed":
            self._advanced(trial, self._saved(trial))
            trial.killed += 1
            if trial.killed <= _RESTARTS:
                trial.resumes = True
                return
        state = _OF_A_RUN.get(ended.status, "failed" if ended.status == "killed" else None)
        if state == "failed" and storage.says_disk_failed(ended.error):  # any other trial would fail too
            self.stop()
            self._disk_failed = (
                f"trial {trial.number} could not go on because of the disk ({ended.error}): make room or "
                "repair it, then run the same command again; the trial resumes"
            )
            state = None
        if state is None:  # told to stop: it resumes when the search continues
            trial.resumes = not self._ending
        elif state == "paused":
            self._pause(trial)
        elif state == "complete" and trial.share is not None and self.plan.first.metric in ended.values:
            trial.values[trial.share] = ended.values[self.plan.first.metric]
            self._table.pop(trial.number, None)
            self._share_done(trial)
        else:
            trial.error, trial.trace = self._error_of(ended), ended.trace
            self._tell(trial, state)
            forking.say_unfit(trial, self.trials, self._space)
            self._failures.check(ended)

    def _error_of(self, ended: Ended) -> str:
        """The error that a trial reports; or of its run, which for a hang says where its stacks are."""
        run = self._run_of(self.trials[ended.number]) if ended.error and not ended.trace else None
        return (run and run.attempts and run.attempts[-1].error) or ended.said

    def _tell(self, trial: Seen, state: State) -> None:
        """End a trial; a complete one that lacks an objective has failed."""
        lacks = trial.value is None or any(o.metric not in trial.others for o in self.plan.objectives)
        if state == "complete" and lacks and (run := self._run_of(trial)) is not None:
            trial.others = {**trial.others, **seen.newest(run, self.plan.objectives)}
        outcome = zip(self.plan.objectives, trial.outcome(self.plan.objectives), strict=True)
        lacking = [objective.metric for objective, value in outcome if value is None]
        if state == "complete" and lacking:
            state, trial.error = "failed", f"it ended without logging {', '.join(lacking)}"
        self._is_over(trial, state)
        self._entries.tell(trial)

    def _job(self, trial: Seen) -> TrialJob:
        share = [f"data_share={trial.share / 100}"] if trial.share is not None else []
        resolved: Any = configs.resolve(self.plan.config, self._space.overrides(trial.params) + share)
        return TrialJob(
            number=trial.number,
            recipe=self.plan.recipe,
            values=resolved.values,
            sources=resolved.sources,
            runs=self.plan.folder.parent,
            sweep=self.plan.folder.name,
            run=trial.run,
            metrics=tuple(one.metric for one in self.plan.objectives),
            unit=self.plan.unit,
            provenance=self.plan.provenance,
            waits=self._waits,
        )

    @staticmethod
    def _advanced(trial: Seen, step: float) -> None:
        """Take in that a trial has reached a step: if it was not there before, it has made progress."""
        if step > trial.furthest:
            trial.furthest, trial.killed = step, 0

    def _saved(self, trial: Seen) -> float:
        """The step of its newest checkpoint; 0 without one."""
        run = self._run_of(trial)
        return max(run.checkpoints, default=0.0) if run is not None else 0.0

    def _run_of(self, trial: Seen) -> RunView | None:
        run = self._directory(trial.run)
        return view.load(run) if run.exists() else None

    def _directory(self, run: str) -> RunDirectory:
        return finding.locate(self.plan.folder.parent, self.plan.folder.name, run)

    def _known(self) -> Trials:
        """What schedulers decide by; only trials that have changed are computed again."""
        for trial in self.trials.values():
            known = self._table.get(trial.number)
            if known is None or known.state != trial.state:
                self._table[trial.number] = trial.known(self.plan.first)
        others: Mapping[int, Known] = self._peers.known() if self._peers is not None else {}
        return {**others, **self._table} if others else self._table
