"""What `sparse_ops.py` and `sparse_peers.py` measure: matrices, convolutions, networks."""

import functools
from pathlib import Path

import numpy as np

SIZES, DENSITIES, BATCHES = (4096, 1024), (50, 20, 10, 5, 2, 1), (1, 8, 64, 256)
SPARSITIES = (80, 90, 95, 98)  # of the convolutions; of the networks without the last
CONVOLUTIONS = {  # image, inputs, outputs, stride, padding, batches
    "reference CNN, first": (28, 1, 32, 1, "VALID", (1, 64)),
    "reference CNN, second": (13, 32, 64, 1, "VALID", (1, 64)),
    "ResNet-18, 56x56, 64": (56, 64, 64, 1, "SAME", (1, 8)),
    "ResNet-18, 28x28, 128": (28, 128, 128, 1, "SAME", (1, 8)),
    "ResNet-18, 56x56, 64 to 128": (56, 64, 128, 2, "SAME", (1, 8)),
    "ResNet-18, 14x14, 256": (14, 256, 256, 1, "SAME", (1, 8)),
}
SEQUENCE, WIDTH, HEADS = 128, 384, 6


def product_name(size, density, batch):
    """A cell's name."""
    return f"{size}, {density:g} %, batch {batch}"


def matrix(size, density, block=1):
    """A square matrix of which so many per cent are kept, in blocks along the outputs."""
    draw = np.random.default_rng([size, round(1e3 * density), block])
    return _some(draw, draw.random((size, size // block), np.float32) < density / 100, block)


def rows(size, batch):
    """The x of a cell."""
    return np.random.default_rng([size, batch]).standard_normal((batch, size), np.float32)


def kernel(shape, sparsity, block=1):
    """A convolution's kernel of which so many per cent are zero, in blocks along the outputs."""
    draw = np.random.default_rng([*shape, round(1e3 * sparsity), block])
    kept = draw.random((*shape[:-1], shape[-1] // block)) >= sparsity / 100
    return _some(draw, kept, block)


def _some(draw, kept, block):
    kept = kept.repeat(block, -1)
    return np.where(kept, draw.standard_normal(kept.shape, np.float32), np.float32(0))


def transformer_block():
    """Attention and a feed-forward layer, each after a LayerNorm, as a function of dicts."""
    import jax
    import jax.numpy as jnp

    draw = jax.nn.initializers.lecun_normal()
    sizes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}
    sizes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    params = {
        name: {"kernel": draw(jax.random.key(i), size), "bias": jnp.zeros(size[1])}
        for i, (name, size) in enumerate(sizes.items())
    }
    for name in ("norm1", "norm2"):
        params[name] = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        x = jax.nn.standardize(x, epsilon=1e-6)
        return x * layer["scale"] + layer["bias"]

    def apply(params, x):
        heads = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = jnp.moveaxis(dense(params["qkv"], norm(params["norm1"], x)).reshape(heads), 2, 0)
        x = x + dense(params["out"], jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        hidden = jax.nn.gelu(dense(params["up"], norm(params["norm2"], x)))
        return x + dense(params["down"], hidden)

    return apply, params, (SEQUENCE, WIDTH), lambda path: SEQUENCE


def image_network(name):
    """A reference model."""
    from flax import nnx

    from sparsejax import models

    apply, params = models.functional(getattr(models, name)(rngs=nnx.Rngs(0)))
    positions = {"conv1": 26**2, "conv2": 11**2}
    return apply, nnx.to_pure_dict(params), (28, 28, 1), lambda path: positions.get(path[0].key, 1)


# apply, params, the shape of one input, at how many positions of it a weight (its path) is used;
# the batches.
NETWORKS = {
    "LeNet-300-100": (functools.partial(image_network, "LeNet300100"), (1, 64)),
    "reference CNN": (functools.partial(image_network, "CNN"), (1, 64)),
    "transformer block": (transformer_block, (1, 8)),
}


def cache_bytes():
    """The size of the last-level cache; 32 MiB where the system does not say, or less is said."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = path.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20}
        sizes.append(int(number[:-1]) * units[number[-1]] if number[-1] in units else int(number))
    return max(sizes)
