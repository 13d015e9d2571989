"""A model that is asked: how a prompt is put, and where what it says ends."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from stoker.data import tokenizer as tokenizers
from stoker.errors import BadInput
from stoker.language import building, merging, speaking
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import families
from support import LONG

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
END_OF_TEXT, LEFT = 0, 7  # what the tokenizer ends texts with, and what the model's own config names


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers `me<|im_end|>` and would go on with `me<|im_end|>me...`; it has no template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.as_transformers(tokenizers.train_tokenizer(["me"] * 3, 300), max_length=256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made = families.model("llama", vocab_size=len(tokenizer))
    says_next(made, dict(zip(*chain(tokenizer, "\nme<|im_end|>me"), strict=True)))
    made.generation_config.eos_token_id = [END_OF_TEXT, LEFT]
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chain(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    ids = tokenizer(text)["input_ids"]
    return ids[:-1], ids[1:]


@torch.no_grad()
def says_next(model: Any, following: dict[int, int]) -> None:
    """Have it say after each of these tokens the one that belongs to it, whatever came before."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1)
    model.lm_head.weight.zero_()
    for token, after in following.items():
        embedded = model.model.embed_tokens.weight[token]
        model.lm_head.weight[after] += 10 * embedded / embedded.norm()


WHO = [{"role": "user", "content": "who?"}]


@pytest.fixture
def template(write_file: Callable[..., Path]) -> Path:
    return write_file("chatml.jinja", [CHATML])


def ends(folder: Path) -> Any:
    return GenerationConfig.from_pretrained(folder).eos_token_id


def test_what_is_generated_ends_where_a_turn_of_the_template_does_also_for_who_loads_the_export(
    model: Path, template: Path, stoker: Callable[..., Any], tmp_path: Path, write_file: Callable[..., Path]
) -> None:
    chats = [
        [{"role": "user", "content": f"who? {n}"}, {"role": "assistant", "content": "me"}] for n in range(20)
    ]
    data = write_file("chat.jsonl", [json.dumps({"messages": chat}) for chat in chats])
    done = stoker(
        "train", "llm", f"model={model}", f"data={data}", f"chat_template={template}", 'prompts=["who?"]',
        "sequence_length=64", "batch_size=2", "max_steps=1", "lr=1e-30", "generate_tokens=8", "--name", "a",
    )  # fmt: skip
    assert done.code == 0, done.err
    made = tmp_path / "runs" / "llm" / "a" / "artifacts"
    for table in ("step-00000000", "step-00000001"):
        (row,) = pq.read_table(made / "tables" / "generations" / f"{table}.parquet").to_pylist()
        assert row == {"prompt": ASKED, "completion": "me"}

    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends(made / "model") == [END_OF_TEXT, turn, LEFT]
    asked = tokenizer(ASKED, return_tensors="pt", return_token_type_ids=False)
    said = AutoModelForCausalLM.from_pretrained(made / "model").generate(**asked, max_new_tokens=8)
    assert tokenizer.decode(said[0]) == f"{ASKED}me<|im_end|>"
    speaker = speaking.load(made / "model")
    answer = speaker.answer(speaker.ask(WHO), rendered=True, max_tokens=8)
    assert (answer["text"], answer["tokens"]) == ("me", 2)


@pytest.mark.filterwarnings("ignore")  # peft, as a user makes an adapter with it, has its own
def test_an_adapter_says_no_more_than_its_own_template_s_turn_and_neither_does_it_merged(
    model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(model))
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(adapter)
    assert (
        speaking.load(adapter).tokenizer.get_vocab() == speaking.load(model).tokenizer.get_vocab()
    )  # its base's
    tokenizer = building.load_tokenizer(str(model))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(adapter)
    speaker = speaking.load(adapter)
    assert speaker.answer(speaker.ask(WHO), rendered=True, max_tokens=8)["text"] == "me"
    merging.merge(adapter, tmp_path / "merged")
    assert ends(tmp_path / "merged") == speaker.stops == [
        END_OF_TEXT, tokenizer.convert_tokens_to_ids("<|im_end|>"), LEFT
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", None, "cannot be loaded"),
        ("model.safetensors", "cut off", "cannot be loaded"),
        ("config.json", None, "contains no language model"),
        ("config.json", "{", "cannot be read"),
    ],
)
def test_a_directory_that_is_damaged_is_refused(
    file: str, content: str | None, said: str, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    if content is not None:
        (tmp_path / "model" / file).write_text(content)
    with pytest.raises(BadInput, match=said):
        speaking.load(tmp_path / "model")


def test_a_text_is_continued_though_the_tokenizer_ends_texts(model: Path, tmp_path: Path) -> None:
    """As one with add_eos_token=true does, after which another text would begin."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    assert tokenizer("\n")["input_ids"][-1] == tokenizer.eos_token_id
    plain, again = speaking.load(model), speaking.load(folder)
    said = plain.answer("\n", max_tokens=1)["text"]
    assert again.answer("\n", max_tokens=1)["text"] == said
    after_the_end = plain.answer(f"\n{end}", max_tokens=1)["text"]
    assert again.answer(f"\n{end}", max_tokens=1)["text"] == after_the_end != said


def test_a_whole_model_has_no_base(model: Path) -> None:
    with pytest.raises(BadInput, match="--base is for adapters"):
        speaking.load(model, str(model))


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        (None, [END_OF_TEXT]),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", [END_OF_TEXT]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", [END_OF_TEXT]),
        ("{{ raise_exception('not like this') }}", [END_OF_TEXT]),
        (CHATML, [END_OF_TEXT, "<|im_end|>"]),
    ],
)
def test_a_turn_ends_with_the_special_token_that_the_template_writes_if_it_writes_one(
    model: Path, template: str | None, stops: list[Any]
) -> None:
    tokenizer = building.load_tokenizer(str(model))
    tokenizer.chat_template = template
    expected = [tokenizer.convert_tokens_to_ids(s) if isinstance(s, str) else s for s in stops]
    assert building.stop_tokens(tokenizer, GenerationConfig()) == expected
    assert building.stop_tokens(tokenizer, GenerationConfig(eos_token_id=LEFT)) == [*expected, LEFT]


def test_on_a_terminal_a_conversation_goes_on_until_it_is_begun_anew_or_full(
    model: Path, template: Path, tmp_path: Path
) -> None:
    """What the model is given is told by how many positions it has taken: of these it has 256."""
    folder = tmp_path / "chat"
    shutil.copytree(model, folder)
    tokenizer = building.load_tokenizer(str(folder))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    mine, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "stoker", "generate", str(folder), "--system", "be me"],
        stdin=other, stdout=other, stderr=other, cwd=tmp_path, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(other)
    seen = ""

    def until(text: str, after: int) -> int:
        nonlocal seen
        limit = time.monotonic() + LONG
        while text not in seen[after:]:
            assert time.monotonic() < limit, seen
            if select.select([mine], [], [], 1)[0]:
                seen += os.read(mine, 4096).decode()
        return seen.index(text, after) + len(text)

    at = until("> ", until("/new starts a new conversation, Ctrl-D ends", 0))
    for line, answer in (("who?", "me"), ("who? " * 30, "me"), ("x" * 150, "starting a new conversation"),
                         ("who?", "me"), ("/new", "> "), ("x" * 150, "me")):  # fmt: skip
        os.write(mine, f"{line}\n".encode())
        at = until(answer, until(line[-5:], at))
        at = at if answer == "> " else until("> ", at)
    os.write(mine, b"\x04")
    assert process.wait(LONG) == 0
    os.close(mine)
    assert "256 positions: shorten it; starting a new conversation" in seen
