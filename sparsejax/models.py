"""The reference networks of the pruning literature, in Flax NNX, and their pure functions.

`CNN` is the network of the examples; `LeNet300100` and `LeNet5Caffe` are the two on which pruning
papers compare. Each takes images of any size and any number of channels: the width of the first
dense layer follows from `input_shape`. `functional` turns any of them, or an NNX module of one's
own, into `apply(params, x)` with parameters that are a plain pytree, which is all that the rest of
the library asks for.

Weights start as Flax's defaults have it: kernels LeCun normal (variance 1 / fan-in, truncated at
two standard deviations), biases zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

Apply: TypeAlias = Callable[[Any, jax.Array | np.ndarray], jax.Array]
"""`(params, x) -> outputs`, without side effects."""

# The entries of a 2x2 window in row-major order, over (batch, height, 2, width, 2, channels).
_ORDER = np.arange(4, dtype=np.int8).reshape(1, 1, 2, 1, 2, 1)


class CNN(nnx.Module):
    """The reference network: two convolutions, two dense layers.

    conv 32 (3x3) - ReLU - max-pool 2 - conv 64 (3x3) - ReLU - max-pool 2 - dense 100 - ReLU -
    dense 10, for ten classes.

    Convolutions are not padded and pooling drops an odd last row or column, so a side of n pixels
    leaves ((n - 2) // 2 - 2) // 2: 28 gives 5, and 10 is the smallest, which gives 1. On 28x28x1
    images with ten classes there are 320 + 18,496 + 160,100 + 1,010 = 179,926 parameters.

    Args:
      input_shape: (height, width, channels) of one image, at least 10x10.
      num_classes: the number of logits.
      rngs: the stream `params` (or the default one) draws the weights.

    Raises:
      ValueError: if `input_shape` is not three positive integers or too small, or if `num_classes`
        is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = CNN(input_shape=(32, 32, 3), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((4, 32, 32, 3))).shape
      (4, 10)
      >>> model.dense1.kernel.shape  # 64 channels of 6x6
      (2304, 100)
    """

    def __init__(
        self, input_shape: Sequence[int] = (28, 28, 1), num_classes: int = 10, *, rngs: nnx.Rngs
    ) -> None:
        self.input_shape = _checked_shape(input_shape, num_classes)
        width = _flat_width(self.input_shape, kernel=3, channels=64)
        self.conv1 = _conv(self.input_shape[2], 32, kernel=3, rngs=rngs)
        self.conv2 = _conv(32, 64, kernel=3, rngs=rngs)
        self.dense1 = nnx.Linear(width, 100, rngs=rngs)
        self.dense2 = nnx.Linear(100, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array | np.ndarray) -> Float[Array, "batch classes"]:
        """The logits of a batch of images; see `LeNet300100.__call__`, which says more."""
        x = _checked_images(x, self.input_shape)
        x = max_pool_2x2(nnx.relu(self.conv1(x)))
        x = max_pool_2x2(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dense1(_flatten(x)))
        return self.dense2(x)


class LeNet300100(nnx.Module):
    """LeNet-300-100: dense 300 - ReLU - dense 100 - ReLU - dense, on the flattened image.

    On 28x28x1 images with ten classes there are 235,500 + 30,100 + 1,010 = 266,610 parameters,
    266,200 of them weights.

    Args:
      input_shape: (height, width, channels) of one image, flattened in this order.
      num_classes: the number of logits.
      rngs: the stream `params` (or the default one) draws the weights.

    Raises:
      ValueError: if `input_shape` is not three positive integers, or if `num_classes` is not
        positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> LeNet300100(rngs=nnx.Rngs(0))(jnp.zeros((4, 28, 28, 1))).shape
      (4, 10)

    References:
      LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
      1998, https://doi.org/10.1109/5.726791. The ReLUs are those of the pruning papers since Han,
      Pool, Tran and Dally, "Learning both weights and connections for efficient neural networks",
      2015, https://arxiv.org/abs/1506.02626.
    """

    def __init__(
        self, input_shape: Sequence[int] = (28, 28, 1), num_classes: int = 10, *, rngs: nnx.Rngs
    ) -> None:
        self.input_shape = _checked_shape(input_shape, num_classes)
        self.dense1 = nnx.Linear(math.prod(self.input_shape), 300, rngs=rngs)
        self.dense2 = nnx.Linear(300, 100, rngs=rngs)
        self.dense3 = nnx.Linear(100, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array | np.ndarray) -> Float[Array, "batch classes"]:
        """The logits of a batch of images.

        Args:
          x: images (batch, height, width, channels), floating point, usually scaled to [0, 1].

        Returns:
          Logits (batch, num_classes), before any softmax. Their dtype is that to which JAX promotes
          `x` and the parameters: bfloat16 if both are, float32 if only one of them is.

        Raises:
          ValueError: if `x` is not a batch of images of the model's `input_shape`.
          TypeError: if `x` is not floating point, as raw pixels are not.
        """
        x = _flatten(_checked_images(x, self.input_shape))
        x = nnx.relu(self.dense1(x))
        x = nnx.relu(self.dense2(x))
        return self.dense3(x)


class LeNet5Caffe(nnx.Module):
    """The LeNet-5 of Caffe's MNIST example, which pruning papers call LeNet-5 or LeNet-5-Caffe.

    conv 20 (5x5) - max-pool 2 - conv 50 (5x5) - max-pool 2 - dense 500 - ReLU - dense.

    There is no nonlinearity after the convolutions but the pooling: so it is in Caffe, and so in
    SNIP's code. On 28x28x1 images with ten classes there are
    520 + 25,050 + 400,500 + 5,010 = 431,080 parameters, the "431K" of the papers; 430,500 of them
    are weights. A side of n pixels leaves ((n - 4) // 2 - 4) // 2: 28 gives 4, and 16 is the
    smallest, which gives 1.

    Three things differ from Caffe, none of them in what the network can compute at 28x28: Caffe's
    "xavier" filler is uniform, with the same variance 1 / fan-in; it flattens channels first; and
    its pooling would keep an odd last row or column, which ours drops.

    Args:
      input_shape: (height, width, channels) of one image, at least 16x16.
      num_classes: the number of logits.
      rngs: the stream `params` (or the default one) draws the weights.

    Raises:
      ValueError: if `input_shape` is not three positive integers or too small, or if `num_classes`
        is not positive.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> apply, params = functional(LeNet5Caffe(rngs=nnx.Rngs(0)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      431080

    References:
      Caffe, examples/mnist/lenet.prototxt,
      https://github.com/BVLC/caffe/blob/master/examples/mnist/lenet.prototxt.
      Lee, Ajanthan and Torr, "SNIP: single-shot network pruning based on connection sensitivity",
      2019, https://arxiv.org/abs/1810.02340.
    """

    def __init__(
        self, input_shape: Sequence[int] = (28, 28, 1), num_classes: int = 10, *, rngs: nnx.Rngs
    ) -> None:
        self.input_shape = _checked_shape(input_shape, num_classes)
        width = _flat_width(self.input_shape, kernel=5, channels=50)
        self.conv1 = _conv(self.input_shape[2], 20, kernel=5, rngs=rngs)
        self.conv2 = _conv(20, 50, kernel=5, rngs=rngs)
        self.dense1 = nnx.Linear(width, 500, rngs=rngs)
        self.dense2 = nnx.Linear(500, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array | np.ndarray) -> Float[Array, "batch classes"]:
        """The logits of a batch of images; see `LeNet300100.__call__`, which says more."""
        x = _checked_images(x, self.input_shape)
        x = max_pool_2x2(self.conv1(x))
        x = max_pool_2x2(self.conv2(x))
        x = nnx.relu(self.dense1(_flatten(x)))
        return self.dense2(x)


def functional(model: nnx.Module) -> tuple[Apply, Any]:
    """Takes a module apart into a pure function and its parameters.

    `params` shares nothing with `model` that could change: training one leaves the other alone.
    `apply` works under `jax.jit`, `jax.grad`, `jax.vmap` and `jax.eval_shape`; it builds the module
    anew at every call, which costs nothing once it is compiled and some 0.2 ms where it is not.

    Args:
      model: an NNX module whose arrays are all `nnx.Param`.

    Returns:
      `apply`, with `apply(params, x)` equal to `model(x)`, and `params`, an `nnx.State`. `apply`
      also takes `nnx.as_pure(params)`, nested dicts, and whatever else has leaves at the same
      paths, such as pruned parameters; shapes may differ from the model's as far as its layers
      allow, so parameters whose channels have been cut work too.

    Raises:
      ValueError: if `model` holds other arrays, such as the statistics of a BatchNorm or the key of
        a Dropout: a pure function of the parameters could neither see nor update them. By `apply`,
        if the paths of its parameters are not those of the model.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> apply, params = functional(CNN(rngs=nnx.Rngs(0)))
      >>> x = jnp.ones((2, 28, 28, 1))
      >>> grads = jax.jit(jax.grad(lambda params: apply(params, x).sum()))(params)
      >>> bool(jnp.allclose(grads["dense2"]["bias"][...], 2.0))
      True
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            "`model` must be an NNX module such as CNN(rngs=nnx.Rngs(0)), got "
            f"{model if isinstance(model, type) else type(model).__name__}."
        )
    graph, *states = nnx.split(model, nnx.Param, ...)
    own, rest = states
    _refuse_other_state(rest)
    # `split` hands out the model's own variables; new ones around the same arrays cannot be written
    # to through the model.
    params = jax.tree.map(lambda leaf: leaf, own)
    expected = _paths(params)

    def apply(params: Any, x: jax.Array | np.ndarray) -> jax.Array:
        # Bare arrays, so that `merge` makes variables of its own, which a model may write to.
        bare = nnx.as_pure(params)
        # `merge` itself would match leaves by their order.
        _check_paths(_paths(bare), expected)
        outputs: jax.Array = nnx.merge(graph, bare)(x)
        return outputs

    return apply, params


@jax.custom_jvp
def max_pool_2x2(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch half_height half_width channels"]:
    """The maxima of 2x2 windows; an odd last row or column is dropped.

    Values and derivatives are those of `nnx.max_pool(x, (2, 2), strides=(2, 2))`, bit for bit: the
    gradient goes to the first of equal maxima. Only the derivative is computed otherwise, because
    XLA's `select_and_scatter` is slow on CPUs: windows are axes of a reshaped array, and the winner
    of each is found by comparing. A training step of `CNN` is two to four times as fast. The values
    themselves stay with `reduce_window`: with a reduction of the reshaped array, evaluation takes
    three to four times as long.

    Args:
      x: (batch, height, width, channels), floating point.

    Returns:
      (batch, height // 2, width // 2, channels), of the dtype of `x`. NaN wins over everything.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 3.0, 9.0], [3.0, 2.0, 9.0]]).reshape(1, 2, 3, 1)
      >>> print(max_pool_2x2(x).squeeze())
      3.0
      >>> print(jax.grad(lambda x: max_pool_2x2(x).sum())(x).squeeze())
      [[0. 1. 0.]
       [0. 0. 0.]]
    """
    window = (1, 2, 2, 1)
    pooled: jax.Array = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    return pooled


@max_pool_2x2.defjvp
def _max_pool_2x2_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = max_pool_2x2(x)
    is_max = _windows(x) == y[:, :, None, :, None, :]
    # A window with NaN equals its maximum nowhere and counts as won by its last entry.
    winner = jnp.where(is_max, _ORDER, np.int8(3)).min((2, 4), keepdims=True)
    dy = jnp.where(winner == _ORDER, _windows(dx), 0).sum((2, 4))
    return y, dy


def _windows(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def _conv(channels_in: int, channels_out: int, *, kernel: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(channels_in, channels_out, (kernel, kernel), padding="VALID", rngs=rngs)


def _flatten(x: jax.Array) -> jax.Array:
    # Not `reshape(batch, -1)`, which an empty batch leaves undefined.
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _flat_width(input_shape: tuple[int, ...], *, kernel: int, channels: int) -> int:
    """The features that two unpadded convolutions, each pooled by 2, leave of an image."""
    height, width, _ = input_shape
    # One pixel at the end needs 2 before the pool, k + 1 before the convolution, 2k + 2 before the
    # first pool, and 3k + 1 before the first convolution.
    smallest = 3 * kernel + 1
    if min(height, width) < smallest:
        raise ValueError(
            f"`input_shape` must be at least {smallest}x{smallest}, got {height}x{width}: two "
            f"{kernel}x{kernel} convolutions, each with a 2x2 max-pool, leave nothing of it; pad "
            "or enlarge the images, or use LeNet300100, which takes any size."
        )
    for _ in range(2):
        height, width = (height - kernel + 1) // 2, (width - kernel + 1) // 2
    return height * width * channels


def _checked_shape(input_shape: Sequence[int], num_classes: int) -> tuple[int, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else (input_shape,)
    if len(shape) != 3 or not all(_is_positive(size) for size in shape):
        raise ValueError(
            "`input_shape` must be (height, width, channels), three positive integers without the "
            f"batch, got {shape}; gray images have one channel, as in (28, 28, 1)."
        )
    if not _is_positive(num_classes):
        raise ValueError(f"`num_classes` must be a positive integer, got {num_classes!r}.")
    return shape


def _is_positive(size: Any) -> bool:
    return isinstance(size, int | np.integer) and int(size) > 0


def _checked_images(x: jax.Array | np.ndarray, input_shape: tuple[int, ...]) -> jax.Array:
    if x.ndim != 4 or x.shape[1:] != input_shape:
        expected = ", ".join(map(str, input_shape))
        raise ValueError(
            f"`x` must have shape (batch, {expected}), a batch of images of the model's "
            f"`input_shape`, got {x.shape}; add a missing axis with x[None] (batch) or "
            "x[..., None] (channels), or build the model for these images."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`x` must be floating point, got {x.dtype}; scale pixels first: "
            "`x.astype(np.float32) / 255`."
        )
    return jnp.asarray(x)


def _refuse_other_state(rest: Any) -> None:
    found = [f"{type(leaf).__name__} at {_join(path)!r}" for path, leaf in nnx.to_flat_state(rest)]
    if found:
        raise ValueError(
            f"`model` must hold no arrays but nnx.Param, got {', '.join(found)}; take it apart "
            "with `nnx.split(model, nnx.Param, ...)` and pass the rest along yourself."
        )


def _check_paths(paths: list[str], expected: list[str]) -> None:
    if paths != expected:
        missing = sorted(set(expected) - set(paths))
        unknown = sorted(set(paths) - set(expected))
        raise ValueError(
            f"`params` must have its leaves where the model has its own; missing: {missing}, "
            f"unknown: {unknown}; start from the params that `functional` gave with this `apply`."
        )


def _paths(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(nnx.as_pure(tree))
    ]


def _join(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
