"""`matmul` and `conv` against the dense ones, for every backend that this processor has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

from sparsejax import sparse_ops

SparseMatrix, matmul, conv = sparse_ops.SparseMatrix, sparse_ops.matmul, sparse_ops.conv
BACKENDS = ["jax", "plain", "avx2", "avx512"]
pytestmark = pytest.mark.usefixtures("backend", "quickly")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every backend; those that are not to be had here are skipped."""
    monkeypatch.setenv("SPARSEJAX_BACKEND", request.param)
    try:
        return sparse_ops.backend()
    except RuntimeError as error:
        pytest.skip(str(error))


def random(shape, density, dtype=np.float32, seed=0):
    """A dense array with whole empty and full columns, and what is kept of it."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    mask[..., 3:5], mask[..., 6:7] = False, True
    return np.asarray(rng.standard_normal(shape), dtype), mask


def normal(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def matrix(shape, density=0.3):
    w, mask = random(shape, density)
    return SparseMatrix.from_dense(w, mask), np.where(mask, w, 0)


def close(y, x, w, tolerance=2e-6):
    """Within rounding of the float64 product, relative to the sum of magnitudes."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    scale = np.abs(x) @ np.abs(w)
    assert y.shape == scale.shape
    assert (np.abs(np.asarray(y, np.float64) - x @ w) <= tolerance * scale + 1e-30).all()


SHAPES = [(0, 3), (3, 0), (1, 1), (7, 5), (20, 33), (300, 100), (1000, 77), (70, 600)]
BATCHES = [0, 1, 2, 3, 7, 8, 9, 16, 17, 63, 65, 130]


# Few programs: each shape is one. The fixture sets a variable that no example changes.
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(BATCHES),
    st.sampled_from([0, 0.05, 0.5, 1]),
    st.sampled_from([None, 8]),
    st.sampled_from([1, 64]),
)
def test_matmul_is_dense(backend, shape, rows, density, block, batch):
    w, mask = random(shape, density)
    if block:
        mask = np.repeat(mask[:, ::8], 8, 1)[:, : shape[1]]
    w = SparseMatrix.from_dense(w, mask, block=block, batch=batch)
    x = normal(rows, shape[0])
    close(matmul(x, w), x, w.to_dense())


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_matmul_of_bfloat16(backend, block, rows):
    w, _ = random((100, 48), 1, jnp.bfloat16)
    mask = np.repeat(random((100, 6), 0.3)[1], 8, 1)
    w = SparseMatrix.from_dense(w, mask, block=block)
    x = normal(rows, 100)
    y = matmul(x, w)
    assert y.dtype == jnp.float32
    close(y, x, w.to_dense())
    half = jnp.asarray(x, jnp.bfloat16)
    y = matmul(half, w)
    assert y.dtype == jnp.bfloat16
    close(y, half, w.to_dense(), 2**-8)  # accumulated in float32, rounded once


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (0, 2)])
def test_matmul_of_leading_axes(backend, leading):
    w, dense = matrix((12, 9))
    x = normal(*leading, 12)
    np.testing.assert_allclose(matmul(x, w), x @ dense, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 40])
