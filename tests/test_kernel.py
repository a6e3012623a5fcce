"""Which compiled kernels there are, and how calls that no `SparseMatrix` makes are refused."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import sparse_ops
from sparsejax.sparse_ops import _kernel

HEADERS = pathlib.Path(__file__).parents[1] / "csrc" / "third_party"
compiled = pytest.mark.skipif(_kernel._native()[0] is None, reason="names the compiled kernel")


class Native:
    """A module compiled for a processor whose best instructions are `isa`."""

    def __init__(self, isa):
        self.best_isa = lambda: isa


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch):
    monkeypatch.delenv("SPARSEJAX_BACKEND", raising=False)
    monkeypatch.delenv("SPARSEJAX_NUM_THREADS", raising=False)


def processor(monkeypatch, isa):
    native = (None, "no reason") if isa is None else (Native(isa), "")
    monkeypatch.setattr(_kernel, "_native", lambda: native)


@pytest.mark.parametrize(
    ("best", "name"), [(None, "jax"), (1, "plain"), (2, "avx2"), (3, "avx512")]
)
def test_backend_is_the_best_there_is(monkeypatch, best, name):
    processor(monkeypatch, best)
    assert sparse_ops.backend() == name
    assert _kernel.available() == (name != "jax")
    assert _kernel.isa() == (-1 if name == "jax" else 0)


@pytest.mark.parametrize(("name", "isa"), [("jax", -1), ("plain", 1), ("avx2", 2)])
def test_environment_forces_a_backend(monkeypatch, name, isa):
    processor(monkeypatch, 2)
    monkeypatch.setenv("SPARSEJAX_BACKEND", name)
    assert sparse_ops.backend() == name
    assert _kernel.isa() == isa


@pytest.mark.usefixtures("as_users_have_it")
def test_backend_refuses_an_unknown_name(monkeypatch):
    monkeypatch.setenv("SPARSEJAX_BACKEND", "AVX2")
    message = r"must be one of 'avx512', 'avx2', 'plain', 'jax', got 'AVX2'\. Unset it"
    with pytest.raises(ValueError, match=message):
        sparse_ops.backend()


@pytest.mark.usefixtures("as_users_have_it")
def test_backend_refuses_instructions_that_the_processor_lacks(monkeypatch):
    processor(monkeypatch, 2)
    monkeypatch.setenv("SPARSEJAX_BACKEND", "avx512")
    message = r"'avx512', which this processor does not have; to be had are 'plain', 'avx2', 'jax'"
    with pytest.raises(RuntimeError, match=message):
        sparse_ops.backend()


@pytest.mark.usefixtures("as_users_have_it")
def test_backend_refuses_a_kernel_that_was_not_compiled(monkeypatch):
    processor(monkeypatch, None)
    monkeypatch.setenv("SPARSEJAX_BACKEND", "plain")
    message = r"'plain', but the kernels are not installed \(no reason\); there is only 'jax'"
    with pytest.raises(RuntimeError, match=message):
        sparse_ops.backend()


def test_a_module_that_is_missing_or_does_not_load_is_no_error(monkeypatch):
    look = _kernel._load.__wrapped__
    monkeypatch.setitem(sys.modules, "sparsejax.sparse_ops._native", None)
    assert look() == (None, "they were not compiled when it was installed")

    def broken(name):
        raise ImportError(f"{name}: GLIBC_9.9 not found")

    monkeypatch.setattr(_kernel.importlib, "import_module", broken)
    assert look() == (None, "sparsejax.sparse_ops._native: GLIBC_9.9 not found")


@pytest.mark.parametrize(
    ("text", "limit"), [("", 0), ("1", 1), (" 12 ", 12), ("9" * 12, 2**31 - 1)]
)
def test_threads_are_those_of_the_environment(monkeypatch, text, limit):
    monkeypatch.setenv("SPARSEJAX_NUM_THREADS", text)
    assert _kernel.threads() == limit


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two"])
def test_threads_refuses_what_is_no_count(monkeypatch, text):
    monkeypatch.setenv("SPARSEJAX_NUM_THREADS", text)
    with pytest.raises(ValueError, match=rf"must be a whole number >= 1, got '{text}'\. Unset it"):
        _kernel.threads()


def test_headers_are_no_newer_than_jaxlib():
    """A handler with newer ones would take the whole CPU backend away."""

    def version(folder):
        text = (pathlib.Path(folder) / "xla" / "ffi" / "api" / "c_api.h").read_text()
        number = r"#define XLA_FFI_API_{} (\d+)"
        return [int(re.search(number.format(part), text)[1]) for part in ("MAJOR", "MINOR")]

    if not HEADERS.exists():
        pytest.skip("needs the sources")
    assert version(HEADERS) <= version(jax.ffi.include_dir())


# ---- Calls that are hand-made -----------------------------------------------------------

W = np.arange(16, dtype=np.float32).reshape(4, 4)
X = np.arange(12, dtype=np.float32).reshape(3, 4)
ARRAYS = {
    "values": W.reshape(-1),  # row by row: four sorted columns with the same number of entries
    "offs": np.repeat(np.arange(4, dtype=np.uint16), 4),
    "cnt": np.full(4, 4, np.uint16),
    "col": np.arange(4, dtype=np.uint16),
    "base": np.array([0, 16], np.int32),
}
REFUSALS = (ValueError, jax.errors.JaxRuntimeError)  # the former where JAX waits for the call
NUMBERS = {"kb": 4, "nt": 4, "width": 1, "isa": 0, "threads": 0}


def product(x=X, out=(3, 4), target="sparsejax_matmul", **changes):
    arrays = {name: changes.get(name, array) for name, array in ARRAYS.items()}
    numbers = NUMBERS | {k: v for k, v in changes.items() if k not in ARRAYS}
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(out, jnp.float32))
    return call(x, *arrays.values(), **{name: np.int64(n) for name, n in numbers.items()})


@compiled
def test_a_hand_made_structure_is_multiplied():
    np.testing.assert_array_equal(product(), X @ W)
    np.testing.assert_array_equal(product(values=W.reshape(-1).astype(jnp.bfloat16)), X @ W)


@compiled
@pytest.mark.parametrize(
    "change",
    [
        {"offs": ARRAYS["offs"] + np.uint16(1)},
        {"offs": ARRAYS["offs"][1:]},
        {"cnt": np.full(4, 5, np.uint16)},
        {"col": ARRAYS["col"] + np.uint16(1)},
        {"col": np.zeros(4, np.uint16)},
        {"base": np.array([0, 15], np.int32)},
        {"base": np.array([-1, 15], np.int32)},
        {"base": np.array([0, 2**31 - 1], np.int32)},
        {"values": W.reshape(-1)[1:]},
        {"values": np.zeros(16, np.int32)},
        {"kb": 0},
        {"kb": 2**16},
        {"kb": -(2**63)},
        {"nt": 3},
        {"nt": 8},
        {"width": 2},
        {"width": 8},
        {"x": X[0]},
        {"x": X[:, :3]},
        {"x": X[:2]},
        {"out": (3, 5)},
    ],
    ids=str,
)
def test_a_corrupted_structure_is_refused(change):
    with pytest.raises(REFUSALS, match=r"INVALID_ARGUMENT: sparsejax: "):
        jax.block_until_ready(product(**change))


WINDOW = {"kh": 2, "kw": 2, "stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1}
WINDOW |= {"pad_top": 0, "pad_left": 0}
IMAGES = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)


@compiled
def test_a_hand_made_convolution_is_computed():
    y = product(IMAGES, (1, 2, 2, 4), "sparsejax_conv", **WINDOW)
    patches = [IMAGES[0, i : i + 2, j : j + 2, 0].reshape(4) for i in (0, 1) for j in (0, 1)]
    np.testing.assert_array_equal(y.reshape(4, 4), np.array(patches) @ W)


@compiled
@pytest.mark.parametrize(
    "change",
    [
        {"kh": 3},
        {"kh": 0},
        {"kw": -2},
        {"kh": 2**62},
        {"stride_h": 0},
        {"stride_w": 2**40},
        {"dilation_h": 0},
        {"pad_top": 2**31},
        {"pad_left": -(2**63)},
        {"offs": ARRAYS["offs"] + np.uint16(1)},
        {"x": X},
        {"x": np.concatenate([IMAGES] * 2)},
        {"x": np.concatenate([IMAGES] * 2, 3)},
        {"out": (1, 2, 2, 5)},
    ],
    ids=str,
)
def test_a_corrupted_convolution_is_refused(change):
    good = {"x": IMAGES, "out": (1, 2, 2, 4), "target": "sparsejax_conv"} | WINDOW
    with pytest.raises(REFUSALS, match=r"INVALID_ARGUMENT: sparsejax: "):
        jax.block_until_ready(product(**good | change))
