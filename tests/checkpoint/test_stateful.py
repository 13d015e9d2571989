"""State of a script's own on several ranks: real ranks, with gloo between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stateful_run
import torch
from stoker.checkpoint import manifest, store

import ranks


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_is_the_same_is_saved_once_and_restored_on_any_number_of_ranks(
    parallel: str, tmp_path: Path
) -> None:
    ranks.run(stateful_run.train, 2, tmp_path, tmp_path, 1, parallel=parallel)
    found = manifest.newest(tmp_path / "runs" / "test" / "a" / "checkpoints")[0]
    assert found is not None
    assert sorted(name for name in store.shapes(found) if name.startswith("registered")) == [
        "registered.same['w']", "registered[0].own['w']", "registered[1].own['w']",
    ]  # fmt: skip
    for size, steps in ((2, 2), (3, 3), (1, 4)):
        states = ranks.run(
            stateful_run.train, size, tmp_path, tmp_path, steps, parallel="single" if size == 1 else parallel
        )
        for rank, state in enumerate(states):
            assert _plain(state["same"]) == {"w": [1.0, 2.0, steps - 1], "n": steps - 1}
            known = rank if rank < 2 or size < 3 else 0  # the third is new
            assert _plain(state["own"]) == {"w": [float(known)] * (known + 1), "seen": [known] * known}
