"""How much faster a smaller network is: the reference CNN at full, half and quarter widths.

Usage: `python benchmarks/shrinking.py [--rounds 60] [--out results.json]`.

The contenders at each width are the shrunk params run by the model's own `apply` (at full width,
the dense network), the same params run by `replay(apply, plan)`, and a network built at these
widths, with weights of its own. A cell is inference or a training step (SGD, params donated) at one
batch size. Every round runs all contenders of a cell in turn, in an order drawn anew; a ratio is
the median over rounds of (one's time / the other's in the same round). `share` is speed-up / FLOPs
ratio, where FLOPs are those of inference. Whether two contenders are the same program is read from
what XLA compiled, and needs no clock.

`channels` runs a network of two convolutions of 64 channels, of which these numbers are kept. What
is spent before anything runs is measured with JAX's caches cleared (`first`) and at once again; the
ResNet-50 of that table is never compiled.
"""

import argparse
import json
import os
import platform
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from tables import table

import sparsejax as sj
from sparsejax import criteria, dependency, models, shrinking

RESULTS = Path(__file__).parent / "results/shrinking.json"
WIDTHS = {"full": 0.0, "half": 0.5, "quarter": 0.75}
CELLS = [(mode, batch) for mode in ("inference", "training") for batch in (64, 256)]
DENSE = "full, own apply"
CHANNELS = ((31, 31), (32, 32), (33, 33), (40, 40), (16, 32), (24, 32))
UNIT = "32, 32"
SHARE, BUILT = 0.7, 0.95
IMAGE = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)


class Widths(models.CNN):
    """The reference CNN, built with other widths."""

    def __init__(self, first, second, third, *, rngs):
        super().__init__(rngs=rngs)
        kernel = {"kernel_size": (3, 3), "padding": "VALID", "rngs": rngs}
        self.conv1 = nnx.Conv(1, first, **kernel)
        self.conv2 = nnx.Conv(first, second, **kernel)
        self.dense1 = nnx.Linear(25 * second, third, rngs=rngs)
        self.dense2 = nnx.Linear(third, 10, rngs=rngs)


def built(*widths):
    """`apply` and params, plain dicts, of a network with these widths."""
    apply, params = models.functional(Widths(*widths, rngs=nnx.Rngs(0)))
    return apply, nnx.to_pure_dict(params)


class Contender:
    """A compiled program, inference or a training step, with its own params."""

    def __init__(self, apply, params, mode, batch):
        self.images = jax.random.uniform(jax.random.key(1), (batch, *IMAGE.shape[1:]))
        self.params = jax.tree.map(jnp.copy, params)
        self.training = mode == "training"
        labels = jnp.arange(batch) % 10
        tx = optax.sgd(0.01)

        def loss(params, images):
            logits = apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(params, images):
            updates, _ = tx.update(jax.grad(loss)(params, images), tx.init(params), params)
            return optax.apply_updates(params, updates)

        jitted = jax.jit(step, donate_argnums=0) if self.training else jax.jit(apply)
        self.program = jitted.lower(self.params, self.images).compile()

    def seconds(self):
        """The time of one call."""
        start = time.perf_counter()
        result = jax.block_until_ready(self.program(self.params, self.images))
        elapsed = time.perf_counter() - start
        if self.training:
            self.params = result
        return elapsed

    def text(self):
        """What was compiled, without the names in it."""
        body = self.program.as_text().partition("\n")[2].split("\nFileNames")[0]
        body = re.sub(r", metadata=\{[^}]*\}", "", body)
        names = {}
        return re.sub(r"%[\w.-]+", lambda m: f"%{names.setdefault(m[0], len(names))}", body)


def interleaved(contenders, rounds, name):
    """(rounds,) seconds of each contender."""
    times = {label: [] for label in contenders}
    draw = np.random.default_rng(0)
    for _ in track(range(rounds), f"{name:<24}"):
        for label in draw.permutation(list(contenders)):
            contenders[label].seconds()  # so that each follows its own like
            times[label].append(contenders[label].seconds())
    return {label: np.array(found) for label, found in times.items()}


def paired(times, one, other):
    """The quartiles over rounds of how many times the other one takes."""
    return [round(float(q), 3) for q in np.quantile(times[one] / times[other], [0.25, 0.5, 0.75])]


def milliseconds(times):
    """Their median."""
    return round(1e3 * float(np.median(times)), 3)


