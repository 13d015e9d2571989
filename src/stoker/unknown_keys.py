"""What to give in place of a key that a config does not have.

By its spelling, by what other trainers call it, by what its words mean here; else where all keys are seen.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Collection, Mapping, Sequence

from stoker import other_names
from stoker.errors import nearest
from stoker.meanings import meanings_of

_MISSPELT = 0.8  # how much alike two names are of which one was meant by the other
_SIMILAR = 0.6  # where nothing else is known
_LISTED = 20  # keys that a message lists
_SHOWN = 3  # keys that may be meant by a word


def meant(config: type, key: str, keys: Collection[str]) -> str:
    """What to give in place of a key, as the end of a sentence."""
    if ours := other_names.keys_for(key, keys):
        return _called_here(config, ours)
    command = other_names.command_for(key)
    if misspelt := nearest(key, keys, alike=_MISSPELT):  # a config of one's own may have such a key
        return misspelt
    if command:
        return f"; that is no key here: {command}"
    if ours := other_names.keys_for(other_names.begun(key), keys):
        return _called_here(config, ours)
    if similar := nearest(key, keys, alike=_SIMILAR):
        return similar
    found = _by_meaning(key, keys, _meanings(config))
    return f"; the nearest by meaning: {', '.join(found)}" if found else _all(config, keys)


def _called_here(config: type, ours: Sequence[str]) -> str:
    meanings = _meanings(config)
    told = [_with_meaning(name, meanings.get(name, "")) for name in ours]
    return f"; here it follows from {' and '.join(told)}" if len(told) > 1 else f"; here it is {told[0]}"


def _with_meaning(name: str, meaning: str) -> str:
    return f"{name} ({meaning.removesuffix('.')})" if meaning else name


def _meanings(config: type) -> dict[str, str]:
    with contextlib.suppress(OSError, TypeError, SyntaxError):  # of a class whose source is not there
        return meanings_of(config)
    return {}


def _by_meaning(key: str, keys: Collection[str], meanings: Mapping[str, str]) -> list[str]:
    """The keys in whose name and meaning all words of an unknown one are; those in whose name, first."""
    words = _words(key)
    found = [name for name in keys if words <= _words(f"{name} {meanings.get(name, '')}")]
    found.sort(key=lambda name: -len(words & _words(name)))
    return [_with_meaning(name, meanings.get(name, "").partition(". ")[0]) for name in found[:_SHOWN]]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def _all(config: type, keys: Collection[str]) -> str:
    """Its keys where they are few, and of many the config's own, where those are; and how all are seen."""
    if len(keys) <= _LISTED:
        return f"; the keys are {', '.join(keys)}"
    own = [key for key in keys if key.partition(".")[0] in inspect.get_annotations(config)]
    said = f"its own keys are {', '.join(own)}; " if 0 < len(own) <= _LISTED else ""
    return f"; {said}`stoker recipes show RECIPE`, with the name or file of the recipe, shows all {len(keys)}"
