"""Figures: what was measured to choose a strength or a sparsity, and coupled axes, as pictures.

Every function draws into the axes it is given, or else into a new `matplotlib.figure.Figure`, and
returns the axes; `axes.figure.savefig("path.png")` writes a file. Nothing here touches pyplot, so
that no figure is kept open or shown by itself. Strength and sparsity grow to the right, sparsity
as -log₁₀(1 - sparsity), so that from 90 % to 99 % is as far as from 0 to 90 %. Some labels stand
beside the axes: give your own figure `layout="constrained"`. Needs matplotlib:
`pip install 'sparsejax[examples]'`.
"""

from typing import Any

import numpy as np

from sparsejax import _group_plot, _leaves, _tree, filters
from sparsejax._typing import Filter
from sparsejax.dependency import Groups
from sparsejax.paths import CrossValidation, Path
from sparsejax.sensitivity import Curves
from sparsejax.shrinking import Plan

# Of the color cycle for all: as many as people tell apart.
_COLORS = 10
_MOST_LINES = 200
_MOST_NAMES = 20
_TICKS = 9
_QUIET = "0.45"
# The width of a digit, in points.
_DIGIT = 6.5


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
    axes = _axes(axes)
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
    axes = _axes(axes)
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
        cv.mean[cv.best] + cv.standard_error[cv.best], color=_QUIET, linewidth=0.9, linestyle=":"
    )
    for index, (label, style) in _choices(cv).items():
        strength = cv.strengths[index]
        value = _percent(strength) if pruned else f"{strength:.3g}"
        axes.axvline(
            strength, color="C3", linewidth=1.3, linestyle=style, label=f"{label}: {value}"
        )
    axes.set_ylabel(f"score of {len(cv.scores)} folds, mean ± standard error")
    if pruned:
        _sparsity_axis(axes, cv.strengths)
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


def sensitivity(curves: Curves, *, axes: Any = None) -> Any:
    """Draws the loss against sparsity, a line for each layer that alone is pruned.

    A dashed line is at the dense loss. A loss that is not finite is a cross at the upper edge. The
    axis of the sparsities is -log₁₀(1 - sparsity), so that those near 1 are not crowded: from 90 %
    to 99 % is as far as from 0 to 90 %. Sparsity 1, infinitely far, is drawn beyond the last one.

    Args:
      curves: what `sensitivity.curves` returned.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if `curves` or `axes` are of another kind.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import plots, sensitivity
      >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((3, 3))}
      >>> def loss(p):
      ...     return (jnp.mean(p["a"]) - 1) ** 2 + (jnp.mean(p["b"]) - 1) ** 2
      >>> curves = sensitivity.curves(loss, params, [0.25, 0.5, 1.0], progress=False)
      >>> axes = plots.sensitivity(curves)
      >>> [text.get_text() for text in axes.get_legend().get_texts()]
      ['a', 'b', 'dense']
    """
    if not isinstance(curves, Curves):
        raise TypeError(
            f"`curves` must be what sensitivity.curves returns, got {_leaves.brief(curves)}."
        )
    axes = _axes(axes)
    sparsities = np.concatenate([[0.0], curves.sparsities])
    colors = _colors(len(curves.layers))
    for layer, losses, color in zip(curves.layers, curves.losses, colors, strict=True):
        values = np.concatenate([[curves.dense_loss], losses])
        finite = np.isfinite(values)
        axes.plot(
            sparsities,
            np.where(finite, values, np.nan),
            marker="o",
            markersize=3,
            linewidth=1.5,
            color=color,
            label=layer.path,
        )
        if not finite.all():
            _draw_crosses(axes, sparsities[~finite], color)
    axes.axhline(curves.dense_loss, color=_QUIET, linewidth=1, linestyle="--", label="dense")
    axes.set_xlabel("sparsity of the layer, all others dense")
    axes.set_ylabel("loss")
    _sparsity_axis(axes, sparsities)
    _name_layers(axes, len(curves.layers))
    return axes


