"""Chat templates by name, of another model, of a file: what they write, what is learnt, what is exported."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from stoker.cli.verbs import generate
from stoker.data import sources
from stoker.data import tokenizer as tokenizers
from stoker.data.documents import Document, Message
from stoker.errors import BadInput
from stoker.language import building, chat_template, conversation, data, hub, speaking
from stoker.language.conversation import Chat
from stoker.language.encoder import Encoder
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import families
import hub_server
from commands import Point

SAID = (
    Message("system", "Be brief."), Message("user", "what is one "), Message("assistant", "it is 1"),
    Message("user", "and two"), Message("assistant", "it is 2"),
)  # fmt: skip
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
WRITTEN = {
    "chatml": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat is one <|im_end|>\n"
        "<|im_start|>assistant\nit is 1<|im_end|>\n<|im_start|>user\nand two<|im_end|>\n"
        "<|im_start|>assistant\nit is 2<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is one<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nit is 1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nand two<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nit is 2<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nwhat is one<end_of_turn>\n"
        "<start_of_turn>model\nit is 1<end_of_turn>\n<start_of_turn>user\nand two<end_of_turn>\n"
        "<start_of_turn>model\nit is 2<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nwhat is one [/INST] it is 1</s>[INST] and two[/INST] it is 2</s>",
        "",
    ),
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nwhat is one \n\n### Response:\nit is 1</s>"
        "\n\n### Instruction:\nand two\n\n### Response:\nit is 2</s>",
        "",
    ),
}  # fmt: skip
"""The whole of SAID, and what follows where an answer is asked for."""
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>",
        "alpaca": "</s>"}  # fmt: skip
TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}


@pytest.fixture(scope="module")
def bare() -> Any:
    """A tokenizer that begins every text with <s> and ends texts with </s>, as Llama 2 does."""
    trained = tokenizers.train_tokenizer(["what is one and two it is the number"] * 3, 320)
    made = tokenizers.as_transformers(trained, max_length=512)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def with_template(bare: Any, name: str) -> Any:
    made = copy.deepcopy(bare)
    made.chat_template = chat_template.of(name, made)
    return made


def test_what_there_is_by_name_is_all_that_ships() -> None:
    assert {file.stem for file in chat_template._FOLDER.iterdir()} == set(chat_template.NAMES) == set(WRITTEN)


@pytest.mark.parametrize("name", chat_template.NAMES)
def test_a_named_template_writes_what_its_models_are_given_and_what_the_assistant_says_is_learnt(
    bare: Any, name: str
) -> None:
    tokenizer = with_template(bare, name)
    whole, asks = WRITTEN[name]
    chat = Chat(SAID)
    text = conversation.render(tokenizer, chat)
    assert text == whole
    before = conversation.render(tokenizer, chat.until(4))
    assert conversation.render(tokenizer, chat.until(4), to_be_answered=True) == before + asks
    assert whole.startswith(before + asks)
    end, space = ENDS[name], " " * (name == "mistral")
    expected = [f"{space}it is 1{end}", f"{space}it is 2{end}"]
    assert [text[a:b] for a, b in conversation.answers(tokenizer, chat, text).spans] == expected
    assert [text[a:b] for a, b in conversation.answers(tokenizer, chat, text, last=True).spans] == expected[
        1:
    ]


@pytest.mark.parametrize("name", chat_template.NAMES)
def test_a_tokenizer_that_begins_texts_with_nothing_has_a_template_that_does_not_either(name: str) -> None:
    trained = tokenizers.train_tokenizer(["what is one and two it is the number"] * 3, 320)
    tokenizer = with_template(tokenizers.as_transformers(trained, max_length=256), name)
    text = conversation.render(tokenizer, Chat(SAID))
    assert text == WRITTEN[name][0].removeprefix("<s>").replace("</s>", tokenizer.eos_token)


def test_alpaca_without_a_system_prompt_has_its_own(bare: Any) -> None:
    text = conversation.render(with_template(bare, "alpaca"), Chat(SAID[1:3]))
    assert text == f"<s>{ALPACA}\n\n### Instruction:\nwhat is one \n\n### Response:\nit is 1</s>"


@pytest.mark.parametrize(("name", "role"), [("gemma", "user"), ("mistral", "user"), ("alpaca", "critic")])
def test_a_named_template_refuses_what_its_models_have_not_seen(bare: Any, name: str, role: str) -> None:
    with pytest.raises(
        BadInput, match=f"the chat template refuses a conversation with the roles user, {role}"
    ):
        conversation.render(with_template(bare, name), Chat((Message("user", "a"), Message(role, "b"))))


@pytest.mark.parametrize("name", chat_template.NAMES)
def test_a_tokenizer_that_lacks_what_ends_turns_is_answered_with_the_tokens_to_add(
    bare: Any, name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    documents = [Document("k", "", "", SAID)]
    found = [sources.Source("a", 1.0, sources.Splits(documents, [], []), "f", "d")]
    tokenizer = with_template(bare, name)
    with caplog.at_level("WARNING", "stoker"):
        data.pack(found, tokenizer, sequence_length=256)
    meant = f"Make it one with 'add_tokens={json.dumps(TOKENS.get(name))}', or use a chat_template"
    assert (meant in caplog.text) == (name in TOKENS)
    caplog.clear()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS.get(name, [])})
    with caplog.at_level("WARNING", "stoker"):
        data.pack(found, tokenizer, sequence_length=256)
    assert "chat template" not in caplog.text
    assert conversation.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(ENDS[name])


def test_a_template_of_another_model_is_its_tokenizer_s(bare: Any, tmp_path: Path) -> None:
    with_template(bare, "gemma").save_pretrained(tmp_path / "theirs")
    assert chat_template.read(str(tmp_path / "theirs")) == with_template(bare, "gemma").chat_template
    bare.save_pretrained(tmp_path / "none")
    with pytest.raises(BadInput, match="its tokenizer has no chat template: give chat_template=chatml"):
        chat_template.read(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="its tokenizer cannot be loaded"):
        chat_template.read(str(tmp_path / "empty"))


def test_a_template_of_the_hub_is_brought_without_the_weights(
    bare: Any, tmp_path: Path, point_at: Point
) -> None:
    with_template(bare, "gemma").save_pretrained(tmp_path / "theirs")
    with hub_server.serving() as served:
        served.models["org/one"] = {f.name: f.read_bytes() for f in (tmp_path / "theirs").iterdir()}
        served.models["org/one"]["model.safetensors"] = b"w"
        point_at(served.url)
        assert chat_template.read("org/one@main") == with_template(bare, "gemma").chat_template
        assert not list(hub.find("org/one@main", weights=False).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "chatmll",
            "is neither a local file nor a known name; did you mean 'chatml'.*give chat_template=chatml .or",
        ),
        ("mine.jinja", "mine.jinja cannot be read: .*No such file"),
        ("their/mine.jinja", "mine.jinja cannot be read: .*No such file"),
        ("org/one", "chat_template org/one is not a local directory"),
        ("{% for m in messages %}" + 300 * "{{ m.content }}", "save it as FILE.jinja"),
    ],
)
def test_what_is_no_template_is_answered_with_what_there_is(given: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        chat_template.read(given)


def test_a_base_model_is_trained_on_conversations_by_a_name_and_exported_asked_and_gone_on_with(
    stoker: Callable[..., Any], tmp_path: Path, write_file: Callable[..., Path]
) -> None:
    model = families.save(tmp_path / "base", "llama")
    chats = [
        [{"role": "user", "content": f"who? {n}"}, {"role": "assistant", "content": "me"}] for n in range(20)
    ]
    write_file("chat.jsonl", [json.dumps({"messages": chat}) for chat in chats])
    common = ("train", "llm", f"model={model}", "data=chat.jsonl", "sequence_length=64", "batch_size=2",
              "generate_tokens=0", "max_steps=1", "validation=0", "test=0")  # fmt: skip
    refused = stoker(*common)
    assert refused.code == 2
    assert "give chat_template=chatml (or llama3, gemma, mistral, alpaca; a model or folder" in refused.err
    new = (*common, "chat_template=chatml", f"add_tokens={json.dumps(TOKENS['chatml'])}")
    assert stoker("data", "inspect", *new[2:], "--json").code == 0
    done = stoker(*new, "--name", "a")
    assert done.code == 0, done.err
    assert "chat template ends" not in done.err
    made = tmp_path / "runs" / "llm" / "a" / "artifacts" / "model"
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.chat_template == chat_template.of("chatml", building.load_tokenizer(str(model)))
    resumed = stoker("resume", "a", "max_steps=2")
    assert resumed.code == 0, resumed.err
    asked = stoker("generate", "a", "--prompt", "who?", "--max-tokens", "2", "--system", "Be brief.")
    assert asked.code == 0, asked.err
    again = stoker(*common, f"chat_template={made}", "--name", "b")
    assert again.code == 0, again.err


ASKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""What asks for an answer says whether to think, as Qwen 3's does."""
STYLED = (
    "{% for m in messages %}{{ style | default('plain') }} {{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}"
    "{% endfor %}"
)


