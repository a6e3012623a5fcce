"""Image networks as plain functions on nested dicts."""

import jax
import jax.numpy as jnp
from jax import lax

from ._case import case, from_dict, images, vectors
from ._dict_layers import (
    attention,
    avg_pool,
    batch_norm,
    batch_norm_shapes,
    conv,
    conv_shapes,
    dense,
    dense_shapes,
    global_mean,
    layer_norm,
    max_pool,
    norm_shapes,
)


@case("mlp-dict")
def mlp():
    shapes = {
        "hidden1": dense_shapes(5, 7),
        "hidden2": dense_shapes(7, 9),
        "out": dense_shapes(9, 3),
    }

    def apply(p, x):
        x = jax.nn.relu(dense(p["hidden1"], x))
        x = jnp.tanh(dense(p["hidden2"], x))
        return dense(p["out"], x)

    return from_dict(apply, shapes, vectors(5))


@case("cnn-dict")
def cnn():
    shapes = {
        "conv1": conv_shapes(3, 3, 5, bias=True),
        "conv2": conv_shapes(3, 5, 7, bias=True),
        "dense1": dense_shapes(2 * 2 * 7, 11),
        "dense2": dense_shapes(11, 10),
    }

    def apply(p, x):
        x = max_pool(jax.nn.relu(conv(p["conv1"], x)))
        x = max_pool(jax.nn.relu(conv(p["conv2"], x)))
        x = x.reshape(x.shape[0], -1)
        return dense(p["dense2"], jax.nn.relu(dense(p["dense1"], x)))

    return from_dict(apply, shapes, images())


@case("resnet_basic-dict")
def resnet_basic():
    def block_shapes(inputs, hidden, outputs, stride):
        p = {
            "conv1": conv_shapes(3, inputs, hidden),
            "bn1": batch_norm_shapes(hidden),
            "conv2": conv_shapes(3, hidden, outputs),
            "bn2": batch_norm_shapes(outputs),
        }
        if stride > 1:
            p |= {"proj": conv_shapes(1, inputs, outputs), "bn_proj": batch_norm_shapes(outputs)}
        return p

    def block(p, x, stride):
        y = jax.nn.relu(batch_norm(p["bn1"], conv(p["conv1"], x, stride)))
        y = batch_norm(p["bn2"], conv(p["conv2"], y))
        if "proj" in p:
            x = batch_norm(p["bn_proj"], conv(p["proj"], x, stride))
        return jax.nn.relu(x + y)

    strides = [1, 2, 1]
    shapes = {
        "stem": conv_shapes(3, 3, 6),
        "bn": batch_norm_shapes(6),
        "blocks": [
            block_shapes(6, 5, 6, 1),
            block_shapes(6, 7, 9, 2),
            block_shapes(9, 8, 9, 1),
        ],
        "head": dense_shapes(9, 4),
    }

    def apply(p, x):
        x = jax.nn.relu(batch_norm(p["bn"], conv(p["stem"], x)))
        for params, stride in zip(p["blocks"], strides, strict=True):
            x = block(params, x, stride)
        return dense(p["head"], global_mean(x))

    return from_dict(apply, shapes, images())


@case("resnet_bottleneck-dict")
def resnet_bottleneck():
    def block_shapes(inputs, inner1, inner2, outputs):
        widths = [inputs, inner1, inner2, outputs]
        p = {}
        for i, size in enumerate([1, 3, 1]):
            p[f"conv{i}"] = conv_shapes(size, widths[i], widths[i + 1])
            p[f"bn{i}"] = batch_norm_shapes(widths[i + 1])
        if inputs != outputs:
            p |= {"proj": conv_shapes(1, inputs, outputs), "bn_proj": batch_norm_shapes(outputs)}
        return p

    def block(p, x, stride=1):
        y = jax.nn.relu(batch_norm(p["bn0"], conv(p["conv0"], x)))
        y = jax.nn.relu(batch_norm(p["bn1"], conv(p["conv1"], y, stride)))
        y = batch_norm(p["bn2"], conv(p["conv2"], y))
        if "proj" in p:
            x = batch_norm(p["bn_proj"], conv(p["proj"], x, stride))
        return jax.nn.relu(x + y)

    shapes = {
        "stem": conv_shapes(3, 3, 6),
        "block1": block_shapes(6, 4, 5, 12),
        "block2": block_shapes(12, 7, 8, 12),
        "block3": block_shapes(12, 9, 10, 14),
        "head": dense_shapes(14, 11),
    }

    def apply(p, x):
        x = jax.nn.relu(conv(p["stem"], x))
        x = block(p["block2"], block(p["block1"], x))
        x = block(p["block3"], x, stride=2)
        return dense(p["head"], global_mean(x))

    return from_dict(apply, shapes, images())


