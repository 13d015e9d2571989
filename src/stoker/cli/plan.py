"""`stoker plan RECIPE`: what a training step would take of each rank's memory, before anything is rented."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from stoker import config as configs
from stoker import recipes, storage, words
from stoker.cli import train
from stoker.cli.output import Json, console, print_json, show_messages
from stoker.cli.train import ConfigFile, Overrides
from stoker.config import Resolved
from stoker.engine import options
from stoker.errors import EXIT_DIFFERS, BadInput, line_of
from stoker.recipes import Recipe
from stoker.user_run import Run
from stoker.world import PLANNED, PLANNED_RANK

log = logging.getLogger("stoker")

ROOM = 0.9
"""Of a rank's memory, what a step may take: CUDA itself, its libraries and gaps between tensors take some."""

_LEAST = 2**20  # bytes that a GPU has
_MOST_RANKS = 1024

Changes = tuple[str, ...]
"""Values that are given beside a config's own."""


@dataclass(frozen=True)
class Plan:
    """What a step takes of the memory of a rank, in bytes, and of what ranks."""

    parallel: str
    precision: str
    ranks: int
    rank: int
    """The one that takes the most: of a pipeline, the first of a stage."""
    memory: int
    """What each of them has."""
    share: int
    """Samples of a step that are a rank's."""
    micro_batch: int
    peak: int
    moment: str
    """When that is: forward, backward or update."""
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.peak <= ROOM * self.memory


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or a file.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, metavar="N", help="Ranks of a machine.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Machines.")] = 1,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="What a GPU has, as it is sold: 80GB, 24GB.")
    ] = "80GB",
    json: Json = False,
) -> int:
    """Say what a step takes of each GPU's memory, by what it is for, before anything is rented.

    The recipe runs as it is up to its second step, on this machine's CPU, with tensors that have shapes and
    no values: no GPU is needed, no weights are read, and a model of any size is planned in seconds. Where a
    step does not fit, the cheapest change that makes it fit is looked for. Exit code 3: it does not fit.
    """
    show_messages(logging.ERROR)
    warnings.filterwarnings("ignore")  # of tensors without values; what a training warns of it says itself
    has = _bytes(memory)
    found = recipes.load(recipe)
    resolved = configs.resolve(found.config, overrides or (), recipes.config_file(config))
    asked = Asked(found, resolved, nproc, nodes, has)
    with _working() as say:
        say(f"a step of {found.name}")
        made = asked.automatic() if _is_automatic(resolved) else asked.plan()
        advice = None if made.fits else asked.what_fits(made, say)
    if json:
        print_json({
            "recipe": found.name, "config": resolved.values, "nodes": nodes, **dataclasses.asdict(made),
            "fits": made.fits, "advice": advice and {"changes": advice[0], **dataclasses.asdict(advice[1])},
        })  # fmt: skip
    else:
        _show(found.name, made, advice)
    return 0 if made.fits else EXIT_DIFFERS


