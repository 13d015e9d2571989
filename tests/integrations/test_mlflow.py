"""What MLflow loads of a registered language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stoker.integrations.mlflow import Generator
from stoker.language import merging
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import families

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model whose tokenizer begins every text."""
    folder = families.with_tokenizer(families.save(tmp_path / "base", "llama"))
    made = AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.chat_template = None
    made.save_pretrained(folder)
    return folder


def test_a_text_begins_as_those_of_training_and_once(base: Path) -> None:
    loaded = Generator(base)
    begun = loaded.tokenizer("one two")["input_ids"]
    assert begun[0] == loaded.tokenizer.bos_token_id
    assert loaded._encoded("one two")["input_ids"][0].tolist() == begun
    assert loaded._encoded("<s>one two")["input_ids"][0].tolist() == begun
    loaded.tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert loaded._encoded("one two")["input_ids"][0].tolist() == begun[1:]


def test_an_adapter_is_on_a_base_with_as_many_positions_as_it_was_trained_with(
    base: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.peft_config["default"].base_model_name_or_path = str(base)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    scaling = {"factor": 4.0, "type": "yarn"}
    (adapter / "base_model.json").write_text(json.dumps({"model": str(base), "rope_scaling": scaling}))
    loaded, asked = Generator(adapter).model, merging.on_its_base(adapter).eval()
    assert loaded.config.rope_parameters["factor"] == 4.0
    ids = torch.arange(2, 9)[None]
    assert torch.equal(loaded(ids).logits, asked(ids).logits)
