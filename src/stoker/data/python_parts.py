"""Docstrings of Python's standard library, each labelled with the part of the library that it comes from.

A part is one or more chapters of the Library Reference of Python 3.11, whose modules are listed in `PARTS`.
Chapters with few docstrings, modules removed in later Python versions, and packages that some systems ship
separately (tkinter, turtle) are left out.

A text must be enough to identify its part, and nothing else may give it away:

- The group of a text is its module, and a group is never divided among splits: docstrings of one module
  share their subject, and often their wording.
- Modules copy from each other (`asyncio.unix_events` what it overrides, `bz2` from `gzip`): of texts that
  share most of their words, in the same order, only one is kept.
- No text contains the name of the package that it comes from.
"""

from __future__ import annotations

import ast
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from stoker.data import python_docs
from stoker.data.labelled import Text

PARTS: dict[str, str] = {
    "text, data types and numbers": (
        "string re difflib textwrap stringprep rlcompleter struct codecs datetime _pydatetime _strptime "
        "zoneinfo calendar collections _collections_abc heapq bisect weakref _weakrefset types copy pprint "
        "reprlib enum graphlib numbers decimal _pydecimal fractions random statistics functools operator"
    ),
    "files and formats": (
        "pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob fnmatch linecache shutil "
        "pickle copyreg shelve dbm sqlite3 gzip bz2 lzma _compression zipfile tarfile csv configparser "
        "tomllib netrc plistlib"
    ),
    "operating system": "os io _pyio argparse getopt logging getpass curses platform ctypes",
    "concurrency and networking": (
        "threading _threading_local multiprocessing concurrent subprocess sched queue contextvars asyncio "
        "socket ssl selectors signal"
    ),
    "internet data and markup": "email json mailbox mimetypes base64 quopri html _markupbase xml",
    "internet protocols": (
        "webbrowser wsgiref urllib nturl2path http ftplib poplib imaplib smtplib uuid socketserver xmlrpc "
        "ipaddress"
    ),
    "development and debugging": (
        "typing pydoc doctest unittest bdb faulthandler pdb profile cProfile pstats timeit trace tracemalloc"
    ),
    "runtime and language": (
        "sysconfig warnings dataclasses contextlib abc _py_abc atexit traceback __future__ inspect site "
        "_sitebuiltins code codeop zipimport pkgutil modulefinder runpy importlib ast symtable token keyword "
        "tokenize tabnanny pyclbr py_compile compileall dis opcode pickletools"
    ),
}
"""The modules and packages of each part, by its name."""

_SHORTEST = 30  # characters; anything shorter is meaningless
_SHARED = 0.5  # of the word triples of a text: more is not by chance


def describe() -> str:
    """A description of the texts."""
    return f"python-docstrings: docstrings of the library of Python {platform.python_version()}"


def texts() -> list[Text]:
    """The docstrings, in a fixed order; the label is a key of `PARTS`, the group is the module."""
    part_of = {name: part for part, names in PARTS.items() for name in names.split()}
    found: dict[str, Text] = {}
    for module, path in python_docs.modules():
        package = module.partition(".")[0]
        if package in part_of:
            own_name = re.compile(rf"\b{re.escape(package)}\b", re.IGNORECASE)
            for docstring in _docstrings(python_docs.parsed(python_docs.read_source(path))):
                text = " ".join(own_name.sub("", docstring).split())
                found.setdefault(text, Text(text, part_of[package], module))
    return _unlike_each_other(text for text in found.values() if len(text.text) >= _SHORTEST)


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _unlike_each_other(found: Iterable[Text]) -> list[Text]:
    """Leave out each text most of whose word triples are in a single longer text that is kept."""
    kept: list[Text] = []
    holding: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for text in sorted(found, key=lambda text: (-len(text.text), text)):
        words = re.findall(r"\w+", text.text.lower())
        triples = set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}
        shared = Counter(number for triple in triples for number in holding[triple])
        if max(shared.values(), default=0) > _SHARED * len(triples):
            continue
        for triple in triples:
            holding[triple].append(len(kept))
        kept.append(text)
    return sorted(kept, key=lambda text: (text.group, text.text))
