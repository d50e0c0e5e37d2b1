"""How many steps does a large rate save? Super-convergence on CIFAR-10, at CPU size.

The question, fixed beforehand: how many steps does each arm need to reach what the
conventional run reaches? That is the length of a run at which the mean final test
accuracy, interpolated in the log of the steps spent between runs of different lengths,
equals the textbook run's of 960, 1,920 and 3,840 steps; a row each. The interval is
from the lowest to the highest of what each seed alone gives.

A ResNet-9 (Page, 2018) of width 16 learns 10,000 images of 16x16 pixels, flipped and
shifted, in batches of 250: 40 steps an epoch. SGD has Nesterov momentum and weight
decay 5e-4. Three seeds report, on the 10,000 test images; another one tunes, on 2,000
other images. Curves of test accuracy have at most 12 points.

- textbook: SGD at 0.1, cut to a tenth at one half and at three quarters (He et al.,
  2016), for 12, 24, 48 and 96 epochs.
- AdamW at 1e-3, constant, or a cosine after 5 % of warm-up, for 12 and 24 epochs.
- one cycle (Smith and Topin, 2018) at the peak that a range test of 200 steps suggests
  to each seed, for 6, 12, 24 and 48 epochs; these 200 steps are counted. How a test
  without a divergence is read was changed, before any run here, because on this network
  it suggested a tenth of the best peak of a pilot with another seed.
- at equal lengths, tuned without counting it: one cycle, the step schedule, and a
  cosine after 5 % of warm-up, for 12 and 24 epochs each at the best of three peaks a
  factor of two apart, or of one more beyond the best for as long as that is at an edge,
  up to six; and with ``longer`` for 48 epochs at the peak of 24. One seed and 2,000
  images tell peaks that are close to each other apart only by luck.

Variants, of 24 epochs at the tuned peak unless they say otherwise: one cycle at a
constant momentum, or another weight decay; one cycle and the textbook run on half of
the images.

    python benchmarks/super_convergence.py --data CIFAR10 [--smoke] [--out FOLDER]
        [--only speed longer variants]

On two cores ``speed`` takes three hours, the others about two; what an interruption
leaves is not run again. A smoke run learns digits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import data
import harness
import jax.numpy as jnp
import networks
import numpy as np
import optax
import tasks

import optax_superconv as osc

RATE, ADAMW_RATE, WEIGHT_DECAY = 0.1, 1e-3, 5e-4
TABLES = ("speed", "longer", "variants")
# Where the search begins.
PEAKS = {"one cycle": 0.8, "step schedule": 0.1, "cosine": 0.4}


@dataclasses.dataclass(frozen=True, eq=False)  # Hashable: trainings are cached.
class Setup:
    """What is trained, on what, for how long."""

    task: tasks.Task  # its held-out images are those that peaks are chosen by
    test: data.Batch  # images that are reported
    epoch: int  # steps of one call, which divide all lengths
    epochs: tuple[int, ...]  # of the textbook run
    found_epochs: tuple[int, ...]  # of one cycle at a peak from a range test
    tuned_epochs: tuple[int, ...]
    probe_steps: int
    seeds: tuple[int, ...]
    tuning_seed: int = 100


def task_of(name: str, make_model, *data_and_sizes: Any) -> tasks.Task:
    task = tasks.Task(name, make_model, tasks.cross_entropy, *data_and_sizes)
    return task._replace(augment=data.flip_and_shift)


def cifar10(path) -> Setup:
    (images, labels), test = data.load_cifar10(path, num_train=12_000, side=16)
    train, others = (
        (images[part], labels[part]) for part in (slice(10_000), slice(10_000, None))
    )
    name = f"{data.name_of(path)} 16x16, ResNet-9"
    network = functools.partial(networks.ResNet9, 16)
    task = task_of(name, lambda rngs: network(rngs=rngs), train, others, 250, 96 * 40)
    epochs = (12, 24, 48, 96), (6, 12, 24, 48), (12, 24)
    return Setup(task, test, 40, *epochs, probe_steps=200, seeds=(0, 1, 2))


def digits() -> Setup:
    images, labels = data.load_digits(as_images=True)
    train, test = data.split(images.repeat(3, axis=-1), labels, 1000)
    network = functools.partial(networks.CNN, 3, 8, num_classes=10)
    task = task_of("digits, CNN", lambda rngs: network(rngs=rngs), train, test, 100, 40)
    return Setup(task, test, 10, (2, 4), (1, 2), (2,), probe_steps=60, seeds=(0,))


# --- training -------------------------------------------------------------------------


class Run(NamedTuple):
    """What is trained, but for its seed."""

    schedule: str
    epochs: int
    peak: float
    momentum: str = "cycled"  # or constant; other schedules' always is
    weight_decay: float = WEIGHT_DECAY
    images: int = 0  # 0: all


def dials_of(setup: Setup, run: Run) -> np.ndarray:
    """Rate, momentum and weight decay of each step, (3, longest); 0 after the end.

    They are an argument of the program, so one serves all schedules and lengths.
    """
    steps = run.epochs * setup.epoch
    count = np.arange(steps)
    rate, momentum = np.full(steps, run.peak), np.full(steps, 0.9)
    if run.schedule == "one cycle":
        rate, cycled = (schedule(count) for schedule in osc.onecycle(run.peak, steps))
        momentum = cycled if run.momentum == "cycled" else momentum
    elif run.schedule == "step schedule":
        cuts = {steps // 2: 0.1, steps * 3 // 4: 0.1}
        rate = optax.piecewise_constant_schedule(run.peak, cuts)(count)
    elif run.schedule.endswith("cosine"):
        warmup = steps // 20
        rate = optax.warmup_cosine_decay_schedule(0.0, run.peak, warmup, steps)(count)
    dials = np.stack([rate, momentum, np.full(steps, run.weight_decay)])
    return np.pad(dials, ((0, 0), (0, setup.task.num_steps - steps)))


@functools.cache
def training_of(setup: Setup, optimizer: str) -> tasks.Training:
    make_tx = functools.partial(tasks.with_dials, optimizer, b2=0.999)
    return tasks.Training(setup.task, make_tx)


def train(setup: Setup, run: Run, seed: int, examples: data.Batch) -> dict[str, Any]:
    """Accuracies in % along a run and after it."""
    training = training_of(setup, "adamw" if "AdamW" in run.schedule else "sgd")
    dials = jnp.asarray(dials_of(setup, run), jnp.float32)
    params, other = training.network.start(seed)
    state = params, other, training.make_tx(dials).init(params)
    count = run.images or len(setup.task.train[1])
    num_steps, every = run.epochs * setup.epoch, -(-run.epochs // 12)
    indices = tasks.shuffled(count, setup.task.batch_size, num_steps, seed)
    curve = {}
    for k in range(run.epochs):
        part = indices[k * setup.epoch : (k + 1) * setup.epoch]
        state, _ = training.run(state, dials, part, seed * 10**6 + k)
        if (k + 1) % every == 0 or k + 1 == run.epochs:
            score = training.network.score(*state[:2], examples)
            curve[(k + 1) * setup.epoch] = float(score[0])
    return {"steps": [*curve], "accuracies": [*curve.values()]}


def found_peak(setup: Setup, seed: int) -> float:
    """What a range test suggests to a seed, on batches in an order of their own."""
    tx = osc.sgd(RATE, weight_decay=WEIGHT_DECAY)  # This rate never acts.
    training = tasks.Training(setup.task, lambda _: tx)
    result = osc.range_test(
        lambda state, batch: training.step(state, 1.0, batch),
        training.start(seed),
        training.batches(1000 + seed, setup.probe_steps),
        num_steps=setup.probe_steps,
    )
    return osc.suggest_learning_rate(result)


def tuned_peak(setup: Setup, schedule: str, epochs: int) -> dict[str, Any]:
    """The best of three peaks, or of more, until it is not at an edge."""
    scores: dict[float, float] = {}
    best, wanted = PEAKS[schedule], [PEAKS[schedule] * k for k in (0.5, 1.0, 2.0)]
    while wanted:
        for peak in wanted:
            run = setup, Run(schedule, epochs, peak), setup.tuning_seed
            scores[peak] = train(*run, setup.task.held_out)["accuracies"][-1]
        best = max(scores, key=lambda peak: scores[peak])
        beyond = {min(scores): best / 2, max(scores): best * 2}
        wanted = [beyond[best]] if best in beyond and len(scores) < 6 else []
    peaks = sorted(scores)
    return {"peak": best, "peaks": peaks, "accuracies": [scores[p] for p in peaks]}


# --- arms -----------------------------------------------------------------------------

Lengths = list[list[Run]]  # (lengths, seeds)


def same(setup: Setup, schedule: str, epochs: Sequence[int], peak: float) -> Lengths:
    return [[Run(schedule, e, peak)] * len(setup.seeds) for e in epochs]


def arms_of(
    setup: Setup, found: Mapping[Any, float], tuned: Mapping[Any, Any], longer: bool
) -> dict[str, Lengths]:
    """By name. The peaks are those of a range test by seed, and the tuned ones."""
    arms = {
        "textbook step schedule": same(setup, "step schedule", setup.epochs, RATE),
        "AdamW 1e-3": same(setup, "AdamW constant", setup.tuned_epochs, ADAMW_RATE),
        "AdamW 1e-3, cosine": same(
            setup, "AdamW cosine", setup.tuned_epochs, ADAMW_RATE
        ),
        "one cycle, range test": [
            [Run("one cycle", e, found[(seed,)]) for seed in setup.seeds]
            for e in setup.found_epochs
        ],
    }
    for schedule in PEAKS:
        peaks = {
            epochs: tuned[schedule, epochs]["peak"] for epochs in setup.tuned_epochs
        }
        if longer:
            peaks[2 * setup.tuned_epochs[-1]] = peaks[setup.tuned_epochs[-1]]
        arms[f"{schedule}, tuned"] = [
            of
            for epochs, peak in peaks.items()
            for of in same(setup, schedule, [epochs], peak)
        ]
    return arms


def variants_of(setup: Setup, tuned: Mapping[Any, Any]) -> dict[str, Run]:
    """One cycle at its tuned peak, and the textbook run, otherwise regularised."""
    epochs, half = setup.tuned_epochs[-1], len(setup.task.train[1]) // 2
    base = Run("one cycle", epochs, tuned["one cycle", epochs]["peak"])
    textbook = Run("step schedule", setup.epochs[-1], RATE)
    found = {"one cycle": base, "momentum 0.9": base._replace(momentum="constant")}
    for decay in (1e-3, 1e-4, 1e-5):
        found[f"weight decay {decay:g}"] = base._replace(weight_decay=decay)
    found["half of the images"] = base._replace(images=half)
    found["textbook"] = textbook
    found["textbook, half of the images"] = textbook._replace(images=half)
    return found


# --- what comes out -------------------------------------------------------------------


class Arm(NamedTuple):
    """What runs of several lengths cost and reach."""

    spent: np.ndarray  # (lengths,), steps, those of a range test included
    finals: np.ndarray  # (lengths, seeds), %

    def steps_to(self, target: float, seed: int | None = None) -> float:
        """Of the seeds' mean or of one: 0 for below the shortest run, or infinity."""
        reached = self.finals.mean(axis=1) if seed is None else self.finals[:, seed]
        above = np.flatnonzero(reached >= target)
        if not above.size or above[0] == 0:
            return 0.0 if above.size else np.inf
        near = slice(above[0] - 1, above[0] + 1)
        return float(np.exp(np.interp(target, reached[near], np.log(self.spent[near]))))


