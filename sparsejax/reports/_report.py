"""Rows as one table, for a terminal, Markdown, JSON or CSV."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from sparsejax import _leaves
from sparsejax.reports import _formats
from sparsejax.reports._row import DERIVED, FIELDS, SEED, TAKEN, Cell, Row, pooled

_FORMAT, _VERSION = "sparsejax.report", 1

# What is shown where the user does not choose, if some row has it.
_USUAL = (
    *("sparsity", "nonzeros", "compression", "flops", "bytes", "bytes_factor"),
    *("accuracy", "error", "latency"),
)


@dataclasses.dataclass(frozen=True)
class Report:
    """A table of networks: `print` it, or make Markdown, JSON or CSV of it.

    Percentages, milliseconds and thousands are for people (`print`, `rich`, `markdown`); JSON and
    CSV have fractions, seconds and whole numbers in full precision. A value that is missing is
    shown as –; several values are shown as mean ± standard deviation (of n - 1 degrees of freedom).

    Attributes:
      rows: `Row`s, in the order of the table.
      columns: which columns are shown; `None`: sparsity, nonzeros, compression, FLOPs, bytes,
        accuracy, error, latency and your own, those that some row has.

    Raises:
      TypeError: if `rows` are no rows.
      ValueError: if a column is one that no row has.

    Example:
      >>> from sparsejax import reports
      >>> report = reports.Report([
      ...     reports.Row("dense", nonzeros=266_200, size=266_200, error=[0.0161, 0.0159]),
      ...     reports.Row("pruned", nonzeros=5_324, size=266_200, more={"epochs": 30}),
      ... ])
      >>> print(report)
              nonzeros  compression     error, %  epochs
      dense    266,200        1.00x  1.60 ± 0.01       –
      pruned     5,324        50.0x            –      30
      >>> print(report.select("nonzeros", "epochs").markdown())
      | | nonzeros | epochs |
      |---|---|---|
      | dense | 266,200 | – |
      | pruned | 5,324 | 30 |
      >>> reports.Report.from_json(report.json()) == report
      True
    """

    rows: Sequence[Row] = ()
    columns: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Sequence):
            raise TypeError(f"`rows` must be a list of rows, got {_leaves.brief(self.rows)}.")
        for row in self.rows:
            if not isinstance(row, Row):
                raise TypeError(f"`rows` must be reports.Row, got {_leaves.brief(row)}.")
        object.__setattr__(self, "rows", tuple(self.rows))
        if self.columns is not None:
            if isinstance(self.columns, str) or not isinstance(self.columns, Sequence):
                raise TypeError(
                    f"`columns` must be a list of names, got {_leaves.brief(self.columns)}."
                )
            object.__setattr__(self, "columns", tuple(self.columns))
            there = [*FIELDS, *DERIVED, *self._own]
            for column in self.columns:
                if column not in there:
                    raise ValueError(
                        f"`columns` must be among {', '.join(there)}, got "
                        f"{_leaves.brief(column)}; the name stands in front of every row."
                    )

    @property
    def shown(self) -> tuple[str, ...]:
        """The names of the columns that are shown, the name of the row aside."""
        if self.columns is not None:
            return tuple(self.columns)
        return tuple(column for column in (*_USUAL, *self._own) if self._has(column))

    def select(self, *columns: str) -> "Report":
        """The same rows with these columns, in this order.

        Args:
          *columns: names: `sparsity`, `density`, `nonzeros`, `size`, `compression`, `flops`,
            `dense_flops`, `flops_factor`, `bytes`, `dense_bytes`, `bytes_factor`, `accuracy`,
            `error`, `latency`, or your own; with none, the usual ones.

        Raises:
          ValueError: if no row can have a column.
        """
        return Report(self.rows, columns or None)

    def pooled(self) -> "Report":
        """Rows of the same name as one, at the place of the first: seeds become mean ± deviation.

        Of each column it keeps the values of all rows that have one, or one value where all agree.
        A column `seed` is left out: it tells rows apart. In every other one, numbers that differ
        are taken for measurements.

        Raises:
          ValueError: if such rows have different texts in a column.
        """
        names = dict.fromkeys(row.name for row in self.rows)
        groups = ([row for row in self.rows if row.name == name] for name in names)
        columns = self.columns and [column for column in self.columns if column != SEED]
        return Report([pooled(rows[0].name, rows) for rows in groups], columns)

    def rich(self, title: str = "") -> Table:
        """A table of rich, for a terminal; `console.print(report)` does it, too."""
        table = Table(
            title=title or None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for name, number in zip(self._header, [False, *self._numeric], strict=True):
            # One word a line: a terminal has no room for long titles over short numbers.
            words = Text("\n".join(name.split()))
            table.add_column(words, justify="right" if number else "left", no_wrap=True)
        for row in self._cells():
            table.add_row(*map(Text, row))
        return table

    def __rich__(self) -> Table:
        return self.rich()

    def markdown(self) -> str:
        """A table of Markdown, without an end of line."""
        lines = [_barred(self._header), "|" + "---|" * (1 + len(self.shown))]
        return "\n".join([*lines, *map(_barred, self._cells())])

    def csv(self) -> str:
        """Comma-separated values with a header, in full precision.

        All columns that some row has, or those that were selected. A column of which some row has
        several values is two: the mean, and `..._std`.
        """
        columns = self.columns or [c for c in self._everything if self._has(c)]
        several = {c for c in columns if any(isinstance(row[c], tuple) for row in self.rows)}
        header = ["name"]
        for column in columns:
            header += [column, f"{column}_std"] if column in several else [column]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for row in self.rows:
            values: list[Any] = [row.name]
            for column in columns:
                values += _raw(row[column])[: 2 if column in several else 1]
            writer.writerow(values)
        return text.getvalue()

    def json(self, indent: int | None = None) -> str:
        """The whole report as JSON, from which `from_json` makes an equal one.

        `{"format": ..., "version": ..., "columns": ..., "rows": [{"name": ..., "sparsity": ...}]}`:
        each row has what was measured, in full precision, and the factors that follow from it.
        Several values are a list; what is missing is left out; NaN and infinity, which JSON lacks,
        are `{"float": "nan"}`.

        Args:
          indent: of each level; by default all is one line.
        """
        rows = [
            {"name": row.name}
            | {c: _coded(row[c]) for c in (*FIELDS, *DERIVED) if row[c] is not None}
            | {c: _coded(cell) for c, cell in row.more.items()}
            for row in self.rows
        ]
        content = {"format": _FORMAT, "version": _VERSION, "columns": self.columns, "rows": rows}
        return json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Report":
        """The report that `json` wrote.

        Raises:
          ValueError: if `text` is no such JSON, with what is wrong in it.
        """
        try:
            content = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"`text` must be the JSON of a report: {error}.") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError("`text` must be JSON that Report.json wrote; its format is another.")
        if content.get("version") != _VERSION:
            raise ValueError(
                f"`text` must have version {_VERSION}, got {content.get('version')!r}; read it "
                "with the release of sparsejax that wrote it."
            )
        try:
            return Report([_decoded_row(row) for row in content["rows"]], content["columns"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = error if type(error) is ValueError else repr(error)
            raise ValueError(
                f"`text` must be a whole report, but it is damaged: {what}."
            ) from error

    def __str__(self) -> str:
        lines = [self._header, *self._cells()]
        widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
        right = [False, *self._numeric]
        text = []
        for line in lines:
            cells = zip(line, widths, right, strict=True)
            text.append("  ".join(_padded(*cell) for cell in cells).rstrip())
        return "\n".join(text)

    @property
    def _own(self) -> tuple[str, ...]:
        """The user's columns, in the order in which they first come."""
        return tuple(dict.fromkeys(column for row in self.rows for column in row.more))

    @property
    def _everything(self) -> tuple[str, ...]:
        return (*FIELDS, *DERIVED, *self._own)

    def _has(self, column: str) -> bool:
        return any(row[column] is not None for row in self.rows)

    @property
    def _header(self) -> list[str]:
        return [_formats.title(column) for column in ("name", *self.shown)]

    @property
    def _numeric(self) -> list[bool]:
        return [not any(isinstance(row[c], str) for row in self.rows) for c in self.shown]

    def _cells(self) -> Iterator[list[str]]:
        for row in self.rows:
            yield [
                _formats.line(row.name),
                *(_formats.shown(row[column], column) for column in self.shown),
            ]


def _padded(cell: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def _barred(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in escaped)


def _raw(cell: Cell) -> list[Any]:
    """The mean and the deviation, or what else is there, for CSV."""
    if isinstance(cell, tuple):
        return list(_formats.summary(cell))
    return [cell, None]


def _coded(cell: Cell) -> Any:
    if isinstance(cell, tuple):
        return [_coded(number) for number in cell]
    if isinstance(cell, float) and not math.isfinite(cell):
        return {"float": str(cell)}
    return cell


def _decoded(value: Any) -> Cell:
    if isinstance(value, list):
        return [_decoded(number) for number in value]
    return float(value["float"]) if isinstance(value, dict) else value


def _decoded_row(content: dict[str, Any]) -> Row:
    cells = {column: _decoded(value) for column, value in content.items()}
    own = {column: cell for column, cell in cells.items() if column not in TAKEN}
    fields = {column: cells[column] for column in FIELDS if column in cells}
    return Row(cells["name"], **fields, more=own)
