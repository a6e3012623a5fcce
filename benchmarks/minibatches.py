"""Zeros under minibatch noise: what `gradient_decay` of `penalized` does for a lasso.

Usage: `python benchmarks/minibatches.py`, ten seconds.

100 correlated columns, 2,000 rows, batches of 32, 20,000 steps with cosine decay; nonzeros are the
mean over the last 500 steps, the reference is scikit-learn's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import Lasso

import sparsejax as sj
from sparsejax import filters, penalties

STEPS, BATCH, STRENGTH = 20_000, 32, 0.02


def main():
    """Prints the table."""
    x, y = problem()
    reference = (
        Lasso(alpha=STRENGTH, fit_intercept=False, tol=1e-10).fit(*map(np.float64, (x, y))).coef_
    )
    print(
        f"| {np.count_nonzero(reference)} true nonzeros of 100 | decay | nonzeros | largest error |"
    )
    print("|---|---|---|---|")
    cosine = optax.cosine_decay_schedule
    for name, optimizer in {
        "SGD": optax.sgd(cosine(0.02, STEPS)),
        "momentum": optax.sgd(cosine(0.002, STEPS), 0.9),
        "Adam": optax.adam(cosine(0.003, STEPS)),
    }.items():
        for decay in (0.0, 0.9, 0.99, 0.999):
            nonzeros, w = train(optimizer, decay, x, y)
            print(f"| {name} | {decay} | {nonzeros:.1f} | {np.abs(w - reference).max():.3f} |")


def problem():
    """Standardized columns and target."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 100)) + 0.5 * rng.standard_normal((2000, 1))
    truth = np.where(rng.random(100) < 0.2, rng.standard_normal(100), 0)
    y = x @ truth + 2 * rng.standard_normal(2000)
    return tuple(np.float32((a - a.mean(0)) / a.std(0)) for a in (x, y))


def train(optimizer, decay, x, y):
    """The mean count of nonzeros at the end, and the last coefficients."""
    penalty = penalties.l1(STRENGTH, prunable=filters.floating)
    tx = sj.penalized(optimizer, penalty, gradient_decay=decay)
    batches = jax.random.randint(jax.random.key(0), (STEPS, BATCH), 0, len(x))
    x, y, start = jnp.asarray(x), jnp.asarray(y), jnp.zeros(x.shape[1])

    def step(carry, batch):
        w, state = carry
        grads = x[batch].T @ (x[batch] @ w - y[batch]) / BATCH
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), jnp.count_nonzero(w)

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))
    (w, _), counts = run((start, tx.init(start)))
    return float(np.mean(counts[-500:])), np.asarray(w)


if __name__ == "__main__":
    main()
