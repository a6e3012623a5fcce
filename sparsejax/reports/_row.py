"""What is known of one network: a row of a report."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from sparsejax import _leaves

Cell: TypeAlias = Any
"""A number, several of them (one a seed), or `None` where nothing was measured."""

Number: TypeAlias = int | float


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one network; `row` measures it, `Row` says what was published.

    Every field but the name may be missing (`None`), or have several values, one a seed (a list or
    an array, kept as a tuple), which are shown as mean ± standard deviation. `size`, `dense_flops`
    and `dense_bytes` are of the dense network that this one came from.

    Attributes:
      name: what stands in front.
      sparsity: the fraction of the prunable entries that are zero, in [0, 1].
      nonzeros: how many are not.
      size: how many there are.
      flops: operations of one call without those by zero weights.
      dense_flops: with them.
      bytes: of the file.
      dense_bytes: of all arrays, dense.
      accuracy: a fraction in [0, 1].
      error: a fraction in [0, 1].
      latency: seconds of a call.
      more: your own columns: numbers, several numbers, or texts, by name.

    Raises:
      TypeError: if a value is of the wrong kind.
      ValueError: if a value is out of range, or a name in `more` is that of another column.

    Example:
      >>> from sparsejax import reports
      >>> surgery = reports.Row("Guo et al. 2016", nonzeros=4_800, size=266_200, error=0.0199)
      >>> f"{surgery.compression:.1f}", surgery["error"]
      ('55.5', 0.0199)
      >>> reports.Row("three seeds", error=[0.021, 0.019, 0.02]).error
      (0.021, 0.019, 0.02)
    """

    name: str
    sparsity: Cell = None
    nonzeros: Cell = None
    size: Cell = None
    flops: Cell = None
    dense_flops: Cell = None
    bytes: Cell = None
    dense_bytes: Cell = None
    accuracy: Cell = None
    error: Cell = None
    latency: Cell = None
    more: Mapping[str, Cell] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"`name` must be a text, got {_leaves.brief(self.name)}.")
        for field in FIELDS:
            object.__setattr__(self, field, _measured(field, getattr(self, field)))
        if not isinstance(self.more, Mapping):
            raise TypeError(f"`more` must be a dict by column, got {_leaves.brief(self.more)}.")
        for column in self.more:
            if not isinstance(column, str):
                raise TypeError(f"`more` must have names of columns, got {_leaves.brief(column)}.")
            if column in TAKEN:
                raise ValueError(
                    f"`more` must have names of its own, got {column!r}, which is a column of "
                    f"every row: {', '.join(FIELDS)} are arguments, {', '.join(DERIVED)} follow."
                )
        own = {column: _cell(f"more[{column!r}]", value) for column, value in self.more.items()}
        object.__setattr__(self, "more", own)

    @property
    def density(self) -> Cell:
        """The fraction of the prunable entries that are not zero."""
        return _each(lambda sparsity: 1 - sparsity, self.sparsity)

    @property
    def compression(self) -> Cell:
        """How many times fewer weights than the dense network: size / nonzeros."""
        return _each(_ratio, self.size, self.nonzeros)

    @property
    def flops_factor(self) -> Cell:
        """How many times fewer operations: dense_flops / flops."""
        return _each(_ratio, self.dense_flops, self.flops)

    @property
    def bytes_factor(self) -> Cell:
        """How many times fewer bytes: dense_bytes / bytes."""
        return _each(_ratio, self.dense_bytes, self.bytes)

    def __getitem__(self, column: str) -> Cell:
        """The value in a column, of whatever kind; None where it has none."""
        if column in TAKEN:
            return getattr(self, column)
        return self.more.get(column)


# In the order in which they are shown.
FIELDS = (
    *("sparsity", "nonzeros", "size", "flops", "dense_flops", "bytes", "dense_bytes"),
    *("accuracy", "error", "latency"),
)
DERIVED = ("density", "compression", "flops_factor", "bytes_factor")
TAKEN = frozenset({"name", "more", *FIELDS, *DERIVED})
_FRACTIONS = ("sparsity", "accuracy", "error")
# A column of people's own that says which run a row is: no quantity to average.
SEED = "seed"


def pooled(name: str, rows: Sequence[Row]) -> Row:
    """Several rows as one: of each column but the seed, all values, or the one that all have."""
    columns = dict.fromkeys(column for row in rows for column in [*FIELDS, *row.more])
    columns.pop(SEED, None)
    cells = {column: _pooled(name, column, [row[column] for row in rows]) for column in columns}
    fields = {column: cells.pop(column) for column in FIELDS}
    return Row(name, **fields, more=cells)


def numbers(cell: Cell) -> tuple[Number, ...]:
    """The numbers of a cell, however many."""
    if cell is None or isinstance(cell, str):
        return ()
    return cell if isinstance(cell, tuple) else (cell,)


def _pooled(name: str, column: str, cells: Sequence[Cell]) -> Cell:
    have = [cell for cell in cells if cell is not None]
    if not have or all(cell == have[0] for cell in have):
        return have[0] if have else None
    if any(isinstance(cell, str) for cell in have):
        raise ValueError(
            f"rows of one name must have one text in a column, got {_leaves.brief(have)} in "
            f"{column!r} of {name!r}; give these rows names of their own."
        )
    return tuple(number for cell in have for number in numbers(cell))


def _measured(field: str, value: Any) -> Cell:
    """The cell of a column that every row has."""
    cell = _cell(field, value)
    if isinstance(cell, str | bool):
        raise TypeError(f"`{field}` must be a number, got {value!r}; `more` has room for texts.")
    for number in numbers(cell):
        if field in _FRACTIONS and (number < 0 or number > 1):
            raise ValueError(
                f"`{field}` must be in [0, 1] (a fraction, not a percentage), got {number}."
            )
        if number < 0:
            raise ValueError(f"`{field}` must be >= 0, got {number}.")
    return cell


def _cell(name: str, value: Any) -> Cell:
    """A value as it is kept: None, a text, a Python number, or a tuple of them."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    several = isinstance(value, Sequence) or bool(_leaves.shape_of(value))
    if _leaves.is_traced(value) or not (several or _leaves.is_number(value)):
        raise TypeError(
            f"`{name}` must be a number, several of them, or None, got {_leaves.brief(value)}."
        )
    found = tuple(_number(name, x) for x in (value if several else [value]))
    if not found:
        raise ValueError(f"`{name}` must have a value for each seed, got none; None is missing.")
    return found if len(found) > 1 else found[0]


def _number(name: str, value: Any) -> Number:
    array = np.asarray(value) if _leaves.is_number(value) else None
    if array is None or array.shape != () or np.iscomplexobj(array):
        raise TypeError(f"`{name}` must hold real numbers, got {_leaves.brief(value)}.")
    return array.item()


def _each(f: Callable[..., Number], *cells: Cell) -> Cell:
    """A function of cells, seed by seed; None where one is missing or they have other seeds."""
    if any(cell is None for cell in cells):
        return None
    counts = {len(cell) for cell in cells if isinstance(cell, tuple)}
    if not counts:
        return f(*cells)
    if len(counts) > 1:
        return None

    def one(i: int) -> Iterator[Number]:
        return (cell[i] if isinstance(cell, tuple) else cell for cell in cells)

    return tuple(f(*one(i)) for i in range(counts.pop()))


def _ratio(whole: Number, part: Number) -> float:
    return whole / part if part else float("nan") if not whole else float("inf")
