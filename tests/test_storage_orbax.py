"""Sparse checkpoints as items of orbax: in the background, sharded, beside other items."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax_worker
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from same_bits import assert_same_bits

import sparsejax as sj
from sparsejax import dynamic, storage
from sparsejax.storage import _ranges, _source
from sparsejax.storage.orbax import SparseHandler, SparseRestore, SparseSave

pytestmark = pytest.mark.usefixtures("quickly")

RNG = np.random.default_rng(0)
WORKER = Path(__file__).with_name("orbax_worker.py")
FILE, KEY = "process_0.safetensors", "sparsejax.storage.orbax"


def tree():
    """Params of which most are zero, and their masks; a kept entry is zero, too."""
    shapes = {"a": (16, 8), "b": (8, 24)}
    masks = {name: RNG.random(shape) < 0.2 for name, shape in shapes.items()}
    params = {name: np.where(m, RNG.normal(size=m.shape), 0) for name, m in masks.items()}
    params = {name: x.astype(np.float32) for name, x in params.items()}
    params["b"][0, 0], masks["b"][0, 0] = 0, True
    params["bias"], masks["bias"] = np.zeros(8, np.float32), np.array(True)
    return params, masks


def manager_in(folder, **options):
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options))


def saved_in(folder, *args, **more):
    """A checkpoint's folder, written."""
    with ocp.AsyncCheckpointer(SparseHandler()) as checkpointer:
        checkpointer.save(folder, args=SparseSave(*args, **more))
    return folder


