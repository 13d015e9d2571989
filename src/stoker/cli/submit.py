"""`--on TARGET`: a command as a job of a cluster, with what it needs there.

The options are those of `Where`; `submittable` gives them to a verb. What the job runs is the command as it
was given, without them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from stoker import redaction
from stoker.cli.output import console, print_json
from stoker.errors import BadInput
from stoker.launch import arguments, here, jobs, jobspec, targets
from stoker.launch.jobs import Job
from stoker.launch.jobspec import ELEMENT, RENDEZVOUS, JobSpec
from stoker.launch.targets import LOCAL, TARGETS


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a command runs, and what it needs there."""

    on: Annotated[
        str,
        typer.Option(
            metavar="|".join((LOCAL, *TARGETS)), help="In the foreground here, or as a job of a cluster."
        ),
    ] = LOCAL
    gpus: Annotated[int, typer.Option(min=0, metavar="N", help="GPUs of each node.", show_default="none")] = 0
    cpus: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Cores of each node.", show_default="one a rank"),
    ] = None
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of each node, such as 64GB.")] = (
        None
    )
    time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time limit, such as 4h; on Slurm and Ray it goes on after it, on Kubernetes it is over.",
        ),
    ] = None
    retries: Annotated[
        int,
        typer.Option(
            min=0, metavar="N",
            help="Start the job again when it fails, so often; being preempted is no failure.",
        ),
    ] = 0  # fmt: skip
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="A variable of the job; without a value the one set here, which is written nowhere.",
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the cluster's own, such as partition=gpu."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print exactly what would be submitted, and do nothing.")
    ] = False

    @property
    def here(self) -> bool:
        return self.on == LOCAL


_VALUED = [f"--{field.name}" for field in dataclasses.fields(Where) if field.name != "dry_run"]


@dataclass(frozen=True)
class Command:
    """A command as it was given."""

    program: tuple[str, ...]
    """What it begins with: a Python, and a module or a script."""
    arguments: tuple[str, ...]
    folder: Path
    """Where it was given."""

    @classmethod
    def of_verb(cls, verb: str) -> Command:
        """The one that this process was started by: `stoker VERB ...`."""
        return cls((sys.executable, "-m", "stoker", verb), tuple(sys.argv[2:]), Path.cwd())

    @classmethod
    def of_script(cls, script: Path) -> Command:
        """The one that this process was started by: `python SCRIPT ...`."""
        return cls((sys.executable, str(script)), tuple(sys.argv[1:]), Path.cwd())

    def without(self, *options: str, flags: Sequence[str] = ()) -> Command:
        """The command without the options of `Where`, without other options, and without flags.

        Args:
            options: of those that have a value.
            flags: of those that have none.
        """
        flags = ("--dry-run", "--json", *flags)
        valued = {*_VALUED, *options}
        return dataclasses.replace(self, arguments=tuple(arguments.without(self.arguments, valued, flags)))

    def with_(self, *arguments: str) -> Command:
        """The command with more arguments."""
        return dataclasses.replace(self, arguments=(*self.arguments, *arguments))

    def has(self, option: str) -> bool:
        """Whether an option is given."""
        return arguments.has(self.arguments, option)

    def value(self, option: str) -> str:
        """What an option is given; empty where it is not."""
        return arguments.value(self.arguments, option)

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.program, *self.arguments)


