"""Values, proximal operators and subgradients against brute force, SciPy and one another."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize, minimize_scalar
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import Lasso

import sparsejax as sj
from sparsejax import filters, penalties
from sparsejax._typing import Penalty, SlopedPenalty

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


# ---- All penalties


def l1_ball(leaves):
    return optax.projections.projection_l1_ball(leaves, 2.0)


ENTRYWISE = {
    "l1": penalties.l1,
    "l2": penalties.l2,
    "elastic_net": lambda strength: penalties.elastic_net(strength, 0.5),
    "l0": penalties.l0,
    "mcp": penalties.mcp,
    "scad": penalties.scad,
}
STRONG = ENTRYWISE | {"nuclear": penalties.nuclear}
ALL = {name: make(0.5) for name, make in STRONG.items()} | {
    "constraint": penalties.constraint(l1_ball),
    "combine": penalties.combine(
        penalties.l1(0.5, prunable=filters.by_path("w")),
        penalties.mcp(0.5, prunable=filters.by_path("b")),
    ),
}
SLOPED = {"l1", "l2", "elastic_net", "mcp", "scad", "combine"}
every = pytest.mark.parametrize("penalty", ALL.values(), ids=ALL)
entrywise = pytest.mark.parametrize("make", ENTRYWISE.values(), ids=ENTRYWISE)
strong = pytest.mark.parametrize("make", STRONG.values(), ids=STRONG)
folded = pytest.mark.parametrize("make", [penalties.mcp, penalties.scad], ids=["mcp", "scad"])


@every
def test_every_penalty_is_a_penalty(penalty):
    assert isinstance(penalty, Penalty)


@pytest.mark.parametrize("name", ALL)
def test_a_penalty_has_a_slope_exactly_where_it_exists(name):
    assert isinstance(ALL[name], SlopedPenalty) == (name in SLOPED)


@every
def test_at_keeps_what_has_no_schedule(penalty):
    assert penalty.at(3) == penalty


@strong
def test_at_reads_the_strength(make):
    assert make(lambda step: 0.25 * step).at(2) == make(0.5)


@every
def test_prox_jitted_is_eager(penalty):
    jitted = jax.jit(penalty.prox)(WEIGHTS, 0.5)
    chex.assert_trees_all_close(jitted, penalty.prox(WEIGHTS, 0.5), rtol=1e-6, atol=1e-6)


@strong
def test_prox_under_vmap_over_strengths_is_one_by_one(make):
    found = jax.vmap(lambda strength: make(strength).prox(WEIGHTS, 0.5)["w"])(jnp.array([0.1, 1.0]))
    one_by_one = [make(s).prox(WEIGHTS, 0.5)["w"] for s in (0.1, 1.0)]
    np.testing.assert_allclose(found, np.stack(one_by_one), atol=2e-6)


@strong
def test_value_under_vmap_over_strengths_is_one_by_one(make):
    found = jax.vmap(lambda strength: make(strength).value(WEIGHTS))(jnp.array([0.1, 1.0]))
    np.testing.assert_allclose(found, [make(s).value(WEIGHTS) for s in (0.1, 1.0)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every
def test_prox_in_half_precision_is_that_of_float32_rounded(penalty, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), WEIGHTS)
    found, wide = penalty.prox(params, 0.5)["w"], penalty.prox(WEIGHTS, 0.5)["w"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wide.astype(dtype))


@every
def test_value_of_half_precision_is_float32(penalty):
    value = penalty.value(jax.tree.map(lambda x: x.astype(jnp.bfloat16), WEIGHTS))
    assert value.dtype == jnp.float32 and value.shape == ()


@pytest.mark.parametrize("step_size", [0.5, 8.0])
@every
def test_every_prox_shows_nan(penalty, step_size):
    params = {"w": jnp.full((2, 2), jnp.nan), "b": jnp.ones(2)}
    assert jnp.isnan(penalty.prox(params, step_size)["w"]).all()


@every
def test_every_value_shows_nan(penalty):
    value = penalty.value({"w": jnp.full((2, 2), jnp.nan), "b": jnp.ones(2)})
    assert not jnp.isfinite(value)


@every
def test_every_penalty_takes_empty_leaves(penalty):
    params = {"w": jnp.zeros((0, 3)), "v": jnp.zeros((1, 2)), "b": jnp.zeros(0)}
    assert penalty.prox(params, 1.0)["w"].shape == (0, 3) and penalty.value(params) == 0


@pytest.mark.parametrize("name", [name for name in ALL if name != "combine"])
def test_every_prox_passes_other_leaves_as_they_are(name):
    params = WEIGHTS | {"steps": jnp.arange(3), "nil": None}
    found = ALL[name].prox(params, 1.0)
    assert found["b"] is params["b"] and found["steps"] is params["steps"]


@pytest.mark.parametrize("name", [name for name in STRONG if name != "elastic_net"])
def test_prox_of_strength_zero_is_the_identity(name):
    found = STRONG[name](0.0).prox(WEIGHTS, 0.5)["w"]
    np.testing.assert_allclose(found, WEIGHTS["w"], atol=2e-6)


@pytest.mark.parametrize("name", ["l1", "elastic_net", "nuclear", "constraint"])
@given(seed=st.integers(0, 2**16))
def test_convex_prox_is_firmly_non_expansive_on_matrices(name, seed):
    x, y = np.random.default_rng(seed).normal(size=(2, 2, 3)).astype(np.float32) * 2
    p, q = (np.asarray(jitted_prox(name)(jnp.asarray(z))) for z in (x, y))
    assert np.sum((p - q) ** 2) <= np.sum((p - q) * (x - y)) + 1e-5


@functools.cache
def jitted_prox(name):
    return jax.jit(lambda w: ALL[name].prox({"w": w}, 1.0)["w"])


# ---- Entries: against brute force


def mcp_slope(t, lam, gamma):
    """Zhang (2010), equation (2.1)."""
    return lam * max(1 - t / (gamma * lam), 0) if lam else 0.0


def scad_slope(t, lam, a):
    """Fan and Li (2001), equation (2.7)."""
    if not lam:
        return 0.0
    return lam * ((t <= lam) + max(a * lam - t, 0) / ((a - 1) * lam) * (t > lam))


def mcp_value(u, lam, gamma):
    size = np.abs(u)
    return np.where(size <= gamma * lam, lam * size - size**2 / (2 * gamma), gamma * lam**2 / 2)


def scad_value(u, lam, a):
    size = np.abs(u)
    bent = (2 * a * lam * size - size**2 - lam**2) / (2 * (a - 1))
    flat = lam**2 * (a + 1) / 2
    return np.where(size <= lam, lam * size, np.where(size <= a * lam, bent, flat))


def l0_value(u, lam):
    return lam * (u != 0)


@functools.cache
def prox_at(make):
    """The prox of one entry, compiled once for all strengths, shapes and step sizes."""

    def prox(x, step_size, strength, *shape):
        return make(strength, *shape).prox({"w": x[None, None]}, step_size)["w"][0, 0]

    return jax.jit(prox)


def least(objective, x):
    """The least value by a dense grid, refined around its best points."""
    grid = np.linspace(-11, 11, 4001)
    best = np.min(objective(np.append(grid, [0, x])))
    for start in grid[np.argsort(objective(grid))[:3]]:
        fine = np.linspace(start - 0.01, start + 0.01, 2001)
        best = min(best, np.min(objective(fine)))
    return best


def assert_least(ours, value, x, step_size):
    def objective(u):
        return value(u) + (u - x) ** 2 / (2 * step_size)

    best = least(objective, x)
    assert objective(np.float64(ours)) <= best + 1e-5 * (1 + abs(best))


steps = st.floats(0.0625, 8, width=32)


@given(numbers, strengths, steps)
def test_prox_of_l0_is_least(x, strength, step_size):
    ours = prox_at(penalties.l0)(jnp.float32(x), step_size, strength)
    assert_least(ours, lambda u: l0_value(u, strength), x, step_size)


@given(numbers, strengths, steps, st.floats(0.25, 6, width=32))
def test_prox_of_mcp_is_least_for_every_step_size(x, strength, step_size, gamma):
    ours = prox_at(penalties.mcp)(jnp.float32(x), step_size, strength, gamma)
    assert_least(ours, lambda u: mcp_value(u, strength, gamma), x, step_size)


@given(numbers, strengths, steps, st.floats(2.125, 6, width=32))
def test_prox_of_scad_is_least_for_every_step_size(x, strength, step_size, a):
    ours = prox_at(penalties.scad)(jnp.float32(x), step_size, strength, a)
    assert_least(ours, lambda u: scad_value(u, strength, a), x, step_size)


@pytest.mark.parametrize("x", [0.5, 1.4, 2.0, 2.7, 3.5, 4.9, 6.0, 9.5])
@pytest.mark.parametrize("step_size", [0.5, 2.5, 2.7, 3.0, 3.5, 4.6, 4.8, 9.0])
def test_prox_of_mcp_and_scad_is_least_in_every_regime(x, step_size):
    for make, value, shape in (
        (penalties.mcp, mcp_value, 3.0),
        (penalties.scad, scad_value, 3.7),
    ):
        ours = prox_at(make)(jnp.float32(x), step_size, 1.0, shape)
        assert_least(ours, lambda u, value=value, shape=shape: value(u, 1.0, shape), x, step_size)


@entrywise
def test_prox_with_a_step_size_for_every_entry_is_entry_by_entry(make):
    rng = np.random.default_rng(0)
    w, sizes = rng.normal(size=(3, 4)) * 3, rng.uniform(0.1, 9, size=(3, 4))
    found = make(1.0).prox({"w": jnp.asarray(w)}, {"w": jnp.asarray(sizes)})["w"]
    alone = [prox_at(make)(jnp.float32(x), s, 1.0) for x, s in zip(w.flat, sizes.flat, strict=True)]
    np.testing.assert_allclose(found, np.reshape(alone, (3, 4)), rtol=1e-5, atol=1e-6)


@entrywise
def test_prox_is_odd(make):
    flipped = make(0.5).prox(jax.tree.map(jnp.negative, WEIGHTS), 1.0)
    expected = make(0.5).prox(WEIGHTS, 1.0)
    chex.assert_trees_all_equal(jax.tree.map(jnp.negative, flipped), expected)


def test_prox_of_l0_keeps_what_it_keeps_bit_for_bit():
    found = np.asarray(penalties.l0(0.5).prox(WEIGHTS, 1.0)["w"])
    w = np.asarray(WEIGHTS["w"])
    np.testing.assert_array_equal(found, np.where(np.abs(w) > 1, w, 0))


@pytest.mark.parametrize(
    ("make", "step_size", "steepest"),
    [(penalties.mcp, 2.0, 3.0 / (3.0 - 2.0)), (penalties.scad, 2.0, 2.7 / (2.7 - 2.0))],
    ids=["mcp", "scad"],
)
def test_prox_is_continuous_below_the_bound(make, step_size, steepest):
    x = jnp.linspace(-6, 6, 4001)
    found = np.asarray(make(1.0).prox({"w": x[None]}, step_size)["w"][0])
    assert np.abs(np.diff(found)).max() <= 1.01 * steepest * float(x[1] - x[0])


@pytest.mark.parametrize("step_size", [3.0, 6.0])
@folded
def test_prox_jumps_from_the_bound_on(make, step_size):
    x = jnp.linspace(0, 12, 4001)
    found = np.asarray(make(1.0).prox({"w": x[None]}, step_size)["w"][0])
    assert np.diff(found).max() > 1


@folded
def test_prox_is_that_of_l1_as_the_bend_goes_to_infinity(make):
    chex.assert_trees_all_close(
        make(0.5, 1e7).prox(WEIGHTS, 0.7), penalties.l1(0.5).prox(WEIGHTS, 0.7), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "slope", "shape"),
    [(penalties.mcp, mcp_slope, 3.0), (penalties.scad, scad_slope, 3.7)],
    ids=["mcp", "scad"],
)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_value_is_the_integral_of_the_slope(make, slope, shape, strength):
    w = np.array([0.25, -0.75, 1.5, -2.5, 5.0])
    areas = [
        quad(slope, 0, abs(x), (strength, shape), points=[strength, shape * strength])[0] for x in w
    ]
    found = make(strength, shape).value({"w": jnp.asarray(w)[None]})
    np.testing.assert_allclose(found, sum(areas), rtol=1e-6)


def test_value_of_l0_counts_nonzeros():
    assert float(penalties.l0(0.5).value(WEIGHTS)) == 0.5 * np.count_nonzero(WEIGHTS["w"])


@folded
def test_subgradient_of_the_folded_is_the_gradient_of_the_value(make):
    params = {"w": jnp.array([[0.3, -0.7, 1.2, -2.0, 9.0]])}
    zero = jax.tree.map(jnp.zeros_like, params)
    found, expected = make(0.5).subgradient(zero, params), jax.grad(make(0.5).value)(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@folded
def test_subgradient_of_the_folded_at_zero_is_that_of_l1(make):
    grads = {"w": jnp.array([[0.3, -0.7, 2.0]])}
    zero = jax.tree.map(jnp.zeros_like, grads)
    chex.assert_trees_all_equal(
        make(0.5).subgradient(grads, zero), penalties.l1(0.5).subgradient(grads, zero)
    )


@pytest.mark.parametrize("step_size", [0.5, 2.5, 5.0])
@pytest.mark.parametrize("name", ["l1", "l2", "elastic_net", "mcp", "scad"])
def test_subgradient_vanishes_at_the_prox(name, step_size):
    """Where w minimizes R(w) + (w - x)²/(2s), (w - x)/s + R'(w) is 0."""
    x = {"w": jnp.linspace(-6, 6, 101)[None]}
    w = ALL[name].prox(x, step_size)
    grads = jax.tree.map(lambda a, b: (a - b) / step_size, w, x)
    found = ALL[name].subgradient(grads, w)["w"]
    np.testing.assert_allclose(found, np.zeros_like(found), atol=1e-5)


