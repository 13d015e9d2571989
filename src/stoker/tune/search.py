"""The controller of a search: asks the study for trials, has them run, and decides after each report.

What is known stands in two places, each written once: the study has which trials there are and with which
values, the run of each trial what it came to. A controller that was killed reads both and goes on; all that
it decides is a function of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState, create_trial
from stoker import config as configs
from stoker.errors import StokerError
from stoker.run import finding, view
from stoker.run.directory import RunDirectory
from stoker.run.view import RunView
from stoker.tune import bandit, forking, seen
from stoker.tune import study as studies
from stoker.tune.peers import Peers
from stoker.tune.plan import SHARE, Plan
from stoker.tune.promising import NEWEST
from stoker.tune.schedulers import Decision, Full, Known, PopulationBased, Scheduler, State, Trials
from stoker.tune.seen import Seen
from stoker.tune.space import Space
from stoker.tune.study import EARLIER, Kept, quiet
from stoker.tune.trial import Began, Ended, Job, Report
from stoker.words import counted

log = logging.getLogger("stoker")

_RESTARTS = 3
"""How often a trial whose process was killed is started again without having come further."""
_REFUSED = 5
"""How many trials are refused in the same words, and none logs anything, until others are not tried."""
_LOOK = 1.0
"""Seconds after which to look again whether there is room, where there was none for any trial."""
_NEARLY = 0.9  # of a whole trial: the last report may come before its end
_OF_A_RUN: dict[str, State] = {
    view.FINISHED: "complete", view.STOPPED: "pruned", view.PAUSED: "paused", view.FAILED: "failed"
}  # fmt: skip
_TOLD: dict[State, TrialState] = {state: told for told, state in seen.ENDED.items()}


class Executor(Protocol):
    """Runs the processes of trials: `local.Workers`, or another with the same words."""

    def prepare(self) -> None:
        """Wait until the first trial can be started at once."""
        ...

    @property
    def free(self) -> bool:
        """Whether one more trial can be started."""
        ...

    @property
    def running(self) -> list[int]:
        """The numbers of the trials that run."""
        ...

    def start(self, job: Job) -> None:
        """Start a trial."""
        ...

    @property
    def takes_ahead(self) -> bool:
        """Whether `ahead` takes one more trial."""
        ...

    def ahead(self, job: Job) -> None:
        """Have a trial trained as soon as there is room for it, which `Began` tells of."""
        ...

    def wait(self, timeout: float | None = None) -> list[Report | Ended | Began]:
        """What happened, once something has, or after so many seconds."""
        ...

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        """Tell a trial that has reported what to do, and whether to take a checkpoint."""
        ...

    def stop(self) -> None:
        """Tell all trials to stop with a checkpoint; they are waited for by `wait`."""
        ...

    def kill(self) -> None:
        """End all trials at once."""
        ...

    def close(self) -> None:
        """Let go of what is held while no trial runs."""
        ...


class Search:
    """One controller's share of a search.

    Args:
        peers: the other controllers of the study, where it may have any.
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
        self._space, self._study, self._kept = space, study, kept
        self._scheduler, self._workers, self._peers = scheduler, workers, peers
        self._waits = not isinstance(scheduler, Full)
        """Whether a trial waits at each report for what is decided."""
        self._knows_ahead = not (self._waits or peers or plan.limited or studies.learns(study))
        """Whether what is begun next depends on nothing that happens before."""
        self._ahead: dict[int, Seen] = {}
        """Trials that begin as soon as there is room, without another word."""
        self._changed: Callable[[], None] = lambda: None
        self._ending = False
        self._best: Seen | None = None
        """Of the complete trials."""
        self._table: dict[int, Known] = {}
        self._open: dict[int, Trial] = {}
        """Optuna's trials that it was not told the end of."""
        self._started: dict[int, float] = {}
        """When the processes of those that run were started."""
        self._refused: list[str] = []
        """Why trials were refused, as long as none has logged what is searched for."""
        self._said: set[str] = set()
        """What was warned of already."""
        for trial in study.get_trials(deepcopy=False):
            if peers is None or peers.mine(trial):
                self._take_in(trial)

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Search until there is nothing left to do. Raises StokerError where it cannot go on."""
        self._check_failures()
        self._workers.prepare()
        try:
            while True:
                full = self._fill()
                self._changed()
                if not self._workers.running and not self._awaits_others:
                    if full and not self.over:
                        self._say_once(
                            "room", "no machine has room for a trial now: the search is waiting for one"
                        )
                    elif self._gives_up():
                        break
                self._hear()
                if self.overspent and not self._ending:
                    self.stop()
        except BaseException:
            self._workers.kill()
            raise
        finally:
            self._workers.close()
        self._kept.sync()

    def _gives_up(self) -> bool:
        """Have what will never go on be over; False where some may, as another controller goes on."""
        if self._ending or self.overspent:
            return True
        for number in self._scheduler.given_up(self._known()):
            self._tell(self.trials[number], "pruned")
        return self._peers is None or all(trial.over for trial in self.trials.values())

    def on_change(self, call: Callable[[], None]) -> None:
        """Have something called after everything that happens."""
        self._changed = call

    def stop(self) -> None:
        """Begin nothing more; what runs stops with a checkpoint, and goes on with the search."""
        self._ending = True
        self._workers.stop()

    def _told_to_end(self) -> bool:
        """Whether `stop` was called, which a signal does at any moment."""
        return self._ending

    @property
    def over(self) -> bool:
        """Whether every trial that was planned has come to its end."""
        if self._ahead or self._begun < self.plan.trials:
            return False
        return all(trial.over for trial in self.trials.values())

    @property
    def best(self) -> Seen | None:
        """The complete trial with the best value; of equals the first. Where none is, of those that are
        furthest."""
        if self._best is not None:
            return self._best
        known = [t for t in self.trials.values() if t.value is not None and t.state != "failed"]
        furthest = max((t.amount(t.step) for t in known), default=0.0)
        return min((t for t in known if t.amount(t.step) >= furthest), key=self._order, default=None)

    def _order(self, trial: Seen) -> tuple[float, int]:
        """What trials with a value are ordered by, the best first."""
        return self.plan.first.lower(trial.value or 0.0), trial.number

    def _is_over(self, trial: Seen, state: State) -> None:
        """Take down that a trial has come to its end."""
        trial.state = state
        if state == "complete" and trial.value is not None:
            self._best = min(trial, self._best or trial, key=self._order)

    @property
    def front(self) -> list[Seen]:
        """The complete trials that no other is better than in all objectives; of one objective, the best."""
        complete = [trial for trial in self.trials.values() if trial.state == "complete"]
        points = {trial.number: trial.lower(self.plan.objectives) for trial in complete}
        return [
            trial for trial in complete
            if not any(seen.dominates(other, points[trial.number]) for other in points.values())
        ]  # fmt: skip

    @property
    def overspent(self) -> bool:
        """Whether its time or its budget is used up."""
        if self.plan.deadline is not None and time.monotonic() >= self.plan.deadline:
            return True
        return self.plan.budget is not None and self.spent >= self.plan.budget.amount

    @property
    def spent(self) -> float:
        """What all of its trials have spent, in the unit of the budget."""
        budget = self.plan.budget
        if budget is not None and budget.unit == "hour":
            running = sum(time.monotonic() - begun for begun in self._started.values()) * self.plan.ranks
            own = (sum(t.spent for t in self.trials.values()) + running) / 3600
        else:
            own = sum(t.done for t in self.trials.values())
        unit = budget.unit if budget is not None else self.plan.unit
        return own + (self._peers.spent(unit) if self._peers is not None else 0.0)

    def _hear(self) -> None:
        """Wait for what happens next, and answer it."""
        if self._peers is not None:
            self._peers.beat()
        if not self._workers.running:
            time.sleep(self._peers.patience if self._peers is not None else _LOOK)
        for happened in self._workers.wait(self._left()) if self._workers.running else ():
            if isinstance(happened, Report):
                self._decide(happened)
            elif isinstance(happened, Ended):
                self._end(happened)
            else:
                self.trials[happened.number] = self._ahead.pop(happened.number)
                self._started[happened.number] = time.monotonic()

    def _left(self) -> float | None:
        """Seconds after which to look whether there is something to do besides."""
        if self._ending:
            return None
        limits = [self._peers.patience] if self._peers is not None else []
        if self.plan.deadline is not None:
            limits.append(self.plan.deadline - time.monotonic())
        if self.plan.budget is not None and self.plan.budget.unit == "hour":
            ranks = len(self._started) * self.plan.ranks
            limits.append((self.plan.budget.amount - self.spent) * 3600 / max(ranks, 1))
        return max(0.0, min(limits)) if limits else None

    @property
    def _awaits_others(self) -> bool:
        """Whether what other controllers do may let a trial of this one go on."""
        if self._peers is None or self._ending or self.overspent or not self._peers.running:
            return False
        return any(trial.state == "paused" for trial in self.trials.values())

    @property
    def _begun(self) -> int:
        """How many of the trials that were planned have been begun."""
        own = sum(trial.parent is None for trial in self.trials.values()) + len(self._ahead)
        return own + (len(self._peers.trials) if self._peers is not None else 0)

    def _fill(self) -> bool:
        """Start trials as long as there is something to be started; whether it was room that lacked.

        All machines that a cluster had may be lost while no trial runs, and others come.
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
        """Let those who train trials have what comes next, where that is known, and none is to go on."""
        while self._knows_ahead and self._workers.takes_ahead and self._begun < self.plan.trials:
            if any(trial.resumes for trial in self.trials.values()) or (asked := self._ask()) is None:
                return
            self._ahead[asked.number] = asked
            self._workers.ahead(self._job(asked))

    def _start(self, number: int) -> None:
        """Start a trial, unless it was told to end meanwhile."""
        trial = self.trials[number]
        if self._told_to_end():
            trial.resumes = True
            return
        trial.state, trial.share = "running", self._next_share(trial)
        self._publish(number, paused=False)
        self._workers.start(self._job(trial))
        self._started[number] = time.monotonic()
        if self._told_to_end():  # while it started, and it was not
            self._workers.stop()

    def _next(self) -> int | None:
        """Which trial is to run now: one that was interrupted, one that is promoted, or a new one."""
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
        asked = self._ask() if self._begun < self.plan.trials else None
        if asked is None:
            return None
        self.trials[asked.number] = asked
        return asked.number

    def _goes_on(self, trial: Seen) -> bool:
        """Whether a trial that was interrupted is to run again.

        Its newest report may be one that nobody has decided upon; and what it reported beyond the
        checkpoint that it goes on from, it will report once more.
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
        """Whether a trial, which no process trains now, is to go on at once; else it waits or is over."""
        decision = self._decision(trial)
        if decision is Decision.PAUSE:
            self._pause(trial)
        elif decision is Decision.STOP:
            self._tell(trial, "pruned")
        return decision is Decision.CONTINUE

    def _pause(self, trial: Seen) -> None:
        trial.state = "paused"
        self._publish(trial.number, paused=True)

    def _fork(self) -> int | None:
        """Begin a trial in place of one that population based training stopped, where there is one."""
        if not isinstance(self._scheduler, PopulationBased):
            return None
        replaced = {trial.replaces for trial in self.trials.values()}
        for trial in self.trials.values():
            if trial.state == "pruned" and trial.number not in replaced:
                donor = trial.donor
                if donor is None:  # a controller before this one stopped it
                    donor = self._scheduler.donor(self._known(), trial.number)
                if donor is None:
                    continue
                number = len(self._study.get_trials(deepcopy=False))
                step = forking.take_checkpoint(
                    self._directory(seen.run_id(donor)), self._directory(seen.run_id(number)),
                    ended=self.trials[donor].state == "complete",
                )  # fmt: skip
                if step is not None:
                    return self._begin_fork(forking.Fork(donor, trial.number, step))
        return None

    def _begin_fork(self, fork: forking.Fork) -> int:
        """A new trial of the study, with values of its own."""
        fixed = FixedTrial(self._space.params(self._explored(fork)))
        params = self._space.suggest(fixed)
        with quiet(), self._kept.together():
            # Not enqueued: what is asked for next might be another that waits.
            self._study.add_trial(
                create_trial(
                    state=TrialState.RUNNING, params=fixed.params, distributions=fixed.distributions,
                    user_attrs=fork.attributes,
                )
            )  # fmt: skip
            made = self._study.get_trials(deepcopy=False)[-1]
            trial = Trial(self._study, made._trial_id)
            trial.set_user_attr("run", seen.run_id(trial.number))
        self.trials[trial.number] = Seen(trial.number, params)
        self._open[trial.number] = trial
        self._inherit(trial.number, fork)
        return trial.number

    def _explored(self, fork: forking.Fork) -> dict[str, Any]:
        """Values near the donor's, or those from which most is to be expected by what others have gained."""
        rule = self._scheduler
        assert isinstance(rule, PopulationBased)
        random = np.random.default_rng([self.plan.seed, len(self.trials)])
        donor, trials = self.trials[fork.donor], self.trials.values()
        if rule.learns:
            known = [
                gain for trial in trials
                for gain in bandit.gains(
                    trial.params, trial.known(self.plan.first).values, trial.origin[1], rule.turn
                )
            ]  # fmt: skip
            pending = [trial.params for trial in trials if not trial.over]
            turn = rule.turn(donor.amount(fork.step)) + 1
            found = bandit.chosen(self._space, known, turn, pending, random)
            if found is not None:
                return found
        return self._space.perturbed(donor.params, random, resample=rule.resample, factors=rule.factors)

    # -- the study -----------------------------------------------------------------------------

    def _ask(self) -> Seen | None:
        """A new trial of the study; None where another controller has begun the last one just now."""
        with quiet(), self._kept.alone():
            if self._peers is not None:
                self._peers.look_again()
                if self._begun >= self.plan.trials:
                    return None
            with self._kept.together():
                trial = self._study.ask()
                params = self._own(trial)
        self._open[trial.number] = trial
        return Seen(trial.number, params)

    def _own(self, trial: Trial) -> dict[str, Any]:
        """Make a trial this controller's, and draw its values; what was done before is not done again."""
        if self._peers is not None:
            self._peers.claim(trial)
        params = self._space.suggest(trial)
        if "run" not in trial.user_attrs:
            trial.set_user_attr("run", seen.run_id(trial.number))
        return params

    def _inherit(self, number: int, fork: forking.Fork | None) -> None:
        """Let a trial that was forked have its donor's history."""
        if fork is None:
            return
        trial, donor = self.trials[number], self.trials[fork.donor]
        trial.parent, trial.replaces = fork.donor, fork.replaces
        trial.values = {s: v for s, v in donor.values.items() if s <= fork.step} | trial.values
        trial.origin = (fork.step, donor.amount(fork.step))

    def _take_in(self, found: FrozenTrial) -> None:
        """A trial of an earlier controller, from the study and from its run."""
        if found.state == TrialState.WAITING or EARLIER in found.user_attrs:
            return
        open_ = None
        if found.state.is_finished():
            params = self._space.suggest(FixedTrial(found.params))
        else:
            with quiet(), self._kept.together():
                open_ = Trial(self._study, found._trial_id)
                params = self._own(open_)
        trial = self.trials[found.number] = Seen(found.number, params)
        run = self._run_of_shares(trial) if self.plan.unit == SHARE else self._run_of(trial)
        if run is not None and self.plan.unit != SHARE:
            trial.values = seen.points(run, self.plan.first.metric)
            trial.others = seen.newest(run, self.plan.objectives)
            trial.per_step = seen.per_step(run, self.plan.unit) or 1.0
            trial.spent = seen.spent(run)
        trial.spent = max(trial.spent, found.user_attrs.get("spent", {}).get("hour", 0.0) * 3600)
        trial.written = max(found.intermediate_values, default=-1.0)
        trial.furthest = trial.step
        self._inherit(found.number, forking.of(found))
        if open_ is not None:
            self._open[found.number] = open_
            self._take_up(trial, run)
            return
        self._is_over(trial, seen.ENDED[found.state])
        trial.error = str(found.user_attrs.get("error", ""))
        trial.trace = str(found.user_attrs.get("trace", ""))

    def _run_of_shares(self, trial: Seen) -> RunView | None:
        """Take in the trainings of a trial that are done; the one that was begun and is not, or failed."""
        while (share := self._next_share(trial)) is not None:
            trial.share = share
            run = self._run_of(trial)
            if run is None:
                return None
            trial.spent += seen.spent(run)
            values = list(seen.points(run, self.plan.first.metric).values())
            if run.status != view.FINISHED or not values:
                return run
            trial.values[share] = values[-1]
            trial.others = seen.newest(run, self.plan.objectives)
        return None

    def _next_share(self, trial: Seen) -> float | None:
        """The next share of the data that a trial is trained on, where trials are compared by such."""
        if self.plan.unit != SHARE:
            return None
        return next((share for share in self._scheduler.lengths(trial.number) if share > trial.step), None)

    def _share_done(self, trial: Seen) -> None:
        """Decide about a trial that has been trained on a share of the data."""
        if self._next_share(trial) is None:
            self._tell(trial, "complete")
            return
        trial.state = "running"
        trial.resumes = self._continues(trial)

    def _take_up(self, trial: Seen, run: RunView | None) -> None:
        """Where a trial is whose end the study was not told."""
        if self.plan.unit == SHARE and run is None and trial.values:
            self._share_done(trial)
            return
        state = _OF_A_RUN.get(run.status) if run is not None else None
        if state == "paused":
            self._pause(trial)
        elif state is None:
            trial.resumes = True
        else:
            trial.error = str(run.attempts[-1].error or "") if run is not None and run.attempts else ""
            self._tell(trial, state)

    def _tell(self, trial: Seen, state: State) -> None:
        """Let the study know how a trial ended."""
        lacks = trial.value is None or any(o.metric not in trial.others for o in self.plan.objectives)
        if state == "complete" and lacks and (run := self._run_of(trial)) is not None:
            trial.others = {**trial.others, **seen.newest(run, self.plan.objectives)}
        outcome = trial.outcome(self.plan.objectives)
        lacking = [
            one.metric for one, value in zip(self.plan.objectives, outcome, strict=True) if value is None
        ]
        if state == "complete" and lacking:
            state, trial.error = "failed", f"it ended without logging {', '.join(lacking)}"
        self._is_over(trial, state)
        with quiet(), self._kept.together():
            open_ = self._open.pop(trial.number)
            self._write_values(trial, open_)
            if trial.state == "failed":
                open_.set_user_attr("error", trial.error)
                open_.set_user_attr("trace", trial.trace)
            known = [value for value in outcome if value is not None]
            complete = trial.state == "complete"
            self._study.tell(open_, known if complete else None, state=_TOLD[trial.state])

    def _write_values(self, trial: Seen, open_: Trial) -> None:
        """What a trial has spent, and its values by step; Optuna has none where objectives are several."""
        open_.set_user_attr("spent", {"hour": trial.spent / 3600, self.plan.unit: trial.done})
        if trial.share is not None:
            open_.set_user_attr("run", trial.run)
        if len(self.plan.objectives) > 1:
            open_.set_user_attr("values", [list(point) for point in trial.values.items()])
            newest = trial.outcome(self.plan.objectives)
            if None not in newest:
                open_.set_user_attr(NEWEST, {"step": trial.step, "values": newest})
            return
        for step, value in trial.values.items():
            if step > trial.written:
                open_.report(value, int(step))
                trial.written = step

    def _publish(self, number: int, *, paused: bool) -> None:
        """Let the sampler know of a trial that waits, and other controllers of any."""
        if not paused and self._peers is None:
            return
        trial, open_ = self.trials[number], self._open[number]
        with quiet(), self._kept.together():
            self._write_values(trial, open_)
            if self._peers is not None:
                self._peers.publish(open_, trial, paused=paused)

    # -- what happens to trials ------------------------------------------------------------------

    def _decide(self, report: Report) -> None:
        trial = self.trials[report.number]
        trial.values[float(report.step)] = trial.others[self.plan.first.metric] = report.value
        trial.per_step = report.per_step
        if report.step > trial.furthest:
            trial.furthest, trial.killed = report.step, 0
        self._table.pop(report.number, None)
        self._publish(report.number, paused=False)
        if not self._waits:
            return
        decision = self._decision(trial)
        saves = isinstance(self._scheduler, PopulationBased)  # others may go on from there
        self._workers.answer(report.number, _ANSWERS[decision], save=saves)

    def _decision(self, trial: Seen) -> Decision:
        """What becomes of a trial; of one that another replaces, it is known from which one that begins."""
        known = self._known()
        decision = self._scheduler.decide(known, trial.number)
        if decision is Decision.STOP and isinstance(self._scheduler, PopulationBased):
            trial.donor = self._scheduler.donor(known, trial.number)
        return decision

    def _end(self, ended: Ended) -> None:
        trial = self.trials[ended.number]
        trial.spent += (time.monotonic() - self._started.pop(ended.number)) * self.plan.ranks
        trial.others |= ended.values
        if ended.status == "killed":
            trial.killed += 1
            if trial.killed <= _RESTARTS:
                trial.resumes = True
                return
        state = _OF_A_RUN.get(ended.status, "failed" if ended.status == "killed" else None)
        if state is None:  # it was told to stop, and goes on with the search
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
            self._check(ended)

    def _error_of(self, ended: Ended) -> str:
        """What a trial says itself, else what its run does: of one that hung, where its stacks are."""
        run = self._run_of(self.trials[ended.number]) if ended.error and not ended.trace else None
        return (run and run.attempts and run.attempts[-1].error) or ended.error

    def _check(self, ended: Ended) -> None:
        """Whether it makes sense to go on. Raises StokerError."""
        lacking = [one.metric for one in self.plan.objectives if one.metric not in ended.logged]
        if lacking:
            known = {metric for trial in self.trials.values() for metric in trial.others}
            lacking = [metric for metric in lacking if metric not in known]
        if ended.status == view.FINISHED and lacking:
            logged = ", ".join(sorted(ended.logged)) or "nothing"
            raise StokerError(
                f"the recipe never logs {', '.join(lacking)}: it logs {logged}; "
                "name one of these with --metric"
            )
        trial, whole = self.trials[ended.number], self.plan.whole
        if ended.status == view.FINISHED and whole is not None and self._scheduler.lengths(trial.number):
            done = trial.amount(trial.step)
            if done < _NEARLY * whole:
                self._say_once(
                    "short", f"trial {trial.number} ended after its report at {done:,.4g} "
                    f"{self.plan.unit}s, but rungs are laid out over --most {whole:,.4g}: set --most to the "
                    "length of a whole trial",
                )  # fmt: skip
        self._check_failures()
        self._check_refusals(ended)

    def _say_once(self, about: str, warning: str) -> None:
        if about not in self._said:
            self._said.add(about)
            log.warning("%s", warning)

    def _check_failures(self) -> None:
        """Raises StokerError where too many trials have failed."""
        if self.plan.max_failures is None:
            return
        failures = [t for t in self.trials.values() if t.state == "failed"]
        if len(failures) > self.plan.max_failures:
            some = counted(len(failures), "trial")
            raise StokerError(
                f"{some} failed, more than --max-failures {self.plan.max_failures}; "
                f"trial {failures[-1].number}: {failures[-1].error}"
            )

    def _check_refusals(self, ended: Ended) -> None:
        """Raises StokerError where trials are refused in the same words, and none has logged anything."""
        if not ended.refused or any(trial.others or trial.values for trial in self.trials.values()):
            return
        self._refused.append(ended.error)
        if self._refused.count(ended.error) == _REFUSED:
            raise StokerError(
                f"{_REFUSED} trials were refused with the same error: {ended.error}; run the same search "
                "again to continue with other trials"
            )

    def _job(self, trial: Seen) -> Job:
        share = [f"data_share={trial.share / 100}"] if trial.share is not None else []
        resolved: Any = configs.resolve(self.plan.config, self._space.overrides(trial.params) + share)
        return Job(
            trial.number, self.plan.recipe, resolved.values, resolved.sources, self.plan.folder.parent,
            self.plan.folder.name, trial.run, tuple(one.metric for one in self.plan.objectives),
            self.plan.unit, self.plan.provenance, waits=self._waits,
        )  # fmt: skip

    def _run_of(self, trial: Seen) -> RunView | None:
        run = self._directory(trial.run)
        return view.load(run) if run.exists() else None

    def _directory(self, run: str) -> RunDirectory:
        return finding.locate(self.plan.folder.parent, self.plan.folder.name, run)

    def _known(self) -> Trials:
        """What schedulers decide by; made anew of the trials of which something has changed."""
        for trial in self.trials.values():
            known = self._table.get(trial.number)
            if known is None or known.state != trial.state:
                self._table[trial.number] = trial.known(self.plan.first)
        others: Mapping[int, Known] = self._peers.known() if self._peers is not None else {}
        return {**others, **self._table} if others else self._table


_ANSWERS = {Decision.CONTINUE: "continue", Decision.PAUSE: "paused", Decision.STOP: "stopped"}
