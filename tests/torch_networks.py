"""The networks of `scripts/make_torch_pruning_golden.py` as functions on dicts of layers.

`resnet18()` and the like are `(apply, variables, x)`: of variables and images, only the shapes.
Layers have the names that they have in PyTorch.
"""

import jax
import jax.numpy as jnp
from architectures._dict_layers import (
    attention,
    batch_norm,
    batch_norm_shapes,
    conv,
    conv_shapes,
    dense,
    dense_shapes,
    global_mean,
    layer_norm,
    norm_shapes,
)
from jax import lax

WIDTH, HEADS, BLOCKS, MLP = 48, 4, 2, 96  # as in scripts/make_torch_pruning_golden.py
BASIC, BOTTLENECK = (3, 3), (1, 3, 1)  # the sizes of a block's kernels


def resnet18():
    return _resnet(BASIC, (2, 2, 2, 2), expansion=1)


def resnet50():
    return _resnet(BOTTLENECK, (3, 4, 6, 3), expansion=4)


def vit_separate():
    return _vit("q", "k", "v")


def vit_fused():
    return _vit("qkv")


def _resnet(kernels, depths, expansion):
    blocks = [
        (f"layer{stage + 1}.{i}", 64 * 2**stage, 2 if stage and not i else 1)
        for stage, depth in enumerate(depths)
        for i in range(depth)
    ]

    def shapes():
        p = {"conv1": conv_shapes(7, 3, 64), "bn1": batch_norm_shapes(64)}
        inputs = 64
        for name, width, stride in blocks:
            outputs = width * expansion
            widths = [inputs, *[width] * (len(kernels) - 1), outputs]
            for i, size in enumerate(kernels):
                p[f"{name}.conv{i + 1}"] = conv_shapes(size, widths[i], widths[i + 1])
                p[f"{name}.bn{i + 1}"] = batch_norm_shapes(widths[i + 1])
            if stride > 1 or inputs != outputs:
                p[f"{name}.downsample.0"] = conv_shapes(1, inputs, outputs)
                p[f"{name}.downsample.1"] = batch_norm_shapes(outputs)
            inputs = outputs
        return p | {"fc": dense_shapes(inputs, 1000)}

    def block(p, name, x, stride):
        y = x
        for i, size in enumerate(kernels):
            # torchvision: the first 3 x 3 kernel of a block has the stride.
            step = stride if i == kernels.index(3) else 1
            y = _conv(p[f"{name}.conv{i + 1}"], y, step, size // 2)
            y = batch_norm(p[f"{name}.bn{i + 1}"], y)
            y = jax.nn.relu(y) if i + 1 < len(kernels) else y
        if f"{name}.downsample.0" in p:
            x = _conv(p[f"{name}.downsample.0"], x, stride, 0)
            x = batch_norm(p[f"{name}.downsample.1"], x)
        return jax.nn.relu(y + x)

    def apply(p, x):
        x = jax.nn.relu(batch_norm(p["bn1"], _conv(p["conv1"], x, 2, 3)))
        padding = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
        for name, _, stride in blocks:
            x = block(p, name, x, stride)
        return dense(p["fc"], global_mean(x))

    return apply, jax.eval_shape(shapes), _images(224)


def _vit(*parts):
    names = [f"blocks.{i}" for i in range(BLOCKS)]

    def shapes():
        p = {"patches": conv_shapes(8, 3, WIDTH, bias=True), "cls_token": jnp.zeros((1, 1, WIDTH))}
        p |= {"pos_embed": jnp.zeros((1, 17, WIDTH)), "norm": norm_shapes(WIDTH)}
        for name in names:
            p |= {f"{name}.attn.{a}": dense_shapes(WIDTH, len(a) * WIDTH) for a in parts}
            p |= {f"{name}.attn.proj": dense_shapes(WIDTH, WIDTH)}
            p |= {f"{name}.norm{i}": norm_shapes(WIDTH) for i in (1, 2)}
            p |= {f"{name}.fc1": dense_shapes(WIDTH, MLP), f"{name}.fc2": dense_shapes(MLP, WIDTH)}
        return p | {"head": dense_shapes(WIDTH, 10)}

    def attend(p, name, x):
        # (batch, tokens, 1 or 3, heads, width of a head)
        made = [
            dense(p[f"{name}.attn.{a}"], x).reshape(*x.shape[:2], len(a), HEADS, WIDTH // HEADS)
            for a in parts
        ]
        q, k, v = (y[:, :, i] for y in made for i in range(y.shape[2]))
        return dense(p[f"{name}.attn.proj"], attention(q, k, v).reshape(x.shape))

    def apply(p, x):
        x = _conv(p["patches"], x, 8, 0).reshape(len(x), 16, WIDTH)
        cls_token = jnp.broadcast_to(p["cls_token"], (len(x), 1, WIDTH))
        x = jnp.concatenate([cls_token, x], 1) + p["pos_embed"]
        for name in names:
            x = x + attend(p, name, layer_norm(p[f"{name}.norm1"], x))
            y = dense(p[f"{name}.fc1"], layer_norm(p[f"{name}.norm2"], x))
            x = x + dense(p[f"{name}.fc2"], jax.nn.gelu(y, approximate=False))
        return dense(p["head"], layer_norm(p["norm"], x)[:, 0])

    return apply, jax.eval_shape(shapes), _images(32)


def _conv(p, x, stride, padding):
    return conv(p, x, stride, padding=[(padding, padding)] * 2)


def _images(size):
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
