"""What the library should answer, in NumPy; and arrays full of what is awkward to compare."""

import functools

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

FLOATS = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float16))


def keep_largest(arrays, keep):
    """Masks of the `keep` largest entries by a stable sort: ties by index, NaN lowest."""
    arrays = [np.asarray(a) for a in arrays]
    flat = np.concatenate([a.ravel().astype(np.float64) for a in arrays])
    nan = np.isnan(flat)
    order = np.lexsort((-flat, nan))
    mask = np.zeros(flat.size, bool)
    mask[order[:keep]] = True
    ends = np.cumsum([a.size for a in arrays])[:-1]
    return [m.reshape(a.shape) for m, a in zip(np.split(mask, ends), arrays, strict=True)]


@functools.cache
def awkward(dtype):
    """Zeros, denormals, neighbours of 1, extremes, infinities and NaN, with both signs."""
    info = jnp.finfo(dtype)
    one = np.ones((), dtype)
    positive = [
        np.zeros((), dtype),
        info.smallest_subnormal,
        info.smallest_subnormal * dtype.type(3),
        info.smallest_normal,
        one - info.epsneg,
        one,
        one + info.eps,
        dtype.type(2.5),
        info.max,
        dtype.type(np.inf),
        dtype.type(np.nan),
    ]
    values = np.array(positive).astype(dtype)
    return np.concatenate([values, -values])


def awkward_arrays(shape, dtype, *, nan=True):
    """Arrays of awkward values; so few that most of them tie."""
    values = awkward(np.dtype(dtype))
    if not nan:
        values = values[~np.isnan(values)]
    size = int(np.prod(shape))
    indices = st.lists(st.integers(0, len(values) - 1), min_size=size, max_size=size)
    return indices.map(lambda i: values[np.array(i, int)].reshape(shape))
