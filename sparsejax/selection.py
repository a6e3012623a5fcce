"""Exactly the k largest entries of a few arrays, by counting: no sort, no gather, nothing copied.

Every score is read as an integer that orders as the real number does (its bit pattern, with
negative numbers mirrored), so that equal scores give equal answers eager, jitted and sharded. The
k-th largest integer is found digit by digit in base 4: one pass over the scores counts how many
entries reach each of the three digits above 0; sixteen passes settle 32 bits. A second search, over
positions, breaks ties where not all of them fit.

Only counts leave an array, so sharded arrays stay where they are.
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _checks, _leaves

_DIGIT_BITS = 2
_DIGITS = 2**_DIGIT_BITS - 1


def removed_count(sparsity: Any, n: int) -> Any:
    """How many of `n` entries a sparsity removes: Python's `round(sparsity * n)`, half to even.

    Args:
      sparsity: a fraction in [0, 1). A number that can be looked at counts as its own value, a
        traced one as its float32 value; traced, 1 and more remove all, less than 0 and NaN nothing.
      n: the number of entries, less than 2³¹.

    Returns:
      An `int`; for a traced sparsity a 0-d int32 array with the same value.

    Raises:
      TypeError: if `sparsity` is not one real number.
      ValueError: if it is seen not to be in [0, 1), or, traced, if `n` is 2³¹ or more.

    Example:
      >>> from sparsejax import selection
      >>> selection.removed_count(0.5, 5), selection.removed_count(0.9, 266_200)
      (2, 239580)
    """
    _checks.fraction("sparsity", sparsity)
    if not _leaves.is_traced(sparsity):
        return round(float(sparsity) * n)
    _check_count(n)
    x = jnp.asarray(sparsity, jnp.float32)
    inside = (x > 0) & (x < 1)
    count = _rounded_product(jnp.where(inside, x, 0), n)
    return jnp.where(x >= 1, jnp.int32(n), count)


def keep_largest(scores: Sequence[jax.Array], keep: Any) -> list[jax.Array]:
    """Boolean masks, True at exactly the `keep` largest entries of all the arrays together.

    Ties: the lower flat index wins, arrays in the order given. +0 and -0 are equal; NaN ranks below
    -inf.

    Args:
      scores: floating arrays of any shapes.
      keep: how many entries to keep, an int or a 0-d integer array, from 0 to their number.

    Returns:
      A boolean array for each array, of the same shape.

    Raises:
      TypeError: if a score is not floating, or `keep` not one integer.
      ValueError: if `keep` is out of range, or there are 2³¹ entries or more.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import selection
      >>> selection.keep_largest([jnp.array([1.0, 3.0]), jnp.array([[3.0, 2.0]])], 2)
      [Array([False,  True], dtype=bool), Array([[ True, False]], dtype=bool)]
    """
    n = sum(math.prod(np.shape(s)) for s in scores)
    _check_count(n)
    _check_keep(keep, n)
    for s in scores:
        if not _leaves.is_floating(s):
            raise TypeError(
                f"`scores` must be real floating arrays, got {_leaves.describe(s)}; "
                "astype(float) of integers."
            )
    masks: list[jax.Array] = _keep_largest(tuple(scores), jnp.asarray(keep, jnp.int32))
    return masks


def order_key(scores: jax.Array, dtype: Any = None) -> jax.Array:
    """Integers that order as the real numbers do, NaN below all of them.

    Args:
      scores: a floating array of any shape.
      dtype: the floating dtype in whose order to express them, at least as wide; default its own,
        but at least float32.

    Returns:
      An int32 array (int64 for float64) of the same shape. Compared as integers, denormals count
      too, which floating comparisons on CPU flush to zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import selection
      >>> key = selection.order_key(jnp.array([-1.0, -0.0, 0.0, 1e-45, jnp.inf, jnp.nan]))
      >>> bool(key[1] == key[2]), bool(key[0] < key[1] < key[3] < key[4]), bool(key[5] < key[0])
      (True, True, True)
    """
    if not _leaves.is_floating(scores):
        raise TypeError(f"`scores` must be real floating, got {_leaves.describe(scores)}.")
    wide = _widen(scores, jnp.dtype(dtype or _leaves.wide_dtype(scores.dtype)))
    integer = _integer_like(wide.dtype)
    bits = lax.bitcast_convert_type(wide, integer)
    magnitude = bits & integer.type(jnp.iinfo(integer).max)
    infinity = integer.type(np.asarray(np.inf, wide.dtype).view(integer))
    key = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity, integer.type(jnp.iinfo(integer).min), key)


# Compiled here, because an eager loop would be compiled anew in every call.
@jax.jit
def _keep_largest(scores: tuple[jax.Array, ...], keep: jax.Array) -> list[jax.Array]:
    if not scores:
        return []
    dtype = jnp.result_type(*(_leaves.wide_dtype(s.dtype) for s in scores))
    integer = _integer_like(dtype)
    keys = [partial(order_key, s, dtype) for s in scores]
    starts = np.cumsum([0, *(s.size for s in scores)])[:-1]
    orders = [partial(_earliness, s.shape, int(i)) for s, i in zip(scores, starts, strict=True)]

    cut = _kth_largest(keys, keep, integer)
    reached, above = _total([_count_at_least(key(), (cut, cut + 1)) for key in keys])
    last = lax.cond(
        reached == keep,
        lambda: np.int32(0),
        lambda: _kth_largest(
            [partial(_where_tied, *pair, cut) for pair in zip(keys, orders, strict=True)],
            keep - above,
            np.dtype(np.int32),
        ),
    )
    return [
        (key() > cut) | ((key() == cut) & (order() >= last))
        for key, order in zip(keys, orders, strict=True)
    ]


def _check_count(n: int) -> None:
    if n >= 2**31:
        raise ValueError(
            f"`scores` must have fewer than 2**31 prunable entries in all, got {n}. "
            'Select leaf by leaf (scope="per_leaf"), or leave some out of `prunable`.'
        )


def _check_keep(keep: Any, n: int) -> None:
    if _leaves.shape_of(keep) != () or not jnp.issubdtype(_leaves.dtype_of(keep), jnp.integer):
        raise TypeError(f"`keep` must be one integer, got {_leaves.brief(keep)}.")
    if not _leaves.is_traced(keep) and not 0 <= int(keep) <= n:
        raise ValueError(f"`keep` must be from 0 to {n}, the number of scores, got {keep}.")


def _earliness(shape: tuple[int, ...], start: int) -> jax.Array:
    """int32, larger for lower flat indices; from coordinates, so that it shards like the array."""
    index = jnp.full(shape, start, jnp.int32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index = index + stride * lax.broadcasted_iota(jnp.int32, shape, axis)
    return np.int32(2**31 - 1) - index


def _where_tied(
    key: Callable[[], jax.Array], order: Callable[[], jax.Array], cut: jax.Array
) -> jax.Array:
    return jnp.where(key() == cut, order(), np.int32(-1))


def _kth_largest(
    keys: Sequence[Callable[[], jax.Array]], k: jax.Array, integer: np.dtype
) -> jax.Array:
    """The largest value that `k` keys reach: the k-th largest key, the maximum for k = 0."""
    bits = jnp.iinfo(integer).bits
    lowest = integer.type(jnp.iinfo(integer).min)

    def settle_digit(i: jax.Array, value: jax.Array) -> jax.Array:
        shift = (bits - _DIGIT_BITS * (i + 1)).astype(integer)
        # Two's complement wraps: lowest + digits runs through all integers in order.
        candidates = value + lax.shift_left(jnp.arange(1, _DIGITS + 1, dtype=integer), shift)
        reached = _total([_count_at_least(key(), tuple(candidates)) for key in keys])
        digit = jnp.sum(reached >= k, dtype=integer)
        return value + lax.shift_left(digit, shift)

    return lax.fori_loop(0, bits // _DIGIT_BITS, settle_digit, jnp.asarray(lowest))


def _count_at_least(key: jax.Array, candidates: tuple[jax.Array, ...]) -> jax.Array:
    """For each candidate, how many keys reach it; one variadic reduce, which XLA:CPU vectorizes."""
    hits = tuple((key >= c).astype(jnp.int32) for c in candidates)
    counts = lax.reduce(
        hits,
        (np.int32(0),) * len(hits),
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        tuple(range(key.ndim)),
    )
    return jnp.stack(counts)


def _total(counts: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, counts)


def _integer_like(dtype: Any) -> np.dtype:
    return np.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")


def _widen(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """`x` in a wider floating dtype, exactly: a conversion on CPU may flush denormals."""
    if x.dtype == dtype:
        return x
    if x.dtype == jnp.bfloat16:
        # The upper half of a float32, whose own denormals no multiplication makes.
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return _widen(lax.bitcast_convert_type(bits, jnp.float32), dtype)
    info = jnp.finfo(x.dtype)
    integer = _integer_like(x.dtype)
    bits = lax.bitcast_convert_type(x, integer)
    magnitude = bits & integer.type(jnp.iinfo(integer).max)
    tiny = magnitude.astype(dtype) * np.asarray(info.smallest_subnormal, dtype)
    denormal = magnitude < integer.type(1 << info.nmant)
    return jnp.where(denormal, jnp.where(bits < 0, -tiny, tiny), x.astype(dtype))


def _rounded_product(x: jax.Array, n: int) -> jax.Array:
    """round(x * n), half to even, exactly, for a float32 in [0, 1) and a Python int below 2³¹.

    x = m / 2^(24 + r) with a 24-bit m, and m * n = high * 2^24 + low: float32 alone holds neither.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    exponent = jnp.maximum(bits >> 23, 1)
    m = bits - ((exponent - 1) << 23)
    high, low = _as_float64(*_product_24(m, n))
    r = 126 - exponent
    safe = jnp.minimum(r, 31)
    quotient = high >> safe
    rest = high - (quotient << safe)
    half_high = jnp.where(safe > 0, np.uint32(1) << (jnp.maximum(safe, 1) - 1), np.uint32(0))
    half_low = jnp.where(safe > 0, np.uint32(0), np.uint32(1 << 23))
    more = (rest > half_high) | ((rest == half_high) & (low > half_low))
    exactly = (rest == half_high) & (low == half_low)
    rounded = quotient + (more | (exactly & ((quotient & 1) == 1))).astype(jnp.uint32)
    return jnp.where(r > 31, 0, rounded.astype(jnp.int32))


def _as_float64(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds high * 2^24 + low < 2^55 to 53 bits, half to even, as Python's product does."""
    drop = (high >= 1 << 29).astype(jnp.uint32) + (high >= 1 << 30).astype(jnp.uint32)
    half = (np.uint32(1) << drop) >> 1
    rounded = (low + half - 1 + ((low >> drop) & 1)) >> drop << drop
    low = jnp.where(drop > 0, rounded, low)
    return high + (low >> 24), low & 0xFFFFFF


def _product_24(m: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Splits m * n = high * 2^24 + low by 12-bit digits, for uint32 m < 2^24 and n < 2^31."""
    m1, m0 = m >> 12, m & 0xFFF
    n2, n1, n0 = (np.uint32(n >> shift & 0xFFF) for shift in (24, 12, 0))
    c0 = m0 * n0
    c1 = m1 * n0 + m0 * n1 + (c0 >> 12)
    high = m1 * n1 + m0 * n2 + (c1 >> 12) + (m1 * n2 << 12)
    return high, ((c1 & 0xFFF) << 12) | (c0 & 0xFFF)