def ratios(arm: Arm, textbook: Arm, row: int) -> list[float]:
    """Steps to what the textbook run reaches, over its: of the mean, and of seeds."""
    finals = textbook.finals[row]
    found = [arm.steps_to(finals.mean())]
    found += [arm.steps_to(target, seed) for seed, target in enumerate(finals)]
    return [steps / textbook.spent[row] for steps in found]


def show_ratios(arm: Arm, found: Sequence[float], length: int) -> str:
    """``of the mean (lowest to highest of the seeds)``."""

    def show(ratio: float) -> str:
        if ratio in (0, np.inf):
            sign, end = ("<", arm.spent[0]) if ratio == 0 else (">", arm.spent[-1])
            return f"{sign} {end / length:.2f}"
        return f"{ratio:.2f}"

    mean, *each = found
    shown = [show(ratio) for ratio in (mean, min(each), max(each))]
    return shown[0] if len({*shown}) == 1 else "{} ({} to {})".format(*shown)


def draw(setup: Setup, arms: Mapping[str, Arm], curves: Iterable[Any], path) -> None:
    """A point for each length of an arm; its bar spans the seeds."""
    with harness.figure(path, [["all"]], (9, 5.4)) as (_, axes):
        ax = axes["all"]
        for k, (name, arm) in enumerate(arms.items()):
            means = arm.finals.mean(axis=1)
            bars = np.abs([f(arm.finals, axis=1) - means for f in (np.min, np.max)])
            style: Any = {"color": f"C{k}", "linewidth": 3 if "range" in name else 1.5}
            ax.errorbar(arm.spent, means, bars, fmt="o-", label=name, **style)
        for name, steps, accuracies in curves:
            color = f"C{list(arms).index(name)}"
            ax.plot(steps, accuracies, color, linewidth=1, alpha=0.6, zorder=0)
        ax.plot([], [], "0.6", linewidth=1, label="along a run, mean")
        low = min(arm.finals.min() for arm in arms.values())
        ax.set(xlim=0, ylim=(low - 1, None), xlabel="training steps spent")
        ax.set_ylabel("test accuracy after the run (%)")
        ax.set_title(f"{setup.task.name}: mean and range of {len(setup.seeds)} seeds")
        ax.legend(loc="lower right")


