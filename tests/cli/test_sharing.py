"""What a run made, shared and asked: pushed to a hub, a store, a folder; loaded by transformers and peft."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from stoker import exports
from stoker.errors import BadInput
from stoker.language import hub, merging, speaking
from transformers import AutoModelForCausalLM

import hub_server
from hub_server import Hub
from servers import Proxy

COMMON = ("vocab_size=300", "sequence_length=64", "batch_size=2", "generate_tokens=2", "test=0.1")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, `base` and, an adapter on what that one made, `tuned`."""
    folder = tmp_path_factory.mktemp("here")
    pairs = [{"prompt": f"What is {i}?", "completion": f"It is the number {i}."} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture
def trained(here: Path, stoker: Callable[..., Any]) -> Path:
    if not (here / "runs").exists():
        data = ("train", "llm", "data=pairs.jsonl", *COMMON)
        assert stoker(*data, "model=tiny", "max_steps=3", "--name", "base", cwd=here).code == 0
        model = "model=runs/llm/base/artifacts/model"
        done = stoker(
            *data, model, "lora.rank=4", "lr=0.05", "max_steps=6", "eval_every=3", "checkpoint_every=3",
            "--name", "tuned", cwd=here,
        )  # fmt: skip
        assert done.code == 0, done.err
    return here


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.serving() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield made


LOADED_BY_OTHERS = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("org/tuned")
asked = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is 7?"}], add_generation_prompt=True, return_tensors="pt",
    return_dict=True,
)
models = [
    AutoPeftModelForCausalLM.from_pretrained("org/tuned"),
    AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    AutoModelForCausalLM.from_pretrained("org/base"),
]
with torch.no_grad():
    tuned, merged, base = [model.eval()(**asked).logits for model in models]
    said = models[0].generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1]:]
