"""Four ways to find the rate, and what one cycle makes of each, on handwritten digits.

Range tests with their spread, the convergence threshold with its regimes, the limit
that curvature sets, and a grid of weight decays. Then one cycle is trained at each rate
that was found and at a grid of rates: the table says where each lands among them. At
last a constant rate at the threshold and above it, and fine-tuning at a small one.

    python examples/02_find_the_rate.py [--smoke] [--out FOLDER]

The table is also kept as JSON; ``examples/results`` has the one that the guide quotes.
"""

import argparse
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import optax_superconv as osc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = (64, 64, 64, 10)
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


class MLP(nnx.Module):
    def __init__(self, rngs):
        pairs = itertools.pairwise(WIDTHS)
        self.layers = nnx.List(nnx.Linear(i, o, rngs=rngs) for i, o in pairs)

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))))


def init(seed):
    return nnx.state(MLP(nnx.Rngs(jax.random.key(seed))))


def loss_fn(params, batch):
    logits = nnx.merge(GRAPH, params)(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def accuracy(params, data):
    return (nnx.merge(GRAPH, params)(data[0]).argmax(-1) == data[1]).mean()


def update(tx, state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def start(tx, seed):
    params = init(seed)
    return params, tx.init(params)


def load_data():
    """1,000 images to train, 797 to test, as vectors."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - 4.9) / 6.0).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.split(order, [1000])
    return [(images[part], labels[part]) for part in parts]


def stacked_batches(data, seed, num_steps):
    """(num_steps, 64, ...) of each array; every epoch in another order."""
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(1000)[:960] for _ in range(1 + num_steps // 15)]
    indices = np.concatenate(epochs).reshape(-1, 64)[:num_steps]
    return tuple(array[indices] for array in data)


def make_training(make_tx, train, test):
    """``(rate, seeds, num_steps) -> test accuracies (%)``."""

    @jax.jit
    def run(rate, params, batches):
        tx = make_tx(rate)
        body = functools.partial(update, tx)
        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), batches)
        return accuracy(params, test)

    def accuracies(rate, seeds, num_steps):
        rate = np.asarray(rate, np.float32)
        arms = ((init(s), stacked_batches(train, s, num_steps)) for s in seeds)
        return 100 * np.array([run(rate, *arm) for arm in arms])

    return accuracies


def make_two_rates(pair):
    return osc.sgd(lambda count: jnp.where(jnp.asarray(count) < 100, *pair))


def spread(values):
    return f"{values.mean():.1f} ± {values.std(ddof=len(values) > 1):.1f}"


def draw(tests, threshold, grid, rates, scores, suggestions, path):
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    osc.plotting.plot_range_test(tests, axes[0, 0])
    axes[0, 0].set_title(f"Range test, {len(tests)} repeats")
    osc.plotting.plot_threshold(threshold, axes[0, 1])
    axes[0, 1].set_title("Convergence threshold and regimes")
    osc.plotting.plot_grid(grid, axes[1, 0])
    axes[1, 0].set_title("Range test per weight decay")
    axes[1, 1].errorbar(rates, scores.mean(1), scores.std(1), color="0.5", label="grid")
    for k, (name, rate) in enumerate(suggestions.items()):
        axes[1, 1].axvline(rate, color=f"C{k}", linestyle="--", label=name)
    labels = {"xlabel": "peak rate", "ylabel": "test accuracy (%)"}
    axes[1, 1].set(xscale="log", ylim=(50, 100), **labels)
    axes[1, 1].set_title("One cycle at each rate")
    axes[1, 1].legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, no story")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    repeats, seeds, num_steps, rates = 5, range(5), 300, np.logspace(-3, 0.5, 15)
    if args.smoke:
        repeats, seeds, num_steps, rates = 2, range(1), 60, np.logspace(-2, 0, 3)
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    train, test = load_data()

    # The finders set the rate, and the grid the decay: these numbers never act.
    tx, decayed = osc.sgd(0.1), osc.sgd(0.1, weight_decay=0.1, mask=None)
    step_fn = jax.jit(functools.partial(update, tx))
    decayed_step_fn = jax.jit(functools.partial(update, decayed))
    batches = [stacked_batches(train, s, 100) for s in range(repeats)]
    tests = [
        osc.range_test(step_fn, start(tx, s), batches[s], num_steps=200, stacked=True)
        for s in range(repeats)
    ]
    threshold = osc.convergence_threshold(
        step_fn, start(tx, 0), batches[0], num_steps=100, stacked=True
    )
    sharpness = osc.sharpness(loss_fn, init(0), train)
    limit = osc.stability_limit(sharpness, optimizer="nesterov", momentum=0.9)
    grid = osc.grid_test(
        decayed_step_fn,
        start(decayed, 0),
        batches[0],
        {"weight_decay": DECAYS},
        stacked=True,
    )
    low, high = osc.suggest_interval(tests)
    suggestions = {
        "suggested, median of the repeats": osc.suggest_learning_rate(tests),
        "low end of their interval": low,
        "high end of their interval": high,
        "convergence threshold": threshold.threshold,
        "half of the threshold": threshold.threshold / 2,
        "1.5 times the threshold": threshold.rate_before_fine_tuning,
        "curvature limit at the start": float(limit),
    }

    make_tx = functools.partial(osc.onecycle_sgd, total_steps=num_steps)
    one_cycle = make_training(make_tx, train, test)
    scores = np.array([one_cycle(rate, seeds, num_steps) for rate in rates])
    rows = []
    ends = {"best of the grid": rates[scores.mean(1).argmax()], "its lowest": rates[0]}
    for name, rate in (suggestions | ends).items():
        found = one_cycle(rate, seeds, num_steps)
        rank = 1 + int(np.sum(scores.mean(1) > found.mean()))
        rows.append((name, f"{rate:.3g}", num_steps, spread(found), rank))
    two_rates = make_training(make_two_rates, train, test)
    at, above, small = threshold.threshold, threshold.rate_before_fine_tuning, 0.01
    for name, num_steps, pair in (
        ("constant: at the threshold", 100, (at, at)),
        ("constant: at the threshold, then at 0.01", 200, (at, small)),
        ("constant: at 1.5 times the threshold", 100, (above, above)),
        ("constant: at 1.5 times it, then at 0.01", 200, (above, small)),
        ("constant: at 0.01", 200, (small, small)),
    ):
        found = two_rates(pair, seeds, num_steps)
        rows.append((name, f"{pair[0]:.3g}", num_steps, spread(found), ""))
    table = Table(title=f"One cycle, {len(seeds)} seeds, mean ± s.d.; constant rates")
    columns = ("peak", "rate", "steps", "test accuracy (%)", "rank in the grid")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row))
    console = Console()
    console.print(table)
    console.print(
        f"best weight decay at climbing rates: {grid.best['weight_decay']:g}, by "
        f"{grid.margin:.3f} ({grid.margin_in_errors:.1f} standard errors)"
    )
    path = args.out / "02_find_the_rate.png"
    draw(tests, threshold, grid, rates, scores, suggestions, path)
    found = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    found["seeds"] = len(seeds)
    found["rows"] = [dict(zip(columns, row, strict=True)) for row in rows]
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
