"""`examples/mnist.py` on a few hundred digits, and with its defaults in the long test."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from sparsejax import datasets

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist.py"


def load(monkeypatch, digits):
    """The example as a module, on these digits whatever the machine has."""
    spec = importlib.util.spec_from_file_location("mnist_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.datasets, "mnist", lambda data_dir: digits)
    return module


@pytest.fixture
def example(monkeypatch):
    digits = datasets.mnist_subset()
    few = {"train_images": 640, "train_labels": 640, "test_images": 500, "test_labels": 500}
    few = digits._replace(**{field: getattr(digits, field)[:n] for field, n in few.items()})
    module = load(monkeypatch, few)
    monkeypatch.setattr(module, "SPARSITIES", [0.0, 0.9])
    return module


def run(example, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["mnist.py", *map(str, flags)])
    example.main(example.arguments())


def test_example_writes_table_json_and_figure(example, monkeypatch, tmp_path, capsys):
    run(example, monkeypatch, "--epochs", 1, "--out", tmp_path, "--per-layer")
    printed = capsys.readouterr().out
    for word in ("(a) dense", "(b) gradient", "(c) random", "(d) L1", "(e) L2", "conv2.kernel"):
        assert word in printed
    networks = json.loads((tmp_path / "mnist.json").read_text())["networks"]
    assert networks["(a) dense"]["zeros"] == networks["(e) L2"]["zeros"] == 0
    for label in ("(b) gradient", "(c) magnitude", "(c) Taylor", "(c) random"):
        assert networks[label]["zeros"] == round(0.9 * networks[label]["size"])
    assert (tmp_path / "mnist.png").read_bytes().startswith(b"\x89PNG")


def test_example_takes_a_threshold_and_does_without_matplotlib(
    example, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(example, monkeypatch, "--epochs", 1, "--out", tmp_path, "--threshold", 0)
    networks = json.loads((tmp_path / "mnist.json").read_text())["networks"]
    assert networks["(b) gradient"]["zeros"] == 0
    assert "No figure: matplotlib is missing" in capsys.readouterr().out
    assert (tmp_path / "mnist.json").exists() and not (tmp_path / "mnist.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sparsity 90", r"--sparsity: invalid fraction in \[0, 1\) value: '90'"),
        ("--epochs 0", r"--epochs: invalid whole number \(>= 1\) value: '0'"),
        ("--epochs 1.5", r"--epochs: invalid whole number \(>= 1\) value: '1.5'"),
        ("--l1 -1", r"--l1: invalid strength \(a number >= 0\) value: '-1'"),
        ("--threshold nan", r"--threshold: invalid strength \(a number >= 0\) value: 'nan'"),
        ("--recipe other", r"--recipe: invalid choice: 'other'"),
        ("--seed x", r"--seed: invalid whole number below 2\*\*31 value: 'x'"),
    ],
)
def test_example_refuses_wrong_flags_in_one_line(example, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["mnist.py", *flags.split()])
    with pytest.raises(SystemExit, match=message) as info:
        example.arguments()
    assert "\n" not in str(info.value)


def test_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 200


@pytest.mark.long
def test_example_with_defaults_keeps_its_promises(monkeypatch, tmp_path):
    """Dense >= 96.5 %, magnitude within 0.5 points at 90 %, random visibly worse, L1 exact."""
    run(load(monkeypatch, datasets.mnist_subset()), monkeypatch, "--out", tmp_path)
    networks = json.loads((tmp_path / "mnist.json").read_text())["networks"]
    dense, magnitude = networks["(a) dense"], networks["(c) magnitude"]
    assert dense["accuracy"] >= 0.965
    assert magnitude["accuracy"] >= dense["accuracy"] - 0.005
    assert networks["(c) random"]["accuracy"] <= magnitude["accuracy"] - 0.02
    assert networks["(d) L1"]["zeros"] > 0.5 * networks["(d) L1"]["size"]
    assert networks["(e) L2"]["zeros"] == 0
