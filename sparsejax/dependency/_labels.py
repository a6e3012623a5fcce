"""Labels of indices: which are removed together, which together with either of two, which never.

Every index of every axis carries a label. Equal labels are removed together (union-find, on whole
arrays at once). A label may also have two *parts*: it stands for an index of an axis that a reshape
merges of two (or splits into two), and is removed if and only if one of its parts is.
"""

import numpy as np

_NONE = -1
# A reshape of eight axes into one nests parts seven deep.
_DEEPEST = 16


class Labels:
    """A growing set of labels, numbered from 0."""

    def __init__(self) -> None:
        self._parent = np.empty(0, np.int64)
        # (label, 2): the parts of a root, -1 for none.
        self._parts = np.empty((0, 2), np.int64)
        # By label, the place of the first reason for each kind of mark; -1 for none.
        self._marks: dict[str, np.ndarray] = {
            kind: np.empty(0, np.int64)
            for kind in ("locked", "inexact", "audible", "mingled", "rerun")
        }
        self._births = np.empty(0, np.int64)
        self._reasons: list[str] = []
        self._places: dict[str, int] = {}
        self._used = 0
        self._dimensions = 0

    @property
    def count(self) -> int:
        """How many labels there are."""
        return self._used

    def fresh(self, count: int) -> np.ndarray:
        """New labels for the indices of one axis."""
        start, self._used = self._used, self._used + count
        if self._used > len(self._parent):
            self._grow(max(self._used, 2 * len(self._parent), 1024))
        labels = np.arange(start, self._used)
        self._births[labels] = self._dimensions
        self._dimensions += 1
        return labels

    def fresh_like(self, labels: np.ndarray) -> np.ndarray:
        """New labels with the marks of others."""
        new = self.fresh(len(labels))
        for marks in self._marks.values():
            marks[new] = marks[labels]
        return new

    def paired(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """New labels whose parts are `first` and `second`, arrays of one length."""
        labels = self.fresh(len(first))
        self._parts[labels, 0], self._parts[labels, 1] = first, second
        return labels

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The one that stands for each label: the lowest of its equals."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[labels] = roots
        return roots

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Makes labels equal, pair by pair; where both have parts, the parts as well."""
        pending = [(a, b)]
        while pending:
            a, b = pending.pop()
            while True:
                a, b = self.find(a), self.find(b)
                differ = a != b
                if not differ.any():
                    break
                a, b = a[differ], b[differ]
                pending += self._hook(np.minimum(a, b), np.maximum(a, b))

    def mark(self, kind: str, labels: np.ndarray, reason: str) -> None:
        """Notes why labels are `locked`, `inexact` and so on; see the marks of `Group`."""
        place = self._places.setdefault(reason, len(self._reasons))
        if place == len(self._reasons):
            self._reasons.append(reason)
        marks = self._marks[kind]
        labels = labels[marks[labels] == _NONE]
        marks[labels] = place

    def birth(self, roots: np.ndarray) -> np.ndarray:
        """The number of the axis for which each label was made."""
        return self._births[roots]

    def reason(self, place: int) -> str:
        """What was said of a mark."""
        return self._reasons[place]

    def resolve(self) -> "Resolved":
        """What the labels come to: atoms, and what is known of each."""
        self._untie()
        everything = self.find(np.arange(self._used))
        marks = {kind: self._inherited(kind, everything) for kind in self._marks}
        return Resolved(self, marks)

    def atoms(self, labels: np.ndarray) -> np.ndarray:
        """(labels, k): the roots without parts whose removal removes each label; -1 fills up."""
        columns = self.find(labels)[:, None]
        for _ in range(_DEEPEST):
            parts = self._parts[columns]  # (n, k, 2); what stands at -1 is not looked at
            compound = (columns != _NONE) & (parts[..., 0] != _NONE)
            if not compound.any():
                return columns
            split = np.where(compound[..., None], parts, _NONE)
            split[..., 0] = np.where(compound, parts[..., 0], columns)
            flat = split.reshape(len(labels), -1)
            flat = np.where(flat == _NONE, _NONE, self.find(np.maximum(flat, 0)))
            columns = flat[:, (flat != _NONE).any(0)]
        raise AssertionError("parts of labels in a circle")

    def _grow(self, size: int) -> None:
        more = size - len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(len(self._parent), size)])
        self._parts = np.concatenate([self._parts, np.full((more, 2), _NONE)])
        self._births = np.concatenate([self._births, np.zeros(more, np.int64)])
        for kind, marks in self._marks.items():
            self._marks[kind] = np.concatenate([marks, np.full(more, _NONE)])

    def _hook(self, low: np.ndarray, high: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Puts roots under lower ones; returns the parts that became equal by that."""
        np.minimum.at(self._parent, high, low)
        hooked = np.unique(high)
        compound = hooked[self._parts[hooked, 0] != _NONE]
        onto = self._parent[compound]
        bare = self._parts[onto, 0] == _NONE
        # Of several compounds on one bare root, the last gives it its parts; all are unified.
        self._parts[onto[bare]] = self._parts[compound[bare]]
        return [(self._parts[compound, i], self._parts[onto, i]) for i in range(2)]

    def _untie(self) -> None:
        """Ends circles: an index that goes with itself or another goes alone, the other never."""
        for _ in range(_DEEPEST):
            roots = np.flatnonzero(self._parent[: self._used] == np.arange(self._used))
            roots = roots[self._parts[roots, 0] != _NONE]
            parts = np.stack([self.find(self._parts[roots, i]) for i in range(2)], -1)
            own = parts == roots[:, None]
            tied = own.any(1)
            if not tied.any():
                break
            for i in range(2):
                other = parts[tied & own[:, 1 - i] & ~own[:, i], i]
                self.mark("locked", other, "its axis is coupled with a part of itself")
            self._parts[roots[tied]] = _NONE
        circles = self._in_circles()
        for labels in (circles, self.find(self._parts[circles].ravel())):
            self.mark("locked", labels, "its axis is coupled with parts of itself")
        self._parts[circles] = _NONE

    def _in_circles(self) -> np.ndarray:
        """Compound roots that are parts of parts of themselves, or have such parts."""
        roots = np.flatnonzero(self._parent[: self._used] == np.arange(self._used))
        compound = roots[self._parts[roots, 0] != _NONE]
        # Whatever has no compound part is in no circle; what is left when none falls is.
        while compound.size:
            parts = np.stack([self.find(self._parts[compound, i]) for i in range(2)], -1)
            open_ = np.isin(parts, compound).any(1)
            if open_.all():
                break
            compound = compound[open_]
        return compound

    def _inherited(self, kind: str, everything: np.ndarray) -> np.ndarray:
        """Marks by root: of all its labels, and of every compound that it is a part of."""
        marks = np.full(self._used, _NONE)
        found = np.flatnonzero(self._marks[kind][: self._used] != _NONE)[::-1]
        marks[everything[found]] = self._marks[kind][found]
        for _ in range(_DEEPEST):
            roots = np.flatnonzero((marks != _NONE) & (self._parts[: self._used, 0] != _NONE))
            parts = [self.find(self._parts[roots, i]) for i in range(2)]
            todo = [(p, marks[roots]) for p in parts if (marks[p] == _NONE).any()]
            if not todo:
                break
            for part, mark in todo:
                marks[part] = np.where(marks[part] == _NONE, mark, marks[part])
        return marks


class Resolved:
    """Labels after the last equation: marks of atoms."""

    def __init__(self, labels: Labels, marks: dict[str, np.ndarray]) -> None:
        self._labels, self._marks = labels, marks

    def why(self, kind: str, atom: int) -> str | None:
        """Why an atom is marked, None where it is not."""
        place = int(self._marks[kind][atom])
        return None if place == _NONE else self._labels.reason(place)

    def marked(self, kind: str, atoms: np.ndarray) -> np.ndarray:
        """Which atoms are marked; -1 is not."""
        return (atoms != _NONE) & (self._marks[kind][atoms] != _NONE)
