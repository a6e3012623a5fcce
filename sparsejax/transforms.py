"""Penalties and fixed masks as optax transforms.

Two places in an optimizer, and they are not interchangeable:

* *before* plain SGD, in a chain: `optax.chain(l1_prox(lam), optax.sgd(2**-3))`; sees gradients,
  emits what makes SGD land on the proximal point;
* *outermost*, around a whole optimizer: `penalized(optax.adam(1e-3), penalties.l1(lam))`,
  `proximal(...)`, `keep_masks(...)`; sees the final step, so that zeros are exact after
  `optax.apply_updates`, whatever is inside.

Every `update` needs the current params.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import _checks, _leaves, _masked, _tree, filters, masking, metrics, penalties
from sparsejax._step_size import GOOD_FIT, ProxState, foretell, probe, unmeasured
from sparsejax._typing import (
    Filter,
    Masks,
    Params,
    Penalty,
    ScalarOrSchedule,
    SlopedPenalty,
    Strength,
)


class PenaltyState(NamedTuple):
    """State of `penalized` and `proximal`.

    `step`: updates done. `inner`: the inner optimizer's state. `mean_grads`: the running mean of
    gradients, float32; `None` without `gradient_decay`.
    """

    step: jax.Array
    inner: Any
    mean_grads: Any = None


class KeepMasksState(NamedTuple):
    """State of `keep_masks`: the masks, for checkpoints to carry, and the inner state."""

    masks: Masks
    inner: Any


def prox(
    penalty: Penalty, learning_rate: ScalarOrSchedule | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes SGD behind it land on the proximal point: `optax.chain(prox(penalty), sgd(2**-3))`.

    With gradient g and step size s it emits `(w - prox_s(w - s·g)) / s`, which SGD turns into w ←
    prox_s(w - s·g): the proximal gradient method (ISTA). Cost: one pass over params and gradients.

    Without `learning_rate` it measures s: the state keeps a few hundred entries of the last params
    and of what it emitted; the least-squares fit of the movement on the emission was the last step
    size, and a straight line through the last two foretells the next. The first step, and every
    step where the fit is poor (momentum, Adam: the movement is no multiple of the emission), emits
    the subgradient of least norm: right, but without zeros. Look at `state.fit`; for other
    optimizers use `penalized`. Half-precision params move too coarsely to be measured: give
    `learning_rate` or use `penalized`.

    When are zeros exact? Where s is a power of two, at once: then (w/s)·s is w. With any other s,
    under `jit`, the step ends within rounding of zero (6e-8 of w): XLA contracts SGD's product and
    the addition of the update into one rounding, and no emission can cancel that. Each further step
    shrinks the remainder as much, to exactly zero in about five (float64: twenty), if no gradient
    pulls the entry out meanwhile. So full gradients end at exact zeros with any s; with minibatch
    noise take a learning rate such as 2**-3 or 2**-7, or `proximal` or `penalized`, exact with any.

    One learning rate for all leaves is assumed: with two, through `optax.partition`, `fit` is poor.

    Args:
      penalty: such as `penalties.l1(strength)`.
      learning_rate: SGD's, a number > 0 or its schedule; `None`: measured.

    Returns:
      A transform with state `ProxState`.

    Raises:
      TypeError, ValueError: for a wrong penalty or learning rate; in `update`, if `params` is
        missing or gradients do not match.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import filters, penalties, transforms
      >>> tx = optax.chain(
      ...     transforms.prox(penalties.l1(0.5, prunable=filters.floating), 0.1), optax.sgd(0.1)
      ... )
      >>> w = jnp.array([1.0, 0.04])
      >>> updates, state = tx.update(jnp.zeros(2), tx.init(w), w)
      >>> optax.apply_updates(w, updates)  # 1 - 0.1·0.5, and |0.04| < 0.1·0.5
      Array([0.95, 0.  ], dtype=float32)

    References:
      A. Beck and M. Teboulle, *A fast iterative shrinkage-thresholding algorithm for linear inverse
      problems*, SIAM J. Imaging Sciences 2 (2009), https://doi.org/10.1137/080716542
    """
    _check_penalty(penalty)
    if learning_rate is not None:
        _checks.scalar_or_schedule("learning_rate", learning_rate, positive=True)
    elif not isinstance(penalty, SlopedPenalty):
        raise TypeError(
            "`learning_rate` must be given for a penalty without slope, which has no gradient to "
            f"emit until the rate is measured: got None for {_leaves.brief(penalty)}."
        )

    def init_fn(params: Params) -> ProxState:
        _check_fits(penalty, params)
        return unmeasured(params, probed=learning_rate is None)

    def update_fn(
        updates: Params, state: ProxState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, ProxState]:
        del extra
        _checks.params_given("prox", params)
        now: Any = penalty.at(state.step)
        if learning_rate is None:
            size, measured, fit = foretell(state, params)
        else:
            size = measured = jnp.asarray(_rate_at(learning_rate, state.step), state.fit.dtype)
            fit = jnp.ones_like(state.fit)
        known = (fit >= GOOD_FIT) & (size > 0)
        landing = _landing_emission(now, updates, params, jnp.where(known, size, 1))
        sloped = isinstance(now, SlopedPenalty)
        emission = _map_floating(
            lambda fallback, landing, w: jnp.where(known, landing, fallback),
            params,
            fallback=now.subgradient(updates, params) if sloped else updates,
            landing=landing,
        )
        probes = (state.params_probe, state.emission_probe)
        if learning_rate is None:
            probes = (probe(params, params), probe(emission, params))
        step = optax.safe_increment(state.step)
        return emission, ProxState(step, size, measured, fit, *probes)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def l1_prox(
    strength: Strength,
    learning_rate: ScalarOrSchedule | None = None,
    *,
    prunable: Filter = filters.weights,
) -> optax.GradientTransformationExtraArgs:
    """L1 with exact zeros before plain SGD: `optax.chain(l1_prox(lam), optax.sgd(2**-3))`.

    `prox(penalties.l1(strength, prunable=prunable), learning_rate)`; see `prox` for how it works,
    for what it does before an optimizer that is not plain SGD, and for why, with minibatches, the
    learning rate should be a power of two (others leave many entries within rounding of zero).

    Args:
      strength: λ ≥ 0 of λΣ|θ|, a number or a schedule.
      learning_rate: SGD's, a number > 0 or its schedule; `None`: measured.
      prunable: which leaves are penalized.

    Returns:
      A transform with state `ProxState`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> target = jnp.array([[2.0, 0.3]])
      >>> tx = optax.chain(sj.l1_prox(0.5), optax.sgd(0.1))
      >>> w = jnp.zeros((1, 2)) + 1
      >>> state = tx.init(w)
      >>> for _ in range(200):
      ...     updates, state = tx.update(w - target, state, w)  # the gradient of ½|w - target|²
      ...     w = optax.apply_updates(w, updates)
      >>> jnp.round(w, 4)  # soft-thresholded: 2 - 0.5, and 0.3 < 0.5
      Array([[1.5, 0. ]], dtype=float32)
      >>> round(float(state[0].learning_rate), 4)  # measured
      0.1
    """
    return prox(penalties.l1(strength, prunable=prunable), learning_rate)


