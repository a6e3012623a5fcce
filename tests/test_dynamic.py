"""`sparsejax.dynamic` against NumPy: which entries go and come, when, and what they are worth then.

The oracles follow the papers' formulas and sort stably; of the library they take nothing but the
params before a step, so that masks can be compared exactly.
"""

import functools
import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickly import as_shipped

import sparsejax as sj
from sparsejax import allocation, criteria, dynamic, filters, masking, schedules
from sparsejax.granularities import NM, Block, Channel

pytestmark = pytest.mark.usefixtures("quickly")

SHAPES = {"b": (3,), "s": (2, 3, 4), "w": (6, 5)}
CHOSEN = ("s", "w")
N = 54
STACK = filters.by_path("s")
KEY = jax.random.key(0)
RATE = np.float32(0.1)
SGD = optax.sgd(0.1)
SQUARE = {"w": (4, 4)}


# ---- a training run, and what is common to the oracles


class Step(NamedTuple):
    """One update: what went in and what came out, in NumPy."""

    number: int
    grads: Any
    before: Any
    state_before: Any
    after: Any
    state: Any

    @property
    def masks(self):
        return full(self.state.masks, self.after)

    @property
    def masks_before(self):
        return full(self.state_before.masks, self.after)


def normal(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def integers(seed, shapes=SHAPES):
    """Five different integers, zero among them, so that most entries tie."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-2, 3, shape).astype(np.float32) for name, shape in shapes.items()}


def full(masks, params):
    """Masks in the shapes of the params."""
    return jax.tree.map(lambda m, w: np.array(np.broadcast_to(m, np.shape(w))), masks, params)


def in_numpy(tree):
    """A copy."""
    return jax.tree.map(np.array, tree)


apply = jax.jit(optax.apply_updates)


def train(tx, steps, params=None, grads=normal, *, jit=False, start=None, **extra):
    """Runs `tx` with gradients that are a function of the step's number.

    Mostly not compiled, which takes a hundred times as long as these few steps.
    """
    update = as_shipped(tx.update) if jit else tx.update
    params = normal(100) if params is None else params
    state = tx.init(jax.tree.map(jnp.asarray, params))
    if start is not None:
        params = start(params, state)
    run = []
    for number in range(steps):
        g = grads(number)
        before = jax.tree.map(jnp.asarray, params)
        updates, new_state = update(g, state, before, **extra)
        params = apply(before, updates)
        run.append(Step(number, g, in_numpy(before), state, in_numpy(params), new_state))
        state = new_state
    return run


def assert_same(got, expected):
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def kept(masks, chosen=CHOSEN):
    return sum(int(masks[name].sum()) for name in chosen)


def best(scores, keep, chosen=CHOSEN):
    """Masks of the `keep` highest scores of the chosen leaves together; True elsewhere."""
    found = oracles.keep_largest([scores[name] for name in chosen], keep)
    masks = {name: np.ones(np.shape(leaf), bool) for name, leaf in scores.items()}
    return masks | dict(zip(chosen, found, strict=True))


def absolute(tree):
    return {name: np.abs(leaf) for name, leaf in tree.items()}


def cubic_formula(step, init, end, begin, last):
    t = min(max((step - begin) / (last - begin), 0), 1)
    return end + (init - end) * (1 - t) ** 3


def refresh_steps(begin, last, every):
    return {*range(begin, last, every), last}


def erk(shapes, keep):
    """RigL's densities, ε Σ shape / Π shape, at most 1; rounded to the total `keep`."""
    sizes, weights = [math.prod(s) for s in shapes], [sum(s) for s in shapes]
    dense = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        epsilon = Fraction(keep - sum(sizes[i] for i in dense), sum(weights[i] for i in free) or 1)
        over = {i for i in free if epsilon * weights[i] > sizes[i]}
        if not over:
            break
        dense |= over
    exact = [sizes[i] if i in dense else epsilon * weights[i] for i in range(len(shapes))]
    counts = [math.floor(x) for x in exact]
    order = sorted(range(len(shapes)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: keep - sum(counts)]:
        counts[i] += 1
    return counts


FACTORIES = {
    "gradual": lambda tx=SGD, **kw: dynamic.gradual(tx, 0.5, every=2, **kw),
    "set_": lambda tx=SGD, **kw: dynamic.set_(tx, 0.5, 0.3, key=KEY, every=2, **kw),
    "rigl": lambda tx=SGD, **kw: dynamic.rigl(tx, 0.5, 0.3, key=KEY, every=2, **kw),
    "straight_through": lambda tx=SGD, **kw: dynamic.straight_through(tx, 0.5, every=2, **kw),
    "movement": lambda tx=SGD, **kw: dynamic.movement(tx, 0.5, every=2, **kw),
}
each_factory = pytest.mark.parametrize("factory", FACTORIES)
each_mode = pytest.mark.parametrize("mode", ["eager", "jit"])


# ---- gradual


@pytest.mark.parametrize(
    ("every", "mode"), [(1, "eager"), (3, "eager"), (7, "eager"), (1000, "eager"), (3, "jit")]
)
def test_gradual_prunes_the_smallest_by_the_cubic_formula(every, mode):
    tx = dynamic.gradual(SGD, schedules.cubic(0.0, 0.9, 2, 12), every=every)
    expected = best(absolute(normal(100)), N)
    for step in train(tx, 15, jit=mode == "jit"):
        if step.number in refresh_steps(2, 12, every):
            removed = round(cubic_formula(step.number, 0.0, 0.9, 2, 12) * N)
            expected = best(absolute(step.before), N - removed)
        assert_same(step.masks, expected)


def test_gradual_keeps_the_lower_index_of_equal_magnitudes():
    tx = dynamic.gradual(optax.sgd(1.0), schedules.linear(0.0, 0.9, 0, 6), every=1)
    for step in train(tx, 7, integers(0), integers):
        removed = round(0.9 * step.number / 6 * N) if step.number < 6 else round(0.9 * N)
        assert_same(step.masks, best(absolute(step.before), N - removed))


def test_gradual_steps_obey_the_new_masks():
    tx = dynamic.gradual(SGD, schedules.cubic(0.0, 0.9, 0, 4), every=2)
    for step in train(tx, 6):
        for name, mask in step.masks.items():
            expected = np.where(mask, step.before[name] - RATE * step.grads[name], 0)
            np.testing.assert_allclose(step.after[name], expected, rtol=1e-6, atol=1e-7)
            assert not step.after[name][~mask].any()


@settings(max_examples=10)
@given(sparsity=st.floats(0, 1, exclude_max=True), every=st.integers(1, 5))
def test_gradual_ends_at_the_count_of_the_host(sparsity, every):
    tx = dynamic.gradual(SGD, schedules.cubic(0.0, sparsity, 0, 2), every=every)
    run = train(tx, 3)
    assert N - kept(run[-1].masks) == round(sparsity * N)


@pytest.mark.parametrize(("sparsity", "every"), [(0.7, 1), (0.98, 7), (0.9, 1000)])
def test_gradual_ends_at_the_count_of_the_host_jitted(sparsity, every):
    tx = dynamic.gradual(SGD, schedules.cubic(0.0, sparsity, 1, 9), every=every)
    assert N - kept(train(tx, 11, jit=True)[-1].masks) == round(sparsity * N)


def test_gradual_by_magnitude_has_nested_masks():
    tx = dynamic.gradual(optax.adam(0.1), schedules.cubic(0.0, 0.9, 0, 8), every=1)
    for step in train(tx, 9):
        for name in CHOSEN:
            assert not (step.masks[name] & ~step.masks_before[name]).any()


def test_gradual_leaves_masks_alone_between_refreshes():
    tx = dynamic.gradual(SGD, schedules.linear(0.0, 0.9, 0, 9), every=4)
    changed = [
        step.number
        for step in train(tx, 14)
        if any((step.masks[name] != step.masks_before[name]).any() for name in CHOSEN)
    ]
    assert changed == [4, 8, 9]


def test_gradual_of_a_number_prunes_all_in_the_first_step():
    run = train(dynamic.gradual(SGD, 0.6), 3)
    assert_same(run[0].masks, best(absolute(run[0].before), N - round(0.6 * N)))
    assert_same(run[2].masks, run[0].masks)


def test_gradual_does_not_prune_biases():
    run = train(dynamic.gradual(SGD, 0.98), 1)
    assert run[0].state.masks["b"].shape == () and run[0].masks["b"].all()


def lamp_scores(w):
    """θ_u² over the sum of the squares that are not smaller, by its definition."""
    square = w.astype(np.float64).ravel() ** 2
    return np.array([s / square[square >= s].sum() for s in square]).reshape(w.shape)


CRITERIA = {
    "gradient": (criteria.gradient, lambda w, g: absolute(g)),
    "taylor": (criteria.taylor, lambda w, g: {name: np.abs(w[name] * g[name]) for name in w}),
    "lamp": (
        criteria.lamp,
        lambda w, g: {n: np.where(x != 0, lamp_scores(x), 0) for n, x in w.items()},
    ),
    "random": (
        criteria.random(KEY),
        lambda w, g: {n: np.asarray(x) for n, x in criteria.random(KEY)(w, g).items()},
    ),
    "of one's own": (
        lambda w, g: jax.tree.map(jnp.negative, w),
        lambda w, g: {name: -x for name, x in w.items()},
    ),
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradual_prunes_the_lowest_scores_of_its_criterion(criterion):
    f, oracle = CRITERIA[criterion]
    tx = dynamic.gradual(SGD, schedules.linear(0.0, 0.8, 0, 4), criterion=f, every=2)
    for step in train(tx, 6):
        if step.number in (0, 2, 4):
            removed = round((0.0, 0, 0.4, 0, 0.8)[step.number] * N)
            expected = best(oracle(step.before, step.grads), N - removed)
        assert_same(step.masks, expected)


def test_gradual_by_gradient_lets_entries_come_back_from_zero():
    tx = dynamic.gradual(SGD, schedules.linear(0.5, 0.6, 0, 1), criterion=criteria.gradient)
    first, second = train(tx, 2)
    back = second.masks["w"] & ~first.masks["w"]
    assert back.any() and not second.before["w"][back].any()
    np.testing.assert_array_equal(second.after["w"][back], -RATE * second.grads["w"][back])


def test_gradual_scores_by_criterion_grads():
    other = normal(7)
    tx = dynamic.gradual(SGD, 0.5, criterion=criteria.gradient)
    (step,) = train(tx, 1, criterion_grads=other)
    assert_same(step.masks, best(absolute(other), N - N // 2))


def test_gradual_steps_by_the_gradients_not_by_criterion_grads():
    tx = dynamic.gradual(SGD, 0.5, criterion=criteria.gradient)
    (step,) = train(tx, 1, criterion_grads=normal(7))
    expected = np.where(step.masks["w"], step.before["w"] - RATE * step.grads["w"], 0)
    np.testing.assert_allclose(step.after["w"], expected, rtol=1e-6, atol=1e-7)


def test_gradual_per_leaf_prunes_each_leaf_alike():
    tx = dynamic.gradual(SGD, schedules.cubic(0.0, 0.7, 0, 4), scope="per_leaf", every=2)
    for step in train(tx, 5):
        if step.number % 2 == 0:
            sparsity = cubic_formula(step.number, 0.0, 0.7, 0, 4)
            for name in CHOSEN:
                w = np.abs(step.before[name])
                keep = w.size - round(sparsity * w.size)
                np.testing.assert_array_equal(
                    step.masks[name], oracles.keep_largest([w], keep)[0], err_msg=name
                )


@pytest.mark.parametrize("stacked", [None, STACK], ids=["leaves", "layers"])
def test_gradual_with_an_allocation_keeps_the_counts_of_each_layer(stacked):
    tx = dynamic.gradual(
        SGD,
        schedules.cubic(0.0, 0.8, 0, 4),
        allocation=allocation.erdos_renyi_kernel,
        stacked=stacked,
        every=2,
    )
    for step in train(tx, 5, jit=bool(stacked)):
        if step.number % 2 == 0:
            layers = [*step.before["s"]] if stacked else [step.before["s"]]
            masks = [*step.masks["s"]] if stacked else [step.masks["s"]]
            layers, masks = [*layers, step.before["w"]], [*masks, step.masks["w"]]
            keep = N - round(cubic_formula(step.number, 0.0, 0.8, 0, 4) * N)
            counts = erk([x.shape for x in layers], keep)
            for w, mask, count in zip(layers, masks, counts, strict=True):
                expected = oracles.keep_largest([np.abs(w)], count)[0]
                np.testing.assert_array_equal(mask, expected)


def test_gradual_per_leaf_prunes_each_layer_of_a_stack_alike():
    tx = dynamic.gradual(SGD, 0.7, scope="per_leaf", stacked=STACK)
    (step,) = train(tx, 1)
    for w, mask in zip(step.before["s"], step.masks["s"], strict=True):
        expected = oracles.keep_largest([np.abs(w)], 12 - round(0.7 * 12))[0]
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("sparsity", [0.4, 0.75])
def test_gradual_prunes_whole_blocks(sparsity):
    tx = dynamic.gradual(
        SGD, schedules.linear(0.0, sparsity, 0, 2), granularity=Block((2, 2), jnp.max)
    )
    step = train(tx, 3, normal(3, SQUARE), lambda t: normal(t, SQUARE))[-1]
    pooled = np.abs(step.before["w"]).reshape(2, 2, 2, 2).max((1, 3))
    expected = oracles.keep_largest([pooled], 4 - round(sparsity * 4))[0]
    np.testing.assert_array_equal(step.masks["w"], np.kron(expected, np.ones((2, 2), bool)))


@pytest.mark.parametrize("axis", [-1, 0])
def test_gradual_prunes_whole_channels(axis):
    tx = dynamic.gradual(SGD, 0.75, granularity=Channel(axis, pool=jnp.max))
    (step,) = train(tx, 1, normal(3, SQUARE), lambda t: normal(t, SQUARE), jit=axis == 0)
    pooled = np.abs(step.before["w"]).max(1 + axis)
    expected = oracles.keep_largest([pooled], 1)[0]
    assert step.state.masks["w"].shape == ((1, 4) if axis else (4, 1))
    np.testing.assert_array_equal(
        step.masks["w"], np.expand_dims(expected, 1 + axis) & np.ones((4, 4), bool)
    )


def test_gradual_prunes_what_prunable_selects():
    tx = dynamic.gradual(SGD, 0.5, prunable=filters.by_path("b", "w"))
    (step,) = train(tx, 1)
    assert_same(step.masks, best(absolute(step.before), 33 - round(16.5), ("b", "w")))


CYCLE = schedules.cyclical(0.5, 2, 10, sparse_steps=3, dense_steps=2)


def test_gradual_of_a_cyclical_schedule_alternates():
    run = train(dynamic.gradual(SGD, CYCLE, every=1000), 13)
    counts = [N - kept(step.masks) for step in run]
    assert counts == [0, 0, 27, 27, 27, 0, 0, 27, 27, 27, 27, 27, 27]


def test_gradual_of_a_cyclical_schedule_returns_entries_from_zero():
    step = train(dynamic.gradual(SGD, CYCLE, every=1000), 6)[5]
    back = ~step.masks_before["w"]
    assert back.any() and step.masks["w"].all()
    np.testing.assert_array_equal(step.after["w"][back], -RATE * step.grads["w"][back])


def test_gradual_of_a_cyclical_schedule_may_choose_others_in_the_next_phase():
    run = train(dynamic.gradual(optax.sgd(1.0), CYCLE, every=1000), 8)
    assert (run[7].masks["w"] != run[4].masks["w"]).any()


@pytest.mark.parametrize("every", [1, 3])
def test_gradual_of_a_plain_schedule_refreshes_on_and_on(every):
    schedule = optax.polynomial_schedule(0.0, 0.8, 3, 5)
    tx = dynamic.gradual(SGD, schedule, every=every)
    for step in train(tx, 9, jit=every == 3):
        if step.number % every == 0:
            removed = round(float(schedule(step.number)) * N)
            expected = best(absolute(step.before), N - removed)
        assert_same(step.masks, expected)


def test_gradual_of_a_plain_schedule_follows_changes_after_any_number_of_steps():
    tx = dynamic.gradual(SGD, lambda t: jnp.where(t < 6, 0.2, 0.7), every=2)
    counts = [N - kept(step.masks) for step in train(tx, 8)]
    assert counts == [11] * 6 + [38] * 2


ODD = {
    "e": jnp.zeros((0, 3)),
    "h": jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)), jnp.bfloat16),
    "i": jnp.arange(4).reshape(2, 2),
    "n": None,
    "w": jnp.asarray(normal(1, SQUARE)["w"]),
    "x": jnp.array(2.0),
}


def odd_grads(number):
    rng = np.random.default_rng(number)
    return {
        name: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        if name != "i"
        else jnp.zeros_like(leaf)
        for name, leaf in ODD.items()
        if leaf is not None
    } | {"n": None}


@each_factory
def test_wrapper_trains_a_tree_of_odd_leaves(factory):
    run = train(FACTORIES[factory](), 3, ODD, odd_grads)
    masks, last = run[-1].masks, run[-1].after
    assert kept(masks, ("h", "w")) == 14
    assert not last["h"][~masks["h"]].any() and not last["w"][~masks["w"]].any()


@each_factory
def test_wrapper_keeps_dtypes_and_leaves_that_do_not_train(factory):
    last = train(FACTORIES[factory](), 3, ODD, odd_grads)[-1].after
    assert last["h"].dtype == jnp.bfloat16 and last["n"] is None and last["e"].shape == (0, 3)
    assert last["i"].tolist() == [[0, 1], [2, 3]] and last["x"] != 2


def test_gradual_counts_bfloat16_and_float32_leaves_together():
    (step,) = train(dynamic.gradual(SGD, 0.5), 1, ODD, odd_grads)
    scores = {name: np.abs(np.asarray(ODD[name], np.float32)) for name in ("h", "w")}
    assert_same(step.masks, best(scores, 14, ("h", "w")))


# ---- rigl


def layers(tree, stacked):
    """The arrays that exchange entries among themselves."""
    return [*(tree["s"] if stacked else [tree["s"]]), tree["w"]]


def survivors(mask, w, fraction):
    """The active entries without the `round(fraction * n)` smallest magnitudes of them."""
    w, active = np.abs(w).ravel(), np.flatnonzero(mask)
    order = active[np.argsort(-w[active], kind="stable")]
    found = np.zeros(w.size, bool)
    found[order[: len(active) - round(fraction * len(active))]] = True
    return found.reshape(mask.shape)


def rigl_exchange(mask, w, g, fraction):
    """The survivors, and as many of the others as have gone, by |gradient|; NaN last."""
    stays = survivors(mask, w, fraction).ravel()
    others, g = np.flatnonzero(~stays), np.abs(g).ravel()
    order = others[np.lexsort((-np.nan_to_num(g[others], nan=0), np.isnan(g[others])))]
    stays[order[: int(mask.sum() - stays.sum())]] = True
    return stays.reshape(mask.shape)


def assert_exchanged(step, fraction, stacked=None):
    masks_before, masks = layers(step.masks_before, stacked), layers(step.masks, stacked)
    weights, grads = layers(step.before, stacked), layers(step.grads, stacked)
    for old, new, w, g in zip(masks_before, masks, weights, grads, strict=True):
        np.testing.assert_array_equal(new, rigl_exchange(old, np.where(old, w, 0), g, fraction))


def obeying(params, state):
    return sj.apply_masks(params, state.masks)


DROP = schedules.cosine(0.4, 0.0, 1, 9)


@each_mode
@pytest.mark.parametrize("draw", [normal, integers], ids=["normal", "ties"])
def test_rigl_drops_small_weights_and_grows_large_gradients(draw, mode):
    tx = dynamic.rigl(SGD, 0.6, DROP, key=KEY, every=3)
    for step in train(tx, 11, draw(100), draw, jit=mode == "jit", start=obeying):
        if step.number in (1, 4, 7, 9):  # not before its begin
            t = (step.number - 1) / 8
            assert_exchanged(step, 0.4 * (1 + math.cos(math.pi * t)) / 2)
        else:
            assert_same(step.masks, step.masks_before)


def test_rigl_really_exchanges_entries():
    tx = dynamic.rigl(SGD, 0.6, 0.4, key=KEY, every=1)
    for step in train(tx, 3, start=obeying):
        assert all((step.masks[name] != step.masks_before[name]).any() for name in CHOSEN)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_rigl_drops_the_rounded_fraction_of_each_layer(fraction):
    tx = dynamic.rigl(SGD, 0.6, fraction, key=KEY, every=1)
    for step in train(tx, 3, start=obeying):
        assert_exchanged(step, fraction)


def test_rigl_exchanges_within_each_layer_of_a_stack():
    tx = dynamic.rigl(SGD, 0.6, 0.4, key=KEY, every=2, stacked=STACK)
    for step in train(tx, 5, jit=True, start=obeying):
        if step.number % 2 == 0:
            assert_exchanged(step, 0.4, stacked=True)


def awkward_grads(number):
    """NaN, both infinities and the largest numbers, each several times."""
    tree, rng = normal(number), np.random.default_rng(number)
    for name in CHOSEN:
        flat = tree[name].reshape(-1)
        places = rng.choice(flat.size, 9, replace=False)
        flat[places] = [np.nan, np.nan, np.inf, -np.inf, np.inf, 1e-40, -0.0, 1e38, -1e38]
    return tree


def test_rigl_grows_infinite_gradients_first_and_nan_last():
    tx = dynamic.rigl(optax.set_to_zero(), 0.6, 0.4, key=KEY, every=1)
    for step in train(tx, 4, jit=True, grads=awkward_grads, start=obeying):
        assert_exchanged(step, 0.4)


def test_rigl_grows_a_zero_gradient_before_nan():
    tx = dynamic.rigl(optax.set_to_zero(), 0.5, 0.5, key=KEY, every=1)
    params, state = one_row(tx, [True, True, False, False], [2.0, 3.0, 0.0, 0.0])
    # One entry goes, the first; its gradient and the third's are NaN, the fourth's is 0.
    grads = {"w": jnp.array([[np.nan, 1.0, np.nan, 0.0]])}
    state = tx.update(grads, state, params)[1]
    assert state.masks["w"].tolist() == [[False, True, False, True]]


def one_row(tx, mask, w):
    """Params and state with masks of our own, of one layer with one row."""
    params = {"w": jnp.array([w], jnp.float32)}
    return params, tx.init(params)._replace(masks={"w": jnp.array([mask])})


def test_rigl_keeps_infinite_weights():
    tx = dynamic.rigl(optax.set_to_zero(), 0.5, 0.5, key=KEY, every=1)
    params, state = one_row(tx, [True, True, False, False], [2.0, -np.inf, 0.0, 0.0])
    state = tx.update({"w": jnp.array([[0.0, 0.0, 5.0, 1.0]])}, state, params)[1]
    assert state.masks["w"].tolist() == [[False, True, True, False]]


def test_rigl_drops_active_zeros_first():
    tx = dynamic.rigl(optax.set_to_zero(), 0.5, 0.5, key=KEY, every=1)
    params, state = one_row(tx, [True, True, False, False], [0.0, 1e-6, 0.0, 0.0])
    state = tx.update({"w": jnp.array([[0.0, 0.0, 1.0, 5.0]])}, state, params)[1]
    assert state.masks["w"].tolist() == [[False, True, False, True]]


def test_rigl_never_takes_a_pruned_zero_for_an_active_one():
    tx = dynamic.rigl(optax.set_to_zero(), 0.5, 0.0, key=KEY, every=1)
    params, state = one_row(tx, [False, False, True, True], [0.0] * 4)
    state = tx.update({"w": jnp.array([[5.0, 5.0, 0.0, 0.0]])}, state, params)[1]
    assert state.masks["w"].tolist() == [[False, False, True, True]]


def test_rigl_lets_what_has_just_gone_stay_with_its_value():
    tx = dynamic.rigl(optax.set_to_zero(), 0.5, 0.5, key=KEY, every=1)
    params, state = one_row(tx, [True, True, False, False], [2.0, 3.0, 0.0, 0.0])
    updates, state = tx.update({"w": jnp.array([[9.0, 0.0, 1.0, 1.0]])}, state, params)
    assert optax.apply_updates(params, updates)["w"].tolist() == [[2.0, 3.0, 0.0, 0.0]]


@pytest.mark.parametrize("factory", ["rigl", "set_"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("stacked", [None, STACK], ids=["leaves", "layers"])
def test_regrowing_draws_the_counts_of_erk(factory, sparsity, stacked):
    tx = getattr(dynamic, factory)(SGD, sparsity, 0.3, key=KEY, stacked=stacked)
    params = normal(100)
    masks = layers(full(tx.init(params).masks, params), stacked)
    keep = N - round(sparsity * N)
    assert [int(m.sum()) for m in masks] == erk([m.shape for m in masks], keep)


@pytest.mark.parametrize("factory", ["rigl", "set_"])
def test_regrowing_never_changes_the_active_number_of_a_layer(factory):
    tx = getattr(dynamic, factory)(SGD, 0.7, DROP, key=KEY, every=2)
    run = train(tx, 12)
    counts = {tuple(int(m.sum()) for m in layers(step.masks, None)) for step in run}
    counts.add(tuple(int(m.sum()) for m in layers(run[0].masks_before, None)))
    assert len(counts) == 1


@pytest.mark.parametrize("factory", ["rigl", "set_"])
def test_regrowing_shares_out_by_another_allocation(factory):
    tx = getattr(dynamic, factory)(SGD, 0.5, 0.3, key=KEY, allocation=allocation.uniform)
    masks = tx.init(normal(100)).masks
    assert [int(masks[name].sum()) for name in CHOSEN] == [12, 15]


@pytest.mark.parametrize("factory", ["rigl", "set_"])
def test_regrowing_draws_other_masks_for_another_key(factory):
    def masks(seed):
        tx = getattr(dynamic, factory)(SGD, 0.5, 0.3, key=jax.random.key(seed))
        return np.asarray(tx.init(normal(100)).masks["w"])

    np.testing.assert_array_equal(masks(3), masks(3))
    assert (masks(3) != masks(4)).any()


@pytest.mark.parametrize("factory", ["rigl", "set_"])
def test_regrowing_takes_legacy_keys(factory):
    tx = getattr(dynamic, factory)(SGD, 0.5, 0.3, key=jax.random.PRNGKey(0))
    assert kept(tx.init(normal(100)).masks) == 27


@pytest.mark.parametrize("factory", ["rigl", "set_"])
def test_regrowing_zeroes_dense_params_in_the_first_step(factory):
    tx = getattr(dynamic, factory)(SGD, 0.5, 0.3, key=KEY, every=2)
    first = train(tx, 1)[0]
    assert all(not first.after[name][~first.masks[name]].any() for name in CHOSEN)


def test_rigl_does_not_look_at_dense_values_of_pruned_entries():
    tx = dynamic.rigl(SGD, 0.5, 0.5, key=KEY, every=1)
    assert_exchanged(train(tx, 1)[0], 0.5)


@pytest.mark.parametrize("factory", ["rigl", "set_"])
def test_regrowing_starts_grown_weights_at_zero_and_moves_them_at_once(factory):
    tx = getattr(dynamic, factory)(SGD, 0.5, 0.5, key=KEY, every=1)
    for step in train(tx, 3, start=obeying):
        grown = step.masks["w"] & ~step.masks_before["w"]
        assert grown.any()
        np.testing.assert_array_equal(step.after["w"][grown], -RATE * step.grads["w"][grown])


def test_rigl_grows_by_criterion_grads():
    other = normal(7)
    tx = dynamic.rigl(SGD, 0.6, 0.4, key=KEY, every=1)
    (step,) = train(tx, 1, start=obeying, criterion_grads=other)
    assert_exchanged(step._replace(grads=other), 0.4)


ADAM = optax.adam(0.1)
INNER = {
    "adam": (ADAM, lambda state: state.inner[0]),
    "after a clip": (optax.chain(optax.clip(100.0), ADAM), lambda state: state.inner[1][0]),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(0.1),
        lambda state: state.inner.inner_state[0],
    ),
}


@functools.cache
def run_of_adam(inner, factory="rigl"):
    tx = getattr(dynamic, factory)(INNER[inner][0], 0.5, 0.4, key=KEY, every=2)
    return train(tx, 5, jit=inner == "adam", start=obeying)


@pytest.mark.parametrize("inner", INNER)
def test_rigl_resets_the_moments_of_what_has_grown_and_no_others(inner):
    get = INNER[inner][1]
    for step in run_of_adam(inner):
        old, new = get(step.state_before), get(step.state)
        for name, mask in step.masks.items():
            grown = mask & ~step.masks_before[name]
            g = np.where(mask, step.grads[name], 0)
            mu, nu = (np.where(grown, 0, m[name]) for m in (old.mu, old.nu))
            np.testing.assert_allclose(new.mu[name], 0.9 * mu + 0.1 * g, rtol=1e-4, atol=1e-8)
            np.testing.assert_allclose(
                new.nu[name], 0.999 * nu + 0.001 * g**2, rtol=1e-4, atol=1e-9
            )


def test_rigl_resets_moments_that_were_not_zero():
    # An entry that has trained, gone and come back: without a reset it would remember.
    again = 0
    for step in run_of_adam("adam"):
        for name in CHOSEN:
            grown = step.masks[name] & ~step.masks_before[name]
            again += int((grown & (np.asarray(step.state_before.inner[0].mu[name]) != 0)).sum())
    assert again > 0


def test_rigl_moves_grown_weights_by_a_step_without_memory():
    for step in run_of_adam("adam"):
        grown, t = step.masks["w"] & ~step.masks_before["w"], step.number + 1
        g = step.grads["w"][grown].astype(np.float64)
        mean, square = 0.1 * g / (1 - 0.9**t), 0.001 * g**2 / (1 - 0.999**t)
        expected = -0.1 * mean / (np.sqrt(square) + 1e-8)
        np.testing.assert_allclose(step.after["w"][grown], expected, rtol=1e-4)


def test_rigl_does_not_reset_the_count_of_steps():
    assert int(run_of_adam("adam")[-1].state.inner[0].count) == 5


def test_set_resets_the_moments_of_what_has_grown():
    for step in run_of_adam("adam", "set_"):
        grown = step.masks["w"] & ~step.masks_before["w"]
        g = step.grads["w"][grown]
        np.testing.assert_allclose(step.state.inner[0].mu["w"][grown], 0.1 * g, rtol=1e-5)


def test_rigl_resets_the_trace_of_momentum():
    tx = dynamic.rigl(optax.sgd(0.1, 0.9), 0.5, 0.4, key=KEY, every=2)
    for step in train(tx, 5, start=obeying):
        for name, mask in step.masks.items():
            grown = mask & ~step.masks_before[name]
            trace = np.where(grown, 0, step.state_before.inner[0].trace[name])
            expected = np.float32(0.9) * trace + np.where(mask, step.grads[name], 0)
            np.testing.assert_allclose(
                step.state.inner[0].trace[name], expected, rtol=1e-5, atol=1e-7
            )


def refreshed_at(run):
    """The steps that changed masks."""
    return [s.number for s in run if (s.masks["w"] != s.masks_before["w"]).any()]


def test_rigl_freezes_masks_after_a_drop_fraction_that_ends_at_zero():
    tx = dynamic.rigl(SGD, 0.5, schedules.cosine(0.9, 0.0, 0, 6), key=KEY, every=2)
    assert refreshed_at(train(tx, 14, start=obeying)) == [0, 2, 4]


def test_rigl_goes_on_after_a_drop_fraction_that_ends_above_zero():
    tx = dynamic.rigl(SGD, 0.5, schedules.cosine(0.4, 0.2, 0, 4), key=KEY, every=2)
    assert refreshed_at(train(tx, 11, start=obeying)) == [0, 2, 4, 6, 8, 10]


def test_rigl_of_a_constant_drop_fraction_goes_on():
    tx = dynamic.rigl(SGD, 0.5, 0.3, key=KEY, every=3)
    run = train(tx, 10, start=obeying)
    assert refreshed_at(run) == [0, 3, 6, 9]
    assert_exchanged(run[9], 0.3)


def test_rigl_takes_a_plain_function_as_its_drop_fraction():
    tx = dynamic.rigl(SGD, 0.5, lambda t: 0.5 / (1 + t), key=KEY, every=2)
    for step in train(tx, 5, jit=True, start=obeying):
        if step.number % 2 == 0:
            assert_exchanged(step, float(np.float32(0.5) / (1 + step.number)))


def test_rigl_takes_a_schedule_of_optax_as_its_drop_fraction():
    drop = optax.cosine_decay_schedule(0.4, 6)
    tx = dynamic.rigl(SGD, 0.5, drop, key=KEY, every=2)
    for step in train(tx, 5, start=obeying):
        if step.number % 2 == 0:
            assert_exchanged(step, float(drop(step.number)))


# ---- set_


@functools.cache
def run_of_set(seed=0, mode="jit"):
    tx = dynamic.set_(SGD, 0.6, 0.4, key=jax.random.key(seed), every=2)
    return train(tx, 5, jit=mode == "jit", start=obeying)


def test_set_drops_the_smallest_weights():
    for step in run_of_set()[::2]:
        for name in CHOSEN:
            stays = survivors(step.masks_before[name], step.before[name], 0.4)
            assert (step.masks[name] | ~stays).all()


def test_set_grows_other_entries_than_those_of_the_largest_gradients():
    step = run_of_set()[2]
    expected = rigl_exchange(step.masks_before["w"], step.before["w"], step.grads["w"], 0.4)
    assert (step.masks["w"] != expected).any()


def test_set_grows_others_at_every_refresh():
    tx = dynamic.set_(optax.set_to_zero(), 0.6, 0.99, key=KEY, every=1)
    found = {step.masks["w"].tobytes() for step in train(tx, 5, start=obeying)}
    assert len(found) == 5


def test_set_is_the_same_for_the_same_key():
    tx = dynamic.set_(SGD, 0.6, 0.4, key=jax.random.key(0), every=2)
    for one, other in zip(run_of_set(), train(tx, 5, start=obeying), strict=True):
        assert_same(one.masks, other.masks)


def test_set_grows_others_for_another_key():
    tx = [dynamic.set_(SGD, 0.6, 0.4, key=jax.random.key(seed), every=1) for seed in (0, 1)]
    params = obeying(normal(100), tx[0].init(normal(100)))
    state = tx[0].init(params)
    masks = [np.asarray(t.update(normal(0), state, params)[1].masks["w"]) for t in tx]
    assert (masks[0] != masks[1]).any()


def test_set_is_the_same_eager_and_jitted():
    for one, other in zip(run_of_set(mode="jit"), run_of_set(mode="eager"), strict=True):
        assert_same(one.masks, other.masks)


def test_set_grows_every_entry_that_is_not_active_with_equal_probability():
    tx = dynamic.set_(optax.set_to_zero(), 0.75, 0.5, key=KEY, every=1)
    params, state = one_row(tx, [True, True] + [False] * 6, [1.0, 2.0] + [0.0] * 6)
    update = jax.jit(lambda step: tx.update(params, state._replace(step=step), params)[1].masks)
    grown = np.asarray(jax.vmap(update)(jnp.arange(700, dtype=jnp.int32))["w"]).sum((0, 1))
    assert grown[1] == 700 and grown.sum() == 1400
    np.testing.assert_allclose(np.delete(grown, 1), 100, atol=40)  # 4 standard deviations


# ---- straight_through


def ulps(a, b, *like):
    """The largest difference in units of the last place of the largest number involved."""
    most = functools.reduce(np.maximum, [np.abs(x) for x in (a, b, *like)])
    return np.max(np.abs(a.astype(np.float64) - b) / np.spacing(most))


def towards(targets):
    """Gradients of half the squared distance, at the masked params."""
    return lambda params, number: {name: params[name] - targets(number)[name] for name in params}


class Straight:
    """Dense weights and masks in NumPy: gradients act on all, the network sees some."""

    def __init__(self, params, momentum=0.0, decay=0.0):
        self.dense = dict(params)
        self.masks = {name: np.ones(w.shape, bool) for name, w in params.items()}
        self.trace = {name: np.zeros_like(w) for name, w in params.items()}
        self.momentum, self.decay = np.float32(momentum), np.float32(decay)

    @property
    def params(self):
        return {name: np.where(self.masks[name], w, 0) for name, w in self.dense.items()}

    def step(self, grads, select=None):
        for name, w in self.dense.items():
            pruned = ~self.masks[name]
            g = grads[name] + self.decay * np.where(pruned, w, 0)
            self.trace[name] = g + self.momentum * self.trace[name]
            self.dense[name] = w - RATE * self.trace[name]
        if select:
            self.masks |= select(self.dense)


def half_of_each_step(dense):
    return best(absolute(dense), N - 27)


TARGETS = functools.cache(normal)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_straight_through_trains_dense_weights_by_gradients_at_masked_ones(momentum, every):
    tx = dynamic.straight_through(optax.sgd(0.1, momentum), 0.5, every=every)
    params = jax.tree.map(jnp.asarray, normal(100))
    state, update, oracle = tx.init(params), tx.update, Straight(normal(100), momentum)
    for number in range(10):
        grads = towards(TARGETS)(in_numpy(params), number)
        updates, state = update(grads, state, params)
        params = apply(params, updates)
        oracle.step(
            towards(TARGETS)(oracle.params, number),
            half_of_each_step if number % every == 0 else None,
        )
        assert_same(full(state.masks, oracle.dense), oracle.masks)
        for name in CHOSEN:
            np.testing.assert_allclose(state.dense[name], oracle.dense[name], rtol=1e-5, atol=1e-6)
        for name in SHAPES:
            np.testing.assert_allclose(params[name], oracle.params[name], rtol=1e-5, atol=1e-6)


@functools.cache
def run_of_straight(**options):
    tx = dynamic.straight_through(optax.sgd(0.3, 0.9), 0.5, **options)
    return train(tx, 10, jit=True)


def test_straight_through_keeps_the_largest_dense_weights():
    for step in run_of_straight():
        assert_same(step.masks, best(absolute(step.state.dense | {"b": step.after["b"]}), 27))


def test_straight_through_params_are_the_masked_dense_weights_within_one_rounding():
    for step in run_of_straight():
        for name in CHOSEN:
            dense, mask = np.asarray(step.state.dense[name]), step.masks[name]
            assert ulps(step.after[name][mask], dense[mask], step.before[name][mask]) <= 1


def test_straight_through_params_are_exactly_zero_where_pruned():
    for step in run_of_straight():
        assert all(not step.after[name][~step.masks[name]].any() for name in CHOSEN)


def test_straight_through_lets_entries_come_back_with_their_dense_value():
    back = 0
    for step in run_of_straight():
        returns = step.masks["w"] & ~step.masks_before["w"]
        dense = np.asarray(step.state.dense["w"])
        np.testing.assert_array_equal(step.after["w"][returns], dense[returns])
        back += returns.sum()
    assert back > 0


def test_straight_through_follows_a_schedule():
    tx = dynamic.straight_through(SGD, schedules.cubic(0.0, 0.9, 2, 6))
    counts = [N - kept(step.masks) for step in train(tx, 9)]
    expected = [round(cubic_formula(t, 0.0, 0.9, 2, 6) * N) for t in range(9)]
    assert counts == expected


def test_straight_through_refreshes_masks_after_the_end_of_its_schedule():
    tx = dynamic.straight_through(optax.sgd(1.0), schedules.cubic(0.0, 0.5, 0, 2), every=2)
    assert refreshed_at(train(tx, 9)) == [2, 4, 6, 8]


def test_straight_through_by_a_criterion_sees_dense_weights_and_gradients():
    tx = dynamic.straight_through(SGD, 0.5, criterion=criteria.taylor)
    for step in train(tx, 3):
        dense = {name: np.asarray(step.state.dense[name]) for name in CHOSEN}
        scores = {name: np.abs(dense[name] * step.grads[name]) for name in CHOSEN}
        assert_same({name: step.masks[name] for name in CHOSEN}, best(scores, 27))


def test_straight_through_scores_by_criterion_grads():
    tx = dynamic.straight_through(SGD, 0.5, criterion=criteria.gradient)
    (step,) = train(tx, 1, criterion_grads=normal(7))
    assert_same(step.masks, best(absolute(normal(7)), 27))


def test_straight_through_with_an_allocation_keeps_its_counts():
    tx = dynamic.straight_through(SGD, 0.6, allocation=allocation.erdos_renyi_kernel)
    step = train(tx, 2)[-1]
    counts = erk([SHAPES[name] for name in CHOSEN], N - round(0.6 * N))
    assert [int(step.masks[name].sum()) for name in CHOSEN] == counts


TALL = {"w": (8, 3)}


def two_of_four(w):
    """The two largest of every four consecutive entries of axis -2."""
    mask = np.zeros(w.shape, bool)
    for start in range(0, w.shape[0], 4):
        for column in range(w.shape[1]):
            group = np.abs(w[start : start + 4, column])
            mask[start + np.argsort(-group, kind="stable")[:2], column] = True
    return mask


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_straight_through_keeps_two_of_four(decay):
    tx = dynamic.straight_through(SGD, granularity=NM(2, 4, axis=-2), decay=decay)
    for step in train(tx, 6, normal(3, TALL), lambda t: normal(t, TALL), jit=decay > 0):
        expected = two_of_four(np.asarray(step.state.dense["w"]))
        np.testing.assert_array_equal(step.masks["w"], expected)


def test_straight_through_decays_pruned_weights_as_sr_ste():
    tx = dynamic.straight_through(SGD, granularity=NM(2, 4, axis=-2), decay=0.05)
    oracle = Straight(normal(3, TALL), decay=0.05)
    for step in train(tx, 8, normal(3, TALL), lambda t: normal(t, TALL)):
        oracle.step(step.grads, lambda dense: {"w": two_of_four(dense["w"])})
        np.testing.assert_allclose(step.state.dense["w"], oracle.dense["w"], rtol=1e-5, atol=1e-6)


def test_straight_through_takes_a_traced_decay():
    @jax.jit
    def dense_after(decay):
        tx = dynamic.straight_through(SGD, 0.5, decay=decay)
        state, params = tx.init(normal(100)), normal(100)
        for _ in range(2):
            updates, state = tx.update(normal(0), state, params)
            params = optax.apply_updates(params, updates)
        return state.dense["w"]

    oracle = Straight(normal(100), decay=0.5)
    for _ in range(2):
        oracle.step(normal(0), half_of_each_step)
    np.testing.assert_allclose(dense_after(0.5), oracle.dense["w"], rtol=1e-5, atol=1e-6)


def run_of_top_kast(**options):
    return run_of_straight(backward_sparsity=0.25, **options)


def test_straight_through_with_a_backward_sparsity_trains_the_largest_dense_weights():
    for step in run_of_top_kast():
        dense = {name: np.asarray(step.state.dense[name]) for name in CHOSEN}
        expected = best(absolute(dense), N - round(0.25 * N))
        assert_same({name: np.asarray(step.state.trained[name]) for name in CHOSEN}, expected)


def test_straight_through_backward_set_contains_the_forward_set():
    for step in run_of_top_kast():
        assert all((step.state.trained[name] | ~step.masks[name]).all() for name in CHOSEN)


def test_straight_through_does_not_move_what_is_outside_the_backward_set():
    still = 0
    for step in run_of_top_kast():
        for name in CHOSEN:
            outside = ~full(step.state_before.trained, step.after)[name]
            old, new = step.state_before.dense[name], step.state.dense[name]
            np.testing.assert_array_equal(new[outside], old[outside])
            still += outside.sum()
    assert still > 0


def test_straight_through_moves_what_is_inside_the_backward_set():
    for step in run_of_top_kast():
        for name in CHOSEN:
            inside = full(step.state_before.trained, step.after)[name]
            assert (step.state.dense[name] != step.state_before.dense[name])[inside].all()


@pytest.mark.usefixtures("as_users_have_it")
def test_straight_through_refuses_a_backward_sparsity_above_the_forward_one():
    with pytest.raises(ValueError, match=r"`backward_sparsity` must be at most .*0\.5, got 0\.9"):
        dynamic.straight_through(SGD, 0.5, backward_sparsity=0.9)


def test_straight_through_of_bfloat16_params_are_the_masked_dense_weights():
    params = {"w": jnp.asarray(normal(0, SQUARE)["w"], jnp.bfloat16)}
    tx = dynamic.straight_through(optax.sgd(0.5), 0.5)
    for step in train(
        tx, 6, params, lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), normal(t, SQUARE))
    ):
        expected = np.where(step.masks["w"], step.state.dense["w"], 0)
        assert step.after["w"].dtype == step.state.dense["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(step.after["w"], expected)


def test_straight_through_stores_nothing_of_leaves_that_are_not_prunable():
    assert dynamic.straight_through(SGD, 0.5).init(normal(0)).dense["b"].shape == ()


# ---- movement


@functools.cache
def run_of_movement(every=1):
    return train(dynamic.movement(SGD, 0.5, every=every), 8, jit=every == 1)


@pytest.mark.parametrize("every", [1, 3])
def test_movement_keeps_the_highest_sums_of_minus_gradient_times_weight(every):
    dense = normal(100)
    masks = {name: np.ones(w.shape, bool) for name, w in dense.items()}
    scores = {name: np.zeros(w.shape) for name, w in dense.items()}
    for step in run_of_movement(every):
        for name, w in dense.items():
            scores[name] -= step.grads[name].astype(np.float64) * w
            dense[name] = np.where(masks[name], w - RATE * step.grads[name], w)
        if step.number % every == 0:
            masks = best(scores, 27)
        assert_same(step.masks, masks)
        for name in CHOSEN:
            np.testing.assert_allclose(step.state.scores[name], scores[name], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(step.state.dense[name], dense[name], rtol=1e-5, atol=1e-6)


def test_movement_does_not_train_pruned_entries():
    for step in run_of_movement():
        pruned = ~step.masks_before["w"]
        old, new = step.state_before.dense["w"], step.state.dense["w"]
        np.testing.assert_array_equal(new[pruned], old[pruned])


def test_movement_returns_entries_with_the_value_they_had():
    value, back = {}, 0
    for step in run_of_movement():
        w, masks = step.after["w"], step.masks["w"]
        for place in zip(*np.nonzero(step.masks_before["w"] & ~masks), strict=True):
            value[place] = np.asarray(step.state.dense["w"])[place]
        for place in zip(*np.nonzero(masks & ~step.masks_before["w"]), strict=True):
            assert w[place] == value[place]
            back += 1
    assert back > 0


def test_movement_params_are_the_masked_dense_weights_within_one_rounding():
    for step in run_of_movement():
        for name in CHOSEN:
            dense, mask = np.asarray(step.state.dense[name]), step.masks[name]
            assert not step.after[name][~mask].any()
            assert ulps(step.after[name][mask], dense[mask], step.before[name][mask]) <= 1


def test_movement_accumulates_bfloat16_scores_in_float32():
    params = {"w": jnp.ones((1, 2), jnp.bfloat16)}
    tx = dynamic.movement(optax.set_to_zero(), 0.0)
    run = train(
        tx, 3, params, lambda t: {"w": jnp.array([[256.0, 1.0][t > 0] * np.ones(2)], jnp.bfloat16)}
    )
    assert run[-1].state.scores["w"].tolist() == [[-258.0, -258.0]]


def test_movement_follows_a_schedule():
    tx = dynamic.movement(SGD, schedules.cubic(0.0, 0.9, 2, 6))
    counts = [N - kept(step.masks) for step in train(tx, 9)]
    assert counts == [round(cubic_formula(t, 0.0, 0.9, 2, 6) * N) for t in range(9)]


# ---- all of them


@functools.cache
def jitted_run(factory):
    """Six steps, and how often they were traced."""
    traces, tx = [], FACTORIES[factory](optax.adamw(0.1, weight_decay=0.1))

    def update(*args):
        traces.append(args)
        return tx.update(*args)

    return train(tx._replace(update=update), 6, jit=True, start=obeying), len(traces)


@each_factory
def test_wrapper_has_exact_zeros_after_every_step(factory):
    for step in jitted_run(factory)[0]:
        assert all(not step.after[name][~step.masks[name]].any() for name in CHOSEN)


@each_factory
def test_wrapper_is_the_same_eager_and_jitted(factory):
    tx = FACTORIES[factory](optax.adamw(0.1, weight_decay=0.1))
    for one, other in zip(jitted_run(factory)[0], train(tx, 6, start=obeying), strict=True):
        assert_same(one.masks, other.masks)
        for name in SHAPES:
            np.testing.assert_allclose(one.after[name], other.after[name], rtol=1e-4, atol=1e-5)


@each_factory
def test_wrapper_does_not_trace_again(factory):
    assert jitted_run(factory)[1] == 1


@each_factory
def test_wrapper_counts_its_steps(factory):
    assert int(jitted_run(factory)[0][-1].state.step) == 6


def nan_where_pruned(tx, steps, *, jit=False):
    """A run whose gradients are NaN at what is pruned before each step."""
    params, update = normal(100), jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    params = obeying(params, state)
    for number in range(steps):
        masks = full(state.masks, normal(100))
        grads = {name: np.where(masks[name], g, np.nan) for name, g in normal(number).items()}
        updates, state = update(grads, state, params)
        params = apply(params, updates)
    return params, state


@pytest.mark.parametrize("factory", ["gradual", "set_", "rigl"])
def test_wrapper_takes_nan_gradients_of_pruned_entries(factory):
    # The refresh of `rigl` would grow some of them: there is nothing else to grow.
    tx = FACTORIES[factory](optax.adam(0.1))
    if factory == "set_":
        tx = dynamic.set_(optax.adam(0.1), 0.5, 0.0, key=KEY, every=2)
    if factory == "rigl":
        tx = dynamic.rigl(optax.adam(0.1), 0.5, 0.0, key=KEY, every=2)
    params, state = nan_where_pruned(tx, 4)
    assert all(np.isfinite(leaf).all() for leaf in params.values())
    dynamic.check(state, params)


def test_gradual_with_nan_gradients_of_pruned_entries_trains_as_without():
    tx = dynamic.gradual(optax.adam(0.1), 0.5)
    params, _ = nan_where_pruned(tx, 4)
    expected = train(tx, 4)[-1].after
    for name in SHAPES:
        np.testing.assert_array_equal(params[name], expected[name])


def test_movement_takes_nan_gradients_of_pruned_entries_jitted():
    params, state = nan_where_pruned(dynamic.movement(optax.adam(0.1), 0.5), 4, jit=True)
    assert all(np.isfinite(leaf).all() for leaf in params.values())
    dynamic.check(state, params)


@pytest.mark.parametrize("factory", ["movement", "straight_through"])
def test_dense_wrapper_says_where_it_sees_nan_gradients_of_pruned_entries(factory):
    """They are used; jitted, such an entry ranks lowest."""
    with pytest.raises(ValueError, match="`scores` must not be NaN"):
        nan_where_pruned(FACTORIES[factory](), 4)


@each_factory
def test_wrapper_passes_extra_arguments_on(factory):
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(sorted(extra))
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, params = FACTORIES[factory](probe), normal(0)
    tx.update(normal(1), tx.init(params), params, value=3.0)
    assert seen == [["value"]]


@each_factory
def test_wrapper_survives_donation_of_params_and_state(factory):
    tx = FACTORIES[factory](ADAM)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, normal(100))
    state = tx.init(params)
    for number in range(3):
        params, state = step(params, state, normal(number))
    expected = train(tx, 3)[-1].after
    for name in SHAPES:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)


@each_factory
def test_wrapper_zeroes_dense_params_between_refreshes(factory):
    tx = FACTORIES[factory]()
    params = normal(100)
    updates, state = tx.update(normal(0), tx.init(params), params)
    updates, state = tx.update(normal(1), state, params)  # dense again, as if restored by mistake
    after = apply(params, updates)
    masks = full(state.masks, params)
    assert all(not np.asarray(after[name])[~masks[name]].any() for name in CHOSEN)


# ---- masks


PLACES = {
    "alone": lambda tx: tx,
    "last of a chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "named chain": lambda tx: optax.named_chain(("a", optax.clip(1.0)), ("b", tx)),
}


@pytest.mark.parametrize("place", PLACES)
def test_masks_finds_the_state_of_a_wrapper(place):
    tx, params = PLACES[place](dynamic.gradual(SGD, 0.5)), jax.tree.map(jnp.asarray, normal(100))
    _, state = tx.update(normal(0), tx.init(params), params)
    assert_same(full(dynamic.masks(state), params), best(absolute(normal(100)), 27))


def test_masks_finds_a_wrapper_inside_inject_hyperparams():
    @optax.inject_hyperparams
    def make(learning_rate):
        return dynamic.gradual(optax.sgd(learning_rate), 0.5)

    tx, params = make(0.1), jax.tree.map(jnp.asarray, normal(100))
    _, state = tx.update(normal(0), tx.init(params), params)
    assert_same(full(dynamic.masks(state), params), best(absolute(normal(100)), 27))


@each_factory
def test_masks_are_like_the_params(factory):
    params = normal(100)
    state = FACTORIES[factory](optax.inject_hyperparams(optax.adam)(0.1)).init(params)
    assert jax.tree.structure(dynamic.masks(state)) == jax.tree.structure(params)


def test_masks_reads_keep_masks():
    masks = masking.topk(criteria.magnitude(normal(100)), 0.5)
    state = sj.keep_masks(SGD, masks).init(normal(100))
    assert_same(dynamic.masks(state), masks)


def test_masks_of_nested_wrappers_are_the_outermost():
    masks = masking.topk(criteria.magnitude(normal(100)), 0.5)
    tx = dynamic.gradual(sj.keep_masks(SGD, masks), 0.8)
    assert all(np.asarray(m).all() for m in jax.tree.leaves(dynamic.masks(tx.init(normal(100)))))


@pytest.mark.parametrize("read", [dynamic.masks, dynamic.check])
def test_masks_refuses_a_state_without_any(read):
    with pytest.raises(ValueError, match=r"`state` must hold .*a transform with masks .*got 0"):
        read(ADAM.init(normal(0)))


@pytest.mark.parametrize("read", [dynamic.masks, dynamic.check])
def test_masks_refuses_a_state_with_several(read):
    tx = optax.chain(dynamic.gradual(SGD, 0.5), dynamic.gradual(SGD, 0.5))
    with pytest.raises(ValueError, match=r"`state` must hold one transform .*got 2 that share"):
        read(tx.init(normal(0)))


@pytest.mark.parametrize("state", [None, (), {"w": 1.0}])
def test_masks_refuses_what_is_no_state(state):
    with pytest.raises(ValueError, match=r"`state` must hold .*got 0"):
        dynamic.masks(state)


# ---- check


@each_factory
def test_check_passes_after_every_step(factory):
    for step in jitted_run(factory)[0]:
        dynamic.check(step.state, step.after)


@each_factory
def test_check_passes_without_params(factory):
    dynamic.check(jitted_run(factory)[0][-1].state)


def test_check_passes_under_multi_steps():
    tx, params = optax.MultiSteps(FACTORIES["gradual"](), 2), jax.tree.map(jnp.asarray, normal(100))
    state, update = tx.init(params), jax.jit(tx.update)
    for number in range(6):
        updates, state = update(normal(number), state, params)
        params = apply(params, updates)
    dynamic.check(state, params)


def test_check_names_the_path_and_the_count():
    step = train(dynamic.gradual(SGD, 0.5), 1)[0]
    params = {"net": step.after}
    tx = dynamic.gradual(SGD, 0.5)
    _, state = tx.update({"net": normal(0)}, tx.init({"net": normal(100)}), {"net": normal(100)})
    places = np.argwhere(~step.masks["w"])[:2]
    params["net"]["w"][tuple(places.T)] = 1e-30
    with pytest.raises(ValueError, match=r"`params` must be zero .* 2 of 30 .* at 'net\.w': "):
        dynamic.check(state, params)


def test_check_counts_nan_as_not_zero():
    step = train(dynamic.gradual(SGD, 0.5), 1)[0]
    step.after["s"][~step.masks["s"]] = np.nan
    with pytest.raises(ValueError, match=r"`params` must be zero .* at 's'"):
        dynamic.check(step.state, step.after)


def test_check_says_is_of_one_entry():
    step = train(dynamic.gradual(SGD, 0.5), 1)[0]
    step.after["w"][tuple(np.argwhere(~step.masks["w"])[0])] = 1
    with pytest.raises(ValueError, match="but 1 of 30 entries is not"):
        dynamic.check(step.state, step.after)


OUTER = {
    "clip": optax.clip(1e-3),
    "ema": optax.ema(0.9),
    "scale": optax.scale(0.5),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_check_remembers_what_an_outer_transform_held_back(outer, mode):
    tx = optax.chain(dynamic.gradual(SGD, schedules.one_shot(0.5, 1)), OUTER[outer])
    run = train(tx, 3, jit=mode == "jit")
    dynamic.check(run[0].state)
    assert int(run[2].state[0].leaked) > 0
    with pytest.raises(ValueError, match=r"`state` remembers \d+ pruned entries .*outermost"):
        dynamic.check(run[2].state)


def test_check_still_remembers_when_the_params_have_come_to_obey():
    tx = optax.chain(dynamic.gradual(SGD, 0.5), optax.clip(0.5))
    run = train(tx, 40, grads=normal)
    masks = full(run[-1].state[0].masks, run[-1].after)
    assert all(not run[-1].after[name][~masks[name]].any() for name in CHOSEN)
    with pytest.raises(ValueError, match="`state` remembers"):
        dynamic.check(run[-1].state, run[-1].after)


@pytest.mark.parametrize("factory", ["rigl", "set_"])
def test_check_forgives_dense_params_given_to_the_first_update(factory):
    run = train(FACTORIES[factory](), 5)
    dynamic.check(run[-1].state, run[-1].after)


# ---- errors

MAKERS = {
    "gradual": lambda optimizer=SGD, schedule=0.5, **kw: dynamic.gradual(optimizer, schedule, **kw),
    "set_": lambda optimizer=SGD, sparsity=0.5, drop_fraction=0.3, key=KEY, **kw: dynamic.set_(
        optimizer, sparsity, drop_fraction, key=key, **kw
    ),
    "rigl": lambda optimizer=SGD, sparsity=0.5, drop_fraction=0.3, key=KEY, **kw: dynamic.rigl(
        optimizer, sparsity, drop_fraction, key=key, **kw
    ),
    "straight_through": lambda optimizer=SGD, schedule=0.5, **kw: dynamic.straight_through(
        optimizer, schedule, **kw
    ),
    "movement": lambda optimizer=SGD, schedule=0.5, **kw: dynamic.movement(
        optimizer, schedule, **kw
    ),
}
SCHEDULED, REGROWING = ("gradual", "straight_through", "movement"), ("set_", "rigl")
ALL = (*SCHEDULED, *REGROWING)
TREE = {"b": False, "w": True}
A_FRACTION = r"`{}` must be in \[0, 1\) \(a fraction, not a percentage\), got "
A_NUMBER = "`{}` must be one real number, got "
A_SCHEDULE = r"`{}` must be a number or a schedule \(step -> number\), got "
A_FUNCTION = r"`{}` must be a function "
A_FILTER = r"`{}` must be a function \(path, leaf\) -> bool, got "

# (which factories, what they are given, the error, a pattern of its message)
ARGUMENTS = [
    (
        ALL,
        {"optimizer": 3},
        TypeError,
        "`optimizer` must be an optax.GradientTransformation .*got 3",
    ),
    (
        ALL,
        {"optimizer": optax.adam},
        TypeError,
        r"`optimizer` .*call it first: optax\.adam\(1e-3\)",
    ),
    (ALL, {"every": 0}, ValueError, "`every` must be an integer from 1 .*got 0"),
    (ALL, {"every": -3}, ValueError, "`every` must be an integer from 1 .*got -3"),
    (ALL, {"every": 1.5}, TypeError, r"`every` must be one integer, got 1\.5"),
    (ALL, {"every": True}, TypeError, "`every` must be one integer, got True"),
    (ALL, {"prunable": TREE}, TypeError, A_FILTER.format("prunable")),
    (ALL, {"stacked": TREE}, TypeError, A_FILTER.format("stacked")),
    (ALL, {"allocation": 0.5}, TypeError, A_FUNCTION.format("allocation") + r"\(layers, keep\)"),
    (SCHEDULED, {"schedule": 90}, ValueError, A_FRACTION.format("schedule") + "90"),
    (SCHEDULED, {"schedule": 1.0}, ValueError, A_FRACTION.format("schedule") + r"1\.0"),
    (SCHEDULED, {"schedule": -0.1}, ValueError, A_FRACTION.format("schedule") + r"-0\.1"),
    (SCHEDULED, {"schedule": math.nan}, ValueError, "`schedule` must be a number, got nan"),
    (SCHEDULED, {"schedule": "0.5"}, TypeError, A_SCHEDULE.format("schedule") + "'0.5'"),
    (SCHEDULED, {"schedule": [0.5]}, TypeError, A_SCHEDULE.format("schedule")),
    (SCHEDULED, {"schedule": True}, TypeError, A_NUMBER.format("schedule")),
    (
        SCHEDULED,
        {"schedule": schedules.cool_down(lambda t: 1.5, 3)},
        ValueError,
        r"`schedule` must stay in \[0, 1\) .*got 1\.5 at step",
    ),
    (SCHEDULED, {"scope": "layer"}, ValueError, '`scope` must be "global" or "per_leaf", got'),
    (
        SCHEDULED,
        {"scope": "global", "allocation": allocation.uniform},
        ValueError,
        '`scope` must be "per_leaf" .*with an `allocation`',
    ),
    (
        SCHEDULED,
        {"schedule": lambda t: 0.5, "allocation": allocation.uniform},
        ValueError,
        r"`allocation` needs counts .*`{}` got a schedule without an end, .*cool_down\(schedule",
    ),
    (
        SCHEDULED,
        {"granularity": "block"},
        TypeError,
        "`granularity` must be a value of .*got 'block'",
    ),
    (SCHEDULED, {"granularity": Channel}, TypeError, "`granularity` must be a value of "),
    (SCHEDULED, {"granularity": None}, TypeError, "`granularity` must be a value of .*got None"),
    (
        ("gradual",),
        {"granularity": NM(2, 4)},
        ValueError,
        r"`granularity` must have no sparsity of its own, .*straight_through\(optimizer",
    ),
    (("gradual", "straight_through"), {"criterion": 3}, TypeError, A_FUNCTION.format("criterion")),
    (
        ("gradual", "straight_through"),
        {"criterion": criteria.random},
        TypeError,
        r"`criterion` must be .*call it first, criteria\.random\(jax\.random\.key\(0\)\)",
    ),
    (
        ("straight_through",),
        {"backward_sparsity": 50},
        ValueError,
        A_FRACTION.format("backward_sparsity") + "50",
    ),
    (
        ("straight_through",),
        {"backward_sparsity": "a"},
        TypeError,
        A_NUMBER.format("backward_sparsity"),
    ),
    (
        ("straight_through",),
        {"schedule": None, "granularity": NM(2, 4), "backward_sparsity": 0.5},
        ValueError,
        r"`backward_sparsity` must be left out with `granularity` = NM\(.*got 0\.5",
    ),
    (("straight_through",), {"decay": -1.0}, ValueError, r"`decay` must be >= 0, got -1\.0"),
    (("straight_through",), {"decay": "a"}, TypeError, A_NUMBER.format("decay")),
    (("straight_through",), {"decay": math.nan}, ValueError, "`decay` must be a number, got nan"),
    (REGROWING, {"sparsity": 90}, ValueError, A_FRACTION.format("sparsity") + "90"),
    (REGROWING, {"sparsity": "0.5"}, TypeError, A_NUMBER.format("sparsity")),
    (REGROWING, {"sparsity": schedules.constant(0.5)}, TypeError, A_NUMBER.format("sparsity")),
    (REGROWING, {"drop_fraction": 30}, ValueError, A_FRACTION.format("drop_fraction") + "30"),
    (REGROWING, {"drop_fraction": 1.0}, ValueError, A_FRACTION.format("drop_fraction")),
    (REGROWING, {"drop_fraction": "a"}, TypeError, A_SCHEDULE.format("drop_fraction")),
    (REGROWING, {"drop_fraction": None}, TypeError, A_SCHEDULE.format("drop_fraction")),
    (REGROWING, {"allocation": None}, TypeError, "`allocation` must be a function"),
    (REGROWING, {"key": 0}, TypeError, "`key` must be "),
    (REGROWING, {"key": None}, TypeError, "`key` must be "),
    (REGROWING, {"key": jax.random.split(KEY, 2)}, (TypeError, ValueError), "`key` must be "),
]
# What is refused in words that do not help; each is a defect.
UNHELPFUL = [
    (("gradual", "movement"), {"schedule": None}, (TypeError, ValueError), "`schedule` must be "),
    (("straight_through",), {"schedule": None}, ValueError, "`schedule` must be given"),
    (
        ("straight_through",),
        {"schedule": 0.5, "granularity": NM(2, 4)},
        ValueError,
        r"`schedule` must be left out with `granularity` = NM.*got 0\.5",
    ),
    (("movement",), {"granularity": NM(2, 4)}, ValueError, "`granularity` must have no sparsity"),
    (
        REGROWING,
        {"drop_fraction": schedules.cool_down(lambda t: 1.5, 3)},
        ValueError,
        r"`drop_fraction` must stay in \[0, 1\) .*got 1\.5 at step",
    ),
]


def rows(table):
    return [
        pytest.param(
            name, given, error, pattern.replace("{}", name), id=f"{name}-{i}-{'-'.join(given)}"
        )
        for i, (names, given, error, pattern) in enumerate(table)
        for name in names
    ]


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("name", "given", "error", "pattern"), rows(ARGUMENTS))
def test_wrapper_refuses_an_argument(name, given, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}"):
        MAKERS[name](**given).init(normal(0))


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("name", "given", "error", "pattern"), rows(UNHELPFUL))
def test_wrapper_refuses_an_argument_in_its_own_words(name, given, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}"):
        MAKERS[name](**given).init(normal(0))


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("factory", SCHEDULED)
def test_wrapper_refuses_a_traced_sparsity(factory):
    with pytest.raises(TypeError, match="`schedule` must be known before tracing"):
        jax.jit(lambda s: MAKERS[factory](schedule=s).init(normal(0)))(0.5)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("factory", REGROWING)
