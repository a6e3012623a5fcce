"""Checkpoints that are damaged or lie, from whole ones: what `storage_worker.py fuzz` loads.

`mutant(rng, files)` makes one. Half of them have checksums that are right again, so that they reach
the decoders; the changes then go from single bits of a packed leaf, by numbers in it, to zstd
frames that hold something else.
"""

import json
import struct
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
import zstandard

from sparsejax import storage
from sparsejax.storage import _packed_header

MAGIC = b"\x28\xb5\x2f\xfd"
CHECKSUM = b'{"__metadata__":{"checksum":"'
DEEP = "@deep@"  # stands for what `json` cannot write
NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 8, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**4000),
)
VALUES = (
    *(
        1.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        None,
        True,
        False,
        "",
        "\ud800",
        "\0",
        "\x1b[2J",
    ),
    *("é" * 40, "a" * 5000, "../../x", DEEP, [], {}, [[]], [0], {"a": 0}),
)
WORDS = (
    *("F32", "F64", "F16", "BF16", "U8", "I8", "I64", "BOOL", "C64", "F4", "U16", "X"),
    *("float32", "float64", "bfloat16", "int8", "int4", "bool", "complex64", "complex128"),
    *("float8_e4m3fn", "object", "O", "gaps", "bitmask", "dense", "zip", "1", "2", "00000000"),
)


class Parts(NamedTuple):
    """A file in its parts: the header as JSON, and what follows it."""

    header: dict[str, Any]
    data: bytes

    def tensors(self):
        """The names of those whose data can be found."""
        return [name for name in self.header if self.content(name)]

    def content(self, name):
        """The bytes of a tensor; none where the header does not say where they are."""
        row = self.header[name]
        places = row.get("data_offsets") if isinstance(row, dict) else None
        if not isinstance(places, list) or [type(place) for place in places] != [int, int]:
            return b""
        return self.data[slice(*(min(max(place, 0), len(self.data)) for place in places))]

    def with_content(self, name, content):
        """The same file with another content of this tensor, of which the header tells the truth.

        Only for a header in which nothing has been changed.
        """
        start, end = self.header[name]["data_offsets"]
        longer, header = len(content) - (end - start), {}
        for other, row in self.header.items():
            if other == name:
                shape = [len(content)] if row["dtype"] == "U8" else row["shape"]
                row = row | {"data_offsets": [start, start + len(content)], "shape": shape}
            elif other != "__metadata__" and row["data_offsets"][0] >= end:
                row = row | {"data_offsets": [x + longer for x in row["data_offsets"]]}
            header[other] = row
        return Parts(header, self.data[:start] + content + self.data[end:])

    def repaired(self):
        """With the checksums of the leaves right; that of the header comes with its bytes."""
        metadata = self.header.get("__metadata__")
        if not isinstance(metadata, dict) or not isinstance(metadata.get("leaves"), str):
            return self
        lines = metadata["leaves"].split("; ")
        names = sorted(name for name in self.header if name != "__metadata__")
        for i, name in enumerate(names[: len(lines)]):
            lines[i] = f"{lines[i][:-8]}{zlib.crc32(self.content(name)):08x}"
        metadata = {"checksum": "0" * 8} | metadata | {"leaves": "; ".join(lines)}
        return Parts(
            {"__metadata__": metadata} | self.header | {"__metadata__": metadata}, self.data
        )


def read(file):
    """The parts of a whole file."""
    (length,) = struct.unpack("<Q", file[:8])
    return Parts(json.loads(file[8 : 8 + length]), file[8 + length :])


