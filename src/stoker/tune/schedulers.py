"""Schedulers decide which trials of a search continue, pause or stop early, as pure functions of the reports.

A scheduler keeps no state, reads no clock and draws no random numbers, so a restarted controller makes the
same decisions from its record. The controller calls `decide` once for each new report and stores the answer
in the table as the trial's state. Whenever there is room for a trial it calls `resumes`, and starts a new
trial if that returns None. Once no trial runs and no new one will be started, the paused trials that
`given_up` returns are over.

Smaller values are better throughout, and ties are broken by trial number. All values are finite: a trial
whose value is NaN or infinite has failed.
"""

from __future__ import annotations

import enum
import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from stoker.errors import BadInput, nearest

NAMES = ("none", "median", "asha", "asha-stop", "hyperband", "pbt", "pb2")
STAGED = "staged"
HALVING = ("asha", "asha-stop", "hyperband", STAGED)
"""Schedulers with rungs, at each of which one trial in `factor` continues."""
POPULATIONS = ("pbt", "pb2")
"""Schedulers that start trials from the checkpoints of others."""

_ONE_FINALIST_IN = 20  # trials
_ROUNDING = 1e-9  # relative: 0.1 * 3 > 0.3 in floats, but a report at 0.3 epochs has reached that rung


class Decision(enum.Enum):
    """What a trial does after a report."""

    CONTINUE = "continue"
    PAUSE = "pause"
    """Stop with a checkpoint; the trial may resume later."""
    STOP = "stop"
    """Stop for good."""


State = Literal["running", "paused", "pruned", "complete", "failed"]
"""A trial's state. A pruned trial was stopped early by a scheduler; its run has the state stopped."""


@dataclass(frozen=True)
class Known:
    """What a scheduler knows about a trial."""

    number: int
    values: Mapping[float, float]
    """Resource (steps, epochs...) -> value of the objective (smaller is better), in the order reported."""
    state: State

    def at(self, rung: float) -> float | None:
        """The first value reported at or beyond a resource; cached."""
        known: dict[float, float | None] = self.__dict__.setdefault("_firsts", {})
        if rung not in known:
            known[rung] = next((v for resource, v in self.values.items() if _reaches(resource, rung)), None)
        return known[rung]


Trials = Mapping[int, Known]
"""By number. A trial that is being decided on has the state running, and its newest report is included."""


class Scheduler(Protocol):
    """Decides about each trial from the table of all trials."""

    def decide(self, trials: Trials, number: int) -> Decision:
        """Decide what trial `number` does after its newest report."""
        ...

    def resumes(self, trials: Trials) -> int | None:
        """The paused trial that resumes now, or None if a new trial may be started instead."""
        ...

    def lengths(self, number: int) -> tuple[float, ...]:
        """The resources of a trial's rungs and of its end, in ascending order; empty if it has no rungs."""
        return ()

    def given_up(self, trials: Trials) -> list[int]:
        """The paused trials that will never resume, provided that no new trial is started.

        Empty while a trial runs or is about to resume, since its reports may let others resume.
        """
        if any(known.state == "running" for known in trials.values()) or self.resumes(trials) is not None:
            return []
        return _paused(trials)


@dataclass(frozen=True)
class Full(Scheduler):
    """Run every trial to its end."""

    def decide(self, trials: Trials, number: int) -> Decision:
        return Decision.CONTINUE

    def resumes(self, trials: Trials) -> int | None:
        return min(_paused(trials), default=None)


@dataclass(frozen=True)
class Median(Scheduler):
    """Stop a trial whose best value is worse than the median of the others' running averages.

    The median stopping rule of Vizier (Golovin et al. 2017, KDD). A trial is compared at the
    resource it has reached, by its reports up to there, with the other trials that have reached it too.
    Vizier compares with completed trials only. Here running trials and trials that were stopped later count
    too, because many searches start all of their trials at once.

    Args:
        warmup: no trial is stopped before this resource.
        warmup_trials: no trial is stopped before this many others have reached the same resource; at least 1.
    """

    warmup: float = 0.0
    warmup_trials: int = 5

    def decide(self, trials: Trials, number: int) -> Decision:
        now = _furthest(trials[number])
        others = [
            _average(values)
            for other, known in trials.items()
            if other != number and _reaches(_furthest(known), now) and (values := _up_to(known, now))
        ]
        if not _reaches(now, self.warmup) or len(others) < self.warmup_trials:
            return Decision.CONTINUE
        worse = min(_up_to(trials[number], now)) > statistics.median(others)
        return Decision.STOP if worse else Decision.CONTINUE

    def resumes(self, trials: Trials) -> int | None:
        return min(_paused(trials), default=None)


