"""How much faster one product is on this machine, sparse against dense, in a fraction of a second.

A program of XLA holds the product several times, each with weights of its own, so that what is read
comes from as far away as in a network of such layers, and the start of the program hardly counts.
The two programs take turns.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.sparse_ops._convolution import conv
from sparsejax.sparse_ops._matrix import SparseMatrix
from sparsejax.sparse_ops._product import Product
from sparsejax.sparse_ops._products import matmul

# Dense operations of one program, and bytes of its weights, beyond which copies add nothing.
_FLOPS = 2e9
_BYTES = 16 * 2**20
_COPIES = 4
# Rounds, and seconds after which no other begins.
_FEWEST, _MOST, _SECONDS = 3, 40, 0.3


def representative(product: Product) -> Product:
    """The product that is measured: of fewer rows, where more of them change nothing."""
    share = _FLOPS / max(1, product.flops)
    fewest = 256 if product.kind == "matmul" else 4
    first = min(product.x[0], max(fewest, math.ceil(product.x[0] * share)))
    density = float(f"{product.density:.2g}")
    return dataclasses.replace(product, x=(first, *product.x[1:]), density=density)


def speed_up(product: Product) -> float:
    """The time of the dense product over that of the sparse one, medians; 0 of an empty one."""
    if not product.flops:
        return 0.0
    weights = [_weight(product, seed) for seed in range(_copies(product))]
    matrices = [
        SparseMatrix.from_dense(w, w != 0, block=product.block, batch=product.batch)
        for w in weights
    ]
    x = jnp.asarray(np.random.default_rng(0).normal(size=product.x), product.dtype)
    if product.transposed:
        weights = [np.ascontiguousarray(w.T) for w in weights]
    dense = _program(functools.partial(_dense, product), x, [jnp.asarray(w) for w in weights])
    sparse = _program(functools.partial(_sparse, product), x, matrices)
    return ratio(dense, sparse)


def ratio(dense: Callable[[], Any], sparse: Callable[[], Any]) -> float:
    """The time of one program over that of another, medians of some rounds."""
    seconds = _taking_turns([dense, sparse])
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def _copies(product: Product) -> int:
    room = min(_FLOPS / product.flops, _BYTES / (4 * math.prod(product.w)))
    return int(min(_COPIES, max(1, room)))


def _weight(product: Product, seed: int) -> np.ndarray:
    """Random weights of the product's density; no zero is kept."""
    rng = np.random.default_rng(seed)
    *inputs, outputs = product.w
    width = product.block or 1
    kept = rng.random((*inputs, math.ceil(outputs / width)), np.float32) < product.density
    kept = np.repeat(kept, width, -1)[..., :outputs]
    values = rng.random(product.w, np.float32) + 0.5
    return np.where(kept, values, 0).astype(jnp.dtype(product.dtype))


def _dense(product: Product, x: jax.Array, w: jax.Array) -> jax.Array:
    if product.window is None:
        return lax.dot_general(x, w, (((1,), (int(product.transposed),)), ((), ())))
    strides, padding, dilation = product.window
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=layout
    )


def _sparse(product: Product, x: jax.Array, w: SparseMatrix) -> jax.Array:
    if product.window is None:
        return matmul(x, w)
    return conv(x, w, **product.window._asdict())


def _program(
    multiply: Callable[[Any, Any], jax.Array], x: jax.Array, weights: Sequence[Any]
) -> Callable[[], Any]:
    """The product with one weight after the other, compiled."""

    @jax.jit
    def run(x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
        answers = []
        for w in weights:
            # As in a network, something reads it at once: XLA may fuse the two.
            y = jnp.maximum(multiply(x, w), 0).sum(-1)
            answers.append(y)
            # The next one has to wait for it: XLA would run them side by side.
            x = x.at[(0,) * x.ndim].add(y[(0,) * y.ndim] * 1e-30)
        return answers

    return lambda: jax.block_until_ready(run(x, weights))


def _taking_turns(programs: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of every program in every round, after one that compiles them."""
    for program in programs:
        program()
    seconds: list[list[float]] = [[] for _ in programs]
    start = time.perf_counter()
    for turn in range(_MOST):
        if turn >= _FEWEST and time.perf_counter() - start > _SECONDS:
            break
        for times, program in zip(seconds, programs, strict=True):
            program()  # The threads of the other one may be awake.
            before = time.perf_counter()
            program()
            times.append(time.perf_counter() - before)
    return seconds
