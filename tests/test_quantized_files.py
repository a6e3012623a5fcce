"""Quantized trees in files: back bit for bit, and how few bytes they take."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from same_bits import assert_same_bits

from sparsejax import filters, quantization, storage

pytestmark = pytest.mark.usefixtures("quickly")

DENSE = 1_066_440  # bytes of LeNet-300-100 in float32
BIASES = {"quantizable": filters.by_path("*bias"), "axes": ()}


@functools.cache
def lenet(density):
    """LeNet-300-100's params, pruned."""
    shapes = {"dense1": (784, 300), "dense2": (300, 100), "dense3": (100, 10)}
    params = {
        name: {"bias": np.zeros(shape[1:]), "kernel": np.zeros(shape)}
        for name, shape in shapes.items()
    }
    return pruned(params, density)


def small(seed):
    """The same of a network of one layer."""
    return pruned(nnx.state(nnx.Linear(24, 16, rngs=nnx.Rngs(0)), nnx.Param), 0.2, seed)


def pruned(params, density, seed=0):
    """Params whose kernels keep a random choice of normal weights, none of them small."""
    rng = np.random.default_rng(seed)

    def drawn(w):
        if w.ndim == 1:
            return jnp.asarray(rng.normal(size=w.shape) / 10, jnp.bfloat16)
        size = rng.normal(size=w.shape)
        values = np.sign(size) * (0.3 + np.abs(size))
        return jnp.asarray(np.where(rng.random(w.shape) < density, values, 0), jnp.float32)

    return jax.tree.map(drawn, params)


def entropy(numbers):
    """Bits of all of them, if each is coded for itself."""
    counts = np.unique(numbers, return_counts=True)[1]
    return -float(np.sum(counts * np.log2(counts / counts.sum())))


def choices(n, k):
    """Bits that say which k of n are kept."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


QUANTIZED = {
    "int8": lambda params: quantization.quantize(params),
    "int5": lambda params: quantization.quantize(params, bits=5, axes=()),
    "int4": lambda params: quantization.quantize(params, bits=4, axes=0),
    "3 bits shared": lambda params: quantization.share(params, bits=3),
    "8 bits shared": lambda params: quantization.share(params, bits=8),
    "shared, biases in int8": lambda params: quantization.quantize(
        quantization.share(params, bits=4), **BIASES
    ),
}


@pytest.mark.parametrize("header", ["open", "packed"])
@pytest.mark.parametrize("how", QUANTIZED)
def test_it_comes_back_bit_for_bit(tmp_path, how, header):
    tree = QUANTIZED[how](small(0))
    storage.save(tmp_path / "file", tree, header=header)
    like = QUANTIZED[how](small(1))  # other params of these shapes
    found = storage.load(tmp_path / "file", like=like).params
    assert_same_bits(found, tree)
    assert_same_bits(quantization.dequantize(found), quantization.dequantize(tree))
    assert_same_bits(quantization.masks(found), quantization.masks(tree))


def test_without_like_there_are_dicts_of_codes(tmp_path):
    tree = quantization.share({"w": small(0)["kernel"].get_value()})
    storage.save(tmp_path / "file", tree)
    found = storage.load(tmp_path / "file").params
    assert set(found["w"]) == {"indices", "codebook"}
    again = {"w": quantization.Shared(**found["w"])}
    assert_same_bits(quantization.dequantize(again), quantization.dequantize(tree))


@pytest.mark.parametrize("density", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_codes_and_positions_take_little_more_than_their_entropy(tmp_path, density, bits):
    kernel = lenet(density)["dense1"]["kernel"]
    shared = quantization.share({"w": kernel}, bits=bits)
    storage.save(tmp_path / "file", shared)
    codes = np.asarray(shared["w"].indices)
    kept = codes[codes > 0]
    bound = (choices(codes.size, kept.size) + entropy(kept)) / 8
    leaves = {leaf.name: leaf.bytes for leaf in storage.contents(tmp_path / "file").leaves}
    # Huffman's codes of few symbols are 2 to 3 % above their entropy; then there are their tables.
    assert leaves["w.indices"] < 1.03 * bound + 50 + 2**bits / 2
    assert leaves["w.codebook"] == 4 * 2**bits


@pytest.mark.parametrize(("density", "times"), [(0.08, 42), (0.03, 90), (0.015, 150)])
def test_lenet_is_many_times_smaller(tmp_path, density, times):
    """Of random positions; those of trained networks take fewer bytes."""
    path = tmp_path / "file"
    storage.save(path, quantization.share(lenet(density), bits=4), header="packed")
    assert times < DENSE / path.stat().st_size < 1.15 * times


def test_int8_biases_take_less_than_bfloat16(tmp_path):
    shared = quantization.share(lenet(0.015), bits=4)
    sizes = []
    for tree in (shared, quantization.quantize(shared, **BIASES)):
        storage.save(tmp_path / "file", tree, header="packed")
        sizes.append((tmp_path / "file").stat().st_size)
    assert sizes[1] < sizes[0] - 50
