"""Every optimizer of optax through one contract, inside `keep_masks` and inside `penalized`."""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from quickly import as_shipped

import sparsejax as sj
from sparsejax import transforms

pytestmark = pytest.mark.usefixtures("quickly")

RATE = 0.01
contrib = optax.contrib


def takes_a_rate(module, names):
    return {name: functools.partial(getattr(module, name), RATE) for name in names.split()}


def sharpness_aware(**options):
    ascent = optax.chain(contrib.normalize(), optax.sgd(0.05))
    return contrib.sam(optax.sgd(RATE), ascent, **options)


OPTIMIZERS = {
    **takes_a_rate(
        optax,
        "adabelief adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lion "
        "nadam nadamw novograd optimistic_adam optimistic_adam_v2 optimistic_gradient_descent "
        "polyak_sgd radam rmsprop rprop sgd sign_sgd signum sm3 yogi",
    ),
    **takes_a_rate(
        contrib,
        "acprop ademamix adopt galore madgrad momo momo_adam muon schedule_free_adamw "
        "schedule_free_sgd simplified_ademamix sophia",
    ),
    "adadelta": lambda: optax.adadelta(1.0),
    "lbfgs": optax.lbfgs,
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=0),
    "cocob": contrib.cocob,
    "dadapt_adamw": contrib.dadapt_adamw,
    "dog": lambda: contrib.dog(1.0),
    "dowg": lambda: contrib.dowg(1.0),
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
    "prodigy": contrib.prodigy,
    "reduce_on_plateau": lambda: optax.chain(optax.adam(RATE), contrib.reduce_on_plateau()),
    "sam": sharpness_aware,
    "sam_opaque": lambda: sharpness_aware(opaque_mode=True, sync_period=3),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(RATE), RATE),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(RATE)),
}
# What `update` gets besides gradients, state and params.
EXTRA = {
    "lbfgs": ("value", "grad", "value_fn"),
    "momo": ("value",),
    "momo_adam": ("value",),
    "polyak_sgd": ("value",),
    "reduce_on_plateau": ("value",),
    "sam_opaque": ("grad_fn",),
    "sophia": ("obj_fn",),
}
# Optimizers that `keep_masks` cannot wrap; tests below show the error, and what works instead.
CANNOT_BE_WRAPPED = {
    "lookahead": "its params are a pair (fast, slow), its gradients those of the fast ones alone; "
    "lookahead(keep_masks(...)) holds, from params that obey the masks",
    "dpsgd": "its gradients have an axis of examples that params and masks have not; "
    "chain(differentially_private_aggregate(...), keep_masks(sgd(...), masks)) holds",
}
# Public factories that are no optimizer by themselves.
NO_OPTIMIZERS = {
    "one link of a chain; the optimizers above are made of them": """
        adaptive_grad_clip add_decayed_weights add_noise apply_every centralize clip
        clip_by_block_rms clip_by_global_norm differentially_private_aggregate ema freeze
        hutchinson_estimator_diag_hessian identity keep_params_nonnegative measure_with_ema monitor
        normalize normalize_by_update_norm scale scale_by_acprop scale_by_adadelta scale_by_adam
        scale_by_adamax scale_by_adan scale_by_ademamix scale_by_adopt scale_by_amsgrad
        scale_by_backtracking_linesearch scale_by_belief scale_by_cocob
        scale_by_distance_over_gradients scale_by_factored_rms scale_by_galore scale_by_lbfgs
        scale_by_learning_rate scale_by_lion scale_by_madgrad scale_by_muon scale_by_novograd
        scale_by_optimistic_gradient scale_by_param_block_norm scale_by_param_block_rms
        scale_by_polyak scale_by_radam scale_by_rms scale_by_rprop scale_by_rss scale_by_schedule
        scale_by_sign scale_by_simplified_ademamix scale_by_sm3 scale_by_stddev
        scale_by_trust_ratio scale_by_yogi scale_by_zoom_linesearch set_to_zero snapshot stateless
        stateless_with_tree_map trace zero_nans""",
    "a wrapper; INSIDE and OUTSIDE below have those that change steps": """
        apply_if_finite chain conditionally_mask conditionally_transform flatten inject_hyperparams
        inject_stateful_hyperparams masked multi_transform named_chain partition
        selective_transform with_extra_args_support""",
    "no transformation; it does not annotate what it returns": """
        matrix_inverse_pth_root schedule_free_eval_params
        sigmoid_binary_cross_entropy update_infinity_moment update_moment
        update_moment_per_elem_norm""",
}
# optax still exports it, and warns whenever it is made.
deprecated = pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


