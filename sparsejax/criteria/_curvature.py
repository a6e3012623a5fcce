"""Criteria and diagonals by the Hessian of the mean loss over batches."""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _checks, _leaves, filters
from sparsejax._typing import Filter, Params, Scores
from sparsejax.criteria import _free, _hessian
from sparsejax.criteria._batches import (
    check_batches,
    check_batches_twice,
    check_chunk_size,
    mean_over,
)


def grasp(
    loss: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    prunable: Filter = filters.weights,
) -> Scores:
    """Scores by θ·(Hg): what the squared norm of the gradient loses when θ becomes zero.

    To first order, removing θ_q changes ‖g‖² by -2 θ_q (Hg)_q: a weight with a high score carries
    gradient flow, one with a negative score stands in its way, and goes first. GraSP takes it
    *before* training, to keep what the network learns by; g and H are those of the mean loss.

    Two passes over the batches, of one gradient and one `hessian_vector_product` a batch, compiled
    in every call. Memory: some copies of the params, whatever the number of batches.

    Args:
      loss: `(params, batch) -> number`, the mean over the examples of the batch. GraSP divides the
        logits by a temperature of 200 in it, which makes the softmax almost linear in them.
      params: a pytree of arrays: initial weights.
      batches: an iterable of batches of equal size, of arrays, that can be gone through twice: a
        list, not a generator.
      prunable: the leaves whose gradient counts and that are scored; all others are held fixed.

    Returns:
      Scores like `params`, of either sign, float32 at least.

    Raises:
      TypeError: if `loss` cannot be called or returns no real floating number, or `batches` cannot
        be gone through twice.
      ValueError: if there is no batch, or `prunable` selects nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(params, batch):  # g = H θ = (2, 0.5), H = diag(2, 0.5)
      ...     return jnp.sum(jnp.array([[1.0, 0.25]]) * params["w"] ** 2)
      >>> criteria.grasp(loss, {"w": jnp.ones((1, 2))}, [None])["w"]
      Array([[4.  , 0.25]], dtype=float32)

    References:
      C. Wang, G. Zhang, R. Grosse, *Picking winning tickets before training by preserving gradient
      flow*, ICLR 2020, https://arxiv.org/abs/2002.07376. Their code removes the highest of -θ·Hg,
      which is the same order. It takes two halves of a batch (of 10 examples a class) one by one
      and adds up where we take means, divides by the absolute value of the sum of all scores, and
      draws dense layers anew (Glorot) first: but for the last, positive factors.
    """
    _free.check_loss(loss)
    check_batches_twice(batches)
    free = _free.selected(prunable, params)

    @jax.jit
    def gradient(theta: list[jax.Array], batch: Any) -> list[jax.Array]:
        return _free.wide(jax.grad(_free.scalar_loss(loss, free, batch))(theta))

    @jax.jit
    def product(theta: list[jax.Array], v: list[jax.Array], batch: Any) -> list[jax.Array]:
        return _hessian.product(_free.scalar_loss(loss, free, batch), theta, v)

    g = mean_over(batches, partial(gradient, free.theta))
    hg = mean_over(batches, partial(product, free.theta, g))
    return free.scores([w * h for w, h in zip(_free.wide(free.theta), hg, strict=True)])


def hessian_diagonal(
    loss: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    chunk_size: int = 64,
) -> Params:
    """The diagonal of the Hessian of the mean loss over batches, exactly; for small networks.

    Cost: one `hessian_vector_product` for every parameter and batch, `chunk_size` of them together;
    thousands of parameters are possible, millions are for `hutchinson`. Compiled in every call.

    Args:
      loss: `(params, batch) -> number`, the mean over the examples of the batch.
      params: a pytree of arrays; leaves that are not floating are held fixed.
      batches: any iterable of batches of equal size, of arrays.
      chunk_size: how many products are computed together, at least 1.

    Returns:
      A tree like `params`: float32 at least; a 0-d boolean in the place of a leaf that is not
      floating.

    Raises:
      TypeError: if `loss` cannot be called or returns no real floating number, or `batches` cannot
        be iterated over.
      ValueError: if there is no batch, no leaf is floating, or `chunk_size` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(w, x):
      ...     return jnp.sum(x * w**2) + w[0] * w[1]
      >>> criteria.hessian_diagonal(loss, jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 2.0]]))
      Array([4., 4.], dtype=float32)
    """
    _free.check_loss(loss)
    check_batches(batches)
    check_chunk_size(chunk_size)
    free = _free.floating(params)

    @jax.jit
    def step(theta: list[jax.Array], batch: Any) -> list[jax.Array]:
        value = _free.scalar_loss(loss, free, batch)
        return [_own_diagonal(value, theta, i, chunk_size) for i in range(len(theta))]

    return free.scores(mean_over(batches, partial(step, free.theta)))


