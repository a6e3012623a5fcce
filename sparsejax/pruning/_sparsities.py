"""Lists of sparsities: the usual one, and what any of them must be."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparsejax import _checks, _leaves
from sparsejax._typing import Scalar


def geometric(sparsity: Scalar, rounds: int) -> tuple[float, ...]:
    """Sparsities up to `sparsity`, of which each takes the same share of what the last one left.

    The density after round k of n is `(1 - sparsity)^(k / n)`: pruning a fifth of what is left, 15
    times, ends at a sparsity of 1 - 0.8¹⁵ = 0.965, `geometric(1 - 0.8**15, 15)`.

    Args:
      sparsity: the last one, in (0, 1).
      rounds: how many, at least 1.

    Returns:
      Ascending Python floats; the last is `sparsity` itself.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
      >>> from sparsejax import pruning
      >>> [round(s, 3) for s in pruning.geometric(0.875, 3)]  # half of what is left
      [0.5, 0.75, 0.875]

    References:
      S. Han, J. Pool, J. Tran, W. Dally, *Learning both weights and connections for efficient
      neural networks*, NeurIPS 2015, https://arxiv.org/abs/1506.02626, prune iteratively; a fixed
      share is that of J. Frankle and M. Carbin, *The lottery ticket hypothesis: finding sparse,
      trainable neural networks*, ICLR 2019, https://arxiv.org/abs/1803.03635.
    """
    last = _checks.known_fraction("sparsity", sparsity)
    if last == 0:
        raise ValueError("`sparsity` must be > 0, got 0: no round would prune anything.")
    rounds = _checks.known_step("rounds", rounds, 1)
    found = towards(last, rounds)
    if found[0] == 0 or any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(
            "`sparsity` must be far enough from 0 and 1 for floats to tell its rounds apart, got "
            f"{last} in {rounds} rounds; take fewer rounds."
        )
    return found


def towards(last: float, rounds: int) -> tuple[float, ...]:
    """As many sparsities, of which each takes the same share; equal ones where floats end."""
    return (*(1 - (1 - last) ** (k / rounds) for k in range(1, rounds)), last)


def checked(sparsities: Any) -> tuple[float, ...]:
    """The sparsities as Python floats, strictly ascending in [0, 1)."""
    if not isinstance(sparsities, Sequence | np.ndarray | jax.Array) or np.ndim(sparsities) != 1:
        raise TypeError(
            f"`sparsities` must be a list of numbers, got {_leaves.brief(sparsities)}; for one "
            "[0.9], for several pruning.geometric(0.99, 10)."
        )
    found = tuple(_checks.known_fraction("sparsities", s) for s in sparsities)
    if not found or list(found) != sorted(set(found)):
        raise ValueError(
            "`sparsities` must ascend, since what is pruned stays pruned, and be at least one, got "
            f"{_leaves.brief(list(found))}."
        )
    return found
