"""One cycle at a peak from a range test, against default rates and tuned grids.

On moved, turned and noisy digits, at three budgets of steps: what people start from
(AdamW at a constant 0.001, and the textbook's SGD at 0.1, cut to a tenth at one half
and at three quarters of the run), the peak that a range test suggests, with one cycle
(its 200 steps are paid from the budget), and, as controls of equal length, both
schedules at the best of a grid of rates, whose steps are not. Rates are tuned by a seed
and on images that report nothing. Network, data and batch size are the same in all
arms, and so is the weight decay of all that are SGD.

    python examples/01_super_convergence.py [--smoke] [--out FOLDER]
"""

import argparse
import functools
import itertools
import json
import pathlib

import jax
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import ndimage
from sklearn.datasets import load_digits

import optax_superconv as osc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIDE, BATCH, PROBE, TUNING_SEED = 10, 64, 200, 100
GRID = (0.03, 0.1, 0.3, 1.0)


class MLP(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        widths = (SIDE**2, 128, 128)
        self.layers = nnx.List(
            nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(widths)
        )
        self.norms = nnx.List(nnx.BatchNorm(o, rngs=rngs) for o in widths[1:])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x)


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: MLP(rngs=nnx.Rngs(0))))


@jax.jit
def init(seed):
    """Parameters and batch statistics."""
    return nnx.split(MLP(rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param, ...)[1:]


def load_data(copies=8):
    """8,000 images to train, 2,376 to validate, 4,000 to test, of other digits each."""
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)

    def distort(image):
        turned = ndimage.rotate(image, rng.uniform(-30, 30), reshape=False, order=1)
        noisy = 3.2 * rng.normal(size=(SIDE, SIDE))
        row, column = rng.integers(0, SIDE - 7, 2)
        noisy[row : row + 8, column : column + 8] += turned
        return (noisy.ravel() - 3) / 6

    order = rng.permutation(len(images))
    for part in np.split(np.repeat(order, copies), [1000 * copies, 1297 * copies]):
        distorted = [distort(image) for image in images[part].reshape(-1, 8, 8)]
        yield np.asarray(distorted, np.float32), labels[part]


