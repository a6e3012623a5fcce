"""`storage`: bit for bit there and back, whatever the tree, the dtype and the values."""

import collections
import enum
import json
import os

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
import storage_trees
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from same_bits import assert_same_bits

import sparsejax as sj
from sparsejax import granularities, masking, storage
from sparsejax.storage import _bytes, _dtypes, _positions

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16"),
    *("float32", "float64", "complex64", "complex128", "bfloat16", "int4", "uint4"),
    *("float8_e4m3fn", "float8_e5m2"),
]


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same(got, expected):
    """Structures, dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(bits(np.asarray(a)), bits(b))


def there_and_back(folder, params, masks=None, **options):
    path = os.path.join(folder, "params.safetensors")
    storage.save(path, params, masks, **options)
    return storage.load(path)


def random_bits(seed, dtype, shape, density):
    """Any bits at all (NaNs of every payload, denormals, -0.0), and zeros."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype.name in ("int4", "uint4", "bool"):
        found = rng.integers(0, 2 if dtype.name == "bool" else 8, shape).astype(dtype)
    else:
        found = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    return np.where(rng.random(shape) < density, found, np.zeros((), dtype)).astype(dtype)


@st.composite
def arrays(draw):
    shape = tuple(draw(st.lists(st.integers(0, 12), max_size=4)))
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.7, 1.0]))
    return random_bits(draw(st.integers(0, 999)), draw(st.sampled_from(DTYPES)), shape, density)


keys = st.text(max_size=5) | st.sampled_from(["kernel", "a.b", "__metadata__", "é", "\x00", "[b]"])
trees = st.recursive(
    arrays() | st.none(),
    lambda nodes: (
        st.dictionaries(keys, nodes, max_size=3)
        | st.dictionaries(st.integers(-3, 30), nodes, max_size=3)
        | st.lists(nodes, max_size=3)
        | st.lists(nodes, max_size=3).map(tuple)
    ),
    max_leaves=6,
)


@given(tree=trees)
def test_load_gives_back_any_tree(tree, tmp_path_factory):
    found = there_and_back(tmp_path_factory.getbasetemp(), tree)
    assert_same(found.params, tree)
    assert found.masks is None and found.metadata == {}


@given(tree=trees, seed=st.integers(0, 99), data=st.data())
def test_load_gives_back_any_masks(tree, seed, data, tmp_path_factory):
    rng = np.random.default_rng(seed)

    def mask(leaf):
        shape = data.draw(st.sampled_from(["whole", "broadcast", "scalar"]))
        if shape == "scalar":
            return np.array(rng.random() < 0.7)
        sizes = (
            leaf.shape
            if shape == "whole"
            else [n if i % 2 else 1 for i, n in enumerate(leaf.shape)]
        )
        return rng.random(tuple(sizes)) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))

    masks = jax.tree.map(mask, tree)
    params = jax.tree.map(
        lambda w, m: np.where(m, w, np.zeros((), w.dtype)).astype(w.dtype), tree, masks
    )
    found = there_and_back(tmp_path_factory.getbasetemp(), params, masks)
    assert_same(found.params, params)
    assert_same(found.masks, masks)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9, 0.99, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "complex128"])
def test_load_gives_back_large_leaves(sparsity, dtype, tmp_path):
    w = random_bits(0, dtype, (1700, 1300), 1 - sparsity)
    assert_same(there_and_back(tmp_path, {"w": w}).params, {"w": w})


@pytest.mark.parametrize(("size", "planes"), [(500, 1), (50_000, 2), (4_000_000, 3)])
def test_positions_code_gaps_of_every_length(size, planes):
    rng = np.random.default_rng(planes)
    flat = np.zeros(size, bool)
    flat[rng.integers(0, flat.size, 12)] = True
    flat[[0, 1, 256, flat.size - 1]] = True
    code, pieces = _positions.encode(flat)
    cursor = _bytes.Cursor(memoryview(b"".join(pieces)))
    name, found = _positions.decode(cursor, flat.shape)
    assert code == name == "gaps" and _positions._planes(size, 16) == planes
    np.testing.assert_array_equal(found, flat)


def test_kept_values_keep_their_bits_and_pruned_ones_are_zero(tmp_path):
    payload = np.array([0x7FC12345, 0xFFC00001, 0x80000000, 1, 0x80000000], np.uint32)
    w = np.concatenate([payload.view(np.float32), np.zeros(995, np.float32)])
    mask = np.arange(1000) < 4  # The last -0.0 is pruned.
    found = there_and_back(tmp_path, {"w": w}, {"w": mask})
    np.testing.assert_array_equal(found.params["w"].view(np.uint32)[:6], [*payload[:4], 0, 0])
    np.testing.assert_array_equal(found.masks["w"], mask)
    unmasked = there_and_back(tmp_path, {"w": w}).params["w"]
    np.testing.assert_array_equal(unmasked.view(np.uint32), w.view(np.uint32))


