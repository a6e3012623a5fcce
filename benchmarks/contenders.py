"""Who is measured: sparsejax, its peers, and the floor of one read.

`prepare(case)` gives what is timed. Peers that need one vector have it before the clock starts,
though a network's weights are never stored so; only torch's `global_unstructured`, which takes
modules, concatenates by itself.
"""

import functools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import SPARSITY, Case
from jax import lax

from sparsejax import granularities, masking, selection


class Timed(NamedTuple):
    """What is timed; what makes its arguments anew before each round; what the JSON says of it."""

    call: Callable[..., Any]
    setup: Callable[[], tuple[Any, ...]] = tuple
    info: Mapping[str, Any] = MappingProxyType({})


class Contender(NamedTuple):
    """A way to the result."""

    label: str
    prepare: Callable[[Case], Timed]
    slow: bool = False


def compiled(function: Callable[..., Any], *args: Any) -> Timed:
    """A program compiled for these arguments, with its memory and how long compiling took."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    memory = program.memory_analysis()
    info = {
        "lower_s": middle - start,
        "compile_s": end - middle,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }
    return Timed(lambda: jax.block_until_ready(program(*args)), info=info)


def eager(function: Callable[..., Any], *args: Any) -> Timed:
    """A call as a user writes it, without `jit`; what it compiles at first is not timed."""

    def call() -> Any:
        return jax.block_until_ready(function(*args))

    start = time.perf_counter()
    call()
    return Timed(call, info={"first_call_s": time.perf_counter() - start})


# The floor: one read of all scores.


def total(leaves: list[jax.Array]) -> jax.Array:
    """The sum of all scores."""
    return sum(map(jnp.sum, leaves))


def total_by_rows(leaves: list[jax.Array]) -> jax.Array:
    """The same by rows, which XLA can give to every core; a sum to a scalar is one core's."""
    return sum(jnp.sum(jnp.sum(leaf.reshape(16, -1), axis=1)) for leaf in leaves)


FLOOR = [
    Contender("jnp.sum", lambda case: compiled(total, case.leaves)),
    Contender("jnp.sum on every core", lambda case: compiled(total_by_rows, case.leaves)),
]


# The threshold alone: the smallest score that is kept.


def by_sort(flat: jax.Array, keep: int) -> jax.Array:
    """The k-th largest by `jnp.sort`."""
    return jnp.sort(flat)[-keep]


def by_top_k(flat: jax.Array, keep: int) -> jax.Array:
    """The k-th largest by `lax.top_k`."""
    return lax.top_k(flat, keep)[0][-1]


def by_quantile(flat: jax.Array, keep: int) -> jax.Array:
    """An entry near the k-th largest: the position is a float32 number."""
    return jnp.quantile(flat, (flat.size - keep) / (flat.size - 1), method="higher")


def by_partition(flat: np.ndarray, keep: int) -> np.floating:
    """The k-th largest by `np.partition`."""
    return np.partition(flat, flat.size - keep)[-keep]


def _ours(case: Case) -> Callable[..., jax.Array]:
    return functools.partial(selection.kth_largest, k=case.keep)


def _flat_jax(find: Callable[[jax.Array, int], jax.Array]) -> Callable[[Case], Timed]:
    return lambda case: compiled(functools.partial(find, keep=case.keep), jnp.asarray(case.flat))


def _partition(case: Case) -> Timed:
    return Timed(lambda: by_partition(case.flat, case.keep))


def _kthvalue(case: Case) -> Timed:
    torch = _torch()
    flat = torch.from_numpy(case.flat)
    return Timed(lambda: torch.kthvalue(flat, flat.numel() - case.keep + 1).values)


THRESHOLD = [
    Contender("sparsejax in jit", lambda case: compiled(_ours(case), case.leaves)),
    Contender("sparsejax, eager", lambda case: eager(_ours(case), case.leaves)),
    Contender("np.partition", _partition),
    Contender("torch.kthvalue", _kthvalue),
    Contender("jnp.sort", _flat_jax(by_sort), slow=True),
    Contender("lax.top_k", _flat_jax(by_top_k), slow=True),
    Contender("jnp.quantile", _flat_jax(by_quantile), slow=True),
]


# Masks: the threshold, then one comparison with each leaf, which may keep a few ties too many.
# sparsejax and torch's `global_unstructured` keep exactly as many as they should.


