"""The kept values, without loss: byte by byte, so that what is alike stands together.

The values go by segments of 2^18; in each, the lowest byte of all of them is followed by the next
of all, and so on; of floating numbers the sign is first moved below everything else, which leaves
the exponent alone in the highest byte. Trained weights have few exponents: float32 takes some 27
bits, bfloat16 some 11.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from sparsejax.storage import _bytes, _positions

_SEGMENT = 1 << 18
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def as_bits(array: np.ndarray) -> np.ndarray:
    """The entries in flat order as the unsigned integers of their bits (pairs, of 16 bytes)."""
    size = array.dtype.itemsize
    flat = array.reshape(-1)
    return flat.view(_UNSIGNED[size]) if size in _UNSIGNED else flat.view(np.uint64).reshape(-1, 2)


def encode(array: np.ndarray, kept: np.ndarray) -> list[_bytes.Buffer]:
    """The values of an array where a flat mask is True."""
    size = int(np.count_nonzero(kept)) * array.dtype.itemsize
    planes = (
        np.ascontiguousarray(column).data
        for values in _segments(array, kept)
        for column in values.view(np.uint8).reshape(-1, array.dtype.itemsize).T
    )
    return _bytes.compressed(planes, size)


def decode(cursor: _bytes.Cursor, array: np.ndarray, kept: np.ndarray) -> None:
    """Writes the values into a zeroed array, where a flat mask is True."""
    size, bits = array.dtype.itemsize, as_bits(array)
    left = int(np.count_nonzero(kept))
    read = cursor.stream(left * size)
    values = bits[:0]
    for start, found in _positions.indices(kept):
        while len(values) < found.size:
            count = min(left, _SEGMENT)
            planes = np.frombuffer(read(count * size), np.uint8).reshape(size, count)
            part = np.ascontiguousarray(planes.T).reshape(-1).view(bits.dtype)
            part = _rotated(part.reshape(-1, *bits.shape[1:]), array.dtype, 8 * size - 1)
            values, left = np.concatenate([values, part]), left - count
        bits[start : start + _positions.CHUNK][found] = values[: found.size]
        values = values[found.size :]


def _segments(array: np.ndarray, kept: np.ndarray) -> Iterator[np.ndarray]:
    """The values that are kept, rotated, `_SEGMENT` at a time."""
    bits = as_bits(array)
    values = bits[:0]
    for start, found in _positions.indices(kept):
        part = _rotated(bits[start : start + _positions.CHUNK][found], array.dtype, 1)
        values = np.concatenate([values, part])
        while len(values) >= _SEGMENT:
            yield values[:_SEGMENT]
            values = values[_SEGMENT:]
    if len(values):
        yield values


def _rotated(bits: np.ndarray, dtype: np.dtype, by: int) -> np.ndarray:
    """Rotated left, of floating numbers."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        return bits
    width = 8 * dtype.itemsize
    return np.left_shift(bits, by) | np.right_shift(bits, width - by)
