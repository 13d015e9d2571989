"""A conversation as its chat template writes it, and which parts of that text are the assistant's.

Assistant turns are located by examining what the template writes, whatever its form: no template is
recognised by name.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from stoker.data import called
from stoker.data.documents import Document, Message
from stoker.errors import BadInput
from stoker.language import chat_template, template_forms
from stoker.language.template_forms import MARK, REFUSALS, Form, as_given

Span = tuple[int, int]
NO_VALUES: Mapping[str, Any] = MappingProxyType({})

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT_INLINE = re.compile(r"(\s*(?:<think>)?).*(</think>\s*)(.*)", re.DOTALL)
"""The opening tag is missing if the prompt for the answer already had it."""
_LIKE_TOKENS = re.compile(r"<\|[^<>|\s]+\|>|</?\w+>|\[/?[A-Z_]+\]")
_TAGS = re.compile(r"(?:\s|</?[^<>\s]+>|\[/?[A-Z_]+\])*")
_DATE = datetime.datetime(2024, 7, 26)
"""Written by a template that writes today's date; Llama 3's has it as its default."""
_NOW = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Chat(NamedTuple):
    """A conversation as it is passed to a template."""

    messages: tuple[Message, ...]
    tools: str = ""
    where: str = ""
    values: str = ""
    """All as in a document."""

    def until(self, number: int) -> Chat:
        """Its first messages."""
        return self._replace(messages=self.messages[:number])

    def with_marks(self, number: int) -> Chat:
        """The same with marks in place of what the assistant says in a message."""
        marked = _with_marks(self.messages[number], number)
        return self._replace(messages=(*self.messages[:number], marked, *self.messages[number + 1 :]))


class Answers(NamedTuple):
    """What the assistant says in a text."""

    spans: list[Span]
    """In characters, including the ends of turns."""
    unfound: int
    """Turns to be learnt that the text has, but in which place is not known."""


def of(document: Document, tokenizer: Any, values: Mapping[str, Any] = NO_VALUES) -> Chat:
    """A document as a conversation, without messages if it cannot be one. Raises BadInput.

    Args:
        values: values for the template, unless the document sets them.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if document.messages and not has_template:
        raise BadInput(
            "the data has conversations, but the tokenizer has no chat template: give "
            f"{chat_template.ALLOWED}, or data with prompts and completions"
        )
    if document.messages:
        given = as_text({**values, **_values(document.template_values)})
        return _checked(Chat(document.messages, document.tools, document.where, given), tokenizer)
    if not (document.prompt and has_template):
        return Chat(())
    system = (Message("system", document.system),) if document.system else ()
    turns = (*system, Message("user", document.prompt), Message("assistant", document.text))
    given = as_text({**values, **_values(document.template_values)})
    return _checked(Chat(turns, where=document.where, values=given), tokenizer)


def as_text(values: Mapping[str, Any]) -> str:
    """The values for a template, as stored in a Chat."""
    return json.dumps(values, sort_keys=True, default=str) if values else ""


def _values(text: str) -> dict[str, Any]:
    """Parse what `as_text` returned."""
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def _checked(chat: Chat, tokenizer: Any) -> Chat:
    """The chat itself, if its template writes everything in its messages. Raises BadInput."""
    had = {name for message in chat.messages if message.more for name in json.loads(message.more)}
    openers = {opener for m in chat.messages if not _is_silent(m) and (opener := _opener(m)) is not None}
    tried = _to_be_tried(tokenizer, chat) if had or openers else ("", "")
    thought = had & called.THOUGHT
    unwritten = set(thought) if thought and not template_forms.writes_thoughts(*tried) else set()
    if not all(template_forms.writes_inline(*tried, opener) for opener in openers):
        unwritten |= {"thoughts in content (before </think>)"}
    if "tool_calls" in had:
        form = template_forms.form_of_calls(*tried)
        if form is None:
            unwritten |= {"tool_calls"}
        elif not form.beside_words and any(m.content and _calls(m) for m in chat.messages):
            unwritten |= {"tool_calls next to content"}
        elif not form.several and any(_calls(message) > 1 for message in chat.messages):
            unwritten |= {"several tool_calls in a message"}
    if unwritten:
        raise BadInput(
            f"{_at(chat)}the data has conversations with {' and '.join(sorted(unwritten))}, which the chat "
            "template does not write: give chat_template=FILE with a template that does, or remove these "
            "conversations"
        )
    return chat