def masks(leaves: list[jax.Array]) -> list[jax.Array]:
    """Global masks, as users get them."""
    return masking.topk(leaves, SPARSITY)


def _masks_jax(find: Callable[[jax.Array, int], jax.Array]) -> Callable[[Case], Timed]:
    def prepare(case: Case) -> Timed:
        def program(flat: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
            threshold = find(flat, case.keep)
            return [leaf >= threshold for leaf in leaves]

        return compiled(program, jnp.asarray(case.flat), case.leaves)

    return prepare


def _masks_partition(case: Case) -> Timed:
    def call() -> list[np.ndarray]:
        threshold = by_partition(case.flat, case.keep)
        return [a >= threshold for a in case.arrays]

    return Timed(call)


def _masks_kthvalue(case: Case) -> Timed:
    threshold, torch = _kthvalue(case), _torch()
    tensors = [torch.from_numpy(a) for a in case.arrays]

    def call() -> list[Any]:
        t = threshold.call()
        return [tensor >= t for tensor in tensors]

    return Timed(call)


def _global_unstructured(case: Case) -> Timed:
    torch = _torch()
    from torch.nn.utils import prune

    def setup() -> tuple[list[Any]]:
        modules = []
        for a in case.arrays:
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(torch.from_numpy(a))
            modules.append(module)
        return (modules,)

    def call(modules: list[Any]) -> list[Any]:
        pairs = [(module, "weight") for module in modules]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=SPARSITY)
        return [module.weight_mask for module in modules]

    return Timed(call, setup)


MASKS = [
    Contender("sparsejax in jit", lambda case: compiled(masks, case.leaves)),
    Contender("sparsejax, eager", lambda case: eager(masks, case.leaves)),
    Contender("np.partition", _masks_partition),
    Contender("torch.kthvalue", _masks_kthvalue),
    Contender("torch global_unstructured", _global_unstructured, slow=True),
    Contender("jnp.sort", _masks_jax(by_sort), slow=True),
    Contender("lax.top_k", _masks_jax(by_top_k), slow=True),
    Contender("jnp.quantile", _masks_jax(by_quantile), slow=True),
]


# 2:4, the two highest of every four along an axis.


def nm_masks(leaves: list[jax.Array], axis: int) -> list[jax.Array]:
    """2:4 masks, as users get them."""
    return masking.topk(leaves, granularity=granularities.NM(2, 4, axis=axis))


def nm_by(
    highest: Callable[[jax.Array], jax.Array], leaves: list[jax.Array], axis: int
) -> list[jax.Array]:
    """2:4 masks by what finds the two `highest` entries along the last axis, of length 4."""

    def mask(leaf: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(leaf, axis, -1)
        groups = rows.reshape(*rows.shape[:-1], -1, 4)
        return jnp.moveaxis(highest(groups).reshape(rows.shape), -1, axis)

    return [mask(leaf) for leaf in leaves]


def _by_argsort(groups: jax.Array) -> jax.Array:
    order = jnp.argsort(groups, axis=-1, descending=True)
    return jnp.any(order[..., :2, None] == jnp.arange(4), axis=-2)


def _by_ranks(groups: jax.Array) -> jax.Array:
    ranks = jnp.argsort(jnp.argsort(groups, axis=-1, descending=True), axis=-1)
    return ranks < 2


def _by_top_2(groups: jax.Array) -> jax.Array:
    return jnp.any(lax.top_k(groups, 2)[1][..., None] == jnp.arange(4), axis=-2)


def nm_contenders(axis: int) -> list[Contender]:
    """All of them, for groups along an axis."""

    def contender(
        label: str, prepare: Callable[..., Timed], program: Callable[..., list[jax.Array]]
    ) -> Contender:
        along = functools.partial(program, axis=axis)
        return Contender(label, lambda case: prepare(along, case.leaves))

    return [
        contender("sparsejax in jit", compiled, nm_masks),
        contender("sparsejax, eager", eager, nm_masks),
        contender("argsort per group", compiled, functools.partial(nm_by, _by_argsort)),
        contender("argsort twice per group", compiled, functools.partial(nm_by, _by_ranks)),
        contender("lax.top_k per group", compiled, functools.partial(nm_by, _by_top_2)),
    ]


NM = [(axis, contender) for axis in (-2, -1) for contender in nm_contenders(axis)]


def _torch() -> Any:
    return pytest.importorskip("torch", reason="torch is missing: pip install torch")
