"""Criteria that go through data, and SynFlow, against torch, `jax.hessian` and finite differences.

`tests/golden/pruning_at_init.npz` holds what `scripts/make_pruning_at_init_golden.py` makes of a
small network with the authors' definitions, in torch and in float64.
"""

import functools
import itertools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import criteria, filters, masking

pytestmark = pytest.mark.usefixtures("quickly")

GOLDEN = Path(__file__).parent / "golden" / "pruning_at_init.npz"
LAYERS = ("conv1", "conv2", "dense1", "dense2")
RNG = np.random.default_rng(0)


# ---- the authors' definitions


@functools.cache
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def golden_params():
    leaves = {n: {k: golden()[f"params/{n}/{k}"] for k in ("kernel", "bias")} for n in LAYERS}
    return jax.tree.map(jnp.asarray, leaves)


def golden_batch(start=0, stop=12):
    return {"x": golden()["images"][start:stop], "y": golden()["labels"][start:stop]}


@jax.jit
def apply(params, x):
    def conv(x, layer):
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "VALID", dimension_numbers=axes
        )
        return jax.nn.relu(y + layer["bias"].reshape(1, 1, 1, -1))

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"][None]

    x = nnx.max_pool(conv(x, params["conv1"]), (2, 2), (2, 2))
    x = conv(x, params["conv2"])
    x = jax.nn.relu(dense(x.reshape(len(x), -1), params["dense1"]))
    return dense(x, params["dense2"])


@jax.jit
def cross_entropy(params, batch, temperature=1.0):
    logits = apply(params, batch["x"]) / temperature
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def cooled(params, batch):
    return cross_entropy(params, batch, 200.0)


def kernels(scores):
    return {name: scores[name]["kernel"] for name in LAYERS}


def relative(scores):
    """Scores divided by the absolute value of their sum, as GraSP's code does."""
    total = sum(np.sum(np.asarray(s, np.float64)) for s in jax.tree.leaves(scores))
    return jax.tree.map(lambda s: np.asarray(s, np.float64) / abs(total), scores)


def whole_gradient():
    return criteria.mean_gradients(
        jax.jit(jax.grad(cross_entropy)), golden_params(), [golden_batch()]
    )


def without_biases(params):
    return {n: leaf | {"bias": jnp.zeros_like(leaf["bias"])} for n, leaf in params.items()}


HALVES = [(0, 6), (6, 12)]
THIRDS = [(0, 4), (4, 8), (8, 12)]


def batches(slices):
    return [golden_batch(*pair) for pair in slices]