def test_masks_are_had_back_where_kept_values_are_zero(tmp_path):
    masks = {"b": np.array(True), "w": np.eye(100, dtype=bool), "off": np.array(False)}
    params = {"b": np.ones(3), "w": np.zeros((100, 100)), "off": np.zeros((4, 4))}
    found = there_and_back(tmp_path, params, masks)
    assert_same(found.masks, masks)
    assert_same(found.params, params)


@pytest.mark.parametrize(
    "granularity",
    [granularities.Channel(), granularities.Block((4, 4)), granularities.NM(2, 4)],
)
def test_structured_masks_come_back_in_their_shape(granularity, tmp_path):
    params = {"w": np.random.default_rng(0).standard_normal((64, 64)).astype("float32")}
    amount = {} if isinstance(granularity, granularities.NM) else {"sparsity": 0.5}
    masks = masking.topk(params, **amount, granularity=granularity)
    found = there_and_back(tmp_path, sj.apply_masks(params, masks), masks)
    assert_same(found.masks, jax.tree.map(np.asarray, masks))


def test_save_refuses_to_lose_a_value_that_masks_prune(tmp_path):
    w = np.zeros((3, 4), np.float32)
    w[1, 2] = 5
    with pytest.raises(ValueError, match=r"5\.0 at 'layer\.w', entry \(1, 2\).*apply_masks"):
        there_and_back(tmp_path, {"layer": {"w": w}}, {"layer": {"w": np.zeros((3, 4), bool)}})
    assert os.listdir(tmp_path) == []


Pair = collections.namedtuple("Pair", ["left", "right"])


def test_like_restores_nodes_that_only_it_can_make(tmp_path):
    path = tmp_path / "a.safetensors"
    params = {"w": jnp.eye(30)}
    state = optax.adam(1e-3).init(params)
    tree = Pair(state, [params, None])
    storage.save(path, tree)
    assert_same(storage.load(path, like=tree).params, tree)
    assert_same(storage.load(path, like=jax.eval_shape(lambda: tree)).params, tree)
    plain = storage.load(path).params
    assert list(plain) == ["left", "right"] and plain["right"][1] is None
    assert plain["left"][0]["mu"]["w"].shape == (30, 30)
    assert plain["left"][1] == {}


class Module(eqx.Module):
    linear: eqx.nn.Linear
    name: str = eqx.field(static=True, default="m")


def test_like_restores_every_framework(tmp_path):
    path = tmp_path / "a.safetensors"
    trees = [
        nnx.state(nnx.Linear(20, 30, rngs=nnx.Rngs(0)), nnx.Param),
        Module(eqx.nn.Linear(20, 30, key=jax.random.key(0))),
        flax.linen.Dense(20).init(jax.random.key(0), jnp.ones((1, 9))),
        flax.core.freeze({"params": {"w": jnp.eye(20)}}),
    ]
    for tree in trees:
        pruned = sj.prune_tree(tree, tree, 0.02)
        masks = masking.threshold(jax.tree.map(jnp.abs, tree), 0.02)
        storage.save(path, pruned, masks)
        found = storage.load(path, like=tree)
        assert_same(found.params, pruned)
        assert_same(found.masks, masks)


def test_a_state_of_nnx_without_like_is_the_pure_dict_that_replaces_it(tmp_path):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    state = nnx.state(model)
    found = there_and_back(tmp_path, state)
    assert jax.tree.structure(found.params) == jax.tree.structure(nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, found.params)
    assert_same(jax.tree.map(np.asarray, nnx.to_pure_dict(state)), found.params)


def test_keys_that_json_does_not_have_are_text_without_like(tmp_path):
    assert there_and_back(tmp_path, {1.5: 1.0, 2.5: 1}).params == {"1.5": 1.0, "2.5": 1}


def test_prng_keys_come_back_by_like(tmp_path):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    state = nnx.state(model)
    storage.save(tmp_path / "a", state)
    assert_same_bits(storage.load(tmp_path / "a", like=state).params, state)
    assert "uint32" in {leaf.dtype for leaf in storage.contents(tmp_path / "a").leaves}


