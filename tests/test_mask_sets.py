import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.metrics import jaccard_score

import sparsejax as sj
from sparsejax import _tree, mask_sets
from sparsejax.mask_sets import Bits, difference, from_bits, intersection, overlap, to_bits, union

FULL = (3, 2)
SHAPES = [(), (1, 1), (3, 1), (1, 2), FULL]
SIZES = [(0,), (0, 3), (1,), (7,), (8,), (9,), (1, 1, 1, 5), (2, 3, 4), (17, 1)]


def masks(shapes=SHAPES):
    return st.sampled_from(shapes).flatmap(
        lambda shape: st.lists(
            st.booleans(), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))
        ).map(lambda v: np.array(v, bool).reshape(shape))
    )


def drawn(shape, density=0.5, seed=0):
    return np.random.default_rng(seed).random(shape) < density


@pytest.fixture
def mixed():
    """A leaf that is not pruned, channels, entries, and a leaf pruned as a whole."""
    return {
        "bias": np.array(True),
        "conv": drawn((1, 1, 1, 4)),
        "dense": drawn((5, 3)),
        "none": None,
        "off": np.array(False),
    }


@pytest.fixture
def other():
    return {
        "bias": np.array(True),
        "conv": drawn((2, 2, 3, 4), seed=1),
        "dense": drawn((5, 1), seed=1),
        "none": None,
        "off": np.array(False),
    }


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(a, b, strict=True)


# ---- intersection, union, difference


@given(masks(), masks())
def test_intersection_keeps_what_both_keep(a, b):
    assert_same(intersection({"w": a}, {"w": b}), {"w": np.asarray(a & b)})


@given(masks(), masks())
def test_union_keeps_what_one_keeps(a, b):
    assert_same(union({"w": a}, {"w": b}), {"w": np.asarray(a | b)})


@given(masks(), masks())
def test_difference_keeps_what_only_the_first_keeps(a, b):
    assert_same(difference({"w": a}, {"w": b}), {"w": np.asarray(a & ~b)})


each_symmetric = pytest.mark.parametrize("f", [intersection, union])


@each_symmetric
@given(a=masks(), b=masks())
def test_symmetric_sets_are_commutative(f, a, b):
    assert_same(f([a], [b]), f([b], [a]))


@each_symmetric
@given(a=masks(), b=masks(), c=masks())
def test_symmetric_sets_are_associative(f, a, b, c):
    assert_same(f([a], [b], [c]), f([a], f([b], [c])))


@each_symmetric
@given(a=masks())
def test_symmetric_sets_are_idempotent(f, a):
    assert_same(f([a], [a]), [a])


@each_symmetric
def test_symmetric_sets_of_one_tree_are_that_tree(f, mixed):
    assert_same(f(mixed), mixed)


@given(masks(), masks(), masks())
def test_intersection_distributes_over_union(a, b, c):
    expected = union(intersection([a], [b]), intersection([a], [c]))
    assert_same(intersection([a], union([b], [c])), expected)


@given(masks(), masks(), masks())
def test_difference_obeys_de_morgan(a, b, c):
    of_union = difference([a], union([b], [c]))
    of_intersection = difference([a], intersection([b], [c]))
    assert_same(of_union, intersection(difference([a], [b]), difference([a], [c])))
    assert_same(of_intersection, union(difference([a], [b]), difference([a], [c])))


@given(masks(), masks())
def test_difference_and_intersection_part_the_first(a, b):
    alone, shared = difference([a], [b]), intersection([a], [b])
    assert not np.any(intersection(alone, shared)[0])
    np.testing.assert_array_equal(union(alone, shared)[0], np.broadcast_to(a, (a & b).shape))


def test_difference_of_unpruned_leaves_is_empty():
    assert_same(difference(np.array(True), np.array(True)), np.array(False))


def test_difference_can_be_applied_once_unpruned_leaves_are_taken_back():
    params = {"b": jnp.ones(2), "w": jnp.ones((1, 3))}
    a = {"b": jnp.array(True), "w": jnp.array([[True, True, False]])}
    b = {"b": jnp.array(True), "w": jnp.array([[True, False, False]])}
    alone = jax.tree.map(lambda m, d: d if d.ndim else m, a, difference(a, b))
    applied = sj.apply_masks(params, alone)
    assert applied["b"].tolist() == [1, 1] and applied["w"].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("f", [intersection, union, difference])
def test_sets_of_mixed_leaves_are_masks_for_the_params(f, mixed, other):
    got = f(mixed, other)
    assert got["conv"].shape == (2, 2, 3, 4) and got["dense"].shape == (5, 3)
    assert got["bias"].shape == got["off"].shape == () and got["none"] is None


