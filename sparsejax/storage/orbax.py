"""Sparse checkpoints as items of orbax: saved in the background, sharded arrays by their shards.

Each process writes one file of `storage.save`, `process_0.safetensors` and so on, into the item's
folder; orbax sees to it that the folder appears whole or not at all. Where one process holds every
leaf whole, its file is just that of `storage.save(path, params, masks)`. Otherwise a file holds the
pieces that its process has, named by their ranges (`dense.kernel[0:64,0:256]`). Nothing is
gathered.

To be imported by name, and after `pip install 'sparsejax[orbax]'`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax import _leaves, _tree, masking, storage
from sparsejax._typing import Masks, Params
from sparsejax.storage import _likeness, _loading, _pieces, _ranges, _saving, _source
from sparsejax.storage._errors import BrokenError
from sparsejax.storage._ranges import Ranges

try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals
except ImportError as error:
    raise ImportError(
        "sparsejax.storage.orbax needs orbax: pip install 'sparsejax[orbax]'."
    ) from error

__all__ = ["SparseHandler", "SparseRestore", "SparseSave"]

_ON_DEVICE = jax.Array | jax.ShapeDtypeStruct


class SparseHandler(ocp.AsyncCheckpointHandler):  # type: ignore[misc]
    """Saves and restores trees in which zeros take no room, by `SparseSave` and `SparseRestore`.

    A manager's `save` returns when this process has copied to its host what it is to write: buffers
    may be donated or changed at once. Compressing and writing go on in the background, and their
    errors are raised by `wait_until_finished`, `close` or the next `save`. Cost: host memory of the
    shards that the process writes, and of one leaf more, until they are written.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import orbax.checkpoint as ocp
      >>> from sparsejax.storage.orbax import SparseRestore, SparseSave
      >>> params = {"w": jnp.zeros((64, 64)).at[3, 5].set(2.0)}
      >>> masks = {"w": jnp.zeros((64, 64), bool).at[3].set(True)}  # keeps 64, of which 63 are 0
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     items = {"params": SparseSave(params, masks), "note": ocp.args.JsonSave({"lr": 0.1})}
      ...     _ = manager.save(0, args=ocp.args.Composite(**items))
      ...     manager.wait_until_finished()
      ...     like = ocp.args.Composite(params=SparseRestore(params))
      ...     found = manager.restore(0, args=like).params
      >>> found.params["w"][3, 5], int(found.masks["w"].sum())
      (Array(2., dtype=float32), 64)
    """

    async def async_save(self, directory: Any, args: "SparseSave") -> list[Any]:
        """Copies what this process is to write; the future in the answer writes it."""
        write = _writer(_folder(directory), args)

        async def commit() -> None:
            write()

        return [CommitFutureAwaitingContractedSignals(commit(), name="sparsejax_save")]

    def save(self, directory: Any, args: "SparseSave") -> None:
        """Writes what this process is to write, and returns when that is done."""
        _writer(_folder(directory), args)()

    def restore(self, directory: Any, args: "SparseRestore | None" = None) -> storage.Checkpoint:
        """The `storage.Checkpoint` in a folder; a process reads the pieces that it needs."""
        args = args or SparseRestore()
        with _pieces.opened(_folder(directory)) as saved:
            if args.like is None:
                saved.check_size(args.limit)
                flat, numbers = _tree.flatten(saved.tree), saved.tree
                likes: list[Any] = [None] * len(flat.leaves)
            else:
                flat, numbers = _loading.arranged(saved.tree, args.like)
                likes = flat.leaves
            leaves = [saved.leaves[number] for number in jax.tree.leaves(numbers)]
            for path, leaf, like in zip(flat.paths, leaves, likes, strict=True):
                if like is not None:
                    _likeness.check(path, leaf.shape, leaf.dtype, like)
            rows = zip(leaves, likes, strict=True)
            found = [_restored(*row, saved.masked) for row in rows]
        masks = flat.rebuild([mask for _, mask in found]) if saved.masked else None
        return storage.Checkpoint(flat.rebuild([x for x, _ in found]), masks, saved.metadata)

    def metadata(self, directory: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each leaf, by its path."""
        with _pieces.opened(_folder(directory)) as saved:
            flat = _tree.flatten(saved.tree)
            leaves = [saved.leaves[number] for number in flat.leaves]
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        return dict(zip(flat.paths, shapes, strict=True))

    def finalize(self, directory: Any) -> None:
        """Makes sure, before the checkpoint counts as one, that its files hold every entry."""
        with _pieces.opened(_folder(directory)):
            pass


