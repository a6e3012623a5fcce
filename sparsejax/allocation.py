"""Allocations: how many units every layer keeps of those that all of them keep together.

An allocation is a function `(layers, keep) -> kept units of each layer`. Its counts lie between 0
and the layer's units and sum to `keep` exactly; they are the same on every machine, since the
arithmetic is of integers and fractions. All of it is Python, before anything is traced: for a
thousand layers less than a tenth of a second.
"""

import fnmatch
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from sparsejax import _checks, _leaves


class Layer(NamedTuple):
    """What an allocation knows of a layer.

    Attributes:
      path: where its parameter is, such as `"conv1.kernel"`.
      shape: of its parameter; of one layer, where a leaf stacks several.
      units: how many units of it may be pruned: entries, or blocks or channels. All units of a
        layer count alike.
    """

    path: str
    shape: tuple[int, ...]
    units: int


Allocation: TypeAlias = Callable[[Sequence[Layer], int], list[int]]
"""`(layers, keep) -> kept units of each layer`, which sum to `keep`."""


def uniform(layers: Sequence[Layer], keep: int) -> list[int]:
    """Every layer gets the same density, Σ kept / Σ units, as nearly as whole units allow.

    No count is a whole unit or more away from density · units. (`scope="per_leaf"` rounds every
    leaf for itself, so that the total may be off by half a unit a leaf.)

    Args:
      layers: the layers.
      keep: how many units they keep together, from 0 to the number of their units.

    Returns:
      The kept units of each layer, their sum `keep`. What rounding down leaves over goes to the
      largest remainders, one unit each, the earlier layer first among equal ones.

    Raises:
      TypeError, ValueError: if a layer is malformed, or `keep` is no integer or out of range.

    Example:
      >>> from sparsejax import allocation
      >>> layers = [allocation.Layer("a", (10, 10), 100), allocation.Layer("b", (5, 5), 25)]
      >>> allocation.uniform(layers, 13)  # 10.4 + 2.6
      [10, 3]
    """
    return _fill(layers, keep, lambda layer: Fraction(1))


def erdos_renyi(
    layers: Sequence[Layer], keep: int, *, axes: tuple[int, int] = (-2, -1)
) -> list[int]:
    """The density of a layer is ε (n_in + n_out) / (n_in · n_out): large layers are sparser.

    A random graph with this density between the neurons of two layers (the model of Erdős and
    Rényi) has ε connections for every neuron. ε is such that the total is `keep`. A layer whose
    density would exceed 1 is dense, and the others share what is left at a larger ε, until none
    exceeds: kept = min(units, ε · density · units), then rounded as in `uniform`.

    Args:
      layers: the layers. A vector of n counts as a matrix (1, n), a number as (1, 1).
      keep: how many units they keep together, from 0 to the number of their units.
      axes: which axes of the shapes are (in, out): (-2, -1) for kernels (in, out) and HWIO, as in
        Flax and Haiku; (1, 0) for (out, in) and OIHW, as in Equinox and torch.

    Returns:
      The kept units of each layer, their sum `keep`.

    Raises:
      TypeError: if a layer is malformed, or `keep` or an axis is no integer.
      ValueError: if `keep` is out of range, or `axes` are not two different axes of a layer.

    Example:
      >>> from sparsejax import allocation
      >>> layers = [allocation.Layer("a", (10, 40), 400), allocation.Layer("b", (40, 10), 400),
      ...           allocation.Layer("c", (10, 2), 20)]
      >>> allocation.erdos_renyi(layers, 92)  # in the ratio 50 : 50 : 12, but c has only 20
      [41, 41, 10]
      >>> allocation.erdos_renyi(layers, 320)
      [150, 150, 20]

    References:
      D. Mocanu, E. Mocanu, P. Stone, P. Nguyen, M. Gibescu, A. Liotta, *Scalable training of
      artificial neural networks with adaptive sparse connectivity inspired by network science*,
      Nature Communications 2018, https://arxiv.org/abs/1707.04780; there ε is given and the total
      follows, here the total is given. The capping is RigL's, see `erdos_renyi_kernel`.
    """
    _check_axes(axes)

    def density(layer: Layer) -> Fraction:
        n_in, n_out = _in_and_out(layer, axes)
        return Fraction(n_in + n_out, n_in * n_out)

    return _fill(layers, keep, density)


