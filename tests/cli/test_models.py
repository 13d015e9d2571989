"""The registry: what runs made, registered, promoted and pulled, and loaded with MLflow's own client."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stoker.checkpoint import manifest, store
from stoker.cli.verbs import models
from stoker.run import artifacts, journal
from stoker.run.directory import RunDirectory
from stoker.tracking import store as tracking_store

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has ended, with an export and two checkpoints of which the first is the best."""
    directory = RunDirectory(tmp_path / "runs" / "digits" / "a")
    directory.create({
        "uid": "uid-of-a", "id": "a", "experiment": "digits", "config": {"lr": 0.1}, "sources": {},
        "command": ["/x/stoker", "train", "cnn.py", "lr=0.1"], "code": {"commit": "c0ffee", "dirty": True},
    })  # fmt: skip
    _, writer = journal.start_attempt(directory.journal)
    writer.append("attempt_started", pid=1, host="here")
    for step, loss in ((10, 0.25), (20, 0.5)):
        writer.append("metrics", step=step, values={"val_loss": loss})
        weights = {"model.w": torch.full((2,), float(step)), "optimizer.m": torch.zeros(2)}
        saver = store.Saver(directory.checkpoints)
        saver.save(weights, {}, store.About(step, step, {"val_loss": loss}))
        saver.wait()
        writer.append("checkpoint", step=step, path="", bytes=1)
    save_file({"w": torch.full((2,), 20.0)}, directory.artifacts / "model.safetensors")
    files = artifacts.describe(directory, directory.artifacts / "model.safetensors")
    path = "artifacts/model.safetensors"
    writer.append("artifact", name="model.safetensors", kind="model", path=path, files=files)
    writer.append("tags", tags={"fingerprint.data": "d474"})
    writer.append("attempt_ended", status="finished")
    writer.close()
    return directory


def _loaded(runs: Path, reference: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow

        mlflow.set_tracking_uri(tracking_store.embedded_uri(runs))
        mlflow.set_registry_uri(tracking_store.embedded_uri(runs))
        return mlflow.pyfunc.load_model(f"models:/{reference}").unwrap_python_model()


def test_versions_are_registered_promoted_pulled_and_load_with_mlflow(
    run: RunDirectory, stoker: Any, tmp_path: Path
) -> None:
    assert stoker("models", "list").code == 2  # nothing is tracked yet
    first = stoker("models", "register", "a", "--name", "fraud", "--json").answer
    best = stoker("models", "register", "a", "--name", "fraud", "--checkpoint", "best", "--json").answer
    assert (first["version"], first["step"], best["version"], best["step"]) == (1, None, 2, 10)
    assert best["run"] == "digits/a"
    assert best["lineage"]["code.commit"] == "c0ffee"
    assert best["lineage"]["fingerprint.data"] == "d474"
    assert best["lineage"]["command"] == "stoker train cnn.py lr=0.1"
    assert best["lineage"]["metric.val_loss"] == "0.25"

    assert stoker("models", "promote", "fraud@1", "production").code == 0
    assert stoker("models", "promote", "fraud@2", "production", "--json").answer["aliases"] == ["production"]
    listed = {v["version"]: v["stage"] for v in stoker("models", "list", "--json").answer["models"]}
    assert listed == {1: "archived", 2: "production"}

    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = stoker("models", "pull", "fraud@1", "-o", "from-moved", "--runs", "moved", "--json").answer
    assert load_file(Path(moved["folder"]) / "model.safetensors")["w"].tolist() == [20.0, 20.0]
    (tmp_path / "moved").rename(tmp_path / "runs")
    assert stoker("models", "pull", "fraud@2").code == 0  # and back

    loaded = _loaded(tmp_path / "runs", "fraud@production")
    assert loaded.tensors()["w"].tolist() == [10.0, 10.0]
    with pytest.raises(TypeError, match="load_state_dict"):
        loaded.predict([1])

    pulled = stoker("models", "pull", "fraud@production", "-o", "here", "--json").answer
    assert load_file(Path(pulled["folder"]) / "model.safetensors")["w"].tolist() == [10.0, 10.0]
    again = stoker("models", "pull", "fraud@1", "-o", "here")
    assert again.code == 2
    assert "is there already" in again.err

    stored = sorted((tmp_path / "runs" / "mlartifacts").rglob("*.safetensors"))
    for one in stored:
        one.write_bytes(one.read_bytes()[:-1] + b"\x00")
    damaged = stoker("models", "pull", "fraud@1", "-o", "damaged")
    assert damaged.code == 1
    assert "checksum" in damaged.err
    assert not (tmp_path / "damaged").exists()


def test_bad_input_is_said_in_one_line(run: RunDirectory, stoker: Any) -> None:
    assert stoker("models", "register", "a", "--name", "fraud").code == 0
    for arguments, said in (
        (("register", "a", "--name", "fr/aud"), "is not a valid model name"),
        (("register", "a", "--name", "f", "--checkpoint", "15"), "one of the steps 10, 20"),
        (("register", "a", "--name", "f", "--checkpoint", "best", "--metric", "acc"), "has a value of 'acc'"),
        (
            ("register", "a", "--name", "f", "--checkpoint", "best", "--metric", "odd"),
            "whether low or high values of 'odd' are better",
        ),
        (("register", "a", "--name", "f", "--artifact", "modle"), "has no artifact 'modle'"),
        (("register", "b", "--name", "f"), "no run 'b'"),
        (("show", "fraud@9"), "has no version '9'; it has 1"),
        (("show", "frau"), "did you mean 'fraud'"),
        (("promote", "fraud@1", "prod"), "did you mean 'production'"),
    ):
        done = stoker("models", *arguments)
        assert (done.code, said in done.err) == (2, True), (arguments, done.err)
        assert len(done.err.strip().splitlines()) == 1, done.err


def test_what_is_not_as_it_was_recorded_is_not_registered(run: RunDirectory, stoker: Any) -> None:
    file = run.artifacts / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    done = stoker("models", "register", "a", "--name", "fraud")
    assert done.code == 2
    assert "differs from what the run recorded" in done.err
    shard = next(manifest.folder(run.checkpoints, 20).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    done = stoker("models", "register", "a", "--name", "fraud", "--checkpoint", "last")
    assert done.code == 2
    assert "does not match its checksum" in done.err


@pytest.mark.soak(small=False)
def test_nothing_of_mlflow_is_printed(run: RunDirectory, stoker: Any) -> None:
    done = stoker("models", "register", "a", "--name", "fraud", cold=True)
    assert (done.out, done.err) == ("registered fraud@1 from digits/a\n", "")
    done = stoker("models", "pull", "fraud", "-o", "here", cold=True)
    assert (done.out, done.err) == ("here\n", "")
    assert json.loads(stoker("models", "show", "fraud", "--json").out)["name"] == "fraud"


def test_a_list_in_a_pipe_leaves_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    name, run = "a-model-" * 10, "experiment/" + "a-run-" * 10
    models._print_list([models.Version(name, 12, 0.0, "production", [], run, 5, {"metric.val_loss": "0.5"})])
    headings, line = capsys.readouterr().out.splitlines()
    assert headings.split() == ["model", "stage", "run", "val_loss", "registered"]
    assert line.split()[:4] == [f"{name}@12", "production", run, "0.5"]
