"""Rules of primitives that work entry by entry, and of reductions, sorts and windows."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparsejax import _jaxpr
from sparsejax.dependency import _rules
from sparsejax.dependency._evaluator import Evaluation
from sparsejax.dependency._tracer import Step
from sparsejax.dependency._values import Axis, Value, fixed

_ENTRYWISE = tuple(
    """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp
exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to lgamma log log1p logistic
lt lt_to max min mul mulhi ne neg nextafter not or polygamma population_count pow real
reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint
shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
tan tanh xor bitcast_convert_type zeta name device_put
""".split()  # noqa: SIM905
)

# Zero of zeros: known without asking.
_KEEP_ZERO = frozenset(
    """
abs add add_any asinh atan ceil convert_element_type copy copy_p erf expm1 floor log1p max min neg
or real reduce_precision round sign sin sinh sqrt square stop_gradient sub tan tanh xor
""".split()  # noqa: SIM905
)

# Sums of what is removed: nothing, where it is zero.
_SUMS = ("reduce_sum", "reduce_or", "reduce_xor")
_OTHER_REDUCTIONS = ("reduce_max", "reduce_min", "reduce_prod", "reduce_and")
_OTHER_SCANS = ("cumlogsumexp", "cummax", "cummin", "cumprod")
_SORTS = {"sort": "dimension", "top_k": "axis", "approx_top_k": "reduction_dimension"}


def _entrywise(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    (out,) = eqn.outvars
    shape = out.aval.shape
    full = [v for v in values if v.axes]
    if any(len(v.axes) != len(shape) for v in full):
        return step.give_up(values, f"ranks differ in {step.where}")
    weight = all(v.weight for v in values)
    axes = []
    for d, size in enumerate(shape):
        # An axis of one index stands for all of them.
        along = [bool(v.axes) and v.axes[d].size == size for v in values]
        columns = [v.axes[d] for v, yes in zip(values, along, strict=True) if yes]
        for value, yes in zip(values, along, strict=True):
            if value.axes and not yes:
                step.lock(value.axes[d], f"{step.where} repeats it")
        zero = _zeros(
            eqn,
            values,
            [v.axes[d].zero if yes else None for v, yes in zip(values, along, strict=True)],
        )
        axes.append(step.unify(*columns).with_zero(zero))
    if not weight:
        for value in values:
            step.produce(value)
        axes = [Axis(a.size, a.labels, a.zero, why=a.why) for a in axes]
    known = _uniform(eqn, values)
    return [Value(tuple(axes), weight, known)]


def _zeros(eqn: Any, values: Sequence[Value], states: Sequence[Any]) -> np.ndarray:
    """Where the answer is zero, from where the operands are."""
    columns = [zero for zero in states if zero is not None]
    if not columns:
        return np.zeros((), bool)
    # Which operands are zero, index by index, as one number each.
    codes = sum(column.astype(np.int64) << i for i, column in enumerate(columns))
    patterns, place = np.unique(codes, return_inverse=True)
    answers = []
    for pattern in patterns.tolist():
        flags = iter([pattern >> i & 1 for i in range(len(columns))])
        numbers = [
            _number(value, False if state is None else bool(next(flags)))
            for value, state in zip(values, states, strict=True)
        ]
        answers.append(_is_zero(eqn, numbers))
    return np.array(answers, bool)[place.reshape(-1)]


def _number(value: Value, zero: bool) -> Any:
    """The one number that a value has at an index, None where it is not known."""
    if zero:
        return 0
    return value.uniform


def _is_zero(eqn: Any, numbers: Sequence[Any]) -> bool:
    name = eqn.primitive.name
    zeros = [x is not None and x == 0 for x in numbers]
    if name in ("mul", "and"):
        return any(zeros)
    if name in _KEEP_ZERO and all(zeros):
        return True
    if name in ("div", "rem"):
        return zeros[0] and not zeros[1]
    if name == "select_n" and numbers[0] is None:
        return all(zeros[1:])
    answer = _evaluated(eqn, numbers)
    return answer is not None and bool(answer == 0)


def _uniform(eqn: Any, values: Sequence[Value]) -> np.ndarray | None:
    return _evaluated(eqn, [_number(v, False) for v in values])


def _evaluated(eqn: Any, numbers: Sequence[Any]) -> np.ndarray | None:
    """The primitive on numbers, None where one is not known."""
    if any(x is None for x in numbers):
        return None
    with jax.ensure_compile_time_eval():
        scalars = [
            np.asarray(x, atom.aval.dtype) for x, atom in zip(numbers, eqn.invars, strict=True)
        ]
        try:
            return np.asarray(_jaxpr.bind(eqn, scalars)[0])
        except (TypeError, ValueError, NotImplementedError):
            return None


def _identity(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    del step, eqn
    return values


def _looked_at(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    """Nothing comes of it: what is printed is smaller, too."""
    del step, eqn, values
    return []


def _reduction(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    (value,) = values
    exact = eqn.primitive.name in _SUMS
    for d in eqn.params["axes"]:
        axis = value.axes[d]
        if axis.labels is None:
            continue
        rest = axis.labels[~axis.zero] if exact else axis.labels
        step.inexact(rest, "a reduction without a parameter")
        step.tracer.labels.mark("mingled", axis.labels, step.where)
        step.rerun(axis, f"a mean would divide by its size: {step.where}")
    axes = tuple(axis for d, axis in enumerate(value.axes) if d not in eqn.params["axes"])
    known = value.uniform if eqn.primitive.name in ("reduce_max", "reduce_min") else None
    return [Value(axes, value.weight, known)]


def _arg_reduction(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    rest = [_locked(step, value, eqn.params["axes"]) for value in values]
    axes = [axis for d, axis in enumerate(rest[0]) if d not in eqn.params["axes"]]
    return [Value(tuple(a.with_zero(False) for a in axes))]


def _reduce(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    half = len(values) // 2
    rows = [_locked(step, value, eqn.params["dimensions"]) for value in values[:half]]
    columns = [step.unify(*axes).with_zero(False) for axes in zip(*rows, strict=True)]
    axes = tuple(a for d, a in enumerate(columns) if d not in eqn.params["dimensions"])
    return [Value(axes) for _ in eqn.outvars]


def _cumulative(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    (value,) = values
    d = eqn.params["axis"]
    axis = value.axes[d]
    if axis.labels is not None:
        exact = eqn.primitive.name == "cumsum"
        rest = axis.labels[~axis.zero] if exact else axis.labels
        step.inexact(rest, "a running reduction without a parameter")
        step.tracer.labels.mark("mingled", axis.labels, step.where)
    axes = [a.with_zero(False) if i == d else a for i, a in enumerate(value.axes)]
    return [Value(tuple(axes), value.weight)]


def _sort(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    rank = len(values[0].axes)
    d = eqn.params.get(_SORTS[eqn.primitive.name], rank - 1) % rank
    rows = [_locked(step, value, (d,)) for value in values]
    axes = [step.unify(*columns).with_zero(False) for columns in zip(*rows, strict=True)]
    answers = []
    for atom in eqn.outvars:
        own = [fixed(atom.aval.shape[i], a.why) if i == d else a for i, a in enumerate(axes)]
        answers.append(Value(tuple(own)))
    return answers


def _window(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    """Windows over some axes; the others pass. Operands and results have the same axes."""
    arrays = [v for v in values if v.axes]
    sizes = eqn.params["window_dimensions"]
    moving = [d for d, size in enumerate(sizes) if size > 1 or not _still(eqn.params, d)]
    rows = [_locked(step, value, moving) for value in arrays]
    whole = eqn.primitive.name in ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
    answers = []
    for atom in eqn.outvars:
        axes = []
        for d, columns in enumerate(zip(*rows, strict=True)):
            if d in moving:
                axes.append(fixed(atom.aval.shape[d], columns[0].why))
            else:
                axis = step.unify(*columns)
                axes.append(axis.with_zero(axis.zero & whole))
        answers.append(Value(tuple(axes)))
    return answers


def _still(params: dict[str, Any], d: int) -> bool:
    """Whether a window of one index leaves an axis as it is."""
    strides = params.get("window_strides")
    padding = params.get("padding")
    dilation = params.get("base_dilation")
    return (
        (strides is None or strides[d] == 1)
        and (padding is None or tuple(padding[d]) == (0, 0))
        and (dilation is None or dilation[d] == 1)
    )


def _fft(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    (value,) = values
    rank = len(value.axes)
    first = rank - len(eqn.params["fft_lengths"])
    axes = _locked(step, value, range(first, rank))
    shape = eqn.outvars[0].aval.shape
    own = [axis if d < first else fixed(shape[d], step.where) for d, axis in enumerate(axes)]
    return [Value(tuple(own))]


def _locked(step: Step, value: Value, which: Sequence[int]) -> list[Axis]:
    """The axes of a value, some of them locked."""
    return [
        step.fix(axis, f"{step.where} runs over it") if d in which else axis
        for d, axis in enumerate(value.axes)
    ]


def _source(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    del eqn
    return step.sourced(values)


def _whole(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    """At full size, and then what stays of it: the same random numbers for the same units."""
    rows = zip(eqn.outvars, _jaxpr.bind(eqn, arrays), strict=True)
    return [evaluation.cut(atom, array) for atom, array in rows]


_rules.add(_rules.Rule(_entrywise), *_ENTRYWISE)
_rules.add(_rules.Rule(_identity), "optimization_barrier")
_rules.add(_rules.Rule(_looked_at), "debug_callback", "debug_print")
_rules.add(_rules.Rule(_reduction), *_SUMS, *_OTHER_REDUCTIONS)
_rules.add(_rules.Rule(_arg_reduction), "argmax", "argmin")
_rules.add(_rules.Rule(_reduce), "reduce")
_rules.add(_rules.Rule(_cumulative), "cumsum", *_OTHER_SCANS)
_rules.add(_rules.Rule(_sort), *_SORTS)
_rules.add(
    _rules.Rule(_window),
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    "reduce_window",
    "select_and_gather_add",
    "select_and_scatter_add",
)
_rules.add(_rules.Rule(_fft), "fft")
_rules.add(_rules.Rule(_source, _whole), "iota", "random_bits", "rng_uniform")
