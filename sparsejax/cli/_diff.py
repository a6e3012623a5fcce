"""`sparsejax diff`: which leaves of two checkpoints differ, and by how much."""

import argparse
import json
import math
from typing import Any, NamedTuple

import numpy as np

from sparsejax import _leaves
from sparsejax.cli import _console, _facts, _names, _reading

_CHUNK = 1 << 22  # Entries at a time, since differences are computed in 8 or 16 bytes.


class Difference(NamedTuple):
    """A leaf in A and in B; numbers are None where the two cannot be compared.

    Attributes:
      name: of the leaf.
      first: `float32[3,2]` in A, None if it is not there.
      second: likewise in B.
      entries: how many there are.
      differing: how many differ bit for bit; None if dtypes or shapes differ.
      largest: the largest |difference|.
      overlap: the intersection over the union of the zeros; None if neither has any.
      masks: how many entries of the masks differ; None if not both files have masks.
    """

    name: str
    first: str | None
    second: str | None
    entries: int | None = None
    differing: int | None = None
    largest: float | None = None
    overlap: float | None = None
    masks: int | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.first == self.second and not self.differing and not self.masks


def run(arguments: argparse.Namespace) -> int:
    """Compares two checkpoints; 0 where they are equal, 1 where not."""
    first = _reading.read(arguments.first, limit=arguments.limit)
    second = _reading.read(arguments.second, limit=arguments.limit)
    found = _compared(first, second)
    different = [d for d in found if not d.equal]
    if arguments.json:
        _console.emit(json.dumps(_as_json(arguments, found), indent=2, allow_nan=False) + "\n")
    elif different:
        _console.emit(_table(found, different))
    else:
        _console.emit(f"{_console.plural(len(found), 'leaf', 'leaves')}, equal bit for bit\n")
    if (first.masks is None) != (second.masks is None) and not arguments.json:
        which = arguments.second if first.masks is None else arguments.first
        _console.note(f"only {_console.shown(which)} has masks; they are not compared")
    return 1 if different else 0


def _compared(first: _reading.Checkpoint, second: _reading.Checkpoint) -> list[Difference]:
    a, b = _names.named(first.params).arrays, _names.named(second.params).arrays
    masks = [_names.masks(c.masks, c.params) for c in (first, second)]
    return [
        _of_leaf(name, a.get(name), b.get(name), [m.get(name) for m in masks])
        for name in list(a) + [name for name in b if name not in a]
    ]


def _of_leaf(name: str, a: Any, b: Any, masks: list[Any]) -> Difference:
    first, second = (None if x is None else _leaves.describe(x) for x in (a, b))
    if a is None or b is None or a.shape != b.shape:
        return Difference(name, first, second)
    found = Difference(name, first, second, entries=a.size)
    if a.dtype == b.dtype:
        found = found._replace(differing=sum(int(_bits_differ(*p).sum()) for p in _parts(a, b)))
    if _leaves.is_number(a) and _leaves.is_number(b):
        found = found._replace(largest=_largest(a, b), overlap=_overlap(a, b))
    if masks[0] is not None and masks[1] is not None:
        found = found._replace(masks=int(np.broadcast_to(masks[0] != masks[1], a.shape).sum()))
    return found


def _parts(a: np.ndarray, b: np.ndarray) -> Any:
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, _CHUNK):
        yield flat_a[start : start + _CHUNK], flat_b[start : start + _CHUNK]


def _bits_differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One boolean an entry."""
    rows = [np.ascontiguousarray(x).view(np.uint8).reshape(x.size, -1) for x in (a, b)]
    return (rows[0] != rows[1]).any(axis=1)


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    """NaN if one entry of a pair is NaN and the other is not."""
    largest = [_largest_of_part(x, y) for x, y in _parts(a, b)]
    return max(largest, key=lambda x: (math.isnan(x), x), default=0.0)


def _largest_of_part(a: np.ndarray, b: np.ndarray) -> float:
    if a.dtype == b.dtype and a.dtype.kind in "iu":
        # Unsigned differences are exact where float64 has too few digits.
        wide = np.dtype(f"{a.dtype.kind}8")
        low, high = (f(a, b).astype(wide).view(np.uint64) for f in (np.minimum, np.maximum))
        return float((high - low).max(initial=0))
    x, y = _wide(a), _wide(b)
    both = np.isnan(x) & np.isnan(y) | (x == y)
    if both.all():
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.abs(x[~both] - y[~both])
    return float(found.max())


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def _overlap(a: np.ndarray, b: np.ndarray) -> float | None:
    x, y = ~_facts.nonzeros(a), ~_facts.nonzeros(b)
    union = int(np.count_nonzero(x | y))
    return int(np.count_nonzero(x & y)) / union if union else None


def _table(found: list[Difference], different: list[Difference]) -> str:
    columns = [
        _console.Column("leaf"),
        _console.Column("in A"),
        _console.Column("in B"),
        _console.Column("differ", number=True),
        _console.Column("largest |A - B|", number=True),
        _console.Column("zeros IoU", number=True),
    ]
    rows = [_row(d) for d in different]
    if any(d.masks for d in different):
        columns.append(_console.Column("masks differ", number=True))
        rows = [[*row, f"{d.masks or 0:,}"] for row, d in zip(rows, different, strict=True)]
    return _console.table(columns, rows, f"{len(different):,} of {len(found):,} leaves differ")


def _row(d: Difference) -> list[str]:
    return [
        d.name,
        d.first or "not there",
        "the same" if d.first == d.second else d.second or "not there",
        "" if d.differing is None else f"{d.differing:,} of {d.entries:,}",
        "" if d.largest is None else f"{d.largest:.3g}",
        "" if d.overlap is None else f"{d.overlap:.4f}",
    ]


def _as_json(arguments: argparse.Namespace, found: list[Difference]) -> dict[str, Any]:
    leaves = [d._asdict() | {"equal": d.equal, "largest": _finite(d.largest)} for d in found]
    return {
        "a": arguments.first,
        "b": arguments.second,
        "equal": all(d.equal for d in found),
        "leaves": leaves,
    }


def _finite(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: "nan", "inf"."""
    return value if value is None or math.isfinite(value) else str(value)