def encoded(header, plain=False):
    """The bytes of a header, in UTF-8 or in ASCII alone."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=plain)
    text = text.encode("utf-8", "surrogatepass")
    return text + b" " * (-len(text) % 8)


def file_of(parts):
    """A file of parts, with checksums that are right."""
    parts = parts.repaired()
    return written(encoded(parts.header), parts.data)


def text_of(rng, header):
    """The bytes of a header, with or without characters beyond ASCII."""
    text = deepened(rng, encoded(header, plain=rng.random() < 0.5).decode("utf-8", "surrogatepass"))
    return text.encode("utf-8", "surrogatepass")


def deepened(rng, text):
    """With lists in lists where something deep is to be."""
    depth = rng.choice((100, 900, 2000, 50_000))
    return text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)


def written(text, data, repair=True):
    """A file with this header, whose checksum is right if it is to be repaired."""
    at = len(CHECKSUM)
    if repair and text.startswith(CHECKSUM):
        zeroed = text[:at] + b"0" * 8 + text[at + 8 :]
        text = text[:at] + f"{zlib.crc32(zeroed):08x}".encode() + text[at + 8 :]
    return struct.pack("<Q", len(text)) + text + data


# Packed headers


def is_small(file):
    """Whether the header inside is packed."""
    return b'"version":"2"' in file[:120]


def read_small(file):
    """The parts of a file whose header is packed: those that it would have with an open one."""
    outer = read(file)
    start = int(outer.header["__metadata__"]["header"].split()[0])
    packed = outer.data[start:]
    frame = zstandard.ZstdDecompressor(dict_data=_packed_header.DICTIONARY)
    text = frame.decompress(packed[packed.index(MAGIC) :])
    return Parts(read(text).header, outer.data[:start])


def written_small(
    text, data, repair=True, size=None, start=None, end=b"", checksum=None, inside=None, **more
):
    """A file with this header, packed; it tells the truth but for what is given."""
    inner = written(text, b"", repair) if inside is None else inside
    size = len(inner) if size is None else size
    compressor = zstandard.ZstdCompressor(dict_data=_packed_header.DICTIONARY)
    frame = compressor.compress(inner)
    packed = leb128(size) + leb128(len(frame)) + frame + end
    checksum = zlib.crc32(packed) if checksum is None else checksum
    place = f"{len(data) if start is None else start} {checksum:08x}"
    said = {"checksum": "0" * 8, "format": "sparsejax", "version": "2", "header": place} | more
    total = len(data) + len(packed)
    row = {"dtype": "U8", "shape": [total], "data_offsets": [0, total]}
    return written(encoded({"__metadata__": said, "packed": row}), data + packed)


def lying_small(rng, file):
    """Another outside, or lies about what is inside."""
    parts, kind = read_small(file), rng.random()
    if kind < 0.4:
        outer = rng.choice((lying_header, swapped))(rng, read(file))
        return written(text_of(rng, outer.header), outer.data)
    text, number = encoded(parts.header), rng.choice(NUMBERS[:-1])
    lies = (
        {"size": max(number, 0)},
        {"start": number},
        {"end": rng.randbytes(rng.randrange(1, 20))},
        {"checksum": rng.getrandbits(32)},
        {"version": rng.choice(("1", "3", "2 "))},
        {"header": str(number)},
    )
    if kind < 0.9:
        return written_small(text, parts.data, **rng.choice(lies))
    inner = rng.choice((encoded({}), encoded({"a": 1}), written_small(text, b"")[8:], b"{" * 500))
    return written_small(inner, parts.data)


# Bytes


def flip(rng, data):
    """Some bits."""
    data = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def put(rng, data):
    """Some bytes."""
    data = bytearray(data or b"\0")
    at = rng.randrange(len(data))
    some = rng.choice((b"\0", b"\xff", b"\x80", b"\x7f", rng.randbytes(1), rng.randbytes(8)))
    data[at : at + len(some)] = some * rng.choice((1, 1, 4))
    return bytes(data)


def cut(rng, data):
    """Less at the end, or in the middle."""
    at = rng.randrange(len(data) + 1)
    return data[:at] if rng.random() < 0.6 else data[:at] + data[at + rng.randrange(1, 40) :]


def grow(rng, data):
    """More at the end, or in the middle."""
    more = rng.choice((b"\0", b"\0" * 64, b"\xff" * 9, rng.randbytes(rng.randrange(1, 64)), data))
    at = rng.choice((len(data), rng.randrange(len(data) + 1)))
    return data[:at] + more + data[at:]


BYTES = (flip, flip, put, put, cut, grow)


# JSON


def spots(tree):
    """Every (container, key) of a JSON tree."""
    rows = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(rows):
        yield tree, key
        if isinstance(value, dict | list):
            yield from spots(value)


def lie(rng, value):
    """Something else in the place of a JSON value, often of the same type."""
    kind = rng.random()
    if isinstance(value, str) and kind < 0.7:
        return lying_text(rng, value)
    if isinstance(value, int) and kind < 0.7:
        return rng.choice((value + 1, value - 1, 2 * value, rng.choice(NUMBERS)))
    if isinstance(value, list) and kind < 0.5:
        return rng.choice((value[::-1], [*value, 1], value[:-1], value * 2, value + [2**31] * 3))
    return rng.choice((*VALUES, rng.choice(NUMBERS), rng.choice(WORDS)))


def lying_text(rng, text):
    """Other JSON in it, or another number, another word, another character."""
    inner = json_of(text)
    if inner is not None and rng.random() < 0.8:
        change(rng, inner)
        return deepened(rng, json.dumps(inner, separators=(",", ":"), ensure_ascii=False))
    tokens = split(text)
    at = rng.randrange(len(tokens))
    number, word = str(rng.choice(NUMBERS)), rng.choice(WORDS)
    odd = rng.choice(("", "\0", "\ud800", "\u202e", "²", "_", "-", "+", " ", ",", "]", "[", "\n"))
    tokens[at] = rng.choice((number, word, odd, tokens[at] + odd, tokens[at] * 2, odd + number))
    return "".join(tokens)


def json_of(text):
    """The object or list that a text is, or None."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


