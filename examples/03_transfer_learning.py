"""Transfer to new classes from few labelled images: which parameters, at which rates?

A small network is trained on five classes of digits (upright and turned by 90 degrees
either way, so 15 classes) and fine-tuned on the other five, upright, from 10 to 300
labelled images, in four ways: from scratch; the head only; all parameters at one rate;
and as ULMFiT does, group by group from the head down, at rates that fall by 2.6 per
group. The digits are moved by up to two pixels at random: unmoved, they are learned as
well from scratch. Every arm gets the same images, batches, steps and one-cycle rate.
Its peak is picked per number of labels from one grid, on validation images and seeds
apart. A seed draws the classes, the network and the labelled images. What is printed,
and kept as JSON, is what this run measured: another number of threads gives other
figures. ``examples/results`` has what the guide quotes.

    python examples/03_transfer_learning.py [--smoke] [--out FOLDER] [--data CIFAR10]

``--data`` takes the folder or archive of CIFAR-10's binary version: eight classes, then
two, some minutes longer.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits

import optax_superconv as osc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = (16, 32, 64)
HEAD = len(WIDTHS)  # Its depth: the blocks are 0 to 2.
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
# One b1 throughout, as a group would begin a cycle of its own when it thaws.
ADAMW = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.01, "mask": None}
LABEL = osc.label_by_depth()
MULTIPLIERS = osc.layerwise_multipliers(range(HEAD + 1), decay=1 / 2.6)


def conv_3x3(x, kernel, *args, **kwargs):
    """One matrix product: in a loop on CPU, XLA's convolution is many times slower."""
    (height, width), steps = x.shape[1:3], itertools.product(range(3), repeat=2)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [padded[:, i : i + height, j : j + width] for i, j in steps]
    return jnp.concatenate(near, -1) @ kernel.reshape(-1, kernel.shape[-1])


