"""From a function to its groups: the trace, and what its labels come to."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from sparsejax import _checks, _jaxpr, _leaves, _tree
from sparsejax.dependency import _rules
from sparsejax.dependency._groups import Extent, Group, Groups, Leaf, Locked, Member, Product
from sparsejax.dependency._tracer import Frame, Tracer
from sparsejax.dependency._values import Axis, Value, fixed


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A traced function: its jaxpr, the labels of all it computes, the labels of its variables."""

    tracer: Tracer
    frame: Frame
    jaxpr: Any
    structure: Any
    flat: _tree.Flat
    values: list[Value]
    used: dict[int, int]


def trace(apply_fn: Callable[..., Any], variables: Any, *inputs: Any) -> Groups:
    """Finds what can be removed from a function, by reading its jaxpr.

    Every index of every axis of every variable carries a label; equations unify labels, permute
    them, or lock what they touch. Indices whose labels have become equal are a *unit*: an output
    channel of a convolution, its bias, its normalization, and the inputs of every layer that reads
    it. Units that go alike are a *group*. Nothing is computed: ResNet-50 takes two seconds.

    A reshape makes of one axis the product of two: then the slow axis (heads) and the fast one
    (their width) are groups of their own, and an index goes when either of its two units does.
    Outputs that are the new values of variables (batch statistics in training: the same end of
    their path and the same shape as a variable's) carry its labels; all other outputs stay whole.

    Args:
      apply_fn: `(variables, *inputs) -> outputs`, pure; of any framework.
      variables: a pytree of arrays, parameters and batch statistics alike; shapes and dtypes are
        enough (`jax.ShapeDtypeStruct`).
      *inputs: pytrees of arrays or of shapes and dtypes. The batch may have any size. What is
        no array (a flag `train`) belongs into `apply_fn`.

    Returns:
      The groups, by name; `print` shows them as a table, with all that is locked and why.

    Raises:
      TypeError: if `apply_fn` cannot be called, or a leaf of `variables` is no array.
      ValueError: if `variables` has no leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import dependency
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> groups
      Groups(in: 8)
      >>> [(m.path, m.axis, m.produced) for m in groups["in"].members]
      [('in', 1, True), ('out', 0, False)]
      >>> groups["in"].params  # a column of 3 and a row of 2
      array([5, 5, 5, 5, 5, 5, 5, 5])
      >>> [lock.path for lock in groups.locked]  # by the input and the output
      ['in', 'out']

    References:
      Fang, Ma, Song, Mi and Wang, *DepGraph: towards any structural pruning*, 2023,
      https://arxiv.org/abs/2301.12900, finds groups from autograd's graph, layer by layer; here
      they come from the jaxpr, index by index, so that splits, reshapes and unbinds need no care.
    """
    traced = traced_function(apply_fn, variables, inputs)
    return _Answer(traced).groups()


def traced_function(apply_fn: Callable[..., Any], variables: Any, inputs: Any) -> Traced:
    """Traces a function on the shapes of its variables and inputs."""
    _checks.function("apply_fn", apply_fn, "(variables, *inputs) -> outputs", "model.apply")
    flat = _tree.flatten(variables)
    if not flat.leaves:
        raise ValueError("`variables` must have at least one leaf, got none.")
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if _leaves.shape_of(leaf) is None:
            raise TypeError(
                f"`variables` must hold arrays, got {_leaves.brief(leaf)} at {path!r}; split off "
                "what is none (nnx.split, eqx.partition) and put it into `apply_fn`."
            )
    for path, leaf in zip(*_tree.flatten(inputs)[:2], strict=True):
        if not all(_leaves.is_int(n) for n in _leaves.shape_of(leaf) or ()):
            raise ValueError(
                "inputs must have sizes that are numbers, got "
                f"{_leaves.describe(leaf)} at {path!r}: trace and export one batch size, or each "
                "that is wanted."
            )
    closed, shape = jax.make_jaxpr(apply_fn, return_shape=True)(variables, *inputs)
    outputs = _tree.flatten(shape)
    tracer = Tracer(lambda eqn: None if (rule := _rules.rule_of(eqn)) is None else rule.trace)
    atoms = closed.jaxpr.invars
    values = [_variable(tracer, i, atom) for i, atom in enumerate(atoms[: len(flat.leaves)])]
    others = _tree.flatten(inputs).paths
    rest = [
        Value(tuple(fixed(n, f"axis {d} of input {path}") for d, n in enumerate(atom.aval.shape)))
        for path, atom in zip(others, atoms[len(flat.leaves) :], strict=True)
    ]
    frame = Frame()
    consts = [tracer.constant(array) for array in closed.consts]
    found = tracer.run(frame, closed.jaxpr, consts, [*values, *rest])
    counterparts = _tree.Counterparts(flat.paths)
    for path, value in zip(outputs.paths, found, strict=True):
        found_at = counterparts.find(path, named=True)
        fits = [i for i in found_at if values[i].shape == value.shape]
        place = fits[0] if len(fits) == 1 else None
        for d, axis in enumerate(value.axes):
            if axis.labels is None and place is None:
                continue
            own = None if place is None else values[place].axes[d]
            _leave(tracer, axis, own, f"it is axis {d} of output {path}")
    used: dict[Any, int] = {}
    for _, eqn in _jaxpr.live(closed.jaxpr):
        for atom in eqn.invars:
            if not _jaxpr.literal(atom):
                used.setdefault(atom, len(used))
    order = {i: used[atom] for i, atom in enumerate(atoms[: len(values)]) if atom in used}
    return Traced(tracer, frame, closed, jax.tree.structure(shape), flat, values, order)


