"""Shows a search: a live table while it runs, and its results."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from stoker.cli.output import console, print_json
from stoker.run import finding
from stoker.tune.plan import SHARE
from stoker.tune.schedulers import State
from stoker.words import counted

if TYPE_CHECKING:
    from stoker.tune.search import Search
    from stoker.tune.seen import Seen

log = logging.getLogger("stoker")

_SHOWN = 12  # trials in the live table


@contextlib.contextmanager
def live(search: Search) -> Iterator[None]:
    """On a terminal, show a live table; elsewhere, log a line for each trial that ends."""
    screen = Console(stderr=True)
    if screen.is_terminal:
        with Live(_Picture(search), console=screen, refresh_per_second=4, transient=True):
            yield
        return
    said: set[int] = {t.number for t in search.trials.values() if t.over}

    def say() -> None:
        over = [search.trials[number] for number in sorted(search.trials.keys() - said)]
        over = [trial for trial in over if trial.over]
        best = search.best if over else None
        for trial in over:
            said.add(trial.number)
            log.info("%s", _line(search, trial, best))

    search.on_change(say)
    yield
    say()


class _Picture:
    """The current state of the trials, redrawn on each refresh."""

    def __init__(self, search: Search) -> None:
        self._search, self._begun = search, time.monotonic()
        self._before = sum(trial.done for trial in search.trials.values())

    def __rich__(self) -> Group:
        search = self._search
        trials = list(search.trials.values())
        metrics = [one.metric for one in search.plan.objectives]
        table = Table(box=None, pad_edge=False)
        keys = sorted({key for trial in trials for key in trial.params})
        for column in ("trial", "state", "step", *metrics, *keys):
            table.add_column(column, justify="left" if column == "state" else "right")
        best = search.best
        for trial in _shown(trials, best):
            table.add_row(
                str(trial.number), trial.state, f"{trial.step:,.0f}",
                *map(_number, trial.outcome(search.plan.objectives)),
                *(_number(trial.params.get(key)) for key in keys),
                style="bold" if trial is best else "dim" if trial.state in ("pruned", "failed") else "",
            )  # fmt: skip
        return Group(table, Text("; ".join(self._summary(trials))), Text(_best_so_far(best)))

    def _summary(self, trials: list[Seen]) -> Iterator[str]:
        plan, spent = self._search.plan, time.monotonic() - self._begun
        yield f"{len(trials)}/{plan.trials} trials: {_counted(trials)}"
        if plan.whole is not None or plan.unit != "step":
            yield _saved(trials, plan)
        if plan.budget is not None:
            yield f"{self._search.spent:,.1f} of {plan.budget.amount:,.0f} {plan.budget.unit}s"
        yield f"{_clock(spent)} so far"
        left = self._left(trials, spent)
        if left is not None:
            yield f"about {_clock(left)} left"

    def _left(self, trials: list[Seen], spent: float) -> float | None:
        """The estimated seconds left, from this controller's speed and the length of the trials so far."""
        plan = self._search.plan
        limits = [plan.deadline - time.monotonic()] if plan.deadline is not None else []
        done = sum(trial.done for trial in trials) - self._before
        judged = [trial for trial in trials if trial.state != "running"]  # a paused trial may never continue
        if done > 0 and judged:
            each = sum(trial.done for trial in judged) / len(judged)
            unfinished = sum(max(0.0, each - trial.done) for trial in trials if trial.state == "running")
            limits.append((unfinished + each * max(0, plan.trials - len(trials))) * spent / done)
            if plan.budget is not None and plan.budget.unit != "hour":
                limits.append((plan.budget.amount - self._search.spent) * spent / done)
        return max(0.0, min(limits)) if limits else None


def _shown(trials: list[Seen], best: Seen | None) -> list[Seen]:
    """The trials that fit into the table, by number: preferably running ones, the best, then the newest."""
    order = sorted(trials, key=lambda t: (t.state != "running", t is not best, -t.number))
    return sorted(order[:_SHOWN], key=lambda trial: trial.number)


def _saved(trials: list[Seen], plan: Any) -> str:
    """How much was trained, and how much early stopping has saved."""
    done = sum(trial.done for trial in trials)
    said = f"{done:,.4g} {plan.unit}s"
    judged = [trial for trial in trials if trial.state != "running"]
    if plan.whole is None or not judged:
        return said
    saved = sum(
        max(0.0, plan.whole - trial.amount(trial.step)) for trial in judged if trial.state != "failed"
    )
    return f"{said}, {saved:,.4g} saved"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _counted(trials: Iterable[Seen]) -> str:
    """The number of trials in each state."""
    return _in_words(Counter(trial.state for trial in trials))


