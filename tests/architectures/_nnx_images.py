"""Image networks in Flax NNX."""

import jax.numpy as jnp
from flax import nnx

from ._case import case, from_nnx, images, vectors


class MLP(nnx.Module):
    def __init__(self, *, rngs):
        self.linear1 = nnx.Linear(5, 7, rngs=rngs)
        self.linear2 = nnx.Linear(7, 9, rngs=rngs)
        self.linear3 = nnx.Linear(9, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.linear1(x))
        x = nnx.gelu(self.linear2(x))
        return self.linear3(x)


@case("mlp-nnx")
def mlp():
    return from_nnx(lambda rngs: MLP(rngs=rngs), vectors(5))


class CNN(nnx.Module):
    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(3, 5, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(5, 7, kernel_size=(3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(2 * 2 * 7, 11, rngs=rngs)
        self.linear2 = nnx.Linear(11, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), window_shape=(2, 2), strides=(2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return self.linear2(nnx.relu(self.linear1(x)))


@case("cnn-nnx")
def cnn():
    return from_nnx(lambda rngs: CNN(rngs=rngs), images())


class BasicBlock(nnx.Module):
    def __init__(self, inputs, hidden, outputs, stride, *, rngs):
        strides = (stride, stride)
        self.conv1 = nnx.Conv(inputs, hidden, (3, 3), strides, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(hidden, rngs=rngs)
        self.conv2 = nnx.Conv(hidden, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(outputs, rngs=rngs)
        if stride > 1:
            self.shortcut = nnx.Sequential(
                nnx.Conv(inputs, outputs, (1, 1), strides, use_bias=False, rngs=rngs),
                nnx.BatchNorm(outputs, rngs=rngs),
            )
        else:
            self.shortcut = None

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)
        self.blocks = nnx.List(
            [
                BasicBlock(6, 5, 6, 1, rngs=rngs),
                BasicBlock(6, 7, 9, 2, rngs=rngs),
                BasicBlock(9, 8, 9, 1, rngs=rngs),
            ]
        )
        self.head = nnx.Linear(9, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


@case("resnet_basic-nnx")
def resnet_basic():
    return from_nnx(lambda rngs: ResNet(rngs=rngs), images())


class InvertedResidual(nnx.Module):
    def __init__(self, inputs, hidden, outputs, stride, *, rngs):
        self.expand = nnx.Conv(inputs, hidden, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(hidden, rngs=rngs)
        self.depthwise = nnx.Conv(
            hidden,
            hidden,
            (3, 3),
            strides=stride,
            feature_group_count=hidden,
            use_bias=False,
            rngs=rngs,
        )
        self.bn2 = nnx.BatchNorm(hidden, rngs=rngs)
        self.project = nnx.Conv(hidden, outputs, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu6(self.bn1(self.expand(x)))
        y = nnx.relu6(self.bn2(self.depthwise(y)))
        y = self.bn3(self.project(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.block1 = InvertedResidual(5, 12, 5, 1, rngs=rngs)
        self.block2 = InvertedResidual(5, 14, 7, 2, rngs=rngs)
        self.last = nnx.Conv(7, 16, (1, 1), rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = self.block2(self.block1(nnx.relu6(self.stem(x))))
        return self.head(nnx.relu6(self.last(x)).mean(axis=(1, 2)))


@case("mobilenet-nnx")
def mobilenet():
    return from_nnx(lambda rngs: MobileNet(rngs=rngs), images())


class DenseNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        norms, convs, width = [], [], 6
        for growth in (4, 5, 3):
            norms.append(nnx.BatchNorm(width, rngs=rngs))
            convs.append(nnx.Conv(width, growth, (3, 3), rngs=rngs))
            width += growth
        self.norms, self.convs = nnx.List(norms), nnx.List(convs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = jnp.concatenate([x, conv(nnx.relu(norm(x)))], axis=-1)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


@case("densenet-nnx")
def densenet():
    return from_nnx(lambda rngs: DenseNet(rngs=rngs), images())


class UNet(nnx.Module):
    def __init__(self, *, rngs):
        self.down1 = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.down2 = nnx.Conv(5, 7, (3, 3), rngs=rngs)
        self.middle = nnx.Conv(7, 9, (3, 3), rngs=rngs)
        self.up2 = nnx.ConvTranspose(9, 8, (2, 2), strides=(2, 2), rngs=rngs)
        self.merge2 = nnx.Conv(8 + 7, 6, (3, 3), rngs=rngs)
        self.up1 = nnx.ConvTranspose(6, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.merge1 = nnx.Conv(4 + 5, 10, (3, 3), rngs=rngs)
        self.out = nnx.Conv(10, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        skip1 = nnx.relu(self.down1(x))
        skip2 = nnx.relu(self.down2(nnx.max_pool(skip1, (2, 2), (2, 2))))
        x = nnx.relu(self.middle(nnx.avg_pool(skip2, (2, 2), (2, 2))))
        x = nnx.relu(self.merge2(jnp.concatenate([self.up2(x), skip2], axis=-1)))
        x = nnx.relu(self.merge1(jnp.concatenate([self.up1(x), skip1], axis=-1)))
        return self.out(x)


@case("unet-nnx")
def unet():
    return from_nnx(lambda rngs: UNet(rngs=rngs), images())


class SqueezeExciteNet(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.squeeze = nnx.Linear(8, 5, rngs=rngs)
        self.excite = nnx.Linear(5, 8, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.norm(self.conv(x)))
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(gate))))
        return self.head(jnp.mean(x * gate, axis=(1, 2)))


@case("squeeze_excite-nnx")
def squeeze_excite():
    return from_nnx(lambda rngs: SqueezeExciteNet(rngs=rngs), images())


class ViTBlock(nnx.Module):
    def __init__(self, width, hidden, *, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=3, in_features=width, qkv_features=12, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp1 = nnx.Linear(width, hidden, rngs=rngs)
        self.mlp2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp2(nnx.gelu(self.mlp1(self.norm2(x))))


class ViT(nnx.Module):
    def __init__(self, width=10, *, rngs):
        self.patch = nnx.Conv(3, width, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, width)))
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 5, width)))
        self.blocks = nnx.List([ViTBlock(width, 14, rngs=rngs), ViTBlock(width, 15, rngs=rngs)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 9, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.tile(self.cls[...], (x.shape[0], 1, 1))
        x = jnp.concatenate([cls, x], axis=1) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@case("vit-nnx")
def vit():
    return from_nnx(lambda rngs: ViT(rngs=rngs), images())
