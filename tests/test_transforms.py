"""`prox`, `penalized`, `proximal` against scikit-learn: the same solution, the same support."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge

import sparsejax as sj
from sparsejax import filters, penalties

STEPS = 6000
cosine = optax.cosine_decay_schedule


def standardized(X):
    return ((X - X.mean(0)) / X.std(0)).astype(np.float32)


def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return standardized(X), standardized(y)


def random_problem(seed, n=80, p=25):
    """Correlated columns, a sparse truth, noise."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p)) + 0.5 * rng.standard_normal((n, 1))
    truth = np.where(rng.random(p) < 0.3, rng.standard_normal(p), 0)
    return standardized(X), standardized(X @ truth + 0.5 * rng.standard_normal(n))


PROBLEMS = {"diabetes": diabetes(), "random0": random_problem(0), "random1": random_problem(1)}


def half_mean_squared(problem):
    X, y = PROBLEMS[problem]
    return lambda w: 0.5 * jnp.mean((y - X @ w) ** 2)


def fit(tx, loss, w, steps=STEPS):
    """The params and the transform's state after so many updates, in one program."""

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps)[0])
    return run((w, tx.init(w)))


def start(problem):
    return jnp.full(PROBLEMS[problem][0].shape[1], 0.3)


def sklearn_solution(model, problem):
    X, y = (a.astype(np.float64) for a in PROBLEMS[problem])
    return model.fit(X, y).coef_


def lasso(problem, strength):
    model = Lasso(alpha=strength, fit_intercept=False, tol=1e-12, max_iter=10**6)
    return sklearn_solution(model, problem)


def assert_same_solution(ours, reference, atol=1e-5):
    np.testing.assert_array_equal(np.asarray(ours) != 0, reference != 0)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=atol)


RATES = {"constant": 0.05, "cosine": cosine(0.1, STEPS, 0.01), "cosine to zero": cosine(0.1, STEPS)}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("strength", [0.03, 0.1, 0.3])
def test_l1_prox_before_sgd_solves_the_lasso(problem, rate, strength):
    tx = optax.chain(sj.l1_prox(strength, prunable=filters.floating), optax.sgd(RATES[rate]))
    w, state = fit(tx, half_mean_squared(problem), start(problem))
    assert_same_solution(w, lasso(problem, strength))
    assert state[0].fit >= 0.99


@pytest.mark.parametrize("rate", RATES)
def test_l1_prox_with_a_given_learning_rate_solves_the_lasso(rate):
    prox = sj.l1_prox(0.1, RATES[rate], prunable=filters.floating)
    w, _ = fit(
        optax.chain(prox, optax.sgd(RATES[rate])), half_mean_squared("diabetes"), start("diabetes")
    )
    assert_same_solution(w, lasso("diabetes", 0.1))


def test_l1_prox_eager_solves_the_lasso():
    tx = optax.chain(sj.l1_prox(0.3, prunable=filters.floating), optax.sgd(0.3))
    w, loss = start("random0"), half_mean_squared("random0")
    state, grad = tx.init(w), jax.jit(jax.grad(loss))
    for _ in range(150):
        updates, state = tx.update(grad(w), state, w)
        w = optax.apply_updates(w, updates)
    assert_same_solution(w, lasso("random0", 0.3))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rate", RATES)
def test_elastic_net_prox_solves_the_elastic_net(problem, rate):
    model = ElasticNet(alpha=0.2, l1_ratio=0.6, fit_intercept=False, tol=1e-12, max_iter=10**6)
    prox = sj.elastic_net_prox(0.2 * 0.6, 0.2 * 0.4, prunable=filters.floating)
    w, _ = fit(
        optax.chain(prox, optax.sgd(RATES[rate])), half_mean_squared(problem), start(problem)
    )
    assert_same_solution(w, sklearn_solution(model, problem))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rate", RATES)
def test_l2_prox_solves_the_ridge(problem, rate):
    n = len(PROBLEMS[problem][0])
    prox = sj.l2_prox(0.3, prunable=filters.floating)
    w, _ = fit(
        optax.chain(prox, optax.sgd(RATES[rate])), half_mean_squared(problem), start(problem)
    )
    assert_same_solution(w, sklearn_solution(Ridge(alpha=0.3 * n, fit_intercept=False), problem))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rate", RATES)
