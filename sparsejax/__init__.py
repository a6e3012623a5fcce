"""sparsejax: sparse neural networks in JAX, as pure functions from pytrees to pytrees.

The verbs people type first are re-exported; `models` (NNX) and `datasets` are imported by name.
"""

from sparsejax import (
    allocation,
    criteria,
    dependency,
    dynamic,
    filters,
    granularities,
    mask_sets,
    masking,
    metrics,
    paths,
    penalties,
    plots,
    schedules,
    selection,
    sensitivity,
    shrinking,
    sparse_ops,
    storage,
    transforms,
)
from sparsejax.masking import apply_masks, prune_masks, prune_tree
from sparsejax.transforms import (
    elastic_net_prox,
    keep_masks,
    l1_prox,
    l2_prox,
    penalized,
    proximal,
)

__version__ = "0.1.0"

__all__ = [
    "allocation",
    "apply_masks",
    "criteria",
    "dependency",
    "dynamic",
    "elastic_net_prox",
    "filters",
    "granularities",
    "keep_masks",
    "l1_prox",
    "l2_prox",
    "mask_sets",
    "masking",
    "metrics",
    "paths",
    "penalized",
    "penalties",
    "plots",
    "proximal",
    "prune_masks",
    "prune_tree",
    "schedules",
    "selection",
    "sensitivity",
    "shrinking",
    "sparse_ops",
    "storage",
    "transforms",
]
