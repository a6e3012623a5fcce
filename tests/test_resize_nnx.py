"""Smaller NNX modules: each kind of layer against a module that is built at the smaller size."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures._case import images, random_values, tokens, vectors
from architectures._nnx_sequences import Stacked
from flax import nnx

from sparsejax import dependency, shrinking

pytestmark = pytest.mark.usefixtures("quickly")
VARIABLES = nnx.Any(nnx.Param, nnx.BatchStat)


class Kind(NamedTuple):
    """`build(rngs, *sizes)` before and after; what stays of which group; an input."""

    build: object
    sizes: tuple
    small: tuple
    keep: dict
    x: object


BLOCKS = "a.kernel[3]:blocks-of-2"
EVERY = "a.kernel[3]:every-2"
OUTER = {"a.kernel[1]": 3, "a.kernel[2]": 2}
KINDS = {}


def kind(name, x, sizes, small, keep):
    def register(build):
        assert name not in KINDS
        KINDS[name] = Kind(build, sizes, small, keep, x)
        return build

    return register


class Chain(nnx.Module):
    """Layers `a`, `b`, ... and functions, one after the other."""

    def __init__(self, *layers):
        self.names = [chr(ord("a") + i) for i in range(len(layers))]
        for name, layer in zip(self.names, layers, strict=True):
            setattr(self, name, layer)

    def __call__(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x


@kind("Linear", vectors(3), (8, 7), (5, 6), {"a.kernel": 5, "c.kernel": 6})
def linear(rngs, h, k):
    return Chain(
        nnx.Linear(3, h, rngs=rngs),
        jax.nn.relu,
        nnx.Linear(h, k, use_bias=False, rngs=rngs),
        jax.nn.relu,
        nnx.Linear(k, 2, rngs=rngs),
    )


@kind("Conv", images(), (8, 6), (5, 4), {"a.kernel": 5, "c.kernel": 4})
def conv(rngs, h, k):
    return Chain(
        nnx.Conv(3, h, (3, 3), rngs=rngs),
        jax.nn.relu,
        nnx.Conv(h, k, (1, 1), use_bias=False, rngs=rngs),
        jax.nn.relu,
        nnx.Conv(k, 2, (3, 3), rngs=rngs),
    )


@kind("Conv of sequences", vectors(6, 3), (8,), (5,), {"a.kernel": 5})
def conv_1d(rngs, h):
    return Chain(nnx.Conv(3, h, 3, rngs=rngs), nnx.Conv(h, 2, 3, rngs=rngs))


@kind("Conv in whole groups", images(), (8, 12, 4), (4, 6, 2), {BLOCKS: 2})
def grouped(rngs, h, k, groups):
    return Chain(
        nnx.Conv(3, h, (1, 1), rngs=rngs),
        nnx.Conv(h, k, (3, 3), feature_group_count=groups, rngs=rngs),
        nnx.Conv(k, 2, (1, 1), rngs=rngs),
    )


@kind("depthwise Conv", images(), (8,), (5,), {"a.kernel": 5})
def depthwise(rngs, h):
    return Chain(
        nnx.Conv(3, h, (1, 1), rngs=rngs),
        nnx.Conv(h, h, (3, 3), feature_group_count=h, rngs=rngs),
        nnx.Conv(h, 2, (1, 1), rngs=rngs),
    )


@kind("Conv inside groups", images(), (8, 12, 4), (4, 8, 4), {EVERY: 1, "b.kernel": 2})
def inside_groups(rngs, h, k, groups):
    return grouped(rngs, h, k, groups)


@kind("depthwise Conv with a multiplier", images(), (8, 3), (5, 2), {"a.kernel": 5, "b.kernel": 2})
def multiplied(rngs, h, by):
    return Chain(
        nnx.Conv(3, h, (1, 1), rngs=rngs),
        nnx.Conv(h, by * h, (3, 3), feature_group_count=h, rngs=rngs),
        nnx.Conv(by * h, 2, (1, 1), rngs=rngs),
    )


@kind("ConvTranspose", images(), (8, 6), (5, 4), {"a.kernel": 5, "b.kernel": 4})
def transposed(rngs, h, k):
    return Chain(
        nnx.Conv(3, h, (1, 1), rngs=rngs),
        nnx.ConvTranspose(h, k, (2, 2), (2, 2), rngs=rngs),
        nnx.Conv(k, 2, (1, 1), rngs=rngs),
    )


@kind(
    "ConvTranspose of a transposed kernel", images(), (8, 6), (5, 4), {"a.kernel": 5, "b.kernel": 4}
)
def transposed_kernel(rngs, h, k):
    return Chain(
        nnx.Conv(3, h, (1, 1), rngs=rngs),
        nnx.ConvTranspose(h, k, (2, 2), (2, 2), transpose_kernel=True, rngs=rngs),
        nnx.Conv(k, 2, (1, 1), rngs=rngs),
    )


@kind("LinearGeneral", vectors(3), (4, 6, 5), (3, 2, 4), OUTER | {"c.kernel": 4})
def general(rngs, h, k, n):
    return Chain(
        nnx.LinearGeneral(3, (h, k), rngs=rngs),
        jax.nn.relu,
        nnx.LinearGeneral((h, k), n, axis=(-2, -1), rngs=rngs),
        nnx.LinearGeneral(n, (2,), rngs=rngs),
    )


def batch_second(x):
    return x.swapaxes(0, 1)


def total(x):
    return x.sum(0)


@kind("LinearGeneral of a batch axis", vectors(3), (4, 6, 5), (3, 2, 4), OUTER | {"c.kernel": 4})
def general_of_batch(rngs, h, k, n):
    return Chain(
        nnx.LinearGeneral(3, (h, k), rngs=rngs),
        batch_second,
        nnx.LinearGeneral(k, n, batch_axis={0: h}, rngs=rngs),
        total,
        nnx.Linear(n, 2, rngs=rngs),
    )


@kind("Einsum", vectors(3), (4, 6), (3, 2), OUTER)
def einsum(rngs, h, k):
    return Chain(
        nnx.Einsum("bi,ihk->bhk", (3, h, k), (h, k), rngs=rngs),
        jax.nn.relu,
        nnx.Einsum("bhk,hko->bo", (h, k, 2), (2,), rngs=rngs),
    )


@kind("Embed", tokens(), (8,), (5,), {"a.embedding": 5})
def embed(rngs, h):
    return Chain(nnx.Embed(11, h, rngs=rngs), nnx.Linear(h, 2, rngs=rngs))


def normed(norm):
    def build(rngs, h):
        return Chain(
            nnx.Conv(3, h, (3, 3), rngs=rngs), norm(rngs, h), nnx.Conv(h, 2, (1, 1), rngs=rngs)
        )

    return build


for name, norm in {
    "BatchNorm": lambda rngs, h: nnx.BatchNorm(h, use_running_average=True, rngs=rngs),
    "BatchNorm without params": lambda rngs, h: nnx.BatchNorm(
        h, use_running_average=True, use_bias=False, use_scale=False, rngs=rngs
    ),
    "LayerNorm": lambda rngs, h: nnx.LayerNorm(h, rngs=rngs),
    "LayerNorm without bias": lambda rngs, h: nnx.LayerNorm(h, use_bias=False, rngs=rngs),
    "RMSNorm": lambda rngs, h: nnx.RMSNorm(h, rngs=rngs),
    "InstanceNorm": lambda rngs, h: nnx.InstanceNorm(h, rngs=rngs),
}.items():
    kind(name, images(), (8,), (5,), {"a.kernel": 5})(normed(norm))


def group_normed(rngs, h, groups):
    return normed(lambda rngs, h: nnx.GroupNorm(h, groups, rngs=rngs))(rngs, h)


kind("GroupNorm in whole groups", images(), (12, 4), (6, 2), {"a.kernel[3]:blocks-of-3": 2})(
    group_normed
)
kind("GroupNorm inside groups", images(), (12, 4), (8, 4), {"a.kernel[3]:every-3": 2})(group_normed)


class Recurrent(nnx.Module):
    def __init__(self, cell, rngs, h, k):
        self.a = nnx.RNN(cell(3, h, rngs=rngs), rngs=False)
        self.b = nnx.RNN(cell(h, k, rngs=rngs), rngs=False)
        self.c = nnx.Linear(k, 2, rngs=rngs)

    def __call__(self, x):
        rngs = nnx.Rngs(0)
        return self.c(self.b(self.a(x, rngs=rngs), rngs=rngs)[:, -1])


for cell in (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell):
    hidden = "hf" if cell is nnx.LSTMCell else "dense_h"
    kept = {f"a.cell.{hidden}.kernel": 5, f"b.cell.{hidden}.kernel": 4}
    kind(cell.__name__, vectors(4, 3), (7, 6), (5, 4), kept)(functools.partial(Recurrent, cell))


def attention(rngs, h, heads, width, k, kv):
    return Chain(
        nnx.Linear(3, h, rngs=rngs),
        nnx.MultiHeadAttention(heads, h, heads * width, k, kv, decode=False, rngs=rngs),
        nnx.Linear(k, 2, rngs=rngs),
    )


WIDTHS = {"b.query.kernel[2]": 3, "b.value.kernel": 3}
for name, small, keep in (
    ("of fewer heads", (9, 4, 4, 7, 4), {"b.query.kernel[1]": 4}),
    ("of fewer inputs and outputs", (5, 6, 4, 3, 6), {"a.kernel": 5, "b.out.kernel": 3}),
    ("of narrower heads", (9, 6, 3, 7, 6), WIDTHS),
):
    kind(f"MultiHeadAttention {name}", vectors(5, 3), (9, 6, 4, 7, 6), small, keep)(attention)


for name, small, keep in (
    ("of fewer heads", (9, 4, 4, 7, 2), {"b.query.kernel[1]:blocks-of-2": 2}),
    ("of fewer queries a head", (9, 3, 4, 7, 3), {"b.query.kernel[1]:every-2": 1}),
):
    kind(f"grouped-query attention {name}", vectors(5, 3), (9, 6, 4, 7, 3), small, keep)(attention)


# ---- what the tests do with a model


def filled(build):
    """A model with random values, made without any weights drawn."""
    graph, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, random_values(state))


def taken_apart(model):
    """A pure function of params and statistics, and these."""
    graph, variables, rest = nnx.split(model, VARIABLES, ...)

    def apply(variables, *inputs):
        return nnx.merge(graph, variables, rest)(*inputs)

    return apply, variables


def planned(model, *inputs, **options):
    """Groups, and a plan of random unit scores: by half where no amount is given."""
    apply, variables = taken_apart(model)
    groups = dependency.trace(apply, variables, *inputs)
    rng = np.random.default_rng(1)
    scores = {name: rng.normal(size=group.size) for name, group in groups.items()}
    return groups, shrinking.plan(groups, scores, **(options or {"sparsity": 0.5}))


def masked(model, plan):
    """The big model with zeros in place of what goes."""
    apply, variables = taken_apart(model)
    zeroed = shrinking.expand(shrinking.shrink(variables, plan), plan)
    return lambda *inputs: apply(zeroed, *inputs)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def shapes(model):
    return {path: x.shape for path, x in nnx.to_flat_state(nnx.state(model))}


@functools.cache
def of_kind(name):
    """(model, groups, plan, resized)"""
    row = KINDS[name]
    model = filled(lambda: row.build(nnx.Rngs(0), *row.sizes))
    groups, plan = planned(model, row.x, keep=row.keep)
    return model, groups, plan, shrinking.resize_nnx(model, plan)


each_kind = pytest.mark.parametrize("name", KINDS)


# ---- every kind of layer


@each_kind
def test_resize_nnx_gives_the_module_that_is_built_at_that_size(name):
    row, (*_, small) = KINDS[name], of_kind(name)
    fresh = nnx.eval_shape(lambda: row.build(nnx.Rngs(0), *row.small))
    # The definitions hold all that layers store beside their arrays.
    assert nnx.graphdef(small) == nnx.graphdef(fresh)
    assert shapes(small) == shapes(fresh)


@each_kind
def test_resize_nnx_equals_the_masked_module(name):
    model, groups, plan, small = of_kind(name)
    x = KINDS[name].x
    got = small(x)
    if any(groups[cut].rerun for cut in plan.removed):
        assert got.shape == jax.eval_shape(model, x).shape and bool(jnp.isfinite(got).all())
    else:
        assert_close(got, masked(model, plan)(x))


@each_kind
def test_resize_nnx_shares_nothing_with_the_model(name):
    model, _, _, small = of_kind(name)
    variables, others = ([x for _, x in nnx.to_flat_state(nnx.state(m))] for m in (model, small))
    assert not {id(x) for _, x in nnx.iter_graph(model) if isinstance(x, nnx.Variable)} & {
        id(x) for _, x in nnx.iter_graph(small) if isinstance(x, nnx.Variable)
    }
    places, other_places = (
        {x[...].unsafe_buffer_pointer() for x in xs if x.size} for xs in (variables, others)
    )
    assert not places & other_places


def test_resize_nnx_leaves_the_model_as_it_is():
    row = KINDS["Conv in whole groups"]
    model = filled(lambda: row.build(nnx.Rngs(0), *row.sizes))
    graph, before = nnx.split(model)
    before = jax.tree.map(np.array, before)
    small = shrinking.resize_nnx(model, planned(model, row.x, keep=row.keep)[1])
    small.b.bias[...] = jnp.full_like(small.b.bias[...], 7.0)
    small.a.kernel_shape = ()
    assert nnx.graphdef(model) == graph
    for x, y in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "name", ["Conv inside groups", "BatchNorm", "GRUCell", "MultiHeadAttention of fewer heads"]
)
def test_resize_nnx_gives_a_module_that_trains(name):
    row = KINDS[name]
    model = filled(lambda: row.build(nnx.Rngs(0), *row.sizes))
    small = shrinking.resize_nnx(model, planned(model, row.x, keep=row.keep)[1])
    small.train()
    optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)

        def loss(model):
            return jnp.square(model(row.x) - 1).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(small, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0] and len(traces) == 1


# ---- where a layer may stand


class Held(nnx.Module):
    """Layers in containers of every kind."""

    def __init__(self, rngs):
        self.first = nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), jax.nn.relu)
        self.list = nnx.List([nnx.Linear(8, 7, rngs=rngs), nnx.Linear(7, 8, rngs=rngs)])
        self.dict = nnx.Dict(inner=nnx.Linear(8, 6, rngs=rngs))
        self.plain = nnx.data({"a": [nnx.Linear(6, 5, rngs=rngs)], "b": (jax.nn.relu,)})
        self.many = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(11)])
        self.last = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for layer in self.list:
            x = jax.nn.relu(layer(x))
        x = self.plain["b"][0](self.plain["a"][0](self.dict.inner(x)))
        for layer in self.many:
            x = jax.nn.relu(layer(x))
        return self.last(x)


def assert_sizes_fit(model):
    """Every linear layer stores the shape of its kernel."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Linear):
            assert (layer.in_features, layer.out_features) == layer.kernel.shape[-2:]


