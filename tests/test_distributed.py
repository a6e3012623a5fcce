"""Selection and sparse training on arrays that two processes share, four CPU devices each."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.long


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found, by case."""
    folder = tmp_path_factory.mktemp("distributed")
    port = str(free_port())
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = []
    try:
        for number in ("0", "1"):
            # Files, not pipes: a process that waits for a reader would hold up the other.
            with (
                (folder / f"{number}.out").open("w") as out,
                (folder / f"{number}.err").open("w") as err,
            ):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, WORKER, port, number],
                        env=os.environ | settings,
                        stdout=out,
                        stderr=err,
                    )
                )
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    errors = [(folder / f"{number}.err").read_text() for number in (0, 1)]
    assert codes == [0, 0], "\n".join(errors)
    return [
        json.loads((folder / f"{number}.out").read_text().splitlines()[-1]) for number in (0, 1)
    ]


def cases(found, kind):
    chosen = {
        (number, case): value
        for number, cases in enumerate(found)
        for case, value in cases.items()
        if case.startswith(kind)
    }
    assert chosen
    return chosen


def test_topk_over_processes_equals_a_stable_sort(found):
    assert all(cases(found, "eager").values()), cases(found, "eager")


def test_topk_over_processes_takes_a_traced_sparsity(found):
    assert all(cases(found, "traced").values()), cases(found, "traced")


def test_topk_over_processes_gathers_counts_only(found):
    counts = 6 * 8  # six candidates, eight devices
    assert max(cases(found, "gathered").values()) <= counts, cases(found, "gathered")


def test_kth_largest_over_processes_equals_a_sort(found):
    assert all(cases(found, "kth").values()), cases(found, "kth")


def test_training_over_processes_has_the_masks_of_one_device(found):
    assert all(cases(found, "training same").values()), cases(found, "training same")


def test_training_over_processes_has_the_same_masks_on_both(found):
    first, second = (cases([one], "training digest") for one in found)
    assert first == second


def test_training_over_processes_leaves_the_state_sharded_as_it_was(found):
    assert all(cases(found, "training sharded").values()), cases(found, "training sharded")


def test_training_over_processes_gathers_counts_only(found):
    counts = 6 * 8  # six candidates, eight devices
    assert max(cases(found, "training gathered").values()) <= counts
