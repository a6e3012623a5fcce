"""Strengths: a grid of them, the largest that matters, and what a list of them must be."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Params, Scalar, SlopedPenalty


def log_grid(largest: Scalar, num: int = 100, ratio: Scalar = 1e-3) -> np.ndarray:
    """Strengths from `largest` down to `ratio · largest`, evenly spaced in their logarithm.

    The grid of glmnet and of scikit-learn's paths. Descending, since a warm-started path begins
    where everything is zero.

    Args:
      largest: the first strength, > 0; for a penalty on a linear model, `max_strength`.
      num: how many, at least 1.
      ratio: the last strength as a fraction of the first, in (0, 1].

    Returns:
      A float64 array of shape (num,).

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import paths
      >>> paths.log_grid(2.0, 4)
      array([2.   , 0.2  , 0.02 , 0.002])

    References:
      J. Friedman, T. Hastie, R. Tibshirani, *Regularization paths for generalized linear models via
      coordinate descent*, Journal of Statistical Software 33 (2010),
      https://doi.org/10.18637/jss.v033.i01, section 2.5.
    """
    _checks.real_number("largest", largest)
    _checks.scalar_or_schedule("largest", largest, positive=True)
    num = _checks.known_step("num", num, 1)
    _checks.real_number("ratio", ratio)
    if not 0 < float(ratio) <= 1:
        raise ValueError(f"`ratio` must be in (0, 1], the last strength by the first, got {ratio}.")
    return np.geomspace(float(largest), float(largest) * float(ratio), num)


def max_strength(grads: Params, penalty: Callable[[Any], SlopedPenalty]) -> float:
    """λ_max: the least strength at which a penalty keeps everything that it penalizes at zero.

    Zero is a minimum in an entry when the penalty's pull there is no weaker than the loss's: when
    the subgradient of least norm is zero. For L1 that is max |gradient|, for groups the largest
    norm of a group; here it is found for any penalty by bisection down to the last float32 (about
    thirty evaluations), so that every strength from the answer on gives zeros and the float below
    it does not.

    It is meant for models that are linear in their penalized params. In a deep network every weight
    multiplies others: at zero all gradients of the weights vanish, zero is stationary at *any*
    strength, and λ_max says nothing. Begin such a path at trained params, and at a strength that
    zeroes nearly all of them, found by doubling.

    Args:
      grads: the gradient of the loss where the penalized entries are zero and all others are at
        their optimum (an intercept at the mean of the targets; log-odds for classes). Elsewhere the
        answer is another point's.
      penalty: the penalty of a strength, such as `penalties.l1`, or
        `lambda s: penalties.elastic_net(0.9 * s, 0.1 * s)`.

    Returns:
      The strength, a float32 number.

    Raises:
      TypeError: if `penalty` gives no penalty with a subgradient.
      ValueError: if a gradient is NaN or infinite, or no strength keeps anything at zero (as with
        L2).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import paths, penalties
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]]), jnp.array([[1.0], [2.0], [6.0]])
      >>> def loss(params):
      ...     return 0.5 * jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
      >>> at_zero = {"b": jnp.mean(y)[None, None], "w": jnp.zeros((2, 1))}
      >>> round(paths.max_strength(jax.grad(loss)(at_zero), penalties.l1), 4)
      1.3333
    """
    _checks.function("penalty", penalty, "strength -> penalty", "sparsejax.penalties.l1")
    largest = _largest_gradient(grads)
    if largest == 0:
        return 0.0

    @jax.jit
    def zeros_at(strength: jax.Array, grads: Params) -> list[jax.Array]:
        at_zero = jax.tree.map(jnp.zeros_like, grads)
        answer = penalty(strength)
        if not isinstance(answer, SlopedPenalty):
            raise TypeError(
                "`penalty` must give a penalty with a subgradient for a strength, as penalties.l1 "
                f"does, got {_leaves.brief(answer)}."
            )
        return [x == 0 for x in jax.tree.leaves(answer.subgradient(grads, at_zero))]

    # Far above any λ_max, and still far from the end of float32.
    huge = np.float32(min(largest * 2.0**40, 2.0**120))
    held = zeros_at(huge, grads)
    if not any(bool(jnp.any(h & (g != 0))) for h, g in _pairs(held, grads)):
        raise ValueError(
            "`penalty` must keep entries at zero where it is strong, as L1 does, got one that "
            f"keeps none whose gradient is not zero, at a strength of {huge:.3g}; look at its "
            "`prunable`, and whether `grads` is zero on what it selects."
        )

    def keeps(strength: np.float32) -> bool:
        return all(bool(jnp.all(z | ~h)) for z, h in _pairs(zeros_at(strength, grads), held))

    return float(_least_float32(keeps, huge))


def checked(strengths: Any) -> np.ndarray:
    """The strengths as float64, one axis, all of them finite and >= 0."""
    array = np.asarray(strengths)
    if array.dtype.kind not in "iuf" and not _leaves.is_floating(array):
        raise TypeError(f"`strengths` must be real numbers, got {_leaves.brief(strengths)}.")
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"`strengths` must be a list of at least one number, got the shape {array.shape}; "
            "for example paths.log_grid(1.0)."
        )
    grid = array.astype(float)
    wrong = np.flatnonzero(~((grid >= 0) & np.isfinite(grid)))
    if wrong.size:
        raise ValueError(
            f"`strengths` must be finite and >= 0, got {grid[wrong[0]]} at index {wrong[0]}."
        )
    return grid


def _pairs(leaves: Sequence[Any], tree: Any) -> Iterator[tuple[Any, Any]]:
    return zip(leaves, jax.tree.leaves(tree), strict=True)


def _largest_gradient(grads: Params) -> float:
    """The largest |gradient|, all of them checked to be finite."""
    flat = _tree.flatten(grads)
    largest = 0.0
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if not _leaves.is_floating(leaf):
            raise TypeError(
                f"`grads` must be floating arrays, got {_leaves.describe(leaf)} at {path!r}."
            )
        top = float(np.max(np.abs(np.asarray(leaf, float)), initial=0))
        if not np.isfinite(top):
            raise ValueError(
                f"`grads` must be finite, got {top} at {path!r}; look for an overflow in the loss."
            )
        largest = max(largest, top)
    return largest


def _least_float32(holds: Callable[[np.float32], bool], upper: np.float32) -> np.float32:
    """The least float >= 0 where it holds, if it does from there to `upper`; by bisection.

    Floats >= 0 are in the order of their bits.
    """
    low, high = -1, int(upper.view(np.int32))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(np.int32(middle).view(np.float32)) else (middle, high)
    return np.int32(high).view(np.float32)
