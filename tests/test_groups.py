"""Group penalties against NumPy, SciPy and brute force: units, labels, metrics, half-spaces."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

import sparsejax as sj
from sparsejax import granularities, penalties
from sparsejax._typing import SlopedPenalty

pytestmark = pytest.mark.usefixtures("quickly")

numbers = st.floats(-8, 8, width=32, allow_subnormal=False)
vectors = st.lists(numbers, min_size=4, max_size=4).map(lambda x: np.array(x, np.float32))
strengths = st.floats(0, 3, width=32, allow_subnormal=False)
LABELS = np.array([0, 1, 1, 0])
UNIT = np.arange(3)
PARAMS = {
    "in": {"w": jnp.arange(-5.0, 7.0).reshape(4, 3), "b": jnp.array([1.0, -2.0, 0.5])},
    "out": {"w": jnp.arange(6.0).reshape(3, 2)},
    "step": jnp.arange(3),
}
COUPLED = {"in": {"w": UNIT[None, :], "b": UNIT}, "out": {"w": UNIT[:, None]}, "step": -1}


def of_four(l1, group, labels=LABELS):
    return penalties.sparse_group_lasso(l1, group, labels, weight=lambda size: 1.0)


prox_of_four = jax.jit(lambda w, s, l1, group: of_four(l1, group).prox(w, s))
slope_of_four = jax.jit(lambda g, w, l1, group: of_four(l1, group).subgradient(g, w))


def objective(u, x, s, l1, group):
    norms = np.sqrt(np.bincount(LABELS, np.square(u)))
    quadratic = np.sum(np.square(u - x) / (2 * s))
    return l1 * np.abs(u).sum() + group * norms.sum() + quadratic


def least(x, s, l1, group):
    """The best of SciPy's answers: from everywhere, and with groups at zero."""
    best = objective(np.zeros(4), x, s, l1, group)
    for kept in ([0], [1], [0, 1]):
        free = np.isin(LABELS, kept)

        def masked(v, free=free):
            return objective(np.where(free, v, 0), x, s, l1, group)

        found = minimize(masked, x, method="Powell", options={"xtol": 1e-9, "ftol": 1e-12})
        best = min(best, found.fun)
    return best


@given(vectors, strengths, strengths, st.floats(0.0625, 3, width=32))
def test_prox_minimizes_its_definition(x, l1, group, step_size):
    ours = np.asarray(prox_of_four(x, step_size, l1, group), np.float64)
    best = least(x.astype(np.float64), step_size, l1, group)
    assert objective(ours, x, step_size, l1, group) <= best + 1e-5 * (1 + abs(best))


@given(
    vectors,
    strengths,
    strengths,
    st.lists(st.floats(0.0625, 3, width=32), min_size=4, max_size=4),
)
def test_prox_in_a_metric_minimizes_its_definition(x, l1, group, sizes):
    sizes = np.array(sizes, np.float32)
    ours = np.asarray(prox_of_four(x, sizes, l1, group), np.float64)
    best = least(x.astype(np.float64), sizes, l1, group)
    assert objective(ours, x, sizes, l1, group) <= best + 1e-5 * (1 + abs(best))


@given(vectors, strengths, strengths, st.integers(0, 8), st.integers(0, 2**31 - 1))
def test_prox_in_a_metric_is_stationary_where_step_sizes_differ_by_1e8(x, l1, group, span, seed):
    """Adam's are like that: (x - u) / s is in λ₁∂|u| + λ₂ u / ‖u‖."""
    sizes = 10.0 ** -np.random.default_rng(seed).uniform(0, span, 4).astype(np.float32)
    u = np.asarray(prox_of_four(x, sizes, l1, group), np.float64)
    pull = (x - u) / sizes
    for g in (0, 1):
        inside = g == LABELS
        norm = np.linalg.norm(u[inside])
        scale = np.abs(x[inside] / sizes[inside]).max() + 1
        short = np.sign(pull) * np.maximum(np.abs(pull) - l1, 0)
        if norm == 0:
            assert np.linalg.norm(short[inside]) <= group + 1e-5 * scale
        else:
            expected = group * u / norm + l1 * np.sign(u)
            error = np.where(u != 0, pull - expected, short)[inside]
            # A rounding of u is one of u / s in the pull.
            rounding = 4e-7 * np.abs(x[inside]) / sizes[inside]
            assert np.all(np.abs(error) <= rounding + 1e-4 * (1 + group + l1))


@given(vectors, vectors, strengths, strengths)
def test_prox_is_firmly_non_expansive(x, y, l1, group):
    p, q = (np.asarray(prox_of_four(v, 0.5, l1, group), np.float64) for v in (x, y))
    assert np.sum((p - q) ** 2) <= np.sum((p - q) * (x.astype(np.float64) - y)) + 1e-4


