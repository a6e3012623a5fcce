"""Batches and examples: checks, and means over them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from sparsejax import _leaves, _tree


def check_batches(batches: Any) -> None:
    """Refuses what cannot be iterated over, and one batch that is a dict."""
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
        raise TypeError(
            f"`batches` must be a list or another iterable of batches, got "
            f"{_leaves.brief(batches)}; "
            "for one batch [batch]."
        )


def check_batches_twice(batches: Any) -> None:
    """Refuses what cannot be gone through twice, too."""
    check_batches(batches)
    if isinstance(batches, Iterator):
        raise TypeError(
            "`batches` must be something that can be gone through twice, such as a list, got "
            f"{_leaves.brief(batches)}; pass list(batches)."
        )


@contextlib.contextmanager
def looking_at(batch: Any, number: int) -> Iterator[None]:
    """Adds to an error in the first batch that it may be no whole one, but the x of an (x, y)."""
    try:
        yield
    except Exception as error:
        # A tuple or dict of arrays is a whole batch.
        if number == 0 and _leaves.shape_of(batch) is not None:
            error.add_note(
                f"`batches` must be an iterable of batches, of which {_leaves.describe(batch)} is "
                "the first; for one batch pass [batch]."
            )
        raise


def none_given() -> ValueError:
    """The error where there is no batch."""
    return ValueError("`batches` must hold at least one batch, got none.")


def mean_over(batches: Iterable[Any], step: Callable[[Any], list[jax.Array]]) -> list[jax.Array]:
    """The mean of what `step` makes of every batch, array by array."""
    total, count = None, 0
    for batch in batches:
        with looking_at(batch, count):
            values = step(batch)
        total = values if total is None else [t + v for t, v in zip(total, values, strict=True)]
        count += 1
    if total is None:
        raise none_given()
    return [t / count for t in total]


def check_examples(name: str, examples: Any) -> int:
    """The number of examples: the length of the leading axis that all arrays share."""
    flat = _tree.flatten(examples)
    if not flat.leaves:
        raise ValueError(f"`{name}` must hold at least one array, got an empty tree.")
    sizes = {}
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        shape = _leaves.shape_of(leaf)
        if not shape:
            raise ValueError(
                f"`{name}` must be arrays with a leading axis of examples, got "
                f"{_leaves.describe(leaf)} at {path!r}; for one example pass x[None]."
            )
        sizes[path] = shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"`{name}` must share their leading axis of examples, got {sizes}.")
    if (count := next(iter(sizes.values()))) == 0:
        raise ValueError(f"`{name}` must hold at least one example, got 0.")
    return count


def check_chunk_size(chunk_size: Any) -> None:
    """Refuses what is not one integer, 1 or more."""
    if not _leaves.is_int(chunk_size):
        raise TypeError(f"`chunk_size` must be an integer, got {_leaves.brief(chunk_size)}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
