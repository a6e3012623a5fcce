"""Random architectures as plain functions over dicts, for the long tests of structured pruning.

A network is written as the run that draws it: the first run notes every choice on a tape and fills
the variables, later runs follow the tape. So nothing they choose depends on the sizes they meet.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "relu6", "elu", "leaky_relu", "softplus")
OFTEN = {"conv": 4, "attention": 3, "mlp": 3, "residual": 3, "activation": 2, "batch_norm": 2}
ROPE = ("rotary_half", "rotary_interleaved")
CHANNEL_OPS = {
    "reversed": lambda x: x[..., ::-1],
    "rev": lambda x: lax.rev(x, (x.ndim - 1,)),
    "cumsum": lambda x: jnp.cumsum(x, axis=-1),
    "max": lambda x: x * jnp.max(x, axis=-1, keepdims=True),
    "sort": lambda x: jnp.sort(x, axis=-1),
}


class Case(NamedTuple):
    """A network: `apply(variables, *inputs)`, and a description listing its parts."""

    apply: Callable
    variables: dict[str, Any]
    inputs: tuple
    description: str


def over(v, x):
    """A vector with as many leading axes as it takes to broadcast over the channels of x."""
    return v.reshape((1,) * (x.ndim - 1) + (-1,))


def biased(y, leaves):
    return y + over(leaves["bias"], y) if "bias" in leaves else y


def conv_op(x, kernel, strides=1, padding="SAME", dilation=1):
    """A convolution over 1 or 2 axes, channels last; its groups follow from the shapes."""
    names = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NWC", "WIO", "NWC")
    steps, holes = (strides,) * (x.ndim - 2), (dilation,) * (x.ndim - 2)
    groups = x.shape[-1] // kernel.shape[-2]
    return lax.conv_general_dilated(x, kernel, steps, padding, None, holes, names, groups)


def rotary(x, how):
    """Rotates the features of (batch, time, heads, features) by angles that grow with time."""
    angles = np.outer(np.arange(x.shape[1]), 0.5 ** np.arange(x.shape[-1] // 2))
    c, s = (jnp.asarray(f(angles), x.dtype)[None, :, None] for f in (np.cos, np.sin))
    if how == "rotary_half":
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * c - b * s, a * s + b * c], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * c - b * s, a * s + b * c], -1).reshape(x.shape)


class Run:
    """One run along the tape; at its end it records, with the generator of random numbers."""

    def __init__(self, variables, tape, rng=None):
        self.variables, self.tape, self.rng = variables, tape, rng
        self.cursor, self.notes, self.table, self.cls = 0, [], None, False

    def draw(self, make):
        """What `make()` gave when this was recorded."""
        if self.cursor == len(self.tape):
            self.tape.append(make())
        self.cursor += 1
        return self.tape[self.cursor - 1]

    def pick(self, *options):
        choice = self.draw(lambda: options[int(self.rng.integers(len(options)))])
        self.notes += [choice] if isinstance(choice, str) else []
        return choice

    def coin(self, chance=0.5):
        return self.draw(lambda: bool(self.rng.random() < chance))

    def width(self):
        return self.pick(*range(2, 13))

    def divisor(self, n):
        return self.pick(*[g for g in range(2, n + 1) if n % g == 0])

    def closed(self, fn, shape):
        """fn as a function that can be traced any number of times, as control flow does."""
        if self.cursor == len(self.tape):
            self.tape.append(None)
            at, self.cursor = self.cursor, self.cursor + 1
            jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, np.float32))
            self.tape[at], self.cursor = len(self.tape), at
        start = self.cursor + 1
        self.cursor = self.tape[self.cursor]

        def run(x):
            back, notes, self.cursor = self.cursor, list(self.notes), start
            y = fn(x)
            self.cursor, self.notes = back, notes
            return y

        return run

    def array(self, leaf, shape, fan):
        if leaf in ("scale", "var"):
            value = self.rng.uniform(0.5, 1.5, shape)
        elif "kernel" in leaf:
            value = self.rng.standard_normal(shape) / np.sqrt(fan or np.prod(shape[:-1]))
        else:
            value = self.rng.uniform(0.1, 0.8, shape) * self.rng.choice([-1, 1], shape)
        return value.astype(np.float32)

    def new(self, kind, fan=None, **shapes):
        """The leaves of a module by name; those whose shape is falsy are left out."""

        def make():
            name = f"{kind}_{len(self.variables)}"
            leaves = {k: self.array(k, shape, fan) for k, shape in shapes.items() if shape}
            self.variables[name] = leaves
            return name

        return jax.tree.map(jnp.asarray, self.variables[self.draw(make)])

    def part(self, n):
        """Draws the name of a part that n channels allow."""
        names = [k for k in dir(type(self)) if k not in dir(Run) and k[0] != "_"]
        unfit = ["channel_pad", "channel_split"] * (n > 12) + ["channel_slice"] * (n < 4)
        names = [k for k in names if k not in unfit] if n > 1 else ["conv"]
        chances = np.array([OFTEN.get(k, 1.0) for k in names])
        return str(self.rng.choice(names, p=chances / chances.sum()))

    def forward(self, x):
        x = self._stem(x)
        for _ in range(self.pick(1, 2, 3, 4, 5, 6)):
            part = self.draw(lambda n=x.shape[-1]: self.part(n))
            self.notes.append("| " + part)
            x = getattr(self, part)(x)
        self.notes.append("| head")
        x, out = self._pooled(x), self.pick(2, 3, 4, 5)
        for _ in range(self.pick(0, 1, 2)):
            x = self.activation(self._dense(x, self.width()))
        if self.table is None or self.pick("tied", "untied") == "untied":
            return self._dense(x, out)
        return jnp.dot(self._dense(x, self.table.shape[1]), self.table.T)


class Common(Run):
    """The parts that keep to the channels, for inputs of any rank."""

    def _dense(self, x, m, kind="dense"):
        how, n = self.pick("dot", "einsum", "flipped"), x.shape[-1]
        shape = (m, n) if how == "flipped" else (n, m)
        p = self.new(kind, fan=n, kernel=shape, bias=self.coin(0.6) and (m,))
        names = "...i,oi->...o" if how == "flipped" else "...i,io->...o"
        y = jnp.dot(x, p["kernel"]) if how == "dot" else jnp.einsum(names, x, p["kernel"])
        return biased(y, p)

    def _linear(self, x, m):
        """A layer that keeps positions: a SAME convolution, or a dense layer."""
        if self.coin(0.3 if x.ndim == 4 else 0.8):
            return self._dense(x, m)
        size = (self.pick(1, 3),) * (x.ndim - 2)
        p = self.new("conv", kernel=(*size, x.shape[-1], m), bias=self.coin() and (m,))
        return biased(conv_op(x, p["kernel"]), p)

    def _branch(self, x, m):
        """_linear, at times with a norm before, a second layer, or an activation behind."""
        if self.coin(0.3 if x.shape[-1] > 1 else 0):
            x = getattr(self, self.pick("layer_norm", "rms_norm", "batch_norm"))(x)
        if self.coin(0.4):
            x = self.activation(self._linear(x, self.width()))
        x = self._linear(x, m)
        return self.activation(x) if self.coin(0.3) else x

    def _affine(self, y, kind):
        scale, bias = self.pick((1, 1), (1, 1), (1, 0), (0, 1)), y.shape[-1:]
        p = self.new(kind, scale=scale[0] and bias, bias=scale[1] and bias)
        return biased(y * over(p["scale"], y) if "scale" in p else y, p)

    def activation(self, x):
        return getattr(jax.nn, self.pick(*ACTIVATIONS))(x)

    def batch_norm(self, x):
        p = self.new("statistics", mean=x.shape[-1:], var=x.shape[-1:])
        y = (x - over(p["mean"], x)) * lax.rsqrt(over(p["var"], x) + 1e-5)
        return self._affine(y, "batch_norm")

    def group_norm(self, x):
        y = x.reshape(x.shape[0], -1, g := self.divisor(x.shape[-1]), x.shape[-1] // g)
        mean, var = jnp.mean(y, (1, 3), keepdims=True), jnp.var(y, (1, 3), keepdims=True)
        return self._affine(((y - mean) / jnp.sqrt(var + 1e-3)).reshape(x.shape), "group_norm")

    def layer_norm(self, x):
        mean = jnp.mean(x, -1, keepdims=True)
        if self.pick("variance", "squares") == "variance":
            var = jnp.var(x, -1, keepdims=True)
        else:
            var = jnp.maximum(jnp.mean(x * x, -1, keepdims=True) - mean * mean, 0.0)
        return self._affine((x - mean) * lax.rsqrt(var + 1e-3), "layer_norm")

    def rms_norm(self, x):
        return self._affine(x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3), "rms_norm")

    def residual(self, x):
        how = self.pick("identity", "projection")
        m = self.width() if how == "projection" else x.shape[-1]
        return self._branch(x, m) + (self._dense(x, m) if how == "projection" else x)

    def concat(self, x):
        how = self.pick("dense_concat" if x.shape[-1] <= 12 else "two_branches", "two_branches")
        first = x if how == "dense_concat" else self._branch(x, self.pick(2, 3, 4, 5, 6))
        return jnp.concatenate([first, self._branch(x, self.pick(2, 3, 4, 5, 6))], -1)

    def channel_split(self, x):
        n = x.shape[-1]
        left, right = jnp.split(x, [self.pick(*[n // 2] * n, *range(1, n))], axis=-1)
        right = self._branch(right, self.width()) if self.coin() else right
        return jnp.concatenate([self._branch(left, self.width()), right], -1)

    def gate(self, x):
        y = self._branch(x, x.shape[-1])
        by_sigmoid = self.pick("by_sigmoid", "by_softmax") == "by_sigmoid"
        return x * (jax.nn.sigmoid(y) if by_sigmoid else jax.nn.softmax(y, axis=-1))

    def squeeze_excite(self, x):
        axes = tuple(range(1, x.ndim - 1))
        y = self.activation(self._dense(jnp.mean(x, axes), self.pick(2, 3, 4)))
        return x * jnp.expand_dims(jax.nn.sigmoid(self._dense(y, x.shape[-1])), axes)

    def channel_shuffle(self, x):
        g = self.divisor(x.shape[-1])
        return jnp.swapaxes(x.reshape(*x.shape[:-1], g, -1), -1, -2).reshape(x.shape)

    def channel_pad(self, x):
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + (self.pick((0, 1), (0, 3), (1, 2), (2, 0)),))

    def channel_slice(self, x):
        first = slice(self.draw(lambda: x.shape[-1] - x.shape[-1] // 3))
        return x[..., self.pick(first, slice(None, None, 2), slice(1, None), slice(1, None, 2))]

    def channel_op(self, x):
        return CHANNEL_OPS[self.pick("reversed", "rev", *CHANNEL_OPS)](x)

    def position_bias(self, x):
        shape = (*x.shape[1:-1], self.pick(x.shape[-1], x.shape[-1], 1))
        return x + self.new("position", table=shape)["table"][None]

    def constant_scale(self, x):
        n = x.shape[-1]
        c = self.draw(lambda: self.array("constant", (n,), 1) * (self.rng.random(n) < 0.8))
        return x * over(jnp.asarray(c, x.dtype), x)

    def where_mask(self, x):
        shape = self.pick((1,) * (x.ndim - 1) + x.shape[-1:], (1, *x.shape[1:]))
        mask = self.draw(lambda: self.rng.random(shape) < self.rng.uniform(0.5, 1))
        return jnp.where(jnp.broadcast_to(mask, x.shape), x, self.pick(0.0, 0.0, 0.5))

    def cond(self, x):
        m = self.width()
        f, g = (self.closed(lambda v: self._branch(v, m), x.shape) for _ in range(2))
        return lax.cond(jnp.mean(x) > 0, f, g, x)


class Images(Common):
    """The parts for (batch, height, width, channels)."""

    def _stem(self, x):
        return self.conv(x) if self.coin(0.8) else x

    def conv(self, x):
        n, k, stride, hole = x.shape[-1], self.pick(1, 3, 3), self.pick(1, 1, 2), self.pick(1, 1, 2)
        padding = self.pick("SAME", "VALID" if min(x.shape[1:3]) > (k - 1) * hole else "SAME")
        kind = self.pick("full", "full", *["depthwise", "grouped", "transposed"] * (n > 1))
        groups = {"depthwise": n, "grouped": self.divisor(max(n, 2))}.get(kind, 1)
        m = self.width() if groups == 1 else groups * self.pick(1, 2 if n <= 12 else 1)
        bias, flip = self.coin() and (m,), kind == "transposed" and self.coin()
        shape = (k, k, m, n) if flip else (k, k, n // groups, m)
        p = self.new(kind, k * k * n // groups, kernel=shape, bias=bias)
        if kind == "transposed":
            steps, names = (min(stride, 1 + (x.shape[1] < 8)),) * 2, ("NHWC", "HWIO", "NHWC")
            y = lax.conv_transpose(x, p["kernel"], steps, padding, None, names, flip)
        else:
            y = conv_op(x, p["kernel"], stride, padding, hole)
        y = biased(y, p)
        y = self.batch_norm(y) if self.coin(0.3) else y
        return self.activation(y) if self.coin(0.4) else y

    def pool(self, x):
        how, k, s = self.pick("max_pool", "average_pool"), self.pick(2, 3), self.pick(1, 2)
        padding = self.pick("SAME", "VALID" if min(x.shape[1:3]) >= k else "SAME")
        start, op = (-jnp.inf, lax.max) if how == "max_pool" else (0.0, lax.add)
        y = lax.reduce_window(x, start, op, (1, k, k, 1), (1, s, s, 1), padding)
        return y if how == "max_pool" else y / (k * k)

    def _pooled(self, x):
        how = self.pick("flatten", "global_mean", "global_max")
        if how == "flatten":
            return x.reshape(x.shape[0], -1)
        return (jnp.mean if how == "global_mean" else jnp.max)(x, (1, 2))


class Sequences(Common):
    """The parts for (batch, time, features), or tokens to embed."""

    def _stem(self, x):
        d = self.pick(2, 4, 5, 6, 8, 9, 10, 12)
        if x.ndim == 3:
            x = self._dense(x, d) if self.coin(0.8) else x
        else:
            shape, how = (self.pick(5, 7, 11), d), self.pick("take", "index", "one_hot")
            self.table = self.new("embedding", 1, kernel=shape)["kernel"]
            if how == "one_hot":
                x = jnp.einsum("btv,vd->btd", jax.nn.one_hot(x, len(self.table)), self.table)
            else:
                x = self.table[x] if how == "index" else jnp.take(self.table, x, 0, mode="clip")
        if self.coin(0.3):
            cls = self.new("class_token", token=x.shape[-1:])["token"]
            self.cls = self.pick("class_token")
            x = jnp.concatenate([jnp.broadcast_to(over(cls, x), (len(x), 1, cls.size)), x], 1)
        how, t, d = self.pick("learned", "sinusoidal", "unplaced"), *x.shape[1:]
        if how == "sinusoidal":
            waves = self.draw(lambda: np.sin(np.outer(np.arange(t), 0.5 ** np.arange(d))))
            x = x + jnp.asarray(waves, x.dtype)[None]
        return self.position_bias(x) if how == "learned" else x

    def attention(self, x):
        (b, t, d), k, h = x.shape, self.pick(2, 4), self.pick(1, 2, 3, 4)
        g = self.pick(*[g for g in range(1, h + 1) if h % g == 0])  # queries a key and value
        how = self.pick("fused_first", "fused_heads", "fused_flat", "separate", "by_einsum")
        g = 1 if how in ("fused_first", "fused_heads") else g
        heads = [h, h // g, h // g]
        if how == "by_einsum":
            ps = [self.new("qkv", d, kernel=(d, n, k), bias=(1, n, k)) for n in heads]
            qkv = [jnp.einsum("btd,dhk->bthk", x, p["kernel"]) + p["bias"][None] for p in ps]
        elif how == "separate":
            qkv = [self._dense(x, n * k, "qkv").reshape(b, t, n, -1) for n in heads]
        else:
            y = self._dense(x, sum(heads) * k, "qkv")
            if how == "fused_first":
                qkv = jnp.moveaxis(y.reshape(b, t, 3, -1, k), 2, 0)
            elif how == "fused_heads":
                qkv = jnp.split(y.reshape(b, t, -1, 3 * k), 3, axis=-1)
            else:
                at = [heads[0] * k, sum(heads[:2]) * k]
                qkv = [a.reshape(b, t, -1, k) for a in jnp.split(y, at, axis=-1)]
        q, keys, values = qkv
        if (place := self.pick("unrotated", *ROPE)) in ROPE:
            q, keys = rotary(q, place), rotary(keys, place)
        if g > 1 and self.pick("repeated", "grouped_query") == "repeated":
            keys, values, g = jnp.repeat(keys, g, axis=2), jnp.repeat(values, g, axis=2), 1
        q = q.reshape(b, t, -1, g, k)
        logits = jnp.einsum("bqhgk,bshk->bhgqs", q, keys) * (1 / k) ** 0.5
        if self.pick("causal", "unmasked") == "causal":
            mask = jnp.broadcast_to(np.tri(t, dtype=bool), logits.shape)
            logits = jnp.where(mask, logits, -1e9)
        y = jnp.einsum("bhgqs,bshk->bqhgk", jax.nn.softmax(logits, axis=-1), values)
        if how != "by_einsum":
            return self._added(x, self._dense(y.reshape(b, t, -1), d, "out"))
        kernel = self.new("out", h * k, kernel=(h, k, d))["kernel"]
        return self._added(x, jnp.einsum("bqhk,hkd->bqd", y.reshape(b, t, -1, k), kernel))

    def mlp(self, x):
        h, how = self.width(), self.pick("plain", "swiglu_split", "swiglu_two")
        if how == "plain":
            y = self.activation(self._dense(x, h))
        elif how == "swiglu_split":
            a, b = jnp.split(self._dense(x, 2 * h), 2, axis=-1)
            y = jax.nn.silu(a) * b
        else:
            y = jax.nn.silu(self._dense(x, h)) * self._dense(x, h)
        return self._added(x, self._dense(y, x.shape[-1]))

    def token_mixing(self, x):
        y = self.activation(self._dense(jnp.swapaxes(x, 1, 2), self.width()))
        return self._added(x, jnp.swapaxes(self._dense(y, x.shape[1]), 1, 2))

    def _added(self, x, y):
        return x + y if self.coin(0.8) else y

    def conv(self, x):
        k, m, bias = self.pick(1, 2, 3), self.width(), self.coin()
        padding = [(k - 1, 0)] if self.pick("causal_conv", "same_conv")[0] == "c" else "SAME"
        p = self.new("conv", kernel=(k, x.shape[-1], m), bias=bias and (m,))
        return biased(conv_op(x, p["kernel"], self.pick(1, 1, 1, 2), padding), p)

    def rnn(self, x):
        kind, d, h = self.pick("lstm", "gru", "simple"), x.shape[-1], self.width()
        n, bias = {"lstm": 4, "gru": 3, "simple": 1}[kind], self.coin()
        m = n * h if self.pick("fused", "per_gate") == "fused" else h
        shapes = {"kernel": (d, m), "r_kernel": (h, m), "bias": bias and (m,)}
        ps = [self.new(kind, d, **shapes) for _ in range(n * h // m)]

        def step(carry, x):
            split = lambda y: jnp.split(y, n // len(ps), axis=-1)  # noqa: E731
            a = [y for p in ps for y in split(biased(jnp.dot(x, p["kernel"]), p))]
            r = [y for p in ps for y in split(jnp.dot(carry[0], p["r_kernel"]))]
            if kind == "simple":
                return (y := jnp.tanh(a[0] + r[0]),), y
            s = [jax.nn.sigmoid(a[j] + r[j]) for j in range(n - 1)]
            if kind == "gru":
                y = s[0] * carry[0] + (1 - s[0]) * jnp.tanh(a[2] + s[1] * r[2])
                return (y,), y
            c = s[0] * carry[1] + s[1] * jnp.tanh(a[3] + r[3])
            return (y := s[2] * jnp.tanh(c), c), y

        zeros = jnp.zeros((len(x), len(ps[0]["r_kernel"])), x.dtype)
        start, back = (zeros,) * (1 + (kind == "lstm")), self.coin(0.2)
        return jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(x, 0, 1), reverse=back)[1], 0, 1)

    def recurrence(self, x):
        step = self.closed(lambda h: jnp.tanh(self._dense(h, x.shape[-1])), x.shape)
        n = 2 if self.pick("fori", "while") == "fori" else 1 + (jnp.mean(x) > 0).astype(int)
        return lax.fori_loop(0, n, lambda _, h: x + step(h), x)

    def stacked(self, x):
        """Layers by lax.scan over leaves whose leading axis counts the layers."""
        n, old = self.pick(2, 3), set(self.variables)
        layer = getattr(self, self.pick("attention", "mlp", "token_mixing", "rms_norm"))
        run = self.closed(layer, x.shape)

        def more(v):
            others = [self.rng.permutation(v.ravel()).reshape(v.shape) for _ in range(n - 1)]
            return np.stack([v, *others])

        def stack():
            names = sorted(set(self.variables) - old)
            self.variables.update({k: jax.tree.map(more, self.variables[k]) for k in names})
            return names

        def body(v, leaves):
            whole, self.variables = self.variables, self.variables | leaves
            v, self.variables = run(v), whole
            return v, None

        names = self.draw(stack)
        body = jax.checkpoint(body) if self.pick("checkpoint", "stored") == "checkpoint" else body
        return lax.scan(body, x, {k: self.variables[k] for k in names})[0]

    def _pooled(self, x):
        if self.cls:
            return x[:, 0]
        how = self.pick("mean", "last", "per_token")
        return x if how == "per_token" else jnp.mean(x, 1) if how == "mean" else x[:, -1]


def random_network(seed: int) -> Case:
    """The network of that seed."""
    rng = np.random.default_rng(seed)
    kind = Images if rng.random() < 0.5 else Sequences
    size = [int(rng.integers(6, 10)) for _ in range(2)], int(rng.integers(1, 5))
    shape = (2, *size[0], size[1]) if kind is Images else (2, size[0][0] - 2, 1 + size[1])
    if kind is Sequences and rng.random() < 0.6:
        x = rng.integers(0, 5, shape[:2]).astype(np.int32)
    else:
        x = rng.standard_normal(shape).astype(np.float32)
    first = kind({}, [], rng)
    jax.eval_shape(first.forward, x)

    def apply(variables, x):
        return kind(variables, first.tape).forward(x)

    return Case(apply, first.variables, (x,), f"{kind.__name__}: {' '.join(first.notes)}")