def report_speed(args, setup: Setup, runs, done, probes, tuned) -> None:
    finals = {key: found["accuracies"][-1] for key, found in done.items()}
    arms = {}
    for name, arm in runs.items():
        probe = setup.probe_steps if "range test" in name else 0
        spent = np.array([of[0].epochs * setup.epoch + probe for of in arm])
        reached = [
            [finals[*run, seed] for run, seed in zip(of, setup.seeds, strict=True)]
            for of in arm
        ]
        arms[name] = Arm(spent, np.array(reached, float))
    ours, (textbook, *others) = "one cycle, range test", arms
    compared, rows = {}, []
    for row, epochs in enumerate(setup.epochs):
        if epochs < setup.tuned_epochs[-1]:
            continue
        length = epochs * setup.epoch
        found = {name: ratios(arms[name], arms[textbook], row) for name in others}
        compared[length] = found
        reached = harness.mean_and_std(arms[textbook].finals[row]).split(" (")[0]
        cells = {n: show_ratios(arms[n], found[n], length) for n in others}
        rows.append({"textbook run": f"{length:,} steps: {reached} %"} | cells)

    lengths = sorted({n for arm in arms.values() for n in arm.spent})
    accuracies = []
    for name, arm in arms.items():
        peaks = dict.fromkeys(f"{run.peak:.2g}" for of in runs[name] for run in of)
        of_tuning = [t["peaks"] for (s, _), t in tuned.items() if name == f"{s}, tuned"]
        steps = [len(p) * n for p, n in zip(of_tuning, arm.spent, strict=False)]
        row = {"arm": name, "peak": ", ".join(peaks), "tuning steps": f"{sum(steps):,}"}
        at = dict(zip(arm.spent, arm.finals, strict=True))
        row |= {
            f"{n:,}": harness.mean_and_std(at[n]).split(" (")[0] if n in at else ""
            for n in lengths
        }
        accuracies.append(row)

    told = [
        show_ratios(arms[ours], found[ours], length)
        for length, found in compared.items()
    ]
    tuned_cycle = arms["one cycle, tuned"].finals.mean(axis=0)  # Of equal lengths.
    gains = {
        name: harness.paired(tuned_cycle, arms[name].finals.mean(axis=0)).short()
        for name in ("step schedule, tuned", "cosine, tuned")
    }
    claim = (
        "How many steps does a large rate save?",
        f"{ours} / {textbook}; at equal lengths, one cycle less others, all tuned",
        ", ".join(map(str, compared)),
        f"{', '.join(told)} of the steps to the same accuracy; points of accuracy less "
        + "; ".join(f"{name} {gain}" for name, gain in gains.items())
        + f" (n={len(setup.seeds)})",
        f"{setup.probe_steps} steps of range test, counted",
    )
    harness.report(
        args,
        "super_convergence",
        f"{setup.task.name}: steps to the mean accuracy that the textbook run reaches, "
        "over its steps (lowest to highest seed)",
        rows,
        {
            # 0 stands for less than the shortest run, None for more than the longest.
            "ratios": compared,
            "range tests": {str(seed): peak for (seed,), peak in probes.items()},
            "tuning": {"{}, {} epochs".format(*key): t for key, t in tuned.items()},
            "runs": {", ".join(map(str, key)): found for key, found in done.items()},
        },
        *claim,
    )
    harness.report(
        args,
        "super_convergence_accuracies",
        f"{setup.task.name}: test accuracy in % after so many steps, those of the "
        "range test included; mean ± s.d. of the seeds",
        accuracies,
        {name: arm._asdict() for name, arm in arms.items()},
        "What does each schedule reach at each length?",
        ", ".join(arms),
        ", ".join(map(str, lengths)),
        "see the file",
        "; ".join(f"{row['arm']}: {row['tuning steps']}" for row in accuracies),
    )
    curves = []
    for name, k in ((textbook, -1), (ours, -2)):
        pairs = zip(runs[name][k], setup.seeds, strict=True)
        along = [done[*run, seed] for run, seed in pairs]
        steps = (
            np.array(along[0]["steps"]) + arms[name].spent[k] - along[0]["steps"][-1]
        )
        curves.append(
            (name, steps, np.mean([run["accuracies"] for run in along], axis=0))
        )
    picture = harness.evidence_file(args.out, "super_convergence.png")
    draw(setup, arms, curves, picture)


