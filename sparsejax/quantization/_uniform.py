"""Integers at a common distance: after training, or during it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, filters
from sparsejax._typing import Filter, Params
from sparsejax.quantization import _choosing
from sparsejax.quantization._coded import decoded, flatten, qwix


def quantize(
    params: Params,
    *,
    bits: _choosing.Bits = 8,
    axes: int | Sequence[int] = -1,
    quantizable: Filter = filters.weights,
) -> Params:
    """Rounds weights to multiples of a scale: small integers, of which 0 is exactly zero.

    The largest |w| that shares a scale is 2**(bits - 1) - 1/2 scales, so that a float32 entry moves
    by half a scale at most; of bfloat16 the scale and what `dequantize` gives are rounded, too, and
    it is up to 0.54 of a scale at 4 bits and 0.94 at 8. Of float16 it is up to 0.51 and 0.63; where
    its scale is below 6.1e-5 it is the next larger number that float16 has, at least 6e-8. Codes go
    from -(2**(bits - 1) - 1) to 2**(bits - 1) - 1. What is zero stays zero, bit for bit; a small
    entry that was not can become zero, too (`measure` counts them). Two reads of each leaf; float32
    inside; the same under `jit`.

    Args:
      params: a pytree of arrays.
      bits: from 2 to 8, or a function `(path, leaf)` of them. Up to 4 are held as int4, the others
        as int8; in a file of `storage` all take as few bits as their entropy.
      axes: the axes along which every entry has a scale of its own, and shares it with all others:
        -1 is each output in Flax's and Haiku's layout, 0 in Equinox's; `()` is one for the leaf, in
        the smallest file.
      quantizable: which leaves; the others, empty ones, and coded ones (as of `share`), pass as
        they are.

    Returns:
      A tree like `params`, with a `qwix.QArray` where a leaf was chosen: `qvalue`, the integers,
      and `scale`, in the leaf's dtype. `dequantize` makes params of it again; `qwix.dot_general`,
      `qwix.einsum` and `qwix.conv_general_dilated` compute with it as it is.

    Raises:
      ImportError: if qwix is not there: `pip install 'sparsejax[quantization]'`.
      TypeError: if an argument is of the wrong kind.
      ValueError: if `bits` or `axes` is out of range, or an entry is not finite (under `jit` it
        makes NaN of what shares its scale), with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import quantization
      >>> params = {"b": jnp.ones(2), "w": jnp.array([[0.0, 3.75], [15.0, -2.0], [-6.0, 0.1]])}
      >>> quantized = quantization.quantize(params, bits=4)
      >>> quantized["w"].qvalue
      Array([[0, 7],
             [7, -4],
             [-3, 0]], dtype=int4)
      >>> quantized["w"].scale, quantization.dequantize(quantized)["w"][1]
      (Array([[2. , 0.5]], dtype=float32), Array([14., -2.], dtype=float32))

    References:
      B. Jacob et al., *Quantization and training of neural networks for efficient
      integer-arithmetic-only inference*, CVPR 2018, https://arxiv.org/abs/1712.05877; here weights
      only, and symmetric. The scale is that of `qwix.quantize` (https://github.com/google/qwix), in
      which the least code, -2**(bits - 1), is chosen too or not by the last bit of a quotient, and
      by `jit`; here it never is. That also zeroes float16 whose scales are below 0.008.
    """
    return _mapped(_quantized, params, bits, axes, quantizable)


def fake_quantize(
    params: Params,
    *,
    bits: _choosing.Bits = 8,
    axes: int | Sequence[int] = -1,
    quantizable: Filter = filters.weights,
) -> Params:
    """What `dequantize(quantize(params))` is, bit for bit, with the gradient of the identity.

    So `loss(fake_quantize(params), batch)` trains the params that are behind: they gather small
    steps until they round to the next integer (the straight-through estimator; no entry is out of
    range, which is always that of the params). Pruned entries are zero in both, so that any wrapper
    of `transforms` or `dynamic` may prune meanwhile. At the end `quantize` them.

    Args:
      params: a pytree of arrays.
      bits: as in `quantize`.
      axes: as in `quantize`.
      quantizable: which leaves; the others, and coded ones, pass as they are.

    Returns:
      A tree like `params`, same dtypes.

    Raises:
      ImportError, TypeError, ValueError: as in `quantize`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import quantization
      >>> w = jnp.array([[0.0, 3.75, -2.0]])
      >>> quantization.fake_quantize(w, bits=4, axes=())
      Array([[ 0. ,  3.5, -2. ]], dtype=float32)
      >>> def loss(w):
      ...     return jnp.sum(quantization.fake_quantize(w, bits=4, axes=()) ** 3)
      >>> jax.grad(loss)(w)  # 3 · 3.5², 3 · 2²
      Array([[ 0.  , 36.75, 12.  ]], dtype=float32)

    References:
      Y. Bengio, N. Léonard, A. Courville, *Estimating or propagating gradients through stochastic
      neurons for conditional computation*, 2013, https://arxiv.org/abs/1308.3432
    """
    return _mapped(_rounded, params, bits, axes, quantizable)


def _mapped(f: Any, params: Params, bits: Any, axes: Any, quantizable: Filter) -> Params:
    flat = flatten(params)
    answers = _choosing.chosen(flat, quantizable)
    return flat.rebuild(
        [
            f(leaf, _choosing.bits_of(bits, path, leaf, lowest=2), _axes(path, leaf, axes))
            if yes and np.size(leaf)
            else leaf
            for yes, path, leaf in zip(answers, flat.paths, flat.leaves, strict=True)
        ]
    )


def _axes(path: str, leaf: Any, axes: Any) -> tuple[int, ...]:
    if isinstance(axes, tuple | list) and not axes:
        return ()
    try:
        return _checks.axes("axes", axes, len(_leaves.shape_of(leaf) or ()))
    except ValueError as error:
        raise ValueError(f"{error} At {path!r}, {_leaves.describe(leaf)}.") from None


def _quantized(leaf: Any, bits: int, axes: tuple[int, ...]) -> Any:
    array = jnp.asarray(leaf)
    wide, top = _leaves.wide(array), 2 ** (bits - 1) - 1
    shared = tuple(axis for axis in range(array.ndim) if axis not in axes)
    largest = jnp.max(jnp.abs(wide), axis=shared, keepdims=True)
    # A quotient by a constant is one more rounding under jit, where XLA makes a product of it.
    scale = largest * wide.dtype.type(1 / (top + 0.5))
    scale = _rounded_up_if_tiny(scale, array.dtype).astype(array.dtype)
    # Where all is zero; NaN is not less.
    none = _leaves.wide(scale) < jnp.finfo(wide.dtype).tiny
    scale = jnp.where(none, jnp.ones_like(scale), scale)
    codes = jnp.clip(jnp.round(wide / _leaves.wide(scale)), -top, top)
    return qwix().QArray(codes.astype(jnp.int4 if bits <= 4 else jnp.int8), scale)


def _rounded_up_if_tiny(scale: jax.Array, dtype: Any) -> jax.Array:
    """To float16's next subnormal number; as the nearest one it could be 0, or far too small.

    Rounded up, no code is out of range. All of float16's numbers are multiples of the least one, so
    that nothing is lost where that is the scale.
    """
    limits = jnp.finfo(dtype)
    if limits.tiny <= jnp.finfo(scale.dtype).tiny:  # float32, and bfloat16 of the same exponents
        return scale
    least = float(limits.smallest_subnormal)
    return jnp.where(scale < float(limits.tiny), jnp.ceil(scale / least) * least, scale)


def _rounded(leaf: Any, bits: int, axes: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(leaf)
    return _straight_through(array, decoded(_quantized(jax.lax.stop_gradient(array), bits, axes)))


# Not w + stop_gradient(rounded - w), whose sum is rounded once more.
@jax.custom_jvp
def _straight_through(array: jax.Array, rounded: jax.Array) -> jax.Array:
    del array
    return rounded


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]
