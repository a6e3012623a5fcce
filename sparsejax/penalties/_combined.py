"""Several penalties at once, each on its own leaves."""

import dataclasses
from typing import Any

import jax

from sparsejax import _leaves, _tree, filters
from sparsejax._typing import Filter, Params, Penalty, SlopedPenalty
from sparsejax.penalties import _leafwise


@dataclasses.dataclass(frozen=True)
class Combined:
    """The sum of penalties that share no leaf; see `combine`."""

    penalties: tuple[Any, ...]

    @property
    def prunable(self) -> Filter:
        """The leaves of all of them."""
        return filters.any_of(*(p.prunable for p in self.penalties))

    def at(self, step: Any) -> "Combined":
        """The same penalties with their schedules read at `step` (optimizer updates done)."""
        return dataclasses.replace(self, penalties=tuple(p.at(step) for p in self.penalties))

    def value(self, params: Params) -> jax.Array:
        """The sum of their values, a 0-d array."""
        self._check(params)
        return _leafwise.total([p.value(params) for p in self.penalties])

    def prox(self, params: Params, step_size: Any) -> Params:
        """The prox of each on its leaves."""
        self._check(params)
        for penalty in self.penalties:
            params = penalty.prox(params, step_size)
        return params

    def _check(self, params: Params) -> None:
        """Refuses a leaf that two of them penalize: the prox of a sum is not each in turn."""
        paths = _tree.flatten(params).paths
        taken: list[int | None] = [None] * len(paths)
        for number, penalty in enumerate(self.penalties):
            for i, yes in enumerate(filters.selected(penalty.prunable, params)):
                if yes and taken[i] is not None:
                    raise ValueError(
                        f"`penalties` must have leaves of their own, got {paths[i]!r} in number "
                        f"{taken[i]} and number {number}; give each its `prunable`, or take one "
                        "penalty for both: elastic_net, sparse_group_lasso."
                    )
                if yes:
                    taken[i] = number


@dataclasses.dataclass(frozen=True)
class SlopedCombined(Combined):
    """The sum of penalties with slopes; see `combine`."""

    def subgradient(self, grads: Params, params: Params) -> Params:
        """The least-norm one of each on its leaves."""
        self._check(params)
        for penalty in self.penalties:
            grads = penalty.subgradient(grads, params)
        return grads

    def stop_at_zero(self, updates: Params, subgradient: Params, params: Params) -> Params:
        """The rule of each on its leaves."""
        self._check(params)
        for penalty in self.penalties:
            updates = penalty.stop_at_zero(updates, subgradient, params)
        return updates


def combine(*penalties: Penalty) -> Combined:
    """The sum of penalties, each on leaves of its own: groups for convolutions, L1 for the rest.

    Each penalty passes what it does not penalize as it is, so that the prox of the sum is that of
    each in turn. Two on one leaf would break this, and are refused.

    Args:
      *penalties: at least one; each has an attribute `prunable`, the filter of its leaves, by which
        an overlap is seen. So has the answer, so that it may be combined again.

    Returns:
      A penalty, with a slope (for `transforms.penalized`) if each of them has one.

    Raises:
      TypeError: if there is something that is no penalty, or has no filter `prunable`.
      ValueError: if there is none; from the methods, if two penalize one leaf, with its path, or
        one penalizes none.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import filters, penalties
      >>> both = penalties.combine(
      ...     penalties.l1(1.0, prunable=filters.by_path("head")),
      ...     penalties.l2(1.0, prunable=filters.by_path("body")),
      ... )
      >>> both.prox({"body": jnp.array([3.0, -0.5]), "head": jnp.array([3.0, -0.5])}, 1.0)
      {'body': Array([ 1.5 , -0.25], dtype=float32), 'head': Array([2., 0.], dtype=float32)}
    """
    if not penalties:
        raise ValueError("`penalties` must be at least one penalty, got none.")
    for penalty in penalties:
        _check_member(penalty)
    sloped = all(isinstance(p, SlopedPenalty) for p in penalties)
    return SlopedCombined(penalties) if sloped else Combined(penalties)


def _check_member(penalty: Any) -> None:
    if isinstance(penalty, type) or not isinstance(penalty, Penalty):
        raise TypeError(
            f"`penalties` must be penalties such as l1(1e-4), got {_leaves.brief(penalty)}."
        )
    if not callable(getattr(penalty, "prunable", None)):
        raise TypeError(
            "`penalties` must each have a filter `prunable`, by which an overlap is seen, got "
            f"{_leaves.brief(penalty)}; give it prunable=..., or the class such an attribute."
        )