def report_variants(args, setup: Setup, variants, done) -> None:
    finals = {
        name: [done[*run, seed]["accuracies"][-1] for seed in setup.seeds]
        for name, run in variants.items()
    }
    rows = []
    for name, run in variants.items():
        same = [n for n, other in variants.items() if other.epochs == run.epochs]
        less = harness.paired(finals[name], finals[same[0]]).short()
        row = {"arm": name, "peak": f"{run.peak:g}"}
        row["steps"] = f"{run.epochs * setup.epoch:,}"
        row["accuracy (%)"] = harness.mean_and_std(finals[name]).split(" (")[0]
        rows.append(row | {"less the first so long": "" if name == same[0] else less})
    harness.report(
        args,
        "super_convergence_variants",
        f"{setup.task.name}: test accuracy, mean ± s.d. of {len(setup.seeds)} seeds, "
        "and that less the first of as many steps (± s.e.)",
        rows,
        {"finals": finals, "runs": {n: run._asdict() for n, run in variants.items()}},
        "What do momentum, weight decay and the number of images change?",
        ", ".join(variants),
        f"{setup.tuned_epochs[-1] * setup.epoch}, if not said",
        "; ".join(f"{row['arm']} {row['accuracy (%)']}" for row in rows) + " %",
        "none but the tuning of one cycle",
    )


