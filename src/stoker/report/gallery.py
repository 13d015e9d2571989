"""The media in a report: images, figures and texts, newest first.

They are embedded in the page, so their total size is limited. Within the limit the newest of
every name is included first, then the one before it, and so on; the page lists what is left out.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from stoker import words
from stoker.report import facts
from stoker.report.markup import Html, swatch, tag
from stoker.run.state import Media, RunView

MOST_BYTES = 20_000_000
_MOST_TEXT = 100_000  # characters of one text
_PNG = b"\x89PNG\r\n\x1a\n"
_LINK = re.compile(r"<(?=\s*/?\s*a\b)", re.IGNORECASE)
_NO_WEBGL = {"scattergl": "scatter", "scatterpolargl": "scatterpolar", "heatmapgl": "heatmap"}


@dataclass(frozen=True)
class Item:
    """One medium: the index of its run, how many of the same name are newer, and its file."""

    run: int
    age: int
    media: Media
    file: Path | None

    @property
    def bytes(self) -> int:
        return self.file.stat().st_size if self.file else 0


@dataclass
class Gallery:
    """What a page shows, by kind (image, plotly, text) and name, and what did not fit."""

    shown: dict[tuple[str, str], list[Item]] = field(default_factory=dict)
    left_out: list[Item] = field(default_factory=list)
    drawings: list[Any] = field(default_factory=list)
    """Plotly figures, as the page's script draws them."""


def choose(views: Sequence[RunView], most: int = MOST_BYTES) -> Gallery:
    """Fill a gallery up to a number of bytes."""
    gallery = Gallery()
    found = [(kind, item) for i, view in enumerate(views) for kind, item in _items(i, view)]
    for kind, item in sorted(found, key=lambda entry: (entry[1].age, -entry[1].media.step)):
        if item.bytes > most:
            gallery.left_out.append(item)
            continue
        most -= item.bytes
        gallery.shown.setdefault((kind, item.media.name), []).append(item)
    return gallery


def images(views: Sequence[RunView], names: Sequence[str], gallery: Gallery) -> Html:
    """Images and Matplotlib figures."""
    return _shown("Images", "image", views, names, gallery)


def drawn(views: Sequence[RunView], names: Sequence[str], gallery: Gallery) -> Html:
    """Plotly figures: placeholders that the page's script draws in."""
    return _shown("Figures", "plotly", views, names, gallery)


def texts(views: Sequence[RunView], names: Sequence[str], gallery: Gallery) -> Html:
    """Texts."""
    return _shown("Texts", "text", views, names, gallery)


def left_out(views: Sequence[RunView], gallery: Gallery) -> Html:
    """How many media did not fit, and where they are."""
    if not gallery.left_out:
        return Html("")
    count = len(gallery.left_out)
    size = words.size(sum(item.bytes for item in gallery.left_out))
    folders = {
        f"{views[item.run].directory.path}/{Path(item.media.file['path']).parent}"
        for item in gallery.left_out
        if item.media.file
    }
    said = (
        f"{count:,} earlier or larger logged item{'' if count == 1 else 's'} ({size}) "
        f"{'is' if count == 1 else 'are'} left out to keep this page small. "
        f"{'It is' if count == 1 else 'They are'} in:"
    )
    where = "\n".join(sorted(folders))
    return tag("section", tag("h2", "Left out"), tag("p", said), tag("pre", where))


def _items(run: int, view: RunView) -> Iterator[tuple[str, Item]]:
    """All media of a run, with the kind that each is shown as."""
    for kind, shown_as, suffix in (
        ("image", "image", ".png"),
        ("figure", "image", ".png"),
        ("figure", "plotly", ".plotly.json"),
        ("text", "text", ".txt"),
    ):
        for logged in facts.logged(view, kind, suffix).values():
            for age, media in enumerate(reversed(logged)):
                yield shown_as, Item(run, age, media, facts.content_file(view, media))


