"""A jaxpr evaluated at smaller sizes: every axis has only the indices that are kept."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import _jaxpr
from sparsejax.dependency._labels import Labels
from sparsejax.dependency._tracer import Frame, Tracer
from sparsejax.dependency._values import Axis, Value


class Kept:
    """Which indices of every axis stay, once some atoms are removed."""

    def __init__(self, labels: Labels, removed: np.ndarray, kept: np.ndarray) -> None:
        self._labels, self._removed, self._kept = labels, removed, kept
        self._masks: dict[int, tuple[Any, np.ndarray | None]] = {}

    def mask(self, labels: np.ndarray | None) -> np.ndarray | None:
        """(size,) which indices stay; None where all do."""
        if labels is None:
            return None
        if id(labels) not in self._masks:
            stay = ~np.isin(self._labels.atoms(labels), self._removed).any(1)
            # The labels are held, too, so that no others get their id.
            self._masks[id(labels)] = (labels, None if stay.all() else np.asarray(stay))
        return self._masks[id(labels)][1]

    def again(self) -> "Kept":
        """The same after more labels have met; refuses what now contradicts itself."""
        resolved = self._labels.resolve()
        removed = np.unique(self._labels.atoms(self._removed))
        kept = np.unique(self._labels.atoms(self._kept))
        locked = removed[resolved.marked("locked", removed)]
        if np.isin(removed, kept).any() or locked.size:
            why = resolved.why("locked", int(locked[0])) if locked.size else "units meet in it"
            raise NotImplementedError(
                "a derivative rule (custom_jvp, custom_vjp) of the function cannot be evaluated at "
                f"smaller sizes: {why}."
            )
        return Kept(self._labels, removed, kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """One equation that is evaluated at smaller sizes."""

    evaluator: "Evaluator"
    frame: Frame
    place: int
    eqn: Any = None

    def kept(self, atom: Any, axis: int) -> np.ndarray:
        """(size,) which indices of an axis of a value stay."""
        mask = self.evaluator.keeps.mask(self._labels(atom)[axis])
        return np.ones(atom.aval.shape[axis], bool) if mask is None else mask

    def _labels(self, atom: Any) -> Sequence[np.ndarray | None]:
        if _jaxpr.literal(atom):
            return (None,) * len(atom.aval.shape)
        operands = self.eqn.invars if self.eqn is not None and atom in self.frame.shared else ()
        uses = (self.frame.uses.get((self.place, i)) for i, x in enumerate(operands) if x is atom)
        return next((labels for labels in uses if labels is not None), self.frame.labels[atom])

    def shape(self, atom: Any) -> tuple[int, ...]:
        """The smaller shape of a value."""
        return tuple(int(self.kept(atom, i).sum()) for i in range(len(atom.aval.shape)))

    def cut(self, atom: Any, array: Any) -> Any:
        """What stays of a value that was made at full size."""
        return self._cut(self.frame.labels[atom], array)

    def used(self, operand: int, array: Any) -> Any:
        """An operand; of a constant, what stays of it at this use."""
        return self._cut(self.frame.uses.get((self.place, operand), ()), array)

    def _cut(self, labels: Sequence[np.ndarray | None], array: Any) -> Any:
        for axis, own in enumerate(labels):
            mask = self.evaluator.keeps.mask(own)
            if mask is not None:
                array = take(array, np.flatnonzero(mask), axis)
        return array

    def inner(self) -> tuple[Frame, ...]:
        """The frames of the jaxprs that the equation calls."""
        return self.frame.inner[self.place]

    def call(self, frame: Frame, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr that the equation calls."""
        open_, consts = _jaxpr.opened(jaxpr)
        return self.evaluator.run(frame, open_, consts, args)

    def touched(self) -> bool:
        """Whether anything in the equation is smaller than it was."""
        return any(self.evaluator.touched(frame) for frame in self.inner())

    def derived(
        self, function: Callable[..., Any], avals: Sequence[Any], rows: Sequence[Any]
    ) -> Any:
        """A function of full-size arrays, as one of smaller ones.

        `rows[i]` is the operand of this equation whose axes those of the i-th argument are.
        """
        traced = jax.make_jaxpr(function)(*avals)
        tracer = self.evaluator.tracer
        frame = Frame()
        args = [self._value(atom) for atom in rows]
        consts = [tracer.constant(array) for array in traced.consts]
        tracer.run(frame, traced.jaxpr, consts, args)
        inner = Evaluator(tracer, self.evaluator.keeps.again(), self.evaluator.rules)
        return lambda *arrays: inner.run(frame, traced.jaxpr, traced.consts, arrays)

    def _value(self, atom: Any) -> Value:
        shape = atom.aval.shape
        labels = (None,) * len(shape) if _jaxpr.literal(atom) else self.frame.labels[atom]
        rows = zip(shape, labels, strict=True)
        axes = tuple(Axis(n, found, np.zeros(n, bool)) for n, found in rows)
        constant = not _jaxpr.literal(atom) and atom in self.frame.shared
        return Value(axes, constant=constant)


