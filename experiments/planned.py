"""From the words of an experiment's command line to the exact step it would train by, before any data is read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import numpy as np

from dlcourse.contracts import Dataset, InputError
from dlcourse.models import size
from dlcourse.planning.hardware import Topology
from dlcourse.training import durations, parallel
from experiments import checks, command, parsing, train

CONCERNS = ("data", "model", "optimizer", "run", "devices")
EXAMPLES = {"imagenet2012": 1_281_167}
"""Training images where TFDS says so only of data on disk (Russakovsky et al. 2015, table 2)."""


@dataclasses.dataclass(frozen=True)
class Unread:
    """A split of which only the size and the type of its images are known."""

    length: int
    dtype: np.dtype

    def __len__(self) -> int:
        return self.length


class Planned(NamedTuple):
    """An experiment's config, the data it names, its network and its loss."""

    config: Any
    dataset: Dataset
    model: Any
    loss: Any

    def images(self) -> float | None:
        """Images that a run trains on; None where a clock ends it."""
        wanted, batch = durations.parse(self.config.run.train_for), self.config.data.batch_size
        steps = wanted.steps(batch, len(self.dataset.splits["train"]))
        return None if steps is None else float(steps * batch)

    def flops(self) -> float:
        """Operations for one image of a step: forward once, backward twice that, as networks are usually counted."""
        return 3.0 * size.flops(self.model, self.dataset.image_shape)


def from_words(words: list[str], classes: int, examples: int) -> Planned:
    """What `EXPERIMENT --flag=value ...` would train.

    Args:
      words: the experiment's name and its flags.
      classes: K, where the data does not say; else 0.
      examples: N in the training split, where the data does not say; else 0.

    Raises:
      InputError: an experiment without a step of its own, or flags or data that will not do.
    """
    name, *flags = words
    try:
        module = importlib.import_module(f"experiments.{name}")
        default = module.Config()
    except (ModuleNotFoundError, AttributeError):
        raise InputError(f"{name} is no experiment; launch/local lists them") from None
    if not all(hasattr(default, concern) for concern in CONCERNS):
        raise InputError(f"{name} has no training step to plan: it lacks settings of "
                         f"{', '.join(concern for concern in CONCERNS if not hasattr(default, concern))}; "
                         "plan one that trains, such as classification")
    config, given = parsing.parse(default, flags)
    checks.check(command.by_name(config), given)
    dataset = describe(config, classes, examples)
    model = train.build_model(config.model, dataset)
    loss = getattr(module, "training_loss", train.classifier_loss)(model, config, dataset)
    return Planned(config, dataset, model, loss)


def describe(config, classes: int, examples: int) -> Dataset:
    """The data set that a config names, with splits that cannot be read.

    Shape, classes and size come from the flags where they are given, for TFDS from what it knows without the
    data, for all others from the data itself.
    """
    wanted, side = config.data, config.data.image_size
    if classes and examples and side:
        shape = (side, side, 3)
    elif wanted.dataset.startswith("tfds:"):
        shape, found, known = _tfds(wanted.dataset.removeprefix("tfds:"), side)
        classes, examples = classes or found, examples or round(known * (1 - wanted.validation_fraction))
        if not examples:
            raise InputError(f"--dataset={wanted.dataset}: how many examples it has is not known without the data; "
                             "give --examples=N before the experiment's name")
    else:
        return _described(train.load_data(config.data, config.run.seed), classes, examples)
    return Dataset(wanted.dataset, {"train": Unread(examples, np.dtype(np.uint8))},
                   tuple(f"class {k}" for k in range(classes)), shape, "", "")


def _described(dataset: Dataset, classes: int, examples: int) -> Dataset:
    split = dataset.splits["train"]
    names = tuple(f"class {k}" for k in range(classes)) or dataset.class_names
    dtype = np.dtype(getattr(split, "dtype", np.float32))
    return dataclasses.replace(dataset, class_names=names, splits={"train": Unread(examples or len(split), dtype)})


def _tfds(name: str, side: int) -> tuple[tuple[int, int, int], int, int]:
    """Image shape, classes, and training examples (0: not known) of a TFDS data set that need not be here."""
    import tensorflow_datasets

    from dlcourse.data import tfds

    try:
        info = tensorflow_datasets.builder(name, data_dir=tfds.data_dir()).info
    except Exception as error:  # an unknown name, version or configuration each raises another type
        raise InputError(f"--dataset=tfds:{name}: {tfds.one_line(error)}; "
                         "give --classes, --examples and --image_size") from error
    shape = tfds.image_shape(name, info.features, side)
    known = EXAMPLES.get(name.partition("/")[0].partition(":")[0], 0)
    with contextlib.suppress(KeyError):
        known = info.splits["train"].num_examples or known
    return shape, info.features["label"].num_classes, known


def batched(planned: Planned, batch_size: int) -> Planned:
    """The same run with another number of images in a step, on all devices together."""
    config = planned.config
    return planned._replace(config=dataclasses.replace(config, data=dataclasses.replace(
        config.data, batch_size=batch_size)))


def step(planned: Planned, devices) -> tuple[parallel.Step, Any, dict[str, jax.ShapeDtypeStruct]]:
    """The training step over these devices as a run would compile it, and its abstract state and batch."""
    config, shape = planned.config, planned.dataset.image_shape
    if config.devices.parallel == "pmap":
        raise InputError("--parallel=pmap cannot be compiled for devices that are not here; plan with jit or shard_map")
    made = train.recipe(config, planned.model, shape, len(planned.dataset.splits["train"]), planned.loss)
    plan, of_plan = train.plan_and_step(config, made, devices)
    state = jax.eval_shape(made.fresh)
    state = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                         state, plan.shardings(state))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=plan.batch_sharding)
    rows = config.data.batch_size
    batch = {"image": array((rows, *shape), planned.dataset.splits["train"].dtype), "label": array((rows,), np.int32),
             "mask": array((rows,), bool), "index": array((rows,), np.int32)}
    return of_plan, state, batch


def parts(state, batch) -> dict[str, Any]:
    """What a step holds, by name."""
    return {"parameters": (state.params, state.ema), "optimizer": state.opt_state, "statistics": state.model_state,
            "batch": batch}


def per_chip(topology: Topology, text: str, planned: Planned) -> list[int]:
    """Images in a step of all chips, one entry a batch size to plan for.

    Args:
      topology: the chips.
      text: images a chip, comma separated; empty: the experiment's own batch, divided.
      planned: the experiment.
    """
    if not text:
        return [planned.config.data.batch_size]
    sizes = text.split(",")
    if not all(size.strip().isdigit() and int(size) for size in sizes):
        raise InputError(f"--per_chip_batch={text}: give whole numbers of images, such as 128 or 64,128,256")
    return [int(size) * topology.chips for size in sizes]

