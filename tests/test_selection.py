import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax import selection

F32, BF16, F16 = oracles.FLOATS

# Shapes and dtypes of arrays that compete; few, since each is compiled.
GROUPS = {
    "float32": [((3, 5), F32)],
    "bfloat16": [((2, 3), BF16), ((5,), BF16)],
    "float16": [((4,), F16), ((1, 3, 2), F16)],
    "mixed": [((2, 3), F16), ((4,), BF16), ((), F32), ((0, 3), F32), ((2, 2), F32)],
}
each_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())

SPECS = {
    "rows": PartitionSpec("a"),
    "columns": PartitionSpec(None, "a"),
    "both": PartitionSpec("a", "b"),
    "rows over all": PartitionSpec(("a", "b")),
    "replicated": PartitionSpec(),
}


def some_arrays(group):
    return st.tuples(*(oracles.awkward_arrays(shape, dtype) for shape, dtype in group))


def on_device(arrays):
    return [jnp.asarray(a) for a in arrays]


def assert_same_masks(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == bool
        np.testing.assert_array_equal(a, b)


def ties(shape, seed=0):
    """Five different values, so that a cut nearly always falls among equal ones."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


# ---- keep_largest


@each_group
@given(data=st.data())
def test_keep_largest_equals_a_stable_sort(group, data):
    arrays = data.draw(some_arrays(group))
    keep = data.draw(st.integers(0, sum(a.size for a in arrays)))
    got = selection.keep_largest(on_device(arrays), keep)
    assert_same_masks(got, oracles.keep_largest(arrays, keep))


@each_group
def test_keep_largest_keeps_exactly_as_many_as_asked(group):
    rng = np.random.default_rng(0)
    scores = on_device(rng.choice(oracles.awkward(dtype), shape) for shape, dtype in group)
    for keep in range(sum(s.size for s in scores) + 1):
        assert sum(int(m.sum()) for m in selection.keep_largest(scores, keep)) == keep


@each_group
@given(data=st.data())
def test_keep_largest_of_fewer_is_a_subset(group, data):
    scores = on_device(data.draw(some_arrays(group)))
    n = sum(s.size for s in scores)
    fewer, more = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    few, many = (selection.keep_largest(scores, keep) for keep in (fewer, more))
    assert all(bool(jnp.all(b | ~a)) for a, b in zip(few, many, strict=True))


def test_keep_largest_prefers_the_lower_flat_index():
    (mask,) = selection.keep_largest([jnp.ones((2, 3))], 4)
    np.testing.assert_array_equal(mask, [[True, True, True], [True, False, False]])


def test_keep_largest_prefers_the_earlier_array():
    first, second = selection.keep_largest([jnp.ones(2), jnp.ones(2)], 3)
    assert (first.tolist(), second.tolist()) == ([True, True], [True, False])


def test_keep_largest_takes_both_zeros_for_equal():
    (mask,) = selection.keep_largest([jnp.array([-0.0, 0.0, -0.0])], 1)
    assert mask.tolist() == [True, False, False]


def test_keep_largest_ranks_nan_below_minus_infinity():
    (mask,) = selection.keep_largest([jnp.array([jnp.nan, -jnp.inf, -jnp.nan])], 1)
    assert mask.tolist() == [False, True, False]


def test_keep_largest_tells_denormals_apart():
    (mask,) = selection.keep_largest([jnp.array([0.0, 1e-45, 3e-45, -1e-45])], 2)
    assert mask.tolist() == [False, True, True, False]


def test_keep_largest_compares_dtypes_by_value():
    narrow = jnp.array([1.0, 0.1], jnp.bfloat16)  # 0.1 is 0.10009765625
    wide = jnp.array([0.1001, 0.1])
    first, second = selection.keep_largest([narrow, wide], 3)
    assert (first.tolist(), second.tolist()) == ([True, True], [True, False])


def test_keep_largest_of_many_equals_a_stable_sort():
    scores = np.random.default_rng(0).normal(size=(300, 211)).astype(np.float32).round(2)
    got = selection.keep_largest([jnp.asarray(scores)], 6_331)
    assert_same_masks(got, oracles.keep_largest([scores], 6_331))


@each_group
def test_keep_largest_under_jit_equals_eager(group):
    rng = np.random.default_rng(1)
    scores = on_device(rng.choice(oracles.awkward(dtype), shape) for shape, dtype in group)
    jitted = jax.jit(lambda s: selection.keep_largest(s, 5))
    assert_same_masks(jitted(scores), selection.keep_largest(scores, 5))


def test_keep_largest_takes_a_traced_count():
    scores = [jnp.asarray(ties((4, 6)))]
    jitted = jax.jit(lambda keep: selection.keep_largest(scores, keep))
    for keep in (0, 1, 13, 24):
        assert_same_masks(jitted(keep), oracles.keep_largest(scores, keep))


@pytest.mark.parametrize("keep", [np.int64(2), np.uint8(2), jnp.int32(2), jnp.uint32(2)])
def test_keep_largest_takes_any_integer_type(keep):
    (mask,) = selection.keep_largest([jnp.arange(3.0)], keep)
    assert mask.tolist() == [False, True, True]


def test_keep_largest_maps_over_scores():
    scores = jnp.asarray(ties((5, 3, 4)))
    got = jax.vmap(lambda s: selection.keep_largest([s], 5)[0])(scores)
    rows = [oracles.keep_largest([s], 5)[0] for s in scores]
    np.testing.assert_array_equal(got, rows)


def test_keep_largest_maps_over_counts():
    scores = ties((3, 4))
    got = jax.vmap(lambda keep: selection.keep_largest([jnp.asarray(scores)], keep)[0])(
        jnp.arange(13)
    )
    rows = [oracles.keep_largest([scores], keep)[0] for keep in range(13)]
    np.testing.assert_array_equal(got, rows)


def test_keep_largest_has_abstract_values():
    shapes = [jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)]
    masks = jax.eval_shape(lambda s: selection.keep_largest(s, 2), shapes)
    assert [(m.shape, m.dtype) for m in masks] == [((2, 3), bool), ((), bool)]


def test_keep_largest_of_empty_arrays_is_empty():
    first, second = selection.keep_largest([jnp.zeros((0, 3)), jnp.zeros(0)], 0)
    assert (first.shape, second.shape) == ((0, 3), (0,))


def test_keep_largest_of_no_arrays_is_no_mask():
    assert selection.keep_largest([], 0) == []


@pytest.mark.parametrize("first", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("second", [SPECS["rows"], SPECS["columns"]], ids=["rows", "columns"])
def test_keep_largest_sharded_equals_a_stable_sort(first, second):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arrays = [ties((8, 16)), ties((24, 4, 3), seed=1)]
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(arrays, (first, second), strict=True)
    ]
    got = selection.keep_largest(placed, 201)
    assert_same_masks(got, oracles.keep_largest(arrays, 201))


def test_keep_largest_leaves_shards_where_they_are(sharded_pair):
    masks = selection.keep_largest(sharded_pair, 201)
    for mask, score in zip(masks, sharded_pair, strict=True):
        assert mask.sharding.is_equivalent_to(score.sharding, score.ndim)


def test_keep_largest_moves_only_counts_between_devices(sharded_pair):
    compiled = jax.jit(lambda s: selection.keep_largest(s, 201)).lower(sharded_pair).compile()
    moves = re.findall(
        r"\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", compiled.as_text()
    )
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in moves]
    assert max(sizes, default=0) <= 3 * jax.device_count()


@pytest.fixture
def sharded_pair():
    """Two arrays of ties, one sharded by rows and one by columns."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    return [
        jax.device_put(ties((8, 40)), NamedSharding(mesh, PartitionSpec("a"))),
        jax.device_put(ties((9, 16)), NamedSharding(mesh, PartitionSpec(None, "a"))),
    ]