def main() -> None:
    args = harness.parse_args(__doc__, takes_data=True, tables=TABLES)
    if args.data is None and not args.smoke:
        raise SystemExit("This needs --data, CIFAR-10, unless it is a --smoke run.")
    setup = digits() if args.smoke else cifar10(args.data)
    seeds = [(seed,) for seed in setup.seeds]

    def sweep(function, members, part: str) -> dict[Any, Any]:
        # Two at a time leave no core idle while one is compiled or scored.
        call = functools.partial(function, setup)
        return harness.sweep(call, members, args.parts / part, workers=2)

    def measure(setup: Setup, *member) -> dict[str, Any]:
        return train(setup, Run(*member[:-1]), member[-1], setup.test)

    def run_all(members: Iterable[tuple[Run, int]]) -> dict[Any, Any]:
        """The longest first, so that no core waits at the end."""
        ordered = sorted({*members}, key=lambda pair: (-pair[0].epochs, pair))
        return sweep(measure, [(*run, seed) for run, seed in ordered], "runs")

    probes = sweep(found_peak, seeds, "probes")
    members = [(s, e) for e in setup.tuned_epochs for s in PEAKS]
    tuned = sweep(tuned_peak, members, "tuning")
    if {"speed", "longer"}.intersection(args.only):
        arms = arms_of(setup, probes, tuned, "longer" in args.only)
        members = {
            pair
            for lengths in arms.values()
            for of in lengths
            for pair in zip(of, setup.seeds, strict=True)
        }
        report_speed(args, setup, arms, run_all(members), probes, tuned)
    if "variants" in args.only:
        variants = variants_of(setup, tuned)
        done = run_all(itertools.product(variants.values(), setup.seeds))
        report_variants(args, setup, variants, done)


if __name__ == "__main__":
    main()
