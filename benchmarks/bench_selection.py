"""Selection against its peers: the threshold, masks, 2:4 masks, and compile times.

Every figure is the median of rounds that follow a warm-up, and comes with the program's memory
and, as a check, with how many entries are kept. The floor is measured before and after each size.
"""

import time
from collections.abc import Iterator

import contenders
import inputs
import jax
import numpy as np
import pytest
from contenders import Contender, Timed
from inputs import Case

pytest.importorskip(
    "pytest_benchmark", reason="pytest-benchmark is missing: pip install -e '.[benchmarks]'"
)

SIZES = ("10M", "60M", "200M")
ONCE_FROM = 10.0  # seconds; one round is enough
ROUNDS, SECONDS = 30, 4.0  # at most so many rounds in about so many seconds, and at least three
TOO_SLOW = "a minute and more per round at 200M"


def bench(benchmark, case: Case, group: str, label: str, timed: Timed):
    """Measures one contender; returns its last result."""
    start = time.perf_counter()
    timed.call(*timed.setup())
    warm_up = time.perf_counter() - start
    rounds = 1 if warm_up > ONCE_FROM else min(ROUNDS, max(3, int(SECONDS / warm_up)))
    benchmark.group = f"{group}, {case.name}"
    benchmark.extra_info |= {
        "size": case.name,
        "entries": case.flat.size,
        "leaves": len(case.leaves),
        "group": group,
        "contender": label,
        "warm_up_s": warm_up,
    }
    benchmark.extra_info |= timed.info
    return benchmark.pedantic(timed.call, setup=lambda: (timed.setup(), {}), rounds=rounds)


def check_masks(benchmark, label: str, masks, wanted: int) -> None:
    """Records how many entries the masks keep; ours must keep exactly as many as wanted."""
    kept = sum(int(np.count_nonzero(np.asarray(mask))) for mask in masks)
    benchmark.extra_info |= {"kept": kept, "wanted": wanted}
    if label.startswith("sparsejax"):
        assert kept == wanted


@pytest.fixture(scope="module", params=SIZES)
def case(request) -> Iterator[Case]:
    """The scores of one size; pytest runs everything on one size before it makes the next."""
    yield inputs.make(request.param)
    jax.clear_caches()


def leave_out(case: Case, contender: Contender, request) -> None:
    """Skips a slow contender at the largest size, unless `--slow`."""
    if contender.slow and case.name == "200M" and not request.config.getoption("--slow"):
        pytest.skip(f"{contender.label}: {TOO_SLOW}; --slow includes it")


def each(found: list[Contender]):
    """A test for each contender."""
    return pytest.mark.parametrize("contender", found, ids=[c.label for c in found])


@each(contenders.FLOOR)
def test_floor_before(benchmark, case, contender):
    bench(benchmark, case, "floor, before", contender.label, contender.prepare(case))


@each(contenders.THRESHOLD)
def test_threshold(benchmark, case, contender, request):
    leave_out(case, contender, request)
    found = bench(benchmark, case, "threshold", contender.label, contender.prepare(case))
    exact = contenders.by_partition(case.flat, case.keep)
    benchmark.extra_info |= {"exact": bool(float(found) == exact), "wanted": case.keep}
    if contender.label != "jnp.quantile":
        assert float(found) == exact


@each(contenders.MASKS)
def test_masks(benchmark, case, contender, request):
    leave_out(case, contender, request)
    found = bench(benchmark, case, "masks", contender.label, contender.prepare(case))
    check_masks(benchmark, contender.label, found, case.keep)


@each(contenders.FLOOR)
def test_floor_after(benchmark, case, contender):
    bench(benchmark, case, "floor, after", contender.label, contender.prepare(case))


@pytest.fixture(scope="module")
def convolutional() -> Case:
    """10M scores; both axes can be cut into fours."""
    return inputs.make("10M")


@pytest.mark.parametrize(
    ("axis", "contender"),
    contenders.NM,
    ids=[f"{c.label}, axis {axis}" for axis, c in contenders.NM],
)
def test_2_of_4(benchmark, convolutional, axis, contender):
    timed = contender.prepare(convolutional)
    found = bench(benchmark, convolutional, f"2:4 along axis {axis}", contender.label, timed)
    check_masks(benchmark, contender.label, found, convolutional.flat.size // 2)


@pytest.mark.parametrize("name", ["200 distinct leaves", "200 equal leaves"])
def test_compile_time(benchmark, name):
    """What counts is `lower_s` and `compile_s`."""
    jax.clear_caches()
    many = inputs.make(name)
    timed = contenders.compiled(contenders.masks, many.leaves)
    found = bench(benchmark, many, "masks", "sparsejax in jit", timed)
    check_masks(benchmark, "sparsejax", found, many.keep)
