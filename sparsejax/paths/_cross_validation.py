"""Every strength scored on data that its fits have not seen."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _form, _leaves, _progress, _run_folder, filters
from sparsejax._typing import Filter, Params, Scalar
from sparsejax.paths import _fits, _folds, _strengths
from sparsejax.paths._fits import Fit, Score
from sparsejax.paths._paths import strength_path
from sparsejax.paths._results import CrossValidation, Path, chosen


def cross_validate(
    fit: Fit,
    score: Score,
    strengths: Sequence[Scalar] | np.ndarray | jax.Array,
    params: Params | Callable[[Any, Any], Params],
    data: Any,
    *,
    folds: Any = 5,
    key: jax.Array | None = None,
    path: Callable[..., Path] = strength_path,
    prunable: Filter = filters.weights,
    folder: str | PathLike[str] | None = None,
    progress: bool | str = True,
) -> CrossValidation:
    """Scores every strength on data that its fits have not seen, and chooses one.

    On each fold a path is fitted to the training examples and scored on the others. λ, thresholds
    and target sparsities are chosen alike: all that counts is that larger is sparser. The choice of
    one standard error is the sparser one, and the usual one where sparsity is worth something.

    To use the choice, fit once more to all the data: `fit(cv.best_strength, params, data, key)`,
    where fits end at the same place from everywhere (convex problems). Where they do not (a network
    that is pruned step by step), run the same path again, down to the choice: its order is a part
    of what was scored.
    The score of the chosen strength is too good by a little, for it was chosen by it: what is
    reported comes from a test set, or an outer cross-validation.

    Args:
      fit: `(strength, params, data, key) -> params`, as `path` wants it. It learns everything from
        its data: what was learned from all of it (a standardization, a choice of columns) has seen
        the examples it is scored on.
      score: `(params, data) -> loss` on the examples left out, lower = better; their mean, usually,
        without the penalty. NaN counts as infinitely bad.
      strengths: finite numbers >= 0 in any order, larger = sparser.
      params: what all fits of a fold start from; or a function `(training data, key) -> params`,
        which makes it for each fold, such as one that trains a dense network. When a killed run
        goes on, it is called again for the fold that was cut short, and must give the same params.
      data: a pytree of arrays with the examples along the first axis of each.
      folds: how many, 2 or more: `sklearn.model_selection.KFold`, shuffled by `key`; or a splitter
        of scikit-learn's; or pairs `(training indices, test indices)`, as splitters give them that
        need labels or groups: `StratifiedKFold(5).split(x, y)`.
      key: fit i of fold j gets `fold_in(fold_in(key, j), i)`; a number of k `folds` is shuffled by
        `fold_in(key, k)`; a function `params` gets `fold_in(fold_in(key, j), n)`. `None`: fits get
        `None`, and `folds` must say which examples they hold.
      path: what fits a path: `strength_path`, `batched_path`, a `functools.partial` of one of them
        with its `begin` or `devices`; or any function with their arguments. `key`, `prunable`,
        `folder` and `progress` are given to it here.
      prunable: which leaves count for the sparsity.
      folder: a folder in which each finished fit, and each finished fold's scores, are written at
        once; see `strength_path`. Another `fit`, `score` or `path` needs another folder.
      progress: shows a bar for each fold, on standard error; a text stands before it. False shows
        nothing.

    Returns:
      A `CrossValidation`.

    Raises:
      ImportError: if `folds` is a number and scikit-learn is missing.
      TypeError, ValueError: if an argument is of the wrong kind or out of range; if a leaf of
        `data` is no array or differs in length (with its path); if a fold is empty, out of range,
        or tests on its training examples; if every strength has a NaN or infinite score; for
        `folder` and params of fits as in `strength_path`.

    Example:
      >>> import functools
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> from sparsejax import filters, paths, penalties
      >>> x = jax.random.normal(jax.random.key(0), (60, 8))
      >>> y = x @ jnp.array([2.0, -1, 0, 0, 0, 0, 0, 0]) + jax.random.normal(jax.random.key(1), 60)
      >>> def loss(w, data):
      ...     return 0.5 * jnp.mean((data["x"] @ w - data["y"]) ** 2)
      >>> l1 = functools.partial(penalties.l1, prunable=filters.floating)
      >>> fit = paths.minimizer(loss, lambda s: sj.penalized(optax.sgd(0.3), l1(s)), steps=500)
      >>> data, zeros = {"x": x, "y": y}, jnp.zeros(8)
      >>> grid = paths.log_grid(paths.max_strength(jax.grad(loss)(zeros, data), l1), 10, 0.01)
      >>> cv = paths.cross_validate(fit, loss, grid, zeros, data, key=jax.random.key(2),
      ...                           prunable=filters.floating, progress=False)
      >>> bool(cv.best_strength < cv.one_standard_error_strength < grid[0])
      True

    References:
      L. Breiman, J. Friedman, R. Olshen, C. Stone, *Classification and regression trees*, 1984,
      section 3.4.3, for the rule of one standard error; T. Hastie, R. Tibshirani, J. Friedman, *The
      elements of statistical learning*, 2009, section 7.10, https://hastie.su.domains/ElemStatLearn
    """
    _checks.function("fit", fit, "(strength, params, data, key) -> params", "paths.minimizer(...)")
    _checks.function("score", score, "(params, data) -> loss", "the loss without its penalty")
    _checks.function("path", path, "that fits a path", "paths.strength_path")
    grid = _strengths.checked(strengths)
    if key is not None:
        _checks.key("key", key)
    splits = _folds.splits(folds, _folds.count_examples(data), key)
    made = _is_function(params)
    run = _opened(folder, grid, splits, params, data, key)
    rows = []
    for j, (train, test) in enumerate(splits):
        seen, unseen = _folds.examples_at(data, train), _folds.examples_at(data, test)

        def fitted(j: int = j, seen: Any = seen, unseen: Any = unseen) -> Any:
            fold_key = _form.folded(key, j)
            start = params(seen, _form.folded(fold_key, len(grid))) if made else params
            found = path(
                fit,
                grid,
                start,
                seen,
                key=fold_key,
                prunable=prunable,
                folder=None if run is None else run / f"fold-{j}",
                progress=_progress.part(progress, f"fold {j + 1} of {len(splits)}"),
            )
            losses = [_fits.loss(score, _entry(found.params, i), unseen) for i in range(len(grid))]
            return [np.array(losses), np.asarray(found.sparsity, float)]

        rows.append(_run_folder.once(run, f"fold-{j}", [grid, grid], fitted))
    scores, sparsity = (np.stack(x) for x in zip(*rows, strict=True))
    return chosen(grid, scores, sparsity)


def _opened(
    folder: Any, grid: np.ndarray, splits: list[Any], params: Any, data: Any, key: Any
) -> FilePath | None:
    if folder is None:
        return None
    made = _is_function(params)
    arguments = {
        "folder": "a run of cross_validate",
        "strengths": grid.tolist(),
        "folds": _run_folder.fingerprint("folds", splits),
        "key": _run_folder.key_fingerprint(key),
        "params": "made by a function" if made else _form.fingerprint(_form.form_of(params)),
        "data": _run_folder.fingerprint("data", data),
    }
    return _run_folder.open_run(folder, arguments)


def _is_function(params: Any) -> bool:
    """Whether it makes params, and is none itself: modules can be called, but are trees."""
    return callable(params) and jax.tree_util.all_leaves([params])


def _entry(params: Params, i: int) -> Params:
    """The params of one fit of a path."""
    return jax.tree.map(lambda x: jnp.asarray(x[i]) if _leaves.is_number(x) else x, params)
