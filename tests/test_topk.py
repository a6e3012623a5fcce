"""`masking.topk` with counts, granularities, stacked layers and allocations, against NumPy.

The oracle numbers the units of a leaf by a loop over its entries, pools them one by one and sorts
them stably.
"""

import functools
import itertools
import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from quickly import as_shipped

from sparsejax import allocation, criteria, filters, masking
from sparsejax.granularities import NM, Block, Channel, Unstructured

pytestmark = pytest.mark.usefixtures("quickly")

F32, BF16, F16 = oracles.FLOATS

# One tree for nearly all, since every shape is compiled; the blocks of both leaves are ragged.
SHAPES = {"b": (3,), "s": (2, 3, 4), "w": (3, 5)}
DTYPES = {
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
    "float16": (F16, F16, F16),
    "mixed": (F32, BF16, F32),
}
GRANULARITIES = {
    "entries": Unstructured(),
    "blocks": Block((2, 3), pool=jnp.max),
    "channels": Channel(pool=jnp.max),
}
POOLED = ["blocks", "channels"]
ALLOCATIONS = {
    "uniform": allocation.uniform,
    "erdos_renyi": allocation.erdos_renyi,
    "erdos_renyi_kernel": allocation.erdos_renyi_kernel,
    "override": allocation.override(allocation.uniform, {"w": 1.0}),
}
STACK = filters.by_path("s")

each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
each_scope = pytest.mark.parametrize("scope", ["global", "per_leaf"])
each_stacked = pytest.mark.parametrize("stacked", [None, STACK], ids=["leaves", "layers"])


# ---- the oracle


def ties(shape, seed=0):
    """Five different integers, so that a cut nearly always falls among equal ones."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def tree_of_ties():
    return {path: ties(shape, seed) for seed, (path, shape) in enumerate(SHAPES.items())}


def parts(tree, stacked):
    """(path, index, scores) of what counts as a leaf; the index picks a layer, `...` a leaf."""
    for path, leaf in tree.items():
        if leaf.ndim > 1:
            indices = range(len(leaf)) if stacked and stacked(path, leaf) else [...]
            yield from ((path, i, leaf[i]) for i in indices)


def unit_numbers(shape, granularity):
    """For every entry the number of its unit."""
    numbers, found = np.zeros(shape, int), {}
    for index in np.ndindex(shape):
        match granularity:
            case Unstructured():
                unit = index
            case Channel():
                unit = index[granularity.axis]
            case Block():
                first = len(shape) - len(granularity.shape)
                last = zip(index[first:], granularity.shape, strict=True)
                unit = (*index[:first], *(i // size for i, size in last))
        numbers[index] = found.setdefault(unit, len(found))
    return numbers


def sizes(tree, granularity=GRANULARITIES["entries"], stacked=None):
    """How many units every leaf or layer has."""
    shapes = [scores.shape for _, _, scores in parts(tree, stacked)]
    return [int(unit_numbers(shape, granularity).max()) + 1 for shape in shapes]


def best(tree, keep, granularity=GRANULARITIES["entries"], stacked=None):
    """The masks; `keep` is one number for all together, or a list of one for each leaf or layer."""
    found = list(parts(tree, stacked))
    units = [unit_numbers(scores.shape, granularity) for _, _, scores in found]
    pooled = [
        np.array([np.max(scores[number == i]) for i in range(number.max() + 1)], np.float64)
        for (_, _, scores), number in zip(found, units, strict=True)
    ]
    if isinstance(keep, int):
        kept = oracles.keep_largest(pooled, keep)
    else:
        kept = [oracles.keep_largest([p], k)[0] for p, k in zip(pooled, keep, strict=True)]
    masks = {
        path: np.ones(leaf.shape if leaf.ndim > 1 else (), bool) for path, leaf in tree.items()
    }
    for (path, index, _), number, k in zip(found, units, kept, strict=True):
        masks[path][index] = k[number]
    return masks


def kept_of(scope, sparsity, counts):
    """What `best` keeps by Python's rounding: of all, or of each."""
    kept = [n - round(sparsity * n) for n in counts]
    n = sum(counts)
    return n - round(sparsity * n) if scope == "global" else kept


