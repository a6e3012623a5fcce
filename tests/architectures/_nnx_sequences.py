"""Sequence networks in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx

from ._case import case, from_nnx, tokens, vectors
from ._dict_layers import rotary, sinusoids


class EncoderLayer(nnx.Module):
    """Pre-norm."""

    def __init__(self, width, hidden, *, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=3, in_features=width, qkv_features=12, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.linear1 = nnx.Linear(width, hidden, rngs=rngs)
        self.linear2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(nnx.relu(self.linear1(self.norm2(x))))


class Encoder(nnx.Module):
    def __init__(self, width=10, *, rngs):
        self.embed = nnx.Embed(11, width, rngs=rngs)
        self.layer1 = EncoderLayer(width, 14, rngs=rngs)
        self.layer2 = EncoderLayer(width, 15, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 7, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + sinusoids(*x.shape[1:])[None]
        x = self.norm(self.layer2(self.layer1(x)))
        return self.head(x.mean(axis=1))


@case("encoder-nnx")
def encoder():
    return from_nnx(lambda rngs: Encoder(rngs=rngs), tokens())


class GroupedQueryAttention(nnx.Module):
    def __init__(self, width, heads, kv_heads, head_width, *, rngs):
        self.repeats, self.head_width = heads // kv_heads, head_width
        self.q = nnx.Linear(width, heads * head_width, use_bias=False, rngs=rngs)
        self.k = nnx.Linear(width, kv_heads * head_width, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(width, kv_heads * head_width, use_bias=False, rngs=rngs)
        self.o = nnx.Linear(heads * head_width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        q, k, v = (
            linear(x).reshape(*x.shape[:2], -1, self.head_width)
            for linear in (self.q, self.k, self.v)
        )
        k = jnp.repeat(rotary(k), self.repeats, axis=2)
        v = jnp.repeat(v, self.repeats, axis=2)
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nnx.dot_product_attention(rotary(q), k, v, mask=mask)
        return self.o(y.reshape(*x.shape[:2], -1))


class DecoderLayer(nnx.Module):
    def __init__(self, width, hidden, *, rngs):
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = GroupedQueryAttention(width, 6, 3, 4, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.gate = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    def __init__(self, width=10, *, rngs):
        self.embed = nnx.Embed(11, width, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(width, hidden, rngs=rngs) for hidden in (14, 15)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


@case("decoder_gqa_repeat-nnx")
def decoder_gqa_repeat():
    return from_nnx(lambda rngs: Decoder(rngs=rngs), tokens())


class MixerBlock(nnx.Module):
    def __init__(self, length, width, *, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.token1 = nnx.Linear(length, 9, rngs=rngs)
        self.token2 = nnx.Linear(9, length, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.channel1 = nnx.Linear(width, 13, rngs=rngs)
        self.channel2 = nnx.Linear(13, width, rngs=rngs)

    def __call__(self, x):
        y = self.norm1(x).swapaxes(1, 2)
        x = x + self.token2(nnx.gelu(self.token1(y))).swapaxes(1, 2)
        return x + self.channel2(nnx.gelu(self.channel1(self.norm2(x))))


@case("mixer-nnx")
def mixer():
    def build(rngs):
        return nnx.Sequential(
            nnx.Linear(5, 8, rngs=rngs),
            MixerBlock(6, 8, rngs=rngs),
            lambda x: x.mean(axis=1),
            nnx.Linear(8, 3, rngs=rngs),
        )

    return from_nnx(build, vectors(6, 5))


class Recurrent(nnx.Module):
    """Two layers of cells under nnx.RNN, and the last output."""

    def __init__(self, cell, *, rngs):
        self.layer1 = nnx.RNN(cell(5, 7, rngs=rngs), rngs=False)
        self.layer2 = nnx.RNN(cell(7, 6, rngs=rngs), rngs=False)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        rngs = nnx.Rngs(0)  # For the initial carries, which are zeros.
        return self.head(self.layer2(self.layer1(x, rngs=rngs), rngs=rngs)[:, -1])


@case("lstm-nnx")
def lstm():
    return from_nnx(lambda rngs: Recurrent(nnx.LSTMCell, rngs=rngs), vectors(6, 5))


@case("optimized_lstm-nnx")
def optimized_lstm():
    return from_nnx(lambda rngs: Recurrent(nnx.OptimizedLSTMCell, rngs=rngs), vectors(6, 5))


@case("gru-nnx")
def gru():
    return from_nnx(lambda rngs: Recurrent(nnx.GRUCell, rngs=rngs), vectors(6, 5))


class ResidualLayer(nnx.Module):
    def __init__(self, width, hidden, *, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.linear1 = nnx.Linear(width, hidden, rngs=rngs)
        self.linear2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        return x + self.linear2(nnx.relu(self.linear1(self.norm(x))))


class Stacked(nnx.Module):
    """Layers made by nnx.vmap and run by nnx.scan."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return ResidualLayer(6, 8, rngs=rngs)

        self.embed = nnx.Linear(5, 6, rngs=rngs)
        self.layers = make(rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return self.head(forward(self.embed(x), self.layers))


@case("stacked_mlp-nnx")
def stacked_mlp():
    return from_nnx(lambda rngs: Stacked(rngs=rngs), vectors(5))


class SplitScan(nnx.Module):
    """Stacked layers that lax.scan runs on their split state, rematerialized."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return EncoderLayer(10, 14, rngs=rngs)

        self.embed = nnx.Embed(11, 10, rngs=rngs)
        self.layers = make(rngs)
        self.head = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, ids):
        graph, state = nnx.split(self.layers)

        @jax.checkpoint
        def forward(x, state):
            return nnx.merge(graph, state)(x), None

        x, _ = jax.lax.scan(forward, self.embed(ids), state)
        return self.head(x)


@case("stacked_transformer-nnx")
def stacked_transformer():
    return from_nnx(lambda rngs: SplitScan(rngs=rngs), tokens())