@case("mobilenet-dict")
def mobilenet():
    def block_shapes(inputs, inner, outputs):
        return {
            "expand": conv_shapes(1, inputs, inner),
            "bn1": batch_norm_shapes(inner),
            "depthwise": conv_shapes(3, 1, inner),
            "bn2": batch_norm_shapes(inner),
            "project": conv_shapes(1, inner, outputs),
            "bn3": batch_norm_shapes(outputs),
        }

    def block(p, x, stride):
        y = jax.nn.relu6(batch_norm(p["bn1"], conv(p["expand"], x)))
        y = conv(p["depthwise"], y, stride, groups=y.shape[-1])
        y = jax.nn.relu6(batch_norm(p["bn2"], y))
        y = batch_norm(p["bn3"], conv(p["project"], y))
        return x + y if x.shape == y.shape else y

    shapes = {
        "stem": conv_shapes(3, 3, 5, bias=True),
        "block1": block_shapes(5, 12, 5),
        "block2": block_shapes(5, 14, 7),
        "block3": block_shapes(7, 16, 7),
        "head": dense_shapes(7, 4),
    }

    def apply(p, x):
        x = jax.nn.relu6(conv(p["stem"], x))
        x = block(p["block1"], x, 1)
        x = block(p["block2"], x, 2)
        x = block(p["block3"], x, 1)
        return dense(p["head"], global_mean(x))

    return from_dict(apply, shapes, images())


@case("densenet-dict")
def densenet():
    shapes = {"stem": conv_shapes(3, 3, 6)}
    width = 6
    for i, growth in enumerate([4, 5]):
        shapes[f"layer{i}"] = {
            "bn": batch_norm_shapes(width),
            "conv": conv_shapes(3, width, growth),
        }
        width += growth
    shapes["transition"] = {"bn": batch_norm_shapes(width), "conv": conv_shapes(1, width, 7)}
    shapes["layer2"] = {"bn": batch_norm_shapes(7), "conv": conv_shapes(3, 7, 3)}
    shapes["head"] = dense_shapes(10, 9)

    def bn_relu_conv(p, x):
        return conv(p["conv"], jax.nn.relu(batch_norm(p["bn"], x)))

    def apply(p, x):
        x = conv(p["stem"], x)
        for name in ["layer0", "layer1"]:
            x = jnp.concatenate([x, bn_relu_conv(p[name], x)], axis=-1)
        x = avg_pool(bn_relu_conv(p["transition"], x))
        x = jnp.concatenate([x, bn_relu_conv(p["layer2"], x)], axis=-1)
        return dense(p["head"], global_mean(jax.nn.relu(x)))

    return from_dict(apply, shapes, images())


@case("unet-dict")
def unet():
    shapes = {
        "down1": conv_shapes(3, 3, 5, bias=True),
        "down2": conv_shapes(3, 5, 7, bias=True),
        "middle": conv_shapes(3, 7, 9, bias=True),
        "up2": conv_shapes(2, 9, 8, bias=True),
        "merge2": conv_shapes(3, 8 + 7, 6, bias=True),
        "up1": conv_shapes(2, 6, 4, bias=True),
        "merge1": conv_shapes(3, 4 + 5, 10, bias=True),
        "out": conv_shapes(1, 10, 2, bias=True),
    }

    def up(p, x):
        y = lax.conv_transpose(
            x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + p["b"][None, None, None, :]

    def apply(p, x):
        skip1 = jax.nn.relu(conv(p["down1"], x))
        skip2 = jax.nn.relu(conv(p["down2"], max_pool(skip1)))
        x = jax.nn.relu(conv(p["middle"], max_pool(skip2)))
        x = jnp.concatenate([skip2, up(p["up2"], x)], axis=-1)
        x = jax.nn.relu(conv(p["merge2"], x))
        x = jnp.concatenate([up(p["up1"], x), skip1], axis=-1)
        x = jax.nn.relu(conv(p["merge1"], x))
        return conv(p["out"], x)

    return from_dict(apply, shapes, images())


@case("vit-dict")
def vit():
    width, heads, inner, mlp, patches = 10, 3, 12, 14, 4
    shapes = {
        "patch": {"w": jnp.zeros((4, 4, 3, width)), "b": jnp.zeros(width)},
        "cls": jnp.zeros((1, 1, width)),
        "position": jnp.zeros((1, patches + 1, width)),
        "blocks": [
            {
                "norm1": norm_shapes(width),
                "query": dense_shapes(width, inner),
                "key": dense_shapes(width, inner),
                "value": dense_shapes(width, inner),
                "out": dense_shapes(inner, width),
                "norm2": norm_shapes(width),
                "mlp1": dense_shapes(width, hidden),
                "mlp2": dense_shapes(hidden, width),
            }
            for hidden in (mlp, mlp + 1)
        ],
        "norm": norm_shapes(width),
        "head": dense_shapes(width, 9),
    }

    def block(p, x):
        y = layer_norm(p["norm1"], x)
        q, k, v = (
            dense(p[name], y).reshape(*y.shape[:2], heads, -1) for name in ("query", "key", "value")
        )
        x = x + dense(p["out"], attention(q, k, v).reshape(*y.shape[:2], inner))
        y = layer_norm(p["norm2"], x)
        return x + dense(p["mlp2"], jax.nn.gelu(dense(p["mlp1"], y)))

    def apply(p, x):
        x = conv(p["patch"], x, stride=4, padding="VALID")
        x = x.reshape(x.shape[0], -1, width)
        cls = jnp.broadcast_to(p["cls"], (x.shape[0], 1, width))
        x = jnp.concatenate([cls, x], axis=1) + p["position"]
        for params in p["blocks"]:
            x = block(params, x)
        return dense(p["head"], layer_norm(p["norm"], x)[:, 0])

    return from_dict(apply, shapes, images())
