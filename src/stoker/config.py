"""Configuration: fills a frozen dataclass from its defaults, a YAML file and the command line.

Later sources override earlier ones: defaults, then the YAML file, then `key=value` on the command line. Keys
of nested dataclasses are dotted (`lora.rank=8`). The source of every value is recorded. No input is ignored:
an unknown key is an error that names the nearest key, or stoker's key for another trainer's name; a value of
the wrong type is an error that says what is allowed. pydantic checks the values; the dataclass itself stays a
plain one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import itertools
import json
import math
import shlex
import types
import typing
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError
from stoker import redaction, unknown_keys
from stoker.errors import BadInput, nearest
from stoker.meanings import is_group
from stoker.words import first_line

C = TypeVar("C")

DEFAULT = "default"
COMMAND_LINE = "command line"
SCRIPT = "script"


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A config and its record: `values` (JSON types) and `sources`, both by dotted key."""

    config: C
    values: dict[str, Any]
    sources: dict[str, str]


@dataclass(frozen=True)
class _Leaf:
    type: Any
    default: Any  # dataclasses.MISSING if the key is required


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, of which plain YAML silently takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def resolve(cls: type[C], overrides: Iterable[str] = (), file: Path | None = None) -> Resolved[C]:
    """Fill a config dataclass from defaults, a YAML file and `key=value` overrides.

    Raises:
        BadInput: a key is unknown or lacks a value, a value has the wrong type, or the file cannot be read.
    """
    leaves = _leaves(cls)
    given: dict[str, tuple[Any, str]] = {}
    if file is not None:
        for key, value in flatten(read_yaml(file), str(file), leaves).items():
            given[key] = (value, str(file))
    for override in overrides:
        key, value = split(override)
        given[key] = (value, COMMAND_LINE)
    _check_all_known(cls, given, leaves)
    values = {key: _checked(key, leaves[key], *pair) for key, pair in given.items()}
    sources = {key: given[key][1] if key in given else DEFAULT for key in leaves}
    config = _build(cls, values)
    return Resolved(config, record(config), sources)


def restore(
    cls: type[C], values: Mapping[str, Any], sources: Mapping[str, str], overrides: Iterable[str] = ()
) -> Resolved[C]:
    """Build a config from its record in `run.json`. Keys that the record lacks keep their default.

    Args:
        overrides: `key=value` pairs that replace recorded values.

    Raises:
        BadInput: a key is unknown, a value has the wrong type, or a secret, which is never recorded, is
            missing from the overrides.
    """
    leaves = _leaves(cls)
    given = dict(split(override) for override in overrides)
    recorded = {key: value for key, value in values.items() if key not in given}
    for source, keys in (("the run's record", recorded), (COMMAND_LINE, given)):
        for key in keys:
            _check_known(cls, key, leaves, source)
    told = {key: sources.get(key, DEFAULT) for key in leaves} | dict.fromkeys(given, COMMAND_LINE)
    recorded, lost = without_secrets(recorded, told)
    if lost:
        raise BadInput(
            f"{', '.join(lost)}: secrets are not recorded, so give the value again: "
            f"{' '.join(f'{key}=...' for key in lost)}"
        )
    checked = {key: _checked(key, leaves[key], value, "the run's record") for key, value in recorded.items()}
    checked |= {key: _checked(key, leaves[key], value, COMMAND_LINE) for key, value in given.items()}
    config = _build(cls, checked)
    return Resolved(config, record(config), told)


def changed(resolved: Resolved[C], overrides: Iterable[str]) -> Resolved[C]:
    """The same config with some keys overridden on the command line."""
    return restore(type(resolved.config), resolved.values, resolved.sources, overrides)


