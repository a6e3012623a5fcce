"""Cut channels out of a CNN, and measure what is left: size, accuracy, latency.

From one network trained on handwritten digits: (1) half and a quarter of its channels, chosen by
Taylor scores, cut out of params *and* optimizer state, and trained on; (2) a group lasso that
drives whole channels to zero, which are then cut without any change of the function. Each smaller
network is written as StableHLO, which needs neither Flax nor this library to run, and read again.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from flags import number
from flax import nnx
from rich import box
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from rich.table import Column, Table

import sparsejax as sj
from sparsejax import criteria, datasets, dependency, metrics, models, penalties, shrinking

BATCH, IMAGES = 64, 10_000  # a step, an epoch
RATE, MOMENTUM = 0.05, 0.9  # with cosine decay, of the fine-tuning from half of it
EPOCHS, FINETUNE = 3, 2
CUTS = {
    "half": {"sparsity": 0.5},
    "quarter": {"sparsity": 0.75},
    # XLA's CPU convolution of a single channel may take longer for 8 or 16 outputs than for 32.
    "quarter-later": {"sparsity": 0.75, "only": ("conv2*", "dense1*")},
}
SERVED, ROUNDS = (1, 64, 256), 60  # batch sizes whose latency is measured, how many times


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    data = getattr(datasets, args.dataset)(args.data_dir)
    images, test = (jnp.asarray(x / np.float32(255)) for x in (data.train_images, data.test_images))
    labels = jnp.asarray(data.train_labels)
    apply, start = models.functional(models.CNN(images.shape[1:], rngs=nnx.Rngs(args.seed)))
    start = nnx.to_pure_dict(start)
    groups = dependency.trace(apply, start, images[:1])
    outputs, runs = jax.jit(apply), {}

    def accuracy(params):
        """The fraction of images whose digit is right."""
        digits = [outputs(params, chunk).argmax(-1) for chunk in np.split(test, 10)]
        return float(np.mean(np.concatenate(digits) == data.test_labels))

    def record(label, params, plan, cut, tuned=None, **more):
        widths = [layer["bias"].size for name, layer in params.items() if name != "dense2"]
        row = {"widths": widths, "parameters": sum(x.size for x in jax.tree.leaves(params))}
        row |= {"flops": plan.flops[1], "as cut": cut, "fine-tuned": tuned, **more}
        runs[label] = row | {"params": params, "plan": plan}

    batches = min(len(images), IMAGES) // BATCH
    steps, more = ((args.epochs or n) * batches for n in (EPOCHS, FINETUNE))
    # One schedule for both parts: the optimizer's count, which is carried too, says where it is.
    decays = [optax.cosine_decay_schedule(*x) for x in ((RATE, steps), (RATE / 2, more))]
    tx = optax.sgd(optax.join_schedules(decays, [steps]), MOMENTUM)
    with Progress("{task.description:<15}", BarColumn(20), TimeElapsedColumn()) as bar:
        fit = partial(train, apply, images, labels, args.seed, bar)
        dense, state = fit("dense", tx, start, tx.init(start), steps)
        nothing = shrinking.plan(groups, dense, sparsity=0.0)
        tuned, _ = fit("dense, longer", tx, dense, state, more)
        record("dense", tuned, nothing, accuracy(dense), accuracy(tuned))

        # (1) Scores, a plan, params and state cut alike, and training goes on where it was.
        grads = jax.jit(jax.grad(partial(loss, apply)))(dense, images[:2000], labels[:2000])
        taylor = criteria.taylor(dense, grads)
        scores = dependency.unit_scores(groups, taylor, normalize=lambda s: s / s.mean())
        for label, amount in CUTS.items():
            plan = shrinking.plan(groups, scores, multiple_of=8, **amount)
            small, carried = shrinking.shrink((dense, state), plan)
            tuned, _ = fit(label, tx, small, carried, more)
            kept = {
                "count": int(optax.tree.get(carried, "count")),
                "momentum": sum(x.size for x in jax.tree.leaves(optax.tree.get(carried, "trace"))),
            }
            record(label, tuned, plan, accuracy(small), accuracy(tuned), carried=kept)
            if args.scratch:
                small = shrinking.shrink(start, plan)
                long, _ = fit(f"{label}-anew", tx, small, tx.init(small), steps + more)
                record(f"{label}-anew", long, plan, accuracy(small), accuracy(long))

        # (2) Zeros by the group, a plan that needs no scores, the same function.
        units = dependency.labels(groups, dense)
        penalty = penalties.group_lasso(args.strength, units, weight=lambda size: 1.0)
        rate = optax.cosine_decay_schedule(RATE, more)
        sgd, metric = optax.sgd(rate, MOMENTUM), metrics.momentum(MOMENTUM)
        lasso = sj.proximal(sgd, penalty, rate, metric=metric)
        zeros, _ = fit("group-lasso", lasso, dense, lasso.init(dense), more)
        record("group-lasso", zeros, nothing, accuracy(zeros))
        masks = jax.tree.map(lambda w: w != 0, zeros)
        plan = shrinking.plan(groups, masks, multiple_of=8)
        small = shrinking.shrink(zeros, plan)
        changes = [jnp.abs(outputs(zeros, x) - outputs(small, x)) for x in np.split(test, 10)]
        record("group-lasso-cut", small, plan, accuracy(small), change=float(np.max(changes)))

        for label, run in runs.items():
            if "carried" in run or "change" in run:
                run["reloaded"] = deploy(args.out, label, apply, run, test[: SERVED[-1]])
        measure(bar, apply, runs, test)

    report(bar.console, runs)
    save(args, data, runs)


def loss(apply, params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def train(apply, images, labels, seed, bar, label, tx, params, state, steps):
    """Plain minibatch training, from any params and any state of their shapes."""

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(partial(loss, apply))(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng, batches = np.random.default_rng(seed), min(len(images), IMAGES) // BATCH
    for i in bar.track(range(steps), description=label):
        if i % batches == 0:
            order = rng.permutation(len(images))[: batches * BATCH].reshape(batches, BATCH)
        batch = order[i % batches]
        params, state = step(params, state, images[batch], labels[batch])
    return params, state


def write(path, content):
    """Writes beside and moves into place: whoever looks finds a whole file or none."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def deploy(out, label, apply, run, images):
    """Writes plan and network, reads the network again; the largest difference of its outputs."""
    write(out / f"shrink-{label}.plan.json", run["plan"].to_json().encode())
    network, size = jax.jit(partial(apply, run["params"])), jax.export.symbolic_shape("batch")
    exported = jax.export.export(network)(
        jax.ShapeDtypeStruct((*size, *images.shape[1:]), images.dtype)  # a batch of any size
    )
    try:
        write(path := out / f"shrink-{label}.stablehlo", exported.serialize())
    except ImportError:
        return None
    read = jax.export.deserialize(path.read_bytes())
    return float(jnp.abs(jax.jit(read.call)(images) - network(images)).max())