def reference():
    """The reference CNN, its plans, and per width the contenders' functions and params."""
    apply, params = models.functional(models.CNN(rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    groups = dependency.trace(apply, params, IMAGE)
    plans, functions = {}, {}
    for width, sparsity in WIDTHS.items():
        scores = criteria.magnitude(params)
        plan = shrinking.plan(groups, scores, sparsity=sparsity, multiple_of=8)
        small = shrinking.shrink(params, plan)
        plans[width] = plan
        functions |= {
            f"{width}, own apply": (apply, small),
            f"{width}, replayed": (shrinking.replay(apply, plan), small),
            f"{width}, built": built(*(len(plan.kept(name)) for name in groups)),
        }
    return plans, functions


def measure(plans, functions, mode, batch, rounds):
    """One cell: the times of all contenders, and their ratios."""
    contenders = {label: Contender(*f, mode, batch) for label, f in functions.items()}
    times = interleaved(contenders, rounds, f"{mode}, {batch}")
    rows = {}
    for label in contenders:
        width = label.partition(",")[0]
        twin = f"{width}, built"
        before, after = plans[width].flops
        low, speedup, high = paired(times, DENSE, label)
        rows[label] = {
            "ms": milliseconds(times[label]),
            "speedup": speedup,
            "speedup_quartiles": [low, high],
            "flops_ratio": round(before / after, 2),
            "share": round(speedup * after / before, 3),
            "built_by_this": paired(times, twin, label)[1],
            "same_program_as_built": contenders[label].text() == contenders[twin].text(),
        }
    return rows


def channels(mode, batch, rounds):
    """A network of two convolutions of 64 channels, of which a plan keeps so many."""
    apply, params = built(64, 64, 100)
    groups = dependency.trace(apply, params, IMAGE)
    contenders, flops = {}, {}
    for first, second in CHANNELS:
        keep = {"conv1.kernel": first, "conv2.kernel": second}
        plan = shrinking.plan(groups, criteria.magnitude(params), keep=keep)
        replayed = shrinking.replay(apply, plan), shrinking.shrink(params, plan)
        contenders[f"{first}, {second}"] = Contender(*replayed, mode, batch)
        flops[f"{first}, {second}"] = plan.flops[1]
    times = interleaved(contenders, rounds, f"channels, {mode}")
    rows = {}
    for label in contenders:
        low, ratio, high = paired(times, label, UNIT)
        rows[label] = {
            "ms": milliseconds(times[label]),
            "by_32": ratio,
            "by_32_quartiles": [low, high],
            "flops_by_32": round(flops[label] / flops[UNIT], 3),
        }
    return rows


def resnet50():
    """A ResNet-50 as functions of dicts, in inference, and one image's shape."""
    draw = np.random.default_rng(0)

    def conv(size, channels_in, features):
        kernel = draw.standard_normal((size, size, channels_in, features), np.float32)
        norm = {name: np.ones(features, np.float32) for name in ("scale", "bias", "mean", "var")}
        return {"kernel": kernel, "norm": norm}

    def block(channels_in, width, stride):
        params = {
            "conv1": conv(1, channels_in, width),
            "conv2": conv(3, width, width),
            "conv3": conv(1, width, 4 * width),
        }
        if stride > 1 or channels_in != 4 * width:
            params["shortcut"] = conv(1, channels_in, 4 * width)
        return params

    stages = [(64, 3), (128, 4), (256, 6), (512, 3)]
    blocks = [(width, i) for width, depth in stages for i in range(depth)]
    strides = [2 if i == 0 and width > 64 else 1 for width, i in blocks]
    sizes = [64, *(4 * width for width, _ in blocks)]
    params = {
        "stem": conv(7, 3, 64),
        "blocks": [
            block(size, width, stride)
            for size, (width, _), stride in zip(sizes, blocks, strides, strict=False)
        ],
        "head": draw.standard_normal((2048, 1000), np.float32),
    }

    def normalized(params, x, stride=1):
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["kernel"], (stride, stride), "SAME", dimension_numbers=layout
        )
        norm = params["norm"]
        return (x - norm["mean"]) * jax.lax.rsqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]

    def bottleneck(params, x, stride):
        y = jax.nn.relu(normalized(params["conv1"], x))
        y = jax.nn.relu(normalized(params["conv2"], y, stride))
        y = normalized(params["conv3"], y)
        x = normalized(params["shortcut"], x, stride) if "shortcut" in params else x
        return jax.nn.relu(x + y)

    def apply(params, x):
        x = jax.nn.relu(normalized(params["stem"], x, 2))
        window = ((1, 3, 3, 1), (1, 2, 2, 1))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *window, "SAME")
        for block, stride in zip(params["blocks"], strides, strict=True):
            x = bottleneck(block, x, stride)
        return x.mean((1, 2)) @ params["head"]

    return apply, params, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def bookkeeping(apply, params, image, repeats, name):
    """What is spent before anything runs: medians of first calls, and of those after them."""
    scores = jax.tree.map(np.abs, params)
    groups = dependency.trace(apply, params, image)
    units = dependency.unit_scores(groups, scores)
    plan = shrinking.plan(groups, units, sparsity=0.5, multiple_of=8)
    small = shrinking.shrink(params, plan)
    replayed = shrinking.replay(apply, plan)
    calls = {
        "make_jaxpr(apply)": lambda: jax.make_jaxpr(apply)(params, image),
        "trace": lambda: dependency.trace(apply, params, image),
        "unit_scores": lambda: dependency.unit_scores(groups, scores),
        "plan(sparsity=)": lambda: shrinking.plan(groups, units, sparsity=0.5, multiple_of=8),
        "plan(flops=, global)": lambda: shrinking.plan(groups, units, flops=0.5, scope="global"),
        "shrink": lambda: jax.block_until_ready(shrinking.shrink(params, plan)),
        "make_jaxpr(replay)": lambda: jax.make_jaxpr(replayed)(small, image),
    }
    times = {label: {"first": [], "again": []} for label in calls}
    for _ in track(range(repeats), f"{name:<24}"):
        for label, call in calls.items():
            jax.clear_caches()
            for which in ("first", "again"):
                start = time.perf_counter()
                call()
                times[label][which].append(time.perf_counter() - start)
    medians = {
        label: {which: milliseconds(found) for which, found in both.items()}
        for label, both in times.items()
    }
    return {"params": groups.params, "groups": len(groups), "ms": medians}


