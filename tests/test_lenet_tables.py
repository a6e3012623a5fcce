"""`benchmarks/lenet_tables.py` on a few digits: what it trains, writes, and does not run again."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import criteria, datasets, masking, models

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {
            name: importlib.import_module(f"lenet_{name}")
            for name in ("training", "report", "tables")
        }


@pytest.fixture(scope="module")
def digits():
    whole = datasets.mnist_subset()
    few = {"train_images": 500, "train_labels": 500, "test_images": 100, "test_labels": 100}
    return whole._replace(**{name: getattr(whole, name)[:n] for name, n in few.items()})


@pytest.fixture(scope="module")
def task(modules, digits):
    return modules["training"].Task(modules["training"].LENETS["LeNet5Caffe"], digits)


def test_fast_lenet5_is_the_model(modules, digits, task):
    """Values and gradients; `task.apply` differs from the model in how it is computed only."""
    apply, _ = models.functional(models.LeNet5Caffe(rngs=nnx.Rngs(0)))
    params, x = task.init(1), task.x[:4]

    def loss(apply, params):
        return jnp.sum(apply(params, x) ** 2)

    values = [jax.jit(f)(params, x) for f in (apply, task.apply)]
    np.testing.assert_allclose(*values, atol=1e-5)
    grads = [
        jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(f, params) for f in (apply, task.apply)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *grads)


def test_compacted_is_the_same_function(task):
    """Units without inputs, with biases of both signs, and units that nothing reads."""
    params = jax.tree.map(
        lambda w: w + 0.3 * (-1.0) ** jnp.arange(w.size) if w.ndim == 1 else w, task.init(0)
    )
    masks = masking.topk(criteria.magnitude(params), 0.99)
    params = jax.tree.map(lambda w, m: jnp.where(m, w, 0), params, masks)
    small = task.compacted(params)
    assert small["dense1"]["kernel"].size < 0.6 * params["dense1"]["kernel"].size
    before, after = (task.outputs(p, task.test) for p in (params, small))
    np.testing.assert_allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("network", ["LeNet300100", "LeNet5Caffe"])
@pytest.mark.parametrize("percent", [8.3, 5, 2, 1.5, 0.4])
def test_small_dense_networks_have_as_many_weights(modules, network, percent):
    """No more than the sparse ones keep, and no less than 95 % of it; made without training."""
    recipe = modules["training"].LENETS[network]
    _, params = models.functional(recipe.model(rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    whole = sum(w.size for w in jax.tree.leaves(params) if w.ndim > 1)
    narrow = modules["training"]._narrowed(params, recipe.small(round(percent / 100 * whole)), 0)
    weights = sum(w.size for w in jax.tree.leaves(narrow) if w.ndim > 1)
    assert 0.95 * percent <= 100 * weights / whole <= percent


@pytest.mark.long
def test_finished_cells_are_not_run_again(modules, digits, tmp_path, monkeypatch):
    tables, training = modules["tables"], modules["training"]
    short = dataclasses.replace(training.LENETS["LeNet300100"], epochs=(2, 1), pruning=((1, 2),))
    monkeypatch.setitem(training.LENETS, "LeNet300100", short)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "SEEDS", {"LeNet300100": 1})
    sizes = {"gradual": (5,), "gradual, labels": (5,), "int8": (5,), "shared": (5,), "SNIP": (5,)}
    monkeypatch.setattr(tables, "SIZES", {"LeNet300100": sizes})
    monkeypatch.setattr(modules["report"], "DOCS", tmp_path / "results.md")
    monkeypatch.setattr(tables.datasets, "mnist", lambda data_dir: digits)
    monkeypatch.setattr("sys.argv", ["lenet_tables.py", "--cache", str(tmp_path / "cache")])
    tables.main(tables.arguments())
    text = (tmp_path / "results/LeNet300100.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["method"] for line in lines] == ["dense", *sizes]
    assert lines[0]["nonzeros"] > 266_000  # of 266,200
    # int8 may round small weights to zero, nothing else has another count.
    kept = {line["method"]: line["nonzeros"] for line in lines[1:]}
    assert kept.pop("int8") <= 13_310 and set(kept.values()) == {13_310}
    files = {line["method"]: line["bytes"] for line in lines if "bytes" in line}
    assert files["shared"] < files["int8"] < 4 * 266_610 / 20

    monkeypatch.setattr(training.Task, "fit", None)  # would be called
    tables.main(tables.arguments())
    assert (tmp_path / "results/LeNet300100.jsonl").read_text() == text
    assert "| Han 2015 | 8.3 % |" in (tmp_path / "results.md").read_text()
