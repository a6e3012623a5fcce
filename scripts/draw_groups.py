"""Draws `docs/groups.png`: the groups of a small ResNet, and a plan that halves them.

    python scripts/draw_groups.py [--out docs/groups.png]

Nothing is trained and no data is needed: the plan is of the magnitudes of the first weights. Needs
matplotlib: `pip install 'sparsejax[examples]'`.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax import criteria, dependency, plots, shrinking

TARGET = Path(__file__).resolve().parents[1] / "docs" / "groups.png"
# Channels and strides of the stages, of two blocks each.
STAGES = ((16, 1), (32, 2), (64, 2))


class Block(nnx.Module):
    """Two convolutions beside an identity, or beside a convolution where the size changes."""

    def __init__(self, channels, features, stride, rngs):
        self.conv1 = conv(channels, features, 3, stride, rngs)
        self.norm1 = nnx.BatchNorm(features, use_running_average=True, rngs=rngs)
        self.conv2 = conv(features, features, 3, 1, rngs)
        self.norm2 = nnx.BatchNorm(features, use_running_average=True, rngs=rngs)
        changes = channels != features
        self.shortcut = conv(channels, features, 1, stride, rngs) if changes else None

    def __call__(self, x):
        """The block's answer."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + (self.shortcut(x) if self.shortcut else x))


class ResNet(nnx.Module):
    """A stem, three stages, and ten classes."""

    def __init__(self, rngs):
        self.stem = conv(3, 16, 3, 1, rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        channels = 16
        for i, (features, stride) in enumerate(STAGES, start=1):
            first, second = (
                Block(channels, features, stride, rngs),
                Block(features, features, 1, rngs),
            )
            setattr(self, f"stage{i}", nnx.List([first, second]))
            channels = features
        self.head = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x):
        """The logits of a batch of images."""
        x = nnx.relu(self.norm(self.stem(x)))
        for block in (*self.stage1, *self.stage2, *self.stage3):
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def conv(channels, features, side, stride, rngs):
    return nnx.Conv(channels, features, (side, side), strides=stride, use_bias=False, rngs=rngs)


def main(out):
    graph, variables = nnx.split(ResNet(nnx.Rngs(0)))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    groups = dependency.trace(lambda v, x: nnx.merge(graph, v)(x), variables, image)
    plan = shrinking.plan(groups, criteria.magnitude(variables), sparsity=0.5, multiple_of=8)
    plots.groups(groups, plan).figure.savefig(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=TARGET, help="where the picture goes")
    main(parser.parse_args().out)
