"""The figure of coupled axes, whose rows `_group_plot` lays out."""

from typing import Any

from sparsejax import _group_plot, _leaves
from sparsejax.dependency import Groups
from sparsejax.plots import _drawing
from sparsejax.shrinking import Plan


def groups(groups: Groups, plan: Plan | None = None, *, axes: Any = None) -> Any:
    """Draws which axes of which kernels are coupled, and what a plan removes of them.

    A row is a kernel (a leaf of two axes or more), roughly in the order of use. To the left of the
    middle are bars for the axes that read units, to the right for those that produce them, as long
    as they have indices. A color is a group: all that has it is cut together. In the middle a line
    joins its bars (of no more than 12 side by side), so that a residual stream is a long line. Gray
    is locked. What the plan removes is pale: the very indices, or their share if an axis has more
    than 128. Biases and scales have no row; the legend counts them, as vectors.

    Windows of convolutions are not drawn. The longest bar is the longest axis that can be cut; one
    that cannot be and is longer is torn. Of more than 40 kernels or 30 groups the first are drawn
    or named, and how many more there are. More than 9 groups share no color either, but some are
    similar.

    Args:
      groups: what `dependency.trace` returned.
      plan: what `shrinking.plan` made of them; by default none, and nothing is pale.
      axes: where to draw, of matplotlib; by default in a new figure, as large as it needs.

    Returns:
      The axes.

    Raises:
      TypeError: if `groups`, `plan` or `axes` are of another kind.
      ValueError: if the plan is of other groups.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import criteria, dependency, plots, shrinking
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.arange(24.0).reshape(3, 8), "out": jnp.ones((8, 2))}
      >>> groups = dependency.trace(mlp, params, jnp.ones((1, 3)))
      >>> plan = shrinking.plan(groups, criteria.magnitude(params), sparsity=0.5)
      >>> axes = plots.groups(groups, plan)
      >>> [tick.get_text() for tick in axes.get_yticklabels()]
      ['in', 'out']
      >>> axes.get_legend().get_texts()[0].get_text()
      'in: 8 → 4 units'
    """
    if not isinstance(groups, Groups):
        raise TypeError(
            f"`groups` must be what dependency.trace returns, got {_leaves.brief(groups)}."
        )
    if plan is not None:
        _check_plan(plan, groups)
    rows = _group_plot.rows(groups, plan)
    axes = _drawing.axes_of(axes, _group_plot.size(rows, groups))
    _group_plot.draw(axes, rows, groups, plan)
    return axes


def _check_plan(plan: Any, groups: Groups) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be what shrinking.plan returns, got {_leaves.brief(plan)}.")
    for what, ours, theirs in (
        ("group", {g.name: g.size for g in groups.values()}, plan.sizes),
        (
            "leaf",
            {x.path: x.shape for x in groups.leaves},
            {n: c.shape for n, c in plan.leaves.items()},
        ),
    ):
        for name in [*ours, *theirs]:
            mine, its = ours.get(name), theirs.get(name)
            if mine != its:
                raise ValueError(
                    f"`plan` must be of these groups: {what} {name!r} has size {mine} here and "
                    f"{its} in the plan; make it with shrinking.plan(groups, ...)."
                )
