import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from quickly import as_shipped

from sparsejax import granularities
from sparsejax.granularities import NM, Block, Channel, Unstructured

pytestmark = pytest.mark.usefixtures("quickly")

F32, BF16, F16 = oracles.FLOATS
each_float = pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)

# Shape, n, m, axis: even and ragged groups, one group, groups longer than what pairs compare.
GROUPINGS = [
    ((8, 3), 2, 4, -2),
    ((3, 8), 2, 4, -1),
    ((3, 10), 2, 4, -1),
    ((7, 2), 3, 5, 0),
    ((2, 3, 6, 2), 1, 2, -2),
    ((9,), 1, 3, 0),
    ((3,), 2, 4, -1),
    ((2, 5), 3, 3, 1),
    ((40, 2), 5, 37, -2),
    ((2, 70), 20, 34, -1),
    ((50,), 45, 1_000, 0),
]
each_grouping = pytest.mark.parametrize("grouping", GROUPINGS, ids=str)

BLOCKS = [((6, 4), (2, 2)), ((5, 7), (2, 3)), ((3, 4), (5, 9)), ((2, 3, 5), (2,)), ((7,), (3,))]
each_block = pytest.mark.parametrize(("shape", "block"), BLOCKS, ids=str)
POOLS = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "l2": granularities.l2}
each_pool = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
NUMPY = {
    jnp.sum: np.sum,
    jnp.mean: np.mean,
    jnp.max: np.max,
    granularities.l2: lambda x: np.sqrt(np.sum(x**2)),
}

SPECS = {
    "rows": PartitionSpec("a"),
    "columns": PartitionSpec(None, "a"),
    "both": PartitionSpec("a", "b"),
    "replicated": PartitionSpec(),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())

POOLING = {
    "blocks": Block((2, 3)),
    "blocks of one axis": Block((3,), jnp.max),
    "channels": Channel(),
    "inputs": Channel(-2, jnp.max),
}
UNIT_BASED = POOLING | {"entries": Unstructured()}
each_granularity = pytest.mark.parametrize(
    "granularity", UNIT_BASED.values(), ids=UNIT_BASED.keys()
)
each_pooling = pytest.mark.parametrize("granularity", POOLING.values(), ids=POOLING.keys())


def nm_by_sorting(scores, n, m, axis):
    """The n first of each group in a stable sort, highest first, NaN last."""
    rows = np.moveaxis(np.asarray(scores), axis, -1)
    mask = np.zeros(rows.shape, bool)
    for row in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            group = rows[row][start : start + m]
            (kept,) = oracles.keep_largest([group], min(n, len(group)))
            mask[row][start : start + m] = kept
    return np.moveaxis(mask, -1, axis)


def block_slices(shape, block):
    """For each block its index among the blocks, and the slices that it covers."""
    sizes = (1,) * (len(shape) - len(block)) + block
    counts = [math.ceil(n / size) for n, size in zip(shape, sizes, strict=True)]
    for index in itertools.product(*map(range, counts)):
        yield index, tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, sizes, strict=True))


def ties(shape, seed=0):
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_mask(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)


def placed(array, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return jax.device_put(array, NamedSharding(mesh, spec))


# ---- NM


@each_float
@each_grouping
@given(data=st.data())
def test_nm_masks_equal_a_stable_sort_of_each_group(dtype, grouping, data):
    shape, n, m, axis = grouping
    scores = data.draw(oracles.awkward_arrays(shape, dtype))
    got = NM(n, m, axis).masks("w", jnp.asarray(scores))
    assert got.dtype == bool
    np.testing.assert_array_equal(got, nm_by_sorting(scores, n, m, axis))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 32, 33, 64])
