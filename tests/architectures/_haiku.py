"""Networks in Haiku."""

import haiku as hk
import jax
import jax.numpy as jnp

from ._case import case, from_haiku, images, tokens, vectors
from ._dict_layers import rotary, sinusoids


@case("mlp-haiku")
def mlp():
    return from_haiku(lambda x: hk.nets.MLP([7, 9, 3])(x), vectors(5))


@case("cnn-haiku")
def cnn():
    def forward(x, is_training):
        return hk.Sequential(
            [
                hk.Conv2D(5, 3),
                jax.nn.relu,
                hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID"),
                hk.Conv2D(7, 3),
                jax.nn.relu,
                hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID"),
                hk.Flatten(),
                hk.Linear(11),
                jax.nn.relu,
                hk.Linear(10),
            ]
        )(x)

    return from_haiku(forward, images(), batch_norm=True)


def batch_norm(x, is_training):
    return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)


class BasicBlock(hk.Module):
    def __init__(self, hidden, outputs, stride=1, name=None):
        super().__init__(name=name)
        self.hidden, self.outputs, self.stride = hidden, outputs, stride

    def __call__(self, x, is_training):
        y = hk.Conv2D(self.hidden, 3, stride=self.stride, with_bias=False)(x)
        y = jax.nn.relu(batch_norm(y, is_training))
        y = batch_norm(hk.Conv2D(self.outputs, 3, with_bias=False)(y), is_training)
        if self.stride > 1:
            x = hk.Conv2D(self.outputs, 1, stride=self.stride, with_bias=False)(x)
            x = batch_norm(x, is_training)
        return jax.nn.relu(x + y)


@case("resnet_basic-haiku")
def resnet_basic():
    def forward(x, is_training):
        x = jax.nn.relu(batch_norm(hk.Conv2D(6, 3, with_bias=False)(x), is_training))
        x = BasicBlock(5, 6)(x, is_training)
        x = BasicBlock(7, 9, stride=2)(x, is_training)
        x = BasicBlock(8, 9)(x, is_training)
        return hk.Linear(4)(jnp.mean(x, axis=(1, 2)))

    return from_haiku(forward, images(), batch_norm=True)


@case("mobilenet-haiku")
def mobilenet():
    def block(x, is_training, hidden, outputs, stride=1):
        y = jax.nn.relu6(batch_norm(hk.Conv2D(hidden, 1, with_bias=False)(x), is_training))
        y = hk.DepthwiseConv2D(1, 3, stride=stride, with_bias=False)(y)
        y = jax.nn.relu6(batch_norm(y, is_training))
        y = batch_norm(hk.Conv2D(outputs, 1, with_bias=False)(y), is_training)
        return x + y if x.shape == y.shape else y

    def forward(x, is_training):
        x = jax.nn.relu6(hk.Conv2D(5, 3)(x))
        x = block(x, is_training, 12, 5)
        x = block(x, is_training, 14, 7, stride=2)
        return hk.Linear(4)(x.mean(axis=(1, 2)))

    return from_haiku(forward, images(), batch_norm=True)


@case("densenet-haiku")
def densenet():
    def forward(x, is_training):
        x = hk.Conv2D(6, 3)(x)
        for growth in (4, 5, 3):
            y = hk.Conv2D(growth, 3)(jax.nn.relu(batch_norm(x, is_training)))
            x = jnp.concatenate([x, y], axis=-1)
        x = hk.AvgPool((2, 2, 1), (2, 2, 1), "VALID")(jax.nn.relu(batch_norm(x, is_training)))
        return hk.Linear(10)(x.mean(axis=(1, 2)))

    return from_haiku(forward, images(), batch_norm=True)


@case("group_norm-haiku")
def group_norm():
    def forward(x):
        x = jax.nn.relu(hk.GroupNorm(3)(hk.Conv2D(6, 3)(x)))
        x = jax.nn.relu(hk.GroupNorm(4)(hk.Conv2D(12, 3, stride=2)(x)))
        return hk.Linear(7)(x.mean(axis=(1, 2)))

    return from_haiku(forward, images())


