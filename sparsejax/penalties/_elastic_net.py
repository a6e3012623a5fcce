"""L1, L2, and both: the elastic net.

Proximal operators in closed form: N. Parikh and S. Boyd, *Proximal Algorithms*, Foundations and
Trends in Optimization 1 (2014), https://web.stanford.edu/~boyd/papers/prox_algs.html, section
6.5.2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _leaves, filters
from sparsejax._typing import Filter, Params, Strength
from sparsejax.penalties import _leafwise


@dataclasses.dataclass(frozen=True)
class ElasticNet:
    """λ₁ Σ|w| + (λ₂/2) Σw² over the prunable leaves; `l1` and `l2` are its two ends.

    All methods are pure, work under `jit`, `vmap` and `grad`, leave what is not prunable as it is,
    and compute in float32 (or wider) whatever the leaf's dtype. Strengths may be schedules: read
    them with `at(step)`.

    Args:
      l1_strength: λ₁ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      l2_strength: λ₂ ≥ 0, likewise.
      prunable: which leaves are penalized.

    Raises:
      TypeError, ValueError: if a strength is negative, infinite, NaN or no number.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> penalty = penalties.elastic_net(0.5, 1.0)
      >>> w = {"w": jnp.array([[2.0, -0.25]])}
      >>> float(penalty.value(w))
      3.15625
      >>> penalty.prox(w, 1.0)["w"]
      Array([[0.75, 0.  ]], dtype=float32)
    """

    l1_strength: Strength
    l2_strength: Strength
    prunable: Filter = filters.weights

    def __post_init__(self) -> None:
        _leafwise.check_strength("l1_strength", self.l1_strength)
        _leafwise.check_strength("l2_strength", self.l2_strength)
        _leafwise.check_prunable(self.prunable)

    def at(self, step: Any) -> "ElasticNet":
        """The same penalty with its schedules read at `step` (optimizer updates done)."""
        return dataclasses.replace(
            self,
            l1_strength=_leafwise.read(self.l1_strength, step),
            l2_strength=_leafwise.read(self.l2_strength, step),
        )

    def value(self, params: Params) -> jax.Array:
        """λ₁ Σ|w| + (λ₂/2) Σw², a 0-d array (float32, or float64 where a leaf is)."""
        chosen, l1, l2 = self._read(params)
        rows = [
            (_leaves.wide(w), a, b)
            for yes, w, a, b in zip(chosen, jax.tree.leaves(params), l1, l2, strict=True)
            if yes
        ]
        value = jnp.float32(0)
        # A strength of 0 is skipped, not multiplied: squares overflow long before absolute values.
        if not _leafwise.is_zero(self.l1_strength):
            value += _leafwise.total([jnp.sum(a * jnp.abs(w)) for w, a, _ in rows])
        if not _leafwise.is_zero(self.l2_strength):
            value += 0.5 * _leafwise.total([jnp.sum(b * jnp.square(w)) for w, _, b in rows])
        return value

    def prox(self, params: Params, step_size: Any) -> Params:
        """Gives soft(w, sλ₁) / (1 + sλ₂), soft(w, t) = sign(w) max(|w| - t, 0), s = `step_size`."""
        chosen, l1, l2 = self._read(params)
        sizes = _leafwise.step_sizes(step_size, chosen, params)

        def shrink(w: jax.Array, s: jax.Array, l1: jax.Array, l2: jax.Array) -> jax.Array:
            return _leafwise.soft(w, s * l1) / (1 + s * l2)

        return _leafwise.wide_map(shrink, chosen, params, (sizes, l1, l2))

    def subgradient(self, grads: Params, params: Params) -> Params:
        """The least-norm one: g + λ₂w + λ₁ sign(w), and soft(g, λ₁) where w = 0."""
        chosen, l1, l2 = self._read(params)

        def least(g: jax.Array, w: jax.Array, l1: jax.Array, l2: jax.Array) -> jax.Array:
            return jnp.where(w == 0, _leafwise.soft(g, l1), g + l2 * w + l1 * jnp.sign(w))

        return _leafwise.wide_map(least, chosen, params, (l1, l2), grads=grads)

    def stop_at_zero(self, updates: Params, subgradient: Params, params: Params) -> Params:
        """The orthant rule: an entry whose step would cross zero, or leave it uphill, ends at zero.

        An entry at zero belongs to the orthant that its negative subgradient points to, and stays
        where that is zero. Without an L1 part there is no kink, and `updates` pass unchanged.
        """
        chosen, l1, _ = self._read(params)
        return _leafwise.stop_at_zero(l1, chosen, params, updates, subgradient)

    def _read(self, params: Params) -> tuple[list[bool], list[Any], list[Any]]:
        chosen = _leafwise.penalized_leaves(self.prunable, params)
        l1 = _leafwise.strengths("l1_strength", self.l1_strength, chosen, params)
        l2 = _leafwise.strengths("l2_strength", self.l2_strength, chosen, params)
        return chosen, l1, l2


def l1(strength: Strength, *, prunable: Filter = filters.weights) -> ElasticNet:
    """λ Σ|w|, the lasso's penalty: its prox sets small entries to exactly zero.

    Args:
      strength: λ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      prunable: which leaves are penalized; biases are not by default.

    Returns:
      A penalty.

    Raises:
      TypeError, ValueError: if the strength is negative, infinite, NaN or no number.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> penalties.l1(1.0).prox({"w": jnp.array([[3.0, -0.5]])}, 1.0)["w"]
      Array([[2., 0.]], dtype=float32)

    References:
      R. Tibshirani, *Regression shrinkage and selection via the lasso*, JRSS B 58 (1996),
      https://www.jstor.org/stable/2346178
    """
    _leafwise.check_strength("strength", strength)
    return ElasticNet(strength, 0.0, prunable)


def l2(strength: Strength, *, prunable: Filter = filters.weights) -> ElasticNet:
    """(λ/2) Σw², the ridge penalty: it shrinks every entry and sets none to zero.

    Args:
      strength: λ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      prunable: which leaves are penalized; biases are not by default.

    Returns:
      A penalty.

    Raises:
      TypeError, ValueError: if the strength is negative, infinite, NaN or no number.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> penalties.l2(1.0).prox({"w": jnp.array([[3.0, -0.5]])}, 1.0)["w"]
      Array([[ 1.5 , -0.25]], dtype=float32)

    References:
      A. Hoerl and R. Kennard, *Ridge regression: biased estimation for nonorthogonal problems*,
      Technometrics 12 (1970), https://www.jstor.org/stable/1267351
    """
    _leafwise.check_strength("strength", strength)
    return ElasticNet(0.0, strength, prunable)


def elastic_net(
    l1_strength: Strength,
    l2_strength: Strength,
    *,
    prunable: Filter = filters.weights,
) -> ElasticNet:
    """λ₁ Σ|w| + (λ₂/2) Σw²; zeros as with L1, and correlated entries share their weight as with L2.

    scikit-learn's `ElasticNet(alpha, l1_ratio=r)` has λ₁ = alpha·r and λ₂ = alpha·(1 - r).

    Args:
      l1_strength: λ₁ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      l2_strength: λ₂ ≥ 0, likewise.
      prunable: which leaves are penalized; biases are not by default.

    Returns:
      A penalty.

    Raises:
      TypeError, ValueError: if a strength is negative, infinite, NaN or no number.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> penalties.elastic_net(1.0, 1.0).prox({"w": jnp.array([[3.0, -0.5]])}, 1.0)["w"]
      Array([[1., 0.]], dtype=float32)

    References:
      H. Zou and T. Hastie, *Regularization and variable selection via the elastic net*, JRSS B 67
      (2005), https://www.jstor.org/stable/3647580
    """
    return ElasticNet(l1_strength, l2_strength, prunable)