def test_like_places_arrays_where_its_own_are(tmp_path):
    path = tmp_path / "a.safetensors"
    mesh = jax.make_mesh((8,), ("x",))
    w = jax.device_put(jnp.eye(64), NamedSharding(mesh, PartitionSpec(None, "x")))
    like = {"w": w, "b": np.ones(3), "c": jnp.ones(2)}
    storage.save(path, like)
    found = storage.load(path, like=like).params
    assert found["w"].sharding == w.sharding
    assert type(found["b"]) is np.ndarray
    assert isinstance(found["c"], jax.Array) and not found["c"].committed
    spec = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)
    assert storage.load(path, like=like | {"w": spec}).params["w"].sharding == w.sharding


def test_like_reads_a_flat_file_of_another_framework_into_a_tree(tmp_path):
    path = tmp_path / "torch.safetensors"
    flat = {"fc.0.weight": np.eye(3, dtype="float32"), "fc.0.bias": np.ones(3, "float32")}
    safetensors.numpy.save_file(flat, path, metadata={"format": "pt"})
    found = storage.load(path)
    assert_same(found.params, flat)
    assert found.metadata == {"format": "pt"} and found.masks is None
    like = {"fc": [{"weight": np.zeros((3, 3), "float32"), "bias": np.zeros(3, "float32")}]}
    nested = storage.load(path, like=like).params
    assert_same(nested, {"fc": [{"weight": flat["fc.0.weight"], "bias": flat["fc.0.bias"]}]})


class Color(str, enum.Enum):  # noqa: UP042 (as text it is "Color.RED")
    RED = "red"


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": np.zeros(3), "a": {"b": np.ones(3)}},
        {np.int64(3): np.ones(2), np.int64(1): np.zeros(2)},
        {Color.RED: np.ones(2)},
        {"big": np.arange(3, dtype=">f4"), "number": 0.5, "count": 3, "flag": True},
    ],
)
def test_like_may_be_the_very_tree_that_was_saved(tree, tmp_path):
    storage.save(tmp_path / "a", tree, jax.tree.map(lambda _: True, tree))
    found = storage.load(tmp_path / "a", like=tree)
    for part in (found.params, found.masks):
        assert jax.tree.structure(part) == jax.tree.structure(tree)
    for got, expected in zip(jax.tree.leaves(found.params), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("like", "pattern"),
    [
        ({"w": np.ones(3)}, r"`like` must have the leaves of the file, which has one at 'b'"),
        ({"w": np.ones(3), "b": 1.0, "c": 1.0}, r"has none at 'c' \(1 are missing there"),
        ({"w": np.ones(4), "b": np.ones(2)}, r"at 'w' it is float64\[4\], the file has float64\[3"),
        ({"w": np.ones(3, "float32"), "b": np.ones(2)}, r"at 'w' it is float32\[3\]"),
    ],
)
def test_load_says_where_like_does_not_fit(like, pattern, tmp_path):
    path = tmp_path / "a"
    storage.save(path, {"w": np.ones(3), "b": np.ones(2)})
    with pytest.raises(ValueError, match=pattern):
        storage.load(path, like=like)


class Alike:
    """A key that another one looks like."""

    def __init__(self, number):
        self.number = number

    def __repr__(self):
        return "alike"

    def __lt__(self, other):
        return self.number < other.number


def nested(depth):
    tree = 1.0
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize(
    ("params", "error", "pattern"),
    [
        ({"a": {"b": "text"}}, TypeError, r"arrays of numbers, got str at 'a\.b'"),
        ({"o": np.array([None])}, TypeError, r"got object\[1\] at 'o'"),
        ({"s": jax.ShapeDtypeStruct((2,), "float32")}, TypeError, r"abstract float32\[2\] at 's'"),
        ({"\ud800": 1.0}, ValueError, r"Unicode text, got '\\ud800'"),
        ({Alike(1): 1.0, Alike(2): 2.0}, ValueError, r"two of its keys print alike, 'alike'"),
        (nested(600), ValueError, r"a tree that can be stored, but it is too deep"),
        ({"i": 2**70}, TypeError, r"dtype that can be stored, got object at 'i'"),
    ],
)
@pytest.mark.usefixtures("as_users_have_it")
def test_save_refuses_what_it_cannot_store(params, error, pattern, tmp_path):
    with pytest.raises(error, match=pattern):
        storage.save(tmp_path / "a", params)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("as_users_have_it")
