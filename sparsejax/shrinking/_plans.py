"""What a plan says: which units go, and what that removes from every leaf."""

import dataclasses
import json
from typing import Any, Literal, TypeAlias

import numpy as np

from sparsejax import _tree

Role: TypeAlias = Literal["output", "input", "elementwise"]

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LeafCut:
    """What a plan removes from one leaf of the variables.

    Attributes:
      key: The steps of the leaf's path, such as `("conv1", "kernel")`.
      shape: The shape before the cut.
      dtype: The name of its dtype.
      removed: For every axis, the indices that go, ascending.
    """

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    removed: tuple[tuple[int, ...], ...]

    @property
    def path(self) -> str:
        """The path as people write it: `conv1.kernel`."""
        return _tree.display(self.key)

    @property
    def kept(self) -> tuple[np.ndarray, ...]:
        """For every axis, the indices that stay, ascending."""
        rows = zip(self.shape, self.removed, strict=True)
        return tuple(np.delete(np.arange(n), np.asarray(gone, int)) for n, gone in rows)

    @property
    def small_shape(self) -> tuple[int, ...]:
        """The shape after the cut."""
        return tuple(n - len(gone) for n, gone in zip(self.shape, self.removed, strict=True))


@dataclasses.dataclass(frozen=True)
class PlannedMember:
    """One axis of one leaf that shrinks with a group.

    Attributes:
      path: The leaf.
      axis: Its axis.
      role: `"output"` where the leaf produces the units (the output channels of a kernel),
        `"input"` where it reads them, `"elementwise"` for biases, scales and statistics.
      width: How many indices of the axis one unit owns.
    """

    path: str
    axis: int
    role: Role
    width: int


@dataclasses.dataclass(frozen=True)
class PlannedGroup:
    """What a plan does to one group.

    Attributes:
      name: The group's name: the leaf that owns its output channels.
      size: Its number of units.
      removed: The units that go, ascending.
      exact: Whether cutting them leaves the function of the masked network as it is.
      members: The axes that shrink with it.
    """

    name: str
    size: int
    removed: tuple[int, ...]
    exact: bool
    members: tuple[PlannedMember, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The units that stay, ascending."""
        gone = set(self.removed)
        return tuple(u for u in range(self.size) if u not in gone)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which units of a network go, and what that removes from every leaf: plain data.

    Attributes:
      leaves: All leaves of the variables in tree order, those that lose nothing too.
      groups: All groups, those that lose nothing too.
      parameters: Entries of all leaves, before and after.
      flops: Floating-point operations of one call with the traced inputs, before and after
        (two for every multiply-add of a product or a convolution; nothing else is counted).
    """

    leaves: tuple[LeafCut, ...]
    groups: tuple[PlannedGroup, ...]
    parameters: tuple[int, int]
    flops: tuple[int, int]

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads it back, equal."""
        return json.dumps({"sparsejax_plan": _VERSION, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
          ValueError: if the text is not such a plan.
        """
        try:
            found = json.loads(text)
            if found.get("sparsejax_plan") != _VERSION:
                raise KeyError("sparsejax_plan")
            return cls(
                leaves=tuple(
                    LeafCut(
                        tuple(leaf["key"]),
                        tuple(leaf["shape"]),
                        leaf["dtype"],
                        tuple(map(tuple, leaf["removed"])),
                    )
                    for leaf in found["leaves"]
                ),
                groups=tuple(_group_from(group) for group in found["groups"]),
                parameters=_pair(found["parameters"]),
                flops=_pair(found["flops"]),
            )
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"`text` must be what `Plan.to_json` of version {_VERSION} wrote, got "
                f"{text[:60]!r}: {type(error).__name__} {error}."
            ) from error


def _group_from(found: Any) -> PlannedGroup:
    members = tuple(PlannedMember(**member) for member in found["members"])
    return PlannedGroup(
        found["name"], found["size"], tuple(found["removed"]), found["exact"], members
    )


def _pair(found: Any) -> tuple[int, int]:
    before, after = found
    return int(before), int(after)
