"""Criteria: functions `(params, grads) -> scores`, higher = keep.

Scores are a pytree like the params. Those of half-precision leaves are float32, so that a product
does not underflow. A leaf that is no floating array (integers, functions, PRNG keys), or that has
no gradient where the criterion needs one, gets a 0-d boolean instead of scores, which no filter for
floating leaves selects.
"""

import enum
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Criterion, Params, Scores

_UNROLLED = 16


class _Role(enum.Enum):
    """What a leaf is to `output_gradient`: differentiated, or an array that is held fixed."""

    FREE = enum.auto()
    FIXED = enum.auto()


def magnitude(params: Params, grads: Params = None) -> Scores:
    """Scores by |θ|: what is small is assumed to matter little. One read, one write.

    Args:
      params: a pytree of arrays.
      grads: not looked at; here so that every criterion is called alike.

    Returns:
      Scores like `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> criteria.magnitude({"w": jnp.array([[3.0, -4.0]])})["w"]
      Array([[3., 4.]], dtype=float32)

    References:
      S. Han, J. Pool, J. Tran, W. Dally, *Learning both weights and connections for efficient
      neural networks*, NeurIPS 2015, https://arxiv.org/abs/1506.02626
    """
    del grads
    return _score(jnp.abs, params)


def gradient(params: Params, grads: Params) -> Scores:
    """Scores by |g|: how much the function moves per unit of the parameter. One read, one write.

    Args:
      params: a pytree of arrays.
      grads: gradients of a loss, or the importance from `output_gradient`; structure and shapes
        of `params`, `None` where a leaf has none.

    Returns:
      Scores like `params`.

    Raises:
      ValueError: if structure or shapes do not match, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> criteria.gradient({"w": jnp.ones((1, 2))}, {"w": jnp.array([[0.5, -2.0]])})["w"]
      Array([[0.5, 2. ]], dtype=float32)

    References:
      M. Mozer and P. Smolensky, *Skeletonization: a technique for trimming the fat from a network
      via relevance assessment*, NeurIPS 1988,
      https://proceedings.neurips.cc/paper/1988/hash/07e1cd7dca89a1678042477183b7ac3f-Abstract.html
    """
    return _score(lambda w, g: jnp.abs(g), params, grads)


def taylor(params: Params, grads: Params) -> Scores:
    """Scores by |θ·g|: to first order, how much the function changes when θ becomes zero.

    Args:
      params: a pytree of arrays.
      grads: gradients, structure and shapes of `params`, `None` where a leaf has none.

    Returns:
      Scores like `params`. An infinite gradient at a zero parameter gives NaN.

    Raises:
      ValueError: if structure or shapes do not match, with the leaf's path.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> params, grads = {"w": jnp.array([[3.0, -4.0]])}, {"w": jnp.array([[2.0, 0.5]])}
      >>> criteria.taylor(params, grads)["w"]
      Array([[6., 2.]], dtype=float32)

    References:
      P. Molchanov, S. Tyree, T. Karras, T. Aila, J. Kautz, *Pruning convolutional neural networks
      for resource efficient inference*, ICLR 2017, https://arxiv.org/abs/1611.06440; here per
      entry, there summed over feature maps before the absolute value.
    """
    return _score(lambda w, g: jnp.abs(w * g), params, grads)


def lamp(params: Params, grads: Params = None) -> Scores:
    """Scores by LAMP: θ² over the sum of the squares in the leaf that are not smaller.

    `score_u = θ_u² / Σ_v θ_v²` over the entries v of the same leaf that rank not below u, by |θ|
    and, where that is equal, the lower flat index higher. Within a leaf the order is that of
    `magnitude`; across leaves the scores compare, which makes a global threshold choose the
    sparsity of every leaf (`masking.topk(scores, sparsity)`). The largest entry of every leaf
    scores 1, so that no leaf is emptied before all of them are down to one entry.

    Sorts every leaf, the slowest of the criteria by far, and gathers a leaf that is sharded.

    Args:
      params: a pytree of arrays.
      grads: not looked at; here so that every criterion is called alike.

    Returns:
      Scores like `params`, in [0, 1], independent of a leaf's scale. Different magnitudes have
      different scores, unless these are below the least normal number, 1e-38 (2e-308 in float64):
      such may be 0, the score of zeros. NaN scores NaN (which `masking.topk` refuses) and does not
      count for the others; where there are infinite entries, finite ones score 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> criteria.lamp({"w": jnp.array([[1.0, -2.0, 2.0]])})["w"]  # 1/9, 4/4, 4/8
      Array([[0.11111111, 1.        , 0.5       ]], dtype=float32)

    References:
      J. Lee, S. Park, S. Mo, S. Ahn, J. Shin, *Layer-adaptive sparsity for the magnitude-based
      pruning*, ICLR 2021, https://arxiv.org/abs/2010.07611. Its code takes sums of the smaller
      squares from the total, which cancels; here the sums begin at the largest square.
    """
    del grads
    return _score(_lamp, params)


