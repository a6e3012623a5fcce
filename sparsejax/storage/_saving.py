"""Writes a tree, leaf by leaf, beside the file that it is to replace."""

import os
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from sparsejax import _checks, _files, _leaves, _progress, _tree, masking
from sparsejax._typing import Masks, Params
from sparsejax.storage import (
    _container,
    _dtypes,
    _format,
    _likeness,
    _packed_header,
    _packing,
    _structure,
)
from sparsejax.storage._errors import BrokenError


class _Leaf(NamedTuple):
    """A leaf to be written: its name in the file, its path, its mask if it is one to be kept."""

    name: str
    path: str
    value: Any
    mask: Any
    dtype: np.dtype
    shape: tuple[int, ...]


def save(
    path: str | os.PathLike[str],
    params: Params,
    masks: Masks | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    header: Literal["open", "packed"] = "open",
    progress: bool | str = False,
) -> None:
    """Writes a tree into a file in which zeros take no room, all or nothing.

    Every leaf is stored in the least of three ways: *dense*, as every reader of safetensors reads
    it; or its values that are not zero, and which they are: in a *bitmask*, or by the *gaps*
    between them. Positions take within 2 % of their entropy in large leaves, log2 C(n, k) bits for
    k of n entries; blocks, channels and N:M groups are found and stored as such, whoever made them.
    The values are kept bit for bit (NaN's payload, -0.0) and compressed as far as that goes: where
    float32 has been trained to some 27 bits each.

    Cost: four reads of the leaf, some more of a small one; memory of one leaf and some 30 MB more
    than the tree. The file is written beside `path` and takes its place when it is on the disk:
    whoever is killed leaves the old file.

    Args:
      path: the file, usually `*.safetensors`.
      params: a tree of arrays (JAX's, NumPy's, numbers) of any real or complex dtype, 0-d and empty
        ones too; PRNG keys are stored as their data. An array of several devices is fetched; one of
        several processes is for `sparsejax.storage.orbax`.
      masks: masks for `params`, to be had back bit for bit, also where a kept value is zero. A
        pruned -0.0 comes back as 0. By default none: what is not zero bit for bit is kept.
      metadata: what else the file should say, strings by name.
      header: `"open"`: any reader of safetensors lists the leaves, and reads those that are dense.
        `"packed"`: it finds one tensor of bytes, and leaves without zeros are compressed, too. The
        file is some 100 bytes a leaf smaller: a tenth of it, where a small network has been pruned
        and quantized.
      progress: True draws a bar on standard error; a text stands before it.

    Raises:
      TypeError: if an argument is of the wrong kind, or a leaf is no array of numbers.
      ValueError: if masks do not fit, or would lose an entry that they prune and that is not zero,
        with its place; a leaf is not to be had in this process; two keys print alike, or the tree
        is hundreds of nodes deep.
      OSError: if the file cannot be written; the old one is as it was.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from sparsejax import storage
      >>> path = os.path.join(tempfile.mkdtemp(), "params.safetensors")
      >>> w = np.where(np.arange(10_000) % 50 == 0, 0.5, 0).astype("float32").reshape(100, 100)
      >>> storage.save(path, {"w": w, "b": np.ones(100, "float32")})
      >>> [(leaf.name, leaf.code) for leaf in storage.contents(path).leaves], w.nbytes
      ([('b', 'dense'), ('w', 'gaps')], 40000)
      >>> bool((storage.load(path).params["w"] == w).all()), os.path.getsize(path) < 1200
      (True, True)

    References:
      The container: https://github.com/huggingface/safetensors#format
    """
    file = _files.known_path("path", path)
    _checks.choice("header", header, ("open", "packed"))
    said = checked_metadata(metadata)
    leaves, tree = _leaves_of(params, masks)
    with _progress.bar(progress, "save", len(leaves)) as advance, _files.replacing(file) as out:
        description = _format.Description({}, tree, masks is not None, said)
        longest = _longest_header(description, leaves)
        reserved = len(longest) if header == "open" else _longest_outer(leaves, longest)
        out.seek(reserved)
        tensors = {}
        for leaf in sorted(leaves, key=lambda leaf: -leaf.dtype.itemsize):
            start = out.tell() - reserved
            record = _write(out, leaf, without_zeros=header == "packed")
            description.records[leaf.name] = record
            tensors[leaf.name] = _format.tensor(record, start, out.tell() - reserved - start)
            advance(leaf.path)
        if header == "open":
            first = _format.header(description, tensors, reserved)
        else:
            last = _packed_header.pack(_format.header(description, tensors))
            first = _packed_header.outer(out.tell() - reserved, last, reserved)
            out.write(last)
        if len(first) > reserved:
            raise RuntimeError(f"{len(first)} bytes of header do not fit into {reserved}")
        out.seek(0)
        out.write(first)


def _leaves_of(params: Params, masks: Masks | None) -> tuple[list[_Leaf], Any]:
    """The leaves by their names, sorted, and the structure with their numbers."""
    flat = _tree.flatten(params)
    flat = flat._replace(leaves=[_likeness.as_data(leaf) for leaf in flat.leaves])
    found: list[Any] = [None] * len(flat.leaves)
    if masks is not None:
        found = masking.aligned(masks, flat.rebuild(flat.leaves))
    names = names_of(flat.paths)
    rows = zip(names, flat.paths, flat.leaves, found, strict=True)
    leaves = [_checked(*row) for row in rows]
    places = {name: place for place, name in enumerate(sorted(names))}
    try:
        tree = _structure.encode(flat.rebuild([places[name] for name in names]))
    except BrokenError as error:
        raise ValueError(f"`params` must be a tree that can be stored, but {error}.") from None
    return sorted(leaves, key=lambda leaf: leaf.name), tree


