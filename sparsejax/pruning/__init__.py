"""Procedures: when to prune how much of a network, and how to train what is left.

======================= ================================ ==========================================
procedure               after pruning, weights are       and are trained
======================= ================================ ==========================================
`one_shot`              what they were                   on, for some more updates
`iterative`             what they were                   on, for some more updates, in each round
`lottery_ticket`        those of (nearly) the beginning  again, with the schedule from there
`rewind_learning_rate`  what they were                   again, with the schedule of the beginning
======================= ================================ ==========================================

Each is a plain loop over the user's own training, `train(params, round) -> params`: a `Round` says
which updates to run and which masks to obey, and carries the dense network, from which the pruned
one may learn (self-distillation). `geometric` makes the sparsities of the rounds. Each procedure
returns a `Pruned`: the params, the masks, and a `Record` of every round. `synflow` makes masks for
an untrained network, without data.

Example:
  A step that is compiled once for all rounds: the masks are in the optimizer's state, and the
  teacher of round 0 is the student itself, at a weight of zero.

  >>> import functools
  >>> import jax, jax.numpy as jnp, optax
  >>> import sparsejax as sj
  >>> from sparsejax import distillation, pruning
  >>> x = jax.random.normal(jax.random.key(0), (64, 8))
  >>> labels = jnp.argmax(x[:, :4] + 0.5 * x[:, 4:], axis=1)
  >>> def logits(params, batch):
  ...     return jax.nn.relu(batch @ params["in"]) @ params["out"]
  >>> def loss(params, batch):
  ...     losses = optax.losses.softmax_cross_entropy_with_integer_labels
  ...     return losses(logits(params, batch), labels).mean()
  >>> compiled = []
  >>> @functools.partial(jax.jit, static_argnums=0)
  ... def step(tx, params, state, teacher, weight):
  ...     compiled.append("step")  # runs when it is traced only
  ...     taught = distillation.distilled(
  ...         loss, logits, functools.partial(logits, teacher), weight=weight)
  ...     updates, state = tx.update(jax.grad(taught)(params, x), state, params)
  ...     return optax.apply_updates(params, updates), state
  >>> adam = optax.adam(0.01)
  >>> everything = {"in": jnp.array(True), "out": jnp.array(True)}
  >>> tx = sj.keep_masks(adam, everything)  # what it does is in the masks of its state
  >>> def train(params, round):
  ...     state = sj.keep_masks(adam, round.masks).init(params)
  ...     teacher, weight = (params, 0.0) if round.teacher is None else (round.teacher, 0.5)
  ...     for _ in range(round.begin, round.end):
  ...         params, state = step(tx, params, state, teacher, weight)
  ...     return params
  >>> init = jax.nn.initializers.he_normal()
  >>> params = {"in": init(jax.random.key(1), (8, 32)), "out": init(jax.random.key(2), (32, 4))}
  >>> found = pruning.iterative(
  ...     train, params, pruning.geometric(0.8, 3), steps=100, finetune_steps=50,
  ...     evaluate=lambda params: {"loss": loss(params, x)}, progress=False)
  >>> [record.nonzeros for record in found.history], compiled
  ([384, 225, 131, 77], ['step'])
  >>> found.history[-1].metrics["loss"] < 0.2
  True
"""

from sparsejax.pruning._procedures import (
    iterative,
    lottery_ticket,
    one_shot,
    rewind_learning_rate,
)
from sparsejax.pruning._rounds import Pruned, Record, Round
from sparsejax.pruning._sparsities import geometric
from sparsejax.pruning._synflow import synflow

__all__ = [
    "Pruned",
    "Record",
    "Round",
    "geometric",
    "iterative",
    "lottery_ticket",
    "one_shot",
    "rewind_learning_rate",
    "synflow",
]
