"""One of two processes that share eight devices: `distributed_worker.py PORT NUMBER`.

It prints, as JSON, whether the shards that it holds are those of a stable sort.
"""

import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax import masking, selection

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
    print(json.dumps(report(mesh)))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