def l2_prox(
    strength: Strength,
    learning_rate: ScalarOrSchedule | None = None,
    *,
    prunable: Filter = filters.weights,
) -> optax.GradientTransformationExtraArgs:
    """L2 before plain SGD, as an implicit step: shrinks, sets nothing to zero, stable at any λ.

    `prox(penalties.l2(strength, prunable=prunable), learning_rate)`; see `prox`.

    Args:
      strength: λ ≥ 0 of (λ/2)Σθ², a number or a schedule.
      learning_rate: SGD's, a number > 0 or its schedule; `None`: measured.
      prunable: which leaves are penalized.

    Returns:
      A transform with state `ProxState`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> tx = optax.chain(sj.l2_prox(1.0, 0.5), optax.sgd(0.5))
      >>> w = jnp.full((1, 2), 3.0)
      >>> updates, _ = tx.update(jnp.zeros((1, 2)), tx.init(w), w)
      >>> optax.apply_updates(w, updates)  # 3 / (1 + 0.5·1)
      Array([[2., 2.]], dtype=float32)
    """
    return prox(penalties.l2(strength, prunable=prunable), learning_rate)


def elastic_net_prox(
    l1_strength: Strength,
    l2_strength: Strength,
    learning_rate: ScalarOrSchedule | None = None,
    *,
    prunable: Filter = filters.weights,
) -> optax.GradientTransformationExtraArgs:
    """L1 and L2 together before plain SGD, with exact zeros.

    `prox(penalties.elastic_net(l1_strength, l2_strength, prunable=prunable), learning_rate)`; see
    `prox`.

    Args:
      l1_strength: λ₁ ≥ 0 of λ₁Σ|θ|, a number or a schedule.
      l2_strength: λ₂ ≥ 0 of (λ₂/2)Σθ², likewise.
      learning_rate: SGD's, a number > 0 or its schedule; `None`: measured.
      prunable: which leaves are penalized.

    Returns:
      A transform with state `ProxState`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> tx = optax.chain(sj.elastic_net_prox(1.0, 1.0, 0.5), optax.sgd(0.5))
      >>> w = jnp.array([[3.5, -0.25]])
      >>> updates, _ = tx.update(jnp.zeros((1, 2)), tx.init(w), w)
      >>> optax.apply_updates(w, updates)  # (3.5 - 0.5) / 1.5, and |-0.25| < 0.5
      Array([[2., 0.]], dtype=float32)
    """
    penalty = penalties.elastic_net(l1_strength, l2_strength, prunable=prunable)
    return prox(penalty, learning_rate)


