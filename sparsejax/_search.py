"""The search for the k-th largest of many integers by counting, several searches at once.

Each *group* of entries has a k of its own. An entry has *digits*: its key, and its position, which
orders equal keys; the search settles one digit after the other. A pass counts, for every group, how
many entries reach each of six candidates inside the bracket of what is still possible. A sample
proposes the first candidates, interpolation the next: at 0.25, 0.9 and 3 standard deviations on
both sides of the estimate, so that the bracket shrinks to about the square root of what it held.
Where it does not, the next candidates cut it evenly, so that no input takes more than some 24
passes a digit of 32 bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _counts
from sparsejax._counts import Wide

CANDIDATES = 6
# Where to look around an estimate, in standard deviations of its error, by simulation: with normal,
# log-normal, mixed scores and products, 3.9 passes in the mean, where 4 candidates take 5.
_SPREAD = np.array([-3.0, -0.9, -0.25, 0.25, 0.9, 3.0], np.float32)
# How much of a bracket the density's change inside may shift the estimate.
_BEND = 0.02
# A bracket that shrinks by less than this is cut evenly next.
_STUCK = 6

Settled: TypeAlias = tuple[jax.Array, ...]
Count: TypeAlias = Callable[[jax.Array, jax.Array, Settled], Wide]
"""`(candidates [G, C], level [G], settled digits) -> how many entries reach each, [G, C]`."""


class Search(NamedTuple):
    """Where the searches stand; all arrays have one entry a group.

    At least k entries reach `low`, at most k reach `high` (as many as `at_low` and `at_high` say),
    in the digit number `level`.
    """

    level: jax.Array
    settled: Settled
    low: jax.Array
    high: jax.Array
    at_low: Wide
    at_high: Wide
    candidates: jax.Array


def settle(
    count: Count, k: Wide, total: Wide, first: jax.Array, ranges: tuple[np.ndarray, ...]
) -> Settled:
    """The digits of the last entry that is in: as many as k entries reach them, of `total`.

    Args:
      count: counts entries, by their digit number `level`; those whose earlier digits are above the
        settled ones reach everything, those below nothing. No digit is the highest integer.
      k: how many entries are to be in, at most `total`.
      total: how many there are.
      first: the first candidates for the first digit, ascending, of its dtype.
      ranges: for each digit after the first, how many values it has: they are `-range` to -1.

    Returns:
      A tuple of arrays. Where a digit settles it already that exactly k entries are in, all those
      after it are so low that every entry passes.
    """
    dtype = first.dtype
    groups = first.shape[0]
    lowest = jnp.full(groups, jnp.iinfo(dtype).min, dtype)
    highest = jnp.full(groups, jnp.iinfo(dtype).max, dtype)
    depth = 1 + len(ranges)
    start = Search(
        level=jnp.zeros(groups, jnp.int32),
        # Above the lowest: that is the digit of those which are out already.
        settled=(lowest + 1,) * depth,
        low=lowest,
        high=highest,
        at_low=total,
        at_high=_counts.map_halves(jnp.zeros_like, total),
        candidates=first,
    )
    start = _advance(start, k, ranges)

    def one_pass(search: Search) -> Search:
        counts = count(search.candidates, search.level, search.settled)
        return _advance(_tighten(search, counts, k), k, ranges)

    return lax.while_loop(lambda s: jnp.any(s.level < depth), one_pass, start).settled


def even_cut(low: Any, high: Any, dtype: Any) -> jax.Array:
    """Candidates that cut the range from `low` to `high` evenly."""
    return _between(jnp.full(1, low, dtype), jnp.full(1, high, dtype), _EVENLY)[0]


_EVENLY = np.arange(1, CANDIDATES + 1, dtype=np.float32)[None] / (CANDIDATES + 1)


def around(points: jax.Array, share: jax.Array) -> jax.Array:
    """Candidates around the value that a share of some points reaches: six of their quantiles."""
    m = points.size
    error = 1.5 * jnp.sqrt(jnp.maximum(share * (1 - share) * m, 1))
    ranks = jnp.clip(jnp.round(share * m - _SPREAD * error), 1, m).astype(jnp.int32)
    return _distinct(_nth_largest(points, ranks)[None])[0]


def reached(keys: jax.Array, candidates: tuple[jax.Array, ...], axes: tuple[int, ...]) -> Any:
    """How many keys reach each candidate, along some axes.

    On CPU by one variadic reduce, which XLA vectorizes there, other than a sum for each candidate;
    elsewhere by sums, which it fuses.
    """
    if jax.default_backend() != "cpu":
        return tuple(jnp.sum(keys >= c, axes, dtype=jnp.int32) for c in candidates)
    hits = tuple((keys >= c).astype(jnp.int32) for c in candidates)
    zeros = (np.int32(0),) * len(hits)
    return lax.reduce(hits, zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes)


def on_one_cpu() -> bool:
    """Whether the process has one CPU device and no other, so that nothing can be sharded."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def digit(
    digits: list[jax.Array], level: jax.Array | int, settled: tuple[jax.Array, ...]
) -> jax.Array:
    """What the search compares: a digit; above all where an earlier one is above the settled one.

    And lowest of all where an earlier one is below.
    """
    dtype = digits[0].dtype
    found = digits[0]
    lowest = lax.full_like(found, jnp.iinfo(dtype).min)
    highest = lax.full_like(found, jnp.iinfo(dtype).max)
    for depth, (further, cut) in enumerate(zip(digits[1:], settled, strict=False), start=1):
        apart = lax.select(found > cut, highest, lowest)
        deeper = lax.select(found == cut, further, apart)
        found = lax.select(jnp.asarray(level >= depth), deeper, found)
    return found


