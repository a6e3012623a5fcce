"""Train a CNN on handwritten digits, take away most of its weights, see what it still knows.

    python examples/mnist.py                     # about two minutes on two cores
    python examples/mnist.py --recipe textbook   # plain SGD 0.01, batches of 64, 10 epochs

(a) dense; then, from that network: (b) pruned by gradient importance at a threshold and fine-tuned
with its masks kept; (c) the same sparsity by magnitude, Taylor and at random; (d) trained on with
L1, which makes exact zeros; (e) trained on with L2, which shrinks and makes none.
"""

import argparse
import contextlib
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

import sparsejax as sj
from sparsejax import criteria, datasets, masking, models

SPARSITIES = [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
# Learning rate, its drops (by 4, at a fraction of the epochs), epochs, epochs after pruning. With a
# power of two as learning rate, the zeros of L1 are exact at once (see sj.transforms.prox).
RECIPES = {"quick": (0.125, (0.6, 0.85), 8, 6), "textbook": (0.01, (), 10, 10)}


def main(args):
    data = getattr(datasets, args.dataset)(args.data_dir)
    images, test = (jnp.asarray(x / np.float32(255)) for x in (data.train_images, data.test_images))
    apply, params = models.functional(models.CNN(images.shape[1:], rngs=nnx.Rngs(args.seed)))
    accuracy = partial(evaluate, jax.jit(apply), test, data.test_labels)
    runs = {}

    columns = TextColumn("{task.description:<13}"), BarColumn(20), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}")) as bar:
        fit = partial(train, apply, images, jnp.asarray(data.train_labels), args, bar)

        def record(label, params, before=None):
            row = {"accuracy": accuracy(params), "before": before, "params": params}
            runs[label] = row | {"count": masking.sparsity(params)}

        dense = fit("(a) dense", params, optax.sgd, args.epochs)
        record("(a) dense", dense)

        importance = criteria.output_gradient(apply, dense, images[:500])
        scores = {
            "gradient": criteria.gradient(dense, importance),
            "magnitude": criteria.magnitude(dense),
            "Taylor": criteria.taylor(dense, importance),
            "random": criteria.random(jax.random.key(args.seed))(dense),
        }
        threshold = args.threshold
        if threshold is None:
            threshold = lowest_kept(scores["gradient"], args.sparsity)
        masks = {"(b) gradient": sj.prune_masks(dense, importance, threshold)}
        sparsity = min(masking.sparsity(dense, masks["(b) gradient"]).prunable.sparsity, 1 - 1e-9)
        for name in ("magnitude", "Taylor", "random"):
            masks[f"(c) {name}"] = masking.topk(scores[name], sparsity)
        for label, kept in masks.items():
            pruned, keep = sj.apply_masks(dense, kept), partial(sj.keep_masks, masks=kept)
            tuned = fit(label, pruned, lambda lr, keep=keep: keep(optax.sgd(lr)), args.finetune)
            record(label, tuned, accuracy(pruned))

        for label, prox in (("(d) L1", sj.l1_prox(args.l1)), ("(e) L2", sj.l2_prox(args.l2))):
            make_tx = lambda lr, prox=prox: optax.chain(prox, optax.sgd(lr))  # noqa: E731
            record(label, fit(label, dense, make_tx, args.finetune), accuracy(dense))

        task, curves = bar.add_task("pruned only", total=4 * len(SPARSITIES), note=""), {}
        for name, s in itertools.product(scores, SPARSITIES):
            pruned = sj.apply_masks(dense, masking.topk(scores[name], s))
            curves.setdefault(name, []).append(accuracy(pruned))
            bar.advance(task)

    print(f"\nThreshold on the gradient importance: {threshold:.3g}. On the test set:")
    Console().print(table(runs, args.per_layer))
    save(args, data, threshold, runs, curves)


def train(apply, images, labels, args, bar, label, params, make_tx, epochs):
    """Plain minibatch training. The sparsity in the progress bar is counted, not assumed."""
    batches = max(1, len(images) // args.batch_size)
    drops = {int(at * epochs * batches): 0.25 for at in RECIPES[args.recipe][1]}
    tx = make_tx(optax.piecewise_constant_schedule(args.lr, drops))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        def loss_of(params):
            return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.copy, params)  # the step gives away what it gets
    state, rng = tx.init(params), np.random.default_rng(args.seed)
    task = bar.add_task(label, total=epochs * batches, note="")
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for i in range(batches):
            batch = order[i * args.batch_size : (i + 1) * args.batch_size]
            params, state, loss = step(params, state, images[batch], labels[batch])
            bar.advance(task)
            if i % 50 == 0 or i == batches - 1:
                zeros = masking.sparsity(params).prunable.sparsity
                bar.update(task, note=f"loss {loss:.4f} sparsity {zeros:6.2%}")
    return params


def evaluate(apply, images, labels, params):
    """The fraction of images whose digit is right."""
    chunks = [apply(params, images[i : i + 1000]).argmax(-1) for i in range(0, len(images), 1000)]
    return float(np.mean(np.concatenate(chunks) == labels))