def hutchinson(
    loss: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    key: jax.Array,
    samples: int = 32,
) -> Params:
    """An unbiased estimate of `hessian_diagonal`: the mean of v·(Hv) over random signs v.

    The estimate of H_ii has the variance Σ_j H_ij² / n, the sum over all j but i, with n signs: a
    diagonal H is found exactly with a single one. Every batch has signs of its own, so that n is
    `samples` times the number of batches, and H_ij² the mean of the squares of the batches.

    Cost: `samples` `hessian_vector_product`s a batch, one after the other, compiled in every call.

    Args:
      loss: `(params, batch) -> number`, the mean over the examples of the batch.
      params: a pytree of arrays; leaves that are not floating are held fixed.
      batches: any iterable of batches of equal size, of arrays.
      key: a PRNG key; the same key gives the same signs.
      samples: how many vectors of signs a batch, at least 1.

    Returns:
      A tree like `params`: float32 at least; a 0-d boolean in the place of a leaf that is not
      floating. Entries may be negative where those of H are not.

    Raises:
      TypeError: if `loss` cannot be called or returns no real floating number, `batches` cannot be
        iterated over, or `key` is no PRNG key.
      ValueError: if there is no batch, no leaf is floating, or `samples` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(w, x):
      ...     return jnp.sum(x * w**2)
      >>> batches = jnp.array([[1.0, 2.0], [3.0, 2.0]])
      >>> criteria.hutchinson(loss, jnp.ones(2), batches, key=jax.random.key(0), samples=1)
      Array([4., 4.], dtype=float32)

    References:
      C. Bekas, E. Kokiopoulou, Y. Saad, *An estimator for the diagonal of a matrix*, Applied
      Numerical Mathematics 57, 2007, https://doi.org/10.1016/j.apnum.2007.01.003. There the sum is
      divided by that of v·v, which for signs is the same.
    """
    _free.check_loss(loss)
    check_batches(batches)
    _checks.key("key", key)
    count = _checks.known_step("samples", samples, lowest=1)
    free = _free.floating(params)

    @jax.jit
    def add(
        total: list[jax.Array], theta: list[jax.Array], key: jax.Array, batch: Any
    ) -> list[jax.Array]:
        signs = _signs(key, theta)
        found = _hessian.product(_free.scalar_loss(loss, free, batch), theta, signs)
        return [t + v.astype(h.dtype) * h for t, v, h in zip(total, signs, found, strict=True)]

    numbers = itertools.count()

    def of_batch(batch: Any) -> list[jax.Array]:
        keys = jax.random.split(jax.random.fold_in(key, next(numbers)), count)
        zeros = [jnp.zeros(t.shape, _leaves.wide_dtype(t.dtype)) for t in free.theta]
        known = not _leaves.is_traced(*free.theta, keys, *jax.tree.leaves(batch))
        total = _fold(lambda t, k: add(t, free.theta, k, batch), zeros, keys, known=known)
        return [t / count for t in total]

    return free.scores(mean_over(batches, of_batch))


def _own_diagonal(
    value: Callable[[list[jax.Array]], jax.Array],
    theta: list[jax.Array],
    place: int,
    chunk_size: int,
) -> jax.Array:
    """The diagonal of the block of one leaf."""
    leaf = theta[place]
    if leaf.size == 0:
        return _free.wide([leaf])[0]

    def of_leaf(w: jax.Array) -> jax.Array:
        return value([*theta[:place], w.reshape(leaf.shape), *theta[place + 1 :]])

    def entry(i: jax.Array) -> jax.Array:
        unit = jnp.zeros(leaf.size, leaf.dtype).at[i].set(1)
        return jax.jvp(jax.grad(of_leaf), (leaf.ravel(),), (unit,))[1][i]

    places = jnp.arange(leaf.size)
    found = jax.lax.map(entry, places, batch_size=min(chunk_size, leaf.size))
    return _free.wide([found.reshape(leaf.shape)])[0]


def _fold(
    add: Callable[[list[jax.Array], jax.Array], list[jax.Array]],
    total: list[jax.Array],
    keys: jax.Array,
    *,
    known: bool,
) -> list[jax.Array]:
    if not known:
        return jax.lax.scan(lambda t, k: (add(t, k), None), total, keys)[0]
    # No loop of XLA's, in which convolutions on CPU are many times slower.
    for key in keys:
        total = add(total, key)
    return total


def _signs(key: jax.Array, theta: list[jax.Array]) -> list[jax.Array]:
    return [
        jax.random.rademacher(jax.random.fold_in(key, i), t.shape, t.dtype)
        for i, t in enumerate(theta)
    ]
