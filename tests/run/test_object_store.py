"""Object stores: a real S3 over HTTP, and one that fails."""

from __future__ import annotations

import dataclasses
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import pytest
from stoker import object_store, store_urls
from stoker.errors import BadInput
from stoker.object_store import Store, Unreachable
from stoker.run.lease import Lease, LeasesInStore

from servers import Proxy
from support import SOAK


@pytest.fixture
def store(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder of its own, of a server that answers; what this process asks goes through the proxy."""
    _answers_within(1, monkeypatch)
    found = object_store.of(object_store.working_copy(f"s3://bucket/{uuid.uuid4().hex}"))
    assert found is not None
    return found


def _answers_within(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the driver ask again for what is not answered by then."""
    within = {"read_timeout": seconds, "connect_timeout": seconds}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": within})


def sizes(store: Store, folder: str = "") -> dict[str, int]:
    return {key: stored.size for key, stored in store.objects(folder).items()}


def test_objects_are_written_listed_read_and_removed(store: Store, tmp_path: Path) -> None:
    store.write("a/x", b"one")
    store.write("a/y", b"")
    store.write("b", b"three")
    assert sizes(store) == {"a/x": 3, "a/y": 0, "b": 5}
    assert sizes(store, "a") == {"a/x": 3, "a/y": 0}
    assert sizes(store, "c") == {}
    store.get("b", tmp_path / "folder" / "b")
    assert (tmp_path / "folder" / "b").read_bytes() == b"three"
    store.remove("b")
    store.remove("b")
    with pytest.raises(FileNotFoundError):
        store.read("b")
    with pytest.raises(FileNotFoundError):
        store.get("b", tmp_path / "b")
    assert not list(tmp_path.glob("*b*"))


def test_a_key_that_leads_out_of_the_folder_is_none(store: Store) -> None:
    store.write("a/../../evil", b"#!")
    store.write("a/x", b"1")
    assert sizes(store) == {"a/x": 1}


def test_of_two_that_make_an_object_one_is_told(store: Store) -> None:
    store.write("lease", b"first", new=True)
    with pytest.raises(FileExistsError):
        store.write("lease", b"second", new=True)
    assert store.read("lease") == b"first"


def test_a_large_file_goes_in_parts(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answers_within(60, monkeypatch)
    file = tmp_path / "large"
    file.write_bytes(bytes(range(256)) * 160_000)  # 41 MB
    store.put("large", file)
    assert len([path for method, path in proxy.log if method == "PUT" and "partNumber" in path]) == 5
    store.get("large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["500", "503", "hang", "drop", "refuse"] if SOAK else ["503", "drop"])
def test_what_fails_for_a_while_is_tried_again(mode: str, store: Store, proxy: Proxy, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 20_000_000)
    proxy.mode, proxy.left = mode, 3
    store.put("file", file)
    assert proxy.seen[mode] == 3
    assert sizes(store) == {"file": 20_000_000}


def test_a_part_that_is_cut_off_is_sent_again_alone(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answers_within(60, monkeypatch)
    file = tmp_path / "large"
    file.write_bytes(b"y" * 40_000_000)
    proxy._only = lambda method, path: "partNumber=2" in path
    proxy.mode, proxy.left = "drop", 2
    store.put("large", file)
    sent = [path.partition("partNumber=")[2][:1] for method, path in proxy.log if "partNumber" in path]
    assert sorted(sent) == ["1", "2", "2", "2", "3", "4", "5"]


def test_one_that_stays_away_is_said_to(store: Store, proxy: Proxy) -> None:
    driver = object_store._file_system("s3")
    proxy.mode = "503"
    with pytest.raises(Unreachable, match=r"s3://bucket/.*/a: "):
        dataclasses.replace(store, patience=1.0).write("a", b"")
    assert object_store._file_system("s3") is driver  # another one costs a part of a second
    proxy.mode = "ok"
    assert sizes(store) == {}


@pytest.mark.parametrize("url", ["s3://my.blob.core.team/runs", "gs://s3.amazonaws.com/runs"])
def test_a_bucket_may_have_the_name_of_a_host(url: str) -> None:
    store_urls.check(url)
    store_urls.check(url, written=False)


def test_one_that_never_lets_us_send_is_given_up(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _answers_within(60, monkeypatch)
    store.write("first", b"")  # which makes the driver's client; that takes its time
    monkeypatch.setattr(object_store, "STALL", 6.0)
    (tmp_path / "file").write_bytes(b"z" * 20_000_000)
    proxy.mode = "mute"
    with pytest.raises(Unreachable, match="nothing arrived for 6 s"):
        dataclasses.replace(store, patience=0.5).put("file", tmp_path / "file")
    assert proxy.seen["mute"]


def test_one_that_does_not_answer_is_given_up(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_ANSWER", 1.0)
    proxy._only = lambda method, path: True
    proxy.mode = "hang"
    begun = time.monotonic()
    with pytest.raises(Unreachable, match="it did not end within 1 s"):
        dataclasses.replace(store, patience=0.5).objects("a")
    with pytest.raises(Unreachable, match="it did not end within 1 s"):  # which has become known: one try
        dataclasses.replace(store, patience=100.0).read("b")
    assert time.monotonic() - begun < 100


def test_what_is_large_may_take_longer(store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    monkeypatch.setattr(object_store, "_ANSWER", 1.0)
    content = bytes(range(256)) * 2**14
    proxy._only = lambda method, path: True
    proxy.mode = "slow"
    store.write("large", content)
    assert store.read("large", 0, len(content)) == content
    with pytest.raises(Unreachable, match="it did not end within 1 s"):
        dataclasses.replace(store, patience=0.5).read("large", 0, 1)


def test_where_access_is_denied_it_is_said_at_once(store: Store, proxy: Proxy) -> None:
    proxy.mode = "403"
    with pytest.raises(Unreachable, match="provide credentials that"):
        store.write("a", b"")
    assert proxy.seen["403"] < 3


def test_a_lease_is_taken_though_the_answer_is_lost(store: Store, proxy: Proxy, tmp_path: Path) -> None:
    held = Lease(LeasesInStore(store, "experiment/a"), "here", tmp_path, None)
    proxy._only = lambda method, path: method == "PUT"
    proxy.mode, proxy.left = "lost", 1
    held.take()
    assert proxy.seen["lost"] == 1
    assert held.standing()


def test_without_credentials_nothing_is_tried_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    object_store._file_system.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(Unreachable, match="credentials"):
        store.write("a", b"")


def test_credentials_that_were_replaced_on_disk_are_read_anew(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = x\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    object_store._file_system.cache_clear()
    store.write("a", b"one")
    _expire(proxy, "old")
    with pytest.raises(Unreachable, match="token has expired"):
        store.write("a", b"two")
    credentials.write_text(credentials.read_text().replace("old", "new"))
    store.write("a", b"two")
    assert store.read("a") == b"two"
    (tmp_path / "file").write_bytes(b"x" * 20_000_000)
    credentials.write_text(credentials.read_text().replace("new", "newer"))
    _expire(proxy, "new/")
    store.put("file", tmp_path / "file")
    assert sizes(store) == {"a": 3, "file": 20_000_000}
    object_store._file_system.cache_clear()


def _expire(proxy: Proxy, key: str) -> None:
    """Have a server refuse a key, as S3 does once a session has expired."""
    handler = proxy._server.RequestHandlerClass
    answered = handler.do_PUT  # type: ignore[attr-defined]
    said = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"

    def answer(request: Any) -> None:
        if f"Credential={key}" not in (request.headers.get("Authorization") or ""):
            answered(request)
            return
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        request.send_response(400)
        request.send_header("Content-Type", "application/xml")
        request.send_header("Content-Length", str(len(said)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(said)

    for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
        setattr(handler, f"do_{method}", answer)


def test_two_servers_have_working_copies_of_their_own(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    first = object_store.working_copy("s3://bucket/runs")
    assert object_store.working_copy("s3://bucket/runs/") == first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert object_store.working_copy("s3://bucket/runs") != first
    assert object_store.of(first.parent) is None


def test_any_store_that_fsspec_knows_is_one(tmp_path: Path) -> None:
    folder = object_store.working_copy(f"file://{tmp_path}/there")
    found = object_store.of(folder)
    assert found is not None
    (tmp_path / "there").mkdir()
    found.write("a", b"x")
    assert (tmp_path / "there" / "a").read_bytes() == b"x"
    without_driver = object_store.of(object_store.working_copy("oci://bucket/runs"))
    assert without_driver is not None
    with pytest.raises(BadInput, match="driver that is not installed"):
        without_driver.objects()
