"""Plans: which units go, what is left, JSON; and carrying them out on every kind of tree."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import CASES
from hypothesis import given
from hypothesis import strategies as st

import sparsejax as sj
from sparsejax import dependency, dynamic, schedules, shrinking

pytestmark = pytest.mark.usefixtures("quickly")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(*widths):
    """A chain of layers with biases; its groups are w0, w1, ..."""
    sizes = list(itertools.pairwise(widths))
    params = {f"w{i}": draw(*size, seed=i) for i, size in enumerate(sizes)}
    params |= {f"b{i}": draw(size[1], seed=9 + i) for i, size in enumerate(sizes)}

    def apply(p, x):
        for i in range(len(sizes)):
            x = x @ p[f"w{i}"] + p[f"b{i}"][None]
            x = jax.nn.relu(x) if i < len(sizes) - 1 else x
        return x

    return apply, params, dependency.trace(apply, params, draw(1, widths[0]))


APPLY, PARAMS, GROUPS = network(3, 10, 7, 2)
SCORES = {"w0": np.arange(10.0), "w1": np.arange(7.0) + 2.5}


def counts(plan):
    return {name: len(units) for name, units in plan.removed.items()}


@given(st.floats(0, 0.999))
def test_sparsity_removes_round_s_n_of_each_group(s):
    plan = shrinking.plan(GROUPS, SCORES, sparsity=s)
    for name, group in GROUPS.items():
        gone = min(round(s * group.size), group.size - 1)
        assert plan.removed.get(name, ()) == tuple(range(gone))


@given(st.floats(0, 0.999))
def test_global_sparsity_removes_round_s_n_of_all(s):
    plan = shrinking.plan(GROUPS, SCORES, sparsity=s, scope="global")
    ranked = sorted((x, name, i) for name, row in SCORES.items() for i, x in enumerate(row))
    gone = ranked[: round(s * 17)]
    for name, group in GROUPS.items():
        expected = tuple(sorted(i for _, n, i in gone if n == name))
        assert plan.removed.get(name, ()) == expected[: group.size - 1]


def test_ties_keep_the_lower_index():
    plan = shrinking.plan(GROUPS, {"w0": np.ones(10), "w1": np.ones(7)}, sparsity=0.3)
    assert plan.removed == {"w0": (7, 8, 9), "w1": (5, 6)}


@given(st.floats(0, 0.99), st.integers(1, 12), st.integers(1, 8))
def test_multiples_and_minimum(s, multiple, least):
    plan = shrinking.plan(GROUPS, SCORES, sparsity=s, multiple_of=multiple, min_units=least)
    for name, group in GROUPS.items():
        left = len(plan.kept(name))
        wanted = max(group.size - round(s * group.size), min(least, group.size))
        assert left == min(math.ceil(max(wanted, 1) / multiple) * multiple, group.size)


def test_multiples_count_indices_of_the_axis_that_owns_them():
    variables = {"a": draw(3, 24), "b": draw(12, 2)}

    def apply(v, x):  # a gate: every unit has two indices of `a`
        left, right = jnp.split(x @ v["a"], 2, -1)
        return left * right @ v["b"]

    groups = dependency.trace(apply, variables, draw(1, 3))
    plan = shrinking.plan(groups, {"a": np.arange(12.0)}, sparsity=0.5, multiple_of=8)
    assert plan.leaves["a"].small == (3, 16)


def test_keep():
    assert counts(shrinking.plan(GROUPS, SCORES, keep=4)) == {"w0": 6, "w1": 3}
    assert counts(shrinking.plan(GROUPS, SCORES, keep={"w1": 2})) == {"w1": 5}
    assert counts(shrinking.plan(GROUPS, SCORES, keep=100)) == {}


@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("scope", ["per_group", "global"])
@pytest.mark.parametrize("budget", [0.9, 0.5, 0.2])
def test_budgets_are_met_by_the_least_removal(kind, scope, budget):
    plan = shrinking.plan(GROUPS, SCORES, scope=scope, **{kind: budget})
    before, after = getattr(plan, kind)
    assert after <= budget * before
    total = sum(counts(plan).values())
    # The next smaller plan of the same family is over the budget.
    fractions = np.linspace(0, 0.999, 4000)
    smaller = [shrinking.plan(GROUPS, SCORES, scope=scope, sparsity=s) for s in fractions[::40]]
    rest = [p for p in smaller if sum(counts(p).values()) < total]
    assert all(getattr(p, kind)[1] > budget * before for p in rest)


def test_budgets_in_numbers_and_out_of_reach():
    plan = shrinking.plan(GROUPS, SCORES, params=60)
    assert plan.params[1] <= 60
    with pytest.raises(ValueError, match=r"`params` must leave room .* no less than \d+ of 133"):
        shrinking.plan(GROUPS, SCORES, params=3)
    with pytest.raises(ValueError, match=r"`flops` must be a fraction in \(0, 1\]"):
        shrinking.plan(GROUPS, SCORES, flops=50.0)


def test_predictions_are_those_of_the_small_network():
    for name in ("resnet_bottleneck-dict", "decoder_gqa_repeat-dict", "densenet-dict"):
        case = CASES[name]()
        groups = dependency.trace(case.apply, case.variables, *case.inputs)
        rng = np.random.default_rng(0)
        scores = {n: rng.normal(size=g.size) for n, g in groups.items()}
        plan = shrinking.plan(groups, scores, sparsity=0.4)
        small = shrinking.shrink(case.variables, plan)
        assert plan.params[1] == sum(x.size for x in jax.tree.leaves(small))
        again = dependency.trace(shrinking.replay(case.apply, plan), small, *case.inputs)
        assert plan.flops == (groups.flops, again.flops)


def test_scores_may_be_a_tree_or_units_or_masks():
    tree = sj.criteria.magnitude(PARAMS)
    by_tree = shrinking.plan(GROUPS, tree, sparsity=0.5)
    by_unit = shrinking.plan(GROUPS, dependency.unit_scores(GROUPS, tree), sparsity=0.5)
    assert by_tree == by_unit
    small = shrinking.expand(shrinking.shrink(PARAMS, by_tree), by_tree)
    masks = jax.tree.map(lambda w: w != 0, small)
    assert shrinking.plan(GROUPS, masks) == by_tree
    rounded = shrinking.plan(GROUPS, masks, multiple_of=4)
    assert {n: len(rounded.kept(n)) for n in GROUPS} == {"w0": 8, "w1": 4}


def test_channel_masks_need_their_biases():
    masks = sj.masking.topk(
        sj.criteria.magnitude(PARAMS), 0.5, granularity=sj.granularities.Channel(), scope="per_leaf"
    )
    plan = shrinking.plan(GROUPS, masks)
    assert not plan.removed
    assert "b0 are not; mask these too, or pass approximate=True" in plan.left["w0"]
    assert counts(shrinking.plan(GROUPS, masks, approximate=True)) == {"w0": 5, "w1": 4}


def test_only():
    assert counts(shrinking.plan(GROUPS, SCORES, sparsity=0.5, only="w0")) == {"w0": 5}
    assert counts(shrinking.plan(GROUPS, SCORES, sparsity=0.5, only=["*1"])) == {"w1": 4}
    case = CASES["vit-dict"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    bracketed = next(name for name in groups if "[" in name)
    scores = {name: np.arange(g.size) for name, g in groups.items()}
    assert list(shrinking.plan(groups, scores, sparsity=0.5, only=bracketed).removed) == [bracketed]


def test_layers_are_names_as_well():
    case = CASES["cnn-dict"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    scores = {name: np.arange(g.size) for name, g in groups.items()}
    layer = next(iter(groups)).rpartition(".")[0]
    one = shrinking.plan(groups, scores, keep={layer: 2})
    assert list(one.removed) == [f"{layer}.w"]
    assert list(shrinking.plan(groups, scores, sparsity=0.5, only=layer).removed) == [f"{layer}.w"]


def test_config_names_layers():
    plan = shrinking.plan(GROUPS, SCORES, sparsity=0.5)
    assert plan.config() == {"w0.features": (10, 5), "w1.features": (7, 3)}
    case = CASES["vit-linen"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    scores = {name: np.arange(g.size) for name, g in groups.items()}
    config = shrinking.plan(groups, scores, sparsity=0.5).config()
    assert any(name.endswith("query.features[0]") for name in config)
    assert any(name.endswith("query.features[1]") for name in config)


def test_json_round_trip():
    plan = shrinking.plan(GROUPS, SCORES, sparsity=0.5, multiple_of=2)
    text = plan.to_json()
    assert shrinking.Plan.from_json(text) == plan
    assert shrinking.Plan.from_json(text).to_json() == text
    assert shrinking.plan(GROUPS, SCORES, sparsity=0.5, multiple_of=2).to_json() == text
    small = shrinking.shrink(PARAMS, shrinking.Plan.from_json(text))
    assert small["w0"].shape == (3, 6)


def damage(change):
    content = json.loads(shrinking.plan(GROUPS, SCORES, sparsity=0.5).to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be the JSON of a plan"),
        ("[]", "its format is another"),
        ('{"format": "x"}', "its format is another"),
        (damage(lambda c: c.update(version=2)), "must have version 1, got 2"),
        (damage(lambda c: c.pop("leaves")), "damaged: KeyError"),
        (
            damage(lambda c: c["leaves"]["w0"].update(removed={"1": [99]})),
            "of leaf 'w0' do not rise",
        ),
        (damage(lambda c: c["leaves"]["w0"].update(removed={"7": [1]})), "'w0' has no axis 7"),
        (damage(lambda c: c["leaves"]["w0"].update(removed={"1": [2, 1]})), "do not rise"),
        (damage(lambda c: c["groups"]["w0"].update(removed=[0, 0])), "of group 'w0' do not rise"),
        (damage(lambda c: c["leaves"].pop("w0")), "its leaves keep"),
        (damage(lambda c: c.update(params=[1])), "damaged"),
        (damage(lambda c: c.update(groups=3)), "damaged"),
    ],
)
def test_damaged_json_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        shrinking.Plan.from_json(text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "`plan` needs one of sparsity, keep, flops, params, got none"),
        ({"sparsity": 0.5, "keep": 3}, ValueError, r"got \['sparsity', 'keep'\]"),
        ({"sparsity": 50}, ValueError, r"`sparsity` must be in \[0, 1\)"),
        ({"sparsity": 0.5, "scope": "all"}, ValueError, '`scope` must be "per_group" or "global"'),
        ({"sparsity": 0.5, "only": "conv*"}, ValueError, r"`only` must match a group, .* w0, w1"),
        ({"sparsity": 0.5, "min_units": 0}, ValueError, "`min_units` must be an integer of at"),
        ({"sparsity": 0.5, "multiple_of": 2.5}, ValueError, "`multiple_of` must be an integer"),
        ({"keep": 0}, ValueError, "`keep` must be an integer of at least 1"),
        (
            {"keep": {"x": 1}},
            ValueError,
            "`keep` must name groups that can be cut, got 'x'; there are 'w0', 'w1'",
        ),
        ({"keep": {"w0": 0}}, ValueError, r"`keep\['w0'\]` must be"),
        ({"params": 0}, ValueError, "`params` must be an integer of at least 1"),
    ],
)
def test_bad_options(as_users_have_it, options, error, message):
    with pytest.raises(error, match=message):
        shrinking.plan(GROUPS, SCORES, **options)


def test_bad_scores(as_users_have_it):
    with pytest.raises(TypeError, match=r"`groups` must be what dependency\.trace returned"):
        shrinking.plan({}, SCORES, sparsity=0.5)
    with pytest.raises(ValueError, match="'w0' has 10 units, got shape"):
        shrinking.plan(GROUPS, {"w0": np.ones(9)}, sparsity=0.5)
    with pytest.raises(ValueError, match="`scores` must not be NaN: 1 of 'w0'"):
        shrinking.plan(GROUPS, {"w0": np.full(10, 1.0) * [np.nan, *[1] * 9]}, sparsity=0.5)
    masks = jax.tree.map(lambda w: w != 0, PARAMS)
    with pytest.raises(ValueError, match="`scores` are masks"):
        shrinking.plan(GROUPS, masks, sparsity=0.5)
    with pytest.raises(ValueError, match="'other' is the path of none of them"):
        shrinking.plan(GROUPS, {"other": draw(3, 3)}, sparsity=0.5)


def test_nothing_to_cut():
    groups = dependency.trace(lambda p, x: x @ p, draw(3, 3), draw(1, 3))
    plan = shrinking.plan(groups, {}, sparsity=0.5)
    assert plan.params == (9, 9)
    assert shrinking.shrink(draw(3, 3), plan).shape == (3, 3)


# Carrying out.

PLAN = shrinking.plan(GROUPS, SCORES, sparsity=0.5)
SMALL = {"w0": (3, 5), "b0": (5,), "w1": (5, 3), "b1": (3,), "w2": (3, 2), "b2": (2,)}


def shapes(tree):
    return jax.tree.map(np.shape, tree)


def test_expand_restores_what_was_kept_bit_for_bit():
    special = jax.tree.map(np.copy, PARAMS)
    special["w0"][:, 9] = [np.nan, -0.0, np.inf]
    small = shrinking.shrink(special, PLAN)
    assert shapes(small) == SMALL
    full = shrinking.expand(small, PLAN)
    for path, mask in shrinking.masks(PLAN).items():
        kept = np.where(mask, special[path].view(np.int32), 0)
        np.testing.assert_array_equal(full[path].view(np.int32), kept)
    jax.tree.map(np.testing.assert_array_equal, shrinking.shrink(full, PLAN), small)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8, bool])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_dtypes_and_kinds_of_arrays_stay(dtype, make):
    tree = jax.tree.map(lambda x: make(np.asarray(x * 10).astype(dtype)), PARAMS)
    small = shrinking.shrink(tree, PLAN)
    full = shrinking.expand(small, PLAN)
    for one in (small, full):
        assert all(type(x) is type(tree["w0"]) for x in one.values())
        assert all(x.dtype == dtype for x in one.values())
    np.testing.assert_array_equal(small["w0"], tree["w0"][:, 5:])
    assert not np.asarray(full["w0"][:, :5]).any()


def test_under_jit_and_abstract():
    jitted = jax.jit(lambda p: shrinking.expand(shrinking.shrink(p, PLAN), PLAN))(PARAMS)
    eager = shrinking.expand(shrinking.shrink(PARAMS, PLAN), PLAN)
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)
    abstract = jax.eval_shape(lambda: PARAMS)
    assert shapes(shrinking.shrink(abstract, PLAN)) == SMALL
    assert shapes(shrinking.expand(shrinking.shrink(abstract, PLAN), PLAN)) == shapes(PARAMS)


def test_sharded_arrays():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = jax.tree.map(lambda x: jax.device_put(x, sharding), PARAMS)
    small = shrinking.shrink(tree, PLAN)
    assert len(small["w0"].devices()) == 2
    jax.tree.map(np.testing.assert_array_equal, small, shrinking.shrink(PARAMS, PLAN))


MASKS = jax.tree.map(lambda w: np.abs(w) > 0.3, PARAMS)
KEY = jax.random.key(0)
CUBIC = schedules.cubic(0.0, 0.9, 1, 100)
DROP = schedules.cosine(0.3, 0.0, begin_step=10, end_step=100)
SHARED = jax.tree.map(lambda w: np.ones((1,) * w.ndim, bool), PARAMS)
COSINE = optax.adam(optax.cosine_decay_schedule(1, 9))
KINDS = {k: k[0] for k in PARAMS}
STATES = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), COSINE),
    "ema": optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
    "masked": optax.masked(optax.adam(0.1), {k: k[0] == "w" for k in PARAMS}),
    "partition": optax.partition({"w": optax.adam(0.1), "b": optax.sgd(0.1)}, KINDS),
    "inject": optax.inject_hyperparams(optax.adam)(0.1),
    "lbfgs": optax.lbfgs(memory_size=4),
    "adafactor": optax.adafactor(0.1),
    "keep_masks": sj.keep_masks(optax.adam(0.1), MASKS),
    "channel masks": sj.keep_masks(optax.adam(0.1), SHARED),
    "penalized": sj.penalized(optax.adam(0.1), sj.penalties.l1(0.1), gradient_decay=0.9),
    "l1_prox": optax.chain(sj.l1_prox(0.1, 0.5), optax.sgd(0.5)),
    "gradual": dynamic.gradual(optax.adam(0.1), CUBIC),
    "rigl": dynamic.rigl(optax.adam(0.1), 0.5, DROP, key=KEY),
    "movement": dynamic.movement(optax.adam(0.1), CUBIC),
}  # fmt: skip


def numbered(x):
    if x.dtype == bool or not jnp.issubdtype(x.dtype, jnp.number):
        return x
    return jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)


@pytest.mark.parametrize("name", STATES)
def test_optimizer_states_become_those_of_the_small_params(name):
    """In structure and shape what `init` makes of small params; values are the kept ones."""
    tx = STATES[name]
    state = tx.init(jax.tree.map(jnp.asarray, PARAMS))
    filled = jax.tree.map(numbered, state)
    small = shrinking.shrink(filled, PLAN)
    if name not in ("keep_masks", "channel masks"):  # whose masks are those of the full params
        want = jax.eval_shape(tx.init, shrinking.shrink(PARAMS, PLAN))
        assert shapes(small) == jax.tree.map(lambda x: x.shape, want)
    back = shrinking.expand(small, PLAN)
    assert shapes(back) == shapes(state)
    again = shrinking.shrink(back, PLAN)
    for one, other in zip(jax.tree.leaves(small), jax.tree.leaves(again), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


def test_factored_moments_have_their_own_rule():
    _, params, groups = network(200, 300, 256, 2)
    tx = optax.adafactor(0.1)
    state = tx.init(jax.tree.map(jnp.asarray, params))
    scores = {"w0": np.arange(300.0), "w1": np.arange(256.0)}
    plan = shrinking.plan(groups, scores, keep={"w0": 280, "w1": 250})
    small = shrinking.shrink(state, plan)
    want = jax.eval_shape(tx.init, shrinking.shrink(params, plan))
    assert shapes(small) == jax.tree.map(lambda x: x.shape, want)
    assert shapes(shrinking.expand(small, plan)) == shapes(state)
    for keep in ({"w0": 100}, {"w0": 240}):  # too small to be factored; the largest axis another
        with pytest.raises(ValueError, match=r"a factored moment at '.*v_row.*tx.init\(small\)"):
            shrinking.shrink(state, shrinking.plan(groups, scores, keep=keep))


def test_states_that_cannot_be_cut_are_named():
    state = sj.l1_prox(0.1).init(jax.tree.map(jnp.asarray, PARAMS))
    with pytest.raises(ValueError, match="give the transform its learning rate"):
        shrinking.shrink(state, PLAN)
    with pytest.raises(ValueError, match=r"at 'w0' it is float32\[10,3\], the variable \(3, 10\)"):
        shrinking.shrink(PARAMS | {"w0": draw(10, 3)}, PLAN)
    with pytest.raises(ValueError, match=r"shapes after the cut: at 'b0' it is float32\[10\]"):
        shrinking.expand(PARAMS, PLAN)


def test_ensembles_and_whole_training_states():
    stacked = jax.tree.map(lambda x: np.stack([x] * 4), PARAMS)
    assert shrinking.shrink(stacked, PLAN)["w0"].shape == (4, 3, 5)
    whole = {"step": 3, "params": PARAMS, "ema": {"params": PARAMS}, "name": "run", "none": None}
    small = shrinking.shrink(whole, PLAN)
    assert shapes(small["ema"]["params"]) == SMALL
    assert (small["step"], small["name"], small["none"]) == (3, "run", None)


def test_branches_of_the_variables():
    """Linen's optimizer knows the params without the collection's name."""
    case = CASES["resnet_basic-linen"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    scores = {name: np.arange(g.size) for name, g in groups.items()}
    plan = shrinking.plan(groups, scores, sparsity=0.5)
    state = optax.adam(0.1).init(case.variables["params"])
    small = shrinking.shrink({"opt": state, "batch_stats": case.variables["batch_stats"]}, plan)
    params = shrinking.shrink(case.variables, plan)
    assert shapes(small["opt"][0].mu) == shapes(params["params"])
    assert shapes(small["batch_stats"]) == shapes(params["batch_stats"])


def test_training_goes_on_as_if_nothing_had_been_cut():
    """Cut in mid-training with Adam's state: the loss curve of the masked network, step by step."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2]], 1).astype(np.float32)

    def run(params, state, tx, steps):
        @jax.jit
        def step(params, state):
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((APPLY(p, x) - y) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        losses = []
        for _ in range(steps):
            params, state, loss = step(params, state)
            losses.append(float(loss))
        return params, state, losses

    tx = optax.adamw(3e-3)
    params, state, _ = run(jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS), tx, 50)
    plan = shrinking.plan(GROUPS, sj.criteria.magnitude(params), sparsity=0.4)
    small, small_state = (shrinking.shrink(tree, plan) for tree in (params, state))
    masked, masked_state = (shrinking.expand(t, plan) for t in (small, small_state))
    holding = sj.keep_masks(tx, shrinking.masks(plan))
    kept = holding.init(masked)._replace(inner=masked_state)
    *_, want = run(masked, kept, holding, 200)
    *_, got = run(small, small_state, tx, 200)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert want[-1] < 0.7 * want[0]


