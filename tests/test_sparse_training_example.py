"""`examples/sparse_training.py` on a few hundred digits; methods compared in the long test."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from sparsejax import datasets

EXAMPLE = Path(__file__).parent.parent / "examples" / "sparse_training.py"


def load(monkeypatch, digits):
    """The example as a module, on these digits whatever the machine has."""
    spec = importlib.util.spec_from_file_location("sparse_training_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.datasets, "mnist", lambda data_dir: digits)
    return module


@pytest.fixture
def example(monkeypatch):
    digits = datasets.mnist_subset()
    few = {"train_images": 640, "train_labels": 640, "test_images": 500, "test_labels": 500}
    return load(monkeypatch, digits._replace(**{f: getattr(digits, f)[:n] for f, n in few.items()}))


def run(example, monkeypatch, out, *flags):
    monkeypatch.setattr(sys, "argv", ["sparse_training.py", "--out", str(out), *map(str, flags)])
    example.main(example.arguments())
    return json.loads((out / "sparse_training.json").read_text())["runs"]


def test_every_method_ends_at_its_sparsity(example, monkeypatch, tmp_path, capsys):
    runs = run(example, monkeypatch, tmp_path, "--epochs", 2, "--sparsities", 0.98)
    assert [r["method"] for r in runs] == list(example.METHODS)
    kept = 266_200 - round(0.98 * 266_200)
    sparse = [r for r in runs if "dense" not in r["method"]]
    assert all(0.9 * kept < r["nonzeros"] <= kept for r in sparse)  # what grew may still be zero
    assert next(r for r in runs if r["method"] == "dense")["nonzeros"] == 266_200
    assert 0.98 * kept < next(r for r in runs if r["method"] == "small dense")["nonzeros"] <= kept
    printed = capsys.readouterr().out
    assert all(method in printed for method in example.METHODS)
    assert (tmp_path / "sparse_training.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_differ_and_do_without_matplotlib(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flags = ("--methods", "gradual", "--sparsities", 0.5, "--epochs", 1, "--seeds", 2)
    first, second = run(example, monkeypatch, tmp_path, *flags)
    assert first["nonzeros"] == second["nonzeros"] == round(0.5 * 266_200)
    assert first["error"] != second["error"]
    assert "No figure: matplotlib is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sparsities 90", r"--sparsities: invalid fraction in \(0, 1\) value: '90'"),
        ("--epochs 0", r"--epochs: invalid whole number \(>= 1\) value: '0'"),
        ("--seeds x", r"--seeds: invalid whole number \(>= 1\) value: 'x'"),
        ("--methods other", r"--methods: invalid choice: 'other'"),
    ],
)
def test_example_refuses_wrong_flags_in_one_line(example, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["sparse_training.py", *flags.split()])
    with pytest.raises(SystemExit, match=message) as info:
        example.arguments()
    assert "\n" not in str(info.value)


@pytest.mark.long
def test_pruned_networks_beat_small_ones_and_random_masks(monkeypatch, tmp_path):
    example = load(monkeypatch, datasets.mnist_subset())
    methods = ("small dense", "random", "gradual", "straight-through")
    flags = ("--methods", *methods, "--sparsities", 0.95, "--epochs", 12)
    errors = {r["method"]: r["error"] for r in run(example, monkeypatch, tmp_path, *flags)}
    baseline = min(errors["small dense"], errors["random"])
    assert max(errors["gradual"], errors["straight-through"]) < baseline, errors