def test_nm_masks_for_every_n(m):
    scores = ties((2 * m + 1, 3))
    for n in {1, m // 3 or 1, m // 2 or 1, m}:
        got = NM(n, m, 0).masks("w", jnp.asarray(scores))
        np.testing.assert_array_equal(got, nm_by_sorting(scores, n, m, 0))


@pytest.mark.parametrize("axis", range(-4, 4))
def test_nm_masks_along_any_axis(axis):
    scores = ties((4, 3, 5, 6))
    got = NM(2, 4, axis).masks("w", jnp.asarray(scores))
    np.testing.assert_array_equal(got, nm_by_sorting(scores, 2, 4, axis))


@pytest.mark.parametrize("m", [4, 100])
def test_nm_masks_prefer_the_lower_index(m):
    mask = NM(2, m, 0).masks("w", jnp.ones(m))
    assert np.flatnonzero(mask).tolist() == [0, 1]


def test_nm_masks_of_a_ragged_end_keep_no_more_than_n():
    mask = NM(2, 4, 0).masks("w", jnp.ones(7))
    assert mask.tolist() == [True, True, False, False, True, True, False]


@each_grouping
def test_nm_masks_under_jit_equal_eager(grouping):
    shape, n, m, axis = grouping
    granularity, scores = NM(n, m, axis), jnp.asarray(ties(shape))
    jitted = as_shipped(lambda s: granularity.masks("w", s))
    np.testing.assert_array_equal(jitted(scores), granularity.masks("w", scores))


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("axis", [-2, -1])
@each_spec
def test_nm_masks_of_sharded_scores_equal_eager(spec, axis, m):
    for shape in [(64, 80), (24, 88)]:  # groups within shards, and across their borders
        scores = ties(shape)
        got = NM(2, m, axis).masks("w", placed(scores, spec))
        np.testing.assert_array_equal(got, nm_by_sorting(scores, 2, m, axis))


@each_spec
def test_nm_masks_need_nothing_from_other_devices(spec):
    scores = placed(ties((64, 80)), spec)
    text = as_shipped(lambda s: NM(2, 4).masks("w", s)).lower(scores).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce", text)


def test_nm_masks_leave_shards_where_they_are():
    scores = placed(ties((64, 80)), SPECS["both"])
    mask = NM(2, 4).masks("w", scores)
    assert mask.sharding.is_equivalent_to(scores.sharding, 2)


@pytest.mark.parametrize("m", [4, 40])
def test_nm_masks_map_over_layers(m):
    scores, granularity = jnp.asarray(ties((3, 6, 50))), NM(2, m, -1)
    got = jax.vmap(lambda s: granularity.masks("w", s))(scores)
    np.testing.assert_array_equal(got, [granularity.masks("w", s) for s in scores])


def test_nm_masks_have_abstract_values():
    got = jax.eval_shape(
        lambda s: NM(2, 4).masks("w", s), jax.ShapeDtypeStruct((5, 3), jnp.bfloat16)
    )
    assert (got.shape, got.dtype) == ((5, 3), bool)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1), (1, 0, 2)])
@pytest.mark.parametrize("m", [4, 40])
def test_nm_masks_of_empty_and_single_entries_keep_them(shape, m):
    mask = NM(1, m).masks("w", jnp.zeros(shape))
    assert mask.shape == shape and bool(mask.all())


@pytest.mark.parametrize("m", [3, 34])
def test_nm_masks_work_in_float64(m):
    scores = np.resize([1.0, 1.0 + 1e-15, -5e-324, 0.0, np.nan, -np.inf, np.inf, 1e-40], 69)
    with jax.enable_x64(True):
        got = NM(2, m, 0).masks("w", jnp.asarray(scores))
    np.testing.assert_array_equal(got, nm_by_sorting(scores, 2, m, 0))


