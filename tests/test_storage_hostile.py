"""Files that are damaged or lie, and processes that die while they save."""

import concurrent.futures
import functools
import gzip
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import storage_mutants
import zstandard

from sparsejax import storage

WORKER = Path(__file__).with_name("storage_worker.py")
DECODERS = ("_bytes.", "_packed_header.", "_packing.", "_positions.", "_values.")
MASK = np.arange(1200).reshape(30, 40) % 11 == 0
PARAMS = {"b": np.ones(3), "w": np.where(MASK, np.float32(0.5), np.float32(0))}
MASKS = {"b": np.array(True), "w": MASK}


def work(*arguments, timeout=300):
    """What a worker finds."""
    flags = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]  # forks, with threads
    command = [sys.executable, *flags, str(WORKER), *map(str, arguments)]
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=timeout
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return json.loads(run.stdout)


# Mutated files


def check_fuzz(found, count):
    assert not found["failures"], f"{len(found['failures'])}, first {found['failures'][0]}"
    assert found["slowest"] < 5
    assert found["grown"] < 64 << 20
    # So that it says something: many get as far as the decoders, who refuse for many reasons.
    places = found["places"]
    inside = {place: n for place, n in places.items() if place.startswith(DECODERS)}
    print(f"{sum(inside.values())} of {count} refused by {len(inside)} lines of the decoders")
    assert sum(places.values()) == count
    assert sum(inside.values()) > 0.15 * count and len(inside) >= 15
    assert places["loaded"] > 0.1 * count


def test_2000_mutated_files_load_or_are_refused_by_name(tmp_path):
    check_fuzz(work("fuzz", tmp_path, 0, 2000, 64), 2000)


@pytest.mark.long
def test_100_000_mutated_files_load_or_are_refused_by_name(tmp_path):
    halves = [(0, 50_000, 1 << 20), (50_000, 100_000, 64)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda half: work("fuzz", tmp_path, *half, timeout=900), halves))
    for found in both:
        check_fuzz(found, 50_000)


# Files made by hand


@functools.cache
def whole():
    """The bytes of a small checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole"
        storage.save(path, PARAMS, MASKS, metadata={"step": "7"})
        return path.read_bytes()


@functools.cache
def small():
    """The same with its header packed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small"
        storage.save(path, PARAMS, MASKS, metadata={"step": "7"}, header="packed")
        return path.read_bytes()


def unlike(**lies):
    """The small checkpoint with a header that says these of itself."""
    parts = storage_mutants.read_small(small())
    return storage_mutants.written_small(storage_mutants.encoded(parts.header), parts.data, **lies)


def with_junk(junk):
    """The small checkpoint with this behind the header inside, as bytes of one more leaf."""
    parts = storage_mutants.read_small(small())
    end = len(parts.data) + len(junk)
    parts.header["x"] = tensor([len(junk)], len(parts.data), end, "U8")
    metadata = parts.header["__metadata__"]
    metadata["leaves"] += f"; uint8[{len(junk)}] dense {zlib.crc32(junk):08x}"
    metadata["tree"] = '{"b":0,"w":1,"x":2}'
    inside = storage_mutants.written(storage_mutants.encoded(parts.header), junk)
    return storage_mutants.written_small(b"", parts.data, inside=inside)


def longer_inside():
    """The small checkpoint whose header inside says that it is 8 bytes longer than it is."""
    parts = storage_mutants.read_small(small())
    text = storage_mutants.encoded(parts.header)
    inside = (len(text) + 8).to_bytes(8, "little") + storage_mutants.written(text, b"")[8:]
    return storage_mutants.written_small(b"", parts.data, inside=inside)


def ordinary(header, data=b""):
    """A safetensors file with this header."""
    return storage_mutants.written(storage_mutants.encoded(header), data)


