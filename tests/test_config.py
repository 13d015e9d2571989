from __future__ import annotations

import enum
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Gt
from stoker import config as configs
from stoker.duration import Duration
from stoker.engine.keys import Patterns
from stoker.errors import BadInput
from stoker.run import values


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = 0
    targets: tuple[str, ...] = ("q", "v")


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 1e-3
    batch_size: Annotated[int, Gt(0)] = 8
    shape: Literal["cosine", "linear"] = "cosine"
    every: Duration = Duration(1, "epoch")
    limit: int | None = None
    shuffle: bool = True
    name: str = "x"
    sizes: tuple[int, ...] = ()
    parts: Patterns = ()
    norm: Annotated[float, Gt(0)] | None = None
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        if self.lr > 10:
            raise ValueError(f"lr={self.lr} is beyond reason")


def test_defaults_then_file_then_command_line(write_file: Callable[[str, Sequence[str]], Path]) -> None:
    file = write_file("c.yaml", ["lr: 1e-4", "batch_size: 16", "lora:", "  rank: 4"])
    found = configs.resolve(Config, ["batch_size=32", "lora.targets=[k]"], file)
    assert found.config == Config(lr=1e-4, batch_size=32, lora=Lora(rank=4, targets=("k",)))
    assert found.sources["lr"] == str(file)
    assert found.sources["batch_size"] == "command line"
    assert found.sources["shape"] == "default"
    assert found.values["lora.rank"] == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=3e-4", {"lr": 3e-4}), ("every=100", {"every": Duration(100, "step")}),
        ("limit=none", {"limit": None}),
        ("limit=5", {"limit": 5}), ("shuffle=false", {"shuffle": False}), ("name=a=b", {"name": "a=b"}),
        ("name=", {"name": ""}), ("shape=linear", {"shape": "linear"}), ("parts=head", {"parts": ("head",)}),
        ("norm=2", {"norm": 2.0}),
    ],
)  # fmt: skip
def test_values_become_what_the_field_is(override: str, expected: dict[str, object]) -> None:
    found = configs.resolve(Config, [override]).config
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=abc", "lr=abc (command line): input should be a valid number"),
        ("batch_sise=4", "unknown key 'batch_sise' (command line); did you mean 'batch_size'?"),
        ("lora.rnak=4", "did you mean 'lora.rank'?"),
        ("lora=4", "lora (command line) is a group of keys: give one of lora.rank, lora.targets"),
        ("batch_size=0", "greater than 0"),
        ("batch_size=1.5", "batch_size is a whole number"),
        ("shape=square", "shape is one of cosine, linear"),
        ("every=soon", "'soon' is not a duration"),
        ("lr", "'lr' is not an override: write key=value"),
        ("lr=11", "beyond reason"),
        ("norm=inf", "norm=inf (command line): must be finite; norm is a number or none"),
        ("norm=nan", "norm=nan (command line): input should be greater than 0"),
        ("parts=[7]", "does not read this as a list of strings"),
        ("shuffle=flase", "shuffle is true or false, for example shuffle=true"),
        ("sizes=[1, b]", "sizes is a list, each a whole number"),
    ],
)
def test_bad_values_say_what_is_allowed(override: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        configs.resolve(Config, [override])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("[who?]", ("who?",)),
        ("[What is 7?, It's `len`]", ("What is 7?", "It's `len`")),
        ("[Who: me]", ("Who: me",)),
        ("[7, yes]", ("7", "yes")),
        ("[who", ("who",)),
        ("{a: b}", ("{a: b}",)),
    ],
)
def test_a_list_of_texts_that_yaml_takes_for_something_else_is_said_with_the_quotes_it_needs(
    given: str, meant: tuple[str, ...]
) -> None:
    with pytest.raises(
        BadInput, match=r"does not read this as a list of strings: .* for the shell: "
    ) as raised:
        configs.resolve(Config, [f"lora.targets={given}"])
    (written,) = shlex.split(str(raised.value).partition("for the shell: ")[2])
    assert configs.resolve(Config, [written]).config.lora.targets == meant


@pytest.mark.parametrize(("given", "expected"), [("[3, 4]", (3, 4)), ("3", (3,)), ("[]", ())])
def test_a_list_of_one_needs_no_brackets(given: str, expected: tuple[int, ...]) -> None:
    assert configs.resolve(Config, [f"sizes={given}"]).config.sizes == expected


@pytest.mark.parametrize(
    ("lines", "said"),
    [(["- a"], "holds a list"), (["lr: [", "x"], "line 3: expected"), (["lrr: 1"], "did you mean 'lr'?"),
     (["lr: 1", "name: a", "lr: 2"], "lr is given twice"),
     (["lora: {rank: 1}", "lora.rank: 2"], "lora.rank is given twice"),
     (["norm: false"], "c.yaml): must be a number; norm is a number or none"),
     (["batch_size: yes"], "must be a number; batch_size is a whole number")],
)  # fmt: skip
def test_bad_files_are_refused(lines: list[str], said: str, write_file: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=r"c\.yaml") as error:
        configs.resolve(Config, [], write_file("c.yaml", lines))
    assert said in str(error.value)


