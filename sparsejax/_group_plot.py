"""The picture of `plots.groups`: a row a kernel, a bar an axis, a color and a track a group."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsejax.dependency import Group, Groups
from sparsejax.shrinking import Plan

_MOST_ROWS = 40
_MOST_NAMES = 30
_MOST_TRACKS = 12
# Axes of at most so many indices show which ones go, longer ones how many.
_MOST_INDICES = 128
_LONGEST_NAME = 38
# Of the color cycle, without its gray: gray is what stays.
_CYCLE = (0, 1, 2, 3, 4, 5, 6, 8, 9)
_GOLDEN = 0.618
_LOCKED = "0.78"
_QUIET = "0.45"
_STRIPE = "0.965"
# A removed index has the color of its group, so thin.
_THIN = 0.22
# What the trace says of the window of a convolution, which is no input or output of a kernel.
_WINDOW = "moves a window over it"

# In the length of the longest bar: the least length of a bar, the distance of tracks, the width of
# a character of the numbers at the ends.
_SHORTEST, _TRACK, _CHARACTER = 0.012, 0.065, 0.055


@dataclasses.dataclass(frozen=True, eq=False)
class Bar:
    """One axis of one kernel.

    Attributes:
      path: the kernel's path.
      axis: the axis.
      parts: by the name of a group, the indices that it owns.
      gone: (size,) booleans: what the plan removes.
    """

    path: str
    axis: int
    parts: Mapping[str, np.ndarray]
    gone: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One kernel, with what it reads and what it produces."""

    path: str
    inputs: Sequence[Bar]
    outputs: Sequence[Bar]

    @property
    def height(self) -> float:
        """In rows that have one bar a side."""
        return max(1.0, 0.6 * max(len(self.inputs), len(self.outputs)))


def kernels(groups: Groups) -> list[str]:
    """Leaves with two axes or more, in the order of use.

    Those whose axes have all one index or produce are biases.
    """
    members = [m for group in groups.values() for m in group.members]
    reading = {m.path for m in members if not m.produced}
    produced = {(m.path, m.axis) for m in members if m.produced}

    def is_kernel(path: str, shape: tuple[int, ...]) -> bool:
        wide = [axis for axis, n in enumerate(shape) if n > 1]
        others = [axis for axis in wide if (path, axis) not in produced]
        return len(shape) > 1 and (path in reading or bool(others and len(wide) > 1))

    found = [leaf for leaf in groups.leaves if is_kernel(leaf.path, leaf.shape)]
    found.sort(key=lambda leaf: len(groups.leaves) if leaf.used is None else leaf.used)
    return [leaf.path for leaf in found]


def rows(groups: Groups, plan: Plan | None) -> list[Row]:
    """All kernels, in the order of use."""
    parts: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    produced = set()
    for group in groups.values():
        for member in group.members:
            here = parts.setdefault((member.path, member.axis), {})
            here[group.name] = np.unique(member.indices)
            if member.produced:
                produced.add((member.path, member.axis))
    windows = {(lock.path, lock.axis) for lock in groups.locked if _WINDOW in lock.why}
    shapes = {leaf.path: leaf.shape for leaf in groups.leaves}
    return [_row(path, shapes[path], parts, produced, windows, plan) for path in kernels(groups)]


def _row(
    path: str,
    shape: tuple[int, ...],
    parts: Mapping[tuple[str, int], Mapping[str, np.ndarray]],
    produced: set[tuple[str, int]],
    windows: set[tuple[str, int]],
    plan: Plan | None,
) -> Row:
    sides: tuple[list[Bar], list[Bar]] = ([], [])
    others = []
    for axis, size in enumerate(shape):
        gone = np.zeros(size, bool)
        if plan is not None:
            gone[list(plan.leaves[path].removed.get(axis, ()))] = True
        bar = Bar(path, axis, parts.get((path, axis), {}), gone)
        if bar.parts:
            sides[(path, axis) in produced].append(bar)
        elif size > 1 and (path, axis) not in windows:
            others.append(bar)
    # Which side an axis is on that no group has a part in: where there is nothing else.
    inputs, outputs = sides
    if not inputs and not outputs:
        return Row(path, others[:-1], others[-1:])
    return Row(path, inputs or others, outputs or others)


def size(found: Sequence[Row], groups: Groups) -> tuple[float, float]:
    """Width and height of a figure for these rows, in inches."""
    paths, names = [row.path for row in found], list(groups)
    characters = sum(max((len(_short(x)) for x in of), default=0) for of in (paths, names))
    tall = sum(row.height for row in found[:_MOST_ROWS])
    entries = min(len(groups), _MOST_NAMES) + 3
    return 7.7 + 0.07 * characters, 0.95 + max(0.31 * tall, 0.17 * entries)