OURS = {
    "snip": lambda p: criteria.snip({n: p[n]["kernel"] for n in LAYERS}, kernels(whole_gradient())),
    "grasp": lambda p: relative(kernels(criteria.grasp(cooled, p, batches(HALVES)))),
    "synflow": lambda p: kernels(criteria.synflow(apply, p, golden()["images"][:1])),
    "synflow_unbiased": lambda p: kernels(
        criteria.synflow(apply, without_biases(p), golden()["images"][:1])
    ),
    "fisher": lambda p: kernels(criteria.fisher(cross_entropy, p, [golden_batch()])),
    "taylor_squared": lambda p: kernels(
        criteria.mean_taylor(cross_entropy, p, batches(THIRDS), power=2)
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_scores_and_masks_are_those_of_the_authors(name):
    ours = OURS[name](golden_params())
    theirs = {layer: golden()[f"{name}/{layer}"] for layer in LAYERS}
    # Theirs is the flow itself, ours the share of it: one factor for all layers.
    factor = raveled(theirs).sum() / raveled(ours).sum() if "synflow" in name else 1
    for layer in LAYERS:
        got = np.asarray(ours[layer], np.float64) * factor
        scale = np.abs(theirs[layer]).max()
        np.testing.assert_allclose(got, theirs[layer], rtol=2e-4, atol=2e-5 * scale)
    kept = np.zeros(636, bool)
    kept[np.argsort(-raveled(theirs), kind="stable")[: 636 - round(0.9 * 636)]] = True
    np.testing.assert_array_equal(raveled(masking.topk(ours, 0.9)), kept)


# ---- second derivatives


@jax.jit
def small_loss(params, batch):
    """Smooth, with a full Hessian, of 3·4 + 4 + 4·2 = 24 parameters."""
    hidden = jnp.tanh(batch["x"] @ params["a"] + params["b"][None])
    return jnp.mean((hidden @ params["c"] - batch["y"]) ** 2)


def small_params(dtype=np.float32):
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 4), "b": (4,), "c": (4, 2)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def small_batches(count=3, size=4, dtype=np.float32):
    rng = np.random.default_rng(2)
    return [
        {k: rng.normal(size=(size, n)).astype(dtype) for k, n in (("x", 3), ("y", 2))}
        for _ in range(count)
    ]


@functools.cache
def hessian(count=3):
    """Of the mean loss over `small_batches(count)` at `small_params()`, by `jax.hessian`."""
    flat, unravel = jax.flatten_util.ravel_pytree(small_params())
    batches = small_batches(count)
    whole = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    return np.asarray(jax.jit(jax.hessian(lambda w: small_loss(unravel(w), whole)))(flat))


def raveled(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def gradient_of_mean(params):
    return criteria.mean_gradients(jax.grad(small_loss), params, small_batches())


def test_hessian_vector_product_equals_jax_hessian():
    params, vector = small_params(), jax.tree.map(jnp.sin, small_params())
    (batch,) = small_batches(1)
    got = criteria.hessian_vector_product(small_loss, params, vector, batch)
    assert got.keys() == params.keys()
    expected = hessian(1) @ raveled(vector)
    np.testing.assert_allclose(raveled(got), expected, rtol=1e-4, atol=1e-5)


def test_hessian_vector_product_equals_finite_differences_of_gradients():
    with jax.enable_x64(True):
        params = small_params(np.float64)
        (batch,) = small_batches(1, dtype=np.float64)
        vector = jax.tree.map(jnp.sin, params)
        got = criteria.hessian_vector_product(small_loss, params, vector, batch)
        step = 1e-5

        def gradient(sign):
            moved = jax.tree.map(lambda w, v: w + sign * step * v, params, vector)
            return jax.grad(small_loss)(moved, batch)

        expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), gradient(1), gradient(-1))
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(got))
        np.testing.assert_allclose(raveled(got), raveled(expected), rtol=1e-7, atol=1e-8)


def test_hessian_vector_product_takes_a_vector_with_holes():
    params, (batch,) = small_params(), small_batches(1)
    vector = {"a": None, "b": jnp.ones(4), "c": None}
    zeros = {"a": jnp.zeros((3, 4)), "b": jnp.ones(4), "c": jnp.zeros((4, 2))}
    got = criteria.hessian_vector_product(small_loss, params, vector, batch)
    expected = criteria.hessian_vector_product(small_loss, params, zeros, batch)
    np.testing.assert_array_equal(raveled(got), raveled(expected))


def test_hessian_vector_product_of_a_loss_without_batch():
    w = jnp.array([1.0, 2.0])
    got = criteria.hessian_vector_product(lambda w: jnp.sum(w**3), w, jnp.ones(2))
    assert got.tolist() == [6.0, 12.0]


def test_grasp_is_theta_times_hessian_times_gradient():
    params = small_params()
    got = criteria.grasp(small_loss, params, small_batches(), prunable=filters.floating)
    expected = raveled(params) * (hessian() @ raveled(gradient_of_mean(params)))
    np.testing.assert_allclose(raveled(got), expected, rtol=1e-4, atol=1e-5)


def test_grasp_is_the_derivative_of_the_norm_of_the_gradient():
    with jax.enable_x64(True):
        params = small_params(np.float64)
        data = small_batches(dtype=np.float64)
        got = criteria.grasp(small_loss, params, data, prunable=filters.floating)

        def norm(factor):
            scaled = params | {"a": params["a"].at[1, 2].multiply(factor)}
            return sum(
                np.sum(np.square(g))
                for g in jax.tree.leaves(
                    criteria.mean_gradients(jax.grad(small_loss), scaled, data)
                )
            )

        slope = (norm(1 + 1e-5) - norm(1 - 1e-5)) / 2e-5
        np.testing.assert_allclose(2 * got["a"][1, 2], slope, rtol=1e-6)


