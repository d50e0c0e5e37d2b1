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


def cross_entropy(model, batch: data.Batch) -> jax.Array:
    logits = model(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def squared_error(model, batch: data.Batch) -> jax.Array:
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


def regression(name: str, inputs, targets, num_train: int, num_steps: int) -> Task:
    inputs, targets = (
        StandardScaler().fit_transform(array) for array in (inputs, targets[:, None])
    )
    widths = inputs.shape[1], 32, 32, 1
    network = functools.partial(networks.MLP, *widths, activation=nnx.tanh)
    parts = data.split(inputs, targets, num_train)
    return Task(
        name, lambda rngs: network(rngs=rngs), squared_error, *parts, 32, num_steps
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


def cifar10_resnet(
    path: pathlib.Path, num_train: int | None = 10_000, num_test: int | None = 2_000
) -> Task:
    name = "JPEG CIFAR-10" if path.suffix == ".npz" else "CIFAR-10"
    return Task(
        f"{name} 16x16, ResNet-9",
        lambda rngs: networks.ResNet9(4, rngs=rngs),
        cross_entropy,
        *data.load_cifar10(path, num_train=num_train, num_test=num_test, side=16),
        64,
        500,
        data.flip_and_shift,
    )


# --- training -------------------------------------------------------------------------


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


compiled = functools.partial(jax.jit, static_argnums=0)


class Network:
    """What a network does, whatever its optimizer."""

    def __init__(self, make_model: Callable[[nnx.Rngs], nnx.Module]):
        self.build = lambda seed: make_model(nnx.Rngs(jax.random.key(seed)))
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: self.build(0)))

    @compiled
    def start(self, seed) -> Any:
        """Parameters and other state; this takes as long to compile as a run."""
        return nnx.split(self.build(seed), nnx.Param, ...)[1:]

    def model(self, params, other) -> Any:
        return nnx.merge(self.graph, params, other, copy=True)

    @compiled
    def score(self, params, other, batch: data.Batch) -> jax.Array:
        """Accuracy in % and loss of a classifier."""

        def forward(image) -> jax.Array:
            model = self.model(params, other)
            model.eval()
            return model(image[None])[0]

        logits = lax.map(forward, batch[0], batch_size=500)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        accuracy = 100 * jnp.mean(logits.argmax(-1) == batch[1])
        return jnp.stack([accuracy, losses.mean()])


network_of = functools.cache(Network)  # Compiled once for all optimizers.


class Training:
    """A task with an optimizer: any ``make_tx(rate)``, so one program for all rates.

    A state is that of parameters, the network's other state, and the optimizer's.
    """

    def __init__(self, task: Task, make_tx: Callable[[Any], Any]):
        self.task, self.make_tx = task, make_tx
        self.network = network_of(task.make_model)

    def begin(self, params, other) -> Any:
        """The state of an optimizer that has not begun."""
        return params, other, self.make_tx(1.0).init(params)

    def start(self, seed) -> Any:
        return self.begin(*self.network.start(seed))

    def loss_and_other(self, params, other, batch: data.Batch) -> tuple[jax.Array, Any]:
        model = self.network.model(params, other)
        loss = self.task.loss_fn(model, batch)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def loss_fn(self, params, other, batch: data.Batch) -> jax.Array:
        """Of a network that trains."""
        return self.loss_and_other(params, other, batch)[0]

    @compiled
    def step(self, state, rate, batch: data.Batch) -> tuple[Any, jax.Array]:
        params, other, opt_state = state
        grad_fn = jax.value_and_grad(self.loss_and_other, has_aux=True)
        (loss, other), grads = grad_fn(params, other, batch)
        updates, opt_state = self.make_tx(rate).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), other, opt_state), loss

    @compiled
    def gather(self, examples, indices, key) -> data.Batch:
        """A batch of the task's examples, or of others, augmented."""
        inputs, targets = self.task.train if examples is None else examples
        batch, augment = (inputs[indices], targets[indices]), self.task.augment
        return batch if augment is None else augment(key, batch)

    @compiled
    def run(self, state, rate, indices, seed, examples=None) -> tuple[Any, jax.Array]:
        """State and losses after a scan over (n, batch_size) indices of examples."""

        def body(state, scanned) -> tuple[Any, jax.Array]:
            return self.step(state, rate, self.gather(examples, *scanned))

        keys = jax.random.split(jax.random.key(seed), len(indices))
        return lax.scan(body, state, (indices, keys))

    @compiled
    def held_out_loss(self, state) -> jax.Array:
        model = self.network.model(*state[:2])
        model.eval()
        return self.task.loss_fn(model, self.task.held_out)

    def batches(self, seed: int, count: int) -> list[data.Batch]:
        """Those that ``run`` sees."""
        keys = jax.random.split(jax.random.key(seed), count)
        indices = batch_indices(self.task, count, seed)
        return [self.gather(None, *pair) for pair in zip(indices, keys, strict=True)]
