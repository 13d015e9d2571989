"""The settings of low-rank adapters. Cheap to import, because a config is read before anything is loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from stoker.engine.keys import Names

ALL = "all-linear"
_OF_AN_ADAPTER = ("rank", "alpha", "dropout", "targets", "modules_to_save", "rslora", "dora")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), implemented by peft."""

    rank: Annotated[int, Ge(0)] = 0
    """Rank of the adapters; 0 trains every weight."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """The adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Dropout probability on an adapter's inputs during training."""
    targets: Names = ALL
    """Modules that get an adapter: all-linear (every linear layer except the output layer), or
    comma-separated names such as q_proj,v_proj. Name experts by their weights:
    all-linear,gate_up_proj,down_proj."""
    modules_to_save: Names = ""
    """Modules that are trained in full alongside the adapters, as comma-separated names:
    embed_tokens,lm_head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which suits large ranks (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Train the magnitude of each row as well as its direction (DoRA, Liu et al. 2024, arXiv:2402.09353)."""
    lr_ratio: Annotated[float, Gt(0)] = 1.0
    """Learning rate of the adapters' B matrices, as a multiple of lr, such as 16 (LoRA+, Hayou et al. 2024,
    arXiv:2402.12354)."""
    adapter: str | None = None
    """An adapter to continue training, as a directory or hub id; rank, alpha and targets are the
    adapter's."""

    def __post_init__(self) -> None:
        own = [name for name in _OF_AN_ADAPTER if self._is_given(name)]
        given = [*own, *(["lr_ratio"] if self._is_given("lr_ratio") else [])]
        if given and not self.used:
            said = ", ".join(f"lora.{name}" for name in given)
            raise ValueError(
                f"{said} without lora.rank: with rank 0 every weight is trained, without adapters. Set "
                f"lora.rank, such as 16, or omit {said}"
            )
        if self.adapter is not None and own:
            raise ValueError(
                f"lora.adapter={self.adapter} has its own {', '.join(own)}: omit "
                f"{', '.join(f'lora.{name}' for name in own)}"
            )

    @property
    def used(self) -> bool:
        """Whether adapters are trained; if not, every weight is."""
        return self.rank > 0 or self.adapter is not None

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer gets a new adapter."""
        return self.rank > 0 and ALL in self._targets

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that get a new adapter by name, in addition to `all_linear`."""
        return tuple(name for name in self._targets if name != ALL) if self.rank > 0 else ()

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """The names of `modules_to_save`."""
        return _split(self.modules_to_save)

    def _is_given(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(type(self), name))

    @property
    def _targets(self) -> tuple[str, ...]:
        return _split(self.targets)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def without_adapters(model: Any) -> Any:
    """The transformers model itself, if peft's is around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def as_trained(module: Any) -> Any:
    """The module itself, or the copy that is trained in its place next to adapters (`modules_to_save`)."""
    return module.modules_to_save[module.active_adapter] if _is_kept_twice(module) else module


def is_of_adapter(name: str) -> bool:
    """Whether a tensor belongs to the adapters of a model, judging by its name."""
    return ".lora_" in name or ".modules_to_save." in name


def _is_kept_twice(module: Any) -> bool:
    peft = sys.modules.get("peft.utils.other")
    return peft is not None and isinstance(module, peft.ModulesToSaveWrapper)


def is_adapter(module: Any) -> bool:
    """Whether a module is a layer with a peft adapter. False as long as peft has not been imported."""
    peft = sys.modules.get("peft.tuners.lora")
    return peft is not None and isinstance(module, peft.LoraLayer)
