"""`--on TARGET`: submit a command as a cluster job, with the resources it needs.

`submittable` adds the options of `Where` to a verb. The job runs the command as it was given, without these
options.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from stoker import duration, redaction
from stoker.cli.options import grouped
from stoker.cli.output import console, print_json
from stoker.errors import BadInput
from stoker.launch import arguments, here, jobs, jobspec, targets
from stoker.launch.jobs import Job
from stoker.launch.jobspec import ELEMENT, RENDEZVOUS, JobSpec
from stoker.launch.targets import KUBERNETES, LOCAL, TARGETS
from stoker.run import finding, opening


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a command runs, and the resources it needs."""

    on: Annotated[
        str,
        typer.Option(
            metavar="|".join((LOCAL, *TARGETS)), help="Run in the foreground here, or as a cluster job."
        ),
    ] = LOCAL
    gpus: Annotated[int, typer.Option(min=0, metavar="N", help="GPUs per node.", show_default="none")] = 0
    cpus: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Cores per node.", show_default="one per rank"),
    ] = None
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory per node, such as 64GB.")] = None
    time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time limit, such as 4h; then Slurm and Ray continue the job, and Kubernetes ends it.",
        ),
    ] = None
    retries: Annotated[
        int,
        typer.Option(
            min=0, metavar="N",
            help="Restart a failed job at most N times; preemption is not a failure.",
        ),
    ] = 0  # fmt: skip
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="A variable of the job; without VALUE, the value set here, which is not stored.",
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A cluster-specific setting, such as partition=gpu."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print exactly what would be submitted, without submitting it.")
    ] = False

    @property
    def here(self) -> bool:
        return self.on == LOCAL


HERE = Where()
_VALUED = [f"--{field.name}" for field in dataclasses.fields(Where) if field.name != "dry_run"]


@dataclass(frozen=True)
class Command:
    """A command as it was given."""

    program: tuple[str, ...]
    """The interpreter, and a module or a script."""
    arguments: tuple[str, ...]
    folder: Path
    """The working directory of the command."""

    @classmethod
    def of_verb(cls, verb: str) -> Command:
        """The command that started this process: `stoker VERB ...`."""
        return cls((sys.executable, "-m", "stoker", verb), tuple(sys.argv[2:]), Path.cwd())

    @classmethod
    def of_script(cls, script: Path) -> Command:
        """The command that started this process: `python SCRIPT ...`, or `python -m MODULE ...`."""
        module = opening.module()
        program = (str(script),) if module is None else ("-m", module)
        return cls((sys.executable, *program), tuple(sys.argv[1:]), Path.cwd())

    def without(self, *options: str, flags: Sequence[str] = ()) -> Command:
        """The command without the options of `Where` and without the given options and flags.

        Args:
            options: more options to remove, with their values.
            flags: more options to remove that take no value.
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
        """The value of an option; empty if it is not given."""
        return arguments.value(self.arguments, option)

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.program, *self.arguments)


def submittable(command: Callable[..., int], **others: Any) -> Callable[..., int]:
    """Give a command, which has a parameter `where: Where`, the options of its groups.

    Args:
        others: see `options.grouped`.
    """
    taking = grouped(command, **others)

    @functools.wraps(taking)
    def checked(**given: Any) -> int:
        where = Where(**{field.name: given[field.name] for field in dataclasses.fields(Where)})
        if where.here and not where.dry_run:  # before anything looks for a GPU, or starts threads
            made = spec(where, Command((), (), Path.cwd()), name=LOCAL, processes=given.get("nproc") or 1)
            here.check(made)
            os.environ.update(here.environment(made))
        return taking(**given)

    return checked


def spec(
    where: Where, command: Command, *, name: str, processes: int, nodes: int = 1, elements: int = 0
) -> JobSpec:
    """The job that runs a command. Raises BadInput.

    Args:
        name: the job's name in the queue.
        processes: ranks per node.
        elements: the number of jobs in the array; 0 for a single job.
    """
    options = jobspec.settings(where.option or ())
    in_secret = where.on == KUBERNETES and "secret" in options
    written, passed = jobspec.environment(where.env or (), os.environ, stored=in_secret)
    if runs := os.environ.get("STOKER_RUNS"):
        command = command if command.has("--runs") else command.with_("--runs", runs)
    made = JobSpec(
        name=name, command=command.words, folder=command.folder, nodes=nodes, processes=processes,
        gpus=where.gpus, cpus=where.cpus,
        memory=jobspec.memory(where.memory) if where.memory is not None else None,
        time=duration.limit("--time", where.time) if where.time is not None else None,
        environment=written, passed=passed, retries=where.retries, elements=elements,
        options=options,
    )  # fmt: skip
    jobspec.check(made)
    return made


def training(where: Where, command: Command, *, name: str, nproc: int, nodes: int) -> JobSpec:
    """The job that trains one run. Raises BadInput."""
    if command.has("--rendezvous"):
        raise BadInput(f"--rendezvous: on {where.on} the nodes find each other without it; leave it out")
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
    jobs.check_store(job)
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
    at = finding.option(runs)
    out.print(
        f"next: stoker jobs list{at}   stoker jobs logs {known.id}{at} -f   "
        f"stoker jobs cancel {known.id}{at}",
        markup=False,
    )  # fmt: skip
    return 0


def _check_secrets(made: JobSpec) -> None:
    """Refuse secrets, which would be written to a file and the cluster's records. Raises BadInput."""
    for word, shown in zip(made.command, redaction.command(made.command), strict=True):
        if word != shown:
            raise BadInput(
                f"{shown}: the secret would be stored with the job; pass it as a variable that the code "
                "reads: export NAME=..., then --env NAME"
            )


def _check_free(job: Job) -> None:
    """Refuse a job for a run that an unfinished job already trains. Raises BadInput."""
    others = [
        one for one in jobs.every(job.runs) if one.target == job.target and {*one.trains} & {*job.trains}
    ]
    states = targets.of(job.target).states(others) if others else {}
    for one in others:
        if not states[one.id].over:
            raise BadInput(
                f"job {one.id} already trains this run and is {states[one.id].state}: wait for it, or run "
                f"`stoker jobs cancel {one.id}`"
            )


def print_command(where: Where, command: Command, *, nproc: int, json: bool) -> int:
    """Print what `--dry-run` shows for a command that runs here."""
    made = spec(where, command.without(), name=LOCAL, processes=nproc)
    here.check(made)
    return _print_rendered(LOCAL, here.render(made), json=json)


def _print_rendered(target: str, rendered: str, *, json: bool) -> int:
    if json:
        print_json({"target": target, "rendered": rendered})
    else:
        sys.stdout.write(rendered)
    return 0
