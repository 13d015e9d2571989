"""Model cards: what they say of a run, and that it is what the run's journal says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image
from stoker import storage
from stoker.report import card
from stoker.run import journal, view
from stoker.run.directory import RunDirectory
from stoker.run.state import AttemptView, RunView


def _run(folder: Path) -> RunView:
    directory = RunDirectory(folder / "runs" / "llm" / "a")
    directory.create({
        "uid": "u", "id": "a", "experiment": "llm", "seed": 7, "recipe": {"name": "llm"},
        "config": {
            "model": "org/base", "data": "org/chats@v1#main/train[:20%]:3,mine.jsonl:1,org/chats:1",
            "lr": 0.1, "test": 0.05, "validation": 0.1,
        },
        "sources": {"lr": "command line"}, "command": ["/x/stoker", "train", "llm", "lr=0.1"],
    })  # fmt: skip
    directory.provenance.mkdir(exist_ok=True)
    (directory.provenance / "requirements.txt").write_text("torch==2.13.0+cpu\ntransformers==5.23.0\n")
    (directory.provenance / "code.json").write_text(
        '{"commit": "c0ffee", "dirty": true, "remote": "git@x:y"}'
    )
    _, writer = journal.start_attempt(directory.journal)
    writer.append("attempt_started", pid=1, host="here")
    writer.append("data", sources=["org/chats, 9 documents"], rows=4, tokens_per_row=31.5)
    for step in range(1, 41):
        writer.append("metrics", step=step, values={"loss": 4.0 / step, "val_loss": 5.0 / step})
    writer.append("peak", flops=989e12, source="data sheet of H100")
    writer.append("metrics", step=40, values={"test_perplexity": 12.5, "base_test_perplexity": 99.0})
    writer.append("metrics", step=40, values={"tokens_per_second": 1234.0, "mfu": 0.412})
    writer.append("tags", tags={"fingerprint.data": "d474"})
    writer.append("attempt_ended", status="finished")
    writer.close()
    return view.load(directory)


def test_a_card_says_what_was_evaluated_on(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.attempts[-1].data["validation_data"] = ["held.jsonl, 4 documents", "org/held, 2 documents"]
    run.tags["fingerprint.validation_data"] = "e5"
    about = card.About(name="org/tuned", kind="model", step=40, base="", task="text-generation", chat=False)
    (tmp_path / "out").mkdir()
    card.write(run, tmp_path / "out", about)
    text = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "- held out: 5% of the documents for testing\n", "- for validation: held.jsonl, 4 documents\n",
        "- for validation: org/held, 2 documents\n", "- fingerprint of the data for validation: `e5`\n",
    ):  # fmt: skip
        assert said in text, said


def test_a_card_says_what_it_is_how_good_and_how_to_load_and_make_it_again(tmp_path: Path) -> None:
    about = card.About(
        name="org/tuned", kind="adapter", step=40, base="org/base", task="text-generation", chat=True
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    card.write(_run(tmp_path), tmp_path / "out", about)
    text = (tmp_path / "out" / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": "org/base", "base_model_relation": "adapter", "datasets": ["org/chats"],
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["stoker", "lora"],
    }  # fmt: skip
    for said in (
        "# tuned", "A LoRA adapter for `org/base`", "| perplexity on the test documents | 12.5 |",
        "| perplexity on the test documents before training | 99 |",
        'AutoPeftModelForCausalLM.from_pretrained("org/tuned")',
        "apply_chat_template", "- org/chats, 9 documents", "- 4 rows of 31.5 tokens on average",
        "- held out: 10% of the documents for validation, 5% for testing", "content: `d474`",
        "| tokens per second | 1,234 |", "utilisation | 41.2% of 989 TFLOP/s (data sheet of H100) |",
        "| `lr` | `0.1` |", "git clone git@x:y", "git checkout c0ffee  # then apply",
        "pip install torch==2.13.0 transformers==5.23.0",
        "stoker train llm lr=0.1", "The seed is 7.", "| 40 | 0.125 |", "![Training and validation loss",
    ):  # fmt: skip
        assert said in body, said
    rows = [line for line in body.splitlines() if line.startswith("| ") and line.count("|") == 3]
    assert len([line for line in rows if line.split("|")[1].strip().isdigit()]) == 12, (
        "evaluations, thinned out"
    )
    with Image.open(tmp_path / "out" / card.PICTURE) as picture:
        assert picture.size == (900, 420)
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 10, "something is drawn"


@pytest.mark.parametrize("where", ["where the run was started", "here", "gone since"])
def test_a_local_folder_is_no_link_to_the_hub(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path)
    run.record["cwd"] = str(tmp_path / "where the run was started")
    run.record["config"]["data"] = "org/chats:1,org/others"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if where == "gone since":
        record = {name: {"path": name, "absolute": f"/gone/{name}"} for name in ("org/base", "org/chats")}
        storage.write_json(run.directory.provenance / "data.json", record)
    else:
        (tmp_path / where / "org/base").mkdir(parents=True)
        (tmp_path / where / "org/chats").write_text("")
    about = card.About(name="x", kind="model", step=40, base="org/base", task="text-generation")
    metadata = yaml.safe_load(card.text(run, about, picture=False).split("---\n")[1])
    assert metadata["datasets"] == ["org/others"]
    assert not metadata.keys() & {"base_model", "base_model_relation"}


def test_a_card_of_a_checkpoint_says_what_was_measured_by_then(tmp_path: Path) -> None:
    about = card.About(
        name="s3://bucket/tuned", kind="adapter", step=1, task="text-generation", metrics={"val_loss": 3.25}
    )
    text = card.text(_run(tmp_path), about, picture=False)
    assert "| validation loss | 3.25 |" in text
    assert "12.5" not in text, "the test was one of the final weights"
    assert "1 step." in text
    assert "| steps | 1 |" in text
    assert "# after copying s3://bucket/tuned to ./tuned" in text
    assert 'from_pretrained("./tuned")' in text


def test_a_card_promises_bit_identity_only_of_one_config_on_devices_that_add_in_order(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.record["recipe"]["reference"] = "llm"

    def said(step: int = 40) -> str:
        about = card.About(name="x", kind="model", step=step)
        return card.text(run, about, picture=False).partition("## How to reproduce it")[2]

    assert "give a bit-identical result" in said()
    assert "`stoker reproduce llm/a` repeats it" in said()
    run.attempts[0].layout["device"] = "H100"
    storage.write_json(run.directory.provenance / "environment.json", {"gpus": ["H100, 80 GiB"]})
    assert "bit-identical" not in said()
    run.record["config"]["deterministic"] = True
    assert "give a bit-identical result" in said()
    run.attempts.append(AttemptView(2, 9.0, began=9.0, resumed_from=30, drift={"lr": [0.1, 0.2]}))
    assert "give a bit-identical result" in said(step=30), "a checkpoint from before the change"
    assert "bit-identical" not in said()
    for line in (
        "train llm lr=0.1 --name a-again  # up to step 30",
        "resume a-again lr=0.2  # from step 31 on",
    ):
        assert f"stoker {line}\n" in said(), line


def test_a_card_of_what_is_no_language_model_says_only_what_is_known(tmp_path: Path) -> None:
    about = card.About(name="s3://bucket/cnn", kind="model", step=40)
    text = card.text(_run(tmp_path), about, picture=False)
    assert "# cnn" in text
    assert "load_file" in text
    assert "AutoModel" not in text
    assert "curves.png" not in text