@pytest.mark.parametrize("line", ["lora.targets: [who?]", "lora.targets: who: it", "\tlr: 1"])
def test_a_file_that_is_no_yaml_is_said_in_one_line_with_its_own(
    line: str, write_file: Callable[..., Path]
) -> None:
    with pytest.raises(BadInput, match=r'c\.yaml, line 2: .* quote strings .*"who\?"') as error:
        configs.resolve(Config, [], write_file("c.yaml", ["lr: 1", line]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ["lora.targets: [who is: it]", "lora.targets: [a, 7]", 'lora.targets: "[b?]"']
)
def test_a_list_in_a_file_that_is_not_of_texts_is_said_as_a_file_needs_it(
    line: str, write_file: Callable[..., Path]
) -> None:
    with pytest.raises(BadInput, match=r'quote each string, as in lora\.targets: \["who\?", "7"\]$'):
        configs.resolve(Config, [], write_file("c.yaml", [line]))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        configs.resolve(Config, [], tmp_path / "none.yaml")


def test_a_key_without_default_must_be_given() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needs:
        path: str

    with pytest.raises(BadInput, match="path needs a value"):
        configs.resolve(Needs)
    assert configs.resolve(Needs, ["path=a"]).config == Needs(path="a")


@dataclass(frozen=True, kw_only=True)
class Adapter(Lora):
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Part:
    lora: Lora = Lora(rank=2)
    name: str = "part"


@dataclass(frozen=True, kw_only=True)
class Tuned(Config):
    """Overrides the default of an inherited group, and has groups of its own."""

    lora: Lora = field(default_factory=lambda: Lora(rank=3))
    part: Part = Part(lora=Lora(rank=5, targets=("k",)))
    other: Part = field(default_factory=Part)
    adapter: Lora = Adapter(scale=0.5)


def test_the_default_of_a_group_is_where_its_keys_begin(write_file: Callable[..., Path]) -> None:
    found = configs.resolve(Tuned)
    assert found.config == Tuned()
    assert found.values["part.lora.rank"] == 5
    assert found.values["other.lora.rank"] == 2
    assert found.values["adapter.scale"] == 0.5
    assert found.values == configs.record(Tuned()) == configs.restore(Tuned, {}, {}).values
    described = configs.describe(Tuned)
    assert {key: default for key, (_, default) in described.items()}.items() >= {
        "lora.rank": 3, "part.lora.rank": 5, "part.lora.targets": ("k",), "part.name": "part",
        "other.lora.rank": 2, "adapter.scale": 0.5,
    }.items()  # fmt: skip
    file = write_file("c.yaml", ["part:", "  lora: {targets: [v]}"])
    given = configs.resolve(Tuned, ["lora.targets=[k]", "adapter.rank=1"], file)
    assert given.config == Tuned(
        lora=Lora(rank=3, targets=("k",)),
        part=Part(lora=Lora(rank=5, targets=("v",))),
        adapter=Adapter(rank=1, scale=0.5),
    )
    assert configs.restore(Tuned, given.values, given.sources) == given
    assert configs.drift(configs.record(Tuned(part=Part())), found.values) == {
        "part.lora.rank": (2, 5), "part.lora.targets": (["q", "v"], ["k"])
    }  # fmt: skip


def test_a_config_with_other_groups_than_its_defaults_is_recorded_as_it_is() -> None:
    assert configs.record(Tuned(adapter=Lora(rank=7)))["adapter.rank"] == 7
    assert configs.record(Config(lora=Adapter(scale=3)))["lora.scale"] == 3


def test_a_group_that_its_class_makes_may_have_keys_without_a_default() -> None:
    needs = make_dataclass("Needs", [("path", str), ("rank", int, field(default=1))], frozen=True)
    group = make_dataclass("Group", [("needs", needs, field(default_factory=needs))], frozen=True)
    with pytest.raises(BadInput, match=r"needs\.path needs a value"):
        configs.resolve(group)
    assert configs.resolve(group, ["needs.path=a"]).values == {"needs.path": "a", "needs.rank": 1}


def test_a_default_that_is_no_group_is_refused() -> None:
    group = make_dataclass("Group", [("lora", Lora, field(default=None))], frozen=True)
    with pytest.raises(BadInput, match="lora is a group of keys, but its default is None: give it a Lora"):
        configs.resolve(group)


def test_a_record_gives_the_same_config_back() -> None:
    found = configs.resolve(Config, ["lr=3e-4", "every=2ep", "lora.rank=8"])
    assert configs.restore(Config, found.values, found.sources) == found


def test_a_file_may_overrule_what_it_merges(write_file: Callable[[str, Sequence[str]], Path]) -> None:
    file = write_file("c.yaml", ["lora: &base {rank: 1}", "<<: {lr: 2, name: a}", "lr: 3"])
    assert configs.resolve(Config, [], file).config == Config(lr=3, name="a", lora=Lora(rank=1))


def test_one_value_is_checked_alone() -> None:
    assert configs.checked(Config, "every", "2 epochs") == "2ep"
    assert configs.checked(Config, "limit", "none") is None
    with pytest.raises(BadInput, match=r"batch_size=0 \(here\): input should be greater than 0"):
        configs.checked(Config, "batch_size", "0", "here")
    with pytest.raises(BadInput, match=r"unknown key 'lrr' \(here\); did you mean 'lr'"):
        configs.checked(Config, "lrr", "0", "here")


@pytest.mark.parametrize(
    ("key", "kinds"),
    [("batch_size", {int}), ("limit", {int, type(None)}), ("shape", {Literal}), ("every", {Duration}),
     ("lora.targets", {tuple})],
)  # fmt: skip
def test_kinds_are_types_without_constraints(key: str, kinds: set[object]) -> None:
    assert configs.kinds(Config, key) == kinds


def test_changed_keys_are_drift() -> None:
    found = configs.resolve(Config, ["lr=3e-4"])
    after = configs.changed(found, ["lr=1e-4", "lora.rank=2"])
    assert after.config == Config(lr=1e-4, lora=Lora(rank=2))
    assert configs.drift(found.values, after.values) == {"lr": (3e-4, 1e-4), "lora.rank": (0, 2)}


class Kind(enum.Enum):
    SMALL = "small"
    BIG = "big"


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Own:
    kind: Kind = Kind.SMALL
    hidden: list[int] = field(default_factory=lambda: [32, 16])
    weights: dict[str, float] = field(default_factory=dict)
    steps: list[int] | None = None
    inner: Inner | None = None


def test_a_mapping_is_a_value_where_a_key_takes_one(write_file: Callable[[str, Sequence[str]], Path]) -> None:
    by_file = configs.resolve(Own, [], write_file("c.yaml", ["weights: {a: 1}"]))
    by_command = configs.resolve(Own, ["weights={a: 1}"])
    assert by_file.config.weights == by_command.config.weights == {"a": 1.0}
    assert configs.restore(Own, by_file.values, by_file.sources).config == by_file.config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "hidden=[1, a]",
            "item 2: input should be a valid integer.*hidden is a list, each a whole number, for",
        ),
        ("steps=[1.5]", "item 1: input should be a valid integer"),
        ("weights={a: b}", "'a': input should be a valid number.*weights is a mapping, each value a number"),
        (
            "weights.a=1",
            r"weights is a single key, a mapping, each value a number: write weights='\{a: \.\.\.\}'$",
        ),
        ("inner.lr=1", r"inner is a single key, Inner or none: write inner='\{lr: \.\.\.\}'$"),
        ("kind=huge", "input should be 'small' or 'big'; kind is one of small, big, for example kind=small"),
    ],
)
def test_what_is_wrong_within_a_value_is_said_with_its_place(override: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        configs.resolve(Own, [override])


def test_a_path_may_look_like_a_list() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Reads:
        file: Path = Path()

    assert configs.resolve(Reads, ["file=[a].txt"]).config.file == Path("[a].txt")


def test_a_key_of_a_recipe_without_a_config_says_how_it_gets_one() -> None:
    with pytest.raises(BadInput, match="the script takes no keys: to declare some, annotate the second"):
        configs.resolve(make_dataclass("NoConfig", [], frozen=True), ["lr=1"])


@dataclass(frozen=True, kw_only=True)
class Derived:
    lr: float = 0.1
    warm: float | None = None

    def __post_init__(self) -> None:
        if self.warm is None:
            object.__setattr__(self, "warm", 10 * self.lr)


@dataclass(frozen=True, kw_only=True)
class OfDerived:
    made: Derived = field(default_factory=Derived)
    given: Derived = Derived()


def test_what_a_group_derives_follows_from_the_keys_that_are_given() -> None:
    """However its default is spelled."""
    found = configs.resolve(OfDerived, ["made.lr=1", "given.lr=1"]).config
    assert (found.made.warm, found.given.warm) == (10.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class WithDerived:
    width: int = 4
    hidden: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", 4 * self.width)


def test_a_field_that_is_derived_from_others_is_no_key() -> None:
    found = configs.resolve(WithDerived, ["width=8"])
    assert (found.config.width, found.config.hidden) == (8, 32)
    assert found.values == {"width": 8}
    assert values.of_config(found.config) == {"width": 8}
    with pytest.raises(BadInput, match="unknown key 'hidden'"):
        configs.resolve(WithDerived, ["hidden=3"])