def _nth_largest(points: jax.Array, ranks: jax.Array) -> jax.Array:
    """For each rank r the largest integer that r points reach, bit by bit."""
    bits = jnp.iinfo(points.dtype).bits
    lowest = jnp.full(ranks.shape, jnp.iinfo(points.dtype).min, points.dtype)

    def settle_bit(i: jax.Array, value: jax.Array) -> jax.Array:
        # Two's complement wraps: lowest + bits runs through all integers in order.
        bit = lax.shift_left(points.dtype.type(1), (bits - 1 - i).astype(points.dtype))
        counts = jnp.stack(reached(points, tuple(value + bit), (0,)))
        return jnp.where(counts >= ranks, value + bit, value)

    return lax.fori_loop(0, bits, settle_bit, lowest)


def _tighten(search: Search, counts: Wide, k: Wide) -> Search:
    """The bracket between the last candidate that k entries reach, and the next."""
    among = _counts.map_halves(lambda x: x[:, None], k)
    last = jnp.sum(_counts.at_least(counts, among), axis=1, keepdims=True, dtype=jnp.int32)

    def edges(low: jax.Array, inner: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        all_edges = jnp.concatenate([low[:, None], inner, high[:, None]], axis=1)
        pair = jnp.take_along_axis(all_edges, jnp.concatenate([last, last + 1], axis=1), axis=1)
        return pair[:, 0], pair[:, 1]

    low, high = edges(search.low, search.candidates, search.high)
    at_low_high, at_high_high = edges(search.at_low.high, counts.high, search.at_high.high)
    at_low_low, at_high_low = edges(search.at_low.low, counts.low, search.at_high.low)
    at_low, at_high = Wide(at_low_high, at_low_low), Wide(at_high_high, at_high_low)
    stuck = _width(low, high) > _width(search.low, search.high) // _STUCK
    shares = jnp.where(stuck[:, None], _EVENLY, _estimates(at_low, at_high, k))
    return search._replace(
        low=low, high=high, at_low=at_low, at_high=at_high, candidates=_between(low, high, shares)
    )


def _advance(search: Search, k: Wide, ranges: tuple[np.ndarray, ...]) -> Search:
    """Settles the digit where its bracket has closed, and goes on to the next where k is open."""
    at_low, at_high = (_counts.equal(c, k) for c in (search.at_low, search.at_high))
    exact = at_low | at_high
    depth = len(search.settled)
    closed = (search.level < depth) & (exact | (search.high - 1 <= search.low))
    value = jnp.where(at_high, search.high, search.low)
    settled = tuple(
        jnp.where(closed & (search.level == number), value, old)
        for number, old in enumerate(search.settled)
    )
    further = closed & ~exact
    level = jnp.where(further, search.level + 1, jnp.where(closed, depth, search.level))
    low, high, candidates = search.low, search.high, search.candidates
    for number, size in enumerate(ranges, start=1):
        here = further & (level == number)
        bottom = -jnp.asarray(size, low.dtype)
        low = jnp.where(here, bottom, low)
        high = jnp.where(here, jnp.zeros_like(high), high)
        estimates = _estimates(search.at_low, search.at_high, k)
        candidates = jnp.where(here[:, None], _between(low, high, estimates), candidates)
    return search._replace(level=level, settled=settled, low=low, high=high, candidates=candidates)


def _estimates(at_low: Wide, at_high: Wide, k: Wide) -> jax.Array:
    """Where in its bracket the value may lie, as fractions of the bracket's width."""
    inside = jnp.maximum(_counts.distance(at_low, at_high), 1)
    share = _counts.distance(at_low, k) / inside
    variance = share * (1 - share)
    error = (jnp.sqrt(inside * variance) + 1) / inside + _BEND * variance
    return share[:, None] + error[:, None] * _SPREAD[None]


def _between(low: jax.Array, high: jax.Array, shares: Any) -> jax.Array:
    """Ascending integers strictly inside a bracket (where it has any), at these fractions of it."""
    width = _width(low, high)
    most = jnp.maximum(width, 2) - 1
    wanted = jnp.clip(shares, 0, np.float32(1 - 2**-20)) * width.astype(jnp.float32)[:, None]
    offsets = jnp.clip(jnp.round(wanted).astype(width.dtype), 1, most[:, None])
    offsets = jnp.minimum(_distinct(offsets), most[:, None])
    return low[:, None] + lax.bitcast_convert_type(offsets, low.dtype)


def _width(low: jax.Array, high: jax.Array) -> jax.Array:
    """High - low as an unsigned integer: it may exceed what a signed one holds."""
    unsigned = np.dtype(f"uint{8 * low.dtype.itemsize}")
    return lax.bitcast_convert_type(high - low, unsigned)


def _distinct(x: jax.Array) -> jax.Array:
    """Ascending numbers made to differ; v, v, v becomes v, v + 1, v + 2, which settles v."""
    room = jnp.arange(x.shape[1], dtype=x.dtype)[None, ::-1]
    return lax.cummax(x + room, axis=1) - room
