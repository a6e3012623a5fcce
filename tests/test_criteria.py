from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quickly import as_shipped

from sparsejax import criteria, filters, masking


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_trees_close(got, expected, rtol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


# ---- magnitude, gradient, taylor


ORACLES = {
    "magnitude": (criteria.magnitude, lambda w, g: np.abs(w)),
    "gradient": (criteria.gradient, lambda w, g: np.abs(g)),
    "taylor": (criteria.taylor, lambda w, g: np.abs(w * g)),
}
each = pytest.mark.parametrize(("criterion", "oracle"), ORACLES.values(), ids=ORACLES.keys())
with_gradients = pytest.mark.parametrize("criterion", [criteria.gradient, criteria.taylor])


@each
def test_criterion_equals_numpy(criterion, oracle):
    w, g = normal((4, 5)), normal((4, 5), seed=1)
    np.testing.assert_array_equal(criterion({"w": w}, {"w": g})["w"], oracle(w, g))


@each
def test_criterion_of_complex_leaves_is_real(criterion, oracle):
    w = normal((2, 3)) + 1j * normal((2, 3), seed=1)
    g = normal((2, 3), seed=2) - 1j * normal((2, 3), seed=3)
    w, g = w.astype(np.complex64), g.astype(np.complex64)
    np.testing.assert_allclose(criterion([w], [g])[0], oracle(w, g), rtol=1e-6)


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_criterion_of_half_precision_is_float32(criterion, oracle, dtype):
    # The product, 1e-10, is below the least float16.
    w, g = (jnp.full((1, 2), 1e-5, dtype) for _ in range(2))
    (score,) = criterion([w], [g])
    assert score.dtype == jnp.float32
    np.testing.assert_array_equal(score, oracle(np.float32(w), np.float32(g)))


@each
def test_criterion_of_float64_is_float64(criterion, oracle):
    w, g = normal((2, 3), dtype=np.float64), normal((2, 3), seed=1, dtype=np.float64)
    with jax.enable_x64(True):
        (score,) = criterion([w], [g])
        np.testing.assert_array_equal(score, oracle(w, g))


@each
def test_criterion_under_jit_equals_eager(criterion, oracle):
    w, g = [normal((4, 5)), normal(3)], [normal((4, 5), seed=1), normal(3, seed=2)]
    assert_trees_close(as_shipped(criterion)(w, g), criterion(w, g), rtol=0)


@each
def test_criterion_of_empty_and_scalar_leaves(criterion, oracle):
    scores = criterion([np.zeros((0, 2), np.float32), -2.0], [np.zeros((0, 2), np.float32), 3.0])
    assert scores[0].shape == (0, 2) and float(scores[1]) == oracle(-2.0, 3.0)


@each
def test_criterion_does_not_score_what_is_no_floating_array(criterion, oracle):
    params = {"f": jnp.tanh, "key": jax.random.key(0), "n": jnp.arange(3), "none": None}
    scores = criterion(params, params)
    assert scores.pop("none") is None
    assert all(s.shape == () and s.dtype == bool for s in scores.values())


@with_gradients
def test_criterion_does_not_score_leaves_without_a_gradient(criterion):
    w = normal((2, 2))
    scores = criterion({"a": w, "b": w}, {"a": None, "b": w})
    assert scores["a"].dtype == bool and scores["b"].shape == (2, 2)


@with_gradients
def test_criterion_takes_the_gradient_of_an_integer_leaf(criterion):
    params = {"n": jnp.arange(3), "w": jnp.ones((2, 2))}
    grads = jax.grad(lambda p: p["w"].sum(), allow_int=True)(params)
    assert criterion(params, grads)["n"].dtype == bool


def test_magnitude_needs_no_gradients():
    np.testing.assert_array_equal(criteria.magnitude([jnp.array([-3.0])])[0], [3.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_magnitude_of_a_denormal_is_not_zero(dtype):
    tiny = jnp.asarray(jnp.finfo(dtype).smallest_subnormal, dtype).reshape(1, 1)
    scores = criteria.magnitude({"w": -tiny})
    assert masking.sparsity(scores).total.zeros == 0


def test_taylor_of_an_infinite_gradient_at_zero_is_nan():
    assert jnp.isnan(criteria.taylor([jnp.zeros(1)], [jnp.full(1, jnp.inf)])[0])


# ---- lamp


def lamp_by_definition(w):
    """Every entry's square over the sum of those that rank not below it, O(n²) in float64."""
    flat = np.abs(np.asarray(w, np.complex128)).ravel()
    index = np.arange(flat.size)
    not_below = (flat > flat[:, None]) | ((flat == flat[:, None]) & (index <= index[:, None]))
    sums = (flat**2 * not_below).sum(axis=1)
    return (flat**2 / np.where(sums > 0, sums, 1)).reshape(np.shape(w))


def best_first(magnitudes):
    """The order in which entries are kept: by magnitude, the lower flat index first."""
    return np.argsort(-np.asarray(magnitudes, np.float64).ravel(), kind="stable")


def assert_orders_as_magnitude(scores, w):
    """Never the other way round, and apart wherever the magnitudes are."""
    order = best_first(np.abs(w))
    ranked = np.asarray(scores, np.float64).ravel()[order]
    moves = np.diff(np.abs(np.asarray(w, np.float64)).ravel()[order]) != 0
    assert np.all(np.diff(ranked) <= 0)
    assert np.all(np.diff(ranked)[moves] < 0)


def tied(shape):
    return np.random.default_rng(0).integers(-3, 4, shape).astype(np.float32)


LEAVES = {
    "normal": normal((20, 30)),
    "ties and zeros": tied((20, 30)),
    "complex": (normal((20, 30)) + 1j * normal((20, 30), seed=1)).astype(np.complex64),
    "scalar": np.float32(-2),
    "zeros": np.zeros((2, 3), np.float32),
    "empty": np.zeros((0, 2), np.float32),
    "huge": np.float32(1.1e38) * tied((20, 30)),
    "tiny": np.float32(1.3e-38) * tied((20, 30)),
}


@pytest.mark.parametrize("w", LEAVES.values(), ids=LEAVES.keys())
def test_lamp_equals_its_definition(w):
    (score,) = criteria.lamp([w])
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score, lamp_by_definition(w), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(criteria.lamp)([w])[0], score, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lamp_of_half_precision_is_float32(dtype):
    # The squares, 1e-10, are below the least float16.
    w = 1e-5 * jnp.asarray(tied((20, 30)), dtype)
    (score,) = criteria.lamp([w])
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score, lamp_by_definition(np.float32(w)), rtol=1e-6)


def test_lamp_of_float64_is_float64():
    w = normal((5, 6), dtype=np.float64)
    with jax.enable_x64(True):
        (score,) = criteria.lamp([w])
        assert score.dtype == jnp.float64
        np.testing.assert_allclose(score, lamp_by_definition(w), rtol=1e-14)


@pytest.mark.parametrize("spread", [1e-6, 0.01, 1.0])
def test_lamp_orders_a_large_leaf_exactly_as_magnitude(spread):
    # Sums of a million squares, whose rounding differs between neighbours.
    w = np.exp(spread * normal(1_000_000)).astype(np.float32) * np.sign(normal(1_000_000, seed=1))
    assert_orders_as_magnitude(criteria.lamp(w), w)


@given(oracles.awkward_arrays((4, 6), np.float32, nan=False))
def test_lamp_never_inverts_the_order_of_awkward_values(w):
    scores = np.asarray(criteria.lamp(w), np.float64).ravel()
    assert np.all(np.diff(scores[best_first(np.abs(w))]) <= 0)
    assert np.all((scores >= 0) & (scores <= 1))


def test_lamp_gives_the_largest_entry_of_every_leaf_one():
    params = [normal((20, 30)), 100 * normal((20, 30), seed=1), tied((20, 30))]
    for w, score in zip(params, criteria.lamp(params), strict=True):
        assert score.max() == score.ravel()[best_first(np.abs(w))[0]] == 1


@given(st.sampled_from([2.0**-40, 3.0, 1e20]))
def test_lamp_does_not_depend_on_the_scale_of_a_leaf(scale):
    w = normal((20, 30))
    scaled = (scale * w).astype(np.float32)
    np.testing.assert_allclose(criteria.lamp(scaled), criteria.lamp(w), rtol=1e-6)


def test_lamp_chooses_the_sparsity_of_a_leaf_and_magnitude_its_entries():
    params = {"v": normal((20, 30)), "w": 0.01 * np.exp(normal((20, 30), seed=1))}
    masks = masking.topk(criteria.lamp(params), 0.8)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(kept.values()) == 240 and kept["v"] != kept["w"]
    for name, mask in masks.items():
        largest = best_first(np.abs(params[name]))[: kept[name]]
        np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(largest))


def test_lamp_of_nan_is_nan_there_alone():
    w = np.array([[1.0, np.nan, -2.0]], np.float32)
    np.testing.assert_allclose(criteria.lamp(w), [[0.2, np.nan, 1.0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"`scores` must not be NaN: 1 of 3 entries are, at 'w'"):
        masking.topk(criteria.lamp({"w": w}), 0.5)


def test_lamp_of_infinite_entries_keeps_them():
    w = np.array([np.inf, 3.0, -np.inf, 0.0], np.float32)
    np.testing.assert_array_equal(criteria.lamp(w), [1.0, 0.0, 0.5, 0.0])


def test_lamp_under_vmap_is_that_of_every_slice():
    w = normal((2, 20, 30))
    np.testing.assert_allclose(
        jax.vmap(criteria.lamp)(w), np.stack([criteria.lamp(x) for x in w]), rtol=1e-6
    )


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("spec", [jax.P("a"), jax.P(None, "b"), jax.P("a", "b")], ids=str)
def test_lamp_of_a_sharded_leaf_is_that_of_the_whole(axis_type, spec):
    w = tied((20, 30))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    sharded = jax.device_put(w, jax.NamedSharding(mesh, spec))
    for criterion in (criteria.lamp, jax.jit(criteria.lamp)):
        np.testing.assert_allclose(criterion(sharded), criteria.lamp(w), rtol=1e-6)


def test_lamp_does_not_score_what_is_no_floating_array():
    params = {"f": jnp.tanh, "key": jax.random.key(0), "n": jnp.arange(3), "none": None}
    scores = criteria.lamp(params)
    assert scores.pop("none") is None
    assert all(s.shape == () and s.dtype == bool for s in scores.values())


# ---- random


KEYS = {"typed": jax.random.key(0), "old style": jax.random.PRNGKey(0)}
each_key = pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())


@each_key
def test_random_is_reproducible(key):
    params = {"w": jnp.zeros((4, 5))}
    assert_trees_close(criteria.random(key)(params), criteria.random(key)(params), rtol=0)


def test_random_differs_by_key():
    first, second = (criteria.random(jax.random.key(i))(jnp.zeros(50)) for i in range(2))
    assert not jnp.any(first == second)


@each_key
def test_random_differs_by_leaf(key):
    first, second = criteria.random(key)([jnp.zeros(50), jnp.zeros(50)])
    assert not jnp.any(first == second)


def test_random_is_uniform():
    scores = np.sort(criteria.random(jax.random.key(3))(jnp.zeros((100, 100))).ravel())
    assert scores[0] >= 0 and scores[-1] < 1
    np.testing.assert_allclose(scores, np.arange(10_000) / 10_000, atol=0.02)


def test_random_under_jit_equals_eager():
    params = [jnp.zeros((3, 4)), jnp.zeros(2)]
    jitted = as_shipped(lambda key, p: criteria.random(key)(p))
    expected = criteria.random(jax.random.key(5))(params)
    assert_trees_close(jitted(jax.random.key(5), params), expected, rtol=0)


def test_random_of_half_precision_is_float32():
    assert criteria.random(jax.random.key(0))(jnp.zeros(3, jnp.bfloat16)).dtype == jnp.float32


def test_random_does_not_score_what_is_no_floating_array():
    scores = criteria.random(jax.random.key(0))({"f": jnp.tanh, "n": jnp.arange(3)})
    assert scores["f"].dtype == scores["n"].dtype == bool


# ---- output_gradient


def mlp(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]


def mlp_params(dtype=np.float32):
    shapes = {"b1": (5,), "w1": (4, 5), "w2": (5, 3)}
    return {
        name: jnp.asarray(normal(s, seed=i), dtype) for i, (name, s) in enumerate(shapes.items())
    }


def convnet(params, x):
    """Two maps of outputs for an image: shape (examples, 3, 3, 2)."""
    dims = ("NHWC", "HWIO", "NHWC")
    conv = partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=dims
    )
    return conv(jax.nn.relu(conv(x, params["first"])), params["second"])


def convnet_params():
    return {"first": jnp.asarray(normal((3, 3, 1, 4))), "second": jnp.asarray(normal((2, 2, 4, 2)))}


NETS = {
    "mlp": (mlp, mlp_params, normal((6, 4), seed=9)),
    "convnet": (convnet, convnet_params, normal((3, 6, 6, 1), seed=9)),
}
each_net = pytest.mark.parametrize(("apply", "make", "x"), NETS.values(), ids=NETS.keys())


def by_jacobian(apply, params, x):
    """The mean absolute derivative from the whole Jacobian, examples and outputs first."""
    out = jax.eval_shape(apply, params, x)
    jacobian = jax.jacrev(apply)(params, x)
    return jax.tree.map(lambda j: jnp.mean(jnp.abs(j), axis=range(out.ndim)), jacobian)


@each_net
def test_output_gradient_equals_the_mean_of_the_absolute_jacobian(apply, make, x):
    got = criteria.output_gradient(apply, make(), x)
    assert_trees_close(got, by_jacobian(apply, make(), x))


@each_net
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 1_000])
def test_output_gradient_does_not_depend_on_the_chunk(apply, make, x, chunk_size):
    got = criteria.output_gradient(apply, make(), x, chunk_size=chunk_size)
    assert_trees_close(got, criteria.output_gradient(apply, make(), x))


