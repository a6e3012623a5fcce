"""Makes `sparsejax/data/mnist_subset.npz` from the whole MNIST.

    python scripts/make_mnist_subset.py --data-dir ../shared/data/mnist

The subset is the first 10,000 training digits and all test digits. The input is checked by
`sparsejax.datasets.mnist` (SHA-256 of every IDX file); the output is written beside its target and
then renamed, and the same zlib gives the same bytes. The sums that are printed at the end belong
into `_SUBSET_SHA256` in `sparsejax/datasets.py`.
"""

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax import datasets

TRAINING_DIGITS = 10_000
TARGET = Path(__file__).resolve().parents[1] / "sparsejax" / "data" / "mnist_subset.npz"


def subset(data_dir: Path) -> dict[str, np.ndarray]:
    """The four arrays, all uint8, images without the axis of channels."""
    whole = datasets.mnist(data_dir)
    return {
        "train_images": whole.train_images[:TRAINING_DIGITS, ..., 0],
        "train_labels": whole.train_labels[:TRAINING_DIGITS].astype(np.uint8),
        "test_images": whole.test_images[..., 0],
        "test_labels": whole.test_labels.astype(np.uint8),
    }


def write(arrays: dict[str, Any], target: Path) -> None:
    """Writes an npz file (NumPy dates its members 1980) beside `target`, then renames it."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="the four IDX files of MNIST")
    parser.add_argument("--target", type=Path, default=TARGET, help="default: %(default)s")
    arguments = parser.parse_args()
    arrays = subset(arguments.data_dir)
    write(arrays, arguments.target)
    print(f"{arguments.target}: {arguments.target.stat().st_size:,} bytes")
    for name, array in arrays.items():
        print(f'    "{name}": "{hashlib.sha256(array.tobytes()).hexdigest()}",')


if __name__ == "__main__":
    main()
