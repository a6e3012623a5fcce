"""The figure of densities: how much of each layer is left."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sparsejax import filters
from sparsejax._typing import Filter, Params
from sparsejax.plots import _drawing, _networks

# Of bars, in inches; the room for axes and legend; the tallest figure.
_BAR, _GAP, _REST, _TALLEST = 0.16, 0.1, 0.9, 20.0
# Of the distance of two rows, what their bars take.
_THICK = 0.8
# Of more bars than this their numbers would be a column of small print.
_MOST_NUMBERS = 60


def densities(
    networks: Mapping[str, Params], *, prunable: Filter = filters.weights, axes: Any = None
) -> Any:
    """Draws which share of each layer is not zero, a bar for each of several networks.

    A row is a leaf, in the order of the first network that has it; the legend has the density of
    all of them together. The axis is logarithmic where densities span a factor of ten. A leaf that
    is all zeros has a cross instead of a bar: the network is cut there.

    Args:
      networks: names to params with zeros, such as `{"SNIP": sj.apply_masks(params, masks)}`, or to
        trees of `quantization`; a leaf need not be in all of them.
      prunable: which leaves are drawn; by default weights.
      axes: where to draw, of matplotlib; by default in a new figure, as tall as it needs.

    Returns:
      The axes.

    Raises:
      TypeError: if `networks` or `axes` are of another kind.
      ValueError: if there is no network, or one in which `prunable` selects no leaf.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import plots
      >>> weights = jnp.arange(8.0).reshape(2, 4)
      >>> axes = plots.densities({
      ...     "dense": {"in": weights + 1, "out": weights + 1},
      ...     "pruned": {"in": weights * (weights > 4), "out": weights * (weights > 6)},
      ... })
      >>> [tick.get_text() for tick in axes.get_yticklabels()]
      ['in', 'out']
      >>> [text.get_text() for text in axes.get_legend().get_texts()]
      ['dense: 100 %', 'pruned: 25 %']
    """
    found = _networks.leaves(networks, prunable)
    rows = list(dict.fromkeys(path for leaves in found.values() for path in leaves))
    height = len(rows) * (len(found) * _BAR + _GAP) + _REST
    axes = _drawing.axes_of(axes, (7.2, min(max(height, 2.0), _TALLEST)))
    _draw(axes, {name: _bars(rows, leaves) for name, leaves in found.items()})
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("density")
    axes.xaxis.set_major_formatter(lambda value, _: _drawing.percent(value))
    _drawing.name_above(axes)
    return axes


class _Bars(NamedTuple):
    """The bars of one network: at which rows, and what they say."""

    rows: np.ndarray
    kept: np.ndarray
    sizes: np.ndarray

    @property
    def densities(self) -> np.ndarray:
        return self.kept / np.maximum(self.sizes, 1)

    @property
    def density(self) -> float:
        """Of all leaves together."""
        return float(np.sum(self.kept) / max(np.sum(self.sizes), 1))


def _bars(rows: list[str], leaves: Mapping[str, np.ndarray]) -> _Bars:
    return _Bars(
        np.array([rows.index(path) for path in leaves]),
        np.array([np.count_nonzero(leaf) for leaf in leaves.values()]),
        np.array([leaf.size for leaf in leaves.values()]),
    )


def _draw(axes: Any, networks: dict[str, _Bars]) -> None:
    left = _left_end(np.concatenate([bars.densities for bars in networks.values()]))
    if left:
        axes.set_xscale("log")
    axes.set_xlim(left, 1)
    thick = _THICK / len(networks)
    numbered = sum(len(bars.rows) for bars in networks.values()) <= _MOST_NUMBERS
    colors = _drawing.colors(len(networks))
    for place, ((name, bars), color) in enumerate(zip(networks.items(), colors, strict=True)):
        heights = bars.rows + (place + 0.5) * thick - _THICK / 2
        label = f"{name}: {_percent(bars.density)}"
        widths = np.maximum(bars.densities - left, 0)
        axes.barh(heights, widths, 0.9 * thick, left, color=color, label=label)
        if not np.all(bars.kept):
            _draw_crosses(axes, heights[bars.kept == 0], color)
        if numbered:
            _number(axes, heights, bars.densities, left)


def _draw_crosses(axes: Any, heights: np.ndarray, color: Any) -> None:
    left_edge = axes.get_yaxis_transform()
    axes.plot(np.zeros_like(heights), heights, "x", color=color, transform=left_edge, clip_on=False)


def _number(axes: Any, heights: np.ndarray, densities: np.ndarray, left: float) -> None:
    """Writes every density behind its bar."""
    for y, density in zip(heights, densities, strict=True):
        axes.annotate(
            _percent(density),
            (max(density, left), y),
            (4 if density else 8, 0),
            textcoords="offset points",
            va="center",
            fontsize="x-small",
            color=_drawing.QUIET,
        )


def _left_end(densities: np.ndarray) -> float:
    """Where bars begin: at 0, or below the least one where they span a factor of ten."""
    some = densities[densities > 0]
    if not some.size or some.max() < 10 * some.min():
        return 0.0
    return float(10.0 ** np.floor(np.log10(some.min() / 2)))


def _percent(density: float) -> str:
    return _drawing.percent(float(f"{density:.3g}"))
