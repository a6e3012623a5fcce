"""What is removed: a value that can be looked at, stored, and undone."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsejax import _leaves
from sparsejax.dependency import Groups

_FORMAT = "sparsejax.shrinking.Plan"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Cut:
    """What one leaf loses.

    Attributes:
      shape: its shape before.
      removed: by axis, the indices that go, rising.
      produced: the axes that produce units: output channels and the like.
    """

    shape: tuple[int, ...]
    removed: Mapping[int, tuple[int, ...]]
    produced: tuple[int, ...] = ()

    @property
    def small(self) -> tuple[int, ...]:
        """Its shape afterwards."""
        return tuple(n - len(self.removed.get(d, ())) for d, n in enumerate(self.shape))

    def kept(self, axis: int) -> np.ndarray:
        """The indices of an axis that stay, rising."""
        return np.delete(np.arange(self.shape[axis]), self.removed.get(axis, ()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which units go: made by `plan`, carried out by `shrink`, `expand` and `replay`.

    Attributes:
      removed: by the name of a group, its units that go, rising.
      sizes: by the name of a group, how many units it has.
      leaves: by path, what each leaf of the variables loses; leaves that lose nothing as well.
      params: the number of entries of all variables, before and after.
      flops: floating-point operations of one call of the traced function, before and after.
      left: by the name of a group of which nothing was removed though it was asked for, why.
    """

    removed: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    leaves: Mapping[str, Cut]
    params: tuple[int, int]
    flops: tuple[int, int]
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def kept(self, name: str) -> tuple[int, ...]:
        """The units of a group that stay, rising."""
        gone = set(self.removed.get(name, ()))
        return tuple(u for u in range(self.sizes[name]) if u not in gone)

    def config(self) -> dict[str, tuple[int, int]]:
        """What to change where the network is built: `{"conv1.features": (32, 17)}`.

        A name is that of a layer and `features`; where its kernel has several output axes (heads
        and their width), their place among these follows. Vectors (biases, scales) need no change
        of their own and are left out.
        """
        answer = {}
        for path, cut in self.leaves.items():
            if len(cut.shape) < 2:
                continue
            layer = path.rpartition(".")[0] or path
            for place, axis in enumerate(cut.produced):
                if cut.removed.get(axis):
                    several = f"[{place}]" if len(cut.produced) > 1 else ""
                    answer[f"{layer}.features{several}"] = (cut.shape[axis], cut.small[axis])
        return answer

    def to_json(self) -> str:
        """The plan as JSON; `from_json` reads it."""
        groups = {
            name: {"size": size, "removed": list(self.removed.get(name, ()))}
            for name, size in self.sizes.items()
        }
        leaves = {
            path: {
                "shape": list(cut.shape),
                "removed": {str(axis): list(gone) for axis, gone in cut.removed.items()},
                "produced": list(cut.produced),
            }
            for path, cut in self.leaves.items()
        }
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "groups": groups,
            "leaves": leaves,
            "params": list(self.params),
            "flops": list(self.flops),
            "left": dict(self.left),
        }
        return json.dumps(content, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
          ValueError: if `text` is no such JSON, with what is wrong in it.
        """
        try:
            content = json.loads(text)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"`text` must be the JSON of a plan: {error}.") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError("`text` must be JSON that Plan.to_json wrote; its format is another.")
        if content.get("version") != _VERSION:
            raise ValueError(
                f"`text` must have version {_VERSION}, got {content.get('version')!r}; read it "
                "with the release of sparsejax that wrote it."
            )
        try:
            return _read(content)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            what = error if type(error) is ValueError else repr(error)
            raise ValueError(f"`text` must be a whole plan, but it is damaged: {what}.") from error

    def __str__(self) -> str:
        width = max((len(name) for name in self.sizes), default=0)
        lines = [
            f"{name:<{width}}  {size} → {size - len(self.removed.get(name, ()))}"
            + (f"  ({self.left[name]})" if name in self.left else "")
            for name, size in self.sizes.items()
        ]
        for what, (before, after) in (("params", self.params), ("FLOPs", self.flops)):
            share = f"{after / before:.1%}" if before else "-"
            lines.append(f"{what:<{width}}  {before:,} → {after:,} ({share})")
        return "\n".join(lines)


def _read(content: dict[str, Any]) -> Plan:
    groups = content["groups"]
    sizes = {str(name): int(row["size"]) for name, row in groups.items()}
    removed = {
        name: _rising(f"group {name!r}", row["removed"], sizes[name])
        for name, row in groups.items()
        if row["removed"]
    }
    leaves = {}
    for path, row in content["leaves"].items():
        shape = tuple(map(int, row["shape"]))
        gone = {
            int(axis): _rising(f"leaf {path!r}", indices, shape[int(axis)])
            for axis, indices in row["removed"].items()
            if 0 <= int(axis) < len(shape) or _damaged(f"leaf {path!r} has no axis {axis}")
        }
        leaves[str(path)] = Cut(shape, gone, tuple(map(int, row["produced"])))
    params, flops = (_pair(content[name]) for name in ("params", "flops"))
    plan = Plan(removed, sizes, leaves, params, flops, dict(content["left"]))
    after = sum(math.prod(cut.small) for cut in leaves.values())
    if after != params[1]:
        _damaged(f"its leaves keep {after} entries, not {params[1]}")
    return plan


def _pair(values: Any) -> tuple[int, int]:
    before, after = values
    return int(before), int(after)


def _rising(where: str, indices: Any, size: int) -> tuple[int, ...]:
    found = tuple(map(int, indices))
    if list(found) != sorted(set(found)) or any(not 0 <= i < size for i in found):
        _damaged(f"the indices of {where} do not rise from 0 to {size - 1}")
    return found


def _damaged(what: str) -> bool:
    raise ValueError(what)


def check_plan(plan: Any) -> None:
    """Refuses what is no plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be a shrinking.Plan, got {_leaves.brief(plan)}.")


def make(groups: Groups, removed: Mapping[str, np.ndarray], left: Mapping[str, str]) -> Plan:
    """The plan that removes these units."""
    flags = groups.removed(removed)
    produced: dict[str, set[int]] = {}
    for group in groups.values():
        for member in group.members:
            if member.produced:
                produced.setdefault(member.path, set()).add(member.axis)
    leaves = {}
    for leaf in groups.leaves:
        gone = {}
        for axis, extent in enumerate(leaf.extents):
            if extent.units is not None:
                lost = (flags[extent.units] & (extent.units >= 0)).any(1)
                if lost.any():
                    gone[axis] = tuple(np.flatnonzero(lost).tolist())
        leaves[leaf.path] = Cut(leaf.shape, gone, tuple(sorted(produced.get(leaf.path, ()))))
    return Plan(
        removed={n: tuple(sorted(map(int, u))) for n, u in removed.items() if len(u)},
        sizes={name: group.size for name, group in groups.items()},
        leaves=leaves,
        params=(groups.params, groups.params_without(flags)),
        flops=(groups.flops, groups.flops_without(flags)),
        left=dict(left),
    )
