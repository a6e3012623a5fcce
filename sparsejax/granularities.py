"""What is scored and pruned as one unit: an entry, a block, a channel; and N of every M entries.

A granularity is a value: frozen, hashable, comparable. `Unstructured`, `Block` and `Channel` pool
the scores of a leaf into one score a unit, and spread the decision about each unit over its
entries; which units stay is for `selection` to say. `NM` has nothing to choose among units: it
fixes its own sparsity and answers with masks.

All methods are pure, and work under `jit`, `eval_shape` and, for a leaf that stacks layers, `vmap`.
On sharded arrays nothing moves where every unit lies inside one shard. Where units cross shards (a
ragged block, a group longer than a shard), an auto mesh gathers what it needs, and an explicit mesh
raises JAX's ShardingTypeError.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _checks, _counting, _leaves, selection

Pool: TypeAlias = Callable[..., jax.Array]
"""`(scores, axis=tuple of axes) -> scores` without these axes, such as `jnp.sum`."""

# Up to here LLVM unrolls the m² comparisons of a group into vector code (on 10M entries and
# two cores 2:4 takes 3 to 5 ms, 16:32 some 25); beyond it they take seconds, counting 150 ms.
_MOST_BY_PAIRS = 32


@runtime_checkable
class Granularity(Protocol):
    """Units of a leaf: their scores, and masks from the decision which of them are kept."""

    def units(self, path: str, scores: Any) -> jax.Array:
        """The score of every unit; `path` is the leaf's, for errors."""
        ...

    def expand(self, kept: Any, shape: Sequence[int]) -> jax.Array:
        """A mask that broadcasts against `shape`, from one boolean for every unit."""
        ...


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every entry is a unit.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import granularities
      >>> granularities.Unstructured().units("w", jnp.array([[1.0, 2.0]]))
      Array([[1., 2.]], dtype=float32)
    """

    def units(self, path: str, scores: Any) -> jax.Array:
        """The scores as they are, in their own dtype."""
        return _floating(path, scores)

    def expand(self, kept: Any, shape: Sequence[int]) -> jax.Array:
        """`kept` itself."""
        return _decisions(kept, tuple(shape), shape)


@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of entries over the last axes, such as 4 by 4 of a kernel.

    Where an axis does not divide, its last block is shorter and pools what it has; a block longer
    than the axis is one block. Axes before those of `shape` are not blocked: of a convolution's
    kernel (height, width, in, out), `Block((4, 4))` blocks (in, out) at every tap.

    Scores are pooled in at least float32. Sums and means are floats: they are the same eager,
    jitted and sharded up to the rounding of the sum, so that near ties may fall either way. A
    maximum is exact (on CPU, denormals may count as zero). A NaN makes its whole unit NaN. A leaf
    without entries has no blocks.

    Args:
      shape: the sizes of a block along the last axes, each at least 1.
      pool: `(scores, axis=tuple of axes) -> scores`: `jnp.sum`, `jnp.mean`, `jnp.max`, `l2`.

    Raises:
      TypeError: if `shape` is no tuple or list of ints, or `pool` no function.
      ValueError: if `shape` is empty or a size is less than 1; from the methods, if a leaf has
        fewer axes than the block, or `pool` returns another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import granularities
      >>> block = granularities.Block((2, 2))
      >>> block.units("w", jnp.ones((3, 4)))
      Array([[4., 4.],
             [2., 2.]], dtype=float32)
      >>> block.expand(jnp.array([[True, False], [False, True]]), (3, 4)).astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0],
             [0, 0, 1, 1]], dtype=int32)
    """

    shape: Sequence[int]
    pool: Pool = jnp.sum

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple | list):
            raise TypeError(
                "`shape` must be a tuple of ints, one for each axis of a block, "
                f"got {_leaves.brief(self.shape)}; for example (4, 4)."
            )
        if not self.shape:
            raise ValueError(
                "`shape` must have at least one axis, got (); Unstructured() prunes single entries."
            )
        for size in self.shape:
            _check_int("every size in `shape`", size, least=1)
        object.__setattr__(self, "shape", tuple(self.shape))
        _check_pool(self.pool)

    def units(self, path: str, scores: Any) -> jax.Array:
        """One score for each block: along blocked axes the length divided by the block, rounded up.

        Args:
          path: the leaf's path, for errors.
          scores: a floating array with at least as many axes as the block.

        Returns:
          An array of at least float32, of as many axes as `scores`.
        """
        array = _leaves.wide(_floating(path, scores))
        self._check_rank(array.shape, f"{_leaves.describe(array)} at {path!r}")
        if array.size == 0:
            return jnp.zeros(self._unit_shape(array.shape), array.dtype)
        return self._pooled(path, array)

    def expand(self, kept: Any, shape: Sequence[int]) -> jax.Array:
        """A mask of the full `shape`: each block's decision at all of its entries.

        Args:
          kept: a boolean array of the shape that `units` has.
          shape: the shape of the leaf.

        Returns:
          A boolean array of this shape.
        """
        shape = tuple(shape)
        self._check_rank(shape, f"shape {shape}")
        return self.spread(_decisions(kept, self._unit_shape(shape), shape), shape)

    def spread(self, values: jax.Array, shape: Sequence[int]) -> jax.Array:
        """The value of every block, of any dtype, at all of its entries: an array of `shape`."""
        shape = tuple(shape)
        for axis, block in enumerate(self.shape, start=len(shape) - len(self.shape)):
            own = _counting.explicit(values)
            values = jnp.repeat(values, min(block, shape[axis]), axis, out_sharding=own)
        return lax.slice(values, (0,) * len(shape), shape)

    def sizes(self, path: str, shape: Sequence[int]) -> np.ndarray:
        """How many entries every block has; `path` is the leaf's, for errors."""
        shape = tuple(shape)
        self._check_rank(shape, f"shape {shape} at {path!r}")
        sizes = np.ones(shape[: len(shape) - len(self.shape)], np.int64)
        for length, block in zip(shape[sizes.ndim :], self.shape, strict=True):
            starts = np.arange(0, length, block)
            sizes = sizes[..., None] * np.minimum(block, length - starts)
        return sizes

    def _pooled(self, path: str, array: jax.Array) -> jax.Array:
        first = array.ndim - len(self.shape)
        sizes = [min(block, n) for block, n in zip(self.shape, array.shape[first:], strict=True)]
        for axis, size in enumerate(sizes, start=first):
            length = array.shape[axis]
            if length % size:
                parts = jnp.split(array, [length - length % size], axis)
                return jnp.concatenate([self._pooled(path, part) for part in parts], axis)
        blocks = array
        for axis, size in reversed(list(enumerate(sizes, start=first))):
            blocks = _split_axis(blocks, axis, size)
        # [..., G, size, H, size]
        return _pool(self.pool, path, blocks, tuple(range(first + 1, blocks.ndim, 2)))

    def _unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        first = len(shape) - len(self.shape)
        ends = zip(shape[first:], self.shape, strict=True)
        return shape[:first] + tuple(-(-length // block) for length, block in ends)

    def _check_rank(self, shape: tuple[int, ...], leaf: str) -> None:
        if len(shape) < len(self.shape):
            raise ValueError(
                "`shape` of a block must have at most as many axes as the leaf, "
                f"got {self.shape} for {leaf}; leave the leaf out of `prunable`, or give the "
                "block fewer axes."
            )


@dataclasses.dataclass(frozen=True)
class Channel:
    """All entries that share an index of one axis: output channels by default in Flax.

    Flax kernels are (..., in, out), so `Channel()` takes output channels and `Channel(-2)` input
    channels; Equinox and PyTorch weights are (out, in, ...): `Channel(0)` and `Channel(1)`. Masks
    have one entry a channel, and shape 1 along every other axis.

    Scores are pooled in at least float32. Sums and means are floats: they are the same eager,
    jitted and sharded up to the rounding of the sum, so that near ties may fall either way. A
    maximum is exact (on CPU, denormals may count as zero). A NaN makes its whole unit NaN. Channels
    without entries have score 0, whatever the pool.

    Sums grow with the number of entries: where channels of layers of different sizes compete, a
    global scope with `jnp.sum` may take all of a small layer. `jnp.mean`, a scope per leaf or an
    allocation does not.

    Args:
      axis: the axis whose indices are the channels; negative ones count from the end.
      pool: `(scores, axis=tuple of axes) -> scores`: `jnp.sum`, `jnp.mean`, `jnp.max`, `l2`.

    Raises:
      TypeError: if `axis` is no int, or `pool` no function.
      ValueError: from the methods, if a leaf has no such axis, or `pool` returns another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import granularities
      >>> channel = granularities.Channel(pool=jnp.max)
      >>> channel.units("w", jnp.array([[1.0, 2.0], [3.0, 0.0]]))
      Array([3., 2.], dtype=float32)
      >>> channel.expand(jnp.array([True, False]), (2, 2))
      Array([[ True, False]], dtype=bool)
    """

    axis: int = -1
    pool: Pool = jnp.sum

    def __post_init__(self) -> None:
        _check_int("`axis`", self.axis)
        _check_pool(self.pool)

    def units(self, path: str, scores: Any) -> jax.Array:
        """One score for each channel.

        Args:
          path: the leaf's path, for errors.
          scores: a floating array that has the axis.

        Returns:
          An array of at least float32, of the axis's length.
        """
        array = _leaves.wide(_floating(path, scores))
        axis = _find_axis(self.axis, array.shape, f"{_leaves.describe(array)} at {path!r}")
        if array.size == 0:
            return jnp.zeros(array.shape[axis], array.dtype)
        others = tuple(i for i in range(array.ndim) if i != axis)
        return _pool(self.pool, path, array, others)

    def expand(self, kept: Any, shape: Sequence[int]) -> jax.Array:
        """A mask that has each channel's decision along the axis, and shape 1 along the others.

        Args:
          kept: a boolean vector, one for each channel.
          shape: the shape of the leaf.

        Returns:
          A boolean array that broadcasts against this shape.
        """
        axis = _find_axis(self.axis, tuple(shape), f"shape {tuple(shape)}")
        return self.spread(_decisions(kept, (shape[axis],), shape), shape)

    def spread(self, values: jax.Array, shape: Sequence[int]) -> jax.Array:
        """The value of every channel, of any dtype, along the axis, with 1 along the others."""
        axis = _find_axis(self.axis, tuple(shape), f"shape {tuple(shape)}")
        return values.reshape([n if i == axis else 1 for i, n in enumerate(shape)])

    def sizes(self, path: str, shape: Sequence[int]) -> np.ndarray:
        """How many entries every channel has; `path` is the leaf's, for errors."""
        axis = _find_axis(self.axis, tuple(shape), f"shape {tuple(shape)} at {path!r}")
        others = [n for i, n in enumerate(shape) if i != axis]
        return np.full(shape[axis], np.prod(others, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class NM:
    """The n highest of every m consecutive entries along an axis, the pattern of sparse hardware.

    Groups start at index 0. Where m does not divide the axis, the last group is shorter, of r
    entries, and keeps min(n, r): no group holds more than n. Ties: the lower index is kept; +0 and
    -0 are equal, denormals count, NaN ranks lowest. Scores are compared as integers, so that equal
    scores give equal masks eager, jitted and sharded.

    The axis is explicit, since hardware wants the groups along the axis that a product sums over:
    -2 for Flax kernels (..., in, out), -1 for Equinox and PyTorch matrices (out, in), 1 for their
    convolutions (out, in, height, width).

    Cost: one fused pass, in which every entry is compared with the m of its group, up to m = 32,
    and a copy only where m does not divide; beyond, some hundred reads and a few copies, by
    `selection.keep_largest_along`. No sort.

    Args:
      n: how many entries of a group are kept, from 1 to m.
      m: how many entries a group has.
      axis: the axis along which they are consecutive; negative ones count from the end.

    Raises:
      TypeError: if an argument is no int.
      ValueError: if n < 1 or m < n; from `masks`, if a leaf has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import granularities
      >>> scores = jnp.array([[3.0, 1.0, 2.0, 2.0, 5.0]])
      >>> granularities.NM(2, 4, axis=-1).masks("w", scores)
      Array([[ True, False,  True, False,  True]], dtype=bool)

    References:
      A. Mishra et al., *Accelerating sparse deep neural networks* (2021),
      https://arxiv.org/abs/2104.08378. Ours groups along any axis, and takes ragged ends.
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self) -> None:
        _check_int("`n`", self.n, least=1)
        _check_int("`m`", self.m)
        _check_int("`axis`", self.axis)
        if self.m < self.n:
            raise ValueError(
                f"`m` must be at least `n`, which is {self.n}, got {self.m}: of every m entries n "
                "are kept, as in NM(2, 4)."
            )

    def masks(self, path: str, scores: Any) -> jax.Array:
        """A mask of the scores' full shape.

        Args:
          path: the leaf's path, for errors.
          scores: a floating array that has the axis.

        Returns:
          A boolean array of the same shape; an empty one for empty scores.
        """
        array = _floating(path, scores)
        axis = _find_axis(self.axis, array.shape, f"{_leaves.describe(array)} at {path!r}")
        mask: jax.Array = _highest(array, int(self.n), int(self.m), axis)
        return mask


def l2(scores: jax.Array, axis: int | Sequence[int] | None = None) -> jax.Array:
    """The Euclidean norm along some axes, a pool: √Σx², without overflow on the way.

    Entries are divided by the largest before they are squared.

    Args:
      scores: a floating array.
      axis: which axes to pool; all by default.

    Returns:
      An array without these axes, of at least float32; 0 where all entries are 0, and inf or NaN
      where an entry is.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import granularities
      >>> granularities.l2(jnp.array([[3e30, -4e30], [0.0, 0.0]]), axis=(1,))
      Array([5.e+30, 0.e+00], dtype=float32)
    """
    x = _leaves.wide(scores)
    axes = tuple(axis) if isinstance(axis, Sequence) else axis
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return jnp.squeeze(scale, axes) * jnp.sqrt(jnp.sum(jnp.square(x / scale), axis=axes))


# Compiled here, because unfused the comparisons would take m times the memory of the scores, and
# the eager loop of a search would be compiled anew in every call.
@partial(jax.jit, static_argnums=(1, 2, 3))
def _highest(scores: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    length = scores.shape[axis]
    m = min(m, max(length, 1))
    if length % m:
        parts = jnp.split(scores, [length - length % m], axis)
        return jnp.concatenate([_highest(part, n, m, axis) for part in parts], axis)
    groups = _split_axis(scores, axis, m)
    if m <= _MOST_BY_PAIRS:
        mask = _highest_by_pairs(selection.order_key(groups), n, axis + 1)
    else:
        mask = selection.keep_largest_along(groups, min(n, m), axis + 1)
    return mask.reshape(scores.shape)


def _highest_by_pairs(keys: jax.Array, n: int, axis: int) -> jax.Array:
    """True where fewer than n entries of the group come before; XLA fuses it into one loop."""
    m, dtype = keys.shape[axis], keys.dtype
    entry, other = jnp.expand_dims(keys, axis), jnp.expand_dims(keys, axis + 1)
    # An entry comes before those of lower keys, and before equal ones of higher index: all others
    # have to exceed it by 1, for which even the largest key, infinity's, leaves room. From iota,
    # since a constant would be loaded entry by entry (five times slower where axis is the last).
    pairs = (*(1,) * axis, m, m, *(1,) * (keys.ndim - axis - 1))
    index = partial(lax.broadcasted_iota, dtype, pairs)
    excess = (index(axis) >= index(axis + 1)).astype(dtype)
    return jnp.sum(other >= entry + excess, axis=axis, dtype=jnp.int32) < n


def _pool(pool: Pool, path: str, array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    pooled = pool(array, axis=axes)
    expected = tuple(n for i, n in enumerate(array.shape) if i not in axes)
    if _leaves.shape_of(pooled) != expected or not _leaves.is_floating(pooled):
        raise ValueError(
            f"`pool` must return one floating score for each unit, of shape {expected} for "
            f"{_leaves.describe(array)} over axes {axes}, got {_leaves.describe(pooled)} at "
            f"{path!r}; for example jnp.sum."
        )
    return pooled


def _split_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., G * size, ...] -> [..., G, size, ...]; all other axes keep their sharding."""
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])


def _floating(path: str, scores: Any) -> jax.Array:
    if not _leaves.is_floating(scores):
        raise TypeError(
            f"`scores` must be real floating arrays, got {_leaves.describe(scores)} at {path!r}; "
            "astype(float) of integers, or leave the leaf out of `prunable`."
        )
    return jnp.asarray(scores)


def _decisions(kept: Any, units: tuple[int, ...], shape: Sequence[int]) -> jax.Array:
    if _leaves.shape_of(kept) != units or _leaves.dtype_of(kept) != np.dtype(bool):
        raise ValueError(
            f"`kept` must hold one boolean for each unit, of shape {units} for a leaf of shape "
            f"{tuple(shape)}, got {_leaves.describe(kept)}; make it from what `units` returned."
        )
    return jnp.asarray(kept)


def _find_axis(axis: int, shape: tuple[int, ...], leaf: str) -> int:
    """The axis counted from the start."""
    rank = len(shape)
    if not -rank <= axis < rank:
        choices = f"choose one from {-rank} to {rank - 1}, or " if rank else ""
        raise ValueError(
            f"`axis` must be an axis of the leaf, got {axis} for {leaf}; {choices}leave the leaf "
            "out of `prunable`."
        )
    return axis % rank


def _check_int(what: str, value: Any, least: int | None = None) -> None:
    if not _leaves.is_int(value):
        raise TypeError(f"{what} must be an int, got {_leaves.brief(value)}.")
    if least is not None and value < least:
        raise ValueError(f"{what} must be at least {least}, got {value}.")


def _check_pool(pool: Any) -> None:
    _checks.function("pool", pool, "(scores, axis=axes) -> scores", "jnp.sum")
