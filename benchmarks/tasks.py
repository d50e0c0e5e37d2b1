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

import optax_superconv as osc


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


def cifar10_resnet(
    path: pathlib.Path, num_train: int | None = 10_000, num_test: int | None = 2_000
) -> Task:
    return Task(
        f"{data.name_of(path)} 16x16, ResNet-9",
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


def with_dials(optimizer: str, dials, b2: float = 0.99) -> Any:
    """SGD or AdamW; ``dials`` (3, n) hold rate, momentum, decay of each step."""
    rate, momentum, decay = (lambda count, k=k: dials[k, count] for k in range(3))
    if optimizer == "adamw":
        return osc.adamw(rate, momentum, b2, weight_decay=decay)
    return osc.sgd(rate, momentum, weight_decay=decay)


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
        tx = optax.with_extra_args_support(self.make_tx(rate))
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
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
    def loss_on(self, state, examples: data.Batch) -> jax.Array:
        model = self.network.model(*state[:2])
        model.eval()
        return self.task.loss_fn(model, examples)

    def held_out_loss(self, state) -> jax.Array:
        return self.loss_on(state, self.task.held_out)

    def batches(self, seed: int, count: int) -> list[data.Batch]:
        """Those that ``run`` sees."""
        keys = jax.random.split(jax.random.key(seed), count)
        indices = batch_indices(self.task, count, seed)
        return [self.gather(None, *pair) for pair in zip(indices, keys, strict=True)]