def restored_from(folder, like=None):
    return SparseHandler().restore(folder, args=SparseRestore(like))


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Beside other items, in a manager.


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Four steps of training, saved in the background; the latest two are kept."""
    folder = tmp_path_factory.mktemp("steps")
    params, masks = jax.tree.map(jnp.asarray, tree())
    tx = sj.keep_masks(optax.adam(0.1), masks)
    state, wanted = tx.init(params), {}

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    with manager_in(folder, max_to_keep=2) as manager:
        for i in range(4):
            params, state = step(params, state)
            wanted[i] = jax.tree.map(np.array, (params, state))
            items = {
                "params": SparseSave(params, dynamic.masks(state), metadata={"step": str(i)}),
                "state": SparseSave(state),
                "dense": ocp.args.StandardSave(params),
                "notes": ocp.args.JsonSave({"step": i}),
            }
            manager.save(i, args=ocp.args.Composite(**items))
    return folder, wanted


def test_manager_keeps_the_latest_steps(steps):
    folder, _ = steps
    with manager_in(folder) as manager:
        assert manager.all_steps() == [2, 3]


@pytest.mark.parametrize("step", [2, 3])
def test_item_comes_back_bit_for_bit_beside_others(steps, step):
    folder, wanted = steps
    params, state = wanted[step]
    with manager_in(folder) as manager:
        items = {"params": SparseRestore(params), "state": SparseRestore(state)}
        found = manager.restore(step, args=ocp.args.Composite(**items))
    assert_same_bits(found.params.params, params)
    assert_same_bits(found.params.masks, state.masks)
    assert_same_bits(found.state.params, state)
    assert found.params.metadata == {"step": str(step)}
    assert found.state.masks is None


def test_fresh_manager_restores_all_items_without_args(steps):
    """By the handler's name in orbax's own metadata."""
    folder, wanted = steps
    with manager_in(folder) as manager:
        found = manager.restore(3)
    assert_same_bits(found.params.params, wanted[3][0])
    assert found.notes == {"step": 3}


def test_masks_say_which_zero_is_kept(steps):
    folder, _ = steps
    found = storage.load(folder / "3" / "params" / FILE)
    assert found.masks["b"][0, 0]


def test_metadata_has_shapes_and_dtypes(steps):
    folder, wanted = steps
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("params", SparseRestore, SparseHandler())
    with ocp.CheckpointManager(folder, handler_registry=registry) as manager:
        found = manager.item_metadata(3).params
    expected = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in wanted[3][0].items()}
    assert found == expected


def test_manager_of_one_item(tmp_path):
    params, masks = tree()
    with manager_in(tmp_path) as manager:
        manager.save(0, args=SparseSave(params, masks))
        manager.wait_until_finished()
        found = manager.restore(0, args=SparseRestore(params))
    assert_same_bits(found[:2], (params, masks))


def test_synchronous_checkpointer(tmp_path):
    params, masks = tree()
    with ocp.Checkpointer(SparseHandler()) as checkpointer:
        checkpointer.save(tmp_path / "x", args=SparseSave(params, masks))
        found = checkpointer.restore(tmp_path / "x", args=SparseRestore(params))
    assert_same_bits(found[:2], (params, masks))


def test_file_is_what_storage_saves(tmp_path):
    params, masks = tree()
    storage.save(tmp_path / "file", params, masks, metadata={"a": "b"})
    folder = saved_in(tmp_path / "x", params, masks, metadata={"a": "b"})
    assert (folder / FILE).read_bytes() == (tmp_path / "file").read_bytes()


def test_item_is_as_small_as_the_file_and_far_below_standard(tmp_path):
    mask = RNG.random((1000, 300)) < 0.05
    params = {"w": np.where(mask, RNG.normal(size=mask.shape), 0).astype(np.float32)}
    storage.save(tmp_path / "file", params)
    folder = saved_in(tmp_path / "sparse", params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", params)
    assert (folder / FILE).stat().st_size == (tmp_path / "file").stat().st_size
    # Twice: `_CHECKPOINT_METADATA` of orbax is beside it.
    assert size_of(folder) < (tmp_path / "file").stat().st_size + 1000
    assert size_of(folder) < 0.75 * size_of(tmp_path / "standard")


# In the background.


class Held(NamedTuple):
    """A save that waits until it is let go."""

    go: threading.Event
    patch: Any


def held():
    go, save = threading.Event(), storage.save

    def slow(*args, **kwargs):
        assert go.wait(60)
        return save(*args, **kwargs)

    return Held(go, mock.patch.object(storage, "save", slow))


def test_save_returns_before_it_is_written(tmp_path):
    params, _ = tree()
    waiting = held()
    with waiting.patch, manager_in(tmp_path) as manager:
        manager.save(0, args=SparseSave(params))
        assert not list(tmp_path.rglob("*.safetensors"))
        waiting.go.set()
        manager.wait_until_finished()
        assert list(tmp_path.rglob("*.safetensors")) == [tmp_path / "0" / "default" / FILE]


def test_buffers_may_be_donated_and_changed_at_once(tmp_path):
    params, masks = tree()
    original = jax.tree.map(np.array, params)
    on_device = {"a": jnp.array(params["a"]), "b": params["b"], "bias": jnp.array(params["bias"])}
    reuse = jax.jit(lambda x: x + 1, donate_argnums=0)
    waiting = held()
    with waiting.patch, manager_in(tmp_path) as manager:
        manager.save(0, args=SparseSave(on_device, masks))
        new = reuse(on_device["a"]), reuse(on_device["bias"])
        on_device["b"] += 1
        masks["a"][:] = True
        jax.block_until_ready(new)
        assert on_device["a"].is_deleted()
        waiting.go.set()
        manager.wait_until_finished()
        found = manager.restore(0, args=SparseRestore(original))
    assert_same_bits(found.params, original)
    assert not found.masks["a"].all()


def test_error_in_the_background_surfaces_and_leaves_no_checkpoint(tmp_path):
    params, _ = tree()
    with manager_in(tmp_path) as manager:
        full = mock.patch.object(storage, "save", side_effect=OSError(28, "No space left"))
        with full:
            manager.save(0, args=SparseSave(params))
            with pytest.raises(OSError, match="No space left"):
                manager.wait_until_finished()
        assert not manager.all_steps(read=True)
        # And the manager goes on.
        manager.save(1, args=SparseSave(params))
        manager.wait_until_finished()
        assert manager.all_steps(read=True) == [1]


# Sharded arrays.


def mesh_of(shape, names):
    count = int(np.prod(shape))
    axis_types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=axis_types, devices=jax.devices()[:count])


def sharding(shape, names, *spec):
    return NamedSharding(mesh_of(shape, names), PartitionSpec(*spec))


SHARDINGS = {
    "rows": lambda: sharding((8,), ("x",), "x"),
    "columns": lambda: sharding((8,), ("x",), None, "x"),
    "both": lambda: sharding((2, 4), ("x", "y"), "x", "y"),
    "rows, replicated": lambda: sharding((2, 4), ("x", "y"), "x"),
    "both axes on columns": lambda: sharding((2, 4), ("x", "y"), None, ("y", "x")),
    "replicated": lambda: sharding((8,), ("x",)),
    "four devices": lambda: sharding((4,), ("x",), "x"),
    "one device": lambda: SingleDeviceSharding(jax.devices()[5]),
}


def placed(tree, where):
    """Matrices are sharded, all else is replicated over the same devices."""
    alone = isinstance(where, SingleDeviceSharding)
    other = where if alone else NamedSharding(where.mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, where if x.ndim == 2 else other), tree)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_placed(got, like):
    for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding


@pytest.fixture(scope="module", params=SHARDINGS)
def sharded(request, tmp_path_factory):
    """A checkpoint of arrays with this sharding, their masks sharded alike."""
    folder = tmp_path_factory.mktemp("sharded") / "x"
    params, masks = (placed(t, SHARDINGS[request.param]()) for t in tree())
    return saved_in(folder, params, masks), params, masks


@pytest.mark.parametrize("onto", ["columns", "both", "four devices", "one device"])
def test_sharded_arrays_come_back_on_any_sharding(sharded, onto):
    folder, params, masks = sharded
    like = abstract(placed(params, SHARDINGS[onto]()))
    found = restored_from(folder, like)
    assert_same_bits(found[:2], (params, masks))
    assert_placed(found.params, like)
    assert_placed(found.masks, like)


def test_sharded_arrays_come_back_without_like_as_numpy(sharded):
    folder, params, masks = sharded
    found = restored_from(folder)
    assert_same_bits(found[:2], (params, masks))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))


def test_sharded_file_is_one_that_storage_loads(sharded):
    """A leaf is whole there, or in pieces that are named by their ranges."""
    folder, params, _ = sharded
    found = storage.load(folder / FILE).params
    if "a" not in found:
        whole = np.full((16, 8), np.nan, np.float32)
        for name, piece in found.items():
            if name.startswith("a["):
                cuts = [slice(*map(int, part.split(":"))) for part in name[2:-1].split(",")]
                whole[tuple(cuts)] = piece
        found = {"a": whole}
    np.testing.assert_array_equal(found["a"], params["a"])


def test_replicas_are_written_once(tmp_path):
    params, _ = tree()
    folder = saved_in(tmp_path / "x", placed(params, SHARDINGS["rows, replicated"]()))
    names = [leaf.name for leaf in storage.contents(folder / FILE).leaves]
    assert names == ["a[0:8,0:8]", "a[8:16,0:8]", "b[0:4,0:24]", "b[4:8,0:24]", "bias[0:8]"]


def test_restore_reads_no_piece_twice(tmp_path, monkeypatch):
    """Each column needs all eight pieces, which are by rows."""
    params = {"a": tree()[0]["a"]}
    folder = saved_in(tmp_path / "x", placed(params, SHARDINGS["rows"]()))
    read, original = [], _source.read
    monkeypatch.setattr(_source, "read", lambda *args: read.append(args[1]) or original(*args))
    restored_from(folder, abstract(placed(params, SHARDINGS["columns"]())))
    assert len(read) == len(set(read)) == 8


def test_part_of_an_array_needs_the_pieces_in_it_only():
    whole, read = np.arange(24).reshape(6, 4), []
    cuts = {((i, i + 2), (0, 4)): whole[i : i + 2] for i in (0, 2, 4)}
    pieces = {r: lambda r=r, piece=piece: read.append(r) or piece for r, piece in cuts.items()}
    part = _ranges.cut(((1, 4), (1, 3)), whole.dtype, pieces)
    np.testing.assert_array_equal(part, whole[1:4, 1:3])
    assert [ranges[0] for ranges in read] == [(0, 2), (2, 4)]


@pytest.mark.parametrize("where", ["columns", "both", "one device"])
def test_masks_that_broadcast_keep_their_shape(tmp_path, where):
    """Also where the entries that a device holds are as few as the mask's."""
    masks = {"w": RNG.random((1, 8)) < 0.5, "v": RNG.random((8, 1)) < 0.5, "u": np.array(True)}
    params = jax.tree.map(lambda m: np.where(m, np.ones((8, 8), np.float32), 0), masks)
    placed_params = placed(params, SHARDINGS[where]())
    found = restored_from(saved_in(tmp_path / "x", placed_params, masks), abstract(placed_params))
    assert_same_bits(found[:2], (params, masks))
    devices = placed_params["w"].sharding.device_set
    assert all(mask.sharding.device_set == devices for mask in found.masks.values())


