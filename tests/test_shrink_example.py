"""`examples/shrink.py` on a few hundred digits: one run, looked at from several sides."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from sparsejax import datasets, models, shrinking

EXAMPLE = Path(__file__).parent.parent / "examples" / "shrink.py"
CUT = ("half", "quarter", "quarter-later", "group-lasso-cut")

pytestmark = pytest.mark.usefixtures("quickly")


def load():
    spec = importlib.util.spec_from_file_location("shrink_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quickly):
    """A run on a few digits, whatever the machine has: its folder, what it wrote, its networks."""
    digits, out, networks = datasets.mnist_subset(), tmp_path_factory.mktemp("out"), {}
    few = {"train_images": 256, "train_labels": 256, "test_images": 100, "test_labels": 100}
    digits = digits._replace(**{f: getattr(digits, f)[:n] for f, n in few.items()})
    example = load()
    # So few steps need a strong penalty.
    flags = ("--scratch", "--epochs", "2", "--strength", "3", "--out", str(out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.datasets, "mnist", lambda data_dir: digits)
        patch.setattr(example, "ROUNDS", 3)
        patch.setattr(example, "SERVED", (1, 16))
        patch.setattr(example, "report", lambda console, runs: networks.update(runs))
        patch.setattr(sys, "argv", ["shrink.py", *flags])
        example.main(example.arguments())
    return out, json.loads((out / "shrink.json").read_text())["networks"], networks


def test_table_tells_the_size_of_every_network(finished):
    _, rows, networks = finished
    anew = [f"{label}-anew" for label in CUT[:-1]]
    assert set(rows) == {"dense", *CUT, *anew, "group-lasso"}
    for label, row in rows.items():
        leaves = jax.tree.leaves(networks[label]["params"])
        assert row["parameters"] == sum(x.size for x in leaves) == networks[label]["plan"].params[1]
        assert list(row["milliseconds"]) == list(row["times as fast"]) == ["1", "16"]
    assert rows["dense"]["widths"] == rows["group-lasso"]["widths"] == [32, 64, 100]
    assert rows["half"]["widths"] == [16, 32, 56] and rows["quarter"]["widths"] == [8, 16, 32]
    assert rows["quarter-later"]["widths"] == rows["quarter-later-anew"]["widths"] == [32, 16, 32]
    assert rows["dense"]["flops"] > rows["half"]["flops"] > rows["quarter"]["flops"]


def test_state_is_carried_on(finished):
    for label in CUT[:-1]:  # 2 epochs of 4 steps, and a momentum like the params
        row = finished[1][label]
        assert row["carried"] == {"count": 8, "momentum": row["parameters"]}


def test_group_lasso_is_cut_without_a_change(finished):
    rows = finished[1]
    lasso = rows["group-lasso-cut"]
    # Where a group goes nearly as a whole, 8 of it stay.
    assert all(width % 8 == 0 or width == 100 for width in lasso["widths"])
    assert lasso["parameters"] < 0.5 * rows["dense"]["parameters"]
    assert lasso["change"] <= 1e-5 and lasso["as cut"] == rows["group-lasso"]["as cut"]


def test_written_plans_are_those_that_were_cut(finished):
    out, _, networks = finished
    for label in CUT:
        text = (out / f"shrink-{label}.plan.json").read_text()
        assert shrinking.Plan.from_json(text) == networks[label]["plan"]
    assert (out / "shrink.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("label", CUT)
def test_written_network_is_that_of_the_table(finished, label):
    pytest.importorskip("flatbuffers", reason="jax.export writes with it")
    import jax.export

    out, rows, networks = finished
    apply, _ = models.functional(models.CNN(rngs=nnx.Rngs(0)))
    read = jax.export.deserialize((out / f"shrink-{label}.stablehlo").read_bytes())
    images = np.random.default_rng(0).random((7, 28, 28, 1), np.float32)
    outputs = jax.jit(apply)(networks[label]["params"], images)
    np.testing.assert_allclose(read.call(images), outputs, rtol=0, atol=1e-5)
    assert rows[label]["reloaded"] <= 1e-5


def test_report_shows_all_networks_in_80_columns(finished, capsys):
    networks = finished[2]
    load().report(Console(width=80), networks)
    printed = capsys.readouterr().out
    assert all(label in printed for label in (*networks, "32-64-100", "179,926", "1.00x"))
    assert "half: the state kept" in printed and "group-lasso-cut: cutting changed" in printed


def test_example_does_without_flatbuffers_and_matplotlib(finished, monkeypatch, tmp_path, capsys):
    for name in [n for n in sys.modules if n.endswith("export.serialization")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("flatbuffers", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    example, networks = load(), finished[2]
    apply, _ = models.functional(models.CNN(rngs=nnx.Rngs(0)))
    images = np.zeros((1, 28, 28, 1), np.float32)
    half = networks["half"]
    half = half | {"reloaded": example.deploy(tmp_path, "half", apply, half, images)}
    example.report(Console(width=80), networks | {"half": half})
    monkeypatch.setattr(sys, "argv", ["shrink.py", "--out", str(tmp_path)])
    example.save(example.arguments(), datasets.mnist_subset(), networks)
    printed = capsys.readouterr().out
    assert "No StableHLO: flatbuffers is missing" in printed
    assert "No figure: matplotlib is missing" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"shrink.json", "shrink-half.plan.json"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", r"--epochs: invalid whole number \(>= 1\) value: '0'"),
        ("--strength -1", r"--strength: invalid strength \(a number >= 0\) value: '-1'"),
    ],
)
def test_example_refuses_wrong_flags_in_one_line(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["shrink.py", *flags.split()])
    with pytest.raises(SystemExit, match=message) as info:
        load().arguments()
    assert "\n" not in str(info.value)
