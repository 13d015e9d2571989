"""The model of the text recipe: a new or loaded encoder, its tokenizer, loss, metrics and export."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stoker.data import hub_datasets, labelled_sources
from stoker.data import tokenizer as tokenizers
from stoker.data.labelled import Texts
from stoker.data.text_rows import Rows
from stoker.engine import flops, quiet  # noqa: F401 (the import of quiet is its work)
from stoker.engine.metrics import Mean, Metric, Sum
from stoker.errors import BadInput
from stoker.language import building, hub
from stoker.language.encoder import fingerprint
from stoker.recipes import classifiers
from stoker.recipes.text_shape import SIZES, Shape
from stoker.user_run import Run
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

log = logging.getLogger("stoker")

_POSITIONS = 512  # of a new model, unless texts are longer


@dataclass(frozen=True)
class Classifier:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any
    encoding: str
    """SHA-256 of everything that determines how a text is tokenised."""
    classes: tuple[str, ...]
    """The labels, in the order of the model's outputs."""
    config: Any
    """The model's config as it is written next to its weights."""
    said: str
    """What became of the last layer of a loaded model, see `classifiers.Loaded`."""


def build(
    reference: str,
    texts: Texts,
    *,
    shape: Shape | None,
    dropout: float,
    tokenizer: str | None,
    vocab_size: int,
    max_length: int,
) -> Classifier:
    """A new model of a given shape, or one loaded from a directory or hub id.

    Args:
        texts: the texts whose labels the model learns.
        shape: shape of a new model; None: load `reference`.
        dropout: dropout of a new model.
        tokenizer: a directory or hub id; None: the model's own, or for a new model one with `vocab_size`
            tokens, trained on the train split.
        max_length: tokens of the longest text.

    Raises:
        BadInput: the model does not exist, does not load, or does not match its tokenizer.
    """
    if shape is not None:
        made = _load_tokenizer(tokenizer) if tokenizer else _train_tokenizer(texts, vocab_size, max_length)
        encoding = fingerprint(made)
        model = _new(shape, made, texts.classes, max_length, dropout)
        loaded = classifiers.Loaded(model, texts.classes, "")
    else:
        folder = hub.find(reference, known=tuple(SIZES), pickles=True)
        made = _load_tokenizer(tokenizer or str(folder))
        encoding = fingerprint(made)
        _check_positions(reference, _config(folder), max_length)
        loaded = _load(reference, folder, made, texts.classes)
    config = copy.deepcopy(loaded.model.config)
    config.architectures = [type(loaded.model).__name__]
    return Classifier(loaded.model, made, encoding, loaded.classes, config, loaded.said)


def say(run: Run, data: str, texts: Texts, rows: Rows, made: Classifier) -> None:
    """Record what the data is, named as in the config, and log it on rank 0."""
    run.fingerprint("data", texts.fingerprint)
    run.fingerprint("encoding", made.encoding)
    if labelled_sources.is_here(data):
        run.data("data", data)
    else:
        known, revision = f"sha256:{texts.fingerprint}", hub_datasets.revision(data)
        run.data("data", data, fingerprint=known, revision=revision)
    splits = {"train": texts.train, "validation": texts.validation, "test": texts.test}
    run.attempt.event(
        "data", sources=[texts.description], texts={name: len(those) for name, those in splits.items()},
        rows=len(rows.train), tokens_per_row=rows.train.tokens_per_sample,
    )  # fmt: skip
    if run.world.rank > 0:
        return
    most, count = Counter(text.label for text in texts.train).most_common(1)[0]
    log.info(
        "data: %s; %d classes, the largest, %s, with %.1f%% of the %d training texts",
        texts.description, len(made.classes), most, 100 * count / len(texts.train), len(texts.train),
    )  # fmt: skip
    classifiers.say(run, made.said)
    if texts.repeated:
        log.warning("%d of the %d test texts are also in the train split", texts.repeated, len(texts.test))


def _load_tokenizer(reference: str) -> Any:
    """With a pad token. Raises BadInput."""
    tokenizer = building.read_tokenizer(reference)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise BadInput(
            f"the tokenizer of {reference} has no padding token: set pad_token in tokenizer_config.json"
        )
    return tokenizer


def _train_tokenizer(texts: Texts, vocab_size: int, max_length: int) -> Any:
    """Byte-level BPE that begins each text with a token representing the whole text."""
    trained = tokenizers.train_tokenizer((text.text for text in texts.train), vocab_size)
    begin = tokenizers.END_OF_TEXT
    trained.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, trained.token_to_id(begin))]
    )
    made = tokenizers.as_transformers(trained, max_length=max_length)
    made.cls_token = begin
    return made