def test_masks_may_be_python_booleans(tmp_path):
    params = {"w": np.ones(3, np.float32), "v": np.zeros(3, np.float32)}
    found = restored_from(saved_in(tmp_path / "x", params, {"w": True, "v": False}))
    assert_same_bits(found[:2], (params, {"w": np.array(True), "v": np.array(False)}))


def test_masks_may_be_sharded_otherwise_than_the_params(tmp_path):
    params, masks = tree()
    on_devices = placed(params, SHARDINGS["rows"]()), placed(masks, SHARDINGS["both"]())
    found = restored_from(saved_in(tmp_path / "x", *on_devices))
    assert_same_bits(found[:2], (params, masks))


# Any tree.


class Node(NamedTuple):
    z: Any
    a: Any


@pytest.mark.parametrize("where", ["both", "one device"])
def test_any_tree_comes_back_by_like(tmp_path, where):
    """Numbers, integers, `None`, empty nodes, keys and half precision."""
    on = SHARDINGS[where]()
    sparse = placed(jnp.asarray(np.where(RNG.random((8, 8)) < 0.1, 1, 0), jnp.bfloat16), on)
    keys = jax.device_put(jax.random.split(jax.random.key(1), (4, 8)), on)
    saved = {
        "node": Node(jnp.int32(7), (sparse, None, {})),
        "list": [jnp.zeros((0, 3)), optax.MaskedNode(), np.int64(2**40)],
        "keys": (jax.random.key(3), keys if where == "both" else jax.random.key(4)),
        "number": 0.1,
    }
    found = restored_from(saved_in(tmp_path / "x", saved), saved).params
    assert_same_bits(found, jax.tree.map(lambda x: np.asarray(x) if np.isscalar(x) else x, saved))


