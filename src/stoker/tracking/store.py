"""Where runs are tracked: MLflow's store as the environment names it, or the embedded one.

The embedded store is a SQLite file in the runs folder with the artifacts beside it. Nothing
here imports mlflow.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""The environment of a process that imports mlflow: it calls nobody, and warns of no missing git."""

IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""MLflow's own retries take minutes, in which nobody would learn that a server is down."""

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")


def database(runs: Path) -> Path:
    """The embedded store of a runs folder."""
    return runs.absolute() / "mlflow.db"


def artifacts(runs: Path) -> Path:
    """Where the embedded store keeps artifacts."""
    return runs.absolute() / "mlartifacts"


def lock_file(runs: Path) -> Path:
    """Locked while the embedded store is made."""
    return runs.absolute() / ".mlflow.db.lock"


def embedded_uri(runs: Path) -> str:
    """The embedded store as MLflow names it."""
    return f"sqlite:///{database(runs)}"


def server_uri() -> str | None:
    """The store that the environment names instead of the embedded one, or None."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def without_credentials(text: str) -> str:
    """A URI, or a message that holds some, without the user and password in it."""
    return _CREDENTIALS.sub("", text)
