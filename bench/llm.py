"""What fine-tuning a language model costs, beside TRL and transformers' Trainer, in the same run.

python bench/llm.py [--quick] [--json FILE]

The documents are pairs of question and answer whose lengths are drawn as those of real instruction data
are, their text is Python's documentation. Each figure is of a fresh process with one thread, ours and the
peers' in turn. Training and tokenising are compared by CPU time: wall time on a shared machine says more of
its other guests. Which of a peer's settings is the fastest here is tried out first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Row, median, spread

HERE = Path(__file__).resolve()
VOCABULARY, ROW, ROWS = 32_000, 1024, 4
"""Of the model, tokens; of a row, tokens; of a global batch, rows."""

LENGTHS = {"Dolly": (15_011, 118.1, 91.3), "OASST1": (34_795, 55.7, 340.0), "Alpaca": (52_002, 27.8, 64.6)}
"""Documents, and their mean tokens of prompts and of completions over all rounds: Wang et al. 2023, "How Far
Can Camels Go?" (arXiv:2306.04751), table 1. They are drawn log-normal about these means."""
DEVIATION = 1.0
"""Of a length's logarithm, which puts the mean at 1.65 times the median."""
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}### {{ m.role }}\n{{ m.content }}\n### assistant\n{% endif %}{% endfor %}"
)


# -- what is trained on -----------------------------------------------------------------------


