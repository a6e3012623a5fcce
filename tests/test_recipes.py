"""`examples/recipes`, and every wrapper of `dynamic` in the training loops of every framework."""

import contextlib
import functools
import io
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import sparsejax as sj
from sparsejax import dynamic, masking, schedules

pytestmark = pytest.mark.usefixtures("quickly")

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
NAMES = ("bare_loop", "nnx_optimizer", "linen_train_state", "resume", "sparse_checkpoints")
each_recipe = pytest.mark.parametrize("name", NAMES)


class Run(NamedTuple):
    """The last line that a recipe printed, and what it trained."""

    line: str
    params: Any
    state: Any


def run(name, steps, folder):
    """The recipe as a user starts it, in this process."""
    seen, original = [], dynamic.check

    def check(state, params):
        original(state, params)
        seen.append((params, state))

    path = str(RECIPES / f"{name}.py")
    out = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch.object(sys, "argv", [path, str(steps)]))
        stack.enter_context(mock.patch.object(dynamic, "check", check))
        # The suite forbids what every script may do: `x @ w + b`.
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        runpy.run_path(path, run_name="__main__")
    ((params, state),) = seen
    return Run(out.getvalue().splitlines()[-1], params, state)


@pytest.fixture(scope="module", params=NAMES)
def short_run(request, tmp_path_factory):
    """Each recipe once, on a few steps."""
    return run(request.param, 24, tmp_path_factory.mktemp(request.param))


def numbers_in(line):
    accuracy, zeros, size = re.fullmatch(
        r"accuracy ([\d.]+)%, ([\d,]+) of ([\d,]+) weights are zero", line
    ).groups()
    return float(accuracy) / 100, int(zeros.replace(",", "")), int(size.replace(",", ""))


def test_recipe_prints_the_exact_sparsity(short_run):
    _, zeros, size = numbers_in(short_run.line)
    assert (zeros, size) == (round(0.95 * 266_200), 266_200)


def test_recipe_masks_have_the_exact_sparsity(short_run):
    found = short_run
    masks = dynamic.masks(found.state)
    assert masking.sparsity(found.params, masks).prunable.zeros == round(0.95 * 266_200)


def test_recipe_params_are_exactly_zero_where_masks_prune(short_run):
    found = short_run
    masked = sj.apply_masks(found.params, dynamic.masks(found.state))
    for leaf, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(masked), strict=True):
        np.testing.assert_array_equal(leaf, other)


@each_recipe
def test_recipe_is_short(name):
    assert len((RECIPES / f"{name}.py").read_text().splitlines()) <= 65


def test_every_recipe_is_tested():
    assert {path.stem for path in RECIPES.glob("*.py")} == set(NAMES)


@pytest.mark.long
@each_recipe
def test_recipe_learns_digits(name, tmp_path):
    """Chance is 10 %; 500 steps are a quarter of the default."""
    accuracy, _, _ = numbers_in(run(name, 500, tmp_path).line)
    assert accuracy >= 0.9


# One network, tanh(x @ w1 + b1) @ w2 + b2, of which 24 + 12 weights are prunable.
RNG = np.random.default_rng(0)
INPUTS, TARGETS = (jnp.asarray(RNG.normal(size=(8, n)), jnp.float32) for n in (4, 2))
STEPS = 8


def rising():
    return schedules.linear(0.0, 0.5, begin_step=1, end_step=5)


WRAPPERS = {
    "gradual": lambda inner: dynamic.gradual(inner, rising(), every=2),
    "set_": lambda inner: dynamic.set_(inner, 0.5, 0.3, key=jax.random.key(0), every=2),
    "rigl": lambda inner: dynamic.rigl(inner, 0.5, 0.3, key=jax.random.key(0), every=2),
    "straight_through": lambda inner: dynamic.straight_through(inner, rising(), every=2),
    "movement": lambda inner: dynamic.movement(inner, rising(), every=2),
}


class Loop(NamedTuple):
    """A framework's training loop: one step, and where it has its params and state."""

    carry: Any
    step: Callable[[Any], Any]
    params_of: Callable[[Any], Any]
    state_of: Callable[[Any], Any]
    traces: list


def error(outputs):
    return jnp.mean(optax.l2_loss(outputs, TARGETS))


class EquinoxNetwork(eqx.Module):
    """With a leaf that is no array, `activation`."""

    layers: list
    activation: Callable

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        self.layers = [eqx.nn.Linear(4, 6, key=keys[0]), eqx.nn.Linear(6, 2, key=keys[1])]
        self.activation = jnp.tanh

    def __call__(self, x):
        return self.layers[1](self.activation(self.layers[0](x)))


def equinox_loop(tx):
    traces, model = [], EquinoxNetwork()
    arrays = functools.partial(eqx.filter, filter_spec=eqx.is_inexact_array)
    state = tx.init(arrays(model))
    model = sj.apply_masks(model, dynamic.masks(state))

    @eqx.filter_jit
    def step(carry):
        traces.append(None)
        model, state = carry
        grads = eqx.filter_grad(lambda model: error(jax.vmap(model)(INPUTS)))(model)
        updates, state = tx.update(grads, state, arrays(model))
        return eqx.apply_updates(model, updates), state

    return Loop((model, state), step, lambda c: arrays(c[0]), lambda c: c[1], traces)


