"""MNIST and Fashion-MNIST as NumPy arrays, from the first place that has them.

In this order, and printing which one it was:

1. IDX files (gzipped or not) in `data_dir`, or in the folder that the environment variable
   `SPARSEJAX_DATA_DIR` names. One folder serves both sets if each has its own subfolder
   (`mnist`, `fashion_mnist`, or torchvision's `MNIST/raw`, `FashionMNIST/raw`).
2. tensorflow-datasets (the extra `sparsejax[examples]`), when it is installed and either has the
   files in its cache already or can reach their server.
3. For MNIST, the 10,000 training and 10,000 test digits inside this package.

Whatever the place, the bytes are checked. A file that is truncated, corrupt or of the other set
is an error that names it; it never leads to the next place.
"""

import base64
import gzip
import hashlib
import importlib
import importlib.util
import math
import os
import queue
import struct
import threading
import urllib.parse
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

ENVIRONMENT_VARIABLE = "SPARSEJAX_DATA_DIR"
"""Names the folder of IDX files that is read where no `data_dir` is given."""


class Dataset(NamedTuple):
    """Images and labels for training and for testing, in the original order.

    Attributes:
      train_images: grey levels, 0 (background) to 255.
      train_labels: the classes of `train_images`, 0 to 9.
      test_images: as `train_images`.
      test_labels: as `train_labels`.
      name: `"mnist"` or `"fashion_mnist"`.
      source: where the arrays came from, in words.
    """

    train_images: UInt8[np.ndarray, "train 28 28 1"]
    train_labels: Int32[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test 28 28 1"]
    test_labels: Int32[np.ndarray, " test"]
    name: str
    source: str


def mnist(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads MNIST: whole where it can be had, else the subset inside this package.

    Prints one line that says where the digits came from. Offline, that takes no download and at
    most three seconds (none at all where tensorflow-datasets is not installed).

    Args:
      data_dir: a folder with the four IDX files, `train-images-idx3-ubyte`,
        `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, each
        plain or with `.gz`, in the folder itself or in its subfolder `mnist`. None reads the
        folder that `SPARSEJAX_DATA_DIR` names; where that is not set either, see the module.

    Returns:
      60,000 training and 10,000 test digits, or 10,000 and 10,000 (`source` says which).

    Raises:
      FileNotFoundError, NotADirectoryError: if the folder or one of its files is missing.
      ValueError: if a file is truncated, corrupt, or not MNIST's.

    Example:
      >>> from sparsejax import datasets
      >>> datasets.mnist("/no/such/folder")
      Traceback (most recent call last):
      NotADirectoryError: `data_dir` must be a folder with the IDX files of mnist, got ...

    References:
      Y. LeCun, C. Cortes, C. J. C. Burges. The MNIST database of handwritten digits.
      http://yann.lecun.com/exdb/mnist/, 1998.
    """
    spec = _SETS["mnist"]
    try:
        dataset = _whole(spec, data_dir)
    except _UnavailableError as reason:
        subset = mnist_subset()
        dataset = subset._replace(source=f"{subset.source} (not the whole set: {reason})")
    return _announced(dataset)


def fashion_mnist(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads Fashion-MNIST: ten kinds of clothes in the form of MNIST, and harder to tell apart.

    Prints one line that says where the images came from. This package holds no copy, so without a
    folder it needs tensorflow-datasets, and the internet the first time.

    Public sources agree on the MD5 sums of the decompressed files but list no SHA-256 of them, so
    MD5 is what is checked (MNIST: SHA-256). It finds every accident; against a forger only the
    download is safe, whose SHA-256 tensorflow-datasets checks.

    Args:
      data_dir: as for `mnist`; the subfolder is called `fashion_mnist`.

    Returns:
      60,000 training and 10,000 test images. Labels: 0 T-shirt or top, 1 trouser, 2 pullover,
      3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 ankle boot.

    Raises:
      FileNotFoundError, NotADirectoryError: if the folder or one of its files is missing, or if
        there is no folder and no way to download.
      ValueError: if a file is truncated, corrupt, or not Fashion-MNIST's.

    Example:
      >>> from sparsejax import datasets
      >>> datasets.fashion_mnist("/no/such/folder")
      Traceback (most recent call last):
      NotADirectoryError: `data_dir` must be a folder with the IDX files of fashion_mnist, got ...

    References:
      H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
      Learning Algorithms. https://arxiv.org/abs/1708.07747, 2017.
    """
    spec = _SETS["fashion_mnist"]
    try:
        return _announced(_whole(spec, data_dir))
    except _UnavailableError as reason:
        names = ", ".join(file.name for file in spec.files)
        raise FileNotFoundError(
            f"fashion_mnist is not inside sparsejax and cannot be downloaded: {reason}. Either "
            f"pass `data_dir` (or set {ENVIRONMENT_VARIABLE}), a folder that holds {names}, plain "
            f"or with .gz, from {spec.url}; or `pip install 'sparsejax[examples]'` and go online."
        ) from reason


def mnist_subset() -> Dataset:
    """Loads the MNIST digits inside this package: no network, no folder, nothing printed.

    Returns:
      The first 10,000 of the 60,000 training digits, and all 10,000 test digits.

    Raises:
      ValueError: if the package's file is missing or corrupt.

    Example:
      >>> from sparsejax import datasets
      >>> digits = datasets.mnist_subset()
      >>> digits.train_images.shape, digits.test_images.shape
      ((10000, 28, 28, 1), (10000, 28, 28, 1))
      >>> digits.train_labels[:5]
      array([5, 0, 4, 1, 9], dtype=int32)
    """
    arrays = _subset_arrays()
    counts = f"{len(arrays['train_labels']):,} training and {len(arrays['test_labels']):,} test"
    return _dataset("mnist", f"{counts} digits embedded in sparsejax", *arrays.values())


# What the sets are ------------------------------------------------------------------------------


class _File(NamedTuple):
    """One IDX file: what its decompressed bytes are, and the gzip file that servers keep."""

    name: str
    shape: tuple[int, ...]
    digest: str  # "algorithm:hexdigest" of the decompressed bytes
    gz_sha256: str


class _Set(NamedTuple):
    """One dataset: the base of its address, its subfolders, its files in `Dataset`'s order."""

    name: str
    url: str
    subfolders: tuple[str, ...]
    files: tuple[_File, ...]


# The addresses and the sums of the gzip files are those of tensorflow-datasets 4.9.10
# (`url_checksums`). The MD5 sums of Fashion-MNIST's decompressed files are in several independent
# places, for example the git-annex keys of github.com/datasets-mila/datasets--fashionmnist.
_SETS = {
    "mnist": _Set(
        "mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ("mnist", "MNIST/raw"),
        (
            _File(
                "train-images-idx3-ubyte",
                (60_000, 28, 28),
                "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            _File(
                "train-labels-idx1-ubyte",
                (60_000,),
                "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            _File(
                "t10k-images-idx3-ubyte",
                (10_000, 28, 28),
                "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            _File(
                "t10k-labels-idx1-ubyte",
                (10_000,),
                "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
    ),
    "fashion_mnist": _Set(
        "fashion_mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ("fashion_mnist", "FashionMNIST/raw"),
        (
            _File(
                "train-images-idx3-ubyte",
                (60_000, 28, 28),
                "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            _File(
                "train-labels-idx1-ubyte",
                (60_000,),
                "md5:9018921c3c673c538a1fc5bad174d6f9",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            _File(
                "t10k-images-idx3-ubyte",
                (10_000, 28, 28),
                "md5:8181f5470baa50b63fa0f6fddb340f0a",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            _File(
                "t10k-labels-idx1-ubyte",
                (10_000,),
                "md5:15d484375f8d13e6eb1aabb0c3f46965",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ),
    ),
}


# Where a set is looked for ----------------------------------------------------------------------


class _UnavailableError(Exception):
    """The set can be had neither from a folder nor from tensorflow-datasets; says why."""


def _whole(spec: _Set, data_dir: str | os.PathLike[str] | None) -> Dataset:
    """The set from the user's folder or from tensorflow-datasets, its bytes checked."""
    folder = _user_folder(spec, data_dir)
    paths = _tfds_files(spec) if folder is None else _files_in(folder, spec)
    arrays = [_read_idx(path, spec, file) for path, file in zip(paths, spec.files, strict=True)]
    counts = f"{len(arrays[1]):,} training and {len(arrays[3]):,} test images"
    place = "IDX files" if folder else "the downloads of tensorflow-datasets"
    return _dataset(spec.name, f"{counts} from {place} in {paths[0].parent}", *arrays)


def _user_folder(spec: _Set, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The folder that the argument or else the environment names, None if neither does."""
    argument, value = "`data_dir`", data_dir
    if value is None:
        # An empty variable counts as unset, as in most shells' idioms.
        argument, value = ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or None
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{argument} must be the path of a folder or None, got {value!r}.")
    folder = Path(value).expanduser()
    if not os.fspath(value) or not folder.is_dir():
        raise NotADirectoryError(
            f"{argument} must be a folder with the IDX files of {spec.name}, got {str(value)!r}, "
            f"which is {'a file' if folder.is_file() else 'not a folder'} (from {Path.cwd()})."
        )
    return folder


def _files_in(folder: Path, spec: _Set) -> list[Path]:
    """The paths of the set's four files, all in `folder` or all in one of its known subfolders."""
    places = [*(folder / name for name in spec.subfolders), folder]
    found = {place: [_spelled(place, file.name) for file in spec.files] for place in places}
    place = next((p for p in places if any(found[p])), folder)
    missing = [f.name for f, path in zip(spec.files, found[place], strict=True) if path is None]
    if missing:
        raise FileNotFoundError(
            f"{place} must hold the four IDX files of {spec.name}, plain or with .gz; missing: "
            f"{', '.join(missing)}. They are at {spec.url} (with .gz); subfolders that are looked "
            f"into: {', '.join(spec.subfolders)}."
        )
    return [path for path in found[place] if path is not None]


def _spelled(place: Path, name: str) -> Path | None:
    """The file `name` in `place`, gzipped or not; some copies have a dot before `idx`."""
    spellings = (name, name.replace("-idx", ".idx"))
    candidates = (place / f"{s}{suffix}" for s in spellings for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


# Reading and checking ---------------------------------------------------------------------------


def _read_idx(path: Path, spec: _Set, file: _File) -> np.ndarray:
    """The array in an IDX file (gzipped or not), its form and its digest checked."""
    again = f"Get it again from {spec.url}{file.name}.gz"
    data = _decompressed(path, again)
    start = _checked_header(path, data, file.shape, again)
    _check_digest(path, data, spec, file, again)
    # A copy, because an array on `bytes` is read-only and users shuffle in place.
    return np.frombuffer(data, np.uint8, offset=start).reshape(file.shape).copy()


def _decompressed(path: Path, again: str) -> bytes:
    """The file's bytes, unzipped if they are a gzip file (whatever its name says)."""
    data = path.read_bytes()
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise ValueError(f"{path} is truncated: its gzip stream breaks off. {again}.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is corrupt: it does not unzip ({error}). {again}.") from error


def _checked_header(path: Path, data: bytes, shape: tuple[int, ...], again: str) -> int:
    """The length of the IDX header, after checking it and the length of all.

    The format: two zero bytes, the type (8 = unsigned byte), the number of dimensions, each of
    these as a big-endian 32-bit integer, and then the entries, last dimension fastest.
    """
    header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
    if not header.startswith(data[:4]):
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes with {len(shape)} dimension(s): it "
            f"starts with {data[:4].hex(' ')}, not with {header[:4].hex(' ')}. {again}."
        )
    size = len(header) + math.prod(shape)
    if len(data) < size:
        raise ValueError(f"{path} is truncated: {len(data):,} bytes instead of {size:,}. {again}.")
    if not data.startswith(header):
        got = struct.unpack(f">{len(shape)}I", data[4 : len(header)])
        raise ValueError(f"{path} has the shape {got}, but must have {shape}. {again}.")
    if len(data) > size:
        raise ValueError(f"{path} is too long: {len(data):,} bytes, not {size:,}. {again}.")
    return len(header)


def _check_digest(path: Path, data: bytes, spec: _Set, file: _File, again: str) -> None:
    """Refuses bytes that are not those of the set's file, and says whose they are if known."""
    got = _digest_like(file.digest, data)
    if got == file.digest:
        return
    for other in _SETS.values():
        if any(_digest_like(f.digest, data) == f.digest for f in other.files):
            raise ValueError(
                f"{path} belongs to {other.name}, not to {spec.name} (both sets use the same file "
                f"names). Put each set into a subfolder of its own, called {spec.name} and "
                f"{other.name}."
            )
    raise ValueError(
        f"{path} is corrupt or not of {spec.name}: the digest of its decompressed bytes is {got}, "
        f"but must be {file.digest}. {again} and delete this one."
    )


def _digest_like(digest: str, data: bytes) -> str:
    """The digest of `data` in the form and by the algorithm of another digest."""
    algorithm = digest.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()}"


def _dataset(name: str, source: str, *arrays: np.ndarray) -> Dataset:
    """A `Dataset` from images without channels, labels, images, labels."""
    train_images, train_labels, test_images, test_labels = arrays
    return Dataset(
        train_images[..., None],  # (train, 28, 28) -> (train, 28, 28, 1)
        train_labels.astype(np.int32),
        test_images[..., None],
        test_labels.astype(np.int32),
        name,
        source,
    )


def _announced(dataset: Dataset) -> Dataset:
    print(f"{dataset.name}: {dataset.source}")
    return dataset


# Through tensorflow-datasets --------------------------------------------------------------------

_GZIP_MAGIC = b"\x1f\x8b"
_PROBE_SECONDS = 3.0


def _tfds_files(spec: _Set) -> list[Path]:
    """The set's gzip files from the cache of tensorflow-datasets, downloaded if they must be.

    Only its download manager is used: `tfds.load` and `tfds.data_source` need TensorFlow.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise _UnavailableError("tensorflow-datasets is not installed")
    data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    downloads = Path(data_dir).expanduser() / "downloads"
    return [
        _cached(downloads, spec, file) or _download(f"{spec.url}{file.name}.gz", spec, downloads)
        for file in spec.files
    ]


def _cached(downloads: Path, spec: _Set, file: _File) -> Path | None:
    """The file in the cache of tensorflow-datasets, whose names end with the base64 of the sum."""
    code = base64.urlsafe_b64encode(bytes.fromhex(file.gz_sha256)).decode().rstrip("=")
    places = (downloads / spec.name, downloads)  # the second is that of older versions
    return next((path for place in places for path in place.glob(f"*{code}.gz")), None)


def _probe(url: str, seconds: float) -> None:
    """Raises `_UnavailableError` unless `url` starts to send a gzip file within `seconds`.

    Without this an offline user waits more than three minutes: the download manager retries ten
    times, ever more slowly. `requests` asks because the manager uses it too, with the same
    proxies and certificates. It asks in a thread because its timeout leaves out the name server.
    """
    host = urllib.parse.urlsplit(url).netloc
    requests = _import_quietly("requests")
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with requests.get(url, stream=True, timeout=seconds) as response:
                status, start = response.status_code, response.raw.read(len(_GZIP_MAGIC))
        except Exception as error:  # whatever it is, a download would meet it too
            answers.put(f"{host} cannot be reached ({type(error).__name__})")
            return
        if status != 200:
            answers.put(f"{host} answered {status} for {url}")
        elif start != _GZIP_MAGIC:  # the login page of a hotel's network, for one
            answers.put(f"{host} sent something other than a gzip file for {url}")
        else:
            answers.put("")

    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answers.get(timeout=seconds)
    except queue.Empty:
        problem = f"{host} did not answer within {seconds:g} s"
    if problem:
        raise _UnavailableError(problem)


def _download(url: str, spec: _Set, downloads: Path) -> Path:
    """Lets tensorflow-datasets download a file: it writes beside, checks the sum, then renames.

    One file a call: when one of several at once fails, the others go on in the background, and
    Python waits for them at its exit, for minutes if the network is gone.
    """
    # Before the import and before any retries, so that whoever is offline need not wait for them.
    _probe(url, _PROBE_SECONDS)
    package = "tensorflow_datasets.core.download"
    manager_module = _import_quietly(f"{package}.download_manager")
    download_error = _import_quietly(f"{package}.util").DownloadError
    print(f"{spec.name}: downloading {url} to {downloads}")
    try:
        manager = manager_module.DownloadManager(download_dir=downloads, dataset_name=spec.name)
        return Path(manager.download(url))
    except manager_module.NonMatchingChecksumError as error:
        raise ValueError(
            f"A download of {spec.name} is corrupt and was not kept: {error}\nTry again, or pass "
            "`data_dir` with the files from elsewhere."
        ) from error
    except (OSError, download_error) as error:  # those of `requests` are OSErrors
        raise _UnavailableError(f"the download of {url} failed, {_brief(error)}") from error


def _import_quietly(module: str) -> Any:
    """Imports an optional module without its warnings; one that fails counts as unavailable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # a broken TensorFlow or protobuf beside it raises anything
        raise _UnavailableError(f"{module} cannot be imported, {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """An error in at most 200 characters of one line: those of `requests` are long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."


# The subset in the package ----------------------------------------------------------------------

_SUBSET_PATH = Path(__file__).parent / "data" / "mnist_subset.npz"

# Of the arrays' bytes, so that another zlib may compress them differently. Written by
# scripts/make_mnist_subset.py, which prints them.
_SUBSET_SHA256 = {
    "train_images": "2f7182bf021ffc5c1f62db987487f14d899b5c639f421a80f3095affc09a7db2",
    "train_labels": "2f345bad07338ec537641465e169cc4b7288a44244f251211c7f842641e7d927",
    "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}


def _subset_arrays() -> dict[str, np.ndarray]:
    """The four uint8 arrays of the package's file, checked, in `Dataset`'s order."""
    again = "Install sparsejax again, or run scripts/make_mnist_subset.py"
    try:
        # Opened here because NumPy leaves a file that is no zip open.
        with _SUBSET_PATH.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _SUBSET_SHA256}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{_SUBSET_PATH} is missing or corrupt ({_brief(error)}). {again}."
        ) from error
    for name, array in arrays.items():
        got = hashlib.sha256(array.tobytes()).hexdigest()
        if got != _SUBSET_SHA256[name]:
            raise ValueError(
                f"{_SUBSET_PATH} is corrupt: the sha256 of `{name}` is {got}, but must be "
                f"{_SUBSET_SHA256[name]}. {again}."
            )
    return arrays
