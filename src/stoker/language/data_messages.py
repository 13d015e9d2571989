"""What is recorded and said of the data that a language model is trained or evaluated on."""

from __future__ import annotations

import itertools
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from stoker.data import hub_datasets, sources
from stoker.data.mixture import Mixture
from stoker.data.sources import Source
from stoker.data.tokens import PackedDataset
from stoker.language import chat_template, conversation
from stoker.language.rows import Rows
from stoker.user_run import Run
from stoker.words import counted

log = logging.getLogger("stoker")

_MARKS = "mark where the chat template writes one with {% generation %} (chat_template=FILE)"
UNFOUND = f"no assistant turn to learn was found: {_MARKS}"

_OFTEN = 4  # passes over a source per epoch


def say(
    run: Run,
    given: Mapping[sources.Key, str],
    found: Sequence[Source],
    rows: Rows,
    *,
    packed: bool,
    wanted: bool,
) -> None:
    """Record what the data of each key is, named as in the config, and log it on rank 0."""
    of_keys = {key: [source for source in found if source.key == key] for key in given}
    for key, own in of_keys.items():
        run.fingerprint(key, sources.fingerprint(own))
        _record(run, key, sources.named(given[key], key), own)
    run.fingerprint("encoding", rows.encoding)
    about = {
        "sources" if key == "data" else key: [source.description for source in own]
        for key, own in of_keys.items()
    }
    run.attempt.event("data", **about, rows=len(rows.train), tokens_per_row=rows.train.tokens_per_sample)
    if run.world.rank > 0:
        return
    passes = iter(rows.train.passes if isinstance(rows.train, Mixture) else ())
    for source in found:
        often = next(passes, None) if source.key == "data" else None
        _say_source(source, often)
    log.info("%s", _divided(found))
    warn_of_repeated(found)
    if wanted and not packed:
        log.warning("the model's attention cannot separate documents: each document gets its own rows")


def say_evaluated(run: Run, given: str, found: Sequence[Source]) -> None:
    """Record the evaluation data under the names in the config; rank 0 logs it."""
    run.fingerprint("data", sources.fingerprint(found))
    _record(run, "data", sources.named(given, evaluated=True), found)
    run.attempt.event("data", sources=[source.description for source in found])
    for source in found if run.world.rank == 0 else ():
        log.info("%s", source.description)


def _record(run: Run, key: sources.Key, names: Sequence[str], found: Sequence[Source]) -> None:
    """Record each dataset of a key under its own name; a single one is named like the key."""
    each = [source.fingerprint for source in found]
    if len(each) != len(names):  # they were read as one
        each = [sources.fingerprint(found)] * len(names)
    for name, fingerprint in zip(names, each, strict=True):
        own = name if key == "data" else f"{key} {name}"  # several keys can name the same
        called = own if len(names) > 1 else key
        if sources.is_here(name):
            run.data(called, name)
        else:
            run.data(called, name, fingerprint=f"sha256:{fingerprint}", revision=hub_datasets.revision(name))


def _say_source(source: Source, passes: float | None) -> None:
    """Log a source; in a weighted mixture, also how many times an epoch goes through it."""
    if passes is None:
        log.info("%s: %s", source.key, source.description)
        return
    log.info(
        "%s: %s, weight %g: seen %.3g times per epoch",
        source.key, source.description, source.weight, passes,
    )  # fmt: skip
    if passes > _OFTEN:
        log.warning(
            "%s: %s is seen %.3g times per epoch and may be memorised: lower its weight, or give more of it",
            source.key, source.name, passes,
        )  # fmt: skip


def _divided(found: Sequence[Source]) -> str:
    """The number of documents per split; for a stream, of those that were sampled."""
    uses = {
        use: sum(len(getattr(source.splits, split)) for source in found)
        for split, use in (("train", "trained on"), ("validation", "validation"), ("test", "test"))
    }
    parts = ", ".join(f"{count:,} {use}" for use, count in uses.items() if count or use == "trained on")
    looked_at = " sampled" if any(source.stream for source in found) else ""
    return f"{counted(sum(uses.values()), 'document')}{looked_at}: {parts}"


def warn(found: Sequence[Source], tokenizer: Any) -> None:
    """Warn of what in these sources is not read, cannot be learnt, or does not end."""
    _warn_of_unread(found, tokenizer)
    _warn_of_plain(found, tokenizer)
    _warn_of_left_out(found)
    _warn_of_endless_turns(found, tokenizer)