def measure(bar, apply, runs, images):
    """Medians of ROUNDS calls, in a new order each time: what disturbs one network disturbs all."""
    served = {label: jax.jit(partial(apply, run["params"])) for label, run in runs.items()}
    calls = [(label, n, images[:n]) for n in SERVED for label in served]
    times = {label: {n: [] for n in SERVED} for label in served}
    for label, _, batch in 2 * calls:
        served[label](batch).block_until_ready()
    rng = np.random.default_rng(0)
    for _ in bar.track(range(ROUNDS), description="latency"):
        for label, n, batch in (calls[i] for i in rng.permutation(len(calls))):
            begin = time.perf_counter()
            served[label](batch).block_until_ready()
            times[label][n].append(time.perf_counter() - begin)
    for label, run in runs.items():
        medians = {n: 1000 * float(np.median(times[label][n])) for n in SERVED}
        run["milliseconds"] = medians
        run["times as fast"] = {n: runs["dense"]["milliseconds"][n] / medians[n] for n in SERVED}


def report(console, runs):
    right = [Column(f"batch {n}\nspeed", justify="right") for n in SERVED]
    sizes = [Column(h, justify="right") for h in ("params\nFLOPs", "as cut\nfine-tuned")]
    table = Table("network\nwidths", *sizes, *right, box=box.SIMPLE, show_lines=True)
    for label, run in runs.items():
        tuned = "" if run["fine-tuned"] is None else f"{run['fine-tuned']:.2%}"
        cells = [f"{run['parameters']:,}\n{run['flops']:,}", f"{run['as cut']:.2%}\n{tuned}"]
        for n, spent in run["milliseconds"].items():
            cells.append(f"{spent:.2f} ms\n{run['times as fast'][n]:.2f}x")
        table.add_row(f"{label}\n{'-'.join(map(str, run['widths']))}", *cells)
    console.print(table)
    for label, run in runs.items():
        if "carried" in run:
            count, kept = run["carried"].values()
            print(f"{label}: the state kept {kept:,} entries of its momentum and step {count:,}.")
        if "change" in run:
            print(f"{label}: cutting changed the outputs by {run['change']:.1e} at most.")
        if run.get("reloaded") is not None:
            print(f"{label}: reloaded, its outputs differ by {run['reloaded']:.1e} at most.")
    if runs["half"]["reloaded"] is None:
        print("No StableHLO: flatbuffers is missing; pip install flatbuffers brings it.")


