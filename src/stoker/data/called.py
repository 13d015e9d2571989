"""What a conversation has besides words: tools, calls of them, thoughts, and what its template is given.

All of it is kept as the chat templates of transformers take it
(https://huggingface.co/docs/transformers/chat_extras): a call is `{"type": "function", "function": {"name",
"arguments"}}` with the arguments as an object. OpenAI writes these as a text of JSON, ShareGPT has a turn of
`function_call` for each, and columns of Parquet have null where a field is not there.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

from stoker.errors import BadInput

_CALLS = ("function_call", "tool_call")
"""What others call a turn, or a field of one, that is a call."""
SILENT = "silent"
"""Of a message of the assistant that is not to be learnt."""
THOUGHT = frozenset({"reasoning_content", "reasoning", "thinking"})
"""What others call what was thought; transformers gives a template all of these where a message has one."""
_OF_A_TOOL = ("name", "tool_call_id")
VALUES = "chat_template_kwargs"
"""What a template is given beside a conversation, such as {"enable_thinking": false}."""
_NO_VALUES = frozenset({
    "conversation", "conversations", "messages", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""What transformers' `apply_chat_template` itself takes, or gives a template."""


def schemas(where: str, tools: Any) -> str:
    """The tools of a record as a JSON array; empty where there are none. Raises BadInput."""
    found = _read(where, "'tools'", tools) if isinstance(tools, str) and tools.strip() else tools
    if not found or (isinstance(found, str) and not found.strip()):
        return ""
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadInput(f"{where}: 'tools' must be a list of JSON schemas, or such a list as a JSON string")
    return _dumps(f"{where}: 'tools'", [_wrapped(tool) for tool in found])


def values(where: str, given: Any) -> str:
    """What a record has its template be given, as a JSON object; empty where nothing. Raises BadInput."""
    found = _read(where, repr(VALUES), given) if isinstance(given, str) and given.strip() else given
    if not found or (isinstance(found, str) and not found.strip()):
        return ""
    if not isinstance(found, dict):
        raise BadInput(f'{where}: {VALUES!r} must be an object such as {{"enable_thinking": false}}')
    check_values(f"{where}: {VALUES}", found)
    return _dumps(f"{where}: {VALUES!r}", found)


def check_values(what: str, given: Mapping[str, Any]) -> None:
    """Raises BadInput where something is named that a template has anyway, or does not see."""
    taken = next((name for name in given if name in _NO_VALUES), None)
    if taken is not None:
        raise BadInput(f"{what}: {taken!r} cannot be passed to the chat template")


def as_calls(where: str, message: Mapping[str, Any], role: str, content: str) -> Mapping[str, Any]:
    """A message whose calls stand under `tool_calls`, and which has its content. Raises BadInput."""
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
    """What else a template is given of a message, as a JSON object; mostly empty. Raises BadInput."""
    found: dict[str, Any] = {}
    if speaker == "tool":
        found = {name: message[name] for name in _OF_A_TOOL if message.get(name)}
    if speaker == "assistant":
        found = {name: message[name] for name in sorted(THOUGHT) if message.get(name)}
        unsaid = next((name for name, said in found.items() if not isinstance(said, str)), None)
        if unsaid is not None:
            raise BadInput(f"{where}: the field {unsaid!r} must be a string")
        if message.get("tool_calls"):
            found["tool_calls"] = _calls(where, message["tool_calls"])
        if _is_silent(where, message):
            found[SILENT] = True
    return _dumps(where, found) if found else ""


def _is_silent(where: str, message: Mapping[str, Any]) -> bool:
    """Whether a message says that it is not to be learnt: by OpenAI's `weight`, or Axolotl's `train`."""
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise BadInput(f"{where}: its weight is {weight!r}: must be 1 (learn the message) or 0 (do not)")
    if train not in (None, True, False):
        raise BadInput(f"{where}: its train is {train!r}: must be true (learn the message) or false (do not)")
    return weight == 0 or train is False


def of_a_column(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table as a record: what is nested in it without the fields that others have."""
    return {name: _without_null(v) if isinstance(v, dict | list) else v for name, v in row.items()}


def _without_null(value: Any) -> Any:
    """Without the fields that are null: a column of Parquet has all fields that any of its records has.

    Of an object that has nothing else, None.
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
    if isinstance(found, list) and all(isinstance(pair, tuple) for pair in found):  # a map of Arrow's
        found = dict(found)
    if found is not None and not isinstance(found, dict):
        raise BadInput(f"{where}: 'arguments' of a call must be an object: {found!r:.80}")
    return found or {}


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    """A function as one of the kinds of tools that there may be."""
    return function if "function" in function else {"type": "function", "function": function}


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
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise BadInput(f"{where}: not valid Unicode: {error.reason}") from error
    return text


def _as_json(value: Any) -> Any:
    """A value that a column may have and JSON has not: a time. Raises TypeError."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is not a JSON value")
