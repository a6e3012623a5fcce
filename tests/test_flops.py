"""Operations: formulas, XLA's own count, indicators of what is not zero, smaller networks."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from sparsejax import dependency, models, reports, shrinking

pytestmark = pytest.mark.usefixtures("quickly")

IMAGE = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)

# Multiplications of one image: places * taps * inputs * outputs of convolutions, inputs * outputs.
FORMULAS = {
    "LeNet300100": {"dense1": 784 * 300, "dense2": 300 * 100, "dense3": 100 * 10},
    "LeNet5Caffe": {
        "conv1": 24 * 24 * 25 * 1 * 20,
        "conv2": 8 * 8 * 25 * 20 * 50,
        "dense1": 4 * 4 * 50 * 500,
        "dense2": 500 * 10,
    },
    "CNN": {
        "conv1": 26 * 26 * 9 * 1 * 32,
        "conv2": 11 * 11 * 9 * 32 * 64,
        "dense1": 5 * 5 * 64 * 100,
        "dense2": 100 * 10,
    },
}
PLACES = {"CNN": {"conv1": 26 * 26, "conv2": 11 * 11}, "LeNet5Caffe": {"conv1": 576, "conv2": 64}}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def holes(*shape, seed=0):
    """Weights about half of which are zero."""
    return jnp.maximum(draw(*shape, seed=seed), 0)


@functools.cache
def network(name):
    """A reference network, of which nothing but shapes is known, and masks that keep a tenth."""
    build = getattr(models, name)
    apply, params = models.functional(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    masks = jax.tree.map(
        lambda w: np.array(True) if w.ndim < 2 else rng.random(w.shape) < 0.1, params
    )
    return apply, params, masks


@pytest.mark.parametrize("name", FORMULAS)
def test_dense_flops_are_the_formulas(name):
    apply, params, _ = network(name)
    count = reports.flops(apply, params, IMAGE)
    expected = {f"{layer}.kernel": 2 * n for layer, n in FORMULAS[name].items()}
    assert {path: cost.dense for path, cost in count.leaves.items()} == expected
    assert count.dense == count.effective == sum(expected.values())


@pytest.mark.parametrize("name", FORMULAS)
def test_masked_flops_are_two_for_each_kept_weight_at_each_place(name):
    apply, params, masks = network(name)
    count = reports.flops(apply, params, IMAGE, masks=masks)
    expected = {
        f"{layer}.kernel": 2
        * PLACES.get(name, {}).get(layer, 1)
        * int(masks[layer]["kernel"][...].sum())
        for layer in FORMULAS[name]
    }
    assert {path: cost.effective for path, cost in count.leaves.items()} == expected
    assert count.effective == sum(expected.values()) < count.dense


@pytest.mark.parametrize("name", ["LeNet300100", "CNN"])
def test_dense_flops_are_those_xla_counts(name):
    """XLA counts biases, activations and pooling, too: at most 2 % here."""
    apply, params, _ = network(name)
    counted = jax.jit(apply).lower(params, IMAGE).compile().cost_analysis()["flops"]
    assert reports.flops(apply, params, IMAGE).dense == pytest.approx(counted, rel=0.02)


def test_flops_of_a_batch_are_those_of_its_images():
    apply, params, masks = network("CNN")
    one = reports.flops(apply, params, IMAGE, masks=masks)
    many = reports.flops(apply, params, jnp.ones((7, 28, 28, 1)), masks=masks)
    assert (many.dense, many.effective) == (7 * one.dense, 7 * one.effective)


def conv(x, w, **options):
    layout = ("NHWC", "HWIO", "NHWC")
    strides = options.pop("strides", (1, 1))
    return lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=layout, **options)


def split(x, w):
    query, key = jnp.split(w, 2, axis=1)
    return jnp.concatenate([x @ query, x @ key[:, ::-1]], -1)


# Functions of one use of each weight: on indicators and ones they count their multiplications.
SINGLE = {
    "product": (lambda w, x: x @ w, (5, 4), (3, 5)),
    "vector": (lambda w, x: x @ w, (5, 4), (5,)),
    "weight first": (lambda w, x: w @ x, (4, 5), (5, 3)),
    "transposed": (lambda w, x: x @ w.T, (4, 5), (3, 5)),
    "heads": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (5, 2, 3), (2, 4, 5)),
    "batched": (lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (3, 5, 4), (3, 2, 5)),
    "reshaped": (lambda w, x: x @ w.reshape(5, -1), (5, 2, 2), (3, 5)),
    "fused": (lambda w, x: split(x, w), (5, 6), (3, 5)),
    "vmapped": (jax.vmap(lambda w, x: x @ w), (3, 5, 4), (3, 2, 5)),
    "convolution": (lambda w, x: conv(x, w), (3, 3, 2, 4), (2, 8, 8, 2)),
    "strided": (lambda w, x: conv(x, w, strides=(2, 3)), (3, 2, 2, 4), (2, 8, 8, 2)),
    "grouped": (lambda w, x: conv(x, w, feature_group_count=2), (3, 3, 2, 4), (1, 6, 6, 4)),
    "depthwise": (lambda w, x: conv(x, w, feature_group_count=4), (3, 3, 1, 8), (1, 6, 6, 4)),
    "dilated": (lambda w, x: conv(x, w, rhs_dilation=(2, 2)), (3, 3, 2, 4), (1, 8, 8, 2)),
    "jitted": (jax.jit(lambda w, x: x @ w), (5, 4), (3, 5)),
    "rematerialized": (jax.checkpoint(lambda w, x: x @ w), (5, 4), (3, 5)),
    "mapped": (lambda w, x: lax.map(lambda one: one[0] @ one[1], (x, w)), (4, 5, 3), (4, 2, 5)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_effective_flops_are_products_with_what_is_not_zero(name):
    function, w_shape, x_shape = SINGLE[name]
    w = holes(*w_shape)
    count = reports.flops(function, w, jax.ShapeDtypeStruct(x_shape, jnp.float32))
    for weight, found in ((w != 0, count.effective), (w == w, count.dense)):
        ones = jnp.ones(x_shape)
        assert found == 2 * int(function(weight.astype(jnp.float32), ones).sum())
    assert count.leaves == {".": (count.dense, count.effective)}
    assert 0 < count.effective < count.dense


# What a function makes of its weight before it multiplies by it; zeros stay zeros.
MADE = {
    "normalized": lambda w: w / jnp.linalg.norm(w, axis=0, keepdims=True),
    "rounded": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "dequantized": lambda w: jnp.round(w / 1e-6).astype(jnp.int32) * jnp.float32(1e-6),
    "custom": lambda w: jax.nn.relu(w),
    "tied": lambda w: jnp.concatenate([w, w], 1)[:, : w.shape[1]],
}


@pytest.mark.parametrize("name", MADE)
def test_weights_count_as_they_are_multiplied(name):
    w = holes(6, 4)
    count = reports.flops(lambda w, x: x @ MADE[name](w), w, draw(1, 6))
    assert count.effective == 2 * np.count_nonzero(w) < count.dense == 2 * 24


def test_masks_inside_the_function_count():
    mask = np.arange(24).reshape(6, 4) % 3 == 0
    count = reports.flops(lambda w, x: x @ jnp.where(mask, w, 0), draw(6, 4), draw(1, 6))
    assert count.effective == 2 * 8


def test_weights_that_a_function_closes_over_count():
    w = holes(6, 4)
    count = reports.flops(lambda v, x: x @ w + v[None], draw(4), draw(1, 6))
    assert (count.effective, count.leaves) == (2 * np.count_nonzero(w), {})


def test_two_weights_count_as_the_sparser_one():
    params = {"a": holes(6, 4), "b": jnp.zeros((4, 5)).at[0].set(1.0)}
    count = reports.flops(lambda v, x: x @ (v["a"] @ v["b"]), params, draw(1, 6))
    inner, outer = 2 * 6 * 4 * 5, 2 * 6 * 5
    assert count.dense == inner + outer
    kept = 2 * 5 * np.count_nonzero((params["a"] @ params["b"])[:, 0])
    assert count.effective == inner // 4 + kept
    assert set(count.leaves) == {"a"}  # The larger one.


def test_tied_weights_count_twice():
    w = holes(6, 6)
    count = reports.flops(lambda w, x: x @ w @ w.T, w, draw(1, 6))
    assert count.leaves == {".": (4 * 36, 4 * np.count_nonzero(w))}


def test_turns_of_a_loop_have_weights_of_their_own():
    stack = jnp.stack([jnp.eye(4), jnp.ones((4, 4)), jnp.zeros((4, 4))])

    def apply(stack, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, stack)[0]

    count = reports.flops(apply, stack, draw(2, 4))
    assert (count.dense, count.effective) == (3 * 2 * 2 * 16, 2 * 2 * (4 + 16 + 0))


def test_loops_count_their_turns():
    def constant(w, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=5)[0]

    def carried(w, x):
        return lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (w, x), length=5)[0][1]

    def positions(w, x):
        return lax.scan(lambda c, t: (jnp.tanh(c @ w) + t, None), x, jnp.arange(5.0))[0]

    for apply in (constant, carried, positions):
        count = reports.flops(apply, jnp.eye(4), draw(2, 4))
        assert (count.dense, count.effective) == (5 * 2 * 2 * 16, 5 * 2 * 2 * 4)


def test_a_carry_that_changes_is_no_weight():
    def apply(w, x):
        return lax.scan(lambda c, _: (c + x.sum(), x @ c), w, length=5)[1]

    count = reports.flops(apply, jnp.eye(4), draw(2, 4))
    assert count.effective == count.dense


def test_while_loops_count_one_turn_and_branches_the_dearest():
    def looped(w, x):
        return lax.while_loop(lambda c: (c @ w).sum() < 9, lambda c: c @ w @ w, x)

    def branched(w, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    count = reports.flops(looped, jnp.eye(4), draw(1, 4))
    assert (count.dense, count.effective) == (3 * 2 * 16, 3 * 2 * 4)
    count = reports.flops(branched, jnp.eye(4), draw(1, 4))
    assert (count.dense, count.effective) == (2 * 2 * 16, 2 * 2 * 4)


def test_weights_picked_by_the_inputs_count_in_full():
    count = reports.flops(lambda w, i: draw(1, 4) @ w[i], jnp.zeros((3, 4, 4)), jnp.int32(1))
    assert (count.dense, count.effective) == (2 * 16, 2 * 16)


def test_products_of_activations_are_of_no_leaf():
    count = reports.flops(lambda w, x: (x @ w) @ (x @ w).T, jnp.eye(4), draw(3, 4))
    assert count.leaves == {".": (2 * 2 * 3 * 16, 2 * 2 * 3 * 4)}
    assert count.dense - count.leaves["."].dense == 2 * 3 * 4 * 3


def test_products_that_are_hidden_are_named():
    mesh = jax.make_mesh((1,), ("i",))
    spec = PartitionSpec()
    shard = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    count = reports.flops(lambda w, x: shard(w, x) + x.max(), jnp.eye(4), draw(3, 4))
    assert count.dense == 0 and len(count.uncounted) == 1
    assert count.uncounted[0].startswith("shard_map at test_flops.py:")


def residual(params, x):
    """Convolutions, a depthwise one among them, an addition, a mean and a product."""
    x = jax.nn.relu(conv(x, params["stem"]))
    y = conv(x, params["depthwise"], feature_group_count=x.shape[-1])
    x = x[:, 1:-1, 1:-1] + conv(jax.nn.relu(y), params["pointwise"])
    return x.mean((1, 2)) @ params["head"]


def test_a_network_with_zeros_costs_what_the_smaller_one_does():
    shapes = {
        "stem": (3, 3, 2, 8),
        "depthwise": (3, 3, 1, 8),
        "pointwise": (1, 1, 8, 8),
        "head": (8, 3),
    }
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((2, 9, 9, 2), jnp.float32)
    groups = dependency.trace(residual, params, x)
    plan = shrinking.plan(groups, {name: np.arange(g.size) for name, g in groups.items()}, keep=5)
    masked = shrinking.expand(shrinking.shrink(params, plan), plan)
    count = reports.flops(residual, masked, x)
    assert (count.dense, count.effective) == plan.flops and plan.flops[1] < plan.flops[0]


def test_masks_count_as_the_zeros_that_they_make():
    apply, params, masks = network("CNN")
    zeroed = jax.tree.map(lambda w, m: np.where(m, 1, np.zeros(w.shape, w.dtype)), params, masks)
    masked = reports.flops(apply, params, IMAGE, masks=masks)
    assert reports.flops(apply, zeroed, IMAGE) == masked


def test_kept_zeros_count_where_masks_say_so():
    w, mask = jnp.zeros((4, 4)), np.eye(4, dtype=bool)
    assert reports.flops(lambda w, x: x @ w, w, draw(1, 4)).effective == 0
    assert reports.flops(lambda w, x: x @ w, w, draw(1, 4), masks=mask).effective == 2 * 4
    channels = np.array([[True, False, False, False]])
    assert reports.flops(lambda w, x: x @ w, w, draw(1, 4), masks=channels).effective == 2 * 4


def test_nan_is_not_zero_and_denormals_are_not():
    w = jnp.asarray([[np.nan, 1e-45, 0.0, -0.0]], jnp.float32)
    assert reports.flops(lambda w, x: x @ w, w, draw(1, 1)).effective == 2 * 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_flops_of_narrow_dtypes(dtype):
    w = jnp.eye(4, dtype=dtype)
    x = jnp.ones((1, 4), dtype)
    count = reports.flops(lambda w, x: lax.dot(x, w), w, x)
    assert (count.dense, count.effective) == (2 * 16, 2 * 4)


def test_flops_of_nothing():
    assert reports.flops(lambda w, x: x + 1, {"w": jnp.ones(3), "none": None}, draw(3)) == (
        0,
        0,
        {},
        (),
    )
    empty = reports.flops(lambda w, x: x @ w, jnp.zeros((0, 3)), jnp.zeros((2, 0)))
    assert (empty.dense, empty.effective) == (0, 0)


def test_leaves_that_are_no_arrays_stay():
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.layers[0].weight, model, jnp.eye(8, 3))
    count = reports.flops(lambda m, x: jax.vmap(m)(x), model, draw(1, 3))
    assert count.leaves == {
        "layers.0.weight": (2 * 24, 2 * 3),
        "layers.1.weight": (2 * 16, 2 * 16),
    }


def test_numpy_params_and_random_weights():
    params = {"key": jax.random.key(0), "w": np.eye(4)}

    def apply(params, x):
        noise = jax.random.bernoulli(params["key"], 0.5, (4, 4))
        return x @ jnp.where(noise, params["w"], 0)

    kept = np.eye(4, dtype=bool) & np.asarray(jax.random.bernoulli(params["key"], 0.5, (4, 4)))
    assert reports.flops(apply, params, draw(1, 4)).effective == 2 * kept.sum()


def test_constants_of_another_trace_are_counted():
    w = holes(6, 4)
    found = []

    @jax.jit
    def outer(x):
        found.append(reports.flops(lambda w, x: x @ w.T.T, w, x).effective)
        return x

    outer(draw(1, 6))
    assert found == [2 * np.count_nonzero(w)]


ERRORS = {
    "no function": (
        lambda: reports.flops(3, jnp.eye(4), draw(1, 4)),
        TypeError,
        r"`apply_fn` must be a function \(params, \*inputs\) -> outputs, got 3",
    ),
    "traced": (
        lambda: jax.jit(lambda w: reports.flops(lambda w, x: x @ w, {"w": w}, w).dense)(jnp.eye(2)),
        TypeError,
        r"`params` must hold arrays whose entries are known, got float32\[2,2\] at 'w', which is "
        "traced; call flops outside of jit",
    ),
    "masks that do not fit": (
        lambda: reports.flops(
            lambda w, x: x @ w, jnp.eye(4), draw(1, 4), masks=np.ones((3, 4), bool)
        ),
        ValueError,
        r"`masks` must broadcast .* at '\.'",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("name", ERRORS)
def test_bad_calls_say_what_is_wrong(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
