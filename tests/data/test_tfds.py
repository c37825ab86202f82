"""TFDS' data sets without TensorFlow: what is read, in memory and as needed, and what is said of damage."""

import io
import itertools
import os
import sys

import numpy as np
import PIL.Image
import pytest

from dlcourse import data
from dlcourse.contracts import InputError
from dlcourse.data import arrays, batches, tfds, tfds_labels


def content(i: int) -> io.BytesIO:
    """A picture of one colour, as a file."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (10 * i, 0, 0)).save(file, "png")
    file.seek(0)
    return file


def prepare(folder, name="Levels", dtype=np.uint8, damaged=()):
    """A data set of 20 training and 6 validation examples below `folder`; its name as `tfds:` takes it."""
    import tensorflow_datasets

    class Levels(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            image = tensorflow_datasets.features.Image(shape=(4, 4, 3), dtype=dtype, encoding_format="png")
            features = {"image": image, "label": tensorflow_datasets.features.ClassLabel(names=["even", "odd"])}
            return tensorflow_datasets.core.DatasetInfo(
                builder=self, features=tensorflow_datasets.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "validation": self._generate_examples(6)}

        def _generate_examples(self, count):
            for i in range(count):
                file = io.BytesIO(content(i).getvalue()[:40]) if i in damaged else content(i)
                yield i, {"image": file, "label": i % 2}

    Levels.name = name
    Levels(data_dir=str(folder)).download_and_prepare(file_format="array_record")
    return name


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def number(batch):
    return np.rint(batch["image"][:, 0, 0, 0] * 25.5).astype(int)


@pytest.mark.slow
def test_tfds_without_tensorflow(home, monkeypatch):
    prepare(home, "levels")
    assert tfds.is_prepared("levels") and not tfds.is_prepared("fashion_mnist")
    loaded = [data.load("tfds:levels")]
    monkeypatch.setattr(tfds, "IN_MEMORY", 0)
    loaded += [data.load("tfds:levels"), data.load("tfds:levels", image_size=8)]
    for dataset in loaded:
        assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 18, "validation": 2, "test": 6}
        for split in dataset.splits.values():
            batch = split[np.arange(len(split))]
            assert batch["image"].shape == (len(split), *dataset.image_shape)
            np.testing.assert_array_equal(number(batch) % 2, batch["label"])
    assert isinstance(loaded[0].splits["train"], arrays.ArraySplit) and loaded[1].splits["train"].decodes
    np.testing.assert_array_equal(loaded[0].splits["test"][np.arange(6)]["image"],
                                  loaded[1].splits["test"][np.arange(6)]["image"])
    plain, made_ahead = (itertools.islice(batches.train_batches(dataset.splits["train"], 6, seed=1, start=2), 5)
                         for dataset in loaded[:2])
    for one, other in zip(plain, made_ahead, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    halves = [list(batches.eval_batches(loaded[1].splits["train"], 8, part=(i, 2))) for i in range(2)]
    seen = np.concatenate([number(batch)[batch["mask"]] for half in halves for batch in half])
    np.testing.assert_array_equal(np.sort(seen), np.sort(number(loaded[1].splits["train"][np.arange(18)])))
    assert "tensorflow" not in sys.modules
    record = next(path for path in (home / "levels").rglob("*train.array_record*"))
    record.write_bytes(record.read_bytes()[:os.path.getsize(record) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        data.load("tfds:levels")


@pytest.mark.slow
def test_damage_in_tfds_is_named(home, monkeypatch):
    prepare(home, "cut", damaged=[3])
    says = "^tfds:cut/1.0.0, train, record [0-9]+: (is not|cannot be read as) an image"
    with pytest.raises(InputError, match=says) as error:
        data.load("tfds:cut")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(tfds, "IN_MEMORY", 0)
    with pytest.raises(InputError, match=says):
        list(batches.eval_batches(data.load("tfds:cut").splits["train"], 4))
    prepare(home, "deep", dtype=np.uint16)
    with pytest.raises(InputError, match="tfds:deep: its images are of type uint16"):
        data.load("tfds:deep")


class Records:
    """Serialized examples whose reading can be forbidden."""

    def __init__(self, labels):
        from tensorflow_datasets.proto import tf_example_pb2

        self.made, self.forbidden = [], False
        for label in labels:
            example = tf_example_pb2.Example()
            example.features.feature["label"].int64_list.value.append(label)
            self.made.append(example.SerializeToString())

    def __len__(self):
        return len(self.made)

    def __getitem__(self, i):
        assert not self.forbidden
        return self.made[i]


def test_labels_are_read_once(home, monkeypatch):
    monkeypatch.setattr(tfds_labels, "WORTH_KEEPING", 100)
    labels = np.random.default_rng(0).integers(-1, 1000, 150)
    records, few, file = Records(labels), Records(labels[:99]), home / "records"
    file.write_bytes(b"what they are read from")
    np.testing.assert_array_equal(tfds_labels.load(few, [file]), labels[:99])
    assert not (home / "cache").exists()
    found = tfds_labels.load(records, [file])
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == np.int32
    records.forbidden = True
    np.testing.assert_array_equal(tfds_labels.load(records, [file]), labels)
    kept, = (home / "cache" / "dlcourse" / "labels").iterdir()
    for spoil in (lambda: kept.write_bytes(kept.read_bytes()[:50]), lambda: np.save(kept, labels[:9]),
                  lambda: file.write_bytes(b"other files than those")):
        spoil()
        with pytest.raises(AssertionError):
            tfds_labels.load(records, [file])


def test_a_cache_that_cannot_be_written_is_none(home, monkeypatch):
    monkeypatch.setattr(tfds_labels, "WORTH_KEEPING", 2)
    (home / "cache").write_text("a file where a folder should be")
    (home / "records").write_text("")
    np.testing.assert_array_equal(tfds_labels.load(Records([1, 0, 1]), [home / "records"]), [1, 0, 1])