def erdos_renyi_kernel(layers: Sequence[Layer], keep: int) -> list[int]:
    """The density of a layer is ε Σ shape / Π shape: `erdos_renyi` that sees the kernel's size too.

    Known as ERK. A convolution of 3 by 3 is sparser than one of 1 by 1 between the same channels.
    In the paper networks of equal size are more accurate than with `uniform`, and cost about twice
    the FLOPs, since the small layers on large images stay nearly dense.

    Args:
      layers: the layers. A vector of n counts as a matrix (1, n), a number as (1, 1). The order of
        the axes does not matter.
      keep: how many units they keep together, from 0 to the number of their units.

    Returns:
      The kept units of each layer, their sum `keep`: min(units, ε · density · units), rounded as in
      `uniform`.

    Raises:
      TypeError, ValueError: if a layer is malformed, or `keep` is no integer or out of range.

    Example:
      >>> from sparsejax import allocation
      >>> layers = [allocation.Layer("conv", (3, 3, 16, 32), 4_608),
      ...           allocation.Layer("head", (32, 10), 320)]
      >>> allocation.erdos_renyi_kernel(layers, 480)  # in the ratio 3 + 3 + 16 + 32 : 32 + 10
      [270, 210]
      >>> allocation.erdos_renyi_kernel(layers, 2_000)
      [1680, 320]

    References:
      U. Evci, T. Gale, J. Menick, P. Castro, E. Elsen, *Rigging the lottery: making all tickets
      winners*, ICML 2020, https://arxiv.org/abs/1911.11134. Its code rounds every layer for itself,
      and the total follows; here the total is exact, and no count differs by a whole unit.
    """

    def density(layer: Layer) -> Fraction:
        shape = _matrix_shape(layer)
        return Fraction(sum(shape), math.prod(shape))

    return _fill(layers, keep, density)


def override(base: Allocation, densities: Mapping[str, float]) -> Allocation:
    """An allocation with densities of their own for some layers; `base` shares out the rest.

    Such a layer keeps `round(density * units)` units, half to even.

    Args:
      base: the allocation of the other layers, and of the units that are left for them.
      densities: from shell-style patterns of paths, as in `filters.by_path`, to densities in
        [0, 1]: 1 keeps a layer dense, 0 keeps nothing of it. The first pattern that matches a path
        counts. The mapping is copied.

    Returns:
      An allocation. It raises `ValueError` where a pattern matches no layer, and where the total
      cannot be met: these layers alone keep more than `keep`, or the others have too few units.

    Raises:
      TypeError: if `base` is no function, `densities` no mapping, a pattern no string, or a density
        not one real number.
      ValueError: if a density is not in [0, 1].

    Example:
      >>> from sparsejax import allocation
      >>> layers = [allocation.Layer("conv1.kernel", (3, 3, 1, 8), 72),
      ...           allocation.Layer("conv2.kernel", (3, 3, 8, 8), 576),
      ...           allocation.Layer("head.kernel", (128, 10), 1_280)]
      >>> allocate = allocation.override(allocation.uniform, {"conv1.*": 1.0, "head.*": 0.2})
      >>> allocate(layers, 400)
      [72, 72, 256]
    """
    _check_function("base", base)
    chosen = _checked_densities(densities)

    def allocation(layers: Sequence[Layer], keep: int) -> list[int]:
        layers, keep = _checked(layers, keep)
        _check_patterns(chosen, layers)
        fixed = {i: d for i, x in enumerate(layers) if (d := _density_of(x, chosen)) is not None}
        kept = {i: round(d * layers[i].units) for i, d in fixed.items()}
        others = [x for i, x in enumerate(layers) if i not in fixed]
        left = keep - sum(kept.values())
        _check_left(left, keep, sum(x.units for x in others))
        shares = iter(_answer("base", base, others, left))
        return [kept[i] if i in kept else next(shares) for i in range(len(layers))]

    return allocation


