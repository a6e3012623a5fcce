"""Image networks in Equinox: one example at a time, channels first, kernels (out, in, ...)."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ._case import case, from_equinox, from_stateful_equinox, images, vectors


@case("mlp-equinox")
def mlp():
    return from_equinox(
        lambda key: eqx.nn.MLP(in_size=5, out_size=3, width_size=7, depth=2, key=key), vectors(5)
    )


class CNN(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(3, 5, 3, padding=1, key=keys[0]),
            jax.nn.relu,
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(5, 7, 3, padding=1, key=keys[1]),
            jax.nn.relu,
            eqx.nn.MaxPool2d(2, 2),
            jnp.ravel,
            eqx.nn.Linear(7 * 2 * 2, 11, key=keys[2]),
            jax.nn.relu,
            eqx.nn.Linear(11, 10, key=keys[3]),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@case("cnn-equinox")
def cnn():
    return from_equinox(CNN, images(channels_first=True))


class ConvNorm(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, inputs, outputs, size, stride=1, *, key, mode="ema"):
        padding = size // 2
        self.conv = eqx.nn.Conv2d(inputs, outputs, size, stride, padding, use_bias=False, key=key)
        self.norm = eqx.nn.BatchNorm(outputs, axis_name="batch", mode=mode)

    def __call__(self, x, state):
        return self.norm(self.conv(x), state)


class Block(eqx.Module):
    """A residual block: convolutions of the given sizes, the first 3x3 of which strides."""

    layers: list[ConvNorm]
    shortcut: ConvNorm | None

    def __init__(self, widths, sizes, stride=1, *, key):
        *keys, shortcut_key = jax.random.split(key, len(sizes) + 1)
        strides = [stride if i == sizes.index(3) else 1 for i in range(len(sizes))]
        self.layers = [
            ConvNorm(widths[i], widths[i + 1], sizes[i], strides[i], key=keys[i])
            for i in range(len(sizes))
        ]
        self.shortcut = None
        if widths[0] != widths[-1]:
            self.shortcut = ConvNorm(widths[0], widths[-1], 1, stride, key=shortcut_key)

    def __call__(self, x, state):
        y = x
        for layer in self.layers[:-1]:
            y, state = layer(y, state)
            y = jax.nn.relu(y)
        y, state = self.layers[-1](y, state)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state)
        return jax.nn.relu(x + y), state


class ResNet(eqx.Module):
    stem: ConvNorm
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, blocks, sizes, classes, *, key):
        stem_key, head_key, *keys = jax.random.split(key, len(blocks) + 2)
        self.stem = ConvNorm(3, 6, 3, key=stem_key, mode="batch")
        self.blocks = [
            Block(widths, sizes, stride, key=k)
            for (widths, stride), k in zip(blocks, keys, strict=True)
        ]
        self.head = eqx.nn.Linear(blocks[-1][0][-1], classes, key=head_key)

    def __call__(self, x, state):
        x, state = self.stem(x, state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(jnp.mean(x, axis=(1, 2))), state


@case("resnet_basic-equinox")
def resnet_basic():
    blocks = [((6, 5, 6), 1), ((6, 7, 9), 2), ((9, 8, 9), 1)]
    return from_stateful_equinox(
        lambda key: ResNet(blocks, (3, 3), 4, key=key), images(channels_first=True)
    )


@case("resnet_bottleneck-equinox")
def resnet_bottleneck():
    blocks = [((6, 4, 5, 12), 1), ((12, 7, 8, 12), 1), ((12, 9, 10, 14), 2)]
    return from_stateful_equinox(
        lambda key: ResNet(blocks, (1, 3, 1), 11, key=key), images(channels_first=True)
    )


class UNet(eqx.Module):
    down1: eqx.nn.Conv2d
    down2: eqx.nn.Conv2d
    middle: eqx.nn.Conv2d
    up2: eqx.nn.ConvTranspose2d
    merge2: eqx.nn.Conv2d
    up1: eqx.nn.ConvTranspose2d
    merge1: eqx.nn.Conv2d
    out: eqx.nn.Conv2d

    def __init__(self, key):
        keys = jax.random.split(key, 8)
        self.down1 = eqx.nn.Conv2d(3, 5, 3, padding=1, key=keys[0])
        self.down2 = eqx.nn.Conv2d(5, 7, 3, padding=1, key=keys[1])
        self.middle = eqx.nn.Conv2d(7, 9, 3, padding=1, key=keys[2])
        self.up2 = eqx.nn.ConvTranspose2d(9, 8, 2, stride=2, key=keys[3])
        self.merge2 = eqx.nn.Conv2d(8 + 7, 6, 3, padding=1, key=keys[4])
        self.up1 = eqx.nn.ConvTranspose2d(6, 4, 2, stride=2, key=keys[5])
        self.merge1 = eqx.nn.Conv2d(4 + 5, 10, 3, padding=1, key=keys[6])
        self.out = eqx.nn.Conv2d(10, 2, 1, key=keys[7])

    def __call__(self, x):
        skip1 = jax.nn.relu(self.down1(x))
        skip2 = jax.nn.relu(self.down2(eqx.nn.MaxPool2d(2, 2)(skip1)))
        x = jax.nn.relu(self.middle(eqx.nn.AvgPool2d(2, 2)(skip2)))
        x = jax.nn.relu(self.merge2(jnp.concatenate([self.up2(x), skip2], axis=0)))
        x = jax.nn.relu(self.merge1(jnp.concatenate([self.up1(x), skip1], axis=0)))
        return self.out(x)


@case("unet-equinox")
def unet():
    return from_equinox(UNet, images(channels_first=True))


class GroupNormNet(eqx.Module):
    """Also squeeze and excitation, and a depthwise convolution, on request."""

    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    depthwise: eqx.nn.Conv2d | None
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm
    excite: eqx.nn.MLP | None
    head: eqx.nn.Linear

    def __init__(self, key, excite=False, depthwise=False):
        keys = jax.random.split(key, 5)
        self.conv1 = eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0])
        self.norm1 = eqx.nn.GroupNorm(3, 6)
        self.depthwise, self.excite = None, None
        if depthwise:
            self.depthwise = eqx.nn.Conv2d(6, 6, 3, padding=1, groups=6, key=keys[1])
        self.conv2 = eqx.nn.Conv2d(6, 12, 1, stride=2, key=keys[2])
        self.norm2 = eqx.nn.GroupNorm(4, 12)
        if excite:
            self.excite = eqx.nn.MLP(
                12, 12, 5, depth=1, final_activation=jax.nn.sigmoid, key=keys[3]
            )
        self.head = eqx.nn.Linear(12, 7, key=keys[4])

    def __call__(self, x):
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        if self.depthwise is not None:
            x = jax.nn.relu6(self.depthwise(x))
        x = jax.nn.relu(self.norm2(self.conv2(x)))
        if self.excite is not None:
            x = x * self.excite(x.mean(axis=(1, 2)))[:, None, None]
        return self.head(x.mean(axis=(1, 2)))


@case("group_norm-equinox")
def group_norm():
    return from_equinox(GroupNormNet, images(channels_first=True))


@case("squeeze_excite-equinox")
def squeeze_excite():
    return from_equinox(lambda key: GroupNormNet(key, excite=True), images(channels_first=True))


@case("depthwise-equinox")
def depthwise():
    return from_equinox(lambda key: GroupNormNet(key, depthwise=True), images(channels_first=True))
