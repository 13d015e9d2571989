"""What a search finds for what it spends: TPE beside random values, ASHA beside whole trainings.

python bench/regret.py [--quick] [--seeds N] [--keep DIR] [--report FILE] [--json FILE]

Each search is the real `stoker sweep image` on digits. Regret is the best value found so far less the best of
all searches here. The value is val_loss, in nats: val_accuracy has 181 values on 180 images, and the highest
is soon reached by any search. A training is the same each time, so that its loss depends on its values alone.

A search runs its trials one at a time, so that none of TPE's has to guess what another will come to, and the
same seed gives the same search; as many searches as there are cores run side by side, a thread each. The
random arm is what ASHA is compared with as well: ASHA draws random values from the same seeds, as the paper
does (arXiv:1810.05934), and both are read once they have spent the same epochs. `--keep DIR` keeps the runs,
and the same command goes on with them; without it a search's runs are gone once they are read.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import Row, figure

HERE = Path(__file__).resolve()
SPACE = (
    "lr=log(1e-4, 1)", "momentum=uniform(0, 0.99)", "weight_decay=log(1e-6, 1e-1)",
    "label_smoothing=uniform(0, 0.3)", "warmup=uniform(0, 0.3)", "schedule=[constant, linear, cosine, wsd]",
)  # fmt: skip
BATCH = 64
FIXED = ("image_size=16", f"batch_size={BATCH}", "eval_every=1ep", "workers=0", "precision=fp32")
EPOCH = 1437 / BATCH  # steps
FACTOR = 3  # ASHA's: one in so many goes on to the next rung, which is as many times further
LEAST = (
    3  # epochs: its first rung; after one, which is 23 steps, losses hardly tell yet how trainings will end
)
GUESS = math.log(10)  # nats: what is known before any training
ARMS = ("random", "tpe", "asha")


@dataclass(frozen=True)
class Size:
    """How much is searched."""

    seeds: int
    trials: int
    """Of a search without ASHA."""
    epochs: int
    """Of a whole training."""


WHOLE, QUICK = Size(seeds=20, trials=40, epochs=9), Size(seeds=2, trials=4, epochs=9)


# -- a search ----------------------------------------------------------------------------------


def search(arm: str, seed: int, size: dict[str, int], folder: str | None = None) -> dict[str, list[float]]:
    """Run `stoker sweep`, or go on with it; returns what its study and its runs have, see `read`."""
    wanted = Size(**size)
    runs, name = Path(folder or "runs"), f"{arm}-{seed}"
    subprocess.run(
        [sys.executable, "-m", "stoker", "sweep", "image", *SPACE, *FIXED, f"epochs={wanted.epochs}",
         *_options(arm, wanted), "--metric", "val_loss", "--parallel", "1", "--seed", str(seed),
         "--runs", str(runs), "--name", name],
        stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return read(runs, name)


def _options(arm: str, size: Size) -> list[str]:
    if arm != "asha":
        return ["--sampler", arm, "--trials", str(size.trials)]
    trials = enough(size.trials * size.epochs, size.epochs)
    return ["--sampler", "random", "--trials", str(trials), "--scheduler", "asha", "--factor", str(FACTOR),
            "--least", f"{LEAST}ep", "--most", f"{size.epochs}ep"]  # fmt: skip


def enough(budget: int, epochs: int) -> int:
    """The fewest trials of which ASHA spends a budget of epochs: of all at a rung one in FACTOR goes on."""
    return next(trials for trials in itertools.count(1) if _spent(trials, epochs) >= budget)


def _spent(trials: int, epochs: int) -> int:
    spent, rung = trials * LEAST, LEAST
    while rung < epochs:
        trials //= FACTOR
        spent += trials * (min(rung * FACTOR, epochs) - rung)
        rung *= FACTOR
    return spent


def read(runs: Path, name: str) -> dict[str, list[float]]:
    """The losses of a search: `trials`, at their ends in the order they began; `epochs`, in that of time.

    A trial that failed, or ended early, has none at its end: infinity.
    """
    from stoker.run import finding, view
    from stoker.tune import study

    trials = study.read(runs / name / "study.journal").trials
    points = [view.load(finding.locate(runs, name, trial.user_attrs["run"])).points for trial in trials]
    series = [found["val_loss"] for found in points if "val_loss" in found]
    reported = sorted(pair for one in series for pair in zip(one.time.tolist(), one.y.tolist(), strict=True))
    return {
        "trials": [trial.value if trial.state.name == "COMPLETE" else math.inf for trial in trials],
        "epochs": [value if math.isfinite(value) else math.inf for _, value in reported],
    }


# -- what they come to ----------------------------------------------------------------------------

Curves = dict[str, list[list[float]]]
"""By arm and seed: the regret after each trial, or each epoch."""


@dataclass
class Compared(Row):
    """A row, and what is behind it."""

    seeds: int = 0
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The lower and the upper one over seeds, by arm."""
    difference: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Ours less the other's of the same seed: lower quartile, median, upper quartile."""
    lower_in: int = 0
    """Of how many seeds ours is the lower."""
    higher_in: int = 0
    p: float = 1.0
    """Of Wilcoxon's signed-rank test of the differences, two-sided."""
    regrets: dict[str, list[float]] = field(default_factory=dict)
    """By arm, in the order of seeds."""