def random(key: jax.Array) -> Criterion:
    """A criterion that scores uniformly at random: the baseline every other one must beat.

    Args:
      key: a PRNG key; the same key gives the same scores.

    Returns:
      A criterion `(params, grads=None) -> scores`, with independent scores in [0, 1) in each leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> scores = criteria.random(jax.random.key(0))({"w": jnp.ones((2, 3))})
      >>> scores["w"].shape, bool(jnp.all((scores["w"] >= 0) & (scores["w"] < 1)))
      ((2, 3), True)
    """
    _checks.key("key", key)

    def criterion(params: Params, grads: Params = None) -> Scores:
        del grads
        flat = _tree.flatten(params)
        return flat.rebuild(
            [
                # The zeros are sharded like the leaf.
                jax.random.uniform(jax.random.fold_in(key, i), np.shape(leaf))
                + jnp.zeros_like(leaf, jnp.float32)
                if _leaves.is_inexact(leaf)
                else _unscored()
                for i, leaf in enumerate(flat.leaves)
            ]
        )

    return criterion


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
    examples = _check_inputs(inputs)
    outputs = _check_outputs(apply_fn, params, inputs, examples)
    _check_chunk_size(chunk_size)
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
    return flat.rebuild([next(means) if role is _Role.FREE else _unscored() for role in roles])


def mean_gradients(
    grad_fn: Callable[[Params, Any], Params], params: Params, batches: Iterable[Any]
) -> Params:
    """The mean of the gradients over several batches, for criteria that look at gradients.

    The gradient of one batch is mostly noise. A mean of signed gradients is the gradient on all the
    batches together; for a mean of absolute values let `grad_fn` take them. One batch at a time, in
    float32 or wider, so memory does not grow with their number. Compile `grad_fn`.

    Args:
      grad_fn: `(params, batch) -> grads`, such as `jax.jit(jax.grad(loss))`.
      params: a pytree of arrays.
      batches: any iterable of batches of equal size: a list, a generator, or an array whose
        first axis counts batches.

    Returns:
      A tree like the gradients, float32 at least; what is no floating array (`None`, float0) is
      that of the first.

    Raises:
      TypeError: if `grad_fn` cannot be called or `batches` not iterated over.
      ValueError: if there is no batch, or gradients of two batches do not match.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria
      >>> def loss(w, x):
      ...     return jnp.sum(w * x)
      >>> batches = [jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0])]
      >>> criteria.mean_gradients(jax.grad(loss), jnp.zeros(2), batches)
      Array([2., 4.], dtype=float32)
    """
    _checks.function("grad_fn", grad_fn, "(params, batch) -> grads", "jax.jit(jax.grad(loss))")
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
        raise TypeError(
            f"`batches` must be a list or another iterable of batches, got "
            f"{_leaves.brief(batches)}; "
            "for one batch [batch]."
        )
    total, count = None, 0
    for batch in batches:
        grads = grad_fn(params, batch)
        total = grads if total is None else _sum_of_gradients(grads, total)
        count += 1
    if count == 0:
        raise ValueError("`batches` must hold at least one batch, got none.")
    mean = _tree.flatten(total)
    return mean.rebuild(
        [_leaves.wide(g) / count if _leaves.is_inexact(g) else g for g in mean.leaves]
    )


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


def _lamp(w: jax.Array) -> jax.Array:
    sharding = jax.typeof(w).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return _lamp_whole(w)
    # Here nothing is gathered unless one says so, and a sort needs the whole leaf.
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.reshard(_lamp_whole(jax.sharding.reshard(w, whole)), sharding)


def _lamp_whole(w: jax.Array) -> jax.Array:
    if w.size == 0:
        return jnp.abs(w)
    magnitude = jnp.ravel(jnp.abs(w))
    nan = jnp.isnan(magnitude)
    magnitude = jnp.where(nan, 0, magnitude)
    # Stable: of equal magnitudes the lower flat index comes first.
    indices = jnp.arange(magnitude.size)
    negative, order = jax.lax.sort((-magnitude, indices), num_keys=1, is_stable=True)
    # The first square is 1 or more, unless all are zero.
    squares = jnp.square(_scaled(-negative))
    ranked = _decreasing(squares / jnp.maximum(jnp.cumsum(squares), 1), negative)
    scores = jnp.zeros_like(ranked).at[order].set(ranked, unique_indices=True)
    return jnp.where(nan, jnp.nan, scores).reshape(w.shape)


