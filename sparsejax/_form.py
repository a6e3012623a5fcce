"""What the params that a function of the user's returns must look like, and keys of its calls."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import _leaves, _run_folder, _tree
from sparsejax._typing import Params


class Form(NamedTuple):
    """What the params of every fit look like: those to start from, whose numbers are JAX arrays.

    `by` is the function of the user's that gives params, for errors.
    """

    flat: _tree.Flat
    by: str = "fit"

    @property
    def arrays(self) -> list[jax.Array]:
        """The arrays to start from."""
        return [x for x in self.flat.leaves if isinstance(x, jax.Array)]

    def filled(self, arrays: Sequence[Any]) -> Params:
        """A tree with these arrays, and what is no array as it was."""
        fresh = iter(arrays)
        return self.flat.rebuild(
            [next(fresh) if isinstance(x, jax.Array) else x for x in self.flat.leaves]
        )

    def placed(self, arrays: Sequence[Any]) -> Params:
        """A tree with these arrays on the devices of those to start from."""
        rows = zip(arrays, self.arrays, strict=True)
        return self.filled(
            [jax.device_put(x, s.sharding if s.committed else None) for x, s in rows]
        )

    def taken(self, fitted: Params) -> list[jax.Array]:
        """The arrays of a fit's params; refuses those that are unlike."""
        found = _tree.align(self.by, fitted, "params", self.flat.rebuild(self.flat.leaves))
        arrays = []
        for path, leaf, like in zip(self.flat.paths, found, self.flat.leaves, strict=True):
            if not isinstance(like, jax.Array):
                continue
            array = jnp.asarray(leaf) if _leaves.is_number(leaf) else leaf
            if _leaves.describe(array) != _leaves.describe(like):
                raise ValueError(
                    f"`{self.by}` must return params like those it begins at, "
                    f"{_leaves.describe(like)} at {path!r}, got {_leaves.describe(array)}."
                )
            arrays.append(array)
        return arrays


def form_of(params: Params, by: str = "fit") -> Form:
    """The form of fits that begin at these params; refuses arrays of what is no number."""
    flat = _tree.flatten(params)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if _leaves.shape_of(leaf) is not None and not _leaves.is_number(leaf):
            raise TypeError(
                f"`params` must hold arrays of numbers, got {_leaves.describe(leaf)} at {path!r}; "
                f"split it off, and let `{by}` put it back."
            )
    leaves = [jnp.asarray(x) if _leaves.is_number(x) else x for x in flat.leaves]
    return Form(flat._replace(leaves=leaves), by)


def fingerprint(form: Form) -> list[str]:
    """The content of the arrays to start from."""
    rows = zip(form.flat.paths, form.flat.leaves, strict=True)
    arrays = {path: leaf for path, leaf in rows if isinstance(leaf, jax.Array)}
    return _run_folder.fingerprint("params", arrays)


def folded(key: Any, i: int) -> Any:
    """The key of number i; none of none."""
    return None if key is None else jax.random.fold_in(key, i)
