"""`stoker data inspect`: a language model's training data, as tokens and in numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from stoker import config as configs
from stoker import recipes
from stoker.cli.options import ConfigFile
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json, show_messages
from stoker.cli.verbs.resume import return_to
from stoker.config import Resolved
from stoker.errors import BadInput
from stoker.report.terminal import plain, print_whole, table
from stoker.run import finding, view
from stoker.words import counted

if TYPE_CHECKING:
    from stoker.data.sources import Source
    from stoker.language.inspection import Numbers, Sample, Token
    from stoker.language.rows import Rows
    from stoker.recipes.llm import Config

app = typer.Typer(
    help="Inspect the training data of a language model.", no_args_is_help=True, rich_markup_mode=None
)

_GUTTER = 9  # columns before the text of a row
_LONGEST = 160  # tokens of a stretch; a longer one is cut in the middle
_FIRST, _LAST = 100, 40
_BAR = 32  # columns
# Both colours of each pair are given, so that they do not depend on the terminal's own.
_STYLES = {
    True: ("black on #b9e4b4", "black on #92d08b"),
    False: ("#6c6c6c on #e4e4e4", "#6c6c6c on #d0d0d0"),
}
_SPECIAL = {True: "bold #7a0074 on #92d08b", False: "bold #7a0074 on #d0d0d0"}


@app.callback()
def data() -> None:
    """Inspect the training data of a language model."""


@app.command()
def inspect(
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [KEY=VALUE]...",
            help="A run whose config values to use, and config values as for `stoker train llm`.",
        ),
    ] = None,
    config: ConfigFile = None,
    samples: Annotated[int, typer.Option(min=0, metavar="N", help="Rows to show from each source.")] = 2,
    whole: Annotated[bool, typer.Option("--whole", help="Show long rows in full.")] = False,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Show rows of tokens as training sees them. Tokens that are learnt are marked; statistics follow.

    The data are tokenised as by `stoker train llm` with the same values, into the same cache, so training
    does not tokenise them again. No model is built and no weights are downloaded.
    """
    show_messages()
    resolved = _resolved(given or [], config, runs)
    found, rows, tokenizer, packing = _made(resolved.config)
    from stoker.language import inspection

    evaluated = [source for source in found if source.key != "data"]
    found = [source for source in found if source.key == "data"]
    parts = [inspection.packed(part) for part in inspection.parts_of(rows)]
    numbers = [
        {"train": inspection.numbers(part), **_held_out(source, rows)}
        for source, part in zip(found, parts, strict=True)
    ]
    shown = [inspection.samples(part, tokenizer, samples, resolved.config.seed) for part in parts]
    about = _about(resolved.config, rows, tokenizer, packing)
    if json:
        evaluation = [_evaluated(source, _held_out(source, rows)) for source in evaluated]
        print_json({**_answer(about, found, rows, numbers, shown), "evaluation": evaluation})
        return
    out = console()
    if not out.is_terminal:
        out.width = 100
    _print_samples(out, found, shown, whole)
    _print_about(out, about)
    for source, own in zip(found, numbers, strict=True):
        _print_numbers(out, source, own, resolved.config.sequence_length)
    for source in evaluated:
        _print_numbers(out, source, _held_out(source, rows), resolved.config.sequence_length)
    if len(found) > 1:
        _print_mixture(out, found, rows)
    _print_epoch(out, about)


def _resolved(given: Sequence[str], file: Path | None, runs: Path) -> Resolved[Config]:
    """The config of `stoker train llm`, or that of the run if one is named."""
    recipe = recipes.load("llm")
    if not given or "=" in given[0]:
        return configs.resolve(recipe.config, given, recipes.config_file(file))
    if file is not None:
        raise BadInput(f"run {given[0]} has its own config, and --config {file} gives another: leave one out")
    seen = view.load(finding.find(runs, given[0]))
    if seen.recipe_reference != recipe.reference:
        raise BadInput(
            f"run {seen.directory.id} used the recipe {seen.recipe_name}: only the data of "
            f"{recipe.name} can be inspected"
        )
    return_to(Path(seen.record["cwd"]))
    return configs.restore(recipe.config, seen.config, seen.record["sources"], given[1:])