def test_grasp_holds_fixed_what_is_not_prunable():
    params = small_params()
    got = criteria.grasp(small_loss, params, small_batches())
    assert got["b"].dtype == bool and got["b"].shape == ()
    weights = {k: params[k] for k in ("a", "c")}
    alone = criteria.grasp(
        lambda p, batch: small_loss(p | {"b": params["b"]}, batch), weights, small_batches()
    )
    for name in weights:
        np.testing.assert_allclose(got[name], alone[name], rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_hessian_diagonal_equals_jax_hessian(chunk_size):
    params = small_params()
    got = criteria.hessian_diagonal(small_loss, params, small_batches(), chunk_size=chunk_size)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
    expected = np.diag(hessian())
    np.testing.assert_allclose(raveled(got), expected, rtol=1e-4, atol=1e-5)


def test_hutchinson_is_within_its_own_standard_error():
    params, data, samples = small_params(), small_batches(1), 400
    matrix = hessian(1)
    got = criteria.hutchinson(small_loss, params, data, key=jax.random.key(0), samples=samples)
    off_diagonal = np.square(matrix).sum(axis=1) - np.square(np.diag(matrix))
    error = (raveled(got) - np.diag(matrix)) / np.sqrt(off_diagonal / samples)
    assert np.abs(error).max() < 4
    # Neither too good: these are standard deviations.
    assert 0.5 < np.sqrt(np.mean(error**2)) < 1.7


def test_hutchinson_of_several_batches_has_other_signs_for_each():
    data = small_batches(1) * 2

    def estimate(data):
        return raveled(
            criteria.hutchinson(small_loss, small_params(), data, key=jax.random.key(3), samples=1)
        )

    assert np.abs(estimate(data) - estimate(data[:1])).max() > 1e-3


def test_obd_is_the_second_order_increase_of_the_loss():
    # A quadratic with a diagonal Hessian: exactly what is lost.
    params = {"w": jnp.array([[1.0, -2.0, 0.5]])}

    def loss(p, batch):
        return jnp.sum(batch * (p["w"] - params["w"]) ** 2)

    batch = jnp.array([[1.0, 0.25, 4.0]])
    got = criteria.obd(params, criteria.hessian_diagonal(loss, params, [batch]))["w"]
    for i in range(3):
        pruned = {"w": params["w"].at[0, i].set(0)}
        np.testing.assert_allclose(got[0, i], loss(pruned, batch), rtol=1e-6)


# ---- examples and batches


def by_definition(params, data, of_gradient):
    """The mean of a function of the gradient of every example, one by one."""
    every = [
        jax.grad(small_loss)(params, {k: v[i : i + 1] for k, v in batch.items()})
        for batch in data
        for i in range(len(batch["x"]))
    ]
    rows = [raveled(jax.tree.map(of_gradient, params, g)) for g in every]
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_fisher_equals_a_loop_over_examples(chunk_size):
    params, data = small_params(), small_batches(1, 7) + small_batches(1, 3)
    got = criteria.fisher(small_loss, params, data, chunk_size=chunk_size)
    expected = by_definition(params, data, lambda w, g: w**2 * g**2 / 2)
    np.testing.assert_allclose(raveled(got), expected, rtol=1e-5)


def test_fisher_is_near_obd_at_the_minimum_of_a_likelihood():
    # Labels drawn from the model itself: the Fisher information is the Hessian.
    w = {"w": jnp.array([[0.8, -0.5]])}
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 2)).astype(np.float32)
    chance = 1 / (1 + np.exp(-(x @ np.asarray(w["w"])[0])))
    batch = {"x": x, "y": (rng.uniform(size=4000) < chance).astype(np.float32)}

    def loss(p, batch):
        logits = batch["x"] @ p["w"][0]
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["y"]))

    fisher = criteria.fisher(loss, w, [batch], chunk_size=4000)["w"]
    obd = criteria.obd(w, criteria.hessian_diagonal(loss, w, [batch]))["w"]
    np.testing.assert_allclose(fisher, obd, rtol=0.1)


@pytest.mark.parametrize("power", [1, 2, 0.5])
def test_mean_taylor_of_single_examples_equals_a_loop_over_them(power):
    params, data = small_params(), small_batches(2, 3)
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in data for i in range(3)]
    got = criteria.mean_taylor(small_loss, params, singles, power=power)
    expected = by_definition(params, data, lambda w, g: jnp.abs(w * g) ** power)
    np.testing.assert_allclose(raveled(got), expected, rtol=1e-5)


