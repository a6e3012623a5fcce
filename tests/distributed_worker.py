"""One of two processes that share eight devices: `distributed_worker.py PORT NUMBER`.

It prints, as JSON, whether the shards that it holds are those of a stable sort, and whether sparse
training over both processes is that of one.
"""

import functools
import hashlib
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax import dynamic, masking, schedules, selection

SPARSITY = 0.7
# Few entries by columns, enough for a sample by rows.
CASES = {
    "columns": (PartitionSpec(None, "a"), ((16, 40), (8, 24))),
    "rows": (PartitionSpec("a"), ((512, 512), (8, 24))),
}
GATHER = re.compile(r"= (\(.*?\)|\S+) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")


def trees(mesh, shapes, spec):
    """Scores of which many tie, in NumPy and over all devices of both processes."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).round(1).astype(np.float32) for shape in shapes]
    sharding = NamedSharding(mesh, spec)
    placed = [jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in arrays]
    return arrays, placed


def expected_masks(arrays, scope):
    competing = [arrays] if scope == "global" else [[a] for a in arrays]
    masks = []
    for some in competing:
        n = sum(a.size for a in some)
        removed = round(float(np.float32(SPARSITY)) * n)
        masks += oracles.keep_largest(some, n - removed)
    return masks


def own_shards_equal(masks, expected):
    return all(
        np.array_equal(shard.data, whole[shard.index])
        for mask, whole in zip(masks, expected, strict=True)
        for shard in mask.addressable_shards
    )


def largest_gathered(program):
    """The most entries of which a compiled program makes every device hold all."""
    shapes = re.findall(r"\[([\d,]*)\]", " ".join(GATHER.findall(program.as_text())))
    return max((math.prod(int(n) for n in s.split(",") if n) for s in shapes), default=0)


STEPS, BATCH = 5, 8
# Batches over processes, params over the devices of each.
SPECS = {(16, 40): PartitionSpec(None, "model"), (8, 24): PartitionSpec("model")}


def wrappers():
    """Made late, since a key is an array: it needs the devices that `main` sets up."""
    adam, every = optax.adam(2**-6), 2
    ramp = schedules.linear(0.25, 0.75, begin_step=0, end_step=STEPS - 1)
    return {
        "gradual": dynamic.gradual(adam, ramp, every=every),
        "rigl": dynamic.rigl(adam, 0.75, 0.3, key=jax.random.key(0), every=every),
    }


def training_inputs():
    """Params, and for each step every example's gradient: integers, so that means are exact."""
    rng = np.random.default_rng(0)
    params = {str(n): rng.normal(size=n).astype(np.float32) for n in SPECS}
    batches = [
        {str(n): rng.integers(-3, 4, (BATCH, *n)).astype(np.float32) for n in SPECS}
        for _ in range(STEPS)
    ]
    return params, batches


def moved(tx, batch, state, params):
    grads = jax.tree.map(lambda each: each.mean(0), batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def masks_alone(tx):
    """After each step, on one device of this process."""
    params, batches = jax.tree.map(jnp.asarray, training_inputs())
    state, step = tx.init(params), jax.jit(functools.partial(moved, tx))
    found = []
    for batch in batches:
        params, state = step(batch, state, params)
        found.append(jax.tree.map(np.asarray, state.masks))
    return found


def over_processes(tree, mesh, batched=False):
    """Arrays that both processes share; batches along "data"."""

    def place(array):
        spec = SPECS.get(array.shape[batched:], PartitionSpec())
        sharding = NamedSharding(mesh, PartitionSpec("data", *spec) if batched else spec)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, tree)


def own_masks(masks):
    """Whole masks, put together from the shards that this process holds."""

    def whole(mask):
        found = np.zeros(mask.shape, bool)
        for shard in mask.addressable_shards:
            found[shard.index] = shard.data
        return found

    return jax.tree.map(whole, masks)


def training(tx, mesh):
    """What a process finds of training: the masks of one device, shardings, what crosses."""
    params, batches = training_inputs()
    params = over_processes(params, mesh)
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, SPECS.get(x.shape, PartitionSpec())),
        jax.eval_shape(tx.init, params),
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    step = jax.jit(functools.partial(moved, tx))
    batches = [over_processes(batch, mesh, batched=True) for batch in batches]
    program = step.lower(batches[0], state, params).compile()
    same, digest = [], hashlib.sha256()
    for batch, expected in zip(batches, masks_alone(tx), strict=True):
        params, state = step(batch, state, params)
        own = own_masks(state.masks)
        same.append(jax.tree.all(jax.tree.map(np.array_equal, own, expected)))
        for mask in jax.tree.leaves(own):
            digest.update(np.packbits(mask).tobytes())
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
    dynamic.check(state, params)
    return {
        "same": all(same),
        "digest": digest.hexdigest(),
        "sharded": jax.tree.all(kept),
        "gathered": largest_gathered(program),
    }


def training_report():
    """As `report`, of training."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return {
        f"training {fact} {name}": value
        for name, tx in wrappers().items()
        for fact, value in training(tx, mesh).items()
    }


def report(mesh):
    found = {}
    for name, (spec, shapes) in CASES.items():
        arrays, placed = trees(mesh, shapes, spec)
        for scope in ("global", "per_leaf"):
            expected = expected_masks(arrays, scope)
            topk = functools.partial(masking.topk, scope=scope)
            program = jax.jit(topk).lower(placed, jnp.float32(SPARSITY)).compile()
            eager = topk(placed, np.float32(SPARSITY))
            traced = program(placed, jnp.float32(SPARSITY))
            found[f"eager {name} {scope}"] = own_shards_equal(eager, expected)
            found[f"traced {name} {scope}"] = own_shards_equal(traced, expected)
            found[f"gathered {name} {scope}"] = largest_gathered(program)
        descending = np.sort(np.concatenate([a.ravel() for a in arrays]))[::-1]
        kth = selection.kth_largest(placed, 200)
        found[f"kth {name}"] = float(kth) == float(descending[199])
    return found


def main(port, number):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=int(number), initialization_timeout=60
    )
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    print(json.dumps(report(mesh) | training_report()))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
