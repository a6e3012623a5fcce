"""Checkpoints with orbax: a run that is killed and resumed is, bit for bit, the whole one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from same_bits import assert_same_bits, bits

import sparsejax as sj
from sparsejax import dynamic, schedules

RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(12, 8, 4)), jnp.float32)  # a batch a step
TARGETS = jnp.asarray(RNG.normal(size=(12, 8, 2)), jnp.float32)


def rising():
    return schedules.linear(0.0, 0.7, begin_step=1, end_step=10)


def dropping():
    return schedules.cosine(0.4, 0.0, begin_step=0, end_step=10)


WRAPPERS = {
    "gradual": lambda inner: dynamic.gradual(inner, rising(), every=2),
    "set_": lambda inner: dynamic.set_(inner, 0.5, dropping(), key=jax.random.key(0), every=2),
    "rigl": lambda inner: dynamic.rigl(inner, 0.5, dropping(), key=jax.random.key(0), every=2),
    "straight_through": lambda inner: dynamic.straight_through(
        inner, rising(), every=2, backward_sparsity=0.3
    ),
    "movement": lambda inner: dynamic.movement(inner, rising(), every=2),
}


def inner_optimizer():
    """With all kinds of state: typed keys, hyperparameters, masked and empty nodes."""
    decayed = optax.masked(optax.add_decayed_weights(1e-3), {"w1": True, "b1": False, "w2": True})
    noisy = optax.add_noise(1e-3, 0.5, key=jax.random.key(3))
    # (Around Adam, `inject_hyperparams` turns bfloat16 moments of mixed trees into float32.)
    rate = optax.inject_hyperparams(optax.scale_by_learning_rate)(0.05)
    return optax.chain(noisy, decayed, optax.scale_by_adam(), rate)


class Training:
    """A tiny network in bfloat16 and float32; the data of a step follow from its number."""

    def __init__(self, wrapper):
        self.tx = WRAPPERS[wrapper](inner_optimizer())
        self.step = jax.jit(self._step)

    def start(self):
        rng = np.random.default_rng(1)
        shapes = {"w1": (4, 6), "b1": (6,), "w2": (6, 2)}
        params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
        params["w2"] = params["w2"].astype(jnp.bfloat16)
        state = self.tx.init(params)
        return sj.apply_masks(params, dynamic.masks(state)), state

    def run(self, carry, begin, end):
        for i in range(begin, end):
            carry = self.step(carry, INPUTS[i], TARGETS[i])
        return carry

    def _step(self, carry, x, y):
        params, state = carry

        def loss(params):
            hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
            return jnp.mean(optax.l2_loss(hidden @ params["w2"], y))

        updates, state = self.tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state


class Resumed(NamedTuple):
    saved: Any
    restored: Any
    uninterrupted: Any
    resumed: Any


@pytest.fixture(scope="module", params=WRAPPERS)
def resumed(request, tmp_path_factory):
    """Six steps, a checkpoint, six more; and the latter six from the checkpoint."""
    path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    training = Training(request.param)
    saved = training.run(training.start(), 0, 6)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, jax.eval_shape(training.start))
    return Resumed(saved, restored, training.run(saved, 6, 12), training.run(restored, 6, 12))


def test_checkpoint_holds_the_bits_dtypes_and_containers(resumed):
    assert_same_bits(resumed.restored, resumed.saved)


def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(resumed):
    assert_same_bits(resumed.resumed, resumed.uninterrupted)


def test_masks_change_after_the_checkpoint(resumed):
    """So that equal masks at the end say something."""
    before, after = (dynamic.masks(carry[1]) for carry in (resumed.saved, resumed.resumed))
    assert any(bool((before[name] != after[name]).any()) for name in ("w1", "w2"))


def test_resumed_params_obey_the_masks(resumed):
    params, state = resumed.resumed
    dynamic.check(state, params)


WORKER = Path(__file__).with_name("resume_worker.py")
STEPS, EVERY, KILLS = 240, 4, 20


class Chain(NamedTuple):
    """One run that was killed again and again, until it was let finish.

    `steps` are those with a checkpoint, after each kill; `unfinished` what a kill left half
    written; `problems` checkpoints that could not be read or were not the uninterrupted run's.
    """

    steps: list
    unfinished: list
    problems: list
    last: dict
    uninterrupted: dict


def start(folder, cache, keep, out):
    arguments = [sys.executable, WORKER, cache, folder, STEPS, EVERY, keep]
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        env=os.environ | settings,
        stdout=out,
        stderr=subprocess.STDOUT,
    )


def finish(folder, cache, keep, log):
    with log.open("w") as out:
        assert start(folder, cache, keep, out).wait(timeout=300) == 0, log.read_text()


def names(folder):
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def committed(folder):
    return {int(name) for name in names(folder) if name.isdigit()}


def unfinished(folder):
    return {name for name in names(folder) if name.endswith("-tmp")}


def wait_for(condition, process, log):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"finished before it was killed: {log.read_text()}"
        assert time.monotonic() < deadline, f"nothing happened: {log.read_text()}"
        time.sleep(0.001)


def kill(process, folder, log, rng, saves, while_saving):
    """Kills it after so many new checkpoints; a little later, or as soon as it writes the next."""
    wait_for(lambda: "from step" in log.read_text(), process, log)
    before = committed(folder)
    wait_for(lambda: len(committed(folder) - before) >= saves, process, log)
    if while_saving:
        wait_for(lambda: unfinished(folder), process, log)
        time.sleep(rng.uniform(0, 0.005))
    else:
        time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.wait()


def checkpoints(folder):
    """Every checkpoint that orbax lists, as flat dicts; an exception where it cannot be read."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    handler = ocp.StandardCheckpointHandler()
    found = {}
    with ocp.CheckpointManager(folder, item_handlers=handler, options=options) as manager:
        for step in manager.all_steps():
            try:
                metadata = manager.item_metadata(step).tree
                like = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), metadata)
                tree = manager.restore(step, args=ocp.args.StandardRestore(like))
                rows = jax.tree_util.tree_leaves_with_path(tree)
                found[step] = {jax.tree_util.keystr(path): bits(leaf) for path, leaf in rows}
            except Exception as error:
                found[step] = error
    return found