def without_secrets(
    values: Mapping[str, Any], sources: Mapping[str, str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Recorded values without secrets, which are never recorded, and the keys of those that nobody has now.

    A secret that was a default is found again in the code.
    """
    kept = {key: value for key, value in values.items() if not redaction.holds_redacted(value)}
    removed = (key for key in values if key not in kept)
    return kept, tuple(key for key in removed if sources.get(key, DEFAULT) != DEFAULT)


def record(config: Any) -> dict[str, Any]:
    """A config as JSON types by dotted key."""
    return {key: _dump(leaf, leaf.default) for key, leaf in _leaves(type(config), of=config).items()}


def sources_of(config: Any) -> dict[str, str]:
    """Where each value of a config is from that a script made: the script, or the default of its class."""
    values, defaults = _leaves(type(config), of=config), _leaves(type(config))
    return {
        key: DEFAULT if key in defaults and _is_default(defaults[key], leaf.default) else SCRIPT
        for key, leaf in values.items()
    }


def _is_default(leaf: _Leaf, value: Any) -> bool:
    return leaf.default is not dataclasses.MISSING and _dump(leaf, leaf.default) == _dump(leaf, value)


def shown(value: Any) -> str:
    """A recorded value as messages show it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return "''" if value == "" else str(value)


def drift(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The differences between two records: key -> (old, new)."""
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def may_differ(key: str, one: Any, other: Any) -> bool:
    """Whether machines that train together may have these values of a key; redacted ones are unknown."""
    of_machine = key.rpartition(".")[2] == "workers"
    return of_machine or redaction.holds_redacted([one, other]) or _same_but_for_places(one, other)


def _same_but_for_places(one: Any, other: Any) -> bool:
    """Whether two recorded values are equal but for absolute paths, which may differ between machines.

    A text can be several, separated by commas, each with a weight: `/data/a:0.5,tiny:2`.
    """
    if isinstance(one, str) and isinstance(other, str):
        parts = [text.split(",") for text in (one, other)]
        return len(parts[0]) == len(parts[1]) and all(map(_same_place, *parts))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        one, other = list(itertools.chain(*one.items())), list(itertools.chain(*other.items()))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_but_for_places, one, other))
    return bool(one == other)


def _same_place(one: str, other: str) -> bool:
    (place, weight), (other_place, other_weight) = (_weighted(text) for text in (one, other))
    are_places = Path(place).is_absolute() and Path(other_place).is_absolute()
    return weight == other_weight and (place == other_place or are_places)


def _weighted(text: str) -> tuple[str, str]:
    """A name with the weight after it, if what is there is a number: `/data/a:1e-3`."""
    place, _, weight = text.strip().rpartition(":")
    try:
        float(weight)
    except ValueError:
        return text.strip(), ""
    return place, weight


def describe(cls: type) -> dict[str, tuple[str, Any]]:
    """The type name and default of every key of a config, for help texts."""
    return {key: (_type_name(leaf.type), leaf.default) for key, leaf in _leaves(cls).items()}


def checked(cls: type, key: str, value: Any, source: str = COMMAND_LINE) -> Any:
    """Check one value and return it in the form in which it is recorded.

    Raises BadInput for an unknown key or a value that the key does not take.
    """
    leaves = _leaves(cls)
    _check_known(cls, key, leaves, source)
    return _dump(leaves[key], _checked(key, leaves[key], value, source))


def kinds(cls: type, key: str, source: str = COMMAND_LINE) -> frozenset[Any]:
    """The types that a key takes, without constraints: {int, NoneType} for `Annotated[int, Ge(1)] | None`.

    A generic or a literal is represented by its origin: `tuple`, `Literal`. Raises BadInput for an unknown
    key.
    """
    leaves = _leaves(cls)
    _check_known(cls, key, leaves, source)
    return _kinds(leaves[key].type)


def split(override: str) -> tuple[str, str]:
    """The key and the value of `key=value`."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise BadInput(f"{override!r} is not an override: write key=value, for example lr=0.001")
    return key.strip(), value


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises BadInput if the file holds no mapping or a key twice."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise BadInput(f"config file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"config file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"config file {file}{_said_of(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadInput(
            f"config file {file} holds a {type(content).__name__}, not a mapping: write `key: value` lines"
        )
    return content


def _said_of(error: yaml.YAMLError) -> str:
    """Where and why a file is not valid YAML, with a hint."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f" cannot be read: {first_line(error)}"
    found = f", line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, yaml.constructor.ConstructorError):
        return found
    return f'{found}; quote strings that contain ?, :, # or brackets ("who?"), and indent with spaces'


def flatten(
    tree: Mapping[Any, Any], source: str, keys: Container[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """Flatten a mapping with nested or dotted keys. Raises BadInput for a key given in both forms.

    Args:
        keys: the keys of the config, if known; a mapping that is the value of one of them stays whole.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        is_group = isinstance(value, Mapping) and name not in keys
        inner = flatten(value, source, keys, f"{name}.") if is_group else {name: value}
        for twice in flat.keys() & inner.keys():
            raise BadInput(f"{twice} is given twice ({source}): leave out one of the two")
        flat.update(inner)
    return flat


@functools.lru_cache(64)
def _hints(cls: type) -> dict[str, Any]:
    """The types of a config's fields; cached, because every annotation is a string that must be evaluated."""
    return typing.get_type_hints(cls, include_extras=True)


def _leaves(cls: type, prefix: str = "", of: Any = dataclasses.MISSING) -> dict[str, _Leaf]:
    """The keys of a config.

    Args:
        of: an instance of the class, whose values are the defaults.
    """
    if not dataclasses.is_dataclass(cls):
        raise BadInput(
            f"{cls.__name__} is not a dataclass: decorate it with @dataclass(frozen=True, kw_only=True)"
        )
    hints = _hints(cls)
    leaves: dict[str, _Leaf] = {}
    for field in _given_fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        default = _default(field, kind, of)
        if is_group(kind):
            leaves.update(_leaves(_group(key, kind, default), f"{key}.", default))
        else:
            leaves[key] = _Leaf(kind, default)
    return leaves


def _given_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields that have keys: not those that a config derives from others (`init=False`)."""
    return [field for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field[Any], kind: Any, of: Any) -> Any:
    """The default of a field, or its value in an instance, if there is one.

    MISSING if it has none, or if it is a group as its class makes it: that may have keys without a default,
    or derive some from others.
    """
    if of is not dataclasses.MISSING:
        return getattr(of, field.name)
    make: Any = field.default_factory
    if is_group(kind) and make is kind:
        return dataclasses.MISSING
    default = field.default if make is dataclasses.MISSING else make()
    return dataclasses.MISSING if is_group(kind) and _is_made_by(kind, default) else default


def _is_made_by(kind: Any, default: object) -> bool:
    try:
        return bool(default == kind())
    except TypeError:  # it has keys without a default
        return False


def _group(key: str, kind: type, default: Any) -> type:
    """The class of a group of keys: that of its default, which may inherit from the annotated one."""
    if default is dataclasses.MISSING:
        return kind
    if not isinstance(default, kind):
        raise BadInput(
            f"{key} is a group of keys, but its default is {default!r}: give it a {kind.__name__}, such as "
            f"{kind.__name__}()"
        )
    return type(default)


def _build(cls: type[C], values: Mapping[str, Any], prefix: str = "", of: Any = dataclasses.MISSING) -> C:
    """A config with these values by dotted key, and those of an instance, or its defaults, for the others."""
    hints = _hints(cls)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for field in _given_fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        default = _default(field, kind, of)
        if is_group(kind):
            arguments[field.name] = _build(_group(key, kind, default), values, f"{key}.", default)
        elif key in values:
            arguments[field.name] = values[key]
        elif default is dataclasses.MISSING:
            raise BadInput(f"{key} needs a value: add {key}=... to the command")
        else:
            arguments[field.name] = default
    try:
        return cls(**arguments)
    except ValueError as error:  # a config's own __post_init__
        raise BadInput(str(error)) from error


def _checked(key: str, leaf: _Leaf, value: Any, source: str) -> Any:
    adapter = _adapter(leaf)
    if (
        isinstance(value, str)
        and value.lower() in ("null", "none")
        and type(None) in typing.get_args(leaf.type)
    ):
        return None
    takes = _kinds(leaf.type)
    if isinstance(value, bool) and takes & {int, float} and not takes & {bool, Any}:
        raise BadInput(f"{key}={shown(value)} ({source}): must be a number; {key} is {_type_name(leaf.type)}")
    try:
        made = adapter.validate_python(_read(value, leaf))
        if isinstance(made, float) and math.isinf(made) and _has_bounds(leaf.type):
            raise BadInput(f"{key}={value} ({source}): must be finite; {key} is {_type_name(leaf.type)}")
        return made
    except ValidationError as error:
        with contextlib.suppress(ValidationError):
            if _is_bracketed(value):  # a path may start with a bracket
                return adapter.validate_python(value)
            if isinstance(value, str) and _is_list(leaf):  # with one item
                return adapter.validate_python([value])
        raise BadInput(_explain(key, leaf, value, source, error)) from None


def _read(value: Any, leaf: _Leaf) -> Any:
    """Parse a list or mapping written as YAML, unless the key takes strings."""
    return value if _kinds(leaf.type) & {str, Any} else unwritten(value)


def unwritten(value: Any) -> Any:
    """Parse a string that is a YAML list or mapping; any other value is returned unchanged."""
    if not _is_bracketed(value):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _is_bracketed(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("[", "{")


def _explain(key: str, leaf: _Leaf, value: Any, source: str, error: ValidationError) -> str:
    if _is_list(leaf) and _kinds(typing.get_args(_bare(leaf.type))[0]) == {str}:
        return f"{key}={value} ({source}): {_unquoted(key, value, source)}"
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if len(_kinds(leaf.type) - {types.NoneType}) == 1:  # for a union, `loc` may name the type that was tried
        reason = "".join(f"{_item(place)}: " for place in first["loc"]) + reason
    if isinstance(value, str) and typing.get_origin(leaf.type) is typing.Literal:
        reason += nearest(value, [str(a) for a in typing.get_args(leaf.type)])
    has_example = leaf.default not in (dataclasses.MISSING, None, ())
    default = _dump(leaf, leaf.default) if has_example else None
    written = json.dumps(default) if isinstance(default, bool) else default
    example = f", for example {key}={written}" if has_example else ""
    return f"{key}={value} ({source}): {reason}; {key} is {_type_name(leaf.type)}{example}"


def _item(place: int | str) -> str:
    return f"item {place + 1}" if isinstance(place, int) else repr(place)


def _is_list(leaf: _Leaf) -> bool:
    return typing.get_origin(_bare(leaf.type)) is tuple


def _bare(kind: Any) -> Any:
    """A type without its annotations."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _has_bounds(kind: Any) -> bool:
    """Whether a type is a number with bounds, or one of several is."""
    if typing.get_origin(kind) is typing.Annotated:
        return any(isinstance(one, Gt | Ge | Lt | Le) for one in typing.get_args(kind)[1:])
    return any(map(_has_bounds, typing.get_args(kind)))


def _unquoted(key: str, value: Any, source: str) -> str:
    """How to write a list of strings that YAML reads as something else; splits the value at its commas."""
    why = (
        "YAML does not read this as a list of strings: in YAML, ?, : and # are special characters, and 7 is "
        "a number; quote each string"
    )
    if source != COMMAND_LINE:
        return f'{why}, as in {key}: ["who?", "7"]'
    text = str(value)
    parts = text[1:].removesuffix("]").split(",") if text.startswith("[") else [text]
    meant = json.dumps([part.strip(" \"'") for part in parts], ensure_ascii=False)
    return f"{why}, and the whole argument for the shell: {shlex.quote(f'{key}={meant}')}"


def _check_all_known(cls: type, given: Mapping[str, tuple[Any, str]], leaves: Mapping[str, _Leaf]) -> None:
    """Raises one BadInput for all unknown keys: a file for another trainer has several.

    Args:
        given: each key's value and source.
    """
    wrong = [key for key in given if key not in leaves]
    if len(wrong) == 1:
        value, source = given[wrong[0]]
        _check_known(cls, wrong[0], leaves, source, value)
    if wrong:
        files = sorted({given[key][1] for key in wrong})
        lines = []
        for key in wrong:
            value, source = given[key]
            why = _why(cls, key, leaves, value)[1]
            if len(files) > 1:
                lines.append(f"{key} ({source}){why}")
            else:
                lines.append(f"{key}: {why[2:]}" if why.startswith("; ") else f"{key}{why}")
        raise BadInput("\n  ".join([f"{len(wrong)} unknown keys ({', '.join(files)}):", *lines]))


def _check_known(cls: type, key: str, leaves: Mapping[str, _Leaf], source: str, value: object = ...) -> None:
    """Raises BadInput for an unknown key."""
    if key not in leaves:
        named, why = _why(cls, key, leaves, value)
        raise BadInput(f"{named} ({source}){why}")


def _why(cls: type, key: str, leaves: Mapping[str, _Leaf], value: object = ...) -> tuple[str, str]:
    """The name of an unknown key, and the rest of the sentence about it."""
    inner = [name for name in leaves if name.startswith(f"{key}.")]
    if inner:
        return key, f" is a group of keys: give one of {', '.join(inner)}"
    for name, leaf in leaves.items():
        takes_several = any(kind is dict or dataclasses.is_dataclass(kind) for kind in _kinds(leaf.type))
        if key.startswith(f"{name}.") and takes_several:
            written = f"{name}='{{{key.removeprefix(f'{name}.')}: ...}}'"
            return key, f": {name} is a single key, {_type_name(leaf.type)}: write {written}"
    why = (
        "; the script takes no keys: to declare some, annotate the second parameter of train, config, "
        "with a config dataclass"
    )
    return f"unknown key {key!r}", unknown_keys.meant(cls, key, leaves, value) if leaves else why


def _dump(leaf: _Leaf, value: Any) -> Any:
    return _adapter(leaf).dump_python(value, mode="json")


def _adapter(leaf: _Leaf) -> TypeAdapter[Any]:
    """Checks and dumps values of a type; cached, because a search needs it for every trial."""
    try:
        return _adapters(leaf.type)
    except TypeError:  # the type's annotations cannot be hashed
        return TypeAdapter(leaf.type)


@functools.lru_cache(1024)
def _adapters(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _kinds(kind: Any) -> frozenset[Any]:
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return frozenset().union(*map(_kinds, typing.get_args(kind)))
    return frozenset({origin or kind})


def _type_name(kind: Any) -> str:
    kind = _bare(kind)
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (tuple, list, set, frozenset):
        return f"a list, each {_type_name(arguments[0])}"
    if typing.get_origin(kind) is dict:
        return f"a mapping, each value {_type_name(arguments[1])}"
    if type(None) in arguments:
        return " or ".join(_type_name(k) for k in arguments if k is not type(None)) + " or none"
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string",
             "Duration": "a duration such as 100, 2ep or 1000000tok", "Path": "a path"}  # fmt: skip
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return names.get(name, name)
