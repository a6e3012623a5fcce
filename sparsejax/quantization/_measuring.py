"""What quantization did to params."""

from typing import NamedTuple

import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Params
from sparsejax.quantization._coded import is_coded, map_coded
from sparsejax.quantization._trees import dequantize


class Change(NamedTuple):
    """What quantization did to a leaf.

    Attributes:
      nonzeros: entries that were not zero.
      vanished: how many of these are zero now.
      largest: the largest distance that an entry was moved.
      relative: the norm of what was moved over that of the leaf; 0 for a leaf of zeros.
    """

    nonzeros: int
    vanished: int
    largest: float
    relative: float


def measure(params: Params, quantized: Params) -> dict[str, Change]:
    """How far quantization moved each leaf, and how many entries it rounded to zero.

    Args:
      params: the params as they were, with values (not traced).
      quantized: what `quantize` or `share` made of them.

    Returns:
      A `Change` for each coded leaf, by its path.

    Raises:
      TypeError: if a leaf has no values.
      ValueError: if the trees do not match, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import quantization
      >>> params = {"w": jnp.array([[0.0, 1.0, 15.0, -8.0]])}
      >>> quantized = quantization.quantize(params, bits=4, axes=())  # to multiples of 2
      >>> quantization.measure(params, quantized)
      {'w': Change(nonzeros=3, vanished=1, largest=1.0, relative=0.0830...)}
    """
    flat = _tree.flatten(params)
    found, coded = (
        _tree.align("quantized", tree, "params", params)
        for tree in (dequantize(quantized), map_coded(is_coded, quantized))
    )
    rows = zip(flat.paths, flat.leaves, found, coded, strict=True)
    return {path: _change(path, leaf, now) for path, leaf, now, yes in rows if yes}


def _change(path: str, leaf: object, now: object) -> Change:
    _checks.same_shape("quantized", path, now, "params", leaf)
    if _leaves.is_traced(leaf, now):
        raise TypeError(
            f"`params` must have values, got an abstract {_leaves.describe(leaf)} at {path!r}; "
            "call `measure` outside of jit."
        )
    before, after = np.asarray(leaf, np.float64), np.asarray(now, np.float64)
    moved, size = np.linalg.norm(after - before), np.linalg.norm(before)
    return Change(
        nonzeros=int(np.count_nonzero(before)),
        vanished=int(np.count_nonzero(before[after == 0])),
        largest=float(np.abs(after - before).max(initial=0)),
        relative=float(moved / size) if size else 0.0,
    )
