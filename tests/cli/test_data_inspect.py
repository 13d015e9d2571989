"""`stoker data inspect`: the rows that training reads, with and without colours, and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stoker import config as configs
from stoker import recipes
from stoker.cli.verbs import data
from stoker.data import sources
from stoker.errors import BadInput
from stoker.language import adapters, building
from stoker.language import data as language_data
from stoker.run import journal
from stoker.run.directory import RunDirectory

import families

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = ("model=tiny", "vocab_size=320", "sequence_length=96")


@pytest.fixture
def chat(write_file: Callable[[str, Sequence[str]], Path]) -> tuple[str, ...]:
    """Conversations, of which some are too long for their answer, and a template for them."""
    template = write_file("template.jinja", [CHATML])
    lines = [
        json.dumps({
            "messages": [
                {"role": "user", "content": f"how much is {n} " + "and one " * (60 * (n % 8 == 0))},
                {"role": "assistant", "content": f"it is {n}"},
            ]
        })
        for n in range(80)
    ]  # fmt: skip
    return (*SMALL, f"data={write_file('chat.jsonl', lines)}", f"chat_template={template}")


@pytest.fixture
def texts(write_file: Callable[[str, Sequence[str]], Path]) -> Path:
    lines = [json.dumps({"text": f"text {n} " + "word é " * (n % 40)}) for n in range(200)]
    return write_file("texts.jsonl", lines)


def inspected(capsys: pytest.CaptureFixture[str], *given: str, samples: int = 1) -> dict[str, Any]:
    data.inspect(list(given), samples=samples, json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def shown(monkeypatch: pytest.MonkeyPatch, *given: str, **console: Any) -> str:
    out = Console(file=io.StringIO(), highlight=False, **console)
    monkeypatch.setattr(data, "console", lambda: out)
    data.inspect(list(given), samples=1)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_what_is_learnt_of_a_conversation_is_shown_and_counted(
    chat: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = inspected(capsys, *chat, samples=3)
    (source,) = answer["sources"]
    numbers = source["splits"]["train"]
    assert len(source["samples"]) == 3
    for sample in source["samples"]:
        for document in sample["documents"]:
            learnt = "".join(token["text"] for token in document if token["learnt"])
            masked = "".join(token["text"] for token in document if not token["learnt"])
            assert learnt.startswith("it is ")
            assert learnt.endswith("<|im_end|>")
            assert masked.startswith("<|im_start|>user\nhow much is ")
        assert sum(map(len, sample["documents"])) + sample["padding"] == 96
    assert numbers["dropped"] == numbers["longer"] > 3
    assert numbers["unfound"] == 0
    assert numbers["documents"] == sum(count for _, _, count in numbers["histogram"])
    assert numbers["quantiles"]["1"] > 96 > numbers["quantiles"]["0.5"]
    assert answer["epoch"]["rows"] == numbers["rows"]
    assert answer["epoch"]["learnt"] == pytest.approx(numbers["learnt"], abs=1)


def test_turns_that_are_not_found_are_counted(
    chat: tuple[str, ...],
    write_file: Callable[[str, Sequence[str]], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An earlier turn that was not the end, and whose words decide what stands before it."""
    marked = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ '!' if m.content == 'no' }}")
    template = write_file("marked.jinja", [marked.replace("{% endif %}", "{% else %}the end{% endif %}")])
    said = [("user", "is it 1"), ("assistant", "no"), ("user", "is it 2"), ("assistant", "it is")]
    record = json.dumps({"messages": [{"role": role, "content": content} for role, content in said]})
    name = next(value for value in chat if value.startswith("data=")).removeprefix("data=")
    Path(name).write_text(f"{Path(name).read_text()}{record}\n")
    given = (*chat[:-1], f"chat_template={template}", "sequence_length=128", "validation=0", "test=0")
    (source,) = inspected(capsys, *given)["sources"]
    numbers = source["splits"]["train"]
    assert (numbers["documents"], numbers["unfound"], numbers["unfound_turns"]) == (81, 0, 1)
    line = next(line for line in shown(monkeypatch, *given, width=100).splitlines() if "turns not" in line)
    assert line.split() == ["turns", "not", "found", "in", "others", "1"]