def _in_words(counts: Mapping[State, int]) -> str:
    return ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts.get(state))


def _best_so_far(best: Seen | None) -> str:
    return f"best {_number(best.value)} of trial {best.number}" if best else ""


def _line(search: Search, trial: Seen, best: Seen | None) -> str:
    params = " ".join(f"{key}={_number(value)}" for key, value in trial.params.items())
    so_far = f"; {_best_so_far(best)}" if best else ""
    return f"trial {trial.number} {trial.state}: {_outcome(search, trial)} ({params}){so_far}"


def _outcome(search: Search, trial: Seen) -> str:
    if trial.state == "failed":
        return trial.error.splitlines()[0] if trial.error else "no error message"
    values = trial.outcome(search.plan.objectives)
    return ", ".join(
        f"{one.metric} {_number(value)}" for one, value in zip(search.plan.objectives, values, strict=True)
    )


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


def answer(search: Search, *, json: bool, error: str = "") -> None:
    """Print the results of a search, and the error that ended it, if any."""
    plan, best = search.plan, search.best
    several = len(plan.objectives) > 1
    if json:
        print_json({
            "sweep": str(plan.folder), "metric": plan.first.metric, "goal": plan.first.goal,
            "objectives": [[one.metric, one.goal] for one in plan.objectives], "over": search.over,
            "best": best and told(best, search),
            "front": [trial.number for trial in search.front] if several else None,
            "trials": [told(trial, search) for trial in search.trials.values()], "error": error or None,
        })  # fmt: skip
        if error:
            log.error("%s", error)
        return
    out = console()
    states = Counter(_ended(trial) for trial in search.trials.values())
    out.print(f"\n{plan.folder.name}: {_in_words(states) or 'no trials'}")
    if several:
        for trial in search.front or ([best] if best is not None else []):
            params = " ".join(f"{key}={_number(value)}" for key, value in trial.params.items())
            out.print(f"  {trial.run:24} {_outcome(search, trial)}   {params}")
    elif best is not None:
        out.print(f"  {'best ' + plan.first.metric:24} {_number(best.value)}")
        for key, value in best.params.items():
            out.print(f"  {key:24} {_number(value)}")
        out.print(f"  {'trial':24} {plan.folder.name}/{best.run}")
    if search.over and best is not None and best.state != "complete":
        out.print(_ended_early(search, best))
    if best is not None:
        at, name = finding.option(plan.folder.parent), plan.folder.name
        out.print(f"next: stoker runs show {name}/{best.run}{at}   stoker report {name}{at}", markup=False)
    if error:
        log.error("%s", error)


def all_failed(search: Search) -> str:
    """The error of a search that is over and of which every trial failed; otherwise empty."""
    failed = [trial for trial in search.trials.values() if trial.state == "failed"]
    if not failed or not search.over or len(failed) < len(search.trials):
        return ""
    said = failed[0].error.partition("\n")[0]
    return f"every trial failed, the first with: {said}; see stoker report {search.plan.folder.name}"


def _ended_early(search: Search, best: Seen) -> str:
    """That the best trial ended early, and what to do about it."""
    said = f"no trial was trained to its end: the best of {counted(len(search.trials), 'trial')} ended early"
    if search.plan.unit == SHARE:  # to train on all of the data is another training
        return f"{said}, on {best.step:.4g} % of the data; with more --trials, some get further"
    resume = f"stoker resume {search.plan.folder.name}/{best.run}"
    return (
        f"{said}, at step {best.step:,.0f}; with more --trials, some get further, and `{resume}` trains "
        "this one to its end, from its newest checkpoint; then run the same search again to count it"
    )


def _ended(trial: Seen) -> State:
    """The trial's state once the search has ended."""
    return "paused" if trial.state == "running" else trial.state


def told(trial: Seen, search: Search) -> dict[str, Any]:
    """The result of a trial for `--json`, once the search has ended."""
    plan = search.plan
    outcome = trial.outcome(plan.objectives)
    of_share = plan.unit == SHARE
    return {
        "number": trial.number, "state": _ended(trial), "params": trial.params, "value": trial.value,
        "objectives": {one.metric: value for one, value in zip(plan.objectives, outcome, strict=True)},
        "parent": trial.parent,
        "values": [[step if of_share else int(step), value] for step, value in trial.values.items()],
        "run": str(plan.folder / trial.run), "error": trial.error or None,
    }  # fmt: skip
