"""Carrying out a plan, and undoing it: params, batch statistics, optimizer states, masks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _leaves, _tree
from sparsejax.shrinking._plan import Cut, Plan, check_plan

# Below this, optax's factored second moments are not factored (`min_dim_size_to_factor`).
_LEAST_FACTORED = 128


def shrink(tree: Any, plan: Plan) -> Any:
    """Removes what a plan removes, from any tree that holds copies of the variables.

    Params, batch statistics, gradients, masks, optimizer states, a whole training state: a leaf
    whose path ends in that of a variable (with or without the first word, `params`) loses the same
    indices: momentum, Adam's moments, an average of params. Masks keep the axes of one index that
    they share. Leading axes (an ensemble, a memory of updates) stay. Leaves at other paths (a
    counter, a key) are returned as they are.

    The factored moments of Adafactor (`v_row`, `v_col`) are cut along the axis that they keep, as
    long as the smaller leaf would be factored in the same way.

    Args:
      tree: a pytree; where a variable has a counterpart, its shape must be the variable's.
      plan: what `plan` made.

    Returns:
      A tree of the same structure; cut leaves are new arrays of the same dtype.

    Raises:
      ValueError: if a leaf has neither the shape of its variable nor one that is understood.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparsejax import dependency, shrinking
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.arange(24.0).reshape(3, 8), "out": jnp.ones((8, 2))}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> plan = shrinking.plan(groups, params, keep=2)
      >>> small = shrinking.shrink(params, plan)
      >>> small["in"]
      Array([[ 6.,  7.],
             [14., 15.],
             [22., 23.]], dtype=float32)
      >>> state = shrinking.shrink(optax.adam(0.1).init(params), plan)
      >>> state[0].mu["out"].shape
      (2, 2)
    """
    return _mapped(tree, plan, _shrunk, small=False)


def expand(tree: Any, plan: Plan) -> Any:
    """Puts back what a plan removed, as zeros (False, in masks): the inverse of `shrink`.

    `expand(shrink(tree, plan), plan)` has the kept entries of `tree`, bit for bit, and zeros.

    Args:
      tree: a pytree that `shrink` made, or that was trained since.
      plan: the same plan.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: as `shrink`, if a leaf has not the shape that `shrink` gives it.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import dependency, shrinking
      >>> def linear(params, x):
      ...     return x @ params["in"] @ params["out"]
      >>> params = {"in": jnp.arange(1.0, 4.0)[None], "out": jnp.ones((3, 2))}
      >>> groups = dependency.trace(linear, params, jnp.ones((1, 1)))
      >>> plan = shrinking.plan(groups, params, keep=2)
      >>> shrinking.expand(shrinking.shrink(params, plan), plan)["in"]
      Array([[0., 2., 3.]], dtype=float32)
    """
    return _mapped(tree, plan, _expanded, small=True)


def masks(plan: Plan) -> dict[str, np.ndarray]:
    """What a plan keeps of every leaf, by path: booleans of its full shape, True = kept."""
    answer = {}
    for path, cut in plan.leaves.items():
        mask = np.ones(cut.shape, bool)
        for axis, gone in cut.removed.items():
            mask[(slice(None),) * axis + (np.array(gone),)] = False
        answer[path] = mask
    return answer


Change = Callable[[Any, dict[int, np.ndarray], tuple[int, ...]], Any]


def _mapped(tree: Any, plan: Plan, change: Change, *, small: bool) -> Any:
    check_plan(plan)
    flat = _tree.flatten(tree)
    counterparts = _tree.Counterparts(list(plan.leaves))
    cuts = list(plan.leaves.values())
    leaves = []
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        _refuse_probes(path)
        found = [cuts[place] for place in counterparts.find(path)]
        if not found or _leaves.shape_of(leaf) is None:
            _refuse_parts(path, leaf, counterparts, plan, small)
            leaves.append(leaf)
            continue
        options = [_axes(path, leaf, cut, small) for cut in found]
        fits = [axes for axes in options if axes is not None]
        if not fits and np.size(leaf) <= 1:
            leaves.append(leaf)
            continue
        if not fits or any(axes != fits[0] for axes in fits):
            raise _misfit(path, leaf, found, small, several=bool(fits))
        kept, full = fits[0]
        rows = {axis: np.array(indices, np.int64) for axis, indices in kept}
        leaves.append(change(leaf, rows, full) if rows else leaf)
    return flat.rebuild(leaves)


def _axes(path: str, leaf: Any, cut: Cut, small: bool) -> Any:
    """Which indices of which axes of a leaf stay, and its full shape; None where none fit."""
    shape = _leaves.shape_of(leaf)
    assert shape is not None
    have = cut.small if small else cut.shape
    factored = _factored(path, shape, cut, small)
    if factored is not None:
        return factored
    extra = len(shape) - len(have)
    if extra < 0 or (extra > 0 and shape[extra:] != have):
        return None
    if any(n not in (own, 1) for n, own in zip(shape[extra:], have, strict=True)):
        return None
    kept, full = [], list(shape)
    for axis in sorted(cut.removed):
        # An axis of one index that has more in the variable stands for all of them.
        if shape[extra + axis] == have[axis] and (have[axis] > 1 or shape[extra:] == have):
            kept.append((extra + axis, tuple(cut.kept(axis).tolist())))
            full[extra + axis] = cut.shape[axis]
    return tuple(kept), tuple(full)


def _factored(path: str, shape: tuple[int, ...], cut: Cut, small: bool) -> Any:
    """The mean of squares over one of the two largest axes of a variable (Adafactor)."""
    words = path.split(".")
    if len(cut.shape) < 2 or not {"v_row", "v_col"} & set(words) or shape == (1,):
        return None
    gone = [int(np.argsort(s)[-1 if "v_row" in words else -2]) for s in (cut.shape, cut.small)]
    have = cut.small if small else cut.shape
    if shape != tuple(np.delete(have, gone[0]).tolist()):
        return None
    orders = [np.argsort(s)[-2:].tolist() for s in (cut.shape, cut.small)]
    if orders[0] != orders[1] or sorted(cut.small)[-2] < min(
        _LEAST_FACTORED, sorted(cut.shape)[-2]
    ):
        raise ValueError(
            f"`tree` has a factored moment at {path!r} that the smaller variable, {cut.small}, "
            "would not have: its largest axes change, or fall below 128. Make this state anew: "
            "`tx.init(small)`."
        )
    kept, full = [], list(shape)
    for axis in sorted(cut.removed):
        if axis != gone[0]:
            own = axis - (axis > gone[0])
            kept.append((own, tuple(cut.kept(axis).tolist())))
            full[own] = cut.shape[axis]
    return tuple(kept), tuple(full)


def _refuse_probes(path: str) -> None:
    if "params_probe" in path or "emission_probe" in path:
        raise ValueError(
            f"`tree` has what a prox before SGD measures its learning rate by, at {path!r}, which "
            "cannot be cut: give the transform its learning rate, `l1_prox(lam, lr)`, or make its "
            "state anew, `tx.init(small)`."
        )


def _refuse_parts(
    path: str, leaf: Any, counterparts: _tree.Counterparts, plan: Plan, small: bool
) -> None:
    """Pieces of variables (SM3's maxima along axes), and all of them as one vector."""
    parent, _, last = path.rpartition(".")
    piece = np.ndim(leaf) > 0 and last.isdigit() and counterparts.find(parent, named=True)
    flattened = _leaves.shape_of(leaf) == (plan.params[small],) and len(plan.leaves) > 1
    if plan.removed and np.size(leaf) > 1 and (piece or flattened):
        raise ValueError(
            f"`tree` has {'a piece of a variable' if piece else 'all variables as one vector'} at "
            f"{path!r}, {_leaves.describe(leaf)}, which cannot be cut: make this state anew, "
            "`tx.init(small)`."
        )


def _misfit(path: str, leaf: Any, found: list[Cut], small: bool, several: bool) -> ValueError:
    wanted = " or ".join(str(cut.small if small else cut.shape) for cut in found)
    if any(_leaves.shape_of(leaf) == (cut.shape if small else cut.small) for cut in found):
        return ValueError(
            f"`tree` must have the shapes {'after' if small else 'before'} the cut: at {path!r} it "
            f"is {_leaves.describe(leaf)}, the shape {'before' if small else 'after'} it; "
            f"{'shrink' if small else 'it has been shrunk already: expand'} it first."
        )
    return ValueError(
        f"`tree` must have the shapes {'after' if small else 'before'} the cut: at {path!r} it is "
        f"{_leaves.describe(leaf)}, "
        + (
            f"which fits several variables that lose different indices ({wanted})."
            if several
            else f"the variable {wanted}. What is made of a variable in another shape (a factored "
            "or blocked preconditioner) cannot be cut: make this state anew, `tx.init(small)`."
        )
    )


def _shrunk(leaf: Any, kept: dict[int, np.ndarray], full: tuple[int, ...]) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        small = tuple(len(kept[d]) if d in kept else n for d, n in enumerate(full))
        return jax.ShapeDtypeStruct(small, leaf.dtype)
    if _on_host(leaf):
        places = np.ix_(*(kept.get(d, np.arange(n)) for d, n in enumerate(full)))
        return _like(np.asarray(leaf)[places], leaf)
    for axis, indices in kept.items():
        leaf = jnp.take(leaf, indices, axis)
    return leaf


def _expanded(leaf: Any, kept: dict[int, np.ndarray], full: tuple[int, ...]) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(full, leaf.dtype)
    places = np.ix_(*(kept.get(d, np.arange(n)) for d, n in enumerate(full)))
    if _on_host(leaf):
        array = np.zeros(full, leaf.dtype)
        array[places] = np.asarray(leaf)
        return _like(array, leaf)
    return jnp.zeros(full, leaf.dtype).at[places].set(leaf)


def _on_host(leaf: Any) -> bool:
    """Whether NumPy reads a leaf in place: it needs no compiler for each new shape."""
    if isinstance(leaf, np.ndarray | np.generic):
        return True
    if _leaves.is_traced(leaf):
        return False
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _like(array: np.ndarray, leaf: Any) -> Any:
    return (
        array if isinstance(leaf, np.ndarray | np.generic) else jax.device_put(array, leaf.sharding)
    )
