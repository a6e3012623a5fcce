"""Weight sharing: a codebook for each leaf, by k-means."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import _leaves, filters, masking
from sparsejax._typing import Filter, Masks, Params
from sparsejax.quantization import _choosing, _clustering
from sparsejax.quantization._coded import Shared, flatten, outlines


def share(
    params: Params,
    masks: Masks | None = None,
    *,
    bits: _choosing.Bits = 4,
    quantizable: Filter = filters.weights,
) -> Params:
    """Lets the kept entries of each leaf share 2**bits values, found by k-means.

    Lloyd's iteration from values spaced evenly between the least and the largest kept one, which
    keeps the few large weights well (Han 2016 found it to train best), run until nothing changes;
    a value that nothing is near moves to the entry that is farthest from its own. Zeros are no part
    of it: they stay exactly zero, as do all pruned entries. Deterministic, on the host, in float64;
    one sort of each leaf.

    `dequantize` makes params of the result again, differentiable in the codebooks (the gradient of
    a value is the sum of those of its entries): `partition` gives what any optimizer can train on.

    Args:
      params: a pytree of arrays with values (not traced).
      masks: which entries are kept, also if their value is zero; what the others are, NaN even,
        does not matter. By default what is not zero.
      bits: from 1 to 8, or a function `(path, leaf)` of them: Han has 8 for convolutions, 5 for the
        rest; after pruning 4 lose little.
      quantizable: which leaves; the others, and coded ones, pass as they are.

    Returns:
      A tree like `params`, with `Shared` where a leaf was chosen. Where there are fewer than
      2**bits different values, the end of the codebook is zeros that no entry uses. The arrays lie
      on JAX's default device, however the leaf was sharded: place them again where that matters.

    Raises:
      TypeError: if an argument is of the wrong kind, or params are traced.
      ValueError: if `bits` is out of range, a kept entry is not finite, or masks do not fit, with
        the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import quantization
      >>> params = {"b": jnp.ones(2), "w": jnp.array([[0.0, 1.0, 1.2], [5.0, 0.0, 0.8]])}
      >>> shared = quantization.share(params, bits=1)
      >>> shared["w"].codebook
      Array([1., 5.], dtype=float32)
      >>> quantization.dequantize(shared)["w"]
      Array([[0., 1., 1.],
             [5., 0., 1.]], dtype=float32)

    References:
      S. Han, H. Mao, W. Dally, *Deep compression: compressing deep neural networks with pruning,
      trained quantization and Huffman coding*, ICLR 2016, https://arxiv.org/abs/1510.00149. There
      values that nothing is near stay where they are, unused.
    """
    flat = flatten(params)
    found = [None] * len(flat.leaves) if masks is None else masking.aligned(masks, outlines(params))
    answers = _choosing.chosen(flat, quantizable, found)
    rows = zip(answers, flat.paths, flat.leaves, found, strict=True)
    return flat.rebuild(
        [
            _shared(path, leaf, mask, _choosing.bits_of(bits, path, leaf, lowest=1))
            if yes
            else leaf
            for yes, path, leaf, mask in rows
        ]
    )


def _shared(path: str, leaf: Any, mask: Any, bits: int) -> Shared:
    if _leaves.is_traced(leaf, mask):
        raise TypeError(
            f"`params` must have values, got an abstract {_leaves.describe(leaf)} at {path!r}; "
            "call `share` outside of jit, k-means runs on the host."
        )
    values = np.asarray(leaf, np.float64)
    kept = values != 0 if mask is None else np.broadcast_to(np.asarray(mask), values.shape)
    size = 2**bits
    centers, numbers = _clustering.kmeans(values[kept], size)
    indices = np.zeros(values.shape, np.uint8 if bits < 8 else np.uint16)
    indices[kept] = numbers + 1
    codebook = np.pad(centers, (0, size - centers.size))
    return Shared(jnp.asarray(indices), jnp.asarray(codebook, jnp.asarray(leaf).dtype))
