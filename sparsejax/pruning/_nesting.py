"""Masks of a sparsity after masks of a lower one: what is pruned stays pruned, counts are exact."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree, criteria, filters, masking, selection
from sparsejax._typing import Filter, Masks, Params, Scores
from sparsejax.allocation import Allocation, Layer, allocate
from sparsejax.granularities import NM, Granularity, Unstructured

_UNSTRUCTURED = Unstructured()

Scoring: TypeAlias = Callable[[Params, Masks], Scores]
"""`(params, masks) -> scores`; every criterion that looks at no gradients is one."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How masks follow from scores: the arguments of `masking.topk`."""

    scope: Any = None
    allocation: Allocation | None = None
    granularity: Granularity | NM = _UNSTRUCTURED
    stacked: Filter | None = None
    prunable: Filter = filters.weights

    def paths(self, params: Params) -> list[str]:
        """Where the prunable leaves are."""
        return list(self._prunable(params))

    def stacks(self, params: Params) -> list[str]:
        """Which of these hold several layers."""
        if self.stacked is None:
            return []
        rows = self._prunable(params).items()
        return [p for p, x in rows if filters.answer(self.stacked, p, x, name="stacked")]

    def shares(self, params: Params, sparsities: Sequence[float | None]) -> list[list[int]]:
        """What the allocation keeps of each layer, total by total; nothing without one."""
        allocation = self.allocation
        if allocation is None:
            return []
        found: dict[int, list[int]] = {}

        def noted(layers: Sequence[Layer], keep: int) -> list[int]:
            counts = allocate(allocation, layers, keep)
            found[keep] = [int(count) for count in counts]
            return counts

        dataclasses.replace(self, allocation=noted).everything(params, sparsities)
        return list(found.values())

    def everything(self, params: Params, sparsities: Sequence[float | None]) -> Masks:
        """Masks that keep all, of the shapes that all later ones have.

        Every argument is checked on the way, before hours of training.
        """
        blank = jax.tree.map(lambda x: jnp.zeros_like(x) if _leaves.is_floating(x) else x, params)
        # Without the allocation: one with densities of its own (`override`) cannot keep all.
        masks = dataclasses.replace(self, allocation=None)._topk(
            blank, None if isinstance(self.granularity, NM) else 0.0, ()
        )
        if self.allocation is not None:
            for i, sparsity in enumerate(sparsities):
                self._topk(blank, sparsity, sparsities[:i])
        return jax.tree.map(jnp.ones_like, masks)

    def masks(
        self,
        scores: Scores,
        masks: Masks,
        sparsity: float | None,
        earlier: Sequence[float | None] = (),
    ) -> Masks:
        """The masks of what scores highest among the entries that `masks`, of `earlier`, keep."""
        chosen = filters.selected(self.prunable, scores)
        flat = _tree.flatten(scores)
        rows = zip(flat.leaves, _tree.align("masks", masks, "scores", scores), chosen, strict=True)
        marked = [_marked(score, mask) if yes else score for score, mask, yes in rows]
        return self._topk(flat.rebuild(marked), sparsity, earlier)

    def _prunable(self, params: Params) -> dict[str, Any]:
        flat, chosen = _tree.flatten(params), filters.selected(self.prunable, params)
        rows = zip(flat.paths, flat.leaves, chosen, strict=True)
        return {path: leaf for path, leaf, yes in rows if yes}

    def _topk(
        self, scores: Scores, sparsity: float | None, earlier: Sequence[float | None]
    ) -> Masks:
        allocation = self.allocation
        return masking.topk(
            scores,
            sparsity,
            scope=self.scope,
            allocation=None if allocation is None else _falling(allocation, earlier),
            granularity=_marks_kept(self.granularity),
            stacked=self.stacked,
            prunable=self.prunable,
        )


