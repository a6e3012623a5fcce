"""Trains the reference CNN for two epochs on the embedded digits; saves it as PyTorch would.

Names end in `weight`, kernels are (out, in, height, width), the metadata say `format: pt`: the file
whose way through the `sparsejax` command README shows. Needs the package safetensors.

    python scripts/make_checkpoint.py model.safetensors
"""

import sys

import jax
import numpy as np
import optax
import safetensors.numpy
from flax import nnx

from sparsejax import _tree, datasets, models

BATCH, EPOCHS = 64, 2
FROM_FLAX = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def main(path):
    data = datasets.mnist()
    images, labels = data.train_images.astype(np.float32) / 255, data.train_labels
    apply, params = models.functional(models.CNN((28, 28, 1), rngs=nnx.Rngs(0)))
    optimizer = optax.adam(1e-3)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            some = order[start : start + BATCH]
            params, state = step(params, state, images[some], labels[some])
    flat = _tree.flatten(params)
    leaves = {
        name.replace("kernel", "weight"): np.ascontiguousarray(leaf.transpose(FROM_FLAX[leaf.ndim]))
        for name, leaf in zip(flat.paths, map(np.asarray, flat.leaves), strict=True)
    }
    safetensors.numpy.save_file(leaves, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
