"""The tables of docs/results.md, from the lines that `lenet_tables.py` has written."""

import json
from pathlib import Path

import numpy as np
from lenet_training import LENETS
from scipy import stats

DOCS = Path(__file__).parent.parent / "docs/results.md"

TITLES = {"LeNet300100": "LeNet-300-100", "LeNet5Caffe": "LeNet-5-Caffe"}

# (name, percent of the weights left, percent of error)
PUBLISHED = {
    "LeNet300100": (
        ("Han 2015", 8.3, 1.6),
        ("SNIP", 5, 1.6),
        ("SNIP", 2, 2.4),
        ("dynamic network surgery", 1.8, 2.0),
        ("sparse variational dropout", 1.5, 1.9),
    ),
    "LeNet5Caffe": (
        ("Han 2015", 8.3, 0.8),
        ("SNIP", 2, 0.8),
        ("SNIP", 1, 1.1),
        ("dynamic network surgery", 0.9, 0.9),
        ("sparse variational dropout", 0.4, 0.8),
    ),
}
CONTROLS = ("random", "small dense", "SNIP")


def write_tables(results):
    """Writes docs/results.md, and prints it."""
    found = {network: lines for network in TITLES if (lines := read(results, network))}
    parts = [INTRODUCTION]
    for network, lines in found.items():
        recipe = LENETS[network]
        pruning = [epochs for _, epochs in recipe.pruning]
        epochs = BUDGETS[network].format(*recipe.epochs, *pruning)
        parts += [f"## {TITLES[network]}", f"{_dense(lines)} {epochs}"]
        parts.append(_comparison(network, lines))
    lines = found.get("LeNet300100", [])
    parts += [_distillation(lines), _files(lines)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    DOCS.write_text(text)
    print(text)


def read(results, network):
    """The lines of a network, one for each cell: the last, where files have been joined."""
    path, found = results / f"{network}.jsonl", {}
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is damaged; delete it: {error}") from error
        found[tuple(line[name] for name in ("method", "percent", "seed"))] = line
    return list(found.values())


INTRODUCTION = """\
# Results: LeNets on MNIST, beside the literature

Written by `python benchmarks/lenet_tables.py --data-dir MNIST` from
`benchmarks/results/lenet/*.jsonl`, a line for each network that was trained. The whole MNIST, no
augmentation. Test error in percent after the last step, mean ± standard deviation over seeds; in
brackets how many seeds; – where none has been trained yet. Percentages of weights count weights,
not biases.

*ours* is `dynamic.gradual` by magnitude, from the dense network, on the dense network's outputs at
a temperature of 2 (`distillation.logits` alone: labels are not looked at). *random* masks and a
*small dense* network of as many weights (at a tenth of the learning rate, at which its few units do
not die) learn from the same outputs. Random masks are drawn over the whole network: small layers
starve (at 2 % LeNet-5's first keeps about 10 of 500 weights), and in the end some classes are cut
off; their weights start scaled for as many inputs as are left. *SNIP* is `criteria.snip` at
initialization on 80 batches, trained on the labels. One recipe for all seeds of a network:
`benchmarks/lenet_training.py`."""

BUDGETS = {
    "LeNet300100": "Epochs: dense {0}, ours {2} more at each size; the others {1} from the start, "
    "so they have been trained for less long than ours.",
    "LeNet5Caffe": "Epochs: dense {0}, ours {2} more at each size, from the network of the next "
    "larger one ({3} where less than 0.5 % are left); the others {1} from the start.",
}


def _dense(lines):
    dense = _of(lines, "dense", 100)
    return f"Dense: {_errors(dense)} %, {dense[0]['size']:,} weights." if dense else ""


def _comparison(network, lines):
    """Each published row, with ours and the controls at the same size."""
    controls = [c for c in CONTROLS if any(line["method"] == c for line in lines)]
    header = ["published", "weights left", "nonzeros", "their error", "ours", *controls]
    rows = []
    for name, percent, error in PUBLISHED[network]:
        ours = _of(lines, "gradual", percent)
        reached = ours and 100 * np.mean([line["error"] for line in ours]) <= error
        cells = [_errors(_of(lines, control, percent)) for control in controls]
        nonzeros = f"{ours[0]['nonzeros']:,}" if ours else "–"
        mine = f"**{_errors(ours)}**" if reached else _errors(ours)
        rows.append([name, f"{percent:g} %", nonzeros, f"{error:.1f}", mine, *cells])
    return _markdown(header, rows) + "\n\nBold: at or below the published error."


def _distillation(lines):
    """What the dense network's outputs are worth, seed by seed."""
    rows = []
    for percent in (2, 1):
        taught, labels = (
            {line["seed"]: 100 * line["error"] for line in _of(lines, method, percent)}
            for method in ("gradual", "gradual, labels")
        )
        seeds = sorted(taught.keys() & labels.keys())
        if len(seeds) < 2:
            continue
        gains = np.array([labels[s] - taught[s] for s in seeds])
        half = stats.t.ppf(0.975, len(seeds) - 1) * gains.std(ddof=1) / np.sqrt(len(seeds))
        interval = f"{gains.mean():.2f} ({gains.mean() - half:.2f} to {gains.mean() + half:.2f})"
        means = [f"{_errors(_of(lines, m, percent))}" for m in ("gradual, labels", "gradual")]
        rows.append([f"{100 - percent:g} %", *means, interval])
    if not rows:
        return ""
    header = ["zeros", "labels", "dense network's outputs", "gain (95 % interval)"]
    note = (
        "LeNet-300-100; the same schedule and seeds, only the loss differs. The gain is in points "
        "of test error, the interval Student's of the seeds' differences."
    )
    return f"## What distillation is worth\n\n{note}\n\n{_markdown(header, rows)}"


def _files(lines):
    """Quantized networks, as files."""
    dense = {line["seed"]: line["error"] for line in _of(lines, "dense", 100)}
    size = 4 * 266_610
    rows = []
    for method in ("int8", "shared"):
        for percent in sorted({p["percent"] for p in lines if p["method"] == method}, reverse=True):
            found = _of(lines, method, percent)
            float32 = {s["seed"]: s["error"] for s in _of(lines, "gradual", percent)}
            changes = [_change(found, other) for other in (float32, dense)]
            file = np.mean([line["bytes"] for line in found])
            name = "int8" if method == "int8" else "16 shared values a layer"
            sizes = [f"{file:,.0f}", f"{size / file:.0f}x"]
            rows.append([f"{percent:g} %", name, _errors(found), *changes, *sizes])
    if not rows:
        return ""
    header = ["weights left", "weights are", "error", "to float32", "to dense", "bytes", "smaller"]
    note = (
        "LeNet-300-100, the networks of the first table. The error is that of what `storage.load` "
        f"and `quantization.dequantize` make of the file; {size:,} bytes are the dense network's "
        "float32. Biases are bfloat16."
    )
    return f"## Files\n\n{note}\n\n{_markdown(header, rows)}"


def _change(lines, others):
    """The mean difference, in points, to other errors of the same seeds."""
    gaps = [
        100 * (line["error"] - others[line["seed"]]) for line in lines if line["seed"] in others
    ]
    return f"{np.mean(gaps):+.2f}" if gaps else "–"


def _of(lines, method, percent):
    return [line for line in lines if (line["method"], line["percent"]) == (method, percent)]


def _errors(lines):
    if not lines:
        return "–"
    errors = [100 * line["error"] for line in lines]
    spread = f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else ""
    return f"{np.mean(errors):.2f}{spread} ({len(errors)})"


def _markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
