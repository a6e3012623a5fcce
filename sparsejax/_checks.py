"""Checks of arguments before anything is traced, and the one form in which errors speak.

Every message says what is wrong, which constraint it breaks, what was got, where, and how to mend
it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import _leaves


def real_number(name: str, value: Any) -> None:
    """Refuses what is not one real number; a traced one passes."""
    shape, dtype = _leaves.shape_of(value), _leaves.dtype_of(value)
    if shape != () or dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
        got = _leaves.brief(value) if shape is None else _leaves.describe(value)
        raise TypeError(f"`{name}` must be one real number, got {got}.")
    if dtype == np.dtype(bool):
        raise TypeError(f"`{name}` must be one real number, got a boolean: {_leaves.brief(value)}.")
    if not _leaves.is_traced(value) and math.isnan(float(value)):
        raise ValueError(f"`{name}` must be a number, got nan.")


def non_negative(name: str, value: Any, hint: str = "") -> None:
    """Refuses what is not one real number >= 0 (infinity passes); a traced one passes."""
    real_number(name, value)
    if not _leaves.is_traced(value) and float(value) < 0:
        raise ValueError(f"`{name}` must be >= 0, got {value}.{hint and ' ' + hint}")


def scalar_or_schedule(name: str, value: Any, *, positive: bool = False) -> None:
    """Refuses what is neither a finite number >= 0 (or > 0) nor a function of the step."""
    number_or_schedule(name, value)
    if callable(value):
        return
    non_negative(name, value)
    if _leaves.is_traced(value):
        return
    if math.isinf(float(value)):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    if positive and float(value) == 0:
        raise ValueError(f"`{name}` must be > 0, got {value}.")


def non_negative_array(name: str, path: str, leaf: Any) -> None:
    """Refuses an array that is not real, finite and >= 0 everywhere; a traced one passes."""
    if not _leaves.is_number(leaf) or _leaves.dtype_of(leaf) == np.dtype(bool):
        raise TypeError(
            f"`{name}` must hold real numbers, got {_leaves.describe(leaf)} at {path!r}."
        )
    if _leaves.is_traced(leaf):
        return
    wrong = np.asarray(leaf)[~((np.asarray(leaf) >= 0) & np.isfinite(leaf))]
    if wrong.size:
        raise ValueError(f"`{name}` must be finite and >= 0, got {wrong[0]} at {path!r}.")


def fraction(name: str, value: Any) -> None:
    """Refuses what is not in [0, 1)."""
    real_number(name, value)
    if not _leaves.is_traced(value) and not 0 <= float(value) < 1:
        raise ValueError(f"`{name}` must be in [0, 1) (a fraction, not a percentage), got {value}.")


def known_fraction(name: str, value: Any) -> float:
    """A fraction in [0, 1) as a float; refuses a traced one, too."""
    _known(name, value)
    fraction(name, value)
    return float(value)


def known_step(name: str, value: Any, lowest: int = 0) -> int:
    """A number of steps as an int that fits int32; refuses a traced one, too."""
    _known(name, value)
    if isinstance(value, float | np.floating):
        raise TypeError(
            f"`{name}` must be one integer, got {value}; write 3 * steps // 4 for 0.75 * steps."
        )
    integer(name, value)
    if not lowest <= int(value) < 2**31:
        raise ValueError(f"`{name}` must be an integer from {lowest} to 2**31 - 1, got {value}.")
    return int(value)


def number_or_schedule(name: str, value: Any) -> None:
    """Refuses what is neither a number nor a function of the step."""
    if not callable(value) and _leaves.shape_of(value) is None:
        got = _leaves.brief(value)
        raise TypeError(f"`{name}` must be a number or a schedule (step -> number), got {got}.")


def _known(name: str, value: Any) -> None:
    if _leaves.is_traced(value):
        raise TypeError(
            f"`{name}` must be known before tracing, got {_leaves.brief(value)}: schedules count "
            "on the host. Make it a Python number, or a static argument of jit."
        )


def integer(name: str, value: Any) -> None:
    """Refuses what is not one integer (a boolean is none); a traced one passes."""
    dtype = _leaves.dtype_of(value)
    if _leaves.shape_of(value) != () or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`{name}` must be one integer, got {_leaves.brief(value)}.")


def axes(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """One axis or several as numbers from 0; refuses what is out of range or named twice."""
    given = (value,) if isinstance(value, int | np.integer) else value
    if not isinstance(given, tuple | list) or not all(map(_leaves.is_int, given)):
        raise TypeError(f"`{name}` must be an integer or several, got {_leaves.brief(value)}.")
    if rank == 0:
        raise ValueError(f"`{name}` must name axes of an array that has some, got {value}.")
    found = tuple(sorted(int(a) % rank for a in given))
    if any(not -rank <= a < rank for a in given) or len(set(found)) < len(found):
        raise ValueError(
            f"`{name}` must name axes from {-rank} to {rank - 1}, each once, got {value}."
        )
    return found


def choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Refuses what is not one of a few words."""
    if value not in options:
        words = " or ".join(f'"{o}"' for o in options)
        raise ValueError(f"`{name}` must be {words}, got {_leaves.brief(value)}.")


