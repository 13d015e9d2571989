"""The report of a search: one HTML file that opens offline, with Optuna's plots of the study."""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.errors import BadInput
from stoker.report import facts, html, sweep_curves
from stoker.report.markup import Html, join, number, table, tag
from stoker.report.sections import section
from stoker.report.sweep_curves import points_of
from stoker.run.series import pareto_front
from stoker.words import counted

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_STATES = {
    "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running or paused",
    "WAITING": "waiting",
}  # fmt: skip
_MOST_ERRORS = 20
_EARLIER = "earlier"  # the attribute of trials from another search that the sampler learnt from
_NEWEST = "newest"  # the attribute with the newest values of a trial, if there are several objectives
_UNITS = {"percent": "% of the data"}
_DRAWABLE = 3  # objectives of a Pareto front


def write(study: Study, record: Mapping[str, Any], name: str, output: Path) -> Path:
    """Write the report of a search to a file atomically; returns the file.

    Args:
        study: the Optuna study.
        record: the settings of the search, from `sweep.json`.
        name: the name of the search.

    Raises BadInput if the file cannot be written, or no trial has started.
    """
    if not study.trials:
        raise BadInput(f"no trial of {name} has started yet")
    return html.save(render(study, record, name), output)


def render(study: Study, record: Mapping[str, Any], name: str) -> str:
    """The whole page as text."""
    drawings: list[Any] = []
    body = [
        _header(study, record, name),
        _best(study, record),
        *_drawn(study, record, drawings),
        _saved(study),
        _lineage(study),
        _trials(study, record),
        _errors(study),
    ]
    return html.document(name, body, {**html.NOTHING_DRAWN, "drawings": drawings})


def _header(study: Study, record: Mapping[str, Any], name: str) -> Html:
    counts: dict[str, int] = {}
    for trial in _own(study):
        counts[_STATES[trial.state.name]] = counts.get(_STATES[trial.state.name], 0) + 1
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    ways = {"min": "smallest", "max": "largest"}
    wanted = " and ".join(f"the {ways[goal]} {metric}" for metric, goal in _objectives(record))
    by = " and ".join(way for way in (record["sampler"], record["scheduler"]) if way != "none")
    about = f"{wanted} of {Path(record['recipe']).name}, with {by}, seed {record['seed']}"
    return tag("header", tag("h1", name), tag("p", said), tag("p", about, class_="soft"))


def _best(study: Study, record: Mapping[str, Any]) -> Html:
    complete = [t for t in _own(study) if t.state.name == "COMPLETE"]
    metrics = [metric for metric, _ in _objectives(record)]
    if len(metrics) > 1 and complete:
        return _front(study, metrics)
    best = _best_of(study, record)
    if best is None:
        return section("Best", tag("p", "No trial has logged the metric yet."))
    values = zip(metrics, _values(best, len(metrics)), strict=True)
    rows = [
        ("trial", _run(best)),
        *((metric, facts.number(value)) for metric, value in values),
        *((key, _as_text(value)) for key, value in best.params.items()),
    ]  # fmt: skip
    return section("Best", table((), ([tag("td", key, class_="name"), number(value)] for key, value in rows)))


def _best_of(study: Study, record: Mapping[str, Any]) -> FrozenTrial | None:
    """The complete trial with the best value; if none is complete, the best of those that got furthest."""
    sign = -1.0 if record["goal"].startswith("max") else 1.0
    reached = [t for t in _own(study) if points_of(t) and t.state.name != "FAIL"]
    furthest = max(map(_reached, reached), default=0)
    complete = [t for t in _own(study) if t.state.name == "COMPLETE"]
    pool = complete or [t for t in reached if _reached(t) >= furthest]
    return min(pool, key=lambda t: sign * (_values(t, 1)[0] or 0.0), default=None)


def _reached(trial: FrozenTrial) -> float:
    """How far a trial was trained, in the unit by which its search compares trials, as a step may be more."""
    return float(trial.user_attrs.get("reached", max(points_of(trial), default=0)))


