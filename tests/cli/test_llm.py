"""The language recipe from end to end: real processes, real kills, a real MLflow store."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from stoker import config as configs
from stoker.data import python_docs
from stoker.errors import BadInput
from stoker.recipes.llm import Config, check_launch

import families
from support import loaded, wait_for_points

TRAIN = (
    "train", "llm", "model=tiny", "validation=0.05", "test=0.05", "max_steps=30",
    "checkpoint_every=10", "sequence_length=128", "batch_size=4", "seed=1",
)  # fmt: skip
TUNE = (
    "train", "llm", "data=python-docs-qa", "lora.rank=4", "lora.dropout=0.1", "lr=5e-3", "max_steps=12",
    "checkpoint_every=4", "sequence_length=128", "batch_size=4", "seed=3", "validation=0.02", "test=0.02",
    "generate_tokens=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One runs folder for this module: later tests fine-tune and read what earlier ones trained."""
    return tmp_path_factory.mktemp("here") / "runs"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The language's reference, which is read in a fraction of the time that all of `python-docs` takes."""
    file = tmp_path_factory.mktemp("data") / "reference.jsonl"
    file.write_text(_lines(*({"text": f"{entry.title}\n\n{entry.body}"} for entry in python_docs.entries())))
    return str(file)


@pytest.fixture
def base(stoker: Callable[..., Any], runs: Path, reference: str) -> Path:
    """The run `a`: 30 steps of the smallest model, never interrupted."""
    if not (runs / "llm" / "a" / "artifacts" / "report.html").exists():
        done = stoker(*TRAIN, f"data={reference}", "--name", "a", "--runs", str(runs))
        assert done.code == 0, done.err
    return runs / "llm" / "a"


def _killed_and_resumed(
    start: Any, stoker: Any, command: tuple[str, ...], run: Path, moments: list[int], **env: str
) -> None:
    for moment in moments:
        process = start(*command, env=env)
        wait_for_points(process, run, moment)
        process.kill()
        process.wait()
    done = stoker(*command, env=env)
    assert done.code == 0, done.err


@pytest.mark.soak(small=False)
@pytest.mark.filterwarnings("ignore")  # MLflow's client runs in this process, with its own
def test_killed_three_times_it_ends_in_the_same_bits_and_mlflow_has_one_curve(
    stoker: Callable[..., Any], start: Callable[..., Any], base: Path, reference: str, runs: Path
) -> None:
    moments = [random.SystemRandom().randint(1, 12) for _ in range(3)]
    command = (*TRAIN, f"data={reference}", "--name", "b", "--runs", str(runs))
    _killed_and_resumed(start, stoker, command, runs / "llm" / "b", moments, STOKER_SINKS="mlflow")

    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        same = [(run / "artifacts" / "model" / name).read_bytes() for run in (base, runs / "llm" / "b")]
        assert same[0] == same[1], (name, moments)

    tables = [
        json.loads(stoker("runs", "export", name, "--format", "json", "--runs", str(runs)).out)
        for name in "ab"
    ]
    curves = [
        [(row["step"], row["loss"]) for row in _rows(table) if row["loss"] is not None] for table in tables
    ]
    assert curves[0] == curves[1], moments
    assert [step for step, _ in curves[0]] == list(range(1, 31))

    _assert_one_curve_in_mlflow(runs, loaded(runs / "llm" / "b"))


def _rows(table: Any) -> list[dict[str, Any]]:
    return table["rows"] if isinstance(table, dict) else table


def _assert_one_curve_in_mlflow(runs: Path, seen: Any) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("llm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model"] == "tiny"
    for metric, series in seen.points.items():
        history = client.get_metric_history(run.info.run_id, metric)
        assert [point.step for point in history] == list(series), metric
        if not metric.startswith(("tokens_per_second", "mfu", "seconds_")):  # by the clock: the first stands
            assert [point.value for point in history] == list(series.values()), metric
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"model", "report.html"} <= artifacts


