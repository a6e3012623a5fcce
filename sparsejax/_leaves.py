"""What a leaf of a pytree is: its shape, its dtype, its kind; and its value in wide precision."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(*values: Any) -> bool:
    """Whether any value is abstract, so that its content cannot be looked at."""
    return any(isinstance(v, jax.core.Tracer | jax.ShapeDtypeStruct) for v in values)


def is_int(value: Any) -> bool:
    """Whether a value is one Python or NumPy integer; a boolean is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


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


def brief(value: Any) -> str:
    """The start of a value's repr, for errors: a whole tree of params would bury the message."""
    first, *rest = repr(value).splitlines() or [""]
    return f"{first[:80]}..." if rest or len(first) > 80 else first


def wide_dtype(dtype: Any) -> Any:
    """float32 for narrower floats (float8 included, which JAX does not promote), else itself."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else jnp.dtype(dtype)


def wide(leaf: Any) -> jax.Array:
    """A floating leaf as an array of at least float32: half precisions lose small steps."""
    array = jnp.asarray(leaf)
    return array.astype(wide_dtype(array.dtype))
