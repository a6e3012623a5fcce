"""Parts of arrays: of each axis the first index and the one behind the last."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from sparsejax.storage._errors import BrokenError

Ranges: TypeAlias = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Ranges:
    """All of an array."""
    return tuple((0, n) for n in shape)


def indexed(index: Sequence[slice], shape: Sequence[int]) -> Ranges:
    """What slices take of an array, such as those of a shard."""
    cuts = [cut.indices(n) for cut, n in zip(index, shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in cuts)


def size(ranges: Ranges) -> int:
    """How many entries there are."""
    return math.prod(stop - start for start, stop in ranges)


def label(ranges: Ranges) -> str:
    """As it would be written in Python: `[0:64,0:256]`."""
    return f"[{','.join(f'{start}:{stop}' for start, stop in ranges)}]"


def along(ranges: Ranges, shape: Sequence[int], mask: Sequence[int]) -> Ranges:
    """What a part of an array needs of something of shape `mask` that broadcasts against it."""
    axes = zip(ranges, shape, mask, strict=True) if len(mask) else ()
    return tuple(part if m == n else (0, 1) for part, n, m in axes)


def cut(ranges: Ranges, dtype: Any, pieces: Mapping[Ranges, Callable[[], Any]]) -> np.ndarray:
    """A part of an array that is in disjoint pieces; those that it does not need are not read.

    Raises:
      BrokenError: if the pieces lack some of it.
    """
    out = np.empty([stop - start for start, stop in ranges], dtype)
    filled = 0
    for there, read in pieces.items():
        pairs = zip(ranges, there, strict=True)
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in pairs)
        if all(start < stop for start, stop in common):
            out[_within(common, ranges)] = read()[_within(common, there)]
            filled += size(common)
    if filled != out.size:
        raise BrokenError(f"it has {filled} of the {out.size} entries of {label(ranges)}")
    return out


def _within(ranges: Ranges, outer: Ranges) -> tuple[slice, ...]:
    pairs = zip(ranges, outer, strict=True)
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in pairs)
