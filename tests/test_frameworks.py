"""Everything on the params of every framework: equal to the same arrays in a plain dict."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import sparsejax as sj
from sparsejax import (
    _tree,
    criteria,
    granularities,
    mask_sets,
    masking,
    penalties,
    quantization,
)

pytestmark = pytest.mark.usefixtures("quickly")


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# One network, tanh(x @ KERNEL1 + BIAS1) @ KERNEL2 + BIAS2; 24 + 12 weights are prunable.
BIAS1, KERNEL1, BIAS2, KERNEL2 = LEAVES = draw(0, 6), draw(1, 4, 6), draw(2, 2), draw(3, 6, 2)
INPUTS, TARGETS = draw(4, 8, 4), draw(5, 8, 2)


class Case(NamedTuple):
    """A framework's params, how it applies them, and the paths of their leaves."""

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    paths: list[str]


class Dense(NamedTuple):
    bias: jax.Array
    kernel: jax.Array


def forward(first, second, x):
    (bias1, kernel1), (bias2, kernel2) = first, second
    return jnp.tanh(x @ kernel1 + bias1[None]) @ kernel2 + bias2[None]


def plain_dict():
    params = {
        "dense1": {"bias": BIAS1, "kernel": KERNEL1},
        "dense2": {"bias": BIAS2, "kernel": KERNEL2},
    }

    def apply(params, x):
        return forward(*(layer.values() for layer in params.values()), x)

    return Case(params, apply, DENSE_PATHS)


def plain_list():
    params = [[BIAS1, KERNEL1], [BIAS2, KERNEL2]]
    return Case(params, lambda params, x: forward(*params, x), ["0.0", "0.1", "1.0", "1.1"])


def named_tuple():
    params = (Dense(BIAS1, KERNEL1), Dense(BIAS2, KERNEL2))
    paths = ["0.bias", "0.kernel", "1.bias", "1.kernel"]
    return Case(params, lambda params, x: forward(*params, x), paths)


class NNXNetwork(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense1 = nnx.Linear(4, 6, rngs=rngs)
        self.dense2 = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense2(jnp.tanh(self.dense1(x)))


DENSE_PATHS = ["dense1.bias", "dense1.kernel", "dense2.bias", "dense2.kernel"]


def nnx_model():
    model = NNXNetwork()
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), LEAVES))
    return model


def nnx_split():
    graph, params = nnx.split(nnx_model(), nnx.Param)
    return Case(params, lambda params, x: nnx.merge(graph, params)(x), DENSE_PATHS)


def nnx_state():
    case = nnx_split()
    return case._replace(params=nnx.state(nnx_model(), nnx.Param))


def nnx_pure_state():
    case = nnx_split()
    return case._replace(params=nnx.as_pure(case.params))


def nnx_pure_dict():
    case = nnx_split()
    return case._replace(params=nnx.to_pure_dict(case.params))


def nnx_module():
    return Case(nnx_model(), lambda model, x: model(x), DENSE_PATHS)


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x):
        hidden = linen.Dense(6)(x)
        return linen.Dense(2)(jnp.tanh(hidden))


LINEN_PATHS = ["Dense_0.bias", "Dense_0.kernel", "Dense_1.bias", "Dense_1.kernel"]


def linen_params():
    network = LinenNetwork()
    drawn = network.init(jax.random.key(0), INPUTS)["params"]
    params = jax.tree.unflatten(jax.tree.structure(drawn), LEAVES)
    return Case(params, lambda params, x: network.apply({"params": params}, x), LINEN_PATHS)


def linen_variables():
    case = linen_params()
    paths = [f"params.{path}" for path in LINEN_PATHS]
    return Case({"params": case.params}, LinenNetwork().apply, paths)


def linen_frozen_dict():
    case = linen_params()
    return case._replace(params=FrozenDict(case.params))


class EquinoxNetwork(eqx.Module):
    """With leaves that are no arrays (`activation`), and with static fields."""

    layers: list
    activation: Callable
    width: int = eqx.field(static=True)

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        self.layers = [eqx.nn.Linear(4, 6, key=keys[0]), eqx.nn.Linear(6, 2, key=keys[1])]
        self.activation = jnp.tanh
        self.width = 6

    def __call__(self, x):
        return self.layers[1](self.activation(self.layers[0](x)))


EQUINOX_PATHS = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]


