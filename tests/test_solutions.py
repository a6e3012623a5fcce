"""`penalized` and `proximal` with every kind of optimizer: the solutions that others find.

scikit-learn for L1, the elastic net and multinomial logistic regression; celer and skglm for
groups, MCP and SCAD (golden, `scripts/make_group_golden.py`). Real data; all strengths of a problem
are solved in one program.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression

import sparsejax as sj
from sparsejax import filters, metrics, penalties

STEPS = 8000
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/group_lasso.json").read_text())
everything = {"prunable": filters.floating}

# Optimizer from its rate, the rate for least squares and for logistic regression, metric.
OPTIMIZERS = {
    "sgd": (optax.sgd, 0.1, 0.5, None),
    "momentum": (lambda rate: optax.sgd(rate, 0.9), 0.02, 0.1, metrics.momentum(0.9)),
    "adam": (optax.adam, 0.02, 0.02, metrics.adam()),
    "adamw": (lambda rate: optax.adamw(rate, weight_decay=0), 0.02, 0.02, metrics.adam()),
    "rmsprop": (optax.rmsprop, 0.01, 0.01, metrics.rmsprop()),
}


def standardized(x):
    return (x - x.mean(0)) / x.std(0)


DATA = {
    "diabetes": tuple(map(standardized, load_diabetes(return_X_y=True))),
    # Its last column, proline, from the others.
    "wine": (standardized(load_wine().data[:, :-1]), standardized(load_wine().data[:, -1])),
}


def half_mean_squared(data):
    X, y = (jnp.asarray(x, jnp.float32) for x in DATA[data])
    return lambda w: 0.5 * jnp.mean(jnp.square(y - X @ w))


def solve(loss, start, strengths, transform, steps=STEPS):
    """The solutions of all strengths, stacked."""

    def one(strength):
        tx = transform(strength)

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (start, tx.init(start)), None, steps)[0][0]

    return jax.jit(jax.vmap(one))(jnp.asarray(strengths, jnp.float32))


def transform_of(how, optimizer, penalty, *, logistic=False, steps=STEPS):
    make, *rates, metric = OPTIMIZERS[optimizer]
    rate = optax.cosine_decay_schedule(rates[logistic], steps)
    if how == "penalized":
        return lambda strength: sj.penalized(make(rate), penalty(strength))
    return lambda strength: sj.proximal(make(rate), penalty(strength), rate, metric=metric)


def assert_same(ours, reference, objective, atol=1e-4):
    """The same support exactly, the solution within 1e-4, the objective no worse than 1e-6."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    np.testing.assert_array_equal(ours != 0, reference != 0)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=atol)
    assert objective(ours) <= objective(reference) * (1 + 1e-6)


def solved_by(model, strengths, data="diabetes"):
    X, y = DATA[data]
    return [model(s).fit(X, y).coef_ for s in strengths]


def exact(model, **options):
    return model(fit_intercept=False, tol=1e-13, max_iter=10**6, **options)


STRENGTHS = (0.01, 0.05, 0.2)
LEAST_SQUARES = {
    "lasso": (
        lambda s: penalties.l1(s, **everything),
        lambda: solved_by(lambda s: exact(Lasso, alpha=s), STRENGTHS),
    ),
    "elastic net": (
        lambda s: penalties.elastic_net(0.6 * s, 0.4 * s, **everything),
        lambda: solved_by(lambda s: exact(ElasticNet, alpha=s, l1_ratio=0.6), STRENGTHS),
    ),
}


def objective_of(data, penalty):
    X, y = DATA[data]

    def objective(w):
        # The loss in float64; in float32 it is rounded by 1e-7 itself.
        value = float(penalty.value(jnp.asarray(w, jnp.float32)))
        return 0.5 * np.mean(np.square(y - X @ np.asarray(w, np.float64))) + value

    return objective


