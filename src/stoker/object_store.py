"""Object stores: `s3://`, and anything else that fsspec has a driver for.

A runs folder in a store has a working copy on this machine, where runs read and write; `run/mirror.py`
synchronises it with the store. A file in the working copy holds the URL of its store.

The driver finds credentials itself: in the environment, a role, or its own files. stoker stores none.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from stoker import storage
from stoker.errors import BadInput, StokerError
from stoker.periodic import backoff
from stoker.store_urls import MissingDriver, advice, check, check_driver, kind_of

log = logging.getLogger("stoker")

_MARKER = ".object-store.json"
_LONGEST_PAUSE = 5.0
STALL = 120.0  # seconds in which at least one part of a transfer must arrive
_ANSWER = 30.0  # seconds that a small request may take
_SLOWEST = 2**18  # bytes per second: what is sent or read in one request may take longer, at this rate
_AWAY = 60.0  # seconds for which requests to an unreachable store are not retried
_PART = 8 * 2**20  # bytes per part of a multipart upload
_AT_ONCE = 4  # parts in transfer at once
_MOST_PARTS = 9000  # S3 allows 10,000
_UNHEARD = 64 * 2**20  # bytes that the drivers of Google and Azure transfer before they report the first
# S3's driver retries each request itself; these settings are for one of its tries.
_S3 = {"connect_timeout": 10, "read_timeout": 20, "retries": {"mode": "standard", "max_attempts": 3}}
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, BadInput)
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified")
_NO_CREDENTIALS = (
    "NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError",
    "RefreshError", "NonRetryableError",  # Google's
    "ClientAuthenticationError", "CredentialUnavailableError",  # Azure's
)  # fmt: skip
_REFUSALS = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "TokenRefreshRequired",
    "InvalidToken", "RequestExpired", "token has expired", "token is expired", "Unauthorized",
    "Forbidden: ", "Invalid Credentials",  # Google's
    "unable to connect to account",  # Azure's, without credentials
)  # fmt: skip
_NO_ANSWER = ("no response from the IMDS endpoint", "Cannot connect to host")  # of a source of Azure's
_NOT_OF_CREDENTIALS = re.compile(
    r"(user)?rateLimitExceeded|quotaExceeded|retentionPolicyNotMet|objectUnderActiveHold", re.IGNORECASE
)
"""Google's reasons for an answer 403 that no other credentials would change."""

T = TypeVar("T")


class Stored(NamedTuple):
    """An object in a store's listing."""

    size: int
    tag: str = ""
    """Changes with the content; empty if the store gives none."""


class Unreachable(StokerError):
    """A request to an object store failed, and so did its retries."""

    again = True


def working_copy(url: str) -> Path:
    """The working copy of a folder in an object store; created if missing. Raises BadInput, see `check`.

    A missing driver is said by the first request: what makes none, such as a dry run, needs none.
    """
    with contextlib.suppress(MissingDriver):
        check(url)
    parts = urlsplit(url)
    folder = storage.cache_folder() / "stores" / _place(parts.scheme) / parts.netloc / parts.path.strip("/")
    marker = folder / _MARKER
    if not marker.exists():
        named = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        storage.write_json(marker, {"url": named, "id": uuid.uuid4().hex})
    return folder


def of(folder: Path) -> Store | None:
    """The store of a working copy; None for an ordinary runs folder."""
    known = storage.read_json(folder / _MARKER)
    return Store(known["url"], known["id"]) if known else None


def upload(folder: Path, url: str) -> None:
    """Upload a folder's files to a URL, without deleting anything there. Raises BadInput, Unreachable."""
    check(url)
    store = Store(url.rstrip("/"), "")
    for file in storage.files_under(folder):
        store.put(file.relative_to(folder).as_posix(), file)


