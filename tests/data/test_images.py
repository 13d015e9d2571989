"""Images read back from each kind of file, split and augmented."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from stoker import BadInput
from stoker.data import images
from stoker.data.augment import IMAGENET, Augment, Evaluate
from stoker.data.loader import Loader
from stoker.world import World

CLASSES = ("cat", "dog")
COUNT = 12


def _picture(number: int) -> Image.Image:
    """Of one colour, which says its number."""
    return Image.new("RGB", (48, 40), (number * 20, 255 - number * 20, 7))


def _png(number: int) -> bytes:
    held = io.BytesIO()
    _picture(number).save(held, "png")
    return held.getvalue()


def _folder(path: Path) -> Path:
    for number in range(COUNT):
        file = path / CLASSES[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_png(number))
    return path


def _parquet(path: Path) -> Path:
    path.mkdir()
    for file, numbers in (("a.parquet", range(7)), ("b.parquet", range(7, COUNT))):
        cells = [{"bytes": _png(n), "path": None} for n in numbers]
        pq.write_table(
            pa.table({"image": cells, "label": [CLASSES[n % 2] for n in numbers]}),
            path / file,
            row_group_size=3,
        )
    return path


def _tar(path: Path) -> Path:
    path.mkdir()
    for shard, numbers in (("0.tar", range(5)), ("1.tar", range(5, COUNT))):
        with tarfile.open(path / shard, "w") as target:
            for n in numbers:
                label = f"{n % 2}\n".encode() if n % 3 else json.dumps({"label": n % 2}).encode()
                _add(target, f"{n:05}.png", _png(n))
                _add(target, f"{n:05}.{'cls' if n % 3 else 'json'}", label)
    return path


def _add(target: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    target.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("make", [_folder, _parquet, _tar])
def test_every_image_is_read_with_its_label_in_any_order(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = pickle.loads(pickle.dumps(images.read(str(make(tmp_path / "data")))))  # as workers get it
    assert len(source.labels) == COUNT
    seen = set()
    for index in (5, 0, 11, 4, *range(COUNT)):
        red, green, blue = images.picture(source, index).getpixel((3, 3))
        number = red // 20
        assert (green, blue) == (255 - number * 20, 7)
        assert int(source.labels[index]) == number % 2
        seen.add(number)
    assert seen == set(range(COUNT))
    assert images.read(str(tmp_path / "data")).fingerprint == source.fingerprint


def test_class_names_of_a_hub_dataset_are_its_own(tmp_path: Path) -> None:
    features = {"label": {"names": ["tabby", "beagle", "unseen"], "_type": "ClassLabel"}}
    table = pa.table({"image": [{"bytes": _png(0)}, {"bytes": _png(1)}], "label": [1, 0]})
    about = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "a.parquet")
    source = images.read(str(tmp_path / "a.parquet"))
    assert source.classes == ("tabby", "beagle", "unseen")
    assert source.labels.tolist() == [1, 0]


def test_each_file_numbers_its_classes_itself(tmp_path: Path) -> None:
    for file, names, numbers in (("a", ["tabby", "beagle"], (0, 2)), ("b", ["beagle", "collie"], (1, 3))):
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = pa.table({"image": [{"bytes": _png(n)} for n in numbers], "label": [0, 1]})
        path = tmp_path / f"{file}.parquet"
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)
    source = images.read(str(tmp_path))
    assert source.classes == ("tabby", "beagle", "collie")
    assert source.labels.tolist() == [0, 1, 1, 2]


def test_samples_of_a_shard_whose_names_have_a_dot_are_said_to_be_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as target:
        for n in range(8):
            name = f"img.{n}" if n % 2 else f"{n}"
            _add(target, f"{name}.png", _png(n))
            _add(target, f"{name}.cls", b"%d" % (n // 4))
    source = images.read(str(tmp_path))
    assert len(source.labels) == 4
    (said,) = source.left_out
    assert said.startswith(
        "1 sample without an image, such as img (1.cls, 1.png, 3.cls and 5 more): a sample"
    )


def _hub_dataset(path: Path, **labels: list[int]) -> str:
    """Parquet files as on the hub, one per split, with the numbers of three classes."""
    about = json.dumps({"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}})
    for split, numbers in labels.items():
        table = pa.table({"image": [{"bytes": _png(0)}] * len(numbers), "label": numbers})
        pq.write_table(table.replace_schema_metadata({"huggingface": about}), path / f"{split}-0.parquet")
    return str(path)


def test_a_split_whose_labels_are_withheld_is_not_measured_on(tmp_path: Path) -> None:
    """As in ImageNet: its test labels are all -1, which is not the last class."""
    source = images.read(_hub_dataset(tmp_path, train=[0, 1, 2] * 6, validation=[2, 0], test=[-1] * 5))
    parts = images.split(source, validation=0.1, test=0.1)
    assert [len(parts.validation), len(parts.train) + len(parts.test)] == [2, 18]
    used = np.concatenate([parts.train, parts.validation, parts.test])
    assert sorted(source.labels[used].tolist()) == sorted([0, 1, 2] * 6 + [2, 0])


def test_a_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"train-0.parquet, row 1: the label is -1, but the dataset has 3"):
        images.read(_hub_dataset(tmp_path, train=[0, -1, 2], validation=[2, 0]))


def test_data_without_a_split_to_train_on_is_refused(tmp_path: Path) -> None:
    source = images.read(_hub_dataset(tmp_path, validation=[2, 0, 1], test=[0, 1]))
    with pytest.raises(BadInput, match="no train split to train on: the data has test and validation"):
        images.split(source, validation=0.1, test=0.1)


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is on the right
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "cat" / "a.jpg", exif=exif)
    assert images.picture(images.read(str(tmp_path)), 0).size == (20, 40)


def test_an_image_with_16_bits_of_grey_is_not_white(tmp_path: Path) -> None:
    """As radiographs and microscopes have: Pillow alone would limit it to the darkest 255 greys."""
    (tmp_path / "cat").mkdir()
    greys = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(greys * 257).save(tmp_path / "cat" / "a.png")
    found = np.asarray(images.picture(images.read(str(tmp_path)), 0))
    assert (found == greys[:, :, None]).all()


def test_digits_are_built_in() -> None:
    source = images.read("digits")
    assert len(source.labels) == 1797
    assert source.classes == tuple("0123456789")
    assert images.picture(source, 0).size == (8, 8)


def test_splits_are_disjoint_complete_and_the_seeds_alone() -> None:
    source = images.read("digits")
    parts = images.split(source, validation=0.1, test=0.2, seed=3)
    numbers = np.concatenate([parts.train, parts.validation, parts.test])
    assert sorted(numbers.tolist()) == list(range(1797))
    assert abs(len(parts.validation) - 180) < 40
    assert abs(len(parts.test) - 359) < 50
    again = images.split(source, validation=0.1, test=0.2, seed=3)
    assert all(np.array_equal(getattr(parts, n), getattr(again, n)) for n in vars(parts))
    other = images.split(source, validation=0.1, test=0.2, seed=4)
    assert not np.array_equal(parts.test, other.test)


def _named(source: images.Source, parts: images.Splits) -> dict[str, str]:
    """The split of each image, by its location."""
    return {source.place(n): name for name, those in vars(parts).items() for n in those.tolist()}


@pytest.mark.parametrize("make", [_folder, _tar])
@pytest.mark.parametrize("seed", range(5))
def test_images_that_come_and_go_change_the_split_of_no_other(
    make: Callable[[Path], Path], seed: int, tmp_path: Path
) -> None:
    """So a run that resumes after a broken image is removed is not tested on what it was trained on."""

    def split() -> dict[str, str]:
        source = images.read(str(tmp_path / "data"))
        return _named(source, images.split(source, validation=0.3, test=0.3, seed=seed))

    make(tmp_path / "data")
    if make is _folder:
        _more(tmp_path / "data", 60)
        before = split()
        for file in ("cat/00.png", "dog/07.png", "cat/more-10.png"):
            (tmp_path / "data" / file).unlink()
    else:
        before = split()
        (tmp_path / "data" / "1.tar").rename(tmp_path / "data" / "2.tar")
        before = {name.replace("1.tar", "2.tar"): part for name, part in before.items()}
        with tarfile.open(tmp_path / "data" / "1.tar", "w") as target:
            for n in range(20, 30):
                _add(target, f"{n:05}.png", _png(n % 10))
                _add(target, f"{n:05}.cls", b"0")
    after = split()
    both = before.keys() & after.keys()
    assert len(both) >= COUNT
    assert {name: after[name] for name in both} == {name: before[name] for name in both}


def _more(path: Path, count: int) -> None:
    for number in range(count):
        (path / CLASSES[number % 2] / f"more-{number}.png").write_bytes(_png(number % 12))


@pytest.mark.parametrize("seed", range(20))
def test_few_images_are_in_every_split_and_each_class_is_trained_on(seed: int, tmp_path: Path) -> None:
    for name, count in (("cat", 2), ("dog", 2), ("cow", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.png").write_bytes(_png(number))
    source = images.read(str(tmp_path))
    parts = images.split(source, validation=0.1, test=0.1, seed=seed)
    assert min(len(parts.validation), len(parts.test)) > 0
    assert set(source.labels[parts.train].tolist()) == {0, 1, 2}


def test_splits_that_are_folders_are_used_as_they_are(tmp_path: Path) -> None:
    _folder(tmp_path / "data" / "train")
    _folder(tmp_path / "data" / "val")
    source = images.read(str(tmp_path / "data"))
    parts = images.split(source, validation=0.1, test=0.25)
    assert source.classes == CLASSES
    assert len(parts.train) + len(parts.test) == COUNT
    assert parts.validation.tolist() == list(range(COUNT, 2 * COUNT))
    assert not set(parts.train) & set(parts.validation)


def test_a_folder_of_training_images_alone_is_no_class(tmp_path: Path) -> None:
    _folder(tmp_path / "data" / "train")
    source = images.read(str(tmp_path / "data"))
    assert source.classes == CLASSES
    parts = images.split(source, validation=0.1, test=0.25)
    assert min(map(len, vars(parts).values())) > 0
    assert sum(map(len, vars(parts).values())) == COUNT


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_a_function_of_seed_epoch_and_sample(size: int, workers: int, tmp_path: Path) -> None:
    source = images.read(str(_noisy(tmp_path / "data")))
    dataset = images.Images(source, np.arange(COUNT), Augment(size, *IMAGENET))
    here = Loader(dataset, batch_size=4, world=World(), seed=1).batches(0)
    there = Loader(dataset, batch_size=4, world=World(), seed=1, workers=workers).batches(8)
    first = [next(here) for _ in range(4)]
    assert torch.equal(first[2]["pixel_values"], next(there)["pixel_values"]), "from the middle of an epoch"
    assert first[0]["pixel_values"].shape == (4, 3, size, size)
    assert (
        len({tuple(image.flatten()[:50].tolist()) for b in first[:3] for image in b["pixel_values"]}) == COUNT
    )


def _noisy(path: Path) -> Path:
    drawn = np.random.default_rng(0)
    for number in range(COUNT):
        file = path / CLASSES[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 255, (80, 100, 3), dtype=np.uint8)).save(file)
    return path


def test_evaluation_takes_the_centre_and_normalises() -> None:
    image = Image.new("RGB", (100, 60), (255, 0, 0))
    image.paste((0, 255, 0), (35, 15, 65, 45))
    pixels = Evaluate(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(image)
    assert pixels.shape == (3, 64, 64)
    assert pixels[:, 32, 32].tolist() == [-1.0, 1.0, -1.0]
    assert pixels[:, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_files_named_after_splits_are_those(tmp_path: Path) -> None:
    for name, count in (("train-00000-of-00002", 5), ("train-00001-of-00002", 4), ("test-00000-of-00001", 3)):
        rows = pa.table({"image": [_png(n) for n in range(count)], "label": [n % 2 for n in range(count)]})
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    source = images.read(str(tmp_path))
    splits = images.split(source, validation=0.3, test=0.5)
    assert len(splits.train) + len(splits.validation) == 9
    assert splits.test.tolist() == [0, 1, 2], "files are in the order of their names"
    assert source.place(4).endswith("train-00000-of-00002.parquet, row 1")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist: give digits, a folder"):
        images.read(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="contains no images"):
        images.read(str(tmp_path / "empty"))
    loose = _folder(tmp_path / "loose")
    (loose / "stray.png").write_bytes(_png(1))
    with pytest.raises(BadInput, match=r"stray.png has no label: images must be in one folder per class"):
        images.read(str(loose))
    broken = _folder(tmp_path / "broken")
    (broken / "cat" / "00.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"00.png is not a readable image: its 8 bytes are in no format"):
        images.picture(images.read(str(broken)), 0)
    pq.write_table(pa.table({"picture": [b""]}), tmp_path / "x.parquet")
    with pytest.raises(BadInput, match=r"x.parquet: no column 'label': set label_column=; its columns are"):
        images.read(str(tmp_path / "x.parquet"))
    pq.write_table(pa.table({"image": [b"no image"], "label": [0]}), tmp_path / "z.parquet")
    rows = images.read(str(tmp_path / "z.parquet"))
    with pytest.raises(BadInput, match=r"z.parquet, row 0 is not a readable image"):
        images.picture(rows, 0)
    for cell, said in ((None, ""), ({"bytes": None, "path": "a/b.png"}, ", only the path a/b.png")):
        pq.write_table(pa.table({"image": [cell], "label": [1]}), tmp_path / "z.parquet")
        with pytest.raises(BadInput, match=rf"row 0: 'image' contains no image bytes{said}: write"):
            images.read(str(tmp_path / "z.parquet"))
    pq.write_table(pa.table({"image": [b""], "label": pa.array([None], pa.int64())}), tmp_path / "z.parquet")
    with pytest.raises(BadInput, match=r"z.parquet, row 0: 'label' must be a string, .* not null"):
        images.read(str(tmp_path / "z.parquet"))
    (tmp_path / "w.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match=r"w.parquet is not a Parquet file"):
        images.read(str(tmp_path / "w.parquet"))
    with tarfile.open(tmp_path / "x.tar", "w") as target:
        _add(target, "a.png", _png(0))
    with pytest.raises(BadInput, match=r"a has no label: add a.cls"):
        images.read(str(tmp_path / "x.tar"))
    for content, said in ((b"{", "not JSON"), (b"[1]", "must be a JSON object")):
        with tarfile.open(tmp_path / "x.tar", "w") as target:
            _add(target, "a.png", _png(0))
            _add(target, "a.json", content)
        with pytest.raises(BadInput, match=rf"x\.tar, a\.json: {said}"):
            images.read(str(tmp_path / "x.tar"))
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(BadInput, match="is not an uncompressed tar file"):
        images.read(str(tmp_path / "y.tar"))
    one = tmp_path / "one" / "cat"
    one.mkdir(parents=True)
    (one / "a.png").write_bytes(_png(0))
    with pytest.raises(BadInput, match="1 images are too few"):
        images.split(images.read(str(one.parent)), validation=0.1, test=0.1)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["0", "007", "3"], ("0", "1", "2", "3", "4", "5", "6", "7")),
        (["20000002", "20000000", "20000001"], ("20000000", "20000001", "20000002")),
        (["dog", "7"], ("7", "dog")),
    ],
)
def test_numbers_are_counted_from_zero_unless_they_are_ids(
    tmp_path: Path, labels: list[str], classes: tuple[str, ...]
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as target:
        for n, label in enumerate(labels):
            _add(target, f"{n}.png", _png(n))
            _add(target, f"{n}.cls", label.encode())
    source = images.read(str(tmp_path / "x.tar"))
    assert source.classes == classes
    expected = [label if label in classes else str(int(label)) for label in labels]
    assert [classes[n] for n in source.labels] == expected


# -- folders as people have them --------------------------------------------------------------


def _class_folders(path: Path, *classes: str, count: int = 10, ending: str = ".png") -> Path:
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            _picture(number).save(path / name / f"{n}{ending}")
    return path


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Train", "Test"), {"train", "test"}),
        (("training", "validation", "testing"), {"train", "validation", "test"}),
        (("TRAIN", "Eval"), {"train", "validation"}),
    ],
)
def test_names_of_splits_are_known_in_any_spelling(
    tmp_path: Path, names: tuple[str, ...], splits: set[str]
) -> None:
    for name in names:
        _class_folders(tmp_path / name, *CLASSES)
    source = images.read(str(tmp_path))
    assert source.classes == CLASSES
    assert {name: len(those) for name, those in source.given.items()} == dict.fromkeys(splits, 20)


def test_splits_next_to_other_folders_are_no_classes(tmp_path: Path) -> None:
    for name in ("train", "val", "extra"):
        _class_folders(tmp_path / name, *CLASSES)
    with pytest.raises(BadInput, match=r"train, val, which are named as splits, next to extra: .*move"):
        images.read(str(tmp_path))


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    assert images.read(str(_class_folders(tmp_path / "a", "exam", "test"))).classes == ("exam", "test")
    nested = _class_folders(tmp_path / "b" / "train", "exam", "test").parent
    assert images.read(str(nested)).classes == ("exam", "test")


def test_hidden_files_and_folders_are_no_data(tmp_path: Path) -> None:
    _class_folders(tmp_path, *CLASSES, ".ipynb_checkpoints", "__MACOSX", count=5)
    for name in ("._0.png", ".DS_Store"):
        (tmp_path / "cat" / name).write_bytes(b"\0\5\x16\7")
    source = images.read(str(tmp_path))
    assert (source.classes, len(source.labels), source.left_out) == (CLASSES, 10, ())


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    elsewhere = _class_folders(tmp_path / "elsewhere", "bird", count=5)
    data = _class_folders(tmp_path / "data", *CLASSES, count=5)
    (data / "bird").symlink_to(elsewhere / "bird")
    (data / "cat" / "linked.png").symlink_to(elsewhere / "bird" / "0.png")
    (data / "cat" / "up").symlink_to(data)
    (data / "dog" / "outside").symlink_to(tmp_path)
    source = images.read(str(data))
    assert source.classes == ("bird", *CLASSES)
    assert np.bincount(source.labels).tolist() == [5, 6, 5]
    (data / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"gone.png cannot be read \(No such file or directory\): restore"):
        images.read(str(data))


def test_images_of_other_forms_are_read_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    _class_folders(tmp_path, "cat")
    _class_folders(tmp_path, "dog", ending=".tif")
    (tmp_path / "bird").mkdir()
    for name in ("bird/a.xcf", "bird/b.xcf", "cat/notes.txt", "readme"):
        (tmp_path / name).write_bytes(b"")
    source = images.read(str(tmp_path))
    assert source.classes == CLASSES
    assert images.picture(source, 15).size == (48, 40)
    assert source.left_out == (
        "4 files (2 .xcf, 1 .txt, 1 readme)", "the folders without images bird, which are no classes",
    )  # fmt: skip
    splits = images.split(source, validation=0.2, test=0.2)
    assert re.fullmatch(
        r"20 images, 2 classes, the largest, \w+, with [\d.]+% of the \d+ training images; "
        r"\d+ for validation, \d+ for the test; left out: 4 files .*; the folders without images bird, .*",
        images.describe(source, splits),
    )


def test_class_folders_next_to_an_archive_are_what_is_read(tmp_path: Path) -> None:
    _class_folders(tmp_path, *CLASSES)
    with tarfile.open(tmp_path / "backup.tar", "w") as target:
        target.add(tmp_path / "cat")
    source = images.read(str(tmp_path))
    assert (source.classes, len(source.labels), source.left_out) == (CLASSES, 20, ("1 file (1 .tar)",))


def test_a_picture_next_to_parquet_files_is_no_class(tmp_path: Path) -> None:
    _parquet(tmp_path / "data")
    (tmp_path / "data" / "assets").mkdir()
    (tmp_path / "data" / "assets" / "cover.png").write_bytes(_png(0))
    source = images.read(str(tmp_path / "data"))
    assert (source.classes, source.left_out) == (CLASSES, ("1 file (1 .png)",))


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert images.read(str(_class_folders(tmp_path / "a", *map(str, range(12)), count=1))).classes == tuple(
        map(str, range(12))
    )
    assert images.read(str(_class_folders(tmp_path / "b", "010", "2", "x", count=1))).classes == (
        "010", "2", "x",
    )  # fmt: skip


def test_there_must_be_something_to_learn(tmp_path: Path) -> None:
    one = images.read(str(_class_folders(tmp_path / "one", "cat")))
    with pytest.raises(BadInput, match="every training image has the class 'cat', so there is nothing to"):
        images.split(one, validation=0.1, test=0.1)
    _class_folders(tmp_path / "more" / "train", *CLASSES)
    _class_folders(tmp_path / "more" / "val", "cat", "zebra")
    with pytest.raises(BadInput, match=r"validation images have the class 'zebra', but .* only cat, dog"):
        images.split(images.read(str(tmp_path / "more")), validation=0.1, test=0.1)


def test_a_test_split_without_labels_can_be_left_out(tmp_path: Path) -> None:
    _class_folders(tmp_path / "train", *CLASSES)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.png").write_bytes(_png(1))
    with pytest.raises(BadInput, match=r"1.png has no label: .*without labels .*: move test elsewhere"):
        images.read(str(tmp_path))


def test_a_single_image_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(0))
    with pytest.raises(BadInput, match=r"a.png is a single file: give a folder"):
        images.read(str(tmp_path / "a.png"))


# -- images that cannot be used ---------------------------------------------------------------


def test_an_image_that_vanished_or_is_huge_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = images.read(str(_class_folders(tmp_path, *CLASSES)))
    (tmp_path / "cat" / "0.png").unlink()
    with pytest.raises(BadInput, match=r"cat/0.png cannot be read any more \(No such file .*: restore it"):
        images.picture(source, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BadInput, match=r"cat/1.png is too large to be decoded: .*scale it down, or"):
        images.picture(source, 1)


def test_an_image_of_fractions_is_not_taken_for_black(tmp_path: Path) -> None:
    _class_folders(tmp_path, *CLASSES, count=1)
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "cat" / "0.tif")
    with pytest.raises(BadInput, match=r"0.tif is not a readable image: its pixels are fractions"):
        images.picture(images.read(str(tmp_path)), 1)


# -- Parquet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0.5, float("nan"), "", [0, 1], {"a": 1}])
def test_a_label_that_names_no_class_is_refused(tmp_path: Path, label: object) -> None:
    pq.write_table(pa.table({"image": [_png(0)], "label": [label]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"row 0: 'label' must be a string, a whole number, or true"):
        images.read(str(tmp_path / "a.parquet"))


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    """As in CIFAR-100 on the hub."""
    table = pa.table({"img": [_png(0), _png(1)], "fine_label": [True, False], "coarse_label": [3, 4]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"no column 'label': set label_column=; its columns are 'img', 'fine"):
        images.read(str(tmp_path / "a.parquet"))
    with pytest.raises(BadInput, match=r"no column 'image': set image_column=.* did you mean 'img'"):
        images.read(str(tmp_path / "a.parquet"), images.Columns(label="fine_label"))
    source = images.read(str(tmp_path / "a.parquet"), images.Columns("img", "fine_label"))
    assert (source.classes, source.labels.tolist()) == (("false", "true"), [1, 0])


def test_files_of_one_dataset_may_hold_images_in_different_forms(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [_png(0)], "label": ["cat"]}), tmp_path / "a.parquet")
    cells, labels = [{"path": "b.png", "bytes": _png(1)}], pa.array(["dog"]).dictionary_encode()
    pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "b.parquet")
    source = images.read(str(tmp_path))
    assert source.classes == CLASSES
    assert [images.picture(source, n).getpixel((0, 0))[0] for n in (0, 1)] == [0, 20]


def test_a_file_written_anew_is_read_anew_whatever_its_time(tmp_path: Path) -> None:
    def written(*numbers: int) -> images.Source:
        cells = [_png(n) for n in numbers]
        pq.write_table(pa.table({"image": cells, "label": [str(n) for n in numbers]}), tmp_path / "a.parquet")
        os.utime(tmp_path / "a.parquet", (1e9, 1e9))
        return images.read(str(tmp_path / "a.parquet"))

    first, second = written(1, 2), written(2, 1)
    for source, red in ((first, [20, 40]), (second, [40, 20])):
        assert [images.picture(source, n).getpixel((0, 0))[0] for n in (0, 1)] == red
        assert [20 * int(source.classes[label]) for label in source.labels] == red
    assert first.fingerprint != second.fingerprint


def test_a_row_keeps_its_split_when_rows_before_it_are_removed(tmp_path: Path) -> None:
    def split(begin: int) -> dict[bytes, str]:
        cells = [_png(n) for n in range(begin, COUNT)]
        labels = [n % 2 for n in range(begin, COUNT)]
        pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "a.parquet")
        source = images.read(str(tmp_path / "a.parquet"))
        parts = images.split(source, validation=0.3, test=0.3)
        return {source.raw(n): name for name, those in vars(parts).items() for n in those.tolist()}

    before, after = split(0), split(2)
    assert {image: before[image] for image in after} == after


def test_files_of_no_split_next_to_others_are_refused(tmp_path: Path) -> None:
    for name in ("train-0", "extra-0"):
        pq.write_table(pa.table({"image": [_png(0)], "label": [0]}), tmp_path / f"{name}.parquet")
    with pytest.raises(BadInput, match=r"extra-0.parquet belongs to no split, but other files do"):
        images.read(str(tmp_path))
