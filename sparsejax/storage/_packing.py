"""One leaf as bytes: its mask if it has one, which entries are kept, and their values.

Flags (1: a mask was given, 2: it is 0-d), for each axis of a given mask whether it has it (1) or
broadcasts along it (0), the code of the positions, the values, and zeros up to a multiple of the
entry's size. Without a mask the positions are those of all entries that are not zero bit for bit.
"""

from typing import NamedTuple

import numpy as np

from sparsejax.storage import _bytes, _positions, _values
from sparsejax.storage._errors import BrokenError

_GIVEN, _SCALAR = 1, 2


class Unpacked(NamedTuple):
    """A leaf as it was, its mask (None where none was given), and its code."""

    array: np.ndarray
    mask: np.ndarray | None
    code: str


def pack(
    array: np.ndarray, mask: np.ndarray | None, *, without_zeros: bool = False
) -> tuple[str, list[_bytes.Buffer]] | None:
    """The code and the bytes of a leaf, in pieces; None where it is no larger dense.

    A leaf with a mask is packed whatever its size, for the mask's sake; one `without_zeros` only if
    that is said, since everyone can read what is dense.
    """
    found = _nonzero(array) if mask is None else mask
    whole = not without_zeros and np.count_nonzero(found) == array.size
    if mask is None and (array.ndim == 0 or whole):
        return None
    code, positions = _positions.encode(found) if found.ndim else _scalar(found)
    values = _values.encode(array, _spread(found, array.shape))
    pieces = [_head(array.shape, mask), *positions, *values]
    pieces.append(bytes(-_bytes.length(pieces) % array.dtype.itemsize))
    return None if mask is None and _bytes.length(pieces) >= array.nbytes else (code, pieces)


def unpack(content: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> Unpacked:
    """The leaf from its bytes.

    Raises:
      BrokenError: if they are none of `pack` for a leaf of this shape and dtype.
    """
    cursor = _bytes.Cursor(content)
    flags = cursor.number()
    if flags == _GIVEN | _SCALAR:
        code, mask = "bitmask", np.array(_flag(cursor))
    elif flags in (0, _GIVEN):
        has = tuple(flags == 0 or _flag(cursor) for _ in shape)
        of = tuple(size if yes else 1 for size, yes in zip(shape, has, strict=True))
        code, mask = _positions.decode(cursor, of)
    else:
        raise BrokenError("it is of a kind that is not known")
    array = np.zeros(shape, dtype)
    _values.decode(cursor, array, _spread(mask, shape))
    cursor.end(dtype.itemsize)
    return Unpacked(array, mask if flags else None, code)


def first_lost(array: np.ndarray, mask: np.ndarray) -> tuple[int, ...] | None:
    """The index of the first entry that is pruned but not zero; None where there is none."""
    entries, kept = array.reshape(-1), _spread(mask, array.shape)
    for start in range(0, array.size, _positions.CHUNK):
        part = slice(start, start + _positions.CHUNK)
        with np.errstate(invalid="ignore"):  # Of a NaN that signals.
            nonzero = entries[part] != 0
        lost = np.flatnonzero(nonzero & ~kept[part])
        if lost.size:
            return tuple(map(int, np.unravel_index(start + int(lost[0]), array.shape)))
    return None


def _nonzero(array: np.ndarray) -> np.ndarray:
    bits = _values.as_bits(array) != 0
    return (bits if bits.ndim == 1 else bits.any(axis=1)).reshape(array.shape)


def _spread(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One boolean for every entry of the leaf, in flat order."""
    return np.ascontiguousarray(np.broadcast_to(mask, shape)).reshape(-1)


def _head(shape: tuple[int, ...], mask: np.ndarray | None) -> bytes:
    if mask is None:
        return _bytes.number(0)
    if mask.ndim == 0:
        return _bytes.number(_GIVEN | _SCALAR)
    has = (size == of for size, of in zip(mask.shape, shape, strict=True))
    return b"".join(map(_bytes.number, (_GIVEN, *map(int, has))))


def _scalar(mask: np.ndarray) -> tuple[str, list[_bytes.Buffer]]:
    return "bitmask", [_bytes.number(int(mask))]


def _flag(cursor: _bytes.Cursor) -> bool:
    value = cursor.number()
    if value > 1:
        raise BrokenError("a flag of it is neither 0 nor 1")
    return value == 1
