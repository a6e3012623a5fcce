"""How the networks of `lenet_tables.py` are trained: a recipe for each of the two.

SGD with momentum and cosine decay. Pruned networks, random masks and small dense networks learn the
dense network's softened outputs (`distillation.logits`), all others the labels. Errors are those
after the last step, never the best of several.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
from sparsejax import (
    criteria,
    datasets,
    dependency,
    distillation,
    dynamic,
    masking,
    models,
    quantization,
    schedules,
    selection,
    shrinking,
)

TEMPERATURE = 2.0
BATCH = 128
MOMENTUM = 0.9
TUNING, TUNING_RATE = 2, 1e-3  # epochs and Adam's rate, of codebooks


@dataclass(frozen=True)
class Recipe:
    """A network and its training.

    Attributes:
      model: makes the NNX module, from `rngs`.
      apply: the same function of the same params, as fast as training needs it.
      rate: the learning rate, with cosine decay to zero.
      epochs: of the dense training, of a control.
      pruning: (density, epochs) of pruning and fine-tuning at that density and below; the last
        that fits counts.
      chained: each size starts where the next larger one ended, else where the dense one did.
      small: the widths of a dense network with so many weights.
      scanned: an epoch is one program; not with convolutions, which XLA's loops on CPU make slow.
    """

    model: Callable[..., nnx.Module]
    apply: Callable[[Any, Any], jax.Array] | None
    rate: float
    epochs: tuple[int, int]
    pruning: tuple[tuple[float, int], ...]
    chained: bool
    small: Callable[[int], tuple[int, ...]]
    scanned: bool


class Task:
    """A network, MNIST on the device, and what trains one on the other."""

    def __init__(self, recipe: Recipe, data: datasets.Dataset) -> None:
        """Puts the data on the device."""
        self.recipe = recipe
        self.x, self.test = (
            jnp.asarray(x / np.float32(255)) for x in (data.train_images, data.test_images)
        )
        self.y, self.truth = jnp.asarray(data.train_labels), np.asarray(data.test_labels)
        self.apply = recipe.apply or models.functional(recipe.model(rngs=nnx.Rngs(0)))[0]
        self._outputs = jax.jit(self.apply)

    @property
    def steps(self) -> int:
        """Updates of an epoch."""
        return len(self.x) // BATCH

    @property
    def weights(self) -> int:
        """Weights of the dense network."""
        return sum(w.size for w in jax.tree.leaves(self.init(0)) if w.ndim > 1)

    def init(self, seed: int) -> Any:
        """Params before any training."""
        return nnx.to_pure_dict(models.functional(self.recipe.model(rngs=nnx.Rngs(seed)))[1])

    def outputs(self, params: Any, x: jax.Array) -> jax.Array:
        """Logits, in ten parts, to bound the memory."""
        return jnp.concatenate([self._outputs(params, part) for part in jnp.split(x, 10)])

    def error(self, params: Any) -> float:
        """The fraction of the test images that get the wrong digit."""
        return float(np.mean(np.asarray(self.outputs(params, self.test).argmax(-1)) != self.truth))

    def optimizer(self, epochs: int, rate: float | None = None) -> optax.GradientTransformation:
        """SGD with momentum, cosine decay, and L2 on the weights."""
        decay = optax.add_decayed_weights(2e-4, mask=partial(jax.tree.map, lambda w: w.ndim > 1))
        cosine = optax.cosine_decay_schedule(rate or self.recipe.rate, epochs * self.steps)
        return optax.chain(decay, optax.sgd(cosine, momentum=MOMENTUM))

    def dense(self, seed: int, advance: Callable[[str], None]) -> Any:
        """The dense network."""
        epochs = self.recipe.epochs[0]
        return self.fit(self.init(seed), self.optimizer(epochs), epochs, seed, None, advance)

    def pruned(
        self,
        start: Any,
        density: float,
        seed: int,
        teacher: jax.Array | None,
        advance: Callable[[str], None],
    ) -> Any:
        """Pruned by magnitude while it trains, in the first half of the steps; then fine-tuned."""
        *_, epochs = (n for limit, n in self.recipe.pruning if density <= limit)
        start = self.compacted(start) if self.recipe.chained else start
        count = masking.sparsity(start).prunable
        sparsity = 1 - selection.kept_count(1 - density, self.weights) / count.size
        cubic = schedules.cubic(count.sparsity, sparsity, 0, epochs * self.steps // 2)
        tx = dynamic.gradual(self.optimizer(epochs), cubic, every=50)
        return self.fit(start, tx, epochs, seed, teacher, advance)

    def compacted(self, params: Any) -> Any:
        """The same function without the units that pruning has emptied: an epoch takes less."""
        params = _folded(params)
        apply, _ = models.functional(self.recipe.model(rngs=nnx.Rngs(0)))
        groups = dependency.trace(apply, params, self.x[:1])
        plan = shrinking.plan(groups, jax.tree.map(lambda w: w != 0, params))
        return shrinking.shrink(params, plan)

    def masked(
        self, params: Any, masks: Any, seed: int, teacher: Any, advance: Callable[[str], None]
    ) -> Any:
        """Trained from the start with masks that stay."""
        epochs = self.recipe.epochs[1]
        tx = sj.keep_masks(self.optimizer(epochs), masks)
        return self.fit(sj.apply_masks(params, masks), tx, epochs, seed, teacher, advance)

    def small(self, density: float, seed: int, teacher: Any, advance: Callable[[str], None]) -> Any:
        """A dense network with as many weights as the sparse one keeps."""
        epochs, widths = self.recipe.epochs[1], self.recipe.small(round(density * self.weights))
        narrow = _narrowed(self.init(seed), widths, seed)
        # Few units die at the rate of many.
        tx = self.optimizer(epochs, 0.1 * self.recipe.rate)
        return self.fit(narrow, tx, epochs, seed, teacher, advance)

    def tuned(
        self, shared: Any, seed: int, teacher: jax.Array, advance: Callable[[str], None]
    ) -> Any:
        """The same codes with codebooks (and biases) trained on."""
        values, codes = quantization.partition(shared)
        tx = optax.adam(optax.cosine_decay_schedule(TUNING_RATE, TUNING * self.steps))

        def network(values: Any) -> Any:
            return quantization.dequantize(quantization.combine(values, codes))

        fitted = self.fit(values, tx, TUNING, seed, teacher, advance, network)
        return quantization.combine(fitted, codes)

    def snip(self, density: float, seed: int) -> tuple[Any, Any]:
        """Params at initialization, and masks by the sensitivity of the loss there."""
        params = self.init(seed)
        gradient = jax.jit(jax.grad(self.loss))
        rows = np.random.default_rng(seed).permutation(len(self.x))[: min(80, self.steps) * BATCH]
        grads = criteria.mean_gradients(gradient, params, rows.reshape(-1, BATCH))
        return params, masking.topk(criteria.snip(params, grads), 1 - density)

    def loss(self, params: Any, rows: jax.Array, teacher: jax.Array | None = None) -> jax.Array:
        """The cross-entropy with the labels; with a teacher's logits the distance from these."""
        logits = self.apply(params, self.x[rows])
        if teacher is not None:
            return distillation.logits(logits, teacher[rows], temperature=TEMPERATURE)
        return optax.softmax_cross_entropy_with_integer_labels(logits, self.y[rows]).mean()

    def fit(
        self,
        params: Any,
        tx: optax.GradientTransformation,
        epochs: int,
        seed: int,
        teacher: jax.Array | None,
        advance: Callable[[str], None],
        network: Callable[[Any], Any] = lambda params: params,
    ) -> Any:
        """Params after so many epochs, each in an order of its own.

        Args:
          params: what is trained.
          tx: the optimizer.
          epochs: how many.
          seed: of the orders.
          teacher: the logits of all examples; `None`: the labels teach.
          advance: is told of each epoch.
          network: makes the network's params of what is trained.

        Returns:
          What `params` have become.
        """

        def loss(params: Any, rows: jax.Array) -> jax.Array:
            return self.loss(network(params), rows, teacher)

        def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            params, state = carry
            grads = jax.grad(loss)(params, rows)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        if self.recipe.scanned:
            epoch = jax.jit(lambda carry, order: jax.lax.scan(step, carry, order)[0])
        else:
            one = jax.jit(lambda carry, rows: step(carry, rows)[0])
            epoch = partial(_loop, one)
        carry, rng = (params, tx.init(params)), np.random.default_rng(seed)
        for i in range(epochs):
            order = rng.permutation(len(self.x))[: self.steps * BATCH]
            carry = jax.block_until_ready(epoch(carry, order.reshape(self.steps, BATCH)))
            advance(f"epoch {i + 1} of {epochs}")
        return carry[0]


