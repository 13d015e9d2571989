"""The report: one HTML file about one or several runs, which opens anywhere without a network.

Plotly's script is in the file once, next to the figures as data. A content security policy allows
only the page's own two scripts and no requests at all, so even text of a run that got past the
escaping could neither execute nor send anything. The same runs produce the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker import storage
from stoker.errors import BadInput
from stoker.report import assets, gallery, performance, performance_section, plots, sections
from stoker.report.markup import Html, json_script, page, tag
from stoker.run.series import OF_THE_LOOP
from stoker.run.state import RunView

Scaled = Sequence[Mapping[str, Any]]
"""Results of `stoker bench scaling`."""


def write(views: Sequence[RunView], output: Path, scaled: Scaled = ()) -> Path:
    """Write the report of one or several runs to a file atomically; returns the file.

    Raises BadInput if the file cannot be written.
    """
    assert views, "a report needs a run"
    return save(render(views, scaled), output)


def save(page: str, output: Path) -> Path:
    """Write a page to a file atomically; returns the file. Raises BadInput if it cannot be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(output, page.encode(errors="replace"))
    except OSError as error:
        raise BadInput(
            f"cannot write the report to {output}: {error.strerror}; choose another file with -o"
        ) from error
    return output


def render(views: Sequence[RunView], scaled: Scaled = ()) -> str:
    """The whole page as text."""
    names = run_names(views)
    gallery_ = gallery.choose(views)
    figures = plots.figures(views, names)
    descents = performance_section.descents(views)
    data: dict[str, Any] = {
        "runs": plots.runs(views, names),
        "curves": [f for f in figures if not OF_THE_LOOP.fullmatch(f["title"])],
        "performance": performance.figures(figures, views),
        "machine": plots.machine(views, names),
        "histograms": plots.histograms(views),
    }
    body = [
        sections.header(views, names),
        sections.curves(data["curves"], views, names),
        sections.metrics(views, names),
        performance_section.render(views, names, data["performance"], descents, scaled),
        gallery.images(views, names, gallery_),
        gallery.drawn(views, names, gallery_),
        gallery.texts(views, names, gallery_),
        sections.histograms(data["histograms"], names),
        *(section(views, names) for section in sections.ALL),
        sections.machine(data["machine"]),
        sections.provenance(views, names),
        gallery.left_out(views, gallery_),
        sections.damage(views, names),
        sections.footer(views),
    ]
    data["drawings"] = gallery_.drawings
    return document(", ".join(names), body, data, performance_section.as_data(descents, views))


NOTHING_DRAWN: dict[str, Any] = {
    part: [] for part in ("runs", "curves", "performance", "machine", "histograms", "drawings")
}
"""The data that a page's script expects."""


def document(title: str, body: Sequence[Html], data: Mapping[str, Any], descents: Any = ()) -> str:
    """A page as text.

    Args:
        data: what is drawn on the page, see NOTHING_DRAWN.
        descents: when each loss was reached, see `performance_section`.
    """
    scripts = _scripts(drawn=any(data[part] for part in data if part != "runs"), body=body)
    figures = json_script("data", {**data, "descents": descents})
    return page(_head(title, scripts), [*body, figures], scripts)


def run_names(views: Sequence[RunView]) -> list[str]:
    """The name of each run: its id, or as much of its path as distinguishes it from the others."""
    directories = [view.directory for view in views]
    ids = [d.id for d in directories]
    full = [d.name for d in directories]
    if len(views) > 1 and len(set(ids)) == len(ids):
        return ids
    return full if len(set(full)) == len(full) else [str(d.path) for d in directories]


def _scripts(*, drawn: bool, body: Sequence[Html]) -> list[str]:
    """Plotly if there is something to draw, and the page's own script if there are controls."""
    if not drawn:
        return [assets.SCRIPT] if any("<input" in part for part in body) else []
    from plotly.offline import get_plotlyjs

    return [get_plotlyjs(), assets.SCRIPT]


def _head(title: str, scripts: Sequence[str]) -> Html:
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} · stoker"),
        tag("style", Html(assets.STYLE)),
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
