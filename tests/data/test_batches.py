"""Every example once an epoch, at a position that is a function of the step alone, whoever reads it."""

import itertools

import jax
import numpy as np
import PIL.Image
import pytest

from dlcourse import data
from dlcourse.contracts import InputError
from dlcourse.data import batches, order
from dlcourse.data.arrays import ArraySplit

GOLDEN = ([7, 4, 6, 3, 0, 5, 1, 8, 2, 9], [8, 4, 0, 6, 7, 1, 3, 9, 5, 2])


def numbered(n, dtype=np.uint8):
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    images = images if dtype == np.uint8 else (images / 255).astype(dtype)
    return ArraySplit(images, np.arange(n, dtype=np.int32) % 3, {"tail": np.arange(n) % 2})


@pytest.fixture
def folder(tmp_path):
    """23 images, each of one grey level: its class's 100 plus its number."""
    for k, count in enumerate((10, 13)):
        (tmp_path / str(k)).mkdir()
        for i in range(count):
            PIL.Image.new("L", (5, 4), 100 * k + i).save(tmp_path / str(k) / f"{i:02}.png")
    return data.folder.load(str(tmp_path), 0).splits["train"]


def first(split, batch_size, count, **at):
    return list(itertools.islice(batches.train_batches(split, batch_size, **at), count))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (10, 10), (7, 20), (1, 3)])
def test_every_example_exactly_once_an_epoch(n, batch_size):
    count = 3 * n
    index = np.concatenate([batch["index"] for batch in first(numbered(n), batch_size, count, seed=1)])
    epochs = index[:len(index) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (len(epochs), 1)))
    if n == 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # shuffled anew
        other = np.concatenate([batch["index"] for batch in first(numbered(n), batch_size, count, seed=2)])
        assert len({tuple(epoch) for epoch in other.reshape(-1, n)} & {tuple(epoch) for epoch in epochs}) == 0


def test_a_batch_holds_what_its_index_says():
    split = numbered(50)
    for batch in first(split, 8, 10, seed=0):
        assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
            "image": ((8, 2, 3, 1), np.float32), "label": ((8,), np.int32), "tail": ((8,), np.int64),
            "mask": ((8,), bool), "index": ((8,), np.int32)}
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], (batch["index"] / 255).astype(np.float32))
        np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
        np.testing.assert_array_equal(batch["tail"], batch["index"] % 2)
        assert batch["mask"].all()


def test_permutations_are_the_same_everywhere():
    # Written down once: they must not change with NumPy, Python or the machine.
    assert order.permutation(10, 0, 0).tolist() == GOLDEN[0]
    assert order.permutation(10, -1, 2**33).tolist() == GOLDEN[1]


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_starting_at_a_step_is_having_been_there():
    split = numbered(10)
    for one, other in zip(first(split, 4, 12, seed=3)[7:], first(split, 4, 5, seed=3, start=7), strict=True):
        same(one, other)


def test_folders_obey_the_same_law_in_threads(folder):
    twin = ArraySplit(np.zeros((23, 4, 5, 1), np.uint8), folder.labels)
    for batch, law in zip(first(folder, 6, 9, seed=4, start=2), first(twin, 6, 9, seed=4, start=2), strict=True):
        np.testing.assert_array_equal(batch["index"], law["index"])
        np.testing.assert_array_equal(batch["label"], law["label"])
        level = np.where(batch["label"] == 1, 100 + batch["index"] - 10, batch["index"])
        np.testing.assert_array_equal(np.rint(batch["image"][:, 0, 0, 0] * 255), level)
        assert batch["image"].dtype == np.float32 and batch["image"].shape == (6, 4, 5, 1)
    whole = list(batches.eval_batches(folder, 10))
    assert [int(batch["mask"].sum()) for batch in whole] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in whole])[:23], np.arange(23))


def test_a_file_that_breaks_during_training_is_named(folder):
    folder.paths[3].write_bytes(b"gone")
    with pytest.raises(InputError, match="03.png: is not an image"):
        list(batches.eval_batches(folder, 4))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 4), (3, 5)])
