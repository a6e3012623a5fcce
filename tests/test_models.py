import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import models

# name: (class, smallest side, parameters at 28x28x1 with ten classes)
MODELS = {
    "cnn": (models.CNN, 10, 320 + 18_496 + 160_100 + 1_010),
    "lenet300100": (models.LeNet300100, 1, 235_500 + 30_100 + 1_010),
    "lenet5caffe": (models.LeNet5Caffe, 16, 520 + 25_050 + 400_500 + 5_010),
}
each_model = pytest.mark.parametrize(
    ("cls", "smallest", "count"), MODELS.values(), ids=MODELS.keys()
)
convolutional = pytest.mark.parametrize(
    ("cls", "smallest"),
    [(models.CNN, 10), (models.LeNet5Caffe, 16)],
    ids=["cnn", "lenet5caffe"],
)


@functools.cache
def built(cls, input_shape=(28, 28, 1)):
    """A model that no test changes."""
    return cls(input_shape, rngs=nnx.Rngs(0))


def taken_apart(cls, input_shape=(28, 28, 1)):
    return models.functional(built(cls, input_shape))


def abstract(cls):
    """A model of shapes, without any weights drawn."""
    return nnx.eval_shape(lambda: cls(rngs=nnx.Rngs(0)))


def shapes(cls):
    """The parameters' shapes by path."""
    state = nnx.state(abstract(cls), nnx.Param)
    return {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(state)}


def digits(batch, input_shape=(28, 28, 1), seed=0):
    """Noise on a black background, as wide as that of MNIST: its pixels tie wherever pools look."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(batch, *input_shape)).astype(np.float32)
    rows, columns = (max(1, side // 7) for side in input_shape[:2])
    x[:, :rows] = x[:, -rows:] = 0
    x[:, :, :columns] = x[:, :, -columns:] = 0
    return jnp.asarray(x)


def cross_entropy(apply, params, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).mean()


def assert_trees_close(got, expected, rtol):
    """`rtol` is relative to the largest entry of each leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.abs(b).max()))


# ---- the networks


@each_model
def test_model_has_the_parameters_of_the_papers(cls, smallest, count):
    assert sum(map(math.prod, shapes(cls).values())) == count


def test_model_counts_are_those_published():
    assert [count for _, _, count in MODELS.values()] == [179_926, 266_610, 431_080]


def test_lenet_weights_without_biases_are_those_of_han():
    for cls, weights in ((models.LeNet300100, 266_200), (models.LeNet5Caffe, 430_500)):
        assert sum(math.prod(shape) for shape in shapes(cls).values() if len(shape) > 1) == weights


def test_cnn_layers_have_the_documented_names_and_shapes():
    assert shapes(models.CNN) == {
        "conv1.bias": (32,),
        "conv1.kernel": (3, 3, 1, 32),
        "conv2.bias": (64,),
        "conv2.kernel": (3, 3, 32, 64),
        "dense1.bias": (100,),
        "dense1.kernel": (64 * 5 * 5, 100),
        "dense2.bias": (10,),
        "dense2.kernel": (100, 10),
    }


@pytest.mark.parametrize("cls", [models.CNN, models.LeNet5Caffe, models.LeNet300100])
@settings(max_examples=15)
@given(
    height=st.integers(10, 40),
    width=st.integers(10, 40),
    channels=st.integers(1, 4),
    classes=st.integers(1, 12),
)
def test_model_takes_any_size_and_channels(cls, height, width, channels, classes):
    if cls is models.LeNet5Caffe:
        height, width = height + 6, width + 6
    shape = (height, width, channels)
    out = jax.eval_shape(
        lambda x: cls(shape, classes, rngs=nnx.Rngs(0))(x),
        jax.ShapeDtypeStruct((3, *shape), jnp.float32),
    )
    assert (out.shape, out.dtype) == ((3, classes), jnp.float32)


@convolutional
def test_model_leaves_one_pixel_of_its_smallest_image(cls, smallest):
    model = nnx.eval_shape(lambda: cls((smallest, smallest, 1), rngs=nnx.Rngs(0)))
    assert model.dense1.kernel.shape[0] == model.conv2.bias.shape[0]


