"""Trials that start from another trial's checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stoker.checkpoint import manifest
from stoker.run.directory import RunDirectory
from stoker.tune import forking

from support import until

SAVES = """
import itertools, sys
from pathlib import Path
from stoker.checkpoint import manifest

checkpoints = Path(sys.argv[1])
for step in itertools.count(1):
    path = manifest.folder(checkpoints, step)
    manifest.begin(path)
    (path / "rank-00000-000.safetensors").write_bytes(bytes(2_000_000))
    files = [manifest.File.of(path / "rank-00000-000.safetensors")]
    manifest.commit(path, files, step=step, samples=step, world_size=1)
    manifest.prune(checkpoints, keep=1)
"""


def test_a_run_that_replaces_its_only_checkpoint_meanwhile_can_be_continued_from(tmp_path: Path) -> None:
    """As the best member of a population with keep_checkpoints=1, which trains on."""
    donor = RunDirectory(tmp_path / "trial-0000")
    donor.path.mkdir()
    saving = subprocess.Popen([sys.executable, "-c", SAVES, str(donor.checkpoints)])
    try:
        until(lambda: manifest.committed(donor.checkpoints), saving)
        for number in range(1, 81):
            run = RunDirectory(tmp_path / f"trial-{number:04d}")
            step = forking.take_checkpoint(donor, run, ended=False)
            assert step is not None
            assert manifest.verify(manifest.folder(run.checkpoints, step)).step == step
    finally:
        saving.kill()
        saving.wait()
