"""Shrunk networks equal masked ones: every architecture of the zoo, forward, gradient, one step."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import CASES, STATEFUL

from sparsejax import dependency, shrinking

pytestmark = pytest.mark.usefixtures("quickly")
# Where a gradient is zero but for rounding, Adam with a small eps would magnify the rounding.
OPTIMIZER = optax.adam(1e-2, eps=1e-2)


def planned(case, seed=0, **options):
    groups = dependency.trace(case.apply, case.variables, *case.inputs)
    rng = np.random.default_rng(seed)
    scores = {name: rng.normal(size=group.size) for name, group in groups.items()}
    return groups, shrinking.plan(groups, scores, **({"sparsity": 0.5} | options))


def total(outputs):
    """A loss with a different gradient for every output."""
    floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32) + 1)) for x in floats)


def step(apply, variables, inputs, forward_only):
    """Outputs, gradients and the variables after one step of Adam."""
    if forward_only:
        return (apply(variables, *inputs),)
    leaves, tree = jax.tree.flatten(variables)
    moving = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(moved):
        filled = list(leaves)
        for i, x in zip(moving, moved, strict=True):
            filled[i] = x
        outputs = apply(jax.tree.unflatten(tree, filled), *inputs)
        return total(outputs), outputs

    params = [leaves[i] for i in moving]
    grads, outputs = jax.grad(loss, has_aux=True)(params)
    state = OPTIMIZER.init(params)
    updates, _ = OPTIMIZER.update(grads, state, params)
    results = []
    for new in (grads, optax.apply_updates(params, updates)):
        filled = list(leaves)
        for i, x in zip(moving, new, strict=True):
            filled[i] = x
        results.append(jax.tree.unflatten(tree, filled))
    return outputs, *results


def assert_close(got, want, tolerance=1e-5):
    rows = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for one, other in rows:
        other = np.asarray(other, np.float64)
        scale = max(1.0, float(np.max(np.abs(other), initial=0)))
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, rtol=0, atol=tolerance * scale
        )


def check(case, tolerance=1e-5, forward_only=False, **options):
    """The small network against the masked one; kept entries are compared."""
    groups, plan = planned(case, **options)
    assert not groups.unknown
    assert plan.params[1] < plan.params[0]
    small = shrinking.shrink(case.variables, plan)
    masked = shrinking.expand(small, plan)

    @jax.jit
    def both(small, masked):
        rows = (shrinking.replay(case.apply, plan), small), (case.apply, masked)
        return [step(f, variables, case.inputs, forward_only) for f, variables in rows]

    (got, *got_trees), (want, *want_trees) = both(small, masked)
    # Outputs that replace variables are small, too.
    assert_close(got, shrinking.shrink(want, plan), tolerance)
    for one, other in zip(got_trees, want_trees, strict=True):
        assert_close(one, shrinking.shrink(other, plan), tolerance)


def _forward_only(name):
    """Gradients in two frameworks of each architecture: compiling them takes most of the time."""
    kind = name.split("-")[0]
    alike = [other for other in CASES if other.split("-")[0] == kind]
    return name in alike[2:] or kind == "while_loop"  # of which JAX has no gradient


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("as_users_have_it")
def test_shrunk_equals_masked(name):
    check(CASES[name](), forward_only=_forward_only(name))


@pytest.mark.parametrize("name", STATEFUL)
def test_batch_statistics_of_training_shrink_too(name):
    check(STATEFUL[name]())


def test_every_architecture_of_the_issue_is_there_in_two_frameworks():
    images = ("mlp", "cnn", "resnet_basic", "resnet_bottleneck", "mobilenet", "densenet", "unet")
    norms = ("squeeze_excite", "group_norm", "mixer", "vit", "encoder", "lstm", "gru", "stacked")
    decoders = ("decoder_fused_qkv", "decoder_gqa", "decoder_einsum")
    for kind in images + norms + decoders:
        frameworks = {name.split("-")[1] for name in CASES if name.startswith(kind)}
        assert len(frameworks) >= 2, kind


def test_float64_agrees_to_1e_12():
    """In a process of its own, since x64 is a setting of the whole session."""
    script = """
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
from architectures import CASES
from test_replay import check
for name in ["cnn-dict", "resnet_basic-dict", "vit-dict", "decoder_gqa_repeat-dict", "lstm-dict"]:
    case = CASES[name]()
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), case.variables)
    widened = lambda x: np.asarray(x, np.float64) if x.dtype.kind == "f" else x
    inputs = jax.tree.map(widened, case.inputs)
    check(case._replace(variables=wide, inputs=inputs), tolerance=1e-12)
    print(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=__file__.rpartition("/")[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5


def mlp(params, x):
    return jax.nn.relu(x @ params["in"] + params["b"][None]) @ params["out"]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def small_mlp():
    params = {"b": draw(8, seed=1), "in": draw(3, 8), "out": draw(8, 2, seed=2)}
    groups = dependency.trace(mlp, params, draw(1, 3))
    plan = shrinking.plan(groups, params, keep=5)
    return plan, shrinking.shrink(params, plan)


def test_any_batch(small_mlp):
    plan, small = small_mlp
    replayed = shrinking.replay(mlp, plan)
    for batch in (1, 2, 7):
        x = draw(batch, 3, seed=batch)
        assert_close(replayed(small, x), mlp(shrinking.expand(small, plan), x))


def test_transformations(small_mlp):
    plan, small = small_mlp
    replayed, x = shrinking.replay(mlp, plan), draw(4, 3)
    want = mlp(shrinking.expand(small, plan), x)
    assert_close(replayed(small, x), want)
    assert_close(jax.jit(replayed)(small, x), want)
    assert_close(jax.vmap(lambda x: replayed(small, x[None])[0])(x), want)
    assert_close(jax.lax.map(lambda x: replayed(small, x[None])[0], x), want)
    assert jax.eval_shape(replayed, small, x).shape == (4, 2)
    assert_close(jax.jvp(lambda x: replayed(small, x), (x,), (x,))[0], want)


def test_a_loss_or_a_gradient_replays_as_well(small_mlp):
    plan, small = small_mlp
    masked, x = shrinking.expand(small, plan), draw(4, 3)

    def loss(params, x):
        return jnp.sum(mlp(params, x) ** 2)

    assert_close(shrinking.replay(loss, plan)(small, x), loss(masked, x))
    replayed = shrinking.replay(jax.grad(loss), plan)
    assert_close(replayed(small, x), shrinking.shrink(jax.grad(loss)(masked, x), plan))


def test_custom_derivatives_are_kept(small_mlp):
    """Rules that are not the derivative: they must come out as they were written."""
    plan, small = small_mlp

    @jax.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, x.shape), lambda shape, g: (jnp.clip(g, -0.1, 0.1),))

    @jax.custom_jvp
    def through(x, mode):
        return jnp.round(x) + mode

    through.defjvp(lambda p, t: (through(*p), 3 * t[0]))

    def apply(params, x):
        hidden = clip(through(x @ params["in"], jnp.int32(1).astype(x.dtype)) + params["b"][None])
        return hidden @ params["out"]

    x, masked = draw(4, 3), shrinking.expand(small, plan)
    value = jax.grad(lambda p, f: jnp.sum(f(p, x) ** 2), argnums=0)
    got = value(small, shrinking.replay(apply, plan))
    assert_close(got, shrinking.shrink(value(masked, apply), plan))


