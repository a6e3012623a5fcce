"""Sparse training side by side: which method loses least at 90, 95 and 98 % zeros?

LeNet-300-100 on handwritten digits (or Fashion-MNIST), every network trained for the same number of
steps by the same recipe: dense; a small dense network with as many weights as the sparse ones keep;
random masks that never change; all at once in the middle of training; gradually; SET; RigL;
straight-through with a backward set; movement pruning. Zeros are counted, not assumed.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import number
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

import sparsejax as sj
from sparsejax import datasets, dynamic, masking, models, schedules

BATCH = 128
RATE, DECAY = 0.3, 2e-4  # SGD with momentum, cosine decay; L2 on the weights
SMALL_RATE = 0.03  # few units die at higher ones, and a small network has none to spare


def prune(wrap, **options):
    """More and more zeros until half of the steps are done; the other half train what is left."""

    def method(tx, sparsity, steps, key):
        schedule = schedules.cubic(0.0, sparsity, steps // 20, steps // 2)
        return wrap(tx, schedule, every=max(steps // 200, 1), **options)

    return method


def regrow(wrap):
    """Sparse all the time; exchanges fewer and fewer entries in three quarters of the steps."""

    def method(tx, sparsity, steps, key):
        drop = schedules.cosine(0.3, 0.0, steps // 100, 3 * steps // 4)
        return wrap(tx, sparsity, drop, key=key, every=max(steps // 80, 1))

    return method


METHODS = {
    "dense": lambda tx, sparsity, steps, key: tx,
    "small dense": lambda tx, sparsity, steps, key: tx,
    "random": lambda tx, sparsity, steps, key: dynamic.set_(tx, sparsity, 0.0, key=key),
    "one-shot": lambda tx, sparsity, steps, key: dynamic.gradual(
        tx, schedules.one_shot(sparsity, steps // 2)
    ),
    "gradual": prune(dynamic.gradual),
    "SET": regrow(dynamic.set_),
    "RigL": regrow(dynamic.rigl),
    "straight-through": lambda tx, sparsity, steps, key: prune(
        dynamic.straight_through, backward_sparsity=max(1 - 5 * (1 - sparsity), 0)
    )(tx, sparsity, steps, key),
    "movement": prune(dynamic.movement),
}


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    data = getattr(datasets, args.dataset)(args.data_dir)
    epochs = args.epochs or (50 if len(data.train_images) > 10_000 else 30)
    cases = [
        (method, sparsity, seed)
        for method in args.methods
        for sparsity in ([0.0] if method == "dense" else args.sparsities)
        for seed in range(args.seeds)
    ]
    columns = (BarColumn(20), TextColumn("{task.description}"), TimeRemainingColumn())
    runs = []
    with Progress(*columns) as bar:
        task = bar.add_task("", total=len(cases) * epochs)
        for method, sparsity, seed in cases:
            curve = []
            for error, counts in train(data, method, sparsity, seed, epochs):
                curve.append(error)
                note = f"error {error:6.2%}, zeros {counts.sparsity:6.2%}, seed {seed}"
                bar.update(task, advance=1, description=f"{method} at {sparsity:.0%}: {note}")
            runs.append(
                {"method": method, "sparsity": sparsity, "seed": seed, "curve": curve}
                | {"error": error, "nonzeros": counts.nonzeros, "weights": counts.size}
            )
    Console().print(table(runs, args))
    save(args, data, epochs, runs)


def train(data, method, sparsity, seed, epochs):
    """Yields the test error and the count of zeros after every epoch."""
    images, test = (jnp.asarray(x / np.float32(255)) for x in (data.train_images, data.test_images))
    labels, truth = jnp.asarray(data.train_labels), jnp.asarray(data.test_labels)
    apply, params = models.functional(models.LeNet300100(images.shape[1:], rngs=nnx.Rngs(seed)))
    params = nnx.to_pure_dict(params)
    if method == "small dense":
        params = shrunk(params, 1 - sparsity, jax.random.key(seed))
    batches = len(images) // BATCH
    steps = epochs * batches
    rate = SMALL_RATE if method == "small dense" else RATE
    sgd = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)
    decay = optax.add_decayed_weights(DECAY, mask=partial(jax.tree.map, lambda w: w.ndim > 1))
    tx = METHODS[method](optax.chain(decay, sgd), sparsity, steps, jax.random.key(seed + 1))

    def loss_of(params, batch):
        logits = apply(params, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_of)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    @partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params, state, order):
        params, state = jax.lax.scan(step, (params, state), order)[0]
        return params, state, jnp.mean(apply(params, test).argmax(-1) != truth)

    state, rng = tx.init(params), np.random.default_rng(seed)
    if method in ("random", "SET", "RigL"):  # sparse from the start
        params = sj.apply_masks(params, dynamic.masks(state))
    for _ in range(epochs):
        order = rng.permutation(len(images))[: batches * BATCH].reshape(batches, BATCH)
        params, state, error = epoch(params, state, order)
        yield float(error), masking.sparsity(params).prunable
    if method not in ("dense", "small dense"):
        dynamic.check(state, params)  # the masks were obeyed


def shrunk(params, density, key):
    """A dense LeNet with as many weights as a sparse one keeps, most of them in the first layer."""
    inputs, outputs = params["dense1"]["kernel"].shape[0], params["dense3"]["kernel"].shape[1]
    weights = round(density * sum(layer["kernel"].size for layer in params.values()))
    first = max(int(0.95 * weights / inputs), 1)
    second = max((weights - first * inputs) // (first + outputs), 1)
    widths = (inputs, first, second, outputs)
    draw, keys = nnx.initializers.lecun_normal(), jax.random.split(key, 3)
    return {
        name: {"kernel": draw(keys[i], widths[i : i + 2]), "bias": jnp.zeros(widths[i + 1])}
        for i, name in enumerate(sorted(params))
    }


def of(runs, method, sparsity):
    """The runs of a method; the dense network is the same at every sparsity."""
    return [r for r in runs if r["method"] == method and r["sparsity"] in (0.0, sparsity)]


def table(runs, args):
    """Mean errors over the seeds (± their standard deviation), and the nonzeros at the last."""
    headers = [f"at {s:.0%}" for s in args.sparsities]
    right = [Column(h, justify="right", no_wrap=True) for h in (*headers, "nonzeros there")]
    out = Table(Column("method", no_wrap=True), *right, title=f"Test error, {args.seeds} seed(s)")
    for method in args.methods:
        cells = []
        for sparsity in args.sparsities:
            found = of(runs, method, sparsity)
            errors = [r["error"] for r in found]
            spread = f" ± {100 * np.std(errors, ddof=1):.2f}" if len(errors) > 1 else ""
            cells.append(f"{100 * np.mean(errors):.2f}{spread} %")
        out.add_row(method, *cells, f"{found[0]['nonzeros']:,}")
    return out


def save(args, data, epochs, runs):
    """Writes sparse_training.json and, where matplotlib is installed, sparse_training.png."""
    summary = {"data": data.source, "arguments": vars(args) | {"epochs": epochs}, "runs": runs}
    text = json.dumps(summary, indent=2, default=str) + "\n"
    (args.out / "sparse_training.json").write_text(text)
    try:
        draw(args.out / "sparse_training.png", runs, args)
    except ImportError:
        print("No figure: matplotlib is missing; pip install 'sparsejax[examples]' brings it.")
    print("Written to", args.out)


def draw(path, runs, args):
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    left, right = (figure := Figure((12, 4.5), layout="constrained")).subplots(1, 2)
    last = args.sparsities[-1]
    left.set(xlabel="sparsity of the weights", ylabel="test error", yscale="log")
    right.set(xlabel="epoch", ylabel=f"test error, at {last:.0%}", yscale="log")
    for i, method in enumerate(args.methods):
        style = {"color": f"C{i - 1}" if i else "k", "label": method}
        errors = [[r["error"] for r in of(runs, method, s)] for s in args.sparsities]
        means, low, high = (np.array([f(e) for e in errors]) for f in (np.mean, min, max))
        marker = "--" if method == "dense" else "o-"
        left.errorbar(args.sparsities, means, (means - low, high - means), fmt=marker, **style)
        curve = np.mean([r["curve"] for r in of(runs, method, last)], axis=0)
        right.plot(np.arange(1, len(curve) + 1), curve, **style)
    left.set_xticks(args.sparsities)
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.yaxis.set_minor_formatter(PercentFormatter(1, decimals=1))
        axes.grid(alpha=0.3, which="both")
    right.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].replace("%", "%%"))
    parser.error = lambda message: sys.exit(f"sparse_training.py: {message} (--help: all flags)")
    add, fraction = parser.add_argument, number(float, 1e-9, 1, "fraction in (0, 1)")
    positive = number(int, 1, 1e9, "whole number (>= 1)")
    add("--dataset", choices=("mnist", "fashion_mnist"), default="mnist")
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--sparsities", nargs="+", type=fraction, default=[0.9, 0.95, 0.98])
    add("--seeds", type=positive, default=1, help="runs of each, with seeds 0, 1, ...")
    add("--epochs", type=positive, help="default: 50 on whole data sets, 30 on the embedded digits")
    add("--out", type=Path, default=Path("out"), help="folder for the JSON and the figure")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"sparse_training.py: {error}")