def groups(groups: Groups, plan: Plan | None = None, *, axes: Any = None) -> Any:
    """Draws which axes of which kernels are coupled, and what a plan removes of them.

    A row is a kernel (a leaf of two axes or more), roughly in the order of use. To the left of the
    middle are bars for the axes that read units, to the right for those that produce them, as long
    as they have indices. A color is a group: all that has it is cut together. In the middle a line
    joins its bars (of no more than 12 side by side), so that a residual stream is a long line. Gray
    is locked. What the plan removes is pale: the very indices, or their share if an axis has more
    than 128. Biases and scales have no row; the legend counts them, as vectors.

    Windows of convolutions are not drawn. The longest bar is the longest axis that can be cut; one
    that cannot be and is longer is torn. Of more than 40 kernels or 30 groups the first are drawn
    or named, and how many more there are. More than 9 groups share no color either, but some are
    similar.

    Args:
      groups: what `dependency.trace` returned.
      plan: what `shrinking.plan` made of them; by default none, and nothing is pale.
      axes: where to draw, of matplotlib; by default in a new figure, as large as it needs.

    Returns:
      The axes.

    Raises:
      TypeError: if `groups`, `plan` or `axes` are of another kind.
      ValueError: if the plan is of other groups.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria, dependency, plots, shrinking
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.arange(24.0).reshape(3, 8), "out": jnp.ones((8, 2))}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> plan = shrinking.plan(groups, criteria.magnitude(params), sparsity=0.5)
      >>> axes = plots.groups(groups, plan)
      >>> [tick.get_text() for tick in axes.get_yticklabels()]
      ['in', 'out']
      >>> axes.get_legend().get_texts()[0].get_text()
      'in: 8 → 4 units'
    """
    if not isinstance(groups, Groups):
        raise TypeError(
            f"`groups` must be what dependency.trace returns, got {_leaves.brief(groups)}."
        )
    if plan is not None:
        _check_plan(plan, groups)
    rows = _group_plot.rows(groups, plan)
    axes = _axes(axes, _group_plot.size(rows, groups))
    _group_plot.draw(axes, rows, groups, plan)
    return axes


def _check_plan(plan: Any, groups: Groups) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be what shrinking.plan returns, got {_leaves.brief(plan)}.")
    for what, ours, theirs in (
        ("group", {g.name: g.size for g in groups.values()}, plan.sizes),
        (
            "leaf",
            {x.path: x.shape for x in groups.leaves},
            {n: c.shape for n, c in plan.leaves.items()},
        ),
    ):
        for name in [*ours, *theirs]:
            mine, its = ours.get(name), theirs.get(name)
            if mine != its:
                raise ValueError(
                    f"`plan` must be of these groups: {what} {name!r} has size {mine} here and "
                    f"{its} in the plan; make it with shrinking.plan(groups, ...)."
                )


def _axes(axes: Any, size: tuple[float, float] = (7.2, 4.6)) -> Any:
    """The axes to draw in, without a frame above and to the right."""
    if axes is None:
        axes = _new_axes(size)
    elif not callable(getattr(axes, "plot", None)):
        raise TypeError(
            f"`axes` must be axes of matplotlib, got {_leaves.brief(axes)}; of several take one."
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _new_axes(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`sparsejax.plots` needs matplotlib: pip install 'sparsejax[examples]'."
        ) from error
    return Figure(figsize=size, dpi=150, layout="constrained").subplots()


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
    axes.axhline(0, color=_QUIET, linewidth=1, zorder=3)
    if len(leaves) == 1:
        (values,) = leaves.values()
        lines = [axes.plot(strengths, c, linewidth=1.5)[0] for c in values.T]
        if len(lines) <= _MOST_NAMES:
            _number(axes, lines, np.argmin(strengths))
    else:
        for (name, values), color in zip(leaves.items(), _colors(len(leaves)), strict=True):
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
    for (name, values), color in zip(leaves.items(), _colors(len(leaves)), strict=True):
        axes.plot(strengths, np.mean(values == 0, axis=1), color=color, linewidth=1.6, label=name)
    axes.set_ylabel("sparsity of the leaf")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False)


def _name_layers(axes: Any, layers: int) -> None:
    """A legend where it covers no line: of few layers inside, of many at the right."""
    if layers <= _COLORS:
        axes.legend(frameon=False, loc="best")
    else:
        axes.legend(
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1, 1),
            fontsize="x-small",
            labelspacing=0.2,
            ncols=1 + layers // 32,
        )


def _draw_crosses(axes: Any, places: np.ndarray, color: Any) -> None:
    axes.plot(
        places,
        np.ones_like(places),
        "x",
        color=color,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )


