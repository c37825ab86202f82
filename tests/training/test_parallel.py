"""Laws of parallelism: whatever the mode, the devices and the processes, the same run."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse import models
from dlcourse.contracts import InputError
from dlcourse.models.layers import BatchNorm
from dlcourse.training import losses, optimizers, parallel
from tests.training import together
from tests.training.test_step import Tiny, batch

ROOT = Path(__file__).resolve().parents[2]
SPREADS = ["jit/4/1/1", "jit/4/2/1", "jit/2/1/1", "shard_map/4/1/1", "pmap/4/1/1"]
SLOWLY = [pytest.param(name, spread, marks=() if name in ("linear", "mlp") else pytest.mark.slow)
          for name in models.names() for spread in (SPREADS if name in ("linear", "mlp", "vit_ti", "convnet")
                                                    else ["jit/4/4/1", "shard_map/4/1/1"])]


def close(one, other, atol):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def alone():
    """Ten updates on one device, each network trained once."""
    known = {}

    def of(name, dtype="float32"):
        text = f"{name}/jit/1/1/1/{dtype}"
        if text not in known:
            known[text] = together.updated(text)
        return known[text]

    return of


@pytest.mark.parametrize(("name", "spread"), SLOWLY)
def test_every_network_learns_the_same_however_it_is_spread(name, spread, alone):
    close(together.updated(f"{name}/{spread}/float32"), alone(name), 1e-5)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", ["linear", "mlp", *(pytest.param(name, marks=pytest.mark.slow)
                                                     for name in ("vit_ti", "convnet"))])
def test_in_float64_to_the_last_digits(name, spread):
    with jax.enable_x64(True):
        close(together.updated(f"{name}/{spread}/float64"), together.updated(f"{name}/jit/1/1/1/float64"), 1e-12)


@pytest.mark.parametrize("spread", ["jit/1/1/2", "jit/4/2/5", "shard_map/4/1/5", "pmap/4/1/2"])
def test_several_updates_in_one_dispatch_are_the_same_updates(spread, alone):
    close(together.updated(f"mlp/{spread}/float32"), alone("mlp"), 1e-5)


@pytest.mark.parametrize("spread", ["jit/1/1/1", "jit/4/1/1", "shard_map/4/1/1"])
def test_accumulated_gradients_are_those_of_the_whole_batch(spread, alone):
    close(together.updated(f"mlp/{spread}/float32", accumulate=2), alone("mlp"), 1e-5)


@pytest.mark.slow
def test_two_processes_of_two_devices_are_as_four_of_one(tmp_path, alone):
    cases = [f"{name}/{mode}/0/{fsdp}/{at_once}/float32" for name, mode, fsdp, at_once in [
        ("mlp", "jit", 1, 1), ("mlp", "jit", 4, 2), ("mlp", "pmap", 1, 1), ("mlp", "shard_map", 1, 5),
        ("convnet", "jit", 1, 1), ("convnet", "pmap", 1, 1), ("vit_ti", "shard_map", 1, 1)]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    surroundings = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    words = [sys.executable, "-m", "tests.training.together", port]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen([*words, str(number), "2", f"{tmp_path}/", *cases], cwd=ROOT,
                                                        env=surroundings, stderr=subprocess.PIPE, text=True))
                   for number in range(2)]
        for process in running:
            stack.callback(process.kill)
        for process in running:
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said[-3000:]
    for text in cases:
        params, seen, model_state = alone(text.split("/")[0])
        found = np.load(tmp_path / (text.replace("/", "-") + ".npz"))
        close([found[name] for name in found.files], [*params, *model_state, np.array(seen)], 1e-5)


def test_statistics_are_the_batch_s_or_the_replica_s():
    norm, x = BatchNorm(train=True), jnp.arange(8.0).reshape(4, 1, 1, 2)
    variables = norm.init(jax.random.key(0), x)

    def run(axis):
        apply = jax.vmap(lambda part: norm.apply(variables, part, mutable="batch_stats")[0], axis_name=axis)
        return apply(x.reshape(2, 2, 1, 1, 2)).reshape(x.shape)

    whole = norm.apply(variables, x, mutable="batch_stats")[0]
    np.testing.assert_allclose(run("batch"), whole, rtol=1e-5)
    halves = [norm.apply(variables, part, mutable="batch_stats")[0] for part in (x[:2], x[2:])]
    np.testing.assert_allclose(run("replica"), jnp.concatenate(halves), rtol=1e-5)
    assert float(jnp.abs(halves[0] - whole[:2]).max()) > 0.1


def test_fsdp_holds_each_array_in_parts():
    plan = parallel.create(fsdp=4)
    state = plan.create(lambda: {"kernel": jnp.zeros((3, 8, 12)), "odd": jnp.zeros((3, 5)), "key": jax.random.key(0)})
    assert [shard.data.shape for shard in state["kernel"].addressable_shards] == [(3, 8, 3)] * 4
    assert state["odd"].is_fully_replicated and state["key"].is_fully_replicated


def test_replicas_draw_numbers_of_their_own():
    seen = []

    def loss(params, model_state, batch, key):
        jax.debug.callback(lambda k: seen.append(tuple(np.asarray(k))), jax.random.key_data(key))
        return losses.cross_entropy(Tiny())(params, model_state, batch, key)

    tx = optimizers.create("sgd", 0.1)
    plan = parallel.create("shard_map")
    from tests.training.test_loop import fresh

    state = plan.place(fresh().params)
    step = plan.step(loss=loss, tx=tx)
    start = plan.create(lambda: fresh().replace(opt_state=tx.init(fresh().params)))
    step(start.replace(params=state), [batch()])
    jax.effects_barrier()
    assert len(set(seen)) == 4


def test_another_shape_is_an_alarm_that_names_it(caplog):
    from tests.training.test_loop import STEP, fresh

    with caplog.at_level(logging.WARNING):
        state, _ = STEP(fresh(), [batch(8)])
        state, _ = STEP(state, [batch(8)])
        assert not caplog.records
        STEP(state, [batch(5)])
    assert "compiled again: image was (8, 2, 2, 1, 'float32') and is (5, 2, 2, 1, 'float32')" in caplog.text


@pytest.mark.parametrize(("wanted", "says"), [
    ({"mode": "pmap", "fsdp": 2}, "--fsdp=2 needs --parallel=jit"),
    ({"batch_stats": "replica"}, "take --parallel=shard_map or pmap"),
    ({"fsdp": 3}, "--fsdp=3 does not divide the 4 devices here; take one of 1, 2, 4"),
    ({"mode": "magic"}, "choose one of jit, pmap, shard_map")])
def test_contradictions_are_refused(wanted, says):
    with pytest.raises(InputError, match=says):
        parallel.create(**wanted)


@pytest.mark.parametrize(("size", "accumulate", "says"), [
    (10, 1, "does not divide over 4 devices; take 8 or 12"), (3, 1, "; take 4$"),
    (12, 2, "4 devices x 2 parts of --accumulate; take 8 or 16")])
def test_a_batch_that_does_not_divide_names_those_that_do(size, accumulate, says):
    plan = parallel.create()
    parallel.check_batch(16, 2, plan)
    with pytest.raises(InputError, match=f"--batch_size={size} .*{says}"):
        parallel.check_batch(size, accumulate, plan)
