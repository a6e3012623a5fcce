"""What the wrappers of `sparsejax.dynamic` cost: training steps, paired with the bare optimizer's.

Usage: `python benchmarks/overhead.py [--rounds 100] [--out results.json]`.

Every round runs a step of each contender in turn, beginning with another one each time; a ratio is
the median over rounds of (wrapper's step / bare optimizer's step in the same round). Steps are
compiled, params and state donated. A refresh is measured by setting the state's step to one of the
schedule's, in the same compiled program.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track

import sparsejax as sj
from sparsejax import criteria, dynamic, masking, models, schedules

SPARSITY, EVERY, BEGIN, END = 0.9, 1000, 1000, 100_000
REFRESH, OTHER = 50_000, 50_500
GROW = schedules.cubic(0.0, SPARSITY, BEGIN, END)
DROP = schedules.cosine(0.3, 0.0, BEGIN, END)
KEY = jax.random.key(0)
WRAPPERS = {
    "gradual": lambda tx: dynamic.gradual(tx, GROW, every=EVERY),
    "set_": lambda tx: dynamic.set_(tx, SPARSITY, DROP, key=KEY, every=EVERY),
    "rigl": lambda tx: dynamic.rigl(tx, SPARSITY, DROP, key=KEY, every=EVERY),
    "straight_through": lambda tx: dynamic.straight_through(tx, GROW, every=EVERY),
    "movement": lambda tx: dynamic.movement(tx, GROW, every=EVERY),
}


def reference_cnn():
    """The reference CNN and its recipe: SGD, batches of 64."""
    apply, params = models.functional(models.CNN(rngs=nnx.Rngs(0)))
    images = jax.random.uniform(jax.random.key(1), (64, 28, 28, 1))
    return apply, nnx.to_pure_dict(params), images, optax.sgd(0.01)


def large_mlp():
    """784-2048-2048-2048-10, ten million weights, with Adam; batches of 128."""
    widths = (784, 2048, 2048, 2048, 10)
    keys = jax.random.split(jax.random.key(0), len(widths))
    draw = nnx.initializers.lecun_normal()
    params = [
        {"w": draw(key, shape), "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, itertools.pairwise(widths), strict=False)
    ]

    def apply(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return apply, params, jax.random.uniform(keys[-1], (128, widths[0])), optax.adam(1e-3)


NETWORKS = {"reference CNN, SGD": reference_cnn, "10M MLP, Adam": large_mlp}


class Contender:
    """A compiled training step with its own params and state."""

    def __init__(self, apply, params, images, tx):
        labels = jnp.arange(len(images)) % 10

        def loss_of(params):
            logits = apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(params, state):
            updates, state = tx.update(jax.grad(loss_of)(params), state, params)
            return optax.apply_updates(params, updates), state

        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.jit(tx.init)(self.params)
        self.step = jax.jit(step, donate_argnums=(0, 1))

    def seconds(self, at):
        """The time of one step, as if `at` steps had been done."""
        if hasattr(self.state, "masks"):
            self.state = self.state._replace(step=jnp.asarray(at, jnp.int32))
        jax.block_until_ready((self.params, self.state))
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state))
        return time.perf_counter() - start


def measure(build, rounds, name):
    """The times of all contenders on one network."""
    apply, params, images, optimizer = build()
    txs = {"bare": optimizer} | {label: wrap(optimizer) for label, wrap in WRAPPERS.items()}
    contenders = {label: Contender(apply, params, images, tx) for label, tx in txs.items()}
    topk = jax.jit(partial(masking.topk, sparsity=SPARSITY))
    scores = criteria.magnitude(params)
    times = {label: [] for label in contenders}
    refreshes = {label: [] for label in contenders}
    selection = []
    for at in (REFRESH, OTHER):
        [contender.seconds(at) for contender in contenders.values()]
    for i in track(range(rounds), f"{name:<20}"):
        labels = list(np.roll(list(contenders), i))
        for label in labels:
            contenders[label].seconds(OTHER)  # so that each follows its own like
            times[label].append(contenders[label].seconds(OTHER))
        if i % 5 == 0:
            for label in labels:
                refreshes[label].append(contenders[label].seconds(REFRESH))
            jax.block_until_ready(topk(scores))
            start = time.perf_counter()
            jax.block_until_ready(topk(scores))
            selection.append(time.perf_counter() - start)
    rows = {}
    for label in contenders:
        ratios = np.array(times[label]) / np.array(times["bare"])
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        milliseconds = 1e3 * statistics.median(times[label])
        refresh = 1e3 * statistics.median(refreshes[label]) - milliseconds
        rows[label] = {
            "step_ms": round(milliseconds, 3),
            "ratio": round(median, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "refresh_ms": round(refresh, 2),
        }
    return {"steps": rows, "topk_ms": round(1e3 * statistics.median(selection), 2)}


def main():
    """Measures, writes the JSON, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/overhead.json")
    args = parser.parse_args()
    machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    results = {name: measure(build, args.rounds, name) for name, build in NETWORKS.items()}
    versions = {"jax": jax.__version__, "optax": optax.__version__, "sparsejax": sj.__version__}
    report = {"machine": machine | versions, "rounds": args.rounds, "networks": results}
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, result in results.items():
        print(f"\n| {name} | step, ms | ratio | quartiles | a refresh adds, ms |")
        print("|---|---|---|---|---|")
        for label, row in result["steps"].items():
            low, high = row["ratio_quartiles"]
            extra = "" if label == "bare" else row["refresh_ms"]
            print(f"| {label} | {row['step_ms']} | {row['ratio']} | {low} to {high} | {extra} |")
        print(f"\n`masking.topk` of the same scores alone: {result['topk_ms']} ms")


if __name__ == "__main__":
    main()
