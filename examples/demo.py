"""The main job, offline: pretrain a small language model, fine-tune it with LoRA, and test both.

Everything is done with `stoker` commands, which are printed as they run. If it is killed at any moment,
the same `make demo` resumes from where it stopped. A `key=value` argument applies to both trainings.
"""

import json
import subprocess
import sys
from pathlib import Path

from stoker.report import facts
from stoker.run import finding, view

RUNS = Path("runs")
PRETRAIN = [
    "train", "llm", "--config", "python-docs", "--experiment", "demo", "--name", "base",
]  # fmt: skip
FINETUNE = [
    "train", "llm", "--experiment", "demo", "--name", "lora", "model=runs/demo/base/artifacts/model",
    "data=python-docs-qa", "lora.rank=16", "lora.alpha=32", "lr=2e-3", "max_steps=3ep", "eval_every=1ep",
    "checkpoint_every=50", "seed=1",
]  # fmt: skip


def stoker(arguments: list[str]) -> dict:
    """Run a command, showing its progress, and return its --json answer."""
    arguments = [*arguments, "--runs", str(RUNS)]
    print(f"\n$ stoker {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "stoker", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main(values: list[str]) -> None:
    base = stoker([*PRETRAIN, *values])
    tuned = stoker([*FINETUNE, *values])
    seen = view.load(finding.find(RUNS, "demo/lora"))
    vocabulary = json.loads((RUNS / "demo/base/artifacts/model/config.json").read_text())["vocab_size"]
    print("\n" + "=" * 80)
    _, generations = facts.table_rows(seen, facts.tables(seen)["generations"][-1])
    for prompt, completion in generations:
        print(f"{prompt}{completion}\n{'-' * 80}")
    figures = {
        f"test perplexity on documents, base (an even guess: {vocabulary})": base["metrics"][
            "test_perplexity"
        ],
        "test perplexity on answers, base": tuned["metrics"]["base_test_perplexity"],
        "test perplexity on answers, fine-tuned": tuned["metrics"]["test_perplexity"],
        "tokens/s, pretraining": base["metrics"]["tokens_per_second"],
        "tokens/s, fine-tuning": tuned["metrics"]["tokens_per_second"],
    }
    for name, value in figures.items():
        print(f"{name:60} {value:10,.1f}")
    print(f"run     {Path(tuned['run']).relative_to(Path.cwd())}")
    print(f"report  {Path(tuned['report']).relative_to(Path.cwd())}")
    print("\nnext:")
    for command in ("runs list", "runs show lora", "ui"):
        print(f"  .venv/bin/stoker {command}")


if __name__ == "__main__":
    main(sys.argv[1:])
