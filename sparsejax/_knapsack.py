"""How much of each layer to prune so that the predicted loss grows least: an exact knapsack.

The problem: every layer has a curve, the increase of the loss against how many of its units are
pruned, measured at some levels and straight between them; each unit has a price. Of all places on
the curves that save enough together, find those whose increases add up to the least. Curves rise
(isotonic regression makes them), but they need not be convex, so that going on where the next step
is cheapest may miss the optimum.

The method: greedy steps, which are the optimum for convex curves, and a mixed-integer program
(SciPy's HiGHS) with one binary variable for each segment of a curve; the better of the two.

Exactness: the program is solved to a relative gap of 1e-9 in floating point. From the levels that
it names, everything is counted in fractions, so that totals are exact and a budget is never
exceeded by a rounding error. At some optimum all places but one are levels, so that an optimum over
whole counts with a given total is found, too.
"""

import collections
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from sparsejax import _checks, _leaves
from sparsejax.allocation import Layer

# Of the objective: the solver's own default, 1e-4, stops short of optima that tests can count.
_GAP = 1e-9


class _Place(NamedTuple):
    """A place on a curve: a level, and how much of the way to the next one."""

    level: int
    part: Fraction


class Row(NamedTuple):
    """A curve as the solver wants it: levels of rising sparsity and loss, the first one dense.

    Attributes:
      pruned: from the leaves of the layer to how many of their units are pruned at each level.
      increases: of the loss, at each level; the first is 0, none falls.
    """

    pruned: dict[Layer, list[int]]
    increases: list[float]

    def saved(self, prices: Callable[[str], Fraction]) -> list[Fraction]:
        """The price of what is pruned at each level."""
        columns = [[prices(leaf.path) * n for n in ns] for leaf, ns in self.pruned.items()]
        return [sum(level, Fraction(0)) for level in zip(*columns, strict=True)]

    def increase(self, pruned: dict[str, int]) -> float:
        """How much the loss grows where so many units of the leaves are pruned."""
        totals = np.sum(list(self.pruned.values()), axis=0)
        here = sum(pruned[leaf.path] for leaf in self.pruned)
        return float(np.interp(here, totals, self.increases))

    def between(self, place: _Place) -> dict[str, Fraction]:
        """How many units of each leaf are pruned at a place."""
        return {leaf.path: Fraction(_at(ns, *place)) for leaf, ns in self.pruned.items()}


def row_of(pruned: dict[Layer, np.ndarray], losses: np.ndarray, dense_loss: float) -> Row:
    """A curve up to its last finite loss, without what was measured twice, made monotone."""
    # Here, because it takes longer to import than all of sparsejax.
    from scipy.optimize import isotonic_regression

    finite = int(np.argmin([*np.isfinite(losses), False]))
    counts = {leaf: np.array([0, *ns[:finite]]) for leaf, ns in pruned.items()}
    _, levels = np.unique(sum(counts.values()), return_index=True)
    rising = isotonic_regression(np.array([dense_loss, *losses[:finite]])[levels]).x
    return Row(
        {leaf: ns[levels].tolist() for leaf, ns in counts.items()}, (rising - rising[0]).tolist()
    )


def kept_of_each(rows: list[Row], layers: Sequence[Layer], keep: int) -> list[int]:
    """What each of some layers keeps, `keep` units in all, at the least predicted loss.

    Raises:
      ValueError: if a layer has no row or another number of units, only a part of a row is asked
        for, or the rows do not reach so far.
    """
    chosen = _rows_of(rows, layers)
    units = sum(layer.units for layer in layers)
    saved = [row.saved(lambda path: Fraction(1)) for row in chosen]
    _check_reach("keep", keep, saved, Fraction(units))
    places = _least_loss(chosen, saved, Fraction(units - keep))
    pruned: dict[str, int] = {}
    for row, place in zip(chosen, places, strict=True):
        pruned |= _rounded(row.between(place))
    return [layer.units - pruned[layer.path] for layer in layers]