@folded
def test_stop_at_zero_of_the_folded_is_the_rule_of_l1(make):
    params = {"w": jnp.array([[1.0, 1.0, -1.0, 0.0, 0.0]])}
    updates = {"w": jnp.array([[-2.0, -0.5, 3.0, 0.5, 0.5]])}
    subgradient = {"w": jnp.array([[1.0, 1.0, -1.0, -1.0, 1.0]])}
    args = (updates, subgradient, params)
    chex.assert_trees_all_equal(
        make(0.1).stop_at_zero(*args), penalties.l1(0.1).stop_at_zero(*args)
    )


GOLDEN = Path(__file__).parent / "golden" / "group_lasso.json"


@pytest.mark.parametrize("problem", ["diabetes", "wine"])
@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [("mcp", penalties.mcp, "gamma"), ("scad", penalties.scad, "a")],
    ids=["mcp", "scad"],
)
def test_solutions_of_skglm_are_at_rest(problem, name, make, shape):
    """A local minimum is a fixed point of the proximal gradient step, and its slope is 0."""
    X, y = load_diabetes(return_X_y=True) if problem == "diabetes" else wine()
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    golden = json.loads(GOLDEN.read_text())["problems"][problem][name]
    for row in golden["solutions"]:
        w, penalty = np.array(row["coefficients"]), make(row["strength"], golden[shape])
        grads = X.T @ (X @ w - y) / len(y)
        moved = penalty.prox({"w": jnp.asarray(w - 0.2 * grads)[None]}, 0.2)["w"][0]
        slope = penalty.subgradient({"w": jnp.asarray(grads)[None]}, {"w": jnp.asarray(w)[None]})
        np.testing.assert_allclose(moved, w, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(moved) != 0, w != 0)
        np.testing.assert_allclose(slope["w"], np.zeros((1, w.size)), atol=1e-6)


