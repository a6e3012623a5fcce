"""Synaptic flow: what goes through a weight when all weights are positive; needs no data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves
from sparsejax._typing import Params, Scores
from sparsejax.criteria import _free

# Beyond these, the least shares of the flow, or something on the way to it, may be out of range.
_LEAST, _MOST = 1e-15, 1e30


def synflow(apply_fn: Callable[[Params, Any], Any], params: Params, inputs: Any) -> Scores:
    """Scores by |θ|·∂R/∂|θ| / R: the share of the flow R that goes through a weight; no data.

    R is the sum of all outputs of the network with |θ| in the place of every parameter, on inputs
    of ones: for layers of weights with ReLUs between them, the sum over all paths from an input to
    an output of the product of their |θ|. A weight scores the share of it on paths through it.
    Without biases these shares add up to 1 in every layer, and over the weights into a unit to what
    those out of it add up to. A layer of few weights therefore has high scores: pruned a little at
    a time with new scores in between (`pruning.synflow`), no layer loses its last weight before
    every layer is down to very few. A single round of it has no such property.

    R is a product over layers, which overflows or underflows in float32 for deep or very sparse
    networks. The authors return |θ|·∂R/∂|θ| itself; divided by R nothing changes but a factor, and
    the scores stay in range. Where R itself (or something on the way to it) is out of the range of
    float32, everything is computed once more in float64, whatever JAX is set to; under `jit`, where
    this cannot be seen, scores are then NaN or zero: call it outside, or give it float64 params.

    Cost: one forward and one backward pass, on as many examples as `inputs` has; one is enough.

    Args:
      apply_fn: `(params, inputs) -> outputs`, real floating, before any softmax. Dropout must be
        off, and normalization must not take its statistics from the batch. Compile it where this is
        called again and again.
      params: a pytree of arrays. Leaves that are not floating are as they are. Biases and scales
        count in absolute value, as in the authors' code; set biases to zero in what you pass for
        the flow of the weights alone, which is what is conserved (at initialization they are).
      inputs: an array or a pytree of arrays (or of `jax.ShapeDtypeStruct`), of which only the
        shapes count: ones take the place of what is floating. Integers, such as tokens, stay.

    Returns:
      Scores like `params`, >= 0: float32, float64 for float64 leaves. Zero where nothing flows:
      where θ is zero, and where what comes before or after is.

    Raises:
      TypeError: if `apply_fn` cannot be called or its output is no real floating array.
      ValueError: if no leaf is floating; or, outside `jit`, if R is not > 0 and finite: nothing
        flows through a network with a layer of zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.array([[-1.0], [4.0]])}
      >>> criteria.synflow(apply, params, jnp.zeros((1, 1)))  # paths 1·1 and 2·4
      {'in': Array([[0.11111111, 0.8888889 ]], dtype=float32),
       'out': Array([[0.11111111],
       [0.8888889 ]], dtype=float32)}

    References:
      H. Tanaka, D. Kunin, D. Yamins, S. Ganguli, *Pruning neural networks without any data by
      iteratively conserving synaptic flow*, NeurIPS 2020, https://arxiv.org/abs/2006.05467.
    """
    _checks.function("apply_fn", apply_fn, "(params, inputs) -> outputs", "a Flax apply function")
    free = _free.floating(params)
    dtype = jnp.result_type(jnp.float32, *(_leaves.wide_dtype(t.dtype) for t in free.theta))
    flow, shares = _shares(dtype, apply_fn, free, inputs)
    if _leaves.is_traced(flow, *shares) or (_LEAST < float(flow) < _MOST and _finite(shares)):
        return free.scores(shares)
    try:
        exact_flow, exact_shares = _shares_in_float64(apply_fn, free, inputs)
    except TypeError as error:
        # Its layers have a dtype of their own: then float32 must do, where it does.
        if float(flow) > 0 and _finite([flow, *shares]):
            return free.scores(shares)
        raise ValueError(
            "`apply_fn` must work in float64, too, where the flow is out of the range of float32, "
            "as it is here; let its layers compute in the dtype of the params."
        ) from error
    _check_flow(exact_flow, exact_shares)
    return free.scores(exact_shares)


def _shares_in_float64(
    apply_fn: Callable[[Params, Any], Any], free: _free.Free, inputs: Any
) -> tuple[float, list[jax.Array]]:
    """R and the shares, where the exponents of float32 are too few."""
    with jax.enable_x64(True):
        flow, shares = _shares(jnp.float64, apply_fn, free, inputs)
        pairs = zip(shares, free.theta, strict=True)
        return float(flow), [s.astype(_leaves.wide_dtype(t.dtype)) for s, t in pairs]


def _shares(
    dtype: Any, apply_fn: Callable[[Params, Any], Any], free: _free.Free, inputs: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """R and every entry's share of it, computed in a dtype."""
    positive = [jnp.abs(t).astype(dtype) for t in free.theta]
    ones = jax.tree.map(lambda x: _one(x, dtype), inputs)

    def flow(theta: list[jax.Array]) -> jax.Array:
        outputs = apply_fn(free.params(theta), ones)
        if not _leaves.is_floating(outputs):
            raise TypeError(
                "`apply_fn` must return one array of real floating numbers, got "
                f"{_leaves.describe(outputs)}; wrap it so that it returns the outputs alone."
            )
        return jnp.sum(outputs.astype(dtype))

    total, slopes = jax.value_and_grad(flow)(positive)
    # Nothing flows through anything where the total is zero.
    divisor = jnp.where(total == 0, 1, jnp.abs(total))
    return total, [t * (s / divisor) for t, s in zip(positive, slopes, strict=True)]


def _one(leaf: Any, dtype: Any) -> Any:
    if _leaves.is_floating(leaf):
        return jnp.ones(leaf.shape, dtype)
    return jnp.ones(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _finite(arrays: list[jax.Array]) -> bool:
    return all(bool(jnp.all(jnp.isfinite(x))) for x in arrays)


def _check_flow(flow: float, shares: list[jax.Array]) -> None:
    if flow == 0:
        raise ValueError(
            "`params` must let something through: the sum of the outputs of `apply_fn` with "
            "|params| on ones is 0; look for a layer that is all zeros."
        )
    if flow < 0:
        raise ValueError(
            "`apply_fn` must return outputs that grow with |params|, such as logits before any "
            f"softmax, got outputs whose sum with |params| on ones is {flow:.4g}."
        )
    if not np.isfinite(flow) or not _finite(shares):
        raise ValueError(
            "The flow must be finite: the sum of the outputs of `apply_fn` with |params| on ones "
            f"is {flow}; look for NaN in `params`, and let `apply_fn` compute in their dtype."
        )
