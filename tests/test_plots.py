"""What the figures say, read back from matplotlib's artists."""

import io
import itertools
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.linear_model import lasso_path

from sparsejax import filters, plots
from sparsejax.allocation import Layer
from sparsejax.paths import CrossValidation, Path
from sparsejax.sensitivity import Curves

STRENGTHS = np.array([1.0, 0.3, 0.1, 0.01])
MEAN = np.array([4.0, 2.5, 2.0, 3.0])
ERROR = np.array([0.4, 0.3, 0.6, 0.2])
SPARSITIES = np.array([[1.0, 0.75, 0.5, 0.0], [1.0, 0.5, 0.25, 0.0]])
CV = CrossValidation(
    STRENGTHS, np.stack([MEAN - ERROR, MEAN + ERROR]), SPARSITIES, MEAN, ERROR, 2, 1
)
PRUNED = np.array([0.0, 0.9, 0.985, 0.99])
CV_OF_SPARSITIES = CrossValidation(
    PRUNED, np.stack([MEAN - ERROR, MEAN + ERROR]), np.stack([PRUNED, PRUNED]), MEAN, ERROR, 1, 2
)
LAYERS = (Layer("conv", (3, 3), 9), Layer("head", (2, 2), 4))
CURVES = Curves(LAYERS, np.array([0.5, 1.0]), np.array([[1.0, 3.0], [2.0, 4.0]]), 0.5, ({}, {}))


GRID = np.array([0.5, 0.75, 0.9, 0.95, 0.97, 0.98, 0.99])


def of(sparsities, losses=None):
    """Curves at some sparsities."""
    losses = np.linspace(0, 1, len(sparsities))[None] if losses is None else losses
    layers = tuple(Layer(f"block{i}.kernel", (1,), 1) for i in range(len(losses)))
    return Curves(layers, np.array(sparsities), losses, 0.0, ({},) * len(losses))


def a_path(*, strengths=STRENGTHS, **leaves):
    n = len(strengths)
    return Path(strengths, leaves, np.zeros(n), np.zeros(n))


def coefficients(*shape):
    values = np.random.default_rng(0).normal(size=(len(STRENGTHS), *shape))
    return np.where(np.abs(values) < 0.5, 0, values)


def top_labels(axes):
    (top,) = axes.child_axes
    ticks = zip(top.get_xticks(), top.get_xticklabels(), strict=True)
    return {float(x): text.get_text() for x, text in ticks}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def labels(axes):
    """What stands at which place of the axis below."""
    axes.figure.canvas.draw()
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return {float(x): text.get_text() for x, text in ticks}


def places(axes, sparsities):
    """Where sparsities stand in the picture, in pixels."""
    return axes.transData.transform([[s, 1.0] for s in sparsities])[:, 0]


def decade(axes):
    """How far it is from 0 to 90 %, in pixels."""
    return np.ptp(places(axes, [0.0, 0.9]))


def overlaps(axes):
    """Whether a label of the axis below stands over the next one."""
    saved(axes)
    boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
    return any(left.x1 >= right.x0 for left, right in itertools.pairwise(boxes))


def lines(axes):
    """The drawn lines, without those that span the axes."""
    return [line for line in axes.get_lines() if line.get_transform() == axes.transData]


def saved(axes):
    """Draws everything, as a file."""
    file = io.BytesIO()
    axes.figure.savefig(file, format="png")
    return file.getvalue()


@pytest.fixture(scope="module")
def lasso():
    x, y = load_diabetes(return_X_y=True)
    strengths, found, _ = lasso_path(x, y)
    return strengths, found[0] if found.ndim == 3 else found


def test_strength_path_draws_every_coefficient(lasso):
    strengths, found = lasso
    axes = plots.strength_path(a_path(strengths=strengths, w=found.T[:, :, None]))
    for line, row in zip(lines(axes), found, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), strengths)
        np.testing.assert_array_equal(line.get_ydata(), row)
    assert saved(axes)


def test_strength_path_counts_nonzeros_above(lasso):
    strengths, found = lasso
    labels = top_labels(plots.strength_path(a_path(strengths=strengths, w=found.T[:, :, None])))
    expected = {float(s): str(np.count_nonzero(c)) for s, c in zip(strengths, found.T, strict=True)}
    assert labels == {x: expected[x] for x in labels}
    assert {float(strengths.min()), float(strengths.max())} <= set(labels)