def test_nm_masks_copy_nothing_where_groups_are_even():
    compiled = as_shipped(lambda s: NM(2, 4).masks("w", s)).lower(jnp.zeros((64, 8))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0


# ---- Unstructured


@each_float
def test_unstructured_units_are_the_scores(dtype):
    scores = jnp.asarray(oracles.awkward(dtype))
    assert Unstructured().units("w", scores) is scores


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_unstructured_expand_is_the_decision_itself(shape):
    kept = random_mask(shape)
    np.testing.assert_array_equal(Unstructured().expand(kept, shape), kept)


# ---- Block


@each_pool
@each_block
def test_block_units_pool_each_block(shape, block, pool):
    scores = normal(shape)
    got = Block(block, pool).units("w", jnp.asarray(scores))
    for index, where in block_slices(shape, block):
        np.testing.assert_allclose(got[index], NUMPY[pool](scores[where]), rtol=1e-6, atol=1e-6)


@each_block
def test_block_units_count_a_ragged_end(shape, block):
    got = Block(block).units("w", jnp.zeros(shape))
    assert got.size == len(list(block_slices(shape, block)))


@each_block
def test_block_expand_covers_each_block(shape, block):
    granularity = Block(block)
    kept = random_mask(granularity.units("w", jnp.zeros(shape)).shape)
    expected = np.zeros(shape, bool)
    for index, where in block_slices(shape, block):
        expected[where] = kept[index]
    np.testing.assert_array_equal(granularity.expand(kept, shape), expected)


def test_block_maximum_is_exact():
    values = oracles.awkward(F32)
    comparable = values[(abs(values) >= np.finfo(F32).tiny) | (values == 0)]  # no NaN, no denormal
    scores = np.random.default_rng(0).choice(comparable, (21, 29))
    got = Block((2, 3), jnp.max).units("w", jnp.asarray(scores))
    for index, where in block_slices((21, 29), (2, 3)):
        assert got[index] == scores[where].max()


def test_block_units_of_a_nan_are_nan():
    got = Block((2,)).units("w", jnp.array([1.0, jnp.nan, 2.0, 3.0]))
    np.testing.assert_array_equal(got, [np.nan, 5.0])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 3)])
def test_block_of_an_empty_leaf_has_no_units(shape):
    granularity = Block((2, 2), jnp.max)
    units = granularity.units("w", jnp.zeros(shape))
    assert units.size == 0
    assert granularity.expand(units > 0, shape).shape == shape


# ---- Channel


@each_pool
@pytest.mark.parametrize("axis", range(-3, 3))
def test_channel_units_pool_each_index(axis, pool):
    scores = normal((2, 3, 4))
    got = Channel(axis, pool).units("w", jnp.asarray(scores))
    expected = [NUMPY[pool](channel) for channel in np.moveaxis(scores, axis, 0)]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", range(-3, 3))
def test_channel_expand_broadcasts(axis):
    kept = random_mask(np.zeros((2, 3, 4)).shape[axis])
    mask = Channel(axis).expand(kept, (2, 3, 4))
    assert mask.ndim == 3 and mask.size == kept.size
    for index, channel in enumerate(np.moveaxis(np.broadcast_to(mask, (2, 3, 4)), axis, 0)):
        assert np.all(channel == kept[index])


@each_pool
def test_channel_of_a_vector_is_an_entry(pool):
    scores = jnp.array([1.0, 0.0, 4.0])
    np.testing.assert_array_equal(Channel(pool=pool).units("b", scores), scores)


@each_pool
def test_channels_without_entries_have_score_zero(pool):
    granularity = Channel(pool=pool)
    units = granularity.units("w", jnp.zeros((0, 3)))
    np.testing.assert_array_equal(units, np.zeros(3))
    assert granularity.expand(units == 0, (0, 3)).shape == (1, 3)


# ---- what all with units have in common


@each_granularity
def test_units_and_expand_are_the_protocol(granularity):
    assert isinstance(granularity, granularities.Granularity)


def test_nm_has_no_units():
    assert not isinstance(NM(2, 4), granularities.Granularity)


@each_float
@each_pooling
def test_units_are_pooled_in_float32(granularity, dtype):
    scores = np.ones((4, 2_000), dtype)  # a half-precision sum would stop growing
    got = granularity.units("w", jnp.asarray(scores))
    assert got.dtype == jnp.float32
    wide = granularity.units("w", jnp.asarray(scores.astype(np.float32)))
    np.testing.assert_array_equal(got, wide)


@each_granularity
def test_masks_have_as_many_axes_as_the_leaf(granularity):
    for shape in [(2, 3), (5, 7), (3, 3, 5, 4), (1, 1)]:
        units = granularity.units("w", jnp.zeros(shape))
        mask = granularity.expand(units > 0, shape)
        assert mask.ndim == len(shape) and np.broadcast_shapes(mask.shape, shape) == shape


@each_granularity
def test_units_and_expand_under_jit_equal_eager(granularity):
    scores = jnp.asarray(ties((5, 7)))

    def mask(scores):
        return granularity.expand(granularity.units("w", scores) > 0, scores.shape)

    np.testing.assert_array_equal(as_shipped(mask)(scores), mask(scores))


