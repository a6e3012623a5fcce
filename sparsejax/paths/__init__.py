"""Paths of λ and cross-validation: how much to prune, chosen by data.

A *fit* is any function `(strength, params, data, key) -> params`: the minimizer of a penalized loss
(`minimizer` makes one), a network pruned to a sparsity and trained on, or one cut at a threshold. A
strength is what it takes, larger = sparser: nothing here knows that it is a λ. A path runs a fit at
many strengths, one after the other (`strength_path`) or all at once (`batched_path`);
`cross_validate` runs a path on each fold and chooses.

A fit must be pure: the same arguments give the same params, bit for bit. Then a run with a `folder`
may be killed at any time: called again, it reads the finished fits and goes on, to the same result.
"""

from sparsejax.paths._cross_validation import cross_validate
from sparsejax.paths._fits import Fit, Score
from sparsejax.paths._minimizer import minimizer
from sparsejax.paths._paths import batched_path, strength_path
from sparsejax.paths._results import CrossValidation, Path
from sparsejax.paths._strengths import log_grid, max_strength

__all__ = [
    "CrossValidation",
    "Fit",
    "Path",
    "Score",
    "batched_path",
    "cross_validate",
    "log_grid",
    "max_strength",
    "minimizer",
    "strength_path",
]