def test_matmul_gradients_by_finite_differences(backend, rows):
    w, _ = matrix((10, 9))
    x = normal(rows, 10)
    check_grads(matmul, (x, w), order=2, modes=["rev"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_matmul_gradients_are_the_dense_ones(backend, block, rows):
    w, mask = random((30, 20), 0.3)
    mask = np.repeat(mask[:, ::8], 8, 1)[:, :20]
    w = SparseMatrix.from_dense(w, mask, block=block)
    x = normal(rows, 30)
    dx, dw = jax.grad(lambda x, w: (matmul(x, w) ** 2).sum(), (0, 1))(x, w)
    want_x, want_w = jax.grad(lambda x, w: ((x @ w) ** 2).sum(), (0, 1))(x, w.to_dense())
    np.testing.assert_allclose(dx, want_x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw.to_dense(), np.where(mask, want_w, 0), rtol=1e-4, atol=1e-4)


def test_matmul_eager_jit_and_vmap_agree(backend):
    w, _ = matrix((40, 30))
    x = normal(4, 3, 40)
    eager = matmul(x, w)
    np.testing.assert_array_equal(jax.jit(lambda *a: matmul(*a))(x, w), eager)
    one, two = jax.vmap(matmul, (0, None)), jax.vmap(jax.vmap(matmul, (0, None)), (0, None))
    np.testing.assert_allclose(one(x, w), eager, atol=1e-5)
    np.testing.assert_allclose(two(x, w), eager, atol=1e-5)
    assert jax.eval_shape(matmul, x, w).shape == (4, 3, 30)


def test_vmap_over_x_is_one_product(backend):
    w, _ = matrix((40, 30))
    text = str(jax.make_jaxpr(jax.vmap(matmul, (0, None)))(normal(4, 3, 40), w))
    assert "f32[12,40]" in text
    assert "f32[4,3,30] = scan" not in text


def test_vmap_over_values(backend):
    w, dense = matrix((12, 9))
    two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), w)
    x = normal(3, 12)
    np.testing.assert_allclose(jax.vmap(matmul, (None, 0))(x, two)[1], 2 * x @ dense, atol=1e-5)
    both = jax.vmap(matmul)(np.stack([x, x]), two)
    np.testing.assert_allclose(both[1], 2 * x @ dense, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("block", [None, 8])
def test_nonfinite_entries_meet_kept_weights_only(backend, bad, rows, block):
    w, mask = random((60, 40), 0.2)
    if block:
        mask = np.repeat(mask[:, ::8], 8, 1)
    w = SparseMatrix.from_dense(w, mask, block=block)
    x = normal(rows, 60)
    x[0, 17] = bad
    y = np.asarray(matmul(x, w))
    np.testing.assert_array_equal(~np.isfinite(y), (~np.isfinite(x)).astype(int) @ mask > 0)
    finite = np.isfinite(y)
    want = np.where(np.isfinite(x), x, 0) @ np.asarray(w.to_dense())
    np.testing.assert_allclose(y[finite], want[finite], atol=1e-4)


def test_skipped_nonfinite_counts():
    w = SparseMatrix.from_dense(np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]], np.float32))
    x = np.array([[np.inf, np.nan, 1], [1, 1, np.nan]], np.float32)
    assert sparse_ops.skipped_nonfinite(x, w) == 2  # input 1 has all its weights
    assert jax.jit(sparse_ops.skipped_nonfinite)(np.ones((2, 3), np.float32), w) == 0
    kernel = SparseMatrix.from_dense(np.ones((3, 3, 3, 2), np.float32))
    images = np.full((1, 4, 4, 3), np.nan, np.float32)
    assert sparse_ops.skipped_nonfinite(images, kernel) == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_to_dense_products_elsewhere(backend, platform):
    w, _ = matrix((40, 30))
    kernel, _ = matrix((3, 3, 4, 8))

    def both(x, images, w, kernel):
        return jax.grad(lambda w, k: matmul(x, w).sum() + conv(images, k).sum(), (0, 1))(w, kernel)

    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        (normal(5, 40), normal(2, 6, 6, 4), w, kernel),
    )
    lowered = jax.jit(both).trace(*shapes).lower(lowering_platforms=(platform,))
    module = lowered.as_text()
    assert "sparsejax_" not in module
    assert "stablehlo.dot_general" in module
    assert "stablehlo.convolution" in module


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_sharded_rows(backend, kind):
    w, dense = matrix((40, 30))
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    x = jax.device_put(normal(16, 40), jax.sharding.NamedSharding(mesh, rows))
    np.testing.assert_allclose(jax.jit(lambda *a: matmul(*a))(x, w), x @ dense, atol=1e-5)
    split = jax.shard_map(matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    np.testing.assert_allclose(jax.jit(split)(x, w), x @ dense, atol=1e-5)
    got = jax.jit(jax.grad(lambda w: (split(x, w) ** 2).sum()))(w)
    want = jax.grad(lambda w: ((normal(16, 40) @ w) ** 2).sum())(jnp.asarray(dense))
    np.testing.assert_allclose(got.to_dense(), np.where(w.mask(), want, 0), rtol=1e-4, atol=1e-3)


def test_sharded_images(backend):
    w, dense = matrix((3, 3, 2, 8))
    mesh = jax.make_mesh((8,), ("images",))
    each, whole = jax.sharding.PartitionSpec("images"), jax.sharding.PartitionSpec()
    x = normal(8, 5, 5, 2)
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, each))
    want = reference(x, dense)
    np.testing.assert_allclose(jax.jit(lambda *a: conv(*a))(sharded, w), want, atol=1e-5)
    split = jax.shard_map(conv, mesh=mesh, in_specs=(each, whole), out_specs=each)
    np.testing.assert_allclose(jax.jit(split)(sharded, w), want, atol=1e-5)