def tensor(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def said(**changes):
    """The small checkpoint with other metadata, its checksums right."""
    parts = storage_mutants.read(whole())
    parts.header["__metadata__"].update(changes)
    return storage_mutants.file_of(parts)


def recorded(old, new):
    """The same with something else said of the leaves."""
    leaves = storage_mutants.read(whole()).header["__metadata__"]["leaves"]
    assert old in leaves
    return said(leaves=leaves.replace(old, new))


def numpy_file(write, *arrays):
    file = io.BytesIO()
    write(file, *arrays)
    return file.getvalue()


def text(content):
    """A file whose header is this text."""
    return storage_mutants.written(content.ljust(64).encode(), b"")


def packed(content):
    """The small checkpoint with another content of its packed leaf."""
    return storage_mutants.file_of(storage_mutants.read(whole()).with_content("w", content))


def frame(payload):
    return storage_mutants.leb128(len(payload)) + payload


def repacked(change):
    """The same, its zstd frames changed by a function."""
    content = storage_mutants.read(whole()).content("w")
    found, rest = storage_mutants.pieces(content)
    out = b""
    for (*between, _), payload in found:
        out += b"".join(map(storage_mutants.leb128, between)) + frame(change(payload))
    return packed(out + rest)


ONE, TWO = tensor([3], 0, 12), tensor([2], 12, 20)
FILES = {
    "empty": (lambda: b"", r"no safetensors file, or a truncated one \(0 bytes\)"),
    "text": (lambda: b"name,value\n1,2\n" * 9, "no safetensors file"),
    "zeros": (lambda: bytes(4096), "no safetensors file"),
    "cut in the length": (lambda: whole()[:5], r"truncated one \(5 bytes\)"),
    "cut in the header": (lambda: whole()[:50], r"truncated one \(50 bytes\)"),
    "cut by a byte": (lambda: whole()[:-1], "shorter than its header says"),
    "longer by a byte": (lambda: whole() + b"\0", "longer than its header says"),
    "length beyond the file": (lambda: b"\xff" * 7 + b"\0" + whole()[8:], "truncated"),
    "npz": (lambda: numpy_file(np.savez, np.ones(3)), r"zip archive.*npz.*torch\.save"),
    "npy": (lambda: numpy_file(np.save, np.ones(3)), r"numpy\.save"),
    "pickle": (lambda: pickle.dumps({"w": [1.0] * 9}), "a pickle, which can run code"),
    "gzip": (lambda: gzip.compress(whole()), "compressed by gzip"),
    "zstd": (lambda: zstandard.compress(whole()), "compressed by zstd"),
    "list": (lambda: text("[1, 2]"), "no safetensors file"),
    "twice": (lambda: text('{"a": 1, "a": 2}'), "a name stands twice"),
    "NaN": (lambda: text('{"a": NaN}'), "NaN is no JSON"),
    "deep": (lambda: text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "header cannot be read"),
    "digits": (lambda: text('{"a": ' + "9" * 100_000 + "}"), "header cannot be read"),
    "surrogate": (lambda: text(r'{"\ud800": 1}'), "header cannot be read"),
    "no fields": (lambda: ordinary({"a": {"dtype": "F32"}}), "'a' there is no dtype, shape and"),
    "dtype": (lambda: ordinary({"a": tensor([3], 0, 12, "F33")}, bytes(12)), "dtype is 'F33'"),
    "negative": (lambda: ordinary({"a": tensor([-3], 0, 12)}, bytes(12)), "'a'.* not what"),
    "fraction": (lambda: ordinary({"a": tensor([3.0], 0, 12)}, bytes(12)), "'a'.* not what"),
    "boolean": (lambda: ordinary({"a": tensor([True], 0, 4)}, bytes(4)), "'a'.* not what"),
    "shape": (lambda: ordinary({"a": tensor([5], 0, 12)}, bytes(12)), "12 bytes, not 20"),
    "overflow": (lambda: ordinary({"a": tensor([2**32, 2**32], 0, 0)}), "too large"),
    "overflow beside 0": (lambda: ordinary({"a": tensor([0, 2**62, 2**62], 0, 0)}), "too large"),
    "hole": (lambda: ordinary({"a": ONE, "b": tensor([2], 16, 24)}, bytes(24)), "begin at 16, not"),
    "overlap": (
        lambda: ordinary({"a": ONE, "b": tensor([2], 8, 16)}, bytes(16)),
        "begin at 8, not",
    ),
    "backwards": (lambda: ordinary({"a": tensor([3], 12, 0)}, bytes(12)), "-12 bytes, not 12"),
    "outside": (lambda: ordinary({"a": ONE, "b": TWO}, bytes(12)), "shorter than its header"),
    "metadata": (lambda: ordinary({"__metadata__": {"a": 1}}), "metadata are not strings"),
    "booleans": (lambda: ordinary({"a": tensor([1], 0, 1, "BOOL")}, b"\2"), "neither 0 nor 1"),
    "newer": (lambda: said(version="3"), "is of format '3', this sparsejax reads 1 and 2"),
    "packed that is open": (lambda: said(version="2"), "header is damaged"),
    "packed, no place": (lambda: unlike(header=""), "header is damaged"),
    "packed, place beyond": (lambda: unlike(start=10**6), "begins at 1000000 of"),
    "packed, other bytes": (lambda: unlike(checksum=5), r"not those that were saved \(CRC-32\)"),
    "packed, too long": (lambda: unlike(size=10**8), "says that it has 100000000"),
    "packed, more than any header": (
        lambda: unlike(size=200_000_000, end=bytes(4 << 20)),
        "says that it has 200000000",
    ),
    "packed, junk as bytes of a leaf": (
        lambda: with_junk(bytes(800)),
        r"packed header ends at \d+ of its \d+ bytes",
    ),
    "packed, longer than its frame": (longer_inside, "shorter than its header says"),
    "packed, too short": (lambda: unlike(size=10), "a part has .* bytes, not 10"),
    "packed, more behind": (lambda: unlike(end=b"x"), "1 bytes behind its end"),
    "packed, of another": (
        lambda: storage_mutants.written_small(b"{}", b""),
        "packed header is none of version 1",
    ),
    "packed twice": (
        lambda: storage_mutants.written_small(small()[8:], b""),
        "header|bytes",
    ),
    "no format": (lambda: said(format="other"), "header is damaged"),
    "no tree": (lambda: said(tree="5"), "leaf 5 of 2"),
    "tree twice": (lambda: said(tree="[0,0]"), "node|each of its 2 leaves once"),
    "deep tree": (lambda: said(tree="[" * 50_000 + "]" * 50_000), "header cannot be read|too deep"),
    "dtype of a leaf": (lambda: recorded("float32", "object"), "'object' is none that can be"),
    "shape of a leaf": (lambda: recorded("[30,40]", "[30,4]"), "at 'w' "),
    "code of a leaf": (lambda: recorded("gaps", "bitmask"), "at 'w' it is coded as gaps"),
    "4 TB": (
        lambda: recorded("[30,40]", "[1000000,1000000]"),
        r"hold 5\d{12}.*`limit` = 4294967296",
    ),
    "8 EB": (lambda: recorded("[30,40]", "[4294967295,1073741824]"), "too large|`limit`"),
    "no content": (lambda: packed(b"\0"), "at 'w' "),
    "zeros as content": (lambda: packed(bytes(500)), "at 'w' "),
    "no zstd": (lambda: repacked(lambda p: p), "at 'w' a compressed part cannot be read"),
    "zstd bomb": (
        lambda: repacked(lambda payload: zstandard.compress(bytes(1 << 28))),
        "at 'w' .*",
    ),
    "content too short": (lambda: repacked(lambda p: zstandard.compress(p[:-1])), "at 'w' .*"),
    "gaps beyond the end": (
        lambda: repacked(lambda p: zstandard.compress(b"\xfe" * len(p))),
        "at 'w' its gaps lead beyond its end",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_load_refuses_by_name(tmp_path, kind):
    make, message = FILES[kind]
    path = tmp_path / "some.safetensors"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(storage.InvalidFileError, match=message) as caught:
            storage.load(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("make", [whole, said, lambda: repacked(zstandard.compress), small, unlike])
def test_whole_file_loads(tmp_path, make):
    """So that what is made of it is refused for what was changed."""
    path = tmp_path / "some.safetensors"
    path.write_bytes(make())
    found = storage.load(path)
    assert (found.params["w"] == PARAMS["w"]).all() and (found.masks["w"] == MASK).all()


@pytest.mark.parametrize("kind", ["newer", "cut by a byte", "hole", "4 TB", "npz"])
def test_contents_refuses_what_load_refuses_for_its_header(tmp_path, kind):
    make, message = FILES[kind]
    path = tmp_path / "some.safetensors"
    path.write_bytes(make())
    if kind == "4 TB":  # nothing is allocated, and what is said is shown
        assert max(leaf.dense_bytes for leaf in storage.contents(path).leaves) == 4 * 10**12
    else:
        with pytest.raises(storage.InvalidFileError, match=message):
            storage.contents(path)


def test_packed_header_beyond_all_bounds_is_not_read(tmp_path):
    path, size = tmp_path / "some.safetensors", 200_000_000
    metadata = {"checksum": "0" * 8, "format": "sparsejax", "version": "2", "header": "0 00000000"}
    header = {"__metadata__": metadata, "packed": tensor([size], 0, size, "U8")}
    path.write_bytes(ordinary(header))
    os.truncate(path, path.stat().st_size + size)  # a hole, which takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(storage.InvalidFileError, match="200000000 bytes, which is too many"):
            storage.contents(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [whole, small])
def test_no_flipped_bit_goes_unseen(tmp_path, make):
    path = tmp_path / "flipped"
    for place in range(len(make())):
        flipped = bytearray(make())
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(storage.InvalidFileError):
            storage.load(path)


@pytest.mark.parametrize("make", [whole, small])
def test_no_lost_end_goes_unseen(tmp_path, make):
    path = tmp_path / "cut"
    path.write_bytes(make())
    for length in reversed(range(len(make()))):
        os.truncate(path, length)
        with pytest.raises(storage.InvalidFileError):
            storage.load(path)


def many_planes(size):
    """A small file whose leaf of so many entries, all kept, says that it has 7 bytes a gap."""
    parts = storage_mutants.read(whole())
    kept, planes = size, 7
    numbers = map(storage_mutants.leb128, (0, 1, 1, kept, planes, kept))
    frames = (frame(zstandard.compress(bytes(n))) for n in (planes * kept, kept))
    metadata = parts.header["__metadata__"] | {"leaves": f"int8[{size}] gaps {0:08}", "tree": "0"}
    del metadata["masks"]
    content = b"".join((*numbers, *frames))
    header = {"__metadata__": metadata, "w": tensor([len(content)], 0, len(content), "U8")}
    return storage_mutants.file_of(storage_mutants.Parts(header, content))


def test_memory_is_bounded_by_the_limit(tmp_path):
    path, size = tmp_path / "bomb", 1 << 24
    path.write_bytes(many_planes(size))
    tracemalloc.start()
    try:
        with pytest.raises(storage.InvalidFileError):
            storage.load(path, limit=size)
        assert tracemalloc.get_traced_memory()[1] < 5 * size
    finally:
        tracemalloc.stop()


def test_limit_can_be_raised(tmp_path):
    path = tmp_path / "zeros"
    storage.save(path, {"w": np.zeros((1 << 22,), np.int8)})
    with pytest.raises(storage.InvalidFileError, match=r"load\(path, limit=4194304\)"):
        storage.load(path, limit=1000)
    assert not storage.load(path, limit=1 << 22).params["w"].any()


def test_pickle_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "some.pt").write_bytes(pickle.dumps(Payload(), protocol))
        with pytest.raises(storage.InvalidFileError):
            storage.load(tmp_path / "some.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "..", "C:\\x", "\x1b[2J", "a\nb", "\0", ""]
)
def test_names_of_others_are_names_only(tmp_path, name):
    path = tmp_path / "a" / "some.safetensors"
    path.parent.mkdir()
    safetensors.numpy.save_file({name: np.ones(3)}, path)
    assert storage.load(path).params[name].tolist() == [1, 1, 1]
    assert storage.contents(path).leaves[0].name == name
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["a", "some.safetensors"]


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202e", "x" * 9999])
def test_errors_are_a_line_of_text_whatever_the_names(tmp_path, name):
    path = tmp_path / "some.safetensors"
    path.write_bytes(ordinary({name: tensor([5], 0, 12)}, bytes(12)))
    with pytest.raises(storage.InvalidFileError, match="12 bytes, not 20") as caught:
        storage.load(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("read", [storage.load, storage.contents])
def test_what_is_no_file_is_an_os_error(tmp_path, read):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing")
    with pytest.raises(OSError, match="Not a regular file: '/dev/zero'"):
        read("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        read(tmp_path / "pipe")  # rather than wait for who writes


# Saving


def names(folder):
    return sorted(os.listdir(folder))


def test_save_that_fails_midway_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(whole())
    bad = {"a": np.ones((999, 99)), "z": np.ones((2, 2))}
    with pytest.raises(ValueError, match="'z'"):
        storage.save(path, bad, {"a": np.array(True), "z": np.eye(2, dtype=bool)})
    assert path.read_bytes() == whole() and names(tmp_path) == ["checkpoint"]


def test_full_disk_leaves_the_old_file_alone(tmp_path):
    """A limit on the size of files, which anyone can set, does as a full disk does."""
    path = tmp_path / "checkpoint"
    path.write_bytes(whole())
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            storage.save(path, {"w": np.ones(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == whole() and names(tmp_path) == ["checkpoint"]


def test_save_refuses_what_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        storage.save(tmp_path, PARAMS)
    with pytest.raises(OSError, match="/dev/null"):
        storage.save("/dev/null", PARAMS)
    with pytest.raises(FileNotFoundError):
        storage.save(tmp_path / "no" / "folder", PARAMS)
    assert names(tmp_path) == []


def test_leftovers_of_others_stay(tmp_path):
    """Only what a save of this path left is swept."""
    others = ["checkpoint.part", ".other.0123abcd.part", ".checkpoint.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".checkpoint.0123abcd.part").write_bytes(b"x")
    storage.save(tmp_path / "checkpoint", PARAMS)
    assert names(tmp_path) == sorted([*others, "checkpoint"])


@pytest.mark.long
def test_file_is_whole_after_each_of_200_kills(tmp_path):
    """The worker asserts that it is the old or the new version, and that leftovers are swept."""
    found = work("kill", tmp_path, 200)
    assert found["finished"] + found["old"] + found.get("new", 0) == 200
    # So that it says something: kills hit all parts of a save.
    assert found["old"] >= 50 and found["finished"] >= 10 and found["left"] >= 50


def test_two_saves_to_one_path_at_once_leave_one_of_them_whole(tmp_path):
    """The worker asserts it, of every moment, and that both succeed."""
    found = work("race", tmp_path, 15)
    assert sum(found["won"].values()) == 15 and set(found["seen"]) <= {"0", "1", "2"}
