"""What is trained? Small tasks with data, network, loss, batch and length.

Each trains in seconds on a CPU.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
from flax import nnx
from jax import lax
from sklearn import datasets
from sklearn.preprocessing import StandardScaler


class Task(NamedTuple):
    """Arrays have a leading axis of examples; the loss is a mean over it."""

    name: str
    make_model: Callable[[nnx.Rngs], nnx.Module]
    loss_fn: Callable[[Any, data.Batch], jax.Array]
    train: data.Batch
    held_out: data.Batch
    batch_size: int
    num_steps: int
    augment: Callable[[jax.Array, data.Batch], data.Batch] | None = None


def cross_entropy(model: Any, batch: data.Batch) -> jax.Array:
    logits = model(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def squared_error(model: Any, batch: data.Batch) -> jax.Array:
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


# --- the tasks ------------------------------------------------------------------------


def digits(name: str, network: Callable[..., Any], *, as_images: bool = False) -> Task:
    parts = data.split(*data.load_digits(as_images), 1000)
    return Task(name, lambda rngs: network(rngs=rngs), cross_entropy, *parts, 64, 1000)


def digits_mlp() -> Task:
    return digits("digits, MLP", functools.partial(networks.MLP, 64, 64, 64, 10))


def digits_deep_mlp() -> Task:
    network = functools.partial(networks.MLP, 64, *[32] * 6, 10)
    return digits("digits, deep MLP", network)


def digits_cnn() -> Task:
    network = functools.partial(networks.CNN, 1, 16, 32, num_classes=10)
    return digits("digits, CNN", network, as_images=True)


def digits_autoencoder() -> Task:
    network = functools.partial(networks.MLP, 64, 48, 12, 48, 64, activation=nnx.tanh)
    images, _ = data.load_digits()
    parts = data.split(images, images, 1000)
    labelled = digits("digits, autoencoder", network)
    return labelled._replace(loss_fn=squared_error, train=parts[0], held_out=parts[1])


def sums_transformer() -> Task:
    length = 32
    inputs, targets = data.sums_in_words(2500, length)
    vocabulary = int(inputs.max()) + 1
    return Task(
        "sums in words, transformer",
        lambda rngs: networks.Transformer(vocabulary, length, 32, 2, rngs=rngs),
        cross_entropy,
        *data.split(inputs, targets, 2000),
        16,
        1000,
    )


def regression(
    name: str, inputs: Any, targets: Any, num_train: int, num_steps: int
) -> Task:
    inputs = StandardScaler().fit_transform(inputs)
    targets = StandardScaler().fit_transform(targets[:, None])
    return Task(
        name,
        lambda rngs: networks.MLP(
            inputs.shape[1], 32, 32, 1, rngs=rngs, activation=nnx.tanh
        ),
        squared_error,
        *data.split(inputs, targets, num_train),
        32,
        num_steps,
    )


def friedman_mlp() -> Task:
    inputs, targets = datasets.make_friedman1(1500, noise=1.0, random_state=0)
    return regression("Friedman 1, MLP", inputs, targets, 1000, 1000)


def diabetes_mlp() -> Task:
    inputs, targets = datasets.load_diabetes(return_X_y=True)
    return regression("diabetes, MLP", inputs, targets, 300, 300)


def cancer_linear() -> Task:
    inputs, targets = datasets.load_breast_cancer(return_X_y=True)
    inputs = StandardScaler().fit_transform(inputs)
    return Task(
        "breast cancer, linear",
        lambda rngs: nnx.Linear(inputs.shape[1], 2, rngs=rngs),
        cross_entropy,
        *data.split(inputs, targets, 300),
        32,
        300,
    )


def least_squares() -> Task:
    return Task(
        "least squares, condition 1e4",
        lambda rngs: nnx.Linear(20, 1, rngs=rngs),
        squared_error,
        *data.split(*data.ill_conditioned(1500, 20), 1000),
        32,
        1000,
    )


def cifar10_resnet(path: pathlib.Path) -> Task:
    parts = data.load_cifar10(path, num_train=10_000, num_test=2_000, side=16)
    return Task(
        "CIFAR-10 16x16, ResNet-9",
        lambda rngs: networks.ResNet9(4, rngs=rngs),
        cross_entropy,
        parts[0],
        parts[1],
        64,
        500,
        data.flip_and_shift,
    )


# --- training -------------------------------------------------------------------------


class Network(NamedTuple):
    """Jitted functions of a network, whatever its optimizer.

    Attributes:
      graph: What ``nnx.merge`` needs beside the parameters and other state.
      start: ``seed -> (params, other)``; it takes as long to compile as a run.
      score: ``(params, other, batch) -> (accuracy in %, loss)`` of a classifier.
    """

    graph: Any
    start: Callable[[Any], tuple[Any, Any]]
    score: Callable[[Any, Any, data.Batch], jax.Array]


class Training(NamedTuple):
    """A task with an optimizer that is built from a rate.

    Attributes:
      start: ``seed -> state``, of parameters, the network's other state, and the
        optimizer's.
      begin: ``(params, other) -> state``, of an optimizer that has not begun.
      loss_fn: ``(params, other, batch) -> loss``, of a network that trains.
      step: ``(state, rate, batch) -> (state, loss)``, jitted.
      run: ``(state, rate, indices, seed, examples) -> (state, losses)``: one
        jitted scan of the step over (n, batch_size) indices of examples (the task's
        unless others are given), augmented.
      held_out_loss: ``state -> loss`` on what is held out, jitted.
      batches: ``(seed, count) -> list`` of the batches that ``run`` sees.
    """

    start: Callable[[int], Any]
    begin: Callable[[Any, Any], Any]
    loss_fn: Callable[[Any, Any, data.Batch], jax.Array]
    step: Callable[[Any, Any, data.Batch], tuple[Any, jax.Array]]
    run: Callable[..., tuple[Any, jax.Array]]
    held_out_loss: Callable[[Any], jax.Array]
    batches: Callable[[int, int], list[data.Batch]]


def shuffled(examples: int, size: int, num_steps: int, seed: int) -> np.ndarray:
    """(num_steps, size) int32 below ``examples``; reshuffled every epoch."""
    rng = np.random.default_rng(seed)
    epochs = -(-num_steps // (examples // size))
    orders = [
        rng.permutation(examples)[: examples // size * size] for _ in range(epochs)
    ]
    return np.concatenate(orders).reshape(-1, size)[:num_steps].astype(np.int32)


def batch_indices(task: Task, num_steps: int, seed: int) -> np.ndarray:
    """Of examples of a task, (num_steps, batch_size)."""
    return shuffled(len(task.train[1]), task.batch_size, num_steps, seed)


@functools.cache
def make_network(make_model: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Compiled once for all optimizers."""

    def build(seed: Any) -> nnx.Module:
        return make_model(nnx.Rngs(jax.random.key(seed)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: build(0)))

    @jax.jit
    def start(seed: Any) -> Any:
        return nnx.split(build(seed), nnx.Param, ...)[1:]

    @jax.jit
    def score(params: Any, other: Any, batch: data.Batch) -> jax.Array:
        def forward(image: jax.Array) -> jax.Array:
            model: Any = nnx.merge(graph, params, other, copy=True)
            model.eval()
            return model(image[None])[0]

        logits = lax.map(forward, batch[0], batch_size=500)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        accuracy = 100 * jnp.mean(logits.argmax(-1) == batch[1])
        return jnp.stack([accuracy, losses.mean()])

    return Network(graph, start, score)


