"""Images read back from each kind of file, split and augmented."""

from __future__ import annotations

import io
import json
import pickle
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
    with pytest.raises(BadInput, match=r"train-0.parquet, row 1 has the label -1, but there are 3 classes"):
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
    with pytest.raises(BadInput, match="has no column image and label; it has picture"):
        images.read(str(tmp_path / "x.parquet"))
    pq.write_table(pa.table({"image": [b"no image", None], "label": [0, 1]}), tmp_path / "z.parquet")
    rows = images.read(str(tmp_path / "z.parquet"))
    with pytest.raises(BadInput, match=r"z.parquet, row 0 is not a readable image"):
        images.picture(rows, 0)
    with pytest.raises(BadInput, match=r"z.parquet, row 1 contains no image bytes"):
        images.picture(rows, 1)
    pq.write_table(pa.table({"image": [b""], "label": pa.array([None], pa.int64())}), tmp_path / "z.parquet")
    with pytest.raises(BadInput, match=r"z.parquet, row 0 has no label"):
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
