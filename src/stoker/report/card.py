"""The model card of an export: what it is, its origin, its results, how to load and reproduce it.

Written as `README.md`: Markdown with the hub's metadata above it, and the curves as a picture next to it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stoker
from stoker.data import hub_datasets
from stoker.progress import clock
from stoker.report import commands, curve_image, facts, performance, plots
from stoker.reproduce import environment, packages, stretch
from stoker.run.state import RunView
from stoker.words import counted, some

PICTURE = "curves.png"
_EVALUATIONS = 12  # rows of the table of evaluations
_VERSIONS = ("torch", "transformers", "peft", "tokenizers", "safetensors")
_USES = {"validation": "for validation", "test": "for testing"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KINDS = {
    "text-generation": "A causal language model",
    "text-classification": "A text classifier",
    "image-classification": "An image classifier",
}
_CLASSIFIED = {  # how its pipeline is made and asked
    "text-classification": (", truncation=True", "..."),
    "image-classification": ("", "image.jpg"),
}
_CLASSES = 30  # as many as are named
_RESULTS = {
    "test_perplexity": "perplexity on the test documents",
    "base_test_perplexity": "perplexity on the test documents before training",
    "val_perplexity": "perplexity on the validation documents",
    "val_loss": "validation loss",
    "test_accuracy": "accuracy on the test set",
    "test_macro_f1": "macro F1 on the test set",
    "val_accuracy": "accuracy on the validation set",
    "loss": "training loss",
}


@dataclass(frozen=True)
class About:
    """What a folder of model files is."""

    name: str
    """The name to load it by: an id on the hub, a folder or a URL."""
    kind: str
    """adapter or model."""
    step: int
    """The number of training steps."""
    revision: str | None = None
    """The revision on the hub, if it is not the newest."""
    base: str | None = None
    """The base model of an adapter, or the model that was fine-tuned."""
    merged: bool = False
    """Whether adapters were merged into the weights."""
    task: str | None = None
    """The transformers task: text-generation, text-classification or image-classification."""
    chat: bool = False
    """Whether its tokenizer has a chat template."""
    classes: Sequence[str] = ()
    """The labels of a classifier."""
    base_config: Mapping[str, Any] = field(default_factory=dict)
    """What an adapter needs to be different in the config of its base model."""
    metrics: Mapping[str, float] | None = None
    """The metrics known at a checkpoint; None for the final weights."""


def write(view: RunView, folder: Path, about: About) -> None:
    """Write `README.md` into a folder of model files, and the curves if there are any."""
    losses = {name: view.points[name] for name in ("loss", "val_loss") if name in view.points}
    drawn = curve_image.draw(losses, folder / PICTURE) if losses else False
    (folder / "README.md").write_text(text(view, about, picture=drawn), encoding="utf-8")


def text(view: RunView, about: About, *, picture: bool) -> str:
    """The card as text. `picture`: whether PICTURE is next to it."""
    parts = [
        f"---\n{_metadata(view, about)}\n---",
        f"# {about.name.rstrip('/').rpartition('/')[2]}",
        _summary(view, about),
        _section("Results", _results(view, about)),
        _section("How to load it", _loading(about)),
        _section("Data", _data(view, about)),
        _section("Training", _training(view, about), _picture(picture), _evaluations(view), _config(view)),
        _section("How to reproduce it", _again(view, about.step)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(view: RunView, about: About) -> str:
    from huggingface_hub import ModelCardData

    read = facts.provenance(view.directory).data.values()
    local = frozenset(str(about["path"]) for about in read if "absolute" in about)
    hub_sets = [_on_hub(view, name, local) for name in _sources(view)]
    base = _on_hub(view, about.base or "", local)
    adapter = about.kind == "adapter"
    metadata = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=list(dict.fromkeys(name for name in hub_sets if name)) or None,
        library_name="peft" if adapter else "transformers" if about.task else None,
        pipeline_tag=about.task,
        tags=["stoker", *(["lora"] if adapter or about.merged else [])],
    )
    return str(metadata.to_yaml())


def _on_hub(view: RunView, name: str, local: Set[str]) -> str | None:
    """The id that the hub links to, without revision, config or split; None if it is none of the hub's.

    A relative path starts from the folder that the run was started in; that of `--base` from the current one.

    Args:
        local: the files and folders that the run has read, which may be gone by now.
    """
    bare = hub_datasets.parse(name).name
    is_local = name in local or Path(name).exists() or Path(view.record.get("cwd", ""), name).exists()
    return bare if _HUB_ID.fullmatch(bare) and not is_local else None


def _summary(view: RunView, about: About) -> str:
    what = "A LoRA adapter" if about.kind == "adapter" else _KINDS.get(about.task or "", "A model")
    of = f" for {_code(about.base)}" if about.kind == "adapter" and about.base else ""
    how = f", fine-tuned from {_code(about.base)}" if about.kind != "adapter" and about.base else ""
    merged = ", its LoRA adapter merged into the weights" if about.merged else ""
    run = view.directory.name
    steps = counted(about.step, "step")
    by = f"trained with stoker {stoker.__version__} as run `{run}`, {steps}"
    return f"{what}{of}{how}{merged}, {by}."


def _results(view: RunView, about: About) -> str:
    """The results with their steps; for a checkpoint, those known by then, without the final test."""
    of_these = view.newest() if about.metrics is None else about.metrics
    rows = [
        (known, facts.number(of_these[name]), _measured(view, name, about.step))
        for name, known in _RESULTS.items()
        if name in of_these
    ]
    return _table(("measure", "value", "at step"), rows)


def _measured(view: RunView, name: str, until: int) -> str:
    """The last step up to `until` at which a metric was logged."""
    steps = [int(step) for step in view.points[name] if step <= until] if name in view.points else []
    return f"{max(steps):,}" if steps else ""


def _loading(about: About) -> str:
    if about.task in _CLASSIFIED:
        place, brought = _place(about)
        options, asked = _CLASSIFIED[about.task]
        return _fenced("python", [
            "from transformers import pipeline",
            "",
            *brought,
            f'classify = pipeline("{about.task}", model={place}{options})',
            f'print(classify("{asked}"))',
        ])  # fmt: skip
    if about.task != "text-generation":
        read = 'tensors = load_file("model.safetensors")  # pass to model.load_state_dict'
        return _fenced("python", ["from safetensors.torch import load_file", read])
    loader = "AutoPeftModelForCausalLM" if about.kind == "adapter" else "AutoModelForCausalLM"
    package = "peft" if about.kind == "adapter" else "transformers"
    ask = (
        ['messages = [{"role": "user", "content": "..."}]',
         "inputs = tokenizer.apply_chat_template(",
         '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
         ")"]
        if about.chat
        else ['inputs = tokenizer("...", return_tensors="pt")']
    )  # fmt: skip
    place, brought = _place(about)
    imports = sorted([f"from {package} import {loader}", "from transformers import AutoTokenizer"])
    if package == "transformers":
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    return _fenced("python", [
        *imports,
        "",
        *brought,
        f'model = {loader}.from_pretrained({place}{_changes(about)})',
        f'tokenizer = AutoTokenizer.from_pretrained({place})',
        *ask,
        "made = model.generate(**inputs, max_new_tokens=200)",
        'print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ])  # fmt: skip


def _changes(about: About) -> str:
    """The arguments that change the config of an adapter's base model."""
    return "".join(f", {name}={value!r}" for name, value in about.base_config.items())


