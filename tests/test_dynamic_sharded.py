"""Sparse training on eight devices: data-parallel, and with sharded parameters."""

import contextlib
import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax import dynamic, granularities, schedules

pytestmark = pytest.mark.usefixtures("quickly")

ADAM = optax.adam(2**-6)
KEY = jax.random.key(0)
RAMP = schedules.linear(0.25, 0.75, begin_step=0, end_step=4)
EVERY = 2
WRAPPERS = {
    "gradual": dynamic.gradual(ADAM, RAMP, every=EVERY),
    "set_": dynamic.set_(ADAM, 0.75, 0.3, key=KEY, every=EVERY),
    "rigl": dynamic.rigl(ADAM, 0.75, 0.3, key=KEY, every=EVERY),
    "straight_through": dynamic.straight_through(ADAM, RAMP, every=EVERY),
    "movement": dynamic.movement(ADAM, RAMP, every=EVERY),
}
each_wrapper = pytest.mark.parametrize("name", WRAPPERS)

DEVICES = 8
STEPS = 5
BATCH = 16
SHAPES = {"b": (32,), "v": (16, 24), "w": (64, 32)}
LARGE = (512, 520)  # enough entries for a sample

# Sizes and names of a mesh, and how arrays of a shape are sharded; all others are on every device.
BOTH = PartitionSpec("data", "model")
LAYOUTS = {
    "one axis": (
        (8,),
        ("model",),
        {SHAPES["v"]: PartitionSpec(None, "model"), SHAPES["w"]: PartitionSpec("model")},
    ),
    "both axes": (
        (4, 2),
        ("data", "model"),
        {SHAPES["v"]: BOTH, SHAPES["w"]: BOTH, LARGE: BOTH},
    ),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


# ---- the training of all tests: gradients are exact, in whatever order devices add them


def first_params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def batch(step):
    """Integers, so that sums of products of them are exact."""
    rng = np.random.default_rng(step + 1)
    return tuple(rng.integers(-3, 4, (BATCH, n)).astype(np.float32) for n in (64, 32))


def loss(params, x, y):
    """Linear in the params: the gradients are means of products of `x` and `y`."""
    first = jnp.vdot(x @ params["w"] + params["b"][None], y)
    return (first + jnp.vdot(x[:, :16] @ params["v"], y[:, :24])) / BATCH


def gradients(step):
    x, y = batch(step)
    return {"b": y.sum(0) / BATCH, "v": x[:, :16].T @ y[:, :24] / BATCH, "w": x.T @ y / BATCH}


def moved(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def trained(step, state, params, inputs):
    """The params and the state after each step."""
    history = []
    for given in inputs:
        params, state = step(given, state, params)
        history.append((params, state))
    return history


@functools.cache
def alone(name):
    """The history on one device."""
    tx = WRAPPERS[name]
    params = jax.tree.map(jnp.asarray, first_params())
    step = jax.jit(functools.partial(moved, tx))
    return trained(step, jax.jit(tx.init)(params), params, map(gradients, range(STEPS)))


def assert_same_masks(history, name):
    """After every step."""
    assert len(history) == STEPS
    for (_, state), (_, expected) in zip(history, alone(name), strict=True):
        jax.tree.map(np.testing.assert_array_equal, state.masks, expected.masks)


@each_wrapper
def test_training_alone_changes_masks_at_every_refresh(name):
    masks = [state.masks["w"] for _, state in alone(name)]
    changed = [bool(jnp.any(a != b)) for a, b in itertools.pairwise(masks)]
    assert changed == [(step + 1) % EVERY == 0 for step in range(STEPS - 1)]


# ---- sharded parameters


def mesh_of(layout, kind=AxisType.Auto):
    sizes, names, _ = LAYOUTS[layout]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def shardings(tree, mesh, layout):
    """Those that the layout says, for each array."""
    _, _, specs = LAYOUTS[layout]
    return jax.tree.map(lambda x: NamedSharding(mesh, specs.get(x.shape, PartitionSpec())), tree)


def placed(tree, mesh, layout):
    return jax.device_put(tree, shardings(tree, mesh, layout))


def sharded_init(tx, params, mesh, layout):
    """`init` under `jit`, told how its results are sharded."""
    shapes = jax.eval_shape(tx.init, params)
    return jax.jit(tx.init, out_shardings=shardings(shapes, mesh, layout))


class Training(NamedTuple):
    history: list[Any]
    program: str
    traces: int


@functools.cache
def sharded(name, layout, kind=AxisType.Auto):
    """Training on eight devices."""
    tx, mesh = WRAPPERS[name], mesh_of(layout, kind)
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        params = placed(first_params(), mesh, layout)
        state = sharded_init(tx, params, mesh, layout)(params)
        traces = []

        @jax.jit
        def step(grads, state, params):
            traces.append(None)
            return moved(tx, grads, state, params)

        inputs = [placed(gradients(i), mesh, layout) for i in range(STEPS)]
        program = step.lower(inputs[0], state, params).compile()
        return Training(trained(step, state, params, inputs), program.as_text(), len(traces))


def unlike(tree, expected):
    """The paths of the arrays that are sharded otherwise."""
    rows = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True)
    return [
        jax.tree_util.keystr(path)
        for (path, x), sharding in rows
        if not x.sharding.is_equivalent_to(sharding, x.ndim)
    ]


COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-to-all|collective-\w+|all-reduce|reduce-scatter|"
    r"ragged-all-to-all)(?:-start)?\("
)
COUNTS = 6 * DEVICES  # six candidates
SAMPLE = 2**14


