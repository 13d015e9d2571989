"""The commands that train a run again, in the order in which they trained it."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stoker import redaction
from stoker.config import DEFAULT
from stoker.report import facts
from stoker.reproduce import stretch
from stoker.reproduce.stretch import Part
from stoker.run import reproducing
from stoker.run.state import RunView
from stoker.words import some


def of(view: RunView, until: int | None = None, *, elsewhere: bool = False) -> list[str]:
    """A command, or several if the run was continued with changes; comments say which steps they made.

    A trial is trained by itself, with its values.

    Args:
        until: the last step that counts; by default the run's last.
        elsewhere: for somebody else: with the values themselves instead of `--config`, and without options
            that say where the run was kept and launched.
    """
    parts = stretch.parts(view, view.step if until is None else until)
    anew = bool(parts and view.recipe_reference and (elsewhere or _is_of_another(view, parts[0])))
    words = _composed(view, parts[0]) if anew else _typed(view)
    if not words:
        return []
    said = []
    if anew:
        said += _everywhere(parts[0])
    if parts and parts[0].after:
        said.append(f"from the checkpoint of step {parts[0].after:,} of another run")
    name = f"{view.directory.id}-again" if anew else view.directory.id
    if len(parts) > 1:
        said.append(f"up to step {parts[1].after:,}")
    if anew and (len(parts) > 1 or parts[0].machines > 1):
        words += ["--name", name]
    later = (_next(view, name, before, now) for before, now in itertools.pairwise(parts))
    return [_line(words, said), *later]


def _typed(view: RunView) -> list[str]:
    """The command that started the run."""
    words = [str(word) for word in view.record.get("command", [])]
    if not words:
        return []
    if module := view.record.get("module"):
        return ["python", "-m", module, *words[1:]]
    program = Path(words[0])
    is_script = program.suffix == ".py" and program.name != "__main__.py"
    return ["python", *words] if is_script else ["stoker", *words[1:]]


def _is_of_another(view: RunView, part: Part) -> bool:
    """Whether the recorded command is that of a sweep, repeats a run, or trained nothing that counts."""
    relations = [parent.get("relation") for parent in view.record.get("parents", ())]
    if reproducing.TAG in relations or view.directory.is_trial:
        return True
    return bool(part.drift) or part.world != view.attempts[0].world


def _composed(view: RunView, part: Part) -> list[str]:
    """`stoker train` with all values that are not defaults."""
    sources = view.record.get("sources", {})
    given = [key for key in part.config if key in part.drift or sources.get(key, DEFAULT) != DEFAULT]
    ranks = _ranks(part) if part.world > 1 else []
    return ["stoker", "train", _target(view), *(_override(key, part.config[key]) for key in given), *ranks]


def _ranks(part: Part) -> list[str]:
    """The options for a part's number of ranks; where its machines met is for the reader to fill in."""
    if part.machines == 1:
        return ["--nproc", str(part.world)]
    several = ["--nodes", str(part.machines), "--rendezvous", "HOST:PORT"]
    each, rest = divmod(part.world, part.machines)
    return several if rest else [*several, "--nproc", str(each)]


def _everywhere(part: Part) -> list[str]:
    """A comment on options for several machines."""
    uneven = [f"{part.world} ranks together"] if part.world % part.machines else []
    return [f"on each of {part.machines} machines", *uneven] if part.machines > 1 else []


def _target(view: RunView) -> str:
    """What starts the recipe, relative to the folder in which the run was started."""
    target = view.recipe_reference or ""
    inside = target.removeprefix(f"{view.record.get('cwd', '')}/")
    file, _, function = inside.partition(":")
    if file.endswith(".py"):
        return file if function == "train" else inside  # which is the default
    return inside if inside == target else f"./{inside}"  # a module, whose folder is needed


def _override(key: str, value: Any) -> str:
    if redaction.holds_redacted(value):
        return f"{key}=..."
    return f"{key}={'none' if value is None else facts.text(value)}"


def _next(view: RunView, name: str, before: Part, now: Part) -> str:
    """The command that continued the run with changes; for a script without a recipe, what they were."""
    keys = [key for key in now.config if now.config[key] != before.config.get(key)]
    given = [_override(key, now.config[key]) for key in keys]
    ranks = _ranks(now) if (now.world, now.machines) != (before.world, before.machines) else []
    changed = [path for path in {**before.code, **now.code} if before.code.get(path) != now.code.get(path)]
    said = [f"from step {now.after + 1:,} on", *([f"other code: {some(changed)}"] if changed else [])]
    said += [f"on another device: {now.device}"] if now.device != before.device else []
    if view.recipe_reference:
        said += _everywhere(now) if ranks else []
        return _line(["stoker", "resume", name, *given, *ranks], said)
    return _line([], [*said, *given, *([facts.together(now.world, now.machines)] if ranks else [])])


def _line(words: Sequence[str], said: Sequence[str]) -> str:
    comment = f"# {', '.join(said)}" if said else ""
    return "  ".join(part for part in (shlex.join(words), comment) if part)
