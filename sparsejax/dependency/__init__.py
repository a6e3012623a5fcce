"""Which indices of which axes of which variables are removed together: read from the jaxpr.

`trace` finds the groups of any function; `unit_scores`, `dead_units`, `labels` go from entries to
units and back. `Rule` and `add_rule` teach it a primitive that it does not know; `Step`, `Value`,
`Axis` and `Evaluation` are what a rule sees.
"""

from sparsejax.dependency import _control, _entrywise, _indexing, _products, _shapes
from sparsejax.dependency._evaluator import Evaluation
from sparsejax.dependency._groups import Group, Groups, Leaf, Locked, Member
from sparsejax.dependency._rules import Rule, add_rule
from sparsejax.dependency._trace import trace
from sparsejax.dependency._tracer import Step
from sparsejax.dependency._units import dead_units, labels, unit_scores
from sparsejax.dependency._values import Axis, Value

__all__ = [
    "Axis",
    "Evaluation",
    "Group",
    "Groups",
    "Leaf",
    "Locked",
    "Member",
    "Rule",
    "Step",
    "Value",
    "add_rule",
    "dead_units",
    "labels",
    "trace",
    "unit_scores",
]

del _control, _entrywise, _indexing, _products, _shapes