def test_arrays_that_are_not_committed_stay_so(tmp_path):
    """So that they may meet those of any device."""
    params = {"w": jnp.ones((4, 4))}
    found = restored_from(saved_in(tmp_path / "x", params, {"w": np.array(True)}), params)
    assert not found.params["w"].committed and not found.masks["w"].committed


@pytest.mark.parametrize("empty", [optax.EmptyState(), None, {}, [{}, (None,)]], ids=str)
def test_tree_without_leaves_comes_back(tmp_path, empty):
    """Such as the state of plain SGD."""
    assert restored_from(saved_in(tmp_path / "x", empty), empty).params == empty


def test_nnx_state_comes_back_into_the_model(tmp_path):
    def model_of(seed):
        return nnx.Sequential(
            nnx.Linear(4, 6, rngs=nnx.Rngs(seed)), nnx.BatchNorm(6, rngs=nnx.Rngs(0))
        )

    model, other = model_of(0), model_of(1)
    x = jnp.ones((2, 4))
    folder = saved_in(tmp_path / "x", nnx.state(model))
    nnx.update(other, restored_from(folder, nnx.state(other)).params)
    np.testing.assert_array_equal(model(x), other(x))


def test_restored_rigl_state_trains_on_as_before(tmp_path):
    """Params, masks and optimizer state in one tree, a key among them."""
    tx = dynamic.rigl(optax.adam(0.1), 0.5, 0.3, key=jax.random.key(0), every=2)
    params = {"w": jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)}

    @jax.jit
    def step(carry):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    carry = step((params, tx.init(params)))
    restored = restored_from(saved_in(tmp_path / "x", carry), carry).params
    for _ in range(3):
        carry, restored = step(carry), step(restored)
    assert_same_bits(restored[0], carry[0])


# Errors.


@pytest.fixture(scope="module")
def by_rows(tmp_path_factory):
    """A checkpoint in pieces, without masks."""
    params, _ = tree()
    return saved_in(tmp_path_factory.mktemp("by_rows") / "x", placed(params, SHARDINGS["rows"]()))


def test_like_of_other_leaves_is_refused(by_rows):
    folder, (params, _) = by_rows, tree()
    with pytest.raises(ValueError, match=r"`like`.*'c'"):
        restored_from(folder, {**params, "c": params["a"]})
    with pytest.raises(ValueError, match="'bias'"):
        restored_from(folder, {"a": params["a"], "b": params["b"]})


