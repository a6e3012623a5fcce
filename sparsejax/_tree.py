"""Pytrees by the paths of their leaves, whatever framework made them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from sparsejax import _checks, _leaves

KeyPath: TypeAlias = tuple[str, ...]


class Flat(NamedTuple):
    """A tree taken apart: `leaves[i]` stands at `paths[i]`; `rebuild` puts leaves together."""

    paths: list[str]
    leaves: list[Any]
    structure: Any

    def rebuild(self, leaves: list[Any]) -> Any:
        """A tree of the same structure with these leaves."""
        return jax.tree.unflatten(self.structure, leaves)


def flatten(tree: Any) -> Flat:
    """Takes a tree apart; paths read like `conv1.kernel` or `layers.0.weight`."""
    keys, leaves = _keyed_leaves(tree)
    return Flat([display(k) for k in keys], leaves, jax.tree.structure(tree))


def align(name: str, tree: Any, like_name: str, like: Any) -> list[Any]:
    """The leaves of `tree` in the order of the leaves of `like`, matched by path.

    The containers may differ where the paths do not (`dict` and `FrozenDict`, NNX states with and
    without their `Param` nodes). Where `like` has something empty (`None`, `optax.MaskedNode`),
    whatever `tree` has there is left out; where `tree` has `None`, so has the answer.

    Raises:
      ValueError: if a leaf has no counterpart, with the first such path.
    """
    structure: Any = jax.tree.structure(tree)
    if structure == jax.tree.structure(like):
        return jax.tree.leaves(tree)
    keys, leaves = _keyed_leaves(tree)
    found = dict(zip(keys, leaves, strict=True))
    wanted, _ = _keyed_leaves(like)
    empty = set(_empty_nodes(tree))
    for key in wanted:
        if key not in found and not _stands_under(key, empty):
            raise _mismatch(name, like_name, f"`{like_name}` has a leaf at {display(key)!r}", name)
    absent = set(_empty_nodes(like))
    for key in set(keys).difference(wanted):
        if not _stands_under(key, absent):
            raise _mismatch(name, like_name, f"`{name}` has a leaf at {display(key)!r}", like_name)
    return [found.get(key) for key in wanted]


def map_chosen(
    f: Callable[..., Any],
    chosen: Sequence[bool],
    params: Any,
    extra: Sequence[Sequence[Any]] = (),
    **trees: Any,
) -> Any:
    """Maps `f(*leaves of trees, leaf of params, *entries of extra)` over the chosen leaves.

    Leaves that are not chosen give that of the first tree as it is. `extra` holds lists with one
    entry for every leaf of `params`, in their order.

    Raises:
      ValueError: if trees do not align or a chosen leaf's shape is not its parameter's, with the
        path.
    """
    flat = flatten(params)
    columns = [align(name, tree, "params", params) for name, tree in trees.items()]
    for name, column in zip(trees, columns, strict=True):
        for path, leaf, like, yes in zip(flat.paths, column, flat.leaves, chosen, strict=True):
            if yes:
                _checks.same_shape(name, path, leaf, "params", like)
    rows = zip(*columns, flat.leaves, *extra, strict=True)
    return flat.rebuild([f(*row) if yes else row[0] for yes, row in zip(chosen, rows, strict=True)])


def check_shapes(name: str, tree: Any, params: Any) -> None:
    """Refuses a tree that does not align with `params`, or whose arrays have other shapes.

    What is no floating array (`None`, float0) passes: it moves nothing.

    Raises:
      ValueError: for the first such leaf, with its path.
    """
    flat = flatten(params)
    rows = zip(flat.paths, align(name, tree, "params", params), flat.leaves, strict=True)
    for path, leaf, like in rows:
        if _leaves.is_inexact(leaf):
            _checks.same_shape(name, path, leaf, "params", like)


# The first words of variables that are collections, not layers; so are places in a tuple.
_COLLECTIONS = frozenset({"params", "batch_stats", "state", "model_state", "buffers", "constants"})


class Counterparts:
    """Which leaf of a tree a leaf of another one stands for: momentum for a parameter, say.

    Trees such as an optimizer's state hold whole copies of the tree, or of one of its collections,
    at some depth: a leaf stands for the one whose path its own path ends in. The first word of a
    path may be missing where it is that of a collection (`params`, `batch_stats` ..., a place in a
    tuple).
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._places: dict[KeyPath, list[int]] = {}
        for place, path in enumerate(paths):
            words = _split(path)
            self._places.setdefault(words, []).append(place)
            collection = words[:1] and (words[0] in _COLLECTIONS or words[0].isdigit())
            if collection and _named(words[1:]):
                self._places.setdefault(words[1:], []).append(place)

    def find(self, path: str, *, named: bool = False) -> list[int]:
        """The places of all leaves that one may stand for, by the longest end of its path.

        With `named`, numbers alone, which are places in a tuple, are no such end.
        """
        words = _split(path)
        for start in range(len(words) + 1):
            tail = words[start:]
            if tail in self._places and (_named(tail) or not named):
                return self._places[tail]
        return []


