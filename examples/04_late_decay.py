"""Stay at a large rate, decay when it is time, and branch a longer run off it.

A network with batch norms learns noisy digits at a constant rate. A watcher looks at
the validation loss and starts the cooldown when it has stopped falling: the rate decays
over a quarter of the steps so far. The state of the stable phase has been kept by
Orbax; from there the run goes on, twice as long, and decays then. Beside the last
weights, their running average is evaluated, with batch statistics of its own and with
those of the run, which belong to other weights. What is printed is what this run
measured; 04_late_decay.json has it too, and examples/results what the guide quotes.

    python examples/04_late_decay.py [--smoke] [--out FOLDER]
"""

import argparse
import itertools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

import optax_superconv as osc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RATE, EVERY = 0.2, 50  # The watcher looks every 50 steps.
WARMUP = osc.phase_schedule(0.0, [osc.Phase(50, RATE)])
WEIGHTS = "last weights", "average", "average, statistics of the run"
TX = optax.chain(osc.sgd(WARMUP, weight_decay=1e-3), osc.ema_params(0.99))


class MLP(nnx.Module):
    def __init__(self, rngs):
        pairs = list(itertools.pairwise((64, 128, 128)))
        linear = (nnx.Linear(*p, use_bias=False, rngs=rngs) for p in pairs)
        self.layers = nnx.List(linear)
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


def loss_fn(params, stats, images, labels):
    """In training mode; and the batch statistics after this batch."""
    model = nnx.merge(GRAPH, params, stats, copy=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
    return losses.mean(), nnx.state(model, nnx.BatchStat)


@jax.jit
def step(state, images, labels, key):
    params, stats, opt_state = state
    noisy = images + jax.random.normal(key, images.shape)
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats, noisy, labels)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state


@jax.jit
def evaluate(params, stats, images, labels):
    """Loss, and accuracy in per cent."""
    model = nnx.merge(GRAPH, params, stats, copy=True)
    model.eval()
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.stack([losses.mean(), 100 * (logits.argmax(-1) == labels).mean()])


def train(run, data, num_steps):
    """The run (state, step, seed, log) so many steps later, watched on the way."""
    (images, labels), held_out, _ = data
    state, first, seed, log = run
    log = dict(log)
    for count in range(first, first + num_steps + 1):
        if count % EVERY == 0 or count == first + num_steps:
            params, stats, opt_state = state
            both = params, osc.eval_params(opt_state, params)
            losses = (float(evaluate(p, stats, *held_out)[0]) for p in both)
            log[count] = osc.read_hyperparams(opt_state)["learning_rate"], *losses
        if count < first + num_steps:
            key = jax.random.fold_in(jax.random.key(seed), count)
            rows = jax.random.randint(key, (32,), 0, len(labels))
            state = step(state, images[rows], labels[rows], key)
    return state, first + num_steps, seed, log


def is_flat(log, looks):
    """Whether the mean of the last looks is hardly below that of those before."""
    losses = [loss for _, loss, _ in log.values()]
    last, before = losses[-looks:], losses[-2 * looks : -looks]
    return len(losses) > 2 * looks and np.mean(last) > 0.97 * np.mean(before)


def cooled(run, data):
    """A branch on which the cooldown starts now."""
    (*rest, opt_state), count, seed, _ = run
    opt_state = osc.start_cooldown(opt_state, count // 4)
    run = (*rest, opt_state), count, seed, {}
    return train(run, data, count // 4 + 1)  # The last at the end value.


def train_and_branch(seed, data, looks, most_steps):
    main = start(seed), 0, seed, {}
    while main[1] < most_steps and not is_flat(main[3], looks):
        main = train(main, data, EVERY)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as disk:
        disk.save(pathlib.Path(folder) / "stable", main[0])
        disk.wait_until_finished()
        restored = disk.restore(pathlib.Path(folder) / "stable", start(seed))
    longer = train((restored, main[1], seed, {}), data, main[1])
    runs = {"stable": main, "decayed": cooled(main, data), "stable, resumed": longer}
    return runs | {"decayed later": cooled(longer, data)}


def results(run, data):
    """On test images, of the last weights and of their average, with two statistics."""
    (params, stats, opt_state), _, seed, _ = run
    average, (images, labels) = osc.eval_params(opt_state, params), data[0]
    keys = jax.random.split(jax.random.key(seed), 8)
    seen = [images + jax.random.normal(key, images.shape) for key in keys]
    own = osc.recalibrate_batch_stats(
        lambda stats, images: loss_fn(average, stats, images, labels)[1], stats, seen
    )
    pairs = (params, stats), (average, own), (average, stats)
    return [evaluate(*pair, *data[2]) for pair in pairs]


def draw(runs, path):
    figure, axes = plt.subplots(
        2, 1, sharex=True, figsize=(9, 6.5), layout="constrained"
    )
    for k, (name, (*_, log)) in enumerate(runs.items()):
        rates, losses, averages = zip(*log.values(), strict=True)
        axes[0].plot([*log], rates, f"C{k}", label=name)
        axes[1].plot([*log], losses, f"C{k}")
        axes[1].plot([*log], averages, f"C{k}:")
    axes[0].set(ylabel="learning rate", title="Branches of one run")
    axes[0].legend(loc="lower left", bbox_to_anchor=(0.12, 0.05))
    axes[1].plot([], [], "k", label="last weights")
    axes[1].plot([], [], "k:", label="their average")
    axes[1].set(xlabel="step", ylabel="validation loss", yscale="log")
    axes[1].legend(loc="upper right")
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
    # 900 images to train, 300 to watch, 597 to test.
    images, labels = load_digits(return_X_y=True)
    images = ((images - 4.9) / 6.0).astype(np.float32)
    parts = np.split(np.random.default_rng(0).permutation(len(labels)), [900, 1200])
    data = [(jnp.asarray(images[part]), jnp.asarray(labels[part])) for part in parts]
    runs = [train_and_branch(seed, data, looks, most_steps) for seed in seeds]

    rows = []
    for name in runs[0]:
        measured = np.array([results(run[name], data) for run in runs])
        steps = np.mean([run[name][1] for run in runs])
        row = {"run": name, "steps": f"{steps:.0f}"}
        for weights, sample in zip(WEIGHTS, measured.swapaxes(0, 1), strict=True):
            (loss, right), (loss_sd, right_sd) = sample.mean(0), sample.std(0, ddof=1)
            cell = f"{loss:.3f} ± {loss_sd:.3f}, {right:.1f} ± {right_sd:.1f}"
            row[weights] = cell
        rows.append(row)
    print(f"Test loss, accuracy (%), mean ± s.d. of {len(seeds)} seeds")
    for cells in (rows[0], *(row.values() for row in rows)):
        print("".join(f"{cell:32}" for cell in cells))
    args.out.mkdir(parents=True, exist_ok=True)
    where = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    record = json.dumps(where | {"seeds": len(seeds), "rows": rows}, indent=1)
    (args.out / "04_late_decay.json").write_text(record + "\n")
    path = args.out / "04_late_decay.png"
    draw(runs[0], path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
