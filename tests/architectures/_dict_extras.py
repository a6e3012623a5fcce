"""Less usual parts, as plain functions on nested dicts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._case import case, from_dict, images, vectors
from ._dict_layers import (
    along_last,
    batch_norm,
    batch_norm_shapes,
    conv,
    conv_shapes,
    dense,
    dense_shapes,
    global_mean,
    norm_shapes,
)


@case("resnext-dict")
def resnext():
    """A bottleneck block with a grouped convolution."""
    shapes = {
        "stem": conv_shapes(3, 3, 9),
        "reduce": conv_shapes(1, 9, 8),
        "bn1": batch_norm_shapes(8),
        "grouped": conv_shapes(3, 8 // 4, 12),
        "bn2": batch_norm_shapes(12),
        "expand": conv_shapes(1, 12, 9),
        "head": dense_shapes(9, 5),
    }

    def apply(p, x):
        x = jax.nn.relu(conv(p["stem"], x))
        y = jax.nn.relu(batch_norm(p["bn1"], conv(p["reduce"], x)))
        y = jax.nn.relu(batch_norm(p["bn2"], conv(p["grouped"], y, groups=4)))
        x = jax.nn.relu(x + conv(p["expand"], y))
        return dense(p["head"], global_mean(x))

    return from_dict(apply, shapes, images())


@case("shufflenet-dict")
def shufflenet():
    """Grouped pointwise convolutions, with a channel shuffle between."""
    shapes = {
        "stem": conv_shapes(3, 3, 9),
        "grouped1": conv_shapes(1, 9 // 3, 12),
        "depthwise": conv_shapes(3, 1, 12),
        "grouped2": conv_shapes(1, 12 // 3, 9),
        "head": dense_shapes(9, 5),
    }

    def shuffle(x, groups):
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height, width, groups, channels // groups)
        return x.transpose(0, 1, 2, 4, 3).reshape(batch, height, width, channels)

    def apply(p, x):
        x = jax.nn.relu(conv(p["stem"], x))
        y = jax.nn.relu(conv(p["grouped1"], x, groups=3))
        y = conv(p["depthwise"], shuffle(y, 3), groups=12)
        x = jax.nn.relu(x + conv(p["grouped2"], y, groups=3))
        return dense(p["head"], global_mean(x))

    return from_dict(apply, shapes, images())


@case("zero_padded_shortcut-dict")
def zero_padded_shortcut():
    """ResNet's option A: a strided slice, zeros for the new channels."""
    shapes = {
        "stem": conv_shapes(3, 3, 5),
        "conv1": conv_shapes(3, 5, 7),
        "bn1": batch_norm_shapes(7),
        "conv2": conv_shapes(3, 7, 9),
        "bn2": batch_norm_shapes(9),
        "head": dense_shapes(9, 4),
    }

    def apply(p, x):
        x = jax.nn.relu(conv(p["stem"], x))
        y = jax.nn.relu(batch_norm(p["bn1"], conv(p["conv1"], x, stride=2)))
        y = batch_norm(p["bn2"], conv(p["conv2"], y))
        shortcut = jnp.pad(x[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), (2, 2)))
        return dense(p["head"], global_mean(jax.nn.relu(y + shortcut)))

    return from_dict(apply, shapes, images())


@case("glu-dict")
def glu():
    """Gated linear units by jnp.split of one projection."""
    shapes = {
        "in": dense_shapes(5, 2 * 7),
        "middle": dense_shapes(7, 2 * 6),
        "out": dense_shapes(6, 3),
    }

    def apply(p, x):
        value, gate = jnp.split(dense(p["in"], x), 2, axis=-1)
        x = value * jax.nn.sigmoid(gate)
        x = jax.nn.glu(dense(p["middle"], x))
        return dense(p["out"], x)

    return from_dict(apply, shapes, vectors(5))


