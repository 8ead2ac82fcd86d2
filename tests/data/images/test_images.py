"""Sources of images and the batches that are made of them."""

import io
import types
import zlib
from pathlib import Path

import google_crc32c
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.images import loader, sources
from data.images.loader import Augmentation
from tests.data.images.pictures import jpeg, make_folder, picture

AUGMENTATION = Augmentation(size=16, crop="imagenet", operations=2, magnitude=10, mixup=0.1)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images")


def open_folder(folder, max_broken=0):
    broken = sources.Broken(max_broken)
    train, validation = sources.open_images(str(folder), broken)
    return train, validation, broken


def train(images, broken, start=0, stop=4, workers=1, sharding=None, seed=0):
    batches = loader.train_batches(
        images, AUGMENTATION, broken, batch_size=8, seed=seed, start_step=start, stop_step=stop,
        sharding=sharding, workers=workers,
    )  # fmt: skip
    with batches:
        return [jax.tree.map(np.asarray, batch) for _, batch in batches]


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_threads_devices_and_resuming_change_no_byte(folder):
    images, _, broken = open_folder(folder)
    alone = train(images, broken)
    equal(train(images, broken, workers=8), alone)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    equal(train(images, broken, sharding=NamedSharding(mesh, PartitionSpec("data"))), alone)
    equal(train(images, broken, start=2), alone[2:])
    assert (train(images, broken, seed=1)[0]["images"] != alone[0]["images"]).any()


def test_hosts_together_have_the_batch_of_one(folder, monkeypatch):
    images, _, broken = open_folder(folder)
    whole = train(images, broken, stop=1)[0]

    class Half:  # the sharding of a host that has half of the rows
        def __init__(self, first):
            self.first = first

        def addressable_devices_indices_map(self, shape):
            return {"device": (slice(self.first, self.first + 4),)}

    read = []
    monkeypatch.setattr(loader, "global_batch", lambda parts, *_: read.append(parts) or {})
    for first in (0, 4):
        train(images, broken, stop=1, sharding=Half(first))
        own = read.pop()(first, first + 4)
        equal(own, {name: array[first : first + 4] for name, array in whole.items()})


def test_an_epoch_has_every_image_once(folder):
    images, _, broken = open_folder(folder)
    labels = np.concatenate([batch["labels"] for batch in train(images, broken, stop=27)])
    assert np.bincount(labels).tolist() == [72, 72, 72]  # 8 epochs of 27


def test_partners_are_the_images_before(folder):
    images, _, broken = open_folder(folder)
    for batch in train(images, broken):
        equal(batch["partners"], np.roll(batch["images"], 1, axis=0))
        equal(batch["partner_labels"], np.roll(batch["labels"], 1))
        assert len(set(batch["shares"].tolist())) == 1
        assert len(set(batch["noise"].tolist())) == 8


def test_no_two_streams_of_a_batch_are_the_same(folder, monkeypatch):
    keys = []

    class Recorded(loader.Draws):
        def __init__(self, *key):
            keys.append(key)
            super().__init__(*key)

    monkeypatch.setattr(loader, "Draws", Recorded)
    images, _, broken = open_folder(folder)
    train(images, broken, stop=2)
    this = {key for key in keys if key[1] == 1}
    assert len(this) == 8 + 8 + 1  # augmentation and noise of each, and mixup
    assert len({loader.Draws(*key).bits() for key in this}) == len(this)


def test_evaluation_reads_each_image_once_and_fills_up(folder):
    _, validation, broken = open_folder(folder)
    batches = list(
        loader.eval_batches(
            validation, AUGMENTATION, broken, batch_size=4, sharding=None, workers=2
        )
    )
    assert [batch["weights"].sum() for batch in batches] == [4, 4, 1]
    assert (
        np.concatenate([b["labels"] for b in batches])[:9].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    )
    assert (np.asarray(batches[-1]["images"][1:]) == 0).all()


def test_broken_images_are_named_counted_and_left_out(folder, caplog):
    whole = (folder / "train/n02/n02_3.JPEG").read_bytes()
    (folder / "train/n02/n02_3.JPEG").write_bytes(whole[:300])
    (folder / "train/n01/n01_1.JPEG").write_text("no image")
    (folder / "train/n01/n01_2.JPEG").write_bytes(png_of_size(100_000))
    (folder / "train/n00").mkdir()
    (folder / "train/n00/notes.txt").write_text("no image, by its name")
    images, _, broken = open_folder(folder, max_broken=4)
    assert images.classes == ["n00", "n01", "n02", "n03"]
    assert len(images) == 27
    batches = train(images, broken, stop=4) + train(images, broken, stop=4)
    assert {name.removeprefix(str(folder)) for name in broken.names} == {
        "/train/n00", "/train/n02/n02_3.JPEG", "/train/n01/n01_1.JPEG",
        "/train/n01/n01_2.JPEG",
    }  # fmt: skip
    assert sum(8 - batch["weights"].sum() for batch in batches) >= 3
    for batch in batches:
        lonely = np.roll(batch["weights"], 1) == 0
        assert (batch["shares"][lonely] == 1).all()
    assert "n02_3.JPEG: a JPEG that is cut off" in caplog.text


