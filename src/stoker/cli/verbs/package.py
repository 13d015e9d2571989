"""`stoker package RUN`: a folder that repeats a run anywhere."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Annotated

import typer
from stoker import storage
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.verbs.runs.common import RunName
from stoker.errors import BadInput
from stoker.launch import packaging
from stoker.reproduce import data, stretch
from stoker.run import finding, view


def package(
    run: RunName,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="The folder to create.", show_default="RUN-package"),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Create a folder that repeats a run anywhere.

    It has the code, lock, config, one command, a Dockerfile and an MLproject.
    """
    seen = view.load(finding.find(runs, run))
    folder = (to or Path(f"{seen.directory.id}-package")).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} already exists: remove it, or choose another folder with --to")
    part = stretch.find(seen)
    there = folder.exists()
    try:
        made = packaging.write(seen, part, folder)
    except BaseException as error:
        full = storage.said_of_full_disk(error) if isinstance(error, Exception) else ""
        for left in [*folder.iterdir()] if there else [folder]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()
        if isinstance(error, OSError) and str(error.filename or "").startswith(str(folder)) and not full:
            raise BadInput(f"{folder} cannot be written: {error.strerror or error}") from error
        raise
    if json:
        print_json({
            "folder": str(made.folder), "command": made.command, "image": made.image, "data": made.data,
            "lacking": made.lacking, "not_installed": made.not_installed,
            "secrets": made.secrets,
        })  # fmt: skip
        return
    out = console()
    out.print(f"{folder}")
    for label, said in (
        ("base image", made.image),
        ("data", ", ".join(f"{about['path']} ({data.identity(about)[:20]})" for about in made.data.values())),
        ("left out", ", ".join(made.lacking)),
        ("secrets", ", ".join(f"{key}, which run.sh needs" for key in made.secrets)),
        ("packages", ", ".join(f"{name} was imported from a folder" for name in made.not_installed)),
    ):
        if said:
            out.print(f"  {label:12} {said}", soft_wrap=True)
    out.print(
        f"next: {folder}/run.sh   docker build {folder}   mlflow run {folder} --env-manager local",
        soft_wrap=True,
    )