def names_of(paths: list[str]) -> list[str]:
    """A name in the container for each path.

    Raises:
      ValueError: if a path is no Unicode text.
    """
    for path in paths:
        if not _is_unicode(path):
            raise ValueError(f"`params` must have keys of Unicode text, got {path!r}; rename that.")
    return _tree.distinct(paths, [_container.METADATA])


def _checked(name: str, path: str, leaf: Any, mask: Any) -> _Leaf:
    if not _leaves.is_number(leaf):
        raise TypeError(
            f"`params` must hold arrays of numbers, got {_leaves.describe(leaf)} at {path!r}; "
            "leave it out."
        )
    if _leaves.is_traced(leaf):
        raise TypeError(
            f"`params` must have values, got an abstract {_leaves.describe(leaf)} at {path!r}; "
            "call `save` outside of jit."
        )
    if not getattr(leaf, "is_fully_addressable", True):
        raise ValueError(
            f"`params` must be whole in this process, got {_leaves.describe(leaf)} at {path!r}, of "
            "which other processes hold parts; sparsejax.storage.orbax saves such arrays."
        )
    dtype, shape = dtype_of(path, leaf), np.shape(leaf)
    if mask is not None and _keeps_all(mask):
        mask = None
    return _Leaf(name, path, leaf, mask, dtype, shape)


def dtype_of(path: str, leaf: Any) -> np.dtype:
    """The dtype in which a leaf is stored; refuses one that cannot be."""
    dtype = np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    dtype = dtype.newbyteorder("<")
    if not _dtypes.known(dtype):
        raise TypeError(
            f"`params` must be of a dtype that can be stored, got {dtype} at {path!r}; convert it."
        )
    return dtype


def _keeps_all(mask: Any) -> bool:
    return np.ndim(mask) == 0 and bool(mask)


def checked_metadata(metadata: Any) -> dict[str, str]:
    """The user's metadata; refuses what is no text by names."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(
        isinstance(word, str) for pair in metadata.items() for word in pair
    ):
        raise TypeError(
            f"`metadata` must map strings to strings, got {_leaves.brief(metadata)}; json.dumps "
            "makes a string of anything else."
        )
    if not all(_is_unicode(word) for pair in metadata.items() for word in pair):
        raise ValueError(f"`metadata` must be Unicode text, got {_leaves.brief(dict(metadata))}.")
    return dict(metadata)


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogate, which no file can hold."""
    return text.encode("utf-8", "replace").decode() == text


def _longest_header(description: _format.Description, leaves: list[_Leaf]) -> bytes:
    """As long as the header can become: every leaf in the longer of its two forms, far behind."""
    start, tensors, records = 0, {}, {}
    for leaf in leaves:
        dense, packed = (_format.Record(leaf.dtype, leaf.shape, c, 0) for c in ("dense", "bitmask"))
        most = _most(leaf)
        forms = [
            (_format.tensor(dense, start, dense.nbytes), dense),
            (_format.tensor(packed, start, most), packed),
        ]
        tensors[leaf.name], records[leaf.name] = max(forms, key=lambda form: len(str(form)))
        start += most
    return _format.header(description._replace(records=records), tensors)


def _longest_outer(leaves: list[_Leaf], header: bytes) -> int:
    """As long as the header outside of such a one can become; zstd adds less than twice of it."""
    return len(_packed_header.outer(sum(map(_most, leaves)) + 2 * len(header) + 4096, b""))


def _most(leaf: _Leaf) -> int:
    """As many bytes as a leaf can take.

    For a mask's sake it may be longer than dense: by bits, and what zstd puts around.
    """
    dense = _format.Record(leaf.dtype, leaf.shape, "dense", 0).nbytes
    return dense + (0 if leaf.mask is None else dense // 4 + 4096)


def _write(out: BinaryIO, leaf: _Leaf, *, without_zeros: bool) -> _format.Record:
    array = np.ascontiguousarray(np.asarray(leaf.value, leaf.dtype)).reshape(leaf.shape)
    packed = _packing.pack(array, _checked_mask(leaf, array), without_zeros=without_zeros)
    code: Any
    code, pieces = packed or ("dense", [array.reshape(-1).view(np.uint8).data])
    checksum = 0
    for piece in pieces:
        out.write(piece)
        checksum = zlib.crc32(piece, checksum)
    return _format.Record(leaf.dtype, leaf.shape, code, checksum)


def _checked_mask(leaf: _Leaf, array: np.ndarray) -> np.ndarray | None:
    if leaf.mask is None:
        return None
    mask = np.asarray(leaf.mask)
    lost = _packing.first_lost(array, mask)
    if lost is not None:
        raise ValueError(
            f"`params` must be zero where `masks` prune, got {array[lost]} at {leaf.path!r}, entry "
            f"{lost}, which would be lost; save apply_masks(params, masks)."
        )
    return mask
