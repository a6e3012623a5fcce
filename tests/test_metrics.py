"""Metrics against the steps that optax makes; `proximal` and `penalized` with their options."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import filters, metrics, penalties

pytestmark = pytest.mark.usefixtures("quickly")

PARAMS = {"w": jnp.array([[0.5, -0.25, 1.0]]), "b": jnp.array([0.1])}
GRADS = {"w": jnp.array([[0.5, -2.0, 1e-3]]), "b": jnp.array([3.0])}
RATE = 0.25
CASES = {
    "adam": (optax.adam(RATE), metrics.adam()),
    "adam with its own numbers": (
        optax.adam(RATE, b2=0.9, eps=0.1, eps_root=0.01),
        metrics.adam(b2=0.9, eps=0.1, eps_root=0.01),
    ),
    "adamw": (optax.adamw(RATE, weight_decay=0), metrics.adam()),
    "clipped adam": (
        optax.chain(optax.clip_by_global_norm(1e9), optax.adam(RATE)),
        metrics.adam(),
    ),
    "rmsprop": (optax.rmsprop(RATE), metrics.rmsprop()),
    "rmsprop, ε outside": (
        optax.rmsprop(RATE, eps=0.1, eps_in_sqrt=False),
        metrics.rmsprop(eps=0.1, eps_in_sqrt=False),
    ),
    "rmsprop with momentum": (
        optax.rmsprop(RATE, momentum=0.75),
        metrics.rmsprop(momentum=0.75),
    ),
    "adagrad": (optax.adagrad(RATE, eps=0.1), metrics.adagrad(eps=0.1)),
    "momentum": (optax.sgd(RATE, 0.75), metrics.momentum(0.75)),
    "nesterov": (optax.sgd(RATE, 0.75, nesterov=True), metrics.momentum(0.75)),
}


@pytest.mark.parametrize("case", CASES)
def test_metric_is_the_step_that_a_lasting_gradient_makes(case):
    """step = -rate · metric · gradient, once the moments have settled."""
    optimizer, metric = CASES[case]

    def step(state, _):
        updates, state = optimizer.update(GRADS, state, PARAMS)
        factors = metric(state, PARAMS)
        scale = factors if isinstance(factors, dict) else jax.tree.map(lambda g: factors, GRADS)
        return state, (updates, jax.tree.map(lambda f, g: -RATE * f * g, scale, GRADS))

    _, (updates, expected) = jax.lax.scan(step, optimizer.init(PARAMS), None, 200)
    last = jax.tree.map(lambda x: x[-1], (updates, expected))
    chex.assert_trees_all_close(*last, rtol=1e-4)


@pytest.mark.parametrize("case", ["adam", "rmsprop", "adagrad"])
def test_entries_that_never_had_a_gradient_stay(case):
    optimizer = {
        "adam": optax.adam(0.1),
        "rmsprop": optax.rmsprop(0.1),
        "adagrad": optax.adagrad(0.1, initial_accumulator_value=0.0),
    }[case]
    tx = sj.proximal(optimizer, penalties.l1(0.1), 0.1, metric=getattr(metrics, case)())
    w = {"w": jnp.ones((2, 3))}
    grads = {"w": jnp.array([[1.0], [0.0]]) * jnp.ones((2, 3))}
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
    assert np.all(w["w"][0] < 1)
    np.testing.assert_array_equal(w["w"][1], 1)


def test_metric_of_some_leaves_belongs_inside_partition():
    labels = {"w": "adam", "b": "sgd"}
    some = optax.multi_transform({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, labels)
    l1 = penalties.l1(0.1, prunable=filters.floating)
    tx = sj.proximal(some, l1, 0.1, metric=metrics.adam())
    with pytest.raises(ValueError, match=r"for every penalized leaf, got none at 'b'.*partition"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    inside = sj.proximal(optax.adam(0.1), penalties.l1(0.1), 0.1, metric=metrics.adam())
    both = optax.multi_transform({"adam": inside, "sgd": optax.sgd(0.1)}, labels)
    both.update(GRADS, both.init(PARAMS), PARAMS)


def test_metric_that_was_not_called_says_so():
    with pytest.raises(TypeError, match=r"got metrics\.adam, which makes one: call it first"):
        sj.proximal(optax.adam(0.1), penalties.l1(0.1), 0.1, metric=metrics.adam)


@pytest.mark.parametrize("how", ["penalized", "proximal", "prox"])
def test_init_refuses_params_that_the_penalty_does_not_fit(how):
    penalty = penalties.l1({"w": jnp.ones((1, 2)), "b": jnp.float32(1)})
    tx = {
        "penalized": lambda: sj.penalized(optax.adam(0.1), penalty),
        "proximal": lambda: sj.proximal(optax.sgd(0.1), penalty, 0.1),
        "prox": lambda: sj.transforms.prox(penalty, 0.1),
    }[how]()
    with pytest.raises(ValueError, match=r"`l1_strength` must broadcast .* at 'w'"):
        tx.init(PARAMS)


def test_metric_of_another_optimizer_says_so():
    tx = sj.proximal(optax.sgd(0.1), penalties.l1(0.1), 0.1, metric=metrics.adam())
    with pytest.raises(ValueError, match=r"metrics\.adam\(\) needs .* ScaleByAdamState .*, got 0"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metrics.momentum(1.0), r"`decay` must be in \[0, 1\)"),
        (lambda: metrics.adam(b2=1.5), r"`b2` must be in \[0, 1\)"),
        (lambda: metrics.adam(eps=-1.0), r"`eps` must be >= 0, got -1"),
        (lambda: metrics.rmsprop(momentum=-0.5), r"`momentum` must be in \[0, 1\)"),
        (lambda: metrics.adagrad(eps=np.nan), r"`eps` must be a number, got nan"),
        (
            lambda: sj.penalized(optax.sgd(0.1), penalties.l1(0.1), gradient_decay=1.0),
            r"`gradient_decay` must be in \[0, 1\)",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_prox_wants_the_rate_of_a_penalty_without_slope():
    with pytest.raises(TypeError, match=r"`learning_rate` must be given for a penalty without"):
        sj.transforms.prox(penalties.l0(0.1))


def test_prox_before_sgd_takes_a_penalty_without_slope():
    tx = optax.chain(sj.transforms.prox(penalties.l0(0.5), 0.5), optax.sgd(0.5))
    w = {"w": jnp.array([[2.0, 0.5]])}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, w), tx.init(w), w)
    np.testing.assert_array_equal(optax.apply_updates(w, updates)["w"], [[2.0, 0.0]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("how", ["penalized", "proximal"])
def test_half_precision_params_reach_exact_zeros(how, dtype):
    """½|w - t|² + λ|w|: t - λ, or zero; within the rounding of the dtype."""
    target = jnp.array([[1.5, 0.2, -1.0, -0.1]], dtype)
    penalty = penalties.l1(0.5)
    rate = optax.cosine_decay_schedule(0.1, 300)
    tx = {
        "penalized": sj.penalized(optax.adam(rate), penalty, gradient_decay=0.5),
        "proximal": sj.proximal(optax.adam(rate), penalty, rate, metric=metrics.adam()),
    }[how]

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(w - target, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.full((1, 4), 0.75, dtype)
    (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), None, 300)
    assert w.dtype == dtype
    np.testing.assert_array_equal(np.asarray(w != 0), [[True, False, True, False]])
    np.testing.assert_allclose(np.float32(w), [[1.0, 0.0, -0.5, 0.0]], atol=0.06)


def averaged(**options):
    penalty = penalties.l1(1.0, prunable=filters.floating)
    return sj.penalized(optax.sgd(1.0), penalty, gradient_decay=0.5, **options)


def test_gradient_decay_lets_an_entry_at_zero_see_the_mean():
    """The mean of 3 and -3 is small: the entry comes back, and stays."""
    tx, w = averaged(), jnp.zeros(1)
    state, places = tx.init(w), []
    for g in (0.5, 3.0, 3.0):
        updates, state = tx.update(jnp.array([g]), state, w)
        places.append(float(updates[0]))
    # Corrected means: 0.5; (0.25·0.5 + 0.5·3) / 0.75 = 2.1667; (… + 1.5) / 0.875 = 2.6429
    np.testing.assert_allclose(places, [0.0, -(2.1666667 - 1), -(2.6428571 - 1)], rtol=1e-6)


def test_gradient_decay_leaves_other_entries_their_gradient():
    tx, w = averaged(), jnp.array([10.0])
    state = tx.init(w)
    for g in (5.0, -2.0):
        updates, state = tx.update(jnp.array([g]), state, w)
    np.testing.assert_allclose(updates, [-(-2.0 + 1.0)])


def test_gradient_decay_forgets_a_nan_gradient():
    tx, w = averaged(), jnp.zeros(1)
    state = tx.init(w)
    updates, state = tx.update(jnp.array([jnp.nan]), state, w)
    assert jnp.isnan(updates).all()
    updates, state = tx.update(jnp.array([8.0]), state, w)
    assert jnp.isfinite(updates).all() and jnp.isfinite(state.mean_grads).all()


def test_gradient_decay_compiles_once_and_takes_any_leaves():
    tx = sj.penalized(optax.adam(0.1), penalties.l1(0.1), gradient_decay=0.9)
    params = PARAMS | {"steps": jnp.arange(3), "nil": None, "none": jnp.zeros((0, 2))}
    grads = GRADS | {"steps": jnp.zeros(3, int), "nil": None, "none": jnp.zeros((0, 2))}
    frozen = optax.masked(tx, {k: k != "steps" for k in params})
    traces = []

    @jax.jit
    def step(state, params):
        traces.append(None)
        updates, state = frozen.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    state = frozen.init(params)
    for _ in range(3):
        state, params = step(state, params)
    assert len(traces) == 1
    assert params["none"].shape == (0, 2)


def test_state_without_gradient_decay_has_no_mean():
    assert sj.penalized(optax.sgd(0.1), penalties.l1(0.1)).init(PARAMS).mean_grads is None