INPUTS, TARGETS = draw(0, 8, 4), draw(1, 8, 3)
DENSE = {"w1": draw(2, 4, 6), "b1": draw(3, 6), "w2": draw(4, 6, 3), "b2": draw(5, 3)}
MASKS = {
    "w1": draw(6, 4, 6) > 0,
    "b1": draw(7, 6) > 0,
    "w2": jnp.array([[True, False, True]]),
    "b2": jnp.array(True),
}


def loss(params):
    hidden = jnp.tanh(INPUTS @ params["w1"] + params["b1"][None])
    return jnp.mean(optax.l2_loss(hidden @ params["w2"] + params["b2"][None], TARGETS))


def poison(grads):
    """NaN, +inf and -inf by turns at the pruned entries."""

    def spoil(grad, mask):
        kept = np.broadcast_to(mask, grad.shape)
        bad = np.zeros(grad.shape, np.float32)
        bad[~kept] = np.resize([np.nan, np.inf, -np.inf], np.sum(~kept))
        return grad + bad

    return jax.tree.map(spoil, grads, MASKS)


def largest_pruned(params, masks=MASKS):
    """The largest absolute value of a pruned entry, after each step if steps are stacked."""
    worst = []
    for path, mask in masks.items():
        pruned = np.abs(np.where(mask, 0, params[path]))
        axes = tuple(range(-np.ndim(mask), 0)) if np.ndim(mask) else None
        worst.append(np.max(pruned, axes, initial=0))
    return functools.reduce(np.maximum, worst)  # NaN if one is NaN


def assert_zero_where_pruned(params, masks=MASKS):
    np.testing.assert_array_equal(largest_pruned(params, masks), 0)


def gradient_step(tx, params, state, *, f=loss, extra=(), spoil=lambda grads: grads):
    value, grads = jax.value_and_grad(f)(params)
    grads = spoil(grads)
    offered = {
        "value": value,
        "grad": grads,
        "value_fn": f,
        "obj_fn": f,
        "grad_fn": lambda p, i: spoil(jax.grad(f)(p)),
    }
    chosen = {name: offered[name] for name in extra}
    updates, state = tx.update(grads, state, params, **chosen)
    return optax.apply_updates(params, updates), state


def trainer(tx, *, jit=jax.jit, **options):
    """Params -> the params after each of a hundred steps, stacked; one jitted scan."""

    def step(carry, _):
        params, state = gradient_step(tx, *carry, **options)
        return (params, state), params

    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=100)[1]

    return jit(train)


def assert_contract(train, start):
    """Pruned entries are exactly zero after every step, kept ones finite, and moved in the end."""
    after = jax.device_get(train(start))
    assert_zero_where_pruned(after)
    for path, leaf in after.items():
        assert np.all(np.isfinite(leaf)), path
        still = leaf[-1] == np.asarray(start[path])
        assert not np.any(still & np.broadcast_to(MASKS[path], still.shape)), path


@pytest.fixture(params=OPTIMIZERS, scope="module")
def optimizer(request):
    """The name of an optimizer; the tests of one follow each other, to compile it once."""
    return request.param


@functools.cache
def masked_trainer(name):
    tx = sj.keep_masks(OPTIMIZERS[name](), MASKS)
    return trainer(tx, jit=as_shipped, extra=EXTRA.get(name, ()), spoil=poison)


def public_factories():
    """Public functions of optax that return a transformation, or do not say what they return."""
    names = []
    for module in (optax, contrib):
        for name, f in vars(module).items():
            if isinstance(f, types.FunctionType | functools.partial) and not name.startswith("_"):
                returns = inspect.signature(f).return_annotation
                if returns is inspect.Signature.empty or "GradientTransformation" in str(returns):
                    names.append(name)
    return names


def move(tx, params, grads, state):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def dense_gradients():
    return jax.jit(jax.grad(loss))(DENSE)


def one_step(tx, params=DENSE, grads=None):
    """Params and state after the first step, which is jitted."""
    grads = dense_gradients() if grads is None else grads
    return as_shipped(functools.partial(move, tx))(params, grads, tx.init(params))


