"""Which leaves `sparsejax prune` prunes, and how their axes are laid out."""

import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from sparsejax import filters
from sparsejax.cli import _console

Layout: TypeAlias = Literal["flax", "torch"]


class Guess(NamedTuple):
    """A layout, and what speaks for it."""

    layout: Layout
    reason: str


def guess(names: Iterable[str], metadata: Mapping[str, str]) -> Guess:
    """The layout by what frameworks write: torch's `format` and `weight`, Flax's `kernel`."""
    last = {name.replace("/", ".").rsplit(".", 1)[-1] for name in names}
    if metadata.get("format") == "pt":
        return Guess("torch", "the metadata say format pt")
    if "kernel" in last:
        return Guess("flax", "leaves are called kernel")
    if "weight" in last:
        return Guess("torch", "leaves are called weight")
    return Guess("flax", "no leaf is called weight")


def chosen(
    arrays: Mapping[str, np.ndarray], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """The names of the leaves to prune.

    Raises:
      CommandError: if a pattern matches no leaf, or no leaf is left.
    """
    weights = [name for name, array in arrays.items() if filters.weights(name, array)]
    if not weights:
        raise _console.CommandError(
            "no leaf can be pruned: none is floating and has at least two axes"
        )
    for pattern in include:
        _check_pattern("--include", pattern, weights, arrays)
    for pattern in exclude:
        _check_pattern("--exclude", pattern, arrays, arrays)
    wanted = [name for name in weights if not include or _matches(name, include)]
    kept = [name for name in wanted if not _matches(name, exclude)]
    if not kept:
        raise _console.CommandError("no leaf is left to prune: --exclude matches all of them")
    return kept


def _check_pattern(
    option: str, pattern: str, candidates: Iterable[str], names: Iterable[str]
) -> None:
    if any(_matches(name, [pattern]) for name in candidates):
        return
    if any(_matches(name, [pattern]) for name in names):
        raise _console.CommandError(
            f"{option} {pattern!r} matches only leaves that are never pruned: they are not "
            "floating, or have less than two axes"
        )
    some = [repr(name) for name in itertools.islice(candidates, 6)]
    listed = ", ".join(some[:5] + ["..."] * (len(some) > 5))
    raise _console.CommandError(f"{option} {pattern!r} matches no leaf; there are {listed}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
