"""Photos in the manner of ImageNet, made from the few that come with scikit-image: files in folders, and as records."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

SOURCES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg",
           "hubble_deep_field.jpg", "ihc.png")
WIDTH, HEIGHT = 500, 375
CLASSES = 4


def write_folder(folder: Path, count: int) -> list[Path]:
    """FOLDER/CLASS/NUMBER.jpg, `count` files of 500x375 pixels and some 110 kB, as ImageNet's are on average.

    Each is a part of a photo, at random place and size, with the grain that a camera would add: without it, enlarged
    photos make smaller files, which are quicker to decode.
    """
    import numpy as np
    from PIL import Image

    from dlcourse.data import embedded

    rng = np.random.default_rng(0)
    photos = [Image.open(embedded.inside("skimage") / "data" / name).convert("RGB") for name in SOURCES]
    paths = []
    for i in range(count):
        photo = photos[i % len(photos)]
        width = rng.uniform(0.5, 1) * min(photo.width, photo.height * WIDTH / HEIGHT)
        height = width * HEIGHT / WIDTH
        left, upper = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        part = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, upper, left + width, upper + height))
        grainy = np.asarray(part) + rng.normal(0, 15, (HEIGHT, WIDTH, 1))
        path = folder / f"class{i % CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(grainy).clip(0, 255).astype(np.uint8)).save(path, quality=93)
        paths.append(path)
    return paths


def prepare_records(folder: Path, paths: list[Path]):
    """The same files as a TFDS data set in array_record below FOLDER: its builder."""
    import tensorflow_datasets

    class Photos(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        """Photos in the manner of ImageNet."""

        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            features = {"image": tensorflow_datasets.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                        "label": tensorflow_datasets.features.ClassLabel(num_classes=CLASSES)}
            return tensorflow_datasets.core.DatasetInfo(
                builder=self, features=tensorflow_datasets.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, path in enumerate(paths):
                yield i, {"image": io.BytesIO(path.read_bytes()), "label": i % CLASSES}

    tensorflow_datasets.disable_progress_bar()
    builder = Photos(data_dir=str(folder))
    with contextlib.redirect_stdout(io.StringIO()):  # it announces a download
        builder.download_and_prepare(file_format="array_record")
    return builder
