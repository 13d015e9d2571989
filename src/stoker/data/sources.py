"""Reads text data into documents: built-in corpora, local files, hub datasets.

Every source produces the same kind of `Document`. A record is interpreted by its fields, in any of the
usual formats of instruction data. Input that cannot be read is refused with the file, the line and what
was expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stoker import store_urls, words
from stoker.data import called, chunks, compressed, hub_datasets, labelled, parquet, python_docs, records
from stoker.data.chunks import Chunks
from stoker.data.documents import (
    Corpus,
    Document,
    LeftOut,
    Splits,
    learnable,
    make_corpus,
    split,
    split_by_place,
)
from stoker.data.records import NO_COLUMNS, Columns, Record
from stoker.errors import BadInput, nearest
from stoker.words import counted

__all__ = ["BUILT_IN", "Corpus", "Document", "Source", "Splits", "read", "read_all", "split"]

BUILT_IN: dict[str, Callable[[], list[Document]]] = {
    "python-docs": python_docs.texts,
    "python-docs-qa": python_docs.questions,
}


_SAMPLED = 16  # parts of a stream that are sampled in advance
_FIRST = 100  # documents of a file that are checked before anything is started
_READ_WHOLE = (".json", ".txt")  # files that must be read whole to get their first document
_SMALL = 16 * 2**20  # bytes up to which such a file may be read twice

Key = Literal["data", "validation_data", "test_data"]
"""The config key that names data, and thereby its purpose."""

BySource = Mapping[str, str | Mapping[str, str]]
"""Columns for all sources; those under the name of a source are used for it instead."""


@dataclass(frozen=True)
class Source:
    """One source of data for training or evaluation."""

    name: str
    """Short, and unique among the sources of its key."""
    weight: float
    splits: Splits
    """For a stream: those of the sampled parts."""
    fingerprint: str
    description: str
    stream: Chunks | None = None
    """The data to read during training, if not everything is in `splits`."""
    held_out: float = 0.0
    """For a stream: documents whose place is below this are for validation and test."""
    key: Key = "data"
    """For any key but `data`, all documents are in the split that is evaluated."""
    left_out: tuple[LeftOut, ...] = ()
    """As in a corpus; for a stream, among the sampled parts."""


def read_all(
    data: str,
    *,
    validation: float,
    test: float,
    streaming: bool = False,
    validation_data: str | None = None,
    test_data: str | None = None,
    columns: BySource = NO_COLUMNS,
) -> list[Source]:
    """Read data named as `a`, as `a,b`, or with weights as `a:3,b:1`; the training data comes first.

    Several sources without weights are combined into one; but evaluation sources always remain separate.

    Args:
        validation, test: the shares of the documents to hold out, see `documents.split`.
        streaming: leave everything that is not built in to be read during training.
        validation_data, test_data: evaluation data that replaces that share of `data`; read whole.
        columns: see `records.documents`; for everything that is not built in.

    Raises:
        BadInput: as for `read`, or for invalid columns or weights, or weights on evaluation data.
    """
    given: dict[Key, str | None] = {
        "data": data, "validation_data": validation_data, "test_data": test_data
    }  # fmt: skip
    _check_columns(columns, _names({key: names for key, names in given.items() if names is not None}))
    found = _trained_on(
        data,
        validation=0.0 if validation_data is not None else validation,
        test=0.0 if test_data is not None else test,
        streaming=streaming,
        columns=columns,
    )
    if validation_data is not None:
        found += _evaluated_on(validation_data, "validation_data", columns)
    if test_data is not None:
        found += _evaluated_on(test_data, "test_data", columns)
    return found


def read_evaluated(data: str, columns: BySource = NO_COLUMNS) -> list[Source]:
    """Read what is named as `a` or `a,b`, each a source of its own. Raises BadInput, as `read_all`."""
    _check_columns(columns, named(data, evaluated=True))
    found = _evaluated_on(data, "validation_data", columns)
    return [dataclasses.replace(source, key="data") for source in found]


def columns_of(name: str, columns: BySource) -> Columns:
    """The columns of a source: those under its name if there are any, otherwise those for all sources."""
    own = columns.get(name)
    if isinstance(own, Mapping):
        return own
    return {field: said for field, said in columns.items() if isinstance(said, str)}


def _check_columns(columns: BySource, names: Sequence[str]) -> None:
    """Raises BadInput for columns that no record format has, or of a source that is not among these names."""
    by_source = {name: own for name, own in columns.items() if isinstance(own, Mapping)}
    for name, own in by_source.items():
        if name not in names:
            raise BadInput(
                f"columns: {name!r} is not a source of the data{nearest(name, names)}; the sources are "
                f"{', '.join(names)}"
            )
        records.check_columns(own)
    records.check_columns({field: said for field, said in columns.items() if isinstance(said, str)})


def _evaluated_on(data: str, key: Key, columns: BySource) -> list[Source]:
    found = []
    for name in named(data, key):
        corpus = read(name, columns_of(name, columns))
        splits = Splits(
            train=[],
            validation=corpus.documents if key == "validation_data" else [],
            test=corpus.documents if key == "test_data" else [],
        )
        left_out = corpus.left_out
        found.append(
            Source(name, 1.0, splits, corpus.fingerprint, corpus.description, key=key, left_out=left_out)
        )
    return _with_short_names(found)


def _trained_on(
    data: str, *, validation: float, test: float, streaming: bool, columns: BySource
) -> list[Source]:
    named = _weights(data)
    if len(named) > 1 and not streaming and all(weight is None for _, weight in named):
        corpora = [read(name, columns_of(name, columns)) for name, _ in named]
        documents = [document for corpus in corpora for document in corpus.documents]
        left_out = tuple(each for corpus in corpora for each in corpus.left_out)
        corpus = make_corpus(documents, "; ".join(corpus.description for corpus in corpora), left_out)
        return [_whole(data, 1.0, corpus, validation, test)]
    if len(named) > 1 and any(weight is None for _, weight in named):
        raise BadInput(f"data={data}: every source needs a weight, as in {named[0][0]}:3,{named[1][0]}:1")
    found = []
    for name, weight in named:
        own = columns_of(name, columns)
        if streaming and name not in BUILT_IN:
            found.append(_streamed(name, weight or 1.0, validation, test, own))
        else:
            found.append(_whole(name, weight or 1.0, read(name, own), validation, test))
    return _with_short_names(found)


def check(data: Mapping[Key, str], columns: BySource = NO_COLUMNS, *, evaluated: bool = False) -> None:
    """Raises BadInput for data that does not exist, local files that do not begin as data does, and columns.

    Args:
        evaluated: see `named`.
    """
    names = _names(data, evaluated=evaluated)
    _check_columns(columns, names)
    for name in names:
        path = Path(name).expanduser()
        if name in BUILT_IN or store_urls.is_url(name):
            continue
        if path.exists():
            _check_first(name, path, columns_of(name, columns))
            continue
        _check_meant_for_hub(name)
        hub_datasets.check(name, tuple(BUILT_IN))


def _names(data: Mapping[Key, str], *, evaluated: bool = False) -> list[str]:
    """The names of the sources of all keys. Raises BadInput."""
    return [name for key, given in data.items() for name in named(given, key, evaluated=evaluated)]


def _check_first(source: str, path: Path, columns: Columns) -> None:
    """Read the first documents of a file, or of the first file of a folder. Raises BadInput."""
    file = next((file for file in _files(source, path) if file.is_file() and file.stat().st_size), None)
    if file is None or (compressed.kind(file.name) in _READ_WHOLE and file.stat().st_size > _SMALL):
        return
    for _ in itertools.islice(_read_file(file, columns), _FIRST):
        pass


def named(data: str, key: Key = "data", *, evaluated: bool = False) -> list[str]:
    """The names in `a`, `a,b`, or `a:3,b:1`, as given. Raises BadInput.

    Args:
        evaluated: whether `data` is evaluation data too, as the other keys are: it has no weights.
    """
    found = _weights(data, key)
    if (evaluated or key != "data") and any(weight is not None for _, weight in found):
        names = ",".join(name for name, _ in found)
        raise BadInput(f"{key}={data}: evaluation data takes no weights: use {key}={names}")
    return [name for name, _ in found]


def is_here(name: str) -> bool:
    """Whether a name refers to local files."""
    return name not in BUILT_IN and Path(name).expanduser().exists()


def _check_meant_for_hub(name: str) -> None:
    if hub_datasets.is_a_file_name(name):
        raise BadInput(f"data file {name} does not exist")


def _weights(data: str, key: Key = "data") -> list[tuple[str, float | None]]:
    if Path(data).expanduser().exists():
        return [(data, None)]
    found: list[tuple[str, float | None]] = []
    for part in (part.strip() for part in data.split(",")):
        name, colon, given = part.rpartition(":")
        if not colon or "/" in given or "]" in given:  # of a URL, or of a slice of a split
            found.append((part, None))
            continue
        try:
            weight = float(given)
        except ValueError:
            weight = math.nan
        if not (0 < weight < math.inf):
            raise BadInput(f"{key}={data}: {given!r} is not a weight: use a number above 0, as in {name}:3")
        found.append((name, weight))
    if any(not name for name, _ in found):
        write = "a.jsonl:3,b.jsonl:1" if key == "data" else "a.jsonl,b.jsonl"
        raise BadInput(f"{key}={data}: a name is missing: write {write}")
    return found


def _whole(name: str, weight: float, corpus: Corpus, validation: float, test: float) -> Source:
    splits = split(corpus.documents, validation=validation, test=test)
    return Source(name, weight, splits, corpus.fingerprint, corpus.description, left_out=corpus.left_out)


def _streamed(name: str, weight: float, validation: float, test: float, columns: Columns) -> Source:
    found = chunks.find(name, columns)
    looked = [document for number in looked_at(found) for document in found.kept(number)]
    documents, left_out = learnable(looked, f"the sampled part of {name}")
    splits = split_by_place(documents, validation=validation, test=test)
    if (validation and not splits.validation) or (test and not splits.test):
        shares = [key for key, share in (("validation", validation), ("test", test)) if share]
        raise BadInput(
            f"{name}: of the {counted(len(documents), 'document')} sampled none would be held out: raise "
            f"{' and '.join(shares)}, or evaluate on other data: {' '.join(f'{k}=0' for k in shares)} and "
            f"{' '.join(f'{k}_data=FILE' for k in shares)}"
        )
    size = f"{words.size(found.size)} in {counted(len(found.files), 'file')}"
    about = f"{name}, {size}, read while training"
    held_out = validation + test
    return Source(name, weight, splits, found.fingerprint, about, found, held_out, left_out=left_out)


def fingerprint(found: Sequence[Source]) -> str:
    """SHA-256 of the content of all sources, with their weights if there are several."""
    if len(found) == 1:
        return found[0].fingerprint
    return hashlib.sha256(repr([(s.fingerprint, s.weight) for s in found]).encode()).hexdigest()


def repeated(found: Sequence[Source]) -> dict[Key, int]:
    """The number of evaluation documents per key that are also trained on, word for word.

    For a stream, only the sampled documents are known.
    """
    evaluated = [
        (source.key, (document.prompt, document.text, document.messages))
        for source in found
        if source.key != "data"
        for document in (*source.splits.validation, *source.splits.test)
    ]
    wanted = {said for _, said in evaluated}
    trained = (document for source in found for document in source.splits.train if wanted)
    seen = wanted.intersection((document.prompt, document.text, document.messages) for document in trained)
    return dict(Counter(key for key, said in evaluated if said in seen))


def looked_at(stream: Chunks) -> list[int]:
    """The parts of a stream that are sampled in advance: a few, evenly spread."""
    most = min(_SAMPLED, len(stream))
    return [number * len(stream) // most for number in range(most)]


def _with_short_names(found: list[Source]) -> list[Source]:
    short = [_short_name(source.name) for source in found]
    return [
        dataclasses.replace(source, name=name if short.count(name) == 1 else f"{name}-{number}")
        for number, (source, name) in enumerate(zip(found, short, strict=True), start=1)
    ]


def _short_name(name: str) -> str:
    if store_urls.is_url(name) or is_here(name):
        last = Path(name.rstrip("/")).name
        ending = compressed.kind(last)
        return last[: last.lower().rindex(ending)] if ending else last
    return hub_datasets.parse(name).name.rpartition("/")[2]


def read(source: str, columns: Columns = NO_COLUMNS) -> Corpus:
    """Read a corpus: a built-in one, a file, a folder of files, a URL of either, or a hub dataset.

    Files are .jsonl, .json, .csv, .tsv, .txt or .parquet, all but the last also with .gz or .zst appended;
    a plain .json in a folder is ignored.

    Args:
        columns: see `records.documents`.

    Raises BadInput if it does not exist, cannot be read, or contains nothing to learn.
    """
    if source in BUILT_IN:
        return make_corpus(BUILT_IN[source](), python_docs.describe(source))
    path = Path(source).expanduser()
    if path.is_dir():
        files = _files(source, path)
        documents = [document for file in files for document in _read_file(file, columns)]
        origin = f"{path.name}, {counted(len(files), 'file')}"
    elif path.exists():
        documents = list(_read_file(path, columns))
        origin = path.name
    elif store_urls.is_url(source):
        found = chunks.find(source, columns)
        documents = [document for number in range(len(found)) for document in found.documents(number)]
        origin = f"{source}, {counted(len(found.files), 'file')}"
    else:
        _check_meant_for_hub(source)
        documents = list(records.documents(hub_datasets.read(source, tuple(BUILT_IN)), columns))
        origin = f"hub dataset {source}"
    kept, left_out = learnable(documents, source)
    return make_corpus(kept, f"{origin}, {counted(len(kept), 'document')}", left_out)


def _files(source: str, path: Path) -> list[Path]:
    """The file at a path, or those of a folder, in order. Raises BadInput for a folder without any."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in labelled.files_in(path) if compressed.is_data_in_a_folder(file.name))
    if not files:
        raise BadInput(f"{source} is a folder without a {compressed.ALLOWED}")
    return files


def _read_file(path: Path, columns: Columns) -> Iterator[Document]:
    reader = _READERS.get(compressed.kind(path.name))
    if reader is None:
        raise BadInput(f"{path} has an unknown file extension: give a {compressed.ALLOWED}")
    try:
        yield from reader(path, columns)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _read_txt(path: Path, columns: Columns) -> Iterator[Document]:
    content = b"".join(compressed.lines(path, path.name, str(path)))
    yield from chunks.texts(records.decode(content, str(path)))


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Document]:
    lines = compressed.split(compressed.lines(path, path.name, str(path)))
    unit = compressed.unit(path.name)
    found = (records.from_json(raw, f"{path}, {unit} {n}") for n, raw in enumerate(lines, start=1))
    yield from records.documents(itertools.chain.from_iterable(found), columns)


def _read_parquet(path: Path, columns: Columns) -> Iterator[Document]:
    yield from records.documents(_rows(path), columns)


def _rows(path: Path) -> Iterator[Record]:
    number = itertools.count(1)
    with parquet.opened(path, str(path)) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"{path}, row {next(number)}", called.of_a_column(row)


_READERS: dict[str, Callable[[Path, Columns], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_jsonl,
    ".tsv": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
