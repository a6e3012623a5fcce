"""A cross-validation to be killed: `paths_worker.py FOLDER LOG OUT`.

Every fit adds a line to LOG before it begins; what was found is written to OUT, bit for bit.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_diabetes

from sparsejax import filters, paths

STRENGTHS = [8.0, 4.0, 2.0, 1.0]


def soft(x, t):
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - t, 0)


@jax.jit
def steps(strength, w, data, key):
    """Fifty proximal steps on noisy targets; in bfloat16, so that little errors would show."""
    x, y = data
    y = y + jax.random.normal(key, y.shape)

    def step(_, w):
        return soft(w - 0.2 * x.T @ (x @ w - y) / len(y), 0.2 * strength).astype(jnp.bfloat16)

    return jax.lax.fori_loop(0, 50, step, w)


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), y - y.mean()
    return x.astype(np.float32), y.astype(np.float32)


def score(w, data):
    return jnp.mean((data[0] @ w - data[1]) ** 2)


def validate(fit, folder):
    return paths.cross_validate(
        fit,
        score,
        STRENGTHS,
        jnp.zeros(10, jnp.bfloat16),
        diabetes(),
        folds=3,
        key=jax.random.key(7),
        prunable=filters.floating,
        folder=folder,
        progress=False,
    )


if __name__ == "__main__":
    folder, log, out = sys.argv[1:]

    def fit(strength, w, data, key):
        with Path(log).open("a") as f:
            f.write(f"{strength}\n")
        time.sleep(0.1)  # so that there is a middle to be killed in
        return steps(strength, w, data, key)

    found = validate(fit, folder)
    Path(out).write_bytes(found.scores.tobytes() + found.sparsity.tobytes())
