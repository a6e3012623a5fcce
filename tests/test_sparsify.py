"""Functions with sparse weights equal those with masked dense ones; what stays dense says why."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import CASES
from flax import nnx
from jax import lax

from sparsejax import granularities, masking, sparse_ops
from sparsejax.sparse_ops import _sparsify

pytestmark = pytest.mark.usefixtures("quickly")


def always(product):
    return 2.0


def draw(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def masks_of(params, sparsity=0.6):
    """Random masks of everything of two axes and more, 0-d True of the rest."""
    rng = np.random.default_rng(7)

    def mask(leaf):
        pruned = (
            hasattr(leaf, "ndim") and leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating)
        )
        return rng.random(leaf.shape) >= sparsity if pruned else np.array(True)

    return jax.tree.map(mask, params)


def sparsified(apply, params, *inputs, crossover=always, masks=None):
    masks = masks_of(params) if masks is None else masks
    fast, sparse = sparse_ops.sparsify(apply, params, masks, *inputs, crossover=crossover)
    return fast, sparse, masking.apply_masks(params, masks)


def total(outputs):
    """A loss with a different gradient for every output."""
    floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32) + 1)) for x in floats)


def assert_close(got, want, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        other = np.asarray(other, np.float64)
        scale = max(1.0, float(np.max(np.abs(other), initial=0)))
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, rtol=0, atol=tolerance * scale
        )


def check(apply, params, *inputs, tolerance=1e-5, masks=None):
    """Outputs and gradients, with respect to params and inputs; the same report for all."""
    masks = masks_of(params) if masks is None else masks
    fast, sparse, masked = sparsified(apply, params, *inputs, masks=masks)

    @jax.jit
    def both(sparse, masked, *inputs):
        return [
            jax.value_and_grad(
                lambda p, *inputs, f=f: (lambda y: (total(y), y))(f(p, *inputs)),
                argnums=tuple(
                    i
                    for i, x in enumerate((p, *inputs))
                    if i == 0 or jnp.issubdtype(x.dtype, jnp.floating)
                ),
                has_aux=True,
            )(p, *inputs)
            for f, p in ((fast, sparse), (apply, masked))
        ]

    ((_, got), got_grads), ((_, want), want_grads) = both(sparse, masked, *inputs)
    assert_close(got, want, tolerance)
    # A pruned weight has no gradient.
    kept = masking.apply_masks(want_grads[0], masks)
    dense = masking.apply_masks(fast.to_dense(got_grads[0]), masks)
    assert_close(dense, kept, tolerance)
    assert_close(got_grads[1:], want_grads[1:], tolerance)
    return fast


NETWORKS = {
    "nchw-dict": 3,
    "mlp-equinox": 3,
    "cnn-haiku": 4,
    "mlp-haiku": 3,
    "cnn-linen": 4,
    "cnn-nnx": 4,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.usefixtures("as_users_have_it")
def test_networks_equal_masked_ones(name):
    case = CASES[name]()
    fast = check(case.apply, case.variables, *case.inputs)
    assert len(fast.report.replaced) == NETWORKS[name]


def test_attention_equals_masked_attention():
    """Kernels of three axes, in and out of the heads."""
    model = nnx.MultiHeadAttention(2, 8, decode=False, use_bias=False, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    fast = check(apply, params, draw(2, 5, 8))
    assert fast.report.replaced == ("key.kernel", "out.kernel", "query.kernel", "value.kernel")
    assert [row.shape for row in fast.report.rows] == [(8, 2, 4), (2, 4, 8), (8, 2, 4), (8, 2, 4)]


def linear(params, x):
    return x @ params["w"]


@jax.custom_jvp
def tripled(w, x):
    """A product with a derivative of its own, which is not that of a product."""
    return x @ w


@tripled.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 3 * (x @ dw) + 5 * (dx @ w)


@jax.custom_vjp
def clipped(w, x, n):
    return x @ w * n


clipped.defvjp(
    lambda w, x, n: (clipped(w, x, n), (w, x)),
    lambda res, dy: (jnp.clip(res[1].T @ dy, -0.1, 0.1), 7 * dy @ res[0].T, None),
)


def image_of(layout, strides=(1, 1), padding="SAME", dilation=(1, 1)):
    def apply(params, x):
        return lax.conv_general_dilated(
            x,
            params["w"],
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=layout,
        )

    return apply


@jax.jit
def turned(w):
    return jnp.moveaxis(w, 0, -1)


# By what they show: a function, the shapes of its weight and of its input.
FORMS = {
    "product": (linear, (7, 9), (5, 7)),
    "vector": (linear, (7, 9), (7,)),
    "one output": (linear, (7, 1), (5, 7)),
    "leading axes": (linear, (7, 9), (2, 3, 7)),
    "on the left": (lambda p, x: p["w"] @ x, (9, 7), (7, 5)),
    "transposed": (lambda p, x: x @ p["w"].T, (9, 7), (5, 7)),
    "outputs of two axes": (lambda p, x: jnp.tensordot(x, p["w"], 1), (7, 2, 3), (5, 7)),
    "sums over two axes": (lambda p, x: jnp.tensordot(x, p["w"], 2), (2, 3, 9), (5, 2, 3)),
    "axes crossed": (lambda p, x: jnp.einsum("bkh,nhk->nb", x, p["w"]), (9, 2, 3), (5, 3, 2)),
    "middle axis": (lambda p, x: jnp.einsum("akc,bkd->abcd", p["w"], x), (2, 7, 3), (4, 7, 5)),
    "outer product": (lambda p, x: jnp.tensordot(x, p["w"], 0), (3, 4), (5,)),
    "reshaped": (lambda p, x: x @ p["w"].reshape(6, -1), (2, 3, 9), (5, 6)),
    "turned in jit": (lambda p, x: x @ turned(p["w"]), (9, 7), (5, 7)),
    "one axis more": (lambda p, x: x @ p["w"][None].squeeze(0), (7, 9), (5, 7)),
    "twice": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], (7, 7), (5, 7)),
    "in jit": (jax.jit(linear), (7, 9), (5, 7)),
    "in remat": (jax.checkpoint(lambda p, x: jnp.sin(x @ p["w"])), (7, 9), (5, 7)),
    "in custom_jvp": (lambda p, x: tripled(p["w"], x), (7, 9), (5, 7)),
    "in custom_vjp": (lambda p, x: clipped(p["w"], x, 2), (7, 9), (5, 7)),
    "precise": (
        lambda p, x: jnp.matmul(x, p["w"], precision="highest", preferred_element_type=np.float32),
        (7, 9),
        (5, 7),
    ),
    "convolution": (image_of(("NHWC", "HWIO", "NHWC")), (3, 3, 4, 5), (2, 6, 7, 4)),
    "even kernel": (image_of(("NHWC", "HWIO", "NHWC")), (2, 4, 4, 5), (2, 6, 7, 4)),
    "strides": (
        image_of(("NHWC", "HWIO", "NHWC"), (2, 3), "VALID"),
        (3, 2, 4, 5),
        (2, 8, 9, 4),
    ),
    "dilation": (
        image_of(("NHWC", "HWIO", "NHWC"), padding=((2, 0), (1, 3)), dilation=(2, 1)),
        (3, 2, 4, 5),
        (2, 8, 9, 4),
    ),
    "channels first": (
        image_of(("NCHW", "OIHW", "NCHW"), (2, 1)),
        (5, 4, 3, 3),
        (2, 4, 6, 7),
    ),
    "channels last afterwards": (image_of(("HWCN", "IHWO", "CNHW")), (4, 3, 3, 5), (6, 7, 4, 2)),
    "sequence": (
        image_of(("NWC", "WIO", "NWC"), (2,), ((1, 2),), (2,)),
        (3, 4, 5),
        (2, 9, 4),
    ),
    "sequence, channels first": (
        image_of(("NCW", "OIW", "NCW"), (1,), "SAME", (1,)),
        (5, 4, 3),
        (2, 4, 9),
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.usefixtures("as_users_have_it")
def test_products_of_every_layout_are_replaced(name):
    apply, w, x = FORMS[name]
    fast = check(apply, {"w": draw(*w)}, draw(*x, seed=1))
    assert fast.report.replaced == ("w",), str(fast.report)


@pytest.mark.parametrize("name", ["product", "transposed", "on the left", "channels first"])
def test_products_say_how_the_dense_weight_lies_in_memory(name):
    apply, w, x = FORMS[name]
    fast, *_ = sparsified(apply, {"w": draw(*w)}, draw(*x, seed=1))
    assert fast.report.rows[0].products[0].transposed is (name in ("transposed", "on the left"))


@pytest.mark.parametrize("name", ["product", "convolution"])
@pytest.mark.parametrize("inside", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("outside", [jnp.bfloat16, jnp.float32])
def test_products_are_in_the_precision_of_the_function(name, inside, outside):
    apply, w, x = FORMS[name]

    def rounded(params, x):
        return apply({"w": params["w"].astype(inside)}, x.astype(inside)).astype(np.float32)

    fast = check(rounded, {"w": draw(*w, dtype=outside)}, draw(*x), tolerance=3e-2)
    assert fast.report.replaced == ("w",)
    assert {p.dtype for row in fast.report.rows for p in row.products} == {jnp.dtype(inside).name}


def test_weights_are_rounded_as_the_function_rounds_them():
    w = jnp.full((8, 8), 1 + 2**-10)

    def apply(params, x):
        return x @ params["w"].astype(jnp.bfloat16).astype(np.float32)

    fast, sparse, masked = sparsified(apply, {"w": w}, jnp.ones((2, 8)))
    assert sparse["w"].dtype == np.float32
    assert_close(fast(sparse, jnp.ones((2, 8))), apply(masked, jnp.ones((2, 8))), 0)


def weight_norm(params, x):
    return x @ (params["w"] / jnp.linalg.norm(params["w"]))


def grouped(params, x):
    return lax.conv_general_dilated(
        x,
        params["w"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )


def transposed(params, x):
    return lax.conv_transpose(x, params["w"], (2, 2), "SAME")


def scanned(params, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, length=3)[0]


def looped(params, x):
    return lax.while_loop(lambda h: h[1] < 3, lambda h: (h[0] @ params["w"], h[1] + 1), (x, 0))[0]


def chosen(params, x):
    return lax.cond(x.sum() > 0, lambda x: x @ params["w"], lambda x: x, x)


# A function, the shapes of its weight and of its input, and why the weight stays dense.
DENSE = [
    (lambda p, x: x @ p["w"] @ p["w"].T, (7, 9), (5, 7), "2 products want it in different orders"),
    (weight_norm, (7, 9), (5, 7), r"read by `\w+`, test_sparsify\.py:\d+ \(weight_norm\)"),
    (lambda p, x: p["w"][x.astype(int)], (7, 9), (5,), "read by `gather`"),
    (lambda p, x: (x @ p["w"], p["w"]), (7, 9), (5, 7), "an output of the function"),
    (lambda p, x: x, (7, 9), (5, 7), "does not use it"),
    (lambda p, x: x @ jnp.where(x.sum() > 0, p["w"], 0), (7, 9), (5, 7), "read by `select_n`"),
    (lambda p, x: jnp.einsum("bk,bkn->bn", x, p["w"]), (5, 7, 9), (5, 7), "a batched product"),
    (lambda p, x: x @ (p["w"] @ p["w"]), (7, 7), (5, 7), "by another pruned weight"),
    (lambda p, x: linear(p, x.astype(jnp.float16)), (7, 9), (5, 7), "a product of float16"),
    (grouped, (3, 3, 2, 6), (2, 5, 5, 4), "a grouped convolution"),
    (transposed, (3, 3, 4, 5), (2, 5, 5, 4), "a transposed convolution"),
    (
        image_of(("NHWC", "HWIO", "NHWC"), padding=((-1, 0), (0, 0))),
        (3, 3, 4, 5),
        (2, 5, 5, 4),
        "negative padding",
    ),
    (
        image_of(("NDHWC", "DHWIO", "NDHWC"), (1, 1, 1), "SAME", (1, 1, 1)),
        (3, 3, 3, 4, 5),
        (2, 5, 5, 5, 4),
        "a convolution of 3 axes",
    ),
    (
        lambda p, x: lax.conv(p["w"], x, (1, 1), "VALID"),
        (2, 4, 6, 6),
        (3, 4, 3, 3),
        "the image of a convolution",
    ),
    (scanned, (7, 7), (5, 7), "inside `scan`"),
    (looped, (7, 7), (5, 7), "inside `while`"),
    (chosen, (7, 7), (5, 7), "inside `cond`"),
    (
        lambda p, x: x @ jax.checkpoint(lambda w: w.T)(p["w"]),
        (9, 7),
        (5, 7),
        r"`(checkpoint|remat2?)` returns it",
    ),
]


@pytest.mark.parametrize(("apply", "w", "x", "why"), DENSE, ids=[row[-1] for row in DENSE])
@pytest.mark.usefixtures("as_users_have_it")
def test_what_stays_dense_says_why(apply, w, x, why):
    params = {"w": draw(*w)}
    if "float16" in why:
        params = {"w": params["w"].astype(np.float16)}
    masks = {"w": draw(*w, seed=2) > 0}
    fast, sparse, masked = sparsified(apply, params, draw(*x, seed=1), masks=masks)
    (row,) = fast.report.rows
    assert not row.replaced
    assert re.search(why if "float16" not in why else "float16", row.why), row.why
    assert_close(sparse, masked, 0)
    assert_close(fast(sparse, draw(*x, seed=1)), apply(masked, draw(*x, seed=1)))


def test_leaves_that_are_not_pruned_are_in_the_report_where_they_are_weights():
    params = {"b": jnp.ones(9), "n": jnp.ones((2, 2), int), "v": draw(9, 3), "w": draw(7, 9)}
    masks = {"b": True, "n": True, "v": np.ones((9, 3), bool), "w": draw(7, 9, seed=2) > 0}
    masks = jax.tree.map(np.asarray, masks)

    def apply(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]

    fast, sparse, _ = sparsified(apply, params, draw(5, 7), masks=masks)
    assert [(row.path, row.why) for row in fast.report.rows] == [
        ("v", "it is not pruned"),
        ("w", ""),
    ]
    assert sparse["b"] is params["b"]
    assert repr(fast) == "FastApply(Report(1 of 2 weights are sparse))"
    lines = str(fast.report).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["v", "9x3", "1", "-", "-", "dense:", "it", "is", "not", "pruned"]
    assert lines[2].split()[-3:] == ["5x7", "2.00x", "sparse"]


def test_a_kept_weight_stays_though_it_is_zero():
    params = {"w": jnp.zeros((4, 4)).at[0, 0].set(1.0)}
    masks = {"w": jnp.eye(4, dtype=bool)}
    fast, sparse, _ = sparsified(linear, params, jnp.ones((2, 4)), masks=masks)
    assert sparse["w"].nnz == 4
    grads = jax.grad(lambda p: fast(p, jnp.ones((2, 4))).sum())(sparse)
    np.testing.assert_array_equal(grads["w"].to_dense(), 2 * jnp.eye(4))


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_blocks_along_outputs_are_found(axis):
    w = draw(16, 24)
    shape = (1, 8) if axis == "outputs" else (8, 1)
    masks = {"w": masking.topk({"w": w}, 0.5, granularity=granularities.Block(shape))["w"]}
    fast, sparse, _ = sparsified(linear, {"w": w}, draw(3, 16), masks=masks)
    want = 8 if axis == "outputs" else None
    assert fast.report.rows[0].products[0].block == want
    assert sparse["w"].structure.block == (want or 1)


@pytest.mark.parametrize(("speed_up", "replaced"), [(1.04, False), (1.05, True), (0, False)])
def test_a_product_is_replaced_where_it_gains(speed_up, replaced):
    asked = []

    def crossover(product):
        asked.append(product)
        return speed_up

    params = {"w": draw(7, 9)}
    masks = {"w": np.arange(63).reshape(7, 9) % 3 == 0}
    fast, sparse, _ = sparsified(linear, params, draw(2, 5, 7), crossover=crossover, masks=masks)
    assert asked == [sparse_ops.Product((10, 7), (7, 9), density=1 / 3)]
    assert fast.report.rows[0].replaced is replaced
    assert fast.report.rows[0].speed_up == pytest.approx(speed_up)
    assert isinstance(sparse["w"], sparse_ops.SparseMatrix) is replaced


def test_the_least_gain_of_several_products_decides():
    def apply(p, x):
        return jnp.concatenate([x, x[:1]]) @ p["w"] + x[:1] @ p["w"]

    fast, *_ = sparsified(
        apply, {"w": draw(7, 9)}, draw(4, 7), crossover=lambda product: float(product.rows)
    )
    assert [p.x for p in fast.report.rows[0].products] == [(5, 7), (1, 7)]
    assert fast.report.rows[0].speed_up == 1
    assert fast.report.rows[0].why == "it would not gain"


@pytest.mark.parametrize("crossover", [None, sparse_ops.shipped, "measured"])
def test_without_a_kernel_nothing_is_replaced(monkeypatch, tmp_path, crossover):
    monkeypatch.setenv("SPARSEJAX_BACKEND", "jax")
    crossover = sparse_ops.measured(tmp_path / "c.json") if crossover == "measured" else crossover
    fast, sparse, masked = sparsified(linear, {"w": draw(64, 64)}, draw(4, 64), crossover=crossover)
    assert "no compiled kernel" in fast.report.rows[0].why
    assert_close(sparse, masked, 0)


def test_the_default_is_measured(monkeypatch, tmp_path):
    if sparse_ops.backend() == "jax":
        pytest.skip("there is no compiled kernel")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fast, *_ = sparsified(linear, {"w": draw(128, 128)}, draw(4, 128), crossover=None)
    assert fast.report.rows[0].speed_up > 0
    assert (tmp_path / "sparsejax" / "crossover.json").exists()


@pytest.mark.parametrize(("every", "replaced"), [(3.0, ("v", "w")), (1.5, ("w",))])
def test_all_is_replaced_where_that_is_fastest(monkeypatch, every, replaced):
    def expect(product):
        return 2.0 if product.w == (7, 9) else 0.8

    monkeypatch.setattr(_sparsify._crossover, "measured", lambda: expect)
    figures = iter([1.5, every])
    monkeypatch.setattr(_sparsify, "ratio", lambda dense, sparse: next(figures))
    params = {"v": draw(9, 3), "w": draw(7, 9)}

    def apply(p, x):
        return x @ p["w"] @ p["v"]

    fast, sparse, masked = sparsified(apply, params, draw(5, 7), crossover=None)
    assert fast.report.replaced == replaced
    assert fast.report.speed_up == every
    assert_close(fast(sparse, draw(5, 7)), apply(masked, draw(5, 7)))


@pytest.mark.parametrize("whole", [0.9, 1.1])
def test_all_stays_dense_where_the_whole_does_not_gain(monkeypatch, whole):
    monkeypatch.setattr(_sparsify._crossover, "measured", lambda: always)
    runs = []
    monkeypatch.setattr(
        _sparsify,
        "ratio",
        lambda dense, sparse: runs.extend((dense(), sparse())) or whole,
    )
    params = {"v": draw(9, 3), "w": draw(7, 9)}
    masks = {"v": np.array(True), "w": draw(7, 9, seed=2) > 0}

    def apply(p, x):
        return x @ p["w"] @ p["v"]

    fast, sparse, masked = sparsified(apply, params, draw(5, 7), crossover=None, masks=masks)
    assert_close(runs[0], runs[1])
    assert_close(fast(sparse, draw(5, 7)), runs[0])
    assert str(fast.report).splitlines()[-1] == f"the whole function: {whole:.2f}x"
    if whole < 1:
        assert_close(sparse, masked, 0)
        assert fast.report.rows[1].why == ("it would gain, but the whole function would not: 0.90x")
        assert fast.report.rows[0].why == "it is not pruned"
    else:
        assert fast.report.replaced == ("w",)
    shape = jax.ShapeDtypeStruct((5, 7), np.float32)
    fast, *_ = sparsified(apply, params, shape, crossover=None, masks=masks)
    assert fast.report.replaced == ("w",)
    assert len(runs) == 2


def net(params, x):
    return jax.nn.relu(x @ params["in"] + params["b"][None]) @ params["out"]


def small():
    return {"b": jnp.zeros(16), "in": draw(8, 16), "out": draw(16, 3)}


def test_eager_jit_and_vmap_agree_at_any_batch():
    fast, sparse, masked = sparsified(net, small(), draw(2, 8))
    x = draw(4, 3, 8)
    want = net(masked, x.reshape(12, 8)).reshape(4, 3, 3)
    assert_close(fast(sparse, x[0]), want[0])
    assert_close(jax.jit(fast)(sparse, x[0]), want[0])
    assert_close(jax.jit(jax.vmap(fast, (None, 0)))(sparse, x), want)
    assert_close(jax.vmap(lambda x: fast(sparse, x[None])[0])(x[0]), want[0])


def test_no_second_trace_on_the_second_step():
    fast, sparse, _ = sparsified(net, small(), draw(2, 8))
    traces = []

    @jax.jit
    def step(params, x):
        traces.append(1)
        grads = jax.grad(lambda p: total(fast(p, x)))(params)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

    for _ in range(3):
        sparse = step(sparse, draw(2, 8))
    assert len(traces) == 1


def test_fine_tuning_moves_kept_values_only():
    masks = masks_of(small()) | {"out": np.array(True)}
    fast, sparse, masked = sparsified(net, small(), draw(6, 8), masks=masks)
    x, y = draw(6, 8), draw(6, 3, seed=1)
    optimizer = optax.adam(1e-2)

    def trained(f, params, mask=lambda grads: grads):
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            grads = mask(jax.grad(lambda p: jnp.mean((f(p, x) - y) ** 2))(params))
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(3):
            params, state = step(params, state)
        return params

    got = fast.to_dense(trained(fast, sparse))
    want = trained(net, masked, lambda grads: masking.apply_masks(grads, masks))
    assert_close(got, want, 1e-4)
    np.testing.assert_array_equal(np.asarray(got["in"] != 0), masks["in"])


def test_integers_and_keys_among_params_and_inputs_pass():
    params = {"key": jax.random.key(0), "step": jnp.array(3), "w": draw(7, 9)}
    masks = {"key": np.array(True), "step": np.array(True), "w": draw(7, 9, seed=2) > 0}

    def apply(p, x, scale):
        noise = jax.random.normal(p["key"], x["a"].shape)
        return (x["a"] + noise) @ p["w"] * p["step"] * scale, None

    fast, sparse, masked = sparsified(apply, params, {"a": draw(5, 7)}, 2.0, masks=masks)
    x = {"a": np.random.default_rng(1).normal(size=(5, 7))}  # float64
    assert_close(jax.jit(fast)(sparse, x, 3.0), jax.jit(apply)(masked, x, 3.0))
    assert_close(fast(sparse, x, 3), apply(masked, x, 3))


class Model(eqx.Module):
    """With functions, `None` and Python numbers among its leaves."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    activation: object = jax.nn.relu

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 2)
        self.first = eqx.nn.Linear(8, 16, key=keys[0])
        self.last = eqx.nn.Linear(16, 3, use_bias=False, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.5, inference=True)

    def __call__(self, x):
        return self.last(self.dropout(self.activation(self.first(x))))


