"""The settings that experiments share, one frozen dataclass a concern; flags are derived from them.

Light on purpose: nothing here imports JAX, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


def setting(default, help: str):
    """A dataclass field whose flag is explained by `help`."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Data:
    dataset: str = setting("digits", "digits, faces, fashion_mnist, shapes, folder:PATH, npz:PATH, tfds:NAME "
                           "or fake:HxWxC,K (made up, for trying things out)")
    image_size: int = setting(0, "resize images to this many pixels a side; 0 keeps them as they are")
    validation_fraction: float = setting(0.1, "share of the training examples held out for validation, in "
                                         "(0, 0.5]; a source with a validation split of its own keeps that")
    augment: str = setting("", "training augmentation, comma separated, such as flip,crop=2,cutout=8,mixup=0.2")
    batch_size: int = setting(64, "examples in a training step")


@dataclasses.dataclass(frozen=True)
class Model:
    model: str = setting("convnet", "a network and its options, such as convnet,width=64 or resnet18 "
                         "(a wrong name lists all)")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "precision of the computation; parameters stay float32")
    mirror: bool = setting(False, "judge an image by the mean of its logits and those of its mirror image")
    init_from: str = setting("", "a finished run's folder whose parameters to start from")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    optimizer: Literal["sgd", "nesterov", "adamw", "lamb", "lion", "muon"] = setting("adamw", "update rule")
    learning_rate: float = setting(3e-3, "peak learning rate")
    schedule: Literal["constant", "cosine", "one_cycle"] = setting("one_cycle", "course of the learning rate")
    warmup: str = setting("0steps", "linear warm-up, such as 5epochs or 500steps (constant and cosine only)")
    weight_decay: float = setting(1e-2, "decay of kernels; never of biases and normalisation")
    momentum: float = setting(0.9, "momentum of sgd and nesterov")
    clip: float = setting(0.0, "clip the gradient to this global norm; 0 never")
    ema: float = setting(0.0, "decay of an average of the parameters, used to evaluate; 0 keeps none")
    accumulate: int = setting(1, "split each batch into this many parts and sum their gradients (saves memory)")
    label_smoothing: float = setting(0.0, "share of the target spread evenly over all classes, in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Run:
    train_for: str = setting("40epochs", "how long: 10epochs, 2000steps, 50000examples or 5minutes")
    eval_every: str = setting("1epochs", "how often to evaluate on the validation split")
    checkpoint_every: str = setting("1epochs", "how often to save: epochs, steps, examples or minutes")
    keep: int = setting(2, "newest checkpoints to keep, beside the best of those saved when validation was evaluated")
    profile: str = setting("0steps", "record a profile of this many steps in the run's folder, for TensorBoard")
    seed: int = setting(0, "seed of every random stream")
    workdir: str = setting("", "folder of the run; default runs/EXPERIMENT/DATASET-MODEL-HASH")
    overwrite: bool = setting(False, "delete what is in the run's folder and start anew")
    deterministic: bool = setting(False, "ask the compiler for reproducible kernels on accelerators")
    require_accelerator: bool = setting(False, "refuse to run on a CPU")
    tensorboard: bool = setting(True, "write TensorBoard events")


@dataclasses.dataclass(frozen=True)
class Devices:
    """How a run is spread; what it computes is the same, but for `batch_stats`."""

    parallel: Literal["jit", "pmap", "shard_map"] = setting(
        "jit", "one program over all devices, divided by the compiler (jit), or a program a device (shard_map, pmap)")
    fsdp: int = setting(1, "devices that share one copy of parameters and optimizer state (jit)")
    batch_stats: Literal["global", "replica"] = setting(
        "global", "batch normalisation over the whole batch or over each device's share (shard_map, pmap)")
    steps_per_dispatch: int = setting(0, "updates sent to an accelerator at once; 0 chooses, 1 on a CPU")
    coordinator: str = setting("", "HOST:PORT of process 0, in a run of several processes that no scheduler announces")
    num_processes: int = setting(0, "processes of the run; 0 where a scheduler tells (SLURM, TPU VM)")
    process_id: int = setting(-1, "number of this process, from 0; -1 where a scheduler tells")
    coordinator_timeout: float = setting(60.0, "seconds to wait for the other processes at the start")
