"""The sets in these tests are tiny ones of random bytes, unless a test needs the real one."""

import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import os
import re
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sparsejax import datasets

ROOT = Path(__file__).resolve().parents[1]
WHOLE_MNIST = ROOT.parent / "shared" / "data" / "mnist"
REAL_SETS = datasets._SETS
NAMES = [file.name for file in REAL_SETS["mnist"].files]

needs_whole_mnist = pytest.mark.skipif(
    not WHOLE_MNIST.is_dir(), reason=f"the whole MNIST is not at {WHOLE_MNIST}"
)


# Tiny sets, their files and a server ------------------------------------------------------------


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def tiny_arrays(seed):
    rng = np.random.default_rng(seed)
    shapes = [(12, 28, 28), (12,), (5, 28, 28), (5,)]
    return [rng.integers(0, 10, shape, dtype=np.uint8) for shape in shapes]


ARRAYS = {"mnist": tiny_arrays(0), "fashion_mnist": tiny_arrays(1)}
PLAIN = {
    name: {n: idx_bytes(a) for n, a in zip(NAMES, arrays, strict=True)}
    for name, arrays in ARRAYS.items()
}


def zipped(data):
    return gzip.compress(data, mtime=0)


def tiny_set(name, url):
    files = tuple(
        datasets._File(
            file,
            array.shape,
            # The algorithms of the real sets.
            datasets._digest_like(REAL_SETS[name].files[0].digest, PLAIN[name][file]),
            hashlib.sha256(zipped(PLAIN[name][file])).hexdigest(),
        )
        for file, array in zip(NAMES, ARRAYS[name], strict=True)
    )
    return REAL_SETS[name]._replace(url=url, files=files)


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def all_zipped(name):
    return {f"{file}.gz": zipped(data) for file, data in PLAIN[name].items()}


def assert_holds(dataset, name):
    train_images, train_labels, test_images, test_labels = ARRAYS[name]
    np.testing.assert_array_equal(dataset.train_images, train_images[..., None])
    np.testing.assert_array_equal(dataset.train_labels, train_labels)
    np.testing.assert_array_equal(dataset.test_images, test_images[..., None])
    np.testing.assert_array_equal(dataset.test_labels, test_labels)
    assert dataset.name == name


def assert_is_subset(dataset):
    assert dataset.train_images.shape == dataset.test_images.shape == (10_000, 28, 28, 1)


class Server:
    """Serves `files` by the last part of the address; remembers what it was asked."""

    def __init__(self):
        self.files = {}
        self.asked = []
        self.hangs = False
        self.missing_bytes = {}  # file name -> how many bytes it promises and does not send
        self.end = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                del args

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        self.asked.append(request.path)
        if self.hangs:
            self.end.wait(10)
            request.close_connection = True
            return
        name = request.path.rpartition("/")[2]
        body = self.files.get(name, b"no such file")
        request.send_response(200 if name in self.files else 404)
        request.send_header("Content-Length", str(len(body) + self.missing_bytes.get(name, 0)))
        request.end_headers()
        with contextlib.suppress(ConnectionError):  # the probe hangs up early
            request.wfile.write(body)

    def close(self):
        self.end.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    served = Server()
    yield served
    served.close()


def point_at(url, monkeypatch):
    sets = {name: tiny_set(name, url) for name in REAL_SETS}
    monkeypatch.setattr(datasets, "_SETS", sets)


@pytest.fixture(autouse=True)
def _hermetic(monkeypatch, tmp_path):
    """No test reaches the internet or the user's folders, whatever the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv(datasets.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    point_at("http://127.0.0.1:9/", monkeypatch)  # the discard port: nobody listens


@pytest.fixture
def no_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


@pytest.fixture
def online(server, monkeypatch):
    """A server with the files of MNIST, and MNIST's address pointing at it."""
    server.files = all_zipped("mnist")
    point_at(server.url, monkeypatch)
    return server


# A folder of IDX files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_set_reads_plain_files(name, tmp_path):
    write_files(tmp_path, PLAIN[name])
    assert_holds(getattr(datasets, name)(tmp_path), name)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_set_reads_gzipped_files(name, tmp_path):
    write_files(tmp_path, all_zipped(name))
    assert_holds(getattr(datasets, name)(str(tmp_path)), name)