def _place(about: About) -> tuple[str, list[str]]:
    """The arguments that load a model, and a comment if it must be copied to a local folder first."""
    if "://" not in about.name:
        return f'"{about.name}"' + (f', revision="{about.revision}"' if about.revision else ""), []
    place = f"./{about.name.rstrip('/').rpartition('/')[2]}"
    return f'"{place}"', [f"# after copying {about.name} to {place}"]


def _data(view: RunView, about: About) -> str:
    known = view.attempts[-1].data if view.attempts else {}
    lines = [f"- {source}" for source in known.get("sources", [])]
    fingerprint = view.tags.get("fingerprint.data")
    rows, tokens = known.get("rows"), known.get("tokens_per_row")
    if rows and tokens:
        lines.append(f"- {counted(rows, 'row')} of {facts.number(tokens)} tokens on average")
    counts = [_counts(known[what], what) for what in ("images", "texts") if what in known]
    lines += [f"- {said}" for said in counts]
    if about.classes:
        lines.append(f"- {len(about.classes)} classes: {some(about.classes, _CLASSES)}")
    held = {use: view.config.get(use) for use in _USES if f"{use}_data" not in known}
    if known and not counts and held and all(isinstance(share, float) for share in held.values()):
        said = ", ".join(f"{share:.0%} {_USES[use]}" for use, share in held.items())
        lines.append(f"- held out: {said.replace('%', '% of the documents', 1)}")
    lines += [f"- fingerprint of the content: `{fingerprint}`"] if fingerprint else []
    for use, said in _USES.items():
        lines += [f"- {said}: {source}" for source in known.get(f"{use}_data", [])]
        own = view.tags.get(f"fingerprint.{use}_data")
        lines += [f"- fingerprint of the data {said}: `{own}`"] if own else []
    return "\n".join(lines)