@pytest.mark.parametrize("functions", ["true", "none"])
def test_equinox_modules_are_params(functions):
    model = Model()
    masks = masks_of(eqx.filter(model, lambda x: functions == "true" or not callable(x)))
    fast, sparse, masked = sparsified(
        lambda model, x: jax.vmap(model)(x), model, draw(2, 8), masks=masks
    )
    assert isinstance(sparse, Model)
    assert sparse.first.weight.shape == (8, 16)
    assert fast.report.replaced == ("first.weight", "last.weight")
    assert fast.report.rows[0].products[0].transposed
    x = draw(5, 8)
    assert_close(eqx.filter_jit(fast)(sparse, x), jax.vmap(masked)(x))
    grads = eqx.filter_grad(lambda model: total(fast(model, x)))(sparse)
    want = eqx.filter_grad(lambda model: total(jax.vmap(model)(x)))(masked)
    assert_close(
        fast.to_dense(grads).first.weight * masks.first.weight,
        want.first.weight * masks.first.weight,
    )


def test_nnx_states_are_params():
    model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, x):
        return nnx.merge(graph, params, rest)(x)

    fast, sparse, _ = sparsified(apply, params, draw(2, 8))
    assert isinstance(sparse, nnx.State)
    assert fast.report.replaced == ("layers.0.kernel",)
    state = optax.adam(0.1).init(sparse)
    grads = jax.grad(lambda p: total(fast(p, draw(2, 8))))(sparse)
    updates, _ = optax.adam(0.1).update(grads, state, sparse)
    sparse = optax.apply_updates(sparse, updates)
    assert_close(fast(sparse, draw(2, 8)), apply(fast.to_dense(sparse), draw(2, 8)))


