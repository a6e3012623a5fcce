"""The `sparsejax` command on files of every kind: what it prints, what it writes."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from sparsejax import allocation, cli, masking, storage

BF16 = ml_dtypes.bfloat16
F8 = ml_dtypes.float8_e4m3fn

pytestmark = pytest.mark.usefixtures("quickly")


def random(*shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return rng.standard_normal(shape).astype(dtype)


def torch_state():
    """Names and layouts (out, in, ...) as a state_dict of torch has them."""
    return {
        "conv1.weight": random(8, 4, 3, 3),
        "conv1.bias": random(8),
        "bn.running_mean": random(8),
        "bn.num_batches_tracked": np.array(7),
        "fc.weight": random(10, 128),
        "half.weight": random(16, 24, dtype=BF16),
        "none.weight": np.zeros((0, 3), np.float32),
    }


def flax_params():
    return {
        "layers": [{"kernel": random(16, 12), "bias": random(12)}],
        "conv": {"kernel": random(3, 3, 4, 8)},
        "pair": (np.arange(3), np.float64(0.5)),
    }


@pytest.fixture
def torch_file(tmp_path):
    path = str(tmp_path / "torch.safetensors")
    save_file(torch_state(), path, metadata={"format": "pt", "step": "12"})
    return path


@pytest.fixture
def npz_file(tmp_path):
    path = str(tmp_path / "model.npz")
    np.savez(path, **{"params/a/kernel": random(8, 8), "params/a/bias": random(8)})
    return path


@pytest.fixture
def run(capsys):
    """Runs the command in this process: its status, standard output and standard error."""

    def call(*words):
        status = cli.main([str(word) for word in words])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def as_json(run):
    def call(*words):
        status, out, _ = run(*words, "--json")
        assert status in (0, 1)
        return json.loads(out)

    return call


def magnitude_masks(arrays, sparsity):
    """What is kept of all arrays together: the largest, of equal ones the first."""
    magnitudes = np.concatenate([np.abs(a.astype(np.float64)).reshape(-1) for a in arrays])
    keep = magnitudes.size - round(sparsity * magnitudes.size)
    mask = np.zeros(magnitudes.size, bool)
    mask[np.lexsort((np.arange(mask.size), -magnitudes))[:keep]] = True
    parts = np.split(mask, np.cumsum([a.size for a in arrays])[:-1])
    return [part.reshape(a.shape) for part, a in zip(parts, arrays, strict=True)]


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return a.tobytes() == b.tobytes()


def weights_of(state):
    return {name: a for name, a in sorted(state.items()) if a.ndim >= 2}


# inspect


def test_inspect_shows_leaves_and_total(run, torch_file):
    status, out, err = run("inspect", torch_file)
    assert status == 0
    assert err == ""
    lines = out.splitlines()
    row = next(line for line in lines if line.startswith("conv1.weight"))
    assert row.split() == ["conv1.weight", "8x4x3x3", "float32", "0.0000", "1,152", "dense"]
    entries = sum(a.size for a in torch_state().values())
    dense = sum(a.nbytes for a in torch_state().values())
    assert lines[-1].startswith(f"safetensors: 7 leaves, {entries:,} parameters, sparsity ")
    assert f"{os.path.getsize(torch_file):,} bytes (dense {dense:,}, ratio " in lines[-1]


def test_inspect_json_has_the_same_facts(as_json, torch_file):
    found = as_json("inspect", torch_file)
    assert found["format"] == "safetensors"
    assert found["metadata"] == {"format": "pt", "step": "12"}
    leaves = {leaf["name"]: leaf for leaf in found["leaves"]}
    for name, array in torch_state().items():
        leaf = leaves[name]
        assert (leaf["shape"], leaf["dtype"]) == (list(array.shape), str(array.dtype))
        assert (leaf["bytes"], leaf["entries"]) == (array.nbytes, array.size)
        assert leaf["zeros"] == np.count_nonzero(array == 0)
    assert found["total"]["bytes"] == os.path.getsize(torch_file)


def structured():
    """Arrays whose zeros have a structure, and how it is called."""
    w = np.where(random(64, 32) == 0, 1, random(64, 32))
    groups = np.argsort(random(16, 4, 32, seed=1), axis=1) < 2
    blocks = np.kron(random(16, 8, seed=2) > 0, np.ones((4, 4), bool))
    conv = np.where(random(3, 3, 8, 64) == 0, 1, random(3, 3, 8, 64))
    dead = np.arange(64) % 7 == 3
    inputs = np.argsort(random(16, 2, 4, 3, 3, seed=4), axis=2).reshape(16, 8, 3, 3) < 2
    torch_conv = np.where(inputs, 1 + random(16, 8, 3, 3) ** 2, 0)
    return {
        "groups": (w * groups.reshape(64, 32), "2:4 along -2"),
        "blocks": (w * blocks, "blocks 4x4"),
        "channels": (conv * ~dead, f"{dead.sum()} of 64 channels zero (axis 3)"),
        "inputs": (torch_conv, "2:4 along 1"),
        "random": (w * (random(64, 32, seed=3) > 0), ""),
        "dense": (w, ""),
        "zero": (w * 0, ""),
        "vector": (np.arange(8.0) % 2, ""),
    }


def test_inspect_finds_structure(run, tmp_path):
    arrays = {name: array.astype(np.float32) for name, (array, _) in structured().items()}
    np.savez(tmp_path / "s.npz", **arrays)
    _, out, _ = run("inspect", tmp_path / "s.npz")
    rows = {line.split()[0]: line for line in out.splitlines()}
    for name, (_, words) in structured().items():
        assert rows[name].partition(" dense")[2].strip() == words


def test_inspect_structure_of_masks_counts_though_a_kept_value_is_zero(as_json, tmp_path):
    mask = np.argsort(random(16, 4, 32), axis=1).reshape(64, 32) < 2
    w = np.where(mask, 1, 0).astype(np.float32)
    w[np.nonzero(mask)[0][:9], np.nonzero(mask)[1][:9]] = 0
    storage.save(tmp_path / "m.safetensors", {"w": w}, {"w": mask})
    (leaf,) = as_json("inspect", tmp_path / "m.safetensors")["leaves"]
    assert leaf["structure"]["nm"] == {"n": 2, "m": 4, "axis": -2}
    assert (leaf["kept"], leaf["zeros"]) == (1024, 1024 + 9)


def test_inspect_says_that_masks_are_there_and_how_much_they_keep(run, tmp_path):
    params = {"b": random(4), "w": random(8, 8) * (np.arange(8) < 2)}
    masks = {"b": np.array(True), "w": (np.arange(8) < 2)[None]}
    storage.save(tmp_path / "m.safetensors", params, masks)
    status, out, _ = run("inspect", tmp_path / "m.safetensors")
    assert status == 0
    assert "packed: 2 leaves, 68 parameters, masks keep 20, sparsity 0.7059" in out
    assert "kept" in out.splitlines()[0]
    assert out.splitlines()[2].split()[4] == "16"


def test_inspect_histogram_counts_all_nonzeros(as_json, run, tmp_path):
    w = random(50, 20) * (random(50, 20, seed=1) > 0)
    w[0, :3] = np.nan, np.inf, 1e-30
    np.savez(tmp_path / "h.npz", w=w, zero=np.zeros(3), n=np.arange(3))
    leaves = {x["name"]: x for x in as_json("inspect", tmp_path / "h.npz", "--histogram")["leaves"]}
    counts, edges = leaves["w"]["histogram"]["counts"], leaves["w"]["histogram"]["edges"]
    magnitudes = np.abs(w[np.isfinite(w) & (w != 0)]).astype(float)
    assert sum(counts) == magnitudes.size
    assert counts == np.histogram(magnitudes, edges)[0].tolist()
    assert leaves["zero"]["histogram"] is None
    assert leaves["n"]["histogram"] is None
    status, out, _ = run("inspect", tmp_path / "h.npz", "--histogram")
    assert status == 0
    assert "█" in out
    assert out.count("\nw ") == 2


def test_inspect_never_rounds_to_zero_or_one(run, tmp_path):
    almost = np.zeros((300, 100), np.float32)
    almost[5, 5] = 1
    np.savez(tmp_path / "r.npz", almost=almost, few=1 - almost, all=almost * 0)
    _, out, _ = run("inspect", tmp_path / "r.npz")
    assert {line.split()[0]: line.split()[3] for line in out.splitlines()[1:4]} == {
        "all": "1.0000",
        "almost": ">0.9999",
        "few": "<0.0001",
    }


def test_inspect_bytes_of_compressed_npz(as_json, tmp_path):
    np.savez_compressed(tmp_path / "c.npz", w=np.zeros((100, 100)))
    (leaf,) = as_json("inspect", tmp_path / "c.npz")["leaves"]
    assert leaf["stored"] == "deflate"
    assert leaf["bytes"] < 300
    assert leaf["dense_bytes"] == 80_000


# prune


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9])
def test_prune_zeroes_the_least_of_all_leaves(run, torch_file, tmp_path, sparsity):
    out = tmp_path / "out.safetensors"
    assert run("prune", torch_file, "-o", out, "--sparsity", sparsity)[:2] == (0, "")
    before, after = torch_state(), load_file(out)
    assert set(before) == set(after)
    weights = weights_of(before)
    masks = magnitude_masks(list(weights.values()), sparsity)
    for (name, array), mask in zip(weights.items(), masks, strict=True):
        assert same_bits(after[name], np.where(mask, array, np.zeros((), array.dtype)))
    assert all(same_bits(after[n], a) for n, a in before.items() if n not in weights)
    with safetensors.safe_open(out, "numpy") as opened:
        assert opened.metadata() == {"format": "pt", "step": "12"}


def test_prune_per_leaf_rounds_each_leaf(run, torch_file, tmp_path):
    out = tmp_path / "out.safetensors"
    run(
        "prune",
        torch_file,
        "-o",
        out,
        "--sparsity",
        "0.3",
        "--scope",
        "per-leaf",
        "--exclude",
        "n*",
    )
    after = load_file(out)
    for name in ("conv1.weight", "fc.weight", "half.weight"):
        array = torch_state()[name]
        (mask,) = magnitude_masks([array], 0.3)
        assert same_bits(after[name], np.where(mask, array, np.zeros((), array.dtype)))


@pytest.mark.parametrize(
    ("name", "layout", "allocate"),
    [
        ("uniform", "torch", allocation.uniform),
        ("erk", "torch", allocation.erdos_renyi_kernel),
        ("er", "flax", allocation.erdos_renyi),
        ("er", "torch", lambda *a: allocation.erdos_renyi(*a, axes=(1, 0))),
    ],
)
def test_prune_allocation(as_json, torch_file, tmp_path, name, layout, allocate):
    out = tmp_path / "out.safetensors"
    words = ["--sparsity", "0.8", "--allocation", name, "--layout", layout]
    words += ["--exclude", "none.*"]
    found = as_json("prune", torch_file, "-o", out, *words)
    weights = {n: a for n, a in weights_of(torch_state()).items() if a.size}
    total = sum(a.size for a in weights.values())
    layers = [allocation.Layer(n, a.shape, a.size) for n, a in weights.items()]
    kept = allocate(layers, total - round(0.8 * total))
    assert [row["pruned"] for row in found["leaves"]] == [
        a.size - k for a, k in zip(weights.values(), kept, strict=True)
    ]
    after = load_file(out)
    assert {n: int((after[n] == 0).sum()) for n in weights} == {
        row["name"]: row["pruned"] for row in found["leaves"]
    }


@pytest.mark.parametrize(("layout", "axis"), [("torch", 1), ("flax", -2)])
def test_prune_nm_keeps_n_of_every_m_inputs(run, tmp_path, layout, axis):
    state = {"conv": random(8, 8, 4, 12), "fc": random(16, 20)}
    np.savez(tmp_path / "in.npz", **state)
    out = tmp_path / "out.npz"
    status, _, err = run("prune", tmp_path / "in.npz", "-o", out, "--nm", "2:4", "--layout", layout)
    assert status == 0
    assert "no multiple" not in err
    after = np.load(out)
    for name, array in state.items():
        lines = np.moveaxis(np.abs(array), axis, -1)
        groups = lines.reshape(*lines.shape[:-1], -1, 4)
        ranks = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1)
        mask = np.moveaxis((ranks < 2).reshape(lines.shape), -1, axis)
        assert same_bits(after[name], np.where(mask, array, np.float32(0)))


def test_prune_nm_says_where_groups_are_short(run, tmp_path):
    np.savez(tmp_path / "in.npz", w=random(6, 5))
    _, _, err = run("prune", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--nm", "2:4")
    assert "w: 6 inputs are no multiple of 4; the last groups are shorter" in err


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_prune_blocks_of_least_mean(as_json, tmp_path, layout):
    fc, conv = random(10, 20), random(6, 8, 3, 3)
    conv = conv if layout == "torch" else np.moveaxis(conv, (0, 1), (-2, -1)).copy()
    np.savez(tmp_path / "in.npz", conv=conv, fc=fc)
    words = ["--sparsity", "0.4", "--block", "2x4", "--layout", layout]
    found = as_json("prune", tmp_path / "in.npz", "-o", tmp_path / "out.npz", *words)
    after = dict(np.load(tmp_path / "out.npz"))
    if layout == "flax":
        conv, after["conv"] = (np.moveaxis(x, (-2, -1), (0, 1)) for x in (conv, after["conv"]))
    means = [
        np.abs(x.astype(float)).reshape(x.shape[0] // 2, 2, x.shape[1] // 4, 4, *x.shape[2:])
        for x in (conv, fc)
    ]
    masks = magnitude_masks([m.mean(axis=(1, 3)) for m in means], 0.4)
    for name, array, mask in zip(("conv", "fc"), (conv, fc), masks, strict=True):
        full = np.repeat(np.repeat(mask, 2, axis=0), 4, axis=1)
        np.testing.assert_array_equal(after[name], np.where(full, array, 0))
    units = sum(mask.size for mask in masks)
    assert found["unit"] == "blocks"
    assert (found["total"]["units"], found["total"]["units_pruned"]) == (units, round(0.4 * units))


@pytest.mark.parametrize(("layout", "axis"), [("torch", 0), ("flax", -1)])
def test_prune_channels_of_least_mean(as_json, run, tmp_path, layout, axis):
    state = {"conv": random(8, 4, 3, 12), "fc": random(10, 20)}
    np.savez(tmp_path / "in.npz", **state)
    words = ["--sparsity", "0.25", "--channel", "--layout", layout]
    found = as_json("prune", tmp_path / "in.npz", "-o", tmp_path / "out.npz", *words)
    lines = [np.moveaxis(x, axis, 0) for x in state.values()]
    means = [np.abs(x.astype(float)).reshape(len(x), -1).mean(axis=1) for x in lines]
    masks = magnitude_masks(means, 0.25)
    after = np.load(tmp_path / "out.npz")
    for name, mask in zip(state, masks, strict=True):
        rows = np.moveaxis(after[name], axis, 0)
        np.testing.assert_array_equal((rows != 0).any(axis=tuple(range(1, rows.ndim))), mask)
    units = sum(mask.size for mask in masks)
    assert (found["total"]["units"], found["total"]["units_pruned"]) == (units, round(0.25 * units))
    _, out, _ = run("inspect", tmp_path / "out.npz")
    assert f"of {len(lines[0])} channels zero (axis {axis % 4})" in out


@pytest.mark.parametrize(
    ("names", "metadata", "layout"),
    [
        (["a.weight"], None, "torch"),
        (["a.kernel"], {"format": "pt"}, "torch"),
        (["a.kernel", "b.weight"], None, "flax"),
        (["params/a/kernel"], None, "flax"),
        (["w"], None, "flax"),
    ],
)
def test_prune_tells_the_layout_that_it_takes(run, tmp_path, names, metadata, layout):
    save_file({name: random(8, 8) for name in names}, tmp_path / "f.safetensors", metadata)
    words = ["prune", tmp_path / "f.safetensors", "-o", tmp_path / "g.safetensors"]
    assert f"taken as --layout {layout}, weights (" in run(*words, "--nm", "1:2")[2]
    # Where it changes nothing, it is nothing to tell.
    assert "--layout" not in run(*words, "--sparsity", "0.5", "--force")[2]


def test_prune_include_and_exclude(run, torch_file, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["--include", "*.weight", "--include", "x*", "--exclude", "fc.*", "--exclude", "n*"]
    status, _, err = run("prune", torch_file, "-o", out, "--sparsity", "0.5", *words)
    assert status == 2
    assert "--include 'x*' matches no leaf; there are 'conv1.weight', 'fc.weight'" in err
    words = ["--include", "*.weight", "--exclude", "fc.*", "--exclude", "n*"]
    assert run("prune", torch_file, "-o", out, "--sparsity", "0.5", *words)[0] == 0
    after = load_file(out)
    assert {n for n, a in after.items() if a.size and (a == 0).mean() > 0.2} == {
        "conv1.weight",
        "half.weight",
    }


def test_prune_prints_its_table_on_standard_error(run, npz_file, tmp_path):
    status, out, err = run("prune", npz_file, "-o", tmp_path / "o.npz", "--sparsity", "0.9")
    assert (status, out) == (0, "")
    assert "params/a/kernel  8x8         64      58    0.9062" in err
    assert err.splitlines()[-1].endswith("o.npz: pruned 58 of 64 entries (0.9062)")


def test_prune_float64_by_all_of_its_digits(run, tmp_path):
    w = 1 + np.arange(24.0).reshape(4, 6)[::-1] * 1e-12
    np.savez(tmp_path / "in.npz", w=w)
    run("prune", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--sparsity", "0.5")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["w"] != 0, w >= np.median(w))


def test_prune_takes_denormals_for_what_they_are(run, tmp_path):
    w = (np.arange(1, 65) * 1e-42).astype(np.float32).reshape(8, 8)
    np.savez(tmp_path / "in.npz", w=w)
    run("prune", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--sparsity", "0.5")
    assert same_bits(
        np.load(tmp_path / "out.npz")["w"], np.where(np.arange(64).reshape(8, 8) < 32, 0, w)
    )


def test_prune_keeps_compression_of_npz(run, tmp_path):
    np.savez_compressed(tmp_path / "in.npz", w=random(8, 8), zeros=np.zeros(5000))
    run("prune", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--sparsity", "0.9")
    assert os.path.getsize(tmp_path / "out.npz") < 3000


def test_prune_of_packed_keeps_masks(run, tmp_path):
    params, mask = {"b": random(8), "w": random(8, 8)}, np.arange(8) % 2 == 0
    params["w"] = params["w"] * mask
    params["w"][0, 0] = 0  # Kept, though zero.
    masks = {"b": np.array(True), "w": np.broadcast_to(mask, (8, 8))}
    storage.save(tmp_path / "in.safetensors", params, masks, metadata={"k": "v"})
    out = tmp_path / "out.safetensors"
    assert run("prune", tmp_path / "in.safetensors", "-o", out, "--sparsity", "0.75")[0] == 0
    found = storage.load(out)
    assert storage.contents(out).packed
    assert found.metadata == {"k": "v"}
    assert int(found.masks["w"].sum()) == 16
    assert not found.masks["w"][:, ~mask].any()
    assert not found.masks["w"][0, 0]
    assert found.masks["b"].shape == ()
    assert masking.sparsity(found.params, found.masks).prunable.zeros == 48
    np.testing.assert_array_equal(found.params["w"], np.where(found.masks["w"], params["w"], 0))


def test_prune_to_less_than_masks_prune_changes_nothing(run, tmp_path):
    mask = np.arange(64).reshape(8, 8) % 2 == 0
    storage.save(tmp_path / "in.safetensors", {"w": random(8, 8) * mask}, {"w": mask})
    out = tmp_path / "out.safetensors"
    _, _, err = run("prune", tmp_path / "in.safetensors", "-o", out, "--sparsity", "0.1")
    np.testing.assert_array_equal(storage.load(out).masks["w"], mask)
    assert "some entries that would be kept stay pruned, as the masks of FILE say" in err


@pytest.mark.parametrize(
    ("source", "out", "kind"),
    [
        ("packed", "o.safetensors", "packed"),
        ("packed", "o.npz", "npz"),
        ("packed", "o", "packed"),
        ("safetensors", "o.bin", "safetensors"),
        ("npz", "o.safetensors", "safetensors"),
        ("npz", "o", "npz"),
    ],
)
def test_prune_kind_of_out(run, as_json, npz_file, tmp_path, source, out, kind):
    path = tmp_path / "in"
    {
        "packed": lambda: storage.save(path, {"w": random(8, 8)}),
        "safetensors": lambda: save_file({"w": random(8, 8)}, path),
        "npz": lambda: path.write_bytes(Path(npz_file).read_bytes()),
    }[source]()
    assert run("prune", path, "-o", tmp_path / out, "--sparsity", "0.5")[0] == 0
    assert as_json("inspect", tmp_path / out)["format"] == kind


def test_prune_format_wins_over_suffix(run, as_json, npz_file, tmp_path):
    words = ["--sparsity", "0.5", "--format", "packed"]
    assert run("prune", npz_file, "-o", tmp_path / "o.safetensors", *words)[0] == 0
    assert as_json("inspect", tmp_path / "o.safetensors")["format"] == "packed"


# pack, unpack


def test_a_torch_file_comes_back_bit_for_bit(run, torch_file, tmp_path):
    names = [tmp_path / f"{n}.safetensors" for n in ("pruned", "packed", "again")]
    assert run("prune", torch_file, "-o", names[0], "--sparsity", "0.9")[0] == 0
    assert run("pack", names[0], "-o", names[1]) == (0, "", "")
    assert run("unpack", names[1], "-o", names[2]) == (0, "", "")
    assert run("diff", names[0], names[2])[0] == 0
    before, after = load_file(names[0]), load_file(names[2])
    assert before.keys() == after.keys()
    assert all(same_bits(before[n], after[n]) for n in before)
    with safetensors.safe_open(names[2], "numpy") as opened:
        assert opened.metadata() == {"format": "pt", "step": "12"}
    # As the safetensors package would have written it.
    assert names[0].read_bytes() == names[2].read_bytes()
    assert names[1].stat().st_size < 0.4 * names[0].stat().st_size


def test_dense_files_are_those_of_the_safetensors_package(run, torch_file, tmp_path):
    out = tmp_path / "again.safetensors"
    run("unpack", torch_file, "-o", out)
    assert load_file(out).keys() == torch_state().keys()
    assert out.stat().st_size == os.path.getsize(torch_file)


def test_float8_of_torch_is_pruned_and_comes_back(run, as_json, tmp_path):
    w = random(8, 8, dtype=F8)
    save_file({"w.weight": w}, tmp_path / "f.safetensors")
    words = ["prune", tmp_path / "f.safetensors", "-o", tmp_path / "p.safetensors"]
    assert run(*words, "--sparsity", "0.75")[0] == 0
    (mask,) = magnitude_masks([w], 0.75)
    ((name, tensor),) = safetensors.deserialize((tmp_path / "p.safetensors").read_bytes())
    assert (name, tensor["dtype"], tensor["shape"]) == ("w.weight", "F8_E4M3", [8, 8])
    assert bytes(tensor["data"]) == np.where(mask, w, np.zeros((), F8)).tobytes()
    run("pack", tmp_path / "p.safetensors", "-o", tmp_path / "q.safetensors")
    run("unpack", tmp_path / "q.safetensors", "-o", tmp_path / "r.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "r.safetensors").read_bytes()


def test_unpack_keeps_special_bits(run, tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0, 1, 0x7F800000], np.uint32)
    w = np.zeros((6, 50), np.float32)
    w[:, 7] = bits.view(np.float32)
    storage.save(tmp_path / "p.safetensors", {"w": w})
    for name in ("d.npz", "d.safetensors"):
        assert run("unpack", tmp_path / "p.safetensors", "-o", tmp_path / name)[0] == 0
    assert same_bits(np.load(tmp_path / "d.npz")["w"], w)
    assert same_bits(load_file(tmp_path / "d.safetensors")["w"], w)


def test_a_tree_is_flat_in_dense_files(run, tmp_path):
    storage.save(tmp_path / "p.safetensors", flax_params())
    names = ["conv.kernel", "layers.0.bias", "layers.0.kernel", "pair.0", "pair.1"]
    run("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "d.npz")
    run("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "d.safetensors")
    assert sorted(np.load(tmp_path / "d.npz").files) == names
    assert sorted(load_file(tmp_path / "d.safetensors")) == names
    assert run("diff", tmp_path / "d.npz", tmp_path / "p.safetensors")[0] == 0


def test_pack_keeps_trees_and_masks(run, tmp_path):
    params = flax_params()
    masks = {
        "layers": [{"kernel": np.ones((16, 12), bool), "bias": np.array(True)}],
        "conv": {"kernel": np.array(True)},
        "pair": (np.array(True), np.array(True)),
    }
    storage.save(tmp_path / "p.safetensors", params, masks, metadata={"k": "v"})
    assert run("pack", tmp_path / "p.safetensors", "-o", tmp_path / "q.safetensors") == (0, "", "")
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_unpack_says_what_is_lost(run, tmp_path):
    w, mask = np.eye(9, dtype=np.float32), np.eye(9, dtype=bool)
    storage.save(tmp_path / "p.safetensors", {"w": w}, {"w": mask}, metadata={"k": "v"})
    _, out, err = run("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "d.safetensors")
    assert out == ""
    assert err.endswith("d.safetensors: without the masks, which safetensors cannot hold\n")
    _, _, err = run("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "d.npz")
    assert err.endswith("d.npz: without the masks and the metadata, which npz cannot hold\n")


def test_npz_names_come_back(run, npz_file, tmp_path):
    run("pack", npz_file, "-o", tmp_path / "p.safetensors")
    run("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "again.npz")
    before, after = np.load(npz_file), np.load(tmp_path / "again.npz")
    assert sorted(before.files) == sorted(after.files)
    assert all(same_bits(before[n], after[n]) for n in before.files)


def test_npz_with_the_name_of_an_argument_and_other_orders(run, tmp_path):
    arrays = {"file": np.asfortranarray(random(3, 4)), "big": random(2, 2).astype(">f4")}
    with (tmp_path / "in.npz").open("wb") as file:
        np.savez(file, **{k: v for k, v in arrays.items() if k != "file"}, **{"a/b.c": random(2)})
    np.savez(tmp_path / "f.npz", f=arrays["file"])
    assert run("pack", tmp_path / "in.npz", "-o", tmp_path / "p.safetensors")[0] == 0
    np.testing.assert_array_equal(
        storage.load(tmp_path / "p.safetensors").params["big"], arrays["big"]
    )
    storage.save(tmp_path / "q.safetensors", {"file": arrays["file"]})
    assert run("unpack", tmp_path / "q.safetensors", "-o", tmp_path / "o.npz")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "o.npz")["file"], arrays["file"])
    assert run("diff", tmp_path / "f.npz", tmp_path / "f.npz")[0] == 0


def test_bfloat16_does_not_go_into_npz(run, torch_file, tmp_path):
    status, _, err = run("unpack", torch_file, "-o", tmp_path / "o.npz")
    assert status == 2
    assert "npz cannot hold bfloat16, the dtype of 'half.weight'; write safetensors" in err
    assert not (tmp_path / "o.npz").exists()


def test_what_safetensors_has_no_dtype_for(run, tmp_path):
    storage.save(tmp_path / "p.safetensors", {"i": np.ones(3, ml_dtypes.int4)})
    status, _, err = run("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "o.safetensors")
    assert status == 2
    assert "safetensors has no int4, the dtype of 'i'; pack the checkpoint" in err


def test_leaves_of_one_name_are_told_apart(run, as_json, tmp_path):
    params = {"a": {"b": random(2, 3)}, "a.b": random(3, 2)}
    storage.save(tmp_path / "p.safetensors", params)
    run("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "o.safetensors")
    assert set(load_file(tmp_path / "o.safetensors")) == {"a.b", "a.b~2"}
    found = as_json("inspect", tmp_path / "p.safetensors")["leaves"]
    assert [(x["name"], x["shape"], x["bytes"]) for x in found] == [
        ("a.b", [2, 3], 24),
        ("a.b~2", [3, 2], 24),
    ]


# diff


def test_diff_of_equal_files(run, torch_file, npz_file):
    assert run("diff", torch_file, torch_file) == (0, "7 leaves, equal bit for bit\n", "")


def test_diff_counts_what_differs(run, as_json, tmp_path):
    a = {
        "same": random(3),
        "w": np.array([[0, 0, 1, 2.0]]),
        "n": np.array([np.nan, 1]),
        "z": np.zeros(2),
    }
    b = a | {
        "w": np.array([[0, -0.5, 1, 0]]),
        "n": np.array([np.nan, np.nan]),
        "z": np.array([0, -0.0]),
    }
    np.savez(tmp_path / "a.npz", **a)
    np.savez(tmp_path / "b.npz", **b)
    found = as_json("diff", tmp_path / "a.npz", tmp_path / "b.npz")
    assert not found["equal"]
    leaves = {x["name"]: x for x in found["leaves"]}
    w = leaves["w"]
    assert (w["entries"], w["differing"], w["largest"], w["overlap"]) == (4, 2, 2.0, 1 / 3)
    assert (leaves["n"]["differing"], leaves["n"]["largest"]) == (1, "nan")
    assert (leaves["z"]["differing"], leaves["z"]["largest"]) == (1, 0.0)
    assert leaves["same"]["equal"]
    assert leaves["same"]["overlap"] is None
    status, out, _ = run("diff", tmp_path / "a.npz", tmp_path / "b.npz")
    assert status == 1
    assert out.splitlines()[-1] == "3 of 4 leaves differ"
    assert next(x for x in out.splitlines() if x[0] == "w").split() == (
        ["w", "float64[1,4]", "the", "same", "2", "of", "4", "2", "0.3333"]
    )


def test_diff_of_integers_is_exact(run, as_json, tmp_path):
    low, high = np.array([2**62, -5], np.int64), np.array([2**62 + 1, -5], np.int64)
    np.savez(tmp_path / "a.npz", i=low, u=np.array([2**64 - 1, 0], np.uint64))
    np.savez(tmp_path / "b.npz", i=high, u=np.array([2**64 - 3, 0], np.uint64))
    found = as_json("diff", tmp_path / "a.npz", tmp_path / "b.npz")
    assert [leaf["largest"] for leaf in found["leaves"]] == [1, 2]


def test_diff_names_leaves_shapes_and_dtypes(run, as_json, tmp_path):
    save_file({"a": random(2), "s": random(2), "d": random(2)}, tmp_path / "a.safetensors")
    save_file(
        {"b": random(2), "s": random(3), "d": random(2, dtype=BF16)}, tmp_path / "b.safetensors"
    )
    status, out, _ = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert status == 1
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:-1]}
    assert rows["a"] == ["float32[2]", "not", "there"]
    assert rows["b"] == ["not", "there", "float32[2]"]
    assert rows["s"] == ["float32[2]", "float32[3]"]
    assert rows["d"][:2] == ["float32[2]", "bfloat16[2]"]
    found = as_json("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")["leaves"]
    rounded = random(2, dtype=BF16).astype(float)
    (d,) = (x for x in found if x["name"] == "d")
    assert d["largest"] == np.abs(rounded - random(2)).max()
    assert d["differing"] is None


def test_diff_compares_masks_where_both_have_them(run, as_json, tmp_path):
    w = np.zeros((4, 4), np.float32)
    for name, kept in (("a", 1), ("b", 3)):
        storage.save(tmp_path / name, {"w": w}, {"w": np.arange(16).reshape(4, 4) < kept})
    storage.save(tmp_path / "c", {"w": w})
    assert run("diff", tmp_path / "a", tmp_path / "a")[0] == 0
    assert run("diff", tmp_path / "a", tmp_path / "b")[0] == 1
    assert as_json("diff", tmp_path / "a", tmp_path / "b")["leaves"][0]["masks"] == 2
    status, _, err = run("diff", tmp_path / "c", tmp_path / "a")
    assert status == 0
    assert err.strip().endswith("a has masks; they are not compared")


def test_diff_of_one_that_is_missing_is_trouble(run, npz_file, tmp_path):
    status, out, err = run("diff", npz_file, tmp_path / "none")
    assert (status, out) == (2, "")
    assert err.startswith("sparsejax diff: error: ")


# orbax


@pytest.fixture(scope="module")
def orbax_folder(tmp_path_factory):
    """A checkpoint, steps of a manager, and one with two items."""
    ocp = pytest.importorskip("orbax.checkpoint")
    folder = tmp_path_factory.mktemp("orbax")
    tree = flax_params() | {"half": jnp.asarray(random(4, 8, dtype=BF16))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "one", tree)
    with ocp.CheckpointManager(folder / "steps") as manager:
        for step in (2, 10):
            manager.save(step, args=ocp.args.StandardSave({"w": random(4, 4, seed=step)}))
    items = {"a": ocp.args.StandardSave(tree), "b": ocp.args.StandardSave(tree)}
    with ocp.CheckpointManager(folder / "items") as manager:
        manager.save(1, args=ocp.args.Composite(**items))
    return folder


def test_orbax_goes_to_packed_and_back(run, orbax_folder, tmp_path):
    steps = [orbax_folder / "one", tmp_path / "p.safetensors", tmp_path / "again"]
    assert run("pack", *steps[:1], "-o", steps[1])[0] == 0
    assert run("unpack", steps[1], "-o", steps[2], "--format", "orbax") == (0, "", "")
    assert run("diff", steps[0], steps[1])[:2] == (0, "6 leaves, equal bit for bit\n")
    assert run("diff", steps[0], steps[2])[0] == 0
    assert isinstance(storage.load(steps[1]).params["layers"], list)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(steps[2], flax_params() | {"half": random(4, 8, dtype=BF16)})
    assert same_bits(found["layers"][0]["kernel"], flax_params()["layers"][0]["kernel"])
    assert os.listdir(tmp_path) == ["p.safetensors", "again"] or sorted(os.listdir(tmp_path)) == [
        "again",
        "p.safetensors",
    ]


def test_orbax_takes_the_last_step(run, as_json, orbax_folder, tmp_path):
    status, _, err = run("inspect", orbax_folder / "steps")
    assert status == 0
    assert err.endswith("steps: step 10, the last of 2\n")
    run("unpack", orbax_folder / "steps", "-o", tmp_path / "w.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "w.npz")["w"], random(4, 4, seed=10))
    run("unpack", orbax_folder / "steps" / "2", "-o", tmp_path / "w.npz", "--force")
    np.testing.assert_array_equal(np.load(tmp_path / "w.npz")["w"], random(4, 4, seed=2))


def test_orbax_asks_which_of_several_items(run, as_json, orbax_folder):
    status, _, err = run("inspect", orbax_folder / "items" / "1")
    assert status == 2
    assert "holds several checkpoints: a, b; name one, such as " in err
    assert as_json("inspect", orbax_folder / "items" / "1" / "a")["total"]["leaves"] == 6


def test_orbax_prune_replaces_only_a_checkpoint_by_force(run, as_json, orbax_folder, tmp_path):
    out = tmp_path / "out"
    for sparsity, force, expected in ((0.5, [], 0), (0.9, [], 2), (0.9, ["--force"], 0)):
        words = ["prune", orbax_folder / "one", "-o", out, "--sparsity", sparsity, *force]
        assert run(*words)[0] == expected
    total = as_json("inspect", out)["leaves"]
    weights = [x for x in total if len(x["shape"]) >= 2]
    n = sum(x["entries"] for x in weights)
    assert sum(x["zeros"] for x in weights) == round(0.9 * n)
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").write_text("kept")
    words = ["prune", orbax_folder / "one", "-o", tmp_path / "other", "--sparsity", "0.5"]
    assert run(*words, "--force")[0] == 2
    assert (tmp_path / "other" / "kept").read_text() == "kept"


def test_orbax_of_sparse_items(run, as_json, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    from sparsejax.storage.orbax import SparseSave

    w, mask = np.eye(8, dtype=np.float32), np.eye(8, dtype=bool)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, args=SparseSave({"w": w}, {"w": mask}))
    found = as_json("inspect", tmp_path / "run")
    assert (found["format"], found["masks"], found["leaves"][0]["kept"]) == ("orbax", True, 8)


def test_orbax_that_is_not_installed(run, monkeypatch, orbax_folder):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    status, _, err = run("inspect", orbax_folder / "one")
    assert status == 2
    assert "pip install 'sparsejax[orbax]'" in err


def test_orbax_cannot_hold_empty_arrays(run, tmp_path):
    np.savez(tmp_path / "e.npz", e=np.zeros((0, 3)))
    status, _, err = run("unpack", tmp_path / "e.npz", "-o", tmp_path / "o", "--format", "orbax")
    assert status == 2
    assert "orbax cannot hold arrays without entries, as 'e' is" in err


# The command line


@pytest.mark.parametrize(
    "words", [[], *([w] for w in ("inspect", "prune", "pack", "unpack", "diff"))]
)
def test_help_has_examples(run, words):
    status, out, err = run(*words, "--help")
    assert (status, err) == (0, "")
    assert "examples:\n  sparsejax " in out


def test_examples_of_the_help_parse():
    from sparsejax.cli import _parser

    examples = "".join(_parser._EXAMPLES.values()).splitlines()
    import shlex

    for example in examples:
        if example.startswith("  sparsejax "):
            words = shlex.split(example.partition(" | ")[0].partition(" > ")[0])[1:]
            assert isinstance(_parser.parse(words), argparse.Namespace)


def test_version(run):
    import sparsejax

    assert run("--version") == (0, f"sparsejax {sparsejax.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "sparsejax: error: the following arguments are required: COMMAND"),
        (["foo"], "sparsejax: error: argument COMMAND: invalid choice: 'foo'"),
        (["inspect"], "sparsejax inspect: error: the following arguments are required: FILE"),
        (["prune", "F", "-o", "O"], "sparsejax prune: error: --sparsity is needed (or --nm)"),
        (
            ["prune", "F", "-o", "O", "--sparsity", "90"],
            "--sparsity: must be in [0, 1) (a fraction, not a percentage), got 90",
        ),
        (["prune", "F", "-o", "O", "--sparsity", "nan"], "must be in [0, 1)"),
        (["prune", "F", "-o", "O", "--sparsity", "1"], "must be in [0, 1)"),
        (["prune", "F", "-o", "O", "--sparsity", "x"], "must be in [0, 1)"),
        (["prune", "F", "-o", "O", "--sparsity=-0.1"], "must be in [0, 1)"),
        (["prune", "F", "-o", "O", "--nm", "4:4"], "must be N:M with 1 <= N < M"),
        (["prune", "F", "-o", "O", "--nm", "2/4"], "must be N:M with 1 <= N < M"),
        (["prune", "F", "-o", "O", "--block", "0x4"], "must be two sizes, such as 1x8"),
        (["prune", "F", "-o", "O", "--block", "8"], "must be two sizes, such as 1x8"),
        (
            ["prune", "F", "-o", "O", "--nm", "2:4", "--sparsity", "0.5"],
            "--sparsity and --nm exclude",
        ),
        (["prune", "F", "-o", "O", "--nm", "2:4", "--scope", "global"], "--scope and --nm exclude"),
        (["prune", "F", "-o", "O", "--nm", "2:4", "--channel"], "not allowed with argument --nm"),
        (
            ["prune", "F", "-o", "O", "--sparsity=0.5", "--scope", "global", "--allocation", "erk"],
            "--allocation and --scope global exclude each other",
        ),
        (["inspect", "F", "--limit", "many"], "must be a number of bytes, such as 64G, got many"),
        (["unpack", "F", "-o", "O"], "'O' does not say which format to write"),
        (["pack", "F", "-o", "O.npz"], "'O.npz' would be no npz file"),
    ],
)
def test_wrong_command_lines(run, words, message):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert err.startswith("sparsejax")
    assert ": error: " in err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("12", 12), ("3k", 3072), ("64G", 64 << 30)])
def test_limit_has_units(text, value):
    from sparsejax.cli import _parser

    assert _parser.parse(["inspect", "F", "--limit", text]).limit == value


def test_help_imports_no_more_than_the_package_itself():
    code = "import sparsejax, sys\nbefore = set(sys.modules)\nfrom sparsejax.cli import main\n"
    code += "main(['--help'])\nprint(*(set(sys.modules) - before), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = ran.stderr.split()
    assert "sparsejax.cli._parser" in new
    assert not [
        name for name in new if name.startswith(("orbax", "tensorstore", "sparsejax.storage"))
    ]