def test_mean_taylor_does_not_cancel_where_taylor_of_the_mean_does():
    params = {"w": jnp.array([[2.0]])}

    def loss(p, x):
        return jnp.sum(p["w"] * x)

    data = [jnp.ones((1, 1)), -jnp.ones((1, 1))]
    mean = criteria.mean_gradients(jax.grad(loss), params, data)
    assert float(criteria.taylor(params, mean)["w"][0, 0]) == 0
    assert float(criteria.mean_taylor(loss, params, data)["w"][0, 0]) == 2


# ---- snip


def test_snip_adds_up_to_one_and_orders_as_taylor():
    params, grads = small_params(), gradient_of_mean(small_params())
    scores = criteria.snip(params, grads)
    np.testing.assert_allclose(raveled(scores).sum(), 1, rtol=1e-6)
    taylor = raveled(criteria.taylor(params, grads))
    np.testing.assert_allclose(raveled(scores), taylor / taylor.sum(), rtol=1e-6)


def test_snip_does_not_depend_on_the_scale_of_the_loss():
    params, grads = small_params(), gradient_of_mean(small_params())
    scaled = jax.tree.map(lambda g: 1024 * g, grads)
    np.testing.assert_array_equal(
        raveled(criteria.snip(params, scaled)), raveled(criteria.snip(params, grads))
    )


def test_snip_of_zero_gradients_is_zero():
    w = {"w": jnp.ones((2, 2)), "n": jnp.arange(3)}
    scores = criteria.snip(w, {"w": jnp.zeros((2, 2)), "n": None})
    assert np.all(scores["w"] == 0) and scores["n"].dtype == bool


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_snip_is_exact_where_products_are_out_of_range(scale):
    params, grads = [scale * jnp.array([3.0, -4.0])], [scale * jnp.array([2.0, 0.5])]
    np.testing.assert_allclose(criteria.snip(params, grads)[0], [0.75, 0.25], rtol=1e-6)


def test_snip_shows_nan():
    scores = criteria.snip([jnp.ones(2)], [jnp.array([jnp.nan, 1.0])])
    assert np.isnan(scores[0]).any()


# ---- synflow


@jax.jit
def chain(params, x):
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


def shares_by_definition(params):
    """The share of each entry, in float64: (flow up to it) · |θ| · (flow from it on) / R."""
    weights = [np.abs(np.asarray(w, np.float64)) for w in params]
    ahead = [np.ones(weights[0].shape[0])]
    for w in weights:
        ahead.append(ahead[-1] @ w)
    behind = [np.ones(weights[-1].shape[1])]
    for w in reversed(weights):
        behind.insert(0, w @ behind[0])
    flow = ahead[-1].sum()
    return [
        a[:, None] * w * b[None] / flow
        for a, w, b in zip(ahead[:-1], weights, behind[1:], strict=True)
    ]


