"""Floating numbers as integers of the same order, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _leaves


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
    integer = integer_like(wide.dtype)
    bits = lax.bitcast_convert_type(wide, integer)
    magnitude = bits & integer.type(jnp.iinfo(integer).max)
    infinity = integer.type(np.asarray(np.inf, wide.dtype).view(integer))
    # Primitives, not jnp.where: a program has this for every leaf, and each where is a call in it.
    key = lax.select(bits < 0, -magnitude, magnitude)
    lowest = lax.full_like(key, jnp.iinfo(integer).min)
    return lax.select(magnitude > infinity, lowest, key)


def from_order_key(key: jax.Array, dtype: Any) -> jax.Array:
    """The float32 (or float64) numbers whose keys these are; zeros are +0."""
    integer = integer_like(dtype)
    sign = integer.type(jnp.iinfo(integer).min)
    bits = jnp.where(key < 0, -key | sign, key)
    return jnp.where(key == sign, jnp.nan, lax.bitcast_convert_type(bits, jnp.dtype(dtype)))


def integer_like(dtype: Any) -> np.dtype:
    """The integer dtype of as many bits."""
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
    integer = integer_like(x.dtype)
    bits = lax.bitcast_convert_type(x, integer)
    magnitude = bits & integer.type(jnp.iinfo(integer).max)
    tiny = magnitude.astype(dtype) * np.asarray(info.smallest_subnormal, dtype)
    denormal = magnitude < integer.type(1 << info.nmant)
    return jnp.where(denormal, jnp.where(bits < 0, -tiny, tiny), x.astype(dtype))
