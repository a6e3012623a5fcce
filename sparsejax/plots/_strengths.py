"""Figures of fits at many strengths: a path, and a cross-validation."""

from typing import Any

import numpy as np

from sparsejax import _leaves, _tree, filters
from sparsejax._typing import Filter
from sparsejax.paths import CrossValidation, Path
from sparsejax.plots import _drawing

_MOST_LINES = 200
_MOST_NAMES = 20
_TICKS = 9


def strength_path(path: Path, *, prunable: Filter = filters.weights, axes: Any = None) -> Any:
    """Draws the coefficients against the strength, as glmnet does; above, how many are not zero.

    One line a coefficient. Up to 20 of a single leaf are numbered at their left ends by their flat
    index; several leaves have a color each. More than 200 coefficients would be a tangle: then
    there is one line a leaf, its sparsity. The axis of the strengths is logarithmic where they are
    positive and span a factor of ten.

    Args:
      path: what `paths.strength_path` returned.
      prunable: which leaves are drawn; by default weights. Vectors need `filters.floating`.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if `path` or `axes` are of another kind.
      ValueError: if `prunable` selects no leaf.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from sparsejax import paths, plots
      >>> coefficients = np.array([[[0.0], [0.0]], [[1.0], [0.0]], [[2.0], [-1.0]]])
      >>> path = paths.Path(
      ...     strengths=np.array([1.0, 0.1, 0.01]),
      ...     params={"w": coefficients},
      ...     sparsity=np.array([1.0, 0.5, 0.0]),
      ...     loss=np.array([3.0, 2.0, 1.0]),
      ... )
      >>> axes = plots.strength_path(path)
      >>> axes.get_xlabel(), [tick.get_text() for tick in axes.child_axes[0].get_xticklabels()]
      ('strength', ['2', '1', '0'])

    References:
      J. Friedman, T. Hastie, R. Tibshirani, *Regularization paths for generalized linear models via
      coordinate descent*, Journal of Statistical Software 2010, https://doi.org/10.18637/jss.v033.i01
    """
    if not isinstance(path, Path):
        raise TypeError(
            f"`path` must be what paths.strength_path returns, got {_leaves.brief(path)}."
        )
    axes = _drawing.axes_of(axes)
    leaves = _coefficients(path, prunable)
    total = sum(values.shape[1] for values in leaves.values())
    if total > _MOST_LINES:
        _draw_sparsities(axes, path.strengths, leaves)
    else:
        _draw_coefficients(axes, path.strengths, leaves)
    nonzeros = sum(np.count_nonzero(values, axis=1) for values in leaves.values())
    _strength_axis(axes, path.strengths)
    _top_axis(axes, path.strengths, [f"{n:,}" for n in nonzeros], "coefficients that are not zero")
    return axes


def cross_validation(cv: CrossValidation, *, axes: Any = None) -> Any:
    """Draws the mean score with its standard error against the strength, and the two choices.

    Above, the mean sparsity of the fits. A dotted line is at the least mean plus its standard
    error: the second choice is the largest strength whose mean is not above it. Means that are
    infinite are left out. The axis of the strengths is logarithmic where they are positive and span
    a factor of ten, linear where they include 0.

    Strengths are taken for sparsities if all are in [0, 1), none is repeated, the largest is at
    least 0.9, and the mean sparsity of the fits is nowhere further than 0.05 from them (λ may have
    this range, but not these sparsities). Their axis is that of `sensitivity`, named "sparsity",
    and nothing stands above, where it would say the same.

    Args:
      cv: what `paths.cross_validate` returned.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if `cv` or `axes` are of another kind.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from sparsejax import paths, plots
      >>> cv = paths.CrossValidation(
      ...     strengths=np.array([0.01, 0.1, 1.0]),
      ...     scores=np.array([[3.0, 2.0, 2.0], [5.0, 2.0, 3.0]]),
      ...     sparsity=np.array([[0.0, 0.5, 0.75], [0.0, 0.5, 0.75]]),
      ...     mean=np.array([4.0, 2.0, 2.5]),
      ...     standard_error=np.array([1.0, 0.0, 0.5]),
      ...     best=1,
      ...     one_standard_error=1,
      ... )
      >>> axes = plots.cross_validation(cv)
      >>> [text.get_text() for text in axes.get_legend().get_texts()]
      ['best, also within one standard error: 0.1']
    """
    if not isinstance(cv, CrossValidation):
        raise TypeError(f"`cv` must be what paths.cross_validate returns, got {_leaves.brief(cv)}.")
    axes = _drawing.axes_of(axes)
    pruned = _are_sparsities(cv)
    finite = np.isfinite(cv.mean)
    axes.errorbar(
        cv.strengths[finite],
        cv.mean[finite],
        cv.standard_error[finite],
        fmt="o",
        markersize=4,
        color="C0",
        ecolor="0.7",
        elinewidth=1.2,
        capsize=2.5,
    )
    axes.axhline(
        cv.mean[cv.best] + cv.standard_error[cv.best],
        color=_drawing.QUIET,
        linewidth=0.9,
        linestyle=":",
    )
    for index, (label, style) in _choices(cv).items():
        strength = cv.strengths[index]
        value = _drawing.percent(strength) if pruned else f"{strength:.3g}"
        axes.axvline(
            strength, color="C3", linewidth=1.3, linestyle=style, label=f"{label}: {value}"
        )
    axes.set_ylabel(f"score of {len(cv.scores)} folds, mean ± standard error")
    if pruned:
        _drawing.sparsity_axis(axes, cv.strengths)
        axes.set_xlabel("sparsity")
    else:
        _strength_axis(axes, cv.strengths)
        sparsity = [f"{s:.2f}" for s in np.mean(cv.sparsity, axis=0)]
        _top_axis(axes, cv.strengths, sparsity, "mean sparsity")
    # Above everything: there is room for it nowhere else, whatever the scores are.
    axes.legend(
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        borderaxespad=0.5 if pruned else 3.8,
    )
    return axes


