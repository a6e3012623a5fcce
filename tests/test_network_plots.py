"""What the figures of networks say (densities, weights, first layers), read from the artists."""

import io
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from sparsejax import filters, plots, quantization

RNG = np.random.default_rng(0)


def network(in_density, out_density):
    """Two kernels of 400 and 100 weights, with as many that are not zero, and a bias."""
    kernels = {}
    for name, shape, density in (("in", (20, 20), in_density), ("out", (20, 5), out_density)):
        kernel = np.zeros(shape, np.float32)
        kernel.flat[: round(density * kernel.size)] = 0.5
        kernels[name] = {"bias": np.zeros(shape[1], np.float32), "kernel": kernel}
    return kernels


def saved(axes):
    axes.figure.savefig(file := io.BytesIO(), format="png")
    return file.getvalue()


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def rows(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def right_ends(axes):
    """Where bars end, network by network."""
    return [[bar.get_x() + bar.get_width() for bar in bars] for bars in axes.containers]


def crosses(axes):
    return [x for x in axes.get_lines() if x.get_marker() == "x"]


def test_densities_draws_a_bar_for_each_layer_and_network():
    axes = plots.densities({"a": network(0.5, 0.2), "b": network(0.25, 1.0)})
    assert rows(axes) == ["in.kernel", "out.kernel"]
    np.testing.assert_allclose(right_ends(axes), [[0.5, 0.2], [0.25, 1.0]])
    assert axes.get_xscale() == "linear" and saved(axes)


def test_densities_names_the_density_of_the_whole_network():
    axes = plots.densities({"a": network(0.5, 0.2), "b": network(0.25, 1.0)})
    assert legend(axes) == ["a: 44 %", "b: 40 %"]


def test_densities_writes_every_number():
    axes = plots.densities({"a": network(0.5, 0.2), "b": network(0.25, 1.0)})
    assert [text.get_text() for text in axes.texts] == ["50 %", "20 %", "25 %", "100 %"]


def test_densities_does_not_write_very_many_numbers():
    many = {f"layer{i}": np.eye(2) for i in range(61)}
    axes = plots.densities({"a": many})
    assert not axes.texts and len(rows(axes)) == 61 and saved(axes)


def test_densities_has_bars_that_do_not_overlap():
    axes = plots.densities({name: network(0.5, 0.2) for name in "abc"})
    spans = sorted(
        (bar.get_y(), bar.get_y() + bar.get_height()) for bars in axes.containers for bar in bars
    )
    assert all(low >= high for (_, high), (low, _) in itertools.pairwise(spans))


def test_densities_has_a_logarithmic_axis_where_they_span_a_factor_of_ten():
    axes = plots.densities({"a": network(0.01, 0.5)})
    assert axes.get_xscale() == "log" and axes.get_xlim() == (0.001, 1)
    np.testing.assert_allclose(right_ends(axes), [[0.01, 0.5]])
    assert saved(axes)


def test_densities_marks_a_layer_that_is_empty():
    axes = plots.densities({"a": network(0.01, 0), "b": network(0.5, 0.1)})
    (cross,) = crosses(axes)
    (bar,) = [b for b in axes.containers[0] if b.get_width() == 0]
    np.testing.assert_allclose(cross.get_ydata(), [bar.get_y() + bar.get_height() / 2])
    assert axes.texts[1].get_text() == "0" and saved(axes)


def test_densities_of_networks_with_other_layers_has_the_rows_of_all():
    axes = plots.densities({"a": {"x": np.eye(2)}, "b": {"x": np.eye(4), "y": np.eye(10)}})
    assert rows(axes) == ["x", "y"]
    np.testing.assert_allclose(right_ends(axes)[0], [0.5])
    np.testing.assert_allclose(right_ends(axes)[1], [0.25, 0.1])


def test_densities_draws_what_the_filter_selects():
    axes = plots.densities({"a": network(0.5, 0.2)}, prunable=filters.by_path("out*"))
    assert rows(axes) == ["out.bias", "out.kernel"]


class Module(eqx.Module):
    kernel: jax.Array
    act: object = jax.nn.relu


class Network(nnx.Module):
    def __init__(self, kernel):
        self.kernel = nnx.Param(kernel)


def test_densities_takes_params_of_any_framework_and_dtype():
    kernel = jnp.eye(4, dtype=jnp.bfloat16)
    axes = plots.densities({"eqx": Module(kernel), "nnx": nnx.state(Network(kernel))})
    assert rows(axes) == ["kernel"] and legend(axes) == ["eqx: 25 %", "nnx: 25 %"]


@pytest.mark.parametrize("draw", [plots.densities, plots.histogram])
def test_quantized_networks_are_drawn_as_what_they_stand_for(draw):
    shared = quantization.share(network(0.5, 0.2), quantizable=filters.by_path("in.kernel"))
    coded = quantization.quantize(shared)
    axes, expected = draw({"a": coded}), draw({"a": quantization.dequantize(coded)})
    assert rows(axes) == rows(expected)
    assert legend(axes) == legend(expected)


@pytest.mark.parametrize("draw", [plots.first_layer, plots.receptive_fields])
def test_a_quantized_kernel_is_drawn_as_what_it_stands_for(draw):
    kernel = network(0.5, 0.2)["in"]["kernel"]
    axes = draw(quantization.share(kernel), (4, 5))
    expected = draw(kernel, (4, 5))
    np.testing.assert_array_equal(image_of(axes), image_of(expected))


def test_histogram_counts_what_is_not_zero_in_common_bins():
    a = {"w": RNG.normal(size=(30, 30)), "b": np.full(7, 9.0)}
    b = {"w": np.where(RNG.random((30, 30)) < 0.9, 0, a["w"])}
    axes = plots.histogram({"a": a, "b": b})
    left = int(np.count_nonzero(b["w"]))
    assert legend(axes) == ["a: 900 weights", f"b: {left} weights of 900"]
    end = np.abs(a["w"]).max()
    for patches, params in zip((axes.patches[:2], axes.patches[2:]), (a, b), strict=True):
        for patch in patches:
            counts, edges, _ = patch.get_data()
            np.testing.assert_allclose(edges, np.linspace(-end, end, len(edges)))
            assert len(counts) % 2 == 1 and counts.sum() == np.count_nonzero(params["w"])
    assert axes.get_yscale() == "log" and saved(axes)


def test_histogram_leaves_out_what_is_not_finite():
    axes = plots.histogram({"a": np.array([[np.nan, np.inf, 1.0, 0.0]])})
    assert legend(axes) == ["a: 1 weights of 4"] and axes.get_xlim() == (-1, 1)


@pytest.mark.parametrize("weights", [np.zeros((2, 2)), np.zeros((0, 2)), np.full((2, 2), np.nan)])
def test_histogram_of_nothing_is_drawn(weights):
    assert saved(plots.histogram({"a": weights}))


def test_histogram_takes_bfloat16():
    axes = plots.histogram({"a": jnp.ones((2, 2), jnp.bfloat16)})
    assert axes.patches[0].get_data()[0].sum() == 4


@pytest.mark.parametrize(
    "names", [["a", "b"], ["a rather long name of a network " + c for c in "ab"]]
)
def test_histogram_has_a_legend_above_that_fits(names):
    axes = plots.histogram({name: np.eye(100) for name in names})
    saved(axes)
    box, frame = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert box.y0 >= frame.y1 and box.x1 <= axes.figure.bbox.x1
    assert frame.width > 0.8 * axes.figure.bbox.width


def image_of(axes):
    (image,) = axes.get_images()
    return image.get_array()


def test_first_layer_counts_the_weights_of_each_pixel():
    kernel = np.where(RNG.random((12, 7)) < 0.3, RNG.normal(size=(12, 7)), 0)
    kernel[5] = 0
    axes = plots.first_layer(kernel, (3, 4))
    counts = np.count_nonzero(kernel, axis=1).reshape(3, 4)
    np.testing.assert_array_equal(image_of(axes).filled(0), counts)
    np.testing.assert_array_equal(image_of(axes).mask, counts == 0)
    assert axes.get_title("left") == f"{np.count_nonzero(counts)} of 12 pixels are read"
    assert saved(axes)


def test_first_layer_is_the_same_of_a_mask():
    kernel = np.where(RNG.random((12, 7)) < 0.3, RNG.normal(size=(12, 7)), 0)
    of_mask = image_of(plots.first_layer(jnp.asarray(kernel != 0), (3, 4)))
    np.testing.assert_array_equal(
        of_mask.filled(0), image_of(plots.first_layer(kernel, (3, 4))).filled(0)
    )


def test_first_layer_counts_all_channels_of_a_pixel():
    mask = RNG.random((3 * 4 * 2, 5)) < 0.5
    counts = np.count_nonzero(mask.reshape(3, 4, 2, 5), axis=(2, 3))
    np.testing.assert_array_equal(image_of(plots.first_layer(mask, (3, 4, 2))).filled(0), counts)


def test_first_layer_has_a_scale_of_whole_numbers():
    axes = plots.first_layer(np.eye(4), (2, 2))
    saved(axes)
    _, bar = axes.figure.axes
    ticks = bar.get_yticks()
    assert bar.get_ylabel() == "weights" and (ticks == np.round(ticks)).all()


def test_first_layer_of_nothing_is_drawn():
    axes = plots.first_layer(np.zeros((4, 3)), (2, 2))
    assert axes.get_title("left") == "0 of 4 pixels are read" and saved(axes)


def test_receptive_fields_draws_each_unit_as_an_image():
    kernel = RNG.normal(size=(6, 4))
    axes = plots.receptive_fields(kernel, (2, 3), units=[2, 0, 3])
    sheet = image_of(axes)
    assert sheet.shape == (5, 7)
    for tile, unit in ((sheet[:2, :3], 2), (sheet[:2, 4:], 0), (sheet[3:, :3], 3)):
        np.testing.assert_array_equal(tile, kernel[:, unit].reshape(2, 3))
    assert sheet[2].mask.all() and sheet[:, 3].mask.all() and sheet[3:, 4:].mask.all()
    assert axes.get_title("left") == "4 units; 3 are drawn" and saved(axes)


def test_receptive_fields_begins_with_the_units_that_have_most_weights():
    kernel = np.tri(9, 9)[:, [4, 0, 8]]
    sheet = image_of(plots.receptive_fields(kernel, (3, 3)))
    np.testing.assert_array_equal(sheet[:3, :3], 1)
    assert [sheet[:3, :3].sum(), sheet[:3, 4:].sum(), sheet[4:, :3].sum()] == [9, 5, 1]


def test_receptive_fields_draws_no_more_than_a_hundred():
    axes = plots.receptive_fields(np.pad(np.eye(9), ((0, 0), (0, 101))), (3, 3))
    assert axes.get_title("left") == "110 units, 101 without weights; 100 are drawn"
    assert image_of(axes).shape == (39, 39)


def test_receptive_fields_of_a_convolution_has_its_own_shape():
    kernel = RNG.normal(size=(3, 2, 2, 4)).astype(np.float32)
    sheet = image_of(plots.receptive_fields(kernel, units=[1]))
    np.testing.assert_allclose(sheet, kernel[..., 1].sum(-1))


def test_receptive_fields_of_a_mask_says_whether_anything_is_kept():
    mask = RNG.random((3, 2, 2, 4)) < 0.5
    axes = plots.receptive_fields(mask, units=[1])
    np.testing.assert_array_equal(image_of(axes), mask[..., 1].any(-1))
    assert len(axes.figure.axes) == 1 and saved(axes)


def test_receptive_fields_has_one_symmetric_scale_without_the_largest():
    kernel = np.full((100, 5), 0.1)
    kernel[0, 0] = -5
    (image,) = plots.receptive_fields(kernel, (10, 10)).get_images()
    np.testing.assert_allclose(image.get_clim(), (-0.1, 0.1))


def test_receptive_fields_of_zeros_is_drawn():
    assert saved(plots.receptive_fields(jnp.zeros((4, 3), jnp.bfloat16), (2, 2)))


DRAWN = {
    "densities": lambda axes: plots.densities({"a": np.eye(3)}, axes=axes),
    "histogram": lambda axes: plots.histogram({"a": np.eye(3)}, axes=axes),
    "first_layer": lambda axes: plots.first_layer(np.eye(4), (2, 2), axes=axes),
    "receptive_fields": lambda axes: plots.receptive_fields(np.eye(4), (2, 2), axes=axes),
}


@pytest.mark.parametrize("name", DRAWN)
def test_plots_draw_into_the_axes_they_are_given(name):
    left, right = Figure().subplots(1, 2)
    assert DRAWN[name](right) is right
    assert right.has_data() and not left.has_data()


EYE = np.eye(4)
BAD = {
    "params instead of networks": (
        lambda: plots.densities(EYE),
        TypeError,
        r"`networks` must map names to params, such as \{\"pruned\": params\}, got array",
    ),
    "no network": (
        lambda: plots.histogram({}),
        ValueError,
        "`networks` must hold at least one network, got none",
    ),
    "masks instead of params": (
        lambda: plots.densities({"a": {"w": EYE != 0}}),
        ValueError,
        "`prunable` must select at least one leaf",
    ),
    "a filter that is a word": (
        lambda: plots.histogram({"a": EYE}, prunable="w"),
        TypeError,
        r"`prunable` must be a function \(path, leaf\) -> bool",
    ),
    "params instead of a kernel": (
        lambda: plots.first_layer({"w": EYE}, (2, 2)),
        TypeError,
        r"`kernel` must be an array of weights or booleans, got \{'w'",
    ),
    "a complex kernel": (
        lambda: plots.first_layer(EYE + 1j, (2, 2)),
        TypeError,
        r"`kernel` must be an array of weights or booleans, got complex128\[4,4\]",
    ),
    "a convolution's kernel": (
        lambda: plots.first_layer(np.ones((3, 3, 1, 4)), (3, 3)),
        ValueError,
        r"`kernel` must have 2 axes, the last for units, and entries, got float64\[3,3,1,4\]",
    ),
    "an empty kernel": (
        lambda: plots.receptive_fields(np.ones((0, 4)), (0, 0)),
        ValueError,
        r"`kernel` must have 2 or 4 axes, .* got float64\[0,4\]",
    ),
    "a shape that is a number": (
        lambda: plots.first_layer(EYE, 4),
        TypeError,
        r"`shape` must be that of an image, such as \(28, 28\), got 4",
    ),
    "a shape of another size": (
        lambda: plots.first_layer(EYE, (2, 3)),
        ValueError,
        r"as many values as the kernel has inputs, 4, got \(2, 3\)",
    ),
    "no shape": (
        lambda: plots.receptive_fields(EYE),
        TypeError,
        r"`shape` must be that of an image, such as \(28, 28\), got None",
    ),
    "a shape of a convolution": (
        lambda: plots.receptive_fields(np.ones((3, 3, 1, 4)), (3, 3)),
        ValueError,
        r"`shape` must be left out for a convolution, got \(3, 3\)",
    ),
    "units that are a number": (
        lambda: plots.receptive_fields(EYE, (2, 2), units=3),
        TypeError,
        "`units` must be several integers, got 3",
    ),
    "units that are not there": (
        lambda: plots.receptive_fields(EYE, (2, 2), units=[0, 4]),
        ValueError,
        r"`units` must name units from 0 to 3, got \[0, 4\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("as_users_have_it")
def test_bad_calls_say_what_is_wrong(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
