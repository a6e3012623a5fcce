"""Gradual pruning: masks that follow a criterion and a schedule."""

from typing import Any, Literal

import optax

from sparsejax import _checks, _masked, _scores, criteria, filters, masking
from sparsejax._typing import Criterion, Filter, Masks, Params, ScalarOrSchedule
from sparsejax.allocation import Allocation
from sparsejax.dynamic import _refreshing, _states
from sparsejax.dynamic._states import SparseState
from sparsejax.granularities import Granularity, Unstructured

_UNSTRUCTURED = Unstructured()


def gradual(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    schedule: ScalarOrSchedule,
    *,
    criterion: Criterion = criteria.magnitude,
    every: int = 100,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity = _UNSTRUCTURED,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
) -> optax.GradientTransformationExtraArgs:
    """Gradual pruning: more and more entries are pruned while the others train; outermost.

    Every `every` steps from the schedule's begin, at its jumps and at its end, the masks become
    those of the entries that score highest: `masking.topk(criterion(params, grads), sparsity)` of
    the params before that step, and the step obeys them. By magnitude a pruned entry stays pruned
    while the sparsity grows (its score is 0); by criteria that look at gradients it may come back.
    Where the schedule falls (`schedules.cyclical`) entries come back and start from zero.

    Pass `criterion_grads` to `update` for scores from other gradients than the step's, such as the
    mean over several batches (`criteria.mean_gradients`); `schedules.refreshes(schedule,
    every).now(step)` says when they are needed.

    Args:
      optimizer: any optax optimizer.
      schedule: step -> sparsity, such as `schedules.cubic(0.0, 0.9, 1000, 8000)`, or a number: all
        at once, in the first step. Steps are updates done. A plain function, as those of optax, has
        no end: masks are refreshed on and on, and counts follow its float32 value.
      criterion: `(params, grads) -> scores`; it sees params that obey the masks, and the gradients
        at pruned entries, too.
      every: steps between two refreshes.
      scope: how entries compete, as in `masking.topk`.
      allocation: shares what is kept out to the leaves; the schedule must have an end.
      granularity: what goes as one; not `NM`, which fixes its own sparsity.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.

    Returns:
      A transform with state `SparseState`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind, out of range, or excluded by
        another; in `update`, if `params` is missing or gradients do not match.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import dynamic, schedules
      >>> schedule = schedules.linear(0.0, 0.75, begin_step=0, end_step=3)
      >>> tx = dynamic.gradual(optax.sgd(0.5), schedule, every=1)
      >>> params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update({"w": jnp.zeros((1, 4))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"])
      [[1. 2. 3. 4.]]
      [[0. 2. 3. 4.]]
      [[0. 0. 3. 4.]]
      [[0. 0. 0. 4.]]

    References:
      M. Zhu and S. Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model
      compression*, ICLR 2018 workshop, https://arxiv.org/abs/1710.01878. There pruned values are
      remembered, and masks follow the step; here they are zero, and masks precede it.
    """
    inner = _checks.optimizer("optimizer", optimizer)
    _scores.check_criterion(criterion)
    _refreshing.check_scheduled(granularity)
    choice = _refreshing.choice(
        "gradual",
        schedule,
        every,
        scope=scope,
        allocation=allocation,
        granularity=granularity,
        stacked=stacked,
        prunable=prunable,
    )

    def init_fn(params: Params) -> SparseState:
        masks = choice.everything(params)
        return _states.sparse_state(masks, inner.init(params))

    def update_fn(
        updates: Params,
        state: SparseState,
        params: Params | None = None,
        *,
        criterion_grads: Params | None = None,
        **extra: Any,
    ) -> tuple[Params, SparseState]:
        _states.check_update("gradual", state, SparseState, updates, params)
        grads = updates if criterion_grads is None else criterion_grads

        def refreshed() -> Masks:
            chosen = filters.selected(prunable, params)
            masked = masking.apply_masks(params, state.masks)
            scores = _scores.from_criterion(criterion, masked, grads, chosen)
            return _refreshing.like(choice.masks(scores, chosen, state.step), state.masks)

        masks, leaked = _refreshing.refreshed(
            choice.refreshes, state, params, refreshed, lambda: state.masks
        )
        steps, inner_state = _masked.step(inner, updates, state.inner, params, masks, extra)
        return steps, SparseState(optax.safe_increment(state.step), masks, leaked, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
