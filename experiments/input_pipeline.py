"""Is data read as fast as it can be decoded, and never waited for? (L15)

    python -m experiments.input_pipeline

Makes photos in the manner of ImageNet (500 x 375 pixels, some 110 kB each), as a folder of JPEG files and as a TFDS
data set in array_record, and reads both in training batches of 224 x 224. The yardstick is the same decoder in a bare
loop over files in memory, in a process of its own on each core: nothing is shared, shuffled, batched or scaled there.
Then a step that takes 1.5 times as long as a batch is fed from the folder, with batches made ahead and without.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

from dlcourse.contracts import Claim, Evidence, InputError
from experiments import command, settings
from experiments.benchmark import interleave, median, ratio_interval

SLOWER = 1.5
"""Time of the step over that of a batch."""
SECTION = "How it revived"


@dataclasses.dataclass(frozen=True)
class Config:
    repeats: int = settings.setting(41, "timings of each thing; medians are reported (at least 10)")
    images: int = settings.setting(256, "photos to make")
    batch_size: int = settings.setting(64, "images in a batch")
    image_size: int = settings.setting(224, "pixels a side that photos are resized to")
    workdir: str = settings.setting("", "folder of the run; default runs/input_pipeline/HASH")
    overwrite: bool = settings.setting(False, "measure again")

    def __post_init__(self):
        if self.repeats < 10:
            raise InputError(f"--repeats={self.repeats}: a median of fewer than 10 says little; give at least 10")
        if not self.images >= 8 or not self.image_size >= 8:
            name, value = ("images", self.images) if self.images < 8 else ("image_size", self.image_size)
            raise InputError(f"--{name}={value}: give at least 8")


def main(config: Config, run) -> None:
    from dlcourse.data import ahead, folder, tfds
    from dlcourse.reporting import environment
    from experiments import input_pipeline_photos as photos

    began, size = time.monotonic(), config.image_size
    with tempfile.TemporaryDirectory() as scratch:
        paths = photos.write_folder(Path(scratch, "folder"), config.images)
        builder = photos.prepare_records(Path(scratch, "records"), paths)
        splits = {"jpeg_folder": folder.load(f"{scratch}/folder", size).splits["train"],
                  "array_record": tfds.lazy(builder, "train", (size, size, 3), size)}
        with bare_loops(paths, size, ahead.cores()) as limit:
            tasks = {name: functools.partial(drain, name, split, config) for name, split in splits.items()}
            tasks["jpeg_folder_float"] = functools.partial(
                drain, "jpeg_folder_float", splits["jpeg_folder"], config, as_bytes=False)
            tasks |= {"limit": limit, "pillow": functools.partial(pillow, paths, size)}
            times = interleave(config.repeats, tasks)
        per_batch = config.batch_size * median(times["jpeg_folder"])
        waits = interleave(min(config.repeats, 15), {"waits": functools.partial(
            overlap, splits["jpeg_folder"], config, per_batch)})
        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
    run.finish(figures(times, waits, ahead.cores()) | {"input/kilobytes_an_image": kilobytes},
               [*(limit_claim(name, times) for name in splits), overlap_claim(waits)],
               {"total": time.monotonic() - began}, environment.describe())


def drain(name: str, split, config: Config, as_bytes: bool = True) -> dict[str, float]:
    """Seconds an image, all cores together, while batches are taken as soon as they are there."""
    from dlcourse.data import batches

    feed, count = batches.train_batches(split, config.batch_size, seed=0, as_bytes=as_bytes), batches_a_round(config)
    next(feed)  # starting is not measured; as much of later batches is made before the clock starts as when it stops
    began = time.perf_counter()
    for _ in range(count):
        next(feed)
    seconds = time.perf_counter() - began
    del feed
    settle()
    return {name: seconds / (count * config.batch_size)}


def batches_a_round(config: Config) -> int:
    """Some 128 images: rounds are short, so that the machine's moods strike all that is compared."""
    return min(8, max(2, 128 // config.batch_size))


def settle() -> None:
    """Waits until no thread reads data any more: what is timed next shall have the machine to itself."""
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join()


@contextlib.contextmanager
def bare_loops(paths: list[Path], image_size: int, cores: int):
    """A task that times the decoder alone, in a process of its own on each core, all busy at once."""
    alone = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, alone, hold, (paths,)))
                 for _ in range(cores)]

        def task() -> dict[str, float]:
            rates = [pool.submit(decode_held, image_size) for pool in pools]
            return {"limit": 1 / sum(rate.result() for rate in rates)}

        yield task