def _loop(step: Callable[[Any, Any], Any], carry: Any, order: np.ndarray) -> Any:
    for rows in order:
        carry = step(carry, rows)
    return carry


def _narrowed(params: Any, widths: tuple[int, ...], seed: int) -> Any:
    """Params of the same layers with other widths, drawn anew."""
    draw, names = nnx.initializers.lecun_normal(), sorted(params)
    keys = jax.random.split(jax.random.key(seed), len(names))
    answer, old, new = {}, 1, 1
    for name, key, width in zip(names, keys, (*widths, None), strict=True):
        *window, inputs, outputs = params[name]["kernel"].shape
        # Of each channel before, so many inputs: the pixels, where a layer flattens them.
        shape = (*window, inputs // old * new, width or outputs)
        answer[name] = {"kernel": draw(key, shape), "bias": jnp.zeros(shape[-1])}
        old, new = outputs, shape[-1]
    return answer


def _folded(params: Any) -> Any:
    """The same function: units without inputs are constants, which the next biases take."""
    names, answer = sorted(params), jax.tree.map(np.array, params)
    for name, after in pairwise(names):
        (kernel, bias), following = (answer[name][k] for k in ("kernel", "bias")), answer[after]
        silent = ~kernel.any(tuple(range(kernel.ndim - 1)))
        constant = bias if name.startswith("conv") else np.maximum(bias, 0)
        # (window or pixels, inputs, outputs): inputs are channels, also behind a flatten.
        readers = following["kernel"].reshape(-1, bias.size, following["bias"].size)
        following["bias"] += constant[silent] @ readers[:, silent].sum(0)
        readers[:, silent] = bias[silent] = 0
    return jax.tree.map(jnp.asarray, answer)


def _small_mlp(weights: int) -> tuple[int, ...]:
    first = max(int(0.95 * weights / 784), 1)
    return first, max((weights - first * 784) // (first + 10), 1)


def _small_cnn(weights: int) -> tuple[int, ...]:
    scale = math.sqrt(weights / 430_500)
    first, second = max(round(20 * scale), 1), max(round(50 * scale), 2)
    left = weights - 25 * first - 25 * first * second
    return first, second, max(left // (16 * second + 10), 1)


def _xla_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)


@jax.custom_vjp
def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution whose derivative by `x` is a product for each tap.

    XLA's takes four times as long on CPU (37 ms against 9.5 for the second of LeNet-5).
    """
    return _xla_conv(x, kernel)


def _conv_forward(x: jax.Array, kernel: jax.Array) -> Any:
    return _conv(x, kernel), (x, kernel)


def _conv_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dkernel = jax.vjp(partial(_xla_conv, x), kernel)[1](dy)[0]
    batch, height, width, outputs = dy.shape
    rows, dx = dy.reshape(-1, outputs), jnp.zeros_like(x)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            tap = (rows @ kernel[i, j].T).reshape(batch, height, width, -1)
            dx = dx.at[:, i : i + height, j : j + width].add(tap)
    return dx, dkernel


_conv.defvjp(_conv_forward, _conv_backward)


def _first_conv_pooled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of one channel and its 2x2 max-pool, as one product: no gradient by `x`.

    For each pooled pixel the window of all four that it is the maximum of, and the kernel at its
    four places there.
    """
    size, ends = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
    taps = [(i, j) for i in range(size + 1) for j in range(size + 1)]
    windows = jnp.stack([x[:, i : i + ends : 2, j : j + ends : 2, 0] for i, j in taps], -1)
    placed = [
        jnp.pad(kernel[:, :, 0], ((a, 1 - a), (b, 1 - b), (0, 0))).reshape(len(taps), -1)
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    first, *others = jnp.split(windows @ jnp.concatenate(placed, 1), 4, -1)
    return reduce(jnp.maximum, others, first)


def lenet5_caffe(params: Any, x: jax.Array) -> jax.Array:
    """`models.LeNet5Caffe`, in 0.7 of the time a training step on two cores."""
    bias = {name: layer["bias"].reshape(1, 1, 1, -1) for name, layer in params.items()}
    x = _first_conv_pooled(x, params["conv1"]["kernel"]) + bias["conv1"]
    x = models.max_pool_2x2(_conv(x, params["conv2"]["kernel"])) + bias["conv2"]
    x = x.reshape(x.shape[0], -1)
    x = nnx.relu(x @ params["dense1"]["kernel"] + params["dense1"]["bias"][None])
    return x @ params["dense2"]["kernel"] + params["dense2"]["bias"][None]


LENETS = {
    "LeNet300100": Recipe(
        model=models.LeNet300100,
        apply=None,
        rate=0.2,
        epochs=(25, 20),
        pruning=((1, 30),),
        chained=False,
        small=_small_mlp,
        scanned=True,
    ),
    "LeNet5Caffe": Recipe(
        model=models.LeNet5Caffe,
        apply=lenet5_caffe,
        rate=0.05,
        epochs=(6, 20),
        pruning=((1, 4), (0.005, 12)),
        chained=True,
        small=_small_cnn,
        scanned=False,
    ),
}
