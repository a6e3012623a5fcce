"""The nuclear norm: sparsity of singular values, that is, low rank."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _leaves, _tree, filters
from sparsejax._typing import Filter, Params, Strength
from sparsejax.penalties import _leafwise


@dataclasses.dataclass(frozen=True)
class Nuclear:
    """λ Σ (singular values) of every prunable leaf; see `nuclear`."""

    strength: Strength
    prunable: Filter = filters.weights

    def __post_init__(self) -> None:
        _leafwise.check_strength("strength", self.strength)
        _leafwise.check_prunable(self.prunable)

    def at(self, step: Any) -> "Nuclear":
        """The same penalty with its schedule read at `step` (optimizer updates done)."""
        return dataclasses.replace(self, strength=_leafwise.read(self.strength, step))

    def value(self, params: Params) -> jax.Array:
        """λ Σ (singular values), a 0-d array (float32, or float64 where a leaf is)."""
        chosen, lam = self._read(params)
        rows = zip(chosen, jax.tree.leaves(params), lam, strict=True)
        return _leafwise.total([a * _sum_of_singular_values(w) for yes, w, a in rows if yes])

    def prox(self, params: Params, step_size: Any) -> Params:
        """Singular values v become max(v - sλ, 0), s = `step_size`, one number."""
        chosen, lam = self._read(params)
        _leafwise.one_step_size(
            step_size, "in a metric of its own for every entry this prox has no closed form"
        )
        thresholds = [step_size * a for a in lam]
        return _leafwise.wide_map(_shrink, chosen, params, (thresholds,))

    def _read(self, params: Params) -> tuple[list[bool], list[Any]]:
        chosen = _leafwise.penalized_leaves(self.prunable, params)
        lam = _leafwise.strengths("strength", self.strength, chosen, params)
        flat = _tree.flatten(params)
        for path, leaf, a, yes in zip(flat.paths, flat.leaves, lam, chosen, strict=True):
            if yes:
                _check_matrix(path, leaf, a)
        return chosen, lam


def nuclear(strength: Strength, *, prunable: Filter = filters.weights) -> Nuclear:
    """λ Σ (singular values), the nuclear norm: its prox sets small ones to exactly zero.

    What is left has low rank and can be stored, and multiplied, as two thin matrices. A leaf counts
    as the matrix of its last axis, all others are rows: a kernel (in, out) as it is, HWIO
    convolutions as (H·W·I, O). Cost: one singular value decomposition a leaf, O(m n min(m, n)), for
    the value and for the prox. It has no slope, so that `transforms.penalized` refuses it;
    `transforms.proximal` around plain SGD takes it.

    Args:
      strength: λ ≥ 0: a number, a schedule, or a tree like the params of one number a leaf.
      prunable: which leaves are penalized; each must have at least two axes.

    Returns:
      A penalty without a slope.

    Raises:
      TypeError, ValueError: if the strength is negative, infinite, NaN or no number; from the
        methods, if a leaf has fewer than two axes or more than one strength (with its path), or
        `step_size` is a tree.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> penalty, w = penalties.nuclear(1.0), {"w": jnp.array([[0.0, 3.0], [0.5, 0.0]])}
      >>> float(penalty.value(w))
      3.5
      >>> penalty.prox(w, 1.0)["w"]  # rank 1
      Array([[0., 2.],
             [0., 0.]], dtype=float32)

    References:
      J.-F. Cai, E. Candès and Z. Shen, *A singular value thresholding algorithm for matrix
      completion*, SIAM J. Optimization 20 (2010), https://arxiv.org/abs/0810.3286
    """
    return Nuclear(strength, prunable)


def _matrix(w: jax.Array) -> jax.Array:
    """All axes but the last are rows: (..., n) to (m, n)."""
    return jnp.reshape(w, (math.prod(w.shape[:-1]), w.shape[-1]))


def _sum_of_singular_values(w: Any) -> jax.Array:
    return jnp.sum(jnp.linalg.svd(_matrix(_leaves.wide(w)), compute_uv=False))


def _shrink(w: jax.Array, threshold: jax.Array) -> jax.Array:
    u, sigma, v = jnp.linalg.svd(_matrix(w), full_matrices=False)
    kept = _leafwise.soft(sigma, threshold)
    # Accelerators multiply in lower precision by default, which would fill the rank up again.
    small = jnp.matmul(u * kept[None, :], v, precision=jax.lax.Precision.HIGHEST)
    return jnp.reshape(small, w.shape)


def _check_matrix(path: str, leaf: Any, strength: Any) -> None:
    """Refuses a leaf that is no matrix, or whose entries have strengths of their own."""
    if len(_leaves.shape_of(leaf) or ()) < 2:
        raise ValueError(
            f"`prunable` must select leaves of at least two axes for the nuclear norm, got "
            f"{_leaves.describe(leaf)} at {path!r}; take filters.weights, and l1 for vectors."
        )
    if _leaves.shape_of(strength) != ():
        raise ValueError(
            f"`strength` must be one number a leaf for the nuclear norm, got "
            f"{_leaves.describe(strength)} at {path!r}: singular values belong to no entry."
        )
