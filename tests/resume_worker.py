"""Runs `examples/recipes/resume.py`, tiny: `resume_worker.py CACHE FOLDER STEPS EVERY KEEP`.

A 16-32-10 network on thumbnails of the digits, so that most of the time goes into checkpoints.
"""

import runpy
import sys
from pathlib import Path
from unittest import mock

import jax
import orbax.checkpoint as ocp
from flax import nnx

from sparsejax import datasets, models

RECIPE = Path(__file__).parent.parent / "examples" / "recipes" / "resume.py"


class Tiny(nnx.Module):
    def __init__(self, *, rngs):
        self.dense1, self.dense2 = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.dense2(nnx.relu(self.dense1(x.reshape(len(x), 16))))


def thumbnails():
    digits = original()
    few = {"train_images": 1000, "train_labels": 1000, "test_images": 100, "test_labels": 100}
    few = {field: getattr(digits, field)[:n] for field, n in few.items()}
    return digits._replace(
        **{field: x[:, 4:-4:5, 4:-4:5] if x.ndim == 4 else x for field, x in few.items()}
    )


if __name__ == "__main__":
    cache, folder, steps, every, keep = sys.argv[1:]
    # A restart is the same program, so it need not be compiled anew.
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    original, latest = datasets.mnist_subset, ocp.checkpoint_managers.LatestN
    with (
        mock.patch.object(datasets, "mnist_subset", thumbnails),
        mock.patch.object(models, "LeNet300100", Tiny),
        # The run to compare with keeps all its checkpoints.
        mock.patch.object(ocp.checkpoint_managers, "LatestN", lambda n: latest(int(keep) or n)),
    ):
        runpy.run_path(str(RECIPE))["main"](int(steps), int(every), folder)
