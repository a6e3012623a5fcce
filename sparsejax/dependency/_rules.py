"""The table of rules: what each primitive does to axes, and how it is evaluated at smaller sizes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sparsejax import _checks
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


def add(rule: Rule, *names: str) -> None:
    """Enters a rule for primitives of these names."""
    RULES.update(dict.fromkeys(names, rule))


def rule_of(eqn: Any) -> Rule | None:
    """The rule of an equation's primitive."""
    return RULES.get(eqn.primitive.name)


def body(eqn: Any) -> Any:
    """The jaxpr that an equation calls."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return eqn.params[name]
    raise ValueError(f"{eqn.primitive.name} calls no jaxpr.")
