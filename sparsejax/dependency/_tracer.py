"""The trace of a jaxpr: labels flow along equations, and meet."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sparsejax import _jaxpr
from sparsejax.dependency._labels import Labels, Resolved
from sparsejax.dependency._values import Axis, Value, fixed, known_array

_TRIVIAL = "it has one index"


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating-point operations of an equation: `factor` times the product of the axes' sizes."""

    factor: int
    axes: tuple[np.ndarray | int, ...]


@dataclasses.dataclass(eq=False)
class Frame:
    """What a trace found in one call of a jaxpr.

    Attributes:
      labels: the labels of the axes of every value.
      inner: by the place of an equation, the frames of the jaxprs that it calls.
      operations: by the place of an equation, what it costs.
      constants: by the place of an equation, its outputs where they are small constants.
      uses: by the place of an equation and of its operand, the labels of a constant there; the
        outputs of the jaxpr are the operands of equation -1.
      shared: the constants, which stand at full size until they are used.
      alternatives: the places of equations of whose jaxprs only one runs.
      repeats: how often the jaxpr runs in one call, as far as that is known.
    """

    labels: dict[Any, tuple[np.ndarray | None, ...]] = dataclasses.field(default_factory=dict)
    inner: dict[int, tuple["Frame", ...]] = dataclasses.field(default_factory=dict)
    operations: dict[int, Operations] = dataclasses.field(default_factory=dict)
    constants: dict[int, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    uses: dict[tuple[int, int], tuple[np.ndarray | None, ...]] = dataclasses.field(
        default_factory=dict
    )
    shared: set[Any] = dataclasses.field(default_factory=set)
    alternatives: set[int] = dataclasses.field(default_factory=set)
    repeats: int = 1


Rule = Callable[["Step", Any, list[Value]], list[Value]]


class Tracer:
    """The state of a trace: labels, which axes of which variables are contracted, the rules."""

    def __init__(self, rules: Callable[[Any], Rule | None]) -> None:
        self.labels = Labels()
        self.consumed: set[tuple[int, int]] = set()
        self.produced: set[tuple[int, int]] = set()
        self.unknown: dict[str, str] = {}
        self.places: list[tuple[np.ndarray, Any, str]] = []
        # Of the call that is being traced: JAX keeps no lines in some of what it caches.
        self.line = ""
        self._rules = rules

    def run(self, frame: Frame, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]) -> Any:
        """Traces one call of an open jaxpr; its outputs."""
        env: dict[Any, Value] = {}

        def write(atoms: Sequence[Any], values: Sequence[Value]) -> None:
            for atom, value in zip(atoms, values, strict=True):
                env[atom] = value
                frame.labels[atom] = tuple(axis.labels for axis in value.axes)
                if value.constant:
                    frame.shared.add(atom)

        def read(atom: Any) -> Value:
            if _jaxpr.literal(atom):
                return self.constant(np.asarray(atom.val, atom.aval.dtype))
            return env[atom]

        write(jaxpr.constvars, consts)
        write(jaxpr.invars, args)
        for place, eqn in _jaxpr.live(jaxpr):
            step = Step(self, frame, place, eqn)
            values = [read(atom) for atom in eqn.invars]
            write(eqn.outvars, step.outputs(self._rules(eqn), values))
        return [self.use(frame, -1, i, read(atom)) for i, atom in enumerate(jaxpr.outvars)]

    def use(self, frame: Frame, place: int, operand: int, value: Value) -> Value:
        """An operand; a constant has new labels at every use, which couple it with nothing else."""
        if not value.constant:
            return value
        fresh = self.labels.fresh_like
        axes = tuple(
            a if a.labels is None else dataclasses.replace(a, labels=fresh(a.labels))
            for a in value.axes
        )
        frame.uses[place, operand] = tuple(axis.labels for axis in axes)
        return dataclasses.replace(value, axes=axes)

    def finish(self) -> Resolved:
        """What the labels come to after the last equation."""
        for labels, index, why in self.places:
            if not self._moves_along(labels, index):
                self.labels.mark("rerun", labels, why)
        return self.labels.resolve()

    def _moves_along(self, labels: np.ndarray, index: Any) -> bool:
        """Whether an n-th of an axis is an n-th of it after any cut: all n parts are cut alike."""
        if not isinstance(index, slice):
            return False
        size = len(range(*index.indices(len(labels))))
        if size == 0 or len(labels) % size:
            return False
        parts = self.labels.find(labels).reshape(-1, size)
        if abs(index.step or 1) > 1:
            parts = self.labels.find(labels).reshape(size, -1).T
        return bool((parts == parts[:1]).all())

    def constant(self, array: Any, origin: str | None = "the function closes over") -> Value:
        """A value that is the same whatever the inputs are; its indices may go with any others."""
        known = known_array(array)
        shape = np.shape(array)
        axes = []
        for i, size in enumerate(shape):
            zero = np.zeros(size, bool)
            if known is not None:
                rest = tuple(j for j in range(len(shape)) if j != i)
                zero = np.asarray(~known.astype(bool).any(rest))
            axis = self.fresh(size, zero)
            if axis.labels is not None and origin is not None:
                why = f"a constant of shape {shape} that {origin} would have to be cut"
                self.labels.mark("rerun", axis.labels, why)
            axes.append(axis)
        return Value(tuple(axes), weight=True, known=known, constant=True)

    def fresh(self, size: int, zero: Any = False) -> Axis:
        """An axis of its own labels; one of a single index is fixed."""
        if size == 1:
            return fixed(1, _TRIVIAL).with_zero(zero)
        return Axis(size, self.labels.fresh(size), np.zeros(size, bool)).with_zero(zero)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One equation in a trace; what rules do to axes."""

    tracer: Tracer
    frame: Frame
    place: int
    eqn: Any

    @property
    def where(self) -> str:
        """The primitive and the line of the user's code, for reasons."""
        line = _jaxpr.line(self.eqn) or self.tracer.line
        return f"{self.eqn.primitive.name} at {line}" if line else str(self.eqn.primitive.name)

    def outputs(self, rule: Rule | None, values: list[Value]) -> list[Value]:
        """What the equation makes of its operands."""
        known = self._evaluated(values)
        if known is not None:
            self.frame.constants[self.place] = known
            # One number everywhere can be made at any size.
            origins = [None if (x == x.flat[:1]).all() else f"{self.where} makes" for x in known]
            return list(map(self.tracer.constant, known, origins))
        use = self.tracer.use
        values = [use(self.frame, self.place, i, value) for i, value in enumerate(values)]
        if rule is not None:
            return rule(self, self.eqn, values)
        if any(axis.labels is not None for value in values for axis in value.axes):
            self.tracer.unknown.setdefault(self.eqn.primitive.name, self.where)
        return self.give_up(values, f"no rule for {self.where}")

    def give_up(self, values: Sequence[Value], why: str) -> list[Value]:
        """Locks all operands and fixes all outputs."""
        for value in values:
            for axis in value.axes:
                self.lock(axis, why)
        return [self.outside(atom, why) for atom in self.eqn.outvars]

    def outside(self, atom: Any, why: str) -> Value:
        """A value of which nothing is known."""
        return Value(tuple(fixed(size, why) for size in atom.aval.shape))

    def sourced(self, values: Sequence[Value]) -> list[Value]:
        """Outputs that are made at full size, whatever is removed of them afterwards."""
        for value in values:
            for axis in value.axes:
                self.lock(axis, self.where)
        answers = []
        for atom in self.eqn.outvars:
            axes = tuple(self.tracer.fresh(n) for n in atom.aval.shape)
            for axis in axes:
                self.rerun(axis, f"{self.where} makes a value of its full size")
            answers.append(Value(axes))
        return answers

    def inner(self, count: int) -> tuple[Frame, ...]:
        """The frames of the jaxprs that this equation calls."""
        frames = self.frame.inner.get(self.place)
        if frames is None:
            frames = self.frame.inner[self.place] = tuple(Frame() for _ in range(count))
        return frames

    def call(self, frame: Frame, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        """Traces a jaxpr that this equation calls."""
        open_, consts = _jaxpr.opened(jaxpr)
        made = [self.tracer.constant(array) for array in consts]
        before = self.tracer.line
        self.tracer.line = _jaxpr.line(self.eqn) or before
        outputs: list[Value] = self.tracer.run(frame, open_, made, args)
        self.tracer.line = before
        return outputs

    def lock(self, axis: Axis, why: str) -> None:
        """Forbids to remove any index of an axis."""
        if axis.labels is not None:
            self.tracer.labels.mark("locked", axis.labels, why)

    def rerun(self, axis: Axis, why: str) -> None:
        """Notes why the code itself may differ at a smaller size."""
        if axis.labels is not None:
            self.tracer.labels.mark("rerun", axis.labels, why)

    def pick(self, axis: Axis, index: Any) -> Axis:
        """Some indices of an axis, at places that the code may have fixed."""
        if np.array_equal(np.arange(axis.size)[index], np.arange(axis.size)):
            return axis
        if axis.labels is not None:
            why = f"{self.where} may look at fixed places of it"
            self.tracer.places.append((axis.labels, index, why))
        return axis.take(index)

    def fix(self, axis: Axis, why: str) -> Axis:
        """The axis, locked."""
        self.lock(axis, why)
        return fixed(axis.size, axis.why or why)

    def unify(self, *axes: Axis) -> Axis:
        """Axes whose indices are removed together; the first that is not fixed, zero where all are.

        Where one is fixed, the others are locked.
        """
        one, *others = axes
        for other in others:
            one = self._unify(one, other)
        return one

    def _unify(self, a: Axis, b: Axis) -> Axis:
        origins = a.origins | b.origins
        zero = a.zero & b.zero
        if a.labels is not None and b.labels is not None:
            if a.labels is not b.labels:
                self.tracer.labels.unify(a.labels, b.labels)
        elif a.labels is not None or b.labels is not None:
            own, bound = (a, b) if b.labels is None else (b, a)
            self.lock(own, f"{self.where} joins it with an axis that is fixed: {bound.why}")
            return dataclasses.replace(bound, zero=zero, origins=origins)
        return dataclasses.replace(a, zero=zero, origins=origins)

    def contract(self, a: Axis, b: Axis, weights: tuple[bool, bool]) -> None:
        """Sums the products of two values over an axis of each."""
        self.unify(a, b)
        labels = a.labels if a.labels is not None else b.labels
        if labels is None:
            return
        self.inexact(labels[~(a.zero | b.zero)], "a product without a parameter")
        marks = self.tracer.labels
        if weights[0] == weights[1]:
            marks.mark("mingled", labels, self.where)
        if weights == (False, False):
            marks.mark("rerun", labels, f"its size may scale the result of {self.where}")
        elif weights != (True, True):
            weight, active = (a, b) if weights[0] else (b, a)
            self.tracer.consumed |= weight.origins
            if not weight.origins:
                marks.mark("mingled", labels, self.where)
            loud = labels[~active.zero]
            marks.mark("audible", loud, f"{self.where} reads it where it may not be zero")

    def inexact(self, labels: np.ndarray, what: str) -> None:
        """Notes that the small function differs from the masked one."""
        if labels.size:
            self.tracer.labels.mark("inexact", labels, f"{what}: {self.where}")

    def produce(self, value: Value, axes: Sequence[Axis] | None = None) -> None:
        """Notes that a weight gives these axes to what is computed of the inputs."""
        if value.weight:
            for axis in value.axes if axes is None else axes:
                self.tracer.produced |= axis.origins

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """An axis as several, the first the slowest."""
        if len(sizes) == 1:
            return [axis]
        if axis.labels is None:
            return [fixed(size, axis.why) for size in sizes]
        if sizes[0] == 1:
            return [fixed(1, _TRIVIAL), *self.split(axis, sizes[1:])]
        rest = int(np.prod(sizes[1:]))
        if rest == 1:
            return [axis, *(fixed(1, _TRIVIAL) for _ in sizes[1:])]
        first, second = self._factors(axis, sizes[0], rest)
        return [first, *self.split(second, sizes[1:])]

    def _factors(self, axis: Axis, rows: int, columns: int) -> tuple[Axis, Axis]:
        assert axis.labels is not None
        labels, roots = axis.labels, self.tracer.labels.find(axis.labels).reshape(rows, columns)
        zero = axis.zero.reshape(rows, columns)
        by_row, by_column = np.all(zero, axis=1), np.all(zero, axis=0)
        if (roots == roots[:1]).all():
            first = fixed(rows, "all its rows go together")
            second = Axis(columns, labels[:columns], by_column)
        elif (roots == roots[:, :1]).all():
            first = Axis(rows, labels[::columns], by_row)
            second = fixed(columns, "all its columns go together")
        else:
            first = self.tracer.fresh(rows, by_row)
            second = self.tracer.fresh(columns, by_column)
            self.tracer.labels.unify(labels, self._pairs(first, second))
        own = axis.origins
        return dataclasses.replace(first, origins=own), dataclasses.replace(second, origins=own)

    def _pairs(self, first: Axis, second: Axis) -> np.ndarray:
        assert first.labels is not None
        assert second.labels is not None
        rows, columns = np.repeat(first.labels, second.size), np.tile(second.labels, first.size)
        return self.tracer.labels.paired(rows, columns)

    def merge(self, axes: Sequence[Axis]) -> Axis:
        """Several axes as one, the first the slowest."""
        *before, last = axes
        for axis in reversed(before):
            last = self._merge(axis, last)
        return last

    def _merge(self, a: Axis, b: Axis) -> Axis:
        if a.size == 1 or b.size == 1:
            return b if a.size == 1 else a
        size = a.size * b.size
        origins = a.origins | b.origins
        labels: np.ndarray | None
        if a.labels is None and b.labels is None:
            return dataclasses.replace(fixed(size, a.why or b.why), origins=origins)
        if a.labels is None:
            labels, zero = np.tile(b.labels, a.size), np.tile(b.zero, a.size)  # type: ignore[arg-type]
        elif b.labels is None:
            labels, zero = np.repeat(a.labels, b.size), np.repeat(a.zero, b.size)
        else:
            labels = self._pairs(a, b)
            zero = np.repeat(a.zero, b.size) & np.tile(b.zero, a.size)
        return Axis(size, labels, zero, origins)

    def labels_of(self, axis: Axis) -> np.ndarray:
        """An axis's labels; those of a fixed one are locked."""
        if axis.labels is not None:
            return axis.labels
        labels = self.tracer.labels.fresh(axis.size)
        self.tracer.labels.mark("locked", labels, axis.why)
        return labels

    def join(self, axes: Sequence[Axis]) -> Axis:
        """Axes one behind the other."""
        if all(axis.labels is None for axis in axes):
            return fixed(sum(axis.size for axis in axes), axes[0].why)
        labels = np.concatenate([self.labels_of(axis) for axis in axes])
        zero = np.concatenate([axis.zero for axis in axes])
        return Axis(len(labels), labels, zero, frozenset().union(*(a.origins for a in axes)))

    def _evaluated(self, values: Sequence[Value]) -> list[np.ndarray] | None:
        """The outputs where they follow from small constants alone: indices, masks, tables."""
        eqn = self.eqn
        if not values or any(v.known is None or v.known.shape != v.shape for v in values):
            return None
        if any(atom.aval.size > 2**16 for atom in eqn.outvars) or eqn.effects:
            return None
        with jax.ensure_compile_time_eval():
            try:
                return [np.asarray(x) for x in _jaxpr.bind(eqn, [v.known for v in values])]
            except (TypeError, NotImplementedError):
                return None
