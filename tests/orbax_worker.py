"""A process that saves with orbax: `orbax_worker.py share FOLDER PORT NUMBER` or `die FOLDER`.

`share`: one of two that share eight devices. It prints, as JSON, whether the shards that it gets
back are those that it saved, on the same devices and on others. `die`: is killed in mid-save.
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax import storage
from sparsejax.storage import _source
from sparsejax.storage.orbax import SparseRestore, SparseSave

# Over both processes, over the devices of each, on all, and again over both, but otherwise.
SPECS = {
    "rows": PartitionSpec(("x", "y")),
    "columns": PartitionSpec(None, "y"),
    "whole": PartitionSpec(),
    "both": PartitionSpec("x", "y"),
}
OTHER = {"rows": "columns", "columns": "both", "whole": "rows", "both": "whole"}


def tree():
    rng = np.random.default_rng(0)
    masks = {name: rng.random((16, 8)) < 0.2 for name in SPECS}
    params = {n: np.where(m, rng.normal(size=m.shape), 0).astype("f4") for n, m in masks.items()}
    for name in SPECS:  # A kept entry is zero.
        params[name][0, 0], masks[name][0, 0] = 0, True
    return params, masks


def over_processes(tree, specs):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def place(name, array):
        where = NamedSharding(mesh, specs[name])
        return jax.make_array_from_callback(array.shape, where, array.__getitem__)

    return {name: place(name, array) for name, array in tree.items()}


def own_shards_equal(arrays, expected):
    """Of arrays that lie on the devices of both processes."""
    return all(
        len(array.addressable_shards) == 4
        and all(np.array_equal(s.data, expected[name][s.index]) for s in array.addressable_shards)
        for name, array in arrays.items()
    )


def share(folder, port, number):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=int(number), initialization_timeout=60
    )
    params, masks = tree()
    shared = tuple(over_processes(t, SPECS) for t in (params, masks))
    # Of one process each: an array on one of its devices, NumPy, a number; a key on all devices.
    extra = {"device": jax.device_put(params["rows"]), "host": params["rows"], "step": 3}
    everywhere = NamedSharding(shared[0]["rows"].sharding.mesh, PartitionSpec())
    keys = {"key": jax.jit(jax.random.key, out_shardings=everywhere)(7)}
    other = over_processes(params, {name: SPECS[OTHER[name]] for name in SPECS})
    found, read, original = {}, [], _source.read
    with ocp.CheckpointManager(folder) as manager:
        items = {"params": SparseSave(*shared), "extra": SparseSave(extra | keys)}
        manager.save(0, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
        for name, like in {"same": shared[0], "other": other}.items():
            items = {"params": SparseRestore(like), "extra": SparseRestore(extra | keys)}
            with mock.patch.object(_source, "read", lambda *a: read.append(a[1]) or original(*a)):
                restored = manager.restore(0, args=ocp.args.Composite(**items))
            found.setdefault("read", read.copy())
            key = restored.extra.params.pop("key")
            alone = jax.tree.map(np.array_equal, restored.extra.params, extra)
            found[name] = {
                "params": own_shards_equal(restored.params.params, params),
                "masks": own_shards_equal(restored.params.masks, masks),
                "extra": jax.tree.all(alone),
                "key": bool((key == keys["key"]).addressable_data(0))
                and key.sharding == everywhere,
            }
    print(json.dumps(found))
    jax.distributed.shutdown()


def die(folder):
    params, masks = tree()
    save = storage.save

    def half(path, *args, **kwargs):
        save(path, *args, **kwargs)
        os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    with ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=SparseSave(params, masks))
        manager.wait_until_finished()
        with mock.patch.object(storage, "save", half):
            manager.save(1, args=SparseSave(params, masks))
            manager.wait_until_finished()


if __name__ == "__main__":
    {"share": share, "die": die}[sys.argv[1]](*sys.argv[2:])
