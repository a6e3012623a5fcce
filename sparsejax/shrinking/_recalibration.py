"""Batch statistics of a network that has become smaller."""

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
    of the old value and that of the batch, so that two calls, at 0 and at 1, tell m and the value
    of the batch, and the mean of the latter is exact after one pass.

    Args:
      update_fn: `(statistics, batch) -> statistics` after this batch.
      statistics: a pytree of floating arrays; leaves that are not (counters) are those after the
        last batch.
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

    def after(leaves: list[Any], batch: Any) -> list[Any]:
        new = update_fn(flat.rebuild(leaves), batch)
        return _tree.align("update_fn's answer", new, "statistics", statistics)

    def filled(value: float) -> list[Any]:
        rows = zip(flat.leaves, floating, strict=True)
        return [jnp.full_like(leaf, value) if yes else leaf for leaf, yes in rows]

    def of_batch(batch: Any) -> list[Any]:
        rows = zip(after(filled(0.0), batch), momenta, strict=True)
        return [x if m is None else x / (1 - m) for x, m in rows]

    momenta: list[Any] = []
    total: list[Any] = []
    count = 0
    for count, batch in enumerate(batches, 1):
        if count == 1:
            pairs = zip(after(filled(1.0), batch), after(filled(0.0), batch), strict=True)
            momenta = [
                float(jnp.mean(one - zero)) if yes and np.size(one) else None
                for (one, zero), yes in zip(pairs, floating, strict=True)
            ]
            first = of_batch(batch)
            _check(flat.paths, first, after(first, batch), momenta)
        found = of_batch(batch)
        rows = zip(total or found, found, momenta, strict=True)
        total = [new if m is None else old + (new - old) / count for old, new, m in rows]
    if count == 0:
        raise ValueError("`batches` must hold at least one batch, got none.")
    columns = zip(total, momenta, flat.leaves, strict=True)
    return flat.rebuild([x if m is None else x.astype(leaf.dtype) for x, m, leaf in columns])


def _check(paths: list[str], found: list[Any], again: list[Any], momenta: list[Any]) -> None:
    """A running mean that is at the value of a batch stays there."""
    rows = zip(paths, found, again, momenta, strict=True)
    for path, value, then, momentum in rows:
        if momentum is None:
            continue
        size = float(jnp.max(jnp.abs(value)))
        rests = bool(jnp.allclose(value, then, rtol=1e-3, atol=1e-3 * size))
        if not -1e-3 <= momentum < 1 or not rests:
            raise ValueError(
                f"`statistics` must be running means, m * old + (1 - m) * new with m in [0, 1): "
                f"the leaf at {path!r} is none; call `update_fn` over many batches instead."
            )