def crossing(text):
    """What crosses between devices: `(kind, entries)` of each collective, the largest last."""
    found = []
    for shapes, kind in COLLECTIVE.findall(text):
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        found.append((kind, sum(math.prod(int(n) for n in s.split(",") if n) for s in sizes)))
    return sorted(found, key=lambda one: one[1])


def test_crossing_sees_params_that_are_gathered():
    mesh = mesh_of("both axes")
    params = placed(first_params(), mesh, "both axes")
    everywhere = NamedSharding(mesh, PartitionSpec())
    text = jax.jit(lambda w: w + 1, out_shardings=everywhere).lower(params["w"]).compile().as_text()
    assert crossing(text)[-1] == ("all-gather", 64 * 32)


@each_layout
@each_wrapper
def test_sharded_training_has_the_masks_of_one_device(name, layout):
    assert_same_masks(sharded(name, layout).history, name)


@each_layout
@each_wrapper
def test_sharded_training_has_the_params_and_moments_of_one_device(name, layout):
    for got, expected in zip(sharded(name, layout).history, alone(name), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected)


@each_layout
@each_wrapper
def test_sharded_training_leaves_params_and_state_sharded_as_they_were(name, layout):
    mesh = mesh_of(layout)
    for after in sharded(name, layout).history:
        assert unlike(after, shardings(after, mesh, layout)) == []


@each_layout
@each_wrapper
def test_sharded_training_moves_only_counts(name, layout):
    found = crossing(sharded(name, layout).program)
    assert 0 < found[-1][1] <= COUNTS, found


@each_wrapper
def test_sharded_training_of_a_large_leaf_moves_counts_and_a_sample(name):
    tx, mesh = WRAPPERS[name], mesh_of("both axes")
    params = {"w": jax.ShapeDtypeStruct(LARGE, jnp.float32)}

    def on_mesh(tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings(tree, mesh, "both axes"),
        )

    state = on_mesh(jax.eval_shape(tx.init, params))
    step = jax.jit(functools.partial(moved, tx))
    text = step.lower(on_mesh(params), state, on_mesh(params)).compile().as_text()
    limits = {"all-reduce": SAMPLE}
    assert [c for c in crossing(text) if c[1] > limits.get(c[0], COUNTS)] == []
    assert crossing(text)[-1] == ("all-reduce", SAMPLE)


@each_layout
@each_wrapper
def test_sharded_training_is_traced_once(name, layout):
    assert sharded(name, layout).traces == 1


@each_wrapper
def test_check_accepts_sharded_params(name):
    params, state = sharded(name, "both axes").history[-1]
    dynamic.check(state, params)