def test_evaluation_meets_every_example_once(n, batch_size):
    seen = []
    for batch in batches.eval_batches(numbered(n), batch_size):
        assert {len(values) for values in batch.values()} == {batch_size}
        seen += batch["index"][batch["mask"]].tolist()
    assert seen == list(range(n))


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("kind", ["arrays", "threads"])
def test_processes_read_together_what_one_would(folder, kind, processes):
    split, batch_size = {"arrays": numbered(23), "threads": folder}[kind], 12
    parts = [first(split, batch_size, 6, seed=1, start=3, part=(i, processes)) for i in range(processes)]
    for whole, *shares in zip(first(split, batch_size, 6, seed=1, start=3), *parts, strict=True):
        assert {len(share["index"]) for share in shares} == {batch_size // processes}
        same(joined(shares), whole)


@pytest.mark.parametrize(("n", "batch_size", "processes"),
                         [(23, 12, 2), (23, 12, 4), (23, 24, 3), (23, 4, 4), (5, 8, 4)])
@pytest.mark.parametrize("kind", ["arrays", "threads"])
def test_processes_evaluate_every_example_once(folder, kind, n, batch_size, processes):
    split = {"arrays": numbered(23), "threads": folder}[kind].take(np.arange(n))
    parts = [list(batches.eval_batches(split, batch_size, part=(i, processes))) for i in range(processes)]
    seen = np.concatenate([batch["index"][batch["mask"]] for part in parts for batch in part])
    np.testing.assert_array_equal(np.sort(seen), np.arange(n))
    for whole, *shares in zip(batches.eval_batches(split, batch_size), *parts, strict=True):
        same(joined(shares), whole)
    if n == 5:
        assert not parts[3][0]["mask"].any()


def test_a_batch_that_cannot_be_shared_names_the_sizes_that_can():
    for make in (lambda size, **how: batches.train_batches(numbered(9), size, seed=0, **how),
                 lambda size, **how: batches.eval_batches(numbered(9), size, **how)):
        with pytest.raises(InputError, match="--batch_size=10: 4 processes cannot share that evenly; give 8 or 12"):
            make(10, part=(0, 4))
        with pytest.raises(InputError, match="give 4$"):
            make(3, part=(1, 4))
        with pytest.raises(ValueError, match="0 <= i < n"):
            make(4, part=(2, 2))


@pytest.mark.parametrize("kind", ["arrays", "large arrays", "threads", "device"])
def test_bytes_become_pixels_in_the_step(folder, kind, monkeypatch):
    if kind == "large arrays":
        monkeypatch.setattr(batches, "AHEAD", 0)
    if kind == "device":
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    split = folder if kind == "threads" else numbered(23)
    floats, stored = (first(split, 6, 5, seed=2, as_bytes=as_bytes) for as_bytes in (False, True))
    evaluated = zip(*(batches.eval_batches(split, 6, as_bytes=as_bytes) for as_bytes in (False, True)), strict=True)
    for one, other in [*zip(floats, stored, strict=True), *evaluated]:
        assert one["image"].dtype == np.float32
        assert other["image"].dtype == np.uint8 or isinstance(other["image"], jax.Array)
        pixels = jax.jit(batches.in_unit)(other)
        np.testing.assert_allclose(pixels["image"], one["image"], rtol=1e-6)
        same({**other, "image": 0}, {**one, "image": 0})
    assert batches.in_unit(floats[0])["image"] is floats[0]["image"]


@pytest.mark.parametrize("axis", ["batch", "batch of two axes"])
def test_images_are_gathered_straight_into_the_shards_of_a_batch(axis):
    split = numbered(20)
    devices = np.array(jax.devices()[:4])
    if axis == "batch":
        mesh, spec = jax.sharding.Mesh(devices, ("data",)), jax.sharding.PartitionSpec("data")
    else:
        mesh = jax.sharding.Mesh(devices.reshape(2, 2), ("data", "model"))
        spec = jax.sharding.PartitionSpec("data")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    read = batches.device_reader(split, sharding)
    indices = np.array([3, 19, 0, 3, 7, 8, 1, 2], np.int32)
    image = read(indices)["image"]
    assert image.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(image, split[indices]["image"], rtol=1e-6)
    for shard in image.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(image)[shard.index])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_gathering_on_the_device_gives_the_same_batches(dtype):
    split = numbered(20, dtype)
    read = batches.device_reader(split)
    indices = np.array([3, 19, 0, 3], np.int32)
    held, plain = read(indices), split[indices]
    assert isinstance(held["image"], jax.Array) and held["image"].dtype == np.float32
    assert held.keys() == plain.keys()
    for name in plain:
        np.testing.assert_allclose(held[name], plain[name], rtol=1e-6)


def test_what_cannot_be_batched_is_refused():
    with pytest.raises(InputError, match="--batch_size=0"):
        batches.train_batches(numbered(3), 0, seed=0)
    with pytest.raises(InputError, match="without examples"):
        batches.eval_batches(numbered(3).take(np.arange(0)), 1)
