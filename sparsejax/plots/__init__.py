"""Figures: what was measured to choose a strength or a sparsity, coupled axes, pruned networks.

Every function draws into the axes it is given, or else into a new `matplotlib.figure.Figure`, and
returns the axes; `axes.figure.savefig("path.png")` writes a file. Nothing here touches pyplot, so
that no figure is kept open or shown by itself. Strength and sparsity grow to the right, sparsity
as -log₁₀(1 - sparsity), so that from 90 % to 99 % is as far as from 0 to 90 %. Some labels stand
beside the axes: give your own figure `layout="constrained"`. Needs matplotlib:
`pip install 'sparsejax[examples]'`.
"""

from sparsejax.plots._densities import densities
from sparsejax.plots._groups import groups
from sparsejax.plots._images import first_layer, receptive_fields
from sparsejax.plots._layers import sensitivity
from sparsejax.plots._results import accuracy, error
from sparsejax.plots._strengths import cross_validation, strength_path
from sparsejax.plots._weights import histogram

__all__ = [
    "accuracy",
    "cross_validation",
    "densities",
    "error",
    "first_layer",
    "groups",
    "histogram",
    "receptive_fields",
    "sensitivity",
    "strength_path",
]
