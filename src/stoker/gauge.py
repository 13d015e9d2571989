"""Performance of a training loop: its speed, its use of devices and memory, and where its time goes.

Measuring does not affect the training. The results go to the terminal and the journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping

import torch
from stoker import distributed, storage, words
from stoker.attempt import Attempt
from stoker.data.loader import Loader
from stoker.engine import flops as operations
from stoker.engine import imagined, memory
from stoker.engine.pace import Pace
from stoker.engine.precision import Resolved
from stoker.engine.settings import Training
from stoker.engine.step import Step
from stoker.engine.timing import Timed
from stoker.progress import short

log = logging.getLogger("stoker")


class Gauge:
    """Measures the loop of one attempt.

    Args:
        step: provides the model and optimizers whose memory is measured.
    """

    def __init__(
        self, attempt: Attempt, step: Step, device: torch.device, training: Training, precision: Resolved
    ) -> None:
        self._attempt, self._step, self._device = attempt, step, device
        self._training, self._precision = training, precision
        self.pace = Pace(attempt.world.size)

    @property
    def unit(self) -> str:
        """The unit of the rate, abbreviated."""
        return "tok" if self.pace.unit == "tokens" else self.pace.unit

    def performance(self, flops: float | None) -> dict[str, float]:
        """See `Trainer.performance`."""
        found, a_rank = self.pace.metrics(), self.pace.rate_of_a_rank
        if flops is not None and a_rank is not None:
            found["mfu"] = a_rank * flops / self._peak.flops
        return found

    def say(self, flops: float | None, metrics: Mapping[str, float]) -> None:
        """See `Trainer.say`."""
        most = max(peak for *_, peak in self.memory())
        found, world = self.performance(flops), self._attempt.world
        if world.rank > 0:
            return
        texts = [f"{name} {value:.4g}" for name, value in metrics.items()]
        rate, of_a_rank = self.pace.rate, self.pace.rate_of_a_rank
        if rate is not None and of_a_rank is not None:
            a_rank = f" ({short(of_a_rank)} per rank)" if world.size > 1 else ""
            texts.append(f"{short(rate)} {self.unit}/s{a_rank}")
            texts += [f"mfu {found['mfu']:.1%}"] if "mfu" in found else []
            texts.append(f"{self.pace.share_waited:.1%} waiting for data")
        texts.append(f"peak memory {most:.2f} GiB")
        log.info("step %d: %s", self._attempt.step, ", ".join(texts))

    @functools.cached_property
    def _peak(self) -> operations.Peak:
        """The peak that `mfu` refers to; logged once."""
        found = operations.peak(self._device, self._precision)
        self._attempt.event("peak", flops=found.flops, source=found.source)
        if self._attempt.world.rank == 0:
            log.info(
                "mfu is relative to %.3g TFLOP/s in %s (%s)",
                found.flops / 1e12,
                self._precision,
                found.source,
            )
        return found

    def memory(self) -> list[tuple[int, float, float, float, float, float]]:
        """See `Trainer.memory`."""
        own = memory.by_kind(self._step, self._device, self._training)
        found = []
        for rank, kinds in enumerate(distributed.gathered(own)):
            *known, most = (kinds[kind] / 2**30 for kind in ("weights", "gradients", "optimizer", "peak"))
            found.append((rank, *known, max(0.0, most - sum(known)), most))
        return found

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """See `Pace.spending`; also records the time in the journal."""
        with self.pace.spending(what):
            yield
        self._say_spent(over=False)

    def over(self) -> None:
        """The loop has ended."""
        self._say_spent(over=True)
        # On a CPU the peak is not of tensors only.
        if self._device.type == "cuda" and self._attempt.world.rank == 0:
            self._compare_with_plan()

    def _say_spent(self, *, over: bool) -> None:
        """Record where the attempt's time went so far, for the report.

        If the attempt is killed, the times up to its last checkpoint are known; later steps are repeated.
        """
        self._attempt.event("spent", step=self._attempt.step, over=over, seconds=self.pace.spent)

    def _compare_with_plan(self) -> None:
        """Compare the peak memory with the plan of this config, if there was one."""
        planned = imagined.remembered(self._attempt.directory, self._attempt.world.size)
        if planned is None:
            return
        peak = memory.peak(self._device)
        self._attempt.event("planned", peak=planned, measured=peak)
        log.info(
            "peak memory %s; the plan was %s (%+.1f%%)",
            words.size(peak), words.size(planned), 100 * (planned / peak - 1),
        )  # fmt: skip

    def write_timing(self, timed: Timed, loader: Loader) -> None:
        """Write the timing of this rank, which `stoker bench` reads."""
        tokens = loader.tokens_per_sample
        about = {"unit": "tok" if tokens else "samples", "units_per_sample": tokens or 1.0}
        file = self._attempt.directory.logs / f"timing-rank-{self._attempt.world.rank}.json"
        storage.write_json(file, {**dataclasses.asdict(timed), **about})
