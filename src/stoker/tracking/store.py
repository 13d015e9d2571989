"""The MLflow store: the server that the environment names, or the embedded store.

The embedded store is a SQLite file in the runs folder, with the artifacts beside it. This module does not
import mlflow.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass, url2pathname

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Environment of a process that imports mlflow: no telemetry, no warning if git is missing, and nothing on
standard output, which may be JSON."""

IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""MLflow's own retries take minutes, which would delay the report that a server is down."""

_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""The tables and columns of MLflow's database that hold the locations of artifacts."""
_PATIENCE = 30.0  # seconds, for the database while another process writes to it
_CONNECTS = 1.0  # seconds for a connection to a server

_HOST_AND_PORT = re.compile(r"(?!(databricks|uc)\b)[\w.-]+:\d+(/|$)")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")


def database(runs: Path) -> Path:
    """The embedded store of a runs folder."""
    return runs.absolute() / "mlflow.db"


def artifacts(runs: Path) -> Path:
    """The folder of the embedded store's artifacts."""
    return runs.absolute() / "mlartifacts"


def settle(runs: Path) -> None:
    """Update the artifact locations in the embedded store to the folder beside it.

    MLflow stores absolute locations, which are wrong once the runs folder was moved or copied.
    """
    here = artifacts(runs).as_uri()
    with contextlib.closing(sqlite3.connect(database(runs), timeout=_PATIENCE)) as store, store:
        locations = [str(row[0]) for row in store.execute("SELECT artifact_location FROM experiments")]
        places = {location.rpartition("/")[0] for location in locations}
        moved = [p for p in places if p.endswith("/mlartifacts") and p != here and not _is_in(p, runs)]
        for place, (table, column) in itertools.product(moved, _PLACES):
            store.execute(
                f"UPDATE {table} SET {column} = :here || substr({column}, length(:place) + 1) "
                f"WHERE substr({column}, 1, length(:place) + 1) = :place || '/'",
                {"here": here, "place": place},
            )


def _is_in(place: str, runs: Path) -> bool:
    """Whether the artifact folder with this URI lies in this runs folder, perhaps by another of its paths."""
    parent = Path(url2pathname(urlsplit(place).path)).parent
    return parent.exists() and parent.samefile(runs)


def lock_file(runs: Path) -> Path:
    """Locked while the embedded store is created."""
    return runs.absolute() / ".mlflow.db.lock"


def embedded_uri(runs: Path) -> str:
    """The URI of the embedded store."""
    return sqlite_uri(database(runs))


def sqlite_uri(file: Path) -> str:
    """The URI of a database file; a path with characters that are special in a URI is escaped.

    An escaped URI also names the driver: without it, MLflow would create the folder under its escaped name.
    """
    if not set("?%") & set(str(file)):
        return f"sqlite:///{file}"
    from sqlalchemy import URL

    return URL.create("sqlite+pysqlite", database=str(file)).render_as_string()


def page(server: str, place: str = "") -> str:
    """The page of MLflow's UI for its experiments, or for a `place` below them.

    Without the parameter MLflow opens its pages for agents.
    """
    return f"{server}/#/experiments{place}?workflowType=machine_learning"


def server_uri() -> str | None:
    """The store that the environment names instead of the embedded one, or None."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def unusable() -> str | None:
    """Why MLflow cannot use the store that the environment names, as far as its address tells."""
    uri = server_uri() or ""
    shown = f"MLFLOW_TRACKING_URI={without_credentials(uri)}"
    if _HOST_AND_PORT.match(uri):
        return f"{shown} lacks its scheme: set it to http://{without_credentials(uri)}, or https://"
    is_folder = uri.startswith("file:") or (uri and ":" not in uri and uri not in ("databricks", "uc"))
    if is_folder and not os.environ.get("MLFLOW_ALLOW_FILE_STORE"):
        return f"{shown} is a folder, in which MLflow no longer stores runs: use sqlite:///FILE"
    return None


def unanswered() -> str | None:
    """Why the MLflow server that the environment names does not answer, as far as a connection tells."""
    server = urlsplit(server_uri() or "")
    if server.scheme not in ("http", "https") or server.hostname is None:
        return None
    if {server.scheme, "all"} & getproxies().keys() and not proxy_bypass(server.hostname):
        return None
    try:
        port = server.port or (443 if server.scheme == "https" else 80)
        socket.create_connection((server.hostname, port), _CONNECTS).close()
    except (OSError, ValueError) as error:
        return f"{without_credentials(server.geturl())} does not answer: {error}"
    return None


def without_credentials(text: str) -> str:
    """A URI, or a message that contains URIs, without user names and passwords."""
    return _CREDENTIALS.sub("", text)
