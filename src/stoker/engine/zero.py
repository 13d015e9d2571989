"""ZeRO with DeepSpeed: optimizer state (stage 1), gradients (2) and parameters (3) sharded over ranks.

Rajbhandari et al. 2020 (arXiv:1910.02054). DeepSpeed drives the backward pass and the update. The loss here
is a sum whose weight is known only at the end of the global batch, so the gradients are divided by it
through the loss scale, which DeepSpeed lets a caller set.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from stoker import words
from stoker.engine import blocks, deepspeed_file, gradients, quiet
from stoker.engine.agreement import Agreement, Weight
from stoker.engine.precision import DTYPES
from stoker.engine.settings import Training
from stoker.engine.step import (
    Blocks,
    Load,
    OptimizerFactory,
    Setting,
    apply,
    average_statistics,
    build_optimizers,
    running_statistics,
)
from stoker.errors import BadInput, StokerError
from torch import nn
from torch.utils import _pytree as pytree

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Original:
    """A frozen parameter before it was cast."""

    dtype: torch.dtype
    values: torch.Tensor | None
    """On the CPU of rank 0; None if the cast lost nothing."""


Originals = dict[nn.Parameter, Original]


class DeepSpeedStep:
    """A model that DeepSpeed trains; see `Step`.

    Args:
        originals: of frozen parameters that were cast already.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        setting: Setting,
        make: OptimizerFactory | Mapping[str, OptimizerFactory],
        originals: Originals,
    ) -> None:
        if isinstance(make, Mapping):
            raise BadInput("parallel=deepspeed takes one optimizer for the model, not one per submodule")
        _quieten()
        import deepspeed

        assert training.deepspeed.stage is not None, "see deepspeed_file.completed"
        self.stage = training.deepspeed.stage
        if setting.precision == "fp16" and self.stage > 0 and setting.mesh.device.type == "cpu":
            raise BadInput("parallel=deepspeed supports precision=fp16 on GPUs only: use bf16 or fp32")
        self._setting = setting
        made = build_optimizers(model, make)["main"]
        _check_optimizer(made)
        # DeepSpeed flattens each group.
        made.param_groups = [group for group in made.param_groups if group["params"]]
        known = {p: name for name, p in model.named_parameters()}
        self._names = [[known[p] for p in group["params"]] for group in made.param_groups]
        self._casts, self._originals = _casts(model, training, setting), originals
        if self._casts:
            _cast(model, setting, originals)
        with _inside_deepspeed():
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=model,
                optimizer=made,
                config=config(training, setting, model),
                dist_init_required=False,
            )
        if isinstance(made, torch.optim.Adagrad):
            self._regroup(made)
        self.model = model
        self.norm: torch.Tensor | float | None = None
        self.optimizers = {"main": self._optimizer}
        self._statistics = running_statistics(model) if setting.mesh.data.size > 1 else []

    def _regroup(self, made: torch.optim.Optimizer) -> None:
        """Give Adagrad its groups back: DeepSpeed builds another, whose one group has the default rates."""
        if self.stage > 0:
            self._optimizer.optimizer.param_groups = made.param_groups
        if self.stage in (1, 2):
            self._optimizer._link_all_hp_params()
            self._optimizer._create_optimizer_mapping()

    def gradients(self, parts: Sequence[Any], agreement: Agreement) -> None:
        """See `Step`."""
        loss_sum: torch.Tensor | None = None
        weight: Weight = 0.0
        if self.stage > 0:
            self._optimizer.override_loss_scale(1.0)
        for number, part in enumerate(parts, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(parts))
            part_sum, part_weight = self._setting.loss_of(self._call(part), part)
            loss_sum = part_sum.detach() if loss_sum is None else loss_sum + part_sum.detach()
            weight = weight + part_weight
            if number == len(parts):
                agreement.start(loss_sum, weight)
            self._engine.backward(part_sum * self._setting.scale.factor, scale_wrt_gas=False)

    def forward(self, batch: Any) -> Any:
        """See `Step`."""
        return self._call(batch)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """See `Step`."""
        return contextlib.nullcontext() if self._casts else self._setting.autocast()

    def update(self, optimizers: Sequence[torch.optim.Optimizer], weight: torch.Tensor) -> bool:
        """See `Step`."""
        setting = self._setting
        average_statistics(self._statistics, setting.mesh)
        if self.stage == 0:
            found = gradients.of(self.model.parameters())
            stepped, self.norm = apply(found, [self._optimizer], weight, setting)
            self.clear()
            return stepped
        factor = gradients.reciprocal(weight) * (setting.mesh.data.size / setting.scale.factor)
        self._optimizer.override_loss_scale(1.0 / factor.item())
        self._engine.step()
        overflowed = bool(self._optimizer.overflow)
        setting.scale.update(overflowed)
        self.norm = None if overflowed or setting.clip_norm is None else self._optimizer._global_grad_norm
        return not overflowed

    def clear(self) -> None:
        """See `Step`."""
        self.model.zero_grad(set_to_none=True)
        if self.stage > 0:
            self._engine.zero_grad()
            self._optimizer.zero_grad()

    def _call(self, batch: Any) -> Any:
        if not self._casts:
            with self._setting.autocast():
                return self._setting.call(self._engine, batch)
        dtype = DTYPES[self._setting.precision]
        inputs = pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.to(dtype) if t.is_floating_point() else t,
            self._setting.inputs(batch),
        )
        return self._engine(**inputs) if isinstance(inputs, Mapping) else self._engine(*inputs)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Step`: under ZeRO, a rank's flat partitions."""
        if self.stage == 0:
            return dict(self._trained())
        return {f"partition.{number}": flat for number, flat in enumerate(self._partitions())}

    def publish(self) -> None:
        """See `Step`."""
        if self.stage > 0:
            for name, value in self.whole_weights().items():
                self.use(self.model.get_parameter(name), value)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Step`: on the CPU, and in float32 if it is trained. All ranks call it.

        On rank 0 a frozen parameter is the original one.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        if not isinstance(tensor, nn.Parameter):
            return tensor.detach().cpu().clone()
        if tensor.requires_grad and self.stage > 0:
            return self._whole(tensor, safe_get_full_fp32_param)
        with self._gathered(tensor):
            now = tensor.detach().cpu().clone()
        original = self._originals.get(tensor)
        if original is None:
            return now
        kept = original.values
        if kept is not None and torch.equal(kept.to(now.dtype), now):  # nothing has changed it since
            return kept
        return now.to(original.dtype)

    # -- what is saved: full tensors under the parameters' names, as in every strategy ----------

    def capture(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """Full parameters and optimizer state (`name.key`), tensors and others, on the CPU of all ranks.

        Raises StokerError if the optimizer state has something else than tensors and single values.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors, values = Tensors(), dict[str, Any]()
        keys = self._keys()
        if any(keys.values()):
            self._link_state()
        for name, p in self._trained():
            for key in keys.get(name, []):
                get = functools.partial(safe_get_full_optimizer_state, optim_state_key=key)
                tensors[f"{name}.{key}"] = self._whole(p, get)
        for held, names in self._held():
            for key, value in held.items():
                if isinstance(value, torch.Tensor) and value.dim() == 0:
                    tensors.update({f"{name}.{key}": value.detach().cpu().clone() for name in names})
                elif isinstance(value, _SINGLE):
                    values.update({f"{name}.{key}": value for name in names})
                elif not isinstance(value, torch.Tensor):
                    raise StokerError(
                        f"parallel=deepspeed cannot save the {type(value).__name__} that "
                        f"{type(self._optimizer.optimizer).__name__} keeps as {key}: use parallel=fsdp"
                    )
        return self.whole_weights(), tensors, values

    def whole_weights(self) -> Tensors:
        """The full trained parameters in float32, on the CPU of all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: self._whole(p, safe_get_full_fp32_param) for name, p in self._trained()}

    def restore_weights(self, parameters: Tensors) -> None:
        """Restore what `whole_weights` returned, on every rank."""
        for name, p in self._trained():
            self._set(p, parameters[name])
            self.use(p, parameters[name])

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer state that `capture` returned, tensors and others.

        Under other strategies each parameter has its own state, and none if it never had a gradient. Here the
        parameters of a group share what is not as large as they are, such as step counts: that of the one
        that was updated most often.
        """
        if not state:
            return
        self._begin_state()
        keys = self._keys()
        for name, p in self._trained():
            for key in keys.get(name, []):
                if f"{name}.{key}" in state:
                    self._set(p, state[f"{name}.{key}"], key)
        for held, names in self._held():
            ordered = sorted(names, key=lambda name: float(state.get(f"{name}.step", 0)), reverse=True)
            for key, now in held.items():
                found = next((state[f"{name}.{key}"] for name in ordered if f"{name}.{key}" in state), now)
                if not isinstance(now, torch.Tensor):
                    held[key] = found
                elif now.dim() == 0:
                    held[key] = found.detach().to(now, copy=True)

    def _set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """Set this rank's part of a weight in float32, or of the optimizer's state of it."""
        value = value.to(self._setting.mesh.device)
        if self.stage < 3:
            parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
            return
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        begin = size * self._optimizer._get_param_partition_rank(parameter)
        part = value.flatten()[begin : begin + size]
        # DeepSpeed's way to set a whole value fails if the ranks' parts are not all full.
        part = nn.functional.pad(part, (0, size - part.numel()))
        self._optimizer.set_local_hp_param(part, parameter, key)

    def _begin_state(self) -> None:
        """Allocate the optimizer state with steps that change nothing."""
        zero = self._optimizer
        rates = [group["lr"] for group in zero.param_groups]
        for number, partition in enumerate(self._partitions()):
            for group in zero.param_groups:
                group["lr"] = 0.0
            partition.grad = torch.zeros_like(partition)
            zero._optimizer_step(number)
            partition.grad = None
        for group, rate in zip(zero.param_groups, rates, strict=True):
            group["lr"] = rate
        self._link_state()

    def _link_state(self) -> None:
        """Make DeepSpeed link the state of all groups: it does so only once, after the step of the first."""
        if self.stage < 3:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[torch.Tensor]:
        """This rank's flat float32 weights, one per optimizer group."""
        zero = self._optimizer
        flat = zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat
        return list(flat)

    def _held(self) -> list[tuple[dict[str, Any], list[str]]]:
        """The optimizer state of each of this rank's partitions, and the names of its group's parameters."""
        zero, found = self._optimizer, []
        for number, partition in enumerate(self._partitions()):
            group = number if self.stage < 3 else zero.sub_group_to_group_id[number]
            found.append((zero.optimizer.state.get(partition, {}), self._names[group]))
        return found

    def use(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Make the forward pass use a value: it has its own copy of the float32 weights."""
        with self._gathered(parameter):
            parameter.data.copy_(value)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with the names of their parameters."""
        return [{**{k: v for k, v in group.items() if k != "params"}, "params": names}
                for group, names in zip(self._optimizer.param_groups, self._names, strict=True)]  # fmt: skip

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _keys(self) -> dict[str, list[str]]:
        """The keys of each trained parameter's state that is as large as it is.

        All parameters of a group have the same, and so do all ranks, as DeepSpeed pads every rank's partition
        of a group to one size.
        """
        return {
            name: [k for k, v in held.items() if isinstance(v, torch.Tensor) and v.dim() > 0]
            for held, names in self._held()
            for name in names
        }

    def _whole(self, parameter: nn.Parameter, get: Any) -> torch.Tensor:
        found: torch.Tensor | None = get(parameter)
        assert found is not None
        return found.detach().float().cpu().reshape(_shape(parameter))

    @contextlib.contextmanager
    def _gathered(self, parameter: nn.Parameter) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield


def partition(
    model: nn.Module,
    blocks: Blocks,
    training: Training,
    setting: Setting,
    load: Load,
    originals: Originals,
) -> None:
    """Partition a model on the meta device among the ranks as it is loaded, block by block (stage 3).

    So no rank ever holds more than one full block and its own part. A model that is already in memory is
    left to DeepSpeed's `initialize`.

    Args:
        originals: receives those of frozen parameters.
    """
    if not any(p.is_meta for p in model.parameters()):
        return
    _quieten()
    import deepspeed

    settings, casts = config(training, setting, model), _casts(model, training, setting)
    with _inside_deepspeed():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        for name, part in [*((f"{name}.", block) for name, block in blocks), ("", model)]:
            load(model, setting.mesh.device, name)
            if casts:
                _cast(part, setting, originals)
            deepspeed.zero.Init(module=part, config_dict_or_path=settings)


def _casts(model: nn.Module, training: Training, setting: Setting) -> bool:
    """Whether the weights of the forward pass have the run's precision. If not, autocast does the casting."""
    halved = setting.precision != "fp32" and training.deepspeed.stage != 0
    return halved and not blocks.has_batch_norm(model)


def _cast(module: nn.Module, setting: Setting, originals: Originals) -> None:
    """Cast weights to the run's precision, but for those that are partitioned already.

    Of those that are trained DeepSpeed keeps float32 copies from there on. Of a frozen one the original is
    kept if the cast loses something, as it is what is exported.
    """
    dtype = DTYPES[setting.precision]
    for p in module.parameters():
        if hasattr(p, "ds_id") or p.dtype == dtype or p.dtype not in (*DTYPES.values(), torch.float64):
            continue
        cast = p.data.to(dtype)
        if not p.requires_grad:
            lossy = setting.mesh.world.rank == 0 and not torch.equal(cast.to(p.dtype), p.data)
            originals[p] = Original(p.dtype, p.detach().cpu() if lossy else None)
        p.data = cast  # on a CPU, the original is the former storage


_SINGLE = (type(None), bool, int, float, str)
_BUCKET = 500_000_000  # elements, DeepSpeed's default; it allocates as much memory whatever the model's size


def _check_optimizer(made: torch.optim.Optimizer) -> None:
    """Raises BadInput for optimizers that DeepSpeed cannot use, as it flattens all parameters."""
    if isinstance(made, torch.optim.Adafactor) or type(made).__name__ == "Muon":
        raise BadInput(
            f"parallel=deepspeed flattens all parameters into one vector, but {type(made).__name__} needs "
            "the rows and columns of matrices: use parallel=fsdp, or optimizer=adamw"
        )
    if type(made).__module__.startswith(("torchao.", "bitsandbytes.")):
        raise BadInput(
            "parallel=deepspeed cannot save an optimizer with 8-bit states: use parallel=fsdp, or "
            "optimizer=adamw"
        )


def check_file(training: Training, setting: Setting, model: nn.Module) -> None:
    """Raises BadInput if DeepSpeed refuses what the user's file sets, before any weight is loaded."""
    file = training.deepspeed.config
    if file is None:
        return
    _quieten()
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    with _inside_deepspeed():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    try:
        with _inside_deepspeed():
            DeepSpeedConfig(config(training, setting, model))
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        given = deepspeed_file.read(file)
        section = [s for s, held in given.items() if place and isinstance(held, dict) and place[0] in held]
        where = ".".join([*section[:1], *place]) or "DeepSpeed refuses it"
        raise BadInput(f"{file}: {where}: {first['msg']}") from error
    except Exception as error:  # DeepSpeed's own checks raise errors of many kinds
        raise BadInput(f"{file}: DeepSpeed refuses it: {words.first_line(error)}") from error


def config(training: Training, setting: Setting, model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's file, with everything missing or "auto" filled in."""
    bucket = min(_BUCKET, sum(_shape(p).numel() for p in model.parameters() if p.requires_grad))
    halved = setting.precision if _casts(model, training, setting) else "fp32"
    chosen = training.deepspeed
    zero: dict[str, Any] = {"stage": chosen.stage, "reduce_bucket_size": bucket}
    if chosen.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if chosen.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    made: dict[str, Any] = {
        # Boundaries are set at each micro-batch. More than one must be possible: otherwise DeepSpeed does not
        # accumulate gradients in host memory.
        "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 2 * setting.mesh.data.size,
        "gradient_clipping": setting.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    given = deepspeed_file.read(chosen.config)
    for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size"):
        given.pop(key, None)  # checked against the run's own: see `deepspeed_file.completed`
    # Whatever the file says: it may only repeat the run's precision, which is not always DeepSpeed's.
    own = {"bf16": {"enabled": halved == "bf16"}, "fp16": {"enabled": halved == "fp16", "loss_scale": 1.0}}
    return _merged(_merged(made, given), own)


def _merged(ours: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in given.items():
        if isinstance(value, Mapping):
            merged[key] = _merged(dict(ours.get(key, {})), value)
        elif value != "auto":
            merged[key] = value
    return merged


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _quieten() -> None:
    """Silence DeepSpeed before it is imported."""
    quiet.before_deepspeed()
    os.environ.setdefault("LOCAL_RANK", "0")  # required even for a single process
    warnings.filterwarnings(  # shown for every collective of every step
        "ignore", r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning
    )
    if not torch.cuda.is_available():
        import deepspeed

        # Otherwise it compiles a C++ extension for CPU communication, which needs a compiler and half a
        # minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def _inside_deepspeed() -> Iterator[None]:
    """Within the block DeepSpeed prints nothing, and takes this rank's GPU for that of LOCAL_RANK."""
    given = os.environ["LOCAL_RANK"]
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.environ["LOCAL_RANK"] = given
