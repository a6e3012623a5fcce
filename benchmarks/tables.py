"""Tables of figures."""

from rich.table import Column, Table


def table(title, header, rows):
    """A rich table; every column but the first is aligned to the right."""
    first = Column(header[0], no_wrap=True)
    others = [Column(name, justify="right") for name in header[1:]]
    answer = Table(first, *others, title=title, title_justify="left")
    for row in rows:
        answer.add_row(*map(str, row))
    return answer