Rules = Callable[[Any], Any]


class Evaluator:
    """Evaluates traced jaxprs with some units removed."""

    def __init__(self, tracer: Tracer, keeps: Kept, rules: Rules) -> None:
        self.tracer, self.keeps, self.rules = tracer, keeps, rules
        self._touched: dict[int, tuple[Frame, bool]] = {}

    def run(
        self, frame: Frame, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]
    ) -> list[Any]:
        """The outputs of an open jaxpr on smaller arguments; constants have full size."""
        env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        whole = Evaluation(self, frame, -1)
        for atom, array in zip(jaxpr.constvars, consts, strict=True):
            env[atom] = array if atom in frame.shared else whole.cut(atom, array)

        def read(atom: Any) -> Any:
            return atom.val if _jaxpr.literal(atom) else env[atom]

        for place, eqn in _jaxpr.live(jaxpr):
            evaluation = Evaluation(self, frame, place, eqn)
            if place in frame.constants:
                rows = zip(eqn.outvars, frame.constants[place], strict=True)
                answers = [jnp.asarray(array) for _, array in rows]
            else:
                rule = self.rules(eqn)
                evaluate = as_it_is if rule is None else rule.evaluate
                operands = [read(atom) for atom in eqn.invars]
                operands = [evaluation.used(i, array) for i, array in enumerate(operands)]
                answers = evaluate(evaluation, eqn, operands)
            env.update(zip(eqn.outvars, answers, strict=True))
        return [whole.used(i, read(atom)) for i, atom in enumerate(jaxpr.outvars)]

    def touched(self, frame: Frame) -> bool:
        """Whether anything in a call is smaller than it was."""
        found = self._touched.get(id(frame))
        if found is None:
            own = any(
                self.keeps.mask(labels) is not None
                for axes in (*frame.labels.values(), *frame.uses.values())
                for labels in axes
            )
            inner = (f for frames in frame.inner.values() for f in frames)
            found = self._touched[id(frame)] = (frame, own or any(map(self.touched, inner)))
        return found[1]


def as_it_is(evaluation: Evaluation, eqn: Any, arrays: list[Any]) -> list[Any]:
    """The primitive with the same parameters."""
    del evaluation
    return _jaxpr.bind(eqn, arrays)


def take(array: Any, index: np.ndarray, axis: int) -> Any:
    """Rising indices of an axis: by a slice where they are in step, else by a gather."""
    steps = np.unique(np.diff(index))
    if isinstance(array, np.ndarray):
        return np.take(array, index, axis)
    if len(index) == 0 or len(steps) > 1:
        return jnp.take(array, index, axis)
    step = int(steps[0]) if len(steps) else 1
    if step < 1:
        return jnp.take(array, index, axis)
    return lax.slice_in_dim(array, int(index[0]), int(index[-1]) + 1, step, axis)