def _place(scheme: str) -> str:
    """A folder name for the server: two of S3, or accounts of Azure, may have buckets of the same name."""
    if kind_of(scheme) == "az":
        known = re.search(r"AccountName=([\w-]+)", os.environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))
        return f"az@{known[1] if known else os.environ.get('AZURE_STORAGE_ACCOUNT_NAME', '')}"
    endpoint = next((os.environ[name] for name in _S3_ENDPOINTS if os.environ.get(name)), "")
    if scheme != "s3" or not endpoint:
        return scheme
    return f"s3@{urlsplit(endpoint).netloc.rpartition('@')[2].replace(':', '-')}"


@dataclass(frozen=True)
class Store:
    """A folder in an object store. Keys are paths below it.

    A request that fails is retried with growing pauses for `patience` seconds; then it raises Unreachable,
    and for a minute, further requests are tried only once. Errors that a retry cannot fix are raised at once.
    One that is refused is tried once more, with credentials that are read anew.
    """

    url: str
    copy: str
    """The id of the working copy on this machine."""
    patience: float = 10.0
    """Seconds of retries, in addition to the driver's own."""

    def read(self, key: str, first: int | None = None, last: int | None = None) -> bytes:
        """The content of an object, or its bytes from `first` up to, but not including, `last`.

        Give `last` for a large one: it is then allowed more time. Raises FileNotFoundError.
        """
        limit = _ANSWER + max(0, (last or 0) - (first or 0)) / _SLOWEST
        return bytes(
            self._try(lambda fs: _watched(fs, limit, "cat_file", self._path(key), start=first, end=last), key)
        )

    def write(self, key: str, content: bytes, *, new: bool = False) -> None:
        """Write an object in one request. With `new`, raises FileExistsError if it exists.

        Of two concurrent writers with `new`, exactly one succeeds if the driver supports conditional writes,
        as those of S3, Google and Azure do.
        """
        mode = "create" if new else "overwrite"
        limit = _ANSWER + len(content) / _SLOWEST
        self._try(lambda fs: _watched(fs, limit, "pipe_file", self._path(key), content, mode=mode), key)

    def put(self, key: str, file: Path) -> None:
        """Upload a file of any size, in parts. Raises FileNotFoundError if it does not exist."""
        parts: dict[str, Any] = {"callback": _Parts()}
        if self._kind == "s3":
            parts["chunksize"] = max(_PART, file.stat().st_size // _MOST_PARTS)
        self._transfer("put_file", key, str(file), self._path(key), **parts)

    def get(self, key: str, file: Path) -> None:
        """Download an object atomically. Raises FileNotFoundError."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = storage.unfinished(file)
        try:
            self._transfer("get_file", key, self._path(key), str(part), callback=_Parts())
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    def objects(self, folder: str = "") -> dict[str, Stored]:
        """All objects below a folder by key, except those whose key is not a safe path (`..`, `a//b`)."""
        base = self._path("").lstrip("/")

        def listed(fs: Any) -> dict[str, Stored]:
            fs.invalidate_cache()
            limit = _ANSWER if folder else STALL
            found = _watched(fs, limit, "find", self._path(folder).rstrip("/"), detail=True)
            keys = {path.lstrip("/")[len(base) :]: about for path, about in found.items()}
            return {
                key: Stored(int(about["size"] or 0), _tag(about))
                for key, about in keys.items()
                if not {"", ".", ".."} & set(key.split("/"))
            }

        try:
            return self._try(listed, folder)
        except FileNotFoundError:
            return {}

    def remove(self, key: str) -> None:
        """Delete an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda fs: _watched(fs, _ANSWER, "rm_file", self._path(key)), key)

    @property
    def _kind(self) -> str:
        return kind_of(urlsplit(self.url).scheme)

    def _transfer(self, request: str, key: str, *paths: str, **parts: Any) -> None:
        """Transfer a file in parts."""
        if self._kind == "az" or (self._kind == "s3" and request == "put_file"):
            parts["max_concurrency"] = _AT_ONCE  # Azure's driver would begin 128, of which none ends for long
        stall = STALL if self._kind == "s3" else STALL + _UNHEARD / _SLOWEST
        self._try(lambda fs: _watched(fs, stall, request, *paths, **parts), key)

    def _path(self, key: str) -> str:
        return f"{urlsplit(self.url).netloc}{urlsplit(self.url).path.rstrip('/')}/{key}"

    def _try(self, request: Callable[[Any], T], key: str) -> T:
        scheme = urlsplit(self.url).scheme
        begun, tries, renewed = time.monotonic(), 0, False
        patience = self.patience if begun > _away_until.get(self.url, 0.0) else 0.0
        while True:
            try:
                answer = request(_file_system(scheme))
                _away_until.pop(self.url, None)
                return answer
            except _FINAL:
                raise
            except Exception as error:
                unanswered = _unanswered(error)
                said = f"{self.url}/{key}: {_in_a_line(unanswered or error)}"
                if _is_taken(error):
                    raise FileExistsError(said) from error
                if type(error).__name__ == "ResourceNotFoundError":  # Azure's: of a container
                    raise FileNotFoundError(said) from error
                if not unanswered and _is_refused(error):
                    if renewed:
                        raise Unreachable(f"{said}; {advice(scheme)}") from error
                    renewed = True
                    _file_system.cache_clear()  # its credentials may have been replaced since it read them
                    continue
                if time.monotonic() - begun >= patience:
                    _away_until[self.url] = time.monotonic() + _AWAY
                    if unanswered:
                        said += "; the source of credentials did not answer; "
                        said += f"if there is none, {advice(scheme)}"
                    elif _is_anonymous(scheme):
                        said += f"; no credentials were found: {advice(scheme)}"
                        _file_system.cache_clear()  # so that the next request looks for them
                    raise Unreachable(said) from error
                log.debug("%s; retrying", said)
                tries += 1
                time.sleep(random.uniform(0.5, 1.0) * backoff(tries, 0.2, _LONGEST_PAUSE))


