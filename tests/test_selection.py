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
from quickly import as_shipped

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
AXES = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}
SAMPLED = (512, 520)  # from 2**18 entries on a sample proposes the first candidates


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


def each_largest(arrays, keep):
    return [oracles.keep_largest([a], k)[0] for a, k in zip(arrays, keep, strict=True)]


def scratch(f, *args):
    """The bytes that a compiled function needs beside its arguments and results."""
    return as_shipped(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


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
    jitted = as_shipped(lambda s: selection.keep_largest(s, 5))
    assert_same_masks(jitted(scores), selection.keep_largest(scores, 5))


def test_keep_largest_takes_a_traced_count():
    scores = [jnp.asarray(ties((4, 6)))]
    jitted = as_shipped(lambda keep: selection.keep_largest(scores, keep))
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
    arrays = [ties((8, 16)), ties((24, 4, 3), seed=1)]
    placed = [on_mesh(a, spec) for a, spec in zip(arrays, (first, second), strict=True)]
    got = selection.keep_largest(placed, 201)
    assert_same_masks(got, oracles.keep_largest(arrays, 201))


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
@pytest.mark.parametrize("spec", ["rows", "columns", "both"])
def test_keep_largest_of_large_shards_equals_a_stable_sort(spec, axes):
    arrays = [np.random.default_rng(0).normal(size=SAMPLED).astype(np.float32), ties((8, 16))]
    keep = 54_321
    program, placed = compiled(
        lambda s: selection.keep_largest(s, keep),
        [on_mesh(a, SPECS[spec], axes) for a in arrays],
    )
    masks = program(placed)
    assert_same_masks(masks, oracles.keep_largest(arrays, keep))
    assert_moves_only_counts(program)
    for mask, score in zip(masks, placed, strict=True):
        assert mask.sharding.is_equivalent_to(score.sharding, score.ndim)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_keep_largest_each_of_large_shards_equals_a_stable_sort(axes):
    arrays = [np.random.default_rng(0).normal(size=SAMPLED).astype(np.float32), ties((8, 16))]
    keep = [54_321, 77]
    specs = [SPECS["both"], SPECS["columns"]]
    program, placed = compiled(
        lambda s: selection.keep_largest_each(s, keep),
        [on_mesh(a, spec, axes) for a, spec in zip(arrays, specs, strict=True)],
    )
    assert_same_masks(program(placed), each_largest(arrays, keep))
    assert_moves_only_counts(program)


def test_keep_largest_eager_leaves_shards_where_they_are():
    placed = [on_mesh(ties((8, 40)), SPECS["rows"]), on_mesh(ties((9, 16)), SPECS["columns"])]
    masks = selection.keep_largest(placed, 201)
    for mask, score in zip(masks, placed, strict=True):
        assert mask.sharding.is_equivalent_to(score.sharding, score.ndim)


def on_mesh(array, spec, axes=jax.sharding.AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axes,) * 2)
    return jax.device_put(array, NamedSharding(mesh, spec))


def compiled(f, scores):
    return as_shipped(f).lower(scores).compile(), scores


COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)"
    r"(?:-start)?\("
)


def assert_moves_only_counts(program):
    """Between devices go counts, some for each of them, and sums of them and of a sample."""
    for shapes, kind in COLLECTIVE.findall(program.as_text()):
        sizes = [
            np.prod([int(n) for n in shape.split(",") if n])
            for shape in re.findall(r"\[([\d,]*)\]", shapes)
        ]
        assert sum(sizes) <= (2**14 if kind == "all-reduce" else 6 * jax.device_count()), shapes


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


# ---- keep_largest with a sample


def sampled_arrays():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=SAMPLED).astype(np.float32)
    return {
        "normal": normal,
        "integers": ties(SAMPLED),
        "mostly zeros": np.where(rng.uniform(size=SAMPLED) < 0.95, 0, normal).astype(np.float32),
        "sorted": np.sort(normal, axis=None).reshape(SAMPLED),
        "all equal": np.full(SAMPLED, 0.5, np.float32),
        "denormals": (rng.integers(-(10**6), 10**6, SAMPLED) * 1e-45).astype(np.float32),
        "half infinite": np.where(rng.uniform(size=SAMPLED) < 0.5, -np.inf, normal),
        "one outlier": np.where(np.arange(normal.size).reshape(SAMPLED) == 98_765, 3e38, -3e38),
    }


