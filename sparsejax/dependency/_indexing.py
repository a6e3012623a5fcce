"""Rules of indexing: gather, scatter, dynamic slices.

Axes that an index does not look into pass. An axis into which known numbers look is a rearrangement
of indices; one into which the data look is locked.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import _jaxpr
from sparsejax.dependency import _rules
from sparsejax.dependency._evaluator import Evaluation
from sparsejax.dependency._shapes import part
from sparsejax.dependency._tracer import Step
from sparsejax.dependency._values import Axis, Value, fixed


def _gather(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    array, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.outvars[0].aval.shape
    looked = _known_index(eqn, indices)
    why = f"{step.where} looks into it"
    batch = list(indices.axes[:-1])
    window = []
    for d, axis in enumerate(array.axes):
        if d in numbers.operand_batching_dims:
            place = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(d)]
            batch[place] = step.unify(axis, batch[place])
        elif looked is not None and d in numbers.start_index_map:
            batch = [step.pick(axis, looked)]
        elif d in numbers.collapsed_slice_dims:
            step.lock(axis, why)
        elif sizes[d] != axis.size or d in numbers.start_index_map:
            window.append(fixed(sizes[d], step.fix(axis, why).why))
        else:
            window.append(axis)
    before, inside = iter(batch), iter(window)
    axes = [next(inside) if d in numbers.offset_dims else next(before) for d in range(len(shape))]
    if array.weight and not indices.weight:
        step.produce(array, window)
        axes = [Axis(a.size, a.labels, a.zero, why=a.why) for a in axes]
    return [Value(tuple(axes), array.weight and indices.weight)]


def _known_index(eqn: Any, indices: Value) -> np.ndarray | None:
    """The indices of one axis where they are known, in a row, and inside it."""
    numbers = eqn.params["dimension_numbers"]
    known = indices.known
    if known is None or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (d,) = numbers.start_index_map
    if numbers.collapsed_slice_dims != (d,) or len(indices.shape) != 2:
        return None
    index = np.broadcast_to(known, indices.shape)[:, 0]
    size = eqn.invars[0].aval.shape[d]
    return index if ((index >= 0) & (index < size)).all() else None


def _smaller_gather(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    array, indices = arrays
    numbers = eqn.params["dimension_numbers"]
    full = eqn.invars[0].aval.shape
    if array.shape != full and len(numbers.start_index_map) == 1:
        (d,) = numbers.start_index_map
        (out,) = eqn.outvars
        batch = [i for i in range(len(out.aval.shape)) if i not in numbers.offset_dims]
        if array.shape[d] != full[d] or (
            len(batch) == 1 and not evaluation.kept(out, batch[0]).all()
        ):
            # The axis was rearranged by known indices: those of what stays, among what stays.
            known = np.asarray(indices)[:, 0][evaluation.kept(out, batch[0])]
            places = np.cumsum(evaluation.kept(eqn.invars[0], d)) - 1
            return [jnp.moveaxis(jnp.take(array, places[known], d), d, batch[0])]
    sizes = [
        array.shape[d] if size == full[d] else size
        for d, size in enumerate(eqn.params["slice_sizes"])
    ]
    return _jaxpr.bind(eqn, arrays, slice_sizes=tuple(sizes))


def _scatter(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    array, indices, updates = values
    numbers = eqn.params["dimension_numbers"]
    why = f"{step.where} writes into it"
    windows = iter(numbers.update_window_dims)
    axes = []
    for d, axis in enumerate(array.axes):
        if d in numbers.inserted_window_dims or d in numbers.operand_batching_dims:
            axes.append(step.fix(axis, why))
            continue
        other = updates.axes[next(windows)]
        if other.size == axis.size and d not in numbers.scatter_dims_to_operand_dims:
            axes.append(step.unify(axis, other))
        else:
            step.lock(other, why)
            axes.append(step.fix(axis, why))
    for d, axis in enumerate(updates.axes):
        if d not in numbers.update_window_dims:
            step.lock(axis, why)
    for axis in indices.axes:
        step.lock(axis, why)
    step.produce(array, axes)
    return [Value(tuple(axes))]


def _dynamic_slice(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    array, *starts = values
    axes = []
    for axis, size, start in zip(array.axes, eqn.params["slice_sizes"], starts, strict=True):
        if size == axis.size:
            axes.append(axis)
        elif start.known is not None:
            first = _clamped(start.known, axis.size, size)
            axes.append(step.pick(axis, slice(first, first + size)))
        else:
            axes.append(fixed(size, step.fix(axis, f"{step.where} looks into it").why))
    return [Value(tuple(axes), array.weight)]


def _clamped(start: Any, size: int, length: int) -> int:
    return max(0, min(int(start), size - length))


def _smaller_dynamic_slice(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    array, *starts = arrays
    full = eqn.invars[0].aval.shape
    sizes = list(eqn.params["slice_sizes"])
    for d, size in enumerate(sizes):
        if size == full[d] or array.shape[d] == full[d]:
            sizes[d] = array.shape[d] if size == full[d] else size
        else:
            first = _clamped(np.asarray(starts[d]), full[d], size)
            array = part(evaluation, eqn.invars[0], array, d, slice(first, first + size))
            sizes[d] = array.shape[d]
    return _jaxpr.bind(eqn, [array, *starts], slice_sizes=tuple(sizes))


def _dynamic_update_slice(step: Step, eqn: Any, values: list[Value]) -> list[Value]:
    del eqn
    array, update, *_ = values
    why = f"{step.where} writes into it"
    axes = []
    for own, new in zip(array.axes, update.axes, strict=True):
        if own.size == new.size:
            axes.append(step.unify(own, new))
        else:
            step.lock(new, why)
            axes.append(step.fix(own, why))
    if not (array.weight and update.weight):
        step.produce(array)
        step.produce(update)
    return [Value(tuple(axes))]


_rules.add(_rules.Rule(_gather, _smaller_gather), "gather")
_rules.add(_rules.Rule(_scatter), "scatter", "scatter-add", "scatter_add", "scatter-mul")
_rules.add(_rules.Rule(_scatter), "scatter_mul", "scatter_min", "scatter_max", "scatter-min")
_rules.add(_rules.Rule(_scatter), "scatter-max")
_rules.add(_rules.Rule(_dynamic_slice, _smaller_dynamic_slice), "dynamic_slice")
_rules.add(_rules.Rule(_dynamic_update_slice), "dynamic_update_slice")