@given(vectors, vectors, strengths, strengths, st.integers(0, 3))
def test_subgradient_has_the_least_norm(g, w, l1, group, zeroed):
    w = np.where((LABELS == 0) & bool(zeroed & 1) | (LABELS == 1) & bool(zeroed & 2), 0, w)
    w[2] = 0  # an entry at zero in a group that need not be
    ours = np.asarray(slope_of_four(g, w.astype(np.float32), l1, group), np.float64)
    for label in (0, 1):
        inside = label == LABELS
        norm = np.linalg.norm(w[inside])
        signs = np.sign(w[inside])
        base = g[inside] + l1 * signs + (group * w[inside] / norm if norm else 0)
        free = signs == 0
        rest = np.where(free, np.sign(base) * np.maximum(np.abs(base) - l1, 0), base)
        if norm == 0:
            rest = rest * max(1 - group / max(np.linalg.norm(rest), 1e-30), 0)
        np.testing.assert_allclose(ours[inside], rest, atol=2e-5)


def test_group_lasso_by_channel_is_that_of_labels():
    by_unit = penalties.group_lasso(0.5, granularities.Channel(-1))
    labels = {
        "in": {"w": UNIT[None, :], "b": -1},
        "out": {"w": 3 + np.arange(2)[None, :]},
        "step": -1,
    }
    by_label = penalties.group_lasso(0.5, labels)
    chex.assert_trees_all_close(by_unit.value(PARAMS), by_label.value(PARAMS), rtol=1e-6)
    grads = jax.tree.map(lambda x: 0.3 * x + 1, PARAMS)
    chex.assert_trees_all_close(by_unit.prox(PARAMS, 0.5), by_label.prox(PARAMS, 0.5), rtol=1e-6)
    chex.assert_trees_all_close(
        by_unit.subgradient(grads, PARAMS), by_label.subgradient(grads, PARAMS), rtol=1e-5
    )


@pytest.mark.parametrize("kind", [np.int32, np.int8])
def test_entries_of_no_group_pass_beside_those_of_one(kind):
    w, grads = {"w": jnp.array([[1.0, 2.0, 3.0]] * 3)}, {"w": jnp.full((3, 3), 0.5)}
    penalty = penalties.group_lasso(0.1, {"w": np.array([[0, -1, 1]], kind)})
    for size in (1.0, jax.tree.map(jnp.ones_like, w)):
        shrunk = np.asarray(penalty.prox(w, size)["w"])
        np.testing.assert_array_equal(shrunk[:, 1], 2.0)
        np.testing.assert_allclose(shrunk[:, 0], 1 - 0.1, rtol=1e-6)
    slope = np.asarray(penalty.subgradient(grads, w)["w"])
    np.testing.assert_array_equal(slope[:, 1], 0.5)
    stopped = penalty.stop_at_zero({"w": jnp.full((3, 3), -2.0)}, grads, w)["w"]
    np.testing.assert_array_equal(w["w"] + stopped, [[0.0, 0.0, 1.0]] * 3)
    assert float(penalty.value(w)) == pytest.approx(0.1 * math.sqrt(3) * math.sqrt(3) * 4)


def test_unsigned_labels_are_groups():
    penalty = penalties.group_lasso(1.0, {"w": np.array([[0, 1, 1]], np.uint8)})
    assert float(penalty.value({"w": jnp.ones((1, 3))})) == pytest.approx(1 + 2)


def test_prox_in_a_metric_takes_groups_whose_squares_vanish():
    for size in (1e-20, 1e-30):
        w = {"w": jnp.full((4, 1), size)}
        shrunk = penalties.group_lasso(0.02).prox(w, {"w": jnp.full((4, 1), 10.0)})
        np.testing.assert_array_equal(shrunk["w"], 0)


def test_group_that_dies_under_adam_stays_at_zero():
    """Adam's momentum decays to 1e-20 and below."""
    tx = sj.proximal(optax.adam(0.01), penalties.group_lasso(0.1), 0.01, metric=sj.metrics.adam())

    def step(carry, g):
        w, state = carry
        updates, state = tx.update({"w": jnp.full((4, 1), g)}, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = {"w": jnp.ones((4, 1))}
    grads = jnp.where(jnp.arange(800) < 5, 1.0, 0.0)
    (w, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, grads))((w, tx.init(w)))
    np.testing.assert_array_equal(w["w"], 0)


