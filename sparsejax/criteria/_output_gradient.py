"""The importance of the network's output: the mean of the absolute derivatives."""

import enum
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Params, Scores
from sparsejax.criteria._batches import check_chunk_size, check_examples
from sparsejax.criteria._leafwise import unscored

_UNROLLED = 16


class _Role(enum.Enum):
    """What a leaf is to `output_gradient`: differentiated, or an array that is held fixed."""

    FREE = enum.auto()
    FIXED = enum.auto()


def output_gradient(
    apply_fn: Callable[[Params, Any], jax.Array],
    params: Params,
    inputs: Any,
    *,
    chunk_size: int = 1,
) -> Scores:
    """The importance of the output: mean of |∂f_o(x_e; θ)/∂θ_i| over examples e and outputs o.

    A mean of absolute values, not the absolute value of a mean: derivatives of opposite sign do not
    cancel. Every example and output costs one backward pass. Memory is bounded by `chunk_size` + 1
    copies of the floating params and the activations of `chunk_size` examples, whatever the number
    of examples and outputs.

    Call it outside `jit`, where it compiles a step of its own in every call and runs it chunk by
    chunk; it works inside, as a loop in which XLA's convolutions on CPU are many times slower.

    Args:
      apply_fn: `(params, inputs) -> outputs`, batched, with real outputs of shape (examples, ...).
        An example's output must not depend on the others (no batch statistics).
      params: a pytree of arrays; leaves that are not floating are held fixed.
      inputs: an array, or a pytree of arrays, with a common leading axis of examples.
      chunk_size: how many examples are differentiated together, at least 1. On CPU 1 is fastest by
        far (`vmap` over a kernel's gradient is slow); accelerators want more.

    Returns:
      Scores like `params`: float32 (float64 where the params are), >= 0, in units of the output
      per unit of the parameter.

    Raises:
      TypeError: if `apply_fn` cannot be called or its output is no real floating array.
      ValueError: if there is no example or output, if leading axes differ, if `apply_fn` does not
        keep them, or if `chunk_size` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> inputs = jnp.array([[1.0], [-3.0]])  # d(w x)/dw = x; the mean of |x| is 2
      >>> criteria.output_gradient(lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))}, inputs)["w"]
      Array([[2.]], dtype=float32)
    """
    _checks.function("apply_fn", apply_fn, "(params, inputs) -> outputs", "a Flax apply function")
    examples = check_examples("inputs", inputs)
    outputs = _check_outputs(apply_fn, params, inputs, examples)
    check_chunk_size(chunk_size)
    flat = _tree.flatten(params)
    roles = tuple(map(_role, flat.leaves))
    function = _Function(apply_fn, flat.structure, roles, outputs)
    pairs = list(zip(flat.leaves, roles, strict=True))
    theta = [jnp.asarray(leaf) for leaf, role in pairs if role is _Role.FREE]
    fixed = [leaf for leaf, role in pairs if role is _Role.FIXED]
    total = [jnp.zeros(t.shape, _leaves.wide_dtype(t.dtype)) for t in theta]

    whole = examples - examples % chunk_size
    shape = (whole // chunk_size, chunk_size)
    chunks = jax.tree.map(lambda x: x[:whole].reshape(*shape, *x.shape[1:]), inputs)
    rest = jax.tree.map(lambda x: x[whole:], inputs)
    if _leaves.is_traced(*total, *theta, *fixed, *jax.tree.leaves(chunks)):
        add = partial(_add_chunk_in_loop, function, theta, fixed)
        total = jax.lax.scan(lambda t, chunk: (add(t, chunk), None), total, chunks)[0]
    else:
        # Compiled anew in every call, since `apply_fn` may close over what has changed.
        compiled = jax.jit(partial(_add_chunk, function))
        add = partial(_add_chunk_eagerly, compiled, function.outputs, theta, fixed)
        for i in range(whole // chunk_size):
            total = add(total, jax.tree.map(itemgetter(i), chunks))
    if whole < examples:
        total = add(total, rest)
    means = iter([t / (examples * outputs) for t in total])
    return flat.rebuild([next(means) if role is _Role.FREE else unscored() for role in roles])


class _Function(NamedTuple):
    """The function of one example whose outputs are differentiated."""

    apply_fn: Callable[[Params, Any], jax.Array]
    structure: Any
    roles: tuple[Any, ...]
    outputs: int

    def outputs_of(self, theta: list[jax.Array], fixed: list[Any], example: Any) -> jax.Array:
        """All outputs of one example, as one vector."""
        values = {_Role.FREE: iter(theta), _Role.FIXED: iter(fixed)}
        leaves = [next(values[r]) if isinstance(r, _Role) else r for r in self.roles]
        batch = jax.tree.map(lambda x: x[None], example)
        return jnp.ravel(self.apply_fn(jax.tree.unflatten(self.structure, leaves), batch))


def _add_chunk(
    function: _Function,
    theta: list[jax.Array],
    fixed: list[Any],
    total: list[jax.Array],
    chunk: Any,
    first: jax.Array,
) -> list[jax.Array]:
    """Adds Σ |∂f_o/∂θ| over the examples of a chunk and `_UNROLLED` outputs from `first` on."""

    def of_example(example: Any) -> list[jax.Array]:
        values, pull_back = jax.vjp(lambda t: function.outputs_of(t, fixed, example), theta)
        added = [jnp.zeros(t.shape, t.dtype) for t in total]
        # Unrolled: a vmap over outputs writes out every derivative before it adds them up.
        for i in range(min(_UNROLLED, function.outputs)):
            # Beyond the last output the pick is all zeros, and adds |0|.
            pick = (jnp.arange(function.outputs) == first + i).astype(values.dtype)
            (derivatives,) = pull_back(pick)
            pairs = zip(added, derivatives, strict=True)
            added = [t + jnp.abs(d.astype(t.dtype)) for t, d in pairs]
        return added

    if jax.tree.leaves(chunk)[0].shape[0] == 1:
        sums = of_example(jax.tree.map(itemgetter(0), chunk))
    else:
        sums = [jnp.sum(s, axis=0) for s in jax.vmap(of_example)(chunk)]
    return [t + s for t, s in zip(total, sums, strict=True)]


def _add_chunk_eagerly(
    compiled: Callable[..., list[jax.Array]],
    outputs: int,
    theta: list[jax.Array],
    fixed: list[Any],
    total: list[jax.Array],
    chunk: Any,
) -> list[jax.Array]:
    for first in range(0, outputs, _UNROLLED):
        total = compiled(theta, fixed, total, chunk, first)
    return total


def _add_chunk_in_loop(
    function: _Function,
    theta: list[jax.Array],
    fixed: list[Any],
    total: list[jax.Array],
    chunk: Any,
) -> list[jax.Array]:
    def add(i: jax.Array, total: list[jax.Array]) -> list[jax.Array]:
        return _add_chunk(function, theta, fixed, total, chunk, i * _UNROLLED)

    return jax.lax.fori_loop(0, -(-function.outputs // _UNROLLED), add, total)


def _role(leaf: Any) -> Any:
    """The leaf itself where it is no array: a function, say."""
    if _leaves.is_floating(leaf):
        return _Role.FREE
    return _Role.FIXED if hasattr(leaf, "dtype") else leaf


def _check_outputs(apply_fn: Callable[..., Any], params: Params, inputs: Any, examples: int) -> int:
    """The number of outputs of one example."""
    out = jax.eval_shape(lambda x: apply_fn(params, x), inputs)
    if not _leaves.is_floating(out):
        raise TypeError(
            "`apply_fn` must return one array of real floating numbers, got "
            f"{_leaves.describe(out)}; wrap it so that it returns the outputs alone."
        )
    if not out.shape or out.shape[0] != examples:
        raise ValueError(
            f"`apply_fn` must return outputs with a leading axis of {examples} examples, got "
            f"{_leaves.describe(out)}."
        )
    if 0 in out.shape:
        raise ValueError(
            f"`apply_fn` must return at least one output, got {_leaves.describe(out)}."
        )
    return int(np.prod(out.shape[1:]))
