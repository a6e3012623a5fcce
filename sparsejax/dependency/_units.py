"""From entries to units: scores, masks and labels of the groups."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Masks, Params, Scores
from sparsejax.dependency._groups import Group, Groups, Leaf, Member


def unit_scores(
    groups: Groups,
    scores: Scores,
    *,
    entries: Literal["all", "produced"] = "all",
    normalize: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Sums the scores of entries over units.

    An entry of the kernel between two layers belongs to two groups, and counts in both: as an input
    of one unit, as an output of another. `entries="produced"` counts it as an output only.

    Args:
      groups: what `dependency.trace` found.
      scores: a tree like the variables, or like one of its branches (`params`): what a criterion
        says of every entry. Leaves that it lacks count nothing.
      entries: what a unit is scored by: everything that goes with it, or what produces it.
      normalize: a function of the scores of one group, (size,) -> (size,), such as
        `lambda s: s / s.mean()`, which makes groups comparable. None leaves them.

    Returns:
      By the name of the group, (size,) float64.

    Raises:
      TypeError: if scores are traced, or no numbers.
      ValueError: if a leaf is of no leaf that was traced, has another shape, or is NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import dependency
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.ones((3, 2)), "out": jnp.array([[1.0], [5.0]])}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> dependency.unit_scores(groups, params)
      {'in': array([4., 8.])}
      >>> dependency.unit_scores(groups, params, entries="produced")
      {'in': array([3., 3.])}
    """
    _checks.choice("entries", entries, ("all", "produced"))
    arrays = _by_path(groups, "scores", scores)
    answer = {}
    for name, group in groups.items():
        total = np.zeros(group.size)
        for path, members in _by_leaf(group, entries).items():
            if path in arrays:
                total += _summed(arrays[path], members)
        if normalize is not None:
            total = np.asarray(normalize(total), np.float64)
            if total.shape != (group.size,):
                raise ValueError(
                    f"`normalize` must keep the shape {(group.size,)}, got {total.shape}."
                )
        answer[name] = total
    return answer


def dead_units(
    groups: Groups, masks: Masks, *, approximate: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Units that masks have silenced, and hints about those that they have not quite.

    A unit is dead where nothing reads it (all entries with which others read it are masked, and its
    group is not `mingled`), or where all that produces it is masked, bias and scale included, and
    its group is `silent`.

    Args:
      groups: what `dependency.trace` found.
      masks: a tree like the variables, or a branch of it, of booleans that broadcast; True = kept.
      approximate: whether it is enough that the *weights* that produce a unit are masked.

    Returns:
      By the name of the group, (size,) booleans; and by name, what keeps units from being dead
      whose weights are masked.

    Raises:
      TypeError, ValueError: if masks are no booleans, traced, or do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import dependency
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.ones((3, 2)), "out": jnp.ones((2, 1))}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> masks = {"in": jnp.array([[True, False]]), "out": jnp.array(True)}
      >>> dependency.dead_units(groups, masks)[0]
      {'in': array([False,  True])}
    """
    arrays = _by_path(groups, "masks", masks)
    dead, hints = {}, {}
    for name, group in groups.items():
        alive = {
            m: _any(arrays[m.path], m) if m.path in arrays else np.ones(group.size, bool)
            for m in group.members
        }
        read = [alive[m] for m in group.members if not m.produced]
        made = [m for m in group.members if m.produced]
        seen = group.mingled or not read
        unread = np.zeros(group.size, bool) if seen else ~np.any(read, axis=0)
        unmade = ~np.any([alive[m] for m in made], axis=0)
        weights = [m for m in made if _rank(groups, m.path) > 1]
        emptied = ~np.any([alive[m] for m in weights or made], axis=0)
        silent = emptied if approximate else unmade & group.silent
        dead[name] = unread | silent
        rest = emptied & ~dead[name]
        if rest.any():
            holding = [m.path for m in made if (alive[m] & rest).any()]
            hints[name] = (
                f"the weights of {int(rest.sum())} units are masked, but "
                + (f"{', '.join(holding)} are not" if holding else "what reads them may not read 0")
                + "; mask these too, or pass approximate=True"
            )
    return dead, hints


def labels(groups: Groups, params: Params) -> Any:
    """Numbers the units for `penalties.group_lasso(groups=...)`, which drives whole units to 0.

    A kernel between two layers belongs to two groups at once. Only what *produces* a unit is
    penalized, so that every entry is in one group at most; a leaf that produces units of two groups
    (heads and their width) is in that of the first. The default weight of `group_lasso`, the root
    of a unit's size, spares small units (a convolution of one channel) beside large ones: it may
    need `weight=lambda size: 1.0` to reach them.

    Args:
      groups: what `dependency.trace` found.
      params: the params that are trained: the variables, or one of their branches.

    Returns:
      A tree like `params` of integer arrays that broadcast: equal numbers are one unit, -1 is none.

    Raises:
      ValueError: if a leaf was not traced, or has another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import dependency, penalties
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.ones((3, 2)), "out": jnp.ones((2, 1))}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> units = dependency.labels(groups, params)
      >>> units
      {'in': array([[0, 1]]), 'out': array([[-1]])}
      >>> penalty = penalties.group_lasso(0.1, groups=units)
    """
    flat = _tree.flatten(params)
    numbers = []
    traced_at = _finder(groups, "params")
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        traced = traced_at(path)
        _check_shape("params", path, leaf, traced)
        numbers.append(_numbered(groups, traced))
    return flat.rebuild(numbers)


def _numbered(groups: Groups, leaf: Leaf) -> np.ndarray:
    rank = len(leaf.shape)
    for group in groups.values():
        for member in group.members:
            if member.path == leaf.path and member.produced:
                row = np.full(leaf.shape[member.axis], -1)
                row[member.indices] = group.units[:, None]
                return row.reshape([-1 if d == member.axis else 1 for d in range(rank)])
    return np.full((1,) * rank, -1)


def is_masks(tree: Any) -> bool:
    """Whether all leaves of a tree are boolean."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(_leaves.dtype_of(leaf) == np.dtype(bool) for leaf in leaves)


