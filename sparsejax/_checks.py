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


def is_traced(*values: Any) -> bool:
    """Whether any value is abstract, so that its content cannot be looked at."""
    return any(isinstance(v, jax.core.Tracer | jax.ShapeDtypeStruct) for v in values)


def shape_of(leaf: Any) -> tuple[int, ...] | None:
    """The shape of an array-like leaf (a Python number has shape `()`), None for anything else."""
    if isinstance(leaf, bool | int | float | complex):
        return ()
    shape = getattr(leaf, "shape", None)
    return shape if isinstance(shape, tuple) and hasattr(leaf, "dtype") else None


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array-like leaf (that JAX gives a Python number), None for anything else."""
    if shape_of(leaf) is None:
        return None
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_number(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers or booleans (a PRNG key and float0 are not)."""
    dtype = dtype_of(leaf)
    return dtype is not None and bool(
        jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    )


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating numbers."""
    dtype = dtype_of(leaf)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is an array of floating or complex numbers."""
    dtype = dtype_of(leaf)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def describe(leaf: Any) -> str:
    """`float32[3,3,1,32]` for arrays, the type's name for anything else."""
    shape = shape_of(leaf)
    if shape is None:
        return type(leaf).__name__
    return f"{dtype_of(leaf)}[{','.join(map(str, shape))}]"


def real_number(name: str, value: Any) -> None:
    """Refuses what is not one real number; a traced one passes."""
    shape, dtype = shape_of(value), dtype_of(value)
    if shape != () or dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
        got = repr(value) if shape is None else describe(value)
        raise TypeError(f"`{name}` must be one real number, got {got}.")
    if dtype == np.dtype(bool):
        raise TypeError(f"`{name}` must be one real number, got a boolean: {value!r}.")
    if not is_traced(value) and math.isnan(float(value)):
        raise ValueError(f"`{name}` must be a number, got nan.")


def non_negative(name: str, value: Any, hint: str = "") -> None:
    """Refuses what is not one real number >= 0 (infinity passes); a traced one passes."""
    real_number(name, value)
    if not is_traced(value) and float(value) < 0:
        raise ValueError(f"`{name}` must be >= 0, got {value}.{hint and ' ' + hint}")


def scalar_or_schedule(name: str, value: Any, *, positive: bool = False) -> None:
    """Refuses what is neither a finite number >= 0 (or > 0) nor a function of the step."""
    if callable(value):
        return
    if shape_of(value) is None:
        raise TypeError(f"`{name}` must be a number or a schedule (step -> number), got {value!r}.")
    non_negative(name, value)
    if is_traced(value):
        return
    if math.isinf(float(value)):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    if positive and float(value) == 0:
        raise ValueError(f"`{name}` must be > 0, got {value}.")


def fraction(name: str, value: Any) -> None:
    """Refuses what is not in [0, 1)."""
    real_number(name, value)
    if not is_traced(value) and not 0 <= float(value) < 1:
        raise ValueError(f"`{name}` must be in [0, 1) (a fraction, not a percentage), got {value}.")


def choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Refuses what is not one of a few words."""
    if value not in options:
        words = " or ".join(f'"{o}"' for o in options)
        raise ValueError(f"`{name}` must be {words}, got {value!r}.")


def function(name: str, value: Any, signature: str, example: str) -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be a function {signature}, got {value!r}; for example {example}."
        )


def optimizer(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer as a transform that takes extra arguments; refuses what is none."""
    if isinstance(value, optax.MultiSteps):
        value = value.gradient_transformation()
    if not isinstance(value, optax.GradientTransformation):
        hint = " (call it first: optax.adam(1e-3), not optax.adam)" if callable(value) else ""
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation such as optax.adam(1e-3), "
            f"got {value!r}{hint}."
        )
    return optax.with_extra_args_support(value)


def params_given(transform: str, params: Any) -> None:
    """Refuses a transform's update without params."""
    if params is None:
        raise ValueError(
            f"`{transform}` needs the current parameters: call update(grads, state, params)."
        )


def boolean(path: str, mask: Any) -> None:
    """Refuses a mask that is not a boolean array."""
    if shape_of(mask) is None or dtype_of(mask) != np.dtype(bool):
        raise TypeError(
            f"`masks` must be boolean arrays (True = kept), got {describe(mask)} at {path!r}; "
            "turn numbers into booleans with `masks != 0`."
        )


def broadcasts(path: str, mask: Any, leaf: Any) -> None:
    """Refuses a mask that is not boolean or does not broadcast against its parameter."""
    boolean(path, mask)
    shape, target = shape_of(mask), shape_of(leaf)
    if shape == ():
        return
    if (
        shape is None
        or target is None
        or len(shape) != len(target)
        or any(m not in (1, n) for m, n in zip(shape, target, strict=True))
    ):
        raise ValueError(
            f"`masks` must broadcast against their parameters: at {path!r} the mask is "
            f"{describe(mask)}, the parameter {describe(leaf)}; give it the parameter's shape, "
            "or 1 along the axes that it shares, or shape () for the whole leaf."
        )


def same_shape(name: str, path: str, leaf: Any, like_name: str, like: Any) -> None:
    """Refuses a leaf whose shape is not that of its counterpart."""
    if shape_of(leaf) != shape_of(like):
        raise ValueError(
            f"`{name}` must have the shapes of `{like_name}`: at {path!r} it is {describe(leaf)}, "
            f"`{like_name}` is {describe(like)}."
        )


def no_nan(name: str, path: str, leaf: Any) -> None:
    """Refuses NaN where it can be seen; a traced leaf passes."""
    if is_traced(leaf):
        return
    count = int(jnp.sum(jnp.isnan(leaf)))
    if count:
        raise ValueError(
            f"`{name}` must not be NaN: {count} of {np.size(leaf)} entries are, at {path!r}. "
            "Look for a division by zero or an overflow in the loss that gave them."
        )
