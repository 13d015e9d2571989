"""Reading text data into documents: built-in corpora, local files, datasets of the hub.

Every source ends in the same `Document`s. A record is read by the fields it has, in any of
the forms that instruction data comes in. Input that cannot be read is refused with the file,
the line and what was expected.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from stoker.data import python_docs
from stoker.data.documents import (
    Corpus,
    Document,
    Message,
    Splits,
    chop,
    content_key,
    make_corpus,
    split,
)
from stoker.errors import BadInput, nearest

__all__ = ["BUILT_IN", "Corpus", "Document", "Splits", "read", "split"]

BUILT_IN: dict[str, Callable[[], list[Document]]] = {
    "python-docs": python_docs.texts,
    "python-docs-qa": python_docs.questions,
}

# (prompt, optional addition to the prompt, text). Pairs first: sets of pairs often carry a
# rendering of the whole as "text" too.
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
# (list of turns, who speaks, what is said), as chat data has them.
_CHATS = (
    ("messages", "role", "content"),
    ("conversations", "from", "value"),
    ("conversation", "role", "content"),
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""What others call those whom chat templates call user and assistant."""
_TEXT_DOCUMENT = 2000  # characters
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Record = tuple[str, Any]  # where it stands, and what stands there


def read(source: str) -> Corpus:
    """Read a corpus: a built in one, a .jsonl, .parquet or .txt file, a folder of these, or a hub dataset.

    Raises BadInput for what does not exist, cannot be read, or holds no text.
    """
    if source in BUILT_IN:
        return make_corpus(BUILT_IN[source](), python_docs.describe(source))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS)
        if not files:
            raise BadInput(f"{source} is a folder without a .jsonl, .parquet or .txt file")
        documents = [document for file in files for document in _read_file(file)]
        origin = f"{path.name}, {len(files)} files"
    elif path.exists():
        documents = list(_read_file(path))
        origin = path.name
    elif path.suffix.lower() in _FILE_ENDINGS or not _HUB_ID.fullmatch(source):
        raise BadInput(f"data file {source} does not exist")
    else:
        documents = list(_documents(_hub(source)))
        origin = f"hub dataset {source}"
    if not documents:
        raise BadInput(f"{source} is an empty dataset: it holds no text")
    return make_corpus(documents, f"{origin}, {len(documents):,} documents")


def _read_file(path: Path) -> Iterator[Document]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path} has an ending that is not known: give a .jsonl, .parquet or .txt file")
    try:
        yield from reader(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _read_txt(path: Path) -> Iterator[Document]:
    text = _decode(path.read_bytes(), str(path)).replace("\r\n", "\n")
    parts = re.split(r"\n(?:[ \t\f]*\n){2,}", text)
    if len(parts) < 3:  # no borders to speak of
        parts = chop(text, _TEXT_DOCUMENT)
    for part in parts:
        if part.strip():
            yield Document(content_key(part), "", part.strip("\n"))


def _read_jsonl(path: Path) -> Iterator[Document]:
    yield from _documents(_lines(path))


def _lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = _decode(raw, where).strip()
            if not line:
                continue
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
            except RecursionError as error:
                raise BadInput(f"{where}: not usable JSON: nested too deeply") from error


def _read_parquet(path: Path) -> Iterator[Document]:
    yield from _documents(_rows(path))


def _rows(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = itertools.count(1)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}, row {next(number)}", row
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{path} is not a Parquet file: {error}") from error


def _hub(name: str) -> Iterator[Record]:
    """The train split of a dataset, by its id on the hub."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # a service and a parser for any format: there is no list of what they raise
        raise BadInput(
            f"{name} is not a file here{nearest(name, BUILT_IN)}; as a dataset of the hub it cannot be "
            f"loaded: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _documents(records: Iterable[Record]) -> Iterator[Document]:
    """The documents of records; one whose text is blank has nothing to learn from and is left out."""
    for where, record in records:
        if not isinstance(record, dict):
            raise BadInput(
                f'{where}: a record must be a JSON object such as {{"text": ...}}, not {_kind(record)}'
            )
        messages = _messages(where, record)
        if messages:
            yield Document(content_key(*itertools.chain(*messages)), "", "", messages)
            continue
        prompt, text = _parse(where, record)
        if text.strip():
            yield Document(content_key(prompt, text), prompt, text)


def _messages(where: str, record: dict[str, Any]) -> tuple[Message, ...]:
    """A record's conversation; empty where it is none. Raises BadInput."""
    said, role, content = _turns(record)
    if not said:
        return ()
    found = [_message(f"{where}, message {n}", m, role, content) for n, m in enumerate(said, start=1)]
    if not any(message.role == "assistant" and message.content.strip() for message in found):
        raise BadInput(f"{where}: no message of the role assistant says anything: there is nothing to learn")
    return tuple(found)


def _turns(record: dict[str, Any]) -> tuple[list[Any], str, str]:
    """The turns of a record's conversation, and the fields of each: who speaks, and what."""
    for turns, role, content in _CHATS:
        if isinstance(record.get(turns), list):
            return record[turns], role, content
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion], "role", "content"
    return [], "", ""


def _message(where: str, message: Any, role: str, content: str) -> Message:
    if not isinstance(message, dict):
        raise BadInput(f"{where}: must be an object with {role!r} and {content!r}, not {_kind(message)}")
    for name in (role, content):
        if name not in message:
            has = ", ".join(repr(key) for key in message) or "no fields"
            raise BadInput(f"{where}: has no {name!r}; it has {has}")
    said = message[content]
    if isinstance(said, list):  # parts, of which only texts can be learnt from
        texts = [
            part["text"] for part in said if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if len(texts) < len(said):
            raise BadInput(f"{where}: {content!r} has a part that is no text")
        message = {**message, content: "".join(texts)}
    speaker = _field(where, message, role)
    return Message(_ROLES.get(speaker, speaker), _field(where, message, content))


def _parse(where: str, record: dict[str, Any]) -> tuple[str, str]:
    """A record's prompt (empty for plain text) and text. Raises BadInput."""
    for prompt, addition, text in _FORMS:
        if text in record and (prompt is None or prompt in record):
            asked = _field(where, record, prompt) if prompt else ""
            added = _field(where, record, addition) if addition and record.get(addition) else ""
            return (f"{asked}\n\n{added}" if added.strip() else asked), _field(where, record, text)
    has = ", ".join(repr(name) for name in record) or "none"
    raise BadInput(f"{where}: no expected field; the record has the fields {has}; allowed are {_FORMS_TEXT}")


def _field(where: str, record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise BadInput(f"{where}: the field {name!r} must be a text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise BadInput(f"{where}: the field {name!r} is not valid Unicode: {error.reason}") from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(
        type(value), f"a number ({value})" if isinstance(value, int | float) else "something else"
    )


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{where}: not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
_FILE_ENDINGS = {*_READERS, ".json", ".csv", ".tsv", ".md", ".gz", ".zst", ".zip"}
"""What makes a name that does not exist a missing file, not the id of a dataset, which may hold dots too."""