def scored(scoring: Scoring, params: Params, masks: Masks, prunable: Filter) -> Scores:
    """What a function of the user's scores, in a tree like `params`; the prunable leaves have some.

    Pruned entries may score anything, NaN included.
    """
    flat = _tree.flatten(params)
    scores = _tree.align("scores", scoring(params, masks), "params", params)
    rows = zip(flat.paths, scores, flat.leaves, filters.selected(prunable, params), strict=True)
    for path, score, leaf, yes in rows:
        if yes:
            _check_score(path, score, leaf)
    unscored = np.zeros((), bool)
    return flat.rebuild([unscored if score is None else score for score in scores])


def check_scoring(scoring: Any) -> None:
    """Refuses what scores nothing."""
    _checks.function("scores", scoring, "(params, masks) -> scores", "criteria.magnitude")
    if scoring is criteria.random:
        raise TypeError(
            "`scores` must be a function (params, masks) -> scores, got criteria.random, which "
            "makes one: call it first, criteria.random(jax.random.key(0))."
        )


@dataclasses.dataclass(frozen=True)
class _MarksKept:
    """Another granularity, in which a unit scores -inf where one of its entries does.

    Whatever the pool: that of -inf alone may be +inf, as the Euclidean norm is.
    """

    inner: Granularity

    def units(self, path: str, scores: Any) -> jax.Array:
        gone = scores == -jnp.inf
        pooled = self.inner.units(path, jnp.where(gone, 0, scores))
        # NaN, the one value that no pool loses, at the units of pruned entries and nowhere else.
        marks = self.inner.units(path, jnp.where(gone, jnp.nan, jnp.ones_like(scores)))
        return jnp.where(jnp.isnan(marks), -jnp.inf, _above_marks(pooled))

    def expand(self, kept: Any, shape: Sequence[int]) -> jax.Array:
        return self.inner.expand(kept, shape)


def _marks_kept(granularity: Any) -> Any:
    """The granularity, whose units are marked where their entries are."""
    # `topk` refuses what is none.
    pools = isinstance(granularity, Granularity) and not isinstance(granularity, type)
    return _MarksKept(granularity) if pools and granularity != _UNSTRUCTURED else granularity


def _marked(score: Any, mask: Any) -> jax.Array:
    """-inf where pruned, and nowhere else."""
    return jnp.where(mask, _above_marks(_leaves.wide(score)), -jnp.inf)


def _above_marks(scores: jax.Array) -> jax.Array:
    return jnp.maximum(scores, jnp.finfo(scores.dtype).min)


def _falling(allocation: Allocation, earlier: Sequence[float | None]) -> Allocation:
    """The allocation, in which no layer keeps more than it did at the earlier sparsities.

    Largest remainders may give a layer one unit more of a smaller total: the paradox of Alabama.
    """

    def falling(layers: Sequence[Layer], keep: int) -> list[int]:
        units = [layer.units for layer in layers]
        kept = units
        for total in (*(selection.kept_count(s, sum(units)) for s in earlier), keep):
            kept = _within(allocate(allocation, layers, total), kept)
        return kept

    return falling


def _within(counts: list[int], most: list[int]) -> list[int]:
    """Counts of the same sum, none of them above its bound."""
    counts = list(counts)
    found = [min(count, bound) for count, bound in zip(counts, most, strict=True)]
    for _ in range(sum(counts) - sum(found)):
        room = [bound - count for count, bound in zip(found, most, strict=True)]
        found[int(np.argmax(room))] += 1
    return found


def _check_score(path: str, score: Any, leaf: Any) -> None:
    if not _leaves.is_floating(score):
        got = "None" if score is None else _leaves.describe(score)
        raise ValueError(
            f"`scores` must give real floating scores for every prunable leaf, got {got} at "
            f"{path!r}. A criterion that looks at gradients needs some: scores=lambda params, "
            "masks: criteria.taylor(params, criteria.mean_gradients(grad_fn, params, batches))."
        )
    _checks.same_shape("scores", path, score, "params", leaf)