@pytest.mark.filterwarnings("ignore")  # peft, as a user loads an adapter, has its own
def test_lora_is_exact_over_kills_and_loads_with_peft_on_the_exported_base(
    stoker: Callable[..., Any], start: Callable[..., Any], base: Path, runs: Path
) -> None:
    command = (*TUNE, f"model={base}/artifacts/model", "--runs", str(runs))
    whole = stoker(*command, "--name", "tuned")
    assert whole.code == 0, whole.err
    moments = [random.SystemRandom().randint(2, 7) for _ in range(2)]
    _killed_and_resumed(start, stoker, (*command, "--name", "cut"), runs / "llm" / "cut", moments)
    weights = [
        (runs / "llm" / name / "artifacts" / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("tuned", "cut")
    ]
    assert weights[0] == weights[1], moments
    seen = loaded(runs / "llm" / "tuned")
    assert seen.last("test_perplexity") < seen.last("base_test_perplexity")
    assert seen.last("base_test_perplexity") < 4096
    _assert_peft_gives_the_run_s_logits(base / "artifacts" / "model", runs / "llm" / "tuned")


def _assert_peft_gives_the_run_s_logits(model: Path, run: Path) -> None:
    """The adapter as a user loads it, against the weights of the run's own last checkpoint."""
    from peft import PeftModel
    from stoker.checkpoint import manifest, store
    from stoker.language import adapters, building
    from stoker.language.lora import Lora
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded_by_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), run / "artifacts" / "adapter"
    ).eval()
    language = building.build(str(model), tokenizer=None, vocab_size=300, sequence_length=128, documents=[])
    trained = adapters.adapted(language, Lora(rank=4)).eval()
    adapters.loading(language.load)(trained, torch.device("cpu"), "")
    trained.get_base_model().set_attn_implementation("sdpa")
    checkpoint, _ = manifest.newest(run / "checkpoints")
    assert checkpoint is not None
    saved = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in store.shapes(checkpoint).items()
    }
    store.load_tensors(checkpoint, saved)
    adapter = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
    assert not trained.load_state_dict(adapter, strict=False).unexpected_keys
    tokenizer = AutoTokenizer.from_pretrained(run / "artifacts" / "adapter")
    ids = tokenizer("What does `object.__len__(self)` do?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = trained(ids).logits, loaded_by_peft(ids).logits
        bare = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(ids).logits
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, bare)


def test_the_loss_is_that_of_plain_pytorch_on_the_same_rows(
    cache: Path, runs: Path, base: Path, reference: str
) -> None:
    """The first step of run `a`: the mean over all tokens of its four packed rows, each document alone."""
    from stoker.data import sources
    from stoker.data.loader import Loader
    from stoker.data.tokens import collate
    from stoker.engine.random_state import seed_everything
    from stoker.language import building, data
    from stoker.world import World

    config = Config(seed=1, data=reference, validation=0.05, test=0.05)
    seed_everything(config.seed)
    (source,) = sources.read_all(config.data, validation=config.validation, test=config.test)
    language = building.build(
        "tiny",
        tokenizer=None,
        vocab_size=config.vocab_size,
        sequence_length=128,
        documents=source.splits.train,
    )
    rows = data.pack([source], language.tokenizer, sequence_length=128).train
    loader = Loader(rows, batch_size=4, world=World(), seed=1, collate=collate)
    batch = next(loader.batches(0))
    total, count = 0.0, 0
    for ids, labels, positions in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in itertools.pairwise(starts):
            logits = language.model(ids[None, begin:end]).logits[0, :-1]
            wanted = labels[begin + 1 : end]
            total += torch.nn.functional.cross_entropy(
                logits, wanted, ignore_index=-100, reduction="sum"
            ).item()
            count += int((wanted != -100).sum())
    assert loaded(base).points["loss"][1] == pytest.approx(total / count, rel=1e-5)
    assert total / count == pytest.approx(math.log(4096), rel=0.02)  # an untrained model guesses evenly


def test_every_weight_can_be_fine_tuned_with_config_from_a_file(
    stoker: Callable[..., Any], base: Path, runs: Path, write_file: Callable[..., Path]
) -> None:
    model = base / "artifacts" / "model"
    file = write_file("tune.yaml", [f"model: {model}", "data: python-docs-qa", "batch_size: 4", "epochs: 9"])
    done = stoker(
        "train", "llm", "--config", str(file), "epochs=0.05", "micro_batch=2", "sequence_length=128",
        "precision=fp32", "validation=0.02", "test=0.02", "generate_tokens=4", "--name", "full", "--runs",
        str(runs), "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    seen = loaded(runs / "llm" / "full")
    assert seen.record["sources"]["model"] == str(file)
    assert seen.record["sources"]["epochs"] == "command line"
    assert seen.last("test_perplexity") < seen.last("base_test_perplexity")
    tuned = runs / "llm" / "full" / "artifacts" / "model"
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tuned))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.soak(small=False)
def test_a_token_budget_is_counted_in_real_tokens(stoker: Callable[..., Any], runs: Path) -> None:
    done = stoker(
        *TUNE,
        "lora.rank=0",
        "lora.dropout=0.05",
        "max_steps=20000tok",
        "--name",
        "tokens",
        "--runs",
        str(runs),
        "--json",
    )
    assert done.code == 0, done.err
    tokens_of_a_full_batch = 4 * 128
    fewest = math.ceil(20000 / tokens_of_a_full_batch)
    assert fewest <= done.answer["step"] <= fewest / 0.9