def split(text):
    """Runs of letters and of digits, and single others."""
    tokens = [""]
    for character in text[:2000]:
        same = tokens[-1][-1:].isalpha() and character.isalpha()
        same |= tokens[-1][-1:].isdigit() and character.isdigit()
        if same:
            tokens[-1] += character
        else:
            tokens.append(character)
    return tokens


def change(rng, tree):
    """One or two lies in a JSON tree: values, keys, things left out."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        found = list(spots(tree))
        if not found:
            return
        place, key = rng.choice(found)
        kind = rng.random()
        if kind < 0.7:
            place[key] = lie(rng, place[key])
        elif kind < 0.85:
            del place[key]
        elif isinstance(place, dict):
            place[rng.choice((str(lie(rng, key)), *list(place)[:1]))] = place.pop(key)
        else:
            place.insert(key, place[key])


def lying_header(rng, parts):
    """Shapes, offsets, dtypes, records, trees that are not so."""
    header = json.loads(json.dumps(parts.header))
    change(rng, header)
    return Parts(header, parts.data)


def swapped(rng, parts):
    """Two rows of the header, or their offsets, or two values of the metadata, exchanged."""
    header = json.loads(json.dumps(parts.header))
    rows = rng.choice((header, header.get("__metadata__") or header))
    keys = [key for key in rows if key != "__metadata__"]
    if len(keys) < 2:
        return parts
    a, b = rng.sample(keys, 2)
    field = rng.choice(("data_offsets", "shape", "dtype", None))
    if rows is header and field:
        header[a][field], header[b][field] = header[b][field], header[a][field]
    else:
        rows[a], rows[b] = rows[b], rows[a]
    return Parts(header, parts.data)


# Packed leaves


def frame_at(data, start):
    """Where the zstd frame ends that begins here, or None."""
    reader = zstandard.ZstdDecompressor().decompressobj()
    try:
        reader.decompress(data[start:])
    except zstandard.ZstdError:
        return None
    return len(data) - len(reader.unused_data) if reader.eof else None


def pieces(content):
    """A packed leaf as numbers and frames: bytes between frames, and what frames hold."""
    found, at = [], 0
    while (start := content.find(MAGIC, at)) >= 0:
        end = frame_at(content, start)
        if end is None:
            break
        frame = content[start:end]
        found.append((numbers(content[at:start]), zstandard.decompress(frame)))
        at = end
    return found, content[at:]


def numbers(data):
    """The LEB128 numbers of some bytes; the last is the length of the frame behind them."""
    found, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
    return found


def leb128(value):
    """As `storage` writes numbers."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def frame(rng, payload):
    """A zstd frame of this: mostly as it should be, with a length that may lie or be missing."""
    kind = rng.random()
    if kind < 0.75:
        return zstandard.compress(payload, rng.choice((1, 3)))
    if kind < 0.8:
        return zstandard.ZstdCompressor(write_content_size=False).compress(payload)
    if kind < 0.85:
        return zstandard.compress(payload) + zstandard.compress(payload)
    if kind < 0.9:  # a skippable frame
        return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(payload)) + payload
    if kind < 0.95:  # much more than it says: the content size is in the bytes behind the magic
        bomb = bytearray(zstandard.compress(bytes(1 << 22)))
        honest = zstandard.compress(payload)
        return bytes(honest[:6]) + bytes(bomb[6:])
    return flip(rng, zstandard.compress(payload, 1))


