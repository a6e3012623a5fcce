"""How much faster products, convolutions and networks are whose zeros are skipped.

Usage: `python benchmarks/sparse_ops.py [--only products convolutions networks] [--out FILE] ...`,
some ten minutes for everything. `--density`, `--size`, `--batch`, `--sparsity` and `--network`
narrow it down; what is measured replaces what FILE has of it, the rest stays.

Every round runs all contenders of a cell in turn, in an order drawn anew, each twice, of which the
second call counts: so each follows its own like, and finds threads and code awake. A ratio is the
median over rounds of (dense XLA's time / another's in the same round). Weights of products come
from memory: each call has another copy of them, and the copies together exceed the last-level
cache twice. Convolutions and networks are measured with what is in the caches. Contenders whose
threads spin after a call run apart (`sparse_peers.py`), in loops; what is compared with them are
medians of such loops of ours.

A cell's bound is the larger of two times. Bytes: kept values (4 bytes) and their indices (2; with
blocks 1/4), x and y, at the bandwidth with which all threads together read memory here. Loads: one
of 32 bytes for every 8 multiply-adds, as many at a time as a dense product has multiply-adds, which
NumPy's BLAS shows. `share` is bound / measured. A network's bound is that of its kept weights and
the time of the same network with nothing kept.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import operator
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import sparse_cases as cases
import sparse_peers as peers
from jax.experimental import sparse as jax_sparse
from rich.console import Console
from rich.progress import Progress
from scipy import sparse
from tables import table

import sparsejax as sj
from sparsejax import criteria, masking, sparse_ops
from sparsejax.sparse_ops import _kernel, _products

RESULTS = Path(__file__).parent / "results/sparse_ops.json"
DENSE, BLOCKS = "dense XLA", "ours, blocks of 8"
INDEX_BYTES = {BLOCKS: 0.25}  # of a kept weight; else 2
BACKENDS = ("plain", "avx2", "avx512")
TEMPORARY = 1 << 30  # bytes; BCOO gathers a row of x for every kept weight
SLOWER = 0.95  # of dense XLA's speed, which nothing may be
PRODUCTS_90 = {1: 5.0, 8: 5.0, 64: 5.0, 256: 4.5}  # of 4096x4096, by batch
NETWORKS_90 = {"LeNet-300-100": 3.0, "reference CNN": 1.5, "transformer block": 3.0}


class Machine:
    """What bounds programs here: bytes and loads a second."""

    def __init__(self, threads, loads):
        self.loads = loads
        large = jnp.ones((2048, 4 * cases.cache_bytes() // 8192), jnp.float32)
        sums = jax.jit(lambda a: a.sum(1))
        with ThreadPoolExecutor(threads) as pool:
            parts = np.array_split(np.asarray(large), threads)
            ways = (awaited(sums, large), lambda: list(pool.map(np.max, parts)))
            self.bytes = large.nbytes / min(map(fastest, ways))

    def bounds(self, kept, index_bytes, positions, other_bytes):
        """Milliseconds, for so many weights used at so many positions, and bytes besides."""
        return {
            "bytes": 1e3 * (kept * (4 + index_bytes) + other_bytes) / self.bytes,
            "loads": 1e3 * kept * -(-positions // 8) / self.loads,
        }

    def bound(self, cell, work):
        """Adds to rows of a cell what bounds them, and how much of it they reach."""
        for label, amounts in work.items():
            by = self.bounds(*amounts)
            tightest = max(by, key=by.get)
            cell[label]["bound"] = {kind: round(ms, 5) for kind, ms in by.items()}
            cell[label] |= {"by": tightest, "share": round(by[tightest] / cell[label]["ms"], 3)}
        return cell


def fastest(call):
    """The least time of some calls."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def awaited(program, *operands):
    """A call of a compiled program that waits for its result."""
    return lambda: program(*operands).block_until_ready()


