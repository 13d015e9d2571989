"""Conversations and pairs as tokens: the model's own template, and the loss where it should be."""

from __future__ import annotations

import copy
import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from stoker.data import encoding, sources, tokens
from stoker.data import tokenizer as tokenizers
from stoker.data.documents import Document, Message, Splits
from stoker.data.sources import Source
from stoker.data.stream import Stream
from stoker.data.tokens import PackedDataset
from stoker.errors import BadInput
from stoker.language import data
from stoker.language.encoder import PROMPT, Encoder, LossOn
from tokenizers import processors

import families  # noqa: F401 (quietens transformers)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant speak') }}{% endif %}{% endfor %}"
)
# Of earlier turns the thought is left out, as Qwen 3 does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = (
    Message("user", "what is one"), Message("assistant", "it is 1"), Message("user", "and two"),
    Message("assistant", "it is 2"),
)  # fmt: skip


@pytest.fixture(scope="module")
def bare() -> Any:
    trained = tokenizers.train_tokenizer(["what is one and two it is the number"] * 3, 320)
    made = tokenizers.as_transformers(trained, max_length=256)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def of(bare: Any, template: str | None) -> Any:
    bare.chat_template = template
    return bare


def learnt(tokenizer: Any, document: Document, loss_on: LossOn = "answer") -> list[str]:
    """The stretches of text that are predicted."""
    (encoded,) = Encoder(tokenizer, loss_on)([document])
    assert encoded.has_loss is not None
    stretches: list[list[int]] = [[]]
    for token, has_loss in zip(encoded.ids, encoded.has_loss, strict=True):
        if has_loss:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(tokens) for tokens in stretches if tokens]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["it is 1<|im_end|>", "it is 2<|im_end|>"]),
        (LLAMA2, [" it is 1<|endoftext|>", " it is 2<|endoftext|>"]),
        (THINKING, ["it is 1<|im_end|>", "<think>\n\n</think>\n\nit is 2<|im_end|>"]),
    ],
)
def test_what_the_assistant_says_is_learnt_with_what_ends_it(
    bare: Any, template: str, expected: list[str]
) -> None:
    tokenizer = of(bare, template)
    assert learnt(tokenizer, Document("k", "", "", CHAT)) == expected


def test_the_token_that_ends_a_document_is_part_of_what_is_kept_in_the_cache(bare: Any) -> None:
    other = copy.deepcopy(bare)
    other.eos_token = "<|im_end|>"
    encoders = [Encoder(tokenizer, "answer") for tokenizer in (bare, other)]
    ends = [next(encoder([Document("k", "", "it is 1")])).ids[-1] for encoder in encoders]
    assert ends == [bare.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert encoders[0].fingerprint != encoders[1].fingerprint
    assert Encoder(copy.deepcopy(bare), "answer").fingerprint == encoders[0].fingerprint


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, THINKING, MARKED])
def test_turns_that_are_not_to_be_learnt_are_not(bare: Any, template: str) -> None:
    tokenizer = of(bare, template)
    first, last = learnt(tokenizer, Document("k", "", "", CHAT))
    assert "it is 1" in first
    assert "it is 2" in last
    assert learnt(tokenizer, Document("k", "", "", CHAT), "last") == [last]
    silent = CHAT[3]._replace(more='{"silent": true}')
    assert learnt(tokenizer, Document("k", "", "", (*CHAT[:3], silent))) == [first]
    assert learnt(tokenizer, Document("k", "", "", (*CHAT[:3], silent)), "last") == []
    assert len(learnt(tokenizer, Document("k", "", "", (*CHAT[:3], silent)), "all")) == 1