def repacked(rng, content):
    """Other numbers between the frames, or frames of something else, their lengths as they are."""
    found, rest = pieces(content)
    if not found:
        return rng.choice(BYTES)(rng, content)
    target, what = rng.randrange(len(found)), rng.random()
    out = bytearray()
    for i, (between, payload) in enumerate(found):
        *between, _ = between
        lying_length = 0
        if i == target and what < 0.5 and between:
            at = rng.randrange(len(between))
            other = (between[at] + 1, max(between[at] - 1, 0), max(rng.choice(NUMBERS[:-2]), 0))
            between[at] = rng.choice(other)
        elif i == target and what < 0.9:
            payload = rng.choice(PAYLOADS)(rng, payload)
        elif i == target:
            lying_length = rng.choice((1, 2**20, 2**31, 2**62))
        packed = frame(rng, payload) if i == target else zstandard.compress(payload, 1)
        out += b"".join(map(leb128, between)) + leb128(len(packed) + lying_length) + packed
    return bytes(out) + rest


def same_length(change):
    """A change that leaves the length."""

    def changed(rng, payload):
        return (change(rng, payload) + bytes(len(payload)))[: len(payload)]

    return changed


def escapes(rng, payload):
    """Long runs of 255, which stand for gaps that go on."""
    at = rng.randrange(len(payload) + 1)
    return (payload[:at] + b"\xff" * rng.randrange(1, 300) + payload[at:])[: len(payload)]


def bomb(rng, payload):
    """Megabytes of zeros."""
    return bytes(1 << rng.choice((16, 20, 22)))


PAYLOADS = (*map(same_length, BYTES), flip, put, cut, grow, escapes, escapes, bomb)


def inside(rng, parts):
    """Another content of one tensor, mostly of a packed one."""
    names = parts.tensors()
    packed = [name for name in names if parts.header[name]["dtype"] == "U8"]
    name = rng.choice(packed if packed and rng.random() < 0.9 else names)
    content, kind = parts.content(name), rng.random()
    if name not in packed:
        changed = same_length(rng.choice(BYTES))(rng, content)
    elif kind < 0.25:
        changed = rng.choice(BYTES)(rng, content)
    elif kind < 0.3:
        changed = parts.content(rng.choice(names))
    else:
        changed = repacked(rng, content)
    return parts.with_content(name, changed)


# The whole