def _by_path(groups: Groups, name: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the path of the variable that they are about."""
    flat = _tree.flatten(tree)
    found = {}
    traced_at = _finder(groups, name)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        traced = traced_at(path)
        if _leaves.is_traced(leaf):
            raise TypeError(
                f"`{name}` must be known, got a traced array at {path!r}; choose units outside jit."
            )
        if not _leaves.is_number(leaf):
            raise TypeError(f"`{name}` must hold numbers, got {_leaves.brief(leaf)} at {path!r}.")
        if _leaves.dtype_of(leaf) == np.dtype(bool):
            _checks.broadcasts(path, leaf, np.broadcast_to(np.float32(0), traced.shape))
        else:
            _check_shape(name, path, leaf, traced)
            _no_nan(name, path, np.asarray(leaf))
        found[traced.path] = np.asarray(leaf)
    return found


def _finder(groups: Groups, name: str) -> Callable[[str], Leaf]:
    """A function from the paths of a tree to the variables that they are about."""
    counterparts = _tree.Counterparts([leaf.path for leaf in groups.leaves])

    def find(path: str) -> Leaf:
        places = counterparts.find(path)
        if len(places) != 1:
            paths = ", ".join(repr(leaf.path) for leaf in groups.leaves[:5])
            raise ValueError(
                f"`{name}` must be a tree like the variables that were traced: {path!r} is the "
                f"path of {'several' if places else 'none'} of them ({paths}, ...)."
            )
        return groups.leaves[places[0]]

    return find


def _no_nan(name: str, path: str, array: np.ndarray) -> None:
    count = int(np.isnan(array).sum())
    if count:
        raise ValueError(
            f"`{name}` must not be NaN: {count} of {array.size} entries are, at {path!r}."
        )


def _check_shape(name: str, path: str, leaf: Any, traced: Leaf) -> None:
    if _leaves.shape_of(leaf) != traced.shape:
        raise ValueError(
            f"`{name}` must have the shapes that were traced: at {path!r} it is "
            f"{_leaves.describe(leaf)}, traced was {traced.shape}."
        )


def _rank(groups: Groups, path: str) -> int:
    return next(len(leaf.shape) for leaf in groups.leaves if leaf.path == path)


def _by_leaf(group: Group, entries: str) -> dict[str, list[Member]]:
    rows: dict[str, list[Member]] = {}
    for member in group.members:
        if entries == "all" or member.produced:
            rows.setdefault(member.path, []).append(member)
    return rows


def _summed(array: Any, members: list[Member]) -> np.ndarray:
    """The sum over each unit's entries of a leaf, each entry once."""
    total = sum(_along(array, m.axis)[m.indices].sum(1) for m in members)
    for i, one in enumerate(members):
        for other in members[i + 1 :]:
            # Where a unit has indices in two axes, their crossing was counted twice.
            axes = tuple(d for d in range(np.ndim(array)) if d not in (one.axis, other.axis))
            both = np.asarray(np.sum(array, axes, dtype=np.float64))
            both = both if one.axis < other.axis else both.T
            total = total - both[one.indices[:, :, None], other.indices[:, None, :]].sum((1, 2))
    return np.asarray(total, np.float64)


def _along(array: Any, axis: int) -> np.ndarray:
    rest = tuple(d for d in range(np.ndim(array)) if d != axis)
    return np.asarray(np.sum(array, rest, dtype=np.float64))


def _any(mask: Any, member: Member) -> np.ndarray:
    """(size,) whether anything of each unit is kept; `mask` broadcasts against the leaf."""
    mask = np.asarray(mask)
    if mask.ndim == 0 or mask.shape[member.axis] == 1:
        return np.full(len(member.indices), bool(mask.any()))
    rest = tuple(d for d in range(mask.ndim) if d != member.axis)
    kept: np.ndarray = mask.any(rest)[member.indices].any(1)
    return kept
