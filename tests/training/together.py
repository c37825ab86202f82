"""Ten updates of a small network, however they are spread: the law that modes and device counts do not matter.

As a program, one of several processes: python -m tests.training.together PORT NUMBER COUNT FILE CASE ...
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

STEPS, BATCH = 10, 16


def case(text: str) -> tuple:
    """"vit_ti/jit/4/2/1/float32" -> network, mode, devices (0: all), fsdp, updates a dispatch, type."""
    name, mode, devices, fsdp, at_once, dtype = text.split("/")
    return name, mode, int(devices), int(fsdp), int(at_once), dtype


def batches(part):
    """Batches of one data set in the order that every run has, this process's rows of them."""
    from dlcourse.data.arrays import ArraySplit
    from dlcourse.data.batches import train_batches
    from tests.models.test_laws import CLASSES, IMAGE_SHAPE

    rng = np.random.default_rng(0)
    split = ArraySplit(rng.random((40, *IMAGE_SHAPE), np.float32), rng.integers(0, CLASSES, 40).astype(np.int32))
    return train_batches(split, BATCH, seed=3, part=part)


def updated(text: str, accumulate: int = 1):
    """(parameters after ten updates, losses, running averages), as NumPy arrays."""
    from dlcourse import streams
    from dlcourse.training import losses, optimizers, parallel
    from dlcourse.training import state as states
    from tests.models import test_laws

    name, mode, count, fsdp, at_once, dtype = case(text)
    plan = parallel.create(mode, fsdp=fsdp, devices=jax.devices()[:count or None])
    model = test_laws.small(name).clone(dtype=jnp.dtype(dtype))
    if name == "mlp":
        model = model.clone(dropout=0.0)  # each replica drops other features, as it must
    tx = optimizers.create("nesterov", 0.02, weight_decay=1e-3)

    def fresh():
        state = states.create(model, test_laws.IMAGE_SHAPE, tx, streams.root(0))
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    state, seen = plan.create(fresh), []
    step = plan.step(loss=losses.cross_entropy(model), tx=tx, accumulate=accumulate)
    feed = batches(plan.part)
    for _ in range(STEPS // at_once):
        state, metrics = step(state, [next(feed) for _ in range(at_once)])
        seen += np.asarray(metrics["loss"]).tolist()
    return jax.tree.leaves(plan.fetch(state.params)), seen, jax.tree.leaves(plan.fetch(state.model_state))


def main(port, number, count, file, *texts):
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(number))
    for text in texts:
        params, seen, model_state = updated(text)
        if number == "0":
            np.savez(file + text.replace("/", "-"), *params, *model_state, np.array(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
