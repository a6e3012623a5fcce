"""Any function at the smaller sizes, by evaluating its jaxpr."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax.dependency._evaluator import Evaluator, Kept
from sparsejax.dependency._rules import rule_of
from sparsejax.dependency._trace import Traced, traced_function
from sparsejax.shrinking._plan import Plan, check_plan


def replay(apply_fn: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """The same function for the smaller variables: `replay(apply, plan)(shrink(variables), x)`.

    `apply_fn` is traced at the *full* sizes, with the structure of the variables it is given, and
    its jaxpr is evaluated at the smaller ones: whatever its code makes of sizes (Linen's checks,
    means that divide by a width, reshapes with a number of heads, tables of positions) stays as it
    was. It works for any function of the variables, not only the one that was traced for the plan:
    a training step's forward pass, a loss. Take gradients of the answer (`jax.grad(replay(loss,
    plan))`) rather than replaying a gradient, whose convolutions may be locked.

    The answer is pure: it works under `jit`, `grad`, `vmap`, `scan` and `jax.export` (which writes
    files with flatbuffers, `pip install 'sparsejax[examples]'`, of plain dicts and of sizes that
    are numbers). Custom derivatives and `jax.checkpoint` are kept. Tracing takes as long as that of
    `apply_fn` and a walk over its equations; compiled, nothing is left of it: no index is gathered
    but in constants.

    Args:
      apply_fn: `(variables, *inputs) -> outputs`, pure.
      plan: what `plan` made; all that matters is what it cuts of which leaf.

    Returns:
      `(small variables, *inputs) -> outputs`; outputs that replace variables (batch statistics)
      are small, too.

    Raises:
      TypeError: if `apply_fn` is no function, or `plan` none.
      ValueError: when called, if variables have not the shapes of the plan, or if `apply_fn` needs
        what the plan removes, with the reason.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import dependency, shrinking
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]).reshape(-1, 8) @ params["out"]  # an 8 in it
      >>> params = {"in": jnp.arange(24.0).reshape(3, 8), "out": jnp.ones((8, 2))}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> plan = shrinking.plan(groups, params, keep=2)
      >>> small = shrinking.shrink(params, plan)
      >>> jax.jit(shrinking.replay(mlp, plan))(small, jnp.ones((1, 3)))
      Array([[87., 87.]], dtype=float32)
    """
    _checks.function("apply_fn", apply_fn, "(variables, *inputs) -> outputs", "model.apply")
    check_plan(plan)

    def small_fn(variables: Any, *inputs: Any) -> Any:
        flat = _tree.flatten(variables)
        full = flat.rebuild(_full(flat, plan))
        traced = traced_function(apply_fn, full, inputs)
        kept = _kept(traced, plan)
        evaluator = Evaluator(traced.tracer, kept, rule_of)
        args = [*flat.leaves, *jax.tree.leaves(inputs)]
        outputs = evaluator.run(traced.frame, traced.jaxpr.jaxpr, traced.jaxpr.consts, args)
        return jax.tree.unflatten(traced.structure, outputs)

    return small_fn


def _full(flat: _tree.Flat, plan: Plan) -> list[Any]:
    """The shapes before the cut of variables after it."""
    leaves = []
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        cut = plan.leaves.get(path)
        if cut is None:
            some = ", ".join(map(repr, list(plan.leaves)[:5]))
            raise ValueError(
                f"`variables` must have the structure that was traced for the plan: {path!r} is "
                f"not among its leaves ({some}, ...)."
            )
        if _leaves.shape_of(leaf) != cut.small:
            raise ValueError(
                f"`variables` must have the shapes after the cut: at {path!r} it is "
                f"{_leaves.describe(leaf)}, the plan leaves {cut.small}; call shrink first."
            )
        leaves.append(jax.ShapeDtypeStruct(cut.shape, _leaves.dtype_of(leaf)))
    return leaves


def _kept(traced: Traced, plan: Plan) -> Kept:
    """The units of this function that the plan removes: those all of whose indices it removes."""
    labels = traced.tracer.labels
    resolved = labels.resolve()
    gone, stay, columns = [], [], []
    for path, value in zip(traced.flat.paths, traced.values, strict=True):
        cut = plan.leaves[path]
        for d, axis in enumerate(value.axes):
            lost = np.zeros(axis.size, bool)
            lost[list(cut.removed.get(d, ()))] = True
            if axis.labels is None:
                if lost.any():
                    raise _needed(path, d, axis.why)
                continue
            atoms = labels.atoms(axis.labels)
            columns.append((path, d, atoms, lost))
            gone.append(atoms[lost].ravel())
            stay.append(atoms[~lost].ravel())
    nothing = np.empty(0, np.int64)
    stay_atoms = np.unique(np.concatenate([nothing, *stay]))
    gone_atoms = np.unique(np.concatenate([nothing, *gone]))
    removed = np.setdiff1d(gone_atoms[gone_atoms >= 0], stay_atoms)
    for path, d, atoms, lost in columns:
        if not np.array_equal(np.isin(atoms, removed).any(1), lost):
            torn = atoms[lost & ~np.isin(atoms, removed).any(1)].ravel().tolist()
            why = "it goes together with indices that the plan keeps"
            raise _needed(path, d, why if torn else "the plan removes only some of a unit")
        locked = removed[resolved.marked("locked", removed)]
        here = [int(a) for a in locked if (atoms == a).any()]
        if here:
            raise _needed(path, d, resolved.why("locked", here[0]) or "")
    return Kept(labels, removed, stay_atoms[stay_atoms >= 0])


def _needed(path: str, axis: int, why: str) -> ValueError:
    return ValueError(
        f"`apply_fn` needs what the plan removes of {path!r}, axis {axis}: {why}. Trace this "
        "function itself, and plan with its groups."
    )