def test_regrowing_refuses_a_traced_sparsity(factory):
    with pytest.raises(ValueError, match=r"`sparsity` .*known before tracing"):
        jax.jit(lambda s: MAKERS[factory](sparsity=s).init(normal(0)))(0.5)


@each_factory
def test_wrapper_refuses_an_update_without_params(factory):
    tx = FACTORIES[factory]()
    pattern = rf"`{factory}` needs the current parameters: call update\(grads, state, params\)"
    with pytest.raises(ValueError, match=pattern):
        tx.update(normal(0), tx.init(normal(100)))


@pytest.mark.usefixtures("as_users_have_it")
@each_factory
def test_wrapper_refuses_the_state_of_another_transform(factory):
    tx = FACTORIES[factory]()
    with pytest.raises(TypeError, match=rf"`{factory}` needs its own state, a \w+State, got "):
        tx.update(normal(0), ADAM.init(normal(100)), normal(100))


@each_factory
def test_wrapper_refuses_gradients_of_another_shape(factory):
    tx, grads = FACTORIES[factory](), {"net": normal(0) | {"w": np.ones((5, 6), np.float32)}}
    params = {"net": normal(100)}
    pattern = r"`updates` must have the shapes of `params`: at 'net\.w' it is float32\[5,6\]"
    with pytest.raises(ValueError, match=pattern):
        tx.update(grads, tx.init(params), params)


