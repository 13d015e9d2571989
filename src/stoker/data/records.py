"""Turns records of text data into documents: texts, pairs or conversations, depending on their fields.

A record that cannot be read is refused with its location and what was expected.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from stoker.data import called
from stoker.data.documents import ROLES, Document, Message, content_key
from stoker.errors import BadInput, nearest

Record = tuple[str, Any]  # location and content
Columns = Mapping[str, str]  # a field of the formats below -> the record's name for it
NO_COLUMNS: Columns = MappingProxyType({})

# (prompt, optional addition to the prompt, text). Pairs come first, because datasets of pairs often also
# contain the whole as "text".
_FORMS: tuple[tuple[str | None, str | None, str], ...] = (
    ("prompt", None, "completion"),
    ("question", None, "answer"),
    ("instruction", "input", "output"),
    (None, None, "text"),
)
_FORMS_TEXT = (
    '{"text"}, {"prompt", "completion"}, {"question", "answer"}, '
    '{"instruction", "output"} with an optional "input", or {"messages": [{"role", "content"}]}'
)
_CHATS = ("messages", "conversations", "conversation")
"""Fields with lists of turns in chat data."""
_SPOKEN = (("role", "content"), ("from", "value"))
"""The fields for the speaker and the content of a turn."""
_LIKE_PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input")
_LIKE_ANSWERS = ("completion", "response", "answer", "output", "solution", "chosen", "reply", "target")
_LIKE_TEXTS = ("content", "body", "raw_content", "document", "article", "code")
_LIKE_SYSTEM = ("system_prompt", "system_message")
_LIKE_SPEAKERS = ("role", "from", "speaker", "author", "sender", "who", "name")
_LIKE_SAID = ("content", "value", "utterance", "text", "message", "body", "said")
_OF_TURNS = ("role", "content")
_OF_FORMS = tuple(dict.fromkeys(name for form in _FORMS for name in form if name))
_FIELDS = (*_OF_FORMS, "messages", *_OF_TURNS, "system", "tools", called.VALUES)
"""The names that `columns` can map."""
_OPTIONAL = ("input", "system", "tools", called.VALUES)
_MEANT = (
    "system", "system_prompt", "history", "tools", "functions", "context", "input", "documents", "images",
    "image", "audios", "audio", "videos", "video", "rejected", "chosen", "reasoning_content", "thinking",
)  # fmt: skip
"""Fields that other trainers use. Other fields, such as an id or a source, are only metadata."""
_ROLES = {
    **{role: role for role in ROLES},
    "human": "user", "gpt": "assistant", "ai": "assistant", "bot": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Other names for the roles user, assistant and tool, in any letter case."""


def from_json(line: bytes, where: str) -> Iterator[Record]:
    """The record on a line of JSON; none for a blank line. Raises BadInput."""
    text = decode(line, where).strip()
    if not text:
        return
    try:
        yield where, json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise BadInput(f"{where}: not usable JSON: nested too deeply") from error


def check_columns(columns: Columns) -> None:
    """Raises BadInput for names of fields that are not read."""
    unknown = next((name for name in columns if name not in _FIELDS), None)
    if unknown is not None:
        raise BadInput(
            f"columns: no record format has a field {unknown!r}{nearest(unknown, _FIELDS)}; the fields are "
            f"{', '.join(_FIELDS)}"
        )
    of_turns = next((name for name in _OF_TURNS if name in columns), None)
    if of_turns is not None and "messages" not in columns and "completion" not in columns:
        raise BadInput(
            f"columns: {of_turns!r} is a field of messages: name messages too, as in columns='{{messages: "
            f"messages, {of_turns}: {columns[of_turns]}}}'"
        )