def test_output_gradient_under_jit_equals_eager():
    params, x = mlp_params(), jnp.asarray(normal((6, 4)))
    jitted = as_shipped(partial(criteria.output_gradient, mlp))
    assert_trees_close(jitted(params, x), criteria.output_gradient(mlp, params, x))


def test_output_gradient_of_opposite_signs_does_not_cancel():
    params, x = {"w": jnp.ones((1, 1))}, jnp.array([[2.0], [-2.0]])

    def apply(p, x):
        return x @ p["w"]

    assert jax.grad(lambda p: apply(p, x).mean())(params)["w"].item() == 0.0
    assert criteria.output_gradient(apply, params, x)["w"].item() == 2.0


def test_output_gradient_of_outputs_of_opposite_signs_does_not_cancel():
    params = {"w": jnp.ones((1, 1))}

    def apply(p, x):
        return jnp.concatenate([x @ p["w"], -(x @ p["w"])], axis=1)

    assert criteria.output_gradient(apply, params, jnp.array([[3.0]]))["w"].item() == 3.0


def test_output_gradient_takes_one_output_without_an_axis():
    params, x = {"w": jnp.ones(3)}, jnp.array([[1.0, -2.0, 0.0], [3.0, 2.0, 0.0]])
    got = criteria.output_gradient(lambda p, x: x @ p["w"], params, x)["w"]
    np.testing.assert_allclose(got, [2.0, 2.0, 0.0])


