"""Rounds: what the user's training is told, what is recorded of each, and the loop over them."""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _form, _leaves, _progress, _run_folder, _tree, masking, selection
from sparsejax._form import Form
from sparsejax._typing import Masks, Params
from sparsejax.pruning import _nesting
from sparsejax.pruning._nesting import Choice, Scoring


class Round(NamedTuple):
    """What `train` is told of the round that it is to train.

    Attributes:
      number: 0 for the dense network, then one for each sparsity.
      sparsity: the fraction of the prunable entries that the masks prune, counted.
      masks: what the params must obey at the end of the round, as they do at its begin. In round 0
        they keep all, with the shapes of all later ones, so that a step which has them for an
        argument, or in the state of its optimizer, is compiled once.
      begin: optimizer updates done before, as schedules count them: the round is to run the updates
        `begin` to `end - 1`. After a rewind it is what it was then.
      end: where the round ends.
      teacher: the params of the trained dense network, for self-distillation; `None` in round 0,
        and if there was no dense training.
      key: `fold_in(key, number)`, or `None` without a key. Where `lottery_ticket` cuts round 0 in
        two, at `rewind_to`, both parts have the same: fold `begin` in, or the number of the update,
        so that they do not draw the same.
    """

    number: int
    sparsity: float
    masks: Masks
    begin: int
    end: int
    teacher: Params | None
    key: jax.Array | None


class Record(NamedTuple):
    """What is remembered of a round.

    Attributes:
      number: of the round.
      sparsity: the fraction of the prunable entries that is pruned, counted.
      nonzeros: how many prunable entries the masks keep.
      size: how many prunable entries there are.
      metrics: what `evaluate` said of the trained params; empty without it.
      seconds: what the training took, in this process or in the one that was killed.
    """

    number: int
    sparsity: float
    nonzeros: int
    size: int
    metrics: dict[str, float]
    seconds: float


class Pruned(NamedTuple):
    """What a procedure returns.

    Attributes:
      params: of the last round; they obey the masks.
      masks: of the last round.
      history: a record of every round, the dense one first.
    """

    params: Params
    masks: Masks
    history: tuple[Record, ...]


Train: TypeAlias = Callable[[Params, Round], Params]
"""`(params, round) -> params`: trains from `params`, as the round says."""

Evaluate: TypeAlias = Callable[[Params], Mapping[str, Any]]
"""`params -> {name: number}`: a float each, NaN allowed.

`"accuracy"` and `"error"` are fractions in [0, 1]. What a record has, or a row of `reports`
derives (its name, density, compression and other factors), is no name of a metric.
"""

# `reports.history` has columns or arguments of these names.
_RESERVED = (
    *Record._fields,
    *("name", "more", "density", "compression", "flops_factor", "bytes_factor"),
)
_FRACTIONS = ("accuracy", "error")


class Plan(NamedTuple):
    """A procedure: what each round prunes and trains, and the weights that it begins with.

    Attributes:
      name: of the procedure, for its folder.
      arguments: what tells two runs of it apart, by the names of the user's arguments.
      sparsities: of the rounds after the dense one; `None` where the granularity fixes it.
      steps: updates of the dense training.
      spans: where each of these rounds begins and ends, in updates.
      rewind_to: rounds begin with the weights after so many updates of the dense training; `None`:
        with those of the round before.
    """

    name: str
    arguments: dict[str, Any]
    sparsities: tuple[float | None, ...]
    steps: int
    spans: tuple[tuple[int, int], ...]
    rewind_to: int | None = None


def run(
    plan: Plan,
    train: Train,
    params: Params,
    *,
    scores: Scoring,
    choice: Choice,
    evaluate: Evaluate | None,
    key: jax.Array | None,
    folder: Any,
    progress: bool | str,
) -> Pruned:
    """Trains, prunes and trains again, as planned."""
    _check(train, scores, evaluate, key)
    form = _form.form_of(params, "train")
    dense_masks = choice.everything(params, plan.sparsities)
    _check_known(form, dense_masks, key)
    opened = _opened(plan, form, choice, scores, evaluate, key, folder)
    mask_form = _form.form_of(dense_masks)
    last = len(plan.sparsities)
    rounds = _Rounds(train, evaluate, form, mask_form, choice, key, opened, last)
    start = [np.array(x) for x in form.arrays]
    with _progress.bar(progress, "rounds", last + 1) as advance:
        early, dense = _dense_rounds(plan, rounds, start)
        history = [rounds.record(0, dense)]
        advance(_said(history[-1]))
        trained = dense
        for i, (sparsity, span) in enumerate(zip(plan.sparsities, plan.spans, strict=True)):
            begin_with = trained if plan.rewind_to is None else early

            def pruned(
                trained: _Trained = trained, i: int = i, sparsity: float | None = sparsity
            ) -> Masks:
                params, masks = rounds.params(trained), rounds.masks(trained)
                found = _nesting.scored(scores, params, masks, choice.prunable)
                return choice.masks(found, masks, sparsity, plan.sparsities[:i])

            trained = rounds.trained(
                f"round-{i + 1:04}",
                i + 1,
                span,
                begin_with.params,
                pruned,
                teacher=dense.params if plan.steps else None,
            )
            history.append(rounds.record(i + 1, trained))
            advance(_said(history[-1]))
    return Pruned(rounds.params(trained), rounds.masks(trained), tuple(history))


