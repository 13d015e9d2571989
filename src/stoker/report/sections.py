"""The sections of a report page, each a function of the runs and their names.

A section without content is empty. Times are in UTC, because a report is read in other time zones.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import stoker
from stoker import words
from stoker.progress import clock
from stoker.report import commands, facts, performance
from stoker.report.facts import Value
from stoker.report.markup import Html, details, join, number, swatch, table, tag
from stoker.report.plots import Figure
from stoker.run.series import Summary
from stoker.run.state import Media, RunView
from stoker.words import counted

_TILES = 7
_MANY_FIGURES = 8  # from this many on, the page offers a search by name
_MOST_ROWS = 500  # of a logged table, and of all its earlier versions together
_MOST_DAMAGE = 200
_NOTHING = Html("")


def header(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """What the page is about: one run with its key numbers, or a table of several runs."""
    if len(views) > 1:
        experiments = ", ".join(dict.fromkeys(view.directory.experiment for view in views))
        title = tag("h1", f"{len(views)} runs of {experiments}")
        return join([tag("header", title, _damage_hint(views)), _overview(views, names)])
    view = views[0]
    title = tag("div", tag("h1", names[0]), _status(view), class_="title")
    made = [f"{view.recipe_name} recipe"] if view.recipe_name else []
    about = " · ".join([*made, f"started {when(view.started)}", *_hosts(view), facts.code(view)])
    hints = _error(view), _left_out(view), _damage_hint(views)
    return join([
        tag("header", title, tag("p", about, class_="soft"), *hints),
        tag("div", *_tiles(view), class_="tiles"),
    ])  # fmt: skip


def curves(figures: Sequence[Figure], views: Sequence[RunView], names: Sequence[str]) -> Html:
    """A placeholder for every figure, which the page's script draws, and the controls for all of them."""
    if not figures:
        return _NOTHING
    hint = "Drag to zoom in, double-click to zoom out."
    if any(figure["marks"] for figure in figures):
        hint += " Dotted vertical lines: an attempt resumed from a checkpoint there"
        hint += " (↻), or a batch was left out (✕)." if any(view.left_out for view in views) else "."
    if any(curve["bad"] for figure in figures for curve in figure["curves"]):
        hint += " Crosses and triangles at the edge: a value is NaN or infinite."
    key = [tag("span", swatch(i), name) for i, name in enumerate(names)] if len(names) > 1 else []
    known = all(view.samples_per_step is not None for view in views if view.points)
    bar = [
        *([tag("div", *key, class_="key")] if key else []),
        *_controls(known, search=len(figures) > _MANY_FIGURES),
    ]
    return section(
        "Curves",
        tag("div", *bar, class_="controls"),
        tag("div", *places_of(figures, "curves"), class_="figures"),
        tag("p", hint, class_="soft"),
    )


def machine(figures: Sequence[Figure]) -> Html:
    """What the machines did over time; collapsed."""
    if not figures:
        return _NOTHING
    places = tag("div", *places_of(figures, "machine"), class_="figures")
    return section("Machine", details(f"{len(figures)} machine curves", places))


def histograms(found: Sequence[dict[str, Any]], names: Sequence[str]) -> Html:
    """A placeholder for every histogram, with a slider over its steps."""
    places = [
        tag(
            "div",
            tag("header", tag("h3", shown["title"], tag("span", _about_histogram(shown, names)))),
            *_histogram_slider(shown),
            tag("div", class_="plot", data_of="histograms", data_index=str(i)),
            class_="figure",
        )
        for i, shown in enumerate(found)
    ]
    return section("Histograms", tag("div", *places, class_="figures even")) if places else _NOTHING


