"""Recipes: a config dataclass and one `train(run, config)` function, shipped or written by a user."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from stoker.errors import BadInput, nearest
from stoker.reproduce.code import module_file
from stoker.run import finding

SHIPPED = ("llm", "image", "text", "evaluation")
"""The names of the recipes that ship, which are those of their modules."""


@dataclass(frozen=True)
class Recipe:
    """A train function with its config and checks."""

    name: str
    reference: str
    """How to load it again, in any process and folder: a shipped name, `FILE.py:FUNCTION` with an absolute
    path, or `FOLDER/MODULE:FUNCTION` for a module of a package, which needs the package's folder and its own
    full name to import from the package."""
    train: Callable[..., None]
    config: type[Any]
    source: Path
    """The file that defines it."""
    check: Callable[[Any], None] | None = None
    """`check_launch(config)` of its module: refuses configs that cannot work, before any rank is started."""
    check_ranks: Callable[[Any, int], None] | None = None
    """`check_ranks(config, ranks)` of its module: refuses a number of ranks, with BadWorldSize if a different
    number would work. It must be fast, since it is called for every number of ranks that is possible."""
    preload: tuple[str, ...] = ()
    """`PRELOAD` of its module: modules that the forkserver of the ranks imports in advance."""
    best: str = "val_loss"
    """`BEST_METRIC` of its module: what a search optimises, and what its Trainer keeps the best checkpoint
    by."""

    @property
    def code(self) -> Path:
        """The code recorded with a run: the user's file, or the working directory for a shipped recipe."""
        return Path.cwd() if self.reference in SHIPPED else self.source


_loading = threading.local()


def loads_file() -> bool:
    """Whether this thread is importing a user's recipe, so that the caller is code at its top level."""
    return getattr(_loading, "depth", 0) > 0


@contextlib.contextmanager
def _marked_as_loading() -> Iterator[None]:
    _loading.depth = getattr(_loading, "depth", 0) + 1
    try:
        yield
    finally:
        _loading.depth -= 1


def load(reference: str) -> Recipe:
    """A recipe by shipped name, by file (`my_train.py`, `my_train.py:train`) or by `module:function`.

    The folder of the module's package can come first: `project/package.module:function`.

    Raises BadInput if it is not found; errors raised by the user's file itself are passed on.
    """
    if reference in SHIPPED:
        module = importlib.import_module(f"{__name__}.{reference}")
        return from_function(module.train, name=reference, reference=reference)
    target, _, function = reference.partition(":")
    with _marked_as_loading():
        module = _module(target, reference)
    found = getattr(module, function or "train", None)
    if not callable(found):
        raise BadInput(f"{target} has no function {function or 'train'}(run, config)")
    return from_function(found)


