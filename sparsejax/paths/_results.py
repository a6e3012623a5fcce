"""What is found: a path, a cross-validation, and the choice from its scores."""

from typing import NamedTuple

import numpy as np

from sparsejax._typing import Params


class Path(NamedTuple):
    """A fit at every strength; entry i of everything belongs to `strengths[i]`.

    Attributes:
      strengths: in the order given, shape (n,).
      params: a tree like the params of one fit, whose arrays are NumPy's with a leading axis n.
        What is no array (a function) is there once, as it was in the params to start from.
      sparsity: the fraction of zeros among the prunable entries, counted, shape (n,).
      loss: the score on the data, shape (n,); NaN without a score.
    """

    strengths: np.ndarray
    params: Params
    sparsity: np.ndarray
    loss: np.ndarray


class CrossValidation(NamedTuple):
    """Scores of k folds at n strengths, and the two usual choices.

    Attributes:
      strengths: in the order given, shape (n,).
      scores: on the data left out of each fold, shape (k, n), as they came: NaN where a fit
        diverged.
      sparsity: of each fit, shape (k, n).
      mean: of the scores over the folds, shape (n,); infinite where one of them is NaN.
      standard_error: of that mean: the standard deviation over folds (of k - 1 degrees of freedom)
        by √k, shape (n,); NaN where the mean is infinite. The folds share data, so that it is
        rather too small; it is a yardstick, no confidence interval.
      best: the index of the least mean; of equal ones, that of the largest strength.
      one_standard_error: the index of the largest strength whose mean is at most `mean[best] +
        standard_error[best]`: the sparsest fit that the data cannot tell from the best.
    """

    strengths: np.ndarray
    scores: np.ndarray
    sparsity: np.ndarray
    mean: np.ndarray
    standard_error: np.ndarray
    best: int
    one_standard_error: int

    @property
    def best_strength(self) -> float:
        """The strength of the least mean score."""
        return float(self.strengths[self.best])

    @property
    def one_standard_error_strength(self) -> float:
        """The largest strength within one standard error of the best."""
        return float(self.strengths[self.one_standard_error])


def chosen(grid: np.ndarray, scores: np.ndarray, sparsity: np.ndarray) -> CrossValidation:
    """The two choices from scores and sparsities of shape (k, n)."""
    finite = np.isfinite(scores).all(axis=0)
    if not finite.any():
        raise ValueError(
            "`fit` must give a finite score on all folds at one strength at least, got NaN or "
            "infinity at each: the fits diverged. Look at the learning rate."
        )
    mean, error = np.full(grid.shape, np.inf), np.full(grid.shape, np.nan)
    mean[finite] = scores[:, finite].mean(axis=0)
    error[finite] = scores[:, finite].std(axis=0, ddof=1) / np.sqrt(len(scores))
    best = _largest_strength(grid, mean == mean.min())
    within = _largest_strength(grid, mean <= mean[best] + error[best])
    return CrossValidation(grid, scores, sparsity, mean, error, best, within)


def _largest_strength(grid: np.ndarray, among: np.ndarray) -> int:
    return int(np.argmax(np.where(among, grid, -np.inf)))
