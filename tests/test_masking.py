from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from quickly import as_shipped

import sparsejax as sj
from sparsejax import criteria, filters, masking

pytestmark = pytest.mark.usefixtures("quickly")

GOLDEN = Path(__file__).parent / "golden" / "torch_prune.npz"
AMOUNTS = (0.0625, 0.1, 0.125, 0.25, 0.375, 0.5, 0.75, 0.9, 0.97)

SMALL = [(2, 3), (4, 1, 2), (5, 1), (0, 2), (3,)]
each_scope = pytest.mark.parametrize("scope", ["global", "per_leaf"])


@pytest.fixture
def params():
    return {"b": jnp.array([3.0, -4.0]), "w": jnp.array([[1.0, -2.0], [0.5, 0.0]])}


@pytest.fixture
def grads():
    return {"b": jnp.array([0.1, 0.2]), "w": jnp.array([[-0.4, 0.1], [0.2, 0.0]])}


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_trees(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def ties(shape):
    """Trees' leaves: few values, most of them equal."""
    size = int(np.prod(shape))
    values = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
    return st.lists(values, min_size=size, max_size=size).map(
        lambda v: jnp.asarray(v, jnp.float32).reshape(shape)
    )


def small_trees():
    shapes = st.lists(st.sampled_from(SMALL), min_size=1, max_size=3)
    trees = shapes.flatmap(lambda chosen: st.tuples(*map(ties, chosen)))
    return trees.filter(lambda tree: any(leaf.ndim > 1 for leaf in tree)).map(list)


def kept(masks):
    return [int(jnp.sum(m)) for m in masks]


# ---- threshold


@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
@given(data=st.data())
def test_threshold_keeps_what_is_at_least_the_threshold(dtype, data):
    scores = data.draw(oracles.awkward_arrays((2, 3), dtype, nan=False))
    t = float(data.draw(oracles.awkward_arrays((), np.float32, nan=False)))
    mask = masking.threshold({"w": jnp.asarray(scores)}, t)["w"]
    np.testing.assert_array_equal(mask, scores.astype(np.float64) >= t)


@pytest.mark.parametrize(
    ("t", "expected"),
    [(0.0, [True, True, True]), (1e-45, [False, True, True]), (3e-45, [False, False, True])],
)
def test_threshold_tells_denormals_apart(t, expected):
    scores = jnp.array([[0.0, 1e-45, 3e-45]])
    assert masking.threshold(scores, t)[0].tolist() == expected


def test_threshold_compares_half_precision_scores_with_a_float32_threshold():
    scores = jnp.array([[0.1]], jnp.bfloat16)  # 0.10009765625, to which 0.1001 rounds
    assert masking.threshold(scores, 0.1) and not masking.threshold(scores, 0.1001)


@pytest.mark.parametrize(
    ("t", "expected"),
    [(np.inf, [False, False, True]), (-np.inf, [True, True, True]), (-1.5, [False, True, True])],
)
def test_threshold_takes_any_real_number(t, expected):
    assert masking.threshold(jnp.array([[-jnp.inf, -1.5, jnp.inf]]), t)[0].tolist() == expected


@pytest.mark.parametrize("t", [2, np.float64(2), np.int8(2), jnp.float32(2), jnp.bfloat16(2)])
def test_threshold_takes_any_type_of_number(t):
    assert masking.threshold(jnp.array([[1.0, 2.0]]), t)[0].tolist() == [False, True]


def test_threshold_traced_equals_eager():
    scores = {"b": jnp.ones(3), "w": jnp.asarray(normal((4, 5)))}
    jitted = as_shipped(masking.threshold)
    for t in (-1.0, 0.0, float(scores["w"][1, 2])):
        assert_same_trees(jitted(scores, t), masking.threshold(scores, t))


@pytest.mark.parametrize("t", [-np.inf, 0.0])
def test_threshold_prunes_nan_scores_under_jit(t):
    mask = as_shipped(masking.threshold)(jnp.array([[jnp.nan, -jnp.nan, 1.0]]), t)
    assert mask[0].tolist() == [False, False, True]


def test_threshold_maps_over_thresholds():
    scores = jnp.asarray(normal((3, 4)))
    thresholds = jnp.array([-1.0, 0.0, 0.5])
    got = jax.vmap(lambda t: masking.threshold(scores, t))(thresholds)
    np.testing.assert_array_equal(got, scores[None] >= thresholds[:, None, None])


def test_threshold_takes_scores_that_are_constants_of_a_jitted_function():
    scores = jnp.array([[1.0, 2.0]])
    assert jax.jit(lambda t: masking.threshold(scores, t))(1.5)[0].tolist() == [False, True]


def test_threshold_gives_a_single_true_where_nothing_may_be_pruned():
    masks = masking.threshold({"b": jnp.zeros(3), "n": jnp.arange(4), "w": jnp.zeros((1, 2))}, 1.0)
    assert masks["b"].shape == masks["n"].shape == () and masks["b"] and masks["n"]


def test_threshold_takes_scalar_scores():
    masks = masking.threshold([jnp.array(1.0), 2.0], 1.5, prunable=filters.floating)
    assert [bool(m) for m in masks] == [False, True]


def test_threshold_of_an_empty_leaf_is_empty():
    mask = masking.threshold(jnp.zeros((0, 3)), 1.0)
    assert mask.shape == (0, 3) and mask.dtype == bool


def test_threshold_leaves_none_alone():
    assert masking.threshold({"a": None, "w": jnp.ones((1, 1))}, 1.0)["a"] is None


def test_threshold_has_abstract_values():
    mask = jax.eval_shape(masking.threshold, jax.ShapeDtypeStruct((2, 3), jnp.float16), 0.5)
    assert (mask.shape, mask.dtype) == ((2, 3), bool)


def test_threshold_works_in_float64():
    with jax.enable_x64(True):
        mask = masking.threshold(jnp.array([[1.0, 1.0 + 1e-15]]), 1.0 + 1e-15)
    assert mask[0].tolist() == [False, True]


# ---- topk


@settings(max_examples=30)
@given(small_trees(), st.floats(0, 1, exclude_max=True))
def test_topk_global_is_a_stable_sort_of_all_prunable_entries(tree, sparsity):
    chosen = [leaf for leaf in tree if leaf.ndim > 1]
    n = sum(leaf.size for leaf in chosen)
    masks = masking.topk(tree, sparsity)
    expected = oracles.keep_largest(chosen, n - round(sparsity * n))
    for mask, oracle in zip([m for m in masks if m.ndim], expected, strict=True):
        np.testing.assert_array_equal(mask, oracle)


@settings(max_examples=30)
@given(small_trees(), st.floats(0, 1, exclude_max=True))
def test_topk_per_leaf_is_a_stable_sort_of_each_leaf(tree, sparsity):
    masks = masking.topk(tree, sparsity, scope="per_leaf")
    for leaf, mask in zip(tree, masks, strict=True):
        if leaf.ndim > 1:
            (expected,) = oracles.keep_largest([leaf], leaf.size - round(sparsity * leaf.size))
            np.testing.assert_array_equal(mask, expected)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@each_scope
@pytest.mark.parametrize("amount", AMOUNTS)
def test_topk_of_magnitude_equals_torch(golden, scope, amount):
    params = {name: jnp.asarray(golden[f"weights/{name}"]) for name in ("conv", "dense", "head")}
    masks = masking.topk(criteria.magnitude(params), amount, scope=scope)
    assert_same_trees(masks, {name: golden[f"{scope}/{amount}/{name}"] for name in params})


def test_topk_golden_file_holds_no_other_amounts(golden):
    assert {key.split("/")[1] for key in golden if key.startswith("global")} == set(
        map(str, AMOUNTS)
    )


@each_scope
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75, 0.9, 0.99])
def test_topk_traced_equals_eager(scope, sparsity):
    scores = {"b": jnp.ones(3), "v": jnp.asarray(normal((4, 5))), "w": jnp.zeros((3, 7))}
    jitted = as_shipped(masking.topk, static_argnames="scope")
    got = jitted(scores, sparsity, scope=scope)
    assert_same_trees(got, masking.topk(scores, np.float32(sparsity), scope=scope))