def documents(records: Iterable[Record], columns: Columns = NO_COLUMNS) -> Iterator[Document]:
    """The documents of records, including those from which nothing can be learnt (see `Document.lacking`).

    Args:
        columns: the records' names for the fields; default: those of the formats. If any are given, other
            fields are not read.
    """
    for where, found in records:
        if not isinstance(found, dict):
            raise BadInput(
                f'{where}: a record must be a JSON object such as {{"text": ...}}, not {kind_of(found)}'
            )
        record = _renamed(where, found, columns) if columns else found
        messages, unread_of_turns = _messages(where, record, columns)
        values = called.values(where, record.get(called.VALUES))
        if messages:
            unread = (*_unread(record, read=("system", "tools")), *unread_of_turns)
            key = content_key(*itertools.chain.from_iterable(message.parts for message in messages))
            tools = called.schemas(where, record.get("tools"))
            yield Document(
                key, "", "", messages, tools=tools, template_values=values, unread=unread, where=where
            )
            continue
        prompt, text, read = _parse(where, record)
        system = _system(where, record) if prompt else ""
        unread = _unread(record, read=(*read, "system") if prompt else read)
        key = content_key(prompt, text)
        yield Document(
            key,
            prompt,
            text,
            (),
            system,
            template_values=values if prompt else "",
            unread=unread,
            where=where,
        )


