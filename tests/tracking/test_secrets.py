"""Secrets planted wherever one may come from are in no file that a run leaves, as real commands."""

from __future__ import annotations

import subprocess
import tarfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import orjson
from pyarrow import parquet
from stoker.redaction import REDACTED
from stoker.run import journal

SCRIPT = """
import logging, os, sys
from dataclasses import dataclass
import stoker, torch
from torch.nn.functional import mse_loss

@dataclass(frozen=True, kw_only=True)
class Config:
    api_key: str
    source: str = ""
    fallback_token: str = os.environ["MY_SERVICE_TOKEN"]
    fail: bool = False
    batch_size: int = 4
    steps: int = 2

def train(run: stoker.Run, config: Config) -> None:
    told = os.environ["MY_SERVICE_TOKEN"]
    print("printed", config.api_key, told, flush=True)
    print("printed", config.api_key, told, file=sys.stderr, flush=True)
    logging.getLogger("stoker").info("logged %s %s", config.api_key, told)
    run.params(key=told, hub_token=config.api_key, text=f"key {config.api_key}")
    run.tag(token=config.api_key, said=f"with {told}")
    run.note(f"noted {config.api_key}, {told}")
    run.text("said", f"said {config.api_key}")
    run.table("rows", [{"cell": f"cell {told}"}])
    assert config.source.startswith("https://me:") and config.fallback_token == told
    data = torch.arange(32.0).reshape(8, 4)
    trainer = stoker.Trainer(run, torch.nn.Linear(4, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.001),
        loss=lambda out, x: (mse_loss(out, x[:, :1], reduction="sum"), len(x)), inputs=lambda x: (x,))
    for batch in trainer.steps(trainer.loader(data, batch_size=config.batch_size), max_steps=config.steps):
        run.log(loss=trainer.step(batch))
    if config.fail:
        raise RuntimeError(f"refused {config.api_key}, {told}")
"""


@dataclass(frozen=True)
class Planted:
    """Each secret, by where it comes from."""

    environment: str
    config: str
    url: str
    remote: str
    committed: str
    changed: str
    untracked: str


def _planted() -> Planted:
    return Planted(*(f"s3cr{uuid.uuid4().hex}" for _ in fields(Planted)))


def _repository(folder: Path, secret: Planted) -> Path:
    """A repository with a script, and a secret in its remote, in a commit, in a change and in a new file."""
    folder.mkdir()

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    git("init")
    git("remote", "add", "origin", f"https://me:{secret.remote}@example.com/a.git")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "service.py").write_text(f'PASSWORD = "{secret.committed}"\n')
    git("add", ".")
    git("commit", "-m", "first")
    (folder / "service.py").write_text(f'PASSWORD = "{secret.changed}"\n')
    (folder / "settings.yaml").write_text(f"db:\n  password: {secret.untracked}\n")
    return folder


def _texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The content of all files of a folder, of those in archives, and of the tables that are compressed."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield str(file), file.read_bytes()
        if file.name.endswith(".tar.gz"):
            with tarfile.open(file) as members:
                for member in members:
                    content = members.extractfile(member)
                    yield f"{file}:{member.name}", content.read() if content else b""
        if file.suffix == ".parquet":
            yield f"{file} as a table", str(parquet.read_table(file).to_pydict()).encode()


def _holding(folder: Path, secret: Planted) -> list[str]:
    found = [(name, getattr(secret, name).encode()) for name in Planted.__dataclass_fields__]
    return [
        f"{name} in {where}" for where, content in _texts(folder) for name, value in found if value in content
    ]


def test_a_planted_secret_is_in_no_file_of_a_run(
    stoker: Callable[..., Any], tmp_path: Path, runs: Path
) -> None:
    secret = _planted()
    repository = _repository(tmp_path / "repository", secret)
    assert {one.partition(" ")[0] for one in _holding(repository, secret)} >= {
        "remote",
        "changed",
        "untracked",
    }
    given = (f"api_key={secret.config}", f"source=https://me:{secret.url}@example.com/data")
    env = {"MY_SERVICE_TOKEN": secret.environment, "STOKER_SINKS": "mlflow,tensorboard"}
    quiet = {**env, "STOKER_SINKS": "none"}
    command = ("train", "train.py", *given, "--runs", str(runs), "--name", "a")
    done = stoker(*command, env=env, cwd=repository)
    assert done.code == 0, done.err
    assert secret.config in done.out  # what a script prints itself is its own
    failed = stoker(*command, "fail=true", "--experiment", "failed", env=quiet, cwd=repository)
    assert failed.code == 1
    said = str(list(journal.read(runs / "failed" / "a" / "journal")))
    assert f"RuntimeError: refused {REDACTED}, {REDACTED}" in said
    assert _holding(runs, secret) == []
    record = orjson.loads((runs / "train" / "a" / "run.json").read_bytes())
    assert record["config"]["api_key"] == record["config"]["fallback_token"] == REDACTED
    assert record["config"]["source"] == f"https://me:{REDACTED}@example.com/data"
    assert f"api_key={REDACTED}" in record["command"]
    code = orjson.loads((runs / "train" / "a" / "provenance" / "code.json").read_bytes())
    assert code["redacted"] == ["service.py", "settings.yaml"]
    assert code["remote"] == "https://example.com/a.git"


def test_a_run_goes_on_once_its_secret_is_given_again(stoker: Callable[..., Any], tmp_path: Path) -> None:
    secret = _planted()
    repository = _repository(tmp_path / "repository", secret)
    where = ("--runs", str(tmp_path / "runs"))
    source = "source=https://me:pa55word@example.com/data"
    command = ("train", "train.py", source, *where, "--name", "a")
    env = {"MY_SERVICE_TOKEN": secret.environment, "STOKER_SINKS": "none"}
    assert stoker(*command, f"api_key={secret.config}", env=env, cwd=repository).code == 0
    again = stoker(*command, f"api_key={secret.config}", env=env, cwd=repository)
    assert (again.code, "already finished" in again.out) == (0, True)
    refused = stoker("resume", "a", *where, env=env, cwd=repository)
    assert refused.code == 2
    assert (
        "api_key, source: secrets are not recorded, so give the value again: api_key=... source=..."
        in refused.err
    )
    partly = stoker("resume", "a", source, *where, env=env, cwd=repository)
    assert "api_key: secrets are not recorded" in partly.err
    resumed = stoker(
        "resume", "a", source, f"api_key={secret.config}", "steps=4", *where, env=env, cwd=repository
    )
    assert resumed.code == 0, resumed.err
    assert "drift: steps was 2 and is 4" in resumed.err
    assert "drift: api_key" not in resumed.err
    assert _holding(tmp_path / "runs", secret) == []