def _counts(of: Mapping[str, int], what: str) -> str:
    """The images or texts of each split."""
    uses = {"train": "for training", **_USES}
    first, *others = [(f"{of[name]:,}", use) for name, use in uses.items() if of.get(name)]
    return f"{first[0]} {what} {first[1]}" + "".join(f", {count} {use}" for count, use in others)


def _training(view: RunView, about: About) -> str:
    rows = [("steps", f"{about.step:,}"), ("time", clock(view.seconds)), ("devices", facts.layout(view))]
    found = performance.throughput(view)
    if found is not None:
        rows.append((f"{found.unit} per second", facts.number(found.median)))
        rows.append(("model FLOPs utilisation", performance.utilisation(found)))
    return _table(("", ""), [row for row in rows if row[1]])


def _picture(there: bool) -> str:
    return f"![Training and validation loss by step]({PICTURE})" if there else ""


def _evaluations(view: RunView) -> str:
    names = [name for name in ("val_loss", "val_perplexity", "val_accuracy") if name in view.points]
    if not names:
        return ""
    steps = sorted({int(step) for name in names for step in view.points[name]})
    known = {name: dict(view.points[name].items()) for name in names}
    rows = [
        (f"{step:,}", *(facts.number(known[name].get(step)) for name in names))
        for step in plots.spread(steps, _EVALUATIONS)
    ]
    return _table(("step", *names), rows)


def _config(view: RunView) -> str:
    found = facts.config(view)

    def rows(of_defaults: bool) -> str:
        chosen = [value for value in found if value.is_default is of_defaults]
        shown = [(_code(value.key), _code(facts.text(value.value))) for value in chosen]
        return _table(("key", "value"), shown)

    folded = "<details><summary>Values left at their default</summary>", rows(True), "</details>"
    return "\n\n".join(part for part in (rows(False), *(folded if rows(True) else ())) if part)


def _again(view: RunView, step: int) -> str:
    found = facts.provenance(view.directory)
    versions = packages.versions(found.packages)
    lines = []
    if found.code.get("remote"):
        lines.append(f"git clone {found.code['remote']}")
    if found.code.get("commit"):
        dirty = "  # then apply the run's provenance/diff.patch" if found.code.get("dirty") else ""
        lines.append(f"git checkout {found.code['commit']}{dirty}")
    used = [*_VERSIONS, *(["deepspeed"] if facts.layout(view).startswith("deepspeed") else [])]
    used += ["bitsandbytes"] if view.config.get("quantisation", "none") != "none" else []
    known = [f"{name}=={versions[name].partition('+')[0]}" for name in used if name in versions]
    lines += [f"pip install {' '.join(known)}"] if known else []
    lines += commands.of(view, step, elsewhere=True)
    seed = view.record.get("seed")
    said = [f"The seed is {seed}."] if seed is not None else []
    said.append(_promise(view, step, found.environment))
    if view.total_steps is not None and step < view.total_steps:
        said.append(f"These are the weights of step {step:,} of {view.total_steps:,}.")
    said.append(
        f"Where the run is kept, `stoker reproduce {view.directory.name}` repeats it from its record."
    )
    return f"{' '.join(said)}\n\n{_fenced('sh', lines)}"


def _promise(view: RunView, step: int, machine: Mapping[str, Any]) -> str:
    """What a repetition gives: equal bits only with one config throughout, and kernels that add in order."""
    parts = stretch.parts(view, step)
    if len(parts) > 1:
        return "The run was continued with changes, which a repetition has to make at the same steps."
    if parts and parts[0].after:
        return "The run began from a checkpoint of another run, without which it cannot be repeated."
    same = f"With stoker {stoker.__version__}, the same data, hardware and versions give"
    layout = view.attempts[-1].layout if view.attempts else {}
    if environment.on_gpu(layout, machine) and not view.config.get("deterministic"):
        return f"{same} the same result but for rounding: `deterministic=false` on a GPU."
    return f"{same} a bit-identical result."


def _sources(view: RunView) -> list[str]:
    """The names of the data sources, without weights."""
    given = str(view.config.get("data", ""))
    return [part.strip().partition(":")[0] for part in given.split(",") if part.strip()]


def _section(title: str, *parts: str) -> str:
    content = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *content]) if content else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _fenced(language: str, lines: Sequence[str]) -> str:
    return "\n".join(itertools.chain([f"```{language}"], lines, ["```"]))


def _code(value: str | None) -> str:
    """As code, on one line."""
    flat = " ".join(str(value).split()).replace("`", "'")
    return f"`{flat}`" if flat else ""
