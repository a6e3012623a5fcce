"""Image networks in Flax Linen."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from ._case import case, from_linen, images, vectors


class MLP(nn.Module):
    widths: Sequence[int]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


@case("mlp-linen")
def mlp():
    return from_linen(MLP((7, 9, 3)), vectors(5))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(7, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(11)(x))
        return nn.Dense(10)(x)


@case("cnn-linen")
def cnn():
    return from_linen(CNN(), images())


class BasicBlock(nn.Module):
    hidden: int
    outputs: int
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x, train=False):
        residual = x
        x = nn.Conv(self.hidden, (3, 3), self.strides, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(self.outputs, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        if residual.shape != x.shape:
            residual = nn.Conv(self.outputs, (1, 1), self.strides, use_bias=False)(residual)
            residual = nn.BatchNorm(use_running_average=not train)(residual)
        return nn.relu(x + residual)


class Bottleneck(nn.Module):
    hidden: tuple[int, int]
    outputs: int
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x, train=False):
        residual = x
        x = nn.Conv(self.hidden[0], (1, 1), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(self.hidden[1], (3, 3), self.strides, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(self.outputs, (1, 1), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        if residual.shape != x.shape:
            residual = nn.Conv(self.outputs, (1, 1), self.strides, use_bias=False)(residual)
            residual = nn.BatchNorm(use_running_average=not train)(residual)
        return nn.relu(x + residual)


class ResNet(nn.Module):
    blocks: Sequence[nn.Module]
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        for block in self.blocks:
            x = block(x, train)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


@case("resnet_basic-linen")
def resnet_basic():
    blocks = (BasicBlock(5, 6), BasicBlock(7, 9, (2, 2)), BasicBlock(8, 9))
    return from_linen(ResNet(blocks, 4), images())


@case("resnet_bottleneck-linen")
def resnet_bottleneck():
    blocks = (Bottleneck((4, 5), 12), Bottleneck((7, 8), 12), Bottleneck((9, 10), 14, (2, 2)))
    return from_linen(ResNet(blocks, 11), images())


class InvertedResidual(nn.Module):
    hidden: int
    outputs: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(self.hidden, (1, 1), use_bias=False)(x)
        y = nn.relu6(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(
            self.hidden,
            (3, 3),
            strides=self.stride,
            feature_group_count=self.hidden,
            use_bias=False,
        )(y)
        y = nn.relu6(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(self.outputs, (1, 1), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(5, (3, 3))(x))
        x = InvertedResidual(12, 5)(x)
        x = InvertedResidual(14, 7, stride=2)(x)
        x = nn.relu6(nn.Conv(16, (1, 1))(x))
        return nn.Dense(4)(x.mean(axis=(1, 2)))


@case("mobilenet-linen")
def mobilenet():
    return from_linen(MobileNet(), images())


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        for growth in (4, 5):
            y = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = jnp.concatenate([x, nn.Conv(growth, (3, 3), use_bias=False)(y)], axis=-1)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.avg_pool(nn.Conv(7, (1, 1))(x), (2, 2), strides=(2, 2))
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = jnp.concatenate([nn.Conv(3, (3, 3))(y), x], axis=-1)
        return nn.Dense(9)(x.mean(axis=(1, 2)))


@case("densenet-linen")
def densenet():
    return from_linen(DenseNet(), images())


class SqueezeExcite(nn.Module):
    reduced: int

    @nn.compact
    def __call__(self, x):
        gate = x.mean(axis=(1, 2), keepdims=True)
        gate = nn.relu(nn.Dense(self.reduced)(gate))
        return x * nn.sigmoid(nn.Dense(x.shape[-1])(gate))


class GroupNormNet(nn.Module):
    excite: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3))(x)
        x = nn.relu(nn.GroupNorm(num_groups=3)(x))
        x = nn.Conv(12, (3, 3), strides=2)(x)
        x = nn.relu(nn.GroupNorm(num_groups=4)(x))
        if self.excite:
            x = SqueezeExcite(5)(x)
        return nn.Dense(7)(x.mean(axis=(1, 2)))


@case("group_norm-linen")
def group_norm():
    return from_linen(GroupNormNet(), images())


@case("squeeze_excite-linen")
def squeeze_excite():
    return from_linen(GroupNormNet(excite=True), images())


class ViTBlock(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)(y, y)
        y = nn.Dense(self.hidden)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class ViT(nn.Module):
    width: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (4, 4), strides=(4, 4), padding="VALID", name="patch")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        for hidden in (14, 15):
            x = ViTBlock(hidden)(x)
        return nn.Dense(9)(nn.LayerNorm()(x)[:, 0])


@case("vit-linen")
def vit():
    return from_linen(ViT(), images())
