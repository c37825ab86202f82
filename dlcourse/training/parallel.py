"""How a run is spread over devices and processes; the one file that knows of them.

A state is always one tree of global arrays, whatever the mode; only the step differs:

  jit        one program over a mesh of all devices; the compiler divides it. With fsdp = F, groups of F devices
             hold each parameter and its optimizer state in F parts (Rajbhandari et al. 2020, stage 3).
  shard_map  a program a device, on its share of the batch; gradients are averaged.
  pmap       the same, in the older form that much published code has.

Process i of n reads and places the i-th of n equal parts of every batch.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlcourse.contracts import InputError, Loss
from dlcourse.models.layers import BATCH, platform
from dlcourse.training.state import TrainState
from dlcourse.training.step import train_step

MODES = ("jit", "pmap", "shard_map")
FSDP = "fsdp"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the arrays of a run lie, and how its step is compiled.

    Attributes:
      mode: one of MODES.
      mesh: all devices, as (replicas, fsdp); a batch is divided over both axes. The first axis is called
        `batch` where normalisation statistics are over the global batch, else `replica`.
    """

    mode: str
    mesh: Mesh

    @property
    def part(self) -> tuple[int, int]:
        """(i, n): this is the i-th of n processes."""
        return jax.process_index(), jax.process_count()

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """Of arrays with a leading B."""
        return NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf of a state: in FSDP's parts along its longest axis that F divides, else whole."""
        size = self.mesh.shape[FSDP]

        def sharding(leaf):
            fitting = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
            if size == 1 or not fitting or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return self.replicated
            longest = max(fitting, key=lambda axis: leaf.shape[axis])
            return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, FSDP))

        return jax.tree.map(sharding, tree)

    def create(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, such as a state, each device making what it holds of it."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make)))()

    def place(self, tree: Any) -> Any:
        """A tree of arrays, equal in all processes, laid out as a state is."""
        def put(value, sharding):
            host = np.asarray(value)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(put, tree, self.shardings(tree))

    def place_batch(self, batch: Any) -> Any:
        """This process's rows of a batch, as part of the global batch."""
        if self.mesh.size == 1:
            return batch  # a compiled program takes NumPy arrays as they are
        return jax.tree.map(
            lambda rows: rows if isinstance(rows, jax.Array) and rows.sharding == self.batch_sharding
            else jax.make_array_from_process_local_data(self.batch_sharding, np.asarray(rows)), dict(batch))

    def fetch(self, tree: Any) -> Any:
        """The tree as NumPy arrays, whole in every process."""
        if self.mesh.size > 1 and any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
            tree = _identity(self.replicated)(tree)
        return jax.device_get(tree)

    def local(self, tree: Any) -> Any:
        """A copy on this process's first device, for work that every process does for itself."""
        if self.mesh.size == 1:
            return jax.tree.map(jax.numpy.copy, tree)
        whole = _identity(self.replicated)(tree)
        return jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0), jax.local_devices()[0]), whole)

    def step(self, *, loss: Loss, tx, ema: float = 0.0, accumulate: int = 1) -> Step:
        """The training step of this plan, compiled when it is first called."""
        return Step(self, functools.partial(train_step, tx=tx, ema=ema, accumulate=accumulate), loss)