@case("squeeze_excite-haiku")
def squeeze_excite():
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(8, 3)(x))
        gate = jax.nn.relu(hk.Linear(5)(x.mean(axis=(1, 2))))
        gate = jax.nn.sigmoid(hk.Linear(8)(gate))
        x = x * gate[:, None, None]
        return hk.Linear(4)(x.mean(axis=(1, 2)))

    return from_haiku(forward, images())


def layer_norm(x):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)


def initializer():
    return hk.initializers.VarianceScaling(1.0)


def encoder_layer(x, hidden):
    y = layer_norm(x)
    x = x + hk.MultiHeadAttention(3, 4, model_size=x.shape[-1], w_init=initializer())(y, y, y)
    y = jax.nn.gelu(hk.Linear(hidden)(layer_norm(x)))
    return x + hk.Linear(x.shape[-1])(y)


@case("encoder-haiku")
def encoder():
    """Pre-norm."""

    def forward(ids):
        x = hk.Embed(11, 10)(ids)
        x = x + sinusoids(*x.shape[1:])[None]
        for hidden in (14, 15):
            x = encoder_layer(x, hidden)
        return hk.Linear(7)(layer_norm(x).mean(axis=1))

    return from_haiku(forward, tokens())


@case("decoder_gqa_tile-haiku")
def decoder_gqa_tile():
    """Heads of key and value repeated by a broadcast and a reshape."""
    heads, kv_heads, head_width = 6, 3, 4

    def expand(x):
        batch, length, _, width = x.shape
        shape = (batch, length, kv_heads, heads // kv_heads, width)
        return jnp.broadcast_to(x[:, :, :, None], shape).reshape(batch, length, heads, width)

    def attend(x):
        batch, length, width = x.shape

        def project(heads, name):
            y = hk.Linear(heads * head_width, with_bias=False, name=name)(x)
            return y.reshape(batch, length, heads, head_width)

        q = rotary(project(heads, "query"))
        k = expand(rotary(project(kv_heads, "key")))
        v = expand(project(kv_heads, "value"))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return hk.Linear(width, with_bias=False, name="out")(y.reshape(batch, length, -1))

    def forward(ids):
        embed = hk.Embed(11, 10)
        x = embed(ids)
        for hidden in (14, 15):
            x = x + attend(hk.RMSNorm(-1)(x))
            y = hk.RMSNorm(-1)(x)
            gate, up = jnp.split(hk.Linear(2 * hidden, with_bias=False)(y), 2, axis=-1)
            x = x + hk.Linear(10, with_bias=False)(jax.nn.silu(gate) * up)
        return hk.RMSNorm(-1)(x) @ embed.embeddings.T

    return from_haiku(forward, tokens())


@case("mixer-haiku")
def mixer():
    def forward(x):
        x = hk.Linear(8)(x)
        y = layer_norm(x).swapaxes(1, 2)
        x = x + hk.nets.MLP([9, 6], activation=jax.nn.gelu)(y).swapaxes(1, 2)
        x = x + hk.nets.MLP([13, 8], activation=jax.nn.gelu)(layer_norm(x))
        return hk.Linear(3)(x.mean(axis=1))

    return from_haiku(forward, vectors(6, 5))


def recurrent(core):
    def forward(x):
        cell = core(7)
        hs, _ = hk.dynamic_unroll(cell, x, cell.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(3)(hs[:, -1])

    return from_haiku(forward, vectors(6, 5))


@case("lstm-haiku")
def lstm():
    return recurrent(hk.LSTM)


@case("gru-haiku")
def gru():
    return recurrent(hk.GRU)


@case("stacked_mlp-haiku")
def stacked_mlp():
    def forward(x):
        def layer(x):
            return x + hk.Linear(6)(jax.nn.relu(hk.Linear(8)(layer_norm(x))))

        x = hk.layer_stack(3)(layer)(hk.Linear(6)(x))
        return hk.Linear(4)(x)

    return from_haiku(forward, vectors(5))