def killed_chain(root):
    cache, log, whole, killed = (root / name for name in ("cache", "log", "whole", "killed"))
    finish(whole, cache, 1000, log)
    expected = checkpoints(whole / str(STEPS))
    assert sorted(expected) == list(range(EVERY, STEPS + 1, EVERY))

    rng, folder = np.random.default_rng(0), killed / str(STEPS)
    saves = rng.permutation(np.repeat([0, 1, 2, 3], KILLS // 4))
    steps, left, problems = [], [], []
    for number, count in enumerate(saves):
        with log.open("w") as out:
            process = start(killed, cache, 0, out)
            try:
                kill(process, folder, log, rng, count, while_saving=number % 2 == 0)
            finally:
                process.kill()
                process.wait()
        found = checkpoints(folder)
        steps.append(sorted(found))
        left.append(unfinished(folder))
        problems += [(number, s, tree) for s, tree in found.items() if tree != expected[s]]
    finish(killed, cache, 0, log)
    return Chain(steps, left, problems, checkpoints(folder)[STEPS], expected[STEPS])


@pytest.mark.long
def test_run_killed_20_times_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    """Several facts in one test, because a minute goes into what they are about."""
    chain = killed_chain(tmp_path)
    # Params, masks and optimizer state.
    assert isinstance(chain.last, dict) and chain.last == chain.uninterrupted
    paths = " ".join(chain.last)
    assert all(f"[{part}]" in paths for part in ("0", "1", "'masks'", "'mu'", "'step'"))
    # After each kill, each checkpoint was readable, and the one of the uninterrupted run.
    assert not chain.problems
    # No kill cost more than the steps since the latest checkpoint, and two are enough on disk.
    latest = [max(steps, default=0) for steps in chain.steps]
    assert latest == sorted(latest)
    assert max(map(len, chain.steps)) <= 3
    # So that all that says something: kills hit early and late, and half written checkpoints.
    assert len(latest) == 20 and latest[0] < STEPS // 4 and STEPS // 3 < latest[-1] < STEPS
    assert sum(map(bool, chain.unfinished)) >= 5