def draw(axes: Any, found: Sequence[Row], groups: Groups, plan: Plan | None) -> None:
    """Draws the rows, the tracks between them, and the legend."""
    canvas = _Canvas(axes, found[:_MOST_ROWS], dict(zip(groups, _colors(len(groups)), strict=True)))
    canvas.draw()
    if len(found) > _MOST_ROWS:
        axes.text(
            0,
            canvas.bottom + 0.1,
            f"and {len(found) - _MOST_ROWS} more kernels",
            ha="center",
            va="top",
            fontsize="small",
            color=_QUIET,
        )
    axes.set_title(_totals(groups, plan), loc="left", fontsize="medium")
    _legend(axes, groups, plan, canvas.colors)


class _Canvas:
    """Where things stand: bars to both sides of a gutter, in which every group has a track."""

    def __init__(self, axes: Any, found: Sequence[Row], colors: Mapping[str, Any]) -> None:
        self.axes, self.colors, self.rows = axes, colors, found
        tops = np.concatenate([[0.0], np.cumsum([row.height for row in found])])
        self.tops, self.bottom = tops[:-1], float(tops[-1])
        bars = [bar for row in found for bar in (*row.inputs, *row.outputs)]
        cuttable = [len(bar.gone) for bar in bars if bar.parts]
        self.longest = max(cuttable or [len(bar.gone) for bar in bars] or [1])
        self.exact = self.longest <= _MOST_INDICES
        self.places = self._places()
        self.tracks = _tracks({name: [y for y, _ in at] for name, at in self.places.items()})
        self.count = 1 + max(self.tracks.values(), default=0)
        self.gutter = (self.count - 1) / 2 * _TRACK + 0.085

    def _bars(self) -> list[tuple[float, int, Bar, float]]:
        """The height at which every bar stands, its side (-1, 1), the bar, how thick it is."""
        answer = []
        for top, row in zip(self.tops, self.rows, strict=True):
            for side, bars in ((-1, row.inputs), (1, row.outputs)):
                step = row.height / max(len(bars), 1)
                thick = 0.6 if len(bars) <= 1 else 0.8 * step
                for i, bar in enumerate(bars):
                    answer.append((float(top + (i + 0.5) * step), side, bar, thick))
        return answer

    def _places(self) -> dict[str, list[tuple[float, int]]]:
        """By group, the heights and sides at which its bars are joined to its track."""
        places: dict[str, list[tuple[float, int]]] = {}
        for y, side, bar, thick in self._bars():
            # Inputs higher than outputs, and none at the height of another: lines stay apart.
            for i, name in enumerate(bar.parts):
                shift = 0.05 + 0.4 * (i + 0.5) / len(bar.parts)
                places.setdefault(name, []).append((y + side * shift * thick, side))
        return places

    def draw(self) -> None:
        for top, row in list(zip(self.tops, self.rows, strict=True))[::2]:
            self.axes.axhspan(top, top + row.height, color=_STRIPE, linewidth=0, zorder=0)
        self._draw_tracks()
        axes = self.axes
        for y, side, bar, thick in self._bars():
            self._draw_bar(bar, side, y, thick)
        room = max((len(text.get_text()) + 1 for text in axes.texts), default=0)
        for side, name in ((-1, "input axes"), (1, "output axes")):
            axes.text(
                side * self.gutter,
                -0.15,
                name,
                ha="right" if side < 0 else "left",
                va="bottom",
                fontsize="small",
                color=_QUIET,
            )
        end = self.gutter + 1 + _CHARACTER * room
        axes.set_xlim(-end, end)
        axes.set_ylim(self.bottom + 0.15, -0.7)
        axes.set_xticks([])
        middles = [top + row.height / 2 for top, row in zip(self.tops, self.rows, strict=True)]
        axes.set_yticks(middles, [_short(row.path) for row in self.rows], fontsize="small")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(False)

    def _draw_tracks(self) -> None:
        for name, track in self.tracks.items():
            x = (track - (self.count - 1) / 2) * _TRACK
            heights = [y for y, _ in self.places[name]]
            style = {"color": self.colors[name], "solid_capstyle": "butt"}
            for y, side in self.places[name]:
                self.axes.plot([x, side * self.gutter], [y, y], linewidth=1.1, zorder=1.5, **style)
            ends = [min(heights), max(heights)]
            self.axes.plot([x, x], ends, linewidth=2, zorder=1.8, **style)
            self.axes.plot([x] * len(heights), heights, "o", markersize=4, zorder=2.5, **style)

    def _draw_bar(self, bar: Bar, side: int, y: float, thick: float) -> None:
        n = len(bar.gone)
        length = min(max(n / self.longest, _SHORTEST), 1.0)
        for level, names in enumerate(layers := _layers(bar, self.colors)):
            height = thick / len(layers)
            low = y - thick / 2 + level * height
            for name, flags in names.items():
                color = self.colors.get(name, _LOCKED)
                kept, gone = _split(flags, bar.gone, exact=self.exact)
                for runs, shade in ((gone, (color, _THIN)), (kept, color)):
                    spans = [self._span(side, a * length / n, k * length / n) for a, k in runs]
                    if spans:
                        drawn = self.axes.broken_barh(
                            spans, (low, height), facecolors=shade, linewidth=0
                        )
                        drawn.set_gid(f"{bar.path}[{bar.axis}]")
        if n > self.longest:
            # Torn: it is longer than there is room.
            self.axes.broken_barh(
                [self._span(side, 0.93, 0.02)], (y - thick / 2, thick), facecolors="white"
            )
        left = n - int(bar.gone.sum())
        self.axes.annotate(
            f"{n:,}" if left == n else f"{n:,} → {left:,}",
            (side * (self.gutter + length), y),
            (4 * side, 0),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center_baseline",
            fontsize="x-small" if thick < 0.55 else "small",
            color="black" if bar.parts else _QUIET,
        )

    def _span(self, side: int, start: float, length: float) -> tuple[float, float]:
        """From where and how far, counted away from the gutter."""
        x = self.gutter + start
        return (x, length) if side > 0 else (-x - length, length)


