"""`sparsejax inspect`: a table of the leaves of a checkpoint."""

import argparse
import json
from typing import Any

from sparsejax.cli import _console, _facts, _histogram, _reading
from sparsejax.cli._facts import Facts, Structure

_COLUMNS = [
    _console.Column("leaf"),
    _console.Column("shape"),
    _console.Column("dtype"),
    _console.Column("sparsity", number=True),
    _console.Column("bytes", number=True),
    _console.Column("stored"),
    _console.Column("structure"),
]
_KEPT = _console.Column("kept", number=True)


def run(arguments: argparse.Namespace) -> int:
    """Prints what a checkpoint holds."""
    source = _reading.read(arguments.file, limit=arguments.limit)
    facts = _facts.of_checkpoint(source)
    if arguments.json:
        content = _as_json(source, facts, histogram=arguments.histogram)
        _console.emit(json.dumps(content, indent=2, allow_nan=False) + "\n")
        return 0
    _console.emit(_table(source, facts))
    if arguments.histogram:
        _console.emit("\n" + _histogram.drawn(facts))
    return 0


def _table(source: _reading.Checkpoint, facts: list[Facts]) -> str:
    columns, rows = list(_COLUMNS), [_row(f) for f in facts]
    if source.masks is not None:
        columns.insert(4, _KEPT)
        for row, f in zip(rows, facts, strict=True):
            row.insert(4, f"{f.kept:,}")
    return _console.table(columns, rows, _summary(source, facts))


def _row(facts: Facts) -> list[str]:
    return [
        facts.name,
        "x".join(map(str, facts.array.shape)) or "()",
        str(facts.array.dtype),
        "" if facts.zeros is None else _console.fraction(facts.zeros, facts.array.size),
        "" if facts.stored.bytes is None else f"{facts.stored.bytes:,}",
        facts.stored.code,
        ", ".join(_words(facts.structure)),
    ]


def _summary(source: _reading.Checkpoint, facts: list[Facts]) -> str:
    size, dense = _size(facts), sum(f.array.nbytes for f in facts)
    kept = f", masks keep {sum(f.kept or 0 for f in facts):,}" if source.masks is not None else ""
    leaves = _console.plural(len(facts), "leaf", "leaves")
    return (
        f"{source.kind}: {leaves}, {size:,} parameters{kept}, "
        f"sparsity {_console.fraction(_zeros(facts), size)}, {source.bytes:,} bytes "
        f"(dense {dense:,}, ratio {dense / max(source.bytes, 1):.2f})"
    )


def _words(structure: Structure) -> list[str]:
    words = []
    if structure.nm:
        words.append("{}:{} along {}".format(*structure.nm))
    if structure.block:
        words.append("blocks " + "x".join(map(str, structure.block)))
    words += [f"{c.zero} of {c.size} channels zero (axis {c.axis})" for c in structure.channels]
    return words


def _as_json(source: _reading.Checkpoint, facts: list[Facts], *, histogram: bool) -> dict[str, Any]:
    dense = sum(f.array.nbytes for f in facts)
    size, zeros = _size(facts), _zeros(facts)
    return {
        "file": str(source.path),
        "format": source.kind,
        "masks": source.masks is not None,
        "metadata": source.metadata,
        "leaves": [_leaf_as_json(f, histogram=histogram) for f in facts],
        "total": {
            "leaves": len(facts),
            "entries": size,
            "zeros": zeros,
            "sparsity": zeros / max(size, 1),
            "bytes": source.bytes,
            "dense_bytes": dense,
        },
    }


def _leaf_as_json(facts: Facts, *, histogram: bool) -> dict[str, Any]:
    size, structure = facts.array.size, facts.structure
    nm = structure.nm and dict(zip(("n", "m", "axis"), structure.nm, strict=True))
    found = {
        "name": facts.name,
        "shape": list(facts.array.shape),
        "dtype": str(facts.array.dtype),
        "entries": size,
        "zeros": facts.zeros,
        "sparsity": None if facts.zeros is None else facts.zeros / max(size, 1),
        "kept": facts.kept,
        "bytes": facts.stored.bytes,
        "dense_bytes": facts.array.nbytes,
        "stored": facts.stored.code,
        "structure": {
            "nm": nm,
            "block": structure.block,
            "zero_channels": [c._asdict() for c in structure.channels],
        },
    }
    return found | ({"histogram": _histogram.as_json(facts.array)} if histogram else {})


def _size(facts: list[Facts]) -> int:
    return sum(f.array.size for f in facts)


def _zeros(facts: list[Facts]) -> int:
    return sum(f.zeros or 0 for f in facts)