def test_output_gradient_takes_a_tree_of_inputs():
    inputs = {"left": jnp.array([[1.0], [3.0]]), "right": (jnp.array([[5], [7]]),)}

    def apply(p, x):
        return p["a"] * x["left"] + p["b"] * x["right"][0]

    got = criteria.output_gradient(apply, {"a": jnp.float32(0), "b": jnp.float32(0)}, inputs)
    assert (float(got["a"]), float(got["b"])) == (2.0, 6.0)


def test_output_gradient_does_not_score_what_is_not_floating():
    params = {"act": jnp.tanh, "none": None, "power": jnp.array(2), "w": jnp.ones((1, 1))}

    def apply(p, x):
        return p["act"](x @ p["w"]) ** p["power"]

    scores = criteria.output_gradient(apply, params, jnp.ones((2, 1)))
    assert scores["act"].dtype == scores["power"].dtype == bool
    assert scores["none"] is None and scores["w"].shape == (1, 1)


def test_output_gradient_does_not_need_a_leaf_to_be_used():
    params = {"unused": jnp.ones((2, 2)), "w": jnp.ones((1, 1))}
    scores = criteria.output_gradient(lambda p, x: x @ p["w"], params, jnp.ones((2, 1)))
    assert not scores["unused"].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_output_gradient_of_half_precision_is_float32(dtype):
    params = mlp_params() | {"w1": mlp_params()["w1"].astype(dtype)}
    x = jnp.asarray(normal((6, 4)))
    got = criteria.output_gradient(mlp, params, x)
    assert got["w1"].dtype == jnp.float32
    wide = params | {"w1": params["w1"].astype(jnp.float32)}
    assert_trees_close(got, by_jacobian(mlp, wide, x), rtol=0.01)