def assert_masks(got, expected):
    assert got.keys() == expected.keys()
    for path, mask in got.items():
        assert mask.dtype == bool and mask.ndim == expected[path].ndim
        np.testing.assert_array_equal(np.broadcast_to(mask, expected[path].shape), expected[path])


def total(masks, tree):
    """How many prunable entries stay."""
    shapes = [leaf.shape for leaf in tree.values() if leaf.ndim > 1]
    kept = [mask for path, mask in masks.items() if tree[path].ndim > 1]
    return sum(int(np.sum(np.broadcast_to(m, s))) for m, s in zip(kept, shapes, strict=True))


def trees(dtypes, *, nan=False, denormals=True):
    leaves = [
        oracles.awkward_arrays(shape, dtype, nan=nan)
        for shape, dtype in zip(SHAPES.values(), dtypes, strict=True)
    ]
    # A maximum may take float32's denormals for zeros.
    least = 0 if denormals else float(jnp.finfo(F32).smallest_normal)
    return st.tuples(*leaves).map(
        lambda found: {
            path: np.where(np.abs(leaf.astype(np.float64)) < least, leaf.dtype.type(0), leaf)
            for path, leaf in zip(SHAPES, found, strict=True)
        }
    )


# ---- the highest, exactly


@pytest.mark.parametrize(
    ("granularity", "dtypes", "scope", "stacked"),
    [
        *itertools.product(["entries"], DTYPES, ["global"], [None]),
        *itertools.product(["entries"], ["float32", "mixed"], ["per_leaf"], [None, STACK]),
        *itertools.product(POOLED, ["float16", "mixed"], ["global"], [None]),
        *itertools.product(POOLED, ["mixed"], ["per_leaf"], [None, STACK]),
    ],
    ids=lambda x: "" if x is None else "layers" if x is STACK else x,
)
@settings(max_examples=20)
@given(data=st.data())
def test_topk_equals_a_stable_sort(granularity, dtypes, scope, stacked, data):
    tree = data.draw(trees(DTYPES[dtypes], denormals=granularity == "entries"))
    sparsity = data.draw(st.floats(0, 1, exclude_max=True))
    unit = GRANULARITIES[granularity]
    got = masking.topk(tree, sparsity, scope=scope, granularity=unit, stacked=stacked)
    keep = kept_of(scope, sparsity, sizes(tree, unit, stacked))
    assert_masks(got, best(tree, keep, unit, stacked))


def test_topk_works_in_float64():
    tree = {"w": np.array([[1.0, 1.0 + 1e-15, 1.0], [-5e-324, 0.0, 1e-40]])}
    with jax.enable_x64(True):
        for k in range(6):
            assert_masks(masking.topk(tree, count=k), best(tree, 6 - k))


@functools.cache
def jitted_by_count(granularity):
    unit = GRANULARITIES[granularity]
    return as_shipped(lambda tree, count: masking.topk(tree, count=count, granularity=unit))


@each_granularity
@settings(max_examples=20)
@given(data=st.data())
def test_topk_under_jit_ranks_units_with_nan_lowest(granularity, data):
    tree = data.draw(trees(DTYPES["float32"], nan=True, denormals=granularity == "entries"))
    unit = GRANULARITIES[granularity]
    n = sum(sizes(tree, unit))
    count = data.draw(st.integers(0, n))
    assert_masks(jitted_by_count(granularity)(tree, count), best(tree, n - count, unit))


def test_topk_sums_blocks_and_channels_by_default():
    scores = {"w": np.array([[5.0, 1.0, 1.0], [0.0, 3.0, 3.0]], np.float32)}
    channels = masking.topk(scores, count=2, granularity=Channel(0))["w"]
    blocks = masking.topk(scores, count=1, granularity=Block((2, 2)))["w"]
    assert channels.tolist() == [[False], [False]]
    assert blocks.tolist() == [[True, True, False]] * 2


