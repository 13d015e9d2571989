"""What a rank holds under FSDP and ZeRO is what the ZeRO paper's formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import strategies_run

import ranks
from support import SOAK

# Rajbhandari et al. 2020 (arXiv:1910.02054), section 3, for psi parameters on n ranks: weights and
# gradients in two bytes, and in float32 the weights and AdamW's two moments, twelve bytes.
FORMULAS: dict[str, Any] = {
    "zero-1": lambda psi, n: (2 * psi, 2 * psi, 12 * psi / n),
    "zero-2": lambda psi, n: (2 * psi, 2 * psi / n, 12 * psi / n),
    "zero-3": lambda psi, n: (2 * psi / n, 2 * psi / n, 12 * psi / n),
    # FSDP2 keeps float32 shards of the weights, and casts what it gathers: 16 bytes as well.
    "fsdp": lambda psi, n: (4 * psi / n, 4 * psi / n, 8 * psi / n),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2, 4] if SOAK else [2])
def test_a_rank_holds_what_the_formulas_say(name: str, size: int, tmp_path: Path) -> None:
    for found in ranks.run(strategies_run.memory, size, tmp_path, tmp_path, name):
        expected = FORMULAS[name](found["psi"], size)
        for kind, formula in zip(("parameters", "gradients", "optimizer"), expected, strict=True):
            assert found[kind] == pytest.approx(formula, rel=0.05), f"{kind} of {found}"