def cold(program, x, weights):
    """The same, each time with another copy of the weights."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    number = 1 + -(-2 * cases.cache_bytes() // max(1, size))
    copies = itertools.cycle([jax.tree.map(lambda a: a + 0, weights) for _ in range(number)])
    return lambda: program(x, next(copies)).block_until_ready()


def check(label, found, expected):
    """The same up to rounding, or there is nothing to compare."""
    largest = max(float(jnp.abs(expected).max()), 1e-30)  # nothing may be kept
    error = float(jnp.abs(found - expected).max()) / largest
    if not error < 1e-4:
        raise AssertionError(f"{label}: off by {error:.1e} of the dense result's largest entry")


def measure(calls, seconds):
    """Medians, and quartiles of how many times dense XLA takes; slow contenders run in 2 rounds."""
    slow = set()
    for label, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        if label != DENSE and time.perf_counter() - start > seconds / 20:
            slow.add(label)
    draw, rounds = np.random.default_rng(0), []
    end = time.perf_counter() + seconds
    while len(rounds) < 9 or (time.perf_counter() < end and len(rounds) < 300):
        times = {}
        for label in draw.permutation([x for x in calls if len(rounds) < 2 or x not in slow]):
            calls[label]()
            start = time.perf_counter()
            calls[label]()
            times[label] = time.perf_counter() - start
        rounds.append(times)
    return {label: summary([times for times in rounds if label in times], label) for label in calls}


def alone(call, seconds):
    """Milliseconds of a call in a loop, as peers have it that run apart."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 9 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(times)), 5)


def summary(rounds, label):
    """One contender's median, and its paired ratios to dense XLA."""
    ratios = np.quantile([times[DENSE] / times[label] for times in rounds], [0.25, 0.5, 0.75])
    low, middle, high = (round(float(q), 3) for q in ratios)
    milliseconds = 1e3 * float(np.median([times[label] for times in rounds]))
    return {"ms": round(milliseconds, 5), "times_dense": middle, "quartiles": [low, high]}


def contenders(weights, batch, args):
    """(label, backend, sparse weights) for every backend, and for blocks."""
    single, blocks = weights
    best = sparse_ops.backend()
    others = BACKENDS[not args.plain : BACKENDS.index(best)] if best in BACKENDS else ()
    w = sparse_ops.SparseMatrix.from_dense(single, batch=batch)
    for backend in (best, *others):
        yield f"ours, {backend}", backend, w
    yield BLOCKS, best, sparse_ops.SparseMatrix.from_dense(blocks, block=8, batch=batch)


def forced(operation, backend):
    """An operation compiled for a backend."""

    def program(*operands):
        with mock.patch.dict(os.environ, SPARSEJAX_BACKEND=backend):  # read by the trace
            return operation(*operands)

    return jax.jit(program)


def open_product(structure, x, parts):
    """`sparse_ops.matmul` with indices as operands, so that there can be copies of them, too."""
    out = jax.ShapeDtypeStruct((x.shape[0], structure.shape[1]), x.dtype)
    numbers = _products.attributes(structure, _kernel.isa())
    return jax.ffi.ffi_call("sparsejax_matmul", out)(x, *parts, **numbers)


def apart(cells, args, bar):
    """The peers that run in processes of their own: milliseconds, versions, who is missing."""
    found, versions, missing = {}, {}, {}
    for peer in peers.PEERS if cells else ("NumPy",):
        try:
            versions |= peers.versions(peer)
        except importlib.metadata.PackageNotFoundError as error:
            missing[peer] = f"{error.name} is not installed"
            continue
        request = json.dumps({"cells": cells, "seconds": args.seconds / 4})
        command = [sys.executable, peers.__file__, peer]
        found[peer] = json.loads(subprocess.check_output(command, input=request, text=True))
        bar(f"{peer}, apart", len(cells))
    return found, versions, missing


def products(machine, cells, args, bar):
    """Square matrices, by all contenders that run in this process."""
    dense = jax.jit(operator.matmul)
    for size, density in dict.fromkeys(cell[:2] for cell in cells):
        pair = [cases.matrix(size, density, block) for block in (1, 8)]
        w, turned = jnp.asarray(pair[0]), sparse.csr_array(pair[0].T)
        for batch in [cell[2] for cell in cells if cell[:2] == (size, density)]:
            x = jnp.asarray(cases.rows(size, batch))
            calls, work = {DENSE: cold(dense, x, w)}, {}
            for label, backend, kept in contenders(pair, batch, args):
                expected = x @ kept.to_dense()
                check(label, forced(sparse_ops.matmul, backend)(x, kept), expected)
                parts = (kept.values, *map(jnp.asarray, _products.arrays(kept.structure)))
                program = forced(functools.partial(open_product, kept.structure), backend)
                check(label, program(x, parts), expected)
                calls[label] = cold(program, x, parts)
                work[label] = kept.nnz, INDEX_BYTES.get(label, 2), batch, 8 * batch * size
            if not args.ours:
                calls |= rivals(x, turned)
            if args.beside:
                calls["sketch"] = sketch(args.beside, x, pair[0], batch)
            cell = machine.bound(measure(calls, args.seconds), work)
            for label in work:
                cell[label]["alone_ms"] = alone(calls[label], args.seconds / 8)
            yield cases.product_name(size, density, batch), cell
            bar("products")