@each_granularity
@each_spec
def test_units_and_expand_of_sharded_scores_equal_eager(granularity, spec):
    scores = ties((24, 20))  # small integers: their sums are exact

    def mask(scores):
        return granularity.expand(granularity.units("w", scores) > 0, scores.shape)

    got = jax.jit(mask)(placed(scores, spec))
    np.testing.assert_array_equal(got, mask(jnp.asarray(scores)))


@each_granularity
def test_units_and_expand_map_over_layers(granularity):
    scores = jnp.asarray(ties((3, 5, 7)))
    units = jax.vmap(lambda s: granularity.units("w", s))(scores)
    masks = jax.vmap(lambda u: granularity.expand(u > 0, (5, 7)))(units)
    for layer, mask in zip(scores, masks, strict=True):
        expected = granularity.expand(granularity.units("w", layer) > 0, (5, 7))
        np.testing.assert_array_equal(mask, expected)


@each_granularity
def test_units_and_expand_have_abstract_values(granularity):
    leaf = jax.ShapeDtypeStruct((5, 7), jnp.float32)
    units = jax.eval_shape(lambda s: granularity.units("w", s), leaf)
    mask = jax.eval_shape(lambda u: granularity.expand(u > 0, (5, 7)), units)
    real = granularity.units("w", jnp.zeros((5, 7)))
    assert units.shape == real.shape and mask.dtype == bool
    assert mask.shape == granularity.expand(real > 0, (5, 7)).shape


@pytest.mark.parametrize("granularity", [Block((2, 2)), Channel()], ids=["blocks", "channels"])
def test_units_and_expand_keep_the_sharding_in_the_type(granularity):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    scores = jax.device_put(ties((16, 8)), NamedSharding(mesh, SPECS["both"]))
    units = jax.jit(lambda s: granularity.units("w", s))(scores)
    mask = jax.jit(lambda u: granularity.expand(u > 0, scores.shape))(units)
    assert units.sharding.spec[-1] == mask.sharding.spec[-1] == "b"


# ---- l2


def test_l2_is_the_norm():
    x = normal((3, 4, 5))
    expected = np.sqrt(np.sum(x.astype(np.float64) ** 2, axis=(0, 2)))
    np.testing.assert_allclose(granularities.l2(jnp.asarray(x), axis=(0, 2)), expected, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), [1], ()])
def test_l2_takes_the_axes_that_sum_takes(axis):
    x = normal((3, 4))
    numpy_axis = tuple(axis) if isinstance(axis, list) else axis
    expected = np.sqrt(np.sum(x**2, axis=numpy_axis))
    np.testing.assert_allclose(granularities.l2(jnp.asarray(x), axis=axis), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e25, 1e37])
def test_l2_neither_overflows_nor_underflows(scale):
    got = granularities.l2(jnp.array([3.0, -4.0], jnp.float32) * np.float32(scale))
    np.testing.assert_allclose(got, 5 * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, -0.0], 0.0), ([1.0, -np.inf], np.inf), ([1.0, np.nan], np.nan), ([], 0.0)],
)
def test_l2_of_special_values(values, expected):
    np.testing.assert_array_equal(granularities.l2(jnp.array(values, jnp.float32)), expected)


def test_l2_of_half_precision_is_float32():
    got = granularities.l2(jnp.full(4, 3e4, jnp.float16))
    assert got.dtype == jnp.float32 and got == 6e4


# ---- values


def test_granularities_are_values():
    pairs = [
        (Unstructured(), Unstructured()),
        (NM(2, 4), NM(2, 4, -2)),
        (Block((4, 4)), Block([4, 4], jnp.sum)),
        (Channel(), Channel(-1, jnp.sum)),
    ]
    for one, same in pairs:
        assert one == same and hash(one) == hash(same)
    different = [NM(1, 4), NM(2, 4, -1), Block((4,)), Block((4, 4), jnp.max), Channel(0)]
    assert len({*(one for one, _ in pairs), *different}) == len(pairs) + len(different)


