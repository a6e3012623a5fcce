"""A checkpoint in the files of several processes, each of which holds pieces of leaves.

Where there is one file, of whole leaves, it is just one of `save`. Otherwise the metadata of each
file have, beside the user's own, an object of JSON: `tree`, the structure of the whole tree with
the numbers of its leaves; `leaves`, of each its dtype, its shape and its mask's shape (or null);
and `pieces`, of each tensor in this file the leaf's number and which part of it the tensor is.
"""

import contextlib
import errno
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax import _tree
from sparsejax.storage import _container, _dtypes, _ranges, _source, _structure
from sparsejax.storage._errors import BrokenError
from sparsejax.storage._ranges import Ranges

_FILE = "process_{}.safetensors"
_KEY = "sparsejax.storage.orbax"


class Leaf(NamedTuple):
    """A leaf of the whole tree, the shape of its mask if that is known, and how to read pieces."""

    dtype: np.dtype
    shape: tuple[int, ...]
    mask: tuple[int, ...] | None
    pieces: dict[Ranges, Callable[[], Any]]


class Saved(NamedTuple):
    """What all files say together; in `tree` there is the number of a leaf where the leaf is."""

    tree: Any
    leaves: list[Leaf]
    masked: bool
    metadata: dict[str, str]
    files: list[tuple[Path, Any]]

    def check_size(self, limit: int) -> None:
        """Refuses a file whose arrays are larger by more than so many bytes."""
        for path, source in self.files:
            with _source.named(path):
                _source.check_size(source, limit)


def file(folder: Path, process: int) -> Path:
    """The file of a process."""
    return folder / _FILE.format(process)


def metadata(tree: Any, leaves: Sequence[Any], pieces: Mapping[str, Any]) -> dict[str, str]:
    """What a file of pieces says of itself; the leaves of `tree` are their numbers."""
    said = {"tree": _structure.encode(tree), "leaves": leaves, "pieces": pieces}
    return {_KEY: json.dumps(said, separators=(",", ":"))}


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Saved]:
    """The checkpoint in a folder, of which nothing but the headers has been read.

    Raises:
      FileNotFoundError: if there is none.
      InvalidFileError: if a file is none of `save`, or they do not hold every entry between them.
    """
    paths = sorted(folder.glob(_FILE.format("*")), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise FileNotFoundError(
            errno.ENOENT, f"No {_FILE.format(0)}, so no item of SparseSave", str(folder)
        )
    with contextlib.ExitStack() as stack:
        files = [(path, stack.enter_context(_source.opened(path))) for path in paths]
        with _source.named(folder):
            saved = _merged(files)
        yield saved


def _merged(files: list[tuple[Path, Any]]) -> Saved:
    described = [_described(*file) for file in files]
    tree, leaves, _ = described[0]
    if any(other[:2] != (tree, leaves) for other in described):
        raise BrokenError("its files are of different checkpoints")
    for number, ranges, read in (piece for _, _, pieces in described for piece in pieces):
        if ranges in leaves[number].pieces:
            raise BrokenError(f"its files hold {_ranges.label(ranges)} of leaf {number} twice")
        leaves[number].pieces[ranges] = read
    said = files[0][1].said
    numbered = _structure.decode(tree, list(range(len(leaves))))
    _check_whole(numbered, leaves)
    own = {key: value for key, value in said.metadata.items() if key != _KEY}
    return Saved(numbered, leaves, said.masked, own, files)


def _check_whole(tree: Any, leaves: list[Leaf]) -> None:
    flat = _tree.flatten(tree)
    for path, number in zip(flat.paths, flat.leaves, strict=True):
        held, total = sum(map(_ranges.size, leaves[number].pieces)), math.prod(leaves[number].shape)
        if held != total:
            raise BrokenError(
                f"at {path!r} its files hold {held} of {total} entries: is one missing?"
            )


_Piece = tuple[int, Ranges, Callable[[], Any]]


def _described(path: Path, source: Any) -> tuple[Any, list[Leaf], list[_Piece]]:
    """The whole tree, its leaves, and the pieces of them in a file."""
    if source.said is None:
        raise BrokenError(f"{path.name} is a safetensors file, but not one of SparseSave")
    if _KEY not in source.said.metadata:
        leaves = [Leaf(record.dtype, record.shape, None, {}) for record in source.records.values()]
        pieces = {
            name: (i, _ranges.whole(leaves[i].shape)) for i, name in enumerate(source.records)
        }
        tree = source.said.tree
    else:
        try:
            said = json.loads(source.said.metadata[_KEY])
            leaves = [_leaf(*row) for row in said["leaves"]]
            pieces = {name: _piece(*row) for name, row in said["pieces"].items()}
            tree = said["tree"]
            for name, (number, ranges) in pieces.items():
                _check_piece(source.records[name], leaves[number], ranges)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise BrokenError(
                f"{path.name} does not say rightly what it holds ({error!r})"
            ) from error
    return tree, leaves, [(*row, _reader(path, source, name)) for name, row in pieces.items()]


def _leaf(dtype: str, shape: Sequence[int], mask: Sequence[int] | None) -> Leaf:
    if not _container.is_sizes(shape):
        raise BrokenError("a shape is none")
    if mask and not all(m in (1, n) for m, n in zip(mask, shape, strict=True)):
        raise BrokenError("a mask does not broadcast")
    return Leaf(_dtypes.by_name(dtype), tuple(shape), None if mask is None else tuple(mask), {})


def _piece(number: int, ranges: Sequence[Sequence[int]]) -> tuple[int, Ranges]:
    pairs = ((operator.index(start), operator.index(stop)) for start, stop in ranges)
    return operator.index(number), tuple(pairs)


def _check_piece(record: Any, leaf: Leaf, ranges: Ranges) -> None:
    inside = all(0 <= a <= b <= n for (a, b), n in zip(ranges, leaf.shape, strict=True))
    sizes = tuple(stop - start for start, stop in ranges)
    if not inside or (record.dtype, record.shape) != (leaf.dtype, sizes):
        raise BrokenError(f"{record} is no piece of {leaf.dtype}{list(leaf.shape)}")


def _reader(path: Path, source: Any, name: str) -> Callable[[], Any]:
    def read() -> Any:
        with _source.named(path):
            return _source.read(source, name)

    return read
