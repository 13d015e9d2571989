"""Finds options in the words of a command, `--name a` or `--name=a`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence


def without(words: Sequence[str], options: Collection[str], flags: Collection[str] = ()) -> list[str]:
    """The words without these options.

    Args:
        options: options with a value.
        flags: options without a value.
    """
    kept, rest = [], iter(words)
    for word in rest:
        if word in options:
            next(rest, None)
        elif word not in flags and word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def has(words: Sequence[str], option: str) -> bool:
    """Whether an option is given."""
    return any(word.partition("=")[0] == option for word in words)


def value(words: Sequence[str], option: str) -> str:
    """The value of an option; empty if it is not given."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, given = word.partition("=")
        if name == option:
            return given if equals else following
    return ""