_away_until: dict[str, float] = {}
"""Unreachable stores: URL -> time until which requests are not retried."""


@functools.cache
def _file_system(scheme: str) -> Any:
    """fsspec's file system for a scheme, one per process and its credentials; for S3 with timeouts.

    The user's own fsspec settings (FSSPEC_S3_..., its configuration files) take precedence.
    """
    check_driver(scheme)
    import fsspec
    from fsspec.config import conf

    options: dict[str, Any] = {}
    if scheme == "s3":
        options["config_kwargs"] = {**_S3, **conf.get("s3", {}).get("config_kwargs", {})}
    if kind_of(scheme) == "gs":
        own = {**conf.get("gcs", {}), **conf.get("gs", {})}
        options["session_kwargs"] = {"raise_for_status": _say_at_once, **own.get("session_kwargs", {})}
        # Of asking what kind of bucket it is, which precedes all requests.
        options["retry_timeout"] = own.get("retry_timeout", 10.0)
    if scheme in ("file", "local"):
        options["auto_mkdir"] = True
    made = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
    if kind_of(scheme) == "az" and hasattr(made.credential, "get_token"):
        from fsspec.asyn import sync

        # Now: if that fails in a request, it is repeated for a minute.
        sync(made.loop, made.credential.get_token, "https://storage.azure.com/.default", timeout=_ANSWER)
    return made


async def _say_at_once(response: Any) -> None:
    """Raise for an answer 401, which Google's driver would repeat for half a minute, or 403 with a reason.

    The driver leaves out the reason, and calls every 403 forbidden, also one of too many requests.
    """
    if response.status not in (401, 403):
        return
    said = " ".join((await response.text()).split())
    if response.status == 401:
        raise PermissionError(f"Unauthorized: {said}")
    if reason := _NOT_OF_CREDENTIALS.search(said):
        raise OSError(f"{reason[0]}: {said}")


