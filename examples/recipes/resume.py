"""RigL that survives being killed: with orbax, a resumed run is bit for bit the uninterrupted one.

Start it, kill it at any moment, start it again. Another number of steps is another run.
"""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from sparsejax import datasets, dynamic, masking, models, schedules


def main(steps=2000, every=100, folder="out/resume"):
    data = datasets.mnist_subset()
    x, test = (np.float32(i) / 255 for i in (data.train_images, data.test_images))
    apply, params = models.functional(models.LeNet300100(rngs=nnx.Rngs(0)))
    drop = schedules.cosine(0.3, 0.0, begin_step=0, end_step=3 * steps // 4)
    tx = dynamic.rigl(optax.adam(4e-3), 0.95, drop, key=jax.random.key(1), every=50)

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda params: cross_entropy(apply(params, x), y).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    params = masking.apply_masks(params, dynamic.masks(state))
    trash = Path(folder).absolute() / str(steps) / "trash"
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(2),
        todelete_subdir=trash.name,  # moved away first: nothing half deleted is ever a checkpoint
        cleanup_tmp_directories=True,  # what a killed run had not finished writing
        enable_async_checkpointing=False,  # so that nobody moves into the trash while it is emptied
    )
    with ocp.CheckpointManager(trash.parent, options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            # The run's own start says which containers, shapes and dtypes the checkpoint holds.
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            params, state = manager.restore(done, args=ocp.args.StandardRestore(like))
        print("from step", done, flush=True)
        for i in range(done, steps):
            # A generator that runs along would start anew in a resumed run; this one follows i.
            batch = np.random.default_rng((0, i)).integers(len(x), size=100)
            params, state = step(params, state, x[batch], data.train_labels[batch])
            if (i + 1) % every == 0 or i + 1 == steps:
                manager.save(i + 1, args=ocp.args.StandardSave((params, state)))
                shutil.rmtree(trash, ignore_errors=True)

    dynamic.check(state, params)
    accuracy = np.mean(apply(params, test).argmax(-1) == data.test_labels)
    weights = masking.sparsity(params).prunable
    print(f"accuracy {accuracy:.2%}, {weights.zeros:,} of {weights.size:,} weights are zero")
    return params, state


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