@dataclass(frozen=True)
class Asha(Scheduler):
    """Asynchronous successive halving: at each rung only the best 1/`factor` continue.

    Li et al. 2020, arXiv:1810.05934. Rungs lie at `least` * `factor`**k below `most`. A trial
    reaches a rung with its first report at or beyond it; if one report reaches several rungs, the trial is
    judged at the highest. A trial that has reached `most` always continues to its end.

    With `promotes` this is the paper's algorithm 2: a trial pauses at each rung, and `resumes` returns the
    trial that the paper's `get_job` promotes. If that is the trial that has just reported, it continues
    instead of pausing, which saves a checkpoint and a restart. Without `promotes` it is the stopping variant,
    which needs no checkpoints: a trial is stopped at a rung unless it is among the best 1/`factor` that have
    reached the rung so far, or fewer than `factor` have.

    Args:
        least: the resource of the first rung.
        most: the resource at which a trial ends.
        factor: one in `factor` trials continues at each rung (the paper's eta).
        promotes: pause trials at rungs; otherwise stop them.

    Raises:
        BadInput: the resources or the factor leave no room for rungs.
    """

    least: float
    most: float
    factor: int = 3
    promotes: bool = True

    def __post_init__(self) -> None:
        _check_span(self.least, self.most, self.factor)

    @property
    def rungs(self) -> tuple[float, ...]:
        """The resources at which trials are compared, in ascending order; empty if `least` equals `most`."""
        rungs = (self.least * self.factor**k for k in itertools.count())
        return tuple(itertools.takewhile(lambda rung: not _reaches(rung, self.most), rungs))

    def lengths(self, number: int) -> tuple[float, ...]:
        return (*self.rungs, self.most)

    def decide(self, trials: Trials, number: int) -> Decision:
        known = trials[number]
        height = self._height(_furthest(known))
        if height == self._height(_furthest_before(known)) or _reaches(_furthest(known), self.most):
            return Decision.CONTINUE
        if self.promotes:
            at_rung = {**trials, number: replace(known, state="paused")}
            return Decision.CONTINUE if self.resumes(at_rung) == number else Decision.PAUSE
        seen = _values_at(trials, self.rungs[height - 1])
        return Decision.CONTINUE if len(seen) < self.factor or number in self._best(seen) else Decision.STOP

    def resumes(self, trials: Trials) -> int | None:
        furthest = {number: _furthest(trials[number]) for number in _paused(trials)}
        waiting = {n: self._height(far) for n, far in furthest.items() if not _reaches(far, self.most)}
        for height, rung in reversed(list(enumerate(self.rungs, start=1))):
            for number in self._best(_values_at(trials, rung)):
                if waiting.get(number) == height:  # those at a higher rung are promoted already
                    return number
        return None

    def height(self, known: Known) -> int:
        """The number of rungs that a trial has reached."""
        return self._height(_furthest(known))

    def _height(self, resource: float) -> int:
        """The number of rungs at or below a resource."""
        return sum(_reaches(resource, rung) for rung in self.rungs)

    def _best(self, seen: Mapping[int, float]) -> list[int]:
        """The best 1/`factor` of the trials at a rung, best first."""
        return _ranked(seen)[: len(seen) // self.factor]


@dataclass(frozen=True)
class Hyperband(Scheduler):
    """Several brackets of successive halving, from the most aggressive to one that stops nothing.

    Li et al. 2018, arXiv:1603.06560: it is not known in advance how early trials can be told apart, so
    each bracket has a different first rung. Bracket s is an `Asha` of its own whose first rung is
    `most` / `factor`**s; s goes from 0 to the largest whose first rung is at or above `least`. Trials are
    compared only within their bracket. The brackets' shares of the trials are those of the paper's algorithm
    1, n(s) = ceil((s_max + 1) / (s + 1) * factor**s): of every 143 trials 81, 34, 15, 8 and 5 for least=1,
    most=81, factor=3. Trials are distributed evenly rather than bracket by bracket, so that a search that
    ends early has tried all brackets.

    Args:
        least: the first rung of the most aggressive bracket is at or above this resource.
        most: the resource at which a trial ends.
        factor: one in `factor` trials continues at each rung (the paper's eta).

    Raises:
        BadInput: the resources or the factor leave no room for rungs.
    """

    least: float
    most: float
    factor: int = 3

    def __post_init__(self) -> None:
        _check_span(self.least, self.most, self.factor)

    @property
    def shares(self) -> dict[int, int]:
        """The number of trials of a round that each bracket gets, by the paper's s, most aggressive first."""
        first_rungs = (self.most / self.factor**s for s in itertools.count())
        count = sum(1 for _ in itertools.takewhile(lambda rung: _reaches(rung, self.least), first_rungs))
        # -(-a // b) is the exact quotient, rounded up.
        return {s: -(-count * self.factor**s // (s + 1)) for s in reversed(range(count))}

    def asha(self, bracket: int) -> Asha:
        """The scheduler of a bracket."""
        return Asha(self.most / self.factor**bracket, self.most, self.factor)

    def brackets(self, count: int) -> list[int]:
        """The brackets of trials 0 to `count` - 1: each goes to the bracket furthest below its share."""
        shares = self.shares
        total, given, dealt = sum(shares.values()), dict.fromkeys(shares, 0), []
        for trial in range(1, count + 1):
            behind = {s: share * trial - given[s] * total for s, share in shares.items()}
            bracket = max(behind, key=behind.__getitem__)
            given[bracket] += 1
            dealt.append(bracket)
        return dealt

    def lengths(self, number: int) -> tuple[float, ...]:
        return self.asha(self.brackets(number + 1)[number]).lengths(number)

    def decide(self, trials: Trials, number: int) -> Decision:
        bracket, table = next((s, table) for s, table in self._tables(trials).items() if number in table)
        return self.asha(bracket).decide(table, number)

    def resumes(self, trials: Trials) -> int | None:
        named = (self.asha(bracket).resumes(table) for bracket, table in self._tables(trials).items())
        return next((number for number in named if number is not None), None)

    def _tables(self, trials: Trials) -> dict[int, dict[int, Known]]:
        """The trials of each bracket, most aggressive first."""
        brackets = self.brackets(max(trials, default=-1) + 1)
        return {s: {n: known for n, known in trials.items() if brackets[n] == s} for s in self.shares}


@dataclass(frozen=True)
class PopulationBased(Scheduler):
    """Replace the worst members of a population by perturbed copies of the best.

    Population based training (Jaderberg et al. 2017, arXiv:1711.09846) with truncation selection,
    asynchronously. The members of the population are the running and paused trials. A member is judged at its
    first report at or beyond each multiple of `every`:

    1. Members are ranked by their newest values, whatever resource they have reached. Let n be
       floor(`quantile` * members with a report). A member among the worst n is stopped if one of the best n
       has a better value and has reached the same multiple. If a replacement could start further back, a
       step that is bad for every member would stop them one after another, without end. `donor` returns the
       trial from whose checkpoint a replacement starts, with changed hyperparameters; the controller starts
       the replacement before it calls `resumes`. No member is stopped before `population` trials have
       started.
    2. Otherwise it pauses if a paused member has not reached this multiple, or if fewer than `population`
       trials have started. So the population advances together even if not all members can run at once.
    3. Otherwise it continues.

    `resumes` returns None until `population` trials have started, then the paused member with the least
    resource, ties broken by the best value. So the worst members report last, when most of the others have
    come as far and the comparison is fair.

    A replacement's `values` start with its donor's up to the checkpoint, so that its resource is known before
    its first report. A failed member is not replaced, and a complete one is neither compared nor a donor. A
    search needs at least `population` trials.

    Args:
        every: the resource between two comparisons.
        population: the number of trials at a time.
        quantile: the share of the population that is replaced, and also the share that donors come from.
        most: the resource at which a trial ends; a trial that has reached it is not replaced.
        resample: the probability that a replacement's value is drawn from its whole range.
        factors: otherwise the donor's value is multiplied by one of these, as in the paper's experiments.
        learns: choose values by the gains so far (see `bandit`), once there are enough.

    Raises:
        BadInput: a value is out of range, or the population is too small for `quantile` to replace a member.
    """

    every: float
    population: int
    quantile: float = 0.25
    most: float = math.inf
    resample: float = 0.25
    factors: tuple[float, float] = (0.8, 1.2)
    learns: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.every < math.inf:
            raise BadInput(
                f"--least {self.every:g}: the training between two comparisons must be more than 0"
            )
        if not 0 < self.quantile <= 0.5:
            raise BadInput(f"--quantile {self.quantile:g}: must be above 0 and at most 0.5")
        if self._size(self.population) < 1:
            least = math.ceil(1 / self.quantile - _ROUNDING)
            raise BadInput(
                f"--trials {self.population}: with --quantile {self.quantile:g} a population of this size "
                f"never replaces a member; give {least} trials or more, or a larger --quantile"
            )
        if not 0 <= self.resample <= 1:
            raise BadInput(f"--resample {self.resample:g}: must be a probability between 0 and 1")
        if not all(0 < factor < math.inf for factor in self.factors):
            raise BadInput(f"--perturb {self.factors[0]:g},{self.factors[1]:g}: must be two factors above 0")

    def decide(self, trials: Trials, number: int) -> Decision:
        known = trials[number]
        turn = self.turn(_furthest(known))
        if turn == self.turn(_furthest_before(known)) or _reaches(_furthest(known), self.most):
            return Decision.CONTINUE
        if self.donor(trials, number) is not None:
            return Decision.STOP
        behind = any(self.turn(_furthest(trials[other])) < turn for other in _paused(trials))
        return Decision.PAUSE if behind or len(trials) < self.population else Decision.CONTINUE

    def resumes(self, trials: Trials) -> int | None:
        if len(trials) < self.population:
            return None
        return min(
            _paused(trials),
            key=lambda number: (_furthest(trials[number]), _newest_value(trials[number]), number),
            default=None,
        )

    def donor(self, trials: Trials, number: int) -> int | None:
        """The trial whose checkpoint the replacement of `number` starts from; None if it is not replaced.

        The number of the replaced trial selects one of the eligible best trials, so that they take turns. The
        answer is the same before and after `number` is stopped.
        """
        values = {
            other: _newest_value(known)
            for other, known in trials.items()
            if known.values and (known.state in ("running", "paused") or other == number)
        }
        ranked, size = _ranked(values), self._size(len(values))
        if len(trials) < self.population or number not in ranked[len(ranked) - size :]:
            return None
        turn = self.turn(_furthest(trials[number]))
        better = [
            other
            for other in ranked[:size]
            if values[other] < values[number] and self.turn(_furthest(trials[other])) >= turn
        ]
        return better[number % len(better)] if better else None

    def turn(self, resource: float) -> int:
        """The number of multiples of `every` that a resource has reached."""
        return math.floor(resource / self.every * (1 + _ROUNDING))

    def _size(self, members: int) -> int:
        """The number of members that count as the best, and equally as the worst."""
        return math.floor(members * self.quantile + _ROUNDING)


@dataclass(frozen=True)
class Staged(Scheduler):
    """Successive halving on partial training runs, then complete training of the best few.

    For models that a search can afford to train completely only a few times. At first trials are promoted
    as by `asha`, but none beyond its last rung. Once `planned` trials have started and no more can be
    promoted, the finalists train to their end: the trials at the highest rungs, and at the same rung those
    with the best values.

    Args:
        asha: its `most` is the resource at which complete training ends.
        finalists: the number of finalists.
        planned: the number of trials of the search.
    """

    asha: Asha
    finalists: int
    planned: int

    def lengths(self, number: int) -> tuple[float, ...]:
        return self.asha.lengths(number)

    def decide(self, trials: Trials, number: int) -> Decision:
        known, last = trials[number], self.asha.rungs[-1]
        if _reaches(_furthest_before(known), last):
            return Decision.CONTINUE
        decision = Decision.PAUSE if _reaches(_furthest(known), last) else self._coarse.decide(trials, number)
        final = decision is Decision.PAUSE and number in self._final(trials)
        return Decision.CONTINUE if final else decision

    def resumes(self, trials: Trials) -> int | None:
        promoted = self._coarse.resumes(trials)
        if promoted is not None:
            return promoted
        return next((number for number in self._final(trials) if trials[number].state == "paused"), None)

    @property
    def _coarse(self) -> Asha:
        return replace(self.asha, most=self.asha.rungs[-1])

    def _final(self, trials: Trials) -> list[int]:
        """The finalists, best first; empty while another trial runs, can be promoted or is yet to start."""
        if len(trials) < self.planned or self._coarse.resumes(trials) is not None:
            return []
        reached = {n: self.asha.rungs[: self.asha.height(known)] for n, known in trials.items()}
        values = {n: trials[n].at(rungs[-1]) for n, rungs in reached.items() if rungs}
        judged = {
            n: value for n, value in values.items()
            if value is not None and trials[n].state != "failed"
        }  # fmt: skip
        ranked = sorted(judged, key=lambda n: (-len(reached[n]), judged[n], n))[: self.finalists]
        others = any(known.state == "running" for n, known in trials.items() if n not in ranked)
        return [] if others else ranked


def make(
    name: str,
    *,
    least: float | None = None,
    most: float | None = None,
    factor: int = 3,
    population: int = 8,
    quantile: float = 0.25,
    resample: float = 0.25,
    factors: tuple[float, float] = (0.8, 1.2),
) -> Scheduler:
    """Build a scheduler by its name.

    Args:
        name: none, median, asha, asha-stop, hyperband, pbt or pb2; or staged.
        least: the resource before which no trial is stopped. For median, by default 0; for asha, asha-stop,
            hyperband and staged the first rung, by default `most` / `factor`**3; for pbt and pb2 the
            resource between two comparisons.
        most: the resource at which a trial ends, in the same unit.
        factor: for asha, asha-stop, hyperband and staged: one in `factor` trials continues at each rung.
        population: for pbt and pb2, the number of trials at a time; for staged, that of the search.
        quantile, resample, factors: for pbt and pb2, see `PopulationBased`.

    Raises:
        BadInput: the name is unknown, a required value is missing, or a value is out of range.
    """
    if name not in (*NAMES, STAGED):
        raise BadInput(f"unknown scheduler {name!r}: give one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    if name == "none":
        return Full()
    if name == "median":
        return Median(warmup=least or 0.0)
    if name in POPULATIONS:
        if least is None:
            raise BadInput(f"--scheduler {name} needs --least: the training between two comparisons")
        longest = math.inf if most is None else most
        return PopulationBased(least, population, quantile, longest, resample, factors, name == "pb2")
    if most is None:
        raise BadInput(f"{_option(name)} needs --most: the length of a whole trial")
    if least is None:
        least = most / max(factor, 1) ** 3
    if name == "hyperband":
        return Hyperband(least, most, factor)
    asha = Asha(least, most, factor, promotes=name != "asha-stop")
    if name == STAGED:
        if not asha.rungs:
            raise BadInput(f"--least {least:g} equals --most {most:g}: staged needs a rung below --most")
        return Staged(asha, max(1, population // _ONE_FINALIST_IN), population)
    return asha


def _option(name: str) -> str:
    return f"--{'strategy' if name == STAGED else 'scheduler'} {name}"


def _check_span(least: float, most: float, factor: int) -> None:
    if factor < 2:
        raise BadInput(f"--factor {factor}: must be at least 2; one in this many continues at each rung")
    if not 0 < most < math.inf:
        raise BadInput(f"--most {most:g}: the length of a trial must be above 0 and finite")
    if not least > 0:
        raise BadInput(f"--least {least:g}: the first rung must be above 0")
    if least > most:
        raise BadInput(
            f"--least {least:g} is above --most {most:g}, where trials end: lower --least or raise --most"
        )


def _reaches(resource: float, mark: float) -> bool:
    return resource >= mark * (1 - _ROUNDING)


def _newest_value(known: Known) -> float:
    return [math.inf, *known.values.values()][-1]


def _furthest(known: Known) -> float:
    """The largest resource that a trial has reported; 0 before its first report."""
    return max(known.values, default=0.0)


def _furthest_before(known: Known) -> float:
    """The largest resource that a trial had reported before its newest report."""
    return max([*known.values][:-1], default=0.0)


def _up_to(known: Known, resource: float) -> list[float]:
    """The values that a trial reported up to a resource."""
    return [value for reported, value in known.values.items() if _reaches(resource, reported)]


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _values_at(trials: Trials, rung: float) -> dict[int, float]:
    """For each trial that has reached a rung, its first value there."""
    firsts = ((number, known.at(rung)) for number, known in trials.items())
    return {number: value for number, value in firsts if value is not None}


def _paused(trials: Trials) -> list[int]:
    return sorted(number for number, known in trials.items() if known.state == "paused")


def _ranked(values: Mapping[int, float]) -> list[int]:
    """Trial numbers, best value first."""
    return sorted(values, key=lambda number: (values[number], number))