def lowest_kept(scores, sparsity):
    """The threshold that gives this sparsity: the lowest score that is kept."""
    leaves = zip(*map(jax.tree.leaves, (scores, masking.topk(scores, sparsity))), strict=True)
    return float(min(jnp.min(jnp.where(mask, s, jnp.inf)) for s, mask in leaves if mask.ndim))


def table(runs, per_layer):
    headers = ["accuracy", "before", "sparsity", "nonzeros", "exact zeros"]
    out = Table("network", *(Column(header, justify="right") for header in headers))
    for label, run in runs.items():
        count, before = run["count"].prunable, run["before"]
        cells = [f"{run['accuracy']:.2%}", "" if before is None else f"{before:.2%}"]
        cells += [f"{count.sparsity:.2%}", f"{count.nonzeros:,}", f"{count.zeros:,}"]
        out.add_row(label, *cells)
        for path, leaf in run["count"].leaves.items() if per_layer else ():
            cells = [f"{leaf.sparsity:.2%}", f"{leaf.nonzeros:,}", f"{leaf.zeros:,}"]
            out.add_row(f"  {path}", "", "", *cells, style="dim")
    return out


def save(args, data, threshold, runs, curves):
    """Writes mnist.json and, where matplotlib is installed, mnist.png."""
    args.out.mkdir(parents=True, exist_ok=True)
    summary = {"data": data.source, "arguments": vars(args), "threshold": threshold}
    summary |= {"sparsities": SPARSITIES, "curves": curves, "networks": {}}
    for label, run in runs.items():
        layers = {path: count._asdict() for path, count in run["count"].leaves.items()}
        row = {"accuracy": run["accuracy"], "before": run["before"], "layers": layers}
        summary["networks"][label] = row | run["count"].prunable._asdict()
    (args.out / "mnist.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    try:
        draw(args.out / "mnist.png", runs, curves)
        print(f"Written: {args.out / 'mnist.json'}, {args.out / 'mnist.png'}")
    except ImportError:
        print(f"Written: {args.out / 'mnist.json'}. No figure, since matplotlib is missing:")
        print("pip install 'sparsejax[examples]' brings it.")


def draw(path, runs, curves):
    from matplotlib.figure import Figure

    figure = Figure((12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = dict(zip(runs, ("k", "C0", "C1", "C2", "C7", "C3", "C4"), strict=True))
    for (name, curve), label in zip(curves.items(), list(runs)[1:], strict=False):
        left.plot(SPARSITIES, curve, ".-", color=colors[label], label=f"{name}, pruned only")
    for label, run in runs.items():
        at, color = (run["count"].prunable.sparsity, run["accuracy"]), colors[label]
        left.plot(*at, "D", color=color, mec="w", ms=9, label=f"{label}, trained")
        leaves = [np.ravel(x) for x in jax.tree.leaves(run["params"]) if x.ndim > 1]
        weights = np.concatenate(leaves)
        text = f"{label}: {np.count_nonzero(weights):,} nonzero"
        if label in ("(a) dense", "(c) magnitude", "(d) L1", "(e) L2"):
            bins = np.linspace(-0.3, 0.3, 121)
            right.hist(weights[weights != 0], bins, histtype="step", color=color, label=text)
    left.set(xlabel="sparsity of the weights", ylabel="test accuracy", ylim=(0, 1.02))
    right.set(xlabel="weight (zeros left out)", ylabel="count", yscale="log")
    left.legend(loc="lower left", fontsize="small")
    right.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=110)


def number(kind, low, high, text):
    """An argparse type: a number in [low, high), or one line that says what is right."""

    def parse(word):
        with contextlib.suppress(ValueError):
            if low <= kind(word) < high:
                return kind(word)
        raise argparse.ArgumentTypeError(f"must be {text}, got {word}")

    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"mnist.py: {message} (--help lists the flags)\n")


def arguments():
    whole = number(int, 1, float("inf"), "a whole number >= 1")
    strength = number(float, 0, float("inf"), "a number >= 0")
    fraction = number(float, 0, 1, "in [0, 1) (a fraction, not a percentage)")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=("mnist", "fashion_mnist"), default="mnist")
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    add("--recipe", choices=RECIPES, default="quick", help="learning rate and epochs together")
    add("--lr", type=number(float, 1e-9, float("inf"), "a number > 0"), help="of SGD")
    add("--epochs", type=whole, help="of dense training")
    add("--finetune", type=whole, help="epochs after pruning, and of training on with L1 or L2")
    add("--batch-size", type=whole, default=64)
    add("--l1", type=strength, default=1e-3, help="strength of the L1 penalty")
    add("--l2", type=strength, default=1e-2, help="strength of the L2 penalty")
    add("--sparsity", type=fraction, default=0.9, help="of every pruned network")
    add("--threshold", type=strength, help="on the gradient importance, instead of --sparsity")
    add("--seed", type=number(int, 0, 2**31, "a whole number >= 0"), default=0)
    add("--per-layer", action="store_true", help="show the layers in the table, too")
    add("--out", type=Path, default=Path("out"), help="folder for mnist.json and mnist.png")
    args = parser.parse_args()
    lr, _, epochs, finetune = RECIPES[args.recipe]
    args.lr, args.epochs = args.lr or lr, args.epochs or epochs
    args.finetune = args.finetune or finetune
    return args


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"mnist.py: {error}")