def make_training(task: Task, make_tx: Callable[[Any], Any]) -> Training:
    """Any ``make_tx(rate)``, so that one program serves every rate."""
    network = make_network(task.make_model)

    def begin(params: Any, other: Any) -> Any:
        return params, other, make_tx(1.0).init(params)

    def loss_and_other(
        params: Any, other: Any, batch: data.Batch
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(network.graph, params, other, copy=True)
        loss = task.loss_fn(model, batch)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def step(state: Any, rate: Any, batch: data.Batch) -> tuple[Any, jax.Array]:
        params, other, opt_state = state
        grad_fn = jax.value_and_grad(loss_and_other, has_aux=True)
        (loss, other), grads = grad_fn(params, other, batch)
        updates, opt_state = make_tx(rate).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), other, opt_state), loss

    @jax.jit
    def gather(indices: Any, key: jax.Array, examples: Any = task.train) -> data.Batch:
        batch = examples[0][indices], examples[1][indices]
        return batch if task.augment is None else task.augment(key, batch)

    @jax.jit
    def run(
        state: Any, rate: Any, indices: Any, seed: Any, examples: Any = task.train
    ) -> tuple[Any, jax.Array]:
        def body(state: Any, scanned: Any) -> tuple[Any, jax.Array]:
            return step(state, rate, gather(*scanned, examples))

        keys = jax.random.split(jax.random.key(seed), len(indices))
        return lax.scan(body, state, (indices, keys))

    @jax.jit
    def held_out_loss(state: Any) -> jax.Array:
        model = nnx.merge(network.graph, *state[:2], copy=True)
        model.eval()
        return task.loss_fn(model, task.held_out)

    def batches(seed: int, count: int) -> list[data.Batch]:
        keys = jax.random.split(jax.random.key(seed), count)
        indices = batch_indices(task, count, seed)
        return [gather(*pair) for pair in zip(indices, keys, strict=True)]

    return Training(
        lambda seed: begin(*network.start(seed)),
        begin,
        lambda params, other, batch: loss_and_other(params, other, batch)[0],
        step,
        run,
        held_out_loss,
        batches,
    )
