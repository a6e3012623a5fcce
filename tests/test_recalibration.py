"""Batch statistics against plain means over batches, whatever momentum and past."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import shrinking

pytestmark = pytest.mark.usefixtures("quickly")
BATCHES = [
    jnp.asarray(np.random.default_rng(i).normal(3 * i, 1 + i, (n, 4)), jnp.float32)
    for i, n in enumerate((5, 8, 3))
]
MOMENTA = (0.0, 0.5, 0.9, 0.99)
each_momentum = pytest.mark.parametrize("momentum", MOMENTA)


def of_batches(batches=BATCHES):
    """The mean over batches of their means and variances."""
    rows = np.asarray([[np.mean(x, 0), np.var(x, 0)] for x in map(np.float64, batches)])
    return rows.mean(0)


def running(momentum):
    def update(stats, batch):
        return jax.tree.map(lambda a, b: momentum * a + (1 - momentum) * b, stats, new(batch))

    def new(batch):
        return {"mean": batch.mean(0), "var": batch.var(0)}

    return update


def past(value=100.0, dtype=jnp.float32):
    return {"mean": jnp.full(4, value, dtype), "var": jnp.full(4, value, dtype)}


@each_momentum
@pytest.mark.parametrize("before", [0.0, -7.0, 1e6, np.inf, np.nan])
def test_recalibrate_equals_the_mean_over_batches(momentum, before):
    got = shrinking.recalibrate(running(momentum), past(before), BATCHES)
    mean, variance = of_batches()
    np.testing.assert_allclose(got["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(got["var"], variance, rtol=1e-4)


@each_momentum
def test_recalibrate_takes_batch_norm_of_nnx(momentum):
    model = nnx.BatchNorm(4, momentum=momentum, rngs=nnx.Rngs(0))
    model.mean[...], model.var[...] = jnp.full(4, 9.0), jnp.full(4, 5.0)
    graph, stats, rest = nnx.split(model, nnx.BatchStat, ...)

    @jax.jit
    def update(stats, batch):
        model = nnx.merge(graph, stats, rest)
        model(batch)
        return nnx.state(model, nnx.BatchStat)

    got = shrinking.recalibrate(update, stats, BATCHES)
    assert jax.tree.structure(got) == jax.tree.structure(stats)
    mean, variance = of_batches()
    np.testing.assert_allclose(got["mean"][...], mean, rtol=1e-4)
    np.testing.assert_allclose(got["var"][...], variance, rtol=1e-3)
    np.testing.assert_array_equal(model.mean[...], jnp.full(4, 9.0))


@each_momentum
def test_recalibrate_takes_batch_norm_of_linen(momentum):
    module = nn.BatchNorm(use_running_average=False, momentum=momentum)
    variables = module.init(jax.random.key(0), BATCHES[0])

    @jax.jit
    def update(stats, batch):
        changed = {"params": variables["params"], "batch_stats": stats}
        return module.apply(changed, batch, mutable=["batch_stats"])[1]["batch_stats"]

    got = shrinking.recalibrate(update, variables["batch_stats"], BATCHES)
    mean, variance = of_batches()
    np.testing.assert_allclose(got["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(got["var"], variance, rtol=1e-3)


def test_recalibrate_is_right_behind_other_layers():
    """Statistics of the second layer are those of batches that the first has normalized."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm1 = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
            self.linear = nnx.Linear(4, 3, rngs=rngs)
            self.norm2 = nnx.BatchNorm(3, momentum=0.99, rngs=rngs)

        def __call__(self, x):
            return self.norm2(jax.nn.relu(self.linear(self.norm1(x))))

    model = Net(nnx.Rngs(0))
    graph, stats, rest = nnx.split(model, nnx.BatchStat, ...)

    @jax.jit
    def update(stats, batch):
        model = nnx.merge(graph, stats, rest)
        model(batch)
        return nnx.state(model, nnx.BatchStat)

    got = shrinking.recalibrate(update, stats, BATCHES)
    kernel = np.float64(model.linear.kernel[...])
    hidden = []
    for x in map(np.float64, BATCHES):
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        hidden.append(np.maximum(x @ kernel, 0))
    for name, want in zip(("mean", "var"), of_batches(hidden), strict=True):
        np.testing.assert_allclose(got["norm2"][name][...], want, rtol=1e-3, atol=1e-4)


def test_recalibrate_of_a_mean_near_zero():
    """What must rest is asked for at the size of the leaf, not of the entry."""
    batches = [jnp.array([[0.0, 1e4], [1e-6, 3e4]]), jnp.array([[0.0, 2e4], [0.0, 2e4]])]

    def update(stats, batch):
        return {"mean": 0.99 * stats["mean"] + 0.01 * batch.mean(0)}

    got = shrinking.recalibrate(update, {"mean": jnp.ones(2)}, batches)
    np.testing.assert_allclose(got["mean"], [2.5e-7, 2e4], rtol=1e-4)


