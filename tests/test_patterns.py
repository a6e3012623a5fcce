"""Structure of masks that others made."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import _patterns, criteria, granularities, masking


def scores(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def topk(shape, granularity, sparsity=0.75):
    params = {"w": scores(*shape)}
    found = masking.topk(criteria.magnitude(params), sparsity, granularity=granularity)["w"]
    return np.asarray(np.broadcast_to(found, shape))


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (granularities.Unstructured(), (40, 50), (1, 1)),
        (granularities.Block((4, 4)), (40, 80), (4, 4)),
        (granularities.Block((1, 8)), (40, 80), (1, 8)),
        (granularities.Block((8, 8)), (43, 81), (8, 8)),
        (granularities.Channel(), (3, 3, 8, 64), (3, 3, 8, 1)),
        (granularities.Channel(-2), (3, 3, 32, 8), (3, 3, 1, 8)),
    ],
)
def test_blocks_finds_the_granularity_that_made_the_mask(granularity, shape, expected):
    assert _patterns.blocks(topk(shape, granularity)) == expected


def test_blocks_finds_a_change_that_only_a_late_entry_makes():
    mask = np.ones((64, 4000), bool)
    mask[32:, -1] = False
    assert _patterns.blocks(mask) == (32, 3999)
    mask[33, -1] = True
    assert _patterns.blocks(mask) == (1, 3999)


@given(
    shape=st.lists(st.integers(0, 7), max_size=4).map(tuple),
    block=st.tuples(*[st.integers(1, 4)] * 4),
    seed=st.integers(0, 99),
)
def test_fine_undoes_coarse_of_the_blocks(shape, block, seed):
    rng = np.random.default_rng(seed)
    units = [-(-n // b) for n, b in zip(shape, block, strict=False)]
    mask = _patterns.fine(np.asarray(rng.random(units) < 0.5), block[: len(shape)], shape)
    found = _patterns.blocks(mask)
    assert all(f % b == 0 or f >= n for f, b, n in zip(found, block, shape, strict=False))
    np.testing.assert_array_equal(
        _patterns.fine(_patterns.coarse(mask, found), found, shape), mask, strict=True
    )


@pytest.mark.parametrize("axis", [-1, -2, -3])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16), (1, 2)])
def test_n_of_m_finds_what_nm_made(n, m, axis):
    params = {"w": scores(64, 96)} if axis > -3 else {"w": scores(16, 3, 32)}
    mask = masking.topk(params, granularity=granularities.NM(n, m, axis=axis))["w"]
    assert _patterns.n_of_m(np.asarray(mask)) == (n, m, axis)


def test_n_of_m_finds_nothing_in_other_masks():
    assert _patterns.n_of_m(scores(64, 96) > 0) is None
    assert _patterns.n_of_m(np.ones((64, 96), bool)) is None
    assert _patterns.n_of_m(np.zeros((0, 4), bool)) is None
    assert _patterns.n_of_m(np.array(True)) is None
    late = np.tile([True, True, False, False], (5000, 16))
    late[-1, -1] = True
    assert _patterns.n_of_m(late) is None
