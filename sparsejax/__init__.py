"""sparsejax: sparse neural networks in JAX, as pure functions from pytrees to pytrees.

The verbs people type first are re-exported; `models` (NNX) and `datasets` are imported by name.
"""

from sparsejax import (
    allocation as allocation,
    criteria as criteria,
    dependency as dependency,
    distillation as distillation,
    dynamic as dynamic,
    filters as filters,
    granularities as granularities,
    mask_sets as mask_sets,
    masking as masking,
    metrics as metrics,
    paths as paths,
    penalties as penalties,
    plots as plots,
    pruning as pruning,
    quantization as quantization,
    reports as reports,
    schedules as schedules,
    selection as selection,
    sensitivity as sensitivity,
    shrinking as shrinking,
    sparse_ops as sparse_ops,
    storage as storage,
    transforms as transforms,
)
from sparsejax.masking import (
    apply_masks as apply_masks,
    prune_masks as prune_masks,
    prune_tree as prune_tree,
)
from sparsejax.transforms import (
    elastic_net_prox as elastic_net_prox,
    keep_masks as keep_masks,
    l1_prox as l1_prox,
    l2_prox as l2_prox,
    penalized as penalized,
    proximal as proximal,
)

__version__ = "0.1.0"