@each_wrapper
def test_check_refuses_sharded_params_that_disobey(name):
    params, state = sharded(name, "both axes").history[-1]
    with pytest.raises(ValueError, match="at 'v'"):
        dynamic.check(state, {**params, "v": params["v"] + 1})


# ---- the state before the first step

MASKED_AT_RANDOM = ("set_", "rigl")


@each_layout
@each_wrapper
def test_init_without_jit_shards_the_state_like_params(name, layout):
    mesh = mesh_of(layout)
    state = WRAPPERS[name].init(placed(first_params(), mesh, layout))
    matrices = [x for x in jax.tree.leaves(state) if x.ndim == 2]
    assert matrices
    assert unlike(matrices, shardings(matrices, mesh, layout)) == []


@each_wrapper
def test_init_without_jit_gives_the_masks_of_one_device(name):
    tx, params = WRAPPERS[name], first_params()
    state = tx.init(placed(params, mesh_of("one axis"), "one axis"))
    jax.tree.map(np.testing.assert_array_equal, state.masks, first_masks(name))


@each_layout
@each_wrapper
def test_init_under_jit_gives_the_masks_of_one_device(name, layout):
    params = placed(first_params(), mesh_of(layout), layout)
    state = sharded_init(WRAPPERS[name], params, mesh_of(layout), layout)(params)
    jax.tree.map(np.testing.assert_array_equal, state.masks, first_masks(name))


@each_layout
@pytest.mark.parametrize("name", MASKED_AT_RANDOM)
def test_init_under_jit_moves_only_counts(name, layout):
    params = placed(first_params(), mesh_of(layout), layout)
    init = sharded_init(WRAPPERS[name], params, mesh_of(layout), layout)
    found = crossing(init.lower(params).compile().as_text())
    assert 0 < found[-1][1] <= COUNTS, found


def test_a_step_shards_masks_that_init_made_on_one_device():
    tx, mesh, layout = WRAPPERS["rigl"], mesh_of("both axes"), "both axes"
    params = placed(first_params(), mesh, layout)
    state = tx.init(first_params())
    grads = placed(gradients(0), mesh, layout)
    _, state = jax.jit(functools.partial(moved, tx))(grads, state, params)
    assert unlike(state.masks, shardings(state.masks, mesh, layout)) == []


@functools.cache
def first_masks(name):
    return WRAPPERS[name].init(first_params()).masks


# ---- explicit meshes


@each_wrapper
def test_training_on_an_explicit_mesh_has_the_masks_of_one_device(name):
    assert_same_masks(sharded(name, "both axes", AxisType.Explicit).history, name)


@each_wrapper
def test_training_on_an_explicit_mesh_leaves_params_and_state_sharded_as_they_were(name):
    mesh = mesh_of("both axes", AxisType.Explicit)
    for after in sharded(name, "both axes", AxisType.Explicit).history:
        assert unlike(after, shardings(after, mesh, "both axes")) == []


@each_wrapper
def test_training_on_an_explicit_mesh_moves_only_counts(name):
    found = crossing(sharded(name, "both axes", AxisType.Explicit).program)
    assert 0 < found[-1][1] <= COUNTS, found