def create(mode: str = "jit", *, fsdp: int = 1, batch_stats: str = "global",
           devices: Sequence[jax.Device] | None = None) -> Plan:
    """A plan over `devices`, by default all of them.

    Args:
      mode: one of MODES.
      fsdp: F, devices that share one copy of the parameters; a divisor of their number.
      batch_stats: "global", batch normalisation over the whole batch, or "replica", over each device's share.
      devices: in the order of their shares of a batch.

    Raises:
      InputError: a contradiction, or sizes that do not divide.
    """
    devices = jax.devices() if devices is None else devices
    if mode not in MODES:
        raise InputError(f"--parallel={mode}: choose one of {', '.join(MODES)}")
    if fsdp > 1 and mode != "jit":
        raise InputError(f"--fsdp={fsdp} needs --parallel=jit; {mode} keeps all parameters on every device")
    if batch_stats == "replica" and mode == "jit":
        raise InputError("--batch_stats=replica: the program of --parallel=jit knows no replicas; "
                         "take --parallel=shard_map or pmap")
    if fsdp < 1 or len(devices) % fsdp:
        sizes = [size for size in range(1, len(devices) + 1) if len(devices) % size == 0]
        raise InputError(f"--fsdp={fsdp} does not divide the {len(devices)} devices here; "
                         f"take one of {', '.join(map(str, sizes))}")
    replicas = BATCH if batch_stats == "global" else "replica"
    grid = np.array(devices).reshape(-1, fsdp)
    return Plan(mode, Mesh(grid, (replicas, FSDP), axis_types=(AxisType.Auto,) * 2))