def test_resize_nnx_reaches_layers_in_containers():
    model = filled(lambda: Held(nnx.Rngs(0)))
    x = vectors(3)
    _, plan = planned(model, x)
    assert len(plan.removed) == 16
    small = shrinking.resize_nnx(model, plan)
    assert_sizes_fit(small)
    assert_sizes_fit(model)
    assert small.many[10].kernel.shape == small.plain["a"][0].bias.shape * 2 == (3, 3)
    assert_close(small(x), masked(model, plan)(x))


class Shared(nnx.Module):
    """A layer under two names, of which its state has the second, and a kernel in two layers."""

    def __init__(self, rngs):
        self.inputs = nnx.Linear(3, 8, rngs=rngs)
        self.own = nnx.Linear(8, 8, rngs=rngs)
        self.again = self.own
        self.tied = nnx.Linear(8, 8, rngs=rngs)
        self.tied.kernel = self.own.kernel
        self.outputs = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.own(self.inputs(x)))
        return self.outputs(jax.nn.relu(self.tied(jax.nn.relu(self.again(x)))))


def test_resize_nnx_keeps_what_is_shared():
    model = filled(lambda: Shared(nnx.Rngs(0)))
    x = vectors(3)
    _, plan = planned(model, x)
    assert "again.kernel" in plan.leaves and "own.kernel" not in plan.leaves
    small = shrinking.resize_nnx(model, plan)
    assert small.own is small.again and small.own.kernel is small.tied.kernel
    assert_sizes_fit(small)
    assert small.tied.in_features == 4
    assert_close(small(x), masked(model, plan)(x))


