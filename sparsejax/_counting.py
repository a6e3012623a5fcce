"""How a search reads arrays: keys and positions, the counts of a pass, and a first sample."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _counts, _leaves, _search
from sparsejax._counts import Wide
from sparsejax._keys import integer_like, order_key

# From how many entries on a sample of how many pays, and from how many arrays at most: each costs
# the time to compile a gather.
_SAMPLED_FROM = 2**18
_SAMPLE = 2**14
_SAMPLED_ARRAYS = 64
# Arrays of fewer entries are packed where they are more than this.
_SMALL = 2**17
_MANY = 32
# XLA:CPU gives a reduction to a scalar to one core, one to a vector to all.
_LANES = 16
_LANES_FROM = 2**20

Groups: TypeAlias = tuple[int, ...]
"""For each array the number of the group in which its entries compete."""


class Packed(NamedTuple):
    """Arrays in which small ones that stood side by side have become one vector."""

    scores: list[jax.Array]
    groups: Groups
    runs: list[list[int]]
    """For each of `scores` the numbers of the arrays in it."""

    def unpack(self, masks: Sequence[jax.Array], shapes: Sequence[Any]) -> list[jax.Array]:
        """The masks of the arrays that were packed, of these shapes."""
        found = []
        for mask, run in zip(masks, self.runs, strict=True):
            ends = np.cumsum([math.prod(shapes[i]) for i in run])
            parts = [mask] if len(run) == 1 else jnp.split(mask, ends[:-1])
            found += [part.reshape(shapes[i]) for part, i in zip(parts, run, strict=True)]
        return found


def pack(scores: Sequence[jax.Array], groups: Groups) -> Packed:
    """Packs small arrays where they are so many that to compile for each would take long.

    Every array takes XLA:CPU some 40 ms; a copy of few entries takes less. On one CPU only, since
    it would move what is sharded.
    """
    small = sum(size(s) < _SMALL for s in scores)
    packs = _search.on_one_cpu() and small > _MANY
    runs: list[list[int]] = []
    for i, s in enumerate(scores):
        before = runs[-1][-1] if runs else i
        fits = packs and size(s) < _SMALL and size(scores[before]) < _SMALL
        if runs and fits and groups[i] == groups[before] and s.dtype == scores[before].dtype:
            runs[-1].append(i)
        else:
            runs.append([i])
    packed = [
        scores[run[0]] if len(run) == 1 else jnp.concatenate([scores[i].reshape(-1) for i in run])
        for run in runs
    ]
    return Packed(packed, tuple(groups[run[0]] for run in runs), runs)


class Places(NamedTuple):
    """Positions inside the groups.

    A position is one digit, a flat index. Where a group has 2³¹ entries or more, it is two: a row
    (one index of the first axis; a vector is one row) and an index in the row.
    """

    starts: list[tuple[int, ...]]
    """For each array the position of its first entry."""
    ranges: tuple[np.ndarray, ...]
    """For each digit how many values it has, in each group."""


def places(scores: Sequence[jax.Array], groups: Groups) -> Places:
    """The positions of some arrays, one after the other in each group."""
    sizes, heights, lengths = np.zeros((3, max(groups) + 1), np.int64)
    by_entry: list[tuple[int, ...]] = []
    by_row: list[tuple[int, ...]] = []
    for s, group in zip(scores, groups, strict=True):
        by_entry.append((int(sizes[group]),))
        by_row.append((int(heights[group]), 0))
        height, length = rows(s)
        sizes[group] += size(s)
        heights[group] += height
        lengths[group] = max(lengths[group], length)
    if np.max(sizes) < 2**31:
        return Places(by_entry, (sizes,))
    return Places(by_row, (heights, lengths))


def digits(s: jax.Array, dtype: np.dtype, start: Sequence[Any] = ()) -> list[jax.Array]:
    """The digits of every entry: its key, and its position, from -1 downward: earlier is larger.

    Args:
      s: scores.
      dtype: the floating dtype in whose order to express them.
      start: the digits of the first entry's position, and 1, which `opaque` has made variables;
        none, and positions are left out.
    """
    found = [order_key(s, dtype)]
    if not start:
        return found
    *firsts, one = start
    split = 0 if len(firsts) == 1 or s.ndim < 2 else 1
    parts = [range(split), range(split, s.ndim)]
    for first, axes in zip(firsts, parts[-len(firsts) :], strict=True):
        # From coordinates, so that positions shard like the array.
        index = lax.full_like(found[0], first) if not axes else first
        for axis in axes:
            steps = lax.broadcasted_iota(first.dtype, s.shape, axis, out_sharding=explicit(s))
            stride = math.prod(s.shape[axis + 1 : axes.stop])
            index = index - (steps if stride == 1 else steps * (one * stride))
        found.append(index)
    return found


def opaque(*values: Any) -> Any:
    """The same values, as variables to XLA inside a loop.

    Else it would compute keys and positions once, before the loop: a copy of all scores.
    """
    return lax.optimization_barrier(values)


def first_digits(placed: Places, dtype: np.dtype, keep: Wide) -> list[tuple[jax.Array, ...]]:
    """For each array what `digits` wants as `start`.

    As outputs of a conditional, though its predicate is always true: XLA compiles a kernel once for
    all arrays of a shape, unless a constant such as the start is part of it.
    """
    integer = integer_like(dtype)
    one = np.ones((), integer)
    starts = [(*(np.array(-1 - n, integer) for n in start), one) for start in placed.starts]
    zeros = jax.tree.map(np.zeros_like, starts)
    true = jnp.all(keep.high >= 0)
    found: list[tuple[jax.Array, ...]] = lax.cond(true, lambda: starts, lambda: zeros)
    return found


def settle(
    scores: Sequence[jax.Array],
    groups: Groups,
    keep: Wide,
    ranges: tuple[np.ndarray, ...] = (),
    starts: Sequence[Any] = (),
) -> _search.Settled:
    """The digits of the last kept entry of each group; without `ranges` and `starts`, its key."""
    dtype = common_dtype(scores)
    starts = starts or [()] * len(scores)
    members = [[i for i, g in enumerate(groups) if g == group] for group in range(max(groups) + 1)]
    sizes = [sum(size(scores[i]) for i in group) for group in members]
    by_row = len(ranges) > 1

    def count(candidates: jax.Array, level: jax.Array, settled: _search.Settled) -> Wide:
        arrays, firsts, candidates, level, settled = opaque(
            scores, starts, candidates, level, settled
        )

        def of_group(group: int) -> Wide:
            depth, cut = level[group], tuple(c[group] for c in settled)
            edges = tuple(candidates[group])
            lanes = []
            for i in members[group]:
                view, axes = _lanes(arrays[i], by_row)
                found = _search.digit(digits(view, dtype, firsts[i]), depth, cut)
                lanes.append(_search.reached(found, edges, axes))
            return _total(lanes, sizes[group])

        return _counts.stack([of_group(group) for group in range(len(members))])

    first = [
        _first_candidates([scores[i] for i in indices], _counts.pick(keep, group), dtype)
        for group, indices in enumerate(members)
    ]
    total = _counts.stack([_counts.wide(n) for n in sizes])
    return _search.settle(count, keep, total, jnp.stack(first), ranges)


def smallest_key(scores: Sequence[jax.Array], cut: jax.Array, dtype: np.dtype) -> jax.Array:
    """The smallest key that is at least `cut`, the largest integer where there is none."""
    highest = np.array(jnp.iinfo(cut.dtype).max, cut.dtype)

    def merge(a: Any, b: Any) -> Any:
        return lax.min(a[0], b[0]), lax.bitwise_or(a[1], b[1])

    smallest = jnp.asarray(highest)
    for s in scores:
        view, axes = _lanes(s, False)
        key = order_key(view, dtype)
        above = key >= cut
        candidates = lax.select(above, key, lax.full_like(key, highest))
        # A reduction of pairs: XLA:CPU vectorizes that, and would write the keys for one of keys.
        pair = (candidates, above.astype(jnp.int32))
        least, found = lax.reduce(pair, (highest, np.int32(0)), merge, axes)
        smallest = jnp.minimum(smallest, jnp.min(jnp.where(found > 0, least, highest)))
    return smallest


def common_dtype(scores: Sequence[jax.Array]) -> np.dtype:
    """The narrowest dtype that holds all scores, at least float32."""
    return np.dtype(jnp.result_type(*(_leaves.wide_dtype(s.dtype) for s in scores)))


def size(s: Any) -> int:
    """The number of entries of an array-like."""
    return math.prod(np.shape(s))


def rows(s: Any) -> tuple[int, int]:
    """How many rows an array has (a vector is one), and how many entries each."""
    shape = np.shape(s)
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _first_candidates(arrays: list[jax.Array], keep: Wide, dtype: np.dtype) -> jax.Array:
    n = sum(map(size, arrays))
    integer = integer_like(dtype)
    if n < _SAMPLED_FROM:
        return _search.even_cut(jnp.iinfo(integer).min, jnp.iinfo(integer).max, integer)
    share = _counts.distance(keep, _counts.wide(0)) / np.float32(n)
    points = [order_key(x, dtype) for x in _sample(arrays)]
    return _search.around(jnp.concatenate(points), share)


def _sample(arrays: list[jax.Array]) -> list[jax.Array]:
    """Entries at random places: a gather by coordinates, to which every shard adds its own."""
    ends = np.cumsum([size(a) for a in arrays])
    clusters = _SAMPLE if len(arrays) <= _SAMPLED_ARRAYS else _SAMPLED_ARRAYS
    middles = (np.arange(clusters) + 0.5) / clusters * ends[-1]
    shares = np.bincount(np.searchsorted(ends, middles, side="right"), minlength=len(arrays))
    rng = np.random.default_rng(0)
    points = []
    for a, share in zip(arrays, shares, strict=True):
        if share and a.ndim == 0:
            points.append(a.reshape(1))
        elif share:
            flat = np.sort(rng.integers(0, size(a), share * (_SAMPLE // clusters)))
            coordinates = tuple(c.astype(np.int32) for c in np.unravel_index(flat, a.shape))
            own = explicit(a)
            everywhere = own and jax.sharding.NamedSharding(own.mesh, jax.sharding.PartitionSpec())
            gather = a.at[coordinates].get
            points.append(gather(mode="promise_in_bounds", out_sharding=everywhere))
    return points


def explicit(s: jax.Array) -> Any:
    """The sharding of an array of an explicit mesh, where new arrays have to be told theirs."""
    sharding = jax.typeof(s).sharding
    return sharding if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None


def flat(s: jax.Array) -> jax.Array:
    """The array as a vector, on one CPU, where that makes simpler kernels and moves nothing."""
    return s.reshape(-1) if _search.on_one_cpu() else s


def _lanes(s: jax.Array, by_row: bool) -> tuple[jax.Array, tuple[int, ...]]:
    """A view of an array, and along which axes to count, so that every core gets something to do.

    Small arrays are counted side by side.
    """
    every = tuple(range(s.ndim))
    if by_row:
        return s, every[1:] if s.ndim > 1 else every
    if not _search.on_one_cpu():
        return s, every
    if s.size < _LANES_FROM:
        return flat(s), (0,)
    lanes = next(n for n in range(_LANES, 0, -1) if s.size % n == 0)
    return s.reshape(lanes, -1), (1,)


def _total(counts: list[Any], n: int) -> Wide:
    """For each candidate the sum over the lanes of all arrays, which have `n` entries."""
    if n >= 2**31:
        every = [list(map(_counts.total, lanes)) for lanes in counts]
        return _counts.stack([functools.reduce(_counts.add, s) for s in zip(*every, strict=True)])
    alike: dict[tuple[int, ...], list[Any]] = {}
    for lanes in counts:
        alike.setdefault(lanes[0].shape, []).append(lanes)
    # Lanes of one number are added before their sum: one kernel instead of one an array.
    added = [[functools.reduce(jnp.add, s) for s in zip(*a, strict=True)] for a in alike.values()]
    sums = [functools.reduce(jnp.add, map(jnp.sum, s)) for s in zip(*added, strict=True)]
    return _counts.wide(jnp.stack(sums))