_held: list[bytes] = []


def hold(paths: list[Path]) -> None:
    """Reads files into this process's memory."""
    _held.extend(path.read_bytes() for path in paths)


def decode_held(image_size: int, seconds: float = 0.15) -> float:
    """Images a second of the decoder alone, over what is held."""
    import io

    from dlcourse.data.decoding import decode

    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:  # all processes as long: none has a core to itself at the end
        decode(io.BytesIO(_held[count % len(_held)]), 3, image_size)
        count += 1
    return count / (time.perf_counter() - began)


def pillow(paths: list[Path], image_size: int, count: int = 32) -> dict[str, float]:
    """Seconds an image as a first attempt would read it: pillow in one thread."""
    import numpy as np
    from PIL import Image

    began = time.perf_counter()
    for path in paths[:count]:
        image = Image.open(path).convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        np.asarray(image, np.float32) / 255
    return {"pillow": (time.perf_counter() - began) / len(paths[:count])}


def overlap(split, config: Config, per_batch: float, steps: int = 5) -> dict[str, float]:
    """Share of time that steps of SLOWER x `per_batch` seconds wait for data, made ahead or in the loop's own thread.

    The step sleeps: it stands for an accelerator, which leaves the processor to the data.
    """
    from dlcourse.data import batches, order

    rows = order.checked(len(split), config.batch_size, 0, (0, 1))
    feeds = {"ahead": batches.train_batches(split, config.batch_size, seed=0, as_bytes=True),
             "not_ahead": batches.direct(split.__getitem__, rows, range(steps + 1))}
    shares = {}
    while feeds:
        name, feed = feeds.popitem()
        next(feed)
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            time.sleep(SLOWER * per_batch)
            asked = time.perf_counter()
            next(feed)
            waited += time.perf_counter() - asked
        shares[name] = waited / (time.perf_counter() - began)
        del feed
        settle()
    return shares


def figures(times, waits, cores: int) -> dict[str, float]:
    """Images a second, a core where all are used, and shares of time."""
    rates = {name: 1 / median(seconds) for name, seconds in times.items()}
    return {
        "input/cores": float(cores),
        **{f"input/{name}_images_per_second": rate for name, rate in rates.items()},
        **{f"input/{name}_images_per_second_per_core": rates[name] / cores
           for name in ("jpeg_folder", "array_record", "limit")},
        **{f"input/{name}_over_limit_ratio": median(ratios(times, "limit", name))
           for name in ("jpeg_folder", "array_record", "jpeg_folder_float")},
        "input/jpeg_folder_over_pillow_ratio": median(ratios(times, "pillow", "jpeg_folder")),
        **{f"overlap/{name}_waiting_share": median(shares) for name, shares in waits.items()},
    }


def ratios(times, above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(times[above], times[below], strict=True)]


def limit_claim(name: str, times) -> Claim:
    """The rate of batches against that of the decoder alone."""
    found = ratios(times, "limit", name)
    low, high = ratio_interval(found)
    where = {"jpeg_folder": "A folder of JPEG files", "array_record": "A TFDS data set in array_record"}[name]
    return Claim(f"L15.{name}", SECTION, f"{where} is read in batches at 0.9 of the speed of its decoder or more.",
                 low >= 0.9, Evidence(median(found), 1.0, 0.9, (low, high), len(found)),
                 "Control: the same decoder in a bare loop over files in memory, one process a core, all cores busy. "
                 "Files are in the disk's cache: a slow disk is not in it.")


def overlap_claim(waits) -> Claim:
    """Time that the loop waits for data when the step is slower than the making of a batch."""
    low, high = ratio_interval(waits["ahead"])
    return Claim("L15.overlap", SECTION, f"A step that takes {SLOWER} times as long as a batch waits for data at most "
                 "2 % of the time.", high <= 0.02,
                 Evidence(median(waits["ahead"]), median(waits["not_ahead"]), 0.02, (low, high), len(waits["ahead"])),
                 "Control: batches read by the loop's own thread. The step sleeps, as the host of an accelerator "
                 "does; a step on the processor itself shares its cores with the decoder. The interval is that of the "
                 "value.")


if __name__ == "__main__":
    command.run(main, Config, name="input_pipeline")
