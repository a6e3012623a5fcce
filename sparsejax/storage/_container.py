"""The container: safetensors, which is 8 bytes of length, a header of JSON, and the tensors' bytes.

Nothing in a header is believed: a tensor must lie in the file, have the bytes that its shape and
dtype need, and touch its neighbours. (The `safetensors` package writes from tensors that are all in
memory at once and over the old file, hence our own few lines; the tests hold the two together.)
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sparsejax import _leaves
from sparsejax.storage import _dtypes
from sparsejax.storage._errors import BrokenError

METADATA = "__metadata__"
MOST_HEADER = 100_000_000  # As the safetensors package has it.
_LENGTH = 8
_MOST_AXES = 64  # As NumPy has it.
_START = 8  # Where the tensors begin is a multiple of it, for whoever maps the file.


class Tensor(NamedTuple):
    """What a header says of a tensor: its bytes are `start` to `stop`, counted from the first's."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a file's header says; `content` is its JSON, `start` where the tensors' bytes begin."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    content: bytes
    start: int


def encode(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], length: int = 0) -> bytes:
    """Length and JSON of a header, of at least `length` bytes together by spaces at its end."""
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (tensor.start, tensor.stop),
        }
    content = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    size = max(length, _LENGTH + len(content))
    size += -size % _START
    if size > MOST_HEADER:
        raise ValueError(
            f"`params` must have fewer leaves, or shorter `metadata`: of {len(tensors)} leaves the "
            f"header takes {size} bytes, a safetensors file has at most {MOST_HEADER}."
        )
    return (size - _LENGTH).to_bytes(_LENGTH, "little") + content.ljust(size - _LENGTH)


def decode(file: BinaryIO | io.BytesIO, size: int) -> Header:
    """The header of a file of this size.

    Raises:
      BrokenError: if it is none of a safetensors file.
    """
    first = file.read(_LENGTH)
    length = int.from_bytes(first, "little")
    if len(first) < _LENGTH or not 2 <= length <= min(size - _LENGTH, MOST_HEADER):
        raise BrokenError(_not_safetensors(first, size))
    content = file.read(length)
    if content[:1] != b"{":
        raise BrokenError(_not_safetensors(first, size))
    entries = json_object(content)
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BrokenError("its metadata are not strings by name")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_places(tensors, size - _LENGTH - length)
    return Header(tensors, metadata, content, _LENGTH + length)


def json_object(content: bytes | str) -> dict[str, Any]:
    """An object of JSON, strictly: no name twice, no NaN, nothing that is no Unicode."""
    try:
        text = content.decode() if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        json.dumps(found, ensure_ascii=False).encode()  # A lone surrogate raises.
    except (ValueError, RecursionError) as error:
        raise BrokenError(f"its header cannot be read ({str(error)[:100]})") from None
    if not isinstance(found, dict):
        raise BrokenError("its header is no object of JSON")
    return found


def is_sizes(value: Any) -> bool:
    """Whether a value is a list of integers from 0 to 2⁶³ - 1, not more than an array has axes."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) <= _MOST_AXES
        and all(_leaves.is_int(n) and 0 <= n < 2**63 for n in value)
    )


def size_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The bytes of an array; refuses what NumPy cannot have, also if an axis of it is 0."""
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
        raise BrokenError(f"its shape {shape} is too large")
    return math.prod(shape) * dtype.itemsize


def _tensor(name: str, entry: Any) -> Tensor:
    where = f"at {name[:200]!r} "
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BrokenError(where + "there is no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not is_sizes(shape) or not is_sizes(offsets):
        raise BrokenError(where + "dtype, shape or data_offsets are not what they should be")
    if len(offsets) != 2:
        raise BrokenError(where + "there are not two data_offsets")
    tensor = Tensor(dtype, tuple(shape), *offsets)
    try:
        needed = size_of(tensor.shape, _dtypes.from_container(dtype))
    except BrokenError as error:
        raise BrokenError(where + str(error)) from None
    if tensor.stop - tensor.start != needed:
        raise BrokenError(f"{where}there are {tensor.stop - tensor.start} bytes, not {needed}")
    return tensor


def _check_places(tensors: dict[str, Tensor], size: int) -> None:
    """Every byte behind the header belongs to one tensor."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.start != end:
            raise BrokenError(f"at {name[:200]!r} the bytes begin at {tensor.start}, not at {end}")
        end = tensor.stop
    if end != size:
        what = "shorter" if end > size else "longer"
        raise BrokenError(f"it is {what} than its header says: {size} bytes of tensors, not {end}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _not_safetensors(first: bytes, size: int) -> str:
    kinds = {
        b"PK\x03\x04": "a zip archive (an .npz, or a .pt of torch.save?)",
        b"\x93NUM": "an array of numpy.save",
        b"\x89HDF": "an HDF5 file",
        b"\x80\x02": "a pickle, which can run code",
        b"\x80\x03": "a pickle, which can run code",
        b"\x80\x04": "a pickle, which can run code",
        b"\x80\x05": "a pickle, which can run code",
        b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it first",
        b"\x1f\x8b": "compressed by gzip: decompress it first",
    }
    for magic, kind in kinds.items():
        if first.startswith(magic):
            return f"it is no safetensors file but {kind}"
    return f"it is no safetensors file, or a truncated one ({size} bytes)"
