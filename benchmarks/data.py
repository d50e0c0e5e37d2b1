"""Which data do the benchmarks train on? Made here, from scikit-learn, or CIFAR-10."""

import io
import pathlib
import tarfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image
from sklearn import datasets

Batch = tuple[jax.Array, jax.Array]


def split(inputs: Any, targets: Any, num_train: int) -> tuple[Batch, Batch]:
    """Shuffled with a fixed seed; the rest is held out."""
    order = np.random.default_rng(0).permutation(len(targets))
    arrays = [
        np.asarray(a, np.float32) if np.issubdtype(a.dtype, np.floating) else a
        for a in map(np.asarray, (inputs, targets))
    ]
    first, second = np.split(order, [num_train])
    x, y = ([jnp.asarray(array[part]) for part in (first, second)] for array in arrays)
    return (x[0], y[0]), (x[1], y[1])


def load_digits(as_images: bool = False) -> tuple[np.ndarray, np.ndarray]:
    images, labels = datasets.load_digits(return_X_y=True)
    images = ((images - 4.9) / 6.0).astype(np.float32)
    return images.reshape(-1, 8, 8, 1) if as_images else images, labels


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
                    [archive.extractfile(members[f]).read() for f in names[part]],  # pyright: ignore[reportOptionalMemberAccess]  # They are files.
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


def name_of(path: pathlib.Path) -> str:
    """Of what ``load_cifar10`` reads there."""
    return "JPEG CIFAR-10" if path.suffix == ".npz" else "CIFAR-10"


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


def markov_chain(num_windows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of symbols, each drawn by the two before it, and those that follow."""
    rng, size = np.random.default_rng(0), 12
    chances = rng.dirichlet(np.full(size, 0.1), (size, size)).cumsum(-1)
    symbols = [0, 1]
    for draw in rng.random(num_windows * length):
        ahead = np.searchsorted(chances[symbols[-2], symbols[-1]], draw)
        symbols.append(min(int(ahead), size - 1))
    codes = np.asarray(symbols[1:], np.int32)
    return codes[:-1].reshape(-1, length), codes[1:].reshape(-1, length)


def rare_features(num_rows: int, num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of which the k-th is there once in k rows, and one of ten classes."""
    rng = np.random.default_rng(0)
    present = rng.random((num_rows, num_columns)) < 1 / np.arange(1, num_columns + 1)
    features = present * rng.normal(size=present.shape)
    logits = features @ rng.normal(size=(num_columns, 10)) * 2
    noise = rng.gumbel(size=logits.shape)
    return features, (logits + noise).argmax(1).astype(np.int32)


def ratings(rows: int, columns: int, rank: int, count: int) -> tuple[Any, Any]:
    """Some entries of a noisy matrix of low rank, and where they are."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    matrix = matrix / np.sqrt(rank) + 0.3 * rng.normal(size=matrix.shape)
    where = rng.permutation(rows * columns)[:count]
    pairs = np.stack(np.divmod(where, columns), axis=1).astype(np.int32)
    return pairs, matrix.ravel()[where]


def clicks(num_rows: int, num_fields: int, num_values: int) -> tuple[Any, Any]:
    """Values of categorical fields, and yes or no by their pairs."""
    rng = np.random.default_rng(0)
    values = (num_values * rng.random((num_rows, num_fields)) ** 2).astype(np.int32)
    factors = rng.normal(size=(num_fields, num_values, 3))
    chosen = factors[np.arange(num_fields), values]
    logits = (chosen.sum(1) ** 2 - (chosen**2).sum(1)).sum(-1) / 2
    noise = rng.logistic(size=num_rows)
    return values, (logits / logits.std() * 2 + noise > 0).astype(np.int32)


def waves(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines of points of the plane, and a sum of shorter waves there."""
    rng = np.random.default_rng(0)
    points = rng.random((num_rows, 2))
    angles = 2 * np.pi * np.concatenate([points, 2 * points], axis=1)
    features = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    frequencies = rng.integers(-4, 5, size=(12, 2))
    phases = rng.random(12)
    heights = np.sin(2 * np.pi * (points @ frequencies.T + phases)).sum(1)
    return features, (heights / heights.std())[:, None]


def forces(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Points between 0 and 1, and a sum of four sines there, of deviation 1."""
    points = np.random.default_rng(0).random(num_rows)
    sines = np.sin(np.pi * points[:, None] * np.arange(1, 5))
    return points, sines.sum(1) / np.sqrt(2)
