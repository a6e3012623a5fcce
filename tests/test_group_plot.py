"""What the picture of groups says, read back from matplotlib's artists."""

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CASES
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from sparsejax import criteria, dependency, plots, shrinking

GRAY = to_rgba("0.78")
NAMES = (
    "decoder_gqa_repeat-nnx",
    "densenet-dict",
    "lstm-linen",
    "squeeze_excite-equinox",
    "vit-linen",
)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def residual(params, x):
    """A stream of 8 features through two branches of 6 and 16."""
    x = x @ params["stem"]
    for branch in ("a", "b"):
        y = jax.nn.relu(x @ params[branch]["in"] + params[branch]["bias"][None])
        x = x + y @ params[branch]["out"]
    return x @ params["head"]


PARAMS = {
    "a": {"in": shape(8, 6), "bias": shape(6), "out": shape(6, 8)},
    "b": {"in": shape(8, 16), "bias": shape(16), "out": shape(16, 8)},
    "head": shape(8, 2),
    "stem": shape(3, 8),
}
GROUPS = dependency.trace(residual, PARAMS, shape(1, 3))
# Units 1 and 2 of the stream go, and half of the wider branch.
PLAN = shrinking.plan(
    GROUPS,
    {"stem": [9, 0, 0, 9, 9, 9, 9, 9], "b.in": np.arange(16)},
    keep={"stem": 6, "b.in": 8},
)
ORDER = ["stem", "a.in", "a.out", "b.in", "b.out", "head"]


