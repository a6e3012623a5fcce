"""Rules of calls and of control flow: jit, remat, custom derivatives, scan, while, cond."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from sparsejax import _jaxpr, _leaves
from sparsejax.dependency import _rules
from sparsejax.dependency._evaluator import Evaluation
from sparsejax.dependency._tracer import Step
from sparsejax.dependency._values import Axis, Value, fixed

# Every round makes at least one index nonzero or fixed for good; networks need two or three.
_MOST_ROUNDS = 100


def _call(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    (frame,) = step.inner(1)
    return step.call(frame, _jaxpr.body(eqn), values)


Evaluate = Callable[[Evaluation, Any, list[Any]], list[Any]]


def _if_touched(evaluate: Evaluate) -> Evaluate:
    """Leaves a call as it is where nothing in it is smaller."""

    def evaluated(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
        if not evaluation.touched():
            return _jaxpr.bind(eqn, arrays)
        return evaluate(evaluation, eqn, arrays)

    return evaluated


def _inlined(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    (frame,) = evaluation.inner()
    return evaluation.call(frame, _jaxpr.body(eqn), arrays)


def _rematerialized(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    run = jax.checkpoint(lambda *arrays: _inlined(evaluation, eqn, list(arrays)), **options)
    return list(run(*arrays))


def _custom_jvp(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    """The rule of the function itself: its jaxpr at full size, at the smaller sizes."""
    avals = [atom.aval for atom in eqn.invars]
    moving = [i for i, aval in enumerate(avals) if _leaves.is_inexact(_jaxpr.abstract(aval))]

    def pushed(*arrays: Any) -> Any:
        primals, tangents = arrays[: len(avals)], arrays[len(avals) :]
        run = _of_some(_jaxpr.function_of(eqn), primals, moving)
        return jax.jvp(run, tuple(primals[i] for i in moving), tangents)

    run = jax.custom_jvp(lambda *arrays: _inlined(evaluation, eqn, list(arrays)))

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        rows = [*eqn.invars, *(eqn.invars[i] for i in moving)]
        small = evaluation.derived(pushed, [_jaxpr.abstract(atom.aval) for atom in rows], rows)
        answers = small(*primals, *(tangents[i] for i in moving))
        half = len(answers) // 2
        return answers[:half], answers[half:]

    return list(run(*arrays))


def _custom_vjp(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    """Likewise; what the backward pass needs is computed anew there."""
    avals = [atom.aval for atom in eqn.invars]
    moving = [i for i, aval in enumerate(avals) if _leaves.is_inexact(_jaxpr.abstract(aval))]
    floats = [
        i for i, atom in enumerate(eqn.outvars) if _leaves.is_inexact(_jaxpr.abstract(atom.aval))
    ]

    def pulled(*arrays: Any) -> Any:
        primals, cotangents = arrays[: len(avals)], arrays[len(avals) :]
        run = _of_some(_jaxpr.function_of(eqn), primals, moving)
        outputs, pull = jax.vjp(
            lambda *moved: [run(*moved)[i] for i in floats], *(primals[i] for i in moving)
        )
        del outputs
        return pull(list(cotangents))

    run = jax.custom_vjp(lambda *arrays: _inlined(evaluation, eqn, list(arrays)))

    def backward(primals: Any, cotangents: Any) -> Any:
        rows = [*eqn.invars, *(eqn.outvars[i] for i in floats)]
        small = evaluation.derived(pulled, [_jaxpr.abstract(atom.aval) for atom in rows], rows)
        found = dict(zip(moving, small(*primals, *(cotangents[i] for i in floats)), strict=True))
        return tuple(found.get(i) for i in range(len(avals)))

    run.defvjp(lambda *arrays: (_inlined(evaluation, eqn, list(arrays)), arrays), backward)
    return list(run(*arrays))


def _of_some(function: Callable[..., Any], args: Sequence[Any], moving: Sequence[int]) -> Any:
    """A function of some of its arguments, the others held."""

    def run(*moved: Any) -> Any:
        filled = list(args)
        for i, value in zip(moving, moved, strict=True):
            filled[i] = value
        return function(*filled)

    return run


def _scan(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    params = eqn.params
    consts, carry, xs = _jaxpr.scan_parts(eqn, values)
    (frame,) = step.inner(1)
    frame.repeats = params["length"]
    rows = []
    for value in xs:
        step.lock(value.axes[0], f"{step.where} runs over it")
        rows.append(dataclasses.replace(value, axes=value.axes[1:], known=value.uniform))

    def turn(carry: list[Value]) -> tuple[list[Value], list[Value]]:
        outs = step.call(frame, params["jaxpr"], [*consts, *carry, *rows])
        return outs[: len(carry)], outs[len(carry) :]

    carry, ys = _settled(step, carry, turn)
    length = fixed(params["length"], f"{step.where} runs over it")
    return [*carry, *(Value((length, *y.axes)) for y in ys)]


def _settled(
    step: Step, carry: list[Value], turn: Callable[[list[Value]], tuple[list[Value], list[Value]]]
) -> tuple[list[Value], list[Value]]:
    """A carry that is the same after another turn, and what else that turn gave."""
    carry = [Value(value.axes) for value in carry]
    for _ in range(_MOST_ROUNDS):
        outs, others = turn(carry)
        new = [Value(_met(step, [a, b])) for a, b in zip(carry, outs, strict=True)]
        if all(map(_same, carry, new)):
            return new, others
        carry = new
    carry = [Value(tuple(a.with_zero(False) for a in value.axes)) for value in carry]
    return carry, turn(carry)[1]


def _met(step: Step, values: Sequence[Value]) -> tuple[Axis, ...]:
    """The axes of values that stand for each other: zero where all are."""
    axes = [step.unify(*columns) for columns in zip(*(v.axes for v in values), strict=True)]
    if not all(v.weight for v in values):
        for value in values:
            step.produce(value)
        axes = [Axis(a.size, a.labels, a.zero, why=a.why) for a in axes]
    return tuple(axes)


def _same(a: Value, b: Value) -> bool:
    return all(
        (x.labels is None) == (y.labels is None) and np.array_equal(x.zero, y.zero)
        for x, y in zip(a.axes, b.axes, strict=True)
    )


def _smaller_scan(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    params = eqn.params
    consts, carry, xs = _jaxpr.scan_parts(eqn, arrays)
    (frame,) = evaluation.inner()

    def turn(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = evaluation.call(frame, params["jaxpr"], [*consts, *carry, *row])
        return outs[: len(carry)], outs[len(carry) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(turn, carry, xs, **options)
    return [*carry, *ys]


def _while(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    params = eqn.params
    cond, body, carry = _jaxpr.parted(values, params["cond_nconsts"], params["body_nconsts"])
    asked, made = step.inner(2)

    def turn(carry: list[Value]) -> tuple[list[Value], list[Value]]:
        step.call(asked, params["cond_jaxpr"], [*cond, *carry])
        return step.call(made, params["body_jaxpr"], [*body, *carry]), []

    return _settled(step, carry, turn)[0]


def _smaller_while(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    params = eqn.params
    cond, body, carry = _jaxpr.parted(arrays, params["cond_nconsts"], params["body_nconsts"])
    asked, made = evaluation.inner()
    return list(
        lax.while_loop(
            lambda carry: evaluation.call(asked, params["cond_jaxpr"], [*cond, *carry])[0],
            lambda carry: evaluation.call(made, params["body_jaxpr"], [*body, *carry]),
            carry,
        )
    )


def _cond(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    branches = eqn.params["branches"]
    step.frame.alternatives.add(step.place)
    rows = zip(step.inner(len(branches)), branches, strict=True)
    outs = [step.call(frame, branch, values[1:]) for frame, branch in rows]
    return [
        Value(_met(step, column), all(v.weight for v in column))
        for column in zip(*outs, strict=True)
    ]


def _smaller_cond(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    index, *operands = arrays
    rows = zip(evaluation.inner(), eqn.params["branches"], strict=True)

    def run(frame: Any, branch: Any) -> Callable[..., Any]:
        return lambda *operands: evaluation.call(frame, branch, operands)

    return list(lax.switch(index, [run(frame, branch) for frame, branch in rows], *operands))


_rules.add(
    _rules.Rule(_call, _if_touched(_inlined)), "jit", "pjit", "closed_call", "core_call", "call"
)
_rules.add(_rules.Rule(_call, _if_touched(_rematerialized)), "remat2", "checkpoint", "remat")
_rules.add(_rules.Rule(_call, _if_touched(_custom_jvp)), "custom_jvp_call")
_rules.add(_rules.Rule(_call, _if_touched(_custom_vjp)), "custom_vjp_call", "custom_vjp_call_jaxpr")
_rules.add(_rules.Rule(_scan, _if_touched(_smaller_scan)), "scan")
_rules.add(_rules.Rule(_while, _if_touched(_smaller_while)), "while")
_rules.add(_rules.Rule(_cond, _if_touched(_smaller_cond)), "cond")