def equinox_module():
    leaves = [KERNEL1.T, BIAS1, KERNEL2.T, BIAS2, jnp.tanh]
    module = jax.tree.unflatten(jax.tree.structure(EquinoxNetwork()), leaves)
    return Case(module, lambda m, x: jax.vmap(m)(x), [*EQUINOX_PATHS, "activation"])


def equinox_arrays():
    params, static = eqx.partition(equinox_module().params, eqx.is_inexact_array)
    return Case(params, lambda p, x: jax.vmap(eqx.combine(p, static))(x), EQUINOX_PATHS)


def haiku_params():
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([6, 2], activation=jnp.tanh)(x))
    )
    drawn = network.init(jax.random.key(0), INPUTS)
    params = jax.tree.unflatten(jax.tree.structure(drawn), LEAVES)
    paths = [f"mlp/~/linear_{i}.{name}" for i in (0, 1) for name in "bw"]
    return Case(params, network.apply, paths)


MAKERS = {
    maker.__name__: functools.cache(maker)
    for maker in (
        plain_dict,
        plain_list,
        named_tuple,
        nnx_split,
        nnx_state,
        nnx_pure_state,
        nnx_pure_dict,
        nnx_module,
        linen_params,
        linen_variables,
        linen_frozen_dict,
        equinox_module,
        equinox_arrays,
        haiku_params,
    )
}
each_framework = pytest.mark.parametrize("framework", MAKERS)
# Optimizers want trees of arrays, so whole Equinox modules have their own test; two others are of
# the same types as the one before them.
NOT_TRAINED = ("equinox_module", "nnx_state", "linen_variables")
each_trainable = pytest.mark.parametrize(
    "framework", [name for name in MAKERS if name not in NOT_TRAINED]
)


def flat(tree):
    """All leaves by their number, `None` among them: what the tree holds, as a plain dict."""
    return dict(enumerate(jax.tree.leaves(tree, is_leaf=lambda x: x is None)))


def twin_of(case):
    """The same arrays in a plain dict."""
    structure = jax.tree.structure(case.params, is_leaf=lambda x: x is None)

    def apply(params, x):
        return case.apply(jax.tree.unflatten(structure, params.values()), x)

    return Case(flat(case.params), apply, [])


def loss(case, params):
    return jnp.mean(optax.l2_loss(case.apply(params, INPUTS), TARGETS))


@functools.cache
def gradients(framework):
    case = MAKERS[framework]()
    return eqx.filter_jit(eqx.filter_grad(lambda params: loss(case, params)))(case.params)


def assert_same_leaves(got, expected):
    """Arrays equal to the bit, in shape and dtype too; anything else the same object."""
    assert got.keys() == expected.keys()
    for i, leaf in expected.items():
        if isinstance(leaf, jax.Array | np.ndarray):
            np.testing.assert_array_equal(got[i], leaf, strict=True)
        else:
            assert got[i] is leaf


OPERATIONS = {
    "magnitude": lambda case, params, grads: criteria.magnitude(params),
    "gradient": lambda case, params, grads: criteria.gradient(params, grads),
    "taylor": lambda case, params, grads: criteria.taylor(params, grads),
    "lamp": lambda case, params, grads: criteria.lamp(params),
    "random": lambda case, params, grads: criteria.random(jax.random.key(1))(params),
    "output_gradient": lambda case, params, grads: criteria.output_gradient(
        case.apply, params, INPUTS
    ),
    "threshold": lambda case, params, grads: masking.threshold(criteria.magnitude(params), 0.5),
    "topk": lambda case, params, grads: masking.topk(criteria.magnitude(params), 0.5),
    "topk_per_leaf": lambda case, params, grads: masking.topk(
        criteria.taylor(params, grads), 0.5, scope="per_leaf"
    ),
    "topk_channels": lambda case, params, grads: masking.topk(
        criteria.magnitude(params), 0.5, granularity=granularities.Channel(pool=jnp.max)
    ),
    "intersection": lambda case, params, grads: mask_sets.intersection(
        halves(params), masking.topk(criteria.taylor(params, grads), 0.5)
    ),
    "prune_masks": lambda case, params, grads: sj.prune_masks(params, grads, 0.1),
    "prune_tree": lambda case, params, grads: sj.prune_tree(params, grads, 0.1),
    "apply_masks": lambda case, params, grads: sj.apply_masks(params, halves(params)),
    "prox": lambda case, params, grads: penalties.l1(0.1).prox(params, 0.5),
    "quantize": lambda case, params, grads: quantization.dequantize(
        quantization.quantize(params, bits=4, axes=())
    ),
    "fake_quantize": lambda case, params, grads: quantization.fake_quantize(params, axes=()),
    "share": lambda case, params, grads: quantization.dequantize(
        quantization.share(params, halves(params), bits=2)
    ),
    "quantization_masks": lambda case, params, grads: quantization.masks(
        quantization.combine(*quantization.partition(quantization.share(params, bits=2)))
    ),
}


