"""The structure of a tree as JSON, with the number of a leaf where the leaf is.

`null` is None, an object a dict whose keys are strings, and a list starts with a word: `"list"` and
`"tuple"` are followed by their items, `"dict"` by pairs of a key (a string or an integer) and a
node, `"node"` by such pairs of anything else that JAX takes apart (a NamedTuple, a module, a state
of NNX): nothing but a tree of the same structure can make it again, and without one it is a dict.
"""

from typing import Any

from sparsejax import _leaves, _tree
from sparsejax.storage._errors import BrokenError


def encode(tree: Any) -> Any:
    """The structure of a tree whose leaves are integers.

    Raises:
      BrokenError: if it could not be decoded.
    """
    try:
        return _encode(tree)
    except RecursionError:
        raise BrokenError("it is too deep") from None


def _encode(tree: Any) -> Any:
    if tree is None:
        return None
    children = _tree.children(tree)
    if children is None:
        return tree
    nodes = [_encode(child) for _, child in children]
    if type(tree) in (list, tuple):
        return [type(tree).__name__, *nodes]
    keys = [_key(entry) for entry, _ in children]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BrokenError(f"two of its keys print alike, {twice!r}; rename one")
    pairs = list(zip(keys, nodes, strict=True))
    if type(tree) is dict and all(isinstance(key, str) for key in keys):
        return dict(pairs)
    return ["dict" if type(tree) is dict else "node", *map(list, pairs)]


def decode(structure: Any, leaves: list[Any]) -> Any:
    """The tree of this structure with these leaves, each of which stands in it once.

    Raises:
      BrokenError: if the structure is none of `encode` for so many leaves.
    """
    used: list[int] = []
    try:
        tree = _decode(structure, leaves, used)
    except RecursionError:
        raise BrokenError("its tree is too deep") from None
    if sorted(used) != list(range(len(leaves))):
        raise BrokenError(f"its tree does not hold each of its {len(leaves)} leaves once")
    return tree


def order(structure: Any) -> list[int]:
    """The numbers of the leaves in the order in which they stand in the tree."""
    if isinstance(structure, int):
        return [structure]
    if isinstance(structure, dict):
        return [i for node in structure.values() for i in order(node)]
    if not structure:
        return []
    word, *items = structure
    nodes = items if word in ("list", "tuple") else [node for _, node in items]
    return [i for node in nodes for i in order(node)]


def _decode(node: Any, leaves: list[Any], used: list[int]) -> Any:
    if node is None:
        return None
    if _leaves.is_int(node):
        if not 0 <= node < len(leaves):
            raise BrokenError(f"its tree names leaf {node} of {len(leaves)}")
        used.append(node)
        return leaves[node]
    if isinstance(node, dict):
        return {key: _decode(child, leaves, used) for key, child in node.items()}
    if isinstance(node, list) and node:
        word, *items = node
        if word in ("list", "tuple"):
            found = [_decode(child, leaves, used) for child in items]
            return tuple(found) if word == "tuple" else found
        if word in ("dict", "node") and all(map(_is_pair, items)):
            found_dict = {key: _decode(child, leaves, used) for key, child in items}
            if len(found_dict) == len(items):
                return found_dict
    raise BrokenError("its tree has a node of a kind that is not known")


def _is_pair(item: Any) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 2
        and (isinstance(item[0], str) or _leaves.is_int(item[0]))
    )


def _key(entry: Any) -> str | int:
    """A key as it is, or as people read it where JSON has no such key (that of an enumeration)."""
    key: Any = getattr(entry, "key", None)
    if type(key) is str:
        return key
    return int(key) if _leaves.is_int(key) else _tree.display_entry(entry)
