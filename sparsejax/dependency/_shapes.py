"""Rules of primitives that move axes and indices: reshape, transpose, slice, concatenate, pad."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from sparsejax import _jaxpr
from sparsejax.dependency import _rules
from sparsejax.dependency._evaluator import Evaluation, take
from sparsejax.dependency._tracer import Step
from sparsejax.dependency._values import Axis, Value, fixed


def _passed(value: Value, axes: Sequence[Axis]) -> list[Value]:
    """A value of other axes: as much a weight, and the same number everywhere if it was."""
    return [Value(tuple(axes), value.weight, value.uniform)]


def _transpose(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    del step
    return _passed(values[0], [values[0].axes[d] for d in eqn.params["permutation"]])


def _reverse(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    del step
    turned = eqn.params["dimensions"]
    back = slice(None, None, -1)
    rows = enumerate(values[0].axes)
    return _passed(values[0], [axis.take(back) if d in turned else axis for d, axis in rows])


def _squeeze(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    for d in gone:
        step.lock(values[0].axes[d], f"{step.where} drops its axis")
    return _passed(values[0], [axis for d, axis in enumerate(values[0].axes) if d not in gone])


def _broadcast(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    value, shape = values[0], eqn.params["shape"]
    to = {d: value.axes[i] for i, d in enumerate(eqn.params["broadcast_dimensions"])}
    nothing = value.uniform is not None and bool(value.uniform == 0)
    axes = []
    for d, size in enumerate(shape):
        axis = to.get(d)
        if axis is None or axis.size != size:
            if axis is not None:
                step.lock(axis, f"{step.where} repeats it")
            axis = step.tracer.fresh(size, nothing)
        axes.append(axis)
    return _passed(value, axes)


def _smaller_broadcast(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    return _jaxpr.bind(eqn, arrays, shape=evaluation.shape(eqn.outvars[0]))


def _reshape(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    value, shape = values[0], eqn.outvars[0].aval.shape
    if 0 in shape:
        return step.give_up(values, f"no entries in {step.where}")
    for axis in value.axes:
        if axis.size == 1:
            step.lock(axis, f"{step.where} drops its axis")
    axes: list[Axis] = [fixed(1, "it has one index")] * len(shape)
    wide = [axis for axis in value.axes if axis.size > 1]
    targets = [d for d, size in enumerate(shape) if size > 1]
    while wide:
        before, after = [wide.pop(0)], [targets.pop(0)]
        while (have := _size(a.size for a in before)) != (want := _size(shape[d] for d in after)):
            if have < want:
                before.append(wide.pop(0))
            else:
                after.append(targets.pop(0))
        parts = step.split(step.merge(before), [shape[d] for d in after])
        for d, axis in zip(after, parts, strict=True):
            axes[d] = axis
    return _passed(value, axes)


def _size(sizes: Any) -> int:
    return int(np.prod(list(sizes)))


def _smaller_reshape(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    return _jaxpr.bind(eqn, arrays, new_sizes=evaluation.shape(eqn.outvars[0]))


def _slice(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    rows = zip(values[0].axes, _slices(eqn), strict=True)
    return _passed(values[0], [step.pick(axis, index) for axis, index in rows])


def _slices(eqn: Any) -> list[slice]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    return [slice(int(a), int(b), int(c)) for a, b, c in zip(starts, limits, strides, strict=True)]


def _smaller_slice(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    (array,) = arrays
    for axis, index in enumerate(_slices(eqn)):
        array = part(evaluation, eqn.invars[0], array, axis, index)
    return [array]


def part(evaluation: Evaluation, atom: Any, array: Any, axis: int, index: Any) -> Any:
    """The indices `index` (of the full axis) of what stays of it."""
    mask = evaluation.kept(atom, axis)
    chosen = np.arange(len(mask))[index]
    places = (np.cumsum(mask) - 1)[chosen[mask[chosen]]]
    if np.array_equal(places, np.arange(mask.sum())):
        return array
    return take(array, places, axis)


def _split(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    (value,) = values
    d = eqn.params["axis"]
    answers = []
    for index in _pieces(eqn):
        axes = [step.pick(a, index) if i == d else a for i, a in enumerate(value.axes)]
        answers += _passed(value, axes)
    return answers


def _pieces(eqn: Any) -> list[slice]:
    ends = np.cumsum(eqn.params["sizes"]).tolist()
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _smaller_split(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    axis = eqn.params["axis"]
    mask = evaluation.kept(eqn.invars[0], axis)
    return _jaxpr.bind(eqn, arrays, sizes=tuple(int(mask[i].sum()) for i in _pieces(eqn)))


def _joined(values: Sequence[Value], axes: Sequence[Axis]) -> list[Value]:
    """A value made of several."""
    numbers = [v.uniform for v in values]
    same = all(x is not None and x == numbers[0] for x in numbers)
    return [Value(tuple(axes), all(v.weight for v in values), numbers[0] if same else None)]


def _concatenate(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    d = eqn.params["dimension"]
    columns = list(zip(*(v.axes for v in values), strict=True))
    axes = [step.join(c) if i == d else step.unify(*c) for i, c in enumerate(columns)]
    return _active(step, values, axes)


def _stack(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    axes = [step.unify(*c) for c in zip(*(v.axes for v in values), strict=True)]
    # Along the new axis stands a value each, none of which can go.
    axes.insert(eqn.params["axis"], fixed(len(values), step.where))
    return _active(step, values, axes)


def _active(step: Step, values: list[Value], axes: list[Axis]) -> list[Value]:
    """What weights give to a value that is made of them and of others."""
    joined = _joined(values, axes)
    if not joined[0].weight:
        for value in values:
            step.produce(value)
        axes = [Axis(a.size, a.labels, a.zero, why=a.why) for a in axes]
        return _joined(values, axes)
    return joined


def _unstack(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    (value,) = values
    d = eqn.params["axis"]
    step.lock(value.axes[d], f"{step.where} takes it apart")
    axes = [axis for i, axis in enumerate(value.axes) if i != d]
    return [_passed(value, axes)[0] for _ in eqn.outvars]


def _tile(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    axes = [
        axis if count == 1 else step.merge([step.tracer.fresh(int(count)), axis])
        for axis, count in zip(values[0].axes, eqn.params["reps"], strict=True)
    ]
    return _passed(values[0], axes)


def _smaller_tile(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    (array,) = arrays
    rows = zip(evaluation.shape(eqn.outvars[0]), array.shape, strict=True)
    return _jaxpr.bind(eqn, arrays, reps=tuple(out // own if own else 1 for out, own in rows))


def _pad(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    value, filler = values
    nothing = filler.known is not None and bool(filler.known == 0)
    axes = []
    for axis, (low, high, between) in zip(value.axes, _padding(eqn), strict=True):
        own = axis
        if between:
            size = max(low + high + axis.size + (axis.size - 1) * between, 0)
            step.lock(axis, f"{step.where} pads between its indices")
            own = fixed(size, step.where)
        elif low or high:
            own = step.pick(axis, _cropped(axis.size, low, high))
            # These have labels of their own even where there is one: it may go, the others stay.
            sides = [
                Axis(n, step.tracer.labels.fresh(n), np.full(n, nothing))
                for n in (max(low, 0), max(high, 0))
            ]
            pieces = [a for a in (sides[0], own, sides[1]) if a.size]
            own = step.join(pieces) if pieces else fixed(0, step.where)
        axes.append(own.with_zero(own.zero & nothing))
    return [Value(tuple(axes), value.weight and filler.weight)]


def _padding(eqn: Any) -> list[tuple[int, int, int]]:
    """How many entries stand before, behind and between those of each axis."""
    return [(int(a), int(b), int(c)) for a, b, c in eqn.params["padding_config"]]


def _cropped(size: int, low: int, high: int) -> slice:
    """What negative padding leaves."""
    return slice(max(-low, 0), max(size + min(high, 0), 0))


def _smaller_pad(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    array, filler = arrays
    config = []
    for d, (low, high, between) in enumerate(_padding(eqn)):
        if not between and (low or high):
            index = _cropped(eqn.invars[0].aval.shape[d], low, high)
            array = part(evaluation, eqn.invars[0], array, d, index)
            mask = evaluation.kept(eqn.outvars[0], d)
            low, high = max(low, 0), max(high, 0)
            low, high = int(mask[:low].sum()), int(mask[len(mask) - high :].sum())
        config.append((low, high, between))
    return [lax.pad(array, filler, config)]


_rules.add(_rules.Rule(_transpose), "transpose")
_rules.add(_rules.Rule(_reverse), "rev")
_rules.add(_rules.Rule(_squeeze), "squeeze")
_rules.add(_rules.Rule(_broadcast, _smaller_broadcast), "broadcast_in_dim")
_rules.add(_rules.Rule(_reshape, _smaller_reshape), "reshape")
_rules.add(_rules.Rule(_slice, _smaller_slice), "slice")
_rules.add(_rules.Rule(_split, _smaller_split), "split")
_rules.add(_rules.Rule(_concatenate), "concatenate")
_rules.add(_rules.Rule(_stack), "stack")
_rules.add(_rules.Rule(_unstack), "unstack")
_rules.add(_rules.Rule(_tile, _smaller_tile), "tile")
_rules.add(_rules.Rule(_pad, _smaller_pad), "pad")