def penalized(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    penalty: SlopedPenalty,
    *,
    gradient_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Minimizes loss + penalty with *any* optax optimizer, zeros exact; outermost.

    The inner optimizer sees the subgradient of least norm of the penalized loss; a step that would
    cross zero stops there, and an entry at zero moves only against its subgradient (the
    orthant-wise rule; for groups the half-space rule). Where the inner optimizer rests, that
    subgradient is zero: its fixed points are those of the penalized problem, with neither learning
    rate nor metric. Line searches are the exception: `optax.lbfgs` searches along a line that the
    stops at zero leave, and may rest elsewhere (on a logistic regression 1 % above the minimum).
    Zeros are those of the params that are trained: `optax.contrib.schedule_free` evaluates others.
    Gradient accumulation belongs outside (`optax.MultiSteps(penalized(...), k)`), or each part's
    subgradient at zero would be summed.

    Minibatches: an entry leaves zero whenever the gradient of one batch there exceeds λ, so that at
    any time many entries are in flight that belong at zero. `gradient_decay=0.99` lets entries at
    zero see the running mean of gradients instead. On a lasso with batches of 32 and 19 true
    nonzeros of 100, SGD, momentum and Adam then end with 20 to 21 instead of 84 to 91, and are as
    close to the solution.

    Decoupled weight decay adds its own pull: with plain SGD that of an L2 penalty of the same
    strength. Behind Adam's normalized steps it hardly moves the solution.

    The inner optimizer also gets `value`, `grad` and `value_fn`, where they are passed, of the
    penalized loss (so do not feed `lbfgs` from `optax.value_and_grad_from_state`, which would add
    the penalty twice).

    Args:
      optimizer: any optax optimizer: with momentum, Adam, Lion, clipping ...
      penalty: one with a slope at zero, such as `penalties.l1(strength)` or
        `penalties.group_lasso(strength)`; schedules count calls of `update`.
      gradient_decay: in [0, 1): how much of the mean gradient each update keeps, for entries at
        zero; costs one float32 copy of the params in the state. 0: the gradient of the update
        decides, which is right for full gradients.

    Returns:
      A transform with state `PenaltyState`. Put it outermost, or inside `keep_masks` alone.

    Raises:
      TypeError: if an argument is of the wrong kind, or the penalty has no slope (`penalties.l0`):
        `proximal` takes it.
      ValueError: if `gradient_decay` is not in [0, 1); in `update`, if `params` is missing or
        gradients do not match.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> tx = sj.penalized(optax.adam(0.01), sj.penalties.l1(0.5))
      >>> target, w = jnp.array([[2.0, 0.3]]), jnp.ones((1, 2))
      >>> state = tx.init(w)
      >>> for _ in range(1000):
      ...     updates, state = tx.update(w - target, state, w)  # the gradient of ½|w - target|²
      ...     w = optax.apply_updates(w, updates)
      >>> jnp.round(w, 4)
      Array([[1.5, 0. ]], dtype=float32)

    References:
      G. Andrew and J. Gao, *Scalable training of L1-regularized log-linear models*, ICML 2007,
      https://doi.org/10.1145/1273496.1273501. There the method is L-BFGS's own; here the rule wraps
      any optimizer, the step is not projected onto the subgradient's orthant where both are
      nonzero, and there is no line search. The mean of gradients that decides about zeros: L. Xiao,
      *Dual averaging methods for regularized stochastic learning*, JMLR 11 (2010),
      https://jmlr.org/papers/v11/xiao10a.html; there it decides about all entries.
    """
    inner = _checks.optimizer("optimizer", optimizer)
    _check_penalty(penalty)
    if not isinstance(penalty, SlopedPenalty):
        raise TypeError(
            "`penalty` must have a slope at zero for `penalized`, got "
            f"{_leaves.brief(penalty)}; use proximal(optimizer, penalty, learning_rate)."
        )
    decay = _checks.known_fraction("gradient_decay", gradient_decay)

    def init_fn(params: Params) -> PenaltyState:
        _check_fits(penalty, params)
        mean = _zero_means(params) if decay else None
        return PenaltyState(jnp.zeros((), jnp.int32), inner.init(params), mean)

    def update_fn(
        updates: Params, state: PenaltyState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, PenaltyState]:
        _checks.params_given("penalized", params)
        now: Any = penalty.at(state.step)
        mean, seen = state.mean_grads, updates
        if decay:
            mean, seen = _mean_at_zero(decay, state, updates, params)
        subgradient = now.subgradient(seen, params)

        def objective(f: Callable[..., Any]) -> Callable[..., Any]:
            return lambda p, *args, **kw: f(p, *args, **kw) + now.value(p)

        extra = _masked.replace(
            extra,
            value=lambda value: value + now.value(params),
            grad=lambda grad: now.subgradient(grad, params),
            value_fn=objective,
            obj_fn=objective,  # of sophia
            # of sam
            grad_fn=lambda f: lambda p, *args, **kw: now.subgradient(f(p, *args, **kw), p),
        )
        steps, inner_state = inner.update(subgradient, state.inner, params, **extra)
        stopped = now.stop_at_zero(steps, subgradient, params)
        return stopped, PenaltyState(optax.safe_increment(state.step), inner_state, mean)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def proximal(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    penalty: Penalty,
    learning_rate: ScalarOrSchedule,
    *,
    metric: metrics.Metric | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The prox step after an optimizer's step: w ← prox(w + u, learning_rate · metric); outermost.

    For SGD without momentum it is the proximal gradient method. Other optimizers move in a metric
    of their own, which the prox must share: `metrics.momentum(0.9)`, `metrics.adam()` ... Without
    it, momentum μ solves the problem with λ(1-μ), and Adam some other problem. Zeros are exact at
    once, and any penalty with a prox will do, `penalties.l0` and constraints included.

    Which of the two? `penalized` needs no metric and no learning rate, resists minibatch noise
    (`gradient_decay`) and takes any optimizer; `proximal` also takes penalties without a slope, and
    groups under a constant learning rate, where `penalized` may circle near zero. Gradient
    accumulation belongs outside (`optax.MultiSteps(proximal(...), k)`), or every mini-step shrinks.

    Args:
      optimizer: an optax optimizer, plain SGD for exactness.
      penalty: such as `penalties.l1(strength)`; schedules count calls of `update`.
      learning_rate: the optimizer's own, a number > 0 or its schedule.
      metric: the optimizer's, of `sparsejax.metrics` or your own `(state, params) -> factors on the
        learning rate`; `None`: 1, that of plain SGD.

    Returns:
      A transform with state `PenaltyState`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range; in `update`, if
        `params` is missing, or the metric is that of another optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> tx = sj.proximal(optax.sgd(0.1), sj.penalties.l1(0.5), 0.1)
      >>> w = jnp.array([[1.0, 0.04]])
      >>> updates, state = tx.update(jnp.zeros((1, 2)), tx.init(w), w)
      >>> optax.apply_updates(w, updates)
      Array([[0.95, 0.  ]], dtype=float32)

    References:
      N. Parikh and S. Boyd, *Proximal algorithms*, 2014, section 4.2,
      https://web.stanford.edu/~boyd/papers/prox_algs.html
    """
    inner = _checks.optimizer("optimizer", optimizer)
    _check_penalty(penalty)
    _checks.scalar_or_schedule("learning_rate", learning_rate, positive=True)
    if metric is not None:
        _check_metric(metric)

    def init_fn(params: Params) -> PenaltyState:
        _check_fits(penalty, params)
        return PenaltyState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(
        updates: Params, state: PenaltyState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, PenaltyState]:
        _checks.params_given("proximal", params)
        _tree.check_shapes("updates", updates, params)
        steps, inner_state = inner.update(updates, state.inner, params, **extra)
        size = _rate_at(learning_rate, state.step)
        if metric is not None:
            size = jax.tree.map(lambda factor: size * factor, metric(inner_state, params))
        moved = _map_floating(lambda u, w: _leaves.wide(w) + _leaves.wide(u), params, updates=steps)
        landed = penalty.at(state.step).prox(moved, size)

        def step(u: jax.Array, v: jax.Array, t: jax.Array, w: jax.Array) -> jax.Array:
            # Where the prox does nothing the step passes bit for bit, unpenalized leaves included.
            return jnp.where(t == v, u, t - w).astype(jnp.promote_types(u.dtype, w.dtype))

        stepped = _map_floating(step, params, updates=steps, moved=moved, landed=landed)
        return stepped, PenaltyState(optax.safe_increment(state.step), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep_masks(
    optimizer: optax.GradientTransformation | optax.MultiSteps, masks: Masks
) -> optax.GradientTransformationExtraArgs:
    """Keeps pruned entries exactly zero after every update, whatever the optimizer; outermost.

    The inner optimizer sees masked gradients and masked params, so that norms, moments and clipping
    know nothing of pruned entries (a NaN or infinite gradient there included); its step is then
    replaced by -w where the mask is False. Params may be dense: the first update zeroes them.
    `value_fn`, where it is passed, is evaluated at masked params. Masks live in the state, where
    checkpoints find them, and win over `masks` from the first update on. Cost: one read of the
    masks, fused with the step.

    *Outside* it, another wrapper may hold back or change the update that zeroes: under
    `optax.MultiSteps`, `clip` or EMA masks hold exactly only if the params already obey them (start
    from `apply_masks(params, masks)`).

    Args:
      optimizer: any optax optimizer.
      masks: masks for the params, True = kept.

    Returns:
      A transform with state `KeepMasksState`.

    Raises:
      TypeError: if `optimizer` is none, or a mask is not boolean.
      ValueError: in `init`, if masks do not fit the params (with the leaf's path), or a pruned
        entry is NaN or infinite, which no update can bring to zero (and which `init` under `jit`
        cannot see: it stays); in `update`, if `params` is missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> tx = sj.keep_masks(optax.sgd(0.5, momentum=0.9), {"w": jnp.array([True, False])})
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> updates, state = tx.update({"w": jnp.array([0.5, jnp.nan])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"]
      Array([0.75, 0.  ], dtype=float32)
    """
    inner = _checks.optimizer("optimizer", optimizer)
    flat = _tree.flatten(masks)
    for path, mask in zip(flat.paths, flat.leaves, strict=True):
        _checks.boolean(path, mask)

    def init_fn(params: Params) -> KeepMasksState:
        fitted = masking.aligned(masks, params)
        _check_prunable(params, fitted)
        # A copy: a caller who donates the state must not lose his masks.
        own = _tree.flatten(params).rebuild([jnp.array(m, copy=True) for m in fitted])
        return KeepMasksState(own, inner.init(masking.apply_masks(params, own)))

    def update_fn(
        updates: Params, state: KeepMasksState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, KeepMasksState]:
        _checks.params_given("keep_masks", params)
        _checks.state_of("keep_masks", state, KeepMasksState)
        _tree.check_shapes("updates", updates, params)

        steps, inner_state = _masked.step(inner, updates, state.inner, params, state.masks, extra)
        return steps, KeepMasksState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zero_means(params: Params) -> Params:
    """A running mean of no gradients yet; `None` where there are none to come."""
    flat = _tree.flatten(params)
    zeros = [
        jnp.zeros_like(_leaves.wide(x)) if _leaves.is_floating(x) else None for x in flat.leaves
    ]
    return flat.rebuild(zeros)


def _mean_at_zero(
    decay: float, state: PenaltyState, grads: Params, params: Params
) -> tuple[Params, Params]:
    """The new mean, and the gradients with the mean where the params are zero.

    A NaN or infinite gradient passes as it is, and leaves the mean as it was.
    """

    def average(mean: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
        g = _leaves.wide(g)
        return jnp.where(jnp.isfinite(g), decay * mean + (1 - decay) * g, mean)

    mean = _map_floating(average, params, mean_grads=state.mean_grads, updates=grads)
    share = 1 - decay ** (state.step + 1).astype(jnp.float32)

    def see(g: jax.Array, mean: jax.Array, w: jax.Array) -> jax.Array:
        averaged = (w == 0) & jnp.isfinite(g)
        return jnp.where(averaged, (mean / share).astype(g.dtype), g)

    return mean, _map_floating(see, params, updates=grads, mean_grads=mean)


def _landing_emission(penalty: Penalty, grads: Params, params: Params, size: jax.Array) -> Params:
    """(w - prox(w - s·g)) / s, and g itself, bit for bit, where the prox does nothing."""
    moved = _map_floating(
        lambda g, w: _leaves.wide(w) - size * _leaves.wide(g), params, updates=grads
    )
    landed = penalty.prox(moved, size)

    def emit(g: jax.Array, v: jax.Array, t: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.where(t == v, g, ((w - t) / size).astype(g.dtype))

    return _map_floating(emit, params, updates=grads, moved=moved, landed=landed)


def _map_floating(f: Callable[..., jax.Array], params: Params, **trees: Params) -> Params:
    """`f` over the floating leaves; others, and what has no gradient, give their first tree's."""
    name, first = next(iter(trees.items()))
    chosen = [
        _leaves.is_floating(x) and w is not None
        for x, w in zip(
            jax.tree.leaves(params), _tree.align(name, first, "params", params), strict=True
        )
    ]

    def on_arrays(*leaves: Any) -> jax.Array:
        return f(*(jnp.asarray(x) for x in leaves))

    return _tree.map_chosen(on_arrays, chosen, params, **trees)


def _check_prunable(params: Params, masks: list[Any]) -> None:
    """Refuses what no update can zero: an integer leaf, a NaN or infinite entry."""
    flat = _tree.flatten(params)
    for path, leaf, mask in zip(flat.paths, flat.leaves, masks, strict=True):
        if _leaves.is_traced(leaf, mask):
            continue
        with jax.ensure_compile_time_eval():
            pruned, moves = ~jnp.asarray(mask), _leaves.is_inexact(leaf)
            stuck = bool(jnp.any(pruned & ~jnp.isfinite(leaf) if moves else pruned))
        if stuck and not moves:
            raise TypeError(
                "`masks` must keep what is not floating, got one that prunes "
                f"{_leaves.describe(leaf)} at {path!r}, which optimizers do not move; "
                "give it a 0-d True."
            )
        if stuck:
            raise ValueError(
                f"`params` must be finite where the masks prune, got NaN or infinity at {path!r}, "
                "which no update can bring to zero; start from apply_masks(params, masks)."
            )


def _check_penalty(penalty: Any) -> None:
    if isinstance(penalty, type) or not isinstance(penalty, Penalty):
        raise TypeError(
            f"`penalty` must be a penalty such as penalties.l1(1e-4), got {_leaves.brief(penalty)}."
        )


def _check_metric(metric: Any) -> None:
    if metric in (metrics.momentum, metrics.adam, metrics.rmsprop, metrics.adagrad):
        raise TypeError(
            f"`metric` must be a function (state, params) -> factors, got metrics.{metric.__name__}"
            ", which makes one: call it first, such as metrics.adam()."
        )
    _checks.function("metric", metric, "(state, params) -> factors", "metrics.adam()")


def _check_fits(penalty: Penalty, params: Params) -> None:
    """Refuses params that the penalty does not fit, before the first update is traced."""
    jax.eval_shape(lambda: penalty.at(0).value(params))


def _rate_at(learning_rate: ScalarOrSchedule, step: jax.Array) -> Any:
    """A schedule may give 0, at the end of a decay or the start of a warm-up."""
    if not callable(learning_rate):
        return learning_rate
    rate = learning_rate(step)
    _checks.scalar_or_schedule("learning_rate", rate)
    return rate
