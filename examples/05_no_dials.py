"""The same lines on images, text and a table, and no number but the steps.

At three budgets of training steps: one cycle at the numbers of `auto_onecycle`, whose
probes are paid from the budget; AdamW at Optax's usual 0.001 with a cosine; and one
cycle at the best of seven peaks by validation loss, whose steps are not. Everything but
the data, the network and its loss is the same for the three problems.

    python examples/05_no_dials.py [--smoke] [--out FOLDER]
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
from rich.progress import track
from rich.table import Table
from sklearn import datasets, preprocessing

import optax_superconv as osc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH, TUNING_SEED = 64, 100
GRID = tuple(float(f"{rate:.1g}") for rate in np.geomspace(1e-3, 1.0, 7))
WORDS = "zero one two three four five six seven eight nine ten".split()


class MLP(nnx.Module):
    """Of numbers; or of characters, which are embedded."""

    def __init__(self, inputs, outputs, characters=0, *, rngs):
        self.embed = nnx.Embed(characters, 16, rngs=rngs) if characters else None
        widths = (inputs * 16 if characters else inputs, 128, 128)
        self.layers = nnx.List(
            nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(widths)
        )
        self.head = nnx.Linear(128, outputs, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x).reshape(len(x), -1) if self.embed else x
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def images():
    x, y = datasets.load_digits(return_X_y=True)
    return np.float32(x / 16), y, functools.partial(MLP, 64, 10), cross_entropy


def text(length=8, size=30_000):
    """The next character of "two times three is six, ..."."""
    rng, said = np.random.default_rng(0), ""
    while len(said) < size + length:
        a, b = rng.integers(0, 6, 2)
        said += f"{WORDS[a]} plus {WORDS[b]} is {WORDS[a + b]}, "
    letters, codes = np.unique([*said[: size + length]], return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(codes, length + 1)
    network = functools.partial(MLP, length, len(letters), len(letters))
    return windows[:, :-1], windows[:, -1], network, cross_entropy


def table():
    x, y = datasets.make_friedman1(4000, noise=1.0, random_state=0)
    x, y = (preprocessing.scale(a.reshape(len(y), -1)) for a in (x, y))
    return np.float32(x), np.float32(y), functools.partial(MLP, 10, 1), squared_error


class Problem:
    """Data in three parts, and steps of a network on batches of the first."""

    def __init__(self, x, y, network, loss):
        order = np.random.default_rng(0).permutation(len(y))
        ends = [len(y) * 6 // 10, len(y) * 8 // 10]
        parts = [(x[part], y[part]) for part in np.split(order, ends)]
        self.train, self.validation, self.test = parts

        def build(seed):
            return network(rngs=nnx.Rngs(jax.random.key(seed)))

        graph = nnx.graphdef(build(0))
        self.init = jax.jit(lambda seed: nnx.state(build(seed)))
        self.loss = jax.jit(
            lambda p, batch: loss(nnx.merge(graph, p)(batch[0]), batch[1])
        )

    def batches(self, seed):
        """Endless, reshuffled every epoch."""
        rng, size = np.random.default_rng(seed), len(self.train[1])
        while True:
            for part in rng.permutation(size)[: size // BATCH * BATCH].reshape(
                -1, BATCH
            ):
                yield tuple(array[part] for array in self.train)

    def step(self, tx):
        @functools.partial(jax.jit, donate_argnums=0)
        def step_fn(state, batch):
            params, opt_state = state
            loss, grads = jax.value_and_grad(self.loss)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return step_fn

    def run(self, tx, total_steps, seed):
        """The trained parameters."""
        params, step_fn = self.init(seed), self.step(tx)
        state = params, tx.init(params)
        for batch in itertools.islice(self.batches(seed), total_steps):
            state, _ = step_fn(state, batch)
        return state[0]


def no_dials(problem, budget, seed):
    """What is left of the budget is the run; a fifth of it is what the probes may."""
    tx, params = osc.adamw(1e-3), problem.init(seed)
    state, batches = (params, tx.init(params)), problem.batches(1000 + seed)
    found = osc.auto_onecycle(problem.step(tx), state, batches, int(0.8 * budget))
    return problem.run(found.tx, found.total_steps, seed), found


def usual(problem, budget, seed):
    rate = optax.cosine_decay_schedule(1e-3, budget)
    return problem.run(optax.adamw(rate), budget, seed)


def best_of_grid(problem, budget, grid):
    """The peak with the lowest validation loss of a seed that reports nothing."""

    def validation_loss(peak):
        tx = osc.onecycle_adamw(peak, budget)
        params = problem.run(tx, budget, TUNING_SEED)
        return float(
            jnp.nan_to_num(problem.loss(params, problem.validation), nan=np.inf)
        )

    return min(grid, key=validation_loss)


def spread(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=len(values) > 1):.3f}"


def draw(results, path):
    figure, axes = plt.subplots(1, len(results), figsize=(11, 3.6))
    for ax, (name, arms) in zip(axes, results.items(), strict=True):
        for k, (arm, by_budget) in enumerate(arms.items()):
            means = [np.mean(losses) for losses in by_budget.values()]
            style = ("o-", "s--", "^:")[k]
            ax.plot([*by_budget], means, style, label=arm, linewidth=2)
        ax.set(ylim=0, title=name, xlabel="steps, probes included")
        ax.set_xticks([*by_budget])
    axes[0].set_ylabel("test loss")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, no story")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    problems = {"images": images, "text": text, "a table": table}
    seeds, budgets, grid = range(3), (250, 500, 1000), GRID
    if args.smoke:
        problems, seeds, budgets, grid = {"a table": table}, range(1), (150,), GRID[:2]
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    results, rows, report = {}, [], ""
    for name, load in problems.items():
        problem = Problem(*load())
        arms = {"no dials": {}, "AdamW 0.001": {}, f"best of {len(grid)}": {}}
        for budget in track(budgets, name):
            found = [no_dials(problem, budget, seed) for seed in seeds]
            peak = best_of_grid(problem, budget, grid)
            tx = osc.onecycle_adamw(peak, budget)
            trained = [
                [params for params, _ in found],
                [usual(problem, budget, seed) for seed in seeds],
                [problem.run(tx, budget, seed) for seed in seeds],
            ]
            for arm, every in zip(arms.values(), trained, strict=True):
                arm[budget] = [float(problem.loss(p, problem.test)) for p in every]
            used = np.mean([result.steps_used for _, result in found])
            peaks = [result.hyperparams["peak_learning_rate"] for _, result in found]
            row = [name, f"{budget:,}"]
            row += [spread(arm[budget]) for arm in arms.values()]
            row += [f"{min(peaks):.2g} to {max(peaks):.2g}", f"{peak:g}"]
            rows.append([*row, f"{used:.0f}", f"{len(grid) * budget:,}"])
            report = found[0][1].report()
        results[name] = arms
    columns = ["problem", "steps", *arms, "its peaks", "the grid's", "probes", "grid"]
    title = f"Test loss, mean ± s.d. of {len(seeds)} seeds; peaks; steps of tuning"
    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=150)
    console.print(shown)
    console.print("The last report of no dials:\n" + report)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "05_no_dials.png"
    if len(results) > 1:
        draw(results, path)
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
