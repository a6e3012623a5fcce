"""Entries that belong together: sums over groups, and numbers of groups spread over their entries.

The penalized leaves come as a list of arrays; what is known of groups comes as a list, too: one
array a leaf where groups lie inside leaves, one array in all where they reach over several.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _checks, _leaves
from sparsejax.granularities import Block, Channel

# Newton's method on a concave function that is almost linear: rising, and soon at rest.
_NEWTON_STEPS = 16
_AT_REST = 1e-6
# In units of a group's norm: what stands for r + sμ where both are 0.
_LEAST = 1e-9


class Units:
    """The units of a granularity: groups inside each leaf.

    `sizes`: how many entries each group has.
    """

    def __init__(
        self, granularity: Channel | Block, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self._granularity = dataclasses.replace(granularity, pool=jnp.sum)
        self._paths, self._shapes = paths, shapes
        self.sizes = [
            self._granularity.sizes(path, shape) for path, shape in zip(paths, shapes, strict=True)
        ]

    def sums(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The sum over each unit."""
        rows = zip(self._paths, leaves, strict=True)
        return [self._granularity.units(path, x) for path, x in rows]

    def spread(self, groups: Sequence[jax.Array], outside: Any = 0) -> list[jax.Array]:
        """The number of each unit at its entries; none is outside."""
        del outside
        rows = zip(groups, self._shapes, strict=True)
        return [self._granularity.spread(values, shape) for values, shape in rows]


