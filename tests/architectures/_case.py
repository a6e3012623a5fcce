"""What a case is, the registry, and random values for every floating leaf of a model."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import keystr, tree_map_with_path


class Case(NamedTuple):
    """A network: `apply(variables, *inputs)` is its output, a pure function."""

    apply: Callable[..., Any]
    variables: Any
    inputs: tuple[Any, ...]


CASES: dict[str, Callable[[], Case]] = {}
STATEFUL: dict[str, Callable[[], Case]] = {}


def case(name, registry=CASES):
    """Registers a builder under its name."""

    def register(build):
        assert name not in registry, name
        registry[name] = build
        return build

    return register


def stateful(name):
    """Registers a builder whose `apply` returns `(logits, new_batch_stats)`."""
    return case(name, STATEFUL)


def images(channels=3, size=8, channels_first=False):
    shape = (2, channels, size, size) if channels_first else (2, size, size, channels)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def vectors(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, *shape)), jnp.float32)


def tokens(length=5, vocabulary=11):
    return jnp.asarray(np.random.default_rng(3).integers(vocabulary, size=(2, length)), jnp.int32)


def random_values(tree, outputs_first=False):
    """Draws every floating leaf from its shape and name; integers become zeros.

    Weights have standard deviation 1/sqrt(fan in), scales have mean one, and variances (which
    Equinox keeps second, after the mean) are positive. `outputs_first` is for kernels laid out as
    (out, in, ...).
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        name, shape = keystr(path).lower(), leaf.shape
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(shape, leaf.dtype)
        if "var" in name or re.fullmatch(r"<flat index \d+>\]\[1\]", name[1:]):
            value = rng.uniform(0.5, 1.5, shape)
        elif "scale" in name or (name.endswith("weight") and len(shape) == 1):
            value = 1 + 0.3 * rng.normal(size=shape)
        elif any(word in name for word in ("embed", "table", "position", "cls")):
            value = 0.5 * rng.normal(size=shape)
        elif len(shape) < 2 or any(w in name for w in ("mean", "bias", "offset", "'b'")):
            value = 0.3 * rng.normal(size=shape)
        else:
            fan_in = np.prod(shape) / shape[0 if outputs_first else -1]
            value = rng.normal(size=shape) / np.sqrt(fan_in)
        return jnp.asarray(value, leaf.dtype)

    return tree_map_with_path(draw, tree)


def from_dict(apply, shapes, *inputs):
    """A plain function on a nested dict, whose arrays give only the shapes."""
    return Case(apply, random_values(shapes), inputs)


def from_nnx(build, *inputs):
    """An NNX model in inference mode; `build(rngs)` makes it."""
    model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    if jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.BatchStat)))):
        model = build(nnx.Rngs(0))  # It holds keys or constants, which need their values.
    model.eval()
    graph, variables, rest = nnx.split(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)

    def apply(variables, *inputs):
        return nnx.merge(graph, variables, rest)(*inputs)

    return Case(apply, random_values(variables), inputs)


def from_linen(module, *inputs):
    """A Linen module in inference mode, which it is to take as its default."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return Case(module.apply, random_values(shapes), inputs)


def from_haiku(function, *inputs, batch_norm=False):
    """A Haiku function; the variables are a dict of params and, if there is any, state.

    With `batch_norm`, the function has `is_training` for its last argument.
    """
    training, inference = ((True,), (False,)) if batch_norm else ((), ())
    network = hk.without_apply_rng(hk.transform_with_state(function))
    params, state = jax.eval_shape(
        lambda key: network.init(key, *inputs, *training), jax.random.key(0)
    )

    def apply(variables, *inputs):
        state = variables.get("state", {})
        return network.apply(variables["params"], state, *inputs, *inference)[0]

    shapes = {"params": params, "state": state} if state else {"params": params}
    return Case(apply, random_values(shapes), inputs)


def from_equinox(build, *inputs):
    """An Equinox model of one example, mapped over the batch; `build(key)` makes it."""
    model = eqx.filter_eval_shape(build, jax.random.key(0))
    variables, static = eqx.partition(
        random_values(model, outputs_first=True), eqx.is_inexact_array
    )

    def apply(variables, *inputs):
        return jax.vmap(eqx.combine(variables, static))(*inputs)

    return Case(apply, variables, inputs)


def from_stateful_equinox(build, *inputs):
    """An Equinox model with batch statistics, in inference mode."""
    model, state = eqx.filter_eval_shape(eqx.nn.make_with_state(build), jax.random.key(0))
    model = eqx.nn.inference_mode(random_values(model, outputs_first=True))
    values = (model, random_values(state))
    variables, static = eqx.partition(values, eqx.is_inexact_array)

    def apply(variables, *inputs):
        model, state = eqx.combine(variables, static)
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return batched(*inputs, state)[0]

    return Case(apply, variables, inputs)