def test_output_gradient_accumulates_half_precision_without_rounding():
    # 2,000 derivatives of 1 would stop at 256 in bfloat16.
    params = {"w": jnp.ones((1, 1), jnp.bfloat16)}
    x = jnp.ones((2_000, 1), jnp.bfloat16)
    assert criteria.output_gradient(lambda p, x: x @ p["w"], params, x)["w"].item() == 1.0


def test_output_gradient_works_in_float64():
    with jax.enable_x64(True):
        params, x = mlp_params(np.float64), normal((6, 4), dtype=np.float64)
        got = criteria.output_gradient(mlp, params, x)
        assert got["w1"].dtype == jnp.float64
        assert_trees_close(got, by_jacobian(mlp, params, x), rtol=1e-12)


def test_output_gradient_has_abstract_values():
    scores = jax.eval_shape(partial(criteria.output_gradient, mlp), mlp_params(), normal((6, 4)))
    assert {name: s.shape for name, s in scores.items()} == {
        name: w.shape for name, w in mlp_params().items()
    }


def test_output_gradient_is_zero_for_an_empty_leaf():
    params = {"empty": jnp.zeros((0, 2)), "w": jnp.ones((1, 1))}
    scores = criteria.output_gradient(lambda p, x: x @ p["w"], params, jnp.ones((2, 1)))
    assert scores["empty"].shape == (0, 2)


