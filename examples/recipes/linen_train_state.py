"""RigL as the `tx` of a Flax Linen `TrainState`."""

import sys
from functools import partial

import jax
import numpy as np
import optax
from flax import linen
from flax.training.train_state import TrainState

from sparsejax import datasets, dynamic, masking, schedules


class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
        for width in (300, 100):
            x = linen.relu(linen.Dense(width)(x))
        return linen.Dense(10)(x)


@partial(jax.jit, donate_argnums=0)
def train_step(state, x, y):
    def loss(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def main(steps=2000):
    data = datasets.mnist_subset()
    x, test = (np.float32(i.reshape(-1, 784)) / 255 for i in (data.train_images, data.test_images))
    # Masks rest in the last quarter, because what has just grown needs time to train.
    drop = schedules.cosine(0.3, 0.0, begin_step=0, end_step=3 * steps // 4)
    tx = dynamic.rigl(optax.adam(4e-3), 0.95, drop, key=jax.random.key(1), every=50)
    network = Network()
    params = network.init(jax.random.key(0), x[:1])["params"]
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
    # RigL draws its masks in `init`, which cannot change the params that it sees.
    masks = dynamic.masks(state.opt_state)
    state = state.replace(params=masking.apply_masks(state.params, masks))

    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.integers(len(x), size=100)
        state = train_step(state, x[batch], data.train_labels[batch])

    dynamic.check(state.opt_state, state.params)
    logits = network.apply({"params": state.params}, test)
    accuracy = np.mean(logits.argmax(-1) == data.test_labels)
    weights = masking.sparsity(state.params).prunable
    print(f"accuracy {accuracy:.2%}, {weights.zeros:,} of {weights.size:,} weights are zero")
    return state.params, state.opt_state


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
