"""The `sparsejax` command where things go wrong: one clear line, the right status, nothing lost."""

import errno
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsejax import cli, storage

pytestmark = pytest.mark.usefixtures("quickly")

COMMAND = [sys.executable, "-m", "sparsejax"]


def random(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.fixture
def fails(capsys):
    """Runs the command, which must fail with one line on standard error and none on the other."""

    def call(*words, status=2):
        assert cli.main([str(word) for word in words]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"sparsejax( \w+)?: error: [^\n]+\n", err)
        return err.partition("error: ")[2].rstrip("\n")

    return call


@pytest.fixture
def good(tmp_path):
    save_file({"w.weight": random(8, 8), "b": random(8)}, tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


@pytest.fixture
def old(tmp_path):
    """A file that is to be replaced; nothing may be left beside it."""
    path = tmp_path / "out" / "old.safetensors"
    path.parent.mkdir()
    path.write_text("old")
    yield path
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["old.safetensors"]


# Files that cannot be read


def test_a_missing_file(fails, tmp_path):
    assert fails("inspect", tmp_path / "no") == f"'{tmp_path}/no': No such file or directory"
    assert fails("inspect", "") == "'': No such file or directory"
    assert "No such file" in fails("pack", tmp_path / "no", "-o", tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_no_checkpoint(fails, tmp_path):
    assert "is a directory, but no checkpoint of orbax" in fails("inspect", tmp_path)


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero"])
def test_a_device(fails, name):
    assert fails("inspect", name) == f"'{name}' is neither a file nor a directory"


def test_a_pipe_that_nobody_writes(fails, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a directory" in fails("inspect", tmp_path / "pipe")


def test_a_file_without_permission(fails):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "secret.safetensors")
        path.write_bytes(b"x")
        path.chmod(0)
        with not_root():
            assert fails("inspect", path) == f"'{path}': Permission denied"


def test_a_folder_without_permission(fails, capsys):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        np.savez(f"{folder}/a.npz", w=random(8, 8))
        words = [f"{folder}/a.npz", "-o", f"{folder}/b.npz"]
        # Imports what it needs, which others than root may not be allowed to read.
        assert cli.main(["inspect", words[0]]) == 0
        capsys.readouterr()
        with not_root():
            assert "Permission denied" in fails("unpack", *words)
        assert os.listdir(folder) == ["a.npz"]


class not_root:  # noqa: N801
    """Without the rights of root, who may read everything."""

    def __enter__(self):
        if os.geteuid() == 0:
            os.seteuid(65534)

    def __exit__(self, *error):
        if os.getuid() == 0:
            os.seteuid(0)


def npz_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(shape, dtype="<f4", data=b""):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return npy_of_header(header, data)


def npy_of_header(header, data=b""):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


class Touch:
    """Its unpickling would leave a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_never_loaded(fails, tmp_path):
    trace = tmp_path / "trace"
    np.savez(tmp_path / "o.npz", w=np.array([Touch(trace)], object))
    message = fails("inspect", tmp_path / "o.npz")
    assert "'w.npy': Object arrays cannot be loaded" in message
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Touch(trace)))
    assert "a pickle, which can run code" in fails("inspect", tmp_path / "p.pt")
    npz_of(tmp_path / "z.pt", {"z/data.pkl": pickle.dumps(Touch(trace)), "z/data/0": b"1234"})
    assert "safetensors.torch.save_file" in fails("inspect", tmp_path / "z.pt")
    assert not trace.exists()


BAD_NPZ = {
    "no arrays": ({"w.txt": b"hello"}, "no npz: 'w.txt' is no array"),
    "no magic": ({"w.npy": b"hello, this is no array"}, "'w.npy': "),
    "empty": ({"w.npy": b""}, "'w.npy': "),
    "short": ({"w.npy": npy((3,), data=b"1234")}, "'w.npy': "),
    "lying": ({"w.npy": npy((10**15,), data=b"1234")}, "'w.npy': "),
    "negative": ({"w.npy": npy((-3,), data=b"1234")}, "'w.npy': "),
    "code": ({"w.npy": npy((3,), dtype="__import__('os').abort()")}, "'w.npy': "),
    "unclosed": ({"w.npy": npy_of_header(b"{'descr': '<f4', 'shape': (3,")}, "'w.npy': "),
    "huge": ({"w.npy": npy((10**30,), data=b"1234")}, "'w.npy': "),
    "raw": ({"w.npy": npy((2,), dtype="|V2", data=b"1234")}, "npz cannot hold bfloat16"),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_bad_npz(fails, tmp_path, name):
    members, message = BAD_NPZ[name]
    npz_of(tmp_path / "bad.npz", members)
    assert message in fails("inspect", tmp_path / "bad.npz")


@pytest.mark.parametrize("size", [4, 30, 100, 400])
def test_truncated_npz(fails, tmp_path, size):
    np.savez(tmp_path / "t.npz", w=random(8, 8))
    os.truncate(tmp_path / "t.npz", size)
    assert "is a damaged npz file" in fails("inspect", tmp_path / "t.npz")


def test_npz_with_flipped_bits(fails, tmp_path):
    np.savez_compressed(tmp_path / "f.npz", w=random(8, 8))
    content = bytearray((tmp_path / "f.npz").read_bytes())
    content[150] ^= 255
    (tmp_path / "f.npz").write_bytes(content)
    fails("inspect", tmp_path / "f.npz")


def test_npz_with_a_password_or_an_unknown_method(fails, tmp_path):
    np.savez(tmp_path / "e.npz", w=random(8, 8))
    content = bytearray((tmp_path / "e.npz").read_bytes())
    for offset, value in ((6, 1), (8, 99), (8, 12), (8, 14)):  # 12 and 14: bzip2 and LZMA.
        changed = bytearray(content)
        changed[offset] = value
        changed[changed.index(b"PK\x01\x02") + offset + 2] = value
        (tmp_path / "e.npz").write_bytes(changed)
        fails("inspect", tmp_path / "e.npz")


def test_many_members_are_read_in_a_moment(tmp_path, capsys):
    npz_of(tmp_path / "m.npz", {f"{i}.npy": npy((1,), data=b"1234") for i in range(2000)})
    assert cli.main(["inspect", str(tmp_path / "m.npz"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["leaves"]) == 2000


def test_a_bomb_is_refused_with_the_option_that_allows_it(fails, tmp_path, capsys):
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros((1000, 1000)))
    message = fails("inspect", tmp_path / "bomb.npz", "--limit", "1M")
    assert "more than allowed; if you trust it, pass --limit 8000" in message
    storage.save(tmp_path / "bomb.safetensors", {"w": np.zeros((1000, 1000))})
    message = fails("inspect", tmp_path / "bomb.safetensors", "--limit", "1M")
    assert "pass --limit 8000000" in message
    assert cli.main(["inspect", str(tmp_path / "bomb.safetensors"), "--limit", "8M"]) == 0


def test_damaged_files_of_ours_and_of_others(fails, tmp_path, good):
    content = good.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for changed in (b"", content[:7], content[:50], content[:-1], content + b"x", b"\xff" * 99):
        bad.write_bytes(changed)
        assert str(bad) in fails("inspect", bad)
    storage.save(tmp_path / "p.safetensors", {"w": random(8, 8) * (np.arange(8) > 6)})
    content = bytearray((tmp_path / "p.safetensors").read_bytes())
    content[-3] ^= 1
    bad.write_bytes(content)
    assert "'w' the bytes are not those that were saved" in fails("inspect", bad)
    assert "'w' the bytes are not those that were saved" in fails("diff", good, bad)


# Names that a terminal would obey


HOSTILE = "[red]x[/red]\x1b[2J\r\n\x07\u202e:smile:\\"


def test_names_are_printed_as_text(capsys, tmp_path):
    save_file({HOSTILE: random(2, 2)}, tmp_path / "h.safetensors")
    save_file({"w": random(2, 2)}, tmp_path / "w.safetensors")
    escaped = "[red]x[/red]\\x1b[2J\\r\\n\\x07\\u202e:smile:\\"
    for words, status in (
        (["inspect", tmp_path / "h.safetensors", "--histogram"], 0),
        (["diff", tmp_path / "h.safetensors", tmp_path / "w.safetensors"], 1),
        (["prune", tmp_path / "h.safetensors", "-o", tmp_path / "o", "--sparsity", "0.5"], 0),
        (["prune", tmp_path / "h.safetensors", "-o", tmp_path / "o", "--nm", "2:5", "--force"], 0),
    ):
        assert cli.main(list(map(str, words))) == status
        out, err = capsys.readouterr()
        assert escaped in out + err
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", out + err)
    assert cli.main(["inspect", str(tmp_path / "h.safetensors"), "--json"]) == 0
    out, _ = capsys.readouterr()
    assert out.isascii()
    assert json.loads(out)["leaves"][0]["name"] == HOSTILE


def test_errors_of_hostile_names_are_one_line(fails, tmp_path):
    save_file({HOSTILE: random(2, 2)}, tmp_path / "h.safetensors")
    words = ["prune", tmp_path / "h.safetensors", "-o", tmp_path / "o", "--sparsity", "0.5"]
    assert "matches no leaf" in fails(*words, "--include", "\x1b\n*")
    assert "No such file" in fails("inspect", tmp_path / "\x1b[2J\n")


def test_names_that_npz_cannot_hold(fails, tmp_path):
    save_file({"a\0b": random(2, 2)}, tmp_path / "z.safetensors")
    message = fails("unpack", tmp_path / "z.safetensors", "-o", tmp_path / "o.npz")
    assert "its name has a zero in it" in message
    assert not (tmp_path / "o.npz").exists()


def test_many_leaves_and_long_names(capsys, tmp_path):
    names = {f"layer.{i}.w": np.zeros(1, np.float32) for i in range(300)}
    save_file(names | {"x" * 5000: np.zeros(1, np.float32)}, tmp_path / "many.safetensors")
    assert cli.main(["inspect", str(tmp_path / "many.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 303
    assert any(line.startswith("x" * 5000 + "  ") for line in lines)


# Arrays that cannot be pruned


def test_nan_and_no_weights(fails, tmp_path):
    np.savez(tmp_path / "n.npz", w=np.full((2, 2), np.nan), v=random(4))
    words = ["-o", tmp_path / "o.npz", "--sparsity", "0.5"]
    message = fails("prune", tmp_path / "n.npz", *words)
    assert message == "leaf 'w' has NaN, which has no magnitude; leave it out by --exclude"
    np.savez(tmp_path / "v.npz", v=random(4), n=np.arange(4).reshape(2, 2))
    assert "no leaf can be pruned" in fails("prune", tmp_path / "v.npz", *words)
    np.savez(tmp_path / "e.npz")
    assert "no leaf can be pruned" in fails("prune", tmp_path / "e.npz", *words)
    words += ["--include", "v"]
    np.savez(tmp_path / "w.npz", w=random(2, 2), v=random(4))
    assert "matches only leaves that are never pruned" in fails("prune", tmp_path / "w.npz", *words)
    words[-2:] = ["--exclude", "*"]
    assert "no leaf is left to prune" in fails("prune", tmp_path / "w.npz", *words)
    assert not (tmp_path / "o.npz").exists()


def test_what_is_no_number_is_left_alone(capsys, fails, tmp_path):
    np.savez(tmp_path / "s.npz", w=random(8, 8), s=np.array([["a", "b"]]))
    words = [str(tmp_path / "s.npz"), "-o", str(tmp_path / "o.npz"), "--sparsity", "0.5"]
    assert cli.main(["prune", *words]) == 0
    assert np.load(tmp_path / "o.npz")["s"].tolist() == [["a", "b"]]
    assert cli.main(["inspect", str(tmp_path / "o.npz")]) == 0
    capsys.readouterr()
    assert "'s'" in fails("pack", tmp_path / "s.npz", "-o", tmp_path / "p.safetensors")


# Files that must not be written


@pytest.mark.parametrize("command", ["prune", "pack", "unpack"])
def test_nothing_is_overwritten_without_force(fails, good, old, command):
    words = [good, "-o", old] + (["--sparsity", "0.5"] if command == "prune" else [])
    assert fails(command, *words) == f"'{old}' exists; --force replaces it"


def test_neither_is_file_itself(fails, good):
    before = good.read_bytes()
    link = good.with_name("link.safetensors")
    link.symlink_to(good)
    for out in (good, link, good.parent / "." / good.name):
        assert fails("pack", good, "-o", out).endswith("is FILE itself; --force replaces it")
    assert good.read_bytes() == before


def test_force_replaces_file_itself(capsys, good):
    assert cli.main(["prune", str(good), "-o", str(good), "--sparsity", "0.5", "--force"]) == 0
    assert int((storage.load(good).params["w.weight"] == 0).sum()) == 32


def test_a_link_stays_one(capsys, good, tmp_path):
    (tmp_path / "data").write_text("old")
    (tmp_path / "link").symlink_to("data")
    assert cli.main(["pack", str(good), "-o", str(tmp_path / "link"), "--force"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert storage.contents(tmp_path / "data").packed


def test_the_target_is_looked_at_before_any_work(fails, tmp_path, good, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(storage, "load", never)
    np.savez(tmp_path / "a.npz", w=1)
    for out in (tmp_path / "a.npz", tmp_path, tmp_path / "none" / "b.npz", good / "c.npz"):
        fails("unpack", good, "-o", out, "--format", "npz")
        fails("prune", good, "-o", out, "--format", "npz", "--sparsity", "0.5")


def test_a_directory_is_not_replaced_by_a_file(fails, good, tmp_path):
    (tmp_path / "d").mkdir()
    assert "is a directory" in fails("pack", good, "-o", tmp_path / "d", "--force")
    message = fails("unpack", good, "-o", tmp_path / "d", "--force", "--format", "orbax")
    assert "is no checkpoint of orbax, and is not replaced by one" in message
    message = fails(
        "unpack", tmp_path / "good.safetensors", "-o", good, "--force", "--format", "orbax"
    )
    assert "is no checkpoint of orbax" in message
    assert "annot be written: Not a regular" in fails("pack", good, "-o", "/dev/null", "--force")


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("prune", "o.safetensors"),
        ("prune", "o.npz"),
        ("pack", "o.safetensors"),
        ("unpack", "o.safetensors"),
        ("unpack", "o.npz"),
    ],
)
def test_a_full_disk(fails, small_disk, tmp_path, command, name):
    np.savez(tmp_path / "in.npz", w=random(200, 200))
    (small_disk / name).write_text("old")
    words = [tmp_path / "in.npz", "-o", small_disk / name, "--force"]
    words += ["--sparsity", "0.1"] if command == "prune" else []
    message = fails(command, *words)
    assert message.endswith(f"{name}' cannot be written: No space left on device; it is as it was")
    assert (small_disk / name).read_text() == "old"
    assert os.listdir(small_disk) == [name]


def test_a_full_disk_for_orbax(small_disk, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    np.savez(tmp_path / "in.npz", w=random(200, 200))
    words = ["unpack", tmp_path / "in.npz", "-o", small_disk / "o", "--format", "orbax"]
    ran = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r".*error: .*No space left on device; it was not written\n", ran.stderr)
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_disk_that_is_full_in_the_end(fails, good, old, monkeypatch, place, command):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "write":
        from sparsejax.storage import _container

        monkeypatch.setattr(_container, "encode", full)
    else:
        monkeypatch.setattr(os, place, full)
    message = fails(command, good, "-o", old, "--force")
    assert message == f"'{old}' cannot be written: No space left on device; it is as it was"


# Interrupted, or nobody listens


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_interrupted(fails, good, old, monkeypatch, command):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    message = fails(command, good, "-o", old, "--force", status=130)
    assert message == "interrupted; no file is half-written"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError, "not enough memory"),
        (RecursionError, "the tree is too deep"),
        (ModuleNotFoundError("no zstandard"), "no zstandard"),
    ],
)
def test_errors_from_below(fails, good, monkeypatch, error, message):
    def raises(*args, **kwargs):
        raise error

    monkeypatch.setattr(storage, "load", raises)
    assert fails("inspect", good) == message


# Imports once, and runs the command in children, each with a standard output of its own.
CHILDREN = """
import json, os, sys, time
from sparsejax import cli, storage

found = {}
for name, argv in json.load(sys.stdin).items():
    errors, out = name + ".err", name + ".out"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        if name == "pipe":
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, 1)
        elif name == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        elif name == "closed":
            sys.stdout = None  # As Python has it where the shell says >&-
        else:
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        if name == "ascii":
            sys.stdout.reconfigure(encoding="ascii", errors="strict")
        if name == "interrupted":
            # With threads about, Python may hear of the signal a moment later.
            storage.load = lambda *args, **settings: os.kill(os.getpid(), 2) or time.sleep(60)
        sys.argv = ["sparsejax", *argv]
        sys.exit(cli.main())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [open(x).read() if os.path.exists(x) else "" for x in (out, errors)]
    found[name] = [status, *texts]
sys.stdout.write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Status, standard output and standard error of some runs."""
    folder = tmp_path_factory.mktemp("children")
    save_file({"größe": random(2, 2)}, folder / "u.safetensors")
    damage_orbax(folder / "o")
    inspect = ["inspect", "u.safetensors"]
    runs = dict.fromkeys(("pipe", "full", "closed", "interrupted"), inspect)
    runs |= {"ascii": [*inspect, "--histogram"], "help": ["prune", "--help"]}
    runs["orbax"] = ["inspect", "o"]
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": "20"}
    ran = subprocess.run(
        [sys.executable, "-c", CHILDREN],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert ran.stderr == ""
    return json.loads(ran.stdout)


def damage_orbax(path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"w": random(8, 8)})
    for file in path.rglob("d/*"):
        os.truncate(file, 10)


ENDS = {
    "pipe": (141, "nobody reads standard output any more (broken pipe)"),
    "full": (2, "cannot write to standard output: No space left on device"),
    "closed": (2, "standard output is closed"),
    "interrupted": (130, "interrupted; no file is half-written"),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_process_ends(children, name):
    if name == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    status, message = ENDS[name]
    assert children[name] == [status, "", f"sparsejax inspect: error: {message}\n"]


def test_an_encoding_that_lacks_a_name(children):
    status, out, err = children["ascii"]
    assert (status, err) == (0, "")
    assert out.isascii()
    assert "gr\\xf6\\xdfe" in out
    assert len(out.splitlines()) == 7


def test_no_colors_where_there_is_no_terminal(children):
    for name in ("ascii", "help"):
        assert children[name][0] == 0
        assert "\x1b" not in children[name][1]


def test_damaged_orbax(children):
    status, out, err = children["orbax"]
    assert (status, out) == (2, "")
    assert re.fullmatch(r"sparsejax inspect: error: 'o' [^\n]+\n", err)
