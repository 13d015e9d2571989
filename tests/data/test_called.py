"""Conversations with tools: every form that others write calls in is one and the same document."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from stoker.data import chunks
from stoker.data.documents import Document, Message
from stoker.data.sources import read
from stoker.errors import BadInput

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
AS_TEXT = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
ASKED, FOUND, SAID = (
    {"role": "user", "content": "is it warm"}, {"role": "tool", "name": "weather", "content": "3 C"},
    {"role": "assistant", "content": "no"},
)  # fmt: skip
EXPECTED = (
    Message("user", "is it warm"),
    Message("assistant", "", json.dumps({"tool_calls": [CALL]})),
    Message("tool", "3 C", '{"name": "weather"}'),
    Message("assistant", "no"),
)


def write_jsonl(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def conversation(call: dict[str, Any], tools: Any = TOOLS) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", **call}, FOUND, SAID], "tools": tools}


def only(file: Path) -> Document:
    (document,) = read(str(file)).documents
    return document


@pytest.mark.parametrize(
    "record",
    [
        conversation({"content": "", "tool_calls": [CALL]}),
        conversation({"content": None, "tool_calls": [AS_TEXT]}, json.dumps(TOOLS)),
        conversation({"tool_calls": [CALL["function"]]}, [WEATHER]),
        conversation({"content": "", "function_call": AS_TEXT["function"]}),
    ],
    ids=["transformers", "OpenAI", "bare", "one call"],
)
def test_a_call_is_read_as_it_is_written_by_others(tmp_path: Path, record: dict[str, Any]) -> None:
    document = only(write_jsonl(tmp_path / "a.jsonl", [record]))
    assert document.messages == EXPECTED
    assert json.loads(document.tools) == TOOLS
    assert document.unread == ()


def test_every_speaker_can_have_a_name(tmp_path: Path) -> None:
    roles = ("system", "user", "assistant")
    turns = [{"role": role, "content": "a", "name": f"{role} 1"} for role in roles]
    document = only(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]))
    assert document.messages == tuple(Message(role, "a", json.dumps({"name": f"{role} 1"})) for role in roles)
    assert Message("assistant", "", '{"name": "ann"}').is_empty


def test_turns_of_calls_and_observations_are_read(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "is it warm"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
        {"from": "observation", "value": "3 C"},
        {"from": "gpt", "value": "no"},
    ]
    document = only(write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns, "tools": "[]"}]))
    assert document.messages == (*EXPECTED[:2], Message("tool", "3 C"), EXPECTED[3])
    assert document.tools == ""


def test_what_a_column_has_no_value_for_is_left_out(tmp_path: Path) -> None:
    time = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    record = conversation({"content": "", "tool_calls": [CALL, time]})
    parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    stored = parquet.read_table(tmp_path / "a.parquet").to_pylist()[0]["messages"][1]["tool_calls"][0]
    assert stored["function"]["arguments"] == {"city": "Bern", "zone": None}
    found = json.loads(only(tmp_path / "a.parquet").messages[1].more)
    assert found == {"tool_calls": [CALL, time]}


def test_what_was_thought_is_kept_beside_what_is_said(tmp_path: Path) -> None:
    turns = [ASKED, {**SAID, "reasoning_content": "3 C is cold"}]
    document = only(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]))
    assert document.messages[1] == Message("assistant", "no", '{"reasoning_content": "3 C is cold"}')


def test_other_calls_and_other_tools_are_other_data_and_plain_conversations_as_they_were(
    tmp_path: Path,
) -> None:
    plain = {"messages": [ASKED, SAID]}
    other = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Thun"}}}
    records = [
        plain, conversation({"tool_calls": [CALL]}), conversation({"tool_calls": [other]}),
        conversation({"tool_calls": [CALL]}, []),
    ]  # fmt: skip
    found = [read(str(write_jsonl(tmp_path / "a.jsonl", [record]))) for record in records]
    assert len({corpus.fingerprint for corpus in found}) == 4
    keys = [corpus.documents[0].key for corpus in found]
    assert keys[1] == keys[3], "a document stays in its split"
    assert len(set(keys)) == 3


def test_they_are_the_same_streamed_and_from_the_cache(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [conversation({"tool_calls": [CALL]})])
    stream = chunks.find(str(file))
    assert [stream.kept(0), stream.kept(0)] == [read(str(file)).documents] * 2


def test_a_null_that_is_meant_is_kept_and_an_object_of_nulls_is_none(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"a": None, "b": 1}}
    turns = [{"from": "function_call", "value": json.dumps(call)}, {"from": "gpt", "value": "no"}]
    found = [
        json.loads(only(write_jsonl(tmp_path / "a.jsonl", [record])).messages[at].more)["tool_calls"][0]
        for record, at in ((conversation({"tool_calls": [call]}), 1), ({"conversations": turns}, 0))
    ]
    assert [one["function"] for one in found] == [call, call]
    nothing = {"name": None, "arguments": None}
    said = {
        "role": "assistant",
        "content": "no",
        "function_call": nothing,
        "tool_calls": [{"function": nothing}],
    }
    messages = [{**ASKED, "function_call": None, "tool_calls": None}, said]
    rows = [{"messages": messages}, conversation({"content": "", "function_call": call, "tool_calls": None})]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(str(tmp_path / "a.parquet")).documents
    assert first.messages == (EXPECTED[0], EXPECTED[3])
    assert json.loads(second.messages[1].more)["tool_calls"][0]["function"]["arguments"] == {"b": 1}


def test_columns_of_times_and_maps_and_calls_without_arguments_are_read(tmp_path: Path) -> None:
    def arguments(given: Any, kind: pa.DataType) -> Any:
        call = pa.struct([("function", pa.struct([("name", pa.string()), ("arguments", kind)]))])
        message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
        made = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}]
        table = pa.table({"messages": pa.array([made], pa.list_(message))})
        parquet.write_table(table, tmp_path / "a.parquet")
        said = json.loads(only(tmp_path / "a.parquet").messages[0].more)
        return said["tool_calls"][0]["function"]["arguments"]

    day = datetime.datetime(2026, 1, 2, 3, 4)
    assert arguments({"at": day}, pa.struct([("at", pa.timestamp("s"))])) == {"at": "2026-01-02T03:04:00"}
    assert arguments([("a", "b")], pa.map_(pa.string(), pa.string())) == {"a": "b"}
    assert arguments(None, pa.struct([("a", pa.string())])) == {}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (conversation({"tool_calls": [{"name": "f", "arguments": "3"}]}), "must be an object: 3"),
        (conversation({"tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]}), "not valid Unicode"),
        (conversation({"tool_calls": [CALL]}, [{"name": "\ud83d"}]), "'tools': not valid Unicode"),
        ({"messages": [ASKED, {**SAID, "thinking": "\ud83d"}]}, "message 2: not valid Unicode"),
        (conversation({"tool_calls": [{"function": {"arguments": {}}}]}), "message 2: a call must be"),
        (
            conversation({"tool_calls": {"name": "weather"}}),
            "message 2: 'tool_calls' must be a list of calls",
        ),
        (
            conversation({"tool_calls": [{"name": "weather", "arguments": "Bern"}]}),
            "message 2: 'arguments' of a call must be JSON: 'Bern'",
        ),
        (conversation({"tool_calls": [CALL]}, "weather"), "line 1: 'tools' must be JSON: 'weather'"),
        (conversation({"tool_calls": [CALL]}, ["weather"]), "'tools' must be a list of JSON schemas"),
        ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "'value' must be JSON"),
        ({"messages": [ASKED, {**SAID, "thinking": ["3"]}]}, "the field 'thinking' must be a string"),
    ],
)
def test_calls_that_cannot_be_read_are_refused_with_where(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=r"a\.jsonl, line 1") as refused:
        read(str(write_jsonl(tmp_path / "a.jsonl", [record])))
    assert message in str(refused.value)


@pytest.mark.parametrize("field", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_message_that_says_so_is_not_to_be_learnt(tmp_path: Path, field: dict[str, Any]) -> None:
    said = [ASKED, {**SAID, **field}, ASKED, {**SAID, "weight": 1, "train": True}]
    found = only(write_jsonl(tmp_path / "a.jsonl", [{"messages": said}]))
    assert [message.more for message in found.messages] == ["", '{"silent": true}', "", ""]
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **field}]
    found = only(write_jsonl(tmp_path / "b.jsonl", [{"conversations": sharegpt}]))
    assert found.messages[1].more == '{"silent": true}'


def test_of_a_prompt_of_messages_the_completion_alone_is_to_be_learnt(tmp_path: Path) -> None:
    prompt = [ASKED, SAID, ASKED, {**SAID, "weight": None}, ASKED]
    found = only(write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": [SAID]}]))
    silent = '{"silent": true}'
    assert [message.more for message in found.messages] == ["", silent, "", silent, "", ""]


@pytest.mark.parametrize("field", [{"weight": 0.5}, {"train": "no"}])
def test_half_a_weight_is_refused(tmp_path: Path, field: dict[str, Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": [ASKED, {**SAID, **field}]}])
    with pytest.raises(
        BadInput, match=r"message 2: its (weight|train) is .*: must be .* \(learn the message\) or"
    ):
        read(str(file))
