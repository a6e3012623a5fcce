"""When which share is pruned, and with which weights and which learning rate training goes on."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import jax
import numpy as np

from sparsejax import _checks, criteria, filters
from sparsejax._typing import Filter, Params, Scalar
from sparsejax.allocation import Allocation
from sparsejax.granularities import NM, Granularity, Unstructured
from sparsejax.pruning import _rounds, _sparsities
from sparsejax.pruning._nesting import Choice, Scoring
from sparsejax.pruning._rounds import Evaluate, Plan, Pruned, Train

_UNSTRUCTURED = Unstructured()


def one_shot(
    train: Train,
    params: Params,
    sparsity: Scalar | None,
    *,
    steps: int,
    finetune_steps: int,
    scores: Scoring = criteria.magnitude,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity | NM = _UNSTRUCTURED,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
    evaluate: Evaluate | None = None,
    key: jax.Array | None = None,
    folder: str | PathLike[str] | None = None,
    progress: bool | str = True,
) -> Pruned:
    """Trains a dense network, prunes it once, and fine-tunes what is left.

    With `steps=0` nothing is trained before: the untrained network is pruned, by criteria made for
    that (`criteria.snip`, `criteria.grasp`), and then trained for `finetune_steps`.

    Args:
      train: `(params, round) -> params`: the user's loop over the updates `round.begin` to
        `round.end - 1`; see `Round`. What it returns must obey `round.masks`.
      params: a pytree of arrays to start from.
      sparsity: the fraction of the prunable entries to prune, in [0, 1); `None` where the
        granularity is `NM`, which fixes it.
      steps: updates of the dense training, 0 or more.
      finetune_steps: updates after pruning, 0 or more; they go on counting at `steps`, where a
        schedule that ended stays at its last learning rate.
      scores: `(params, masks) -> scores` of the trained params; every criterion that looks at no
        gradients is one.
      scope: as in `masking.topk`: how leaves compete.
      allocation: as in `masking.topk`: shares out what is kept.
      granularity: what is kept or pruned as one.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.
      evaluate: `params -> {name: number}`, called after each round, for the history.
      key: round i gets `fold_in(key, i)`; `None`: rounds get `None`.
      folder: a folder in which each finished round is written at once; see `iterative`.
      progress: shows a bar, on standard error; a text stands before it. False shows nothing.

    Returns:
      A `Pruned`, with a history of two records.

    Raises:
      TypeError, ValueError: as in `iterative`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> from sparsejax import pruning
      >>> target = jnp.array([[0.5, -2.0, 3.0, 1.0]])
      >>> def train(params, round):
      ...     tx = sj.keep_masks(optax.sgd(0.5), round.masks)
      ...     state = tx.init(params)
      ...     for _ in range(round.begin, round.end):
      ...         grads = {"w": params["w"] - target}
      ...         updates, state = tx.update(grads, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     return params
      >>> found = pruning.one_shot(train, {"w": jnp.zeros((1, 4))}, 0.5, steps=2,
      ...                          finetune_steps=2, progress=False)
      >>> found.params["w"], found.history[1].nonzeros
      (Array([[ 0.    , -1.875 ,  2.8125,  0.    ]], dtype=float32), 2)

    References:
      S. Han, J. Pool, J. Tran, W. Dally, *Learning both weights and connections for efficient
      neural networks*, NeurIPS 2015, https://arxiv.org/abs/1506.02626; there thresholds a layer,
      here exact counts. N. Lee, T. Ajanthan, P. Torr, *SNIP: single-shot network pruning based on
      connection sensitivity*, ICLR 2019, https://arxiv.org/abs/1810.02340, for `steps=0`.
    """
    steps, spans, arguments = _finetuned(steps, finetune_steps, 1)
    fixed = isinstance(granularity, NM)
    if fixed != (sparsity is None):
        raise ValueError(
            "`sparsity` must be None with a granularity that fixes it, as NM does, and a number "
            f"with every other, got {sparsity} with {granularity}."
        )
    levels = (None,) if sparsity is None else (_checks.known_fraction("sparsity", sparsity),)
    return _rounds.run(
        Plan("one_shot", {"sparsity": levels[0], **arguments}, levels, steps, spans),
        train,
        params,
        scores=scores,
        choice=Choice(scope, allocation, granularity, stacked, prunable),
        evaluate=evaluate,
        key=key,
        folder=folder,
        progress=progress,
    )


def iterative(
    train: Train,
    params: Params,
    sparsities: Sequence[Scalar] | np.ndarray | jax.Array,
    *,
    steps: int,
    finetune_steps: int,
    scores: Scoring = criteria.magnitude,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity = _UNSTRUCTURED,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
    evaluate: Evaluate | None = None,
    key: jax.Array | None = None,
    folder: str | PathLike[str] | None = None,
    progress: bool | str = True,
) -> Pruned:
    """Trains a dense network, then prunes a little and fine-tunes, again and again.

    What is pruned in one round stays pruned in all later ones, whatever `scores` says of it, and
    each round prunes exactly `round(sparsity * n)` of n entries. Nothing is compiled here: compile
    the step in `train`, with the masks in the state of its optimizer, and all rounds share it.

    Args:
      train: `(params, round) -> params`: the user's loop over the updates `round.begin` to
        `round.end - 1`; see `Round`. What it returns must obey `round.masks`, which
        `sj.keep_masks(optimizer, round.masks)` sees to. It may donate what it is given. Not called
        for a round without updates.
      params: a pytree of arrays to start from. It goes through `train` as JAX has it (float64 is
        float32 where x64 is off); leaves that are no arrays, such as functions, stay as they are.
      sparsities: ascending numbers in [0, 1), one for each round after the dense one, such as
        `geometric(0.98, 10)`.
      steps: updates of the dense training, 0 or more.
      finetune_steps: updates after each pruning, 0 or more; they go on counting where the last
        round ended.
      scores: `(params, masks) -> scores` of the params that the last round trained, under the masks
        that it trained with; every criterion that looks at no gradients is one, and
        `lambda params, masks: criteria.taylor(params, grads(params))` makes one of any other.
        Pruned entries may score anything.
      scope: as in `masking.topk`: how leaves compete.
      allocation: as in `masking.topk`: shares out what is kept.
      granularity: what is kept or pruned as one; not `NM`, whose sparsity is fixed.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.
      evaluate: `params -> {name: number}`, called after each round, for the history. "accuracy"
        and "error" are fractions; names that its records or their table have (size, density) are
        refused.
      key: round i gets `fold_in(key, i)`; `None`: rounds get `None`.
      folder: a folder in which each finished round is written at once; called again after a kill
        with the same arguments, the run goes on from there, bit for bit if `train` and `scores` are
        pure. A run with other arguments is refused, but of functions only names are compared (and
        what filters select and `allocation` keeps): another `train`, or other values inside of
        `scores` or `evaluate`, needs another folder. It may be deleted afterwards.
      progress: shows a bar, on standard error; a text stands before it. False shows nothing.

    Returns:
      A `Pruned`: the params and masks of the last round, and a record of each.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range, or as in
        `masking.topk`; if params are traced; if the params that `train` returns are unlike those it
        was given, do not obey the masks, or, in any round but the last, have NaN where they are
        prunable, with the leaf's path; if `folder` is another run's (with what differs) or
        damaged (with the file).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> from sparsejax import pruning
      >>> target = jnp.array([[0.5, -2.0, 3.0, 1.0]])
      >>> def train(params, round):
      ...     tx = sj.keep_masks(optax.sgd(0.5), round.masks)
      ...     state = tx.init(params)
      ...     for _ in range(round.begin, round.end):
      ...         grads = {"w": params["w"] - target}
      ...         updates, state = tx.update(grads, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     return params
      >>> def evaluate(params):
      ...     return {"loss": jnp.sum((params["w"] - target) ** 2)}
      >>> found = pruning.iterative(
      ...     train, {"w": jnp.zeros((1, 4))}, pruning.geometric(0.75, 2), steps=20,
      ...     finetune_steps=5, evaluate=evaluate, progress=False)
      >>> for r in found.history:
      ...     print(r.number, r.sparsity, r.nonzeros, round(r.metrics["loss"], 4))
      0 0.0 4 0.0
      1 0.5 2 1.25
      2 0.75 1 5.25

    References:
      S. Han, J. Pool, J. Tran, W. Dally, *Learning both weights and connections for efficient
      neural networks*, NeurIPS 2015, https://arxiv.org/abs/1506.02626; there thresholds a layer,
      here exact counts, over all layers unless `scope` or `allocation` say otherwise.
    """
    levels = _sparsities.checked(sparsities)
    steps, spans, arguments = _finetuned(steps, finetune_steps, len(levels))
    return _rounds.run(
        Plan("iterative", {"sparsities": levels, **arguments}, levels, steps, spans),
        train,
        params,
        scores=scores,
        choice=_free_choice(scope, allocation, granularity, stacked, prunable),
        evaluate=evaluate,
        key=key,
        folder=folder,
        progress=progress,
    )


def lottery_ticket(
    train: Train,
    params: Params,
    sparsities: Sequence[Scalar] | np.ndarray | jax.Array,
    *,
    steps: int,
    rewind_to: int = 0,
    scores: Scoring = criteria.magnitude,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity = _UNSTRUCTURED,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
    evaluate: Evaluate | None = None,
    key: jax.Array | None = None,
    folder: str | PathLike[str] | None = None,
    progress: bool | str = True,
) -> Pruned:
    """Trains, prunes, and trains what is left from the weights of the beginning, again and again.

    After each pruning the weights that are left go back, bit for bit, to what they were after the
    first `rewind_to` updates of the dense training, and are trained for the rest of it: updates
    `rewind_to` to `steps - 1`, with the learning rates of these. Small networks find tickets at
    their initialization, 0; larger ones need a little training first, a per cent of it or so.

    Where `rewind_to` is not 0, `train` is called twice for round 0, up to there and on from there,
    so that all rounds leave there alike: with these weights and a new optimizer.

    Args:
      train: `(params, round) -> params`, as in `iterative`: the user's loop over the updates
        `round.begin` to `round.end - 1`.
      params: a pytree of arrays to start from: the initialization.
      sparsities: ascending numbers in [0, 1), as in `iterative`.
      steps: updates of the dense training, at least 1.
      rewind_to: updates after which the weights are those that each round begins with, less than
        `steps`.
      scores: as in `iterative`.
      scope: as in `masking.topk`: how leaves compete.
      allocation: as in `masking.topk`: shares out what is kept.
      granularity: what is kept or pruned as one; not `NM`, whose sparsity is fixed.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.
      evaluate: `params -> {name: number}`, called after each round, for the history.
      key: round i gets `fold_in(key, i)`; `None`: rounds get `None`. For the same order of the data
        in all rounds, use a key of your own.
      folder: as in `iterative`.
      progress: shows a bar, on standard error; a text stands before it. False shows nothing.

    Returns:
      A `Pruned`: the trained params and the masks of the last round, and a record of each.

    Raises:
      TypeError, ValueError: as in `iterative`, and if `rewind_to` is not less than `steps`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import pruning
      >>> def train(params, round):  # one unit up an update
      ...     grown = params["w"] + (round.end - round.begin)
      ...     return {"w": jnp.where(round.masks["w"], grown, 0)}
      >>> found = pruning.lottery_ticket(
      ...     train, {"w": jnp.array([[1.0, -20.0, 3.0, 4.0]])}, [0.25, 0.5], steps=10,
      ...     rewind_to=2, progress=False)
      >>> found.params["w"]  # the smallest of 11, -10, 13, 14; then of 11, 13, 14
      Array([[ 0.,  0., 13., 14.]], dtype=float32)

    References:
      J. Frankle and M. Carbin, *The lottery ticket hypothesis: finding sparse, trainable neural
      networks*, ICLR 2019, https://arxiv.org/abs/1803.03635; J. Frankle, G. K. Dziugaite, D. Roy,
      M. Carbin, *Linear mode connectivity and the lottery ticket hypothesis*, ICML 2020,
      https://arxiv.org/abs/1912.05671, for `rewind_to`. There as here (in their code) all rounds
      begin with a new optimizer; there the last layer is pruned half as fast in some experiments:
      `allocation` does that.
    """
    levels = _sparsities.checked(sparsities)
    steps, rewind_to, spans, arguments = _rewound(steps, rewind_to, len(levels))
    return _rounds.run(
        Plan(
            "lottery_ticket", {"sparsities": levels, **arguments}, levels, steps, spans, rewind_to
        ),
        train,
        params,
        scores=scores,
        choice=_free_choice(scope, allocation, granularity, stacked, prunable),
        evaluate=evaluate,
        key=key,
        folder=folder,
        progress=progress,
    )


def rewind_learning_rate(
    train: Train,
    params: Params,
    sparsities: Sequence[Scalar] | np.ndarray | jax.Array,
    *,
    steps: int,
    rewind_to: int = 0,
    scores: Scoring = criteria.magnitude,
    scope: Literal["global", "per_leaf"] | None = None,
    allocation: Allocation | None = None,
    granularity: Granularity = _UNSTRUCTURED,
    stacked: Filter | None = None,
    prunable: Filter = filters.weights,
    evaluate: Evaluate | None = None,
    key: jax.Array | None = None,
    folder: str | PathLike[str] | None = None,
    progress: bool | str = True,
) -> Pruned:
    """Trains, prunes, and trains on with the learning rates of the beginning, again and again.

    The weights that are left stay what they are, the schedule goes back: each round runs the
    updates `rewind_to` to `steps - 1` once more. That is fine-tuning with large steps, and where
    the dense training was cut short for speed, the simplest procedure that is as good as any.

    Args:
      train: `(params, round) -> params`, as in `iterative`: the user's loop over the updates
        `round.begin` to `round.end - 1`.
      params: a pytree of arrays to start from.
      sparsities: ascending numbers in [0, 1), as in `iterative`.
      steps: updates of the dense training, at least 1.
      rewind_to: where the schedule goes back to, less than `steps`; 0: to its begin.
      scores: as in `iterative`.
      scope: as in `masking.topk`: how leaves compete.
      allocation: as in `masking.topk`: shares out what is kept.
      granularity: what is kept or pruned as one; not `NM`, whose sparsity is fixed.
      stacked: which leaves hold several layers along their first axis.
      prunable: which leaves are pruned.
      evaluate: `params -> {name: number}`, called after each round, for the history.
      key: round i gets `fold_in(key, i)`; `None`: rounds get `None`.
      folder: as in `iterative`.
      progress: shows a bar, on standard error; a text stands before it. False shows nothing.

    Returns:
      A `Pruned`: the params and masks of the last round, and a record of each.

    Raises:
      TypeError, ValueError: as in `iterative`, and if `rewind_to` is not less than `steps`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import pruning
      >>> def train(params, round):
      ...     print("updates", round.begin, "to", round.end)
      ...     return params
      >>> found = pruning.rewind_learning_rate(
      ...     train, {"w": jnp.array([[1.0, -20.0, 3.0, 4.0]])}, [0.25, 0.5], steps=10,
      ...     rewind_to=2, progress=False)
      updates 0 to 10
      updates 2 to 10
      updates 2 to 10
      >>> found.params["w"]
      Array([[  0., -20.,   0.,   4.]], dtype=float32)

    References:
      A. Renda, J. Frankle, M. Carbin, *Comparing rewinding and fine-tuning in neural network
      pruning*, ICLR 2020, https://arxiv.org/abs/2003.02389.
    """
    levels = _sparsities.checked(sparsities)
    steps, _, spans, arguments = _rewound(steps, rewind_to, len(levels))
    return _rounds.run(
        Plan("rewind_learning_rate", {"sparsities": levels, **arguments}, levels, steps, spans),
        train,
        params,
        scores=scores,
        choice=_free_choice(scope, allocation, granularity, stacked, prunable),
        evaluate=evaluate,
        key=key,
        folder=folder,
        progress=progress,
    )


def _finetuned(
    steps: Any, finetune_steps: Any, rounds: int
) -> tuple[int, tuple[tuple[int, int], ...], dict[str, Any]]:
    """Steps of the dense training, spans of the rounds one after the other, and their arguments."""
    steps = _checks.known_step("steps", steps)
    more = _checks.known_step("finetune_steps", finetune_steps)
    spans = tuple((steps + i * more, steps + (i + 1) * more) for i in range(rounds))
    return steps, spans, {"steps": steps, "finetune_steps": more}


def _rewound(
    steps: Any, rewind_to: Any, rounds: int
) -> tuple[int, int, tuple[tuple[int, int], ...], dict[str, Any]]:
    """Steps of the dense training, where rounds go back to, their spans, and their arguments."""
    steps = _checks.known_step("steps", steps, 1)
    rewind_to = _checks.known_step("rewind_to", rewind_to)
    if rewind_to >= steps:
        raise ValueError(
            f"`rewind_to` must be less than `steps`, which is {steps}, got {rewind_to}: rounds "
            "train from there to the end."
        )
    return (
        steps,
        rewind_to,
        ((rewind_to, steps),) * rounds,
        {"steps": steps, "rewind_to": rewind_to},
    )


def _free_choice(
    scope: Any,
    allocation: Allocation | None,
    granularity: Any,
    stacked: Filter | None,
    prunable: Filter,
) -> Choice:
    if isinstance(granularity, NM):
        raise ValueError(
            "`granularity` must have no sparsity of its own, which rounds could not change, got "
            f"{granularity}; one_shot(train, params, None, granularity={granularity}) prunes by it."
        )
    return Choice(scope, allocation, granularity, stacked, prunable)