def pruned_within(rows: list[Row], prices: Mapping[str, Fraction], budget: Any) -> dict[str, int]:
    """How many units of each leaf are pruned so that the rest costs at most the budget.

    Counts are rounded up: at most a unit a leaf more than the optimum prunes.

    Raises:
      ValueError: if the rows do not reach so far.
    """
    leaves = [leaf for row in rows for leaf in row.pruned]
    dense = sum((prices[leaf.path] * leaf.units for leaf in leaves), Fraction(0))
    allowed = dense if math.isinf(float(budget)) else min(dense, _exact(budget))
    saved = [row.saved(prices.__getitem__) for row in rows]
    _check_reach("budget", budget, saved, dense)
    places = _least_loss(rows, saved, dense - allowed)
    pruned: dict[str, int] = {}
    for row, place in zip(rows, places, strict=True):
        pruned |= {path: math.ceil(n) for path, n in row.between(place).items()}
    return pruned


def checked_costs(costs: Any, leaves: list[Layer]) -> dict[str, Fraction]:
    """The cost of a unit of each leaf, as a fraction; refuses what is missing or not > 0."""
    if not isinstance(costs, Mapping):
        raise TypeError(
            "`costs` must map the paths of leaves to the cost of one unit, got "
            f"{_leaves.brief(costs)}."
        )
    paths = [leaf.path for leaf in leaves]
    missing, unknown = set(paths).difference(costs), set(costs).difference(paths)
    if missing or unknown:
        what = "none" if missing else "one"
        raise ValueError(
            f"`costs` must have one cost for every leaf of the curves, got {what} for "
            f"{min(map(str, missing or unknown))!r}; the leaves are {_leaves.brief(paths)}."
        )
    for path, cost in costs.items():
        _checks.real_number("costs", cost)
        if not 0 < float(cost) < math.inf:
            raise ValueError(f"`costs` must be finite and > 0, got {cost} at {path!r}.")
    return {path: _exact(costs[path]) for path in paths}


def _rows_of(rows: list[Row], layers: Sequence[Layer]) -> list[Row]:
    """The rows of some layers, which have to be all the leaves of each."""
    units = {leaf.path: (leaf.units, i) for i, row in enumerate(rows) for leaf in row.pruned}
    for layer in layers:
        _check_known(layer, units)
    asked = [layer.path for layer in layers]
    found = [rows[i] for i in dict.fromkeys(units[path][1] for path in asked)]
    _check_whole(asked, [leaf.path for row in found for leaf in row.pruned])
    return found


def _at(values: Sequence[Any], level: int, part: Any) -> Any:
    """What a curve has at a place, from what it has at the levels."""
    here = values[level]
    return here + part * (values[level + 1] - here) if part else here


def _total_increase(rows: list[Row], places: list[_Place]) -> float:
    return math.fsum(
        _at(row.increases, level, float(part))
        for row, (level, part) in zip(rows, places, strict=True)
    )


def _least_loss(rows: list[Row], saved: list[list[Fraction]], target: Fraction) -> list[_Place]:
    """The places that save `target` together, in all, at the least increase of the loss.

    A multiple-choice knapsack. Curves are straight between levels, so that at some optimum all
    places but one are levels: of two others, one could move on at no loss until it meets a level.
    What is whole at every level can therefore be met in whole numbers.
    """
    greedy = _fill(rows, saved, target, [0] * len(rows))
    bound = _total_increase(rows, greedy)
    if bound == 0:
        return greedy
    exact = _fill(rows, saved, target, _best_levels(rows, saved, target, bound))
    # The first of equals: greedy spreads what costs nothing over the layers.
    return min(greedy, exact, key=lambda places: _total_increase(rows, places))


def _fill(
    rows: list[Row], saved: list[list[Fraction]], target: Fraction, levels: list[int]
) -> list[_Place]:
    """Goes on from some levels until `target` is saved, where each step costs least for its size.

    From level 0 it is the optimum if all curves are convex. Exact arithmetic of what is saved.
    """
    levels, last = list(levels), dict[int, Fraction]()

    def slope(i: int, level: int) -> float:
        rise = rows[i].increases[level + 1] - rows[i].increases[level]
        return rise / float(saved[i][level + 1] - saved[i][level])

    left = target - sum(s[level] for s, level in zip(saved, levels, strict=True))
    while left < 0:
        # A solver keeps to its constraints up to a tolerance only.
        i = max((i for i, n in enumerate(levels) if n), key=lambda i: slope(i, levels[i] - 1))
        levels[i] -= 1
        left += saved[i][levels[i] + 1] - saved[i][levels[i]]
    steps = [(slope(i, n), n, i) for i, n in enumerate(levels) if n + 1 < len(saved[i])]
    heapq.heapify(steps)
    while left > 0:
        _, level, i = heapq.heappop(steps)
        room = saved[i][level + 1] - saved[i][level]
        if left < room:
            last[i] = left / room
            break
        left -= room
        levels[i] += 1
        if level + 2 < len(saved[i]):
            heapq.heappush(steps, (slope(i, level + 1), level + 1, i))
    return [_Place(level, last.get(i, Fraction(0))) for i, level in enumerate(levels)]


