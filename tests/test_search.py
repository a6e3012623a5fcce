"""The search alone: more entries than any machine holds, counted in closed form."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import _counts, _search
from sparsejax._counts import Wide

# Entries are in rows, all entries of a row have the same key: 5 * 10^9 of them.
HEIGHT, LENGTH = 50_000, 100_000
TOTAL = HEIGHT * LENGTH
KEPT = [0, 1, LENGTH, LENGTH + 1, TOTAL // 3, TOTAL // 2 - 7, 2**32 + 12_345, TOTAL - 1, TOTAL]
# Every second pass at least cuts the bracket to a seventh: 2 * log(2^32) / log(7) is 23 passes.
MOST_PASSES = {4: 24, 8: 48}


class Rows:
    """Counts entries as `_search` asks for it, and how often, for each search and digit."""

    def __init__(self, keys):
        self.keys = keys
        self.order = -1 - np.arange(len(keys), dtype=np.int64)
        self.passes = collections.Counter()

    def reach(self, candidates, level, settled):
        """How many entries reach a candidate for a digit, given those settled before."""
        if level == 0:
            return LENGTH * int(np.sum(self.keys >= candidates))
        tied = self.keys == settled[0]
        above = LENGTH * int(np.sum(self.keys > settled[0]))
        if level == 1:
            return above + LENGTH * int(np.sum(tied & (self.order >= candidates)))
        earlier = LENGTH * int(np.sum(tied & (self.order > settled[1])))
        here = int(np.sum(tied & (self.order == settled[1])))
        return above + earlier + here * min(max(-int(candidates), 0), LENGTH)

    def count(self, candidates, level, *settled):
        found = np.empty(candidates.shape, np.int64)
        for group, edges in enumerate(np.asarray(candidates)):
            at = int(level[group])
            self.passes[group, at] += at < 3  # where it still searches
            # Here, lest a slow search goes on.
            assert self.passes[group, at] <= MOST_PASSES[self.keys.itemsize]
            cut = [int(s[group]) for s in settled]
            found[group] = [self.reach(int(edge), min(at, 2), cut) for edge in edges]
        return (found >> 24).astype(np.int32), (found & (2**24 - 1)).astype(np.int32)

    def settle(self, kept, first=None):
        """The settled digits, three for each number of kept entries."""
        dtype = self.keys.dtype

        @jax.jit
        def settle(k, first):
            def count(candidates, level, settled):
                half = jax.ShapeDtypeStruct(candidates.shape, jnp.int32)
                return Wide(
                    *jax.pure_callback(self.count, (half, half), candidates, level, *settled)
                )

            total = _counts.stack([_counts.wide(TOTAL)] * len(kept))
            ranges = (np.full(len(kept), HEIGHT), np.full(len(kept), LENGTH))
            return _search.settle(count, k, total, first, ranges)

        if first is None:
            info = jnp.iinfo(dtype)
            first = _search.even_cut(info.min, info.max, dtype)
        k = _counts.stack([_counts.wide(n) for n in kept])
        return np.stack(settle(k, jnp.tile(first, (len(kept), 1))), axis=1).tolist()


def exponential(dtype):
    magnitudes = 2.0 ** np.linspace(0, jnp.iinfo(dtype).bits - 2, HEIGHT // 2)
    return np.concatenate([magnitudes, -magnitudes]).astype(dtype)


def normal():
    values = np.random.default_rng(0).normal(size=HEIGHT).astype(np.float32)
    return np.asarray(jax.jit(lambda v: jax.lax.bitcast_convert_type(v, jnp.int32))(abs(values)))


INT32 = jnp.iinfo(jnp.int32)
HIGHEST = INT32.max - 1  # no key is the highest integer of all
KEYS = {
    "all equal": np.full(HEIGHT, 7, np.int32),
    "all lowest": np.full(HEIGHT, INT32.min, np.int32),
    "all highest": np.full(HEIGHT, HIGHEST, np.int32),
    "two extremes": np.tile(np.array([HIGHEST, INT32.min], np.int32), HEIGHT // 2),
    "one far above many": np.array([HIGHEST] + [0] * (HEIGHT - 1), np.int32),
    "few neighbours": np.arange(HEIGHT, dtype=np.int32) % 9 - 4,
    "evenly spaced": np.linspace(INT32.min, HIGHEST, HEIGHT).astype(np.int32),
    "exponentially spaced": exponential(np.int32),
    "magnitudes of normal numbers": normal(),
}
each_keys = pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())


@each_keys
def test_settle_lets_exactly_as_many_in_and_soon(keys):
    rows = Rows(keys)
    settled = rows.settle(KEPT)
    assert [rows.reach(cut[2], 2, cut) for cut in settled] == KEPT


def test_settle_recovers_soon_from_misleading_candidates():
    rows = Rows(KEYS["exponentially spaced"])
    settled = rows.settle(KEPT, INT32.min + jnp.arange(1, 7, dtype=jnp.int32))
    assert [rows.reach(cut[2], 2, cut) for cut in settled] == KEPT


def test_settle_decides_ties_by_row_and_then_by_place():
    rows = Rows(np.arange(HEIGHT, dtype=np.int32) % 2)  # every second row is a one
    row, place = 33_333, 44_444
    settled = rows.settle([row // 2 * LENGTH + place + 1])
    assert settled == [[1, -1 - row, -1 - place]]


def test_settle_stops_where_a_row_ends():
    rows = Rows(np.zeros(HEIGHT, np.int32))
    ((_, _, place),) = rows.settle([TOTAL // 2])
    assert place < -LENGTH
    assert rows.passes[0, 2] == 0


def test_settle_needs_no_pass_for_none_and_all():
    rows = Rows(KEYS["few neighbours"])
    rows.settle([0, TOTAL])
    assert rows.passes.total() == 0


def test_settle_searches_keys_of_64_bits():
    with jax.enable_x64(True):
        rows = Rows(exponential(np.int64))
        settled = rows.settle(KEPT)
    assert [rows.reach(cut[2], 2, cut) for cut in settled] == KEPT
