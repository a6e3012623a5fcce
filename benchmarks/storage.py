"""How small a pruned checkpoint is, and what saving and loading it costs.

Usage: `python benchmarks/storage.py [--only sizes speed memory] [--data-dir MNIST] [--out FILE]`,
some nine minutes for everything; what is measured replaces what FILE has of it.

Sizes: a layer of 1024x1024 with random masks (normal values, and values of 32 random bits, which
nothing can compress), LeNet-300-100 and the reference CNN, trained on MNIST, pruned by magnitude
and trained again with the masks kept; entries, channels, blocks and 2:4. The bound is, leaf by
leaf, log2 C(n, k) bits, where k of n units are kept, and 32 bits a kept value. `positions` is what
ours takes where all kept values are 1, beside the first part of the bound (normal values of trained
networks have fewer than 32 bits, which hides what positions take).

Speed and memory: 100 million float32, in ten leaves and in one. Every round saves and loads by all
contenders in turn, in an order drawn anew; a ratio is the median over rounds of (ours / another's
in the same round). All of them fsync what they write; files are read from the system's cache.
Memory is the growth of the peak of a fresh process (VmHWM) from just before the call, without the
params themselves.
"""

import argparse
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import zstandard
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from scipy import sparse
from tables import table

import sparsejax as sj
from sparsejax import criteria, datasets, filters, granularities, masking, models, storage

try:
    import torch
    from torch.nn.utils import prune
except ImportError:
    torch = None

RESULTS = Path(__file__).parent / "results/storage.json"
BATCH = 64  # of training
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
UNITS = {
    "entries": granularities.Unstructured(),
    "channels": granularities.Channel(),
    "4x4 blocks": granularities.Block((4, 4)),
    "1x8 blocks": granularities.Block((1, 8)),
    "2:4": granularities.NM(2, 4),
}
NETWORKS = {"LeNet-300-100": models.LeNet300100, "reference CNN": models.CNN}
LAYOUTS = {"10 leaves": (10, 3162, 3162), "1 leaf": (1, 10_000, 10_000)}
MAIN = 0.9  # measured with masks and memory, too, and in more rounds
CELLS = (("10 leaves", MAIN), ("1 leaf", MAIN), ("10 leaves", 0.5), ("10 leaves", 0.0))
OURS, MASKED, SLOW = "ours", "ours, with masks", "zstd -19"
PEER, STREAMED, PLAIN = "safetensors + zstd -3", "the same, streamed", "safetensors alone"
SLOWER = 3.0  # than the peers with zstd, the most that ours may be


# Sizes


def log2_choices(n, k):
    """Bits that say which k of n are kept."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def position_bits(mask, unit):
    """The same of a leaf's mask, whose units these are."""
    if mask.ndim == 0:
        return 0.0
    if isinstance(unit, granularities.NM):
        return mask.size / unit.m * log2_choices(unit.m, unit.n)
    if isinstance(unit, granularities.Block):
        steps = (1,) * (mask.ndim - len(unit.shape)) + tuple(unit.shape)
        mask = mask[tuple(slice(None, None, step) for step in steps)]
    return log2_choices(mask.size, int(mask.sum()))


def layers(rng):
    """A layer of each kind, its values and scores that have nothing to do with them."""
    normal = rng.standard_normal((1024, 1024), np.float32) * np.float32(0.03)
    bits = rng.integers(2**32, size=normal.shape, dtype=np.uint32).view(np.float32)
    scores = {"w": jnp.asarray(rng.random(normal.shape, np.float32))}
    for unit, sparsity in cells_of(UNITS):
        masks = masking.topk(scores, sparsity, granularity=UNITS[unit])
        yield "random layer", unit, sparsity, {"w": normal}, masks
        if unit == "entries":
            yield "random layer, random bits", unit, sparsity, {"w": bits}, masks


def cells_of(units):
    """(unit, sparsity) of each cell; N:M has a sparsity of its own."""
    return [(u, s) for u in units for s in ((None,) if u == "2:4" else SPARSITIES)]