def _best_levels(
    rows: list[Row], saved: list[list[Fraction]], target: Fraction, bound: float
) -> list[int]:
    """The level from which each curve goes on at the optimum, by a mixed-integer program.

    For every segment of a curve there are a binary variable, whether its place is in it, and a
    continuous one, how far. In units of `target` and of `bound`, an increase that can be had:
    segments beyond either are left out, and the coefficients are between 0 and 1.
    """
    # Here, because it takes longer to import than all of sparsejax.
    from scipy import optimize, sparse

    segments = [
        (i, level)
        for i, row in enumerate(rows)
        for level in range(len(row.increases) - 1)
        if row.increases[level] <= bound and saved[i][level] < target
    ]
    owners, levels = np.array(segments).T
    low = np.array([rows[i].increases[n] for i, n in segments]) / bound
    rise = np.array([rows[i].increases[n + 1] for i, n in segments]) / bound - low
    start = np.array([float(saved[i][n] / target) for i, n in segments])
    room = np.array([float((saved[i][n + 1] - saved[i][n]) / target) for i, n in segments])
    # No further than the target.
    useful = np.minimum(1, (1 - start) / room)
    n = len(segments)
    eye = sparse.eye_array(n)
    inside = sparse.csr_array((np.ones(n), (owners, np.arange(n))), (len(rows), n))
    inside = inside[np.unique(owners)]
    result = optimize.milp(
        np.concatenate([low, rise * useful]),
        integrality=np.repeat([1, 0], n),
        bounds=(0, 1),
        constraints=[
            optimize.LinearConstraint(sparse.hstack([eye, -eye]), lb=0),
            optimize.LinearConstraint(sparse.hstack([inside, 0 * inside]), 1, 1),
            optimize.LinearConstraint(np.concatenate([start, room * useful])[None], 1, 1),
        ],
        options={"mip_rel_gap": _GAP},
    )
    if result.x is None:
        raise RuntimeError(f"scipy.optimize.milp found no allocation: {result.message}")
    best = [0] * len(rows)
    for k in np.flatnonzero(result.x[:n] > 0.5):
        best[owners[k]] = int(levels[k])
    return best


def _rounded(values: dict[str, Fraction]) -> dict[str, int]:
    """Whole numbers with the same sum, which is whole: the largest remainders are rounded up."""
    whole = {path: math.floor(x) for path, x in values.items()}
    over = int(sum(values.values()) - sum(whole.values()))
    for path in sorted(values, key=lambda path: whole[path] - values[path])[:over]:
        whole[path] += 1
    return whole


def _exact(value: Any) -> Fraction:
    return Fraction(int(value)) if _leaves.is_int(value) else Fraction(float(value))


def _check_known(layer: Layer, known: dict[str, tuple[int, int]]) -> None:
    if layer.path not in known:
        raise ValueError(
            f"`curves` must have a curve for every layer, got none for {layer.path!r} among "
            f"{_leaves.brief(sorted(known))}; measure all that is prunable."
        )
    if layer.units != known[layer.path][0]:
        raise ValueError(
            f"`curves` must have the units of the layers, got {known[layer.path][0]} for "
            f"{layer.units} at {layer.path!r}; measure with the same granularity."
        )


def _check_whole(asked: list[str], known: list[str]) -> None:
    """Refuses parts of groups, and paths that stand for several layers (stacked leaves)."""
    times = collections.Counter(asked)
    for path in known:
        if times[path] != 1:
            raise ValueError(
                "`curves` must have one curve for every layer, got a layer or a group for "
                f"{times[path]} at {path!r}; ask for all leaves of a group, and for none "
                "that is stacked."
            )


def _check_reach(name: str, value: Any, rows: list[list[Fraction]], everything: Fraction) -> None:
    """Refuses to prune more than was measured."""
    least = everything - sum(saved[-1] for saved in rows)
    if math.isfinite(value) and _exact(value) < least:
        raise ValueError(
            f"`{name}` must be at least {float(least):.10g}, what is left where every layer is "
            f"pruned as far as its curve reaches, got {value}; measure up to sparsity 1. (A curve "
            "ends before its first loss that is not finite.)"
        )
