"""Masks as sets of kept entries: meet, join and compare them; pack them 8 entries a byte.

`intersection`, `union` and `difference` obey the laws of sets, leaf by leaf; `overlap` says how far
two methods, or two seeds of one, agree. Leaves may broadcast against each other: `(1, 1, 1, C)`
where channels are kept, 0-d where a leaf is kept or pruned as a whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Masks


class LeafOverlap(NamedTuple):
    """Entries of one leaf that both masks keep, and that at least one keeps."""

    intersection: Any
    union: Any

    @property
    def iou(self) -> Any:
        """Intersection over union, in [0, 1]; 1 where nothing is kept."""
        return _ratio(self.intersection, self.union)


class Overlap(NamedTuple):
    """What `overlap` found: entries that both keep, that at least one keeps, and leaf by leaf."""

    intersection: Any
    union: Any
    leaves: dict[str, LeafOverlap]

    @property
    def iou(self) -> Any:
        """Intersection over union, in [0, 1]; 1 where nothing is kept."""
        return _ratio(self.intersection, self.union)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bits:
    """One mask at 8 entries a byte; a pytree whose only leaf is `bytes`.

    Args:
      bytes: uint8, of shape `(ceil(n / 8),)` for n entries. Entry i, counted in C order, is bit
        i % 8 of byte i // 8, where bit 0 is the lowest: `np.packbits(..., bitorder="little")`. The
        spare bits of the last byte are zero.
      shape: of the mask; static under `jit`.
    """

    bytes: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def intersection(*masks: Masks) -> Masks:
    """An entry is kept where every one of the masks keeps it.

    Args:
      *masks: at least one tree of masks, all of one structure; leaves may broadcast against each
        other.

    Returns:
      Masks with the structure of the first.

    Raises:
      TypeError: if a leaf is not boolean.
      ValueError: if there is no tree, structures differ, or leaves do not broadcast, with the path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import mask_sets
      >>> channels, entries = jnp.array([[True, False]]), jnp.array([[True, True], [False, True]])
      >>> mask_sets.intersection({"w": channels}, {"w": entries})
      {'w': Array([[ True, False],
             [False, False]], dtype=bool)}
    """
    return _reduce(jnp.logical_and, _numbered(masks))


def union(*masks: Masks) -> Masks:
    """An entry is kept where at least one of the masks keeps it.

    A leaf that one tree does not prune (a 0-d True) is therefore kept whole.

    Args:
      *masks: at least one tree of masks, all of one structure; leaves may broadcast against each
        other.

    Returns:
      Masks with the structure of the first.

    Raises:
      TypeError: if a leaf is not boolean.
      ValueError: if there is no tree, structures differ, or leaves do not broadcast, with the path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import mask_sets
      >>> mask_sets.union({"w": jnp.array([[True, False]])}, {"w": jnp.array([[False], [True]])})
      {'w': Array([[ True, False],
             [ True,  True]], dtype=bool)}
    """
    return _reduce(jnp.logical_or, _numbered(masks))


def difference(a: Masks, b: Masks) -> Masks:
    """An entry is kept where `a` keeps it and `b` does not.

    The answer is a set to look at rather than masks to train with: a leaf that neither tree prunes
    (a 0-d True in both) becomes a 0-d *False*, since `a` keeps nothing there that `b` does not.
    `apply_masks` would zero all of that leaf, biases and norm scales among them. To leave such
    leaves alone, take back what `a` has there:
    `jax.tree.map(lambda m, d: d if d.ndim else m, a, difference(a, b))`.

    Args:
      a: a tree of masks.
      b: another of its structure; leaves may broadcast against each other.

    Returns:
      Masks with the structure of `a`.

    Raises:
      TypeError: if a leaf is not boolean.
      ValueError: if structures differ or leaves do not broadcast, with the path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import mask_sets
      >>> a = {"b": jnp.array(True), "w": jnp.array([[True, True, False]])}
      >>> b = {"b": jnp.array(True), "w": jnp.array([[True, False, False]])}
      >>> mask_sets.difference(a, b)
      {'b': Array(False, dtype=bool), 'w': Array([[False,  True, False]], dtype=bool)}
    """
    return _reduce(lambda x, y: jnp.logical_and(x, jnp.logical_not(y)), {"a": a, "b": b})


def overlap(a: Masks, b: Masks) -> Overlap:
    """Counts the entries that both masks keep and that at least one keeps, in all and leaf by leaf.

    Their quotient `iou` is the Jaccard index: 1 for equal masks, 0 for disjoint ones. Independent
    random masks of density d have about d / (2 - d), so 0.05 at a sparsity of 90%.

    Args:
      a: a tree of masks.
      b: another of its structure. Leaves are counted at the shape that they broadcast to: channels
        against entries count entries, channels against channels count channels. Where both are 0-d
        (the leaf is not pruned, its size unknown) nothing counts.

    Returns:
      An `Overlap` of Python integers, or of 0-d int32 arrays under `jit`.

    Raises:
      TypeError: if a leaf is not boolean.
      ValueError: if structures differ or leaves do not broadcast, with the path; under `jit` also
        if there are 2³¹ entries or more.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import mask_sets
      >>> a = {"b": jnp.array(True), "w": jnp.array([[True, True, False, True]])}
      >>> b = {"b": jnp.array(True), "w": jnp.array([[True, False, False, True]])}
      >>> found = mask_sets.overlap(a, b)
      >>> found.leaves, round(found.iou, 3)
      ({'w': LeafOverlap(intersection=2, union=3)}, 0.667)

    References:
      P. Jaccard, *The distribution of the flora in the alpine zone*, New Phytologist 1912,
      https://doi.org/10.1111/j.1469-8137.1912.tb05611.x
    """
    flat, rows = _rows({"a": a, "b": b})
    pairs = [(path, row) for path, row in zip(flat.paths, rows, strict=True) if _shape(row)]
    if not all(_on_host(*row) for _, row in pairs):
        _checks.fits_int32("overlap", sum(math.prod(_shape(row)) for _, row in pairs))
    leaves = [
        (path, LeafOverlap(_count(np.logical_and, *row), _count(np.logical_or, *row)))
        for path, row in pairs
    ]
    return Overlap(
        intersection=sum(leaf.intersection for _, leaf in leaves),
        union=sum(leaf.union for _, leaf in leaves),
        leaves=dict(leaves),
    )


def to_bits(masks: Masks) -> Any:
    """Packs masks into an eighth of their size, for optimizer state and checkpoints.

    Every leaf becomes a `Bits`, 0-d ones too: they take one byte before and after. Works under
    `jit`, `vmap` and `eval_shape`, which gives the template that a checkpoint is read into. One
    read: 10M entries take less than a millisecond on a CPU. Bits are in flat order, so that a mask
    which is sharded along another axis than its first is gathered.

    Args:
      masks: a tree of masks.

    Returns:
      A tree of `Bits` with the structure of `masks`.

    Raises:
      TypeError: if a leaf is not boolean, with the path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import mask_sets
      >>> mask_sets.to_bits({"w": jnp.array([[True, False, False], [True, True, False]])})
      {'w': Bits(bytes=Array([25], dtype=uint8), shape=(2, 3))}
    """
    flat = _tree.flatten(masks)
    return flat.rebuild([_pack(*row) for row in zip(flat.paths, flat.leaves, strict=True)])


def from_bits(bits: Any) -> Masks:
    """Masks from what `to_bits` made of them, exactly; spare bits are not looked at.

    Args:
      bits: a tree of `Bits`.

    Returns:
      Masks with the structure of `bits`.

    Raises:
      TypeError: if a leaf is not a `Bits`, with the path.
      ValueError: if the bytes are not uint8, or are too many or too few for the shape, with the
        path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import mask_sets
      >>> mask_sets.from_bits({"w": mask_sets.Bits(jnp.array([25], jnp.uint8), (2, 3))})
      {'w': Array([[ True, False, False],
             [ True,  True, False]], dtype=bool)}
    """
    leaves, structure = jax.tree.flatten(bits, is_leaf=lambda node: isinstance(node, Bits))
    # Paths to the `Bits`, not to the bytes in them.
    flat = _tree.flatten(jax.tree.unflatten(structure, range(len(leaves))))
    return flat.rebuild([_unpack(*row) for row in zip(flat.paths, leaves, strict=True)])


def _ratio(intersection: Any, union: Any) -> Any:
    """Python numbers as they are, so that large counts are divided exactly."""
    if isinstance(union, int):
        return intersection / union if union else 1.0
    return jnp.where(union == 0, 1.0, intersection / jnp.maximum(union, 1))


def _numbered(masks: tuple[Masks, ...]) -> dict[str, Masks]:
    if not masks:
        raise ValueError("`masks` must be at least one tree of masks, got none.")
    return {f"masks[{i}]": tree for i, tree in enumerate(masks)}


def _reduce(f: Callable[[Any, Any], jax.Array], trees: dict[str, Masks]) -> Masks:
    flat, rows = _rows(trees)
    return flat.rebuild([functools.reduce(f, map(jnp.asarray, row)) for row in rows])


def _rows(trees: dict[str, Masks]) -> tuple[_tree.Flat, list[tuple[Any, ...]]]:
    """The first tree taken apart, and for each of its leaves the masks of all trees, checked."""
    name, first = next(iter(trees.items()))
    flat = _tree.flatten(first)
    columns = [_tree.align(other, tree, name, first) for other, tree in trees.items()]
    rows = list(zip(*columns, strict=True))
    for path, row in zip(flat.paths, rows, strict=True):
        _check_broadcast(path, row)
    return flat, rows


def _check_broadcast(path: str, masks: tuple[Any, ...]) -> None:
    for mask in masks:
        _checks.boolean(path, mask)
    shapes = [shape for mask in masks if (shape := _leaves.shape_of(mask))]
    try:
        if len({len(shape) for shape in shapes}) > 1:
            raise ValueError("ranks differ")
        np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            f"`masks` must broadcast against each other, got shapes {shapes} at {path!r}; build "
            "them for the same params."
        ) from None


def _shape(masks: tuple[Any, ...]) -> tuple[int, ...]:
    return np.broadcast_shapes(*map(np.shape, masks))


def _on_host(*masks: Any) -> bool:
    return not _leaves.is_traced(*masks) and all(
        getattr(mask, "is_fully_addressable", True) for mask in masks
    )


def _count(f: np.ufunc, a: Any, b: Any) -> Any:
    if _on_host(a, b):
        return int(np.count_nonzero(f(np.asarray(a), np.asarray(b))))
    # On a CPU 30 times as fast as the sum of booleans, which XLA does not vectorize.
    ones = jax.lax.population_count(_packed(getattr(jnp, f.__name__)(a, b)))
    count = jnp.sum(ones, dtype=jnp.int32)
    return count if _leaves.is_traced(count) else int(count)


def _pack(path: str, mask: Any) -> Bits:
    _checks.boolean(path, mask)
    return Bits(_packed(jnp.asarray(mask)), jnp.shape(mask))


def _packed(mask: jax.Array) -> jax.Array:
    return jnp.packbits(mask, axis=None, bitorder="little")


def _unpack(path: str, bits: Any) -> jax.Array:
    if not isinstance(bits, Bits):
        raise TypeError(
            f"`bits` must be a tree of Bits, got {_leaves.describe(bits)} at {path!r}; to_bits "
            "makes it from masks."
        )
    size = math.prod(bits.shape)
    number = -(-size // 8)
    if _leaves.shape_of(bits.bytes) != (number,) or _leaves.dtype_of(bits.bytes) != np.uint8:
        raise ValueError(
            f"`bits` must hold uint8[{number}] for a mask of shape {bits.shape}, 8 entries a byte, "
            f"got {_leaves.describe(bits.bytes)} at {path!r}; take both as to_bits made them."
        )
    flags = jnp.unpackbits(jnp.asarray(bits.bytes), count=size, bitorder="little")
    return flags.astype(bool).reshape(bits.shape)
