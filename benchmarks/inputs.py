"""What is measured on: scores |w| of networks, kernels of several shapes and scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SPARSITY = 0.9
Shapes = list[tuple[int, ...]]

# 10,006,528 entries: the convolutions of a ResNet from 64 to 1024 channels, and its classifier.
CONVOLUTIONAL: Shapes = [
    (3, 3, 64, 64),
    (3, 3, 64, 64),
    (3, 3, 64, 64),
    (3, 3, 64, 128),
    (1, 1, 64, 128),
    (3, 3, 128, 128),
    (3, 3, 128, 128),
    (3, 3, 128, 256),
    (1, 1, 128, 256),
    (3, 3, 256, 256),
    (3, 3, 256, 512),
    (1, 1, 256, 512),
    (3, 3, 512, 512),
    (3, 3, 512, 512),
    (1, 1, 512, 1024),
    (2048, 1000),
]


def transformer(layers: int, width: int, vocabulary: int) -> Shapes:
    """Per layer four square kernels and two of the feed-forward block; one embedding."""
    layer = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    return [(vocabulary, width), *layer * layers]


SHAPES: dict[str, Shapes] = {
    "10M": CONVOLUTIONAL,
    "60M": transformer(layers=12, width=512, vocabulary=44_000),  # 60,276,736 entries
    "200M": transformer(layers=12, width=1024, vocabulary=48_000),  # 200,146,944 entries
    "200 distinct leaves": [(64 + i, 256) for i in range(200)],  # 8,371,200 entries
    "200 equal leaves": [(163, 256)] * 200,  # 8,345,600 entries
}


class Case(NamedTuple):
    """The same scores as everybody likes them, all of it outside the timing.

    Attributes:
      name: its key in `SHAPES`.
      flat: NumPy, one vector.
      arrays: NumPy, views of `flat`, one for each leaf.
      leaves: JAX, one for each leaf.
      keep: how many entries `SPARSITY` keeps.
    """

    name: str
    flat: np.ndarray
    arrays: list[np.ndarray]
    leaves: list[jax.Array]
    keep: int


def make(name: str) -> Case:
    """Absolute values of normal float32 weights, of He's scale in each leaf."""
    shapes = SHAPES[name]
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = np.random.default_rng(0).standard_normal(sum(sizes), np.float32)
    np.abs(flat, out=flat)
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    for part, shape in zip(parts, shapes, strict=True):
        part *= np.sqrt(2 / np.prod(shape[:-1]), dtype=np.float32)
    arrays = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    keep = flat.size - round(SPARSITY * flat.size)
    return Case(name, flat, arrays, [jnp.array(a) for a in arrays], keep)