def test_strength_path_numbers_few_coefficients(lasso):
    strengths, found = lasso
    axes = plots.strength_path(a_path(strengths=strengths, w=found.T[:, :, None]))
    assert [text.get_text() for text in axes.texts] == [str(i) for i in range(10)]
    heights = sorted(text.xy[1] for text in axes.texts)
    assert np.min(np.diff(heights)) > 0.03 * np.ptp(axes.get_ylim())


def test_strength_path_numbers_no_more_than_twenty():
    assert len(plots.strength_path(a_path(w=coefficients(20, 1))).texts) == 20
    assert len(plots.strength_path(a_path(w=coefficients(21, 1))).texts) == 0


def test_strength_path_colors_leaves():
    axes = plots.strength_path(a_path(a=coefficients(3, 2), b=coefficients(1, 4)))
    assert legend(axes) == ["a", "b"]
    colors = [line.get_color() for line in lines(axes)]
    assert colors == ["C0"] * 6 + ["C1"] * 4


def test_strength_path_draws_sparsities_of_many_coefficients():
    leaves = {"a": coefficients(20, 10), "b": coefficients(2, 3)}
    axes = plots.strength_path(a_path(**leaves))
    assert legend(axes) == ["a", "b"] and axes.get_ylabel() == "sparsity of the leaf"
    for line, values in zip(lines(axes), leaves.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), np.mean(values == 0, axis=(1, 2)))


def test_strength_path_leaves_vectors_out_unless_asked_for():
    path = a_path(w=coefficients(3, 1), bias=coefficients(2), name="net")
    assert len(lines(plots.strength_path(path))) == 3
    assert len(lines(plots.strength_path(path, prunable=filters.floating))) == 5


def test_strength_path_takes_bfloat16():
    path = a_path(w=np.asarray(jnp.asarray(coefficients(3, 1), jnp.bfloat16)))
    assert len(lines(plots.strength_path(path))) == 3


def test_strength_path_leaves_nan_out():
    values = coefficients(3, 1)
    values[-1] = np.nan
    axes = plots.strength_path(a_path(w=values))
    assert saved(axes) and not axes.texts


@pytest.mark.parametrize(
    ("strengths", "scale"),
    [
        ([1.0, 0.1, 0.05], "log"),
        ([1.0, 0.5, 0.2], "linear"),
        ([1.0, 0.1, 0.0], "linear"),
        ([0.1], "linear"),
    ],
)
def test_strengths_have_a_logarithmic_axis_where_they_span_decades(strengths, scale):
    path = a_path(strengths=np.array(strengths), w=np.ones((len(strengths), 2, 1)))
    axes = plots.strength_path(path)
    assert axes.get_xscale() == scale and saved(axes)


def test_cross_validation_draws_means_and_errors():
    axes = plots.cross_validation(CV)
    (bars,) = axes.containers
    points, _, (segments,) = bars.lines
    np.testing.assert_array_equal(points.get_xdata(), STRENGTHS)
    np.testing.assert_array_equal(points.get_ydata(), MEAN)
    ends = np.array([segment[:, 1] for segment in segments.get_segments()])
    np.testing.assert_allclose(ends, np.stack([MEAN - ERROR, MEAN + ERROR], axis=1))
    assert axes.get_xscale() == "log" and saved(axes)


def test_cross_validation_marks_both_choices():
    axes = plots.cross_validation(CV)
    assert legend(axes) == ["best: 0.1", "within one standard error: 0.3"]
    marks = [
        line.get_xdata()[0]
        for line in axes.get_legend().axes.get_lines()
        if line.get_label()[0] != "_"
    ]
    assert marks == [0.1, 0.3]


def test_cross_validation_marks_one_choice_that_is_both():
    axes = plots.cross_validation(CV._replace(one_standard_error=2))
    assert legend(axes) == ["best, also within one standard error: 0.1"]


def test_cross_validation_shows_the_mean_sparsity_above():
    labels = top_labels(plots.cross_validation(CV))
    assert labels == {1.0: "1.00", 0.3: "0.62", 0.1: "0.38", 0.01: "0.00"}


