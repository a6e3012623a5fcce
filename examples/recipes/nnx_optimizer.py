"""RigL as the `tx` of `nnx.Optimizer`: a Flax NNX model, sparse from its first step to its last."""

import sys
from functools import partial

import jax
import numpy as np
import optax
from flax import nnx

from sparsejax import datasets, dynamic, masking, models, schedules


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def main(steps=2000):
    data = datasets.mnist_subset()
    x, test = (np.float32(i) / 255 for i in (data.train_images, data.test_images))
    model = models.LeNet300100(rngs=nnx.Rngs(0))
    # Masks rest in the last quarter, because what has just grown needs time to train.
    drop = schedules.cosine(0.3, 0.0, begin_step=0, end_step=3 * steps // 4)
    tx = dynamic.rigl(optax.adam(4e-3), 0.95, drop, key=jax.random.key(1), every=50)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # RigL draws its masks in `init`, and the optimizer has not touched the model so far.
    masks = dynamic.masks(optimizer.opt_state)
    nnx.update(model, masking.apply_masks(nnx.state(model, nnx.Param), masks))

    # Split once, not at every step as `nnx.jit` does: a small network's step is 5 times as fast.
    graph, variables = nnx.split((model, optimizer))

    @partial(jax.jit, donate_argnums=0)
    def step(variables, x, y):
        model, optimizer = nnx.merge(graph, variables)
        optimizer.update(model, nnx.grad(loss)(model, x, y))
        return nnx.state((model, optimizer))

    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.integers(len(x), size=100)
        variables = step(variables, x[batch], data.train_labels[batch])
    nnx.update((model, optimizer), variables)

    dynamic.check(optimizer.opt_state, nnx.state(model, nnx.Param))
    accuracy = np.mean(model(test).argmax(-1) == data.test_labels)
    weights = masking.sparsity(nnx.state(model, nnx.Param)).prunable
    print(f"accuracy {accuracy:.2%}, {weights.zeros:,} of {weights.size:,} weights are zero")
    return nnx.state(model, nnx.Param), optimizer.opt_state


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
