"""A training script of the tests: `digits_run.py FIRST LAST [--resume STEP] [--finish] [--until FILE]`.

Logs the steps from FIRST to LAST, and more until FILE is there, with everything that a run can hold, says
"logged", then ends, or goes on for ever until it is killed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from pathlib import Path

import numpy as np
import stoker
from plotly import graph_objects
from stoker.tracking import background


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--resume", type=int)
    parser.add_argument("--finish", action="store_true")
    parser.add_argument("--until", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--samples", type=float, help="seconds between two samples of the machine")
    asked = parser.parse_args()
    if asked.samples is not None:
        background._SYNC_SECONDS = background._SYSTEM_SECONDS = asked.samples
    with stoker.Run(
        os.environ.get("EXPERIMENT", "digits"), "a", config={"lr": 0.1, "layers": [1, 2], "name": "ä=b"}
    ) as run:
        if asked.resume is not None:
            run.attempt.resumed(asked.resume)
        for step in itertools.count(asked.first):
            if step > asked.last and (asked.until is None or asked.until.exists()):
                break
            odd = math.nan if step == 2 else math.inf if step == 3 else float(step)
            run.log(
                {"val": {"accuracy": step / 100}}, step=step, loss=1000 * run.attempt.number + step, odd=odd
            )
            time.sleep(asked.pause)
        if asked.first == 1:
            log_everything(run)
        print("logged", flush=True)
        while not asked.finish:
            time.sleep(1)


def log_everything(run: stoker.Run) -> None:
    run.step = 7
    run.log(answers=0.5, step=7)
    run.params(parameters=1234)
    run.tag(team="blue")
    run.note("a note\n\nof two paragraphs")
    run.note("another")
    run.table("answers", [{"question": "why", "score": 0.5}, {"question": None, "score": 1.0}])
    run.figure("answers", graph_objects.Figure())
    run.image("digit", np.arange(64, dtype=np.uint8).reshape(8, 8), caption="a digit")
    run.text("sample", "once upon a time")
    run.histogram("weights", np.linspace(-1, 1, 100), bins=4)
    Path("weights").mkdir(exist_ok=True)
    (Path("weights") / "deep.bin").write_bytes(b"123")
    run.artifact("weights", kind="model")


if __name__ == "__main__":
    main()
