"""What a run leaves on disk: its arguments, and the arrays and numbers of each finished part.

A part is a file of its arrays' bytes after their SHA-256, so that any dtype comes back bit for bit;
shapes and dtypes are known to whoever asks. Files are written beside and moved into place: a run
that is killed leaves whole files only. One run at a time may use a folder.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax import _files, _leaves, _tree

_MANIFEST = "manifest.json"
_DIGEST = hashlib.sha256().digest_size
# What came later was made from it, perhaps by a function that is mended since.
_SINCE = "it and all that was written after it, such as later rounds, or the folder"


def open_run(folder: Any, arguments: dict[str, Any]) -> Path:
    """The folder of a run with these arguments, new or begun before; refuses another run's.

    Args:
      folder: where it is; made, with its parents, where there is none.
      arguments: names and values (of JSON: numbers, words, lists), in the order in which to compare
        them. Trees and keys go through `fingerprint` and `key_fingerprint`.

    Returns:
      The folder's path.

    Raises:
      TypeError: if `folder` is no path.
      ValueError: if it is no folder, holds other files, or the manifest there is damaged or has
        another argument, which the error names.
    """
    path = _files.known_path("folder", folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`folder` must be a folder, got the file {str(path)!r}.")
    manifest = path / _MANIFEST
    if manifest.exists():
        _check_same(path, _read(manifest, "the folder"), json.loads(json.dumps(arguments)))
        return path
    path.mkdir(parents=True, exist_ok=True)
    others = sorted(p.name for p in path.iterdir() if not _files.is_writing(p))
    if others:
        raise ValueError(
            f"`folder` must be empty or of an earlier run, got {str(path)!r} without a "
            f"{_MANIFEST} but with {_leaves.brief(others)}; name a new folder."
        )
    _write(manifest, json.dumps(arguments, indent=1).encode())
    return path


def once(
    folder: Path | None, part: str, like: Sequence[Any], make: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """The arrays of a part: read where it is finished, else made, and written at once.

    Args:
      folder: of the run; `None`: nothing is on disk.
      part: the part's name.
      like: what has the shape and dtype of each array.
      make: makes the arrays.

    Returns:
      The arrays.

    Raises:
      ValueError: if the file is damaged.
    """
    if folder is None:
        return make()
    file = folder / f"{part}.bin"
    if file.exists():
        return _arrays(file, like)
    arrays = make()
    content = b"".join(x.tobytes() for x in arrays)
    _write(file, hashlib.sha256(content).digest() + content)
    return arrays


def once_noted(
    folder: Path | None, part: str, make: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Numbers by their names: read where they are noted, else made, and noted at once.

    Args:
      folder: of the run; `None`: nothing is on disk.
      part: the name of what they are numbers of.
      make: makes the numbers, floats; NaN and infinity are some.

    Returns:
      The numbers, bit for bit.

    Raises:
      ValueError: if the file is damaged.
    """
    if folder is None:
        return make()
    file = folder / f"{part}.json"
    if file.exists():
        numbers = _read(file, _SINCE)
        if not all(isinstance(number, float) for number in numbers.values()):
            raise _damaged(file, _SINCE)
        return numbers
    numbers = make()
    _write(file, json.dumps(numbers).encode())
    return numbers


def fingerprint(name: str, tree: Any) -> list[str]:
    """A line a leaf: its path, dtype, shape and SHA-256.

    Raises:
      TypeError: for a leaf that is no array of numbers, whose content cannot be told.
    """
    flat = _tree.flatten(tree)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if not _leaves.is_number(leaf):
            raise TypeError(
                f"`{name}` must hold arrays of numbers where there is a `folder`, which tells by "
                f"their content whether it is the same run; got {_leaves.describe(leaf)} at "
                f"{path!r}: let `fit` close over it."
            )
    rows = zip(flat.paths, flat.leaves, strict=True)
    return [f"{path!r} {_leaves.describe(leaf)} sha256 {_digest(leaf)}" for path, leaf in rows]


def key_fingerprint(key: Any) -> list[Any] | None:
    """A PRNG key's kind and content; `None` for none."""
    if key is None:
        return None
    return [str(key.dtype), *np.asarray(jax.random.key_data(key)).ravel().tolist()]


def function_name(function: Any) -> str | None:
    """What can be told of a function: its name, or its class's; `None` for none.

    Without its module, which is `__main__` where its file is run.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if function is None:
        return None
    return getattr(function, "__qualname__", type(function).__qualname__)


def _digest(leaf: Any) -> str:
    return hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()


def _check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for name, value in here.items():
        if there.get(name) != value:
            raise ValueError(
                f"`{name}` must be what it was when the run in {str(folder)!r} began: "
                f"{_difference(there.get(name), value)}. Pass the same, or name another folder for "
                "this run, or delete that one."
            )


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return f"{len(there)} entries there, {len(here)} here"
        there, here = next(pair for pair in zip(there, here, strict=True) if pair[0] != pair[1])
    return f"{_leaves.brief(there)} there, {_leaves.brief(here)} here"


def _read(file: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise _damaged(file, what) from error
    if not isinstance(content, dict):
        raise _damaged(file, what)
    return content


def _arrays(file: Path, like: Sequence[Any]) -> list[np.ndarray]:
    blob = file.read_bytes()
    dtypes = [np.dtype(x.dtype) for x in like]
    sizes = [int(np.prod(x.shape)) * d.itemsize for x, d in zip(like, dtypes, strict=True)]
    content = blob[_DIGEST:]
    if len(content) != sum(sizes) or hashlib.sha256(content).digest() != blob[:_DIGEST]:
        raise _damaged(file, _SINCE)
    ends = np.cumsum(sizes, dtype=int).tolist()
    return [
        np.ndarray(x.shape, d, bytearray(content[end - size : end]))
        for x, d, size, end in zip(like, dtypes, sizes, ends, strict=True)
    ]


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(
        f"`folder` must hold whole files, got a damaged one, {str(file)!r}; delete {what}, and it "
        "is made anew."
    )


def _write(file: Path, content: bytes) -> None:
    """All or nothing, also when the machine goes down."""
    with _files.replacing(file) as f:
        f.write(content)