def test_loops_and_custom_derivatives_stay_whole():
    def apply(params, x):
        return jax.nn.relu(scanned({"w": params["loop"]}, x @ params["w"]))

    params = {"loop": draw(7, 7), "w": draw(7, 7)}
    fast, sparse, masked = sparsified(apply, params, draw(5, 7))

    def primitives(f, params):
        return [e.primitive.name for e in jax.make_jaxpr(f)(params, draw(5, 7)).jaxpr.eqns]

    assert "scan" in primitives(fast, sparse)
    assert [n for n in primitives(fast, sparse) if n == "custom_jvp_call"] == [
        n for n in primitives(apply, masked) if n == "custom_jvp_call"
    ]


def test_it_exports_for_every_platform():
    pytest.importorskip("flatbuffers")
    fast, sparse, _ = sparsified(net, small(), draw(2, 8))
    values, structure = jax.tree.flatten(sparse)
    exported = jax.export.export(
        jax.jit(lambda values, x: fast(jax.tree.unflatten(structure, values), x)),
        platforms=("cuda", "tpu"),
    )(values, draw(2, 8))
    assert exported.platforms == ("cuda", "tpu")


def test_to_dense_brings_params_back():
    case = CASES["cnn-nnx"]()
    fast, sparse, masked = sparsified(case.apply, case.variables, *case.inputs)
    assert_close(fast.to_dense(sparse), masked, 0)
    assert_close(jax.jit(fast.to_dense)(sparse), masked, 0)