def test_group_lasso_by_blocks_with_ragged_ends():
    w = np.arange(1.0, 16.0, dtype=np.float32).reshape(3, 5)
    penalty = penalties.group_lasso(1.0, granularities.Block((2, 2)))
    blocks = [w[i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2, 4)]
    expected = sum(math.sqrt(b.size) * np.linalg.norm(b) for b in blocks)
    np.testing.assert_allclose(penalty.value({"w": w}), expected, rtol=1e-6)
    shrunk = penalty.prox({"w": w}, 2.0)["w"]
    last = np.asarray(shrunk)[2:, 4:]
    np.testing.assert_allclose(last, w[2:, 4:] * (1 - 2.0 / np.linalg.norm(w[2:, 4:])), rtol=1e-6)


def test_group_lasso_couples_leaves():
    penalty = penalties.group_lasso(0.25, COUPLED)
    flat = [
        np.concatenate(
            [PARAMS["in"]["w"][:, i], PARAMS["in"]["b"][i : i + 1], PARAMS["out"]["w"][i]]
        )
        for i in range(3)
    ]
    expected = sum(0.25 * math.sqrt(7) * np.linalg.norm(x) for x in flat)
    np.testing.assert_allclose(penalty.value(PARAMS), expected, rtol=1e-6)
    shrunk = penalty.prox(PARAMS, 2.0)
    for i, x in enumerate(flat):
        factor = max(1 - 0.5 * math.sqrt(7) / np.linalg.norm(x), 0)
        np.testing.assert_allclose(shrunk["in"]["b"][i], factor * PARAMS["in"]["b"][i], rtol=1e-6)
        np.testing.assert_allclose(shrunk["out"]["w"][i], factor * x[5:], rtol=1e-6)
    assert shrunk["step"] is PARAMS["step"]


def test_group_lasso_removes_a_whole_unit():
    """A hidden unit with all that goes in and out, by training."""
    params = jax.tree.map(lambda x: x / 10 if x.dtype == jnp.float32 else x, PARAMS)
    params.pop("step")
    groups = {k: v for k, v in COUPLED.items() if k != "step"}
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.tanh(x[:, :2])

    def loss(p):
        hidden = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"][None])
        return jnp.mean(jnp.square(hidden @ p["out"]["w"] - y))

    tx = sj.penalized(
        optax.adam(optax.cosine_decay_schedule(0.02, 2000)), penalties.group_lasso(0.02, groups)
    )

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    (p, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 2000))((params, tx.init(params)))
    dead = np.asarray(p["in"]["b"]) == 0
    assert 0 < dead.sum() < 3
    np.testing.assert_array_equal(np.all(p["in"]["w"] == 0, axis=0), dead)
    np.testing.assert_array_equal(np.all(p["out"]["w"] == 0, axis=1), dead)


def test_stop_at_zero_is_the_half_space_rule():
    w = {"w": jnp.array([[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]])}
    slope = {"w": jnp.array([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0]])}
    penalty = penalties.group_lasso(1.0)
    inside = {"w": jnp.array([[-4.0, 1.0, 0.5], [-1.0, -0.5, 0.5]])}
    stopped = penalty.stop_at_zero(inside, slope, w)["w"]
    # Of the first (3 - 4, 4 - 1) · (3, 4) > 0; the second goes with its slope; the third has none.
    np.testing.assert_array_equal(w["w"] + stopped, [[-1.0, 1.0, 0.0], [3.0, -0.5, 0.0]])
    outside = {"w": jnp.full((2, 3), -5.0)}
    assert not np.any(w["w"] + penalty.stop_at_zero(outside, slope, w)["w"])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_neither_overflow_nor_vanish(scale):
    w = {"w": jnp.full((4, 2), scale, jnp.float32)}
    value = penalties.group_lasso(1.0, weight=lambda size: 1.0).value(w)
    assert float(value) == pytest.approx(4 * scale, rel=1e-5)


def test_value_has_a_gradient_at_zero():
    gradient = jax.grad(penalties.group_lasso(1.0).value)({"w": jnp.zeros((3, 2))})["w"]
    assert not np.any(gradient)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precisions_keep_their_dtype(dtype):
    w, penalty = {"w": jnp.ones((4, 2), dtype)}, penalties.sparse_group_lasso(0.1, 0.1)
    grads = {"w": jnp.full((4, 2), 0.5, dtype)}
    assert penalty.value(w).dtype == jnp.float32
    for tree in (penalty.prox(w, 0.5), penalty.prox(w, w), penalty.subgradient(grads, w)):
        assert tree["w"].dtype == dtype