@pytest.mark.parametrize("f", [intersection, union, difference])
def test_sets_under_jit_equal_eager(f, mixed, other):
    assert_same(jax.jit(f)(mixed, other), f(mixed, other))


@pytest.mark.parametrize("f", [intersection, union, difference])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_sets_keep_shardings(f, wrap):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("a"))
    a, b = drawn((16, 24)), drawn((16, 24), seed=1)
    got = wrap(f)(jax.device_put(a, sharding), jax.device_put(b, sharding))
    np.testing.assert_array_equal(got, f(a, b))
    assert got.sharding.is_equivalent_to(sharding, 2)


# ---- overlap


@given(masks(SHAPES[1:]), masks(SHAPES[1:]))
def test_overlap_is_the_jaccard_score(a, b):
    flat = [np.broadcast_to(m, (a & b).shape).ravel() for m in (a, b)]
    assume(np.any(flat))
    assert overlap({"w": a}, {"w": b}).iou == pytest.approx(jaccard_score(*flat), abs=1e-12)


@given(masks([FULL]), masks([FULL]))
def test_overlap_counts_every_entry_of_the_two_once(a, b):
    found = overlap([a], [b])
    assert found.intersection + found.union == a.sum() + b.sum()


@given(masks(), masks())
def test_overlap_is_symmetric(a, b):
    assert overlap([a], [b]) == overlap([b], [a])


def test_overlap_sums_the_leaves_by_path(mixed, other):
    found = overlap({"net": mixed}, {"net": other})
    both = [mixed[k] & other[k] for k in ("conv", "dense")]
    some = [mixed[k] | other[k] for k in ("conv", "dense")]
    assert found.leaves == {
        "net.conv": (both[0].sum(), some[0].sum()),
        "net.dense": (both[1].sum(), some[1].sum()),
    }
    assert found[:2] == (sum(m.sum() for m in both), sum(m.sum() for m in some))
    assert found.leaves["net.conv"].iou == both[0].sum() / some[0].sum()


def test_overlap_sums_leaves_whose_paths_read_alike():
    tree = {"a.b": np.array([True]), "a": {"b": np.array([True, False])}}
    assert overlap(tree, tree)[:2] == (2, 2)


def test_overlap_does_not_count_leaves_that_neither_prunes():
    tree = {"b": np.array(True), "w": np.array([True, False])}
    assert overlap(tree, tree) == (1, 1, {"w": (1, 1)})


def test_overlap_counts_a_leaf_that_only_one_prunes():
    found = overlap([np.array(True)], [np.array([True, False, True])])
    assert found.leaves == {"0": (2, 3)}


@pytest.mark.parametrize("tree", [{}, [np.zeros((2, 3), bool)], [np.zeros((0, 3), bool)]])
def test_overlap_of_nothing_kept_is_one(tree):
    assert overlap(tree, tree)[:2] == (0, 0) and overlap(tree, tree).iou == 1.0


def test_overlap_of_nothing_kept_is_one_under_jit():
    tree = {"w": jnp.zeros((2, 3), bool)}
    found = jax.jit(overlap)(tree, tree)
    assert found.iou == 1.0 and found.leaves["w"].iou == 1.0


def test_overlap_gives_python_numbers(mixed, other):
    found = overlap(jax.tree.map(jnp.asarray, mixed), other)
    assert type(found.intersection) is type(found.union) is int and type(found.iou) is float
    assert {type(count) for leaf in found.leaves.values() for count in leaf} == {int}


def test_overlap_under_jit_equals_eager(mixed, other):
    got, expected = jax.jit(overlap)(mixed, other), overlap(mixed, other)
    assert {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(got)} == {((), "int32")}
    assert jax.tree.map(int, got) == expected
    assert got.iou == pytest.approx(expected.iou, rel=1e-6)


def test_overlap_maps_over_masks():
    a, b = drawn((3, 4, 5)), drawn((3, 4, 5), seed=1)
    expected = [overlap(x, y).iou for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.vmap(overlap)(a, b).iou, expected, rtol=1e-6)


def test_overlap_of_large_counts_is_exact():
    found = mask_sets.Overlap(2**53 + 1, 2**54 + 2, {})
    assert found.iou == 0.5


def test_overlap_counts_sharded_leaves():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    a, b = drawn((16, 24)), drawn((16, 24), seed=1)
    put = jax.device_put(a, NamedSharding(mesh, PartitionSpec("a")))
    assert overlap(put, b) == overlap(a, b)
    assert jax.tree.map(int, jax.jit(overlap)(put, b)) == overlap(a, b)


