"""How much faster a batched path is: the lasso on diabetes, 100 strengths, the same fit in each.

Usage: `python benchmarks/paths.py [--rounds 30] [--out results.json]`.

Every round runs each contender in turn, beginning with another one each time; a ratio is the median
over rounds of (contender's time / that of `batched` in the same round). The fit is compiled by a
first call, whose time is reported, too. `warm` begins each fit at the last one's result, `cold`
begins each at zero, as a batch must. At the least tolerance some fits never rest (float32 goes in
circles), and hold the whole batch up to its 3000 steps. `bare` is the cold path as
one would write it by hand, a call of the compiled fit a strength: what is over it is what a path
does besides (results to the host, counting zeros).
"""

import argparse
import functools
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track
from sklearn.datasets import load_diabetes
from sklearn.linear_model import lasso_path

import sparsejax as sj
from sparsejax import filters, paths, penalties

L1 = functools.partial(penalties.l1, prunable=filters.floating)
START = jnp.zeros(10)


def loss(w, data):
    """Half the mean squared error, as scikit-learn's lasso has it."""
    return 0.5 * jnp.mean((data[0] @ w - data[1]) ** 2)


def diabetes():
    """442 patients, 10 standardized columns, centred targets."""
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), y - y.mean()
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def contenders(data, tolerance):
    """Each as a function that returns the coefficients of all strengths."""
    grid = paths.log_grid(paths.max_strength(jax.grad(loss)(START, data), L1), 100)
    sgd = optax.sgd(0.24, momentum=0.9, nesterov=True)
    fit = paths.minimizer(loss, lambda s: sj.penalized(sgd, L1(s)), steps=3000, tolerance=tolerance)
    options = {"prunable": filters.floating, "progress": False}
    args = (fit, grid, START, data)

    def bare():
        return np.stack([fit(s, START, data, None) for s in grid.tolist()])

    return grid, {
        "batched": lambda: paths.batched_path(*args, **options).params,
        "warm": lambda: paths.strength_path(*args, **options).params,
        "cold": lambda: paths.strength_path(*args, begin="start", **options).params,
        "bare": bare,
    }


def seconds(call):
    """The time of one call, and its answer."""
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def measure(data, rounds, tolerance):
    """The times of all contenders, and how far from scikit-learn they end."""
    grid, calls = contenders(data, tolerance)
    x, y = (np.asarray(a, np.float64) for a in data)
    oracle = lasso_path(x, y, alphas=grid, tol=1e-12, max_iter=100_000)[1].T
    first = {label: seconds(call) for label, call in calls.items()}
    times = {label: [] for label in calls}
    for i in track(range(rounds), f"tolerance {tolerance}"):
        for label in np.roll(list(calls), i):
            times[label].append(seconds(calls[label])[0])
    rows = {}
    for label in calls:
        ratios = np.array(times[label]) / np.array(times["batched"])
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rows[label] = {
            "path_ms": round(1e3 * float(np.median(times[label])), 2),
            "ratio_to_batched": round(float(median), 2),
            "ratio_quartiles": [round(float(low), 2), round(float(high), 2)],
            "first_call_s": round(first[label][0], 2),
            "largest_error": float(f"{np.abs(first[label][1] - oracle).max():.1e}"),
        }
    return rows


def main():
    """Measures, writes the JSON, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/paths.json")
    args = parser.parse_args()
    data = diabetes()
    results = {str(t): measure(data, args.rounds, t) for t in (1e-5, 1e-6, 1e-7)}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
    }
    versions = {"jax": jax.__version__, "optax": optax.__version__, "sparsejax": sj.__version__}
    report = {"machine": machine | versions, "rounds": args.rounds, "tolerances": results}
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print("\n| tolerance | path | ms | by batched | quartiles | first call, s | largest error |")
    print("|---|---|---|---|---|---|---|")
    for tolerance, rows in results.items():
        for label, row in rows.items():
            low, high = row["ratio_quartiles"]
            print(
                f"| {tolerance} | {label} | {row['path_ms']} | {row['ratio_to_batched']} | "
                f"{low} to {high} | {row['first_call_s']} | {row['largest_error']} |"
            )


if __name__ == "__main__":
    main()
