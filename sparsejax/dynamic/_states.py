"""What the transforms carry, and how to read it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Masks, Params
from sparsejax.dynamic import _refreshing


class SparseState(NamedTuple):
    """State of `gradual`, `set_` and `rigl`.

    Attributes:
      step: updates done.
      masks: what the params obey.
      leaked: how many pruned entries were found not to be zero after a refresh; see `check`.
      inner: the inner optimizer's state.
    """

    step: jax.Array
    masks: Masks
    leaked: jax.Array
    inner: Any


def sparse_state(masks: Masks, inner_state: Any) -> SparseState:
    """The state before the first step."""
    return SparseState(zero(), masks, zero(), inner_state)


def zero() -> jax.Array:
    """A count, with a buffer of its own."""
    return jnp.zeros((), jnp.int32)


def check_update(transform: str, state: Any, kind: type, updates: Any, params: Any) -> None:
    """Refuses what no `update` can work with."""
    _checks.params_given(transform, params)
    _checks.state_of(transform, state, kind)
    _tree.check_shapes("updates", updates, params)


def masks(state: Any) -> Masks:
    """The masks in an optimizer's state: those of its outermost wrapper that has some.

    Several transforms beside each other (`optax.partition`) give the masks of all; what none of
    them sees is kept: a 0-d True.

    Args:
      state: of a transform of `sparsejax.dynamic` or of `keep_masks`, alone or inside others
        (`optax.chain`, `inject_hyperparams`, `MultiSteps`), also as `nnx.Optimizer.opt_state` or
        `TrainState.opt_state` has it.

    Returns:
      Masks like the params that `init` saw.

    Raises:
      ValueError: if there are none, or several for one leaf.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import dynamic
      >>> tx = optax.chain(optax.clip(1.0), dynamic.gradual(optax.adam(1e-3), 0.5))
      >>> dynamic.masks(tx.init({"w": jnp.ones((1, 2))}))
      {'w': Array([[ True,  True]], dtype=bool)}
    """
    states = _own_states(state)
    columns = [jax.tree.flatten(own.masks, is_leaf=_is_left_out) for own in states]
    merged = []
    for row in zip(*(leaves for leaves, _ in columns), strict=True):
        found = [mask for mask in row if not _is_left_out(mask)]
        if len(found) > 1:
            raise ValueError(
                f"`state` must hold one transform with masks for each leaf, got {len(states)} that "
                "share some; pass the state of one of them."
            )
        merged.append(found[0] if found else jnp.ones((), bool))
    return jax.tree.unflatten(columns[0][1], merged)


def check(state: Any, params: Params | None = None) -> None:
    """Makes sure that the params obey the masks, and did so after the refreshes; not under `jit`.

    Wrappers *outside* may hold back or change the step that zeroes: a clip, an EMA, a decay or a
    scale of steps. The transform sees that in the params it gets after a refresh, and remembers.
    (Under an outer `optax.MultiSteps` all is well.)

    Args:
      state: an optimizer's state, as in `masks`.
      params: the current params; `None`: look only at what the state remembers.

    Raises:
      ValueError: if pruned entries are not zero, with the leaf's path or the number remembered.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import dynamic
      >>> tx = optax.chain(dynamic.gradual(optax.sgd(0.1), 0.5), optax.clip(0.1))
      >>> params = {"w": jnp.array([[1.0, 2.0]])}
      >>> updates, state = tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)
      >>> dynamic.check(state, optax.apply_updates(params, updates))
      Traceback (most recent call last):
      ...
      ValueError: `params` must be zero where the masks prune, but 1 of 2 entries is not, ...
    """
    if _leaves.is_traced(*jax.tree.leaves((state, params))):
        raise ValueError("`check` looks at values: call it outside of jit.")
    found = masks(state)
    if params is not None:
        flat = _tree.flatten(params)
        counts = _refreshing.disobedient(params, found)
        for path, leaf, count in zip(flat.paths, flat.leaves, counts, strict=True):
            if count:
                verb = "is" if int(count) == 1 else "are"
                raise ValueError(
                    f"`params` must be zero where the masks prune, but {int(count)} of "
                    f"{jnp.size(leaf)} entries {verb} not, at {path!r}: {_why(leaf)}"
                )
    leaked = max(int(getattr(own, "leaked", 0)) for own in _own_states(state))
    if leaked:
        raise ValueError(
            f"`state` remembers {leaked} pruned entries that were not zero in the step after a "
            f"refresh: {_why()}"
        )


def _why(leaf: Any = 0.0) -> str:
    if jnp.any(jnp.isnan(leaf)):
        return "the leaf has NaN, which no update can bring to zero; look for what made it."
    return (
        "something outside the wrapper changes its steps (clip, EMA, decay, scale), or the params "
        "are not those it updated. Put the wrapper outermost and the rest inside it, and start "
        "from apply_masks(params, dynamic.masks(state))."
    )


def _own_states(state: Any) -> list[Any]:
    nodes = jax.tree.leaves(state, is_leaf=_has_masks)
    found = [node for node in nodes if _has_masks(node)]
    structures = {jax.tree.structure(own.masks, is_leaf=_is_left_out) for own in found}
    if len(structures) == 1:
        return found
    raise ValueError(
        "`state` must hold the state of a transform with masks (sparsejax.dynamic, keep_masks), "
        f"got {len(found)}{' of different trees' if found else ''} in {_leaves.brief(state)}."
    )


def _is_left_out(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _has_masks(node: Any) -> bool:
    """By the fields, which both kinds of states share with `KeepMasksState`."""
    return {"masks", "inner"} <= set(getattr(node, "_fields", ()))