def layers(*widths, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(widths)
    return [jnp.asarray(scale * rng.normal(size=pair), jnp.float32) for pair in pairs]


def assert_shares(params, rtol=1e-4):
    scores = criteria.synflow(chain, params, jnp.zeros((1, params[0].shape[0])))
    for got, expected in zip(scores, shares_by_definition(params), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-30)


def test_synflow_counts_paths():
    assert_shares(layers(3, 5, 4, 2))


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_synflow_of_a_deep_network_is_exact_where_float32_overflows(scale):
    params = layers(*[16] * 14, scale=scale)
    flow = jnp.sum(chain([jnp.abs(w) for w in params], jnp.ones((1, 16))))
    assert float(flow) in (0.0, np.inf)
    assert_shares(params, rtol=1e-3)


def test_synflow_is_conserved_by_layers_and_units():
    scores = criteria.synflow(chain, layers(3, 5, 4, 2), jnp.zeros((1, 3)))
    np.testing.assert_allclose([float(s.sum()) for s in scores], 1, rtol=1e-5)
    for before, after in itertools.pairwise(scores):
        np.testing.assert_allclose(before.sum(axis=0), after.sum(axis=1), rtol=1e-5)


def test_synflow_does_not_look_at_signs_inputs_or_their_number():
    params = layers(3, 5, 4, 2)
    scores = criteria.synflow(chain, params, jnp.zeros((1, 3)))
    for other in (
        criteria.synflow(chain, [-w for w in params], jnp.full((1, 3), jnp.nan)),
        criteria.synflow(chain, params, jax.ShapeDtypeStruct((1, 3), np.float32)),
        criteria.synflow(chain, params, jnp.zeros((7, 3))),
    ):
        np.testing.assert_allclose(raveled(other), raveled(scores), rtol=1e-6)


def test_synflow_of_masked_weights_is_zero_and_their_dead_ends_are_too():
    params = layers(3, 5, 4, 2)
    params[0] = params[0].at[:, 1].set(0)
    scores = criteria.synflow(chain, params, jnp.zeros((1, 3)))
    assert np.all(scores[0][:, 1] == 0) and np.all(scores[1][1] == 0)
    assert np.all(scores[0][:, 0] > 0)


def test_synflow_keeps_tokens():
    def embed(params, inputs):
        return params["table"][inputs["tokens"]].sum(axis=1) @ params["out"]

    params = {"table": jnp.ones((4, 2)), "out": jnp.ones((2, 1))}
    scores = criteria.synflow(embed, params, {"tokens": jnp.array([[0, 2, 2]])})
    np.testing.assert_allclose(scores["table"][:, 0], np.array([1, 0, 2, 0]) / 6, rtol=1e-6)


def test_synflow_under_jit_has_no_second_look():
    params = layers(3, 5, 4, 2, scale=1e20)
    scores = jax.jit(lambda p: criteria.synflow(chain, p, jnp.zeros((1, 3))))(params)
    assert not any(np.any((s > 0) & np.isfinite(s)) for s in scores)


def test_synflow_of_layers_in_float32_does_without_float64():
    def small_flow(params, x):
        return jax.lax.mul(params["w"], np.full((1, 2), 1e-20, np.float32))

    scores = criteria.synflow(small_flow, {"w": jnp.array([[1.0, -3.0]])}, jnp.ones(1))
    np.testing.assert_allclose(scores["w"], [[0.25, 0.75]], rtol=1e-6)


# ---- the contract of them all

CALLS = {
    "snip": lambda loss, params: criteria.snip(params, gradient_like(params)),
    "obd": lambda loss, params: criteria.obd(params, gradient_like(params)),
    "grasp": lambda loss, params: criteria.grasp(loss, params, small_batches(1)),
    "mean_taylor": lambda loss, params: criteria.mean_taylor(loss, params, small_batches(1)),
    "fisher": lambda loss, params: criteria.fisher(loss, params, small_batches(1)),
    "hessian_diagonal": lambda loss, params: criteria.hessian_diagonal(
        loss, params, small_batches(1)
    ),
    "hutchinson": lambda loss, params: criteria.hutchinson(
        loss, params, small_batches(1), key=jax.random.key(0), samples=2
    ),
    "hessian_vector_product": lambda loss, params: criteria.hessian_vector_product(
        loss, params, gradient_like(params), small_batches(1)[0]
    ),
    "synflow": lambda loss, params: criteria.synflow(
        lambda p, x: loss(p, {"x": x, "y": 0 * x[:, :2]}), params, jnp.ones((1, 3))
    ),
}
each = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
some = pytest.mark.parametrize("name", ["snip", "fisher", "hessian_vector_product", "synflow"])


def gradient_like(params):
    return jax.tree.map(jnp.sin, eqx.filter(params, eqx.is_inexact_array))


@functools.cache
def on_a_dict(call):
    return call(small_loss, small_params())


@each
def test_eager_equals_jitted(call):
    eager = on_a_dict(call)
    jitted = jax.jit(lambda p: call(small_loss, p))(small_params())
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class Net(eqx.Module):
    a: jax.Array
    b: jax.Array
    c: jax.Array
    activation: object


def as_nnx(params):
    return nnx.State({k: nnx.Param(v) for k, v in params.items()})


FRAMEWORKS = {
    "nnx": (as_nnx, nnx.as_pure),
    "equinox": (
        lambda p: Net(**p, activation=jnp.tanh),
        lambda tree: {k: getattr(tree, k) for k in "abc"},
    ),
    "integers and None": (
        lambda p: p | {"steps": jnp.arange(2), "none": None},
        lambda tree: {k: tree[k] for k in "abc"},
    ),
}


@some
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_trees_of_frameworks_equal_a_dict(name, framework):
    call = CALLS[name]
    wrap, unwrap = FRAMEWORKS[framework]
    tree = wrap(small_params())
    got = call(lambda p, batch: small_loss(unwrap(p), batch), tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    expected = on_a_dict(call)
    for key, leaf in unwrap(got).items():
        np.testing.assert_allclose(leaf, expected[key], rtol=1e-5, atol=1e-6)
    rest = len(jax.tree.leaves(got)) - 3
    unscored = [s for s in jax.tree.leaves(got) if np.shape(s) == () and s.dtype == bool]
    assert len(unscored) - sum(expected[k].dtype == bool for k in "abc") == rest


@some
def test_bfloat16_gives_float32(name):
    got = CALLS[name](small_loss, small_params(jnp.bfloat16))
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(got))
    expected = on_a_dict(CALLS[name])
    for key, leaf in got.items():
        np.testing.assert_allclose(leaf, expected[key], atol=0.1 * np.abs(expected[key]).max())


@pytest.mark.parametrize("name", ["snip", "grasp", "fisher", "hessian_diagonal", "synflow"])
def test_empty_leaves_have_empty_scores(name):
    got = CALLS[name](small_loss, small_params() | {"empty": jnp.zeros((0, 2))})
    assert got["empty"].shape == (0, 2) and got["empty"].dtype == jnp.float32
    np.testing.assert_allclose(got["a"], on_a_dict(CALLS[name])["a"], rtol=1e-5)


@pytest.mark.parametrize("name", ["obd", "grasp", "fisher", "mean_taylor"])
def test_nan_is_shown(name):
    params = small_params()
    params["a"] = params["a"].at[0, 0].set(jnp.nan)
    assert np.isnan(CALLS[name](small_loss, params)["a"][0, 0])


# ---- errors

W = np.ones((3, 2), np.float32)
PARAMS = {"net": {"w": W}}
X = np.ones((4, 3), np.float32)


def linear(params, x):
    return x @ params["net"]["w"]


def mean(params, x):
    return jnp.mean(linear(params, x))


LOSS_CRITERIA = {
    "grasp": criteria.grasp,
    "mean_taylor": criteria.mean_taylor,
    "fisher": criteria.fisher,
    "hessian_diagonal": criteria.hessian_diagonal,
    "hutchinson": functools.partial(criteria.hutchinson, key=jax.random.key(0)),
}
each_of_loss = pytest.mark.parametrize("criterion", LOSS_CRITERIA.values(), ids=LOSS_CRITERIA)


@each_of_loss
@pytest.mark.usefixtures("as_users_have_it")
def test_criteria_of_a_loss_refuse(criterion):
    rows = [
        ((PARAMS, mean, [X]), TypeError, r"`loss` must be a function \(params, batch\) -> number"),
        ((mean, PARAMS, 3), TypeError, r"`batches` must be a list or .*, got 3"),
        ((mean, PARAMS, {"x": X}), TypeError, r"`batches` must be .*for one batch \[batch\]"),
        ((mean, PARAMS, []), ValueError, r"`batches` must hold at least one batch, got none"),
        ((linear, PARAMS, [X]), TypeError, r"`loss` must return one real .*, got float32\[.,2\]"),
        ((lambda p, x: (mean(p, x), x), PARAMS, [X]), TypeError, r"one real .*, got tuple"),
        ((mean, {"n": np.arange(3)}, [X]), ValueError, r"must (hold|select) at least one"),
    ]
    for args, error, pattern in rows:
        with pytest.raises(error, match=f"(?s){pattern}"):
            criterion(*args)


@each_of_loss
def test_criteria_of_a_loss_say_that_one_batch_is_no_iterable_of_them(criterion):
    def of_pair(params, batch):
        x, y = batch
        return jnp.mean((linear(params, x) - y) ** 2)

    with pytest.raises(ValueError, match="unpack") as caught:
        criterion(of_pair, PARAMS, (X, X[:, :2]))
    notes = "".join(caught.value.__notes__)
    assert "of which float32[4,3] is the first; for one batch pass [batch]" in notes
    assert np.isfinite(criterion(of_pair, PARAMS, [(X, X[:, :2])])["net"]["w"]).all()


ERRORS = {
    "a generator for two passes": (
        lambda: criteria.grasp(mean, PARAMS, (x for x in [X])),
        TypeError,
        r"`batches` must be something that can be gone through twice.* pass list\(batches\)",
    ),
    "batches of other lengths": (
        lambda: criteria.fisher(lambda p, b: mean(p, b["x"]), PARAMS, [{"x": X, "y": X[:1]}]),
        ValueError,
        r"`batches` must share their leading axis of examples, got \{'x': 4, 'y': 1\}",
    ),
    "examples without an axis": (
        lambda: criteria.fisher(mean, PARAMS, [np.float32(1)]),
        ValueError,
        r"`batches` must be arrays with a leading axis of examples, got float32\[\]",
    ),
    "no examples": (
        lambda: criteria.fisher(mean, PARAMS, [X[:0]]),
        ValueError,
        r"`batches` must hold at least one example, got 0",
    ),
    "chunks of 0": (
        lambda: criteria.fisher(mean, PARAMS, [X], chunk_size=0),
        ValueError,
        r"`chunk_size` must be at least 1, got 0",
    ),
    "power 0": (
        lambda: criteria.mean_taylor(mean, PARAMS, [X], power=0),
        ValueError,
        r"`power` must be > 0, got 0",
    ),
    "a seed": (
        lambda: criteria.hutchinson(mean, PARAMS, [X], key=0),
        TypeError,
        r"`key` must be a PRNG key",
    ),
    "no samples": (
        lambda: criteria.hutchinson(mean, PARAMS, [X], key=jax.random.key(0), samples=0),
        ValueError,
        r"`samples` must be an integer from 1",
    ),
    "a vector of another structure": (
        lambda: criteria.hessian_vector_product(mean, PARAMS, {"net": {"v": W}}, X),
        ValueError,
        r"`vector` must have the structure of `params`.*'net\.w'",
    ),
    "a vector of another shape": (
        lambda: criteria.hessian_vector_product(mean, PARAMS, {"net": {"w": W[:1]}}, X),
        ValueError,
        r"`vector` must have the shapes of `params`: at 'net\.w' it is float32\[1,2\]",
    ),
    "a product of no loss": (
        lambda: criteria.hessian_vector_product(PARAMS, mean, PARAMS, X),
        TypeError,
        r"`loss` must be a function \(params, \*batch\) -> number",
    ),
    "a diagonal of another shape": (
        lambda: criteria.obd(PARAMS, {"net": {"w": W[:1]}}),
        ValueError,
        r"`diagonal` must have the shapes of `params`: at 'net\.w' it is float32\[1,2\]",
    ),
    "snip of another structure": (
        lambda: criteria.snip(PARAMS, {"net": {"v": W}}),
        ValueError,
        r"`grads` must have the structure of `params`",
    ),
    "synflow with swapped arguments": (
        lambda: criteria.synflow(PARAMS, linear, X),
        TypeError,
        r"`apply_fn` must be a function \(params, inputs\) -> outputs",
    ),
    "synflow of two outputs": (
        lambda: criteria.synflow(lambda p, x: (x, x), PARAMS, X),
        TypeError,
        r"`apply_fn` must return one array of real floating numbers, got tuple",
    ),
    "synflow through a layer of zeros": (
        lambda: criteria.synflow(linear, {"net": {"w": 0 * W}}, X),
        ValueError,
        r"`params` must let something through: .* is 0; look for a layer that is all zeros",
    ),
    "synflow of log-probabilities": (
        lambda: criteria.synflow(lambda p, x: jax.nn.log_softmax(linear(p, x)), PARAMS, X),
        ValueError,
        r"`apply_fn` must return outputs that grow with \|params\|.* got outputs whose sum .* -",
    ),
    "synflow of NaN": (
        lambda: criteria.synflow(linear, {"net": {"w": np.nan * W}}, X),
        ValueError,
        r"The flow must be finite: .* look for NaN in `params`",
    ),
    "synflow of a network that cannot be float64": (
        lambda: criteria.synflow(
            lambda p, x: jax.lax.mul(p["net"]["w"], np.full((3, 2), np.inf, np.float32)), PARAMS, X
        ),
        ValueError,
        r"`apply_fn` must work in float64, too, where the flow is out of the range of float32",
    ),
    "no floating leaf": (
        lambda: criteria.synflow(linear, {"n": np.arange(3)}, X),
        ValueError,
        r"`params` must hold at least one array of real floating numbers",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "pattern"), ERRORS.values(), ids=ERRORS)
def test_refuses(call, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}"):
        call()