def test_topk_takes_scores_that_are_constants_of_a_jitted_function():
    scores = jnp.array([[1.0, 2.0]])
    assert jax.jit(lambda s: masking.topk(scores, s))(0.5)[0].tolist() == [False, True]


def test_topk_sorts_nan_lowest_under_jit():
    mask = as_shipped(masking.topk)(jnp.array([[-jnp.inf, jnp.nan]]), 0.5)
    assert mask[0].tolist() == [True, False]


def test_topk_takes_prunable_leaves_by_path():
    scores = {"conv": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.zeros((2, 2))}}
    masks = masking.topk(scores, 0.5, prunable=filters.by_path("conv.*"))
    assert kept([masks["conv"]["kernel"]]) == [2] and masks["head"]["kernel"].shape == ()


def test_topk_gives_a_single_true_where_nothing_may_be_pruned():
    masks = masking.topk({"b": jnp.zeros(3), "n": jnp.arange(4), "w": jnp.zeros((1, 2))}, 0.5)
    assert masks["b"].shape == masks["n"].shape == () and masks["b"] and masks["n"]


def test_topk_of_zero_keeps_everything():
    assert kept(masking.topk([jnp.zeros((2, 3)), -jnp.ones((2, 2))], 0.0)) == [6, 4]


def test_topk_may_prune_every_entry_of_a_small_leaf():
    assert kept(masking.topk([jnp.ones((1, 1)), jnp.ones((1, 3))], 0.9, scope="per_leaf")) == [0, 0]