@case("mixture_cond-dict")
def mixture_cond():
    """One of two experts for the whole batch, by lax.cond, and three by lax.switch."""
    shapes = {
        "in": dense_shapes(5, 8),
        "gate": dense_shapes(8, 1),
        "narrow": {"up": dense_shapes(8, 6), "down": dense_shapes(6, 9)},
        "wide": {"up": dense_shapes(8, 12), "down": dense_shapes(12, 9)},
        "experts": [dense_shapes(9, 7, bias=False) for _ in range(3)],
        "out": dense_shapes(7, 4),
    }

    def expert(p, x):
        return dense(p["down"], jax.nn.relu(dense(p["up"], x)))

    def apply(p, x):
        x = jax.nn.relu(dense(p["in"], x))
        open_ = jnp.mean(dense(p["gate"], x)) > 0
        x = lax.cond(open_, lambda x: expert(p["narrow"], x), lambda x: expert(p["wide"], x), x)
        index = jnp.argmax(jnp.sum(x, axis=0)) % 3
        branches = [lambda x, e=e: jnp.tanh(dense(e, x)) for e in p["experts"]]
        return dense(p["out"], lax.switch(index, branches, x))

    return from_dict(apply, shapes, vectors(5))


@case("mixture_soft-dict")
def mixture_soft():
    """A soft mixture of experts whose kernels are stacked, by einsum."""
    experts, width, hidden = 4, 6, 9
    shapes = {
        "in": dense_shapes(5, width),
        "router": dense_shapes(width, experts),
        "w1": jnp.zeros((experts, width, hidden)),
        "bias1": jnp.zeros((experts, hidden)),
        "w2": jnp.zeros((experts, hidden, width)),
        "out": dense_shapes(width, 3),
    }

    def apply(p, x):
        x = dense(p["in"], x)
        weights = jax.nn.softmax(dense(p["router"], x), axis=-1)
        h = jax.nn.relu(jnp.einsum("bd,edh->beh", x, p["w1"]) + p["bias1"][None])
        y = jnp.einsum("beh,ehd->bed", h, p["w2"])
        return dense(p["out"], x + jnp.einsum("be,bed->bd", weights, y))

    return from_dict(apply, shapes, vectors(5))


@case("fori_loop-dict")
def fori_loop():
    """The same layer, five times over."""
    shapes = {"in": dense_shapes(5, 7), "step": dense_shapes(7, 7), "out": dense_shapes(7, 3)}

    def apply(p, x):
        x = dense(p["in"], x)
        h = lax.fori_loop(0, 5, lambda _, h: jnp.tanh(dense(p["step"], h) + x), jnp.zeros_like(x))
        return dense(p["out"], h)

    return from_dict(apply, shapes, vectors(5))


@case("while_loop-dict")
def while_loop():
    """A fixed point, sought until it moves little."""
    shapes = {"in": dense_shapes(5, 7), "up": dense_shapes(7, 9), "down": dense_shapes(9, 7)}
    shapes["out"] = dense_shapes(7, 3)

    def apply(p, x):
        x = dense(p["in"], x)

        def unfinished(carry):
            i, _, change = carry
            return (i < 8) & (change > 1e-3)

        def step(carry):
            i, h, _ = carry
            new = 0.5 * jnp.tanh(x + dense(p["down"], jax.nn.relu(dense(p["up"], h))))
            return i + 1, new, jnp.max(jnp.abs(new - h))

        _, h, _ = lax.while_loop(unfinished, step, (0, jnp.zeros_like(x), jnp.inf))
        return dense(p["out"], h)

    return from_dict(apply, shapes, vectors(5))


@case("instance_norm-dict")
def instance_norm():
    """Statistics of every image and channel by itself."""
    shapes = {
        "conv1": conv_shapes(3, 3, 5, bias=True),
        "norm1": norm_shapes(5),
        "conv2": conv_shapes(3, 5, 7, bias=True),
        "norm2": norm_shapes(7),
        "out": conv_shapes(1, 7, 4, bias=True),
    }

    def norm(p, x):
        mean = x.mean(axis=(1, 2), keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axis=(1, 2), keepdims=True)
        x = (x - mean) * lax.rsqrt(variance + 1e-5)
        return x * along_last(p["scale"], x) + along_last(p["bias"], x)

    def apply(p, x):
        x = jax.nn.leaky_relu(norm(p["norm1"], conv(p["conv1"], x)))
        x = jax.nn.leaky_relu(norm(p["norm2"], conv(p["conv2"], x, stride=2)))
        return conv(p["out"], x)

    return from_dict(apply, shapes, images())