@pytest.mark.parametrize("values", sampled_arrays().values(), ids=sampled_arrays().keys())
def test_keep_largest_with_a_sample_equals_a_stable_sort(values):
    scores = values.astype(np.float32)
    for keep in (0, 1, 1_000, scores.size // 10, scores.size // 2 + 1, scores.size - 1):
        expected = oracles.keep_largest([scores], keep)
        assert_same_masks(selection.keep_largest([jnp.asarray(scores)], keep), expected)
        assert_same_masks(_jitted(jnp.asarray(scores), keep), expected)


@as_shipped
def _jitted(scores, keep):
    return selection.keep_largest([scores], keep)


def test_keep_largest_with_a_sample_takes_leaves_of_different_scale():
    rng = np.random.default_rng(0)
    shapes_and_scales = [(SAMPLED, 1e-3), ((300, 7), 1e3), ((64, 3, 3), 1.0), ((), 1.0)]
    arrays = [np.asarray(rng.normal(size=s) * x, np.float32) for s, x in shapes_and_scales]
    for keep in (100, 2_000, 100_000):
        got = selection.keep_largest(on_device(arrays), keep)
        assert_same_masks(got, oracles.keep_largest(arrays, keep))


def test_keep_largest_with_a_sample_takes_more_than_64_leaves():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(64, 64)).astype(np.float32).round(2) for _ in range(66)]
    got = selection.keep_largest(on_device(arrays), 33_333)
    assert_same_masks(got, oracles.keep_largest(arrays, 33_333))


def test_keep_largest_takes_a_sample_from_a_scalar():
    arrays = [np.ones(8, np.float32), np.float32(3), np.zeros(2**18 - 9, np.float32)]
    assert_same_masks(selection.keep_largest(on_device(arrays), 5), oracles.keep_largest(arrays, 5))


def test_keep_largest_copies_no_scores():
    scores = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    assert scratch(lambda s: selection.keep_largest([s], 10**5), scores) < 4 * 2**20 / 10


# ---- keep_largest_each


@given(data=st.data())
def test_keep_largest_each_equals_keep_largest_of_each(data):
    arrays = data.draw(some_arrays(GROUPS["mixed"]))
    keep = [data.draw(st.integers(0, a.size)) for a in arrays]
    got = selection.keep_largest_each(on_device(arrays), keep)
    assert_same_masks(got, each_largest(arrays, keep))


def test_keep_largest_each_takes_traced_counts():
    arrays = [ties((4, 6)), ties((5,), seed=1)]
    jitted = as_shipped(lambda keep: selection.keep_largest_each(on_device(arrays), keep))
    for keep in ([0, 5], [13, 2], [24, 0]):
        assert_same_masks(jitted(keep), each_largest(arrays, keep))


def test_keep_largest_each_takes_large_arrays_beside_small_ones():
    arrays = [ties(SAMPLED), ties((3, 4), seed=1), np.zeros((0, 2), np.float32)]
    keep = [100_000, 5, 0]
    got = selection.keep_largest_each(on_device(arrays), keep)
    assert_same_masks(got, each_largest(arrays, keep))


def test_keep_largest_each_of_no_arrays_is_no_mask():
    assert selection.keep_largest_each([], []) == []


def test_keep_largest_each_has_one_count_for_each_array():
    with pytest.raises(ValueError, match=r"one count for each of 2 arrays, got \["):
        selection.keep_largest_each([jnp.ones(2), jnp.ones(3)], [1])


# ---- keep_largest_along


def largest_along(scores, keep, axes):
    """The oracle along some axes: every other index is a selection of its own."""
    others = [a for a in range(scores.ndim) if a not in [axis % scores.ndim for axis in axes]]
    order = [*others, *sorted(axis % scores.ndim for axis in axes)]
    moved = scores.transpose(order)
    counts = np.broadcast_to(keep, moved.shape[: len(others)])
    mask = np.zeros(moved.shape, bool)
    for index in np.ndindex(counts.shape):
        mask[index] = oracles.keep_largest([moved[index]], counts[index])[0]
    return mask.transpose(np.argsort(order))


