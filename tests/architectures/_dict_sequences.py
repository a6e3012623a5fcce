"""Sequence networks as plain functions on nested dicts."""

import jax
import jax.numpy as jnp
from jax import lax

from ._case import case, from_dict, tokens, vectors
from ._dict_layers import (
    attention,
    dense,
    dense_shapes,
    layer_norm,
    norm_shapes,
    rms_norm,
    rotary,
    sinusoids,
)


@case("encoder-dict")
def encoder():
    """Post-norm, heads in flat kernels, mean pool."""
    width, heads, inner = 10, 3, 12
    shapes = {
        "embed": jnp.zeros((11, width)),
        "layers": {
            f"layer{i}": {
                "q": dense_shapes(width, inner),
                "k": dense_shapes(width, inner),
                "v": dense_shapes(width, inner),
                "o": dense_shapes(inner, width),
                "norm1": norm_shapes(width),
                "ff1": dense_shapes(width, hidden),
                "ff2": dense_shapes(hidden, width),
                "norm2": norm_shapes(width),
            }
            for i, hidden in enumerate([14, 15])
        },
        "head": dense_shapes(width, 7),
    }

    def split_heads(x):
        return x.reshape(*x.shape[:2], heads, inner // heads)

    def layer(p, x):
        q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
        y = attention(q, k, v).reshape(*x.shape[:2], inner)
        x = layer_norm(p["norm1"], x + dense(p["o"], y))
        y = dense(p["ff2"], jax.nn.relu(dense(p["ff1"], x)))
        return layer_norm(p["norm2"], x + y)

    def apply(p, ids):
        x = p["embed"][ids] * jnp.sqrt(width) + sinusoids(ids.shape[1], width)[None]
        for name in sorted(p["layers"]):
            x = layer(p["layers"][name], x)
        return dense(p["head"], x.mean(axis=1))

    return from_dict(apply, shapes, tokens())


def decoder_shapes(width, vocabulary, attention_shapes, hiddens):
    return {
        "table": jnp.zeros((vocabulary, width)),
        "layers": [
            {
                "norm1": {"scale": jnp.zeros(width)},
                "attention": dict(attention_shapes),
                "norm2": {"scale": jnp.zeros(width)},
                "gate": dense_shapes(width, hidden, bias=False),
                "up": dense_shapes(width, hidden, bias=False),
                "down": dense_shapes(hidden, width, bias=False),
            }
            for hidden in hiddens
        ],
        "norm": {"scale": jnp.zeros(width)},
    }


def decoder_apply(attend):
    """The forward of a decoder with tied embeddings, given its self-attention."""

    def apply(p, ids):
        x = p["table"][ids]
        for layer in p["layers"]:
            x = x + attend(layer["attention"], rms_norm(layer["norm1"], x))
            y = rms_norm(layer["norm2"], x)
            y = jax.nn.silu(dense(layer["gate"], y)) * dense(layer["up"], y)
            x = x + dense(layer["down"], y)
        return rms_norm(p["norm"], x) @ p["table"].T

    return apply


@case("decoder_fused_qkv-dict")
def decoder_fused_qkv():
    """Query, key and value in one flat kernel; reshape, then split."""
    width, heads, head_width = 10, 3, 4
    inner = heads * head_width
    shapes = {
        "qkv": dense_shapes(width, 3 * inner),
        "out": dense_shapes(inner, width),
    }

    def attend(p, x):
        qkv = dense(p["qkv"], x).reshape(*x.shape[:2], 3, heads, head_width)
        q, k, v = (a[:, :, 0] for a in jnp.split(qkv, 3, axis=2))
        y = attention(rotary(q), rotary(k), v, causal=True)
        return dense(p["out"], y.reshape(*x.shape[:2], inner))

    return from_dict(decoder_apply(attend), decoder_shapes(width, 11, shapes, [14, 15]), tokens())


@case("decoder_fused_split-dict")
def decoder_fused_split():
    """Query, key and value in one flat kernel; split, then heads: fewer heads of key and value."""
    width, heads, kv_heads, head_width = 10, 6, 3, 4
    inner, kv_inner = heads * head_width, kv_heads * head_width
    shapes = {
        "qkv": dense_shapes(width, inner + 2 * kv_inner, bias=False),
        "out": dense_shapes(inner, width, bias=False),
    }

    def attend(p, x):
        qkv = dense(p["qkv"], x)
        q, k, v = jnp.split(qkv, [inner, inner + kv_inner], axis=-1)
        q, k, v = (a.reshape(*x.shape[:2], -1, head_width) for a in (q, k, v))
        k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (rotary(k), v))
        y = attention(rotary(q), k, v, causal=True)
        return dense(p["out"], y.reshape(*x.shape[:2], inner))

    return from_dict(decoder_apply(attend), decoder_shapes(width, 11, shapes, [14]), tokens())


