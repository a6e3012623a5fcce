"""Gradual pruning in a bare loop: a dict of params, `jax.jit`, and nothing else."""

import sys
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import datasets, dynamic, masking, schedules


def init(key, sizes=(784, 300, 100, 10)):
    keys, shapes = jax.random.split(key, len(sizes) - 1), pairwise(sizes)
    draw = jax.nn.initializers.lecun_normal()
    return [{"w": draw(k, s), "b": jnp.zeros(s[1])} for k, s in zip(keys, shapes, strict=True)]


def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def main(steps=2000):
    data = datasets.mnist_subset()
    x, test = (np.float32(i.reshape(-1, 784)) / 255 for i in (data.train_images, data.test_images))
    # The last quarter trains what is left: a network recovers from pruning only afterwards.
    schedule = schedules.cubic(0.0, 0.95, begin_step=steps // 8, end_step=3 * steps // 4)
    tx = dynamic.gradual(optax.adam(1e-3), schedule, every=20)

    # Masks are part of the state, so this is the step that a dense network would have, and it is
    # compiled once, refreshes included.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params, rng = init(jax.random.key(0)), np.random.default_rng(0)
    state = tx.init(params)
    for _ in range(steps):
        batch = rng.integers(len(x), size=100)
        params, state = step(params, state, x[batch], data.train_labels[batch])

    dynamic.check(state, params)  # raises if anything kept the params from obeying the masks
    accuracy = np.mean(apply(params, test).argmax(-1) == data.test_labels)
    weights = masking.sparsity(params).prunable
    print(f"accuracy {accuracy:.2%}, {weights.zeros:,} of {weights.size:,} weights are zero")
    return params, state


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
