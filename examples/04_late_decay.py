"""Stay at a large rate, decay when it is time, and branch a longer run off it.

A network with batch norms learns noisy digits at a constant rate. A watcher looks at
the validation loss and starts the cooldown when it has stopped falling: the rate decays
over a quarter of the steps so far. The state of the stable phase has been kept by
Orbax; from there the run goes on, twice as long, and decays then. Beside the last
weights, their running average is evaluated, with batch statistics of its own and with
those of the run, which belong to other weights. What is printed is what this run
measured.

    python examples/04_late_decay.py [--smoke] [--out FOLDER]
"""

import argparse
import itertools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import optax_superconv as osc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RATE, EVERY = 0.2, 50  # The watcher looks every 50 steps.
WARMUP = osc.phase_schedule(0.0, [osc.Phase(50, RATE)])
TX = optax.chain(osc.sgd(WARMUP, weight_decay=1e-3), osc.ema_params(0.99))


class MLP(nnx.Module):
    def __init__(self, rngs):
        pairs = list(itertools.pairwise((64, 128, 128)))
        self.layers = nnx.List(
            nnx.Linear(i, o, use_bias=False, rngs=rngs) for i, o in pairs
        )
        self.norms = nnx.List(nnx.BatchNorm(o, rngs=rngs) for _, o in pairs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x)


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))))


def start(seed):
    _, params, stats = nnx.split(MLP(nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
    return params, stats, TX.init(params)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def noisy(key, images):
    return images + jax.random.normal(key, images.shape)


@jax.jit
def step(state, images, labels, key):
    params, stats, opt_state = state

    def loss_fn(params):
        model = nnx.merge(GRAPH, params, stats, copy=True)
        logits = model(noisy(key, images))
        return cross_entropy(logits, labels), nnx.state(model, nnx.BatchStat)

    (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state


@jax.jit
def evaluate(params, stats, data):
    """Loss, and accuracy in per cent."""
    model = nnx.merge(GRAPH, params, stats, copy=True)
    model.eval()
    logits = model(data[0])
    return cross_entropy(logits, data[1]), 100 * (logits.argmax(-1) == data[1]).mean()


def load_data():
    """900 images to train, 300 to watch, 597 to test."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - 4.9) / 6.0).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    return [
        (jnp.asarray(images[part]), jnp.asarray(labels[part]))
        for part in np.split(order, [900, 1200])
    ]


class Run:
    """A state that is trained and watched; branches are copies of it."""

    def __init__(self, state, step, seed, data):
        self.state, self.step, self.seed, self.data = state, step, seed, data
        self.log = {}  # step: (rate, loss of the last weights, of their average)

    def watch(self):
        params, stats, opt_state = self.state
        average = osc.eval_params(opt_state, params)
        self.log[self.step] = (
            float(osc.read_hyperparams(opt_state)["learning_rate"]),
            *(float(evaluate(p, stats, self.data[1])[0]) for p in (params, average)),
        )

    def train(self, num_steps):
        for _ in range(num_steps):
            if self.step % EVERY == 0:
                self.watch()
            key = jax.random.fold_in(jax.random.key(self.seed), self.step)
            rows = jax.random.randint(key, (32,), 0, len(self.data[0][1]))
            self.state = step(self.state, *(a[rows] for a in self.data[0]), key)
            self.step += 1
        self.watch()

    def is_flat(self, looks):
        """Whether the mean of the last looks is hardly below that of those before."""
        losses = [loss for _, loss, _ in self.log.values()]
        last, before = losses[-looks:], losses[-2 * looks : -looks]
        return len(losses) > 2 * looks and np.mean(last) > 0.97 * np.mean(before)

    def resumed(self, state):
        return Run(state, self.step, self.seed, self.data)

    def decayed(self, num_steps):
        """A branch on which the cooldown starts now."""
        *rest, opt_state = self.state
        run = self.resumed((*rest, osc.start_cooldown(opt_state, num_steps)))
        run.train(num_steps + 1)  # The last at the end value.
        return run


def new_stats(params, stats, images):
    """The batch statistics after one more batch, in training mode."""
    model = nnx.merge(GRAPH, params, stats, copy=True)
    model(images)
    return nnx.state(model, nnx.BatchStat)


def results(run):
    """(loss, accuracy) on test images of the last weights and of their average."""
    params, stats, opt_state = run.state
    average = osc.eval_params(opt_state, params)
    keys = jax.random.split(jax.random.key(run.seed), 8)
    seen = [noisy(key, run.data[0][0]) for key in keys]  # As it was trained on.
    forward = jax.tree_util.Partial(new_stats, average)
    own = osc.recalibrate_batch_stats(forward, stats, seen)
    return [
        evaluate(params, stats, run.data[2]),
        evaluate(average, own, run.data[2]),
        evaluate(average, stats, run.data[2]),
    ]


def train_and_branch(seed, data, looks, most_steps, folder):
    main = Run(start(seed), 0, seed, data)
    while main.step < most_steps and not main.is_flat(looks):
        main.train(EVERY)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "stable", main.state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "stable", start(seed))
    longer = main.resumed(restored)
    longer.train(main.step)
    return {
        "stable": main,
        "decayed": main.decayed(main.step // 4),
        "stable, resumed": longer,
        "decayed later": longer.decayed(longer.step // 4),
    }


def draw(runs, path):
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(9, 6.5), layout="constrained"
    )
    for name, run in runs.items():
        rates, losses, averages = zip(*run.log.values(), strict=True)
        (line,) = top.plot([*run.log], rates, label=name)
        bottom.plot([*run.log], losses, color=line.get_color())
        style = {"color": line.get_color(), "linestyle": ":"}
        bottom.plot([*run.log], averages, **style)
    top.set(ylabel="learning rate", title="Branches of one run")
    top.legend(loc="lower left", bbox_to_anchor=(0.12, 0.05))
    bottom.plot([], [], "k", label="last weights")
    bottom.plot([], [], "k:", label="their average")
    bottom.set(xlabel="step", ylabel="validation loss", yscale="log")
    bottom.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, no story")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    seeds, looks, most_steps = range(5), 8, 4000
    if args.smoke:
        seeds, looks, most_steps = range(2), 1, 100
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    data = load_data()
    runs = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            runs.append(train_and_branch(seed, data, looks, most_steps, folder))

    def show(values, digits):
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"

    table = Table(title=f"Test loss, accuracy (%), mean ± s.d. of {len(seeds)} seeds")
    weights = ("last weights", "average", "average, statistics of the run")
    for column in ("branch", "steps", *weights):
        table.add_column(column, no_wrap=column != weights[-1])
    for name in runs[0]:
        branches = [run[name] for run in runs]
        measured = np.array([results(run) for run in branches])
        steps = show([run.step for run in branches], 0)
        pairs = (
            f"{show(measured[:, k, 0], 3)}, {show(measured[:, k, 1], 1)}"
            for k in range(3)
        )
        table.add_row(name, steps, *pairs)
    console = Console(width=110)
    console.print(table)
    path = args.out / "04_late_decay.png"
    draw(runs[0], path)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
