"""Procedures: masks against torch's in rounds, weights bit for bit, killed runs, every error."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_worker import ticket
from pruning_worker import train as noisy
from same_bits import assert_same_bits, bits

import sparsejax as sj
from sparsejax import (
    allocation,
    criteria,
    distillation,
    filters,
    granularities,
    masking,
    pruning,
    reports,
)
from sparsejax.pruning import _nesting, _rounds
from sparsejax.reports import _row

pytestmark = pytest.mark.usefixtures("quickly")
GOLDEN = Path(__file__).parent / "golden" / "iterative.npz"
KEY = jax.random.key(0)

iterative = functools.partial(pruning.iterative, progress=False)
one_shot = functools.partial(pruning.one_shot, progress=False)
lottery_ticket = functools.partial(pruning.lottery_ticket, progress=False)
rewind_learning_rate = functools.partial(pruning.rewind_learning_rate, progress=False)
PROCEDURES = {
    "one_shot": lambda train, params, **kw: one_shot(
        train, params, 0.5, steps=3, finetune_steps=2, **kw
    ),
    "iterative": lambda train, params, **kw: iterative(
        train, params, [0.3, 0.5], steps=3, finetune_steps=2, **kw
    ),
    "lottery_ticket": lambda train, params, **kw: lottery_ticket(
        train, params, [0.3, 0.5], steps=3, rewind_to=1, **kw
    ),
    "rewind_learning_rate": lambda train, params, **kw: rewind_learning_rate(
        train, params, [0.3, 0.5], steps=3, rewind_to=1, **kw
    ),
}
every_procedure = pytest.mark.parametrize("procedure", PROCEDURES.values(), ids=PROCEDURES)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def grow(params, round_):
    """A tenth more for each update, where the masks allow."""
    grown = jax.tree.map(lambda w: w * 1.1 ** (round_.end - round_.begin), params)
    return sj.apply_masks(grown, round_.masks)


def same(params, round_):
    del round_
    return params


class Spy:
    """Trains as another function does, and keeps what it was given and what it gave."""

    def __init__(self, train=grow):
        self.train, self.rounds, self.starts, self.ends = train, [], [], []

    def __call__(self, params, round_):
        """One round."""
        self.rounds.append(round_)
        self.starts.append(params)
        self.ends.append(self.train(params, round_))
        return self.ends[-1]

    @property
    def spans(self):
        """Which updates of which round were asked for."""
        return [(r.number, r.begin, r.end) for r in self.rounds]


# Sparsities.


def test_geometric_takes_the_same_share_of_what_is_left():
    left = 1 - np.array((0.0, *pruning.geometric(0.97, 7)))
    np.testing.assert_allclose(left[1:] / left[:-1], 0.03 ** (1 / 7), rtol=1e-12)


def test_geometric_of_a_fifth_is_the_lottery_tickets():
    found = pruning.geometric(1 - 0.8**15, 15)
    np.testing.assert_allclose(found, [1 - 0.8**k for k in range(1, 16)], rtol=1e-12)


@pytest.mark.parametrize("sparsity", [0.1, 0.9, 0.99, 0.9999])
def test_geometric_ends_at_the_sparsity_itself(sparsity):
    assert pruning.geometric(sparsity, 1) == (sparsity,)
    assert pruning.geometric(sparsity, 13)[-1] == sparsity


# Masks, against torch.nn.utils.prune.

KINDS = {
    "global": {},
    "per_leaf": {"scope": "per_leaf"},
    "channels": {
        "scope": "per_leaf",
        "granularity": granularities.Channel(0, pool=granularities.l2),
    },
}


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.mark.parametrize("kind", KINDS)
def test_iterative_prunes_what_torch_prunes(kind, golden):
    """Half of what is left, four times, each time by other weights."""
    layers = ("conv", "dense")
    trained = [{k: golden[f"weights/{i}/{k}"] for k in layers} for i in range(4)]

    def train(params, round_):
        return sj.apply_masks(trained[min(round_.number, 3)], round_.masks)

    spy = Spy(train)
    levels = pruning.geometric(1 - 0.5**4, 4)
    iterative(spy, trained[0], levels, steps=1, finetune_steps=1, **KINDS[kind])
    for i, round_ in enumerate(spy.rounds[1:]):
        for name in layers:
            expected = golden[f"{kind}/{i}/{name}"]
            mask = np.broadcast_to(round_.masks[name], expected.shape)
            np.testing.assert_array_equal(mask, expected)


LEVELS = st.lists(st.integers(1, 399), min_size=1, max_size=4, unique=True).map(
    lambda levels: [n / 400 for n in sorted(levels)]
)


@settings(max_examples=8)
@given(LEVELS, st.integers(0, 5))
def test_masks_are_nested_and_counts_exact_whatever_the_scores(levels, seed):
    """Of 7 · 11 + 3 · 19 entries, scored anew in each round, pruned ones highest of all."""
    rng = np.random.default_rng(seed)

    def scores(params, masks):
        return {
            k: np.where(masks[k], rng.standard_normal(w.shape), np.inf).astype(np.float32)
            for k, w in params.items()
        }

    spy = Spy(same)
    params = {"a": np.ones((7, 11), np.float32), "b": np.ones((3, 19), np.float32)}
    found = iterative(
        lambda p, r: sj.apply_masks(spy(p, r), r.masks),
        params,
        levels,
        steps=1,
        finetune_steps=1,
        scores=scores,
    )
    for before, after in zip(spy.rounds[:-1], spy.rounds[1:], strict=True):
        assert not any(np.any(after.masks[k] & ~before.masks[k]) for k in params)
    zeros = [record.size - record.nonzeros for record in found.history]
    assert zeros == [0] + [round(s * 134) for s in levels]
    assert [r.sparsity for r in spy.rounds] == [r.sparsity for r in found.history]


NESTED = {
    "blocks": ("w", {"granularity": granularities.Block((2,), pool=granularities.l2)}),
    "channels": ("w", {"granularity": granularities.Channel(-2, pool=jnp.max)}),
    "erdos-renyi": ("vw", {"allocation": allocation.erdos_renyi}),
    "stacked channels": (
        "s",
        {
            "granularity": granularities.Channel(pool=granularities.l2),
            "scope": "per_leaf",
            "stacked": filters.by_path("s"),
        },
    ),
}


@pytest.mark.parametrize(("names", "options"), NESTED.values(), ids=NESTED)
def test_masks_are_nested_with_every_option(names, options):
    """Pruned entries score highest, so that nothing but the masks holds them down."""
    shapes = {"s": (3, 4, 5), "v": (3, 19), "w": (7, 11)}
    params = {name: normal(*shapes[name]) for name in names}

    def scores(params, masks):
        return {
            k: np.where(masks[k], 1 / (1 + np.abs(w)), np.float32(9)) for k, w in params.items()
        }

    spy = Spy()
    iterative(spy, params, [0.3, 0.6, 0.9], steps=1, finetune_steps=1, scores=scores, **options)
    for before, after in zip(spy.rounds[:-1], spy.rounds[1:], strict=True):
        for name in names:
            assert after.masks[name].shape == before.masks[name].shape
            assert not np.any(after.masks[name] & ~before.masks[name])
            assert np.any(after.masks[name] != before.masks[name])
    if "allocation" in options:
        zeros = [masking.sparsity(params, r.masks).prunable.zeros for r in spy.rounds]
        assert zeros == [round(s * (57 + 77)) for s in (0, 0.3, 0.6, 0.9)]


def test_an_allocation_that_would_give_back_is_held_down():
    """At the second, smaller total `a` would get one unit more: the paradox of Alabama."""
    answers = {8: [4, 4], 4: [1, 3], 3: [2, 1]}
    layers = [allocation.Layer(name, (2, 2), 4) for name in "ab"]
    falling = _nesting._falling(lambda layers, keep: answers[keep], [0.5])
    assert falling(layers, 3) == [1, 2]


def test_infinite_scores_rank_among_what_is_kept():
    """-inf is no mark of the pruned: the third entry, 0, goes before nothing that is."""

    def scores(params, masks):
        return {"w": jnp.array([[-jnp.inf, 1.0, 2.0, jnp.inf]])}

    spy = Spy(same)
    found = iterative(
        spy, {"w": jnp.ones((1, 4))}, [0.25, 0.5], steps=0, finetune_steps=0, scores=scores
    )
    assert found.masks["w"].tolist() == [[False, False, True, True]] and not spy.rounds


def test_scores_see_the_trained_params_and_their_masks():
    seen = []

    def scores(params, masks):
        seen.append((params, masks))
        return criteria.magnitude(params)

    spy = Spy()
    iterative(spy, {"w": normal(4, 5)}, [0.2, 0.4], steps=2, finetune_steps=1, scores=scores)
    assert_same_bits(seen, [(spy.ends[i], spy.rounds[i].masks) for i in range(2)])


def test_scores_of_pruned_entries_may_be_nan():
    def scores(params, masks):
        return jax.tree.map(lambda w: 1 / (w / w), params)

    found = iterative(
        grow, {"w": normal(4, 5)}, [0.2, 0.4], steps=1, finetune_steps=1, scores=scores
    )
    assert found.history[-1].nonzeros == 12


def test_a_random_criterion_is_one_of_scores():
    found = one_shot(
        grow, {"w": normal(4, 5)}, 0.5, steps=1, finetune_steps=1, scores=criteria.random(KEY)
    )
    expected = masking.topk(criteria.random(KEY)({"w": normal(4, 5)}), 0.5)
    assert_same_bits(found.masks, expected)


def test_one_shot_takes_n_of_m():
    found = one_shot(
        grow,
        {"w": normal(4, 5)},
        None,
        steps=1,
        finetune_steps=1,
        granularity=granularities.NM(2, 4),
    )
    expected = granularities.NM(2, 4).masks("w", jnp.abs(normal(4, 5)))
    np.testing.assert_array_equal(found.masks["w"], expected)
    assert found.history[1].sparsity == 0.5


# What is trained when, and from where.


@pytest.mark.parametrize(
    ("procedure", "spans"),
    [
        ("one_shot", [(0, 0, 3), (1, 3, 5)]),
        ("iterative", [(0, 0, 3), (1, 3, 5), (2, 5, 7)]),
        ("lottery_ticket", [(0, 0, 1), (0, 1, 3), (1, 1, 3), (2, 1, 3)]),
        ("rewind_learning_rate", [(0, 0, 3), (1, 1, 3), (2, 1, 3)]),
    ],
)
def test_rounds_run_the_updates_of_the_procedure(procedure, spans):
    spy = Spy()
    PROCEDURES[procedure](spy, {"w": normal(4, 5)})
    assert spy.spans == spans


@pytest.mark.parametrize("rewind_to", [0, 2])
def test_lottery_ticket_rewinds_bit_for_bit(rewind_to):
    spy, params = Spy(), {"b": normal(3), "w": normal(4, 5, dtype=jnp.bfloat16)}
    found = lottery_ticket(spy, params, [0.3, 0.6], steps=5, rewind_to=rewind_to)
    early = spy.ends[0] if rewind_to else params
    for start, round_ in list(zip(spy.starts, spy.rounds, strict=True))[1:]:
        assert_same_bits(start, sj.apply_masks(early, round_.masks))
    assert_same_bits(found.params, spy.ends[-1])


def test_lottery_ticket_chooses_by_trained_weights():
    """The first entry starts large and is trained away."""
    end = jnp.array([[0.1, 2.0, 3.0, 4.0]])

    def train(params, round_):
        return sj.apply_masks({"w": end}, round_.masks)

    found = lottery_ticket(train, {"w": jnp.array([[9.0, 1.0, 1.0, 1.0]])}, [0.25], steps=1)
    assert found.masks["w"].tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("procedure", ["one_shot", "iterative", "rewind_learning_rate"])
def test_others_begin_where_the_last_round_ended(procedure):
    spy = Spy()
    PROCEDURES[procedure](spy, {"b": normal(3), "w": normal(4, 5)})
    for i in range(1, len(spy.rounds)):
        assert_same_bits(spy.starts[i], sj.apply_masks(spy.ends[i - 1], spy.rounds[i].masks))


def test_nothing_is_trained_where_there_are_no_updates():
    spy, params = Spy(), {"w": normal(4, 5)}
    found = one_shot(spy, params, 0.5, steps=0, finetune_steps=4)
    assert spy.spans == [(1, 0, 4)] and spy.rounds[0].teacher is None
    assert_same_bits(found.masks, masking.topk(criteria.magnitude(params), 0.5))


@every_procedure
def test_the_teacher_is_the_dense_network(procedure):
    spy = Spy()
    procedure(spy, {"w": normal(4, 5)})
    dense = [end for end, r in zip(spy.ends, spy.rounds, strict=True) if r.number == 0][-1]
    for round_ in spy.rounds:
        if round_.number == 0:
            assert round_.teacher is None and bool(jnp.all(round_.masks["w"]))
        else:
            assert_same_bits(round_.teacher, dense)


@every_procedure
def test_each_round_has_a_key_of_its_own(procedure):
    spy = Spy()
    procedure(spy, {"w": normal(4, 5)}, key=KEY)
    for round_ in spy.rounds:
        assert bits(round_.key) == bits(jax.random.fold_in(KEY, round_.number))


@every_procedure
def test_without_a_key_rounds_have_none(procedure):
    spy = Spy()
    procedure(spy, {"w": normal(4, 5)})
    assert all(round_.key is None for round_ in spy.rounds)


def test_a_step_with_masks_is_compiled_once():
    traces = []

    @jax.jit
    def step(params, masks):
        traces.append(None)
        return sj.apply_masks(jax.tree.map(lambda w: w * 1.1, params), masks)

    for options in ({}, {"granularity": granularities.Channel()}):
        traces.clear()
        params = {"b": normal(3), "w": normal(4, 5)}
        lottery_ticket(
            lambda p, r: step(p, r.masks), params, [0.2, 0.4], steps=2, rewind_to=1, **options
        )
        assert len(traces) == 1


def test_train_may_donate_its_params():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(params, masks):
        return sj.apply_masks(jax.tree.map(lambda w: w + 1, params), masks)

    def run(train):
        params = {"b": normal(3), "w": normal(4, 5)}
        return lottery_ticket(train, params, [0.2, 0.4], steps=2, rewind_to=1), params

    donated, params = run(lambda p, r: step(p, r.masks))
    kept, _ = run(lambda p, r: sj.apply_masks(jax.tree.map(lambda w: w + 1, p), r.masks))
    assert_same_bits(donated[:2], kept[:2])
    assert_same_bits(params, {"b": normal(3), "w": normal(4, 5)})


def test_self_distillation_keeps_a_pruned_network_near_the_dense_one():
    """Labels are noise, which the dense network has hardly begun to learn."""
    x, labels = normal(64, 6), jax.random.randint(KEY, (64,), 0, 3)

    def logits(params, batch):
        return jnp.tanh(batch @ params["a"]) @ params["b"]

    def loss(params, batch):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return losses(logits(params, batch), labels).mean()

    @jax.jit
    def step(params, masks, teacher, weight):
        taught = distillation.distilled(
            loss, logits, functools.partial(logits, teacher), weight=weight
        )
        slopes = jax.grad(taught)(params, x)
        return sj.apply_masks(jax.tree.map(lambda w, g: w - 0.5 * g, params, slopes), masks)

    def trained(weight):
        def train(params, round_):
            teacher, share = (params, 0.0) if round_.number == 0 else (round_.teacher, weight)
            for _ in range(round_.begin, round_.end):
                params = step(params, round_.masks, teacher, share)
            return params

        spy = Spy(train)
        params = {"a": normal(6, 16, seed=1), "b": normal(16, 3, seed=2)}
        found = one_shot(spy, params, 0.5, steps=2, finetune_steps=50)
        return float(distillation.logits(logits(found.params, x), logits(spy.ends[0], x)))

    assert trained(1.0) < 0.5 * trained(0.0)


# Trees of every kind.


class Net(eqx.Module):
    """A module with a function among its leaves."""

    layer: eqx.nn.Linear
    activation: object


TREES = {
    "state": lambda: nnx.state(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.Param),
    "equinox": lambda: Net(eqx.nn.Linear(4, 5, key=KEY), jax.nn.relu),
    "odd leaves": lambda: {
        "empty": jnp.zeros((0, 2)),
        "half": normal(4, 5, dtype=jnp.bfloat16),
        "none": None,
        "scale": jnp.float32(2),
        "steps": np.arange(3, dtype=np.int8),
    },
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_trees_keep_structure_and_dtypes(make, tmp_path):
    def train(params, round_):
        doubled = jax.tree.map(
            lambda w: 2 * w if hasattr(w, "dtype") and jnp.issubdtype(w.dtype, jnp.floating) else w,
            params,
        )
        return sj.apply_masks(doubled, round_.masks)

    params = make()
    for _ in range(2):  # trained, then read
        found = PROCEDURES["lottery_ticket"](train, params, folder=tmp_path / "run")
        assert jax.tree.structure(found.params) == jax.tree.structure(params)
        assert jax.tree.structure(found.masks) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
            assert a is b if callable(b) else (a.dtype, a.shape) == (b.dtype, b.shape)
        count = masking.sparsity(found.params, found.masks).prunable
        assert count.zeros == round(0.5 * count.size) == 10
        assert masking.sparsity(found.params).prunable.zeros == 10


def test_sharded_params_stay_where_they_were():
    spread = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x")
    )
    spy = Spy()
    params = {"w": jax.device_put(normal(8, 4), spread)}
    found = iterative(spy, params, [0.5], steps=1, finetune_steps=1)
    assert all(start["w"].sharding.is_equivalent_to(spread, 2) for start in spy.starts)
    assert found.params["w"].sharding.is_equivalent_to(spread, 2)
    assert found.history[1].nonzeros == 16


# History.


def test_history_tells_what_a_table_needs():
    params = {"b": jnp.ones(3), "w": normal(4, 5)}
    found = iterative(
        grow,
        params,
        [0.25, 0.5],
        steps=1,
        finetune_steps=1,
        evaluate=lambda p: {"zeros": jnp.sum(p["w"] == 0), "nan": np.nan},
    )
    rows = [(r.number, r.sparsity, r.nonzeros, r.size) for r in found.history]
    assert rows == [(0, 0.0, 20, 20), (1, 0.25, 15, 20), (2, 0.5, 10, 20)]
    assert [r.metrics["zeros"] for r in found.history] == [0, 5, 10]
    assert all(np.isnan(r.metrics["nan"]) and r.seconds >= 0 for r in found.history)


def test_history_without_an_evaluation_has_no_metrics():
    found = one_shot(grow, {"w": normal(4, 5)}, 0.5, steps=1, finetune_steps=1)
    assert [r.metrics for r in found.history] == [{}, {}]


def test_progress_shows_sparsity_and_metrics(capsys):
    one_shot(
        grow,
        {"w": normal(4, 5)},
        0.5,
        steps=1,
        finetune_steps=1,
        evaluate=lambda p: {"error": 0.125},
        progress="LeNet",
    )
    captured = capsys.readouterr()
    assert captured.out == "" and "LeNet" in captured.err and "2/2" in captured.err
    assert "sparsity 0.5, error 0.125" in captured.err


# Folders.


def interrupted(number):
    """Trains noisily until a round that is cut short."""

    def train(params, round_):
        if round_.number == number:
            raise KeyboardInterrupt
        return noisy(params, round_)

    return train


def without_seconds(found):
    return found._replace(history=[record._replace(seconds=0) for record in found.history])


@pytest.fixture(scope="module")
def whole(quickly):
    return without_seconds(ticket(noisy, None))


@pytest.mark.parametrize("number", [0, 1, 4])
def test_folder_resumes_bit_for_bit(number, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ticket(interrupted(number), tmp_path / "run")
    spy = Spy(noisy)
    found = without_seconds(ticket(spy, tmp_path / "run"))
    assert sorted({r.number for r in spy.rounds}) == list(range(number, 5))
    assert_same_bits(found[:2], whole[:2])
    assert found.history == whole.history


def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    # Compiled as here, where the whole run is made that the bits are compared with.
    quick = str(jax.config.read("jax_disable_most_optimizations"))
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": quick, "JAX_PLATFORMS": "cpu"}
    worker = [sys.executable, str(Path(__file__).with_name("pruning_worker.py")), tmp_path / "run"]
    assert subprocess.run(worker, env=environment).returncode == -signal.SIGKILL
    spy = Spy(noisy)
    found = without_seconds(ticket(spy, tmp_path / "run"))
    assert spy.spans == [(n, 2, 6) for n in (2, 3, 4)]
    assert_same_bits(found[:2], whole[:2])
    assert found.history == whole.history


def test_a_finished_folder_is_read_without_training_or_evaluation(tmp_path):
    def call(train, evaluate):
        return PROCEDURES["iterative"](
            train, {"w": normal(4, 5)}, evaluate=lambda p: evaluate(p), folder=tmp_path
        )

    def refuse(*_):
        raise AssertionError

    first = call(grow, lambda p: {"a": 1 / 3, "b": np.nan, "c": -np.inf})
    again = call(refuse, refuse)
    assert_same_bits(first[:2], again[:2])
    assert repr(first.history) == repr(again.history)  # NaN is not equal to itself


def test_folder_holds_whole_rounds(tmp_path):
    PROCEDURES["lottery_ticket"](
        grow, {"w": normal(4, 5)}, folder=tmp_path, evaluate=lambda p: {"x": 1}
    )
    rounds = [f"round-000{i}.{end}" for i in range(3) for end in ("bin", "json")]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["manifest.json", "rewind.bin", *rounds]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rewind_to"] == 1 and manifest["sparsities"] == [0.3, 0.5]


OTHER_RUNS = {
    "sparsities": ({"sparsities": [0.25, 0.75]}, r"`sparsities` must .*: 0\.5 there, 0\.75 here"),
    "steps": ({"steps": 4}, r"`steps` must .*: 3 there, 4 here"),
    "rewind_to": ({"rewind_to": 0}, r"`rewind_to` must .*: 1 there, 0 here"),
    "scope": ({"scope": "per_leaf"}, r"`scope` must .*: None there, 'per_leaf' here"),
    "granularity": (
        {"granularity": granularities.Channel()},
        r"`granularity` must .*: 'Unstructured\(\)' there, 'Channel\(.*<function sum>\)' here",
    ),
    "prunable": ({"prunable": filters.floating}, r"`prunable` must .*: 1 entries there, 2 here"),
    "stacked": (
        {"stacked": filters.by_path("w"), "scope": None},
        r"`stacked` must .*: 0 entries there, 1 here",
    ),
    "allocation": (
        {"allocation": allocation.erdos_renyi},
        r"`allocation` must .*: 1 entries there, 3 here",
    ),
    "scores": ({"scores": criteria.random(KEY)}, r"`scores` must .*: 'magnitude' there, 'random\."),
    "evaluate": ({"evaluate": lambda p: {}}, r"`evaluate` must .*: None there, '<lambda>' here"),
    "key": ({"key": KEY}, r"`key` must .*: None there"),
    "params": ({"params": {"b": jnp.ones(2), "w": jnp.ones((4, 5))}}, r"`params` must .* sha256"),
}


@pytest.mark.parametrize(("other", "pattern"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_folder_of_another_run_is_refused(other, pattern, tmp_path):
    here = {
        "params": {"b": jnp.ones(2), "w": normal(4, 5)},
        "sparsities": [0.25, 0.5],
        "steps": 3,
        "rewind_to": 1,
        "folder": tmp_path,
    }
    lottery_ticket(grow, **here)
    with pytest.raises(ValueError, match=f"(?s){pattern}.* Pass the same"):
        lottery_ticket(grow, **here | other)


def test_folder_of_an_allocation_of_other_densities_is_refused(tmp_path):
    def call(density):
        override = allocation.override(allocation.uniform, {"v": density})
        params = {"v": normal(4, 5), "w": normal(4, 5)}
        PROCEDURES["one_shot"](grow, params, folder=tmp_path, allocation=override)

    call(0.75)
    call(0.75)
    with pytest.raises(ValueError, match=r"`allocation` must .*: \[15, 5\] there, \[10, 10\] here"):
        call(0.5)


def test_folder_tells_partials_by_their_functions(tmp_path):
    def call(scores):
        PROCEDURES["one_shot"](grow, {"w": normal(4, 5)}, folder=tmp_path, scores=scores)

    call(functools.partial(lambda p, m, k: criteria.magnitude(p), k=1))
    with pytest.raises(ValueError, match=r"`scores` must .*<lambda>' there, 'magnitude' here"):
        call(functools.partial(criteria.magnitude))


def diverged(number):
    """Trains to NaN in a round."""
    return lambda p, r: jax.tree.map(lambda w: w * np.nan, p) if r.number == number else grow(p, r)


def test_a_round_that_diverged_is_not_written(tmp_path):
    call = functools.partial(PROCEDURES["iterative"], params={"w": normal(4, 5)}, folder=tmp_path)
    with pytest.raises(ValueError, match=r"round 0 trained to NaN at 'w', in 20 of 20"):
        call(diverged(0))
    assert call(grow).history[-1].nonzeros == 10


def test_the_last_round_may_diverge():
    def train(params, round_):
        if round_.number < 2:
            return grow(params, round_)
        return {"w": jnp.where(round_.masks["w"], np.nan, 0)}

    found = PROCEDURES["iterative"](
        train, {"w": normal(4, 5)}, evaluate=lambda p: {"error": jnp.sum(p["w"]) * 0}
    )
    assert np.isnan(found.history[-1].metrics["error"])


@pytest.mark.parametrize("name", sorted(_row.TAKEN | set(pruning.Record._fields)))
def test_a_metric_is_refused_or_a_column_of_its_history(name):
    def call():
        return shot(lambda p, r: sj.apply_masks(p, r.masks), evaluate=lambda params: {name: 0.25})

    if name in _rounds._RESERVED:
        with pytest.raises(ValueError, match=f"`evaluate` must name .* got '{name}'"):
            call()
    else:
        assert [row[name] for row in reports.history(call().history).rows] == [0.25, 0.25]


def test_folder_of_another_procedure_is_refused(tmp_path):
    PROCEDURES["lottery_ticket"](grow, {"w": normal(4, 5)}, folder=tmp_path)
    with pytest.raises(ValueError, match="a run of lottery_ticket' there"):
        PROCEDURES["rewind_learning_rate"](grow, {"w": normal(4, 5)}, folder=tmp_path)


@pytest.mark.parametrize("name", ["round-0001.bin", "round-0001.json"])
def test_a_damaged_round_is_an_error_that_names_the_file(name, tmp_path):
    run = functools.partial(
        PROCEDURES["one_shot"],
        grow,
        {"w": normal(4, 5)},
        folder=tmp_path,
        evaluate=lambda p: {"x": 1},
    )
    run()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"damaged one, .*{name}.*; delete it"):
        run()


def test_metrics_that_are_no_numbers_are_damaged(tmp_path):
    def call():
        PROCEDURES["one_shot"](
            grow, {"w": normal(4, 5)}, folder=tmp_path, evaluate=lambda p: {"x": 1}
        )

    call()
    (tmp_path / "round-0001.json").write_text('{"x": "low"}')
    with pytest.raises(
        ValueError, match=r"damaged one, .*0001\.json.*; delete it and all .* after"
    ):
        call()


# Errors.

W = np.arange(1, 21, dtype=np.float32).reshape(4, 5)
PARAMS = {"b": np.ones(3, np.float32), "net": {"w": W}}


def shot(train=same, params=PARAMS, sparsity=0.5, **options):
    return one_shot(train, params, sparsity, **{"steps": 1, "finetune_steps": 1} | options)


def rounds(sparsities=(0.5,), **options):
    return iterative(same, PARAMS, sparsities, **{"steps": 1, "finetune_steps": 1} | options)


def trained_to(leaf):
    return lambda params, round_: {"b": params["b"], "net": {"w": leaf}}


ERRORS = {
    "train is no function": (lambda: shot(3), TypeError, r"`train` must be a function"),
    "train returns nothing": (
        lambda: shot(lambda p, r: None),
        TypeError,
        r"`train` must return the params, got None",
    ),
    "train returns another tree": (
        lambda: shot(lambda p, r: {"b": p["b"]}),
        ValueError,
        r"`train` must have the structure of `params`: .*'net\.w'",
    ),
    "train returns another shape": (
        lambda: shot(trained_to(W[:2])),
        ValueError,
        r"`train` must return params like .*float32\[4,5\] at 'net\.w', got float32\[2,5\]",
    ),
    "train returns another dtype": (
        lambda: shot(trained_to(W.astype(np.float16))),
        ValueError,
        r"`train` must return .* got float16\[4,5\]",
    ),
    "train does not obey": (
        lambda: shot(trained_to(W)),
        ValueError,
        r"`train` must return params that obey the masks, got 10 pruned entries that are not zero, "
        r"of 20, at 'net\.w': wrap its optimizer, sj\.keep_masks",
    ),
    "train leaves a NaN": (
        lambda: shot(lambda p, r: trained_to(np.where(r.masks["net"]["w"], W, np.nan))(p, r)),
        ValueError,
        r"got 10 pruned entries",
    ),
    "train leaves a denormal": (
        lambda: shot(
            lambda p, r: trained_to(np.where(r.masks["net"]["w"], W, np.float32(1e-45)))(p, r)
        ),
        ValueError,
        r"got 10 pruned entries",
    ),
    "params hold a key": (
        lambda: shot(params={"key": jax.random.key(0), "w": W}),
        TypeError,
        r"`params` must hold arrays of numbers, got .*at 'key'; split it off, and let `train` put",
    ),
    "params hold nothing to prune": (
        lambda: shot(params={"b": np.ones(3)}),
        ValueError,
        r"`prunable`",
    ),
    "sparsity is a percentage": (lambda: shot(sparsity=90), ValueError, r"not a percentage"),
    "sparsity is traced": (
        lambda: jax.jit(lambda s: shot(sparsity=s))(0.5),
        TypeError,
        r"`sparsity` must be known",
    ),
    "sparsity is missing": (
        lambda: shot(sparsity=None),
        ValueError,
        r"`sparsity` must be None with .* NM does.* got None with Unstructured",
    ),
    "sparsity with N:M": (
        lambda: shot(granularity=granularities.NM(2, 4)),
        ValueError,
        r"`sparsity` must be None with .* got 0\.5 with NM",
    ),
    "N:M in rounds": (
        lambda: rounds(granularity=granularities.NM(2, 4)),
        ValueError,
        r"`granularity` must have no sparsity of its own.*one_shot\(train, params, None",
    ),
    "granularity is a class": (
        lambda: rounds(granularity=granularities.Channel),
        TypeError,
        r"`granularity` must be a value",
    ),
    "sparsities are one": (
        lambda: rounds(0.5),
        TypeError,
        r"`sparsities` must be a list.*\[0\.9\]",
    ),
    "sparsities are none": (lambda: rounds([]), ValueError, r"`sparsities` must ascend"),
    "sparsities fall": (lambda: rounds([0.5, 0.25]), ValueError, r"`sparsities` must ascend"),
    "sparsities repeat": (lambda: rounds([0.5, 0.5]), ValueError, r"`sparsities` must ascend"),
    "sparsities reach 1": (lambda: rounds([0.5, 1.0]), ValueError, r"`sparsities` must be in"),
    "steps are negative": (
        lambda: shot(steps=-1),
        ValueError,
        r"`steps` must be an integer from 0",
    ),
    "steps are a float": (lambda: shot(steps=2.0), TypeError, r"`steps` must be one integer"),
    "finetune_steps are negative": (
        lambda: shot(finetune_steps=-1),
        ValueError,
        r"`finetune_steps` must be an integer from 0",
    ),
    "rewinds to the end": (
        lambda: lottery_ticket(same, PARAMS, [0.5], steps=3, rewind_to=3),
        ValueError,
        r"`rewind_to` must be less than `steps`, which is 3, got 3",
    ),
    "no steps to rewind": (
        lambda: rewind_learning_rate(same, PARAMS, [0.5], steps=0),
        ValueError,
        r"`steps` must be an integer from 1",
    ),
    "scores are no function": (lambda: shot(scores=3), TypeError, r"`scores` must be a function"),
    "scores are not called": (
        lambda: shot(scores=criteria.random),
        TypeError,
        r"`scores` must be .* call it first",
    ),
    "scores need gradients": (
        lambda: shot(scores=criteria.gradient),
        ValueError,
        r"`scores` must give .*at 'net\.w'.*lambda params, masks: criteria\.taylor",
    ),
    "scores leave a leaf out": (
        lambda: shot(scores=lambda p, m: {"b": p["b"], "net": {"w": None}}),
        ValueError,
        r"`scores` must give .* got None at 'net\.w'",
    ),
    "scores have another shape": (
        lambda: shot(scores=lambda p, m: {"b": p["b"], "net": {"w": W[:2]}}),
        ValueError,
        r"`scores` must have the shapes of `params`: at 'net\.w'",
    ),
    "scores are NaN": (
        lambda: shot(scores=lambda p, m: {"b": p["b"], "net": {"w": W * np.nan}}),
        ValueError,
        r"`scores` must not be NaN: 20 of 20",
    ),
    "an allocation cannot be met": (
        lambda: rounds(
            [0.1, 0.9], allocation=allocation.override(allocation.uniform, {"net.w": 0.9})
        ),
        ValueError,
        r"`densities` must",
    ),
    "evaluate is no function": (lambda: shot(evaluate=3), TypeError, r"`evaluate` must be a func"),
    "evaluate returns a number": (
        lambda: shot(evaluate=lambda p: 0.5),
        TypeError,
        r"`evaluate` must return numbers by their names.*got 0\.5",
    ),
    "evaluate names by numbers": (
        lambda: shot(evaluate=lambda p: {1: 0.5}),
        TypeError,
        r"`evaluate` must name its numbers by strings, got 1",
    ),
    "evaluate returns words": (
        lambda: shot(evaluate=lambda p: {"error": "low"}),
        TypeError,
        r"one real number a name, got 'low' for 'error'",
    ),
    "evaluate returns a boolean": (
        lambda: shot(evaluate=lambda p: {"good": True}),
        TypeError,
        r"one real number a name, got bool\[\] for 'good'",
    ),
    "evaluate returns an array": (
        lambda: shot(evaluate=lambda p: {"errors": W}),
        TypeError,
        r"got float32\[4,5\] for 'errors'",
    ),
    "evaluate returns a percentage": (
        lambda: shot(evaluate=lambda p: {"accuracy": 98.2}),
        ValueError,
        r"`evaluate` must return a fraction in \[0, 1\].* for 'accuracy', got 98\.2",
    ),
    "params are traced": (
        lambda: jax.jit(lambda w: shot(params={"w": w}))(W),
        TypeError,
        r"`params` must hold .* known, got float32\[4,5\] at 'w' .* outside of jit",
    ),
    "params are known inside of jit": (
        lambda: jax.jit(lambda: shot(params={"w": W}))(),
        TypeError,
        r"`params` must hold .* at 'w' while JAX traces",
    ),
    "key is traced": (
        lambda: jax.vmap(lambda key: shot(key=key))(jax.random.split(KEY)),
        TypeError,
        r"`key` must be known",
    ),
    "key is a seed": (lambda: shot(key=0), TypeError, r"`key` must be a PRNG key"),
    "progress is a number": (lambda: shot(progress=1), TypeError, r"`progress` must be True"),
    "geometric of nothing": (
        lambda: pruning.geometric(0.0, 3),
        ValueError,
        r"`sparsity` must be >",
    ),
    "geometric of hardly anything": (
        lambda: pruning.geometric(1e-17, 3),
        ValueError,
        r"`sparsity` must be far enough .* got 1e-17 in 3 rounds",
    ),
    "geometric without rounds": (
        lambda: pruning.geometric(0.5, 0),
        ValueError,
        r"`rounds` must be an integer from 1",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "pattern"), ERRORS.values(), ids=ERRORS)
def test_bad_call_says_what_is_wrong(call, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}") as info:
        call()
    assert info.type is error


def test_an_allocation_that_cannot_be_met_is_refused_before_training():
    spy = Spy()
    with pytest.raises(ValueError, match="densities"):
        iterative(
            spy,
            PARAMS,
            [0.1, 0.9],
            steps=1,
            finetune_steps=1,
            allocation=allocation.override(allocation.uniform, {"net.w": 0.9}),
        )
    assert not spy.rounds