def wine():
    """Proline from the other measurements."""
    data = load_wine().data
    return data[:, :12], data[:, 12]


# ---- Strengths of leaves and entries

TREE = {"b": None, "w": jnp.array([[0.5, 1.0, 0.25]])}


@entrywise
def test_strengths_of_entries_are_scalars_entry_by_entry(make):
    found = make(TREE).prox(WEIGHTS, 0.5)["w"]
    columns = [make(float(s)).prox(WEIGHTS, 0.5)["w"][:, i] for i, s in enumerate(TREE["w"][0])]
    np.testing.assert_allclose(found, np.stack(columns, axis=1), rtol=1e-6)


@entrywise
def test_value_of_strengths_of_entries_is_the_sum_over_them(make):
    parts = [
        make(float(s)).value({"w": WEIGHTS["w"][:, i : i + 1]}) for i, s in enumerate(TREE["w"][0])
    ]
    np.testing.assert_allclose(make(TREE).value(WEIGHTS), sum(parts), rtol=1e-6)


@strong
def test_a_constant_tree_of_strengths_is_one_number(make):
    tree, one = make({"b": jnp.array(9.0), "w": jnp.array(0.5)}), make(0.5)
    chex.assert_trees_all_equal(tree.prox(WEIGHTS, 0.5), one.prox(WEIGHTS, 0.5))
    assert tree.value(WEIGHTS) == one.value(WEIGHTS)