def pruned(shape, dtype, density, seed):
    """Random bits, this fraction of which is kept, and the mask."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    bits = rng.integers(256, size=size, dtype=np.uint8).view(dtype).reshape(shape)
    mask = rng.random(shape) < density
    return np.where(mask, bits, np.zeros((), dtype)), mask


def corpus(folder):
    """Small files with every code, many dtypes and all kinds of nodes, as bytes."""
    rng = np.random.default_rng(0)
    leaves = {
        "gaps": pruned((40, 50), np.float32, 0.05, 0),
        "bits": pruned((24, 24), ml_dtypes.bfloat16, 0.5, 1),
        "complex": pruned((9, 30), np.complex64, 0.1, 2),
        "small": pruned((30, 40), ml_dtypes.float8_e4m3fn, 0.08, 3),
    }
    blocks = np.kron(rng.random((6, 4)) < 0.3, np.ones((4, 8), bool))
    groups = np.tile([True, False, False, True], (16, 8))
    channels = rng.random((1, 16)) < 0.4
    params = {name: w for name, (w, _) in leaves.items()} | {
        "blocks": blocks * rng.standard_normal(blocks.shape),
        "groups": groups * rng.integers(1, 99, groups.shape),
        "node": [
            (np.float16(channels * np.ones((8, 16))), np.ones(3)),
            {},
            None,
            [np.zeros((0, 4))],
        ],
        "off": np.zeros((3, 4), np.int16),
        "one": np.float64(np.nan),
    }
    masks = {name: mask for name, (_, mask) in leaves.items()} | {
        "blocks": blocks,
        "groups": groups,
        "node": [(channels, np.array(True)), {}, None, [np.array(True)]],
        "off": np.array(False),
        "one": np.array(True),
    }
    plain = {
        2: pruned((300,), np.uint64, 0.02, 4)[0],
        7: (np.arange(12).reshape(3, 4) % 2 > 0, pruned((50, 9), ml_dtypes.int4, 1.0, 5)[0]),
    }
    long = {"w": pruned((20_000,), np.int8, 0.002, 6)[0]}
    path = folder / "whole"
    files = []
    trees = ((params, masks, "open"), (plain, None, "open"), (params, masks, "packed"))
    for *tree, header in (*trees, (long, None, "open")):
        storage.save(path, *tree, metadata={"step": "12", "é": "\n"}, header=header)
        files.append(path.read_bytes())
    arrays = {"a": np.ones((3, 4), np.float32), "b": np.arange(5), "c": np.zeros((2, 0))}
    return [*files, safetensors.numpy.save(arrays, {"format": "pt"})]


def mutant(rng, files):
    """A damaged or lying file, and whether checksums guard it: nothing in it has been repaired."""
    file = rng.choice((*files[:-1], *files))
    ours, repair, kind = CHECKSUM in file[:60], rng.random() < 0.9, rng.random()
    small = is_small(file)
    parts, together = (read_small(file), written_small) if small else (read(file), written)
    if kind < 0.12:
        return rng.choice(BYTES)(rng, file), ours
    if small and kind > 0.85:
        return lying_small(rng, file), False
    if kind < 0.16:
        other, at = rng.choice(files), rng.randrange(len(file))
        return file[:at] + other[rng.randrange(len(other)) :], ours
    if kind < 0.18:
        length = rng.choice((*NUMBERS, len(file), len(file) - 8, rng.randrange(200))) % 2**64
        return struct.pack("<Q", length) + file[8:], ours
    if kind < 0.22:
        text = rng.choice(BYTES)(rng, text_of(rng, parts.header))
        return together(text, parts.data, repair), False
    if kind < 0.24:
        text = text_of(rng, parts.header).rstrip()
        row = json.dumps(rng.choice(list(parts.header)))
        return together(text[:-1] + f",{row}:0}}".encode(), parts.data, repair), False
    if kind < 0.45:
        parts = rng.choice((lying_header, lying_header, swapped))(rng, parts)
    elif kind < 0.95:
        parts = inside(rng, parts)
    else:
        parts = lying_header(rng, inside(rng, parts))
    parts = parts.repaired() if repair else parts
    return together(text_of(rng, parts.header), parts.data, repair), False
