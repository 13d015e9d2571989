"""`stoker generate RUN --prompt ...`: answers and continuations by a run's model, or any other."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
import yaml
from stoker import exports, store_urls
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, print_json
from stoker.data import called
from stoker.errors import BadInput
from stoker.run import finding, view
from stoker.run.state import RunView

if TYPE_CHECKING:
    from stoker.language.speaking import Speaker

_ANEW = "/new"
Answer = Callable[[str], dict[str, Any]]
"""Generates what follows a text; see `Speaker.answer`."""

RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="A run: its id, the start of its id, experiment/id, or its path. Or a model or adapter: a "
        "directory, s3://bucket/folder, or a hub id.",
    ),
]

OfCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="WHICH",
        help="Of a run: best, last, or a step number; default: its export.",
    ),
]


def generate(
    model: RunOrModel,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--prompt",
            help="The text to answer or continue; can be repeated. Default: all of standard input, or on a "
            "terminal a conversation.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="A file of prompts: one per line; in a .jsonl file each is a string, or the field `prompt`.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="The system message, for a chat model.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")
    ] = False,
    template_value: Annotated[
        list[str] | None,
        typer.Option(
            "--template-value",
            metavar="KEY=VALUE",
            help="A value for the chat template, such as enable_thinking=false; can be repeated. "
            "Default: the values that the run was trained with.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="The most tokens to generate.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0: always the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            min=0.01,
            max=1.0,
            help="Sample from the likeliest tokens that together have this probability.",
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option("--top-k", min=0, metavar="N", help="Sample from the N likeliest tokens; 0: all."),
    ] = 0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Above 1, tokens that occurred before become less likely; default: the model's own.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    checkpoint: OfCheckpoint = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Where the adapter's base model is now.")
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Let a run's model, or any other, answer or continue prompts."""
    if prompt is not None and not all(one.strip() for one in prompt):
        raise BadInput("--prompt is empty: give a text")
    if prompts is not None:
        prompt = [*(prompt or ()), *_from_file(prompts)]
    if (top_p < 1 or top_k) and not temperature:
        raise BadInput("--top-p and --top-k only affect sampling: give --temperature too, such as 0.7")
    values = _values(template_value or ())
    folder, named, trained_with = _meant(model, runs, checkpoint)
    from stoker.language import speaking

    speaker = speaking.load(folder, base)
    chats = speaker.chats and not raw
    if system is not None and not chats:
        raise BadInput("--system needs a tokenizer with a chat template, and cannot be combined with --raw")
    if values and not chats:
        raise BadInput(
            "--template-value needs a tokenizer with a chat template, and cannot be combined with --raw"
        )
    values = {**trained_with, **values}

    def answer(text: str) -> dict[str, Any]:
        said = speaker.answer(
            text, rendered=chats, max_tokens=max_tokens, temperature=temperature, top_p=top_p,
            top_k=top_k, repetition_penalty=repetition_penalty, seed=seed, show=None if json else _write,
        )  # fmt: skip
        if not json:
            _write("\n")
        return said

    before = [] if system is None else [_message("system", system)]
    if prompt is None and chats and sys.stdin.isatty():
        answers = list(_conversation(speaker, before, values, answer))
    else:
        asked = prompt if prompt is not None else _from_input()
        answers = [
            {
                "prompt": one,
                **answer(speaker.ask([*before, _message("user", one)], values) if chats else one),
            }
            for one in asked
        ]
    if json:
        print_json({**named, "answers": answers})


def _values(given: Sequence[str]) -> dict[str, Any]:
    """The values for the chat template, parsed as YAML. Raises BadInput."""
    found: dict[str, Any] = {}
    for one in given:
        key, separator, text = one.partition("=")
        if not separator or not key:
            raise BadInput(f"--template-value {one}: write KEY=VALUE, for example enable_thinking=false")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            found[key] = text
    called.check_values("--template-value", found)
    return found


