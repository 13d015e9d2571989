"""Metrics over a dataset, exact for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from stoker.data.loader import Collate, evaluation_batches
from stoker.engine import arguments, batches, modes
from stoker.engine.metrics import Metric, Totals
from stoker.engine.step import Setting, Step

Metrics = Callable[[Any, Any], Mapping[str, Metric]]


def _measured(metrics: Metrics, output: Any, batch: Any, setting: Setting) -> Mapping[str, Metric]:
    try:
        with setting.autocast():
            return metrics(output, batch)
    except RuntimeError as error:
        arguments.explain_evaluated(error)
        raise


@torch.no_grad()
def measure(
    step: Step,
    setting: Setting,
    dataset: Any,
    metrics: Metrics,
    *,
    batch_size: int,
    at_once: int | None,
    collate: Collate | None,
    workers: int,
    channels_last: bool,
    meanwhile: Callable[[], None],
) -> dict[str, float]:
    """Metrics over a dataset in evaluation mode, with each sample counted once over all ranks; on every rank.

    Args:
        batch_size: samples per batch over all ranks.
        at_once: the most samples in a rank's batch; None: no limit.
        meanwhile: called after each batch.
    """
    totals = Totals()
    shares = setting.mesh.data
    share = -(-batch_size // shares.size)
    size = min(share, at_once or share) * shares.size
    with modes.evaluating(step.model):
        for batch, counts in evaluation_batches(dataset, size, shares, collate, workers):
            on_device = batches.to_device(batch, setting.mesh.device, channels_last=channels_last)
            output = step.forward(on_device)
            if output is not None:
                totals.add(_measured(metrics, output, on_device, setting), counts)
            meanwhile()
        return totals.over_ranks()