def test_table_lists_every_public_factory_of_optax():
    variants = {"sam_opaque"}
    others = " ".join(NO_OPTIMIZERS.values()).split()
    listed = [name for name in OPTIMIZERS if name not in variants] + [*CANNOT_BE_WRAPPED] + others
    assert sorted(listed) == sorted(public_factories())


@deprecated
def test_keep_masks_holds_after_every_step(optimizer):
    assert_contract(masked_trainer(optimizer), DENSE)


# These look at the shape of a matrix, or draw noise of its shape.
SEES_SHAPES = {"adafactor", "galore", "muon", "noisy_sgd", "sm3", "sophia"}
KEPT = {path: np.flatnonzero(np.broadcast_to(MASKS[path], w.shape)) for path, w in DENSE.items()}


def gather(params):
    return {path: w.reshape(-1)[KEPT[path]] for path, w in params.items()}


gather_each = jax.jit(jax.vmap(gather))


def scatter(entries):
    return {
        path: jnp.zeros(w.size).at[KEPT[path]].set(entries[path]).reshape(w.shape)
        for path, w in DENSE.items()
    }


@deprecated
def test_keep_masks_equals_training_without_the_pruned_entries(optimizer):
    """Oracle: the bare optimizer, on vectors of the kept entries alone."""
    if optimizer in SEES_SHAPES:
        pytest.skip("its step depends on the shape of the matrix")
    start = sj.apply_masks(DENSE, MASKS)
    got = gather_each(masked_trainer(optimizer)(start))
    bare = trainer(
        OPTIMIZERS[optimizer](),
        f=lambda v: loss(scatter(v)),
        extra=EXTRA.get(optimizer, ()),
    )
    expected = bare(gather(start))
    for path in got:  # later, rounding has grown in those that look at signs
        np.testing.assert_allclose(got[path][:20], expected[path][:20], rtol=1e-4, atol=1e-5)


def adam_at(learning_rate):
    return optax.adam(learning_rate)