def _front(study: Study, metrics: Sequence[str]) -> Html:
    """The trials on the Pareto front: no other trial of this search is better in all objectives."""
    signs = [1.0 if direction.name == "MINIMIZE" else -1.0 for direction in study.directions]
    complete = {trial.number: trial for trial in _own(study) if trial.state.name == "COMPLETE"}
    points = {
        number: [sign * value for sign, value in zip(signs, trial.values, strict=True)]
        for number, trial in complete.items()
    }
    front = [complete[number] for number in pareto_front(points)]
    names = sorted({name for trial in front for name in trial.params})
    rows = [
        [_run(trial), *(number(facts.number(v)) for v in trial.values),
         *(number(_as_text(trial.params.get(name))) for name in names)]
        for trial in sorted(front, key=lambda trial: trial.values)
    ]  # fmt: skip
    said = tag("p", "No trial is better than any of these in all metrics.")
    return section("Best", said, table(("trial", *metrics, *names), rows))


def _objectives(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each metric with its goal; early stopping uses the first one."""
    return list(zip(record["metric"].split(", "), record["goal"].split(", "), strict=True))


def _drawn(study: Study, record: Mapping[str, Any], drawings: list[Any]) -> Iterator[Html]:
    """Optuna's plots, as far as there is enough data to draw them."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns about what it cannot draw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = [metric for metric, _ in _objectives(record)]
        drawn = _figures(study, metrics[0]) if len(metrics) == 1 else _figures_of_several(study, metrics)
        for title, draw in itertools.chain(_curves(study, record, metrics), drawn):
            try:
                figure = json.loads(draw().to_json())
            except (ValueError, RuntimeError, ImportError):  # too few trials, or all alike
                continue
            if not any(_points(trace) for trace in figure["data"]):
                continue
            figure["layout"].pop("title", None)  # the section has one
            if title == "Contours":  # one row per key
                figure["layout"]["height"] = max(450, 200 * len({n for t in study.trials for n in t.params}))
            drawings.append(figure)
            place = tag("div", class_="plot drawing", data_of="drawings", data_index=str(len(drawings) - 1))
            yield section(title, place)


def _curves(
    study: Study, record: Mapping[str, Any], metrics: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    best = _best_of(study, record) if len(metrics) == 1 else None
    yield (
        "Learning curves",
        lambda: sweep_curves.figure(
            _own(study), study.user_attrs.get("rungs", ()), best.number if best else None, metrics[0]
        ),
    )


def _figures(study: Study, metric: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    from optuna import visualization as drawn
    from optuna.importance import PedAnovaImportanceEvaluator

    several = len({name for trial in _own(study) for name in trial.params}) > 1
    yield "History", lambda: drawn.plot_optimization_history(study, target_name=metric)
    if several:
        yield (
            "Parameter importance",
            lambda: drawn.plot_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), target_name=metric
            ),
        )
        yield "Parallel coordinates", lambda: drawn.plot_parallel_coordinate(study, target_name=metric)
    yield "Slices", lambda: drawn.plot_slice(study, target_name=metric)
    if several:
        yield "Contours", lambda: drawn.plot_contour(study, target_name=metric)


def _figures_of_several(study: Study, metrics: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The Pareto front, and the other plots for each objective."""
    from optuna import visualization as drawn
    from optuna.importance import PedAnovaImportanceEvaluator

    evaluator = PedAnovaImportanceEvaluator()
    if len(metrics) <= _DRAWABLE:
        yield "Pareto front", lambda: drawn.plot_pareto_front(study, target_names=list(metrics))
    for index, metric in enumerate(metrics):

        def value(trial: FrozenTrial, index: int = index) -> float:
            return float(trial.values[index])

        def lower(trial: FrozenTrial, index: int = index) -> float:
            """PED-ANOVA takes the lowest values of a given target for the best."""
            best = study.directions[index].name == "MINIMIZE"
            return float(trial.values[index]) if best else -float(trial.values[index])

        shown: dict[str, Any] = {"target": value, "target_name": metric}
        yield f"History: {metric}", functools.partial(drawn.plot_optimization_history, study, **shown)
        yield (
            f"Parameter importance: {metric}",
            functools.partial(
                drawn.plot_param_importances, study, evaluator=evaluator, target=lower, target_name=metric
            ),
        )
        yield (
            f"Parallel coordinates: {metric}",
            functools.partial(drawn.plot_parallel_coordinate, study, **shown),
        )
        yield f"Slices: {metric}", functools.partial(drawn.plot_slice, study, **shown)


def _points(trace: Mapping[str, Any]) -> bool:
    return any(trace.get(part) for part in ("x", "y", "z", "dimensions"))


def _saved(study: Study) -> Html:
    """How much the trials trained, and would have trained had none ended early, in the unit of the rungs."""
    spent = [trial.user_attrs.get("spent", {}) for trial in _own(study)]
    unit = next((unit for known in spent for unit in known if unit != "hour"), "step")
    done = [float(known.get(unit, 0.0)) for known in spent]
    early = [t for t in _own(study) if t.state.name == "PRUNED"]
    if not early or any(
        "fork" in trial.user_attrs for trial in study.trials
    ):  # whose ends are others' begins
        return Html("")
    one = study.user_attrs.get("whole") or max(done)
    whole = one * len([n for n in done if n])
    what = f"{sum(done):,.6g} {_UNITS.get(unit, unit + 's')} were trained of {whole:,.6g}"
    less = f"{1 - sum(done) / max(whole, 1):.0%} less"
    return section("Ended early", tag("p", f"{counted(len(early), 'trial')} ended early: {what}, {less}."))


def _lineage(study: Study) -> Html:
    """The trials that members of a population were forked from."""
    forked = [t for t in _own(study) if "fork" in t.user_attrs]
    if not forked:
        return Html("")
    rows = [
        [number(str(t.number)), number(str(t.user_attrs["fork"]["donor"])),
         number(f"{t.user_attrs['fork']['step']:,}"), number(str(t.user_attrs["fork"]["replaces"])),
         _params(t)]
        for t in forked
    ]  # fmt: skip
    return section("Lineage", table(("trial", "continues from", "at step", "replaces", "values"), rows))


def _trials(study: Study, record: Mapping[str, Any]) -> Html:
    names = sorted({name for trial in _own(study) for name in trial.params})
    metrics = [metric for metric, _ in _objectives(record)]
    shared = any("sweep" in trial.user_attrs for trial in study.trials)  # by controllers of several folders
    rows = [
        [number(str(t.number)), *([_run(t)] if shared else []), _STATES[t.state.name],
         number(f"{max(points_of(t), default=0):,.0f}"),
         *(number(facts.number(value)) for value in _values(t, len(metrics))),
         *(number(_as_text(t.params.get(name))) for name in names)]
        for t in _own(study)
    ]  # fmt: skip
    return section(
        "Trials", table(("trial", *(["run"] if shared else []), "state", "steps", *metrics, *names), rows)
    )


def _errors(study: Study) -> Html:
    failed = [t for t in _own(study) if t.user_attrs.get("error")]
    if not failed:
        return Html("")
    shown = (
        join([tag("h3", f"Trial {t.number}"), tag("p", t.user_attrs["error"], class_="error"),
              *([tag("pre", t.user_attrs["trace"])] if t.user_attrs.get("trace") else [])])
        for t in failed[:_MOST_ERRORS]
    )  # fmt: skip
    more = [tag("p", f"and {len(failed) - _MOST_ERRORS} more")] if len(failed) > _MOST_ERRORS else []
    return section("Failures", *shown, *more)


def _own(study: Study) -> list[FrozenTrial]:
    """The trials of this search, without the trials of an earlier search that the sampler learnt from."""
    return [trial for trial in study.trials if _EARLIER not in trial.user_attrs]


def _values(trial: FrozenTrial, count: int) -> list[float | None]:
    """The latest value of each objective, as far as it is known."""
    if trial.values is not None:
        return [*trial.values]
    if _NEWEST in trial.user_attrs:
        return [*trial.user_attrs[_NEWEST]["values"]]
    return [next(reversed(points_of(trial).values()), None), *[None] * (count - 1)]


def _run(trial: FrozenTrial) -> str:
    """The id of a trial's run; in a study that several sweeps share, with the name of its sweep."""
    run = str(trial.user_attrs.get("run", trial.number))
    return f"{trial.user_attrs['sweep']}/{run}" if "sweep" in trial.user_attrs else run


def _params(trial: FrozenTrial) -> str:
    return " ".join(f"{key}={_as_text(value)}" for key, value in trial.params.items())


def _as_text(value: Any) -> str:
    return facts.number(value) if isinstance(value, float) else "" if value is None else str(value)
