"""Penalties that stop growing: the count of nonzeros, MCP and SCAD.

L1 pulls large entries as hard as small ones, so that what it keeps is too small. These let large
entries go free. The price: the penalized problem has many local minima. Start from an L1 solution,
or raise the strength slowly.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, filters
from sparsejax._typing import Filter, Params, Strength
from sparsejax.penalties import _leafwise


@dataclasses.dataclass(frozen=True)
class Entrywise:
    """Σ p(w; λ) over the entries of the prunable leaves; a subclass says what p is."""

    strength: Strength
    prunable: Filter = dataclasses.field(default=filters.weights, kw_only=True)

    def __post_init__(self) -> None:
        _leafwise.check_strength("strength", self.strength)
        _leafwise.check_prunable(self.prunable)

    def at(self, step: Any) -> "Entrywise":
        """The same penalty with its schedule read at `step` (optimizer updates done)."""
        return dataclasses.replace(self, strength=_leafwise.read(self.strength, step))

    def value(self, params: Params) -> jax.Array:
        """Σ p(w; λ), a 0-d array (float32, or float64 where a leaf is)."""
        chosen, lam = self._read(params)
        rows = zip(chosen, jax.tree.leaves(params), lam, strict=True)
        return _leafwise.total(
            [jnp.sum(self._values(jnp.abs(_leaves.wide(w)), a)) for yes, w, a in rows if yes]
        )

    def prox(self, params: Params, step_size: Any) -> Params:
        """The least point of p(u; λ) + (u - w)²/(2s) for any s = `step_size`, convex or not.

        Of two least points it gives the one nearer to zero.
        """
        chosen, lam = self._read(params)
        sizes = _leafwise.step_sizes(step_size, chosen, params)
        return _leafwise.wide_map(self._least, chosen, params, (sizes, lam))

    def _read(self, params: Params) -> tuple[list[bool], list[Any]]:
        chosen = _leafwise.penalized_leaves(self.prunable, params)
        return chosen, _leafwise.strengths("strength", self.strength, chosen, params)

    def _values(self, size: jax.Array, lam: jax.Array) -> jax.Array:
        """The value p, where |w| = `size`."""
        raise NotImplementedError

    def _least(self, x: jax.Array, s: jax.Array, lam: jax.Array) -> jax.Array:
        """The prox of p with step size s."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class L0(Entrywise):
    """λ·(number of nonzeros); see `l0`."""

    def _values(self, size: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.where(size > 0, lam, size)  # `>`: NaN stays visible.

    def _least(self, x: jax.Array, s: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(x) <= jnp.sqrt(2 * s * lam), 0, x)


@dataclasses.dataclass(frozen=True)
class Folded(Entrywise):
    """A penalty that starts like L1, λ|w|, and bends until it is flat."""

    def subgradient(self, grads: Params, params: Params) -> Params:
        """The least-norm one: g + p'(|w|) sign(w), and soft(g, λ) where w = 0."""
        chosen, lam = self._read(params)

        def least(g: jax.Array, w: jax.Array, lam: jax.Array) -> jax.Array:
            slope = self._slopes(jnp.abs(w), lam)
            return jnp.where(w == 0, _leafwise.soft(g, lam), g + slope * jnp.sign(w))

        return _leafwise.wide_map(least, chosen, params, (lam,), grads=grads)

    def stop_at_zero(self, updates: Params, subgradient: Params, params: Params) -> Params:
        """The orthant rule: an entry whose step would cross zero, or leave it uphill, ends at zero.

        An entry at zero belongs to the orthant that its negative subgradient points to, and stays
        where that is zero.
        """
        chosen, lam = self._read(params)
        return _leafwise.stop_at_zero(lam, chosen, params, updates, subgradient)

    def _slopes(self, size: jax.Array, lam: jax.Array) -> jax.Array:
        """The slope p', where |w| = `size`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MCP(Folded):
    """The minimax concave penalty; see `mcp`."""

    gamma: Any = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bend("gamma", self.gamma, 0)

    def _values(self, size: jax.Array, lam: jax.Array) -> jax.Array:
        bent = jnp.minimum(size, self.gamma * lam)
        return bent * (lam - bent / (2 * self.gamma))

    def _slopes(self, size: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.maximum(lam - size / self.gamma, 0)

    def _least(self, x: jax.Array, s: jax.Array, lam: jax.Array) -> jax.Array:
        convex = s < self.gamma
        steep = self.gamma / jnp.where(convex, self.gamma - s, 1)
        # From s = gamma on the objective is concave up to gamma·λ: the least point is 0 or x.
        small = jnp.where(convex, _leafwise.soft(x, s * lam) * steep, 0)
        bound = jnp.where(convex, self.gamma, jnp.sqrt(s * self.gamma)) * lam
        return jnp.where(jnp.abs(x) <= bound, small, x)


@dataclasses.dataclass(frozen=True)
class SCAD(Folded):
    """The smoothly clipped absolute deviation; see `scad`."""

    a: Any = 3.7

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bend("a", self.a, 2)

    def _values(self, size: jax.Array, lam: jax.Array) -> jax.Array:
        straight = jnp.minimum(size, lam)
        # From λ on the slope falls from λ to 0, along a parabola.
        bent = jnp.clip(size, lam, self.a * lam) - lam
        return lam * straight + bent * (lam - bent / (2 * (self.a - 1)))

    def _slopes(self, size: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.clip((self.a * lam - size) / (self.a - 1), 0, lam)

    def _least(self, x: jax.Array, s: jax.Array, lam: jax.Array) -> jax.Array:
        size, room = jnp.abs(x), self.a - 1
        convex = s < room
        steep = room / jnp.where(convex, room - s, 1)
        bent = _leafwise.soft(x, s * lam * (self.a / room)) * steep
        small = jnp.where(convex & (size > (1 + s) * lam), bent, _leafwise.soft(x, s * lam))
        # From s = a - 1 on the objective is concave between λ and aλ: the least point is soft(x)
        # or x, whichever is lower; soft(x) is 0 there from s = a + 1 on.
        crossing = jnp.where(s < self.a + 1, (self.a + 1 + s) / 2, jnp.sqrt(s * (self.a + 1)))
        return jnp.where(size <= jnp.where(convex, self.a, crossing) * lam, small, x)


def l0(strength: Strength, *, prunable: Filter = filters.weights) -> L0:
    """λ·(number of nonzeros): its prox is the hard threshold, |w| > √(2sλ) or zero.

    What it keeps it does not shrink. It has no slope, so that `transforms.penalized` refuses it;
    `transforms.proximal` around plain SGD takes it (iterative hard thresholding). Its solutions are
    local: an entry at zero returns only where a gradient step lifts it above the threshold.

    Args:
      strength: λ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      prunable: which leaves are penalized; biases are not by default.

    Returns:
      A penalty without a slope.

    Raises:
      TypeError, ValueError: if the strength is negative, infinite, NaN or no number.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> penalty, w = penalties.l0(0.5), {"w": jnp.array([[3.0, -0.75, 0.0]])}
      >>> float(penalty.value(w))
      1.0
      >>> penalty.prox(w, 1.0)["w"]
      Array([[3., 0., 0.]], dtype=float32)

    References:
      T. Blumensath and M. Davies, *Iterative thresholding for sparse approximations*, J. Fourier
      Analysis and Applications 14 (2008), https://doi.org/10.1007/s00041-008-9035-z
    """
    return L0(strength, prunable=prunable)


def mcp(strength: Strength, gamma: Any = 3.0, *, prunable: Filter = filters.weights) -> MCP:
    """The minimax concave penalty: a slope that falls from λ at zero to 0 at |w| = gamma·λ.

    λ|w| - w²/(2 gamma) up to there, and gamma·λ²/2 beyond, so that large entries are not shrunk. As
    gamma → ∞ it is L1, as gamma → 0 with gamma·λ²/2 fixed it is L0. The prox with step size
    s < gamma is soft(w, sλ)/(1 - s/gamma) up to |w| = gamma·λ and w beyond (the firm threshold);
    with s ≥ gamma it is the hard threshold at λ√(s·gamma).

    Args:
      strength: λ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      gamma: where the slope ends, in units of λ; > 0. A loss whose curvature along every entry is
        more than 1/gamma keeps the problem convex in each: standardized least squares, gamma > 1.
      prunable: which leaves are penalized; biases are not by default.

    Returns:
      A penalty with a slope.

    Raises:
      TypeError, ValueError: if the strength is negative, infinite, NaN or no number, or `gamma` no
        finite number > 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> w = {"w": jnp.array([[4.0, 2.0, -0.5]])}
      >>> penalties.mcp(1.0, gamma=3.0).prox(w, 1.0)["w"]  # 1 / (1 - 1/3), and 4 > 3 is free
      Array([[4. , 1.5, 0. ]], dtype=float32)

    References:
      C.-H. Zhang, *Nearly unbiased variable selection under minimax concave penalty*, Annals of
      Statistics 38 (2010), https://arxiv.org/abs/1002.4734; there s = 1 < gamma.
    """
    return MCP(strength, gamma, prunable=prunable)


def scad(strength: Strength, a: Any = 3.7, *, prunable: Filter = filters.weights) -> SCAD:
    """SCAD: like L1 up to |w| = λ, bending from there on, and λ²(a + 1)/2 from aλ on.

    The smoothly clipped absolute deviation has slope λ up to λ, (aλ - |w|)/(a - 1) up to aλ, and 0
    from there on. As a → ∞ it is L1. The prox with step size s < a - 1 is soft(w, sλ) up to
    |w| = (1 + s)λ, soft(w, saλ/(a - 1))/(1 - s/(a - 1)) up to aλ, and w beyond; with s ≥ a - 1 it
    jumps from soft(w, sλ) to w where both are equally good.

    Args:
      strength: λ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      a: where the slope ends, in units of λ; more than 2. 3.7 is the authors' choice.
      prunable: which leaves are penalized; biases are not by default.

    Returns:
      A penalty with a slope.

    Raises:
      TypeError, ValueError: if the strength is negative, infinite, NaN or no number, or `a` no
        finite number > 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> w = {"w": jnp.array([[6.0, 4.0, 2.5, -0.5]])}
      >>> penalties.scad(1.0, a=5.0).prox(w, 2.0)["w"]  # (4 - 2.5)/(1 - 2/4), and 6 > 5 is free
      Array([[6. , 3. , 0.5, 0. ]], dtype=float32)

    References:
      J. Fan and R. Li, *Variable selection via nonconcave penalized likelihood and its oracle
      properties*, JASA 96 (2001), https://doi.org/10.1198/016214501753382273; there s = 1.
    """
    return SCAD(strength, a, prunable=prunable)


def _check_bend(name: str, value: Any, bound: int) -> None:
    """Refuses what is not one finite number above the bound; a traced one passes."""
    _checks.real_number(name, value)
    if not _leaves.is_traced(value) and not bound < float(value) < np.inf:
        raise ValueError(
            f"`{name}` must be finite and > {bound}, got {value}; for an infinite one take l1."
        )
