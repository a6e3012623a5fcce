"""LAMP: scores that compare across layers."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax._typing import Params, Scores
from sparsejax.criteria._leafwise import score


def lamp(params: Params, grads: Params = None) -> Scores:
    """Scores by LAMP: θ² over the sum of the squares in the leaf that are not smaller.

    `score_u = θ_u² / Σ_v θ_v²` over the entries v of the same leaf that rank not below u, by |θ|
    and, where that is equal, the lower flat index higher. Within a leaf the order is that of
    `magnitude`; across leaves the scores compare, which makes a global threshold choose the
    sparsity of every leaf (`masking.topk(scores, sparsity)`). The largest entry of every leaf
    scores 1, so that no leaf is emptied before all of them are down to one entry.

    Sorts every leaf, the slowest of the criteria by far, and gathers a leaf that is sharded.

    Args:
      params: a pytree of arrays.
      grads: not looked at; here so that every criterion is called alike.

    Returns:
      Scores like `params`, in [0, 1], independent of a leaf's scale. Different magnitudes have
      different scores, unless these are below the least normal number, 1e-38 (2e-308 in float64):
      such may be 0, the score of zeros. NaN scores NaN (which `masking.topk` refuses) and does not
      count for the others; where there are infinite entries, finite ones score 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> criteria.lamp({"w": jnp.array([[1.0, -2.0, 2.0]])})["w"]  # 1/9, 4/4, 4/8
      Array([[0.11111111, 1.        , 0.5       ]], dtype=float32)

    References:
      J. Lee, S. Park, S. Mo, S. Ahn, J. Shin, *Layer-adaptive sparsity for the magnitude-based
      pruning*, ICLR 2021, https://arxiv.org/abs/2010.07611. Its code takes sums of the smaller
      squares from the total, which cancels; here the sums begin at the largest square.
    """
    del grads
    return score(_lamp, params)


def _lamp(w: jax.Array) -> jax.Array:
    sharding = jax.typeof(w).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return _lamp_whole(w)
    # Here nothing is gathered unless one says so, and a sort needs the whole leaf.
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.reshard(_lamp_whole(jax.sharding.reshard(w, whole)), sharding)


def _lamp_whole(w: jax.Array) -> jax.Array:
    if w.size == 0:
        return jnp.abs(w)
    magnitude = jnp.ravel(jnp.abs(w))
    nan = jnp.isnan(magnitude)
    magnitude = jnp.where(nan, 0, magnitude)
    # Stable: of equal magnitudes the lower flat index comes first.
    indices = jnp.arange(magnitude.size)
    negative, order = jax.lax.sort((-magnitude, indices), num_keys=1, is_stable=True)
    # The first square is 1 or more, unless all are zero.
    squares = jnp.square(_scaled(-negative))
    ranked = _decreasing(squares / jnp.maximum(jnp.cumsum(squares), 1), negative)
    scores = jnp.zeros_like(ranked).at[order].set(ranked, unique_indices=True)
    return jnp.where(nan, jnp.nan, scores).reshape(w.shape)


def _scaled(descending: jax.Array) -> jax.Array:
    """Magnitudes by the power of two that brings the first into [2, 4); infinite ones as 1.

    Exact, where a quotient by the first would not be: XLA takes its reciprocal, maybe a denormal.
    """
    dtype = descending.dtype
    integer = np.dtype(f"int{8 * dtype.itemsize}")
    infinity = np.asarray(np.inf, dtype).view(integer)
    exponent = jax.lax.bitcast_convert_type(descending[0], integer) & infinity
    power = jax.lax.bitcast_convert_type(infinity - exponent, dtype)
    finite = descending * jnp.where(exponent == 0, 0, power)
    return jnp.where(exponent == infinity, jnp.isinf(descending).astype(dtype), finite)


def _decreasing(scores: jax.Array, ascending: jax.Array) -> jax.Array:
    """The scores, lowered by as few units in the last place as make them decrease strictly.

    A parallel sum is rounded here up and there down, which would change the order of neighbours.
    A score is the bits of an integer that orders as it does; it must be less by one at least
    wherever `ascending` moves on, and no more anywhere.
    """
    integer = np.dtype(f"int{8 * scores.dtype.itemsize}")
    moves = jnp.zeros(ascending.shape, integer).at[1:].set(ascending[1:] != ascending[:-1])
    steps = jnp.cumsum(moves)
    keys = jax.lax.bitcast_convert_type(scores, integer)
    lowered = jnp.maximum(jax.lax.cummin(keys + steps) - steps, 0)
    return jax.lax.bitcast_convert_type(lowered, scores.dtype)