def _variable(tracer: Tracer, place: int, atom: Any) -> Value:
    shape = atom.aval.shape
    if not _leaves.is_number(_jaxpr.abstract(atom.aval)):
        return Value(tuple(fixed(n, "it holds no numbers") for n in shape), weight=True)
    axes = [
        dataclasses.replace(tracer.fresh(n, zero=True), origins=frozenset({(place, d)}))
        for d, n in enumerate(shape)
    ]
    return Value(tuple(axes), weight=True)


def _leave(tracer: Tracer, axis: Axis, own: Axis | None, why: str) -> None:
    """What an output does to an axis: it is that of the variable it replaces, or stays whole."""
    if own is None or own.labels is None:
        if axis.labels is not None:
            tracer.labels.mark("locked", axis.labels, why)
    elif axis.labels is None:
        tracer.labels.mark("locked", own.labels, f"{why}, which is fixed: {axis.why}")
    else:
        tracer.labels.unify(own.labels, axis.labels)


class _Answer:
    """Groups from the labels of a trace."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._labels = traced.tracer.labels
        self._resolved = traced.tracer.finish()
        self._columns = {
            (i, d): self._labels.atoms(axis.labels)
            for i, value in enumerate(traced.values)
            for d, axis in enumerate(value.axes)
            if axis.labels is not None
        }
        nothing = np.empty(0, np.int64)
        columns = [self._columns[key] for key in self._columns if key[0] in traced.used]
        used = np.unique(np.concatenate([nothing, *map(np.ravel, columns)]))
        used = used[used >= 0]
        self._used = set(used.tolist())
        self._free = used[~self._resolved.marked("locked", used)]

    def groups(self) -> Groups:
        kinds = self._kinds()
        # By label, the number of its unit; the last, -1, is that of no label.
        numbers = np.full(self._labels.count + 1, -1)
        count = sum(map(len, kinds))
        numbers[[a for atoms in kinds for a in atoms]] = np.arange(count)
        leaves = [
            Leaf(path, value.shape, extents, self._traced.used.get(i))
            for i, (path, value) in enumerate(
                zip(self._traced.flat.paths, self._traced.values, strict=True)
            )
            for extents in [tuple(self._extent(a.size, a.labels, numbers) for a in value.axes)]
        ]
        costs = list(self._costs(self._traced.frame, 1, numbers))
        params = sum(leaf.product.of_each(count) for leaf in leaves)
        flops = sum((c.of_each(count) for c in costs), np.zeros(count))
        drafts = [self._group(atoms, numbers, params, flops) for atoms in kinds]
        named = [
            dataclasses.replace(group, name=name)
            for group, name in zip(drafts, _names(drafts), strict=True)
        ]
        unknown = self._traced.tracer.unknown
        return Groups(named, list(self._locked(numbers)), unknown, leaves, costs)

    def _kinds(self) -> list[list[int]]:
        """Atoms that have as many indices in the same axes, axis by axis of their birth."""
        rows: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        first: dict[int, tuple[Any, ...]] = {}
        for (leaf, axis), columns in self._columns.items():
            found, places, counts = np.unique(columns, return_index=True, return_counts=True)
            inside = np.isin(found, self._free)
            rank = (*self._rank(leaf, axis), axis)
            for atom, place, count in zip(
                found[inside].tolist(),
                places[inside].tolist(),
                counts[inside].tolist(),
                strict=True,
            ):
                rows[atom].append((leaf, axis, count))
                own = (*rank, place // columns.shape[1])
                if atom not in first or own < first[atom]:
                    first[atom] = own
        kinds: dict[Any, list[int]] = defaultdict(list)
        births = self._labels.birth(self._free)
        for atom, birth in zip(self._free.tolist(), births.tolist(), strict=True):
            marks = [self._resolved.why(kind, atom) for kind in ("inexact", "audible", "mingled")]
            kinds[birth, tuple(rows[atom]), *marks].append(atom)
        lists = [sorted(atoms, key=lambda a: first[a]) for atoms in kinds.values()]
        # A single unit is the whole of its axis: nothing would be left.
        return sorted((x for x in lists if len(x) > 1), key=lambda atoms: first[atoms[0]])

    def _rank(self, leaf: int, axis: int) -> tuple[Any, ...]:
        """Who owns a unit: what produces it, a weight before a vector, what is used first."""
        rank = len(self._traced.values[leaf].axes)
        used = self._traced.used.get(leaf, np.inf)
        # A loop uses all its layers at once: there kernels stand before stacks of biases.
        return (not self._produces(leaf, axis), rank < 2, used, -rank, leaf)

    def _produces(self, leaf: int, axis: int) -> bool:
        tracer = self._traced.tracer
        return (leaf, axis) in tracer.produced or (leaf, axis) not in tracer.consumed

    def _extent(self, size: int, labels: np.ndarray | None, numbers: np.ndarray) -> Extent:
        if labels is None:
            return Extent(size)
        units = np.sort(numbers[self._labels.atoms(labels)], axis=1)
        again = np.zeros_like(units, bool)
        again[:, 1:] = units[:, 1:] == units[:, :-1]
        units = np.where(again, -1, units)
        return Extent(size, units if (units >= 0).any() else None)

    def _costs(self, frame: Frame, times: int, numbers: np.ndarray) -> Iterator[Product]:
        for operations in frame.operations.values():
            extents = tuple(
                Extent(x) if isinstance(x, int) else self._extent(len(x), x, numbers)
                for x in operations.axes
            )
            yield Product(operations.factor * times, extents)
        for place, frames in frame.inner.items():
            inner = [list(self._costs(f, times * f.repeats, numbers)) for f in frames]
            if place in frame.alternatives:
                yield from max(inner, key=lambda costs: sum(c.full for c in costs))
            else:
                for costs in inner:
                    yield from costs

    def _group(
        self, atoms: list[int], numbers: np.ndarray, params: Any, flops: np.ndarray
    ) -> Group:
        members = []
        for (leaf, axis), columns in self._columns.items():
            rows, places = _where(columns, atoms)
            if rows is None:
                continue
            path = self._traced.flat.paths[leaf]
            member = Member(path, axis, places, self._produces(leaf, axis))
            members.append((self._rank(leaf, axis), axis, member))
        members.sort(key=lambda row: row[:2])
        units = numbers[atoms]
        marks = {
            kind: tuple(
                dict.fromkeys(w for a in atoms if (w := self._resolved.why(kind, a)) is not None)
            )
            for kind in ("inexact", "audible", "mingled", "rerun")
        }
        return Group(
            name=members[0][2].path,
            size=len(atoms),
            members=tuple(member for *_, member in members),
            params=np.round(params[units]).astype(np.int64),
            flops=np.round(flops[units]).astype(np.int64),
            exact=not marks["inexact"],
            why=marks["inexact"],
            silent=not marks["inexact"] and not marks["audible"],
            mingled=bool(marks["mingled"]),
            rerun=marks["rerun"],
            units=units,
        )

    def _locked(self, numbers: np.ndarray) -> Iterator[Locked]:
        for (leaf, axis), columns in self._columns.items():
            reasons: dict[str, list[int]] = defaultdict(list)
            for index in np.flatnonzero((numbers[columns] < 0).all(1)).tolist():
                reasons[self._why(columns[index].tolist())].append(index)
            for why, indices in reasons.items():
                yield Locked(self._traced.flat.paths[leaf], axis, np.array(indices), why)

    def _why(self, atoms: list[int]) -> str:
        if not any(a in self._used for a in atoms):
            return "the function does not use it"
        found = (self._resolved.why("locked", a) for a in atoms if a >= 0)
        return next((w for w in found if w is not None), "all its indices go together, as one unit")


def _where(columns: np.ndarray, atoms: list[int]) -> tuple[Any, Any]:
    """(atoms, k) the rows of `columns` that have each atom, None where there are none."""
    found = [np.flatnonzero((columns == a).any(1)) for a in atoms[:1]]
    if not found[0].size:
        return None, None
    order = np.argsort(atoms)
    ranked = np.asarray(atoms)[order]
    place = np.minimum(np.searchsorted(ranked, columns), len(ranked) - 1)
    rows, _ = np.nonzero(ranked[place] == columns)
    which = order[place[ranked[place] == columns]]
    pairs = np.unique(np.stack([which, rows], -1), axis=0)
    return rows, pairs[:, 1].reshape(len(atoms), -1)


def _names(groups: list[Group]) -> list[str]:
    """Names that differ: by the axis, by which indices, at last by a number."""
    names = [group.name for group in groups]
    for describe in (_by_axis, _by_indices):
        counts = {name: names.count(name) for name in names}
        names = [
            name + describe(group) if counts[name] > 1 else name
            for name, group in zip(names, groups, strict=True)
        ]
    seen: dict[str, int] = defaultdict(int)
    answer = []
    for name in names:
        seen[name] += 1
        answer.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return answer


def _by_axis(group: Group) -> str:
    return f"[{group.members[0].axis}]"


def _by_indices(group: Group) -> str:
    """What a unit has of a split axis: one run, runs, or every n-th index; else the range."""
    indices = group.members[0].indices
    steps = np.diff(indices[0])
    if not steps.size:
        return f":{indices.min()}..{indices.max()}"
    run = int(np.argmax(steps != 1)) + 1 if (steps != 1).any() else len(steps) + 1
    if run > len(steps):
        return f":blocks-of-{run}"
    return f":runs-of-{run}" if run > 1 else f":every-{steps[0]}"
