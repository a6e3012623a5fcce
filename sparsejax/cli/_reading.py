"""Checkpoints of all kinds, read into NumPy; nothing in a file is ever executed."""

import collections
import contextlib
import io
import logging
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np

from sparsejax import storage
from sparsejax.cli import _console

Kind: TypeAlias = Literal["packed", "safetensors", "npz", "orbax"]

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_METADATA = "_METADATA"  # In every directory of arrays that orbax has finished.
_SPARSE = "process_0.safetensors"  # That of `sparsejax.storage.orbax`.
_STEP = "_CHECKPOINT_METADATA"


class Stored(NamedTuple):
    """How a leaf lies in its file: in how many bytes (None: unknown), and in which code."""

    bytes: int | None
    code: str


UNKNOWN = Stored(None, "")


class Checkpoint(NamedTuple):
    """What a file holds; `stored` is by the names of leaves, `bytes` is of the whole."""

    path: Path
    kind: Kind
    params: Any
    masks: Any
    metadata: dict[str, str]
    stored: dict[str, Stored]
    bytes: int


def kind_of(file: str) -> Kind:
    """The kind of a checkpoint, by its first bytes or its header.

    Raises:
      CommandError, ValueError: if it is none.
      OSError: if it cannot be read.
    """
    mode = os.stat(file).st_mode  # Of "", too, which is no path.
    path = Path(file)
    if stat.S_ISDIR(mode):
        return "orbax"
    if not stat.S_ISREG(mode):
        raise _console.CommandError(f"{str(path)!r} is neither a file nor a directory")
    with path.open("rb") as opened:
        start = opened.read(4)
    if start in _ZIP:
        return "npz"
    with _of_storage():
        return "packed" if storage.contents(path).packed else "safetensors"


def read(file: str, *, limit: int) -> Checkpoint:
    """Reads a checkpoint of any kind.

    Args:
      file: a file or a directory.
      limit: by how many bytes the arrays may exceed the file.

    Raises:
      CommandError, ValueError: if it is no checkpoint, damaged, or larger than allowed.
      OSError: if it cannot be read.
    """
    path = Path(file)
    kind = kind_of(file)
    if kind == "orbax":
        return _read_orbax(path, limit)
    if kind == "npz":
        return _read_npz(path, limit)
    with _of_storage():
        return _read_safetensors(path, kind, limit)


@contextlib.contextmanager
def _of_storage() -> Iterator[None]:
    """Without what the message says to callers of `storage.load`."""
    try:
        yield
    except storage.InvalidFileError as error:
        raise _console.CommandError(f"{error.path!r}: {error.reason}") from error


def _read_safetensors(path: Path, kind: Kind, limit: int) -> Checkpoint:
    contents, length = storage.contents(path), path.stat().st_size
    entries = sum(math.prod(leaf.shape) for leaf in contents.leaves if leaf.code != "dense")
    size = sum(leaf.dense_bytes for leaf in contents.leaves)
    _check_size(path, size + (entries if contents.masked else 0), length, limit)
    params, masks, metadata = storage.load(path, limit=limit, progress=_console.progress(size))
    stored = {leaf.name: Stored(leaf.bytes, leaf.code) for leaf in contents.leaves}
    return Checkpoint(path, kind, params, masks, metadata, stored, length)


def _read_npz(path: Path, limit: int) -> Checkpoint:
    arrays: dict[str, np.ndarray] = {}
    stored: dict[str, Stored] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members, limit)
            for member in members:
                name = member.filename.removesuffix(".npy")
                arrays[name] = _read_member(path, archive, member)
                code = "dense" if member.compress_type == zipfile.ZIP_STORED else "deflate"
                stored[name] = Stored(member.compress_size, code)
    except (_console.CommandError, OSError, MemoryError):
        raise
    except Exception as error:  # Of whatever kind, from zipfile and what decompresses.
        raise _console.CommandError(
            f"{str(path)!r} is a damaged npz file: {first_line(error)}"
        ) from error
    return Checkpoint(path, "npz", arrays, None, {}, stored, path.stat().st_size)


