"""What figures share: axes to draw in, colors, legends, the axis of sparsities."""

import math
from typing import Any

import numpy as np

from sparsejax import _leaves

# Of the color cycle for all: as many as people tell apart.
_COLORS = 10
QUIET = "0.45"
# The width of a digit, in points.
_DIGIT = 6.5
# What else an entry of a legend takes, in points.
_HANDLE = 40


def axes_of(axes: Any, size: tuple[float, float] = (7.2, 4.6)) -> Any:
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


def name_layers(axes: Any, layers: int) -> None:
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


def name_above(axes: Any) -> None:
    """A legend above the axes, with as many columns as they have room for."""
    _, names = axes.get_legend_handles_labels()
    widest = _DIGIT * max(map(len, names)) + _HANDLE
    room = max(1, int(axes.bbox.width * 72 / axes.figure.dpi / widest))
    rows = math.ceil(len(names) / room)
    axes.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=math.ceil(len(names) / rows),
    )


def colors(n: int) -> list[Any]:
    """As many colors: of the cycle, or in the order of the layers where there are more."""
    if n <= _COLORS:
        return [f"C{i}" for i in range(n)]
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, n)))


def sparsity_axis(axes: Any, sparsities: np.ndarray) -> None:
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
    axes.xaxis.set_major_formatter(lambda s, _: percent(s))


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
    halves = [_DIGIT * (len(percent(tick)) + 1) / 2 / scale for tick in ticks]
    some: list[int] = []
    for i, here in enumerate(places):
        if all(abs(here - places[j]) >= halves[i] + halves[j] for j in some):
            some.append(i)
    return sorted(ticks[i] for i in some)


def percent(sparsity: float) -> str:
    return f"{100 * sparsity:.6g} %" if sparsity else "0"
