"""Makes `tests/golden/torch_prune.npz`: the masks of torch.nn.utils.prune for some weights.

    python3.11 -m venv /tmp/torchv && /tmp/torchv/bin/pip install torch==2.13.0 numpy
    /tmp/torchv/bin/python scripts/make_torch_golden.py

The weights are random, and no two have the same absolute value, so that nothing depends on how
torch breaks ties. Keys of the file: `weights/LAYER`, and for every amount `global/AMOUNT/LAYER`
(`global_unstructured` with `L1Unstructured`, all layers together) and `per_leaf/AMOUNT/LAYER`
(`l1_unstructured`, layer by layer). Among the amounts are some where amount * n ends in .5, for a
layer or for all of them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import prune

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "torch_prune.npz"
AMOUNTS = (0.0625, 0.1, 0.125, 0.25, 0.375, 0.5, 0.75, 0.9, 0.97)
# 36 + 1,830 + 10 = 1,876 entries.
SHAPES = {"conv": (4, 1, 3, 3), "dense": (61, 30), "head": (2, 5)}


def weights() -> dict[str, np.ndarray]:
    """Normal float32 weights, of different scales by layer, all different in absolute value."""
    rng = np.random.default_rng(0)
    scales = {"conv": 0.3, "dense": 0.05, "head": 1.0}
    made = {
        name: (scales[name] * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    values = np.abs(np.concatenate([w.ravel() for w in made.values()]))
    if len(np.unique(values)) != len(values):
        raise ValueError("The weights have ties: take another seed.")
    return made


def layers(made: dict[str, np.ndarray]) -> dict[str, torch.nn.Module]:
    """Unpruned modules whose parameter `weight` has these values."""
    modules = {}
    for name, w in made.items():
        modules[name] = torch.nn.Module()
        modules[name].weight = torch.nn.Parameter(torch.from_numpy(w.copy()))
    return modules


def masks(made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """True = kept, by `SCOPE/AMOUNT/LAYER`."""
    found = {}
    for amount in AMOUNTS:
        together = layers(made)
        prune.global_unstructured(
            [(module, "weight") for module in together.values()],
            pruning_method=prune.L1Unstructured,
            amount=amount,
        )
        alone = layers(made)
        for module in alone.values():
            prune.l1_unstructured(module, "weight", amount=amount)
        for scope, modules in (("global", together), ("per_leaf", alone)):
            for name, module in modules.items():
                found[f"{scope}/{amount}/{name}"] = module.weight_mask.numpy().astype(bool)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="default: %(default)s")
    target = parser.parse_args().target
    made = weights()
    target.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"weights/{name}": w for name, w in made.items()} | masks(made)
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size:,} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