# Thoughts are cut out of earlier turns, whose header is written otherwise than the one that asks.
CUTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ (m.content if loop.last else m.content.split('</think>')[-1]) | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Qwen 3 does: a last answer has its thought, or an empty one; earlier ones have none.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1]"
    " if '</think>' in m.content else '' %}"
    "{% if loop.last %}<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_LAST = (  # as Mistral's: what the system says stands with the last user
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last or messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list == [] %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        (CUTS, ("say yes or no", "yes", "and is it no", "no"), ["yes<|im_end|>", "no<|im_end|>"]),
        (CUTS, ("one", "<think>two</think> 1"), ["two</think> 1<|im_end|>"]),
        (CUTS, ("one", "<think>hm</think> one", "two", "one two"), ["one<|im_end|>", "one two<|im_end|>"]),
        (
            PARTS,
            ("one", "two", "what", "<think>\nis it\n</think>\n\nit is"),
            ["two<|im_end|>", "<think>\nis it\n</think>\n\nit is<|im_end|>"],
        ),
        (
            PARTS,
            ("one", "<think>hm</think>two", "what", "<think>is it</think>it is"),
            ["two<|im_end|>", "<think>\nis it\n</think>\n\nit is<|im_end|>"],
        ),
        (
            PARTS,
            ("one", "hm\n</think>\n\ntwo", "what", "is it\n</think>\n\nit is"),
            ["two<|im_end|>", "<think>\nis it\n</think>\n\nit is<|im_end|>"],
        ),
        (SYSTEM_LAST, ("is it ok", "ok", "and no", "no"), ["ok<|endoftext|>", " no<|endoftext|>"]),
        (
            SYSTEM_LAST,
            ("is it ok", "<think>hm</think> ok", "and no", "no"),
            ["<think>hm</think> ok<|endoftext|>", " no<|endoftext|>"],
        ),
    ],
)
def test_what_the_user_says_is_never_taken_for_the_answer(
    bare: Any, template: str, said: tuple[str, ...], expected: list[str]
) -> None:
    roles = ["user", "assistant"] * 2
    chat = tuple(Message(role, text) for role, text in zip(roles, said, strict=False))
    if template is SYSTEM_LAST:
        chat = (Message("system", "be brief"), *chat)
    assert learnt(of(bare, template), Document("k", "", "", chat)) == expected


# As Phi 3: every conversation ends in its own way.
ENDS = CHATML.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"
# As Llama 2: a space stands before the token that ends a turn. Thoughts are cut out of earlier turns.
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content.split('</think>')[-1] if not loop.last else m.content }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "roles", "said", "expected"),
    [
        (
            ENDS, "uaua", ("one", "<think>\nhm\n</think>\n\ntwo", "and", "it"),
            ["<think>\nhm\n</think>\n\ntwo<|im_end|>", "it<|im_end|>\n<|endoftext|>"],
        ),
        (
            ENDS, "aua", ("<think>\nhm\n</think>\n\ntwo", "and", "it"),
            ["<think>\nhm\n</think>\n\ntwo<|im_end|>", "it<|im_end|>\n<|endoftext|>"],
        ),
        (SPACED, "aua", ("it", "one", "two"), [" it <|endoftext|>", " two <|endoftext|>"]),
        (
            SPACED, "uaua", ("one", "<think>hm</think>two", "and", "<think>is</think>it"),
            [" two <|endoftext|>", " <think>is</think>it <|endoftext|>"],
        ),
    ],
    ids=["an end of its own", "an end of its own, assistant first", "assistant first", "earlier thoughts"],
)  # fmt: skip
def test_a_turn_is_learnt_from_its_first_token_to_the_one_that_ends_it(
    bare: Any, template: str, roles: str, said: tuple[str, ...], expected: list[str]
) -> None:
    names = {"u": "user", "a": "assistant"}
    chat = tuple(Message(names[role], text) for role, text in zip(roles, said, strict=True))
    assert learnt(of(bare, template), Document("k", "", "", chat)) == expected


# As R1: the thought of no turn is written.
CUTS_ALL = CUTS.replace("m.content if loop.last else ", "")
THOUGHTS = ("<think>hm</think> two", "hm\n</think>\n\ntwo")


@pytest.mark.parametrize("answer", THOUGHTS)
def test_a_thought_in_the_answer_that_a_template_does_not_write_is_refused(bare: Any, answer: str) -> None:
    refused = r"k: .* with thoughts in content \(before </think>\), which the chat template does not write"
    chat = (Message("user", "one"), Message("assistant", answer), *CHAT[:2])
    for document in (Document("k", "", "", chat, where="k"), Document("k", "one", answer, where="k")):
        with pytest.raises(BadInput, match=refused):
            learnt(of(bare, CUTS_ALL), document)
        for template in (CUTS, PARTS, CHATML, MARKED, ENDS):
            assert learnt(of(bare, template), document)
    silent = (chat[0], chat[1]._replace(more='{"silent": true}'), *CHAT[:2])
    assert learnt(of(bare, CUTS_ALL), Document("k", "", "", silent)) == ["it is 1<|im_end|>"]


def test_what_a_template_marks_as_the_assistant_s_is_learnt_and_nothing_else(bare: Any) -> None:
    marks = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{%- generation %}{{ m.content }}<|im_end|>{% endgeneration -%}"
        "{% elif m.role == 'critic' %}{{ raise_exception('no critics') }}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    tokenizer = of(bare, marks)
    assert learnt(tokenizer, Document("k", "", "", CHAT)) == ["it is 1<|im_end|>", "it is 2<|im_end|>"]
    critic = Document("c", "", "", (Message("critic", "no"), Message("assistant", "yes")))
    with pytest.raises(BadInput, match="refuses a conversation with the roles critic, assistant: no critics"):
        learnt(tokenizer, critic)


