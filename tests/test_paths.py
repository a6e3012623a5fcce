"""Paths and cross-validation against scikit-learn; killed runs; every error."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from paths_worker import STRENGTHS, diabetes, soft, steps, validate
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LassoCV, LogisticRegression, LogisticRegressionCV, lasso_path
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

import sparsejax as sj
from sparsejax import filters, masking, paths, penalties

pytestmark = pytest.mark.usefixtures("quickly")
l1 = functools.partial(penalties.l1, prunable=filters.floating)
strength_path = functools.partial(paths.strength_path, progress=False)
batched_path = functools.partial(paths.batched_path, progress=False)
cross_validate = functools.partial(paths.cross_validate, progress=False)
vectors = functools.partial(strength_path, prunable=filters.floating)

X, Y = diabetes()
ZEROS = jnp.zeros(10)
KEY = jax.random.key(0)


def half_mse(w, data):
    return 0.5 * jnp.mean((data[0] @ w - data[1]) ** 2)


def nesterov(rate, momentum, penalty):
    sgd = optax.sgd(rate, momentum=momentum, nesterov=True)
    return lambda strength: sj.penalized(sgd, penalty(strength))


LASSO = paths.minimizer(half_mse, nesterov(0.24, 0.9, l1), steps=3000)
MAX = paths.max_strength(jax.grad(half_mse)(ZEROS, (X, Y)), l1)


def shrink(strength, w, data, key):
    """A fit at no cost: one soft-thresholding, of noisy data where there is a key."""
    if key is not None:
        data = data + jax.random.normal(key, data.shape)
    return soft(jnp.mean(data, axis=0), strength).astype(w.dtype)


def distance(w, data):
    return jnp.mean((data - w[None]) ** 2)


POINTS = np.random.default_rng(0).normal(1, 1, (12, 3)).astype(np.float32)
shrunk = functools.partial(vectors, shrink, [1.0, 0.5], jnp.zeros(3), POINTS)
chosen = functools.partial(
    cross_validate, shrink, distance, [1.0, 0.5], jnp.zeros(3), POINTS, prunable=filters.floating
)


# The lasso on diabetes.


@pytest.fixture(scope="module")
def lasso():
    return vectors(LASSO, paths.log_grid(MAX, 50), ZEROS, (X, Y), score=half_mse)


@pytest.fixture(scope="module")
def lasso_oracle(lasso):
    x, y = X.astype(float), Y.astype(float)
    return lasso_path(x, y, alphas=lasso.strengths, tol=1e-12, max_iter=100_000)[1].T


def test_max_strength_is_the_largest_gradient_for_l1():
    assert np.float32(MAX) == np.abs(jax.grad(half_mse)(ZEROS, (X, Y))).max()
    assert pytest.approx(np.abs(X.T @ Y).max() / len(Y), rel=1e-6) == MAX


def test_strength_path_is_lasso_path(lasso, lasso_oracle):
    np.testing.assert_allclose(lasso.params, lasso_oracle, atol=1e-3)


def test_strength_path_has_the_support_of_lasso_path(lasso, lasso_oracle):
    assert np.mean(np.all((lasso.params != 0) == (lasso_oracle != 0), axis=1)) >= 0.95


def test_strength_path_begins_where_all_is_zero(lasso):
    assert lasso.sparsity[0] == 1 and lasso.sparsity[1] < 1


def test_strength_path_counts_zeros(lasso):
    np.testing.assert_array_equal(lasso.sparsity, np.mean(lasso.params == 0, axis=1))


def test_strength_path_scores_on_the_data(lasso):
    residuals = lasso.params @ X.T - Y
    np.testing.assert_allclose(lasso.loss, 0.5 * np.mean(residuals**2, axis=1), rtol=1e-5)


def test_strength_path_without_a_score_has_nan_losses():
    assert np.isnan(shrunk().loss).all()


def test_batched_path_is_the_sequential_one(lasso):
    batched = batched_path(LASSO, lasso.strengths, ZEROS, (X, Y), prunable=filters.floating)
    np.testing.assert_allclose(batched.params, lasso.params, atol=1e-3)
    np.testing.assert_array_equal(batched.sparsity, lasso.sparsity)


def test_batched_path_over_devices_is_that_on_one(lasso):
    some = paths.log_grid(MAX, 11)  # no multiple of 8
    one, eight = (
        batched_path(LASSO, some, ZEROS, (X, Y), prunable=filters.floating, devices=devices)
        for devices in (None, jax.devices())
    )
    assert eight.params.shape == (11, 10) and jax.device_count() == 8
    np.testing.assert_allclose(eight.params, one.params, atol=1e-4)
    np.testing.assert_array_equal(eight.sparsity, one.sparsity)


@pytest.mark.parametrize("path", [paths.strength_path, paths.batched_path])
def test_cross_validate_chooses_as_lasso_cv(path):
    grid = paths.log_grid(MAX, 20, 3e-3)
    folds = list(KFold(5, shuffle=True, random_state=0).split(X))
    found = cross_validate(
        LASSO,
        lambda w, data: 2 * half_mse(w, data),
        grid,
        ZEROS,
        (X, Y),
        folds=folds,
        path=path,
        prunable=filters.floating,
    )
    oracle = LassoCV(alphas=grid, cv=folds, tol=1e-10, max_iter=100_000, fit_intercept=False)
    oracle.fit(X.astype(float), Y.astype(float))
    assert found.best_strength == oracle.alpha_ and 0 < found.best < len(grid) - 1
    np.testing.assert_allclose(found.scores.T, oracle.mse_path_, rtol=1e-5)


# Logistic regression with L1 on breast cancer; the intercept goes free.

CANCER, LABELS = load_breast_cancer(return_X_y=True)
CANCER = (CANCER - CANCER.mean(0)) / CANCER.std(0)
EXAMPLES = {"x": CANCER.astype(np.float32), "y": LABELS.astype(np.float32)}
LOG_ODDS = {"b": jnp.float32(np.log(LABELS.mean() / (1 - LABELS.mean()))), "w": jnp.zeros(30)}
slopes = functools.partial(penalties.l1, prunable=filters.by_path("w"))
liblinear = {
    "solver": "liblinear",
    "tol": 1e-9,
    "max_iter": 50_000,
    "random_state": 0,
    "intercept_scaling": 1e4,  # it penalizes the intercept by one part in this
}


def mean_loss(params, data):
    logits = data["x"] @ params["w"] + params["b"]
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, data["y"]))


def sum_loss(params, data):
    """Per 455 examples: scikit-learn's C is by the sum, λ = 1 / (455 C) on any fold."""
    return mean_loss(params, data) * len(data["y"]) / 455