def fits_int32(name: str, entries: int) -> None:
    """Refuses to count so many entries under `jit` that int32 might not hold it."""
    if entries >= 2**31:
        raise ValueError(
            f"`{name}` must count fewer than 2**31 entries under jit, got {entries}, which int32 "
            "cannot hold; call it outside, where counts are Python integers."
        )


def function(name: str, value: Any, signature: str, example: str) -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be a function {signature}, got {_leaves.brief(value)}; "
            f"for example {example}."
        )


def optimizer(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer as a transform that takes extra arguments; refuses what is none."""
    if isinstance(value, optax.MultiSteps):
        value = value.gradient_transformation()
    if not isinstance(value, optax.GradientTransformation):
        hint = " (call it first: optax.adam(1e-3), not optax.adam)" if callable(value) else ""
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation such as optax.adam(1e-3), "
            f"got {_leaves.brief(value)}{hint}."
        )
    return optax.with_extra_args_support(value)


def key(name: str, value: Any) -> None:
    """Refuses what is not one PRNG key, typed or old style; a traced one passes."""
    dtype, shape = _leaves.dtype_of(value), _leaves.shape_of(value)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    raw = dtype == np.dtype(np.uint32) and shape == jax.random.key_data(jax.random.key(0)).shape
    if not (typed or raw):
        raise TypeError(
            f"`{name}` must be a PRNG key such as jax.random.key(0), got {_leaves.brief(value)}."
        )


def state_of(transform: str, state: Any, kind: type) -> None:
    """Refuses the state of another transform."""
    if not isinstance(state, kind):
        raise TypeError(
            f"`{transform}` needs its own state, a {kind.__name__}, got {_leaves.brief(state)}; "
            "pass what its init or its last update returned."
        )


def params_given(transform: str, params: Any) -> None:
    """Refuses a transform's update without params."""
    if params is None:
        raise ValueError(
            f"`{transform}` needs the current parameters: call update(grads, state, params)."
        )


def boolean(path: str, mask: Any) -> None:
    """Refuses a mask that is not a boolean array."""
    if _leaves.shape_of(mask) is None or _leaves.dtype_of(mask) != np.dtype(bool):
        raise TypeError(
            "`masks` must be boolean arrays (True = kept), got "
            f"{_leaves.describe(mask)} at {path!r}; turn numbers into booleans with `masks != 0`."
        )


def broadcasts(path: str, mask: Any, leaf: Any) -> None:
    """Refuses a mask that is not boolean or does not broadcast against its parameter."""
    boolean(path, mask)
    fits("masks", "mask", path, mask, leaf)


def fits(name: str, one: str, path: str, value: Any, leaf: Any) -> None:
    """Refuses an array that does not broadcast against its parameter; `one` is one of `name`."""
    shape, target = _leaves.shape_of(value), _leaves.shape_of(leaf)
    if shape == ():
        return
    if (
        shape is None
        or target is None
        or len(shape) != len(target)
        or any(m not in (1, n) for m, n in zip(shape, target, strict=True))
    ):
        raise ValueError(
            f"`{name}` must broadcast against their parameters: at {path!r} the {one} is "
            f"{_leaves.describe(value)}, the parameter {_leaves.describe(leaf)}; give it the "
            "parameter's shape, or 1 along the axes that it shares, or shape () for the whole leaf."
        )


def same_shape(name: str, path: str, leaf: Any, like_name: str, like: Any) -> None:
    """Refuses a leaf whose shape is not that of its counterpart."""
    if _leaves.shape_of(leaf) != _leaves.shape_of(like):
        raise ValueError(
            f"`{name}` must have the shapes of `{like_name}`: at {path!r} it is "
            f"{_leaves.describe(leaf)}, `{like_name}` is {_leaves.describe(like)}."
        )


# Compiled, so that they read the leaf and write nothing. XLA:CPU counts booleans at a tenth of the
# speed at which it adds floats, and a finite sum has no NaN in it.
@jax.jit
def _sum(leaf: jax.Array) -> jax.Array:
    return jnp.sum(leaf)


@jax.jit
def _count_nan(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jnp.isnan(leaf), dtype=jnp.int32)


def no_nan(
    name: str,
    path: str,
    leaf: Any,
    *,
    of: str = "entries",
    hint: str = "Look for a division by zero or an overflow in the loss that gave them.",
) -> None:
    """Refuses NaN where it can be seen; a traced leaf passes."""
    if _leaves.is_traced(leaf):
        return
    # Also where another function is traced, and this leaf is a constant of it.
    with jax.ensure_compile_time_eval():
        count = 0 if math.isfinite(float(_sum(leaf))) else int(_count_nan(leaf))
    if count:
        raise ValueError(
            f"`{name}` must not be NaN: {count} of {np.size(leaf)} {of} are, at {path!r}. {hint}"
        )
