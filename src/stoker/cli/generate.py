"""`stoker generate RUN --prompt ...`: what the model that a run made has to say."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from stoker import exports
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, print_json
from stoker.cli.runs.common import RunName
from stoker.errors import BadInput
from stoker.run import finding, view


def generate(
    run: RunName,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--prompt",
            help="What to answer or continue; several times for several. "
            "By default standard input, a prompt a line on a terminal.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before, where it is a chat model.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="At most so many.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token each time; 1: as likely as the model says.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", min=0.01, max=1.0, help="Draw from the likeliest tokens of this share."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="WHICH", help="best, last, or a step; by default the export."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Where the adapter's model is now.")
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Let the model that a run made answer or continue prompts."""
    seen = view.load(finding.find(runs, run))
    if prompt is not None and not all(one.strip() for one in prompt):
        raise BadInput("--prompt is empty: give it a text")
    with tempfile.TemporaryDirectory(prefix="stoker-model-") as scratch:
        folder = None if checkpoint else exports.as_it_stands(seen)
        folder = folder or exports.make(seen, Path(scratch), which=checkpoint).folder
        from stoker.language import speaking

        speaker = speaking.load(folder, base)
        if (raw or not speaker.chats) and system is not None:
            raise BadInput("--system is for models whose tokenizer has a chat template, and not with --raw")
        asked = prompt if prompt is not None else _from_input()
        answers = []
        for one in asked:
            text = one if raw else speaker.ask(one, system)
            said = speaker.answer(
                text, rendered=speaker.chats and not raw, max_tokens=max_tokens,
                temperature=temperature, top_p=top_p, seed=seed, show=None if json else _write,
            )  # fmt: skip
            answers.append({"prompt": one, **said})
            if not json:
                _write("\n")
    if json:
        print_json({"run": f"{seen.directory.experiment}/{seen.directory.id}", "answers": answers})


def _from_input() -> Iterator[str]:
    """Prompts from standard input: each line of a terminal, until its end; else all of it as one."""
    if not sys.stdin.isatty():
        yield sys.stdin.read()
        return
    while True:
        try:
            asked = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        if asked.strip():
            yield asked


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