def _renamed(where: str, record: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The fields of a record that `columns` names, renamed to the formats' names. Raises BadInput."""
    of_record = {own: name for own, name in columns.items() if own not in _OF_TURNS}
    lacking = next((n for own, n in of_record.items() if n not in record and own not in _OPTIONAL), None)
    if lacking is not None:
        has = ", ".join(map(repr, record)) or "none"
        raise BadInput(f"{where}: no field {lacking!r}, which columns names; the record's fields are {has}")
    return {own: record[name] for own, name in of_record.items() if name in record}


def _unread(record: dict[str, Any], read: Sequence[str]) -> tuple[str, ...]:
    """The fields that other trainers use, that are not empty, and that are not among those read."""
    return tuple(name for name in _MEANT if record.get(name) and name not in read)


def _system(where: str, record: dict[str, Any]) -> str:
    """The system prompt in a separate field; empty if there is none. Raises BadInput."""
    said = _field(where, record, "system") if record.get("system") else ""
    return said if said.strip() else ""


def _messages(
    where: str, record: dict[str, Any], columns: Columns
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """A record's conversation (empty if it has none), and what its messages have unread. Raises BadInput."""
    said, role, content = _turns(record, columns)
    if not said:
        return (), ()
    found = [_message(f"{where}, message {n}", m, role, content) for n, m in enumerate(said, start=1)]
    unread = (called.unread(m, made.role) for m, made in zip(said, found, strict=True))
    names = dict.fromkeys(f"messages[].{name}" for name in itertools.chain.from_iterable(unread))
    system = _system(where, record)
    if system and all(message.role != "system" for message in found):  # otherwise the messages contain it
        found.insert(0, Message("system", system))
    return tuple(found), tuple(names)


def _turns(record: dict[str, Any], columns: Columns) -> tuple[list[Any], str, str]:
    """The turns of a record's conversation, and the names of their role and content fields.

    Of a prompt and a completion that are lists of turns, the prompt's say that they are not to be learnt.
    """
    for turns in _CHATS:
        if isinstance(record.get(turns), list):
            role, content = _spoken(record[turns])
            return record[turns], columns.get("role", role), columns.get("content", content)
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in prompt]
        return [*asked, *completion], columns.get("role", "role"), columns.get("content", "content")
    return [], "", ""


def _spoken(turns: list[Any]) -> tuple[str, str]:
    """The role and content fields of turns, judging by the first turn."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    return next((names for names in _SPOKEN if names[0] in first), _SPOKEN[0])


def _message(where: str, message: Any, role: str, content: str) -> Message:
    if not isinstance(message, dict):
        raise BadInput(f"{where}: must be an object with {role!r} and {content!r}, not {kind_of(message)}")
    message = called.as_calls(where, message, role, content)
    for name in (role, content):
        if name not in message:
            has = ", ".join(repr(key) for key in message) or "no fields"
            raise BadInput(f"{where}: has no {name!r}; its fields are {has}{_columns_for_turns(message)}")
    said = message[content]
    if isinstance(said, list):  # parts, of which only text can be learnt from
        texts = [
            part["text"] for part in said if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if len(texts) < len(said):
            raise BadInput(f"{where}: {content!r} has a part that is not text")
        message = {**message, content: "".join(texts)}
    said_by = _field(where, message, role)
    speaker = _ROLES.get(said_by.strip().lower(), said_by)
    return Message(speaker, _field(where, message, content), called.more(where, message, speaker))


def _parse(where: str, record: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    """A record's prompt (empty for plain text), its text, and the fields they are from. Raises BadInput."""
    for prompt, addition, text in _FORMS:
        if text in record and (prompt is None or prompt in record):
            asked = _field(where, record, prompt) if prompt else ""
            added = _field(where, record, addition) if addition and record.get(addition) else ""
            if added.strip():
                asked = f"{asked}\n\n{added}" if asked.strip() else added
            return asked, _field(where, record, text), tuple(filter(None, (prompt, addition, text)))
    chat = next((turns for turns in _CHATS if turns in record), None)
    if chat is not None and record[chat] == []:
        return "", "", ()
    if chat is not None:
        raise BadInput(f"{where}: {chat!r} must be a list of messages, not {kind_of(record[chat])}")
    if "chosen" in record and "rejected" in record:
        raise BadInput(
            f"{where}: a preference, 'chosen' over 'rejected': there is no DPO or reward modelling here; to "
            f"train on the chosen answers alone, as in columns='{_columns_for(record)}'"
        )
    has = ", ".join(repr(name) for name in record) or "none"
    raise BadInput(
        f"{where}: no known field; the record's fields are {has}; known formats are {_FORMS_TEXT}; map other "
        f"names with columns, as in columns='{_columns_for(record)}'"
    )


def _columns_for(record: dict[str, Any]) -> str:
    """A suggestion for `columns` that would make a record readable, from the names of its fields."""

    def first(names: Iterable[str]) -> str | None:
        return next((name for name in names if name in record), None)

    turns = next((name for name, value in record.items() if _is_chat(value)), None)
    prompt, answer = first(_LIKE_PROMPTS), first(_LIKE_ANSWERS)
    found: dict[str, str | None] = {"text": first(_LIKE_TEXTS) or "body"}
    if turns:
        found = {"messages": turns, **_fields_of_turn(record[turns][0])}
    elif prompt and answer and "context" in record:
        found = {"instruction": prompt, "input": "context", "output": answer}
    elif prompt and answer:
        found = {"prompt": prompt, "completion": answer}
    if "text" not in found:
        found["system"] = first(_LIKE_SYSTEM)
    return "{" + ", ".join(f"{own}: {name}" for own, name in found.items() if name) + "}"


def _columns_for_turns(message: Mapping[str, Any]) -> str:
    """A suggestion for `columns` for a message, as the end of a sentence; empty if there is none."""
    fields = ", ".join(f"{own}: {name}" for own, name in _fields_of_turn(message).items())
    return f"; map its names with columns, as in columns='{{messages: ..., {fields}}}'" if fields else ""


def _fields_of_turn(message: Mapping[str, Any]) -> dict[str, str]:
    """The role and content fields of a turn, by common names; empty if they are the usual ones."""
    role, content = (
        next((name for name in names if name in message), None) for names in (_LIKE_SPEAKERS, _LIKE_SAID)
    )
    if role is None or content is None or (role, content) in _SPOKEN:
        return {}
    return {"role": role, "content": content}


def _is_chat(value: Any) -> bool:
    """Whether a field's value looks like a list of turns."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, dict):
        return False
    return any(speaker in first for speaker, _ in _SPOKEN) or bool(_fields_of_turn(first))


def _field(where: str, record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise BadInput(f"{where}: the field {name!r} must be a string, not {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can contain
        raise BadInput(f"{where}: the field {name!r} is not valid Unicode: {error.reason}") from error
    return value


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(
        type(value), f"a number ({value})" if isinstance(value, int | float) else "something else"
    )


def decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{where}: not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from error