def test_mnist_reads_a_mixture_of_plain_gzipped_and_misnamed_files(tmp_path):
    # A browser may unzip a download and keep its name, or the other way round.
    first, second, third, fourth = NAMES
    data = PLAIN["mnist"]
    files = {
        first: data[first],
        f"{second}.gz": zipped(data[second]),
        f"{third}.gz": data[third],
        fourth: zipped(data[fourth]),
    }
    assert_holds(datasets.mnist(write_files(tmp_path, files)), "mnist")


def test_mnist_reads_names_with_a_dot(tmp_path):
    files = {name.replace("-idx", ".idx"): data for name, data in PLAIN["mnist"].items()}
    assert_holds(datasets.mnist(write_files(tmp_path, files)), "mnist")


@pytest.mark.parametrize(
    "folders",
    [("mnist", "fashion_mnist"), ("MNIST/raw", "FashionMNIST/raw"), (".", "fashion_mnist")],
)
def test_one_folder_serves_both_sets(folders, tmp_path, monkeypatch):
    write_files(tmp_path / folders[0], PLAIN["mnist"])
    write_files(tmp_path / folders[1], PLAIN["fashion_mnist"])
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, str(tmp_path))
    assert_holds(datasets.mnist(), "mnist")
    assert_holds(datasets.fashion_mnist(), "fashion_mnist")


def test_mnist_expands_the_home_folder(tmp_path, monkeypatch):
    # `--data-dir=~/digits` reaches Python as it is: shells expand ~ only at the start of a word.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_files(tmp_path / "digits", PLAIN["mnist"])
    assert_holds(datasets.mnist("~/digits"), "mnist")


def test_mnist_gives_arrays_that_the_user_may_change(tmp_path):
    dataset = datasets.mnist(write_files(tmp_path, PLAIN["mnist"]))
    assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.dtype == np.int32
    for array in dataset[:4]:
        array[0] = 0


def test_mnist_says_which_folder_it_read(tmp_path, capsys):
    dataset = datasets.mnist(write_files(tmp_path, PLAIN["mnist"]))
    assert dataset.source == f"12 training and 5 test images from IDX files in {tmp_path}"
    assert capsys.readouterr().out == f"mnist: {dataset.source}\n"


def test_mnist_names_missing_files(tmp_path):
    files = dict(PLAIN["mnist"])
    del files["t10k-labels-idx1-ubyte"]
    write_files(tmp_path, files)
    wanted = re.escape(str(tmp_path)) + r" must hold .*; missing: t10k-labels-idx1-ubyte\. They"
    with pytest.raises(FileNotFoundError, match=wanted):
        datasets.mnist(tmp_path)


def test_mnist_names_all_files_of_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"missing: {', '.join(NAMES)}"):
        datasets.mnist(tmp_path)


def test_mnist_refuses_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(NotADirectoryError, match=r"`data_dir` must be a folder .*not a folder"):
        datasets.mnist(tmp_path / "absent")


def test_mnist_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"`data_dir` must be a folder .*is a file"):
        datasets.mnist(tmp_path / "file")


def test_mnist_refuses_an_empty_path():
    with pytest.raises(NotADirectoryError, match=r"`data_dir` must be a folder .*got ''"):
        datasets.mnist("")


def test_mnist_refuses_what_is_no_path():
    with pytest.raises(TypeError, match="data_dir"):
        datasets.mnist(5)


def test_mnist_names_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(NotADirectoryError, match=r"^SPARSEJAX_DATA_DIR must be a folder"):
        datasets.mnist()


@pytest.mark.parametrize(
    ("asked", "held"), [("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")]
)
def test_set_refuses_the_files_of_the_other(asked, held, tmp_path, monkeypatch):
    write_files(tmp_path, PLAIN[held])
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, str(tmp_path))
    wanted = f"train-images-idx3-ubyte belongs to {held}, not to {asked} .*subfolder of its own"
    with pytest.raises(ValueError, match=wanted):
        getattr(datasets, asked)()


# Files that are not what they should be ---------------------------------------------------------

