"""A lottery ticket that kills itself in its second round: `pruning_worker.py FOLDER`."""

import os
import signal
import sys

import jax
import jax.numpy as jnp

from sparsejax import pruning


@jax.jit
def update(w, mask, key):
    """In bfloat16, so that little errors would show; noisy, so that order counts."""
    noise = jax.random.normal(key, w.shape, w.dtype)
    return jnp.where(mask, w - 0.1 * w + 0.3 * noise, 0)


def train(params, round_):
    """One noisy update after the other, each with a key of its own."""
    w = params["w"]
    for step in range(round_.begin, round_.end):
        w = update(w, round_.masks["w"], jax.random.fold_in(round_.key, step))
    return {"w": w}


def ticket(train, folder):
    """The run: four rounds after the dense one, from the weights after two updates."""
    return pruning.lottery_ticket(
        train,
        {"w": jax.random.normal(jax.random.key(0), (12, 10), jnp.bfloat16)},
        pruning.geometric(0.9, 4),
        steps=6,
        rewind_to=2,
        evaluate=lambda params: {"norm": jnp.sum(jnp.abs(params["w"]).astype(float))},
        key=jax.random.key(7),
        folder=folder,
        progress=False,
    )


if __name__ == "__main__":

    def train_until_killed(params, round_):
        """`train`, but for the second round."""
        if round_.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(params, round_)

    ticket(train_until_killed, sys.argv[1])
