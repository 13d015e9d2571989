"""Values of a config, or of what a run finds out later, as they are recorded: in JSON."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Set
from pathlib import PurePath
from typing import Any

import orjson
from stoker import config as configs
from stoker import redaction


def of_config(config: Any) -> dict[str, Any]:
    """A config as a dict, as it is read back from `run.json`, with secrets redacted.

    From now on its secrets are redacted in all that this process records. Raises TypeError.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = configs.record(config)
    elif config is not None and not isinstance(config, Mapping):
        kind = f"the class {config.__name__}" if isinstance(config, type) else f"a {type(config).__name__}"
        raise TypeError(
            f"config is {kind}: give a dataclass or a dict of JSON values, such as vars(arguments)"
        )
    plain = recorded(config or {}, "config")
    redaction.keep_out(plain)
    redacted: dict[str, Any] = redaction.tree(plain)
    return redacted


def recorded(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values as they are read back from JSON; `what` they are is for the message.

    Dates, paths, NaN, infinities, and torch's dtypes and devices become strings, sets sorted lists, and
    arrays lists.
    Raises TypeError for a value of any other type, with its key.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        try:
            found |= orjson.loads(orjson.dumps(encodable({key: _plain(value)})))
        except TypeError as error:
            raise TypeError(
                f"{what}: {key!r} is {value!r}, of a type that cannot be recorded ({error}): keys must be "
                "strings, and values numbers, strings, booleans, None, paths, dates, or lists, sets and "
                "dicts of these"
            ) from None
    return found


def encodable(value: Any) -> Any:
    """A value in whose texts `?` stands for what UTF-8 has no code for: half of a surrogate pair."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {encodable(key): encodable(inner) for key, inner in value.items()}
    return [encodable(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """A value of types that orjson writes. torch and NumPy are not imported: they may not be in use."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # NumPy's scalars and arrays, and tensors
        value = value.tolist()
    elif isinstance(value, enum.Enum):
        value = value.value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    kind = type(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Set | list | tuple):
        inner = [_plain(item) for item in value]
        return _sorted(inner) if isinstance(value, Set) else inner
    is_text = isinstance(value, PurePath) or (isinstance(value, float) and not math.isfinite(value))
    is_torchs = kind.__module__ == "torch" and kind.__name__ in ("dtype", "device")
    return str(value) if is_text or is_torchs else value


def _sorted(items: list[Any]) -> list[Any]:
    try:
        return sorted(items)
    except TypeError:  # of several types
        return sorted(items, key=lambda item: (type(item).__name__, str(item)))