def test_masked_and_learnt_are_told_apart_without_colours(
    chat: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(monkeypatch, *chat, width=100)
    assert "\N{ESCAPE}" not in text
    assert "masked   <│|│im" in text.replace("i│m", "im")
    learnt = next(line for line in text.splitlines() if line.startswith("learnt   "))
    assert learnt.replace("│", "").startswith("learnt   it is ")
    assert "left out, no answer left" in text
    assert "left out, no turn found" in text
    assert "longer than a row" in text
    assert "steps of batch_size=8" in text


def test_tokens_are_told_apart_by_colours_on_a_terminal(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(
        monkeypatch, *SMALL, f"data={texts}", width=80, force_terminal=True, color_system="truecolor",
        no_color=False,
    )  # fmt: skip
    assert "│" not in text
    learnt, masked = "48;2;185;228;180", "48;2;228;228;228"
    assert learnt in text
    assert masked in text
    assert "<|endoftext|>" in text


def test_a_mixture_has_the_numbers_of_each_of_its_sources(
    chat: tuple[str, ...], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources_of_chat = next(value for value in chat if value.startswith("data=")).removeprefix("data=")
    given = [value for value in chat if not value.startswith("data=")]
    answer = inspected(capsys, *given, f"data={sources_of_chat}:1,{texts}:3")
    assert [(s["name"], s["weight"], s["share"]) for s in answer["sources"]] == [
        ("chat", 1.0, 0.25), ("texts", 3.0, 0.75),
    ]  # fmt: skip
    rows = [s["splits"]["train"]["rows"] for s in answer["sources"]]
    assert answer["epoch"]["rows"] == sum(rows)
    assert [round(s["passes"] * n) for s, n in zip(answer["sources"], rows, strict=True)] == [
        s["rows_per_epoch"] for s in answer["sources"]
    ]


def test_of_a_stream_it_is_said_how_much_was_looked_at(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = inspected(capsys, *SMALL, f"data={texts}", "streaming=true", "validation=0.2", "test=0.2")
    (source,) = answer["sources"]
    assert source["looked_at"] == {"parts": 1, "of": 1}
    assert source["left_out"] == []
    assert answer["epoch"]["estimated"]
    assert source["samples"][0]["documents"]


def test_records_of_which_nothing_can_be_learnt_are_counted_by_source(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with texts.open("a") as more:
        more.write('{"prompt": "a", "completion": " "}\n')
    (source,) = inspected(capsys, *SMALL, f"data={texts}")["sources"]
    assert source["left_out"] == [
        {"records": 1, "of": 201, "first": f"{texts}, line 201", "lacking": "no answer"}
    ]


def test_it_is_the_data_that_training_reads(
    chat: tuple[str, ...], capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    resolved = data._resolved([*chat], None, Path("runs"))
    config = resolved.config
    found = sources.read_all(config.data, validation=config.validation, test=config.test)
    language = building.build(
        config.model, tokenizer=None, vocab_size=config.vocab_size, sequence_length=config.sequence_length,
        documents=found[0].splits.train, chat_template=config.chat_template,
    )  # fmt: skip
    language_data.pack(found, language.tokenizer, sequence_length=96, packing=language.packs)
    before = sorted(cache.iterdir())
    inspected(capsys, *chat)
    assert sorted(cache.iterdir()) == before


def test_a_tokenizer_beside_the_adapter_to_go_on_from_is_the_one_that_training_uses(
    chat: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path, cache: Path
) -> None:
    model = families.save(tmp_path / "model", "llama")
    tokenizer = building.load_tokenizer(str(model))
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</turn>")
    tokenizer.save_pretrained(tmp_path / "adapter")
    given = [value for value in chat if value.startswith(("data=", "sequence_length="))]
    given += [f"model={model}", f"lora.adapter={tmp_path / 'adapter'}"]
    config = data._resolved(given, None, Path("runs")).config
    found = sources.read_all(config.data, validation=config.validation, test=config.test)
    language = building.build(
        config.model, tokenizer=adapters.tokenizer_for(config.tokenizer, config.lora),
        vocab_size=config.vocab_size, sequence_length=96, documents=[],
    )  # fmt: skip
    language_data.pack(found, language.tokenizer, sequence_length=96, packing=language.packs)
    before = sorted(cache.iterdir())
    answer = inspected(capsys, *given)
    assert sorted(cache.iterdir()) == before
    (document, *_) = answer["sources"][0]["samples"][0]["documents"]
    assert "".join(token["text"] for token in document).rstrip().endswith("</turn>")


@pytest.fixture
def run(texts: Path, tmp_path: Path) -> Path:
    """The folder of a run `a` on the texts, whose path is from where it was started."""
    recipe = recipes.load("llm")
    config = configs.resolve(recipe.config, [*SMALL, f"data={texts.name}", "batch_size=2"])
    directory = RunDirectory(tmp_path / "runs" / "llm" / "a")
    directory.create({
        "uid": "uid-of-a", "id": "a", "experiment": "llm", "cwd": str(texts.parent),
        "recipe": {"name": recipe.name, "reference": recipe.reference},
        "config": config.values, "sources": config.sources,
    })  # fmt: skip
    _, writer = journal.start_attempt(directory.journal)
    writer.append("attempt_started", pid=1, host="here")
    writer.close()
    return tmp_path / "runs"


def test_a_run_is_named_in_place_of_its_values(
    run: Path, texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    data.inspect(["a"], samples=0, runs=run, json=True)
    of_run = json.loads(capsys.readouterr().out)
    data.inspect([*SMALL, f"data={texts}", "batch_size=2"], samples=0, json=True)
    assert of_run == json.loads(capsys.readouterr().out)
    data.inspect(["a", "batch_size=4"], samples=0, runs=run, json=True)
    assert json.loads(capsys.readouterr().out)["epoch"]["batch_size"] == 4
    with pytest.raises(BadInput, match="leave one out"):
        data.inspect(["a"], config=texts, runs=run)


def test_what_cannot_be_trained_on_is_refused_alike(
    chat: tuple[str, ...], write_file: Callable[[str, Sequence[str]], Path]
) -> None:
    with pytest.raises(BadInput, match="has no chat template: give chat_template=chatml"):
        data.inspect([value for value in chat if not value.startswith("chat_template")])
    silent = write_file("silent.jsonl", [json.dumps({"messages": [{"content": "who says so"}]})])
    with pytest.raises(BadInput, match=r"line 1, message 1: has no 'role'; its fields are 'content'"):
        data.inspect([f"data={silent}"])
    with pytest.raises(BadInput, match="did you mean 'vocab_size'"):
        data.inspect(["vocabsize=3"])
    with pytest.raises(BadInput, match="no run 'nothing' under"):
        data.inspect(["nothing"])