def test_overlap_counts_on_devices_what_the_host_does_not_hold(monkeypatch, mixed, other):
    expected = overlap(mixed, other)
    monkeypatch.setattr(mask_sets, "_on_host", lambda *masks: False)
    found = overlap(mixed, other)
    assert found == expected and type(found.union) is int


# ---- bits


@pytest.mark.parametrize("shape", [(), *SIZES], ids=str)
def test_to_bits_is_numpys_packbits(shape):
    mask = np.asarray(drawn(shape))
    bits = to_bits({"w": mask})["w"]
    assert bits.shape == shape and isinstance(bits.bytes, jax.Array)
    np.testing.assert_array_equal(
        bits.bytes, np.packbits(mask, axis=None, bitorder="little"), strict=True
    )


@given(masks([(), *SIZES]))
def test_bits_round_trip(mask):
    assert_same(from_bits(to_bits([mask])), [mask])


def test_bits_round_trip_mixed_leaves(mixed):
    assert_same(from_bits(to_bits(mixed)), mixed)


def test_bits_round_trip_an_empty_tree():
    assert from_bits(to_bits({})) == {}


def test_bits_round_trip_under_jit(mixed):
    packed = jax.jit(to_bits)(mixed)
    assert_same(packed, to_bits(mixed))
    assert_same(jax.jit(from_bits)(packed), mixed)


def test_bits_take_one_byte_for_eight_entries():
    assert [leaf.nbytes for leaf in jax.tree.leaves(to_bits(drawn((100, 10))))] == [125]


def test_bits_have_abstract_values():
    bits = jax.eval_shape(to_bits, jax.ShapeDtypeStruct((3, 5), bool))
    assert bits == Bits(jax.ShapeDtypeStruct((2,), jnp.uint8), (3, 5))
    assert jax.eval_shape(from_bits, bits) == jax.ShapeDtypeStruct((3, 5), bool)


def test_bits_map():
    stacked = drawn((3, 4, 5))
    packed = jax.vmap(to_bits)(stacked)
    assert packed.shape == (4, 5) and packed.bytes.shape == (3, 3)
    np.testing.assert_array_equal(jax.vmap(from_bits)(packed), stacked)


def test_bits_are_carried_by_a_scan():
    mask = drawn((4, 5))

    def step(bits, keep):
        return to_bits(from_bits(bits) & keep), None

    keep = drawn((3, 4, 5), 0.9, seed=1)
    last, _ = jax.lax.scan(step, to_bits(mask), keep)
    np.testing.assert_array_equal(from_bits(last), mask & keep.all(0))


def test_from_bits_takes_numpy_bytes():
    assert_same(from_bits(Bits(np.array([25], np.uint8), (2, 3))), drawn_25())


def test_from_bits_does_not_look_at_spare_bits():
    assert_same(from_bits(Bits(jnp.array([25 + 64 + 128], jnp.uint8), (2, 3))), drawn_25())


def drawn_25():
    return np.array([[True, False, False], [True, True, False]])


def test_bits_of_sharded_masks():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    mask = drawn((16, 24))
    put = jax.device_put(mask, NamedSharding(mesh, PartitionSpec(None, "a")))
    np.testing.assert_array_equal(to_bits(put).bytes, to_bits(mask).bytes)
    np.testing.assert_array_equal(from_bits(to_bits(put)), mask)


# ---- trees of frameworks


def nnx_state():
    return nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)


FRAMEWORKS = {
    "nnx_state": nnx_state,
    "nnx_module": lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
    "equinox_module": lambda: eqx.nn.Linear(4, 3, key=jax.random.key(0)),
}
each_framework = pytest.mark.parametrize("make", FRAMEWORKS.values(), ids=FRAMEWORKS)


@each_framework
def test_sets_have_the_structure_of_the_params(make):
    a = jax.tree.map(lambda w: w > 0, make())
    b = jax.tree.map(lambda w: w < 0.1, make())
    for f, expected in [
        (intersection, np.logical_and),
        (union, np.logical_or),
        (difference, np.greater),
    ]:
        assert_same(f(a, b), jax.tree.map(lambda x, y, g=expected: jnp.asarray(g(x, y)), a, b))


@each_framework
def test_overlap_has_the_paths_of_the_params(make):
    tree = jax.tree.map(lambda w: w > 0, make())
    assert list(overlap(tree, tree).leaves) == _tree.flatten(tree).paths


