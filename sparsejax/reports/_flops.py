"""Operations of one call of a function, and how many of them weights that are zero leave.

The function's jaxpr is walked once. What follows from the params and constants alone is a weight,
whatever was made of it (a transposed kernel, a dequantized one, rows of a fused projection): only
where a product needs it, it is computed, and its zeros are counted.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sparsejax import _checks, _jaxpr, _leaves, _tree, masking
from sparsejax._typing import Masks, Params


class Cost(NamedTuple):
    """Floating-point operations: two for each multiplication with addition.

    Attributes:
      dense: of all products and convolutions.
      effective: of those by weights that are not zero.
    """

    dense: int
    effective: int


class Flops(NamedTuple):
    """Floating-point operations of one call of a function.

    Attributes:
      dense: of all products and convolutions: two for each multiplication with addition.
      effective: of those by weights that are not zero.
      leaves: by the path of a leaf, the cost of the products whose weight it is.
      uncounted: primitives that hide products from the count, with their lines.
    """

    dense: int
    effective: int
    leaves: dict[str, Cost]
    uncounted: tuple[str, ...] = ()


def flops(
    apply_fn: Callable[..., Any], params: Params, *inputs: Any, masks: Masks | None = None
) -> Flops:
    """Counts the operations of one call, of the dense function and without its zero weights.

    Two for each multiplication with addition in matrix products and convolutions; activations,
    biases and normalizations, which are few, do not count. Loops count their turns, branches the
    dearest, of `while` loops one turn: the dense count is that of `dependency.trace`. Padding
    counts as if it were multiplied, as the literature has it (XLA leaves it out).

    The effective count is what a machine would do that skips multiplications by zero *weights*;
    whether yours gains anything is for `latency` to say. Each product is counted by the zeros of
    the weight as it is there, so that fused, tied, transposed, normalized, quantized and stacked
    weights need no care. Zeros of activations, and weights that are picked by what depends on the
    inputs (a mixture of experts), count in full. Cost: no product is computed; only what is made of
    weights alone, where a product uses it.

    Args:
      apply_fn: `(params, *inputs) -> outputs`, pure; of any framework.
      params: a pytree of arrays. Of shapes and dtypes (`jax.ShapeDtypeStruct`) nothing is zero but
        what `masks` prune. Leaves that are no arrays stay what they are.
      *inputs: pytrees of arrays, or of shapes and dtypes; with one example, the operations are
        those of one.
      masks: masks for `params`: what they prune is zero, what they keep of a pruned leaf is not,
        whatever the values are; `None`: the zeros of `params`.

    Returns:
      A `Flops`. A product of two leaves counts for the larger one; one of activations alone
      (attention) for none, so that the leaves may have less than all.

    Raises:
      TypeError: if `apply_fn` cannot be called, masks are not boolean, or a leaf is traced.
      ValueError: if masks do not fit, with the leaf's path.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import reports
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.eye(8, 4), "out": jnp.ones((4, 2))}
      >>> count = reports.flops(mlp, params, jnp.ones((1, 8)))
      >>> count.dense, count.effective  # 2 * (8 * 4 + 4 * 2), and 2 * (4 + 4 * 2)
      (80, 24)
      >>> count.leaves["in"]
      Cost(dense=64, effective=8)
    """
    _checks.function("apply_fn", apply_fn, "(params, *inputs) -> outputs", "model.apply")
    flat = _tree.flatten(params)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if isinstance(leaf, jax.core.Tracer):
            raise TypeError(
                "`params` must hold arrays whose entries are known, got "
                f"{_leaves.describe(leaf)} at {path!r}, which is traced; call flops outside of jit."
            )
    kept = [None] * len(flat.leaves) if masks is None else masking.aligned(masks, params)
    arrays = [i for i, leaf in enumerate(flat.leaves) if hasattr(leaf, "dtype")]

    def run(values: Sequence[Any], inputs: Any) -> Any:
        filled = list(flat.leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        return apply_fn(flat.rebuild(filled), *inputs)

    closed = jax.make_jaxpr(run)([flat.leaves[i] for i in arrays], inputs)
    walk = _Walk({i: math.prod(flat.leaves[i].shape) for i in arrays})
    weights: list[_Weight | None] = [
        _leaf(i, flat.leaves[i], kept[i], atom.aval.dtype)
        for i, atom in zip(arrays, closed.jaxpr.invars, strict=False)
    ]
    rest = [None] * (len(closed.jaxpr.invars) - len(weights))
    tally: _Tally = {}
    walk.run(closed, [*weights, *rest], tally)
    leaves = {flat.paths[i]: cost for i, cost in sorted(tally.items()) if i != _NOBODY}
    dense, effective = map(sum, zip(*tally.values(), strict=True)) if tally else (0, 0)
    return Flops(dense, effective, leaves, tuple(walk.uncounted))


_Tally: TypeAlias = dict[int, Cost]
"""Costs by the number of a leaf."""

# The owner of products without a leaf.
_NOBODY = -1


class _Weight:
    """What does not depend on the inputs; computed when it is asked for.

    Attributes:
      origins: the numbers of the leaves that it is made of.
      shape: its shape.
    """

    def __init__(
        self, origins: frozenset[int], shape: tuple[int, ...], compute: Callable[[], Any]
    ) -> None:
        self.origins = origins
        self.shape = shape
        self._compute = compute

    @functools.cached_property
    def array(self) -> Any:
        """Its value; `None` where only shapes are known."""
        # Also where another function is traced, and these are constants of it.
        with jax.ensure_compile_time_eval():
            return self._compute()

    @functools.cached_property
    def nonzeros(self) -> int:
        """How many entries are not zero, or might not be."""
        if self.array is None:
            return math.prod(self.shape)
        if _leaves.is_inexact(self.array):
            return int(masking.sparsity(self.array).total.nonzeros)
        return int(np.count_nonzero(self.array))


def _leaf(place: int, leaf: Any, mask: Any, dtype: Any) -> _Weight:
    def compute() -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            known = mask is not None and _leaves.is_number(leaf)
            return jnp.broadcast_to(mask, leaf.shape).astype(dtype) if known else None
        array = jnp.asarray(leaf)
        array = array if array.dtype == dtype else array.astype(dtype)
        if mask is None or not _leaves.is_number(array):
            return array
        if _leaves.shape_of(mask) != () and _leaves.is_inexact(array):
            # What a mask keeps is multiplied, though it be zero.
            array = jnp.where(array == 0, jnp.ones((), dtype), array)
        return jnp.where(mask, array, jnp.zeros((), dtype))

    return _Weight(frozenset({place}), leaf.shape, compute)


def _constant(array: Any) -> _Weight:
    return _Weight(frozenset(), np.shape(array), lambda: array)


def _made(eqn: Any, weights: Sequence[_Weight]) -> list[_Weight | None]:
    """What an equation makes of weights alone."""

    @functools.cache
    def answers() -> list[Any] | None:
        arrays = [weight.array for weight in weights]
        if any(array is None for array in arrays):
            return None
        return _jaxpr.bind(eqn, arrays)

    def answer(place: int) -> Any:
        found = answers()
        return None if found is None else found[place]

    origins = frozenset[int]().union(*(weight.origins for weight in weights))
    return [
        _Weight(origins, atom.aval.shape, functools.partial(answer, place))
        for place, atom in enumerate(eqn.outvars)
    ]


_Values: TypeAlias = Sequence[_Weight | None]


class _Walk:
    """A walk over a jaxpr and all that it calls; `None` stands for what depends on the inputs."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self._sizes = sizes
        # By the place in the code, so that a loop does not repeat itself.
        self.uncounted: dict[str, None] = {}

    def run(self, jaxpr: Any, values: _Values, tally: _Tally) -> list[_Weight | None]:
        """What a jaxpr returns; its costs are added to the tally."""
        jaxpr, consts = _jaxpr.opened(jaxpr)
        env: dict[Any, _Weight | None] = dict(zip(jaxpr.invars, values, strict=True))
        env.update(zip(jaxpr.constvars, map(_constant, consts), strict=True))

        def read(atom: Any) -> _Weight | None:
            return _constant(atom.val) if _jaxpr.literal(atom) else env[atom]

        for _, eqn in _jaxpr.live(jaxpr):
            answers = self._step(eqn, [read(atom) for atom in eqn.invars], tally)
            env.update(zip(eqn.outvars, answers, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, values: _Values, tally: _Tally) -> _Values:
        name = eqn.primitive.name
        if name in _jaxpr.CALLS | _jaxpr.REMAT | _jaxpr.CUSTOM_JVP | _jaxpr.CUSTOM_VJP:
            return self.run(_jaxpr.body(eqn), values, tally)
        nothing: _Values = [None] * len(eqn.outvars)
        if name == "scan":
            self._scan(eqn, values, tally)
            return nothing
        if name == "while":
            self._while(eqn, values, tally)
            return nothing
        if name == "cond":
            self._cond(eqn, values, tally)
            return nothing
        if name in _FACTORS:
            self._product(eqn, values, tally)
        elif any(map(_has_product, jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr))):
            line = _jaxpr.line(eqn)
            self.uncounted[f"{name} at {line}" if line else name] = None
        weights = [value for value in values if value is not None]
        if len(weights) < len(values) or eqn.effects:
            return nothing
        return _made(eqn, weights)

    def _scan(self, eqn: Any, values: _Values, tally: _Tally) -> None:
        length, body = eqn.params["length"], eqn.params["jaxpr"]
        consts, carry, rows = _jaxpr.scan_parts(eqn, values)
        jaxpr = _jaxpr.opened(body)[0]
        handed_on = zip(carry, jaxpr.invars[len(consts) :], jaxpr.outvars, strict=False)
        carry = [value if before is after else None for value, before, after in handed_on]
        if not any(map(_is_stack, rows)):
            turn: _Tally = {}
            self.run(body, [*consts, *carry, *(None for _ in rows)], turn)
            _add(tally, turn, length)
            return
        for i in range(length):
            self.run(body, [*consts, *carry, *(_row(value, i) for value in rows)], tally)

    def _while(self, eqn: Any, values: _Values, tally: _Tally) -> None:
        params = eqn.params
        cond, body, carry = _jaxpr.parted(values, params["cond_nconsts"], params["body_nconsts"])
        unknown = [None] * len(carry)
        self.run(params["cond_jaxpr"], [*cond, *unknown], tally)
        self.run(params["body_jaxpr"], [*body, *unknown], tally)

    def _cond(self, eqn: Any, values: _Values, tally: _Tally) -> None:
        tallies: list[_Tally] = []
        for branch in eqn.params["branches"]:
            tallies.append({})
            self.run(branch, values[1:], tallies[-1])
        _add(tally, max(tallies, key=lambda t: sum(cost.dense for cost in t.values())))

    def _product(self, eqn: Any, values: _Values, tally: _Tally) -> None:
        terms, sides = _FACTORS[eqn.primitive.name](eqn)
        dense = 2 * eqn.outvars[0].aval.size * terms
        # Every entry of such an operand is multiplied equally often.
        weights = [w for w in (values[side] for side in sides) if w is not None]
        counts = [dense * w.nonzeros // math.prod(w.shape) for w in weights if dense]
        owners = {i for w in weights for i in w.origins}
        owner = max(sorted(owners), key=lambda i: self._sizes[i], default=_NOBODY)
        _add(tally, {owner: Cost(dense, min(counts, default=dense))})


def _add(tally: _Tally, more: Mapping[int, Cost], times: int = 1) -> None:
    for owner, cost in more.items():
        have = tally.get(owner, Cost(0, 0))
        tally[owner] = Cost(
            have.dense + times * cost.dense, have.effective + times * cost.effective
        )


def _terms_of_product(eqn: Any) -> tuple[int, tuple[int, ...]]:
    """Products that are summed for one entry of the answer, and which operands may be weights."""
    ((summed, _), _), shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    return math.prod(shape[d] for d in summed), (0, 1)


def _terms_of_convolution(eqn: Any) -> tuple[int, tuple[int, ...]]:
    """Likewise; entries of an image are multiplied as often as windows cover them."""
    outputs, *others = eqn.params["dimension_numbers"].rhs_spec
    del outputs
    shape = eqn.invars[1].aval.shape
    return math.prod(shape[d] for d in others), (1,)


_FACTORS = {
    "dot_general": _terms_of_product,
    "conv_general_dilated": _terms_of_convolution,
}


def _is_stack(value: _Weight | None) -> bool:
    """Whether the turns of a loop may have weights of their own."""
    return value is not None and len(value.shape) > 2


def _row(value: _Weight | None, place: int) -> _Weight | None:
    if value is None:
        return None

    def compute() -> Any:
        return None if value.array is None else value.array[place]

    return _Weight(value.origins, value.shape[1:], compute)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _has_product(value: Any) -> bool:
    """Whether it is a jaxpr that multiplies somewhere."""
    if not _is_jaxpr(value):
        return False
    for eqn in _jaxpr.opened(value)[0].eqns:
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        if eqn.primitive.name in _FACTORS or any(map(_has_product, inner)):
            return True
    return False
