"""What is trained? Small tasks with data, network, loss, batch and length.

Each trains in seconds on a CPU. Their networks scan there: XLA runs its own
convolutions 16 times slower inside a loop on CPUs (jax issue 12868), so on a CPU a 3x3
convolution is nine shifted matrix products.
"""

import functools
import io
import itertools
import pathlib
import tarfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from PIL import Image
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

Batch = tuple[jax.Array, jax.Array]


class Task(NamedTuple):
    """Arrays have a leading axis of examples; the loss is a mean over it."""

    name: str
    make_model: Callable[[nnx.Rngs], nnx.Module]
    loss_fn: Callable[[Any, Batch], jax.Array]
    train: Batch
    held_out: Batch
    batch_size: int
    num_steps: int
    augment: Callable[[jax.Array, Batch], Batch] | None = None


def cross_entropy(model: Any, batch: Batch) -> jax.Array:
    logits = model(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def squared_error(model: Any, batch: Batch) -> jax.Array:
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


# --- networks -------------------------------------------------------------------------


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


def conv(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (3, 3),
        use_bias=False,
        conv_general_dilated=conv_3x3,
        rngs=rngs,
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
        self.convs = nnx.List(conv(i, o, rngs) for i, o in pairs)
        self.norms = nnx.List(nnx.LayerNorm(o, rngs=rngs) for o in widths[1:])
        self.head = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = max_pool(nnx.relu(norm(layer(x))))
        return self.head(x.mean((1, 2)))


class ConvNorm(nnx.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.conv = conv(inputs, outputs, rngs)
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

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        depth: int,
        heads: int = 4,
        *,
        rngs: nnx.Rngs,
    ):
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
            x = x + block["attention"](block["norm_1"](x), mask=mask)
            x = x + block["mlp"](block["norm_2"](x))
        return self.head(self.norm(x))


# --- data -----------------------------------------------------------------------------


def split(inputs: Any, targets: Any, num_train: int) -> tuple[Batch, Batch]:
    """Shuffled with a fixed seed; the rest is held out."""
    order = np.random.default_rng(0).permutation(len(targets))
    arrays = [
        np.asarray(a, np.float32) if np.issubdtype(a.dtype, np.floating) else a
        for a in map(np.asarray, (inputs, targets))
    ]
    parts = np.split(order, [num_train])
    return tuple(tuple(jnp.asarray(a[part]) for a in arrays) for part in parts)  # type: ignore[return-value]


def load_digits(as_images: bool = False) -> tuple[np.ndarray, np.ndarray]:
    digits = datasets.load_digits()
    images = ((digits.images - 4.9) / 6.0).astype(np.float32)
    return images[..., None] if as_images else images.reshape(-1, 64), digits.target


def _jpegs(archive: Any, part: str, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    data, offsets = archive[f"{part}_jpeg"], archive[f"{part}_offsets"]
    labels = archive[f"{part}_labels"][:count]
    images = [
        np.asarray(Image.open(io.BytesIO(data[offsets[k] : offsets[k + 1]].tobytes())))
        for k in range(len(labels))
    ]
    return np.stack(images), labels.astype(np.int32)


def _binaries(blobs: list[bytes], count: int | None) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate([np.frombuffer(b, np.uint8).reshape(-1, 3073) for b in blobs])
    rows = rows[:count]
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, rows[:, 0].astype(np.int32)


def load_cifar10(
    path: pathlib.Path,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    side: int = 32,
) -> tuple[Batch, Batch]:
    """Normalised float32 images (n, side, side, 3) and labels, to train and to test.

    Args:
      path: An ``.npz`` of JPEGs (``train_jpeg``: all files end to end, uint8;
        ``train_offsets``; ``train_labels``; the same for ``test``), the official
        ``cifar-10-binary.tar.gz``, or the folder it unpacks to.
      num_train: How many images to train on; None is all.
      num_test: How many to test on; None is all.
      side: 32, or 16 or 8 for means over blocks of pixels.
    """
    counts = {"train": num_train, "test": num_test}
    names = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)]}
    names["test"] = ["test_batch.bin"]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            parts = {part: _jpegs(archive, part, n) for part, n in counts.items()}
    elif path.is_dir():
        files = {file.name: file for file in path.rglob("*.bin")}
        parts = {
            part: _binaries([files[name].read_bytes() for name in names[part]], n)
            for part, n in counts.items()
        }
    else:
        with tarfile.open(path) as archive:
            members = {pathlib.Path(m.name).name: m for m in archive.getmembers()}
            parts = {
                part: _binaries(
                    [archive.extractfile(members[f]).read() for f in names[part]],  # type: ignore[union-attr]
                    n,
                )
                for part, n in counts.items()
            }
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])

    def prepare(images: np.ndarray, labels: np.ndarray) -> Batch:
        block = 32 // side
        images = images.reshape(-1, side, block, side, block, 3).mean((2, 4)) / 255
        return jnp.asarray((images - mean) / std, jnp.float32), jnp.asarray(labels)

    return prepare(*parts["train"]), prepare(*parts["test"])


