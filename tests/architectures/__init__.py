"""Small networks, each as a user of its framework would write it, with random values.

`CASES["resnet_basic-nnx"]()` is a `Case(apply, variables, inputs)` in inference mode;
`STATEFUL` are in training mode, and their `apply` returns `(logits, new_batch_stats)`.
"""

from . import (  # noqa: F401
    _dict_extras,
    _dict_extras2,
    _dict_images,
    _dict_sequences,
    _equinox_images,
    _equinox_sequences,
    _haiku,
    _linen_images,
    _linen_sequences,
    _nnx_images,
    _nnx_sequences,
    _stateful,
)
from ._case import CASES, STATEFUL, Case

__all__ = ["CASES", "STATEFUL", "Case"]