def test_like_of_another_shape_or_dtype_is_refused(by_rows):
    folder, (params, _) = by_rows, tree()
    with pytest.raises(ValueError, match=r"'b'.*float32\[24,8\].*float32\[8,24\]"):
        restored_from(folder, {**params, "b": np.zeros((24, 8), np.float32)})
    with pytest.raises(ValueError, match=r"'a'.*int32\[16,8\].*float32\[16,8\]"):
        restored_from(folder, {**params, "a": np.zeros((16, 8), np.int32)})


@pytest.mark.usefixtures("as_users_have_it")
def test_bad_arguments_are_refused_before_orbax_has_them():
    params, masks = tree()
    bad = {
        r"`masks`.*'a'": lambda: SparseSave(params, {**masks, "a": np.ones((3, 8), bool)}),
        r"`masks`.*boolean.*'a'": lambda: SparseSave(params, {**masks, "a": params["a"]}),
        r"`masks`.*'bias'": lambda: SparseSave(params, {"a": masks["a"], "b": masks["b"]}),
        r"`params`.*function.*'f'": lambda: SparseSave({**params, "f": np.sum}),
        r"`params`.*'a'": lambda: SparseSave({"a": jax.ShapeDtypeStruct((3,), np.float32)}),
        r"`params`.*'<U2'.*'a'": lambda: SparseSave({"a": np.array(["ab"])}),
        r"`metadata`.*strings": lambda: SparseSave(params, metadata={"step": 1}),
    }
    for message, make in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            make()


def test_donated_params_are_refused_by_name():
    params = {"w": jnp.ones(3)}
    jax.jit(lambda x: x + 1, donate_argnums=0)(params["w"])
    with pytest.raises(ValueError, match=r"'w'.*donated"):
        SparseSave(params)


def test_folder_without_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"process_0\.safetensors"):
        SparseHandler().restore(tmp_path, args=SparseRestore())


def test_damaged_file_is_named(tmp_path, by_rows):
    content = bytearray((by_rows / FILE).read_bytes())
    content[-20] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(storage.InvalidFileError, match=FILE):
        restored_from(tmp_path)


def rewritten(folder, tmp_path, lack=None, **lies):
    """The file again, with other words about its pieces."""
    found = storage.load(folder / FILE)
    said = json.loads(found.metadata[KEY])
    if lack is not None:
        del found.params[lack], said["pieces"][lack]
    storage.save(tmp_path / FILE, found.params, metadata={KEY: json.dumps(said | lies)})


def test_missing_pieces_are_named(tmp_path, by_rows):
    """As where a process wrote none, or its file was not copied."""
    rewritten(by_rows, tmp_path, lack="a[2:4,0:8]")
    for act in (SparseHandler().restore, SparseHandler().finalize):
        with pytest.raises(storage.InvalidFileError, match=r"'a'.*112 of 128"):
            act(tmp_path)


@pytest.mark.parametrize(
    "lie",
    [
        {"tree": {"a": 0}},
        {"leaves": [["float32", [16, 8]]] * 3},
        {"leaves": [["float32", [-16, -8], None]] * 3},
        {"leaves": [["float32", [2**62, 8], None]] * 3},
        {"pieces": {"a[0:2,0:8]": [0, [[0, 3], [0, 8]]]}},
        {"pieces": {"a[0:2,0:8]": [7, [[0, 2], [0, 8]]]}},
        {"pieces": {"a[0:2,0:8]": [0, [[0, 2]]]}},
        {"pieces": {"a[0:2,0:8]": [0, [["0", "2"], [0, 8]]]}},
        {"pieces": {"nothing": [0, [[0, 2], [0, 8]]]}},
        {"pieces": []},
    ],
    ids=lambda lie: str(lie)[:50],
)
def test_what_is_said_of_pieces_is_checked(tmp_path, by_rows, lie):
    rewritten(by_rows, tmp_path, **lie)
    with pytest.raises(storage.InvalidFileError):
        SparseHandler().restore(tmp_path)


def test_files_of_two_checkpoints_are_refused(tmp_path, by_rows):
    rewritten(by_rows, tmp_path)
    storage.save(tmp_path / "process_1.safetensors", {"a": tree()[0]["a"]})
    with pytest.raises(storage.InvalidFileError, match="different checkpoints"):
        SparseHandler().restore(tmp_path)


def test_pieces_held_twice_are_refused(tmp_path, by_rows):
    rewritten(by_rows, tmp_path)
    (tmp_path / "process_1.safetensors").write_bytes((tmp_path / FILE).read_bytes())
    with pytest.raises(storage.InvalidFileError, match="twice"):
        SparseHandler().restore(tmp_path)