class _Trained(NamedTuple):
    """The arrays of a round's params and masks, on the host, and the seconds of its training."""

    params: list[np.ndarray]
    masks: list[np.ndarray]
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """What all rounds have in common."""

    train: Train
    evaluate: Evaluate | None
    form: Form
    mask_form: Form
    choice: Choice
    key: jax.Array | None
    folder: Path | None
    last: int

    def params(self, trained: _Trained) -> Params:
        # New arrays every time: whoever donates them loses nothing of ours.
        return self.form.placed(trained.params)

    def masks(self, trained: _Trained) -> Masks:
        return self.mask_form.placed(trained.masks)

    def trained(
        self,
        part: str,
        number: int,
        span: tuple[int, int],
        start: list[np.ndarray],
        masks_of: Callable[[], Masks],
        teacher: list[np.ndarray] | None = None,
    ) -> _Trained:
        """Trains a round from the arrays `start`, unless the folder has it."""

        def made() -> list[np.ndarray]:
            masks = masks_of()
            params = masking.apply_masks(self.form.placed(start), masks)
            taught_by = None if teacher is None else self.form.placed(teacher)
            sparsity = self._count(params, masks).sparsity
            round_ = Round(
                number, sparsity, masks, *span, taught_by, _form.folded(self.key, number)
            )
            began = time.perf_counter()
            found = self._train(params, round_)
            seconds = time.perf_counter() - began
            return [np.array(x) for x in (*found, *self.mask_form.taken(masks), seconds)]

        like = [*self.form.arrays, *self.mask_form.arrays, np.zeros(())]
        arrays = _run_folder.once(self.folder, part, like, made)
        n = len(self.form.arrays)
        return _Trained(arrays[:n], arrays[n:-1], float(arrays[-1]))

    def record(self, number: int, trained: _Trained) -> Record:
        params = self.params(trained)
        count = self._count(params, self.masks(trained))
        evaluate = self.evaluate
        metrics = (
            {}
            if evaluate is None
            else _run_folder.once_noted(
                self.folder, f"round-{number:04}", lambda: _metrics(evaluate(params))
            )
        )
        return Record(number, count.sparsity, count.nonzeros, count.size, metrics, trained.seconds)

    def _count(self, params: Params, masks: Masks) -> masking.Count:
        return masking.sparsity(params, masks, prunable=self.choice.prunable).prunable

    def _train(self, params: Params, round_: Round) -> list[jax.Array]:
        """The arrays of what the user's training returns, which must obey the masks."""
        if round_.begin == round_.end:
            return self.form.taken(params)
        found = self.train(params, round_)
        if found is None:
            raise TypeError("`train` must return the params, got None; return what it trained.")
        arrays = self.form.taken(found)
        _check_obedient(self.form, arrays, round_.masks)
        if round_.number < self.last:
            _check_finished(self.form.filled(arrays), round_.number, self.choice)
        return arrays


def _dense_rounds(
    plan: Plan, rounds: _Rounds, start: list[np.ndarray]
) -> tuple[_Trained, _Trained]:
    """The dense network when rewinds go back to it, and when it is trained.

    A round that is rewound begins with those weights and a new optimizer, and so does the rest of
    the dense training, which is cut in two there: all rounds are alike but for their masks.
    """

    def everything() -> Masks:
        return rounds.mask_form.filled(rounds.mask_form.arrays)

    early = _Trained(start, [], 0.0)
    cut = plan.rewind_to or 0
    if cut:
        early = rounds.trained("rewind", 0, (0, cut), start, everything)
    dense = rounds.trained("round-0000", 0, (cut, plan.steps), early.params, everything)
    return early, dense._replace(seconds=early.seconds + dense.seconds)


