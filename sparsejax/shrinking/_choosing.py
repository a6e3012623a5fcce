"""Which units go: by their scores and an amount, or because masks say that they are dead."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from sparsejax import _checks, _leaves
from sparsejax._typing import Masks, Scores
from sparsejax.dependency import Group, Groups, dead_units, unit_scores
from sparsejax.dependency._units import is_masks
from sparsejax.shrinking._plan import Plan, make

_HINT = " Groups that are not exact are cut with approximate=True only."
_AMOUNTS = "one of sparsity, keep, flops, params"


def plan(
    groups: Groups,
    scores: Scores | Masks | Mapping[str, Any],
    *,
    sparsity: float | None = None,
    keep: int | Mapping[str, int] | None = None,
    flops: float | int | None = None,
    params: float | int | None = None,
    scope: Literal["per_group", "global"] = "per_group",
    only: str | Sequence[str] = "*",
    min_units: int = 1,
    multiple_of: int = 1,
    approximate: bool = False,
) -> Plan:
    """Decides which units go.

    With scores, the units of the lowest go; of equal ones the higher index. `scope="per_group"`
    takes the same fraction of every group, `"global"` lets the units of all groups compete (then
    scores should be comparable: `unit_scores(..., normalize=...)`). With a budget the least is
    removed that meets it. With masks (`jax.tree.map(lambda w: w != 0, params)`, say) those units go
    that are dead (`dependency.dead_units`: biases count), and no amount is asked for.

    Each group gives up its own units: an axis that is split into heads and their width keeps a
    quarter of its indices once both are halved (`only` names what to cut).

    Groups that are not `exact` are left alone, and `Plan.left` says so, unless `approximate`.

    Args:
      groups: what `dependency.trace` found.
      scores: higher = keep: a tree like the variables (or one of its branches) of what a criterion
        says of every entry, which is summed over the unit; or the unit scores themselves, by the
        name of the group (`dependency.unit_scores`), of which groups may be left out; or masks, a
        tree of booleans.
      sparsity: the fraction of units that go, in [0, 1): `round(sparsity * n)` of the n of each
        group, or of all together.
      keep: how many units of each group stay, or of some, by the name of the group or its layer.
      flops: what may be left of the operations of one call: a fraction in (0, 1] if it is a float,
        a number if it is an int.
      params: likewise of the entries of all variables.
      scope: who competes.
      only: patterns (`fnmatch`) of the names of groups, `conv2.kernel`, or of their layers,
        `conv2`; others are left alone.
      min_units: the least number of units of any group that stay, at least 1.
      multiple_of: the number of indices that stay on the axis that owns a group is rounded up to a
        multiple of this (where the whole axis is none, it may stay whole). On CPUs, convolutions of
        33 channels took 1.8 times as long as of 32 (`benchmarks/shrinking.py`).
      approximate: also cut groups that are not exact; with masks, also units of which only the
        *weights* (two axes or more) that produce them are masked, whatever their biases say.

    Returns:
      The plan.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if none or several of the amounts are given, if one is out of range or cannot be
        reached (with what can), if scores do not fit the groups, or are NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria, dependency, shrinking
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.arange(24.0).reshape(3, 8), "out": jnp.ones((8, 2))}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> plan = shrinking.plan(groups, criteria.magnitude(params), sparsity=0.5)
      >>> print(plan)
      in      8 → 4
      params  40 → 20 (50.0%)
      FLOPs   80 → 40 (50.0%)
      >>> plan.kept("in")
      (4, 5, 6, 7)
    """
    _check_groups(groups)
    _checks.choice("scope", scope, ("per_group", "global"))
    for name, number in (("min_units", min_units), ("multiple_of", multiple_of)):
        _positive(name, number)
    names = [name for name, group in groups.items() if _matches(group, only)]
    for pattern in [only] if isinstance(only, str) else only:
        if len(groups) and not any(_matches(group, pattern) for group in groups.values()):
            raise ValueError(
                f"`only` must match a group, got {pattern!r}; there are {', '.join(groups)}."
            )
    left = {n: _not_exact(groups[n]) for n in names if not groups[n].exact and not approximate}
    names = [name for name in names if name not in left]
    amounts = {"sparsity": sparsity, "keep": keep, "flops": flops, "params": params}
    given = {name: value for name, value in amounts.items() if value is not None}
    if len(groups) and not jax.tree.leaves(scores):
        raise ValueError(f"`scores` must hold numbers, got {_leaves.brief(scores)}.")
    if not _by_group(scores, groups):
        if is_masks(scores):
            if given:
                raise ValueError(f"`scores` are masks: they say what goes; got {[*given]}, too.")
            dead, hints = dead_units(groups, scores, approximate=approximate)
            rules = {n: _Rule(groups[n], ~dead[n], min_units, multiple_of) for n in names}
            removed = {n: rules[n].lowest(int(dead[n].sum())) for n in names}
            left |= {n: hint for n, hint in hints.items() if n in names and not len(removed[n])}
            return make(groups, removed, left)
        scores = unit_scores(groups, scores)
    if len(given) != 1:
        raise ValueError(f"`plan` needs {_AMOUNTS}, got {[*given] or 'none'}.")
    rows = _unit_scores(scores, [n for n in names if n in scores], groups)
    rules = {n: _Rule(groups[n], row, min_units, multiple_of) for n, row in rows.items()}
    if keep is not None:
        return make(groups, _kept(rules, keep), left)
    if sparsity is not None:
        _checks.known_fraction("sparsity", sparsity)
        take: Callable[[Any], Any] = _per_group(rules) if scope == "per_group" else _global(rules)
        total = sum(map(len, rows.values()))
        amount: Any = sparsity if scope == "per_group" else round(sparsity * total)
        return make(groups, take(amount), left)
    kind = "flops" if flops is not None else "params"
    return make(groups, _within(groups, rules, scope, kind, given[kind]), left)


class _Rule:
    """How many and which units of a group may go."""

    def __init__(self, group: Group, scores: np.ndarray, min_units: int, multiple_of: int) -> None:
        self.scores, self.size, self.layer = scores, group.size, _layer(group)
        # Of equal scores the lower index is kept, as everywhere in this library.
        order = np.lexsort((-np.arange(group.size), scores))
        self.order = order
        width = group.members[0].indices.shape[1]
        self._step = multiple_of // math.gcd(multiple_of, width)
        self._least = min_units

    def allowed(self, gone: int) -> int:
        """How many go when `gone` are asked for: never more."""
        stay = max(self.size - gone, self._least)
        stay = -(-stay // self._step) * self._step
        return max(self.size - stay, 0)

    def lowest(self, gone: int) -> np.ndarray:
        """The units that go when `gone` are asked for."""
        return np.sort(self.order[: self.allowed(gone)])


def _kept(rules: dict[str, _Rule], keep: Any) -> dict[str, np.ndarray]:
    if isinstance(keep, Mapping):
        wanted: dict[str, Any] = {}
        for name, number in keep.items():
            found = [name] if name in rules else [n for n, r in rules.items() if r.layer == name]
            if not found:
                raise ValueError(
                    f"`keep` must name groups that can be cut, got {name!r}; there are "
                    f"{', '.join(map(repr, rules)) or 'none'}.{_HINT}"
                )
            wanted |= dict.fromkeys(found, number)
    else:
        wanted = dict.fromkeys(rules, keep)
    for name, number in wanted.items():
        _positive(f"keep[{name!r}]" if isinstance(keep, Mapping) else "keep", number)
    return {n: rules[n].lowest(max(rules[n].size - k, 0)) for n, k in wanted.items()}


def _per_group(rules: dict[str, _Rule]) -> Callable[[float], dict[str, np.ndarray]]:
    return lambda s: {n: r.lowest(round(s * r.size)) for n, r in rules.items()}


def _global(rules: dict[str, _Rule]) -> Callable[[int], dict[str, np.ndarray]]:
    """The lowest of all groups together; of equal ones the later group's, the higher index."""
    if not rules:
        return lambda count: {}
    scores = np.concatenate([r.scores for r in rules.values()])
    group = np.repeat(np.arange(len(rules)), [r.size for r in rules.values()])
    order = np.lexsort((-np.arange(len(scores)), scores))

    def take(count: int) -> dict[str, np.ndarray]:
        gone = np.bincount(group[order[:count]], minlength=len(rules))
        return {n: r.lowest(int(k)) for (n, r), k in zip(rules.items(), gone, strict=True)}

    return take


