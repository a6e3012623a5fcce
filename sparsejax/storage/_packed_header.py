"""The header of a small file, packed: where leaves are small, names and places are much of a file.

A file of version 2 is a safetensors file with one tensor, `packed`, whose bytes are those of the
leaves, as in version 1, and then the header that a file of version 1 has: its size as a number, and
a zstd frame made with the dictionary below. In the metadata stand `checksum`, `format` and
`version` as in version 1, and `header`: where in the tensor it begins, and the CRC-32 of what is
there.
"""

import io
import re
import zlib
from typing import BinaryIO

import zstandard

from sparsejax.storage import _bytes, _container, _format
from sparsejax.storage._container import Header, Tensor
from sparsejax.storage._errors import BrokenError

VERSION = 2
_TENSOR = "packed"
_PLACE = re.compile(r"(\d{1,18}) ([0-9a-f]{8})", re.ASCII)
# A leaf's CRC-32 alone is 4 bytes of some 100; only what users say repeats itself more often.
_MOST_RATIO, _MOST_SMALL = 64, 1 << 16

# What headers mostly say, the likeliest last. A change needs a new version.
DICTIONARY = zstandard.ZstdCompressionDict(
    b'":{"dtype":"BF16","shape":[],"data_offsets":[,","metadata":"{\\"step\\":\\""},'
    b'"opt_state.scale.weight.bias.kernel.qvalue.indices.codebook":{"dtype":"F32","shape":[1,1,'
    b'[\\"list\\",[\\"tuple\\",[\\"dict\\",{\\"params\\":[\\"node\\",[\\"layers\\",{\\"bias\\":0,'
    b'\\"kernel\\":[\\"node\\",[\\"qvalue\\",2],[\\"scale\\",1]]}],[\\"dense2\\",{\\"bias\\":3,'
    b'\\"kernel\\":[\\"node\\",[\\"indices\\",5],[\\"codebook\\",4]]}]]"},"layers.0.bias":{"dtype":'
    b'"U8","shape":[100],"data_offsets":[0,1024]},"conv1.kernel":{"dtype":"F32","shape":[3,3,","'
    b'masks":"yes","tree":"{\\"bias\\":0,\\"weight\\":1}","int8[1,int4[] float32[16] dense uint8[ '
    b"bfloat16[300] dense ; uint8[784,300] gaps ; float32[64] bitmask "
    b'{"__metadata__":{"checksum":"00000000","format":"sparsejax","version":"1","leaves":"',
    dict_type=zstandard.DICT_TYPE_RAWCONTENT,
)


def pack(header: bytes) -> bytes:
    """What follows the leaves of a small file, of the header of version 1."""
    size = _bytes.number(len(header))
    packed = b"".join([size, *_bytes.framed(header, DICTIONARY)])
    if len(header) > _most(len(packed)):  # Half as much as may be, as a block takes 4 bytes.
        packed = b"".join([size, *_bytes.framed(header, DICTIONARY, block=2 * _MOST_RATIO)])
    return packed


def outer(start: int, packed: bytes, length: int = 0) -> bytes:
    """The header of the file itself, whose leaves take `start` bytes; at least `length` bytes."""
    size = start + len(packed)
    said = {"version": str(VERSION), "header": f"{start} {zlib.crc32(packed):08x}"}
    return _format.sealed(said, {_TENSOR: Tensor("U8", (size,), 0, size)}, length)


def unpack(file: BinaryIO, header: Header) -> Header:
    """The header inside of that of a small file; any other as it is.

    Raises:
      BrokenError: if it is that of a small file, and damaged.
    """
    if header.metadata.get("version") != str(VERSION) or not _format.is_ours(header):
        return header
    if not _format.is_sealed(header):
        raise BrokenError("its header is damaged")
    place = _PLACE.fullmatch(header.metadata.get("header", ""))
    tensor = header.tensors.get(_TENSOR)
    if place is None or tensor is None or len(header.tensors) > 1 or tensor.dtype != "U8":
        raise BrokenError("its header is damaged")
    start = int(place[1])
    if start > tensor.stop:
        raise BrokenError(f"its packed header begins at {start} of {tensor.stop} bytes")
    if tensor.stop - start > _container.MOST_HEADER:
        raise BrokenError(f"its packed header has {tensor.stop - start} bytes, which is too many")
    file.seek(header.start + start)
    packed = file.read(tensor.stop - start)
    if zlib.crc32(packed) != int(place[2], 16):
        raise BrokenError("the bytes of its packed header are not those that were saved (CRC-32)")
    return _inner(packed, start)._replace(start=header.start)


def _most(packed: int) -> int:
    """The most bytes of a header that takes so many packed: a small file cannot ask for much."""
    return min(max(_MOST_SMALL, _MOST_RATIO * packed), _container.MOST_HEADER)


def _inner(packed: bytes, start: int) -> Header:
    cursor = _bytes.Cursor(memoryview(packed))
    size = cursor.number()
    if size > _most(len(packed)):
        raise BrokenError(f"its packed header of {len(packed)} bytes says that it has {size}")
    content = cursor.decompressed(size, DICTIONARY)
    cursor.end(1)
    found = _container.decode(io.BytesIO(content), size + start)
    if found.start != size:
        raise BrokenError(f"its packed header ends at {found.start} of its {size} bytes")
    if found.metadata.get("version") != str(_format.VERSION) or not _format.is_ours(found):
        raise BrokenError("its packed header is none of version 1")
    return found