print(json.dumps({
    "merged": float((tuned - merged).abs().max()), "base": float((tuned - base).abs().max()),
    "text": tokenizer.decode(asked["input_ids"][0]), "said": tokenizer.decode(said, skip_special_tokens=True),
}))
"""


def test_what_is_pushed_to_the_hub_loads_with_plain_transformers_and_peft(
    trained: Path, hf: Hub, stoker: Callable[..., Any], tmp_path: Path
) -> None:
    assert stoker("models", "push", "base", "hub:org/base", "--public", cwd=trained).code == 0
    assert stoker("models", "push", "tuned", "hub:org/tuned", "--base", "org/base", cwd=trained).code == 0
    assert hf.private == {"org/tuned"}
    assert json.loads(hf.models["org/tuned"]["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    card = hf.models["org/tuned"]["README.md"].decode()
    assert "base_model: org/base" in card
    assert "base_model_relation: adapter" in card

    adapter = trained / "runs" / "llm" / "tuned" / "artifacts" / "adapter"
    assert not (adapter / "README.md").exists(), "peft's own is a form that nobody has filled in"
    merging.merge(adapter, tmp_path / "merged")
    loaded = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED_BY_OTHERS, str(tmp_path / "merged")],
        env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    found = json.loads(loaded.stdout.splitlines()[-1])
    assert found["merged"] < 1e-4
    assert found["base"] > 0.1
    assert found["text"] == "### Question\nWhat is 7?\n\n### Answer\n"
    speaker = speaking.load(adapter)
    text = speaker.ask([{"role": "user", "content": "What is 7?"}])
    assert speaker.answer(text, max_tokens=8)["text"] == found["said"]

    done = stoker("models", "push", "tuned", "hub:org/tuned", "--merge", "--json", cwd=trained)
    assert done.code == 0, done.err
    assert {"model.safetensors", "tokenizer.json", "README.md", "curves.png"} <= set(done.answer["files"])
    assert set(done.answer["files"]) == set(hf.models["org/tuned"]), "it is a model now, and no adapter"


def test_a_revision_of_the_hub_is_pushed_to_and_the_others_stay_as_they_are(
    trained: Path, hf: Hub, stoker: Callable[..., Any]
) -> None:
    assert stoker("models", "push", "base", "hub:org/base", cwd=trained).code == 0
    newest = dict(hf.models["org/base"])
    done = stoker("models", "push", "tuned", "hub:org/base@v2", "--merge", "--json", cwd=trained)
    assert done.code == 0, done.err
    there = dict(hf.models["org/base@v2"])
    assert set(there) == set(done.answer["files"])
    assert hf.models["org/base"] == newest
    assert there["model.safetensors"] != newest["model.safetensors"]
    assert 'from_pretrained("org/base", revision="v2")' in there["README.md"].decode()

    done = stoker(
        "train", "llm", "data=pairs.jsonl", *COMMON, "model=org/base@v2", "lora.rank=2", "max_steps=1",
        "--name", "of-v2", cwd=trained,
    )  # fmt: skip
    assert done.code == 0, done.err
    adapter = trained / "runs" / "llm" / "of-v2" / "artifacts" / "adapter"
    known = json.loads((adapter / "adapter_config.json").read_text())
    assert (known["base_model_name_or_path"], known["revision"]) == ("org/base", "v2")
    base = ("--base", "org/base@main")
    done = stoker("models", "push", "of-v2", "hub:org/base@v2", *base, "--json", cwd=trained)
    assert done.code == 0, done.err
    there = hf.models["org/base@v2"]
    assert set(there) == set(done.answer["files"]), "it is an adapter now, and no model"
    known = json.loads(there["adapter_config.json"])
    assert (known["base_model_name_or_path"], known["revision"]) == ("org/base", "main")
    assert hf.models["org/base"] == newest


def test_a_model_of_the_hub_is_fine_tuned_by_its_name(
    trained: Path, hf: Hub, stoker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stoker("models", "push", "base", "hub:org/base", cwd=trained).code == 0
    given = ("train", "llm", "data=pairs.jsonl", *COMMON, "model=org/base", "lora.rank=2", "max_steps=1")
    done = stoker(*given, "--name", "of-the-hub", cwd=trained)
    assert done.code == 0, done.err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = stoker(*given, "--name", "hub-gone", cwd=trained)  # what was brought serves
    assert (done.code, "peft" in done.err) == (0, False), done.err
    adapter = trained / "runs" / "llm" / "of-the-hub" / "artifacts" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_a_store_and_a_folder_take_the_same_files(
    trained: Path, stoker: Callable[..., Any], proxy: Proxy, tmp_path: Path
) -> None:
    done = stoker("models", "push", "tuned", "s3://bucket/models/tuned", "--checkpoint", "3", cwd=trained)
    assert done.code == 0, done.err
    assert stoker("models", "push", "tuned", str(tmp_path / "a" / "tuned"), cwd=trained).code == 0
    files = {file.name: file for file in (tmp_path / "a" / "tuned").iterdir()}
    s3 = fsspec.filesystem("s3", use_listings_cache=False)
    stored = {path.rpartition("/")[2]: s3.cat_file(path) for path in s3.find("bucket/models/tuned")}
    assert stored.keys() == files.keys()
    assert stored["tokenizer.json"] == files["tokenizer.json"].read_bytes()
    brought = [hub.find("s3://bucket/models/tuned") for _ in range(2)]
    assert brought[0] == brought[1], "once"
    assert {file.name: file.read_bytes() for file in brought[0].iterdir()} == stored
    weights = "adapter_model.safetensors"
    assert stored[weights] != files[weights].read_bytes(), "those of step 3, and those of the end"
    assert "3 steps" in stored["README.md"].decode()
    assert "6 steps" in files["README.md"].read_text()


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_weights_are_pushed_in_the_precision_that_is_asked_for(
    name: str, trained: Path, stoker: Callable[..., Any], tmp_path: Path
) -> None:
    for dtype in ("bf16", "fp16"):
        merge = ("--merge",) if name == "tuned" else ()
        done = stoker("models", "push", name, str(tmp_path / dtype), "--dtype", dtype, *merge, cwd=trained)
        assert done.code == 0, done.err
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto")
        assert {p.dtype for p in loaded.parameters()} == {
            {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        }
    plain = tmp_path / "plain"
    assert stoker("models", "push", name, str(plain), *merge, cwd=trained).code == 0
    for file in (*tmp_path.rglob("*"), *trained.rglob("artifacts/*/*")):
        readable = file.stat().st_mode & 0o444
        assert readable == 0o444, f"{file} cannot be read by others, as other files of this umask can"
    (one, other) = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "bf16"))
    assert all(torch.equal(other[key], tensor.bfloat16()) for key, tensor in one.items())
    one[next(iter(one))].fill_(1e6)
    save_file(one, plain / "model.safetensors")
    with pytest.raises(BadInput, match="has values outside its range; use bf16"):
        exports.cast(plain, "fp16")


PIPED = """
import os, sys

