"""An open file, of which nothing is believed that has not been checked."""

import contextlib
import errno
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sparsejax import _files
from sparsejax.storage import _container, _dtypes, _format, _packed_header, _packing
from sparsejax.storage._errors import BrokenError, InvalidFileError

LIMIT = 2**32
"""By how many bytes arrays may exceed their file, unless more is allowed."""


class Source(NamedTuple):
    """An open file and what its header says; `said` is None of a file that is not ours."""

    file: BinaryIO
    size: int
    header: _container.Header
    said: _format.Description | None
    records: dict[str, _format.Record]


@contextlib.contextmanager
def opened(path: Any) -> Iterator[Source]:
    """The file, whose header has been read; what is wrong inside of it is said with its name.

    Raises:
      InvalidFileError: if it is no checkpoint, also while it is read.
      OSError: if it cannot be read.
    """
    known = _files.known_path("path", path)
    if not stat.S_ISREG(os.stat(known).st_mode) and not known.is_dir():
        raise OSError(errno.EINVAL, "Not a regular file", str(known))
    with open(known, "rb") as file, named(known):
        size = os.fstat(file.fileno()).st_size
        header = _container.decode(file, size)
        header = _packed_header.unpack(file, header)
        said = _format.describe(header)
        records = _others(header) if said is None else said.records
        yield Source(file, size, header, said, records)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Says of which file it is what is wrong."""
    try:
        yield
    except BrokenError as error:
        raise InvalidFileError(str(path), str(error)) from error


def _others(header: _container.Header) -> dict[str, _format.Record]:
    return {
        name: _format.Record(_dtypes.from_container(tensor.dtype), tensor.shape, "dense", 0)
        for name, tensor in header.tensors.items()
    }


def check_size(source: Source, limit: int) -> None:
    """Refuses a file whose arrays have more than so many bytes more than it has itself."""
    masked = source.said is not None and source.said.masked
    total = 0
    for record in source.records.values():
        entries = record.nbytes // record.dtype.itemsize
        total += record.nbytes + (entries if masked and record.code != "dense" else 0)
    if total - source.size > limit:
        raise BrokenError(
            f"its {source.size} bytes say that they hold {total}, more than `limit` = {limit} "
            f"allows; if you trust it, load(path, limit={total})"
        )


def read(source: Source, name: str) -> _packing.Unpacked:
    """A leaf by its tensor's name."""
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
            raise BrokenError(f"it is coded as {found.code}, not as {record.code}")
        if found.mask is not None and not (source.said and source.said.masked):
            raise BrokenError("it has a mask in a file without masks")
        return found
    except BrokenError as error:
        raise BrokenError(f"at {name[:200]!r} {error}") from error


def _fill(source: Source, buffer: memoryview, record: _format.Record) -> None:
    if source.file.readinto(buffer) != buffer.nbytes:  # type: ignore[attr-defined]
        raise BrokenError("the file ends, though it was longer before")
    if source.said is not None and zlib.crc32(buffer) != record.checksum:
        raise BrokenError("the bytes are not those that were saved (CRC-32)")


def _check_booleans(array: np.ndarray) -> None:
    if array.dtype == bool and array.size and array.view(np.uint8).max() > 1:
        raise BrokenError("there are booleans that are neither 0 nor 1")


def mask_of(leaf: _packing.Unpacked) -> np.ndarray:
    """The mask of a leaf in a file that has masks."""
    return np.array(True) if leaf.mask is None else leaf.mask
