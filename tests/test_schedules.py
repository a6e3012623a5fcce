"""Schedules against their formulas in Python's floats and against optax; the steps of refreshes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsejax import schedules

BEGIN, END = 7, 40
STEPS = range(BEGIN + END + 20)


def progress(step, begin=BEGIN, end=END):
    return min(max((step - begin) / (end - begin), 0), 1)


FORMULAS = {
    "linear": lambda init, end, t: end + (init - end) * (1 - t),
    "cubic": lambda init, end, t: end + (init - end) * (1 - t) ** 3,
    "cosine": lambda init, end, t: end + (init - end) * (1 + math.cos(math.pi * t)) / 2,
}
FACTORIES = {
    "linear": schedules.linear,
    "cubic": schedules.cubic,
    "cosine": schedules.cosine,
}
EXAMPLES = {
    **{name: f(0.1, 0.9, BEGIN, END) for name, f in FACTORIES.items()},
    "constant": schedules.constant(0.9),
    "one_shot": schedules.one_shot(0.9, 13),
    "piecewise": schedules.piecewise({10: 0.3, 20: 0.6, 33: 0.9}),
    "cyclical": schedules.cyclical(0.9, BEGIN, END, sparse_steps=5, dense_steps=3),
    "warm_up": schedules.warm_up(schedules.cubic(0.1, 0.9, BEGIN, END), 11),
    "cool_down": schedules.cool_down(schedules.cubic(0.1, 0.9, BEGIN, END), 30),
}
each_ramp = pytest.mark.parametrize("ramp", FACTORIES)
each_schedule = pytest.mark.parametrize("name", EXAMPLES)
fractions = st.floats(0, 1, exclude_max=True)


# ---- ramps


@each_ramp
@given(init=fractions, end=fractions, begin=st.integers(0, 1000), length=st.integers(1, 1000))
def test_ramp_follows_its_formula(ramp, init, end, begin, length):
    schedule = FACTORIES[ramp](init, end, begin, begin + length)
    for step in {0, begin, begin + length // 3, begin + length // 2, begin + length, 3000}:
        expected = FORMULAS[ramp](init, end, progress(step, begin, begin + length))
        assert schedule(step) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("power", [1, 3])
def test_ramp_equals_the_polynomial_schedule_of_optax(power):
    ours = {1: schedules.linear, 3: schedules.cubic}[power](0.2, 0.95, BEGIN, END)
    theirs = optax.polynomial_schedule(0.2, 0.95, power, END - BEGIN, BEGIN)
    steps = jnp.arange(len(STEPS))
    np.testing.assert_allclose(ours(steps), jax.vmap(theirs)(steps), rtol=3e-6)


def test_cosine_equals_the_cosine_decay_of_optax():
    ours = schedules.cosine(0.3, 0.0, 0, END)
    theirs = optax.cosine_decay_schedule(0.3, END)
    steps = jnp.arange(len(STEPS))
    np.testing.assert_allclose(ours(steps), jax.vmap(theirs)(steps), rtol=3e-6, atol=3e-8)


@each_ramp
@given(init=fractions, end=fractions)
def test_ramp_ends_at_its_end_value_bit_for_bit(ramp, init, end):
    schedule = FACTORIES[ramp](init, end, 3, 24)
    assert [schedule(step) for step in (24, 25, 10**9)] == [end] * 3


@each_ramp
@given(init=fractions, end=fractions)
def test_ramp_begins_at_its_init_value(ramp, init, end):
    schedule = FACTORIES[ramp](init, end, 3, 24)
    for step in (0, 3):
        assert schedule(step) == pytest.approx(init, rel=1e-15, abs=1e-16)


@each_ramp
@given(end=fractions)
def test_ramp_from_zero_is_exactly_zero_until_its_begin(ramp, end):
    schedule = FACTORIES[ramp](0.0, end, 3, 24)
    assert [schedule(step) for step in (0, 1, 2, 3)] == [0.0] * 4


@each_ramp
@pytest.mark.parametrize("init", [0.0, 0.1, 0.97])
@pytest.mark.parametrize("end", [0.0, 0.1, 0.5, 0.9, 0.98, 0.999])
def test_ramp_ends_at_its_float32_end_value_under_jit(ramp, init, end):
    schedule = FACTORIES[ramp](init, end, BEGIN, END)
    values = jax.jit(schedule)(jnp.array([END, END + 1, 10**6]))
    np.testing.assert_array_equal(values, np.full(3, end, np.float32))


@each_ramp
def test_ramp_rises_at_every_step(ramp):
    values = [FACTORIES[ramp](0.1, 0.9, BEGIN, END)(step) for step in range(BEGIN, END + 1)]
    assert (np.diff(values) > 0).all()


@each_ramp
def test_ramp_may_fall(ramp):
    values = [FACTORIES[ramp](0.9, 0.1, BEGIN, END)(step) for step in range(BEGIN, END + 1)]
    assert (np.diff(values) < 0).all()


@each_ramp
def test_ramp_of_one_step_jumps(ramp):
    schedule = FACTORIES[ramp](0.0, 0.9, 4, 5)
    assert (schedule(4), schedule(5)) == (0.0, 0.9)


# ---- steps


@pytest.mark.parametrize("step", [0, 5, np.int64(5)])
def test_constant_is_the_same_everywhere(step):
    assert schedules.constant(0.9)(step) == 0.9


def test_one_shot_prunes_all_at_its_step():
    schedule = schedules.one_shot(0.9, 13)
    assert [schedule(step) for step in (0, 12, 13, 14, 10**6)] == [0, 0, 0.9, 0.9, 0.9]


def test_one_shot_may_prune_at_step_zero():
    assert schedules.one_shot(0.9, 0)(0) == 0.9


@given(
    st.dictionaries(st.integers(0, 60), fractions, min_size=1, max_size=5),
    st.lists(st.integers(0, 70), min_size=1, max_size=5),
)
def test_piecewise_has_the_value_of_the_last_boundary(rows, steps):
    schedule = schedules.piecewise(rows)
    for step in steps:
        past = [t for t in rows if t <= step]
        assert schedule(step) == (rows[max(past)] if past else 0.0)


def test_piecewise_takes_boundaries_in_any_order():
    assert schedules.piecewise({20: 0.6, 10: 0.3})(15) == 0.3


def test_piecewise_copies_its_mapping():
    rows = {10: 0.3}
    schedule = schedules.piecewise(rows)
    rows[10] = 0.9
    assert schedule(10) == 0.3


def test_piecewise_jumps_at_its_boundaries():
    assert schedules.piecewise({20: 0.6, 10: 0.3}).jumps == (10, 20)


@given(
    begin=st.integers(0, 20),
    length=st.integers(1, 40),
    sparse=st.integers(1, 9),
    dense=st.integers(1, 9),
)
def test_cyclical_alternates_and_ends_sparse(begin, length, sparse, dense):
    end = begin + length
    schedule = schedules.cyclical(0.75, begin, end, sparse_steps=sparse, dense_steps=dense)
    expected = [0.0] * begin
    while len(expected) < end:
        expected += [0.75] * sparse + [0.0] * dense
    expected = expected[:end] + [0.75] * 5
    assert [schedule(step) for step in range(end + 5)] == expected


@given(
    begin=st.integers(0, 20),
    length=st.integers(1, 40),
    sparse=st.integers(1, 9),
    dense=st.integers(1, 9),
)
def test_cyclical_jumps_where_its_value_changes(begin, length, sparse, dense):
    end = begin + length
    schedule = schedules.cyclical(0.75, begin, end, sparse_steps=sparse, dense_steps=dense)
    values = [0.0, *(schedule(step) for step in range(end + 5))]
    changes = {step for step in range(end + 5) if values[step] != values[step + 1]}
    assert changes <= set(schedule.jumps)


# ---- schedules of schedules


@pytest.mark.parametrize("steps", [0, 1, 11])
@each_schedule
def test_warm_up_is_dense_and_then_the_schedule(name, steps):
    inner = EXAMPLES[name]
    schedule = schedules.warm_up(inner, steps)
    expected = [0.0] * steps + [inner(step) for step in STEPS]
    assert [schedule(step) for step in range(len(STEPS) + steps)] == expected


@each_schedule
def test_warm_up_delays_the_begin_the_end_and_the_jumps(name):
    inner, schedule = EXAMPLES[name], schedules.warm_up(EXAMPLES[name], 5)
    assert (schedule.begin_step, schedule.end_step) == (inner.begin_step + 5, inner.end_step + 5)
    assert {t + 5 for t in inner.jumps} <= set(schedule.jumps)


@pytest.mark.parametrize("begin", [0, 3, 30, 100])
@each_schedule
def test_cool_down_stays_at_the_value_where_it_begins(name, begin):
    inner = EXAMPLES[name]
    schedule = schedules.cool_down(inner, begin)
    assert [schedule(step) for step in STEPS] == [inner(min(step, begin)) for step in STEPS]


def test_cool_down_ends_where_it_begins():
    assert schedules.cool_down(EXAMPLES["cubic"], 30).end_step == 30


def test_cool_down_leaves_no_jump_after_its_end():
    schedule = schedules.cool_down(EXAMPLES["piecewise"], 25)
    assert max(schedule.jumps) == 25


def branching(step):
    """A function for which a traced step is no use, nor an array of steps."""
    if step < 10:
        return 0.25
    return 0.5


PLAIN = {
    "lambda": lambda step: 0.5 * (step / (step + 100)),
    "branching": branching,
    "optax": optax.polynomial_schedule(0.0, 0.5, 3, 50),
    "optax piecewise": optax.piecewise_constant_schedule(0.25, {20: 2.0}),
    "math": lambda step: math.sqrt(step) / 2**11,
}
each_plain = pytest.mark.parametrize("plain", PLAIN)


@each_plain
def test_cool_down_takes_a_plain_function(plain):
    schedule = schedules.cool_down(PLAIN[plain], 30)
    for step in (0, 9, 10, 30):
        assert schedule(step) == pytest.approx(float(PLAIN[plain](step)), rel=1e-6)
    assert schedule(31) == schedule(30)


@each_plain
def test_cool_down_of_a_plain_function_takes_arrays_of_steps(plain):
    schedule = schedules.cool_down(PLAIN[plain], 30)
    steps = np.arange(40)
    np.testing.assert_array_equal(schedule(steps), [schedule(int(step)) for step in steps])


@each_plain
def test_cool_down_of_a_plain_function_is_evaluated_inside_jit(plain):
    # Where a transform is built inside a jitted function, its table is still made beforehand.
    def traced(x):
        found = schedules.refreshes(schedules.cool_down(PLAIN[plain], 30), 7)
        return x + found.values.sum()

    expected = schedules.refreshes(schedules.cool_down(PLAIN[plain], 30), 7).values.sum()
    assert float(jax.jit(traced)(0.0)) == pytest.approx(expected, rel=1e-6)


def test_warm_up_of_a_plain_function_has_no_end():
    schedule = schedules.warm_up(PLAIN["optax"], 10)
    assert schedule.end_step is None


def test_warm_up_of_a_plain_function_starts_from_its_step_zero():
    schedule = schedules.warm_up(PLAIN["branching"], 10)
    assert [schedule(step) for step in (9, 10, 19, 20)] == [0.0, 0.25, 0.25, 0.5]


def test_warm_up_never_calls_a_plain_function_before_its_step_zero():
    assert schedules.warm_up(lambda step: math.sqrt(step), 10)(5) == 0.0


def test_warm_up_of_a_plain_function_may_be_cooled_down():
    schedule = schedules.cool_down(schedules.warm_up(PLAIN["lambda"], 10), 60)
    assert (schedule(9), schedule(60), schedule(61)) == (0.0, 1 / 6, 1 / 6)


# ---- kinds of steps


@each_schedule
@pytest.mark.parametrize("step", [13, np.int32(13), np.int64(13), np.array(13)], ids=repr)
def test_schedule_of_one_number_is_a_python_float(name, step):
    value = EXAMPLES[name](step)
    assert type(value) is float and value == EXAMPLES[name](13)


@each_schedule
def test_schedule_of_a_numpy_array_is_float64(name):
    values = EXAMPLES[name](np.array(STEPS))
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, [EXAMPLES[name](step) for step in STEPS])


@each_schedule
def test_schedule_of_a_jax_array_is_float32(name):
    values = EXAMPLES[name](jnp.array(STEPS))
    assert isinstance(values, jax.Array) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, EXAMPLES[name](np.array(STEPS)), rtol=3e-6, atol=1e-7)


@each_schedule
def test_schedule_is_the_same_under_jit(name):
    values = jax.jit(EXAMPLES[name])(jnp.array(STEPS))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, EXAMPLES[name](np.array(STEPS)), rtol=3e-6, atol=1e-7)


@each_schedule
def test_schedule_of_a_traced_number_is_a_traced_number(name):
    assert jax.eval_shape(EXAMPLES[name], jax.ShapeDtypeStruct((), jnp.int32)).shape == ()


@each_schedule
def test_schedule_works_as_a_schedule_of_optax(name):
    tx = optax.scale_by_schedule(EXAMPLES[name])
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, np.full(2, EXAMPLES[name](0)), rtol=1e-6)


@each_schedule
def test_schedule_knows_from_where_it_is_constant(name):
    schedule = EXAMPLES[name]
    assert {schedule(schedule.end_step + i) for i in (0, 1, 7, 10**6)} == {schedule(10**6)}


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "warm_up"])
def test_schedule_knows_until_where_it_is_constant(name):
    schedule = EXAMPLES[name]
    assert {schedule(step) for step in range(schedule.begin_step)} <= {schedule(0)}


# ---- refreshes


def regular(begin, end, every):
    steps, step = set(), begin
    while step <= end:
        steps.add(step)
        step += every
    return steps


@given(
    ramp=st.sampled_from(list(FACTORIES)),
    begin=st.integers(0, 100),
    length=st.integers(1, 100),
    every=st.integers(1, 130),
)
@example("cubic", 0, 1, 1000)
@example("cubic", 5, 10, 10)
def test_refreshes_of_a_ramp_are_the_regular_steps_and_the_end(ramp, begin, length, every):
    schedule = FACTORIES[ramp](0.0, 0.9, begin, begin + length)
    found = schedules.refreshes(schedule, every)
    expected = regular(begin, begin + length, every) | {begin + length}
    assert found.steps.tolist() == sorted(expected)


@given(name=st.sampled_from(list(EXAMPLES)), every=st.integers(1, 50))
def test_refreshes_include_begin_end_and_jumps(name, every):
    schedule = EXAMPLES[name]
    steps = schedules.refreshes(schedule, every).steps.tolist()
    assert {schedule.begin_step, schedule.end_step, *schedule.jumps} <= set(steps)


@given(name=st.sampled_from(list(EXAMPLES)), every=st.integers(1, 50))
def test_refreshes_are_nothing_but_regular_begin_end_and_jumps(name, every):
    schedule = EXAMPLES[name]
    steps = set(schedules.refreshes(schedule, every).steps.tolist())
    listed = {schedule.end_step, *schedule.jumps}
    before = {0} if schedule(0) > 0 else set()
    assert steps <= regular(schedule.begin_step, schedule.end_step, every) | listed | before


@given(name=st.sampled_from(list(EXAMPLES)), every=st.integers(1, 50))
def test_refreshes_ascend(name, every):
    assert (np.diff(schedules.refreshes(EXAMPLES[name], every).steps) > 0).all()


@given(name=st.sampled_from(list(EXAMPLES)), every=st.integers(1, 50))
def test_refreshes_hold_the_values_of_the_schedule_in_float64(name, every):
    found = schedules.refreshes(EXAMPLES[name], every)
    assert found.values.dtype == np.float64
    assert found.values.tolist() == [EXAMPLES[name](int(step)) for step in found.steps]


@pytest.mark.parametrize("every", [1, 3, 7, 10**6])
@each_schedule
def test_refreshes_end_at_the_sparsity_asked_for(name, every):
    found = schedules.refreshes(EXAMPLES[name], every)
    assert found.values[-1] == EXAMPLES[name](10**9)


@settings(max_examples=25)
@given(
    name=st.sampled_from(list(EXAMPLES)), every=st.integers(1, 50), onward=st.sampled_from([0, 1])
)
def test_now_is_true_at_the_refreshes_alone(name, every, onward):
    schedule = EXAMPLES[name]
    found = schedules.refreshes(schedule, every, onward=bool(onward))
    expected = set(found.steps.tolist())
    if onward:
        expected |= {t for t in regular(schedule.begin_step, 200, every) if t > schedule.end_step}
    assert {step for step in range(200) if found.now(step)} == expected


@settings(max_examples=10)
@given(
    name=st.sampled_from(list(EXAMPLES)), every=st.integers(1, 50), onward=st.sampled_from([0, 1])
)
def test_now_is_the_same_for_all_kinds_of_steps(name, every, onward):
    found = schedules.refreshes(EXAMPLES[name], every, onward=bool(onward))
    expected = [bool(found.now(step)) for step in range(80)]
    assert [bool(found.now(step)) for step in np.arange(80)] == expected
    assert jax.jit(jax.vmap(found.now))(jnp.arange(80)).tolist() == expected


@settings(max_examples=10)
@given(name=st.sampled_from(list(EXAMPLES)), every=st.integers(1, 50))
def test_index_is_that_of_the_last_refresh(name, every):
    found = schedules.refreshes(EXAMPLES[name], every)
    first, steps = int(found.steps[0]), found.steps.tolist()
    expected = [steps.index(max(t for t in steps if t <= step)) for step in range(first, 80)]
    assert [int(found.index(step)) for step in range(first, 80)] == expected
    assert jax.jit(jax.vmap(found.index))(jnp.arange(first, 80)).tolist() == expected


def test_index_before_the_first_refresh_is_the_first():
    assert int(schedules.refreshes(EXAMPLES["cubic"], 5).index(0)) == 0


def test_refreshes_stop_at_the_end():
    found = schedules.refreshes(schedules.cubic(0.0, 0.9, 5, 25), 10)
    assert [step for step in range(100) if found.now(step)] == [5, 15, 25]


def test_refreshes_go_onward_after_the_end_when_asked():
    found = schedules.refreshes(schedules.cubic(0.0, 0.9, 5, 27), 10, onward=True)
    assert [step for step in range(60) if found.now(step)] == [5, 15, 25, 27, 35, 45, 55]


def test_refreshes_of_a_constant_are_one_at_step_zero():
    found = schedules.refreshes(schedules.constant(0.9), 10)
    assert [step for step in range(100) if found.now(step)] == [0]


def test_refreshes_of_one_shot_are_one_at_its_step():
    found = schedules.refreshes(schedules.one_shot(0.9, 13), 10)
    assert [step for step in range(100) if found.now(step)] == [13]


@pytest.mark.parametrize("init", [1e-6, 0.5])
def test_refreshes_of_a_schedule_above_zero_before_its_begin_include_step_zero(init):
    found = schedules.refreshes(schedules.cubic(init, 0.9, 5, 25), 10)
    assert found.steps.tolist() == [0, 5, 15, 25]
    assert found.values[0] == pytest.approx(init)


@each_plain
def test_refreshes_of_a_plain_function_go_on_from_step_zero(plain):
    found = schedules.refreshes(PLAIN[plain], 7)
    assert [step for step in range(30) if found.now(step)] == [0, 7, 14, 21, 28]


def test_refreshes_of_a_plain_function_are_not_listed():
    found = schedules.refreshes(PLAIN["optax"], 7)
    assert found.steps.size == found.values.size == 0 and found.onward


def test_refreshes_of_a_warmed_up_plain_function_begin_after_the_warm_up():
    found = schedules.refreshes(schedules.warm_up(PLAIN["optax"], 10), 7)
    assert [step for step in range(30) if found.now(step)] == [10, 17, 24]


def test_refreshes_of_a_plain_function_are_the_same_traced():
    found = schedules.refreshes(PLAIN["lambda"], 7)
    steps = jnp.arange(30)
    assert np.flatnonzero(jax.jit(jax.vmap(found.now))(steps)).tolist() == [0, 7, 14, 21, 28]


def test_refreshes_take_a_schedule_of_ones_own():
    own = schedules.SparsitySchedule(lambda xp, t: xp.where(t < 3, 0.0, 0.5), 3, 8, (6,))
    assert schedules.refreshes(own, 4).steps.tolist() == [3, 6, 7, 8]


# ---- errors

CUBIC = {"init_value": 0.0, "end_value": 0.9, "begin_step": 0, "end_step": 10}
CYCLE = {"value": 0.9, "begin_step": 0, "end_step": 9, "sparse_steps": 2, "dense_steps": 2}
FRACTION = r"`{}` must be in \[0, 1\) \(a fraction, not a percentage\), got {}"


def custom(value):
    return schedules.SparsitySchedule(lambda xp, t: xp.full(xp.shape(t), value), 0, 5)


# Where each factory takes a sparsity: the name it speaks of, and a call with a value of it.
SPARSITIES = {
    "constant": ("value", lambda v: schedules.constant(v)),
    "one_shot": ("value", lambda v: schedules.one_shot(v, 3)),
    "piecewise": ("value", lambda v: schedules.piecewise({3: 0.1, 9: v})),
    "cyclical": ("value", lambda v: schedules.cyclical(**CYCLE | {"value": v})),
    **{
        f"{ramp} {name}": (name, lambda v, f=f, name=name: f(**CUBIC | {name: v}))
        for ramp, f in FACTORIES.items()
        for name in ("init_value", "end_value")
    },
}
# The same for steps; the third says the name in the message.
STEP_ARGUMENTS = {
    "one_shot": ("step", lambda t: schedules.one_shot(0.9, t)),
    "piecewise": ("boundary", lambda t: schedules.piecewise({t: 0.9})),
    "warm_up": ("steps", lambda t: schedules.warm_up(schedules.constant(0.9), t)),
    "cool_down": ("begin_step", lambda t: schedules.cool_down(schedules.constant(0.9), t)),
    "every": ("every", lambda t: schedules.refreshes(schedules.constant(0.9), t)),
    **{
        f"cyclical {name}": (name, lambda t, name=name: schedules.cyclical(**CYCLE | {name: t}))
        for name in ("begin_step", "end_step", "sparse_steps", "dense_steps")
    },
    **{
        f"{ramp} {name}": (name, lambda t, f=f, name=name: f(**CUBIC | {name: t}))
        for ramp, f in FACTORIES.items()
        for name in ("begin_step", "end_step")
    },
}
KEYS = ("piecewise",)  # its steps are keys of a mapping
each_sparsity = pytest.mark.parametrize("argument", SPARSITIES)
each_step = pytest.mark.parametrize("argument", STEP_ARGUMENTS)
as_users = pytest.mark.usefixtures("as_users_have_it")


@as_users
@each_sparsity
@pytest.mark.parametrize("value", [90, 90.0, 1, 1.0, -0.1, math.inf])
def test_schedule_refuses_a_sparsity_out_of_range(argument, value):
    name, call = SPARSITIES[argument]
    with pytest.raises(ValueError, match=FRACTION.format(name, value)):
        call(value)


@as_users
@each_sparsity
def test_schedule_refuses_nan(argument):
    name, call = SPARSITIES[argument]
    with pytest.raises(ValueError, match=f"`{name}` must be a number, got nan"):
        call(math.nan)


@as_users
@each_sparsity
@pytest.mark.parametrize("value", ["0.9", None, [0.9], np.array([0.9]), True, 0.5j], ids=repr)
def test_schedule_refuses_a_sparsity_that_is_no_number(argument, value):
    name, call = SPARSITIES[argument]
    with pytest.raises(TypeError, match=f"`{name}` must be one real number, got "):
        call(value)


@as_users
@each_sparsity
def test_schedule_refuses_a_traced_sparsity(argument):
    name, call = SPARSITIES[argument]
    with pytest.raises(TypeError, match=f"`{name}` must be known before tracing"):
        jax.jit(lambda v: call(v)(3))(0.5)


@as_users
@each_sparsity
@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32, np.array], ids=str)
def test_schedule_takes_other_numbers(argument, kind):
    call = SPARSITIES[argument][1]
    assert call(kind(0.5))(10**6) == call(0.5)(10**6)


@as_users
@each_step
@pytest.mark.parametrize("step", [1.5, 2.0, True, "3", None, np.array([3])], ids=repr)
def test_schedule_refuses_a_step_that_is_no_integer(argument, step):
    if argument in KEYS and isinstance(step, np.ndarray):
        pytest.skip("an array is no key of a mapping")
    name, call = STEP_ARGUMENTS[argument]
    with pytest.raises(TypeError, match=f"`{name}` must be one integer, got "):
        call(step)


@as_users
@each_step
@pytest.mark.parametrize("step", [-1, 2**31])
def test_schedule_refuses_a_step_out_of_range(argument, step):
    name, call = STEP_ARGUMENTS[argument]
    pattern = rf"`{name}` must be an integer from [01] to 2\*\*31 - 1, got {step}"
    with pytest.raises(ValueError, match=pattern):
        call(step)


@as_users
@each_step
def test_schedule_takes_numpy_integers(argument):
    call = STEP_ARGUMENTS[argument][1]
    step = 8
    assert _same(call(np.int64(step)), call(step))


def _same(a, b):
    if isinstance(a, schedules.Refreshes):
        return a.steps.tolist() == b.steps.tolist() and a.every == b.every
    return (a.begin_step, a.end_step, a.jumps) == (b.begin_step, b.end_step, b.jumps)


@as_users
@pytest.mark.parametrize("argument", [a for a in STEP_ARGUMENTS if a not in KEYS])
def test_schedule_refuses_a_traced_step(argument):
    name, call = STEP_ARGUMENTS[argument]
    pattern = rf"`{name}` must be known before tracing, got .*Tracer"
    with pytest.raises(TypeError, match=pattern):
        jax.jit(lambda t: call(t) and t)(3)


@as_users
@pytest.mark.parametrize("step", [np.array([3]), jnp.array(3)], ids=["several", "jax array"])
def test_one_shot_refuses_or_takes_a_step_that_cannot_be_a_key(step):
    try:
        assert schedules.one_shot(0.9, step)(3) == 0.9
    except TypeError as error:
        assert "`step` must be" in str(error)  # noqa: PT017


@as_users
@pytest.mark.parametrize("argument", ["cyclical sparse_steps", "cyclical dense_steps", "every"])
def test_schedule_refuses_a_length_of_zero(argument):
    name, call = STEP_ARGUMENTS[argument]
    with pytest.raises(ValueError, match=f"`{name}` must be an integer from 1 to .*, got 0"):
        call(0)


@as_users
@pytest.mark.parametrize("begin", [10, 11])
@pytest.mark.parametrize("factory", [*FACTORIES, "cyclical"])
def test_schedule_refuses_an_interval_without_steps(factory, begin):
    call, arguments = FACTORIES.get(factory, schedules.cyclical), CUBIC
    if factory == "cyclical":
        arguments = CYCLE
    pattern = rf"`end_step` must be after `begin_step` = {begin}, got 10; schedules\.one_shot"
    with pytest.raises(ValueError, match=pattern):
        call(**arguments | {"begin_step": begin, "end_step": 10})


@as_users
@pytest.mark.parametrize("rows", [{}, [], [(3, 0.5)], None, 0.5])
def test_piecewise_refuses_what_is_no_mapping_with_rows(rows):
    with pytest.raises(TypeError, match=r"`boundaries_and_values` must be a mapping .*\{1000: 0"):
        schedules.piecewise(rows)


@as_users
@pytest.mark.parametrize("schedule", [0.9, None, "cubic"])
def test_refreshes_refuse_what_is_no_function(schedule):
    with pytest.raises(TypeError, match=r"`schedule` must be a function step -> sparsity, got "):
        schedules.refreshes(schedule, 3)


@as_users
@pytest.mark.parametrize("schedule", [None, "cubic", [0.5]])
@pytest.mark.parametrize("call", [schedules.warm_up, schedules.cool_down])
def test_schedule_of_a_schedule_refuses_what_is_neither_number_nor_function(call, schedule):
    with pytest.raises(TypeError, match=r"`schedule` must be a number or a schedule .*got "):
        call(schedule, 3)


def test_warm_up_takes_a_number():
    schedule = schedules.warm_up(0.5, 10)
    assert [schedule(step) for step in (9, 10)] == [0, 0.5]


@as_users
@pytest.mark.parametrize(
    ("schedule", "got"),
    [
        (optax.linear_schedule(0, 90, 10), r"9\.0 at step 1\."),
        (optax.linear_schedule(0, 1, 10), r"1\.0 at step 10\."),
        (lambda step: step / 10_000, r"1\.0 at step 10000\."),
        (lambda step: -0.5 + 0 * step, r"-0\.5 at step 0\."),
    ],
)
def test_refreshes_refuse_a_plain_function_that_leaves_the_range(schedule, got):
    pattern = rf"`schedule` must stay in \[0, 1\) .*got {got} .*cool_down"
    with pytest.raises(ValueError, match=pattern):
        schedules.refreshes(schedule, 1)


@as_users
@pytest.mark.parametrize("value", [90.0, 1.0, -0.5, math.nan, math.inf])
def test_refreshes_refuse_a_schedule_that_leaves_the_range(value):
    pattern = rf"`schedule` must stay in \[0, 1\) .*got {value} at step 0"
    with pytest.raises(ValueError, match=pattern):
        schedules.refreshes(custom(value), 3)


@as_users
def test_refreshes_name_the_step_where_a_schedule_leaves_the_range():
    schedule = schedules.cool_down(optax.linear_schedule(0.0, 1.0, 8), 10)
    with pytest.raises(ValueError, match=r"`schedule` must stay in \[0, 1\) .*got 1\.0 at step 9"):
        schedules.refreshes(schedule, 3)


@as_users
def test_warm_up_refuses_a_schedule_whose_steps_are_too_late_to_be_int32():
    with pytest.raises(ValueError, match=r"`steps` \+ the end of `schedule` .*got 2147483657"):
        schedules.warm_up(schedules.one_shot(0.5, 2**31 - 1), 10)
