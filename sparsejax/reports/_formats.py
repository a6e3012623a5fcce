"""Numbers as people read them, column by column."""

import math
import statistics
from collections.abc import Callable
from typing import TypeAlias

from sparsejax.reports._row import Cell, Number

MISSING = "–"

Format: TypeAlias = Callable[[Number, float | None], str]
"""`(mean, standard deviation) -> text`; of a single value there is no deviation."""


def shown(cell: Cell, column: str) -> str:
    """A cell as a text."""
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return line(cell)
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return FORMATS.get(column, _plain)(*summary(cell))


def title(column: str) -> str:
    """What stands over a column."""
    return line(TITLES.get(column, column.replace("_", " ")))


def line(text: str) -> str:
    """A text without ends of lines."""
    return " ".join(text.splitlines())


def summary(cell: Cell) -> tuple[Number, float | None]:
    """Mean and standard deviation (of n - 1 degrees of freedom); a single value has none."""
    if not isinstance(cell, tuple):
        return cell, None
    if not all(map(math.isfinite, cell)):
        return sum(cell) / len(cell), math.nan
    return statistics.fmean(cell), statistics.stdev(cell)


def _percent(mean: Number, spread: float | None) -> str:
    if spread is not None:
        return f"{100 * mean:.2f} ± {100 * spread:.2f}"
    text = f"{100 * mean:.2f}"
    # 0 and 100 only where it is just that.
    if text == "0.00" and mean > 0:
        return "<0.01"
    return ">99.99" if text == "100.00" and mean < 1 else text


def _count(mean: Number, spread: float | None) -> str:
    return f"{mean:,.0f}" + _more(spread, "{:,.0f}".format)


def _times(mean: Number, spread: float | None) -> str:
    return f"{_digits(mean, 3)}{_more(spread, lambda x: _digits(x, 2))}x"


def _milliseconds(mean: Number, spread: float | None) -> str:
    return _digits(1000 * mean, 3) + _more(spread, lambda x: _digits(1000 * x, 2))


def _scaled(mean: Number, spread: float | None) -> str:
    """5.17 M, 1.20 G; less than a thousand as it is."""
    power = min(4, int(math.log10(mean)) // 3) if 1 <= mean < math.inf else 0
    unit = ["", " k", " M", " G", " T"][power]
    scale = 1000.0**power
    main = _digits(mean / scale, 3) if power else f"{mean:,.0f}"
    return main + _more(spread, lambda x: _digits(x / scale, 2)) + unit


def _plain(mean: Number, spread: float | None) -> str:
    if spread is None:
        return f"{mean:,}" if isinstance(mean, int) else _stripped(_digits(mean, 4))
    if not 0 < spread < math.inf:
        return f"{_stripped(_digits(mean, 4))} ± {_digits(spread, 2)}"
    # As many decimals as the deviation has, of which two digits mean something.
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:,.{decimals}f} ± {spread:,.{decimals}f}"


def _more(spread: float | None, text: Callable[[Number], str]) -> str:
    return "" if spread is None else f" ± {text(spread)}"


def _digits(x: Number, digits: int) -> str:
    """A number of digits that mean something, never fewer than it has before the point."""
    if x == 0 or not math.isfinite(x):
        return f"{x:.0f}"
    size = math.floor(math.log10(abs(x)))
    if size < -4:
        return f"{x:.{digits - 1}e}"
    return f"{x:,.{max(0, digits - 1 - size)}f}"


def _stripped(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


FORMATS: dict[str, Format] = {
    "sparsity": _percent,
    "density": _percent,
    "nonzeros": _count,
    "size": _count,
    "compression": _times,
    "flops": _scaled,
    "dense_flops": _scaled,
    "flops_factor": _times,
    "bytes": _count,
    "dense_bytes": _count,
    "bytes_factor": _times,
    "accuracy": _percent,
    "error": _percent,
    "latency": _milliseconds,
}

TITLES = {
    "name": "",
    "sparsity": "sparsity, %",
    "density": "density, %",
    "flops": "FLOPs",
    "dense_flops": "dense FLOPs",
    "flops_factor": "fewer FLOPs",
    "dense_bytes": "dense bytes",
    "bytes_factor": "fewer bytes",
    "accuracy": "accuracy, %",
    "error": "error, %",
    "latency": "latency, ms",
}
