"""Fits at all strengths in one program, on one device or several."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax import _leaves, _tree
from sparsejax._form import Form
from sparsejax.paths._fits import Fit


def fit_all(
    fit: Fit, form: Form, strengths: jax.Array, keys: Any, arrays: Sequence[Any], data: Any
) -> list[jax.Array]:
    """The arrays of a fit at each strength, along a new first axis; all begin at `arrays`."""

    def one(strength: jax.Array, key: Any) -> list[jax.Array]:
        return form.taken(fit(strength, form.filled(arrays), data, key))

    return jax.vmap(one)(strengths, keys)


def fit_spread(
    fit: Fit,
    form: Form,
    strengths: jax.Array,
    keys: Any,
    data: Any,
    devices: Sequence[jax.Device],
) -> list[jax.Array]:
    """`fit_all`, an equal share of strengths a device; the last one fills the rest up."""
    mesh = Mesh(np.array(devices), ("strengths",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("strengths",), ()))
    n = len(strengths)
    indices = np.minimum(np.arange(-(-n // len(devices)) * len(devices)), n - 1)
    flat = _tree.flatten(data)
    arrays = [x for x in flat.leaves if isinstance(x, jax.Array | np.ndarray)]

    def share(strengths: jax.Array, keys: Any, start: Any, arrays: Any) -> list[jax.Array]:
        given = iter(arrays)
        leaves = [next(given) if isinstance(x, jax.Array | np.ndarray) else x for x in flat.leaves]
        return fit_all(fit, form, strengths, keys, start, flat.rebuild(leaves))

    # A loop of its own on each device: under automatic sharding all would wait for the slowest, at
    # every step. What a loop carries begins alike everywhere and ends different: hence no check.
    program = jax.jit(
        jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(split.spec, split.spec, whole.spec, whole.spec),
            out_specs=split.spec,
            check_vma=False,
        )
    )
    spread = jax.device_put((strengths[indices], None if keys is None else keys[indices]), split)
    return [x[:n] for x in program(*spread, *jax.device_put((form.arrays, arrays), whole))]


def check_devices(devices: Any) -> None:
    """Refuses what is no list of devices; none at all is where the arrays are."""
    if devices is None:
        return
    if not isinstance(devices, Sequence) or not all(isinstance(d, jax.Device) for d in devices):
        raise TypeError(
            f"`devices` must be a list of devices such as jax.devices(), got "
            f"{_leaves.brief(devices)}."
        )
    if not devices:
        raise ValueError("`devices` must be at least one, got an empty list; None: where data are.")