LOGISTIC = paths.minimizer(sum_loss, nesterov(0.25, 0.99, slopes), steps=10_000)
LOGISTIC_MAX = paths.max_strength(jax.grad(sum_loss)(LOG_ODDS, EXAMPLES), slopes)


def test_max_strength_leaves_the_intercept_alone():
    pull = CANCER.T @ (LABELS - LABELS.mean()) / 455
    assert pytest.approx(np.abs(pull).max(), rel=1e-6) == LOGISTIC_MAX


def test_strength_path_is_logistic_regression():
    # Further down the columns are nearly collinear, and scikit-learn's own solvers differ by more.
    grid = paths.log_grid(LOGISTIC_MAX, 10, 1e-2)
    path = strength_path(LOGISTIC, grid, LOG_ODDS, EXAMPLES, prunable=filters.by_path("w"))
    oracles = [
        LogisticRegression(C=1 / (455 * s), l1_ratio=1, **liblinear).fit(CANCER, LABELS)
        for s in grid
    ]
    np.testing.assert_allclose(path.params["w"], [o.coef_[0] for o in oracles], atol=1e-3)
    np.testing.assert_allclose(path.params["b"], [o.intercept_[0] for o in oracles], atol=1e-3)


def test_cross_validate_chooses_as_logistic_regression_cv():
    grid = paths.log_grid(LOGISTIC_MAX, 8, 3e-3)
    cs = 1 / (455 * grid)
    folds = list(StratifiedKFold(3, shuffle=True, random_state=2).split(CANCER, LABELS))
    found = cross_validate(
        LOGISTIC,
        mean_loss,
        grid,
        LOG_ODDS,
        EXAMPLES,
        folds=folds,
        prunable=filters.by_path("w"),
    )
    oracle = LogisticRegressionCV(
        Cs=cs,
        cv=folds,
        l1_ratios=[1],
        scoring="neg_log_loss",
        use_legacy_attributes=False,
        **liblinear | {"tol": 1e-6},
    ).fit(CANCER, LABELS)
    assert 0 < found.best < len(cs) - 1
    assert cs[found.best] == pytest.approx(oracle.C_, rel=1e-12)
    np.testing.assert_allclose(-found.scores, oracle.scores_[:, 0], rtol=5e-3)


# The grid, and the largest strength.


def test_log_grid_is_geometric_and_exact_at_its_ends():
    grid = paths.log_grid(3.0, 7, 0.01)
    assert (grid[0], grid[-1]) == (3.0, 0.03)
    np.testing.assert_allclose(grid[1:] / grid[:-1], 0.01 ** (1 / 6))


def test_log_grid_of_one_is_the_largest():
    assert paths.log_grid(3.0, 1).tolist() == [3.0]


def test_max_strength_of_an_elastic_net_is_by_its_l1_part():
    grads = {"w": jnp.array([[0.5, -3.0]])}
    found = paths.max_strength(grads, lambda s: penalties.elastic_net(0.5 * s, 0.5 * s))
    assert found == 6


def test_max_strength_keeps_all_at_zero_and_the_float_below_does_not():
    grads = {"w": jnp.array([[0.7, -0.3]])}

    def pen(strength):
        return penalties.elastic_net(0.3 * strength, 0.0)

    found = np.float32(paths.max_strength(grads, pen))
    for strength, kept in ((found, True), (np.nextafter(found, np.float32(0)), False)):
        at_zero = jax.jit(lambda s: pen(s).subgradient(grads, {"w": jnp.zeros((1, 2))}))(strength)
        assert bool(jnp.all(at_zero["w"] == 0)) is kept


