"""Batch statistics of a network that has become smaller."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree


def recalibrate(
    update_fn: Callable[[Any, Any], Any], statistics: Any, batches: Iterable[Any]
) -> Any:
    """Sets running statistics to their mean over batches, whatever their momentum and past.

    After a cut that is not exact, the statistics of normalization layers are those of another
    network. `update_fn` is the network in training mode; a running mean makes `m·old + (1 - m)·new`
    of the old value and that of the batch, so that two calls, at 0 and at a number as large as the
    batch's, tell m and the value of the batch, and the mean of the latter is exact after one pass.
    Every batch counts the same, whatever its size. Statistics of less than float32 are handed to
    `update_fn` as float32.

    Args:
      update_fn: `(statistics, batch) -> statistics` after this batch.
      statistics: a pytree of floating arrays; leaves that are not (counters) are carried from batch
        to batch.
      batches: at least one.

    Returns:
      A tree like `statistics`.

    Raises:
      TypeError: if `update_fn` is no function.
      ValueError: if there is no batch, or a leaf is no running mean (Haiku's `average`, say, as
        long as it is corrected for its start: call `update_fn` over many batches instead).

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import shrinking
      >>> def update(stats, batch):
      ...     return {"mean": 0.9 * stats["mean"] + 0.1 * batch.mean(0)}
      >>> batches = [jnp.array([[1.0, 5.0]]), jnp.array([[3.0, 7.0]])]
      >>> new = shrinking.recalibrate(update, {"mean": jnp.array([100.0, 100.0])}, batches)
      >>> [f"{x:.3f}" for x in new["mean"]]
      ['2.000', '6.000']
    """
    _checks.function("update_fn", update_fn, "(statistics, batch) -> statistics", "update")
    flat = _tree.flatten(statistics)
    floating = [_leaves.is_floating(leaf) for leaf in flat.leaves]

    carried = list(flat.leaves)

    def after(leaves: list[Any], batch: Any) -> list[Any]:
        new = update_fn(flat.rebuild(leaves), batch)
        return _tree.align("update_fn's answer", new, "statistics", statistics)

    def filled(values: list[float]) -> list[Any]:
        rows = zip(carried, floating, values, strict=True)
        return [
            jnp.full_like(leaf, value, dtype=_leaves.wide_dtype(leaf.dtype)) if yes else leaf
            for leaf, yes, value in rows
        ]

    zeros = [0.0] * len(carried)
    momenta: list[Any] = []
    total: list[Any] = []
    count = 0
    for count, batch in enumerate(batches, 1):
        at_zero = after(filled(zeros), batch)
        if count == 1:
            sizes = [
                _size(leaf) if yes else 0.0 for leaf, yes in zip(at_zero, floating, strict=True)
            ]
            momenta = _momenta(at_zero, after(filled(sizes), batch), sizes)
        rows = zip(at_zero, momenta, strict=True)
        found = [x if m is None else _leaves.wide(x) / (1 - m) for x, m in rows]
        if count == 1:
            _check(flat, found, after(found, batch), momenta)
        means = zip(total or found, found, momenta, strict=True)
        total = [new if m is None else old + (new - old) / count for old, new, m in means]
        carried = [
            x if m is None else old for x, old, m in zip(at_zero, carried, momenta, strict=True)
        ]
    if count == 0:
        raise ValueError("`batches` must hold at least one batch, got none.")
    columns = zip(total, momenta, flat.leaves, strict=True)
    return flat.rebuild([x if m is None else x.astype(leaf.dtype) for x, m, leaf in columns])


def _size(leaf: Any) -> float:
    """A power of two not much below the largest entry, and one at least: m times it is exact."""
    largest = float(jnp.max(jnp.abs(leaf), initial=1.0))
    return 2.0 ** math.floor(math.log2(largest)) if math.isfinite(largest) else 1.0


def _momenta(at_zero: list[Any], at_size: list[Any], sizes: list[float]) -> list[float | None]:
    """By leaf, m of a running mean; None for what is no floating array, or has no entry."""
    rows = zip(at_zero, at_size, sizes, strict=True)
    return [
        float(jnp.mean(_leaves.wide(there) - _leaves.wide(zero))) / size
        if size and np.size(zero)
        else None
        for zero, there, size in rows
    ]


def _check(flat: _tree.Flat, found: list[Any], again: list[Any], momenta: list[Any]) -> None:
    """A running mean that is at the value of a batch stays there."""
    rows = zip(flat.paths, flat.leaves, found, again, momenta, strict=True)
    for path, leaf, value, then, momentum in rows:
        if momentum is None:
            continue
        tolerance = max(1e-3, 4 * float(jnp.finfo(leaf.dtype).eps))
        size = float(jnp.max(jnp.abs(value)))
        rests = bool(jnp.allclose(value, then, rtol=tolerance, atol=tolerance * size))
        if not -1e-3 <= momentum < 1 or not rests:
            raise ValueError(
                f"`statistics` must be running means, m * old + (1 - m) * new with m in [0, 1): "
                f"the leaf at {path!r} is none; call `update_fn` over many batches instead."
            )