def test_cnn_equals_numpy():
    shape = (11, 14, 2)
    model = models.CNN(shape, 3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for layer in (model.conv1, model.conv2, model.dense1, model.dense2):
        layer.bias[...] = jnp.asarray(rng.normal(size=layer.bias.shape), jnp.float32)
    x = np.asarray(digits(2, shape), np.float64)
    for layer in (model.conv1, model.conv2):
        kernel, bias = np.float64(layer.kernel[...]), np.float64(layer.bias[...])
        patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        x = np.maximum(np.einsum("bhwcij,ijco->bhwo", patches, kernel) + bias, 0)
        b, h, w, c = x.shape
        x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    x = x.reshape(2, -1)
    x = np.maximum(x @ np.float64(model.dense1.kernel[...]) + np.float64(model.dense1.bias[...]), 0)
    x = x @ np.float64(model.dense2.kernel[...]) + np.float64(model.dense2.bias[...])
    got = nnx.jit(lambda model, x: model(x))(model, digits(2, shape))
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)


@convolutional
def test_model_refuses_too_small_images(cls, smallest):
    for shape in ((smallest - 1, 28, 1), (28, smallest - 1, 1)):
        message = (
            rf"`input_shape` must be at least {smallest}x{smallest}, got {shape[0]}x{shape[1]}"
        )
        with pytest.raises(ValueError, match=message):
            cls(shape, rngs=nnx.Rngs(0))


@each_model
@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28, 1), (28, 28, 0), (28, -28, 1)])
def test_model_refuses_what_is_no_image_shape(cls, smallest, count, shape):
    with pytest.raises(
        ValueError, match=r"`input_shape` must be \(height, width, channels\), three"
    ):
        cls(tuple(shape), rngs=nnx.Rngs(0))


@each_model
def test_model_refuses_no_classes(cls, smallest, count):
    with pytest.raises(ValueError, match=r"`num_classes` must be a positive integer, got 0"):
        cls(num_classes=0, rngs=nnx.Rngs(0))


@each_model
@pytest.mark.parametrize(
    "shape", [(28, 28, 1), (2, 28, 28), (2, 28, 28, 3), (2, 32, 32, 1), (2, 784)]
)
def test_model_refuses_other_images_than_its_own(cls, smallest, count, shape):
    model = abstract(cls)
    message = rf"`x` must have shape \(batch, 28, 28, 1\).*got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(shape))


@each_model
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_model_refuses_raw_pixels(cls, smallest, count, dtype):
    with pytest.raises(
        TypeError, match=rf"`x` must be floating point, got {np.dtype(dtype)}; scale"
    ):
        abstract(cls)(np.zeros((2, 28, 28, 1), dtype))


def test_model_takes_an_empty_batch():
    apply, params = taken_apart(models.CNN)
    assert jax.jit(apply)(params, jnp.zeros((0, 28, 28, 1))).shape == (0, 10)


def test_model_takes_numpy_images_of_double_precision():
    model = built(models.CNN)
    x = np.asarray(digits(2))
    np.testing.assert_array_equal(model(x.astype(np.float64)), model(jnp.asarray(x)))


@each_model
def test_model_is_the_same_for_the_same_seed(cls, smallest, count):
    (_, a), (_, b), (_, c) = (models.functional(cls(rngs=nnx.Rngs(seed))) for seed in (0, 0, 1))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(a["dense1"]["kernel"][...], c["dense1"]["kernel"][...])


# ---- functional


@each_model
def test_functional_equals_the_model_for_every_kind_of_params(cls, smallest, count):
    model = built(cls)
    apply, params = models.functional(model)
    x = digits(2)
    expected = model(x)
    for tree in (
        params,
        nnx.as_pure(params),
        nnx.to_pure_dict(params),
        jax.tree.map(jnp.asarray, params),
        jax.tree.map(np.asarray, params),
    ):
        np.testing.assert_array_equal(apply(tree, x), expected)


@each_model
def test_apply_eager_equals_jit(cls, smallest, count):
    # Not bit for bit: compiled as a whole, XLA fuses bias and ReLU and may order the sums of the
    # matrix products otherwise.
    apply, params = taken_apart(cls)
    x = digits(4)
    assert_trees_close(jax.jit(apply)(params, x), apply(params, x), rtol=1e-6)


def test_apply_is_traced_once():
    apply, params = taken_apart(models.LeNet300100)
    traces = []

    @jax.jit
    def loss(params, x):
        traces.append(1)
        return apply(params, x).sum()

    loss(params, digits(2))
    loss(jax.tree.map(lambda w: w * 0.9, params), digits(2, seed=1))
    assert len(traces) == 1


