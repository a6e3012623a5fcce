"""A tree by the names of its leaves, every one of which stands for one leaf only."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax import _tree, masking
from sparsejax.storage import _container


class Named(NamedTuple):
    """A tree taken apart: its arrays by their names, in the order of its leaves."""

    arrays: dict[str, np.ndarray]
    structure: Any

    def rebuild(self, leaves: Mapping[str, Any]) -> Any:
        """A tree of the same structure with these leaves."""
        return jax.tree.unflatten(self.structure, [leaves[name] for name in self.arrays])


def named(tree: Any) -> Named:
    """The leaves with the names that `sparsejax.storage` has for them."""
    flat = _tree.flatten(tree)
    names = _tree.distinct(flat.paths, [_container.METADATA])
    arrays = map(np.asarray, flat.leaves)
    return Named(dict(zip(names, arrays, strict=True)), flat.structure)


def masks(tree: Any, params: Any) -> dict[str, np.ndarray]:
    """The masks of params by the names of their leaves; empty where there are none."""
    if tree is None:
        return {}
    found = map(np.asarray, masking.aligned(tree, params))
    return dict(zip(named(params).arrays, found, strict=True))