@case("weight_standardization-dict")
def weight_standardization():
    """Kernels standardized over their fan in, in the forward pass."""
    shapes = {
        "conv1": {**conv_shapes(3, 3, 5, bias=True), "gain_scale": jnp.zeros(5)},
        "conv2": {**conv_shapes(3, 5, 7, bias=True), "gain_scale": jnp.zeros(7)},
        "head": dense_shapes(7, 4),
    }

    def standardized(p):
        w = p["w"]
        mean = jnp.mean(w, axis=(0, 1, 2), keepdims=True)
        variance = jnp.var(w, axis=(0, 1, 2), keepdims=True)
        scale = lax.rsqrt(variance * np.prod(w.shape[:-1]) + 1e-4)
        return {"w": (w - mean) * scale * along_last(p["gain_scale"], w), "b": p["b"]}

    def apply(p, x):
        x = jax.nn.relu(conv(standardized(p["conv1"]), x))
        x = jax.nn.relu(conv(standardized(p["conv2"]), x, stride=2))
        return dense(p["head"], global_mean(x))

    return from_dict(apply, shapes, images())


@case("einsums-dict")
def einsums():
    """Bilinear forms, permuted axes, and a product of three."""
    shapes = {
        "left": jnp.zeros((5, 7)),
        "right": jnp.zeros((9, 5)),
        "core": jnp.zeros((7, 9, 8)),
        "low1": jnp.zeros((8, 3)),
        "low2": jnp.zeros((3, 10)),
        "out": jnp.zeros((4, 10)),
    }

    def apply(p, x):
        a = jnp.einsum("bld,dh->lhb", x, p["left"])
        b = jnp.einsum("kd,bld->bkl", p["right"], x)
        c = jax.nn.relu(jnp.einsum("lhb,bkl,hkm->bm", a, b, p["core"]))
        d = jnp.tanh(jnp.einsum("bm,mr,rn->bn", c, p["low1"], p["low2"]))
        return jnp.einsum("on,bn->bo", p["out"], d)

    return from_dict(apply, shapes, vectors(6, 5))


def conv1d(p, x, dilation=1):
    """A causal convolution of (batch, length, channels)."""
    past = (p["w"].shape[0] - 1) * dilation
    y = lax.conv_general_dilated(
        x,
        p["w"],
        (1,),
        [(past, 0)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    return y + p["b"][None, None, :]


@case("wavenet-dict")
def wavenet():
    """Dilated convolutions, tanh times sigmoid, summed skips; the last residual is unused."""

    def shapes1d(size, inputs, outputs):
        return {"w": jnp.zeros((size, inputs, outputs)), "b": jnp.zeros(outputs)}

    shapes = {
        "in": shapes1d(2, 3, 6),
        "layers": [
            {
                "filter": shapes1d(2, 6, hidden),
                "gate": shapes1d(2, 6, hidden),
                "residual": shapes1d(1, hidden, 6),
                "skip": shapes1d(1, hidden, 10),
            }
            for hidden in (7, 8, 9)
        ],
        "out1": shapes1d(1, 10, 11),
        "out2": shapes1d(1, 11, 4),
    }

    def apply(p, x):
        x = conv1d(p["in"], x)
        skips = 0.0
        for i, layer in enumerate(p["layers"]):
            filtered = conv1d(layer["filter"], x, dilation=2**i)
            y = jnp.tanh(filtered) * jax.nn.sigmoid(conv1d(layer["gate"], x, dilation=2**i))
            skips = skips + conv1d(layer["skip"], y)
            x = x + conv1d(layer["residual"], y)
        return conv1d(p["out2"], jax.nn.relu(conv1d(p["out1"], jax.nn.relu(skips))))

    return from_dict(apply, shapes, vectors(7, 3))
