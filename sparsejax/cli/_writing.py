"""Checkpoints of all kinds, written whole or not at all."""

import contextlib
import errno
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax import _files, storage
from sparsejax.cli import _console, _names, _reading
from sparsejax.cli._reading import Kind
from sparsejax.storage import _container, _dtypes

_SUFFIXES: dict[str, Kind] = {".npz": "npz", ".safetensors": "safetensors"}


class Target(NamedTuple):
    """Where to write, and which kind of file."""

    path: Path
    kind: Kind


def kind_by_suffix(out: str) -> Kind | None:
    """What the suffix of a path says; None where it says nothing."""
    return _SUFFIXES.get(Path(out).suffix.lower())


def check(target: Target, source: str, *, force: bool) -> None:
    """Refuses, before any work, what should not or cannot be written.

    Raises:
      CommandError: if it exists (without `force`), or is a directory that orbax did not make.
      OSError: if its parent is no directory, or may not be written to.
    """
    path = target.path
    with contextlib.suppress(OSError):
        if not force and path.samefile(source):
            raise _console.CommandError(f"{str(path)!r} is FILE itself; --force replaces it")
    if os.path.lexists(path) and not force:
        raise _console.CommandError(f"{str(path)!r} exists; --force replaces it")
    if target.kind != "orbax" and path.is_dir():
        raise _console.CommandError(f"{str(path)!r} is a directory; {target.kind} is a file")
    if target.kind == "orbax" and os.path.lexists(path) and not _reading.is_orbax(path):
        raise _console.CommandError(
            f"{str(path)!r} is no checkpoint of orbax, and is not replaced by one"
        )
    parent = Path(os.path.realpath(path)).parent
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "No such directory", str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))


def write(
    target: Target, params: Any, masks: Any, metadata: Mapping[str, str], *, deflate: bool = False
) -> None:
    """Writes a checkpoint; `masks` are kept by packed files only, `metadata` by safetensors.

    Args:
      target: where, and which kind.
      params: a tree of arrays.
      masks: masks for it, or None.
      metadata: the user's.
      deflate: whether to compress, where it is npz.
    """
    with _told(target.path):
        if target.kind == "packed":
            show = _console.progress(_size(params))
            storage.save(target.path, params, masks, metadata=metadata, progress=show)
        elif target.kind == "safetensors":
            _write_safetensors(target.path, _names.named(params).arrays, metadata)
        elif target.kind == "npz":
            _write_npz(target.path, _names.named(params).arrays, deflate)
        else:
            _write_orbax(target.path, params)


def tell_lost(target: Target, source: _reading.Checkpoint) -> None:
    """Says what a checkpoint has that the target's kind of file cannot hold."""
    masks = ["the masks"] if source.masks is not None and target.kind != "packed" else []
    no_metadata = source.metadata and target.kind in ("npz", "orbax")
    lost = " and ".join(masks + (["the metadata"] if no_metadata else []))
    if lost:
        _console.note(
            f"{_console.shown(target.path)}: without {lost}, which {target.kind} cannot hold"
        )


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Says of an error of the operating system what could not be written."""
    try:
        yield
    except OSError as error:
        state = "is as it was" if os.path.lexists(path) else "was not written"
        raise _console.CommandError(
            f"{str(path)!r} cannot be written: {error.strerror or error}; it {state}"
        ) from error


def _size(params: Any) -> int:
    return sum(array.nbytes for array in _names.named(params).arrays.values())


def _write_safetensors(
    path: Path, arrays: dict[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    # Wide entries first, as the safetensors package has them: each is aligned to its size.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    tensors: dict[str, _container.Tensor] = {}
    end = 0
    for name in names:
        array, start = arrays[name], end
        dtype = _dtypes.to_container(array.dtype)
        if dtype is None:
            raise _console.CommandError(
                f"safetensors has no {array.dtype}, the dtype of {name!r}; pack the checkpoint, or "
                "write another --format"
            )
        end += array.nbytes
        tensors[name] = _container.Tensor(dtype, array.shape, start, end)
    with _files.replacing(path) as file:
        file.write(_container.encode(metadata, tensors))
        for name in names:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)


def _write_npz(path: Path, arrays: dict[str, np.ndarray], deflate: bool) -> None:
    for name, array in arrays.items():
        if np.dtype(array.dtype.str) != array.dtype:
            raise _console.CommandError(
                f"npz cannot hold {array.dtype}, the dtype of {name!r}; write safetensors, or cast "
                "it before"
            )
        if "\0" in name:
            raise _console.CommandError(f"npz cannot hold {name!r}: its name has a zero in it")
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with _files.replacing(path) as file, zipfile.ZipFile(file, "w", method) as archive:
        for name, array in arrays.items():
            # One fixed date, so that equal arrays are equal files.
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = method
            with archive.open(member, "w", force_zip64=True) as opened:
                np.lib.format.write_array(opened, array, allow_pickle=False)


def _write_orbax(path: Path, params: Any) -> None:
    tree = _names.named(params)
    for name, array in tree.arrays.items():
        if array.size == 0:
            raise _console.CommandError(f"orbax cannot hold arrays without entries, as {name!r} is")
    with _reading.orbax() as ocp, _files.replacing_folder(path) as folder:
        _save_orbax(ocp, folder, tree.rebuild(tree.arrays))


def _save_orbax(ocp: Any, folder: Path, params: Any) -> None:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, params)
    except Exception as error:  # Of whatever kind, from three libraries.
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise OSError(errno.EIO, f"orbax: {_reading.first_line(error)}") from error
