"""Whole numbers of more than 31 bits in two int32 halves: JAX has no int64 unless x64 is on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BITS = 24
_MASK = 2**_BITS - 1
LIMIT = 2**48
"""Counts are less than this."""


class Wide(NamedTuple):
    """The numbers `high * 2**24 + low`, with int32 arrays of one shape and 0 <= low < 2**24."""

    high: Any
    low: Any


def wide(n: Any) -> Wide:
    """A Python int below `LIMIT`, or an int32 array of numbers >= 0, in halves."""
    if isinstance(n, int):
        return Wide(np.int32(n >> _BITS), np.int32(n & _MASK))
    return Wide((n >> _BITS).astype(jnp.int32), (n & _MASK).astype(jnp.int32))


def map_halves(f: Any, *counts: Wide) -> Wide:
    """Applies a function of arrays (that moves, stacks or picks entries) to both halves."""
    return Wide(f(*(c.high for c in counts)), f(*(c.low for c in counts)))


def stack(counts: Sequence[Wide]) -> Wide:
    """Several counts as one, with a new first axis."""
    return map_halves(lambda *halves: jnp.stack([jnp.asarray(h) for h in halves]), *counts)


def pick(counts: Wide, index: int) -> Wide:
    """One entry of the first axis."""
    return map_halves(lambda half: half[index], counts)


def add(a: Wide, b: Wide) -> Wide:
    """A + b."""
    low = a.low + b.low
    return Wide(a.high + b.high + (low >> _BITS), low & _MASK)


def subtract(a: Wide, b: Wide) -> Wide:
    """A - b, for a >= b."""
    low = a.low - b.low
    return Wide(a.high - b.high + (low >> _BITS), low & _MASK)


def total(parts: jax.Array) -> Wide:
    """The sum of all entries of an int32 array, each >= 0."""
    axes = tuple(range(parts.ndim))
    zeros = (np.int32(0), np.int32(0))
    return Wide(*lax.reduce(tuple(wide(parts)), zeros, lambda a, b: add(Wide(*a), Wide(*b)), axes))


def at_least(a: Wide, b: Wide) -> jax.Array:
    """Whether a >= b."""
    return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def equal(a: Wide, b: Wide) -> jax.Array:
    """Whether a == b."""
    return (a.high == b.high) & (a.low == b.low)


def clip(a: Wide, n: int) -> Wide:
    """`a`, at most n."""
    most = wide(n)
    inside = at_least(most, a)
    return Wide(jnp.where(inside, a.high, most.high), jnp.where(inside, a.low, most.low))


def distance(a: Wide, b: Wide) -> jax.Array:
    """A - b as float32: an estimate where it has more than 24 bits."""
    high = (a.high - b.high).astype(jnp.float32)
    return high * np.float32(2**_BITS) + (a.low - b.low).astype(jnp.float32)


def rounded_product(x: jax.Array, n: int) -> Wide:
    """Python's `round(x * n)` exactly, for a float32 x in [0, 1) and an int n below `LIMIT`.

    Python multiplies in float64, which rounds to 53 bits, and rounds that half to even. With
    x = m / 2^(24 + r), m of 24 bits, m * n has up to 72 bits, here in three limbs of 24.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    exponent = jnp.maximum(bits >> 23, 1)
    m = bits - ((exponent - 1) << 23)
    low, middle, high = _as_float64(*_product(m, n))
    return _shift_right(low, middle, high, 126 - exponent)


def _product(m: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """M * n in limbs of 24 bits, lowest first."""
    carry, low = _product_24(m, n & _MASK)
    high, middle = _product_24(m, n >> _BITS)
    middle = middle + carry
    return low, middle & _MASK, high + (middle >> _BITS)


def _product_24(m: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Splits m * n = high * 2^24 + low by 12-bit digits, for m and n below 2^24."""
    m1, m0 = m >> 12, m & 0xFFF
    n1, n0 = np.uint32(n >> 12), np.uint32(n & 0xFFF)
    c0 = m0 * n0
    c1 = m1 * n0 + m0 * n1 + (c0 >> 12)
    return m1 * n1 + (c1 >> 12), ((c1 & 0xFFF) << 12) | (c0 & 0xFFF)


def _as_float64(
    low: jax.Array, middle: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rounds 72 bits to their first 53, half to even; only the lowest limb loses any."""
    length = 32 - lax.clz(high).astype(jnp.int32)
    drop = jnp.maximum(length - 5, 0).astype(jnp.uint32)
    half = (np.uint32(1) << drop) >> 1
    rounded = (low + half - 1 + ((low >> drop) & 1)) >> drop << drop
    low = jnp.where(drop > 0, rounded, low)
    middle = middle + (low >> _BITS)
    return low & _MASK, middle & _MASK, high + (middle >> _BITS)


def _shift_right(low: jax.Array, middle: jax.Array, high: jax.Array, r: jax.Array) -> Wide:
    """Divides by 2^(24 + r) and rounds half to even."""
    near = jnp.minimum(r, _BITS)
    far = jnp.clip(r, _BITS, 2 * _BITS) - _BITS
    beyond = r > _BITS
    quotient_low = jnp.where(
        beyond, high >> far, (middle >> near) | (_lowest(high, near) << (_BITS - near))
    )
    quotient_high = jnp.where(beyond, 0, high >> near)
    # The first bit that is cut off, and whether any bit is set below it.
    limb, bit = (r + 23) // _BITS, (r + 23) % _BITS
    at = jnp.select([limb == 0, limb == 1, limb == 2], [low, middle, high], np.uint32(0))
    below = jnp.where(limb >= 1, low, 0) | jnp.where(limb >= 2, middle, 0) | _lowest(at, bit)
    up = ((at >> bit) & 1) & ((below != 0).astype(jnp.uint32) | (quotient_low & 1))
    return add(
        Wide(quotient_high.astype(jnp.int32), quotient_low.astype(jnp.int32)),
        wide(up.astype(jnp.int32)),
    )


def _lowest(limb: jax.Array, bits: jax.Array) -> jax.Array:
    return limb & ((np.uint32(1) << bits) - 1)
