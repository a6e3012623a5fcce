"""Exactly the k largest entries of a few arrays, by counting: no sort, no gather, no large copy.

Every score is read as an integer that orders as the real number does (its bit pattern, with
negative numbers mirrored), so that equal scores give equal answers eager, jitted and sharded. The
k-th largest integer is searched for: every pass reads the scores once and counts how many reach
each of six candidates, which a sample proposes first and interpolation then, so that the bracket
shrinks to about the square root of what it held. Some five passes settle 10⁸ normal numbers. Where
not all ties fit, the same search goes on over positions.

Only counts and a small sample leave an array, so sharded arrays stay where they are.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _counting, _counts, _leaves, _search
from sparsejax._counting import Groups
from sparsejax._counts import Wide
from sparsejax._keys import from_order_key, order_key

__all__ = [
    "keep_largest",
    "keep_largest_along",
    "keep_largest_each",
    "kept_count",
    "kth_largest",
    "order_key",
    "removed_count",
    "rest_count",
]


def removed_count(sparsity: Any, n: int) -> Any:
    """How many of `n` entries a sparsity removes: Python's `round(sparsity * n)`, half to even.

    Args:
      sparsity: a fraction in [0, 1). A number that can be looked at counts as its own value, a
        traced one as its float32 value; traced, 1 and more remove all, less than 0 and NaN nothing.
      n: the number of entries, less than 2⁴⁸.

    Returns:
      An `int`. For a traced sparsity a 0-d int32 array with the same value; where `n` is 2³¹ or
      more, two of them (high, low), for high * 2²⁴ + low, which `keep_largest` understands.

    Raises:
      TypeError: if `sparsity` is not one real number.
      ValueError: if it is seen not to be in [0, 1), or if `n` is 2⁴⁸ or more.

    Example:
      >>> from sparsejax import selection
      >>> selection.removed_count(0.5, 5), selection.removed_count(0.9, 266_200)
      (2, 239580)
    """
    _checks.fraction("sparsity", sparsity)
    _check_total(n)
    if not _leaves.is_traced(sparsity):
        return round(float(sparsity) * n)
    x = jnp.asarray(sparsity, jnp.float32)
    inside = (x > 0) & (x < 1)
    count = _counts.rounded_product(jnp.where(inside, x, 0), n)
    every = _counts.wide(n)
    count = _counts.map_halves(partial(jnp.where, x >= 1), every, count)
    return count if n >= 2**31 else (count.high << 24) + count.low


def kept_count(sparsity: Any, n: int) -> Any:
    """How many of `n` entries a sparsity keeps: `n - removed_count(sparsity, n)`.

    Args, Returns and Raises are those of `removed_count`.

    Example:
      >>> from sparsejax import selection
      >>> selection.kept_count(0.9, 266_200)
      26620
    """
    removed = removed_count(sparsity, n)
    if isinstance(removed, Wide):
        return _counts.subtract(_counts.wide(n), removed)
    return n - removed


def rest_count(count: Any, n: int, where: str = "") -> Any:
    """How many of `n` entries are left when `count` of them are removed.

    Args:
      count: an int or a 0-d integer array; a traced one outside of 0 to `n` removes none or all.
      n: the number of entries, less than 2⁴⁸.
      where: what an error says after the value.

    Returns:
      An `int`; for a traced count what `removed_count` returns for a traced sparsity.

    Raises:
      TypeError: if `count` is not one integer.
      ValueError: if it is seen to be out of range, or if `n` is 2⁴⁸ or more.

    Example:
      >>> from sparsejax import selection
      >>> selection.rest_count(3, 10)
      7
    """
    _check_total(n)
    _checks.integer("count", count)
    if not _leaves.is_traced(count):
        if not 0 <= int(count) <= n:
            raise ValueError(
                f"`count` must be from 0 to {n}, the number of what may be pruned, got {count}"
                f"{where}."
            )
        return n - int(count)
    rest = _counts.subtract(_counts.wide(n), _as_wide("count", count, n))
    return rest if n >= 2**31 else (rest.high << 24) + rest.low


def keep_largest(scores: Sequence[jax.Array], keep: Any) -> list[jax.Array]:
    """Boolean masks, True at exactly the `keep` largest entries of all the arrays together.

    Ties: the lower flat index wins, arrays in the order given. +0 and -0 are equal; NaN ranks below
    -inf. Cost: about seven reads of the scores and one write of the masks; where ties are broken,
    some six reads more. Scores that are computed inside the same `jit` are stored once. On one CPU,
    arrays of fewer than 2¹⁷ entries are copied together where they are more than 32, because XLA
    compiles for every array.

    Args:
      scores: floating arrays of any shapes, less than 2⁴⁸ entries in all.
      keep: how many entries to keep, an int or a 0-d integer array, from 0 to their number; a
        traced one outside keeps none or all.

    Returns:
      A boolean array for each array, of the same shape.

    Raises:
      TypeError: if a score is not floating, or `keep` not one integer.
      ValueError: if `keep` is out of range, or an array is too large (2³¹ entries along an axis, or
        after its first one).

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import selection
      >>> selection.keep_largest([jnp.array([1.0, 3.0]), jnp.array([[3.0, 2.0]])], 2)
      [Array([False,  True], dtype=bool), Array([[ True, False]], dtype=bool)]
    """
    _check_scores(scores)
    keep = _as_wide("keep", keep, sum(_counting.size(s) for s in scores))
    masks: list[jax.Array] = _masks(tuple(scores), (0,) * len(scores), _counts.stack([keep]))
    return masks


def keep_largest_each(scores: Sequence[jax.Array], keep: Sequence[Any]) -> list[jax.Array]:
    """Boolean masks, True at exactly the `keep[i]` largest entries of array i, for each array.

    As `keep_largest` of one array each, in one loop for all of them.

    Args:
      scores: floating arrays of any shapes.
      keep: how many entries to keep in each, as in `keep_largest`.

    Returns:
      A boolean array for each array, of the same shape.

    Raises:
      TypeError, ValueError: as in `keep_largest`, or if there is not one count for each array.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import selection
      >>> selection.keep_largest_each([jnp.array([1.0, 3.0]), jnp.array([[3.0, 2.0]])], [1, 0])
      [Array([False,  True], dtype=bool), Array([[False, False]], dtype=bool)]
    """
    _check_scores(scores)
    if not isinstance(keep, list | tuple | np.ndarray) or len(keep) != len(scores):
        raise ValueError(
            f"`keep` must have one count for each of {len(scores)} arrays, got "
            f"{_leaves.brief(keep)}."
        )
    if not scores:
        return []
    counts = [_as_wide("keep", k, _counting.size(s)) for s, k in zip(scores, keep, strict=True)]
    masks: list[jax.Array] = _masks(tuple(scores), tuple(range(len(scores))), _counts.stack(counts))
    return masks


def keep_largest_along(scores: jax.Array, keep: Any, axis: int | Sequence[int] = -1) -> jax.Array:
    """A boolean mask, True at exactly the `keep` largest entries along some axes.

    Entries compete with those that differ from them in these axes only: along -1, every row has
    its own `keep` largest. Blocks are rows of a reshaped array.

    Args:
      scores: a floating array.
      keep: how many to keep, an int or an integer array with the shape of the other axes (or 1
        along some).
      axis: the axes along which entries compete.

    Returns:
      A boolean array of the same shape.

    Raises:
      TypeError: if scores are not floating, `keep` not an integer or `axis` not one or several.
      ValueError: if an axis is out of range, `keep` does not broadcast, or is out of range; or if
        an explicit mesh shards another axis than these, over which JAX cannot map such a loop.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import selection
      >>> selection.keep_largest_along(jnp.array([[1.0, 3.0, 2.0], [5.0, 4.0, 9.0]]), 1)
      Array([[False,  True, False],
             [False, False,  True]], dtype=bool)
    """
    _check_scores([scores])
    competing = _checks.axes("axis", axis, np.ndim(scores))
    others = [a for a in range(np.ndim(scores)) if a not in competing]
    shape = tuple(np.shape(scores)[a] for a in others)
    n = math.prod(np.shape(scores)[a] for a in competing)
    _check_shards(scores, others)
    keep = _counts_along(keep, shape, n)

    def mask(row: jax.Array, count: jax.Array) -> jax.Array:
        return _masks((row,), (0,), _counts.stack([_counts.wide(count)]))[0]

    for _ in others:
        mask = jax.vmap(mask)
    if 0 in shape:
        return jnp.zeros(np.shape(scores), bool)
    order = (*others, *competing)
    kept = mask(jnp.transpose(jnp.asarray(scores), order), keep)
    return jnp.transpose(kept, tuple(np.argsort(order)))


def kth_largest(scores: Sequence[jax.Array], k: Any) -> jax.Array:
    """The k-th largest entry of all the arrays together, exactly; k = 1 is the maximum.

    Args:
      scores: floating arrays of any shapes; NaN ranks below -inf.
      k: from 1 to the number of entries, an int or a 0-d integer array; a traced one outside gives
        NaN.

    Returns:
      A 0-d array of at least float32, the widest dtype of the scores; a zero is +0.

    Raises:
      TypeError: if a score is not floating, or `k` not one integer.
      ValueError: if `k` is out of range, or an array is too large, as in `keep_largest`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import selection
      >>> selection.kth_largest([jnp.array([1.0, 3.0]), jnp.array([[-3.0, 2.0]])], 3)
      Array(1., dtype=float32)
    """
    _check_scores(scores)
    n = sum(_counting.size(s) for s in scores)
    if not isinstance(k, Wide):
        _checks.integer("k", k)
        if not _leaves.is_traced(k) and not 1 <= int(k) <= n:
            raise ValueError(f"`k` must be from 1 to {n}, the number of scores, got {k}.")
    if n == 0:
        return jnp.full((), jnp.nan, _counting.common_dtype([*scores, jnp.zeros(0)]))
    value: jax.Array = _kth_largest(tuple(scores), _as_wide("k", k, n), _outside(k, n))
    return value


# Compiled here, because an eager loop would be compiled anew in every call.
@partial(jax.jit, static_argnums=1)
def _masks(scores: tuple[jax.Array, ...], groups: Groups, keep: Wide) -> list[jax.Array]:
    if not scores:
        return []
    dtype = _counting.common_dtype(scores)
    packed = _counting.pack(scores, groups)
    places = _counting.places(packed.scores, packed.groups)
    starts = _counting.first_digits(places, dtype, keep)
    settled = _counting.settle(packed.scores, packed.groups, keep, places.ranges, starts)
    last = len(places.ranges)
    cuts = [tuple(c[group] for c in settled) for group in range(max(groups) + 1)]
    masks = []
    for s, group, start in zip(packed.scores, packed.groups, starts, strict=True):
        view = s if last > 1 else _counting.flat(s)
        found = _search.digit(_counting.digits(view, dtype, start), last, cuts[group])
        masks.append(found >= cuts[group][-1])
    return packed.unpack(masks, [s.shape for s in scores])


@jax.jit
def _kth_largest(scores: tuple[jax.Array, ...], k: Wide, outside: jax.Array) -> jax.Array:
    dtype = _counting.common_dtype(scores)
    packed = _counting.pack(scores, (0,) * len(scores))
    (cut,) = _counting.settle(packed.scores, packed.groups, _counts.stack([k]))
    # The search may stop between two keys, where exactly k reach the cut.
    key = _counting.smallest_key(packed.scores, cut[0], dtype)
    return jnp.where(outside, jnp.nan, from_order_key(key, dtype))


def _check_scores(scores: Sequence[Any]) -> None:
    if not isinstance(scores, list | tuple):
        raise TypeError(
            f"`scores` must be a list of arrays, got {_leaves.describe(scores)}; for one array "
            "[scores]."
        )
    for s in scores:
        if not _leaves.is_floating(s):
            raise TypeError(
                f"`scores` must be real floating arrays, got {_leaves.describe(s)}; "
                "astype(float) of integers."
            )
        if max(_counting.rows(s)) >= 2**31:
            raise ValueError(
                "`scores` must have fewer than 2**31 rows, and fewer entries in each row (what one "
                f"index of the first axis holds; a vector is one row), got {_leaves.describe(s)}; "
                "split it, or move another axis to the front."
            )
    total = sum(map(_counting.size, scores))
    _check_total(total)
    rows = sum(_counting.rows(s)[0] for s in scores)
    if total >= 2**31 and rows >= 2**31:
        raise ValueError(
            f"`scores` must have fewer than 2**31 rows in all (indices of first axes), got {rows}; "
            "move other axes to the front."
        )


def _check_shards(scores: Any, others: Sequence[int]) -> None:
    """An explicit mesh has its axes in the type; an auto mesh has not, and will do."""
    spec = jax.typeof(scores).sharding.spec
    if any(axis < len(spec) and spec[axis] is not None for axis in others):
        raise ValueError(
            "`scores` must not be sharded over an explicit mesh along axes other than those along "
            f"which entries compete, got {jax.typeof(scores)}; reshard them to other axes, or make "
            "the mesh with axis_types of jax.sharding.AxisType.Auto."
        )


def _check_total(n: int) -> None:
    if n >= _counts.LIMIT:
        raise ValueError(f"`scores` must have fewer than 2**48 entries in all, got {n}.")


def _as_wide(name: str, count: Any, n: int) -> Wide:
    """A count from 0 to n; a traced one outside becomes the nearer of them."""
    if isinstance(count, Wide):
        return _counts.clip(count, n)
    _checks.integer(name, count)
    if not _leaves.is_traced(count):
        if not 0 <= int(count) <= n:
            raise ValueError(f"`{name}` must be from 0 to {n}, the number of scores, got {count}.")
        return _counts.wide(int(count))
    return _counts.wide(jnp.clip(count, 0, _most(count, n)))


def _most(count: Any, n: int) -> int:
    """n, or the largest number that the dtype of a count holds."""
    return min(n, int(jnp.iinfo(_leaves.dtype_of(count)).max))


def _counts_along(keep: Any, shape: tuple[int, ...], n: int) -> jax.Array:
    """An int32 count from 0 to n for each of several selections."""
    if not jnp.issubdtype(_leaves.dtype_of(keep) or np.dtype(object), jnp.integer):
        raise TypeError(f"`keep` must be integers, got {_leaves.brief(keep)}.")
    if n >= 2**31:
        raise ValueError(f"`scores` must have fewer than 2**31 entries along `axis`, got {n}.")
    if not _leaves.is_traced(keep) and np.any((np.asarray(keep) < 0) | (np.asarray(keep) > n)):
        raise ValueError(
            f"`keep` must be from 0 to {n}, the number of scores along `axis`, got "
            f"{_leaves.brief(keep)}."
        )
    got = np.shape(keep)
    if got and (
        len(got) != len(shape) or any(g not in (1, n) for g, n in zip(got, shape, strict=True))
    ):
        raise ValueError(
            f"`keep` must broadcast to {shape}, the other axes of `scores`, got shape {got}."
        )
    counts = jnp.clip(jnp.asarray(keep), 0, _most(keep, n)).astype(jnp.int32)
    return jnp.broadcast_to(counts.reshape(got or (1,) * len(shape)), shape)


def _outside(k: Any, n: int) -> jax.Array:
    """Whether a traced k is not from 1 to n; a concrete one has been checked."""
    if isinstance(k, Wide):
        return _counts.equal(k, _counts.wide(0)) | ~_counts.at_least(_counts.wide(n), k)
    if not _leaves.is_traced(k):
        return jnp.zeros((), bool)
    return (k < 1) | (k > _most(k, n))
