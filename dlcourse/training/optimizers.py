"""Optimizers by name, with their schedules."""

from __future__ import annotations

import jax
import optax
import optax.contrib

from dlcourse.contracts import InputError


def schedule(name: str, peak: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """The learning rate as a function of the step.

    constant: peak. cosine: peak (1 + cos(pi t / T)) / 2. one_cycle: up from peak / 25 over the first
    30 % of the steps and down to peak / 250000, both along a cosine (Smith & Topin 2018). constant
    and cosine may begin with a linear warm-up (Goyal et al. 2017, 2.2).

    Args:
      name: constant, cosine or one_cycle.
      peak: highest learning rate.
      steps: T, length of the run in updates; 0 where only a clock knows (constant alone).
      warmup: updates of linear rise from 0, below `steps`.

    Raises:
      InputError: unknown name, or a warm-up that leaves no steps.
    """
    if warmup and steps and warmup >= steps:
        raise InputError(
            f"--warmup takes {warmup} steps, but the run has only {steps}: shorten it or raise --train_for"
        )
    if name == "one_cycle":
        return optax.cosine_onecycle_schedule(steps, peak, pct_start=0.3, div_factor=25.0, final_div_factor=1e4)
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    if name == "constant":
        return optax.warmup_constant_schedule(0.0 if warmup else peak, peak, warmup)
    raise InputError(f"unknown schedule {name!r}: constant, cosine or one_cycle")


def is_kernel(params):
    """A tree of bools: which parameters are kernels, the only ones that decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _muon_dimensions(params):
    """Every kernel is a matrix from all its inputs to its last axis; the classifier is left to AdamW."""

    def dimensions(path, x):
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or names[0] == "classifier":
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def create(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """An optimizer by name.

    sgd and nesterov add weight decay to the gradient (L2, as in He et al. 2016); the others decouple
    it (Loshchilov & Hutter 2019). Biases, normalisation and embeddings never decay. muon: Jordan et
    al. 2024 on kernels, AdamW on the rest.

    Args:
      name: sgd, nesterov, adamw, lamb, lion or muon.
      learning_rate: a number or a schedule.
      weight_decay: >= 0.
      momentum: of sgd and nesterov, in [0, 1).
      clip: largest global norm of the gradient; 0 never clips.

    Raises:
      InputError: unknown name.
    """
    decoupled = dict(learning_rate=learning_rate, weight_decay=weight_decay)
    makers = {
        "sgd": lambda: _sgd(learning_rate, weight_decay, momentum, nesterov=False),
        "nesterov": lambda: _sgd(learning_rate, weight_decay, momentum, nesterov=True),
        "adamw": lambda: optax.adamw(**decoupled, mask=is_kernel),
        "lamb": lambda: optax.lamb(**decoupled, mask=is_kernel),
        "lion": lambda: optax.lion(**decoupled, mask=is_kernel),
        "muon": lambda: _muon(learning_rate, weight_decay),
    }
    if name not in makers:
        raise InputError(f"unknown optimizer {name!r}: {', '.join(makers)}")
    tx = makers[name]()
    return optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx


def _muon(learning_rate, weight_decay):
    # optax's own decay would reach the biases that it leaves to Adam.
    directions = optax.contrib.muon(1.0, muon_weight_dimension_numbers=_muon_dimensions, consistent_rms=0.2)
    return optax.chain(
        directions,
        optax.add_decayed_weights(-weight_decay, mask=is_kernel),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
    )


def _sgd(learning_rate, weight_decay, momentum, nesterov):
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=is_kernel),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