def test_cross_validation_of_sparsities_spreads_them():
    axes = plots.cross_validation(CV_OF_SPARSITIES)
    assert axes.get_xlabel() == "sparsity" and not axes.child_axes
    np.testing.assert_allclose(np.diff(places(axes, [0.0, 0.9, 0.99])), decade(axes), rtol=1e-9)


def test_cross_validation_of_sparsities_draws_their_means_at_them():
    axes = plots.cross_validation(CV_OF_SPARSITIES)
    np.testing.assert_array_equal(axes.containers[0].lines[0].get_xdata(), PRUNED)
    assert legend(axes) == ["best: 90 %", "within one standard error: 98.5 %"]
    assert {0.0, 0.9} <= set(labels(axes)) and saved(axes)


@pytest.mark.parametrize(
    ("strengths", "fits"),
    [
        (PRUNED, PRUNED * 0.9),
        ([0.1, 0.3, 0.95, 1.0], [0.1, 0.3, 0.95, 1.0]),
        ([0.1, 0.3, 0.5, 0.85], [0.1, 0.3, 0.5, 0.85]),
        ([0.0, 0.5, 0.95, 0.95], [0.0, 0.5, 0.95, 0.95]),
        ([-0.01, 0.5, 0.95, 0.98], [0.0, 0.5, 0.95, 0.98]),
        (np.geomspace(0.95, 0.01, 4), [1.0, 0.8, 0.4, 0.1]),
    ],
)
def test_cross_validation_does_not_take_other_strengths_for_sparsities(strengths, fits):
    cv = CV._replace(strengths=np.array(strengths), sparsity=np.tile(np.array(fits), (2, 1)))
    axes = plots.cross_validation(cv)
    assert axes.get_xlabel() == "strength" and axes.get_xscale() != "function"


def test_cross_validation_of_sparsities_labels_the_first_and_the_last_if_they_are_round():
    round_ones = np.array([0.5, 0.8, 0.9, 0.95])
    cv = CV._replace(strengths=round_ones, sparsity=np.stack([round_ones] * 2))
    assert list(labels(plots.cross_validation(cv)).values()) == ["50 %", "80 %", "90 %", "95 %"]


def test_cross_validation_of_one_sparsity_labels_it():
    one = CrossValidation(
        np.array([0.93]), np.ones((2, 1)), np.full((2, 1), 0.93), np.ones(1), np.ones(1), 0, 0
    )
    axes = plots.cross_validation(one)
    assert labels(axes) == {0.93: "93 %"} and saved(axes)


@pytest.mark.parametrize("cv", [CV, CV_OF_SPARSITIES], ids=["strengths", "sparsities"])
def test_cross_validation_has_its_legend_above_everything(cv):
    axes = plots.cross_validation(cv)
    saved(axes)
    below = [axes.get_window_extent(), *(top.get_tightbbox() for top in axes.child_axes)]
    assert axes.get_legend().get_window_extent().y0 >= max(box.y1 for box in below)


def test_cross_validation_leaves_out_means_that_are_infinite():
    mean, error = MEAN.copy(), ERROR.copy()
    mean[0], error[0] = np.inf, np.nan
    axes = plots.cross_validation(CV._replace(mean=mean, standard_error=error))
    np.testing.assert_array_equal(axes.containers[0].lines[0].get_ydata(), MEAN[1:])
    assert saved(axes)


def test_sensitivity_draws_a_line_for_each_layer_from_the_dense_loss():
    axes = plots.sensitivity(CURVES)
    for line, losses in zip(axes.get_lines()[:2], CURVES.losses, strict=False):
        np.testing.assert_array_equal(line.get_xdata(), [0, 0.5, 1])
        np.testing.assert_array_equal(line.get_ydata(), [0.5, *losses])
    assert legend(axes) == ["conv", "head", "dense"] and saved(axes)


def test_sensitivity_marks_losses_that_are_not_finite():
    losses = np.array([[1.0, np.nan], [np.inf, 4.0]])
    axes = plots.sensitivity(CURVES._replace(losses=losses))
    crosses = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[1.0], [0.5]]
    assert saved(axes)