def test_resize_nnx_refuses_two_cuts_of_a_shared_layer():
    def apply(variables, x):
        return x @ variables["own"]["kernel"][...] @ variables["again"]["kernel"][...]

    model = nnx.Dict(own=nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)))
    model.again = model.own
    variables = {name: {"kernel": jnp.ones((4, 4))} for name in ("own", "again")}
    groups = dependency.trace(apply, variables, jnp.ones((1, 4)))
    plan = shrinking.plan(groups, variables, sparsity=0.5)
    with pytest.raises(ValueError, match=r"in one way: '(own|again)\.kernel' and '(own|again)\.k"):
        shrinking.resize_nnx(model, plan)


def test_resize_nnx_takes_stacked_layers():
    model = filled(lambda: Stacked(rngs=nnx.Rngs(0)))
    x = vectors(5)
    groups, plan = planned(model, x, sparsity=0.5, only="layers.linear1.*")
    assert not any(groups[name].rerun for name in plan.removed)
    small = shrinking.resize_nnx(model, plan)
    assert small.layers.linear1.kernel.shape == (3, 6, 4)
    assert_sizes_fit(small)
    assert_close(small(x), masked(model, plan)(x))


def test_resize_nnx_sets_all_sizes_of_stacked_layers():
    class Block(nnx.Module):
        def __init__(self, rngs, width, head, groups):
            self.conv = nnx.Conv(width, width, 3, rngs=rngs)
            self.norms = nnx.List(
                [nnx.LayerNorm(width, rngs=rngs), nnx.GroupNorm(width, groups, rngs=rngs)]
            )
            self.attention = nnx.MultiHeadAttention(2, width, 2 * head, decode=False, rngs=rngs)
            self.einsum = nnx.Einsum("bli,ij->blj", (width, width), (width,), rngs=rngs)

        def __call__(self, x):
            for norm in self.norms:
                x = x + norm(self.conv(x))
            return x + self.attention(x) + self.einsum(x)

    def build(rngs, width, head, groups):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs, width, head, groups)

        return Scanned(nnx.Linear(3, width, rngs=rngs), make(rngs), nnx.Linear(width, 2, rngs=rngs))

    model = filled(lambda: build(nnx.Rngs(0), 6, 4, 3))
    widths = {"layers.attention.key.bias[2]": 3, "layers.attention.value.bias": 3}
    keep = {"first.kernel[1]:blocks-of-2": 2} | widths
    _, plan = planned(model, vectors(5, 3), keep=keep)
    small = shrinking.resize_nnx(model, plan)
    fresh = nnx.eval_shape(lambda: build(nnx.Rngs(0), 4, 3, 2))
    assert nnx.graphdef(small) == nnx.graphdef(fresh)
    assert shapes(small) == shapes(fresh)


