"""The weights of several networks, as NumPy arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsejax import _checks, _leaves, _tree, filters, quantization
from sparsejax._typing import Filter, Params


def leaves(networks: Any, prunable: Filter) -> dict[str, dict[str, np.ndarray]]:
    """By name and path, the leaves of each network that a filter selects; half precisions wide."""
    if not isinstance(networks, Mapping):
        raise TypeError(
            '`networks` must map names to params, such as {"pruned": params}, got '
            f"{_leaves.brief(networks)}."
        )
    if not networks:
        raise ValueError("`networks` must hold at least one network, got none.")
    _checks.function("prunable", prunable, "(path, leaf) -> bool", "sparsejax.filters.weights")
    return {str(name): _selected(params, prunable) for name, params in networks.items()}


def _selected(params: Params, prunable: Filter) -> dict[str, np.ndarray]:
    params = quantization.dequantize(params)
    flat = _tree.flatten(params)
    chosen = filters.selected(prunable, params)
    rows = zip(_tree.distinct(flat.paths), flat.leaves, chosen, strict=True)
    return {path: array(leaf) for path, leaf, yes in rows if yes}


def array(leaf: Any) -> np.ndarray:
    """A leaf as an array of NumPy, in a dtype that it computes with."""
    found = np.asarray(leaf)
    return found.astype(_leaves.wide_dtype(found.dtype), copy=False)
