"""Files and folders that are written whole or not at all, also when the process is killed."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparsejax import _leaves

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: what killed processes leave stays.
    fcntl = None

_WRITING = ".part"
_NEW, _OLD, _LOCK = "new", "old", "lock"  # In a folder that is being written.


def known_path(name: str, value: Any) -> Path:
    """The path of an argument; refuses what is none."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"`{name}` must be a path, got {_leaves.brief(value)}.")
    if "\0" in os.fspath(value):
        raise ValueError(f"`{name}` must be a path, got one with a zero in it: {value!r}.")
    return Path(value)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside `path`, which takes its place when `with` ends without an error.

    Until then `path` is what it was; so it stays after an error, and the new file goes. Content and
    name are on the disk before `with` is over. A link stays one: the file that it names is
    replaced, with the permissions that it had. What killed processes left beside `path` is swept.

    Raises:
      OSError: if `path` names a folder, a device or a pipe, or the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    _sweep(target)
    beside, file = _open_beside(target)
    try:
        with file:
            yield file
            file.flush()
            if mode is not None:
                os.chmod(beside, mode)
            os.fsync(file.fileno())
            # Still open, so that its lock says to others that it is no leftover.
            os.replace(beside, target)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # Of a full disk the system does not say which file.
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A name beside `path` for a folder that takes its place when `with` ends without an error.

    Two renames, since no folder replaces another one in one: a process killed between them leaves
    the old folder beside, and the next one that writes there puts it back first.

    Raises:
      OSError: if the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    _sweep(target)
    beside = _beside_name(target)
    beside.mkdir()
    with (beside / _LOCK).open("w+b") as file:
        _lock(file)
        try:
            yield beside / _NEW
            if target.exists():
                target.rename(beside / _OLD)
            (beside / _NEW).rename(target)
        finally:
            _clear(beside, target)
    _sync_folder(target.parent)


def is_writing(path: Path) -> bool:
    """Whether a file is one that is being written beside another, or was when its writer died."""
    return path.suffix == _WRITING


def _beside_name(target: Path) -> Path:
    """A new name beside a path, for what is to take its place."""
    return target.with_name(f"{_start(target)}{secrets.token_hex(4)}{_WRITING}")


def _start(target: Path) -> str:
    """How such names begin; most file systems have names of up to 255 bytes."""
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}."


def _mode(target: Path) -> int | None:
    """The permissions of the file to be replaced; None where there is none."""
    try:
        found = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(target))
    if not stat.S_ISREG(found):
        what = "Not a regular file: it would be replaced, not written to"
        raise OSError(errno.EINVAL, what, str(target))
    return stat.S_IMODE(found)


def _open_beside(target: Path) -> tuple[Path, BinaryIO]:
    while True:
        beside = _beside_name(target)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(beside, flags, 0o666), "w+b")
        # Between the two lines another process may have swept it.
        if _lock(file) and beside.exists():
            return beside, file
        file.close()


def _lock(file: BinaryIO) -> bool:
    """Whether nobody else writes the file; the lock goes with the process, however it ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # A file system without locks.
    return True


def _sweep(target: Path) -> None:
    """Removes the leftovers of processes that are dead, which hold no lock any more."""
    if fcntl is None:
        return
    start = _start(target)
    for entry in target.parent.iterdir():
        if entry.name.startswith(start) and is_writing(entry):
            locked = entry / _LOCK if entry.is_dir() else entry
            with contextlib.suppress(OSError), locked.open("r+b") as leftover:
                fcntl.flock(leftover, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(entry, target)


def _clear(beside: Path, target: Path) -> None:
    """Removes what is beside; an old folder whose place is empty first goes back there."""
    if not beside.is_dir():
        beside.unlink()
        return
    if (beside / _OLD).exists() and not target.exists():
        (beside / _OLD).rename(target)
    shutil.rmtree(beside, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Makes the new name last; where a folder cannot be opened or synced, it is left to the OS."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