def metrics(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """The latest and the best value of every metric."""
    headings = [
        "metric",
        *run_heading(views),
        "last",
        "at step",
        "best",
        "at step",
        "lowest",
        "highest",
        "points",
    ]
    found = [(name, i, known) for i, view in enumerate(views) for name, known in facts.metrics(view).items()]
    rows = [
        [tag("td", name, class_="name"), *run_cell(views, names, i), *_numbers(summary)]
        for name, i, summary in sorted(found, key=lambda entry: (_importance(entry[0]), entry[1]))
    ]
    return section("Metrics", table(headings, rows)) if rows else _NOTHING


def tables(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """The logged tables: the latest of each name, with the earlier ones collapsed."""
    parts: list[Html] = []
    for view, name in zip(views, names, strict=True):
        for title, logged in facts.tables(view).items():
            if title == performance.MEMORY and performance.memory(view) is not None:
                continue  # it is drawn under Performance
            of_run = f"{name} · " if len(views) > 1 else ""
            parts.append(tag("h3", f"{of_run}{title} at step {logged[-1].step:,}"))
            parts.append(_logged(view, logged[-1:], with_step=False))
            if len(logged) > 1:
                earlier = _logged(view, logged[-2::-1], with_step=True)
                parts.append(details(f"{len(logged) - 1} earlier", earlier))
    return section("Tables", *parts) if parts else _NOTHING


def config(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """The configs side by side with the source of each value; values that differ or were set come first."""
    found = [{value.key: value for value in facts.config(view)} for view in views]
    keys = dict.fromkeys(key for values in found for key in values)
    if not keys:
        return _NOTHING
    several = len(views) > 1
    marked = {
        key
        for key in keys
        if (several and len({_shown(values.get(key)) for values in found}) > 1)
        or (not several and not found[0][key].is_default)
    }
    rows = [
        tag("tr", tag("td", key, class_="name"), *(_config_cell(values.get(key)) for values in found),
            class_="marked" if key in marked else "")
        for key in sorted(keys, key=lambda key: key not in marked)
    ]  # fmt: skip
    headings = [tag("th", heading) for heading in ("key", *(names if several else ["value"]))]
    hint = "Highlighted: differs between the runs." if several else "Highlighted: not the default."
    whole = tag("table", tag("thead", tag("tr", *headings)), tag("tbody", *rows))
    return section("Config", tag("p", hint, class_="soft"), tag("div", whole, class_="scroll"))


def attempts(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """Every attempt: when, where, from which step, and how it ended."""
    headings = [*run_heading(views), "attempt", "started", "host", "from step", "time", "ended", "notes"]
    rows = [
        [
            *run_cell(views, names, i),
            number(str(attempt.number)),
            number(when(attempt.started)),
            number(facts.where(attempt)),
            number("" if attempt.resumed_from is None else f"{attempt.resumed_from:,}"),
            number(clock(attempt.seconds)),
            number(view.status if attempt is view.attempts[-1] else attempt.status),
            tag("td", "\n".join(facts.attempt_notes(view, attempt)), class_="notes"),
        ]
        for i, view in enumerate(views)
        for attempt in view.attempts
    ]
    return section("Attempts", table(headings, rows)) if rows else _NOTHING


def said(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """Params, tags and notes of the runs."""
    parts: list[Html] = []
    for title, found in (("param", [v.params for v in views]), ("tag", [v.tags for v in views])):
        keys = sorted({key for values in found for key in values})
        rows = [
            [tag("td", key, class_="name"),
             *(tag("td", tag("code", facts.text(values[key]) if key in values else "")) for values in found)]
            for key in keys
        ]  # fmt: skip
        headings = [title, *(names if len(views) > 1 else ["value"])]
        parts += [table(headings, rows)] if rows else []
    notes = [
        [*run_cell(views, names, i), number(when(at)), tag("td", text, class_="notes")]
        for i, view in enumerate(views)
        for at, text in view.notes
    ]
    parts += [table([*run_heading(views), "written", "note"], notes)] if notes else []
    return section("Params, tags and notes", *parts) if parts else _NOTHING


def artifacts(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """The artifacts of the runs, with checksums, and the runs that made or use them."""
    headings = [*run_heading(views), "artifact", "kind", "where", "files", "size", "SHA-256", "used by"]
    rows = [
        [*run_cell(views, names, i), tag("td", a.name, class_="name"), a.kind,
         tag("td", tag("code", a.path)), number(str(a.files)), number(words.size(a.bytes)),
         tag("td", _sums(a.sums)), tag("td", ", ".join(_users(view, a.name)))]
        for i, view in enumerate(views)
        for a in facts.artifacts(view)
    ]  # fmt: skip
    used = [
        [*run_cell(views, names, i), tag("td", use.name, class_="name"), _run_name(use.run),
         number(str(len(use.files))), number(words.size(sum(f.get("size", 0) for f in use.files))),
         tag("td", _sums({f.get("path", ""): f.get("sha256", "") for f in use.files}))]
        for i, view in enumerate(views)
        for use in view.used.values()
    ]  # fmt: skip
    parts = [table(headings, rows)] if rows else []
    if used:
        parts.append(tag("h3", "Used" if len(views) > 1 else "Used by this run"))
        parts.append(table([*run_heading(views), "artifact", "made by", "files", "size", "SHA-256"], used))
    return section("Artifacts", *parts) if parts else _NOTHING


def damage(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """The journal lines that could not be read."""
    found = [(i, damaged) for i, view in enumerate(views) for damaged in view.damage]
    rows = [
        [*run_cell(views, names, i), tag("td", tag("code", damaged.file)), number(f"{damaged.line:,}"),
         tag("td", damaged.reason, class_="notes")]
        for i, damaged in found[:_MOST_DAMAGE]
    ]  # fmt: skip
    hint = _damaged(len(found)) + " Everything else on this page comes from the other lines."
    hint += f" These are the first {_MOST_DAMAGE}." if len(found) > _MOST_DAMAGE else ""
    shown = table([*run_heading(views), "file", "line", "what is wrong"], rows)
    return section("Damage", tag("p", hint, class_="error"), shown) if rows else _NOTHING


def provenance(views: Sequence[RunView], names: Sequence[str]) -> Html:
    """What each run was made from: command, code, machine, packages."""
    parts: list[Html] = []
    for view, name in zip(views, names, strict=True):
        found = facts.provenance(view.directory)
        parts += [tag("h3", name)] if len(views) > 1 else []
        typed = "\n".join(commands.of(view))
        parts += [tag("pre", typed, class_="command")] if typed else []
        parts.append(table((), _provenance_rows(view, found)))
        parts += [details("Uncommitted changes", tag("pre", found.diff))] if found.diff else []
        packages = found.packages.strip()
        if packages:
            count = sum(not line.startswith("--") for line in packages.splitlines()[1:])
            parts.append(details(f"{count} installed packages", tag("pre", packages)))
    return section("Provenance", *parts)


ALL = (tables, config, said, attempts, artifacts)
"""The sections that are functions of the runs alone, from the top."""


def footer(views: Sequence[RunView]) -> Html:
    """What generated the page, and from which runs."""
    where = ", ".join(str(view.directory.path) for view in views)
    return tag("footer", f"stoker {stoker.__version__} · {where}")


def when(seconds: float) -> str:
    """Seconds since 1970 as `2026-11-23 05:12 UTC`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def section(title: str, *children: str) -> Html:
    """A section of the page under a heading."""
    return tag("section", tag("h2", title), *children)


def _overview(views: Sequence[RunView], names: Sequence[str]) -> Html:
    found = [facts.metrics(view) for view in views]
    common = sorted({name for metrics in found for name in metrics}, key=_importance)[:4]
    headings = ["run", "status", "step", "time", "started", *common]
    rows = [
        [_named(names[i], i), tag("td", _status(view)), number(_steps(view)), number(clock(view.seconds)),
         number(when(view.started)), *(number(_last(found[i].get(metric))) for metric in common)]
        for i, view in enumerate(views)
    ]  # fmt: skip
    return table(headings, rows)


def _tiles(view: RunView) -> list[Html]:
    count = len(view.attempts)
    spent = f"in {count} attempts" if count > 1 else "spent"
    tiles = [_tile(_steps(view), "steps"), _tile(clock(view.seconds), spent)]
    found = facts.metrics(view)
    for name in sorted(found, key=_importance)[: _TILES - 2]:
        metric = found[name]
        is_best = metric.best is None or metric.best_step == metric.last_step or metric.points == 1
        best = "" if is_best else f", best {facts.number(metric.best)}"
        tiles.append(_tile(facts.number(metric.last), f"{name}{best}"))
    return tiles


def _tile(value: str, name: str) -> Html:
    return tag("div", tag("b", value), tag("span", name), class_="tile")


def _importance(metric: str) -> tuple[bool, bool, int, str]:
    ranked = ("test", "val", "per_second")
    rank = next((i for i, word in enumerate(ranked) if word in metric), len(ranked))
    if metric.startswith("seconds_"):  # of waiting, evaluating and such, which Performance tells better
        rank = len(ranked) + 1
    return metric != "loss", metric != "val_loss", rank, metric


def _status(view: RunView) -> Html:
    return tag("span", view.status, class_=f"status {view.status}")


def _error(view: RunView) -> Html:
    error = view.attempts[-1].error if view.attempts else None
    return tag("p", error, class_="error") if error else _NOTHING


def _left_out(view: RunView) -> Html:
    found = facts.left_out(view)
    return tag("p", f"Left out: {found}.", class_="soft") if found else _NOTHING


def _damage_hint(views: Sequence[RunView]) -> Html:
    count = sum(len(view.damage) for view in views)
    return tag("p", f"{_damaged(count)} See Damage, below.", class_="error") if count else _NOTHING


def _hosts(view: RunView) -> list[str]:
    return list(dict.fromkeys(attempt.host for attempt in view.attempts if attempt.host))


def _steps(view: RunView) -> str:
    return f"{view.step:,}" if view.total_steps is None else f"{view.step:,} / {view.total_steps:,}"


def _last(metric: Summary | None) -> str:
    return facts.number(metric.last) if metric else ""


def _numbers(metric: Summary) -> list[Html]:
    points = f"{metric.points:,}"
    if metric.non_finite:
        points += f", {metric.non_finite:,} not finite"
    best_step = "" if metric.best_step is None else f"{metric.best_step:,}"
    extremes = facts.number(metric.min), facts.number(metric.max)
    last = facts.number(metric.last), f"{metric.last_step:,}"
    return [number(value) for value in (*last, facts.number(metric.best), best_step, *extremes, points)]


def _controls(samples: bool, *, search: bool) -> list[Html]:
    """The controls for all curves: smoothing, the x axis, and a search for figures."""
    choices = ["step", *(["samples"] if samples else []), "time"]
    options = [tag("option", choice, value=choice) for choice in choices]
    slider = tag("input", type="range", id="smoothing", min="0", max="0.99", step="0.01", value="0")
    name = tag("input", type="search", id="search", placeholder="part of a name")
    return [
        tag("label", "Smoothing", slider, tag("output", "0")),
        tag("label", "Over", tag("select", *options, id="axis")),
        *([tag("label", "Find", name)] if search else []),
    ]


def places_of(figures: Sequence[Figure], of: str, begin: int = 0) -> list[Html]:
    """Placeholders in which the page's script draws the figures of `data[of]` from `begin` on."""
    return [
        tag(
            "div",
            tag("header", tag("h3", figure["title"], tag("span", figure["note"])), _log_switch()),
            tag("div", class_="plot", data_of=of, data_index=str(i)),
            class_="figure",
        )
        for i, figure in enumerate(figures, begin)
    ]


def _about_histogram(shown: dict[str, Any], names: Sequence[str]) -> str:
    parts = [names[shown["run"]]] if len(names) > 1 else []
    kept = len(shown["steps"])
    parts += [f"{kept} of {shown['all']} steps"] if kept < shown["all"] else []
    return " · ".join(parts)


def _histogram_slider(shown: dict[str, Any]) -> list[Html]:
    last = str(len(shown["steps"]) - 1)
    if last == "0":
        return []
    slider = tag("input", type="range", min="0", max=last, value=last, step="1", aria_label="step")
    return [tag("label", tag("output", f"step {shown['steps'][-1]['step']:,}"), slider, class_="steps")]


def _sums(sums: dict[str, str]) -> Html:
    """A checksum, or the checksums of many files, collapsed."""
    if len(sums) == 1:
        return tag("code", next(iter(sums.values())), class_="sum")
    listed = "\n".join(f"{value}  {path}" for path, value in sums.items())
    return details(f"{len(sums)} files", tag("pre", listed)) if sums else _NOTHING


def _users(view: RunView, artifact: str) -> list[str]:
    return list(dict.fromkeys(_run_name(u["run"]) for u in view.used_by if u["name"] == artifact))


def _run_name(run: dict[str, Any] | None) -> str:
    return f"{run.get('experiment', '?')}/{run.get('id', '?')}" if run else "not made by a run"


def _damaged(count: int) -> str:
    return f"{counted(count, 'line')} of the journal could not be read."


def _log_switch() -> Html:
    return tag("label", tag("input", type="checkbox", class_="log"), "log scale")


def run_heading(views: Sequence[RunView]) -> list[str]:
    """The heading of `run_cell`."""
    return ["run"] if len(views) > 1 else []


def run_cell(views: Sequence[RunView], names: Sequence[str], index: int) -> list[Html]:
    """Which run a row belongs to, if there are several."""
    return [_named(names[index], index)] if len(views) > 1 else []


def _named(name: str, index: int) -> Html:
    return tag("td", swatch(index), name, class_="name")


def _shown(value: Value | None) -> str:
    return "" if value is None else facts.text(value.value)


def _config_cell(value: Value | None) -> Html:
    if value is None:
        return tag("td", tag("span", "missing", class_="source"), class_="value")
    source = "" if value.is_default else value.source
    return tag("td", tag("code", _shown(value)), " ", tag("span", source, class_="source"), class_="value")


def _logged(view: RunView, logged: Sequence[Media], with_step: bool) -> Html:
    """The rows of tables in the given order, up to the limit of a page."""
    columns: list[str] = []
    shown: list[list[str]] = []
    more = 0
    for media in logged:
        found, rows = facts.table_rows(view, media) if len(shown) < _MOST_ROWS else (columns, [])
        columns = columns or found
        cut = rows[: _MOST_ROWS - len(shown)]
        recorded = media.about.get("rows")
        more += max(len(rows), recorded if isinstance(recorded, int) else 0) - len(cut)
        step = [number(f"{media.step:,}")] if with_step else []
        shown += [[*step, *(facts.text(cell) for cell in row)] for row in cut]
    rest = [tag("p", f"{more:,} more rows are not shown here.", class_="soft")] if more else []
    return join([table([*(["step"] if with_step else []), *columns], shown, class_="texts"), *rest])


def _provenance_rows(view: RunView, found: facts.Provenance) -> list[list[str]]:
    machine = {key: value for key, value in found.environment.items() if not isinstance(value, dict)}
    named = {
        "seed": view.record.get("seed"),
        "working directory": view.record.get("cwd"),
        "layout": facts.layout(view),
        "code": facts.code(view),
        "remote": found.code.get("remote"),
        "code left out": [f"{left['path']} ({left['why']})" for left in found.code.get("left_out", ())],
        **{key.replace("_", " "): value for key, value in machine.items() if key != "memory_bytes"},
        "memory": words.size(machine["memory_bytes"]) if "memory_bytes" in machine else None,
        **{f"data: {name}": _data(about) for name, about in found.data.items()},
    }
    shown = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in named.items()}
    return [
        [tag("td", key, class_="name"), facts.text(value)]
        for key, value in shown.items()
        if value not in (None, "")
    ]


def _data(about: dict[str, Any]) -> str:
    """A dataset in words: its path, its size and its fingerprint."""
    size = f", {counted(about['files'], 'file')}, {words.size(about['bytes'])}" if about.get("bytes") else ""
    return f"{about.get('path')}{size}, {about.get('fingerprint')}"
