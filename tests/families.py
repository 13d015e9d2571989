"""Small random models of several families, as directories that the hub could have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from stoker.engine import quiet  # noqa: F401 (its import is its work)
from stoker.engine.random_state import seed_everything

VOCABULARY = 301
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
_ROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * n for n in range(8)],
    "short_mscale": 1.1, "long_mscale": 1.3,
}  # fmt: skip
_LONG: dict[str, Any] = {"original_max_position_embeddings": 8, "rope_parameters": _ROPE}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 5}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 5}),
    "modernbert": ("ModernBertDecoderConfig", {"local_attention": 5, "global_attn_every_n_layers": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}),
    "phi3": ("Phi3Config", {}),
    "phi3-long": ("Phi3Config", _LONG),
    "phimoe": ("PhimoeConfig", {**_LONG, "num_local_experts": 4}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [0], "num_experts_per_tok": 2},
    ),
}
"""By name: the config's class, and what it has beside the sizes."""


def config(family: str, **settings: Any) -> Any:
    kind, own = FAMILIES[family]
    return getattr(transformers, kind)(**{**_SMALL, **own, **settings})


def that_sees(folder: Path) -> Path:
    """The directory of a small Gemma 3 with eyes."""
    words = config("gemma3").to_dict()
    eyes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    seed_everything(7)
    made = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=words, vision_config=eyes, mm_tokens_per_image=4)
    )
    made.save_pretrained(folder)
    return with_tokenizer(folder)


def model(family: str, **settings: Any) -> Any:
    """A model in float32, the same each time, with weights large enough to differ from their beginning."""
    seed_everything(7)
    made = transformers.AutoModelForCausalLM.from_config(config(family, **settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def save(folder: Path, family: str, **settings: Any) -> Path:
    """Its directory, in several files and with a tokenizer."""
    model(family, **settings).save_pretrained(folder, max_shard_size="20KB")
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    from stoker.data import tokenizer

    trained = tokenizer.train_tokenizer(["no text"], 300)
    tokenizer.as_transformers(trained, max_length=256).save_pretrained(folder)
    return folder


def documents() -> dict[str, torch.Tensor]:
    """Two rows of packed documents of unequal length, the second with padding; every fifth has no loss."""
    made = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (2, 24), generator=made)
    lengths = torch.tensor([[7, 9, 8, 0], [15, 4, 0, 0]])
    labels, positions = ids.clone(), torch.zeros_like(ids)
    for row, counts in enumerate(lengths.tolist()):
        start = 0
        for count in [*[n for n in counts if n], 24 - sum(counts)]:
            positions[row, start : start + count] = torch.arange(count)
            labels[row, start : start + 1] = -100
            start += count
        labels[row, sum(counts) :] = -100
    labels[:, ::5] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "documents": lengths}


def alone(made: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The summed loss of plain transformers, called with one document at a time."""
    made.set_attn_implementation("eager")
    total = torch.zeros(())
    for ids, labels, lengths in zip(
        batch["input_ids"], batch["labels"], batch["documents"].tolist(), strict=True
    ):
        start = 0
        for count in filter(None, lengths):
            part = slice(start, start + count)
            logits = made(input_ids=ids[None, part]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits.float(), labels[part][1:], ignore_index=-100, reduction="sum"
            )
            start += count
    return total
