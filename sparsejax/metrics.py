"""Metrics of optimizers: how far each entry moves for its gradient, in units of the learning rate.

A proximal step must shrink an entry by the step size that the optimizer gives to its gradient, or
it solves another problem. That is the learning rate for plain SGD, 1/(1 - μ) times as much in the
long run with momentum μ, and 1/(√ν + ε) times as much, entry by entry, with Adam and its kin.
Neither μ nor ε is in optax's states, so that the metric is named: `proximal(optax.adam(1e-3),
penalty, 1e-3, metric=metrics.adam())`.

Entries that never had a gradient have no metric yet: where their second moment is 0 the factor is
0, and the penalty leaves them alone (embeddings of words not seen so far, weights of dead inputs).
`penalized` moves them, too.

A metric is any function `(state, params) -> factor`, of the optimizer's state after its update:
one number >= 0, or a tree like the params of arrays that broadcast.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from sparsejax import _checks, _leaves
from sparsejax._typing import Params

Metric: TypeAlias = Callable[[Any, Params], Any]
"""`(state of the optimizer after its update, params) -> factor on the learning rate`."""


def momentum(decay: float) -> Metric:
    """Of `optax.sgd(lr, momentum=decay)`, with Nesterov's or not: 1 / (1 - μ).

    A constant gradient moves an entry by lr / (1 - μ) a step in the end.

    Args:
      decay: μ in [0, 1).

    Returns:
      A metric.

    Raises:
      TypeError, ValueError: if `decay` is not in [0, 1).

    Example:
      >>> from sparsejax import metrics
      >>> metrics.momentum(0.75)(None, None)
      4.0
    """
    factor = 1 / (1 - _checks.known_fraction("decay", decay))
    return lambda state, params: factor


def adam(*, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0) -> Metric:
    """Of `optax.adam` and `optax.adamw`: 1 / (√(ν̂ + ε_root) + ε), ν̂ the corrected second moment.

    AdamW's decoupled decay is no part of the metric.

    Args:
      b2: the optimizer's decay of the second moment, in [0, 1).
      eps: its ε >= 0.
      eps_root: its ε under the root.

    Returns:
      A metric. It raises `ValueError` where the state is not that of one Adam.

    Raises:
      TypeError, ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> tx = sj.proximal(
      ...     optax.adam(0.5), sj.penalties.l1(1.0), 0.5, metric=sj.metrics.adam()
      ... )
      >>> w = jnp.array([[2.0, 0.5]])
      >>> updates, _ = tx.update(jnp.array([[4.0, 0.5]]), tx.init(w), w)
      >>> w = optax.apply_updates(w, updates)  # steps of 0.5, shrunk by 0.5·1/4; by 0.5·1/0.5
      >>> jnp.round(w, 4)
      Array([[1.375, 0.   ]], dtype=float32)
    """
    b2 = _checks.known_fraction("b2", b2)
    _checks.non_negative("eps", eps)
    _checks.non_negative("eps_root", eps_root)

    def metric(state: Any, params: Params) -> Any:
        del params
        moments = _only(state, optax.ScaleByAdamState, "adam")

        def factor(nu: jax.Array) -> jax.Array:
            corrected = _leaves.wide(nu) / (1 - b2 ** moments.count.astype(jnp.float32))
            return jnp.where(nu > 0, 1 / (jnp.sqrt(corrected + eps_root) + eps), 0)

        return jax.tree.map(factor, moments.nu)

    return metric


def rmsprop(*, eps: float = 1e-8, eps_in_sqrt: bool = True, momentum: float = 0.0) -> Metric:
    """Of `optax.rmsprop`, not centered, without bias correction: 1 / √(ν + ε), or 1 / (√ν + ε).

    Args:
      eps: the optimizer's ε >= 0.
      eps_in_sqrt: whether ε stands under the root, as by default in optax.
      momentum: its momentum in [0, 1), if it has one; at a constant learning rate only, since optax
        remembers steps, not gradients: with a decaying rate use `transforms.penalized`.

    Returns:
      A metric. It raises `ValueError` where the state is not that of one RMSProp.

    Raises:
      TypeError, ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import metrics
      >>> tx, w = optax.rmsprop(0.1, decay=0.75), jnp.zeros(1)
      >>> _, state = tx.update(jnp.array([4.0]), tx.init(w), w)
      >>> metrics.rmsprop()(state, w)  # ν = 0.25 · 4²
      Array([0.5], dtype=float32)
    """
    _checks.non_negative("eps", eps)
    lasting = 1 / (1 - _checks.known_fraction("momentum", momentum))

    def factor(nu: jax.Array) -> jax.Array:
        nu = _leaves.wide(nu)
        scale = jnp.sqrt(nu + eps) if eps_in_sqrt else jnp.sqrt(nu) + eps
        return jnp.where(nu > 0, lasting / scale, 0)

    def metric(state: Any, params: Params) -> Any:
        del params
        return jax.tree.map(factor, _only(state, optax.ScaleByRmsState, "rmsprop").nu)

    return metric


def adagrad(*, eps: float = 1e-7) -> Metric:
    """Of `optax.adagrad`: 1 / √(Σg² + ε).

    Args:
      eps: the optimizer's ε >= 0.

    Returns:
      A metric. It raises `ValueError` where the state is not that of one Adagrad.

    Raises:
      TypeError, ValueError: if `eps` is out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import metrics
      >>> tx, w = optax.adagrad(0.1, initial_accumulator_value=0.0), jnp.zeros(1)
      >>> _, state = tx.update(jnp.array([4.0]), tx.init(w), w)
      >>> metrics.adagrad()(state, w)
      Array([0.25], dtype=float32)
    """
    _checks.non_negative("eps", eps)

    def factor(squares: jax.Array) -> jax.Array:
        wide = _leaves.wide(squares)
        return jnp.where(wide > 0, jax.lax.rsqrt(wide + eps), 0)

    def metric(state: Any, params: Params) -> Any:
        del params
        moments = _only(state, optax.ScaleByRssState, "adagrad")
        return jax.tree.map(factor, moments.sum_of_squares)

    return metric


def _only(state: Any, kind: type, name: str) -> Any:
    """The one state of this kind in an optimizer's state."""
    nodes = jax.tree.leaves(state, is_leaf=partial(_is_a, kind))
    found = [x for x in nodes if _is_a(kind, x)]
    if len(found) != 1:
        raise ValueError(
            f"`metric` metrics.{name}() needs an optimizer with one {kind.__name__} in its state, "
            f"got {len(found)}; take the metric of your optimizer, or write one: "
            "(state, params) -> tree of factors on the learning rate. Of several optimizers, each "
            "for some leaves, wrap every one in a `proximal` of its own."
        )
    return found[0]


def _is_a(kind: type, node: Any) -> bool:
    return isinstance(node, kind)
