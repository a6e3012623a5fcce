"""The structure that a mask has, whoever made it: blocks, channels, N of every M; on the host."""

import math
from typing import Any, TypeAlias

import numpy as np

NM: TypeAlias = tuple[int, int, int]
"""(n, m, axis): every m consecutive entries along the axis, counted from the last, keep n."""

_SAMPLE = 1 << 16  # Entries that are looked at first, since most masks have no structure.
_GROUPS = ((1, 2), (2, 4), (1, 4), (4, 8), (2, 8), (1, 8), (8, 16), (4, 16), (2, 16), (1, 16))


def blocks(mask: np.ndarray) -> tuple[int, ...]:
    """The largest blocks, cut from the first entry on, inside which nothing changes.

    Where an axis does not divide, its last block is shorter. `(1, ..., 1)` is no structure, and an
    axis's whole length means that nothing changes along it: channels are `(3, 3, 32, 1)`.

    Args:
      mask: booleans, of any shape.

    Returns:
      The length of a block along every axis, at least 1.
    """
    return tuple(_block(mask, axis) for axis in range(mask.ndim))


def coarse(mask: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """One entry for every block."""
    index: Any = (..., *(slice(None, None, b) for b in block))
    return mask[index]


def fine(coarse_mask: np.ndarray, block: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The mask of this shape from one entry for every block."""
    found = coarse_mask
    for axis, (b, size) in enumerate(zip(block, shape, strict=True)):
        if found.shape[axis] != size:
            found = np.repeat(found, b, axis)[(slice(None),) * axis + (slice(size),)]
    return found


def n_of_m(mask: np.ndarray) -> NM | None:
    """The n and m of a mask that keeps n of every m entries along one of its axes.

    The last axis but one comes first, as Flax's kernels have it. Of several the smallest m.

    Args:
      mask: booleans, of any shape.

    Returns:
      `(n, m, axis)` with n < m of 2, 4, 8 or 16; None where there is none.
    """
    axes = sorted(range(-mask.ndim, 0), key=lambda axis: (axis != -2, -axis)) if mask.size else []
    found = ((n, m, axis) for n, m in _GROUPS for axis in axes if _keeps(mask, n, m, axis))
    return next(found, None)


def _block(mask: np.ndarray, axis: int) -> int:
    size = mask.shape[axis]
    if mask.size == 0 or size == 1:
        return max(size, 1)
    step = 0
    for part in _parts(np.moveaxis(mask, axis, 0)):
        changed = (part[1:] != part[:-1]).reshape(size - 1, -1).any(axis=1)
        step = math.gcd(*(np.flatnonzero(changed) + 1).tolist())
        if step == 1:
            break
    return step or size


def _parts(lines: np.ndarray) -> list[np.ndarray]:
    """The first few entries of every line, and then all, along the first other axis."""
    if lines.ndim == 1:
        return [lines]
    few = max(1, _SAMPLE // max(1, lines.size // lines.shape[1]))
    return [lines[:, :few], lines] if few < lines.shape[1] else [lines]


def _keeps(mask: np.ndarray, n: int, m: int, axis: int) -> bool:
    rows = np.atleast_2d(np.moveaxis(mask, axis, -1))
    first = rows[(0,) * (rows.ndim - 1)][:m]  # Of most masks this one group is enough.
    if rows.shape[-1] % m or np.count_nonzero(first) != n:
        return False
    few = max(1, _SAMPLE // rows[0].size)
    parts = [rows[:few], rows] if few < rows.shape[0] else [rows]
    return all(_counts_are(part, n, m) for part in parts)


def _counts_are(rows: np.ndarray, n: int, m: int) -> bool:
    groups = rows.reshape(*rows.shape[:-1], -1, m)
    return bool((np.add.reduce(groups, axis=-1, dtype=np.uint8) == n).all())
