"""The compiled kernels under sanitizers (`tests/kernel/fuzz.cc`): no bad access, no race.

The kernels are compiled again, for these tests alone; no Python runs in them.
"""

import concurrent.futures
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
# The flags of setup.py; other processors compile these files without any, to nothing.
INSTRUCTIONS = {
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
}
ADDRESSES = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RACES = ["-O0", "-fsanitize=thread"]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="processors are counted as Linux does"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the sources"),
]


def run(program, *arguments, **environment):
    """The program's output; whatever it or its sanitizer has to say against it fails the test."""
    environment |= {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    done = subprocess.run(
        [program, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this thread sanitizer does not know this kernel's address layout")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runtime error" not in done.stderr
    assert "WARNING" not in done.stderr
    return done.stdout


def compile_with(sanitizer, place):
    """Compiles the kernels and `fuzz.cc`, each with its own flags."""
    probe = place / "probe.cc"
    probe.write_text("int main() {}")
    if compiled(probe, place / "probe", sanitizer, check=False).returncode:
        pytest.skip(f"{COMPILER} has no {sanitizer[1]}")
    sources = [s for s in sorted((ROOT / "csrc").glob("*.cc")) if s.stem != "module"]
    sources.append(ROOT / "tests" / "kernel" / "fuzz.cc")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda s: compiled(s, place / f"{s.stem}.o", [*sanitizer, "-c"]), sources))
    objects = [place / f"{source.stem}.o" for source in sources]
    compiled(*objects, place / "fuzz", sanitizer)
    return place / "fuzz"


def compiled(*files_and_flags, check=True):
    *files, made, flags = files_and_flags
    if platform.machine() == "x86_64":
        flags = [*flags, *INSTRUCTIONS.get(files[0].stem, []) * (files[0].suffix == ".cc")]
        if files[0].stem == "isa_avx512" and "avx512vl" not in cpu_flags():
            flags = ["-O0", *(f for f in flags if not f.startswith(("-f", "-O")))]  # never runs
    command = [COMPILER, "-std=c++17", "-g1", "-pthread", f"-I{ROOT / 'csrc'}", *flags]
    done = subprocess.run([*command, *files, "-o", made], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def cpu_flags():
    return pathlib.Path("/proc/cpuinfo").read_text()


@pytest.fixture(scope="module")
def watching_addresses(tmp_path_factory):
    return compile_with(ADDRESSES, tmp_path_factory.mktemp("addresses"))


@pytest.fixture(scope="module")
def watching_races(tmp_path_factory):
    return compile_with(RACES, tmp_path_factory.mktemp("races"))


def test_ten_thousand_random_and_corrupted_structures_never_leave_their_arrays(watching_addresses):
    said = run(watching_addresses, "fuzz", 10_000)
    right, refused, harmless = (int(part.split()[-1]) for part in said.split(","))
    assert right == 5000
    assert refused + harmless == 5000
    assert refused > harmless > 100  # a permuted column, another offset inside its block


def test_a_forked_child_computes_whatever_the_parent_is_doing(watching_addresses):
    run(watching_addresses, "forks")


def test_work_stays_within_the_affinity_mask(watching_addresses):
    run(watching_addresses, "affinity")


def test_environment_limits_threads(watching_addresses):
    run(watching_addresses, "limit", SPARSEJAX_NUM_THREADS="1")


def test_threads_sleep_when_nothing_runs(watching_addresses):
    run(watching_addresses, "idle")


def test_concurrent_calls_do_not_race_and_agree_to_the_bit(watching_races):
    run(watching_races, "concurrent", 5)
