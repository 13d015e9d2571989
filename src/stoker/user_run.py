"""Run: a run as the code that trains sees it. Everything a user logs goes through here.

    with stoker.Run("digits", config={"lr": 0.1}) as run:
        for step in range(100):
            run.log(loss=...)

What opens, supervises and ends the run is its `Attempt`. No torch is imported here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stoker.attempt import Attempt
from stoker.errors import BadInput
from stoker.reproduce import data, provenance
from stoker.run import artifacts, lineage, media, view
from stoker.run.reduction import How
from stoker.run.series import Goal, Summary
from stoker.run.values import recorded
from stoker.status import FINISHED

log = logging.getLogger("stoker")


class Run:
    """A run that is trained by this process, or by this process and its peers.

    It ends with its `with` block. Without one it ends by `end` and `close`, or with the script.

    If several processes train it (`torchrun`), rank 0 writes the run. The other ranks write the metrics that
    are reduced over ranks, and nothing else.

    Args:
        experiment: the folder of runs that belong together.
        name: the run's id. If the run exists it is continued. By default a new id is made.
        config: a dataclass, or a dict (dotted keys), such as `vars(args)`; kept in `run.json` as JSON,
            without secrets. Paths, dates and dtypes are recorded as strings, sets and arrays as lists.
        runs: the folder that contains the runs, or the URL of one in an object store (`s3://bucket/runs`);
            by default STOKER_RUNS, or else `runs/`.
        sources: where each config value came from.
        recipe: what starts this run again: `name` and `reference`.
        seed: Python, NumPy and, if it is imported, torch are seeded with it, on all ranks alike, and a
            Trainer's order of the data and dropout derive from it. Without one, these derive from 0 and
            nothing is seeded here; `stoker.main` and `stoker train` do that.
        code: the script whose code is recorded, or a folder in its git repository. By default it is the
            script that this process runs, or the working directory if there is none.
        accept_drift: continue a run although its config has changed, and record what changed.
        provenance: a folder that already has the record of what the run is made from, as that of a search
            has for all its trials. By default it is gathered.

    Raises:
        BadInput: the directory cannot be written, another process trains this run, the run to continue has
            another config, several processes have no name to agree on, or a worker process opens it because
            the script lacks `if __name__ == "__main__":`.
    """

    def __init__(
        self,
        experiment: str = "default",
        name: str | None = None,
        *,
        config: Any = None,
        runs: Path | str | None = None,
        sources: Mapping[str, str] | None = None,
        recipe: Mapping[str, Any] | None = None,
        seed: int | None = None,
        code: Path | None = None,
        accept_drift: bool = False,
        provenance: Path | None = None,
    ) -> None:
        self.attempt = Attempt(
            experiment, name, config=config, runs=runs, sources=sources, recipe=recipe, seed=seed or 0,
            code=code, accept_drift=accept_drift, provenance=provenance,
        )  # fmt: skip
        """What opens, supervises and ends the run, for a Trainer and the commands."""
        self.world = self.attempt.world
        """This process's rank, and the number of ranks."""
        self.directory = self.attempt.directory
        """Where the run is kept."""
        self.seed = self.attempt.seed
        self.continued = self.attempt.continued
        """Whether the run existed before this process opened it."""
        self._clipped: set[str] = set()
        """The images of which it was said that their values are clipped."""
        if seed is not None:
            from stoker.engine import random_state

            random_state.seed_everything(seed)

    def __repr__(self) -> str:
        return f"Run({self.directory.experiment!r}, {self.directory.id!r})"

    @property
    def step(self) -> int:
        """The step that values are logged at. A Trainer moves it; without one, `log` does."""
        self.attempt.warns_of_continuing = False  # the code knows where to go on
        return self.attempt.step

    @step.setter
    def step(self, step: int) -> None:
        self.attempt.step = step

    @property
    def latest(self) -> dict[str, float]:
        """The newest value of every metric that this process wrote.

        A metric that is reduced over ranks is included once the ranks have agreed on it, at the latest with
        the next checkpoint.
        """
        return self.attempt.recorder.latest

    @property
    def summary(self) -> dict[str, Summary]:
        """The last, lowest, highest and best value of every metric of the run so far."""
        self.attempt.recorder.write_arrived(wait=True)
        return view.load(self.directory).summary()

    def log(
        self,
        values: Mapping[str, Any] | None = None,
        /,
        *,
        step: int | None = None,
        reduce: How | None = None,
        **metrics: Any,
    ) -> None:
        """Log metrics at a step (by default the current one).

        Takes numbers, one-element arrays, one-element tensors on any device, and nested dicts of these
        (joined by "/"). A tensor on an accelerator is copied in the background and written once it has
        arrived, so the device is never waited for. A metric has one point per step: the first one stands.
        Without a Trainer, every call without `step` moves to the next step, and one with a higher `step`
        moves to that step.

        Args:
            reduce: with several processes, keep the mean, sum, max or min over them. They must log the same
                metrics at the same steps, in any order; none waits for another. By default rank 0's value
                is kept.

        Raises:
            ValueError: a name with control characters or of more than 250 bytes, a tensor with several
                elements, or a step beyond 64 bits.
            TypeError: a value that is not a real number.
        """
        self.attempt.log({**values, **metrics} if values and metrics else values or metrics, step, reduce)

    def params(self, **values: Any) -> None:
        """Record what the config could not know when the run began: values by name, as in a config.

        Raises TypeError for a value that cannot be recorded.
        """
        if values:
            self.attempt.event("params", values=recorded(values, "params"))

    def tag(self, **tags: str | None) -> None:
        """Set tags. A tag that is set again is replaced, and one that is set to None is removed."""
        texts = {key: value if value is None else str(value) for key, value in tags.items()}
        self.attempt.event("tags", tags=texts)

    def note(self, text: str) -> None:
        """Add a note, unless the run has it already: a script that is started again adds it once."""
        self.attempt.note(str(text))

    def goal(self, **goals: Goal) -> None:
        """Say whether metrics are better low or high: `run.goal(score="max", distance="min")`.

        It is known of metrics that are named after their kind, such as a loss or an accuracy.
        """
        for metric, goal in goals.items():
            if goal not in ("min", "max"):
                raise ValueError(f"{metric}={goal!r}: a goal is 'min' or 'max'")
        self.attempt.goals.update(goals)
        self.attempt.event("goals", goals=goals)

    def table(self, name: str, rows: Any, columns: Sequence[str] | None = None) -> None:
        """Log a table at the current step, stored as Parquet.

        Args:
            rows: a list of dicts, a list of rows with `columns`, a dict of columns, or a table of pandas,
                Polars or Arrow.
        """
        self._media("table", name, lambda: media.table(rows, columns))

    def figure(self, name: str, figure: Any) -> None:
        """Log a Matplotlib or Plotly figure at the current step."""
        self._media("figure", name, lambda: media.figure(figure))

    def image(self, name: str, image: Any, caption: str | None = None) -> None:
        """Log an image at the current step: a Pillow image, an array or a tensor.

        Arrays are (height, width), (height, width, channels) or (channels, height, width), of bytes, or of
        floats from 0 to 1. Floats beyond that are clipped, with a warning for each name.
        """
        found = media.beyond(image) if self.world.rank == 0 and name not in self._clipped else None
        if found is not None:
            self._clipped.add(name)
            log.warning(
                "image %r has floats from %.4g to %.4g: what is beyond 0 to 1 is clipped; scale them to "
                "that, or give uint8 from 0 to 255",
                name, *found,
            )  # fmt: skip
        self._media("image", name, lambda: media.image(image, caption))

    def text(self, name: str, text: str) -> None:
        """Log a text at the current step. Raises TypeError for anything but a string."""
        kind: type = type(text)
        if not issubclass(kind, str):
            raise TypeError(f"text {name!r} is of type {kind.__name__}: give a string, such as its str()")
        self._media("text", name, lambda: media.text(text))

    def histogram(self, name: str, values: Any, bins: int = 64) -> None:
        """Log a histogram of an array's or a tensor's values at the current step."""
        about, step = media.histogram(values, bins), self.attempt.step
        self.attempt.held.do(lambda: self.attempt.medium("histogram", name, step, about=about))

    def _media(self, kind: str, name: str, encode: Callable[[], Any]) -> None:
        """Write a file to look at, and its event."""
        if self.world.rank > 0:
            return
        encoded, step = encode(), self.attempt.step

        def write() -> None:
            file = media.write(self.directory, kind, name, step, encoded)
            self.attempt.medium(kind, name, step, file=file, about=encoded.about)

        self.attempt.held.do(write)

    def artifact(self, path: Path | str, name: str | None = None, kind: str = "file") -> Path:
        """Record a file or folder that the run made, with checksums; returns its path in the run.

        A file or folder from outside the run is brought in under its own name or the given one. Equal
        contents are stored once, however many runs have them. It replaces an artifact of the same name.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: the name leads out of the run's artifacts; or what is brought in by it would lie at,
                above or below another artifact or the logged `tables`, `figures`, `images` or `texts`.
        """
        source = Path(path).absolute()
        name = artifacts.checked_name(name or source.name)
        if self.world.rank > 0:
            return source
        if not source.resolve().is_relative_to(self.directory.path.resolve()):
            if self.attempt.held.active and name in self.attempt.recorded:  # it is of when the run was here
                return self.directory.path / str(self.attempt.recorded[name]["path"])
            artifacts.check_free(name, self._taken(name))
            source = artifacts.bring_in(self.directory, source, name)
        files = artifacts.describe(self.directory, source)
        relative = str(source.resolve().relative_to(self.directory.path.resolve()))
        self.attempt.artifact(name, kind, relative, files)
        return source

    def _taken(self, name: str) -> dict[str, str]:
        """What lies where below the run's artifacts, but for the artifact of this name."""
        taken = {folder: f"the {folder} that the run logs" for folder in media.FOLDERS.values()}
        for other, event in self.attempt.recorded.items():
            folder, _, path = str(event["path"]).partition("/")
            if other != name and folder == self.directory.artifacts.name and path:
                taken[path] = f"the artifact {other!r}"
        return taken

    def use(self, artifact: Path | str) -> Path:
        """Record that the run uses an artifact of another run, or any file or folder; returns its path.

        Args:
            artifact: `RUN:NAME` (a run's id or `experiment/id`, and the artifact's name), or a path.

        Raises:
            BadInput: there is no such run, artifact or path.
        """
        found = lineage.resolve(self.directory.runs, artifact)
        if self.world.rank == 0:
            self.attempt.event("used", name=found.name, run=found.maker, files=found.files)
            lineage.tell_maker(found, self.directory, self.directory.record()["uid"])
        return found.path

    def data(
        self, name: str, path: Path | str, *, fingerprint: str = "", revision: str = "", part: str = ""
    ) -> Path:
        """Record that the run reads a dataset, identified by its content; returns its path.

        The file or folder is read to compute its fingerprint, and again only after it has changed. If it is
        larger than 1 GiB, samples of it are read. Warns if the content has changed since the run began.

        Args:
            name: what the run calls it.
            path: a file or folder; or the name of data elsewhere, such as the id of a hub dataset or a URL.
            fingerprint: identifies the content of such data; nothing is read then.
            revision: the commit of a hub dataset.
            part: what of a folder is read, relative to it, if not all of it.

        Raises:
            BadInput: there is nothing at the path, or it cannot be read.
        """
        if self.world.rank > 0:
            return Path(path)
        try:
            about = data.describe(str(path), fingerprint, revision, part)
        except OSError as error:
            raise BadInput(
                f"data {name!r} cannot be read: {error.filename}: {error.strerror}; give a file or a folder, "
                "or the name of data elsewhere with fingerprint= or revision="
            ) from error
        recorded = self.directory.provenance / provenance.DATA
        before = data.record(recorded, name, about, self.attempt.number)
        if before is not None:
            log.warning(
                "data %r has changed since the run began: it was %s and is %s now", name, before,
                data.identity(about),
            )  # fmt: skip
        return Path(path)

    def fingerprint(self, name: str, value: str) -> None:
        """Record the fingerprint of something that the run depends on; warns if it is not the first one.

        The tag `fingerprint.NAME` keeps the first one, `changed.NAME` has the newest other one. Only rank 0
        writes them.
        """
        if self.world.rank > 0:
            return
        tag = f"fingerprint.{name}"
        known = view.load(self.directory).tags.get(tag) if self.continued else None
        if known is None:
            self.tag(**{tag: value})
        elif known != value:
            log.warning("%s has changed since the run began (%s, now %s)", name, known[:12], value[:12])
            self.tag(**{f"changed.{name}": value})

    def watch(self, model: Any, *, every: int = 100, histograms: bool = False, bins: int = 64) -> None:
        """Log the norms of all parameters and gradients every `every` optimizer steps.

        They are written with the next `log`, at its step: `gradients/NAME`, `parameters/NAME`, and
        `gradient_norm` over all gradients. The device is never waited for.
        """
        from stoker.engine.watch import Watch

        attempt = self.attempt
        watch = Watch(
            model, every, bins if histograms else 0, lambda: attempt.begun_at, attempt.recorder.carry
        )
        attempt.watches.append(watch)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.attempt.leave(error)

    def end(self, status: str, error: str | None = None) -> None:
        """End the attempt with a status. Artifacts may still be recorded until `close`.

        With `finished`, a loop that was left with `break` is saved first.

        Raises OSError if it cannot be written. In a forked process it does nothing.
        """
        if status == FINISHED:
            self.attempt.conclude()
        self.attempt.end(status, error)

    def close(self) -> None:
        """Release the run. What is left to be shipped to the sinks is shipped by a process of its own."""
        self.attempt.close()
