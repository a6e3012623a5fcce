"""Makes `tests/golden/iterative.npz`: masks of torch.nn.utils.prune in rounds, and of SynFlow.

    python3.11 -m venv /tmp/torchv && /tmp/torchv/bin/pip install torch==2.14.1 numpy
    /tmp/torchv/bin/python scripts/make_iterative_golden.py

Rounds: half of what is left goes, four times (torch counts an amount on what its earlier masks
kept), each time by other weights, as if the network had been trained in between. Keys:
`weights/ROUND/LAYER`, and `KIND/ROUND/LAYER` where KIND is `global` (`global_unstructured` with
`L1Unstructured`), `per_leaf` (`l1_unstructured`) or `channels` (`ln_structured`, n = 2, dim = 0).
Sizes are multiples of 16, so that halves are whole numbers.

SynFlow: the scores and the loop of the authors' code (`Pruners/pruners.py` and `prune.py` of
https://github.com/ganguli-lab/Synaptic-Flow), restated: R = sum of the outputs with |weights| on
ones, scores |w · dR/dw|, all at or below the k-th lowest go, k from the exponential schedule; k is
rounded here, where theirs is rounded down. Keys: `synflow/weights/LAYER` of an MLP with ReLUs,
(in, out), and `synflow/masks/LAYER` after 12 rounds that leave 1 in 64.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import prune

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "iterative.npz"
SHAPES = {"conv": (16, 2, 3, 3), "dense": (32, 7)}
ROUNDS = 4
WIDTHS = (8, 16, 16, 8)


def weights():
    """Normal weights for every round, of different scales by layer."""
    rng = np.random.default_rng(0)
    scales = {"conv": 0.3, "dense": 0.5}
    return [
        {name: np.float32(scales[name] * rng.standard_normal(s)) for name, s in SHAPES.items()}
        for _ in range(ROUNDS)
    ]


def prune_once(kind, modules):
    """Prunes half of what is left."""
    if kind == "global":
        pairs = [(module, "weight") for module in modules.values()]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.5)
    for module in modules.values():
        if kind == "per_leaf":
            prune.l1_unstructured(module, "weight", amount=0.5)
        elif kind == "channels":
            prune.ln_structured(module, "weight", amount=0.5, n=2, dim=0)


def rounds(kind, trained):
    """The masks after every round."""
    modules = {name: torch.nn.Module() for name in SHAPES}
    for name, module in modules.items():
        module.weight = torch.nn.Parameter(torch.from_numpy(trained[0][name].copy()))
    found = {}
    for i, values in enumerate(trained):
        if i:
            for name, module in modules.items():
                module.weight_orig.data = torch.from_numpy(values[name].copy())
                module.weight = module.weight_orig * module.weight_mask
        prune_once(kind, modules)
        for name, module in modules.items():
            found[f"{kind}/{i}/{name}"] = module.weight_mask.numpy().astype(bool)
    return found


def synflow(density=1 / 64, epochs=12):
    """Weights of an MLP and the masks of SynFlow."""
    rng = np.random.default_rng(1)
    shapes = list(itertools.pairwise(WIDTHS))
    start = [np.float32(rng.standard_normal(s) / np.sqrt(s[0])) for s in shapes]
    layers = [torch.from_numpy(w.copy()).requires_grad_() for w in start]
    masks = [torch.ones_like(w) for w in layers]
    for epoch in range(epochs):
        with torch.no_grad():
            for w, mask in zip(layers, masks, strict=True):
                w.mul_(mask)
        positive = [w.detach().abs().requires_grad_() for w in layers]
        x = torch.ones(1, WIDTHS[0])
        for i, w in enumerate(positive):
            x = x @ w
            x = torch.relu(x) if i < len(positive) - 1 else x
        torch.sum(x).backward()
        scores = [(w.grad * w).detach().abs() for w in positive]
        together = torch.cat([s.flatten() for s in scores])
        k = round((1 - density ** ((epoch + 1) / epochs)) * together.numel())
        threshold, _ = torch.kthvalue(together, k)
        masks = [(s > threshold).float() for s in scores]
    named = zip("abc", start, masks, strict=True)
    return {
        key: value
        for name, w, mask in named
        for key, value in {
            f"synflow/weights/{name}": w,
            f"synflow/masks/{name}": mask.numpy().astype(bool),
        }.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="default: %(default)s")
    target = parser.parse_args().target
    trained = weights()
    arrays = {f"weights/{i}/{k}": w for i, ws in enumerate(trained) for k, w in ws.items()}
    for kind in ("global", "per_leaf", "channels"):
        arrays |= rounds(kind, trained)
    arrays |= synflow()
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size:,} bytes, torch {torch.__version__}")
    for kind in ("global", "per_leaf", "channels", "synflow/masks"):
        print(kind, {k: int(v.sum()) for k, v in arrays.items() if k.startswith(kind)})


if __name__ == "__main__":
    main()