def test_keep_largest_works_in_float64():
    with jax.enable_x64(True):
        scores = np.array([1.0, 1.0 + 1e-15, -5e-324, 0.0, np.nan, -np.inf, 1.0, 1e-40])
        narrow = np.array([1.0, 3e-40], np.float32)
        arrays = [scores, narrow]
        for keep in range(11):
            got = selection.keep_largest(on_device(arrays), keep)
            assert_same_masks(got, oracles.keep_largest(arrays, keep))


def test_keep_largest_needs_one_trace_for_all_counts():
    traces = []

    @jax.jit
    def masks(scores, keep):
        traces.append(keep)
        return selection.keep_largest([scores], keep)

    for keep in range(4):
        masks(jnp.arange(3.0), keep)
    assert len(traces) == 1


# ---- removed_count


def sparsities_around_halves(n):
    """Float32 sparsities in [0, 1), most of them where sparsity * n is close to k + 1/2."""
    rng = np.random.default_rng(n % 2**32)
    halves = (rng.integers(0, max(n, 1), 2_000) + 0.5) / max(n, 1)
    some = np.concatenate(
        [halves, rng.uniform(size=500), np.arange(64) / 64, [1e-45, 1e-38, 2**-26, 2**-25, 1e-9]]
    ).astype(np.float32)
    near = np.concatenate([some, np.nextafter(some, 0), np.nextafter(some, 1)])
    return near[near < 1]