@case("decoder_gqa_repeat-dict")
def decoder_gqa_repeat():
    """Flat kernels, and jnp.repeat of the heads of key and value."""
    width, heads, kv_heads, head_width = 10, 6, 3, 4
    shapes = {
        "q": dense_shapes(width, heads * head_width, bias=False),
        "k": dense_shapes(width, kv_heads * head_width, bias=False),
        "v": dense_shapes(width, kv_heads * head_width, bias=False),
        "o": dense_shapes(heads * head_width, width, bias=False),
    }

    def attend(p, x):
        batch, length, _ = x.shape
        q = rotary(dense(p["q"], x).reshape(batch, length, heads, head_width))
        k = rotary(dense(p["k"], x).reshape(batch, length, kv_heads, head_width))
        v = dense(p["v"], x).reshape(batch, length, kv_heads, head_width)
        k = jnp.repeat(k, heads // kv_heads, axis=2)
        v = jnp.repeat(v, heads // kv_heads, axis=2)
        y = attention(q, k, v, causal=True)
        return dense(p["o"], y.reshape(batch, length, -1))

    return from_dict(decoder_apply(attend), decoder_shapes(width, 11, shapes, [14, 15]), tokens())


@case("decoder_einsum-dict")
def decoder_einsum():
    """Kernels (width, heads, head width), and grouped queries by einsum over a group axis."""
    width, heads, kv_heads, head_width = 10, 6, 3, 4
    shapes = {
        "q": jnp.zeros((width, heads, head_width)),
        "k": jnp.zeros((width, kv_heads, head_width)),
        "v": jnp.zeros((width, kv_heads, head_width)),
        "o": jnp.zeros((heads, head_width, width)),
    }

    def attend(p, x):
        q = rotary(jnp.einsum("bld,dhk->blhk", x, p["q"]))
        k = rotary(jnp.einsum("bld,dhk->blhk", x, p["k"]))
        v = jnp.einsum("bld,dhk->blhk", x, p["v"])
        q = q.reshape(*x.shape[:2], kv_heads, heads // kv_heads, head_width)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) / jnp.sqrt(head_width)
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None, None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        y = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
        y = y.reshape(*x.shape[:2], heads, head_width)
        return jnp.einsum("blhk,hkd->bld", y, p["o"])

    return from_dict(decoder_apply(attend), decoder_shapes(width, 11, shapes, [14, 15]), tokens())


@case("mixer-dict")
def mixer():
    length, width = 6, 8
    shapes = {
        "embed": dense_shapes(5, width),
        "norm1": norm_shapes(width),
        "token1": dense_shapes(length, 9),
        "token2": dense_shapes(9, length),
        "norm2": norm_shapes(width),
        "channel1": dense_shapes(width, 13),
        "channel2": dense_shapes(13, width),
        "head": dense_shapes(width, 3),
    }

    def apply(p, x):
        x = dense(p["embed"], x)
        y = jnp.swapaxes(layer_norm(p["norm1"], x), 1, 2)
        y = dense(p["token2"], jax.nn.gelu(dense(p["token1"], y)))
        x = x + jnp.swapaxes(y, 1, 2)
        y = layer_norm(p["norm2"], x)
        x = x + dense(p["channel2"], jax.nn.gelu(dense(p["channel1"], y)))
        return dense(p["head"], x.mean(axis=1))

    return from_dict(apply, shapes, vectors(length, 5))


@case("lstm-dict")
def lstm():
    """Two layers, the four gates in one kernel."""
    widths = [5, 7, 6]
    shapes = {
        f"lstm{i}": {
            "input": jnp.zeros((widths[i], 4 * widths[i + 1])),
            "recurrent": jnp.zeros((widths[i + 1], 4 * widths[i + 1])),
            "b": jnp.zeros(4 * widths[i + 1]),
        }
        for i in range(2)
    }
    shapes["head"] = dense_shapes(6, 3)

    def layer(p, xs):
        hidden = p["recurrent"].shape[0]

        def step(carry, x):
            h, c = carry
            gates = x @ p["input"] + h @ p["recurrent"] + p["b"][None]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((xs.shape[1], hidden))
        return lax.scan(step, (zeros, zeros), xs)[1]

    def apply(p, x):
        xs = jnp.swapaxes(x, 0, 1)
        hs = layer(p["lstm1"], layer(p["lstm0"], xs))
        return dense(p["head"], hs[-1])

    return from_dict(apply, shapes, vectors(6, 5))


@case("gru-dict")
def gru():
    """Gates in their own kernels; an output at every step."""
    shapes = {
        name: {"x": jnp.zeros((5, 7)), "h": jnp.zeros((7, 7)), "b": jnp.zeros(7)}
        for name in ("reset", "update", "candidate")
    }
    shapes["head"] = dense_shapes(7, 3)

    def apply(p, x):
        def gate(g, x, h):
            return x @ g["x"] + h @ g["h"] + g["b"][None]

        def step(h, x):
            r = jax.nn.sigmoid(gate(p["reset"], x, h))
            z = jax.nn.sigmoid(gate(p["update"], x, h))
            n = jnp.tanh(gate(p["candidate"], x, r * h))
            h = (1 - z) * n + z * h
            return h, h

        _, hs = lax.scan(step, jnp.zeros((x.shape[0], 7)), x.transpose(1, 0, 2))
        return dense(p["head"], hs.transpose(1, 0, 2))

    return from_dict(apply, shapes, vectors(6, 5))


@case("stacked_mlp-dict")
def stacked_mlp():
    """Residual MLP layers in one scan over stacked parameters."""
    layers, width, hidden = 3, 6, 8
    shapes = {
        "in": dense_shapes(5, width),
        "layers": {
            "scale": jnp.zeros((layers, width)),
            "w1": jnp.zeros((layers, width, hidden)),
            "b1": jnp.zeros((layers, hidden)),
            "w2": jnp.zeros((layers, hidden, width)),
        },
        "out": dense_shapes(width, 4),
    }

    def layer(x, p):
        y = rms_norm({"scale": p["scale"]}, x)
        y = jax.nn.relu(y @ p["w1"] + p["b1"][None]) @ p["w2"]
        return x + y, None

    def apply(p, x):
        x, _ = lax.scan(layer, dense(p["in"], x), p["layers"])
        return dense(p["out"], x)

    return from_dict(apply, shapes, vectors(5))


@case("stacked_checkpoint-dict")
def stacked_checkpoint():
    """Transformer layers in one scan, each rematerialized."""
    layers, width, heads, head_width, hidden = 3, 10, 2, 4, 14
    one = {
        "norm1": {"scale": jnp.zeros(width)},
        "qkv": jnp.zeros((3, width, heads, head_width)),
        "out": jnp.zeros((heads, head_width, width)),
        "norm2": {"scale": jnp.zeros(width)},
        "up": jnp.zeros((width, hidden)),
        "down": jnp.zeros((hidden, width)),
    }
    shapes = {
        "table": jnp.zeros((11, width)),
        "layers": jax.tree.map(lambda a: jnp.zeros((layers, *a.shape)), one),
        "head": dense_shapes(width, 5),
    }

    @jax.checkpoint
    def layer(x, p):
        y = rms_norm(p["norm1"], x)
        q, k, v = jnp.einsum("bld,cdhk->cblhk", y, p["qkv"])
        x = x + jnp.einsum("blhk,hkd->bld", attention(q, k, v, causal=True), p["out"])
        y = rms_norm(p["norm2"], x)
        return x + jax.nn.gelu(y @ p["up"]) @ p["down"], None

    def apply(p, ids):
        x, _ = lax.scan(layer, jnp.take(p["table"], ids, axis=0), p["layers"])
        return dense(p["head"], x)

    return from_dict(apply, shapes, tokens())
