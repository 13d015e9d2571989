from __future__ import annotations

from pathlib import Path

import pytest
from stoker.errors import BadInput, StokerError
from stoker.run import artifacts, finding, media
from stoker.run.directory import RunDirectory


def _make(runs: Path, *names: str) -> None:
    for name in names:
        experiment, run_id = name.split("/")
        finding.locate(runs, experiment, run_id).create({"id": run_id})


def test_finds_by_id_by_start_by_experiment_and_by_path(tmp_path: Path) -> None:
    _make(tmp_path, "llm/alpha", "llm/beta", "other/gamma")
    for reference in ("alpha", "al", "llm/alpha", str(tmp_path / "llm" / "alpha")):
        assert finding.find(tmp_path, reference).path == tmp_path / "llm" / "alpha"


def test_an_exact_id_wins_over_the_start_of_another(tmp_path: Path) -> None:
    _make(tmp_path, "llm/a", "llm/ab")
    assert finding.find(tmp_path, "a").id == "a"


def test_says_which_runs_a_name_could_mean(tmp_path: Path) -> None:
    _make(tmp_path, "llm/ab", "llm/ac", "x/d")
    with pytest.raises(BadInput, match="several runs: llm/ab, llm/ac"):
        finding.find(tmp_path, "a")


def test_names_the_nearest_run(tmp_path: Path) -> None:
    _make(tmp_path, "llm/baseline")
    with pytest.raises(BadInput, match="did you mean 'baseline'"):
        finding.find(tmp_path, "baselime")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", "a b", "x" * 200])
def test_refuses_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="is not a valid folder name"):
        finding.locate(tmp_path, "llm", name)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://key:secret@bucket/runs", "leave credentials out of the URL"),
        ("s3://", "give a folder"),
        ("s3://bucket/runs?versionId=1", "give a folder"),
        ("s4://bucket/runs", "fsspec does not support this kind of store"),
        ("gs:/bucket/runs", "write gs://bucket/runs$"),
        ("s3:bucket/runs", "write s3://bucket/runs$"),
        ("az:///bucket/runs", "give a folder, such as az://"),
        ("gs://key:secret@bucket/runs", "in the environment .GOOGLE_APPLICATION_CREDENTIALS"),
        ("abfss://box:secret@me.dfs.core.windows.net/a", "in the environment .AZURE_STORAGE_ACCOUNT_NAME"),
        (
            "abfss://box@me.dfs.core.windows.net/a/b",
            "write az://box/a/b, and set AZURE_STORAGE_ACCOUNT_NAME=me$",
        ),
        (
            "https://me.blob.core.windows.net/box/a?sig=secret",
            "write az://box/a, and set AZURE_STORAGE_ACCOUNT_NAME=me$",
        ),
        ("https://storage.googleapis.com/bucket/runs", "write gs://bucket/runs$"),
        ("https://bucket.s3.eu-west-1.amazonaws.com/runs", "write s3://bucket/runs$"),
        ("https://example.org/runs?key=secret", "https:// cannot be written to"),
    ],
)
def test_refuses_urls_that_are_no_folder_of_a_store(url: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        finding.folder(url)
    assert "secret" not in str(refused.value)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BadInput, match="--runs or STOKER_RUNS"):
        finding.locate(file, "llm", "a").create({})
    assert file.read_text() == "x"


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    _make(tmp_path, "llm/a")
    run = RunDirectory(tmp_path / "llm" / "a")
    run.record_file.write_text('{"format": 99}')
    with pytest.raises(BadInput, match="another version"):
        run.record()


@pytest.mark.parametrize(
    ("text", "name"),
    [("my_train", "my_train"), ("train it", "train-it"), ("_übung (2)", "ubung-2"), ("a" * 200, "a" * 100)],
)
def test_a_folder_is_named_as_near_to_a_text_as_one_can_be(text: str, name: str) -> None:
    assert finding.folder_name(text) == name


def test_texts_without_a_letter_that_can_stand_in_a_name_are_told_apart() -> None:
    names = {finding.folder_name(text) for text in ("训练", "測試")}
    assert len(names) == 2
    assert all(finding.checked(name).startswith("script-") for name in names)


def test_nothing_is_made_where_a_run_no_longer_is(tmp_path: Path) -> None:
    gone, file = RunDirectory(tmp_path / "x" / "a"), tmp_path / "file"
    file.touch()
    with pytest.raises(StokerError, match="x/a is gone: it was moved or deleted during training"):
        media.write(gone, "table", "t", 1, media.table([{"a": 1}], None))
    with pytest.raises(StokerError, match="x/a is gone"):
        artifacts.bring_in(gone, file, "f")
    assert not gone.path.exists()
