"""Evaluate a causal language model or an adapter: loss and perplexity for each data source, and answers.

Nothing is trained: the weights are distributed over the ranks without gradients or an optimizer, and every
token that training would learn is predicted once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from stoker.data.called import VALUES, check_values
from stoker.engine.keys import Names
from stoker.engine.settings import Fsdp, Training
from stoker.errors import BadInput
from stoker.language.lora import Lora
from stoker.user_run import Run

PRELOAD = (
    "stoker.engine.quiet",
    "peft",
    *(f"stoker.language.{room}" for room in ("adapters", "building", "data", "generation", "objective")),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `stoker evaluate`."""

    model: str
    """A model or an adapter: a directory, s3://bucket/folder, or a hub id."""
    base: str | None = None
    """The base model of an adapter, if it has moved since the adapter was trained."""
    data: Names
    """Evaluation data, as in `stoker train llm`. With several sources, a,b, each has its own loss."""
    columns: dict[str, str | dict[str, str]] = field(default_factory=dict)
    """The names of the fields in your data, as in `stoker train llm`."""
    loss_on: Literal["answer", "last", "all"] = "answer"
    """For pairs and conversations: all assistant turns, only the last one, or everything."""
    chat_template: str | None = None
    """As in `stoker train llm`; default: the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra values passed to the chat template with each conversation."""
    quantisation: Literal["none", "nf4"] = "none"
    """Keep the weights in 4 bits, like the base of a QLoRA adapter (extra `quantisation`)."""
    tokenizer: str | None = None
    """A directory or hub id; default: the tokenizer of the adapter or the model."""
    sequence_length: Annotated[int, Ge(2)] = 1024
    """Tokens per row; longer documents are truncated, and their number is reported."""
    packing: bool = True
    """Put several documents into a row, without attention across them."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Rows per forward pass, over all ranks."""
    prompts: tuple[str, ...] = ()
    """Prompts that the model answers; default: two from the data."""
    generate_tokens: Annotated[int, Ge(0)] = 64
    """Maximum length of an answer; 0: no answers."""
    parallel: Literal["auto", "single", "ddp", "fsdp"] = "auto"
    """How several ranks hold the model: a copy each (ddp) or sharded (fsdp); auto chooses by memory."""
    fsdp: Fsdp = field(default_factory=Fsdp)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The precision of the weights and the computation; auto: bf16 if it is fast on this device."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication backend: nccl between GPUs, gloo between CPUs; auto chooses by device."""

    def __post_init__(self) -> None:
        check_values(VALUES, self.chat_template_kwargs)
        if self.prompts and not self.generate_tokens:
            raise ValueError("prompts are given, but generate_tokens=0 makes no answers: omit one of the two")

    @property
    def layout(self) -> Training:
        """The settings of the Trainer."""
        return Training(
            parallel=self.parallel, fsdp=self.fsdp, precision=self.precision, backend=self.backend
        )


def check_launch(config: Config) -> None:
    """Check what can be checked before any process is started. Raises BadInput."""
    from stoker.data import sources
    from stoker.language import chat_template, hub, saved_adapters, shape

    if config.chat_template is not None:
        chat_template.read(config.chat_template)
    sources.check({"data": config.data}, config.columns, evaluated=True)
    if config.tokenizer is not None:
        hub.check_tokenizer(config.tokenizer)
    model, lora = _meant(config, weights=False)
    if lora.adapter is None or not saved_adapters.scaling(Path(lora.adapter)).used:
        longest = shape.positions(hub.find(model, weights=False))
        shape.check_positions(model, longest, config.sequence_length, scaled=None)
    if config.quantisation != "none":
        from stoker.language import quantised

        quantised.check()


def train(run: Run, config: Config) -> None:
    """Read and pack the data, distribute the model, predict every token once, and answer the prompts."""
    from stoker import distributed
    from stoker.data import sources, tokens
    from stoker.engine import memory
    from stoker.engine.precision import DTYPES
    from stoker.language import (
        adapters,
        building,
        data,
        data_messages,
        generation,
        objective,
        perplexity,
        quantised,
    )
    from stoker.trainer import Trainer, computed_in

    distributed.join(run.world, config.backend)
    precision = computed_in(run, config.layout)
    with distributed.rank_zero_first(run.world):
        model, lora = _meant(config)
        found = sources.read_evaluated(config.data, config.columns)
        language = building.build(
            model,
            tokenizer=adapters.tokenizer_for(config.tokenizer, lora),
            sequence_length=config.sequence_length,
            dtype=DTYPES[precision],
            chat_template=config.chat_template,
            grows=adapters.brings_tokens(lora),
            rope_scaling=adapters.scaling_of(lora),
        )
        packing = config.packing and language.packs
        rows = data.pack_evaluated(
            found, language.tokenizer, sequence_length=config.sequence_length, loss_on=config.loss_on,
            packing=packing, values=config.chat_template_kwargs,
        )  # fmt: skip
    data_messages.say_evaluated(run, config.data, found)
    prompts = data.prompts(
        found, language.tokenizer, config.prompts, positions=building.positions(language.config),
        values=config.chat_template_kwargs,
    )  # fmt: skip
    if config.quantisation == "nf4":
        quantised.convert(language.model, run.world)
    evaluated = adapters.adapted(language, lora, compare=run.world.rank == 0).requires_grad_(False)
    called = objective.attach(evaluated)
    trainer = Trainer(
        run, evaluated, optimizer=None, inputs=called.inputs, loss=called.loss,
        training=config.layout,
        load=adapters.loading(language.load),
    )  # fmt: skip
    run.fingerprint("model", language.fingerprint)
    perplexity.log_test(
        trainer, rows, batch_size=config.batch_size,
        collate=functools.partial(tokens.collate, trimmed=not packing),
    )  # fmt: skip
    generation.log_generations(trainer, language, prompts, config.generate_tokens)
    run.table("memory", trainer.memory(), memory.COLUMNS)


def _meant(config: Config, *, weights: bool = True) -> tuple[str, Lora]:
    """The model, and its adapter if an adapter is evaluated. Raises BadInput.

    Args:
        weights: whether to download the weights of a model on the hub.
    """
    from stoker import exports
    from stoker.language import hub, merging, saved_adapters

    folder = hub.find(config.model, "model or adapter", weights=weights)
    if not exports.is_adapter(folder):
        if config.base is not None:
            raise BadInput(f"base={config.base} is for adapters, and {config.model} is a whole model")
        return config.model, Lora()
    base = config.base or merging.base_of(folder)
    origin = hub.find(base, "the adapter's base model", weights=weights)
    saved_adapters.check(folder, model=base, origin=origin, quantised=config.quantisation != "none")
    return base, Lora(adapter=str(folder))