@strong
def test_leaves_have_strengths_of_their_own(make):
    params = {"u": WEIGHTS["w"], "v": WEIGHTS["w"]}
    found = make({"u": 0.25, "v": jnp.array(1.0)}).prox(params, 0.5)
    np.testing.assert_array_equal(found["u"], make(0.25).prox(params, 0.5)["u"])
    np.testing.assert_array_equal(found["v"], make(1.0).prox(params, 0.5)["v"])


@entrywise
def test_strengths_of_entries_may_be_traced(make):
    found = jax.jit(lambda tree: make(tree).prox(WEIGHTS, 0.5))(TREE)
    chex.assert_trees_all_close(found, make(TREE).prox(WEIGHTS, 0.5), rtol=1e-6)


@pytest.mark.parametrize("name", ["l1", "elastic_net", "mcp", "scad"])
def test_subgradient_with_strengths_of_entries(name):
    zero = jax.tree.map(jnp.zeros_like, WEIGHTS)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 2.0), WEIGHTS)
    found = ENTRYWISE[name](TREE).subgradient(grads, zero)["w"]
    np.testing.assert_allclose(found, 2 - np.broadcast_to(TREE["w"], (2, 3)), rtol=1e-6)


def test_strength_zero_of_an_entry_lets_its_step_pass():
    params, updates = {"w": jnp.ones((1, 2))}, {"w": jnp.full((1, 2), -2.0)}
    penalty = penalties.l1({"w": jnp.array([[0.0, 1.0]])})
    stopped = penalty.stop_at_zero(updates, updates, params)["w"]
    np.testing.assert_array_equal(stopped, np.array([[-2.0, -1.0]]))


