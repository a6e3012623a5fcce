"""Trees with coded leaves: back to params, their masks, and what of them can be trained."""

import jax
import jax.numpy as jnp

from sparsejax import _leaves
from sparsejax._typing import Masks, Params
from sparsejax.quantization._coded import codes, decoded, is_coded, map_coded


def dequantize(quantized: Params) -> Params:
    """The params that a tree of `quantize` or `share` stands for.

    Pure, under `jit` too; differentiable in scales and codebooks: the gradient of a codebook's
    value is the sum of the gradients of all entries that have it.

    Args:
      quantized: a tree with `qwix.QArray` or `Shared` leaves, perhaps beside others, which pass.

    Returns:
      Params of arrays; what was zero is +0.

    Raises:
      ImportError: if there are `qwix.QArray` leaves and qwix is not there.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import quantization
      >>> quantization.dequantize(quantization.quantize({"w": jnp.array([[0.0, 127.5]])}, axes=()))
      {'w': Array([[  0., 127.]], dtype=float32)}
    """
    return map_coded(lambda leaf: decoded(leaf) if is_coded(leaf) else leaf, quantized)


def masks(quantized: Params) -> Masks:
    """Masks for the params of a quantized tree: kept is what has a code other than 0.

    After `share` these are the masks that it was given; after `quantize` a kept entry that was
    rounded to zero is missing in them.

    Args:
      quantized: a tree of `quantize` or `share`.

    Returns:
      Masks for `dequantize(quantized)`; a 0-d True for leaves that are not coded.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import quantization
      >>> params = {"b": jnp.ones(2), "w": jnp.array([[0.0, 1.0, 5.0]])}
      >>> quantization.masks(quantization.share(params, bits=1))
      {'b': Array(True, dtype=bool), 'w': Array([[False,  True,  True]], dtype=bool)}
    """
    return map_coded(
        lambda leaf: jnp.asarray(codes(leaf)) != 0 if is_coded(leaf) else jnp.ones((), bool),
        quantized,
    )


def partition(quantized: Params) -> tuple[Params, Params]:
    """What can be trained of a quantized tree, and the rest; `combine` puts them together.

    JAX differentiates trees of floating arrays only. Here these are codebooks, scales, and the
    leaves that are not coded: `None` stands where the integers were.

    Args:
      quantized: a tree of `quantize` or `share`.

    Returns:
      Two trees: in the first, all that is not floating is `None`; in the second, all that is.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparsejax import quantization
      >>> shared = quantization.share({"w": jnp.array([[0.0, 1.0, 1.5, 4.0]])}, bits=1)
      >>> codebooks, indices = quantization.partition(shared)
      >>> def loss(codebooks, target):
      ...     params = quantization.dequantize(quantization.combine(codebooks, indices))
      ...     return 0.5 * jnp.sum((params["w"] - target) ** 2)
      >>> target = jnp.array([[9.0, 1.0, 2.0, 3.0]])
      >>> grads = jax.grad(loss)(codebooks, target)
      >>> codebooks["w"].codebook, grads["w"].codebook  # (1.25 - 1) + (1.25 - 2), 4 - 3
      (Array([1.25, 4.  ], dtype=float32), Array([-0.5,  1. ], dtype=float32))
      >>> tuned = optax.apply_updates(codebooks, jax.tree.map(lambda g: -0.5 * g, grads))
      >>> quantization.dequantize(quantization.combine(tuned, indices))["w"]
      Array([[0. , 1.5, 1.5, 3.5]], dtype=float32)
    """
    trainable = jax.tree.map(lambda x: x if _leaves.is_inexact(x) else None, quantized)
    rest = jax.tree.map(lambda x: None if _leaves.is_inexact(x) else x, quantized)
    return trainable, rest


def combine(trainable: Params, rest: Params) -> Params:
    """The tree of which `partition` made these two, with what the first has become.

    Args:
      trainable: the first tree of `partition`, perhaps trained.
      rest: the second.

    Returns:
      A quantized tree.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import quantization
      >>> quantization.combine({"a": jnp.ones(1), "b": None}, {"a": None, "b": 3})
      {'a': Array([1.], dtype=float32), 'b': 3}
    """
    return jax.tree.map(
        lambda x, y: y if x is None else x, trainable, rest, is_leaf=lambda x: x is None
    )
