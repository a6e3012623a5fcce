"""Which leaves may be pruned or penalized: predicates `(path, leaf) -> bool`, and their algebra.

A path is the names on the way to a leaf joined by dots, whatever the framework: `conv1.kernel` in
NNX, `params.Dense_0.kernel` in Linen, `layers.0.weight` in Equinox, `mlp/~/linear_0.w` in Haiku.

The word "mask" of optax (which *leaves*) is `prunable` here; our masks say which *entries*.
"""

import fnmatch
from typing import Any

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Filter, Params


def floating(path: str, leaf: Any) -> bool:
    """Selects leaves of real floating numbers, of any rank (bfloat16 and float16 included).

    Args:
      path: the leaf's path; not looked at.
      leaf: anything; what is no array is not selected.

    Returns:
      True for floating leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import filters
      >>> filters.floating("b", jnp.ones(3)), filters.floating("steps", jnp.arange(3))
      (True, False)
    """
    del path
    return _leaves.is_floating(leaf)


def weights(path: str, leaf: Any) -> bool:
    """Selects weights: floating leaves with at least two axes. The default of every `prunable`.

    Biases, scales of normalization layers and scalars have fewer axes: they are few, and to
    zero them costs accuracy for nothing. A linear model whose coefficients are one vector needs
    `prunable=filters.floating`.

    Args:
      path: the leaf's path.
      leaf: anything; what is no array is not selected.

    Returns:
      True for floating leaves of rank 2 or more.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import filters
      >>> filters.weights("kernel", jnp.ones((3, 2))), filters.weights("bias", jnp.ones(2))
      (True, False)
    """
    shape = _leaves.shape_of(leaf)
    return floating(path, leaf) and shape is not None and len(shape) >= 2


def by_path(*patterns: str) -> Filter:
    """Selects leaves whose path matches one of some shell-style patterns.

    `*` stands for any run of characters, dots included; `?` for one; `[ab]` for a choice. Matching
    is by the whole path and minds case (`fnmatch.fnmatchcase`).

    Args:
      *patterns: at least one pattern, such as `"conv*.kernel"`.

    Returns:
      A filter; combine it, since it looks at the path alone:
      `all_of(weights, by_path("conv*"))`.

    Raises:
      TypeError: if a pattern is not a string.
      ValueError: if there is no pattern.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import filters
      >>> conv = filters.by_path("conv*.kernel")
      >>> conv("conv1.kernel", jnp.ones((3, 3, 1, 8))), conv("dense1.kernel", jnp.ones((8, 2)))
      (True, False)
    """
    if not patterns:
        raise ValueError('`patterns` must name at least one pattern, for example "conv*.kernel".')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f'`patterns` must be strings such as "conv*.kernel", got {_leaves.brief(pattern)}.'
            )

    def matches(path: str, leaf: Any) -> bool:
        del leaf
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

    return matches


def all_of(*filters: Filter) -> Filter:
    """Selects what every filter selects.

    Args:
      *filters: filters; with none, every leaf is selected.

    Returns:
      A filter.

    Raises:
      TypeError: if a filter cannot be called.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import filters
      >>> body = filters.all_of(filters.weights, filters.not_(filters.by_path("head.*")))
      >>> body("conv.kernel", jnp.ones((3, 2))), body("head.kernel", jnp.ones((3, 2)))
      (True, False)
    """
    _check_filters(filters)
    return lambda path, leaf: all(f(path, leaf) for f in filters)


def any_of(*filters: Filter) -> Filter:
    """Selects what at least one filter selects.

    Args:
      *filters: filters; with none, no leaf is selected.

    Returns:
      A filter.

    Raises:
      TypeError: if a filter cannot be called.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import filters
      >>> ends = filters.any_of(filters.by_path("stem.*"), filters.by_path("head.*"))
      >>> ends("head.bias", jnp.ones(2)), ends("body.bias", jnp.ones(2))
      (True, False)
    """
    _check_filters(filters)
    return lambda path, leaf: any(f(path, leaf) for f in filters)


def not_(filter_: Filter) -> Filter:
    """Selects what a filter does not select.

    Args:
      filter_: a filter.

    Returns:
      A filter.

    Raises:
      TypeError: if it cannot be called.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import filters
      >>> filters.not_(filters.weights)("bias", jnp.ones(2))
      True
    """
    _check_filters((filter_,))
    return lambda path, leaf: not filter_(path, leaf)


def selected(prunable: Filter, tree: Params) -> list[bool]:
    """Which leaves of a tree a filter selects, in the order of `jax.tree.leaves`.

    Selecting nothing is refused, because it would silently prune nothing.

    Args:
      prunable: a filter.
      tree: a pytree; one without any leaf is allowed.

    Returns:
      A list of booleans, one a leaf.

    Raises:
      TypeError: if `prunable` cannot be called, does not answer with a boolean, or selects a
        leaf that is not an array of floating or complex numbers.
      ValueError: if the tree has leaves and none is selected.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import filters
      >>> filters.selected(filters.weights, {"b": jnp.ones(2), "w": jnp.ones((3, 2))})
      [False, True]
    """
    _checks.function("prunable", prunable, "(path, leaf) -> bool", "sparsejax.filters.weights")
    if tree is None:
        raise ValueError("`params` must be a pytree of arrays, got None.")
    flat = _tree.flatten(tree)
    answers = [
        answer(prunable, path, leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    ]
    if flat.leaves and not any(answers):
        some = ", ".join(
            f"{path!r} {_leaves.describe(leaf)}"
            for path, leaf in zip(flat.paths[:5], flat.leaves[:5], strict=True)
        )
        raise ValueError(
            f"`prunable` must select at least one leaf, got none of {len(flat.leaves)} ({some}"
            f"{', ...' if len(flat.leaves) > 5 else ''}). The default, filters.weights, selects "
            "floating leaves with at least two axes; for vectors pass prunable=filters.floating."
        )
    return answers


def answer(filter_: Filter, path: str, leaf: Any, *, name: str = "prunable") -> bool:
    """Which way a filter decides on one leaf; refuses what is no answer, as in `selected`."""
    decision = filter_(path, leaf)
    if not isinstance(decision, bool):
        raise TypeError(
            f"`{name}` must answer True or False, got {_leaves.brief(decision)} at {path!r}."
        )
    if decision and not _leaves.is_inexact(leaf):
        raise TypeError(
            f"`{name}` must select floating arrays only, got {_leaves.describe(leaf)} at "
            f"{path!r}; combine it: filters.all_of(filters.floating, ...)."
        )
    return decision


def _check_filters(filters: tuple[Any, ...]) -> None:
    for f in filters:
        _checks.function("filters", f, "(path, leaf) -> bool", "sparsejax.filters.weights")
