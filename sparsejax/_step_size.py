"""Measures the step size of the optimizer behind a transform from the way the params moved."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import _leaves
from sparsejax._typing import Params

GOOD_FIT = 0.99
"""Below it the movement is no multiple of the emission: the optimizer is not plain SGD."""

_PROBE_ENTRIES = 512


class ProxState(NamedTuple):
    """State of `transforms.prox`. A good `fit` means that the optimizer behind is plain SGD.

    `step`: updates done. `learning_rate`: the one that the last emission counted on, measured or
    given (0 until known). `measured`: the one of the step before, from which it was foretold.
    `fit`: the share of the params' last movement that a multiple of the emission explains, in [0,
    1]; below 0.99 the transform emits subgradients and makes no zeros. `params_probe`,
    `emission_probe`: a few entries of the last params and of what was emitted; empty where the
    learning rate is given.
    """

    step: jax.Array
    learning_rate: jax.Array
    measured: jax.Array
    fit: jax.Array
    params_probe: jax.Array
    emission_probe: jax.Array


def unmeasured(entries: int) -> ProxState:
    """The state before the first update; one buffer a field, so that it can be donated."""
    shapes = ((), (), (), (entries,), (entries,))
    return ProxState(jnp.zeros((), jnp.int32), *(jnp.zeros(s, jnp.float32) for s in shapes))


def foretell(state: ProxState, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step size to come, that of the last step, and the quality of its fit.

    Where nothing was emitted, or the params moved by less than their rounding lets one see, the
    last answers stand.
    """
    size, error, fit, seen = _measure(state, params)
    # Equal within the error of measurement: the same, so that a constant stays one to the bit.
    expected, two = state.learning_rate, _nearest_power_of_two(size)
    size = jnp.where(jnp.abs(size - two) <= jnp.minimum(error, 1e-5 * size), two, size)
    size = jnp.where(jnp.abs(size - expected) <= error, expected, size)
    # A schedule goes on as it went; a jump, or the first measurement, foretells nothing.
    ahead = 2 * size - state.measured
    steady = (state.measured > 0) & (ahead > size / 4) & (ahead < 2 * size)
    return (
        jnp.where(seen, jnp.where(steady, ahead, size), expected),
        jnp.where(seen, size, state.measured),
        jnp.where(seen, fit, state.fit),
    )


def _measure(state: ProxState, params: Params) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Least squares of `last params - params = size * last emission`: size, error, fit, seen."""
    moved = state.params_probe - probe(params)
    emitted = state.emission_probe
    rounding = probe(jax.tree.map(_rounding, params))
    moved_scale, emitted_scale = _largest(moved), _largest(emitted)
    seen = (moved_scale > 0) & (emitted_scale > 0)
    # Scaled to 1, so that squares neither overflow nor vanish.
    moved_scale, emitted_scale = (jnp.where(seen, x, 1) for x in (moved_scale, emitted_scale))
    d, e = moved / moved_scale, emitted / emitted_scale
    de, dd, ee = jnp.vdot(d, e), jnp.vdot(d, d), jnp.where(seen, jnp.vdot(e, e), 1)
    noise = jnp.sum(jnp.square(rounding / moved_scale)) / jnp.where(seen, dd, 1)
    size = de / ee * (moved_scale / emitted_scale)
    fit = jnp.square(de) / (ee * jnp.where(seen, dd, 1))
    return size, 4 * jnp.sqrt(noise) * size, fit, seen & (noise < 1 - GOOD_FIT)


def _nearest_power_of_two(x: jax.Array) -> jax.Array:
    """By rounding the mantissa away. With such a step size w/s·s is w: zeros are exact at once."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + (1 << 22)) & (0xFF << 23), jnp.float32)


def probe(tree: Params) -> jax.Array:
    """A few entries of every floating leaf, spread over its axes, as one float32 vector."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if _leaves.is_floating(x)]
    if not leaves:
        return jnp.zeros(0)
    each = max(4, _PROBE_ENTRIES // len(leaves))
    return jnp.concatenate([_spread(x, each).astype(jnp.float32) for x in leaves])


def _spread(x: jax.Array, entries: int) -> jax.Array:
    """About `entries` entries, by strides along every axis: no reshape of a sharded array."""
    if x.ndim == 0 or x.size == 0:
        return x.reshape(-1)
    strides, left = [], entries
    for axis, dim in enumerate(x.shape):
        wanted = max(1, min(dim, round(left ** (1 / (x.ndim - axis)))))
        strides.append(-(-dim // wanted))
        left = max(1, left // wanted)
    return jax.lax.slice(x, (0,) * x.ndim, x.shape, strides).reshape(-1)


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), initial=0)


def _rounding(leaf: Any) -> Any:
    """How far the rounding of one update may move each entry."""
    if not _leaves.is_floating(leaf):
        return leaf
    x = jnp.asarray(leaf)
    return _leaves.wide(x) * (jnp.finfo(x.dtype).eps / 2)
