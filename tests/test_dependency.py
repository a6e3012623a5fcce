"""What a trace finds: one rule at a time, and what the answer says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import CASES
from jax import lax

import sparsejax as sj
from sparsejax import dependency, filters, penalties

pytestmark = pytest.mark.usefixtures("quickly")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def between(middle, width=6, out=None, rank=2):
    """x @ first -> middle -> @ last: what `middle` does to the units in between."""
    variables = {"first": draw(3, width), "last": draw(out or width, 2)}

    def apply(v, x):
        return middle(x @ v["first"]) @ v["last"]

    return dependency.trace(apply, variables, draw(*(4,) * (rank - 1), 3))


def units(groups):
    """The units as sets of (leaf, axis, index)."""
    return {
        frozenset(
            (member.path, member.axis, int(i))
            for member in group.members
            for i in member.indices[unit]
        )
        for group in groups.values()
        for unit in range(group.size)
    }


def pairs(rows):
    """Units that join index i of `first` with each of some indices of `last`."""
    return {
        frozenset({*(("first", 1, i) for i in a), *(("last", 0, j) for j in b)}) for a, b in rows
    }


SAME = [([i], [i]) for i in range(6)]
MIDDLE = [([0], []), ([4], []), ([5], [])] + [([i + 1], [i]) for i in range(3)]
HALVES = [([i, i + 3], [i]) for i in range(3)]
TWICE = [([i], [i, i + 6]) for i in range(6)]
EVERY_SECOND = [([2 * i + 1], []) for i in range(3)] + [([2 * i], [i]) for i in range(3)]
ROWS = [([i, i + 1, i + 2], [i, i + 1, i + 2]) for i in (0, 3)]
COLUMNS = [([i, i + 3], [i, i + 3]) for i in range(3)]
CONSTANT = np.arange(1.0, 7.0, dtype=np.float32)
ORDER = np.array([3, 1, 0, 2, 5, 4])
TAKEN = [([int(j)], [i]) for i, j in enumerate(ORDER)]


def turned(x):
    return x.reshape(-1, 2, 3).swapaxes(1, 2).reshape(-1, 6)


def halves(f):
    return lambda x: f(*jnp.split(x, 2, -1))


def thrice(x):
    return lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] * 2, c[1] + 1), (x, 0))[0]


RULES = {
    "entrywise": (lambda x: jax.nn.gelu(x) * 2, 6, SAME),
    "two uses": (lambda x: jnp.tanh(x) + jax.nn.sigmoid(x), 6, SAME),
    "constant": (lambda x: x * CONSTANT[None], 6, SAME),
    "iota": (lambda x: x + jnp.arange(6.0)[None], 6, SAME),
    "reverse": (lambda x: x[:, ::-1], 6, [([i], [5 - i]) for i in range(6)]),
    "slice": (lambda x: x[:, 1:4], 3, MIDDLE),
    "stride": (lambda x: x[:, ::2], 3, EVERY_SECOND),
    "split and add": (halves(jnp.add), 3, HALVES),
    "gate": (halves(jnp.multiply), 3, HALVES),
    "concatenate": (lambda x: jnp.concatenate([x, -x], -1), 12, TWICE),
    "roll": (lambda x: jnp.roll(x, 1, -1), 6, [([i], [(i + 1) % 6]) for i in range(6)]),
    "tile": (
        lambda x: jnp.tile(x, (1, 2)),
        12,
        [*TWICE, ([], list(range(6))), ([], list(range(6, 12)))],
    ),
    "repeat": (
        lambda x: jnp.repeat(x, 2, -1),
        12,
        [([i], [2 * i, 2 * i + 1]) for i in range(6)]
        + [([], list(range(k, 12, 2))) for k in range(2)],
    ),
    "pad": (
        lambda x: jnp.pad(x, ((0, 0), (1, 2))),
        9,
        [([i], [i + 1]) for i in range(6)] + [([], [i]) for i in (0, 7, 8)],
    ),
    "crop": (lambda x: lax.pad(x, 0.0, [(0, 0, 0), (-1, -2, 0)]), 3, MIDDLE),
    "known index": (lambda x: x[:, ORDER], 6, TAKEN),
    "take": (
        lambda x: jnp.take(x, ORDER[:2], axis=1),
        2,
        TAKEN[:2] + [([int(j)], []) for j in ORDER[2:]],
    ),
    "rows and columns": (
        lambda x: jnp.tanh(x.reshape(-1, 2, 3)).reshape(-1, 6),
        6,
        ROWS + COLUMNS,
    ),
    "shuffle": (
        turned,
        6,
        [([0, 1, 2], [0, 2, 4]), ([3, 4, 5], [1, 3, 5])]
        + [([i, i + 3], [2 * i, 2 * i + 1]) for i in range(3)],
    ),
    "transpose": (lambda x: x.T.T, 6, SAME),
    "select": (lambda x: jnp.where(x > 0, x, -1.0), 6, SAME),
    "clip": (lambda x: jnp.clip(x, -1, 1), 6, SAME),
    "remat": (jax.checkpoint(lambda x: jnp.sin(x)), 6, SAME),
    # The condition looks at one unit, which is locked by it.
    "cond": (lambda x: lax.cond(x[0, 0] > 0, jnp.sin, lambda x: x * 2, x), 6, SAME[1:]),
    "scan": (lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0], 6, SAME),
    "fori": (lambda x: lax.fori_loop(0, 3, lambda i, c: c * 2, x), 6, SAME),
    "while": (thrice, 6, SAME),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (0, 1), (4, 3)), 3, MIDDLE),
    "row update": (lambda x: x.at[0].set(0.0), 6, SAME),
    "stack": (lambda x: jnp.stack([x, x], 0).sum(0), 6, SAME),
    "running sum of rows": (lambda x: jnp.cumsum(x, 0), 6, SAME),
    "sort of rows": (lambda x: jnp.sort(x, 0), 6, SAME),
    "largest rows": (lambda x: lax.top_k(x.T, 2)[0].T, 6, SAME),
    "pooled rows": (
        lambda x: jax.grad(
            lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1), (2, 1), "VALID").sum()
        )(x),
        6,
        SAME,
    ),
    "fft of rows": (lambda x: jnp.fft.fft(x, axis=0).real, 6, SAME),
    "barrier": (lambda x: lax.optimization_barrier(x), 6, SAME),
    "random": (lambda x: x * jax.random.uniform(jax.random.key(0), x.shape), 6, SAME),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    middle, out, rows = RULES[name]
    groups = between(middle, out=out)
    assert units(groups) == pairs(rows)


def factor(x):
    return jnp.linalg.cholesky(jnp.eye(6)[None] + x[:, :, None] * x[:, None])[:, 0]


def looked_up(x):
    return jnp.take(x, jnp.argmax(x, 1) % 2, axis=1) @ jnp.ones((4, 6))


def windowed(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME")


LOCKS = {
    "sort": (lambda x: jnp.sort(x, -1), "sort at test_dependency.py"),
    "top_k": (lambda x: jnp.pad(lax.top_k(x, 2)[0], ((0, 0), (0, 4))), "top_k at"),
    "argmax": (lambda x: x * jax.nn.one_hot(jnp.argmax(x, -1), 6), "argmax at"),
    "index from the data": (looked_up, "argmax"),
    "window": (windowed, "reduce_window"),
    "fft": (lambda x: jnp.fft.fft(x).real, "fft at"),
    "unknown": (factor, "no rule for cholesky"),
}


@pytest.mark.parametrize("name", LOCKS)
def test_lock(name):
    middle, reason = LOCKS[name]
    groups = between(middle)
    assert not any(("first", 1, 0) in unit for unit in units(groups))
    why = next(x.why for x in groups.locked if (x.path, x.axis) == ("first", 1))
    assert reason in why


def test_unknown_primitives_are_named():
    groups = between(factor)
    assert list(groups.unknown) == ["cholesky"]
    assert "test_dependency.py" in groups.unknown["cholesky"]


def test_a_rule_can_be_added(monkeypatch):
    from sparsejax.dependency import _rules

    monkeypatch.setattr(_rules, "RULES", dict(_rules.RULES))
    primitive = jax.extend.core.Primitive("twice")
    primitive.def_abstract_eval(lambda x: x)
    primitive.def_impl(lambda x: x * 2)
    assert "twice" in between(primitive.bind).unknown
    dependency.add_rule("twice", dependency.Rule(lambda step, eqn, values: list(values)))
    assert units(between(primitive.bind)) == pairs(SAME)


def test_bad_rules_are_refused(as_users_have_it):
    with pytest.raises(TypeError, match="`add_rule` needs a primitive's name"):
        dependency.add_rule("sin", lambda: None)
    with pytest.raises(TypeError, match="`trace`"):
        dependency.Rule(None)


@pytest.mark.parametrize(
    ("middle", "exact"),
    [
        (lambda x: x, True),
        (jax.nn.sigmoid, True),
        (lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1), True),  # RMS
        (lambda x: jax.nn.relu(x) - jnp.mean(jax.nn.relu(x), -1, keepdims=True), True),
        (lambda x: x * jnp.mean(jax.nn.sigmoid(x), -1, keepdims=True), False),
        (lambda x: x / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1), False),
        (lambda x: jax.nn.softmax(x, -1), False),
        (lambda x: x + jnp.max(x, -1, keepdims=True), False),
        (lambda x: jnp.cumsum(x, -1), True),
        (lambda x: jnp.cumsum(jax.nn.softplus(x), -1), False),
        (lambda x: x + jnp.prod(x, -1, keepdims=True), False),
        (lambda x: x @ draw(6, 6, seed=2), False),  # a constant matrix: units of its two sides
        (lambda x: jax.nn.silu(x) @ jnp.ones((6, 6)), False),
        (lambda x: x + jnp.einsum("bi,bi->b", x, jnp.cos(x))[:, None], True),
        (lambda x: x + jnp.einsum("bi,bi->b", jnp.exp(x), jnp.cos(x))[:, None], False),
    ],
)
def test_exactness_follows_zeros(middle, exact):
    groups = between(middle)
    group = groups["first"]
    # A product with a constant is exact where what it reads is zero at the cut.
    expected = exact or (not group.why)
    assert group.exact == expected
    if not exact and group.why:
        assert "test_dependency.py" in group.why[0]


ZERO = [
    jax.nn.relu, jax.nn.relu6, jax.nn.gelu, jax.nn.silu, jnp.tanh, jax.nn.elu, jax.nn.leaky_relu,
    jax.nn.hard_swish, jax.nn.mish, jnp.sin, jnp.square, jnp.abs, jnp.sign, jnp.expm1, jnp.log1p,
    lambda x: x**3, lambda x: jnp.clip(x, -1, 1), lambda x: jnp.where(x > 1, x, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(ZERO)))
def test_what_maps_zero_to_zero_keeps_it(place):
    """The trace against the function itself at zero."""
    function = ZERO[place]
    assert abs(float(function(jnp.zeros(())))) < 1e-7
    summed = between(lambda x: x + function(x).sum(-1, keepdims=True))
    assert summed["first"].exact == bool(function(jnp.zeros(())) == 0)


@pytest.mark.parametrize("function", [jnp.cos, jnp.exp, jax.nn.sigmoid, jax.nn.softplus])
def test_what_does_not_map_zero_to_zero(function):
    summed = between(lambda x: x + function(x).sum(-1, keepdims=True))
    assert not summed["first"].exact


def test_silent_units_send_zeros():
    assert between(jax.nn.relu)["first"].silent
    assert not between(jax.nn.sigmoid)["first"].silent


def test_rerun_names_what_depends_on_sizes():
    assert not between(jax.nn.relu)["first"].rerun
    mean = between(lambda x: x / jnp.mean(x**2, -1, keepdims=True))
    assert (
        "mean would divide by its size: reduce_sum at test_dependency.py" in mean["first"].rerun[0]
    )


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (
            lambda x: x * CONSTANT[None],
            r"a constant of shape \(1, 6\) that .* would have to be cut",
        ),
        (lambda x: x * jnp.sin(jnp.arange(6.0))[None], "iota at .* makes a value of its full size"),
        (lambda x: jnp.concatenate([x[:, :4], jnp.tanh(x[:, 4:])], 1), "may look at fixed places"),
        (
            lambda x: jnp.concatenate([*jnp.split(x, 2, 1)], 1),
            "split at .* may look at fixed places",
        ),
        (lambda x: x[:, ORDER], "gather at .* may look at fixed places"),
        (lambda x: x + jnp.einsum("bi,bi->b", x, x)[:, None], "its size may scale the result"),
    ],
)
def test_rerun_names_constants_and_places(middle, reason):
    (why,) = between(middle)["first"].rerun[:1]
    assert re.search(reason, why)


def test_outputs_and_inputs_are_locked():
    variables = {"w": draw(3, 2)}
    groups = dependency.trace(lambda v, x: {"logits": x @ v["w"]}, variables, draw(1, 3))
    assert not groups
    (read,), (made,) = ([x.why for x in groups.locked if x.axis == d] for d in range(2))
    assert re.fullmatch(r"dot_general at test_dependency\.py:\d+ .* fixed: axis 1 of input 0", read)
    assert made == "it is axis 1 of output logits"


def test_unused_variables_are_locked():
    groups = dependency.trace(lambda v, x: x, {"w": draw(3, 2)}, draw(1, 3))
    assert {x.why for x in groups.locked} == {"the function does not use it"}


def test_new_state_goes_with_the_old():
    variables = {"params": {"w": draw(3, 5), "out": draw(5, 2)}, "stats": {"mean": draw(5)}}

    def apply(v, x):
        hidden = x @ v["params"]["w"]
        new = 0.9 * v["stats"]["mean"] + 0.1 * hidden.mean(0)
        return hidden @ v["params"]["out"], {"stats": {"mean": new}}

    groups = dependency.trace(apply, variables, draw(4, 3))
    assert [m.path for m in groups["params.w"].members] == ["params.w", "stats.mean", "params.out"]

    def exposed(v, x):
        return apply(v, x)[1]["stats"]["mean"]

    assert not dependency.trace(exposed, variables, draw(4, 3))


def test_places_in_a_tuple_are_no_names_of_variables():
    variables = [draw(4, 4), draw(4, 4)]
    groups = dependency.trace(lambda v, x: (x @ v[0], x @ v[0] @ v[1]), variables, draw(4, 4))
    assert not groups


def test_names_tell_axes_and_parts_apart():
    case = CASES["decoder_gqa_repeat-dict"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    assert len(set(groups)) == len(groups)
    assert all(groups[name].name == name for name in groups)


def test_missing_groups_are_named_in_the_error():
    with pytest.raises(KeyError, match="no group 'x'; there are 'first'"):
        between(jax.nn.relu)["x"]


def test_costs_are_those_of_the_network_without_the_unit():
    case = CASES["resnet_basic-dict"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    assert groups.params == sum(x.size for x in jax.tree.leaves(case.variables))
    for group in groups.values():
        for unit in (0, group.size - 1):
            removed = groups.removed({group.name: [unit]})
            assert groups.params - groups.params_without(removed) == group.params[unit]
            assert groups.flops - groups.flops_without(removed) == group.flops[unit]


def test_flops_are_those_xla_counts():
    """XLA counts additions and activations, too, which are few in wide products."""
    variables = {"a": draw(128, 256), "b": draw(256, 512), "c": draw(512, 64)}

    def apply(v, x):
        return x @ v["a"] @ v["b"] @ v["c"]

    x = draw(32, 128)
    groups = dependency.trace(apply, variables, x)
    counted = jax.jit(apply).lower(variables, x).compile().cost_analysis()["flops"]
    assert groups.flops == 2 * 32 * (128 * 256 + 256 * 512 + 512 * 64)
    assert groups.flops == pytest.approx(counted, rel=0.01)


def test_loops_count_their_turns_and_branches_the_dearest():
    w = {"w": draw(4, 4)}

    def looped(v, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ v["w"]), None), x, length=5)[0]

    def branched(v, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ v["w"] @ v["w"], lambda: x @ v["w"])

    assert dependency.trace(looped, w, draw(1, 4)).flops == 5 * 2 * 16
    assert dependency.trace(branched, w, draw(1, 4)).flops == 2 * 2 * 16


def test_abstract_variables_are_enough():
    case = CASES["cnn-dict"]()
    shapes = jax.eval_shape(lambda: (case.variables, case.inputs))
    groups = dependency.trace(case.apply, shapes[0], *shapes[1])
    assert units(groups) == units(dependency.trace(case.apply, case.variables, *case.inputs))


def test_the_table_says_it_all():
    groups = between(jax.nn.relu)
    text = str(groups)
    assert "first" in text
    assert "last[0]" in text
    assert "locked: last[1] (2): it is axis 1 of output ." in text
    assert repr(groups) == "Groups(first: 6)"


def test_bad_arguments(as_users_have_it):
    with pytest.raises(TypeError, match="`apply_fn`"):
        dependency.trace(None, {"w": draw(2, 2)})
    with pytest.raises(ValueError, match="`variables` must have at least one leaf"):
        dependency.trace(lambda v: v, {})
    with pytest.raises(TypeError, match=r"`variables` must hold arrays, got 'relu' at 'act'"):
        dependency.trace(lambda v: v, {"act": "relu"})


def test_dtypes_and_odd_leaves():
    variables = {
        "w": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones((4,), jnp.bfloat16), "none": None,
        "empty": jnp.zeros((0, 4)), "scalar": jnp.float32(2), "count": jnp.int32(3),
        "table": jnp.ones((5, 4), jnp.int8), "key": jax.random.key(0),
        "out": jnp.ones((4, 2), jnp.float16),
    }  # fmt: skip

    def apply(v, x):
        hidden = jax.nn.relu(x @ v["w"] + v["b"][None]) * v["scalar"].astype(jnp.bfloat16)
        hidden = hidden + v["table"][:1].astype(jnp.bfloat16)
        noise = jax.random.normal(v["key"], hidden.shape, jnp.bfloat16)
        return (hidden + noise * v["count"].astype(jnp.bfloat16)) @ v["out"].astype(jnp.bfloat16)

    groups = dependency.trace(apply, variables, jnp.ones((1, 3), jnp.bfloat16))
    assert [m.path for m in groups["w"].members] == ["w", "table", "b", "out"]
    assert {x.path: x.why for x in groups.locked}["empty"] == "the function does not use it"


def brute_scores(groups, tree):
    """Every entry of a unit once, by masks."""
    answer = {}
    for name, group in groups.items():
        rows = []
        for unit in range(group.size):
            marked = {path: np.zeros(np.shape(x), bool) for path, x in tree.items()}
            for member in group.members:
                if member.path in marked:
                    index = (slice(None),) * member.axis + (member.indices[unit],)
                    marked[member.path][index] = True
            rows.append(sum(float(np.sum(tree[p][m], dtype=np.float64)) for p, m in marked.items()))
        answer[name] = np.array(rows)
    return answer


def recurrent(v, x):
    hidden = jnp.tanh(x @ v["in"])
    hidden = jnp.tanh(hidden @ v["self"] + hidden @ v["half"][:, ::-1])
    return (hidden + jnp.tanh(x @ v["in"])) @ v["out"]


def test_unit_scores_count_every_entry_once():
    tree = {
        "in": abs(draw(3, 6)),
        "self": abs(draw(6, 6)),
        "half": abs(draw(6, 6)),
        "out": abs(draw(6, 2)),
    }
    groups = dependency.trace(recurrent, tree, draw(4, 3))
    (group,) = groups.values()
    assert [m.path for m in group.members].count("self") == 2
    got, want = dependency.unit_scores(groups, tree), brute_scores(groups, tree)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)


def test_unit_scores_of_what_produces_and_normalized():
    groups = between(jax.nn.relu)
    tree = {"first": abs(draw(3, 6)), "last": abs(draw(6, 2))}
    made = dependency.unit_scores(groups, tree, entries="produced")["first"]
    np.testing.assert_allclose(made, tree["first"].sum(0), rtol=1e-6)
    scaled = dependency.unit_scores(groups, tree, normalize=lambda s: s / s.mean())["first"]
    assert scaled.mean() == pytest.approx(1)


def test_unit_scores_of_a_branch_and_of_half_precision():
    variables = {"params": {"a": draw(3, 6), "b": draw(6, 2)}}
    groups = dependency.trace(
        lambda v, x: x @ v["params"]["a"] @ v["params"]["b"], variables, draw(1, 3)
    )
    branch = jax.tree.map(np.abs, variables["params"])
    got = dependency.unit_scores(groups, branch)["params.a"]
    np.testing.assert_allclose(got, branch["a"].sum(0) + branch["b"].sum(1), rtol=1e-6)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), branch)
    np.testing.assert_allclose(dependency.unit_scores(groups, half)["params.a"], got, rtol=2e-2)


def test_unit_scores_refuse():
    groups = between(jax.nn.relu)
    good = {"first": draw(3, 6), "last": draw(6, 2)}
    with pytest.raises(ValueError, match="'other' is the path of none of them"):
        dependency.unit_scores(groups, {"other": draw(3, 6)})
    with pytest.raises(ValueError, match=r"at 'last' it is float32\[2,6\]"):
        dependency.unit_scores(groups, good | {"last": draw(2, 6)})
    bad = np.where(np.arange(18).reshape(3, 6) == 5, np.nan, good["first"])
    with pytest.raises(ValueError, match="`scores` must not be NaN: 1 of 18"):
        dependency.unit_scores(groups, good | {"first": bad})
    with pytest.raises(TypeError, match="traced array at 'first'"):
        jax.jit(lambda s: dependency.unit_scores(groups, s))(good)
    with pytest.raises(ValueError, match="`normalize` must keep the shape"):
        dependency.unit_scores(groups, good, normalize=np.sum)


def masks_of(first, bias=None, last=None):
    return {
        "first": np.asarray(first, bool)[None],
        "b": np.asarray(True) if bias is None else np.asarray(bias, bool),
        "last": np.asarray(True) if last is None else np.asarray(last, bool)[:, None],
    }


@pytest.fixture
def biased():
    variables = {"first": draw(3, 4), "b": draw(4), "last": draw(4, 2)}

    def build(activation):
        def apply(v, x):
            return activation(x @ v["first"] + v["b"][None]) @ v["last"]

        return dependency.trace(apply, variables, draw(1, 3))

    return build


def test_dead_units(biased):
    relu, sigmoid = biased(jax.nn.relu), biased(jax.nn.sigmoid)
    kept = [True, False, True, False]
    made = masks_of(kept, bias=kept)
    assert dependency.dead_units(relu, made)[0]["first"].tolist() == [False, True, False, True]
    # A sigmoid sends 0.5 of zero: what reads it must be masked, too.
    dead, hints = dependency.dead_units(sigmoid, made)
    assert not dead["first"].any()
    assert "may not read 0" in hints["first"]
    read = masks_of([True] * 4, last=kept)
    assert dependency.dead_units(sigmoid, read)[0]["first"].sum() == 2


def test_a_bias_keeps_a_unit_alive(biased):
    masks = masks_of([True, False, True, True])
    dead, hints = dependency.dead_units(biased(jax.nn.relu), masks)
    assert not dead["first"].any()
    assert "the weights of 1 units are masked, but b are not" in hints["first"]
    assert (
        dependency.dead_units(biased(jax.nn.relu), masks, approximate=True)[0]["first"].sum() == 1
    )


def test_labels_are_units_of_what_produces():
    case = CASES["resnet_basic-dict"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    tree = dependency.labels(groups, case.variables)
    flat = dict(zip((leaf.path for leaf in groups.leaves), jax.tree.leaves(tree), strict=True))
    for group in groups.values():
        for member in group.members:
            if member.produced:
                row = flat[member.path].ravel()
                assert (row[member.indices] == group.units[:, None]).all()


def test_group_lasso_drives_whole_units_to_zero():
    """Trained with the penalty, units are exactly zero, and cutting them changes nothing."""
    rng = np.random.default_rng(0)
    params = {"first": draw(3, 12) * 0.5, "b": draw(12) * 0.1, "last": draw(12, 1, seed=1) * 0.3}

    def apply(p, x):
        return jax.nn.relu(x @ p["first"] + p["b"][None]) @ p["last"]

    x = rng.normal(size=(64, 3)).astype(np.float32)
    y = jax.nn.relu(x[:, :1]) - jax.nn.relu(x[:, 1:2])
    groups = dependency.trace(apply, params, x)
    penalty = penalties.group_lasso(
        0.02, groups=dependency.labels(groups, params), prunable=filters.floating
    )
    tx = sj.proximal(optax.sgd(0.1), penalty, 0.1)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(500):
        params, state = step(params, state)
    masks = jax.tree.map(lambda w: np.asarray(w) != 0, params)
    plan = sj.shrinking.plan(groups, masks)
    assert 1 <= len(plan.removed["first"]) < 12
    small = sj.shrinking.shrink(params, plan)
    np.testing.assert_allclose(apply(small, x), apply(params, x), atol=1e-6)


def test_a_constant_couples_nothing():
    """A table that two layers share, a zero state of two scans: each may be cut in its own way."""
    table = np.cos(np.arange(32.0)).reshape(4, 8).astype(np.float32)
    variables = {"a": draw(3, 8), "b": draw(8, 5), "c": draw(5, 8), "d": draw(8, 2)}

    def tables(v, x):
        hidden = jax.nn.relu((x @ v["a"]) * table) @ v["b"] @ v["c"]
        return jax.nn.relu(hidden * table) @ v["d"]

    def scans(v, x):
        zero = jnp.zeros((4, 8))
        for one in (x @ v["a"], None):
            inner = one if one is not None else last @ v["b"] @ v["c"]  # noqa: F821
            last = lax.scan(lambda c, _, h=inner: (jnp.tanh(h + c), None), zero, length=3)[0]
        return last @ v["d"]

    for apply in (tables, scans):
        groups = dependency.trace(apply, variables, draw(4, 3))
        assert {name: group.size for name, group in groups.items()} == {"a": 8, "b": 5, "c": 8}
        scores = {name: np.arange(g.size) % 3 for name, g in groups.items()}
        plan = sj.shrinking.plan(groups, scores, sparsity=0.5)
        small = sj.shrinking.shrink(variables, plan)
        got = sj.shrinking.replay(apply, plan)(small, draw(4, 3))
        want = apply(sj.shrinking.expand(small, plan), draw(4, 3))
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_printing_locks_nothing():
    def shown(x):
        jax.debug.print("{}", x)
        return x

    assert units(between(shown)) == pairs(SAME)


def test_symbolic_sizes_are_refused_by_name(as_users_have_it):
    (batch,) = jax.export.symbolic_shape("b")
    with pytest.raises(ValueError, match="inputs must have sizes that are numbers"):
        dependency.trace(
            lambda v, x: x @ v, draw(3, 2), jax.ShapeDtypeStruct((batch, 3), jnp.float32)
        )
