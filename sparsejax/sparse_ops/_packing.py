"""The order in which the kernel reads a sparse matrix, and the places of its values."""

import dataclasses

import numpy as np

_LIMIT = 2**31 - 1  # `base` counts entries in 32 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Places of the kept weights of W[K, N], as csrc/kernels.h reads them."""

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
    """Orders the True entries of `kept` [K, N]; `batch`, the expected rows of x, tunes block sizes."""
    K, N = kept.shape
    groups = -(-N // width)
    if width > 1:
        padded = np.zeros((K, groups * width), bool)
        padded[:, :N] = kept
        kept = padded.reshape(K, groups, width).any(2)
    # Entries by (group, row): nonzero of the transpose is sorted that way.
    g, k = np.nonzero(np.ascontiguousarray(kept.T))
    if len(g) > _LIMIT:
        raise ValueError(f"more than {_LIMIT} kept entries")
    kb, nt = _sizes(K, N, len(g) / max(1, kept.size), width, batch)
    per = nt // width  # groups of a tile
    ntile, nkb = -(-N // nt), max(1, -(-K // kb))
    # Entries of each (tile, block, group), and the order of groups: few entries first.
    n = np.zeros((ntile, nkb, per), np.int64)
    where = ((g // per) * nkb + k // kb) * per + g % per  # of each entry
    n.reshape(-1)[:] = np.bincount(where, minlength=n.size)
    col = np.argsort(n, axis=2, kind="stable")
    cnt = np.take_along_axis(n, col, 2)
    base = np.concatenate([[0], np.cumsum(n.sum(2))])
    # Slot of each entry: of its group's p-th entry, start + step * p for the part that a quad shares, else the tail's.
    if width == 1:
        s = cnt.reshape(-1, 4)
        shared = s[:, :1]
        quad = (np.cumsum(s.sum(1)) - s.sum(1))[:, None]
        tail = s - shared
        tails = quad + 4 * shared + np.cumsum(tail, 1) - tail
        start, step = quad + np.arange(4), 4
        shared = np.broadcast_to(shared, s.shape)
    else:
        start = tails = np.cumsum(cnt) - cnt.reshape(-1)
        shared, step = np.zeros_like(start), 1
    # Back from the sorted order of groups to their own.
    place = np.empty(n.size, np.int64)
    place[(np.arange(n.size) - np.arange(n.size) % per) + col.reshape(-1)] = np.arange(n.size)
    start, tails, shared = (a.reshape(-1)[place] for a in (start, tails, shared))
    by_block = np.argsort(where, kind="stable")  # rows ascend within a group
    first = np.cumsum(n.reshape(-1)) - n.reshape(-1)
    p = np.empty(len(g), np.int64)
    p[by_block] = np.arange(len(g)) - first[where[by_block]]
    slot = np.where(p < shared[where], start[where] + step * p, tails[where] + p - shared[where])
    rows, cols = np.empty(len(g), np.int32), np.empty(len(g), np.int32)
    rows[slot], cols[slot] = k, g
    if width > 1:
        rows = np.repeat(rows, width)
        cols = (cols[:, None] * np.int32(width) + np.arange(width, dtype=np.int32)).reshape(-1)
    return Packed(
        kb,
        nt,
        width,
        (rows[::width] % kb).astype(np.uint16),
        cnt.reshape(-1).astype(np.uint16),
        col.reshape(-1).astype(np.uint16),
        base.astype(np.int32),
        rows,
        cols,
    )


def _sizes(K: int, N: int, density: float, width: int, batch: int) -> tuple[int, int]:
    """Rows of a block and columns of a tile."""
    kb = (
        2048
        if batch <= 2
        else 1024
        if density < 0.03
        else 256
        if density < 0.15 or batch <= 8
        else 128
    )
    nt = min(256, max(64, -(-N // 128) * 32))  # at least four tiles, where N allows
    return max(1, min(K, kb)), nt


def _problem(w: Packed, K: int, N: int) -> str | None:
    return None
