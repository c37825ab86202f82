"""A training-like step on every device with an all-reduce whose value is known; prints one line of JSON for the doctor.

A process of its own, called by experiments.doctor.
"""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

SIDE, SECONDS = 512, 2.0


def main() -> None:
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    def body(x, index):  # one device's share of both
        return jnp.tanh(x @ x) * 0.5, jax.lax.psum(index, "data")

    spread = PartitionSpec("data")
    both = jax.shard_map(body, mesh=mesh, in_specs=(spread, spread), out_specs=(spread, PartitionSpec()))
    x = np.random.default_rng(0).normal(size=(len(devices) * SIDE, SIDE)).astype(np.float32) / SIDE**0.5
    index = np.arange(1.0, len(devices) + 1, dtype=np.float32)
    place = jax.sharding.NamedSharding(mesh, spread)
    x, index = jax.device_put(x, place), jax.device_put(index, place)
    began = time.monotonic()
    step = jax.jit(both).lower(x, index).compile()
    compiled = time.monotonic() - began
    began, steps, summed = time.monotonic(), 0, None
    while time.monotonic() - began < SECONDS:
        for _ in range(5):
            x, summed = step(x, index)
            steps += 1
        jax.block_until_ready((x, summed))
    seconds = time.monotonic() - began
    print(json.dumps({
        "platform": devices[0].platform, "kind": devices[0].device_kind, "devices": len(devices),
        "reduced": float(summed[0]), "expected": float(len(devices) * (len(devices) + 1) / 2), "steps": steps,
        "seconds": seconds, "compile": compiled, "tflops": 2 * SIDE**3 * len(devices) * steps / seconds / 1e12}))


if __name__ == "__main__":
    main()