def test_proximal_sgd_solves_the_lasso(problem, rate):
    penalty = penalties.l1(0.1, prunable=filters.floating)
    tx = sj.proximal(optax.sgd(RATES[rate]), penalty, RATES[rate])
    w, _ = fit(tx, half_mean_squared(problem), start(problem))
    assert_same_solution(w, lasso(problem, 0.1))


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, 0.9),
    "nesterov": optax.sgd(0.05, 0.9, nesterov=True),
    "adam": optax.adam(cosine(0.01, STEPS)),
    "rmsprop": optax.rmsprop(cosine(0.003, STEPS)),
    "adagrad": optax.adagrad(0.1),
    "yogi": optax.yogi(0.01),
    "lion": optax.lion(cosine(0.003, STEPS), weight_decay=0),
    "clipped adamw": optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(cosine(0.01, STEPS), weight_decay=0)
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strength", [0.03, 0.1, 0.3])
def test_penalized_solves_the_lasso_with_any_optimizer(problem, optimizer, strength):
    tx = sj.penalized(OPTIMIZERS[optimizer], penalties.l1(strength, prunable=filters.floating))
    w, _ = fit(tx, half_mean_squared(problem), start(problem))
    assert_same_solution(w, lasso(problem, strength))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_penalized_solves_the_elastic_net(optimizer):
    model = ElasticNet(alpha=0.2, l1_ratio=0.6, fit_intercept=False, tol=1e-12, max_iter=10**6)
    penalty = penalties.elastic_net(0.2 * 0.6, 0.2 * 0.4, prunable=filters.floating)
    tx = sj.penalized(OPTIMIZERS[optimizer], penalty)
    w, _ = fit(tx, half_mean_squared("diabetes"), start("diabetes"))
    assert_same_solution(w, sklearn_solution(model, "diabetes"))


LOGISTIC_STEPS = 20_000
LOGISTIC = {
    "l1_prox": lambda p: optax.chain(
        sj.l1_prox(p.l1_strength, prunable=p.prunable), optax.sgd(0.5)
    ),
    "proximal": lambda p: sj.proximal(optax.sgd(0.5), p, 0.5),
    "penalized momentum": lambda p: sj.penalized(optax.sgd(0.1, 0.9), p),
    "penalized adam": lambda p: sj.penalized(optax.adam(cosine(0.03, LOGISTIC_STEPS)), p),
}


@pytest.mark.parametrize("method", LOGISTIC)
def test_logistic_regression_with_l1_equals_scikit_learn(method):
    X, y = load_breast_cancer(return_X_y=True)
    X, strength = standardized(X), 0.1
    model = LogisticRegression(
        l1_ratio=1, C=1 / (strength * len(y)), solver="saga", fit_intercept=False,
        tol=1e-10, max_iter=10**5,
    )  # fmt: skip
    reference = model.fit(X.astype(np.float64), y).coef_[0]

    def loss(w):
        return optax.sigmoid_binary_cross_entropy(X @ w, y.astype(np.float32)).mean()

    tx = LOGISTIC[method](penalties.l1(strength, prunable=filters.floating))
    w, _ = fit(tx, loss, jnp.full(X.shape[1], 0.1), LOGISTIC_STEPS)
    assert_same_solution(w, reference)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    {
        "momentum": optax.sgd(0.01, 0.9),
        "adam": optax.adam(0.01),
        "clip": optax.chain(optax.clip(1e-3), optax.sgd(0.1)),
    }.items(),
)
def test_l1_prox_recognizes_what_is_not_plain_sgd(name, optimizer):
    tx = optax.chain(sj.l1_prox(0.1, prunable=filters.floating), optimizer)
    _, state = fit(tx, half_mean_squared("diabetes"), start("diabetes"), 30)
    assert state[0].fit < 0.99


def test_l1_prox_falls_back_to_the_subgradient():
    """So that momentum behind it comes near the lasso, though without zeros."""
    tx = optax.chain(sj.l1_prox(0.1, prunable=filters.floating), optax.sgd(0.01, 0.9))
    w, _ = fit(tx, half_mean_squared("diabetes"), start("diabetes"))
    np.testing.assert_allclose(w, lasso("diabetes", 0.1), atol=2e-2)


def test_l1_prox_measures_the_learning_rate():
    tx = optax.chain(sj.l1_prox(0.01), optax.sgd(0.07))
    params = {"w": jnp.ones((4, 5)), "b": jnp.zeros(5)}
    loss = lambda p: jnp.sum((p["w"] @ jnp.arange(5.0) + p["b"].sum()) ** 2) / 100  # noqa: E731
    _, state = fit(tx, loss, params, 5)
    assert float(state[0].learning_rate) == pytest.approx(0.07, rel=1e-4)


