"""The whole pipeline on one CNN: pruned, shrunk, distilled, quantized, stored.

After each stage the table says what is left of the network, how large its file is, how long a batch
takes, and how many digits it gets right. What is read back from the last file is what is measured
last: the same masks, the same codes, the same accuracy.
"""

import argparse
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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import sparsejax as sj
from sparsejax import (
    criteria,
    datasets,
    dependency,
    distillation,
    dynamic,
    models,
    quantization,
    reports,
    schedules,
    shrinking,
    sparse_ops,
    storage,
)

BATCH, RATE, MOMENTUM = 64, 0.05, 0.9
EPOCHS = {"dense": 6, "pruned": 6, "distilled": 8}
TEMPERATURE = 2.0
COLUMNS = ("nonzeros", "flops", "bytes", "bytes_factor", "latency", "accuracy")
SERVED = 64  # the batch whose latency is measured


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    data = datasets.mnist(args.data_dir)
    x, test = (jnp.asarray(x / np.float32(255)) for x in (data.train_images, data.test_images))
    y = jnp.asarray(data.train_labels)
    apply, params = models.functional(models.CNN(x.shape[1:], rngs=nnx.Rngs(args.seed)))
    params = nnx.to_pure_dict(params)
    stages = Stages(apply, test, data.test_labels, args.out)

    def labels(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

    columns = (TextColumn("{task.description:<10}"), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns) as bar:
        fit = partial(train, bar, apply, x, args.seed)
        steps = {name: (args.epochs or n) * (len(x) // BATCH) for name, n in EPOCHS.items()}

        # Dense: the teacher of all that follows.
        dense = fit("dense", sgd(steps["dense"]), params, labels, steps["dense"])
        stages.add("dense", dense)

        # Pruned while it trains; what is zero in the end is masked.
        cubic = schedules.cubic(0.0, args.sparsity, 0, steps["pruned"] // 2)
        tx = dynamic.gradual(sgd(steps["pruned"], 0.5), cubic, every=20)
        pruned = fit("pruned", tx, dense, labels, steps["pruned"])
        masks = jax.tree.map(lambda w: w != 0 if w.ndim > 1 else jnp.array(True), pruned)
        stages.add("pruned", pruned, masks)

        # Shrunk: the channels that have least left go for good, of params and masks alike.
        groups = dependency.trace(apply, pruned, x[:1])
        scores = dependency.unit_scores(
            groups, criteria.magnitude(pruned), normalize=lambda s: s / s.mean()
        )
        plan = shrinking.plan(groups, scores, flops=args.flops, multiple_of=8)
        small, kept = shrinking.shrink(pruned, plan), shrinking.shrink(masks, plan)
        stages.add("shrunk", small, kept)

        # Distilled: it learns the dense network's outputs, and its zeros stay.
        teacher = jnp.concatenate([jax.jit(apply)(dense, part) for part in jnp.split(x, 10)])
        taught = distillation.distilled_outputs(
            labels,
            lambda batch: teacher[batch],
            weight=0.9,
            distance=partial(distillation.logits, temperature=TEMPERATURE),
        )
        tx = sj.keep_masks(sgd(steps["distilled"]), kept)
        learned = fit("distilled", tx, small, taught, steps["distilled"])
        stages.add("distilled", learned, kept)

        # Quantized: weights are one of 16 values a layer, the zeros are none of them.
        for name, coded in {
            "int8": quantization.quantize(learned, bits=8),
            "4 bits": quantization.share(halved(learned), kept, bits=4),
        }.items():
            stages.add(name, coded, kept)

        # Stored: nothing from memory, all from the file.
        read = storage.load(stages.path("4 bits"), like=coded).params
        stages.add("read back", read, quantization.masks(read))
        report = stages.report(bar)
    Console().print(report.select(*COLUMNS))
    save(args.out, report)


def sgd(steps, share=1.0):
    return optax.sgd(optax.cosine_decay_schedule(share * RATE, steps), momentum=MOMENTUM)


def halved(params):
    """Biases in half the bits: they are few, and need no more."""
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16) if w.ndim == 1 else w, params)


def train(bar, apply, x, seed, label, tx, params, loss, steps):
    """Plain minibatch training; `loss` takes the logits and the indices of a batch."""

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda params: loss(apply(params, x[batch]), batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng, batches = tx.init(params), np.random.default_rng(seed), len(x) // BATCH
    for i in bar.track(range(steps), description=label):
        if i % batches == 0:
            order = rng.permutation(len(x))[: batches * BATCH].reshape(batches, BATCH)
        params, state = step(params, state, order[i % batches])
    return params


class Stages:
    """What is measured of each stage: its file at once, times at the end, all taking turns."""

    def __init__(self, apply, test, truth, out):
        self.apply, self.test, self.truth, self.out = apply, test, truth, out
        self.rows, self.served, self.outputs = {}, {}, jax.jit(apply)

    def path(self, name):
        return self.out / f"compress-{name.replace(' ', '-')}.safetensors"

    def add(self, name, params, masks=None):
        """Stores the network and counts what is left of it."""
        storage.save(self.path(name), params, header="packed")
        plain = jax.tree.map(jnp.float32, quantization.dequantize(params))
        self.rows[name] = partial(
            reports.row,
            name,
            plain,
            apply_fn=self.apply,
            inputs=self.test[:1],
            file=self.path(name),
            dense=self.rows["dense"]() if self.rows else None,
            accuracy=self.accuracy(plain),
        )
        self.served[name] = self.fast(plain, masks)

    def accuracy(self, params):
        digits = [self.outputs(params, part).argmax(-1) for part in np.split(self.test, 10)]
        return float(np.mean(np.concatenate(digits) == self.truth))

    def fast(self, params, masks):
        """The network as it would be served: products skip the zeros of masks."""
        apply = self.apply
        if masks is not None:
            apply, params = sparse_ops.sparsify(apply, params, masks, self.test[:SERVED])
        return jax.jit(partial(apply, params))

    def report(self, bar):
        bar.console.print(
            f"Latency of {SERVED} images, in float32 also where weights are stored in fewer bits; "
            f"sparse products: {sparse_ops.backend()}."
        )
        times = reports.latencies(self.served, self.test[:SERVED])
        return reports.Report([row(latency=times[name]) for name, row in self.rows.items()])


def save(out, report):
    """Writes compress.json and, where matplotlib is installed, compress.png."""
    (out / "compress.json").write_text(report.json())
    try:
        draw(out / "compress.png", report)
    except ImportError:
        print("No figure: matplotlib is missing; pip install 'sparsejax[examples]' brings it.")
    print("Written to", out)


def draw(path, report):
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    names, places = [row.name for row in report.rows], np.arange(len(report.rows))
    columns = {
        "file, kB": ([row.bytes / 1000 for row in report.rows], "{:,.1f}"),
        f"latency of {SERVED} images, ms": ([1000 * row.latency for row in report.rows], "{:.2f}"),
        "test accuracy": ([row.accuracy for row in report.rows], "{:.2%}"),
    }
    figure = Figure((12, 3.6), layout="constrained")
    for axes, (title, (values, form)) in zip(
        figure.subplots(1, 3, sharey=True), columns.items(), strict=True
    ):
        bars = axes.barh(places, values, color=[f"C{i}" for i in places])
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
        axes.set(title=title, yticks=places, yticklabels=names)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(min(0.9, min(values) - 0.01), 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.invert_yaxis()
    figure.axes[0].set_xscale("log")
    figure.savefig(path, dpi=110)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(f"compress.py: {message} (--help lists the flags)")
    add, fraction = parser.add_argument, number(float, 1e-9, 1, "fraction in (0, 1)")
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    add("--sparsity", type=fraction, default=0.95, help="of the weights, before channels are cut")
    add("--flops", type=fraction, default=0.5, help="what cutting channels leaves of them")
    add("--epochs", type=number(int, 1, 1e9, "whole number (>= 1)"), help="of each training")
    add("--seed", type=number(int, 0, 2**31, "whole number below 2**31"), default=0)
    add("--out", type=Path, default=Path("out"), help="folder for all that is written")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"compress.py: {error}")
