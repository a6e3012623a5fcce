"""Which leaves are quantized, and to how many bits."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from sparsejax import _checks, _leaves, _tree, filters
from sparsejax._typing import Filter
from sparsejax.quantization._coded import is_coded

Bits: TypeAlias = int | Callable[[str, Any], int]


def chosen(flat: _tree.Flat, quantizable: Filter, masks: Sequence[Any] | None = None) -> list[bool]:
    """Which leaves a filter selects, without those that are coded already.

    Refuses a filter that selects none of all, and what is not real, or not finite where it is kept.
    """
    example = "sparsejax.filters.weights"
    _checks.function("quantizable", quantizable, "(path, leaf) -> bool", example)
    rows = list(zip(flat.paths, flat.leaves, strict=True))
    answers = [filters.answer(quantizable, *row, name="quantizable") for row in rows]
    if rows and not any(answers):
        some = ", ".join(f"{path!r} {_leaves.describe(leaf)}" for path, leaf in rows[:5])
        raise ValueError(
            f"`quantizable` must select at least one leaf, got none of {len(rows)} ({some}"
            f"{', ...' if len(rows) > 5 else ''}); for vectors pass quantizable=filters.floating."
        )
    found = [yes and not is_coded(leaf) for yes, leaf in zip(answers, flat.leaves, strict=True)]
    for (path, leaf), mask, yes in zip(rows, masks or [None] * len(rows), found, strict=True):
        if yes:
            _check_real(path, leaf, mask)
    return found


def bits_of(bits: Bits, path: str, leaf: Any, *, lowest: int) -> int:
    """How many bits a leaf gets, by a number or a function of it."""
    found = bits(path, leaf) if callable(bits) else bits
    if not _leaves.is_int(found):
        raise TypeError(
            f"`bits` must be an integer, or a function (path, leaf) -> integer, got "
            f"{_leaves.brief(found)} at {path!r}."
        )
    if not lowest <= found <= 8:
        raise ValueError(f"`bits` must be from {lowest} to 8, got {found} at {path!r}.")
    return int(found)


def _check_real(path: str, leaf: Any, mask: Any) -> None:
    if not _leaves.is_floating(leaf):
        raise TypeError(
            f"`quantizable` must select real numbers, got {_leaves.describe(leaf)} at {path!r}; "
            "combine it: filters.all_of(filters.floating, ...)."
        )
    if _leaves.is_traced(leaf, mask) or not getattr(leaf, "is_fully_addressable", True):
        return
    kept = True if mask is None else np.asarray(mask)
    wrong = int(np.count_nonzero(~np.isfinite(np.asarray(leaf)) & kept))
    if wrong:
        raise ValueError(
            f"`params` must be finite where they are quantized: {wrong} of {np.size(leaf)} entries "
            f"are not, at {path!r}; one of them would take the range of all."
        )
