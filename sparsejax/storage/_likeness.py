"""Whether a stored leaf is what a leaf of `like` asks for; PRNG keys are stored as their data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _leaves


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys."""
    dtype = _leaves.dtype_of(leaf)
    return dtype is not None and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def as_data(leaf: Any) -> Any:
    """The numbers of PRNG keys; any other leaf, and an abstract one, as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) and not _leaves.is_traced(leaf) else leaf


def as_key(data: Any, like: Any) -> Any:
    """The keys of these data where `like` has some; otherwise the data."""
    if not is_key(like):
        return data
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(data, impl=kinds[0])


def check(path: str, shape: tuple[int, ...], dtype: np.dtype, like: Any) -> None:
    """Refuses a leaf that is not of the shape and dtype of `like`."""
    wanted = jax.eval_shape(jax.random.key_data, like) if is_key(like) else like
    # As `save` has it: a Python number has NumPy's dtype, and bytes are little-endian.
    kind = wanted.dtype if hasattr(wanted, "dtype") else np.asarray(wanted).dtype
    kind = kind.newbyteorder("<") if isinstance(kind, np.dtype) else kind
    if (_leaves.shape_of(wanted), kind) != (shape, dtype):
        there = _leaves.describe(jax.ShapeDtypeStruct(shape, dtype))
        raise ValueError(
            f"`like` must have the file's shapes and dtypes, at {path!r} it is "
            f"{_leaves.describe(like)}, the file has {there}; load without `like`, or save a "
            "converted tree."
        )
