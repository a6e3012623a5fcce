"""Products of the Hessian with a vector."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Params
from sparsejax.criteria import _free


def hessian_vector_product(
    loss: Callable[..., Any], params: Params, vector: Params, *batch: Any
) -> Params:
    """Hv: the derivative of the gradient in the direction v, exact, without the Hessian.

    Forward over reverse mode: `jax.jvp` of `jax.grad`. It takes about twice the time of a gradient
    and twice its memory, whatever the number of parameters.

    Args:
      loss: `(params, *batch) -> number`. Compile it, or what calls this.
      params: a pytree of arrays; leaves that are not floating are held fixed.
      vector: v; structure and shapes of `params`, `None` (or anything that is no floating array)
        where it is zero.
      *batch: what `loss` takes besides `params`.

    Returns:
      A tree like `params`: float32 at least, though computed in the precision of the leaf; a 0-d
      boolean in the place of a leaf that is not floating.

    Raises:
      TypeError: if `loss` cannot be called or returns no real floating number.
      ValueError: if structure or shapes do not match, with the leaf's path, or if no leaf is
        floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(w):  # Hessian [[2, 3], [3, 0]]
      ...     return w[0] ** 2 + 3 * w[0] * w[1]
      >>> criteria.hessian_vector_product(loss, jnp.ones(2), jnp.array([1.0, 0.0]))
      Array([2., 3.], dtype=float32)

    References:
      B. Pearlmutter, *Fast exact multiplication by the Hessian*, Neural Computation 6, 1994,
      https://doi.org/10.1162/neco.1994.6.1.147
    """
    _checks.function("loss", loss, "(params, *batch) -> number", "a mean cross-entropy")
    free = _free.floating(params)
    _tree.check_shapes("vector", vector, params)
    rows = zip(_tree.align("vector", vector, "params", params), free.chosen, strict=True)
    given = [v for v, yes in rows if yes]
    directions = [
        jnp.asarray(v) if _leaves.is_floating(v) else jnp.zeros_like(w)
        for v, w in zip(given, free.theta, strict=True)
    ]
    return free.scores(product(_free.scalar_loss(loss, free, *batch), free.theta, directions))


def product(
    value: Callable[[list[jax.Array]], jax.Array],
    theta: list[jax.Array],
    direction: list[jax.Array],
) -> list[jax.Array]:
    """Hv of a function of a list of arrays, float32 at least."""
    tangents = [v.astype(w.dtype) for v, w in zip(direction, theta, strict=True)]
    return _free.wide(jax.jvp(jax.grad(value), (theta,), (tangents,))[1])