def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="`path` must be a path, got 3"):
        storage.save(3, {})
    with pytest.raises(TypeError, match="`metadata` must map strings to strings"):
        storage.save(tmp_path / "a", {}, metadata={"step": 3})
    with pytest.raises(ValueError, match="`metadata` must be Unicode text"):
        storage.save(tmp_path / "a", {}, metadata={"step": "\ud800"})
    with pytest.raises(ValueError, match='`header` must be "open" or "packed", got True'):
        storage.save(tmp_path / "a", {}, header=True)
    storage.save(tmp_path / "a", {})
    with pytest.raises(TypeError, match="`limit` must be a number of bytes"):
        storage.load(tmp_path / "a", limit=-1)
    with pytest.raises(FileNotFoundError):
        storage.load(tmp_path / "b")
    with pytest.raises(IsADirectoryError):
        storage.load(tmp_path)
    with pytest.raises(ValueError, match="structure of `params`"):
        storage.save(tmp_path / "a", {"w": np.ones(3)}, {"v": np.ones(3, bool)})


def test_save_refuses_traced_params(tmp_path):
    with pytest.raises(TypeError, match=r"abstract float32.* outside of jit"):
        jax.jit(lambda w: storage.save(tmp_path / "a", {"w": w}))(jnp.ones(3))


def test_other_readers_list_the_file_and_read_its_dense_leaves(tmp_path):
    path = tmp_path / "a.safetensors"
    w = np.where(np.arange(6000) % 10 == 0, 1.5, 0).astype("float32").reshape(60, 100)
    params = {"conv": {"b": np.arange(7, dtype="float16"), "w": w}, "d": np.float64(3), "s": w[:0]}
    storage.save(path, params)
    with safetensors.safe_open(path, "numpy") as f:
        assert set(f.keys()) == {"conv.b", "conv.w", "d", "s"}
        np.testing.assert_array_equal(f.get_tensor("conv.b"), params["conv"]["b"], strict=True)
        np.testing.assert_array_equal(f.get_tensor("d"), np.array(3.0), strict=True)
        assert f.get_tensor("conv.w").dtype == np.uint8
        assert f.metadata()["format"] == "sparsejax"


def test_dense_tensors_stand_at_multiples_of_their_entries(tmp_path):
    """So that readers which map the file can look at them in place."""
    path = tmp_path / "a.safetensors"
    rng = np.random.default_rng(0)
    params = {
        f"{i}": random_bits(i, dtype, (int(rng.integers(1, 30)), 9), d)
        for i, (dtype, d) in enumerate([(t, d) for t in DTYPES[:-4] for d in (0.1, 1.0)])
    }
    storage.save(path, params)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] != "U8":
            offset = start + entry["data_offsets"][0]
            assert offset % min(params[name].dtype.itemsize, 8) == 0


def test_a_packed_header_says_the_same_in_fewer_bytes(tmp_path):
    params, masks = storage_trees.golden()
    sizes, found = [], []
    for header in ("open", "packed"):
        path = tmp_path / header
        storage.save(path, params, masks, metadata={"step": "7"}, header=header)
        sizes.append(path.stat().st_size)
        found.append(storage.contents(path))
        assert_same_bits(storage.load(path)[:2], storage.load(tmp_path / "open")[:2])
    assert sizes[1] < sizes[0] - 500
    assert found[1].metadata == {"step": "7"}
    assert [leaf[:3] for leaf in found[1].leaves] == [leaf[:3] for leaf in found[0].leaves]
    with safetensors.safe_open(tmp_path / "packed", "numpy") as file:
        assert list(file.keys()) == ["packed"]


def test_leaves_without_zeros_are_compressed_behind_a_packed_header(tmp_path):
    tree = {"b": np.random.default_rng(0).normal(size=500).astype(np.float32), "n": np.float32(3)}
    codes = []
    for header in ("open", "packed"):
        storage.save(tmp_path / "file", tree, header=header)
        codes.append([leaf.code for leaf in storage.contents(tmp_path / "file").leaves])
        assert_same_bits(storage.load(tmp_path / "file").params["b"], tree["b"])
    assert codes == [["dense", "dense"], ["bitmask", "dense"]]


@pytest.mark.parametrize("tree", [{}, [], {"w": np.zeros((0, 3))}, list(np.arange(300.0))])
def test_packed_headers_of_no_leaves_and_of_many(tmp_path, tree):
    storage.save(tmp_path / "file", tree, header="packed")
    assert_same_bits(storage.load(tmp_path / "file").params, tree)
    assert (tmp_path / "file").stat().st_size < 600 + 40 * len(tree)