def save(args, data, runs):
    """Writes shrink.json and, where matplotlib is installed, shrink.png."""
    summary = {"data": data.source, "arguments": vars(args), "networks": {}}
    for label, run in runs.items():
        row = {key: value for key, value in run.items() if key not in ("params", "plan")}
        summary["networks"][label] = row
    text = json.dumps(summary, indent=2, default=str) + "\n"
    write(args.out / "shrink.json", text.encode())
    try:
        draw(args.out / "shrink.png", runs)
    except ImportError:
        print("No figure: matplotlib is missing; pip install 'sparsejax[examples]' brings it.")
    print("Written to", args.out)


def draw(path, runs):
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    left, right = (figure := Figure((12, 4.5), layout="constrained")).subplots(1, 2)
    left.set(xlabel="MFLOPs of one image", ylabel="latency, ms", yscale="log")
    right.set(xlabel="MFLOPs of one image", ylabel="test accuracy")
    for i, (label, run) in enumerate(runs.items()):
        style, flops = {"color": f"C{i - 1}" if i else "k", "ms": 9}, run["flops"] / 1e6
        for marker, (n, spent) in zip("^so", run["milliseconds"].items(), strict=False):
            name = None if i else f"batch {n}"
            left.plot(flops, spent, marker, mfc="none", label=name, **style)
        last = run["as cut"] if run["fine-tuned"] is None else run["fine-tuned"]
        right.plot([flops, flops], [run["as cut"], last], "o:", mfc="none", **style)
        right.plot(flops, last, "o", label=label, **style)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    left.legend(fontsize="small")
    right.set_title("hollow: as cut; filled: in the end", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(f"shrink.py: {message} (--help lists the flags)")
    add = parser.add_argument
    add("--dataset", choices=("mnist", "fashion_mnist"), default="mnist")
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    add("--epochs", type=number(int, 1, 1e9, "whole number (>= 1)"), help="dense, and after it")
    strength = number(float, 0, float("inf"), "strength (a number >= 0)")
    add("--strength", type=strength, default=0.02, help="of the group lasso")
    add("--scratch", action="store_true", help="also train the small networks from the start")
    add("--seed", type=number(int, 0, 2**31, "whole number below 2**31"), default=0)
    add("--out", type=Path, default=Path("out"), help="folder for all that is written")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"shrink.py: {error}")