@each_factory
def test_wrapper_refuses_gradients_of_another_structure(factory):
    tx, params = FACTORIES[factory](), {"net": normal(100)}
    grads = {"net": {name: normal(0)[name] for name in CHOSEN}}
    pattern = r"`updates` must have the structure of `params`: `params` has a leaf at 'net\.b'"
    with pytest.raises(ValueError, match=pattern):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("factory", ["gradual", "rigl"])
def test_wrapper_refuses_criterion_grads_of_another_shape(factory):
    tx, params = FACTORIES[factory](), normal(100)
    other = normal(0) | {"w": np.ones((5, 6), np.float32)}
    with pytest.raises(ValueError, match=r"grads` must have the shapes of `params`: at 'w'"):
        tx.update(normal(0), tx.init(params), params, criterion_grads=other)


@pytest.mark.parametrize("factory", ["gradual", "rigl"])
def test_wrapper_refuses_to_score_a_leaf_without_gradient(factory):
    options = {"criterion": criteria.gradient} if factory == "gradual" else {}
    tx, params = FACTORIES[factory](**options), normal(100)
    with pytest.raises(ValueError, match=r"`criterion` gave no score for the prunable leaf 'w'"):
        tx.update(normal(0) | {"w": None}, tx.init(params), params)


def test_gradual_refuses_scores_of_another_shape():
    tx = dynamic.gradual(SGD, 0.5, criterion=lambda w, g: jax.tree.map(jnp.sum, w))
    with pytest.raises(ValueError, match="`scores` must have the shapes of `params`: at 's'"):
        tx.update(normal(0), tx.init(normal(100)), normal(100))


