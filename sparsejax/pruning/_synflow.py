"""SynFlow: masks for an untrained network, without data, a little at a time."""

from collections.abc import Callable
from typing import Any

import jax

from sparsejax import _checks, _form, _tree, criteria, filters, masking
from sparsejax._typing import Filter, Masks, Params, Scalar
from sparsejax.pruning import _nesting, _sparsities


def synflow(
    apply_fn: Callable[[Params, Any], Any],
    params: Params,
    inputs: Any,
    sparsity: Scalar,
    *,
    rounds: int = 100,
    prunable: Filter = filters.weights,
) -> Masks:
    """Prunes what little flows through, again and again, from an untrained network without data.

    Each round scores what is left by `criteria.synflow` and takes the same share of it, so that
    the density falls exponentially. Every layer's scores have the same sum, hence a layer of few
    weights has high ones, and no layer is emptied while another has more than it needs: that holds
    down to one weight a layer, where a single round (`rounds=1`), SNIP or GraSP cut the network in
    two. Train with `sj.keep_masks(optimizer, masks)` from `sj.apply_masks(params, masks)`.

    Run it outside `jit`: `apply_fn` is compiled once. A round is a forward pass, a backward pass
    and a selection.

    Args:
      apply_fn: `(params, inputs) -> outputs`, real floating, before any softmax, as
        `criteria.synflow` wants it.
      params: a pytree of arrays, dense. Biases count in absolute value: at initialization they are
        zero, and flow is then conserved from layer to layer.
      inputs: an array, or a pytree of arrays or of `jax.ShapeDtypeStruct`, of which only the
        shapes count; one example is enough.
      sparsity: the fraction of the prunable entries to prune, in [0, 1).
      rounds: how many, at least 1.
      prunable: which leaves are pruned; the others get a 0-d True.

    Returns:
      Masks like `params`, which prune exactly `round(sparsity * n)` of n entries.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range, or as in
        `criteria.synflow`: nothing flows, or it is not finite; if `sparsity` leaves so few weights
        that nothing flows any more.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import pruning
      >>> def apply(params, x):
      ...     return x @ params["wide"] @ params["narrow"]
      >>> params = {"narrow": jnp.full((4, 1), 0.01), "wide": jnp.ones((3, 4))}
      >>> masks = pruning.synflow(apply, params, jnp.zeros((1, 3)), 14 / 16)
      >>> int(masks["wide"].sum()), int(masks["narrow"].sum())  # two weights left of 16
      (1, 1)

    References:
      H. Tanaka, D. Kunin, D. Yamins, S. Ganguli, *Pruning neural networks without any data by
      iteratively conserving synaptic flow*, NeurIPS 2020, https://arxiv.org/abs/2006.05467. Its
      code prunes what is at or below a threshold, all ties together; here the counts are exact, and
      what is pruned cannot come back.
    """
    _checks.function("apply_fn", apply_fn, "(params, inputs) -> outputs", "a Flax apply function")
    last = _checks.known_fraction("sparsity", sparsity)
    rounds = _checks.known_step("rounds", rounds, 1)
    choice = _nesting.Choice(prunable=prunable)
    masks = choice.everything(params, ())
    if last == 0:
        return masks
    compiled = _compiled(apply_fn, params)
    for i, step in enumerate(_sparsities.towards(last, rounds)):
        left = masking.apply_masks(params, masks)
        try:
            scores = criteria.synflow(compiled, left, inputs)
        except ValueError as error:
            if i == 0:
                raise
            count = masking.sparsity(left, masks, prunable=prunable).prunable
            raise ValueError(
                "`sparsity` must leave a path through the network, a weight a layer at least, got "
                f"{last}: nothing flows through the {count.nonzeros} of {count.size} entries that "
                f"are left after round {i} of {rounds}; prune less, or in more rounds."
            ) from error
        masks = choice.masks(scores, masks, step)
    return masks


def _compiled(apply_fn: Callable[[Params, Any], Any], params: Params) -> Callable[..., Any]:
    """The function, compiled; what is no array in the params (a function) is no argument of it."""
    form = _form.form_of(params, "apply_fn")

    @jax.jit
    def outputs(arrays: list[jax.Array], inputs: Any) -> Any:
        return apply_fn(form.filled(arrays), inputs)

    def apply(params: Params, inputs: Any) -> Any:
        pairs = zip(_tree.flatten(params).leaves, form.flat.leaves, strict=True)
        return outputs([leaf for leaf, like in pairs if isinstance(like, jax.Array)], inputs)

    return apply