def traced_on_an_explicit_mesh(tx):
    """The shapes after `init` and a step; raises where types, which say shardings, do not fit."""
    mesh = mesh_of("both axes", AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = placed(first_params(), mesh, "both axes")
        grads = placed(gradients(0), mesh, "both axes")
        return jax.eval_shape(lambda g, p: moved(tx, g, tx.init(p), p), grads, params)


@each_wrapper
def test_update_on_an_explicit_mesh_takes_the_state_of_init(name):
    params, _ = traced_on_an_explicit_mesh(WRAPPERS[name])
    assert params["w"].shape == SHAPES["w"]


@pytest.mark.parametrize("wrapper", [dynamic.gradual, dynamic.straight_through, dynamic.movement])
def test_update_on_an_explicit_mesh_takes_channels(wrapper):
    tx = wrapper(ADAM, RAMP, every=EVERY, granularity=granularities.Channel(1))
    params, _ = traced_on_an_explicit_mesh(tx)
    assert params["w"].shape == SHAPES["w"]


def test_update_on_an_explicit_mesh_takes_blocks():
    tx = dynamic.gradual(ADAM, RAMP, every=EVERY, granularity=granularities.Block((2, 2)))
    params, _ = traced_on_an_explicit_mesh(tx)
    assert params["w"].shape == SHAPES["w"]


# ---- sharded batches

DATA = PartitionSpec("data")


def data_mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def grads_of_sharded_batch(params, given):
    return jax.grad(loss)(params, *given)


def mean_over_devices(params, given):
    """Of the gradients of the devices' own parts of the batch; for inside `shard_map`."""
    varying = jax.lax.pcast(params, "data", to="varying")
    own = jax.grad(loss)(varying, *given)
    # The loss divides by the size of the whole batch.
    return jax.lax.psum(own, "data")


def step_by_jit(tx):
    def step(given, state, params):
        return moved(tx, grads_of_sharded_batch(params, given), state, params)

    return jax.jit(step)


def step_by_shard_map(tx):
    """Gradients and update inside."""

    def step(given, state, params):
        return moved(tx, mean_over_devices(params, given), state, params)

    everywhere = PartitionSpec()
    return jax.jit(
        jax.shard_map(
            step, mesh=data_mesh(), in_specs=(DATA, everywhere, everywhere), out_specs=everywhere
        )
    )


def step_outside_shard_map(tx):
    """Gradients inside, the update outside."""
    grads_of = jax.shard_map(
        mean_over_devices,
        mesh=data_mesh(),
        in_specs=(PartitionSpec(), DATA),
        out_specs=PartitionSpec(),
    )

    def step(given, state, params):
        return moved(tx, grads_of(params, given), state, params)

    return jax.jit(step)


@functools.cache
def data_parallel(name, make_step):
    """Training with params on every device, and batches of which each device has a part."""
    tx, mesh = WRAPPERS[name], data_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(first_params(), everywhere)
    state = jax.device_put(tx.init(first_params()), everywhere)
    inputs = [jax.device_put(batch(i), NamedSharding(mesh, DATA)) for i in range(STEPS)]
    step = make_step(tx)
    program = step.lower(inputs[0], state, params).compile()
    return Training(trained(step, state, params, inputs), program.as_text(), 1)


def assert_same_masks_on_every_device(history, name):
    assert len(history) == STEPS
    for (_, state), (_, expected) in zip(history, alone(name), strict=True):
        for path in ("v", "w"):
            shards = state.masks[path].addressable_shards
            assert len({shard.device for shard in shards}) == DEVICES
            for shard in shards:
                np.testing.assert_array_equal(shard.data, expected.masks[path])


@each_wrapper
def test_data_parallel_training_has_the_masks_of_one_device_on_every_device(name):
    assert_same_masks_on_every_device(data_parallel(name, step_by_jit).history, name)


@each_wrapper
def test_data_parallel_training_moves_only_gradients(name):
    found = crossing(data_parallel(name, step_by_jit).program)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(n for _, n in found) == sum(map(math.prod, SHAPES.values())), found


@pytest.mark.parametrize("name", ["gradual", "rigl", "movement"])
def test_data_parallel_training_inside_shard_map_has_the_masks_of_one_device(name):
    assert_same_masks_on_every_device(data_parallel(name, step_by_shard_map).history, name)


def test_data_parallel_training_with_gradients_of_shard_map_has_the_masks_of_one_device():
    history = data_parallel("rigl", step_outside_shard_map).history
    assert_same_masks_on_every_device(history, "rigl")


@each_wrapper
def test_update_inside_shard_map_of_sharded_params_is_refused(name):
    """There every device would see its own shard only, and choose masks for that."""
    tx, mesh, layout = WRAPPERS[name], mesh_of("both axes"), "both axes"
    params = first_params()
    state = jax.eval_shape(tx.init, params)
    specs = [
        jax.tree.map(lambda s: s.spec, shardings(tree, mesh, layout)) for tree in (params, state)
    ]
    update = jax.shard_map(
        functools.partial(moved, tx),
        mesh=mesh,
        in_specs=(specs[0], specs[1], specs[0]),
        out_specs=(specs[0], specs[1]),
    )
    with pytest.raises(TypeError, match="the manual axis types do not match"):
        jax.eval_shape(update, params, state, params)
