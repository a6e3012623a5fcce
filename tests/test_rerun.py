"""The code of a network itself at the smaller sizes: where it is right, and what is said if not."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CASES
from flax.errors import ScopeParamShapeError

from sparsejax import dependency, shrinking

pytestmark = pytest.mark.usefixtures("quickly")

# Networks whose code takes its sizes from the params.
FOLLOWING = (
    "cnn-dict",
    "glu-dict",
    "lstm-dict",
    "mlp-nnx",
    "mlp-equinox",
    "pixel_shuffle-dict",
    "cnn-nnx",
    "nchw-dict",
)
# Networks of which some groups have a reason: their code runs, and computes something else.
DIFFERING = {
    "layer_norm-dict": r"a mean would divide by its size: reduce_sum at _dict_layers\.py:\d+ \(lay",
    "stacked_mlp-nnx": r"a mean would divide by its size: reduce_sum at _nnx_\w+\.py:\d+ \(Residu",
    "vit-equinox": r"its size may scale the result of dot_general at _equinox_\w+\.py:\d+ \(Layer",
}
MEAN = r"^a mean would divide by its size: reduce_sum at test_rerun\.py:(\d+) "
SCALE = r"^its size may scale the result of dot_general at test_rerun\.py:(\d+) "


def planned(groups, chosen):
    """A plan that halves the chosen groups, by random scores."""
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=group.size) for name, group in groups.items()}
    plan = shrinking.plan(groups, scores, sparsity=0.5, only=chosen, approximate=True)
    assert plan.removed.keys() == set(chosen)
    return plan


def both(apply, variables, inputs, plan):
    """What the code itself gives at the smaller sizes, and what it should give."""
    small = shrinking.shrink(variables, plan)
    return apply(small, *inputs), shrinking.replay(apply, plan)(small, *inputs)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def differ(got, want):
    return float(jnp.abs(got - want).max()) > 1e-3 * float(jnp.abs(want).max())


# ---- the zoo


@pytest.mark.parametrize("name", FOLLOWING)
def test_rerun_is_empty_where_the_code_itself_equals_replay(name):
    case = CASES[name]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    assert not any(group.rerun for group in groups.values())
    assert_close(*both(*case, planned(groups, [*groups])))


@pytest.mark.parametrize("name", ["stacked_mlp-nnx", "stacked_checkpoint-dict"])
def test_rerun_is_empty_for_groups_beside_those_that_have_a_reason(name):
    case = CASES[name]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    clean = [name for name, group in groups.items() if not group.rerun]
    assert 0 < len(clean) < len(groups)
    assert_close(*both(*case, planned(groups, clean)))


@pytest.mark.parametrize("name", DIFFERING)
def test_rerun_names_the_line_where_the_code_itself_differs(name):
    case = CASES[name]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    marked = {n: [w for w in g.rerun if re.match(DIFFERING[name], w)] for n, g in groups.items()}
    chosen = [group for group, reasons in marked.items() if reasons]
    assert differ(*both(*case, planned(groups, chosen)))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("mlp-linen", ScopeParamShapeError, 'parameter "kernel" in "/Dense_0"'),
        ("mlp-haiku", ValueError, "with retrieved shape .* does not match shape"),
    ],
)
def test_rerun_is_not_asked_where_the_framework_checks_shapes(name, error, message):
    case = CASES[name]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    assert not any(group.rerun for group in groups.values())
    plan = planned(groups, [*groups])
    small = shrinking.shrink(case.variables, plan)
    with pytest.raises(error, match=message):
        case.apply(small, *case.inputs)
    got = shrinking.replay(case.apply, plan)(small, *case.inputs)
    assert_close(got, case.apply(shrinking.expand(small, plan), *case.inputs))


# ---- by hand


def weights(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def line_of(function, text):
    """The number of the line of a function that has some text."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


def rms_normed(p, x):
    x = x @ p["in"]
    size = jnp.mean(x * x, -1, keepdims=True)
    return (x / jnp.sqrt(size)) @ p["out"]


def attended(p, x):
    q, k, v = (x @ p[name] for name in ("query", "key", "value"))
    scores = (q @ k.swapaxes(1, 2)) / jnp.sqrt(q.shape[-1])
    return jax.nn.softmax(scores) @ v @ p["out"]


X = weights(x=(2, 5, 3))["x"]
NORMED = weights(**{"in": (3, 8), "out": (8, 2)})
ATTENDED = weights(query=(3, 8), key=(3, 8), value=(3, 6), out=(6, 2))


def test_rerun_names_the_mean_over_the_width():
    groups = dependency.trace(rms_normed, NORMED, X)
    (why,) = groups["in"].rerun
    assert int(re.match(MEAN, why)[1]) == line_of(rms_normed, "jnp.mean")
    plan = planned(groups, ["in"])
    got, want = both(rms_normed, NORMED, (X,), plan)
    # The code divides by 4 where it was by 8: what it normalizes is smaller by the root of 2.
    assert differ(got, want)
    assert_close(got * np.float32(np.sqrt(2)), want)


def test_rerun_names_the_attention_of_which_the_width_is_the_scale():
    groups = dependency.trace(attended, ATTENDED, X)
    (why,) = groups["query"].rerun
    assert int(re.match(SCALE, why)[1]) == line_of(attended, "scores =")
    assert differ(*both(attended, ATTENDED, (X,), planned(groups, ["query"])))


def test_rerun_is_empty_for_the_values_of_attention():
    groups = dependency.trace(attended, ATTENDED, X)
    assert groups["value"].rerun == ()
    assert_close(*both(attended, ATTENDED, (X,), planned(groups, ["value"])))


def test_rerun_gives_one_reason_for_every_line():
    def twice(p, x):
        x = x @ p["in"]
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))
        return x @ p["out"]

    groups = dependency.trace(twice, NORMED, X)
    assert groups["in"].rerun
    assert len(set(groups["in"].rerun)) == len(groups["in"].rerun)


def test_rerun_is_empty_for_means_over_other_axes():
    def pooled(p, x):
        x = jnp.tanh(x @ p["in"]).mean(1)
        return (x - x.mean(0, keepdims=True)) @ p["out"]

    groups = dependency.trace(pooled, NORMED, X)
    assert groups["in"].rerun == ()
    assert_close(*both(pooled, NORMED, (X,), planned(groups, ["in"])))


def test_rerun_is_no_matter_for_replay():
    """A plan of groups with reasons equals the masked network all the same."""
    for apply, variables, name in ((rms_normed, NORMED, "in"), (attended, ATTENDED, "query")):
        plan = planned(dependency.trace(apply, variables, X), [name])
        small = shrinking.shrink(variables, plan)
        want = apply(shrinking.expand(small, plan), X)
        assert_close(shrinking.replay(apply, plan)(small, X), want)
