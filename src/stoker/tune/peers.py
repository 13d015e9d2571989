"""Other controllers on the same study: what their trials came to, and which of them are alive.

A trial belongs to the controller that asked for it, in whose folder its run stands, and nobody else resumes
it. What others decide by is in the study: values as they are reported, and whether the trial is paused. A
controller says now and then that it is alive; of one that does not, nobody waits for anything.
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

_BEAT = 5.0  # seconds between two signs of life
_GONE = 30.0  # seconds without one
_FRESH = 0.5  # seconds for which what was read of the others is new enough
BY = "controller"
"""The attribute of a trial whose controller it is."""


class Peers:
    """What a study says of the trials that are not this controller's.

    Args:
        me: a name that no other controller has, the same whenever this one comes back.
        objective: the one by which trials end early.
    """

    patience = 2.0
    """Seconds after which it is worth looking again."""

    def __init__(self, study: Study, me: str, objective: Objective) -> None:
        self._study, self._me, self._objective = study, me, objective
        self._read = self._beaten = -_GONE
        self._signs: dict[str, tuple[Any, float]] = {}
        """Of each controller its newest sign of life, and when it was seen first by this one's clock."""
        self.trials: list[FrozenTrial] = []
        """The others' trials."""
        self.beat()
        self._look()

    def mine(self, trial: FrozenTrial) -> bool:
        """Whether a trial is this controller's: also one whose controller was killed before it said so."""
        owner = trial.user_attrs.get(BY)
        if owner is None and not trial.state.is_finished():  # another may be about to say so
            began = trial.datetime_start
            signs = [sign for key, sign in self._study.user_attrs.items() if key != f"alive:{self._me}"]
            alone = all(time.time() - sign > _GONE for sign in signs if isinstance(sign, float))
            return alone or (began is not None and time.time() - began.timestamp() > _GONE)
        return owner == self._me

    def claim(self, trial: Trial) -> None:
        """Make a trial this controller's."""
        if trial.user_attrs.get(BY) != self._me:
            trial.set_user_attr(BY, self._me)

    def publish(self, trial: Trial, seen: Seen, *, paused: bool) -> None:
        """Say where a trial is."""
        said = {"paused": paused, "per_step": seen.per_step}
        if trial.user_attrs.get("state") != said:
            trial.set_user_attr("state", said)

    def beat(self) -> None:
        """Say that this controller is alive, unless it has just done so."""
        if time.monotonic() - self._beaten >= _BEAT:
            self._beaten = time.monotonic()
            self._study.set_user_attr(f"alive:{self._me}", time.time())

    def known(self) -> Mapping[int, Known]:
        """The others' trials as schedulers know them."""
        self._look()
        return {trial.number: self._known(trial) for trial in self.trials}

    def look_again(self) -> None:
        """Read what there is of the others now."""
        self._read = -_GONE
        self._look()

    @property
    def running(self) -> bool:
        """Whether a trial runs of a controller that is alive."""
        self._look()
        return any(self._state(trial) == "running" for trial in self.trials)

    def spent(self, unit: str) -> float:
        """What their trials have spent that are over, in hours of a rank or a unit of training."""
        self._look()
        return sum(float(trial.user_attrs.get("spent", {}).get(unit, 0.0)) for trial in self.trials)

    def _look(self) -> None:
        if time.monotonic() - self._read < _FRESH:
            return
        self._read = time.monotonic()
        found = self._study.get_trials(deepcopy=False)
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
        """As far as it matters here: what does not run now is nobody's to be waited for or resumed."""
        if trial.state.is_finished():
            return ENDED[trial.state]
        paused = trial.user_attrs.get("state", {}).get("paused", False)
        seen = self._signs.get(trial.user_attrs[BY], (None, -_GONE))[1]
        return "pruned" if paused or time.monotonic() - seen >= _GONE else "running"
