"""SET and RigL: as many entries grow as are dropped."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import (
    _checks,
    _leaves,
    _masked,
    _scores,
    _topk,
    _tree,
    criteria,
    filters,
    granularities,
    masking,
)
from sparsejax._typing import Filter, Masks, Params, Scalar, ScalarOrSchedule
from sparsejax.allocation import Allocation, erdos_renyi_kernel
from sparsejax.dynamic import _refreshing, _states
from sparsejax.dynamic._states import SparseState


def set_(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    sparsity: Scalar,
    drop_fraction: ScalarOrSchedule,
    *,
    key: jax.Array,
    every: int = 100,
    allocation: Allocation = erdos_renyi_kernel,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
) -> optax.GradientTransformationExtraArgs:
    """SET: sparse from the first step; drops the smallest weights, grows random ones; outermost.

    As `rigl`, with growth at random.

    Args:
      optimizer: any optax optimizer; see `rigl` for what is reset, and for the exceptions.
      sparsity: of all prunable entries together, in [0, 1); always exact.
      drop_fraction: the fraction of a layer's active entries to exchange at a refresh, in [0, 1), a
        number or a schedule.
      key: a PRNG key, for the first masks and for what grows.
      every: steps between two refreshes.
      allocation: how many entries each layer keeps, all the time.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.

    Returns:
      A transform with state `SparseState`.

    Raises:
      TypeError, ValueError: as in `rigl`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparsejax import dynamic
      >>> tx = dynamic.set_(optax.sgd(0.1), 0.5, 0.25, key=jax.random.key(0), every=1)
      >>> params = {"w": jnp.ones((4, 4))}
      >>> updates, state = tx.update({"w": jnp.zeros((4, 4))}, tx.init(params), params)
      >>> int(dynamic.masks(state)["w"].sum())
      8

    References:
      D. Mocanu et al., *Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science*, Nature Communications 9 (2018),
      https://doi.org/10.1038/s41467-018-04316-3. There grown weights get random values, and the
      smallest positive and the largest negative weights go; here they grow from zero, as in RigL's
      comparison, and the smallest magnitudes go.
    """

    def growth(step: Any, params: Params, grads: Params, chosen: list[bool]) -> _tree.Flat:
        del grads
        draw = criteria.random(jax.random.fold_in(key, step + 1))  # init has taken 0
        return _scores.from_criterion(draw, params, None, chosen)

    return _regrowing(
        "set_",
        optimizer,
        sparsity,
        drop_fraction,
        key,
        growth,
        every=every,
        allocate=allocation,
        stacked=stacked,
        prunable=prunable,
    )


def rigl(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    sparsity: Scalar,
    drop_fraction: ScalarOrSchedule,
    *,
    key: jax.Array,
    every: int = 100,
    allocation: Allocation = erdos_renyi_kernel,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
) -> optax.GradientTransformationExtraArgs:
    """RigL: sparse from the first step; drops small weights, grows large gradients; outermost.

    `init` draws random masks, whose number of active entries never changes, in any layer: start
    from `sj.apply_masks(params, dynamic.masks(state))`. At a refresh, in each layer with n active
    entries, the `round(drop_fraction * n)` smallest magnitudes go, and as many entries with the
    largest |gradient| come, of all that are not active then (what has just gone may stay). They
    start from zero and with the state of a fresh optimizer. NaN gradients come last.

    Args:
      optimizer: any optax optimizer. What it remembers of an entry is reset when that grows, found
        by `optax.tree.map_params`; this leaves out what has not the parameter's shape (in
        `adafactor`, `galore`, `novograd`, under `optax.flatten`), and all of `sm3` and `lbfgs`, on
        which that function fails. Not `optax.contrib.acprop`, which divides by the second moment
        that is reset.
      sparsity: of all prunable entries together, in [0, 1); always exact.
      drop_fraction: in [0, 1), a number or a schedule such as
        `schedules.cosine(0.3, 0.0, 100, 3 * steps // 4)`. Masks are refreshed from its begin to its
        end; on and on where it ends above 0.
      key: a PRNG key, for the first masks; under `vmap` all members have the same.
      every: steps between two refreshes.
      allocation: how many entries each layer keeps, all the time.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.

    Returns:
      A transform with state `SparseState`. Its `update` takes `criterion_grads`, as in `gradual`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range; in `update`, if
        `params` is missing or gradients do not match.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparsejax import dynamic, schedules
      >>> drop = schedules.cosine(0.5, 0.0, begin_step=0, end_step=10)
      >>> tx = dynamic.rigl(optax.sgd(0.1), 0.5, drop, key=jax.random.key(0), every=5)
      >>> state = tx.init({"w": jnp.ones((1, 4))})
      >>> start = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> dynamic.masks(state)["w"]
      Array([[False,  True, False,  True]], dtype=bool)
      >>> _, state = tx.update({"w": jnp.array([[0.0, 1.0, 2.0, 0.0]])}, state, start)
      >>> dynamic.masks(state)["w"]  # 2 is the smaller of 2 and 4
      Array([[False, False,  True,  True]], dtype=bool)

    References:
      U. Evci et al., *Rigging the lottery: making all tickets winners*, ICML 2020,
      https://arxiv.org/abs/1911.11134. There a refresh takes the place of a step; here the step
      follows it with the same gradients, so that what grew moves at once.
    """

    def growth(step: Any, params: Params, grads: Params, chosen: list[bool]) -> _tree.Flat:
        del step
        return _scores.from_criterion(criteria.gradient, params, grads, chosen)

    return _regrowing(
        "rigl",
        optimizer,
        sparsity,
        drop_fraction,
        key,
        growth,
        every=every,
        allocate=allocation,
        stacked=stacked,
        prunable=prunable,
    )


def _regrowing(
    transform: str,
    optimizer: Any,
    sparsity: Any,
    drop_fraction: ScalarOrSchedule,
    key: jax.Array,
    growth: Callable[[Any, Params, Params, list[bool]], _tree.Flat],
    *,
    every: int,
    allocate: Allocation,
    stacked: Filter | None,
    prunable: Filter,
) -> optax.GradientTransformationExtraArgs:
    inner = _checks.optimizer("optimizer", optimizer)
    amount = _topk.Amount(sparsity, None)
    _topk.check(amount, None, allocate, granularities.Unstructured())
    _checks.key("key", key)
    _refreshing.check_filters(stacked=stacked, prunable=prunable)
    refreshes = _refreshing.of_schedule("drop_fraction", drop_fraction, every)
    if refreshes.steps.size:
        late = refreshes.steps >= getattr(drop_fraction, "begin_step", 0)
        refreshes = dataclasses.replace(
            refreshes, steps=refreshes.steps[late], values=refreshes.values[late]
        )
    if refreshes.steps.size and refreshes.values[-1] > 0:
        refreshes = dataclasses.replace(refreshes, onward=True)

    def leaves_of(scores: _tree.Flat, chosen: list[bool]) -> list[_topk.Scored]:
        return _topk.scored_leaves(scores, chosen, stacked)

    def active_counts(leaves: list[_topk.Scored]) -> list[list[int]]:
        return _topk.allocated(leaves, [leaf.scores for leaf in leaves], amount, allocate)

    def best(leaves: list[_topk.Scored], counts: list[list[Any]]) -> list[jax.Array]:
        return _topk.keep_some_each(leaves, [leaf.scores for leaf in leaves], counts)

    def init_fn(params: Params) -> SparseState:
        chosen = filters.selected(prunable, params)
        draw = criteria.random(jax.random.fold_in(key, 0))
        scores = _scores.from_criterion(draw, params, None, chosen)
        leaves = leaves_of(scores, chosen)
        masks = _scores.spread(scores, chosen, best(leaves, active_counts(leaves)))
        return _states.sparse_state(masks, inner.init(masking.apply_masks(params, masks)))

    def exchanged(state: SparseState, params: Params, grads: Params) -> Masks:
        chosen = filters.selected(prunable, params)
        weights = _scores.from_criterion(criteria.magnitude, params, None, chosen)
        grown = growth(state.step, params, grads, chosen)
        active = masking.aligned(state.masks, params)

        # Finite scores leave room above for what stays and below for what cannot be chosen.
        def among(mask: jax.Array, s: jax.Array) -> jax.Array:
            return jnp.where(mask, jnp.nan_to_num(s, nan=0.0), -1)

        def besides(mask: jax.Array, s: jax.Array) -> jax.Array:
            return jnp.where(mask, jnp.inf, jnp.nan_to_num(s, nan=-1.0))

        candidates = leaves_of(_ranked(among, active, weights, chosen), chosen)
        counts = active_counts(candidates)
        dropping = _refreshing.amount(refreshes, state.step)
        staying = best(candidates, [[dropping.kept(n, "") for n in layers] for layers in counts])
        stayed = iter(staying)
        survivors = [
            next(stayed) if yes else mask for mask, yes in zip(active, chosen, strict=True)
        ]
        found = best(leaves_of(_ranked(besides, survivors, grown, chosen), chosen), counts)
        return _refreshing.like(_scores.spread(weights, chosen, found), state.masks)

    def update_fn(
        updates: Params,
        state: SparseState,
        params: Params | None = None,
        *,
        criterion_grads: Params | None = None,
        **extra: Any,
    ) -> tuple[Params, SparseState]:
        _states.check_update(transform, state, SparseState, updates, params)
        grads = updates if criterion_grads is None else criterion_grads

        def refreshed() -> tuple[Masks, Any]:
            masked = masking.apply_masks(params, state.masks)
            masks = exchanged(state, masked, grads)
            grown = jax.tree.map(lambda new, old: new & ~old, masks, state.masks)
            alike = _refreshing.like(masked, state.masks)  # as `init` has seen them
            return masks, _forget(inner, state.inner, alike, grown)

        (masks, inner_state), leaked = _refreshing.refreshed(
            refreshes, state, params, refreshed, lambda: (state.masks, state.inner)
        )
        steps, inner_state = _masked.step(inner, updates, inner_state, params, masks, extra)
        return steps, SparseState(optax.safe_increment(state.step), masks, leaked, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _ranked(
    f: Callable[..., jax.Array], masks: list[Any], scores: _tree.Flat, chosen: list[bool]
) -> _tree.Flat:
    """The scores of the chosen leaves, changed by their masks."""
    rows = zip(masks, scores.leaves, chosen, strict=True)
    return scores._replace(leaves=[f(mask, s) if yes else s for mask, s, yes in rows])


def _forget(
    inner: optax.GradientTransformationExtraArgs, state: Any, params: Params, entries: Masks
) -> Any:
    """The inner state, fresh where `entries` is True, in all that has the parameter's shape."""

    def mark(leaf: Any, entry: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return entry if entry.ndim and entry.shape == _leaves.shape_of(leaf) else False

    try:
        marks = optax.tree.map_params(
            inner,
            mark,
            state,
            entries,
            transform_non_params=lambda leaf: False,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    except (IndexError, ValueError):
        return state  # optax cannot tell what of its state belongs to which parameter
    fresh = inner.init(params)
    return jax.tree.map(
        lambda mark, old, new: old if mark is False else jnp.where(mark, new, old),
        marks,
        state,
        fresh,
    )