def test_topk_competes_scalars_with_vectors():
    masks = masking.topk([jnp.array(3.0), jnp.array([1.0, 5.0])], 0.4, prunable=filters.floating)
    assert [m.tolist() for m in masks] == [True, [False, True]]


@each_scope
def test_topk_of_an_empty_leaf_is_empty(scope):
    masks = masking.topk([jnp.zeros((0, 3)), jnp.ones((1, 2))], 0.5, scope=scope)
    assert masks[0].shape == (0, 3) and kept(masks) == [0, 1]


def test_topk_of_an_empty_tree_is_empty():
    assert masking.topk({}, 0.5) == {}


def test_topk_leaves_none_alone():
    assert masking.topk({"a": None, "w": jnp.ones((1, 1))}, 0.0)["a"] is None


def test_topk_competes_leaves_of_different_precision():
    scores = [jnp.array([[0.1]], jnp.bfloat16), jnp.array([[0.1001, 0.1]])]
    assert kept(masking.topk(scores, 0.34)) == [1, 1]


def test_topk_maps_over_scores():
    scores = jnp.asarray(normal((3, 4, 5)))
    got = jax.vmap(lambda s: masking.topk(s, 0.3))(scores)
    np.testing.assert_array_equal(got, [masking.topk(s, 0.3) for s in scores])


# ---- apply_masks


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf, -0.0])
def test_apply_masks_makes_plain_zeros(value):
    pruned = masking.apply_masks(jnp.array([[value, 1.0]]), jnp.array([[False, True]]))
    assert pruned[0].tolist() == [0.0, 1.0] and not jnp.signbit(pruned[0, 0])


@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64],
)
def test_apply_masks_keeps_the_dtype(dtype):
    pruned = masking.apply_masks(jnp.ones((1, 2), dtype), jnp.array([[True, False]]))
    assert pruned.dtype == dtype and pruned[0].tolist() == [1, 0]


def test_apply_masks_keeps_numpy_float64_where_x64_is_off():
    pruned = masking.apply_masks(np.array([[1e-300, 2.0]]), jnp.array([[True, False]]))
    assert pruned.dtype == np.float64 and pruned[0].tolist() == [1e-300, 0.0]


def test_apply_masks_broadcasts_channels():
    params = jnp.asarray(normal((3, 3, 2, 4)))
    channels = jnp.array([True, False, True, False]).reshape(1, 1, 1, 4)
    pruned = masking.apply_masks({"w": params}, {"w": channels})["w"]
    np.testing.assert_array_equal(pruned, params * channels)


def test_apply_masks_zeroes_a_whole_leaf_by_a_single_false():
    assert not masking.apply_masks(jnp.ones((2, 2)), jnp.array(False)).any()


def test_apply_masks_takes_numpy_masks():
    assert masking.apply_masks(jnp.ones(2), np.array([True, False])).tolist() == [1.0, 0.0]


def test_apply_masks_passes_what_is_no_array_of_numbers():
    tree = {"f": jnp.tanh, "key": jax.random.key(0), "none": None, "s": "relu"}
    masks = {"f": jnp.array(True), "key": jnp.array(True), "none": None, "s": jnp.array(True)}
    assert masking.apply_masks(tree, masks) == tree


