"""Whether a sparse product gains: by a table that is shipped, or measured on this machine."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import os
from pathlib import Path

import jax
import numpy as np

from sparsejax import _leaves
from sparsejax.sparse_ops import _kernel, _measurement, _memory
from sparsejax.sparse_ops._product import Crossover, Product

# Smaller products are not worth a call, whatever their density.
_FEWEST_FLOPS = 2**10

# Speed-ups over dense XLA, cold, of large weights in float32: a row for each density (the last is
# guessed), a column for each number of rows of x. AVX-512: Zen 4, 4096 x 4096; AVX2: the lower of
# that and Zen 3, 2048 x 2048; plain: Zen 3.
_DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
_ROWS = (1, 8, 64, 256)
_TABLES: dict[str, list[list[float]]] = {
    "avx512": [
        [20, 21, 29, 27],
        [11, 11, 11, 11],
        [6.8, 6.8, 5.9, 6.1],
        [3.5, 4.6, 4.1, 3.6],
        [1.6, 2.3, 1.8, 1.5],
        [0.8, 1.0, 0.9, 0.7],
    ],
    "avx2": [
        [8, 20, 19, 12],
        [4.4, 11, 9, 5.7],
        [3.7, 7, 5.5, 5.2],
        [3.3, 4.6, 3.9, 3.1],
        [1.2, 2.3, 1.6, 1.3],
        [0.7, 1.0, 0.8, 0.7],
    ],
    "plain": [
        [11, 20, 19, 18],
        [6, 12, 5.5, 3.4],
        [3.1, 8, 4, 2.7],
        [2, 6, 1.5, 1.0],
        [0.7, 2, 0.8, 0.5],
        [0.4, 0.9, 0.4, 0.25],
    ],
}
# The same of 3 x 3 convolutions of 1 to 64 images, for all of them: AVX2, the lowest of
# eight on Zen 3; AVX-512 as AVX2, plain guessed low.
_CONVOLUTIONS: dict[str, list[float]] = {
    "avx512": [6, 4.5, 3.2, 2.5, 1.3, 0.7],
    "avx2": [6, 4.5, 3.2, 2.5, 1.3, 0.7],
    "plain": [2, 1.5, 1.2, 0.8, 0.4, 0.2],
}
# A dense product of these cores takes as long as its bytes or its operations, in seconds; a call of
# the kernel takes so much longer than none.
_PER_BYTE, _PER_FLOP, _CALL = 1 / 2e10, 1 / 1e11, 8e-6


def never_here() -> str:
    """Why no product gains in this process; empty where some may."""
    if _kernel.backend() == "jax":
        return "there is no compiled kernel: sparse_ops.backend() is 'jax'"
    if jax.default_backend() != "cpu":
        return f"products skip zeros on CPUs, not on {jax.default_backend()}"
    return ""


def shipped(product: Product) -> float:
    """The speed-up of a product by a table that comes with the package.

    The table holds what two processors had to say (Zen 4 with AVX-512, Zen 3 with AVX2), against
    dense XLA on the same; between its densities and numbers of rows it is interpolated, in
    logarithms, and small products pay for a call. It is the same on all machines of a backend,
    which is what several processes that must build the same program need; `measured` is more exact.

    Args:
      product: its sizes.

    Returns:
      How many times faster than dense XLA it is expected to be; 0 where nothing is gained: without
      a compiled kernel, on GPU and TPU, with fewer than 2**10 operations.

    Example:
      >>> from sparsejax import sparse_ops
      >>> sparse_ops.shipped(sparse_ops.Product((1, 10), (10, 10), density=0.1))
      0.0
    """
    if _hopeless(product):
        return 0.0
    if product.kind == "conv":
        by_density = np.log(_CONVOLUTIONS[_kernel.backend()])
    else:
        rows = np.log(np.clip(product.rows, _ROWS[0], _ROWS[-1]))
        table = np.log(_TABLES[_kernel.backend()])
        by_density = np.array([np.interp(rows, np.log(_ROWS), line) for line in table])
    density = np.log(np.clip(product.density, _DENSITIES[0], _DENSITIES[-1]))
    large = float(np.exp(np.interp(density, np.log(_DENSITIES), by_density)))
    dense = max(4 * math.prod(product.w) * _PER_BYTE, product.flops * _PER_FLOP)
    return dense / (dense / large + _CALL)


def measured(cache: str | os.PathLike[str] | None = None) -> Crossover:
    """Speed-ups that are measured on this machine, each once.

    A product that was not met before is built with random weights of its shape and density, dense
    and sparse, and the two are timed in turns: half a second, or a few for the largest weights
    (4096 x 4096 is packed in one or two). What comes out is kept in a file, by processor and
    number of cores, backend, threads, the kernel and the versions of JAX; a machine that is busy
    while it measures gives figures that are off: delete the file then.

    Args:
      cache: the file, JSON; by default `sparsejax/crossover.json` in `$XDG_CACHE_HOME` or
        `~/.cache`. Where it cannot be written, the figures last as long as the function returned.

    Returns:
      A function from `Product` to the time of the dense product over that of the sparse one; 0
      where nothing is gained, as in `shipped`.

    Raises:
      TypeError: if `cache` is no path.

    Warns:
      UserWarning: when called, if the file is damaged; it is made anew.

    Example:
      >>> from sparsejax import sparse_ops
      >>> crossover = sparse_ops.measured()
      >>> crossover(sparse_ops.Product((1, 10), (10, 10), density=0.1))  # too small
      0.0
    """
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise TypeError(
            f"`cache` must be the path of a file, or None, got {_leaves.brief(cache)}; for example "
            "'crossover.json'."
        )
    found: dict[tuple[str, str], float] = {}

    def crossover(product: Product) -> float:
        if _hopeless(product):
            return 0.0
        file = _memory.default_file() if cache is None else Path(cache).expanduser()
        product = _measurement.representative(product)
        machine, name = _machine(), repr(product)
        if (machine, name) not in found:
            figures = _memory.recall(file, machine)
            found.update({(machine, key): figure for key, figure in figures.items()})
        if (machine, name) not in found:
            # Also where something is being traced: what is timed are programs, not tracing.
            with jax.ensure_compile_time_eval():
                found[machine, name] = round(_measurement.speed_up(product), 3)
            _memory.remember(file, machine, name, found[machine, name])
        return found[machine, name]

    return crossover


def _hopeless(product: Product) -> bool:
    return bool(never_here()) or product.flops < _FEWEST_FLOPS


def _machine() -> str:
    """Whatever else a speed-up depends on."""
    threads = _kernel.threads() or "all"
    return (
        f"{_memory.processor()}, {threads} threads, {_kernel.backend()} kernel {_kernel_digest()}, "
        f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}, "
        f"XLA_FLAGS {os.environ.get('XLA_FLAGS', '')!r}"
    )


@functools.cache
def _kernel_digest() -> str:
    found = importlib.util.find_spec("sparsejax.sparse_ops._native")
    content = Path(found.origin).read_bytes() if found and found.origin else b""
    return hashlib.sha256(content).hexdigest()[:12]