@pytest.mark.parametrize("how", ["penalized", "proximal"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", LEAST_SQUARES)
def test_least_squares_has_the_solution_of_scikit_learn(problem, optimizer, how):
    penalty, reference = LEAST_SQUARES[problem]
    transform = transform_of(how, optimizer, penalty)
    found = solve(half_mean_squared("diabetes"), jnp.full(10, 0.3), STRENGTHS, transform)
    for strength, ours, theirs in zip(STRENGTHS, found, reference(), strict=True):
        assert_same(ours, theirs, objective_of("diabetes", penalty(strength)))


def labels(data):
    groups = GOLDEN["problems"][data]["groups"]
    column = np.zeros(sum(map(len, groups)), int)
    for number, members in enumerate(groups):
        column[members] = number
    return column


GOLDEN_PENALTIES = {
    "group_lasso": lambda data, s: penalties.group_lasso(s, labels(data)),
    "sparse_group_lasso": lambda data, s: penalties.sparse_group_lasso(
        0.3 * s, 0.7 * s, labels(data)
    ),
    "mcp": lambda data, s: penalties.mcp(s, 3.0, **everything),
    "scad": lambda data, s: penalties.scad(s, 3.7, **everything),
}


def golden_case(data, kind, optimizer, how):
    solutions = GOLDEN["problems"][data][kind]["solutions"]
    strengths = [x["strength"] for x in solutions]
    transform = transform_of(how, optimizer, lambda s: GOLDEN_PENALTIES[kind](data, s))
    # Concave penalties have many stationary points: from zero, as the reference has it.
    columns = len(solutions[0]["coefficients"])
    start = jnp.zeros(columns) if kind in ("mcp", "scad") else jnp.full(columns, 0.3)
    found = solve(half_mean_squared(data), start, strengths, transform)
    for ours, solution in zip(found, solutions, strict=True):
        penalty = GOLDEN_PENALTIES[kind](data, solution["strength"])
        assert_same(ours, solution["coefficients"], objective_of(data, penalty))


@pytest.mark.parametrize("how", ["penalized", "proximal"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("data", DATA)
def test_group_lasso_has_the_solution_of_celer(data, optimizer, how):
    golden_case(data, "group_lasso", optimizer, how)


@pytest.mark.parametrize(
    ("kind", "optimizer", "how"),
    [
        ("sparse_group_lasso", "sgd", "penalized"),
        ("sparse_group_lasso", "sgd", "proximal"),
        ("sparse_group_lasso", "adam", "penalized"),
        ("sparse_group_lasso", "adam", "proximal"),
        # What is not convex has other stationary points, which other paths end at.
        ("mcp", "sgd", "penalized"),
        ("mcp", "sgd", "proximal"),
        ("mcp", "momentum", "penalized"),
        ("scad", "sgd", "penalized"),
        ("scad", "sgd", "proximal"),
        ("scad", "momentum", "penalized"),
    ],
)
def test_other_penalties_have_the_solution_of_skglm(kind, optimizer, how):
    golden_case("diabetes", kind, optimizer, how)


@pytest.mark.parametrize("how", ["penalized", "proximal"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_multinomial_regression_has_the_solution_of_scikit_learn(optimizer, how):
    X, classes = load_wine(return_X_y=True)
    X, strengths, steps = standardized(X), (0.02, 0.1), 12_000
    x = jnp.asarray(X, jnp.float32)

    def loss(p, xp=x):
        logits = xp @ p["w"] + p["b"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

    transform = transform_of(how, optimizer, penalties.l1, logistic=True, steps=steps)
    start = {"b": jnp.zeros(3), "w": jnp.zeros((13, 3))}
    found = solve(loss, start, strengths, transform, steps)
    for i, strength in enumerate(strengths):
        model = LogisticRegression(
            C=1 / (len(classes) * strength), l1_ratio=1, solver="saga", tol=1e-9, max_iter=10**6
        ).fit(X, classes)

        def objective(w, b, s=strength):
            z = X @ np.asarray(w, np.float64) + np.asarray(b, np.float64)
            z -= z.max(1, keepdims=True)
            likelihood = z[np.arange(len(z)), classes] - np.log(np.exp(z).sum(1))
            return -likelihood.mean() + s * np.abs(w).sum()

        ours = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), found)
        np.testing.assert_array_equal(ours["w"] != 0, model.coef_.T != 0)
        np.testing.assert_allclose(ours["w"], model.coef_.T, rtol=0, atol=1e-4)
        best = objective(model.coef_.T, model.intercept_)
        assert objective(ours["w"], ours["b"]) <= best * (1 + 1e-6)


def test_proximal_with_momentum_and_no_metric_solves_another_problem():
    """λ(1 - μ): why there is a metric."""
    rate = optax.cosine_decay_schedule(0.02, STEPS)
    loss, start = half_mean_squared("diabetes"), jnp.full(10, 0.3)

    def transform(s):
        return sj.proximal(optax.sgd(rate, 0.9), penalties.l1(s, **everything), rate)

    (found,) = solve(loss, start, [0.2], transform)
    (reference,) = solved_by(lambda s: exact(Lasso, alpha=s), [0.2 * (1 - 0.9)])
    np.testing.assert_allclose(found, reference, atol=1e-4)


def test_proximal_solves_groups_near_zero_at_a_constant_rate():
    """A group of norm 0.04, where the half-space rule circles with plain SGD."""
    column = np.array([0, 1, 1, 1, 2, 2, 3, 3, 3, 3])
    strength = 0.9 * GOLDEN["problems"]["diabetes"]["group_lasso"]["strength_max"]
    rates = {"decaying": optax.cosine_decay_schedule(0.1, STEPS), "constant": 0.1}

    def found(how, rate):
        def transform(s):
            if how == "penalized":
                return sj.penalized(optax.sgd(rates[rate]), penalties.group_lasso(s, column))
            return sj.proximal(optax.sgd(0.1), penalties.group_lasso(s, column), 0.1)

        return solve(half_mean_squared("diabetes"), jnp.full(10, 0.3), [strength], transform)[0]

    reference = found("penalized", "decaying")
    np.testing.assert_allclose(found("proximal", "constant"), reference, atol=1e-6)
    assert np.max(np.abs(found("penalized", "constant") - reference)) > 1e-3


@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_decoupled_decay_behind_sgd_is_an_l2_penalty(decay):
    def transform(s):
        sgd = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1))
        return sj.penalized(sgd, penalties.l1(s, **everything))

    (found,) = solve(half_mean_squared("diabetes"), jnp.full(10, 0.3), [0.05], transform)
    model = exact(ElasticNet, alpha=0.05 + decay, l1_ratio=0.05 / (0.05 + decay))
    np.testing.assert_allclose(found, model.fit(*DATA["diabetes"]).coef_, atol=1e-5)


def test_decoupled_decay_behind_adam_hardly_moves_the_solution():
    rate = optax.cosine_decay_schedule(0.02, STEPS)

    def transform(s):
        return sj.penalized(optax.adamw(rate, weight_decay=0.1), penalties.l1(s, **everything))

    (found,) = solve(half_mean_squared("diabetes"), jnp.full(10, 0.3), [0.05], transform)
    (reference,) = solved_by(lambda s: exact(Lasso, alpha=s), [0.05])
    np.testing.assert_array_equal(np.asarray(found) != 0, reference != 0)
    np.testing.assert_allclose(found, reference, atol=1e-4)


def test_accumulation_belongs_outside_penalized():
    """Two halves of the data in turn: the lasso of all of it."""
    X, y = (jnp.asarray(x, jnp.float32) for x in DATA["diabetes"])
    tx = optax.MultiSteps(sj.penalized(optax.sgd(0.1), penalties.l1(0.05, **everything)), 2)

    def step(carry, half):
        w, state = carry
        grads = jax.grad(lambda w: 0.5 * jnp.mean(jnp.square(y[half] - X[half] @ w)))(w)
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    halves = jnp.tile(jnp.arange(442).reshape(221, 2).T, (3000, 1))
    start = jnp.full(10, 0.3)
    (w, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, halves))((start, tx.init(start)))
    (reference,) = solved_by(lambda s: exact(Lasso, alpha=s), [0.05])
    np.testing.assert_array_equal(np.asarray(w) != 0, reference != 0)
    np.testing.assert_allclose(w, reference, atol=1e-5)


def test_strengths_by_entry_are_those_of_a_rescaled_lasso():
    """λᵢ|wᵢ| is the lasso of columns divided by λᵢ."""
    X, y = DATA["diabetes"]
    factors = np.linspace(0.5, 2, X.shape[1])
    reference = exact(Lasso, alpha=0.05).fit(X / factors, y).coef_ / factors
    strengths = jnp.asarray(0.05 * factors, jnp.float32)

    def transform(_):
        return sj.penalized(optax.sgd(0.1), penalties.l1(strengths, **everything))

    (found,) = solve(half_mean_squared("diabetes"), jnp.full(10, 0.3), [0.0], transform)
    np.testing.assert_array_equal(np.asarray(found) != 0, reference != 0)
    np.testing.assert_allclose(found, reference, atol=1e-5)


def minibatch_lasso(optimizer, gradient_decay):
    """Entries outside and inside the true support that are not zero at the end, and the error."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((2000, 100)) + 0.5 * rng.standard_normal((2000, 1))
    truth = np.where(rng.random(100) < 0.2, rng.standard_normal(100), 0)
    y = standardized(X @ truth + 2 * rng.standard_normal(2000))
    X = standardized(X)
    reference = exact(Lasso, alpha=0.02).fit(X, y).coef_
    x, t = jnp.asarray(X, jnp.float32), jnp.asarray(y, jnp.float32)
    batches = jax.random.randint(jax.random.key(0), (8000, 32), 0, 2000)
    penalty = penalties.l1(0.02, **everything)
    tx = sj.penalized(optimizer, penalty, gradient_decay=gradient_decay)

    def step(carry, batch):
        w, state = carry
        grads = x[batch].T @ (x[batch] @ w - t[batch]) / 32
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    start = jnp.zeros(100)
    (w, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, batches))((start, tx.init(start)))
    w = np.asarray(w)
    return np.sum((w != 0) & (reference == 0)), np.abs(w - reference).max()


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_gradient_decay_keeps_entries_at_zero_under_minibatch_noise(optimizer):
    rate = optax.cosine_decay_schedule(0.02, 8000)
    tx = {
        "sgd": optax.sgd(rate),
        "momentum": optax.sgd(lambda step: 0.1 * rate(step), 0.9),
        "adam": optax.adam(lambda step: 0.2 * rate(step)),
    }[optimizer]
    (noisy, error), (calm, calm_error) = (minibatch_lasso(tx, decay) for decay in (0.0, 0.99))
    assert noisy > 50 and calm <= 5
    assert calm_error < error + 2e-3 < 0.02
