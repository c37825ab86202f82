"""Saving and restoring a run: orbax, and a digest that tells when what was read is not what was written."""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint import checkpoint_managers as managers

from dlcourse.contracts import InputError
from dlcourse.training.state import TrainState

DAMAGED = "damaged_checkpoints"


class Restored(NamedTuple):
    """A state and what was noted beside it."""

    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """The newest states of a run and its best, in `folder`; a context that waits for what is still being written."""

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        best = managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]),
            best_fn=_score, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def save(self, state: TrainState, notes: dict[str, Any], score: float | None = None) -> None:
        """Begin to save; a step that is already there is left as it is.

        Args:
          state: global arrays; in a run of several processes each of them calls this.
          notes: what JSON can hold.
          score: the higher the better; None where the state was not judged, which then is no candidate for the best.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        notes = {"notes": notes, "digest": digest(state), "arrays": _shapes(state)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(_sealed(notes)))
        self._manager.save(step, args=arguments, metrics=None if score is None else {"score": score}, force=True)

    def wait(self) -> None:
        """Until what was begun to be saved is safe."""
        self._manager.wait_until_finished()

    def restore(self, template: TrainState) -> Restored | None:
        """The newest whole state, shaped and placed as `template`; None where nothing was saved.

        A checkpoint that is damaged is moved to the folder DAMAGED beside this one, and the one before it is taken.

        Raises:
          InputError: every checkpoint is damaged, or the newest whole one is of another model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._read(step, template)
            except InputError:
                raise
            except Exception as error:  # orbax and its libraries raise whatever the damage provokes
                self._put_aside(step, error)
        if steps:
            raise InputError(f"none of the {len(steps)} checkpoints in {self.folder} is whole (they were moved to "
                             f"{DAMAGED}/ beside it): give --overwrite to start anew")
        return None

    def _read(self, step: int, template: TrainState) -> Restored:
        found = self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))
        notes = _unsealed(found["notes"])
        _refuse_another(notes["arrays"], _shapes(template), self.folder / str(step))
        wanted = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, template))
        state = self._manager.restore(step, args=ocp.args.Composite(state=wanted))["state"]
        _compare(digest(state), notes["digest"])
        return Restored(state, notes["notes"])

    def _put_aside(self, step: int, error: Exception) -> None:
        logging.getLogger(__name__).warning(
            "the checkpoint of step %d is damaged (%s): it is moved to %s/ and the one before it is taken",
            step, _first_line(error), DAMAGED)
        if jax.process_index() == 0:
            aside = self.folder.parent / DAMAGED / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
        self._manager.reload()


def _score(metrics: dict) -> float:
    return metrics["score"]


class Damaged(Exception):
    """What was read is not what was written."""


def digest(tree: Any) -> dict[str, int]:
    """A 32-bit digest of every array: sum_i mix(word_i, i) mod 2^32 over its words, computed where they lie.

    The sum has no order, so that it does not depend on how an array is divided over devices; a change of one word
    always changes it (mix is a bijection of the word), other changes go unseen once in 2^32.

    Args:
      tree: arrays or typed keys.

    Returns:
      {path: digest}.
    """
    parts = [_digest(leaf) for leaf in jax.tree.leaves(tree)]
    return dict(zip(_names(tree), (int(part) for part in jax.device_get(parts)), strict=True))


@jax.jit
def _digest(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    size = x.dtype.itemsize
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):  # not a reshape: that would gather what lies on several devices
        place += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # The finaliser of MurmurHash3 (Appleby 2011), a bijection of 32 bits.
    words = words ^ (place * jnp.uint32(0x9E3779B9) + jnp.uint32(1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


def _compare(found: dict[str, int], noted: dict[str, int]) -> None:
    wrong = [name for name in noted if found.get(name) != noted[name]]
    if wrong:
        raise Damaged(f"the content of {wrong[0]} is not what was written")


def _sealed(content: dict) -> dict:
    """JSON that tells whether it was changed."""
    text = json.dumps(content, sort_keys=True)
    return {"content": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _unsealed(sealed: dict) -> dict:
    if hashlib.sha256(sealed["content"].encode()).hexdigest() != sealed["sha256"]:
        raise Damaged("its notes are not what was written")
    return json.loads(sealed["content"])


def load_variables(run: pathlib.Path | str, template: TrainState) -> dict:
    """The variables that a finished or unfinished run at `run` would be evaluated with.

    Args:
      run: a run's folder.
      template: a state of the model that is to receive them.

    Raises:
      InputError: no such run, no checkpoint, a damaged one, or parameters of other shapes.
    """
    folder = pathlib.Path(run).absolute() / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise InputError(f"--init_from={run}: no checkpoint there; give the folder of a run (it holds result.json)")
    path = folder / str(steps[-1])
    try:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # it may have been saved on other devices
        notes = _unsealed(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "notes"))
        reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        saved = reader.restore(path / "state", args=ocp.args.StandardRestore(fallback_sharding=here))
        used = {name: saved[name] for name in ("params", "ema", "model_state")}
        found = digest(used)
        _compare(found, {name: noted for name, noted in notes["digest"].items() if name in found})
        variables = {"params": saved["ema"] or saved["params"], **saved["model_state"]}
    except Exception as error:
        raise InputError(f"--init_from={run}: its checkpoint cannot be read ({_first_line(error)})") from error
    _refuse_another(_shapes(variables), _shapes(template.variables), f"--init_from={run}")
    return jax.tree.map(jax.numpy.asarray, variables)


def _refuse_another(there: dict, here: dict, where) -> None:
    """Raises InputError unless both have the same arrays."""
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise InputError(f"{where} does not fit this model: {name} is {there.get(name, 'missing')} there and "
                             f"{here.get(name, 'missing')} here; give the same --model and --dataset")


def _shapes(tree) -> dict[str, str]:
    leaves = zip(_names(tree), jax.tree.leaves(tree), strict=True)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves}


def _names(tree) -> list[str]:
    def part(entry):
        return str(next(getattr(entry, kind) for kind in ("key", "name", "idx") if hasattr(entry, kind)))

    return ["/".join(map(part, path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
