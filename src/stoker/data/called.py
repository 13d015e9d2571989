"""The parts of a conversation besides text: tools, tool calls, reasoning, and values for its template.

All are stored the way that the chat templates of transformers take them
(https://huggingface.co/docs/transformers/chat_extras): a call is `{"type": "function", "function": {"name",
"arguments"}}`, with the arguments as an object. OpenAI writes arguments as a JSON string, ShareGPT has one
`function_call` turn per call, and Parquet columns have null for missing fields.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from typing import Any

from stoker.errors import BadInput

_CALLS = ("function_call", "tool_call")
"""Other names for a turn, or a field of a turn, that is a call."""
SILENT = "silent"
"""Marks an assistant message that must not be learnt."""
THOUGHT = frozenset({"reasoning_content", "reasoning", "thinking"})
"""Names for reasoning; transformers passes all of these to a template if a message has them."""
NAME = "name"
"""Of a speaker, which some templates write: of a tool, a person or an agent."""
_READ_OF = {"tool": ("tool_call_id",), "assistant": (*sorted(THOUGHT), "tool_calls")}
"""The fields of a message that are read besides its role, content and name, by role."""
_WRITTEN = (
    *sorted(THOUGHT), "tool_calls", "tool_call_id", "tool_responses", "tools", "functions", "documents",
    "images", "image", "audio", "audios", "video", "videos", "recipient", "channel",
)  # fmt: skip
"""Fields of messages that chat templates write. Other fields, such as an id or a time, are only metadata."""
VALUES = "chat_template_kwargs"
"""Values passed to the template with a conversation, such as {"enable_thinking": false}."""
_NO_VALUES = frozenset({
    "conversation", "conversations", "messages", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Names that transformers' `apply_chat_template` itself takes, or passes to a template."""


def schemas(where: str, tools: Any) -> str:
    """The tools of a record as a JSON array; empty if there are none. Raises BadInput."""
    found = _given(where, "'tools'", tools)
    if not found:
        return ""
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadInput(f"{where}: 'tools' must be a list of JSON schemas, or such a list as a JSON string")
    return _dumps(f"{where}: 'tools'", [_wrapped(tool) for tool in found])


def values(where: str, given: Any) -> str:
    """A record's values for its template, as a JSON object; empty if there are none. Raises BadInput."""
    found = _given(where, repr(VALUES), given)
    if not found:
        return ""
    if not isinstance(found, dict):
        raise BadInput(f'{where}: {VALUES!r} must be an object such as {{"enable_thinking": false}}')
    check_values(f"{where}: {VALUES}", found)
    return _dumps(f"{where}: {VALUES!r}", found)


def check_values(what: str, given: Mapping[str, Any]) -> None:
    """Raises BadInput for names that a template gets anyway, or cannot see."""
    taken = next((name for name in given if name in _NO_VALUES), None)
    if taken is not None:
        raise BadInput(f"{what}: {taken!r} cannot be passed to the chat template")


def as_calls(where: str, message: Mapping[str, Any], role: str, content: str) -> Mapping[str, Any]:
    """A message whose calls are under `tool_calls`, with its content. Raises BadInput."""
    if message.get(role) in _CALLS and isinstance(message.get(content), str):
        calls = _read(where, repr(content), message[content])
        return {role: "assistant", content: "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    field = next((name for name in _CALLS if message.get(name)), None)
    if field is not None and not message.get("tool_calls"):
        message = {**message, "tool_calls": [message[field]]}
    if message.get("tool_calls") and message.get(content) is None:
        message = {**message, content: ""}
    return message


def more(where: str, message: Mapping[str, Any], speaker: str) -> str:
    """The other parts of a message for the template, as a JSON object; usually empty. Raises BadInput."""
    wanted = (NAME, *_READ_OF.get(speaker, ()))
    found: dict[str, Any] = {name: message[name] for name in wanted if message.get(name)}
    unsaid = next((name for name in THOUGHT & found.keys() if not isinstance(found[name], str)), None)
    if unsaid is not None:
        raise BadInput(f"{where}: the field {unsaid!r} must be a string")
    if "tool_calls" in found:
        found["tool_calls"] = _calls(where, message["tool_calls"])
    if speaker == "assistant" and _is_silent(where, message):
        found[SILENT] = True
    return _dumps(where, found) if found else ""


def unread(message: Mapping[str, Any], speaker: str) -> Iterator[str]:
    """The fields of a message, not empty, that templates could write but that `more` does not read."""
    return (name for name in _WRITTEN if message.get(name) and name not in _READ_OF.get(speaker, ()))


def _is_silent(where: str, message: Mapping[str, Any]) -> bool:
    """Whether a message says that it must not be learnt, with OpenAI's `weight` or Axolotl's `train`."""
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise BadInput(f"{where}: its weight is {weight!r}: must be 1 (learn the message) or 0 (do not)")
    if train not in (None, True, False):
        raise BadInput(f"{where}: its train is {train!r}: must be true (learn the message) or false (do not)")
    return weight == 0 or train is False


def of_a_column(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table as a record, without nested fields that only other records have."""
    return {name: _without_null(v) if isinstance(v, dict | list) else v for name, v in row.items()}


def _without_null(value: Any) -> Any:
    """Remove null fields: a Parquet column has all fields that any of its records has.

    Returns None for an object with no other fields.
    """
    if isinstance(value, dict):
        kept = {key: _without_null(item) for key, item in value.items()}
        kept = {key: item for key, item in kept.items() if item is not None}
        return kept if kept or not value else None
    if isinstance(value, list):
        return [made for item in value if (made := _without_null(item)) is not None or item is None]
    return value


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise BadInput(f"{where}: 'tool_calls' must be a list of calls")
    found = []
    for call in calls:
        one = _wrapped(call) if isinstance(call, dict) else {}
        function = one.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadInput(
                f'{where}: a call must be {{"function": {{"name": ..., "arguments": {{...}}}}}}: {call!r:.80}'
            )
        found.append({**one, "function": {**function, "arguments": _arguments(where, function)}})
    return found


def _arguments(where: str, function: dict[str, Any]) -> dict[str, Any]:
    found = function.get("arguments")
    if isinstance(found, str):
        found = _read(where, "'arguments' of a call", found or "{}")
    if isinstance(found, list) and all(isinstance(pair, tuple) for pair in found):  # a map from Arrow
        found = dict(found)
    if found is not None and not isinstance(found, dict):
        raise BadInput(f"{where}: 'arguments' of a call must be an object: {found!r:.80}")
    return found or {}


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    """A function, wrapped as a tool of type "function"."""
    return function if "function" in function else {"type": "function", "function": function}


def _given(where: str, what: str, value: Any) -> Any:
    """A record's value, parsed if it is a JSON string; None if it is a blank one. Raises BadInput."""
    found = _read(where, what, value) if isinstance(value, str) and value.strip() else value
    return None if isinstance(found, str) and not found.strip() else found


def _read(where: str, what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{where}: {what} must be JSON: {text!r:.80}") from error


def _dumps(where: str, value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=_as_json)
        text.encode()
    except TypeError as error:
        raise BadInput(f"{where}: {error}") from error
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can contain
        raise BadInput(f"{where}: not valid Unicode: {error.reason}") from error
    return text


def _as_json(value: Any) -> Any:
    """A value that a column can have but JSON cannot: a time. Raises TypeError."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is not a JSON value")
