"""The Performance section of a report's page: bars of time and memory, rates, and when a loss was reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stoker.progress import clock, short
from stoker.report import facts, performance, scaling
from stoker.report.markup import Html, details, join, number, swatch, table, tag
from stoker.report.performance import Descent, Memory, RankMemory
from stoker.report.plots import Figure
from stoker.report.sections import places_of, run_cell, run_heading, section
from stoker.run.state import RunView

LOSSES = ("val_loss", "loss")
_COLORS = {
    performance.TRAINING: 2, performance.WAITING: 1, performance.EVALUATING: 0, performance.CHECKPOINTS: 3,
    performance.STARTING: 4, performance.FINISHING: 6, performance.AGAIN: 5, performance.BETWEEN: 7,
}  # fmt: skip
_MOST_RANKS = 8  # shown without opening the rest
_OF_CAPACITY = 0.25  # below this share of the capacity, a memory bar would be too short to read
_NOTHING = Html("")

Descents = dict[str, list[Descent | None]]


def render(
    views: Sequence[RunView],
    names: Sequence[str],
    figures: Sequence[Figure],
    descents: Descents,
    scaled: Sequence[Mapping[str, Any]] = (),
) -> Html:
    """The whole section; empty if no run has performance data.

    Args:
        figures: the figures of `data["performance"]` in the page.
        descents: see `descents`.
        scaled: the results of `stoker bench scaling`.
    """
    parts = [
        _time(views, names), _throughput(views, names), _figures(figures), _memory(views, names),
        _reached(views, names, descents), *(_scaling(result) for result in scaled),
    ]  # fmt: skip
    return section("Performance", *parts) if any(parts) else _NOTHING


def descents(views: Sequence[RunView]) -> Descents:
    """How the losses of each run decreased, by loss, for the runs that a Trainer timed."""
    timed = [any(attempt.began is not None for attempt in view.attempts) for view in views]
    found = {
        metric: [
            performance.descent(view, metric) if t else None for view, t in zip(views, timed, strict=True)
        ]
        for metric in LOSSES
    }
    return {metric: of for metric, of in found.items() if any(d is not None and len(d.steps) > 1 for d in of)}


def as_data(found: Descents, views: Sequence[RunView]) -> dict[str, Any]:
    """What the page's script needs to look up when a typed loss was reached: by loss, for each run."""
    return {
        metric: [
            None if d is None else
            {"steps": d.steps.tolist(), "values": d.values.tolist(), "seconds": d.seconds.tolist(),
             "tokens": view.tokens_per_step}
            for d, view in zip(of, views, strict=True)
        ]
        for metric, of in found.items()
    }  # fmt: skip


def spell(seconds: float) -> str:
    """`0.4 s`, `42.0 s`, `12:03`, `1:04:10`."""
    return f"{seconds:.1f} s" if seconds < 59.95 else clock(seconds)


