"""Figures of a first layer as images: what it reads, and what each of its units sees."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsejax import _leaves, quantization
from sparsejax.plots import _drawing, _networks

_NOTHING = "0.91"
_MOST_UNITS = 100


def first_layer(kernel: Any, shape: Sequence[int], *, axes: Any = None) -> Any:
    """Draws how many weights a dense first layer has for each pixel of its input.

    Pruning finds out by itself which pixels say something. Those without any weight, which the
    network does not read, are gray.

    Args:
      kernel: weights (inputs, units), also quantized ones, not zero = kept, or their boolean mask.
      shape: of the image that is flattened into the inputs: (height, width) or (height, width,
        channels); the weights of all channels of a pixel are counted together.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes; beside them stands the scale.

    Raises:
      TypeError: if `kernel`, `shape` or `axes` are of another kind.
      ValueError: if the kernel does not have two axes, or not as many inputs as the image.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from sparsejax import plots
      >>> mask = np.zeros((6, 4), bool)  # four units that read an image of 2 x 3
      >>> mask[0, :3], mask[4, 1] = True, True
      >>> axes = plots.first_layer(mask, (2, 3))
      >>> axes.get_title("left")
      '2 of 6 pixels are read'
      >>> axes.get_images()[0].get_array().filled(0).astype(int).tolist()
      [[3, 0, 0], [0, 1, 0]]
    """
    array = _checked_kernel(kernel, (2,))
    counts = np.count_nonzero(array.reshape(*_checked_shape(shape, array), -1), axis=(2, 3))
    axes = _image_axes(axes, (5.2, 4.2))
    axes.set_facecolor(_NOTHING)
    image = axes.imshow(np.ma.masked_equal(counts, 0), vmin=0, vmax=max(counts.max(), 1))
    bar = axes.figure.colorbar(image, ax=axes, label="weights", shrink=0.9)
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{np.count_nonzero(counts):,} of {counts.size:,} pixels are read", loc="left")
    return axes


def receptive_fields(
    kernel: Any,
    shape: Sequence[int] | None = None,
    *,
    units: Sequence[int] | None = None,
    axes: Any = None,
) -> Any:
    """Draws what each unit of a first layer sees: its weights as an image, one beside the other.

    Red is positive, blue negative, gray zero, on one scale for all of them, which leaves out the
    largest 2 %; of a mask, kept is black. Of several channels of the image the sum is drawn (of a
    mask, whether any is kept).

    Args:
      kernel: weights, also quantized ones, or their boolean mask, of a dense layer (inputs, units)
        or of a convolution (height, width, channels, units).
      shape: of the image that is flattened into the inputs of a dense layer: (height, width) or
        (height, width, channels). A convolution has its own.
      units: which are drawn, in this order; by default the 100 with most weights, from the top left
        row by row; ties: the lower index first.
      axes: where to draw, of matplotlib; by default in a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if `kernel`, `shape`, `units` or `axes` are of another kind.
      ValueError: if the kernel does not have two axes or four, or not as many inputs as the image,
        or has no such unit.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from sparsejax import plots
      >>> kernel = np.zeros((3, 3, 1, 20))
      >>> kernel[1, 1, 0, 4:] = 0.5
      >>> plots.receptive_fields(kernel).get_title("left")
      '20 units, 4 without weights'
    """
    array = _checked_kernel(kernel, (2, 4))
    if array.ndim == 2:
        array = array.reshape(*_checked_shape(shape, array), -1)
    elif shape is not None:
        raise ValueError(f"`shape` must be left out for a convolution, got {shape}.")
    counts = np.count_nonzero(array, axis=(0, 1, 2))
    chosen = _checked_units(units, counts)
    axes = _image_axes(axes, (6.0, 5.6))
    _draw_tiles(axes, _without_channels(np.moveaxis(array[..., chosen], -1, 0)))
    axes.set_title(_title(len(counts), len(chosen), int(np.sum(counts == 0))), loc="left")
    return axes


def _without_channels(tiles: np.ndarray) -> np.ndarray:
    reduce = np.any if tiles.dtype == bool else np.sum
    return np.asarray(reduce(tiles, axis=-1))


def _draw_tiles(axes: Any, tiles: np.ndarray) -> None:
    """One sheet, with a white line of one pixel between two tiles."""
    count, height, width = tiles.shape
    columns = math.ceil(math.sqrt(count))
    sheet = np.full((math.ceil(count / columns) * (height + 1), columns * (width + 1)), np.nan)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = tile
    sheet = sheet[:-1, :-1]
    if tiles.dtype == bool:
        # A little below 0, so that what is not kept is gray and the lines are white.
        axes.imshow(sheet, cmap="gray_r", vmin=-0.1, vmax=1, interpolation="nearest")
    else:
        end = _scale(tiles)
        image = axes.imshow(sheet, cmap="coolwarm", vmin=-end, vmax=end, interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, label="weight", shrink=0.9, extend="both")


def _scale(tiles: np.ndarray) -> float:
    """Where the colors end: few weights are much larger than the others, and would pale them."""
    sizes = np.abs(tiles[(tiles != 0) & np.isfinite(tiles)])
    return float(np.quantile(sizes, 0.98)) if sizes.size else 1.0


def _title(units: int, drawn: int, empty: int) -> str:
    without = f", {empty:,} without weights" if empty else ""
    part = f"; {drawn:,} are drawn" if drawn < units else ""
    return f"{units:,} units{without}{part}"


def _image_axes(axes: Any, size: tuple[float, float]) -> Any:
    axes = _drawing.axes_of(axes, size)
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _checked_kernel(kernel: Any, ranks: tuple[int, ...]) -> np.ndarray:
    kernel = quantization.dequantize(kernel)
    real = _leaves.is_number(kernel) and not np.iscomplexobj(kernel)
    if not real or _leaves.is_traced(kernel):
        got = (
            _leaves.brief(kernel) if _leaves.shape_of(kernel) is None else _leaves.describe(kernel)
        )
        raise TypeError(f"`kernel` must be an array of weights or booleans, got {got}.")
    if np.ndim(kernel) not in ranks or np.size(kernel) == 0:
        axes = " or ".join(map(str, ranks))
        raise ValueError(
            f"`kernel` must have {axes} axes, the last for units, and entries, got "
            f"{_leaves.describe(kernel)}."
        )
    return _networks.array(kernel)


def _checked_shape(shape: Any, kernel: np.ndarray) -> tuple[int, int, int]:
    """(height, width, channels) of the image that is flattened into a kernel's inputs."""
    if not isinstance(shape, tuple | list) or not all(map(_leaves.is_int, shape)):
        raise TypeError(
            f"`shape` must be that of an image, such as (28, 28), got {_leaves.brief(shape)}."
        )
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) != len(kernel):
        raise ValueError(
            "`shape` must be (height, width) or (height, width, channels) of an image with as many "
            f"values as the kernel has inputs, {len(kernel)}, got {tuple(shape)}."
        )
    height, width, channels = (*map(int, shape), 1)[:3]
    return height, width, channels


def _checked_units(units: Any, counts: np.ndarray) -> list[int]:
    if units is None:
        return [int(i) for i in np.argsort(-counts, kind="stable")[:_MOST_UNITS]]
    if not isinstance(units, Sequence | np.ndarray) or not all(map(_leaves.is_int, units)):
        raise TypeError(f"`units` must be several integers, got {_leaves.brief(units)}.")
    if not len(units) or min(units) < 0 or max(units) >= len(counts):
        raise ValueError(
            f"`units` must name units from 0 to {len(counts) - 1}, got {_leaves.brief(units)}."
        )
    return [int(i) for i in units]