def test_what_is_measured_while_it_trains_is_logged_and_said(base: Path) -> None:
    seen = loaded(base)
    assert list(seen.points["val_perplexity"]) == [0, 30], "before training, and at the end"
    assert seen.points["val_perplexity"][0] == pytest.approx(4096, rel=0.1)
    assert seen.points["val_perplexity"][30] == pytest.approx(math.exp(seen.points["val_loss"][30]))
    assert list(seen.points["tokens_per_second"]) == [10, 20, 30]
    assert list(seen.points["tokens_per_second_per_gpu"].values()) == list(
        seen.points["tokens_per_second"].values()
    )
    assert 0 < seen.points["mfu"][30] < 1
    spent = [seen.points[f"seconds_{what}"] for what in ("waiting_for_data", "evaluating", "checkpointing")]
    assert all(seconds[30] > 0 for seconds in spent)
    assert spent[0][10] < spent[0][20] < spent[0][30], "so far"
    (memory,) = pq.read_table(base / "artifacts" / "tables" / "memory" / "step-00000030.parquet").to_pylist()
    assert memory["optimizer"] == pytest.approx(2 * memory["weights, GiB"], rel=0.01), "AdamW's two moments"
    said = (base / "logs" / "rank-0.log").read_text()
    assert re.search(r"step 0: val_perplexity \d+, peak memory [\d.]+ GiB", said)
    assert re.search(
        r"step 30: val_perplexity [\d.]+, [\d.]+k? tok/s, mfu [\d.]+%, [\d.]+% waiting for data, peak memory "
        r"[\d.]+ GiB", said,
    )  # fmt: skip


