"""The style and the script of a report's page. Nothing in them is fetched from anywhere."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

STYLE = (_HERE / "page.css").read_text(encoding="utf-8")
SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
