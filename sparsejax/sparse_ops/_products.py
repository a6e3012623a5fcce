"""`x @ w` that skips the zeros of w."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _leaves
from sparsejax.sparse_ops import _kernel
from sparsejax.sparse_ops._matrix import SparseMatrix, check_sparse, check_values, dense
from sparsejax.sparse_ops._structure import Structure


def matmul(x: Any, w: SparseMatrix) -> jax.Array:
    """`x @ w` without the work for the zeros of w.

    On a CPU a compiled kernel reads the kept weights alone (`backend` says which); everywhere else,
    GPU and TPU included, the masked dense matrix is multiplied by XLA, with the same answer.
    Either way the products are added up in float32.

    Zeros that are skipped do not multiply: a NaN or an infinity in x reaches the outputs that keep
    a weight for it and no other, where a dense product would make NaN of 0 * inf.
    `skipped_nonfinite` counts such entries.

    Pure: works under `jit`, `vmap` over x (one product of all rows) and reverse-mode `grad`, also
    twice, with respect to x and to the kept values. The gradient of x is a sparse product again;
    that of the values costs a dense product. Sharded x: use `jax.shard_map`; it is gathered
    otherwise. Indices are constants of the program; eager calls keep theirs in JAX's cache until
    `jax.clear_caches()`.

    Args:
      x: (..., inputs), floating.
      w: (inputs, outputs).

    Returns:
      (..., outputs), of the dtype that `jnp.matmul` gives.

    Raises:
      TypeError: if `x` is not floating, or `w` no `SparseMatrix` of float32 or bfloat16.
      ValueError: if `w` is no matrix, or shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import sparse_ops
      >>> w = sparse_ops.SparseMatrix.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
      >>> x = jnp.array([[3.0, 4.0]])
      >>> sparse_ops.matmul(x, w)
      Array([[3., 8.]], dtype=float32)
      >>> jax.grad(lambda w: sparse_ops.matmul(x, w).sum())(w).to_dense()
      Array([[3., 0.],
             [0., 4.]], dtype=float32)
    """
    check_sparse(w)
    if w.ndim != 2:
        raise ValueError(f"`w` must be a matrix, got shape {w.shape}; kernels are for conv.")
    values = jnp.asarray(check_values(w))
    check_input(x, w)
    _check_inputs(x, w)
    dtype = jnp.result_type(x, values)
    x, values = together(jnp.asarray(x), values)
    rows = x.reshape(int(np.prod(x.shape[:-1], dtype=np.int64)), w.shape[0])
    y = _product(w.structure, rows, values)
    return y.astype(dtype).reshape(*x.shape[:-1], w.shape[1])


def together(x: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both on the same devices: gathered in an explicit mesh, varying alike in a `shard_map`."""
    x, values = _gathered(x), _gathered(values)
    axes = _varying(x) | _varying(values)
    return _spread(x, axes), _spread(values, axes)


def _spread(array: jax.Array, axes: frozenset[Any]) -> jax.Array:
    more = tuple(sorted(axes - _varying(array)))
    return lax.pcast(array, more, to="varying") if more else array


def _gathered(array: jax.Array) -> jax.Array:
    sharding = jax.typeof(array).sharding
    if all(part is None for part in sharding.spec):
        return array
    whole = jax.sharding.PartitionSpec(*[None] * array.ndim)
    return jax.sharding.reshard(array, jax.sharding.NamedSharding(sharding.mesh, whole))


