"""Transformers and recurrent networks in Equinox: one example at a time."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ._case import case, from_equinox, images, tokens, vectors
from ._dict_layers import sinusoids


class Layer(eqx.Module):
    """A pre-norm transformer layer."""

    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear

    def __init__(self, width, hidden, key):
        keys = jax.random.split(key, 3)
        self.norm1 = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(
            3, width, qk_size=4, vo_size=5, use_query_bias=True, use_output_bias=True, key=keys[0]
        )
        self.norm2 = eqx.nn.LayerNorm(width)
        self.linear1 = eqx.nn.Linear(width, hidden, key=keys[1])
        self.linear2 = eqx.nn.Linear(hidden, width, key=keys[2])

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        y = jax.nn.gelu(jax.vmap(self.linear1)(jax.vmap(self.norm2)(x)))
        return x + jax.vmap(self.linear2)(y)


class ViT(eqx.Module):
    patch: eqx.nn.Conv2d
    cls: jax.Array
    position: jax.Array
    layers: list[Layer]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key, width=10):
        keys = jax.random.split(key, 6)
        self.patch = eqx.nn.Conv2d(3, width, 4, stride=4, key=keys[0])
        self.cls = jax.random.normal(keys[1], (1, width))
        self.position = jax.random.normal(keys[2], (5, width))
        self.layers = [Layer(width, 14, keys[3]), Layer(width, 15, keys[4])]
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, 9, key=keys[5])

    def __call__(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], -1).T
        x = jnp.concatenate([self.cls, x]) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[0]))


@case("vit-equinox")
def vit():
    return from_equinox(ViT, images(channels_first=True))


class Encoder(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list[Layer]
    head: eqx.nn.Linear

    def __init__(self, key, width=10):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(11, width, key=keys[0])
        self.layers = [Layer(width, 14, keys[1]), Layer(width, 15, keys[2])]
        self.head = eqx.nn.Linear(width, 7, key=keys[3])

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        x = x + sinusoids(*x.shape)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=0))


@case("encoder-equinox")
def encoder():
    return from_equinox(Encoder, tokens())


class DecoderLayer(eqx.Module):
    """Rotary multi-head attention and SwiGLU; the head axis is made by a reshape."""

    norm1: eqx.nn.RMSNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    norm2: eqx.nn.RMSNorm
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width, hidden, key, heads=3, head_width=4):
        keys = jax.random.split(key, 5)
        self.heads = heads
        self.norm1 = eqx.nn.RMSNorm(width, use_bias=False)
        self.qkv = eqx.nn.Linear(width, 3 * heads * head_width, key=keys[0])
        self.out = eqx.nn.Linear(heads * head_width, width, key=keys[1])
        self.norm2 = eqx.nn.RMSNorm(width, use_bias=False)
        self.gate = eqx.nn.Linear(width, hidden, use_bias=False, key=keys[2])
        self.up = eqx.nn.Linear(width, hidden, use_bias=False, key=keys[3])
        self.down = eqx.nn.Linear(hidden, width, use_bias=False, key=keys[4])

    def attend(self, x):
        qkv = jax.vmap(self.qkv)(x)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        q, k, v = (a.reshape(x.shape[0], self.heads, -1) for a in (q, k, v))
        rope = eqx.nn.RotaryPositionalEmbedding(q.shape[-1])
        q, k = (jax.vmap(rope, in_axes=1, out_axes=1)(a) for a in (q, k))
        scores = jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(q.shape[-1])
        mask = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
        weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
        y = jnp.einsum("hqk,khd->qhd", weights, v).reshape(x.shape[0], -1)
        return jax.vmap(self.out)(y)

    def mlp(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def __call__(self, x):
        x = x + self.attend(jax.vmap(self.norm1)(x))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class Decoder(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list[DecoderLayer]
    norm: eqx.nn.RMSNorm

    def __init__(self, key, width=10):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(11, width, key=keys[0])
        self.layers = [DecoderLayer(width, 14, keys[1]), DecoderLayer(width, 15, keys[2])]
        self.norm = eqx.nn.RMSNorm(width, use_bias=False)

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        for layer in self.layers:
            x = layer(x)
        return jax.vmap(self.norm)(x) @ self.embed.weight.T


@case("decoder_fused_qkv-equinox")
def decoder_fused_qkv():
    return from_equinox(Decoder, tokens())


class Mixer(eqx.Module):
    """As in the Equinox documentation: patches along the second axis, norms of whole arrays."""

    embed: eqx.nn.Conv2d
    norm1: eqx.nn.LayerNorm
    patch_mixer: eqx.nn.MLP
    norm2: eqx.nn.LayerNorm
    hidden_mixer: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key, hidden=8, patches=4):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Conv2d(3, hidden, 4, stride=4, key=keys[0])
        self.norm1 = eqx.nn.LayerNorm((hidden, patches))
        self.patch_mixer = eqx.nn.MLP(patches, patches, 9, depth=1, key=keys[1])
        self.norm2 = eqx.nn.LayerNorm((patches, hidden))
        self.hidden_mixer = eqx.nn.MLP(hidden, hidden, 13, depth=1, key=keys[2])
        self.head = eqx.nn.Linear(hidden, 5, key=keys[3])

    def __call__(self, x):
        y = self.embed(x)
        y = y.reshape(y.shape[0], -1)
        y = y + jax.vmap(self.patch_mixer)(self.norm1(y))
        y = jnp.transpose(y)
        y = y + jax.vmap(self.hidden_mixer)(self.norm2(y))
        return self.head(y.mean(axis=0))


@case("mixer-equinox")
def mixer():
    return from_equinox(Mixer, images(channels_first=True))


class Recurrent(eqx.Module):
    cell: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, cell, key):
        cell_key, head_key = jax.random.split(key)
        self.cell = cell(5, 7, key=cell_key)
        self.head = eqx.nn.Linear(7, 3, key=head_key)

    def __call__(self, xs):
        zeros = jnp.zeros(self.cell.hidden_size)
        is_lstm = isinstance(self.cell, eqx.nn.LSTMCell)

        def step(carry, x):
            return self.cell(x, carry), None

        carry, _ = jax.lax.scan(step, (zeros, zeros) if is_lstm else zeros, xs)
        return self.head(carry[0] if is_lstm else carry)


@case("lstm-equinox")
def lstm():
    return from_equinox(lambda key: Recurrent(eqx.nn.LSTMCell, key), vectors(6, 5))


@case("gru-equinox")
def gru():
    return from_equinox(lambda key: Recurrent(eqx.nn.GRUCell, key), vectors(6, 5))


class Stacked(eqx.Module):
    """Layers made by filter_vmap, and run by lax.scan on their arrays."""

    embed: eqx.nn.Embedding
    layers: Layer
    head: eqx.nn.Linear

    def __init__(self, key, width=10, depth=3):
        embed_key, head_key, *keys = jax.random.split(key, depth + 2)
        self.embed = eqx.nn.Embedding(11, width, key=embed_key)
        self.layers = eqx.filter_vmap(lambda key: Layer(width, 14, key))(jnp.stack(keys))
        self.head = eqx.nn.Linear(width, 4, key=head_key)

    def __call__(self, ids):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, arrays):
            return eqx.combine(arrays, static)(x), None

        x, _ = jax.lax.scan(step, jax.vmap(self.embed)(ids), arrays)
        return jax.vmap(self.head)(x)


@case("stacked_transformer-equinox")
def stacked_transformer():
    return from_equinox(Stacked, tokens())
