"""The tree of the golden files of `storage`; run as a script, writes one (3.13 and 3.12 did).

PYTHONPATH=. python tests/storage_trees.py tests/golden/storage.safetensors open
PYTHONPATH=. python tests/storage_trees.py tests/golden/storage_packed.safetensors packed
"""

import sys

import ml_dtypes
import numpy as np

METADATA = {"made by": "tests/storage_trees.py"}


def entries(shape, dtype, every):
    """Integers that need no generator, one in `every` of them kept."""
    numbers = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**31)
    kept = numbers % np.uint64(every) == 0
    values = (numbers % np.uint64(255)).astype(np.int64) - 127
    return np.where(kept, values, 0).reshape(shape).astype(dtype), kept.reshape(shape)


def golden():
    """Params and masks with every code, dtype width and kind of node."""
    kernel, kept = entries((3, 3, 8, 16), "float32", 3)
    dense, dense_kept = entries((300, 100), ml_dtypes.bfloat16, 40)
    wide, wide_kept = entries((900, 900), "int8", 2000)
    channels = np.arange(16).reshape(1, 1, 1, 16) % 3 == 0
    params = {
        "layers": [{"kernel": kernel, "bias": np.arange(16, dtype="float32")}, None],
        "dense": (dense, {"wide": wide, "empty": np.zeros((0, 4), "float64")}),
        "channels": np.where(channels, kernel, 0).astype("float64"),
        "step": np.int64(7),
    }
    masks = {
        "layers": [{"kernel": kept, "bias": np.array(True)}, None],
        "dense": (dense_kept, {"wide": wide_kept, "empty": np.array(True)}),
        "channels": channels,
        "step": np.array(True),
    }
    return params, masks


if __name__ == "__main__":
    from sparsejax import storage

    storage.save(sys.argv[1], *golden(), metadata=METADATA, header=sys.argv[2])
