"""Numbers of more than 31 bits in two int32 halves, against Python's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import _counts

MOST = _counts.LIMIT - 1
numbers = st.integers(0, MOST)
# Neighbours of powers of two, where the halves carry and borrow.
edges = st.builds(lambda bits, near: max(2**bits + near, 0), st.integers(0, 46), st.integers(-1, 1))
some_numbers = numbers | edges


def wide(n):
    """Halves that JAX adds, not Python."""
    return _counts.map_halves(jnp.asarray, _counts.wide(n))


def as_ints(count):
    return np.asarray(count.high, np.int64) * 2**24 + np.asarray(count.low, np.int64)


@given(some_numbers)
def test_wide_holds_an_int(n):
    assert as_ints(_counts.wide(n)) == n


@given(st.integers(0, 2**31 - 1))
def test_wide_holds_an_array(n):
    assert as_ints(_counts.wide(jnp.int32(n))) == n


@given(some_numbers, some_numbers)
def test_add_is_that_of_python(a, b):
    a, b = a // 2, b // 2
    assert as_ints(_counts.add(wide(a), wide(b))) == a + b


@given(some_numbers, some_numbers)
def test_subtract_is_that_of_python(a, b):
    less, more = sorted((a, b))
    assert as_ints(_counts.subtract(wide(more), wide(less))) == more - less


@given(some_numbers, st.integers(-2, 2) | st.integers(-MOST, MOST))
def test_at_least_and_equal_are_those_of_python(a, difference):
    b = min(max(a + difference, 0), MOST)
    assert bool(_counts.at_least(wide(a), wide(b))) == (a >= b)
    assert bool(_counts.equal(wide(a), wide(b))) == (a == b)


@given(some_numbers, some_numbers)
def test_clip_is_the_minimum(a, n):
    assert as_ints(_counts.clip(wide(a), n)) == min(a, n)


@given(some_numbers, some_numbers)
def test_distance_is_the_nearest_float32(a, b):
    assert float(_counts.distance(wide(a), wide(b))) == np.float32(a - b)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=12, max_size=12))
def test_total_is_the_sum(parts):
    assert as_ints(_counts.total(jnp.array(parts, jnp.int32).reshape(3, 4))) == sum(parts)


def test_total_of_many_exceeds_32_bits():
    parts = jnp.full((100, 1_000), 2**31 - 1, jnp.int32)
    assert as_ints(_counts.total(parts)) == 100_000 * (2**31 - 1)


def sparsities_around_halves(n):
    """Float32 sparsities in [0, 1), most of them where sparsity * n is close to k + 1/2."""
    rng = np.random.default_rng(n % 2**32)
    halves = (rng.integers(0, max(n, 1), 2_000) + 0.5) / max(n, 1)
    some = np.concatenate(
        [
            halves,
            rng.uniform(size=500),
            np.arange(64) / 64,
            2.0 ** -rng.uniform(0, 140, 500),
            [1e-45, 1e-38, 2**-26, 2**-25, 1e-9],
        ]
    ).astype(np.float32)
    near = np.concatenate([some, np.nextafter(some, np.float32(0)), np.nextafter(some, 1)])
    return near[near < 1].astype(np.float32)


SMALL = [0, 1, 2, 3, 10, 36, 1_876, 266_200, 2**24 - 1, 2**24, 2**24 + 1, 2**30 + 1, 2**31 - 1]
LARGE = [2**31, 2**32 + 7, 5 * 10**9 + 3, 2**40 - 1, 2**47 + 12_345, 2**48 - 1]


@pytest.mark.parametrize("n", SMALL + LARGE)
def test_rounded_product_is_that_of_python(n):
    sparsities = sparsities_around_halves(n)
    got = jax.jit(jax.vmap(lambda s: _counts.rounded_product(s, n)))(sparsities)
    np.testing.assert_array_equal(as_ints(got), [round(float(s) * n) for s in sparsities])


def test_rounded_product_of_more_than_53_bits_rounds_twice_as_python_does():
    # m * n ends in 0.5 - 2^-24, which float64 rounds to 0.5, and that to the even number above.
    m, n = 2**24 - 3, 1_093_315_243
    sparsity = np.float32(m / 2**24)
    got = jax.jit(lambda s: _counts.rounded_product(s, n))(sparsity)
    assert as_ints(got) == round(float(sparsity) * n) != round(m * n / 2**24 - 2**-20)