@pytest.mark.parametrize("axes", [(-1,), (0,), (-1, 0), (2, 0, 1)], ids=str)
def test_keep_largest_along_equals_stable_sorts(axes):
    scores = ties((3, 4, 5))
    n = int(np.prod([scores.shape[a] for a in axes]))
    for keep in {0, 1, n // 2, n}:
        got = selection.keep_largest_along(jnp.asarray(scores), keep, axes)
        np.testing.assert_array_equal(got, largest_along(scores, keep, axes))


@pytest.mark.parametrize("shape", [(3, 5), (3, 1), ()], ids=str)
def test_keep_largest_along_takes_counts_for_each_row(shape):
    scores = ties((3, 4, 5))
    keep = np.random.default_rng(0).integers(0, 5, shape)
    expected = largest_along(scores, keep, (1,))
    along = partial(selection.keep_largest_along, axis=1)
    np.testing.assert_array_equal(along(jnp.asarray(scores), keep), expected)
    np.testing.assert_array_equal(as_shipped(along)(scores, keep), expected)


def test_keep_largest_along_maps_over_scores():
    scores = ties((2, 3, 4))
    got = jax.vmap(lambda s: selection.keep_largest_along(s, 2, 0))(jnp.asarray(scores))
    np.testing.assert_array_equal(got, largest_along(scores, 2, (1,)))


def test_keep_largest_along_clips_traced_counts():
    jitted = as_shipped(lambda keep: selection.keep_largest_along(jnp.ones((2, 3)), keep))
    assert jitted(jnp.array([-1, 7])).tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_keep_largest_along_of_nothing_is_empty(shape):
    assert selection.keep_largest_along(jnp.zeros(shape), 0).shape == shape


# ---- kth_largest


def descending(arrays):
    """All real numbers, NaN last."""
    return -np.sort(-np.concatenate([np.ravel(a).astype(np.float64) for a in arrays]))


@each_group
@given(data=st.data())
def test_kth_largest_equals_a_sort(group, data):
    arrays = data.draw(some_arrays(group))
    k = data.draw(st.integers(1, sum(a.size for a in arrays)))
    got = np.asarray(selection.kth_largest(on_device(arrays), k))
    assert got.shape == () and got.dtype == np.float32
    np.testing.assert_array_equal(got.astype(np.float64), descending(arrays)[k - 1])
    assert got != 0 or not np.signbit(got)


@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_kth_largest_equals_a_sort_for_every_k(dtype):
    values = oracles.awkward(dtype)
    kth = as_shipped(lambda k: selection.kth_largest([jnp.asarray(values)], k))
    got = np.array([kth(k) for k in range(1, values.size + 1)], np.float64)
    np.testing.assert_array_equal(got, descending([values]))


def test_kth_largest_of_a_traced_k_out_of_range_is_nan():
    kth = as_shipped(lambda k: selection.kth_largest([jnp.arange(3.0)], k))
    got = [kth(k) for k in (-1, 0, 1, 3, 4)]
    np.testing.assert_array_equal(got, [np.nan, np.nan, 2.0, 0.0, np.nan])


def test_kth_largest_maps_over_scores_and_k():
    got = jax.vmap(lambda s, k: selection.kth_largest([s], k))(
        jnp.arange(12.0).reshape(3, 4), jnp.array([1, 2, 9])
    )
    np.testing.assert_array_equal(got, [3.0, 6.0, np.nan])


def test_kth_largest_works_in_float64():
    with jax.enable_x64(True):
        values = np.array([1.0, 1.0 + 1e-15, -5e-324, 0.0, -np.inf])
        got = [selection.kth_largest([jnp.asarray(values)], k) for k in range(1, 6)]
        np.testing.assert_array_equal(got, descending([values]))


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_kth_largest_of_large_shards_equals_a_sort(axes):
    array = np.random.default_rng(0).normal(size=SAMPLED).astype(np.float32)
    program, placed = compiled(
        lambda s: selection.kth_largest(s, 12_345), [on_mesh(array, SPECS["both"], axes)]
    )
    assert float(program(placed)) == descending([array])[12_344]
    assert_moves_only_counts(program)


def test_kth_largest_copies_no_scores():
    scores = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    assert scratch(lambda s: selection.kth_largest([s], 10**5), scores) < 4 * 2**20 / 10


def test_kth_largest_takes_a_traced_k_of_more_than_2_to_the_31_entries():
    scores = jax.ShapeDtypeStruct((5, 2**30), jnp.float32)
    k = jax.ShapeDtypeStruct((), jnp.int32)
    got = jax.eval_shape(lambda s, k: selection.kth_largest([s], k), scores, k)
    assert (got.shape, got.dtype) == ((), jnp.float32)


# ---- removed_count, kept_count, rest_count


SPARSITIES = np.concatenate([np.linspace(0, 1, 97), [1e-9, 0.9, 2.0, -1.0, np.nan]]).astype(
    np.float32
)


def removed(sparsity, n):
    """By Python; a traced sparsity may be out of range."""
    return round(min(max(float(np.nan_to_num(sparsity)), 0), 1) * n)


@pytest.mark.parametrize("n", [0, 1, 36, 266_200, 2**24 + 1, 2**31 - 1])
def test_removed_count_traced_is_that_of_python(n):
    got = as_shipped(jax.vmap(lambda s: selection.removed_count(s, n)))(SPARSITIES)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [removed(s, n) for s in SPARSITIES])