def test_output_gradient_follows_a_changed_function_leaf():
    x = jnp.ones((2, 1))

    def apply(p, x):
        return p["act"](x @ p["w"])

    doubled, tripled = (
        criteria.output_gradient(apply, {"act": act, "w": jnp.ones((1, 1))}, x)["w"].item()
        for act in (lambda y: 2 * y, lambda y: 3 * y)
    )
    assert (doubled, tripled) == (2.0, 3.0)


def test_output_gradient_follows_a_changed_integer_leaf():
    def apply(p, x):
        return p["n"] * (x @ p["w"])

    scores = [
        criteria.output_gradient(apply, {"n": n, "w": jnp.ones((1, 1))}, jnp.ones((2, 1)))["w"]
        for n in (jnp.array(2), jnp.array(3))
    ]
    assert [s.item() for s in scores] == [2.0, 3.0]


def test_output_gradient_follows_what_its_function_closes_over():
    # Batch statistics, say, which training has moved since the last call.
    state = {"scale": jnp.float32(2)}

    def apply(p, x):
        return state["scale"] * (x @ p["w"])

    params, x = {"w": jnp.ones((1, 1))}, jnp.ones((2, 1))
    first = criteria.output_gradient(apply, params, x)["w"].item()
    state["scale"] = jnp.float32(3)
    assert (first, criteria.output_gradient(apply, params, x)["w"].item()) == (2.0, 3.0)


def test_output_gradient_takes_a_callable_that_cannot_be_hashed():
    class Scaled:
        __hash__ = None

        def __call__(self, p, x):
            return 2 * (x @ p["w"])

    got = criteria.output_gradient(Scaled(), {"w": jnp.ones((1, 1))}, jnp.ones((2, 1)))
    assert got["w"].item() == 2.0


def test_output_gradient_maps_over_what_its_function_closes_over():
    params, x = {"w": jnp.ones((1, 1))}, jnp.ones((2, 1))

    def importance(scale):
        return criteria.output_gradient(lambda p, x: scale * (x @ p["w"]), params, x)["w"]

    np.testing.assert_array_equal(jax.vmap(importance)(jnp.arange(3.0)).ravel(), [0.0, 1.0, 2.0])


def test_output_gradient_of_constants_is_a_loop_under_jit():
    params = mlp_params()

    def equations(examples):
        x = jnp.ones((examples, 4))
        jaxpr = jax.make_jaxpr(lambda: criteria.output_gradient(mlp, params, x))()
        return len(jaxpr.eqns)

    assert equations(20) == equations(10)


WIDE = {"w1": jnp.ones((64, 64)), "w2": jnp.ones((64, 20))}


def working_memory(examples, chunk_size):
    def importance(params, x):
        return criteria.output_gradient(
            lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], params, x, chunk_size=chunk_size
        )

    lowered = jax.jit(importance).lower(WIDE, jnp.ones((examples, 64)))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_output_gradient_needs_no_more_memory_for_more_examples():
    inputs = (1_024 - 256) * 64 * 4
    assert working_memory(1_024, 4) - working_memory(256, 4) <= inputs


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_output_gradient_needs_a_copy_of_the_params_for_each_example_of_a_chunk(chunk_size):
    copy, activations = sum(w.nbytes for w in WIDE.values()), 4 * (64 + 64 + 20)
    assert working_memory(16, chunk_size) <= (chunk_size + 1) * (copy + 4 * activations)


def test_output_gradient_of_flax_params_scores_every_leaf():
    # The batched and the single example must agree on shapes inside a framework, too.
    nnx = pytest.importorskip("flax.nnx")
    graph, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal((5, 4)))
    scores = criteria.output_gradient(lambda p, x: nnx.merge(graph, p)(x), params, x)
    np.testing.assert_allclose(
        scores["kernel"][...], np.abs(x).mean(0)[:, None].repeat(3, 1) / 3, rtol=1e-6
    )


def test_output_gradient_can_be_pruned_by():
    params, x = mlp_params(), jnp.asarray(normal((6, 4)))
    scores = criteria.output_gradient(mlp, params, x)
    masks = masking.topk(scores, 0.5, prunable=filters.floating)
    assert masking.sparsity(params, masks, prunable=filters.floating).prunable.zeros == 20