def rivals(x, turned):
    """SciPy, which is single-threaded, and JAX's own; what multiplies from the left gets x.T."""
    columns = np.ascontiguousarray(np.asarray(x).T)
    columns = columns[:, 0] if len(x) == 1 else columns
    number = 1 + -(-2 * cases.cache_bytes() // max(1, 8 * turned.nnz))
    copies = itertools.cycle([turned.copy() for _ in range(number)])
    from_left, from_right = jax.jit(lambda x, w: w @ x), jax.jit(operator.matmul)
    bcsr = jax_sparse.BCSR.from_scipy_sparse(turned)
    calls = {
        "SciPy CSR": lambda: next(copies) @ columns,
        "BCSR": cold(from_left, jnp.asarray(columns), bcsr),
    }
    if 4 * turned.nnz * len(x) <= TEMPORARY:
        calls["BCOO"] = cold(from_right, x, jax_sparse.BCOO.from_scipy_sparse(turned.T))
    return calls


def sketch(folder, x, w, batch):
    """The prototype of these kernels; its folder has spmm.py and, built, libspmm.so."""
    sys.path.insert(0, str(folder))
    import spmm

    return cold(jax.jit(spmm.spmm), x, spmm.pack(w, batch=batch))


def read(convolution):
    """With its result read by something, as in a network: XLA is slower where that is returned."""
    return lambda x, w: convolution(x, w).sum((1, 2))


def convolutions(machine, args, bar):
    """Kernels of 3x3, by XLA and by ours."""
    for name, (image, inputs, outputs, stride, padding, batches) in cases.CONVOLUTIONS.items():
        strides = stride, stride
        axes = ("NHWC", "HWIO", "NHWC")
        whole = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=axes)
        whole = functools.partial(whole, window_strides=strides, padding=padding)
        ours = functools.partial(sparse_ops.conv, strides=strides, padding=padding)
        dense, operation = jax.jit(read(whole)), read(ours)
        for sparsity in args.sparsity:
            pair = [cases.kernel((3, 3, inputs, outputs), sparsity, block) for block in (1, 8)]
            for batch in batches:
                x = jax.random.normal(jax.random.key(0), (batch, image, image, inputs))
                kernel = jnp.asarray(pair[0])
                y = jax.eval_shape(whole, x, kernel)
                positions, size = y.size // outputs, x.nbytes + 4 * y.size
                calls, work = {DENSE: awaited(dense, x, kernel)}, {}
                for label, backend, kept in contenders(pair, positions, args):
                    program = forced(operation, backend)
                    check(label, program(x, kept), dense(x, kept.to_dense()))
                    calls[label] = awaited(program, x, kept)
                    work[label] = kept.nnz, INDEX_BYTES.get(label, 2), positions, size
                cell = machine.bound(measure(calls, args.seconds / 2), work)
                yield f"{name}, {sparsity:g} % zeros, batch {batch}", cell
                bar("convolutions")


