"""`replacing`: whole or not at all, and nothing left beside."""

import os
import stat

import pytest

from sparsejax._files import replacing, replacing_folder


def write(path, content):
    with replacing(path) as f:
        f.write(content)


def test_replacing_writes_a_new_file_with_the_permissions_of_any_other(tmp_path):
    write(tmp_path / "a", b"new")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_replacing_keeps_the_permissions_of_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write(path, b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_replacing_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def interrupted():
        with replacing(path) as f:
            f.write(b"new")
            f.flush()
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_replacing_leaves_no_new_file_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "a"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_replacing_keeps_a_link_and_replaces_what_it_names(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "a").read_bytes() == b"new"


def test_replacing_sweeps_what_dead_writers_left_and_nothing_else(tmp_path):
    dead, other = tmp_path / ".a.01234567.part", tmp_path / ".ab.01234567.part"
    dead.write_bytes(b"half")
    other.write_bytes(b"half")
    with replacing(tmp_path / "a") as outer:
        outer.write(b"outer")
        write(tmp_path / "a", b"inner")  # Another writer: neither disturbs the other.
        assert (tmp_path / "a").read_bytes() == b"inner"
    assert (tmp_path / "a").read_bytes() == b"outer"
    assert sorted(os.listdir(tmp_path)) == [".ab.01234567.part", "a"]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_replacing_refuses_what_is_no_file(tmp_path, kind):
    path = tmp_path / "a"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    before = path.stat().st_mode
    with pytest.raises(OSError, match=r"directory|regular"), replacing(path):
        pass
    assert path.stat().st_mode == before and os.listdir(tmp_path) == ["a"]


def test_replacing_takes_the_longest_name_there_can_be(tmp_path):
    write(tmp_path / ("é" * 127), b"new")
    assert os.listdir(tmp_path) == ["é" * 127]


def test_an_error_of_writing_says_of_which_file(tmp_path):
    def full():
        with replacing(tmp_path / "a"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        full()


def test_replacing_says_where_there_is_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), replacing(tmp_path / "nowhere" / "a"):
        pass


def write_folder(path, content):
    with replacing_folder(path) as folder:
        folder.mkdir()
        (folder / "a").write_bytes(content)


def test_replacing_folder_replaces_it_whole(tmp_path):
    for content in (b"old", b"new"):
        write_folder(tmp_path / "f", content)
        assert (tmp_path / "f" / "a").read_bytes() == content
        assert os.listdir(tmp_path) == ["f"]


def test_replacing_folder_leaves_the_old_one_after_an_error(tmp_path):
    def failing():
        with replacing_folder(tmp_path / "f") as folder:
            folder.mkdir()
            raise RuntimeError

    write_folder(tmp_path / "f", b"old")
    with pytest.raises(RuntimeError):
        failing()
    assert (tmp_path / "f" / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_replacing_folder_puts_back_what_a_dead_writer_had_moved(tmp_path):
    """As after a kill between the two renames, and after one before them."""
    for name in ("01234567", "89abcdef"):
        dead = tmp_path / f".f.{name}.part"
        (dead / "old").mkdir(parents=True)
        (dead / "old" / "a").write_bytes(b"old")
        (dead / "lock").write_bytes(b"")

    def failing():
        with replacing_folder(tmp_path / "f"):
            assert (tmp_path / "f" / "a").read_bytes() == b"old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert (tmp_path / "f" / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]
