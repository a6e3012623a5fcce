"""Prune a network, skip its zeros, and watch its latency fall.

A network on handwritten digits loses 50, 80, 90, 95 and 98 % of its weights, the smallest first,
and is trained on after each loss, its zeros kept by `keep_masks`. `sparse_ops.sparsify` turns the
same function, unchanged, into one that skips them where that gains on this machine: the same
outputs, measured beside the dense network for one image, 8 and 64. At 90 % the network is trained
on a second time with nothing but its kept values in params and optimizer, to the same accuracy.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import number
from flax import nnx
from rich import box
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from rich.table import Column, Table

import sparsejax as sj
from sparsejax import criteria, datasets, masking, models, sparse_ops

BATCH, RATE, MOMENTUM = 64, 0.05, 0.9  # with cosine decay; from half of RATE after each loss
EPOCHS = {"lenet": (10, 3), "cnn": (3, 1)}  # of the dense network; after each loss
NETWORKS = {"lenet": models.LeNet300100, "cnn": models.CNN}
SPARSITIES, BY_VALUES = (0.5, 0.8, 0.9, 0.95, 0.98), 0.9
SERVED, ROUNDS = (1, 8, 64), 60  # batch sizes whose latency is measured, how many times


def main(args, crossover=None):
    args.out.mkdir(parents=True, exist_ok=True)
    data = getattr(datasets, args.dataset)(args.data_dir)
    images, test = (jnp.asarray(x / np.float32(255)) for x in (data.train_images, data.test_images))
    labels, truth = jnp.asarray(data.train_labels), jnp.asarray(data.test_labels)
    model = NETWORKS[args.model](images.shape[1:], rngs=nnx.Rngs(args.seed))
    apply, params = models.functional(model)
    params, runs = nnx.to_pure_dict(params), {}
    long, short = (args.epochs or n for n in EPOCHS[args.model])

    def outputs(apply, params):
        """The logits of all test images."""
        served = jax.jit(apply)
        return jnp.concatenate([served(params, chunk) for chunk in np.split(test, 10)])

    def accuracy(logits):
        return float(jnp.mean(logits.argmax(-1) == truth))

    def record(sparsity, params, masks, **more):
        """The network as it is served: for each batch size a function and its params."""
        logits = outputs(apply, params)
        served, difference = {}, 0.0
        for n in SERVED if sparsity else ():
            served[n] = sparse_ops.sparsify(apply, params, masks, test[:n], crossover=crossover)
            error = jnp.abs(outputs(*served[n]) - logits).max() / jnp.abs(logits).max()
            difference = max(difference, float(error))
        row = {"accuracy": accuracy(logits), "difference": difference, **more}
        row["replaced"] = {n: fast.report.replaced for n, (fast, _) in served.items()}
        runs[sparsity] = row | {"params": params, "served": served}

    with Progress("{task.description:<18}", BarColumn(20), TimeElapsedColumn()) as bar:
        fit = partial(train, images, labels, args.seed, bar)
        params = fit("dense", apply, params, RATE, long)
        record(0.0, params, None)
        for sparsity in SPARSITIES:
            masks = masking.topk(criteria.magnitude(params), sparsity)
            start, more = sj.apply_masks(params, masks), {}
            params = fit(f"{sparsity:.0%} zeros", apply, start, RATE / 2, short, masks)
            if sparsity == BY_VALUES:
                # Whether faster or not; what is trained are the values that were kept.
                fast, small = sparse_ops.sparsify(
                    apply, start, masks, images[:BATCH], crossover=lambda product: 2.0
                )
                small = fit(f"{sparsity:.0%}, values", fast, small, RATE / 2, short)
                sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (small, start)]
                more["by values"] = dict(zip(("trained", "of"), sizes, strict=True))
                more["by values"]["accuracy"] = accuracy(outputs(fast, small))
            record(sparsity, params, masks, **more)
        measure(bar, apply, runs, test)

    report(bar.console, runs)
    save(args, data, runs)


def train(images, labels, seed, bar, label, apply, params, rate, epochs, masks=None):
    """Plain minibatch training: of dense params, of masked ones, of sparse ones."""
    batches = len(images) // BATCH
    tx = optax.sgd(optax.cosine_decay_schedule(rate, epochs * batches), MOMENTUM)
    tx = tx if masks is None else sj.keep_masks(tx, masks)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(seed)
    for i in bar.track(range(epochs * batches), description=label):
        if i % batches == 0:
            order = rng.permutation(len(images))[: batches * BATCH].reshape(batches, BATCH)
        batch = order[i % batches]
        params, state = step(params, state, images[batch], labels[batch])
    return params


def measure(bar, apply, runs, images):
    """Dense and sparse by turns: what disturbs one disturbs both; each follows its own like."""
    dense, calls = jax.jit(apply), {}
    for sparsity, run in runs.items():
        for n in SERVED:
            calls[sparsity, n, "dense"] = partial(dense, run["params"], images[:n])
            if sparsity:
                fast, small = run["served"][n]
                calls[sparsity, n, "sparse"] = partial(jax.jit(fast), small, images[:n])
    times, names = {name: [] for name in calls}, list(calls)
    for call in calls.values():
        call().block_until_ready()
    rng = np.random.default_rng(0)
    for _ in bar.track(range(ROUNDS), description="latency"):
        for name in (names[i] for i in rng.permutation(len(names))):
            calls[name]().block_until_ready()
            begin = time.perf_counter()
            calls[name]().block_until_ready()
            times[name].append(time.perf_counter() - begin)
    for sparsity, run in runs.items():
        ways = ("dense", "sparse") if sparsity else ("dense",)
        run["milliseconds"] = {
            way: {n: 1000 * float(np.median(times[sparsity, n, way])) for n in SERVED}
            for way in ways
        }
        if sparsity:
            both = {n: [np.array(times[sparsity, n, way]) for way in ways] for n in SERVED}
            run["times as fast"] = {n: float(np.median(d / s)) for n, (d, s) in both.items()}


def report(console, runs):
    right = [Column(f"batch {n}\ndense, sparse", justify="right") for n in SERVED]
    accuracies = Column("accuracy", justify="right")
    table = Table("zeros", accuracies, *right, box=box.SIMPLE, show_lines=True)
    weights = sum(x.ndim > 1 for x in jax.tree.leaves(runs[0.0]["params"]))
    for sparsity, run in runs.items():
        cells = []
        for n in SERVED:
            spent = [f"{row[n]:.3f}" for row in run["milliseconds"].values()]
            cells.append(", ".join(spent) + " ms")
            if sparsity:
                replaced = f"{len(run['replaced'][n])}/{weights} sparse"
                cells[-1] += f"\n{run['times as fast'][n]:.2f}x, {replaced}"
        table.add_row(f"{sparsity:.0%}", f"{run['accuracy']:.2%}", *cells)
    console.print(table)
    run = runs[BY_VALUES]
    found = run["by values"]
    print(
        f"{BY_VALUES:.0%}, trained by its {found['trained']:,} kept values and biases (of "
        f"{found['of']:,} parameters): {found['accuracy']:.2%}; masked, dense: "
        f"{run['accuracy']:.2%}."
    )
    worst = max(run["difference"] for run in runs.values())
    print(f"Outputs, sparse against dense: {worst:.1e} of the largest apart at most.")
    print(f"What became of each weight at {BY_VALUES:.0%}, batch {SERVED[-1]}:")
    print(run["served"][SERVED[-1]][0].report)
    if sparse_ops.backend() == "jax":
        print("Nothing is faster: sparsejax has no compiled kernel here; install it where g++ is.")


def save(args, data, runs):
    """Writes faster-MODEL.json and, where matplotlib is installed, faster-MODEL.png."""
    summary = {"data": data.source, "arguments": vars(args), "backend": sparse_ops.backend()}
    hidden = ("params", "served")
    summary["networks"] = {
        sparsity: {key: value for key, value in run.items() if key not in hidden}
        for sparsity, run in runs.items()
    }
    path = args.out / f"faster-{args.model}.json"
    path.write_text(json.dumps(summary, indent=2, default=str) + "\n")
    try:
        draw(path.with_suffix(".png"), args, runs)
    except ImportError:
        print("No figure: matplotlib is missing; pip install 'sparsejax[examples]' brings it.")
    print("Written to", args.out)


def draw(path, args, runs):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

    left, right = (figure := Figure((11, 4.5), layout="constrained")).subplots(
        1, 2, width_ratios=(3, 2)
    )
    sparsities = list(runs)
    for i, n in enumerate(SERVED):
        dense = [run["milliseconds"]["dense"][n] for run in runs.values()]
        left.plot(sparsities, dense, "--", color=f"C{i}")
        sparse = [runs[s]["milliseconds"]["sparse"][n] for s in SPARSITIES]
        left.plot(SPARSITIES, sparse, "o-", color=f"C{i}", label=f"batch {n}")
    left.plot([], [], "k--", label="dense")
    left.set(xlabel="sparsity of the weights", ylabel="latency, ms", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    right.plot(sparsities, [run["accuracy"] for run in runs.values()], "o-", color="k")
    by_values = runs[BY_VALUES]["by values"]["accuracy"]
    right.plot(BY_VALUES, by_values, "x", color="C3", ms=9, label="trained by its values alone")
    right.set(xlabel="sparsity of the weights", ylabel="test accuracy")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    for axes in (left, right):
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3)
    left.legend(fontsize="small", loc="upper center", ncols=4, bbox_to_anchor=(0.5, 1.11))
    right.legend(fontsize="small", loc="lower left")
    right.set_title(
        f"{NETWORKS[args.model].__name__}, kernel: {sparse_ops.backend()}", size="medium"
    )
    figure.savefig(path, dpi=110)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(f"faster.py: {message} (--help lists the flags)")
    add = parser.add_argument
    add("--model", choices=NETWORKS, default="lenet")
    add("--dataset", choices=("mnist", "fashion_mnist"), default="mnist")
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    positive = number(int, 1, 1e9, "whole number (>= 1)")
    add("--epochs", type=positive, help="of the dense network, and after each loss of weights")
    add("--seed", type=number(int, 0, 2**31, "whole number below 2**31"), default=0)
    add("--out", type=Path, default=Path("out"), help="folder for the JSON and the figure")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"faster.py: {error}")
