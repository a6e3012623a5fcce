"""Reads a tree, leaf by leaf, into the structure that the file has or that is asked for."""

import os
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax import _leaves, _progress, _tree
from sparsejax._typing import Masks, Params
from sparsejax.storage import _format, _likeness, _packing, _source, _structure


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


def load(
    path: str | os.PathLike[str],
    like: Params | None = None,
    *,
    limit: int = _source.LIMIT,
    progress: bool | str = False,
) -> Checkpoint:
    """Reads what `save` wrote, bit for bit; or a safetensors file of anyone, as it is.

    Cost: memory of one leaf and some 30 MB more than the tree. Everything in the file is checked,
    each leaf by its CRC-32; nothing in it can run.

    Args:
      path: the file.
      like: a tree of arrays (or `jax.ShapeDtypeStruct`) whose structure the answer is to have:
        leaves are matched by their paths, in shape and dtype, and put where those of `like` are
        (their sharding, NumPy's to NumPy). By default lists, tuples and dicts, whose keys are
        strings or integers, are restored, of NumPy arrays; anything else JAX takes apart (a
        NamedTuple, a module, a state of NNX) is a dict of its parts; another's file is a dict by
        name.
      limit: how many bytes the arrays may have more than the file, 4 GiB by default: a small file
        can say that it holds any number of zeros. (What is read of a header takes up to some 30
        times its length, at most 100 MB, whatever the limit.)
      progress: True draws a bar on standard error; a text stands before it.

    Returns:
      A `Checkpoint` of params, masks (None if saved without) and metadata.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if `like` has other leaves, shapes or dtypes, with the leaf's path.
      InvalidFileError: (a ValueError) if the file is none, damaged, or larger than allowed.
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
    with _source.opened(path) as source:
        _source.check_size(source, int(limit))
        found: list[_packing.Unpacked] = []
        with _progress.bar(progress, "load", len(source.records)) as advance:
            for name in source.records:
                found.append(_source.read(source, name))
                advance(name)
        params = _tree_of(source, [leaf.array for leaf in found])
        masks = None
        if source.said is not None and source.said.masked:
            masks = _tree_of(source, [_source.mask_of(leaf) for leaf in found])
        metadata = source.header.metadata if source.said is None else source.said.metadata
    if like is None:
        return Checkpoint(params, masks, metadata)
    return Checkpoint(
        _placed(params, like), None if masks is None else arranged(masks, like)[1], metadata
    )


def contents(path: str | os.PathLike[str]) -> Contents:
    """What a file says that it holds; only its header is read.

    Args:
      path: a file of `save`, or a safetensors file of anyone.

    Returns:
      A `Contents`.

    Raises:
      InvalidFileError: (a ValueError) if the file is none, or its header is damaged.
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
    with _source.opened(path) as source:
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


def _leaf(source: _source.Source, name: str) -> Leaf:
    record, tensor = source.records[name], source.header.tensors[name]
    size = tensor.stop - tensor.start
    return Leaf(name, record.dtype.name, record.shape, record.code, size, record.nbytes)


def _tree_of(source: _source.Source, leaves: list[Any]) -> Any:
    """The file's tree; the leaves are in the order of the records."""
    if source.said is None:
        return dict(zip(source.records, leaves, strict=True))
    return _structure.decode(source.said.tree, leaves)


def arranged(tree: Any, like: Any) -> tuple[_tree.Flat, Any]:
    """`like` taken apart, and the tree in its structure, by the paths of the leaves."""
    there, wanted = _tree.flatten(tree), _tree.flatten(like)
    if any(len(set(paths)) < len(paths) for paths in (there.paths, wanted.paths)):
        # Keys with dots in them: only step by step are the paths different.
        return wanted, wanted.rebuild(_tree.align("the file", tree, "like", like))
    found = dict(zip(there.paths, there.leaves, strict=True))
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
    wanted, found = arranged(params, like)
    rows = zip(wanted.paths, jax.tree.leaves(found), wanted.leaves, strict=True)
    return wanted.rebuild([_placed_leaf(*row) for row in rows])


def _placed_leaf(path: str, array: np.ndarray, like: Any) -> Any:
    _likeness.check(path, array.shape, array.dtype, like)
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return array
    found = _likeness.as_key(jax.device_put(array) if _likeness.is_key(like) else array, like)
    return jax.device_put(found, like.sharding if getattr(like, "committed", True) else None)
