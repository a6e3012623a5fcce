"""What a fit is, and what is measured on it."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from sparsejax import _leaves, masking
from sparsejax._typing import Filter, Params

Fit: TypeAlias = Callable[[Any, Params, Any, Any], Params]
"""`(strength, params, data, key) -> params`: pure; begins at the params it is given."""

Score: TypeAlias = Callable[[Params, Any], Any]
"""`(params, data) -> loss`, a number; lower = better."""


def sparsity(params: Params, prunable: Filter) -> float:
    """The fraction of zeros among the prunable entries."""
    return float(masking.sparsity(params, prunable=prunable).prunable.sparsity)


def loss(score: Score, params: Params, data: Any) -> float:
    """The score of one fit, a number; NaN passes: a fit may diverge."""
    value = score(params, data)
    if _leaves.shape_of(value) != () or not np.isreal(value):
        raise TypeError(f"`score` must give one real number, got {_leaves.describe(value)}.")
    return float(value)
