"""Train a CNN on handwritten digits, take away most of its weights, and see what it still knows.

    python examples/mnist.py                     # about two minutes on two cores
    python examples/mnist.py --recipe textbook   # plain SGD 0.01, batches of 64, 10 epochs

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
from flax import nnx
from rich import progress as rp
from rich.console import Console
from rich.table import Column, Table

import sparsejax as sj
from sparsejax import criteria, datasets, masking, models

SPARSITIES = [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
RECIPES = {"quick": (0.1, 8, 5), "textbook": (0.01, 10, 10)}  # learning rate, epochs, fine-tuning
IMPORTANCE_EXAMPLES = 500


def main(args):
    data = getattr(datasets, args.dataset)(args.data_dir)
    images, test = (jnp.asarray(x / np.float32(255)) for x in (data.train_images, data.test_images))
    apply, params = models.functional(models.CNN(images.shape[1:], rngs=nnx.Rngs(args.seed)))
    accuracy = partial(evaluate, jax.jit(apply), test, data.test_labels)
    runs = {}

    columns = (rp.TextColumn("{task.description:<25}"), rp.BarColumn(24), rp.MofNCompleteColumn())
    with rp.Progress(*columns, rp.TimeElapsedColumn(), rp.TextColumn("{task.fields[note]}")) as bar:
        fit = partial(train, apply, images, jnp.asarray(data.train_labels), args, bar)

        dense = fit("(a) dense", params, optax.sgd(args.lr), args.epochs)
        runs["(a) dense"] = result(dense, accuracy(dense))

        importance = criteria.output_gradient(apply, dense, images[:IMPORTANCE_EXAMPLES])
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
        sparsity = masking.sparsity(dense, masks["(b) gradient"]).prunable.sparsity
        for name in ("magnitude", "Taylor", "random"):
            masks[f"(c) {name}"] = masking.topk(scores[name], min(sparsity, 1 - 1e-9))
        for label, kept in masks.items():
            pruned = sj.apply_masks(dense, kept)
            tuned = fit(label, pruned, sj.keep_masks(optax.sgd(args.lr), kept), args.finetune)
            runs[label] = result(tuned, accuracy(tuned), before=accuracy(pruned))

        for label, prox in (("(d) L1", sj.l1_prox(args.l1)), ("(e) L2", sj.l2_prox(args.l2))):
            trained = fit(label, dense, optax.chain(prox, optax.sgd(args.lr)), args.finetune)
            runs[label] = result(trained, accuracy(trained), before=runs["(a) dense"]["accuracy"])

        task = bar.add_task("accuracy against sparsity", total=4 * len(SPARSITIES), note="")
        curves = {name: [] for name in scores}
        for name, score in scores.items():
            for s in SPARSITIES:
                curves[name].append(accuracy(sj.apply_masks(dense, masking.topk(score, s))))
                bar.advance(task)

    tables = [table(runs), layer_table(runs)] if args.per_layer else [table(runs)]
    Console().print(f"\nThreshold on the gradient importance: {threshold:.3g}", *tables)
    save(args, data, runs, curves, threshold)


def train(apply, images, labels, args, bar, name, params, tx, epochs):
    """Plain minibatch training. The sparsity in the progress bar is counted, not assumed."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        def loss_of(params):
            return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(
        jnp.copy, params
    )  # the step gives away what it gets; the caller keeps his
    state, rng = tx.init(params), np.random.default_rng(args.seed)
    batches = max(1, len(images) // args.batch_size)
    task = bar.add_task(name, total=epochs * batches, note="")
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for i in range(batches):
            batch = order[i * args.batch_size : (i + 1) * args.batch_size]
            params, state, loss = step(params, state, images[batch], labels[batch])
            bar.advance(task)
            if i % 25 == 0 or i == batches - 1:
                zeros = masking.sparsity(params).prunable.sparsity
                bar.update(task, note=f"loss {loss:.4f}  sparsity {zeros:6.2%}")
    return params


def evaluate(apply, images, labels, params):
    """The fraction of images whose digit is right."""
    chunks = [apply(params, images[i : i + 500]).argmax(-1) for i in range(0, len(images), 500)]
    return float(np.mean(np.concatenate(chunks) == labels))


def lowest_kept(scores, sparsity):
    """The threshold that gives this sparsity: the lowest score that is kept."""
    leaves = zip(*map(jax.tree.leaves, (scores, masking.topk(scores, sparsity))), strict=True)
    return float(min(jnp.min(jnp.where(mask, s, jnp.inf)) for s, mask in leaves if mask.ndim))


def result(params, accuracy, before=None):
    count = masking.sparsity(params)
    return {"params": params, "accuracy": accuracy, "before": before, "count": count}


def table(runs):
    headers = ("accuracy", "before", "sparsity", "nonzeros", "exact zeros")
    out = Table("network", *(Column(h, justify="right") for h in headers))
    for name, run in runs.items():
        count, before = (
            run["count"].prunable,
            "" if run["before"] is None else f"{run['before']:.2%}",
        )
        cells = (f"{run['accuracy']:.2%}", before, f"{count.sparsity:.2%}", f"{count.nonzeros:,}")
        out.add_row(name, *cells, f"{count.zeros:,}")
    return out


def layer_table(runs):
    layers = [path for path in runs["(a) dense"]["count"].leaves if path.endswith("kernel")]
    out = Table("nonzeros of", *(Column(path, justify="right") for path in layers))
    for name, run in runs.items():
        out.add_row(name, *(f"{run['count'].leaves[path].nonzeros:,}" for path in layers))
    return out


def save(args, data, runs, curves, threshold):
    """Writes mnist.json and, where matplotlib is installed, mnist.png."""
    args.out.mkdir(parents=True, exist_ok=True)
    summary = {"data": data.source, "arguments": vars(args), "threshold": threshold}
    summary |= {"sparsities": SPARSITIES, "curves": curves, "networks": {}}
    for name, run in runs.items():
        layers = {path: count._asdict() for path, count in run["count"].leaves.items()}
        row = {"accuracy": run["accuracy"], "before": run["before"], "layers": layers}
        summary["networks"][name] = row | run["count"].prunable._asdict()
    (args.out / "mnist.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    try:
        draw(args.out / "mnist.png", runs, curves)
    except ImportError:
        print("No figure: matplotlib is missing; pip install 'sparsejax[examples]' brings it.")
    print("Written:", *sorted(str(path) for path in args.out.glob("mnist.*")))


def draw(path, runs, curves):
    from matplotlib.figure import Figure

    figure = Figure((12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, curve) in enumerate(curves.items()):
        left.plot(SPARSITIES, curve, ".-", color=f"C{i}", label=f"{name}, pruned only")
    for i, (name, run) in enumerate(runs.items(), start=-1):
        at = (run["count"].prunable.sparsity, run["accuracy"])
        left.plot(
            *at, "D", color=f"C{i}" if i >= 0 else "k", mec="k", ms=8, label=f"{name}, trained"
        )
    left.set(xlabel="sparsity of the weights", ylabel="test accuracy", ylim=(0, 1.02))
    left.legend(loc="lower left", fontsize="small")
    for name in ("(a) dense", "(c) magnitude", "(d) L1", "(e) L2"):
        leaves = jax.tree.leaves(runs[name]["params"])
        weights = np.concatenate([np.ravel(x)[np.ravel(x) != 0] for x in leaves if x.ndim > 1])
        label = f"{name}: {len(weights):,} nonzero"
        right.hist(weights, np.linspace(-0.3, 0.3, 121), histtype="step", label=label)
    right.set(yscale="log", xlabel="weight (zeros left out)", ylabel="count")
    right.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=110)


def number(low, high, text, kind=float):
    """An argparse type: numbers in [low, high), and one line that says so otherwise."""

    def parse(word):
        try:
            value = kind(word)
        except ValueError:
            value = float("nan")
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"must be {text}, got {word}")
        return value

    return parse


def arguments():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"mnist.py: {message} (--help lists the flags)\n")

    whole = number(1, float("inf"), "a whole number >= 1", int)
    positive = number(1e-12, float("inf"), "a number > 0")
    strength = number(0, float("inf"), "a number >= 0")
    fraction = number(0, 1, "in [0, 1) (a fraction, not a percentage)")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=("mnist", "fashion_mnist"), default="mnist")
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    add("--recipe", choices=RECIPES, default="quick", help="learning rate and epochs together")
    add("--lr", type=positive, help="learning rate of SGD")
    add("--epochs", type=whole, help="of dense training")
    add("--finetune", type=whole, help="epochs after pruning, and of training on with L1 or L2")
    add("--batch-size", type=whole, default=64)
    add("--l1", type=strength, default=1e-3, help="strength of the L1 penalty")
    add("--l2", type=strength, default=1e-2, help="strength of the L2 penalty")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--sparsity", type=fraction, default=0.9, help="of every pruned network")
    how.add_argument("--threshold", type=strength, help="on the gradient importance, instead")
    add("--seed", type=number(0, 2**31, "a whole number >= 0", int), default=0)
    add("--per-layer", action="store_true", help="the nonzeros of every layer in the table")
    add("--out", type=Path, default=Path("out"), help="folder for mnist.json and mnist.png")
    args = parser.parse_args()
    for name, value in zip(("lr", "epochs", "finetune"), RECIPES[args.recipe], strict=True):
        vars(args)[name] = vars(args)[name] or value
    return args


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"mnist.py: {error}")
