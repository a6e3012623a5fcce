"""Prints a benchmark's JSON as Markdown: ratios, the targets, memory and compile times.

Usage: `python benchmarks/report.py benchmarks/results/selection.json`.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

OURS = "sparsejax in jit"
FLOORS = ("jnp.sum", "jnp.sum on every core")

Key: TypeAlias = tuple[str, str, str]
"""Size, group, contender."""


class Row(NamedTuple):
    """One contender's measurement."""

    seconds: float
    rounds: int
    info: dict[str, Any]


Results: TypeAlias = dict[Key, Row]


class Target(NamedTuple):
    """A promise: how it is measured (a KeyError where it was not), and the bound."""

    what: str
    measure: Callable[[Results], float]
    sign: str
    bound: float
    unit: str = "x"


def read(measured: Iterable[dict[str, Any]]) -> Results:
    """The JSON's benchmarks; `floor` is the mean of what was measured before and after."""
    results = {}
    for entry in measured:
        info, stats = entry["extra_info"], entry["stats"]
        key = info["size"], info["group"], info["contender"]
        results[key] = Row(stats["median"], stats["rounds"], info)
    for (size, group, label), before in list(results.items()):
        after = results.get((size, "floor, after", label))
        if group == "floor, before" and after:
            mean = statistics.mean([before.seconds, after.seconds])
            results[size, "floor", label] = before._replace(seconds=mean)
    return results


def times(one: Key, other: Key) -> Callable[[Results], float]:
    """How many times the other one takes."""
    return lambda results: results[one].seconds / results[other].seconds


def slower_than_floor(size: str, group: str) -> Callable[[Results], float]:
    """How many reads sparsejax takes."""
    return times((size, group, OURS), (size, "floor", FLOORS[0]))


def compiling(size: str) -> Callable[[Results], float]:
    """Seconds to trace, lower and compile masks."""

    def measure(results: Results) -> float:
        info = results[size, "masks", OURS].info
        return info["lower_s"] + info["compile_s"]

    return measure


def temporary(size: str, group: str) -> Callable[[Results], float]:
    """Memory beside arguments and results, in percent of the scores."""

    def measure(results: Results) -> float:
        info = results[size, group, OURS].info
        return 100 * info["temp_bytes"] / info["argument_bytes"]

    return measure


SELECTED = [(size, group) for size in ("60M", "200M") for group in ("threshold", "masks")]
AXES = ("2:4 along axis -2", "2:4 along axis -1")
TARGETS = [
    Target(
        "masks, 10M: jnp.sort (threshold only) ÷ ours",
        times(("10M", "threshold", "jnp.sort"), ("10M", "masks", OURS)),
        "≥",
        100,
    ),
    Target(
        "masks, 10M: np.partition with masks ÷ ours",
        times(("10M", "masks", "np.partition"), ("10M", "masks", OURS)),
        "≥",
        1,
    ),
    *(
        Target(
            f"{group}, {size}: ours ÷ floor",
            slower_than_floor(size, group),
            "≤",
            {"threshold": 8, "masks": 15}[group],
        )
        for size, group in SELECTED
    ),
    *(
        Target(f"{group}, {size}: temporary memory", temporary(size, group), "≤", 1, "%")
        for size, group in SELECTED
    ),
    *(
        Target(
            f"{group}, 10M: argsort per group ÷ ours",
            times(("10M", group, "argsort per group"), ("10M", group, OURS)),
            "≥",
            100,
        )
        for group in AXES
    ),
    *(
        Target(f"masks, {size}: lower and compile", compiling(size), "≤", 5, " s")
        for size in ("200 distinct leaves", "200 equal leaves")
    ),
]


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def target_table(results: Results) -> str:
    """Every target, what was measured, and whether it is met."""

    def line(target: Target) -> list[str]:
        bound = f"{target.sign} {target.bound}{target.unit}"
        try:
            found = target.measure(results)
        except KeyError:
            return [target.what, "not measured", bound, ""]
        met = found >= target.bound if target.sign == "≥" else found <= target.bound
        return [target.what, f"{found:.3g}{target.unit}", bound, "yes" if met else "NO"]

    return table(["target", "measured", "bound", "met"], map(line, TARGETS))


def floor_table(results: Results) -> str:
    """How the floor drifted while the others ran."""
    lines = [
        [
            f"{label}, {size} ({row.info['entries']:,} scores in {row.info['leaves']} leaves)",
            duration(results[size, "floor, before", label].seconds),
            duration(results[size, "floor, after", label].seconds),
        ]
        for (size, group, label), row in results.items()
        if group == "floor"
    ]
    return table(["one read", "before", "after"], lines)


def group_table(results: Results, size: str, group: str) -> str:
    """The contenders of a group: time, times the floor, times ours, entries kept beyond k."""
    rows = {label: row for (*key, label), row in results.items() if key == [size, group]}
    units = [results.get((size, "floor", label)) for label in FLOORS] + [rows.get(OURS)]
    lines = [
        [
            label,
            duration(row.seconds),
            str(row.rounds),
            *(ratio(row, unit) for unit in units),
            f"{row.info['kept'] - row.info['wanted']:,}" if "kept" in row.info else "",
        ]
        for label, row in rows.items()
    ]
    header = ["", "median", "rounds", "÷ floor", "÷ floor, every core", "÷ ours", "kept too many"]
    return table(header, lines)


def program_table(results: Results) -> str:
    """Memory beside arguments and results, and compile times, of our programs."""
    lines = [
        [
            f"{group}, {size}",
            f"{row.info['temp_bytes'] / 2**20:.3g} MiB",
            duration(row.info["lower_s"]),
            duration(row.info["compile_s"]),
        ]
        for (size, group, label), row in results.items()
        if label == OURS
    ]
    return table([OURS, "temporary", "lower", "compile"], lines)


def duration(seconds: float) -> str:
    """A time with three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def ratio(row: Row, unit: Row | None) -> str:
    """A time in units of another."""
    if unit is None:
        return ""
    found = row.seconds / unit.seconds
    return f"{found:,.0f}x" if found >= 100 else f"{found:.3g}x"


def provenance(loaded: dict[str, Any]) -> str:
    """The machine, versions, day and commit."""
    machine, commit = loaded["machine_info"], loaded["commit_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    changes = " and uncommitted changes" if commit["dirty"] else ""
    return (
        f"{machine['cpu']}, {machine['cpu_count']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}; Python {machine['python']}, {versions}. {loaded['datetime'][:10]}, "
        f"commit {commit['id'][:9]}{changes}. Medians in one run."
    )


def report(loaded: dict[str, Any]) -> str:
    """The whole report."""
    results = read(loaded["benchmarks"])
    parts = [provenance(loaded), "### Targets", target_table(results)]
    parts += ["### Floor", floor_table(results)]
    for size, group in dict.fromkeys((size, group) for size, group, _ in results):
        if not group.startswith("floor"):
            title = f"### {group[0].upper()}{group[1:]}, {size}"
            parts += [title, group_table(results, size, group)]
    return "\n\n".join([*parts, "### Memory and compiling", program_table(results)])


def main() -> None:
    """Prints the report of a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, help="what `pytest --benchmark-json` wrote")
    print(report(json.loads(parser.parse_args().json.read_text())))


if __name__ == "__main__":
    main()
