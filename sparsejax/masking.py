"""Masks: build them from scores, apply and count them; `prune_tree` in one call.

A mask tree has the structure of the params; every leaf is a boolean array that broadcasts against
its parameter, True = kept, and a 0-d True where the leaf is not prunable.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _scores, _topk, _tree, criteria, filters, selection
from sparsejax._typing import Criterion, Filter, Masks, Params, Scalar, Scores
from sparsejax.allocation import Allocation
from sparsejax.granularities import NM, Granularity, Unstructured

_UNSTRUCTURED = Unstructured()


class Count(NamedTuple):
    """Zeros among entries; `sparsity` is their fraction (0 where there are no entries)."""

    zeros: Any
    size: int

    @property
    def nonzeros(self) -> Any:
        """Entries that are not zero."""
        return self.size - self.zeros

    @property
    def sparsity(self) -> Any:
        """The fraction of zeros, in [0, 1]."""
        return self.zeros / max(self.size, 1)


class Sparsity(NamedTuple):
    """What `sparsity` found: of the prunable entries, of all entries, and leaf by leaf."""

    prunable: Count
    total: Count
    leaves: dict[str, Count]


def threshold(scores: Scores, t: Scalar, *, prunable: Filter = filters.weights) -> Masks:
    """Masks that keep `score >= t` and prune `score < t`; one read.

    Args:
      scores: a pytree of scores, of any sign.
      t: any real number, infinite ones included; may be traced (then NaN prunes nothing). Compared
        in the score's precision, at least float32.
      prunable: which leaves are pruned; the others get a 0-d True.

    Returns:
      Masks like `scores`.

    Raises:
      TypeError: if `t` is not one real number.
      ValueError: if `t` is NaN, or a score is NaN (under `jit`, NaN scores are pruned).

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masking
      >>> scores = {"b": jnp.zeros(2), "w": jnp.array([[-1.0, 0.5, 2.0]])}
      >>> masking.threshold(scores, 0.5)
      {'b': Array(True, dtype=bool), 'w': Array([[False,  True,  True]], dtype=bool)}
    """
    _checks.real_number("t", t)
    return _threshold(_tree.flatten(scores), filters.selected(prunable, scores), t)


def topk(
    scores: Scores,
    sparsity: Scalar | None = None,
    *,
    count: Scalar | None = None,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity | NM = _UNSTRUCTURED,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
) -> Masks:
    """Masks that keep what scores highest and prune exactly `round(sparsity * n)`.

    n counts the prunable entries of the whole tree, or of each leaf: units, where a granularity
    pools entries. The count is exact for ties too: the lower flat index is kept, leaves in tree
    order. Equal scores give equal masks eager, jitted and sharded. Selection counts, it does not
    sort: about seven reads of the scores and one write of the masks.

    Args:
      scores: a pytree of floating scores, of any sign.
      sparsity: the fraction to prune, in [0, 1); may be traced, and then counts as its float32
        value, where 1 and more prune all, less than 0 and NaN nothing.
      count: how many to prune, an integer, instead of `sparsity`; in each leaf, where the scope is
        per leaf. A traced one outside its range prunes none or all.
      scope: `"global"`: everything competes; `"per_leaf"`: every leaf has this sparsity, rounded
        leaf by leaf. By default global, per leaf with an allocation.
      allocation: shares what is kept out to the leaves, so that the total is exact: `uniform`,
        `erdos_renyi`, `erdos_renyi_kernel` of `sparsejax.allocation`, `override`, or your own. It
        needs an amount that is not traced.
      granularity: what is kept or pruned as one: a value of `sparsejax.granularities`. `NM` fixes
        its own sparsity, so that it stands alone.
      stacked: which leaves hold several layers along their first axis (as `jax.lax.scan` has them):
        each of them counts as a leaf of its own (where all entries of all leaves compete, that
        changes nothing). By default none.
      prunable: which leaves are pruned; the others get a 0-d True.

    Returns:
      Masks like `scores`.

    Raises:
      TypeError: if an argument is of the wrong kind, or a prunable leaf is complex.
      ValueError: if an amount is out of range or missing, arguments exclude each other, a
        granularity does not fit a leaf, an allocation cannot be met, or a score is NaN (under
        `jit`, NaN ranks lowest).

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import granularities, masking
      >>> scores = {"v": jnp.array([[3.0, 3.0]]), "w": jnp.array([[3.0, 5.0]])}
      >>> masking.topk(scores, 0.5)  # four entries, two go: the last of the equal ones
      {'v': Array([[ True, False]], dtype=bool), 'w': Array([[False,  True]], dtype=bool)}
      >>> masking.topk(scores, count=1, granularity=granularities.Channel(0))["v"]
      Array([[False]], dtype=bool)
    """
    amount = _topk.Amount(sparsity, count)
    _topk.check(amount, scope, allocation, granularity)
    return _topk.masks(
        _tree.flatten(scores),
        filters.selected(prunable, scores),
        amount,
        scope=scope,
        allocate=allocation,
        granularity=granularity,
        stacked=stacked,
    )


def apply_masks(params: Params, masks: Masks) -> Params:
    """The params with every pruned entry zeroed: `where(mask, w, 0)`, so a pruned NaN is zero too.

    Args:
      params: a pytree of arrays.
      masks: masks for it; a leaf with a 0-d True passes as it is, whatever it is. `None` will do
        for what holds no numbers (a function).

    Returns:
      A tree like `params`, same dtypes.

    Raises:
      TypeError: if a mask is not boolean.
      ValueError: if structures differ or a mask does not broadcast, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masking
      >>> masking.apply_masks({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    flat = _tree.flatten(params)
    rows = zip(flat.paths, flat.leaves, aligned(masks, params), strict=True)
    return flat.rebuild([_apply(*row) for row in rows])


def aligned(masks: Masks, params: Params) -> list[Any]:
    """The mask of every leaf of `params`, in the order of `jax.tree.leaves`, all of them checked.

    Args:
      masks: masks for `params`.
      params: a pytree of arrays.

    Returns:
      A list of boolean arrays.

    Raises:
      TypeError: if a mask is not boolean.
      ValueError: if structures differ or a mask does not broadcast, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masking
      >>> masking.aligned({"b": jnp.array(True)}, {"b": jnp.ones(3)})
      [Array(True, dtype=bool)]
    """
    flat = _tree.flatten(params)
    found = _tree.align("masks", masks, "params", params)
    # Where masks were made from params without their functions and the like (`eqx.filter`).
    found = [
        _everything() if mask is None and not _leaves.is_number(leaf) else mask
        for mask, leaf in zip(found, flat.leaves, strict=True)
    ]
    for path, mask, leaf in zip(flat.paths, found, flat.leaves, strict=True):
        _checks.broadcasts(path, mask, leaf)
    return found


def sparsity(
    params: Params, masks: Masks | None = None, *, prunable: Filter = filters.weights
) -> Sparsity:
    """Counts zeros: of the prunable entries, of all entries of floating leaves, and leaf by leaf.

    Args:
      params: a pytree of arrays; leaves that are not floating do not count.
      masks: count what these prune, whatever the values are; `None`: count the zeros of `params`.
      prunable: which leaves count as prunable; may select none.

    Returns:
      A `Sparsity` of Python integers, or of 0-d integer arrays under `jit`.

    Raises:
      TypeError, ValueError: if masks do not fit, as in `apply_masks`; under `jit` also if there are
        2³¹ entries or more.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masking
      >>> params = {"b": jnp.ones(2), "w": jnp.array([[1.0, 0.0], [0.0, 0.0]])}
      >>> count = masking.sparsity(params)
      >>> count.prunable.sparsity, count.total.sparsity, count.leaves["w"].nonzeros
      (0.75, 0.5, 1)
    """
    _checks.function("prunable", prunable, "(path, leaf) -> bool", "sparsejax.filters.weights")
    flat = _tree.flatten(params)
    pruned = [None] * len(flat.leaves) if masks is None else aligned(masks, params)
    counted = [
        (path, filters.answer(prunable, path, leaf), _count_zeros(leaf, mask))
        for path, leaf, mask in zip(flat.paths, flat.leaves, pruned, strict=True)
        if _leaves.is_inexact(leaf)
    ]
    if any(_leaves.is_traced(count.zeros) for _, _, count in counted):
        _checks.fits_int32("sparsity", sum(count.size for _, _, count in counted))
    return Sparsity(
        prunable=_sum([count for _, chosen, count in counted if chosen]),
        total=_sum([count for _, _, count in counted]),
        leaves={path: count for path, _, count in counted},
    )


def prune_masks(
    params: Params,
    grads: Params,
    threshold: Scalar,
    *,
    criterion: Criterion = criteria.gradient,
    prunable: Filter = filters.weights,
) -> Masks:
    """Masks of the entries whose score is at least `threshold`.

    Args:
      params: a pytree of arrays.
      grads: gradients, or the importance from `criteria.output_gradient`, like `params`; `None` for
        a whole tree is fine where the criterion does not need it.
      threshold: a number >= 0, in the unit of the scores; may be traced. 0 prunes nothing.
      criterion: any function `(params, grads) -> scores`.
      prunable: which leaves are pruned; the others get a 0-d True.

    Returns:
      Masks like `params`.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if `threshold` is negative or NaN, a score is NaN, or trees do not match, with the
        leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparsejax as sj
      >>> params, grads = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[-0.5, 0.1]])}
      >>> sj.prune_masks(params, grads, 0.2)
      {'w': Array([[ True, False]], dtype=bool)}
    """
    _checks.non_negative(
        "threshold",
        threshold,
        "Scores are absolute values here; for signed scores use masking.threshold.",
    )
    chosen = filters.selected(prunable, params)
    scores = _scores.from_criterion(criterion, params, grads, chosen)
    return _threshold(scores, chosen, threshold)


def prune_tree(
    params: Params,
    grads: Params,
    threshold: Scalar,
    *,
    criterion: Criterion = criteria.gradient,
    prunable: Filter = filters.weights,
) -> Params:
    """The params with every entry zeroed whose score is below `threshold`.

    `apply_masks(params, prune_masks(params, grads, threshold))`: keep `score >= threshold`, so that
    a threshold of 0 prunes nothing. Pure: works under `jit` with a traced threshold.

    Args:
      params: a pytree of arrays.
      grads: gradients, or the importance from `criteria.output_gradient`, like `params`; `None` for
        a whole tree is fine where the criterion does not need it.
      threshold: a number >= 0, in the unit of the scores; may be traced.
      criterion: any function `(params, grads) -> scores`; by default |grads|.
      prunable: which leaves are pruned; the others pass as they are.

    Returns:
      A tree like `params`: same structure, shapes and dtypes.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if `threshold` is negative or NaN, a score is NaN (under `jit`, NaN scores are
        pruned), or trees do not match, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparsejax as sj
      >>> params, grads = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[-0.5, 0.1]])}
      >>> sj.prune_tree(params, grads, 0.2)
      {'w': Array([[1., 0.]], dtype=float32)}
      >>> sj.prune_tree(params, grads, 1.5, criterion=sj.criteria.magnitude)
      {'w': Array([[0., 2.]], dtype=float32)}
    """
    masks = prune_masks(params, grads, threshold, criterion=criterion, prunable=prunable)
    return apply_masks(params, masks)


def _threshold(scores: _tree.Flat, chosen: list[bool], t: Scalar) -> Masks:
    kept = [_at_least(s, t) for s in _scores.chosen_scores(scores, chosen)]
    return _scores.spread(scores, chosen, kept)


def _at_least(scores: jax.Array, t: Scalar) -> jax.Array:
    """As real numbers: denormals count, +0 = -0, NaN is below every threshold."""
    dtype = _leaves.wide_dtype(scores.dtype)
    # A NaN key lies below that of -inf, which is the lowest threshold.
    return selection.order_key(scores) >= selection.order_key(jnp.asarray(t, dtype))


def _everything() -> jax.Array:
    return jnp.ones((), bool)


def _apply(path: str, leaf: Any, mask: Any) -> Any:
    if _keeps_all(mask):
        return leaf
    if not _leaves.is_number(leaf):
        if not _leaves.is_traced(mask) and not np.all(mask):
            raise TypeError(
                f"`masks` must be True where the params are no numbers, got one that prunes "
                f"{_leaves.describe(leaf)} at {path!r}."
            )
        return leaf
    if isinstance(leaf, np.ndarray) and leaf.dtype != jnp.asarray(leaf).dtype:
        # JAX would narrow it: float64 where x64 is off.
        return np.where(np.asarray(mask), leaf, np.zeros((), leaf.dtype))
    array = jnp.asarray(leaf)
    return jnp.where(mask, array, jnp.zeros((), array.dtype))


def _keeps_all(mask: Any) -> bool:
    """Whether a whole leaf is seen to be kept, so that it need not be touched."""
    return _leaves.shape_of(mask) == () and not _leaves.is_traced(mask) and bool(mask)


def _count_zeros(leaf: Any, mask: Any) -> Count:
    size = int(np.size(leaf))
    if mask is not None:
        share = size // max(math.prod(_leaves.shape_of(mask) or ()), 1)
        return Count(size - _count_nonzero(mask) * share, size)
    return Count(size - _count_nonzero(leaf), size)


def _count_nonzero(leaf: Any) -> Any:
    """Denormals count: XLA's comparisons on CPU take them for zeros, integers and NumPy do not."""
    if not _leaves.is_traced(leaf) and getattr(leaf, "is_fully_addressable", True):
        return int(np.count_nonzero(np.asarray(leaf)))
    array = jnp.asarray(leaf)
    nonzero = selection.order_key(array) != 0 if _leaves.is_floating(array) else array != 0
    count = jnp.sum(nonzero, dtype=jnp.int32)
    return count if _leaves.is_traced(count) else int(count)


def _sum(counts: list[Count]) -> Count:
    return Count(sum(c.zeros for c in counts), sum(c.size for c in counts))
