"""Labelled texts: read from files of every form, and divided so that nothing leaks from split to split."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker import BadInput
from stoker.data import labelled, labelled_sources, python_parts
from stoker.data.labelled import Text, Texts
from stoker.data.labelled_sources import Columns

COLUMNS = Columns("text", "label")
ROWS = [(f"{word} number {n} of many", word) for n in range(20) for word in ("iron", "coal")]


def read(data: Path | str, columns: Columns = COLUMNS, *, share: float = 0.1) -> Texts:
    return labelled_sources.read(str(data), columns, validation=share, test=share)


def write_csv(path: Path, rows: list[tuple[str, str]], names: tuple[str, str] = ("text", "label")) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))


def write_parquet(path: Path, rows: list[tuple[str, str]]) -> None:
    """As `datasets` writes it, with numbers that stand for names."""
    names = datasets.ClassLabel(names=["coal", "iron"])
    columns = {"text": [text for text, _ in rows], "label": [names.str2int(label) for _, label in rows]}
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


# -- the built-in texts -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def docstrings() -> Texts:
    return read("python-docstrings")


def parts(texts: Texts) -> dict[str, list[Text]]:
    return {"train": texts.train, "validation": texts.validation, "test": texts.test}


def test_every_part_of_the_library_has_hundreds_of_docstrings_and_some_in_each_split(
    docstrings: Texts,
) -> None:
    assert docstrings.classes == tuple(sorted(python_parts.PARTS))
    for name, part in parts(docstrings).items():
        counts = Counter(text.label for text in part)
        assert set(counts) == set(docstrings.classes)
        assert min(counts.values()) >= (200 if name == "train" else 5)
        assert max(counts.values()) < 0.2 * len(part), "guessing one part is right in less than a fifth"


def test_no_module_is_in_two_splits(docstrings: Texts) -> None:
    modules = [{text.group for text in part} for part in parts(docstrings).values()]
    assert sum(map(len, modules)) == len(set.union(*modules))


def test_what_is_held_out_is_no_near_copy_of_what_is_learnt(docstrings: Texts) -> None:
    def triples(text: Text) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.text.lower())
        return set(zip(words, words[1:], words[2:], strict=False))

    learnt = [triples(text) for text in docstrings.train]
    for text in [*docstrings.validation[::8], *docstrings.test[::8]]:
        own = triples(text)
        assert all(len(own & other) <= 0.5 * len(own) for other in learnt if own), text


def test_no_docstring_names_the_package_that_it_is_from(docstrings: Texts) -> None:
    for part in parts(docstrings).values():
        for text in part:
            assert not re.search(rf"(?i)\b{re.escape(text.group.partition('.')[0])}\b", text.text)


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"), [("a.csv", write_csv), ("a.jsonl", write_jsonl), ("a.parquet", write_parquet)]
)
def test_every_form_of_file_gives_the_same_texts(
    name: str, write: Callable[[Path, list[tuple[str, str]]], None], tmp_path: Path
) -> None:
    write(tmp_path / name, ROWS)
    found = read(tmp_path / name)
    assert found.classes == ("coal", "iron")
    assert sorted((t.text, t.label) for part in parts(found).values() for t in part) == sorted(ROWS)
    assert {n: len(p) for n, p in parts(found).items()} == {"train": 32, "validation": 4, "test": 4}
    write_jsonl(tmp_path / "same.jsonl", ROWS)
    assert read(tmp_path / "same.jsonl").fingerprint == found.fingerprint


def test_a_folder_has_the_splits_that_its_files_are_named_for_and_the_rest_is_held_out(
    tmp_path: Path,
) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_jsonl(tmp_path / "test-00000-of-00001.jsonl", ROWS[:6])
    found = read(tmp_path)
    assert [(t.text, t.label) for t in found.test] == ROWS[:6]
    assert len(found.train) + len(found.validation) == len(ROWS)
    assert len(found.validation) == 4
    assert found.repeated == sum(t.group in {o.group for o in found.train} for t in found.test) > 0


def test_of_two_hub_splits_for_one_purpose_the_first_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = {"train": ROWS, "validation": ROWS[:8], "eval": ROWS[:4], "test": ROWS[:6]}
    listed = [f"  - split: {name}\n    path: {name}.parquet\n" for name in files]
    for name, rows in files.items():
        write_parquet(tmp_path / f"{name}.parquet", rows)
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{''.join(listed)}---\n"
    )
    found = labelled_sources.of_hub(str(tmp_path), COLUMNS)
    assert {name: len(list(texts)) for name, texts in found.items()} == {
        "train": 40, "validation": 8, "test": 6,
    }  # fmt: skip


def test_a_dataset_of_the_hub_has_its_own_splits_and_names_and_withheld_labels_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the hub's layout goes through the same call as an id."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_parquet(folder / "train.parquet", ROWS)
    write_parquet(folder / "validation.parquet", ROWS[:4])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["coal", "iron"])}
    )
    withheld = {"text": ["a", "b"], "label": [-1, -1]}
    datasets.Dataset.from_dict(withheld, features=features).to_parquet(folder / "test.parquet")
    found = labelled_sources.of_hub(str(folder), COLUMNS)
    assert {name: [(t.text, t.label) for t in some] for name, some in found.items()} == {
        "train": ROWS, "validation": ROWS[:4]
    }  # fmt: skip


def test_labels_that_are_numbers_stand_in_their_order(tmp_path: Path) -> None:
    rows = [(f"text {n}", str(n % 11)) for n in range(110)]
    write_csv(tmp_path / "a.csv", rows)
    assert read(tmp_path / "a.csv").classes == tuple(map(str, range(11)))


def refused(data: Path | str, columns: Columns = COLUMNS) -> str:
    with pytest.raises(BadInput) as caught:
        read(data, columns)
    return str(caught.value)


def test_what_cannot_be_learnt_from_is_said(tmp_path: Path) -> None:
    def said(name: str, content: str, columns: Columns = COLUMNS) -> str:
        (tmp_path / name).write_text(content)
        return refused(tmp_path / name, columns)

    assert "is an empty dataset" in said("empty.csv", "")
    assert "is an empty dataset" in said("blank.csv", "text,label\n  ,a\n")
    assert "no column 'text': set text_column=; its columns are 'txt', 'label'; did you mean 'txt'?" in said(
        "other.csv", "txt,label\na,b\n"
    )
    assert "set label_column=" in said("other.csv", "text,kind\na,b\n")
    assert "line 3: 'label' must be a string, a whole number, or true or false, not null" in said(
        "short.csv", "text,label\na,b\nc\n"
    )
    for_a_comma = "line 3: more fields than the header line names; put a field with a comma in quotes"
    assert for_a_comma in said("comma.csv", "text,label\nfine,pos\nwell, no,neg\n")
    assert "not valid CSV" in said("quote.csv", 'text,label\n"a" b,pos\n')
    assert "not a number (0.5)" in said("float.jsonl", '{"text": "a", "label": 0.5}\n')
    assert "line 1: 'text' must be a string, not a list" in said("list.jsonl", '{"text": [], "label": 1}\n')
    assert "line 1: not JSON" in said("bad.jsonl", "{\n")
    assert "too few" in said("few.csv", "text,label\na,x\nb,x\nc,y\n")
    one = "".join(f"text {n},only\n" for n in range(30))
    assert "every training text has the label 'only'" in said("one.csv", f"text,label\n{one}")
    own = "".join(f"text {n},{n}\n" for n in range(30))
    assert "each of the 30 texts has a different label" in said("own.csv", f"text,label\n{own}")
    assert "unknown file extension" in said("a.docx", "x")


def test_a_label_that_is_only_tested_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", [("a", "steel")])
    assert "the test split has the label 'steel', but the training texts have only" in refused(tmp_path)
    assert "have only coal, iron" in refused(tmp_path)


def test_a_file_of_no_split_among_files_of_splits_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "more.csv", ROWS)
    assert "more.csv belongs to no split, but other files do" in refused(tmp_path)


@pytest.mark.parametrize("folder", ["dev", "test"])
def test_the_name_of_the_folder_with_all_files_is_no_split(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    for name in ("train", "more"):
        write_csv(tmp_path / folder / f"{name}.csv", ROWS)
    assert "more.csv belongs to no split, but other files do" in refused(tmp_path / folder)


def test_labels_that_are_the_same_number_have_one_order() -> None:
    texts = [
        Text(text=f"t{n}", label=label, group=f"t{n}") for n, label in enumerate(["1", "01", "2", "001"])
    ]
    orders = {
        Texts(train=list(those), validation=[], test=[], description="").classes
        for those in itertools.permutations(texts)
    }
    assert orders == {("001", "01", "1", "2")}


def test_a_name_that_is_nearly_a_built_in_one_is_told(tmp_path: Path) -> None:
    assert "did you mean 'python-docstrings'?" in refused("python-docstring")
    assert "does not exist" in refused(tmp_path / "gone.csv")
    assert "without a .jsonl, .csv or .parquet file" in refused(tmp_path)


# -- dividing ---------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), min_size=1, max_size=80),
    st.floats(0.05, 0.45), st.floats(0.05, 0.45),
)  # fmt: skip
def test_whole_groups_are_held_out_nothing_is_lost_and_no_share_is_exceeded(
    drawn: list[tuple[int, str]], validation: float, test: float
) -> None:
    label_of = dict(drawn)
    texts = [Text(str(n), label_of[group], str(group)) for n, (group, _) in enumerate(drawn)]
    found = labelled.held_out(texts, {"validation": validation, "test": test})
    assert sorted(text for part in found.values() for text in part) == sorted(texts)
    groups = [{text.group for text in part} for part in found.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    for label in set(label_of.values()):
        total = sum(text.label == label for text in texts)
        assert any(text.label == label for text in found["train"])
        for name, share in (("validation", validation), ("test", test)):
            assert sum(text.label == label for text in found[name]) <= round(share * total)


def test_a_test_file_without_labels_can_be_left_out(tmp_path: Path) -> None:
    """As competitions have them: its labels are to be predicted."""
    write_csv(tmp_path / "train.csv", ROWS)
    (tmp_path / "test.csv").write_text("text\nof coal or of iron\n")
    with pytest.raises(BadInput, match=r"test.csv has no labels \(no column 'label'\), .*: move it"):
        read(tmp_path)
    with pytest.raises(BadInput, match=r"train.csv, line 2: no column 'kind': set label_column="):
        read(tmp_path, Columns("text", "kind"))
    (tmp_path / "test.csv").unlink()
    assert read(tmp_path).classes == ("coal", "iron")


def test_hidden_files_are_no_data_and_links_are(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_csv(tmp_path / "elsewhere" / "Train.csv", ROWS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    write_csv(tmp_path / "data" / ".ipynb_checkpoints" / "train-checkpoint.csv", ROWS)
    (tmp_path / "data" / "._train.csv").write_bytes(b"\0\5\x16\7")
    found = read(tmp_path / "data")
    assert sum(map(len, parts(found).values())) == len(ROWS)


def test_numbers_on_a_scale_are_no_classes(tmp_path: Path) -> None:
    scale = [(f"text {n}", f"{n / 50:.2f}") for n in range(200)]
    write_csv(tmp_path / "scale.csv", scale)
    with pytest.raises(BadInput, match=r"labels are 200 different numbers, such as 0\.02: .*set label_"):
        read(tmp_path / "scale.csv")
    stars = [(f"text {n}", str(n % 10 / 2)) for n in range(200)]
    write_csv(tmp_path / "stars.csv", stars)
    assert read(tmp_path / "stars.csv").classes == tuple(f"{n / 2:.1f}" for n in range(10))