def test_gradual_refuses_nan_scores_that_it_can_see():
    tx = dynamic.gradual(SGD, 0.5, criterion=criteria.gradient)
    grads = normal(0)
    grads["w"][0, 0] = np.nan
    with pytest.raises(ValueError, match="`scores` must not be NaN: 1 of 30 entries are, at 'w'"):
        tx.update(grads, tx.init(normal(100)), normal(100))


@pytest.mark.parametrize("factory", MAKERS)
def test_wrapper_refuses_a_tree_with_nothing_to_prune(factory):
    with pytest.raises(ValueError, match="`prunable` must select at least one leaf, got none of 1"):
        MAKERS[factory]().init({"b": np.ones(3, np.float32)})


# ---- params that come from elsewhere, and wrappers that see a part of them


@pytest.mark.parametrize("factory", ["movement", "straight_through"])
def test_dense_wrapper_trains_params_loaded_after_init(factory):
    """Pretrained weights are often loaded once the optimizer is there."""
    wrap = getattr(dynamic, factory)
    tx = wrap(optax.sgd(0.0), schedules.linear(0.0, 0.5, 5, 9), every=1)
    loaded = jax.tree.map(lambda w: w + 10, normal(100))
    updates, _ = tx.update(normal(0), tx.init(normal(100)), loaded)
    for name, leaf in apply(loaded, updates).items():
        np.testing.assert_array_equal(leaf, loaded[name])