SOME_LEAVES = {"w1": True, "b1": True, "w2": True, "b2": False}
LABELS = {"w1": "adam", "b1": "sgd", "w2": "adam", "b2": "sgd"}
BY_LABEL = {"adam": optax.adam(RATE), "sgd": optax.sgd(RATE)}
INSIDE = {
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(RATE), 3),
    "MultiSteps_transformation": lambda: optax.MultiSteps(
        optax.adam(RATE), 3
    ).gradient_transformation(),
    "apply_every": lambda: optax.chain(optax.adam(RATE), optax.apply_every(3)),
    "clip": lambda: optax.chain(optax.clip(0.1), optax.adamw(RATE)),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.1), optax.adamw(RATE)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.adamw(RATE)),
    "ema": lambda: optax.chain(optax.adam(RATE), optax.ema(0.9)),
    "masked": lambda: optax.chain(
        optax.masked(optax.scale_by_adam(), SOME_LEAVES), optax.scale(-RATE)
    ),
    "partition": lambda: optax.partition(BY_LABEL, LABELS),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.1)), ("sgd", optax.sgd(RATE))),
    "flatten": lambda: optax.flatten(optax.adam(RATE)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adam_at)(learning_rate=RATE),
    "inject_schedule": lambda: optax.inject_hyperparams(adam_at)(
        learning_rate=optax.cosine_decay_schedule(RATE, 100)
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(RATE), 3),
    "conditionally_mask": lambda: optax.conditionally_mask(
        optax.sgd(RATE), lambda step: step % 2 == 0
    ),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.sgd(RATE), lambda step: step % 2 == 0
    ),
    "add_noise": lambda: optax.chain(optax.sgd(RATE), optax.add_noise(1e-4, 0.55, key=0)),
    "add_decayed_weights": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(RATE)),
    "centralize": lambda: optax.chain(optax.centralize(), optax.sgd(RATE)),
    "normalize_by_update_norm": lambda: optax.chain(
        optax.normalize_by_update_norm(), optax.sgd(RATE)
    ),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.sgd(RATE)),
    "penalized": lambda: sj.penalized(optax.adam(RATE), sj.penalties.l2(0.1)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_keep_masks_holds_with_a_wrapper_inside(name):
    assert_contract(trainer(sj.keep_masks(INSIDE[name](), MASKS), spoil=poison), DENSE)


ADAM = optax.adam(RATE)


def kept(optimizer=ADAM):
    return sj.keep_masks(optimizer, MASKS)


OUTSIDE = {
    "MultiSteps": lambda: optax.MultiSteps(kept(), 3).gradient_transformation(),
    "clip": lambda: optax.chain(kept(), optax.clip(0.001)),
    "clip_before": lambda: optax.chain(optax.clip(0.1), kept()),
    "ema": lambda: optax.chain(kept(), optax.ema(0.9)),
    "trace": lambda: optax.chain(kept(), optax.trace(0.5)),
    "scale": lambda: optax.chain(kept(), optax.scale(0.5)),
    "masked": lambda: optax.chain(optax.masked(kept(), SOME_LEAVES), optax.scale(0.1)),
    "partition": lambda: optax.partition(
        {"kept": kept(), "free": optax.sgd(RATE)},
        {"w1": "kept", "b1": "kept", "w2": "kept", "b2": "free"},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda learning_rate: kept(optax.adam(learning_rate))
    )(learning_rate=RATE),
    "add_decayed_weights": lambda: optax.chain(kept(), optax.add_decayed_weights(-1e-4)),
    "schedule_free": lambda: contrib.schedule_free(kept(optax.sgd(RATE)), RATE),
    "itself": lambda: sj.keep_masks(kept(), MASKS),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_keep_masks_holds_with_a_wrapper_outside_from_masked_params(name):
    assert_contract(trainer(OUTSIDE[name](), spoil=poison), sj.apply_masks(DENSE, MASKS))


def test_keep_masks_zeroes_dense_params_late_under_an_outer_multi_steps():
    tx = optax.MultiSteps(kept(), 3).gradient_transformation()
    late = largest_pruned(trainer(tx)(DENSE))
    assert late[0] == late[1] == largest_pruned(DENSE) > 0
    np.testing.assert_array_equal(late[2:], 0)


def test_keep_masks_zeroes_dense_params_only_in_part_under_an_outer_clip():
    params, _ = one_step(optax.chain(kept(), optax.clip(0.001)))
    assert largest_pruned(params) > 0


def test_keep_masks_refuses_the_pair_of_lookahead_params():
    tx = sj.keep_masks(
        optax.lookahead(optax.adam(RATE), 5, 0.5), optax.LookaheadParams(MASKS, MASKS)
    )
    params = optax.LookaheadParams.init_synced(DENSE)
    with pytest.raises(ValueError, match="must have the structure of"):
        tx.update(dense_gradients(), tx.init(params), params)


def test_keep_masks_holds_inside_lookahead_from_masked_params():
    tx = optax.lookahead(kept(), 5, 0.5)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(poison(jax.grad(loss)(params.fast)), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = optax.LookaheadParams.init_synced(sj.apply_masks(DENSE, MASKS))
    _, after = jax.lax.scan(step, (params, tx.init(params)), length=12)
    assert_zero_where_pruned(after.fast)
    assert_zero_where_pruned(after.slow)
    assert np.any(after.slow["w1"][-1] != params.slow["w1"])


def per_example_gradients():
    return jax.tree.map(lambda g: np.stack([g, -g, 2 * g]), dense_gradients())


# optax warns about its own call.
@pytest.mark.filterwarnings('ignore:"seed" is deprecated:DeprecationWarning')
def test_keep_masks_refuses_the_gradients_per_example_of_dpsgd():
    tx = sj.keep_masks(contrib.dpsgd(RATE, l2_norm_clip=1.0, noise_multiplier=0.1, seed=0), MASKS)
    with pytest.raises(ValueError, match="at 'b1'"):
        tx.update(per_example_gradients(), tx.init(DENSE), DENSE)


def test_keep_masks_holds_behind_differentially_private_aggregation():
    aggregate = contrib.differentially_private_aggregate(1.0, 0.1, key=0)
    tx = optax.chain(aggregate, kept(optax.sgd(RATE)))
    params, _ = one_step(tx, DENSE, per_example_gradients())
    assert_zero_where_pruned(params)


class Spy:
    """An optimizer that remembers what it got last, and takes no step."""

    def __init__(self):
        self.seen = {}
        self.tx = optax.GradientTransformationExtraArgs(self.init, self.update)

    def init(self, params):
        self.seen = {"params": params}
        return ()

    def update(self, updates, state, params=None, **extra):
        self.seen = {"updates": updates, "params": params, **extra}
        return jax.tree.map(jnp.zeros_like, updates), state


def spied(wrap, grads, params=DENSE, **extra):
    spy = Spy()
    tx = wrap(spy.tx)
    tx.update(grads, tx.init(params), params, **extra)
    return spy.seen


def assert_trees_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def with_masks(optimizer):
    return sj.keep_masks(optimizer, MASKS)


def test_keep_masks_initializes_the_inner_optimizer_at_masked_params():
    spy = Spy()
    with_masks(spy.tx).init(DENSE)
    assert_trees_equal(spy.seen["params"], sj.apply_masks(DENSE, MASKS))


def test_keep_masks_shows_masked_params_to_the_inner_optimizer():
    seen = spied(with_masks, dense_gradients())
    assert_trees_equal(seen["params"], sj.apply_masks(DENSE, MASKS))


@pytest.mark.parametrize("name", ["updates", "grad"])
def test_keep_masks_shows_masked_gradients_to_the_inner_optimizer(name):
    bad = poison(dense_gradients())
    assert_trees_equal(
        spied(with_masks, bad, grad=bad)[name], sj.apply_masks(dense_gradients(), MASKS)
    )


@pytest.mark.parametrize("name", ["value_fn", "obj_fn"])
def test_keep_masks_evaluates_the_inner_optimizers_function_at_masked_params(name):
    seen = spied(with_masks, dense_gradients(), **{name: loss})
    assert seen[name](DENSE) == loss(sj.apply_masks(DENSE, MASKS)) != loss(DENSE)


def test_keep_masks_masks_the_gradients_that_the_inner_optimizer_computes():
    seen = spied(with_masks, dense_gradients(), grad_fn=lambda p, i: poison(p))
    assert_trees_equal(seen["grad_fn"](DENSE, 0), sj.apply_masks(DENSE, MASKS))


def test_keep_masks_works_with_value_and_grad_from_state():
    tx, value_and_grad = kept(optax.lbfgs()), optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params = sj.apply_masks(DENSE, MASKS)
    params, state = step(params, tx.init(params))
    np.testing.assert_allclose(optax.tree.get(state, "value"), loss(params), rtol=1e-6)


def test_keep_masks_obeys_the_masks_in_its_state():
    tx = kept()
    fewer = MASKS | {"b2": jnp.array([True, False, True])}
    state = tx.init(DENSE)._replace(masks=fewer)
    params, state = move(tx, DENSE, DENSE, state)
    assert params["b2"][1] == 0
    assert_trees_equal(state.masks, fewer)


def test_keep_masks_survives_the_donation_of_its_state():
    masks = jax.tree.map(jnp.array, MASKS)
    tx = sj.keep_masks(optax.adam(RATE), masks)
    step = jax.jit(functools.partial(gradient_step, tx), donate_argnums=(0, 1))
    for _ in range(2):
        params = jax.tree.map(jnp.array, DENSE)
        params, state = step(params, tx.init(params))
        params, state = step(params, state)
        assert_zero_where_pruned(params, masks)


def test_keep_masks_gives_every_state_masks_of_its_own():
    masks = jax.tree.map(jnp.array, MASKS)
    tx = sj.keep_masks(optax.adam(RATE), masks)
    first, second = tx.init(DENSE).masks, tx.init(DENSE).masks
    first["w1"].delete()
    assert_trees_equal(second, MASKS)
    assert_trees_equal(masks, MASKS)


@pytest.mark.parametrize("name", ["sgd", "adam", "lion", "prodigy"])
def test_keep_masks_is_traced_once(name):
    tx, traces = kept(OPTIMIZERS[name]()), []

    @jax.jit
    def step(params, state):
        traces.append(None)
        return gradient_step(tx, params, state)

    params, state = DENSE, tx.init(DENSE)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


def test_keep_masks_gives_the_same_jitted_as_eager():
    tx = kept()
    eager, jitted = move(tx, DENSE, DENSE, tx.init(DENSE)), one_step(tx, DENSE, DENSE)
    assert_trees_equal(jitted[1].masks, eager[1].masks)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), jitted, eager)


def test_keep_masks_maps_over_an_ensemble():
    tx = kept()
    ensemble = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), DENSE)
    params, _ = jax.vmap(functools.partial(one_step, tx))(ensemble, ensemble)
    assert_zero_where_pruned(params)
    second = jax.tree.map(lambda w: w[1], ensemble)
    expected, _ = one_step(tx, second, second)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got[1], want, rtol=1e-5), params, expected
    )


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float32"),
        ("float32", "float16"),
        ("float16", "bfloat16"),
    ],
)
def test_keep_masks_is_exact_whatever_the_precisions(dtype, grad_dtype):
    params = optax.tree.cast(DENSE, dtype)
    grads = optax.tree.cast(poison(dense_gradients()), grad_dtype)
    params, _ = one_step(kept(optax.sgd(RATE)), params, grads)
    assert_zero_where_pruned(params)
    assert {str(w.dtype) for w in params.values()} == {dtype}