def test_shapes_of_inputs_are_enough():
    fast, sparse, masked = sparsified(net, small(), jax.ShapeDtypeStruct((64, 8), np.float32))
    assert fast.report.rows[1].products[0].rows == 64
    assert_close(fast(sparse, draw(2, 8)), net(masked, draw(2, 8)))


def by_size(params, x):
    return x @ (params["w"] if len(x) < 4 else params["w"].T)


GOOD = {"w": np.eye(4, dtype=np.float32)}
MASKS = {"w": np.eye(4, dtype=bool)}
X = np.ones((2, 4), np.float32)


def applied(change=lambda sparse: sparse, apply=linear, x=X):
    fast, sparse = sparse_ops.sparsify(apply, GOOD, MASKS, X, crossover=always)
    return fast(change(sparse), x)


ERRORS = [
    (
        lambda: sparse_ops.sparsify(3, GOOD, MASKS, X),
        TypeError,
        r"`apply_fn` must be a function \(params, \*inputs\) -> outputs, got 3; for example",
    ),
    (
        lambda: sparse_ops.sparsify(linear, GOOD, MASKS, X, crossover=2.0),
        TypeError,
        r"`crossover` must be a function product -> speed-up, got 2\.0; for example sparse_ops",
    ),
    (
        lambda: sparse_ops.sparsify(linear, GOOD, {"w": np.ones((4, 4))}, X),
        TypeError,
        r"`masks` must be boolean .* at 'w'",
    ),
    (
        lambda: sparse_ops.sparsify(linear, GOOD, {"v": MASKS["w"]}, X),
        ValueError,
        r"`masks` .* 'w'",
    ),
    (
        lambda: jax.jit(lambda p: sparse_ops.sparsify(linear, p, MASKS, X)[1])(GOOD),
        TypeError,
        r"`params` must hold arrays whose entries are known, got float32\[4,4\] at 'w' without; "
        "call sparsify outside of jit",
    ),
    (
        lambda: jax.jit(lambda m: sparse_ops.sparsify(linear, GOOD, m, X)[1])(MASKS),
        TypeError,
        r"`masks` must hold arrays whose entries are known, got bool\[4,4\] at 'w'",
    ),
    (
        lambda: sparse_ops.sparsify(linear, GOOD, MASKS, X, crossover=lambda p: None),
        ValueError,
        r"`crossover` must give a finite number >= 0, how many times faster, got None for Product",
    ),
    (
        lambda: sparse_ops.sparsify(linear, GOOD, MASKS, X, crossover=lambda p: math.nan),
        ValueError,
        "`crossover` must give a finite number >= 0, how many times faster, got nan for Product",
    ),
    (
        lambda: applied(lambda sparse: GOOD),
        ValueError,
        r"`sparse_params` must hold a SparseMatrix of shape \(4, 4\) at 'w', got float32\[4,4\]; "
        "pass the params that sparsify returned",
    ),
    (
        lambda: applied(lambda sparse: sparse | {"v": X}),
        ValueError,
        "`sparse_params` must have the structure that sparsify returned, .*'w'.*, got .*'v'",
    ),
    (
        lambda: applied(lambda sparse: {"w": sparse_ops.SparseMatrix.from_dense(X)}),
        ValueError,
        r"`sparse_params` must hold a SparseMatrix of shape \(4, 4\) at 'w', got SparseMatrix\(fl",
    ),
    (
        lambda: applied(apply=by_size, x=np.ones((4, 4), np.float32)),
        ValueError,
        "`apply_fn` must use 'w' as it did when sparsify traced it, but with these inputs it does "
        "not: its axes are wanted in another order. Call sparsify with such inputs",
    ),
    (
        lambda: sparse_ops.sparsify(
            linear, GOOD, MASKS, jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4"), X.dtype)
        ),
        ValueError,
        r"`inputs` must have sizes that are numbers, got float32\[b,4\] at '0'",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
@pytest.mark.usefixtures("as_users_have_it")
def test_errors_name_the_argument_and_the_fix(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
