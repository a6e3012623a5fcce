"""Distances of teacher and student against torch's numbers, limits, and finite differences."""

import functools
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads
from quickly import as_shipped

import sparsejax as sj
from sparsejax import distillation

pytestmark = pytest.mark.usefixtures("quickly")

GOLDEN = dict(np.load(pathlib.Path(__file__).parent / "golden" / "distillation.npz"))
STUDENT, TEACHER, LABELS = GOLDEN["student"], GOLDEN["teacher"], GOLDEN["labels"]
MAPS = GOLDEN["maps/student"], GOLDEN["maps/teacher"]
INF = np.inf


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def check(name, distance, student, *rest, rtol):
    """The value and the gradient of torch."""
    value, gradient = jax.jit(jax.value_and_grad(distance))(student, *rest)
    np.testing.assert_allclose(value, GOLDEN[name], rtol=rtol)
    scale = np.max(np.abs(GOLDEN[f"{name}/gradient"]))
    np.testing.assert_allclose(gradient, GOLDEN[f"{name}/gradient"], atol=rtol * scale)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_logits_is_that_of_torch(temperature):
    distance = functools.partial(distillation.logits, temperature=temperature)
    check(f"logits/{temperature}", distance, STUDENT, TEACHER, rtol=2e-5)
    with jax.enable_x64(True):
        check(f"logits/{temperature}", distance, STUDENT, TEACHER, rtol=1e-12)


def test_features_is_that_of_torch():
    check("features", distillation.features, STUDENT, TEACHER, rtol=1e-6)


@pytest.mark.parametrize("power", [1, 2, 4])
def test_attention_is_that_of_the_authors(power):
    distance = functools.partial(distillation.attention, power=power)
    check(f"attention/{power}", distance, *MAPS, rtol=2e-6)
    with jax.enable_x64(True):
        check(f"attention/{power}", distance, *MAPS, rtol=1e-12)


WARM = {"weight": 0.9, "distance": functools.partial(distillation.logits, temperature=4.0)}


def test_distilled_is_the_weighted_sum_of_torch():
    both = distillation.distilled(cross_entropy, lambda s, _: s, lambda _: TEACHER, **WARM)
    check("combined", both, STUDENT, LABELS, rtol=1e-5)


def test_distilled_outputs_is_the_weighted_sum_of_torch():
    both = distillation.distilled_outputs(cross_entropy, lambda _: TEACHER, **WARM)
    check("combined", both, STUDENT, LABELS, rtol=1e-5)


def test_logits_is_the_divergence_of_optax():
    student, teacher = draw(3, 2, 7), draw(3, 2, 7, seed=1)
    ours = distillation.logits(student, teacher)
    theirs = optax.losses.kl_divergence(jax.nn.log_softmax(student), jax.nn.softmax(teacher))
    np.testing.assert_allclose(ours, theirs.mean(), rtol=1e-5)


def test_logits_of_one_example_without_a_leading_axis_is_its_own():
    np.testing.assert_allclose(
        distillation.logits(STUDENT[0], TEACHER[0]), distillation.logits(STUDENT[:1], TEACHER[:1])
    )


def test_logits_at_a_high_temperature_is_the_distance_of_centered_logits():
    """Hinton, Vinyals and Dean, equation 4."""
    gaps = STUDENT - TEACHER
    expected = np.mean(np.sum((gaps - gaps.mean(1, keepdims=True)) ** 2, 1)) / (2 * gaps.shape[1])
    with jax.enable_x64(True):
        hot = distillation.logits(STUDENT, TEACHER, temperature=1e4)
    np.testing.assert_allclose(hot, expected, rtol=1e-3)


def test_logits_is_zero_where_both_agree():
    value, gradient = jax.jit(jax.value_and_grad(distillation.logits))(draw(4, 5), draw(4, 5) + 3)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("ruled_out_by_the_student", [False, True])
