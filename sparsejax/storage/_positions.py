"""Which entries are kept, in as few bytes as their entropy allows.

A mask is first reduced to one entry for each of its blocks (a channel is one), and read along one
of its axes: that of its N:M groups where it has some, of a small mask that which takes the fewest
bytes, otherwise the last. What is left is written in one of two codes, whichever is
shorter, and each compressed by zstd, whose Huffman codes come within 2 % of the entropy:

- *bitmask*: 8 entries a byte, as `np.packbits`, which is best from a density of 1/5 up;
- *gaps*: how many entries are skipped before each kept one. The highest byte of a gap stands alone,
  as 255 for each 255 of it and then the rest; lower bytes, where gaps are that long, follow in
  planes of their own.
"""

import math
from collections.abc import Iterator

import numpy as np

from sparsejax import _patterns
from sparsejax.storage import _bytes
from sparsejax.storage._errors import BrokenError

CHUNK = 1 << 16  # Entries at a time, so that indices of 8 bytes stay in the cache and the heap.
_SMALL = 1 << 20  # Units of a mask that is read along every axis, for the shortest.
_BITMASK = 0
_MOST_PLANES = 7  # Of 8 bits, in indices of 63.


def encode(mask: np.ndarray) -> tuple[str, list[_bytes.Buffer]]:
    """The code's name and the bytes of a mask that has at least one axis."""
    block = _patterns.blocks(mask)
    coarse = _patterns.coarse(mask, block)
    groups = _patterns.n_of_m(coarse) if max(block) == 1 else None
    codes = [_coded(coarse, axis) for axis in ([-groups[2]] if groups else _axes(coarse))]
    axis, kept, code, pieces = min(codes, key=lambda found: _bytes.length(found[3]))
    head = map(_bytes.number, (*block, axis, kept, code))
    return "gaps" if code else "bitmask", [*head, *pieces]