@pytest.mark.parametrize("grad_dtype", ["float32", "float64"])
def test_keep_masks_is_exact_in_double_precision(grad_dtype):
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))}
        masks = {"w": np.arange(12).reshape(3, 4) % 2 == 0}
        grads = optax.tree.cast(params, grad_dtype)
        params, _ = one_step(sj.keep_masks(optax.sgd(RATE), masks), params, grads)
        assert params["w"].dtype == np.float64
        assert_zero_where_pruned(params, masks)


def test_keep_masks_is_exact_for_complex_params():
    params, masks = {"w": jnp.array([[1 + 2j, 3 - 1j]])}, {"w": jnp.array([[True, False]])}
    grads = {"w": jnp.array([[1 + 1j, complex(np.nan, np.inf)]])}
    optimizer = contrib.split_real_and_imaginary(optax.adam(RATE))
    params, _ = one_step(sj.keep_masks(optimizer, masks), params, grads)
    np.testing.assert_allclose(params["w"], [[0.99 + 1.99j, 0]], rtol=1e-5)


@pytest.mark.parametrize("spec", [PartitionSpec("d", None), PartitionSpec(None, "d")], ids=str)
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_keep_masks_keeps_the_sharding_of_params(spec, compiled):
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("d",)), spec)
    params = {"w": jax.device_put(draw(0, 16, 8), sharding)}
    masks = {"w": jax.device_put(draw(1, 16, 8) > 0, sharding)}
    tx = sj.keep_masks(optax.adam(RATE), masks)
    step = functools.partial(move, tx)
    after, state = (jax.jit(step) if compiled else step)(params, params, tx.init(params))
    assert_zero_where_pruned(after, masks)
    assert after["w"].sharding.is_equivalent_to(sharding, 2)
    assert state.masks["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_keep_masks_refuses_params_that_no_update_brings_to_zero(bad):
    params = DENSE | {"w1": jnp.where(MASKS["w1"], DENSE["w1"], bad)}
    with pytest.raises(ValueError, match=r"finite.*at 'w1'.*apply_masks\(params, masks\)"):
        kept().init(params)


def test_keep_masks_accepts_params_that_are_not_finite_where_they_are_kept():
    params = DENSE | {"w1": jnp.where(MASKS["w1"], jnp.nan, DENSE["w1"])}
    assert_trees_equal(kept().init(params).masks, MASKS)


def test_keep_masks_has_the_same_abstract_state():
    tx = kept()
    state = tx.init(DENSE)
    abstract = jax.eval_shape(tx.init, DENSE)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    )


