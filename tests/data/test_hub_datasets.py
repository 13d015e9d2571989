"""Datasets of a hub on this machine, by their ids: revisions, configs, splits, streams, and refusals."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stoker.data import hub_datasets, sources
from stoker.data.hub_datasets import Id

import hub_server

CONFIGS = b"""---
configs:
- config_name: one
  data_files:
  - {split: train, path: "one/train*.jsonl"}
  - {split: test, path: "one/test*.jsonl"}
- config_name: two
  data_files:
  - {split: train_sft, path: "two/*.json"}
  - {split: test_sft, path: "two/*.jsonl.gz"}
- config_name: three
  data_files: "three.jsonl"
---
"""

ASK = """
import json, sys
from stoker.data import chunks, hub_datasets, labelled_sources, sources
from stoker.errors import BadInput
from stoker.language import hub

def read(name):
    rows = [row["text"] for _, row in hub_datasets.read(name)]
    return {"texts": rows, "revision": hub_datasets.revision(name)}

def stream(name):
    found = chunks.find(name)
    texts = [document.text for number in range(len(found)) for document in found.documents(number)]
    return {"texts": texts, "revision": hub_datasets.revision(name), "fingerprint": found.fingerprint}

def labelled(name):
    found = labelled_sources.of_hub(name, labelled_sources.Columns("text", "label"))
    return {split: [text.text for text in texts] for split, texts in found.items()}

def mixture(data):
    found = sources.read_all(data, validation=0.2, test=0.2, streaming=True)
    return [(source.name, source.weight, source.fingerprint) for source in found]

def whole(data):
    found = sources.read_all(data, validation=0.0, test=0.0)
    return [(source.name, source.weight, source.fingerprint, len(source.splits.train)) for source in found]

def checked(data):
    sources.check({"data": data})

def model(name):
    return str(hub.find(name))

answers = []
for function, name in json.loads(sys.argv[1]):
    try:
        answers.append(globals()[function](name))
    except BadInput as error:
        answers.append(str(error))