def batches(data, seed):
    """Endless batches, reshuffled every epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data[1]))[: len(data[1]) // BATCH * BATCH]
        for part in order.reshape(-1, BATCH):
            yield tuple(array[part] for array in data)


def loss_fn(params, stats, batch):
    model = nnx.merge(GRAPH, params, stats, copy=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1])
    return losses.mean(), nnx.state(model, nnx.BatchStat)


@jax.jit
def accuracy(params, stats, data):
    model = nnx.merge(GRAPH, params, stats, copy=True)
    model.eval()
    return 100 * (model(data[0]).argmax(-1) == data[1]).mean()


def start(tx, seed):
    params, stats = init(seed)
    return params, stats, tx.init(params)


def update(tx, state, batch):
    params, stats, opt_state = state
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, stats), grads = grad_fn(params, stats, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), stats, opt_state), loss


def one_cycle(peak, total):
    return osc.onecycle_sgd(peak, total, weight_decay=5e-4)


def step_schedule(rate, total):
    cuts = {total // 2: 0.1, total * 3 // 4: 0.1}
    return osc.sgd(optax.piecewise_constant_schedule(rate, cuts), weight_decay=5e-4)


def constant_adamw(rate, total):
    return osc.adamw(rate, b2=0.999)


@functools.cache
def make_step(make_tx, total):
    """``(rate, state, batch) -> (state, loss)``: compiled once for all rates."""
    return jax.jit(lambda rate, *args: update(make_tx(rate, total), *args))


def train(make_tx, rate, total, seed, data, held_out):
    """Accuracy in % on the held-out images after the run."""
    state, step = start(make_tx(rate, total), seed), make_step(make_tx, total)
    for batch in itertools.islice(batches(data, seed), total):
        state, _ = step(rate, state, batch)
    return float(accuracy(*state[:2], held_out))


def find_peak(seed, data):
    # The range test sets the rate of its state: this 0.1 never acts.
    tx = osc.sgd(0.1, weight_decay=5e-4)
    step_fn = jax.jit(functools.partial(update, tx))
    probe = start(tx, seed), batches(data, 1000 + seed)
    found = osc.range_test(step_fn, *probe, num_steps=PROBE)
    return found, osc.suggest_learning_rate(found)


def spread(values):
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=len(values) > 1):.1f}"


def draw(results, found, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    osc.plotting.plot_range_test(found, left)
    left.set_title("Range test of the first seed")
    for k, (arm, (_, _, accuracies)) in enumerate(results.items()):
        values = np.array([*accuracies.values()])
        means = values.mean(1)
        bars = np.abs([values.min(1) - means, values.max(1) - means])
        at = np.array([*accuracies]) + 20 * (k - len(results) / 2)  # Side by side.
        style = "o-" if "range test" in arm else "o--" if "best of" in arm else "o:"
        right.errorbar(at, means, bars, fmt=style, label=arm, linewidth=2)
    right.set(xlabel="training steps, range test included", ylabel="test accuracy (%)")
    right.set_xticks([*accuracies])
    right.set_title(f"After the run: mean and range of {values.shape[1]} seeds")
    right.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, no story")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    seeds, budgets, grid = range(5), (400, 800, 1600), GRID
    if args.smoke:
        seeds, budgets, grid = range(1), (PROBE + 10,), GRID[:2]
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    data, validation, test = load_data(copies=1 if args.smoke else 8)

    tests = [find_peak(seed, data) for seed in track(seeds, "range tests")]
    peaks = [peak for _, peak in tests]
    results = {}  # Rates, steps of tuning, accuracies of each budget.

    def report(arm, make_tx, rates, tuning=0, probe=0):
        """At a rate for all, or for each budget, or (of range tests) for each seed."""
        accuracies = {}
        for budget in track(budgets, arm):
            by_seed = peaks if probe else [rates[budget]] * len(seeds)
            run = functools.partial(train, make_tx, total=budget - probe)
            accuracies[budget] = [
                run(rate, seed=seed, data=data, held_out=test)
                for rate, seed in zip(by_seed, seeds, strict=True)
            ]
        chosen = sorted(peaks if probe else rates.values())
        shown = dict.fromkeys(f"{rate:.2g}" for rate in (chosen[0], chosen[-1]))
        results[arm] = " to ".join(shown), tuning, accuracies

    def best_of_grid(make_tx):
        """The best rate of each budget on the validation images."""
        run = functools.partial(
            train, make_tx, seed=TUNING_SEED, data=data, held_out=validation
        )
        return {b: max(grid, key=lambda rate: run(rate, total=b)) for b in budgets}

    tuning = len(grid) * sum(budgets)
    report("AdamW, constant 0.001", constant_adamw, dict.fromkeys(budgets, 0.001))
    report("step schedule at 0.1", step_schedule, dict.fromkeys(budgets, 0.1))
    report("one cycle, range test", one_cycle, None, probe=PROBE)
    for name, make_tx in (("one cycle", one_cycle), ("step schedule", step_schedule)):
        rates = best_of_grid(make_tx)
        report(f"{name}, best of {len(grid)}", make_tx, rates, tuning)

    columns = [
        "arm",
        "peak rate",
        "steps of tuning",
        *(f"{b:,} steps" for b in budgets),
    ]
    rows = [
        [arm, rates, f"{tuning:,}", *map(spread, accuracies.values())]
        for arm, (rates, tuning, accuracies) in results.items()
    ]
    table = Table(
        *columns, title=f"Test accuracy (%), mean ± s.d. of {len(seeds)} seeds"
    )
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "01_super_convergence.png"
    draw(results, tests[0][0], path)
    record = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "seeds": len(seeds),
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