def test_apply_masks_passes_an_unpruned_leaf_as_it_is(params):
    masks = masking.threshold(params, 0.0)
    assert masking.apply_masks(params, masks)["b"] is params["b"]


def test_apply_masks_of_empty_and_scalar_leaves():
    pruned = masking.apply_masks(
        [jnp.zeros((0, 3)), 2.0], [jnp.ones((0, 3), bool), np.array(False)]
    )
    assert pruned[0].shape == (0, 3) and pruned[1] == 0.0


def test_apply_masks_under_jit_equals_eager(params):
    masks = masking.topk(params, 0.5)
    assert_same_trees(
        jax.jit(masking.apply_masks)(params, masks), masking.apply_masks(params, masks)
    )


def test_apply_masks_passes_gradients_through_kept_entries_only():
    masks = jnp.array([[True, False]])
    grads = jax.grad(lambda w: masking.apply_masks(w, masks).sum())(jnp.array([[1.0, jnp.nan]]))
    assert grads[0].tolist() == [1.0, 0.0]


# ---- sparsity


def test_sparsity_counts_prunable_all_and_each_leaf():
    params = {"b": jnp.zeros(3), "w": jnp.array([[0.0, -0.0, 1.0, 2.0]])}
    count = masking.sparsity(params)
    assert count.prunable == (2, 4) and count.total == (5, 7)
    assert count.leaves == {"b": (3, 3), "w": (2, 4)}


def test_sparsity_gives_python_integers():
    count = masking.sparsity({"w": jnp.ones((2, 2))})
    assert type(count.total.zeros) is int and type(count.total.size) is int


def test_sparsity_with_masks_counts_what_they_prune():
    params = {"b": jnp.zeros(3), "w": jnp.zeros((2, 3))}
    masks = {"b": jnp.array(True), "w": jnp.array([[True, False, False]])}
    count = masking.sparsity(params, masks)
    assert count.prunable == (4, 6) and count.total == (4, 9)


@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_sparsity_takes_only_zeros_for_zeros(dtype):
    values = oracles.awkward(dtype)
    assert masking.sparsity(jnp.asarray(values)[None]).prunable.zeros == 2


def test_sparsity_of_numpy_float64_does_not_round():
    assert masking.sparsity(np.array([[1e-300, 0.0]])).prunable.zeros == 1


def test_sparsity_counts_complex_leaves():
    assert masking.sparsity({"w": jnp.array([0.0, 1j])}).total == (1, 2)


def test_sparsity_does_not_count_leaves_that_are_not_floating():
    params = {"f": jnp.tanh, "key": jax.random.key(0), "n": jnp.arange(3), "none": None}
    assert masking.sparsity(params).total == (0, 0)


def test_sparsity_of_nothing_is_zero():
    assert masking.sparsity({"w": jnp.zeros((0, 2))}).prunable.sparsity == 0.0


def test_sparsity_counts_nonzeros():
    assert masking.sparsity(jnp.array([[0.0, 1.0, 2.0]])).prunable.nonzeros == 2


def test_sparsity_under_jit_equals_eager(params):
    masks = masking.topk(params, 0.5)
    for given_masks in (None, masks):
        got = jax.jit(lambda p, m: masking.sparsity(p, m).prunable.sparsity)(params, given_masks)
        assert got == masking.sparsity(params, given_masks).prunable.sparsity


def test_sparsity_of_topk_is_the_rounded_one():
    scores = jnp.asarray(normal((7, 11)))
    count = masking.sparsity(scores, masking.topk(scores, 0.9))
    assert count.prunable == (round(0.9 * 77), 77)


# ---- prune_masks and prune_tree


def test_prune_masks_keeps_ties_with_the_threshold(params, grads):
    masks = sj.prune_masks(params, grads, 0.2)
    np.testing.assert_array_equal(masks["w"], [[True, False], [True, False]])


def test_prune_tree_by_default_scores_by_gradient(params, grads):
    pruned = sj.prune_tree(params, grads, 0.2)
    np.testing.assert_array_equal(pruned["w"], [[1.0, 0.0], [0.5, 0.0]])


