"""The nouns of the library as types; DESIGN's five nouns, without a framework."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np

Params: TypeAlias = Any
"""A pytree of arrays: dict, list, NamedTuple, NNX state, Equinox module, Haiku or Linen params."""

Scores: TypeAlias = Any
"""A pytree like the params; higher = keep."""

Masks: TypeAlias = Any
"""A pytree like the params; boolean leaves that broadcast against their parameter, True = kept."""

Filter: TypeAlias = Callable[[str, Any], bool]
"""`(path, leaf) -> bool`, with paths such as `"conv1.kernel"` or `"layers.0.weight"`."""

Criterion: TypeAlias = Callable[[Params, Params], Scores]
"""`(params, grads) -> scores`."""

Scalar: TypeAlias = float | int | jax.Array | np.ndarray | np.generic
"""One real number; traced ones are welcome."""

Schedule: TypeAlias = Callable[[Any], Any]
"""Step (optimizer updates done) -> value, as in optax."""

ScalarOrSchedule: TypeAlias = Scalar | Schedule

Strength: TypeAlias = Any
"""λ >= 0: one number, a schedule of it, or a tree like the params of arrays that broadcast."""


@runtime_checkable
class Penalty(Protocol):
    """A value λR(w) and its proximal operator."""

    def at(self, step: Any) -> "Penalty":
        """The penalty whose schedules have been read at `step`."""
        ...

    def value(self, params: Params) -> jax.Array:
        """λR(params), a float32 scalar (float64 if a penalized leaf is)."""
        ...

    def prox(self, params: Params, step_size: Any) -> Params:
        """The u that minimizes λR(u) + Σ (u - params)² / (2 step_size).

        `step_size` is one number, or a tree like the params: the inverse of a diagonal metric,
        which some penalties refuse.
        """
        ...


@runtime_checkable
class SlopedPenalty(Penalty, Protocol):
    """A penalty with a slope everywhere, at its kinks too."""

    def subgradient(self, grads: Params, params: Params) -> Params:
        """The element of least norm of `grads` + ∂λR(params)."""
        ...

    def stop_at_zero(self, updates: Params, subgradient: Params, params: Params) -> Params:
        """`updates`, ending at zero wherever they would cross a kink there."""
        ...