class Scanned(nnx.Module):
    def __init__(self, first, layers, last):
        self.first, self.layers, self.last = first, layers, last

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return self.last(forward(self.first(x), self.layers))


# ---- users' own classes and arrays


class MultiHeadAttention(nnx.Module):
    """A user's own, of the name that Flax has, too."""

    def __init__(self, width, rngs):
        self.qkv = nnx.Linear(width, 12, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return self.out(jax.nn.softmax(q @ k.T) @ v)


class Scaled(nnx.Linear):
    """A layer of Flax and something more."""

    def __init__(self, inputs, outputs, rngs):
        super().__init__(inputs, outputs, rngs=rngs)
        self.alpha = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.alpha[...] * super().__call__(x)


def test_resize_nnx_takes_users_classes():
    model = filled(
        lambda: Chain(Scaled(3, 8, nnx.Rngs(0)), jax.nn.relu, MultiHeadAttention(8, nnx.Rngs(1)))
    )
    x = vectors(3)
    _, plan = planned(model, x)
    small = shrinking.resize_nnx(model, plan)
    assert (small.a.out_features, small.c.qkv.in_features) == (4, 4)
    assert_close(small(x), masked(model, plan)(x))


class Bare(nnx.Module):
    """Arrays that are no variables: as attributes, and in a list."""

    def __init__(self):
        self.first = nnx.data(jnp.ones((3, 8)))
        self.rest = nnx.data([jnp.ones((8, 6)), jnp.ones((6, 2))])

    def __call__(self, x):
        for w in (self.first, *self.rest):
            x = jnp.sin(x @ w)
        return x


def test_resize_nnx_cuts_arrays_that_are_no_variables():
    model = Bare()
    graph, state = nnx.split(model)
    groups = dependency.trace(lambda s, x: nnx.merge(graph, s)(x), state, vectors(3))
    plan = shrinking.plan(groups, jax.tree.map(jnp.abs, state), sparsity=0.5)
    small = shrinking.resize_nnx(model, plan)
    assert [w.shape for w in (small.first, *small.rest)] == [(3, 4), (4, 3), (3, 2)]
    zeroed = shrinking.expand(shrinking.shrink(state, plan), plan)
    assert_close(small(vectors(3)), nnx.merge(graph, zeroed)(vectors(3)))


def test_resize_nnx_cuts_the_masks_of_convolutions():
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((3, 3, 8, 6)) < 0.5, jnp.float32)
    model = Chain(
        nnx.Conv(3, 8, (1, 1), rngs=nnx.Rngs(0)),
        nnx.Conv(8, 6, (3, 3), mask=mask, rngs=nnx.Rngs(1)),
        nnx.Conv(6, 2, (1, 1), rngs=nnx.Rngs(2)),
    )
    _, plan = planned(model, images())
    small = shrinking.resize_nnx(model, plan)
    kept = np.ix_(range(3), range(3), plan.kept("a.kernel"), plan.kept("b.kernel"))
    np.testing.assert_array_equal(small.b.mask, mask[kept])
    assert_close(small(images()), masked(model, plan)(images()))


