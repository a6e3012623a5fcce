"""The bar of everything that takes many fits or many losses, on standard error."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsejax import _leaves

Advance: TypeAlias = Callable[[str], None]
"""Called after each item, with what to say of it: `"strength 0.01, sparsity 0.95"`."""


def part(progress: bool | str, name: str) -> bool | str:
    """What one part of a whole is given: its name, after the whole's text if there is one."""
    if progress is False:
        return False
    return name if progress is True else f"{progress}, {name}"


@contextlib.contextmanager
def bar(progress: bool | str, what: str, total: int) -> Iterator[Advance]:
    """A bar that `with` opens: a text, how many items are done, the last one, the time left.

    It stays on the screen with the time that it took. Where fewer items than `total` were needed,
    it ends with their number as the total; an error leaves it as it is.

    Args:
      progress: False draws nothing; a text stands before the bar instead of `what`.
      what: the text before the bar where the user gives none.
      total: the number of items, at most.
    """
    if not isinstance(progress, bool | str):
        raise TypeError(f"`progress` must be True, False or a text, got {_leaves.brief(progress)}.")
    if progress is False:
        yield lambda last: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as drawn:
        task = drawn.add_task(what if progress is True else progress, total=total, last="")
        yield lambda last: drawn.update(task, advance=1, last=last)
        drawn.update(task, total=drawn.tasks[task].completed)
