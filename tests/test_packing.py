"""The kernel's order of a sparse matrix: every kept entry once, and no other arrays are let in."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.sparse_ops import _packing


@st.composite
def matrices(draw):
    K, N = draw(st.integers(0, 300)), draw(st.integers(0, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = rng.random((K, N)) < draw(st.sampled_from([0, 0.01, 0.1, 0.5, 0.9, 1]))
    for column, value in draw(st.lists(st.tuples(st.integers(0, 79), st.booleans()), max_size=5)):
        kept[:, column : column + 1] = value  # none where there is no such column
    return kept


widths = st.sampled_from([1, 8])
batches = st.sampled_from([1, 8, 64])


def blocks_of_8(kept):
    """What a width of 8 keeps: whole blocks, fillers past the last column included."""
    K, N = kept.shape
    wide = np.zeros((K, -(-N // 8), 8), bool)
    wide.reshape(K, -1)[:, :N] = kept
    return np.repeat(wide.any(2), 8, 1)


def walk(packed, K, N):
    """Reads `packed` as the kernel does; yields (slot, row, column or group)."""
    per, blocks = packed.nt // packed.width, max(1, -(-K // packed.kb))
    for s in range(-(-N // packed.nt) * blocks):
        tile, block = divmod(s, blocks)
        cnt, col = (a[s * per : (s + 1) * per].tolist() for a in (packed.cnt, packed.col))
        slot = int(packed.base[s])
        for q in range(0, per, 4):
            shared = cnt[q] if packed.width == 1 else 0
            order = [i for _ in range(shared) for i in range(4)]
            order += [i for i in range(4) for _ in range(cnt[q + i] - shared)]
            for i in order:
                row = block * packed.kb + int(packed.offs[slot])
                yield slot, row, tile * per + col[q + i]
                slot += 1
        assert slot == packed.base[s + 1]


@given(matrices(), widths, batches)
def test_pack_gives_every_kept_entry_one_slot(kept, width, batch):
    packed = _packing.pack(kept, width=width, batch=batch)
    want = kept if width == 1 else blocks_of_8(kept)
    found = np.zeros(want.shape, int)
    np.add.at(found, (packed.rows, packed.cols), 1)
    np.testing.assert_array_equal(found, want)


@given(matrices(), widths, batches)
def test_pack_is_what_the_kernel_reads(kept, width, batch):
    K, N = kept.shape
    packed = _packing.pack(kept, width=width, batch=batch)
    entries = np.array(list(walk(packed, K, N)), int).reshape(-1, 3)
    np.testing.assert_array_equal(entries[:, 0], np.arange(packed.offs.size))
    np.testing.assert_array_equal(packed.rows[::width], entries[:, 1])
    np.testing.assert_array_equal(packed.cols[::width], entries[:, 2] * width)


@given(matrices(), widths, batches)
def test_check_accepts_what_pack_makes(kept, width, batch):
    _packing.pack(kept, width=width, batch=batch).check(*kept.shape)


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize(("K", "N"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_pack_of_nearly_nothing(K, N, width):
    packed = _packing.pack(np.zeros((K, N), bool), width=width)
    packed.check(K, N)
    assert packed.offs.size == packed.rows.size == packed.cols.size == 0
    assert not packed.base.any()


def test_pack_of_many_rows_fits_sixteen_bits():
    packed = _packing.pack(np.ones((70_000, 1), bool), batch=1)
    packed.check(70_000, 1)
    np.testing.assert_array_equal(np.sort(packed.rows), np.arange(70_000))


def changed(name, edit):
    """Applies `edit` to a copy of the array `name`."""

    def apply(packed):
        array = getattr(packed, name).copy()
        return dataclasses.replace(packed, **{name: edit(array)})

    return apply


def put(index, value):
    def edit(array):
        array[index] = value
        return array

    return edit


def swap(i, j):
    def edit(array):
        array[[i, j]] = array[[j, i]]
        return array

    return edit


def replaced(**fields):
    return lambda packed: dataclasses.replace(packed, **fields)


CORRUPTIONS = [
    (replaced(width=2), "`width` must be 1 or 8, got 2"),
    (replaced(kb=0), "`kb` must be from 1 to 65535, got 0"),
    (replaced(kb=65536), "`kb` must be from 1 to 65535, got 65536"),
    (replaced(nt=6), "`nt` must be a multiple of"),
    (replaced(nt=0), "`nt` must be a multiple of"),
    (changed("cnt", lambda a: a[:-1]), "`cnt` must be uint16"),
    (changed("col", lambda a: a.astype(np.int32)), "`col` must be uint16"),
    (changed("base", lambda a: np.append(a, a[-1])), "`base` must be int32"),
    (changed("rows", lambda a: a[:-1]), "`rows` must be int32"),
    (changed("base", put(0, 1)), "`cnt` does not add up to `base`"),
    (changed("base", put(1, -(2**31))), "`cnt` does not add up to `base`"),
    (changed("cnt", put(0, 65535)), "`cnt` does not add up to `base`"),
    (changed("base", lambda a: a - 1), "`cnt` does not add up to `base`"),
    (changed("cnt", lambda a: a.reshape(-1, 4)[:, ::-1].reshape(-1)), "`cnt` must ascend"),
    (changed("col", put(0, 65535)), "`col` must name every column"),
    (changed("col", lambda a: np.sort(a) * 0), "`col` must name every column"),
    (changed("offs", put(0, 65535)), "`offs` leave their block"),
    (changed("offs", lambda a: a * 0), "`offs` must ascend within a column"),
    (changed("rows", swap(0, -1)), "`rows` and `cols` are not the places"),
    (changed("cols", swap(0, -1)), "`rows` and `cols` are not the places"),
]


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize(("corrupt", "problem"), CORRUPTIONS)
def test_check_refuses(corrupt, problem, width):
    kept = np.random.default_rng(0).random((300, 100)) < 0.2
    packed = corrupt(_packing.pack(kept, width=width))
    with pytest.raises(ValueError, match=problem):
        packed.check(300, 100)


def test_check_refuses_missing_entries():
    packed = _packing.pack(np.ones((9, 9), bool))
    short = {name: getattr(packed, name)[:-1] for name in ("offs", "rows", "cols")}
    with pytest.raises(ValueError, match="`base` ends at 81, but there are 80 entries"):
        dataclasses.replace(packed, **short).check(9, 9)


def test_check_refuses_entries_beyond_the_matrix():
    packed = _packing.pack(np.ones((9, 9), bool))
    with pytest.raises(ValueError, match=r"a sparse \[9, 8\] matrix: columns beyond the matrix"):
        packed.check(9, 8)
    with pytest.raises(ValueError, match=r"a sparse \[8, 9\] matrix: `offs` leave their block"):
        packed.check(8, 9)