def _shown(title: str, kind: str, views: Sequence[RunView], names: Sequence[str], gallery: Gallery) -> Html:
    found = sorted((name, items) for (of, name), items in gallery.shown.items() if of == kind)
    if not found:
        return Html("")
    parts = [_exhibit(name, kind, items, views, names, gallery) for name, items in found]
    return tag("section", tag("h2", title), tag("div", *parts, class_=f"exhibits {kind}s"))


def _exhibit(
    name: str,
    kind: str,
    items: Sequence[Item],
    views: Sequence[RunView],
    names: Sequence[str],
    gallery: Gallery,
) -> Html:
    """All media of one name: one column per run, and a slider if there are several steps."""
    steps = sorted({item.media.step for item in items})
    columns = []
    for run in sorted({item.run for item in items}):
        of_run = sorted((item for item in items if item.run == run), key=lambda item: item.age)
        heading = [tag("h4", swatch(run), names[run])] if len(views) > 1 else []
        frames = [_frame(item, kind, gallery, hidden=i > 0) for i, item in enumerate(of_run)]
        columns.append(tag("div", *heading, *frames, class_="frames"))
    return tag(
        "article",
        tag("header", tag("h3", name), *_slider(steps)),
        tag("div", *columns, class_="columns"),
        class_="exhibit",
    )


def _slider(steps: Sequence[int]) -> list[Html]:
    if len(steps) < 2:
        return []
    last = str(len(steps) - 1)
    slider = tag(
        "input",
        type="range",
        min="0",
        max=last,
        value=last,
        step="1",
        data_steps=",".join(map(str, steps)),
        aria_label="step",
    )
    return [tag("label", tag("output", f"step {steps[-1]:,}"), slider, class_="steps")]


def _frame(item: Item, kind: str, gallery: Gallery, *, hidden: bool) -> Html:
    caption = item.media.about.get("caption")
    said = [f"step {item.media.step:,}", *([str(caption)] if caption else [])]
    more = {"hidden": ""} if hidden else {}
    return tag(
        "figure",
        _content(item, kind, gallery),
        tag("figcaption", " · ".join(said)),
        data_step=str(item.media.step),
        **more,
    )


def _content(item: Item, kind: str, gallery: Gallery) -> Html:
    content = _read(item)
    if kind == "image" and content is not None and content.startswith(_PNG):
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        return tag("img", src=source, alt=str(item.media.about.get("caption") or item.media.name))
    if kind == "text" and content is not None:
        return tag("pre", _cut(content.decode(errors="replace"), item), class_="text")
    drawing = _drawing(content) if kind == "plotly" and content is not None else None
    if drawing is not None:
        gallery.drawings.append(drawing)
        return tag(
            "div", class_="plot drawing", data_of="drawings", data_index=str(len(gallery.drawings) - 1)
        )
    where = (item.media.file or {}).get("path", "")
    return tag("p", f"{where} is missing, or is not what was logged.", class_="error")


def _read(item: Item) -> bytes | None:
    try:
        return item.file.read_bytes() if item.file else None
    except OSError:
        return None


def _cut(text: str, item: Item) -> str:
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[:_MOST_TEXT]}\n... and {len(text) - _MOST_TEXT:,} more characters in {item.file}"


def _drawing(content: bytes) -> Any | None:
    """A Plotly figure without what the page's policy forbids; None if the content is not a figure."""
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        return None
    layout = found.get("layout")
    return {"data": _tame(found["data"]), "layout": _tame(layout) if isinstance(layout, dict) else {}}


def _tame(value: Any) -> Any:
    """Turn links into text, and replace trace types that would compile WebGL programs in the page."""
    if isinstance(value, dict):
        return {
            key: _NO_WEBGL.get(of, of) if key == "type" and isinstance(of, str) else _tame(of)
            for key, of in value.items()
        }
    if isinstance(value, list):
        return [_tame(of) for of in value]
    return _LINK.sub("&lt;", value) if isinstance(value, str) else value
