"""Small integers with a scale: against their formula in NumPy, and in training."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from quickly import as_shipped
from same_bits import assert_same_bits

import sparsejax as sj
from sparsejax import dynamic, filters, quantization, schedules

pytestmark = pytest.mark.usefixtures("quickly")

KEPT = np.random.default_rng(1).random((24, 16)) < 0.3
W = np.where(KEPT, np.random.default_rng(0).normal(size=KEPT.shape), 0).astype(np.float32)
PARAMS = {"b": np.arange(16, dtype=np.float32), "w": W, "steps": np.int32(3), "none": None}
ONE_SCALE = functools.partial(quantization.quantize, axes=())


def by_hand(w, bits, axes):
    """Codes, scales and values by the formula, in float32."""
    others = tuple(axis for axis in range(w.ndim) if axis not in axes)
    largest, top = np.max(np.abs(w), axis=others, keepdims=True), 2 ** (bits - 1) - 1
    scale = np.where(largest == 0, np.float32(1), largest * np.float32(1 / (top + 0.5)))
    codes = np.clip(np.rint(w / scale), -top, top)
    return codes, scale, np.float32(codes) * scale


# Rounding


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_and_scales_are_those_of_the_formula(bits, axes):
    codes, scale, values = by_hand(W, bits, axes)
    found = quantization.quantize(PARAMS, bits=bits, axes=axes)
    np.testing.assert_array_equal(np.int32(found["w"].qvalue), codes)
    np.testing.assert_array_equal(found["w"].scale, scale)
    np.testing.assert_array_equal(quantization.dequantize(found)["w"], values)
    assert found["w"].qvalue.dtype == (jnp.int4 if bits <= 4 else jnp.int8)


@pytest.mark.parametrize("axes", [(), (0,), (1,)])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_are_qwixs_but_for_its_least_one(bits, axes):
    kind = {4: jnp.int4, 8: jnp.int8}.get(bits, f"int{bits}")
    theirs = qwix.quantize(jnp.asarray(W), kind, channelwise_axes=axes)
    ours = quantization.quantize(PARAMS, bits=bits, axes=axes)["w"]
    top = 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(
        np.int32(ours.qvalue), np.clip(np.int32(theirs.qvalue), -top, top)
    )
    np.testing.assert_allclose(ours.scale, theirs.scale, rtol=1e-6)


def test_axes_count_from_the_end_and_the_last_is_the_default():
    assert_same_bits(
        quantization.quantize(PARAMS), quantization.quantize(PARAMS, axes=(-1,), bits=8)
    )
    assert quantization.quantize(PARAMS)["w"].scale.shape == (1, 16)
    assert quantization.quantize(PARAMS, axes=-2)["w"].scale.shape == (24, 1)


def test_no_entry_moves_by_more_than_half_a_scale():
    found = ONE_SCALE(PARAMS, bits=4)
    moved = np.abs(quantization.dequantize(found)["w"] - W)
    assert moved.max() <= float(found["w"].scale[0, 0]) * (0.5 + 1e-6)


def test_zeros_stay_zeros_and_what_vanishes_is_counted():
    found = ONE_SCALE(PARAMS, bits=4)
    values = np.asarray(quantization.dequantize(found)["w"])
    assert not values[~KEPT].any()
    assert not np.signbit(values[values == 0]).any()
    vanished = int(np.count_nonzero(KEPT & (values == 0)))
    change = quantization.measure(PARAMS, found)["w"]
    assert change.vanished == vanished > 0
    assert change.nonzeros == KEPT.sum()
    np.testing.assert_array_equal(quantization.masks(found)["w"], values != 0)


def test_measure_is_that_of_the_difference():
    found = ONE_SCALE(PARAMS, bits=4)
    changes = quantization.measure(PARAMS, found)
    moved = np.float64(by_hand(W, 4, ())[2]) - W
    assert list(changes) == ["w"]
    assert changes["w"].largest == np.abs(moved).max()
    np.testing.assert_allclose(
        changes["w"].relative, np.linalg.norm(moved) / np.linalg.norm(np.float64(W)), rtol=1e-12
    )


def test_other_leaves_pass_as_they_are():
    found = quantization.quantize(PARAMS)
    assert found["b"] is PARAMS["b"]
    assert found["steps"] is PARAMS["steps"]
    assert found["none"] is None
    assert quantization.dequantize(found)["b"] is PARAMS["b"]


@pytest.mark.parametrize("code", [quantization.quantize, quantization.share])
@pytest.mark.parametrize(
    "again", [quantization.quantize, quantization.fake_quantize, quantization.share]
)
def test_coded_leaves_pass_as_they_are(code, again):
    coded = code({"w": nnx.Param(jnp.asarray(W))})
    both = {"net": coded, "w": W}
    found = again(both)
    assert_same_bits(found["net"], coded)
    assert_same_bits(found["w"], again({"w": W})["w"])
    assert_same_bits(again(coded), coded)


def test_biases_are_quantized_beside_shared_weights():
    shared = quantization.share(PARAMS)
    found = quantization.quantize(shared, axes=(), quantizable=filters.by_path("b"))
    assert found["w"] is shared["w"]
    assert found["b"].qvalue.dtype == jnp.int8


def test_masks_of_the_params_fit_beside_coded_leaves():
    params, masks = {"v": W, "w": W}, {"v": np.array(True), "w": KEPT}
    one = quantization.share(params, quantizable=filters.by_path("v"))
    assert_same_bits(quantization.share(one, masks)["w"], quantization.share(params, masks)["w"])


def test_what_is_pruned_may_be_nan():
    masks = {"w": KEPT}
    found = quantization.share({"w": np.where(KEPT, W, np.nan)}, masks)
    assert_same_bits(found, quantization.share({"w": W}, masks))


def test_bits_and_leaves_by_functions():
    params = {"bias": W[0], "first": W, "second": W}
    found = quantization.quantize(
        params,
        bits=lambda path, leaf: 8 if path == "bias" else {"first": 4, "second": 3}[path],
        axes=(),
        quantizable=filters.floating,
    )
    ranges = {path: int(jnp.abs(leaf.qvalue.astype(int)).max()) for path, leaf in found.items()}
    assert ranges == {"bias": 127, "first": 7, "second": 3}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_in_float32(dtype):
    w = jnp.asarray(W * 1e-3, dtype)  # where float16's scales are too small for qwix alone
    found = ONE_SCALE({"w": w}, bits=8)
    scale = np.float32(found["w"].scale)
    np.testing.assert_allclose(scale, np.abs(np.float32(w)).max() / 127.5, rtol=0.004)
    codes = np.clip(np.rint(np.float32(w) / scale), -127, 127)
    np.testing.assert_array_equal(np.int32(found["w"].qvalue), codes)
    values = quantization.dequantize(found)["w"]
    assert values.dtype == dtype
    assert np.abs(np.float32(values) - np.float32(w)).max() < 0.8 * float(found["w"].scale[0, 0])


@pytest.mark.parametrize(("bits", "most"), [(4, 0.54), (8, 0.94)])
def test_bfloat16_moves_by_more_than_half_a_scale(bits, most):
    largest = 1 + np.arange(128) / 128  # all that bfloat16 has from 1 to 2
    w = jnp.asarray(np.linspace(0, 1, 601)[:, None] * largest, jnp.bfloat16)
    found = quantization.quantize({"w": w}, bits=bits)["w"]
    moved = np.abs(np.float32(quantization.dequantize(found)) - np.float32(w))
    assert most - 0.02 < (moved / np.float32(found.scale)).max() < most


def test_a_leaf_of_zeros_an_empty_one_and_one_without_axes():
    params = {"zeros": jnp.zeros((2, 3)), "empty": jnp.zeros((0, 3)), "number": jnp.float32(-6.0)}
    found = ONE_SCALE(params, quantizable=filters.floating)
    assert found["empty"] is params["empty"]
    values = quantization.dequantize(found)
    np.testing.assert_array_equal(values["zeros"], params["zeros"])
    np.testing.assert_allclose(values["number"], -6.0, rtol=0.005)


def test_it_is_the_same_jitted():
    def both(params):
        return quantization.quantize(params, bits=4), quantization.fake_quantize(params, bits=4)

    params = {"w": W}
    for _ in range(3):  # of different scales
        assert_same_bits(as_shipped(both)(params), both(params))
        params = {"w": params["w"] * np.float32(1.7)}
    abstract = jax.eval_shape(both, params)
    assert abstract[0]["w"].qvalue.shape == W.shape


def test_nan_under_jit_stays_with_those_that_share_its_scale():
    w = W.copy()
    w[3, 2] = np.nan
    values = jax.jit(lambda w: quantization.dequantize(quantization.quantize({"w": w})))(w)["w"]
    assert np.isnan(values[:, 2]).all()
    assert np.isfinite(np.delete(values, 2, axis=1)).all()


def test_qwix_multiplies_by_a_quantized_leaf():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 24)), jnp.float32)
    found = quantization.quantize(PARAMS)
    got = qwix.dot_general(x, found["w"], (((1,), (0,)), ((), ())))
    expected = x @ quantization.dequantize(found)["w"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_without_qwix_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsejax\[quantization\]'"):
        quantization.quantize(PARAMS)
    shared = quantization.share(PARAMS)
    assert quantization.dequantize(shared)["w"].shape == W.shape


# In training


def test_fake_quantize_is_the_quantized_tree_bit_for_bit_with_the_gradient_of_the_identity():
    params = {"w": jnp.asarray(W)}
    rounded = quantization.dequantize(quantization.quantize(params, bits=4))
    assert_same_bits(quantization.fake_quantize(params, bits=4), rounded)

    def loss(params):
        return jnp.sum(jnp.sin(params["w"]))

    grads = jax.grad(lambda params: loss(quantization.fake_quantize(params, bits=4)))(params)
    assert_same_bits(grads, jax.grad(loss)(rounded))
    direction = {"w": jnp.ones_like(params["w"])}
    _, forward = jax.jvp(lambda p: quantization.fake_quantize(p, bits=4), (params,), (direction,))
    assert_same_bits(forward, direction)


def regression():
    """A loss whose inputs are correlated, so that errors of rounding can make up for each other."""
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(64, 6)) @ rng.normal(size=(6, 24)) / 3
    x = jnp.asarray(mixed + 0.1 * rng.normal(size=(64, 24)), jnp.float32)
    y = x @ jnp.asarray(rng.normal(size=(24, 16)) * KEPT, jnp.float32)
    return lambda params: jnp.mean((x @ params["w"] - y) ** 2)


def trained(tx, loss, steps):
    params = {"w": jnp.asarray(np.random.default_rng(4).normal(size=W.shape), jnp.float32) * 0.1}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])((params, tx.init(params)))


def test_training_with_it_beats_rounding_afterwards_and_keeps_the_masks():
    loss, bits = regression(), 3
    learning_rate = optax.cosine_decay_schedule(0.05, 300)
    tx = sj.keep_masks(optax.adam(learning_rate), {"w": jnp.asarray(KEPT)})
    plain, _ = trained(tx, loss, 300)
    aware, _ = trained(tx, lambda p: loss(quantization.fake_quantize(p, bits=bits)), 300)
    after, during = (
        quantization.dequantize(quantization.quantize(params, bits=bits))
        for params in (plain, aware)
    )
    assert float(loss(during)) < 0.8 * float(loss(after))
    assert not np.asarray(during["w"])[~KEPT].any()


def test_it_works_while_gradual_prunes():
    loss = regression()
    tx = dynamic.gradual(optax.adam(0.02), schedules.cubic(0.0, 0.75, 0, 60), every=10)
    params, state = trained(tx, lambda p: loss(quantization.fake_quantize(p, bits=4)), 80)
    mask = np.asarray(dynamic.masks(state)["w"])
    assert np.count_nonzero(~mask) == 0.75 * mask.size
    values = quantization.dequantize(quantization.quantize(params, bits=4))
    assert not np.asarray(values["w"])[~mask].any()


# Errors

BAD = {
    "bits of a float": (
        lambda: quantization.quantize(PARAMS, bits=4.0),
        TypeError,
        r"`bits` .*4\.0",
    ),
    "bits too few": (
        lambda: quantization.quantize(PARAMS, bits=1),
        ValueError,
        r"`bits`.* 2 to 8, got 1",
    ),
    "bits too many": (
        lambda: quantization.share(PARAMS, bits=9),
        ValueError,
        r"1 to 8, got 9 at 'w'",
    ),
    "bits of a function": (
        lambda: quantization.quantize(PARAMS, bits=lambda path, leaf: None),
        TypeError,
        r"`bits` .*None at 'w'",
    ),
    "axes beyond": (lambda: quantization.quantize(PARAMS, axes=2), ValueError, r"`axes` .*At 'w'"),
    "axes of a word": (lambda: quantization.quantize(PARAMS, axes="last"), TypeError, r"`axes`"),
    "nothing chosen": (
        lambda: quantization.quantize({"b": W[0]}),
        ValueError,
        r"`quantizable` must select .*'b' float32\[16\]",
    ),
    "a filter that is none": (
        lambda: quantization.share(PARAMS, quantizable="w"),
        TypeError,
        r"`quantizable` must be a function",
    ),
    "complex": (
        lambda: quantization.quantize({"w": W * 1j}, quantizable=lambda path, leaf: True),
        TypeError,
        r"`quantizable` must select real numbers, got complex64\[24,16\] at 'w'",
    ),
    "integers": (
        lambda: quantization.share({"w": np.ones((2, 2), int)}, quantizable=lambda *_: True),
        TypeError,
        r"`quantizable` must select floating",
    ),
    "NaN": (
        lambda: quantization.quantize({"net": {"w": np.where(KEPT, np.nan, W)}}),
        ValueError,
        rf"`params` must be finite .*: {KEPT.sum()} of 384 .*'net\.w'",
    ),
    "infinity": (
        lambda: quantization.share({"w": np.array([[1.0, np.inf]])}),
        ValueError,
        r"1 of 2 entries are not, at 'w'",
    ),
    "share under jit": (
        lambda: jax.jit(quantization.share)({"w": W}),
        TypeError,
        r"`params` must have values, got an abstract float32\[24,16\] at 'w'",
    ),
    "masks of another shape": (
        lambda: quantization.share({"w": W}, {"w": KEPT.T}),
        ValueError,
        r"`masks` must broadcast .*'w'",
    ),
    "measure of another tree": (
        lambda: quantization.measure({"v": W}, quantization.share({"w": W})),
        ValueError,
        r"`quantized` must have the structure of `params`",
    ),
    "measure of a tree with another leaf": (
        lambda: quantization.measure({"w": W}, {**quantization.share({"w": W}), "b": W[0]}),
        ValueError,
        r"`quantized` must have the structure of `params`.*'b'",
    ),
    "measure of a tree without a leaf": (
        lambda: quantization.measure({"b": W[0], "w": W}, quantization.share({"w": W})),
        ValueError,
        r"`quantized` must have the structure of `params`.*'b'",
    ),
    "NaN that is kept": (
        lambda: quantization.share({"w": np.where(KEPT, np.nan, W)}, {"w": KEPT}),
        ValueError,
        rf"`params` must be finite .*: {KEPT.sum()} of 384 .*'w'",
    ),
    "measure of another shape": (
        lambda: quantization.measure({"w": W.T}, quantization.share({"w": W})),
        ValueError,
        r"`quantized` must have the shapes of `params`: at 'w'",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_says_what_is_wrong_and_where(case):
    call, error, pattern = BAD[case]
    with pytest.raises(error, match=pattern):
        call()