# ---- how many


@pytest.mark.parametrize(
    ("granularity", "scope"),
    [
        ("entries", "global"),
        ("entries", "per_leaf"),
        ("blocks", "global"),
        ("channels", "per_leaf"),
    ],
)
def test_topk_prunes_exactly_the_rounded_number_and_more_by_more_sparsity(granularity, scope):
    tree, unit = tree_of_ties(), GRANULARITIES[granularity]
    counts = sizes(tree, unit)
    n = sum(counts)
    before = dict.fromkeys(tree, np.True_)
    for k in range(n):
        masks = masking.topk(tree, k / n, scope=scope, granularity=unit)
        assert_masks(masks, best(tree, kept_of(scope, k / n, counts), unit))
        assert all(np.all(before[path] | ~np.asarray(masks[path])) for path in tree)
        before = masks


def test_topk_of_every_sparsity_removes_as_many():
    tree = tree_of_ties()
    n = sum(sizes(tree))
    for k in range(n):
        assert total(masking.topk(tree, k / n), tree) == n - k


@each_granularity
def test_topk_of_a_count_is_that_of_the_sparsity_that_removes_as_many(granularity):
    tree, unit = tree_of_ties(), GRANULARITIES[granularity]
    n = sum(sizes(tree, unit))
    for k in (0, 1, n // 2, n - 1):
        by_count = masking.topk(tree, count=k, granularity=unit)
        assert_masks(by_count, masking.topk(tree, k / n, granularity=unit))


def test_topk_of_a_count_may_prune_everything():
    tree = tree_of_ties()
    assert total(masking.topk(tree, count=sum(sizes(tree))), tree) == 0


@each_stacked
def test_topk_of_a_count_per_leaf_is_that_many_of_each(stacked):
    tree = tree_of_ties()
    got = masking.topk(tree, count=7, scope="per_leaf", stacked=stacked)
    assert_masks(got, best(tree, [n - 7 for n in sizes(tree, stacked=stacked)], stacked=stacked))


@pytest.mark.parametrize("count", [np.int64(5), np.uint8(5), jnp.int32(5), jnp.uint32(5)])
def test_topk_takes_any_type_of_count(count):
    tree = tree_of_ties()
    assert_masks(masking.topk(tree, count=count), best(tree, sum(sizes(tree)) - 5))


@each_scope
def test_topk_of_a_traced_sparsity_is_that_of_its_float32_value(scope):
    tree = tree_of_ties()
    jitted = jax.jit(lambda t, s: masking.topk(t, s, scope=scope, stacked=STACK))
    for sparsity in (0.0, 0.1, 1 / 3, 0.5, 0.77, 0.99):
        expected = masking.topk(tree, float(np.float32(sparsity)), scope=scope, stacked=STACK)
        assert_masks(jitted(tree, sparsity), expected)


@each_scope
def test_topk_of_a_traced_count_is_that_of_the_count(scope):
    tree = tree_of_ties()
    jitted = jax.jit(lambda t, k: masking.topk(t, count=k, scope=scope, stacked=STACK))
    for count in (0, 1, 7, 12):
        assert_masks(
            jitted(tree, count), masking.topk(tree, count=count, scope=scope, stacked=STACK)
        )


@each_scope
def test_topk_of_a_traced_count_out_of_range_prunes_none_or_all(scope):
    tree = tree_of_ties()
    jitted = jax.jit(lambda t, k: masking.topk(t, count=k, scope=scope, stacked=STACK))
    kept = [total(jitted(tree, count), tree) for count in (-1, -(2**31), 40, 2**31 - 1)]
    assert kept == [39, 39, 0, 0]


def test_topk_of_a_traced_count_per_leaf_empties_the_small_leaves():
    tree = tree_of_ties()
    masks = jax.jit(lambda k: masking.topk(tree, count=k, scope="per_leaf"))(20)
    assert (int(masks["s"].sum()), int(masks["w"].sum())) == (4, 0)


def test_topk_is_traced_once_for_all_amounts():
    traces, tree = [], tree_of_ties()

    @jax.jit
    def masks(tree, sparsity, count):
        traces.append(sparsity)
        by_sparsity = masking.topk(tree, sparsity, granularity=GRANULARITIES["channels"])
        return by_sparsity, masking.topk(tree, count=count, scope="per_leaf")

    for k in range(3):
        masks(tree, k / 4, k)
    assert len(traces) == 1


# ---- allocations


def layers_of(tree, granularity, stacked):
    found = parts(tree, stacked)
    return [
        allocation.Layer(path, scores.shape, n)
        for (path, _, scores), n in zip(found, sizes(tree, granularity, stacked), strict=True)
    ]


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("granularity", ["entries", "channels"])
@each_stacked
def test_topk_keeps_the_best_of_as_many_as_an_allocation_says(allocate, granularity, stacked):
    tree, unit = tree_of_ties(), GRANULARITIES[granularity]
    layers = layers_of(tree, unit, stacked)
    n = sum(layer.units for layer in layers)
    for sparsity in (0.0, 0.25, 0.5):
        keep = n - round(sparsity * n)
        counts = allocation.allocate(ALLOCATIONS[allocate], layers, keep)
        assert sum(counts) == keep
        got = masking.topk(
            tree, sparsity, allocation=ALLOCATIONS[allocate], granularity=unit, stacked=stacked
        )
        assert_masks(got, best(tree, counts, unit, stacked))


@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_topk_by_an_allocation_prunes_exactly_a_count(allocate):
    tree = tree_of_ties()
    for count in range(0, 24, 5):
        masks = masking.topk(tree, count=count, allocation=ALLOCATIONS[allocate])
        assert total(masks, tree) == 39 - count


def test_topk_by_an_allocation_that_keeps_a_leaf_dense():
    tree = tree_of_ties()
    masks = masking.topk(tree, 0.5, allocation=ALLOCATIONS["override"])
    assert np.all(masks["w"]) and int(masks["s"].sum()) == 39 - 20 - 15


def test_topk_gives_every_layer_the_count_of_its_own_from_an_allocation():
    tree, counts = tree_of_ties(), [2, 11, 9]
    masks = masking.topk(
        tree, count=17, allocation=lambda layers, keep: counts, stacked=STACK, scope="per_leaf"
    )
    assert_masks(masks, best(tree, counts, stacked=STACK))


def test_topk_shows_an_allocation_paths_shapes_of_layers_and_units():
    seen = []

    def spy(layers, keep):
        seen.extend([*layers, keep])
        return allocation.uniform(layers, keep)

    masking.topk(tree_of_ties(), count=3, allocation=spy, granularity=Channel(), stacked=STACK)
    s = allocation.Layer("s", (3, 4), 4)
    assert seen == [s, s, allocation.Layer("w", (3, 5), 5), 10]


def test_topk_by_an_allocation_under_jit_equals_eager():
    tree = tree_of_ties()
    f = partial(masking.topk, sparsity=0.6, allocation=allocation.erdos_renyi, stacked=STACK)
    assert_masks(as_shipped(f)(tree), f(tree))


# ---- stacked layers


@each_granularity
def test_topk_per_leaf_of_stacked_layers_is_that_of_a_list_of_them(granularity):
    tree, unit = tree_of_ties(), GRANULARITIES[granularity]
    f = partial(masking.topk, sparsity=0.6, scope="per_leaf", granularity=unit)
    got, expected = f(tree, stacked=STACK), f([*tree["s"], tree["w"]])
    np.testing.assert_array_equal(got["s"], np.stack(expected[:2]))
    np.testing.assert_array_equal(got["w"], expected[2])


@pytest.mark.parametrize("amount", [{"scope": "per_leaf"}, {"allocation": allocation.uniform}])
def test_topk_where_every_leaf_is_stacked(amount):
    tree = {"s": ties((2, 3, 4))}
    got = masking.topk(tree, 0.5, stacked=STACK, **amount)
    assert_masks(got, best(tree, [6, 6], stacked=STACK))


@pytest.mark.parametrize("granularity", ["entries", "blocks"])
def test_topk_global_does_not_mind_stacked_layers(granularity):
    tree, unit = tree_of_ties(), GRANULARITIES[granularity]
    got = masking.topk(tree, 0.6, granularity=unit, stacked=STACK)
    assert_masks(got, masking.topk(tree, 0.6, granularity=unit))


def test_topk_global_has_channels_in_every_layer():
    tree, unit = tree_of_ties(), GRANULARITIES["channels"]
    got = masking.topk(tree, count=6, granularity=unit, stacked=STACK)
    assert got["s"].shape == (2, 1, 4)
    assert_masks(got, best(tree, 13 - 6, unit, STACK))


def test_topk_counts_the_axis_of_a_channel_in_the_layer():
    masks = masking.topk(tree_of_ties(), count=1, granularity=Channel(0), stacked=STACK)
    assert masks["s"].shape == (2, 3, 1) and masks["w"].shape == (3, 1)


@pytest.mark.parametrize(
    ("granularity", "scope", "shape"),
    [
        ("entries", "global", (0, 3, 4)),
        ("entries", "per_leaf", (0, 3, 4)),
        ("blocks", "per_leaf", (0, 3, 4)),
        ("channels", "per_leaf", (0, 1, 4)),
    ],
)
def test_topk_of_no_layers_is_empty(granularity, scope, shape):
    tree, unit = {"s": ties((0, 3, 4)), "w": ties((3, 5))}, GRANULARITIES[granularity]
    masks = masking.topk(tree, count=1, scope=scope, granularity=unit, stacked=STACK)
    assert masks["s"].shape == shape
    alone = {"w": tree["w"]}
    assert_masks({"w": masks["w"]}, best(alone, sizes(alone, unit)[0] - 1, unit))


# ---- N:M


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_topk_by_n_of_m_is_that_of_every_leaf(axis):
    tree, nm = tree_of_ties(), NM(1, 2, axis=axis)
    masks = masking.topk(tree, granularity=nm)
    assert masks["b"].shape == () and masks["b"]
    for path in ("s", "w"):
        np.testing.assert_array_equal(masks[path], nm.masks(path, tree[path]))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_topk_by_n_of_m_counts_the_axis_in_the_layer(axis):
    tree, nm = tree_of_ties(), NM(1, 2, axis=axis)
    masks = masking.topk(tree, granularity=nm, stacked=STACK)
    np.testing.assert_array_equal(masks["s"], [nm.masks("s", layer) for layer in tree["s"]])


def test_topk_by_n_of_m_of_no_layers_is_empty():
    tree = {"s": ties((0, 3, 4)), "w": ties((3, 5))}
    assert masking.topk(tree, granularity=NM(1, 2), stacked=STACK)["s"].shape == (0, 3, 4)


# ---- trees, transformations, sizes


def test_topk_masks_of_channels_are_applied_by_broadcasting():
    w = np.arange(12, dtype=np.float32).reshape(2, 3, 2) + 1
    masks = masking.topk({"w": w}, 0.5, granularity=Channel())
    assert masks["w"].shape == (1, 1, 2)
    pruned = masking.apply_masks({"w": w}, masks)["w"]
    np.testing.assert_array_equal(pruned, w * np.array([0, 1], np.float32))


@pytest.mark.parametrize(
    "granularity", [*GRANULARITIES.values(), NM(1, 2)], ids=lambda g: type(g).__name__
)
def test_topk_gives_other_leaves_a_single_true(granularity):
    amount = None if isinstance(granularity, NM) else 0.5
    tree = {"b": ties((3,)), "n": np.arange(4), "none": None, "w": ties((3, 5))}
    masks = masking.topk(tree, amount, granularity=granularity)
    assert masks["b"].shape == masks["n"].shape == () and masks["b"] and masks["n"]
    assert masks["none"] is None


@pytest.mark.parametrize(
    ("granularity", "shape"), [("entries", (0, 2)), ("blocks", (0, 2)), ("channels", (1, 2))]
)
def test_topk_of_an_empty_leaf_is_empty(granularity, shape):
    tree, unit = {"e": ties((0, 2)), "w": ties((3, 5))}, GRANULARITIES[granularity]
    masks = masking.topk(tree, 0.2, scope="per_leaf", granularity=unit)
    assert masks["e"].shape == shape
    alone = {"w": tree["w"]}
    assert_masks({"w": masks["w"]}, best(alone, kept_of("per_leaf", 0.2, sizes(alone, unit)), unit))


def test_topk_global_scores_channels_without_entries_zero():
    scores = {"e": ties((0, 2)), "w": np.array([[-1.0, 1.0]], np.float32)}
    masks = masking.topk(scores, count=1, granularity=Channel())
    assert (masks["e"].tolist(), masks["w"].tolist()) == ([[True, True]], [[False, True]])


@pytest.mark.parametrize("amount", [{"scope": "per_leaf"}, {"allocation": allocation.uniform}, {}])
def test_topk_of_no_leaves_is_empty(amount):
    assert masking.topk({}, 0.5, **amount) == {}


@pytest.mark.parametrize(
    "granularity", [Unstructured(), Channel(), NM(1, 2)], ids=lambda g: type(g).__name__
)
def test_topk_maps_over_scores(granularity):
    amount = None if isinstance(granularity, NM) else 0.6
    scores = ties((3, 4, 5))
    f = partial(masking.topk, sparsity=amount, granularity=granularity)
    np.testing.assert_array_equal(jax.vmap(f)(scores), np.stack([f(s) for s in scores]))


def test_topk_maps_over_stacked_layers():
    many = [{path: ties(shape, i) for path, shape in SHAPES.items()} for i in range(3)]
    f = partial(masking.topk, sparsity=0.6, scope="per_leaf", stacked=STACK)
    got = jax.vmap(f)(jax.tree.map(lambda *leaves: np.stack(leaves), *many))
    for i, tree in enumerate(many):
        assert_masks(
            {path: m if m.ndim < 2 else m[i] for path, m in got.items()} | {"b": got["b"][i]},
            f(tree),
        )


@each_granularity
@each_scope
def test_topk_has_abstract_values(granularity, scope):
    tree = tree_of_ties()
    f = partial(
        masking.topk, count=2, scope=scope, granularity=GRANULARITIES[granularity], stacked=STACK
    )
    real = f(tree)
    assert {path: (m.shape, m.dtype) for path, m in jax.eval_shape(f, tree).items()} == {
        path: (m.shape, m.dtype) for path, m in real.items()
    }


LARGE = {
    "s": jax.ShapeDtypeStruct((8, 40_000, 20_000), jnp.float32),
    "w": jax.ShapeDtypeStruct((70_000, 70_000), jnp.bfloat16),
}


@each_scope
@each_stacked
def test_topk_takes_more_than_2_to_the_31_entries(scope, stacked):
    f = partial(masking.topk, scope=scope, stacked=stacked)
    by_number = jax.eval_shape(lambda scores: f(scores, 0.9), LARGE)
    by_tracer = jax.eval_shape(lambda scores, s: f(scores, s), LARGE, 0.9)
    by_count = jax.eval_shape(lambda scores, k: f(scores, count=k), LARGE, 5)
    for masks in (by_number, by_tracer, by_count):
        assert {path: m.shape for path, m in masks.items()} == {
            path: scores.shape for path, scores in LARGE.items()
        }


def test_topk_by_an_allocation_takes_more_than_2_to_the_31_entries():
    f = partial(masking.topk, sparsity=0.9, allocation=allocation.erdos_renyi, stacked=STACK)
    assert {m.shape for m in jax.eval_shape(f, LARGE).values()} == {
        scores.shape for scores in LARGE.values()
    }


# ---- sharded scores

SPECS = {
    "rows": PartitionSpec("a"),
    "columns": PartitionSpec(None, "a"),
    "both": PartitionSpec("a", "b"),
}
SHARDED = {
    "global": {"sparsity": 0.7},
    "per layer": {"sparsity": 0.7, "scope": "per_leaf", "stacked": STACK},
    "blocks": {"sparsity": 0.7, "granularity": Block((2, 2), pool=jnp.max)},
    "channels per layer": {
        "sparsity": 0.7,
        "granularity": Channel(pool=jnp.max),
        "allocation": allocation.uniform,
        "stacked": STACK,
    },
    "N:M": {"granularity": NM(2, 4, axis=-1), "stacked": STACK},
}


@pytest.mark.parametrize(
    ("spec", "case", "kind"),
    [
        *itertools.product(["both"], SHARDED, [AxisType.Auto]),
        *itertools.product(["rows"], ["per layer", "channels per layer"], [AxisType.Auto]),
        *itertools.product(["columns"], ["global", "blocks"], [AxisType.Auto, AxisType.Explicit]),
        *itertools.product(["both"], ["global", "blocks", "N:M"], [AxisType.Explicit]),
    ],
)
def test_topk_sharded_equals_that_of_the_whole(spec, case, kind):
    tree = {"s": ties((4, 8, 8)), "w": ties((16, 32), seed=1)}
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    sharded = jax.device_put(tree, NamedSharding(mesh, SPECS[spec]))
    assert_masks(jax.jit(partial(masking.topk, **SHARDED[case]))(sharded), of_the_whole(case))


def test_topk_of_layers_sharded_by_an_explicit_mesh_is_refused():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    scores = jax.device_put(ties((4, 8, 8)), NamedSharding(mesh, SPECS["rows"]))
    with pytest.raises(ValueError, match=r"`scores` must not be sharded over an explicit mesh"):
        masking.topk({"s": scores}, **SHARDED["per layer"])


@pytest.mark.parametrize("case", ["per layer", "blocks"])
def test_topk_sharded_without_jit_equals_that_of_the_whole(case):
    tree = {"s": ties((4, 8, 8)), "w": ties((16, 32), seed=1)}
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(tree, NamedSharding(mesh, SPECS["both"]))
    assert_masks(masking.topk(sharded, **SHARDED[case]), of_the_whole(case))


@functools.cache
def of_the_whole(case):
    tree = {"s": ties((4, 8, 8)), "w": ties((16, 32), seed=1)}
    return jax.tree.map(np.asarray, masking.topk(tree, **SHARDED[case]))


# ---- with LAMP


def lamp(weights):
    """In fractions: the square over the sum of all squares that are not smaller."""
    flat = [int(x) ** 2 for x in weights.ravel()]
    return [Fraction(x, sum(y for y in flat if y >= x)) for x in flat]


def test_topk_of_lamp_keeps_in_every_leaf_as_many_as_the_scores_say():
    rng = np.random.default_rng(0)
    params = {
        path: (scale * rng.permutation(np.arange(1, 1 + math.prod(shape)))).reshape(shape)
        for path, shape, scale in (("a", (3, 4), 1), ("b", (5, 4), 100))
    }
    scores = {path: lamp(w) for path, w in params.items()}
    ranked = sorted(((s, path) for path, all_ in scores.items() for s in all_), reverse=True)
    weights = {path: w.astype(np.float32) for path, w in params.items()}
    scored = criteria.lamp(weights)
    for keep in range(2, 32, 5):
        masks = masking.topk(scored, count=32 - keep)
        expected = {path: sum(p == path for _, p in ranked[:keep]) for path in params}
        assert {path: int(m.sum()) for path, m in masks.items()} == expected
        for path, mask in masks.items():
            (largest,) = oracles.keep_largest([np.abs(params[path])], expected[path])
            np.testing.assert_array_equal(mask, largest)
