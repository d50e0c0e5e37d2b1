"""Does one run at a constant rate, with cooldowns, replace a tuned run per length?

Hägele et al. (2024) and MiniCPM (Hu et al., 2024) say so: a cooldown over the last 20 %
of the steps gives what a cosine that was tuned for this length gives, so that one run,
tuned once, serves all lengths. Here on a ResNet-9 and CIFAR-10 (16x16 pixels): per seed
one open-ended run of ``sgd`` to the longest length, off whose stored states
``start_cooldown`` forks cooldowns of 5, 10, 20 and 50 % of each of three lengths,
against a cosine to zero and ``onecycle_sgd``, each of which is run anew per length. All
have the same weight decay and the same batches per seed, augmented, and but for the one
cycle the same momentum and steps of warm-up.

    python benchmarks/late_decay_training.py [--smoke] [--data CIFAR10] [--out FOLDER]

About 40 minutes on two cores; what an interruption leaves is not run again. The peak
rate is the best of the same grid for all, by the mean accuracy of the final weights
over tuning seeds, which are not reported, on images that are not reported: cosine and
one cycle are tuned at each length, the constant rate once, by the 20 % cooldown of the
longest. A cosine that is tuned once for all lengths is not among them. Averages of the
weights (an exponential one over the last 7 to 12 % of the steps, LAWA over 5 snapshots)
were fixed beforehand; they are evaluated with batch statistics recalibrated on 2000
training images, and so are, to tell both effects apart, the last weights. Differences
are paired within a seed.

Two pictures: accuracy and loss over the steps, and, after
Ren, Ma and Ying (2024), the run and branches that drop the rate in the plane of their
two main directions, over train and test loss.

Without CIFAR-10, a small MLP with batch norm learns scikit-learn's digits, in a minute.
"""

import functools
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import data
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks
from flax import nnx
from jax.flatten_util import ravel_pytree

import optax_superconv as osc

SEEDS, TUNING_SEEDS = range(100, 105), range(1000, 1002)
RATES = [0.05, 0.1, 0.2, 0.4, 0.8]
PERCENTS = (5, 10, 20, 50)
TUNED = 20  # Of these, the cooldown that the constant rate is chosen by.
WEIGHT_DECAY = 5e-4
WEIGHTS = ("last", "recalibrated", "ema", "lawa")


class Setup(NamedTuple):
    """What is trained, on what, for how long."""

    task: tasks.Task  # its held-out images are those that rates are chosen by
    test: data.Batch  # images that are reported
    lengths: tuple[int, ...]  # of the runs, in steps
    warmup_steps: int  # of all rates but the one cycle's
    chunk: int  # steps of one call; divides all lengths, cooldowns and warm-ups


def cifar10(path: pathlib.Path) -> Setup:
    task = tasks.cifar10_resnet(path, 20_000, None)
    train, held_out = zip(*(np.split(array, 2) for array in task.train), strict=True)
    test, task = task.held_out, task._replace(train=train, held_out=held_out)
    return Setup(task, test, (600, 1200, 2400), 90, 30)