def _time(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """One bar per run of where its time went, and the seconds that add up to it."""
    found = {names[i] if len(views) > 1 else "": performance.time_spent(view) for i, view in enumerate(views)}
    spent = {name: of for name, of in found.items() if of}
    if not spent:
        return _NOTHING
    shown = [kind for kind in performance.KINDS if any(of[kind] for of in spent.values())]
    totals = {name: sum(of.values()) for name, of in spent.items()}
    bars = [time_bar(of, name) for name, of in spent.items()]
    rows = [[_kind(kind), *(_share(of[kind], totals[name]) for name, of in spent.items())] for kind in shown]
    rows.append([tag("td", "from start to end", class_="name"), *(number(spell(t)) for t in totals.values())])
    return join([
        tag("h3", "Where the time went"), tag("div", *bars, class_="bars"),
        table(["", *spent], rows, class_="narrow"),
    ])  # fmt: skip


def time_bar(spent: Mapping[str, float], name: str) -> Html:
    """All the time, without the time between attempts if that would hide the rest (a weekend)."""
    total = sum(spent.values())
    hidden = spent[performance.BETWEEN] > total / 2
    kinds = [kind for kind in spent if not (hidden and kind == performance.BETWEEN)]
    whole = sum(spent[kind] for kind in kinds)
    parts = [(_COLORS[k], spent[k] / whole, f"{k}: {spell(spent[k])}") for k in kinds if spent[k] and whole]
    said = f"{spell(whole)} in attempts" if hidden else spell(whole)
    return _bar(name, parts, said)


def _kind(kind: str) -> Html:
    return tag("td", swatch(_COLORS[kind]), kind, class_="name")


def _share(seconds: float, total: float) -> Html:
    return tag(
        "td", spell(seconds), tag("span", f"{seconds / (total or 1):.1%}", class_="source"), class_="number"
    )


def _throughput(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """The rate of each run as a number, and its share of the peak."""
    rows = []
    for i, view in enumerate(views):
        found = performance.throughput(view)
        if found is None:
            continue
        rows.append([
            *run_cell(views, names, i),
            number(f"{found.median:,.0f} {found.unit}/s"), number(f"{found.per_gpu:,.0f}"),
            number(f"{found.slowest:,.0f} at step {found.slowest_step:,}"),
            tag("td", performance.utilisation(found), class_="wide"),
            tag("td", facts.layout(view), class_="wide"),
        ])  # fmt: skip
    headings = [*run_heading(views), "median", "per rank", "slowest", "model FLOPs utilisation", "on"]
    hint = "Steps only, without evaluation and checkpoints."
    return (
        join([tag("h3", "Throughput"), table(headings, rows), tag("p", hint, class_="soft")])
        if rows
        else _NOTHING
    )


def _figures(figures: Sequence[Figure]) -> Html:
    """The rates over the steps; other logged performance metrics are collapsed."""
    first = [figure for figure in figures if figure["first"]]
    if not figures:
        return _NOTHING
    shown = tag("div", *places_of(first, "performance"), class_="figures even")
    rest = places_of(figures[len(first) :], "performance", begin=len(first))
    more = [details(f"{len(rest)} more curves", tag("div", *rest, class_="figures even"))] if rest else []
    return join([shown, *more])


def _memory(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """One bar per rank of its memory; with many ranks, only the largest are shown and the rest collapsed."""
    found = {names[i] if len(views) > 1 else "": performance.memory(view) for i, view in enumerate(views)}
    known = {name: memory for name, memory in found.items() if memory is not None}
    if not known:
        return _NOTHING
    kinds = list(dict.fromkeys(kind for memory in known.values() for kind in memory.ranks[0].kinds))
    whole = _full_width(list(known.values()))
    shown: list[Html] = []
    hidden: list[Html] = []
    for name, memory in known.items():
        fullest = sorted(memory.ranks, key=lambda rank: -rank.peak)[:_MOST_RANKS]
        for rank in memory.ranks:
            part = shown if rank in fullest else hidden
            part.append(_rank_bar(rank, memory.capacity, kinds, whole, name))
    key = [tag("span", swatch(i), kind) for i, kind in enumerate(kinds)]
    width = f"The full width is {performance.gib(whole)}{_meaning(known.values(), whole)}."
    rest = [details(f"{len(hidden)} more ranks", tag("div", *hidden, class_="bars"))] if hidden else []
    return join([
        tag("h3", "Memory of each rank, at its peak"), tag("div", *key, class_="key"),
        tag("div", *shown, class_="bars"), *rest,
        tag("p", width, class_="soft"),
    ])  # fmt: skip


def _full_width(known: Sequence[Memory]) -> float:
    """The capacity of the ranks, or what they held if that is a small share of it or it is unknown."""
    peak = max(memory.fullest.peak for memory in known)
    capacity = max(memory.capacity or 0.0 for memory in known)
    return capacity if peak >= _OF_CAPACITY * capacity and capacity else peak or 1.0


def _meaning(known: Iterable[Memory], whole: float) -> str:
    return ", the capacity of a rank" if any(memory.capacity == whole for memory in known) else ""


def _rank_bar(
    rank: RankMemory, capacity: float | None, kinds: Sequence[str], whole: float, name: str
) -> Html:
    parts = [
        (kinds.index(kind), held / whole, f"{kind}: {performance.gib(held)}")
        for kind, held in rank.kinds.items()
        if held
    ]
    of = " · ".join([*([name] if name else []), f"rank {rank.rank}"])
    return _bar(of, parts, performance.of_capacity(rank, capacity))


def _reached(views: Sequence[RunView], names: Sequence[str], found: Descents) -> Html:
    """When each of a few losses was reached, and a field to look up another one."""
    if not found:
        return _NOTHING
    rows = [row for metric, of in found.items() for row in _moments(views, metric, of)]
    choices = [tag("option", metric, value=metric) for metric in found]
    typed = tag("input", type="number", step="any", id="wanted", placeholder="a loss", aria_label="loss")
    asked = tag("td", tag("select", *choices, id="wanted-of", aria_label="which loss"), " ≤ ", typed)
    answers = [tag("td", "", class_="number answer", data_run=str(i)) for i in range(len(views))]
    hint = "The time is that spent in attempts, including start-up."
    hint += " The training loss is the mean of its last 20 points." if "loss" in found else ""
    return join([
        tag("h3", "Time to reach a loss"),
        table(["", *(names if len(views) > 1 else [""])], [[asked, *answers], *rows], class_="narrow"),
        tag("p", hint, class_="soft"),
    ])  # fmt: skip


def _moments(views: Sequence[RunView], metric: str, of: Sequence[Descent | None]) -> list[list[Html]]:
    """One row for each of a few losses, the lowest last."""
    each = list(zip(views, of, strict=True))
    rows = [
        [number(f"{metric} ≤ {facts.number(value)}"), *(_when(view, d, value) for view, d in each)]
        for value in performance.thresholds(of)
    ]
    return [*rows, [number(f"lowest {metric}"), *(_lowest(view, d) for view, d in each)]]


def _when(view: RunView, descent: Descent | None, value: float) -> Html:
    at = descent.reached(value) if descent is not None else None
    if descent is None or at is None:
        return tag("td", tag("span", "not reached", class_="soft"), class_="number")
    return tag("td", *_moment(view, descent, at), class_="number")


def _lowest(view: RunView, descent: Descent | None) -> Html:
    if descent is None:
        return number("")
    last = len(descent.steps) - 1
    lowest = tag("b", facts.number(float(descent.values[last])))
    return tag("td", lowest, " after ", *_moment(view, descent, last), class_="number")


def _moment(view: RunView, descent: Descent, index: int) -> list[str]:
    step = int(descent.steps[index])
    tokens = f", {short(step * view.tokens_per_step)} tokens" if view.tokens_per_step else ""
    return [spell(float(descent.seconds[index])), tag("span", f"step {step:,}{tokens}", class_="source")]


def _scaling(result: Mapping[str, Any]) -> Html:
    return join([tag("h3", f"How {result['recipe']} scales"), scaling.section(result)])


def _bar(name: str, parts: Iterable[tuple[int, float, str]], said: str) -> Html:
    """A bar of coloured parts: each has a colour, its share of the full width, and a title."""
    drawn = [
        tag("i", class_=f"swatch-{color % 8}", style=f"width: {share:.4%}", title=title)
        for color, share, title in parts
    ]
    return join([
        tag("span", name, class_="of"), tag("div", *drawn, class_="bar"), tag("span", said, class_="said"),
    ])  # fmt: skip
