"""Convolutions that skip the zeros of their kernel."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _checks, _leaves
from sparsejax.sparse_ops import _kernel
from sparsejax.sparse_ops._matrix import SparseMatrix, check_sparse, check_values, dense
from sparsejax.sparse_ops._products import (
    arrays,
    attributes,
    by_platform,
    called,
    check_input,
    folding,
    skipping,
    together,
)
from sparsejax.sparse_ops._structure import Structure


class Window(NamedTuple):
    """How a kernel moves over images, vertically and horizontally.

    Attributes:
      strides: of the window.
      padding: numbers of zeros before and after.
      dilation: of the kernel.
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)


def conv(
    x: Any,
    w: SparseMatrix,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[Any] = "SAME",
    dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """A convolution without the work for the zeros of its kernel: NHWC images, HWIO kernel.

    What `matmul` says of backends, NaN, transformations and dtypes holds here, too. On a CPU the
    images are laid out once by channel, padded, so that every kept weight is one multiplication of
    runs of positions; both gradients are dense convolutions, zeros of the kernel included. Grouped
    and transposed convolutions are not built: give XLA the dense kernel (`w.to_dense()`).

    Args:
      x: (images, height, width, inputs), floating; or without the first axis.
      w: (height, width, inputs, outputs).
      strides: of the window, one or (vertical, horizontal).
      padding: "SAME", "VALID", or numbers of zeros, as Flax has it: one, one for each axis,
        ((top, bottom), (left, right)). None is negative.
      dilation: of the kernel, one or (vertical, horizontal).

    Returns:
      (images, height', width', outputs), of the dtype that `jnp.matmul` gives.

    Raises:
      TypeError: if `x` is not floating, or `w` no `SparseMatrix` of float32 or bfloat16.
      ValueError: if `w` is no kernel, or shapes or the window do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import sparse_ops
      >>> kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(2.0)
      >>> w = sparse_ops.SparseMatrix.from_dense(kernel)
      >>> sparse_ops.conv(jnp.ones((1, 4, 4, 1)), w, strides=2)[0, ..., 0]
      Array([[2., 2.],
             [2., 2.]], dtype=float32)
    """
    check_sparse(w)
    if w.ndim != 4:
        raise ValueError(f"`w` must be a kernel of four axes, got shape {w.shape}; see matmul.")
    values = jnp.asarray(check_values(w))
    check_input(x, w)
    if x.ndim not in (3, 4) or x.shape[-1] != w.shape[2]:
        raise ValueError(
            f"`x` must have shape (images, height, width, {w.shape[2]}), got "
            f"{_leaves.describe(x)} for {w}."
        )
    dtype = jnp.result_type(x, values)
    images, values = together(jnp.asarray(x if x.ndim == 4 else x[None]), values)
    window = window_of(images.shape, w.shape, strides, padding, dilation)
    y = _convolution(w.structure, window, images, values)
    return y.astype(dtype) if x.ndim == 4 else y[0].astype(dtype)


def window_of(x: Any, w: Any, strides: Any, padding: Any, dilation: Any) -> Window:
    """The window in numbers, for images and a kernel of these shapes."""
    strides, dilation = _pair("strides", strides, 1), _pair("dilation", dilation, 1)
    if isinstance(padding, str):
        _checks.choice("padding", padding, ("SAME", "VALID"))
        reach = [(k - 1) * d + 1 if k else 0 for k, d in zip(w[:2], dilation, strict=True)]
        sides = lax.padtype_to_pads(x[1:3], reach, strides, padding)
    elif _leaves.is_int(padding):
        sides = [(padding, padding)] * 2
    elif isinstance(padding, tuple | list):
        sides = [(side, side) if _leaves.is_int(side) else side for side in padding]
        if len(sides) != 2:
            raise ValueError(f"`padding` must be for two axes, got {padding!r}.")
    else:
        raise TypeError(
            '`padding` must be "SAME", "VALID", an integer, or two integers or pairs, got '
            f"{_leaves.brief(padding)}."
        )
    pairs = tuple(_pair("padding", side, 0) for side in sides)
    return Window(strides, (pairs[0], pairs[1]), dilation)


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if _leaves.is_int(value) else value
    fits = isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_leaves.is_int, pair))
    if not fits:
        raise TypeError(f"`{name}` must be one integer or two, got {_leaves.brief(value)}.")
    if not least <= min(pair) <= max(pair) < 2**31:
        raise ValueError(f"`{name}` must be >= {least} and less than 2**31, got {value}.")
    return int(pair[0]), int(pair[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(structure: Structure, window: Window, x: Any, values: Any) -> jax.Array:
    return _compiled(structure, window, _kernel.isa(), _kernel.threads(), x, values)


def _forward(structure: Structure, window: Window, x: Any, values: Any) -> Any:
    return _convolution(structure, window, x, values), (x, values)


def _backward(structure: Structure, window: Window, residuals: Any, dy: Any) -> Any:
    x, values = map(jnp.asarray, residuals)
    _, pull = jax.vjp(functools.partial(_dense_convolution, window), x, dense(structure, values))
    dx, dw = pull(jnp.asarray(dy))
    return dx, dw.reshape(-1).at[structure.flat].get(mode="fill", fill_value=0)


_convolution.defvjp(_forward, _backward)


def _dense_convolution(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    # Types must agree here, and jax has no gradient for bfloat16 in and float32 out.
    return lax.conv_general_dilated(
        x.astype(jnp.float32),
        kernel.astype(jnp.float32),
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compiled(
    structure: Structure,
    window: Window,
    isa: int,
    threads: int,
    x: jax.Array,
    values: jax.Array,
) -> jax.Array:
    """One program for eager calls, which would be compiled anew each time; jit opens it."""
    return _batched(structure, window, isa, threads)(x, values)


def _batched(structure: Structure, window: Window, isa: int, threads: int) -> Any:
    """The convolution with one kernel; `vmap` over x makes images of the mapped axis."""

    def convolution(x: jax.Array, values: jax.Array) -> jax.Array:
        out = _answer(structure, window, x)
        if 0 in (*out.shape, *x.shape, *structure.shape):
            return jnp.zeros(out.shape, jnp.float32)
        kernel = functools.partial(_by_kernel, structure, window, isa, threads, out)
        return by_platform(kernel, functools.partial(_by_xla, structure, window), x, values)

    return folding(convolution)


def _answer(structure: Structure, window: Window, x: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of the convolution, by counting windows."""
    sizes = [
        max(0, (size + sum(pads) - ((k - 1) * d + 1 if k else 0)) // s + 1)
        for size, pads, k, d, s in zip(
            x.shape[1:3],
            window.padding,
            structure.shape[:2],
            window.dilation,
            window.strides,
            strict=True,
        )
    ]
    return jax.ShapeDtypeStruct((x.shape[0], *sizes, structure.shape[3]), jnp.float32)


def _by_kernel(
    structure: Structure,
    window: Window,
    isa: int,
    threads: int,
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    values: jax.Array,
) -> jax.Array:
    numbers = {
        "kh": structure.shape[0],
        "kw": structure.shape[1],
        "stride_h": window.strides[0],
        "stride_w": window.strides[1],
        "dilation_h": window.dilation[0],
        "dilation_w": window.dilation[1],
        "pad_top": window.padding[0][0],
        "pad_left": window.padding[1][0],
    }
    call = called("sparsejax_conv", x, out.shape)
    return call(
        x.astype(jnp.float32),
        values,
        *arrays(structure),
        **attributes(structure, isa, threads),
        **{name: np.int64(number) for name, number in numbers.items()},
    )


def _by_xla(structure: Structure, window: Window, x: jax.Array, values: jax.Array) -> jax.Array:
    """The masked dense convolution, unless x has an entry that a skipped zero must not meet."""

    def whole(x: jax.Array, values: jax.Array) -> jax.Array:
        return _dense_convolution(window, x, dense(structure, values))

    def carefully(x: jax.Array, values: jax.Array) -> jax.Array:
        kept = dense(structure, jnp.ones_like(values))
        multiply = functools.partial(_dense_convolution, window)
        return skipping(multiply, x, dense(structure, values), kept)

    return lax.cond(jnp.isfinite(x).all(), whole, carefully, x, values)