def test_keep_masks_is_initialized_under_jit_from_params_that_are_constants_there():
    tx = kept()
    assert_trees_equal(jax.jit(lambda: tx.init(DENSE))().masks, MASKS)


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [(optax.adam(RATE), ("mu", "nu")), (optax.sgd(RATE, momentum=0.9), ("trace",))],
    ids=["adam", "momentum"],
)
def test_keep_masks_lets_map_params_reach_the_moments(optimizer, moments):
    tx = kept(optimizer)
    _, state = one_step(tx)
    cleared = optax.tree.map_params(tx, lambda x: x & False if x.dtype == bool else 0 * x, state)
    for name in moments:
        assert_trees_equal(optax.tree.get(cleared, name), jax.tree.map(jnp.zeros_like, DENSE))
    assert optax.tree.get(cleared, "count", 1) == 1


def test_keep_masks_prunes_leaves_without_axes():
    params, masks = {"s": jnp.array(2.0)}, {"s": jnp.array(False)}
    params, _ = one_step(sj.keep_masks(optax.adam(RATE), masks), params, params)
    assert params["s"] == 0


def test_keep_masks_passes_empty_leaves():
    params, masks = {"e": jnp.ones((0, 3))}, {"e": jnp.ones((0, 3), bool)}
    params, _ = one_step(sj.keep_masks(optax.adam(RATE), masks), params, params)
    assert params["e"].shape == (0, 3)


