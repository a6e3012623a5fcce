"""Distillation: how far a student's outputs are from a teacher's, and a loss that includes it.

A distance is a function `(student outputs, teacher outputs) -> scalar`: `logits` of what a network
says, `features` and `attention` of what it computes on the way. `distilled` adds one to any loss.
The teacher may be a larger network, or the dense network from which the pruned one was made
(self-distillation).

Distances are computed in float32, or wider if the outputs are. They are functions of both of their
arguments; `distilled` lets no gradient pass to the teacher.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves, _tree
from sparsejax._typing import Params, Scalar

Outputs: TypeAlias = Any
"""What a network gives for a batch: an array whose first axis counts examples, or a pytree."""

Distance: TypeAlias = Callable[[Outputs, Outputs], jax.Array]
"""`(student outputs, teacher outputs) -> scalar`."""

Loss: TypeAlias = Callable[[Params, Any], Any]
"""`(params, batch) -> scalar`."""


def logits(student: Any, teacher: Any, *, temperature: Scalar = 1.0) -> jax.Array:
    """Measures T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over the examples.

    The teacher's probabilities say which wrong classes are nearly right. A temperature T above 1
    makes more of them; T² keeps the gradient's size: for large T the distance is that of the logits
    themselves, `Σ (s - t)² / 2K` over K classes, where each has its mean over the classes taken
    away.

    Args:
      student: logits (..., classes), floating; the mean is over all axes but the last.
      teacher: logits of the same shape.
      temperature: T, finite and > 0, one number for both; may be traced.

    Returns:
      The distance, >= 0, in nats (times T²). A class that the teacher rules out (a logit of -inf)
      adds nothing, whatever the student says of it; one that only the student rules out makes the
      distance infinite. NaN gives NaN.

    Raises:
      TypeError: if logits are no floating arrays, or the temperature is not one real number.
      ValueError: if shapes differ, if there is no example or class, or the temperature is out of
        range.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import distillation
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, jnp.log(3.0)]])
      >>> distillation.logits(student, teacher)  # log 2 - H(1/4, 3/4)
      Array(0.13081..., dtype=float32)
      >>> from functools import partial
      >>> warm = partial(distillation.logits, temperature=4.0)  # a distance for `distilled`

    References:
      G. Hinton, O. Vinyals, J. Dean, *Distilling the knowledge in a neural network*, NeurIPS
      workshop 2014, https://arxiv.org/abs/1503.02531; there the cross-entropy, whose gradient is
      that of the divergence, and which is not 0 where both agree.
    """
    _check_logits("student", student)
    _check_logits("teacher", teacher)
    _checks.same_shape("teacher", ".", teacher, "student", student)
    _check_temperature(temperature)
    return _softened_divergence(student, teacher, temperature)


def features(student: Outputs, teacher: Outputs) -> jax.Array:
    """Measures the mean of (s - t)² over all entries: what both compute on the way, such as hints.

    Where the student's layer is narrower than the teacher's, project it first: with a matrix that
    is trained together with the student and thrown away afterwards.

    Args:
      student: a floating array, or a pytree of several, of any shape.
      teacher: a tree of the same structure and shapes.

    Returns:
      The distance, >= 0; of several arrays the sum of their means.

    Raises:
      TypeError: if a leaf is no floating array.
      ValueError: if structure or shapes differ, with the leaf's path, or if there is no entry.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import distillation
      >>> narrow, wide = jnp.ones((5, 2)), jnp.zeros((5, 3))
      >>> projection = jnp.ones((2, 3))  # one of the student's params
      >>> distillation.features(narrow @ projection, wide)
      Array(4., dtype=float32)

    References:
      A. Romero, N. Ballas, S. Ebrahimi Kahou, A. Chassang, C. Gatta, Y. Bengio, *FitNets: hints for
      thin deep nets*, ICLR 2015, https://arxiv.org/abs/1412.6550; there half the sum over the
      entries of an example, which grows with the layer, and a first stage of training alone.
    """
    distance = jnp.zeros(())
    for path, ours, theirs in _pairs(student, teacher):
        _checks.same_shape("teacher", path, theirs, "student", ours)
        distance += jnp.mean((_leaves.wide(ours) - _leaves.wide(theirs)) ** 2)
    return distance


def attention(student: Outputs, teacher: Outputs, *, power: Scalar = 2) -> jax.Array:
    """Measures how differently two networks spread their activation over the places of an image.

    An attention map is `Σ_c |a_c|^power` over the channels c, divided by its Euclidean norm; the
    distance is the mean squared difference of the two maps over examples and places. Where two
    networks look at the same places, numbers of channels and scales may differ.

    Args:
      student: activations (examples, places ..., channels), at least one axis of places (an image
        has two, a sequence one), or a pytree of several.
      teacher: a tree of the same structure and shapes, but for the channels.
      power: >= 1; the larger, the more the strongest channel counts; may be traced.

    Returns:
      The distance, >= 0; of several arrays the sum of theirs. Over n places it is at most 2/n. The
      map of an example without any activation is 0, and so is its gradient.

    Raises:
      TypeError: if a leaf is no floating array, or the power not one real number.
      ValueError: if structure or shapes differ, with the leaf's path, if there is no entry or no
        axis of places, or if the power is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import distillation
      >>> one_channel = jnp.array([[[3.0], [0.0]]])  # one example, two places: map (1, 0)
      >>> two_channels = jnp.array([[[0.0, 0.0], [1.0, 1.0]]])  # map (0, 1)
      >>> distillation.attention(one_channel, two_channels)
      Array(1., dtype=float32)

    References:
      S. Zagoruyko, N. Komodakis, *Paying more attention to attention: improving the performance of
      convolutional neural networks via attention transfer*, ICLR 2017,
      https://arxiv.org/abs/1612.03928. As in its code, squares and their mean, where the paper has
      the norm of the difference; so the weight is of the size that the code's β has.
    """
    _check_power(power)
    distance = jnp.zeros(())
    for path, ours, theirs in _pairs(student, teacher):
        _check_maps(path, ours, theirs)
        distance += jnp.mean((_attention_map(ours, power) - _attention_map(theirs, power)) ** 2)
    return distance


def distilled(
    loss: Loss,
    student: Callable[[Params, Any], Outputs],
    teacher: Callable[[Any], Outputs],
    *,
    weight: Scalar = 0.5,
    distance: Distance = logits,
) -> Loss:
    """A loss that also pulls the student's outputs to the teacher's.

    `(1 - weight) · loss(params, batch) + weight · distance(student(params, batch), teacher(batch))`

    No gradient passes to the teacher. A part whose weight is exactly 0 does not count, not even
    where it or its gradient is infinite or NaN.

    Any loss will do, also one that evaluates the network itself; but then, though the compiled
    program evaluates it once, it is differentiated twice: 1.6 times the cost of a step.
    `distilled_outputs` does it once.

    Args:
      loss: `(params, batch) -> scalar`, such as the cross-entropy with the labels.
      student: `(params, batch) -> outputs`, of the network that is trained.
      teacher: `batch -> outputs`. It may evaluate another network, or the same with other params
        (under `jit` those it closes over become constants of the program), or look up in the batch
        what was evaluated before: `lambda batch: batch["teacher"]`.
      weight: a number in [0, 1]; may be traced.
      distance: `(student outputs, teacher outputs) -> scalar`. For a temperature,
        `functools.partial(logits, temperature=4.0)`.

    Returns:
      A loss `(params, batch) -> scalar`, for `jax.grad` and for everything that takes one.

    Raises:
      TypeError: if a function cannot be called, if the weight is not one real number, or (when the
        loss is called) if `loss` or `distance` give no real scalar.
      ValueError: if the weight is not in [0, 1].

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax
      >>> from sparsejax import distillation
      >>> def network(params, batch):
      ...     return batch["x"] @ params
      >>> def loss(params, batch):
      ...     logits = network(params, batch)
      ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
      >>> dense, pruned = jnp.array([[2.0, -0.1], [0.3, 1.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> batch = {"x": jnp.array([[1.0, 2.0]]), "y": jnp.array([0])}
      >>> both = distillation.distilled(
      ...     loss, network, lambda batch: network(dense, batch), weight=0.9,
      ...     distance=functools.partial(distillation.logits, temperature=4.0))
      >>> both(pruned, batch)
      Array(0.12422..., dtype=float32)
      >>> jax.grad(both)(pruned, batch).shape
      (2, 2)

      Distances add up where outputs are trees:

      >>> def distance(student, teacher):
      ...     return (distillation.logits(student["logits"], teacher["logits"])
      ...             + 10 * distillation.attention(student["maps"], teacher["maps"]))
    """
    _checks.function("loss", loss, "(params, batch) -> scalar", "the cross-entropy")
    _checks.function("student", student, "(params, batch) -> outputs", "an apply function")
    _check_common(teacher, weight, distance)
    share: Any = weight

    def combined(params: Params, batch: Any) -> jax.Array:
        own = loss(_where_weighted(1 - share, params), batch)
        return _mixed(own, student(params, batch), teacher(batch), share, distance)

    return combined


def distilled_outputs(
    loss: Callable[[Outputs, Any], Any],
    teacher: Callable[[Any], Outputs],
    *,
    weight: Scalar = 0.5,
    distance: Distance = logits,
) -> Callable[[Outputs, Any], jax.Array]:
    """A loss of the student's outputs that also pulls them to the teacher's.

    `(1 - weight) · loss(outputs, batch) + weight · distance(outputs, teacher(batch))`

    What `distilled` gives, where the loss is one of the outputs: a step costs what it does without
    a teacher, and the teacher's evaluation. As there, a part whose weight is exactly 0 does not
    count.

    Args:
      loss: `(outputs, batch) -> scalar`, such as the cross-entropy of logits with the labels.
      teacher: `batch -> outputs`, as in `distilled`; no gradient passes to it.
      weight: a number in [0, 1]; may be traced.
      distance: `(student outputs, teacher outputs) -> scalar`.

    Returns:
      A loss `(outputs, batch) -> scalar`.

    Raises:
      TypeError: if a function cannot be called, if the weight is not one real number, or (when the
        loss is called) if `loss` or `distance` give no real scalar.
      ValueError: if the weight is not in [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparsejax import distillation
      >>> def cross_entropy(logits, batch):
      ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
      >>> of_outputs = distillation.distilled_outputs(
      ...     cross_entropy, lambda batch: batch["teacher"], weight=0.9)
      >>> def loss(params, batch):
      ...     return of_outputs(batch["x"] @ params, batch)
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([0, 1]), "teacher": jnp.eye(2)}
      >>> loss(jnp.eye(2), batch)  # the student is the teacher: a tenth of the cross-entropy
      Array(0.03132..., dtype=float32)
    """
    _checks.function("loss", loss, "(outputs, batch) -> scalar", "the cross-entropy")
    _check_common(teacher, weight, distance)
    share: Any = weight

    def combined(outputs: Outputs, batch: Any) -> jax.Array:
        own = loss(_where_weighted(1 - share, outputs), batch)
        return _mixed(own, outputs, teacher(batch), share, distance)

    return combined


def _mixed(
    own: Any, student: Outputs, teacher: Outputs, weight: Any, distance: Distance
) -> jax.Array:
    _check_scalar("loss", own)
    between = distance(_where_weighted(weight, student), jax.lax.stop_gradient(teacher))
    _check_scalar("distance", between)
    return _weighted(1 - weight, own) + _weighted(weight, between)


def _weighted(weight: Any, value: Any) -> jax.Array:
    """The product, in which 0 · ∞ is 0; the derivative by the weight is the value if finite."""
    return weight * jnp.where((weight == 0) & ~jnp.isfinite(value), 0, value)


def _where_weighted(weight: Any, tree: Any) -> Any:
    """The tree, through which no gradient passes at weight 0: there it may be 0 · ∞."""
    if not _leaves.is_traced(weight) and weight != 0:
        return tree
    return jax.tree.map(
        lambda x: (
            jnp.where(weight == 0, jax.lax.stop_gradient(x), x) if _leaves.is_inexact(x) else x
        ),
        tree,
    )


def _softened_divergence(student: Any, teacher: Any, temperature: Any) -> jax.Array:
    ours = _log_probabilities(student, temperature)
    theirs = _log_probabilities(teacher, temperature)
    weights = jnp.exp(theirs)
    # 0 · ∞ is 0 here, and so is its derivative.
    gaps = jnp.where(weights == 0, 0, theirs - ours)
    return temperature**2 * jnp.mean(jnp.sum(weights * gaps, axis=-1))


def _log_probabilities(logits: Any, temperature: Any) -> jax.Array:
    wide = _leaves.wide(logits)
    ruled_out = wide == -jnp.inf
    # Not -∞ / T: its derivative by T is NaN times 0.
    tempered = jnp.where(ruled_out, 0, wide) / temperature
    return jax.nn.log_softmax(jnp.where(ruled_out, -jnp.inf, tempered))


def _attention_map(activations: Any, power: Any) -> jax.Array:
    """Unit vectors (examples, places ...), or 0 where nothing is active."""
    wide = _leaves.wide(activations)
    others = tuple(range(1, wide.ndim))
    # The map does not depend on the scale: without one no power over- or underflows.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=others, keepdims=True))
    # Not jnp.abs, whose derivative at 0 is 1.
    unit = wide * jnp.sign(wide) / jnp.where(scale == 0, 1, scale)
    summed = jnp.sum(unit**power, axis=-1)
    square = jnp.sum(summed**2, axis=others[:-1], keepdims=True)
    return summed / jnp.sqrt(jnp.where(square == 0, 1, square))


def _pairs(student: Outputs, teacher: Outputs) -> list[tuple[str, Any, Any]]:
    """The leaves of both, by path; refuses what is no floating array, and nothing at all."""
    flat = _tree.flatten(student)
    theirs = _tree.align("teacher", teacher, "student", student)
    pairs = list(zip(flat.paths, flat.leaves, theirs, strict=True))
    for path, *both in pairs:
        for name, leaf in zip(("student", "teacher"), both, strict=True):
            if not _leaves.is_floating(leaf):
                raise TypeError(
                    f"`{name}` must hold floating arrays, got {_leaves.describe(leaf)} at {path!r}."
                )
            if 0 in np.shape(leaf):
                raise ValueError(
                    f"`{name}` must have entries, got {_leaves.describe(leaf)} at {path!r}."
                )
    if not pairs:
        raise ValueError(f"`student` must hold at least one array, got {_leaves.brief(student)}.")
    return pairs


def _check_maps(path: str, ours: Any, theirs: Any) -> None:
    if np.ndim(ours) < 3 or np.shape(ours)[:-1] != np.shape(theirs)[:-1]:
        raise ValueError(
            "`student` and `teacher` must have the same shape (examples, places ..., channels) but "
            f"for the channels, got {_leaves.describe(ours)} and {_leaves.describe(theirs)} at "
            f"{path!r}; channels stand last, and resize the larger image."
        )


def _check_power(value: Any) -> None:
    _checks.real_number("power", value)
    if not _leaves.is_traced(value) and not 1 <= float(value) < math.inf:
        raise ValueError(f"`power` must be finite and >= 1, got {value}.")


def _check_logits(name: str, value: Any) -> None:
    if not _leaves.is_floating(value):
        got = _leaves.brief(value) if _leaves.shape_of(value) is None else _leaves.describe(value)
        raise TypeError(f"`{name}` must be a floating array (..., classes) of logits, got {got}.")
    if np.ndim(value) == 0 or 0 in np.shape(value):
        raise ValueError(
            f"`{name}` must have a last axis of classes, and at least one example and class, got "
            f"{_leaves.describe(value)}."
        )


def _check_common(teacher: Any, weight: Any, distance: Any) -> None:
    _checks.function(
        "teacher", teacher, "batch -> outputs", "lambda batch: apply_fn(dense_params, batch)"
    )
    _checks.function(
        "distance", distance, "(student outputs, teacher outputs) -> scalar", "distillation.logits"
    )
    _checks.real_number("weight", weight)
    if not _leaves.is_traced(weight) and not 0 <= float(weight) <= 1:
        raise ValueError(f"`weight` must be in [0, 1], the distance's share, got {weight}.")


def _check_temperature(value: Any) -> None:
    _checks.real_number("temperature", value)
    if not _leaves.is_traced(value) and not 0 < float(value) < math.inf:
        raise ValueError(f"`temperature` must be finite and > 0, got {value}.")


def _check_scalar(name: str, value: Any) -> None:
    if _leaves.shape_of(value) != () or not _leaves.is_floating(value):
        got = _leaves.brief(value) if _leaves.shape_of(value) is None else _leaves.describe(value)
        raise TypeError(
            f"`{name}` must return one real number, got {got}; take the mean over the examples."
        )