class Block(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        kernel = {"kernel_size": (3, 3), "conv_general_dilated": conv_3x3}
        self.conv = nnx.Conv(inputs, outputs, **kernel, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(outputs, rngs=rngs)

    def __call__(self, x):
        count, height, width, _ = x.shape
        x = nnx.relu(self.norm(self.conv(x)))
        return x.reshape(count, height // 2, 2, width // 2, 2, -1).max((2, 4))


class Network(nnx.Module):
    def __init__(self, channels, classes, *, rngs):
        pairs = itertools.pairwise((channels, *WIDTHS))
        self.blocks = nnx.List(Block(i, o, rngs=rngs) for i, o in pairs)
        self.head = nnx.Linear(WIDTHS[-1], classes, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def init(seed, channels, classes):
    return nnx.state(Network(channels, classes, rngs=nnx.Rngs(jax.random.key(seed))))


def logits(params, images):
    channels, classes = images.shape[-1], params["head"]["bias"].shape[0]
    network = nnx.eval_shape(lambda: Network(channels, classes, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(network), params)(images)


@jax.jit
def accuracy(params, data):
    return 100 * (logits(params, data[0]).argmax(-1) == data[1]).mean()


def loss_fn(params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits(params, batch[0]), batch[1]).mean()


@functools.cache
def make_training(make_tx):
    """``(params, peak rate, data, rows of each batch) -> params``, in one program."""

    @jax.jit
    def train(params, peak, data, order):
        data = jax.tree.map(jnp.asarray, data)
        tx = make_tx(peak, len(order))

        def step(state, rows):
            params, opt_state = state
            grads = jax.grad(loss_fn)(params, tuple(array[rows] for array in data))
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), order)
        return params

    return train


def one_rate(peak, total):
    return osc.adamw(osc.onecycle_schedule(peak, total), **ADAMW)


def head_only(peak, total):
    """What never thaws keeps every bit and has no moments."""
    thaw_steps = {depth: None for depth in range(HEAD)} | {HEAD: 0}
    return osc.gradual_unfreezing(one_rate(peak, total), thaw_steps, LABEL)


def group_by_group(peak, total):
    """ULMFiT: another group every tenth of the run, so that all train at the peak."""
    thaw_steps = {d: (HEAD - d) * total // 10 for d in range(HEAD + 1)}
    decay = osc.add_decayed_weights(0.01, mask=None)
    adamw = optax.chain(osc.scale_by_scheduled_adam(b1=0.9, b2=0.99), decay)
    rates = {"multipliers": MULTIPLIERS, "param_labels": LABEL}
    return optax.chain(
        osc.gradual_unfreezing(adamw, thaw_steps, LABEL),
        osc.scale_by_learning_rate(osc.onecycle_schedule(peak, total), **rates),
    )


ARMS = {
    "from scratch": one_rate,
    "head only": head_only,
    "all, one rate": one_rate,
    "group by group": group_by_group,
}


def by_class(images, labels, count):
    return np.stack([images[labels == c][:count] for c in range(10)])


def load_data(path):
    """Train, validation, test: (class, orientation, number, side, side, channels)."""
    if path is not None:
        sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
        from data import load_cifar10

        train, test = (map(np.asarray, part) for part in load_cifar10(path, side=16))
        train = by_class(*train, count=2250)[:, None]
        test = by_class(*test, count=500)[:, None]
        return train[:, :, 250:], train[:, :, :250], test
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    mixed = rng.permutation(len(labels))
    images = by_class(images.reshape(-1, 8, 8)[mixed], labels[mixed], 174)
    # Upright and turned left and right, never round: a 6 would be a 9.
    images = np.stack([np.rot90(images, k, (2, 3)) for k in (0, 1, 3)], 1)
    flat = np.pad(images.reshape(-1, 8, 8), ((0, 0), (2, 2), (2, 2)))
    rows, columns = rng.integers(0, 5, (2, len(flat), 1)) + np.arange(8)
    number = np.arange(len(flat))[:, None, None]
    moved = flat[number, rows[:, :, None], columns[:, None]].reshape(images.shape)
    moved = ((moved - 4.9) / 6.0).astype(np.float32)[..., None]
    return np.split(moved, [94, 134], 2)


def labelled(images):
    """(classes, number, ...) as images, and labels that count the classes."""
    classes, number = images.shape[:2]
    flat = images.reshape(-1, *images.shape[2:])
    return flat, np.repeat(np.arange(classes), number)


def batch_order(rng, rows, num_steps, size):
    """(num_steps, size) of the rows, all of them again and again in another order."""
    epochs = [rng.permutation(rows) for _ in range(1 + num_steps * size // len(rows))]
    return np.concatenate(epochs)[: num_steps * size].reshape(num_steps, size)


def prepare(seed, train, held_out, targets, sizes, num_steps, training):
    """Both starts of the fine-tuning and its images, and the source accuracy."""
    rng, channels = np.random.default_rng(seed), train.shape[-1]
    new, old = np.split(rng.permutation(10), [targets])
    source, unseen = (p[old].reshape(-1, *p.shape[2:]) for p in (train, held_out))
    source = labelled(source)
    order = batch_order(rng, np.arange(len(source[1])), num_steps[0], 64)
    body = init(seed, channels, len(unseen))
    body = training(body, 1e-2, source, order)
    scratch = init(1000 + seed, channels, targets)
    known = accuracy(body, labelled(unseen))
    body["head"] = scratch["head"]
    rows = np.arange(targets * train.shape[2]).reshape(targets, -1)
    rows = rng.permuted(rows, axis=1)
    orders = {
        size: batch_order(rng, rows[:, : size // targets].ravel(), num_steps[1], 16)
        for size in sizes
    }
    data = labelled(train[new, 0]), labelled(held_out[new, 0])
    return scratch, body, data, orders, known


def fine_tune(training, arm, size, rate, seeds):
    """Accuracy (%) on held-out images of the new classes, for each prepared seed."""
    results = []
    for scratch, body, (data, held_out), orders, _ in seeds:
        start = scratch if arm == "from scratch" else body
        params = training(start, np.float32(rate), data, orders[size])
        results.append(accuracy(params, held_out))
    return np.array(results)


def paired(ours, theirs):
    """Mean and standard error of the differences over the seeds."""
    gaps = ours - theirs
    return gaps.mean(-1), gaps.std(-1, ddof=1) / gaps.shape[-1] ** 0.5


def verdict(scores, arm, other, sizes):
    """By paired differences over the seeds."""
    means, errors = paired(scores[arm], scores[other])
    signs = np.sign(means) * (abs(means) > 2 * errors)
    words = {1: "better with", -1: "worse with", 0: "not told apart with"}
    rows = list(zip(signs, sizes, means, errors, strict=True))
    where = [
        f"{word} "
        + ", ".join(f"{n} ({m:+.1f} ± {e:.1f})" for x, n, m, e in rows if x == sign)
        for sign, word in words.items()
        if sign in signs
    ]
    return f"{arm} against {other}: {'; '.join(where)} labels"


def draw(scores, sizes, path):
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for k, (arm, values) in enumerate(scores.items()):
        beside = np.array(sizes) * 1.04 ** (k - 1.5)
        error = values.std(1, ddof=1)
        axis.errorbar(beside, values.mean(1), error, marker="o", capsize=3, label=arm)
    axis.set(xscale="log", xlabel="labelled images", ylabel="test accuracy (%)")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_title(
        f"Classes never seen before, mean ± s.d. over {values.shape[1]} seeds"
    )
    axis.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, no story")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    parser.add_argument("--data", type=pathlib.Path, help="CIFAR-10 in place of digits")
    args = parser.parse_args()
    sizes, seeds, tuning_seeds, rates = (10, 30, 100, 300), 8, 4, RATES
    num_steps, targets = (600, 150), 2 if args.data else 5
    if args.smoke:
        sizes, seeds, tuning_seeds, rates, num_steps = (10,), 2, 1, (0.01,), (10, 10)
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster,
        jax.config.update("jax_default_prng_impl", "rbg")  # and so does this.
        del ARMS["head only"]
    train, validation, test = load_data(args.data)
    console, scores, peaks = Console(), {a: [] for a in ARMS}, {a: [] for a in ARMS}
    console.print(osc.describe_groups(init(0, 1, targets), LABEL, MULTIPLIERS))

    with Progress(console=console) as bar:
        task = {"targets": targets, "sizes": sizes, "num_steps": num_steps}
        start = functools.partial(prepare, training=make_training(one_rate), **task)
        tuning = bar.track(
            range(100, 100 + tuning_seeds), description="pre-training, to tune"
        )
        tuning = [start(seed, train, validation) for seed in tuning]
        reported = bar.track(range(seeds), description="pre-training, to report")
        reported = [start(seed, train, test) for seed in reported]
        for arm, make_tx in ARMS.items():
            run = functools.partial(fine_tune, make_training(make_tx), arm)
            for size in bar.track(sizes, description=arm):
                tried = [run(size, rate, tuning).mean() for rate in rates]
                peaks[arm].append(rates[np.argmax(tried)])
                scores[arm].append(run(size, peaks[arm][-1], reported))
    scores = {arm: np.stack(values) for arm, values in scores.items()}

    known = np.mean([accuracy for *_, accuracy in reported])
    console.print(f"source classes, held-out images: {known:.1f} % right")
    table = Table(title=f"Test accuracy (%), mean ± s.d. over {seeds} seeds; peak rate")
    for column in ("labelled images", *map(str, sizes)):
        table.add_column(column, no_wrap=True)
    for arm, values in scores.items():
        means, spreads = values.mean(1), values.std(1, ddof=1)
        cells = zip(means, spreads, peaks[arm], strict=True)
        table.add_row(arm, *(f"{m:.1f} ± {s:.1f}\nat {rate:g}" for m, s, rate in cells))
    console.print(table)
    console.print(
        "Points gained, of the same seeds ± standard error; told apart beyond two:"
    )
    *others, last = scores
    for other in others:
        console.print(verdict(scores, last, other, sizes))
    path = args.out / "transfer_learning.png"
    draw(scores, sizes, path)
    console.print(f"picture: {path}")
    rows = []
    for (k, size), arm in itertools.product(enumerate(sizes), scores):
        found = scores[arm][k]
        mean, error = paired(scores[last][k], found)
        row = {"labelled images": size, "arm": arm, "peak rate": f"{peaks[arm][k]:g}"}
        row["test accuracy (%)"] = f"{found.mean():.1f} ± {found.std(ddof=1):.1f}"
        row[f"{last} less it"] = f"{mean:+.1f} ± {error:.1f}" if arm != last else ""
        rows.append(row)
    found = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    path = args.out / "03_transfer_learning.json"
    path.write_text(json.dumps(found | {"seeds": seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
