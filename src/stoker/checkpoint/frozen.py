"""Which parameters must be saved although they are not trained at the moment.

Most frozen parameters never change, and are loaded again from where they came from. But some are changed by
hand (a target network, a mean teacher), and some are frozen only for a while, or unfrozen later. Buffers that
are not persistent are no state, and not saved: one that changes all the same is warned of.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from stoker import distributed, words
from stoker.errors import StokerError
from stoker.tensors import is_plain, local, real, saved_buffers
from torch import nn

log = logging.getLogger("stoker")

_NAMED = 5  # names in a message


class Frozen:
    """The parameters of a model at the time it was built, after it was laid out and filled.

    Changes are detected with checksums, for which each parameter is read once: 14 GB take some milliseconds
    on a GPU, and a few seconds on a CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = _names(model)
        self._trained = {name: p.requires_grad for name, p in model.named_parameters()}
        self._kept = {name for name, trained in self._trained.items() if trained}
        self._before = checksums(dict(self._frozen()))
        self._constants = _not_persistent(model)
        self._constants_before = checksums(self._constants, integers=True)

    def check(self, step: int) -> None:
        """Raises StokerError if the model has different parameters or buffers than when it was built.

        Warns of buffers that are not persistent and were written to; one that was replaced is a cache.
        """
        now = _names(self._model)
        changed = [("new", now - self._names), ("gone", self._names - now)]
        said = [f"{words.some(sorted(names), _NAMED)} {what}" for what, names in changed if names]
        if said:
            raise StokerError(
                f"step {step}: the model's structure has changed since the Trainer was created "
                f"({', '.join(said)}), so a model built by the same script could not load this checkpoint, "
                "which is not saved. Change the structure before creating the Trainer; for torch's pruning "
                "call prune.identity(module, name) there, since a mask can change during training"
            )

        self._warn_of_constants(step)

    def _warn_of_constants(self, step: int) -> None:
        now = _not_persistent(self._model)
        same = {name: b for name, b in self._constants.items() if now.get(name) is b}
        sums = checksums(same, integers=True)
        written = {n for n, found in sums.items() if not torch.equal(found, self._constants_before[n])}
        if written:
            self._constants = {name: b for name, b in self._constants.items() if name not in written}
            log.warning(
                "step %d: buffers that are not persistent have changed (%s), but no checkpoint has them: a "
                "resumed run begins with those of the new model. Register them with persistent=True",
                step, words.some(sorted(written), _NAMED),
            )  # fmt: skip

    def kept(self) -> frozenset[str]:
        """Names of frozen parameters that were trained before, or have changed. All ranks call it."""
        changed = {name for name, p in self._frozen() if self._has_changed(name, p)}
        self._kept |= {name for names in distributed.gathered(sorted(changed)) for name in names}
        return frozenset(name for name, _ in self._frozen() if name in self._kept)

    def turned(self) -> dict[str, bool]:
        """Parameters that were frozen or unfrozen since: whether each is trained now."""
        now = {name: p.requires_grad for name, p in self._model.named_parameters()}
        return {name: trained for name, trained in now.items() if trained != self._trained[name]}

    def turn(self, turned: Mapping[str, bool]) -> None:
        """Freeze and unfreeze those of them that this rank has."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(turned.get(name, parameter.requires_grad))

    def _frozen(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if not p.requires_grad]

    def _has_changed(self, name: str, parameter: nn.Parameter) -> bool:
        if name in self._kept or name not in self._before:
            return False
        now = held(parameter)
        return now is not None and not torch.equal(_checksums(now), self._before[name])


def _not_persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are not part of a model's state, by name."""
    saved = saved_buffers(model)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _names(model: nn.Module) -> set[str]:
    """The names of parameters, and of saved buffers, including those that are None."""
    return saved_buffers(model) | {name for name, _ in model.named_parameters()}


def checksums(tensors: Mapping[str, torch.Tensor], *, integers: bool = False) -> dict[str, torch.Tensor]:
    """Checksums of this rank's part of each tensor.

    Args:
        integers: also of those that are no real numbers, which as parameters are quantised.
    """
    of = own if integers else held
    return {name: _checksums(values) for name, t in tensors.items() if (values := of(t)) is not None}


def held(parameter: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of a parameter as real numbers; None if it is quantised."""
    values = own(parameter)
    return values if values is not None and values.is_floating_point() else None


def own(tensor: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of a tensor, complex numbers as real ones; None if it has no plain values."""
    values = local(getattr(tensor, "ds_tensor", tensor).detach())  # ds_tensor: DeepSpeed's partition
    if type(values) is not torch.Tensor or values.is_meta or not is_plain(values):
        return None
    return real(values.resolve_conj().resolve_neg())


def _checksums(values: torch.Tensor) -> torch.Tensor:
    """The sums of the rows and of the columns of a square of its words, and the remaining bytes.

    Any single change changes them, and so does any exchange of two values.
    """
    flat = values.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    side = math.isqrt(flat.numel() // 8)  # in words
    square = flat[: 8 * side**2].view(torch.int64).view(side, side)
    sums = torch.cat([square.sum(0), square.sum(1)])
    return torch.cat([sums.view(torch.uint8), flat[8 * side**2 :]])
