"""k-means of numbers on a line, by Lloyd's iteration from a linear start, exactly to its end.

The numbers are sorted once; clusters are then ranges of them, whose means come from sums up to each
place, so that an iteration costs k·log(n) instead of k·n.
"""

import numpy as np

_MOST_STEPS = 100_000  # Lloyd's iteration ends by itself; this is for what nobody has thought of.


def kmeans(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """At most k centers, ascending, and the number of the nearest one for each value.

    Args:
      values: finite float64 numbers, in one axis; may be none.
      k: at least 1.

    Returns:
      The centers that have values, and which of them each value has.
    """
    order = np.sort(values)
    if not order.size:
        return order, np.zeros(0, np.int64)
    sums = np.concatenate([[0.0], np.cumsum(order)])
    centers = np.linspace(order[0], order[-1], k)
    ends = np.zeros(0, np.int64)
    for _ in range(_MOST_STEPS):
        before, ends = ends, np.searchsorted(order, _borders(centers), side="right")
        if np.array_equal(before, ends):
            break
        centers = _means(order, sums, centers, ends)
    centers = centers[np.diff(ends, prepend=0, append=order.size) > 0]
    return centers, np.searchsorted(_borders(centers), values, side="left")


def _borders(centers: np.ndarray) -> np.ndarray:
    """Halfway between neighbours; who stands there belongs to the lower one."""
    return (centers[:-1] + centers[1:]) / 2


def _means(
    order: np.ndarray, sums: np.ndarray, centers: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """The mean of each range; an empty one gets the value that is farthest from its own center.

    This is scikit-learn's rule: that value leaves its range, the next empty one gets the next.
    """
    bounds = np.concatenate([[0], ends, [order.size]])
    counts, totals = np.diff(bounds), np.diff(sums[bounds])
    empty = np.flatnonzero(counts == 0)
    if empty.size:
        labels = np.repeat(np.arange(counts.size), counts)
        distances = np.abs(order - centers[labels])
        far = np.argsort(-distances, kind="stable")[: empty.size]
        for cluster, at in zip(empty, far[distances[far] > 0], strict=False):
            counts[labels[at]] -= 1
            totals[labels[at]] -= order[at]
            counts[cluster], totals[cluster] = 1, order[at]
    return np.sort(np.where(counts > 0, totals / np.maximum(counts, 1), centers))
