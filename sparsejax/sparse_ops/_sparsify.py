"""Any function with the products of its pruned weights replaced by sparse ones."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from sparsejax import _checks, _leaves, _tree, masking
from sparsejax._typing import Masks, Params
from sparsejax.sparse_ops import _crossover
from sparsejax.sparse_ops._matrix import DTYPES
from sparsejax.sparse_ops._measurement import ratio
from sparsejax.sparse_ops._network import FastApply, Network, Weight, program
from sparsejax.sparse_ops._product import Crossover, Product
from sparsejax.sparse_ops._report import Report, Row
from sparsejax.sparse_ops._usage import Use

# A product that is expected to gain less stays dense: what is expected is not exact.
_LEAST = 1.05


def sparsify(
    apply_fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *inputs: Any,
    crossover: Crossover | None = None,
) -> tuple[FastApply, Params]:
    """The same function with products that skip the zeros of its pruned weights, where that gains.

    `apply_fn` is traced, and every product and convolution of its jaxpr one operand of which is a
    pruned weight alone (transposed, reshaped or rounded, but nothing else) is looked at: where its
    sparse form is expected to be at least 5 % faster, that takes its place. All else stays XLA's:
    activations, norms, attention, custom derivatives. So it works for any function of any
    framework. At last the whole is timed, too (compiled, on the inputs given here), also with all
    replaced that can be; if neither gains, all stays dense. So it is not slower than the dense
    network.

    What stays dense: weights that are not pruned or too small to gain; that are used otherwise
    than in products (weight norm, embeddings), in several products that want them in different
    orders (tied weights), inside `scan`, `while` or `cond`, in batched products, in grouped,
    transposed and three-dimensional convolutions; other dtypes than float32 and bfloat16.
    `print(fast_apply.report)` says what became of each, and why.

    The replaced weights are SparseMatrix leaves in the place of the dense ones, in the order of
    axes in which they are multiplied: optimizers and `jax.grad` see their kept values, which is
    sparse fine-tuning (its steps are no faster than dense ones). What stayed dense is masked once;
    to keep it so while training, give `sparsejax.keep_masks` the masks with a 0-d True in the place
    of those that were replaced: `dataclasses.replace(sparse["w"], values=np.array(True))`.
    `fast_apply.to_dense` brings dense params back.

    `fast_apply` is pure: it works under `jit` (which it needs to be fast: it is traced at every
    call), `grad` and `vmap` over inputs. Inputs of other shapes are welcome; what is replaced was
    decided for those that were given here. In gradients of functions with custom derivatives the
    weight is dense. Forward-mode derivatives are not available of sparse products. `jax.export` of
    `lambda x: fast_apply(sparse_params, x)` works for GPU and TPU; for CPUs with `disabled_checks`
    of `jax.export.DisabledSafetyCheck.custom_call("sparsejax_matmul")`, and `"sparsejax_conv"`,
    and where `sparsejax.sparse_ops` is imported before it is called.

    Args:
      apply_fn: `(params, *inputs) -> outputs`, pure.
      params: a pytree of arrays that are not traced; leaves that are no arrays (an Equinox
        module's functions) stay what they are.
      masks: masks for `params`, True = kept, 0-d True where nothing is pruned. A kept weight
        stays, though it be zero.
      *inputs: pytrees of arrays as large as they will be in use; or of shapes and dtypes, on which
        the whole cannot be timed.
      crossover: expected speed-up of a `Product`; by default `measured()`, which times every
        product on this machine when it is first met, half a second each, and remembers it on disk.
        `shipped` is a table; any function will do (`lambda product: 2.0` replaces all it can), and
        is believed: the whole is timed only by default.

    Returns:
      `fast_apply`, a function `(sparse_params, *inputs) -> outputs` with a `report`, and
      `sparse_params`, like `params`.

    Raises:
      TypeError: if an argument is of the wrong kind, masks are not boolean, or params are traced.
      ValueError: if masks do not fit, with the leaf's path; if `crossover` gives no number; and,
        when `fast_apply` is called, if its params are not like `sparse_params`, or if with other
        inputs `apply_fn` uses a replaced weight otherwise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import sparse_ops
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
      >>> masks = {"in": jnp.arange(24).reshape(3, 8) % 4 == 0, "out": jnp.array(True)}
      >>> fast, sparse = sparse_ops.sparsify(
      ...     mlp, params, masks, jnp.ones((1, 3)), crossover=lambda product: 2.0)
      >>> sparse["in"]
      SparseMatrix(float32[3,8], 6 kept, density 0.25)
      >>> jax.jit(fast)(sparse, jnp.ones((5, 3)))[0]
      Array([6., 6.], dtype=float32)
      >>> print(fast.report)
      weight  shape  density  x    speed-up
      in      3x8    0.25     1x3  2.00x     sparse
      out     8x2    1        -    -         dense: it is not pruned
    """
    _checks.function("apply_fn", apply_fn, "(params, *inputs) -> outputs", "model.apply")
    if crossover is not None:
        _checks.function("crossover", crossover, "product -> speed-up", "sparse_ops.shipped")
    flat = _tree.flatten(params)
    kept = masking.aligned(masks, params)
    _check_known("params", flat.paths, flat.leaves)
    _check_known("masks", flat.paths, kept)
    masked = jax.tree.map(_canonical, masking.apply_masks(params, masks))
    leaves = jax.tree.leaves(masked)
    pruned = [i for i, mask in enumerate(kept) if not np.all(mask)]
    network = Network(apply_fn, flat.structure)
    uses = network.trace(leaves, inputs, pruned).uses
    expect = _expectation(crossover)
    keys = [keystr(key) for key, _ in tree_flatten_with_path(params)[0]]
    rows: dict[int, Row] = {}
    for i, (path, leaf) in enumerate(zip(flat.paths, leaves, strict=True)):
        if i in pruned:
            rows[i] = _row(
                path, leaf, np.broadcast_to(kept[i], leaf.shape), uses.get(i, []), expect
            )
        elif _leaves.is_inexact(leaf) and np.ndim(leaf) > 1:
            rows[i] = Row(path, leaf.shape, 1.0, why="it is not pruned")

    @functools.cache
    def weight(i: int) -> tuple[Weight, Any]:
        found = Weight(flat.paths[i], keys[i], leaves[i].shape, uses[i][0].moves)
        mask = np.broadcast_to(kept[i], leaves[i].shape)
        return found, found.sparse(leaves[i], mask, rows[i].products)

    def replaced(report: Report, rows: Mapping[int, Row]) -> tuple[FastApply, Params]:
        sparse = {i: weight(i) for i, row in rows.items() if row.replaced}
        new = [sparse[i][1] if i in sparse else leaf for i, leaf in enumerate(leaves)]
        weights = {i: pair[0] for i, pair in sparse.items()}
        return FastApply(network, weights, report), jax.tree.unflatten(flat.structure, new)

    report = Report(tuple(rows.values()))
    if crossover is None and report.replaced and not _leaves.is_traced(*jax.tree.leaves(inputs)):
        dense = program(apply_fn, masked, inputs)

        def speed_up(rows: Mapping[int, Row]) -> float:
            return ratio(dense, program(*replaced(report, rows), inputs))

        rows, whole = _fastest(rows, speed_up)
        report = Report(tuple(rows.values()), whole)
    return replaced(report, rows)


def _fastest(
    rows: dict[int, Row], speed_up: Callable[[Mapping[int, Row]], float]
) -> tuple[dict[int, Row], float]:
    """Replaces what was expected to gain, all that can be, or nothing, by the whole's time.

    What a call costs depends on its neighbours: a last product that is left to XLA may have to
    wake the threads that no other one needs.
    """
    whole = speed_up(rows)
    more = {i: dataclasses.replace(r, why="") if _declined(r) else r for i, r in rows.items()}
    if more != rows:
        every = speed_up(more)
        if every >= _LEAST * whole:
            rows, whole = more, every
    if whole < _LEAST:
        why = f"it would gain, but the whole function would not: {whole:.2f}x"
        rows = {i: dataclasses.replace(r, why=r.why or why) for i, r in rows.items()}
    return rows, whole


def _declined(row: Row) -> bool:
    """Whether it could be replaced, but would not gain alone."""
    return not row.replaced and bool(row.speed_up)


def _canonical(leaf: Any) -> Any:
    """NumPy's arrays as JAX will see them: float64 is float32 unless x64 is on."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) and _leaves.is_number(leaf) else leaf


def _check_known(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    for path, leaf in zip(paths, leaves, strict=True):
        if _leaves.is_traced(leaf):
            raise TypeError(
                f"`{name}` must hold arrays whose entries are known, got {_leaves.describe(leaf)} "
                f"at {path!r} without; call sparsify outside of jit, and jit what it returns."
            )


def _row(path: str, leaf: Any, mask: np.ndarray, uses: Sequence[Use], expect: Crossover) -> Row:
    """What is to become of a pruned weight."""
    row = Row(path, leaf.shape, float(np.mean(mask)), why=_obstacle(leaf, uses))
    if row.why:
        return row
    block = _block(uses[0].kept(mask))
    products = tuple(
        dataclasses.replace(use.product, density=row.density, block=block)
        for use in uses
        if use.product is not None
    )
    speed_up = min(map(expect, products))
    why = "" if speed_up >= _LEAST else "it would not gain"
    if speed_up == 0:
        why = _crossover.never_here() or why
    return dataclasses.replace(row, products=products, speed_up=speed_up, why=why)


def _obstacle(leaf: Any, uses: Sequence[Use]) -> str:
    """Why a weight cannot be sparse, whatever the gain."""
    if _leaves.dtype_of(leaf) not in DTYPES:
        return f"it is {_leaves.dtype_of(leaf)}, not float32 or bfloat16"
    if not uses:
        return "the function does not use it"
    obstacle = next((use.why for use in uses if use.why), "")
    if obstacle:
        return obstacle
    if len({use.moves for use in uses}) > 1:
        return f"{len(uses)} products want it in different orders of its axes"
    return ""


def _block(kept: np.ndarray) -> int | None:
    """8 where the mask keeps or prunes 8 consecutive outputs together."""
    outputs = kept.shape[-1]
    if outputs % 8 or not outputs:
        return None
    groups = kept.reshape(-1, outputs // 8, 8)
    return 8 if bool((groups == groups[..., :1]).all()) else None


def _expectation(crossover: Crossover | None) -> Crossover:
    """The crossover, by default the measured one, and a look at what it answers."""
    ask = _crossover.measured() if crossover is None else crossover

    def expect(product: Product) -> float:
        answer = ask(product)
        if not isinstance(answer, float | int | np.number) or not 0 <= answer < np.inf:
            raise ValueError(
                "`crossover` must give a finite number >= 0, how many times faster, got "
                f"{_leaves.brief(answer)} for {product}."
            )
        return float(answer)

    return expect
