"""What our files say in their metadata, besides being safetensors files that anyone can list.

- `checksum`: CRC-32 of the header's JSON with eight zeros in its place; it stands first.
- `format`, `version`: "sparsejax" and the number of this format.
- `leaves`: a record for each tensor, in the order of their sorted names, joined by `; `: dtype,
  shape, code and the CRC-32 of its bytes, `float32[5,5,1,32] gaps 1a2b3c4d`. Of a dense leaf the
  tensor is the leaf (bytes, if safetensors has no such dtype), of another what `_packing` made.
- `tree`: the structure, with the number of a record where a leaf is (`_structure`).
- `masks`: "yes" where masks were saved; those of dense leaves are a 0-d True.
- `metadata`: the user's, an object of JSON.
"""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from sparsejax.storage import _container, _dtypes, _structure
from sparsejax.storage._errors import BrokenError

VERSION = 1
_NAME = "sparsejax"
_BEFORE_CHECKSUM = b'{"__metadata__":{"checksum":"'
_RECORD = re.compile(r"([a-z]\w*)\[([\d,]*)\] ([a-z]+) ([0-9a-f]{8})", re.ASCII)

Code: TypeAlias = Literal["dense", "bitmask", "gaps"]


class Record(NamedTuple):
    """What is said of a leaf."""

    dtype: np.dtype
    shape: tuple[int, ...]
    code: Code
    checksum: int

    def __str__(self) -> str:
        dims = ",".join(map(str, self.shape))
        return f"{self.dtype.name}[{dims}] {self.code} {self.checksum:08x}"

    @property
    def nbytes(self) -> int:
        """The bytes of the leaf, dense."""
        return _container.size_of(self.shape, self.dtype)


class Description(NamedTuple):
    """What our metadata say: of each leaf by its name, of the tree, and the user's own."""

    records: dict[str, Record]
    tree: Any
    masked: bool
    metadata: dict[str, str]


def tensor(record: Record, start: int, size: int) -> _container.Tensor:
    """How a leaf stands in the container."""
    dtype = _dtypes.to_container(record.dtype) if record.code == "dense" else None
    shape = (size,) if dtype is None else record.shape
    return _container.Tensor(dtype or "U8", shape, start, start + size)


def header(
    description: Description, tensors: Mapping[str, _container.Tensor], length: int = 0
) -> bytes:
    """Length and JSON of a file's header, of at least `length` bytes."""
    said = {
        "version": str(VERSION),
        "leaves": "; ".join(str(record) for _, record in sorted(description.records.items())),
        "tree": _json(description.tree),
    }
    if description.masked:
        said["masks"] = "yes"
    if description.metadata:
        said["metadata"] = _json(description.metadata)
    return sealed(said, tensors, length)


def sealed(
    said: Mapping[str, str], tensors: Mapping[str, _container.Tensor], length: int = 0
) -> bytes:
    """Length and JSON of a header of ours, its checksum in it; of at least `length` bytes."""
    ours = {"checksum": f"{0:08x}", "format": _NAME, **said}
    content = _container.encode(ours, tensors, length)
    at = content.index(_BEFORE_CHECKSUM) + len(_BEFORE_CHECKSUM)
    checksum = f"{zlib.crc32(content[at - len(_BEFORE_CHECKSUM) :]):08x}".encode()
    return content[:at] + checksum + content[at + len(checksum) :]


def is_ours(header: _container.Header) -> bool:
    """Whether a header says that it is of this library."""
    return header.metadata.get("format") == _NAME


def is_sealed(header: _container.Header) -> bool:
    """Whether a header's checksum is that of its bytes."""
    said = header.metadata.get("checksum")
    return header.content.startswith(_BEFORE_CHECKSUM) and said == _checksum(header.content)


def describe(header: _container.Header) -> Description | None:
    """What a file's metadata say; None of a safetensors file that is not ours.

    Raises:
      BrokenError: if they are ours but damaged, or they do not fit the tensors.
    """
    said = header.metadata
    # Any one of them, so that damage does not turn a file into another's.
    ours = (
        is_ours(header),
        header.content.startswith(_BEFORE_CHECKSUM),
        {"version", "leaves", "tree"} <= set(said),
    )
    if not any(ours):
        return None
    if not all(ours) or not is_sealed(header):
        raise BrokenError("its header is damaged")
    if said.get("version") != str(VERSION):
        raise BrokenError(
            f"it is of format {said.get('version', '')[:20]!r}, this sparsejax reads 1 "
            "and 2: upgrade it"
        )
    lines = said["leaves"].split("; ") if said["leaves"] else []
    if len(lines) != len(header.tensors):
        raise BrokenError(f"it has {len(header.tensors)} tensors but {len(lines)} leaves")
    records = dict(zip(sorted(header.tensors), map(_record, lines), strict=True))
    for name, record in records.items():
        _check_tensor(name, record, header.tensors[name])
    metadata = _container.json_object(said.get("metadata", "{}"))
    if not all(isinstance(value, str) for value in metadata.values()):
        raise BrokenError("its metadata are not strings by name")
    tree = _container.json_object('{"tree":' + said["tree"] + "}").get("tree")
    _structure.decode(tree, list(records))
    return Description(records, tree, "masks" in said, metadata)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _checksum(content: bytes) -> str:
    at = len(_BEFORE_CHECKSUM)
    zeroed = zlib.crc32(content[at + 8 :], zlib.crc32(_BEFORE_CHECKSUM + b"0" * 8))
    return f"{zeroed:08x}"


def _record(line: str) -> Record:
    found = _RECORD.fullmatch(line)
    if found is None or found[3] not in get_args(Code):
        raise BrokenError(f"it describes a leaf as {line[:100]!r}")
    # As many digits as Python turns into numbers without a limit.
    sizes = [int(n) if n and len(n) < 20 else -1 for n in found[2].split(",")] if found[2] else []
    if not _container.is_sizes(sizes):
        raise BrokenError(f"it describes a leaf as {line[:100]!r}")
    code: Any = found[3]
    return Record(_dtypes.by_name(found[1]), tuple(sizes), code, int(found[4], 16))


def _check_tensor(name: str, record: Record, there: _container.Tensor) -> None:
    size, needed = there.stop - there.start, record.nbytes
    dense = record.code == "dense"
    if there != tensor(record, there.start, size) or (dense and size != needed):
        raise BrokenError(f"at {name[:200]!r} there is {there.dtype}{there.shape} for {record}")