# Tools, calls and thoughts as Qwen 3 writes them: a last answer always thinks, an earlier one never does.
CALLS = (
    "{% if tools %}<|im_start|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLED = '{"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]}'
CALL_AS_JSON = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
WRITTEN = f"<tool_call>{CALL_AS_JSON}</tool_call><|im_end|>"


def thinks(thought: str, more: str = "{}") -> str:
    return json.dumps({"reasoning_content": thought, **json.loads(more)})


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (
            (Message("user", "one and two"), Message("assistant", "", CALLED)),
            [f"<think>\n\n</think>\n\n{WRITTEN}"],
        ),
        (
            (
                Message("user", "one and two"), Message("assistant", "", CALLED), Message("tool", "3"),
                Message("assistant", "it is 3"),
            ),
            [WRITTEN, "<think>\n\n</think>\n\nit is 3<|im_end|>"],
        ),
        (
            (
                Message("user", "one and two"), Message("assistant", "ok", thinks("what is it", CALLED)),
                Message("tool", "3"), Message("assistant", "it is 3", thinks("one")),
            ),
            [
                f"<think>\nwhat is it\n</think>\n\nok{WRITTEN}",
                "<think>\none\n</think>\n\nit is 3<|im_end|>",
            ],
        ),
        (
            (
                Message("user", "one and two"), Message("assistant", "ok", thinks("what is it", CALLED)),
                Message("tool", "3"), Message("assistant", "it is 3", thinks("one")),
                Message("user", "and one"), Message("assistant", "4", thinks("two")),
            ),
            [f"ok{WRITTEN}", "it is 3<|im_end|>", "<think>\ntwo\n</think>\n\n4<|im_end|>"],
        ),
    ],
    ids=["a call", "an answer", "thoughts", "earlier thoughts"],
)  # fmt: skip
def test_calls_and_thoughts_are_learnt_and_what_tools_say_is_not(
    bare: Any, chat: tuple[Message, ...], expected: list[str]
) -> None:
    tokenizer = of(bare, CALLS)
    tools = '[{"type": "function", "function": {"name": "add"}}]'
    assert learnt(tokenizer, Document("k", "", "", chat, tools=tools)) == expected
    (encoded,) = Encoder(tokenizer, "all")([Document("k", "", "", chat, tools=tools)])
    messages = [{**m._asdict(), **json.loads(m.more or "{}")} for m in chat]
    as_others = tokenizer.apply_chat_template(
        messages, tools=json.loads(tools), tokenize=True, return_dict=False
    )
    assert encoded.ids == as_others


