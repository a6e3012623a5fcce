"""Where the kept weights of a matrix or of a convolution's kernel are: fixed, hashable, packed."""

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from sparsejax.sparse_ops import _packing

# One int32 numbers the entries of the dense array, and the place after the last.
_MOST_ENTRIES = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Structure:
    """The indices of a `SparseMatrix`: host arrays that no transformation of a tree reaches.

    Two structures are equal if they keep the same entries of the same shape in the same order.

    Attributes:
      shape: of the dense array: (inputs, outputs), or (height, width, inputs, outputs).
      block: how many consecutive outputs share an index: 1 or 8.
      batch: the number of rows of x that the order of the values is made for.
      packed: the order of the values, for the kernel.
    """

    shape: tuple[int, ...]
    block: int
    batch: int
    packed: _packing.Packed

    def __post_init__(self) -> None:
        self.packed.check(*self.matrix_shape)
        for field in dataclasses.fields(self.packed):
            value = getattr(self.packed, field.name)
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Inputs (of every tap of a convolution) and outputs."""
        *inputs, outputs = self.shape
        return int(np.prod(inputs, dtype=np.int64)), outputs

    @property
    def size(self) -> int:
        """The number of values, those that fill up the last block included."""
        return self.packed.rows.size

    @functools.cached_property
    def flat(self) -> np.ndarray:
        """The place of every value in the flattened dense array, int32; its size for a filler."""
        rows, cols = self.packed.rows.astype(np.int64), self.packed.cols
        inputs, outputs = self.matrix_shape
        if len(self.shape) == 4:
            height, width, channels, _ = self.shape
            channel, tap = np.divmod(rows, max(1, height * width))
            rows = tap * channels + channel
        place = np.where(cols < outputs, rows * outputs + cols, inputs * outputs)
        return _frozen(place.astype(np.int32))

    @functools.cached_property
    def real(self) -> np.ndarray:
        """Which values are entries of the dense array, and no fillers."""
        return _frozen(self.packed.cols < self.shape[-1])

    @functools.cached_property
    def by_place(self) -> np.ndarray:
        """The values that are no fillers in the order of the flattened dense array."""
        order = np.argsort(self.flat, kind="stable")
        return _frozen(order[: int(self.real.sum())].astype(np.int32))

    @functools.cached_property
    def transposed(self) -> tuple["Structure", np.ndarray]:
        """The structure of the transposed matrix, and which value stands where in it."""
        inputs, outputs = self.shape
        kept = np.zeros((outputs, inputs), bool)
        rows, cols = self.packed.rows[self.real], self.packed.cols[self.real]
        kept[cols, rows] = True
        turned = build(kept, (outputs, inputs), block=1, batch=self.batch)
        ours = turned.packed.cols.astype(np.int64) * outputs + turned.packed.rows
        order = np.empty(turned.size, np.int32)
        order[np.argsort(ours)] = self.by_place
        return turned, _frozen(order)

    @functools.cached_property
    def _digest(self) -> bytes:
        digest = hashlib.blake2b(repr((self.shape, self.block, self.batch)).encode())
        for field in dataclasses.fields(self.packed):
            value = getattr(self.packed, field.name)
            digest.update(value.data if isinstance(value, np.ndarray) else repr(value).encode())
        return digest.digest()

    def __reduce__(self) -> Any:
        # What comes out of a pickle is checked as what is made by hand is.
        return Structure, (self.shape, self.block, self.batch, self.packed)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Structure) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        block = f", block={self.block}" if self.block > 1 else ""
        return f"Structure({int(self.real.sum())} kept of {self.shape}{block})"


def build(kept: np.ndarray, shape: tuple[int, ...], *, block: int, batch: int) -> Structure:
    """Packs which entries are kept; a convolution's by channel, then tap, as its kernel reads x."""
    if int(np.prod(shape, dtype=np.int64)) > _MOST_ENTRIES:
        raise ValueError(f"`w` must have fewer than 2**31 entries, got {shape}; split it.")
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        kept = kept.transpose(2, 0, 1, 3).reshape(inputs * height * width, outputs)
    packed = _packing.pack(kept, width=block, batch=batch)
    return Structure(shape, block, batch, packed)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