def _at(chat: Chat) -> str:
    return f"{chat.where}: " if chat.where else ""


def template(tokenizer: Any, tools: str) -> str:
    """The template for a conversation, or one with tools; empty if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    found: str = tokenizer.get_chat_template(tools=json.loads(tools) if tools else None)
    return found


def _given(tokenizer: Any, chat: Chat) -> dict[str, Any]:
    """A conversation as transformers takes it, with calls as its template takes them."""
    form = Form()
    if any(map(_calls, chat.messages)):
        form = template_forms.form_of_calls(*_to_be_tried(tokenizer, chat)) or form
    return as_given(chat.messages, chat.tools, form)


def _to_be_tried(tokenizer: Any, chat: Chat) -> tuple[str, str]:
    """The template of a conversation, and its special tokens and values as a JSON object."""
    known = {**tokenizer.special_tokens_map, **_values(chat.values)}
    return template(tokenizer, chat.tools), json.dumps(known, default=str)


def _calls(message: Message) -> int:
    """The number of calls in a message."""
    return len(json.loads(message.more).get("tool_calls", ())) if message.more else 0


def render(tokenizer: Any, chat: Chat, *, to_be_answered: bool = False, today: bool = False) -> str:
    """A conversation as its template writes it. Raises BadInput if the template refuses it.

    Args:
        today: whether a template that writes the date writes today's. If not, it is always the same one: the
            same data has the same tokens on every day, also in a run that is resumed on another.
    """
    dated = None if today else _dated(template(tokenizer, chat.tools)) or None
    try:
        text: str = tokenizer.apply_chat_template(
            **_given(tokenizer, chat),
            chat_template=dated,
            tokenize=False,
            add_generation_prompt=to_be_answered,
            **_values(chat.values),
        )
    except REFUSALS as error:
        roles = ", ".join(message.role for message in chat.messages)
        hint = "; change it, remove it, or give chat_template=FILE with a template that accepts it"
        raise BadInput(
            f"{_at(chat)}the chat template refuses a conversation with the roles {roles}: {error}"
            f"{hint if chat.where else ''}"
        ) from error
    return text


@functools.lru_cache(64)
def _dated(template: str) -> str:
    """A template with one fixed date in place of today's."""
    return _NOW.sub(lambda found: repr(_DATE.strftime(found[2])), template)


def answers(tokenizer: Any, chat: Chat, text: str, *, last: bool = False) -> Answers:
    """The spans of the text in which the assistant speaks.

    If the template marks spans itself (`{% generation %}`), these are used. Tool output is excluded,
    wherever the template writes it, and so are turns that must not be learnt.

    Args:
        last: only the last of its turns.
    """
    said = [number for number, message in enumerate(chat.messages) if message.role == "assistant"]
    wanted = set(said[-1:] if last else said)
    wanted -= {n for n in said if _is_silent(chat.messages[n])}
    marks = bool(_GENERATION.search(template(tokenizer, chat.tools)))
    if marks and len(wanted) == len(said):
        return Answers(_marked(tokenizer, chat), 0)
    turns = _turns(tokenizer, chat, text)
    unfound = sum(_is_written(tokenizer, chat, text, number) for number in wanted - turns.keys())
    spans = [span for number, span in turns.items() if number in wanted]
    if marks:
        marked = _marked(tokenizer, chat)
        own = [(a, b) for a, b in marked if any(a < end and begin < b for begin, end in spans)]
        return Answers(own, unfound)
    heard = [m.content.strip() for m in chat.messages if m.role == "tool" and m.content.strip()]
    if any(said in text[begin:end] for said in heard for begin, end in spans):
        spans = _without(spans, _of_tools(tokenizer, chat, text))  # Gemma 4 has it within a turn
    return Answers(spans, unfound)


def _is_silent(message: Message) -> bool:
    return called.SILENT in json.loads(message.more or "{}")


def _marked(tokenizer: Any, chat: Chat) -> list[Span]:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = _given(tokenizer, chat)
    _, (spans,) = render_jinja_template(
        [given["conversation"]], tools=given["tools"], chat_template=_dated(template(tokenizer, chat.tools)),
        return_assistant_tokens_mask=True, **{**tokenizer.special_tokens_map, **_values(chat.values)},
    )  # fmt: skip
    return list(spans)


