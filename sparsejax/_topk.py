"""How masks share out what is kept: amounts, scopes, allocations, stacked layers."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import (
    _checks,
    _counting,
    _counts,
    _leaves,
    _scores,
    _tree,
    allocation,
    filters,
    selection,
)
from sparsejax._typing import Filter, Masks, Scalar
from sparsejax.granularities import NM, Granularity, Unstructured

_POOLED = "The pool adds infinite scores of both signs, or divides by zero."


class Scored(NamedTuple):
    """A prunable leaf's scores; `stacked` if its first axis counts layers."""

    path: str
    scores: jax.Array
    stacked: bool

    @property
    def layers(self) -> int:
        """How many layers the leaf holds."""
        return self.scores.shape[0] if self.stacked else 1

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer's parameter."""
        return self.scores.shape[1:] if self.stacked else self.scores.shape


class Amount(NamedTuple):
    """How much is pruned: a fraction, or a number of units; one of them is None."""

    sparsity: Scalar | None
    removed: Scalar | None

    def kept(self, n: int, where: str) -> Any:
        """How many of `n` units stay, an int or traced."""
        if self.removed is None:
            return selection.kept_count(self.sparsity, n)
        return selection.rest_count(self.removed, n, where)

    def allocated(
        self, layers: list[allocation.Layer], allocate: allocation.Allocation
    ) -> list[Any]:
        """How many units of each layer stay."""
        keep = self.kept(sum(layer.units for layer in layers), "")
        return allocation.allocate(allocate, layers, keep)


class Listed(NamedTuple):
    """One of several fractions that are known beforehand, each with the count of the host."""

    sparsities: np.ndarray
    index: Any

    def kept(self, n: int, where: str) -> Any:
        """How many of `n` units stay, an int or, where the index is traced, traced."""
        del where
        return self._pick([selection.kept_count(s, n) for s in self.sparsities])

    def allocated(
        self, layers: list[allocation.Layer], allocate: allocation.Allocation
    ) -> list[Any]:
        """How many units of each layer stay."""
        n = sum(layer.units for layer in layers)
        rows = [
            allocation.allocate(allocate, layers, selection.kept_count(s, n))
            for s in self.sparsities
        ]
        return [self._pick(list(column)) for column in zip(*rows, strict=True)]

    def _pick(self, counts: list[int]) -> Any:
        if not _leaves.is_traced(self.index):
            return counts[int(self.index)]
        if max(counts) < 2**31:
            return jnp.asarray(np.array(counts, np.int32))[self.index]
        return _counts.pick(_counts.stack([_counts.wide(c) for c in counts]), self.index)


def check(
    amount: Amount,
    scope: Any,
    allocate: allocation.Allocation | None,
    granularity: Granularity | NM,
) -> None:
    """Refuses arguments of `topk` that are wrong by themselves or exclude each other."""
    if scope is not None:
        _checks.choice("scope", scope, ("global", "per_leaf"))
    if not isinstance(granularity, NM | Granularity) or isinstance(granularity, type):
        raise TypeError(
            "`granularity` must be a value of sparsejax.granularities such as NM(2, 4), got "
            f"{_leaves.brief(granularity)}."
        )
    if allocate is not None:
        _check_allocation(amount, scope, allocate)
    if isinstance(granularity, NM):
        _check_alone(amount, scope, allocate, granularity)
    elif amount.sparsity is None and amount.removed is None:
        raise ValueError(
            "`sparsity` must be given (topk(scores, 0.9)), or how many to prune "
            "(topk(scores, count=1000)); only NM goes without."
        )
    elif amount.removed is None:
        _checks.fraction("sparsity", amount.sparsity)
    elif amount.sparsity is None:
        _checks.integer("count", amount.removed)
    else:
        raise ValueError(
            "`sparsity` must be left out where `count` is given, got "
            f"{_leaves.brief(amount.sparsity)} and {_leaves.brief(amount.removed)}; give one."
        )


def masks(
    scores: _tree.Flat,
    chosen: list[bool],
    amount: Amount | Listed,
    *,
    scope: Any,
    allocate: allocation.Allocation | None,
    granularity: Granularity | NM,
    stacked: Filter | None,
) -> Masks:
    """The masks of what scores highest; `check` has seen the arguments."""
    leaves = scored_leaves(scores, chosen, stacked)
    if isinstance(granularity, NM):
        found = [n_of_m(leaf, granularity) for leaf in leaves]
    else:
        found = best_units(
            leaves, amount, granularity, per_leaf=scope == "per_leaf", allocate=allocate
        )
    return _scores.spread(scores, chosen, found)


def scored_leaves(scores: _tree.Flat, chosen: list[bool], stacked: Filter | None) -> list[Scored]:
    """The chosen leaves of a tree of scores."""
    paths = [path for path, yes in zip(scores.paths, chosen, strict=True) if yes]
    rows = zip(paths, _scores.chosen_scores(scores, chosen), strict=True)
    return [scored(path, leaf, stacked) for path, leaf in rows]


def everything(leaf: Scored, granularity: Granularity | NM) -> jax.Array:
    """The mask that keeps the whole leaf, as the masks of its best units are shaped and sharded."""
    zeros = jnp.zeros_like(leaf.scores, jnp.float32)
    if isinstance(granularity, NM | Unstructured):
        return jnp.ones_like(zeros, bool)
    units = _each_layer(leaf.stacked, partial(granularity.units, leaf.path), zeros)
    grow = partial(granularity.expand, shape=leaf.layer_shape)
    return _each_layer(leaf.stacked, grow, jnp.ones_like(units, bool))


