"""Figures with something for each layer: its loss when pruned, its density."""

from typing import Any

import numpy as np

from sparsejax import _leaves
from sparsejax.plots import _drawing
from sparsejax.sensitivity import Curves


def sensitivity(curves: Curves, *, axes: Any = None) -> Any:
    """Draws the loss against sparsity, a line for each layer that alone is pruned.

    A dashed line is at the dense loss. A loss that is not finite is a cross at the upper edge. The
    axis of the sparsities is -log₁₀(1 - sparsity), so that those near 1 are not crowded: from 90 %
    to 99 % is as far as from 0 to 90 %. Sparsity 1, infinitely far, is drawn beyond the last one.

    Args:
      curves: what `sensitivity.curves` returned.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if `curves` or `axes` are of another kind.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import plots, sensitivity
      >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((3, 3))}
      >>> def loss(p):
      ...     return (jnp.mean(p["a"]) - 1) ** 2 + (jnp.mean(p["b"]) - 1) ** 2
      >>> curves = sensitivity.curves(loss, params, [0.25, 0.5, 1.0], progress=False)
      >>> axes = plots.sensitivity(curves)
      >>> [text.get_text() for text in axes.get_legend().get_texts()]
      ['a', 'b', 'dense']
    """
    if not isinstance(curves, Curves):
        raise TypeError(
            f"`curves` must be what sensitivity.curves returns, got {_leaves.brief(curves)}."
        )
    axes = _drawing.axes_of(axes)
    sparsities = np.concatenate([[0.0], curves.sparsities])
    colors = _drawing.colors(len(curves.layers))
    for layer, losses, color in zip(curves.layers, curves.losses, colors, strict=True):
        values = np.concatenate([[curves.dense_loss], losses])
        finite = np.isfinite(values)
        axes.plot(
            sparsities,
            np.where(finite, values, np.nan),
            marker="o",
            markersize=3,
            linewidth=1.5,
            color=color,
            label=layer.path,
        )
        if not finite.all():
            _draw_crosses(axes, sparsities[~finite], color)
    axes.axhline(
        curves.dense_loss, color=_drawing.QUIET, linewidth=1, linestyle="--", label="dense"
    )
    axes.set_xlabel("sparsity of the layer, all others dense")
    axes.set_ylabel("loss")
    _drawing.sparsity_axis(axes, sparsities)
    _drawing.name_layers(axes, len(curves.layers))
    return axes


def _draw_crosses(axes: Any, places: np.ndarray, color: Any) -> None:
    axes.plot(
        places,
        np.ones_like(places),
        "x",
        color=color,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )
