"""sparsejax: sparse neural networks in JAX, as pure functions from pytrees to pytrees.

The modules hold everything; the few verbs that people type first are re-exported here.
`sparsejax.models` (Flax NNX) and `sparsejax.datasets` are imported by name only, since the core
needs no framework.
"""

from sparsejax import (
    allocation,
    criteria,
    dynamic,
    filters,
    granularities,
    mask_sets,
    masking,
    metrics,
    penalties,
    schedules,
    selection,
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
    "penalized",
    "penalties",
    "proximal",
    "prune_masks",
    "prune_tree",
    "schedules",
    "selection",
    "transforms",
]
