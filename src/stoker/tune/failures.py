"""When a search should not go on: too many failures, refusals, or a metric that nobody logs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from stoker.errors import StokerError
from stoker.status import FINISHED
from stoker.tune.plan import Plan
from stoker.tune.seen import Seen
from stoker.tune.trial import Ended
from stoker.words import counted

log = logging.getLogger("stoker")

_REFUSED = 5
"""How many trials may be refused with the same error, if none has logged anything, before the search ends."""
_NEARLY = 0.9  # of a whole trial: the last report may come before its end


class Failures:
    """Judges how trials end.

    Args:
        trials: the trials of the search, by number.
        lengths: a trial's rungs and its end, as its scheduler has them.
    """

    def __init__(
        self, plan: Plan, trials: Mapping[int, Seen], lengths: Callable[[int], Sequence[float]]
    ) -> None:
        self._plan, self._trials, self._lengths = plan, trials, lengths
        self._refused: list[Ended] = []
        self._said_short = False

    def check(self, ended: Ended) -> None:
        """Raises StokerError if the search should not go on after a trial ended like this."""
        if ended.status == FINISHED:
            self._check_logged(ended)
            self._warn_of_short(self._trials[ended.number])
        self.check_count()
        self._check_refusals(ended)

    def check_count(self) -> None:
        """Raises StokerError if too many trials have failed."""
        if self._plan.max_failures is None:
            return
        failures = [trial for trial in self._trials.values() if trial.state == "failed"]
        if len(failures) > self._plan.max_failures:
            raise StokerError(
                f"{counted(len(failures), 'trial')} failed, more than --max-failures "
                f"{self._plan.max_failures}; trial {failures[-1].number}: {failures[-1].error}"
            )

    def _check_logged(self, ended: Ended) -> None:
        """Raises StokerError if an objective was logged neither by this trial nor by any other."""
        lacking = [one.metric for one in self._plan.objectives if one.metric not in ended.logged]
        if lacking:  # looking through all trials takes long, and is seldom needed
            known = {metric for trial in self._trials.values() for metric in trial.others}
            lacking = [metric for metric in lacking if metric not in known]
        if lacking:
            logged = ", ".join(sorted(ended.logged)) or "nothing"
            raise StokerError(
                f"the recipe never logs {', '.join(lacking)}: it logs {logged}; "
                "name one of these with --metric"
            )

    def _warn_of_short(self, trial: Seen) -> None:
        """Warn once of trials that are shorter than their scheduler assumes."""
        whole = self._plan.whole
        if self._said_short or whole is None or not self._lengths(trial.number):
            return
        done = trial.amount(trial.step)
        if done < _NEARLY * whole:
            self._said_short = True
            log.warning(
                "trial %d ended after its report at %s %ss, but rungs are laid out over --most %s: set "
                "--most to the length of a whole trial",
                trial.number, f"{done:,.4g}", self._plan.unit, f"{whole:,.4g}",
            )  # fmt: skip

    def _check_refusals(self, ended: Ended) -> None:
        """Raises StokerError if trials are refused with the same error, and none has logged anything."""
        if not ended.refused or any(trial.others or trial.values for trial in self._trials.values()):
            return
        self._refused.append(ended)
        alike = [one for one in self._refused if one.error == ended.error]
        if len(alike) == _REFUSED:
            where = " and ".join(sorted({one.where for one in alike if one.where}))
            raise StokerError(
                f"{_REFUSED} trials were refused with the same error: {replace(ended, where=where).said}; "
                "run the same search again to continue with other trials"
            )