def styled(bare: Any, template: str = STYLED) -> Any:
    made = copy.deepcopy(bare)
    made.chat_template = template
    return made


def read(tmp_path: Path, *lines: dict[str, Any], **how: Any) -> list[sources.Source]:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sources.read_all(str(file), validation=0, test=0, **how)


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("record", [CHAT, {"prompt": "a", "completion": "b"}])
def test_what_a_template_is_given_is_the_record_s_own_else_the_config_s(
    bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], streaming: bool
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    own = ({}, {"chat_template_kwargs": {"style": "curt"}}, {"chat_template_kwargs": '{"style": "long"}'})
    for _ in range(2):  # of what is kept, too
        (found,) = read(tmp_path, *({**record, **each} for each in own), streaming=streaming)
        tokenizer = styled(bare)
        documents = found.splits.train
        for values, default in (({}, "plain"), ({"style": "old"}, "old")):
            made = Encoder(tokenizer, "answer", values)(documents)
            texts = [tokenizer.decode(encoded.ids) for encoded in made]
            expected = [f"{style} user: a\n{style} assistant: b</s>" for style in (default, "curt", "long")]
            assert texts == expected


def test_what_a_template_is_given_is_part_of_what_is_kept_and_without_it_nothing_is_another(
    bare: Any, tmp_path: Path
) -> None:
    tokenizer = styled(bare)
    plain = Encoder(tokenizer, "answer").fingerprint
    assert Encoder(tokenizer, "answer", {}).fingerprint == plain
    both = {Encoder(tokenizer, "answer", {"style": style}).fingerprint for style in ("old", "new")}
    assert len(both | {plain}) == 3
    own = [read(tmp_path, {**CHAT, "chat_template_kwargs": {"style": s}})[0].fingerprint for s in ("a", "b")]
    assert own[0] != own[1]


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "on {{ date_string }}: " + STYLED
)
"""As Llama 3's."""


