"""Smaller NNX modules: their arrays, and the sizes that they store beside them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparsejax import _leaves
from sparsejax.shrinking._cutting import shrink
from sparsejax.shrinking._plan import Cut, Plan

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
      A module of the same class.

    Raises:
      TypeError: if `model` is no NNX module.
      ValueError: if its arrays have not the shapes of the plan.

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
    if not _is_module(model):
        raise TypeError(f"`model` must be an nnx.Module, got {_leaves.brief(model)}.")
    small = shrink(copy.deepcopy(model), plan)
    _walk(small, "", plan, set())
    return small


def _walk(node: Any, path: str, plan: Plan, seen: set[int]) -> None:
    if id(node) in seen:
        return
    seen.add(id(node))
    if _is_module(node):
        own = {
            name.rpartition(".")[2]: cut
            for name, cut in plan.leaves.items()
            if name.rpartition(".")[0] == path
        }
        for cls in type(node).__mro__:
            if cls.__module__.startswith("flax.nnx") and cls.__name__ in _SIZES:
                _SIZES[cls.__name__](node, own)
                break
        children = vars(node).items()
    elif isinstance(node, Mapping):
        children = node.items()
    elif isinstance(node, list | tuple):
        children = {str(i): child for i, child in enumerate(node)}.items()
    else:
        return
    for name, child in list(children):
        _walk(child, f"{path}.{name}" if path else str(name), plan, seen)
    if type(node).__name__ == "MultiHeadAttention":
        _attention(node)


def _is_module(node: Any) -> bool:
    """By name, so that the core needs no framework."""
    return not isinstance(node, type) and any(
        cls.__name__ == "Module" and cls.__module__.startswith("flax.nnx")
        for cls in type(node).__mro__
    )


def _linear(layer: Any, cuts: Cuts) -> None:
    if "kernel" in cuts:
        layer.in_features, layer.out_features = cuts["kernel"].small


def _convolution(layer: Any, cuts: Cuts) -> None:
    if "kernel" not in cuts:
        return
    cut = cuts["kernel"]
    layer.kernel_shape = cut.small
    layer.feature_group_count = len(_rows(cut, len(cut.shape) - 1, layer.feature_group_count))
    layer.in_features = cut.small[-2] * layer.feature_group_count
    layer.out_features = cut.small[-1]


def _rows(cut: Cut, axis: int, groups: int) -> np.ndarray:
    """The groups of an axis of which something stays."""
    return np.unique(cut.kept(axis) // (cut.shape[axis] // groups))


def _transposed(layer: Any, cuts: Cuts) -> None:
    if "kernel" in cuts:
        layer.kernel_shape = cuts["kernel"].small
        sizes = layer.kernel_shape[-2:]
        layer.in_features, layer.out_features = sizes[::-1] if layer.transpose_kernel else sizes


def _general(layer: Any, cuts: Cuts) -> None:
    if "kernel" in cuts:
        outputs = len(layer.out_features)
        first = len(cuts["kernel"].shape) - outputs - len(layer.in_features)
        layer.in_features = cuts["kernel"].small[first:-outputs]
        layer.out_features = cuts["kernel"].small[-outputs:]


def _einsum(layer: Any, cuts: Cuts) -> None:
    for name in ("kernel", "bias"):
        if name in cuts:
            setattr(layer, f"{name}_shape", cuts[name].small)


def _norm(layer: Any, cuts: Cuts) -> None:
    cut = next(iter(cuts.values()), None)
    if cut is not None and cut.shape == (layer.num_features,):
        (layer.num_features,) = cut.small


def _group_norm(layer: Any, cuts: Cuts) -> None:
    cut = next(iter(cuts.values()), None)
    if cut is not None:
        layer.num_groups = len(_rows(cut, 0, layer.num_groups))
        layer.group_size = cut.small[0] // layer.num_groups


def _embed(layer: Any, cuts: Cuts) -> None:
    if "embedding" in cuts:
        layer.num_embeddings, layer.features = cuts["embedding"].small


def _cell(layer: Any, cuts: Cuts) -> None:
    """Sizes are those of the linear layers inside, which are cut afterwards."""
    del cuts
    inputs = next((getattr(layer, n) for n in ("ii", "dense_i") if hasattr(layer, n)), None)
    if inputs is not None:
        layer.in_features = inputs.kernel.shape[0]
    hidden = next((getattr(layer, n) for n in ("hi", "dense_h") if hasattr(layer, n)), None)
    if hidden is not None:
        layer.hidden_features = hidden.kernel.shape[0]


def _attention(layer: Any) -> None:
    heads, width = layer.query.kernel.shape[-2:]
    layer.num_heads, layer.head_dim, layer.qkv_features = heads, width, heads * width
    layer.num_kv_heads = layer.key.kernel.shape[-2]
    layer.in_features, layer.in_kv_features = (
        getattr(layer, name).kernel.shape[0] for name in ("query", "key")
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
}
