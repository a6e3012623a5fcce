"""Trees bit for bit, PRNG keys included."""

import jax
import jax.numpy as jnp
import numpy as np


def bits(leaf):
    """The bytes of an array, with its dtype and shape; of a key, those of its data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same_bits(got, expected):
    """Refuses other structures, dtypes, shapes or bits, naming the leaves."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    rows = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    different = [jax.tree_util.keystr(p) for (p, a), b in rows if bits(a) != bits(b)]
    assert not different
