"""Scores of the prunable leaves: asked of a criterion, checked, and turned into a tree of masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree, criteria, filters
from sparsejax._typing import Criterion, Masks, Params


def check_criterion(criterion: Any) -> None:
    """Refuses what is no criterion."""
    _checks.function("criterion", criterion, "(params, grads) -> scores", "criteria.magnitude")
    if criterion is criteria.random:
        raise TypeError(
            "`criterion` must be a function (params, grads) -> scores, got criteria.random, which "
            "makes one: call it first, criteria.random(jax.random.key(0))."
        )


def from_criterion(
    criterion: Criterion, params: Params, grads: Params, chosen: list[bool]
) -> _tree.Flat:
    """What a criterion says, leaf by leaf of `params`; refuses a chosen leaf without a score."""
    check_criterion(criterion)
    flat = _tree.flatten(params)
    _tree.check_shapes("grads", grads, params)
    scores = _tree.align("scores", criterion(params, grads), "params", params)
    for path, score, leaf, yes in zip(flat.paths, scores, flat.leaves, chosen, strict=True):
        if yes:
            _check_score(path, score, leaf)
    return flat._replace(leaves=scores)


def chosen_scores(scores: _tree.Flat, chosen: list[bool]) -> list[jax.Array]:
    """The chosen leaves, which must be real floating arrays without NaN."""
    arrays = []
    for path, leaf, yes in zip(scores.paths, scores.leaves, chosen, strict=True):
        if yes:
            if not filters.floating(path, leaf):
                raise TypeError(
                    f"`scores` must be real floating arrays, got {_leaves.describe(leaf)} at "
                    f"{path!r}; take jnp.abs of complex scores, astype(float) of integers."
                )
            _checks.no_nan("scores", path, leaf)
            arrays.append(jnp.asarray(leaf))
    return arrays


def spread(flat: _tree.Flat, chosen: list[bool], found: list[jax.Array]) -> Masks:
    """A tree of the masks of the chosen leaves, and of a 0-d True for each of the others."""
    masks = iter(found)
    return flat.rebuild([next(masks) if yes else jnp.ones((), bool) for yes in chosen])


def _check_score(path: str, score: Any, leaf: Any) -> None:
    if score is None or _leaves.dtype_of(score) == np.dtype(bool):
        raise ValueError(
            f"`criterion` gave no score for the prunable leaf {path!r}: its gradient is None or "
            "not floating. Differentiate with respect to it, leave it out of `prunable`, or take "
            "a criterion without gradients (criterion=criteria.magnitude)."
        )
    _checks.same_shape("scores", path, score, "params", leaf)