def halves(params):
    """Masks that keep the 18 largest of 36 weights."""
    return masking.topk(criteria.magnitude(params), 0.5)


@each_framework
def test_paths_read_like_the_framework(framework):
    case = MAKERS[framework]()
    assert _tree.flatten(case.params).paths == case.paths


@each_framework
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_equals_that_on_a_dict(framework, operation):
    case = MAKERS[framework]()
    twin, grads = twin_of(case), gradients(framework)
    got = OPERATIONS[operation](case, case.params, grads)
    expected = OPERATIONS[operation](twin, twin.params, flat(grads))
    assert jax.tree.structure(got) == jax.tree.structure(case.params)
    assert_same_leaves(flat(got), flat(expected))


@each_framework
def test_operations_are_the_same_jitted(framework):
    case = MAKERS[framework]()

    def some(params, grads):
        names = ("output_gradient", "topk", "prune_tree")
        return {name: OPERATIONS[name](case, params, grads) for name in names}

    jitted = eqx.filter_jit(some)(case.params, gradients(framework))
    eager = some(case.params, gradients(framework))
    assert jax.tree.structure(jitted) == jax.tree.structure(eager)
    for got, expected in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        if callable(expected):
            assert got is expected
        elif expected.dtype == bool:
            np.testing.assert_array_equal(got, expected)
        else:
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@each_framework
def test_topk_prunes_exact_counts(framework):
    params = MAKERS[framework]().params
    scores = criteria.magnitude(params)
    everywhere = masking.sparsity(params, masking.topk(scores, 0.7)).prunable
    by_leaf = masking.sparsity(params, masking.topk(scores, 0.25, scope="per_leaf")).leaves
    assert (everywhere.zeros, everywhere.size) == (25, 36)
    assert sorted(count.zeros for count in by_leaf.values()) == [0, 0, 3, 6]


@each_framework
def test_sparsity_counts_the_leaves_by_path(framework):
    case = MAKERS[framework]()
    pruned = sj.apply_masks(case.params, halves(case.params))
    count = masking.sparsity(pruned)
    assert (count.prunable.zeros, count.total.size) == (18, 44)
    assert list(count.leaves) == [path for path in case.paths if path != "activation"]


TRANSFORMS = {
    "l1_prox": lambda params: optax.chain(sj.l1_prox(0.2), optax.sgd(0.125)),
    "penalized": lambda params: sj.penalized(optax.adam(0.03), penalties.l1(0.2)),
    "proximal": lambda params: sj.proximal(optax.sgd(0.1), penalties.l1(0.2), 0.1),
    "keep_masks": lambda params: sj.keep_masks(optax.adam(0.03), halves(params)),
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS)


def train(case, transform):
    tx = TRANSFORMS[transform](case.params)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda params: loss(case, params))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    return jax.jit(run)(case.params)


@functools.cache
def trained_twin(layout, transform):
    return train(twin_of(MAKERS[layout]()), transform)


def zeros(params):
    return masking.sparsity(params).prunable.zeros


@each_trainable
@each_transform
def test_transform_trains_as_on_a_dict(framework, transform):
    case = MAKERS[framework]()
    got = train(case, transform)
    # All but Equinox hold the same leaves in the same order.
    layout = "equinox_arrays" if framework == "equinox_arrays" else "plain_dict"
    expected = trained_twin(layout, transform)
    assert jax.tree.structure(got) == jax.tree.structure(case.params)
    assert zeros(got) >= 5
    for i, leaf in flat(got).items():
        if leaf is not None:
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(leaf == 0, expected[i] == 0)
            np.testing.assert_allclose(leaf, expected[i], rtol=1e-4, atol=1e-5)


def nnx_step(model, optimizer):
    grads = nnx.grad(lambda model: jnp.mean(optax.l2_loss(model(INPUTS), TARGETS)))(model)
    optimizer.update(model, grads)


