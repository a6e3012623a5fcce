"""The sizes of a product or convolution with a sparse weight, by which its speed is foretold."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, TypeAlias

from sparsejax.sparse_ops._convolution import Window


@dataclasses.dataclass(frozen=True)
class Product:
    """A product, or a convolution, one operand of which is a sparse weight.

    Attributes:
      x: (rows, inputs), or (images, height, width, inputs) of a convolution.
      w: (inputs, outputs), or (height, width, inputs, outputs) of a convolution's kernel.
      density: the fraction of weights that is kept.
      dtype: in which the function multiplies: `"float32"` or `"bfloat16"`.
      block: how many consecutive outputs are kept or pruned together: 8, or `None`: single ones.
      transposed: whether the dense weight lies in memory with its outputs before its inputs.
      window: how a convolution's kernel moves (strides, padding, dilation); `None` for a product.

    Example:
      >>> from sparsejax import sparse_ops
      >>> layer = sparse_ops.Product((64, 784), (784, 300), density=0.1)
      >>> layer.kind, layer.rows, layer.flops
      ('matmul', 64, 30105600)
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    density: float = 1.0
    dtype: str = "float32"
    block: int | None = None
    transposed: bool = False
    window: Window | None = None

    @property
    def kind(self) -> Literal["matmul", "conv"]:
        """Which of the two it is."""
        return "matmul" if self.window is None else "conv"

    @property
    def rows(self) -> int:
        """How many rows meet the same weights: of a convolution, the positions of its answer."""
        if self.window is None:
            return self.x[0]
        sides = zip(self.x[1:3], self.w[:2], *self.window, strict=True)
        places = (
            max(0, (size + sum(pads) - (taps - 1) * dilation - 1) // stride + 1)
            for size, taps, stride, pads, dilation in sides
        )
        return self.x[0] * math.prod(places)

    @property
    def batch(self) -> int:
        """What `SparseMatrix.from_dense` wants to know; for convolutions its default is best."""
        return 64 if self.kind == "conv" else max(1, self.rows)

    @property
    def flops(self) -> int:
        """Operations of the dense product: two for each multiplication with addition."""
        return 2 * self.rows * math.prod(self.w)


Crossover: TypeAlias = Callable[[Product], float]
"""How many times faster a product is expected to be if it skips the zeros."""
