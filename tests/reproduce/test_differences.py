"""What differs between two records."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from stoker.reproduce import bundle, code, code_changes, differences, provenance

LOCK = """# Python 3.11.2; a hash is of what was installed, see the documentation
--extra-index-url https://download.pytorch.org/whl/cpu
Torch==2.13.0+cpu  # content sha256:aaaa
my_tool @ git+https://example.org/tool@0123abcd  # content sha256:bbbb
# stoker==0.1.0 from /home/stoker, commit 0123456789abcdef0123456789abcdef01234567, with uncommitted changes
zipp==3.0
"""


def test_a_lock_is_read_as_it_was_written() -> None:
    found = differences.locked(LOCK)
    assert found.keys() == {"torch", "my-tool", "stoker", "zipp"}
    assert found["torch"].version == "2.13.0+cpu"
    assert found["my-tool"].version == "git+https://example.org/tool@0123abcd"
    assert found["stoker"].said == "0.1.0 from /home/stoker, commit 0123456789ab, with uncommitted changes"
    assert (found["zipp"].content, found["zipp"].folder) == ("", "")


@pytest.mark.parametrize(
    ("old", "new", "name", "before", "now"),
    [
        ("zipp==3.0", "zipp==3.1", "zipp", "3.0", "3.1"),
        ("zipp==3.0\n", "", "zipp", "3.0", None),
        ("zipp", "zap==1\nzipp", "zap", None, "1"),
        (
            "sha256:aaaa",
            "sha256:cccc",
            "torch",
            "2.13.0+cpu with content aaaa",
            "2.13.0+cpu with content cccc",
        ),
    ],
)
def test_packages_differ_by_version_content_or_presence(
    old: str, new: str, name: str, before: str | None, now: str | None
) -> None:
    (found,) = differences.packages(LOCK, LOCK.replace(old, new))
    assert (found.name, found.before, found.now) == (name, before, now)
    assert bool(found.matters) == (name == "torch")
    assert differences.packages(LOCK, LOCK) == []


def test_what_matters_of_a_machine_depends_on_where_the_run_computed() -> None:
    before = {
        "processor": "A",
        "cores": 4,
        "gpus": ["H100, 80 MiB"] * 2,
        "variables": {"OMP_NUM_THREADS": "1"},
    }
    now = {"processor": "B", "cores": 8, "gpus": ["H200, 141 MiB"], "variables": {"LANG": "C"}}
    for on_gpu, expected in (
        (True, {"gpus", "OMP_NUM_THREADS"}),
        (False, {"processor", "cores", "OMP_NUM_THREADS"}),
    ):
        found = differences.environment(before, now, on_gpu=on_gpu)
        assert {one.name for one in found} == {"processor", "cores", "gpus", "OMP_NUM_THREADS", "LANG"}
        assert {one.name for one in found if one.matters} == expected
    assert next(one.before for one in found if one.name == "gpus") == "2 x H100, 80 MiB"


def test_variables_that_name_a_place_or_a_launch_are_not_set_again() -> None:
    given = {
        "OMP_NUM_THREADS": "2",
        "TORCH_HOME": "x",
        "NCCL_TOPO_FILE": "/etc/a",
        "HF_HOME": "b",
        "STOKER_RUNS": "c",
    }
    assert differences.computing(given) == {"OMP_NUM_THREADS": "2"}


def _recorded(tmp_path: Path, name: str, files: dict[str, bytes]) -> Path:
    """A provenance folder with this code."""
    root, record = tmp_path / name, tmp_path / f"{name}-record"
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    record.mkdir()
    listed, contents = bundle.read(code.CodeOnDisk(code.Code("modules", str(root)), tuple(files)))
    provenance.write(record, provenance.Gathered(listed, contents, b""), tmp_path / "store")
    return record


def test_files_that_differ_are_told_apart_by_how(tmp_path: Path) -> None:
    one = _recorded(
        tmp_path,
        "one",
        {"a.py": b"x = 1\ny = 2\n", "old.py": b"same\n", "gone.py": b"z\n", "b.bin": b"\0\1", "c": b"c"},
    )
    other = _recorded(
        tmp_path,
        "other",
        {"a.py": b"x = 1\ny = 3\n", "new.py": b"same\n", "more.py": b"w\n", "b.bin": b"\0\2", "c": b"c"},
    )
    found = code_changes.compare(one, other)
    assert [(change.path, change.how) for change in found.files] == [
        ("a.py", "changed"), ("b.bin", "changed"), ("gone.py", "removed"), ("more.py", "added"),
        ("new.py", "renamed"),
    ]  # fmt: skip
    changed = found.files[0]
    assert changed.lines == ("@@ -1,2 +1,2 @@", " x = 1", "-y = 2", "+y = 3")
    assert (changed.added, changed.removed) == (1, 1)
    assert found.files[1].lines == ()
    assert found.files[-1].was == "old.py"


def test_code_without_a_record_is_not_taken_for_equal(tmp_path: Path) -> None:
    one = _recorded(tmp_path, "one", {"a.py": b"x\n"})
    assert "was not recorded" in code_changes.compare(one, tmp_path).unknown
    code_file = one / "code.tar.gz"
    code_file.unlink()
    code_file.write_bytes(b"damaged")
    other = _recorded(tmp_path, "other", {"a.py": b"y\n"})
    assert "is damaged" in code_changes.compare(one, other).unknown


def test_files_that_are_others_where_they_were_are_named(tmp_path: Path) -> None:
    record = _recorded(tmp_path, "one", {"a.py": b"x\n", "b.py": b"y\n", "c.py": b"z\n"})
    (tmp_path / "one/a.py").write_bytes(b"changed\n")
    (tmp_path / "one/b.py").unlink()
    assert code_changes.changed_since(provenance.read_code(record)) == ["a.py", "b.py"]


def test_code_that_goes_on_as_another_is_seen_where_it_stands(tmp_path: Path) -> None:
    files = {"train.py": b"import a\n", "lib/a.py": b"x\n", "b.py": b"y\n", "notes.md": b"z\n"}
    recorded = provenance.read_code(_recorded(tmp_path, "one", files))
    recorded = dataclasses.replace(recorded, script="train.py")
    here, copy = tmp_path / "one", tmp_path / "copy"
    shutil.copytree(here, copy)
    for source in (here / "train.py", here, copy / "train.py", copy, tmp_path / "elsewhere"):
        assert code_changes.changed_for(recorded, source) == {}
    for root in (here, copy):
        (root / "lib/a.py").write_bytes(b"changed\n")
        (root / "notes.md").write_bytes(b"no code\n")
        (root / "b.py").unlink()
        (root / "other.py").write_bytes(b"")
    found = code_changes.changed_for(recorded, here / "train.py")
    assert list(found) == ["lib/a.py", "b.py"]
    assert found["b.py"] is None
    assert list(code_changes.changed_for(recorded, here / "other.py")) == ["lib/a.py", "b.py", "other.py"]
    assert list(code_changes.changed_for(recorded, copy / "train.py")) == ["lib/a.py"], "it need not have all"
    assert code_changes.since_begun(tmp_path / "unrecorded", here) == {}
