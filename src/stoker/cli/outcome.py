"""What is printed when a run has ended."""

from __future__ import annotations

from stoker.cli.output import console, print_json
from stoker.run import finding, mirror
from stoker.run.state import RunView
from stoker.status import FINISHED
from stoker.words import shortest


def show(seen: RunView, json: bool, status: str, *, uploaded: bool = True) -> None:
    """Print how the run ended, where it is, and what to do next.

    Args:
        uploaded: whether its object store, if it has one, has all of it.
    """
    directory_ = seen.directory
    report = directory_.artifacts / "report.html"
    copy = mirror.of(directory_)
    if json:
        print_json({
            "id": directory_.id, "experiment": directory_.experiment, "run": str(directory_.path),
            "store": copy.where if copy is not None else None, "uploaded": uploaded,
            "status": seen.status, "step": seen.step, "metrics": seen.newest(),
            "artifacts": {n: str(directory_.artifacts / n) for n in seen.artifacts},
            "report": str(report) if report.is_file() else None,
        })  # fmt: skip
        return
    lines = [f"\n{directory_.name} {status} at step {seen.step}"]
    said = {metric: f"{value:.6g}" for metric, value in seen.newest().items()}
    said["run"] = shortest(directory_.path)
    if copy is not None:
        said["in the store" if uploaded else "partly in the store"] = copy.where
    if report.is_file():
        said["report"] = shortest(report)
    wide = min(48, max(24, *map(len, said)))
    lines += [f"  {name:{wide}} {value}" for name, value in said.items()]
    at = finding.option(directory_.runs)
    if not uploaded:
        lines.append(f"next: stoker sync {directory_.id}{at}")
    elif seen.status == FINISHED:
        export = f"stoker runs export {directory_.id}{at}"
        lines.append(f"next: stoker runs show {directory_.id}{at}   {export}   stoker ui{at}")
    else:
        lines.append(f"next: stoker resume {directory_.id}{at}   stoker runs show {directory_.id}{at}")
    console().print("\n".join(lines), markup=False, soft_wrap=True)
