"""The kept values, without loss: byte by byte, so that what is alike stands together.

The lowest byte of all values is followed by the next of all values, and so on; of floating numbers
the sign is first moved below everything else, which leaves the exponent alone in the highest byte.
Trained weights have few exponents: float32 takes some 27 bits, bfloat16 some 11.
"""

import jax.numpy as jnp
import numpy as np

from sparsejax.storage import _bytes, _positions

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def as_bits(array: np.ndarray) -> np.ndarray:
    """The entries in flat order as the unsigned integers of their bits (pairs, of 16 bytes)."""
    size = array.dtype.itemsize
    flat = array.reshape(-1)
    return flat.view(_UNSIGNED[size]) if size in _UNSIGNED else flat.view(np.uint64).reshape(-1, 2)


def encode(array: np.ndarray, kept: np.ndarray) -> bytes:
    """The values of an array where a flat mask is True."""
    bits = as_bits(array)
    values = np.empty((int(np.count_nonzero(kept)), *bits.shape[1:]), bits.dtype)
    done = 0
    for start, found in _positions.indices(kept):
        part = bits[start : start + _positions.CHUNK][found]
        values[done : done + found.size] = _rotated(part, array.dtype, 1)
        done += found.size
    columns = values.view(np.uint8).reshape(-1, array.dtype.itemsize).T
    return _bytes.compressed(*(np.ascontiguousarray(column).data for column in columns))


def decode(cursor: _bytes.Cursor, array: np.ndarray, kept: np.ndarray) -> None:
    """Writes the values into a zeroed array, where a flat mask is True."""
    size, count = array.dtype.itemsize, int(np.count_nonzero(kept))
    content = cursor.decompressed(count * size)
    planes = np.frombuffer(content, np.uint8).reshape(size, count)
    bits, done = as_bits(array), 0
    for start, found in _positions.indices(kept):
        part = np.ascontiguousarray(planes[:, done : done + found.size].T)
        values = part.reshape(-1).view(bits.dtype).reshape(-1, *bits.shape[1:])
        bits[start : start + _positions.CHUNK][found] = _rotated(values, array.dtype, 8 * size - 1)
        done += found.size


def _rotated(bits: np.ndarray, dtype: np.dtype, by: int) -> np.ndarray:
    """Rotated left, of floating numbers."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        return bits
    width = 8 * dtype.itemsize
    return np.left_shift(bits, by) | np.right_shift(bits, width - by)
