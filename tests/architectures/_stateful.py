"""Training mode: networks whose apply returns `(logits, new_batch_stats)`."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ._case import Case, images, random_values, stateful
from ._dict_layers import (
    along_last,
    conv,
    conv_shapes,
    dense,
    dense_shapes,
    global_mean,
    norm_shapes,
)


@stateful("residual-dict")
def plain():
    """Parameters and statistics in two dicts."""
    widths = {"bn0": 6, "bn1": 5, "bn2": 6}
    params = {
        "stem": conv_shapes(3, 3, 6),
        "conv1": conv_shapes(3, 6, 5),
        "conv2": conv_shapes(3, 5, 6),
        "head": dense_shapes(6, 4),
        **{name: norm_shapes(width) for name, width in widths.items()},
    }
    stats = {name: {"mean": jnp.zeros(n), "var": jnp.zeros(n)} for name, n in widths.items()}

    def apply(variables, x):
        p, old, new = variables["params"], variables["batch_stats"], {}

        def norm(name, x):
            mean, variance = jnp.mean(x, axis=(0, 1, 2)), jnp.var(x, axis=(0, 1, 2))
            batch = {"mean": mean, "var": variance}
            new[name] = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old[name], batch)
            x = (x - along_last(mean, x)) * lax.rsqrt(along_last(variance, x) + 1e-5)
            return x * along_last(p[name]["scale"], x) + along_last(p[name]["bias"], x)

        x = jax.nn.relu(norm("bn0", conv(p["stem"], x)))
        y = jax.nn.relu(norm("bn1", conv(p["conv1"], x)))
        x = jax.nn.relu(x + norm("bn2", conv(p["conv2"], y)))
        return dense(p["head"], global_mean(x)), new

    variables = {"params": random_values(params), "batch_stats": random_values(stats)}
    return Case(apply, variables, (images(),))


class NNXResidual(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.bn0 = nnx.BatchNorm(6, rngs=rngs)
        self.conv1 = nnx.Conv(6, 5, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(5, rngs=rngs)
        self.conv2 = nnx.Conv(5, 6, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn0(self.stem(x)))
        y = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(x + self.bn2(self.conv2(y)))
        return self.head(jnp.mean(x, axis=(1, 2)))


@stateful("residual-nnx")
def flax_nnx():
    model = nnx.eval_shape(lambda: NNXResidual(rngs=nnx.Rngs(0)))
    model.train()
    graph, variables = nnx.split(model)

    def apply(variables, x):
        model = nnx.merge(graph, variables)
        logits = model(x)
        return logits, nnx.state(model, nnx.BatchStat)

    return Case(apply, random_values(variables), (images(),))


class LinenResidual(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        y = nn.Conv(5, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(6, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        return nn.Dense(4)(jnp.mean(nn.relu(x + y), axis=(1, 2)))


@stateful("residual-linen")
def flax_linen():
    x, module = images(), LinenResidual()
    shapes = jax.eval_shape(lambda key: module.init(key, x, train=False), jax.random.key(0))

    def apply(variables, x):
        logits, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, updates["batch_stats"]

    return Case(apply, random_values(shapes), (x,))


@stateful("residual-haiku")
def haiku():
    def norm(x):
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, True)

    def forward(x):
        x = jax.nn.relu(norm(hk.Conv2D(6, 3)(x)))
        y = jax.nn.relu(norm(hk.Conv2D(5, 3)(x)))
        x = jax.nn.relu(x + norm(hk.Conv2D(6, 3)(y)))
        return hk.Linear(4)(jnp.mean(x, axis=(1, 2)))

    network = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = jax.eval_shape(network.init, jax.random.key(0), images())

    def apply(variables, x):
        return network.apply(variables["params"], variables["state"], x)

    return Case(apply, random_values({"params": params, "state": state}), (images(),))