def _turns(tokenizer: Any, chat: Chat, text: str) -> dict[int, Span]:
    """The assistant's turns that are found, by the numbers of their messages.

    A turn begins after what the template writes to prompt for an answer, and ends with what the template
    writes for the conversation up to it. If one of these is not a prefix of the whole text (some templates
    drop the reasoning of earlier turns), the turn is located by its words.
    """
    spans: dict[int, Span] = {}
    behind = 0
    for number, message in enumerate(chat.messages):
        if message.role != "assistant":
            continue
        before = render(tokenizer, chat.until(number), to_be_answered=True) if number else ""
        last = number == len(chat.messages) - 1
        until = text if last else render(tokenizer, chat.until(number + 1))
        asked, ended = number > 0 and text.startswith(before), text.startswith(until)
        words = (0, 0) if asked and ended else _words(tokenizer, chat, text, number)
        if words is None:
            continue
        begin = len(before) if asked else _begin_of_turn(tokenizer, chat, text, number, (behind, words[0]))
        behind = len(until.rstrip()) if ended else _end_of_words(tokenizer, chat, text, number, words[1])
        spans[number] = (begin, behind)
    return spans


def _words(tokenizer: Any, chat: Chat, text: str, number: int) -> Span | None:
    """What the assistant says in a message, located by what the template writes around marks in its place.

    None if the text is not the same with marks in this place: then it cannot be located.
    """
    try:
        places = _in_place_of(render(tokenizer, chat.with_marks(number)), text)
    except BadInput:  # the template depends on the replaced words
        return None
    return (places[0][1][0], places[-1][1][1]) if places else None


def _is_written(tokenizer: Any, chat: Chat, text: str, number: int) -> bool:
    """Whether what the assistant says in a message has a part in the text, wherever that is."""
    message = chat.messages[number]
    try:
        is_part = render(tokenizer, chat.with_marks(number)) != text
    except BadInput:
        is_part = True
    return is_part and not message.is_empty


def _begin_of_turn(tokenizer: Any, chat: Chat, text: str, number: int, between: Span) -> int:
    """Where a turn begins whose words do not follow its prompt: after most of that.

    Some templates prompt with the beginning of a reasoning block, but write none in earlier turns. If the
    prompt begins otherwise than the turn, it begins with its words, and with the tag before them if they
    are a thought.

    Args:
        between: the end of the turn before it, and where its words begin.
    """
    asks = _asks(tokenizer, chat, number)
    sizes = range(len(asks), len(asks) // 2, -1)
    whole = [n for n in sizes if n == len(asks) or (asks[n - 1] in "\n>]" and _TAGS.fullmatch(asks, n))]
    places = ((text.rfind(asks[:size], *between), size) for size in whole)
    opener = _opener(chat.messages[number])
    tag = re.search(rf"{re.escape(opener)}\s*\Z", text[slice(*between)]) if opener else None
    words = between[0] + tag.start() if tag else between[1]
    return next((place + size for place, size in places if place >= 0), words)


def _end_of_words(tokenizer: Any, chat: Chat, text: str, number: int, end: int) -> int:
    """The end of a turn whose words end at a known place: with what the template writes after them.

    If it writes something else after the last turn than here, calls end where the two begin to differ.
    """
    has_calls = bool(_calls(chat.messages[number]))
    immediately = _end_of_turn(tokenizer, text, end)
    if immediately > end and not has_calls:
        return immediately
    try:
        _, mark, after = render(tokenizer, chat.until(number + 1).with_marks(number)).rpartition(MARK)
    except BadInput:
        return immediately
    after = after.rstrip() if mark else ""
    if text.startswith(after, end):
        return max(end + len(after), immediately)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(after, text[end:], strict=False))
    return _end_of_turn(tokenizer, text, end + sum(1 for _ in same)) if has_calls else end


def _asks(tokenizer: Any, chat: Chat, number: int) -> str:
    """What the template writes to prompt for an assistant message."""
    before = chat.until(number)
    if not number:
        return ""
    plain, asking = render(tokenizer, before), render(tokenizer, before, to_be_answered=True)
    return asking.removeprefix(plain) if asking.startswith(plain) else ""