def check(reference: str) -> None:
    """Raises BadInput if the model does not exist or cannot be a text classifier."""
    _config(hub.find(reference, known=tuple(SIZES), weights=False))


def _new(shape: Shape, tokenizer: Any, classes: Sequence[str], max_length: int, dropout: float) -> Any:
    """A BERT (Devlin et al. 2019, arXiv:1810.04805)."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.feed_forward,
        max_position_embeddings=max(_POSITIONS, max_length), pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **classifiers.labels(classes),
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _load(reference: str, folder: Path, tokenizer: Any, classes: Sequence[str]) -> classifiers.Loaded:
    """Load the model, with a new last layer if the classes differ. Raises BadInput."""
    loaded = classifiers.load(AutoModelForSequenceClassification, reference, folder, classes)
    building.check_vocabulary(reference, loaded.model, tokenizer)
    loaded.model.config.pad_token_id = tokenizer.pad_token_id  # by which some find a text's last token
    return loaded


def _config(folder: Path) -> Any:
    return building.load_config(
        folder, AutoModelForSequenceClassification, "for which transformers has no classifier"
    )


def _check_positions(reference: str, config: Any, max_length: int) -> None:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and config.model_type in _FROM_PADDING:
        most -= config.pad_token_id + 1
    if most is not None and most > 0 and max_length > most:
        raise BadInput(f"max_length={max_length} is more than the {most} positions of {reference}")


_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Families that number positions starting after the padding token's id."""


def size(made: Classifier, max_length: int) -> dict[str, float]:
    """What accuracy is compared with: `parameters`, and `flops` of a forward pass over `max_length`
    tokens."""
    parameters = sum(p.numel() for p in made.model.parameters())
    return {"parameters": parameters, "flops": forward_flops(made, max_length)}


def forward_flops(made: Classifier, tokens: int) -> int:
    """Operations of one forward pass of one text; see `flops.of_forward`."""
    chosen = made.model.config._attn_implementation
    # As matrix products, which are counted; fused kernels are not counted on CPUs.
    made.model.set_attn_implementation("eager")
    ids = torch.full((1, tokens), made.tokenizer.cls_token_id or 0, device=made.model.device)
    found = flops.of_forward(made.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    made.model.set_attn_implementation(chosen)
    return found


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments for the model, each (texts, tokens)."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def metrics(output: Any, batch: dict[str, torch.Tensor]) -> dict[str, Metric]:
    """Cross-entropy without smoothing, accuracy, and per class the actual, predicted and correct counts."""
    logits, labels = output.logits.float(), batch["labels"]
    found, labels_here = logits.argmax(dim=1).cpu(), labels.cpu()
    right = found == labels_here
    total = F.cross_entropy(logits, labels, reduction="sum")
    counts = {"of": labels_here, "found": found, "right": labels_here[right]}
    sums = {
        f"{name} {number}": Sum(float(count))
        for name, numbers in counts.items()
        for number, count in enumerate(torch.bincount(numbers, minlength=logits.shape[1]).tolist())
    }
    return {"loss": Mean(total, len(labels)), "accuracy": Mean(right.sum(), len(labels)), **sums}


@dataclass(frozen=True)
class Measured:
    """The results of a classifier on a dataset."""

    metrics: dict[str, float]
    """`loss`, `accuracy` and `macro_f1`."""
    by_class: list[tuple[str, int, float, float, float]]
    """One row per class: name, texts, precision, recall, F1."""


CLASS_COLUMNS = ("class", "texts", "precision", "recall", "F1")


def measured(sums: Mapping[str, float], classes: Sequence[str]) -> Measured:
    """Turn `metrics`, summed over a dataset, into results.

    Macro F1 is the mean F1 over the classes that occur or were predicted, as in scikit-learn.
    """
    rows = []
    for number, name in enumerate(classes):
        of, found, right = (sums[f"{kind} {number}"] for kind in ("of", "found", "right"))
        f1 = 2 * right / (of + found) if of + found else 0.0
        rows.append((name, int(of), right / found if found else 0.0, right / of if of else 0.0, f1))
    there = [f1 for number, (*_, f1) in enumerate(rows) if sums[f"of {number}"] + sums[f"found {number}"]]
    kept = {name: sums[name] for name in ("loss", "accuracy")}
    return Measured({**kept, "macro_f1": sum(there) / len(there)}, rows)


def describe(made: Classifier, target: Path) -> None:
    """Write everything that goes next to the weights of an export."""
    made.config.save_pretrained(target)
    made.tokenizer.save_pretrained(target)