def test_logits_ignores_a_class_that_the_teacher_rules_out(ruled_out_by_the_student):
    student = jnp.array([[0.0, 1.0, -INF if ruled_out_by_the_student else 2.0]])
    teacher = jnp.array([[0.0, 3.0, -INF]])
    value = distillation.logits(student, teacher, temperature=2.0)
    of_all = jax.grad(lambda s, t, T: distillation.logits(s, t, temperature=T), (0, 1, 2))
    gradients = jax.jit(of_all)(student, teacher, 2.0)
    assert all(np.isfinite(x).all() for x in (value, *gradients))
    if ruled_out_by_the_student:
        of_two = distillation.logits(student[:, :2], teacher[:, :2], temperature=2.0)
        np.testing.assert_allclose(value, of_two, rtol=1e-6)
        assert gradients[0][0, 2] == gradients[1][0, 2] == 0


def test_logits_is_infinite_where_the_student_alone_rules_a_class_out():
    assert distillation.logits(jnp.array([[0.0, -INF]]), jnp.zeros((1, 2))) == INF


def test_logits_of_nan_is_nan():
    for student, teacher in ([np.nan, 0.0], [0.0, 0.0]), ([0.0, 0.0], [np.nan, 0.0]):
        assert np.isnan(distillation.logits(jnp.array([student]), jnp.array([teacher])))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["logits", "features", "attention"])
def test_distances_of_half_precision_are_those_of_the_same_numbers_in_float32(name, dtype):
    student, teacher = draw(4, 3, 5).astype(dtype), draw(4, 3, 5, seed=1).astype(dtype)
    distance = getattr(distillation, name)
    half, wide = (
        distance(student, teacher),
        distance(*(x.astype(float) for x in (student, teacher))),
    )
    assert half == wide and half.dtype == jnp.float32
    assert jax.grad(distance)(student, teacher).dtype == dtype


DISTANCES = {
    "logits": lambda s, t: distillation.logits(s, t, temperature=3.0),
    "features": distillation.features,
    "attention": distillation.attention,
    "attention of power 3": lambda s, t: distillation.attention(s, t, power=3.0),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_have_the_gradients_of_finite_differences(name):
    with jax.enable_x64(True):
        pair = np.random.default_rng(3).normal(size=(2, 3, 4, 2))
        check_grads(jax.jit(DISTANCES[name]), tuple(map(jnp.asarray, pair)), 1, modes=["rev"])


def test_temperature_and_power_have_the_gradients_of_finite_differences():
    with jax.enable_x64(True):
        s, t = map(jnp.asarray, np.random.default_rng(4).normal(size=(2, 3, 4, 2)))
        for distance in (
            lambda x: distillation.logits(s, t, temperature=x),
            lambda x: distillation.attention(s, t, power=x),
        ):
            check_grads(jax.jit(distance), (2.0,), 1, modes=["rev"])


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_the_same_jitted_and_under_vmap(name):
    distance = DISTANCES[name]
    student, teacher = draw(2, 4, 3, 5), draw(2, 4, 3, 5, seed=1)
    eager = [distance(s, t) for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(as_shipped(distance)(student[0], teacher[0]), eager[0], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(distance)(student, teacher), eager, rtol=1e-6)


features, attention = jax.jit(distillation.features), jax.jit(distillation.attention)


@pytest.mark.parametrize("distance", [features, attention])
def test_distances_of_trees_are_the_sums_of_those_of_leaves(distance):
    student = {"a": draw(2, 3, 4), "b": [draw(2, 3, 3, 1, seed=1)], "none": None}
    teacher = {"a": draw(2, 3, 4, seed=2), "b": [draw(2, 3, 3, 1, seed=3)], "none": None}
    expected = distance(student["a"], teacher["a"]) + distance(student["b"][0], teacher["b"][0])
    np.testing.assert_allclose(distance(student, teacher), expected, rtol=1e-6)


def test_attention_does_not_see_scales_nor_repeated_channels():
    student, teacher = np.abs(draw(2, 3, 3, 4)), draw(2, 3, 3, 2, seed=1)
    expected = attention(student, teacher)
    for changed in (student * 1e-30, student * 1e30, np.tile(student, (1, 1, 1, 2)), -student):
        np.testing.assert_allclose(attention(changed, teacher), expected, rtol=1e-5)


def test_attention_of_a_high_power_neither_over_nor_underflows():
    high = jax.jit(functools.partial(distillation.attention, power=8))
    student, teacher = draw(2, 3, 3, 4), draw(2, 3, 3, 2, seed=1)
    np.testing.assert_allclose(high(student * 1e30, teacher * 1e-30), high(student, teacher), 1e-5)


@pytest.mark.parametrize("power", [1, 2, 2.5])
def test_attention_of_a_dead_map_has_a_gradient_of_zero(power):
    student = draw(2, 3, 3, 4).at[0].set(0)
    distance = functools.partial(distillation.attention, power=power)
    value, gradient = jax.jit(jax.value_and_grad(distance))(student, draw(2, 3, 3, 4, seed=1))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


def test_attention_is_at_most_two_over_the_places():
    student, teacher = np.zeros((2, 1, 6, 2), np.float32)
    student[0, 0], teacher[0, 3] = 1, 5
    np.testing.assert_allclose(attention(student, teacher), 2 / 6, rtol=1e-6)


def linear(params, batch):
    return batch["x"] @ params["w"]


def loss(params, batch):
    return cross_entropy(linear(params, batch), batch["y"])


BATCH = {"x": draw(8, 3, seed=5), "y": np.arange(8) % 4, "teacher": draw(8, 4, seed=6)}
PARAMS = {"w": draw(3, 4, seed=7)}


def looked_up(batch):
    return batch["teacher"]


def test_distilled_between_the_weights_is_the_loss_and_the_distance():
    at = {
        w: jax.jit(distillation.distilled(loss, linear, looked_up, weight=w)) for w in (0, 0.25, 1)
    }
    of_outputs = distillation.logits(linear(PARAMS, BATCH), BATCH["teacher"])
    np.testing.assert_allclose(at[0](PARAMS, BATCH), loss(PARAMS, BATCH), rtol=1e-6)
    np.testing.assert_allclose(at[1](PARAMS, BATCH), of_outputs, rtol=1e-6)
    expected = 0.75 * loss(PARAMS, BATCH) + 0.25 * of_outputs
    np.testing.assert_allclose(at[0.25](PARAMS, BATCH), expected, rtol=1e-6)


def test_distilled_weighs_both_alike_unless_told_otherwise():
    ours = distillation.distilled(loss, linear, looked_up)(PARAMS, BATCH)
    half = distillation.distilled(loss, linear, looked_up, weight=0.5)(PARAMS, BATCH)
    assert ours == half


def test_distilled_outputs_is_distilled():
    def of_outputs(params, batch):
        own = distillation.distilled_outputs(
            lambda logits, batch: cross_entropy(logits, batch["y"]), looked_up, **WARM
        )
        return own(linear(params, batch), batch)

    both = distillation.distilled(loss, linear, looked_up, **WARM)
    ours, theirs = (jax.jit(jax.value_and_grad(f))(PARAMS, BATCH) for f in (of_outputs, both))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1]["w"], theirs[1]["w"], atol=1e-6)