@pytest.mark.parametrize("template", [DATED, re.sub(r"{% (end)?generation %}", "", DATED)])
def test_the_date_that_a_template_writes_is_the_same_on_every_day(
    bare: Any, tmp_path: Path, template: str
) -> None:
    """The tokens of a run that is resumed tomorrow, without the cache, are those of today."""
    tokenizer = styled(bare, template)
    (found,) = read(tmp_path, CHAT, {**CHAT, "chat_template_kwargs": {"date_string": "1 May"}})
    made = list(Encoder(tokenizer, "answer")(found.splits.train))
    expected = [f"on {date}: plain user: a\nplain assistant: b</s>" for date in ("26 Jul 2024", "1 May")]
    assert [tokenizer.decode(one.ids) for one in made] == expected
    for one in made:
        assert tokenizer.decode(np.array(one.ids)[np.array(one.has_loss)]).endswith("b</s>")
    assert data.prompts([], tokenizer, ["a"])[0].startswith("on 26 Jul 2024")


def test_prompts_are_asked_with_what_the_template_is_given(bare: Any, tmp_path: Path) -> None:
    tokenizer = styled(bare, ASKS)
    silent, thinking = {"enable_thinking": False}, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    quiet = f"{thinking}<think>\n\n</think>\n\n"
    assert data.prompts([], tokenizer, ["a"]) == (thinking,)
    assert data.prompts([], tokenizer, ["a"], values=silent) == (quiet,)
    (found,) = read(tmp_path, CHAT, {**CHAT, "chat_template_kwargs": {"enable_thinking": True}})
    for document, expected in zip(found.splits.train, (quiet, thinking), strict=True):
        held_out = sources.Source("a", 1.0, sources.Splits([], [document], []), "f", "d")
        assert data.prompts([held_out], tokenizer, values=silent) == (expected,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1], "a.jsonl, line 1: 'chat_template_kwargs' must be an object such as"),
        (
            {"tools": []},
            "a.jsonl, line 1: chat_template_kwargs: 'tools' cannot be passed to the chat template",
        ),
        ("{style", "a.jsonl, line 1: 'chat_template_kwargs' must be JSON"),
    ],
)
def test_what_no_template_can_be_given_is_refused(given: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        read(tmp_path, {**CHAT, "chat_template_kwargs": given})


def test_what_transformers_itself_takes_is_refused_of_a_config_and_of_a_command(
    stoker: Callable[..., Any], tmp_path: Path
) -> None:
    done = stoker("train", "llm", "chat_template_kwargs={tokenize: true}")
    assert done.code == 2
    assert "chat_template_kwargs: 'tokenize' cannot be passed" in done.err
    for given, said in (("tokenize=true", "'tokenize' cannot be passed"), ("quiet", "write KEY=VALUE")):
        done = stoker("generate", str(tmp_path), "--template-value", given)
        assert done.code == 2
        assert said in done.err


def test_a_run_is_asked_with_what_it_was_trained_with_unless_something_else_is_said(
    stoker: Callable[..., Any],
    tmp_path: Path,
    write_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = families.save(tmp_path / "base", "llama")
    write_file("mine.jinja", [STYLED])
    write_file("chat.jsonl", [json.dumps(CHAT | {"id": n}) for n in range(8)])
    done = stoker(
        "train", "llm", f"model={model}", "data=chat.jsonl", "sequence_length=64", "batch_size=2",
        "max_steps=1", "generate_tokens=1", "validation=0", "test=0", "chat_template=mine.jinja",
        'prompts=["a"]', "chat_template_kwargs={style: curt}", "--name", "a",
    )  # fmt: skip
    assert done.code == 0, done.err
    tables = tmp_path / "runs" / "llm" / "a" / "artifacts" / "tables" / "generations"
    (row,) = pq.read_table(tables / "step-00000001.parquet").to_pylist()
    assert row["prompt"] == "curt user: a\n"

    asked: list[str] = []
    answer = {"text": "", "tokens": 0, "tokens_per_second": 0.0}
    monkeypatch.setattr(speaking.Speaker, "answer", lambda self, text, **how: asked.append(text) or answer)
    monkeypatch.chdir(tmp_path)
    generate.generate("a", ["a"], json=True)
    generate.generate("a", ["a"], template_value=["style=long", "n=1"], json=True)
    assert asked == ["curt user: a\n", "long user: a\n"]
