"""Reads a tree, leaf by leaf, and believes nothing that it has not checked."""

import contextlib
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from sparsejax import _files, _leaves, _progress, _tree
from sparsejax._typing import Masks, Params
from sparsejax.storage import _container, _dtypes, _format, _packing, _structure
from sparsejax.storage._errors import Broken, InvalidFile

_LIMIT = 2**32


class Checkpoint(NamedTuple):
    """What a file holds: params, the masks that were saved with them (or None), and metadata."""

    params: Params
    masks: Masks | None
    metadata: dict[str, str]


class Leaf(NamedTuple):
    """What a file says of a leaf, unread.

    Attributes:
      name: of its tensor in the file: the leaf's path, such as `"conv1.kernel"`.
      dtype: such as `"float32"`.
      shape: of the leaf.
      code: how it is stored: `"dense"`, `"bitmask"` or `"gaps"`.
      bytes: that it takes in the file.
      dense_bytes: that its entries take.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    code: _format.Code
    bytes: int
    dense_bytes: int


class Contents(NamedTuple):
    """What a file says of itself.

    Attributes:
      leaves: in the order of the tree.
      metadata: the user's.
      packed: whether `save` wrote it; otherwise it is another's safetensors file.
      masked: whether masks were saved.
    """

    leaves: tuple[Leaf, ...]
    metadata: dict[str, str]
    packed: bool
    masked: bool


class _Source(NamedTuple):
    """An open file and what its header says; `said` is None of a file that is not ours."""

    file: BinaryIO
    size: int
    header: _container.Header
    said: _format.Description | None
    records: dict[str, _format.Record]


def load(
    path: str | os.PathLike[str],
    like: Params | None = None,
    *,
    limit: int = _LIMIT,
    progress: bool | str = False,
) -> Checkpoint:
    """Reads what `save` wrote, bit for bit; or a safetensors file of anyone, as it is.

    Cost: memory of one leaf more than the tree. Everything in the file is checked, each leaf by its
    CRC-32; nothing in it can run.

    Args:
      path: the file.
      like: a tree of arrays (or `jax.ShapeDtypeStruct`) whose structure the answer is to have:
        leaves are matched by their paths, in shape and dtype, and put where those of `like` are
        (their sharding, NumPy's to NumPy). By default dicts, lists and tuples are restored, of
        NumPy arrays; anything else JAX takes apart (a NamedTuple, a module, a state of NNX) is a
        dict of its parts; another's file is a dict by name.
      limit: how many bytes the arrays may have more than the file, 4 GiB by default: a small file
        can say that it holds any number of zeros. (What is read of a header takes up to some 30
        times its length, at most 100 MB, whatever the limit.)
      progress: True draws a bar on standard error; a text stands before it.

    Returns:
      A `Checkpoint` of params, masks (None if saved without) and metadata.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if `like` has other leaves, shapes or dtypes, with the leaf's path.
      InvalidFile: (a ValueError) if the file is none, damaged, or larger than allowed.
      OSError: if the file cannot be read.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp
      >>> from sparsejax import storage
      >>> path = os.path.join(tempfile.mkdtemp(), "params.safetensors")
      >>> params = {"w": jnp.zeros((64, 64)).at[3, 5].set(2.0)}
      >>> masks = {"w": jnp.zeros((64, 64), bool).at[3].set(True)}  # keeps 64, of which 63 are 0
      >>> storage.save(path, params, masks, metadata={"step": "100"})
      >>> found = storage.load(path, like=params)
      >>> found.params["w"][3, 5], int(found.masks["w"].sum()), found.metadata
      (Array(2., dtype=float32), 64, {'step': '100'})
    """
    if not _leaves.is_int(limit) or limit < 0:
        raise TypeError(f"`limit` must be a number of bytes, got {_leaves.brief(limit)}.")
    with _opened(path) as source:
        _check_size(source, int(limit))
        found: list[_packing.Unpacked] = []
        with _progress.bar(progress, "load", len(source.records)) as advance:
            for name in source.records:
                found.append(_read(source, name))
                advance(name)
        params = _tree_of(source, [leaf.array for leaf in found])
        masks = None
        if source.said is not None and source.said.masked:
            masks = _tree_of(source, [_mask(leaf) for leaf in found])
        metadata = source.header.metadata if source.said is None else source.said.metadata
    if like is None:
        return Checkpoint(params, masks, metadata)
    return Checkpoint(
        _placed(params, like), None if masks is None else _arranged(masks, like)[1], metadata
    )


def contents(path: str | os.PathLike[str]) -> Contents:
    """What a file says that it holds; only its header is read.

    Args:
      path: a file of `save`, or a safetensors file of anyone.

    Returns:
      A `Contents`.

    Raises:
      InvalidFile: (a ValueError) if the file is none, or its header is damaged.
      OSError: if the file cannot be read.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from sparsejax import storage
      >>> path = os.path.join(tempfile.mkdtemp(), "params.safetensors")
      >>> storage.save(path, [np.zeros((3, 100), "float16")])
      >>> storage.contents(path).leaves[0]._replace(bytes=0)
      Leaf(name='0', dtype='float16', shape=(3, 100), code='gaps', bytes=0, dense_bytes=600)
    """
    with _opened(path) as source:
        said = source.said
        names = list(source.records)
        if said is not None:
            names = [names[i] for i in _structure.order(said.tree)]
        return Contents(
            tuple(_leaf(source, name) for name in names),
            source.header.metadata if said is None else said.metadata,
            said is not None,
            said is not None and said.masked,
        )


@contextlib.contextmanager
def _opened(path: Any) -> Iterator[_Source]:
    known = _files.known_path("path", path)
    if not stat.S_ISREG(os.stat(known).st_mode) and not known.is_dir():
        raise OSError(22, "Not a regular file", str(known))
    with open(known, "rb") as file, _named(known):
        size = os.fstat(file.fileno()).st_size
        header = _container.decode(file, size)
        said = _format.describe(header)
        records = _others(header) if said is None else said.records
        yield _Source(file, size, header, said, records)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except Broken as error:
        raise InvalidFile(
            f"`path` must be a whole checkpoint, got {str(path)!r}: {error}."
        ) from error


def _others(header: _container.Header) -> dict[str, _format.Record]:
    return {
        name: _format.Record(_dtypes.from_container(tensor.dtype), tensor.shape, "dense", 0)
        for name, tensor in header.tensors.items()
    }


def _leaf(source: _Source, name: str) -> Leaf:
    record, tensor = source.records[name], source.header.tensors[name]
    size = tensor.stop - tensor.start
    return Leaf(name, record.dtype.name, record.shape, record.code, size, record.nbytes)


def _check_size(source: _Source, limit: int) -> None:
    masked = source.said is not None and source.said.masked
    total = 0
    for record in source.records.values():
        entries = record.nbytes // record.dtype.itemsize
        total += record.nbytes + (entries if masked and record.code != "dense" else 0)
    if total - source.size > limit:
        raise Broken(
            f"its {source.size} bytes say that they hold {total}, more than `limit` = {limit} "
            f"allows; if you trust it, load(path, limit={total})"
        )


def _read(source: _Source, name: str) -> _packing.Unpacked:
    record, tensor = source.records[name], source.header.tensors[name]
    source.file.seek(source.header.start + tensor.start)
    try:
        if record.code == "dense":
            array = np.empty(record.shape, record.dtype)
            _fill(source, array.reshape(-1).view(np.uint8).data, record)
            _check_booleans(array)
            return _packing.Unpacked(array, None, "dense")
        content = memoryview(bytearray(tensor.stop - tensor.start))
        _fill(source, content, record)
        found = _packing.unpack(content, record.shape, record.dtype)
        _check_booleans(found.array)
        if found.code != record.code:
            raise Broken(f"it is coded as {found.code}, not as {record.code}")
        if found.mask is not None and not (source.said and source.said.masked):
            raise Broken("it has a mask in a file without masks")
        return found
    except Broken as error:
        raise Broken(f"at {name[:200]!r} {error}") from error


def _fill(source: _Source, buffer: memoryview, record: _format.Record) -> None:
    if source.file.readinto(buffer) != buffer.nbytes:  # type: ignore[attr-defined]
        raise Broken("the file ends, though it was longer before")
    if source.said is not None and zlib.crc32(buffer) != record.checksum:
        raise Broken("the bytes are not those that were saved (CRC-32): restore a copy")


def _check_booleans(array: np.ndarray) -> None:
    if array.dtype == bool and array.size and array.view(np.uint8).max() > 1:
        raise Broken("there are booleans that are neither 0 nor 1")


def _mask(leaf: _packing.Unpacked) -> np.ndarray:
    return np.array(True) if leaf.mask is None else leaf.mask


def _tree_of(source: _Source, leaves: list[Any]) -> Any:
    """The file's tree; the leaves are in the order of the records."""
    if source.said is None:
        return dict(zip(source.records, leaves, strict=True))
    return _structure.decode(source.said.tree, leaves)


def _arranged(tree: Any, like: Any) -> tuple[_tree.Flat, Any]:
    """`like` taken apart, and the tree in its structure, by the paths of the leaves."""
    there, wanted = _tree.flatten(tree), _tree.flatten(like)
    found = dict(zip(there.paths, there.leaves, strict=True))
    for name, paths in (("the file", there.paths), ("`like`", wanted.paths)):
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise ValueError(f"`like` must tell its leaves apart, {name} has two at {twice!r}.")
    lacking = [path for path in wanted.paths if path not in found]
    beside = sorted(set(found).difference(wanted.paths))
    if lacking or beside:
        has, path = ("has none", lacking[0]) if lacking else ("has one", beside[0])
        raise ValueError(
            f"`like` must have the leaves of the file, which {has} at {path!r} "
            f"({len(lacking)} are missing there, {len(beside)} here); load without `like` shows "
            "what there is."
        )
    return wanted, wanted.rebuild([found[path] for path in wanted.paths])


def _placed(params: Any, like: Any) -> Any:
    wanted, arranged = _arranged(params, like)
    rows = zip(wanted.paths, jax.tree.leaves(arranged), wanted.leaves, strict=True)
    return wanted.rebuild([_placed_leaf(*row) for row in rows])


def _placed_leaf(path: str, array: np.ndarray, like: Any) -> Any:
    if (_leaves.shape_of(like), _leaves.dtype_of(like)) != (array.shape, array.dtype):
        raise ValueError(
            f"`like` must have the file's shapes and dtypes, at {path!r} it is "
            f"{_leaves.describe(like)}, the file has {_leaves.describe(array)}; load without "
            "`like`, or save a converted tree."
        )
    if isinstance(like, jax.Array) and not like.committed:
        return jax.device_put(array)
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(array, like.sharding)
    return array
