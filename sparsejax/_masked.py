"""One step of an optimizer that knows nothing of pruned entries."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from sparsejax import _leaves, _tree, masking
from sparsejax._typing import Masks, Params


def step(
    inner: optax.GradientTransformationExtraArgs,
    updates: Params,
    inner_state: Any,
    params: Params,
    masks: Masks,
    extra: dict[str, Any],
) -> tuple[Params, Any]:
    """The inner optimizer's step from masked gradients and params, and -w where pruned."""

    def mask(tree: Params) -> Params:
        return masking.apply_masks(tree, masks)

    masked = at_masked(masks, extra, mask)
    steps, inner_state = inner.update(mask(updates), inner_state, mask(params), **masked)
    return _zero_where_pruned(steps, params, masks), inner_state


def at_masked(
    masks: Masks, extra: dict[str, Any], mask_grads: Callable[[Params], Params]
) -> dict[str, Any]:
    """The extra arguments: functions are evaluated at masked params, gradients masked."""

    def evaluated(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda p, *args, **kw: f(masking.apply_masks(p, masks), *args, **kw)

    return replace(
        extra,
        grad=mask_grads,
        value_fn=evaluated,
        obj_fn=evaluated,  # of sophia
        grad_fn=lambda f: lambda *args, **kw: mask_grads(evaluated(f)(*args, **kw)),  # of sam
    )


def replace(extra: dict[str, Any], **changes: Callable[[Any], Any]) -> dict[str, Any]:
    """The extra arguments, changed where they are there."""
    return extra | {
        name: f(extra[name]) for name, f in changes.items() if extra.get(name) is not None
    }


def _zero_where_pruned(steps: Params, params: Params, masks: Masks) -> Params:
    """-w where the mask is False; wide enough to cancel the parameter exactly."""
    flat = _tree.flatten(params)

    def zero(u: Any, w: Any, mask: Any) -> Any:
        if not _leaves.is_inexact(w):
            return u
        w = jnp.asarray(w)
        u = jnp.zeros((), w.dtype) if u is None else jnp.asarray(u)  # no gradient, no step
        return jnp.where(mask, u, -w).astype(jnp.promote_types(u.dtype, w.dtype))

    rows = zip(
        _tree.align("updates", steps, "params", params),
        flat.leaves,
        masking.aligned(masks, params),
        strict=True,
    )
    return flat.rebuild([zero(*row) for row in rows])
