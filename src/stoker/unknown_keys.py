"""Suggestions for an unknown config key.

They are found by spelling, by the names that other trainers use, or by the words of the keys' descriptions.
Without a match, the message lists the keys or says how to list them.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Collection, Mapping, Sequence

from stoker import other_names
from stoker.errors import nearest
from stoker.meanings import meanings_of

_MISSPELT = 0.8  # similarity from which a name counts as a misspelling
_SIMILAR = 0.6  # the same, for a name that no other trainer uses
_LISTED = 20  # the most keys that a message lists
_CLASS = "_component_"  # in torchtune's files, what a group builds
_MAY_BE_ON = ("precision=bf16",)  # also if it is not set
_SHOWN = 3  # the most keys suggested by their description


def meant(config: type, key: str, keys: Collection[str], value: object = ...) -> str:
    """What to give instead of an unknown key, as the end of a sentence.

    Args:
        value: what it was set to: some switches are off here unless they are set.
    """
    if ours := other_names.keys_for(key, keys):
        return _called_here(config, ours, value)
    if misspelt := nearest(key, keys, alike=_MISSPELT):  # first, since a user's config may have such a key
        return misspelt
    group, _, leaf = key.rpartition(".")
    names = [key, *([leaf] if group else []), *([group] if leaf == _CLASS or group not in keys else [])]
    for name in names:
        ours = (name,) if name in keys else other_names.keys_for(name, keys)
        if ours or (command := other_names.command_for(name, keys)):
            return _called_here(config, ours, value) if ours else f"; {command}"
    if ours := other_names.keys_for(other_names.begun(key), keys):
        return _called_here(config, ours)
    if similar := nearest(key, keys, alike=_SIMILAR):
        return similar
    found = _by_meaning(key, keys, _meanings(config))
    return f"; keys with a similar meaning: {', '.join(found)}" if found else _all(config, keys)


def _called_here(config: type, ours: Sequence[str], value: object = ...) -> str:
    if str(value).lower() in ("none", "false") and all("=" in name for name in ours):
        if ours != _MAY_BE_ON:
            return f"; leave it out: it is off without {' '.join(ours)}"
        ours = tuple(name.partition("=")[0] for name in ours)
    meanings = _meanings(config)
    told = [_with_meaning(name, meanings.get(name, "")) for name in ours]
    return f"; instead, set {' and '.join(told)}" if len(told) > 1 else f"; use {told[0]}"


def _with_meaning(name: str, meaning: str) -> str:
    return f"{name} ({meaning.removesuffix('.')})" if meaning else name


def _meanings(config: type) -> dict[str, str]:
    with contextlib.suppress(OSError, TypeError, SyntaxError):  # the source of the class is not available
        return meanings_of(config)
    return {}


def _by_meaning(key: str, keys: Collection[str], meanings: Mapping[str, str]) -> list[str]:
    """The keys whose name and description contain all words of an unknown key, matches in names first."""
    words = _words(key)
    found = [name for name in keys if words <= _words(f"{name} {meanings.get(name, '')}")]
    found.sort(key=lambda name: -len(words & _words(name)))
    return [_with_meaning(name, meanings.get(name, "").partition(". ")[0]) for name in found[:_SHOWN]]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def _all(config: type, keys: Collection[str]) -> str:
    """The keys, if they are few; otherwise how to list them, after the config's own keys if those are few."""
    if len(keys) <= _LISTED:
        return f"; the keys are {', '.join(keys)}"
    own = [key for key in keys if key.partition(".")[0] in inspect.get_annotations(config)]
    said = f"its own keys are {', '.join(own)}; " if 0 < len(own) <= _LISTED else ""
    return f"; {said}`stoker recipes show RECIPE`, with the recipe's name or file, lists all {len(keys)}"
