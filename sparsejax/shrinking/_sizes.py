"""Smaller NNX modules: their arrays, and the sizes that they store beside them."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax import _leaves
from sparsejax.shrinking._cutting import shrink
from sparsejax.shrinking._plan import Cut, Plan, check_plan

Cuts = Mapping[str, Cut]


def resize_nnx(model: Any, plan: Plan) -> Any:
    """A smaller copy of an NNX module: arrays cut, and the sizes that its layers store set.

    Layers of Flax remember their sizes, and some compute with them: `feature_group_count` of a
    convolution, the groups of a GroupNorm, the features of LinearGeneral, the heads of
    MultiHeadAttention. What the module's own code makes of sizes (a reshape with a fixed width) is
    not touched, and a mean over removed channels divides by its new number: `Group.rerun` says
    where that matters, and `replay` works whatever the code is.

    Args:
      model: an NNX module; it is left as it is.
      plan: made from groups of a function of this module's state, as in
        `nnx.split(model, (nnx.Param, nnx.BatchStat), ...)`.

    Returns:
      A module of the same class; what is shared in `model` is shared in it.

    Raises:
      TypeError: if `model` is no NNX module, or `plan` none.
      ValueError: if the plan cuts what the module has not, or its arrays have not the shapes of the
        plan.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import dependency, shrinking
      >>> rngs = nnx.Rngs(0)
      >>> layers = nnx.Linear(3, 8, rngs=rngs), jax.nn.relu, nnx.Linear(8, 2, rngs=rngs)
      >>> model = nnx.Sequential(*layers)
      >>> graph, params = nnx.split(model)
      >>> groups = dependency.trace(lambda p, x: nnx.merge(graph, p)(x), params, jnp.ones((1, 3)))
      >>> small = shrinking.resize_nnx(model, shrinking.plan(groups, params, keep=5))
      >>> small.layers[0].out_features, small(jnp.ones((1, 3))).shape
      (5, (1, 2))
    """
    if not _is_flax(model, "Module"):
        raise TypeError(f"`model` must be an nnx.Module, got {_leaves.brief(model)}.")
    check_plan(plan)
    # The core imports no framework, but this one is there. Modules' own deepcopy also copies the
    # functions that they store, and a copy of `jax.nn.relu` equals no `jax.nn.relu`.
    nnx: Any = sys.modules["flax.nnx"]
    graph, state = nnx.split(model)
    small = nnx.merge(graph, copy.deepcopy(state))
    cuts = _carry_out(small, plan)
    layers = {id(at.node): at.node for at in _nodes(small) if _is_flax(at.node, "Module")}
    for layer in layers.values():
        own = {name: cuts[id(x)] for name, x in vars(layer).items() if id(x) in cuts}
        for cls in type(layer).__mro__:
            if cls.__module__.startswith("flax.nnx") and cls.__name__ in _SIZES:
                _SIZES[cls.__name__](layer, own)
                break
    return small


class _Place(NamedTuple):
    """Something in a module: its path, what holds it, and under which key."""

    path: str
    node: Any
    owner: Any = None
    key: Any = None


def _carry_out(model: Any, plan: Plan) -> dict[int, Cut]:
    """Cuts the variables of a module in place; the cut of each, by its id."""
    # As in `shrink`, a path may lack the first word of the variable's (`params`).
    names = {p.partition(".")[2]: p for p in plan.leaves if "." in p} | {p: p for p in plan.leaves}
    places = list(_nodes(model))
    first: dict[int, str] = {}
    cuts: dict[int, Cut] = {}
    missing = {path for path, cut in plan.leaves.items() if cut.removed}
    for at in places:
        name = names.get(at.path)
        if name is None:
            continue
        cut = plan.leaves[name]
        missing.discard(name)
        if id(at.node) not in cuts:
            new = _put(at, shrink({name: at.node}, plan)[name])
            cuts[id(new)], first[id(new)] = cut, at.path
        elif cut != cuts[id(at.node)]:
            raise ValueError(
                f"`plan` must cut what is shared in one way: {first[id(at.node)]!r} and "
                f"{at.path!r} are one variable, and lose different indices; trace a function of "
                "the state of nnx.split, which has it once."
            )
    if missing:
        some = [repr(at.path) for at in places if _is_flax(at.node, "Variable")][:5]
        raise ValueError(
            f"`plan` must be one of this model: it cuts {min(missing)!r}, which is not among the "
            f"variables ({', '.join(some)}, ...)."
        )
    return cuts


def _put(at: _Place, new: Any) -> Any:
    """Sets a variable, wherever it is shared, or replaces an array."""
    if _is_flax(at.node, "Variable"):
        at.node.copy_from(new)
        return at.node
    if _is_flax(at.owner, "Pytree"):
        setattr(at.owner, at.key, new)
    else:
        at.owner[at.key] = new
    return new


def _nodes(node: Any) -> Iterator[_Place]:
    """All that a module holds; what is shared, at each of its paths."""
    stack = [(_Place("", node), frozenset[int]())]
    while stack:
        at, above = stack.pop()
        yield at
        if id(at.node) in above or _is_flax(at.node, "Variable"):
            continue
        inside = above | {id(at.node)}
        for name, key, child in reversed(_children(at.node)):
            path = f"{at.path}.{name}" if at.path else name
            stack.append((_Place(path, child, at.node, key), inside))


def _children(node: Any) -> list[tuple[str, Any, Any]]:
    """The next level, in a module or any other pytree: as in a path, the key, the child."""
    if _is_flax(node, "Pytree"):
        return [(name, name, child) for name, child in vars(node).items()]
    rows = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return [
        (
            jax.tree_util.keystr(path, simple=True),
            getattr(path[0], "idx", getattr(path[0], "key", None)),
            child,
        )
        for path, child in rows
        if path
    ]


def _is_flax(node: Any, name: str) -> bool:
    """Whether it is of an NNX class; by name, so that the core needs no framework."""
    return not isinstance(node, type) and any(
        cls.__name__ == name and cls.__module__.startswith("flax.nnx") for cls in type(node).__mro__
    )


# Stacked layers (nnx.vmap) have an axis before those of the layer: axes count from the last.


def _linear(layer: Any, cuts: Cuts) -> None:
    if "kernel" in cuts:
        layer.in_features, layer.out_features = cuts["kernel"].small[-2:]


def _convolution(layer: Any, cuts: Cuts) -> None:
    if "kernel" not in cuts:
        return
    cut = cuts["kernel"]
    _kernel_shape(layer, cut)
    layer.feature_group_count = len(_rows(cut, len(cut.shape) - 1, layer.feature_group_count))
    layer.in_features = cut.small[-2] * layer.feature_group_count
    layer.out_features = cut.small[-1]


def _kernel_shape(layer: Any, cut: Cut) -> None:
    """Of a convolution, with its mask, which Flax wants in the same shape."""
    layer.kernel_shape = cut.small[-len(layer.kernel_shape) :]
    if layer.mask is not None and np.shape(layer.mask) == cut.shape:
        layer.mask = layer.mask[np.ix_(*map(cut.kept, range(len(cut.shape))))]


def _rows(cut: Cut, axis: int, groups: int) -> np.ndarray:
    """The groups of an axis of which something stays."""
    return np.unique(cut.kept(axis) // (cut.shape[axis] // groups))


def _transposed(layer: Any, cuts: Cuts) -> None:
    if "kernel" in cuts:
        _kernel_shape(layer, cuts["kernel"])
        sizes = layer.kernel_shape[-2:]
        layer.in_features, layer.out_features = sizes[::-1] if layer.transpose_kernel else sizes


def _general(layer: Any, cuts: Cuts) -> None:
    if "kernel" not in cuts:
        return
    small = cuts["kernel"].small
    last = len(small) - len(layer.out_features)
    first = last - len(layer.in_features)
    layer.in_features, layer.out_features = small[first:last], small[last:]
    batch = small[first - len(layer.batch_axis) : first]
    layer.batch_axis = type(layer.batch_axis)(zip(layer.batch_axis, batch, strict=True))


def _einsum(layer: Any, cuts: Cuts) -> None:
    for name in ("kernel", "bias"):
        if name in cuts:
            have = getattr(layer, f"{name}_shape")
            setattr(layer, f"{name}_shape", cuts[name].small[-len(have) :])


def _norm(layer: Any, cuts: Cuts) -> None:
    cut = _of_norm(cuts)
    if cut is not None:
        layer.num_features = cut.small[-1]


def _group_norm(layer: Any, cuts: Cuts) -> None:
    cut = _of_norm(cuts)
    if cut is not None:
        layer.num_groups = len(_rows(cut, len(cut.shape) - 1, layer.num_groups))
        layer.group_size = cut.small[-1] // layer.num_groups


def _of_norm(cuts: Cuts) -> Cut | None:
    return next((cuts[name] for name in ("scale", "bias", "mean", "var") if name in cuts), None)


def _embed(layer: Any, cuts: Cuts) -> None:
    if "embedding" in cuts:
        layer.num_embeddings, layer.features = cuts["embedding"].small[-2:]


def _cell(layer: Any, cuts: Cuts) -> None:
    """Sizes are those of the kernels inside, which are cut already."""
    del cuts
    inputs = next(getattr(layer, n) for n in ("ii", "dense_i") if hasattr(layer, n))
    hidden = next(getattr(layer, n) for n in ("hi", "dense_h") if hasattr(layer, n))
    layer.in_features = inputs.kernel.shape[-2]
    layer.hidden_features = hidden.kernel.shape[-2]


def _attention(layer: Any, cuts: Cuts) -> None:
    """Likewise."""
    del cuts
    layer.num_heads, layer.head_dim = layer.query.kernel.shape[-2:]
    layer.qkv_features = layer.num_heads * layer.head_dim
    layer.num_kv_heads = layer.key.kernel.shape[-2]
    layer.in_features, layer.in_kv_features = (
        getattr(layer, name).kernel.shape[-3] for name in ("query", "key")
    )
    layer.out_features = layer.out.kernel.shape[-1]


_SIZES: dict[str, Callable[[Any, Cuts], None]] = {
    "Linear": _linear,
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "LinearGeneral": _general,
    "Einsum": _einsum,
    "BatchNorm": _norm,
    "LayerNorm": _norm,
    "RMSNorm": _norm,
    "InstanceNorm": _norm,
    "GroupNorm": _group_norm,
    "Embed": _embed,
    "LSTMCell": _cell,
    "OptimizedLSTMCell": _cell,
    "GRUCell": _cell,
    "SimpleCell": _cell,
    "MultiHeadAttention": _attention,
}
