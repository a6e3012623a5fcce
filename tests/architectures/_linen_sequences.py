"""Sequence networks in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._case import case, from_linen, tokens, vectors
from ._dict_layers import rotary, sinusoids


class EncoderLayer(nn.Module):
    """Post-norm."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)(x, x)
        x = nn.LayerNorm()(x + y)
        y = nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(x)))
        return nn.LayerNorm()(x + y)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 10)(ids)
        x = x + sinusoids(*x.shape[1:])[None]
        for hidden in (14, 15):
            x = EncoderLayer(hidden)(x)
        return nn.Dense(7)(x.mean(axis=1))


@case("encoder-linen")
def encoder():
    return from_linen(Encoder(), tokens())


class EinsumAttention(nn.Module):
    """Grouped queries, with kernels of three axes."""

    heads: int = 6
    kv_heads: int = 3
    head_width: int = 4

    @nn.compact
    def __call__(self, x):
        width, groups = x.shape[-1], self.heads // self.kv_heads
        init = nn.initializers.lecun_normal()
        w_q = self.param("q", init, (self.kv_heads, groups, width, self.head_width))
        w_kv = self.param("kv", init, (2, self.kv_heads, width, self.head_width))
        w_o = self.param("o", init, (self.kv_heads, groups, self.head_width, width))
        q = jnp.einsum("bld,hgdk->blhgk", x, w_q)
        k, v = jnp.einsum("bld,chdk->cblhk", x, w_kv)
        q = rotary(q.reshape(*x.shape[:2], self.heads, -1)).reshape(q.shape)
        scores = jnp.einsum("bqhgk,bshk->bhgqs", q, rotary(k)) / jnp.sqrt(self.head_width)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))[:, :, None]
        weights = nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
        return jnp.einsum("bhgqs,bshk,hgkd->bqd", weights, v, w_o)


class DecoderLayer(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = x + EinsumAttention()(nn.RMSNorm()(x))
        y = nn.RMSNorm()(x)
        gate = nn.silu(nn.Dense(self.hidden, use_bias=False, name="gate")(y))
        y = gate * nn.Dense(self.hidden, use_bias=False, name="up")(y)
        return x + nn.Dense(x.shape[-1], use_bias=False, name="down")(y)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 10)
        x = embed(ids)
        for hidden in (14, 15):
            x = DecoderLayer(hidden)(x)
        return embed.attend(nn.RMSNorm()(x))


@case("decoder_einsum-linen")
def decoder_einsum():
    return from_linen(Decoder(), tokens())


class FusedAttention(nn.Module):
    """One Dense for query, key and value, reshaped to (heads, 3, head width)."""

    heads: int = 3
    head_width: int = 4

    @nn.compact
    def __call__(self, x):
        qkv = nn.Dense(3 * self.heads * self.head_width)(x)
        qkv = qkv.reshape(*x.shape[:2], self.heads, 3, self.head_width)
        q, k, v = jnp.moveaxis(qkv, 3, 0)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.dot_product_attention(rotary(q), rotary(k), v, mask=mask)
        return nn.Dense(x.shape[-1])(y.reshape(*x.shape[:2], -1))


class FusedDecoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 10)
        x = embed(ids)
        x = x + FusedAttention()(nn.LayerNorm()(x))
        x = x + nn.Dense(10)(nn.gelu(nn.Dense(14)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


@case("decoder_fused_qkv-linen")
def decoder_fused_qkv():
    return from_linen(FusedDecoder(), tokens())


class MixerBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(9)(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.Dense(x.shape[2])(nn.gelu(nn.Dense(13)(nn.LayerNorm()(x))))
        return x + y


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = MixerBlock()(nn.Dense(8)(x))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(axis=1))


@case("mixer-linen")
def mixer():
    return from_linen(Mixer(), vectors(6, 5))


class Recurrent(nn.Module):
    """Two layers under nn.RNN, and their mean over time."""

    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell(7))(x)
        x = nn.RNN(self.cell(6), reverse=True, keep_order=True)(x)
        return nn.Dense(3)(x.mean(axis=1))


@case("lstm-linen")
def lstm():
    return from_linen(Recurrent(nn.OptimizedLSTMCell), vectors(6, 5))


@case("gru-linen")
def gru():
    return from_linen(Recurrent(nn.GRUCell), vectors(6, 5))


class ResidualLayer(nn.Module):
    hidden: int = 8

    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y), None


class Stacked(nn.Module):
    """nn.scan over layers, rematerialized or not."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(ResidualLayer, prevent_cse=False) if self.remat else ResidualLayer
        layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers()(nn.Dense(6)(x), None)
        return nn.Dense(4)(x)


@case("stacked_mlp-linen")
def stacked_mlp():
    return from_linen(Stacked(), vectors(5))


@case("stacked_remat-linen")
def stacked_remat():
    return from_linen(Stacked(remat=True), vectors(5))


class ScanCell(nn.Module):
    """A recurrent cell of Dense layers, for nn.scan over time with broadcast parameters."""

    hidden: int

    @nn.compact
    def __call__(self, h, x):
        z = nn.sigmoid(nn.Dense(self.hidden)(jnp.concatenate([x, h], axis=-1)))
        candidate = nn.tanh(nn.Dense(self.hidden)(jnp.concatenate([x, h], axis=-1)))
        h = z * h + (1 - z) * candidate
        return h, h


class TimeScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            ScanCell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        _, hs = scan(7)(jnp.zeros((x.shape[0], 7)), x)
        return nn.Dense(3)(jax.nn.relu(hs))


@case("minimal_gru-linen")
def minimal_gru():
    return from_linen(TimeScan(), vectors(6, 5))
