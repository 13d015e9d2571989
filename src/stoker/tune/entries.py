"""A controller's trials as the study has them: created, given values, updated, and told how they ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState, create_trial
from stoker.tune import seen
from stoker.tune.forking import Fork
from stoker.tune.peers import Peers
from stoker.tune.plan import Plan
from stoker.tune.promising import NEWEST
from stoker.tune.schedulers import State
from stoker.tune.seen import Seen
from stoker.tune.space import Space
from stoker.tune.stores import Kept
from stoker.tune.study import EARLIER, quiet

_TOLD: dict[State, TrialState] = {state: told for told, state in seen.ENDED.items()}


class Entries:
    """The study's entries of one controller's trials.

    Args:
        peers: the other controllers of the study, if it may have any.
    """

    def __init__(self, plan: Plan, space: Space, study: Study, kept: Kept, peers: Peers | None) -> None:
        self._plan, self._space, self._study, self._kept, self._peers = plan, space, study, kept, peers
        self._open: dict[int, Trial] = {}
        """Optuna's trials whose end the study has not been told."""

    def earlier(self) -> list[FrozenTrial]:
        """The trials that this controller, or one before it in the same place, has begun."""
        found = self._study.get_trials(deepcopy=False)
        return [
            trial for trial in found
            if trial.state != TrialState.WAITING and EARLIER not in trial.user_attrs
            and (self._peers is None or self._peers.mine(trial))
        ]  # fmt: skip

    def next_number(self) -> int:
        """The number of the next trial."""
        return len(self._study.get_trials(deepcopy=False))

    def ask(self, begun: Callable[[], int]) -> Seen | None:
        """A new trial; None if another controller has just begun the last one.

        Args:
            begun: counts the planned trials that all controllers have begun.
        """
        with quiet(), self._kept.alone():
            if self._peers is not None:
                self._peers.look_again()
                if begun() >= self._plan.trials:
                    return None
            with self._kept.together():
                trial = self._study.ask()
                params = self._own(trial)
        self._open[trial.number] = trial
        return Seen(trial.number, params)

    def fork(self, fork: Fork, values: Mapping[str, Any]) -> Seen:
        """A new trial with these values, forked from another."""
        fixed = FixedTrial(self._space.params(values))
        params = self._space.suggest(fixed)
        with quiet(), self._kept.together():
            # Not enqueued: `ask` could return another trial that is waiting.
            self._study.add_trial(
                create_trial(
                    state=TrialState.RUNNING, params=fixed.params, distributions=fixed.distributions,
                    user_attrs=fork.attributes,
                )
            )  # fmt: skip
            made = self._study.get_trials(deepcopy=False)[-1]
            trial = Trial(self._study, made._trial_id)
            trial.set_user_attr("run", seen.run_id(trial.number))
        self._open[trial.number] = trial
        return Seen(trial.number, params)

    def take_up(self, found: FrozenTrial) -> Seen:
        """A trial that has been begun before; one that has not ended is open again."""
        if found.state.is_finished():
            return Seen(found.number, self._space.suggest(FixedTrial(found.params)))
        with quiet(), self._kept.together():
            trial = Trial(self._study, found._trial_id)
            if "run" not in found.user_attrs:
                self._draw_again(found, trial)
            params = self._own(trial)
        self._open[found.number] = trial
        return Seen(found.number, params)

    def publish(self, trial: Seen, *, paused: bool) -> None:
        """Tell the sampler about a paused trial, and other controllers about any."""
        if not paused and self._peers is None:
            return
        entry = self._open[trial.number]
        with quiet(), self._kept.together():
            self._write_values(trial, entry)
            if self._peers is not None:
                self._peers.publish(entry, trial, paused=paused)

    def tell(self, trial: Seen) -> None:
        """Tell the study how a trial ended, by its state."""
        with quiet(), self._kept.together():
            entry = self._open.pop(trial.number)
            self._write_values(trial, entry)
            if trial.state == "failed":
                entry.set_user_attr("error", trial.error)
                entry.set_user_attr("trace", trial.trace)
            known = [value for value in trial.outcome(self._plan.objectives) if value is not None]
            complete = trial.state == "complete"
            self._study.tell(entry, known if complete else None, state=_TOLD[trial.state])

    def _draw_again(self, found: FrozenTrial, trial: Trial) -> None:
        """Draw what a controller had drawn for a trial when it was killed.

        After that, a sampler draws the rest as it would have. Values that were asked for are not drawn.
        """
        asked = found.system_attrs.get("fixed_params", {})
        for parameter in self._space.parameters:
            name = parameter.name
            distribution = found.distributions.get(name)
            if (
                distribution is None
                or distribution.single()
                or name in asked
                or name in trial.relative_params
            ):
                continue
            self._study.sampler.sample_independent(self._study, found, name, distribution)

    def _own(self, trial: Trial) -> dict[str, Any]:
        """Claim a trial for this controller and draw its values, as far as this was not done before."""
        if self._peers is not None:
            self._peers.claim(trial)
        params = self._space.suggest(trial)
        if "run" not in trial.user_attrs:
            if self._peers is not None:
                trial.set_user_attr("sweep", self._plan.folder.name)
            trial.set_user_attr("run", seen.run_id(trial.number))
        return params

    def _write_values(self, trial: Seen, entry: Trial) -> None:
        """Write what a trial has spent, how far it has got, and its values by step.

        Optuna has no intermediate values with several objectives, and only at whole steps, which shares of
        the data are not; then they are an attribute.
        """
        entry.set_user_attr("spent", {"hour": trial.spent / 3600, self._plan.unit: trial.done})
        entry.set_user_attr("reached", trial.amount(trial.step))
        if trial.share is not None:
            entry.set_user_attr("run", trial.run)
        if trial.share is not None or len(self._plan.objectives) > 1:
            entry.set_user_attr("values", [list(point) for point in trial.values.items()])
        if len(self._plan.objectives) > 1:
            newest = trial.outcome(self._plan.objectives)
            if None not in newest:
                entry.set_user_attr(NEWEST, {"step": trial.step, "values": newest})
            return
        for step, value in trial.values.items():
            if step > trial.written:
                entry.report(value, int(step))
                trial.written = step