# ---- Nuclear norm


def singular_values(w):
    return np.linalg.svd(np.asarray(w, np.float64).reshape(-1, np.shape(w)[-1]), compute_uv=False)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 1), (3, 3, 2, 5)])
def test_value_of_nuclear_is_the_sum_of_singular_values(shape):
    w = np.random.default_rng(0).normal(size=shape)
    found = penalties.nuclear(0.5).value({"w": jnp.asarray(w)})
    np.testing.assert_allclose(found, 0.5 * singular_values(w).sum(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 1), (3, 3, 2, 5)])
def test_prox_of_nuclear_is_numpys_shrunken_svd(shape):
    w = np.random.default_rng(0).normal(size=shape)
    u, s, v = np.linalg.svd(w.reshape(-1, shape[-1]), full_matrices=False)
    expected = ((u * np.maximum(s - 0.5 * 2.0, 0)) @ v).reshape(shape)
    found = penalties.nuclear(0.5).prox({"w": jnp.asarray(w)}, 2.0)["w"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_prox_of_nuclear_reduces_the_rank():
    w = np.random.default_rng(1).normal(size=(8, 6))
    cut = float(np.mean(singular_values(w)[2:4]))  # between the third and the fourth
    left = singular_values(penalties.nuclear(cut).prox({"w": jnp.asarray(w)}, 1.0)["w"])
    assert (left > 1e-3).sum() == 3 and (left[3:] < 1e-6).all()


def test_prox_of_nuclear_above_the_norm_is_exactly_zero():
    found = penalties.nuclear(100.0).prox(WEIGHTS, 1.0)["w"]
    np.testing.assert_array_equal(found, np.zeros((2, 3)))


@given(st.integers(0, 2**16))
def test_prox_of_nuclear_is_no_worse_than_its_neighbours(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3)) * 2
    ours = np.asarray(jitted_prox("nuclear")(jnp.asarray(x, jnp.float32)), np.float64)

    def objective(u):
        return 0.5 * singular_values(u).sum() + 0.5 * np.square(u - x).sum()

    others = [ours + scale * rng.normal(size=(2, 3)) for scale in (1e-3, 1e-2, 0.1, 1) * 5]
    assert objective(ours) <= min(map(objective, others)) + 1e-5


