"""How much to prune? From data to a chosen λ, and from data to a chosen sparsity.

First a logistic regression on real measurements (breast cancer, scikit-learn's): the path of λ from
λ_max down, cross-validation, the λ of one standard error. Then a network on handwritten digits,
pruned step by step: the sparsity of one standard error by cross-validation, how sensitive each
layer is, and whether sharing the zeros out by that beats uniform, ERK and global pruning.
"""

import argparse
import json
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import number
from flax import nnx
from rich.console import Console
from rich.table import Column, Table

import sparsejax as sj
from sparsejax import (
    allocation,
    criteria,
    datasets,
    filters,
    masking,
    models,
    paths,
    penalties,
    plots,
    sensitivity,
)

BATCH, DECAY, RATE = 128, 2e-4, {"lenet": 0.3, "cnn": 0.05}
EPOCHS = {"lenet": (20, 10), "cnn": (3, 1)}  # of a dense network; after each pruning
SPARSITIES = (0.0, 0.8, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
LEVELS = (*(1 - np.geomspace(1, 0.005, 15)[1:]), 1.0)
NETWORKS = {"lenet": models.LeNet300100, "cnn": models.CNN}


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {}
    digits = None if args.linear_only else getattr(datasets, args.dataset)(args.data_dir)
    summary = {"strength": choose_strength(args, figures)}
    if digits is not None:
        summary |= choose_sparsity(digits, args, figures)
    text = json.dumps(summary | {"arguments": vars(args)}, indent=2, default=plain)
    (args.out / f"choosing_{args.model}.json").write_text(text + "\n")
    try:
        draw(args, figures)
    except ImportError:
        print("No figures: matplotlib is missing; pip install 'sparsejax[examples]' brings it.")
    print("Written to", args.out)


def choose_strength(args, figures):
    """L1 logistic regression: all of the path, and λ by cross-validation."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    train, test, y_train, y_test = train_test_split(
        *load_breast_cancer(return_X_y=True), test_size=0.3, random_state=args.seed
    )
    mean, std = train.mean(0), train.std(0)  # of no label: all folds may share it
    data = {"x": np.float32((train - mean) / std), "y": np.float32(y_train)}
    unseen = {"x": np.float32((test - mean) / std), "y": np.float32(y_test)}

    def loss(params, data):
        logits = data["x"] @ params["w"] + params["b"]
        return optax.sigmoid_binary_cross_entropy(logits, data["y"]).mean()

    l1 = partial(penalties.l1, prunable=filters.by_path("w"))
    sgd = optax.sgd(0.3, momentum=0.95, nesterov=True)
    fit = paths.minimizer(loss, lambda s: sj.penalized(sgd, l1(s)), steps=20_000)
    odds = np.log(y_train.mean() / (1 - y_train.mean()))
    start = {"b": jnp.float32(odds), "w": jnp.zeros(train.shape[1])}
    largest = paths.max_strength(jax.grad(loss)(start, data), l1)
    common = {"prunable": filters.by_path("w")}
    grid = paths.log_grid(largest, 30, ratio=0.003)
    path = paths.strength_path(fit, grid, start, data, progress="path", **common)
    key = jax.random.key(args.seed)
    cv = paths.cross_validate(
        fit, jax.jit(loss), grid, start, data, folds=args.folds, key=key, progress="λ", **common
    )
    figures["strength"] = path, cv
    rows = {}
    for name, i in (("best", cv.best), ("one standard error", cv.one_standard_error)):
        params = jax.tree.map(lambda x, i=i: x[i], path.params)
        right = (unseen["x"] @ params["w"] + params["b"] > 0) == (unseen["y"] > 0)
        rows[name] = {
            "strength": grid[i],
            "cv loss": cv.mean[i],
            "standard error": cv.standard_error[i],
            "nonzeros": np.count_nonzero(params["w"]),
            "test loss": float(loss(params, unseen)),
            "test accuracy": right.mean(),
        }
    print(f"λ_max is {largest:.4g}; of 30 coefficients:")
    Console().print(table("Choice of λ", rows))
    return rows


def choose_sparsity(digits, args, figures):
    """A network on digits: sparsity by cross-validation, then layer by layer by sensitivity."""
    data = {"x": digits.train_images, "y": digits.train_labels}
    unseen = {"x": digits.test_images, "y": digits.test_labels}
    network = NETWORKS[args.model]
    apply, _ = models.functional(network(data["x"].shape[1:], rngs=nnx.Rngs(0)))
    train, error = trainer(apply, args), tester(apply)

    def start(seed):
        fresh = network(data["x"].shape[1:], rngs=nnx.Rngs(seed))
        return jax.tree.map(jnp.asarray, models.functional(fresh)[1])

    def fit(sparsity, params, data, key):
        """Sparsity 0 trains from the start; each further one prunes the last, and trains on."""
        masks = masking.topk(criteria.magnitude(params), sparsity)
        return train(params, masks, data, key, "pruned" if sparsity else "dense")

    key = jax.random.key(args.seed)
    # Finished fits are of these settings, which are no arguments of cross_validate.
    settings = [args.model, args.dataset, *(args.epochs or EPOCHS[args.model])]
    settings.append(args.rate or RATE[args.model])
    folder = None if args.folder is None else args.folder / "-".join(map(str, settings))
    cv = paths.cross_validate(
        fit,
        error,
        SPARSITIES,
        start(args.seed),
        data,
        folds=args.folds,
        key=key,
        folder=folder,
        progress=args.model,
    )
    chosen = cv.one_standard_error_strength
    finals = sorted({0.9, *(s for s in SPARSITIES if s <= chosen)})
    path = paths.strength_path(fit, finals, start(args.seed), data, key=key, progress="all data")
    rows = {}
    for name, sparsity in (("dense", 0.0), ("fixed", 0.9), ("one standard error", chosen)):
        i = finals.index(sparsity)
        params = jax.tree.map(lambda x, i=i: x[i], path.params)
        wrong = error(params, unseen)
        rows[name] = {
            "sparsity": sparsity,
            "cv error": cv.mean[SPARSITIES.index(sparsity)],
            "standard error": cv.standard_error[SPARSITIES.index(sparsity)],
            "test error": wrong,
            "of the test": np.sqrt(wrong * (1 - wrong) / len(unseen["y"])),
        }
    Console().print(table(f"Choice of the sparsity, {args.model}", rows))
    figures["sparsity"] = cv
    runs = [allocations(args, start, train, error, data, unseen, s, figures) for s in args.seeds]
    Console().print(table(f"Test error at equal sparsity, {args.model}", averaged(runs)))
    return {"sparsity": rows, "cv": cv._asdict(), "allocations": runs}


def allocations(args, start, train, error, data, unseen, seed, figures):
    """Test errors of ways to share zeros out, pruned only and after training, at each sparsity."""
    keys = jax.random.split(jax.random.key(seed), 2)
    order = np.random.default_rng(seed).permutation(len(data["y"]))
    held = len(order) // 6
    validation, rest = (
        {name: x[part] for name, x in data.items()} for part in (order[:held], order[held:])
    )
    fresh = start(seed)
    everything = masking.topk(criteria.magnitude(fresh), 0.0)
    dense = train(fresh, everything, rest, keys[0], "dense")
    validation_loss = partial(mean_loss, error.apply, validation)
    curves = sensitivity.curves(validation_loss, dense, LEVELS)
    figures.setdefault("sensitivity", curves)
    scores = criteria.magnitude(dense)
    ways = {
        "sensitivity": {"allocation": sensitivity.allocation(curves)},
        "uniform": {"scope": "per_leaf"},
        "ERK": {"allocation": allocation.erdos_renyi_kernel},
        "global": {},
    }
    rows = {"dense": dict.fromkeys(("pruned only", "trained"), error(dense, unseen))}
    for sparsity in args.sparsities:
        for way, options in ways.items():
            masks = masking.topk(scores, sparsity, **options)
            pruned = sj.apply_masks(dense, masks)
            trained = train(dense, masks, rest, keys[1], "pruned")
            rows[f"{way}, {sparsity:.1%}"] = {
                "pruned only": error(pruned, unseen),
                "trained": error(trained, unseen),
            }
    bound = 0.1 * curves.dense_loss
    choice = sensitivity.choose_sparsity(validation_loss, dense, max_loss_increase=bound)
    rows[f"choose_sparsity: {choice.sparsity:.1%}, no training"] = {
        "pruned only": error(choice.params, unseen)
    }
    return rows


def trainer(apply, args):
    """`train(params, masks, data, key, phase)`: SGD with momentum, cosine decay, a little L2."""
    epochs = dict(zip(("dense", "pruned"), args.epochs or EPOCHS[args.model], strict=True))

    @cache
    def transform(steps):
        rate = optax.cosine_decay_schedule(args.rate or RATE[args.model], steps)
        return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, momentum=0.9))

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def step(tx, params, state, x, y):
        def loss_of(params):
            logits = apply(params, x / np.float32(255))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        # The masks in the state count, so that one program serves all of them.
        keep = sj.keep_masks(tx, state.masks)
        updates, state = keep.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    def train(params, masks, data, key, phase):
        batches = len(data["y"]) // BATCH
        tx = transform(epochs[phase] * batches)
        params = jax.tree.map(jnp.array, sj.apply_masks(params, masks))  # the step gives it away
        state = sj.keep_masks(tx, masks).init(params)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        for _ in range(epochs[phase]):
            order = rng.permutation(len(data["y"]))[: batches * BATCH].reshape(batches, BATCH)
            for batch in order:
                params, state = step(tx, params, state, data["x"][batch], data["y"][batch])
        return params

    return train


def tester(apply):
    """`error(params, data)`: the fraction of images whose digit is wrong."""
    apply = jax.jit(apply)

    def error(params, data):
        chunks = np.array_split(np.arange(len(data["y"])), max(len(data["y"]) // 1000, 1))
        wrong = [
            np.sum(apply(params, data["x"][c] / np.float32(255)).argmax(-1) != data["y"][c])
            for c in chunks
        ]
        return float(np.sum(wrong) / len(data["y"]))

    error.apply = apply
    return error


def mean_loss(apply, data, params):
    """The mean cross-entropy, smoother than the error."""
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(
            apply(params, data["x"][i : i + 1000] / np.float32(255)), data["y"][i : i + 1000]
        )
        for i in range(0, len(data["y"]), 1000)
    ]
    return float(np.mean(np.concatenate(losses)))


def averaged(runs):
    """Means over seeds, row by row, ± their standard deviation."""
    rows = {}
    for name in (n for n in runs[0] if not n.startswith("choose")):
        rows[name] = {}
        for column in runs[0][name]:
            found = [run[name][column] for run in runs]
            rows[name][column] = np.mean(found)
            rows[name][f"± {column}"] = np.std(found, ddof=1) if len(found) > 1 else 0.0
    return rows


def table(title, rows):
    columns = list(next(iter(rows.values())))
    right = (Column(c, justify="right", overflow="fold") for c in columns)
    out = Table(Column("", no_wrap=True), *right, title=title)
    for name, row in rows.items():
        cells = [row.get(c, "") for c in columns]
        out.add_row(
            name, *(f"{x:.4g}" if isinstance(x, float | np.floating) else str(x) for x in cells)
        )
    return out


def plain(value):
    """What JSON does not know: arrays as lists, paths as text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def draw(args, figures):
    from matplotlib.figure import Figure

    def panels(name, *drawings):
        axes = (figure := Figure((6.2 * len(drawings), 4.6), layout="constrained")).subplots(
            1, len(drawings)
        )
        for ax, drawing in zip(np.ravel(axes), drawings, strict=True):
            drawing(axes=ax)
        figure.savefig(args.out / f"choosing_{name}.png", dpi=110)

    path, cv = figures["strength"]
    weights = filters.by_path("w")
    panels(
        "strength",
        partial(plots.strength_path, path, prunable=weights),
        partial(plots.cross_validation, cv),
    )
    if "sparsity" in figures:
        panels(
            args.model,
            partial(plots.cross_validation, figures["sparsity"]),
            partial(plots.sensitivity, figures["sensitivity"]),
        )


def arguments():
    positive = number(int, 1, 1e9, "whole number (>= 1)")
    seed = number(int, 0, 2**31, "whole number below 2**31")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(f"choosing.py: {message} (--help lists the flags)")
    add = parser.add_argument
    add("--model", choices=NETWORKS, default="lenet")
    add("--dataset", choices=("mnist", "fashion_mnist"), default="mnist")
    add("--data-dir", type=Path, help="folder with the four IDX files (or SPARSEJAX_DATA_DIR)")
    add("--linear-only", action="store_true", help="only λ, in seconds")
    add("--folds", type=number(int, 2, 1e9, "whole number (>= 2)"), default=5)
    add("--epochs", type=positive, nargs=2, metavar=("DENSE", "PRUNED"))
    rate = number(float, 1e-9, 1e9, "learning rate (> 0)")
    add("--rate", type=rate, help="of SGD; by default 0.3 for lenet, 0.05 for cnn")
    fraction = number(float, 0, 1, "fraction in [0, 1)")
    add("--sparsities", type=fraction, nargs="+", default=[0.95, 0.98], help="for allocations")
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], help="for allocations")
    add("--seed", type=seed, default=0, help="for cross-validation")
    add("--folder", type=Path, help="finished fits are kept here: a killed run goes on")
    add("--out", type=Path, default=Path("out"), help="folder for the JSON and the figures")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"choosing.py: {error}")
