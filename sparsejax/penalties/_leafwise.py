"""What every penalty shares: its strengths, the leaves that it applies to, and wide precision."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _checks, _leaves, _tree, filters
from sparsejax._typing import Filter, Params, Strength


def check_strength(name: str, strength: Any) -> None:
    """Refuses what is neither a finite number >= 0, nor a schedule, nor a tree of such numbers."""
    if not _is_tree(strength):
        _checks.scalar_or_schedule(name, strength)
        return
    flat = _tree.flatten(strength)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        _checks.non_negative_array(name, path, leaf)


def check_prunable(prunable: Any) -> None:
    """Refuses what is no filter."""
    _checks.function("prunable", prunable, "(path, leaf) -> bool", "sparsejax.filters.weights")


def read(strength: Strength, step: Any) -> Any:
    """A schedule's value at `step`; anything else as it is."""
    return strength(step) if callable(strength) else strength


def is_zero(strength: Strength) -> bool:
    """Whether a strength is seen to be one 0, so that its term can be left out."""
    return is_one(strength) and not _leaves.is_traced(strength) and float(strength) == 0


def is_one(value: Any) -> bool:
    """Whether a value is one number for all leaves."""
    return _leaves.shape_of(value) == ()


def unread(name: str) -> str:
    """The error of a schedule whose value is wanted."""
    return f"`{name}` is a schedule, which has a value only at a step: use penalty.at(step) first."


def penalized_leaves(prunable: Filter, params: Params) -> list[bool]:
    """Which leaves are penalized; refuses those that are not real."""
    chosen, flat = filters.selected(prunable, params), _tree.flatten(params)
    for path, leaf, yes in zip(flat.paths, flat.leaves, chosen, strict=True):
        if yes and not _leaves.is_floating(leaf):
            raise TypeError(
                f"`prunable` must select real leaves for a penalty, got "
                f"{_leaves.describe(leaf)} at {path!r}; leave it out."
            )
    return chosen


def strengths(name: str, strength: Any, chosen: Sequence[bool], params: Params) -> list[Any]:
    """The strength of every leaf, which broadcasts against it; 0 where the leaf is not chosen."""
    if callable(strength):
        raise TypeError(unread(name))
    return _columns(name, strength, chosen, params)


def step_sizes(step_size: Any, chosen: Sequence[bool], params: Params) -> list[Any]:
    """The step size of every leaf, which broadcasts against it: one number, or a tree of them."""
    if not _is_tree(step_size):
        _checks.non_negative("step_size", step_size)
    return _columns("step_size", step_size, chosen, params)


def one_step_size(step_size: Any, reason: str) -> None:
    """Refuses a tree of step sizes, where the prox needs one for all entries; `reason` says why."""
    if _is_tree(step_size):
        raise TypeError(
            f"`step_size` must be one number, got a tree: {reason}; take plain SGD, "
            "proximal(optax.sgd(lr), penalty, lr), which has one step size."
        )
    _checks.non_negative("step_size", step_size)


def wide_map(
    f: Callable[..., jax.Array],
    chosen: Sequence[bool],
    params: Params,
    columns: Sequence[Sequence[Any]] = (),
    *,
    widen: bool = False,
    **trees: Params,
) -> Params:
    """Maps `f(*leaves of trees, leaf of params, *columns)` over chosen leaves, in wide precision.

    Answers have the dtype of the first tree's leaf, with `widen` at least the parameter's.
    """
    in_wide = partial(_in_wide, f, widen, len(trees) + 1)
    return _tree.map_chosen(in_wide, chosen, params, columns, **trees)


def soft(x: jax.Array, t: Any) -> jax.Array:
    """sign(x) max(|x| - t, 0), with +0 where it is zero and NaN where x is NaN."""
    return x - jnp.clip(x, -t, t)


def stop(u: jax.Array, v: jax.Array, w: jax.Array, kink: jax.Array) -> jax.Array:
    """The orthant rule: -w where step u leaves w's orthant, or that of -v from zero, at a kink."""
    side = jnp.where(w == 0, -jnp.sign(v), jnp.sign(w))
    # `<=`, not `not >`: a NaN step must stay visible, not become a silent zero.
    return jnp.where(kink & ((w + u) * side <= 0), -w, u)


def stop_at_zero(
    kinks: Sequence[Any],
    chosen: Sequence[bool],
    params: Params,
    updates: Params,
    subgradient: Params,
) -> Params:
    """The orthant rule over chosen leaves, where the slope of a kink at zero is positive."""

    def on_leaf(u: jax.Array, v: jax.Array, w: jax.Array, kink: jax.Array) -> jax.Array:
        return stop(u, v, w, kink > 0)

    # A narrower update could not cancel its parameter exactly.
    return wide_map(
        on_leaf, chosen, params, (kinks,), widen=True, updates=updates, subgradient=subgradient
    )


def total(terms: Sequence[jax.Array]) -> jax.Array:
    """A sum in at least float32; 0 of nothing."""
    return sum(terms, jnp.float32(0))


def _columns(name: str, value: Any, chosen: Sequence[bool], params: Params) -> list[Any]:
    flat = _tree.flatten(params)
    if is_one(value):
        return [jnp.asarray(value)] * len(flat.leaves)
    found = _tree.align(name, value, "params", params)
    for path, x, leaf, yes in zip(flat.paths, found, flat.leaves, chosen, strict=True):
        if yes and x is None:
            raise ValueError(
                f"`{name}` must have a value for every penalized leaf, got none at {path!r}; the "
                "metric of an optimizer of some leaves belongs, in its own `proximal`, inside "
                "optax.partition."
            )
        if yes:
            _checks.fits(name, "value", path, x, leaf)
    return [jnp.asarray(x) if yes else 0 for x, yes in zip(found, chosen, strict=True)]


def _is_tree(value: Any) -> bool:
    """Whether a value is a tree of arrays, such as one array of several numbers."""
    leaves = jax.tree.leaves(value)
    several = bool(leaves) and not callable(value) and not is_one(value)
    return several and all(_leaves.shape_of(x) is not None for x in leaves)


def _in_wide(f: Callable[..., jax.Array], widen: bool, arrays: int, *row: Any) -> jax.Array:
    leaves = [jnp.asarray(x) for x in row[:arrays]]
    dtype = leaves[0].dtype
    if widen:
        dtype = jnp.promote_types(dtype, leaves[-1].dtype)
    return f(*map(_leaves.wide, leaves), *row[arrays:]).astype(dtype)
