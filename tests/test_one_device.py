"""Selection in a process with one CPU device, where it counts in another way than elsewhere.

Run as a script, this file does the work and prints what it found.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparsejax import selection

# Sizes with divisors for lanes, with few and with none.
SIZES = {"power of two": 2**16, "odd": 300_007, "prime": 65_537, "small": 2**15 - 1}
DTYPES = dict(zip(("float32", "bfloat16", "float16"), oracles.FLOATS, strict=True))


def scores(size, dtype, *, seed=0):
    """Normal values of two digits, so that many tie, and a few awkward ones."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=size).round(2).astype(dtype)
    some = oracles.awkward(np.dtype(dtype))
    values[rng.choice(size, len(some), replace=False)] = some
    return values


def equal_masks(arrays, keep):
    got = selection.keep_largest([jnp.asarray(a) for a in arrays], keep)
    expected = oracles.keep_largest(arrays, keep)
    return all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def masks_are_those_of_a_sort(size):
    array = scores(size, np.float32)
    return all(equal_masks([array], keep) for keep in (0, 1, size // 10, size - 1, size))


def masks_of_dtypes_are_those_of_a_sort(dtype):
    return equal_masks([scores(2**15, dtype).reshape(64, 512)], 12_345)


def masks_of_a_tree_are_those_of_a_sort():
    arrays = [scores(s, d, seed=s) for s, d in zip(SIZES.values(), DTYPES.values(), strict=False)]
    return equal_masks([*arrays, scores(2**16, np.float32, seed=9)], 54_321)


def masks_of_each_are_those_of_a_sort():
    arrays = [scores(s, np.float32, seed=s) for s in SIZES.values()]
    keep = [a.size // 7 for a in arrays]
    got = selection.keep_largest_each([jnp.asarray(a) for a in arrays], keep)
    expected = [oracles.keep_largest([a], k)[0] for a, k in zip(arrays, keep, strict=True)]
    return all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def kth_largest_is_that_of_a_sort():
    array = scores(65_537, np.float32)
    descending = -np.sort(-array)
    ks = (1, 100, 6_553, 32_768, 65_000)
    found = [float(selection.kth_largest([jnp.asarray(array)], k)) for k in ks]
    return found == descending[np.array(ks) - 1].tolist()


def masks_under_vmap_are_those_of_a_sort():
    array = scores(2**17, np.float32).reshape(2, 2**16)
    got = jax.vmap(lambda row: selection.keep_largest([row], 999)[0])(jnp.asarray(array))
    return np.array_equal(got, [oracles.keep_largest([row], 999)[0] for row in array])


def scratch(select, size=2**20):
    """The bytes that a compiled selection needs beside the scores, in those of the scores."""
    shape = jax.ShapeDtypeStruct((size,), jnp.float32)
    compiled = jax.jit(lambda s: select([s], size // 10)).lower(shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * size)


def report():
    assert jax.device_count() == 1 and jax.default_backend() == "cpu"
    found = {f"size {name}": masks_are_those_of_a_sort(size) for name, size in SIZES.items()}
    found |= {f"dtype {n}": masks_of_dtypes_are_those_of_a_sort(d) for n, d in DTYPES.items()}
    found |= {
        "tree": masks_of_a_tree_are_those_of_a_sort(),
        "each": masks_of_each_are_those_of_a_sort(),
        "kth": kth_largest_is_that_of_a_sort(),
        "vmap": masks_under_vmap_are_those_of_a_sort(),
        "scratch of masks": scratch(selection.keep_largest),
        "scratch of kth": scratch(selection.kth_largest),
    }
    return found


@pytest.fixture(scope="module")
def found():
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "error", __file__],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("size", SIZES)
def test_keep_largest_on_one_cpu_equals_a_stable_sort(found, size):
    assert found[f"size {size}"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_largest_on_one_cpu_takes_any_dtype(found, dtype):
    assert found[f"dtype {dtype}"]


def test_keep_largest_on_one_cpu_takes_many_arrays(found):
    assert found["tree"]


def test_keep_largest_each_on_one_cpu_equals_a_stable_sort(found):
    assert found["each"]


def test_kth_largest_on_one_cpu_equals_a_sort(found):
    assert found["kth"]


def test_keep_largest_on_one_cpu_maps_over_scores(found):
    assert found["vmap"]


def test_keep_largest_on_one_cpu_copies_no_scores(found):
    assert found["scratch of masks"] < 0.1


def test_kth_largest_on_one_cpu_copies_no_scores(found):
    assert found["scratch of kth"] < 0.1


if __name__ == "__main__":
    print(json.dumps(report()))
