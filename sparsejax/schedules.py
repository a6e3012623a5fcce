"""Sparsity schedules: step -> sparsity, as in optax, and the steps at which masks are refreshed.

A schedule of this module knows where it begins, ends and jumps, so that whoever refreshes masks
every n steps refreshes them there, too, and ends at the sparsity asked for, whatever n is. Called
with a Python integer it computes in float64, which is what the number of pruned entries follows;
called with a JAX array (traced or not) in float32. Any other function of the step that can be
traced, such as a schedule of optax, will do wherever a schedule is asked for. It has no end, unless
`cool_down` gives it one; then it need not be traceable, either.

The same functions serve as drop fractions of `dynamic.rigl` and `dynamic.set_`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves
from sparsejax._typing import Scalar, ScalarOrSchedule, Schedule

_Formula: TypeAlias = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class SparsitySchedule:
    """A function of the step that knows its begin, its end and its jumps.

    Attributes:
      formula: `(numpy or jax.numpy, steps) -> values`.
      begin_step: until here it changes at jumps only; regular refreshes are counted from here.
      end_step: from here on it is constant; `None` where that is not known.
      jumps: steps at which masks are refreshed however many steps lie between two refreshes.
    """

    formula: _Formula = dataclasses.field(repr=False)
    begin_step: int
    end_step: int | None
    jumps: tuple[int, ...] = ()

    def __call__(self, step: Any) -> Any:
        """The value at `step`: float64 for numbers and NumPy arrays, float32 for JAX arrays."""
        if isinstance(step, jax.Array):
            return jnp.asarray(self.formula(jnp, step), jnp.float32)
        value = np.asarray(self.formula(np, np.asarray(step)), np.float64)
        return value if value.ndim else float(value)


def constant(value: Scalar) -> SparsitySchedule:
    """The same sparsity from step 0 on.

    Args:
      value: the sparsity, in [0, 1).

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if `value` is no number in [0, 1).

    Example:
      >>> from sparsejax import schedules
      >>> schedules.constant(0.9)(7)
      0.9
    """
    value = _checks.known_fraction("value", value)
    return SparsitySchedule(lambda xp, t: xp.full(xp.shape(t), value), 0, 0, (0,))


def one_shot(value: Scalar, step: int) -> SparsitySchedule:
    """Dense before `step`, and all of `value` at once there.

    Args:
      value: the sparsity, in [0, 1).
      step: when, an integer >= 0.

    Returns:
      A schedule with a single refresh.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import schedules
      >>> schedule = schedules.one_shot(0.9, step=100)
      >>> schedule(99), schedule(100)
      (0.0, 0.9)
    """
    return piecewise({_checks.known_step("step", step): value})


def linear(
    init_value: Scalar, end_value: Scalar, begin_step: int, end_step: int
) -> SparsitySchedule:
    """From `init_value` at `begin_step` to `end_value` at `end_step` in a straight line.

    Args:
      init_value: the sparsity until `begin_step`, in [0, 1).
      end_value: the sparsity from `end_step` on.
      begin_step: an integer >= 0.
      end_step: a larger integer.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import schedules
      >>> schedules.linear(0.0, 0.8, begin_step=100, end_step=300)(200)
      0.4
    """
    return _ramp(init_value, end_value, begin_step, end_step, lambda xp, rest: rest)


def cubic(
    init_value: Scalar, end_value: Scalar, begin_step: int, end_step: int
) -> SparsitySchedule:
    """Fast at first, slow at the end: `end + (init - end) (1 - t)³`, t from 0 to 1.

    Args:
      init_value: the sparsity until `begin_step`, in [0, 1).
      end_value: the sparsity from `end_step` on.
      begin_step: an integer >= 0.
      end_step: a larger integer.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import schedules
      >>> schedule = schedules.cubic(0.0, 0.8, begin_step=100, end_step=300)
      >>> schedule(100), round(schedule(200), 6), schedule(300)
      (0.0, 0.7, 0.8)

    References:
      M. Zhu and S. Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model
      compression*, ICLR 2018 workshop, https://arxiv.org/abs/1710.01878, equation 1. (It is
      `optax.polynomial_schedule` with power 3, in float64.)
    """
    return _ramp(init_value, end_value, begin_step, end_step, lambda xp, rest: rest**3)


def cosine(
    init_value: Scalar, end_value: Scalar, begin_step: int, end_step: int
) -> SparsitySchedule:
    """Slow at both ends: `end + (init - end) (1 + cos πt) / 2`, t from 0 to 1.

    With `end_value=0` it is the drop fraction of RigL.

    Args:
      init_value: the value until `begin_step`, in [0, 1).
      end_value: the value from `end_step` on.
      begin_step: an integer >= 0.
      end_step: a larger integer.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import schedules
      >>> schedule = schedules.cosine(0.3, 0.0, begin_step=0, end_step=1000)
      >>> schedule(0), round(schedule(500), 6), schedule(1000)
      (0.3, 0.15, 0.0)

    References:
      U. Evci et al., *Rigging the lottery: making all tickets winners*, ICML 2020,
      https://arxiv.org/abs/1911.11134, section 3 (1).
    """

    def falling(xp: Any, rest: Any) -> Any:
        # Exact at both ends: cos(0) is 1, and (1 + cos π) / 2 is 0 in float32 and in float64.
        return (1 + xp.cos(xp.pi * (1 - rest))) / 2

    return _ramp(init_value, end_value, begin_step, end_step, falling)


def piecewise(boundaries_and_values: Mapping[int, Scalar]) -> SparsitySchedule:
    """Steps: from each boundary on its value; dense before the first.

    (`optax.piecewise_constant_schedule` takes factors instead, and acts after the boundary.)

    Args:
      boundaries_and_values: a mapping from steps, integers >= 0, to sparsities in [0, 1).

    Returns:
      A schedule that refreshes masks at every boundary.

    Raises:
      TypeError, ValueError: if a step or a value is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import schedules
      >>> schedule = schedules.piecewise({100: 0.5, 200: 0.9})
      >>> [schedule(step) for step in (99, 100, 199, 200)]
      [0.0, 0.5, 0.5, 0.9]
    """
    if not isinstance(boundaries_and_values, Mapping) or not boundaries_and_values:
        raise TypeError(
            "`boundaries_and_values` must be a mapping from steps to sparsities such as "
            f"{{1000: 0.5}}, got {_leaves.brief(boundaries_and_values)}."
        )
    given = boundaries_and_values.items()
    rows = sorted(
        (_checks.known_step("boundary", t), _checks.known_fraction("value", v)) for t, v in given
    )
    steps = np.array([t for t, _ in rows])
    values = np.array([0.0, *(v for _, v in rows)])

    def formula(xp: Any, t: Any) -> Any:
        return xp.asarray(values)[xp.searchsorted(xp.asarray(steps), t, side="right")]

    return SparsitySchedule(formula, rows[0][0], rows[-1][0], tuple(t for t, _ in rows))


def cyclical(
    value: Scalar, begin_step: int, end_step: int, *, sparse_steps: int, dense_steps: int
) -> SparsitySchedule:
    """Sparse and dense phases by turns, as AC/DC trains; sparse in the end.

    Dense until `begin_step`; then `sparse_steps` steps at `value` and `dense_steps` steps without
    masks, again and again; from `end_step` on at `value`. What returns in a dense phase starts from
    zero.

    Args:
      value: the sparsity of the sparse phases, in [0, 1).
      begin_step: an integer >= 0.
      end_step: a larger integer.
      sparse_steps: the length of a sparse phase, an integer >= 1.
      dense_steps: the length of a dense phase, an integer >= 1.

    Returns:
      A schedule that refreshes masks at the beginning of every phase.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import schedules
      >>> schedule = schedules.cyclical(0.9, 10, 40, sparse_steps=10, dense_steps=5)
      >>> [schedule(step) for step in (9, 10, 19, 20, 24, 25, 35, 40)]
      [0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.0, 0.9]

    References:
      A. Peste et al., *AC/DC: alternating compressed/decompressed training of deep neural
      networks*, NeurIPS 2021, https://arxiv.org/abs/2106.12379
    """
    value = _checks.known_fraction("value", value)
    begin, end = _interval(begin_step, end_step)
    sparse, dense = (
        _checks.known_step("sparse_steps", sparse_steps, 1),
        _checks.known_step("dense_steps", dense_steps, 1),
    )
    starts = range(begin, end, sparse + dense)
    jumps = {*starts, *(t + sparse for t in starts if t + sparse < end), end}

    def formula(xp: Any, t: Any) -> Any:
        in_phase = (t - begin) % (sparse + dense) < sparse
        return xp.where((t >= end) | ((t >= begin) & in_phase), value, 0.0)

    return SparsitySchedule(formula, begin, end, tuple(sorted(jumps)))


def warm_up(schedule: ScalarOrSchedule, steps: int) -> SparsitySchedule:
    """Dense for `steps` steps; then the schedule, from its own step 0.

    Args:
      schedule: a schedule, or a number.
      steps: an integer >= 0.

    Returns:
      A schedule; it has an end if the given one has.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import schedules
      >>> schedule = schedules.warm_up(schedules.constant(0.9), 100)
      >>> schedule(99), schedule(100)
      (0.0, 0.9)
    """
    inner, delay = _lifted(schedule), _checks.known_step("steps", steps)

    def formula(xp: Any, t: Any) -> Any:
        return xp.where(t >= delay, inner.formula(xp, xp.maximum(t - delay, 0)), 0.0)

    end = inner.end_step
    if end is not None:
        end = _checks.known_step("steps` + the end of `schedule", end + delay)
    jumps = {delay, *(t + delay for t in inner.jumps)}
    return SparsitySchedule(formula, inner.begin_step + delay, end, tuple(sorted(jumps)))


def cool_down(schedule: ScalarOrSchedule, begin_step: int) -> SparsitySchedule:
    """The schedule until `begin_step`; then its value there, and the masks stay as they are.

    It gives an end to a function that knows none: `cool_down(f, 10_000)`.

    Args:
      schedule: a schedule, or a number.
      begin_step: the step of the last refresh, an integer >= 0.

    Returns:
      A schedule that ends at `begin_step`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> import optax
      >>> from sparsejax import schedules
      >>> schedule = schedules.cool_down(optax.linear_schedule(0.0, 1.0, 1000), begin_step=750)
      >>> schedule(250), schedule(2000), schedule.end_step
      (0.25, 0.75, 750)
    """
    inner, end = _lifted(schedule), _checks.known_step("begin_step", begin_step)

    def formula(xp: Any, t: Any) -> Any:
        return inner.formula(xp, xp.minimum(t, end))

    jumps = {end, *(t for t in inner.jumps if t < end)}
    return SparsitySchedule(formula, min(inner.begin_step, end), end, tuple(sorted(jumps)))


@dataclasses.dataclass(frozen=True)
class Refreshes:
    """When masks are refreshed, and what the schedule says there: every `every` steps, and at ends.

    The values are computed once, before anything is traced, in float64: eager, jitted and scanned
    code all look them up.

    Attributes:
      schedule: the schedule.
      every: steps between two refreshes, counted from the schedule's begin.
      onward: whether refreshes go on after the schedule's end.
      steps: the steps of the refreshes until the end, ascending; empty where the schedule is a
        plain function, which has no end.
      values: the schedule's values there.
    """

    schedule: Schedule
    every: int
    onward: bool
    steps: np.ndarray
    values: np.ndarray

    def now(self, step: Any) -> Any:
        """Whether masks are refreshed at `step`, a boolean of the same kind."""
        begin = getattr(self.schedule, "begin_step", 0)
        regular = (step >= begin) & ((step - begin) % self.every == 0)
        if not self.steps.size:
            return regular
        listed = jnp.asarray(self.steps)[self.index(step)] == step
        return listed | (regular & (step > self.steps[-1])) if self.onward else listed

    def index(self, step: Any) -> Any:
        """Which entry of `values` holds at `step`."""
        if isinstance(step, jax.Array):
            found = jnp.searchsorted(self.steps, step, side="right", method="scan_unrolled")
        else:
            found = np.searchsorted(self.steps, step, side="right")
        return found.clip(1) - 1


def refreshes(
    schedule: Schedule, every: int, *, onward: bool = False, name: str = "schedule"
) -> Refreshes:
    """The steps at which masks are refreshed: every `every` steps, at every jump, and at the end.

    Counted from the schedule's begin. A plain function of the step has neither begin nor end. Where
    the schedule is above 0 before it begins, step 0 is a refresh, too.

    Args:
      schedule: a schedule.
      every: steps between two refreshes, an integer >= 1.
      onward: whether refreshes go on after the schedule's end.
      name: what errors call the schedule.

    Returns:
      A `Refreshes`; `.now(step)` says whether there is one at `step`, traced or not.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind, or the schedule leaves [0, 1).

    Example:
      >>> from sparsejax import schedules
      >>> schedule = schedules.cubic(0.0, 0.9, begin_step=10, end_step=45)
      >>> schedules.refreshes(schedule, every=10).steps
      array([10, 20, 30, 40, 45], dtype=int32)
    """
    _checks.function(name, schedule, "step -> sparsity", "schedules.cubic(0.0, 0.9, 0, 1000)")
    every = _checks.known_step("every", every, 1)
    if not isinstance(schedule, SparsitySchedule) or schedule.end_step is None:
        _probe(name, schedule)
        return Refreshes(schedule, every, True, np.zeros(0, np.int32), np.zeros(0))
    begin, end = schedule.begin_step, schedule.end_step
    before = (0,) if begin > 0 and schedule(0) > 0 else ()
    found = {*before, *range(begin, end, every), *schedule.jumps, end}
    steps = np.array(sorted(found), np.int32)
    values = np.atleast_1d(schedule(steps))
    for step, value in zip(steps, values, strict=True):
        _check_value(name, step, value)
    return Refreshes(schedule, every, onward, steps, values)


def _probe(name: str, schedule: Schedule) -> None:
    """Looks at a function without an end, here and there: traced, it could not be refused."""
    with jax.ensure_compile_time_eval():
        for step in (0, *(10**k for k in range(7))):
            value = float(schedule(jnp.asarray(step, jnp.int32)))
            end = " If training ends before, say so: schedules.cool_down(function, begin_step=...)."
            _check_value(name, step, value, end)


def _check_value(name: str, step: Any, value: Any, hint: str = "") -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must stay in [0, 1) (fractions, not percentages), got {value} at step "
            f"{step}.{hint}"
        )


def _ramp(
    init_value: Scalar, end_value: Scalar, begin_step: int, end_step: int, shape: _Formula
) -> SparsitySchedule:
    """`end + (init - end) shape(1 - t)`, where `shape` is 1 at 1 and 0 at 0: exact at the end."""
    init, target = (
        _checks.known_fraction("init_value", init_value),
        _checks.known_fraction("end_value", end_value),
    )
    begin, end = _interval(begin_step, end_step)

    def formula(xp: Any, step: Any) -> Any:
        rest = xp.clip((end - step) / (end - begin), 0, 1)
        return target + (init - target) * shape(xp, rest)

    return SparsitySchedule(formula, begin, end, (begin, end))


def _lifted(schedule: ScalarOrSchedule) -> SparsitySchedule:
    """A plain function as a schedule without jumps or end."""
    _checks.number_or_schedule("schedule", schedule)
    if not callable(schedule):
        return constant(_checks.known_fraction("schedule", schedule))
    if isinstance(schedule, SparsitySchedule):
        return schedule

    def one(step: Any) -> float:
        with jax.ensure_compile_time_eval():
            return float(schedule(int(step)))

    def formula(xp: Any, t: Any) -> Any:
        return schedule(t) if xp is jnp else np.vectorize(one, otypes=[float])(t)

    return SparsitySchedule(formula, 0, None)


def _interval(begin_step: Any, end_step: Any) -> tuple[int, int]:
    begin, end = (
        _checks.known_step("begin_step", begin_step),
        _checks.known_step("end_step", end_step),
    )
    if begin >= end:
        raise ValueError(
            f"`end_step` must be after `begin_step` = {begin}, got {end}; schedules.one_shot "
            "prunes at one step."
        )
    return begin, end