def _meant(reference: str, runs: Path, checkpoint: str | None) -> tuple[Path, dict[str, str], dict[str, Any]]:
    """The model's folder, its name in the JSON answer, and the template values that its run was trained with.

    Raises BadInput.
    """
    from stoker.language import hub

    seen = run_meant(reference, runs, checkpoint)
    if seen is None:
        return hub.find(reference, "model or adapter"), {"model": reference}, {}
    named = {"run": seen.directory.name}
    folder = hub.find(str(folder_meant(seen, checkpoint)), "model or adapter")
    return folder, named, dict(seen.config.get(called.VALUES, {}))


def run_meant(reference: str, runs: Path, checkpoint: str | None) -> RunView | None:
    """The run that a reference names; None if it names a model.

    Raises BadInput if it is neither, or a model but a checkpoint is asked for.
    """
    try:
        return view.load(finding.find(runs, reference))
    except BadInput:
        if (Path(reference).expanduser() / "run.json").exists():  # a run that cannot be read
            raise
        owner, _, name = reference.partition("/")
        of_hub = bool(name) and owner not in {run.experiment for run in finding.every(runs)}
        if not (of_hub or store_urls.is_url(reference) or Path(reference).expanduser().is_dir()):
            raise
    if checkpoint is not None:
        raise BadInput(f"--checkpoint {checkpoint} needs a run, but {reference} is a model")
    return None


def folder_meant(seen: RunView, checkpoint: str | None) -> Path:
    """The folder of a run's export, or of a checkpoint, both as `hub.find` takes them. Raises BadInput."""
    if checkpoint is not None:
        return exports.meant(seen, checkpoint)
    if (folder := exports.as_it_stands(seen)) is None:
        run = seen.directory.name
        raise BadInput(f"run {run} has exported no model yet; give --checkpoint last")
    return folder


def _conversation(
    speaker: Speaker, before: Sequence[dict[str, str]], values: Mapping[str, Any], answer: Answer
) -> Iterator[dict[str, Any]]:
    """Answer each line of a terminal, with the conversation so far as context."""
    sys.stderr.write(f"{_ANEW} starts a new conversation, Ctrl-D ends\n")
    messages = list(before)
    for asked in _from_input():
        if asked.strip() == _ANEW:
            messages = list(before)
            continue
        messages.append(_message("user", asked))
        try:
            said = answer(speaker.ask(messages, values))
        except BadInput as error:  # the conversation has become too long
            messages = list(before)
            sys.stderr.write(f"{error}; starting a new conversation\n")
            continue
        messages.append(_message("assistant", said["text"]))
        yield {"prompt": asked, **said}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _from_file(file: Path) -> list[str]:
    """The prompts in a file, without blank lines. Raises BadInput."""
    try:
        lines = [line.rstrip("\r") for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts {file} cannot be read: {error}") from error
    if not lines:
        raise BadInput(f"--prompts {file} has no prompts: write one per line")
    return [_of_record(file, line) for line in lines] if file.suffix == ".jsonl" else lines


def _of_record(file: Path, line: str) -> str:
    with contextlib.suppress(ValueError):
        found = orjson.loads(line)
        found = found.get("prompt") if isinstance(found, dict) else found
        if isinstance(found, str) and found.strip():
            return found
    raise BadInput(
        f"--prompts {file}: {textwrap.shorten(line, 60)}: each line must be a JSON string, or an object with "
        "the text in `prompt`"
    )


def _from_input() -> Iterator[str]:
    """Prompts from standard input: each line on a terminal, otherwise all of the input as one prompt.

    The line end after the last line, which `echo` writes, is not part of it. Raises BadInput if it is blank.
    """
    if not sys.stdin.isatty():
        piped = sys.stdin.read().removesuffix("\n")
        if not piped.strip():
            raise BadInput("standard input is empty: pipe a prompt, or give --prompt")
        yield piped
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