def noisy(tx, steps, within=0.0):
    """Minibatch-like noise on a quadratic whose solution is zero; the share of (almost) zeros."""
    keys = jax.random.split(jax.random.key(0), steps)

    def step(carry, key):
        w, state = carry
        grads = {"w": w["w"] + 0.2 * jax.random.normal(key, w["w"].shape)}
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = {"w": jnp.full((32, 32), 0.3)}
    (w, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((w, tx.init(w)))
    return float(jnp.mean(jnp.abs(w["w"]) <= within))


def test_l1_prox_is_exact_at_once_where_the_rate_is_a_power_of_two():
    """As many zeros as `proximal` makes, minibatch noise or not."""
    measured = noisy(optax.chain(sj.l1_prox(0.2), optax.sgd(2**-3)), 400)
    exact = noisy(sj.proximal(optax.sgd(2**-3), penalties.l1(0.2), 2**-3), 400)
    assert exact > 0.2
    assert measured == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_l1_prox_finds_a_power_of_two_in_small_steps(seed):
    """Of 2e-4 of the weights: a first coarse measurement is not taken for the rate for good."""
    prox, rates = sj.l1_prox(1e-3), []
    key, *keys = jax.random.split(jax.random.key(seed), 13)
    params = {"w": jax.random.normal(key, (32, 32))}
    state = prox.init(params)
    for i, key in enumerate(keys):
        noise = {"w": 0.1 * jax.random.normal(key, (32, 32))}
        emission, state = prox.update(noise, state, params)
        rate = 2**-7 if i < 6 else 2**-9
        params = optax.apply_updates(params, jax.tree.map(lambda e, r=rate: -r * e, emission))
        rates.append(float(state.learning_rate))
    assert rates[1:7] == [2**-7] * 6 and rates[7:] == [2**-9] * 5


@pytest.mark.parametrize("done", [20, 100, 180])
def test_l1_prox_foretells_a_schedule(done):
    """The rate that SGD is going to use, not the one it used."""
    schedule = cosine(0.1, 200)
    tx = optax.chain(sj.l1_prox(0.01), optax.sgd(schedule))
    slopes = jnp.linspace(1, 2, 20).reshape(4, 5)
    _, state = fit(tx, lambda p: jnp.sum(slopes * p["w"]), {"w": jnp.zeros((4, 5))}, done)
    used, before = float(schedule(done - 1)), float(schedule(done - 2))
    assert abs(float(state[0].learning_rate) - used) < 0.1 * abs(before - used)


def test_l1_prox_follows_a_jump_of_the_rate():
    tx = optax.chain(
        sj.l1_prox(0.1, prunable=filters.floating),
        optax.sgd(optax.piecewise_constant_schedule(0.1, {20: 0.1, 40: 5.0})),
    )
    _, early = fit(tx, half_mean_squared("diabetes"), start("diabetes"), 25)
    _, late = fit(tx, half_mean_squared("diabetes"), start("diabetes"), 45)
    assert float(early[0].learning_rate) == pytest.approx(0.01, rel=1e-3)
    assert float(late[0].learning_rate) == pytest.approx(0.05, rel=1e-3)


def test_l1_prox_remembers_the_learning_rate_where_nothing_moves():
    """All weights zero and no bias: no movement to measure, and none to forget the rate by."""
    tx = optax.chain(sj.l1_prox(5.0), optax.sgd(0.1))
    params = {"w": jnp.full((4, 4), 0.3)}
    loss = lambda p: jnp.sum(p["w"])  # noqa: E731
    w, state = fit(tx, loss, params, 50)
    assert not np.any(w["w"])
    assert float(state[0].learning_rate) == pytest.approx(0.1, rel=1e-4)


def test_l1_prox_reads_a_schedule_of_strengths():
    strength = optax.piecewise_constant_schedule(5.0, {40: 0.0})
    tx = optax.chain(sj.l1_prox(strength), optax.sgd(0.1))
    loss = lambda p: 0.5 * jnp.sum((p["w"] - 1) ** 2)  # noqa: E731
    early, _ = fit(tx, loss, {"w": jnp.full((2, 2), 0.3)}, 40)
    late, _ = fit(tx, loss, {"w": jnp.full((2, 2), 0.3)}, 400)
    assert not np.any(early["w"])
    np.testing.assert_allclose(late["w"], 1, atol=1e-5)


def test_l1_prox_leaves_biases_alone():
    """Bit for bit, also after the learning rate has been measured."""
    prox = sj.l1_prox(0.05)
    params = {"w": jnp.full((2, 2), 0.3), "b": jnp.array([0.3, 1e4])}
    state = prox.init(params)
    for _ in range(4):
        grads = jax.tree.map(lambda p: 0.1234567 * p, params)
        emission, state = prox.update(grads, state, params)
        chex.assert_trees_all_equal(emission["b"], grads["b"])
        params = optax.apply_updates(params, jax.tree.map(lambda e: -0.1 * e, emission))
    assert float(state.learning_rate) == pytest.approx(0.1, rel=1e-4)


def test_l1_prox_keeps_a_constant_rate_to_the_bit():
    """Once measured, noise of later and smaller movements does not move it."""
    prox, rates = sj.l1_prox(0.05), []
    params = {"w": jnp.linspace(0.5, 2, 12).reshape(3, 4)}
    state = prox.init(params)
    for _ in range(40):
        emission, state = prox.update(jax.tree.map(lambda p: p - 3.3, params), state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda e: -0.3 * e, emission))
        rates.append(float(state.learning_rate))
    assert len(set(rates[2:])) == 1
    assert rates[-1] == pytest.approx(0.3, rel=1e-5)