def test_max_strength_of_groups_is_by_their_norm():
    grads = {"w": jnp.array([[3.0, 1.0], [4.0, 1.0]])}
    found = paths.max_strength(grads, lambda s: penalties.group_lasso(s, weight=lambda size: 1.0))
    assert found == pytest.approx(5, rel=1e-6)  # of the columns


def test_max_strength_of_zero_gradients_is_zero():
    assert paths.max_strength({"w": jnp.zeros((2, 2))}, penalties.l1) == 0


# What a minimizer does.


def test_minimizer_compiles_once_for_a_path():
    traces = []

    def loss(w, data):
        traces.append(0)
        return half_mse(w, data)

    fit = paths.minimizer(loss, nesterov(0.24, 0.9, l1), steps=5)
    vectors(fit, [3.0, 2.0, 1.0], ZEROS, (X, Y))
    first = len(traces)
    vectors(fit, [5.0, 4.0], ZEROS, (X, Y))
    assert len(traces) == first


def test_minimizer_serves_line_searches():
    fit = paths.minimizer(half_mse, lambda s: optax.lbfgs(), steps=200)
    found = fit(0.0, ZEROS, (X, Y), None)
    np.testing.assert_allclose(found, np.linalg.lstsq(X, Y, rcond=None)[0], rtol=1e-3)


def test_minimizer_stops_after_its_steps():
    fit = paths.minimizer(lambda w, d: jnp.sum(w), lambda s: optax.sgd(1.0), steps=7)
    assert fit(0.0, jnp.zeros(1), None, None).tolist() == [-7]


def test_minimizer_stops_when_nothing_moves():
    # Every step moves by 1 until 3 are done, then by 1e-3, which the tolerance takes for rest.
    rate = optax.piecewise_constant_schedule(1.0, {3: 1e-3})
    fit = paths.minimizer(
        lambda w, d: jnp.sum(w), lambda s: optax.sgd(rate), steps=10_000, tolerance=1e-2
    )
    assert fit(0.0, jnp.zeros(1), None, None)[0] == pytest.approx(-3.01)


def test_minimizer_stops_at_nan():
    fit = paths.minimizer(
        lambda w, d: jnp.sum(jnp.sqrt(w)), lambda s: optax.sgd(1.0), steps=2**31 - 1
    )
    assert jnp.isnan(fit(0.0, -jnp.ones(1), None, None)[0])


# Starts, keys, and what params are made of.


def plus(strength, w, data, key):
    return w + strength


def test_strength_path_begins_at_the_previous_fit():
    assert vectors(plus, [1.0, 2.0, 4.0], jnp.zeros(1)).params.ravel().tolist() == [1, 3, 7]


def test_strength_path_begins_at_the_start_where_told():
    found = vectors(plus, [1.0, 2.0, 4.0], jnp.zeros(1), begin="start")
    assert found.params.ravel().tolist() == [1, 2, 4]


@pytest.mark.parametrize("path", [strength_path, batched_path])
def test_path_gives_fit_i_the_key_folded_with_i(path):
    def draw(strength, w, data, key):
        return jax.random.normal(key, w.shape)

    found = path(draw, [3.0, 2.0, 1.0], jnp.zeros(2), key=KEY, prunable=filters.floating)
    wanted = [jax.random.normal(jax.random.fold_in(KEY, i), (2,)) for i in range(3)]
    np.testing.assert_array_equal(found.params, np.stack(wanted))


def test_path_without_a_key_cannot_draw():
    def draw(strength, w, data, key):
        return jax.random.normal(key, w.shape)

    with pytest.raises(TypeError):
        vectors(draw, [1.0], jnp.zeros(2))


@pytest.mark.parametrize("path", [strength_path, batched_path])
def test_path_keeps_dtypes_structure_and_what_is_no_array(path, tmp_path):
    start = {
        "f": jax.nn.relu,
        "half": jnp.ones((2, 2), jnp.bfloat16),
        "none": None,
        "empty": jnp.zeros((0, 2), jnp.float16),
        "steps": np.arange(3, dtype=np.int8),
        "wide": np.ones((1, 2)),  # float32 in JAX
    }

    def grown(strength, params, data, key):
        return params | {"half": params["half"] * 3, "steps": params["steps"] + 1}

    for _ in range(2):  # fitted, then read
        found = path(grown, [2.0, 1.0], start, folder=tmp_path / "run").params
        assert found["f"] is jax.nn.relu and found["none"] is None
        assert {k: (v.dtype.name, v.shape) for k, v in found.items() if hasattr(v, "dtype")} == {
            "half": ("bfloat16", (2, 2, 2)),
            "empty": ("float16", (2, 0, 2)),
            "steps": ("int8", (2, 3)),
            "wide": ("float32", (2, 1, 2)),
        }
        assert found["half"][0].tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "bool", "complex64"])