def haiku_loop(tx):
    traces = []
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([6, 2], activation=jnp.tanh)(x))
    )
    params = network.init(jax.random.key(0), INPUTS)
    state = tx.init(params)
    params = sj.apply_masks(params, dynamic.masks(state))

    @jax.jit
    def step(carry):
        traces.append(None)
        params, state = carry
        grads = jax.grad(lambda params: error(network.apply(params, INPUTS)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Loop((params, state), step, lambda c: c[0], lambda c: c[1], traces)


class NNXNetwork(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense1, self.dense2 = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense2(jnp.tanh(self.dense1(x)))


def nnx_model(tx):
    model = NNXNetwork()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    masks = dynamic.masks(optimizer.opt_state)
    nnx.update(model, sj.apply_masks(nnx.state(model, nnx.Param), masks))
    return model, optimizer


def nnx_update(model, optimizer):
    optimizer.update(model, nnx.grad(lambda model: error(model(INPUTS)))(model))


def nnx_jit_loop(tx):
    """`nnx.jit`, which changes the model and the optimizer in place."""
    traces = []

    @nnx.jit
    def update(model, optimizer):
        traces.append(None)
        nnx_update(model, optimizer)

    def step(carry):
        update(*carry)
        return carry

    return Loop(
        nnx_model(tx), step, lambda c: nnx.state(c[0], nnx.Param), lambda c: c[1].opt_state, traces
    )


def nnx_split_loop(tx):
    """`nnx.split` once, and `jax.jit`."""
    traces = []
    graph, variables = nnx.split(nnx_model(tx))

    @jax.jit
    def step(variables):
        traces.append(None)
        model, optimizer = nnx.merge(graph, variables)
        nnx_update(model, optimizer)
        return nnx.state((model, optimizer))

    def parts(variables):
        return nnx.merge(graph, variables)

    return Loop(
        variables,
        step,
        lambda c: nnx.state(parts(c)[0], nnx.Param),
        lambda c: parts(c)[1].opt_state,
        traces,
    )


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(jnp.tanh(linen.Dense(6)(x)))


def train_state_loop(tx):
    traces, network = [], LinenNetwork()
    params = network.init(jax.random.key(0), INPUTS)["params"]
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
    masks = dynamic.masks(state.opt_state)

    @jax.jit
    def step(state):
        traces.append(None)
        grads = jax.grad(lambda p: error(state.apply_fn({"params": p}, INPUTS)))(state.params)
        return state.apply_gradients(grads=grads)

    start = state.replace(params=sj.apply_masks(params, masks))
    return Loop(start, step, lambda c: c.params, lambda c: c.opt_state, traces)


LOOPS = {
    "equinox": equinox_loop,
    "haiku": haiku_loop,
    "nnx_jit": nnx_jit_loop,
    "nnx_split": nnx_split_loop,
    "train_state": train_state_loop,
}


class Trained(NamedTuple):
    """Copies of the params and the masks after every step, and how often the step was traced."""

    wrapper: str
    start: list
    params: list
    masks: list
    pruned: list
    traces: int


def copies(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


@functools.cache
def train(framework, wrapper):
    loop = LOOPS[framework](WRAPPERS[wrapper](optax.adam(0.05)))
    carry = loop.carry
    start, params, masks, pruned = copies(loop.params_of(carry)), [], [], []
    for _ in range(STEPS):
        carry = loop.step(carry)
        params.append(copies(loop.params_of(carry)))
        masks.append(copies(dynamic.masks(loop.state_of(carry))))
        pruned.append(sum(np.sum(~mask) for mask in masks[-1]))
    return Trained(wrapper, start, params, masks, pruned, len(loop.traces))


@pytest.fixture(
    scope="module", params=[f"{framework}-{wrapper}" for framework in LOOPS for wrapper in WRAPPERS]
)
def trained(request):
    return train(*request.param.split("-"))


def test_params_are_exactly_zero_where_masks_prune_after_every_step(trained):
    for params, masks in zip(trained.params, trained.masks, strict=True):
        for leaf, mask in zip(params, masks, strict=True):
            np.testing.assert_array_equal(leaf, np.where(mask, leaf, 0))


def test_sparsity_is_exact_after_every_step(trained):
    # 0.5 of 36; rising: 0.125 · (step - 1) at steps 1, 3 and 5.
    ramp = [0, 0, 0, round(0.25 * 36), round(0.25 * 36), 18, 18, 18]
    assert trained.pruned == ([18] * STEPS if trained.wrapper in ("set_", "rigl") else ramp)


def test_masks_are_whole_boolean_arrays_like_the_prunable_params(trained):
    for leaf, mask in zip(trained.start, trained.masks[-1], strict=True):
        assert mask.dtype == bool
        assert mask.shape == (leaf.shape if leaf.ndim > 1 else ())


def test_every_leaf_trains(trained):
    """Not every kept entry: what SET grows behind a unit without inputs gets no gradient."""
    before, after = trained.params[-2:]
    for old, new in zip(before, after, strict=True):
        assert (old != new).any()


def test_step_is_traced_once(trained):
    assert trained.traces == 1


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_nnx_jit_and_nnx_split_train_alike(wrapper):
    first, second = train("nnx_jit", wrapper), train("nnx_split", wrapper)
    for leaf, other in zip(first.masks[-1], second.masks[-1], strict=True):
        np.testing.assert_array_equal(leaf, other)
    for leaf, other in zip(first.params[-1], second.params[-1], strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