def test_it_ends_early_where_evaluations_get_no_better_and_each_has_generations(
    stoker: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(NUMBERS)
    done = stoker(
        "train", "llm", "data=d.jsonl", "model=tiny", "vocab_size=300", "sequence_length=64", "batch_size=2",
        "max_steps=9", "eval_every=1", "patience=2", "lr=1e-30", "generate_tokens=2", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.answer["step"] == 3, "the first, and two that are no better"
    assert "step 3 is the last: val_loss did not improve for 2 evaluations" in done.err
    run = Path(done.answer["run"])
    assert [len(_generations(run, step)) for step in (1, 2, 3)] == [2, 2, 2]
    assert list(loaded(run).points["val_loss"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("streaming", [False, True])
def test_with_nothing_held_out_all_is_trained_on_and_nothing_measured(
    streaming: bool, stoker: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(NUMBERS)
    done = stoker(
        "train", "llm", "data=d.jsonl", "model=tiny", "vocab_size=300", "sequence_length=64", "batch_size=2",
        "max_steps=2", "validation=0", "test=0", f"streaming={streaming}", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    view = loaded(Path(done.answer["run"]))
    assert {"val_loss", "test_perplexity"}.isdisjoint(view.points)
    assert len(view.points["loss"]) == 2
    assert view.artifacts["model"]
    assert view.params["lr"] == 3e-3, "that of a new model, where none is given"
    refused = stoker("train", "llm", "data=d.jsonl", "validation=0", "patience=2")
    assert refused.code == 2
    assert "patience=2 watches val_loss, but with validation=0 nothing is held out" in refused.err


def test_without_generations_and_evaluations_while_training_the_first_and_the_last_are_there(
    stoker: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(_lines(*({"prompt": f"{i}?", "completion": f"{i}"} for i in range(40))))
    done = stoker(
        "train", "llm", "data=d.jsonl", "vocab_size=300", "batch_size=2", "sequence_length=64", "epochs=2",
        "packing=false", "generate_tokens=0", "eval_every=none", "--name", "a", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    view = loaded(Path(done.answer["run"]))
    last = max(view.points["loss"])
    assert list(view.points["val_loss"]) == [0, last]
    assert list(view.points["test_perplexity"]) == [last]
    assert not (Path(done.answer["run"]) / "artifacts" / "tables" / "generations").exists()
    resumed = stoker("resume", "a", f"max_steps={last + 1}", "epochs=none")
    assert resumed.code == 0, resumed.err
    assert list(loaded(Path(done.answer["run"])).points["val_loss"]) == [0, last, last + 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ("eval_every=none", "patience=2"),
            "patience=2 counts evaluations during training, but with eval_",
        ),
        (
            ("generate_tokens=0", "prompts=who"),
            "prompts are given, but generate_tokens=0 makes no generations",
        ),
    ],
)
def test_what_is_asked_of_evaluations_that_are_turned_off_is_refused(
    given: tuple[str, ...], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        configs.resolve(Config, given)


def test_an_adapter_of_a_new_model_which_nobody_else_has_is_refused(
    stoker: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(_lines(*({"text": f"{i} is a number"} for i in range(20))))
    done = stoker("train", "llm", "data=d.jsonl", "lora.rank=4")
    assert done.code == 2
    assert "model=tiny is a new one of that size: name the model" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_has_the_name_of_a_size_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    check_launch(configs.resolve(Config, ["model=tiny"]).config)
    assert not caplog.text
    families.save(tmp_path / "tiny", "gpt2")
    check_launch(configs.resolve(Config, ["model=tiny"]).config)
    assert "the one in the folder of this name is model=./tiny" in caplog.text


def test_a_generation_ends_with_the_positions_of_the_model(
    stoker: Callable[..., Any], tmp_path: Path
) -> None:
    families.save(tmp_path / "gpt2", "gpt2")  # a token a character, and nothing behind its last position
    records = ({"prompt": f"{i:03}" * 70, "completion": "yes"} for i in range(20))
    (tmp_path / "d.jsonl").write_text(_lines(*records))
    done = stoker("train", "llm", "data=d.jsonl", "model=gpt2", "max_steps=1", "batch_size=2", "--json")
    assert done.code == 0, done.err
    assert _generations(Path(done.answer["run"]), 1)


@pytest.mark.soak(small=False)
def test_training_loads_no_mlflow(base: Path, tmp_path: Path) -> None:
    """Though a follower of it ships to MLflow meanwhile."""
    least = ("max_steps=1", "validation=0", "test=0", "generate_tokens=0")
    arguments = ["stoker", *TUNE, *least, f"model={base}/artifacts/model"]
    code = (
        "import sys, atexit; atexit.register(lambda: print('mlflow' in sys.modules, 'torch' in sys.modules));"
        f"sys.argv = {arguments!r}; from stoker.cli.main import run; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "STOKER_SINKS": "mlflow"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False True"
    assert (tmp_path / "runs" / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"messages": [{"content": "hi"}]}'], "line 1, message 1: has no 'role'; its fields are 'content'"),
        (['{"txt": "a"}'], "line 1: no known field; the record's fields are 'txt'"),
        (['{"text": "a"}', "{text"], "line 2: not JSON"),
    ],
)
def test_data_that_does_not_begin_as_data_is_refused_before_torch_is_loaded(
    tmp_path: Path, lines: list[str], said: str
) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    code = (
        "import sys, atexit; atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)));"
        "sys.argv = ['stoker', 'train', 'llm', 'data=d.jsonl']; from stoker.cli.main import run; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"stoker: error: d.jsonl, {said}" in done.stderr
    assert done.stdout.strip() == "set()"
    assert not (tmp_path / "runs").exists()


FORMS: list[dict[str, str]] = [
    {"text": "A line about the number {i}, long enough to be learnt from."},
    {"prompt": "What is {i}?", "completion": "It is the number {i}."},
    {"question": "What is {i}?", "answer": "It is the number {i}."},
    {"instruction": "Say the number.", "input": "{i}", "output": "It is {i}."},
]


@pytest.mark.parametrize(("form", "kind"), list(zip(FORMS, ["jsonl", "parquet"] * 2, strict=True)))
def test_trains_on_files_of_every_form(
    stoker: Callable[..., Any], tmp_path: Path, form: dict[str, str], kind: str
) -> None:
    records = [{key: value.format(i=i) for key, value in form.items()} for i in range(60)]
    file = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), file)
    done = stoker(
        "train", "llm", f"data={file.name}", "model=tiny", "vocab_size=300", "sequence_length=64",
        "max_steps=2", "batch_size=2", "generate_tokens=4", 'prompts=["What is 7?"]', "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    asked = "What is 7?" if "text" in form else "### Question\nWhat is 7?\n\n### Answer\n"
    assert [row["prompt"] for row in _generations(Path(done.answer["run"]), 2)] == [asked]
    assert np.isfinite(done.answer["metrics"]["test_perplexity"])
    assert Path(done.answer["report"]).is_file()


def _generations(run: Path, step: int) -> list[dict[str, Any]]:
    file = run / "artifacts" / "tables" / "generations" / f"step-{step:08d}.parquet"
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def _lines(*records: object) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


NUMBERS = _lines(*({"text": f"A line about the number {i}."} for i in range(60)))


@pytest.mark.parametrize(
    ("content", "overrides", "said"),
    [
        (None, ["data=missing.jsonl"], "missing.jsonl does not exist"),
        ("", ["data=d.jsonl"], "empty"),
        (_lines({"text": "a"}, "{not json"), ["data=d.jsonl"], "d.jsonl"),
        (_lines({"text": "a"}, "{not json"), ["data=d.jsonl"], "line 2"),
        (
            _lines({"text": "a"}, {"body": "b", "title": "t"}),
            ["data=d.jsonl"],
            "the record's fields are 'body'",
        ),
        (None, ["lr=abc"], "lr=abc"),
        (None, ["batchsize=4"], "did you mean 'batch_size'?"),
        (None, ["sequence_length=0"], "greater than or equal to 2"),
        (None, ["max_steps=10", "epochs=2"], "give only one"),
        (None, ["max_steps=10min"], "is a time, which differs"),
        (None, ["streaming=true", "data_share=0.5"], "data_share=0.5 with streaming=true"),
        (None, ["data=numbers.jsonl", "model=emptydir"], "has no config.json"),
        (None, ["data=numbers.jsonl", "model=adapterdir"], "lora.adapter="),
        (None, ["model=./nowhere"], "is not a directory"),
        (None, ["model=tiny2"], "did you mean 'tiny'"),
        (None, ["lora.adapter=emptydir"], "has no adapter_config.json"),
        (None, ["data=someone/some-dataset"], "someone/some-dataset"),
        (None, ["precision=fp8"], "auto, fp32, bf16"),
        (None, ["--runs", "/dev/null/runs"], "cannot be written"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_no_run(
    stoker: Callable[..., Any], tmp_path: Path, content: str | None, overrides: list[str], said: str
) -> None:
    (tmp_path / "numbers.jsonl").write_text(NUMBERS)
    (tmp_path / "emptydir").mkdir()
    (tmp_path / "adapterdir").mkdir()
    (tmp_path / "adapterdir" / "adapter_config.json").write_text("{}")
    if content is not None:
        (tmp_path / "d.jsonl").write_text(content)
    done = stoker("train", "llm", *overrides, "--json")
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.answer["bad_input"] is True
    assert not (tmp_path / "runs").exists()


def sparse_llama(folder: Path, layers: int) -> Path:
    """Llama 2 of so many layers (7B: 32) in a file of 13 GB and more that take no room on the disk."""
    from stoker.data import tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))
    folder.mkdir()
    model.config.save_pretrained(folder)
    tokenizer.as_transformers(tokenizer.train_tokenizer(["a"], 300), 4096).save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_loaded(
    stoker: Callable[..., Any], tmp_path: Path
) -> None:
    model = sparse_llama(tmp_path / "large", 32 * (1 + psutil.virtual_memory().total // (90 * 2**30)))
    done = stoker("train", "llm", f"model={model}", "data=python-docs-qa", "precision=fp32", "--json")
    assert done.code == 2, done.err
    assert re.search(r"billion parameters needs [\d.,]+ GiB per rank with parallel=single", done.err)
    assert re.search(
        r"weights \S+ GiB, gradients \S+ GiB, optimizer state \S+ GiB; a rank here has", done.err
    )
    assert "train only adapters with lora.rank=16" in done.err
    assert not (tmp_path / "runs").exists()