def _warn_of_unread(found: Sequence[Source], tokenizer: Any) -> None:
    """Warn of fields in a source's records that other trainers learn from, but this one does not read."""
    for source in found:
        documents = [*source.splits.train, *source.splits.validation, *source.splits.test]
        names = dict.fromkeys(name for document in documents for name in document.unread)
        called = next((document.tools for document in documents if document.tools), "")
        if called and "tools" not in conversation.template(tokenizer, called):
            log.warning(
                "%s: %s: the chat template writes no tools, so the field tools of its records is not read: "
                "give a chat_template that does", source.key, source.name,
            )  # fmt: skip
        if names:
            fields = "the field" if len(names) == 1 else "the fields"
            log.warning(
                "%s: %s: %s %s of its records %s not read: move what should be learnt into the prompt or "
                "the messages, or remove it",
                source.key, source.name, fields, ", ".join(names), "is" if len(names) == 1 else "are",
            )  # fmt: skip


def _warn_of_plain(found: Sequence[Source], tokenizer: Any) -> None:
    """Warn of plain texts among pairs or conversations: usually pairs whose prompt is empty."""
    for source in found if getattr(tokenizer, "chat_template", None) else ():
        documents = [*source.splits.train, *source.splits.validation, *source.splits.test]
        plain = [document for document in documents if not (document.prompt or document.messages)]
        if plain and len(plain) < len(documents):
            log.warning(
                "%s: %s: %s of %s%s have no prompt: plain text, which is not written by the chat template; "
                "the first: %s",
                source.key, source.name, f"{len(plain):,}", counted(len(documents), "record"),
                " sampled" if source.stream else "", plain[0].where,
            )  # fmt: skip


def _warn_of_left_out(found: Sequence[Source]) -> None:
    """Warn of records from which nothing can be learnt, with the location of the first."""
    for source in found:
        for left in source.left_out:
            log.warning(
                "%s: %s: %s left out of %s%s, with nothing to learn: the first, %s, has %s",
                source.key, source.name, _counted(left.records, "record"), f"{left.of:,}",
                " sampled" if source.stream else "", left.first, left.lacking,
            )  # fmt: skip


def _warn_of_endless_turns(found: Sequence[Source], tokenizer: Any) -> None:
    """Warn if the chat template ends turns with plain words, at which no generation ends."""
    documents = itertools.chain.from_iterable(source.splits.train for source in found)
    is_written = any(source.stream for source in found) or any(d.prompt or d.messages for d in documents)
    words = conversation.end_in_words(tokenizer) if is_written else None
    if words is not None:
        end = words.splitlines()[0]
        lacking = conversation.tokens_in_words(tokenizer)
        meant = lacking if end.startswith(tuple(lacking)) else [*lacking, end]
        log.warning(
            "the chat template ends assistant turns with %r, which is not a special token of the tokenizer, "
            "so generations will not end there. Make it one with %s, or use a chat_template that ends turns "
            "with eos_token, %r, such as %s",
            end, shlex.quote(f"add_tokens={json.dumps(meant)}"), tokenizer.eos_token,
            " or ".join(chat_template.ENDED_BY_EOS),
        )  # fmt: skip


def warn_of_repeated(found: Sequence[Source]) -> None:
    """Warn of evaluation documents that are also trained on."""
    for key, count in sources.repeated(found).items():
        log.warning(
            "%s: %s also in data, word for word, and trained on: remove the duplicates from one of the two",
            key, _counted(count, "document"),
        )  # fmt: skip


def say_what_is_lost(name: str, rows: Sequence[PackedDataset]) -> None:
    """Warn of what is cut off or left out in the rows of a split."""
    truncated = sum(part.statistics.truncated for part in rows)
    dropped = sum(part.statistics.dropped for part in rows)
    cut = f"{_counted(truncated, 'answer')} cut off at {rows[0].sequence_length} tokens" if truncated else ""
    left_out = (
        f"{_counted(dropped, 'document')} left out, as nothing remains of the answer" if dropped else ""
    )
    if cut or left_out:
        log.warning("%s: %s: increase sequence_length", name, ", and ".join(filter(None, [cut, left_out])))
    unfound = sum(part.statistics.unfound for part in rows)
    if unfound:
        log.warning("%s: %s left out, since %s", name, _counted(unfound, "document"), UNFOUND)
    turns = sum(part.statistics.unfound_turns for part in rows)
    if turns:
        log.warning("%s: %s not found, and not learnt: %s", name, _counted(turns, "assistant turn"), _MARKS)


def _counted(count: int, what: str) -> str:
    return f"1 {what} is" if count == 1 else f"{count:,} {what}s are"
