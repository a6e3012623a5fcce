"""`sparsejax pack` and `sparsejax unpack`: the same leaves in another kind of file."""

import argparse
from pathlib import Path

from sparsejax.cli import _console, _reading, _writing


def pack(arguments: argparse.Namespace) -> int:
    """Writes a checkpoint of any kind by `sparsejax.storage`."""
    if _writing.kind_by_suffix(arguments.out) == "npz":
        raise _console.CommandError(
            f"{arguments.out!r} would be no npz file; name it .safetensors, which it is"
        )
    return _convert(arguments, _writing.Target(Path(arguments.out), "packed"))


def unpack(arguments: argparse.Namespace) -> int:
    """Writes a checkpoint of any kind as dense arrays."""
    kind = arguments.format or _writing.kind_by_suffix(arguments.out)
    if kind is None:
        raise _console.CommandError(
            f"{arguments.out!r} does not say which format to write; name it .safetensors or .npz, "
            "or pass --format"
        )
    return _convert(arguments, _writing.Target(Path(arguments.out), kind))


def _convert(arguments: argparse.Namespace, target: _writing.Target) -> int:
    _writing.check(target, arguments.file, force=arguments.force)
    source = _reading.read(arguments.file, limit=arguments.limit)
    _writing.tell_lost(target, source)
    _writing.write(target, source.params, source.masks, source.metadata)
    return 0