def _named(words: KeyPath) -> bool:
    return not all(word.isdigit() for word in words)


def _split(path: str) -> KeyPath:
    return () if path == "." else tuple(path.split("."))


def distinct(paths: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """A name for each path: itself, with a number behind what was there before.

    Paths can be the same where keys have dots in them: `{"a.b": 1, "a": {"b": 1}}`.
    """
    names, used = [], set(taken)
    for path in paths:
        name, number = path, 2
        while name in used:
            name, number = f"{path}~{number}", number + 1
        used.add(name)
        names.append(name)
    return names


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """What stands directly under a node, with JAX's keys; None for a leaf.

    A variable of NNX counts as what it holds.
    """
    node = _held(node)
    found = _one_level(node)
    if found and not found[0][0]:
        return None
    return [(path[0], _held(child)) for path, child in found]


def display_entry(entry: Any) -> str:
    """One step of a path as people write it."""
    return jax.tree_util.keystr((entry,), simple=True)


def display(key: KeyPath) -> str:
    """A path as people write it; the root of a bare array is `.`."""
    return ".".join(key) or "."


def _mismatch(name: str, like_name: str, has: str, lacks: str) -> ValueError:
    return ValueError(
        f"`{name}` must have the structure of `{like_name}`: {has}, where `{lacks}` has none; "
        f"build `{name}` from this very `{like_name}` tree."
    )


def _keyed_leaves(tree: Any) -> tuple[list[KeyPath], list[Any]]:
    """Leaves with their paths; the `.value` of an NNX variable does not count as a step."""
    keys: list[KeyPath] = []
    leaves: list[Any] = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_nnx_variable)[0]:
        if _is_nnx_variable(node):
            for inner, leaf in jax.tree_util.tree_flatten_with_path(node)[0]:
                keys.append(_words(path + inner[1:]))
                leaves.append(leaf)
        else:
            keys.append(_words(path))
            leaves.append(node)
    return keys, leaves


def _empty_nodes(tree: Any) -> list[KeyPath]:
    """Where the tree has a node without leaves that is not just an empty dict, list or tuple."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)[0]
    return [_words(path) for path, node in nodes if _is_empty(node)]


def _is_empty(node: Any) -> bool:
    return type(node) not in (dict, list, tuple) and not jax.tree.leaves(node)


def _stands_under(key: KeyPath, nodes: set[KeyPath]) -> bool:
    return any(key[:depth] in nodes for depth in range(len(key) + 1))


def _words(path: tuple[Any, ...]) -> KeyPath:
    return tuple(display_entry(entry) for entry in path)


def _one_level(node: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)[0]


def _held(node: Any) -> Any:
    """What a variable of NNX holds; anything else is itself."""
    while _is_nnx_variable(node):
        [(_, node)] = _one_level(node)
    return node


def _is_nnx_variable(node: Any) -> bool:
    """By name, so that the core needs no framework."""
    return any(
        cls.__name__ == "Variable" and cls.__module__.startswith("flax.nnx")
        for cls in type(node).__mro__
    )
