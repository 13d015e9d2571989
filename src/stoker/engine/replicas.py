"""A model of which several ranks hold copies that are trained as one, with torch's DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from stoker.engine import arguments
from stoker.engine.trained import Trained
from stoker.errors import StokerError
from stoker.words import some
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel


class Replicas:
    """DDP around a model, for the parameters that are trained at the moment.

    DDP reduces and waits for the gradients of just those parameters that are trained when it is built. So it
    is built with the first step, and again whenever some were frozen or unfrozen.

    Args:
        build: makes DDP around the model.
        group: the ranks that hold copies.
    """

    def __init__(
        self, model: nn.Module, build: Callable[[], DistributedDataParallel], group: ProcessGroup | None
    ) -> None:
        self._model, self._build, self._group = model, build, group
        self._trained = Trained(model)
        self._ddp: DistributedDataParallel | None = None
        self._names: list[str] = []
        self._learned = False

    @property
    def called(self) -> nn.Module:
        """What is called in training: DDP, or the model itself if nothing is trained."""
        return self._model if self._ddp is None else self._ddp

    def begin(self) -> None:
        """Begin a step: fit DDP to what is trained now. All ranks call it.

        Raises StokerError if they train different parameters: gradients of equal shapes would be mixed.
        """
        if not self._trained.changed():
            return
        if self._ddp is not None:
            self._ddp._remove_autograd_hooks()  # type: ignore[no-untyped-call]
        self._ddp = None  # its buckets go before there are others
        self._names = [name for name, p in self._model.named_parameters() if p.requires_grad]
        self._check_same()
        if self._names:
            self._ddp = self._build()
        self._learned = False

    def _check_same(self) -> None:
        of_ranks: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(of_ranks, self._names, group=self._group)
        apart = sorted(set().union(*of_ranks) - set(of_ranks[0]).intersection(*of_ranks))
        if apart:
            raise StokerError(
                f"some ranks train {some(apart)}, and others have frozen it: freeze and unfreeze the same "
                "parameters in the same step on all ranks; random numbers differ between ranks"
            )

    def reduce_next(self, reduce: bool) -> None:
        """Whether the next backward pass reduces gradients.

        Those that were averaged already are unchanged when averaged again with the added ones.
        """
        if self._ddp is not None:
            # With a static graph, DDP learns the order in its first backward pass, which must reduce.
            learns = self._ddp.static_graph and not self._learned
            self._ddp.require_backward_grad_sync = reduce or learns  # what its no_sync() sets
            self._learned = True

    def check(self) -> None:
        """Raises StokerError if a backward pass has left gradients unreduced."""
        if self._ddp is not None:
            with self.explained():
                self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raises StokerError within this block if DDP waits for gradients that never come."""
        try:
            yield
        except RuntimeError as error:
            arguments.explain_unused(self._names, error)
            raise