def networks(machine, args, bar):
    """Whole networks beside their dense selves, and beside all of them that is not the weights."""
    for name in args.network:
        build, batches = cases.NETWORKS[name]
        apply, params, shape, positions = build()
        scores, dense = criteria.magnitude(params), jax.jit(apply)
        nothing = masking.topk(scores, 1 - 1e-9)
        for sparsity in args.sparsity[:3]:
            # Of every layer: global magnitude leaves convolutions almost dense.
            masks = masking.topk(scores, sparsity / 100, scope="per_leaf")
            pruned = sj.apply_masks(params, masks)
            for batch in batches:
                x = jax.random.normal(jax.random.key(0), (batch, *shape))
                fast, small = sparse_ops.sparsify(apply, params, masks, x)
                rest, empty = sparse_ops.sparsify(apply, params, nothing, x, crossover=always)
                fast, rest = jax.jit(fast), jax.jit(rest)
                check(name, fast(small, x), dense(pruned, x))
                calls = {DENSE: awaited(dense, pruned, x), "sparsified": awaited(fast, small, x)}
                calls["nothing kept"] = awaited(rest, empty, x)
                cell = measure(calls, args.seconds / 2)
                each = [
                    machine.bounds(int(np.sum(mask)), 2, batch * positions(path), 0)
                    for path, mask in jax.tree_util.tree_leaves_with_path(masks)
                    if np.ndim(mask)
                ]
                by = {kind: sum(one[kind] for one in each) for kind in each[0]}
                row, tightest = cell["sparsified"], max(by, key=by.get)
                row["bound"] = {kind: round(ms, 5) for kind, ms in by.items()}
                row |= {"by": f"the rest, {tightest}", "replaced": fast.report.replaced}
                floor = cell["nothing kept"]["ms"] + by[tightest]
                row["share"] = round(floor / row["ms"], 3)
                yield f"{name}, {sparsity:g} % zeros, batch {batch}", cell
                bar("networks")


def always(product):
    """A crossover by which everything gains."""
    return 2.0


def best(cell):
    """The label of ours with the best backend."""
    return next(label for label in cell if label.startswith(("ours", "sparsified")))


def targets(report):
    """What is promised, the least that was measured of it, and where."""
    answer = {}

    def least(what, bound, found):
        if found:
            where = min(found, key=found.get)
            answer[what] = {"least": round(found[where], 3), "bound": bound, "where": where}

    for section in ("products", "convolutions", "networks"):
        cells = report.get(section, {})
        ratios = {where: cell[best(cell)]["times_dense"] for where, cell in cells.items()}
        least(f"{section}: times dense XLA's speed", SLOWER, ratios)
        for name, bound in NETWORKS_90.items() if section == "networks" else ():
            some = {w: r for w, r in ratios.items() if w.startswith(f"{name}, 90 %")}
            least(f"{name} at 90 % zeros", bound, some)
        for batch, bound in PRODUCTS_90.items() if section == "products" else ():
            some = {w: r for w, r in ratios.items() if w == f"4096, 10 %, batch {batch}"}
            least(f"4096x4096 at 10 %, batch {batch}", bound, some)
        rivals = {label: None for cell in cells.values() for label in cell}
        for label in rivals if section == "products" else ():
            if label not in (DENSE, "NumPy") and not label.startswith("ours"):
                both = {where: cell for where, cell in cells.items() if label in cell}
                some = {where: ratio(cell, best(cell), label) for where, cell in both.items()}
                least(f"products: times {label}'s speed", 1.0, some)
    return answer


def by_density(cells, size):
    """The issue's table: times as fast, by density, at all batches."""
    densities = [d for d in cases.DENSITIES if any(w.startswith(f"{size}, {d:g} %") for w in cells)]
    labels = {x: None for cell in cells.values() for x in cell if x.startswith("ours")}
    ways = [(label, rival) for rival in (DENSE, "NumPy") for label in labels]
    rows = []
    for density in densities:
        names = [cases.product_name(size, density, batch) for batch in cases.BATCHES]
        rows.append([f"{density:g} %"])
        for label, rival in ways:
            found = [cells.get(name, {}) for name in names]
            rows[-1].append(" / ".join(times(cell, label, rival) for cell in found))
    batches = " / ".join(map(str, cases.BATCHES))
    header = ["density", *(f"{label}, against {rival}" for label, rival in ways)]
    return table(f"{size}x{size}, times as fast at batch {batches}", header, rows)


def ratio(cell, label, rival):
    """How many times as fast a contender is as another, under equal conditions."""
    if rival == DENSE:
        return cell[label]["times_dense"]
    return cell[rival]["ms"] / cell[label]["alone_ms" if rival in peers.PEERS else "ms"]


def times(cell, label, rival):
    """The same as text."""
    if label not in cell or rival not in cell:
        return "-"
    found = ratio(cell, label, rival)
    return f"{found:.1f}" if found < 9.95 else f"{found:.0f}"


