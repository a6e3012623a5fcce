"""`criteria.mean_gradients` against the gradient on all batches together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import criteria

RNG = np.random.default_rng(0)
PARAMS = {
    "b": jnp.asarray(RNG.normal(size=3).astype(np.float32)),
    "w": jnp.asarray(RNG.normal(size=(4, 3)).astype(np.float32)),
}
BATCHES = RNG.normal(size=(5, 8, 4)).astype(np.float32)


def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)


GRAD = jax.jit(jax.grad(loss))


@functools.cache
def whole():
    """The gradient on all examples at once."""
    return jax.tree.map(np.asarray, GRAD(PARAMS, jnp.asarray(BATCHES.reshape(-1, 4))))


def returned(*grads):
    """A `grad_fn` that gives one gradient after the other, whatever the params are."""
    rows = list(grads)
    return (lambda params, i: rows[i]), range(len(rows))


BATCHES_AS = {
    "list": lambda: list(BATCHES),
    "tuple": lambda: tuple(BATCHES),
    "generator": lambda: (batch for batch in BATCHES),
    "numpy array": lambda: BATCHES,
    "jax array": lambda: jnp.asarray(BATCHES),
}


@pytest.mark.parametrize("kind", BATCHES_AS)
def test_mean_gradients_is_the_gradient_on_all_batches_together(kind):
    mean = criteria.mean_gradients(GRAD, PARAMS, BATCHES_AS[kind]())
    assert mean.keys() == PARAMS.keys()
    for name, expected in whole().items():
        np.testing.assert_allclose(mean[name], expected, rtol=1e-5, atol=1e-7)


def test_mean_gradients_works_inside_jit():
    mean = jax.jit(lambda p, b: criteria.mean_gradients(jax.grad(loss), p, b))(PARAMS, BATCHES)
    for name, expected in whole().items():
        np.testing.assert_allclose(mean[name], expected, rtol=1e-5, atol=1e-7)


def test_mean_gradients_of_one_batch_is_its_gradient_bit_for_bit():
    mean, grads = criteria.mean_gradients(GRAD, PARAMS, BATCHES[:1]), GRAD(PARAMS, BATCHES[0])
    for name in PARAMS:
        np.testing.assert_array_equal(mean[name], grads[name])


def test_mean_gradients_passes_batches_that_are_trees():
    def grad_fn(params, batch):
        return {"w": batch["x"] + batch["y"]}

    batches = [{"x": jnp.full(2, i), "y": jnp.full(2, 10.0)} for i in (1.0, 5.0)]
    assert criteria.mean_gradients(grad_fn, None, batches)["w"].tolist() == [13.0, 13.0]


def test_mean_gradients_passes_params_on():
    mean = criteria.mean_gradients(lambda params, batch: params * batch, jnp.ones(2), [2.0, 4.0])
    assert mean.tolist() == [3.0, 3.0]


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=20))
def test_mean_gradients_of_integers_is_their_mean(values):
    grad_fn, batches = returned(*(jnp.full(1, v, jnp.float32) for v in values))
    mean = float(criteria.mean_gradients(grad_fn, None, batches)[0])
    assert mean == np.float32(sum(values)) / np.float32(len(values))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mean_gradients_of_half_precision_is_float32(dtype):
    grad_fn, batches = returned(jnp.ones(2, dtype), jnp.ones(2, dtype))
    assert criteria.mean_gradients(grad_fn, None, batches).dtype == jnp.float32


def test_mean_gradients_of_one_bfloat16_batch_is_float32():
    grad_fn, batches = returned(jnp.ones(2, jnp.bfloat16))
    assert criteria.mean_gradients(grad_fn, None, batches).dtype == jnp.float32


def test_mean_gradients_does_not_lose_small_bfloat16_gradients():
    # In bfloat16, with 8 bits, 256 + 1 is 256.
    values = [256.0] + [1.0] * 255
    grad_fn, batches = returned(*(jnp.full(1, v, jnp.bfloat16) for v in values))
    assert float(criteria.mean_gradients(grad_fn, None, batches)[0]) == sum(values) / 256


def test_mean_gradients_keeps_leaves_without_gradient():
    grad_fn, batches = returned({"w": jnp.ones(1), "n": None}, {"w": jnp.zeros(1), "n": None})
    mean = criteria.mean_gradients(grad_fn, None, batches)
    assert mean == {"w": jnp.array([0.5]), "n": None}


def test_mean_gradients_keeps_float0_of_the_first_batch():
    params = {"n": jnp.arange(2), "w": jnp.ones(2)}
    grad_fn = jax.grad(lambda p, x: jnp.sum(p["w"] * x), allow_int=True)
    mean = criteria.mean_gradients(grad_fn, params, [1.0, 3.0])
    assert mean["n"].dtype == jax.dtypes.float0
    assert mean["w"].tolist() == [2.0, 2.0]


def test_mean_gradients_of_complex_numbers_is_complex():
    grad_fn, batches = returned(jnp.array([1 + 2j]), jnp.array([3 - 4j]))
    assert criteria.mean_gradients(grad_fn, None, batches).tolist() == [2 - 1j]


def test_mean_gradients_shows_nan():
    grad_fn, batches = returned(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 1.0]))
    assert np.isnan(criteria.mean_gradients(grad_fn, None, batches)).tolist() == [False, True]


def test_mean_gradients_cancels_signs_unless_the_function_takes_absolute_values():
    grad_fn, batches = returned(jnp.ones(1), -jnp.ones(1))
    assert float(criteria.mean_gradients(grad_fn, None, batches)[0]) == 0
    absolute = criteria.mean_gradients(lambda p, i: jnp.abs(grad_fn(p, i)), None, batches)
    assert float(absolute[0]) == 1


def test_mean_gradients_reads_each_batch_once():
    seen = []
    criteria.mean_gradients(lambda p, i: seen.append(i) or jnp.ones(1), None, iter(range(4)))
    assert seen == [0, 1, 2, 3]


ONE = jnp.ones(1)
ERRORS = {
    "a gradient instead of a function": (
        lambda: criteria.mean_gradients(ONE, PARAMS, BATCHES),
        TypeError,
        r"`grad_fn` must be a function \(params, batch\) -> grads, got .*jax\.grad\(loss\)",
    ),
    "batches that are none": (
        lambda: criteria.mean_gradients(GRAD, PARAMS, 3),
        TypeError,
        r"`batches` must be a list or .*, got 3",
    ),
    "no batch": (
        lambda: criteria.mean_gradients(GRAD, PARAMS, []),
        ValueError,
        r"`batches` must hold at least one batch, got none",
    ),
    "a generator that is used up": (
        lambda: criteria.mean_gradients(GRAD, PARAMS, iter(())),
        ValueError,
        r"`batches` must hold at least one batch, got none",
    ),
    "another structure": (
        lambda: criteria.mean_gradients(*_swapped({"a": {"w": ONE}}, {"a": {"v": ONE}})),
        ValueError,
        r"`grads` must have the structure of .*'a\.w'",
    ),
    "another shape": (
        lambda: criteria.mean_gradients(*_swapped({"a": {"w": ONE}}, {"a": {"w": jnp.ones(2)}})),
        ValueError,
        r"`grads` must have the shapes of .*at 'a\.w' it is float32\[2\].*float32\[1\]",
    ),
}


def _swapped(*grads):
    grad_fn, batches = returned(*grads)
    return grad_fn, None, batches


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "pattern"), ERRORS.values(), ids=ERRORS)
def test_mean_gradients_refuses(call, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}"):
        call()


@pytest.mark.usefixtures("as_users_have_it")
def test_mean_gradients_refuses_a_missing_gradient_of_a_later_batch():
    grad_fn, batches = returned({"w": ONE}, {"w": None})
    with pytest.raises(ValueError, match=r"`grads` .*'w'"):
        criteria.mean_gradients(grad_fn, None, batches)