def png_of_size(side):
    """A PNG whose header says so, with one row of nothing."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + check.to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    rows = zlib.compress(bytes(3 * side + 1))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


@pytest.mark.parametrize("limit", [0, 1])
def test_too_many_broken_ones_end_it(folder, limit):
    for i in range(limit + 1):
        (folder / f"train/n02/n02_{i}.JPEG").write_bytes(b"")
    images, _, broken = open_folder(folder, max_broken=limit)
    with pytest.raises(sources.TooManyBroken) as error:
        train(images, broken)
    assert f"images.max_broken={limit}: {folder}" in str(error.value)
    assert "other data by --allow_config_change" in str(error.value)
    assert "the file is empty" in str(error.value)


def test_an_empty_class_counts(folder):
    (folder / "train/n09").mkdir()
    with pytest.raises(sources.TooManyBroken) as error:
        open_folder(folder)
    assert "n09: no image of this class" in str(error.value)


def test_imagenet_v2_has_classes_by_number(folder, tmp_path):
    images, _, broken = open_folder(folder)
    for name in ("0", "2", "1"):
        (tmp_path / "v2" / name).mkdir(parents=True)
        (tmp_path / "v2" / name / "a.jpeg").write_bytes(jpeg(picture(int(name))))
    test = sources.open_test_images(str(tmp_path / "v2"), images, broken)
    assert [test.read(i).label for i in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"images\.test='nowhere': no such folder; give one that"):
        sources.open_test_images("nowhere", images, broken)
    (tmp_path / "v2" / "3").mkdir()
    with pytest.raises(ValueError, match="no class of training has this name"):
        sources.open_test_images(str(tmp_path / "v2"), images, broken)


def folder_of_classes(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "a.jpeg").write_bytes(jpeg(picture(len(name))))
    return str(root)


def test_a_folder_has_the_labels_of_what_is_trained_on(tmp_path):
    """Whatever that is, and though not all classes are there."""
    digits, _ = sources.open_images("digits", sources.Broken(0))
    some = folder_of_classes(tmp_path / "some", "5", "7")
    test = sources.open_test_images(some, digits, sources.Broken(0))
    assert [test.read(i).label for i in range(2)] == [5, 7]
    one_to_three = make_folder(tmp_path / "numbers", classes=("1", "2", "3"))
    numbers, _ = sources.open_images(str(one_to_three), sources.Broken(0))
    name = folder_of_classes(tmp_path / "zero", "0", "1")
    with pytest.raises(ValueError, match="0: no class of training has this name, as '1' is one"):
        sources.open_test_images(name, numbers, sources.Broken(0))
    for other in ("10", "five"):
        name = folder_of_classes(tmp_path / other, "5", other)
        with pytest.raises(
            ValueError, match=f"{other}: no class of training has this name, as '0'"
        ):
            sources.open_test_images(name, digits, sources.Broken(0))
    with pytest.raises(
        ValueError, match=r"images\.test='digits': no such folder; give one that has"
    ):
        sources.open_test_images("digits", digits, sources.Broken(0))


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (["n01", "n02"], ""),
        (["0", "1", "2"], ""),
        (["n02", "n01"], "label 0 is 'n02' there and 'n01' in training"),
        (["n01", "n02", "n03", "n04"], "4 classes, and training has 3"),
    ],
)
def test_a_set_of_other_classes_is_refused(folder, monkeypatch, theirs, words):
    images, _, broken = open_folder(folder)
    prepared = types.SimpleNamespace(classes=theirs)
    monkeypatch.setattr(sources, "TfdsImages", lambda *_: prepared)
    if not words:
        assert sources.open_test_images("tfds:x:1.0.0", images, broken) is prepared
        return
    with pytest.raises(ValueError, match=f"images.test=tfds:x:1.0.0: {words}"):
        sources.open_test_images("tfds:x:1.0.0", images, broken)


def test_a_part_of_a_split_is_taken_all_over_it(folder):
    """A folder's first images are of its first classes."""
    images, _, broken = open_folder(folder)

    def labels(max_batches):
        batches = loader.eval_batches(
            images, AUGMENTATION, broken, batch_size=9, sharding=None, workers=2,
            max_batches=max_batches,
        )  # fmt: skip
        return np.concatenate([batch["labels"] for batch in batches]).tolist()

    assert labels(0) == [0] * 9 + [1] * 9 + [2] * 9
    assert len(labels(1)) == 9
    assert set(labels(1)) == {0, 1, 2}
    assert labels(1) == labels(2)[:9]
    assert sorted(labels(3)) == labels(0)