@pytest.mark.parametrize("n", [2**31, 5 * 10**9 + 3, 2**48 - 1])
def test_removed_count_traced_of_many_is_two_numbers(n):
    got = as_shipped(jax.vmap(lambda s: selection.removed_count(s, n)))(SPARSITIES)
    np.testing.assert_array_equal(as_int64(got), [removed(s, n) for s in SPARSITIES])


def as_int64(count):
    high, low = (np.asarray(half, np.int64) for half in count)
    return high * 2**24 + low


@pytest.mark.parametrize("n", [10, 5 * 10**9 + 3])
def test_kept_count_is_the_rest_of_removed_count(n):
    kept = as_shipped(lambda s: selection.kept_count(s, n))(0.7)
    kept = int(kept) if n < 2**31 else int(as_int64(kept))
    assert kept == n - removed(np.float32(0.7), n)
    assert selection.kept_count(0.7, n) == n - removed(0.7, n)


@pytest.mark.parametrize(("count", "rest"), [(-1, 10), (0, 10), (3, 7), (10, 0), (11, 0)])
def test_rest_count_clips_a_traced_count(count, rest):
    assert int(as_shipped(lambda c: selection.rest_count(c, 10))(count)) == rest


def test_rest_count_of_many_is_two_numbers():
    got = as_shipped(lambda c: selection.rest_count(c, 5 * 10**9))(7)
    assert as_int64(got) == 5 * 10**9 - 7


def test_rest_count_refuses_a_known_count_out_of_range():
    with pytest.raises(ValueError, match="from 0 to 10, the number of what may be pruned, got 11"):
        selection.rest_count(11, 10)


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
    got = as_shipped(lambda s: selection.removed_count(s, 1_001))(sparsity)
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
        as_shipped(partial(selection.order_key, dtype=jnp.float32))(values),
        selection.order_key(values),
    )


def test_keep_largest_along_takes_more_entries_than_the_counts_dtype_holds():
    counts = np.array([100, 5], np.int8)
    mask = selection.keep_largest_along(jnp.ones((2, 300)), counts)
    assert mask.sum(1).tolist() == [100, 5]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kth_largest_of_narrow_scores_works_where_x64_is_on(dtype):
    with jax.enable_x64(True):
        value = selection.kth_largest([jnp.array([1.0, 3.0], dtype)], 1)
        assert value.dtype == jnp.float32 and float(value) == 3


@pytest.mark.parametrize("spec", [PartitionSpec("a"), PartitionSpec(None, "b")], ids=["a", "b"])
def test_keep_largest_works_where_an_explicit_mesh_is_set(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    scores = ties((8, 16))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(scores, NamedSharding(mesh, spec))]
        got = as_shipped(lambda s: selection.keep_largest(s, 50))(placed)
        assert_same_masks(got, oracles.keep_largest([scores], 50))
