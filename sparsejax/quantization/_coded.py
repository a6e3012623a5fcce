"""Leaves that are coded: `Shared` is ours, `QArray` is qwix's and known by its name alone."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _tree
from sparsejax._typing import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """A weight whose kept entries share a few values; a pytree of two arrays.

    An entry is zero where its index is 0, else `codebook[index - 1]`: so what is pruned stays
    exactly zero whatever the codebook becomes, and takes no room in a file of `storage`.

    Attributes:
      indices: uint8 (uint16 from 256 values on), in the weight's shape.
      codebook: the values, in the weight's dtype, 2**bits of them.
    """

    indices: Any
    codebook: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.indices.shape

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return len(self.indices.shape)

    @property
    def dtype(self) -> Any:
        """Of the weight."""
        return self.codebook.dtype


def is_shared(leaf: Any) -> bool:
    """Whether a leaf has a codebook."""
    return isinstance(leaf, Shared)


def is_scaled(leaf: Any) -> bool:
    """Whether a leaf is a `QArray`; by name, so that nothing is imported for a tree without one."""
    cls = type(leaf)
    return cls.__name__ == "QArray" and cls.__module__.startswith("qwix.")


def is_coded(leaf: Any) -> bool:
    """Whether a leaf stands for a quantized weight."""
    return is_shared(leaf) or is_scaled(leaf)


def codes(leaf: Any) -> Any:
    """The small integers of a coded leaf; 0 is zero."""
    return leaf.indices if is_shared(leaf) else leaf.qvalue


def decoded(leaf: Any) -> jax.Array:
    """The weight that a coded leaf stands for."""
    if is_scaled(leaf):
        return qwix().dequantize(leaf)
    table = jnp.concatenate([jnp.zeros(1, leaf.codebook.dtype), jnp.asarray(leaf.codebook)])
    # What a damaged tree names beyond the table is its last value, not NaN.
    return table.at[jnp.asarray(leaf.indices)].get(mode="clip")


def map_coded(f: Any, tree: Params, *rest: Params) -> Any:
    """`jax.tree.map`, for which a coded leaf is one leaf."""
    return jax.tree.map(f, tree, *rest, is_leaf=is_coded)


def outlines(tree: Params) -> Any:
    """The tree with a shape and a dtype in place of each coded leaf."""
    return map_coded(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_coded(leaf) else leaf, tree
    )


def flatten(tree: Params) -> _tree.Flat:
    """`_tree.flatten`, for which a coded leaf is one leaf."""
    return _tree.flatten(outlines(tree))._replace(leaves=jax.tree.leaves(tree, is_leaf=is_coded))


def qwix() -> Any:
    """The library of quantized arrays.

    Raises:
      ImportError: if it is not there, with what to install.
    """
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise ImportError(
            "sparsejax.quantization needs qwix to quantize to integers: pip install "
            "'sparsejax[quantization]'. (`share`, which has codebooks, needs nothing.)"
        ) from error
