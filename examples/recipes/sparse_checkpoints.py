"""Sparse checkpoints in a bare loop: orbax writes them while it trains, and zeros take no room.

Kill it at any moment and start it again. `sparsejax inspect` lists what is in
`out/sparse_checkpoints/2000/params/process_0.safetensors`.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

import sparsejax as sj
from sparsejax import criteria, datasets, dynamic, masking, models
from sparsejax.storage.orbax import SparseRestore, SparseSave


def main(steps=2000, epoch=100, folder="out/sparse_checkpoints"):
    data = datasets.mnist_subset()
    x, test = (np.float32(i) / 255 for i in (data.train_images, data.test_images))
    apply, params = models.functional(models.LeNet300100(rngs=nnx.Rngs(0)))
    gradients = jax.jit(jax.grad(lambda params, x, y: cross_entropy(apply(params, x), y).mean()))

    # Pruned once, before training, by how the loss would change to first order (SNIP).
    scores = criteria.taylor(params, gradients(params, x[:1000], data.train_labels[:1000]))
    masks = masking.topk(scores, 0.95)
    params, tx = sj.apply_masks(params, masks), sj.keep_masks(optax.adam(2e-3), masks)
    state = tx.init(params)

    # It may donate what is being saved: `save` has copied it to the host when it returns.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        updates, state = tx.update(gradients(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(Path(folder).absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            like = ocp.args.Composite(params=SparseRestore(params), state=SparseRestore(state))
            saved = manager.restore(done, args=like)
            params, state = saved.params.params, saved.state.params
        print("from step", done, flush=True)
        for i in range(done, steps):
            batch = np.random.default_rng((0, i)).integers(len(x), size=100)
            params, state = step(params, state, x[batch], data.train_labels[batch])
            if (i + 1) % epoch == 0 or i + 1 == steps:
                masked = SparseSave(params, dynamic.masks(state))
                manager.save(i + 1, args=ocp.args.Composite(params=masked, state=SparseSave(state)))

    dynamic.check(state, params)  # (leaving `with` has waited for the last checkpoint)
    accuracy = np.mean(apply(params, test).argmax(-1) == data.test_labels)
    weights = masking.sparsity(params).prunable
    print(f"accuracy {accuracy:.2%}, {weights.zeros:,} of {weights.size:,} weights are zero")
    return params, state


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
