"""Train a CNN on handwritten digits, take away most of its weights, see what it still knows.

(a) dense; then, from that network: (b) pruned by gradient importance at a threshold and fine-tuned
with its masks kept; (c) the same sparsity by magnitude, Taylor and at random; (d) trained on with
L1, which makes exact zeros; (e) trained on with L2, which shrinks and makes none.
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
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from rich.table import Column, Table

import sparsejax as sj
from sparsejax import criteria, datasets, masking, models

BATCH = 64
SPARSITIES = [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
# Learning rate (a power of two: L1's zeros are exact at once, see transforms.prox), when it drops
# by 4 (as fractions), images an epoch, epochs, epochs after pruning.
RECIPES = {"quick": (0.125, (0.6, 0.85), 10_000, 8, 6), "textbook": (0.01, (), 60_000, 10, 10)}


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    data = getattr(datasets, args.dataset)(args.data_dir)
    images, test = (jnp.asarray(x / np.float32(255)) for x in (data.train_images, data.test_images))
    apply, params = models.functional(models.CNN(images.shape[1:], rngs=nnx.Rngs(args.seed)))
    accuracy = partial(evaluate, jax.jit(apply), test, data.test_labels)
    epochs, finetune = [args.epochs or n for n in RECIPES[args.recipe][3:]]
    runs, curves = {}, {}
    columns = ("{task.description:<13}", BarColumn(20), TimeElapsedColumn(), "{task.fields[note]}")
    with Progress(*columns) as bar:
        fit = partial(train, apply, images, jnp.asarray(data.train_labels), args, bar)

        def record(label, params, before):
            row = {"accuracy": accuracy(params), "before": before, "params": params}
            runs[label] = row | {"count": masking.sparsity(params)}

        dense = fit("(a) dense", params, optax.chain, epochs)
        record("(a) dense", dense, accuracy(params))
        importance = criteria.output_gradient(apply, dense, images[:500])
        scores = {
            "gradient": criteria.gradient(dense, importance),
            "magnitude": criteria.magnitude(dense),
            "Taylor": criteria.taylor(dense, importance),
            "random": criteria.random(jax.random.key(args.seed))(dense),
        }
        lowest_kept = np.quantile(weights(importance), args.sparsity, method="higher")
        threshold = float(lowest_kept if args.threshold is None else args.threshold)
        masks = {"(b) gradient": sj.prune_masks(dense, importance, threshold)}
        sparsity = min(masking.sparsity(dense, masks["(b) gradient"]).prunable.sparsity, 1 - 1e-9)
        masks |= {f"(c) {name}": masking.topk(scores[name], sparsity) for name in list(scores)[1:]}
        for label, kept in masks.items():
            pruned, keep = sj.apply_masks(dense, kept), partial(sj.keep_masks, masks=kept)
            record(label, fit(label, pruned, keep, finetune), accuracy(pruned))
        for label, prox in (("(d) L1", sj.l1_prox(args.l1)), ("(e) L2", sj.l2_prox(args.l2))):
            record(label, fit(label, dense, partial(optax.chain, prox), finetune), accuracy(dense))

        for name, score in bar.track(scores.items(), task_id=bar.add_task("pruned only", note="")):
            masks = [masking.topk(score, s) for s in SPARSITIES]
            curves[name] = [accuracy(sj.apply_masks(dense, kept)) for kept in masks]

    print(f"\nThreshold on the gradient importance: {threshold:.3g}. On the test set:")
    bar.console.print(table(runs, args.per_layer))
    save(args, data, threshold, runs, curves)


def train(apply, images, labels, args, bar, label, params, wrap, epochs):
    """Plain minibatch training. The sparsity in the progress bar is counted, not assumed."""
    lr, drops, images_an_epoch, *_ = RECIPES[args.recipe]
    steps = epochs * (batches := min(len(images), images_an_epoch) // BATCH)
    drops = {int(at * steps): 0.25 for at in drops}
    tx = wrap(optax.sgd(optax.piecewise_constant_schedule(lr, drops)))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        def loss_of(params):
            return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.copy, params)  # the step gives away what it gets
    state, rng = tx.init(params), np.random.default_rng(args.seed)
    task = bar.add_task(label, total=steps, note="")
    for i in range(steps):
        if i % batches == 0:
            order = rng.permutation(len(images))[: batches * BATCH].reshape(batches, BATCH)
        batch = order[i % batches]
        params, state, loss = step(params, state, images[batch], labels[batch])
        bar.advance(task)
        if i % 50 == 0 or i == steps - 1:
            zeros = masking.sparsity(params).prunable.sparsity
            bar.update(task, note=f"loss {loss:.4f} sparsity {zeros:6.2%}")
    return params


def evaluate(apply, images, labels, params):
    """The fraction of images whose digit is right."""
    digits = [apply(params, chunk).argmax(-1) for chunk in np.split(images, 10)]
    return float(np.mean(np.concatenate(digits) == labels))


def weights(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params) if x.ndim > 1])


def table(runs, per_layer):
    headers = ["accuracy", "before", "sparsity", "nonzeros", "exact zeros"]
    out = Table("network", *(Column(header, justify="right") for header in headers))
    for label, run in runs.items():
        accuracies = (f"{run['accuracy']:.2%}", f"{run['before']:.2%}")
        rows = [(label, *accuracies, run["count"].prunable)]
        rows += [(f"  {p}", "", "", n) for p, n in run["count"].leaves.items() if "kernel" in p]
        for *cells, n in rows if per_layer else rows[:1]:
            out.add_row(*cells, f"{n.sparsity:.2%}", f"{n.nonzeros:,}", f"{n.zeros:,}")
    return out


def save(args, data, threshold, runs, curves):
    """Writes mnist.json and, where matplotlib is installed, mnist.png."""
    summary = {"data": data.source, "arguments": vars(args), "threshold": threshold}
    summary |= {"pruned only": curves, "sparsities": SPARSITIES, "networks": {}}
    for label, run in runs.items():
        row = {"accuracy": run["accuracy"], "before": run["before"]}
        row["layers"] = {path: count._asdict() for path, count in run["count"].leaves.items()}
        summary["networks"][label] = row | run["count"].prunable._asdict()
    (args.out / "mnist.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    try:
        draw(args.out / "mnist.png", runs, curves)
    except ImportError:
        print("No figure: matplotlib is missing; pip install 'sparsejax[examples]' brings it.")
    print("Written to", args.out)


def draw(path, runs, curves):
    from matplotlib.figure import Figure

    left, right = (figure := Figure((12, 4.5), layout="constrained")).subplots(1, 2)
    left.set(xlabel="sparsity of the weights", ylabel="test accuracy", ylim=(0, 1.05))
    right.set(xlabel="weight (zeros left out)", ylabel="count", yscale="log")
    for label, color in zip(runs, ("k", "C0", "C1", "C2", "C7", "C3", "C4"), strict=True):
        run, name = runs[label], label[4:]
        if name in curves:
            left.plot(SPARSITIES, curves[name], ".-", color=color, label=f"{name}, pruned only")
        style = {"mfc": "none", "ms": 15 - len(left.lines), "label": f"{name}, trained"}
        left.plot(run["count"].prunable.sparsity, run["accuracy"], "D", color=color, **style)
        if name in ("dense", "magnitude", "L1", "L2"):
            values = weights(run["params"])
            style = {"color": color, "label": f"{name}: {np.count_nonzero(values):,} nonzero"}
            right.hist(values[values != 0], np.linspace(-0.3, 0.3, 121), histtype="step", **style)
    left.legend(loc="lower left", fontsize="small", markerscale=0.6)
    right.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=110)


def arguments():
    strength = number(float, 0, float("inf"), "strength (a number >= 0)")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(f"mnist.py: {message} (--help lists the flags)")
    add = parser.add_argument
    add("--dataset", choices=("mnist", "fashion_mnist"), default="mnist")
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    add("--recipe", choices=RECIPES, default="quick", help="learning rate and epochs")
    add("--epochs", type=number(int, 1, 1e9, "whole number (>= 1)"), help="dense, and after it")
    add("--l1", type=strength, default=1e-3, help="strength of the L1 penalty")
    add("--l2", type=strength, default=1e-2, help="strength of the L2 penalty")
    add("--sparsity", type=number(float, 0, 1, "fraction in [0, 1)"), default=0.9)
    add("--threshold", type=strength, help="on the gradient importance, instead of --sparsity")
    add("--seed", type=number(int, 0, 2**31, "whole number below 2**31"), default=0)
    add("--per-layer", action="store_true", help="show the layers in the table, too")
    add("--out", type=Path, default=Path("out"), help="folder for mnist.json and mnist.png")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"mnist.py: {error}")