@pytest.mark.parametrize("factory", ["movement", "straight_through"])
def test_dense_wrapper_keeps_params_that_are_projected_between_steps(factory):
    tx = getattr(dynamic, factory)(optax.sgd(0.0), 0.5, every=1)
    params, state = normal(100), tx.init(normal(100))
    for _ in range(3):
        updates, state = tx.update(normal(0), state, params)
        params = jax.tree.map(lambda w: jnp.clip(w, -0.1, 0.1), apply(params, updates))
    assert max(np.abs(leaf).max() for leaf in params.values()) <= np.float32(0.1)
    updates, _ = tx.update(normal(0), state, params)
    kept_before = full(state.masks, params)
    for name in CHOSEN:
        moved = np.asarray(updates[name])[kept_before[name] & (np.asarray(params[name]) != 0)]
        assert np.isin(moved, 0).any() and np.abs(moved).max(initial=0) <= 0.1


@pytest.mark.parametrize("factory", ["movement", "straight_through"])
def test_dense_wrapper_takes_trees_with_functions(factory):
    tree = {"f": jax.nn.relu, "w": jnp.ones((2, 2))}
    grads = {"f": None, "w": jnp.ones((2, 2))}
    tx = getattr(dynamic, factory)(optax.sgd(0.1), 0.5)
    updates, state = tx.update(grads, tx.init(tree), tree)
    assert kept({"w": dynamic.masks(state)["w"]}, ("w",)) == 2 and updates["w"].shape == (2, 2)