def chain(*widths):
    """Groups of dense layers, each as wide as said; the first is the input."""

    def apply(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    params = [shape(n, m) for n, m in itertools.pairwise(widths)]
    return dependency.trace(apply, params, shape(1, widths[0]))


def of_magnitude(groups, sparsity):
    scores = {name: np.arange(group.size) for name, group in groups.items()}
    return shrinking.plan(groups, scores, sparsity=sparsity)


def bars(axes):
    """By leaf and axis, the color of every index's length: [(color, first x, last x)]."""
    found = {}
    for drawn in axes.collections:
        if drawn.get_gid() is not None:
            spans = [path.get_extents().intervalx for path in drawn.get_paths()]
            (color,) = drawn.get_facecolors()
            found.setdefault(drawn.get_gid(), []).extend((tuple(color), *x) for x in spans)
    return found


def colors(axes):
    """By leaf and axis, the colors of its bar, pale or not."""
    return {gid: {color[:3] for color, *_ in parts} for gid, parts in bars(axes).items()}


def length(parts):
    return sum(last - first for _, first, last in parts)


def pale(parts):
    return [part for part in parts if part[0][3] < 1]


def rows(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def saved(axes):
    file = io.BytesIO()
    axes.figure.savefig(file, format="png")
    return file.getvalue()


def test_groups_have_a_row_for_each_kernel_in_the_order_of_use():
    assert rows(plots.groups(GROUPS)) == ORDER


def test_groups_have_two_bars_a_kernel():
    axes = plots.groups(GROUPS, PLAN)
    assert set(bars(axes)) == {f"{path}[{axis}]" for path in ORDER for axis in (0, 1)}
    assert saved(axes)


def test_groups_color_what_is_coupled_alike():
    found = colors(plots.groups(GROUPS, PLAN))
    assert all(len(of) == 1 for of in found.values())
    stream = {"stem[1]", "a.in[0]", "a.out[1]", "b.in[0]", "b.out[1]", "head[0]"}
    coupled = [stream, {"a.in[1]", "a.out[0]"}, {"b.in[1]", "b.out[0]"}, {"stem[0]", "head[1]"}]
    seen = [set.union(*(found[gid] for gid in gids)) for gids in coupled]
    assert all(len(of) == 1 for of in seen) and len(set.union(*seen)) == 4
    assert seen[-1] == {GRAY[:3]}


def test_groups_draw_inputs_to_the_left_and_outputs_to_the_right():
    for gid, parts in bars(plots.groups(GROUPS, PLAN)).items():
        side = -1 if gid.endswith("[0]") else 1
        assert all(side * first > 0 and side * last > 0 for _, first, last in parts)


def test_groups_draw_bars_as_long_as_the_axes():
    found = bars(plots.groups(GROUPS, PLAN))
    for path, sizes in {"stem": (3, 8), "a.in": (8, 6), "b.out": (16, 8)}.items():
        for axis, size in enumerate(sizes):
            assert length(found[f"{path}[{axis}]"]) == pytest.approx(size / 16)


def test_groups_thin_the_indices_that_go():
    found = bars(plots.groups(GROUPS, PLAN))
    ((_, first, last),) = pale(found["stem[1]"])
    start = min(x for _, x, _ in found["stem[1]"])
    np.testing.assert_allclose([(first - start) * 16, (last - start) * 16], [1, 3])
    assert length(pale(found["b.in[1]"])) == pytest.approx(8 / 16)
    assert not pale(found["a.in[1]"]) and not pale(found["stem[0]"])


def test_groups_write_the_sizes_before_and_after():
    found = texts(plots.groups(GROUPS, PLAN))
    rows_of_two = ["3", "8 → 6", "8 → 6", "6", "6", "8 → 6"]
    rows_of_two += ["8 → 6", "16 → 8", "16 → 8", "8 → 6", "8 → 6", "2"]
    assert found == [*rows_of_two, "input axes", "output axes"]


def test_groups_name_the_groups_in_a_legend():
    assert legend(plots.groups(GROUPS, PLAN)) == [
        "stem: 8 → 6 units",
        "a.in: 6 units (+ 1 vector)",
        "b.in: 16 → 8 units (+ 1 vector)",
        "locked: stays",
        "pale: removed",
    ]


def test_groups_show_the_colors_of_the_bars_in_the_legend():
    axes = plots.groups(GROUPS, PLAN)
    handles = axes.get_legend().get_lines()
    shown = [to_rgba(line.get_color())[:3] for line in handles[:3]]
    found = colors(axes)
    assert [{color} for color in shown] == [found[x] for x in ("stem[1]", "a.in[1]", "b.in[1]")]


def test_groups_write_the_totals_above():
    assert plots.groups(GROUPS, PLAN).get_title("left") == (
        f"{PLAN.params[0]:,} → {PLAN.params[1]:,} parameters "
        f"({PLAN.params[1] / PLAN.params[0]:.1%}), {PLAN.flops[0]:,} → {PLAN.flops[1]:,} FLOPs "
        f"({PLAN.flops[1] / PLAN.flops[0]:.1%})"
    )


def test_groups_need_no_plan():
    axes = plots.groups(GROUPS)
    assert not any(pale(parts) for parts in bars(axes).values())
    assert "8 → 6" not in texts(axes) and texts(axes).count("8") == 6
    assert legend(axes)[0] == "stem: 8 units" and legend(axes)[-1] == "locked: stays"
    assert axes.get_title("left") == f"{GROUPS.params:,} parameters, {GROUPS.flops:,} FLOPs"
    assert saved(axes)


def test_groups_are_joined_by_a_line_from_their_first_bar_to_their_last():
    axes = plots.groups(GROUPS)
    stream = axes.get_legend().get_lines()[0].get_color()
    upright = [
        line
        for line in axes.get_lines()
        if line.get_color() == stream and len(line.get_xdata()) == 2 and np.ptp(line.get_ydata())
    ]
    (line,) = upright
    assert line.get_xdata()[0] == line.get_xdata()[1]
    assert sorted(np.floor(line.get_ydata())) == [0, 5]


def test_groups_show_the_share_of_long_axes():
    groups = chain(4, 200, 3)
    parts = bars(plots.groups(groups, of_magnitude(groups, 0.25)))["0[1]"]
    assert len(parts) == 2 and length(pale(parts)) == pytest.approx(0.25)


def test_groups_tear_a_locked_axis_that_is_longer_than_those_that_can_be_cut():
    axes = plots.groups(chain(5000, 10, 4))
    assert length(bars(axes)["0[0]"]) == pytest.approx(1) and "5,000" in texts(axes)
    assert sum(drawn.get_gid() is None for drawn in axes.collections) == 1


def test_groups_leave_windows_of_convolutions_out():
    case = CASES["resnet_basic-nnx"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    found = bars(plots.groups(groups))
    kernels = [leaf for leaf in groups.leaves if len(leaf.shape) == 4]
    assert kernels and all(f"{k.path}[{axis}]" in found for k in kernels for axis in (2, 3))
    assert not any(f"{k.path}[{axis}]" in found for k in kernels for axis in (0, 1))


def test_groups_draw_heads_and_their_width_in_layers():
    """An index of queries goes when its head goes, or its place in all heads."""

    def attention(params, x):
        q, k = (jnp.reshape(x @ params[name], (5, 4, 3)) for name in "qk")
        return jnp.einsum("ihd,jhd->ij", q, k)

    groups = dependency.trace(attention, {"q": shape(2, 12), "k": shape(2, 12)}, shape(5, 2))
    axes = plots.groups(groups, of_magnitude(groups, 0.5))
    assert len(groups) == 2 and len(colors(axes)["q[1]"]) == 2
    assert length(bars(axes)["q[1]"]) == pytest.approx(2)


def test_groups_say_how_many_more_there_are():
    groups = chain(*[4] * 61)
    axes = plots.groups(groups, of_magnitude(groups, 0.5))
    assert len(rows(axes)) == 40 and texts(axes)[-1] == "and 20 more kernels"
    assert legend(axes)[30] == "and 29 more groups" and len(legend(axes)) == 33
    assert saved(axes)


def test_groups_of_many_share_no_color():
    handles = plots.groups(chain(*[4] * 31)).get_legend().get_lines()
    assert len({to_rgba(line.get_color()) for line in handles}) == 30


def test_groups_shorten_long_names():
    name = "encoder." * 6 + "kernel"
    groups = dependency.trace(
        lambda p, x: jax.nn.relu(x @ p[name]) @ p["out"],
        {name: shape(2, 4), "out": shape(4, 2)},
        shape(1, 2),
    )
    axes = plots.groups(groups)
    assert rows(axes)[0] == "encoder.encoder.enc…oder.encoder.kernel"
    assert legend(axes)[0] == "encoder.encoder.enc…oder.encoder.kernel: 4 units"


def test_groups_that_are_none_are_gray():
    groups = dependency.trace(lambda p, x: x @ p["w"], {"w": shape(3, 2)}, shape(1, 3))
    axes = plots.groups(groups)
    assert {color for parts in bars(axes).values() for color, *_ in parts} == {GRAY}
    assert legend(axes) == ["locked: stays"] and saved(axes)


def test_groups_without_kernels_have_no_rows():
    groups = dependency.trace(lambda p, x: jnp.sum(p["w"] * x), {"w": shape(3)}, shape(3))
    assert rows(plots.groups(groups)) == []


@pytest.mark.parametrize("name", NAMES)
def test_groups_draw_every_architecture(name):
    case = CASES[name]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    axes = plots.groups(groups, of_magnitude(groups, 0.5))
    drawn = bars(axes)
    cuttable = {
        f"{m.path}[{m.axis}]" for g in groups.values() for m in g.members if m.path in rows(axes)
    }
    assert cuttable <= set(drawn)


def test_groups_draw_where_they_are_told():
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    assert plots.groups(GROUPS, axes=axes) is axes and saved(axes)


def test_groups_take_a_plan_read_from_json():
    plan = shrinking.Plan.from_json(PLAN.to_json())
    assert legend(plots.groups(GROUPS, plan)) == legend(plots.groups(GROUPS, PLAN))


@pytest.mark.usefixtures("as_users_have_it")
def test_groups_refuse_other_kinds():
    with pytest.raises(TypeError, match=r"`groups` must be what dependency\.trace returns, got"):
        plots.groups({})
    with pytest.raises(TypeError, match=r"`plan` must be what shrinking\.plan returns, got"):
        plots.groups(GROUPS, {})
    with pytest.raises(TypeError, match="`axes` must be axes of matplotlib"):
        plots.groups(GROUPS, axes=3)


def test_groups_refuse_a_plan_of_others():
    other = chain(3, 8, 2)
    plan = of_magnitude(other, 0.5)
    with pytest.raises(ValueError, match=r"`plan` must be of these groups: group 'stem' has"):
        plots.groups(GROUPS, plan)
    wider = chain(4, 8, 2)
    with pytest.raises(
        ValueError, match=r"leaf '0' has size \(4, 8\) here and \(3, 8\) in the plan"
    ):
        plots.groups(wider, plan)


def test_criteria_give_the_plan_of_the_picture():
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), PARAMS)
    plan = shrinking.plan(GROUPS, criteria.magnitude(params), sparsity=0.5)
    assert "stem: 8 → 4 units" in legend(plots.groups(GROUPS, plan))
