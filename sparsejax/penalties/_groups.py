"""Penalties on the norms of groups: channels, rows, blocks, coupled axes of several leaves.

A group lasso makes whole groups exactly zero, since the norm of a group, unlike its square, has a
kink where the group is zero.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree, filters
from sparsejax._typing import Filter, Params, ScalarOrSchedule, Strength
from sparsejax.granularities import Block, Channel
from sparsejax.penalties import _groupings, _leafwise

_CHANNELS = Channel()


@dataclasses.dataclass(frozen=True)
class SparseGroupLasso:
    """λ₁ Σ|w| + λ₂ Σ_g c_g ‖w_g‖; `group_lasso` is its end at λ₁ = 0.

    Args:
      l1_strength: λ₁ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      group_strength: λ₂ ≥ 0: a number or a schedule.
      groups: what is a group; see `group_lasso`.
      weight: c_g, from the number of entries of a group.
      prunable: which leaves are penalized.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range; from the methods,
        if groups do not fit the params, with the leaf's path.
    """

    l1_strength: Strength
    group_strength: ScalarOrSchedule
    groups: Any
    weight: Callable[[int], float]
    prunable: Filter

    def __post_init__(self) -> None:
        _leafwise.check_strength("l1_strength", self.l1_strength)
        _checks.scalar_or_schedule("group_strength", self.group_strength)
        _checks.function("weight", self.weight, "(size of a group) -> number", "math.sqrt")
        _leafwise.check_prunable(self.prunable)

    def at(self, step: Any) -> "SparseGroupLasso":
        """The same penalty with its schedules read at `step` (optimizer updates done)."""
        return dataclasses.replace(
            self,
            l1_strength=_leafwise.read(self.l1_strength, step),
            group_strength=_leafwise.read(self.group_strength, step),
        )

    def value(self, params: Params) -> jax.Array:
        """λ₁ Σ|w| + λ₂ Σ c_g ‖w_g‖, a 0-d array (float32, or float64 where a leaf is)."""
        on = self._on(params)
        norms = _groupings.scaled_norms(on.grouping, on.leaves)
        value = _leafwise.total([jnp.sum(t * n) for t, n in zip(on.kinks, norms, strict=True)])
        if not _leafwise.is_zero(self.l1_strength):
            rows = zip(on.l1, on.leaves, strict=True)
            value += _leafwise.total([jnp.sum(t * jnp.abs(x)) for t, x in rows])
        return value

    def prox(self, params: Params, step_size: Any) -> Params:
        """soft(w, sλ₁), then each group times max(1 - sλ₂c/‖·‖, 0), s = `step_size`.

        With a step size an entry (a diagonal metric 1/s) a group's norm is the root of a secular
        equation, which Newton's method finds to rounding in a few passes.
        """
        on = self._on(params)
        sizes = on.pick(_leafwise.step_sizes(step_size, on.chosen, params))
        v = on.leaves
        if not _leafwise.is_zero(self.l1_strength):
            v = [_leafwise.soft(x, s * t) for x, s, t in zip(v, sizes, on.l1, strict=True)]
        if _leafwise.is_one(step_size):
            norms, thresholds = _groupings.norms(on.grouping, v), [step_size * t for t in on.kinks]
            factors = on.grouping.spread(list(map(_groupings.kept, norms, thresholds)), 1)
        else:
            factors = _groupings.factors_in_metric(on.grouping, v, sizes, on.kinks)
        # +0, whatever sign x has.
        landed = [jnp.where(f == 0, 0, x * f) for x, f in zip(v, factors, strict=True)]
        return on.put(landed)

    def subgradient(self, grads: Params, params: Params) -> Params:
        """The least-norm one; of a group at zero soft(g, λ₁), shortened by λ₂c."""
        on = self._on(params)
        rows = zip(on.align("grads", grads), on.leaves, on.l1, strict=True)
        pulled = [jnp.where(w == 0, _leafwise.soft(g, t), g + t * jnp.sign(w)) for g, w, t in rows]
        norms = _groupings.norms(on.grouping, on.leaves)
        shortened = map(_groupings.kept, _groupings.norms(on.grouping, pulled), on.kinks)
        factors = [jnp.where(n == 0, x, 1) for n, x in zip(norms, shortened, strict=True)]
        slopes = [
            jnp.where(n == 0, 0, t / jnp.where(n == 0, 1, n))
            for n, t in zip(norms, on.kinks, strict=True)
        ]
        columns = (pulled, on.leaves, on.grouping.spread(factors, 1), on.grouping.spread(slopes))
        least = [p * factor + slope * w for p, w, factor, slope in zip(*columns, strict=True)]
        return on.put(least, grads=grads)

    def stop_at_zero(self, updates: Params, subgradient: Params, params: Params) -> Params:
        """The half-space rule: a group whose step leaves the half-space of w ends at zero.

        A group at zero belongs to the half-space that its negative subgradient points to, and stays
        where that is zero. With an L1 part the orthant rule goes before.
        """
        on = self._on(params)
        v = on.align("subgradient", subgradient)
        rows = zip(on.align("updates", updates), v, on.leaves, on.l1, strict=True)
        steps = [_leafwise.stop(u, slope, w, t > 0) for u, slope, w, t in rows]
        alive = on.grouping.spread([n > 0 for n in _groupings.norms(on.grouping, on.leaves)])
        sides = [
            jnp.where(yes, w, -slope) for slope, w, yes in zip(v, on.leaves, alive, strict=True)
        ]
        ends_at = [(w + u) * x for w, u, x in zip(on.leaves, steps, sides, strict=True)]
        # `<=`, not `not >`: a NaN step must stay visible, not become a silent zero.
        along = zip(on.grouping.sums(ends_at), on.kinks, strict=True)
        stops = on.grouping.spread([(t > 0) & (s <= 0) for s, t in along])
        stopped = [jnp.where(end, -w, u) for u, w, end in zip(steps, on.leaves, stops, strict=True)]
        return on.put(stopped, widen=True, updates=updates)

    def _on(self, params: Params) -> "_On":
        """The penalty laid on these params."""
        if callable(self.group_strength):
            raise TypeError(_leafwise.unread("group_strength"))
        by_unit = isinstance(self.groups, Channel | Block)
        labels = None if by_unit else _tree.align("groups", self.groups, "params", params)
        chosen = _leafwise.penalized_leaves(self.prunable, params)
        l1 = _leafwise.strengths("l1_strength", self.l1_strength, chosen, params)
        flat = _tree.flatten(params)
        paths, shapes = _picked(flat.paths, chosen), _picked(map(np.shape, flat.leaves), chosen)
        grouping: _groupings.Grouping
        if labels is None:
            grouping = _groupings.Units(self.groups, paths, shapes)
        else:
            mine = [np.asarray(x) for x in _picked(labels, chosen)]
            for path, label, leaf in zip(paths, mine, _picked(flat.leaves, chosen), strict=True):
                _checks.fits("groups", "array", path, label, leaf)
            grouping = _groupings.Labels(mine, shapes)
        weights = _groupings.weights_of(grouping, self.weight)
        kinks = [jnp.asarray(self.group_strength) * jnp.asarray(c, jnp.float32) for c in weights]
        return _On(params, chosen, grouping, _picked(l1, chosen), kinks)


def group_lasso(
    strength: ScalarOrSchedule,
    groups: Any = _CHANNELS,
    *,
    weight: Callable[[int], float] = math.sqrt,
    prunable: Filter | None = None,
) -> SparseGroupLasso:
    """λ Σ_g c_g ‖w_g‖: whole groups become exactly zero, entries of the others do not.

    Works with every transform. Under `penalized` give groups a learning rate that decays: near zero
    the penalty of a group curves like λ/‖w_g‖, and at a constant rate plain SGD may circle there;
    `proximal` in the optimizer's metric does not. Cost: two to three reads a call. Groups across
    leaves gather and scatter: not on a mesh of explicit axes, put them on automatic ones.

    Args:
      strength: λ ≥ 0, a number or a schedule.
      groups: `granularities.Channel` or `Block`: each unit of each leaf is a group (of Flax kernels
        `Channel()` takes output channels, `Channel(-2)` rows). Or groups across leaves, such as the
        coupled axes of a channel: a tree like the params of integer arrays that broadcast against
        their leaves. Equal numbers, in whatever leaves, are one group; -1 is none.
      weight: c_g, from the number of entries of a group: its square root by default, so that groups
        of different sizes are treated alike.
      prunable: which leaves are penalized; `None`: the weights, or with a tree of groups every leaf
        that has one.

    Returns:
      A penalty.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range; from its methods,
        if groups do not fit the params, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from sparsejax import penalties
      >>> penalty = penalties.group_lasso(1.0, weight=lambda size: 1.0)
      >>> penalty.prox({"w": jnp.array([[3.0, 0.5], [4.0, 0.5]])}, 1.0)["w"]  # columns: 5, 0.71
      Array([[2.4, 0. ],
             [3.2, 0. ]], dtype=float32)

      A hidden unit, with its bias and what reads it, as one group:

      >>> params = {"in": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, "out": {"w": jnp.ones((2, 1))}}
      >>> unit = np.arange(2)
      >>> groups = {"in": {"w": unit[None, :], "b": unit}, "out": {"w": unit[:, None]}}
      >>> float(penalties.group_lasso(1.0, groups).value(params))  # 2 · √5 · √5
      10.0

    References:
      M. Yuan and Y. Lin, *Model selection and estimation in regression with grouped variables*,
      JRSS B 68 (2006), https://doi.org/10.1111/j.1467-9868.2005.00532.x. W. Wen et al., *Learning
      structured sparsity in deep neural networks*, NeurIPS 2016, https://arxiv.org/abs/1608.03665.
      The half-space rule: T. Chen et al., *Orthant based proximal stochastic gradient method* and
      its successors for groups, 2020, https://arxiv.org/abs/2004.03639.
    """
    _checks.scalar_or_schedule("strength", strength)
    return sparse_group_lasso(0.0, strength, groups, weight=weight, prunable=prunable)


def sparse_group_lasso(
    l1_strength: Strength,
    group_strength: ScalarOrSchedule,
    groups: Any = _CHANNELS,
    *,
    weight: Callable[[int], float] = math.sqrt,
    prunable: Filter | None = None,
) -> SparseGroupLasso:
    """λ₁ Σ|w| + λ₂ Σ_g c_g ‖w_g‖: whole groups become zero, and entries inside the others, too.

    Args:
      l1_strength: λ₁ ≥ 0: a number, a schedule, or a tree of numbers; see `sparsejax.penalties`.
      group_strength: λ₂ ≥ 0, a number or a schedule.
      groups: what is a group; see `group_lasso`.
      weight: c_g, from the number of entries of a group.
      prunable: which leaves are penalized; see `group_lasso`.

    Returns:
      A penalty.

    Raises:
      TypeError, ValueError: as `group_lasso`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import penalties
      >>> penalty = penalties.sparse_group_lasso(1.0, 2.5, weight=lambda size: 1.0)
      >>> w = {"w": jnp.array([[4.0, 1.0], [5.0, -1.5]])}
      >>> penalty.prox(w, 1.0)["w"]  # of the columns (3, 4) and (0, -0.5)
      Array([[1.5, 0. ],
             [2. , 0. ]], dtype=float32)

    References:
      N. Simon, J. Friedman, T. Hastie, R. Tibshirani, *A sparse-group lasso*, J. Computational and
      Graphical Statistics 22 (2013), https://doi.org/10.1080/10618600.2012.681250
    """
    by_unit = isinstance(groups, Channel | Block)
    if not by_unit:
        _groupings.check_labels(groups)
    if prunable is None:
        prunable = filters.weights if by_unit else _in(groups)
    return SparseGroupLasso(l1_strength, group_strength, groups, weight, prunable)


class _On:
    """A penalty laid on params: its leaves in wide precision, groups, λ₁ by leaf, λ₂c by group."""

    def __init__(
        self,
        params: Params,
        chosen: list[bool],
        grouping: _groupings.Grouping,
        l1: list[Any],
        kinks: list[jax.Array],
    ) -> None:
        self.params, self.chosen, self.grouping = params, chosen, grouping
        self.l1, self.kinks = l1, kinks
        self.leaves = self.align("params", params)

    def pick(self, column: Sequence[Any]) -> list[Any]:
        """What a column has for the penalized leaves."""
        return _picked(column, self.chosen)

    def align(self, name: str, tree: Params) -> list[jax.Array]:
        """The leaves of a tree like the params that stand where these are penalized."""
        flat = _tree.flatten(self.params)
        found = self.pick(_tree.align(name, tree, "params", self.params))
        for path, x, like in zip(self.pick(flat.paths), found, self.pick(flat.leaves), strict=True):
            _checks.same_shape(name, path, x, "params", like)
        return [_leaves.wide(x) for x in found]

    def put(self, leaves: Sequence[jax.Array], *, widen: bool = False, **tree: Params) -> Params:
        """The tree (the params if none is given) with these leaves where they are penalized."""
        values = iter(leaves)
        column = [next(values) if yes else None for yes in self.chosen]
        return _leafwise.wide_map(
            lambda *row: row[-1], self.chosen, self.params, (column,), widen=widen, **tree
        )


def _picked(column: Any, chosen: list[bool]) -> list[Any]:
    return [x for x, yes in zip(column, chosen, strict=True) if yes]


def _in(groups: Any) -> Filter:
    """The leaves that have a group."""
    flat = _tree.flatten(groups)
    some = {path for path, x in zip(flat.paths, flat.leaves, strict=True) if np.any(x >= 0)}

    def chosen(path: str, leaf: Any) -> bool:
        if path in some and not _leaves.is_floating(leaf):
            raise TypeError(
                "`groups` must be -1 where the params are no real numbers, got a group of "
                f"{_leaves.describe(leaf)} at {path!r}."
            )
        return path in some

    return chosen