def targets(cells):
    """The least of what is promised, over all cells, and the promise."""
    replayed = {
        (cell, label): row
        for cell, rows in cells.items()
        for label, row in rows.items()
        if label.endswith("replayed")
    }
    shares = [
        row["share"]
        for (cell, label), row in replayed.items()
        if cell.startswith("training") and not label.startswith("full")
    ]
    return {
        "share of the FLOPs ratio, training, replayed": [min(shares), SHARE],
        "replayed programs that are the built ones": [
            float(np.mean([row["same_program_as_built"] for row in replayed.values()])),
            1.0,
        ],
        "built ÷ replayed": [min(row["built_by_this"] for row in replayed.values()), BUILT],
    }


def between(quartiles):
    """The lower and the upper one."""
    return f"{quartiles[0]} to {quartiles[1]}"


def tables(report):
    """Everything that was measured."""
    header = ["", "ms", "speed-up", "quartiles", "FLOPs ratio", "share", "built ÷ this", "program"]
    for cell, rows in report["cells"].items():
        lines = [
            [
                label,
                row["ms"],
                row["speedup"],
                between(row["speedup_quartiles"]),
                row["flops_ratio"],
                row["share"],
                row["built_by_this"],
                "as built" if row["same_program_as_built"] else "another",
            ]
            for label, row in rows.items()
        ]
        yield table(f"reference CNN, {cell}", header, lines)
    for cell, rows in report["channels"].items():
        lines = [
            [label, row["ms"], row["by_32"], between(row["by_32_quartiles"]), row["flops_by_32"]]
            for label, row in rows.items()
        ]
        header = ["channels", "ms", "÷ 32, 32", "quartiles", "FLOPs ÷ 32, 32"]
        yield table(f"two convolutions, {cell}", header, lines)
    for name, found in report["bookkeeping"].items():
        lines = [[label, ms["first"], ms["again"]] for label, ms in found["ms"].items()]
        title = f"{name}: {found['params']:,} variables, {found['groups']} groups"
        yield table(title, ["before anything runs", "first, ms", "again, ms"], lines)
    lines = [
        [what, round(least, 3), f"≥ {bound}", "yes" if least >= bound else "NO"]
        for what, (least, bound) in report["targets"].items()
    ]
    yield table("targets", ["least over all cells", "measured", "target", "met"], lines)


def main():
    """Measures, writes the JSON, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    plans, functions = reference()
    cells = {
        f"{mode}, batch {batch}": measure(plans, functions, mode, batch, args.rounds)
        for mode, batch in CELLS
    }
    counts = {
        f"{mode}, batch 64": channels(mode, 64, args.rounds) for mode in ("inference", "training")
    }
    networks = {"reference CNN": (*functions[DENSE], IMAGE), "ResNet-50": resnet50()}
    machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    versions = {"jax": jax.__version__, "optax": optax.__version__, "sparsejax": sj.__version__}
    report = {
        "machine": machine | versions | {"device": jax.devices()[0].device_kind},
        "rounds": args.rounds,
        "widths": {
            width: {name: len(plan.kept(name)) for name in plan.sizes}
            for width, plan in plans.items()
        },
        "cells": cells,
        "channels": counts,
        "bookkeeping": {
            name: bookkeeping(*network, max(1, args.rounds // 20), name)
            for name, network in networks.items()
        },
        "targets": targets(cells),
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    console = Console()
    console.width = max(console.width, 112)
    console.print(*tables(report), sep="\n")


if __name__ == "__main__":
    main()