class _Parts:
    """An fsspec callback that records when the last part arrived."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self._arrived = 0

    def relative_update(self, amount: int = 1) -> None:
        self.at = time.monotonic()

    def absolute_update(self, arrived: int) -> None:
        """Google's and Azure's drivers say how much there is in all, Azure's also if that is no more."""
        if arrived != self._arrived:
            self._arrived, self.at = arrived, time.monotonic()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _watched(fs: Any, stall: float, request: str, *args: Any, **kwargs: Any) -> Any:
    """Make a request; raises OSError if nothing arrives for `stall` seconds, of a transfer in parts.

    Any other request, without a callback, must end within that time.

    Otherwise a driver may wait forever for permission to send (`Expect: 100-continue`), or retry for minutes
    without an answer.
    """
    if not fs.async_impl:
        return getattr(fs, request)(*args, **kwargs)
    credentials: Any = getattr(fs, "credentials", None)
    if hasattr(credentials, "maybe_refresh"):  # Google's: if that fails in a request, it is repeated for long
        credentials.maybe_refresh()
    import asyncio

    from fsspec.asyn import sync

    said = "nothing arrived for" if "callback" in kwargs else "it did not end within"
    heard = kwargs.get("callback") or _Parts()
    heard.at = time.monotonic()

    async def watched() -> Any:
        task = asyncio.ensure_future(getattr(fs, f"_{request}")(*args, **kwargs))
        try:
            while not (await asyncio.wait({task}, timeout=1.0))[0]:
                if time.monotonic() - heard.at > stall:
                    raise OSError(f"{said} {stall:.0f} s")
        finally:
            task.cancel()
        return task.result()

    return sync(fs.loop, watched)


def _is_anonymous(scheme: str) -> bool:
    """Whether Google's driver found no credentials, and asks for what everyone may read."""
    with contextlib.suppress(Exception):  # there may be no driver for what is set
        return kind_of(scheme) == "gs" and _file_system(scheme).credentials.credentials is None
    return False


def _in_a_line(error: BaseException) -> str:
    """An error by its class and message; of Azure's, without ids and details."""
    ends = ("Content: ", "Attempted credentials:")
    said = itertools.takewhile(lambda line: not line.startswith(ends), str(error).splitlines())
    kept = [line.strip() for line in said if not line.startswith(("RequestId:", "Time:"))]
    return " ".join([f"{type(error).__name__}:", *filter(None, kept)])


def _tag(about: dict[str, Any]) -> str:
    """A value in a driver's listing that changes with the object's content."""
    return next((str(about[name]) for name in _TAGS if about.get(name)), "")


def _is_taken(error: Exception) -> bool:
    """Whether an error means that an object to be created exists (412 from S3)."""
    return "PreconditionFailed" in str(error) or "At least one of the pre-conditions" in str(error)


def _is_refused(error: Exception) -> bool:
    """Whether credentials are missing, insufficient or expired: a retry with the same ones is useless."""
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        return True
    if getattr(error, "status_code", None) in (401, 403):  # Azure's
        return True
    return any(word in f"{error}{error.__cause__}" for word in _REFUSALS)


def _unanswered(error: Exception) -> BaseException | None:
    """What says that a source of credentials did not answer: the error or a cause of it; None if nothing."""
    cause: BaseException | None = error
    while cause and not _is_unanswered(cause):
        cause = cause.__cause__ or cause.__context__
    return cause


def _is_unanswered(error: BaseException) -> bool:
    kind = type(error).__name__
    if kind in ("TransportError", "RefreshError"):  # Google's
        return kind == "TransportError" or getattr(error, "retryable", False)
    if kind not in ("ClientAuthenticationError", "CredentialUnavailableError"):  # Azure's
        return False
    return (getattr(error, "status_code", 0) or 0) >= 500 or any(word in str(error) for word in _NO_ANSWER)
