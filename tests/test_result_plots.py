"""What the figures of results say, read back from matplotlib's artists."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from sparsejax import plots

SEEDS = {0.99: [0.94, 0.98], 0.9: [0.97, 0.98, 0.99], 0.5: [0.985]}
RESULTS = {"dense": {0: [0.98, 0.99]}, "ours": SEEDS, "theirs": {0.98: 0.97}}


def errors(results):
    return {
        method: {s: 1 - np.asarray(v) for s, v in of_method.items()}
        for method, of_method in results.items()
    }


def saved(axes):
    axes.figure.savefig(file := io.BytesIO(), format="png")
    return file.getvalue()


def line(axes, label):
    return next(x for x in axes.get_lines() if x.get_label() == label)


def label_of(axis, value):
    return axis.get_major_formatter()(value)


@pytest.fixture(scope="module")
def axes():
    axes = plots.accuracy(RESULTS)
    saved(axes)
    return axes


def test_accuracy_draws_means_in_the_order_of_sparsities(axes):
    ours = line(axes, "ours")
    np.testing.assert_array_equal(ours.get_xdata(), [0.5, 0.9, 0.99])
    np.testing.assert_allclose(ours.get_ydata(), [0.985, 0.98, 0.96])


def test_accuracy_draws_a_band_of_one_standard_deviation(axes):
    band = next(c for c in axes.collections if len(c.get_paths()[0].vertices) > 5)
    vertices = band.get_paths()[0].vertices
    for sparsity, values in SEEDS.items():
        deviation = np.std(values, ddof=1) if len(values) > 1 else 0
        heights = vertices[vertices[:, 0] == sparsity][:, 1]
        expected = np.mean(values) - deviation, np.mean(values) + deviation
        np.testing.assert_allclose([heights.min(), heights.max()], expected)


def test_accuracy_draws_a_single_sparsity_as_a_marker(axes):
    (bars,) = axes.containers
    points, caps, _ = bars.lines
    assert points.get_linestyle() == "None" and not caps
    assert points.get_xdata() == [0.98] and points.get_ydata() == [0.97]


def test_accuracy_draws_bars_where_a_single_sparsity_has_seeds():
    axes = plots.accuracy({"ours": {0.9: [0.96, 0.98]}})
    _, _, (segments,) = axes.containers[0].lines
    ((low, high),) = [s[:, 1] for s in segments.get_segments()]
    np.testing.assert_allclose([low, high], [0.97 - 0.02 / 2**0.5, 0.97 + 0.02 / 2**0.5])


def test_accuracy_draws_the_dense_network_across(axes):
    dense = line(axes, "dense")
    assert list(dense.get_ydata()) == [0.985, 0.985] and dense.get_linestyle() == "--"
    assert axes.get_xlim()[0] > 0.4
    (level,) = axes.patches
    np.testing.assert_allclose(level.get_height(), 2 * np.std([0.98, 0.99], ddof=1))


def test_accuracy_gives_each_method_its_color_and_name(axes):
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["dense", "ours", "theirs"]
    colors = [to_rgba(line(axes, "ours").get_color())]
    colors.append(to_rgba(axes.containers[0].lines[0].get_color()))
    assert colors == [to_rgba("C0"), to_rgba("C1")]


def test_accuracy_has_the_axis_of_sparsities(axes):
    places = axes.transData.transform([[s, 0.98] for s in (0.9, 0.99, 0.999)])[:2, 0]
    halfway = axes.transData.transform([[1 - 10**-1.5, 0.98]])[0, 0]
    np.testing.assert_allclose(halfway, np.mean(places))
    assert axes.get_xlabel() == "sparsity" and axes.get_ylabel() == "accuracy"


def test_accuracy_labels_fractions_as_percentages(axes):
    assert label_of(axes.yaxis, 0.975) == "97.5 %"
    points = plots.accuracy({"ours": {0.5: 98.5, 0.9: 98.0}})
    assert "%" not in label_of(points.yaxis, 98)


def test_accuracy_leaves_a_gap_where_a_value_is_not_finite():
    axes = plots.accuracy(
        {"ours": {0.5: 0.98, 0.9: [0.97, np.nan], 0.95: [np.inf, 0.97], 0.99: 0.96}}
    )
    np.testing.assert_array_equal(np.isnan(line(axes, "ours").get_ydata()), [0, 1, 1, 0])
    assert label_of(axes.yaxis, 0.5) == "50 %" and saved(axes)


@pytest.mark.parametrize(
    "results",
    [
        {"dense": {0: 0.98}},
        {"emptied": {1.0: 0.1}},
        {"ours": {0.0: 0.98, 0.9: 0.97, 1.0: 0.1}},
        {"ours": {0.9: np.nan}},
    ],
    ids=["dense alone", "emptied alone", "from 0 to 1", "nothing finite"],
)
@pytest.mark.parametrize("draw", [plots.accuracy, plots.error])
def test_results_of_any_range_are_drawn(draw, results):
    assert saved(draw(results))


def test_accuracy_of_many_methods_has_its_legend_beside_them():
    axes = plots.accuracy({f"method {i}": {0.5: 0.98, 0.9: 0.9 + i / 200} for i in range(14)})
    saved(axes)
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    assert len({tuple(to_rgba(x.get_color())) for x in axes.get_lines()}) == 14


def test_error_is_linear_where_errors_are_alike():
    axes = plots.error(errors(RESULTS))
    assert axes.get_yscale() == "linear" and axes.get_ylabel() == "error"


def test_error_is_logarithmic_where_a_method_fails():
    axes = plots.error(errors(RESULTS | {"random": {0.9: 0.1}}))
    assert axes.get_yscale() == "log" and saved(axes)
    assert label_of(axes.yaxis, 0.02) == "2 %"
    assert {0.02, 0.05, 0.1} <= set(np.round(axes.yaxis.get_majorticklocs(), 12))


def test_error_is_linear_where_an_error_is_zero():
    assert plots.error({"ours": {0.5: 0.0, 0.9: 0.5}}).get_yscale() == "linear"


@pytest.mark.parametrize("draw", [plots.accuracy, plots.error])
def test_results_are_drawn_into_the_axes_they_are_given(draw):
    left, right = Figure().subplots(1, 2)
    assert draw(RESULTS, axes=right) is right
    assert right.get_lines() and not left.get_lines()


@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ([0.9], TypeError, r"`results` must map methods to sparsities to values, .* got \[0\.9\]"),
        ({"ours": [0.9]}, TypeError, "`results` must map methods to sparsities to values"),
        ({}, ValueError, "`results` must hold at least one method, got none"),
        ({"ours": {}}, ValueError, "`results` must have a sparsity for each .* none for 'ours'"),
        ({"ours": {90: 0.9}}, ValueError, r"sparsities in \[0, 1\] .* got 90 for 'ours'"),
        ({"ours": {"0.9": 0.9}}, TypeError, "`results` must be one real number, got '0.9'"),
        (
            {"ours": {0.9: "98 %"}},
            TypeError,
            "must have numbers, .* got '98 %' for 'ours' at .* 0.9",
        ),
        (
            {"ours": {0.9: []}},
            ValueError,
            "at least one value, got none for 'ours' at sparsity 0.9",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_have_it")
def test_bad_results_say_what_is_wrong(results, error, message):
    with pytest.raises(error, match=message):
        plots.accuracy(results)
    with pytest.raises(error, match=message):
        plots.error(results)