@each_framework
def test_bits_round_trip_the_trees_of_frameworks(make):
    tree = jax.tree.map(lambda w: w > 0, make())
    assert_same(from_bits(to_bits(tree)), tree)


def test_sets_take_another_container_with_the_same_paths():
    tree = jax.tree.map(lambda w: w > 0, nnx_state())
    assert_same(intersection(tree, nnx.to_pure_dict(tree)), tree)


# ---- errors

W = np.array([[True, False], [False, True]])
TREE = {"net": {"b": np.array(True), "w": W}}
FLOATS = {"net": {"b": np.array(True), "w": W.astype(np.float32)}}
TALL = {"net": {"b": np.array(True), "w": np.ones((3, 2), bool)}}
LINE = {"net": {"b": np.array(True), "w": np.ones(2, bool)}}
LESS = {"net": {"w": W}}
BYTES = np.zeros(1, np.uint8)

PAIRS = {
    "numbers": (
        FLOATS,
        TypeError,
        r"`masks` must be boolean arrays .*, got float32\[2,2\] at 'net\.w'; turn numbers into",
    ),
    "other shapes": (
        TALL,
        ValueError,
        r"`masks` must broadcast against each other, got shapes \[\(2, 2\), \(3, 2\)\] at "
        r"'net\.w'; build them for the same params",
    ),
    "other ranks": (
        LINE,
        ValueError,
        r"`masks` must broadcast against each other, got shapes \[\(2, 2\), \(2,\)\] at 'net\.w'",
    ),
    "other structures": (
        LESS,
        ValueError,
        r"`(b|masks\[1\])` must have the structure of `(a|masks\[0\])`: .* has a leaf at 'net\.b'",
    ),
}
CALLS = {
    f"{f.__name__} of {name}": (lambda f=f, second=second: f(TREE, second), error, pattern)
    for f in (intersection, union, difference, overlap)
    for name, (second, error, pattern) in PAIRS.items()
} | {
    "intersection of no trees": (
        lambda: intersection(),
        ValueError,
        r"`masks` must be at least one tree of masks, got none",
    ),
    "union of no trees": (
        lambda: union(),
        ValueError,
        r"`masks` must be at least one tree of masks, got none",
    ),
    "to_bits of numbers": (
        lambda: to_bits(FLOATS),
        TypeError,
        r"`masks` must be boolean arrays .*, got float32\[2,2\] at 'net\.w'",
    ),
    "to_bits of bits": (
        lambda: to_bits({"w": Bits(BYTES, (2, 2))}),
        TypeError,
        r"`masks` must be boolean arrays .*, got uint8\[1\] at 'w\.bytes'",
    ),
    "from_bits of masks": (
        lambda: from_bits(TREE),
        TypeError,
        r"`bits` must be a tree of Bits, got bool\[\] at 'net\.b'; to_bits makes it",
    ),
    "from_bits of too few bytes": (
        lambda: from_bits({"net": [Bits(BYTES, (3, 3))]}),
        ValueError,
        r"`bits` must hold uint8\[2\] for a mask of shape \(3, 3\), 8 entries a byte, got "
        r"uint8\[1\] at 'net\.0'; take both",
    ),
    "from_bits of too many bytes": (
        lambda: from_bits({"w": Bits(BYTES, (0, 3))}),
        ValueError,
        r"`bits` must hold uint8\[0\] for a mask of shape \(0, 3\).* got uint8\[1\] at 'w'",
    ),
    "from_bits of a stack": (
        lambda: from_bits({"w": Bits(BYTES[None], (2, 3))}),
        ValueError,
        r"`bits` must hold uint8\[1\] .* got uint8\[1,1\] at 'w'",
    ),
    "from_bits of other numbers": (
        lambda: from_bits({"w": Bits(BYTES.astype(np.int32), (2, 3))}),
        ValueError,
        r"`bits` must hold uint8\[1\] .* got int32\[1\] at 'w'",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "pattern"), CALLS.values(), ids=CALLS.keys())
def test_bad_call_says_what_is_wrong_and_what_is_right(call, error, pattern):
    with pytest.raises(error, match=f"(?s)^{pattern}"):
        call()
    with pytest.raises(error, match=f"(?s)^{pattern}"):
        jax.eval_shape(call)


def test_overlap_refuses_traced_counts_past_int32():
    halves = [jax.ShapeDtypeStruct((2**15, 2**15), bool)] * 2
    with pytest.raises(ValueError, match=r"`overlap` must count fewer than .*, got 2147483648, .*"):
        jax.eval_shape(overlap, halves, halves)