def prepare(folder: str, size: str, batches: int, share: float) -> None:
    """Make a folder of what the others read.

    A model of a size with its tokenizer in `model`, 2,000 pairs in `many.jsonl`, those of so many global
    batches in `few.jsonl`, and as transformers trains on them in `rows`, and a share of the documentation's
    texts in `texts.jsonl`. The few are runs of documents of like length, evenly spread over all lengths:
    what batches of a whole epoch hold where documents are grouped by length.
    """
    import torch
    from stoker.data import python_docs, tokenizer
    from stoker.language.shape import SIZES
    from transformers import LlamaConfig, LlamaForCausalLM

    here = Path(folder)
    texts = [document.text for document in python_docs.texts()]
    texts = texts[: int(share * len(texts))]
    made = tokenizer.as_transformers(tokenizer.train_tokenizer(texts, VOCABULARY), max_length=10**9)
    made.chat_template = TEMPLATE
    made.save_pretrained(here / "model")
    torch.manual_seed(0)
    shape = LlamaConfig(
        **SIZES[size], vocab_size=VOCABULARY, max_position_embeddings=ROW, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(here / "model")
    pairs = _pairs(made, made("\n".join(texts))["input_ids"], 2000)
    lengths = [len(made.apply_chat_template([*p["prompt"], *p["completion"]])["input_ids"]) for p in pairs]
    ordered = sorted(range(len(pairs)), key=lambda n: lengths[n])
    together = round(ROWS * ROW / (sum(lengths) / len(lengths)))
    begins = [(2 * n + 1) * len(ordered) // (2 * batches) - together // 2 for n in range(batches)]
    few = sorted(n for begin in begins for n in ordered[begin : begin + together])
    for name, records in (
        ("few", [pairs[n] for n in few]), ("many", pairs), ("texts", [{"text": text} for text in texts]),
    ):  # fmt: skip
        (here / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenised(here / "few.jsonl", made).save_to_disk(here / "rows")
    (here / "together").write_text(str(together))


def _pairs(tokenizer: Any, ids: list[int], count: int) -> list[dict[str, Any]]:
    """Conversations of a question and an answer, of texts that are so many tokens long."""
    import numpy as np

    drawn = np.random.default_rng(0)
    documents, *means = (np.array(column) for column in zip(*LENGTHS.values(), strict=True))
    kinds = drawn.choice(len(documents), count, p=documents / documents.sum())
    asked, said = (
        drawn.lognormal(np.log(mean[kinds]) - DEVIATION**2 / 2, DEVIATION).astype(int) + 1 for mean in means
    )
    asked, said = np.minimum(asked, ROW // 4), np.minimum(said, ROW // 2)  # and what the template adds
    made = []
    for begin, first, second in zip(drawn.integers(0, len(ids) - ROW, count), asked, said, strict=True):
        question, answer = tokenizer.batch_decode(
            [ids[begin : begin + first], ids[begin + first : begin + first + second]]
        )
        made.append({"prompt": [{"role": "user", "content": question}],
                     "completion": [{"role": "assistant", "content": answer.strip() or "None"}]})  # fmt: skip
    return made


# -- useful tokens a second -------------------------------------------------------------------


class Meter:
    """Real tokens that go into a model over the CPU seconds they take, in the second of two epochs."""

    def __init__(self, model: Any, count: Callable[[dict[str, Any]], int]) -> None:
        self._count, self._tokens, self._begun = count, 0, 0.0
        self.rates: list[float] = []
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, called: dict[str, Any]) -> None:
        self._tokens += self._count(called)

    def epoch(self) -> None:
        """An epoch has ended."""
        now = time.process_time()
        self.rates.append(self._tokens / (now - self._begun))
        self._tokens, self._begun = 0, now


def train(who: str, how: str, folder: str) -> float:
    """Useful tokens a CPU second, of ours or of a peer under some settings."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return TRAINERS[who](how, Path(folder))


def ours(how: str, folder: Path) -> float:
    """What the recipe does of a step, with its log, journal and all."""
    import stoker
    from stoker.data import sources, tokens
    from stoker.engine import optimizers
    from stoker.language import building, data, objective

    found = sources.read_all(str(folder / "few.jsonl"), validation=0.01, test=0.01)
    language = building.build(
        str(folder / "model"), tokenizer=None, vocab_size=VOCABULARY, sequence_length=ROW, documents=[]
    )
    rows = data.pack(found, language.tokenizer, sequence_length=ROW)
    called = objective.attach(language.model)
    run = stoker.Run("bench")
    trainer = stoker.Trainer(
        run, language.model, optimizer=optimizers.factory("adamw", lr=1e-4), inputs=called.inputs,
        loss=called.loss, load=language.load,
        training=stoker.Training(parallel="single", precision="fp32", clip_norm=1.0, checkpoint_every="10h"),
    )  # fmt: skip
    meter = Meter(trainer.model, lambda given: int(given["documents"].sum()))
    loader = trainer.loader(rows.train, batch_size=ROWS, collate=tokens.collate)
    an_epoch = len(rows.train) // ROWS  # in full batches
    for step, batch in enumerate(trainer.steps(loader, max_steps=2 * an_epoch), start=1):
        run.log(loss=trainer.step(batch))
        if step % an_epoch == 0:
            meter.epoch()
    return meter.rates[-1]


def _hf_arguments(kind: Any, documents: int, parts: int, **settings: Any) -> Any:
    """What both peers have in common.

    Args:
        documents: of a forward pass.
        parts: forward passes of a step.
    """
    return kind(
        output_dir="hf", num_train_epochs=2, learning_rate=1e-4, max_grad_norm=1.0, logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused", use_cpu=True,
        dataloader_pin_memory=False, gradient_checkpointing=False, bf16=False,
        per_device_train_batch_size=documents, gradient_accumulation_steps=parts, **settings,
    )  # fmt: skip


def _epochs_of(meter: Meter) -> Any:
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            meter.epoch()

    return Epochs()


def _real(given: dict[str, Any]) -> int:
    mask = given.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(given["input_ids"].numel())


def _model_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder / "model")


def tokenised(file: Path, tokenizer: Any) -> Any:
    """Ids and labels as transformers makes them, by `datasets.map`."""
    rows = _read(file)
    rows = rows.map(lambda pairs: answers(pairs, tokenizer), batched=True, remove_columns=rows.column_names)
    return rows.map(lambda row: {"length": len(row["input_ids"])})


def answers(pairs: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    chats = [[*asked, *said] for asked, said in zip(pairs["prompt"], pairs["completion"], strict=True)]
    made = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
    labels = [
        [i if said else -100 for i, said in zip(*pair, strict=True)]
        for pair in zip(made["input_ids"], made["assistant_masks"], strict=True)
    ]
    return {"input_ids": made["input_ids"], "labels": labels}


def _read(file: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files=str(file), split="train")


def _documents_a_batch(folder: Path) -> int:
    return int((folder / "together").read_text())


def hf_trainer(how: str, folder: Path) -> float:
    """transformers' Trainer: padded to the longest of documents of like length, or flattened into one row."""
    from datasets import load_from_disk
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    model, tokenizer = _model_and_tokenizer(folder)
    rows = load_from_disk(folder / "rows")
    flattened = how.startswith("flattened")
    together = _documents_a_batch(folder) if how == "padded" else 4
    parts = max(1, round(_documents_a_batch(folder) / together))
    meter = Meter(model, _real)
    Trainer(
        model=model, train_dataset=rows.remove_columns("length") if flattened else rows,
        callbacks=[_epochs_of(meter)],
        data_collator=DataCollatorWithFlattening() if flattened else DataCollatorForSeq2Seq(tokenizer),
        args=_hf_arguments(
            TrainingArguments, together, parts,
            train_sampling_strategy="random" if flattened else "group_by_length",
        ),
    ).train()  # fmt: skip
    return meter.rates[-1]


def trl(how: str, folder: Path) -> float:
    """TRL's SFTTrainer: packed by best fit, or padded to the longest of documents of like length."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = _model_and_tokenizer(folder)
    packed = how.startswith("packed")
    together = {"packed": ROWS, "packed, a row at a time": 1, "padded by 4": 4}[how]
    a_step = ROWS if packed else _documents_a_batch(folder)
    rows = _read(folder / "few.jsonl")
    meter = Meter(model, _real)
    SFTTrainer(
        model=model, train_dataset=rows, processing_class=tokenizer, callbacks=[_epochs_of(meter)],
        args=_hf_arguments(
            SFTConfig, together, max(1, round(a_step / together)), packing=packed, max_length=ROW,
            completion_only_loss=True, train_sampling_strategy="random" if packed else "group_by_length",
        ),
    ).train()  # fmt: skip
    return meter.rates[-1]


TRAINERS: dict[str, Callable[[str, Path], float]] = {"ours": ours, "hf_trainer": hf_trainer, "trl": trl}
SETTINGS = {
    "trl": ("packed, a row at a time", "packed", "padded by 4"),
    "hf_trainer": ("padded by 4", "padded", "flattened by 4"),
}
"""What is tried of a peer: how documents share a forward pass, and how many; the rest of a batch is
accumulated."""


# -- memory, padding, tokenising, start-up ----------------------------------------------------


def loss_peak(who: str, tokens: int, width: int, vocabulary: int) -> float:
    """MB that a loss and its backward pass need at their peak, beside the hidden states and weights."""
    import torch
    from stoker.language.cross_entropy import linear_cross_entropy
    from torch.nn import functional as F

    torch.set_num_threads(1)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    if who == "ours":
        loss = linear_cross_entropy(hidden, weight, labels)
    else:
        loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    loss.backward()
    return (_memory("VmHWM") - before) / 1e6


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


def padding(folder: str) -> dict[str, float]:
    """The share of positions that hold nothing, in per cent, of many documents."""
    from datasets import Dataset
    from stoker.data import sources
    from stoker.language import data
    from transformers import AutoTokenizer
    from trl import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    file = Path(folder) / "many.jsonl"
    found = sources.read_all(str(file), validation=0.01, test=0.01)
    ours = data.pack(found, tokenizer, sequence_length=ROW).train
    lengths = list(tokenised(file, tokenizer)["length"])
    packed = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths]}), ROW, "bfd")
    together = round(ROWS * ROW / (sum(lengths) / len(lengths)))
    ordered, real = sorted(lengths), sum(lengths)
    parts = [ordered[n : n + together] for n in range(0, len(ordered), together)]
    return {
        "ours": 100 * (1 - ours.statistics.efficiency),
        "trl, packed": 100 * (1 - real / (len(packed) * ROW)),
        "sorted by length and padded": 100 * (1 - real / sum(len(part) * part[-1] for part in parts)),
    }


def tokenise(who: str, folder: str) -> dict[str, float]:
    """Tokens a CPU second, until they are in a cache on the disk that was empty."""
    from transformers import AutoTokenizer

    here = Path.cwd()  # which is new
    os.environ["STOKER_CACHE"] = str(here / "cache")
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    made = _tokenised_by_us if who == "ours" else _tokenised_by_datasets
    return {name: made(Path(folder) / f"{name}.jsonl", tokenizer) for name in ("texts", "many")}


def _tokenised_by_datasets(file: Path, tokenizer: Any) -> float:
    rows = _read(file)

    def encode(batch: dict[str, Any]) -> Any:
        return answers(batch, tokenizer) if "prompt" in batch else tokenizer(batch["text"])

    begun = _cpu_time()
    made = rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        cache_file_name=str(Path.cwd() / f"{file.stem}.arrow"),
    )
    taken = _cpu_time() - begun
    return sum(map(len, made["input_ids"])) / taken


def _tokenised_by_us(file: Path, tokenizer: Any) -> float:
    from stoker.data import sources
    from stoker.language import data

    found = sources.read_all(str(file), validation=0.01, test=0.01)
    begun = _cpu_time()
    rows = data.pack(found, tokenizer, sequence_length=ROW)
    taken = _cpu_time() - begun
    parts = [rows.train, *rows.validation.values(), *rows.test.values()]
    return sum(part.statistics.tokens for part in parts) / taken


def _cpu_time() -> float:
    """Of this process, and of those that it started and that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def start(who: str, folder: str) -> float:
    """Seconds from the start of a process to the end of its first step; what can be cached is."""
    begun = time.time()
    if who == "hf_trainer":
        return float(harness.measure(HERE, "first_step", folder=folder)) - begun
    arguments = {
        "model": "small", "tokenizer": f"{folder}/model", "data": f"{folder}/few.jsonl", "max_steps": 100,
        "sequence_length": 128, "batch_size": 2, "precision": "fp32", "clip_norm": 1.0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "stoker", "train", "llm", "--runs", runs, "--name", "first"]
        command += [f"{key}={value}" for key, value in arguments.items()]
        begun = time.time()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while process.poll() is None:
                journals = Path(runs, "llm", "first", "journal").glob("*.rank-0.jsonl")
                if any(b'"loss"' in file.read_bytes() for file in journals):
                    return time.time() - begun
                time.sleep(0.005)
            raise RuntimeError((process.stderr.read() if process.stderr else b"").decode()[-2000:])
        finally:
            process.kill()
            process.communicate()


def first_step(folder: str) -> float:
    """When transformers' Trainer has made a step, as `time.time()`."""
    import torch
    from datasets import load_from_disk
    from stoker.language.shape import SIZES
    from transformers import (  # isort: skip
        AutoTokenizer, DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback,
        TrainingArguments,
    )  # fmt: skip

    torch.set_num_threads(1)
    ended = []

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended.append(time.time())
            control.should_training_stop = True

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    shape = LlamaConfig(**SIZES["small"], vocab_size=len(tokenizer), tie_word_embeddings=True)
    rows = load_from_disk(Path(folder) / "rows")
    rows = rows.map(lambda row: {name: row[name][:128] for name in ("input_ids", "labels")})
    Trainer(
        model=LlamaForCausalLM(shape), train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Steps()], args=_hf_arguments(TrainingArguments, 2, 1),
    ).train()  # fmt: skip
    return ended[0]


# -- the table --------------------------------------------------------------------------------


def training_rows(folder: str, quick: bool) -> list[Row]:
    best = {who: settings[0] for who, settings in SETTINGS.items()}
    if quick:
        return [_trained_row(folder, best, 1, {}, "")]
    best = {who: _fastest(who, folder) for who in SETTINGS}
    kept = ", of an allocator told to keep memory"
    return [
        _trained_row(folder, best, 3, {}, ""),
        _trained_row(folder, best, 3, harness.KEEP_MEMORY, kept),
    ]


def _trained_row(
    folder: str, best: Mapping[str, str], rounds: int, variables: Mapping[str, str], how: str
) -> Row:
    found: dict[str, list[float]] = {who: [] for who in TRAINERS}
    for _ in range(rounds):
        for who, rates in found.items():
            rates.append(_trained(who, best.get(who, ""), folder, variables))
    better = max(best, key=lambda who: median(found[who]))
    pairs = list(zip(found["ours"], found[better], strict=True))
    name = f"useful tokens a second of CPU time, over the better peer{how}"
    row = _row(name, "tok/s", pairs, better, "≥ 1.3×", lambda ratio: ratio >= 1.3)
    row.peers = {f"{who} ({settings})": median(found[who]) for who, settings in best.items()}
    return row


def _fastest(who: str, folder: str) -> str:
    """The fastest of a peer's settings."""
    rates = {how: _trained(who, how, folder) for how in SETTINGS[who]}
    print(f"{who}: {rates}", file=sys.stderr, flush=True)
    return max(rates, key=lambda how: rates[how])


def _trained(who: str, how: str, folder: str, variables: Mapping[str, str] | None = None) -> float:
    return float(harness.measure(HERE, "train", variables, who=who, how=how, folder=folder))


def memory_rows(folder: str, quick: bool) -> list[Row]:
    tokens, width = (1024, 128) if quick else (4096, 512)
    pairs = [
        [
            harness.measure(HERE, "loss_peak", who=who, tokens=tokens, width=width, vocabulary=128_000)
            for who in ("ours", "plain")
        ]
        for _ in range(1 if quick else 3)
    ]
    name = f"peak memory of loss and backward, {tokens:,} tokens, vocabulary of 128,000, over plain"
    return [_row(name, "MB", pairs, "plain", "≤ 0.35×", lambda ratio: ratio <= 0.35)]


def padding_rows(folder: str, quick: bool) -> list[Row]:
    found = harness.measure(HERE, "padding", folder=folder)
    mine = found.pop("ours")
    name = "share of positions that are padding, of 2,000 documents"
    return [Row(name, "%", mine, found, goal="< 2 %", met=mine < 2)]


def tokenising_rows(folder: str, quick: bool) -> list[Row]:
    pairs = [
        [harness.measure(HERE, "tokenise", who=who, folder=folder) for who in ("ours", "datasets.map")]
        for _ in range(1 if quick else 5)
    ]
    names = {"texts": "plain texts", "many": "conversations, with what is learnt of them"}
    return [
        _row(f"tokenising {what}, tokens a second of CPU time, over datasets.map", "tok/s",
             [(mine[file], theirs[file]) for mine, theirs in pairs], "datasets.map", "≥ 1×",
             lambda ratio: ratio >= 1.0)
        for file, what in names.items()
    ]  # fmt: skip


def start_rows(folder: str, quick: bool) -> list[Row]:
    start("ours", folder)  # which fills the cache
    pairs = [[start(who, folder) for who in ("ours", "hf_trainer")] for _ in range(1 if quick else 7)]
    name = "from the start of a process to the end of its first step, data cached"
    return [_row(name, "s", pairs, "hf_trainer", "≤ 1×", lambda ratio: ratio <= 1.0)]


def _row(
    name: str, unit: str, pairs: Sequence[Sequence[float]], peer: str, goal: str, met: Callable[[float], bool]
) -> Row:
    """A row of pairs of ours and of one peer."""
    mine, theirs = zip(*pairs, strict=True)
    ratios = [a / b for a, b in pairs]
    return Row(
        name, unit, median(mine), {peer: median(theirs)}, median(ratios), spread(ratios), goal,
        met(median(ratios)),
    )  # fmt: skip


def main() -> None:
    asked = harness.arguments(__doc__ or "")
    size, batches, share = ("tiny", 2, 0.1) if asked.quick else ("small", 3, 1.0)
    made: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        caches = {"STOKER_CACHE": "stoker", "HF_DATASETS_CACHE": "datasets", "HF_HOME": "hub"}
        os.environ.update({name: str(Path(folder, "cache", of)) for name, of in caches.items()})
        os.environ |= {"HF_HUB_OFFLINE": "1", "STOKER_SINKS": "none"}
        harness.measure(HERE, "prepare", folder=folder, size=size, batches=batches, share=share)
        for part in (training_rows, memory_rows, padding_rows, tokenising_rows, start_rows):
            began = time.perf_counter()
            made += part(folder, asked.quick)
            print(f"{part.__name__}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    harness.report(made, asked.json)


if __name__ == "__main__":
    if not harness.answer_measure(
        {
            "prepare": prepare, "train": train, "loss_peak": loss_peak, "padding": padding,
            "tokenise": tokenise, "first_step": first_step,
        }
    ):  # fmt: skip
        main()
