"""Which networks do the benchmarks train?

They scan on a CPU: XLA runs its own convolutions 16 times slower inside a loop there
(jax issue 12868), so a 3x3 convolution is nine shifted matrix products.
"""

import functools
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def conv_3x3(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """XLA's convolution, or nine shifted products where that is the faster program.

    Takes the arguments of ``jax.lax.conv_general_dilated``; stride 1 and ``"SAME"``.
    """
    if jax.default_backend() != "cpu":
        return lax.conv_general_dilated(x, kernel, *args, **kwargs)
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    products = [
        padded[:, i : i + height, j : j + width] @ kernel[i, j]
        for i, j in itertools.product(range(3), repeat=2)
    ]
    return functools.reduce(jnp.add, products)


conv = functools.partial(
    nnx.Conv, kernel_size=(3, 3), use_bias=False, conv_general_dilated=conv_3x3
)


def max_pool(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


class MLP(nnx.Module):
    """Dense layers with an activation between them."""

    def __init__(self, *widths: int, rngs: nnx.Rngs, activation: Any = nnx.relu):
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List(nnx.Linear(i, o, rngs=rngs) for i, o in pairs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class CNN(nnx.Module):
    """Convolution, layer norm, ReLU and pooling per width, then a linear head."""

    def __init__(self, *widths: int, num_classes: int, rngs: nnx.Rngs):
        pairs = itertools.pairwise(widths)
        self.convs = nnx.List(conv(i, o, rngs=rngs) for i, o in pairs)
        self.norms = nnx.List(nnx.LayerNorm(o, rngs=rngs) for o in widths[1:])
        self.head = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = max_pool(nnx.relu(norm(layer(x))))
        return self.head(x.mean((1, 2)))


class ConvNorm(nnx.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.conv = conv(inputs, outputs, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class ResNet9(nnx.Module):
    """The network of the fast CIFAR-10 runs (Page, How to train your ResNet, 2018).

    Images with sides that are a multiple of 8; ``width`` channels in the first layer,
    64 in the original.
    """

    def __init__(self, width: int, num_classes: int = 10, *, rngs: nnx.Rngs):
        wider = [width * k for k in (1, 2, 4, 8)]
        self.stem = ConvNorm(3, width, rngs)
        self.stages = nnx.List(
            ConvNorm(i, o, rngs) for i, o in itertools.pairwise(wider)
        )
        self.residuals = nnx.List(
            nnx.List(ConvNorm(o, o, rngs) for _ in range(2)) for o in wider[1::2]
        )
        self.head = nnx.Linear(wider[-1], num_classes, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for k, stage in enumerate(self.stages):
            x = max_pool(stage(x))
            if k != 1:
                first, second = self.residuals[k // 2]
                x = x + second(first(x))
        return self.head(x.max((1, 2))) * 0.125


class Transformer(nnx.Module):
    """Pre-norm decoder: predicts each next token."""

    def __init__(self, vocabulary, length, width, depth, heads=4, *, rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(
            nnx.Dict(
                norm_1=nnx.LayerNorm(width, rngs=rngs),
                attention=nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs),
                norm_2=nnx.LayerNorm(width, rngs=rngs),
                mlp=MLP(width, 4 * width, width, rngs=rngs, activation=nnx.gelu),
            )
            for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = x + block["attention"](block["norm_1"](x), mask=mask)  # pyright: ignore[reportCallIssue]  # To Flax, a Dict's values are alike.
            x = x + block["mlp"](block["norm_2"](x))
        return self.head(self.norm(x))


class GRU(nnx.Module):
    """One recurrent layer: predicts each next token."""

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layer = nnx.RNN(nnx.GRUCell(width, width, rngs=rngs))
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(cast(jax.Array, self.layer(self.tokens(tokens))))


class Factors(nnx.Module):
    """The product of a row's and a column's factors."""

    def __init__(self, rows: int, columns: int, rank: int, *, rngs: nnx.Rngs):
        self.rows = nnx.Embed(rows, rank, rngs=rngs)
        self.columns = nnx.Embed(columns, rank, rngs=rngs)

    def __call__(self, pairs: jax.Array) -> jax.Array:
        return jnp.sum(self.rows(pairs[:, 0]) * self.columns(pairs[:, 1]), axis=-1)


class EmbeddedMLP(nnx.Module):
    """Dense layers on the embeddings of categorical fields."""

    def __init__(self, num_fields, num_values, width, hidden, num_classes, *, rngs):
        self.num_values = num_values
        self.embed = nnx.Embed(num_fields * num_values, width, rngs=rngs)
        self.mlp = MLP(num_fields * width, hidden, num_classes, rngs=rngs)

    def __call__(self, fields: jax.Array) -> jax.Array:
        offsets = self.num_values * jnp.arange(fields.shape[-1])
        embedded = self.embed(fields + offsets)
        return self.mlp(embedded.reshape(*fields.shape[:-1], -1))