def _within(
    groups: Groups, rules: dict[str, _Rule], scope: str, kind: str, budget: Any
) -> dict[str, np.ndarray]:
    """The least removal within a budget, by bisection: more removed never costs more."""
    full = getattr(groups, kind)
    cost = groups.flops_without if kind == "flops" else groups.params_without
    limit = _budget(kind, budget, full)
    total = sum(r.size for r in rules.values())
    if scope == "per_group":
        # All fractions at which the count of some group changes.
        steps = sorted({(k + 0.5) / r.size for r in rules.values() for k in range(r.size)})
        amounts: list[Any] = [0.0, *(min(np.nextafter(s, 2), 1.0) for s in steps)]
        take: Callable[[Any], dict[str, np.ndarray]] = _per_group(rules)
    else:
        amounts, take = list(range(total + 1)), _global(rules)
    low, high = 0, len(amounts) - 1

    def price(place: int) -> int:
        return cost(groups.removed(take(amounts[place])))

    if price(high) > limit:
        raise ValueError(
            f"`{kind}` must leave room for what cannot be removed, got {budget}: no less than "
            f"{price(high):,} of {full:,} ({price(high) / max(full, 1):.1%}) can be reached.{_HINT}"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if price(middle) <= limit else (middle + 1, high)
    return take(amounts[low])


def _budget(kind: str, budget: Any, full: int) -> float:
    if _leaves.is_int(budget):
        _positive(kind, budget)
        return float(budget)
    _checks.real_number(kind, budget)
    if not 0 < float(budget) <= 1:
        raise ValueError(f"`{kind}` must be a fraction in (0, 1] or a whole number, got {budget}.")
    return float(budget) * full


def _by_group(scores: Any, groups: Groups) -> bool:
    """Whether scores are those of units, by name, and not a tree of entries."""
    if not isinstance(scores, Mapping) or not any(name in groups for name in scores):
        return False
    rows = list(scores.values())
    if any(np.ndim(row) != 1 or _leaves.dtype_of(row) == np.dtype(bool) for row in rows):
        return False
    unknown = [name for name in scores if name not in groups]
    if unknown:
        raise ValueError(
            f"`scores` must name groups, got {unknown[0]!r}; there are "
            f"{', '.join(map(repr, groups))}."
        )
    return True


def _unit_scores(scores: Any, names: list[str], groups: Groups) -> dict[str, np.ndarray]:
    rows = {}
    for name in names:
        row = np.asarray(scores[name], np.float64)
        if row.shape != (groups[name].size,):
            raise ValueError(
                f"`scores` must have one number a unit: {name!r} has {groups[name].size} units, "
                f"got shape {row.shape}."
            )
        if np.isnan(row).any():
            raise ValueError(f"`scores` must not be NaN: {int(np.isnan(row).sum())} of {name!r}.")
        rows[name] = row
    return rows


def _layer(group: Group) -> str:
    """The layer that owns a group: `conv2` of `conv2.kernel`."""
    return group.members[0].path.rpartition(".")[0]


def _matches(group: Group, only: str | Sequence[str]) -> bool:
    # Names have brackets, which are no choices here.
    patterns = [p.replace("[", "[[]") for p in ([only] if isinstance(only, str) else only)]
    names = (group.name, _layer(group))
    return any(fnmatch.fnmatchcase(name, p) for name in names for p in patterns)


def _not_exact(group: Group) -> str:
    return f"not exact, and approximate=False: {group.why[0]}"


def _check_groups(groups: Any) -> None:
    if not isinstance(groups, Groups):
        raise TypeError(
            f"`groups` must be what dependency.trace returned, got {_leaves.brief(groups)}."
        )


def _positive(name: str, value: Any) -> None:
    if not _leaves.is_int(value) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {_leaves.brief(value)}.")
