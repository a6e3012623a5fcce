"""Layer collapse: how many weights the emptiest layer has left, when networks are pruned untrained.

Usage: `python benchmarks/synflow_collapse.py [--seeds 3] [--results results/synflow.json]
[--out ../docs/synflow.png]`.

SNIP, GraSP and magnitude prune at once, SynFlow in 100 rounds (and in one, for comparison), always
over all weights together, to exact counts. SNIP and GraSP see ten digits of each class. Two
networks: LeNet-5-Caffe as the library has it, and one of ten 3x3 convolutions in the manner of VGG,
without normalization, He normal. The sparsest points leave one weight a layer, the most that can be
pruned without cutting the network in two: the authors' maximal compression.

Each finished cell is written at once, so that a run which was stopped goes on.

Tanaka et al., *Pruning neural networks without any data by iteratively conserving synaptic flow*,
NeurIPS 2020, https://arxiv.org/abs/2006.05467, show the same on VGG-16 and CIFAR-100 (figure 1).
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

from sparsejax import criteria, datasets, masking, models, pruning

HERE = Path(__file__).resolve().parent
LEFT = [10**-e for e in np.arange(0, 4.01, 0.25)]  # of all weights, down to 1 in 10,000
CHANNELS = ((32, 32), (64, 64), (128, 128, 128), (256, 256, 256))
ROUNDS = 100
TEMPERATURE = 200  # of GraSP's logits, as in its authors' code


class VGG(nnx.Module):
    """Ten convolutions, four max-pools, one dense layer: 28x28 becomes 14x14, 7x7, 3x3 and 1x1."""

    def __init__(self, rngs):
        he = nnx.initializers.he_normal()
        convolutions, channels = [], 1
        for stage in CHANNELS:
            for features in stage:
                layer = nnx.Conv(channels, features, (3, 3), kernel_init=he, rngs=rngs)
                convolutions.append(layer)
                channels = features
        self.convolutions = nnx.List(convolutions)
        self.head = nnx.Linear(channels, 10, kernel_init=he, rngs=rngs)

    def __call__(self, x):
        """The logits of a batch of images."""
        layers = iter(self.convolutions)
        for stage in CHANNELS:
            for _ in stage:
                x = nnx.relu(next(layers)(x))
            x = models.max_pool_2x2(x)
        return self.head(x[:, 0, 0])


NETWORKS = {
    "LeNet-5-Caffe": lambda seed: models.LeNet5Caffe(rngs=nnx.Rngs(seed)),
    "VGG-like, 10 convolutions": lambda seed: VGG(nnx.Rngs(seed)),
}


def digits(seed, each=10):
    """As many digits of every class, drawn at random, in one batch."""
    data = datasets.mnist_subset()
    order = np.random.default_rng(seed).permutation(len(data.train_labels))
    chosen = [order[data.train_labels[order] == c][:each] for c in range(10)]
    index = np.concatenate(chosen)
    return np.float32(data.train_images[index]) / 255, data.train_labels[index]


def cross_entropy(apply, temperature=1.0):
    """The mean cross-entropy `(params, batch) -> loss`."""

    def loss(params, batch):
        logits = apply(params, batch[0]) / temperature
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss


def snip(apply, params, batch):
    """The scores of SNIP."""
    grad_fn = jax.jit(jax.grad(cross_entropy(apply)))
    return criteria.snip(params, criteria.mean_gradients(grad_fn, params, [batch]))


def grasp(apply, params, batch):
    """The scores of GraSP."""
    return criteria.grasp(cross_entropy(apply, TEMPERATURE), params, [batch])


SCORES = {
    "magnitude": lambda apply, params, batch: criteria.magnitude(params),
    "SNIP": snip,
    "GraSP": grasp,
    "SynFlow, one round": lambda apply, params, batch: criteria.synflow(
        apply, params, batch[0][:1]
    ),
}
METHODS = (*SCORES, "SynFlow")  # which has new scores in each of its rounds


def left_by_layer(params, masks):
    """How many weights each layer keeps, and how many it has."""
    leaves = masking.sparsity(params, masks).leaves
    return [(c.nonzeros, c.size) for path, c in leaves.items() if path.endswith("kernel")]


def sparsities(params):
    """What is pruned: LEFT, and all but one weight a layer."""
    sizes = [size for _, size in left_by_layer(params, None)]
    return [1 - left for left in LEFT if left < 1] + [1 - len(sizes) / sum(sizes)]


def emptiest(network, method, seed):
    """Of each sparsity: the fraction of all weights left, the least of a layer, and its weights."""
    apply, params = models.functional(NETWORKS[network](seed))
    batch = digits(seed)
    scores = SCORES[method](jax.jit(apply), params, batch) if method in SCORES else None
    rows = []
    for sparsity in sparsities(params):
        if scores is None:
            masks = pruning.synflow(apply, params, batch[0][:1], sparsity, rounds=ROUNDS)
        else:
            masks = masking.topk(scores, sparsity)
        layers = left_by_layer(params, masks)
        density, kept = min((kept / size, kept) for kept, size in layers)
        rows.append([sum(k for k, _ in layers) / sum(s for _, s in layers), density, kept])
    return rows


def measure(seeds, file):
    """All cells, those in the file read from there."""
    cells = json.loads(file.read_text()) if file.exists() else {}
    wanted = [(n, m, s) for n in NETWORKS for m in METHODS for s in range(seeds)]
    for network, method, seed in track(wanted, "networks, methods, seeds"):
        name = f"{network} / {method} / seed {seed}"
        if name not in cells:
            cells[name] = emptiest(network, method, seed)
            beside = file.with_suffix(".part")
            beside.write_text(json.dumps(cells, indent=1))
            beside.replace(file)
    return cells


STYLES = {
    "magnitude": ("tab:gray", "-"),
    "SNIP": ("tab:blue", "-"),
    "GraSP": ("tab:green", "-"),
    "SynFlow, one round": ("tab:orange", "--"),
    "SynFlow": ("tab:red", "-"),
}


def draw(cells, seeds, out):
    """Lines of means over seeds; a cross where a layer is empty with one seed or more."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, network in zip(figure.subplots(1, 2, sharey=True), NETWORKS, strict=True):
        for method, (color, style) in STYLES.items():
            runs = [cells[f"{network} / {method} / seed {seed}"] for seed in range(seeds)]
            x, y, kept = np.moveaxis(np.array(runs), 2, 0)
            alive = kept.min(0) > 0
            end = int(np.argmin(alive)) if not alive.all() else len(alive)
            line = np.exp(np.log(y[:, :end]).mean(0))
            axes.loglog(x[0, :end], line, style, color=color, label=method, linewidth=2)
            axes.fill_between(
                x[0, :end],
                *(f(y[:, :end], axis=0) for f in (np.min, np.max)),
                color=color,
                alpha=0.15,
                linewidth=0,
            )
            if end < len(alive):
                axes.plot(x[0, end - 1], line[-1], "x", color=color, markersize=11, mew=2.5)
            else:
                axes.plot(x[0, -1], line[-1], "o", color=color, markersize=6)
        axes.set_xlim(1.3, 3e-6)
        ticks = [1, 1e-1, 1e-2, 1e-3, 1e-4]
        axes.set_xticks(ticks, ["0", "90 %", "99 %", "99.9 %", "99.99 %"])
        axes.minorticks_off()
        axes.set_title(network)
        axes.set_xlabel("sparsity, over all weights")
        axes.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("density of the emptiest layer")
    first.plot([], [], "x", color="black", mew=2, linestyle="", label="then a layer is empty")
    first.plot([], [], "o", color="black", linestyle="", label="one weight a layer")
    first.legend(frameon=False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "synflow.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "synflow.png")
    args = parser.parse_args()
    draw(measure(args.seeds, args.results), args.seeds, args.out)
