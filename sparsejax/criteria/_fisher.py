"""The empirical Fisher information: squares of the gradients of single examples."""

from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _leaves
from sparsejax._typing import Params, Scores
from sparsejax.criteria import _free
from sparsejax.criteria._batches import (
    check_batches,
    check_chunk_size,
    check_examples,
    looking_at,
    none_given,
)


def fisher(
    loss: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    chunk_size: int = 1,
) -> Scores:
    """Scores by ½ θ² times the mean of g² over examples, each with its own gradient g.

    For a log-likelihood the mean of g² is the diagonal of the (empirical) Fisher information, which
    at a minimum is near that of the Hessian: the scores then are those of `obd`, by how much the
    loss grows when θ becomes zero, without second derivatives and never negative.

    Cost: one backward pass an example, compiled in every call. Memory: `chunk_size` + 1 copies of
    the floating params, whatever the number of examples.

    Args:
      loss: `(params, batch) -> number`, the mean over the examples of the batch, which must not
        depend on each other (no batch statistics): it is called with batches of one example.
      params: a pytree of arrays; leaves that are not floating are held fixed.
      batches: any iterable of batches: arrays or pytrees of arrays with a common leading axis of
        examples. Every example counts alike, whatever the size of its batch.
      chunk_size: how many examples are differentiated together, at least 1. On CPU 1 is fastest by
        far for convolutions (`vmap` over a kernel's gradient is slow); accelerators want more.

    Returns:
      Scores like `params`, >= 0, float32 at least.

    Raises:
      TypeError: if `loss` cannot be called or returns no real floating number, or `batches` cannot
        be iterated over.
      ValueError: if there is no batch or an empty one, leading axes differ, no leaf is floating, or
        `chunk_size` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(params, x):
      ...     return jnp.mean(x @ params["w"])
      >>> params = {"w": jnp.array([[1.0], [2.0]])}
      >>> examples = jnp.array([[1.0, 0.0], [-3.0, 1.0]])  # their gradients are themselves
      >>> criteria.fisher(loss, params, [examples])["w"]
      Array([[2.5],
             [1. ]], dtype=float32)

    References:
      L. Theis, I. Korshunova, A. Tejani, F. Huszár, *Faster gaze prediction with dense networks and
      Fisher pruning*, 2018, https://arxiv.org/abs/1801.05787; there summed over feature maps before
      the square.
    """
    _free.check_loss(loss)
    check_batches(batches)
    check_chunk_size(chunk_size)
    free = _free.floating(params)
    add = jax.jit(partial(_add_chunk, loss, free), static_argnames="size")
    total = [jnp.zeros(t.shape, _leaves.wide_dtype(t.dtype)) for t in free.theta]
    count = 0
    for batch in batches:
        with looking_at(batch, count):
            examples = check_examples("batches", batch)
            arrays = jax.tree.map(jnp.asarray, batch)
            total = _add_batch(add, total, free.theta, arrays, examples, chunk_size)
        count += examples
    if count == 0:
        raise none_given()
    pairs = zip(_free.wide(free.theta), total, strict=True)
    return free.scores([w * w * (t / count) / 2 for w, t in pairs])


def _add_batch(
    add: Callable[..., list[jax.Array]],
    total: list[jax.Array],
    theta: list[jax.Array],
    batch: Any,
    examples: int,
    size: int,
) -> list[jax.Array]:
    """Adds the squares of all examples of a batch, chunk by chunk."""
    chunks = examples // size
    if _leaves.is_traced(*total, *theta, *jax.tree.leaves(batch)):

        def step(i: jax.Array, total: list[jax.Array]) -> list[jax.Array]:
            return add(total, theta, batch, i * size, size=size)

        total = jax.lax.fori_loop(0, chunks, step, total)
    else:
        # No loop of XLA's, in which convolutions on CPU are many times slower.
        for i in range(chunks):
            total = add(total, theta, batch, i * size, size=size)
    if rest := examples % size:
        total = add(total, theta, batch, chunks * size, size=rest)
    return total


def _add_chunk(
    loss: Callable[[Params, Any], Any],
    free: _free.Free,
    total: list[jax.Array],
    theta: list[jax.Array],
    batch: Any,
    start: jax.Array | int,
    *,
    size: int,
) -> list[jax.Array]:
    """Adds the squares of the gradients of some examples of a batch."""

    def squares(example: Any) -> list[jax.Array]:
        one = jax.tree.map(lambda x: x[None], example)
        grads = jax.grad(_free.scalar_loss(loss, free, one))(theta)
        return [jnp.square(g) for g in _free.wide(grads)]

    chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), batch)
    if size == 1:
        sums = squares(jax.tree.map(itemgetter(0), chunk))
    else:
        sums = [jnp.sum(s, axis=0) for s in jax.vmap(squares)(chunk)]
    return [t + s for t, s in zip(total, sums, strict=True)]