def test_l1_prox_is_not_blinded_by_a_large_leaf_that_stands_still():
    params = {"w": jnp.full((10, 10), 0.3), "statistics": jnp.full(64, 1e5)}
    loss = lambda p: 0.5 * jnp.sum(p["w"] ** 2)  # noqa: E731
    w, state = fit(optax.chain(sj.l1_prox(1.0), optax.sgd(2**-6)), loss, params, 60)
    assert state[0].fit >= 0.99
    assert not np.any(w["w"])


def test_l1_prox_looks_at_every_leaf():
    """The first leaf stands still; the second has the step to measure."""
    params = {"a": jnp.ones((3, 3)), "z": jnp.full((3, 3), 0.5)}
    loss = lambda p: 0.5 * jnp.sum(p["z"] ** 2)  # noqa: E731
    tx = optax.chain(sj.l1_prox(1.0, prunable=filters.by_path("z")), optax.sgd(0.1))
    _, state = fit(tx, loss, params, 3)
    assert float(state[0].learning_rate) == pytest.approx(0.1, rel=1e-4)


def test_l1_prox_solves_the_lasso_in_float64():
    X, y = (a.astype(np.float64) for a in PROBLEMS["random0"])
    with jax.enable_x64(True):
        loss = lambda w: 0.5 * jnp.mean((y - X @ w) ** 2)  # noqa: E731
        for prox in (
            sj.l1_prox(0.1, prunable=filters.floating),
            sj.l1_prox(0.1, 0.05, prunable=filters.floating),
        ):
            tx = optax.chain(prox, optax.sgd(0.05))
            w, state = fit(tx, loss, jnp.full(X.shape[1], 0.3, jnp.float64))
            assert_same_solution(w, lasso("random0", 0.1), atol=1e-10)
            assert float(state[0].learning_rate) == pytest.approx(0.05, rel=1e-9)


def test_l1_prox_takes_a_missing_gradient_for_a_bias():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    grads = {"w": jnp.ones((2, 2)), "b": None}
    for tx in (sj.l1_prox(0.1), sj.proximal(optax.sgd(0.1), penalties.l1(0.1), 0.1)):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert updates["b"] is None


def test_l1_prox_at_another_rate_ends_within_rounding_of_zero():
    """What `prox` says of rates that are no power of two, under jit and noise."""
    rate = 0.1
    tx = optax.chain(sj.l1_prox(0.2), optax.sgd(rate))
    assert noisy(tx, 400, within=1e-6) == pytest.approx(
        noisy(sj.proximal(optax.sgd(rate), penalties.l1(0.2), rate), 400), abs=0.05
    )


def test_l1_prox_of_bfloat16_does_not_trust_coarse_movements():
    tx = optax.chain(sj.l1_prox(0.1), optax.sgd(1e-3))
    loss = lambda p: 0.5 * jnp.sum((p["w"] - 1) ** 2)  # noqa: E731
    w, state = fit(tx, loss, {"w": jnp.full((8, 8), 0.3, jnp.bfloat16)}, 50)
    assert w["w"].dtype == jnp.bfloat16 and state[0].fit < 0.99


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_penalized_and_proximal_zero_half_precision_exactly(dtype):
    w = {"w": jnp.full((4, 4), 0.3, dtype)}
    for tx in (
        sj.penalized(optax.adam(0.05), penalties.l1(5.0)),
        sj.proximal(optax.sgd(0.1), penalties.l1(5.0), 0.1),
    ):
        state, params = tx.init(w), w
        for _ in range(30):
            updates, state = tx.update({"w": params["w"] - 1}, state, params)
            params = optax.apply_updates(params, updates)
        assert params["w"].dtype == dtype and not np.any(params["w"])