def _scaled(descending: jax.Array) -> jax.Array:
    """Magnitudes by the power of two that brings the first into [2, 4); infinite ones as 1.

    Exact, where a quotient by the first would not be: XLA takes its reciprocal, maybe a denormal.
    """
    dtype = descending.dtype
    integer = np.dtype(f"int{8 * dtype.itemsize}")
    infinity = np.asarray(np.inf, dtype).view(integer)
    exponent = jax.lax.bitcast_convert_type(descending[0], integer) & infinity
    power = jax.lax.bitcast_convert_type(infinity - exponent, dtype)
    finite = descending * jnp.where(exponent == 0, 0, power)
    return jnp.where(exponent == infinity, jnp.isinf(descending).astype(dtype), finite)


def _decreasing(scores: jax.Array, ascending: jax.Array) -> jax.Array:
    """The scores, lowered by as few units in the last place as make them decrease strictly.

    A parallel sum is rounded here up and there down, which would change the order of neighbours.
    A score is the bits of an integer that orders as it does; it must be less by one at least
    wherever `ascending` moves on, and no more anywhere.
    """
    integer = np.dtype(f"int{8 * scores.dtype.itemsize}")
    moves = jnp.zeros(ascending.shape, integer).at[1:].set(ascending[1:] != ascending[:-1])
    steps = jnp.cumsum(moves)
    keys = jax.lax.bitcast_convert_type(scores, integer)
    lowered = jnp.maximum(jax.lax.cummin(keys + steps) - steps, 0)
    return jax.lax.bitcast_convert_type(lowered, scores.dtype)


def _sum_of_gradients(grads: Params, total: Params) -> Params:
    """The sum, in the structure of `total`."""
    flat = _tree.flatten(total)
    _tree.check_shapes("grads", grads, total)
    rows = list(zip(_tree.align("grads", grads, "total", total), flat.leaves, strict=True))
    for path, (g, a) in zip(flat.paths, rows, strict=True):
        if _leaves.is_inexact(g) != _leaves.is_inexact(a):
            raise ValueError(
                f"`grads` must be of one kind in all batches, got {_leaves.describe(g)} after "
                f"{_leaves.describe(a)} at {path!r}."
            )
    return flat.rebuild(
        [_leaves.wide(a) + _leaves.wide(g) if _leaves.is_inexact(a) else a for g, a in rows]
    )


def _score(f: Callable[..., jax.Array], params: Params, *grads: Params) -> Scores:
    flat = _tree.flatten(params)
    columns = [_tree.align("grads", g, "params", params) for g in grads]
    rows = zip(flat.leaves, *columns, strict=True)
    return flat.rebuild(
        [_score_leaf(f, path, row) for path, row in zip(flat.paths, rows, strict=True)]
    )


def _score_leaf(f: Callable[..., jax.Array], path: str, row: tuple[Any, ...]) -> Any:
    if not all(_leaves.is_inexact(x) for x in row):
        return _unscored()
    for g in row[1:]:
        _checks.same_shape("grads", path, g, "params", row[0])
    return f(*map(_leaves.wide, row))


def _unscored() -> np.ndarray:
    return np.zeros((), bool)


def _role(leaf: Any) -> Any:
    """The leaf itself where it is no array: a function, say."""
    if _leaves.is_floating(leaf):
        return _Role.FREE
    return _Role.FIXED if hasattr(leaf, "dtype") else leaf


def _check_inputs(inputs: Any) -> int:
    flat = _tree.flatten(inputs)
    if not flat.leaves:
        raise ValueError("`inputs` must hold at least one array, got an empty tree.")
    sizes = {}
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        shape = _leaves.shape_of(leaf)
        if not shape:
            raise ValueError(
                "`inputs` must be arrays with a leading axis of examples, got "
                f"{_leaves.describe(leaf)} at {path!r}; for one example pass x[None]."
            )
        sizes[path] = shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"`inputs` must share their leading axis of examples, got {sizes}.")
    if (examples := next(iter(sizes.values()))) == 0:
        raise ValueError("`inputs` must hold at least one example, got 0.")
    return examples


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


def _check_chunk_size(chunk_size: Any) -> None:
    if not _leaves.is_int(chunk_size):
        raise TypeError(f"`chunk_size` must be an integer, got {_leaves.brief(chunk_size)}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