def test_what_a_norm_reads_is_not_dead():
    """All parameters that read a unit are masked; a mean or a product still does."""
    params = {"w": draw(3, 8), "o": draw(8, 2)}
    masks = {"w": np.ones((3, 8), bool), "o": np.arange(8)[:, None] != 3}

    def plain(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["o"]

    def summed(p, x):
        return plain(p, x) + jax.nn.relu(x @ p["w"]).sum(-1, keepdims=True)

    def squared(p, x):
        hidden = x @ p["w"]
        return (hidden @ hidden.T) @ hidden @ p["o"]

    for apply, gone in ((plain, 1), (summed, 0), (squared, 0)):
        groups = dependency.trace(apply, params, draw(4, 3))
        plan = shrinking.plan(groups, masks)
        assert len(plan.removed.get("w", ())) == gone
        masked = jax.tree.map(lambda w, m: np.where(m, w, 0), params, masks)
        got = shrinking.replay(apply, plan)(shrinking.shrink(masked, plan), draw(4, 3))
        np.testing.assert_allclose(got, apply(masked, draw(4, 3)), atol=1e-4)


def test_other_networks_in_the_same_tree_stay():
    variables = {"enc": {"w": draw(3, 16)}, "dec": {"w": draw(16, 2)}}
    groups = dependency.trace(lambda v, x: x @ v["enc"]["w"] @ v["dec"]["w"], variables, draw(1, 3))
    plan = shrinking.plan(groups, variables, keep=4)
    both = {"gen": variables, "disc": {"fc": {"w": draw(3, 16)}}}
    small = shrinking.shrink(both, plan)
    assert small["gen"]["enc"]["w"].shape == (3, 4)
    assert small["disc"]["fc"]["w"] is both["disc"]["fc"]["w"]


def test_states_in_other_shapes_are_refused():
    params = jax.tree.map(jnp.asarray, PARAMS)
    for tx, message in (
        (optax.sm3(0.1), "a piece of a variable at"),
        (optax.flatten(optax.adam(0.1)), "all variables as one vector at"),
    ):
        with pytest.raises(ValueError, match=message):
            shrinking.shrink(tx.init(params), PLAN)


def test_flat_dicts_named_like_groups():
    params = {"w": draw(3, 8)}
    groups = dependency.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["w"].T, params, draw(1, 3))
    assert counts(shrinking.plan(groups, sj.criteria.magnitude(params), sparsity=0.5)) == {"w": 4}
    masks = {"w": (np.arange(8) > 2)[None]}
    assert counts(shrinking.plan(groups, masks)) == {"w": 3}
    with pytest.raises(
        ValueError, match="`scores` must name groups, got 'ww'; there are 'w0', 'w1'"
    ):
        shrinking.plan(GROUPS, {"w0": np.ones(10), "ww": np.ones(7)}, sparsity=0.5)


@pytest.mark.parametrize("nothing", [None, {}, []])
def test_scores_of_nothing_are_refused(nothing):
    with pytest.raises(ValueError, match="`scores` must hold numbers"):
        shrinking.plan(GROUPS, nothing, sparsity=0.5)


def test_shrinking_twice_and_no_plan(as_users_have_it):
    with pytest.raises(ValueError, match="it has been shrunk already"):
        shrinking.shrink(shrinking.shrink(PARAMS, PLAN), PLAN)
    with pytest.raises(TypeError, match=r"`plan` must be a shrinking\.Plan"):
        shrinking.shrink(PLAN, PARAMS)


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(ValueError, match="`only` must match a group, got 'nope'"):
        shrinking.plan(GROUPS, SCORES, sparsity=0.5, only=["w0", "nope"])