TRANSFORMS = {
    "l1_prox": lambda: optax.chain(sj.l1_prox(0.1), optax.sgd(0.1)),
    "l1_prox, learning rate given": lambda: optax.chain(sj.l1_prox(0.1, 0.1), optax.sgd(0.1)),
    "l2_prox": lambda: optax.chain(sj.l2_prox(0.1), optax.sgd(0.1)),
    "elastic_net_prox": lambda: optax.chain(sj.elastic_net_prox(0.1, 0.1), optax.sgd(0.1)),
    "penalized": lambda: sj.penalized(optax.adam(0.1), penalties.l1(0.1)),
    "proximal": lambda: sj.proximal(optax.sgd(0.1), penalties.l1(0.1), 0.1),
}
PARAMS = {
    "w": jnp.linspace(-1, 1, 12).reshape(3, 4),
    "b": jnp.ones(4),
    "scalar": jnp.float32(2),
    "empty": jnp.zeros((0, 2)),
    "none": None,
}


def quadratic(params):
    return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(params))


@pytest.fixture(params=TRANSFORMS)
def tx(request):
    return TRANSFORMS[request.param]()


def test_transform_eager_equals_jit(tx):
    eager = jitted = (PARAMS, tx.init(PARAMS))

    def step(params, state):
        updates, state = tx.update(jax.grad(quadratic)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        eager, jitted = step(*eager), jax.jit(step)(*jitted)
    chex.assert_trees_all_close(eager[0], jitted[0], rtol=1e-5, atol=1e-6)


def test_transform_does_not_trace_twice(tx):
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(quadratic)(params), state, params)
        return optax.apply_updates(params, updates), state

    carry = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        carry = step(*carry)
    assert len(traces) == 1


def test_transform_state_can_be_donated(tx):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(quadratic)(params), state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    expected = step(*step(PARAMS, tx.init(PARAMS)))[0]
    own = jax.tree.map(jnp.copy, PARAMS)
    chex.assert_trees_all_equal(donating(*donating(own, tx.init(own)))[0], expected)


def test_transform_keeps_structure_and_dtypes(tx):
    updates, state = tx.update(jax.grad(quadratic)(PARAMS), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))


def test_transform_has_an_abstract_init(tx):
    shapes = jax.eval_shape(tx.init, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tx.init(PARAMS))


def test_transform_works_under_vmap(tx):
    def two_steps(offset):
        params = jax.tree.map(lambda x: x + offset, PARAMS)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(quadratic)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    batched = jax.vmap(two_steps)(jnp.array([0.0, 0.25]))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[1], batched), two_steps(jnp.float32(0.25)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_transform_keeps_the_sharding_of_params(tx, axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    dense = {"w": jnp.linspace(-1, 1, 64).reshape(4, 16)}
    sharded = jax.device_put(dense, sharding)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(quadratic)(params), state, params)
        return optax.apply_updates(params, updates), state

    one, many = (step(*step(p, tx.init(p)))[0]["w"] for p in (dense, sharded))
    assert many.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-6)


def test_penalized_gives_the_inner_optimizer_the_penalized_objective():
    """L-BFGS with a line search reads value, grad and value_fn; the lasso comes out."""
    loss = half_mean_squared("diabetes")
    tx = sj.penalized(optax.lbfgs(), penalties.l1(0.1, prunable=filters.floating))
    w = start("diabetes")
    state = tx.init(w)

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(loss)(w)
        updates, state = tx.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(w, updates), state

    for _ in range(100):
        w, state = step(w, state)
    assert_same_solution(w, lasso("diabetes", 0.1), atol=1e-4)


def test_proximal_passes_unpenalized_steps_bit_for_bit():
    tx = sj.proximal(optax.sgd(0.1), penalties.l1(0.5), 0.1)
    grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates["b"], -0.1 * grads["b"])


def test_multi_steps_around_a_chain_with_l1_prox_makes_zeros():
    tx = optax.MultiSteps(optax.chain(sj.l1_prox(5.0), optax.sgd(0.1)), 2)
    w, _ = fit(tx, lambda p: 0.5 * jnp.sum(p["w"] ** 2), {"w": jnp.full((2, 2), 0.3)}, 60)
    assert not np.any(w["w"])
