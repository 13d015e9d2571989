"""The other controllers on the same study: the results of their trials, and which controllers are alive.

A trial belongs to the controller that asked the study for it. Its run is in that controller's folder, and no
other controller resumes it. The study contains what the others need for their decisions: the reported
values and whether the trial is paused. Each controller regularly records that it is alive; the others do not
wait for the trials of one that has stopped doing so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from stoker.tune.plan import Objective
from stoker.tune.schedulers import Known, State
from stoker.tune.seen import ENDED, Seen
from stoker.tune.study import EARLIER
from stoker.tune.tables import BY

_BEAT = 5.0  # seconds between heartbeats
_GONE = 30.0  # seconds without a heartbeat after which a controller counts as dead
_AWAY = 8.0  # seconds without a look at the others after which the database counts as having been away
_FRESH = 0.5  # seconds for which the cached trials of the others are used


class Peers:
    """The trials of a study that belong to other controllers.

    Args:
        me: the unique name of this controller, the same after a restart.
        objective: the objective that schedulers decide by.
    """

    patience = 2.0
    """Seconds to wait before looking at the others again."""

    def __init__(self, study: Study, me: str, objective: Objective) -> None:
        self._study, self._me, self._objective = study, me, objective
        self._read = self._beaten = -_GONE
        self._looked = time.monotonic()
        self._signs: dict[str, tuple[Any, float]] = {}
        """By controller, its newest heartbeat, and when this process first saw it by its own clock."""
        self.trials: list[FrozenTrial] = []
        """The trials of the other controllers."""
        self.beat()
        self._look()

    def mine(self, trial: FrozenTrial) -> bool:
        """Whether a trial is this controller's; also true if its controller died before claiming it."""
        owner = trial.user_attrs.get(BY)
        if owner is None and not trial.state.is_finished():  # another controller may be about to claim it
            began = trial.datetime_start
            signs = [sign for key, sign in self._study.user_attrs.items() if key != f"alive:{self._me}"]
            alone = all(time.time() - sign > _GONE for sign in signs if isinstance(sign, float))
            return alone or (began is not None and time.time() - began.timestamp() > _GONE)
        return owner == self._me

    def claim(self, trial: Trial) -> None:
        """Record that a trial belongs to this controller."""
        if trial.user_attrs.get(BY) != self._me:
            trial.set_user_attr(BY, self._me)

    def publish(self, trial: Trial, seen: Seen, *, paused: bool) -> None:
        """Write a trial's state to the study for the other controllers."""
        said = {"paused": paused, "per_step": seen.per_step}
        if trial.user_attrs.get("state") != said:
            trial.set_user_attr("state", said)

    def beat(self) -> None:
        """Record a heartbeat, unless the last one is less than 5 seconds old."""
        if time.monotonic() - self._beaten >= _BEAT:
            self._beaten = time.monotonic()
            self._study.set_user_attr(f"alive:{self._me}", time.time())

    def known(self) -> Mapping[int, Known]:
        """The trials of the other controllers as schedulers know them."""
        self._look()
        return {trial.number: self._known(trial) for trial in self.trials}

    def look_again(self) -> None:
        """Read the other controllers' trials again now."""
        self._read = -_GONE
        self._look()

    @property
    def running(self) -> bool:
        """Whether a trial of another live controller is running."""
        self._look()
        return any(self._state(trial) == "running" for trial in self.trials)

    def spent(self, unit: str) -> float:
        """What their ended trials have spent, in rank-hours or a unit of training."""
        self._look()
        return sum(float(trial.user_attrs.get("spent", {}).get(unit, 0.0)) for trial in self.trials)

    def _look(self) -> None:
        if time.monotonic() - self._read < _FRESH:
            return
        self._read = time.monotonic()
        found = self._study.get_trials(deepcopy=False)
        now = time.monotonic()
        if now - self._looked > _AWAY:  # nobody could write a heartbeat either
            self._signs = {name: (sign, now) for name, (sign, _) in self._signs.items()}
        self._looked = now
        self.trials = [
            trial for trial in found
            if trial.state != TrialState.WAITING and EARLIER not in trial.user_attrs
            and trial.user_attrs.get(BY) not in (None, self._me)
        ]  # fmt: skip
        for key, sign in self._study.user_attrs.items():
            name = key.removeprefix("alive:")
            if name not in (key, self._me) and self._signs.get(name, (None, 0.0))[0] != sign:
                self._signs[name] = (sign, self._read)

    def _known(self, trial: FrozenTrial) -> Known:
        per_step = trial.user_attrs.get("state", {}).get("per_step", 1.0)
        points = trial.user_attrs.get("values") or sorted(trial.intermediate_values.items())
        values = {step * per_step: self._objective.lower(value) for step, value in points}
        return Known(trial.number, values, self._state(trial))

    def _state(self, trial: FrozenTrial) -> State:
        """A trial's state; pruned if it is paused or its controller is dead, as it is not waited for."""
        if trial.state.is_finished():
            return ENDED[trial.state]
        paused = trial.user_attrs.get("state", {}).get("paused", False)
        seen = self._signs.get(trial.user_attrs[BY], (None, -_GONE))[1]
        return "pruned" if paused or time.monotonic() - seen >= _GONE else "running"
