import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import filters

PATHS = ["b", "conv1.kernel", "conv2.kernel", "head.bias", "layers.0.w"]
LEAF = jnp.ones((2, 2))


def filters_over_paths():
    """Any set of paths, as a filter."""
    return st.sets(st.sampled_from(PATHS)).map(lambda chosen: lambda path, leaf: path in chosen)


def table(filter_):
    return [filter_(path, LEAF) for path in PATHS]


# ---- floating and weights


FLOATING = {
    "float32": (jnp.ones(2), True),
    "bfloat16": (jnp.ones(2, jnp.bfloat16), True),
    "float16": (jnp.ones(2, jnp.float16), True),
    "float8": (jnp.ones(2, jnp.float8_e4m3fn), True),
    "numpy float64": (np.ones(2), True),
    "0-d": (jnp.float32(1), True),
    "empty": (jnp.zeros((0, 2)), True),
    "Python float": (1.0, True),
    "shape only": (jax.ShapeDtypeStruct((2,), jnp.float32), True),
    "int32": (jnp.arange(2), False),
    "bool": (jnp.array([True]), False),
    "complex64": (jnp.ones(2, jnp.complex64), False),
    "Python int": (1, False),
    "PRNG key": (jax.random.key(0), False),
    "function": (jnp.tanh, False),
    "string": ("relu", False),
}


@pytest.mark.parametrize(("leaf", "expected"), FLOATING.values(), ids=FLOATING.keys())
def test_floating_selects_real_floating_arrays(leaf, expected):
    assert filters.floating("any.path", leaf) is expected


@pytest.mark.parametrize(
    ("shape", "expected"), [((), False), ((3,), False), ((3, 1), True), ((0, 2, 2), True)]
)
def test_weights_selects_floating_arrays_with_two_axes(shape, expected):
    assert filters.weights("any.path", jnp.zeros(shape)) is expected


def test_weights_does_not_select_integers():
    assert filters.weights("table", jnp.ones((2, 2), jnp.int32)) is False


def test_weights_selects_traced_leaves():
    jax.jit(lambda w: pytest.fail("not selected") if not filters.weights("w", w) else w)(LEAF)


# ---- by_path


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("conv1.kernel", "conv1.kernel", True),
        ("conv1", "conv1.kernel", False),
        ("conv*", "conv1.kernel", True),
        ("*kernel", "conv1.kernel", True),
        ("*.kernel", "kernel", False),
        ("*", "a.b.c", True),
        ("layers.?.w", "layers.0.w", True),
        ("layers.?.w", "layers.10.w", False),
        ("layers.[01].w", "layers.1.w", True),
        ("layers.[!01].w", "layers.1.w", False),
        ("Conv*", "conv1.kernel", False),
        ("mlp/~/linear_*", "mlp/~/linear_0.w", True),
        (".", ".", True),
    ],
)
def test_by_path_matches_like_a_shell(pattern, path, expected):
    assert filters.by_path(pattern)(path, LEAF) is expected


def test_by_path_matches_any_of_its_patterns():
    assert table(filters.by_path("b", "conv*")) == [True, True, True, False, False]


def test_by_path_does_not_look_at_the_leaf():
    assert filters.by_path("n")("n", object())


# ---- the algebra


@given(filters_over_paths(), filters_over_paths())
def test_all_of_is_the_intersection(f, g):
    assert table(filters.all_of(f, g)) == [a and b for a, b in zip(table(f), table(g), strict=True)]


@given(filters_over_paths(), filters_over_paths())
def test_any_of_is_the_union(f, g):
    assert table(filters.any_of(f, g)) == [a or b for a, b in zip(table(f), table(g), strict=True)]


@given(filters_over_paths())
def test_not_is_the_complement(f):
    assert table(filters.not_(f)) == [not a for a in table(f)]


@given(filters_over_paths(), filters_over_paths())
def test_not_of_any_of_is_all_of_not(f, g):
    assert table(filters.not_(filters.any_of(f, g))) == table(
        filters.all_of(filters.not_(f), filters.not_(g))
    )


@given(filters_over_paths(), filters_over_paths())
def test_not_of_all_of_is_any_of_not(f, g):
    assert table(filters.not_(filters.all_of(f, g))) == table(
        filters.any_of(filters.not_(f), filters.not_(g))
    )


@given(filters_over_paths(), filters_over_paths(), filters_over_paths())
def test_all_of_distributes_over_any_of(f, g, h):
    assert table(filters.all_of(f, filters.any_of(g, h))) == table(
        filters.any_of(filters.all_of(f, g), filters.all_of(f, h))
    )


def test_all_of_nothing_selects_everything():
    assert all(table(filters.all_of()))


def test_any_of_nothing_selects_nothing():
    assert not any(table(filters.any_of()))


def test_all_of_does_not_ask_further_after_a_no():
    # So that `all_of(floating, ...)` protects a filter that looks at shapes.
    only = filters.all_of(filters.floating, lambda path, leaf: leaf.ndim > 1)
    assert only("f", jnp.tanh) is False


# ---- selected


def test_selected_answers_in_the_order_of_the_leaves():
    tree = {"w": LEAF, "b": jnp.ones(2), "a": [LEAF, jnp.arange(2)]}
    assert filters.selected(filters.weights, tree) == [True, False, False, True]


def test_selected_gives_paths_to_the_filter():
    seen = []

    def note(path, leaf):
        seen.append(path)
        return True

    filters.selected(note, {"conv": {"kernel": LEAF}, "layers": [LEAF]})
    assert seen == ["conv.kernel", "layers.0"]


def test_selected_skips_none():
    assert filters.selected(filters.weights, {"a": None, "w": LEAF}) == [True]


def test_selected_of_a_tree_without_leaves_is_empty():
    assert filters.selected(filters.weights, {}) == []


def test_selected_takes_complex_leaves_on_request():
    assert filters.selected(filters.by_path("*"), {"w": jnp.ones(2, jnp.complex64)}) == [True]
