"""HTML from Python, escaped by construction: only the output of `tag` passes unescaped.

Everything in a report comes from a run, and a run's names, prompts and generations are
untrusted text. So nothing here joins strings: a text becomes HTML by being a child of a tag.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import orjson

_VOID = ("input", "meta", "br", "img")


class Html(str):
    """Text that is already HTML, as returned by `tag` and `join`."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str) -> Html:
    """An element: children that are not `Html` are escaped, and so is every attribute.

    An underscore in an attribute's name becomes a dash; a trailing one is dropped (`class_`).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Concatenated parts; parts that are not `Html` are escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(head: Html, body: Iterable[Html], scripts: Iterable[str]) -> str:
    """A whole page, with the program's own scripts at its end: megabytes, which are copied only once here."""
    ends = (part for script in scripts for part in ("<script>", script, "</script>"))
    return "".join(('<!doctype html>\n<html lang="en">', head, "<body>", *body, *ends, "</body></html>"))


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], **attributes: str) -> Html:
    """A table that scrolls on its own if it is wider than the page.

    A row is a list of cells; a `td` or `tr` made by `tag` is used unchanged.
    """
    head = tag("tr", *(tag("th", heading) for heading in headings))
    body = [tag("tr", *(_cell(cell) for cell in row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), **attributes), class_="scroll")


def number(value: str) -> Html:
    """A cell whose digits line up vertically."""
    return tag("td", value, class_="number")


def swatch(index: int) -> Html:
    """A spot in the colour of a run or kind, by its index."""
    return tag("span", class_=f"swatch swatch-{index % 8}")


def details(summary: str, *children: str) -> Html:
    """Content that is collapsed until it is opened."""
    return tag("details", tag("summary", summary), *children)


def json_script(identity: str, value: Any) -> Html:
    """Data for the page's script, without any `<` that could end the element."""
    data = orjson.dumps(value).decode()
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{escape(identity)}">{data}</script>')


def _cell(cell: str) -> Html:
    return cell if isinstance(cell, Html) and cell.startswith("<td") else tag("td", cell)
