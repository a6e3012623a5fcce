"""Examples, and which of them each fold trains and tests on."""

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sparsejax import _leaves, _tree


def splits(folds: Any, n: int, key: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of training and test indices, all of them checked."""
    if _leaves.is_int(folds):
        pairs = _shuffled(folds, n, key)
    elif hasattr(folds, "split") and not isinstance(folds, str):
        pairs = _pairs_of(folds, n)
    elif isinstance(folds, Iterable) and not isinstance(folds, str):
        pairs = list(folds)
    else:
        raise TypeError(
            "`folds` must be a number, a splitter of scikit-learn's, or pairs (training indices, "
            f"test indices), got {_leaves.brief(folds)}."
        )
    if len(pairs) < 2:
        raise ValueError(
            f"`folds` must be at least 2, for a standard error, got {len(pairs)}; name more."
        )
    return [_checked_pair(j, pair, n) for j, pair in enumerate(pairs)]


def count_examples(data: Any) -> int:
    """How many examples there are; refuses leaves that differ in it."""
    # With None for leaves, that an array which was forgotten does not go unnoticed.
    rows = _tree.flatten(jax.tree.map(_nothing, data, is_leaf=_is_none))
    if not rows.leaves:
        raise ValueError("`data` must hold at least one array of examples, got an empty tree.")
    lengths = {}
    for path, leaf in zip(rows.paths, rows.leaves, strict=True):
        if not _leaves.is_number(leaf) or not _leaves.shape_of(leaf):
            raise TypeError(
                f"`data` must hold arrays with the examples along their first axis, got "
                f"{_leaves.brief(leaf)} at {path!r}; what all examples share belongs into `fit`."
            )
        lengths[path] = len(leaf)
    first, n = next(iter(lengths.items()))
    for path, length in lengths.items():
        if length != n:
            raise ValueError(
                f"`data` must have as many examples in every array, got {n} at {first!r} and "
                f"{length} at {path!r}."
            )
    return n


def examples_at(data: Any, indices: np.ndarray) -> Any:
    """The examples of these indices."""
    return jax.tree.map(lambda x: x[indices], data)


def _shuffled(folds: int, n: int, key: Any) -> list[Any]:
    if not 2 <= folds <= n:
        raise ValueError(f"`folds` must be from 2 to {n}, the number of examples, got {folds}.")
    if key is None:
        raise ValueError(
            "`key` must be given where `folds` is a number, which shuffles, got None; pass "
            "jax.random.key(0), or folds=KFold(5) of scikit-learn's for the data's own order."
        )
    try:
        selection = importlib.import_module("sklearn.model_selection")
    except ImportError as error:
        raise ImportError(
            "`folds` needs scikit-learn where it is a number: pip install 'sparsejax[examples]'; "
            "or pass pairs (training indices, test indices)."
        ) from error
    seed = int(jax.random.bits(jax.random.fold_in(key, folds)))
    return _pairs_of(selection.KFold(int(folds), shuffle=True, random_state=seed), n)


def _pairs_of(splitter: Any, n: int) -> list[Any]:
    try:
        return list(splitter.split(np.zeros((n, 1))))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`folds` must split without labels or groups, got {_leaves.brief(splitter)}, which "
            f"says: {error} Pass its pairs: folds=StratifiedKFold(5).split(x, y)."
        ) from error


def _checked_pair(j: int, pair: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(
            "`folds` must be pairs (training indices, test indices), got "
            f"{_leaves.brief(pair)} as fold {j}."
        )
    train, test = (_indices(j, what, x, n) for what, x in zip(("train", "test"), pair, strict=True))
    both = np.intersect1d(train, test)
    if both.size:
        raise ValueError(
            f"`folds` must test on examples that were not trained on, got {both.size} that are in "
            f"both parts of fold {j}, {both[0]} first."
        )
    return train, test


def _indices(j: int, what: str, indices: Any, n: int) -> np.ndarray:
    array = np.asarray(indices)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"`folds` must have at least one index in each part, got {_leaves.brief(indices)} as "
            f"{what} part of fold {j}."
        )
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"`folds` must have whole numbers as indices, got {_leaves.describe(array)} as {what} "
            f"part of fold {j}; for booleans np.flatnonzero(...)."
        )
    if array.min() < 0 or array.max() >= n:
        raise ValueError(
            f"`folds` must have indices from 0 to {n - 1}, got {array.min()} to {array.max()} as "
            f"{what} part of fold {j}."
        )
    return array.astype(np.int64)


class _Nothing:
    """A leaf that stands for None, which is none."""

    def __repr__(self) -> str:
        return "None"


def _nothing(leaf: Any) -> Any:
    return _Nothing() if leaf is None else leaf


def _is_none(node: Any) -> bool:
    return node is None
