"""A jaxpr evaluated with sparse weights in the place of dense ones."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import _jaxpr
from sparsejax.sparse_ops import _forms, _usage
from sparsejax.sparse_ops._convolution import conv
from sparsejax.sparse_ops._matrix import SparseMatrix
from sparsejax.sparse_ops._products import matmul


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["matrix"],
    meta_fields=["shape", "packed", "moves", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Held:
    """A sparse weight where the jaxpr has a dense one.

    Attributes:
      matrix: (inputs, outputs) or HWIO, in the precision in which it is multiplied.
      shape: of the weight itself.
      packed: the moves from the weight to the matrix.
      moves: the moves from the weight to what the jaxpr has here.
      dtype: of what the jaxpr has here.
    """

    matrix: SparseMatrix
    shape: tuple[int, ...]
    packed: _forms.Moves
    moves: _forms.Moves
    dtype: Any

    def moved(self, moves: _forms.Moves, dtype: Any) -> "Held":
        """The same weight in another shape and precision."""
        matrix = self.matrix
        if jnp.finfo(dtype).bits < jnp.finfo(matrix.dtype).bits:
            matrix = dataclasses.replace(matrix, values=matrix.values.astype(dtype))
        return dataclasses.replace(self, matrix=matrix, moves=(*self.moves, *moves), dtype=dtype)

    def dense(self) -> jax.Array:
        """What the jaxpr has here."""
        weight = _forms.undone(self.matrix.to_dense(), self.packed, self.shape)
        return _forms.moved(weight, self.moves).astype(self.dtype)


def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of an open jaxpr on arguments some of which may be `Held`."""
    env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    env.update(zip(jaxpr.constvars, consts, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if _jaxpr.literal(atom) else env[atom]

    for _, eqn in _jaxpr.live(jaxpr):
        answers = _evaluate(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, answers, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(eqn: Any, operands: list[Any]) -> list[Any]:
    sides = [i for i, value in enumerate(operands) if isinstance(value, Held)]
    if not sides:
        return _jaxpr.bind(eqn, operands)
    name = eqn.primitive.name
    moves = _usage.move_of(eqn)
    if moves is not None:
        return [operands[0].moved(moves, eqn.outvars[0].aval.dtype)]
    if name in _jaxpr.CALLS:
        return _inlined(eqn, *operands)
    if name in _jaxpr.REMAT:
        options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        return list(jax.checkpoint(functools.partial(_inlined, eqn), **options)(*operands))
    if name in _jaxpr.CUSTOM_JVP:
        return _with_jvp(eqn, operands)
    if name in _jaxpr.CUSTOM_VJP:
        return _with_vjp(eqn, operands)
    return [_multiplied(eqn, sides[0], operands)]


def _multiplied(eqn: Any, side: int, operands: list[Any]) -> jax.Array:
    form = _forms.form_of(eqn, side)
    assert isinstance(form, _forms.Form)
    matrix = operands[side].matrix
    # In float32: what jaxprs ask for (`preferred_element_type`) may be wider than the operands.
    x = _forms.moved(jnp.asarray(operands[1 - side], jnp.float32), form.x)
    window = form.product.window
    y = matmul(x, matrix) if window is None else conv(x, matrix, **window._asdict())
    return _forms.moved(y, form.y).astype(eqn.outvars[0].aval.dtype)


def _inlined(eqn: Any, *operands: Any) -> list[Any]:
    jaxpr, consts = _jaxpr.opened(_jaxpr.body(eqn))
    return run(jaxpr, consts, operands)


def _with_jvp(eqn: Any, operands: list[Any]) -> list[Any]:
    """The function itself is sparse, its own derivative has the dense weight."""
    function = jax.custom_jvp(functools.partial(_inlined, eqn))

    @function.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return jax.jvp(functools.partial(_whole, eqn), primals, tangents)

    return list(function(*operands))


def _with_vjp(eqn: Any, operands: list[Any]) -> list[Any]:
    """Likewise; what the backward pass needs is computed anew there."""
    function = jax.custom_vjp(functools.partial(_inlined, eqn))

    def backward(primals: Any, cotangents: Any) -> Any:
        return jax.vjp(functools.partial(_whole, eqn), *primals)[1](cotangents)

    function.defvjp(lambda *primals: (_inlined(eqn, *primals), primals), backward)
    return list(function(*operands))


def _whole(eqn: Any, *operands: Any) -> list[Any]:
    return _jaxpr.bind(eqn, [x.dense() if isinstance(x, Held) else x for x in operands])
