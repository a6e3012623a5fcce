"""The figure of weights: how their values are spread."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsejax import filters
from sparsejax._typing import Filter, Params
from sparsejax.plots import _drawing, _networks

_BINS = 101


def histogram(
    networks: Mapping[str, Params], *, prunable: Filter = filters.weights, axes: Any = None
) -> Any:
    """Draws how many weights have which value, for a network before and after pruning, say.

    Zeros are left out (the legend has how many are not), and so is what is not finite. Numbers are
    on a logarithmic axis: the few large weights are what the network is made of. All leaves that
    `prunable` selects are counted together, in bins that are the same for all networks and
    symmetric around 0.

    Args:
      networks: names to params, such as `{"dense": params, "pruned": pruned}`, or to trees of
        `quantization`.
      prunable: which leaves are counted; by default weights.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if `networks` or `axes` are of another kind.
      ValueError: if there is no network, or one in which `prunable` selects no leaf.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import plots
      >>> weights = jnp.array([[0.1, -0.2, 0.3, -0.4]])
      >>> axes = plots.histogram({"dense": weights, "pruned": weights * jnp.array([[0, 0, 1, 1]])})
      >>> [text.get_text() for text in axes.get_legend().get_texts()]
      ['dense: 4 weights', 'pruned: 2 weights of 4']
    """
    found = _networks.leaves(networks, prunable)
    axes = _drawing.axes_of(axes)
    weights = {
        name: np.concatenate([np.ravel(leaf) for leaf in leaves.values()])
        for name, leaves in found.items()
    }
    seen = {name: values[np.isfinite(values) & (values != 0)] for name, values in weights.items()}
    edges = _edges(np.concatenate(list(seen.values())))
    for (name, values), color in zip(seen.items(), _drawing.colors(len(seen)), strict=True):
        label = f"{name}: {_amount(len(values), len(weights[name]))}"
        counts, _ = np.histogram(values, edges)
        axes.stairs(counts, edges, color=color, alpha=0.18, fill=True)
        axes.stairs(counts, edges, color=color, linewidth=1.3, label=label)
    if any(map(len, seen.values())):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("weight")
    axes.set_ylabel("number")
    _drawing.name_above(axes)
    return axes


def _edges(values: np.ndarray) -> np.ndarray:
    """An odd number of bins: 0 is in the middle of one, not the border of two."""
    end = float(np.max(np.abs(values))) if values.size else 1.0
    return np.linspace(-end, end, _BINS + 1)


def _amount(count: int, of: int) -> str:
    return f"{count:,} weights" + (f" of {of:,}" if count < of else "")
