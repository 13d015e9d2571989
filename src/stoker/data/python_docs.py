"""The corpora that every CPython ships: its language reference and its standard library.

The reference, `pydoc_data.topics`, is split into entries: a heading, or the definition of a
function, method or command, with its text. Topics overlap (one is often a chapter of
another), so entries are deduplicated, and those that share a paragraph get the same key:
nothing in a test split is also in the train split, be it as text or as the answer to a
question.
"""

from __future__ import annotations

import ast
import builtins
import os
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stoker import storage
from stoker.data import cached
from stoker.data.documents import Document, chop, content_key

_FORMAT = 1
"""Of the docstrings in the cache."""

_SHORTEST_BODY = 80  # characters; anything shorter explains nothing
_ANSWER = 500  # characters
_LARGEST_SOURCE = 200_000  # bytes; larger files are tables
_SHARED = 80  # characters of a paragraph that two entries do not share by chance
_LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data",
    "turtledemo", "__pycache__", "_bundled", "__phello__", "lib-dynload",
}  # fmt: skip

_UNDERLINE = re.compile(r"([*=\-^~])\1{2,}")
# A signature (`object.__repr__(self)`, `d[key] = value`, `h(elp) [command]`) is on its own like a
# paragraph. It differs from prose by having no capital, bullet or quote before it, no punctuation after.
_SIGNATURE = re.compile(r"(?!(?:is|are|was|and|or|but|then) )[a-z_!].*[^.:,;\s]")
_QUALIFIERS = re.compile(r"^(?:static|classmethod|async) ", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """A piece of the reference: its subject, and its text."""

    title: str
    """A heading, or the signatures of a definition, one per line."""
    body: str
    definition: bool
    topic: str


def describe(name: str) -> str:
    """A description of a built-in corpus."""
    made_of = "questions on the reference" if name.endswith("-qa") else "reference and standard library"
    return f"{name}: {made_of} of Python {platform.python_version()}"


def texts() -> list[Document]:
    """Plain text: every entry of the reference; the source and the docstrings of every module."""
    documents = [Document(key, "", f"{entry.title}\n\n{entry.body}\n") for entry, key in _keyed(entries())]
    sources = {name: read_source(path) for name, path in modules()}
    docstrings = _docstrings(sources)
    for name, source in sources.items():
        of_module = (source, docstrings[name])
        documents += [Document(f"module {name}", "", text) for text in of_module if text.strip()]
    return documents


def questions() -> list[Document]:
    """Questions about the reference with their answers, under the keys that the entries have in `texts`."""
    documents: list[Document] = []
    for entry, key in _keyed(entries()):
        for question in _questions(entry):
            for number, answer in enumerate(chop(entry.body, _ANSWER), start=1):
                part = f" (continued, part {number})" if number > 1 else ""
                documents.append(Document(key, question + part, answer))
    return documents


def _questions(entry: Entry) -> list[str]:
    if not entry.definition:
        return [f"Explain {_heading_name(entry.title)} in Python."]
    return [_asked(signature, entry.topic) for signature in entry.title.split("\n")]


def _asked(signature: str, topic: str) -> str:
    if signature.startswith("class ") or re.fullmatch(r"[\w.]*\.\w+", signature):
        return f"What is `{signature}`?"
    is_command = topic == "debugger" and "." not in signature.partition("(")[0]
    return f"What does {'the debugger command ' if is_command else ''}`{signature}` do?"


def _heading_name(title: str) -> str:
    return title[0].lower() + title[1:] if title.startswith(("The ", "A ")) else f'"{title}"'


# -- entries ----------------------------------------------------------------------------------


def entries() -> list[Entry]:
    """Every entry of the reference once, in a fixed order."""
    from pydoc_data.topics import topics

    unique: dict[str, Entry] = {}
    for topic in sorted(topics):
        for entry in _parse(topics[topic], topic):
            if entry.title and len(entry.body) >= _SHORTEST_BODY:
                unique.setdefault(content_key(_normal(entry.title), _normal(entry.body)), entry)
    return list(unique.values())


def _parse(text: str, topic: str, title: str = "") -> Iterator[Entry]:
    """The entries of a text. Text after a definition belongs to the heading above it."""
    lines = text.split("\n")
    body: list[str] = []
    at = 0
    while at < len(lines):
        if at + 1 < len(lines) and lines[at].strip() and _UNDERLINE.fullmatch(lines[at + 1]):
            yield Entry(title, _joined(body), definition=False, topic=topic)
            title, body = lines[at], []
            at += 2
        elif end := _definition_end(lines, at):
            yield from _definition(_joined(lines[at:end]), topic)
            at = end
        else:
            body.append(lines[at])
            at += 1
    yield Entry(title, _joined(body), definition=False, topic=topic)


def _definition(text: str, topic: str) -> Iterator[Entry]:
    """A definition and, for a class, those inside it, prefixed with the name of the class."""
    title, _, block = text.partition("\n\n")
    title = _QUALIFIERS.sub("", title)
    body = textwrap.dedent(block)
    if not title.startswith("class "):
        yield Entry(title, body, definition=True, topic=topic)
        return
    name = title.removeprefix("class ").split("(")[0]
    for entry in _parse(body, topic, title):
        lines = entry.title.split("\n")
        methods = [f"{name}.{line}" if _is_method(line) else line for line in lines]
        yield Entry("\n".join(methods), entry.body, definition=True, topic=topic)


def _is_method(signature: str) -> bool:
    """Whether a class lists it as its own method, unlike `len(d)` or `d[key]`."""
    call = re.match(r"(\w+)\(", signature)
    return call is not None and call[1] not in vars(builtins)


def _definition_end(lines: list[str], at: int) -> int:
    """Where the definition that begins at a line ends; 0 if none begins there."""
    if at > 0 and lines[at - 1].strip():
        return 0
    blank = at
    while blank < len(lines) and _SIGNATURE.fullmatch(lines[blank]):
        blank += 1
    if (
        blank == at
        or lines[blank : blank + 1] != [""]
        or not "".join(lines[blank + 1 : blank + 2]).startswith("   ")
    ):
        return 0
    end = blank
    while end < len(lines) and (not lines[end] or lines[end].startswith("   ")):
        end += 1
    return end


def _joined(lines: list[str]) -> str:
    return "\n".join(lines).strip("\n")


def _keyed(found: list[Entry]) -> Iterator[tuple[Entry, str]]:
    """Each entry with its key: the same for all entries that share a paragraph or a title."""
    leader = list(range(len(found)))

    def lead(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    first: dict[str, int] = {}
    for number, entry in enumerate(found):
        for part in (f"# {_normal(entry.title)}", *_paragraphs(entry.body)):
            other = lead(first.setdefault(part, number))
            leader[max(other, lead(number))] = min(other, lead(number))
    for number, entry in enumerate(found):
        chief = found[lead(number)]
        yield entry, f"entry {content_key(_normal(chief.title), _normal(chief.body))}"


def _paragraphs(body: str) -> list[str]:
    normal = (_normal(paragraph) for paragraph in body.split("\n\n"))
    return [paragraph for paragraph in normal if len(paragraph) >= _SHARED]


def _normal(text: str) -> str:
    return " ".join(text.split())


# -- modules ----------------------------------------------------------------------------------


def modules() -> list[tuple[str, Path]]:
    """The name and file of every module of the standard library, sorted, except tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(_python_files(root)):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        if path.stat().st_size <= _LARGEST_SOURCE:
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def _python_files(root: Path) -> Iterator[Path]:
    """The Python files below a folder; what is left out may hold many, and is not entered."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def read_source(path: Path) -> str:
    """A module's source, decoded as it declares."""
    with tokenize.open(path) as file:
        return file.read()


def _docstrings(sources: Mapping[str, str]) -> dict[str, str]:
    """The docstrings of each module as text, each below its name and arguments.

    They are kept in the cache: to parse the whole library takes seconds.
    """

    def fill(file: Path) -> None:
        storage.write_json(
            file, {name: "\n\n".join(_described(parsed(source), name)) for name, source in sources.items()}
        )

    made_from = (_FORMAT, platform.python_version(), content_key(*sources.values()))
    return storage.read_json(
        cached.once(storage.cache_folder() / "python-docs" / f"{cached.name(*made_from)}.json", fill)
    )


def parsed(source: str) -> ast.Module:
    """The syntax tree of a module, without warnings about escapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return ast.parse(source)


def _described(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    if text := ast.get_docstring(node):
        arguments = "" if isinstance(node, ast.Module | ast.ClassDef) else f"({ast.unparse(node.args)})"
        yield f"{name}{arguments}\n\n{textwrap.indent(text, '   ')}\n"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}")
