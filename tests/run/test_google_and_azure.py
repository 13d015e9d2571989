"""Object stores of Google and Azure, through their drivers."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import fsspec.config
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from stoker import object_store
from stoker.object_store import Store, Unreachable

from servers import AzureServer, Proxy, gcs_server

pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # by both drivers

_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A GCS with a bucket named `bucket`, behind a proxy that all requests go through."""
    with gcs_server("bucket") as url:
        proxy = Proxy(url, by_name=True)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        _forget(monkeypatch)
        yield proxy
        proxy.close()


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureServer]:
    """An Azure with a container named `bucket`."""
    server = AzureServer("bucket")
    _connect(monkeypatch, server.url)
    yield server
    server.close()


def _connect(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    known = f"DefaultEndpointsProtocol=http;AccountName=account;AccountKey={_KEY};BlobEndpoint={url}/account;"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", known)
    _forget(monkeypatch)


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have other servers and credentials used than in the tests before."""
    monkeypatch.setattr(object_store, "_away_until", {})
    object_store._file_system.cache_clear()


@pytest.fixture(params=["gs", "az"])
def store(request: pytest.FixtureRequest) -> Store:
    request.getfixturevalue({"gs": "google", "az": "azure"}[request.param])
    return Store(f"{request.param}://bucket/runs", "")


def test_objects_are_written_listed_read_and_removed(store: Store, tmp_path: Path) -> None:
    store.write("a/x", b"one")
    store.write("b", b"three")
    with pytest.raises(FileExistsError):
        store.write("b", b"another", new=True)
    assert {key: stored.size for key, stored in store.objects().items()} == {"a/x": 3, "b": 5}
    assert len({stored.tag for stored in store.objects().values()} - {""}) == 2
    assert [*store.objects("a")] == ["a/x"]
    assert store.read("b", 1, 3) == b"hr"
    store.get("b", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"three"
    store.remove("b")
    store.remove("b")
    with pytest.raises(FileNotFoundError):
        store.read("b")


def test_a_scheme_may_be_in_capitals(store: Store) -> None:
    scheme, _, folder = store.url.partition(":")
    found = object_store.of(object_store.working_copy(f"{scheme.upper()}:{folder}"))
    assert found is not None
    assert found.url == store.url
    dataclasses.replace(found, url=f"{scheme.upper()}:{folder}").write("a", b"x")
    assert store.read("a") == b"x"


def test_two_accounts_of_azure_have_working_copies_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "one")
    first = object_store.working_copy("az://bucket/runs")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "other")
    assert object_store.working_copy("az://bucket/runs") != first
    _connect(monkeypatch, "http://127.0.0.1:1")
    assert object_store.working_copy("az://bucket/runs").parent.parent.name == "az@account"


def test_a_bucket_that_does_not_exist_is_said_to_in_a_line(store: Store) -> None:
    other = dataclasses.replace(store, url=store.url.replace("bucket", "other"))
    with pytest.raises(FileNotFoundError) as raised:
        other.write("a", b"")
    assert "\n" not in str(raised.value)


@pytest.fixture
def stall(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds that a transfer may take without progress: fewer than the parts take at 3 seconds each."""
    monkeypatch.setattr(object_store, "STALL", 10.0)
    monkeypatch.setattr(object_store, "_UNHEARD", 0)
    return object_store.STALL


@pytest.mark.soak(small=False)
def test_an_upload_to_google_lasts_while_parts_arrive(google: Proxy, stall: float, tmp_path: Path) -> None:
    store, file = Store("gs://bucket/runs", "", patience=0.0), tmp_path / "file"
    file.write_bytes(bytes(110_000_000))
    google.mode, begun = "slow", time.monotonic()
    store.put("large", file)
    assert time.monotonic() - begun > stall
    google.mode = "ok"
    assert [stored.size for stored in store.objects().values()] == [110_000_000]


@pytest.mark.soak(small=False)
def test_transfers_of_azure_last_while_parts_arrive(
    azure: AzureServer, stall: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = Proxy(azure.url)
    _connect(monkeypatch, proxy.url)
    store, file = Store("az://bucket/runs", "", patience=0.0), tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 270_000)  # 69 MB
    proxy.mode = "slow"
    for transfer in (store.put, store.get):
        begun = time.monotonic()
        transfer("large", file)
        assert time.monotonic() - begun > stall
    proxy.close()
    assert azure.blobs == {"runs/large": file.read_bytes()}


_REFUSED = {
    "403": (403, "AuthorizationPermissionMismatch", "This request is not authorized to do this."),
    "401": (401, "NoAuthenticationInformation", "Server failed to authenticate the request."),
    "signature": (403, "AuthenticationFailed", "Server failed to authenticate the request."),
}


@pytest.mark.parametrize("refusal", _REFUSED)
def test_a_refusal_of_azure_is_said_at_once(refusal: str, azure: AzureServer, tmp_path: Path) -> None:
    azure.refusal = _REFUSED[refusal]
    said = r"ErrorCode:[A-Z]\w+; provide credentials that .*AZURE_STORAGE_ACCOUNT_NAME"
    _refused(Store("az://bucket/runs", "", patience=AT_ONCE), tmp_path, said)


@pytest.mark.parametrize("refusal", ["403", "401"])
def test_a_refusal_of_google_is_said_at_once(refusal: str, google: Proxy, tmp_path: Path) -> None:
    google.mode = refusal
    said = r"provide credentials that .*GOOGLE_APPLICATION_CREDENTIALS"
    _refused(Store("gs://bucket/runs", "", patience=AT_ONCE), tmp_path, said)


AT_ONCE = 25.0
"""Seconds: fewer than the half a minute or more for which a driver tries again."""


def _import_driver(store: Store) -> None:
    """Before a request is timed: that may take longer than the request."""
    fsspec.get_filesystem_class(store.url.partition(":")[0])


def _refused(store: Store, folder: Path, said: str) -> None:
    """Check that all requests are refused with advice about credentials, and each soon."""
    (folder / "file").write_bytes(b"x" * 6 * 2**20)
    _import_driver(store)
    for request in (
        lambda: store.write("a", b""),
        lambda: store.write("a", b"", new=True),
        lambda: store.read("a"),
        store.objects,
        lambda: store.put("a", folder / "file"),
        lambda: store.get("a", folder / "got"),
        lambda: store.remove("a"),
    ):
        begun = time.monotonic()
        with pytest.raises(Unreachable, match=said) as raised:
            request()
        assert time.monotonic() - begun < store.patience
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("account", ["", "account"])
def test_without_credentials_for_azure_it_is_said_at_once(
    account: str, azure: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", account)
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")  # not those of this machine
    store = Store("az://bucket/runs", "", patience=AT_ONCE)
    _import_driver(store)
    begun = time.monotonic()
    with pytest.raises(Unreachable, match=r"provide credentials that .*az login") as raised:
        store.write("a", b"")
    assert "\n" not in str(raised.value)
    assert time.monotonic() - begun < store.patience


@pytest.fixture
def tokens() -> Iterator[str]:
    """A server of access tokens: its `/name` gives the token `name`, but none of the name `revoked`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            refused = self.path == "/revoked"
            token = {"access_token": self.path[1:], "expires_in": 3600}
            said = {"error": "invalid_grant"} if refused else token
            self.send_response(400 if refused else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def account() -> dict[str, str]:
    """The file of a service account of Google's, without the address of its source of tokens."""
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {"type": "service_account", "client_email": "someone@project", "private_key": key.decode()}


@pytest.mark.parametrize("old", ["expired", "revoked"])
def test_credentials_for_google_that_were_replaced_on_disk_are_read_anew(
    old: str,
    google: Proxy,
    account: dict[str, str],
    tokens: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "account.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    proxy = Proxy(google.url, required="Bearer new")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    store = Store("gs://bucket/runs", "", patience=AT_ONCE)
    file.write_text(json.dumps({**account, "token_uri": f"{tokens}/{old}"}))
    _import_driver(store)
    begun = time.monotonic()
    with pytest.raises(Unreachable, match=r"provide credentials that .*GOOGLE_APPLICATION_CREDENTIALS"):
        store.write("a", b"one")
    assert time.monotonic() - begun < store.patience
    file.write_text(json.dumps({**account, "token_uri": f"{tokens}/new"}))
    store.write("a", b"one")
    proxy.close()
    assert google.log


def test_a_source_of_tokens_of_google_that_does_not_answer_is_no_refusal(
    google: Proxy,
    account: dict[str, str],
    tokens: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("google.auth._exponential_backoff.time", SimpleNamespace(sleep=lambda _: None))
    source = Proxy(tokens)
    file = tmp_path / "account.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    file.write_text(json.dumps({**account, "token_uri": f"{source.url}/new"}))
    store = Store("gs://bucket/runs", "")
    source.mode = "503"
    said = r"RefreshError: .*Service Unavailable.* the source of credentials did not answer; if there is none"
    with pytest.raises(Unreachable, match=said) as raised:
        dataclasses.replace(store, patience=0.0).write("a", b"one")
    assert "\n" not in str(raised.value)
    object_store._away_until.clear()
    source.left = 6  # of two requests for a token
    store.write("a", b"one")
    assert store.read("a") == b"one"
    source.close()


def test_a_source_of_tokens_of_azure_that_does_not_answer_is_asked_again(
    tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Proxy(tokens)
    source.mode = "refuse"
    monkeypatch.setattr("azure.identity._credentials.imds.IMDS_AUTHORITY", source.url)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "prod")
    _forget(monkeypatch)
    waited = [1.0]  # patience is for what is waited, however long the driver takes to fail
    of_pauses = SimpleNamespace(
        monotonic=lambda: waited[0], sleep=lambda seconds: waited.append(waited.pop() + seconds)
    )
    monkeypatch.setattr(object_store, "time", of_pauses)
    with pytest.raises(
        Unreachable, match=r"did not answer; if there is none, provide credentials .*az login"
    ):
        Store("az://bucket/runs", "", patience=1.5).write("a", b"")
    assert source.seen["refuse"] > 2
    source.close()


@pytest.mark.parametrize("reason", ["userRateLimitExceeded", "quotaExceeded", "retentionPolicyNotMet"])
def test_a_limit_of_google_is_no_refusal(reason: str, google: Proxy) -> None:
    error = {"code": 403, "message": "Not now.", "errors": [{"reason": reason}]}
    google.said, google.mode, google.left = json.dumps({"error": error}), "403", 2
    store = Store("gs://bucket/runs", "")
    store.write("a", b"one")
    assert store.read("a") == b"one"


def test_settings_of_fsspec_for_google_take_precedence(
    google: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert object_store._file_system("gs").storage_options["retry_timeout"] == 10.0
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"retry_timeout": 3.0})
    _forget(monkeypatch)
    assert object_store._file_system("gs").storage_options["retry_timeout"] == 3.0
