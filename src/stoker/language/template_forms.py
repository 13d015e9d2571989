"""What a chat template can write, and in which form it takes it: found by trying.

No template is recognised by name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from stoker.data import called
from stoker.data.documents import Message

MARK = "5f3a9c"
"""Stands for what somebody says: it occurs in no conversation."""

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""Errors of a template that does not support a conversation, raised by itself or by Python within it."""


class Form(NamedTuple):
    """How a template takes calls; most take them as documented by transformers."""

    as_text: bool = False
    """Whether arguments are a JSON string."""
    beside_words: bool = True
    """Whether calls are written next to content."""
    several: bool = True
    """Whether all calls of a message are written."""


@functools.lru_cache(64)
def form_of_calls(template: str, special: str) -> Form | None:
    """The form in which a template writes calls, found by trying; None if it writes none.

    Args:
        special: the special tokens and values that the template gets, as a JSON object.
    """
    for form in (Form(), Form(as_text=True)):
        text = _tried(template, special, "", form, calls=1)
        # As JSON, not Python's form.
        if text.count(MARK) >= len(("name", "argument")) and f"'a': '{MARK}'" not in text:
            beside = _tried(template, special, "d", form, calls=1).count(MARK) >= len(("name", "argument"))
            several = _tried(template, special, "", form, calls=2).count(MARK) > text.count(MARK)
            return form._replace(beside_words=beside, several=several)
    return None


@functools.lru_cache(64)
def writes_thoughts(template: str, special: str) -> bool:
    """Whether a template writes the reasoning before a last answer or before a call, found by trying."""
    form = form_of_calls(template, special) or Form()
    thought = json.dumps({"reasoning_content": MARK})
    plain = (Message("user", "a"), Message("assistant", "b", thought))
    calling = (
        Message("user", "a"),
        Message("assistant", "", _call(1, thought)),
        _TOLD,
        Message("assistant", "c"),
    )
    least = len(("name", "argument", "thought"))
    return (
        _try(template, special, plain, "", form).count(MARK) >= 1
        or _try(template, special, calling, _TOOLS, form).count(MARK) >= least
    )


@functools.lru_cache(64)
def writes_inline(template: str, special: str, opener: str) -> bool:
    """Whether a template writes the thought that a last answer begins with, as far as it can be tried."""
    answer = Message("assistant", f"{opener}\n{MARK}\n</think>\n\nb")
    text = _try(template, special, (Message("user", "a"), answer), "", Form())
    return MARK in text or not text


_TOOLS = json.dumps([{"type": "function", "function": {"name": "f", "description": "f", "parameters": {}}}])
_TOLD = Message("tool", "b", json.dumps({"name": "f", "tool_call_id": "abcdefghi"}))


def _call(count: int, more: str = "{}") -> str:
    """A message with `count` calls, whose name and argument are marks, and other fields."""
    function = {"name": f"f{MARK}", "arguments": {"a": MARK}}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}] * count
    return json.dumps({**json.loads(more), "tool_calls": calls})


def _tried(template: str, special: str, said: str, form: Form, *, calls: int) -> str:
    """What a template writes for a call and its answer; empty if it refuses them."""
    told = (_TOLD,) * calls
    messages = (
        Message("user", "a"),
        Message("assistant", said, _call(calls)),
        *told,
        Message("assistant", "c"),
    )
    return _try(template, special, messages, _TOOLS, form)


def _try(template: str, special: str, messages: Sequence[Message], tools: str, form: Form) -> str:
    """What a template writes for messages; empty if it refuses them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = as_given(messages, tools, form)
    try:
        ((text,), _) = render_jinja_template(
            [given["conversation"]], tools=given["tools"], chat_template=template, **json.loads(special)
        )
    except REFUSALS:
        return ""
    return str(text)


def as_given(messages: Sequence[Message], tools: str, form: Form) -> dict[str, Any]:
    """A conversation as transformers takes it."""
    given = []
    for message in messages:
        made = {"role": message.role, "content": message.content, **json.loads(message.more or "{}")}
        made.pop(called.SILENT, None)
        for call in made.get("tool_calls", ()) if form.as_text else ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        given.append(made)
    return {"conversation": given, "tools": json.loads(tools) if tools else None}
