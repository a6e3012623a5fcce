"""Groups of units that are removed together: what a trace answers with."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """The indices of one axis of one leaf that a group owns.

    Attributes:
      path: the leaf's path, such as `conv1.kernel`.
      axis: the axis, from 0.
      indices: (size, k) integers: row i are the indices that go with unit i.
      produced: whether the leaf *produces* the units here (an output channel of a kernel, a bias, a
        scale), or only reads them (an input channel).
    """

    path: str
    axis: int
    indices: np.ndarray
    produced: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind: channels, heads, features; each goes as a whole, from all leaves at once.

    Attributes:
      name: the leaf that owns the units, the first that produces them: `conv1.kernel`.
      size: the number of units.
      members: every leaf and axis in which the units have indices, producers first.
      params: (size,) parameters that go with each unit, if it goes alone.
      flops: (size,) floating-point operations likewise, in one call of the function: two for each
        multiplication with addition in products and convolutions, nothing else.
      exact: whether the function without a unit equals the function in which all entries of the
        unit are zero, where that is finite (a weight norm without epsilon divides 0 by 0 there). So
        do their derivatives, but for custom rules that reduce over units themselves.
      why: where it is not exact: the reasons, each with the line of the code.
      silent: whether it is enough for that that the *produced* entries of the unit are zero: then
        whatever reads the unit reads zeros.
      mingled: whether something besides parameters reads the units, too: a norm, a sum, a product
        of two activations.
      rerun: why the code of the function itself, called with smaller params, may differ from the
        function re-evaluated (`shrinking.replay`): means that divide by their own new size,
        constants that would have to be cut, places that it may have fixed. Empty where nothing in
        the jaxpr speaks against it; numbers that the code makes of sizes (`x.shape[-1] ** 0.5`)
        are no more than numbers there.
      units: (size,) the numbers of the units among those of all groups.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    params: np.ndarray
    flops: np.ndarray
    exact: bool
    why: tuple[str, ...]
    silent: bool
    mingled: bool
    rerun: tuple[str, ...]
    units: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Locked:
    """Indices that cannot be removed.

    Attributes:
      path: the leaf's path.
      axis: the axis.
      indices: (n,) which indices.
      why: the primitive, equation and source line that need them, or the output they are.
    """

    path: str
    axis: int
    indices: np.ndarray
    why: str


@dataclasses.dataclass(frozen=True, eq=False)
class Extent:
    """An axis in a product of sizes: `units` (size, k) of each index, -1 for none."""

    size: int
    units: np.ndarray | None = None

    def counts(self, units: int) -> np.ndarray | int:
        """(units,) how many indices each unit has here."""
        if self.units is None:
            return 0
        return np.bincount(self.units.ravel() + 1, minlength=units + 1)[1:]

    def kept(self, removed: np.ndarray) -> int:
        """How many indices are left when some units, (units,) booleans, are removed."""
        if self.units is None:
            return self.size
        return self.size - int((removed[self.units] & (self.units >= 0)).any(1).sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A cost: `factor` times the sizes of some axes."""

    factor: int
    extents: tuple[Extent, ...]

    @property
    def full(self) -> int:
        """The cost when nothing is removed."""
        return self.factor * math.prod(e.size for e in self.extents)

    def of_each(self, units: int) -> np.ndarray:
        """(units,) how much less it is without each unit."""
        left = np.full(units, float(self.factor))
        for extent in self.extents:
            left = left * (extent.size - extent.counts(units))
        return self.full - left

    def without(self, removed: np.ndarray) -> int:
        """The cost when some units are removed."""
        return self.factor * math.prod(e.kept(removed) for e in self.extents)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """One variable as it was traced.

    Attributes:
      path: where it stands in the tree.
      shape: its shape.
      extents: its axes, with the units of each index.
      used: its place in the order in which the function first uses its variables (those that a loop
        uses share one); None for one that it does not use.
    """

    path: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    used: int | None

    @property
    def product(self) -> Product:
        """The number of its entries."""
        return Product(1, self.extents)


# As many as a line shows.
_MOST_LISTED = 8


def _listed(words: Iterable[str]) -> str:
    first = list(words)
    more = len(first) - _MOST_LISTED
    return ", ".join(first[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


class Groups(Mapping[str, Group]):
    """The groups of a function, by name, in the order in which it computes them.

    Attributes:
      locked: what cannot be removed, and why.
      unknown: primitives without a rule that something could be removed from, by name, with the
        line of the first; everything they touch is locked. `dependency.add_rule` teaches one.
      leaves: the variables, as they were traced.
      params: the number of entries of all variables.
      flops: floating-point operations of one call: two for each multiplication with addition in
        products and convolutions; of branches the dearest, of `while` loops one turn.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        locked: Sequence[Locked],
        unknown: Mapping[str, str],
        leaves: Sequence[Leaf],
        costs: Sequence[Product],
    ) -> None:
        self._groups = {group.name: group for group in groups}
        self.locked = tuple(locked)
        self.unknown = dict(unknown)
        self.leaves = tuple(leaves)
        self._costs = tuple(costs)
        nothing = self.removed({})
        self.params, self.flops = self.params_without(nothing), self.flops_without(nothing)

    def __getitem__(self, name: str) -> Group:
        """The group of this name; KeyError names the ones there are."""
        if name not in self._groups:
            raise KeyError(f"no group {name!r}; there are {', '.join(map(repr, self._groups))}.")
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def removed(self, units: Mapping[str, Any]) -> np.ndarray:
        """Booleans, one a unit of all groups, from the removed units of some groups."""
        flags = np.zeros(sum(group.size for group in self.values()), bool)
        for name, indices in units.items():
            flags[self[name].units[np.asarray(indices, np.int64)]] = True
        return flags

    def params_without(self, removed: np.ndarray) -> int:
        """The number of entries of all variables once units are removed."""
        return sum(leaf.product.without(removed) for leaf in self.leaves)

    def flops_without(self, removed: np.ndarray) -> int:
        """Floating-point operations of one call once units are removed."""
        return sum(cost.without(removed) for cost in self._costs)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("group", "units", "params each", "FLOPs each", "exact", "members")
        ]
        for group in self.values():
            members = _listed(
                f"{m.path}[{m.axis}]" + (f"x{m.indices.shape[1]}" if m.indices.shape[1] > 1 else "")
                for m in group.members
            )
            each = (f"{int(x[0]):,}" for x in (group.params, group.flops))
            exact = "yes" if group.exact else f"no: {group.why[0]}"
            rows.append((group.name, str(group.size), *each, exact, members))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[4] = min(widths[4], 60)
        lines = ["  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)) for row in rows]
        reasons: dict[str, list[str]] = {}
        for lock in self.locked:
            where = f"{lock.path}[{lock.axis}] ({len(lock.indices)})"
            reasons.setdefault(lock.why, []).append(where)
        lines += [f"locked: {_listed(rows)}: {why}" for why, rows in reasons.items()]
        lines += [f"unknown primitive: {where}" for where in self.unknown.values()]
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        return f"Groups({', '.join(f'{g.name}: {g.size}' for g in self.values())})"
