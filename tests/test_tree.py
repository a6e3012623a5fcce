from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

from sparsejax import _tree


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


class Net(nnx.Module):
    def __init__(self):
        self.body = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))])
        self.head = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(1))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


def states():
    """The state of one NNX module: with its `Param` nodes, and pure."""
    with_nodes = nnx.state(Net(), nnx.Param)
    return with_nodes, nnx.as_pure(with_nodes)


def paths(tree):
    return _tree.flatten(tree).paths


# ---- paths


def test_flatten_joins_names_by_dots():
    tree = {"conv": {"kernel": 1}, "layers": [2, (3, Pair(4, 5))]}
    assert paths(tree) == [
        "conv.kernel",
        "layers.0",
        "layers.1.0",
        "layers.1.1.first",
        "layers.1.1.second",
    ]


def test_flatten_calls_the_root_a_dot():
    assert paths(jnp.ones(3)) == ["."]


def test_flatten_skips_none():
    assert paths({"a": None, "b": 1}) == ["b"]


def test_flatten_has_the_leaves_of_jax():
    tree = {"b": [1, 2], "a": Pair(3, 4)}
    assert _tree.flatten(tree).leaves == jax.tree.leaves(tree)


def test_flatten_of_an_nnx_state_has_no_value_in_its_paths():
    assert paths(states()[0]) == ["body.0.bias", "body.0.kernel", "head.kernel"]


def test_flatten_of_a_pure_nnx_state_has_the_same_paths():
    with_nodes, pure = states()
    assert paths(with_nodes) == paths(pure)


def test_flatten_of_an_nnx_state_has_the_leaves_of_jax():
    with_nodes, _ = states()
    for a, b in zip(_tree.flatten(with_nodes).leaves, jax.tree.leaves(with_nodes), strict=True):
        assert a is b


def test_flatten_of_linen_params_reads_like_the_modules():
    params = LinenNet().init(jax.random.key(0), jnp.ones((1, 2)))
    assert paths(params) == ["params.Dense_0.bias", "params.Dense_0.kernel"]


def test_flatten_of_an_equinox_module_reads_like_the_attributes():
    mlp = eqx.nn.MLP(2, 1, width_size=3, depth=1, key=jax.random.key(0))
    params = eqx.filter(mlp, eqx.is_array)
    assert "layers.0.weight" in paths(params) and "layers.1.bias" in paths(params)


def test_flatten_of_haiku_params_reads_like_the_modules():
    hk = pytest.importorskip("haiku")
    net = hk.transform(lambda x: hk.nets.MLP([3, 1])(x))
    params = net.init(jax.random.key(0), jnp.ones((1, 2)))
    assert paths(params)[:2] == ["mlp/~/linear_0.b", "mlp/~/linear_0.w"]


def test_rebuild_undoes_flatten():
    tree = {"b": [1, None], "a": Pair(3, 4)}
    flat = _tree.flatten(tree)
    assert flat.rebuild(flat.leaves) == tree


def test_rebuild_of_an_nnx_state_gives_a_state():
    with_nodes, _ = states()
    flat = _tree.flatten(with_nodes)
    rebuilt = flat.rebuild([leaf + 1 for leaf in flat.leaves])
    np.testing.assert_array_equal(
        rebuilt["head"]["kernel"][...], with_nodes["head"]["kernel"][...] + 1
    )


# ---- align


def align(tree, like):
    return _tree.align("grads", tree, "params", like)


@pytest.mark.parametrize(
    ("tree", "like"),
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 0}, "a": 0}),
        ({"a": 1, "b": {"c": 2}}, FrozenDict({"b": {"c": 0}, "a": 0})),
        (FrozenDict({"a": 1, "b": {"c": 2}}), {"b": {"c": 0}, "a": 0}),
        ([1, 2], (0, 0)),
        (Pair(1, 2), {"first": 0, "second": 0}),
        ({"first": 1, "second": 2}, Pair(0, 0)),
    ],
)
def test_align_matches_containers_by_path(tree, like):
    assert align(tree, like) == [1, 2]


def test_align_orders_leaves_like_the_other_tree():
    class Swapped(NamedTuple):
        second: int
        first: int

    assert align(Pair(1, 2), Swapped(0, 0)) == [2, 1]


@pytest.mark.parametrize("flip", [False, True], ids=["pure to nodes", "nodes to pure"])
def test_align_matches_nnx_states_with_and_without_nodes(flip):
    with_nodes, pure = reversed(states()) if flip else states()
    for a, b in zip(align(pure, with_nodes), jax.tree.leaves(pure), strict=True):
        assert a is b


def test_align_leaves_out_what_stands_where_the_other_tree_has_nothing():
    masked = {"a": optax.MaskedNode(), "b": None, "c": 0}
    assert align({"a": 1, "b": {"x": 2}, "c": 3}, masked) == [3]


@pytest.mark.parametrize("nothing", [None, optax.MaskedNode(), optax.EmptyState()])
def test_align_gives_none_where_the_tree_has_nothing(nothing):
    assert align({"a": nothing, "b": 1}, {"a": {"x": 0, "y": 0}, "b": 0}) == [None, None, 1]


def test_align_gives_none_for_a_tree_that_is_none():
    assert align(None, {"a": 0, "b": [0]}) == [None, None]


def test_align_of_empty_trees_is_empty():
    assert align({}, {}) == []


def test_align_refuses_a_missing_leaf_by_its_path():
    with pytest.raises(ValueError, match=r"`params` has a leaf at 'a\.b', where `grads` has none"):
        align({"c": 1}, {"a": {"b": 0}, "c": 0})


def test_align_refuses_a_leaf_too_many_by_its_path():
    with pytest.raises(ValueError, match=r"`grads` has a leaf at 'c\.1', where `params` has none"):
        align({"c": [1, 2]}, {"c": [0]})


@pytest.mark.parametrize("empty", [{}, [], ()])
def test_align_does_not_take_an_empty_container_for_nothing(empty):
    with pytest.raises(ValueError, match=r"`params` has a leaf at 'a\.x'"):
        align({"a": empty}, {"a": {"x": 0}})


def test_align_refuses_a_leaf_for_a_tree():
    with pytest.raises(ValueError, match="`params` has a leaf at 'w', where `grads` has none"):
        align(jnp.ones(2), {"w": 0})


# ---- map_chosen


def test_map_chosen_maps_the_chosen_leaves():
    got = _tree.map_chosen(
        lambda u, w: u - w, [True, False], {"a": 1, "b": 2}, updates={"a": 10, "b": 20}
    )
    assert got == {"a": 9, "b": 20}


def test_map_chosen_of_params_alone_passes_the_others():
    assert _tree.map_chosen(lambda w: -w, [False, True], [1, 2]) == [1, -2]


def test_map_chosen_gives_the_containers_of_the_params():
    got = _tree.map_chosen(lambda u, w: u, [True], FrozenDict({"a": 1}), updates={"a": 2})
    assert isinstance(got, FrozenDict) and got["a"] == 2


def test_map_chosen_refuses_another_shape_by_its_path():
    with pytest.raises(ValueError, match=r"`updates` .* at 'a\.w' it is float32\[3\], `params` is"):
        _tree.map_chosen(
            lambda u, w: u,
            [True],
            {"a": {"w": jnp.ones(2)}},
            updates={"a": {"w": jnp.ones(3)}},
        )


def test_map_chosen_does_not_look_at_the_shapes_of_other_leaves():
    got = _tree.map_chosen(lambda u, w: u, [False], [jnp.ones(2)], updates=[None])
    assert got == [None]