def flip_and_shift(key: jax.Array, batch: Batch) -> Batch:
    """Mirrors half of the images, and moves each by up to an eighth of its side."""
    images, labels = batch
    count, side = images.shape[:2]
    reach = side // 8
    flip, shift = jax.random.split(key)
    mirrored = jax.random.bernoulli(flip, shape=(count, 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
    around = ((reach, reach), (reach, reach), (0, 0))
    corners = jax.random.randint(shift, (count, 2), 0, 2 * reach + 1)
    crop = jax.vmap(
        lambda image, corner: lax.dynamic_slice(
            jnp.pad(image, around, "reflect"), (*corner, 0), image.shape
        )
    )
    return crop(images, corners), labels


SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen "
SMALL += "fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty"


def in_words(number: int) -> str:
    if number < 20:
        return SMALL.split()[number]
    ten, unit = divmod(number, 10)
    return TENS.split()[ten - 2] + (f"-{in_words(unit)}" if unit else "")


def sums_in_words(num_windows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of characters of "seven plus five is twelve.", and those that follow."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 25, size=(num_windows * length // 20, 2))
    text = "".join(
        f"{in_words(a)} plus {in_words(b)} is {in_words(a + b)}.\n" for a, b in pairs
    )
    _, codes = np.unique(list(text), return_inverse=True)
    windows = codes[: num_windows * length + 1].astype(np.int32)
    return windows[:-1].reshape(-1, length), windows[1:].reshape(-1, length)


def ill_conditioned(num_rows: int, num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Features whose scales span two decades, so curvatures span four; noisy."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 1e-2, num_columns)
    features = rng.normal(size=(num_rows, num_columns))
    features *= scales
    weights = rng.normal(size=num_columns) / scales**0.5
    noise = 0.1 * rng.normal(size=num_rows)
    return features, (features @ weights + noise)[:, None]


# --- the tasks ------------------------------------------------------------------------


def digits_mlp() -> Task:
    model = functools.partial(MLP, 64, 64, 64, 10)
    parts = split(*load_digits(), 1000)
    return Task(
        "digits, MLP", lambda rngs: model(rngs=rngs), cross_entropy, *parts, 64, 1000
    )


def digits_cnn() -> Task:
    model = functools.partial(CNN, 1, 16, 32, num_classes=10)
    parts = split(*load_digits(as_images=True), 1000)
    return Task(
        "digits, CNN", lambda rngs: model(rngs=rngs), cross_entropy, *parts, 64, 1000
    )


def digits_autoencoder() -> Task:
    model = functools.partial(MLP, 64, 48, 12, 48, 64, activation=nnx.tanh)
    images, _ = load_digits()
    parts = split(images, images, 1000)
    return Task(
        "digits, autoencoder",
        lambda rngs: model(rngs=rngs),
        squared_error,
        *parts,
        64,
        1000,
    )


def digits_deep_mlp() -> Task:
    model = functools.partial(MLP, 64, *[32] * 6, 10)
    parts = split(*load_digits(), 1000)
    return Task(
        "digits, deep MLP",
        lambda rngs: model(rngs=rngs),
        cross_entropy,
        *parts,
        64,
        1000,
    )


def sums_transformer() -> Task:
    length = 32
    inputs, targets = sums_in_words(2500, length)
    vocabulary = int(inputs.max()) + 1
    return Task(
        "sums in words, transformer",
        lambda rngs: Transformer(vocabulary, length, 32, 2, rngs=rngs),
        cross_entropy,
        *split(inputs, targets, 2000),
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
        lambda rngs: MLP(inputs.shape[1], 32, 32, 1, rngs=rngs, activation=nnx.tanh),
        squared_error,
        *split(inputs, targets, num_train),
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
        *split(inputs, targets, 300),
        32,
        300,
    )


def least_squares() -> Task:
    return Task(
        "least squares, condition 1e4",
        lambda rngs: nnx.Linear(20, 1, rngs=rngs),
        squared_error,
        *split(*ill_conditioned(1500, 20), 1000),
        32,
        1000,
    )


def cifar10_resnet(path: pathlib.Path) -> Task:
    parts = load_cifar10(path, num_train=10_000, num_test=2_000, side=16)
    return Task(
        "CIFAR-10 16x16, ResNet-9",
        lambda rngs: ResNet9(4, rngs=rngs),
        cross_entropy,
        parts[0],
        parts[1],
        64,
        500,
        flip_and_shift,
    )


# --- training -------------------------------------------------------------------------


class Training(NamedTuple):
    """A task with an optimizer that is built from a rate.

    Attributes:
      start: ``seed -> state``, of parameters, the network's other state, and the
        optimizer's.
      loss_fn: ``(params, other, batch) -> loss``, of a network that trains.
      step: ``(state, rate, batch) -> (state, loss)``, jitted.
      run: ``(state, rate, indices, seed) -> (state, losses)``: one jitted scan of the
        step over (n, batch_size) indices of examples, augmented.
      held_out_loss: ``state -> loss`` on what is held out, jitted.
      batches: ``(seed, count) -> list`` of the batches that ``run`` sees.
    """

    start: Callable[[int], Any]
    loss_fn: Callable[[Any, Any, Batch], jax.Array]
    step: Callable[[Any, Any, Batch], tuple[Any, jax.Array]]
    run: Callable[[Any, Any, Any, Any], tuple[Any, jax.Array]]
    held_out_loss: Callable[[Any], jax.Array]
    batches: Callable[[int, int], list[Batch]]


def batch_indices(task: Task, num_steps: int, seed: int) -> np.ndarray:
    """(num_steps, batch_size) int32; reshuffled every epoch."""
    rng = np.random.default_rng(seed)
    examples, size = len(task.train[1]), task.batch_size
    epochs = -(-num_steps // (examples // size))
    orders = [
        rng.permutation(examples)[: examples // size * size] for _ in range(epochs)
    ]
    return np.concatenate(orders).reshape(-1, size)[:num_steps].astype(np.int32)


def make_training(task: Task, make_tx: Callable[[Any], Any]) -> Training:
    """Any ``make_tx(rate)``, so that one program serves every rate."""

    def build(seed: Any) -> nnx.Module:
        return task.make_model(nnx.Rngs(jax.random.key(seed)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: build(0)))

    @jax.jit
    def start(seed: Any) -> Any:
        model = build(seed)
        params, other = nnx.state(model, nnx.Param, ...)
        return params, other, make_tx(1.0).init(params)

    def loss_and_other(params: Any, other: Any, batch: Batch) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, other, copy=True)
        loss = task.loss_fn(model, batch)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def loss_fn(params: Any, other: Any, batch: Batch) -> jax.Array:
        return loss_and_other(params, other, batch)[0]

    @jax.jit
    def step(state: Any, rate: Any, batch: Batch) -> tuple[Any, jax.Array]:
        params, other, opt_state = state
        grad_fn = jax.value_and_grad(loss_and_other, has_aux=True)
        (loss, other), grads = grad_fn(params, other, batch)
        updates, opt_state = make_tx(rate).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), other, opt_state), loss

    @jax.jit
    def gather(indices: Any, key: jax.Array) -> Batch:
        inputs, targets = (array[indices] for array in task.train)
        batch = inputs, targets
        return batch if task.augment is None else task.augment(key, batch)

    @jax.jit
    def run(state: Any, rate: Any, indices: Any, seed: Any) -> tuple[Any, jax.Array]:
        def body(state: Any, scanned: Any) -> tuple[Any, jax.Array]:
            return step(state, rate, gather(*scanned))

        keys = jax.random.split(jax.random.key(seed), len(indices))
        return lax.scan(body, state, (indices, keys))

    @jax.jit
    def held_out_loss(state: Any) -> jax.Array:
        model = nnx.merge(graph, *state[:2], copy=True)
        model.eval()
        return task.loss_fn(model, task.held_out)

    def batches(seed: int, count: int) -> list[Batch]:
        keys = jax.random.split(jax.random.key(seed), count)
        indices = batch_indices(task, count, seed)
        return [gather(*pair) for pair in zip(indices, keys, strict=True)]

    return Training(start, loss_fn, step, run, held_out_loss, batches)
