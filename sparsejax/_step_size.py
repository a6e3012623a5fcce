"""Measures the step size of the optimizer behind a transform from the way the params moved."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from sparsejax import _leaves, _tree
from sparsejax._typing import Params

GOOD_FIT = 0.99
"""Below it the movement is no multiple of the emission: the optimizer is not plain SGD."""

Probe: TypeAlias = tuple[jax.Array, ...]

_PROBE_ENTRIES = 512
# An entry is looked at where it moved by so many roundings, so that each is right to 1.6 %.
_CLEAR_MOVE = 64
# Late in a training, with small steps, a power of two has been measured wrong by 1e-5.
_NEAR_POWER_OF_TWO = 1e-4


class ProxState(NamedTuple):
    """State of `transforms.prox`.

    `step`: updates done. `learning_rate`: the one that the last emission counted on, measured or
    given (0 until known). `measured`: the one of the step before, from which it was foretold.
    `fit`: the share of the params' last movement that a positive multiple of the emission explains,
    in [0, 1]. Behind plain SGD it is 1; below 0.99 the transform emits subgradients and makes no
    zeros. (A handful of entries may move like that by chance, whatever the optimizer.)
    `params_probe`, `emission_probe`: a few entries of every leaf of the last params and of what was
    emitted; empty where the learning rate is given.
    """

    step: jax.Array
    learning_rate: jax.Array
    measured: jax.Array
    fit: jax.Array
    params_probe: Probe
    emission_probe: Probe


def unmeasured(params: Params, probed: bool) -> ProxState:
    """The state before the first update; one buffer a field, so that it can be donated."""
    dtype = scalar_dtype(params)

    def zeros() -> Probe:
        return tuple(jnp.zeros_like(x) for x in probe(params, params)) if probed else ()

    return ProxState(
        step=jnp.zeros((), jnp.int32),
        learning_rate=jnp.zeros((), dtype),
        measured=jnp.zeros((), dtype),
        fit=jnp.zeros((), dtype),
        params_probe=zeros(),
        emission_probe=zeros(),
    )


def scalar_dtype(params: Params) -> Any:
    """The widest dtype of the floating leaves, at least float32."""
    floating = [x for x in jax.tree.leaves(params) if _leaves.is_floating(x)]
    wide = [_leaves.wide_dtype(_leaves.dtype_of(x)) for x in floating]
    return jax.dtypes.canonicalize_dtype(jnp.result_type(jnp.float32, *wide))


def probe(tree: Params, params: Params) -> Probe:
    """A few entries of every floating leaf of `params`, out of `tree`; zeros where it has None."""
    likes = jax.tree.leaves(params)
    pairs = zip(_tree.align("updates", tree, "params", params), likes, strict=True)
    chosen = [(x, like) for x, like in pairs if _leaves.is_floating(like)]
    entries = max(4, _PROBE_ENTRIES // max(len(chosen), 1))
    return tuple(
        _spread(jnp.zeros_like(like) if x is None else _leaves.wide(x), entries)
        for x, like in chosen
    )


def foretell(state: ProxState, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step size to come, that of the last step, and the quality of its fit.

    Where nothing moved clearly, the last answers stand.
    """
    size, error, fit, seen = _measure(state, params)
    # Equal within the error of measurement: the same, so that a constant stays one to the bit. A
    # power of two comes last, lest a coarse first measurement of one stays for good.
    expected, two = state.learning_rate, _nearest_power_of_two(size)
    near = jnp.abs(size - two) <= jnp.minimum(error, _NEAR_POWER_OF_TWO * size)
    size = jnp.where(jnp.abs(size - expected) <= error, expected, size)
    size = jnp.where(near, two, size)
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
    now, rounding = probe(params, params), _rounding(params)
    moved = [a - b for a, b in zip(state.params_probe, now, strict=True)]
    clear = [
        jnp.abs(d) >= _CLEAR_MOVE * eps * jnp.maximum(jnp.abs(a), jnp.abs(b))
        for d, eps, a, b in zip(moved, rounding, state.params_probe, now, strict=True)
    ]
    noises = [eps * jnp.abs(a) for eps, a in zip(rounding, now, strict=True)]
    d, e, noise = (
        [jnp.where(c & (m != 0), x, 0) for c, m, x in zip(clear, moved, column, strict=True)]
        for column in (moved, state.emission_probe, noises)
    )
    d_scale, e_scale = _largest(d, state.fit), _largest(e, state.fit)
    seen = (d_scale > 0) & (e_scale > 0)
    # Scaled to 1, so that squares neither overflow nor vanish.
    d_scale, e_scale = (jnp.where(seen, x, 1) for x in (d_scale, e_scale))
    d, noise, e = ([x / s for x in xs] for xs, s in ((d, d_scale), (noise, d_scale), (e, e_scale)))
    de, dd, ee = _dot(d, e, state.fit), _dot(d, d, state.fit), _dot(e, e, state.fit)
    dd, ee = jnp.where(seen, dd, 1), jnp.where(seen, ee, 1)
    size = de / ee * (d_scale / e_scale)
    fit = jnp.where(de > 0, jnp.square(de) / (ee * dd), 0)
    error = 4 * jnp.sqrt(_dot(noise, noise, state.fit) / dd) * jnp.abs(size)
    return size, error, fit, seen


def _rounding(params: Params) -> list[float]:
    """The relative rounding of one update, leaf by leaf."""
    leaves = [x for x in jax.tree.leaves(params) if _leaves.is_floating(x)]
    return [float(jnp.finfo(jnp.asarray(x).dtype).eps) / 2 for x in leaves]


def _nearest_power_of_two(x: jax.Array) -> jax.Array:
    """By rounding the mantissa away. With such a step size w/s·s is w: zeros are exact at once."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    rounded = (bits + (1 << 22)) & (0xFF << 23)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(x.dtype)


def _spread(x: jax.Array, entries: int) -> jax.Array:
    """About `entries` entries, by strides along every axis: no reshape of a sharded array."""
    if x.ndim == 0 or x.size == 0:
        return x
    strides, left = [], entries
    for axis, dim in enumerate(x.shape):
        wanted = max(1, min(dim, round(left ** (1 / (x.ndim - axis)))))
        strides.append(-(-dim // wanted))
        left = max(1, left // wanted)
    return jax.lax.slice(x, (0,) * x.ndim, x.shape, strides)


def _largest(xs: list[jax.Array], zero: jax.Array) -> jax.Array:
    peaks = [jnp.max(jnp.abs(x), initial=0).astype(zero.dtype) for x in xs]
    return jnp.max(jnp.stack([jnp.zeros_like(zero), *peaks]))


def _dot(xs: list[jax.Array], ys: list[jax.Array], zero: jax.Array) -> jax.Array:
    products = [jnp.sum(x * y).astype(zero.dtype) for x, y in zip(xs, ys, strict=True)]
    return sum(products, jnp.zeros_like(zero))