@ocp.args.register_with_handler(SparseHandler, for_save=True)
@dataclasses.dataclass
class SparseSave(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """What to save, as for `storage.save`: `manager.save(step, args=SparseSave(params, masks))`.

    Attributes:
      params: a tree of arrays, sharded in any way, or NumPy's; numbers and PRNG keys will do, so
        that an optimizer's state is as good. What a process holds for itself alone (NumPy, an array
        on one of its devices) is taken from the first process.
      masks: masks for `params`, to be had back bit for bit, also where a kept value is zero. By
        default what is not zero bit for bit is kept.
      metadata: what else the file should say, strings by name.

    Raises:
      TypeError: if an argument is of the wrong kind, or a leaf is no array of numbers.
      ValueError: if masks do not fit, or an array has been donated or deleted; in the background,
        if masks prune what is not zero.
    """

    params: Params
    masks: Masks | None = None
    metadata: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        # Here, since orbax 0.12 goes on waiting for minutes after a save that was refused.
        _flattened(self)


@ocp.args.register_with_handler(SparseHandler, for_restore=True)
@dataclasses.dataclass
class SparseRestore(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """What to restore: `manager.restore(step, args=SparseRestore(like=params))`.

    Attributes:
      like: a tree of arrays or `jax.ShapeDtypeStruct`, as for `storage.load`. Params go where its
        leaves are, masks with them: on any mesh and any number of devices, whatever they were saved
        from. By default: dicts, lists and tuples of whole NumPy arrays.
      limit: without `like`, how many bytes the arrays may have more than their file.
    """

    like: Params | None = None
    limit: int = _source.LIMIT


class _Piece(NamedTuple):
    """What this process writes of a leaf, on its host."""

    number: int
    ranges: Ranges
    array: np.ndarray
    mask: np.ndarray | None


def _writer(folder: Path, args: SparseSave) -> Callable[[], None]:
    """Copies to the host what this process is to write; the function in the answer writes it."""
    flat, masks, metadata = _flattened(args)
    pieces = _own_pieces(flat, masks)
    wholes = [(number, _ranges.whole(np.shape(leaf))) for number, leaf in enumerate(flat.leaves)]
    params: Any = [piece.array for piece in pieces]
    kept: Any = [piece.mask for piece in pieces]
    if jax.process_count() == 1 and [piece[:2] for piece in pieces] == wholes:
        params, kept = flat.rebuild(params), flat.rebuild(kept)
    else:
        labels = [flat.paths[piece.number] + _ranges.label(piece.ranges) for piece in pieces]
        names = _saving.names_of(labels)
        params, kept = (dict(zip(names, column, strict=True)) for column in (params, kept))
        held = {name: piece[:2] for name, piece in zip(names, pieces, strict=True)}
        numbers = flat.rebuild(list(range(len(wholes))))
        metadata |= _pieces.metadata(numbers, _descriptions(flat, masks), held)
    if args.masks is None:
        kept = None
    path = _pieces.file(folder, jax.process_index())
    return lambda: storage.save(path, params, kept, metadata=metadata)


def _flattened(args: SparseSave) -> tuple[_tree.Flat, list[Any], dict[str, str]]:
    """Params taken apart, with arrays of numbers only, their masks or None, and the metadata."""
    flat = _tree.flatten(args.params)
    leaves = [_as_numbers(*row) for row in zip(flat.paths, flat.leaves, strict=True)]
    masks: list[Any] = [None] * len(leaves)
    if args.masks is not None:
        aligned = masking.aligned(args.masks, flat.rebuild(leaves))
        masks = [m if isinstance(m, jax.Array) else np.asarray(m) for m in aligned]
    return flat._replace(leaves=leaves), masks, _saving.checked_metadata(args.metadata)


def _as_numbers(path: str, leaf: Any) -> Any:
    """The leaf, if there are numbers in it to be saved; those of a PRNG key."""
    deleted = isinstance(leaf, jax.Array) and not _leaves.is_traced(leaf) and leaf.is_deleted()
    if deleted:
        raise ValueError(
            f"`params` must have values, got {_leaves.describe(leaf)} at {path!r}, which has been "
            "donated or deleted; save what the step returned."
        )
    leaf = _likeness.as_data(leaf)
    if not _leaves.is_number(leaf) or _leaves.is_traced(leaf):
        raise TypeError(
            f"`params` must hold arrays of numbers, got {_leaves.brief(leaf)} at {path!r}; leave "
            "it out."
        )
    _saving.dtype_of(path, leaf)
    return leaf


def _descriptions(flat: _tree.Flat, masks: list[Any]) -> list[Any]:
    """Of each leaf its dtype, its shape, and that of its mask."""
    dtypes = [_saving.dtype_of(*row).name for row in zip(flat.paths, flat.leaves, strict=True)]
    shapes = [None if mask is None else np.shape(mask) for mask in masks]
    return list(zip(dtypes, map(np.shape, flat.leaves), shapes, strict=True))


def _own_pieces(flat: _tree.Flat, masks: list[Any]) -> list[_Piece]:
    owned = [_owned(leaf) for leaf in flat.leaves]
    for data in (data for parts in owned for data in parts.values()):
        if isinstance(data, jax.Array):
            data.copy_to_host_async()
    rows = enumerate(zip(flat.paths, flat.leaves, masks, owned, strict=True))
    return [
        _Piece(number, ranges, np.array(data), _part_of_mask(path, mask, leaf, ranges))
        for number, (path, leaf, mask, parts) in rows
        for ranges, data in parts.items()
    ]


def _owned(leaf: Any) -> dict[Ranges, Any]:
    """The parts of a leaf that this process writes: of several copies the first."""
    if getattr(leaf, "is_fully_addressable", True) and jax.process_index():
        return {}
    if not isinstance(leaf, jax.Array):
        return {_ranges.whole(np.shape(leaf)): leaf}
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    return {_ranges.indexed(shard.index, leaf.shape): shard.data for shard in shards}


def _part_of_mask(path: str, mask: Any, leaf: Any, ranges: Ranges) -> np.ndarray | None:
    if mask is None:
        return None
    parts: dict[Ranges, Callable[[], Any]] = {_ranges.whole(np.shape(mask)): lambda: mask}
    if isinstance(mask, jax.Array):
        parts = {
            _ranges.indexed(shard.index, mask.shape): functools.partial(np.asarray, shard.data)
            for shard in mask.addressable_shards
        }
    try:
        return _ranges.cut(_ranges.along(ranges, np.shape(leaf), np.shape(mask)), bool, parts)
    except BrokenError as error:
        raise ValueError(
            f"`masks` must be on the devices where their params are: of {path!r} this process has "
            f"{_ranges.label(ranges)}, but not its mask; jax.device_put(mask, param.sharding)."
        ) from error


def _restored(leaf: _pieces.Leaf, like: Any, masked: bool) -> tuple[Any, Any]:
    """The leaf and its mask (or None), where `like` is; no piece is read twice."""
    pieces = {ranges: functools.cache(read) for ranges, read in leaf.pieces.items()}
    arrays = {ranges: lambda read=read: read().array for ranges, read in pieces.items()}
    array = _placed(leaf.shape, leaf.dtype, arrays, like)
    array = _likeness.as_key(array, like)
    if not masked:
        return array, None
    # Only of a leaf that is whole in a file the mask's shape stands nowhere else.
    shape = leaf.mask
    if shape is None:
        [read] = pieces.values()
        shape = _source.mask_of(read()).shape
    masks = {
        _ranges.along(ranges, leaf.shape, shape): lambda read=read: _source.mask_of(read())
        for ranges, read in pieces.items()
    }
    return array, _placed(shape, np.dtype(bool), masks, like)


def _placed(
    shape: tuple[int, ...], dtype: np.dtype, pieces: Mapping[Ranges, Callable[[], Any]], like: Any
) -> Any:
    """An array in pieces, brought where `like` is; what goes to other processes is not read."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        array = _ranges.cut(_ranges.whole(shape), dtype, pieces)
        return jax.device_put(array) if isinstance(like, _ON_DEVICE) else array
    if isinstance(sharding, NamedSharding) and shape[: len(like.shape)] != like.shape:
        sharding = NamedSharding(sharding.mesh, PartitionSpec())  # Of a mask that broadcasts.

    def entries(index: Any) -> np.ndarray:
        return _ranges.cut(_ranges.indexed(index, shape), dtype, pieces)

    return jax.make_array_from_callback(shape, sharding, entries)


def _folder(directory: Any) -> Path:
    path = os.fspath(directory)
    if "://" in path:
        raise ValueError(f"`directory` must be in a file system, got {path!r}; mount it.")
    return Path(path)