def _choices(cv: CrossValidation) -> dict[int, tuple[str, str]]:
    """The label and the style of each line, by the index of the strength."""
    if cv.best == cv.one_standard_error:
        return {cv.best: ("best, also within one standard error", "-")}
    return {cv.best: ("best", "-"), cv.one_standard_error: ("within one standard error", "--")}


def _strength_axis(axes: Any, strengths: np.ndarray) -> None:
    least, most = float(np.min(strengths)), float(np.max(strengths))
    axes.set_xscale("log" if 0 < 10 * least <= most else "linear")
    axes.set_xlabel("strength")


def _are_sparsities(cv: CrossValidation) -> bool:
    """Whether strengths are the sparsities of the fits, near 1; `cross_validation` has the rule."""
    strengths, seen = cv.strengths, np.isfinite(cv.mean)
    in_range = bool(np.all((strengths >= 0) & (strengths < 1))) and np.max(strengths) >= 0.9
    distinct = len(np.unique(strengths)) == len(strengths)
    off = np.abs(np.mean(cv.sparsity, axis=0) - strengths)[seen]
    return bool(in_range and distinct and np.all(off <= 0.05))


def _sparsity_axis(axes: Any, sparsities: np.ndarray) -> None:
    """An axis of -log10(1 - sparsity), with 1 beyond the last of the others."""
    last = np.max(sparsities[sparsities < 1])
    end = -np.log10(1 - last)
    # Beyond the last one the axis is straight, so that it reaches 1: a sixth of what is before.
    slope = (end / 6 or 1) / (1 - last)

    def place(s: Any) -> Any:
        return -np.log10(1 - np.minimum(s, last)) + slope * np.maximum(s - last, 0)

    def sparsity(x: Any) -> Any:
        return 1 - 10 ** -np.minimum(x, end) + np.maximum(x - end, 0) / slope

    axes.set_xscale("function", functions=(place, sparsity))
    least, most = place(np.min(sparsities)), place(np.max(sparsities))
    margin = 0.04 * (most - least) or 0.5
    axes.set_xlim(*sparsity(np.array([least - margin, most + margin])))
    ticks = _round_sparsities(sparsities, last)
    axes.set_xticks(_fitting(axes, [place(s) for s in ticks], ticks))
    axes.xaxis.set_major_formatter(lambda s, _: _percent(s))


def _round_sparsities(sparsities: np.ndarray, last: float) -> list[float]:
    """What may be labeled in the range of some sparsities, what matters most first."""
    least, most = round(float(np.min(sparsities)), 12), float(np.max(sparsities))
    densities = [m * 10.0**-k for m in (1, 5, 2) for k in range(1, 7)]
    ends = [s for s in (0.0, 1.0) if s in (least, most)]
    inside = [s for s in (round(1 - d, 12) for d in densities) if least <= s <= round(last, 12)]
    return ends + inside if len(ends + inside) > 1 else [least, most]


def _fitting(axes: Any, places: list[Any], ticks: list[float]) -> list[float]:
    """The ticks that have room for their labels, the first ones first."""
    scale = axes.bbox.width * 72 / axes.figure.dpi / (np.ptp(places) or 1)
    # With a digit's width between two labels.
    halves = [_DIGIT * (len(_percent(tick)) + 1) / 2 / scale for tick in ticks]
    some: list[int] = []
    for i, here in enumerate(places):
        if all(abs(here - places[j]) >= halves[i] + halves[j] for j in some):
            some.append(i)
    return sorted(ticks[i] for i in some)


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.6g} %" if sparsity else "0"


def _top_axis(axes: Any, strengths: np.ndarray, labels: list[str], title: str) -> None:
    """Labels for some of the strengths, none over another."""
    some = _spread(np.log(strengths) if axes.get_xscale() == "log" else strengths)
    top = axes.secondary_xaxis("top")
    top.spines["top"].set_visible(False)
    top.set_xticks(strengths[some], [labels[i] for i in some])
    top.minorticks_off()
    top.tick_params(length=0, colors=_QUIET)
    top.set_xlabel(title, color=_QUIET)


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


def _colors(n: int) -> list[Any]:
    """As many colors: of the cycle, or in the order of the layers where there are more."""
    if n <= _COLORS:
        return [f"C{i}" for i in range(n)]
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, n)))
