"""What `sparsify` replaced, and why not the rest."""

import dataclasses
from collections.abc import Iterator

from sparsejax.sparse_ops._product import Product


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one weight.

    Attributes:
      path: the leaf's path, such as `conv1.kernel`.
      shape: its shape.
      density: the fraction of entries that is kept.
      products: those in which it stands, if all of them could be replaced.
      speed_up: the lowest expected of these; `None` where it was not asked.
      why: why it stays dense; empty where it is sparse.
    """

    path: str
    shape: tuple[int, ...]
    density: float
    products: tuple[Product, ...] = ()
    speed_up: float | None = None
    why: str = ""

    @property
    def replaced(self) -> bool:
        """Whether it is sparse now."""
        return not self.why


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What became of the weights of a function; prints as a table.

    Attributes:
      rows: one for every weight: those that are pruned, and others of two axes or more.
      speed_up: of the whole function, as it was measured; `None` where it was not.
    """

    rows: tuple[Row, ...]
    speed_up: float | None = None

    @property
    def replaced(self) -> tuple[str, ...]:
        """The paths of the weights that are sparse now."""
        return tuple(row.path for row in self.rows if row.replaced)

    def __str__(self) -> str:
        table = [["weight", "shape", "density", "x", "speed-up", ""]]
        table += [list(_cells(row)) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)) for row in table)
        whole = [] if self.speed_up is None else [f"the whole function: {self.speed_up:.2f}x"]
        return "\n".join([*(line.rstrip() for line in lines), *whole])

    def __repr__(self) -> str:
        return f"Report({len(self.replaced)} of {len(self.rows)} weights are sparse)"


def _cells(row: Row) -> Iterator[str]:
    yield row.path
    yield _sizes(row.shape)
    yield f"{row.density:.3g}"
    yield ", ".join(_sizes(product.x) for product in row.products) or "-"
    yield "-" if row.speed_up is None else f"{row.speed_up:.2f}x"
    yield "sparse" if row.replaced else f"dense: {row.why}"


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"
