"""States of 8 bits are restored as they were, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eight_bit_run
import pytest
import torch
from stoker.checkpoint import eight_bit, manifest, state
from stoker.errors import StokerError
from torch import nn

import ranks
from support import SOAK

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}), "ddp": (2, {"parallel": "ddp"}), "fsdp": (2, {"parallel": "fsdp"}),
}  # fmt: skip


def _train(folder: Path, layout: str, *starts: tuple[str, int]) -> list[list[eight_bit_run.Trained]]:
    """What becomes of several starts, on each rank."""
    size, settings = LAYOUTS[layout]
    return ranks.run(eight_bit_run.train, size, folder, folder / "runs", settings, *starts)


@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS if SOAK else ["fsdp"])
def test_a_run_goes_on_to_the_same_bits(layout: str, tmp_path: Path) -> None:
    found = _train(tmp_path, layout, ("whole", 9), ("cut", 5), ("cut", 9))
    for (losses, kinds), (before, _), (after, restored) in found:
        assert before + after == losses
        assert restored == kinds
        assert kinds["first.weight"] == kinds["scale"] == "OptimState8bit"
    unequal = {kinds["last.weight"] for (_, kinds), *_ in found}
    assert unequal == ({"OptimState8bit", "Tensor"} if layout == "fsdp" else {"Tensor"})
    newest = manifest.committed(tmp_path / "runs" / "test" / "whole" / "checkpoints")[-1]
    assert sum(file.stat().st_size for file in newest.glob("*.safetensors")) < 250_000  # of 300,000


@pytest.mark.soak
@pytest.mark.parametrize(("first", "second"), [("fsdp", "single"), *([("single", "fsdp")] if SOAK else [])])
def test_a_run_goes_on_under_another_layout(first: str, second: str, tmp_path: Path) -> None:
    [(before, _)], *_ = _train(tmp_path, first, ("b", 5))
    [(whole, _), (after, kinds)], *_ = _train(tmp_path, second, ("a", 9), ("b", 9))
    assert before + after == pytest.approx(whole, rel=1e-2)
    assert kinds["first.weight"] == kinds["scale"] == "OptimState8bit"


def _stepped(optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(16, 256), (32, 192), (256, 33), (8192,), (2, 64, 96)])
def test_codes_and_scales_are_those_that_were_saved(shape: tuple[int, ...]) -> None:
    from torchao.optim import AdamW8bit

    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = AdamW8bit([parameter], lr=0.1)
    _stepped(optimizer)
    for key in ("exp_avg", "exp_avg_sq"):
        held = optimizer.state[parameter][key]
        codes, scales = eight_bit.parts(optimizer, held)
        assert codes.shape == parameter.shape
        again = eight_bit.together(optimizer, parameter, key, codes, scales)
        assert torch.equal(again.codes, held.codes)
        assert torch.equal(again.scale, held.scale)
        assert torch.equal(again.dequantize(), held.dequantize())


def test_a_state_of_an_earlier_version_which_had_the_values_is_quantised() -> None:
    from torchao.optim import AdamW8bit

    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW8bit([parameter], lr=0.1)
    values = torch.rand(64, 64)
    made = eight_bit.as_made(optimizer, parameter, "exp_avg_sq", values)
    assert eight_bit.is_quantised(optimizer, made)
    torch.testing.assert_close(made.dequantize(), values, rtol=0.05, atol=0.01)
    assert torch.equal(eight_bit.as_made(optimizer, parameter, "step", torch.tensor(3.0)), torch.tensor(3.0))


def test_states_that_no_checkpoint_can_hold_are_refused() -> None:
    from torchao.optim import AdamW4bit

    model = nn.Linear(64, 64)
    optimizer = AdamW4bit(model.parameters(), lr=0.1)
    _stepped(optimizer)
    with pytest.raises(StokerError, match="is a OptimState4bit, which a checkpoint cannot hold"):
        state.optimizer_state(model, optimizer)
