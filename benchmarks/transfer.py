"""Does each part of ULMFiT's recipe help to fine-tune a small network on few images?

The ablation of Howard and Ruder (2018) on images: a ResNet-9 learns eight classes of
CIFAR-10 (16x16 pixels), and then the two others from a few labelled images: at a
constant rate, with discriminative rates (1/2.6 from each group to the one before), with
one cycle of rate and momentum, with gradual unfreezing. The rows take one addition
after the other, as in the paper; all eight combinations are run, so that each addition
can be judged with and without the others. All are AdamW with the same weight decay and
number of steps, augmented, on the same batches; the peak rate of each is the best of
the same grid by mean accuracy over tuning seeds, and none of these is reported. Each
seed has its own held-out classes, its own first training, new head, labelled images
(as many of each class) and order of batches; differences are paired within a seed. But
all are scored on the same test images: rates are chosen on images that report.

    python benchmarks/transfer.py [--smoke] [--data CIFAR10] [--out FOLDER]

About half an hour on two cores; what an interruption leaves is not run again. The
groups are ULMFiT's five in number: the stem, the three resolutions that follow, the
head. Thawing takes a tenth of the run per group. Batch norms train on the statistics of
the batch, and their running averages move in all arms, also in frozen layers. The
accuracy is on test images, as many of each class. The table also says how far off a
rate may be: at which of the grid the tuning seeds come within two points of the best.

Without CIFAR-10, an MLP learns five of scikit-learn's digits after the five others, in
a minute; there, training from scratch does better.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import harness
import jax
import networks
import numpy as np
import optax
import tasks
from flax import nnx

import optax_superconv as osc

# The number of images was chosen on seeds 0 to 9.
SEEDS, TUNING_SEEDS = range(100, 120), range(1000, 1006)
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]
B1, B2, WEIGHT_DECAY = 0.9, 0.99, 1e-2

# --- arms -----------------------------------------------------------------------------


class Arm(NamedTuple):
    """Fine-tuning at a constant rate, and what is added to it."""

    decay: float = 1.0  # of the rate, from each group to the one before
    one_cycle: bool = False  # of rate and momentum
    unfreezing: str | None = None  # "gradual": by group; "never": nothing but the head
    recipe: bool = False  # `fine_tune_adamw` instead
    pretrained: bool = True  # on other classes


ULMFIT = 1 / 2.6
LADDER = {
    "full": Arm(),
    "+ discriminative": Arm(ULMFIT),
    "+ one-cycle": Arm(ULMFIT, True),
    "+ unfreezing": Arm(ULMFIT, True, "gradual"),
}
OTHERS = {
    "full, one-cycle": Arm(1.0, True),
    "full, unfreezing": Arm(1.0, False, "gradual"),
    "full, one-cycle, unfreezing": Arm(1.0, True, "gradual"),
    "discriminative, unfreezing": Arm(ULMFIT, False, "gradual"),
    "discriminative 0.65": Arm(0.65),
    "discriminative 0.65, one-cycle": Arm(0.65, True),
    "discriminative 0.65, one-cycle, unfreezing": Arm(0.65, True, "gradual"),
    "fine_tune_adamw, a fifth frozen": Arm(ULMFIT, recipe=True),
    "head only": Arm(unfreezing="never"),
    "from scratch, one-cycle": Arm(1.0, True, pretrained=False),
}
FACTORS: dict[str, tuple[str, tuple[Any, Any]]] = {
    "discriminative": ("decay", (1.0, ULMFIT)),
    "one-cycle": ("one_cycle", (False, True)),
    "unfreezing": ("unfreezing", (None, "gradual")),
}


def make_tx(arm: Arm, groups, num_groups, num_steps, rate) -> Any:
    if arm.recipe:
        return osc.fine_tune_adamw(
            rate, num_steps, groups, decay=arm.decay, freeze_steps=num_steps // 5
        )
    learning_rate, b1 = rate, B1
    if arm.one_cycle:
        learning_rate = osc.onecycle_schedule(rate, num_steps)
        b1 = osc.onecycle_momentum_schedule(num_steps)

    def adamw_from(step) -> optax.GradientTransformation:
        """A group counts from its thaw; its momentum follows the run."""
        run = b1
        momentum = (lambda count: run(count + step)) if callable(run) else run
        return optax.chain(
            osc.scale_by_scheduled_adam(momentum, B2),
            osc.add_decayed_weights(WEIGHT_DECAY),
        )

    head, optimizer = num_groups - 1, adamw_from(0)
    if arm.unfreezing == "gradual":
        thaws = {k: (head - k) * (num_steps // 10) for k in range(num_groups)}
        optimizer = osc.gradual_unfreezing(adamw_from, thaws, groups)
    elif arm.unfreezing == "never":
        never: dict[int, int | None] = dict.fromkeys(range(head))
        optimizer = osc.gradual_unfreezing(optimizer, never | {head: 0}, groups)
    multipliers = functools.partial(osc.layerwise_multipliers, decay=arm.decay)
    rate_link = osc.scale_by_learning_rate(
        learning_rate, multipliers=multipliers, param_labels=groups
    )
    return optax.chain(optimizer, rate_link)


# --- data -----------------------------------------------------------------------------


class Setup(NamedTuple):
    """What is learned first, and then, and from how much."""

    task: tasks.Task  # with images to test as those held out
    make_model: Callable[[int, nnx.Rngs], nnx.Module]  # of the number of classes
    groups: Callable[[Any], Any]  # from parameters to labels 0, 1, ..., num_groups - 1
    num_new: int  # classes to fine-tune on; those to learn first are the others
    counts: Sequence[int]  # labelled images to fine-tune on
    first: tuple[int, int, float]  # steps, batch size and peak rate of the first run
    then: tuple[int, int]  # steps and batch size of fine-tuning
    num_groups: int = 5


# Lists of modules number on their own, so the groups go by name, in forward order.
RESNET9 = [
    ("stem/.*", 0),
    (r"(stages|residuals)/0/.*", 1),
    (r"stages/1/.*", 2),
    (r"stages/2/.*|residuals/1/.*", 3),
    ("head/.*", 4),
]


def cifar10(path: pathlib.Path) -> Setup:
    return Setup(
        tasks.cifar10_resnet(path, None, None),
        lambda num_classes, rngs: networks.ResNet9(4, num_classes, rngs=rngs),
        osc.label_by_path(RESNET9),
        num_new=2,
        counts=(20, 100),
        first=(2000, 64, 1e-2),
        then=(150, 16),
    )


def digits(smoke: bool) -> Setup:
    return Setup(
        tasks.digits_mlp(),
        lambda num_classes, rngs: networks.MLP(64, *[64] * 4, num_classes, rngs=rngs),
        osc.label_by_depth(),
        num_new=5,
        counts=(25,) if smoke else (25, 100),
        first=(20, 16, 1e-2) if smoke else (500, 64, 1e-2),
        then=(20, 16) if smoke else (150, 16),
    )


def trainings_of(setup: Setup, num_classes: int, *make_txs) -> list[tasks.Training]:
    """Of the same network by several optimizers."""
    model = functools.partial(setup.make_model, num_classes)
    task = setup.task._replace(make_model=model)
    return [tasks.Training(task, make_tx) for make_tx in make_txs]


class Episode(NamedTuple):
    """What one seed draws."""

    old: np.ndarray  # examples of the classes to learn first
    new: np.ndarray  # (per class, num_new) examples to label, in random order
    tests: tuple[np.ndarray, np.ndarray]  # test images of the old and new classes
    targets: tuple[np.ndarray, np.ndarray]  # from class to output, first and then


def draw(setup: Setup, seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    train, test = (
        np.asarray(part[1]) for part in (setup.task.train, setup.task.held_out)
    )
    classes = rng.permutation(10)
    new, old = np.split(classes, [setup.num_new])
    to_label = [rng.permutation(np.flatnonzero(train == k)) for k in new]
    per_class = max(setup.counts) // setup.num_new
    first, then = np.zeros((2, 10), np.int32)
    first[old], then[new] = np.arange(len(old)), np.arange(len(new))
    smallest = np.bincount(test).min()
    tests = [
        np.concatenate([np.flatnonzero(test == k)[:smallest] for k in classes])
        for classes in (old, new)
    ]
    return Episode(
        np.flatnonzero(np.isin(train, old)),
        np.stack([examples[:per_class] for examples in to_label], axis=1),
        (tests[0], tests[1]),
        (first, then),
    )


# --- training -------------------------------------------------------------------------


def train(setup, training, state, rate, order, seed, episode, part) -> tuple[Any, Any]:
    """State, and accuracy in % and loss; part 0 are the old classes, 1 the new."""
    targets, (images, labels) = episode.targets[part], setup.task.train
    state, _ = training.run(state, rate, order, seed, (images, targets[labels]))
    images, labels = (array[episode.tests[part]] for array in setup.task.held_out)
    return state, training.network.score(*state[:2], (images, targets[labels]))


def learn_first(setup: Setup, training: tasks.Training, seed: int) -> dict[str, Any]:
    """Arrays of the network, and how well it does on the classes that it has seen."""
    episode = draw(setup, seed)
    num_steps, batch_size, rate = setup.first
    order = tasks.shuffled(len(episode.old), batch_size, num_steps, seed)
    run = training.start(seed), rate, episode.old[order], seed, episode
    state, (accuracy, _) = train(setup, training, *run, part=0)
    return {"accuracy": accuracy, "arrays": jax.tree.leaves(state[:2])}


def restore(training: tasks.Training, arrays: list[Any]) -> Any:
    """Parameters and the network's other state, from what ``learn_first`` keeps."""
    treedef = jax.tree.structure(jax.eval_shape(training.network.start, 0))
    return jax.tree.unflatten(treedef, [np.float32(array) for array in arrays])