@pytest.mark.parametrize(
    "n",
    [0, 1, 2, 3, 10, 36, 1_876, 266_200, 2**24 - 1, 2**24, 2**24 + 1, 2**29, 2**30 + 1, 2**31 - 1],
)
def test_removed_count_traced_is_that_of_python(n):
    sparsities = sparsities_around_halves(n)
    got = jax.jit(jax.vmap(lambda s: selection.removed_count(s, n)))(sparsities)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [round(float(s) * n) for s in sparsities])


def test_removed_count_traced_rounds_products_of_more_than_53_bits_as_python_does():
    # m * n ends in 0.5 - 2^-24, which float64 rounds to 0.5, and that to the even number above.
    m, n = 2**24 - 3, 1_093_315_243
    sparsity = np.float32(m / 2**24)
    got = jax.jit(lambda s: selection.removed_count(s, n))(sparsity)
    assert int(got) == round(float(sparsity) * n)


@pytest.mark.parametrize(
    ("sparsity", "n", "expected"),
    [(0.25, 10, 2), (0.75, 10, 8), (0.5, 5, 2), (0.5, 7, 4), (0.9, 266_200, 239_580), (0.0, 9, 0)],
)
def test_removed_count_is_an_int_and_rounds_half_to_even(sparsity, n, expected):
    got = selection.removed_count(sparsity, n)
    assert type(got) is int and got == expected


@given(st.floats(0, 1, exclude_max=True, width=32), st.integers(0, 2**29))
def test_removed_count_of_a_jax_scalar_is_that_of_its_float32_value(sparsity, n):
    assert selection.removed_count(jnp.float32(sparsity), n) == round(float(sparsity) * n)


def test_removed_count_of_a_python_number_counts_in_float64():
    n = 10**9
    assert selection.removed_count(0.1, n) != selection.removed_count(np.float32(0.1), n)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_removed_count_takes_traced_half_precision(dtype):
    sparsity = jnp.asarray(0.9, dtype)
    got = jax.jit(lambda s: selection.removed_count(s, 1_001))(sparsity)
    assert int(got) == round(float(sparsity) * 1_001)


# ---- order_key


@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_order_key_orders_as_real_numbers_do(dtype):
    values = oracles.awkward(dtype)
    values = values[~np.isnan(values)]
    real = values.astype(np.float64)
    key = np.asarray(selection.order_key(jnp.asarray(values)))
    np.testing.assert_array_equal(
        np.sign(key[:, None].astype(np.int64) - key), np.sign(rank(real)[:, None] - rank(real))
    )


def rank(real):
    return np.unique(real, return_inverse=True)[1]


@given(oracles.awkward_arrays((6,), np.float32, nan=False))
def test_order_key_of_the_negative_is_the_negative(values):
    key, mirrored = (selection.order_key(jnp.asarray(v)) for v in (values, -values))
    np.testing.assert_array_equal(key, -mirrored)


@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_order_key_puts_nan_lowest(dtype):
    key = selection.order_key(jnp.array([jnp.nan, -jnp.nan, -jnp.inf], dtype))
    assert int(key[0]) == int(key[1]) < int(key[2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_order_key_of_half_precision_is_that_of_float32(dtype):
    values = oracles.awkward(np.dtype(dtype))
    key = selection.order_key(jnp.asarray(values))
    np.testing.assert_array_equal(key, selection.order_key(jnp.asarray(values.astype(np.float32))))


@pytest.mark.parametrize("narrow", oracles.FLOATS, ids=str)
def test_order_key_in_float64_keeps_every_value(narrow):
    values = oracles.awkward(narrow)
    with jax.enable_x64(True):
        key = selection.order_key(jnp.asarray(values), jnp.float64)
        assert key.dtype == jnp.int64
        wide = selection.order_key(jnp.asarray(values.astype(np.float64)))
        np.testing.assert_array_equal(key, wide)


def test_order_key_under_jit_equals_eager():
    values = jnp.asarray(oracles.awkward(BF16))
    np.testing.assert_array_equal(
        jax.jit(partial(selection.order_key, dtype=jnp.float32))(values),
        selection.order_key(values),
    )
