"""`examples/choosing.py` on a few hundred digits: choices, tables, figures, one-line errors."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from sparsejax import datasets

EXAMPLE = Path(__file__).parent.parent / "examples" / "choosing.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("choosing_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    digits = datasets.mnist_subset()
    few = {"train_images": 640, "train_labels": 640, "test_images": 500, "test_labels": 500}
    digits = digits._replace(**{f: getattr(digits, f)[:n] for f, n in few.items()})
    monkeypatch.setattr(module.datasets, "mnist", lambda data_dir: digits)
    return module


def run(example, monkeypatch, out, *flags):
    monkeypatch.setattr(sys, "argv", ["choosing.py", "--out", str(out), *map(str, flags)])
    example.main(example.arguments())
    return json.loads((out / "choosing_lenet.json").read_text())


def test_example_chooses_a_strength_and_a_sparsity(example, monkeypatch, tmp_path, capsys):
    flags = ("--folds", 2, "--epochs", 2, 1, "--seeds", 0, "--sparsities", 0.9)
    found = run(example, monkeypatch, tmp_path, *flags)
    best, sparser = (found["strength"][name] for name in ("best", "one standard error"))
    assert best["strength"] <= sparser["strength"] and best["nonzeros"] >= sparser["nonzeros"]
    assert sparser["cv loss"] <= best["cv loss"] + best["standard error"]
    cv = found["cv"]
    chosen = found["sparsity"]["one standard error"]["sparsity"]
    assert chosen == cv["strengths"][cv["one_standard_error"]]
    # The fits have the sparsities that they were asked for.
    assert [round(s, 3) for s in cv["sparsity"][0]] == cv["strengths"]
    ways = [f"{way}, 90.0%" for way in ("sensitivity", "uniform", "ERK", "global")]
    assert set(ways) < set(found["allocations"][0])
    assert "Choice of λ" in capsys.readouterr().out
    for name in ("strength", "lenet"):
        assert (tmp_path / f"choosing_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sparsities 95", r"--sparsities: invalid fraction in \[0, 1\) value: '95'"),
        ("--folds 1", r"--folds: invalid whole number \(>= 2\) value: '1'"),
        ("--model vgg", r"--model: invalid choice: 'vgg'"),
    ],
)
def test_example_refuses_wrong_flags_in_one_line(example, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["choosing.py", *flags.split()])
    with pytest.raises(SystemExit, match=message) as info:
        example.arguments()
    assert "\n" not in str(info.value)
