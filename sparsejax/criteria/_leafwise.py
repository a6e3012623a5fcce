"""Criteria that look at one leaf at a time, and how they go through a tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Criterion, Params, Scores


def magnitude(params: Params, grads: Params = None) -> Scores:
    """Scores by |θ|: what is small is assumed to matter little. One read, one write.

    Args:
      params: a pytree of arrays.
      grads: not looked at; here so that every criterion is called alike.

    Returns:
      Scores like `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> criteria.magnitude({"w": jnp.array([[3.0, -4.0]])})["w"]
      Array([[3., 4.]], dtype=float32)

    References:
      S. Han, J. Pool, J. Tran, W. Dally, *Learning both weights and connections for efficient
      neural networks*, NeurIPS 2015, https://arxiv.org/abs/1506.02626
    """
    del grads
    return score(jnp.abs, params)


def gradient(params: Params, grads: Params) -> Scores:
    """Scores by |g|: how much the function moves per unit of the parameter. One read, one write.

    Args:
      params: a pytree of arrays.
      grads: gradients of a loss, or the importance from `output_gradient`; structure and shapes
        of `params`, `None` where a leaf has none.

    Returns:
      Scores like `params`.

    Raises:
      ValueError: if structure or shapes do not match, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> criteria.gradient({"w": jnp.ones((1, 2))}, {"w": jnp.array([[0.5, -2.0]])})["w"]
      Array([[0.5, 2. ]], dtype=float32)

    References:
      M. Mozer and P. Smolensky, *Skeletonization: a technique for trimming the fat from a network
      via relevance assessment*, NeurIPS 1988,
      https://proceedings.neurips.cc/paper/1988/hash/07e1cd7dca89a1678042477183b7ac3f-Abstract.html
    """
    return score(lambda w, g: jnp.abs(g), params, grads)


def taylor(params: Params, grads: Params) -> Scores:
    """Scores by |θ·g|: to first order, how much the function changes when θ becomes zero.

    Args:
      params: a pytree of arrays.
      grads: gradients, structure and shapes of `params`, `None` where a leaf has none.

    Returns:
      Scores like `params`. An infinite gradient at a zero parameter gives NaN.

    Raises:
      ValueError: if structure or shapes do not match, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> params, grads = {"w": jnp.array([[3.0, -4.0]])}, {"w": jnp.array([[2.0, 0.5]])}
      >>> criteria.taylor(params, grads)["w"]
      Array([[6., 2.]], dtype=float32)

    References:
      P. Molchanov, S. Tyree, T. Karras, T. Aila, J. Kautz, *Pruning convolutional neural networks
      for resource efficient inference*, ICLR 2017, https://arxiv.org/abs/1611.06440; here per
      entry, there summed over feature maps before the absolute value.
    """
    return score(lambda w, g: jnp.abs(w * g), params, grads)


def snip(params: Params, grads: Params) -> Scores:
    """Scores by |θ·g| / Σ|θ·g|: which share of the loss's sensitivity a connection has.

    |θ·g| is the derivative of the loss in a gate c that multiplies the weight, at c = 1. It is
    `taylor`, in the same order; divided by the sum over all scored leaves, scores of different
    batches, losses and networks compare. SNIP takes it *before* training, on one batch or several.

    Args:
      params: a pytree of arrays: initial weights.
      grads: gradients of the loss, such as those of `mean_gradients`; structure and shapes of
        `params`, `None` where a leaf has none.

    Returns:
      Scores like `params`, >= 0, with a sum of 1; all 0 if every θ·g is. No θ·g overflows;
      a θ or g that is not finite gives NaN.

    Raises:
      ValueError: if structure or shapes do not match, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> params, grads = {"w": jnp.array([[3.0, -4.0]])}, {"w": jnp.array([[2.0, 0.5]])}
      >>> criteria.snip(params, grads)["w"]
      Array([[0.75, 0.25]], dtype=float32)

    References:
      N. Lee, T. Ajanthan, P. Torr, *SNIP: single-shot network pruning based on connection
      sensitivity*, ICLR 2019, https://arxiv.org/abs/1810.02340. There the sum is over what may be
      pruned, which changes the scores by a factor only. The paper draws the weights with a variance
      that keeps that of the signal (Glorot), and so does its result depend on it.
    """
    scores = _scaled_taylor(params, grads)
    total = sum(jnp.sum(s) for s in jax.tree.leaves(scores) if _leaves.is_floating(s))
    divisor = jnp.where(total == 0, 1, total)
    return score(lambda s: s / divisor.astype(s.dtype), scores)


def _scaled_taylor(params: Params, grads: Params) -> Scores:
    """`taylor` over a power of two for which neither a product nor their sum overflows."""
    lowest = jnp.iinfo(jnp.int16).min

    def parts(w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        (m, a), (n, b) = jnp.frexp(jnp.abs(w)), jnp.frexp(jnp.abs(g))
        return m * n, jnp.where(m * n == 0, lowest, a + b)

    tops = score(lambda w, g: jnp.max(parts(w, g)[1], initial=lowest), params, grads)
    top: Any = lowest
    for largest in jax.tree.leaves(tops):
        if largest.dtype != bool:
            top = jnp.maximum(top, largest)

    def scaled(w: jax.Array, g: jax.Array) -> jax.Array:
        product, exponent = parts(w, g)
        return jnp.ldexp(product, exponent - top)

    return score(scaled, params, grads)


def obd(params: Params, diagonal: Params) -> Scores:
    """Scores by ½ θ² H_ii: by how much the loss grows when θ becomes zero at a minimum.

    Optimal brain damage: the second-order expansion of the loss where its gradient is zero, with
    the diagonal of the Hessian alone.

    Args:
      params: a pytree of arrays: trained weights.
      diagonal: diag(H), by `hessian_diagonal`, `hutchinson`, or anything else that stands for it;
        structure and shapes of `params`, `None` where a leaf has none.

    Returns:
      Scores like `params`; negative where the loss bends down, so that removing θ seems to help.

    Raises:
      ValueError: if structure or shapes do not match, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(params, batch):  # diag(H) = (2, 0.5)
      ...     return jnp.sum(jnp.array([[1.0, 0.25]]) * params["w"] ** 2)
      >>> params = {"w": jnp.array([[1.0, 4.0]])}
      >>> criteria.obd(params, criteria.hessian_diagonal(loss, params, [None]))["w"]
      Array([[1., 4.]], dtype=float32)

    References:
      Y. LeCun, J. Denker, S. Solla, *Optimal brain damage*, NeurIPS 1989,
      https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html.
      There diag(H) is propagated backwards with the Gauss-Newton approximation, which is >= 0.
    """
    return score(lambda w, h: w * w * h / 2, params, diagonal, name="diagonal")


def random(key: jax.Array) -> Criterion:
    """A criterion that scores uniformly at random: the baseline every other one must beat.

    Args:
      key: a PRNG key; the same key gives the same scores.

    Returns:
      A criterion `(params, grads=None) -> scores`, with independent scores in [0, 1) in each leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> scores = criteria.random(jax.random.key(0))({"w": jnp.ones((2, 3))})
      >>> scores["w"].shape, bool(jnp.all((scores["w"] >= 0) & (scores["w"] < 1)))
      ((2, 3), True)
    """
    _checks.key("key", key)

    def criterion(params: Params, grads: Params = None) -> Scores:
        del grads
        flat = _tree.flatten(params)
        return flat.rebuild(
            [
                # The zeros are sharded like the leaf.
                jax.random.uniform(jax.random.fold_in(key, i), np.shape(leaf))
                + jnp.zeros_like(leaf, jnp.float32)
                if _leaves.is_inexact(leaf)
                else unscored()
                for i, leaf in enumerate(flat.leaves)
            ]
        )

    return criterion


def score(
    f: Callable[..., jax.Array], params: Params, *others: Params, name: str = "grads"
) -> Scores:
    """Maps `f(leaf of params, leaf of each other tree)` over the floating leaves, in float32.

    Args:
      f: what gives the scores of a leaf.
      params: a pytree of arrays.
      *others: trees like `params`; a leaf is not scored where one of them has no floating array.
      name: what errors call the other trees.

    Returns:
      Scores like `params`.
    """
    flat = _tree.flatten(params)
    columns = [_tree.align(name, other, "params", params) for other in others]
    rows = zip(flat.leaves, *columns, strict=True)
    return flat.rebuild(
        [_score_leaf(f, path, row, name) for path, row in zip(flat.paths, rows, strict=True)]
    )


def _score_leaf(f: Callable[..., jax.Array], path: str, row: tuple[Any, ...], name: str) -> Any:
    if not all(_leaves.is_inexact(x) for x in row):
        return unscored()
    for other in row[1:]:
        _checks.same_shape(name, path, other, "params", row[0])
    return f(*map(_leaves.wide, row))


def unscored() -> np.ndarray:
    """What stands for scores where there are none."""
    return np.zeros((), bool)