def digits(smoke: bool) -> Setup:
    def mlp(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(
            nnx.Linear(64, 32, rngs=rngs),
            nnx.BatchNorm(32, momentum=0.9, rngs=rngs),
            nnx.relu,
            nnx.Linear(32, 10, rngs=rngs),
        )

    train, others = data.split(*data.load_digits(), 800)
    held_out, test = (
        (others[0][part], others[1][part]) for part in np.split(np.arange(997), [400])
    )
    lengths, warmup_steps, chunk = ((20,), 4, 1) if smoke else ((100, 200), 20, 5)
    task = tasks.Task(
        "digits, MLP", mlp, tasks.cross_entropy, train, held_out, 32, lengths[-1]
    )
    return Setup(task, test, lengths, warmup_steps, chunk)


def averages(setup: Setup) -> optax.GradientTransformation:
    """The last n steps of (n ** 2/3), and the last five snapshots."""
    every = setup.chunk
    return optax.chain(
        osc.ema_params(0.999, warmup=2 / 3),
        osc.lawa_params(5, every=every, start_step=every - 1),
    )


def make_tx(setup: Setup, schedule: str, num_steps: int, rate) -> Any:
    """SGD with Nesterov momentum, whose rate is constant, a cosine, or one cycle."""
    if schedule == "one-cycle":
        sgd = osc.onecycle_sgd(rate, num_steps, weight_decay=WEIGHT_DECAY)
        return optax.chain(sgd, averages(setup))
    warmup_steps = setup.warmup_steps
    if schedule == "constant":
        learning_rate = osc.phase_schedule(0.0, [osc.Phase(warmup_steps, rate)])
    else:  # A cosine is a decay that begins at once.
        learning_rate = osc.warmup_stable_decay_schedule(
            rate,
            num_steps,
            warmup_steps=warmup_steps,
            decay_steps=num_steps - warmup_steps,
            shape="cosine",
        )
    sgd = osc.sgd(learning_rate, weight_decay=WEIGHT_DECAY)
    return optax.chain(sgd, averages(setup))


# --- training -------------------------------------------------------------------------

Key = tuple[str, int]  # schedule and length of what is tuned
Fork = tuple[int, int]  # step at which a cooldown begins, and its length; 0: none


def arm_name(percent: int) -> str:
    return f"{percent} % cooldown" if percent else "constant"


def forks(key: Key, lengths: Iterable[int], percents: Iterable[int]) -> dict[str, Fork]:
    """What is measured on runs of one schedule: ``"arm, length"`` to fork."""
    schedule, length = key
    if schedule != "constant":
        return {f"{schedule}, {length}": (length, 0)}
    return {
        f"{arm_name(percent)}, {length}": (length - steps, steps)
        for length in lengths
        for percent in percents
        for steps in [length * percent // 100]
    }


def cool_down(state, num_steps) -> Any:
    params, other, opt_state = state
    return params, other, osc.start_cooldown(opt_state, num_steps)


def advance(setup, training, state, rate, seed: int, begin: int, end: int) -> Any:
    """From step to step; a step's batch is the seed's, whatever ran before."""
    assert (end - begin) % setup.chunk == 0
    order = tasks.batch_indices(setup.task, 2 * setup.lengths[-1], seed)
    for k in range(begin, end, setup.chunk):
        chosen, key = order[k : k + setup.chunk], seed * 10**6 + k
        state, _ = training.run(state, np.float32(rate), chosen, key)
    return state


def run_branches(
    setup, training, rate, seed, points: Mapping[str, Fork], measure
) -> dict[str, Any]:
    """What ``measure`` gives at the ends of cooldowns off one and the same run."""
    run = functools.partial(advance, setup, training)
    state, at, found = training.start(seed), 0, {}
    for name, (begin, steps) in sorted(points.items(), key=lambda p: p[1]):
        state = run(state, rate, seed, at, begin)
        at, branch = begin, state
        if steps:
            branch = cool_down(state, steps)
            branch = run(branch, rate, seed, begin, begin + steps)
        found[name] = measure(setup, branch)
    return found


def recalibrated(network: tasks.Network, params, stats, batches) -> Any:
    """The batch statistics that belong to ``params``."""

    def forward(params, stats, images) -> Any:
        model = network.model(params, stats)
        model(images)
        return nnx.state(model, nnx.BatchStat)

    update_fn = jax.tree_util.Partial(forward, params)
    return osc.recalibrate_batch_stats(update_fn, stats, batches)


def score(setup: Setup, state) -> np.ndarray:
    """Accuracy in % and loss on the images that rates are chosen by."""
    network = tasks.network_of(setup.task.make_model)
    return np.asarray(network.score(*state[:2], setup.task.held_out))


def scores_of(setup: Setup, state) -> dict[str, np.ndarray]:
    """The same on the images that are reported, of ``WEIGHTS``."""
    network = tasks.network_of(setup.task.make_model)
    params, other, opt_state = state
    images = setup.task.train[0][:2000]
    batches = [images[k : k + 500] for k in range(0, len(images), 500)]
    found = {}
    for name in WEIGHTS:
        if name in ("ema", "lawa"):
            params = osc.eval_params(opt_state, state[0], name=name)
        if name != "last":
            other = recalibrated(network, params, state[1], batches)
        found[name] = np.asarray(network.score(params, other, setup.test))
    return found


# --- the plane ------------------------------------------------------------------------


def main_plane(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre of (n, d) points, (2, d) main directions, their shares of the variance."""
    centre = points.mean(0)
    _, scales, directions = np.linalg.svd(points - centre, full_matrices=False)
    return centre, directions[:2], scales[:2] ** 2 / np.sum(scales**2)


def plane(setup: Setup, training, rate: float, seed: int) -> dict[str, Any]:
    """A run, and branches that drop its rate, in the plane of their two directions.

    Losses are on 2000 images of each kind, with the batch statistics of these images.
    """
    run = functools.partial(advance, setup, training)
    length, chunk = setup.lengths[-1], setup.chunk
    cooldown, *at = (length * k // 8 // chunk * chunk for k in (1, 1, 2, 3, 4, 6, 8))
    state = training.start(seed)
    other = state[1]
    unravel = ravel_pytree(state[0])[1]

    def follow(state, begin, end) -> tuple[Any, np.ndarray]:
        """Weights before, and after every second chunk."""
        points = [ravel_pytree(state[0])[0]]
        for k in range(begin, end, 2 * chunk):
            state = run(state, rate, seed, k, min(k + 2 * chunk, end))
            points.append(ravel_pytree(state[0])[0])
        return state, np.array(points)

    state = run(state, rate, seed, 0, at[0])
    path, branches = [], []
    for begin, end in zip(at, [*at[1:], length], strict=True):
        branch = cool_down(state, cooldown)
        branches.append(follow(branch, begin, begin + cooldown)[1])
        state, points = follow(state, begin, end)
        path.append(points)
    centre, directions, shares = main_plane(np.concatenate([*path, *branches]))
    path, *in_plane = (
        (points - centre) @ directions.T for points in (np.concatenate(path), *branches)
    )
    drawn = np.concatenate([path, *in_plane])
    low, high = drawn.min(0), drawn.max(0)
    margin = 0.15 * (high - low)
    axes = np.linspace(low - margin, high + margin, 21).T  # (2, 21)
    grid = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2) @ directions + centre
    batches = [(x[:2000], y[:2000]) for x, y in (setup.task.train, setup.test)]

    @jax.jit
    def losses_at(weights) -> jax.Array:
        params = unravel(weights)
        return jnp.stack([training.loss_fn(params, other, b) for b in batches])

    losses = np.array([losses_at(weights) for weights in grid])
    return {
        "shares": shares,
        "axes": axes,
        "train": losses[:, 0].reshape(21, 21),
        "test": losses[:, 1].reshape(21, 21),
        "path": path,
        "branches": in_plane,
        "at": at,
        # Of the weights, off the plane: (branch, before and after, train and test).
        "losses": [[losses_at(branch[k]) for k in (0, -1)] for branch in branches],
    }


# --- what comes out -------------------------------------------------------------------

Scores = dict[str, dict[str, np.ndarray]]  # "arm, length", weights: (seeds, 2)


def less(scores: Scores, arm: str, other: str, length: int) -> str:
    """Of the accuracies of the last weights."""
    ours, theirs = (scores[f"{k}, {length}"]["last"][:, 0] for k in (arm, other))
    return harness.paired(ours, theirs).short()


def table(
    scores: Scores, lengths: Sequence[int], best: Mapping[Key, float], rates
) -> list[dict[str, Any]]:
    """A row per length and arm."""
    arms = list(dict.fromkeys(name.split(", ")[0] for name in scores))
    rows = []
    for length, arm in itertools.product(lengths, arms):
        weights, cosine = scores[f"{arm}, {length}"], scores[f"cosine, {length}"]
        accuracy, loss = weights["last"].T
        rate = best.get((arm, length), best["constant", lengths[-1]])
        less_loss = harness.paired(loss, cosine["last"][:, 1]).short(3)
        row = {
            "steps": length,
            "arm": arm,
            "peak rate": harness.show_rate(rate, rates),
            "accuracy (%)": harness.mean_and_std(accuracy),
            **{
                f"less {other}": less(scores, arm, other, length) * (arm != other)
                for other in arms
                if other in ("cosine", "one-cycle")
            },
            "loss": harness.mean_and_std(loss, digits=3).split(" (")[0],
            "less cosine's": less_loss * (arm != "cosine"),
        }
        for name in WEIGHTS[1:]:
            row[name] = harness.paired(weights[name][:, 0], accuracy).short()
        rows.append(row)
    return rows


def costs(lengths: Sequence[int], num_tuning: int, num_seeds: int) -> list[int]:
    """Steps in all: of a tuned run per length, and of one run and its cooldowns."""
    cooldowns = [n * TUNED // 100 for n in lengths]
    one_run = lengths[-1] - cooldowns[-1] + sum(cooldowns)
    return [
        (num_tuning + num_seeds) * sum(lengths),
        num_tuning * lengths[-1] + num_seeds * one_run,
    ]


def draw_lengths(setup: Setup, scores: Scores, path) -> None:
    """Accuracy and loss over the steps of a run, mean and standard error."""
    arms = dict.fromkeys(name.split(", ")[0] for name in scores)
    lines = [(arm, "last") for arm in arms] + [("constant", k) for k in WEIGHTS[2:]]
    styles = {"cosine": "ks-", "one-cycle": "ks--"}
    layout = [["test accuracy (%)", "test loss"]]
    with harness.figure(path, layout, (11, 4.6)) as (figure, axes):
        for k, (arm, weights) in enumerate(lines):
            steps = np.array(setup.lengths) * 1.01 ** (k - len(lines) / 2)  # Apart.
            style = styles.get(arm, "o-" if weights == "last" else "o:")
            label = arm if weights == "last" else f"{arm}, {weights}"
            for part, ax in enumerate(axes.values()):
                samples = [
                    scores[f"{arm}, {n}"][weights][:, part] for n in setup.lengths
                ]
                harness.curve(ax, steps, samples, style, label)
        for what, ax in axes.items():
            ax.set(xscale="log", xlabel="steps of the run", ylabel=what)
            ax.set_xticks(setup.lengths, list(map(str, setup.lengths)))
            ax.minorticks_off()
        axes["test accuracy (%)"].legend()
        seeds = len(scores[f"constant, {setup.lengths[-1]}"]["last"])
        figure.suptitle(f"{setup.task.name}: mean ± s.e. of {seeds} seeds")


def draw_plane(setup: Setup, found: Mapping[str, Any], path) -> None:
    """The main path and its branches over both losses."""
    losses = np.array(found["losses"], float)
    shares = [f"{100 * share:.0f} % of the variance" for share in found["shares"]]
    with harness.figure(path, [["train", "test"]], (12.5, 5.4)) as (figure, axes):
        for k, (part, ax) in enumerate(axes.items()):
            grid = np.array(found[part], float)
            levels = np.geomspace(np.nanmin(grid), np.nanmax(grid), 20)
            filled = ax.contourf(*found["axes"], grid, levels)
            figure.colorbar(filled, ax=ax, format="%.2f")
            ax.plot(*np.transpose(found["path"]), "w.-", label="constant rate")
            for n, branch in enumerate(found["branches"]):
                before, after = losses[n, :, k]
                label = f"cooldown at {found['at'][n]}: {before:.2f} to {after:.2f}"
                ax.plot(*np.transpose(branch), color=f"C{n + 1}", label=label)
                ax.plot(*branch[-1], "*", color=f"C{n + 1}", markersize=12)
            ax.set(title=f"{part} loss", xlabel=f"first direction, {shares[0]}")
            ax.grid(visible=False)
            ax.legend(fontsize="x-small", facecolor="0.8")
        axes["train"].set_ylabel(f"second direction, {shares[1]}")
        figure.suptitle(f"{setup.task.name}: one run and cooldowns, in its main plane")


def main() -> None:
    args = harness.parse_args(__doc__, takes_data=True)
    rates, seeds, tuning_seeds = RATES, SEEDS, TUNING_SEEDS
    if args.smoke:
        rates, seeds, tuning_seeds = rates[1:3], seeds[:2], tuning_seeds[:1]
    setup = digits(args.smoke) if args.data is None else cifar10(args.data)
    schedules = ("cosine",) if args.smoke else ("cosine", "one-cycle")
    lengths = setup.lengths
    # Long runs first; neighbours, which run together, are different programs.
    constant = "constant", lengths[-1]
    keys = [(k, n) for n in lengths[::-1] for k in schedules]
    keys.insert(1, constant)
    trainings = {
        key: tasks.Training(setup.task, functools.partial(make_tx, setup, *key))
        for key in keys
    }

    def tuning_run(key: Key, rate: float, seed: int) -> np.ndarray:
        points = forks(key, [key[1]], [TUNED])
        run = setup, trainings[key], rate, seed, points, score
        (found,) = run_branches(*run).values()
        return found

    def run(key: Key, seed: int) -> dict[str, Any]:
        points = forks(key, lengths, [0, *PERCENTS])
        return run_branches(setup, trainings[key], best[key], seed, points, scores_of)

    best, tuning = harness.tune(tuning_run, keys, rates, tuning_seeds, args.parts)
    measured = harness.sweep(run, itertools.product(keys, seeds), args.parts / "runs")
    in_plane = harness.resumable(
        args.parts / "plane.json",
        lambda: plane(setup, trainings[constant], best[constant], seeds[0]),
    )
    scores: Scores = {
        name: {
            weights: np.array([measured[key, s][name][weights] for s in seeds], float)
            for weights in WEIGHTS
        }
        for key in sorted(keys, key=lambda key: key[0] == "constant")
        for name in forks(key, lengths, [0, *PERCENTS])
    }

    separate, together = costs(lengths, len(rates) * len(tuning_seeds), len(seeds))
    gains = [
        f"less {other} "
        + ", ".join(less(scores, arm_name(TUNED), other, n) for n in lengths)
        for other in schedules
    ]
    harness.report(
        args,
        "late_decay_training",
        f"{setup.task.name}, batches of {setup.task.batch_size}: mean ± s.d. (n), "
        "differences ± s.e.; recalibrated, ema, lawa: accuracy less that of the last "
        "weights with their running statistics. Steps in all, tuning "
        f"included: {separate:,} of cosine, {together:,} of {arm_name(TUNED)}s",
        table(scores, lengths, best, rates),
        {
            "rates": rates,
            "tuning": {"{}, {}".format(*key): grid for key, grid in tuning.items()},
            "scores": scores,
            "plane": in_plane,
        },
        "Does one run with cooldowns replace a run tuned for each length?",
        f"{TUNED} % cooldown / " + ", ".join(schedules),
        ", ".join(map(str, lengths)),
        "; ".join(gains) + f" points of accuracy (± s.e., n={len(seeds)})",
        f"{together / separate:.2f} of the steps, with tuning",
    )
    draw_lengths(setup, scores, args.out / "late_decay_training.png")
    draw_plane(setup, in_plane, args.out / "late_decay_plane.png")


if __name__ == "__main__":
    main()
