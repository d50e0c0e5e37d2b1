"""On which sixteen tasks is a choice of rates judged, and which of them chose it?

Two tasks of each of eight kinds. Of each two, the one whose name has the lower SHA-256
is in the choosing half, to which constants are fitted; the other one reports what they
are worth. AdamW trains all; SGD the five kinds for which it is in use.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import data
import jax
import jax.numpy as jnp
import networks
import numpy as np
from flax import nnx
from sklearn import datasets
from sklearn.preprocessing import StandardScaler
from tasks import Task, cross_entropy, digits, squared_error

# --- images ---------------------------------------------------------------------------


def cifar10(
    name: str, network: Callable[..., Any], num_steps: int, path: pathlib.Path
) -> Task:
    """10,000 images of 8x8 pixels."""
    parts = data.load_cifar10(path, num_train=10_000, num_test=2_000, side=8)
    return Task(
        f"{data.name_of(path)} 8x8, {name}",
        lambda rngs: network(rngs=rngs),
        cross_entropy,
        *parts,
        64,
        num_steps,
    )


def cifar10_mlp(path: pathlib.Path) -> Task:
    task = cifar10(
        "MLP", functools.partial(networks.MLP, 192, 128, 128, 10), 1500, path
    )
    flat = [(x.reshape(len(x), -1), y) for x, y in (task.train, task.held_out)]
    return task._replace(train=flat[0], held_out=flat[1])


def cifar10_cnn(path: pathlib.Path) -> Task:
    network = functools.partial(networks.CNN, 3, 16, 32, num_classes=10)
    return cifar10("CNN", network, 800, path)


def digits_deep_mlp() -> Task:
    network = functools.partial(networks.MLP, 64, *[32] * 6, 10)
    return digits("digits, deep MLP", network)


def digits_autoencoder() -> Task:
    widths = 64, 64, 32, 8, 32, 64, 64
    network = functools.partial(networks.MLP, *widths, activation=nnx.tanh)
    images, _ = data.load_digits()
    parts = data.split(images, images, 1000)
    labelled = digits("digits, deep autoencoder", network)
    return labelled._replace(loss_fn=squared_error, train=parts[0], held_out=parts[1])


# --- text -----------------------------------------------------------------------------


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


def chain_gru() -> Task:
    inputs, targets = data.markov_chain(1500, 24)
    return Task(
        "Markov chain, GRU",
        lambda rngs: networks.GRU(int(inputs.max()) + 1, 32, rngs=rngs),
        cross_entropy,
        *data.split(inputs, targets, 1000),
        32,
        800,
    )


# --- tables ---------------------------------------------------------------------------


def table(
    name: str, network: Callable[..., Any], inputs, targets, num_train, num_steps
) -> Task:
    """Columns scaled to mean 0 and deviation 1 on the rows to train on.

    So are targets that are no classes.
    """

    def scaled(train: jax.Array, held_out: jax.Array) -> list[jax.Array]:
        scaler = StandardScaler().fit(train)
        return [jnp.asarray(scaler.transform(part)) for part in (train, held_out)]

    classes = np.issubdtype(targets.dtype, np.integer)
    parts = data.split(inputs, targets if classes else targets[:, None], num_train)
    (x, y), (held_out_x, held_out_y) = parts
    x, held_out_x = scaled(x, held_out_x)
    if not classes:
        y, held_out_y = scaled(y, held_out_y)
    return Task(
        name,
        lambda rngs: network(rngs=rngs),
        cross_entropy if classes else squared_error,
        (x, y),
        (held_out_x, held_out_y),
        32,
        num_steps,
    )


def tanh_mlp(*widths: int) -> Callable[..., Any]:
    return functools.partial(networks.MLP, *widths, activation=nnx.tanh)


def friedman() -> Task:
    inputs, targets = datasets.make_friedman1(1500, noise=1.0, random_state=0)
    network = tanh_mlp(10, 32, 32, 1)
    return table("Friedman 1, MLP", network, inputs, targets, 1000, 4000)


def diabetes() -> Task:
    inputs, targets = datasets.load_diabetes(return_X_y=True)
    network = tanh_mlp(10, 32, 32, 1)
    return table("diabetes, MLP", network, inputs, targets, 300, 300)


def noisy_cancer() -> Task:
    """A seventh of the labels to train on is wrong."""
    inputs, targets = datasets.load_breast_cancer(return_X_y=True)
    network = functools.partial(networks.MLP, 30, 32, 2)
    task = table("breast cancer, wrong labels", network, inputs, targets, 300, 300)
    x, y = task.train
    wrong = np.random.default_rng(0).random(len(y)) < 1 / 7
    return task._replace(train=(x, jnp.where(wrong, 1 - y, y)))


def clusters() -> Task:
    inputs, targets = datasets.make_classification(
        3000,
        n_features=20,
        n_informative=10,
        n_classes=4,
        n_clusters_per_class=3,
        flip_y=0.02,
        random_state=0,
    )
    network = functools.partial(networks.MLP, 20, 64, 64, 4)
    return table("twelve clusters, MLP", network, inputs, targets, 2000, 3000)


# --- linear models --------------------------------------------------------------------


def least_squares() -> Task:
    return Task(
        "least squares, condition 1e4",
        lambda rngs: nnx.Linear(20, 1, rngs=rngs),
        squared_error,
        *data.split(*data.ill_conditioned(1500, 20), 1000),
        32,
        3000,
    )


def rare_features() -> Task:
    inputs, targets = data.rare_features(4000, 100)
    return Task(
        "rare features, softmax",
        lambda rngs: nnx.Linear(100, 10, rngs=rngs),
        cross_entropy,
        *data.split(inputs, targets, 3000),
        32,
        3000,
    )


# --- embeddings -----------------------------------------------------------------------


def factorisation() -> Task:
    pairs, ratings = data.ratings(200, 100, rank=4, count=10_000)
    return Task(
        "matrix factorisation",
        lambda rngs: networks.Factors(200, 100, 8, rngs=rngs),
        squared_error,
        *data.split(pairs, ratings, 8000),
        128,
        2000,
    )


def clicks() -> Task:
    fields, labels = data.clicks(8000, num_fields=5, num_values=30)
    return Task(
        "clicks, embeddings",
        lambda rngs: networks.EmbeddedMLP(5, 30, 8, 32, 2, rngs=rngs),
        cross_entropy,
        *data.split(fields, labels, 6000),
        64,
        1000,
    )


# --- functions ------------------------------------------------------------------------


def fourier() -> Task:
    """A function of the plane with waves up to twice as short as its features."""
    inputs, targets = data.waves(2500)
    network = functools.partial(networks.MLP, inputs.shape[1], 64, 64, 1)
    return Task(
        "waves of the plane, MLP",
        lambda rngs: network(rngs=rngs),
        squared_error,
        *data.split(inputs, targets, 2000),
        64,
        4000,
    )


def poisson() -> Task:
    """The residual of u'' = f, with u(0) = u(1) = 0 by construction."""
    inputs, targets = data.forces(800)
    network = tanh_mlp(1, 32, 32, 1)

    def residual(model, batch: data.Batch) -> jax.Array:
        def solution(x) -> jax.Array:
            return x * (1 - x) * model(x[None])[0]

        bent = jax.vmap(jax.grad(jax.grad(solution)))(batch[0])
        return jnp.mean((bent - batch[1]) ** 2)

    return Task(
        "Poisson equation, MLP",
        lambda rngs: network(rngs=rngs),
        residual,
        *data.split(inputs, targets, 600),
        64,
        5000,
    )


# --- halves ---------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[..., Task], Callable[..., Task]]] = {
    "images": (cifar10_mlp, cifar10_cnn),
    "digits": (digits_deep_mlp, digits_autoencoder),
    "text": (sums_transformer, chain_gru),
    "regression": (friedman, diabetes),
    "classification": (noisy_cancer, clusters),
    "linear": (least_squares, rare_features),
    "embeddings": (factorisation, clicks),
    "functions": (fourier, poisson),
}
SGD_KINDS = ("images", "digits", "regression", "classification", "linear")


def _hash(make: Callable[..., Task]) -> str:
    return hashlib.sha256(make.__name__.encode()).hexdigest()


def members(with_cifar10: bool) -> dict[tuple[str, str], bool]:
    """Names of tasks with optimizers, and whether they choose."""
    return {
        (make.__name__, optimizer): make is min(pair, key=_hash)
        for kind, pair in KINDS.items()
        if kind != "images" or with_cifar10
        for make in pair
        for optimizer in ("adamw", "sgd")
        if optimizer == "adamw" or kind in SGD_KINDS
    }


@functools.cache
def task_of(name: str, path: pathlib.Path | None) -> Task:
    """By its name in ``members``; ``path`` is CIFAR-10's."""
    make = globals()[name]
    return make(path) if name.startswith("cifar10") else make()
