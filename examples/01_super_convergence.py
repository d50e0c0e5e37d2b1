"""Super-convergence on handwritten digits: one cycle against a step schedule.

A range test picks the peak rate of a one-cycle run of 20 epochs. Against it stands the
conventional schedule, a constant rate cut to a tenth at one half and at three quarters
of the run, for as long and for eight times as long, its rate tuned over a grid of whole
runs on validation data. Same network, data, batches and weight decay. What is printed
is what this run measured.

    python examples/01_super_convergence.py [--smoke] [--out FOLDER]
"""

import argparse
import functools
import itertools
import pathlib

import jax
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import optax_superconv as osc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH, EPOCH, TARGET = 64, 1000 // 64, 0.98  # An epoch in steps.


class ConvNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        widths = (1, 16, 32)
        self.convs = nnx.List(
            nnx.Conv(i, o, (3, 3), rngs=rngs) for i, o in itertools.pairwise(widths)
        )
        self.norms = nnx.List(nnx.LayerNorm(o, rngs=rngs) for o in widths[1:])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: ConvNet(rngs=nnx.Rngs(0))))


@jax.jit
def init_params(seed):
    return nnx.state(ConvNet(rngs=nnx.Rngs(jax.random.key(seed))))


def load_data():
    """1,000 images to train, 297 to validate, 500 to test."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - 4.9) / 6.0).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))
    parts = np.split(order, [1000, 1297])
    return [(images[part], labels[part]) for part in parts]


def batches(data, seed):
    """Endless batches, reshuffled every epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data[1]))[: EPOCH * BATCH]
        for part in np.split(order, EPOCH):
            yield tuple(array[part] for array in data)


def loss_fn(params, batch):
    logits = nnx.merge(GRAPH, params)(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@jax.jit
def accuracy(params, batch):
    return (nnx.merge(GRAPH, params)(batch[0]).argmax(-1) == batch[1]).mean()


def update(tx, state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def start(tx, seed):
    params = init_params(seed)
    return params, tx.init(params)


@functools.cache
def make_step(make_tx, total):
    """``(rate, state, batch) -> (state, loss)``: compiled once for all peak rates."""
    return jax.jit(lambda rate, *args: update(make_tx(rate, total), *args))


def train(make_tx, rate, seed, epochs, data, held_out):
    """Accuracy on the held-out images after every epoch."""
    total, source, curve = epochs * EPOCH, batches(data, seed), []
    state, step = start(make_tx(rate, total), seed), make_step(make_tx, total)
    for _ in range(epochs):
        for batch in itertools.islice(source, EPOCH):
            state, _ = step(rate, state, batch)
        curve.append(accuracy(state[0], held_out))
    return np.asarray(curve)


def one_cycle(peak, total):
    return osc.onecycle_sgd(peak, total, weight_decay=5e-4)


def step_schedule(rate, total):
    cuts = {total // 2: 0.1, total * 3 // 4: 0.1}
    schedule = optax.piecewise_constant_schedule(rate, cuts)
    momentum = optax.sgd(schedule, 0.9, nesterov=True)
    return optax.chain(optax.add_decayed_weights(5e-4), momentum)


def spread(values, digits):
    """Mean ± s.d. over the seeds that have a value, and how many of them have."""
    good = [value for value in values if np.isfinite(value)]
    if not good:
        return "never"
    text = f"{np.mean(good):.{digits}f} ± {np.std(good, ddof=len(good) > 1):.{digits}f}"
    return text if len(good) == len(values) else f"{text} ({len(good)}/{len(values)})"


def draw(results, found, peak, total, path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4))
    osc.plotting.plot_range_test(found, left)
    left.set_title("Range test")
    rate, momentum = osc.onecycle(peak, total)
    dials = {"learning rate": rate, "momentum": momentum}
    osc.plotting.plot_schedule(dials, total, middle)
    middle.set_title("The dials")
    for arm, (_, _, curves) in results.items():
        steps = EPOCH * np.arange(1, curves.shape[1] + 1)
        right.plot(steps, curves.mean(0), label=arm)
        right.fill_between(steps, curves.min(0), curves.max(0), alpha=0.2)
    right.axhline(TARGET, color="0.5", linestyle=":")
    right.set(
        xscale="log", xlim=30, ylim=(0.9, 1), xlabel="step", ylabel="test accuracy"
    )
    right.set_title(f"Test accuracy, mean and range over {len(curves)} seeds")
    right.legend(loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, no story")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    seeds, tuning_seeds, short, grid = 5, 2, 20, (0.003, 0.01, 0.03, 0.1, 0.3)
    if args.smoke:
        seeds, tuning_seeds, short, grid = 1, 1, 1, (0.03,)
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    arms = {
        "one-cycle": (one_cycle, short),
        "step": (step_schedule, short),
        "step, 8x": (step_schedule, 8 * short),
    }
    if args.smoke:
        del arms["step, 8x"]
    data, validation, test = load_data()

    # The range test sets the rate of its state: this 0.1 never acts.
    tx, results = osc.sgd(0.1, weight_decay=5e-4, mask=None), {}
    step_fn = jax.jit(functools.partial(update, tx))
    probe = start(tx, 100), batches(data, 100)  # No seed that reports.
    found = osc.range_test(step_fn, *probe, num_steps=200)
    peak = osc.suggest_learning_rate(found)

    for arm, (make_tx, epochs) in arms.items():
        run = functools.partial(train, make_tx, epochs=epochs, data=data)
        rate, tuning_steps = peak, len(found.losses)
        if arm != "one-cycle":
            scores = []
            for rate in track(grid, f"{arm}, tuning"):
                tuning = range(100, 100 + tuning_seeds)
                ends = [run(rate, seed, held_out=validation)[-1] for seed in tuning]
                scores.append(np.mean(ends))
            rate = grid[np.argmax(scores)]
            tuning_steps = len(grid) * tuning_seeds * epochs * EPOCH
        reported = track(range(seeds), arm)
        curves = np.stack([run(rate, seed, held_out=test) for seed in reported])
        results[arm] = rate, tuning_steps, curves

    table = Table(title=f"Digits, mean ± s.d. over {seeds} seeds")
    columns = ("arm", "peak rate", "tuning steps", "steps", "to 98 %", "accuracy (%)")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for arm, (rate, tuning_steps, curves) in results.items():
        reached = [np.flatnonzero(curve >= TARGET) for curve in curves]
        first = [EPOCH * (r[0] + 1) if r.size else np.nan for r in reached]
        steps = EPOCH * curves.shape[1]
        row = f"{rate:.3g}", f"{tuning_steps:,}", f"{steps:,}", spread(first, 0)
        table.add_row(arm, *row, spread(100 * curves[:, -1], 1))
    console = Console()
    console.print(table)
    path = args.out / "01_super_convergence.png"
    draw(results, found, peak, short * EPOCH, path)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
