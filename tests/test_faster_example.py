"""`examples/faster.py` on a few hundred digits: one run, looked at from several sides."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from sparsejax import datasets

EXAMPLE = Path(__file__).parent.parent / "examples" / "faster.py"
WEIGHTS = ["dense1.kernel", "dense2.kernel", "dense3.kernel"]

pytestmark = pytest.mark.usefixtures("quickly")


def load():
    spec = importlib.util.spec_from_file_location("faster_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quickly):
    """A run on a few digits in which all products gain: what it wrote, its networks."""
    digits, out, networks = datasets.mnist_subset(), tmp_path_factory.mktemp("out"), {}
    few = {"train_images": 640, "train_labels": 640, "test_images": 100, "test_labels": 100}
    digits = digits._replace(**{f: getattr(digits, f)[:n] for f, n in few.items()})
    example = load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.datasets, "mnist", lambda data_dir: digits)
        patch.setattr(example, "ROUNDS", 3)
        patch.setattr(example, "SERVED", (1, 16))
        patch.setattr(example, "SPARSITIES", (0.5, 0.9))
        patch.setattr(example, "report", lambda console, runs: networks.update(runs))
        patch.setattr(sys, "argv", ["faster.py", "--epochs", "2", "--out", str(out)])
        example.main(example.arguments(), crossover=lambda product: 2.0)
    return out, json.loads((out / "faster-lenet.json").read_text())["networks"], networks


def test_networks_have_their_zeros(finished):
    for sparsity, run in finished[2].items():
        weights = [x for x in jax.tree.leaves(run["params"]) if x.ndim > 1]
        zeros = sum(np.sum(w == 0) for w in weights)
        assert zeros == round(sparsity * sum(w.size for w in weights))


def test_sparse_networks_are_the_dense_ones(finished):
    _, rows, _ = finished
    assert rows["0.0"]["replaced"] == {} and rows["0.0"]["accuracy"] > 0.5
    for sparsity in ("0.5", "0.9"):
        assert rows[sparsity]["replaced"] == {"1": WEIGHTS, "16": WEIGHTS}
        assert rows[sparsity]["difference"] <= 1e-5


def test_training_the_values_alone_is_training_under_masks(finished):
    row = finished[1]["0.9"]
    assert row["by values"]["trained"] == 26_620 + 410 and row["by values"]["of"] == 266_610
    assert abs(row["by values"]["accuracy"] - row["accuracy"]) <= 0.021  # of 100 images


def test_table_has_a_latency_for_every_batch_size(finished):
    _, rows, _ = finished
    assert set(rows["0.0"]["milliseconds"]) == {"dense"}
    for sparsity in ("0.5", "0.9"):
        for way in ("dense", "sparse"):
            times = rows[sparsity]["milliseconds"][way]
            assert list(times) == ["1", "16"] and min(times.values()) > 0
        assert list(rows[sparsity]["times as fast"]) == ["1", "16"]


def test_figure_is_written(finished):
    pytest.importorskip("matplotlib")
    assert (finished[0] / "faster-lenet.png").read_bytes().startswith(b"\x89PNG")


def test_report_shows_all_networks_in_80_columns(finished, monkeypatch, capsys):
    example = load()
    monkeypatch.setattr(example, "SERVED", (1, 16))
    monkeypatch.setenv("SPARSEJAX_BACKEND", "jax")
    example.report(Console(width=80), finished[2])
    printed = capsys.readouterr().out
    for text in ("batch 16", "50%", "90%", "3/3 sparse", "27,030 kept values", *WEIGHTS):
        assert text in printed
    assert "Nothing is faster: sparsejax has no compiled kernel" in printed


def test_example_does_without_matplotlib(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["faster.py", "--out", str(tmp_path)])
    example = load()
    example.save(example.arguments(), datasets.mnist_subset(), finished[2])
    assert "No figure: matplotlib is missing" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["faster-lenet.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", r"--epochs: invalid whole number \(>= 1\) value: '0'"),
        ("--model resnet", r"--model: invalid choice: 'resnet'"),
    ],
)
def test_example_refuses_wrong_flags_in_one_line(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["faster.py", *flags.split()])
    with pytest.raises(SystemExit, match=message) as info:
        load().arguments()
    assert "\n" not in str(info.value)
