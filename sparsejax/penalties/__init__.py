"""Penalties: a value λR(w), its proximal operator and, where it has one, its slope at zero.

==================== ============================================ ========== =====================
penalty              what it asks for                             convex     slope for `penalized`
==================== ============================================ ========== =====================
`l1`                 few nonzero entries                          yes        yes
`l2`                 small entries; makes no zeros                yes        yes
`elastic_net`        both: correlated entries stay together       yes        yes
`group_lasso`        few nonzero groups: channels, rows, blocks   yes        yes
`sparse_group_lasso` few groups, and few entries in them          yes        yes
`mcp`, `scad`        few nonzero entries, the large not shrunk    no         yes
`l0`                 few nonzero entries, none of them shrunk     no         no
`nuclear`            low rank: few singular values, per leaf      yes        no
`constraint`         params in a set: a ball, a box, k nonzeros   as the set no
==================== ============================================ ========== =====================

`combine` adds penalties on different leaves, such as groups for convolutions and L1 for the rest.
Begin with `l1`, or `group_lasso` where the network should become smaller and not only sparser. If
what they keep comes out too small, go on from their solution with `mcp` or `scad`.

A penalty with a slope works in `transforms.prox` before plain SGD and in `transforms.penalized`
around any optimizer; one without works in `transforms.proximal`.

A strength λ is a number; or a schedule, step -> number, read by `at(step)`; or a tree like the
params of arrays that broadcast against their leaves: 0-d arrays give every leaf its own, shapes
such as (1, 1, 1, C) every channel, full shapes every entry (the adaptive lasso). Leaves that are
not penalized may have `None` there. Groups, singular values and sets belong to no entry: where a
penalty takes fewer kinds of strengths, it says so. Numbers and arrays may be traced: `vmap` over
them fits several strengths at once.

All methods are pure, work under `jit` and `vmap`, leave what is not prunable as it is, and compute
in float32 (or wider) whatever the leaf's dtype.
"""

from sparsejax.penalties._combined import combine
from sparsejax.penalties._constraint import constraint
from sparsejax.penalties._elastic_net import ElasticNet, elastic_net, l1, l2
from sparsejax.penalties._groups import group_lasso, sparse_group_lasso
from sparsejax.penalties._nonconvex import l0, mcp, scad
from sparsejax.penalties._nuclear import nuclear

__all__ = [
    "ElasticNet",
    "combine",
    "constraint",
    "elastic_net",
    "group_lasso",
    "l0",
    "l1",
    "l2",
    "mcp",
    "nuclear",
    "scad",
    "sparse_group_lasso",
]