def _made(config: Config) -> tuple[list[Source], Rows, Any, bool]:
    """The sources, their rows, the tokenizer, and whether documents share rows, as `train` has them."""
    from stoker.language import adapters, building, chat_template, data_messages
    from stoker.recipes import llm

    if config.chat_template is not None:
        chat_template.read(config.chat_template)  # a bad template is reported before the data are read
    found = llm.read_sources(config)
    data_messages.warn_of_repeated(found)
    tokenizer, packs = building.without_model(
        config.model,
        tokenizer=adapters.tokenizer_for(config.tokenizer, config.lora),
        vocab_size=config.vocab_size,
        documents=[document for source in found for document in source.splits.train],
        chat_template=config.chat_template,
        add_tokens=config.add_tokens,
    )
    rows = llm.packed(config, found, tokenizer, packs)
    return found, rows, tokenizer, config.packing and packs


def _held_out(source: Source, rows: Rows) -> dict[str, Numbers]:
    """The numbers of a source's held-out splits, by name."""
    from stoker.language import inspection

    splits = {"validation": source.splits.validation, "test": source.splits.test}
    return {
        split: inspection.numbers([getattr(rows, split)[source.name]])
        for split, documents in splits.items()
        if documents
    }


def _about(config: Config, rows: Rows, tokenizer: Any, packing: bool) -> dict[str, Any]:
    """What is said of all sources together."""
    per_epoch = len(rows.train)
    return {
        "tokenizer": {
            "tokens": len(tokenizer),
            "chat_template": bool(getattr(tokenizer, "chat_template", None)),
            "bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token,
        },
        "sequence_length": config.sequence_length, "packing": packing, "loss_on": config.loss_on,
        "epoch": {
            "rows": per_epoch,
            "estimated": config.streaming,
            "steps": -(-per_epoch // config.batch_size),
            "batch_size": config.batch_size,
            "tokens": round(per_epoch * rows.train.tokens_per_sample),
            "learnt": round(per_epoch * rows.train.tokens_per_sample * rows.train.labelled),
        },
    }  # fmt: skip


def _answer(
    about: dict[str, Any],
    found: Sequence[Source],
    rows: Rows,
    numbers: Sequence[Mapping[str, Numbers]],
    shown: Sequence[Sequence[Sample]],
) -> dict[str, Any]:
    shares = _shares(rows)
    return {
        **about,
        "sources": [
            {
                "name": source.name, "description": source.description, "fingerprint": source.fingerprint,
                "weight": source.weight, **share, "looked_at": _looked_at(source),
                "left_out": [left._asdict() for left in source.left_out],
                "splits": {split: asdict(part) for split, part in own.items()},
                "samples": [_as_json(sample) for sample in samples],
            }
            for source, share, own, samples in zip(found, shares, numbers, shown, strict=True)
        ],
    }  # fmt: skip


def _evaluated(source: Source, splits: Mapping[str, Numbers]) -> dict[str, Any]:
    return {
        "key": source.key, "name": source.name, "description": source.description,
        "fingerprint": source.fingerprint, "left_out": [left._asdict() for left in source.left_out],
        "splits": {split: asdict(part) for split, part in splits.items()},
    }  # fmt: skip


def _as_json(sample: Sample) -> dict[str, Any]:
    documents = [[token._asdict() for token in document] for document in sample.documents]
    return {"row": sample.index, "padding": sample.padding, "documents": documents}


def _looked_at(source: Source) -> dict[str, int] | None:
    """How many parts of a stream the numbers cover; None for other sources."""
    if source.stream is None:
        return None
    from stoker.data import sources

    return {"parts": len(sources.looked_at(source.stream)), "of": len(source.stream)}


def _shares(rows: Rows) -> list[dict[str, float]]:
    """Each source's share of the training rows, and how many passes over it an epoch makes."""
    from stoker.data.mixture import Mixture

    if not isinstance(rows.train, Mixture):
        return [{"share": 1.0, "rows_per_epoch": len(rows.train), "passes": 1.0}]
    length = len(rows.train)
    return [
        {"share": share, "rows_per_epoch": round(share * length), "passes": passes}
        for share, passes in zip(rows.train.shares, rows.train.passes, strict=True)
    ]


# -- rows of tokens ---------------------------------------------------------------------------


def _print_samples(
    out: Console, found: Sequence[Source], shown: Sequence[Sequence[Sample]], whole: bool
) -> None:
    if not any(shown):
        return
    legend = ("learnt", True, False), ("masked: seen only", False, False), ("special", False, True)
    for token in itertools.starmap(_token, legend):
        out.print(_stretch(out, [token]), end="  ")
    out.print("a line ends with \N{RETURN SYMBOL}")
    for source, samples in zip(found, shown, strict=True):
        for sample in samples:
            _print_sample(out, source.name, sample, whole)


def _token(text: str, learnt: bool, special: bool) -> Token:
    from stoker.language.inspection import Token

    return Token(0, text, learnt, special)


def _print_sample(out: Console, name: str, sample: Sample, whole: bool) -> None:
    tokens = list(itertools.chain.from_iterable(sample.documents))
    said = (
        f"{counted(len(sample.documents), 'document')}, {counted(len(tokens), 'token')}, "
        f"{sum(token.learnt for token in tokens):,} learnt, {sample.padding:,} of padding"
    )
    out.print()
    out.print(Text.assemble((f"{name}, row {sample.index:,}", "bold"), f": {said}"))
    for number, document in enumerate(sample.documents, start=1):
        about = f"document {number} of {len(sample.documents)}, {counted(len(document), 'token')} "
        out.print(Text(f"{about:-<{min(out.width, 100)}}", "dim"))
        for learnt, group in itertools.groupby(document, lambda token: token.learnt):
            _print_stretch(out, "learnt" if learnt else "masked", list(group), whole)


def _print_stretch(out: Console, label: str, tokens: Sequence[Token], whole: bool) -> None:
    """Print tokens that are all learnt or all masked, with a label that says which."""
    if len(tokens) <= _LONGEST or whole:
        text = _stretch(out, tokens)
    else:
        between = f"\n... {len(tokens) - _FIRST - _LAST:,} tokens ...\n"
        text = Text.assemble(_stretch(out, tokens[:_FIRST]), between, _stretch(out, tokens[-_LAST:]))
    lines: Iterable[Text] = text.split("\n")
    if out.is_terminal:
        wide = max(20, out.width - _GUTTER)
        lines = (wrapped for line in lines for wrapped in _wrapped(line, wide))
    for number, line in enumerate(lines):
        out.print(Text(f"{'' if number else label:{_GUTTER}}", "dim"), line, sep="", soft_wrap=True)


def _wrapped(line: Text, width: int) -> Iterator[Text]:
    """Wrap a line at exactly `width` columns, so that no space is lost."""
    while line.cell_len > width:
        at = width
        while line[:at].cell_len > width:
            at -= 1
        head, line = line.divide([at])
        yield head
    yield line


def _stretch(out: Console, tokens: Sequence[Token]) -> Text:
    """Tokens side by side, separated by alternating colours, or by strokes without colours."""
    coloured = out.color_system is not None and not out.no_color
    text = Text()
    for number, token in enumerate(tokens):
        said = plain(token.text.replace("\t", "\N{RIGHTWARDS ARROW TO BAR}")) or "\N{DOTTED CIRCLE}"
        said = said.replace("\n", "\N{RETURN SYMBOL}\n")
        if coloured:
            style = _SPECIAL[token.learnt] if token.special else _STYLES[token.learnt][number % 2]
            text.append(said, style)
        else:
            text.append("\N{BOX DRAWINGS LIGHT VERTICAL}" if number else "")
            text.append(f"\N{LEFT WHITE SQUARE BRACKET}{said}\N{RIGHT WHITE SQUARE BRACKET}"
                        if token.special else said)  # fmt: skip
    return text


# -- numbers ----------------------------------------------------------------------------------


def _print_about(out: Console, about: Mapping[str, Any]) -> None:
    known = about["tokenizer"]
    template = "with a chat template" if known["chat_template"] else "without a chat template"
    packing = "documents share rows" if about["packing"] else "each document has its own rows"
    rows = f"of {about['sequence_length']:,} tokens, {packing}; loss on {about['loss_on']}"
    out.print()
    for key, value in (
        ("tokenizer", f"{known['tokens']:,} tokens, {template}, ends documents with {known['eos']}"),
        ("rows", rows),
    ):
        out.print(Text.assemble((f"{key:12}", "dim"), plain(value)), soft_wrap=True)


def _print_numbers(out: Console, source: Source, splits: Mapping[str, Numbers], row: int) -> None:
    out.print()
    out.print(Text(plain(source.description), "bold"), soft_wrap=True)
    looked_at = _looked_at(source)
    if looked_at:
        out.print(Text(f"{looked_at['parts']:,} of {looked_at['of']:,} parts were read:"))
    made = table(["", *splits], right=splits, dim=True)
    for heading, cells in _lines(list(splits.values())):
        made.add_row(Text(heading, "dim"), *cells)
    print_whole(out, made)
    split, first = next(iter(splits.items()))
    _print_histogram(out, split, first, row)


def _lines(splits: Sequence[Numbers]) -> list[tuple[str, list[str]]]:
    def quantile(share: str) -> list[str]:
        return [f"{n.quantiles[share]:,}" for n in splits]

    return [
        ("documents", [f"{n.documents:,}" for n in splits]),
        ("tokens", [f"{n.tokens:,}" for n in splits]),
        ("learnt", [f"{n.learnt:,}" for n in splits]),
        ("share learnt", [f"{n.learnt / max(1, n.tokens):.1%}" for n in splits]),
        ("rows", [f"{n.rows:,}" for n in splits]),
        ("padding", [f"{n.padding:.2%}" for n in splits]),
        ("longer than a row", [f"{n.longer:,}" for n in splits]),
        ("answers cut off", [f"{n.truncated:,}" for n in splits]),
        ("left out, no answer left", [f"{n.dropped:,}" for n in splits]),
        ("left out, no turn found", [f"{n.unfound:,}" for n in splits]),
        ("turns not found in others", [f"{n.unfound_turns:,}" for n in splits]),
        ("tokens per document, median", quantile("0.5")),
        ("  5% have at most", quantile("0.05")),
        ("  95% have at most", quantile("0.95")),
        ("  the longest", quantile("1")),
    ]


def _print_histogram(out: Console, split: str, numbers: Numbers, row: int) -> None:
    out.print(Text(f"tokens per document, {split}", "dim"))
    most = max(count for _, _, count in numbers.histogram)
    width = max(len(f"{begin:,} - {end:,}") for begin, end, _ in numbers.histogram)
    for begin, end, count in numbers.histogram:
        bar = "\N{FULL BLOCK}" * round(_BAR * count / most) or ("\N{LEFT ONE EIGHTH BLOCK}" if count else "")
        longer = "  longer than a row" if begin > row else ""
        out.print(
            Text.assemble(
                (f"  {f'{begin:,} - {end:,}':>{width}} ", "dim"),
                (f"{bar:{_BAR}} ", "yellow" if longer else "blue"), f"{count:,}", (longer, "dim"),
            )
        )  # fmt: skip


def _print_mixture(out: Console, found: Sequence[Source], rows: Rows) -> None:
    numbers = ("weight", "share of rows", "rows per epoch", "passes per epoch")
    made = table(["mixture", *numbers], right=numbers, dim=True)
    for source, share in zip(found, _shares(rows), strict=True):
        made.add_row(
            Text(plain(source.name)), f"{source.weight:g}", f"{share['share']:.1%}",
            f"{share['rows_per_epoch']:,}", f"{share['passes']:.2f}",
        )  # fmt: skip
    out.print()
    print_whole(out, made)


def _print_epoch(out: Console, about: Mapping[str, Any]) -> None:
    epoch = about["epoch"]
    roughly = "about " if epoch["estimated"] else ""
    out.print()
    out.print(
        f"an epoch is {roughly}{counted(epoch['rows'], 'row')}, {counted(epoch['tokens'], 'token')}, "
        f"{epoch['learnt']:,} of them learnt: {counted(epoch['steps'], 'step')} of "
        f"batch_size={epoch['batch_size']}"
    )