def test_apply_vmaps_over_params_and_images():
    apply, params = taken_apart(models.CNN)
    other = jax.tree.map(lambda w: w + 0.01, params)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, other)
    x = jnp.stack([digits(3), digits(3, seed=1)])
    expected = jnp.stack([apply(params, x[0]), apply(other, x[1])])
    assert_trees_close(jax.jit(jax.vmap(apply))(stacked, x), expected, rtol=1e-5)


@functools.cache
def trained(cls):
    """Losses of a few steps of SGD on twenty images, and the gradient of the last."""
    apply, params = taken_apart(cls)
    x, labels = digits(20), jnp.arange(20) % 10

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(lambda p: cross_entropy(apply, p, x, labels))(params)
        updates = jax.tree.map(lambda g: -0.05 * g, grads)
        return optax.apply_updates(params, updates), value, grads

    losses = []
    for _ in range(12):
        params, value, grads = step(params)
        losses.append(float(value))
    return losses, grads, params


@each_model
def test_model_learns(cls, smallest, count):
    losses, _, _ = trained(cls)
    assert losses[-1] < 0.95 * losses[0]


@each_model
def test_apply_has_finite_gradients_that_look_like_params(cls, smallest, count):
    _, grads, params = trained(cls)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for grad in jax.tree.leaves(grads):
        assert bool(jnp.isfinite(grad).all()) and bool(jnp.any(grad != 0))


@each_model
def test_apply_has_a_shape_without_being_run(cls, smallest, count):
    apply, params = taken_apart(cls)
    out = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.float32))
    assert out.shape == (5, 10)


@pytest.mark.parametrize("params_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_apply_promotes_bfloat16_as_jax_does(params_dtype, x_dtype):
    apply, params = taken_apart(models.CNN)
    x = digits(3)
    got = apply(jax.tree.map(lambda w: w.astype(params_dtype), params), x.astype(x_dtype))
    assert got.dtype == jnp.promote_types(params_dtype, x_dtype)
    np.testing.assert_allclose(np.float32(got), apply(params, x), atol=0.05)


def test_apply_trains_in_bfloat16():
    apply, params = taken_apart(models.CNN)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    x = digits(3).astype(jnp.bfloat16)
    grads = jax.jit(jax.grad(lambda p: cross_entropy(apply, p, x, jnp.arange(3))))(params)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))


def test_apply_takes_params_whose_channels_are_cut():
    apply, params = taken_apart(models.CNN)
    zeroed = nnx.to_pure_dict(params)
    cut = nnx.to_pure_dict(params)
    zeroed["conv1"]["kernel"] = zeroed["conv1"]["kernel"].at[..., 20:].set(0)
    cut["conv1"] = {k: v[..., :20] for k, v in cut["conv1"].items()}
    cut["conv2"]["kernel"] = cut["conv2"]["kernel"][:, :, :20]
    assert_trees_close(apply(cut, digits(2)), apply(zeroed, digits(2)), rtol=1e-5)


def test_functional_shares_nothing_with_the_model():
    model = models.LeNet300100((4, 4, 1), rngs=nnx.Rngs(0))
    apply, params = models.functional(model)
    x = digits(2, (4, 4, 1))
    before = apply(params, x)
    model.dense3.bias[...] = jnp.ones(10)
    np.testing.assert_array_equal(apply(params, x), before)
    params["dense3"]["bias"][...] = jnp.full(10, 2.0)
    np.testing.assert_array_equal(model.dense3.bias[...], jnp.ones(10))


def test_apply_leaves_its_params_alone():
    class Counting(nnx.Module):
        def __init__(self):
            self.calls = nnx.Param(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] = self.calls[...] + 1
            return x * self.calls[...]

    apply, params = models.functional(Counting())
    for _ in range(2):
        assert float(apply(params, jnp.ones(()))) == 1
    assert float(params["calls"][...]) == 0