# ---- Constraints


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_value_of_a_constraint_is_zero_after_its_prox(dtype):
    penalty = penalties.constraint(l1_ball)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(30, 20)), dtype)}
    assert penalty.value(params) == jnp.inf and penalty.value(penalty.prox(params, 1.0)) == 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_value_of_a_constraint_allows_rounding_and_no_more(scale):
    penalty = penalties.constraint(lambda leaves: [jnp.minimum(x, scale) for x in leaves])
    values = [float(penalty.value({"w": jnp.array([[scale * x]])})) for x in (1.0, 1.0001, 1.001)]
    assert values == [0, 0, np.inf]


def test_a_constraint_couples_its_leaves_in_the_order_of_the_tree():
    seen = []

    def projection(leaves):
        seen.extend(leaves)
        return optax.projections.projection_l2_ball(leaves, 1.0)

    params = {"b": jnp.ones(2), "v": jnp.full((1, 2), 3.0), "w": jnp.full((1, 2), 4.0)}
    found = penalties.constraint(projection).prox(params, 1.0)
    assert [float(x[0, 0]) for x in seen] == [3.0, 4.0]
    norm = np.hypot(np.linalg.norm(found["v"]), np.linalg.norm(found["w"]))
    assert norm == pytest.approx(1.0) and found["b"] is params["b"]


def test_a_constraint_projects_in_float32():
    seen = []
    penalties.constraint(lambda leaves: seen.extend(leaves) or leaves).prox(
        {"w": jnp.ones((2, 2), jnp.bfloat16)}, 1.0
    )
    assert seen[0].dtype == jnp.float32


def test_prox_of_a_constraint_is_scipys_nearest_point():
    w = np.array([[1.5, -0.7, 0.4], [0.2, -1.1, 0.6]])
    nearest = minimize(
        lambda u: 0.5 * np.square(u - w.ravel()).sum(),
        np.zeros(6),
        jac=lambda u: u - w.ravel(),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda u: 2.0 - np.abs(u).sum()},
        options={"ftol": 1e-12},
    )
    found = penalties.constraint(l1_ball).prox({"w": jnp.asarray(w)}, 7.0)["w"]
    np.testing.assert_allclose(found.ravel(), nearest.x, atol=1e-4)