reading, writing = os.pipe()
os.write(writing, b"It is\\n")
os.close(writing)
os.dup2(reading, 0)
sys.stdin = open(0)
"""


def test_prompts_come_from_a_pipe(trained: Path, stoker: Callable[..., Any]) -> None:
    done = stoker("generate", "base", "--raw", "--max-tokens", "12", cwd=trained, first=PIPED)
    assert done.code == 0, done.err
    speaker = speaking.load(trained / "runs" / "llm" / "base" / "artifacts" / "model")
    assert done.out == speaker.answer("It is", max_tokens=12)["text"] + "\n"


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_model_that_is_no_run_is_asked_as_one(
    kind: str, trained: Path, stoker: Callable[..., Any], tmp_path: Path
) -> None:
    """Its folder, as anyone may have it, and what stands under an id of the hub."""
    run = "base" if kind == "model" else "tuned"
    (tmp_path / "asked.jsonl").write_text('"What is 7?"\n\n{"prompt": "What\\nis 8?"}\n')
    asked = ("--prompts", str(tmp_path / "asked.jsonl"), "--max-tokens", "8", "--json")
    of_run = stoker("generate", run, *asked, cwd=trained).answer
    assert [answer["prompt"] for answer in of_run["answers"]] == ["What is 7?", "What\nis 8?"]
    folder = str(trained / "runs" / "llm" / run / "artifacts" / kind)
    of_folder = stoker("generate", folder, *asked, cwd=tmp_path).answer
    assert of_folder["model"] == folder
    assert [a["text"] for a in of_folder["answers"]] == [a["text"] for a in of_run["answers"]]


def test_a_model_of_the_hub_is_asked(trained: Path, hf: Hub, stoker: Callable[..., Any]) -> None:
    assert stoker("models", "push", "base", "hub:org/base", "--public", cwd=trained).code == 0
    asked = ("-p", "What is 7?", "--max-tokens", "8", "--json")
    there = stoker("generate", "org/base", *asked, cwd=trained).answer
    here = stoker("generate", "base", *asked, cwd=trained).answer
    assert [a["text"] for a in there["answers"]] == [a["text"] for a in here["answers"]]


def test_of_the_likeliest_token_alone_nothing_is_drawn(trained: Path) -> None:
    speaker = speaking.load(trained / "runs" / "llm" / "base" / "artifacts" / "model")
    plain = speaker.answer("It is", max_tokens=12)["text"]
    assert speaker.answer("It is", max_tokens=12, temperature=1.0, top_k=1)["text"] == plain
    fresh = speaker.tokenizer(
        "It is " + speaker.answer("It is", max_tokens=30, repetition_penalty=1e6)["text"]
    )
    assert len(set(fresh["input_ids"])) > 20, "what was said is not said again"


def test_what_is_drawn_is_the_seed_s_alone(trained: Path) -> None:
    speaker = speaking.load(trained / "runs" / "llm" / "base" / "artifacts" / "model")

    def drawn(seed: int) -> str:
        return str(speaker.answer("It is", max_tokens=12, temperature=1.0, seed=seed)["text"])

    assert drawn(1) == drawn(1) != drawn(2)
    with pytest.raises(BadInput, match=r"2048 positions: shorten it"):
        speaker.answer("x " * 3000, max_tokens=1)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("models", "push", "base", "./x", "--merge"), "trained a full model"),
        (("models", "push", "base", "hub:base"), "hub:org/base"),
        (("models", "push", "base", "hub:org/base"), "set HF_TOKEN"),
        (("models", "push", "base", "s3://me:pw@bucket/x"), "leave credentials out"),
        (("models", "push", "base", "."), "already exists"),
        (("generate", "base", "-p", ""), "--prompt is empty"),
        (("generate", "base", "-p", "x", "--top-k", "4"), "give --temperature too"),
        (("generate", "base", "--prompts", "none.txt"), "--prompts none.txt cannot be read"),
        (("generate", "base", "--prompts", "asked.jsonl"), "must be a JSON string, or an object with"),
        (("generate", "nobody", "-p", "x"), "no run 'nobody' under runs"),
        (("generate", "llm/nobody", "-p", "x"), "no run 'llm/nobody' under runs"),
        (
            ("generate", "runs/llm/base/artifacts/model", "-p", "x", "--checkpoint", "last"),
            "needs a run, but",
        ),
        (("generate", "runs/llm/base/checkpoints", "-p", "x"), "contains no language model"),
        (("generate", "tuned", "-p", "x", "--checkpoint", "4"), "give best, last, or one of the steps 3, 6"),
    ],
)
def test_bad_input_is_answered_before_anything_is_sent(
    trained: Path, stoker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...],
    said: str,
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (trained / "asked.jsonl").write_text('"What is 7?"\n{"text": "What is 8?"}\n')
    done = stoker(*command, cwd=trained)
    assert (done.code, said in done.err) == (2, True), done.err
    assert not (trained / "x").exists()
    assert "pw" not in done.err


def test_an_adapter_is_not_merged_into_another_model(trained: Path, tmp_path: Path) -> None:
    runs = trained / "runs" / "llm"
    adapter, other = runs / "tuned" / "artifacts" / "adapter", tmp_path / "other"
    shutil.copytree(runs / "base" / "artifacts" / "model", other)
    tensors = {name: t + 1 for name, t in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for refused in (speaking.load, lambda a, base: merging.merge(a, tmp_path / "merged", base)):
        with pytest.raises(BadInput, match="was trained on a different model"):
            refused(adapter, str(other))
    with pytest.raises(BadInput, match="is not a directory"):
        speaking.load(adapter, "./gone")