def _varying(array: jax.Array) -> frozenset[Any]:
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def skipped_nonfinite(x: Any, w: SparseMatrix) -> jax.Array:
    """How many NaNs and infinities of x a product with `w` skips somewhere, for debugging.

    A dense product would make NaN of each of them in every output; the sparse one passes it to the
    outputs that keep a weight for it. Where this is zero, the two are NaN at the same places.

    Args:
      x: (..., inputs); for a convolution's kernel, NHWC.
      w: the weights.

    Returns:
      A 0-d int32 array. Works under `jit`; for instance
      `checkify.check(skipped_nonfinite(x, w) == 0, "NaN was skipped")`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import sparse_ops
      >>> w = sparse_ops.SparseMatrix.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
      >>> sparse_ops.skipped_nonfinite(jnp.array([[jnp.inf, 1.0]]), w)
      Array(1, dtype=int32)
    """
    check_sparse(w)
    check_input(x, w)
    _check_inputs(x, w)
    others = tuple(axis for axis in range(w.ndim) if axis != w.ndim - 2)
    partly = np.logical_not(np.all(w.mask(), axis=others))
    unfit = ~jnp.isfinite(jnp.asarray(x).reshape(-1, w.shape[-2]))
    return (unfit & partly.reshape(1, -1)).sum(dtype=jnp.int32)


def _check_inputs(x: Any, w: SparseMatrix) -> None:
    """Refuses an x whose last axis is not that of the inputs."""
    if x.ndim < 1 or x.shape[-1] != w.shape[-2]:
        raise ValueError(
            f"`x` must have the {w.shape[-2]} inputs of `w` as its last axis, got "
            f"{_leaves.describe(x)} for {w}."
        )


def check_input(x: Any, w: SparseMatrix) -> None:
    """Refuses an x that is no floating array."""
    if _leaves.shape_of(x) is None or not _leaves.is_floating(x) or isinstance(x, float):
        got = _leaves.brief(x) if _leaves.shape_of(x) is None else _leaves.describe(x)
        raise TypeError(f"`x` must be a floating array, got {got}; cast it to {w.dtype}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(structure: Structure, x: Any, values: Any) -> jax.Array:
    """x[rows, inputs] @ W in float32."""
    return _compiled(structure, _kernel.isa(), _kernel.threads(), x, values)


def _forward(structure: Structure, x: Any, values: Any) -> Any:
    return _product(structure, x, values), (x, values)


def _backward(structure: Structure, residuals: Any, dy: Any) -> Any:
    (x, values), dy = map(jnp.asarray, residuals), jnp.asarray(dy)
    turned, order = structure.transposed
    dx = _product(turned, dy, values[order])
    x32 = x.astype(jnp.float32)
    if x.shape[0] * structure.size <= np.prod(structure.shape, dtype=np.int64):
        # Few rows: cheaper entry by entry. A filler's column does not exist; its gradient is zero.
        rows = x32[:, structure.packed.rows]
        columns = dy.at[:, structure.packed.cols].get(mode="fill", fill_value=0)
        dvalues = (rows * columns).sum(0)
    else:
        whole = jnp.matmul(x32.T, dy, preferred_element_type=jnp.float32).reshape(-1)
        dvalues = whole.at[structure.flat].get(mode="fill", fill_value=0)
    return dx.astype(x.dtype), dvalues.astype(values.dtype)


_product.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(
    structure: Structure, isa: int, threads: int, x: jax.Array, values: jax.Array
) -> jax.Array:
    """One program for eager calls, which would be compiled anew each time; jit opens it."""
    return _batched(structure, isa, threads)(x, values)


def _batched(structure: Structure, isa: int, threads: int) -> Any:
    """The product of one matrix; `vmap` over x makes rows of the mapped axis."""

    def product(x: jax.Array, values: jax.Array) -> jax.Array:
        if 0 in (x.shape[0], *structure.shape):
            return jnp.zeros((x.shape[0], structure.shape[1]), jnp.float32)
        kernel = functools.partial(_by_kernel, structure, isa, threads)
        return by_platform(kernel, functools.partial(_by_xla, structure), x, values)

    return folding(product)


def by_platform(kernel: Any, otherwise: Any, x: jax.Array, values: jax.Array) -> jax.Array:
    """The kernel on CPUs that have it, XLA everywhere else."""
    if not _kernel.available():
        return otherwise(x, values)
    return lax.platform_dependent(x, values, cpu=kernel, default=otherwise)


def folding(multiply: Any) -> Any:
    """A product, or a convolution, that makes more rows, or images, of an axis that is mapped."""
    product = jax.custom_batching.custom_vmap(multiply)

    @product.def_vmap
    def _(size: int, batched: Any, x: jax.Array, values: jax.Array) -> Any:
        if not batched[1]:
            y = product(x.reshape(size * x.shape[1], *x.shape[2:]), values)
            return y.reshape(size, x.shape[1], *y.shape[1:]), True
        if batched[0]:
            return lax.map(lambda pair: product(*pair), (x, values)), True
        return lax.map(lambda one: product(x, one), values), True

    return product


def _by_kernel(
    structure: Structure, isa: int, threads: int, x: jax.Array, values: jax.Array
) -> jax.Array:
    call = called("sparsejax_matmul", x, (x.shape[0], structure.shape[1]))
    return call(
        x.astype(jnp.float32), values, *arrays(structure), **attributes(structure, isa, threads)
    )


def called(target: str, x: jax.Array, shape: tuple[int, ...]) -> Any:
    """A call of the kernel, whose answer varies over the devices of a `shard_map` as x does."""
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32))

    def answer(*operands: Any, **attributes: np.int64) -> jax.Array:
        y: jax.Array = call(*operands, **attributes)
        return _spread(y, _varying(x))

    return answer