@pytest.mark.parametrize("criterion", [criteria.gradient, criteria.magnitude, criteria.taylor])
def test_prune_tree_prunes_nothing_at_zero(criterion):
    params = {"w": jnp.array([[0.0, -0.0, 1e-45, -1.0]])}
    pruned = sj.prune_tree(params, {"w": jnp.zeros((1, 4))}, 0, criterion=criterion)
    np.testing.assert_array_equal(pruned["w"], params["w"])
    np.testing.assert_array_equal(jnp.signbit(pruned["w"]), jnp.signbit(params["w"]))


def test_prune_tree_prunes_everything_finite_at_infinity(params, grads):
    assert not sj.prune_tree(params, grads, jnp.inf)["w"].any()


ORACLES = {
    "gradient": (criteria.gradient, lambda w, g: np.abs(g)),
    "magnitude": (criteria.magnitude, lambda w, g: np.abs(w)),
    "taylor": (criteria.taylor, lambda w, g: np.abs(w * g)),
    "one's own": (
        lambda params, grads: jax.tree.map(lambda w, g: w - g, params, grads),
        lambda w, g: w - g,
    ),
}
each_criterion = pytest.mark.parametrize(
    ("criterion", "oracle"), ORACLES.values(), ids=ORACLES.keys()
)


@each_criterion
def test_prune_tree_zeroes_scores_below_the_threshold(criterion, oracle):
    w, g = normal((5, 6)), normal((5, 6), seed=1)
    pruned = sj.prune_tree([jnp.asarray(w)], [jnp.asarray(g)], 0.3, criterion=criterion)
    np.testing.assert_array_equal(pruned[0], np.where(oracle(w, g) >= 0.3, w, 0))


@each_criterion
def test_prune_tree_under_jit_equals_eager(params, grads, criterion, oracle):
    jitted = as_shipped(lambda *a: sj.prune_tree(*a, criterion=criterion))
    for threshold in (0.0, 0.2, 1.0):
        expected = sj.prune_tree(params, grads, threshold, criterion=criterion)
        assert_same_trees(jitted(params, grads, threshold), expected)


def test_prune_tree_is_traced_once_for_all_thresholds(params, grads):
    traces = []

    @jax.jit
    def prune(params, grads, threshold):
        traces.append(threshold)
        return sj.prune_tree(params, grads, threshold)

    for threshold in (0.1, 0.2, 0.3):
        prune(params, grads, threshold)
    assert len(traces) == 1


def test_prune_tree_needs_no_gradients_for_magnitude(params):
    pruned = sj.prune_tree(params, None, 0.7, criterion=criteria.magnitude)
    np.testing.assert_array_equal(pruned["w"], [[1.0, -2.0], [0.0, 0.0]])


def test_prune_tree_takes_none_as_the_gradient_of_a_leaf_that_is_not_prunable(params, grads):
    pruned = sj.prune_tree(params, grads | {"b": None}, 0.2)
    np.testing.assert_array_equal(pruned["b"], params["b"])


def test_prune_tree_at_random_follows_the_key(params):
    criterion = criteria.random(jax.random.key(1))
    pruned = sj.prune_tree(params, None, 0.5, criterion=criterion)
    np.testing.assert_array_equal(
        pruned["w"], jnp.where(criterion(params)["w"] >= 0.5, params["w"], 0)
    )