GOOD = PLAIN["mnist"]["train-images-idx3-ubyte"]
FLIPPED = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
BAD_FILES = {
    "empty": (b"", "is truncated: 0 bytes instead of 9,424"),
    "short header": (GOOD[:7], "is truncated: 7 bytes"),
    "short": (GOOD[:-1], "is truncated: 9,423 bytes instead of 9,424"),
    "short gzip": (zipped(GOOD)[:-20], "is truncated: its gzip stream"),
    "gzip of short": (zipped(GOOD[:-1]), "is truncated: 9,423 bytes"),
    "bad gzip": (zipped(GOOD)[:50] + b"\xff" * 50 + zipped(GOOD)[100:], "is corrupt: it does not"),
    "bad gzip header": (b"\x1f\x8b\x00" + zipped(GOOD)[3:], "is corrupt: it does not unzip"),
    "labels": (
        PLAIN["mnist"]["train-labels-idx1-ubyte"],
        r"is not an IDX file .*3 dimension.*starts with 00 00 08 01, not with 00 00 08 03",
    ),
    "web page": (b"<html>", "is not an IDX file .*starts with 3c 68 74 6d"),
    "test images": (
        PLAIN["mnist"]["t10k-images-idx3-ubyte"] + bytes(len(GOOD)),
        r"has the shape \(5, 28, 28\), but must have \(12, 28, 28\)",
    ),
    "long": (GOOD + b"\n", "is too long: 9,425 bytes, not 9,424"),
    "one bit": (FLIPPED, "is corrupt or not of mnist: the digest .*sha256:.*, but must be sha256:"),
    "one bit, gzip": (zipped(FLIPPED), "is corrupt or not of mnist: the digest"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_mnist_names_a_bad_file_and_where_to_get_it(kind, tmp_path, capsys):
    data, wanted = BAD_FILES[kind]
    write_files(tmp_path, PLAIN["mnist"] | {NAMES[0]: data})
    with pytest.raises(ValueError, match=f"{NAMES[0]} {wanted}") as caught:
        datasets.mnist(tmp_path)
    assert f"Get it again from http://127.0.0.1:9/{NAMES[0]}.gz" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert capsys.readouterr().out == ""  # no fallback


def test_fashion_mnist_checks_the_digest(tmp_path):
    data = PLAIN["fashion_mnist"][NAMES[3]]
    write_files(tmp_path, PLAIN["fashion_mnist"] | {NAMES[3]: data[:-1] + b"\xff"})
    with pytest.raises(ValueError, match=r"not of fashion_mnist: the digest .* must be md5:"):
        datasets.fashion_mnist(tmp_path)


# The order of places ----------------------------------------------------------------------------


def test_mnist_prefers_the_argument_to_the_environment(tmp_path, monkeypatch):
    write_files(tmp_path / "good", PLAIN["mnist"])
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, str(tmp_path / "absent"))
    assert_holds(datasets.mnist(tmp_path / "good"), "mnist")


def test_mnist_prefers_the_environment_to_a_download(tmp_path, monkeypatch, online):
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, str(write_files(tmp_path, PLAIN["mnist"])))
    assert_holds(datasets.mnist(), "mnist")
    assert online.asked == []


def test_mnist_prefers_a_download_to_the_subset(tmp_path, online, capsys):
    dataset = datasets.mnist()
    assert_holds(dataset, "mnist")
    downloads = tmp_path / "tfds" / "downloads"
    lines = [f"mnist: downloading {online.url}{name}.gz to {downloads}" for name in NAMES]
    last = "12 training and 5 test images from the downloads of tensorflow-datasets in"
    lines.append(f"mnist: {last} {downloads / 'mnist'}")
    assert capsys.readouterr().out.splitlines() == lines


def test_mnist_takes_an_empty_variable_as_unset(monkeypatch, no_tfds):
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, "")
    assert_is_subset(datasets.mnist())


def test_mnist_without_tensorflow_datasets_gives_the_subset(no_tfds, online, capsys):
    assert_is_subset(datasets.mnist())
    assert online.asked == []
    assert capsys.readouterr().out == (
        "mnist: 10,000 training and 10,000 test digits embedded in sparsejax "
        "(not the whole set: tensorflow-datasets is not installed)\n"
    )


def test_fashion_mnist_without_a_place_says_what_to_do(no_tfds):
    wanted = (
        r"not inside sparsejax and cannot be downloaded: tensorflow-datasets is not installed\. "
        r"Either pass `data_dir` \(or set SPARSEJAX_DATA_DIR\), a folder that holds "
        rf"{', '.join(NAMES)}, .* or `pip install 'sparsejax\[examples\]'` and go online"
    )
    with pytest.raises(FileNotFoundError, match=wanted):
        datasets.fashion_mnist()


# Through tensorflow-datasets --------------------------------------------------------------------


def assert_subset_because(reason, capsys):
    assert_is_subset(datasets.mnist())
    assert re.search(rf"\(not the whole set: .*{reason}.*\)\n$", capsys.readouterr().out)


