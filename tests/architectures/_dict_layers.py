"""Layers as plain functions on dicts, and dicts of the shapes of what they need."""

import jax
import jax.numpy as jnp
from jax import lax


def dense_shapes(inputs, outputs, bias=True):
    w = {"w": jnp.zeros((inputs, outputs))}
    return {**w, "b": jnp.zeros(outputs)} if bias else w


def conv_shapes(size, inputs, outputs, bias=False):
    w = {"w": jnp.zeros((size, size, inputs, outputs))}
    return {**w, "b": jnp.zeros(outputs)} if bias else w


def norm_shapes(width):
    return {"scale": jnp.zeros(width), "bias": jnp.zeros(width)}


def batch_norm_shapes(width):
    return {**norm_shapes(width), "mean": jnp.zeros(width), "var": jnp.zeros(width)}


def along_last(vector, x):
    """The vector with as many axes as x, its own the last."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def dense(p, x):
    y = x @ p["w"]
    return y + along_last(p["b"], y) if "b" in p else y


def conv(p, x, stride=1, groups=1, padding="SAME"):
    y = lax.conv_general_dilated(
        x,
        p["w"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + p["b"][None, None, None, :] if "b" in p else y


def batch_norm(p, x):
    inverse = lax.rsqrt(p["var"] + 1e-5) * p["scale"]
    return (x - along_last(p["mean"], x)) * along_last(inverse, x) + along_last(p["bias"], x)


def layer_norm(p, x):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.var(x, -1, keepdims=True)
    x = (x - mean) / jnp.sqrt(variance + 1e-5)
    return x * along_last(p["scale"], x) + along_last(p["bias"], x)


def rms_norm(p, x):
    x = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    return x * along_last(p["scale"], x)


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def avg_pool(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def global_mean(x):
    return jnp.mean(x, axis=(1, 2))


def attention(q, k, v, causal=False):
    """Softmax attention of (batch, length, heads, width)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    if causal:
        length = scores.shape[-1]
        mask = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(mask[None, None], scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def sinusoids(length, width):
    """Sinusoidal position embeddings, (length, width)."""
    rates = jnp.exp(jnp.arange(0, width, 2) * (-jnp.log(10000.0) / width))
    angles = jnp.arange(length)[:, None] * rates[None, :]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, width)


def rotary(x):
    """Rotates the halves of (batch, length, heads, width) by the position."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None] * rates[None, :]
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