class Labels:
    """Groups across leaves: equal labels, -1 for none; labels broadcast against their leaves.

    `sizes`: how many entries each group has.
    """

    def __init__(self, labels: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> None:
        self._labels = [
            np.reshape(x.astype(np.int64), x.shape or (1,) * len(shape))
            for x, shape in zip(labels, shapes, strict=True)
        ]
        self._count = max((int(x.max(initial=-1)) for x in self._labels), default=-1) + 1
        sizes = np.zeros(self._count, np.int64)
        for x, shape in zip(self._labels, shapes, strict=True):
            inside = x[x >= 0]
            repeats = int(np.prod(shape)) // max(x.size, 1)
            sizes += repeats * np.bincount(inside, minlength=self._count)
        self.sizes = [sizes]

    def sums(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The sum over each group; entries of no group fall out."""
        total = jnp.zeros((self._count,), jnp.result_type(jnp.float32, *leaves))
        for x, labels in zip(leaves, self._labels, strict=True):
            shared = tuple(i for i, n in enumerate(labels.shape) if n == 1)
            parts = jnp.sum(x, axis=shared, keepdims=True)
            # A negative index would count from the end; one past it is dropped.
            index = np.where(labels < 0, self._count, labels).ravel()
            total = total.at[index].add(parts.ravel(), mode="drop")
        return [total]

    def spread(self, groups: Sequence[jax.Array], outside: Any = 0) -> list[jax.Array]:
        """The number of each group at its entries, `outside` at those of none."""
        (values,) = groups
        padded = jnp.concatenate([values, jnp.full((1,), outside, values.dtype)])
        return [padded[labels] for labels in self._labels]


Grouping: TypeAlias = Units | Labels


def check_labels(groups: Any) -> None:
    """Refuses what is no tree of integer arrays from -1 on."""
    leaves = jax.tree.leaves(groups)
    if not leaves or any(_leaves.shape_of(x) is None for x in leaves):
        raise TypeError(
            "`groups` must be granularities.Channel or Block, or a tree of integer arrays (equal "
            f"numbers are one group, -1 is none), got {_leaves.brief(groups)}."
        )
    for x in leaves:
        if _leaves.is_traced(x):
            raise TypeError(
                f"`groups` must be known before tracing, got {_leaves.brief(x)}; make them NumPy "
                "arrays outside of jit."
            )
        if not jnp.issubdtype(_leaves.dtype_of(x), jnp.integer):
            raise TypeError(f"`groups` must be integers, got {_leaves.describe(x)}.")
        if int(np.min(x, initial=0)) < -1:
            raise ValueError(f"`groups` must be >= -1 (-1 is no group), got {np.min(x)}.")


def norms(grouping: Grouping, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """The Euclidean norm of each group; its gradient is 0 where the group is.

    Squares below 1e-38 count as 0 and above 3e38 as infinity, which thresholds survive.
    """
    squares = grouping.sums([jnp.square(x) for x in leaves])
    return [jnp.where(s == 0, 0, jnp.sqrt(jnp.where(s == 0, 1, s))) for s in squares]


def scaled_norms(grouping: Grouping, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """The same where squares would overflow or vanish, at the cost of one more read."""
    peaks = [jnp.max(jnp.abs(x), initial=0) for x in leaves]
    peak = lax.stop_gradient(jnp.max(jnp.stack(peaks)))
    scale = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    return [scale * n for n in norms(grouping, [x / scale for x in leaves])]


def kept(norm: jax.Array, threshold: Any) -> jax.Array:
    """max(1 - threshold / norm, 0), the factor of a group's proximal operator; NaN of NaN."""
    factor = jnp.where(norm <= threshold, 0, 1 - threshold / jnp.where(norm == 0, 1, norm))
    return jnp.where(threshold == 0, 1, factor)


def factors_in_metric(
    grouping: Grouping, leaves: Sequence[Any], sizes: Sequence[Any], strengths: Sequence[Any]
) -> list[jax.Array]:
    """The factors r / (r + sμ) of the proximal operator of μ‖·‖ with a step size s an entry.

    r is the norm of the answer, the root of Σ (v / (r + sμ))² = 1: the secular equation of trust
    regions. J. Moré and D. Sorensen, *Computing a trust region step*, SIAM J. Sci. Stat. Comput. 4
    (1983), https://doi.org/10.1137/0904038: 1/‖·‖ is concave in r and almost linear.
    """
    lengths = norms(grouping, leaves)
    size = grouping.spread(lengths)
    mu = grouping.spread([jnp.asarray(t) for t in strengths])
    # In units of the group's norm; a step size of 0 leaves a little, to divide by.
    units = [_over(v, n) for v, n in zip(leaves, size, strict=True)]
    rows = zip(sizes, mu, size, leaves, strict=True)
    pulls = [jnp.broadcast_to(_over(s * t, n), v.shape) for s, t, n, v in rows]

    def sums(power: int, r: Sequence[jax.Array]) -> list[jax.Array]:
        rows = zip(units, pulls, grouping.spread(r), strict=True)
        return grouping.sums(
            [jnp.square(v) / jnp.maximum(x + p, _LEAST) ** power for v, p, x in rows]
        )

    def newton(r: list[jax.Array]) -> list[jax.Array]:
        columns = zip(r, sums(2, r), sums(3, r), dead, strict=True)
        return [
            jnp.where(no, 0, x + _over(f * (jnp.sqrt(f) - 1), chi)) for x, f, chi, no in columns
        ]

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, r, _ = carry
        new = newton(r)
        moves = [jnp.any(x - y > _AT_REST * x) for x, y in zip(new, r, strict=True)]
        return step + 1, new, jnp.any(jnp.stack(moves))

    zero = [jnp.zeros_like(x) for x in lengths]
    # Where the sum is at most 1 at r = 0, the group ends at zero; else r = 0 is left of the root.
    dead = [f <= 1 for f in sums(2, zero)]
    _, r, _ = lax.while_loop(
        lambda carry: carry[2] & (carry[0] < _NEWTON_STEPS), advance, (0, newton(zero), True)
    )
    kept_part = zip(grouping.spread(r), pulls, mu, strict=True)
    return [jnp.where(t > 0, _over(x, x + p), 1) for x, p, t in kept_part]


def _over(x: Any, y: Any) -> jax.Array:
    """The quotient x / y, and 0 where y is."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def weights_of(grouping: Grouping, weight: Callable[[int], float]) -> list[np.ndarray]:
    """c_g of every group from its size; 0 for one without entries."""
    found = {n: _weigh(weight, n) for s in grouping.sizes for n in np.unique(s).tolist()}
    return [np.reshape([found[n] for n in s.ravel().tolist()], s.shape) for s in grouping.sizes]


def _weigh(weight: Callable[[int], float], size: int) -> float:
    if size == 0:
        return 0.0
    value = weight(size)
    _checks.non_negative(f"weight({size})", value)
    return float(value)
