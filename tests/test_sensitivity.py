"""Curves, allocations and choices, on losses whose optima can be counted or written down.

The quadratic loss Σ h (w - w0)² / 2 is additive over entries: to prune an entry costs h w0² / 2, so
that curves are sums of sorted costs, and the best masks of all are those of a global threshold.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.isotonic import IsotonicRegression

from sparsejax import (
    _progress,
    allocation,
    criteria,
    filters,
    granularities,
    masking,
    models,
    sensitivity,
)
from sparsejax.allocation import Layer

pytestmark = pytest.mark.usefixtures("quickly")

SIZES = {"a": (1, 2), "b": (2, 2), "c": (3, 1)}
TWELFTHS = np.arange(13) / 12  # whole counts in every leaf
SHAPES = {"bias": (3,), **SIZES}
RNG = np.random.default_rng(0)
PARAMS = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
CURVATURES = {k: jnp.asarray(RNG.uniform(0.5, 4, s), jnp.float32) for k, s in SHAPES.items()}
COSTS = jax.tree.map(lambda h, w: h * w**2 / 2, CURVATURES, PARAMS)


@jax.jit
def quadratic(params):
    """1 + Σ h (w - w0)² / 2."""
    squares = jax.tree.map(lambda h, w, w0: jnp.sum(h * (w - w0) ** 2), CURVATURES, params, PARAMS)
    return 1 + sum(jax.tree.leaves(squares)) / 2


def never(params):
    raise AssertionError("the loss was measured before the arguments were checked")


def quiet(loss, params, sparsities, **options):
    return sensitivity.curves(loss, params, sparsities, progress=False, **options)


def choose(loss, params, **options):
    return sensitivity.choose_sparsity(loss, params, progress=False, **options)


def made(levels, losses, units, dense_loss=0.0):
    """Curves that nobody measured."""
    layers = tuple(Layer(f"layer{i}", (n,), n) for i, n in enumerate(units))
    pruned = tuple({x: np.array([round(s * x.units) for s in levels])} for x in layers)
    return sensitivity.Curves(layers, np.array(levels), np.array(losses), dense_loss, pruned)


@pytest.fixture(scope="module")
def measured():
    return quiet(quadratic, PARAMS, TWELFTHS, scores=COSTS)


# Curves.


def test_curves_are_sums_of_the_smallest_costs(measured):
    for layer, losses in zip(measured.layers, measured.losses, strict=True):
        costs = np.sort(np.asarray(COSTS[layer.path]).ravel())
        expected = [1 + costs[: round(s * costs.size)].sum() for s in TWELFTHS]
        np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_curves_name_the_prunable_leaves(measured):
    assert measured.layers == (
        Layer("a", (1, 2), 2),
        Layer("b", (2, 2), 4),
        Layer("c", (3, 1), 3),
    )


def test_curves_say_how_many_units_are_pruned(measured):
    for layer, pruned in zip(measured.layers, measured.pruned, strict=True):
        assert list(pruned) == [layer]
        np.testing.assert_array_equal(pruned[layer], [round(s * layer.units) for s in TWELFTHS])


def test_curves_measure_every_count_once():
    calls = []

    def loss(params):
        calls.append(params)
        return quadratic(params)

    quiet(loss, PARAMS, TWELFTHS, scores=COSTS)
    assert len(calls) == 1 + 2 + 4 + 3


def test_curves_score_by_magnitude_by_default():
    ours = quiet(quadratic, PARAMS, TWELFTHS)
    np.testing.assert_array_equal(
        ours.losses, quiet(quadratic, PARAMS, TWELFTHS, scores=criteria.magnitude(PARAMS)).losses
    )


def test_curves_at_0_and_1_are_the_dense_and_the_missing_layer(measured):
    assert measured.dense_loss == float(quadratic(PARAMS))
    np.testing.assert_array_equal(measured.losses[:, 0], measured.dense_loss)
    for layer, loss in zip(measured.layers, measured.losses[:, -1], strict=True):
        without = PARAMS | {layer.path: jnp.zeros(SHAPES[layer.path])}
        assert loss == float(quadratic(without))


def test_curves_trace_the_loss_once():
    traces = []

    @jax.jit
    def loss(params):
        traces.append(None)
        return jnp.sum(params["b"])

    quiet(loss, PARAMS, [0.25, 0.5, 1.0])
    assert len(traces) == 1


def test_curves_of_a_group_prune_its_leaves_together():
    group = filters.by_path("a", "c")
    ours = quiet(quadratic, PARAMS, [0.4, 0.6], scores=COSTS, groups={"ends": group})
    assert ours.layers == (Layer("ends", (5,), 5), Layer("b", (2, 2), 4))
    for i, sparsity in enumerate([0.4, 0.6]):
        masks = masking.topk(COSTS, sparsity, prunable=filters.all_of(filters.weights, group))
        assert ours.losses[0, i] == float(quadratic(masking.apply_masks(PARAMS, masks)))
        zeros = {leaf.path: counts[i] for leaf, counts in ours.pruned[0].items()}
        assert zeros == {k: int(np.sum(~np.asarray(masks[k]))) for k in "ac"}


def test_curves_of_groups_select_by_the_leaf_not_by_its_units():
    ours = quiet(
        quadratic,
        PARAMS,
        [0.5],
        granularity=granularities.Channel(),
        groups={
            "square": lambda path, leaf: leaf.shape == (2, 2),
            "all": filters.by_path("a", "c"),
        },
    )
    assert [layer.path for layer in ours.layers] == ["all", "square"]


def test_curves_of_channels_count_channels():
    channel = granularities.Channel()
    ours = quiet(quadratic, PARAMS, [0.5], granularity=channel, prunable=filters.by_path("b"))
    masks = masking.topk(
        criteria.magnitude(PARAMS), 0.5, granularity=channel, prunable=filters.by_path("b")
    )
    assert ours.layers == (Layer("b", (2, 2), 2),)
    assert ours.losses[0, 0] == float(quadratic(masking.apply_masks(PARAMS, masks)))


def test_curves_of_blocks_count_blocks():
    ours = quiet(
        quadratic,
        PARAMS,
        [0.5, 1.0],
        granularity=granularities.Block((1, 2)),
        prunable=filters.by_path("b"),
    )
    assert [counts.tolist() for counts in ours.pruned[0].values()] == [[1, 2]]


def test_curves_show_nan():
    def loss(params):
        return jnp.where(jnp.any(params["a"] == 0), jnp.nan, 1.0)

    losses = quiet(loss, PARAMS, [0.5, 1.0]).losses
    np.testing.assert_array_equal(losses, [[np.nan] * 2, [1, 1], [1, 1]])


def test_curves_keep_bfloat16():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    seen = set()

    def loss(params):
        seen.update(leaf.dtype for leaf in jax.tree.leaves(params))
        return quadratic(params)

    losses = quiet(loss, params, [0.5, 1.0]).losses
    assert seen == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(losses, quiet(quadratic, PARAMS, [0.5, 1.0]).losses, rtol=2e-2)


def test_curves_of_an_empty_leaf_are_flat():
    params = {"a": jnp.ones((2, 1)), "none": jnp.ones((0, 3))}
    ours = quiet(lambda p: jnp.sum((p["a"] - 1) ** 2), params, [0.5, 1.0])
    np.testing.assert_array_equal(ours.losses, [[1, 2], [0, 0]])
    assert sensitivity.allocation(ours)(ours.layers, 1) == [1, 0]


@pytest.mark.parametrize("value", [0.5, 1, np.float64(0.5), np.array(2), jnp.float32(0.5)])
def test_curves_take_numbers_of_any_kind(value):
    assert quiet(lambda p: value, PARAMS, [0.5]).dense_loss == float(value)


def test_curves_draw_a_bar_on_standard_error(capfd):
    loss = float(sensitivity.curves(quadratic, PARAMS, [0.5]).losses[-1, 0])
    drawn = capfd.readouterr()
    assert drawn.out == ""
    assert "losses" in drawn.err and "3/3" in drawn.err
    assert f"c, sparsity 0.5, loss {loss:.4g}" in " ".join(drawn.err.split())


# Allocations.


def test_allocation_finds_the_global_optimum_of_an_additive_loss(measured):
    allocate = sensitivity.allocation(measured)
    for removed in range(10):
        found = masking.topk(COSTS, count=removed, allocation=allocate)
        best = masking.topk(COSTS, count=removed)
        for path in SHAPES:
            np.testing.assert_array_equal(found[path], best[path])


curves_of_three = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.lists(st.integers(0, 40), min_size=4, max_size=4).map(sorted),
    ),
    min_size=1,
    max_size=3,
)
LEVELS = [0.3, 0.5, 0.9, 1.0]


def interpolated(curves):
    """The loss of each layer at each whole count of pruned units; the curves rise."""
    tables = []
    for layer, losses in zip(curves.layers, curves.losses, strict=True):
        (counts,) = curves.pruned[len(tables)].values()
        # Equal counts have equal losses where they are measured; here the first one counts.
        x, first = np.unique([0, *counts], return_index=True)
        y = np.array([curves.dense_loss, *losses])[first]
        tables.append(np.interp(np.arange(layer.units + 1), x, y))
    return tables


def best_by_hand(tables, allowed):
    """The least total loss over all whole counts that are allowed."""
    every = itertools.product(*(range(len(table)) for table in tables))
    return min(
        sum(table[n] for table, n in zip(tables, counts, strict=True))
        for counts in every
        if allowed(counts)
    )


@settings(max_examples=60)
@given(curves_of_three, st.floats(0, 1))
def test_allocation_is_the_optimum_over_all_whole_counts(rows, fraction):
    units, losses = zip(*rows, strict=True)
    curves = made(LEVELS, np.array(losses) / 8, units)
    removed = round(fraction * sum(units))
    kept = sensitivity.allocation(curves)(curves.layers, sum(units) - removed)
    tables = interpolated(curves)
    ours = sum(t[n - k] for t, n, k in zip(tables, units, kept, strict=True))
    assert sum(kept) == sum(units) - removed
    assert ours == pytest.approx(best_by_hand(tables, lambda c: sum(c) == removed), abs=1e-9)


def test_allocation_sees_beyond_a_hump():
    # From left to right the first layer is the worst at every step, in all the best.
    curves = made([0.5, 1.0], [[3.0, 3.0], [2.0, 4.0]], [10, 10])
    assert sensitivity.allocation(curves)(curves.layers, 10) == [0, 10]
    assert sensitivity.allocation(curves)(curves.layers, 8) == [0, 8]


@pytest.mark.parametrize("units", [10**7, 10**9])
def test_allocation_is_exact_for_large_layers(units):
    curves = made([0.3, 0.7, 1.0], [[0.1, 0.5, 2.0], [0.2, 0.25, 3.0]], [units, units - 7])
    for keep in (1, units // 3, units + 1, 2 * units - 8):
        assert sum(sensitivity.allocation(curves)(curves.layers, keep)) == keep


def test_allocation_makes_curves_monotone_as_isotonic_regression_does():
    levels, noisy = [0.2, 0.4, 0.6, 0.8, 1.0], [0.5, 0.2, 0.3, 0.2, 1.0]
    smooth = IsotonicRegression().fit_transform(np.arange(6), [0.1, *noisy])
    other = [0.05, 0.15, 0.4, 0.5, 0.9]
    for keep in range(0, 21):
        found = [
            sensitivity.allocation(made(levels, [losses, other], [10, 10], dense))
            for losses, dense in ((noisy, 0.1), (smooth[1:], smooth[0]))
        ]
        layers = made(levels, [noisy, other], [10, 10]).layers
        assert found[0](layers, keep) == found[1](layers, keep)


def test_allocation_spreads_what_costs_nothing():
    curves = made([0.5, 1.0], [[0.0, 1.0], [0.0, 1.0]], [10, 10])
    assert sensitivity.allocation(curves)(curves.layers, 10) == [5, 5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_allocation_does_not_prune_up_to_a_loss_that_is_not_finite(bad):
    curves = made([0.5, 0.75, 1.0], [[0.0, bad, 0.0], [1.0, 2.0, 3.0]], [8, 8])
    assert sensitivity.allocation(curves)(curves.layers, 8) == [4, 4]
    assert sensitivity.allocation(curves)(curves.layers, 4) == [4, 0]


def test_allocation_of_groups_splits_as_the_group_does():
    ours = quiet(
        quadratic,
        PARAMS,
        np.arange(21) / 20,
        scores=COSTS,
        groups={"ends": filters.by_path("a", "c")},
    )
    for removed in range(10):
        found = masking.topk(COSTS, count=removed, allocation=sensitivity.allocation(ours))
        best = masking.topk(COSTS, count=removed)
        for path in SHAPES:
            np.testing.assert_array_equal(found[path], best[path])


def test_allocation_between_the_levels_of_a_group_has_the_exact_total():
    group = {"all": filters.floating}
    ours = quiet(
        quadratic, PARAMS, [0.5, 1.0], groups=group, prunable=filters.floating, scores=COSTS
    )
    layers = [leaf for pruned in ours.pruned for leaf in pruned]
    for keep in range(13):
        assert sum(sensitivity.allocation(ours)(layers, keep)) == keep


def test_allocation_of_some_layers_needs_their_curves_only(measured):
    dense_b = allocation.override(sensitivity.allocation(measured), {"b": 1.0})
    kept = masking.sparsity(PARAMS, masking.topk(COSTS, count=4, allocation=dense_b))
    assert kept.leaves["b"].zeros == 0 and kept.prunable.zeros == 4


def test_allocation_works_with_channels():
    channel = granularities.Channel()
    ours = quiet(quadratic, PARAMS, [0.5, 1.0], granularity=channel)
    masks = masking.topk(
        criteria.magnitude(PARAMS),
        0.5,
        granularity=channel,
        allocation=sensitivity.allocation(ours),
    )
    assert sum(int(np.sum(~np.asarray(masks[k]))) for k in SIZES) == round(0.5 * (2 + 2 + 1))


# Budgets.


# Eighths, of which sums are exact.
PRICES = st.lists(st.integers(1, 64).map(lambda n: n / 8), min_size=3, max_size=3)


@settings(max_examples=40)
@given(curves_of_three, PRICES, st.floats(0, 1.2))
def test_within_budget_is_a_unit_from_the_optimum_and_never_over(rows, prices, fraction):
    units, losses = zip(*rows, strict=True)
    curves = made(LEVELS, np.array(losses) / 8, units)
    costs = dict(zip([x.path for x in curves.layers], prices, strict=False))
    budget = fraction * sum(n * costs[x.path] for x, n in zip(curves.layers, units, strict=True))
    shares = sensitivity.within_budget(curves, budget, costs=costs)
    tables = interpolated(curves)

    def cost(kept):
        return sum(k * p for k, p in zip(kept, costs.values(), strict=True))

    kept = [round(shares.densities[x.path] * x.units) for x in curves.layers]
    ours = sum(t[n - k] for t, n, k in zip(tables, units, kept, strict=True))
    best = best_by_hand(
        tables, lambda c: cost([n - x for n, x in zip(units, c, strict=True)]) <= budget
    )
    assert cost(kept) == shares.cost <= budget
    assert ours == pytest.approx(shares.loss_increase, abs=1e-9)
    assert ours <= best + max(np.diff(t).max() for t in tables) + 1e-9


@settings(max_examples=30)
@given(curves_of_three, st.integers(0, 30))
def test_within_budget_of_params_is_the_optimum(rows, budget):
    units, losses = zip(*rows, strict=True)
    curves = made(LEVELS, np.array(losses) / 8, units)
    costs = {x.path: 1 for x in curves.layers}
    shares = sensitivity.within_budget(curves, budget, costs=costs)
    best = best_by_hand(interpolated(curves), lambda c: sum(units) - sum(c) <= budget)
    assert shares.loss_increase == pytest.approx(best, abs=1e-9)


def test_within_budget_predicts_an_additive_loss(measured):
    costs = {"a": 9, "b": 1, "c": 4}
    shares = sensitivity.within_budget(measured, 15, costs=costs)
    masks = masking.topk(
        COSTS,
        count=shares.pruned,
        allocation=allocation.override(allocation.uniform, shares.densities),
    )
    increase = float(quadratic(masking.apply_masks(PARAMS, masks))) - measured.dense_loss
    assert shares.loss_increase == pytest.approx(increase, abs=1e-6)
    kept = {path: masking.sparsity(PARAMS, masks).leaves[path].nonzeros for path in SIZES}
    assert sum(costs[path] * n for path, n in kept.items()) == shares.cost <= 15


def test_within_budget_prunes_what_is_dear():
    curves = made([0.5, 1.0], [[1.0, 3.0], [1.0, 3.0]], [10, 10])
    shares = sensitivity.within_budget(curves, 65, costs={"layer0": 1, "layer1": 10})
    assert shares.densities == {"layer0": 1.0, "layer1": 0.5}


@pytest.mark.parametrize("budget", [20, 1e9, math.inf])
def test_within_budget_prunes_nothing_if_all_fits(budget):
    curves = made([0.5, 1.0], [[1.0, 3.0], [1.0, 3.0]], [10, 10])
    shares = sensitivity.within_budget(curves, budget, costs={"layer0": 1, "layer1": 1})
    assert shares == ({"layer0": 1.0, "layer1": 1.0}, 0, 20.0, 0.0)


def test_within_budget_of_groups_prices_each_leaf():
    ours = quiet(
        quadratic,
        PARAMS,
        [0.3, 0.6, 1.0],
        scores=COSTS,
        groups={"ends": filters.by_path("a", "c")},
    )
    costs = {"a": 5.5, "b": 1.25, "c": 0.75}
    for budget in np.linspace(0, 18, 37):
        shares = sensitivity.within_budget(ours, budget, costs=costs)
        kept = {path: round(shares.densities[path] * math.prod(SHAPES[path])) for path in costs}
        assert sum(costs[path] * n for path, n in kept.items()) == shares.cost <= budget


# Choices.


@settings(max_examples=25)
@given(st.lists(st.integers(0, 30), min_size=20, max_size=20).map(sorted), st.integers(0, 30))
def test_choose_sparsity_is_the_largest_of_an_exhaustive_search(losses, bound):
    params = {"w": np.arange(1.0, 21.0, dtype=np.float32)[None]}

    def loss(params):
        zeros = int(np.sum(np.asarray(params["w"]) == 0))
        return losses[zeros] - losses[0]

    choice = choose(loss, params, max_loss_increase=bound, resolution=0.05)
    kept = [i / 20 for i, x in enumerate(losses) if x - losses[0] <= bound]
    assert choice.sparsity == pytest.approx(max(kept), abs=1e-12)


def test_choose_sparsity_returns_what_it_measured():
    choice = choose(quadratic, PARAMS, max_loss_increase=0.5, scores=COSTS)
    assert float(quadratic(choice.params)) == choice.loss <= choice.dense_loss + 0.5
    assert (choice.sparsity, choice.loss) in choice.tried
    for path in SHAPES:
        np.testing.assert_array_equal(
            choice.params[path], masking.apply_masks(PARAMS, choice.masks)[path]
        )
        np.testing.assert_array_equal(
            choice.masks[path], masking.topk(COSTS, choice.sparsity)[path]
        )


def test_choose_sparsity_measures_few():
    choice = choose(quadratic, PARAMS, max_loss_increase=0.5)
    assert len(choice.tried) <= 11
    assert choice.tried[0] == (0.0, choice.dense_loss)


def test_choose_sparsity_draws_a_bar_that_ends_full(capfd):
    choice = sensitivity.choose_sparsity(quadratic, PARAMS, max_loss_increase=0.5, resolution=0.2)
    steps = len(choice.tried) - 1
    assert f"{steps}/{steps} sparsity" in " ".join(capfd.readouterr().err.split())


def test_bars_are_not_drawn_unless_asked_for(capfd):
    with _progress.bar(False, "fits", 2) as advance:
        advance("strength 0.1")
    assert capfd.readouterr() == ("", "")


def test_bars_have_the_text_that_was_given_and_no_markup(capfd):
    with _progress.bar("fold [1] of 3", "fits", 1) as advance:
        advance("layer[0]")
    drawn = " ".join(capfd.readouterr().err.split())
    assert "fold [1] of 3" in drawn and "1/1 layer[0]" in drawn and "fits" not in drawn


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(False, False), (True, "fold 1 of 3"), ("digits", "digits, fold 1 of 3")],
)
def test_bars_of_parts_have_the_text_of_the_whole(progress, expected):
    assert _progress.part(progress, "fold 1 of 3") == expected


def test_bars_of_what_fails_end_where_it_failed(capfd):
    def fit():
        with _progress.bar(True, "fits", 2) as advance:
            advance("first")
            raise KeyError

    with pytest.raises(KeyError):
        fit()
    assert "1/2 first" in " ".join(capfd.readouterr().err.split())


def test_choose_sparsity_is_0_if_nothing_keeps_the_bound():
    def loss(params):
        return float(any(bool(jnp.any(w == 0)) for w in jax.tree.leaves(params)))

    choice = choose(loss, PARAMS, max_loss_increase=0, resolution=0.25)
    assert choice.sparsity == 0 and choice.loss == choice.dense_loss == 0
    assert all(bool(jnp.all(mask)) for mask in jax.tree.leaves(choice.masks))
    assert choice.params is PARAMS


def test_choose_sparsity_refuses_nan_losses():
    def loss(params):
        return jnp.where(jnp.sum(params["b"] == 0) > 1, jnp.nan, 0.0)

    choice = choose(loss, PARAMS, max_loss_increase=1.0, scope="per_leaf")
    assert masking.sparsity(PARAMS, choice.masks).leaves["b"].zeros <= 1
    assert any(math.isnan(value) for _, value in choice.tried)


def test_choose_sparsity_reaches_the_last_of_the_grid():
    choice = choose(lambda p: 0.0, PARAMS, max_loss_increase=0.0)
    assert choice.sparsity == 0.999


@pytest.mark.parametrize(("resolution", "last"), [(0.1, 0.9), (0.3, 0.9), (0.07, 0.98), (0.5, 0.5)])
def test_choose_sparsity_stays_below_1(resolution, last):
    choice = choose(lambda p: 0.0, PARAMS, max_loss_increase=0.0, resolution=resolution)
    assert choice.sparsity == last


def test_choose_sparsity_retrains_from_the_params_and_keeps_the_masks():
    starts = []

    def retrain(pruned, masks):
        starts.append((pruned, masks))
        return jax.tree.map(lambda w: w + 1, pruned)

    choice = choose(quadratic, PARAMS, max_loss_increase=100.0, resolution=0.25, retrain=retrain)
    pruned, masks = starts[-1]
    for path in SHAPES:
        expected = np.where(masks[path], PARAMS[path] + 1, 0)
        np.testing.assert_array_equal(choice.params[path], expected)
        np.testing.assert_array_equal(pruned[path], np.where(masks[path], PARAMS[path], 0))
    assert choice.loss == float(quadratic(choice.params))


def test_choose_sparsity_passes_on_how_masks_are_built(measured):
    options = {"granularity": granularities.Channel(), "scope": "per_leaf"}
    choice = choose(quadratic, PARAMS, max_loss_increase=0.5, resolution=0.25, **options)
    masks = masking.topk(criteria.magnitude(PARAMS), choice.sparsity, **options)
    for path in SHAPES:
        np.testing.assert_array_equal(choice.masks[path], masks[path])


def test_choose_sparsity_by_sensitivity_is_as_sparse_as_an_additive_loss_allows(measured):
    options = {"max_loss_increase": 0.5, "scores": COSTS, "resolution": 0.01}
    ours = choose(quadratic, PARAMS, allocation=sensitivity.allocation(measured), **options)
    assert ours.sparsity == choose(quadratic, PARAMS, **options).sparsity
    assert ours.sparsity >= choose(quadratic, PARAMS, scope="per_leaf", **options).sparsity


# A network.


@pytest.fixture(scope="module")
def digits():
    """LeNet-300-100 on 8 x 8 digits: its validation loss and its trained params."""
    x, y = load_digits(return_X_y=True)
    x = jnp.asarray(x.reshape(-1, 8, 8, 1) / 16, jnp.float32)
    y = jnp.asarray(y)
    apply, params = models.functional(models.LeNet300100((8, 8, 1), rngs=nnx.Rngs(0)))
    optimizer = optax.adam(3e-3)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, x[:1000], y[:1000])
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(30):
        params, state = step(params, state)
    return jax.jit(lambda params: loss(params, x[1000:], y[1000:])), params


def test_sensitivity_of_a_network_beats_uniform(digits):
    loss, params = digits
    ours = quiet(loss, params, [0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0])
    assert [layer.path for layer in ours.layers] == [f"dense{i}.kernel" for i in (1, 2, 3)]
    scores = criteria.magnitude(params)
    for sparsity in (0.7, 0.8, 0.9):
        values = {
            allocate: float(
                loss(
                    masking.apply_masks(params, masking.topk(scores, sparsity, allocation=allocate))
                )
            )
            for allocate in (allocation.uniform, sensitivity.allocation(ours))
        }
        uniform, best = values.values()
        assert best < uniform


def test_choose_sparsity_of_a_network_keeps_its_bound(digits):
    loss, params = digits
    choice = choose(loss, params, max_loss_increase=0.01)
    assert isinstance(choice.params, nnx.State) and choice.sparsity > 0.3
    assert float(loss(choice.params)) <= choice.dense_loss + 0.01
    count = masking.sparsity(choice.params).prunable
    assert count.zeros >= round(choice.sparsity * count.size)


# Errors.

CURVES = made([0.5, 0.75], [[1.0, 2.0], [1.0, np.nan]], [8, 8])
COST_1 = {"layer0": 1.0, "layer1": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quiet(3, PARAMS, [0.5]), TypeError, "`loss` must be a function params -> number"),
        (lambda: quiet(never, PARAMS, []), ValueError, "`sparsities` must be ascending"),
        (lambda: quiet(never, PARAMS, [0.5, 0.5]), ValueError, "`sparsities` must be ascending"),
        (lambda: quiet(never, PARAMS, [0.5, 0.2]), ValueError, "`sparsities` must be ascending"),
        (lambda: quiet(never, PARAMS, [50, 90]), ValueError, "not percentages"),
        (lambda: quiet(never, PARAMS, [-0.1]), ValueError, r"in \[0, 1\]"),
        (lambda: quiet(never, PARAMS, [np.nan]), ValueError, "`sparsities` must be a number"),
        (lambda: quiet(never, PARAMS, [[0.5]]), TypeError, "`sparsities` must be a sequence"),
        (lambda: quiet(never, PARAMS, ["a"]), TypeError, "`sparsities` must be one real number"),
        (lambda: quiet(never, PARAMS, 0.5), TypeError, "`sparsities` must be a sequence"),
        (
            lambda: quiet(never, PARAMS, [0.5], granularity=granularities.NM(2, 4)),
            TypeError,
            "whose sparsity is free",
        ),
        (
            lambda: quiet(never, PARAMS, [0.5], granularity=granularities.Channel),
            TypeError,
            "`granularity` must be a value",
        ),
        (
            lambda: quiet(never, {"b": jnp.ones(2)}, [0.5]),
            ValueError,
            "`prunable` must select at least one leaf",
        ),
        (lambda: quiet(never, None, [0.5]), ValueError, "`params` must be a pytree"),
        (
            lambda: quiet(never, PARAMS, [0.5], scores={"a": jnp.ones((1, 2))}),
            ValueError,
            "`scores` must have the structure of `params`",
        ),
        (
            lambda: quiet(never, PARAMS, [0.5], scores=PARAMS | {"b": jnp.ones((2, 3))}),
            ValueError,
            "`scores` must have the shapes of `params`: at 'b'",
        ),
        (
            lambda: quiet(never, PARAMS, [0.5], scores=PARAMS | {"b": jnp.full((2, 2), np.nan)}),
            ValueError,
            "`scores` must not be NaN: 4 of 4 entries are, at 'b'",
        ),
        (
            lambda: quiet(never, PARAMS, [0.5], groups=[filters.weights]),
            TypeError,
            "`groups` must map names to filters",
        ),
        (
            lambda: quiet(never, PARAMS, [0.5], groups={"g": "a"}),
            TypeError,
            r"`groups` must be a function \(path, leaf\) -> bool",
        ),
        (
            lambda: quiet(never, PARAMS, [0.5], groups={"g": filters.by_path("bias")}),
            ValueError,
            "`groups` must select at least one prunable leaf each, got none for 'g'",
        ),
        (
            lambda: quiet(
                never, PARAMS, [0.5], groups={"g": filters.weights, "h": filters.by_path("b")}
            ),
            ValueError,
            "`groups` must not overlap, got 'b' in 'g' and in 'h'",
        ),
        (
            lambda: quiet(never, PARAMS, [0.5], groups={"a": filters.by_path("b")}),
            ValueError,
            "`groups` must not have the name of a leaf outside, got 'a'",
        ),
        (
            lambda: quiet(lambda p: p["a"], PARAMS, [0.5]),
            TypeError,
            r"`loss` must return one real number, got float32\[1,2\]; take the mean",
        ),
        (lambda: quiet(lambda p: None, PARAMS, [0.5]), TypeError, "one real number, got None"),
        (lambda: quiet(lambda p: True, PARAMS, [0.5]), TypeError, "one real number, got bool"),
        (lambda: quiet(lambda p: 1j, PARAMS, [0.5]), TypeError, "one real number, got complex"),
        (lambda: quiet(lambda p: np.nan, PARAMS, [0.5]), ValueError, "finite for the dense"),
        (
            lambda: jax.jit(lambda p: quiet(lambda p: p["a"][0, 0], p, [0.5]).dense_loss)(PARAMS),
            TypeError,
            "outside of jit",
        ),
        (lambda: sensitivity.allocation({}), TypeError, "`curves` must be what"),
        (
            lambda: sensitivity.allocation(CURVES)([Layer("other", (8,), 8)], 8),
            ValueError,
            "`curves` must have a curve for every layer, got none for 'other'",
        ),
        (
            lambda: sensitivity.allocation(CURVES)([Layer("layer0", (8,), 4)], 4),
            ValueError,
            "got 8 for 4 at 'layer0'; measure with the same granularity",
        ),
        (
            lambda: sensitivity.allocation(CURVES)([CURVES.layers[0]] * 2, 8),
            ValueError,
            "`curves` must have one curve for every layer, got a layer or a group for 2",
        ),
        (
            lambda: sensitivity.allocation(CURVES)(CURVES.layers, 5),
            ValueError,
            "`keep` must be at least 6, .* got 5; measure up to sparsity 1",
        ),
        (
            lambda: sensitivity.allocation(CURVES)(CURVES.layers, 17),
            ValueError,
            "`keep` must be from 0 to 16",
        ),
        (
            lambda: sensitivity.within_budget(CURVES, 5.5, costs=COST_1),
            ValueError,
            "`budget` must be at least 6, .* got 5.5",
        ),
        (
            lambda: sensitivity.within_budget(CURVES, -1, costs=COST_1),
            ValueError,
            "`budget` must be >= 0, got -1",
        ),
        (
            lambda: sensitivity.within_budget(CURVES, 9, costs={"layer0": 1.0}),
            ValueError,
            "`costs` must have one cost for every leaf of the curves, got none for 'layer1'",
        ),
        (
            lambda: sensitivity.within_budget(CURVES, 9, costs=COST_1 | {"x": 1.0}),
            ValueError,
            "`costs` must have one cost for every leaf of the curves, got one for 'x'",
        ),
        (
            lambda: sensitivity.within_budget(CURVES, 9, costs=COST_1 | {"layer0": 0.0}),
            ValueError,
            "`costs` must be finite and > 0, got 0.0 at 'layer0'",
        ),
        (
            lambda: sensitivity.within_budget(CURVES, 9, costs=1.0),
            TypeError,
            "`costs` must map the paths of leaves",
        ),
        (
            lambda: choose(never, PARAMS, max_loss_increase=-1),
            ValueError,
            "`max_loss_increase` must be >= 0, got -1",
        ),
        (
            lambda: choose(never, PARAMS, max_loss_increase=np.inf),
            ValueError,
            "`max_loss_increase` must be finite",
        ),
        (
            lambda: choose(never, PARAMS, max_loss_increase=1, resolution=0.0),
            ValueError,
            r"`resolution` must be in \(0, 0.5\]",
        ),
        (
            lambda: choose(never, PARAMS, max_loss_increase=1, retrain=3),
            TypeError,
            "`retrain` must be a function",
        ),
        (
            lambda: choose(never, PARAMS, max_loss_increase=1, granularity=granularities.NM(2, 4)),
            TypeError,
            "whose sparsity is free",
        ),
        (
            lambda: choose(never, PARAMS, max_loss_increase=1, scope="leaf"),
            ValueError,
            "`scope` must be",
        ),
        (lambda: choose(lambda p: np.inf, PARAMS, max_loss_increase=1), ValueError, "got inf"),
    ],
)
@pytest.mark.usefixtures("as_users_have_it")
def test_bad_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert re.search(r"`\w+`", str(caught.value))


def test_allocation_of_a_part_of_a_group_is_refused():
    ours = quiet(quadratic, PARAMS, [0.5, 1.0], groups={"ends": filters.by_path("a", "c")})
    with pytest.raises(ValueError, match="for 0 at 'c'; ask for all leaves of a group"):
        sensitivity.allocation(ours)([Layer("a", (1, 2), 2)], 1)
