"""When masks change, to which, and whether the params obeyed them: what `dynamic` has in common."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from sparsejax import _checks, _leaves, _scores, _topk, _tree, filters, masking, schedules
from sparsejax._typing import Filter, Masks, Params, ScalarOrSchedule
from sparsejax.allocation import Allocation
from sparsejax.granularities import NM, Granularity

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Choice:
    """How masks follow from scores at a step; what `gradual` and its kin are asked for."""

    refreshes: schedules.Refreshes
    scope: str | None
    allocation: Allocation | None
    granularity: Granularity | NM
    stacked: Filter | None
    prunable: Filter

    def everything(self, params: Params) -> Masks:
        """Masks that keep all, of the shapes that all later ones have."""
        flat, chosen = _tree.flatten(params), filters.selected(self.prunable, params)
        rows = zip(flat.paths, flat.leaves, chosen, strict=True)
        leaves = [_topk.scored(path, leaf, self.stacked) for path, leaf, yes in rows if yes]
        masks = [_topk.everything(leaf, self.granularity) for leaf in leaves]
        return _scores.spread(flat, chosen, masks)

    def masks(self, scores: _tree.Flat, chosen: list[bool], step: Any, values: Any = None) -> Masks:
        """The masks of what scores highest, as many as the schedule says for `step`."""
        return _topk.masks(
            scores,
            chosen,
            amount(self.refreshes, step) if values is None else _topk.Amount(values, None),
            scope=self.scope,
            allocate=self.allocation,
            granularity=self.granularity,
            stacked=self.stacked,
        )


def choice(
    transform: str,
    schedule: ScalarOrSchedule | None,
    every: int,
    *,
    onward: bool = False,
    scope: Any,
    allocation: Allocation | None,
    granularity: Granularity | NM,
    stacked: Filter | None,
    prunable: Filter,
) -> Choice:
    """Checks and gathers the arguments that `gradual` and its kin share."""
    fixed = isinstance(granularity, NM)
    if fixed and schedule is not None:
        raise ValueError(
            f"`schedule` must be left out with `granularity` = {granularity}, which fixes the "
            f"sparsity by itself, got {_leaves.brief(schedule)}."
        )
    if not fixed and schedule is None:
        raise ValueError(
            "`schedule` must be given, a number or such as schedules.cubic(0.0, 0.9, 0, 1000); "
            "only granularity=NM(...) goes without."
        )
    _topk.check(_topk.Amount(None if fixed else 0.0, None), scope, allocation, granularity)
    refreshes = of_schedule("schedule", 0.0 if schedule is None else schedule, every, onward=onward)
    if allocation is not None and not refreshes.steps.size:
        raise ValueError(
            f"`allocation` needs counts that are known before tracing, and `{transform}` got a "
            f"schedule without an end, {_leaves.brief(schedule)}; give it one: "
            "schedules.cool_down(schedule, begin_step=...)."
        )
    check_filters(stacked=stacked, prunable=prunable)
    return Choice(refreshes, scope, allocation, granularity, stacked, prunable)


def check_scheduled(granularity: Any) -> None:
    """Refuses a granularity whose sparsity no schedule can change."""
    if isinstance(granularity, NM):
        raise ValueError(
            "`granularity` must have no sparsity of its own, which a schedule could not change, "
            f"got {granularity}; train with straight_through(optimizer, granularity=...), or prune "
            "once and keep_masks."
        )


def check_filters(*, stacked: Any, prunable: Any) -> None:
    """Refuses what is no filter; no leaf need be stacked."""
    for name, filter_ in (("prunable", prunable), ("stacked", stacked or filters.weights)):
        _checks.function(name, filter_, "(path, leaf) -> bool", "sparsejax.filters.weights")


def of_schedule(
    name: str, schedule: ScalarOrSchedule, every: int, *, onward: bool = False
) -> schedules.Refreshes:
    """The refreshes of a schedule, or of a number, which is constant."""
    _checks.number_or_schedule(name, schedule)
    if not callable(schedule):
        schedule = schedules.constant(_checks.known_fraction(name, schedule))
    return schedules.refreshes(schedule, every, onward=onward, name=name)


def amount(refreshes: schedules.Refreshes, step: Any) -> _topk.Amount | _topk.Listed:
    """What the schedule says for `step`, as the counts of the host where it can."""
    if refreshes.steps.size:
        return _topk.Listed(refreshes.values, refreshes.index(step))
    return _topk.Amount(refreshes.schedule(step), None)


def when(condition: Any, yes: Callable[[], T], no: Callable[[], T]) -> T:
    """`lax.cond`; where the condition can be looked at, Python's, which compiles nothing."""
    if _leaves.is_traced(condition):
        found: T = jax.lax.cond(condition, yes, no)
        return found
    return yes() if condition else no()


def like(tree: Any, other: Any) -> Any:
    """The leaves of `tree` in the structure of `other`, which has the same paths."""
    return _tree.flatten(other).rebuild(_tree.align("masks", tree, "state", other))


def refreshed(
    refreshes: schedules.Refreshes,
    state: Any,
    params: Params,
    refresh: Callable[[], T],
    keep: Callable[[], T],
) -> tuple[T, jax.Array]:
    """What `refresh` gives if masks are refreshed now, else `keep`; and the state's next `leaked`.

    That is how many pruned entries were not zero, the most of all steps that were looked at: those
    of refreshes and those after them, where whatever changes the transform's steps (an outer clip,
    EMA or decay) shows itself. One condition holds both, so that masks that only pass through are
    not copied.
    """
    now = refreshes.now(state.step)
    later = state.step > 0
    after = later & refreshes.now(state.step - 1)

    def look() -> tuple[T, jax.Array]:
        found = jnp.maximum(state.leaked, sum(disobedient(params, state.masks)))
        return when(now, refresh, keep), jnp.where(later, found, state.leaked)

    return when(now | after, look, lambda: (keep(), jnp.asarray(state.leaked)))


def disobedient(params: Params, masks: Masks) -> list[Any]:
    """How many pruned entries are not zero, leaf by leaf; NaN is not."""
    rows = zip(jax.tree.leaves(params), masking.aligned(masks, params), strict=True)
    return [
        jnp.sum(~jnp.asarray(mask) & (jnp.asarray(leaf) != 0), dtype=jnp.int32)
        if _leaves.is_inexact(leaf)
        else 0
        for leaf, mask in rows
    ]