def _layers(bar: Bar, order: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """Groups with their indices; those that share an index (heads and their width) in layers."""
    layers: list[dict[str, np.ndarray]] = [{}]
    for name in order:
        if name not in bar.parts:
            continue
        flags = np.zeros(len(bar.gone), bool)
        flags[bar.parts[name]] = True
        for layer in layers:
            if not any((flags & other).any() for other in layer.values()):
                layer[name] = flags
                break
        else:
            layers.append({name: flags})
    for layer in layers:
        rest = ~np.any([*layer.values(), np.zeros(len(bar.gone), bool)], axis=0)
        if rest.any():
            layer[""] = rest
    return layers


def _split(flags: np.ndarray, gone: np.ndarray, *, exact: bool) -> tuple[Any, Any]:
    """Runs (start, length) of what stays and of what goes; if not exact, of each run its share."""
    if exact:
        return _runs(flags & ~gone), _runs(flags & gone)
    shares = [(a, n, int(gone[a : a + n].sum())) for a, n in _runs(flags)]
    return [(a, n - g) for a, n, g in shares if g < n], [(a + n - g, g) for a, n, g in shares if g]


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(a, b - a) for a, b in edges.reshape(-1, 2).tolist()]


def _tracks(heights: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """The track of every group that joins several bars: the first that is free along its way."""
    ends: list[float] = []
    tracks = {}
    for name, found in sorted(heights.items(), key=lambda row: min(row[1])):
        if len(found) < 2:
            continue
        free = [i for i, end in enumerate(ends) if end < min(found)]
        track = free[0] if free else len(ends)
        if track < _MOST_TRACKS:
            ends[track : track + 1] = [max(found)]
            tracks[name] = track
    return tracks


def _legend(axes: Any, groups: Groups, plan: Plan | None, colors: Mapping[str, Any]) -> None:
    large = set(kernels(groups))
    labels = {name: _label(groups[name], plan, large) for name in groups}
    shown = list(labels)[: _MOST_NAMES if len(labels) > _MOST_NAMES else None]
    entries = [(labels[name], colors[name]) for name in shown]
    if len(labels) > len(shown):
        entries.append((f"and {len(labels) - len(shown)} more groups", "none"))
    entries.append(("locked: stays", _LOCKED))
    if plan is not None and any(plan.removed.values()):
        entries.append(("pale: removed", (_QUIET, _THIN)))
    for label, color in entries:
        axes.plot([], [], "s", color=color, markersize=8, label=label)
    axes.legend(
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
        handletextpad=0.3,
        fontsize="small",
    )


def _label(group: Group, plan: Plan | None, large: set[str]) -> str:
    gone = 0 if plan is None else len(plan.removed.get(group.name, ()))
    amount = f"{group.size:,} → {group.size - gone:,}" if gone else f"{group.size:,}"
    vectors = len({member.path for member in group.members} - large)
    also = f" (+ {vectors} vector{'s' * (vectors > 1)})" if vectors else ""
    return f"{_short(group.name)}: {amount} units{also}"


def _totals(groups: Groups, plan: Plan | None) -> str:
    if plan is None:
        return f"{groups.params:,} parameters, {groups.flops:,} FLOPs"
    return ", ".join(
        f"{before:,} → {after:,} {what} ({after / max(before, 1):.1%})"
        for what, (before, after) in (("parameters", plan.params), ("FLOPs", plan.flops))
    )


def _short(name: str) -> str:
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _colors(n: int) -> list[Any]:
    """As many colors: of the cycle, or if there are more, such that neighbors differ."""
    if n <= len(_CYCLE):
        return [f"C{i}" for i in _CYCLE[:n]]
    import matplotlib

    return list(matplotlib.colormaps["turbo"](0.06 + 0.88 * (np.arange(n) * _GOLDEN % 1)))