def _in_place_of(written: str, text: str) -> list[tuple[str, Span]]:
    """The parts of a text where another has marks for the first time; empty if the rest differs."""
    marks = list(re.finditer(rf"[a-z]+-\d+(?:-\d+)?-{MARK}", written))
    if not marks:
        return []
    begin, tail = marks[0].start(), written[marks[-1].end() :]
    end = len(text) - len(tail)
    if begin > end or not (text.startswith(written[:begin]) and text.endswith(tail)):
        return []
    around = [written[mark.end() : after.start()] for mark, after in itertools.pairwise(marks)]
    pattern = "".join(f"(.*?){re.escape(words)}" for words in around) + "(.*)"
    found = re.compile(pattern, re.DOTALL).fullmatch(text, begin, end)
    first: dict[str, Span] = {}
    for group, mark in enumerate(marks if found else [], start=1):
        assert found is not None
        first.setdefault(mark[0], found.span(group))
    return list(first.items())


def _of_tools(tokenizer: Any, chat: Chat, text: str) -> list[Span]:
    """The spans of tool output in a text, including the whitespace before it, as far as can be known."""
    others = [
        m._replace(content=f"tool-{number}-{MARK}") if m.role == "tool" else m
        for number, m in enumerate(chat.messages)
    ]
    written = render(tokenizer, chat._replace(messages=tuple(others)))
    return [(len(text[:begin].rstrip()), end) for _, (begin, end) in _in_place_of(written, text)]


def _without(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Remove from spans the parts covered by other spans."""
    found: list[Span] = []
    for begin, end in spans:
        within = [other for other in others if begin <= other[0] and other[1] <= end]
        begins, ends = [last for _, last in within], [first for first, _ in within]
        found += zip([begin, *begins], [*ends, end], strict=True)
    return found


def _opener(message: Message) -> str | None:
    """The tag before the thought in an answer's content, or nothing if it lacks; None without a thought."""
    if message.role != "assistant" or "</think>" not in message.content:
        return None
    found = _THOUGHT_INLINE.fullmatch(message.content)
    assert found is not None
    return found[1].strip()


def _with_marks(message: Message, number: int) -> Message:
    """An assistant message with marks in place of its reasoning, content and calls."""
    more = json.loads(message.more or "{}")
    for name in more.keys() & called.THOUGHT:
        more[name] = f"thought-{number}-{MARK}"
    for place, call in enumerate(more.get("tool_calls", ())):
        call["function"]["name"] = f"call-{number}-{place}-{MARK}"
    said = f"answer-{number}-{MARK}" if message.content or "tool_calls" not in more else ""
    if _opener(message) is not None and (inline := _THOUGHT_INLINE.fullmatch(message.content)):
        begins, ends, answer = inline.groups()
        said = f"{begins}thought-{number}-{MARK}{ends}{said if answer else ''}"
    return Message("assistant", said, json.dumps(more) if more else "")


def _end_of_turn(tokenizer: Any, text: str, end: int) -> int:
    """The position after the special token that follows immediately, if there is one."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    following = (t for t in (*tokenizer.all_special_tokens, *added) if text.startswith(t, end))
    return end + len(max(following, key=len, default=""))


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant turn, if there is one."""
    after = _behind_what_is_said(tokenizer)
    token = after[: _end_of_turn(tokenizer, after, 0)]
    return int(tokenizer.convert_tokens_to_ids(token)) if token else None


def end_in_words(tokenizer: Any) -> str | None:
    """What the chat template writes after an assistant turn if that does not start with a special token."""
    after = _behind_what_is_said(tokenizer).strip()
    return after if after and not _end_of_turn(tokenizer, after, 0) else None


def tokens_in_words(tokenizer: Any) -> list[str]:
    """What the chat template writes like special tokens that the tokenizer does not have, in order."""
    asked = _of_one_turn(tokenizer)
    own = {*map(str, tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens}
    return [text for text in dict.fromkeys(_LIKE_TOKENS.findall(asked)) if text not in own]


def _behind_what_is_said(tokenizer: Any) -> str:
    """What the chat template writes after an answer; empty without a template, or if it refuses."""
    _, said, after = _of_one_turn(tokenizer).rpartition(MARK)
    return after if said else ""


def _of_one_turn(tokenizer: Any) -> str:
    """What the chat template writes for a question and its answer; empty in the same cases."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return render(tokenizer, Chat((Message("user", "Who?"), Message("assistant", MARK))))
    except BadInput:  # reported when there is a conversation
        return ""