def decode(cursor: _bytes.Cursor, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
    """The code's name and the mask of this shape."""
    block = tuple(cursor.number() for _ in shape)
    axis, kept, code = cursor.number(), cursor.number(), cursor.number()
    if not all(1 <= b <= max(size, 1) for b, size in zip(block, shape, strict=True)):
        raise BrokenError(f"it has blocks of {block} in a mask of {shape}")
    if not 1 <= axis <= len(shape):
        raise BrokenError("it is of a code that is not known")
    coarse = [-(-size // b) for size, b in zip(shape, block, strict=True)]
    coarse.append(coarse.pop(-axis))
    size = math.prod(coarse)
    if kept > size:
        raise BrokenError(f"it keeps {kept} of {size} units")
    if code not in (_BITMASK, _planes(size, kept)):
        raise BrokenError("it is of a code that is not known")
    flat = _from_gaps(cursor, size, kept, code) if code else _from_bits(cursor, size, kept)
    found = np.moveaxis(flat.reshape(coarse), -1, -axis)
    return "gaps" if code else "bitmask", _patterns.fine(found, block, shape)


def indices(flat: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The indices of what is True, some at a time: where they begin to count, and they."""
    for start in range(0, flat.size, CHUNK):
        yield start, np.flatnonzero(flat[start : start + CHUNK])


def _axes(coarse: np.ndarray) -> list[int]:
    """The axes worth a try, counted from the end, from 1.

    What is alike in a trained mask are mostly the units of one input (the border of images has
    none): read along the inputs, LeNet-300-100 at 97 % zeros takes 15 % fewer bytes.
    """
    several = [axis for axis in range(1, coarse.ndim + 1) if coarse.shape[-axis] > 1]
    return several if several and coarse.size <= _SMALL else [1]


def _coded(coarse: np.ndarray, axis: int) -> tuple[int, int, int, list[_bytes.Buffer]]:
    """The axis, how many are kept, and the number and bytes of the shorter code."""
    flat = np.ascontiguousarray(np.moveaxis(coarse, -axis, -1)).reshape(-1)
    kept = int(np.count_nonzero(flat))
    codes = [_gaps(flat, kept)] if 4 * kept < flat.size else []
    if 64 * kept > flat.size or not codes:
        codes.append((_BITMASK, _bytes.shortest(np.packbits(flat).data)))
    return (axis, kept, *min(codes, key=lambda pair: _bytes.length(pair[1])))


def _gaps(flat: np.ndarray, kept: int) -> tuple[int, list[_bytes.Buffer]]:
    planes = _planes(flat.size, kept)
    tops, lows = bytearray(), [bytearray() for _ in range(planes - 1)]
    last = -1
    for start, found in indices(flat):
        if found.size:
            gaps = np.diff(found, prepend=last - start) - 1
            last = start + int(found[-1])
            tops += _escaped(gaps >> 8 * (planes - 1))
            for plane, low in enumerate(lows):
                low += (gaps >> 8 * plane).astype(np.uint8).data
    frames = [piece for plane in (tops, *lows) for piece in _bytes.shortest(plane)]
    return planes, [_bytes.number(len(tops)), *frames]


def _planes(size: int, kept: int) -> int:
    """As many bytes a gap that about half of the highest ones are zero, or fewer."""
    planes = 1
    while planes < _MOST_PLANES and size * math.log(2) > kept << 8 * planes:
        planes += 1
    return planes


def _escaped(tops: np.ndarray) -> memoryview:
    if not tops.size or tops.max() < 255:
        return tops.astype(np.uint8).data
    escapes = tops // 255
    out = np.full(tops.size + int(escapes.sum()), 255, np.uint8)
    out[np.arange(tops.size) + np.cumsum(escapes)] = tops % 255
    return out.data


def _from_gaps(cursor: _bytes.Cursor, size: int, kept: int, planes: int) -> np.ndarray:
    length = cursor.number()
    if not kept <= length <= kept + size // 255 + 1:
        raise BrokenError(f"it has {length} bytes of gaps for {kept} units of {size}")
    tops, *lows = (
        np.frombuffer(cursor.decompressed(count), np.uint8)
        for count in (length, *[kept] * (planes - 1))
    )
    flat = np.zeros(size, bool)
    done, last, carry = 0, -1, 0
    for start in range(0, length, CHUNK):
        gaps, carry = _unescaped(tops[start : start + CHUNK], carry)
        gaps <<= 8 * (planes - 1)
        if done + gaps.size > kept:
            raise BrokenError(f"it has more than {kept} gaps")
        for plane, low in enumerate(lows):
            gaps += low[done : done + gaps.size].astype(np.int64) << 8 * plane
        done += gaps.size
        if gaps.size:
            last = _mark(flat, gaps, last)
    if done < kept or carry:
        raise BrokenError(f"it has {done} gaps of {kept}")
    return flat


def _unescaped(symbols: np.ndarray, carry: int) -> tuple[np.ndarray, int]:
    """The gaps that end in these symbols, and what is left for the next."""
    ends = symbols != 255
    sums = np.cumsum(symbols, dtype=np.int64)
    at_ends = sums[ends]
    if not at_ends.size:
        return at_ends, carry + int(sums[-1])
    gaps = np.diff(at_ends, prepend=-carry)
    return gaps, int(sums[-1] - at_ends[-1])


def _mark(flat: np.ndarray, gaps: np.ndarray, last: int) -> int:
    if int(gaps.max()) >= flat.size:  # Before the sum, which then cannot overflow.
        raise BrokenError("its gaps lead beyond its end")
    at = np.cumsum(gaps + 1) + last
    if int(at[-1]) >= flat.size:
        raise BrokenError("its gaps lead beyond its end")
    flat[at] = True
    return int(at[-1])


def _from_bits(cursor: _bytes.Cursor, size: int, kept: int) -> np.ndarray:
    packed = np.frombuffer(cursor.decompressed(-(-size // 8)), np.uint8)
    flat = np.unpackbits(packed, count=size).view(bool)
    spare = int(packed[-1]) & (1 << -size % 8) - 1 if size else 0
    if int(np.count_nonzero(flat)) != kept or spare:
        raise BrokenError(f"its bits do not keep {kept} of {size} units")
    return flat
