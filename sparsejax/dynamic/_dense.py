"""Dense weights in the state, masked ones in the params: straight-through and movement pruning."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import _checks, _leaves, _masked, _scores, _tree, criteria, filters, masking
from sparsejax._typing import Criterion, Filter, Masks, Params, Scalar, ScalarOrSchedule, Scores
from sparsejax.allocation import Allocation
from sparsejax.dynamic import _refreshing, _states
from sparsejax.granularities import NM, Granularity, Unstructured

_UNSTRUCTURED = Unstructured()


class StraightThroughState(NamedTuple):
    """State of `straight_through`.

    Attributes:
      step: updates done.
      masks: what the params obey.
      leaked: how many pruned entries were found not to be zero after a refresh; see `check`.
      dense: the values of prunable leaves without masks, of which those of pruned entries count; a
        0-d zero for other leaves.
      trained: which of them are updated, as masks.
      inner: the inner optimizer's state.
    """

    step: jax.Array
    masks: Masks
    leaked: jax.Array
    dense: Params
    trained: Masks
    inner: Any


class MovementState(NamedTuple):
    """State of `movement`.

    Attributes:
      step: updates done.
      masks: what the params obey.
      leaked: how many pruned entries were found not to be zero after a refresh; see `check`.
      dense: the values of prunable leaves without masks, of which those of pruned entries count; a
        0-d zero for other leaves.
      scores: the scores so far, float32; a 0-d zero for leaves that are not prunable.
      inner: the inner optimizer's state.
    """

    step: jax.Array
    masks: Masks
    leaked: jax.Array
    dense: Params
    scores: Scores
    inner: Any


def straight_through(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    schedule: ScalarOrSchedule | None = None,
    *,
    criterion: Criterion = criteria.magnitude,
    every: int = 1,
    backward_sparsity: Scalar | None = None,
    decay: Scalar = 0.0,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity | NM = _UNSTRUCTURED,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights of which the network sees the masked ones; outermost.

    The dense weights live in the state, where the inner optimizer updates them with the gradients
    at the masked ones (the straight-through estimator); the params are always the masked ones. So
    the loop needs no custom gradient, and params can be evaluated and stored as they are. After
    every `every` steps the masks become those of the highest scores of the dense weights. A pruned
    entry comes back with its dense value. What is kept is read from the params, so that they may be
    loaded after `init`, or changed between steps, and moves as the optimizer says, within one
    rounding. Cost: one copy of the prunable params in the state, written in every step.

    Args:
      optimizer: any optax optimizer; it sees the dense weights as its params.
      schedule: step -> sparsity, or a number; left out with `NM`. Masks are refreshed on and on,
        after the schedule's end, too.
      criterion: `(params, grads) -> scores`; it sees the dense weights.
      every: steps between two refreshes.
      backward_sparsity: as in Top-KAST: only the entries outside this smaller sparsity are updated,
        and what the masks keep; by default all.
      decay: adds `decay * w` to the gradients of pruned entries, as SR-STE does (2e-4 there).
      scope: how entries compete, as in `masking.topk`.
      allocation: shares what is kept out to the leaves; the schedule must have an end.
      granularity: what goes as one; `NM(2, 4)` without a schedule.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.

    Returns:
      A transform with state `StraightThroughState`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind, out of range, or excluded by
        another; in `update`, if `params` is missing or gradients do not match.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import dynamic
      >>> tx = dynamic.straight_through(optax.sgd(1.0), 0.5)
      >>> params = {"w": jnp.array([[1.0, 2.0]])}
      >>> state = tx.init(params)
      >>> for grad in (0.0, -1.5):
      ...     updates, state = tx.update({"w": jnp.array([[grad, 0.0]])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"], state.dense["w"])
      [[0. 2.]] [[1. 2.]]
      [[2.5 0. ]] [[2.5 2. ]]

    References:
      Y. Bengio et al., *Estimating or propagating gradients through stochastic neurons*, 2013,
      https://arxiv.org/abs/1308.3432; A. Zhou et al., *Learning N:M fine-grained structured sparse
      neural networks from scratch* (SR-STE), ICLR 2021, https://arxiv.org/abs/2102.04010;
      S. Jayakumar et al., *Top-KAST: Top-K always sparse training*, NeurIPS 2020,
      https://arxiv.org/abs/2106.03517 (its exploration loss is `decay`, without the factor 1/D).
    """
    inner = _checks.optimizer("optimizer", optimizer)
    _scores.check_criterion(criterion)
    _checks.non_negative("decay", decay)
    choice = _refreshing.choice(
        "straight_through",
        schedule,
        every,
        onward=True,
        scope=scope,
        allocation=allocation,
        granularity=granularity,
        stacked=stacked,
        prunable=prunable,
    )
    if backward_sparsity is not None:
        if isinstance(granularity, NM):
            raise ValueError(
                f"`backward_sparsity` must be left out with `granularity` = {granularity}, which "
                f"fixes the sparsity by itself, got {backward_sparsity}."
            )
        backward_sparsity = _checks.known_fraction("backward_sparsity", backward_sparsity)
        most = max(choice.refreshes.values, default=1.0)
        if backward_sparsity > most:
            raise ValueError(
                f"`backward_sparsity` must be at most the schedule's largest sparsity, {most}, got "
                f"{backward_sparsity}: what is trained includes what is kept."
            )

    def init_fn(params: Params) -> StraightThroughState:
        chosen = filters.selected(prunable, params)
        everything = choice.everything(params)
        trained = _everywhere(params) if backward_sparsity is None else choice.everything(params)
        dense = _own(_chosen_leaves(params, chosen))
        return StraightThroughState(
            _states.zero(), everything, _states.zero(), dense, trained, inner.init(params)
        )

    def update_fn(
        updates: Params,
        state: StraightThroughState,
        params: Params | None = None,
        *,
        criterion_grads: Params | None = None,
        **extra: Any,
    ) -> tuple[Params, StraightThroughState]:
        _states.check_update("straight_through", state, StraightThroughState, updates, params)
        chosen = filters.selected(prunable, params)
        dense = _unmasked(state, params, chosen)
        grads = _decayed(updates, dense, state.masks, chosen, decay)
        steps, inner_state = _train(inner, grads, state, dense, state.trained, extra)
        moved = _moved(dense, steps, chosen)

        def refreshed() -> tuple[Masks, Masks]:
            given = updates if criterion_grads is None else criterion_grads
            scores = _scores.from_criterion(criterion, moved, given, chosen)
            masks = _refreshing.like(choice.masks(scores, chosen, state.step), state.masks)
            if backward_sparsity is None:
                return masks, state.trained
            wider = choice.masks(scores, chosen, state.step, backward_sparsity)
            wider = _refreshing.like(wider, state.masks)
            return masks, jax.tree.map(jnp.logical_or, wider, masks)

        (masks, trained), leaked = _refreshing.refreshed(
            choice.refreshes, state, params, refreshed, lambda: (state.masks, state.trained)
        )
        landing = _landing(steps, params, moved, masks, chosen)
        return landing, StraightThroughState(
            optax.safe_increment(state.step),
            masks,
            leaked,
            _refreshing.like(_chosen_leaves(moved, chosen), state.dense),
            trained,
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def movement(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    schedule: ScalarOrSchedule,
    *,
    every: int = 1,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity = _UNSTRUCTURED,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
) -> optax.GradientTransformationExtraArgs:
    """Movement pruning: keeps what training moves away from zero, for fine-tuning; outermost.

    The score of an entry is the sum of `-grad * w` over all steps (of the gradient at the masked
    params and the entry's remembered value): it grows when a gradient step would move the entry
    away from zero. Every `every` steps the masks become those of the highest scores. Pruned entries
    keep their value, do not train, and return with it when their score is high enough. Cost: a copy
    of the prunable params, and the scores, in the state, both written in every step.

    Args:
      optimizer: any optax optimizer.
      schedule: step -> sparsity, such as `schedules.cubic(0.0, 0.9, 1000, 8000)`, or a number.
        Masks stay after the schedule's end: scores go on without it, and what came back while the
        learning rate decays would find no time to train. With a number they change on and on.
      every: steps between two refreshes.
      scope: how entries compete, as in `masking.topk`.
      allocation: shares what is kept out to the leaves; the schedule must have an end.
      granularity: what goes as one.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.

    Returns:
      A transform with state `MovementState`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind, out of range, or excluded by
        another; in `update`, if `params` is missing or gradients do not match.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import dynamic
      >>> tx = dynamic.movement(optax.sgd(0.1), 0.5)
      >>> params = {"w": jnp.array([[1.0, 2.0]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([[-1.0, 1.0]])}, state, params)
      >>> optax.apply_updates(params, updates)["w"]  # 1 grows, 2 shrinks
      Array([[1.1, 0. ]], dtype=float32)

    References:
      V. Sanh, T. Wolf and A. Rush, *Movement pruning: adaptive sparsity by fine-tuning*, NeurIPS
      2020, https://arxiv.org/abs/2005.07683, section 4. There scores have an optimizer and a
      decaying learning rate of their own; here each step counts alike until the schedule ends.
    """
    inner = _checks.optimizer("optimizer", optimizer)
    _refreshing.check_scheduled(granularity)
    choice = _refreshing.choice(
        "movement",
        schedule,
        every,
        onward=getattr(schedule, "end_step", 0) == 0,
        scope=scope,
        allocation=allocation,
        granularity=granularity,
        stacked=stacked,
        prunable=prunable,
    )

    def init_fn(params: Params) -> MovementState:
        chosen = filters.selected(prunable, params)
        dense = _own(_chosen_leaves(params, chosen))
        scores = jax.tree.map(lambda w: jnp.zeros_like(w, _leaves.wide_dtype(w.dtype)), dense)
        everything = choice.everything(params)
        return MovementState(
            _states.zero(), everything, _states.zero(), dense, scores, inner.init(params)
        )

    def update_fn(
        updates: Params, state: MovementState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, MovementState]:
        _states.check_update("movement", state, MovementState, updates, params)
        chosen = filters.selected(prunable, params)
        dense = _unmasked(state, params, chosen)
        scores = _moved_scores(state.scores, updates, dense, chosen)
        steps, inner_state = _train(inner, updates, state, dense, state.masks, extra)
        moved = _moved(dense, steps, chosen)

        def refreshed() -> Masks:
            return _refreshing.like(choice.masks(scores, chosen, state.step), state.masks)

        masks, leaked = _refreshing.refreshed(
            choice.refreshes, state, params, refreshed, lambda: state.masks
        )
        landing = _landing(steps, params, moved, masks, chosen)
        return landing, MovementState(
            optax.safe_increment(state.step),
            masks,
            leaked,
            _refreshing.like(_chosen_leaves(moved, chosen), state.dense),
            _refreshing.like(scores.rebuild(scores.leaves), state.scores),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _everywhere(params: Params) -> Masks:
    """A 0-d True for every leaf."""
    return jax.tree.map(lambda _: jnp.ones((), bool), params)


def _chosen_leaves(params: Params, chosen: list[bool]) -> Params:
    """The chosen leaves, and a 0-d zero for each of the others."""
    flat = _tree.flatten(params)
    rows = zip(flat.leaves, chosen, strict=True)
    return flat.rebuild([x if yes else jnp.zeros(()) for x, yes in rows])


def _own(dense: Params) -> Params:
    """A copy: a caller who donates params and state gives each buffer once."""
    return jax.tree.map(lambda w: jnp.array(w, copy=True), dense)


def _unmasked(state: Any, params: Params, chosen: list[bool]) -> Params:
    """The params, and what the state remembers of pruned entries."""
    flat = _tree.flatten(params)
    rows = zip(
        _tree.align("state", state.dense, "params", params),
        flat.leaves,
        masking.aligned(state.masks, params),
        chosen,
        strict=True,
    )
    return flat.rebuild([jnp.where(mask, w, d) if yes else w for d, w, mask, yes in rows])


def _decayed(grads: Params, dense: Params, masks: Masks, chosen: list[bool], decay: Any) -> Params:
    """The gradients plus decay · w at pruned entries."""
    if not _leaves.is_traced(decay) and decay == 0:
        return grads
    flat = _tree.flatten(dense)
    rows = zip(
        _tree.align("updates", grads, "params", dense),
        flat.leaves,
        masking.aligned(masks, dense),
        chosen,
        strict=True,
    )
    return flat.rebuild(
        [
            jnp.where(mask, g, g + (decay * w).astype(g.dtype)) if yes and g is not None else g
            for g, w, mask, yes in rows
        ]
    )


def _train(
    inner: optax.GradientTransformationExtraArgs,
    grads: Params,
    state: Any,
    dense: Params,
    trained: Masks,
    extra: dict[str, Any],
) -> tuple[Params, Any]:
    """The inner optimizer's steps, masked by `trained`, and its new state."""

    def mask(tree: Params) -> Params:
        return masking.apply_masks(tree, trained)

    at_masked = _masked.at_masked(state.masks, extra, mask)
    steps, inner_state = inner.update(mask(grads), state.inner, dense, **at_masked)
    return mask(steps), inner_state


def _moved(dense: Params, steps: Params, chosen: list[bool]) -> Params:
    """The dense weights after the steps."""
    flat = _tree.flatten(dense)
    rows = zip(flat.leaves, _tree.align("updates", steps, "params", dense), chosen, strict=True)
    return flat.rebuild(
        [(w + u).astype(w.dtype) if yes and u is not None else w for w, u, yes in rows]
    )


def _moved_scores(scores: Scores, grads: Params, dense: Params, chosen: list[bool]) -> _tree.Flat:
    """Each score less grad · w."""
    flat = _tree.flatten(dense)
    rows = zip(
        _tree.align("scores", scores, "params", dense),
        _tree.align("updates", grads, "params", dense),
        flat.leaves,
        chosen,
        strict=True,
    )
    return flat._replace(
        leaves=[
            s - _leaves.wide(g) * _leaves.wide(w) if yes and g is not None else s
            for s, g, w, yes in rows
        ]
    )


def _landing(
    steps: Params, params: Params, dense: Params, masks: Masks, chosen: list[bool]
) -> Params:
    """What takes the params to the masked dense values: zeros exactly, others within rounding."""
    flat = _tree.flatten(params)
    rows = zip(
        _tree.align("updates", steps, "params", params),
        flat.leaves,
        jax.tree.leaves(dense),
        masking.aligned(masks, params),
        chosen,
        strict=True,
    )
    return flat.rebuild(
        [
            jnp.where(mask, _leaves.wide(d) - _leaves.wide(w), -_leaves.wide(w)) if yes else u
            for u, w, d, mask, yes in rows
        ]
    )