@pytest.mark.parametrize("sparsities", [GRID, [*GRID, 1.0]], ids=["below 1", "and 1"])
def test_sensitivity_draws_at_the_logarithm_of_the_density(sparsities):
    axes = plots.sensitivity(of(sparsities))
    ours = places(axes, [0.0, *GRID]) - places(axes, [0.0])
    np.testing.assert_allclose(ours, -np.log10(1 - np.array([0.0, *GRID])) * decade(axes))


def test_sensitivity_draws_sparsity_1_beyond_the_last():
    axes = plots.sensitivity(of([*GRID, 1.0]))
    last, end = places(axes, [GRID[-1], 1.0])
    assert labels(axes)[1.0] == "100 %"
    assert last + 10 < end < axes.get_window_extent().x1


def test_sensitivity_does_not_label_sparsity_1_where_it_was_not_measured():
    assert 1.0 not in labels(plots.sensitivity(of(GRID)))


def test_sensitivity_labels_round_sparsities():
    below = list(labels(plots.sensitivity(of(GRID))).values())
    assert below == ["0", "50 %", "80 %", "90 %", "95 %", "98 %", "99 %"]


@pytest.mark.parametrize("width", [2.5, 4, 7, 14])
@pytest.mark.parametrize("last", [0.5, 0.99, 0.9999])
def test_sensitivity_labels_no_more_than_fit(width, last):
    axes = Figure((width, 4), layout="constrained").subplots()
    plots.sensitivity(of([0.25, last, 1.0]), axes=axes)
    assert not overlaps(axes) and {0.0, 1.0} <= set(labels(axes))


def test_sensitivity_of_whole_layers_only_is_drawn():
    axes = plots.sensitivity(of([1.0]))
    assert labels(axes) == {0.0: "0", 1.0: "100 %"}


@pytest.mark.parametrize("layers", [3, 30, 60])
def test_sensitivity_has_a_legend_that_covers_no_line(layers):
    rising = np.sort(np.random.default_rng(0).uniform(0, 3, (layers, len(GRID)))) * GRID
    axes = plots.sensitivity(of(GRID, rising))
    saved(axes)
    legend_box = axes.get_legend().get_window_extent()
    for line in axes.get_lines()[:layers]:
        assert not line.get_path().transformed(axes.transData).intersects_bbox(legend_box, False)


def test_sensitivity_gives_many_layers_different_colors():
    many = tuple(Layer(f"layer{i}", (1,), 1) for i in range(30))
    curves = CURVES._replace(layers=many, losses=np.ones((30, 2)), pruned=({},) * 30)
    axes = plots.sensitivity(curves)
    assert len({tuple(line.get_color()) for line in axes.get_lines()[:30]}) == 30


@pytest.mark.parametrize(
    "draw",
    [
        lambda axes: plots.strength_path(a_path(w=coefficients(3, 1)), axes=axes),
        lambda axes: plots.cross_validation(CV, axes=axes),
        lambda axes: plots.sensitivity(CURVES, axes=axes),
    ],
)
def test_plots_draw_into_the_axes_they_are_given(draw):
    left, right = Figure().subplots(1, 2)
    assert draw(right) is right
    assert right.get_lines() and not left.get_lines()


def test_plots_do_not_touch_pyplot():
    program = (
        "import sys; from sparsejax import plots; assert 'matplotlib' not in sys.modules;"
        "import numpy as np; from sparsejax.sensitivity import Curves;"
        "plots.sensitivity(Curves((), np.array([0.5]), np.zeros((0, 1)), 0.0, ()));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_plots_without_matplotlib_say_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'sparsejax[examples]'")):
        plots.sensitivity(CURVES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.strength_path(CV), "`path` must be what paths.strength_path returns"),
        (lambda: plots.cross_validation(CURVES), "`cv` must be what paths.cross_validate returns"),
        (lambda: plots.sensitivity(CV), "`curves` must be what sensitivity.curves returns"),
        (lambda: plots.sensitivity(CURVES, axes=[1, 2]), r"`axes` must be axes .* got \[1, 2\]"),
    ],
)
@pytest.mark.usefixtures("as_users_have_it")
def test_bad_calls_say_what_is_wrong(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_strength_path_refuses_a_filter_that_selects_nothing():
    with pytest.raises(ValueError, match="`prunable` must select at least one leaf"):
        plots.strength_path(a_path(w=coefficients(3)))
