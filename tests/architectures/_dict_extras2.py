"""More of the less usual parts, as plain functions on nested dicts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._case import case, from_dict, images, tokens, vectors
from ._dict_layers import (
    attention,
    avg_pool,
    conv,
    conv_shapes,
    dense,
    dense_shapes,
    global_mean,
    layer_norm,
    norm_shapes,
)


@case("pixel_shuffle-dict")
def pixel_shuffle():
    """Super-resolution: channels become space, by reshape and transpose; and back."""
    shapes = {
        "conv1": conv_shapes(3, 3, 5, bias=True),
        "conv2": conv_shapes(3, 5, 2 * 2 * 6, bias=True),
        "conv3": conv_shapes(3, 6, 7, bias=True),
        "conv4": conv_shapes(1, 4 * 7, 3, bias=True),
    }

    def depth_to_space(x, r=2):
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height, width, r, r, channels // r**2)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, height * r, width * r, channels // r**2)

    def space_to_depth(x, r=2):
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // r, r, width // r, r, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, height // r, width // r, channels * r**2)

    def apply(p, x):
        x = jax.nn.relu(conv(p["conv1"], x))
        x = depth_to_space(conv(p["conv2"], x))
        x = jax.nn.relu(conv(p["conv3"], x))
        return conv(p["conv4"], space_to_depth(x))

    return from_dict(apply, shapes, images())


@case("constant-dict")
def constant():
    """Arrays of the closure: one multiplies the features, one is a fixed projection."""
    rng = np.random.default_rng(4)
    frequencies = jnp.asarray(rng.uniform(0.5, 2, 7), jnp.float32)
    projection = jnp.asarray(rng.normal(size=(9, 9)) / 3, jnp.float32)
    shapes = {"in": dense_shapes(5, 7), "hidden": dense_shapes(7, 9), "out": dense_shapes(9, 3)}

    def apply(p, x):
        x = jnp.sin(dense(p["in"], x) * frequencies[None])
        x = jax.nn.relu(dense(p["hidden"], x)) @ projection
        return dense(p["out"], x)

    return from_dict(apply, shapes, vectors(5))


@case("bfloat16-dict")
def bfloat16():
    """Compute in bfloat16 on float32 parameters."""
    shapes = {
        "conv1": conv_shapes(3, 3, 5, bias=True),
        "conv2": conv_shapes(3, 5, 7, bias=True),
        "norm": norm_shapes(7),
        "head": dense_shapes(7, 4),
    }

    def apply(p, x):
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
        x = jax.nn.relu(conv(half["conv1"], x.astype(jnp.bfloat16)))
        x = jax.nn.relu(conv(half["conv2"], x, stride=2))
        x = layer_norm(p["norm"], x.astype(jnp.float32)).astype(jnp.bfloat16)
        return dense(half["head"], global_mean(x)).astype(jnp.float32)

    return from_dict(apply, shapes, images())


@case("layer_norm-dict")
def layer_norm_mlp():
    """Layer norms by jnp.mean and jnp.var, one also by the mean of squares."""
    shapes = {
        "in": dense_shapes(5, 7),
        "norm1": norm_shapes(7),
        "hidden": dense_shapes(7, 9),
        "norm2": norm_shapes(9),
        "out": dense_shapes(9, 3),
    }

    def fast_layer_norm(p, x):
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean(lax.square(x), -1, keepdims=True) - lax.square(mean)
        return (x - mean) * (lax.rsqrt(variance + 1e-5) * p["scale"][None]) + p["bias"][None]

    def apply(p, x):
        x = jax.nn.silu(layer_norm(p["norm1"], dense(p["in"], x)))
        x = jax.nn.silu(fast_layer_norm(p["norm2"], dense(p["hidden"], x)))
        return dense(p["out"], x)

    return from_dict(apply, shapes, vectors(5))


@case("squeeze_excite-dict")
def squeeze_excite():
    shapes = {
        "conv": conv_shapes(3, 3, 8, bias=True),
        "squeeze": dense_shapes(8, 5),
        "excite": dense_shapes(5, 8),
        "head": dense_shapes(8, 4),
    }

    def apply(p, x):
        x = jax.nn.relu(conv(p["conv"], x))
        gate = jax.nn.relu(dense(p["squeeze"], global_mean(x)))
        gate = jax.nn.sigmoid(dense(p["excite"], gate))
        return dense(p["head"], global_mean(x * gate[:, None, None, :]))

    return from_dict(apply, shapes, images())


@case("group_norm-dict")
def group_norm():
    """Groups by a reshape of the channels."""
    shapes = {
        "conv1": conv_shapes(3, 3, 6),
        "norm1": norm_shapes(6),
        "conv2": conv_shapes(3, 6, 12),
        "norm2": norm_shapes(12),
        "head": dense_shapes(12, 5),
    }

    def norm(p, x, groups=3):
        y = x.reshape(*x.shape[:3], groups, -1)
        mean = jnp.mean(y, axis=(1, 2, 4), keepdims=True)
        variance = jnp.var(y, axis=(1, 2, 4), keepdims=True)
        y = ((y - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
        return y * p["scale"][None, None, None] + p["bias"][None, None, None]

    def apply(p, x):
        x = jax.nn.relu(norm(p["norm1"], conv(p["conv1"], x)))
        x = avg_pool(jax.nn.relu(norm(p["norm2"], conv(p["conv2"], x))))
        return dense(p["head"], global_mean(x))

    return from_dict(apply, shapes, images())


@case("nchw-dict")
def channels_first():
    """Channels first with OIHW kernels, flattened before the head."""
    shapes = {
        "conv1": jnp.zeros((5, 3, 3, 3)),
        "conv2": jnp.zeros((7, 5, 3, 3)),
        "head": dense_shapes(7 * 4 * 4, 6),
    }

    def conv(w, x, stride):
        layout = ("NCHW", "OIHW", "NCHW")
        return lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=layout)

    def apply(p, x):
        x = jax.nn.relu(conv(p["conv1"], x, 1))
        x = jax.nn.relu(conv(p["conv2"], x, 2))
        return dense(p["head"], x.reshape(x.shape[0], -1))

    return from_dict(apply, shapes, images(channels_first=True))


@case("vmap_ensemble-dict")
def vmap_ensemble():
    """Members of an ensemble by vmap over stacked parameters, averaged."""
    members = 3
    shapes = {
        "hidden": {"w": jnp.zeros((members, 5, 7)), "b": jnp.zeros((members, 7))},
        "out": {"w": jnp.zeros((members, 7, 4)), "b": jnp.zeros((members, 4))},
    }

    def member(p, x):
        return dense(p["out"], jax.nn.relu(dense(p["hidden"], x)))

    def apply(p, x):
        return jnp.mean(jax.vmap(member, in_axes=(0, None))(p, x), axis=0)

    return from_dict(apply, shapes, vectors(5))


@case("maxout-dict")
def maxout():
    """Maxout over reshaped pieces, and a maximum of two branches."""
    shapes = {
        "in": dense_shapes(5, 7 * 3),
        "left": dense_shapes(7, 9),
        "right": dense_shapes(7, 9),
        "out": dense_shapes(9, 4),
    }

    def apply(p, x):
        x = dense(p["in"], x).reshape(x.shape[0], 7, 3).max(axis=-1)
        return dense(p["out"], jnp.maximum(dense(p["left"], x), dense(p["right"], x)))

    return from_dict(apply, shapes, vectors(5))


@case("siamese-dict")
def siamese():
    """One tower on two inputs; difference, product and concatenation."""
    shapes = {
        "tower1": dense_shapes(5, 7),
        "tower2": dense_shapes(7, 9),
        "head": dense_shapes(3 * 9, 4),
    }

    def tower(p, x):
        return dense(p["tower2"], jax.nn.relu(dense(p["tower1"], x)))

    def apply(p, a, b):
        a, b = tower(p, a), tower(p, b)
        return dense(p["head"], jnp.concatenate([jnp.abs(a - b), a * b, a], axis=-1))

    x = vectors(5)
    return from_dict(apply, shapes, x, x[::-1])


@case("cross_attention-dict")
def cross_attention():
    """Learned latents attend to tokens: a small Perceiver."""
    latents, width, inner, heads = 4, 8, 6, 2
    shapes = {
        "table": jnp.zeros((11, 10)),
        "latent_position": jnp.zeros((latents, width)),
        "query": dense_shapes(width, inner),
        "key": dense_shapes(10, inner),
        "value": dense_shapes(10, inner),
        "out": dense_shapes(inner, width),
        "norm": norm_shapes(width),
        "head": dense_shapes(latents * width, 3),
    }

    def apply(p, ids):
        x = p["table"][ids]
        z = jnp.tile(p["latent_position"][None], (x.shape[0], 1, 1))
        q, k, v = (
            dense(p[name], y).reshape(*y.shape[:2], heads, -1)
            for name, y in (("query", z), ("key", x), ("value", x))
        )
        z = z + dense(p["out"], attention(q, k, v).reshape(*z.shape[:2], inner))
        return dense(p["head"], layer_norm(p["norm"], z).reshape(x.shape[0], -1))

    return from_dict(apply, shapes, tokens())