def configs() -> dict[str, Path]:
    """The shipped configs, all for the llm recipe, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def config_file(given: Path | None) -> Path | None:
    """The config file for a path, or for the name of a shipped config. Raises BadInput."""
    if given is None or given.exists():
        return given
    known = configs()
    if str(given) in known:
        return known[str(given)]
    hint = nearest(str(given), known) or f"; shipped configs: {', '.join(known)}"
    raise BadInput(f"config file {given} does not exist{hint}")


def from_function(
    train: Callable[..., None], name: str | None = None, reference: str | None = None
) -> Recipe:
    """The recipe for a train function; its config class is the annotation of the second parameter."""
    source = Path(inspect.getsourcefile(train) or "").absolute()
    module = sys.modules.get(train.__module__)
    known = getattr(module, "__spec__", None)  # of `python -m package.module`, which is then __main__
    name_of_module = known.name if known is not None else train.__module__
    return Recipe(
        name=name or finding.folder_name(source.stem),
        reference=reference or f"{_target(name_of_module, source)}:{train.__name__}",
        train=train,
        config=_config_class(train),
        source=source,
        check=getattr(module, "check_launch", None),
        check_ranks=getattr(module, "check_ranks", None),
        preload=tuple(getattr(module, "PRELOAD", ())),
        best=str(getattr(module, "BEST_METRIC", Recipe.best)),
    )


def _target(module: str, source: Path) -> str:
    """The first part of a reference to a function of a module: a file, unless its package is needed."""
    parts = module.split(".")
    up = len(parts) if source.name == "__init__.py" else len(parts) - 1
    if 0 < up < len(source.parents) and module_file(source.parents[up], module) == source:
        return str(source.parents[up] / module)
    return str(source)


def _module(target: str, reference: str) -> ModuleType:
    if target.endswith(".py"):
        return _import_file(Path(target).absolute())
    if ":" in reference:
        folder, separator, module = target.rpartition("/")
        path = str(Path(folder or separator).absolute())
        if separator and path not in sys.path:
            sys.path.insert(0, path)
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise BadInput(f"module {target} cannot be imported: {error}") from error
    if target in configs():
        raise BadInput(f"{target} is a config of the recipe llm: write llm --config {target}")
    if target.endswith((".yaml", ".yml")):
        raise BadInput(f"{target} is a config, not a recipe: write RECIPE --config {target}")
    hint = nearest(reference, SHIPPED) or f"; shipped recipes: {', '.join(SHIPPED)}"
    raise BadInput(f"no recipe {reference!r}{hint}; for your own, give a file such as my_train.py")


def _import_file(file: Path) -> ModuleType:
    """Import a script as a module named after it, with its folder on the path as when it is run."""
    if not file.is_file():
        raise BadInput(f"{file} does not exist")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        _explain_relative(file, error)
        raise
    except TypeError as error:
        _explain_not_frozen(file, error)
        raise
    return module


def _explain_relative(file: Path, error: ImportError) -> None:
    """Raises BadInput if a file of a package is given as a script."""
    if "relative import" not in str(error):
        return
    packages = itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), file.parents)
    folders = list(packages) or [file.parent]
    module = ".".join([*(folder.name for folder in reversed(folders)), file.stem])
    raise BadInput(
        f"{file} imports from its package ({error}): give it as a module with its function, as in "
        f"`stoker train {folders[-1].parent / module}:train`"
    ) from error


def _explain_not_frozen(file: Path, error: TypeError) -> None:
    """Raises BadInput if a non-frozen config inherits from a frozen one such as `Training`."""
    if "cannot inherit non-frozen dataclass" not in str(error):
        return
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in frames if frame.filename == str(file)), None)
    raise BadInput(
        f"{file}, line {line}: a dataclass that inherits from a frozen one, such as stoker.Training, must be "
        "frozen too: decorate it with @dataclass(frozen=True, kw_only=True)"
    ) from error


def _check_run_is_first(train: Callable[..., None], parameters: Sequence[str]) -> None:
    """Raises BadInput for a function that does not take a run, or takes it after its config."""
    kind: Any = None
    with contextlib.suppress(NameError):  # names that are imported only for type checkers
        kind = typing.get_type_hints(train).get(parameters[0]) if parameters else None
    takes_config = dataclasses.is_dataclass(kind) or parameters == ["config"]
    if parameters and not takes_config:
        return
    config = kind.__name__ if isinstance(kind, type) else "Config"
    raise BadInput(
        f"{train.__name__}({', '.join(parameters)}): the first parameter must be the run: write "
        f"def {train.__name__}(run, config: {config})"
    )


def _config_class(train: Callable[..., None]) -> type:
    parameters = list(inspect.signature(train).parameters)
    _check_run_is_first(train, parameters)
    if len(parameters) < 2:
        return make_dataclass("NoConfig", [], frozen=True)
    hints: dict[str, Any] = typing.get_type_hints(train)
    found = hints.get(parameters[1])
    if not isinstance(found, type):
        raise BadInput(
            f"{train.__name__}(run, {parameters[1]}): annotate {parameters[1]} with its config dataclass"
        )
    return found
