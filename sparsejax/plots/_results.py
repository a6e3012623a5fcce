"""Figures of results: accuracy or error against sparsity, a line for each method."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from sparsejax import _checks, _leaves
from sparsejax.plots import _drawing

Results: TypeAlias = Mapping[str, Mapping[Any, Any]]
"""`{method: {sparsity: values, one for each seed}}`; one value may stand alone."""

# Of methods with one sparsity; filled ones, which are told apart at a small size.
_MARKERS = ("D", "s", "^", "v", "P", "X", "*", "<", ">")


class _Line(NamedTuple):
    """What is drawn of a method: its sparsities, ascending, and what its seeds say at each."""

    method: str
    sparsities: np.ndarray
    means: np.ndarray
    deviations: np.ndarray


def accuracy(results: Results, *, axes: Any = None) -> Any:
    """Draws the accuracy of methods against sparsity, with the standard deviation over seeds.

    A method with several sparsities is a line through the means, in a band of one standard
    deviation (of n - 1) to both sides. One with a single sparsity, such as a figure from a paper,
    is a marker with a bar; if that sparsity is 0, the dense network, it is a dashed line across. A
    value that is not finite makes a gap. The axis of the sparsities is that of `sensitivity`; where
    all values are in [0, 1], they are labeled as percentages.

    Args:
      results: `{method: {sparsity: values}}`, with a value for each seed, or one number.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if `results` or `axes` are of another kind.
      ValueError: if there is no method, a method has no sparsity, or a sparsity no value, or a
        sparsity is not in [0, 1].
      ImportError: if matplotlib is not installed.

    Example:
      >>> from sparsejax import plots
      >>> axes = plots.accuracy({
      ...     "dense": {0: [0.984, 0.983]},
      ...     "gradual": {0.9: [0.984, 0.982], 0.95: [0.983, 0.981], 0.98: [0.979, 0.976]},
      ...     "SNIP (paper)": {0.95: 0.984, 0.98: 0.976},
      ... })
      >>> [text.get_text() for text in axes.get_legend().get_texts()]
      ['dense', 'gradual', 'SNIP (paper)']
    """
    return _draw(results, "accuracy", axes)


def error(results: Results, *, axes: Any = None) -> Any:
    """Draws the error of methods against sparsity, as `accuracy` does; lower = better.

    The axis of the errors is logarithmic where they are positive and span a factor of ten, so that
    a method that fails does not hide how the others differ.

    Args:
      results: `{method: {sparsity: values}}`, with a value for each seed, or one number.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes.

    Raises:
      TypeError, ValueError, ImportError: as `accuracy`.

    Example:
      >>> from sparsejax import plots
      >>> axes = plots.error({"random": {0.9: 0.03, 0.99: 0.9}, "gradual": {0.9: 0.02, 0.99: 0.03}})
      >>> axes.get_yscale()
      'log'
    """
    axes = _draw(results, "error", axes)
    values = np.concatenate([line.means for line in _lines(results)])
    values = values[np.isfinite(values)]
    if values.size and 0 < 10 * values.min() <= values.max():
        axes.set_yscale("log")
        _label_decades(axes)
        _format(axes, values)
    return axes


def _draw(results: Results, what: str, axes: Any) -> Any:
    _check(results)
    lines = _lines(results)
    axes = _drawing.axes_of(axes)
    colors = iter(_drawing.colors(sum(not _is_dense(line) for line in lines)))
    markers = itertools.cycle(_MARKERS)
    for line in lines:
        if _is_dense(line):
            _draw_level(axes, line)
        elif len(line.sparsities) == 1:
            _draw_point(axes, line, next(colors), next(markers))
        else:
            _draw_band(axes, line, next(colors))
    axes.set_xlabel("sparsity")
    axes.set_ylabel(what)
    _format(axes, np.concatenate([line.means for line in lines]))
    _drawing.sparsity_axis(axes, _placed(lines))
    _drawing.name_layers(axes, len(lines))
    return axes


def _placed(lines: list[_Line]) -> np.ndarray:
    """The sparsities that need a place: not that of a dense network, which is drawn across."""
    placed = np.array([s for line in lines if not _is_dense(line) for s in line.sparsities])
    return placed if np.any(placed < 1) else np.append(placed, 0.0)


def _draw_level(axes: Any, line: _Line) -> None:
    (mean,), (deviation,) = line.means, line.deviations
    style = {"color": _drawing.QUIET, "zorder": 1.5}
    axes.axhline(mean, linewidth=1.2, linestyle="--", label=line.method, **style)
    if deviation:
        axes.axhspan(mean - deviation, mean + deviation, alpha=0.12, linewidth=0, **style)


def _draw_point(axes: Any, line: _Line, color: Any, marker: str) -> None:
    axes.errorbar(
        line.sparsities,
        line.means,
        line.deviations if line.deviations.any() else None,
        fmt=marker,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        color=color,
        elinewidth=1.2,
        capsize=2.5,
        label=line.method,
        zorder=3,
    )


def _draw_band(axes: Any, line: _Line, color: Any) -> None:
    low, high = line.means - line.deviations, line.means + line.deviations
    axes.plot(
        line.sparsities,
        np.where(np.isfinite(line.means), line.means, np.nan),
        marker="o",
        markersize=3.5,
        linewidth=1.6,
        color=color,
        label=line.method,
    )
    axes.fill_between(line.sparsities, low, high, color=color, alpha=0.16, linewidth=0)


def _lines(results: Results) -> list[_Line]:
    lines = []
    for method, by_sparsity in results.items():
        sparsities = sorted(by_sparsity, key=float)
        seeds = [np.ravel(np.asarray(by_sparsity[s], float)) for s in sparsities]
        lines.append(
            _Line(
                method,
                np.array(sparsities, float),
                np.array([np.mean(values) for values in seeds]),
                np.array([_deviation(values) for values in seeds]),
            )
        )
    return lines


def _deviation(values: np.ndarray) -> float:
    """Of several seeds; NaN, which is a gap, where one of them is not finite."""
    if not np.all(np.isfinite(values)):
        return np.nan
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _is_dense(line: _Line) -> bool:
    return list(line.sparsities) == [0.0]


def _format(axes: Any, values: np.ndarray) -> None:
    """Fractions as percentages, as on the axis of the sparsities."""
    seen = values[np.isfinite(values)]
    if seen.size and seen.min() >= 0 and seen.max() <= 1:
        axes.yaxis.set_major_formatter(lambda value, _: _drawing.percent(value))


def _label_decades(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _check(results: Any) -> None:
    if not isinstance(results, Mapping) or not all(
        isinstance(of_method, Mapping) for of_method in results.values()
    ):
        raise TypeError(
            "`results` must map methods to sparsities to values, such as "
            f'{{"magnitude": {{0.9: [0.98, 0.97]}}}}, got {_leaves.brief(results)}.'
        )
    if not results:
        raise ValueError("`results` must hold at least one method, got none.")
    for method, of_method in results.items():
        if not of_method:
            raise ValueError(
                f"`results` must have a sparsity for each method, got none for {method!r}."
            )
        for sparsity, values in of_method.items():
            _check_values(method, sparsity, values)


def _check_values(method: str, sparsity: Any, values: Any) -> None:
    _checks.real_number("results", sparsity)
    if not 0 <= float(sparsity) <= 1:
        raise ValueError(
            "`results` must have sparsities in [0, 1] (fractions, not percentages), got "
            f"{sparsity} for {method!r}."
        )
    try:
        count = np.size(np.asarray(values, float))
    except (TypeError, ValueError):
        raise TypeError(
            f"`results` must have numbers, one for each seed, got {_leaves.brief(values)} for "
            f"{method!r} at sparsity {sparsity}."
        ) from None
    if count == 0:
        raise ValueError(
            f"`results` must have at least one value, got none for {method!r} at sparsity "
            f"{sparsity}."
        )