def details(title, cells):
    """Milliseconds of ours; how many times that all others take; the bound and its share."""
    labels = list(dict.fromkeys(label for cell in cells.values() for label in cell))
    rows = []
    for where, cell in cells.items():
        row = cell[ours := best(cell)]
        values = [f"{row['ms']:.3f}", f"{row['by']} {row['share']:.0%}"]
        rows.append([where, *values, *(times(cell, ours, label) for label in labels)])
        rows[-1][3 + labels.index(ours)] = "1"
    return table(f"{title}: how many times ours everyone takes", ["", "ms", "bound", *labels], rows)


def tables(report):
    """Everything that was measured."""
    cells = report.get("products", {})
    for size in cases.SIZES:
        if any(where.startswith(f"{size},") for where in cells):
            yield by_density(cells, size)
    for section in ("products", "convolutions", "networks"):
        if section in report:
            yield details(section, report[section])
    lines = [
        [what, found["least"], f"≥ {found['bound']}", found["where"]]
        for what, found in targets(report).items()
    ]
    yield table("targets", ["least over all cells", "measured", "target", "where"], lines)
    for peer, why in report["missing"].items():
        yield f"left out: {peer}, {why}"


def arguments():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    sections = ("products", "convolutions", "networks")
    add("--only", nargs="+", choices=sections, default=sections)
    add("--size", nargs="+", type=int, default=cases.SIZES, help="of the products")
    add("--density", nargs="+", type=float, default=cases.DENSITIES, help="of the products, %%")
    add("--batch", nargs="+", type=int, default=cases.BATCHES, help="of the products")
    add("--sparsity", nargs="+", type=float, default=cases.SPARSITIES, help="of the others, %%")
    add("--network", nargs="+", choices=cases.NETWORKS, default=list(cases.NETWORKS))
    add("--seconds", type=float, default=1.0, help="for a cell, where it is not slow")
    add("--ours", action="store_true", help="only dense XLA and ours")
    add("--plain", action="store_true", help="the plain kernel, too, where there is a better one")
    add("--beside", type=Path, metavar="FOLDER", help="the sketch: a folder with a built spmm.py")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main():
    """Measures, writes the JSON, prints the tables."""
    args = arguments()
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    known = report.get("machine", {})
    cells = [(n, d, b) for n in args.size for d in args.density for b in args.batch]
    with Progress() as progress:
        task = progress.add_task("", total=None)

        def bar(what, cells=1):
            progress.update(task, advance=cells, description=f"{what:<12}")

        # First what bounds are measured by.
        wanted = cells if "products" in args.only and not args.ours else []
        beside, versions, missing = apart(wanted, args, bar)
        loads = beside["NumPy"].pop("multiply-adds a second") / 8
        machine = Machine(len(os.sched_getaffinity(0)), loads)
        if known.get("processor") == processor():
            # What once was reached is what it can do; neighbours of a virtual machine disturb.
            machine.loads = max(machine.loads, known["multiply_adds_a_second"] / 8)
            machine.bytes = max(machine.bytes, known["gigabytes_a_second"] * 1e9)
        found = {}
        if "products" in args.only:
            found["products"] = dict(products(machine, cells, args, bar))
            for peer, milliseconds in beside.items():
                for where, ms in milliseconds.items():
                    found["products"][where][peer] = {"ms": ms}
        if "convolutions" in args.only:
            found["convolutions"] = dict(convolutions(machine, args, bar))
        if "networks" in args.only:
            found["networks"] = dict(networks(machine, args, bar))
    for section, measured in found.items():
        report[section] = report.get(section, {}) | measured
    report |= {"machine": facts(machine, versions), "missing": missing}
    report["targets"] = targets(report)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    console.width = max(console.width, 150)
    console.print(*tables(report), sep="\n")


def processor():
    """Its name, as far as the system says."""
    named = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return named[0].partition(": ")[2] if named else platform.machine()


def facts(machine, versions):
    """What was measured where."""
    own = {"jax": jax.__version__, "sparsejax": sj.__version__, "backend": sparse_ops.backend()}
    return {
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "last_level_cache": cases.cache_bytes(),
        "gigabytes_a_second": round(machine.bytes / 1e9, 2),
        "multiply_adds_a_second": round(8 * machine.loads),
        **own,
        "scipy": importlib.metadata.version("scipy"),
        **versions,
    }


if __name__ == "__main__":
    main()