LABELS = {"b": "free", "e": "free", "s": "left", "w": "right"}


def test_masks_of_two_groups_are_those_of_both():
    params = {name: leaf for name, leaf in normal(100).items() if name in CHOSEN}
    labels = {name: LABELS.get(name, "left") for name in params}
    groups = {"left": dynamic.gradual(SGD, 0.5), "right": dynamic.gradual(ADAM, 0.25)}
    tx = optax.partition(groups, labels)
    updates, state = tx.update(normal_like(params), tx.init(params), params)
    dynamic.check(state, apply(params, updates))
    masks = dynamic.masks(state)
    right = [name for name in params if labels[name] == "right"]
    assert right and kept(masks, right) == sum(np.size(params[n]) for n in right) * 3 // 4


def test_masks_keep_what_a_masked_wrapper_does_not_see():
    params = {name: leaf for name, leaf in normal(100).items() if name in CHOSEN}
    first, *others = params
    tx = optax.masked(dynamic.gradual(SGD, 0.5), {first: True} | dict.fromkeys(others, False))
    state = tx.update(normal_like(params), tx.init(params), params)[1]
    masks = dynamic.masks(state)
    assert all(masks[name].shape == () and masks[name] for name in others)
    assert sj.apply_masks(params, masks)[first].shape == params[first].shape


def normal_like(params):
    return {name: normal(0)[name] for name in params}


def test_check_says_that_nan_cannot_be_zeroed():
    tx = dynamic.gradual(SGD, 0.5)
    params = {"w": jnp.array([[jnp.nan, 1.0]])}
    grads = {"w": jnp.zeros((1, 2))}
    _, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    with pytest.raises(ValueError, match="1 of 2 entries is not, at 'w': the leaf has NaN"):
        dynamic.check(state, params)


def test_check_says_that_it_is_not_for_jit():
    params, tx = normal(100), dynamic.gradual(SGD, 0.5)
    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(lambda p: dynamic.check(tx.init(p), p))(params)


def test_rigl_waits_for_the_begin_of_its_drop_fraction():
    tx = dynamic.rigl(SGD, 0.5, schedules.cosine(0.5, 0.0, 2, 4), key=KEY, every=1)
    runs = train(tx, 4, start=obeying)
    same = [all(np.array_equal(r.masks[n], r.masks_before[n]) for n in CHOSEN) for r in runs]
    assert same == [True, True, False, False]
