"""How long a call takes."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sparsejax import _checks, _leaves

# Rounds that are measured whatever they take, and the most of them.
_FEWEST, _MOST = 3, 1000


def latency(function: Callable[..., Any], *args: Any, seconds: float = 1.0) -> float:
    """The time of one call in seconds, the median of many.

    From the call until its outputs are ready (`jax.block_until_ready`). The first call, which
    compiles, does not count; before every call that is measured stands one that is not, since the
    processor may have been asleep.

    Args:
      function: what is called, with `args`; nothing is compiled here: give it `jax.jit(f)`.
      *args: its arguments; arrays that are where they belong already. They must not be donated.
      seconds: how long to measure; three calls are measured whatever they take, and no more than a
        thousand.

    Returns:
      Seconds.

    Raises:
      TypeError: if `function` cannot be called.
      ValueError: if `seconds` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import reports
      >>> reports.latency(jax.jit(jnp.square), jnp.ones(8), seconds=0.01) > 0
      True
    """
    _checks.function("function", function, "(*args) -> outputs", "jax.jit(model)")
    return latencies({"": function}, *args, seconds=seconds)[""]


def latencies(
    functions: Mapping[str, Callable[..., Any]], *args: Any, seconds: float = 1.0
) -> dict[str, float]:
    """The times of one call of several functions, which take turns.

    As `latency`, but what disturbs one of them disturbs all: in every round each is called, in an
    order of its own. So their ratios mean something on a machine that has other work, too.

    Args:
      functions: by name, functions of the same arguments; `functools.partial(apply, params)` in
        `jax.jit` makes one of a network.
      *args: the arguments of all.
      seconds: how long to measure each, on average.

    Returns:
      By name, the median in seconds.

    Raises:
      TypeError: if `functions` is no mapping of functions.
      ValueError: if `seconds` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import reports
      >>> square, sort = jax.jit(jnp.square), jax.jit(jnp.sort)
      >>> times = reports.latencies({"square": square, "sort": sort}, jnp.ones(8), seconds=0.01)
      >>> list(times)
      ['square', 'sort']
    """
    if not isinstance(functions, Mapping):
        raise TypeError(
            f"`functions` must be a dict of functions by name, got {_leaves.brief(functions)}."
        )
    for name, function in functions.items():
        _checks.function(f"functions[{name!r}]", function, "(*args) -> outputs", "jax.jit(model)")
    _checks.real_number("seconds", seconds)
    if not 0 < seconds < math.inf:
        raise ValueError(f"`seconds` must be > 0 and finite, got {seconds}.")

    def call(name: str) -> float:
        start = time.perf_counter()
        jax.block_until_ready(functions[name](*args))
        return time.perf_counter() - start

    for name in functions:
        call(name)
    names, times = list(functions), {name: list[float]() for name in functions}
    order, end = np.random.default_rng(0), time.perf_counter() + seconds * len(names)
    for turn in range(_MOST):
        if turn >= _FEWEST and time.perf_counter() > end:
            break
        for place in order.permutation(len(names)):
            call(names[place])
            times[names[place]].append(call(names[place]))
    return {name: statistics.median(found) for name, found in times.items()}