def test_recalibrate_of_zeros():
    got = shrinking.recalibrate(running(0.9), past(), [jnp.zeros((3, 4))] * 2)
    for leaf in jax.tree.leaves(got):
        np.testing.assert_array_equal(leaf, np.zeros(4))


def test_recalibrate_takes_any_iterable_once():
    taken = []

    def batches():
        for batch in BATCHES:
            taken.append(1)
            yield batch

    got = shrinking.recalibrate(running(0.9), past(), batches())
    np.testing.assert_allclose(got["mean"], of_batches()[0], rtol=1e-4)
    assert len(taken) == len(BATCHES)


def test_recalibrate_gives_counters_after_the_last_batch():
    def update(stats, batch):
        return {"mean": 0.9 * stats["mean"] + 0.1 * batch.mean(0), "seen": batch.shape[0]}

    stats = {"mean": jnp.zeros(4), "seen": jnp.zeros((), jnp.int32)}
    got = shrinking.recalibrate(update, stats, BATCHES)
    assert int(got["seen"]) == 3
    np.testing.assert_allclose(got["mean"], of_batches()[0], rtol=1e-4)


def test_recalibrate_counts_every_batch_once():
    def update(stats, batch):
        return {"mean": 0.9 * stats["mean"] + 0.1 * batch.mean(0), "count": stats["count"] + 1}

    stats = {"mean": jnp.zeros(4), "count": jnp.asarray(10)}
    assert int(shrinking.recalibrate(update, stats, BATCHES)["count"]) == 10 + len(BATCHES)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_recalibrate_keeps_the_dtype(dtype, momentum):
    got = shrinking.recalibrate(running(momentum), past(dtype=dtype), BATCHES)
    assert all(x.dtype == dtype for x in jax.tree.leaves(got))
    error = max(float(jnp.finfo(dtype).eps), 1e-4)
    np.testing.assert_allclose(np.float64(got["mean"]), of_batches()[0], rtol=error)


def test_recalibrate_takes_statistics_that_are_rounded_to_bfloat16():
    def update(stats, batch):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), running(0.75)(stats, batch))

    got = shrinking.recalibrate(update, past(dtype=jnp.bfloat16), BATCHES)
    np.testing.assert_allclose(np.float64(got["mean"]), of_batches()[0], rtol=0.05)


def test_recalibrate_takes_empty_leaves():
    def update(stats, batch):
        new = 0.9 * stats["mean"] + 0.1 * batch.mean(0)
        return {"mean": new, "none": stats["none"]}

    stats = {"mean": jnp.zeros(4), "none": jnp.zeros((0,))}
    got = shrinking.recalibrate(update, stats, BATCHES)
    assert got["none"].shape == (0,)
    np.testing.assert_allclose(got["mean"], of_batches()[0], rtol=1e-4)


# ---- errors


def test_recalibrate_refuses_no_batch():
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none"):
        shrinking.recalibrate(running(0.9), past(), [])


def test_recalibrate_refuses_what_is_no_function(as_users_have_it):
    with pytest.raises(TypeError, match=r"`update_fn` must be a function"):
        shrinking.recalibrate(past(), past(), BATCHES)


def haiku_average():
    def forward(x):
        return hk.ExponentialMovingAverage(0.9)(x.mean(0))

    network = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = network.init(jax.random.key(0), BATCHES[0])

    def update(state, batch):
        return network.apply(params, state, batch)[1]

    return update, state


def test_recalibrate_refuses_a_corrected_average_at_its_start():
    update, state = haiku_average()
    with pytest.raises(ValueError, match=r"must be running means.*average.*many batches instead"):
        shrinking.recalibrate(update, state, BATCHES)


@pytest.mark.parametrize(
    "rule",
    [
        lambda old, new: old + new,
        lambda old, new: old,
        lambda old, new: -0.5 * old + 1.5 * new,
        lambda old, new: 0.9 * old**2 + 0.1 * new,
    ],
    ids=["sum", "constant", "negative", "square"],
)
def test_recalibrate_refuses_what_is_no_running_mean(rule):
    def update(stats, batch):
        return {"bn": {"mean": rule(stats["bn"]["mean"], batch.mean(0))}}

    message = r"`statistics` must be running means, .* the leaf at 'bn\.mean' is none; call"
    with pytest.raises(ValueError, match=message):
        shrinking.recalibrate(update, {"bn": {"mean": jnp.ones(4)}}, BATCHES)


def test_recalibrate_refuses_an_answer_of_another_structure():
    with pytest.raises(ValueError, match=r"`update_fn's answer` must have the structure"):
        shrinking.recalibrate(lambda stats, batch: {"mean": batch.mean(0)}, past(), BATCHES)