@dataclass(frozen=True)
class Asked:
    """What is to be planned."""

    recipe: Recipe
    resolved: Resolved[Any]
    nproc: int
    nodes: int
    memory: int

    def plan(self, changes: Changes = (), ranks: int | None = None) -> Plan:
        """Of the config with some changes, on so many ranks. Raises BadInput."""
        if getattr(self.resolved.config, "kernels", "torch") != "torch":
            changes = (*changes, "kernels=torch")  # the others take a GPU
        resolved = configs.changed(self.resolved, changes)
        _check(resolved.config)
        ranks = ranks or self.nproc * self.nodes
        train.check(self.recipe, resolved.config, ranks, ranks)
        made = [self._one(resolved, ranks, rank) for rank in _unlike(resolved.config, ranks)]
        return max(made, key=lambda plan: plan.peak)

    def _one(self, resolved: Resolved[Any], ranks: int, rank: int) -> Plan:
        """What a rank of them takes."""
        from stoker.engine import imagined

        with tempfile.TemporaryDirectory(prefix="stoker-plan-") as folder, _imagined(self, ranks, rank):
            run = Run(
                "plan", "plan", config=resolved.config, runs=Path(folder), sources=resolved.sources,
                recipe={"name": self.recipe.name, "reference": self.recipe.reference},
                seed=int(getattr(resolved.config, "seed", 0)), code=self.recipe.code,
            )  # fmt: skip
            with _explained(self.recipe):
                train.work_on(run, self.recipe, resolved.config, trial=True)
            found = storage.read_json(run.directory.logs / imagined.FILE)
        if not found:
            raise BadInput(f"{self.recipe.name} ended before its second step, and made none to plan")
        return Plan(**found)

    def automatic(self) -> Plan:
        """With the largest micro-batch that fits, where `micro_batch=auto` asks for it."""
        one = self.plan(("micro_batch=1",))
        fitting = self._largest((), one) if one.fits else None
        return fitting[1] if fitting else one

    def what_fits(self, made: Plan, say: Any) -> tuple[Changes, Plan] | None:
        """The cheapest change with which what does not fit would: none changes what a run computes.

        In this order: smaller micro-batches; weights sharded over the ranks that there are; activations
        computed again in the backward pass; more ranks.
        """
        for changes, ranks in self._candidates(made):
            say(", ".join((*changes, *([f"{ranks} ranks"] if ranks != made.ranks else []))))
            try:
                found = self.plan(changes, ranks)
            except BadInput as error:
                log.debug("%s: %s", changes, error)
                continue
            if found.fits and (found.share == 1 or _is_automatic(self.resolved)):
                return _but_micro_batch(changes), found
            if found.fits:
                return self._largest(changes, found, made.micro_batch) or (changes, found)
        return None

    def _candidates(self, made: Plan) -> Iterator[tuple[Changes, int]]:
        config = self.resolved.config
        if not isinstance(config, options.Training):
            return
        smallest = made.micro_batch > 1 or config.micro_batch == "auto"
        small: Changes = ("micro_batch=1",) if smallest else ()
        again: Changes = (
            ("activation_checkpointing=full",) if config.activation_checkpointing != "full" else ()
        )
        sharded: Changes = (
            *(() if made.parallel == "fsdp" else ("parallel=fsdp",)),
            *(("fsdp.shard=null",) if config.fsdp.shard is not None else ()),
        )
        here = sharded if made.ranks > 1 and made.parallel in ("ddp", "fsdp") else ()
        tried = [small, (*small, *here), (*small, *again), (*small, *again, *here)]
        yield from ((changes, made.ranks) for changes in dict.fromkeys(tried) if changes)
        ranks = 2 * made.ranks
        while made.parallel in ("single", "ddp", "fsdp") and ranks <= _MOST_RANKS:
            tried = [(*small, *sharded), (*small, *again, *sharded)]
            yield from ((changes, ranks) for changes in dict.fromkeys(tried))
            ranks *= 2

    def _largest(self, changes: Changes, fits: Plan, given: int | None = None) -> tuple[Changes, Plan] | None:
        """The largest micro-batch that fits, where the smallest does; None where there is no other.

        Args:
            given: the one that there is without a change.
        """
        if fits.micro_batch > 1:
            return None
        plain = _but_micro_batch(changes)
        sizes = [size for size in range(2, fits.share + 1) if fits.share % size == 0]
        best: tuple[Changes, Plan] | None = None
        while sizes:
            middle = sizes[len(sizes) // 2]
            tried = (*((f"micro_batch={middle}",) if middle != given else ()), *plain)
            found = self.plan(tried, fits.ranks)
            if found.fits:
                best, sizes = (tried, found), [size for size in sizes if size > middle]
            else:
                sizes = [size for size in sizes if size < middle]
        return best


def _but_micro_batch(changes: Changes) -> Changes:
    return tuple(change for change in changes if not change.startswith("micro_batch="))


@contextlib.contextmanager
def _explained(recipe: Recipe) -> Iterator[None]:
    """What only values could answer is said in a sentence. Raises BadInput."""
    from stoker.engine import imagined

    try:
        yield
    except Exception as error:
        place = line_of(error) or recipe.name
        # With its frames a loop that was left is over, and what it has entered is left.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, imagined.NEEDS_VALUES):
            error.add_note("(In a plan tensors have no values: every number is one, every mask is true.)")
            raise
        raise BadInput(
            f"tensors have no values in a plan, and {place} asks for some ({error}); "
            "leave it out there: run.world.planned is more than 0 in a plan, and 0 else"
        ) from error


def _is_automatic(resolved: Resolved[Any]) -> bool:
    return getattr(resolved.config, "micro_batch", None) == "auto"


def _check(config: Any) -> None:
    """Raises BadInput for a strategy whose step goes through what cannot be imagined."""
    parallel = config.parallel if isinstance(config, options.Training) else ""
    if parallel == "deepspeed":
        raise BadInput(
            "parallel=deepspeed cannot be planned: DeepSpeed's engine asks tensors for values. parallel=fsdp "
            "shards what ZeRO 3 does, and with fsdp.reshard_after_forward=false what ZeRO 2 does"
        )


def _unlike(config: Any, ranks: int) -> range:
    """Ranks that stand for all others: the first of each stage of a pipeline, else the first."""
    if not isinstance(config, options.Training) or config.parallel != "pipeline":
        return range(1)
    return range(0, ranks, ranks // (config.pipeline.ranks or ranks))


@contextlib.contextmanager
def _imagined(asked: Asked, ranks: int, rank: int) -> Iterator[None]:
    """This process is one of so many ranks, of which the others are not there."""
    from stoker import distributed

    local = min(asked.nproc, ranks)
    place = {
        "RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local),
        PLANNED: str(asked.memory), PLANNED_RANK: str(rank), "STOKER_SINKS": "none",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    try:
        yield
    finally:
        distributed.leave()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _bytes(size: str) -> int:
    """Raises BadInput."""
    count = words.parsed_size(size)
    if count < _LEAST:
        raise BadInput(f"--memory {size}: give what a GPU has, such as 80GB or 24GB")
    return count


@contextlib.contextmanager
def _working() -> Iterator[Any]:
    """What is being planned, on a terminal; gone when it is done."""
    out = Console(stderr=True)
    shown = SpinnerColumn(), TextColumn("planning {task.description}")
    with Progress(*shown, transient=True, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda what: bar.update(task, description=what)


_ROWS = {
    "weights": "weights, averages, buffers", "gradients": "gradients", "optimizer": "optimizer state",
    "gathered": "gathered weights of blocks", "activations": "activations and temporaries",
}  # fmt: skip
_MOMENTS = {"forward": "in the forward pass", "backward": "in the backward pass", "update": "in the update"}


def _show(recipe: str, made: Plan, advice: tuple[Changes, Plan] | None) -> None:
    out = console()
    micro = f"micro_batch={made.micro_batch} of a share of {words.counted(made.share, 'sample')}"
    out.print(f"{recipe}: parallel={made.parallel} precision={made.precision} {micro}")
    ranks = f"{words.counted(made.ranks, 'rank')} with {words.size(made.memory)} each"
    out.print(f"a step of {ranks} holds the most {_MOMENTS[made.moment]}\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for kind, text in _ROWS.items():
        if size := getattr(made, kind):
            table.add_row(f"  {text}", words.size(size))
    table.add_row("  in all", words.size(made.peak))
    out.print(table)
    if made.parallel == "pipeline":
        out.print(f"\nits stage of rank {made.rank} takes the most")
    share = made.peak / made.memory
    if made.fits:
        out.print(f"\nit fits: {share:.0%} of a rank's memory")
        return
    out.print(f"\nit does not fit: {share:.0%} of a rank's memory, where {ROOM:.0%} are there to be taken")
    if advice is None:
        out.print("nothing was found that makes it fit and computes the same")
        return
    changes, then = advice
    more = [f"on {then.ranks} ranks"] if then.ranks != made.ranks else []
    out.print(f"it would with {' '.join((*changes, *more))}: {words.size(then.peak)}")
