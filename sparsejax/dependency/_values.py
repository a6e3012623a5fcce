"""What a trace knows of a value: its axes, index by index."""

import dataclasses
from typing import Any

import numpy as np

from sparsejax import _leaves

# Larger constants are not looked into.
_LARGEST_CONSTANT = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a value.

    Attributes:
      size: how many indices it has.
      labels: (size,) one label an index; None where the axis is *fixed*: it keeps all its indices.
      zero: (size,) whether the value is zero at an index once all units that remove it are zero.
      origins: the (leaf, axis) of variables whose axis this is, nothing having been added to it.
      why: of a fixed axis, what fixed it.
    """

    size: int
    labels: np.ndarray | None
    zero: np.ndarray
    origins: frozenset[tuple[int, int]] = frozenset()
    why: str = ""

    def take(self, index: Any) -> "Axis":
        """The axis that has these indices of this one."""
        zero = self.zero[index]
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, size=len(zero), labels=labels, zero=zero)

    def with_zero(self, zero: Any) -> "Axis":
        """The same indices, zero elsewhere."""
        return dataclasses.replace(self, zero=np.broadcast_to(np.asarray(zero, bool), self.size))


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value of a jaxpr.

    Attributes:
      axes: its axes.
      weight: whether it is made of variables and constants alone, not of the inputs.
      known: its numbers where they are known: a small array, or one number for all entries.
      constant: whether it depends on nothing, so that every use may cut it in its own way.
    """

    axes: tuple[Axis, ...]
    weight: bool = False
    known: np.ndarray | None = None
    constant: bool = False

    @property
    def uniform(self) -> np.ndarray | None:
        """The one number that all entries are, None where that is not known."""
        return self.known if self.known is not None and self.known.shape == () else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(axis.size for axis in self.axes)


def fixed(size: int, why: str) -> Axis:
    """An axis that keeps all its indices."""
    return Axis(size, None, np.zeros(size, bool), why=why)


def known_array(array: Any) -> np.ndarray | None:
    """A constant as NumPy's array, None where it is none of numbers, or too large to look into."""
    if not _leaves.is_number(array) or np.size(array) > _LARGEST_CONSTANT:
        return None
    return np.asarray(array)
