"""Sensitivity: how the loss grows as one layer after another is pruned; how much to prune, from it.

`curves` measures, `allocation` and `within_budget` share out what is kept so that the loss is
predicted to grow least, and `choose_sparsity` finds the sparsity that a bound on the loss allows.
All of them run eagerly and call `loss` many times, so compile it: `jax.jit(loss)`. Pruned params
have the shapes and dtypes of the dense ones, so that it is compiled once.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np

from sparsejax import (
    _checks,
    _knapsack,
    _leaves,
    _progress,
    _scores,
    _tree,
    criteria,
    filters,
    masking,
    selection,
)
from sparsejax._typing import Filter, Masks, Params, Scalar, Scores
from sparsejax.allocation import Allocation, Layer, allocate
from sparsejax.granularities import NM, Granularity, Unstructured

_UNSTRUCTURED = Unstructured()

Loss: TypeAlias = Callable[[Params], Any]
"""`params -> number`, lower = better: a validation loss, or an error rate."""

Retrain: TypeAlias = Callable[[Params, Masks], Params]
"""`(pruned params, masks) -> params`."""


class Curves(NamedTuple):
    """The loss against sparsity, for each layer alone; all others are dense.

    Attributes:
      layers: the layers, a leaf or a group of leaves each. The path of a group is its name; the
        shape of a group of several leaves is (units,).
      sparsities: (n,), ascending: the fraction of a layer's units that is pruned.
      losses: (layers, n). What was measured, NaN and infinite values included.
      dense_loss: the loss when nothing is pruned.
      pruned: for each layer, from its leaves to how many of their units are pruned at each
        sparsity, (n,).
    """

    layers: tuple[Layer, ...]
    sparsities: np.ndarray
    losses: np.ndarray
    dense_loss: float
    pruned: tuple[dict[Layer, np.ndarray], ...]


class Shares(NamedTuple):
    """What `within_budget` lets every leaf keep.

    Attributes:
      densities: from the path of each leaf to the fraction of its units that is kept, for
        `allocation.override`.
      pruned: how many units are pruned, all leaves together, for `masking.topk(scores, count=)`.
      cost: of what is kept, at most the budget.
      loss_increase: how much the curves predict that the loss grows.
    """

    densities: dict[str, float]
    pruned: int
    cost: float
    loss_increase: float


class Choice(NamedTuple):
    """What `choose_sparsity` found.

    Attributes:
      sparsity: the largest that was seen to keep the bound.
      masks: the masks of this sparsity.
      params: pruned by these masks and retrained, if there was a `retrain`; their loss is `loss`.
      loss: the loss at this sparsity.
      dense_loss: the loss of the dense params.
      tried: every (sparsity, loss) that was measured, in this order.
    """

    sparsity: float
    masks: Masks
    params: Params
    loss: float
    dense_loss: float
    tried: tuple[tuple[float, float], ...]


def curves(
    loss: Loss,
    params: Params,
    sparsities: Sequence[Scalar] | np.ndarray | jax.Array,
    *,
    scores: Scores | None = None,
    granularity: Granularity = _UNSTRUCTURED,
    groups: Mapping[str, Filter] | None = None,
    prunable: Filter = filters.weights,
    progress: bool | str = True,
) -> Curves:
    """Measures the loss as each layer alone is pruned, to each of some sparsities.

    A layer of n units loses `round(sparsity * n)` of them, those of the lowest scores (as
    `masking.topk`: ties keep the lower index); everything else is dense. Cost: at most one loss for
    each layer and sparsity, and one for the dense params; what prunes nothing, or as much as the
    sparsity before, is not measured again.

    Curves bend towards 1, so that sparsities should be denser there, and `allocation` never goes
    beyond the last: `1 - np.geomspace(1, 0.01, 15)`, then 1.

    Args:
      loss: `params -> number`, lower = better: the loss on validation data, or the error rate.
      params: a pytree of arrays.
      sparsities: ascending numbers in [0, 1]; 1 prunes a whole layer.
      scores: a pytree like `params`, higher = keep; by default `criteria.magnitude`.
      granularity: what is kept or pruned as one; not `NM`, which fixes its own sparsity.
      groups: from names to filters: prunable leaves of one group are one layer, in which they
        compete. By default, and where no group has it, each leaf is a layer of its own.
      prunable: which leaves are pruned.
      progress: whether to show a bar, on standard error.

    Returns:
      The curves, layers in the order of the tree. A loss may be NaN there or infinite.

    Raises:
      TypeError: if an argument is of the wrong kind, or a loss is not one real number.
      ValueError: if sparsities are not ascending in [0, 1], groups overlap or are empty, a score
        is NaN, trees do not match, or the loss of the dense params is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import sensitivity
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[1.0, 3.0]])}
      >>> def loss(p):  # half the squared distance from these params
      ...     return sum(jnp.sum((p[k] - params[k]) ** 2) for k in params) / 2
      >>> found = sensitivity.curves(loss, params, [0.5, 1.0], progress=False)
      >>> [layer.path for layer in found.layers], found.losses.tolist()
      (['a', 'b'], [[0.5, 2.5], [0.5, 5.0]])

    References:
      S. Han, J. Pool, J. Tran, W. Dally, *Learning both weights and connections for efficient
      neural networks*, NeurIPS 2015, https://arxiv.org/abs/1506.02626, figure 6.
    """
    _check_loss(loss)
    _check_granularity(granularity)
    levels = _checked_sparsities(sparsities)
    layers = _layers(_scored_leaves(params, scores, granularity, prunable), groups)
    dense_loss = _dense_loss(loss, params)
    rows = []
    with _progress.bar(progress, "losses", len(layers) * len(levels)) as advance:
        for layer, own in layers.items():
            points = {0: _Point(dense_loss, [0] * len(own))}
            counts = [round(s * layer.units) for s in levels]
            for sparsity, count in zip(levels, counts, strict=True):
                if count not in points:
                    points[count] = _point(loss, params, own, granularity, count)
                advance(f"{layer.path}, sparsity {sparsity:.4g}, loss {points[count].loss:.4g}")
            rows.append([points[count] for count in counts])
    return Curves(
        tuple(layers),
        np.array(levels),
        np.array([[point.loss for point in row] for row in rows]),
        dense_loss,
        tuple(_pruned(own, row) for own, row in zip(layers.values(), rows, strict=True)),
    )


def allocation(curves: Curves) -> Allocation:
    """The allocation whose loss is predicted to grow least: the sum of the layers' own increases.

    The prediction takes what the layers do to the loss as independent (it is, in the second-order
    expansion with a block-diagonal Hessian, and for small increases it is roughly so) and a curve
    as straight between two sparsities. It is then the exact optimum over all whole counts with this
    total, by a mixed-integer program (SciPy's HiGHS), since curves need not be convex.

    Noise is not taken for a gift: a curve that falls somewhere is first made monotone, by isotonic
    regression. From its first loss that is not finite on, a layer is not pruned.

    Equal curves give equal counts with the same SciPy; another release may choose another of
    several optima. Cost: with twenty sparsities some hundredths of a second for thirty layers,
    half a second for 120.

    Args:
      curves: of the layers that are to be pruned, or of more, with the same granularity.

    Returns:
      An allocation for `masking.topk` and its kin. It raises `ValueError` where a layer has no
      curve or another number of units, only a part of a group is asked for, or the total needs more
      pruning than was measured.

    Raises:
      TypeError: if `curves` is no `Curves`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria, masking, sensitivity
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0]])}
      >>> def loss(p):
      ...     return sum(jnp.sum((p[k] - params[k]) ** 2) for k in params) / 2
      >>> found = sensitivity.curves(loss, params, [0.5, 1.0], progress=False)
      >>> scores = criteria.magnitude(params)
      >>> masking.topk(scores, 0.5, allocation=sensitivity.allocation(found))
      {'a': Array([[False, False]], dtype=bool), 'b': Array([[ True,  True]], dtype=bool)}
    """
    rows = _rows(curves)

    def least_loss(layers: Sequence[Layer], keep: int) -> list[int]:
        return allocate(functools.partial(_knapsack.kept_of_each, rows), layers, keep)

    return least_loss


def within_budget(curves: Curves, budget: Scalar, *, costs: Mapping[str, Scalar]) -> Shares:
    """The densities whose loss is predicted to grow least while all that is kept is in a budget.

    The prediction is that of `allocation`. Any kind of cost that adds up can have a budget:
    Σ cost · kept over the leaves. With cost 1 everywhere it is the number of params. For FLOPs, the
    cost of a weight is 1 in a dense layer and the number of output positions in a convolution
    (twice that, if a multiplication and an addition are two). A channel costs what its weights do.

    Counts are rounded down, so that the budget is kept exactly, and nearly used up.

    Args:
      curves: of the layers that are to be pruned.
      budget: a number >= 0, in the unit of the costs; infinity keeps everything.
      costs: from the path of every leaf of the curves to the cost of one unit of it, > 0.

    Returns:
      The shares. The masks are `masking.topk(scores, count=shares.pruned, allocation=
      allocation.override(allocation.uniform, shares.densities))`.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if a path has no cost, a cost no leaf, a cost is not > 0 and finite, or the budget
        needs more pruning than was measured.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import sensitivity
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0]])}
      >>> def loss(p):
      ...     return sum(jnp.sum((p[k] - params[k]) ** 2) for k in params) / 2
      >>> found = sensitivity.curves(loss, params, [0.5, 1.0], progress=False)
      >>> shares = sensitivity.within_budget(found, 12, costs={"a": 1, "b": 10})
      >>> shares.densities, shares.pruned, shares.cost
      ({'a': 1.0, 'b': 0.5}, 1, 12.0)
    """
    rows = _rows(curves)
    leaves = [leaf for row in rows for leaf in row.pruned]
    prices = _knapsack.checked_costs(costs, leaves)
    _checks.non_negative("budget", budget)
    pruned = _knapsack.pruned_within(rows, prices, budget)
    kept = {leaf.path: leaf.units - pruned[leaf.path] for leaf in leaves}
    return Shares(
        densities={leaf.path: kept[leaf.path] / max(leaf.units, 1) for leaf in leaves},
        pruned=sum(pruned.values()),
        cost=float(sum(prices[path] * n for path, n in kept.items())),
        loss_increase=math.fsum(row.increase(pruned) for row in rows),
    )


def choose_sparsity(
    loss: Loss,
    params: Params,
    *,
    max_loss_increase: Scalar,
    scores: Scores | None = None,
    resolution: float = 0.001,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity = _UNSTRUCTURED,
    prunable: Filter = filters.weights,
    retrain: Retrain | None = None,
    progress: bool | str = True,
) -> Choice:
    """Finds the largest sparsity whose loss is at most the dense loss plus `max_loss_increase`.

    Bisection on the grid 0, resolution, 2 · resolution, ... below 1: ten losses for a resolution of
    0.001, and that of the dense params. It takes the loss to rise with sparsity. Where that is not
    so, the sparsity returned has still been measured and keeps the bound, but a larger one may keep
    it, too: `tried` shows what was seen.

    The loss that is searched is optimistic at the sparsity found, as every chosen one is: report
    that on data which were not used here.

    Args:
      loss: `params -> number`, lower = better: the loss on validation data, or the error rate.
      params: a pytree of arrays.
      max_loss_increase: a finite number >= 0, in the unit of the loss. A standard error of the loss
        on the validation data is a natural choice.
      scores: a pytree like `params`, higher = keep; by default `criteria.magnitude`.
      resolution: the distance of two sparsities that are told apart, in (0, 0.5].
      scope: as in `masking.topk`: how leaves compete.
      allocation: as in `masking.topk`: shares out what is kept, for example `allocation(curves)`,
        of curves up to sparsity 1.
      granularity: what is kept or pruned as one; not `NM`, which fixes its own sparsity.
      prunable: which leaves are pruned.
      retrain: `(pruned params, masks) -> params`, called before the loss is measured, every time
        from `params`; what it returns is pruned by the masks again. By default the loss is that of
        the pruned params as they are. The dense params are not retrained.
      progress: whether to show a bar, on standard error.

    Returns:
      The choice; sparsity 0 if no other keeps the bound.

    Raises:
      TypeError: if an argument is of the wrong kind, or a loss is not one real number.
      ValueError: if a number is out of range, the loss of the dense params is not finite, or as in
        `masking.topk`. A NaN loss of pruned params does not keep the bound.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import sensitivity
      >>> params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> def loss(p):
      ...     return jnp.sum((p["w"] - params["w"]) ** 2) / 2
      >>> choice = sensitivity.choose_sparsity(
      ...     loss, params, max_loss_increase=3.0, resolution=0.25, progress=False)
      >>> choice.sparsity, choice.loss, choice.tried
      (0.5, 2.5, ((0.0, 0.0), (0.5, 2.5), (0.75, 7.0)))
    """
    _check_loss(loss)
    _check_granularity(granularity)
    _check_increase(max_loss_increase)
    _check_retrain(retrain)
    grid = _grid(resolution)
    ranked = _scores_of(params, scores)

    def masks_at(sparsity: float) -> Masks:
        return masking.topk(
            ranked,
            sparsity,
            scope=scope,
            allocation=allocation,
            granularity=granularity,
            prunable=prunable,
        )

    def attempt(sparsity: float) -> Choice:
        masks = masks_at(sparsity)
        pruned = masking.apply_masks(params, masks)
        if retrain is not None:
            pruned = masking.apply_masks(_retrained(retrain, pruned, masks), masks)
        return Choice(sparsity, masks, pruned, _measure(loss, pruned), dense, ())

    everything = masks_at(0.0)
    dense = _dense_loss(loss, params)
    best = Choice(0.0, everything, params, dense, dense, ())
    tried = [(0.0, dense)]
    # The first index keeps the bound; the last one, sparsity 1, is never asked for.
    low, high = 0, len(grid)
    with _progress.bar(progress, "sparsities", math.ceil(math.log2(high))) as advance:
        while high - low > 1:
            middle = (low + high) // 2
            choice = attempt(grid[middle])
            tried.append((choice.sparsity, choice.loss))
            if choice.loss <= dense + float(max_loss_increase):
                low, best = middle, choice
            else:
                high = middle
            advance(f"sparsity {choice.sparsity:.4g}, loss {choice.loss:.4g}")
    return best._replace(tried=tuple(tried))


class _Leaf(NamedTuple):
    """A prunable leaf: the array, where it is among all leaves, and the scores of its units."""

    layer: Layer
    array: Any
    position: int
    scores: jax.Array


class _Point(NamedTuple):
    """What a layer was measured to lose, and how many units of each of its leaves are pruned."""

    loss: float
    pruned: list[int]


def _scores_of(params: Params, scores: Scores | None) -> Scores:
    """The scores in a tree like `params`, so that masks are, too."""
    if scores is None:
        return criteria.magnitude(params)
    _tree.check_shapes("scores", scores, params)
    return _tree.flatten(params).rebuild(_tree.align("scores", scores, "params", params))


def _scored_leaves(
    params: Params, scores: Scores | None, granularity: Granularity, prunable: Filter
) -> list[_Leaf]:
    chosen = filters.selected(prunable, params)
    flat = _tree.flatten(params)
    ranked = iter(_scores.chosen_scores(_tree.flatten(_scores_of(params, scores)), chosen))
    leaves = []
    for i, (path, array, yes) in enumerate(zip(flat.paths, flat.leaves, chosen, strict=True)):
        if yes:
            units = granularity.units(path, next(ranked))
            _checks.no_nan("scores", path, units, of="units", hint="Look at the pool.")
            leaves.append(_Leaf(Layer(path, np.shape(array), units.size), array, i, units))
    return leaves


def _layers(
    leaves: list[_Leaf], groups: Mapping[str, Filter] | None
) -> dict[Layer, tuple[_Leaf, ...]]:
    """The layers and the leaves of each, in the order of the tree."""
    owners = _owners(leaves, {} if groups is None else groups)
    members: dict[str, list[_Leaf]] = {}
    for leaf in leaves:
        members.setdefault(owners.get(leaf.layer.path, leaf.layer.path), []).append(leaf)
    return {_layer(name, own): tuple(own) for name, own in members.items()}


def _layer(name: str, own: list[_Leaf]) -> Layer:
    units = sum(leaf.layer.units for leaf in own)
    return Layer(name, own[0].layer.shape if len(own) == 1 else (units,), units)


def _owners(leaves: list[_Leaf], groups: Mapping[str, Filter]) -> dict[str, str]:
    """From the paths of the leaves that are in a group to its name."""
    _check_groups(groups)
    owners: dict[str, str] = {}
    for name, filter_ in groups.items():
        paths = [
            leaf.layer.path
            for leaf in leaves
            if filters.answer(filter_, leaf.layer.path, leaf.array, name="groups")
        ]
        _check_group(name, paths, owners, [leaf.layer.path for leaf in leaves])
        owners |= dict.fromkeys(paths, name)
    return owners


def _point(
    loss: Loss, params: Params, own: tuple[_Leaf, ...], granularity: Granularity, count: int
) -> _Point:
    """What it costs to prune the `count` units of some leaves that score lowest."""
    keep = sum(leaf.layer.units for leaf in own) - count
    kept = selection.keep_largest([leaf.scores for leaf in own], keep)
    flat = _tree.flatten(params)
    masks: list[Any] = [np.ones((), bool)] * len(flat.leaves)
    for leaf, units in zip(own, kept, strict=True):
        masks[leaf.position] = granularity.expand(units, leaf.layer.shape)
    pruned = masking.apply_masks(params, flat.rebuild(masks))
    return _Point(_measure(loss, pruned), [u.size - int(np.count_nonzero(u)) for u in kept])


def _pruned(own: tuple[_Leaf, ...], points: list[_Point]) -> dict[Layer, np.ndarray]:
    columns = np.array([point.pruned for point in points]).T
    return {leaf.layer: column for leaf, column in zip(own, columns, strict=True)}


def _measure(loss: Loss, params: Params) -> float:
    value = loss(params)
    dtype = _leaves.dtype_of(value)
    if _leaves.is_traced(value):
        raise TypeError(
            "`loss` must return a number that is known, got a traced one; call this function "
            "outside of jit, and compile `loss` alone."
        )
    if _leaves.shape_of(value) != () or not (
        np.issubdtype(dtype, np.integer) or _leaves.is_floating(value)
    ):
        got = _leaves.brief(value) if dtype is None else _leaves.describe(value)
        raise TypeError(
            f"`loss` must return one real number, got {got}; take the mean over the examples."
        )
    return float(value)


def _dense_loss(loss: Loss, params: Params) -> float:
    value = _measure(loss, params)
    if not math.isfinite(value):
        raise ValueError(
            f"`loss` must be finite for the dense `params`, got {value}: nothing compares with it."
        )
    return value


def _rows(curves: Curves) -> list[_knapsack.Row]:
    if not isinstance(curves, Curves):
        raise TypeError(
            f"`curves` must be what sensitivity.curves returns, got {_leaves.brief(curves)}."
        )
    return [
        _knapsack.row_of(pruned, losses, curves.dense_loss)
        for pruned, losses in zip(curves.pruned, curves.losses, strict=True)
    ]


def _grid(resolution: float) -> list[float]:
    """Multiples of the resolution below 1, as decimals have them: 0.3, not 0.30000000000000004."""
    _checks.real_number("resolution", resolution)
    if not 0 < float(resolution) <= 0.5:
        raise ValueError(
            f"`resolution` must be in (0, 0.5], a distance of two sparsities, got {resolution}."
        )
    multiples = (round(i * float(resolution), 12) for i in range(math.ceil(1 / resolution) + 1))
    return [s for s in multiples if s < 1]


def _check_loss(loss: Any) -> None:
    _checks.function("loss", loss, "params -> number", "jax.jit(validation_loss)")


def _retrained(retrain: Retrain, pruned: Params, masks: Masks) -> Params:
    params = retrain(pruned, masks)
    if params is None:
        raise TypeError("`retrain` must return the params, got None; return what it trained.")
    return params


def _check_retrain(retrain: Any) -> None:
    if retrain is not None:
        _checks.function("retrain", retrain, "(params, masks) -> params", "a loop of fine-tuning")


def _check_granularity(granularity: Any) -> None:
    if isinstance(granularity, NM | type) or not isinstance(granularity, Granularity):
        raise TypeError(
            "`granularity` must be a value of sparsejax.granularities whose sparsity is free, such "
            f"as Unstructured() or Channel(), got {_leaves.brief(granularity)}."
        )


def _check_increase(value: Any) -> None:
    _checks.non_negative("max_loss_increase", value)
    if math.isinf(float(value)):
        raise ValueError(f"`max_loss_increase` must be finite, got {value}.")


def _checked_sparsities(sparsities: Any) -> list[float]:
    if not isinstance(sparsities, Sequence | np.ndarray | jax.Array) or np.ndim(sparsities) != 1:
        raise TypeError(
            f"`sparsities` must be a sequence of numbers, got {_leaves.brief(sparsities)}."
        )
    for value in sparsities:
        _checks.real_number("sparsities", value)
    levels = [float(value) for value in sparsities]
    if not levels or levels[0] < 0 or levels[-1] > 1 or levels != sorted(set(levels)):
        raise ValueError(
            "`sparsities` must be ascending numbers in [0, 1] (fractions, not percentages), at "
            f"least one, got {_leaves.brief(levels)}."
        )
    return levels


def _check_groups(groups: Any) -> None:
    if not isinstance(groups, Mapping):
        raise TypeError(
            '`groups` must map names to filters, such as {"block1": filters.by_path("block1.*")}, '
            f"got {_leaves.brief(groups)}."
        )
    for filter_ in groups.values():
        _checks.function("groups", filter_, "(path, leaf) -> bool", 'filters.by_path("block1.*")')


def _check_group(name: str, paths: list[str], owners: dict[str, str], leaves: list[str]) -> None:
    if not paths:
        raise ValueError(
            f"`groups` must select at least one prunable leaf each, got none for {name!r} of "
            f"{_leaves.brief(leaves)}."
        )
    for path in paths:
        if path in owners:
            raise ValueError(
                f"`groups` must not overlap, got {path!r} in {owners[path]!r} and in {name!r}."
            )
    if name in leaves and name not in paths:
        raise ValueError(f"`groups` must not have the name of a leaf outside, got {name!r}.")