def test_a_template_marks_calls_too_each_with_the_tools_of_its_conversation(bare: Any) -> None:
    marks = (
        "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{%- generation %}{{ m.content }}{{ m.tool_calls[0].function | tojson if m.tool_calls }}<|im_end|>"
        "{% endgeneration -%}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    chat = (Message("user", "one"), Message("assistant", "", CALLED))
    documents = [Document("k", "", "", chat, tools=tools) for tools in ("", '[{"name": "one"}]')]
    tokenizer = of(bare, marks)
    assert [learnt(tokenizer, document) for document in documents] == [[CALL_AS_JSON + "<|im_end|>"]] * 2
    texts = [tokenizer.decode(ids) for ids, *_ in Encoder(tokenizer, "answer")(documents)]
    assert [text.startswith('{"name": "one"}') for text in texts] == [False, True]


# As DeepSeek: a call's arguments are a text; and what is said beside it is all that is written.
AS_TEXT = (
    "{% for m in messages %}{% if m.tool_calls and not m.content %}<|im_start|>assistant\n"
    "{{ m.tool_calls[0].function.name + '(' + m.tool_calls[0].function.arguments + ')' }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_calls_are_given_as_a_template_takes_them(bare: Any) -> None:
    tokenizer = of(bare, AS_TEXT)
    chat = (Message("user", "one and two"), Message("assistant", "", CALLED), Message("tool", "3"))
    said = Document("k", "", "", (*chat, Message("assistant", "it is 3")))
    assert learnt(tokenizer, said) == ['add({"a": 1, "b": 2})<|im_end|>', "it is 3<|im_end|>"]
    beside = Document("k", "", "", (*chat[:1], Message("assistant", "ok", CALLED)))
    with pytest.raises(BadInput, match="conversations with tool_calls next to content, which"):
        learnt(tokenizer, beside)


def test_arguments_are_never_learnt_as_python_has_them(bare: Any) -> None:
    plainly = AS_TEXT.replace(" + '(' + ", " ~ '(' ~ ").replace(" + ')'", " ~ ')'")
    called = json.dumps({"tool_calls": [{"function": {"name": "add", "arguments": {"a": True}}}]})
    chat = (Message("user", "one and two"), Message("assistant", "", called))
    assert learnt(of(bare, plainly), Document("k", "", "", chat)) == ['add({"a": true})<|im_end|>']
    two = json.dumps({"tool_calls": json.loads(CALLED)["tool_calls"] * 2})
    with pytest.raises(BadInput, match="conversations with several tool_calls in a message, which"):
        learnt(of(bare, plainly), Document("k", "", "", (chat[0], Message("assistant", "", two))))


# As gpt-oss: what a tool says needs the call that it looks back at, and the last answer ends in its own way.
LOOKS_BACK = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if not loop.previtem.tool_calls %}"
    "{{ raise_exception('no call') }}{% endif %}<|im_start|>{{ loop.previtem.tool_calls[0].function.name }}\n"
    "{{ m.content }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_calls_of_earlier_turns_are_found_where_tools_look_back_at_them(bare: Any) -> None:
    turn = (Message("user", "one"), Message("assistant", "", CALLED), Message("tool", "3"))
    chat = (*turn, Message("assistant", "it is 3"), *turn, Message("assistant", "it is 3 too"))
    found = learnt(of(bare, LOOKS_BACK), Document("k", "", "", chat))
    called = f"{CALL_AS_JSON}<|im_end|>"
    assert found == [called, "it is 3<|im_end|>", called, "it is 3 too<|endoftext|>"]


# As Gemma 4: what a tool says stands in the turn of the assistant, before what that says beside its call.
WITHIN = (
    "{% for m in messages %}{% set following = loop.nextitem %}{% if m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% for c in m.tool_calls or [] %}call {{ c.function | tojson }} "
    "{{ following.content if following }} {% endfor %}{{ m.content }}<|im_end|>\n"
    "{% elif m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_a_tool_says_is_not_learnt_within_a_turn_either(bare: Any) -> None:
    chat = (
        Message("user", "one and two"), Message("assistant", "ok", CALLED), Message("tool", "number 3"),
        Message("assistant", "it is 3"),
    )  # fmt: skip
    found = learnt(of(bare, WITHIN), Document("k", "", "", chat))
    assert found == [f"call {CALL_AS_JSON}", " ok<|im_end|>", "it is 3<|im_end|>"]


# As gpt-oss: what an earlier answer begins with is the template's, and the model's to write.
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}final: {% endif %}"
    "{{ m.content }}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_the_template_begins_an_answer_with_is_learnt_in_every_turn(bare: Any) -> None:
    found = learnt(of(bare, CHANNELS), Document("k", "", "", CHAT))
    assert found == ["final: it is 1<|im_end|>", "final: it is 2<|endoftext|>"]


@pytest.mark.parametrize(("more", "name"), [(CALLED, "tool_calls"), (thinks("hm"), "reasoning_content")])
def test_what_a_template_does_not_write_is_refused_not_left_out(bare: Any, more: str, name: str) -> None:
    chat = (Message("user", "one"), Message("assistant", "it", more))
    for template in (CHATML, CHATML + "{% if enable_thinking %}<think>{% endif %}{# tool_calls #}"):
        with pytest.raises(BadInput, match=f"conversations with {name}, which the chat template does no"):
            learnt(of(bare, template), Document("k", "", "", chat))


def test_the_first_word_is_learnt_though_its_space_is_the_template_s(bare: Any) -> None:
    spaced = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learnt(of(bare, spaced), Document("k", "", "", CHAT)) == [
        " it is 1<|endoftext|>", " it is 2<|endoftext|>"
    ]  # fmt: skip


@pytest.mark.parametrize("trimmed", [False, True])
def test_an_answer_s_indentation_is_learnt_though_a_tokenizer_locates_no_spaces(
    bare: Any, trimmed: bool
) -> None:
    """As those of GPT-NeoX and Cohere: a token of spaces alone begins and ends behind them."""
    tokenizer = copy.deepcopy(of(bare, CHATML))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    for answer in ("if it:\n    is\n\n        1", "  it  is", "it  ", "😀  1"):
        chat = (Message("user", "what  is "), Message("assistant", answer))
        assert learnt(tokenizer, Document("k", "", "", chat)) == [f"{answer}<|im_end|>"]


def test_the_tokens_are_those_of_the_template(bare: Any) -> None:
    tokenizer = of(bare, CHATML)
    (encoded,) = Encoder(tokenizer, "all")([Document("k", "", "", CHAT)])
    assert encoded.ids == tokenizer.apply_chat_template(
        [m._asdict() for m in CHAT], tokenize=True, return_dict=False
    )
    assert encoded.has_loss is not None
    assert all(encoded.has_loss)


def test_a_pair_goes_through_the_template_where_there_is_one(bare: Any) -> None:
    pair = Document("k", "what is one", "it is 1")
    assert learnt(of(bare, CHATML), pair) == ["it is 1<|im_end|>"]
    assert learnt(of(bare, None), pair) == ["it is 1<|endoftext|>"]
    assert learnt(of(bare, None), pair, "all") == [
        "### Question\nwhat is one\n\n### Answer\nit is 1<|endoftext|>"
    ]


def test_documents_of_every_kind_keep_their_order(bare: Any) -> None:
    tokenizer = of(bare, CHATML)
    mixed = [
        Document("0", "", "one"),
        Document("1", "", "", CHAT),
        Document("2", "two", "three"),
        Document("3", "", "four"),
    ]
    texts = [tokenizer.decode(ids) for ids, *_ in Encoder(tokenizer, "answer")(mixed)]
    assert [next(w for w in ("what", "one", "three", "four") if w in text) for text in texts] == [
        "one", "what", "three", "four",
    ]  # fmt: skip


def test_a_first_token_begins_what_has_no_template_where_the_tokenizer_adds_one(bare: Any) -> None:
    class Beginning:
        """A tokenizer as Llama's: asked for special tokens it begins with one."""

        bos_token, bos_token_id, eos_token_id, chat_template, is_fast = "<s>", 5, 6, None, True

        def __call__(self, texts: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            if isinstance(texts, str):
                return {"input_ids": [5] if add_special_tokens else []}
            return {"input_ids": [[9, 9] for _ in texts]}

        def get_vocab(self) -> dict[str, int]:
            return {}

    made = list(Encoder(Beginning(), "answer")([Document("0", "", "text"), Document("1", "p", "text")]))
    assert made[0][:2] == ([5, 9, 9, 6], None)
    assert made[1][:2] == ([5, 9, 9, 9, 9, 6], [False, False, False, True, True, True])
    held_out = [source([], [Document("0", "", "a text"), Document("1", "p", "text")], [])]
    assert data.prompts(held_out, Beginning()) == ("<s>a text", f"<s>{PROMPT.format(prompt='p')}")
    assert data.prompts(held_out, Beginning(), ["mine"]) == ("<s>mine",)


def test_conversations_without_a_template_are_refused(bare: Any) -> None:
    with pytest.raises(BadInput, match="has no chat template: give chat_template=chatml"):
        list(Encoder(of(bare, None), "answer")([Document("k", "", "", CHAT)]))


@pytest.mark.parametrize(("end", "said"), [("<|im_end|>", False), ("<end>", True), ("", False)])
def test_turns_that_end_with_words_are_warned_of(
    end: str, said: bool, bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """No generation ends there: the words are many tokens, and the token that ends texts is not learnt."""
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    tokenizer = of(bare, THINKING.replace("<|im_end|>", end))
    for documents, wanted in (([Document("k", "", "", CHAT)], said), ([Document("k", "", "a text")], False)):
        caplog.clear()
        with caplog.at_level("WARNING", "stoker"):
            data.pack([source(documents, documents, documents)], tokenizer, sequence_length=256)
        assert ("ends assistant turns with '<end>', which is not a special token" in caplog.text) == wanted


def test_what_a_template_refuses_is_said(bare: Any) -> None:
    chat = (Message("critic", "no"), Message("assistant", "yes"))
    with pytest.raises(BadInput, match="refuses a conversation with the roles critic, assistant: only user"):
        list(Encoder(of(bare, LLAMA2), "answer")([Document("k", "", "", chat)]))


LOOKS_WITHIN = "{% for m in messages %}{{ m.content.a.b if m.role == 'system' }}{% endfor %}" + CHATML
SAID = {"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("ending", "record", "template", "said"),
    [
        (
            "jsonl", {"messages": [{"role": "critic", "content": "no"}, SAID[1]]}, LLAMA2,
            "refuses a conversation with the roles critic, assistant: only user and assistant speak; change",
        ),
        (
            "jsonl", {"prompt": "one", "completion": "two", "system": "three"}, LOOKS_WITHIN,
            "a conversation with the roles system, user, assistant: 'str object' has no attribute 'a'",
        ),
        (
            "parquet", {"messages": [SAID[0], {**SAID[1], "reasoning_content": "hm"}]}, CHATML,
            "the data has conversations with reasoning_content, which the chat template does not write",
        ),
    ],
)  # fmt: skip
def test_where_stands_what_a_template_refuses_is_said(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, record: dict[str, Any],
    template: str, said: str, streaming: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / f"a.{ending}"
    records = [*[{"messages": list(SAID)}] * 6, record, *[{"messages": list(SAID)}] * 3]
    if ending == "jsonl":
        file.write_text("".join(json.dumps(each) + "\n" for each in records))
    else:
        parquet.write_table(pa.Table.from_pylist(records), file)
    found = sources.read_all(str(file), validation=0, test=0, streaming=streaming)
    place = "line 7" if ending == "jsonl" else f"row 7{' of row group 1' * streaming}"
    with pytest.raises(BadInput, match=re.escape(f"{file}, {place}: ") + f".*{said}"):
        data.pack(found, of(bare, template), sequence_length=64)


def source(*splits: list[Document]) -> Source:
    return Source("made", 1.0, Splits(*splits), fingerprint="made", description="made")


def test_answers_that_truncation_removes_are_counted_and_said(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    tokenizer = of(bare, CHATML)
    long = Document("long", "", "", (Message("user", "one two " * 30), Message("assistant", "it is")))
    short = Document("short", "", "", CHAT[:2])
    with caplog.at_level("WARNING", "stoker"):
        rows = data.pack([source([long, short], [short], [short])], tokenizer, sequence_length=32)
    assert isinstance(rows.train, PackedDataset)
    assert rows.train.statistics.dropped == 1
    assert len(rows.train) == 1
    assert "1 document is left out, as nothing remains of the answer" in caplog.text
    with pytest.raises(BadInput, match=r"^validation: no tokens are left of 1 document"):
        data.pack([source([short], [long], [short])], tokenizer, sequence_length=32)
    caplog.clear()
    with caplog.at_level("WARNING", "stoker"):
        data.pack_evaluated([source([], [long, short], [])], tokenizer, sequence_length=32)
    assert "made: 1 document is left out" in caplog.text, "evaluation data is no split"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_of_which_nothing_said_is_found_again_is_counted_and_what_helps_is_said(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    streaming: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    loud = (
        "{{ messages | length }} turns{% for m in messages %}<|im_start|>{{ m.content | upper }}{% endfor %}"
    )
    file = tmp_path / "a.jsonl"
    chat = json.dumps({"messages": [{"role": m.role, "content": m.content} for m in CHAT]}) + "\n"
    helps = "no assistant turn to learn was found: mark where"

    def packed_of(lines: str) -> None:
        file.write_text(lines)
        found = sources.read_all(str(file), validation=0, test=0, streaming=streaming)
        data.pack(found, of(bare, loud), sequence_length=64)

    with caplog.at_level("WARNING", "stoker"):
        packed_of(f'{chat}{{"text": "it is 1"}}\n{chat}')
    assert f"2 documents are left out, since {helps}" in caplog.text
    assert "increase sequence_length" not in caplog.text
    with pytest.raises(BadInput, match=rf"of 2 documents \(.* 2 nothing at all\): use .*; in 2 {helps}"):
        packed_of(chat * 2)


# What is said decides what the template writes elsewhere, so such a turn is not found.
LOUD = THINKING.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role }}{{ '!' if 'no' in m.content }}")
LAST_ONLY = "{% set messages = messages[-2:] %}" + THINKING


@pytest.mark.parametrize("streaming", [False, True])
def test_a_turn_that_is_not_found_is_counted_and_the_others_are_learnt(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    streaming: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    chat = (Message("user", "a"), Message("assistant", "no"), *CHAT)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [{"role": m.role, "content": m.content} for m in chat]}))
    lost = "train: 1 assistant turn is not found, and not learnt: mark where the chat template writes one"
    for template, unfound in ((LOUD, 1), (THINKING, 0), (LAST_ONLY, 0)):
        caplog.clear()
        found = sources.read_all(str(file), validation=0, test=0, streaming=streaming)
        with caplog.at_level("WARNING", "stoker"):
            rows = data.pack(found, of(bare, template), sequence_length=128).train
        (part,) = rows.looked_at() if isinstance(rows, Stream) else [rows]
        assert isinstance(part, PackedDataset)
        assert part.statistics.unfound_turns == unfound
        assert (lost.replace("train", "sampled part" if streaming else "train") in caplog.text) == (
            unfound > 0
        )
    assert learnt(of(bare, LOUD), Document("k", "", "", chat))[:1] == ["it is 1<|im_end|>"]
    assert len(learnt(of(bare, LOUD), Document("k", "", "", chat))) == 2


def test_turns_whose_thoughts_or_words_a_template_leaves_out_do_not_count_as_not_found(bare: Any) -> None:
    thoughts = [message._replace(content=f"<think>hm</think>{message.content}") for message in CHAT]
    chat = tuple(m if m.role == "assistant" else plain for m, plain in zip(thoughts, CHAT, strict=True))
    blank = (CHAT[0], Message("assistant", ""), *CHAT[2:])
    skips = PARTS.replace("messages %}", "messages if m.content %}", 1)
    for template, said in ((PARTS, chat), (CUTS, chat), (ENDS, chat), (skips, blank)):
        (encoded,) = Encoder(of(bare, template), "answer")([Document("k", "", "", said)])
        assert encoded.unfound == 0


def packed(cache: Path, documents: list[Document], encode: Encoder, **settings: Any) -> PackedDataset:
    return tokens.tokenise(
        documents, encode=encode, pad_id=1, vocab_size=400, sequence_length=24, cache=cache, fingerprint=(),
        **settings,
    )  # fmt: skip


def test_any_number_of_processes_makes_the_same_arrays(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_DOCUMENTS", 7)  # of a batch
    encode = Encoder(of(bare, CHATML), "answer")
    of_all_kinds = [
        [Document(f"t{n}", "", "it is one " * n), Document(f"p{n}", "one", "two " * n),
         Document(f"c{n}", "", "", CHAT[: 2 + n % 3])] for n in range(30)
    ]  # fmt: skip
    documents = [document for some in of_all_kinds for document in some]
    made = [packed(tmp_path / str(workers), documents, encode, workers=workers).folder for workers in (1, 2)]
    files = sorted(file.name for file in made[0].iterdir())
    assert files == [
        "has_loss.npy", "lengths.npy", "meta.json", "pieces.npy", "rows.npy", "tokens.npy",
    ]  # fmt: skip
    for name in files:
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes(), name

    refusing = Encoder(of(bare, None), "answer")
    with pytest.raises(BadInput, match="has no chat template"):
        packed(tmp_path / "refused", documents[-5:], refusing, workers=2)
    assert not [p for p in (tmp_path / "refused").iterdir() if p.is_dir()]
    assert not multiprocessing.active_children()


def test_another_template_or_loss_is_another_dataset(bare: Any) -> None:
    known = {
        Encoder(of(bare, template), loss_on).fingerprint
        for template in (None, CHATML, LLAMA2)
        for loss_on in ("answer", "all")
    }
    assert len(known) == 6


def test_generations_begin_with_what_asks_for_an_answer(bare: Any) -> None:
    chat, text = (
        Document("a", "", "", CHAT),
        Document("b", "", "a text of more than eight words in all of it"),
    )
    found = [source([], [text, chat], [])]
    assert data.prompts(found, of(bare, CHATML)) == (
        "<|im_start|>user\nwhat is one<|im_end|>\n<|im_start|>assistant\n",
        "a text of more than eight words in",
    )
    asked = "<|im_start|>user\nmine<|im_end|>\n<|im_start|>assistant\n"
    assert data.prompts(found, of(bare, CHATML), ["mine"]) == (asked,)
    assert data.prompts(found, of(bare, None), ["mine"]) == ("mine",)


def test_what_leaves_the_model_no_position_for_an_answer_is_not_asked(bare: Any) -> None:
    tokenizer = of(bare, None)
    documents = [Document(key, "what is " * n, "it is") for key, n in (("a", 30), ("b", 1), ("c", 2))]
    found = [source([], documents, [])]
    short = tuple(PROMPT.format(prompt=document.prompt) for document in documents[1:])
    positions = len(tokenizer(short[1])["input_ids"]) + 1
    assert data.prompts(found, tokenizer, positions=positions) == short
    with pytest.raises(
        BadInput, match=r"prompts: the one that begins with 'what is .* positions: shorten it"
    ):
        data.prompts(found, tokenizer, ["one", "what is " * 30], positions=positions)


@pytest.mark.parametrize("kind", ["texts", "pairs", "conversations"])
def test_padding_is_not_learnt_though_it_is_the_token_that_ends_documents(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    tokenizer = copy.deepcopy(of(bare, LLAMA2 if kind == "conversations" else None))
    tokenizer.pad_token = tokenizer.eos_token
    document = {
        "texts": Document("0", "", "it is"), "pairs": Document("0", "what", "it is"),
        "conversations": Document("0", "", "", CHAT[:2]),
    }[kind]  # fmt: skip
    row = data.pack([source([document], [document], [document])], tokenizer, sequence_length=64).train[0]
    real = int(row["documents"].sum())
    assert real < 64
    assert row["input_ids"][real - 1] == row["labels"][real - 1] == tokenizer.eos_token_id
    assert (row["input_ids"][real:] == tokenizer.eos_token_id).all()
    assert (row["labels"][real:] == -100).all()


def test_a_system_prompt_of_a_pair_is_asked_by_the_template_and_as_its_export_asks_it(bare: Any) -> None:
    pair = Document("k", "what is one", "it is 1", system="be brief")
    chat = Document("c", "", "", (Message("system", "be brief"), *CHAT[:1], Message("assistant", "it is 1")))
    encoded = [Encoder(of(bare, CHATML), "answer")([document]) for document in (pair, chat)]
    (by_field,), (by_message,) = encoded
    assert (by_field.ids, by_field.has_loss) == (by_message.ids, by_message.has_loss)
    without = of(bare, None)
    (plain,) = Encoder(without, "answer")([pair])
    splits = Splits([pair], [], [])
    exported = data.as_asked([Source("s", 1.0, splits, "", "")], without)
    (as_chat,) = Encoder(exported, "answer")([chat])
    assert plain.ids == as_chat.ids
    assert learnt(without, pair) == ["it is 1<|endoftext|>"]


def test_fields_that_are_not_read_are_warned_of_once_a_source(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    pairs = [
        Document(f"k{n}", "what is one", f"it is {n}", unread=("tools",) if n % 2 else ("history",))
        for n in range(6)
    ]
    splits = Splits(pairs[:4], pairs[4:5], pairs[5:])
    with caplog.at_level("WARNING", "stoker"):
        data.pack([Source("a", 1.0, splits, "f", "a")], of(bare, None), sequence_length=64)
    (said,) = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert said.startswith("data: a: the fields history, tools of its records are not read: move")


def test_pairs_without_a_prompt_among_others_are_said_to_be_plain_text(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    file = tmp_path / "a.jsonl"
    pairs = [{"prompt": f"what is {n}" * (n % 10 > 0), "completion": f"it is {n}"} for n in range(1, 41)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = sources.read_all(str(file), validation=0.2, test=0.2)
    for template, said in ((CHATML, 1), (None, 0)):
        caplog.clear()
        with caplog.at_level("WARNING", "stoker"):
            data.pack(found, of(bare, template), sequence_length=64)
        messages = [r.getMessage() for r in caplog.records if "have no prompt" in r.getMessage()]
        assert len(messages) == said


def test_a_name_of_a_speaker_is_written_by_templates_that_write_names(bare: Any) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.name + ': ' if m.name else '' }}{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    named = json.dumps({"name": "ann"})
    document = Document("k", "", "", (Message("user", "hi", named), Message("assistant", "ho", named)))
    tokenizer = of(bare, template)
    (encoded,) = Encoder(tokenizer, "answer")([document])
    assert tokenizer.decode(encoded.ids).startswith("<|user|>ann: hi<|end|><|assistant|>ann: ho<|end|>")
    assert learnt(tokenizer, document)[0].startswith("ann: ho")


def test_a_header_that_differs_from_the_prompt_is_not_learnt(bare: Any) -> None:
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{{ ' (past)' if m.role == 'assistant' else '' }}\n"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    document = Document("k", "", "", (Message("user", "hi"), Message("assistant", "ho")))
    assert [said.split("<")[0] for said in learnt(of(bare, template), document)] == ["ho"]


@pytest.mark.parametrize("streaming", [False, True])
def test_records_of_which_nothing_can_be_learnt_are_said_once_a_source(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    streaming: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    file = tmp_path / "a.jsonl"
    pairs = [{"prompt": f"what is {n}", "completion": "it is 1" * (n % 10 > 0)} for n in range(1, 41)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = sources.read_all(str(file), validation=0.2, test=0.2, streaming=streaming)
    with caplog.at_level("WARNING", "stoker"):
        data.pack(found, of(bare, CHATML), sequence_length=64)
    (said,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    looked_at = " sampled" if streaming else ""
    assert said.endswith(
        f": 4 records are left out of 40{looked_at}, with nothing to learn: the first, {file}, "
        "line 10, has no answer"
    )


def test_tools_that_the_template_does_not_write_are_warned_of(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    chats = [Document(f"k{n}", "", "", CHAT, tools='[{"name": "add"}]') for n in range(3)]
    splits = Splits(chats[:1], chats[1:2], chats[2:])
    for template, warned in ((CHATML, True), (CALLS, False)):
        caplog.clear()
        with caplog.at_level("WARNING", "stoker"):
            data.pack([Source("a", 1.0, splits, "f", "a")], of(bare, template), sequence_length=64)
        assert ("the chat template writes no tools, so the field tools of its" in caplog.text) == warned
