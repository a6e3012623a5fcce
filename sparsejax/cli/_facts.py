"""What is to say of a leaf: its zeros, and the structure that they have."""

from typing import Any, NamedTuple

import numpy as np

from sparsejax import _leaves, _patterns
from sparsejax.cli import _names, _reading

# Fewer groups keep n of m by chance.
_FEWEST_GROUPS = 8


class ZeroChannels(NamedTuple):
    """How many indices of an axis, of `size`, have zeros only."""

    axis: int
    zero: int
    size: int


class Structure(NamedTuple):
    """Where zeros stand: n of m along an axis, blocks, channels; None and () if they do not."""

    nm: tuple[int, int, int] | None
    block: tuple[int, ...] | None
    channels: tuple[ZeroChannels, ...]


class Facts(NamedTuple):
    """A leaf; `zeros` is None where it holds no numbers, `kept` where it has no mask."""

    name: str
    array: np.ndarray
    zeros: int | None
    kept: int | None
    stored: _reading.Stored
    structure: Structure


def of_checkpoint(source: _reading.Checkpoint) -> list[Facts]:
    """The facts of every leaf."""
    tree, masks = _names.named(source.params), _names.masks(source.masks, source.params)
    return [
        _of_leaf(name, array, masks.get(name), source.stored.get(name, _reading.UNKNOWN))
        for name, array in tree.arrays.items()
    ]


def nonzeros(array: np.ndarray) -> np.ndarray:
    """Where a leaf of numbers is not zero; NaN is not."""
    return np.asarray(array != 0)


def _of_leaf(name: str, array: np.ndarray, mask: Any, stored: _reading.Stored) -> Facts:
    if not _leaves.is_number(array):
        return Facts(name, array, None, None, stored, Structure(None, None, ()))
    full = nonzeros(array)
    zeros = array.size - int(np.count_nonzero(full))
    kept = None
    if mask is not None:
        # A kept entry may be zero, too, which would hide the structure of the mask.
        full = np.broadcast_to(mask, array.shape)
        kept = int(np.count_nonzero(full))
    return Facts(name, array, zeros, kept, stored, _structure(full))


def _structure(full: np.ndarray) -> Structure:
    if full.ndim < 2 or full.all() or not full.any():
        return Structure(None, None, ())
    block = _patterns.blocks(full)
    partial = [b for b, size in zip(block, full.shape, strict=True) if b < size]
    blocked = max(block) > 1 and len(partial) > 1
    nm = _n_of_m(full) if max(block) == 1 else None
    return Structure(nm, block if blocked else None, _zero_channels(full))


def _n_of_m(full: np.ndarray) -> tuple[int, int, int] | None:
    """(n, m, axis), the axis counted from the first where it is none of the last two."""
    found = _patterns.n_of_m(full)
    if found is None or full.size < _FEWEST_GROUPS * found[1]:
        return None
    n, m, axis = found
    return n, m, axis if axis >= -2 else axis + full.ndim


def _zero_channels(full: np.ndarray) -> tuple[ZeroChannels, ...]:
    found = []
    for axis, size in enumerate(full.shape):
        others = tuple(i for i in range(full.ndim) if i != axis)
        zero = size - int(np.count_nonzero(full.any(axis=others)))
        if zero:
            found.append(ZeroChannels(axis, zero, size))
    return tuple(found)