def test_mnist_offline_gives_the_subset(capsys):
    assert_subset_because(r"127\.0\.0\.1:9 cannot be reached \(ConnectionError\)", capsys)


def test_fashion_mnist_offline_says_so():
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded: 127.0.0.1:9 cannot be rea"):
        datasets.fashion_mnist()


def test_mnist_does_not_wait_for_a_server_that_hangs(online, monkeypatch, capsys):
    online.hangs = True
    monkeypatch.setattr(datasets, "_PROBE_SECONDS", 0.2)
    start = time.monotonic()
    # The thread and the connection run out at the same moment; either may be the one that tells.
    assert_subset_because("127.0.0.1:[0-9]+ (did not answer within 0.2 s|cannot be rea)", capsys)
    assert time.monotonic() - start < 1


def test_mnist_does_not_wait_for_a_name_server_that_hangs(monkeypatch, capsys):
    release = threading.Event()

    def never(*args, **kwargs):
        del args, kwargs
        release.wait(10)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(datasets, "_PROBE_SECONDS", 0.2)
    point_at("http://mnist.invalid/", monkeypatch)
    start = time.monotonic()
    assert_subset_because("mnist.invalid did not answer within 0.2 s", capsys)
    assert time.monotonic() - start < 1
    release.set()


def test_mnist_takes_a_login_page_as_offline(online, capsys):
    online.files = dict.fromkeys(online.files, b"<html>log in</html>")
    assert_subset_because("sent something other than a gzip file", capsys)


def test_mnist_takes_an_error_of_the_server_as_offline(online, capsys):
    online.files = {}
    assert_subset_because("answered 404", capsys)


def test_mnist_says_when_a_download_breaks_off(online, capsys):
    online.missing_bytes = {f"{NAMES[3]}.gz": 10}
    assert_subset_because(f"the download of {online.url}{NAMES[3]}.gz failed, ", capsys)


def test_mnist_does_not_retry_when_the_network_is_lost_between_two_files(online, capsys):
    del online.files[f"{NAMES[1]}.gz"]
    assert_subset_because("answered 404", capsys)
    assert sum(NAMES[1] in path for path in online.asked) == 1


def test_mnist_says_when_tensorflow_datasets_does_not_import(online, monkeypatch, capsys):
    module = "tensorflow_datasets.core.download.download_manager"
    monkeypatch.setitem(sys.modules, module, None)
    assert_subset_because(f"{module} cannot be imported, ", capsys)


def test_mnist_refuses_a_corrupt_download(online):
    online.files[f"{NAMES[0]}.gz"] = zipped(FLIPPED)
    with pytest.raises(ValueError, match="is corrupt or not of mnist: the digest"):
        datasets.mnist()


def test_fashion_mnist_refuses_a_download_that_tensorflow_datasets_refuses(
    server, monkeypatch, tmp_path
):
    # The real address, whose sums tensorflow-datasets knows; the proxy sends other bytes.
    monkeypatch.setattr(datasets, "_SETS", REAL_SETS)
    monkeypatch.setenv("http_proxy", server.url)
    server.files = all_zipped("fashion_mnist")
    with pytest.raises(ValueError, match=r"(?s)download of fashion_mnist is corrupt.*data_dir"):
        datasets.fashion_mnist()
    assert not list((tmp_path / "tfds").rglob("*.INFO"))  # not kept for the next call


def test_mnist_downloads_through_a_proxy(online, monkeypatch):
    point_at("http://mnist.invalid/", monkeypatch)
    monkeypatch.setenv("http_proxy", online.url)
    assert_holds(datasets.mnist(), "mnist")
    assert f"http://mnist.invalid/{NAMES[0]}.gz" in online.asked


@pytest.mark.parametrize("subfolder", ["mnist", "."])
def test_mnist_offline_reads_what_was_downloaded_before(subfolder, tmp_path, capsys):
    # The names under which tensorflow-datasets keeps files whose sums it knows.
    resource = pytest.importorskip("tensorflow_datasets.core.download.resource")
    spec = datasets._SETS["mnist"]
    files = {
        resource.get_dl_fname(f"{spec.url}{file.name}.gz", file.gz_sha256): zipped(
            PLAIN["mnist"][file.name]
        )
        for file in spec.files
    }
    folder = write_files(tmp_path / "tfds" / "downloads" / subfolder, files)
    assert_holds(datasets.mnist(), "mnist")
    assert f"of tensorflow-datasets in {folder}" in capsys.readouterr().out


