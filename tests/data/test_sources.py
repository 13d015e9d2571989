"""Reading files of every kind, and what is said of those that cannot be read."""

from __future__ import annotations

import csv
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from stoker.data import chunks, sources
from stoker.data.sources import read
from stoker.errors import BadInput

PAIRS = [
    {"prompt": "a", "completion": "b"},
    {"question": "a", "answer": "b"},
    {"instruction": "a", "output": "b"},
    {"instruction": "a", "input": "", "output": "b"},
    {"instruction": "a", "input": None, "output": "b", "text": "a b"},
]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def packed(name: str, content: bytes) -> bytes:
    """Compressed as the ending says."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    return pa.Codec(codec).compress(content, asbytes=True) if codec else content


def refused(path: Path | str) -> str:
    with pytest.raises(BadInput) as caught:
        read(str(path))
    return str(caught.value)


@pytest.mark.parametrize("record", PAIRS)
def test_pairs_are_read_in_every_form(tmp_path: Path, record: dict[str, Any]) -> None:
    (document,) = read(str(write_jsonl(tmp_path / "a.jsonl", [record]))).documents
    assert (document.prompt, document.text) == ("a", "b")


def test_an_input_is_added_to_its_instruction(tmp_path: Path) -> None:
    record = {"instruction": "Translate.", "input": "eau", "output": "water"}
    (document,) = read(str(write_jsonl(tmp_path / "a.jsonl", [record]))).documents
    assert document.prompt == "Translate.\n\neau"


def test_plain_text_and_blank_lines_of_a_jsonl_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "één"}\n\n{"text": " "}\n{"text": "two", "id": 3}', encoding="utf-8")
    assert [d.text for d in read(str(path)).documents] == ["één", "two"]


def test_a_parquet_file_reads_as_the_same_jsonl(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    columns, lines = read(str(tmp_path / "a.parquet")), read(str(write_jsonl(tmp_path / "a.jsonl", records)))
    assert columns.documents == lines.documents
    assert columns.fingerprint == lines.fingerprint


def test_the_fingerprint_is_of_the_content_and_not_of_the_path(tmp_path: Path) -> None:
    first = read(str(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])))
    assert first.fingerprint == read(str(write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}]))).fingerprint
    assert first.fingerprint != read(str(write_jsonl(tmp_path / "c.jsonl", [{"text": "y"}]))).fingerprint


def test_a_txt_is_split_at_two_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\nmore\n\n\ntwo\n \n\n\nthree\r\n")
    assert [d.text for d in read(str(path)).documents] == ["one\n\nmore", "two", "three"]


def test_a_txt_without_such_lines_is_chopped_at_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "word " * 100 for i in range(40)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = read(str(path)).documents
    assert all(1000 < len(d.text) <= 2000 for d in documents[:-1])
    assert " ".join(" ".join(d.text for d in documents).split()) == " ".join(" ".join(paragraphs).split())


@pytest.mark.parametrize("name", ["none.jsonl", "folder/none.txt", "none.csv", "./none", "/none/none"])
def test_a_missing_file_is_named(name: str) -> None:
    assert refused(name) == f"data file {name} does not exist"


def test_a_folder_is_all_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "two.jsonl").write_text('{"prompt": "p", "completion": "second"}\n')
    (tmp_path / "README.md").write_text("not data")
    assert [d.text for d in read(str(tmp_path)).documents] == ["first", "second"]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text('{"about": "the data"}')
    assert "is a folder without a .jsonl, .json, .csv, .tsv, .txt or .parquet file" in refused(tmp_path)


def test_the_first_file_of_a_folder_that_holds_something_is_looked_at_beforehand(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.json").write_text('[{"about": "no data, which in a folder is no mistake"}]')
    (tmp_path / "c.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(BadInput, match=r"c.jsonl, line 1: no known field"):
        sources.check({"data": str(tmp_path)})


def test_of_a_large_file_only_the_beginning_is_looked_at_beforehand(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(200)])
    with lines.open("a") as file:
        file.write("{no JSON\n")
    sources.check({"data": str(lines)})
    assert "line 201: not JSON" in refused(lines)
    whole = tmp_path / "a.json"
    whole.write_bytes(b"[" + b" " * 20 * 2**20)
    sources.check({"data": str(whole)})
    assert "not JSON" in refused(whole)
    whole.write_bytes(b"[")
    with pytest.raises(BadInput, match=r"a\.json: not JSON"):
        sources.check({"data": str(whole)})


def test_what_is_evaluated_on_is_read_whole_and_nothing_is_held_out_for_it(tmp_path: Path) -> None:
    names = {}
    for name, numbers in {"data": range(40), "held": range(35, 45), "other": range(100, 103)}.items():
        names[name] = str(tmp_path / f"{name}.jsonl")
        Path(names[name]).write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in numbers))
    shares = {"validation": 0.2, "test": 0.2}
    both = f"{names['held']},{names['other']}"
    for streaming in (False, True):
        found = sources.read_all(names["data"], **shares, streaming=streaming, validation_data=both)
        assert [(s.key, s.name) for s in found] == [
            ("data", "data"), ("validation_data", "held"), ("validation_data", "other"),
        ]  # fmt: skip
        trained, held, other = (source.splits for source in found)
        assert [trained.validation, held.train, held.test, other.train, other.test] == [[]] * 5
        assert len(trained.train) + len(trained.test) == 40
        assert trained.test
        assert found[0].held_out == (0.2 if streaming else 0)
        assert (len(held.validation), len(other.validation)) == (10, 3)
        documents = {document.text for document in trained.train}
        assert sources.repeated(found) == {
            "validation_data": sum(document.text in documents for document in held.validation)
        }
        alone = sources.read_all(
            names["data"], **shares, streaming=streaming, validation_data=names["held"],
            test_data=names["other"],
        )  # fmt: skip
        assert len(alone[0].splits.train) == 40
        assert alone[0].held_out == 0
        assert alone[0].fingerprint == found[0].fingerprint
        assert len(alone[2].splits.test) == 3
        assert sources.repeated(alone) == {"validation_data": 5}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a.jsonl:3,b.jsonl", "validation_data=a.jsonl:3,b.jsonl: evaluation data takes no weights: "
         "use validation_data=a.jsonl,b.jsonl"),
        ("a.jsonl,", "validation_data=a.jsonl,: a name is missing: write a.jsonl,b.jsonl"),
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_on_is_refused_by_its_key(data: str, said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        sources.check({"validation_data": data})


def test_a_source_says_how_much_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    first = write_jsonl(folder / "a.jsonl", [{"text": f"{i:050}"} for i in range(100)])
    assert read(str(folder)).description == "texts, 1 file, 100 documents"
    (streamed,) = sources.read_all(str(first), validation=0.2, test=0.2, streaming=True)
    assert streamed.description == f"{first}, 6.2 KiB in 1 file, read while training"
    write_jsonl(folder / "b.jsonl", [{"text": "more"}])
    assert read(str(folder)).description == "texts, 2 files, 101 documents"
    assert read(str(folder / "b.jsonl")).description == "b.jsonl, 1 document"


def test_a_stream_of_which_nothing_can_be_held_out_is_evaluated_on_other_data(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "one huge document"}\n')
    name = str(tmp_path / "one.jsonl")
    with pytest.raises(BadInput, match=r"validation=0 test=0 and validation_data=FILE test_data=FILE"):
        sources.read_all(name, validation=0.1, test=0.1, streaming=True)
    (source,) = sources.read_all(name, validation=0.0, test=0.0, streaming=True)
    assert len(source.splits.train) == 1


CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]},
    {"messages": [{"role": "User", "content": "hi"}, {"role": "AI", "content": "ho"}]},
    {"conversation": [{"from": "HUMAN", "value": "hi"}, {"from": "Bot", "value": "ho"}]},
    {"messages": [{"role": "human", "content": "hi"}, {"role": "model", "content": "ho"}]},
    {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "ho"},
    ]},
]  # fmt: skip


@pytest.mark.parametrize("record", CHATS)
def test_conversations_are_read_in_every_form(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (document,) = read(str(tmp_path / "a.jsonl")).documents
    assert [m.parts for m in document.messages] == [("user", "hi"), ("assistant", "ho")]
    assert (document.prompt, document.text) == ("", "")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [{"content": "hi"}, {"role": "assistant", "content": "ho"}],
            "line 1, message 1: has no 'role'; its fields are 'content'",
        ),
        ([{"role": "assistant", "text": "ho"}], "line 1, message 1: has no 'content'"),
        (
            [{"speaker": "user", "utterance": "hi"}],
            "message 1: has no 'role'; its fields are 'speaker', 'utterance'; map its names with columns, as "
            "in columns='{messages: ..., role: speaker, content: utterance}'",
        ),
        (
            [{"role": "user", "content": 3}],
            "message 1: the field 'content' must be a string, not a number (3)",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a part that is not text"),
        (["hi"], "message 1: must be an object with 'role' and 'content', not a string"),
    ],
)
def test_a_bad_message_is_named(tmp_path: Path, messages: list[Any], said: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert said in refused(tmp_path / "a.jsonl")


def test_a_conversation_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    found = set()
    for number, record in enumerate([CHATS[0], json.loads(json.dumps(CHATS[0]).replace("ho", "no"))]):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record) + "\n")
        found.add(read(str(tmp_path / f"{number}.jsonl")).fingerprint)
    assert len(found) == 2


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("text\nx\n")
    assert "unknown file extension: give a .jsonl, .json, .csv, .tsv, .txt" in refused(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.txt", " \n"), ("b.jsonl", '\n{"text": ""}\n')]
)
def test_an_empty_dataset_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert "is an empty dataset" in refused(tmp_path / name)


def said_in_turn(*said: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(said)
    return {"messages": [{"role": r, "content": text} for r, text in zip(roles, said, strict=False)]}


UNLEARNABLE: list[tuple[dict[str, Any], str]] = [
    ({"text": " \n"}, "no text"),
    ({"prompt": "a", "completion": ""}, "no answer"),
    ({"messages": []}, "no text"),
    (said_in_turn("a", ""), "nothing that the assistant says"),
    (said_in_turn("a"), "no message with the role assistant (its roles are user)"),
    ({"messages": [{"role": "assistant", "content": "", "train": False}]}, "nothing that the assistant says"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("record", "lacking"), UNLEARNABLE)
def test_records_of_which_nothing_can_be_learnt_are_left_out_and_counted(
    tmp_path: Path, record: dict[str, Any], lacking: str, streaming: bool
) -> None:
    fine = [said_in_turn("a", f"{n}", "b", "") for n in range(20)]
    file = write_jsonl(tmp_path / "a.jsonl", [*fine[:3], record, record, *fine[3:]])
    (found,) = sources.read_all(str(file), validation=0, test=0, streaming=streaming)
    assert len(found.splits.train) == 20
    (left,) = found.left_out
    assert (left.records, left.of, left.first) == (2, 22, f"{file}, line 4")
    assert left.lacking == lacking
    file = write_jsonl(tmp_path / "b.jsonl", [record] * 3)
    said = re.escape(f"nothing can be learnt from 3 records; the first, {file}, line 1, has {lacking}")
    with pytest.raises(BadInput, match=said):
        sources.read_all(str(file), validation=0, test=0, streaming=streaming)


def test_what_is_left_out_is_said_of_each_file_and_of_what_is_evaluated_on(tmp_path: Path) -> None:
    both = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}, {"text": ""}]) for name in "ab"]
    rows = [{"prompt": "a", "completion": text} for text in ("b", "", "c")]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    trained, held = sources.read_all(
        f"{both[0]},{both[1]}", validation=0, test=0, validation_data=str(tmp_path / "c.parquet")
    )
    assert [left.first for left in trained.left_out] == [f"{file}, line 2" for file in both]
    assert held.left_out == ((1, 3, f"{tmp_path / 'c.parquet'}, row 2", "no answer"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{text: 1}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
        ('["text"]', 'a record must be a JSON object such as {"text": ...}, not a list'),
        ("3", 'a record must be a JSON object such as {"text": ...}, not a number (3)'),
        ('{"text": 3}', "the field 'text' must be a string, not a number (3)"),
        ('{"prompt": "a", "completion": null}', "the field 'completion' must be a string, not null"),
        ('{"text": "\\ud800"}', "the field 'text' is not valid Unicode: surrogates not allowed"),
        (
            '{"body": "a", "prompt": "b"}',
            "no known field; the record's fields are 'body', 'prompt'; known formats are "
            '{"text"}, {"prompt", "completion"}, {"question", "answer"}, '
            '{"instruction", "output"} with an optional "input", or {"messages": [{"role", "content"}]}',
        ),
        ("{}", "no known field; the record's fields are none; "),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}',
            "a preference, 'chosen' over 'rejected': there is no DPO or reward modelling here; to train on "
            "the chosen answers alone, as in columns='{prompt: prompt, completion: chosen}'",
        ),
        ('{"conversations": "hi"}', "'conversations' must be a list of messages, not a string"),
        ("[" * 100_000, "not usable JSON: nested too deeply"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert refused(path).startswith(f"{path}, line 2: {message}")


@pytest.mark.parametrize(
    ("record", "columns", "read_as"),
    [
        ({"query": "a", "response": "b"}, "{prompt: query, completion: response}", ("a", "b", "")),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            "{instruction: instruction, input: context, output: response}", ("a\n\nc", "b", ""),
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            "{prompt: question, completion: response, system: system_prompt}", ("a", "b", "s"),
        ),
        ({"content": "b", "repository": "x"}, "{text: content}", ("", "b", "")),
        (
            {"chosen": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "rejected": []},
            "{messages: chosen}", ("", "", ""),
        ),
    ],
)  # fmt: skip
def test_a_record_of_another_form_is_answered_with_the_columns_that_would_read_it(
    tmp_path: Path, record: dict[str, Any], columns: str, read_as: tuple[str, str, str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    assert refused(path).endswith(f"as in columns='{columns}'")
    named = dict(pair.split(": ") for pair in columns.strip("{}").split(", "))
    (document,) = read(str(path), named).documents
    assert (document.prompt, document.text, document.system) == read_as
    assert bool(document.messages) == ("messages" in named)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    assert re.search(r"line 2: not UTF-8: byte 0xe9 at offset 10", refused(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8: byte 0xe9 at offset 3" in refused(tmp_path / "a.txt")


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("text")
    assert "is not a Parquet file" in refused(tmp_path / "a.parquet")


def test_a_parquet_row_without_a_text_is_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    assert "a.parquet, row 2: the field 'text' must be a string, not null" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["org/no-such-dataset", "python-doc"])
def test_a_dataset_that_cannot_be_reached_is_refused_with_the_reason(name: str) -> None:
    message = refused(name)
    assert f"{name} is not a local file" in message
    assert re.search(
        "cannot be loaded as a hub dataset: .|hub cannot be reached \\(.", message
    )  # offline, or asked
    assert ("did you mean 'python-docs'?" in message) == (name == "python-doc")


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "lines.json", "array.json.zst"]
)
def test_a_compressed_file_and_a_json_array_read_as_the_same_jsonl(tmp_path: Path, name: str) -> None:
    records = [{"instruction": f"p{i}", "output": f"c{i} \N{SNOWMAN}"} for i in range(20)]
    lines = write_jsonl(tmp_path / "plain.jsonl", records)
    content = lines.read_bytes() if "lines" in name else json.dumps(records, indent=2).encode()
    content = content if ".json" in Path(name).suffixes else lines.read_bytes()
    (tmp_path / name).write_bytes(packed(name, content[:100]) + packed(name, content[100:]))
    assert read(str(tmp_path / name)).documents == read(str(lines)).documents


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_a_table_reads_as_the_same_jsonl(tmp_path: Path, name: str, delimiter: str) -> None:
    records = [{"prompt": f'p "{i}",\t{i}', "completion": f"c{i}\n\N{SNOWMAN}"} for i in range(20)]
    lines = write_jsonl(tmp_path / "plain.jsonl", records)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    (tmp_path / name).write_bytes(packed(name, b"\xef\xbb\xbf" + table.getvalue().encode()))
    assert read(str(tmp_path / name)).documents == read(str(lines)).documents


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text\na\nb,c\n", "a.csv, record 2: more fields than the header line names"),
        (b'text\n"a\n', "a.csv, line 1: not valid CSV: unexpected end of data"),
        (b"text\ncaf\xe9\n", "a.csv: not UTF-8 after record 0"),
        (b"prompt,completion\na\n", "a.csv, record 1: "),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert said in refused(tmp_path / "a.csv")


def test_a_text_is_read_compressed_and_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(packed("a.txt.gz", b"one\n\n\ntwo\n\n\nthree"))
    assert [document.text for document in read(str(tmp_path)).documents] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz cannot be decompressed: "),
        (
            "a.jsonl.zst",
            packed("a.zst", b'{"text": "a"}\n' * 500)[:-5],
            "a.jsonl.zst cannot be decompressed: ",
        ),
        ("a.jsonl.gz", packed("a.gz", b'{"text": "a"}\n' * 500)[:-12], "a.jsonl.gz cannot be decompressed: "),
        ("a.json", b'[{"text": "a"},\n {text: 2}]', "a.json: not JSON: .* \\(line 2, column 3\\)"),
        ("a.json", b'[{"text": "a"}, {"text": 2}]', "a.json, record 2: the field 'text' must be a string"),
        ("a.json", b'{"data": [{"text": "a"}]}', "a.json, record 1: no known field"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(tmp_path / name))


REPLIES = [{"q": f"what is {n}", "a": f"it is {n}", "who": "be brief", "text": "other"} for n in range(40)]
NAMED = {"prompt": "q", "completion": "a", "system": "who"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.gz"])
def test_fields_are_read_under_the_names_that_the_data_have(tmp_path: Path, name: str) -> None:
    lines = write_jsonl(tmp_path / "lines.jsonl", REPLIES)
    if name == "a.parquet":
        parquet.write_table(pa.Table.from_pylist(REPLIES), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(packed(name, lines.read_bytes()))
    found = read(str(tmp_path / name), NAMED).documents
    assert [(d.prompt, d.text, d.system) for d in found] == [(r["q"], r["a"], r["who"]) for r in REPLIES]
    stream = chunks.find(str(tmp_path / name), NAMED)
    assert [document for number in range(len(stream)) for document in stream.kept(number)] == found
    assert stream.fingerprint != chunks.find(str(tmp_path / name)).fingerprint
    assert pickle.loads(pickle.dumps(stream)) == stream  # its readers are other processes


DIALOGS = [
    {
        "dialog": [
            {"speaker": "Human", "utterance": f"what is {n}"},
            {"speaker": "bot", "utterance": f"it is {n}", "weight": n % 2},
        ],
        "persona": "be brief",
    }
    for n in range(4)
]
OF_DIALOGS = {"messages": "dialog", "role": "speaker", "content": "utterance", "system": "persona"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_turns_are_read_under_the_names_that_the_data_have(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        parquet.write_table(pa.Table.from_pylist(DIALOGS), tmp_path / name)
    else:
        write_jsonl(tmp_path / name, DIALOGS)
    found = read(str(tmp_path / name), OF_DIALOGS).documents
    assert len(found) == 4
    for n, document in enumerate(found):
        silent = () if n % 2 else ('{"silent": true}',)
        assert [message.parts for message in document.messages] == [
            ("system", "be brief"), ("user", f"what is {n}"), ("assistant", f"it is {n}", *silent)
        ]  # fmt: skip
    stream = chunks.find(str(tmp_path / name), OF_DIALOGS)
    assert [document for number in range(len(stream)) for document in stream.kept(number)] == found
    pairs = [{"a": [turn], "b": [answer]} for turn, answer in (record["dialog"] for record in DIALOGS)]
    columns = {"prompt": "a", "completion": "b", "role": "speaker", "content": "utterance"}
    (document, *_) = read(str(write_jsonl(tmp_path / "b.jsonl", pairs)), columns).documents
    assert [message.role for message in document.messages] == ["user", "assistant"]


def test_turns_of_other_names_are_answered_with_the_columns_that_read_them(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", DIALOGS)
    assert "as in columns='{messages: dialog, role: speaker, content: utterance}'" in refused(file)
    with pytest.raises(BadInput, match="columns: 'role' is a field of messages: name messages too"):
        sources.check({"data": str(file)}, {"text": "persona", "role": "speaker"})


def test_roles_that_nobody_knows_are_said(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "a"} for role in ("hero", "user", "Narrator")]
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"messages": turns}, {"messages": turns[:1]}])
    assert (
        f"the assistant says nothing in 3 records, and {file}, line 2 "
        "has the unknown roles hero, Narrator: name the roles system, user (or human), "
        "assistant (or gpt, ai, bot, model) and tool"
    ) in refused(file)


def test_what_is_named_is_read_of_all_data_and_nothing_else_of_them(tmp_path: Path) -> None:
    trained, held = (write_jsonl(tmp_path / f"{name}.jsonl", REPLIES) for name in ("a", "b"))
    found = sources.read_all(
        str(trained), validation=0.1, test=0.1, validation_data=str(held), columns={"text": "a"}
    )
    documents = [d for source in found for d in (*source.splits.train, *source.splits.validation)]
    assert {(d.prompt, d.system) for d in documents} == {("", "")}
    assert {d.text for d in documents} == {record["a"] for record in REPLIES}


def test_each_source_can_name_its_own_fields(tmp_path: Path) -> None:
    """Those for all sources are for the ones that name none; whether joined, weighted or streamed."""
    records = ({"q": "a", "said": "b"}, {"body": "c"}, {"c": "d"})
    a, b, c = (
        str(write_jsonl(tmp_path / f"{n}.jsonl", [r] * 40)) for n, r in zip("abc", records, strict=True)
    )
    columns = {"text": "c", a: {"prompt": "q", "completion": "said"}, b: {"text": "body"}}
    read_as = {("a", "b"), ("", "c"), ("", "d")}
    for data, streaming in (
        (f"{a},{b},{c}", False),
        (f"{a}:1,{b}:1,{c}:1", False),
        (f"{a}:1,{b}:1,{c}:1", True),
    ):
        found = sources.read_all(data, validation=0, test=0, streaming=streaming, columns=columns)
        assert {(d.prompt, d.text) for source in found for d in source.splits.train} == read_as
    found = sources.read_all(a, validation=0, test=0, validation_data=f"{b},{c}", columns=columns)
    assert {
        (d.prompt, d.text) for s in found for part in (s.splits.train, s.splits.validation) for d in part
    } == read_as
    sources.check({"data": f"{a},{b},{c}"}, columns=columns)
    with pytest.raises(BadInput, match="no field 'c', which columns names"):
        sources.check({"data": f"{a},{b},{c}"}, columns={k: v for k, v in columns.items() if k != b})


def test_names_that_nothing_has_are_refused(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", REPLIES))
    with pytest.raises(BadInput, match=r"line 1: no field 'b', which columns names; .* 'q', 'a'"):
        read(file, {"prompt": "q", "completion": "b"})
    wrong = {"prompts": "q", "completion": "a"}
    for columns in (wrong, {file: wrong}):
        with pytest.raises(BadInput, match="no record format has a field 'prompts'; did you mean 'prompt'"):
            sources.read_all(file, validation=0.1, test=0.1, columns=columns)
        with pytest.raises(BadInput, match="no record format has a field 'prompts'; did you mean 'prompt'"):
            sources.check({"data": file}, columns)
    with pytest.raises(
        BadInput, match=r"columns: 'a.json' is not a source of the data; did you mean 'a.jsonl"
    ):
        sources.check({"data": "a.jsonl,b"}, {"a.json": wrong})
    assert read(file, {"text": "a", "system": "persona"}).documents  # what may be there need not


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BRIEF = {"role": "system", "content": "be brief"}


def test_a_system_field_of_a_conversation_is_its_first_message(tmp_path: Path) -> None:
    beside = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS, "system": "be brief"}])
    within = write_jsonl(tmp_path / "b.jsonl", [{"messages": [BRIEF, *TURNS]}])
    assert read(str(beside)).documents == read(str(within)).documents
    own = write_jsonl(tmp_path / "c.jsonl", [{"messages": [BRIEF, *TURNS], "system": "be long"}])
    assert read(str(own)).documents == read(str(within)).documents


@pytest.mark.parametrize("record", PAIRS)
def test_a_system_field_of_a_pair_is_its_system_prompt_and_leaves_its_split(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    plain, told = (
        read(str(write_jsonl(tmp_path / "a.jsonl", [{**record, "system": said}])))
        for said in ("", "be brief")
    )
    (before,), (after,) = plain.documents, told.documents
    assert (before.system, after.system) == ("", "be brief")
    assert before.key == after.key
    assert plain.fingerprint != told.fingerprint


def test_linked_folders_are_read_and_hidden_files_are_not(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (folder := tmp_path / "data").mkdir()
    (hidden := folder / ".ipynb_checkpoints").mkdir()
    for place, text in ((elsewhere, "linked"), (folder, "own"), (hidden, "hidden")):
        write_jsonl(place / "a.jsonl", [{"text": text}])
    (folder / "more").symlink_to(elsewhere)
    assert [document.text for document in read(str(folder)).documents] == ["own", "linked"]


def test_an_input_without_an_instruction_is_the_prompt(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "", "input": "add 1", "output": "2"}])
    (document,) = read(str(file)).documents
    assert (document.prompt, document.text) == ("add 1", "2")


def test_a_system_field_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS, "system": {"a": 1}}])
    assert refused(file).endswith("line 1: the field 'system' must be a string, not an object")


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"messages": TURNS, "functions": [{"name": "f"}], "id": 3, "source": "web"}, ("functions",)),
        ({"instruction": "a", "output": "b", "tools": [{"name": "f"}]}, ("tools",)),
        ({"messages": TURNS, "tools": [], "history": None, "system": "s"}, ()),
        ({"instruction": "a", "input": "c", "output": "b", "history": [["a", "b"]]}, ("history",)),
        ({"question": "a", "answer": "b", "input": "c", "context": "d"}, ("context", "input")),
        ({"text": "a", "system": "s", "url": "u", "score": 1}, ("system",)),
        (
            {"messages": [{**TURNS[0], "images": ["i"], "thinking": "t", "id": 7, "name": "n"}, *TURNS[1:]]},
            ("messages[].thinking", "messages[].images"),
        ),
    ],
)
def test_fields_that_mean_something_and_are_not_read_are_noted(
    tmp_path: Path, record: dict[str, Any], unread: tuple[str, ...]
) -> None:
    (document,) = read(str(write_jsonl(tmp_path / "a.jsonl", [record]))).documents
    assert document.unread == unread
