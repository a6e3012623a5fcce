"""Products and convolutions of any layout as `matmul` and `conv` have them, by moving axes."""

import dataclasses
import math
from typing import Any, Literal, TypeAlias

import numpy as np
from jax import lax

from sparsejax.sparse_ops._convolution import Window
from sparsejax.sparse_ops._matrix import DTYPES
from sparsejax.sparse_ops._product import Product

Move: TypeAlias = tuple[Literal["transpose", "reshape"], tuple[int, ...]]
Moves: TypeAlias = tuple[Move, ...]


def moved(array: Any, moves: Moves) -> Any:
    """An array after some moves."""
    for kind, numbers in moves:
        array = array.transpose(numbers) if kind == "transpose" else array.reshape(numbers)
    return array


def undone(array: Any, moves: Moves, shape: tuple[int, ...]) -> Any:
    """The array of a shape that moves have brought into its own."""
    shapes = [shape]
    for move in moves:
        shapes.append(_after(move, shapes[-1]))
    for (kind, numbers), before in zip(moves[::-1], shapes[-2::-1], strict=True):
        if kind == "transpose":
            array = array.transpose(tuple(np.argsort(numbers).tolist()))
        else:
            array = array.reshape(before)
    return array


def shape_after(moves: Moves, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that moves bring a shape into."""
    for move in moves:
        shape = _after(move, shape)
    return shape


def tidy(moves: Moves, shape: tuple[int, ...]) -> Moves:
    """The same moves of an array of a shape, without those that others undo or contain."""
    found: list[Move] = []
    shapes = [shape]
    for kind, numbers in moves:
        if found and found[-1][0] == kind:
            last = found.pop()[1]
            shapes.pop()
            numbers = tuple(last[i] for i in numbers) if kind == "transpose" else numbers
        still = tuple(range(len(numbers))) if kind == "transpose" else shapes[-1]
        if numbers != still:
            found.append((kind, numbers))
            shapes.append(_after(found[-1], shapes[-1]))
    return tuple(found)


def _after(move: Move, shape: tuple[int, ...]) -> tuple[int, ...]:
    kind, numbers = move
    return tuple(shape[i] for i in numbers) if kind == "transpose" else numbers


@dataclasses.dataclass(frozen=True)
class Form:
    """An equation as `matmul` or `conv` of moved operands, whose answer is moved back.

    Attributes:
      x: the moves of what is no weight, to (rows, inputs) or NHWC.
      w: the moves of the weight, to (inputs, outputs) or HWIO.
      y: the moves of the answer.
      product: its sizes, as if the weight were dense.
    """

    x: Moves
    w: Moves
    y: Moves
    product: Product


def form_of(eqn: Any, side: int) -> Form | str:
    """The form of an equation whose operand number `side` is the weight, or why it has none."""
    for atom in (*eqn.invars, *eqn.outvars):
        if atom.aval.dtype not in DTYPES:
            return f"a product of {atom.aval.dtype}"
    if isinstance(eqn.params["precision"], lax.DotAlgorithm | lax.DotAlgorithmPreset):
        return f"a product by the algorithm {eqn.params['precision']}"
    if eqn.primitive.name == "dot_general":
        return _product(eqn, side)
    return _convolution(eqn, side)


def _product(eqn: Any, side: int) -> Form | str:
    summed, batch = eqn.params["dimension_numbers"]
    if batch[0]:
        return "a batched product"
    if eqn.params.get("out_sharding") is not None:
        return "a product with a sharding of its own"
    w, x = (eqn.invars[i].aval.shape for i in (side, 1 - side))
    over_w, over_x = summed[side], summed[1 - side]
    free_w = tuple(d for d in range(len(w)) if d not in over_w)
    free_x = tuple(d for d in range(len(x)) if d not in over_x)
    inputs, outputs = _size(w, over_w), _size(w, free_w)
    rows = _size(x, free_x)
    back = tuple(x[d] for d in free_x) + tuple(w[d] for d in free_w)
    y: Moves = (("reshape", back),)
    if side == 0:
        y += (("transpose", (*range(len(free_x), len(back)), *range(len(free_x)))),)
    dtype = str(eqn.invars[side].aval.dtype)
    return Form(
        tidy((("transpose", (*free_x, *over_x)), ("reshape", (rows, inputs))), x),
        tidy((("transpose", (*over_w, *free_w)), ("reshape", (inputs, outputs))), w),
        tidy(y, (rows, outputs)),
        Product((rows, inputs), (inputs, outputs), dtype=dtype),
    )


def _convolution(eqn: Any, side: int) -> Form | str:
    params = eqn.params
    if side == 0:
        return "the image of a convolution"
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return "a grouped convolution"
    if any(d != 1 for d in params["lhs_dilation"]):
        return "a transposed convolution"
    if any(n < 0 for pair in params["padding"] for n in pair):
        return "a convolution with negative padding"
    axes = len(params["window_strides"])
    if axes not in (1, 2):
        return f"a convolution of {axes} axes"
    x, w = (atom.aval.shape for atom in eqn.invars)
    numbers = params["dimension_numbers"]
    batch, channels, *space = numbers.lhs_spec
    outputs, inputs, *taps = numbers.rhs_spec
    to_x: Moves = (("transpose", (batch, *space, channels)),)
    to_w: Moves = (("transpose", (*taps, inputs, outputs)),)
    made = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    back: Moves = (("transpose", tuple(np.argsort(made).tolist())),)
    window = [list(params[k]) for k in ("window_strides", "padding", "rhs_dilation")]
    y = tuple(eqn.outvars[0].aval.shape[d] for d in made)
    nhwc, hwio = (tuple(s[d] for d in m[0][1]) for s, m in ((x, to_x), (w, to_w)))
    if axes == 1:
        # One row of pixels.
        nhwc, hwio = (nhwc[0], 1, *nhwc[1:]), (1, *hwio)
        to_x, to_w = (*to_x, ("reshape", nhwc)), (*to_w, ("reshape", hwio))
        back = (("reshape", y), *back)
        window = [[1, *window[0]], [(0, 0), *window[1]], [1, *window[2]]]
        y = (y[0], 1, *y[1:])
    dtype = str(eqn.invars[1].aval.dtype)
    product = Product(nhwc, hwio, dtype=dtype, window=Window(*map(tuple, window)))
    return Form(tidy(to_x, x), tidy(to_w, w), tidy(back, y), product)


def _size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[d] for d in axes)