def check_batch(batch_size: int, accumulate: int, plan: Plan) -> None:
    """Raises InputError where a batch cannot be divided evenly, naming the nearest sizes that can."""
    unit = plan.mesh.size * accumulate
    if batch_size % unit:
        near = sorted({max(unit, batch_size // unit * unit), -(-batch_size // unit) * unit})
        parts = f"{plan.mesh.size} devices" + (f" x {accumulate} parts of --accumulate" if accumulate > 1 else "")
        raise InputError(f"--batch_size={batch_size} does not divide over {parts}; take {' or '.join(map(str, near))}")


class Step:
    """(state, batches) -> (state, metrics): as many updates as there are batches, in one dispatch.

    The state is donated. Batches are what this process read; metrics have a leading axis of one entry an update.
    """

    def __init__(self, plan: Plan, step, loss: Loss):
        self.plan, self._programs = plan, {}
        if plan.mode == "jit":
            step = functools.partial(step, loss=_whole(loss, plan))
        else:
            step = functools.partial(step, loss=_of_replica(loss, plan),
                                     average=functools.partial(jax.lax.pmean, axis_name=plan.mesh.axis_names[0]))
        self._updates = functools.partial(_updates, step)

    def __call__(self, state: TrainState, batches: Sequence[Any]) -> tuple[TrainState, Any]:
        state, batches = self.arguments(state, batches)
        state, metrics = self.program(state, batches)(state, batches)
        return (_held(state, self.plan.replicated) if self.plan.mode == "pmap" else state), metrics

    def arguments(self, state: TrainState, batches: Sequence[Any]):
        """What the compiled program is called with."""
        if self.plan.mode != "pmap":
            return state, [self.plan.place_batch(batch) for batch in batches]
        count = jax.local_device_count()
        here = NamedSharding(self.plan.mesh.local_mesh, PartitionSpec())
        return _held(state, here), [
            jax.tree.map(lambda rows: rows.reshape(count, -1, *rows.shape[1:]), dict(batch)) for batch in batches]

    def compile(self, state: TrainState, batch: Any, counts: Iterable[int]) -> None:
        """Compiles now what dispatches of so many batches like this one will run."""
        for count in counts:
            self.program(*self.arguments(state, [batch] * count))

    def program(self, state: TrainState, batches: Sequence[Any]):
        """The compiled program for arguments of these shapes (arrays or their abstract values)."""
        shapes = {name: (*value.shape, str(value.dtype)) for name, value in batches[0].items()}
        key = len(batches), tuple(sorted(shapes.items())), jax.tree.structure(state)
        if key not in self._programs:
            _warn_of_new_shapes([dict(known) for _, known, _ in self._programs], shapes)
            program = self.jitted(state)
            # pmap cannot be compiled ahead for several processes; it compiles at its first call.
            self._programs[key] = program if self.plan.mode == "pmap" else program.lower(state, batches).compile()
        return self._programs[key]

    def jitted(self, state: TrainState):
        """The program before it is compiled for certain shapes."""
        plan, axis, whole = self.plan, self.plan.mesh.axis_names[0], PartitionSpec()
        if plan.mode == "pmap":
            return jax.pmap(self._updates, axis, in_axes=(None, 0), out_axes=None, donate_argnums=0)
        if plan.mode == "shard_map":
            # Unchecked, a gradient is of the replica's own loss; checked, it would be the sum over all already.
            spread = jax.shard_map(self._updates, mesh=plan.mesh, in_specs=(whole, PartitionSpec(axis)),
                                   out_specs=whole, check_vma=False)
            return jax.jit(spread, donate_argnums=0)
        shardings = plan.shardings(state)
        return jax.jit(self._updates, donate_argnums=0, in_shardings=(shardings, plan.batch_sharding),
                       out_shardings=(shardings, plan.replicated))


def _updates(step, state, batches):
    """One update a batch, in a loop on the device; unrolled on a CPU, whose loops are slow (see `step`)."""
    if len(batches) == 1:
        state, metrics = step(state, batches[0])
        return state, jax.tree.map(lambda value: value[None], metrics)
    stacked = jax.tree.map(lambda *rows: jax.numpy.stack(rows), *batches)
    return jax.lax.scan(step, state, stacked, unroll=platform() == "cpu")


def _whole(loss: Loss, plan: Plan) -> Loss:
    """The loss on whole parameters, gathered from FSDP's parts just before they are used."""
    if plan.mesh.shape[FSDP] == 1:
        return loss

    def on_whole(params, model_state, batch, key):
        return loss(jax.lax.with_sharding_constraint(params, plan.replicated), model_state, batch, key)

    return on_whole


def _of_replica(loss: Loss, plan: Plan) -> Loss:
    """The loss with random numbers of the replica's own: one key would augment and drop alike on all of them."""
    if plan.mesh.size == 1:
        return loss

    def of_replica(params, model_state, batch, key):
        key = jax.random.fold_in(key, jax.lax.axis_index(plan.mesh.axis_names[0]))
        return loss(params, model_state, batch, key)

    return of_replica


def _warn_of_new_shapes(known: list[dict], shapes: dict) -> None:
    """Says which arrays changed, where another shape makes the step compile again."""
    if known and shapes not in known:
        changed = [f"{name} was {known[-1].get(name)} and is {shapes.get(name)}"
                   for name in sorted(known[-1].keys() | shapes) if known[-1].get(name) != shapes.get(name)]
        logging.getLogger(__name__).warning("the training step is compiled again: %s", "; ".join(changed))


def _held(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays whole on every device, seen as arrays of these devices; nothing is copied."""
    def view(leaf):
        if leaf.sharding == sharding:
            return leaf
        return jax.make_array_from_single_device_arrays(
            leaf.shape, sharding, [shard.data for shard in leaf.addressable_shards])

    return jax.tree.map(view, tree)


@functools.cache
def _identity(sharding):
    return jax.jit(lambda tree: tree, out_shardings=sharding)


class Agreement:
    """Makes what any process asks for what all of them do, at the same call.

    An answer is that of the call before, so that nobody waits for it: a call sends the question, and the next one,
    a step of training later, finds the answer there. Process by process the calls must be the same ones.
    """

    def __init__(self, plan: Plan):
        self.plan, self._answer = plan, None

    def __call__(self, *asked: bool, wait: bool = False) -> tuple[bool, ...]:
        """Whether any process asks, question by question; with `wait`, of this very call."""
        if jax.process_count() == 1:
            return asked
        rows = np.tile(np.array(asked), (jax.local_device_count(), 1))
        fresh = _any(self.plan.replicated)(jax.make_array_from_process_local_data(self.plan.batch_sharding, rows))
        before, self._answer = self._answer, fresh
        found = np.asarray(fresh if wait or before is None else before)
        return tuple(bool(answer) for answer in found)


@functools.cache
def _any(sharding):
    return jax.jit(lambda rows: rows.any(0), out_shardings=sharding)
