"""URLs of folders in object stores: what is one, of which kind, and what to write in place of a wrong one."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

from stoker.errors import BadInput

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or `az login`, "
    "or AZURE_STORAGE_CONNECTION_STRING",
}
"""Where the drivers find credentials, by kind of store."""
_EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}
_SLIP = re.compile(r"(s3|s3a|gs|gcs|az|abfs|abfss):/?(?!/)", re.IGNORECASE)  # of s3:/bucket, s3:bucket


class MissingDriver(BadInput):
    """The driver for a kind of store is not installed."""


def is_url(folder: str) -> bool:
    """Whether a folder is in an object store. Raises BadInput for the URL of one that lacks a slash."""
    if slip := _SLIP.match(folder):
        raise BadInput(f"{folder}: write {slip[1]}://{folder[slip.end() :]}")
    return "://" in folder


def check(url: str, *, written: bool = True) -> None:
    """Raises BadInput if a URL contains credentials, names no folder, or fsspec has no driver for it.

    Args:
        written: it must be a store that can be written to.
    """
    parts = urlsplit(url)
    web, kind = parts.scheme in ("http", "https"), kind_of(parts.scheme)
    addressed = parts.scheme in ("abfs", "abfss") or (web and written)  # by a host, not the name of a bucket
    if addressed and parts.password is None and (meant := _meant(parts)):
        raise BadInput(f"{parts.scheme}://{parts.hostname}/...: write {meant}")
    if parts.username or parts.password or "@" in parts.netloc:
        where = f" ({_CREDENTIALS[kind]})" if kind in _CREDENTIALS else ""
        raise BadInput(
            f"{parts.scheme}://...: leave credentials out of the URL, because it is recorded; "
            f"set them in the environment{where}"
        )
    example = f"{parts.scheme if kind in _CREDENTIALS else 's3'}://bucket/runs"
    if written and web:
        raise BadInput(f"{parts.scheme}:// cannot be written to: give a folder, such as {example}")
    named = parts.netloc or (kind not in _CREDENTIALS and parts.path.strip("/"))
    if parts.query or parts.fragment or not named:
        raise BadInput(f"{url}: give a folder, such as {example}")
    check_driver(parts.scheme)


def kind_of(scheme: str) -> str:
    """The kind of store: several schemes may mean the same one."""
    return {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}.get(scheme, scheme)


def advice(scheme: str) -> str:
    """What to do about credentials that are missing or refused."""
    where = _CREDENTIALS.get(kind_of(scheme))
    needed = "provide credentials that allow listing, reading, writing and deleting in this folder"
    return f"{needed} ({where})" if where else needed


def check_driver(scheme: str) -> None:
    """Raises MissingDriver, or BadInput if fsspec knows none."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise BadInput(f"{scheme}://: fsspec does not support this kind of store") from error
    except ImportError as error:
        extra = _EXTRAS.get(kind_of(scheme))
        hint = f"pip install 'stoker[{extra}]'" if extra else str(error)
        raise MissingDriver(f"{scheme}:// needs a driver that is not installed: {hint}") from error


def _meant(parts: SplitResult) -> str:
    """What to write in place of the web address of a folder in a known store, or of Azure's; else empty."""
    host, folder = parts.hostname or "", parts.path.strip("/") or "bucket/runs"
    if azure := re.match(r"(.+?)\.(blob|dfs)\.core\.", host):
        folder = f"{parts.username}/{folder}" if parts.username else folder
        return f"az://{folder}, and set AZURE_STORAGE_ACCOUNT_NAME={azure[1]}"
    if host in ("storage.googleapis.com", "storage.cloud.google.com"):
        return f"gs://{folder}"
    if amazon := re.match(r"(?:(.+)\.)?s3[.-].*amazonaws\.com", host):
        return f"s3://{amazon[1]}/{folder}" if amazon[1] else f"s3://{folder}"
    return ""
