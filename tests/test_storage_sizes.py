"""How large checkpoints are, beside what no code can go below."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import criteria, datasets, granularities, masking, models, storage

pytestmark = pytest.mark.usefixtures("quickly")

SPARSITIES = (0.8, 0.9, 0.95, 0.99)
# Of int8 larger leaves: where all is a few kilobytes, the code's own tables take more than 1 %.
LEAVES = {"float32": (512, 640), "bfloat16": (512, 640), "int8": (1024, 2048)}
GRANULARITIES = {
    "entries": granularities.Block((1, 1)),
    "channels": granularities.Channel(),
    "input channels": granularities.Channel(-2),
    "4x4 blocks": granularities.Block((4, 4)),
    "1x8 blocks": granularities.Block((1, 8)),
    "8x1 blocks": granularities.Block((8, 1)),
}


def choices(n, k):
    """Bits that say which k of n are kept."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def random_bits(shape, dtype):
    """Values that nothing can compress: also NaN and, of integers, some zeros."""
    entry = jnp.dtype(dtype)
    size = math.prod(shape) * entry.itemsize
    return (
        np.random.default_rng(0).integers(256, size=size, dtype=np.uint8).view(entry).reshape(shape)
    )


def kept_of(params, masks):
    """Pruned entries as zeros of the dtype."""
    return {name: np.where(masks[name], w, np.zeros((), w.dtype)) for name, w in params.items()}


def check(folder, params, masks, position_bits):
    """At most 1.01 times the bound and 256 bytes a leaf."""
    storage.save(folder / "file", params, masks)
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True))
    values = sum(w.itemsize * int(np.broadcast_to(m, w.shape).sum()) for w, m in leaves)
    bound = position_bits / 8 + values
    size, allowed = (folder / "file").stat().st_size, 1.01 * bound + 256 * len(leaves)
    assert size <= allowed, f"{size} bytes, the bound is {bound:.0f}, {allowed:.0f} are allowed"


def chosen(shape, sparsity):
    """A random choice of units, as many as are to be kept."""
    size = math.prod(shape)
    kept = np.arange(size) >= round(sparsity * size)
    return np.random.default_rng(1).permutation(kept).reshape(shape)


@pytest.mark.parametrize("dtype", LEAVES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("units", GRANULARITIES)
def test_size_is_that_of_kept_values_and_of_the_choice_of_units(tmp_path, units, sparsity, dtype):
    granularity, shape = GRANULARITIES[units], LEAVES[dtype]
    kept = chosen(granularity.sizes("w", shape).shape, sparsity)
    masks = {"w": np.asarray(granularity.expand(jnp.asarray(kept), shape))}
    params = kept_of({"w": random_bits(shape, dtype)}, masks)
    check(tmp_path, params, masks, choices(kept.size, int(kept.sum())))


@pytest.mark.parametrize("dtype", LEAVES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 8)])
def test_size_is_that_of_kept_values_and_of_the_choice_in_every_group(tmp_path, n, m, axis, dtype):
    shape, groups = LEAVES[dtype], math.prod(LEAVES[dtype]) // m
    group = np.broadcast_to(np.arange(m) < n, (groups, m))
    mask = np.random.default_rng(1).permuted(group, axis=1)
    masks = {"w": mask.reshape(shape) if axis == -1 else mask.reshape(shape[::-1]).T}
    params = kept_of({"w": random_bits(shape, dtype)}, masks)
    check(tmp_path, params, masks, groups * choices(m, n))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_groups_are_found_along_the_inputs_of_torchs_convolutions(tmp_path, n, m):
    shape, groups = (64, 3, 3, 32), 64 * 9 * 32 // m
    group = np.broadcast_to(np.arange(m) < n, (groups, m))
    mask = np.random.default_rng(1).permuted(group, axis=1).reshape(shape)
    masks = {"w": np.moveaxis(mask, -1, 1)}
    params = kept_of({"w": random_bits(masks["w"].shape, "float32")}, masks)
    check(tmp_path, params, masks, groups * choices(m, n))


class Pruned:
    """LeNet-300-100 after some steps on the embedded digits, pruned by magnitude."""

    def __init__(self):
        digits = datasets.mnist_subset()
        images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
        apply, params = models.functional(models.LeNet300100(rngs=nnx.Rngs(0)))
        self.params = nnx.to_pure_dict(params)
        self.loss = lambda params, x, y: optax.softmax_cross_entropy_with_integer_labels(
            apply(params, jnp.float32(x) / 255), y
        ).mean()
        tx = optax.adam(1e-3)
        state = tx.init(self.params)

        @jax.jit
        def step(params, state, x, y):
            updates, state = tx.update(jax.grad(self.loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        for i in range(100):
            batch = slice(64 * i, 64 * i + 64)
            self.params, state = step(self.params, state, images[batch], labels[batch])

    def at(self, sparsity):
        """Params, masks, and bits of the positions."""
        masks = masking.topk(criteria.magnitude(self.params), sparsity)
        bits = sum(choices(m.size, int(m.sum())) for m in jax.tree.leaves(masks) if m.ndim)
        return sj.apply_masks(self.params, masks), masks, bits


@pytest.fixture(scope="module")
def pruned():
    return Pruned()


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_size_of_a_trained_network_is_within_the_bound(tmp_path, pruned, sparsity):
    check(tmp_path, *pruned.at(sparsity))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_size_of_trained_masks_is_within_the_bound_whatever_the_values(tmp_path, pruned, sparsity):
    """Trained values take fewer than 32 bits, which could hide what positions take."""
    params, masks, bits = pruned.at(sparsity)
    values = jax.tree.map(lambda w: random_bits(w.shape, "float32"), params)
    values = jax.tree.map(lambda w, m: np.where(m, w, np.float32(0)), values, masks)
    check(tmp_path, values, masks, bits)


def test_file_without_masks_is_no_larger(tmp_path, pruned):
    params, masks, _ = pruned.at(0.9)
    storage.save(tmp_path / "plain", params)
    storage.save(tmp_path / "masked", params, masks)
    plain, masked = ((tmp_path / name).stat().st_size for name in ("plain", "masked"))
    assert plain <= masked + 64
