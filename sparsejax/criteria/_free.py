"""The leaves with respect to which a function is differentiated; the others are held fixed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import _checks, _leaves, _tree, filters
from sparsejax._typing import Filter, Params, Scores
from sparsejax.criteria._leafwise import unscored


class Free(NamedTuple):
    """A tree taken apart into the leaves that move and all others."""

    flat: _tree.Flat
    chosen: list[bool]

    @property
    def theta(self) -> list[jax.Array]:
        """The leaves that move."""
        pairs = zip(self.flat.leaves, self.chosen, strict=True)
        return [jnp.asarray(leaf) for leaf, yes in pairs if yes]

    def params(self, theta: list[jax.Array]) -> Params:
        """The tree with other values of the leaves that move."""
        values = iter(theta)
        pairs = zip(self.flat.leaves, self.chosen, strict=True)
        return self.flat.rebuild([next(values) if yes else leaf for leaf, yes in pairs])

    def scores(self, found: list[jax.Array]) -> Scores:
        """A tree of what was found for the leaves that move, and of what stands for no score."""
        values = iter(found)
        return self.flat.rebuild([next(values) if yes else unscored() for yes in self.chosen])


def floating(params: Params) -> Free:
    """All leaves of real floating numbers move."""
    flat = _tree.flatten(params)
    chosen = [_leaves.is_floating(leaf) for leaf in flat.leaves]
    if not any(chosen):
        raise ValueError(
            "`params` must hold at least one array of real floating numbers, got "
            f"{_leaves.brief(params)}."
        )
    return Free(flat, chosen)


def selected(prunable: Filter, params: Params) -> Free:
    """Those leaves move that a filter selects."""
    return Free(_tree.flatten(params), filters.selected(prunable, params))


def scalar_loss(
    loss: Callable[..., Any], free: Free, *batch: Any
) -> Callable[[list[jax.Array]], jax.Array]:
    """The loss on a batch as a function of the leaves that move; refuses what is no scalar."""

    def value(theta: list[jax.Array]) -> jax.Array:
        answer = loss(free.params(theta), *batch)
        if not _leaves.is_floating(answer) or _leaves.shape_of(answer) != ():
            raise TypeError(
                f"`loss` must return one real floating number, got {_leaves.describe(answer)}; "
                "take the mean over examples, and leave auxiliary outputs out."
            )
        return answer

    return value


def check_loss(loss: Any) -> None:
    """Refuses what is no function."""
    _checks.function("loss", loss, "(params, batch) -> number", "a mean cross-entropy")


def wide(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays in float32 at least."""
    return [_leaves.wide(x) for x in arrays]