def _coefficients(path: Path, prunable: Filter) -> dict[str, np.ndarray]:
    """The leaves that are drawn, each (n, entries)."""
    flat = _tree.flatten(path.params)
    of_one = [leaf[0] if _leaves.is_inexact(leaf) else leaf for leaf in flat.leaves]
    chosen = filters.selected(prunable, flat.rebuild(of_one))
    return {
        name: np.asarray(leaf, float).reshape(len(path.strengths), -1)
        for name, leaf, yes in zip(flat.paths, flat.leaves, chosen, strict=True)
        if yes
    }


def _draw_coefficients(axes: Any, strengths: np.ndarray, leaves: dict[str, np.ndarray]) -> None:
    # Above the lines, which are zero for much of their way.
    axes.axhline(0, color=_drawing.QUIET, linewidth=1, zorder=3)
    if len(leaves) == 1:
        (values,) = leaves.values()
        lines = [axes.plot(strengths, c, linewidth=1.5)[0] for c in values.T]
        if len(lines) <= _MOST_NAMES:
            _number(axes, lines, np.argmin(strengths))
    else:
        for (name, values), color in zip(leaves.items(), _drawing.colors(len(leaves)), strict=True):
            axes.plot(strengths, values[:, 0], color=color, linewidth=1.4, label=name)
            axes.plot(strengths, values[:, 1:], color=color, linewidth=1.4)
        axes.legend(frameon=False)
    axes.set_ylabel("coefficient")


def _number(axes: Any, lines: list[Any], at: Any) -> None:
    """Writes the index of every line at its left end, and none over another."""
    ends = np.array([line.get_ydata()[at] for line in lines], float)
    low, high = axes.get_ylim()
    gap = 0.042 * (high - low)
    heights = dict.fromkeys(range(len(lines)), 0.0)
    reached = -np.inf
    for i in np.argsort(ends):
        if np.isfinite(ends[i]):
            reached = max(float(ends[i]), reached + gap)
            heights[int(i)] = reached
    for i, line in enumerate(lines):
        if np.isfinite(ends[i]):
            axes.annotate(
                str(i),
                (line.get_xdata()[at], heights[i]),
                (-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize="small",
                color=line.get_color(),
            )


def _draw_sparsities(axes: Any, strengths: np.ndarray, leaves: dict[str, np.ndarray]) -> None:
    for (name, values), color in zip(leaves.items(), _drawing.colors(len(leaves)), strict=True):
        axes.plot(strengths, np.mean(values == 0, axis=1), color=color, linewidth=1.6, label=name)
    axes.set_ylabel("sparsity of the leaf")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False)


def _choices(cv: CrossValidation) -> dict[int, tuple[str, str]]:
    """The label and the style of each line, by the index of the strength."""
    if cv.best == cv.one_standard_error:
        return {cv.best: ("best, also within one standard error", "-")}
    return {cv.best: ("best", "-"), cv.one_standard_error: ("within one standard error", "--")}


def _are_sparsities(cv: CrossValidation) -> bool:
    """Whether strengths are the sparsities of the fits, near 1; `cross_validation` has the rule."""
    strengths, seen = cv.strengths, np.isfinite(cv.mean)
    in_range = bool(np.all((strengths >= 0) & (strengths < 1))) and np.max(strengths) >= 0.9
    distinct = len(np.unique(strengths)) == len(strengths)
    off = np.abs(np.mean(cv.sparsity, axis=0) - strengths)[seen]
    return bool(in_range and distinct and np.all(off <= 0.05))


def _strength_axis(axes: Any, strengths: np.ndarray) -> None:
    least, most = float(np.min(strengths)), float(np.max(strengths))
    axes.set_xscale("log" if 0 < 10 * least <= most else "linear")
    axes.set_xlabel("strength")


def _top_axis(axes: Any, strengths: np.ndarray, labels: list[str], title: str) -> None:
    """Labels for some of the strengths, none over another."""
    some = _spread(np.log(strengths) if axes.get_xscale() == "log" else strengths)
    top = axes.secondary_xaxis("top")
    top.spines["top"].set_visible(False)
    top.set_xticks(strengths[some], [labels[i] for i in some])
    top.minorticks_off()
    top.tick_params(length=0, colors=_drawing.QUIET)
    top.set_xlabel(title, color=_drawing.QUIET)


def _spread(places: np.ndarray) -> list[int]:
    """The indices of some places that keep a distance, the least and the largest among them."""
    order = [int(i) for i in np.argsort(places, kind="stable")]
    gap = (places[order[-1]] - places[order[0]]) / _TICKS
    some = [order[-1]]
    for i in order[-2::-1]:
        if places[some[-1]] - places[i] >= gap:
            some.append(i)
    if some[-1] != order[0] and places[order[-1]] > places[order[0]]:
        some[-1:] = [order[0]] if len(some) > 1 else [some[0], order[0]]
    return some[::-1]