def test_dropout_draws_the_same_for_the_same_units(small_mlp):
    plan, small = small_mlp

    def apply(params, x, key):
        hidden = x @ params["in"] + params["b"][None]
        keep = jax.random.bernoulli(key, 0.5, hidden.shape)
        return jnp.where(keep, hidden, 0) @ params["out"]

    x, key = draw(4, 3), jax.random.key(3)
    want = apply(shrinking.expand(small, plan), x, key)
    assert_close(shrinking.replay(apply, plan)(small, x, key), want)


def test_no_index_is_left_in_the_compiled_program(small_mlp):
    plan, small = small_mlp
    text = jax.jit(shrinking.replay(mlp, plan)).lower(small, draw(4, 3)).as_text()
    assert "gather" not in text
    assert "8x" not in text


def test_second_call_does_not_trace_again(small_mlp):
    plan, small = small_mlp
    replayed, count = shrinking.replay(mlp, plan), 0

    def counted(small, x):
        nonlocal count
        count += 1
        return replayed(small, x)

    jitted = jax.jit(counted)
    jitted(small, draw(4, 3))
    jitted(small, draw(4, 3, seed=1))
    assert count == 1


def test_export_reloads_in_a_process_without_the_code(small_mlp, tmp_path):
    plan, small = small_mlp
    x = draw(4, 3)
    exported = jax.export.export(jax.jit(shrinking.replay(mlp, plan)))(small, x)
    (tmp_path / "net.stablehlo").write_bytes(exported.serialize())
    np.savez(tmp_path / "net.npz", x=x, **small)
    script = """
import sys, jax.export, numpy as np
data = dict(np.load("net.npz"))
net = jax.export.deserialize(open("net.stablehlo", "rb").read())
x = data.pop("x")
np.save("y.npy", net.call(data, x))
assert "sparsejax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    want = mlp(shrinking.expand(small, plan), x)
    assert_close(np.load(tmp_path / "y.npy"), want)


def test_what_the_function_needs_is_refused_with_the_reason(small_mlp):
    plan, small = small_mlp

    def exposed(params, x):
        return x @ params["in"] + params["b"][None], params["out"]

    with pytest.raises(
        ValueError, match=r"`apply_fn` needs .* 'b', axis 0: it is axis 1 of output"
    ):
        shrinking.replay(exposed, plan)(small, draw(1, 3))

    def coupled(params, x):
        mixed = jnp.sort(x @ params["in"], -1) + params["b"][None]
        return mixed @ params["out"]

    with pytest.raises(ValueError, match=r"sort at test_replay\.py"):
        shrinking.replay(coupled, plan)(small, draw(1, 3))

    def twice(params, x):  # couples units that the plan tears apart
        hidden = x @ params["in"]
        return (hidden + hidden[:, ::-1] + params["b"][None]) @ params["out"]

    with pytest.raises(ValueError, match="Trace this function itself"):
        shrinking.replay(twice, plan)(small, draw(1, 3))


def test_wrong_variables_are_refused(small_mlp, as_users_have_it):
    plan, small = small_mlp
    params = shrinking.expand(small, plan)
    replayed = shrinking.replay(mlp, plan)
    with pytest.raises(ValueError, match=r"at 'b' it is float32\[8\], the plan leaves \(5,\)"):
        replayed(params, draw(1, 3))
    with pytest.raises(ValueError, match="'other' is not among its leaves"):
        replayed({"other": draw(3)}, draw(1, 3))
    with pytest.raises(TypeError, match=r"`plan` must be a shrinking\.Plan"):
        shrinking.replay(mlp, {"in": 3})
    with pytest.raises(TypeError, match="`apply_fn`"):
        shrinking.replay(None, plan)


def test_approximate_groups_are_cut_on_request_only():
    case = CASES["layer_norm-dict"]()
    groups, plan = planned(case)
    inexact = [name for name, group in groups.items() if not group.exact]
    assert inexact
    assert set(plan.left) == set(inexact)
    assert not set(inexact) & set(plan.removed)
    _, bold = planned(case, approximate=True)
    assert set(inexact) <= set(bold.removed)
    small = shrinking.shrink(case.variables, bold)
    masked = shrinking.expand(small, bold)
    got = shrinking.replay(case.apply, bold)(small, *case.inputs)
    want = case.apply(masked, *case.inputs)
    assert np.max(np.abs(got - want)) > 1e-4  # the trace was right not to promise
