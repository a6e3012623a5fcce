"""Masks of least magnitude from the options of `sparsejax prune`.

A network has hundreds of leaves, and a program for all of them together takes XLA long to compile:
what competes is one array here, and what does not is pruned leaf by leaf.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _patterns, allocation, criteria, filters, granularities, masking, selection
from sparsejax.cli import _console
from sparsejax.cli._choosing import Layout

_PIECE = 1 << 30  # Entries of one array; `masking.topk` takes less than 2³¹.


@dataclasses.dataclass(frozen=True)
class LeadingBlock:
    """Blocks over the first two axes, (out, in) in torch, at every place of a kernel."""

    shape: tuple[int, int]

    def units(self, path: str, scores: Any) -> jax.Array:
        """The score of every block."""
        return _block(self.shape, np.ndim(scores) - 2).units(path, scores)

    def expand(self, kept: Any, shape: Sequence[int]) -> jax.Array:
        """Each block's decision at all of its entries."""
        return _block(self.shape, len(shape) - 2).expand(kept, shape)


def masks(
    arrays: Mapping[str, np.ndarray],
    old: Mapping[str, np.ndarray],
    options: argparse.Namespace,
    layout: Layout,
) -> dict[str, np.ndarray]:
    """A mask for every one of these leaves, in which what `old` masks prune goes first."""
    _check_no_nan(arrays)
    wide = any(array.dtype == np.float64 for array in arrays.values())
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        scores = {n: _magnitude(array, old.get(n)) for n, array in arrays.items()}
        if options.nm:
            n_of_m = granularities.NM(options.nm[0], options.nm[1], input_axis(layout))
            return {n: np.asarray(n_of_m.masks(n, s)) for n, s in scores.items()}
        granularity = _granularity(options, layout)
        pooled = {n: np.asarray(granularity.units(n, s)) for n, s in scores.items()}
        shapes = {n: array.shape for n, array in arrays.items()}
        kept = _kept(pooled, shapes, options, layout)
        return {n: np.asarray(granularity.expand(k, shapes[n])) for n, k in kept.items()}


def units(mask: np.ndarray, options: argparse.Namespace, layout: Layout) -> np.ndarray:
    """One entry for each unit that was chosen among, of a mask that `masks` made."""
    if not options.block:
        return mask  # Of channels it has one entry each.
    block = _block(options.block, mask.ndim - 2 if layout == "torch" else 0).shape
    return _patterns.coarse(mask, tuple(block))


def input_axis(layout: Layout) -> int:
    """The axis that a product sums over."""
    return 1 if layout == "torch" else -2


def _magnitude(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """|w|, and below it, and a kept zero's, what a mask prunes."""
    scores = np.asarray(criteria.magnitude(array))
    return scores if mask is None else np.where(mask, scores, -np.finfo(scores.dtype).tiny)


def _kept(
    pooled: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    options: argparse.Namespace,
    layout: Layout,
) -> dict[str, np.ndarray]:
    """Which units stay, by the scores of all of them."""
    allocate = _allocation(options.allocation, layout)
    if allocate is not None:
        layers = [allocation.Layer(n, shapes[n], u.size) for n, u in pooled.items()]
        keep = selection.kept_count(options.sparsity, sum(u.size for u in pooled.values()))
        counts = allocation.allocate(allocate, layers, keep)
        pairs = zip(pooled.items(), counts, strict=True)
        return {n: _best([u], count=u.size - k)[0] for (n, u), k in pairs}
    if options.scope == "per-leaf":
        return {n: _best([u], options.sparsity)[0] for n, u in pooled.items()}
    return _best_of_all(pooled, options.sparsity)


def _best_of_all(pooled: Mapping[str, np.ndarray], sparsity: float) -> dict[str, np.ndarray]:
    """One after the other, since ties are broken in the order of the leaves."""
    together = np.concatenate([u.reshape(-1) for u in pooled.values()])
    pieces = [together[i : i + _PIECE] for i in range(0, max(together.size, 1), _PIECE)]
    kept = np.concatenate(_best(pieces, sparsity))
    parts = np.split(kept, np.cumsum([u.size for u in pooled.values()])[:-1])
    return {n: part.reshape(u.shape) for (n, u), part in zip(pooled.items(), parts, strict=True)}


def _best(
    scores: list[np.ndarray], sparsity: float | None = None, count: int | None = None
) -> list[np.ndarray]:
    """Masks of the highest scores of several arrays together."""
    found = masking.topk(scores, sparsity, count=count, prunable=filters.floating)
    return list(map(np.asarray, found))


def _granularity(options: argparse.Namespace, layout: Layout) -> Any:
    if options.channel:
        return granularities.Channel(0 if layout == "torch" else -1, pool=jnp.mean)
    if options.block:
        return LeadingBlock(options.block) if layout == "torch" else _block(options.block, 0)
    return granularities.Unstructured()


def _block(shape: tuple[int, int], axes_behind: int) -> granularities.Block:
    """Pooled by the mean, as channels: a short block at the end counts by its entries' size."""
    return granularities.Block((*shape, *(1,) * axes_behind), pool=jnp.mean)


def _allocation(name: str | None, layout: Layout) -> allocation.Allocation | None:
    if name == "er" and layout == "torch":
        return partial(allocation.erdos_renyi, axes=(1, 0))
    table = {
        "uniform": allocation.uniform,
        "er": allocation.erdos_renyi,
        "erk": allocation.erdos_renyi_kernel,
    }
    return table[name] if name else None


def _check_no_nan(arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if np.isnan(array).any():
            raise _console.CommandError(
                f"leaf {name!r} has NaN, which has no magnitude; leave it out by --exclude"
            )