def test_prune_tree_by_the_importance_of_the_output_equals_by_hand():
    params, x = {"w": jnp.asarray(normal((3, 2)))}, jnp.asarray(normal((5, 3), seed=1))
    importance = criteria.output_gradient(lambda p, x: x @ p["w"], params, x)
    pruned = sj.prune_tree(params, importance, 0.4)
    # d(x w)_o / dw_io = x_i, for one output of two.
    expected = np.abs(x).mean(0)[:, None] / 2 >= 0.4
    np.testing.assert_array_equal(pruned["w"], np.where(expected, params["w"], 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_prune_tree_keeps_structure_and_dtypes(dtype):
    params = {
        "f": jnp.tanh,
        "layers": (jnp.ones((2, 2), dtype), [jnp.zeros(3, dtype), None]),
        "steps": jnp.arange(3),
    }
    pruned = sj.prune_tree(params, None, 2.0, criterion=criteria.magnitude)
    assert pruned["f"] is jnp.tanh and pruned["layers"][1][1] is None
    assert pruned["layers"][0].dtype == dtype and not pruned["layers"][0].any()
    assert pruned["steps"].tolist() == [0, 1, 2]


def test_prune_tree_prunes_scalars_on_request():
    pruned = sj.prune_tree(
        [jnp.array(1.0), jnp.array(3.0)],
        None,
        2.0,
        criterion=criteria.magnitude,
        prunable=filters.floating,
    )
    assert [float(x) for x in pruned] == [0.0, 3.0]


def test_prune_tree_passes_empty_leaves():
    empty = {"w": jnp.zeros((0, 4))}
    assert sj.prune_tree(empty, empty, 1.0)["w"].shape == (0, 4)


def test_prune_tree_prunes_chosen_leaves_only():
    params = {"conv": jnp.ones((2, 2)), "head": jnp.ones((2, 2))}
    pruned = sj.prune_tree(params, params, 2.0, prunable=filters.by_path("conv"))
    assert not pruned["conv"].any() and pruned["head"].all()


def test_prune_tree_is_differentiable_through_kept_entries(params, grads):
    weight = jnp.array([[2.0, 3.0], [5.0, 7.0]])
    got = jax.grad(lambda p: jnp.sum(weight * sj.prune_tree(p, grads, 0.2)["w"]))(params)
    np.testing.assert_array_equal(got["w"], [[2.0, 0.0], [5.0, 0.0]])


def test_prune_tree_is_differentiable_where_the_scores_are_of_the_params(params):
    def loss(p):
        return sj.prune_tree(p, None, 0.7, criterion=criteria.magnitude)["w"].sum()

    np.testing.assert_array_equal(jax.grad(loss)(params)["w"], [[1.0, 1.0], [0.0, 0.0]])


def test_prune_tree_maps_over_networks():
    params, grads = jnp.asarray(normal((3, 4, 5))), jnp.asarray(normal((3, 4, 5), seed=1))
    thresholds = jnp.array([0.1, 0.5, 1.0])
    got = jax.vmap(sj.prune_tree)(params, grads, thresholds)
    expected = [sj.prune_tree(*row) for row in zip(params, grads, thresholds, strict=True)]
    np.testing.assert_array_equal(got, expected)


def test_prune_tree_has_abstract_values(params, grads):
    shapes = jax.eval_shape(sj.prune_tree, params, grads, 0.5)
    assert_same_trees(
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        jax.tree.map(jnp.zeros_like, params),
    )


# ---- sharded params


@pytest.fixture(params=[PartitionSpec("a"), PartitionSpec(None, "a")], ids=["rows", "columns"])
def sharded(request):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(normal((16, 24)), NamedSharding(mesh, request.param))


SHARDED = {
    "threshold": lambda w: masking.threshold(w, 0.1),
    "topk": lambda w: masking.topk(w, 0.7),
    "apply_masks": lambda w: masking.apply_masks(w, w > 0),
    "prune_masks": lambda w: sj.prune_masks(w, w, 0.5),
    "prune_tree": lambda w: sj.prune_tree(w, w, 0.5, criterion=criteria.taylor),
}


@pytest.mark.parametrize("f", SHARDED.values(), ids=SHARDED.keys())
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_masking_keeps_shardings_and_results(sharded, f, wrap):
    got = wrap(f)(sharded)
    np.testing.assert_array_equal(got, f(jnp.asarray(normal((16, 24)))))
    assert got.sharding.is_equivalent_to(sharded.sharding, 2)


def test_sparsity_counts_sharded_leaves(sharded):
    count = masking.sparsity(masking.apply_masks(sharded, masking.topk(sharded, 0.25)))
    assert count.prunable == (96, 384)


def test_apply_masks_takes_none_for_what_holds_no_numbers():
    params = {"w": jnp.ones((2, 2)), "activation": jax.nn.relu}
    masks = {"w": jnp.array([[True, False]]), "activation": None}
    applied = masking.apply_masks(params, masks)
    np.testing.assert_array_equal(applied["w"], [[1, 0], [1, 0]])
    assert applied["activation"] is jax.nn.relu


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(-0.5, 12), (np.nan, 12), (0.75, 3), (1.0, 0), (1.5, 0)]
)
def test_topk_with_a_traced_sparsity_out_of_range(sparsity, kept):
    scores = {"w": jnp.arange(12.0).reshape(3, 4)}
    masks = jax.jit(lambda s: masking.topk(scores, s))(sparsity)
    assert int(masks["w"].sum()) == kept
