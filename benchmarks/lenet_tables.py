"""LeNet-300-100 and LeNet-5-Caffe on MNIST, pruned to the sizes of the literature's tables.

Usage: `python benchmarks/lenet_tables.py --data-dir MNIST`, hours on two cores. A cell (network,
method, size, seed) that is finished is a line of `benchmarks/results/lenet/NETWORK.jsonl`; what is
there is not run again, here or on another machine. `--networks`, `--methods`, `--sizes` and
`--seeds` choose cells. The tables of docs/results.md are written anew at the end; `--tables` writes
nothing else.

Methods: `gradual` is magnitude pruning during training, on the dense network's soft outputs
(self-distillation), and `gradual, labels` the same on the labels; `random` masks and a `small
dense` network of as many weights learn from the soft outputs, too; `SNIP` prunes at initialization
and trains on the labels. From the networks of `gradual` come the files: `int8` weights, and
`shared` ones (k-means). Networks are kept in `--cache`, since later cells start from them; one that
is missing is trained again. A changed recipe wants another folder, and no old lines.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from lenet_report import read, write_tables
from lenet_training import LENETS, Task
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sparsejax import criteria, datasets, masking, quantization, storage

RESULTS = Path(__file__).parent / "results/lenet"
DENSE, GRADUAL, LABELS, RANDOM, SMALL, SNIP, INT8, SHARED = METHODS = (
    "dense",
    "gradual",
    "gradual, labels",
    "random",
    "small dense",
    "SNIP",
    "int8",
    "shared",
)
# Percent of the weights that are left. Those of the published tables; 1 for distillation's gain,
# 4 and 3 for small files.
SIZES = {
    "LeNet300100": {
        GRADUAL: (8.3, 5, 4, 3, 2, 1.8, 1.5, 1),
        LABELS: (2, 1),
        RANDOM: (8.3, 5, 2, 1.8, 1.5),
        SMALL: (8.3, 5, 2, 1.8, 1.5),
        SNIP: (5, 2),
        INT8: (5,),
        SHARED: (8.3, 5, 4, 3),
    },
    "LeNet5Caffe": {
        GRADUAL: (8.3, 2, 1, 0.9, 0.4),
        RANDOM: (8.3, 2, 1, 0.9, 0.4),
        SMALL: (8.3, 2, 1, 0.9, 0.4),
    },
}
QUANTIZED = (INT8, SHARED)
SEEDS = {"LeNet300100": 5, "LeNet5Caffe": 3}


class Cell(NamedTuple):
    """What one line of the results is about."""

    network: str
    method: str
    percent: float
    seed: int


def main(args):
    """Runs what is missing, and writes the tables."""
    if not args.tables:
        data = datasets.mnist(args.data_dir)
        for network in args.networks:
            run(network, data, args)
    write_tables(RESULTS)


def run(network, data, args):
    """Runs the cells of a network that have no line."""
    done = {Cell(*(line[name] for name in Cell._fields)) for line in read(RESULTS, network)}
    todo = [cell for cell in cells(network, args) if cell not in done]
    if not todo:
        chosen = len(cells(network, args))
        print(f"{network}: nothing to run, {chosen} of the chosen cells are there.")
        return
    bench = Bench(network, data, args.cache)
    columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(network, total=len(todo))
        for cell in todo:
            name = f"{network}, {cell.method}, {cell.percent:g} %, seed {cell.seed}"
            begin = time.time()
            line = bench.line(
                cell, lambda note, name=name: bar.update(task, description=f"{name}: {note}")
            )
            line["seconds"] = round(time.time() - begin)
            append(network, line)
            bar.console.print(f"{name}: error {line['error']:.2%}, {line['nonzeros']:,} weights")
            bar.update(task, advance=1)


def cells(network, args):
    """The cells, seed by seed, so that what is there first is a whole table."""
    sizes = {DENSE: (100,)} | SIZES[network]
    return [
        Cell(network, method, percent, seed)
        for seed in range(SEEDS[network])
        for method in sizes
        for percent in sizes[method]
        if (args.methods is None or method in args.methods)
        and (args.sizes is None or percent in args.sizes)
        and (args.seeds is None or seed in args.seeds)
    ]


class Bench:
    """Networks by cell: from the cache, or trained."""

    def __init__(self, network, data, cache):
        """Makes the network's task."""
        self.network, self.cache = network, cache
        self.task = Task(LENETS[network], data)
        self._teachers = {}

    def params(self, cell, advance):
        """The params of a cell; what it starts from is found or trained first."""
        path = self._path(cell)
        if path.exists():
            return storage.load(path).params
        params = self._train(cell, advance)
        self._save(path, params)
        return params

    def _path(self, cell):
        name = f"{self.network}-{cell.method}-{cell.percent:g}-{cell.seed}.safetensors"
        return self.cache / name.replace(" ", "-")

    def _save(self, path, params, **how):
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.save(path, params, **how)

    def _train(self, cell, advance):
        task, density, seed = self.task, cell.percent / 100, cell.seed
        if cell.method == DENSE:
            return task.dense(seed, advance)
        if cell.method == SNIP:
            params, masks = task.snip(density, seed)
            return task.masked(params, masks, seed, None, advance)
        dense = self.params(cell._replace(method=DENSE, percent=100), advance)
        if cell.method == LABELS:
            return task.pruned(dense, density, seed, None, advance)
        teacher = self._teacher(seed, dense)
        if cell.method == GRADUAL:
            start = self.params(self._before(cell), advance)
            return task.pruned(start, density, seed, teacher, advance)
        if cell.method == RANDOM:
            # As many inputs as are left, not as the dense network has.
            scale = density**-0.5
            params = jax.tree.map(lambda w: scale * w if w.ndim > 1 else w, task.init(seed))
            scores = criteria.random(jax.random.key(seed))(params)
            masks = masking.topk(scores, 1 - density)
            return task.masked(params, masks, seed, teacher, advance)
        return task.small(density, seed, teacher, advance)

    def _before(self, cell):
        """The cell whose network a pruned one starts from."""
        sizes = [p for p in SIZES[self.network][GRADUAL] if p > cell.percent]
        if self.task.recipe.chained and sizes:
            return cell._replace(percent=sizes[-1])
        return cell._replace(method=DENSE, percent=100)

    def _teacher(self, seed, dense):
        """The dense network's logits of all training images."""
        if seed not in self._teachers:
            self._teachers = {seed: self.task.outputs(dense, self.task.x)}
        return self._teachers[seed]

    def _read_back(self, cell, advance):
        """The params of a quantized network, from the smallest file that has them."""
        params = jax.tree.map(jnp.asarray, self.params(cell._replace(method=GRADUAL), advance))
        if cell.method == INT8:
            coded = quantization.quantize(params, bits=8)
        else:
            shared = quantization.share(params, bits=4)
            dense = self.params(cell._replace(method=DENSE, percent=100), advance)
            coded = self.task.tuned(shared, cell.seed, self._teacher(cell.seed, dense), advance)
        # Half of the bits are enough for biases.
        coded = {k: layer | {"bias": jnp.bfloat16(layer["bias"])} for k, layer in coded.items()}
        path = self._path(cell)
        self._save(path, coded, header="packed")
        read = storage.load(path, like=coded).params
        return jax.tree.map(jnp.float32, quantization.dequantize(read)), path.stat().st_size

    def line(self, cell, advance):
        """What is written of a cell: of quantized networks, all of it measured on the file."""
        if cell.method in QUANTIZED:
            params, size = self._read_back(cell, advance)
            more = {"bytes": size}
        else:
            params, more = self.params(cell, advance), {}
        count = masking.sparsity(params).prunable
        return (
            cell._asdict()
            | more
            | {
                "error": self.task.error(params),
                "nonzeros": int(count.nonzeros),
                "size": int(count.size),
                "jax": jax.__version__,
                "machine": platform.machine(),
            }
        )


def append(network, line):
    """Adds a line, whole."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{network}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    add("--networks", nargs="+", choices=SIZES, default=list(SIZES), metavar="NETWORK")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    add("--sizes", nargs="+", type=float, help="percent of the weights left")
    add("--seeds", nargs="+", type=int)
    add("--cache", type=Path, default=Path("out/lenet"), help="where networks are kept")
    add("--tables", action="store_true", help="only write the tables of what is there")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"lenet_tables.py: {error}")