def test_resize_nnx_takes_plans_of_variables_in_a_dict():
    row = KINDS["BatchNorm"]
    model = filled(lambda: row.build(nnx.Rngs(0), *row.sizes))
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    variables = {"params": params, "stats": stats}

    def apply(variables, x):
        return nnx.merge(graph, variables["params"], variables["stats"])(x)

    groups = dependency.trace(apply, variables, row.x)
    plan = shrinking.plan(groups, variables, keep={"params.a.kernel": 5})
    small = shrinking.resize_nnx(model, plan)
    fresh = nnx.eval_shape(lambda: row.build(nnx.Rngs(0), *row.small))
    assert nnx.graphdef(small) == nnx.graphdef(fresh)
    assert shapes(small) == shapes(fresh)


# ---- errors


def some_plan():
    return of_kind("Linear")[2]


@pytest.mark.parametrize("model", [None, {"a": nnx.Linear}, nnx.Linear, jnp.ones(3)])
def test_resize_nnx_refuses_what_is_no_module(model):
    with pytest.raises(TypeError, match=r"`model` must be an nnx\.Module, got "):
        shrinking.resize_nnx(model, some_plan())


def test_resize_nnx_refuses_what_is_no_plan(as_users_have_it):
    with pytest.raises(TypeError, match=r"`plan` must be a shrinking\.Plan, got "):
        shrinking.resize_nnx(of_kind("Linear")[0], {"a.kernel": 3})


def test_resize_nnx_refuses_the_plan_of_another_model():
    for name, message in (
        ("Embed", r"it cuts 'a\.\w+', which is not among the variables \('a\.embedding', "),
        ("Conv", r"`tree` must have the shapes before the cut: at '[ac]\.(kernel|bias)'"),
    ):
        model = of_kind(name)[0]
        before = shapes(model)
        with pytest.raises(ValueError, match=message):
            shrinking.resize_nnx(model, some_plan())
        assert shapes(model) == before


def test_resize_nnx_refuses_a_plan_that_was_carried_out():
    *_, plan, small = of_kind("Linear")
    with pytest.raises(ValueError, match=r"must have the shapes before the cut"):
        shrinking.resize_nnx(small, plan)
