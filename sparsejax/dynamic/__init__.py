"""Sparse training: optax wrappers whose masks change while they train; outermost.

=================== ============================================= ==================================
wrapper             what it prunes, and when                      what comes back
=================== ============================================= ==================================
`gradual`           more and more, by any criterion               nothing, by magnitude
`set_`, `rigl`      as much as it grows, every n steps            random entries; largest gradients
`straight_through`  the smallest dense weights                    entries whose dense weight grew
`movement`          what the loss pushes towards zero             entries pushed away from it
=================== ============================================= ==================================

After every `optax.apply_updates` the params obey the masks exactly, whatever optimizer is inside:
`straight_through` and `movement`, which remember the values of pruned entries, keep them in the
state. So a training loop stays as it is, evaluation needs no masks, and checkpoints of params and
optimizer state carry everything. `masks(state)` reads the masks; `check(state, params)` finds out
whether something outside (a clip, EMA, decay or scale of the wrapper's steps; another optimizer)
kept params from obeying them.

Masks are refreshed under `lax.cond`: other steps cost what `transforms.keep_masks` costs. Counts
come from a table made before tracing, so they are the same eager, jitted, scanned and sharded, and
the last is `round(sparsity * n)` of the number you gave. Gradients at pruned entries may be
anything, NaN included, where they are not used: in `gradual` by magnitude and `set_`; `rigl` grows
NaN last; `straight_through` and `movement` need finite ones. A pruned *parameter* that is NaN
cannot be zeroed by an update: `check` shows it. Under `optax.inject_hyperparams` build the whole:
`inject_hyperparams(lambda learning_rate: gradual(adam(learning_rate), schedule))`.
"""

from sparsejax.dynamic._dense import (
    MovementState,
    StraightThroughState,
    movement,
    straight_through,
)
from sparsejax.dynamic._gradual import gradual
from sparsejax.dynamic._regrowing import rigl, set_
from sparsejax.dynamic._states import SparseState, check, masks

__all__ = [
    "MovementState",
    "SparseState",
    "StraightThroughState",
    "check",
    "gradual",
    "masks",
    "movement",
    "rigl",
    "set_",
    "straight_through",
]
