"""Saving and restoring a run: a thin wrapper around orbax."""

from __future__ import annotations

import pathlib

import jax
import orbax.checkpoint as ocp

from dlcourse.contracts import InputError
from dlcourse.training.state import TrainState


class Checkpoints:
    """The newest states of a run, in `folder`; a context that waits for what is still being written."""

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Begin to save; a step that is already there is left as it is."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, template: TrainState) -> TrainState | None:
        """The newest state, shaped and placed as `template`; None where nothing was saved.

        Raises:
          InputError: the newest checkpoint cannot be read, or is of another model.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(_abstract(template)))
        except Exception as error:  # orbax raises whatever the damage provokes
            raise InputError(f"the checkpoint {self.folder / str(step)} cannot be restored ({_first_line(error)}): "
                             "give --overwrite to start anew") from error


def load_variables(run: pathlib.Path | str, template: TrainState) -> dict:
    """The variables that a finished or unfinished run at `run` would be evaluated with.

    Args:
      run: a run's folder.
      template: a state of the model that is to receive them.

    Raises:
      InputError: no such run, no checkpoint, a damaged one, or parameters of other shapes.
    """
    folder = pathlib.Path(run) / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise InputError(f"--init_from={run}: no checkpoint there; give the folder of a run (it holds result.json)")
    path = folder.absolute() / str(steps[-1]) / "default"
    try:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # it may have been saved on other devices
        reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        saved = reader.restore(path, args=ocp.args.StandardRestore(fallback_sharding=here))
        saved_params = saved["ema"] or saved["params"]
        variables = {"params": saved_params, **saved["model_state"]}
    except Exception as error:
        raise InputError(f"--init_from={run}: its checkpoint cannot be read ({_first_line(error)})") from error
    return _fitted(variables, template.variables, run)


def _fitted(variables, wanted, run):
    """`variables`, once every leaf is known to have the wanted name and shape."""
    have, want = (dict(_named_shapes(tree)) for tree in (variables, wanted))
    for name in sorted(want.keys() | have.keys()):
        if have.get(name) != want.get(name):
            raise InputError(f"--init_from={run} does not fit this model: {name} is {have.get(name, 'missing')} there "
                             f"and {want.get(name, 'missing')} here; give the same --model and --dataset")
    return jax.tree.map(jax.numpy.asarray, variables)


def _named_shapes(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(str(entry.key) for entry in path), tuple(leaf.shape)


def _abstract(state):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]

