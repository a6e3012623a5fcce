"""The compiled kernels: whether there are any, which instructions they use, on how many threads."""

import functools
import importlib
import os
import threading
from typing import Any, Literal, TypeAlias, cast, get_args

import jax

Backend: TypeAlias = Literal["avx512", "avx2", "plain", "jax"]
"""Instructions of the compiled kernels, or `"jax"`: no kernel, the same by XLA's dense products."""

_ISAS: dict[Backend, int] = {"plain": 1, "avx2": 2, "avx512": 3}
_BACKEND, _THREADS = "SPARSEJAX_BACKEND", "SPARSEJAX_NUM_THREADS"
_loading = threading.Lock()


def backend() -> Backend:
    """Says what multiplies sparse matrices on the CPU.

    The kernels are compiled when sparsejax is installed where a C++ compiler is, and use the best
    instructions of the processor that they run on. Everywhere else, and on GPU and TPU, XLA
    multiplies masked dense matrices: the same results without the speed.

    Two environment variables have a say in what is traced from then on: `SPARSEJAX_BACKEND` forces
    one of the four, and `SPARSEJAX_NUM_THREADS` limits the kernels' threads (default: one for each
    processor that the process may use; the first large product reads it, too, and from then on it
    can only be lowered).

    Returns:
      `"avx512"`, `"avx2"` or `"plain"` (C++ without special instructions; on ARM it is NEON, which
      compilers use by themselves), or `"jax"`: no compiled kernel.

    Raises:
      ValueError: `SPARSEJAX_BACKEND` is none of the four.
      RuntimeError: what `SPARSEJAX_BACKEND` forces is not to be had here.

    Example:
      >>> from sparsejax import sparse_ops
      >>> sparse_ops.backend() in ("avx512", "avx2", "plain", "jax")
      True
    """
    forced = _forced()
    if forced == "jax":
        return forced
    native, reason = _native()
    if native is None:
        if forced:
            raise RuntimeError(
                f"{_BACKEND} is {forced!r}, but the kernels are not installed ({reason}); there is "
                "only 'jax'. Install sparsejax again where a C++ compiler is, or unset it."
            )
        return "jax"
    best = native.best_isa()
    if forced and _ISAS[forced] > best:
        had = [name for name, isa in _ISAS.items() if isa <= best]
        raise RuntimeError(
            f"{_BACKEND} is {forced!r}, which this processor does not have; to be had are "
            f"{', '.join(map(repr, [*had, 'jax']))}. Set one of these, or unset it."
        )
    if forced:
        return forced
    return next(name for name, isa in _ISAS.items() if isa == best)


def available() -> bool:
    """Whether programs for the CPU may call the kernels; their targets are registered then."""
    return backend() != "jax"


def load() -> None:
    """Registers the targets, for programs that were exported elsewhere."""
    _native()


def isa() -> int:
    """What calls give as `isa`: 0 for the best where they run, 1 to 3 if forced; -1: no calls."""
    if not available():
        return -1
    forced = _forced()
    return _ISAS[forced] if forced else 0


def threads() -> int:
    """What calls give as `threads`: the limit that `SPARSEJAX_NUM_THREADS` sets, 0 for none."""
    text = os.environ.get(_THREADS, "").strip()
    if not text:
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"{_THREADS} must be a whole number >= 1, got {text!r}. Unset it for all processors."
        )
    return min(int(text), 2**31 - 1)


def _forced() -> Backend | None:
    """The backend that the environment demands."""
    text = os.environ.get(_BACKEND, "")
    if text and text not in get_args(Backend):
        raise ValueError(
            f"{_BACKEND} must be one of {', '.join(map(repr, get_args(Backend)))}, got {text!r}. "
            "Unset it for the best there is."
        )
    return cast(Backend, text) if text else None


def _native() -> tuple[Any, str]:
    """The extension module, its targets registered, or None and why not; looked for once."""
    with _loading:
        return _load()


@functools.cache
def _load() -> tuple[Any, str]:
    try:
        native: Any = importlib.import_module("sparsejax.sparse_ops._native")
    except ModuleNotFoundError:
        return None, "they were not compiled when it was installed"
    except ImportError as error:
        return None, str(error)
    for target, handler in native.handlers().items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return native, ""
