"""Rules of products: dot_general and convolutions of every kind."""

import math
from typing import Any

import numpy as np

from sparsejax import _jaxpr
from sparsejax.dependency import _rules
from sparsejax.dependency._evaluator import Evaluation
from sparsejax.dependency._tracer import Operations, Step
from sparsejax.dependency._values import Axis, Value, fixed


def _dot_general(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    left, right = values
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    weights = (left.weight, right.weight)
    out = []
    for i, j in zip(left_batch, right_batch, strict=True):
        zero = left.axes[i].zero | right.axes[j].zero
        out.append(step.unify(left.axes[i], right.axes[j]).with_zero(zero))
    for i, j in zip(left_sum, right_sum, strict=True):
        step.contract(left.axes[i], right.axes[j], weights)
    free = [
        [axis for d, axis in enumerate(value.axes) if d not in (*summed, *batch)]
        for value, summed, batch in ((left, left_sum, left_batch), (right, right_sum, right_batch))
    ]
    out += free[0] + free[1]
    if weights != (True, True):
        step.produce(left, free[0])
        step.produce(right, free[1])
        for value, batch in ((left, left_batch), (right, right_batch)):
            step.produce(value, [value.axes[d] for d in batch])
        out = [Axis(a.size, a.labels, a.zero, why=a.why) for a in out]
    summed = [
        _either(left.axes[i], right.axes[j]) for i, j in zip(left_sum, right_sum, strict=True)
    ]
    step.frame.operations[step.place] = _operations([*out, *summed])
    return [Value(tuple(out), all(weights))]


def _either(a: Axis, b: Axis) -> Axis:
    return b if a.labels is None else a


def _operations(axes: list[Axis], factor: int = 1) -> Operations:
    sizes = tuple(a.size if a.labels is None else a.labels for a in axes)
    return Operations(2 * factor, sizes)


def _convolution(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    image, kernel = values
    params = eqn.params
    if params["batch_group_count"] != 1:
        return step.give_up(values, f"batch groups of {step.where}")
    numbers = params["dimension_numbers"]
    batch, channels, *space = (image.axes[d] for d in numbers.lhs_spec)
    outputs, inputs, *window = (kernel.axes[d] for d in numbers.rhs_spec)
    for axis in (*space, *window):
        step.lock(axis, f"{step.where} moves a window over it")
    weights = (image.weight, kernel.weight)
    groups = params["feature_group_count"]
    zero = outputs.zero
    if groups == 1:
        step.contract(channels, inputs, weights)
    else:
        group, within = step.split(channels, (groups, channels.size // groups))
        rows, columns = step.split(outputs, (groups, outputs.size // groups))
        rows = step.unify(group, rows).with_zero(group.zero | rows.zero)
        step.contract(within, inputs, weights)
        # The kernel of a depthwise convolution has no axis of its own for the groups.
        both = np.broadcast_to(rows.zero[:, None] & columns.zero[None], (groups, columns.size))
        zero = zero | both.ravel()
        if outputs.labels is None and rows.labels is not None:
            outputs = step.merge([rows, columns])
    if not kernel.weight:
        step.produce(image, [batch])
    if not image.weight:
        step.produce(kernel, [outputs])
    shape = eqn.outvars[0].aval.shape
    out: list[Any] = [None] * len(shape)
    made = [batch, outputs.with_zero(zero), *(fixed(0, f"space of {step.where}") for _ in space)]
    for d, axis in zip(numbers.out_spec, made, strict=True):
        out[d] = axis if axis.size == shape[d] else fixed(shape[d], axis.why)
    taps = math.prod(axis.size for axis in window)
    places = math.prod(shape[d] for d in numbers.out_spec[2:])
    step.frame.operations[step.place] = _operations([batch, outputs, inputs], taps * places)
    if not all(weights):
        out = [Axis(a.size, a.labels, a.zero, why=a.why) for a in out]
    return [Value(tuple(out), all(weights))]


def _smaller_convolution(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    del evaluation
    numbers = eqn.params["dimension_numbers"]
    channels = arrays[0].shape[numbers.lhs_spec[1]]
    inputs = arrays[1].shape[numbers.rhs_spec[1]]
    return _jaxpr.bind(eqn, arrays, feature_group_count=channels // inputs)


_rules.add(_rules.Rule(_dot_general), "dot_general")
_rules.add(_rules.Rule(_convolution, _smaller_convolution), "conv_general_dilated")
