"""What the ranks of test_predict.py do: predict with an untrained model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from stoker import Run, Trainer, Training
from strategies_run import Rows, built, inputs, llama, token_loss

SAMPLES = (1, 13, 16)
"""In batches of 4 over two ranks: some without a sample, some with fewer."""


def outputs(output: Any, batch: Any) -> dict[str, Any]:
    """Of every row the logits of its last token, its labels, how many count, and a name."""
    counted = (batch["labels"] != -100).sum(1)
    return {
        "logits": output.logits[:, -1], "rows": (batch["labels"], counted.numpy(force=True)),
        "names": [f"row {first}" for first in batch["input_ids"][:, 0].tolist()],
    }  # fmt: skip


def predict(folder: Path, parallel: str) -> dict[int, dict[str, Any]]:
    """Of different numbers of rows."""
    warnings.simplefilter("ignore")
    with Run("test", parallel, runs=folder) as run:
        trainer = Trainer(
            run, llama(layers=2), optimizer=torch.optim.AdamW, inputs=inputs, loss=token_loss,
            training=Training(**built({"parallel": parallel, "precision": "fp32"})),
        )  # fmt: skip
        return {
            count: trainer.predict(torch.utils.data.Subset(Rows(), range(count)), outputs, batch_size=4)
            for count in SAMPLES
        }
