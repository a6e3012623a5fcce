"""SynFlow against its authors' loop; layers that it does not empty, and that SNIP does."""

import functools
import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import criteria, datasets, filters, masking, models, pruning

pytestmark = pytest.mark.usefixtures("quickly")
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "iterative.npz"
# One set of shapes for nearly all tests, so that little is compiled.
WIDTHS = (8, 16, 16, 8)
X = np.zeros((1, 8), np.float32)


def mlp(params, x):
    for name in sorted(params)[:-1]:
        x = jax.nn.relu(x @ params[name])
    return x @ params[sorted(params)[-1]]


def layers(*widths, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    shapes = itertools.pairwise(widths)
    return {
        f"layer{i}": jax.random.normal(key, shape) / shape[0] ** 0.5
        for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }


def kept(masks):
    return [int(jnp.sum(mask)) for mask in jax.tree.leaves(masks) if mask.ndim]


def test_synflow_prunes_what_the_authors_prune():
    golden = np.load(GOLDEN)
    params = {name: golden[f"synflow/weights/{name}"] for name in "abc"}
    masks = pruning.synflow(mlp, params, X, 63 / 64, rounds=12)
    for name in params:
        np.testing.assert_array_equal(masks[name], golden[f"synflow/masks/{name}"])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77])
def test_synflow_prunes_exactly_as_much(sparsity):
    params = layers(*WIDTHS)
    masks = pruning.synflow(mlp, params, X, sparsity, rounds=5)
    assert sum(kept(masks)) == 512 - round(sparsity * 512)


def test_synflow_of_one_round_is_its_criterion():
    params = layers(*WIDTHS)
    masks = pruning.synflow(mlp, params, X, 0.6, rounds=1)
    expected = masking.topk(criteria.synflow(mlp, params, X), 0.6)
    assert all(np.array_equal(masks[k], expected[k]) for k in params)


def test_synflow_leaves_one_path_at_the_authors_maximal_compression():
    """Layers of very different scales, down to one weight each, all on one path."""
    params = layers(*WIDTHS)
    params["layer1"] *= 0.01
    sparsity = 1 - 3 / 512
    masks = pruning.synflow(mlp, params, X, sparsity, rounds=30)
    assert kept(masks) == [1, 1, 1]
    pruned = jax.tree.map(jnp.abs, masking.apply_masks(params, masks))
    assert float(jnp.sum(mlp(pruned, jnp.ones((1, 8))))) > 0
    assert 0 in kept(masking.topk(criteria.magnitude(params), sparsity))


def test_synflow_leaves_alone_what_is_not_prunable():
    params = {**layers(8, 16, 8), "activation": jax.nn.relu, "bias": jnp.zeros((1, 16))}

    def apply(params, x):
        hidden = params["activation"](x @ params["layer0"] + params["bias"])
        return hidden @ params["layer1"]

    masks = pruning.synflow(
        apply,
        params,
        jax.ShapeDtypeStruct((1, 8), jnp.float32),
        0.7,
        rounds=3,
        prunable=filters.by_path("layer0"),
    )
    shapes = {"activation": (), "bias": (), "layer0": (8, 16), "layer1": ()}
    assert {name: mask.shape for name, mask in masks.items()} == shapes
    assert kept(masks) == [128 - round(0.7 * 128)]


def test_synflow_compiles_the_network_once():
    traces = []

    def apply(params, x):
        traces.append(None)
        return mlp(params, x)

    pruning.synflow(apply, layers(*WIDTHS), X, 0.5, rounds=2)
    few = len(traces)
    pruning.synflow(apply, layers(*WIDTHS), X, 0.5, rounds=5)
    assert len(traces) == 2 * few


def collapse():
    spec = importlib.util.spec_from_file_location(
        "synflow_collapse", ROOT / "benchmarks" / "synflow_collapse.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_snip_empties_a_layer_at_999_per_mille_where_synflow_does_not(monkeypatch):
    """The benchmark's functions, on LeNet-300-100 for images of 16x16 pixels."""
    script = collapse()
    small = datasets.mnist_subset()
    small = small._replace(train_images=small.train_images[:, 6:22, 6:22])
    monkeypatch.setattr(script.datasets, "mnist_subset", lambda: small)
    network = functools.partial(models.LeNet300100, (16, 16, 1))
    monkeypatch.setattr(script, "NETWORKS", {"small": lambda seed: network(rngs=nnx.Rngs(seed))})
    monkeypatch.setattr(script, "sparsities", lambda params: [0.999])
    monkeypatch.setattr(script, "ROUNDS", 20)
    (snip,), (synflow,) = (script.emptiest("small", m, 0) for m in ("SNIP", "SynFlow"))
    assert snip[0] == synflow[0] == pytest.approx(1e-3, rel=0.01)
    assert snip[2] == 0 < synflow[2]


ERRORS = {
    "apply_fn is no function": (
        lambda: pruning.synflow(3, layers(2, 3), jnp.zeros((1, 2)), 0.5),
        TypeError,
        r"`apply_fn` must be a function",
    ),
    "sparsity is a percentage": (
        lambda: pruning.synflow(mlp, layers(2, 3), jnp.zeros((1, 2)), 50),
        ValueError,
        r"`sparsity` must be in \[0, 1\)",
    ),
    "no rounds": (
        lambda: pruning.synflow(mlp, layers(2, 3), jnp.zeros((1, 2)), 0.5, rounds=0),
        ValueError,
        r"`rounds` must be an integer from 1",
    ),
    "nothing flows": (
        lambda: pruning.synflow(mlp, {"layer0": jnp.zeros((2, 3))}, jnp.zeros((1, 2)), 0.5),
        ValueError,
        r"`params` must let something through",
    ),
    "sparsity leaves fewer weights than layers": (
        lambda: pruning.synflow(mlp, layers(*WIDTHS), X, 1 - 2 / 512, rounds=30),
        ValueError,
        r"`sparsity` must leave a path .* through the 2 of 512 entries .* after round 29 of 30",
    ),
    "params hold a key": (
        lambda: pruning.synflow(
            mlp, {**layers(2, 3), "z": jax.random.key(0)}, jnp.zeros((1, 2)), 0.5
        ),
        TypeError,
        r"`params` must hold arrays of numbers, got .* at 'z'",
    ),
    "nothing is prunable": (
        lambda: pruning.synflow(mlp, {"layer0": jnp.zeros(2)}, jnp.zeros((1, 2)), 0.5),
        ValueError,
        r"`prunable`",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "pattern"), ERRORS.values(), ids=ERRORS)
def test_bad_call_says_what_is_wrong(call, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}") as info:
        call()
    assert info.type is error