def arrays(structure: Structure) -> tuple[np.ndarray, ...]:
    """The kernel's indices."""
    packed = structure.packed
    return packed.offs, packed.cnt, packed.col, packed.base


def attributes(structure: Structure, isa: int, threads: int) -> dict[str, np.int64]:
    """The kernel's numbers."""
    packed = structure.packed
    numbers = {"kb": packed.kb, "nt": packed.nt, "width": packed.width}
    numbers |= {"isa": isa, "threads": threads}
    return {name: np.int64(number) for name, number in numbers.items()}


def _by_xla(structure: Structure, x: jax.Array, values: jax.Array) -> jax.Array:
    """The masked dense product, unless x has an entry that a skipped zero must not meet."""

    def whole(x: jax.Array, values: jax.Array) -> jax.Array:
        w = dense(structure, values)
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)

    def carefully(x: jax.Array, values: jax.Array) -> jax.Array:
        kept = dense(structure, jnp.ones_like(values))
        return skipping(jnp.matmul, x, dense(structure, values), kept)

    return lax.cond(jnp.isfinite(x).all(), whole, carefully, x, values)


def skipping(multiply: Any, x: jax.Array, w: jax.Array, kept: jax.Array) -> jax.Array:
    """A dense product, or convolution, in which nothing that is not finite meets a skipped zero.

    The finite parts are multiplied as they are; where infinities and NaNs go is counted by
    products of indicators.
    """
    x, w, kept = (a.astype(jnp.float32) for a in (x, w, kept))

    def met(a: jax.Array, b: jax.Array) -> jax.Array:
        return multiply(a.astype(jnp.float32), b.astype(jnp.float32)) > 0

    some_x, some_w = jnp.isinf(x), jnp.isinf(w)
    plus = met((x > 0) & some_x, w > 0) | met((x < 0) & some_x, w < 0)
    plus |= met(x > 0, (w > 0) & some_w) | met(x < 0, (w < 0) & some_w)
    minus = met((x > 0) & some_x, w < 0) | met((x < 0) & some_x, w > 0)
    minus |= met(x > 0, (w < 0) & some_w) | met(x < 0, (w > 0) & some_w)
    nan = met(jnp.isnan(x), kept) | met(jnp.ones_like(x), jnp.isnan(w))
    nan |= met(some_x, kept * (w == 0)) | met(x == 0, some_w) | (plus & minus)
    finite = multiply(*(jnp.where(jnp.isfinite(a), a, 0) for a in (x, w)))
    infinite = jnp.where(plus, jnp.inf, jnp.where(minus, -jnp.inf, finite))
    return jnp.where(nan, jnp.nan, infinite)