def fine_tune(
    setup: Setup, training: tasks.Training, pretrained, rate, count: int, seed: int
) -> np.ndarray:
    """Accuracy in % and loss on test images of the new classes."""
    episode = draw(setup, seed)
    params, other = training.network.start(10_000 + seed)
    if pretrained is not None:
        trained, other = pretrained
        params = jax.tree.map(
            lambda k, new, old: new if k == setup.num_groups - 1 else old,
            setup.groups(params),
            params,
            trained,
        )
    num_steps, batch_size = setup.then
    chosen = episode.new[: count // setup.num_new].ravel()
    order = chosen[tasks.shuffled(count, batch_size, num_steps, seed)]
    run = training.begin(params, other), np.float32(rate), order, seed, episode
    return np.asarray(train(setup, training, *run, part=1)[1])


# --- what comes out -------------------------------------------------------------------


def effect(accuracies: Mapping[Arm, Any], factor: str) -> np.ndarray:
    """Accuracy with an addition less that without, by seed: mean over the others."""
    fields, levels = zip(*FACTORS.values(), strict=True)
    arms = [
        Arm(**dict(zip(fields, values, strict=True)))
        for values in itertools.product(*levels)
    ]
    field, values = FACTORS[factor]
    without, with_it = (
        np.mean([accuracies[a] for a in arms if getattr(a, field) == value], axis=0)
        for value in values
    )
    return with_it - without


def table(records: Mapping[tuple[int, str], Any], rates) -> list[dict[str, Any]]:
    """A row per number of images and arm."""
    before = dict(zip([*LADDER][1:], LADDER, strict=False))
    rows = []
    for (count, name), record in records.items():
        less = {
            other: str(harness.paired(record["accuracy"], theirs["accuracy"]))
            for (images, other), theirs in records.items()
            if images == count and other != name
        }
        tuned = np.mean(record["tuning accuracy"], axis=1)
        good = np.asarray(rates)[tuned >= tuned.max() - 2]
        rows.append(
            {
                "images": count,
                "arm": name,
                "peak rate": harness.show_rate(record["rate"], rates),
                "within 2 points": f"{good[0]:g} to {good[-1]:g}",
                "accuracy (%)": harness.mean_and_std(record["accuracy"]),
                "less the arm before": less.get(before.get(name, ""), ""),
                "less full": less.get("full", ""),
            }
        )
    return rows


def main() -> None:
    args = harness.parse_args(__doc__, takes_data=True)
    arms, rates = LADDER | OTHERS, RATES
    seeds, tuning_seeds = SEEDS, TUNING_SEEDS
    if args.smoke:
        arms = {name: LADDER[name] for name in ("full", "+ unfreezing")}
        rates, seeds, tuning_seeds = RATES[2:4], seeds[:2], tuning_seeds[:1]
    setup = digits(args.smoke) if args.data is None else cifar10(args.data)
    every_seed = [*tuning_seeds, *seeds]

    one_cycle = functools.partial(osc.onecycle_adamw, total_steps=setup.first[0])
    (first,) = trainings_of(setup, 10 - setup.num_new, one_cycle)
    learned = harness.sweep(
        functools.partial(learn_first, setup, first),
        [(seed,) for seed in every_seed],
        args.parts / "first",
    )
    pretrained = {s: restore(first, found["arrays"]) for (s,), found in learned.items()}

    groups = setup.groups, setup.num_groups, setup.then[0]
    makers = [functools.partial(make_tx, arm, *groups) for arm in arms.values()]
    of_arms = trainings_of(setup, setup.num_new, *makers)
    trainings = dict(zip(arms, of_arms, strict=True))

    def run(member: tuple[int, str], rate: float, seed: int) -> np.ndarray:
        count, name = member
        start = pretrained[seed] if arms[name].pretrained else None
        return fine_tune(setup, trainings[name], start, rate, count, seed)

    members = list(itertools.product(setup.counts, arms))
    best, tuning = harness.tune(run, members, rates, tuning_seeds, args.parts)
    runs = ((member, best[member], s) for member in members for s in seeds)
    done = harness.sweep(run, runs, args.parts / "runs")
    records = {
        member: {
            "rates": rates,
            "tuning accuracy": tuning[member][..., 0],
            "tuning loss": tuning[member][..., 1],
            "rate": best[member],
            "accuracy": np.array([done[member, best[member], s][0] for s in seeds]),
            "loss": np.array([done[member, best[member], s][1] for s in seeds]),
        }
        for member in members
    }

    def by_count(samples: Callable[[int], Any]) -> str:
        of_count = [
            f"{n} images: {harness.mean_and_std(*samples(n))}" for n in setup.counts
        ]
        return "; ".join(of_count)

    ladder = [name for name in arms if name in LADDER]
    seen = harness.mean_and_std([r["accuracy"] for r in learned.values()])
    num_steps, batch_size = setup.then
    labels = np.asarray(setup.task.train[1])
    harness.report(
        args,
        "transfer",
        f"{setup.task.name}: {setup.num_new} new classes in {num_steps} steps of "
        f"{batch_size}, after {10 - setup.num_new} others (of which {seen} % right); "
        "mean ± s.d.; differences ± s.e. (n, won:lost)",
        table(records, rates),
        {
            "first": {seed: found["accuracy"] for (seed,), found in learned.items()},
            "classes": {s: np.unique(labels[draw(setup, s).new]) for s in every_seed},
            "arms": {f"{count}, {name}": r for (count, name), r in records.items()},
        },
        "Does each part of ULMFiT's recipe help on few images?",
        ", ".join(ladder),
        f"{num_steps} x {batch_size}",
        by_count(lambda n: [records[n, name]["accuracy"] for name in ladder]) + " %",
        "no step more",
    )
    if args.smoke:
        return

    by_arm = {
        n: {arm: records[n, name]["accuracy"] for name, arm in arms.items()}
        for n in setup.counts
    }
    effects = {(n, k): effect(by_arm[n], k) for n in setup.counts for k in FACTORS}
    harness.report(
        args,
        "transfer_effects",
        "Accuracy with each addition less that without, mean over the four "
        "combinations of the two others; mean ± s.e. (n, won:lost)",
        [
            {"arm": factor}
            | {f"{n} images": str(harness.paired(effects[n, factor])) for n in by_arm}
            for factor in FACTORS
        ],
        {"effects": {f"{n}, {factor}": v for (n, factor), v in effects.items()}},
        "What does each addition bring, with and without the others?",
        ", ".join(FACTORS) + ": with less without",
        f"{num_steps} x {batch_size}",
        by_count(lambda n: [effects[n, k] for k in FACTORS]) + " points of accuracy",
        "no step more",
    )


if __name__ == "__main__":
    main()