def test_functional_takes_modules_with_lists():
    class Tower(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(12)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Tower(nnx.Rngs(0))
    apply, params = models.functional(model)
    x = jnp.ones((2, 3))
    for tree in (params, nnx.to_pure_dict(params)):
        np.testing.assert_array_equal(apply(tree, x), model(x))


def test_functional_refuses_state_that_is_no_param():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(
        ValueError, match=r"nnx\.Param, got .*BatchStat at 'norm\.mean'.*nnx\.split"
    ):
        models.functional(Normed(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"RngKey at 'drop\.rngs\.key'"):
        models.functional(Normed(nnx.Rngs(0)))


def test_apply_refuses_params_of_another_structure():
    apply, params = models.functional(models.LeNet300100((4, 4, 1), rngs=nnx.Rngs(0)))
    tree = nnx.to_pure_dict(params)
    tree["dense4"] = tree.pop("dense3")
    message = (
        r"missing: \['dense3\.bias', 'dense3\.kernel'\], unknown: \['dense4\.bias', 'dense4\.k"
    )
    with pytest.raises(ValueError, match=message):
        apply(tree, digits(2, (4, 4, 1)))


# ---- pooling


def reference_pool(x):
    return nnx.max_pool(x, (2, 2), strides=(2, 2))


@jax.jit
def pool_both(x, weights):
    """Maxima and gradients, ours and those of Flax."""

    def weighted(pool, x):
        y = pool(x)
        return jnp.vdot(y, weights[:, : y.shape[1], : y.shape[2]]), y

    return [
        jax.grad(functools.partial(weighted, pool), has_aux=True)(x)
        for pool in (models.max_pool_2x2, reference_pool)
    ]


@settings(max_examples=30)
@given(
    height=st.integers(1, 4),
    width=st.integers(3, 5),
    levels=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_max_pool_equals_flax_with_its_gradient(height, width, levels, seed):
    rng = np.random.default_rng(seed)
    # Few distinct values: nearly every window has ties.
    x = rng.integers(-levels, levels + 1, size=(3, height, width, 2)).astype(np.float32)
    weights = rng.normal(size=(3, 2, 2, 2)).astype(np.float32)
    (grad, y), (expected_grad, expected_y) = pool_both(x, weights)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(grad, expected_grad)


def test_max_pool_forward_and_reverse_mode_agree():
    rng = np.random.default_rng(0)
    x, dx = (rng.normal(size=(2, 5, 6, 3)).astype(np.float32) for _ in range(2))
    y, dy = jax.jit(lambda x, dx: jax.jvp(models.max_pool_2x2, (x,), (dx,)))(x, dx)
    cotangent = rng.normal(size=y.shape).astype(np.float32)
    (pulled,) = jax.jit(lambda x, c: jax.vjp(models.max_pool_2x2, x)[1](c))(x, cotangent)
    np.testing.assert_allclose(jnp.vdot(cotangent, dy), jnp.vdot(pulled, dx), rtol=1e-5)


def test_max_pool_has_hessian_vector_products():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 1)), jnp.float32)
    grad = jax.grad(lambda x: (models.max_pool_2x2(x) ** 3).sum() / 6)
    product = jax.jit(lambda x: jax.jvp(grad, (x,), (x,))[1])(x)
    is_max = jax.grad(lambda x: reference_pool(x).sum())(x)
    np.testing.assert_allclose(product, is_max * x * x, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_max_pool_keeps_dtype_in_value_and_gradient(dtype):
    x = jnp.arange(16, dtype=dtype).reshape(1, 4, 4, 1)
    y = models.max_pool_2x2(x)
    grad = jax.jit(jax.grad(lambda x: models.max_pool_2x2(x).sum()))(x)
    assert y.dtype == grad.dtype == dtype
    np.testing.assert_array_equal(y, reference_pool(x))


def test_max_pool_shows_nan_in_value_and_gradient():
    x = jnp.zeros((1, 2, 4, 1)).at[0, 0, 0, 0].set(jnp.nan)
    y, pullback = jax.vjp(models.max_pool_2x2, x)
    np.testing.assert_array_equal(jnp.isnan(y).squeeze(), [True, False])
    assert bool(jnp.isnan(pullback(y)[0]).any())


@convolutional
def test_model_has_the_gradients_of_reduce_window(cls, smallest, monkeypatch):
    apply, params = taken_apart(cls)
    # Positive biases keep the ties of the background alive behind the ReLU.
    params = jax.tree.map(lambda w: w + 0.1 if w.ndim == 1 else w, params)
    x, labels = digits(8), jnp.arange(8)

    def value_and_grad(params):
        return jax.value_and_grad(lambda p: cross_entropy(apply, p, x, labels))(params)

    value, grads = jax.jit(value_and_grad)(params)
    monkeypatch.setattr(models, "max_pool_2x2", reference_pool)
    # A new function, so that jit cannot answer from its cache.
    expected, expected_grads = jax.jit(lambda p: value_and_grad(p))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_trees_close(grads, expected_grads, rtol=2e-6)
