"""The order in which the kernel reads a sparse matrix, and the places of its values."""

import dataclasses

import numpy as np

_MOST_ENTRIES = 2**31 - 1  # `base` counts them in 32 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Places of the kept weights of W [K, N], in tiles of `nt` columns and blocks of `kb` rows.

    Blocks follow one another, tile by tile. A block's columns (its groups of 8 where `width` is 8)
    are sorted by their number of entries. Four such columns, a quad, share as many entries as its
    first column has: one of each in turn; the other entries of the four follow, column by column.
    Groups of 8 follow one another with all their entries. Rows ascend within a column.

    Attributes:
      kb: rows of a block.
      nt: columns of a tile.
      width: 1, or 8 where an entry stands for 8 consecutive columns and has 8 values.
      offs: row of every entry within its block, uint16.
      cnt: entries of every sorted column (or group) of every block, uint16.
      col: which column (or group) of the tile that is, uint16.
      base: first entry of every block, and the number of entries, int32.
      rows: row of every value, int32.
      cols: column of every value, int32; from N on for fillers of the last group.
    """

    kb: int
    nt: int
    width: int
    offs: np.ndarray
    cnt: np.ndarray
    col: np.ndarray
    base: np.ndarray
    rows: np.ndarray
    cols: np.ndarray

    def check(self, K: int, N: int) -> None:
        """Raises ValueError for arrays that `pack` cannot have made from a [K, N] matrix."""
        problem = _problem(self, K, N)
        if problem:
            raise ValueError(f"not the structure of a sparse [{K}, {N}] matrix: {problem}")


def pack(kept: np.ndarray, *, width: int = 1, batch: int = 64) -> Packed:
    """Orders the True entries of `kept` [K, N]; `batch`, the rows of x to expect, tunes sizes."""
    K, N = kept.shape
    entries = kept if width == 1 else _blocks(kept, width)
    group, row = np.nonzero(np.ascontiguousarray(entries.T))  # sorted by group, then row
    if group.size > _MOST_ENTRIES:
        raise ValueError(f"more than {_MOST_ENTRIES} kept entries: {group.size}")
    kb, nt = _sizes(K, N, group.size / max(1, entries.size), width, batch)
    per = nt // width  # groups of a tile
    tiles, blocks = -(-N // nt), max(1, -(-K // kb))
    # Entries of each (tile, block, group), and the order of the groups: few entries first.
    where = (group // per * blocks + row // kb) * per + group % per
    counts = np.bincount(where, minlength=tiles * blocks * per).reshape(tiles, blocks, per)
    col = np.argsort(counts, axis=2, kind="stable")
    cnt = np.take_along_axis(counts, col, 2)
    # The place of the first entry of each (tile, block, group) where groups follow in that order,
    first = np.empty_like(counts)
    np.put_along_axis(first, col, _starts(cnt), 2)
    # and in the order in which `nonzero` found them.
    found = _starts(counts.transpose(0, 2, 1)).transpose(0, 2, 1)
    place = (first - found).reshape(-1)[where] + np.arange(group.size)
    slot = _slots(cnt.reshape(-1), width)[place]
    rows, cols = np.empty(group.size, np.int32), np.empty(group.size, np.int32)
    rows[slot], cols[slot] = row, group
    return Packed(
        kb=kb,
        nt=nt,
        width=width,
        offs=(rows % kb).astype(np.uint16),
        cnt=cnt.reshape(-1).astype(np.uint16),
        col=col.reshape(-1).astype(np.uint16),
        base=np.append(0, np.cumsum(counts.sum(2))).astype(np.int32),
        rows=np.repeat(rows, width),
        cols=_widen(cols, width),
    )


def _blocks(kept: np.ndarray, width: int) -> np.ndarray:
    """Which blocks of `width` columns keep anything; the last may reach beyond the matrix."""
    K, N = kept.shape
    padded = np.zeros((K, -(-N // width), width), bool)
    padded.reshape(K, padded.shape[1] * width)[:, :N] = kept
    return np.logical_or.reduce(padded, axis=2)


def _sizes(K: int, N: int, density: float, width: int, batch: int) -> tuple[int, int]:
    """Rows of a block, whose part of x is to stay in the first-level cache; columns of a tile."""
    if batch <= 2:
        kb = 4096
    elif width > 1:  # each row of x is used eight times
        kb = 256 if density >= 0.03 else 1024
    elif batch <= 8:  # rows of x are short
        kb = 1024
    else:
        few = ((0.15, 96), (0.08, 128), (0.03, 256), (0, 512))  # yet a column finds some entries
        kb = next(rows for threshold, rows in few if density >= threshold)
    nt = min(256, max(64, -(-N // 128) * 32))  # at least four tiles, where N allows
    if batch <= 8:  # a tile's offsets are checked, then used: 256 KiB of them stay in a cache
        most = int(2**17 * width / max(1, K * density))
        nt = min(nt, max(64, most // 32 * 32))
    nt = min(nt, max(1, -(-N // (4 * width))) * 4 * width)  # few outputs: no empty columns
    return max(1, min(K, kb)), nt


def _starts(counts: np.ndarray) -> np.ndarray:
    """How many entries come before those of each."""
    return (np.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape)


def _slots(cnt: np.ndarray, width: int) -> np.ndarray:
    """The slot of every entry, entries in the order of (block, sorted column, row)."""
    if width > 1:
        return np.arange(cnt.sum(dtype=np.int64))
    quads = cnt.reshape(-1, 4).astype(np.int64)
    shared, start = quads[:, :1], _starts(quads.sum(1))[:, None]
    tails = quads - shared
    tail = start + 4 * shared + np.cumsum(tails, 1) - tails
    # Of a column: first slot, number of those four apart, slot of the next less that number.
    first, fours, then = (start + np.arange(4), np.broadcast_to(shared, quads.shape), tail - shared)
    first, fours, then, column = (
        np.repeat(a.reshape(-1), cnt) for a in (first, fours, then, _starts(quads))
    )
    p = np.arange(column.size) - column
    return np.where(p < fours, first + 4 * p, then + p)


def _widen(cols: np.ndarray, width: int) -> np.ndarray:
    """Columns of the values of every entry."""
    return (cols[:, None] * np.int32(width) + np.arange(width, dtype=np.int32)).reshape(-1)


def _problem(w: Packed, K: int, N: int) -> str | None:
    if w.width not in (1, 8):
        return f"`width` must be 1 or 8, got {w.width}"
    if not 1 <= w.kb <= 65535:
        return f"`kb` must be from 1 to 65535, got {w.kb}"
    if w.nt % (4 * w.width) or not 0 < w.nt <= 65536:
        return f"`nt` must be a multiple of {4 * w.width} up to 65536, got {w.nt}"
    per = w.nt // w.width
    tiles, blocks = -(-N // w.nt), max(1, -(-K // w.kb))
    shape = (tiles, blocks, per)
    sizes: dict[str, tuple[type[np.generic], int]]
    sizes = {"cnt": (np.uint16, tiles * blocks * per), "col": (np.uint16, tiles * blocks * per)}
    sizes |= {"base": (np.int32, tiles * blocks + 1), "offs": (np.uint16, w.offs.size)}
    sizes |= dict.fromkeys(("rows", "cols"), (np.int32, w.offs.size * w.width))
    for name, (dtype, size) in sizes.items():
        array = getattr(w, name)
        if array.dtype != dtype or array.shape != (size,):
            wanted = f"{np.dtype(dtype)}[{size}]"
            return f"`{name}` must be {wanted}, got {array.dtype}{list(array.shape)}"
    cnt, col = w.cnt.reshape(shape).astype(np.int64), w.col.reshape(shape).astype(np.int64)
    if w.base[0] != 0 or np.any(np.diff(w.base.astype(np.int64)) != cnt.sum(2).reshape(-1)):
        return "`cnt` does not add up to `base`"
    if w.base[-1] != w.offs.size:
        return f"`base` ends at {w.base[-1]}, but there are {w.offs.size} entries"
    if np.any(np.diff(cnt, axis=2) < 0):
        return "`cnt` must ascend in every block"
    if np.any(np.sort(col, axis=2) != np.arange(per)):
        return "`col` must name every column of a tile once in every block"
    # Entries in the order of (tile, block, sorted column): as they are, and as they should be.
    slot = _slots(w.cnt, w.width)
    offs = w.offs[slot].astype(np.int64)
    tile, block, _ = np.ogrid[:tiles, :blocks, :per]
    row, group, last = (
        np.repeat(np.broadcast_to(a, shape).reshape(-1), w.cnt)
        for a in (block * w.kb, tile * per + col, np.minimum(K - block * w.kb, w.kb))
    )
    if np.any(offs >= last):
        return "`offs` leave their block"
    if np.any(group >= -(-N // w.width)):
        return "columns beyond the matrix have entries"
    ascend = np.ones(offs.size, bool)
    ascend[1:] = np.diff(offs) > 0
    ascend[_starts(w.cnt.astype(np.int64))[w.cnt > 0]] = True
    if not ascend.all():
        return "`offs` must ascend within a column"
    rows, cols = np.empty(offs.size, np.int32), np.empty(offs.size, np.int32)
    rows[slot], cols[slot] = row + offs, group
    if np.any(w.rows != np.repeat(rows, w.width)) or np.any(w.cols != _widen(cols, w.width)):
        return "`rows` and `cols` are not the places that the other arrays say"
    return None
