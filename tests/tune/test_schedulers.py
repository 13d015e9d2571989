from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker.errors import BadInput
from stoker.tune.schedulers import (
    Asha,
    Decision,
    Full,
    Hyperband,
    Known,
    Median,
    PopulationBased,
    Scheduler,
    Staged,
    Trials,
    make,
)

CONTINUE, PAUSE, STOP = Decision.CONTINUE, Decision.PAUSE, Decision.STOP
INF = math.inf
State = Literal["running", "paused", "pruned", "complete", "failed"]


def known(number: int, values: Mapping[float, float], state: State = "running") -> Known:
    return Known(number, values, state)


def table(*trials: Known) -> dict[int, Known]:
    return {trial.number: trial for trial in trials}


# Few different values, so that there are ties; losses[trial][rung].
LOSSES = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, -INF, INF]), min_size=5, max_size=5),
    min_size=1,
    max_size=40,
)
RANDOM = st.randoms(use_true_random=False)


class Paper:
    """Algorithm 2 of arXiv:1810.05934 with s=0, its lines in its order."""

    def __init__(self, r: int, most: int, eta: int, n: int) -> None:
        self.eta, self.n, self.begun = eta, n, 0
        self.top = 0
        while r * eta ** (self.top + 1) <= most:  # floor(log_eta(most / r)), in whole numbers
            self.top += 1
        self.rung: dict[int, dict[int, float]] = defaultdict(dict)
        self.promoted: dict[int, set[int]] = defaultdict(set)

    def update(self, t: int, k: int, loss: float) -> None:
        self.rung[k][t] = loss

    def get_job(self) -> tuple[int, int] | None:
        for k in range(self.top - 1, -1, -1):
            promotable = [t for t in self.top_k(k) if t not in self.promoted[k]]
            if promotable:
                self.promoted[k].add(promotable[0])
                return promotable[0], k + 1
        if self.begun == self.n:
            return None
        self.begun += 1
        return self.begun - 1, 0

    def top_k(self, k: int) -> list[int]:
        ranked = sorted((loss, t) for t, loss in self.rung[k].items())
        return [t for _, t in ranked[: len(ranked) // self.eta]]

    def left(self) -> list[int]:
        """Those that wait at the rung that they reached last."""
        waits = {t for k in range(self.top) for t in self.rung[k] if t not in self.promoted[k]}
        return sorted(waits)


class Controller:
    """Runs the same trials by a scheduler; a job lasts until the next rung, with reports on the way."""

    def __init__(self, scheduler: Scheduler, rungs: list[int], losses: list[list[float]]) -> None:
        self.scheduler, self.rungs, self.losses = scheduler, rungs, losses
        self.trials: dict[int, Known] = {}

    def finish(self, t: int, k: int) -> None:
        """Report what lies between two rungs, then the loss at the rung, and do as is said."""
        before = self.rungs[k - 1] if k else 0
        for resource in range(before + 1, self.rungs[k]):
            self._report(t, resource, -100.0 - t)
            assert self.scheduler.decide(self.trials, t) is CONTINUE
        self._report(t, self.rungs[k], self.losses[t][k])
        decision = self.scheduler.decide(self.trials, t)
        if k == len(self.rungs) - 1:
            assert decision is CONTINUE
            self._now(t, "complete")
        elif decision is PAUSE:
            self._now(t, "paused")
        else:
            assert decision is CONTINUE

    def next_job(self, last: tuple[int, int] | None) -> tuple[int, int] | None:
        """What a worker does that has just finished `last`."""
        if last is not None and self.trials[last[0]].state == "running":
            return last[0], last[1] + 1
        resumed = self.scheduler.resumes(self.trials)
        if resumed is not None:
            self._now(resumed, "running")
            return resumed, sum(resource in self.rungs for resource in self.trials[resumed].values)
        if len(self.trials) == len(self.losses):
            return None
        number = len(self.trials)
        self.trials[number] = known(number, {})
        return number, 0

    def _report(self, t: int, resource: float, value: float) -> None:
        self.trials[t] = replace(self.trials[t], values={**self.trials[t].values, resource: value})

    def _now(self, t: int, state: State) -> None:
        self.trials[t] = replace(self.trials[t], state=state)


@given(LOSSES, st.integers(1, 8), st.sampled_from([(1, 9, 3), (1, 16, 2), (2, 18, 3), (1, 16, 4)]), RANDOM)
def test_promotes_as_the_paper_does_whoever_finishes_first(
    losses: list[list[float]], workers: int, span: tuple[int, int, int], order: random.Random
) -> None:
    least, most, factor = span
    paper = Paper(least, most, factor, len(losses))
    rungs = [least * factor**k for k in range(paper.top + 1)]
    ours = Controller(Asha(least, most, factor), rungs, losses)
    jobs: list[tuple[int, int]] = []
    last: tuple[int, int] | None = None
    while True:
        while len(jobs) < workers:
            expected, job = paper.get_job(), ours.next_job(last)
            assert job == expected
            last = None
            if job is None:
                break
            jobs.append(job)
        if not jobs:
            break
        assert ours.scheduler.given_up(ours.trials) == []
        last = jobs.pop(order.randrange(len(jobs)))
        ours.finish(*last)
        paper.update(*last, losses[last[0]][last[1]])
    assert ours.scheduler.given_up(ours.trials) == paper.left()


@given(LOSSES, st.sampled_from([2, 3, 4]), RANDOM)
def test_stopping_keeps_the_best_share_of_what_a_rung_has_seen(
    losses: list[list[float]], factor: int, order: random.Random
) -> None:
    scheduler = Asha(1, factor**4, factor, promotes=False)
    rungs = [factor**k for k in range(4)]
    seen: dict[int, dict[int, float]] = {rung: {} for rung in rungs}
    trials = {t: known(t, {}) for t in range(len(losses))}
    running = dict.fromkeys(trials, 0)
    while running:
        t = order.choice(sorted(running))
        rung, loss = rungs[running[t]], losses[t][running[t]]
        seen[rung][t] = loss
        trials[t] = replace(trials[t], values={**trials[t].values, rung: loss})
        ahead = sum((other, number) < (loss, t) for number, other in seen[rung].items())
        count = len(seen[rung])
        goes_on = count < factor or ahead < count // factor
        assert scheduler.decide(trials, t) is (CONTINUE if goes_on else STOP)
        running[t] += 1
        if not goes_on or running[t] == len(rungs):
            trials[t] = replace(trials[t], state="pruned" if not goes_on else "complete")
            del running[t]
    assert scheduler.resumes(trials) is None


@given(LOSSES, st.integers(1, 6), st.integers(1, 4), RANDOM)
def test_stages_end_with_the_best_at_the_highest_rungs_and_no_other(
    losses: list[list[float]], workers: int, finalists: int, order: random.Random
) -> None:
    rungs = [1, 3, 9, 27]
    staged = Staged(Asha(1, 27), finalists, planned=len(losses))
    ours = Controller(staged, rungs, losses)
    jobs: list[tuple[int, int]] = []
    last: tuple[int, int] | None = None
    coarse: dict[int, Known] = {}
    while True:
        while len(jobs) < workers and (job := ours.next_job(last)) is not None:
            last = None
            jobs.append(job)
            if job[1] == 3 and not coarse:
                coarse = dict(ours.trials)
        last = None
        if not jobs:
            break
        last = jobs.pop(order.randrange(len(jobs)))
        ours.finish(*last)
    whole = {n for n, trial in ours.trials.items() if trial.state == "complete"}
    waiting = set(ours.scheduler.given_up(ours.trials))
    assert whole | waiting == set(ours.trials)
    assert not whole & waiting
    assert len(whole) <= finalists
    if coarse:
        assert len(coarse) == len(losses), "every trial was begun before the first whole training"
    heights = {n: sum(rung in trial.values for rung in rungs[:3]) for n, trial in ours.trials.items()}
    standing = {n: (-heights[n], losses[n][heights[n] - 1], n) for n in ours.trials}
    assert whole == set(sorted(standing, key=standing.__getitem__)[:finalists])


def test_rungs_are_those_of_the_papers_example() -> None:
    assert Asha(1, 9, 3).rungs == (1, 3)
    assert Asha(1, 256, 4).rungs == (1, 4, 16, 64)
    assert Asha(9, 9, 3).rungs == ()


def test_the_last_leg_goes_to_most_where_no_rung_lies_there() -> None:
    assert Asha(1, 10, 3).rungs == (1, 3, 9)


def test_the_papers_example_promotes_three_of_nine_then_one_of_three() -> None:
    asha = Asha(1, 9, 3)
    trials = {n: known(n, {1: float(n)}, "paused") for n in range(9)}
    for expected in (0, 1, 2):
        assert asha.resumes(trials) == expected
        trials[expected] = known(expected, {1: float(expected)})
    assert asha.resumes(trials) is None
    for number, value in ((0, 5.0), (1, 4.0)):
        trials[number] = known(number, {1: float(number), 3: value}, "paused")
    trials[2] = known(2, {1: 2.0, 3: 6.0})
    assert asha.decide(trials, 2) is PAUSE
    trials[2] = replace(trials[2], state="paused")
    assert asha.resumes(trials) == 1


def test_a_trial_that_would_be_promoted_at_once_continues() -> None:
    asha = Asha(1, 9, 3)
    trials = table(known(0, {1: 3.0}, "paused"), known(1, {1: 2.0}, "paused"), known(2, {1: 1.0}))
    assert asha.decide(trials, 2) is CONTINUE
    assert asha.decide({**trials, 2: known(2, {1: 4.0})}, 2) is PAUSE


def test_a_promotion_at_a_higher_rung_comes_before_ones_own() -> None:
    asha = Asha(1, 9, 3)
    high = [known(n, {1: 0.0, 3: float(n)}, "paused") for n in range(3)]
    low = [known(n, {1: 9.0}, "paused") for n in range(3, 14)]
    trials = table(*high, *low, known(14, {1: -1.0}))
    assert asha.decide(trials, 14) is PAUSE
    assert asha.resumes({**trials, 14: known(14, {1: -1.0}, "paused")}) == 0


def test_a_rung_is_reached_by_the_first_report_at_or_beyond_it() -> None:
    asha = Asha(10, 90, 3)
    others = [known(n, {11: float(n)}, "paused") for n in range(2)]
    assert asha.decide(table(*others, known(2, {9: 5.0})), 2) is CONTINUE
    assert asha.decide(table(*others, known(2, {9: 0.5, 12: 5.0})), 2) is PAUSE
    assert asha.decide(table(*others, known(2, {9: 0.5, 12: 5.0, 13: -5.0})), 2) is CONTINUE
    late = table(*others, known(2, {9: 0.5, 12: 5.0, 13: -5.0}, "paused"))
    assert asha.resumes(late) == 0  # by the value at 12, not by the better ones before and after


def test_a_report_that_reaches_two_rungs_counts_at_both_and_is_judged_at_the_higher() -> None:
    asha = Asha(1, 9, 3)
    trials = table(known(0, {1: 0.0}, "paused"), known(1, {1: 1.0}, "paused"), known(2, {4: -1.0}))
    assert asha.decide(trials, 2) is PAUSE  # the best of three at rung 1, but alone at rung 3
    stops = replace(asha, promotes=False)
    below = {n: known(n, {1: 0.0, 3: 0.0}) for n in range(3)}
    assert stops.decide({**below, 3: known(3, {4: 1.0})}, 3) is STOP


def test_rungs_that_floats_cannot_hold_are_reached() -> None:
    asha = Asha(0.1, 0.9, 3)
    assert len(asha.rungs) == 2
    assert asha.rungs[1] > 0.3
    assert asha.decide(table(known(0, {0.1: 1.0, 0.3: 1.0})), 0) is PAUSE


def test_a_trial_at_its_end_is_neither_paused_nor_promoted() -> None:
    for asha in (Asha(1, 9, 3), Asha(1, 9, 3, promotes=False)):
        others = [known(n, {1: 0.0, 3: 0.0, 9: 0.0}, "complete") for n in range(3)]
        assert asha.decide(table(*others, known(3, {9: 5.0})), 3) is CONTINUE
        assert asha.resumes(table(*others, known(3, {9: -5.0}, "paused"))) is None


def test_equal_values_rank_by_the_trials_number() -> None:
    asha = Asha(1, 9, 3)
    trials = {n: known(n, {1: 1.0}, "paused") for n in (5, 2, 7)}
    assert asha.resumes(trials) == 2
    stops = replace(asha, promotes=False)
    assert stops.decide({**trials, 2: known(2, {1: 1.0})}, 2) is CONTINUE
    assert stops.decide({**trials, 7: known(7, {1: 1.0})}, 7) is STOP


@pytest.mark.parametrize("state", ["failed", "pruned", "complete"])
def test_only_a_paused_trial_is_promoted_and_none_takes_its_place(state: State) -> None:
    trials = table(known(0, {1: 0.0}, state), known(1, {1: 1.0}, "paused"), known(2, {1: 2.0}, "paused"))
    assert Asha(1, 9, 3).resumes(trials) is None


def test_the_paused_are_given_up_once_nothing_can_change() -> None:
    asha = Asha(1, 9, 3)
    paused = [known(n, {1: float(n)}, "paused") for n in (4, 1, 2)]
    assert asha.given_up(table(*paused)) == []  # 1 is about to go on
    assert asha.given_up(table(*paused, known(0, {1: 0.0}))) == []  # 0 may still help
    assert asha.given_up(table(*paused, known(0, {1: 0.0, 3: 1.0, 9: 1.0}, "complete"))) == [1, 2, 4]


def test_the_brackets_share_trials_as_the_paper_begins_them() -> None:
    hyperband = Hyperband(1, 81, 3)
    assert list(hyperband.shares.items()) == [(4, 81), (3, 34), (2, 15), (1, 8), (0, 5)]
    assert [hyperband.asha(s).least for s in hyperband.shares] == [1, 3, 9, 27, 81]
    assert [hyperband.asha(s).rungs for s in hyperband.shares] == [
        (1, 3, 9, 27), (3, 9, 27), (9, 27), (27,), ()
    ]  # fmt: skip
    dealt = hyperband.brackets(286)
    assert Counter(dealt[:143]) == hyperband.shares
    assert dealt[:143] == dealt[143:]
    assert dealt[:50] == hyperband.brackets(50)


def test_a_search_of_few_trials_has_every_bracket_in_its_share() -> None:
    hyperband = Hyperband(1, 81, 3)
    for count in range(1, 144):
        dealt = Counter(hyperband.brackets(count))
        assert all(abs(dealt[s] - share * count / 143) < 2 for s, share in hyperband.shares.items())
    assert set(hyperband.brackets(30)) == {4, 3, 2, 1, 0}


@pytest.mark.parametrize(
    ("least", "most", "factor", "count"), [(1, 80, 3, 4), (0.1, 0.9, 3, 3), (5, 5, 2, 1), (1, 1024, 2, 11)]
)
def test_no_bracket_has_its_first_rung_below_least(
    least: float, most: float, factor: int, count: int
) -> None:
    hyperband = Hyperband(least, most, factor)
    assert len(hyperband.shares) == count
    assert hyperband.asha(count - 1).least >= least * (1 - 1e-9)
    assert hyperband.asha(count).least < least


def test_a_bracket_decides_among_its_own_trials() -> None:
    hyperband = Hyperband(1, 9, 3)
    brackets = hyperband.brackets(17)
    hasty = [n for n, s in enumerate(brackets) if s == 2]
    middle = [n for n, s in enumerate(brackets) if s == 1]
    trials = {n: known(n, {1: 0.0}) for n in range(17)}
    trials |= {n: known(n, {1: 1.0}, "paused") for n in hasty[:2]}
    assert hyperband.decide(trials, middle[0]) is CONTINUE  # its first rung lies at 3
    trials[hasty[2]] = known(hasty[2], {1: 0.5}, "paused")
    trials = {n: trials[n] for n in range(17) if n in middle or n in hasty[:3]}
    assert hyperband.resumes(trials) == hasty[2]
    trials |= {n: known(n, {3: 1.0 - n}, "paused") for n in middle[:3]}
    trials[hasty[2]] = known(hasty[2], {1: 0.5, 3: 9.0}, "paused")
    assert hyperband.resumes(trials) == middle[2]


def test_the_bracket_without_rungs_stops_nothing() -> None:
    hyperband = Hyperband(1, 9, 3)
    number = hyperband.brackets(17).index(0)
    values = {float(resource): INF for resource in range(1, 10)}
    trials = {n: known(n, {1: 0.0}) for n in range(17)} | {number: known(number, values)}
    assert hyperband.decide(trials, number) is CONTINUE


#        resource:  10   20   30     averages up to 10, 20, 30
# 0                 8    6    4      8, 7,   6
# 1                 6    4    2      6, 5,   4
# 2                 9    9    9      9, 9,   9
# median                             8, 7,   6
HAND = (
    known(0, {10: 8, 20: 6, 30: 4}, "complete"),
    known(1, {10: 6, 20: 4, 30: 2}, "running"),
    known(2, {10: 9, 20: 9, 30: 9}, "pruned"),
)


@pytest.mark.parametrize(
    ("values", "decision"),
    [
        ({10: 8.0}, CONTINUE),  # as the median
        ({10: 8.1}, STOP),
        ({10: 8.1, 20: 7.1}, STOP),
        ({10: 7.0, 20: 99.0}, CONTINUE),  # by its best so far, not its newest
        ({10: 8.1, 20: 8.1, 30: 6.0}, CONTINUE),
        ({10: 6.5, 20: 6.5, 30: 6.1}, STOP),
        ({10: 7.9, 40: 0.0}, CONTINUE),  # nobody else has got as far
    ],
)
def test_the_median_rule_decides_as_computed_by_hand(values: dict[float, float], decision: Decision) -> None:
    assert Median(warmup_trials=3).decide(table(*HAND, known(3, values)), 3) is decision


def test_the_median_rule_leaves_warm_ups_alone() -> None:
    trials = table(*HAND, known(3, {10: 99.0}))
    assert Median(warmup_trials=4).decide(trials, 3) is CONTINUE
    assert Median(warmup=11, warmup_trials=3).decide(trials, 3) is CONTINUE
    assert Median(warmup=10, warmup_trials=3).decide(trials, 3) is STOP


def test_the_median_rule_asks_only_those_that_have_got_as_far() -> None:
    behind = known(4, {10: 1000.0, 19: 1000.0})
    finer = known(5, {25: 1000.0})  # has got as far, but had reported nothing by then
    trials = table(*HAND, behind, finer, known(3, {20: 7.5}))
    assert Median(warmup_trials=3).decide(trials, 3) is STOP
    assert Median(warmup_trials=4).decide(trials, 3) is CONTINUE


@pytest.mark.parametrize("scheduler", [Full(), Median()])
def test_what_was_paused_goes_on_where_nothing_pauses(scheduler: Scheduler) -> None:
    trials = table(known(3, {1: 9.0}, "paused"), known(1, {1: 9.0}, "paused"), known(0, {1: 0.0}))
    assert scheduler.resumes(trials) == 1
    assert scheduler.resumes({}) is None
    assert scheduler.given_up(table(known(3, {1: 9.0}, "paused"))) == []


def test_without_a_scheduler_everything_goes_on() -> None:
    trials = table(*(known(n, {1: 0.0}) for n in range(9)), known(9, {1: INF}))
    assert Full().decide(trials, 9) is CONTINUE


# Eight members at 10, number n with value n: 6 and 7 are the worst quarter, 0 and 1 the best.
POPULATION = {n: known(n, {5: 50.0, 10: float(n)}) for n in range(8)}
LATER = {n: replace(member, values={**member.values, 20: float(n)}) for n, member in POPULATION.items()}
PBT = PopulationBased(every=10, population=8)


def test_the_worst_are_replaced_from_the_best_in_turn() -> None:
    assert [PBT.decide(POPULATION, n) for n in range(8)] == [CONTINUE] * 6 + [STOP] * 2
    assert [PBT.donor(POPULATION, n) for n in range(8)] == [None] * 6 + [0, 1]


def test_the_donor_is_the_same_after_the_stop() -> None:
    stopped = {**POPULATION, 7: replace(POPULATION[7], state="pruned")}
    assert PBT.donor(stopped, 7) == 1


def test_members_are_compared_only_at_multiples() -> None:
    assert PBT.decide({**POPULATION, 7: known(7, {9: 99.0})}, 7) is CONTINUE
    assert PBT.decide({**POPULATION, 7: known(7, {9: 0.0, 12: 99.0})}, 7) is STOP
    assert PBT.decide({**POPULATION, 7: known(7, {10: 0.0, 19: 99.0})}, 7) is CONTINUE
    assert PBT.decide({**LATER, 7: known(7, {10: 0.0, 20: 99.0})}, 7) is STOP
    third = PopulationBased(every=0.1, population=8)
    assert third.decide({**POPULATION, 7: known(7, {0.25: 0.0, 0.1 * 3: 99.0})}, 7) is STOP


def test_a_replacement_has_its_donors_history_and_is_not_compared_before_the_next_multiple() -> None:
    population = {**LATER, 7: replace(LATER[7], state="pruned")}
    assert PBT.decide({**population, 8: known(8, {5: 50.0, 10: 1.0, 15: 99.0})}, 8) is CONTINUE
    assert PBT.decide({**population, 8: known(8, {5: 50.0, 10: 1.0, 20: 99.0})}, 8) is STOP


@pytest.mark.parametrize("state", ["complete", "failed", "pruned"])
def test_only_the_living_are_compared_and_give(state: State) -> None:
    population = {**POPULATION, 0: replace(POPULATION[0], state=state)}
    assert PBT.donor(population, 7) == 1  # of 7 members one is the worst, and one the best
    assert PBT.decide(population, 6) is CONTINUE


def test_nobody_is_replaced_before_the_population_is_begun() -> None:
    begun = {n: known(n, {10: float(n)}, "paused") for n in range(7)}
    assert PBT.decide({**begun, 6: known(6, {10: 99.0})}, 6) is PAUSE
    assert PBT.donor(begun, 6) is None
    assert PBT.resumes(begun) is None
    assert PBT.donor({**begun, 7: known(7, {})}, 6) == 0


def test_nobody_is_replaced_by_one_that_is_no_better() -> None:
    equal = {n: known(n, {10: 1.0}) for n in range(8)}
    assert [PBT.decide(equal, n) for n in range(8)] == [CONTINUE] * 8


def test_a_replacement_never_begins_further_back() -> None:
    """At a step whose batch is hard for all, whoever gets there first looks worst beside those behind."""
    behind = {n: known(n, {10.0: 1.0 + n / 100}, "paused") for n in range(7)}
    first = {**behind, 7: known(7, {10.0: 1.0, 20.0: 9.0})}
    assert PBT.donor(first, 7) is None
    assert PBT.decide(first, 7) is Decision.PAUSE
    caught_up = {**first, 0: known(0, {10.0: 1.0, 20.0: 0.5}, "paused")}
    assert PBT.donor(caught_up, 7) == 0
    assert PBT.decide(caught_up, 7) is Decision.STOP


def test_at_its_end_a_member_is_left_alone() -> None:
    ends = PopulationBased(every=10, population=8, most=10)
    assert ends.decide(POPULATION, 7) is CONTINUE


def test_a_member_that_is_ahead_waits_for_those_behind() -> None:
    waits = {**POPULATION, 3: known(3, {10: 3.0}, "paused"), 0: known(0, {10: 0.0, 20: 0.0})}
    assert PBT.decide(waits, 0) is PAUSE
    assert PBT.resumes({**waits, 0: replace(waits[0], state="paused")}) == 3
    assert PBT.decide(waits, 1) is CONTINUE  # 3 waits too, but is as far
    assert PBT.decide({**waits, 3: known(3, {10: 3.0})}, 0) is CONTINUE  # 3 runs: there is room for all


def test_the_member_with_the_least_resource_resumes_then_the_best() -> None:
    paused = {n: known(n, {10: float(n), 20: -float(n)}, "paused") for n in range(8)}
    assert PBT.resumes(paused) == 7
    assert PBT.resumes({**paused, 2: known(2, {19: 9.0}, "paused")}) == 2


@pytest.mark.parametrize("workers", [1, 3, 8, 11])
def test_a_population_moves_on_together_and_reaches_its_end(workers: int) -> None:
    pbt = PopulationBased(every=10, population=8, most=50)
    quality = {n: float(n) for n in range(8)}
    trials: dict[int, Known] = {}
    replaced: list[tuple[int, int]] = []
    order = random.Random(0)
    while True:
        for number in _begin(pbt, trials, workers):
            trials[number] = (
                known(number, {}) if number not in trials else replace(trials[number], state="running")
            )
        running = [n for n, trial in trials.items() if trial.state == "running"]
        if not running:
            break
        number = order.choice(running)
        values = trials[number].values
        resource = max(values, default=0.0) + 5
        trials[number] = known(number, {**values, resource: quality[number]})
        decision = pbt.decide(trials, number)
        if resource == 50:
            assert decision is CONTINUE
            trials[number] = replace(trials[number], state="complete")
        elif decision is PAUSE:
            trials[number] = replace(trials[number], state="paused")
        elif decision is STOP:
            donor = pbt.donor(trials, number)
            assert donor is not None
            replaced.append((number, donor))
            trials[number] = replace(trials[number], state="pruned")
            quality[len(trials)] = quality[donor] - 0.5
            trials[len(trials)] = known(len(trials), trials[donor].values)
        alive = [max(t.values, default=0.0) for t in trials.values() if t.state in ("running", "paused")]
        assert workers >= 8 or not alive or max(alive) - min(alive) <= 30
    assert Counter(trial.state for trial in trials.values()) == {"complete": 8, "pruned": len(replaced)}
    assert replaced
    assert all(quality[donor] < quality[number] for number, donor in replaced)
    assert pbt.given_up(trials) == []


def _begin(pbt: PopulationBased, trials: dict[int, Known], workers: int) -> Iterator[int]:
    """What goes on or is begun until all workers have something to do."""
    while sum(trial.state == "running" for trial in trials.values()) < workers:
        resumed = pbt.resumes(trials)
        if resumed is None and len(trials) >= pbt.population:
            return
        yield len(trials) if resumed is None else resumed


TABLES = st.dictionaries(
    st.integers(0, 30),
    st.tuples(
        st.lists(st.sampled_from([0.0, 1.0, 2.5, -1.0, INF]), max_size=12),
        st.sampled_from(["running", "paused", "pruned", "complete", "failed"]),
    ),
    min_size=1,
)


@pytest.mark.parametrize(
    "scheduler",
    [
        Full(),
        Median(warmup_trials=2),
        Asha(1, 9, 3),
        Asha(1, 9, 2, promotes=False),
        Hyperband(1, 9, 3),
        PopulationBased(every=2, population=4),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@given(TABLES, RANDOM)
def test_the_order_of_the_table_changes_nothing(
    scheduler: Scheduler, rows: dict[int, tuple[list[float], State]], order: random.Random
) -> None:
    trials: Trials = {
        number: known(number, dict(enumerate(values, start=1)), state)
        for number, (values, state) in rows.items()
    }
    numbers = list(trials)
    order.shuffle(numbers)
    shuffled = {number: trials[number] for number in numbers}
    assert scheduler.resumes(shuffled) == scheduler.resumes(trials)
    assert scheduler.given_up(shuffled) == scheduler.given_up(trials)
    for number, trial in trials.items():
        if trial.values:
            assert scheduler.decide(shuffled, number) is scheduler.decide(trials, number)
            if isinstance(scheduler, PopulationBased):
                assert scheduler.donor(shuffled, number) == scheduler.donor(trials, number)


def test_makes_each_by_its_name() -> None:
    assert make("staged", most=27, population=40) == Staged(Asha(1, 27), 2, 40)
    assert make("none") == Full()
    assert make("median", least=3) == Median(warmup=3)
    assert make("asha", least=1, most=9) == Asha(1, 9, 3)
    assert make("asha", most=54, factor=3) == Asha(2, 54, 3)
    assert make("asha-stop", least=1, most=9, factor=2) == Asha(1, 9, 2, promotes=False)
    assert make("hyperband", least=1, most=81, factor=3) == Hyperband(1, 81, 3)
    assert make("pbt", least=5, population=4, quantile=0.5) == PopulationBased(5, 4, 0.5)
    assert make("pbt", least=5, most=50) == PopulationBased(5, 8, 0.25, most=50)
    assert make("pb2", least=5, most=50) == PopulationBased(5, 8, 0.25, most=50, learns=True)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("ahsa", {}, "did you mean 'asha'"),
        ("asha", {"least": 1}, "--scheduler asha needs --most"),
        ("hyperband", {}, "hyperband needs --most"),
        ("pbt", {"most": 9}, "pbt needs --least"),
        ("asha", {"least": 10, "most": 9}, "--least 10 is above --most 9"),
        ("hyperband", {"least": 10, "most": 9}, "--least 10 is above --most 9"),
        ("asha-stop", {"most": INF}, "--most inf"),
        ("asha", {"least": 0, "most": 9}, "--least 0"),
        ("asha", {"most": math.nan}, "nan"),
        ("asha", {"most": 9, "factor": 1}, "--factor 1"),
        ("asha", {"most": 9, "factor": 0}, "--factor 0"),
        ("pbt", {"least": 0}, "--least 0"),
        ("pbt", {"least": 5, "quantile": 0.6}, "--quantile 0.6"),
        ("pbt", {"least": 5, "population": 3}, "give 4 trials or more"),
        ("pbt", {"least": 5, "resample": -0.1}, "--resample -0.1"),
        ("pbt", {"least": 5, "factors": (0.0, 2.0)}, "--perturb 0,2"),
    ],
)
def test_refuses_what_cannot_be(name: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        make(name, **values)