def test_block_keeps_its_shape_as_a_tuple():
    assert Block([4, 2]).shape == (4, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NM(0, 4), ValueError, r"`n` must be at least 1, got 0"),
        (lambda: NM(4, 2), ValueError, r"`m` must be at least `n`, which is 4, got 2"),
        (lambda: NM(True, 2), TypeError, r"`n` must be an int, got True"),
        (lambda: NM(2, 4.0), TypeError, r"`m` must be an int, got 4.0"),
        (lambda: NM(2, 4, None), TypeError, r"`axis` must be an int, got None"),
        (lambda: Block(4), TypeError, r"`shape` must be a tuple of ints.*got 4; .*\(4, 4\)"),
        (lambda: Block(()), ValueError, r"`shape` must have at least one axis, got \(\)"),
        (lambda: Block((4, 0)), ValueError, r"every size in `shape` must be at least 1, got 0"),
        (lambda: Block((4, 2.0)), TypeError, r"every size in `shape` must be an int, got 2.0"),
        (lambda: Block((4,), "sum"), TypeError, r"`pool` must be a function.*got 'sum'.*jnp.sum"),
        (lambda: Channel(False), TypeError, r"`axis` must be an int, got False"),
        (lambda: Channel(0, None), TypeError, r"`pool` must be a function.*got None"),
    ],
)
def test_constructors_refuse(make, error, message, as_users_have_it):
    with pytest.raises(error, match=message):
        make()


def bad_pool(scores, axis):
    return jnp.sum(scores, axis=axis, keepdims=True)


def counting_pool(scores, axis):
    return jnp.sum(scores > 0, axis=axis)


@pytest.mark.parametrize(
    ("granularity", "scores", "error", "message"),
    [
        (NM(2, 4), jnp.ones(3), ValueError, r"`axis`.* -2 for float32\[3\] at 'a.b'.*-1 to 0, or"),
        (NM(2, 4, 0), jnp.ones(()), ValueError, r"got 0 for float32\[\] at 'a.b'; leave the leaf"),
        (
            NM(2, 4),
            jnp.ones((2, 2), int),
            TypeError,
            r"`scores` must be real.*int32\[2,2\] at 'a.b",
        ),
        (Channel(2), jnp.ones((2, 3)), ValueError, r"`axis`.* 2 for float32\[2,3\] at 'a.b'"),
        (Channel(), jnp.ones(()), ValueError, r"got -1 for float32\[\] at 'a.b'; leave the leaf"),
        (Channel(), None, TypeError, r"`scores` must be real.*NoneType at 'a.b'"),
        (Block((1, 1)), jnp.ones(3), ValueError, r"`shape`.*\(1, 1\) for float32\[3\] at 'a.b'"),
        (Block((1,)), jnp.ones(()), ValueError, r"`shape`.*\(1,\) for float32\[\] at 'a.b'"),
        (Unstructured(), jnp.ones(3, complex), TypeError, r"`scores` must be real.*at 'a.b'"),
        (Channel(0, bad_pool), jnp.ones((2, 3)), ValueError, r"`pool`.*\(2,\) .*float32\[2,1\] at"),
        (Block((2,), bad_pool), jnp.ones(4), ValueError, r"`pool`.*\(2,\) .*float32\[2,1\] at 'a"),
        (Block((2,), counting_pool), jnp.ones(4), ValueError, r"one floating score.*int32\[2\] at"),
    ],
)
def test_methods_refuse_with_the_path(granularity, scores, error, message):
    method = granularity.masks if isinstance(granularity, NM) else granularity.units
    with pytest.raises(error, match=message):
        method("a.b", scores)


@pytest.mark.parametrize(
    ("granularity", "kept"),
    [
        (Unstructured(), np.ones(3, bool)),
        (Block((2, 2)), np.ones((3, 4), bool)),
        (Channel(), np.ones(3, bool)),
        (Channel(), np.ones(4, int)),
    ],
)
def test_expand_refuses_what_are_no_units(granularity, kept):
    with pytest.raises(ValueError, match=r"`kept` must hold one boolean for each unit.*\(3, 4\)"):
        granularity.expand(kept, (3, 4))


def test_expand_refuses_a_shape_without_the_axes():
    with pytest.raises(ValueError, match=r"`axis`.*got 2 for shape \(3, 4\)"):
        Channel(2).expand(np.ones(3, bool), (3, 4))
    with pytest.raises(ValueError, match=r"`shape`.*got \(1, 1\) for shape \(3,\)"):
        Block((1, 1)).expand(np.ones(3, bool), (3,))