def test_infinite_weights_behave_as_numbers_do(backend):
    w, mask = random((12, 9), 0.5)
    w[0, 0], w[1, 0], w[2, 1] = np.inf, -np.inf, np.nan
    mask[:3, :2] = [[True, False], [False, False], [False, True]]
    w = SparseMatrix.from_dense(w, mask)
    x = np.abs(normal(3, 12))
    x[1, 0], x[2, 0] = 0, np.inf
    y = np.asarray(matmul(x, w))
    assert y[0, 0] == y[2, 0] == np.inf
    assert np.isnan(y[1, 0])
    assert np.isnan(y[:, 1]).all()


WINDOWS = [
    {},
    {"padding": "VALID"},
    {"strides": 2},
    {"strides": (2, 3), "padding": "VALID"},
    {"dilation": 2},
    {"dilation": (1, 3), "strides": 2, "padding": 3},
    {"padding": ((0, 2), (3, 1))},
    {"padding": (1, 2), "strides": 2},
]


def reference(x, kernel, strides=1, padding="SAME", dilation=1):
    def pair(v):
        return (v, v) if isinstance(v, int) else v

    if not isinstance(padding, str):
        padding = [pair(side) for side in pair(padding)]
    return lax.conv_general_dilated(
        x,
        kernel,
        pair(strides),
        padding,
        rhs_dilation=pair(dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


SHAPES_OF_CONV = [
    ((2, 9, 11, 5), (3, 3, 5, 8)),
    ((1, 12, 10, 1), (5, 2, 1, 20)),
    ((3, 8, 8, 16), (1, 1, 16, 9)),
]


@pytest.mark.parametrize(
    ("window", "images", "kernel"),
    [
        *[(window, *SHAPES_OF_CONV[i % 2]) for i, window in enumerate(WINDOWS)],
        *[(window, *SHAPES_OF_CONV[2]) for window in WINDOWS[1:4]],
        ({}, (0, 8, 8, 2), (3, 3, 2, 7)),
    ],
    ids=str,
)
def test_conv_is_dense(backend, window, images, kernel):
    w, dense = matrix(kernel)
    x = normal(*images)
    want = reference(x, dense, **window)
    y = conv(x, w, **window)
    assert y.shape == want.shape
    np.testing.assert_allclose(y, want, atol=1e-4)


@pytest.mark.parametrize("density", [0, 0.1, 1])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("block", [None, 8])
def test_conv_of_densities_and_dtypes(backend, density, dtype, block):
    w, mask = random((3, 3, 6, 16), density, dtype)
    if block:
        mask = np.repeat(mask[..., ::8], 8, -1)
    w = SparseMatrix.from_dense(w, mask, block=block)
    x = normal(4, 10, 10, 6)
    want = reference(x, np.where(mask, np.asarray(w.to_dense(), np.float32), 0))
    np.testing.assert_allclose(conv(x, w), want, atol=1e-4)


def test_conv_without_a_window_that_fits(backend):
    w, dense = matrix((3, 3, 2, 8))
    x = normal(1, 2, 9, 2)
    want = reference(x, dense, padding="VALID")
    assert conv(x, w, padding="VALID").shape == want.shape == (1, 0, 7, 8)


def test_conv_of_one_image(backend):
    w, dense = matrix((3, 3, 2, 8))
    x = normal(6, 5, 2)
    np.testing.assert_allclose(conv(x, w), reference(x[None], dense)[0], atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS[4:6], ids=str)
def test_conv_gradients_are_the_dense_ones(backend, window):
    w, dense = matrix((3, 3, 2, 8))
    x = normal(2, 9, 8, 2)
    dx, dw = jax.grad(lambda x, w: (conv(x, w, **window) ** 2).sum(), (0, 1))(x, w)
    want_x, want_w = jax.grad(lambda x, k: (reference(x, k, **window) ** 2).sum(), (0, 1))(
        x, jnp.asarray(dense)
    )
    np.testing.assert_allclose(dx, want_x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw.to_dense(), np.where(w.mask(), want_w, 0), rtol=1e-4, atol=1e-4)


def test_conv_gradients_by_finite_differences(backend):
    w, _ = matrix((2, 2, 2, 8))
    check_grads(conv, (normal(1, 4, 4, 2), w), order=1, modes=["rev"], rtol=0.02, atol=0.02)


def test_conv_eager_jit_and_vmap_agree(backend):
    w, _ = matrix((3, 3, 4, 9))
    x = normal(3, 2, 7, 7, 4)
    one = conv(x[1], w)
    np.testing.assert_array_equal(jax.jit(lambda *a: conv(*a))(x[1], w), one)
    np.testing.assert_allclose(jax.vmap(conv, (0, None))(x, w)[1], one, atol=1e-5)
    two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), w)
    np.testing.assert_allclose(jax.vmap(conv, (None, 0))(x[1], two)[1], 2 * one, atol=1e-4)