def _check_members(path: Path, members: list[zipfile.ZipInfo], limit: int) -> None:
    names = [member.filename for member in members]
    if any(name.endswith("/data.pkl") for name in names):
        raise _console.CommandError(
            f"{str(path)!r} is a pickle, as torch.save writes it, which can run code; save the "
            "state_dict by safetensors.torch.save_file"
        )
    for name, count in collections.Counter(names).items():
        if not name.endswith(".npy") or count > 1:
            raise _console.CommandError(
                f"{str(path)!r} is a zip file, but no npz: {name!r} is no array, or there twice"
            )
    _check_size(path, sum(m.file_size for m in members), path.stat().st_size, limit)


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    try:
        with archive.open(member) as opened:
            array = np.lib.format.read_array(opened, allow_pickle=False)
            if opened.read(1):  # Checks the CRC-32 at the end, too.
                raise ValueError("there are bytes behind its end")
    except OSError:
        raise
    except Exception as error:  # NumPy evaluates the header, which can be any text.
        raise _console.CommandError(
            f"{str(path)!r} has an array that cannot be read, {member.filename!r}: "
            f"{first_line(error)}"
        ) from error
    if array.dtype.kind == "V":
        raise _console.CommandError(
            f"{str(path)!r} has {member.filename!r} as raw bytes ({array.dtype.str}): npz cannot "
            "hold bfloat16 or float8; save the checkpoint as safetensors"
        )
    return array.astype(array.dtype.newbyteorder("="), order="C", copy=False)


def _check_size(path: Path, size: int, length: int, limit: int) -> None:
    if size > length + limit:
        raise _console.CommandError(
            f"{str(path)!r} holds {size:,} bytes in {length:,}, more than allowed; if you trust "
            f"it, pass --limit {size}"
        )


def _read_orbax(path: Path, limit: int) -> Checkpoint:
    folder = _find_item(path)
    length = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    with orbax() as ocp:
        try:
            if (folder / _SPARSE).is_file():
                params, masks, metadata = _restored_sparse(folder, limit)
            else:
                params, masks, metadata = _restored(ocp, folder, length, limit), None, {}
        except (_console.CommandError, storage.InvalidFileError, OSError, MemoryError):
            raise
        except Exception as error:  # Of whatever kind, from three libraries.
            raise _console.CommandError(
                f"{str(folder)!r} cannot be read by orbax: {first_line(error)}"
            ) from error
    return Checkpoint(path, "orbax", params, masks, metadata, {}, length)


def _restored(ocp: Any, folder: Path, length: int, limit: int) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        said = checkpointer.metadata(folder.absolute()).item_metadata
        if said is None:
            raise _console.CommandError(
                f"{str(folder)!r} is damaged: orbax finds no metadata in it"
            )
        tree = said.tree
        size = sum(_bytes_of(leaf) for leaf in jax.tree.leaves(tree))
        _check_size(folder, size, length, limit)
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(folder.absolute(), restore_args=arguments)
    return jax.tree.map(np.asarray, restored)


def _restored_sparse(folder: Path, limit: int) -> storage.Checkpoint:
    from sparsejax.storage.orbax import SparseHandler, SparseRestore

    return SparseHandler().restore(folder, SparseRestore(limit=limit))


def _find_item(path: Path) -> Path:
    """The directory of arrays: itself, the only one of a step, or that of the last step."""
    if _has_arrays(path):
        return path
    items = sorted(item.name for item in path.iterdir() if _has_arrays(item))
    if len(items) > 1:
        raise _console.CommandError(
            f"{str(path)!r} holds several checkpoints: {', '.join(items[:9])}; name one, such as "
            f"{str(path / items[0])!r}"
        )
    if items:
        return path / items[0]
    steps = sorted((int(step.name), step) for step in path.iterdir() if _is_step(step))
    if not steps:
        raise _console.CommandError(
            f"{str(path)!r} is a directory, but no checkpoint of orbax (it has no {_METADATA})"
        )
    step = steps[-1][1]
    _console.note(f"{_console.shown(path)}: step {step.name}, the last of {len(steps)}")
    return _find_item(step)


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.name.isascii() and is_orbax(path)


def is_orbax(path: Path) -> bool:
    """Whether a directory is of orbax's making: arrays, or a step."""
    return _has_arrays(path) or (path / _STEP).is_file()


def _has_arrays(path: Path) -> bool:
    return (path / _METADATA).is_file() or (path / _SPARSE).is_file()


@contextlib.contextmanager
def orbax() -> Iterator[Any]:
    """The package `orbax.checkpoint`; what it logs, warns of and prints is not for users."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield _import_orbax()
        finally:
            logging.disable(disabled)


def _import_orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise _console.CommandError(
            "orbax directories need the package orbax-checkpoint: pip install 'sparsejax[orbax]'"
        ) from error
    return ocp


def _bytes_of(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=object)) * np.dtype(leaf.dtype).itemsize


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