def trained(name, data, epochs, steps):
    """A network's params after training, pruning in every way, and some steps with the masks."""
    apply, state = models.functional(NETWORKS[name](rngs=nnx.Rngs(0)))
    fit, params = trainer(apply, data), nnx.to_pure_dict(state)
    everything = jax.tree.map(lambda _: jnp.array(True), params)
    dense = fit(params, everything, epochs * len(data.train_images) // BATCH)
    scores = criteria.magnitude(dense)
    for unit, sparsity in cells_of([unit for unit in UNITS if unit != "1x8 blocks"]):
        # Channels of layers of different sizes do not compete.
        scope = {"entries": "global", "2:4": None}.get(unit, "per_leaf")
        prunable = filters.weights if unit == "entries" else divisible
        options = {"granularity": UNITS[unit], "scope": scope, "prunable": prunable}
        masks = masking.topk(scores, sparsity, **options)
        yield name, unit, sparsity, fit(dense, masks, steps), masks


def divisible(path, leaf):
    """Weights that 2:4 divides: neither the first convolution's nor the classes'."""
    return jnp.ndim(leaf) >= 2 and leaf.shape[-1] % 4 == 0 and leaf.shape[-2] % 4 == 0


def trainer(apply, data):
    """`(params, masks, steps) -> params` after so many minibatches, with the masks kept."""

    def loss(params, x, y):
        logits = apply(params, jnp.float32(x) / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = optimizer(state.masks).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def optimizer(masks):
        return sj.keep_masks(optax.adam(1e-3), masks)

    def fit(params, masks, steps):
        draw, state = np.random.default_rng(0), optimizer(masks).init(params)
        for _ in range(steps):
            batch = draw.integers(len(data.train_images), size=BATCH)
            params, state = step(params, state, data.train_images[batch], data.train_labels[batch])
        return params

    return fit


def flat(tree):
    """NumPy arrays by the paths of the leaves."""
    rows = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(x) for p, x in rows}


def sizes(params, masks, unit, folder):
    """Bytes by contender, the bound, and what positions take of ours."""
    arrays, kept = flat(sj.apply_masks(params, masks)), flat(masks)
    ones = {name: np.where(kept[name], np.float32(1), 0) for name in arrays}
    ones = {name: np.broadcast_to(ones[name], x.shape) for name, x in arrays.items()}
    bits = {name: position_bits(mask, unit) for name, mask in kept.items()}
    values = sum(int(np.broadcast_to(kept[name], x.shape).sum()) for name, x in arrays.items())
    pruned = [name for name, mask in kept.items() if mask.ndim]
    bound = sum(bits.values()) / 8 + 4 * values
    found = {label: len(encode(arrays, kept)) for label, encode in ENCODERS.items()}
    if isinstance(unit, granularities.Unstructured):  # a minute for the others
        found[SLOW] = len(zstd(19, dense)(arrays, kept))
    found[OURS] = saved(arrays, None, folder)
    found[MASKED] = saved(arrays, kept, folder)
    saved(ones, kept, folder)
    leaves = storage.contents(folder / "file").leaves
    return {
        "bytes": found,
        "bound": round(bound),
        "leaves": len(arrays),
        "kept": values,
        "share of what is allowed": round(found[MASKED] / (1.01 * bound + 256 * len(arrays)), 4),
        "positions": {
            "bound": round(sum(bits.values()) / 8),
            OURS: sum(leaf.bytes for leaf in leaves if leaf.name in pruned),
        },
    }


def saved(params, masks, folder):
    """Bytes of our file."""
    storage.save(folder / "file", params, masks)
    return (folder / "file").stat().st_size


def npz(write):
    """What one of NumPy's functions writes."""

    def encode(arrays, kept):
        file = io.BytesIO()
        write(file, **arrays)
        return file.getvalue()

    return encode


def csr(arrays, kept):
    """A file a pruned leaf, by SciPy; the others as they are."""
    file = io.BytesIO()
    for name, array in arrays.items():
        if kept[name].ndim:
            sparse.save_npz(file, sparse.csr_array(array.reshape(-1, array.shape[-1])))
            file.seek(0, io.SEEK_END)
        else:
            file.write(array.tobytes())
    return file.getvalue()


def bitmask(arrays, kept):
    """A bit an entry and the values that are not zero, nothing compressed; no names or shapes."""
    parts = [np.packbits(x != 0).tobytes() + x[x != 0].tobytes() for x in arrays.values()]
    return b"".join(parts)


def torch_module(arrays, kept):
    """`torch.save` of the state of a module pruned by `torch.nn.utils.prune`."""
    root = torch.nn.ModuleDict()
    for name, array in arrays.items():
        module = root[name.replace(".", "_")] = torch.nn.Module()
        module.register_parameter("weight", torch.nn.Parameter(torch.tensor(array)))
        if kept[name].ndim:
            mask = torch.tensor(np.broadcast_to(kept[name], array.shape).copy())
            prune.custom_from_mask(module, "weight", mask)
    file = io.BytesIO()
    torch.save(root.state_dict(), file)
    return file.getvalue()


def zstd(level, encode):
    """The same, compressed."""
    return lambda arrays, kept: zstandard.compress(encode(arrays, kept), level)


def dense(arrays, kept):
    """All entries, without names or shapes."""
    return b"".join(array.tobytes() for array in arrays.values())


def container(arrays, kept):
    """An ordinary safetensors file."""
    return safetensors.numpy.save(arrays)


ENCODERS = {
    "npz": npz(np.savez),
    "npz compressed": npz(np.savez_compressed),
    "safetensors": container,
    "CSR npz": csr,
    "zstd -3": zstd(3, dense),
    "safetensors, zstd -3": zstd(3, container),
    "bitmask + values": bitmask,
} | ({"torch.save, pruned": torch_module} if torch else {})


def all_sizes(args, bar):
    """Every cell."""
    data = datasets.mnist(args.data_dir) if args.data_dir else datasets.mnist_subset()
    sources = [layers(np.random.default_rng(0))]
    sources += [trained(name, data, args.epochs, args.steps) for name in NETWORKS]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for source in sources:
            for name, unit, sparsity, params, masks in source:
                where = f"{name}, {unit}" + (f", {sparsity:.0%}" if sparsity else "")
                yield where, sizes(params, masks, UNITS[unit], Path(folder))
                bar("sizes")


# Speed and memory


def durable(path, data):
    """Bytes in a file on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def save_peer(path, params, masks):
    """In memory, as one would write it in three lines."""
    blob = safetensors.numpy.save(params)
    durable(path, zstandard.ZstdCompressor(level=3).compress(blob))


def load_peer(path):
    """The same backwards."""
    return safetensors.numpy.load(zstandard.ZstdDecompressor().decompress(path.read_bytes()))


def save_streamed(path, params, masks):
    """An ordinary file first, so that memory holds a piece of it at a time."""
    plain = path.with_suffix(".plain")
    safetensors.numpy.save_file(params, plain)
    with plain.open("rb") as source, path.open("wb") as target:
        zstandard.ZstdCompressor(level=3).copy_stream(source, target, size=plain.stat().st_size)
        target.flush()
        os.fsync(target.fileno())
    plain.unlink()


def load_streamed(path):
    """The same backwards."""
    plain = path.with_suffix(".plain")
    with path.open("rb") as source, plain.open("wb") as target:
        zstandard.ZstdDecompressor().copy_stream(source, target)
    params = safetensors.numpy.load_file(plain)
    plain.unlink()
    return params


def save_plain(path, params, masks):
    """Not compressed, for comparison."""
    safetensors.numpy.save_file(params, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load_ours(path):
    """The params."""
    return storage.load(path).params


CONTENDERS = {
    OURS: (lambda path, params, masks: storage.save(path, params), load_ours),
    MASKED: (storage.save, load_ours),
    PEER: (save_peer, load_peer),
    STREAMED: (save_streamed, load_streamed),
    PLAIN: (save_plain, safetensors.numpy.load_file),
}


def large(layout, sparsity):
    """100 million normal values, this fraction of which are zeros, and the masks."""
    rng, (leaves, *shape) = np.random.default_rng(0), LAYOUTS[layout]
    params, masks = {}, {}
    for i in range(leaves):
        masks[f"w{i}"] = mask = rng.random(shape, np.float32) >= sparsity
        params[f"w{i}"] = np.where(mask, rng.standard_normal(shape, np.float32), np.float32(0))
    return params, masks


def seconds(call, *operands):
    """The time of one call, and its answer."""
    start = time.perf_counter()
    answer = call(*operands)
    return time.perf_counter() - start, answer


def speed(layout, sparsity, params, masks, rounds, folder, bar):
    """Medians of saving and loading, file sizes, and paired ratios to ours."""
    labels = [label for label in CONTENDERS if label != MASKED or sparsity == MAIN]
    draw, times = np.random.default_rng(0), {label: [] for label in labels}
    for number in range(rounds + 1):
        for label in draw.permutation(labels):
            save, load = CONTENDERS[label]
            path = folder / label
            saving, _ = seconds(save, path, params, masks)
            loading, found = seconds(load, path)
            if number:  # the first warms up, and shows that it is right
                times[label].append((saving, loading))
            elif not all(np.array_equal(found[name], x) for name, x in params.items()):
                raise AssertionError(f"{label}: not what was saved")
            del found
            bar(f"{layout}, {sparsity:.0%}")
    answer = {}
    for label, pairs in times.items():
        save, load = np.median(pairs, 0)
        ours = np.median(np.array(times[OURS]) / np.array(pairs), 0)
        answer[label] = {
            "save_s": round(save, 3),
            "load_s": round(load, 3),
            "ours_by_this": {"save": round(ours[0], 3), "load": round(ours[1], 3)},
            "bytes": (folder / label).stat().st_size,
        }
    return answer


def peak():
    """Of this process's memory so far, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def memory_worker(label, mode, folder):
    """One call in a process of its own; prints by how much its peak grew."""
    save, load = CONTENDERS[label]
    tiny = {"w": np.ones((8, 8), np.float32)}
    save(folder / "tiny", tiny, {"w": np.ones((8, 8), bool)})  # imports what is imported inside
    load(folder / "tiny")
    if mode == "save":
        params = {path.stem: np.load(path) for path in sorted(folder.glob("w*.npy"))}
        masks = {f"w{path.stem[4:]}": np.load(path) for path in sorted(folder.glob("mask*.npy"))}
        before = peak()
        save(folder / "written", params, masks)
    else:
        before = peak()
        params = load(folder / label)
        before += sum(array.nbytes for array in params.values())
    print(peak() - before)


def memory(params, masks, folder, bar):
    """Bytes beside the params, by contender, of saving and loading."""
    for name, array in params.items():
        np.save(folder / f"{name}.npy", array)
        np.save(folder / f"mask{name[1:]}.npy", masks[name])
    answer = {label: {} for label in CONTENDERS if label != PLAIN}
    for label in answer:
        for mode in ("save", "load"):
            command = [sys.executable, __file__, "--worker", label, mode, str(folder)]
            settings = {"JAX_PLATFORMS": "cpu"}
            answer[label][mode] = int(subprocess.check_output(command, env=os.environ | settings))
            bar(f"memory, {label}")
    return answer


def all_speeds(args, bar):
    """Times and memory of every cell."""
    for layout, sparsity in CELLS:
        params, masks = large(layout, sparsity)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            folder = Path(folder)
            rounds = args.rounds if sparsity == MAIN else -(-args.rounds // 2)
            cell = {"times": speed(layout, sparsity, params, masks, rounds, folder, bar)}
            if "memory" in args.only and sparsity == MAIN:
                cell["memory"] = memory(params, masks, folder, bar)
        yield f"{layout}, {sparsity:.0%} zeros", cell


# Reports


def targets(report):
    """What is promised, the worst that was measured of it, and where."""
    answer = {}

    def worst(what, bound, found):
        if found:
            where = max(found, key=found.get)
            answer[what] = {"most": round(found[where], 4), "bound": bound, "where": where}

    cells = report.get("sizes", {})
    share = "share of what is allowed"
    worst("bytes by 1.01 bound + 256 a leaf", 1.0, {w: c[share] for w, c in cells.items()})
    for mode in ("save", "load"):
        for label in (PEER, STREAMED):
            rows = {w: c["times"][label] for w, c in report.get("speed", {}).items()}
            ratios = {w: row["ours_by_this"][mode] for w, row in rows.items()}
            worst(f"{mode}: times that of {label}", SLOWER, ratios)
    return answer


def size_tables(cells):
    """Bytes by the bound; what is allowed; positions."""
    labels = list(dict.fromkeys(label for cell in cells.values() for label in cell["bytes"]))
    rows, positions = [], []
    for where, cell in cells.items():
        bound = cell["bound"]
        bytes_of = cell["bytes"]
        ratios = [f"{bytes_of[x] / bound:.3f}" if x in bytes_of else "-" for x in labels]
        rows.append([where, f"{bound:,}", *ratios, f"{cell['share of what is allowed']:.3f}"])
        ours, least = cell["positions"][OURS], cell["positions"]["bound"]
        positions.append([where, f"{least:,}", f"{ours:,}", f"{ours / max(least, 1):.3f}"])
    header = ["", "bound, bytes", *labels, "masked by allowed"]
    yield table("bytes, by the bound", header, rows)
    yield table("positions (all values 1)", ["", "bound, bytes", "ours", "by the bound"], positions)


def speed_tables(cells):
    """Seconds, paired ratios, and memory."""
    header = ["", "MB", "save, s", "load, s", "ours by this: save", "load"]
    header += ["memory beside params, MB: save", "load"]
    for where, cell in cells.items():
        rows = []
        for label, row in cell["times"].items():
            ratios = [f"{ratio:.2f}" for ratio in row["ours_by_this"].values()]
            beside = cell.get("memory", {}).get(label, {"save": None, "load": None})
            grown = ["-" if n is None else f"{n / 1e6:.0f}" for n in beside.values()]
            size = f"{row['bytes'] / 1e6:.1f}"
            rows.append([label, size, row["save_s"], row["load_s"], *ratios, *grown])
        yield table(where, header, rows)


def tables(report):
    """Everything that was measured."""
    if "sizes" in report:
        yield from size_tables(report["sizes"])
    if "speed" in report:
        yield from speed_tables(report["speed"])
    lines = [
        [what, found["most"], f"≤ {found['bound']}", found["where"]]
        for what, found in report["targets"].items()
    ]
    yield table("targets", ["most over all cells", "measured", "target", "where"], lines)


def facts():
    """What was measured where."""
    named = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    names = ("jax", "numpy", "safetensors", "scipy", "zstandard", *(["torch"] if torch else []))
    return {
        "processor": named[0].partition(": ")[2] if named else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "sparsejax": sj.__version__,
        **{name: importlib.metadata.version(name) for name in names},
    }


def arguments():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    sections = ("sizes", "speed", "memory")
    add("--only", nargs="+", choices=sections, default=sections, help="memory needs speed")
    add("--data-dir", help="the whole MNIST; by default the digits in the package")
    add("--epochs", type=int, default=2, help="of training")
    add("--steps", type=int, default=100, help="of training after pruning")
    add("--rounds", type=int, default=3, help="of 90 %% zeros; half of them of others")
    add("--folder", type=Path, help="where files are written: 5 GB; by default a temporary one")
    add("--out", type=Path, default=RESULTS)
    add("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Measures, writes the JSON, prints the tables."""
    args = arguments()
    if args.worker:
        label, mode, folder = args.worker
        memory_worker(label, mode, Path(folder))
        return
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    with Progress() as progress:
        task = progress.add_task("", total=None)

        def bar(what):
            progress.update(task, advance=1, description=f"{what:<28}")

        for section, measure in {"sizes": all_sizes, "speed": all_speeds}.items():
            if section in args.only:
                taken, report[section] = seconds(lambda measure=measure: dict(measure(args, bar)))
                report["minutes"] = report.get("minutes", {}) | {section: round(taken / 60, 1)}
    report |= {"machine": facts(), "targets": targets(report)}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    console.width = max(console.width, 170)
    console.print(*tables(report), sep="\n")


if __name__ == "__main__":
    main()