def test_folder_gives_every_bit_back(dtype, tmp_path):
    bits = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 64, np.uint8)
    random = bits.view(jnp.dtype(dtype))  # NaNs with payloads, denormals
    params = {"w": jnp.ones((1, 1)), "x": random}
    runs = [
        strength_path(lambda s, p, d, k: p, [1.0], params, folder=tmp_path / "run").params["x"]
        for _ in range(2)
    ]
    assert all(x.tobytes() == random.tobytes() for x in runs)


def test_strength_path_takes_the_state_of_a_module():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)

    def scale(strength, params, data, key):
        return jax.tree.map(lambda w: w * strength, params)

    found = strength_path(scale, [1.0, 0.0], state)
    assert found.params["kernel"][...].shape == (2, 2, 3)
    assert found.sparsity.tolist() == [0, 1]


def test_strength_path_puts_warm_starts_where_the_start_was():
    spread = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x")
    )
    seen = []

    def fit(strength, w, data, key):
        seen.append(w.sharding)
        return jax.device_put(w, jax.devices()[0])

    vectors(fit, [2.0, 1.0], jax.device_put(jnp.zeros(8), spread))
    assert seen == [spread, spread]


# Folds and the choice.


def test_cross_validate_splits_by_a_shuffled_kfold():
    parts = []

    def look(strength, w, data, key):
        parts.append(data)
        return w

    data = np.arange(12.0, dtype=np.float32)[:, None]
    cross_validate(
        look, lambda w, d: parts.append(d) or 0.0, [1.0], jnp.zeros(1), data, folds=3, key=KEY,
        prunable=filters.floating
    )  # fmt: skip
    train, test = parts[::2], parts[1::2]
    assert sorted(np.concatenate(test).ravel()) == list(range(12)) and len(test) == 3
    assert all(
        set(a.ravel()) | set(b.ravel()) == set(range(12)) for a, b in zip(train, test, strict=True)
    )
    assert np.concatenate(test).ravel().tolist() != list(range(12))


