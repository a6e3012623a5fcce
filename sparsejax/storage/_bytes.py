"""Numbers and compressed parts one after the other, and the cursor that reads them back."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import zstandard

from sparsejax.storage._errors import BrokenError

Buffer: TypeAlias = bytes | bytearray | memoryview

# Level 1 codes symbols by Huffman's method and finds repetitions; higher levels find short ones by
# chance, too, and write them out at greater length than the symbols (gaps at 80 % zeros: 1.014 of
# the entropy, 1.15 at level 3). The other setting hardly finds any, which is better where symbols
# are few and their order is random.
_LEVEL = 1
_LEVEL_OF_TEXT = 12
_MOST_WINDOW = 1 << 23
_SMALL = 1 << 18  # Bytes that are compressed in both ways.
_REPETITIONS: dict[str, int] = {}
_SYMBOLS = {"min_match": 7, "hash_log": 6}


def number(value: int) -> bytes:
    """A number >= 0 as LEB128: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def compressed(parts: Iterable[Buffer], size: int) -> list[Buffer]:
    """The length of a zstd frame and the frame; each of its parts has blocks of its own in it."""
    if size > _SMALL:
        return _compressed(parts, size, _REPETITIONS)
    return _shortest(list(parts), size)


def shortest(part: Buffer) -> list[Buffer]:
    """`compressed` in the better of two ways, whatever the size."""
    return _shortest([part], memoryview(part).nbytes)


def framed(
    content: bytes, dictionary: zstandard.ZstdCompressionDict, block: int | None = None
) -> list[Buffer]:
    """The length of a zstd frame and the frame, for what is much like the dictionary.

    With `block`, that many bytes at most are in each of its blocks, which takes 4 bytes or more.
    """
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL_OF_TEXT, source_size=len(content), write_checksum=False, write_dict_id=False
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters, dict_data=dictionary)
    if block is None:
        frame = compressor.compress(content)
    else:
        frame = _in_blocks(compressor.compressobj(size=len(content)), content, block)
    return [number(len(frame)), frame]


def length(pieces: Iterable[Buffer]) -> int:
    """The bytes of all pieces."""
    return sum(memoryview(piece).nbytes for piece in pieces)


class Cursor:
    """Reads what `number` and `compressed` wrote; whatever is not so raises `BrokenError`."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        """The next number, below 2⁶³."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise BrokenError("it has a number of more than 63 bits")

    def decompressed(
        self, size: int, dictionary: zstandard.ZstdCompressionDict | None = None
    ) -> bytes:
        """The content of the next frame, which must have this size; no more is ever allocated."""
        return self.stream(size, dictionary)(size)

    def stream(
        self, size: int, dictionary: zstandard.ZstdCompressionDict | None = None
    ) -> Callable[[int], bytes]:
        """What reads the content of the next frame, which must have this size, piece by piece."""
        frame = self._take(self.number())
        with _as_broken():
            parameters = zstandard.get_frame_parameters(frame)
            if parameters.content_size != size or parameters.dict_id:
                raise BrokenError(f"a part has {parameters.content_size} bytes, not {size}")
            decompressor = zstandard.ZstdDecompressor(
                dict_data=dictionary, max_window_size=_MOST_WINDOW
            )
            reader = decompressor.stream_reader(frame, read_across_frames=False)

        def read(count: int) -> bytes:
            with _as_broken():
                content = reader.read(count)
            if len(content) < count:
                raise BrokenError("a compressed part ends too early")
            return content

        return read

    def end(self, alignment: int) -> None:
        """Refuses anything but zeros, fewer than `alignment`, after what was read."""
        rest = bytes(self._data[self._at :])
        if len(rest) >= alignment or any(rest):
            raise BrokenError(f"there are {len(rest)} bytes behind its end")

    def _take(self, count: int) -> memoryview:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise BrokenError("it ends too early")
        self._at += count
        return taken


@contextlib.contextmanager
def _as_broken() -> Iterator[None]:
    try:
        yield
    except zstandard.ZstdError as error:
        raise BrokenError(f"a compressed part cannot be read ({error})") from error


def _in_blocks(compressor: Any, content: bytes, block: int) -> bytes:
    frame = bytearray()
    for start in range(0, len(content), block):
        frame += compressor.compress(content[start : start + block])
        frame += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return bytes(frame + compressor.flush())


def _shortest(parts: list[Buffer], size: int) -> list[Buffer]:
    frames = [_compressed(parts, size, setting) for setting in (_REPETITIONS, _SYMBOLS)]
    return min(frames, key=length)


def _compressed(parts: Iterable[Buffer], size: int, setting: dict[str, int]) -> list[Buffer]:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=size, write_checksum=False, **setting
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=size)
    frame, left = bytearray(), size
    for part in parts:
        frame += compressor.compress(part)
        left -= memoryview(part).nbytes
        if left:
            frame += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    frame += compressor.flush()
    return [number(len(frame)), frame]