def test_addresses_and_sums_are_those_of_tensorflow_datasets():
    checksums = pytest.importorskip("tensorflow_datasets.core.download.checksums")
    known = checksums.get_all_url_infos()
    for spec in REAL_SETS.values():
        for file in spec.files:
            assert known[f"{spec.url}{file.name}.gz"].checksum == file.gz_sha256


# The subset and its script ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_mnist_subset", ROOT / "scripts" / "make_mnist_subset.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def real_sets(monkeypatch):
    monkeypatch.setattr(datasets, "_SETS", REAL_SETS)


def test_mnist_subset_prints_nothing(capsys):
    assert datasets.mnist_subset().source.endswith("digits embedded in sparsejax")
    assert capsys.readouterr().out == ""


def test_mnist_subset_is_small():
    assert datasets._SUBSET_PATH.stat().st_size < 3_400_000


def test_mnist_subset_test_images_are_mnists():
    # An IDX file is a header and the pixels, so the set's own sum applies: no whole MNIST needed.
    file = REAL_SETS["mnist"].files[2]
    pixels = datasets.mnist_subset().test_images[..., 0]
    assert datasets._digest_like(file.digest, idx_bytes(pixels)) == file.digest


@needs_whole_mnist
def test_mnist_subset_is_the_start_of_the_whole(real_sets):
    whole, subset = datasets.mnist(WHOLE_MNIST), datasets.mnist_subset()
    assert whole.train_images.shape == (60_000, 28, 28, 1)
    np.testing.assert_array_equal(subset.train_images, whole.train_images[:10_000])
    np.testing.assert_array_equal(subset.train_labels, whole.train_labels[:10_000])
    np.testing.assert_array_equal(subset.test_images, whole.test_images)
    np.testing.assert_array_equal(subset.test_labels, whole.test_labels)


@needs_whole_mnist
def test_script_reproduces_the_subset(script, tmp_path, real_sets, monkeypatch):
    arrays = script.subset(WHOLE_MNIST)
    script.write(arrays, tmp_path / "subset.npz")
    monkeypatch.setattr(datasets, "_SUBSET_PATH", tmp_path / "subset.npz")
    again = datasets._subset_arrays()  # checks the sums
    assert list(again) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)


def test_script_writes_the_same_bytes_at_any_time(script, tmp_path, monkeypatch):
    arrays = {"a": np.arange(5, dtype=np.uint8)}
    script.write(arrays, tmp_path / "one.npz")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    script.write(arrays, tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_script_that_fails_leaves_the_old_file(script, tmp_path, monkeypatch):
    def fail(file, **arrays):
        del arrays
        file.write(b"half")
        raise OSError("disk full")

    (tmp_path / "subset.npz").write_bytes(b"old")
    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        script.write({}, tmp_path / "subset.npz")
    assert os.listdir(tmp_path) == ["subset.npz"]
    assert (tmp_path / "subset.npz").read_bytes() == b"old"


def damaged(data):
    return data[:1000] + bytes(100) + data[1100:]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1000],
        lambda data: data[:1000],
        damaged,
        lambda data: b"",
        lambda d: b"x",
    ],
    ids=["no end", "start only", "damaged", "empty", "other"],
)
def test_mnist_names_a_corrupt_package_file(change, tmp_path, monkeypatch, no_tfds):
    path = tmp_path / "mnist_subset.npz"
    path.write_bytes(change(datasets._SUBSET_PATH.read_bytes()))
    monkeypatch.setattr(datasets, "_SUBSET_PATH", path)
    with pytest.raises(
        ValueError, match=r"mnist_subset.npz is missing or corrupt .*sparsejax again"
    ):
        datasets.mnist()


def test_mnist_subset_names_a_missing_package_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_SUBSET_PATH", tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"absent.npz is missing or corrupt \(FileNotFoundError"):
        datasets.mnist_subset()


def test_mnist_subset_checks_the_arrays(tmp_path, monkeypatch):
    arrays = datasets._subset_arrays()
    arrays["test_labels"][0] += 1
    np.savez(tmp_path / "changed.npz", **arrays)
    monkeypatch.setattr(datasets, "_SUBSET_PATH", tmp_path / "changed.npz")
    with pytest.raises(ValueError, match=r"changed.npz is corrupt: the sha256 of `test_labels` is"):
        datasets.mnist_subset()