@pytest.mark.parametrize("log", ["0.0, " * 40_000, "a" * 70_000, "é" * 300_000])
def test_packed_headers_of_metadata_that_repeat_themselves(tmp_path, log):
    """No more than `load` allows of so few bytes, and yet much less than an open one."""
    tree = {"w": np.ones((3, 4), np.float32)}
    storage.save(tmp_path / "file", tree, metadata={"log": log}, header="packed")
    found = storage.load(tmp_path / "file")
    assert_same_bits(found.params, tree)
    assert found.metadata == {"log": log}
    assert (tmp_path / "file").stat().st_size < 1000 + len(log.encode()) / 10


def test_small_masks_are_read_along_the_axis_that_takes_the_fewest_bytes(tmp_path):
    rows = np.random.default_rng(0).random(400)[:, None] ** 8  # some inputs matter, most do not
    mask = np.random.default_rng(1).random((400, 60)) < rows / 2
    sizes = []
    for i, kept in enumerate((mask, mask.T, mask.reshape(20, 20, 60))):
        storage.save(tmp_path / str(i), {"w": np.float32(kept)}, {"w": kept})
        assert_same_bits(storage.load(tmp_path / str(i)).masks["w"], kept)
        sizes.append(storage.contents(tmp_path / str(i)).leaves[0].bytes)
    assert max(sizes) < min(sizes) + 20


def test_contents_says_what_load_finds(tmp_path):
    path = tmp_path / "a.safetensors"
    params = {"b": np.ones(5, "float32"), "w": np.eye(200, dtype="float32"), "n": np.int64(3)}
    storage.save(path, params, metadata={"step": "3", "é": "ü"})
    found = storage.contents(path)
    assert found.packed and not found.masked and found.metadata == {"step": "3", "é": "ü"}
    assert [leaf.name for leaf in found.leaves] == ["b", "n", "w"]
    assert [leaf.code for leaf in found.leaves] == ["dense", "dense", "gaps"]
    assert [leaf.dense_bytes for leaf in found.leaves] == [20, 8, 160_000]
    assert sum(leaf.bytes for leaf in found.leaves) < os.path.getsize(path)
    assert storage.load(path).metadata == found.metadata


def test_equal_trees_make_equal_files(tmp_path):
    params = {"w": np.eye(50), "b": [np.ones(3), np.zeros((2, 2), "int8")]}
    for name in "ab":
        storage.save(tmp_path / name, params, metadata={"x": "y"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_save_replaces_the_file_that_load_reads(tmp_path):
    path = tmp_path / "a"
    storage.save(path, {"w": np.eye(100)})
    storage.save(path, jax.tree.map(lambda w: 2 * w, storage.load(path).params))
    assert_same(storage.load(path).params, {"w": 2 * np.eye(100)})
    assert os.listdir(tmp_path) == ["a"]


def test_strided_swapped_and_read_only_arrays_are_stored_as_they_read(tmp_path):
    w = np.random.default_rng(0).standard_normal((40, 60))
    w[np.abs(w) < 1.5] = 0
    frozen = w.copy()
    frozen.flags.writeable = False
    tree = {"t": w.T, "s": w[::-2, ::3], "big": w.astype(">f4"), "frozen": frozen}
    found = there_and_back(tmp_path, tree).params
    for name, array in tree.items():
        np.testing.assert_array_equal(found[name], array)
    assert found["big"].dtype == np.dtype("<f4")
    found["frozen"][0, 0] = 1  # What is loaded may be written to.


def test_a_file_that_holds_more_than_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a"
    storage.save(path, {"w": np.zeros((1000, 1000), "float32")})
    size = os.path.getsize(path)
    with pytest.raises(
        storage.InvalidFileError, match=r"hold 4000000, more than `limit` = 1000 .*limit=4000000"
    ):
        storage.load(path, limit=1000)
    storage.load(path, limit=4_000_000 - size)


def test_every_dtype_of_the_container_is_that_of_the_safetensors_package(tmp_path):
    for ours, theirs in _dtypes._CONTAINER.items():
        path = tmp_path / ours
        storage.save(path, {"w": np.zeros(3, _dtypes.by_name(ours))[:0]})
        with safetensors.safe_open(path, "numpy") as f:
            assert f.get_slice("w").get_dtype() == theirs


@pytest.mark.parametrize("name", ["storage", "storage_packed"])
def test_a_golden_file_of_each_format_reads_for_ever(name):
    params, masks = storage_trees.golden()
    folder = os.path.join(os.path.dirname(__file__), "golden")
    found = storage.load(os.path.join(folder, f"{name}.safetensors"))
    assert_same(found.params, params)
    assert_same(found.masks, masks)
    assert found.metadata == storage_trees.METADATA