def _check_obedient(form: Form, arrays: list[jax.Array], masks: Masks) -> None:
    flat = form.flat
    found = masking.aligned(masks, form.filled(arrays))
    rows = zip(flat.paths, flat.leaves, found, strict=True)
    pairs = [(path, mask) for path, leaf, mask in rows if isinstance(leaf, jax.Array)]
    for (path, mask), array in zip(pairs, arrays, strict=True):
        if np.shape(mask) == () and bool(mask):
            continue
        # As integers: XLA's comparisons on CPU take denormals for zeros.
        wrong = ~mask & (selection.order_key(array) != 0)
        if count := int(np.count_nonzero(wrong)):
            raise ValueError(
                f"`train` must return params that obey the masks, got {count} pruned entries that "
                f"are not zero, of {array.size}, at {path!r}: wrap its optimizer, "
                "sj.keep_masks(optimizer, round.masks), outermost."
            )


def _check_finished(params: Params, number: int, choice: Choice) -> None:
    """Refuses NaN where it is scored next, and before the round is written."""
    flat = _tree.flatten(params)
    prunable = set(choice.paths(params))
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if path in prunable and (count := int(jnp.count_nonzero(jnp.isnan(leaf)))):
            raise ValueError(
                f"`train` must return params that can be scored, but round {number} trained to NaN "
                f"at {path!r}, in {count} of {leaf.size} entries: it diverged; lower its learning "
                "rate, or clip its gradients."
            )


def _metrics(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise TypeError(
            '`evaluate` must return numbers by their names, such as {"error": 0.02}, got '
            f"{_leaves.brief(found)}."
        )
    return {_name(name): _number(name, value) for name, value in found.items()}


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"`evaluate` must name its numbers by strings, got {_leaves.brief(name)}.")
    if name in _RESERVED:
        raise ValueError(
            f"`evaluate` must name its numbers otherwise, got {name!r}, which the history has for "
            f"itself, as {', '.join(_RESERVED)}."
        )
    return name


def _number(name: str, value: Any) -> float:
    """NaN passes: a round may diverge."""
    number = _leaves.is_number(value) and _leaves.dtype_of(value) != np.dtype(bool)
    if _leaves.shape_of(value) != () or not number or not np.isrealobj(value):
        got = _leaves.brief(value) if _leaves.shape_of(value) is None else _leaves.describe(value)
        raise TypeError(f"`evaluate` must return one real number a name, got {got} for {name!r}.")
    if name in _FRACTIONS and (value < 0 or value > 1):
        raise ValueError(
            f"`evaluate` must return a fraction in [0, 1], not a percentage, for {name!r}, got "
            f"{value}; what is no fraction needs another name, such as 'loss'."
        )
    return float(value)


def _said(record: Record) -> str:
    metrics = (f"{name} {value:.4g}" for name, value in record.metrics.items())
    return ", ".join([f"sparsity {record.sparsity:.4g}", *metrics])


def _check(train: Any, scores: Any, evaluate: Any, key: Any) -> None:
    _checks.function("train", train, "(params, round) -> params", "a loop of updates")
    _nesting.check_scoring(scores)
    if evaluate is not None:
        _checks.function("evaluate", evaluate, "params -> {name: number}", "the error on new data")
    if key is not None:
        _checks.key("key", key)


def _check_known(form: Form, masks: Masks, key: Any) -> None:
    """Refuses tracers; what is made inside of `jit` is one, too, be the params arrays."""
    flat, made = form.flat, jax.tree.leaves(masks)
    hint = "call this outside of jit, and compile the step in `train`."
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if _leaves.is_traced(leaf, *made):
            raise TypeError(
                "`params` must hold arrays whose entries are known, got "
                f"{_leaves.describe(leaf)} at {path!r} while JAX traces: {hint}"
            )
    if _leaves.is_traced(key):
        raise TypeError(f"`key` must be known, got a traced one: {hint}")


def _opened(
    plan: Plan,
    form: Form,
    choice: Choice,
    scores: Scoring,
    evaluate: Evaluate | None,
    key: Any,
    folder: Any,
) -> Path | None:
    if folder is None:
        return None
    params = form.filled(form.arrays)
    arguments = {
        "folder": f"a run of {plan.name}",
        **plan.arguments,
        "scope": choice.scope,
        # The address of its pool is another in every process.
        "granularity": re.sub(r" at 0x\w+", "", repr(choice.granularity)),
        "prunable": choice.paths(params),
        "stacked": choice.stacks(params),
        # Two may have one name, and other densities.
        "allocation": [
            _run_folder.function_name(choice.allocation),
            *choice.shares(params, plan.sparsities),
        ],
        "scores": _run_folder.function_name(scores),
        "evaluate": _run_folder.function_name(evaluate),
        "key": _run_folder.key_fingerprint(key),
        "params": _form.fingerprint(form),
    }
    return _run_folder.open_run(folder, arguments)