def test_nonfinite_pixels_meet_kept_weights_only(backend):
    w, mask = random((3, 3, 4, 9), 0.3)
    w = SparseMatrix.from_dense(w, mask)
    x = normal(2, 8, 8, 4)
    x[1, 3, 4, 2] = np.nan
    met = reference(np.isnan(x).astype(np.float32), mask.astype(np.float32)) > 0
    np.testing.assert_array_equal(np.isnan(conv(x, w)), met)


def test_training_values_is_training_under_masks(backend):
    w, mask = random((20, 10), 0.3)
    x, y = normal(64, 20), normal(64, 10)

    def steps(product, w):
        tx = optax.adam(0.01)
        state = tx.init(w)
        for _ in range(5):
            grads = jax.grad(lambda w: ((product(x, w) - y) ** 2).mean())(w)
            updates, state = tx.update(grads, state, w)
            w = optax.apply_updates(w, updates)
        return w

    sparse = steps(matmul, SparseMatrix.from_dense(w, mask))
    dense = steps(lambda x, w: x @ jnp.where(mask, w, 0), jnp.asarray(w))
    np.testing.assert_allclose(sparse.to_dense(), np.where(mask, dense, 0), atol=1e-4)


X, M, K = normal(2, 3), matrix((3, 8))[0], matrix((3, 3, 3, 8))[0]
IMAGES = normal(1, 5, 5, 3)
REFUSED = [
    (lambda: matmul(X, np.eye(3)), TypeError, "`w` must be a SparseMatrix"),
    (lambda: matmul(X, K), ValueError, "`w` must be a matrix"),
    (
        lambda: matmul(X.astype(int), M),
        TypeError,
        r"`x` must be a floating array, got int64\[2,3\]",
    ),
    (lambda: matmul("x", M), TypeError, "`x` must be a floating array, got 'x'"),
    (lambda: matmul(X.T, M), ValueError, r"must have the 3 inputs of `w`.*float32\[3,2\]"),
    (lambda: matmul(np.float32(1), M), ValueError, "must have the 3 inputs"),
    (lambda: matmul(X, jax.tree.map(lambda v: v[1:], M)), ValueError, "`w.values` must have shape"),
    (lambda: matmul(X, jax.tree.map(lambda v: v > 0, M)), TypeError, "`w.values` must be float32"),
    (lambda: conv(IMAGES, M), ValueError, "`w` must be a kernel"),
    (lambda: conv(X, K), ValueError, r"must have shape \(images, height, width, 3\)"),
    (lambda: conv(IMAGES[..., :2], K), ValueError, r"float32\[1,5,5,2\]"),
    (lambda: conv(IMAGES, K, strides=0), ValueError, "`strides` must be >= 1 and .*got 0"),
    (lambda: conv(IMAGES, K, strides=1.5), TypeError, "`strides` must be one integer or two"),
    (lambda: conv(IMAGES, K, dilation=(1, 0)), ValueError, "`dilation` must be >= 1"),
    (
        lambda: conv(IMAGES, K, padding="CIRCULAR"),
        ValueError,
        '`padding` must be "SAME" or "VALID"',
    ),
    (lambda: conv(IMAGES, K, padding=None), TypeError, '`padding` must be "SAME", "VALID", an int'),
    (lambda: conv(IMAGES, K, padding=2**40), ValueError, "`padding` must be >= 0 and less than"),
    (lambda: X @ M, TypeError, "call sparse_ops.matmul"),
    (
        lambda: conv(IMAGES, K, padding=-1),
        ValueError,
        r"`padding` must be >= 0 and .*\(-1, -1\)",
    ),
    (lambda: conv(IMAGES, K, padding=((0, 0),)), ValueError, "`padding` must be for two axes"),
    (lambda: sparse_ops.skipped_nonfinite(X.T, M), ValueError, "must have the 3 inputs"),
]


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
