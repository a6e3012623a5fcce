"""Penalties: a value λR(w), its proximal operator and its subgradient, over prunable leaves.

Proximal operators in closed form: N. Parikh and S. Boyd, *Proximal Algorithms*, Foundations and
Trends in Optimization 1 (2014), https://web.stanford.edu/~boyd/papers/prox_algs.html, section
6.5.2.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _checks, _leaves, _tree, filters
from sparsejax._typing import Filter, Params, ScalarOrSchedule


@dataclasses.dataclass(frozen=True)
class ElasticNet:
    """λ₁ Σ|w| + (λ₂/2) Σw² over the prunable leaves; `l1` and `l2` are its two ends.

    All methods are pure, work under `jit`, `vmap` and `grad`, leave what is not prunable as it is,
    and compute in float32 (or wider) whatever the leaf's dtype. Strengths may be schedules: read
    them with `at(step)`.

    Args:
      l1_strength: λ₁ ≥ 0, a number or a schedule (step -> number).
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

    l1_strength: ScalarOrSchedule
    l2_strength: ScalarOrSchedule
    prunable: Filter = filters.weights

    def __post_init__(self) -> None:
        _checks.scalar_or_schedule("l1_strength", self.l1_strength)
        _checks.scalar_or_schedule("l2_strength", self.l2_strength)
        _checks.function(
            "prunable", self.prunable, "(path, leaf) -> bool", "sparsejax.filters.weights"
        )

    def at(self, step: Any) -> "ElasticNet":
        """The same penalty with its schedules read at `step` (optimizer updates done)."""
        return dataclasses.replace(
            self,
            l1_strength=_read(self.l1_strength, step),
            l2_strength=_read(self.l2_strength, step),
        )

    def value(self, params: Params) -> jax.Array:
        """λ₁ Σ|w| + (λ₂/2) Σw², a 0-d array (float32, or float64 where a leaf is)."""
        l1, l2 = self._strengths()
        chosen = self._penalized(params)
        leaves = [
            _leaves.wide(w) for w, yes in zip(jax.tree.leaves(params), chosen, strict=True) if yes
        ]
        total = jnp.float32(0)
        # A strength of 0 is skipped, not multiplied: squares overflow long before absolute values.
        if not _is_zero(self.l1_strength):
            total = total + l1 * sum(jnp.sum(jnp.abs(w)) for w in leaves)
        if not _is_zero(self.l2_strength):
            total = total + 0.5 * l2 * sum(jnp.sum(jnp.square(w)) for w in leaves)
        return total

    def prox(self, params: Params, step_size: Any) -> Params:
        """Gives soft(w, sλ₁) / (1 + sλ₂), soft(w, t) = sign(w) max(|w| - t, 0), s = `step_size`."""
        _checks.non_negative("step_size", step_size)
        l1, l2 = self._strengths()

        def shrink(w: jax.Array) -> jax.Array:
            return _soft(w, step_size * l1) / (1 + step_size * l2)

        return self._map(shrink, params)

    def subgradient(self, grads: Params, params: Params) -> Params:
        """The least-norm one: g + λ₂w + λ₁ sign(w), and soft(g, λ₁) where w = 0."""
        l1, l2 = self._strengths()

        def least(g: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.where(w == 0, _soft(g, l1), g + l2 * w + l1 * jnp.sign(w))

        return self._map(least, params, grads=grads)

    def stop_at_zero(self, updates: Params, subgradient: Params, params: Params) -> Params:
        """The orthant rule: an entry whose step would cross zero, or leave it uphill, ends at zero.

        An entry at zero belongs to the orthant that its negative subgradient points to, and stays
        where that is zero. Without an L1 part there is no kink, and `updates` pass unchanged.
        """
        l1, _ = self._strengths()

        def stop(u: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
            side = jnp.where(w == 0, -jnp.sign(v), jnp.sign(w))
            # `<=`, not `not >`: a NaN step must stay visible, not become a silent zero.
            return jnp.where((l1 > 0) & ((w + u) * side <= 0), -w, u)

        # A narrower update could not cancel its parameter exactly.
        return self._map(stop, params, widen=True, updates=updates, subgradient=subgradient)

    def _penalized(self, params: Params) -> list[bool]:
        chosen, flat = filters.selected(self.prunable, params), _tree.flatten(params)
        for path, leaf, yes in zip(flat.paths, flat.leaves, chosen, strict=True):
            if yes and not _leaves.is_floating(leaf):
                raise TypeError(
                    f"`prunable` must select real leaves for a penalty, got "
                    f"{_leaves.describe(leaf)} at {path!r}; leave it out."
                )
        return chosen

    def _strengths(self) -> tuple[jax.Array, jax.Array]:
        for name in ("l1_strength", "l2_strength"):
            if callable(getattr(self, name)):
                raise TypeError(
                    f"`{name}` is a schedule, which has a value only at a step: "
                    "use penalty.at(step) first."
                )
        return jnp.asarray(self.l1_strength), jnp.asarray(self.l2_strength)

    def _map(
        self, f: Callable[..., jax.Array], params: Params, *, widen: bool = False, **trees: Params
    ) -> Params:
        """Maps `f(*trees, params)` over prunable leaves, in wide precision.

        Answers have the dtype of the first tree's leaf, with `widen` at least the parameter's.
        """
        chosen = self._penalized(params)
        return _tree.map_chosen(partial(_in_wide, f, widen), chosen, params, **trees)


def l1(strength: ScalarOrSchedule, *, prunable: Filter = filters.weights) -> ElasticNet:
    """λ Σ|w|, the lasso's penalty: its prox sets small entries to exactly zero.

    Args:
      strength: λ ≥ 0, a number or a schedule.
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
    _checks.scalar_or_schedule("strength", strength)
    return ElasticNet(strength, 0.0, prunable)


def l2(strength: ScalarOrSchedule, *, prunable: Filter = filters.weights) -> ElasticNet:
    """(λ/2) Σw², the ridge penalty: it shrinks every entry and sets none to zero.

    Args:
      strength: λ ≥ 0, a number or a schedule.
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
    _checks.scalar_or_schedule("strength", strength)
    return ElasticNet(0.0, strength, prunable)


def elastic_net(
    l1_strength: ScalarOrSchedule,
    l2_strength: ScalarOrSchedule,
    *,
    prunable: Filter = filters.weights,
) -> ElasticNet:
    """λ₁ Σ|w| + (λ₂/2) Σw²; zeros as with L1, and correlated entries share their weight as with L2.

    scikit-learn's `ElasticNet(alpha, l1_ratio=r)` has λ₁ = alpha·r and λ₂ = alpha·(1 - r).

    Args:
      l1_strength: λ₁ ≥ 0, a number or a schedule.
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


def _read(strength: ScalarOrSchedule, step: Any) -> Any:
    return strength(step) if callable(strength) else strength


def _soft(x: jax.Array, t: Any) -> jax.Array:
    """sign(x) max(|x| - t, 0), with +0 where it is zero and NaN where x is NaN."""
    return x - jnp.clip(x, -t, t)


def _is_zero(strength: ScalarOrSchedule) -> bool:
    return not _leaves.is_traced(strength) and not callable(strength) and float(strength) == 0


def _in_wide(f: Callable[..., jax.Array], widen: bool, *leaves: Any) -> jax.Array:
    arrays = [jnp.asarray(x) for x in leaves]
    dtype = arrays[0].dtype
    if widen:
        dtype = jnp.promote_types(dtype, arrays[-1].dtype)
    return f(*map(_leaves.wide, arrays)).astype(dtype)
