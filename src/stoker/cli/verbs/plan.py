"""`stoker plan RECIPE`: the memory that a training step needs on each rank, without a GPU."""

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
from stoker.cli import training
from stoker.cli.options import ConfigFile, Overrides
from stoker.cli.output import Json, console, print_json, show_messages
from stoker.config import Resolved
from stoker.engine.settings import Training
from stoker.errors import EXIT_DIFFERS, BadInput, line_of
from stoker.recipes import Recipe
from stoker.user_run import Run
from stoker.world import PLANNED, PLANNED_RANK

log = logging.getLogger("stoker")

ROOM = 0.9
"""Share of a rank's memory that a step may use; CUDA, its libraries and fragmentation take the rest."""

_LEAST = 2**20  # bytes; the smallest --memory
_MOST_RANKS = 1024

Changes = tuple[str, ...]
"""Overrides of a config's values."""


@dataclass(frozen=True)
class Plan:
    """The memory in bytes that a step needs on one rank, and how the step was planned."""

    parallel: str
    precision: str
    ranks: int
    rank: int
    """The rank that needs the most memory; in a pipeline, the first rank of its stage."""
    memory: int
    """The memory of each rank."""
    share: int
    """Samples per rank and step."""
    micro_batch: int
    peak: int
    moment: str
    """When the peak is reached: forward, backward or update."""
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory."""
        return self.peak <= ROOM * self.memory


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or a recipe file.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, metavar="N", help="Ranks per machine.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Number of machines.")] = 1,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="Memory of each GPU, as advertised: 80GB, 24GB.")
    ] = "80GB",
    json: Json = False,
) -> int:
    """Show the memory that a step needs on each GPU, by purpose. No GPU is needed.

    The recipe runs unchanged up to its second step, on this machine's CPU, with tensors that have shapes but
    no values: no weights are read. A model of 7 billion parameters is planned in less than a minute, one of
    70 billion in about two. If a step does not fit, the cheapest change that makes it fit is searched for.
    Exit code 3: it does not fit.
    """
    show_messages(logging.ERROR)
    warnings.filterwarnings("ignore")  # they are about tensors without values; a training shows its own
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
    """A request for a plan."""

    recipe: Recipe
    resolved: Resolved[Any]
    nproc: int
    nodes: int
    memory: int

    def plan(self, changes: Changes = (), ranks: int | None = None) -> Plan:
        """Plan the config with `changes` on `ranks` ranks; default: all. Raises BadInput."""
        if getattr(self.resolved.config, "kernels", "torch") != "torch":
            changes = (*changes, "kernels=torch")  # other kernels need a GPU
        resolved = configs.changed(self.resolved, changes)
        _check(resolved.config)
        ranks = ranks or self.nproc * self.nodes
        training.check(self.recipe, resolved.config, ranks, ranks)
        made = [self._one(resolved, ranks, rank) for rank in _unlike(resolved.config, ranks)]
        return max(made, key=lambda plan: plan.peak)

    def _one(self, resolved: Resolved[Any], ranks: int, rank: int) -> Plan:
        """Plan the step of one rank."""
        from stoker.engine import imagined

        with tempfile.TemporaryDirectory(prefix="stoker-plan-") as folder, _imagined(self, ranks, rank):
            run = Run(
                "plan", "plan", config=resolved.config, runs=Path(folder), sources=resolved.sources,
                recipe={"name": self.recipe.name, "reference": self.recipe.reference},
                seed=int(getattr(resolved.config, "seed", 0)), code=self.recipe.code,
            )  # fmt: skip
            with _explained(self.recipe):
                training.work_on(run, self.recipe, resolved.config, trial=True)
            found = storage.read_json(run.directory.logs / imagined.FILE)
        if not found:
            raise BadInput(
                f"{self.recipe.name} ended before its second step, which the plan needs: make its run longer"
            )
        return Plan(**found)

    def automatic(self) -> Plan:
        """Plan `micro_batch=auto`: the largest micro-batch that fits."""
        one = self.plan(("micro_batch=1",))
        fitting = self._largest((), one) if one.fits else None
        return fitting[1] if fitting else one

    def what_fits(self, made: Plan, say: Any) -> tuple[Changes, Plan] | None:
        """The cheapest change that makes the step fit; no change alters what a run computes.

        Tried in this order: smaller micro-batches; weights sharded over the existing ranks; activations
        recomputed in the backward pass; more ranks.
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
        if not isinstance(config, Training):
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
        """The largest micro-batch that fits, if micro_batch=1 does; None if no larger one fits.

        Args:
            given: the micro-batch of the config itself, which needs no change.
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
    """Turn the error of code that needs tensor values into a message. Raises BadInput."""
    from stoker.engine import imagined

    try:
        yield
    except Exception as error:
        place = line_of(error) or recipe.name
        # Clearing the frames ends an abandoned loop, which exits the contexts that it entered.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, imagined.NEEDS_VALUES):
            error.add_note("(In a plan, tensors have no values: every number is one, every mask is true.)")
            raise
        raise BadInput(
            f"tensors have no values in a plan, but {place} needs some ({error}); "
            "skip that code in a plan, where run.world.planned is more than 0 (otherwise it is 0)"
        ) from error


def _is_automatic(resolved: Resolved[Any]) -> bool:
    return getattr(resolved.config, "micro_batch", None) == "auto"


def _check(config: Any) -> None:
    """Raises BadInput for a strategy that cannot run without tensor values."""
    parallel = config.parallel if isinstance(config, Training) else ""
    if parallel == "deepspeed":
        raise BadInput(
            "parallel=deepspeed cannot be planned: DeepSpeed's engine needs tensor values. Plan with "
            "parallel=fsdp, which shards what ZeRO 3 does, or "
            "with fsdp.reshard_after_forward=false what ZeRO 2 does"
        )


def _unlike(config: Any, ranks: int) -> range:
    """Ranks that represent all others: the first of each pipeline stage, otherwise rank 0."""
    if not isinstance(config, Training) or config.parallel != "pipeline":
        return range(1)
    return range(0, ranks, ranks // (config.pipeline.ranks or ranks))


@contextlib.contextmanager
def _imagined(asked: Asked, ranks: int, rank: int) -> Iterator[None]:
    """Make this process one of `ranks` ranks, without the others."""
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
    """A size in bytes. Raises BadInput."""
    count = words.parsed_size(size)
    if count < _LEAST:
        raise BadInput(f"--memory {size}: give the memory of a GPU, such as 80GB or 24GB")
    return count


@contextlib.contextmanager
def _working() -> Iterator[Any]:
    """Show what is being planned, on a terminal, until it is done."""
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
    table.add_row("  total", words.size(made.peak))
    out.print(table)
    if made.parallel == "pipeline":
        out.print(f"\nthe stage of rank {made.rank} needs the most")
    share = made.peak / made.memory
    if made.fits:
        out.print(f"\nit fits: {share:.0%} of a rank's memory")
        return
    out.print(f"\nit does not fit: {share:.0%} of a rank's memory, of which {ROOM:.0%} can be used")
    if advice is None:
        out.print("no change was found that makes it fit and computes the same")
        return
    changes, then = advice
    more = [f"on {then.ranks} ranks"] if then.ranks != made.ranks else []
    out.print(f"it would with {' '.join((*changes, *more))}: {words.size(then.peak)}")