def test_cross_validate_is_the_same_for_the_same_key_and_another_for_another():
    first, again, other = (chosen(folds=3, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first.scores, again.scores)
    assert (first.scores != other.scores).all()


def test_cross_validate_gives_each_fit_a_key_of_its_fold_and_place():
    keys = []

    def fit(strength, w, data, key):
        keys.append(key)
        return w

    cross_validate(
        fit, distance, [2.0, 1.0], jnp.zeros(3), POINTS, key=KEY, folds=KFold(3),
        prunable=filters.floating
    )  # fmt: skip
    wanted = [jax.random.fold_in(jax.random.fold_in(KEY, j), i) for j in range(3) for i in range(2)]
    assert keys == wanted


def test_cross_validate_takes_splitters_and_their_pairs():
    splitter = chosen(folds=KFold(3))
    pairs = chosen(folds=KFold(3).split(POINTS))
    np.testing.assert_array_equal(splitter.scores, pairs.scores)


def test_cross_validate_makes_a_start_for_each_fold():
    starts = []

    def start(data, key):
        starts.append(key)
        return jnp.mean(data, axis=0)

    found = cross_validate(
        lambda s, w, d, k: w, distance, [1.0], start, POINTS, folds=KFold(3), key=KEY,
        prunable=filters.floating
    )  # fmt: skip
    wanted = [
        np.mean((POINTS[test] - POINTS[train].mean(0)) ** 2)
        for train, test in KFold(3).split(POINTS)
    ]
    np.testing.assert_allclose(found.scores[:, 0], wanted, rtol=1e-5)
    assert starts == [jax.random.fold_in(jax.random.fold_in(KEY, j), 1) for j in range(3)]


@jax.tree_util.register_pytree_node_class
class Module:
    """A tree that can be called, as Equinox's are."""

    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        raise AssertionError("params were called")

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def test_cross_validate_takes_a_module_for_params():
    cross_validate(
        lambda s, m, d, k: m, lambda m, d: 0.0, [1.0], Module(jnp.zeros(3)), POINTS,
        folds=KFold(2), prunable=filters.floating
    )  # fmt: skip


def table(*rows):
    """A cross-validation whose fits are their strengths, and whose scores are these."""
    strengths = [1.0, 4.0, 3.0, 2.0]
    column = {s: i for i, s in enumerate(strengths)}

    def fit(strength, w, data, key):
        return w * 0 + strength

    def look_up(w, data):
        return rows[int(data[0])][column[float(w[0])]]

    return cross_validate(
        fit, look_up, strengths, jnp.ones(1), np.arange(len(rows)), folds=KFold(len(rows)),
        prunable=filters.floating
    )  # fmt: skip


def test_choice_of_one_standard_error_by_hand():
    # Means 2, 3.5, 2.5, 2; the best's standard error is 1/√3 = 0.577.
    found = table([1.0, 3.5, 2.5, 1.0], [2.0, 3.5, 2.5, 2.0], [3.0, 3.5, 2.5, 3.0])
    np.testing.assert_allclose(found.mean, [2, 3.5, 2.5, 2])
    np.testing.assert_allclose(found.standard_error, [3**-0.5, 0, 0, 3**-0.5])
    assert (found.best, found.one_standard_error) == (3, 2)  # of equal means the stronger
    assert (found.best_strength, found.one_standard_error_strength) == (2, 3)


def test_a_nan_score_is_never_chosen_and_stays_visible():
    found = table([1.0, np.nan, 2.0, 3.0], [1.0, 0.0, 2.0, 3.0])
    assert np.isnan(found.scores[0, 1]) and found.mean[1] == np.inf
    assert np.isnan(found.standard_error[1]) and found.best_strength == 1


def test_scores_that_are_all_nan_are_an_error():
    with pytest.raises(ValueError, match="the fits diverged"):
        table([np.nan] * 4, [1.0] * 4)


# A pruned network, chosen by the same function.


def test_cross_validate_chooses_the_sparsity_of_a_pruned_network():
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    data = {"x": x, "y": np.sin(x[:, :1])}

    def network_loss(params, data):
        out = jnp.tanh(data["x"] @ params["w1"]) @ params["w2"]
        return jnp.mean((out - data["y"]) ** 2)

    @jax.jit
    def train(params, masks, data):
        def step(params, _):
            grads = jax.grad(network_loss)(params, data)
            moved = jax.tree.map(lambda w, g: w - 0.3 * g, params, grads)
            return sj.apply_masks(moved, masks), None

        return jax.lax.scan(step, params, length=100)[0]

    def dense(data, key):
        first, second = jax.random.split(key)
        start = {"w1": jax.random.normal(first, (4, 8)), "w2": jax.random.normal(second, (8, 1))}
        return train(start, jax.tree.map(lambda w: jnp.ones(w.shape, bool), start), data)

    def prune(sparsity, params, data, key):
        masks = masking.topk(jax.tree.map(jnp.abs, params), sparsity)
        return train(sj.apply_masks(params, masks), masks, data)

    found = cross_validate(
        prune, network_loss, [0.0, 0.5, 0.75, 0.95], dense, data, folds=3, key=KEY
    )
    np.testing.assert_array_equal(found.sparsity, np.tile([0, 0.5, 0.75, 38 / 40], (3, 1)))
    assert found.one_standard_error_strength >= found.best_strength
    assert found.mean[3] > found.mean[found.best]


# Folders.


def counted(log):
    def fit(strength, w, data, key):
        log.append(strength)
        return plus(strength, w, data, key)

    return fit


def test_folder_resumes_warm_starts_bit_for_bit(tmp_path):
    grid = [0.1, 0.2, 0.3, 0.4]
    whole, log = vectors(plus, grid, jnp.full(2, 0.1)), []

    def fails(strength, *rest):
        if strength == 0.3:
            raise KeyboardInterrupt
        return plus(strength, *rest)

    with pytest.raises(KeyboardInterrupt):
        vectors(fails, grid, jnp.full(2, 0.1), folder=tmp_path / "run")
    found = vectors(counted(log), grid, jnp.full(2, 0.1), folder=tmp_path / "run")
    assert log == [0.3, 0.4]
    assert found.params.tobytes() == whole.params.tobytes()


def test_folder_of_a_batch_is_read_again(tmp_path):
    log = []
    runs = [
        batched_path(
            counted(log), [2.0, 1.0], jnp.zeros(2), folder=tmp_path, prunable=filters.floating
        )
        for _ in range(2)
    ]
    assert len(log) == 1
    np.testing.assert_array_equal(runs[0].params, runs[1].params)


def test_folder_of_a_cross_validation_keeps_finished_folds(tmp_path):
    first = chosen(folds=3, key=KEY, folder=tmp_path)
    with mock.patch.object(paths, "strength_path", side_effect=AssertionError):
        again = chosen(folds=3, key=KEY, folder=tmp_path, path=paths.strength_path)
    np.testing.assert_array_equal(first.scores, again.scores)


def test_folder_leaves_no_half_written_files(tmp_path):
    shrunk(folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "fit-0000.bin",
        "fit-0001.bin",
        "manifest.json",
    ]


@pytest.mark.long
def test_killed_cross_validation_resumes_to_the_same_result(tmp_path):
    folder, log, out = (tmp_path / name for name in ("run", "log", "out"))
    worker = [sys.executable, str(Path(__file__).with_name("paths_worker.py")), folder, log, out]
    # Compiled as here, where the whole run is made that the bits are compared with.
    quick = str(jax.config.read("jax_disable_most_optimizations"))
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": quick, "JAX_PLATFORMS": "cpu"}
    killed = subprocess.Popen(worker, env=environment)
    while not log.exists() or len(log.read_text().splitlines()) < 6:  # in the second fold
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not out.exists() and (folder / "fold-0.bin").exists()
    begun = len(log.read_text().splitlines())
    done = len(list(folder.glob("fold-*/fit-*.bin")))
    assert 0 < done <= begun < len(STRENGTHS) * 3
    subprocess.run(worker, env=environment, check=True)
    assert len(log.read_text().splitlines()) == begun + len(STRENGTHS) * 3 - done
    whole = validate(steps, None)
    assert out.read_bytes() == whole.scores.tobytes() + whole.sparsity.tobytes()


# Progress.


def test_progress_shows_fold_strength_and_sparsity(capsys):
    chosen(folds=3, key=KEY, progress="prices")
    shown = capsys.readouterr().err
    assert "prices, fold 2 of 3" in shown and "2/2" in shown
    assert "strength 0.5" in shown and "sparsity" in shown


def test_progress_leaves_standard_output_alone(capsys):
    chosen(folds=3, key=KEY, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "fold 3 of 3" in captured.err


def test_progress_of_false_shows_nothing(capsys):
    chosen(folds=3, key=KEY, progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# Errors.


def folds(*pairs):
    return lambda: chosen(folds=[*pairs, ([0], [1])])


def pass_through(strength, params, data, key):
    return params


def fit_giving(answer):
    return lambda: vectors(lambda *_: answer, [1.0], jnp.zeros(3))


ERRORS = {
    "fit is no function": (
        lambda: vectors(3, [1.0], ZEROS),
        TypeError,
        r"`fit` must be a function",
    ),
    "score is no function": (lambda: shrunk(score=1), TypeError, r"`score` must be a function"),
    "strengths are empty": (
        lambda: vectors(plus, [], ZEROS),
        ValueError,
        r"`strengths` must be a list of at least one number, got the shape \(0,\)",
    ),
    "strengths are one": (
        lambda: vectors(plus, 1.0, ZEROS),
        ValueError,
        r"`strengths` must be .*, got the shape \(\)",
    ),
    "strengths are a matrix": (
        lambda: vectors(plus, [[1.0]], ZEROS),
        ValueError,
        r"`strengths` must be .*, got the shape \(1, 1\)",
    ),
    "strengths are negative": (
        lambda: batched_path(plus, [1.0, -1.0], ZEROS, prunable=filters.floating),
        ValueError,
        r"`strengths` must be finite and >= 0, got -1.0 at index 1",
    ),
    "strengths are NaN": (
        lambda: vectors(plus, [np.nan], ZEROS),
        ValueError,
        r"`strengths` must be finite and >= 0, got nan at index 0",
    ),
    "strengths are infinite": (
        lambda: vectors(plus, [np.inf], ZEROS),
        ValueError,
        r"`strengths` must be finite",
    ),
    "strengths are words": (
        lambda: vectors(plus, ["a"], ZEROS),
        TypeError,
        r"`strengths` must be real numbers, got \['a'\]",
    ),
    "begin is another word": (
        lambda: shrunk(begin="cold"),
        ValueError,
        r'`begin` must be "previous" or "start", got \'cold\'',
    ),
    "key is a number": (lambda: shrunk(key=0), TypeError, r"`key` must be a PRNG key"),
    "prunable selects nothing": (
        lambda: strength_path(plus, [1.0], ZEROS),
        ValueError,
        r"`prunable` must select at least one leaf.*filters\.floating",
    ),
    "params are keys": (
        lambda: vectors(plus, [1.0], {"k": KEY, "w": ZEROS}),
        TypeError,
        r"`params` must hold arrays of numbers, got key<fry>\[\] at 'k'",
    ),
    "fit gives another shape": (
        fit_giving(jnp.zeros(4)),
        ValueError,
        r"`fit` must return params like .*, float32\[3\] at '\.', got float32\[4\]",
    ),
    "fit gives another dtype": (
        fit_giving(jnp.zeros(3, jnp.bfloat16)),
        ValueError,
        r"`fit` must return params like .*, got bfloat16\[3\]",
    ),
    "fit gives another tree": (
        fit_giving({"w": jnp.zeros(3)}),
        ValueError,
        r"`fit` must have the structure of `params`: `params` has a leaf at '\.'",
    ),
    "fit gives nothing": (fit_giving(None), ValueError, r"`fit` must return .*, got NoneType"),
    "score gives an array": (
        lambda: shrunk(score=lambda w, d: w),
        TypeError,
        r"`score` must give one real number, got float32\[3\]",
    ),
    "score gives nothing": (
        lambda: shrunk(score=lambda w, d: None),
        TypeError,
        r"`score` must give one real number, got NoneType",
    ),
    "devices are none": (
        lambda: batched_path(plus, [1.0], ZEROS, prunable=filters.floating, devices=[]),
        ValueError,
        r"`devices` must be at least one",
    ),
    "devices are a number": (
        lambda: batched_path(plus, [1.0], ZEROS, prunable=filters.floating, devices=8),
        TypeError,
        r"`devices` must be a list of devices such as jax\.devices\(\), got 8",
    ),
    "folder is a number": (lambda: shrunk(folder=3), TypeError, r"`folder` must be a path, got 3"),
    "data are of no numbers, with a folder": (
        lambda: vectors(pass_through, [1.0], ZEROS, {"f": print}, folder="/no/such"),
        TypeError,
        r"`data` must hold arrays of numbers .* at 'f': let `fit` close over it",
    ),
    "largest is zero": (lambda: paths.log_grid(0.0), ValueError, r"`largest` must be > 0, got 0"),
    "largest is infinite": (
        lambda: paths.log_grid(np.inf),
        ValueError,
        r"`largest` must be finite",
    ),
    "num is zero": (lambda: paths.log_grid(1.0, 0), ValueError, r"`num` must be an integer from 1"),
    "ratio is above 1": (
        lambda: paths.log_grid(1.0, 3, 2.0),
        ValueError,
        r"`ratio` must be in \(0, 1\], the last strength by the first, got 2.0",
    ),
    "penalty is a value": (
        lambda: paths.max_strength({"w": np.ones((1, 1))}, penalties.l1(1.0)),
        TypeError,
        r"`penalty` must be a function strength -> penalty",
    ),
    "penalty gives none": (
        lambda: paths.max_strength({"w": np.ones((1, 1))}, lambda s: s),
        TypeError,
        r"`penalty` must give a penalty with a subgradient for a strength",
    ),
    "penalty has no kink": (
        lambda: paths.max_strength({"w": np.ones((1, 1))}, penalties.l2),
        ValueError,
        r"`penalty` must keep entries at zero where it is strong, as L1 does",
    ),
    "gradient is NaN": (
        lambda: paths.max_strength({"w": np.array([[np.nan]])}, penalties.l1),
        ValueError,
        r"`grads` must be finite, got nan at 'w'",
    ),
    "gradient is of integers": (
        lambda: paths.max_strength({"w": np.array([[1]])}, penalties.l1),
        TypeError,
        r"`grads` must be floating arrays, got int64\[1,1\] at 'w'",
    ),
    "loss is no function": (
        lambda: paths.minimizer(1, optax.sgd, steps=1),
        TypeError,
        r"`loss` must be a function",
    ),
    "transform is one already": (
        lambda: paths.minimizer(half_mse, optax.sgd(0.1), steps=1),
        TypeError,
        r"`transform` must be a function strength -> optax transform",
    ),
    "transform gives none": (
        lambda: paths.minimizer(half_mse, l1, steps=1)(1.0, ZEROS, (X, Y), None),
        TypeError,
        r"`transform` must be an optax\.GradientTransformation",
    ),
    "steps are none": (
        lambda: paths.minimizer(half_mse, optax.sgd, steps=0),
        ValueError,
        r"`steps` must be an integer from 1",
    ),
    "tolerance is negative": (
        lambda: paths.minimizer(half_mse, optax.sgd, steps=1, tolerance=-1),
        ValueError,
        r"`tolerance` must be >= 0",
    ),
    "minimizer of integers": (
        lambda: LASSO(1.0, {"w": np.arange(3)}, None, None),
        TypeError,
        r"`params` must be floating arrays to be minimized over, got int64\[3\] at 'w'",
    ),
    "path is no function": (lambda: chosen(path="fast"), TypeError, r"`path` must be a function"),
    "data differ in length": (
        lambda: cross_validate(
            shrink, distance, [1.0], ZEROS, {"x": np.ones((4, 2)), "y": np.ones(3)}, key=KEY
        ),
        ValueError,
        r"`data` must have as many examples in every array, got 4 at 'x' and 3 at 'y'",
    ),
    "data are missing": (
        lambda: cross_validate(
            shrink, distance, [1.0], ZEROS, {"x": np.ones((4, 2)), "y": None}, key=KEY
        ),
        TypeError,
        r"`data` must hold arrays with the examples along their first axis, got .*None.* at 'y'",
    ),
    "data are a number": (
        lambda: cross_validate(shrink, distance, [1.0], ZEROS, {"x": 3.0}, key=KEY),
        TypeError,
        r"`data` must hold arrays .* at 'x'; what all examples share belongs into `fit`",
    ),
    "data are empty": (
        lambda: cross_validate(shrink, distance, [1.0], ZEROS, {}, key=KEY),
        ValueError,
        r"`data` must hold at least one array",
    ),
    "folds are one": (
        lambda: chosen(folds=1, key=KEY),
        ValueError,
        r"`folds` must be from 2 to 12",
    ),
    "folds are too many": (
        lambda: chosen(folds=13, key=KEY),
        ValueError,
        r"`folds` must be from 2 to 12, the number of examples, got 13",
    ),
    "folds without a key": (
        lambda: chosen(folds=3),
        ValueError,
        r"`key` must be given where `folds` is a number, which shuffles, got None",
    ),
    "folds are a word": (lambda: chosen(folds="five"), TypeError, r"`folds` must be a number, a"),
    "folds are one pair": (folds(), ValueError, r"`folds` must be at least 2, .*, got 1"),
    "folds are no pairs": (folds(3), TypeError, r"`folds` must be pairs .*, got 3 as fold 0"),
    "folds overlap": (
        folds(([0, 1, 2], [2, 3])),
        ValueError,
        r"`folds` must test on examples that were not trained on, got 1 .* of fold 0, 2 first",
    ),
    "folds are out of range": (
        folds(([0, 1], [12])),
        ValueError,
        r"`folds` must have indices from 0 to 11, got 12 to 12 as test part of fold 0",
    ),
    "folds are negative": (
        folds(([-1, 1], [2])),
        ValueError,
        r"`folds` must have indices from 0 to 11, got -1 to 1 as train part of fold 0",
    ),
    "folds are empty": (
        folds(([0], [])),
        ValueError,
        r"`folds` must have at least one index in each part, got \[\] as test part of fold 0",
    ),
    "folds are masks": (
        folds((np.ones(12, bool), [0])),
        TypeError,
        r"`folds` must have whole numbers as indices, got bool\[12\].*np\.flatnonzero",
    ),
    "splitter needs labels": (
        lambda: chosen(folds=StratifiedKFold(2)),
        ValueError,
        r"`folds` must split without labels.*folds=StratifiedKFold\(5\)\.split\(x, y\)",
    ),
    "splitter needs groups": (
        lambda: chosen(folds=GroupKFold(2)),
        ValueError,
        r"`folds` must split without labels or groups",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "pattern"), ERRORS.values(), ids=ERRORS)
def test_bad_call_says_what_is_wrong(call, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}") as info:
        call()
    assert info.type is error


def test_cross_validate_without_scikit_learn_says_what_to_install():
    with (
        mock.patch.dict(sys.modules, {"sklearn.model_selection": None}),
        pytest.raises(ImportError, match=r"pip install 'sparsejax\[examples\]'"),
    ):
        chosen(folds=3, key=KEY)


OTHER_RUNS = {
    "strengths": (
        lambda: {"strengths": [1.0, 0.25]},
        r"`strengths` must .*: 0\.5 there, 0\.25 here",
    ),
    "fewer": (lambda: {"strengths": [1.0]}, r"`strengths` must .*: 2 entries there, 1 here"),
    "begin": (lambda: {"begin": "start"}, r"`begin` must .*: 'previous' there, 'start' here"),
    "key": (lambda: {"key": jax.random.key(1)}, r"`key` must .*: 0 there, 1 here"),
    "no key": (lambda: {"key": None}, r"`key` must .*: \['key<fry>', 0, 0\] there, None here"),
    "params": (lambda: {"params": jnp.ones(3)}, r"`params` must .*'\.' float32\[3\] sha256 "),
    "dtype": (
        lambda: {"params": jnp.zeros(3, jnp.bfloat16)},
        r"`params` must .* float32\[3\] sha256 .* there, .* bfloat16\[3\] sha256 .* here",
    ),
    "data": (
        lambda: {"data": POINTS + 1},
        r"`data` must be what it was when .*name another folder",
    ),
}


@pytest.mark.parametrize(("other", "pattern"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_folder_of_another_run_is_refused(other, pattern, tmp_path):
    same = {
        "strengths": [1.0, 0.5],
        "params": jnp.zeros(3),
        "data": POINTS,
        "key": KEY,
        "folder": tmp_path,
    }
    vectors(shrink, **same)
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        vectors(shrink, **same | other())


def test_folder_of_another_function_is_refused(tmp_path):
    shrunk(folder=tmp_path)
    with pytest.raises(ValueError, match="'a run of strength_path' there, 'a run of batched_path'"):
        batched_path(
            shrink, [1.0, 0.5], jnp.zeros(3), POINTS, folder=tmp_path, prunable=filters.floating
        )


def test_folder_of_other_folds_is_refused(tmp_path):
    chosen(folds=3, key=KEY, folder=tmp_path)
    with pytest.raises(ValueError, match=r"`folds` must be what it was"):
        chosen(folds=2, key=KEY, folder=tmp_path)


def test_folder_of_other_params_is_refused_where_all_folds_are_done(tmp_path):
    same = {"folds": KFold(2), "folder": tmp_path, "prunable": filters.floating}
    chosen(**same)
    with pytest.raises(ValueError, match=r"`params` must be what it was"):
        cross_validate(shrink, distance, [1.0, 0.5], jnp.ones(3), POINTS, **same)


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"`folder` must be empty or .*thesis\.tex"):
        shrunk(folder=tmp_path)


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`folder` must be a folder, got the file"):
        shrunk(folder=tmp_path / "file")


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b + b"x"],
    ids=["truncated", "empty", "flipped", "longer"],
)
def test_damaged_fit_is_an_error_that_names_the_file(damage, tmp_path):
    shrunk(folder=tmp_path)
    file = tmp_path / "fit-0001.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged one, .*fit-0001\.bin.*; delete it"):
        shrunk(folder=tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_manifest_is_an_error_that_names_it(content, tmp_path):
    shrunk(folder=tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"damaged one, .*manifest\.json.*; delete the folder"):
        shrunk(folder=tmp_path)


def test_manifest_tells_people_what_ran(tmp_path):
    shrunk(folder=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["strengths"] == [1.0, 0.5] and manifest["begin"] == "previous"
