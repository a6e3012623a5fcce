"""Gradients of several batches: their mean, and the mean of what they do."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Params, Scalar, Scores
from sparsejax.criteria import _free
from sparsejax.criteria._batches import check_batches, looking_at, mean_over, none_given


def mean_gradients(
    grad_fn: Callable[[Params, Any], Params], params: Params, batches: Iterable[Any]
) -> Params:
    """The mean of the gradients over several batches, for criteria that look at gradients.

    The gradient of one batch is mostly noise. A mean of signed gradients is the gradient on all the
    batches together; for a mean of absolute values let `grad_fn` take them. One batch at a time, in
    float32 or wider, so memory does not grow with their number. Compile `grad_fn`.

    Args:
      grad_fn: `(params, batch) -> grads`, such as `jax.jit(jax.grad(loss))`.
      params: a pytree of arrays.
      batches: any iterable of batches of equal size: a list, a generator, or an array whose
        first axis counts batches.

    Returns:
      A tree like the gradients, float32 at least; what is no floating array (`None`, float0) is
      that of the first.

    Raises:
      TypeError: if `grad_fn` cannot be called or `batches` not iterated over.
      ValueError: if there is no batch, or gradients of two batches do not match.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(w, x):
      ...     return jnp.sum(w * x)
      >>> batches = [jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0])]
      >>> criteria.mean_gradients(jax.grad(loss), jnp.zeros(2), batches)
      Array([2., 4.], dtype=float32)
    """
    _checks.function("grad_fn", grad_fn, "(params, batch) -> grads", "jax.jit(jax.grad(loss))")
    check_batches(batches)
    total, count = None, 0
    for batch in batches:
        with looking_at(batch, count):
            grads = grad_fn(params, batch)
        total = grads if total is None else _sum_of_gradients(grads, total)
        count += 1
    if count == 0:
        raise none_given()
    mean = _tree.flatten(total)
    return mean.rebuild(
        [_leaves.wide(g) / count if _leaves.is_inexact(g) else g for g in mean.leaves]
    )


def mean_taylor(
    loss: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    power: Scalar = 1,
) -> Scores:
    """Scores by the mean of |θ·g|ᵖ over batches, each with its own gradient g.

    `taylor(params, mean_gradients(...))` takes the absolute value of the mean: batches whose
    gradients point in opposite directions cancel, and at a minimum nothing is left but rounding.
    Here they do not. With batches of one example each, it is the mean over examples.

    One gradient a batch, compiled in every call; memory does not grow with their number.

    Args:
      loss: `(params, batch) -> number`, the mean over the examples of the batch.
      params: a pytree of arrays; leaves that are not floating are held fixed.
      batches: any iterable of batches of equal size, of arrays.
      power: p > 0: 1 for absolute values, 2 for squares, which weigh rare large effects more.

    Returns:
      Scores like `params`, >= 0, float32 at least.

    Raises:
      TypeError: if `loss` cannot be called or returns no real floating number, or `batches` cannot
        be iterated over.
      ValueError: if there is no batch, no leaf is floating, or `power` is not > 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(params, x):
      ...     return jnp.sum(params["w"] * x)
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[-1.0, 2.0]])]
      >>> criteria.mean_taylor(loss, {"w": jnp.array([[3.0, 1.0]])}, batches)["w"]
      Array([[3., 2.]], dtype=float32)

    References:
      P. Molchanov, A. Mallya, S. Tyree, I. Frosio, J. Kautz, *Importance estimation for neural
      network pruning*, CVPR 2019, https://arxiv.org/abs/1906.10771: the squares, there summed over
      the entries of a filter after they are squared, as `granularities.Channel(pool=jnp.sum)` does.
    """
    _free.check_loss(loss)
    check_batches(batches)
    _checks.real_number("power", power)
    if not _leaves.is_traced(power) and float(power) <= 0:
        raise ValueError(f"`power` must be > 0, got {power}.")
    free = _free.floating(params)
    exponent: Any = power

    @jax.jit
    def step(theta: list[jax.Array], batch: Any) -> list[jax.Array]:
        grads = jax.grad(_free.scalar_loss(loss, free, batch))(theta)
        pairs = zip(_free.wide(theta), _free.wide(grads), strict=True)
        return [jnp.abs(w * g) ** exponent for w, g in pairs]

    return free.scores(mean_over(batches, partial(step, free.theta)))


def _sum_of_gradients(grads: Params, total: Params) -> Params:
    """The sum, in the structure of `total`."""
    flat = _tree.flatten(total)
    _tree.check_shapes("grads", grads, total)
    rows = list(zip(_tree.align("grads", grads, "total", total), flat.leaves, strict=True))
    for path, (g, a) in zip(flat.paths, rows, strict=True):
        if _leaves.is_inexact(g) != _leaves.is_inexact(a):
            raise ValueError(
                f"`grads` must be of one kind in all batches, got {_leaves.describe(g)} after "
                f"{_leaves.describe(a)} at {path!r}."
            )
    return flat.rebuild(
        [_leaves.wide(a) + _leaves.wide(g) if _leaves.is_inexact(a) else a for g, a in rows]
    )