def test_what_is_not_there_is_named(tmp_path, folder):
    broken = sources.Broken(0)
    with pytest.raises(ValueError, match="no such folder; give one, digits, or tfds:"):
        sources.open_images(str(tmp_path / "none"), broken)
    (folder / "val/n07").mkdir()
    with pytest.raises(ValueError, match="no class of training has this name"):
        sources.open_images(str(folder), broken)


def test_digits_are_those_of_the_package():
    train_images, validation = sources.open_images("digits", sources.Broken(0))
    assert (len(train_images), len(validation)) == (1435, 362)
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    first = train_images.read(0)
    same = np.abs(theirs.images * 255 / 16 - first.image[..., 0]).max((1, 2)) < 1
    assert first.label in theirs.target[same]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_prepared_set_of_tfds_is_read_without_its_pipeline(tmp_path, monkeypatch, file_format):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder("imagenet2012:5.1.0", data_dir=str(tmp_path), file_format=file_format)
    Path(builder.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, 4, file_format=file_format)
    writer.initialize_splits(["train", "validation"])
    for split, count in (("train", 10), ("validation", 3)):
        examples = [
            {"image": io.BytesIO(jpeg(picture(i))), "label": 7 * i, "file_name": f"{i}.JPEG"}
            for i in range(count)
        ]
        writer.add_examples({split: examples})
    writer.close_all()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    images, validation = sources.open_images("tfds:imagenet2012:5.1.0", sources.Broken(0))
    assert (len(images), len(validation), len(images.classes)) == (10, 3, 1000)
    for names in (("5", "7", "999"), [images.classes[label] for label in (5, 7, 999)]):
        folder = folder_of_classes(tmp_path / names[0], *names)
        test = sources.open_test_images(folder, images, sources.Broken(0))
        assert [test.read(i).label for i in range(3)] == [5, 7, 999]
    for i in (7, 0, 9):
        assert images.read(i) == (jpeg(picture(i)), 7 * i)
    assert "imagenet2012/5.1.0/train, example 7" in images.name(7)
    with pytest.raises(ValueError, match=r"images.test=tfds:imagenet2012:5\.1\.0: no split"):
        sources.open_test_images("tfds:imagenet2012:5.1.0", images, sources.Broken(0))
    last = max(Path(builder.data_dir).glob("*-train*"))
    flip(last, 1000)
    images, _ = sources.open_images("tfds:imagenet2012:5.1.0", sources.Broken(0))
    with pytest.raises(OSError, match=r"imagenet2012/5.1.0/train, example \d: ") as error:
        [images.read(i) for i in range(10)]
    assert "\n" not in str(error.value)
    assert file_format == "array_record" or f"{last}: damaged" in str(error.value)
    flip(last, 0 if file_format == "tfrecord" else last.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"damaged or cut off: copy or build the set again"):
        sources.open_images("tfds:imagenet2012:5.1.0", sources.Broken(0))
    with pytest.raises(ValueError, match=r"images.source=tfds:imagenet2012: has no ver"):
        sources.open_images("tfds:imagenet2012", sources.Broken(0))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_of_a_tfrecord_is_an_error_that_names_the_file(tmp_path):
    def checked(part):
        crc = google_crc32c.value(part)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        return part + masked.to_bytes(4, "little")

    path = tmp_path / "x.tfrecord"
    contents = [b"first", b"", b"the third"]
    path.write_bytes(
        b"".join(checked(len(part).to_bytes(8, "little")) + checked(part) for part in contents)
    )
    assert list(sources.TfRecords([str(path)])) == contents
    flip(path, -6)  # in the third
    records = sources.TfRecords([str(path)])
    assert records[1] == b""
    damaged = rf"^{path}: damaged or cut off: copy or build the set again \(a checksum differs\)$"
    with pytest.raises(ValueError, match=damaged):
        records[2]
    flip(path, 0)  # in the length of the first
    with pytest.raises(ValueError, match=damaged):
        sources.TfRecords([str(path)])