def submittable(command: Callable[..., int], **others: Any) -> Callable[..., int]:
    """Give a command the options of `Where`, which it takes as its parameter `where`.

    Args:
        others: annotations that some of these options have instead.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    hints = get_type_hints(Where, include_extras=True) | others
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(Where)
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> int:
        where = Where(**{field.name: given.pop(field.name) for field in dataclasses.fields(Where)})
        if where.here and not where.dry_run:  # before anything looks for a GPU, or starts threads
            made = spec(where, Command((), (), Path.cwd()), name=LOCAL, processes=given.get("nproc") or 1)
            here.check(made)
            os.environ.update(here.environment(made))
        return command(**given, where=where)

    kept = [parameter for parameter in own if parameter.name != "where"]
    with_options.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
    return with_options


def spec(
    where: Where, command: Command, *, name: str, processes: int, nodes: int = 1, elements: int = 0
) -> JobSpec:
    """The job that a command is. Raises BadInput.

    Args:
        name: what it is called in the queue.
        processes: ranks of each node.
        elements: jobs of an array; 0 for none.
    """
    written, passed = jobspec.environment(where.env or (), os.environ)
    if runs := os.environ.get("STOKER_RUNS"):
        command = command if command.has("--runs") else command.with_("--runs", runs)
    made = JobSpec(
        name=name, command=command.words, folder=command.folder, nodes=nodes, processes=processes,
        gpus=where.gpus, cpus=where.cpus,
        memory=jobspec.memory(where.memory) if where.memory is not None else None,
        time=jobspec.time_limit(where.time) if where.time is not None else None,
        environment=written, passed=passed, retries=where.retries, elements=elements,
        options=jobspec.settings(where.option or ()),
    )  # fmt: skip
    jobspec.check(made)
    return made


def training(where: Where, command: Command, *, name: str, nproc: int, nodes: int) -> JobSpec:
    """The job that trains one run. Raises BadInput."""
    if command.has("--rendezvous"):
        raise BadInput(f"--rendezvous: on {where.on} the nodes find each other by themselves; leave it out")
    plain = command.without()
    if nodes > 1:
        plain = plain.with_("--rendezvous", RENDEZVOUS)
    return spec(where, plain, name=name, processes=nproc, nodes=nodes)


def element(name: str) -> str:
    """What an element of an array calls what it makes."""
    return f"{name}-{ELEMENT}"


def send(where: Where, made: JobSpec, *, runs: Path, trains: Sequence[str], json: bool) -> int:
    """Submit a job, or only print what would be; returns the exit code. Raises BadInput, StokerError."""
    target = targets.of(where.on)
    _check_secrets(made)
    job = jobs.planned(where.on, made, runs, tuple(trains))
    rendered = target.render(job)
    if where.dry_run:
        return _print_rendered(where.on, rendered, json=json)
    target.check(job)
    _check_free(job)
    job = jobs.signed(job)
    known = jobs.remember(job, target.submit(job, rendered))
    if json:
        print_json({"job": known.id, "target": known.target, "native": known.native,
                    "runs": list(known.trains), "folder": str(known.folder)})  # fmt: skip
        return 0
    out = console()
    out.print(
        f"submitted job {known.id} ({known.target}: {known.native}), which trains {', '.join(known.trains)}",
        markup=False,
    )
    out.print(f"it runs {target.code(known)}", markup=False)
    out.print(f"next: stoker jobs list   stoker jobs logs {known.id} -f   stoker jobs cancel {known.id}")
    return 0


def _check_secrets(made: JobSpec) -> None:
    """Refuse what would stand in a file, and in the cluster's records. Raises BadInput."""
    for word, shown in zip(made.command, redaction.command(made.command), strict=True):
        if word != shown:
            raise BadInput(
                f"{shown}: a secret would be written down with the job; give it as a variable that the code "
                "reads: export NAME=..., then --env NAME"
            )


def _check_free(job: Job) -> None:
    """Refuse a second job for what one that is not over trains. Raises BadInput."""
    others = [
        one for one in jobs.every(job.runs) if one.target == job.target and {*one.trains} & {*job.trains}
    ]
    states = targets.of(job.target).states(others) if others else {}
    for one in others:
        if not states[one.id].over:
            raise BadInput(
                f"job {one.id} trains it, and is {states[one.id].state}: wait for it, or `stoker jobs cancel "
                f"{one.id}`"
            )


def print_command(where: Where, command: Command, *, nproc: int, json: bool) -> int:
    """What `--dry-run` prints of a command that runs here."""
    made = spec(where, command.without(), name=LOCAL, processes=nproc)
    here.check(made)
    return _print_rendered(LOCAL, here.render(made), json=json)


def _print_rendered(target: str, rendered: str, *, json: bool) -> int:
    if json:
        print_json({"target": target, "rendered": rendered})
    else:
        sys.stdout.write(rendered)
    return 0