def test_keep_masks_passes_what_is_none():
    params, masks = {"n": None, "w": jnp.ones(2)}, {"n": None, "w": jnp.array([True, False])}
    params, _ = one_step(sj.keep_masks(optax.sgd(RATE), masks), params, params)
    assert params["n"] is None


COUNTED = {"step": jnp.array(3), "w": jnp.ones(2)}
COUNTED_MASKS = {"step": jnp.array(True), "w": jnp.array([True, False])}


def test_keep_masks_leaves_integers_alone():
    grads = {"step": jnp.array(0), "w": jnp.ones(2)}
    params, _ = one_step(sj.keep_masks(optax.sgd(RATE), COUNTED_MASKS), COUNTED, grads)
    assert params["step"] == 3
    assert params["step"].dtype == jnp.int32


def test_keep_masks_passes_the_gradient_of_an_integer():
    grads = jax.grad(lambda p: jnp.sum(p["w"] * p["step"]), allow_int=True)(COUNTED)
    optimizer = optax.masked(optax.sgd(RATE), {"step": False, "w": True})
    tx = sj.keep_masks(optimizer, COUNTED_MASKS)
    updates, _ = tx.update(grads, tx.init(COUNTED), COUNTED)
    assert updates["step"].dtype == jax.dtypes.float0


def test_keep_masks_prunes_a_leaf_without_a_gradient():
    params, masks = {"frozen": jnp.ones(2)}, {"frozen": jnp.array([True, False])}
    params, _ = one_step(sj.keep_masks(optax.sgd(RATE), masks), params, {"frozen": None})
    np.testing.assert_array_equal(params["frozen"], [1, 0])


STRENGTH = 0.3
LASSO = sj.penalties.l1(STRENGTH)
LASSO_INPUTS = draw(8, 16, 8)
LASSO_TARGETS = LASSO_INPUTS @ jnp.array([[2.0, -1, 1, 0, 0, 0, 0, 0]]).T


def half_mean_square(w):
    return jnp.mean(optax.l2_loss(LASSO_INPUTS @ w, LASSO_TARGETS))


def lasso_objective(w):
    return half_mean_square(w) + STRENGTH * jnp.sum(jnp.abs(w))


@deprecated
def test_penalized_lowers_the_objective(optimizer):
    tx, start = sj.penalized(OPTIMIZERS[optimizer](), LASSO), jnp.full((8, 1), 0.5)
    after = trainer(tx, f=half_mean_square, extra=EXTRA.get(optimizer, ()))(start)
    assert lasso_objective(after[-1]) < lasso_objective(start)


AWAY_FROM_ZERO = jnp.linspace(-1, 1, 8)[:, None]


def spied_penalized(**extra):
    def wrap(optimizer):
        return transforms.penalized(optimizer, LASSO)

    return spied(wrap, jax.grad(half_mean_square)(AWAY_FROM_ZERO), AWAY_FROM_ZERO, **extra)


def test_penalized_shows_the_objective_to_the_inner_optimizer():
    seen = spied_penalized(value=half_mean_square(AWAY_FROM_ZERO))
    np.testing.assert_allclose(seen["value"], lasso_objective(AWAY_FROM_ZERO), rtol=1e-6)


@pytest.mark.parametrize("name", ["updates", "grad"])
def test_penalized_shows_the_objectives_gradient_to_the_inner_optimizer(name):
    seen = spied_penalized(grad=jax.grad(half_mean_square)(AWAY_FROM_ZERO))
    expected = jax.grad(lasso_objective)(AWAY_FROM_ZERO)
    np.testing.assert_allclose(seen[name], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["value_fn", "obj_fn"])
def test_penalized_gives_the_objective_function_to_the_inner_optimizer(name):
    elsewhere = 2 * AWAY_FROM_ZERO
    seen = spied_penalized(**{name: half_mean_square})
    np.testing.assert_allclose(seen[name](elsewhere), lasso_objective(elsewhere), rtol=1e-6)


def test_penalized_penalizes_the_gradients_that_the_inner_optimizer_computes():
    elsewhere = 2 * AWAY_FROM_ZERO
    seen = spied_penalized(grad_fn=lambda p, i: jax.grad(half_mean_square)(p))
    expected = jax.grad(lasso_objective)(elsewhere)
    np.testing.assert_allclose(seen["grad_fn"](elsewhere, 0), expected, rtol=1e-5)
