"""Codebooks by k-means: against scikit-learn, the optimum, and sums of gradients in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from same_bits import assert_same_bits
from sklearn.cluster import KMeans

from sparsejax import quantization
from sparsejax.quantization import _clustering

pytestmark = pytest.mark.usefixtures("quickly")

RNG = np.random.default_rng(0)
VALUES = {
    "normal": RNG.normal(size=1000),
    "what magnitude pruning leaves": (x := RNG.normal(size=5000))[np.abs(x) > 1.5],
    "a few that are large": np.concatenate([RNG.normal(size=500), [30.0, -50.0, 51.0]]),
    "one side": RNG.exponential(size=1000),
    "far from zero": RNG.normal(size=400) * 1e-3 + 100,
}
MASK = RNG.random((30, 20)) < 0.2
W = np.where(MASK, RNG.normal(size=MASK.shape), 0).astype(np.float32)
PARAMS = {"b": np.arange(20, dtype=np.float32), "w": W}


def sum_of_squares(values, centers, labels):
    return np.sum((values - centers[labels]) ** 2)


def optimum(values, k):
    """The least sum of squares of any k clusters, by dynamic programming over sorted values."""
    x = np.sort(values)
    n = x.size
    s, q = (np.concatenate([[0], np.cumsum(x**p)]) for p in (1, 2))
    i, j = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    size = np.maximum(j - i, 1)
    cost = np.where(j > i, q[j] - q[i] - (s[j] - s[i]) ** 2 / size, np.inf)
    best = cost[0]
    for _ in range(k - 1):
        best = np.min(best[:, None] + cost, axis=0)
    return best[n]


# k-means


@pytest.mark.parametrize("k", [3, 16])
@pytest.mark.parametrize("name", VALUES)
def test_it_is_scikit_learns_from_the_same_start(name, k):
    values = VALUES[name]
    start = np.linspace(values.min(), values.max(), k)[:, None]
    theirs = KMeans(k, init=start, n_init=1, tol=0, max_iter=10_000, algorithm="lloyd")
    theirs.fit(values[:, None])
    centers, labels = _clustering.kmeans(values, k)
    np.testing.assert_allclose(centers, np.sort(theirs.cluster_centers_[:, 0]), rtol=1e-9)
    order = np.argsort(np.argsort(theirs.cluster_centers_[:, 0]))
    assert np.mean(labels == order[theirs.labels_]) > 0.999  # but for ties half-way


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_near_the_optimum_and_where_clusters_are_apart_the_optimum(seed, k):
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=60)
    centers, labels = _clustering.kmeans(spread, k)
    least = optimum(spread, k)
    assert least * (1 - 1e-9) <= sum_of_squares(spread, centers, labels) < 1.6 * least
    apart = np.repeat(np.arange(k), 7) + 0.05 * rng.random(7 * k)
    found = sum_of_squares(apart, *_clustering.kmeans(apart, k))
    np.testing.assert_allclose(found, optimum(apart, k), rtol=1e-6)


@pytest.mark.parametrize("name", VALUES)
def test_each_center_is_the_mean_of_the_values_that_are_nearest(name):
    values = VALUES[name]
    centers, labels = _clustering.kmeans(values, 16)
    nearest = np.argmin(np.abs(values[:, None] - centers), axis=1)
    np.testing.assert_array_equal(labels, nearest)
    means = [values[labels == i].mean() for i in range(16)]
    np.testing.assert_allclose(centers, means, rtol=1e-9)
    assert (np.diff(centers) > 0).all()


def test_fewer_values_than_centers_are_all_kept():
    centers, labels = _clustering.kmeans(np.array([2.0, 2.0, -1.0, 5.0]), 16)
    np.testing.assert_array_equal(centers, [-1, 2, 5])
    np.testing.assert_array_equal(labels, [1, 1, 0, 2])
    assert _clustering.kmeans(np.zeros(0), 4)[0].size == 0
    np.testing.assert_array_equal(_clustering.kmeans(np.full(5, 3.0), 4)[0], [3.0])


def test_fewer_values_than_centers_take_no_step(monkeypatch):
    monkeypatch.setattr(_clustering, "_converged", None)
    found = _clustering.kmeans(np.array([0.1, -0.4, -0.2]), 8)  # whose sums are rounded
    np.testing.assert_array_equal(found[0], [-0.4, -0.2, 0.1])
    np.testing.assert_array_equal(found[1], [2, 0, 1])


@pytest.mark.parametrize("seed", [0, 53, 100])
def test_no_center_is_left_without_values_and_scikit_learn_is_no_better(seed):
    values = np.random.default_rng(seed).normal(size=10)
    start = np.linspace(values.min(), values.max(), 8)[:, None]
    theirs = KMeans(8, init=start, n_init=1, tol=0, max_iter=10_000).fit(values[:, None])
    centers, labels = _clustering.kmeans(values, 8)
    assert np.unique(labels).size == centers.size == 8
    assert sum_of_squares(values, centers, labels) <= theirs.inertia_ * (1 + 1e-9)


def test_neighbours_among_floats_do_not_go_to_and_fro_for_ever(monkeypatch):
    means, steps = _clustering._means, []

    def counted(*args):
        steps.append(args)
        return means(*args)

    monkeypatch.setattr(_clustering, "_means", counted)
    values = 1 + np.random.default_rng(69).integers(0, 30, 20) * 2.0**-52
    centers, labels = _clustering.kmeans(values, 5)
    assert len(steps) < 20
    assert np.abs(values - centers[labels]).max() < 8 * 2.0**-52


def test_it_does_not_end_where_an_empty_center_has_just_moved():
    centers, _ = _clustering.kmeans(np.array([-0.3, -0.1, 1.9, 2.1, 2.4]), 4)
    np.testing.assert_allclose(centers, [-0.2, 1.9, 2.1, 2.4])


# Trees


def test_pruned_entries_are_zero_and_kept_ones_have_the_nearest_value():
    shared = quantization.share(PARAMS, bits=3)
    assert shared["b"] is PARAMS["b"]
    assert (shared["w"].indices.dtype, shared["w"].codebook.shape) == (np.uint8, (8,))
    values = np.asarray(quantization.dequantize(shared)["w"])
    assert not values[~MASK].any()
    assert not np.signbit(values[~MASK]).any()
    codebook = np.asarray(shared["w"].codebook)
    nearest = np.abs(W[MASK][:, None] - codebook).min(axis=1)
    np.testing.assert_allclose(np.abs(W - values)[MASK], nearest, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(quantization.masks(shared)["w"], MASK)
    assert np.asarray(quantization.masks(shared)["b"]).shape == ()


def test_a_kept_zero_has_a_value_and_what_masks_prune_is_zero():
    masks = {"b": np.array(True), "w": np.arange(20)[None] < 12}
    shared = quantization.share(PARAMS, masks, bits=2)
    kept = np.broadcast_to(masks["w"], W.shape)
    np.testing.assert_array_equal(quantization.masks(shared)["w"], kept)
    expected = _clustering.kmeans(W[kept].astype(np.float64), 4)[0]
    np.testing.assert_array_equal(shared["w"].codebook, np.float32(expected))


def test_it_is_deterministic_and_sharing_again_changes_nothing():
    shared = quantization.share(PARAMS, bits=4)
    assert_same_bits(quantization.share(PARAMS, bits=4), shared)
    again = quantization.share(quantization.dequantize(shared), bits=4)
    assert_same_bits(quantization.dequantize(again), quantization.dequantize(shared))


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_as_many_values_as_bits_say(bits):
    values = RNG.normal(size=(60, 50)).astype(np.float32)
    [leaf] = jax.tree.leaves(
        quantization.share({"w": values}, bits=bits),
        is_leaf=lambda x: isinstance(x, quantization.Shared),
    )
    assert leaf.indices.dtype == (np.uint8 if bits < 8 else np.uint16)
    assert np.unique(leaf.indices).tolist() == list(range(1, 2**bits + 1))
    assert (leaf.shape, leaf.ndim, leaf.dtype) == ((60, 50), 2, np.float32)


@pytest.mark.parametrize(
    "w",
    [
        np.zeros((3, 4), np.float32),
        np.zeros((0, 4), np.float32),
        np.eye(4, dtype=np.float16),
        jnp.eye(4, dtype=jnp.bfloat16) * 3,
        np.full((2, 2), -0.0, np.float32),
    ],
)
def test_leaves_of_few_values_come_back_exactly(w):
    shared = quantization.share({"w": w}, bits=2)
    values = quantization.dequantize(shared)["w"]
    assert values.dtype == w.dtype
    np.testing.assert_array_equal(np.float32(values), np.float32(w))


# Training the codebooks


def target_loss(params):
    return jnp.sum(jnp.sin(3 * params["w"]) * jnp.arange(1.0, 21.0)[None]) + jnp.sum(params["b"])


def test_the_gradient_of_a_value_is_the_sum_of_those_of_its_entries():
    shared = quantization.share(PARAMS, bits=3)
    codebooks, indices = quantization.partition(shared)
    assert codebooks["w"].indices is None
    assert indices["b"] is None
    grads = jax.grad(
        lambda t: target_loss(quantization.dequantize(quantization.combine(t, indices)))
    )(codebooks)
    by_entry = np.asarray(jax.grad(target_loss)(quantization.dequantize(shared))["w"])
    sums = np.zeros(9)
    np.add.at(sums, np.asarray(shared["w"].indices), by_entry)
    np.testing.assert_allclose(grads["w"].codebook, sums[1:], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(grads["b"], np.ones(20))


def test_an_optimizer_trains_codebooks_and_masks_stay():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 30)), jnp.float32)
    shared = quantization.share(PARAMS, bits=2)
    codebooks, indices = quantization.partition(shared)

    def loss(codebooks):
        params = quantization.dequantize(quantization.combine(codebooks, indices))
        return jnp.mean((x @ (params["w"] - W)) ** 2)

    codebooks["w"] = quantization.Shared(None, codebooks["w"].codebook + 0.2)  # some way to go
    tx = optax.adam(0.01)

    def step(carry, _):
        codebooks, state = carry
        updates, state = tx.update(jax.grad(loss)(codebooks), state, codebooks)
        return (optax.apply_updates(codebooks, updates), state), None

    start = (codebooks, tx.init(codebooks))
    (tuned, _), _ = jax.jit(functools.partial(jax.lax.scan, step, length=100))(start)
    assert float(loss(tuned)) < 0.8 * float(loss(codebooks))
    there = quantization.combine(tuned, indices)
    np.testing.assert_array_equal(quantization.masks(there)["w"], MASK)
    assert not np.asarray(quantization.dequantize(there)["w"])[~MASK].any()


def test_partition_and_combine_are_inverse_for_integers_too():
    for tree in (quantization.share(PARAMS), quantization.quantize(PARAMS, bits=3)):
        trainable, rest = quantization.partition(tree)
        assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(trainable))
        assert_same_bits(quantization.combine(trainable, rest), tree)


def test_indices_beyond_the_codebook_name_its_last_value():
    leaf = quantization.Shared(jnp.array([[0, 1, 2, 200]], jnp.uint8), jnp.array([5.0, 6.0]))
    np.testing.assert_array_equal(quantization.dequantize([leaf])[0], [[0.0, 5.0, 6.0, 6.0]])
