"""k-means of numbers on a line, by Lloyd's iteration from a linear start, exactly to its end.

The numbers are sorted once; clusters are then ranges of them, whose means come from sums up to each
place, so that an iteration costs k·log(n) instead of k·n.
"""

from typing import NamedTuple

import numpy as np

_MOST_STEPS = 100_000  # Lloyd's iteration ends by itself; this is for what nobody has thought of.


class _Line(NamedTuple):
    """Different numbers, ascending; how many values, and their sum, are before each place."""

    numbers: np.ndarray
    sizes: np.ndarray
    sums: np.ndarray


def kmeans(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """At most k centers, ascending, and the number of the nearest one for each value.

    Args:
      values: finite float64 numbers, in one axis; may be none.
      k: at least 1.

    Returns:
      The centers that have values, and which of them each value has. Where there are no more than k
      different values, the centers are these.
    """
    numbers, counts = np.unique(values, return_counts=True)
    if numbers.size <= k:
        return numbers, np.searchsorted(numbers, values)
    sizes, sums = (np.append(0, np.cumsum(x)) for x in (counts, counts * numbers))
    centers = _converged(_Line(numbers, sizes, sums), k)
    return centers, np.searchsorted(_borders(centers), values, side="left")


def _converged(line: _Line, k: int) -> np.ndarray:
    centers = np.linspace(line.numbers[0], line.numbers[-1], k)
    earlier = centers
    for step in range(_MOST_STEPS):
        before, centers = centers, _means(line, centers)
        # Sums are rounded: a number that is nearly half-way could go to and fro for ever. So the
        # centers must not be earlier ones either; which ones moves up when the steps have doubled.
        if np.array_equal(centers, before) or np.array_equal(centers, earlier):
            break
        if step & (step - 1) == 0:
            earlier = centers
    low, high = _ranges(line, centers)
    return centers[low < high]


def _borders(centers: np.ndarray) -> np.ndarray:
    """Halfway between neighbours; who stands there belongs to the lower one."""
    return (centers[:-1] + centers[1:]) / 2


def _ranges(line: _Line, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the numbers that are nearest to each center begin, and where they end."""
    ends = np.searchsorted(line.numbers, _borders(centers), side="right")
    return np.append(0, ends), np.append(ends, line.numbers.size)


def _means(line: _Line, centers: np.ndarray) -> np.ndarray:
    """The mean of each range; an empty one gets the number that is farthest from its own center.

    This is scikit-learn's rule: that number leaves its range, the next empty one gets the next. A
    range left without numbers keeps its center. As there are more numbers than centers, each step
    brings the sum of squares down until no range is empty.
    """
    low, high = _ranges(line, centers)
    centers = centers.copy()
    for empty in np.flatnonzero(low == high):
        sides = np.stack([low, high - 1], axis=1)  # The farthest one of a range is at an end of it.
        far = np.abs(line.numbers.take(sides, mode="clip") - centers[:, None])
        far[low == high] = 0
        cluster, side = np.unravel_index(np.argmax(far), far.shape)
        if far[cluster, side] == 0:
            break
        low[cluster] += side == 0
        high[cluster] -= side == 1
        low[empty], high[empty] = sides[cluster, side], sides[cluster, side] + 1
        centers[empty] = line.numbers[low[empty]]
    full = low < high
    low, high = low[full], high[full]
    means = (line.sums[high] - line.sums[low]) / (line.sizes[high] - line.sizes[low])
    # However the sums are rounded: one number is its own mean, bit for bit.
    centers[full] = np.clip(means, line.numbers[low], line.numbers[high - 1])
    return np.sort(centers)
