"""Constraints as penalties: 0 inside a set, infinite outside."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _checks, _leaves, _tree, filters
from sparsejax._typing import Filter, Params
from sparsejax.penalties import _leafwise


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The indicator of a set; see `constraint`."""

    projection: Callable[[list[jax.Array]], Any]
    prunable: Filter = filters.weights

    def __post_init__(self) -> None:
        _checks.function(
            "projection",
            self.projection,
            "(list of arrays) -> list of arrays",
            "functools.partial(optax.projections.projection_l1_ball, scale=1.0)",
        )
        _leafwise.check_prunable(self.prunable)

    def at(self, step: Any) -> "Constraint":
        """The same constraint: a set has no schedule."""
        del step
        return self

    def value(self, params: Params) -> jax.Array:
        """0 within rounding of the set, infinity elsewhere and for NaN, a 0-d array."""
        chosen, projected = self._project(params)
        leaves = [x for x, yes in zip(jax.tree.leaves(params), chosen, strict=True) if yes]
        w = [_leaves.wide(x) for x in leaves]
        distance, norm = _norm([x - y for x, y in zip(w, projected, strict=True)]), _norm(w)
        # `<=`, so that NaN, which is in no set, is outside.
        return jnp.where(distance <= _tolerance(leaves) * norm, jnp.zeros_like(norm), jnp.inf)

    def prox(self, params: Params, step_size: Any) -> Params:
        """The projection, whatever `step_size`, one number, is."""
        _leafwise.one_step_size(
            step_size, "the projection is the nearest point where all entries count alike"
        )
        chosen, projected = self._project(params)
        found = iter(projected)
        column = [next(found) if yes else None for yes in chosen]
        return _leafwise.wide_map(lambda w, nearest: nearest, chosen, params, (column,))

    def _project(self, params: Params) -> tuple[list[bool], list[jax.Array]]:
        """Which leaves are constrained, and where the projection puts them, checked."""
        chosen, flat = _leafwise.penalized_leaves(self.prunable, params), _tree.flatten(params)
        paths = [path for path, yes in zip(flat.paths, chosen, strict=True) if yes]
        w = [_leaves.wide(x) for x, yes in zip(flat.leaves, chosen, strict=True) if yes]
        answer = self.projection(list(w))
        if not isinstance(answer, list | tuple) or len(answer) != len(w):
            raise TypeError(
                f"`projection` must return a list like the one it gets, of {len(w)} arrays, got "
                f"{_leaves.brief(answer)}; map over it with jax.tree.map."
            )
        for path, like, nearest in zip(paths, w, answer, strict=True):
            _checks.same_shape("projection", path, nearest, "params", like)
        return chosen, [jnp.asarray(x) for x in answer]


def constraint(
    projection: Callable[[list[jax.Array]], Any], *, prunable: Filter = filters.weights
) -> Constraint:
    """A set instead of a price: 0 inside, infinite outside; its prox is the projection.

    `transforms.proximal(optax.sgd(lr), constraint(...), lr)` is then projected gradient descent.
    For every strength of L1 there is a radius of the L1 ball with the same solution; the radius is
    known beforehand, the strength is not. It has no slope, so that `transforms.penalized` refuses
    it.

    The value is 0 where the params are within rounding of their projection: no farther from it
    than √ε of their norm, 3e-4 in float32, or one ε of their dtype where that is more (bfloat16:
    8e-3). Half-precision params are rounded after the projection, and may end that far outside.

    Args:
      projection: gives the nearest point of the set. It gets the prunable leaves alone, as one list
        in the order of the tree, float32 at least, and returns a list like it: one set couples all
        of them. `optax.projections` has balls, boxes and simplices; sets need not be convex.
      prunable: which leaves are constrained; the others pass as they are.

    Returns:
      A penalty without a slope.

    Raises:
      TypeError, ValueError: if an argument is no function; from the methods, if the projection's
        answer is not like its argument, or `step_size` is a tree.

    Example:
      >>> import functools
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import masking, penalties
      >>> ball = functools.partial(optax.projections.projection_l1_ball, scale=3.0)
      >>> penalty, w = penalties.constraint(ball), {"w": jnp.array([[3.0, -2.0, 0.25]])}
      >>> jnp.round(penalty.prox(w, 1.0)["w"], 4)
      Array([[ 2., -1.,  0.]], dtype=float32)
      >>> float(penalty.value(w))
      inf

      At most one entry of three is not zero (with `proximal`: iterative hard thresholding):

      >>> def one_of_three(leaves):
      ...     sizes = [jnp.abs(x) for x in leaves]
      ...     return masking.apply_masks(leaves, masking.topk(sizes, count=2))
      >>> penalties.constraint(one_of_three).prox(w, 1.0)["w"]
      Array([[3., 0., 0.]], dtype=float32)

    References:
      J. Duchi, S. Shalev-Shwartz, Y. Singer and T. Chandra, *Efficient projections onto the
      l1-ball for learning in high dimensions*, ICML 2008, https://doi.org/10.1145/1390156.1390191
    """
    return Constraint(projection, prunable)


def _norm(arrays: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(_leafwise.total([jnp.sum(jnp.square(x)) for x in arrays]))


def _tolerance(leaves: list[Any]) -> float:
    """How far a projected point may be from its projection, relative to its norm."""
    dtypes = [_leaves.dtype_of(x) for x in leaves]
    root = max((float(jnp.finfo(_leaves.wide_dtype(d)).eps) ** 0.5 for d in dtypes), default=0.0)
    return max([root, *(float(jnp.finfo(d).eps) for d in dtypes)])