def test_distilled_outputs_costs_what_the_loss_does():
    wide = {"w": draw(300, 4)}
    batch = BATCH | {"x": draw(8, 300)}
    own = distillation.distilled_outputs(lambda s, b: cross_entropy(s, b["y"]), looked_up)

    def flops(f):
        return jax.jit(jax.grad(f)).lower(wide, batch).compile().cost_analysis()["flops"]

    assert flops(lambda p, b: own(linear(p, b), b)) < 1.2 * flops(loss)


def test_distilled_lets_no_gradient_pass_to_the_teacher():
    def of(shared):
        both = distillation.distilled(
            loss, linear, lambda batch: linear({"w": 2 * shared}, batch), weight=1.0
        )
        return both({"w": jax.lax.stop_gradient(shared)}, BATCH)

    value, gradient = jax.value_and_grad(of)(PARAMS["w"])
    assert value > 0 and (gradient == 0).all()


def test_distilled_takes_a_traced_weight_and_temperature():
    traces = []

    @jax.jit
    def of(weight, temperature):
        traces.append(None)
        distance = functools.partial(distillation.logits, temperature=temperature)
        both = distillation.distilled(loss, linear, looked_up, weight=weight, distance=distance)
        return both(PARAMS, BATCH)

    for weight, temperature in (0.5, 1.0), (0.9, 4.0):
        distance = functools.partial(distillation.logits, temperature=temperature)
        both = distillation.distilled(loss, linear, looked_up, weight=weight, distance=distance)
        np.testing.assert_allclose(of(weight, temperature), both(PARAMS, BATCH), rtol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["concrete", "traced"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_part_of_weight_zero_does_not_count_even_where_it_is_infinite(weight, wrap):
    def finite(params, batch):
        return jnp.sum(params**2)

    def infinite(params, *_):  # 1/0, with the derivative -∞ · 0 = NaN
        return 1 / jnp.sum(0 * params)

    own, distance = (finite, infinite) if weight == 0 else (infinite, finite)

    @wrap
    def of(weight):
        both = distillation.distilled(
            own, lambda p, batch: p, lambda batch: batch, weight=weight, distance=distance
        )
        outputs = distillation.distilled_outputs(
            own, lambda batch: batch, weight=weight, distance=distance
        )
        return [jax.value_and_grad(f)(jnp.ones(2), jnp.ones(2)) for f in (both, outputs)]

    for value, gradient in of(weight):
        assert value == 2 and (gradient == 2).all()


def test_distilled_takes_outputs_that_are_trees():
    def student(params, batch):
        return {"logits": linear(params, batch), "hints": [batch["x"]]}

    def distance(ours, theirs):
        return distillation.logits(ours["logits"], theirs["logits"]) + distillation.features(
            ours["hints"], theirs["hints"]
        )

    def teacher(batch):
        return {"logits": batch["teacher"], "hints": [batch["x"] + 1]}

    both = distillation.distilled(loss, student, teacher, weight=1.0, distance=distance)
    expected = distillation.logits(linear(PARAMS, BATCH), BATCH["teacher"]) + 1
    np.testing.assert_allclose(both(PARAMS, BATCH), expected, rtol=1e-6)


class Module(eqx.Module):
    w: jax.Array


class Network(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(PARAMS["w"])


@pytest.mark.parametrize("params", [Module(**PARAMS), nnx.state(Network())], ids=["eqx", "nnx"])
def test_distilled_works_on_the_params_of_every_framework(params):
    def apply(params, batch):
        return linear({"w": jax.tree.leaves(params)[0]}, batch)

    def own(params, batch):
        return cross_entropy(apply(params, batch), batch["y"])

    gradient = jax.jit(jax.grad(distillation.distilled(own, apply, looked_up)))(params, BATCH)
    expected = jax.jit(jax.grad(distillation.distilled(loss, linear, looked_up)))(PARAMS, BATCH)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    np.testing.assert_allclose(jax.tree.leaves(gradient)[0], expected["w"], atol=1e-6)


def test_a_student_learns_what_a_teacher_with_its_masks_says_and_stays_pruned():
    masks = {"w": np.abs(PARAMS["w"]) > 0.6}
    taught = sj.apply_masks(PARAMS, masks)
    both = distillation.distilled(loss, linear, lambda batch: linear(taught, batch), weight=1.0)
    optimizer = sj.keep_masks(optax.sgd(2.0), masks)

    def step(carry, _):
        params, state = carry
        distance, grads = jax.value_and_grad(both)(params, BATCH)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), distance

    student = {"w": jnp.zeros((3, 4))}
    run = jax.jit(lambda start: jax.lax.scan(step, start, None, 200))
    (trained, _), distances = run((student, optimizer.init(student)))
    assert distances[-1] < 1e-4 * distances[0]
    assert (trained["w"][~masks["w"]] == 0).all()


X = np.ones((2, 3), np.float32)
IMAGE = np.ones((2, 4, 4, 3), np.float32)
PLAIN = (loss, linear, looked_up)


def outputs_loss(**options):
    return distillation.distilled_outputs(loss, looked_up, **options)


BAD = {
    "integer logits": (
        lambda: distillation.logits(np.ones((2, 3), int), X),
        TypeError,
        r"`student` must be a floating array \(\.\.\., classes\) of logits, got int64\[2,3\]",
    ),
    "logits of a tree": (
        lambda: distillation.logits(X, {"a": X}),
        TypeError,
        r"`teacher` must be a floating array .* got \{'a'",
    ),
    "logits without classes": (
        lambda: distillation.logits(X[0, 0], X),
        ValueError,
        r"`student` must have a last axis of classes, .* got float32\[\]",
    ),
    "logits of no example": (
        lambda: distillation.logits(X[:0], X[:0]),
        ValueError,
        r"at least one example and class, got float32\[0,3\]",
    ),
    "logits of other shapes": (
        lambda: distillation.logits(X, X[:, :2]),
        ValueError,
        r"`teacher` must have the shapes of `student`: at '\.' it is float32\[2,2\]",
    ),
    "temperature 0": (
        lambda: distillation.logits(X, X, temperature=0),
        ValueError,
        "`temperature` must be finite and > 0, got 0",
    ),
    "infinite temperature": (
        lambda: distillation.logits(X, X, temperature=INF),
        ValueError,
        "`temperature` must be finite and > 0, got inf",
    ),
    "a temperature for each example": (
        lambda: distillation.logits(X, X, temperature=np.ones(2)),
        TypeError,
        r"`temperature` must be one real number, got float64\[2\]",
    ),
    "features of integers": (
        lambda: distillation.features({"a": X}, {"a": X.astype(int)}),
        TypeError,
        r"`teacher` must hold floating arrays, got int64\[2,3\] at 'a'",
    ),
    "features of other shapes": (
        lambda: distillation.features({"a": X}, {"a": X[:1]}),
        ValueError,
        r"`teacher` must have the shapes of `student`: at 'a' it is float32\[1,3\]",
    ),
    "features of other structure": (
        lambda: distillation.features({"a": X}, {"b": X}),
        ValueError,
        "`teacher` must have the structure of `student`: `student` has a leaf at 'a'",
    ),
    "features of nothing": (
        lambda: distillation.features({}, {}),
        ValueError,
        r"`student` must hold at least one array, got \{\}",
    ),
    "features without entries": (
        lambda: distillation.features(X[:0], X[:0]),
        ValueError,
        r"`student` must have entries, got float32\[0,3\] at '\.'",
    ),
    "attention of vectors": (
        lambda: distillation.attention({"a": X}, {"a": X}),
        ValueError,
        r"same shape \(examples, places \.\.\., channels\) .* float32\[2,3\] at 'a'",
    ),
    "attention of other images": (
        lambda: distillation.attention(IMAGE, IMAGE[:, :2]),
        ValueError,
        r"got float32\[2,4,4,3\] and float32\[2,2,4,3\] at '\.'; .* resize",
    ),
    "attention of power 0": (
        lambda: distillation.attention(IMAGE, IMAGE, power=0),
        ValueError,
        "`power` must be finite and >= 1, got 0",
    ),
    "a loss that is a number": (
        lambda: distillation.distilled(0.5, linear, looked_up),
        TypeError,
        r"`loss` must be a function \(params, batch\) -> scalar, got 0\.5",
    ),
    "a student that is params": (
        lambda: distillation.distilled(loss, PARAMS, looked_up),
        TypeError,
        r"`student` must be a function \(params, batch\) -> outputs",
    ),
    "a teacher that is logits": (
        lambda: distillation.distilled(loss, linear, X),
        TypeError,
        r"`teacher` must be a function batch -> outputs, .* lambda batch",
    ),
    "a distance that is a word": (
        lambda: distillation.distilled(*PLAIN, distance="logits"),
        TypeError,
        r"`distance` must be a function \(student outputs, teacher outputs\) -> scalar",
    ),
    "a weight in per cent": (
        lambda: distillation.distilled(*PLAIN, weight=90),
        ValueError,
        r"`weight` must be in \[0, 1\], the distance's share, got 90",
    ),
    "a weight of outputs": (
        lambda: outputs_loss(weight=-0.1),
        ValueError,
        r"`weight` must be in \[0, 1\], the distance's share, got -0\.1",
    ),
    "a loss for each example": (
        lambda: distillation.distilled(lambda p, b: b, lambda p, b: b, lambda b: b)(X, X),
        TypeError,
        r"`loss` must return one real number, got float32\[2,3\]; take the mean",
    ),
    "a loss with something beside it": (
        lambda: distillation.distilled(lambda p, b: (1.0, 1), *PLAIN[1:])(PARAMS, BATCH),
        TypeError,
        r"`loss` must return one real number, got \(1\.0, 1\)",
    ),
    "a distance for each example": (
        lambda: distillation.distilled(*PLAIN, distance=lambda s, t: s)(PARAMS, BATCH),
        TypeError,
        r"`distance` must return one real number, got float32\[8,4\]; take the mean",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("as_users_have_it")
def test_bad_calls_say_what_is_wrong(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