def allocate(allocation: Allocation, layers: Sequence[Layer], keep: int) -> list[int]:
    """Calls an allocation, whoever wrote it, and checks its answer.

    Args:
      allocation: `(layers, keep) -> kept units of each layer`; not called where there is no layer.
      layers: the layers.
      keep: how many units they keep together, from 0 to the number of their units.

    Returns:
      The kept units of each layer.

    Raises:
      TypeError: if `allocation` is no function or does not answer with a sequence of integers, a
        layer is malformed, or `keep` is no integer.
      ValueError: if `keep` is out of range, or the answer has another length, a count outside
        0 ... units, or another sum.

    Example:
      >>> from sparsejax import allocation
      >>> layers = [allocation.Layer("a", (2, 3), 6), allocation.Layer("b", (3, 1), 3)]
      >>> allocation.allocate(lambda layers, keep: [keep, 0], layers, 5)
      [5, 0]
      >>> allocation.allocate(lambda layers, keep: [keep, 0], layers, 7)
      Traceback (most recent call last):
      ValueError: `allocation` must keep from 0 to 6 units at 'a', as many as there are, got 7; ...
    """
    _check_function("allocation", allocation)
    layers, keep = _checked(layers, keep)
    return _answer("allocation", allocation, layers, keep)


def _fill(layers: Sequence[Layer], keep: int, density: Callable[[Layer], Fraction]) -> list[int]:
    """min(units, ε · density · units) with the ε whose sum is `keep`, in whole units."""
    layers, keep = _checked(layers, keep)
    kept = [0] * len(layers)
    densities = {i: density(x) for i, x in enumerate(layers) if x.units}
    # Whole numbers from here on: quotas are left · weight / total, and remainders compare.
    scale = math.lcm(*(d.denominator for d in densities.values()))
    weights = {
        i: layers[i].units * d.numerator * (scale // d.denominator) for i, d in densities.items()
    }
    left, total = keep, sum(weights.values())
    # Making a layer dense only raises ε, so that one pass from the densest on finds them all.
    for i in sorted(weights, key=lambda i: densities[i], reverse=True):
        if left * weights[i] <= layers[i].units * total:
            break
        kept[i] = layers[i].units
        left -= kept[i]
        total -= weights.pop(i)
    remainders = {}
    for i, weight in weights.items():
        kept[i], remainders[i] = divmod(left * weight, total)
    # Fewer units are over than quotas are broken, and a broken quota is below its cap.
    over = left - sum(kept[i] for i in weights)
    for i in sorted(weights, key=lambda i: -remainders[i])[:over]:
        kept[i] += 1
    return kept


def _matrix_shape(layer: Layer) -> tuple[int, ...]:
    """The shape with at least two axes."""
    return (1,) * (2 - len(layer.shape)) + layer.shape


def _in_and_out(layer: Layer, axes: tuple[int, int]) -> tuple[int, int]:
    shape, ndim = layer.shape, len(layer.shape)
    if ndim < 2:
        n_in, n_out = _matrix_shape(layer)
        return n_in, n_out
    first, second = axes
    if not all(-ndim <= axis < ndim for axis in axes) or first % ndim == second % ndim:
        raise ValueError(
            f"`axes` must be two different axes (in, out) of every layer, got {axes} for the shape "
            f"{shape} at {layer.path!r}; (-2, -1) suits (in, out) and HWIO, (1, 0) suits (out, in) "
            "and OIHW."
        )
    return shape[first], shape[second]


def _answer(name: str, allocation: Allocation, layers: list[Layer], keep: int) -> list[int]:
    """What an allocation says to checked arguments; refuses what does not add up."""
    if not layers:
        return []
    answer: Any = allocation(tuple(layers), keep)
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        raise TypeError(
            f"`{name}` must return a list of integers, one a layer, got "
            f"{type(answer).__name__} {_leaves.brief(answer)}; an array has tolist()."
        )
    if len(answer) != len(layers):
        raise ValueError(
            f"`{name}` must return one count a layer, got {len(answer)} for {len(layers)} layers: "
            f"{_leaves.brief(answer)}."
        )
    for layer, count in zip(layers, answer, strict=True):
        if not _leaves.is_int(count):
            raise TypeError(
                f"`{name}` must return integers, got {_leaves.brief(count)} at {layer.path!r}; "
                f"round so that the sum is `keep` = {keep}."
            )
        if not 0 <= count <= layer.units:
            raise ValueError(
                f"`{name}` must keep from 0 to {layer.units} units at {layer.path!r}, as many as "
                f"there are, got {count}; let other layers keep the difference."
            )
    counts = list(map(int, answer))
    if sum(counts) != keep:
        raise ValueError(
            f"`{name}` must keep {keep} units in all, got {sum(counts)}: {_leaves.brief(counts)}; "
            "give what rounding leaves over to some layers."
        )
    return counts


def _checked(layers: Any, keep: Any) -> tuple[list[Layer], int]:
    """The arguments in Python's integers, which do not overflow."""
    if not isinstance(layers, Sequence):
        raise TypeError(f"`layers` must be a sequence of Layer, got {_leaves.brief(layers)}.")
    checked = [_checked_layer(layer) for layer in layers]
    units = sum(layer.units for layer in checked)
    if not _leaves.is_int(keep):
        raise TypeError(
            f"`keep` must be an integer, how many units are kept, got {_leaves.brief(keep)}; for a "
            "density pass round(density * units)."
        )
    if not 0 <= keep <= units:
        raise ValueError(f"`keep` must be from 0 to {units}, the units of all layers, got {keep}.")
    return checked, int(keep)


def _checked_layer(layer: Any) -> Layer:
    if not isinstance(layer, Layer):
        raise TypeError(
            f"`layers` must be of type Layer(path, shape, units), got {_leaves.brief(layer)}."
        )
    path, shape, units = layer
    if not isinstance(shape, tuple) or not all(_leaves.is_int(n) and n >= 0 for n in shape):
        raise TypeError(
            "`layers` must have shapes, tuples of integers >= 0, got "
            f"{_leaves.brief(shape)} at {path!r}."
        )
    if not _leaves.is_int(units):
        raise TypeError(
            f"`layers` must have a whole number of units, got {_leaves.brief(units)} at {path!r}."
        )
    if units < 0 or (units > 0 and 0 in shape):
        raise ValueError(
            "`layers` must have units >= 0, and 0 where the shape is empty, got "
            f"{units} for the shape {shape} at {path!r}."
        )
    return Layer(path, tuple(map(int, shape)), int(units))


def _check_function(name: str, value: Any) -> None:
    _checks.function(name, value, "(layers, keep) -> kept units of each layer", "uniform")


def _check_axes(axes: Any) -> None:
    if not isinstance(axes, tuple) or len(axes) != 2 or not all(map(_leaves.is_int, axes)):
        raise TypeError(
            f"`axes` must be two integers (in, out), such as (-2, -1), got {_leaves.brief(axes)}."
        )


def _checked_densities(densities: Any) -> dict[str, float]:
    if not isinstance(densities, Mapping):
        raise TypeError(
            '`densities` must map patterns to densities, such as {"conv1.*": 1.0}, got '
            f"{_leaves.brief(densities)}."
        )
    for pattern, density in densities.items():
        if not isinstance(pattern, str):
            raise TypeError(
                '`densities` must have patterns such as "conv1.*" for keys, got '
                f"{_leaves.brief(pattern)}."
            )
        if isinstance(density, bool) or not isinstance(density, numbers.Real):
            raise TypeError(
                f"`densities` must be real numbers, got {_leaves.brief(density)} at {pattern!r}."
            )
        if not 0 <= float(density) <= 1:
            raise ValueError(
                "`densities` must be in [0, 1] (fractions, not percentages), got "
                f"{density} at {pattern!r}."
            )
    return {pattern: float(density) for pattern, density in densities.items()}


def _density_of(layer: Layer, densities: dict[str, float]) -> float | None:
    matching = (d for pattern, d in densities.items() if fnmatch.fnmatchcase(layer.path, pattern))
    return next(matching, None)


def _check_patterns(densities: dict[str, float], layers: list[Layer]) -> None:
    for pattern in densities:
        if not any(fnmatch.fnmatchcase(layer.path, pattern) for layer in layers):
            some = ", ".join(repr(layer.path) for layer in layers[:5])
            raise ValueError(
                f"`densities` must match a layer with every pattern, got {pattern!r} for "
                f"{len(layers)} layers ({some}{', ...' if len(layers) > 5 else ''})."
            )


def _check_left(left: int, keep: int, capacity: int) -> None:
    if left < 0:
        raise ValueError(
            f"`densities` must not keep more than `keep` units, {keep}, got {keep - left}; lower "
            "them, or prune less."
        )
    if left > capacity:
        raise ValueError(
            f"`densities` must keep at least {keep - capacity} units, got {keep - left}: `keep` is "
            f"{keep}, and the other layers have {capacity}; raise them, or prune more."
        )
