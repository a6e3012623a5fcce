"""The table of rules: what each primitive does to axes, and how it runs at smaller sizes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sparsejax import _checks, _leaves
from sparsejax.dependency._evaluator import Evaluation, as_it_is
from sparsejax.dependency._tracer import Step
from sparsejax.dependency._values import Value


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one primitive treats axes.

    Args:
      trace: `(step, eqn, values) -> values`: the outputs, as `Value`s, of an equation whose
        operands are `values`. `step` has what rules do to axes: `unify` those whose indices are
        removed together, `contract`, `split` and `merge`, `lock` or `fix` what must stay.
      evaluate: `(evaluation, eqn, arrays) -> arrays`: the outputs on arrays that may be smaller
        than the equation says. By default the primitive with the same parameters.

    Example:
      >>> from sparsejax import dependency
      >>> def trace(step, eqn, values):  # a primitive of one operand that works entry by entry
      ...     return list(values)
      >>> rule = dependency.Rule(trace)
    """

    trace: Callable[[Step, Any, list[Value]], list[Value]]
    evaluate: Callable[[Evaluation, Any, list[Any]], list[Any]] = as_it_is

    def __post_init__(self) -> None:
        _checks.function("trace", self.trace, "(step, eqn, values) -> values", "my_rule")
        _checks.function("evaluate", self.evaluate, "(evaluation, eqn, arrays) -> arrays", "mine")


RULES: dict[str, Rule] = {}


def add_rule(primitive: str, rule: Rule) -> None:
    """Teaches the trace one more primitive, or another rule for one that it knows.

    It holds for the whole process. A primitive without a rule locks whatever it touches, and
    `Groups.unknown` names it.

    Args:
      primitive: the name that a jaxpr prints, such as `dot_general`.
      rule: how it treats axes.

    Raises:
      TypeError: if `primitive` is no string, or `rule` no Rule.

    Example:
      >>> from sparsejax import dependency
      >>> entry_by_entry = dependency.Rule(lambda step, eqn, values: list(values))
      >>> dependency.add_rule("my_activation", entry_by_entry)
    """
    if not isinstance(primitive, str) or not isinstance(rule, Rule):
        raise TypeError(
            "`add_rule` needs a primitive's name and a dependency.Rule, got "
            f"{_leaves.brief(primitive)} and {_leaves.brief(rule)}."
        )
    add(rule, primitive)


def add(rule: Rule, *names: str) -> None:
    """Enters a rule for primitives of these names."""
    RULES.update(dict.fromkeys(names, rule))


def rule_of(eqn: Any) -> Rule | None:
    """The rule of an equation's primitive."""
    return RULES.get(eqn.primitive.name)
