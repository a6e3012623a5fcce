"""How |w| of the nonzeros of a leaf is distributed, in bins of equal width on a log scale."""

import math
from typing import Any, NamedTuple

import numpy as np

from sparsejax import _leaves
from sparsejax.cli import _console
from sparsejax.cli._facts import Facts

_A_DECADE = 4  # Bins.
_DECADES = 8  # Shown, down from the largest; what is less stands in the first bin.
_BARS, _PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


class Histogram(NamedTuple):
    """Counts from 10**low to 10**high, and some magnitudes."""

    low: int
    high: int
    counts: np.ndarray
    least: float
    median: float
    largest: float


def of_array(array: np.ndarray) -> Histogram | None:
    """The histogram of a floating leaf; None if it has no finite nonzeros."""
    if not _leaves.is_floating(array):
        return None
    wide = np.abs(array.reshape(-1).astype(np.float64))
    wide = wide[np.isfinite(wide) & (wide > 0)]
    if not wide.size:
        return None
    least, largest = float(wide.min()), float(wide.max())
    low, high = math.floor(math.log10(least)), math.floor(math.log10(largest)) + 1
    bins = np.floor((np.log10(wide) - low) * _A_DECADE).astype(int)
    counts = np.bincount(bins, minlength=(high - low) * _A_DECADE)
    return Histogram(low, high, counts, least, float(np.median(wide)), largest)


def as_json(array: np.ndarray) -> dict[str, Any] | None:
    """Edges of the bins, and counts."""
    found = of_array(array)
    if found is None:
        return None
    steps = range(found.low * _A_DECADE, found.high * _A_DECADE + 1)
    return {
        "edges": [10.0 ** (step / _A_DECADE) for step in steps],
        "counts": found.counts.tolist(),
    }


def drawn(facts: list[Facts]) -> str:
    """A line of bars for every leaf, all of them on one axis."""
    found = [(f.name, h) for f in facts if (h := of_array(f.array))]
    if not found:
        return "no leaf has nonzeros\n"
    high = max(h.high for _, h in found)
    low = max(min(h.low for _, h in found), high - _DECADES)
    columns = [
        _console.Column("leaf"),
        _console.Column("least |w|", number=True),
        _console.Column(_axis(low, high)),
        _console.Column("median", number=True),
        _console.Column("largest", number=True),
    ]
    rows = [
        [name, f"{h.least:.1e}", _bars(h, low, high), f"{h.median:.1e}", f"{h.largest:.1e}"]
        for name, h in found
    ]
    return _console.table(columns, rows, f"the nonzeros by |w|, {_A_DECADE} bins a decade")


def _bars(histogram: Histogram, low: int, high: int) -> str:
    """One character a bin, as high as its count; any count at all is seen."""
    shown = np.zeros((high - low) * _A_DECADE, int)
    places = np.arange(histogram.counts.size) + (histogram.low - low) * _A_DECADE
    np.add.at(shown, np.clip(places, 0, None), histogram.counts)
    bars = _BARS if _console.can_draw(_BARS) else _PLAIN_BARS
    heights = np.ceil(shown / shown.max() * (len(bars) - 1)).astype(int)
    return "".join(bars[height] for height in heights)


def _axis(low: int, high: int) -> str:
    """A title as wide as the bars: `1e-4 ... 1e+1`."""
    width = (high - low) * _A_DECADE
    left, right = f"1e{low:+d}", f"1e{high:+d}"
    return left + " " * max(1, width - len(left) - len(right)) + right
