"""Which indices of which axes of which variables are removed together: read from the jaxpr."""

from sparsejax.dependency import _control, _entrywise, _indexing, _products, _shapes
from sparsejax.dependency._groups import Group, Groups, Leaf, Locked, Member
from sparsejax.dependency._rules import Rule, add_rule
from sparsejax.dependency._trace import trace
from sparsejax.dependency._units import dead_units, labels, unit_scores

__all__ = [
    "Group",
    "Groups",
    "Leaf",
    "Locked",
    "Member",
    "Rule",
    "add_rule",
    "dead_units",
    "labels",
    "trace",
    "unit_scores",
]

del _control, _entrywise, _indexing, _products, _shapes
