"""The code of a network itself at the smaller sizes: where it is right, and what is said if not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    "mobilenet-dict",
    "pixel_shuffle-dict",
    "resnet_basic-equinox",
    "resnet_basic-nnx",
    "unet-nnx",
)
# Networks of which some groups have a reason, and its code runs, but computes something else.
DIFFERING = {
    "layer_norm-dict": r"a mean would divide by its size: reduce_sum at _dict_\w+\.py:\d+ \(\w+",
    "stacked_mlp-nnx": r"a mean would divide by its size: reduce_sum at _nnx_\w+\.py:\d+ \(",
    "vit-equinox": r"a mean would divide by its size: reduce_sum at _equinox_\w+\.py:\d+ \(",
}


def planned(case, groups, chosen):
    """A plan that halves the chosen groups, by random scores."""
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=group.size) for name, group in groups.items()}
    assert chosen
    return shrinking.plan(groups, scores, sparsity=0.5, only=chosen)


def both(case, plan):
    """What the code itself gives at the smaller sizes, and what it should give."""
    small = shrinking.shrink(case.variables, plan)
    want = shrinking.replay(case.apply, plan)(small, *case.inputs)
    return case.apply(small, *case.inputs), want


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def differ(got, want):
    return float(jnp.abs(got - want).max()) > 1e-3 * float(jnp.abs(want).max())


@pytest.mark.parametrize("name", FOLLOWING)
def test_rerun_is_empty_where_the_code_itself_equals_replay(name):
    case = CASES[name]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    assert not any(group.rerun for group in groups.values())
    plan = planned(case, groups, [*groups])
    assert plan.removed.keys() == groups.keys()
    assert_close(*both(case, plan))


def test_rerun_is_empty_where_a_stacked_network_equals_replay():
    """Groups beside those that have a reason."""
    case = CASES["stacked_mlp-nnx"]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    plan = planned(case, groups, [name for name, group in groups.items() if not group.rerun])
    assert_close(*both(case, plan))


@pytest.mark.parametrize("name", DIFFERING)
def test_rerun_names_the_line_of_what_differs(name):
    case = CASES[name]()
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    marked = [name for name, group in groups.items() if group.rerun]
    plan = planned(case, groups, marked)
    assert differ(*both(case, plan))
    for group in marked:
        for why in groups[group].rerun:
            assert optax.tree.size(why) == 1
    reasons = " ".join(why for group in marked for why in groups[group].rerun)
    assert pytest.approx(0) == 0 and __import__("re").search(DIFFERING[name], reasons)


# ---- by hand


def traced(apply, variables, *inputs):
    groups = dependency.trace(apply, variables, *inputs)
    return groups, shrinking.plan(groups, variables, sparsity=0.5, approximate=True)