def test_arrays_larger_than_the_limit_are_refused_without_like(tmp_path):
    params = {"w": np.zeros((1000, 1000), np.float32)}
    folder = saved_in(tmp_path / "x", params)
    with pytest.raises(storage.InvalidFileError, match="limit"):
        SparseHandler().restore(folder, SparseRestore(limit=10**6))
    assert_same_bits(SparseHandler().restore(folder, SparseRestore(params, 0)).params, params)


def test_folder_in_a_bucket_is_refused():
    with pytest.raises(ValueError, match="file system, got 'gs://"):
        SparseHandler().finalize("gs://bucket/item")


def test_without_orbax_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    monkeypatch.delitem(sys.modules, "sparsejax.storage.orbax")
    with pytest.raises(ImportError, match=r"pip install 'sparsejax\[orbax\]'"):
        import sparsejax.storage.orbax  # noqa: F401


# Other processes.


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder, *arguments):
    """A worker; its output goes into files, for a pipe that nobody reads would hold it up."""
    log = folder / f"log {arguments[-1]}".replace("/", "_")
    with log.open("w") as out:
        return log, subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, arguments)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes found that share eight devices, and the folder of their checkpoint."""
    root = tmp_path_factory.mktemp("shared")
    folder, port = root / "checkpoints", free_port()
    workers = [start(root, "share", folder, port, number) for number in (0, 1)]
    try:
        codes = [process.wait(timeout=240) for _, process in workers]
    finally:
        for _, process in workers:
            process.kill()
            process.wait()
    logs = [log.read_text() for log, _ in workers]
    assert codes == [0, 0], "\n".join(logs)
    return folder / "0", [json.loads(log.splitlines()[-1]) for log in logs]


@pytest.mark.long
def test_two_processes_get_their_shards_back(shared):
    _, found = shared
    assert all(all(facts["same"].values()) for facts in found), found


@pytest.mark.long
def test_two_processes_get_other_shards_back(shared):
    _, found = shared
    assert all(all(facts["other"].values()) for facts in found), found


@pytest.mark.long
def test_each_of_two_processes_reads_what_it_needs(shared):
    _, found = shared
    for number, facts in enumerate(found):
        rows = [name for name in facts["read"] if name.startswith("rows")]
        assert sorted(rows) == sorted(
            f"rows[{start}:{start + 2},0:8]" for start in range(8 * number, 8 * number + 8, 2)
        )


@pytest.mark.long
def test_each_of_two_processes_writes_what_it_holds(shared):
    folder, _ = shared
    files = [folder / "params" / f"process_{number}.safetensors" for number in (0, 1)]
    names = [[leaf.name for leaf in storage.contents(file).leaves] for file in files]
    assert [{name.split("[")[0] for name in some} for some in names] == [
        {"rows", "columns", "whole", "both"},
        {"rows", "both"},
    ]
    rows = ["rows[10:12,0:8]", "rows[12:14,0:8]", "rows[14:16,0:8]", "rows[8:10,0:8]"]
    assert sorted(name for name in names[1] if name.startswith("rows")) == rows


@pytest.mark.long
def test_one_process_restores_what_two_have_saved(shared):
    folder, _ = shared
    params, masks = orbax_worker.tree()
    like = abstract(placed(params, SHARDINGS["columns"]()))
    found = restored_from(folder / "params", like)
    assert_same_bits(found[:2], (params, masks))
    assert_placed(found.params, like)
    assert_same_bits(restored_from(folder / "params")[:2], (params, masks))


@pytest.mark.long
def test_killed_save_leaves_the_checkpoint_before(tmp_path):
    folder = tmp_path / "checkpoints"
    log, process = start(tmp_path, "die", folder)
    assert process.wait(timeout=120) == -signal.SIGKILL, log.read_text()
    assert len(list(folder.rglob("process_0.safetensors"))) == 2  # The second is half written.
    with manager_in(folder, cleanup_tmp_directories=True) as manager:
        assert manager.all_steps() == [0]
        params, masks = orbax_worker.tree()
        assert_same_bits(manager.restore(0, args=SparseRestore(params))[:2], (params, masks))
        manager.save(1, args=SparseSave(params, masks))
    assert {path.name for path in folder.iterdir()} == {"0", "1"}