print(json.dumps(answers))
"""

MIXED = "org/chats#/train_sft:3,org/chats#/test_sft:1,org/data@old#three:2"
SLICES = {
    "train[:20%]": range(12),
    "train[50:55]": range(50, 55),
    "train[-5%:]": range(57, 60),
    "train[58:100]": range(58, 60),
    "train[:2]+train[-1:]": (0, 1, 59),
}
SLICED = "org/data#three/train[:20%]:3,org/data#three/train[20%:]:1"
NO_SLICES = {
    "train[:x]": "Unrecognized instruction format: train[:x]; a slice is written as train[:20%], ",
    "train[:120%]": "Percent slice boundaries must be > -100 and < 100; a slice is written as ",
    "trian[:5]": "Unknown split \"trian\". Should be one of ['train']; a slice is written as ",
    "train[60:]": "the slice is empty: train has 60 rows",
    "train[40:10]": "the slice is empty: train has 60 rows",
    "train[5:4]": "the slice is empty: train has 60 rows",
    "train[:5]+train[-200:-100]": "the slice is empty: train has 60 rows",
}
ASKED = [
    *(("read", f"org/data#three/{split}") for split in (*SLICES, *NO_SLICES)),
    *(("checked", f"org/data#three/{split}") for split in NO_SLICES),
    *(("whole", data) for data in (SLICED, *SLICED.replace(":3", "").removesuffix(":1").split(","))),
    ("checked", SLICED), ("stream", "org/data#three/train[:20%]"), ("labelled", "org/data#three/train[:2]"),
    *((way, name) for way in ("read", "stream") for name in (
        "org/data#one", "org/data#one/test", "org/data@old#one", "org/data#two/train_sft", "org/plain",
        "org/plain#/test", "org/gated",
    )),
    *(("read", name) for name in (
        "org/data", "org/data#on", "org/data#two", "org/plain@nope", "org/nothing", "org/broken",
    )),
    ("stream", "org/data#two/test_sft"), ("stream", "org/arrow"),
    ("labelled", "org/plain"), ("labelled", "org/plain#/test"), ("model", "org/gated-model"),
    ("model", "org/gated-model@nope"), ("mixture", MIXED), ("checked", "org/plain:3,org/data#two:1"),
]  # fmt: skip


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text, "label": text[:1]}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serving() as made:
        data = {
            "README.md": CONFIGS, "one/train.jsonl": lines("one"), "one/test.jsonl": lines("one, test"),
            "two/a.json": b'[{"text": "two", "label": "t"},\n {"text": "three", "label": "t"}]',
            "two/b.jsonl.gz": gzip.compress(lines("four")),
            "three.jsonl": lines(*map(str, range(60))),
        }  # fmt: skip
        plain = {"train.jsonl": lines("plain"), "test.jsonl": lines("plain, test")}
        made.datasets |= {
            "org/data": data, "org/data@old": {**data, "one/train.jsonl": lines("old")},
            "org/plain": plain, "org/gated": plain,
            "org/broken": {"train.jsonl": b'{"text": "a"}\n{"text": \n'},
            "org/chats": {
                f"data/{split}-00000-of-00001.jsonl": lines(*(f"{split} {n}" for n in range(60)))
                for split in ("train_sft", "test_sft")
            },
            "org/arrow": {"train.arrow": b"ARROW1"},
        }  # fmt: skip
        made.models["org/gated-model"] = {"config.json": b"{}"}
        made.gated |= {"org/gated", "org/gated-model"}
        yield made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def asked(hub: hub_server.Hub, home: Path, calls: Any, *, offline: str = "0") -> dict[Any, Any]:
    """The answers to calls, each made in one process whose hub is this one."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK, json.dumps(calls)],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline,
             "HF_HUB_DISABLE_XET": "1", "STOKER_CACHE": str(home / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def answers(hub: hub_server.Hub, home: Path) -> dict[Any, Any]:
    return asked(hub, home, ASKED)


@pytest.mark.parametrize("way", ["read", "stream"])
@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("org/data#one", ["one"]),
        ("org/data#one/test", ["one, test"]),
        ("org/data@old#one", ["old"]),
        ("org/data#two/train_sft", ["two", "three"]),
        ("org/plain", ["plain"]),
        ("org/plain#/test", ["plain, test"]),
    ],
)
def test_an_id_names_a_revision_a_config_and_a_split(
    answers: dict[Any, Any], hub: hub_server.Hub, way: str, name: str, texts: list[str]
) -> None:
    found = answers[way, name]
    assert found["texts"] == texts
    assert found["revision"] == hub.dataset_commit(name.partition("#")[0])


@pytest.mark.parametrize("split", SLICES)
def test_a_slice_has_the_rows_that_datasets_gives_it(answers: dict[Any, Any], split: str) -> None:
    assert answers["read", f"org/data#three/{split}"]["texts"] == list(map(str, SLICES[split]))


@pytest.mark.parametrize("split", NO_SLICES)
def test_a_slice_that_is_none_is_refused(answers: dict[Any, Any], split: str) -> None:
    """At the launch if it cannot be one; if its rows have to be counted first, once they are downloaded."""
    name = f"org/data#three/{split}"
    assert answers["read", name].startswith(f"dataset {name}: {NO_SLICES[split]}")
    assert "\n" not in answers["read", name]
    if "is empty" not in NO_SLICES[split]:
        assert answers["checked", name] == answers["read", name]


def test_slices_are_weighted_and_told_apart_and_not_streamed(answers: dict[Any, Any]) -> None:
    assert answers["checked", SLICED] is None
    found = answers["whole", SLICED]
    assert [(name, weight, count) for name, weight, _, count in found] == [
        ("data-1", 3, 12), ("data-2", 1, 48)
    ]  # fmt: skip
    alone = [answers["whole", f"org/data#three/train[{part}]"][0] for part in (":20%", "20%:")]
    assert [source[2] for source in alone] == [source[2] for source in found]
    assert found[0][2] != found[1][2]
    said = answers["stream", "org/data#three/train[:20%]"]
    assert said.startswith("org/data#three/train[:20%]: a slice cannot be streamed")
    assert answers["labelled", "org/data#three/train[:2]"] == {"train": ["0", "1"]}


def test_compressed_lines_are_streamed(answers: dict[Any, Any]) -> None:
    assert answers["stream", "org/data#two/test_sft"]["texts"] == ["four"]