def test_nan_stays_visible_in_its_group_alone():
    w = {"w": jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])}
    penalty = penalties.group_lasso(0.1)
    for size in (0.5, jax.tree.map(jnp.ones_like, w)):
        shrunk = np.asarray(penalty.prox(w, size)["w"])
        assert np.isnan(shrunk[:, 0]).any() and np.isfinite(shrunk[:, 1]).all()
    step = penalty.stop_at_zero({"w": jnp.full((2, 2), jnp.nan)}, w, {"w": jnp.ones((2, 2))})
    assert np.isnan(step["w"]).all()


def test_empty_leaves_and_step_sizes_of_zero_pass():
    params = {"w": jnp.ones((3, 2)), "none": jnp.zeros((0, 2)), "nil": None}
    penalty = penalties.group_lasso(1.0)
    assert penalty.prox(params, 1.0)["none"].shape == (0, 2)
    still = penalty.prox(params, {"w": jnp.zeros((3, 2)), "none": jnp.zeros((0, 2)), "nil": None})
    np.testing.assert_array_equal(still["w"], params["w"])


def test_eager_jit_and_vmap_agree():
    penalty = penalties.sparse_group_lasso(0.2, 0.3, COUPLED)
    eager = penalty.prox(PARAMS, 0.5)
    chex.assert_trees_all_close(jax.jit(penalty.prox)(PARAMS, 0.5), eager, rtol=1e-6)
    grid = jnp.array([0.3, 0.6])
    batched = jax.vmap(lambda s: penalties.sparse_group_lasso(0.2, s, COUPLED).prox(PARAMS, 0.5))(
        grid
    )
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], batched), eager, rtol=1e-6)


def test_sharded_groups_are_those_of_one_device():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.random.normal(jax.random.key(0), (16, 8))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d", None))
    penalty = penalties.group_lasso(0.5)
    shrunk = jax.jit(penalty.prox)({"w": jax.device_put(w, place)}, 0.5)["w"]
    np.testing.assert_allclose(shrunk, penalty.prox({"w": w}, 0.5)["w"], rtol=1e-6)


def test_at_reads_schedules():
    penalty = penalties.group_lasso(optax.linear_schedule(0.0, 1.0, 4))
    assert float(penalty.at(2).group_strength) == 0.5


def test_group_lasso_is_a_penalty_with_a_slope():
    assert isinstance(penalties.group_lasso(1.0), SlopedPenalty)


W = {"w": jnp.ones((2, 3))}
ERRORS = {
    "negative": (
        lambda: penalties.group_lasso(-1.0),
        ValueError,
        r"`strength` must be >= 0, got -1",
    ),
    "no groups": (
        lambda: penalties.group_lasso(1.0, None),
        TypeError,
        r"`groups` must be granularities\.Channel or Block, or a tree of integer arrays .*got None",
    ),
    "float groups": (
        lambda: penalties.group_lasso(1.0, {"w": np.ones((1, 3))}),
        TypeError,
        r"`groups` must be integers, got float64\[1,3\]",
    ),
    "groups below -1": (
        lambda: penalties.group_lasso(1.0, {"w": np.array([[-2, 0, 1]])}),
        ValueError,
        r"`groups` must be >= -1 \(-1 is no group\), got -2",
    ),
    "groups of another shape": (
        lambda: penalties.group_lasso(1.0, {"w": np.arange(3)}).value(W),
        ValueError,
        r"`groups` must broadcast against their parameters: at 'w' the array is int64\[3\]",
    ),
    "groups of another tree": (
        lambda: penalties.group_lasso(1.0, {"v": np.arange(3)}).value(W),
        ValueError,
        r"`groups` must have the structure of `params`: `params` has a leaf at 'w'",
    ),
    "weight below zero": (
        lambda: penalties.group_lasso(1.0, weight=lambda n: -n).value(W),
        ValueError,
        r"`weight\(2\)` must be >= 0, got -2",
    ),
    "unread schedule": (
        lambda: penalties.group_lasso(lambda step: 1.0).value(W),
        TypeError,
        r"`group_strength` is a schedule, .*: use penalty\.at\(step\) first",
    ),
    "a block that does not fit": (
        lambda: penalties.group_lasso(1.0, granularities.Block((1, 2, 2))).value(W),
        ValueError,
        r"`shape` of a block must have at most as many axes .*'w'",
    ),
    "gradients of another shape": (
        lambda: penalties.group_lasso(1.0).subgradient({"w": jnp.ones((2, 2))}, W),
        ValueError,
        r"`grads` must have the shapes of `params`: at 'w' it is float32\[2,2\]",
    ),
    "an integer leaf": (
        lambda: penalties.group_lasso(1.0, {"w": 0}).value({"w": jnp.ones((2, 3), int)}),
        TypeError,
        r"`groups` must be -1 where the params are no real numbers, got a group of int32\[2,3\] at",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