@each_transform
def test_transform_trains_an_nnx_model_through_its_optimizer(transform):
    model = nnx_model()
    tx = TRANSFORMS[transform](nnx.state(model, nnx.Param))
    optimizer, step = nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.jit(nnx_step)
    for _ in range(100):
        step(model, optimizer)
    got, expected = jax.tree.leaves(model), jax.tree.leaves(trained_twin("plain_dict", transform))
    for leaf, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(leaf == 0, other == 0)
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)


def test_keep_masks_zeroes_an_nnx_model_through_its_optimizer_without_jit():
    model = nnx_model()
    tx = sj.keep_masks(optax.sgd(0.1), halves(nnx.state(model, nnx.Param)))
    nnx_step(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
    assert zeros(nnx.state(model, nnx.Param)) == 18


@each_transform
def test_transform_trains_a_linen_train_state(transform):
    case = linen_params()
    state = TrainState.create(
        apply_fn=case.apply, params=case.params, tx=TRANSFORMS[transform](case.params)
    )

    @jax.jit
    def step(state):
        grads = jax.grad(lambda params: loss(case, params))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(100):
        state = step(state)
    assert zeros(state.params) == zeros(trained_twin("plain_dict", transform))


@pytest.mark.parametrize("transform", ["l1_prox", "proximal", "keep_masks_sgd"])
def test_transform_trains_a_whole_equinox_module(transform):
    case = equinox_module()
    made = TRANSFORMS | {
        "keep_masks_sgd": lambda params: sj.keep_masks(optax.sgd(0.1), halves(params))
    }
    tx = made[transform](case.params)

    @eqx.filter_jit
    def step(module, state):
        grads = eqx.filter_grad(lambda module: loss(case, module))(module)
        updates, state = tx.update(grads, state, module)
        return eqx.apply_updates(module, updates), state

    module, state = case.params, tx.init(case.params)
    for _ in range(100):
        module, state = step(module, state)
    assert zeros(module) >= 5
    assert module.activation is jnp.tanh


def test_penalized_trains_the_arrays_of_an_equinox_module_with_its_own_apply_updates():
    case = equinox_module()
    tx = TRANSFORMS["penalized"](case.params)

    @eqx.filter_jit
    def step(module, state):
        grads = eqx.filter_grad(lambda module: loss(case, module))(module)
        updates, state = tx.update(grads, state, eqx.filter(module, eqx.is_inexact_array))
        return eqx.apply_updates(module, updates), state

    module, state = case.params, tx.init(eqx.filter(case.params, eqx.is_inexact_array))
    for _ in range(100):
        module, state = step(module, state)
    assert zeros(module) == zeros(trained_twin("equinox_arrays", "penalized"))


OTHER_CONTAINERS = [
    ("nnx_split", "nnx_pure_state"),
    ("nnx_split", "nnx_pure_dict"),
    ("nnx_split", "plain_dict"),
    ("nnx_pure_state", "nnx_split"),
    ("nnx_pure_dict", "nnx_state"),
    ("nnx_module", "plain_dict"),
    ("linen_params", "linen_frozen_dict"),
    ("linen_frozen_dict", "linen_params"),
    ("equinox_arrays", "equinox_module"),
    ("equinox_module", "equinox_arrays"),
]
other_containers = pytest.mark.parametrize(("framework", "other"), OTHER_CONTAINERS)
arrays_alone = pytest.mark.parametrize(("framework", "other"), OTHER_CONTAINERS[:-1])


@arrays_alone
def test_apply_masks_takes_masks_from_another_container_with_the_same_paths(framework, other):
    params = MAKERS[framework]().params
    got = sj.apply_masks(params, halves(MAKERS[other]().params))
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert_same_leaves(flat(got), flat(sj.apply_masks(params, halves(params))))


@arrays_alone
def test_keep_masks_takes_masks_from_another_container_with_the_same_paths(framework, other):
    params = MAKERS[framework]().params
    tx = sj.keep_masks(optax.sgd(0.1), halves(MAKERS[other]().params))
    updates, state = tx.update(params, tx.init(params), params)
    assert zeros(optax.apply_updates(params, updates)) == 18
    assert jax.tree.structure(state.masks) == jax.tree.structure(params)


@other_containers
def test_prune_tree_takes_gradients_from_another_container_with_the_same_paths(framework, other):
    params = MAKERS[framework]().params
    got = sj.prune_tree(params, gradients(other), 0.1)
    assert_same_leaves(flat(got), flat(sj.prune_tree(params, gradients(framework), 0.1)))