def regrets(found: Mapping[str, Sequence[Mapping[str, list[float]]]]) -> tuple[Curves, Curves]:
    """By trials (random, TPE) and by epochs (whole trainings, ASHA), from what `read` returns of each search.

    Those by epochs end where the search that spent the fewest does.
    """
    best = min(value for searches in found.values() for one in searches for value in one["epochs"])
    least = min(len(one["epochs"]) for arm in ("random", "asha") for one in found[arm])
    by_trials = {arm: [_regret(one["trials"], best) for one in found[arm]] for arm in ("random", "tpe")}
    by_epochs = {
        arm: [_regret(one["epochs"][:least], best) for one in found[which]]
        for arm, which in (("whole trainings", "random"), ("asha", "asha"))
    }
    return by_trials, by_epochs


def _regret(values: Sequence[float], best: float) -> list[float]:
    return [known - best for known in itertools.accumulate(values, min, initial=GUESS)][1:]


def compared(curves: Curves, ours: str, other: str, unit: str) -> list[Compared]:
    """A row after a quarter, a half, and all of what is spent; the goal is that of the last."""
    length = len(curves[ours][0])
    rows = [_compared(curves, ours, other, after, unit) for after in (length // 4, length // 2, length)]
    last = rows[-1]
    last.goal, last.met = f"below that of {other}", last.ours < last.peers[other]
    return rows


def _compared(curves: Curves, ours: str, other: str, after: int, unit: str) -> Compared:
    at = {arm: [curve[after - 1] for curve in curves[arm]] for arm in (ours, other)}
    differences = [a - b for a, b in zip(at[ours], at[other], strict=True)]
    spread = {arm: _quartiles(values) for arm, values in at.items()}
    return Compared(
        f"{ours}, regret after {after} {unit}", "nats", spread[ours][1], {other: spread[other][1]},
        seeds=len(differences), quartiles={arm: (low, high) for arm, (low, _, high) in spread.items()},
        difference=_quartiles(differences), lower_in=sum(d < 0 for d in differences),
        higher_in=sum(d > 0 for d in differences), p=_p(differences), regrets=at,
    )  # fmt: skip


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def _p(differences: Sequence[float]) -> float:
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if any(differences) else 1.0


# -- what is said of it ----------------------------------------------------------------------------

HEADINGS = (
    "regret in nats after", "ours, median (quartiles)", "beside it", "difference by seed",
    "seeds lower – higher", "p", "goal", "met",
)  # fmt: skip


def cells(row: Compared) -> list[str]:
    """A row as texts, under HEADINGS."""
    (other, value), (ours, _, after) = next(iter(row.peers.items())), row.measure.partition(", regret after ")
    low, middle, high = row.difference
    return [
        after, f"{ours} {_spread(row.ours, row.quartiles[ours])}",
        f"{other} {_spread(value, row.quartiles[other])}", _spread(middle, (low, high)),
        f"{row.lower_in} – {row.higher_in}", f"{row.p:.2g}", row.goal,
        "" if row.met is None else "yes" if row.met else "no",
    ]  # fmt: skip


def _spread(middle: float, ends: tuple[float, float]) -> str:
    return f"{figure(middle)} ({figure(ends[0])} – {figure(ends[1])})"


def say(rows: Sequence[Compared], file: Path | None) -> None:
    """Print the rows as a Markdown table, with the machine; write them as JSON where asked to."""
    print(f"\n{harness.machine()}; {rows[0].seeds} seeds\n")
    print(f"| {' | '.join(HEADINGS)} |")
    print("|" + "---|" * len(HEADINGS))
    for row in rows:
        print(f"| {' | '.join(cells(row))} |")
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def page(rows: Sequence[Compared], by_trials: Curves, by_epochs: Curves, size: Size) -> str:
    """The rows and the curves as a page that opens offline."""
    from stoker.report import html
    from stoker.report.markup import table, tag
    from stoker.report.sections import section

    about = (
        f"stoker sweep image on digits: {size.seeds} seeds, {size.trials} trials of {size.epochs} epochs, or "
        "as many epochs under ASHA. Regret is the best val_loss so far less the best of all searches here. "
        "Lines are medians over seeds, bands lie between the quartiles."
    )
    figures = {
        "TPE and random values": draw(by_trials, "trials"),
        "ASHA and whole trainings": draw(by_epochs, "epochs spent"),
    }
    places = [
        section(title, tag("div", class_="plot drawing", data_of="drawings", data_index=str(index)))
        for index, title in enumerate(figures)
    ]
    head = tag("header", tag("h1", "Regret"), tag("p", about), tag("p", harness.machine(), class_="soft"))
    body = [head, *places, section("Figures", table(HEADINGS, map(cells, rows)))]
    return html.document("Regret", body, {**html.NOTHING_DRAWN, "drawings": list(figures.values())})


def draw(curves: Curves, unit: str) -> dict[str, Any]:
    """The median over seeds, and a band between the quartiles, of each arm; as Plotly has it."""
    import plotly.graph_objects as plotly

    drawn = plotly.Figure()
    for (arm, regrets_), color in zip(curves.items(), ("120, 120, 120", "37, 99, 235"), strict=True):
        low, middle, high = (each.tolist() for each in np.quantile(regrets_, (0.25, 0.5, 0.75), axis=0))
        spent = list(range(1, len(middle) + 1))
        drawn.add_scatter(
            x=[*spent, *reversed(spent)], y=[*high, *reversed(low)], fill="toself", showlegend=False,
            fillcolor=f"rgba({color}, 0.2)", line_width=0, mode="lines", hoverinfo="skip",
        )  # fmt: skip
        drawn.add_scatter(x=spent, y=middle, name=arm, mode="lines", line_color=f"rgb({color})")
    drawn.update_layout(xaxis_title=unit, yaxis_title="regret (nats)", yaxis_type="log")
    drawing: dict[str, Any] = json.loads(drawn.to_json())
    return drawing


# -- all of them ------------------------------------------------------------------------------------


def table(run: Callable[..., Any], size: Size, report: Path | None = None) -> list[Compared]:
    """Search with every arm and seed, as many at a time as there are cores."""
    wanted = [(arm, seed) for arm in ARMS for seed in range(size.seeds)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda one: run("search", arm=one[0], seed=one[1], size=asdict(size)), wanted))
    found = {arm: [one for (which, _), one in zip(wanted, done, strict=True) if which == arm] for arm in ARMS}
    by_trials, by_epochs = regrets(found)
    rows = [
        *compared(by_trials, "tpe", "random", "trials"),
        *compared(by_epochs, "asha", "whole trainings", "epochs"),
    ]
    if report is not None:
        report.write_text(page(rows, by_trials, by_epochs, size), encoding="utf-8")
    return rows


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many searches of each kind; 20")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs; the same again goes on")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write curves and figures as a page")
    asked = parser.parse_args()
    size = QUICK if asked.quick else WHOLE
    size = replace(size, seeds=asked.seeds or size.seeds)
    keep = {} if asked.keep is None else {"folder": str(asked.keep.absolute())}

    def run(what: str, **options: Any) -> Any:
        print(what, options, file=sys.stderr)
        return harness.measure(HERE, what, **options, **keep)

    say(table(run, size, asked.report), asked.json)


MEASURES = {"search": search}

if __name__ == "__main__":
    if not harness.answer_measure(MEASURES):
        main()