@pytest.fixture(scope="module")
def lasso():
    """Standardized diabetes, and scikit-learn's lasso on it."""
    X, y = load_diabetes(return_X_y=True)
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    return X, y, Lasso(0.1, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(X, y).coef_


def test_projected_gradient_descent_on_the_l1_ball_is_the_lasso(lasso):
    X, y, expected = lasso
    X, y = jnp.asarray(X, jnp.float32), jnp.asarray(y, jnp.float32)
    radius = float(np.abs(expected).sum())
    ball = functools.partial(optax.projections.projection_l1_ball, scale=radius)
    tx = sj.proximal(optax.sgd(0.2), penalties.constraint(ball, prunable=filters.floating), 0.2)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(X.T @ (X @ w - y) / len(y), state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros(X.shape[1])
    (w, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 2000))((w, tx.init(w)))
    np.testing.assert_allclose(w, expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(w) != 0, expected != 0)


# ---- Several penalties

HEAD, BODY = filters.by_path("head.*"), filters.by_path("body.*")
NET = {"body": {"k": jnp.array([[3.0, -0.25]])}, "head": {"k": jnp.array([[2.0, -0.5]])}}
PAIR = (penalties.l1(0.5, prunable=HEAD), penalties.scad(0.25, prunable=BODY))


def test_value_of_a_combination_is_the_sum():
    assert penalties.combine(*PAIR).value(NET) == sum(float(p.value(NET)) for p in PAIR)


def test_prox_of_a_combination_is_each_on_its_leaves():
    found = penalties.combine(*PAIR).prox(NET, 1.0)
    chex.assert_trees_all_equal(found["head"], PAIR[0].prox(NET, 1.0)["head"])
    chex.assert_trees_all_equal(found["body"], PAIR[1].prox(NET, 1.0)["body"])


def test_subgradient_of_a_combination_is_each_on_its_leaves():
    grads = jax.tree.map(jnp.ones_like, NET)
    found = penalties.combine(*PAIR).subgradient(grads, NET)
    chex.assert_trees_all_equal(found["head"], PAIR[0].subgradient(grads, NET)["head"])
    chex.assert_trees_all_equal(found["body"], PAIR[1].subgradient(grads, NET)["body"])


def test_stop_at_zero_of_a_combination_is_each_on_its_leaves():
    updates = jax.tree.map(lambda x: -2 * x, NET)
    stopped = penalties.combine(*PAIR).stop_at_zero(updates, updates, NET)
    chex.assert_trees_all_equal(stopped, jax.tree.map(jnp.negative, NET))


def test_combination_reads_schedules():
    penalty = penalties.combine(penalties.l1(lambda step: 0.5 * step, prunable=HEAD), PAIR[1])
    assert penalty.at(1) == penalties.combine(*PAIR)


def test_combination_with_one_that_has_no_slope_has_none():
    penalty = penalties.combine(PAIR[0], penalties.l0(0.5, prunable=BODY))
    assert isinstance(penalty, Penalty) and not isinstance(penalty, SlopedPenalty)


def test_combination_may_be_combined():
    params = NET | {"tail": {"k": jnp.array([[1.0, 4.0]])}}
    tail = penalties.l0(0.5, prunable=filters.by_path("tail.*"))
    nested = penalties.combine(penalties.combine(*PAIR), tail)
    chex.assert_trees_all_equal(
        nested.prox(params, 1.0), penalties.combine(*PAIR, tail).prox(params, 1.0)
    )


class Bare:
    """A user's penalty without a filter."""

    def at(self, step):
        return self

    def value(self, params):
        return jnp.zeros(())

    def prox(self, params, step_size):
        return params


# ---- What is refused

ERRORS = {
    "gamma of zero": (
        lambda: penalties.mcp(0.1, 0.0),
        ValueError,
        r"`gamma` must be finite and > 0, got 0\.0; for an infinite one take l1",
    ),
    "a of two": (
        lambda: penalties.scad(0.1, 2),
        ValueError,
        r"`a` must be finite and > 2, got 2; for an infinite one take l1",
    ),
    "gamma of infinity": (
        lambda: penalties.mcp(0.1, np.inf),
        ValueError,
        r"`gamma` must be finite and > 0, got inf",
    ),
    "a of text": (
        lambda: penalties.scad(0.1, "3.7"),
        TypeError,
        r"`a` must be one real number, got '3\.7'",
    ),
    "l0 below zero": (
        lambda: penalties.l0(-1),
        ValueError,
        r"`strength` must be >= 0, got -1",
    ),
    "mcp of a schedule": (
        lambda: penalties.mcp(lambda step: 0.1).value(WEIGHTS),
        TypeError,
        r"`strength` is a schedule, .*: use penalty\.at\(step\) first",
    ),
    "a negative strength of an entry": (
        lambda: penalties.l1({"net": {"w": np.array([[0.5, -0.5]])}}),
        ValueError,
        r"`strength` must be finite and >= 0, got -0\.5 at 'net\.w'",
    ),
    "a NaN strength of an entry": (
        lambda: penalties.scad({"net": {"w": np.array([[0.5, np.nan]])}}),
        ValueError,
        r"`strength` must be finite and >= 0, got nan at 'net\.w'",
    ),
    "a boolean strength of an entry": (
        lambda: penalties.l0({"w": jnp.array([[True, False]])}),
        TypeError,
        r"`strength` must hold real numbers, got bool\[1,2\] at 'w'",
    ),
    "a strength of text": (
        lambda: penalties.l1({"w": "0.1"}),
        TypeError,
        r"`strength` must be a number or a schedule \(step -> number\), got \{'w'",
    ),
    "strengths that do not broadcast": (
        lambda: penalties.mcp({"b": None, "w": jnp.ones((1, 2))}).prox(WEIGHTS, 1.0),
        ValueError,
        r"`strength` must broadcast .*: at 'w' the value is float32\[1,2\], the parameter float32",
    ),
    "strengths without a leaf": (
        lambda: penalties.l0({"w": jnp.array(1.0)}).value(WEIGHTS),
        ValueError,
        r"`strength` must have the structure of `params`: `params` has a leaf at 'b', where",
    ),
    "strengths with None where penalized": (
        lambda: penalties.l1({"b": jnp.array(1.0), "w": None}).value(WEIGHTS),
        ValueError,
        r"`l1_strength` must have a value for every penalized leaf, got none at 'w'",
    ),
    "a negative step size": (
        lambda: penalties.l0(1.0).prox(WEIGHTS, -1.0),
        ValueError,
        r"`step_size` must be >= 0, got -1\.0",
    ),
    "step sizes that do not broadcast": (
        lambda: penalties.l0(1.0).prox(WEIGHTS, {"b": None, "w": jnp.ones((1, 2))}),
        ValueError,
        r"`step_size` must broadcast .*: at 'w' the value is float32\[1,2\]",
    ),
    "nuclear of a vector": (
        lambda: penalties.nuclear(1.0, prunable=filters.floating).value(WEIGHTS),
        ValueError,
        r"`prunable` must select leaves of at least two axes .*, got float32\[2\] at 'b'; take",
    ),
    "nuclear with a strength for every entry": (
        lambda: penalties.nuclear(TREE).prox(WEIGHTS, 1.0),
        ValueError,
        r"`strength` must be one number a leaf for the nuclear norm, got float32\[1,3\] at 'w'",
    ),
    "nuclear with step sizes": (
        lambda: penalties.nuclear(1.0).prox(WEIGHTS, {"b": 1.0, "w": 1.0}),
        TypeError,
        r"`step_size` must be one number, got a tree: .* no closed form; take plain SGD",
    ),
    "constraint by no function": (
        lambda: penalties.constraint(3.0),
        TypeError,
        r"`projection` must be a function \(list of arrays\) -> list of arrays, got 3\.0; for exam",
    ),
    "constraint with step sizes": (
        lambda: penalties.constraint(l1_ball).prox(WEIGHTS, {"b": 1.0, "w": 1.0}),
        TypeError,
        r"`step_size` must be one number, got a tree: the projection is .*; take plain SGD",
    ),
    "constraint that forgets a leaf": (
        lambda: penalties.constraint(lambda leaves: leaves[1:]).prox(WEIGHTS, 1.0),
        TypeError,
        r"`projection` must return a list like the one it gets, of 1 arrays, got \[\]; map over",
    ),
    "constraint that flattens": (
        lambda: penalties.constraint(lambda leaves: [leaves[0].ravel()]).value(WEIGHTS),
        ValueError,
        r"`projection` must have the shapes of `params`: at 'w' it is float32\[6\], `params` is",
    ),
    "combination of nothing": (
        lambda: penalties.combine(),
        ValueError,
        r"`penalties` must be at least one penalty, got none",
    ),
    "combination of a function": (
        lambda: penalties.combine(penalties.l1),
        TypeError,
        r"`penalties` must be penalties such as l1\(1e-4\), got <function l1",
    ),
    "combination of a class": (
        lambda: penalties.combine(penalties.ElasticNet),
        TypeError,
        r"`penalties` must be penalties such as l1\(1e-4\), got <class",
    ),
    "combination of one without a filter": (
        lambda: penalties.combine(Bare()),
        TypeError,
        r"`penalties` must each have a filter `prunable`, .*, got <.*Bare.*; give it prunable=",
    ),
    "combination with an overlap": (
        lambda: penalties.combine(PAIR[0], penalties.l2(0.1)).prox(NET, 1.0),
        ValueError,
        r"`penalties` must have leaves of their own, got 'head\.k' in number 0 and number 1; .*"
        r"elastic_net, sparse_group_lasso",
    ),
    "combination of one that penalizes nothing": (
        lambda: penalties.combine(*PAIR).value({"head": NET["head"]}),
        ValueError,
        r"`prunable` must select at least one leaf, got none of 1",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_penalty_says_what_is_wrong(case, as_users_have_it):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("case", ERRORS)
def test_bad_penalty_is_refused_inside_a_jitted_function_too(case, as_users_have_it):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        jax.jit(lambda: call() and None)()
