"""Allocations against the published formulas and numbers; sums and caps are exact."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.allocation import Layer, allocate, erdos_renyi, erdos_renyi_kernel, override, uniform


def layer(*shape, path="w", units=None):
    return Layer(path, shape, math.prod(shape) if units is None else units)


def resnet50_shapes():
    """The 54 weights of ResNet-50 for ImageNet, HWIO; a first block ends with its shortcut."""
    shapes, channels = [(7, 7, 3, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                shapes.append((1, 1, channels, 4 * width))
            channels = 4 * width
    return [*shapes, (2048, 1000)]


RESNET50 = [layer(*shape) for shape in resnet50_shapes()]
SIZES = [x.units for x in RESNET50]
SPARSITIES = [0.5, 0.8, 0.9, 0.95, 0.98, 0.99]

each = pytest.mark.parametrize("allocation_", [uniform, erdos_renyi, erdos_renyi_kernel])


@st.composite
def problems(draw):
    """A few layers (some vectors, numbers, empty; units often fewer than entries) and `keep`."""
    shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), max_size=8))
    units = [draw(st.sampled_from([math.prod(s), math.prod(s[-1:]), 0])) for s in shapes]
    units = [0 if 0 in s else u for s, u in zip(shapes, units, strict=True)]
    layers = [Layer(f"w{i}", s, u) for i, (s, u) in enumerate(zip(shapes, units, strict=True))]
    return layers, draw(st.integers(0, sum(units)))


# ---- the published formulas


def densities_of_rigl(layers, keep, *, kernel):
    """The loop of rigl/sparse_utils.py (get_sparsities_erdos_renyi) in float64: `keep` is given."""
    sizes = [math.prod(x.shape) for x in layers]
    raw = [
        sum(x.shape) / math.prod(x.shape) if kernel else sum(x.shape[-2:]) / math.prod(x.shape[-2:])
        for x in layers
    ]
    dense = set()
    while True:
        free = [i for i in range(len(layers)) if i not in dense]
        left = keep - sum(sizes[i] for i in dense)
        eps = left / sum(raw[i] * sizes[i] for i in free)
        highest = max(raw[i] for i in free)
        if eps * highest <= 1:
            return [1.0 if i in dense else eps * raw[i] for i in range(len(layers))]
        dense |= {i for i in free if raw[i] == highest}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kernel", [True, False], ids=["ERK", "ER"])
def test_erdos_renyi_of_resnet50_equals_the_loop_of_rigl(kernel, sparsity):
    keep = sum(size - math.floor(sparsity * size) for size in SIZES)  # as RigL counts
    kept = (erdos_renyi_kernel if kernel else erdos_renyi)(RESNET50, keep)
    published = densities_of_rigl(RESNET50, keep, kernel=kernel)
    assert sum(SIZES) == 25_502_912 and sum(kept) == keep
    assert max(abs(k - d * n) for k, d, n in zip(kept, published, SIZES, strict=True)) < 1
    assert [k == n for k, n in zip(kept, SIZES, strict=True)] == [d == 1 for d in published]


def test_erdos_renyi_kernel_of_resnet50_equals_the_published_table():
    # Sparsities in per cent at 90 %, the column ERK of github.com/RAIVNLab/STR (Apache-2.0),
    # budgets/SparsityDistributions_90_ResNet50.csv (Kusupati et al., ICML 2020, arXiv:2002.03231).
    published = [
        *(58, 0, 82, 4, 4, 4, 82, 4, 4, 82, 4, 43, 91, 52, 71, 52, 91, 52),
        *(52, 91, 52, 52, 91, 52, 71, 96, 76, 86, 76, 96, 76, 76, 96, 76, 76, 96),
        *(76, 76, 96, 76, 76, 96, 76, 86, 98, 88, 93, 88, 98, 88, 88, 98, 88, 93),
    ]
    kept = erdos_renyi_kernel(RESNET50, round(0.1 * sum(SIZES)))
    assert [round(100 * (1 - k / n)) for k, n in zip(kept, SIZES, strict=True)] == published


def test_erdos_renyi_of_an_mlp_equals_set():
    # Mocanu et al. 2018: ε (n_in + n_out) connections; for 784-1000-1000-10 and ε = 20.
    layers = [layer(784, 1000), layer(1000, 1000), layer(1000, 10)]
    expected = [20 * 1784, 20 * 2000, 10_000]  # 20 · 1010 is more than there are
    assert erdos_renyi(layers, sum(expected)) == expected


# ---- properties


@each
@given(problem=problems())
def test_allocation_sums_to_keep_within_the_caps(allocation_, problem):
    layers, keep = problem
    kept = allocation_(layers, keep)
    assert sum(kept) == keep
    assert all(0 <= k <= x.units for k, x in zip(kept, layers, strict=True))


@each
@given(problem=problems())
def test_allocation_is_min_of_units_and_a_common_multiple_of_the_weights(allocation_, problem):
    # By bisection on the multiple, which no line of the library does.
    layers, keep = problem
    weights = [weight_of(allocation_, x) for x in layers]

    def quotas(eps):
        return [min(Fraction(x.units), eps * w) for x, w in zip(layers, weights, strict=True)]

    low, high = Fraction(0), Fraction(1000)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(quotas(middle)) <= keep else (low, middle)
    kept = allocation_(layers, keep)
    tolerance = 1 + Fraction(1, 10**9)
    assert all(abs(k - q) < tolerance for k, q in zip(kept, quotas(low), strict=True))


def weight_of(allocation_, x):
    if x.units == 0:
        return Fraction(0)
    shape = (1,) * (2 - len(x.shape)) + x.shape
    density = {
        uniform: Fraction(1),
        erdos_renyi: Fraction(1, shape[-1]) + Fraction(1, shape[-2]),
        erdos_renyi_kernel: Fraction(sum(shape), math.prod(shape)),
    }[allocation_]
    return x.units * density


@each
@given(problem=problems())
def test_allocation_of_equal_layers_differs_by_at_most_one_the_earlier_first(allocation_, problem):
    layers, keep = problem
    kept = iter(allocation_(3 * layers, 3 * keep - 1 if keep else 0))
    first, second, third = ([next(kept) for _ in layers] for _ in range(3))
    for a, b, c in zip(first, second, third, strict=True):
        assert a >= b >= c >= a - 1


@each
@given(problem=problems())
def test_allocation_of_everything_and_of_nothing(allocation_, problem):
    layers, _ = problem
    units = [x.units for x in layers]
    assert allocation_(layers, sum(units)) == units
    assert allocation_(layers, 0) == [0] * len(layers)


@given(problem=problems())
def test_uniform_is_within_one_unit_of_the_common_density(problem):
    layers, keep = problem
    units = max(sum(x.units for x in layers), 1)
    for k, x in zip(uniform(layers, keep), layers, strict=True):
        assert abs(k - Fraction(keep * x.units, units)) < 1


@given(problem=problems())
def test_erdos_renyi_of_transposed_shapes_and_axes_is_the_same(problem):
    layers, keep = problem
    transposed = [x._replace(shape=x.shape[::-1]) for x in layers]
    assert erdos_renyi(transposed, keep, axes=(1, 0)) == erdos_renyi(layers, keep)
    assert erdos_renyi_kernel(transposed, keep) == erdos_renyi_kernel(layers, keep)


def test_largest_remainders_get_what_is_over_the_earlier_layer_first():
    layers = [layer(5, 1), layer(7, 1), layer(7, 1), layer(1, 1)]
    assert uniform(layers, 10) == [3, 4, 3, 0]  # 2.5, 3.5, 3.5, 0.5
    assert uniform(layers, 9) == [2, 3, 3, 1]  # 2.25, 3.15, 3.15, 0.45


def test_erdos_renyi_kernel_counts_channels_by_the_density_of_weights():
    layers = [layer(3, 3, 8, 32, units=32), layer(3, 3, 32, 32, units=32), layer(8, 32, units=32)]
    kept = erdos_renyi_kernel(layers, 48)
    ratio = Fraction(46, 2304) / Fraction(70, 9216)
    assert kept[2] == 32 and sum(kept) == 48 and abs(kept[0] - 16 * ratio / (1 + ratio)) < 1


def test_vectors_and_numbers_count_as_matrices_with_axes_of_one():
    short, long = [layer(4, 4), layer(6), layer()], [layer(4, 4), layer(1, 6), layer(1, 1)]
    for keep in range(24):
        assert erdos_renyi_kernel(short, keep) == erdos_renyi_kernel(long, keep)
        assert erdos_renyi(short, keep, axes=(1, 0)) == erdos_renyi(long, keep, axes=(1, 0))


@each
def test_allocation_of_a_thousand_layers_is_exact(allocation_):
    # Sides without common factors, so that the common denominator is long.
    sides = np.random.default_rng(0).integers(1, 10_000, (1_000, 2)).tolist()
    layers = [layer(*shape) for shape in sides]
    keep = sum(x.units for x in layers) // 3
    kept = allocation_(layers, keep)
    assert sum(kept) == keep and kept == allocation_(tuple(layers), keep)


@each
def test_allocation_takes_integers_of_numpy_without_overflow(allocation_):
    shape, units = np.array([2**20, 2**20]), np.array(2**40)
    layers = [Layer("w", tuple(shape), units[()])] * 3
    kept = allocation_(layers, 2**41 + 1)
    assert sum(kept) == 2**41 + 1 and all(type(k) is int for k in kept)


@each
def test_allocation_inside_a_jitted_function_is_of_integers(allocation_):
    layers = [layer(3, 4), layer(4, 4)]
    assert jax.jit(lambda x: x + sum(allocation_(layers, 17)))(0) == 17


# ---- override, allocate

NET = [layer(3, 4, path="conv1.kernel"), layer(4, 5, path="conv2.kernel"), layer(5, 2, path="head")]


def test_override_gives_what_is_left_to_the_base():
    kept = override(erdos_renyi, {"conv1.*": 1.0})(NET, 30)
    assert kept == [12, *erdos_renyi(NET[1:], 18)]


@pytest.mark.parametrize(("density", "count"), [(0.25, 2), (0.75, 8), (0.0, 0), (1.0, 10)])
def test_override_rounds_half_to_even(density, count):
    assert override(uniform, {"head": density})(NET, 20)[2] == count


def test_override_by_the_first_pattern_that_matches():
    densities = {"conv1*": 0.5, "conv*": 1.0, "h[aeiou]?d": 0.2}
    assert override(uniform, densities)(NET, 28) == [6, 20, 2]


def test_override_of_an_override():
    inner = override(uniform, {"head": 0.5})
    assert override(inner, {"conv1.*": 1.0})(NET, 20) == [12, 3, 5]


def test_override_copies_its_densities():
    densities = {"head": 0.5}
    overridden = override(uniform, densities)
    densities["head"] = 1.0
    assert overridden(NET, 20)[2] == 5


def test_override_of_nothing_is_the_base():
    assert override(uniform, {})(NET, 20) == uniform(NET, 20)


def test_override_does_not_ask_the_base_about_no_layers():
    assert override(lambda layers, keep: 1 // 0, {"*": 0.5})(NET, 21) == [6, 10, 5]


@each
@given(problem=problems())
def test_allocate_lets_every_allocation_pass(allocation_, problem):
    layers, keep = problem
    assert allocate(allocation_, layers, keep) == allocation_(layers, keep)


def test_allocate_gives_python_integers():
    kept = allocate(lambda layers, keep: (np.int64(12), np.int64(3), 0), NET, 15)
    assert kept == [12, 3, 0] and all(type(k) is int for k in kept)


# ---- errors


def answering(*counts):
    return lambda: allocate(lambda layers, keep: list(counts), NET, 20)


def checking(*fields):
    return lambda: uniform([Layer("net.w", *fields)], 0)


ERRORS = {
    "keep is a density": (
        lambda: uniform(NET, 0.5),
        TypeError,
        r"`keep` must be an integer, .* got 0\.5; for a density pass round\(density \* units\)",
    ),
    "keep is a boolean": (lambda: uniform(NET, True), TypeError, r"`keep` must be an .*got True"),
    "keep is traced": (
        lambda: jax.jit(lambda keep: jnp.stack(uniform(NET, keep)))(3),
        TypeError,
        r"`keep` must be an integer, .* got JitTracer",
    ),
    "keep is negative": (
        lambda: erdos_renyi(NET, -1),
        ValueError,
        r"`keep` must be from 0 to 42, .* got -1",
    ),
    "keep is too large": (
        lambda: allocate(uniform, NET, 43),
        ValueError,
        r"`keep` must be from 0 to 42, the units of all layers, got 43",
    ),
    "layers are a mapping": (
        lambda: uniform({"w": (3, 4)}, 3),
        TypeError,
        r"`layers` must be a sequence of Layer, got \{'w'",
    ),
    "layers are shapes": (
        lambda: uniform([(3, 4)], 3),
        TypeError,
        r"`layers` must be of type Layer\(path, shape, units\), got \(3, 4\)",
    ),
    "a shape is a size": (checking(12, 12), TypeError, r"`layers` must have shapes, .* got 12 at"),
    "a shape is negative": (checking((-1, 2), 2), TypeError, r"`layers` must .* got \(-1, 2\) at"),
    "units are a fraction": (
        checking((3, 4), 1.5),
        TypeError,
        r"`layers` must have a whole number of units, got 1\.5 at 'net\.w'",
    ),
    "units are negative": (
        checking((3, 4), -2),
        ValueError,
        r"`layers` must have units >= 0, .* got -2 for the shape \(3, 4\) at 'net\.w'",
    ),
    "units of an empty shape": (
        checking((3, 0), 2),
        ValueError,
        r"`layers` must have .* 0 where the shape is empty, got 2 for the shape \(3, 0\)",
    ),
    "axes are one": (
        lambda: erdos_renyi(NET, 3, axes=-1),
        TypeError,
        r"`axes` must be two integers \(in, out\), such as \(-2, -1\), got -1",
    ),
    "axes are out of range": (
        lambda: erdos_renyi(NET, 3, axes=(2, 3)),
        ValueError,
        r"`axes` must be two different axes .* got \(2, 3\) for the shape \(3, 4\) at 'conv1",
    ),
    "axes are the same": (
        lambda: erdos_renyi(NET, 3, axes=(0, -2)),
        ValueError,
        r"`axes` must be two different axes .* got \(0, -2\) .* \(1, 0\) suits",
    ),
    "base is densities": (
        lambda: override({"head": 1.0}, uniform),
        TypeError,
        r"`base` must be a function \(layers, keep\) -> kept .* got \{'head': 1\.0\}; for example",
    ),
    "densities are one number": (
        lambda: override(uniform, 0.5),
        TypeError,
        r"`densities` must map patterns to densities, .* got 0\.5",
    ),
    "a pattern is an index": (
        lambda: override(uniform, {0: 0.5}),
        TypeError,
        r"`densities` must have patterns such as .*, got 0",
    ),
    "a density is a percentage": (
        lambda: override(uniform, {"head": 50}),
        ValueError,
        r"`densities` must be in \[0, 1\] \(fractions, not .* got 50 at 'head'",
    ),
    "a density is NaN": (
        lambda: override(uniform, {"head": math.nan}),
        ValueError,
        r"`densities` must be in \[0, 1\] .* got nan at 'head'",
    ),
    "a density is a boolean": (
        lambda: override(uniform, {"head": True}),
        TypeError,
        r"`densities` must be real numbers, got True at 'head'",
    ),
    "a pattern matches nothing": (
        lambda: override(uniform, {"head": 1.0, "conv3.*": 1.0})(NET, 20),
        ValueError,
        r"`densities` must match a layer with every pattern, got 'conv3\.\*' for 3 layers \('conv1",
    ),
    "densities above keep": (
        lambda: override(uniform, {"conv*": 1.0})(NET, 20),
        ValueError,
        r"`densities` must not keep more than `keep` units, 20, got 32; lower",
    ),
    "densities below what the others can take": (
        lambda: override(uniform, {"conv*": 0.25})(NET, 20),
        ValueError,
        r"`densities` must keep at least 10 units, got 8: `keep` is 20, .* have 10; raise",
    ),
    "base answers too much": (
        lambda: override(lambda layers, keep: [keep, 1], {"head": 1.0})(NET, 20),
        ValueError,
        r"`base` must keep 10 units in all, got 11",
    ),
    "allocation is a list": (
        lambda: allocate([12, 8, 0], NET, 20),
        TypeError,
        r"`allocation` must be a function \(layers, keep\) -> kept .* got \[12, 8, 0\]",
    ),
    "allocation answers with an array": (
        lambda: allocate(lambda layers, keep: np.array([12, 8, 0]), NET, 20),
        TypeError,
        r"`allocation` must return a list of integers, .* got ndarray .* tolist\(\)",
    ),
    "allocation answers for fewer layers": (
        answering(10, 10),
        ValueError,
        r"`allocation` must return one count a layer, got 2 for 3 layers: \[10, 10\]",
    ),
    "allocation answers with floats": (
        answering(12, 8.0, 0),
        TypeError,
        r"`allocation` must return integers, got 8\.0 at 'conv2\.kernel'; round",
    ),
    "allocation answers with booleans": (
        answering(12, 7, True),
        TypeError,
        r"`allocation` must return integers, got True at 'head'",
    ),
    "allocation answers above the units": (
        answering(0, 9, 11),
        ValueError,
        r"`allocation` must keep from 0 to 10 units at 'head', as many as there are, got 11",
    ),
    "allocation answers below zero": (
        answering(-1, 20, 1),
        ValueError,
        r"`allocation` must keep from 0 to 12 units at 'conv1\.kernel', .* got -1",
    ),
    "allocation answers with another sum": (
        answering(9, 9, 1),
        ValueError,
        r"`allocation` must keep 20 units in all, got 19: \[9, 9, 1\]",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "pattern"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_call_says_what_is_wrong_and_what_is_right(call, error, pattern):
    with pytest.raises(error, match=f"(?s)^{pattern}") as info:
        call()
    assert info.type is error
