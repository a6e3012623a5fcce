"""What people see: tables on standard output, notes and errors on standard error.

Where standard output is no terminal, it gets neither colors nor progress, and as many columns as
the longest line has. Names come from files that anybody may have made: what a terminal would obey
is printed as an escape.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_LARGE = 1 << 26  # Bytes that take a second or so.

# Of narrower terminals the lines are folded, not the columns.
_NARROW = 80


class CommandError(Exception):
    """What went wrong, in one line; the command ends with status 2."""


class UsageError(CommandError):
    """A wrong command line; `program` is the command that it is about."""

    def __init__(self, program: str, message: str) -> None:
        super().__init__(message)
        self.program = program


class Column(NamedTuple):
    """A column of a table: its title, and whether it holds numbers."""

    title: str
    number: bool = False


def prepare(*, own_process: bool) -> None:
    """Readies what belongs to a process of our own: streams, errors of threads, and JAX."""
    if not own_process:
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the encoding lacks is printed as an escape.
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _unless_of_nothing
    import jax

    # A tool for files has no use for accelerators, whose memory JAX would reserve.
    jax.config.update("jax_platforms", "cpu")


def shown(name: Any) -> str:
    """A name as it may be printed: control characters, line ends and the like as escapes."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(name))


def emit(text: str) -> None:
    """Writes to standard output, all of it, now.

    Raises:
      BrokenPipeError: if nobody reads it.
      CommandError: if it cannot be written.
    """
    if sys.stdout is None:
        raise CommandError("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if error.errno == errno.EPIPE:
            raise BrokenPipeError from error
        raise CommandError(f"cannot write to standard output: {error.strerror}") from error


def note(text: str) -> None:
    """A line on standard error; lost where that is closed."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def error(program: str, message: str) -> None:
    """`sparsejax prune: error: ...`, one line whatever the message is."""
    note(f"{program}: error: {shown(' '.join(message.split()))}")


def words(error: BaseException) -> str:
    """What an error says; of one of the operating system `'a.npz': No such file or directory`."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, RecursionError):
        return "the tree is too deep"
    if isinstance(error, OSError):
        what = error.strerror or str(error) or type(error).__name__
        return f"{str(error.filename)!r}: {what}" if error.filename is not None else what
    return str(error)


def progress(size: int) -> bool:
    """Whether to draw progress bars for so many bytes: on standard error, if it is a terminal."""
    return size > _LARGE and sys.stderr is not None and sys.stderr.isatty()


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], summary: str) -> str:
    """A table of names and figures and a line below it, for standard output."""
    return f"{_drawn(columns, rows, sys.stdout)}{summary}\n"


def note_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], summary: str) -> None:
    """The same on standard error."""
    note(_drawn(columns, rows, sys.stderr) + summary)


def can_draw(characters: str) -> bool:
    """Whether standard output has these characters."""
    try:
        characters.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _drawn(columns: Sequence[Column], rows: Sequence[Sequence[str]], stream: Any) -> str:
    """The text of a table; colored and folded only if it goes to a terminal."""
    escaped = [[shown(cell) for cell in row] for row in rows]
    if stream is None or not stream.isatty():
        return _plain(columns, escaped)
    paper = _Paper(stream.encoding)
    console = Console(file=paper, force_terminal=True)
    console.width = max(console.width, _NARROW)
    console.print(_rich_table(columns, escaped))
    return "".join(f"{line.rstrip()}\n" for line in paper.getvalue().splitlines())


def _plain(columns: Sequence[Column], rows: list[list[str]]) -> str:
    """As wide as it needs to be, with two spaces between columns."""
    lines = [[column.title for column in columns], *rows]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    text = ""
    for line in lines:
        cells = zip(line, widths, columns, strict=True)
        text += "  ".join(_padded(*cell) for cell in cells).rstrip() + "\n"
    return text


def _padded(cell: str, width: int, column: Column) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if column.number else cell + space


def _rich_table(columns: Sequence[Column], rows: list[list[str]]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        made.add_column(
            column.title,
            justify="right" if column.number else "left",
            overflow="fold",
            no_wrap=0 < place < len(columns) - 1,
        )
    for row in rows:
        made.add_row(*map(Text, row))
    return made


class _Paper(io.StringIO):
    """Where a table is written first, so that errors of streams arise in one place only."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """What the table may be drawn with."""
        return self._encoding


def fraction(zeros: int, size: int) -> str:
    """Four digits; 0 and 1 only where it is just that."""
    text = f"{zeros / max(size, 1):.4f}"
    if zeros and text == "0.0000":
        return "<0.0001"
    return ">0.9999" if zeros < size and text == "1.0000" else text


def plural(count: int, one: str, many: str) -> str:
    """`1 leaf`, `2 leaves`."""
    return f"{count:,} {one if count == 1 else many}"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _unless_of_nothing(error: Any) -> None:
    """Leaves out what tensorstore's threads say after orbax has failed to read, as we say so."""
    if error.object is not None or not isinstance(error.exc_value, RuntimeError):
        sys.__unraisablehook__(error)


def _discard(stream: Any) -> None:
    """Sends what is still buffered nowhere, or Python would complain of it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