def test_streams_are_told_apart_by_what_their_files_hold(answers: dict[Any, Any]) -> None:
    names = ("org/data#one", "org/data#one/test", "org/data@old#one", "org/plain")
    assert len({answers["stream", name]["fingerprint"] for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/data", "has several configs: use one of one, two, three, as in org/data#one"),
        ("org/data#on", "use one of one, two, three, as in org/data#one; did you mean 'one'?"),
        ("org/data#two", "has no split train: use one of train_sft, test_sft, as in org/data#two/train_sft"),
        ("org/plain@nope", "has no revision nope: give one of its branches, tags or commits"),
        ("org/nothing", "is neither a local file nor a dataset on the hub (if it is private, set HF_TOKEN)"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_with_what_is(answers: dict[Any, Any], name: str, message: str) -> None:
    said = answers["read", name]
    assert said.endswith(message)
    assert name.partition("#")[0].partition("@")[0] in said


@pytest.mark.parametrize(
    ("way", "name"), [("read", "org/gated"), ("stream", "org/gated"), ("model", "org/gated-model")]
)
def test_what_is_gated_says_what_to_set(answers: dict[Any, Any], way: str, name: str) -> None:
    said = answers[way, name]
    assert said.endswith(
        f"{name} is gated: accept its terms on the hub, and set HF_TOKEN to one of your tokens"
    )


def test_a_model_has_no_such_revision(answers: dict[Any, Any]) -> None:
    said = answers["model", "org/gated-model@nope"]
    assert said == "model org/gated-model has no revision nope: give one of its branches, tags or commits"


def test_a_dataset_that_is_damaged_says_why(answers: dict[Any, Any]) -> None:
    assert answers["read", "org/broken"].startswith("dataset org/broken cannot be loaded: JSON parse error: ")


def test_a_dataset_that_cannot_be_streamed_says_so(answers: dict[Any, Any]) -> None:
    said = answers["stream", "org/arrow"]
    assert said.startswith("org/arrow has train.arrow, ")
    assert said.endswith("omit streaming=true")


def test_labelled_texts_have_the_splits_of_the_hub_or_the_one_that_is_named(answers: dict[Any, Any]) -> None:
    assert answers["labelled", "org/plain"] == {"train": ["plain"], "test": ["plain, test"]}
    assert answers["labelled", "org/plain#/test"] == {"train": ["plain, test"]}


def test_offline_reads_what_was_downloaded_and_no_other_revision_for_it(
    answers: dict[Any, Any], hub: hub_server.Hub, home: Path
) -> None:
    calls = [("read", "org/data#one/test"), ("read", "org/plain@nope"), ("stream", "org/plain")]
    known, other, stream = asked(hub, home, calls, offline="1").values()
    assert known["texts"] == ["one, test"]
    assert other.startswith(
        "org/plain@nope: the hub was not asked, and the downloaded revision is a different one"
    )
    assert stream.endswith("omit streaming=true")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("org/name", Id("org/name", "", "", "")),
        ("name@v1.0", Id("name", "v1.0", "", "")),
        ("org/name@refs/pr/1#config/split", Id("org/name", "refs/pr/1", "config", "split")),
        ("org/name#/split", Id("org/name", "", "", "split")),
        ("org/name#/train[:20%]", Id("org/name", "", "", "train[:20%]")),
    ],
)
def test_an_id_has_parts(given: str, parts: Id) -> None:
    assert hub_datasets.parse(given) == parts
    assert not hub_datasets.is_a_file_name(given)
    assert sources.named(f"{given}:3,a.jsonl:1") == [given, "a.jsonl"]


def test_a_mixture_is_of_splits_revisions_and_configs(answers: dict[Any, Any]) -> None:
    found = answers["mixture", MIXED]
    named = [(name, weight) for name, weight, _ in found]
    assert named == [("chats-1", 3), ("chats-2", 1), ("data", 2)]
    assert len({fingerprint for _, _, fingerprint in found}) == 3


def test_of_a_mixture_what_is_not_there_is_refused_before_any_of_it_is_read(answers: dict[Any, Any]) -> None:
    assert "org/data#two has no split train" in answers["checked", "org/plain:3,org/data#two:1"]
