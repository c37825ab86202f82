"""The one seam for seeing and changing a network.

A network calls `x = tap("conv1", x)` at every layer a person would ask about. That records the
value and, where an edit of that name was given, passes the value through it. Grad-CAM is the
gradient with respect to an added zero, ablation returns zeros, patching returns another image's
value, a probe reads. Taps that nobody uses cost nothing: XLA removes them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import jax

Edit = Mapping[str, Callable[[jax.Array], jax.Array]]


class Taps:
    """Records values by name, in order, passing each through its edit."""

    def __init__(self, edit: Edit | None = None):
        self.edit = dict(edit or {})
        # Not a plain dict: JAX sorts the keys of those, and the order of computation would be lost in jit.
        self.values: OrderedDict[str, jax.Array] = OrderedDict()

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        if name in self.values:
            raise ValueError(f"two taps are called {name!r}")
        if name in self.edit:
            edited = self.edit[name](x)
            if edited.shape != x.shape:
                raise ValueError(f"the edit at {name!r} changed the shape {x.shape} to {edited.shape}")
            x = edited.astype(x.dtype)
        self.values[name] = x
        return x

    def finish(self) -> OrderedDict[str, jax.Array]:
        """The recorded taps; an edit that met no tap is an error, never silently ignored."""
        unknown = [name for name in self.edit if name not in self.values]
        if unknown:
            raise ValueError(f"no tap called {unknown[0]!r}; this network has {', '.join(self.values)}")
        return self.values
