"""`sparsejax prune`: the entries, blocks or channels of least magnitude become zero."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsejax.cli import _choosing, _console, _names, _pruning, _reading, _writing
from sparsejax.cli._choosing import Layout


class Row(NamedTuple):
    """How much of a leaf is pruned; `units` are the entries, blocks or channels chosen among."""

    name: str
    shape: tuple[int, ...]
    entries: int
    pruned: int
    units: int
    units_pruned: int


def run(arguments: argparse.Namespace) -> int:
    """Prunes a checkpoint."""
    _check_options(arguments)
    target = _target(arguments)
    _writing.check(target, arguments.file, force=arguments.force)
    source = _reading.read(arguments.file, limit=arguments.limit)
    tree = _names.named(source.params)
    chosen = _choosing.chosen(tree.arrays, arguments.include, arguments.exclude)
    layout = _layout(arguments, list(tree.arrays), source.metadata)
    if arguments.nm:
        _tell_short_groups(arguments.nm[1], {n: tree.arrays[n] for n in chosen}, layout)
    old = _names.masks(source.masks, source.params)
    found = _pruning.masks(
        {name: tree.arrays[name] for name in chosen},
        {name: old[name] for name in chosen if name in old},
        arguments,
        layout,
    )
    # What was pruned before stays so, even where less is asked for now.
    masks = old | {name: mask & old.get(name, np.True_) for name, mask in found.items()}
    if any((found[name] & ~masks[name]).any() for name in found):
        _console.note("some entries that would be kept stay pruned, as the masks of FILE say")
    _write(target, source, tree, masks)
    units = {name: _pruning.units(mask, arguments, layout) for name, mask in found.items()}
    _report(arguments, layout, [_row(n, tree.arrays[n], masks[n], u) for n, u in units.items()])
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    given = {f"--{name}": getattr(arguments, name) for name in ("sparsity", "scope", "allocation")}
    if arguments.nm:
        for option, value in given.items():
            if value is not None:
                raise _console.CommandError(
                    f"{option} and --nm exclude each other: N:M fixes the sparsity of every leaf"
                )
    elif arguments.sparsity is None:
        raise _console.CommandError("--sparsity is needed (or --nm), such as --sparsity 0.9")
    elif arguments.allocation and arguments.scope == "global":
        raise _console.CommandError(
            "--allocation and --scope global exclude each other: it gives every leaf its own count"
        )


def _target(arguments: argparse.Namespace) -> _writing.Target:
    """Of the kind of FILE, where the suffix of OUT allows it."""
    kind = arguments.format or _writing.kind_by_suffix(arguments.out)
    own = _reading.kind_of(arguments.file)
    if kind is None or (kind == "safetensors" and own == "packed" and not arguments.format):
        kind = own
    return _writing.Target(Path(arguments.out), kind)


def _layout(arguments: argparse.Namespace, names: list[str], metadata: dict[str, str]) -> Layout:
    """The layout as given, or guessed; where it matters, the guess is told."""
    if arguments.layout:
        return arguments.layout
    guess = _choosing.guess(names, metadata)
    if arguments.nm or arguments.block or arguments.channel or arguments.allocation == "er":
        axes = "(out, in, ...)" if guess.layout == "torch" else "(..., in, out)"
        _console.note(f"taken as --layout {guess.layout}, weights {axes}, since {guess.reason}")
    return guess.layout


def _tell_short_groups(m: int, arrays: dict[str, np.ndarray], layout: Layout) -> None:
    axis = _pruning.input_axis(layout)
    for name, array in arrays.items():
        if array.shape[axis] % m:
            _console.note(
                f"{_console.shown(name)}: {array.shape[axis]} inputs are no multiple of {m}; the "
                "last groups are shorter"
            )


def _write(
    target: _writing.Target,
    source: _reading.Checkpoint,
    tree: _names.Named,
    masks: dict[str, np.ndarray],
) -> None:
    pruned = dict(tree.arrays)
    for name, mask in masks.items():
        array = tree.arrays[name]
        pruned[name] = np.where(mask, array, np.zeros((), array.dtype))
    _writing.tell_lost(target, source)
    every = {name: masks.get(name, np.array(True)) for name in tree.arrays}
    deflate = any(stored.code == "deflate" for stored in source.stored.values())
    _writing.write(
        target, tree.rebuild(pruned), tree.rebuild(every), source.metadata, deflate=deflate
    )


def _row(name: str, array: np.ndarray, mask: np.ndarray, units: np.ndarray) -> Row:
    kept = int(np.count_nonzero(np.broadcast_to(mask, array.shape)))
    return Row(
        name,
        array.shape,
        array.size,
        array.size - kept,
        units.size,
        units.size - int(np.count_nonzero(units)),
    )


def _report(arguments: argparse.Namespace, layout: Layout, rows: list[Row]) -> None:
    if arguments.json:
        content = {
            "file": arguments.file,
            "out": arguments.out,
            "layout": layout,
            "unit": _unit(arguments) or "entries",
            "leaves": [row._asdict() for row in rows],
            "total": _total(rows)._asdict(),
        }
        _console.emit(json.dumps(content, indent=2) + "\n")
    else:
        _tell(arguments, rows)


def _tell(arguments: argparse.Namespace, rows: list[Row]) -> None:
    columns = [
        _console.Column("leaf"),
        _console.Column("shape"),
        _console.Column("entries", number=True),
        _console.Column("pruned", number=True),
        _console.Column("sparsity", number=True),
    ]
    total, unit = _total(rows), _unit(arguments)
    units = f", {total.units_pruned:,} of {total.units:,} {unit}" if unit else ""
    if unit:
        columns.append(_console.Column(f"{unit} pruned", number=True))
    _console.note_table(
        columns,
        [_cells(row)[: len(columns)] for row in rows],
        f"{_console.shown(arguments.out)}: pruned {total.pruned:,} of {total.entries:,} entries "
        f"({_console.fraction(total.pruned, total.entries)}){units}",
    )


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        "x".join(map(str, row.shape)),
        f"{row.entries:,}",
        f"{row.pruned:,}",
        _console.fraction(row.pruned, row.entries),
        f"{row.units_pruned:,} of {row.units:,}",
    ]


def _total(rows: list[Row]) -> Row:
    columns = list(zip(*(row[2:] for row in rows), strict=True))
    return Row("total", (), *map(sum, columns))


def _unit(arguments: argparse.Namespace) -> str | None:
    return "channels" if arguments.channel else "blocks" if arguments.block else None
