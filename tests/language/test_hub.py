"""A hub that has a model, one that has not, and what of its kind does not answer; all are real servers."""

from __future__ import annotations

import os
import resource
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import constants
from stoker import Run, storage
from stoker.errors import BadInput
from stoker.language import hub

import hub_server
from commands import Point
from hub_server import Hub
from servers import Proxy, listening
from support import LONG


@pytest.fixture
def served(point_at: Point) -> Iterator[Hub]:
    """A hub with one model."""
    with hub_server.serving() as made:
        made.models["org/one"] = {"config.json": b"{}", "model.safetensors": b"w" * 100_000}
        point_at(made.url)
        yield made


def test_a_model_is_brought_once_and_serves_where_the_hub_is_gone(served: Hub, point_at: Point) -> None:
    folder = hub.find("org/one@main")
    assert (folder / "model.safetensors").read_bytes() == b"w" * 100_000
    point_at("http://127.0.0.1:9")
    assert hub.find("org/one@main") == folder
    with pytest.raises(BadInput, match="cannot be reached"):
        hub.find("org/two")


def test_a_model_that_was_brought_serves_offline(
    served: Hub, point_at: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.find("org/one", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (hub.find("org/one", weights=False) / "config.json").is_file()
    with pytest.raises(BadInput, match="offline mode is enabled"):
        hub.find("org/one")  # its weights were not


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("org/one@typo", r"model org/one has no revision typo: give one of its branches"),
        ("org/two", r"model org/two is neither a local directory nor on the hub"),
    ],
)
def test_what_a_hub_has_not_is_said(served: Hub, reference: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        hub.find(reference)


def test_a_hub_that_is_silent_is_not_waited_for_and_what_was_brought_serves(
    served: Hub, point_at: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.find("org/one")
    monkeypatch.setattr(hub, "_ANSWER", 0.3)
    monkeypatch.setattr(hub, "_SPARED", LONG)  # or it might be asked again, on a slow machine
    with listening(None) as address:
        point_at(f"http://{address}")
        began = time.monotonic()
        with pytest.raises(BadInput, match=r"the hub cannot be reached \(.*timed out\)"):
            hub.find("org/two")
        assert time.monotonic() - began < LONG
        assert hub.find("org/one") == folder
        monkeypatch.setattr(hub, "_ANSWER", 2 * LONG)
        began = time.monotonic()
        assert hub.find("org/one") == folder  # it is not asked again
        assert time.monotonic() - began < LONG
        monkeypatch.setattr(hub, "_ANSWER", 0.3)
        with pytest.raises(BadInput, match=r"the hub cannot be reached \(.*timed out\)"):
            hub.find("org/two")  # but for what is not here


@pytest.mark.parametrize(
    "answer", [b"", b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<html"]
)
def test_a_hub_that_is_none_cannot_be_reached(point_at: Point, answer: bytes) -> None:
    with listening(answer) as address:
        point_at(f"http://{address}")
        with pytest.raises(BadInput, match=r"the hub cannot be reached \("):
            hub.find("org/one")


def test_a_proxy_that_refuses_cannot_be_passed(point_at: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("https://hub.invalid")
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with listening(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n") as address:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
        with pytest.raises(BadInput, match=r"the hub cannot be reached \(503 Service Unavailable\)"):
            hub.find("org/one")


@pytest.mark.filterwarnings("ignore")  # the hub's client warns too
def test_a_disk_without_room_is_said_as_that(served: Hub) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes of a file
    try:
        with pytest.raises(BadInput, match=r"cannot be stored in .*cache \(.*File too large.*HF_HOME"):
            hub.find("org/one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_are_read_for_their_checksums_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    checksum = storage.xxh3
    monkeypatch.setattr(storage, "xxh3", lambda file: read.append(file) or checksum(file))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    monkeypatch.setattr(hub, "_SETTLED", LONG * 10**9)
    first = hub.fingerprint(tmp_path)
    assert hub.fingerprint(tmp_path) == first
    assert len(read) == 2  # it was written just now, and may be again within the same tick
    monkeypatch.setattr(hub, "_SETTLED", -1)
    assert [hub.fingerprint(tmp_path) for _ in range(3)] == [first] * 3
    assert len(read) == 3
    before = weights.stat()
    weights.write_bytes(b"two")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` leaves it
    assert hub.fingerprint(tmp_path) != first


def test_the_folder_of_a_run_is_what_it_has_exported(tmp_path: Path) -> None:
    with Run("llm", "a", runs=tmp_path) as run:
        run.log(loss=1.0)
        with pytest.raises(BadInput, match=r"an exported model: it has exported nothing yet"):
            hub.find(str(run.directory.path))
        made = run.directory.artifacts / "model"
        made.mkdir(parents=True)
        (made / "config.json").write_text("{}")
        run.artifact(made, kind="model")
    assert hub.find(str(run.directory.path)) == made
    with pytest.raises(BadInput, match=r"is a run without an exported adapter: it exported the model"):
        hub.find(str(run.directory.path), "lora.adapter")
    (made / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"exported the adapter .* give it as lora\.adapter="):
        hub.find(str(run.directory.path))


@pytest.mark.parametrize("name", ["first", "llm/first"])
def test_of_the_name_of_a_run_it_is_said_how_to_give_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Run("llm", "first") as run:
        run.log(loss=1.0)
    for given in (name, name.replace("first", "second")):
        with pytest.raises(BadInput) as refused:
            hub.find(given)
        said = "for the run of that name give its folder: model=runs/llm/first"
        assert (said in str(refused.value)) == (given == name)


def test_a_run_in_an_object_store_is_answered_with_the_folder_of_its_export(proxy: Proxy) -> None:
    url = f"s3://bucket/{uuid.uuid4().hex}/llm/a"
    files = fsspec.filesystem("s3")
    files.pipe(f"{url}/run.json", b"{}")
    with pytest.raises(BadInput, match=f"model {url} is a run: it has exported nothing yet"):
        hub.find(url)
    files.pipe(f"{url}/artifacts/model/config.json", b"{}")
    with pytest.raises(BadInput, match=f"model {url} is a run: give its export, {url}/artifacts/model"):
        hub.find(url)
    assert (hub.find(f"{url}/artifacts/model") / "config.json").read_bytes() == b"{}"
