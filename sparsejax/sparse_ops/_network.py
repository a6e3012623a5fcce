"""A function of params, traced, some of whose weights are sparse."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_map_with_path

from sparsejax import _leaves, _tree
from sparsejax._typing import Params
from sparsejax.sparse_ops import _evaluation, _forms, _usage
from sparsejax.sparse_ops._matrix import SparseMatrix
from sparsejax.sparse_ops._product import Product
from sparsejax.sparse_ops._report import Report


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight that is replaced.

    Attributes:
      path: where it stands in the params.
      key: the same as JAX writes it.
      shape: its own.
      moves: what makes it (inputs, outputs), or HWIO.
    """

    path: str
    key: str
    shape: tuple[int, ...]
    moves: _forms.Moves

    def sparse(self, leaf: Any, mask: np.ndarray, products: Sequence[Product]) -> SparseMatrix:
        """The sparse one."""
        kept = np.ascontiguousarray(_forms.moved(mask, self.moves))
        batch = max(product.batch for product in products)
        w = _forms.moved(jnp.asarray(leaf), self.moves)
        return SparseMatrix.from_dense(w, kept, block=products[0].block, batch=batch)

    def dense(self, matrix: SparseMatrix) -> jax.Array:
        """The dense one."""
        return _forms.undone(matrix.to_dense(), self.moves, self.shape)

    def check(self, matrix: Any) -> None:
        """Refuses what is not like `sparse`'s."""
        shape = _forms.shape_after(self.moves, self.shape)
        if not isinstance(matrix, SparseMatrix) or matrix.shape != shape:
            got = matrix if isinstance(matrix, SparseMatrix) else _leaves.describe(matrix)
            raise ValueError(
                f"`sparse_params` must hold a SparseMatrix of shape {shape} at {self.path!r}, got "
                f"{got}; pass the params that sparsify returned, or those of an optimizer's step "
                "from there."
            )


@dataclasses.dataclass(frozen=True)
class Traced:
    """A jaxpr.

    Attributes:
      jaxpr: closed, of the leaves that are arrays, and those of the inputs.
      structure: of the outputs.
      arrays: the places of the leaves that are arrays.
      uses: by the place of a leaf, what is done with it.
    """

    jaxpr: Any
    structure: Any
    arrays: list[int]
    uses: dict[int, list[_usage.Use]]


@dataclasses.dataclass(frozen=True)
class Network:
    """A function of params of one structure."""

    apply_fn: Callable[..., Any]
    structure: Any

    def trace(self, leaves: Sequence[Any], inputs: Any, weights: Collection[int]) -> Traced:
        """Its jaxpr, and what it does with some leaves; those that are no arrays are constants."""
        for path, leaf in zip(*_tree.flatten(inputs)[:2], strict=True):
            if not all(_leaves.is_int(n) for n in _leaves.shape_of(leaf) or ()):
                raise ValueError(
                    f"`inputs` must have sizes that are numbers, got {_leaves.describe(leaf)} at "
                    f"{path!r}: trace and export one batch size, or each that is wanted."
                )
        arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

        def run(values: Sequence[Any], inputs: Any) -> Any:
            filled = list(leaves)
            for i, value in zip(arrays, values, strict=True):
                filled[i] = value
            return self.apply_fn(jax.tree.unflatten(self.structure, filled), *inputs)

        values = [leaves[i] for i in arrays]
        closed, shape = jax.make_jaxpr(run, return_shape=True)(values, inputs)
        places = {place: i for place, i in enumerate(arrays) if i in weights}
        uses = _usage.uses(closed.jaxpr, places)
        return Traced(closed, jax.tree.structure(shape), arrays, uses)


def program(apply_fn: Callable[..., Any], params: Params, inputs: Any) -> Callable[[], Any]:
    """A call of a function, compiled, that waits for its end."""
    leaves, structure = jax.tree.flatten(params, is_leaf=_is_sparse)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    @jax.jit
    def run(arrays: dict[int, Any], inputs: Any) -> Any:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return apply_fn(jax.tree.unflatten(structure, filled), *inputs)

    return lambda: jax.block_until_ready(run(arrays, inputs))


class FastApply:
    """A function that skips the zeros of its weights: what `sparsify` makes of `apply_fn`.

    Attributes:
      report: what became of every weight; prints as a table.
    """

    def __init__(self, network: Network, weights: Mapping[int, Weight], report: Report) -> None:
        self._network, self._weights = network, dict(weights)
        self.report = report

    def __call__(self, sparse_params: Params, *inputs: Any) -> Any:
        """The outputs of `apply_fn` with the sparse weights in the place of the dense ones."""
        leaves = self._leaves(sparse_params)
        shapes = list(leaves)
        for i, weight in self._weights.items():
            shapes[i] = jax.ShapeDtypeStruct(weight.shape, leaves[i].dtype)
        traced = self._network.trace(shapes, inputs, self._weights)
        self._check_uses(traced)
        args = [self._held(i, leaves[i]) for i in traced.arrays]
        args += map(_array, jax.tree.leaves(inputs))
        outputs = _evaluation.run(traced.jaxpr.jaxpr, traced.jaxpr.consts, args)
        return jax.tree.unflatten(traced.structure, outputs)

    def to_dense(self, sparse_params: Params) -> Params:
        """Params like those that `sparsify` was given, with zeros; works under `jit`.

        Trees that lack other leaves will do, such as gradients (`eqx.filter_grad`).
        """
        weights = {weight.key: weight for weight in self._weights.values()}

        def dense(key: Any, leaf: Any) -> Any:
            if not _is_sparse(leaf):
                return leaf
            if keystr(key) not in weights:
                raise ValueError(
                    "`sparse_params` must have the structure that sparsify returned, got a "
                    f"SparseMatrix at {keystr(key)!r}, where it made none."
                )
            weights[keystr(key)].check(leaf)
            return weights[keystr(key)].dense(leaf)

        return tree_map_with_path(dense, sparse_params, is_leaf=_is_sparse)

    def __repr__(self) -> str:
        return f"FastApply({self.report!r})"

    def _leaves(self, sparse_params: Params) -> list[Any]:
        leaves, structure = jax.tree.flatten(sparse_params, is_leaf=_is_sparse)
        if structure != self._network.structure:
            raise ValueError(
                "`sparse_params` must have the structure that sparsify returned, "
                f"{_leaves.brief(self._network.structure)}, got {_leaves.brief(structure)}."
            )
        for i, weight in self._weights.items():
            weight.check(leaves[i])
        return list(leaves)

    def _held(self, place: int, leaf: Any) -> Any:
        if place not in self._weights:
            return _array(leaf)
        weight = self._weights[place]
        return _evaluation.Held(leaf, weight.shape, weight.moves, (), leaf.dtype)

    def _check_uses(self, traced: Traced) -> None:
        for i, weight in self._weights.items():
            for use in traced.uses.get(i, ()):
                if use.why or use.moves != weight.moves:
                    why = use.why or "its axes are wanted in another order"
                    raise ValueError(
                        f"`apply_fn` must use {weight.path!r} as it did when sparsify traced it, "
                        f"but with these inputs it does not: {why}. Call sparsify with such inputs."
                    )


def _is_sparse(leaf: Any) -> bool:
    return isinstance(leaf, SparseMatrix)


def _array(leaf: Any) -> Any:
    """What equations are evaluated on: no Python numbers, no NumPy arrays of wider dtypes."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
