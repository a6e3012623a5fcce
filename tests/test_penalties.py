"""Values, proximal operators and subgradients against brute force, SciPy and one another."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

import sparsejax as sj
from sparsejax import filters, penalties

WEIGHTS = {"w": jnp.array([[3.0, -0.5, 0.0], [0.25, -2.0, 1.0]]), "b": jnp.array([5.0, -5.0])}
strengths = st.floats(0, 3, width=32, allow_subnormal=False)
numbers = st.floats(-10, 10, width=32, allow_subnormal=False)


def prox_of(penalty, x, step_size):
    return float(penalty.prox({"w": jnp.full((1, 1), x, jnp.float32)}, step_size)["w"][0, 0])


@given(numbers, strengths, strengths, st.floats(0.0625, 3, width=32))
def test_prox_minimizes_its_definition(x, l1, l2, step_size):
    penalty = penalties.elastic_net(l1, l2)

    def objective(u):
        return l1 * abs(u) + 0.5 * l2 * u * u + (u - x) ** 2 / (2 * step_size)

    best = minimize_scalar(objective, bounds=(-11, 11), method="bounded", options={"xatol": 1e-9})
    ours = prox_of(penalty, x, step_size)
    assert objective(ours) <= min(best.fun, objective(0.0)) + 1e-5 * (1 + abs(best.fun))


@given(numbers, numbers, strengths, strengths)
def test_prox_is_firmly_non_expansive(x, y, l1, l2):
    penalty = penalties.elastic_net(l1, l2)
    p, q = prox_of(penalty, x, 0.5), prox_of(penalty, y, 0.5)
    assert (p - q) ** 2 <= (p - q) * (x - y) + 1e-5


@given(numbers, strengths, st.floats(0.0625, 3, width=32))
def test_prox_of_l1_is_exactly_zero_up_to_the_threshold(x, strength, step_size):
    ours = prox_of(penalties.l1(strength), x, step_size)
    inside = abs(np.float32(x)) <= np.float32(strength) * np.float32(step_size)
    assert (ours == 0) == inside


def test_prox_of_l2_makes_no_zeros():
    shrunk = penalties.l2(10.0).prox(WEIGHTS, 1.0)["w"]
    np.testing.assert_array_equal(np.asarray(shrunk) == 0, np.asarray(WEIGHTS["w"]) == 0)


def test_elastic_net_is_l1_and_l2_at_its_ends():
    for step_size in (0.1, 1.0):
        for ours, end in (
            (penalties.elastic_net(0.5, 0.0), penalties.l1(0.5)),
            (penalties.elastic_net(0.0, 0.5), penalties.l2(0.5)),
        ):
            chex.assert_trees_all_equal(ours.prox(WEIGHTS, step_size), end.prox(WEIGHTS, step_size))
            assert ours.value(WEIGHTS) == end.value(WEIGHTS)


def test_value_counts_prunable_leaves_only():
    w = np.asarray(WEIGHTS["w"], np.float64)
    assert float(penalties.l1(0.5).value(WEIGHTS)) == 0.5 * np.abs(w).sum()
    assert float(penalties.l2(0.5).value(WEIGHTS)) == 0.25 * np.square(w).sum()


def test_value_with_floating_filter_counts_biases():
    value = penalties.l1(1.0, prunable=filters.floating).value(WEIGHTS)
    assert float(value) == 6.75 + 10.0


def test_value_of_l1_does_not_overflow_through_squares():
    assert float(penalties.l1(1e-20).value({"w": jnp.full((1, 1), 1e20)})) == pytest.approx(1.0)


def test_value_accumulates_half_precision_in_float32():
    ones = {"w": jnp.ones((1, 4096), jnp.bfloat16)}
    value = penalties.l1(1.0).value(ones)
    assert value.dtype == jnp.float32 and float(value) == 4096


@pytest.mark.parametrize("penalty", [penalties.l1(0.3), penalties.elastic_net(0.3, 0.7)])
def test_subgradient_is_the_gradient_of_the_value_away_from_zero(penalty):
    params = {"w": jnp.array([[3.0, -0.5]])}
    zero = jax.tree.map(jnp.zeros_like, params)
    chex.assert_trees_all_close(
        penalty.subgradient(zero, params), jax.grad(penalty.value)(params), rtol=1e-6
    )


@given(numbers, strengths, strengths)
def test_subgradient_at_zero_has_the_least_norm(g, l1, l2):
    zero, grads = {"w": jnp.zeros((1, 1))}, {"w": jnp.full((1, 1), g, jnp.float32)}
    ours = float(penalties.elastic_net(l1, l2).subgradient(grads, zero)["w"][0, 0])
    candidates = g + l1 * np.linspace(-1, 1, 201)
    assert abs(ours) <= np.abs(candidates).min() + 1e-6
    assert abs(ours - g) <= l1 + 1e-6


def test_subgradient_leaves_other_leaves_alone():
    grads = jax.tree.map(jnp.ones_like, WEIGHTS)
    assert penalties.l1(1.0).subgradient(grads, WEIGHTS)["b"] is grads["b"]


def test_stop_at_zero_stops_steps_that_cross():
    params = {"w": jnp.array([[1.0, 1.0, -1.0, 0.0, 0.0]])}
    updates = {"w": jnp.array([[-2.0, -0.5, 3.0, 0.5, 0.5]])}
    subgradient = {"w": jnp.array([[1.0, 1.0, -1.0, -1.0, 1.0]])}
    stopped = penalties.l1(0.1).stop_at_zero(updates, subgradient, params)
    np.testing.assert_array_equal(params["w"] + stopped["w"], np.array([[0.0, 0.5, 0.0, 0.5, 0.0]]))


def test_stop_at_zero_shows_a_nan_step():
    params, nan = {"w": jnp.ones((1, 1))}, {"w": jnp.full((1, 1), jnp.nan)}
    assert jnp.isnan(penalties.l1(0.1).stop_at_zero(nan, nan, params)["w"]).all()


def test_stop_at_zero_of_l2_lets_every_step_pass():
    params, updates = {"w": jnp.ones((1, 1))}, {"w": jnp.full((1, 1), -2.0)}
    stopped = penalties.l2(0.1).stop_at_zero(updates, updates, params)
    chex.assert_trees_all_equal(stopped, updates)


def test_prox_shows_nan():
    assert jnp.isnan(penalties.l1(1.0).prox({"w": jnp.full((1, 1), jnp.nan)}, 1.0)["w"]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_prox_keeps_the_dtype(dtype):
    assert penalties.l1(1.0).prox({"w": jnp.ones((2, 2), dtype)}, 0.5)["w"].dtype == dtype


def test_prox_eager_jit_and_vmap_agree():
    penalty = penalties.elastic_net(0.3, 0.2)
    eager = penalty.prox(WEIGHTS, 0.5)
    chex.assert_trees_all_close(jax.jit(penalty.prox)(WEIGHTS, 0.5), eager, rtol=1e-6)
    steps = jnp.array([0.5, 1.0])
    batched = jax.vmap(penalty.prox, (None, 0))(WEIGHTS, steps)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], batched), eager, rtol=1e-6)


def test_strength_may_be_traced():
    def shrink(strength):
        return penalties.l1(strength).prox(WEIGHTS, 1.0)["w"]

    path = jax.vmap(shrink)(jnp.array([0.1, 1.0]))
    np.testing.assert_array_equal(path[1], penalties.l1(1.0).prox(WEIGHTS, 1.0)["w"])


def test_at_reads_schedules():
    penalty = penalties.elastic_net(lambda step: 0.1 * step, 0.5)
    now = penalty.at(3)
    assert (now.l1_strength, now.l2_strength) == (pytest.approx(0.3), 0.5)


def test_empty_and_integer_leaves_pass():
    params = {"w": jnp.ones((2, 2)), "none": jnp.zeros((0, 3)), "steps": jnp.arange(3), "nil": None}
    shrunk = penalties.l1(0.5).prox(params, 1.0)
    assert shrunk["none"].shape == (0, 3) and shrunk["steps"] is params["steps"]


def test_penalty_is_a_penalty():
    assert isinstance(penalties.l1(1.0), sj.transforms.Penalty)