def scored(path: str, scores: Any, stacked: Filter | None) -> Scored:
    """A prunable leaf, with the answer of the filter for stacked leaves."""
    if max(_counting.rows(scores)) >= 2**31:
        raise ValueError(
            "`scores` must have fewer than 2**31 rows, and fewer entries in each (what one index "
            f"of the first axis holds), got {_leaves.describe(scores)} at {path!r}; split it, or "
            "move another axis to the front."
        )
    if stacked is None:
        return Scored(path, scores, False)
    _checks.function("stacked", stacked, "(path, leaf) -> bool", 'filters.by_path("blocks.*")')
    yes = filters.answer(stacked, path, scores, name="stacked")
    if yes and scores.ndim < 2:
        raise ValueError(
            "`stacked` must select leaves whose first axis counts layers, got "
            f"{_leaves.describe(scores)} at {path!r}, which has no other axis."
        )
    return Scored(path, scores, yes)


def n_of_m(leaf: Scored, granularity: NM) -> jax.Array:
    """The mask of a leaf by N:M."""
    return _each_layer(leaf.stacked, partial(granularity.masks, leaf.path), leaf.scores)


def best_units(
    leaves: Sequence[Scored],
    amount: Amount | Listed,
    granularity: Granularity,
    *,
    per_leaf: bool,
    allocate: allocation.Allocation | None,
) -> list[jax.Array]:
    """The masks of all leaves, of their best units."""
    units = [
        _each_layer(leaf.stacked, partial(granularity.units, leaf.path), leaf.scores)
        for leaf in leaves
    ]
    if granularity != Unstructured():
        for leaf, scores in zip(leaves, units, strict=True):
            _checks.no_nan("scores", leaf.path, scores, of="units", hint=_POOLED)
    if allocate is not None:
        kept = keep_some_each(leaves, units, allocated(leaves, units, amount, allocate))
    elif per_leaf:
        counts = [
            [amount.kept(_units_of_layer(leaf, u), f" at {leaf.path!r}")] * leaf.layers
            for leaf, u in zip(leaves, units, strict=True)
        ]
        kept = keep_some_each(leaves, units, counts)
    else:
        n = sum(math.prod(u.shape) for u in units)
        kept = selection.keep_largest(units, amount.kept(n, ""))
    return [
        _each_layer(leaf.stacked, partial(granularity.expand, shape=leaf.layer_shape), k)
        for leaf, k in zip(leaves, kept, strict=True)
    ]


def keep_some_each(
    leaves: Sequence[Scored], units: list[jax.Array], counts: list[list[Any]]
) -> list[jax.Array]:
    """Keeps in every layer of every leaf as many units as `counts[leaf][layer]` says."""
    alone = [i for i, leaf in enumerate(leaves) if not leaf.stacked]
    kept = dict(
        zip(
            alone,
            selection.keep_largest_each([units[i] for i in alone], [counts[i][0] for i in alone]),
            strict=True,
        )
    )
    for i, leaf in enumerate(leaves):
        if leaf.stacked:
            others = tuple(range(1, units[i].ndim))
            n = _units_of_layer(leaf, units[i])
            if n >= 2**31:
                raise ValueError(
                    "`scores` must have fewer than 2**31 units in a layer of a stacked leaf, got "
                    f"{n} in {_leaves.describe(leaf.scores)} at {leaf.path!r}; take another "
                    'granularity, or scope="global".'
                )
            known = not _leaves.is_traced(*counts[i])
            keep = np.array(counts[i], np.int32) if known else jnp.stack(counts[i])
            kept[i] = selection.keep_largest_along(units[i], keep, others)
    return [kept[i] for i in range(len(leaves))]


def allocated(
    leaves: Sequence[Scored],
    units: Sequence[Any],
    amount: Amount | Listed,
    allocate: allocation.Allocation,
) -> list[list[Any]]:
    """How many units stay in every layer of every leaf."""
    layers = [
        allocation.Layer(leaf.path, leaf.layer_shape, _units_of_layer(leaf, u))
        for leaf, u in zip(leaves, units, strict=True)
        for _ in range(leaf.layers)
    ]
    counts = iter(amount.allocated(layers, allocate))
    return [[next(counts) for _ in range(leaf.layers)] for leaf in leaves]


def _units_of_layer(leaf: Scored, units: Any) -> int:
    return math.prod(units.shape[1:] if leaf.stacked else units.shape)


def _each_layer(stacked: bool, f: Any, array: jax.Array) -> jax.Array:
    if not stacked:
        return f(array)
    if array.shape[0] == 0:
        one = jax.eval_shape(f, jax.ShapeDtypeStruct(array.shape[1:], array.dtype))
        return jnp.zeros((0, *one.shape), one.dtype)
    return jax.vmap(f)(array)


def _check_allocation(amount: Amount, scope: Any, allocate: Any) -> None:
    _checks.function(
        "allocation", allocate, "(layers, keep) -> counts", "allocation.erdos_renyi_kernel"
    )
    if scope == "global":
        raise ValueError(
            '`scope` must be "per_leaf" (or left out) with an `allocation`, which gives every leaf '
            'its own count, got "global".'
        )
    if _leaves.is_traced(amount.sparsity, amount.removed):
        raise ValueError(
            "`allocation` needs a `sparsity` or `count` that is known before tracing, got a traced "
            "one: make it a Python number, a static argument of jit, or leave `allocation` out."
        )


def _check_alone(
    amount: Amount, scope: Any, allocate: allocation.Allocation | None, granularity: NM
) -> None:
    given = {
        "sparsity": amount.sparsity,
        "count": amount.removed,
        "scope": scope,
        "allocation": allocate,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be left out with `granularity` = {granularity}, which fixes the "
                f"sparsity of every leaf by itself, got {_leaves.brief(value)}."
            )
