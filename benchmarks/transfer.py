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
(as many of each class) and order of batches; differences are paired within a seed.

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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import data
import harness
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import tasks
from flax import nnx
from jax import lax

import optax_superconv as osc

NUM_SEEDS, NUM_TUNING_SEEDS = 20, 6
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]
B1, B2, WEIGHT_DECAY = 0.9, 0.99, 1e-2

# --- arms -----------------------------------------------------------------------------


class Arm(NamedTuple):
    """Fine-tuning at a constant rate, and what is added to it.

    Attributes:
      decay: Of the rate, from each group to the one before.
      one_cycle: Whether rate and momentum cycle.
      unfreezing: None: all trains at once. ``"gradual"``: group after group.
        ``"never"``: nothing but the head.
      recipe: Whether this is ``fine_tune_adamw`` instead.
      pretrained: Whether the network has learned other classes before.
    """

    decay: float = 1.0
    one_cycle: bool = False
    unfreezing: str | None = None
    recipe: bool = False
    pretrained: bool = True


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


def make_tx(
    arm: Arm, groups: Callable[[Any], Any], num_groups: int, num_steps: int, rate: Any
) -> optax.GradientTransformation:
    if arm.recipe:
        return osc.fine_tune_adamw(
            rate, num_steps, groups, decay=arm.decay, freeze_steps=num_steps // 5
        )
    learning_rate, b1 = rate, B1
    if arm.one_cycle:
        learning_rate = osc.onecycle_schedule(rate, num_steps)
        b1 = osc.onecycle_momentum_schedule(num_steps)

    def adamw_from(step: int) -> optax.GradientTransformation:
        """A group counts from its thaw; its momentum follows the run."""
        run = b1
        momentum = (lambda count: run(count + step)) if callable(run) else run
        return optax.chain(
            osc.scale_by_scheduled_adam(momentum, B2),
            optax.add_decayed_weights(
                WEIGHT_DECAY, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
            ),
        )

    head = num_groups - 1
    if arm.unfreezing == "gradual":
        thaws = {k: (head - k) * (num_steps // 10) for k in range(num_groups)}
        optimizer = osc.gradual_unfreezing(adamw_from, thaws, groups)
    elif arm.unfreezing == "never":
        never: dict[int, int | None] = dict.fromkeys(range(head))
        optimizer = osc.gradual_unfreezing(adamw_from(0), never | {head: 0}, groups)
    else:
        optimizer = adamw_from(0)
    rates = functools.partial(osc.layerwise_multipliers, decay=arm.decay)
    return optax.chain(
        optimizer,
        osc.scale_by_group(rates, groups),
        osc.scale_by_learning_rate(learning_rate),
    )


# --- data -----------------------------------------------------------------------------


class Setup(NamedTuple):
    """What is learned first, and then, and from how much."""

    name: str
    make_model: Callable[[int, nnx.Rngs], nnx.Module]  # of the number of classes
    groups: Callable[[Any], Any]  # from parameters to labels 0, 1, ..., num_groups - 1
    num_groups: int
    train: data.Batch
    test: data.Batch
    augment: Callable[[jax.Array, data.Batch], data.Batch] | None
    num_new: int  # classes to fine-tune on; those to learn first are the others
    counts: Sequence[int]  # labelled images to fine-tune on
    first: tuple[int, int, float]  # steps, batch size and peak rate of the first run
    then: tuple[int, int]  # steps and batch size of fine-tuning


# Lists of modules number on their own, so the groups go by name, in forward order.
RESNET9 = [
    ("stem/.*", 0),
    (r"(stages|residuals)/0/.*", 1),
    (r"stages/1/.*", 2),
    (r"stages/2/.*|residuals/1/.*", 3),
    ("head/.*", 4),
]


def cifar10(path: pathlib.Path) -> Setup:
    parts = data.load_cifar10(path, side=16)
    name = "JPEG CIFAR-10" if path.suffix == ".npz" else "CIFAR-10"
    return Setup(
        f"{name} 16x16, ResNet-9",
        lambda num_classes, rngs: networks.ResNet9(4, num_classes, rngs=rngs),
        osc.label_by_path(RESNET9),
        5,
        *parts,
        data.flip_and_shift,
        num_new=2,
        counts=(20, 100),
        first=(2000, 64, 1e-2),
        then=(150, 16),
    )


def digits(smoke: bool) -> Setup:
    images, labels = data.load_digits()
    return Setup(
        "digits, MLP",
        lambda num_classes, rngs: networks.MLP(64, *[64] * 4, num_classes, rngs=rngs),
        osc.label_by_depth(),
        5,
        *data.split(images, labels.astype(np.int32), 1000),
        None,
        num_new=5,
        counts=(25,) if smoke else (25, 100),
        first=(20, 16, 1e-2) if smoke else (500, 64, 1e-2),
        then=(20, 16) if smoke else (150, 16),
    )


class Episode(NamedTuple):
    """What one seed draws."""

    old: np.ndarray  # examples of the classes to learn first
    new: np.ndarray  # (per class, num_new) examples to label, in random order
    tests: tuple[np.ndarray, np.ndarray]  # test images of the old and new classes
    targets: tuple[np.ndarray, np.ndarray]  # from class to output, first and then


def draw(setup: Setup, seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    train, test = (np.asarray(part[1]) for part in (setup.train, setup.test))
    classes = rng.permutation(10)
    new, old = np.split(classes, [setup.num_new])
    to_label = [rng.permutation(np.flatnonzero(train == k)) for k in new]
    per_class = max(setup.counts) // setup.num_new
    first, then = np.zeros((2, 10), np.int32)
    first[old], then[new] = np.arange(len(old)), np.arange(len(new))
    smallest = np.bincount(test).min()

    def tests(classes: np.ndarray) -> np.ndarray:
        of_class = [np.flatnonzero(test == k)[:smallest] for k in classes]
        return np.concatenate(of_class)

    return Episode(
        np.flatnonzero(np.isin(train, old)),
        np.stack([examples[:per_class] for examples in to_label], axis=1),
        (tests(old), tests(new)),
        (first, then),
    )


# --- training -------------------------------------------------------------------------


class Network(NamedTuple):
    """Jitted functions of a network with some number of outputs.

    Attributes:
      start: ``seed -> (params, other)``.
      train: ``(make_tx, params, other, rate, images, labels, indices, seed) -> (params,
        other)`` after the batches that (n, batch_size) indices name.
      test: ``(params, other, images, labels) -> (accuracy in %, loss)``.
    """

    start: Callable[[Any], Any]
    train: Callable[..., Any]
    test: Callable[..., tuple[jax.Array, jax.Array]]


def make_network(setup: Setup, num_classes: int) -> Network:
    def build(seed: Any) -> nnx.Module:
        return setup.make_model(num_classes, nnx.Rngs(jax.random.key(seed)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: build(0)))

    @jax.jit
    def start(seed: Any) -> Any:
        return nnx.split(build(seed), nnx.Param, ...)[1:]

    def loss_fn(params: Any, other: Any, batch: data.Batch) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, other, copy=True)
        loss = tasks.cross_entropy(model, batch)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    @functools.partial(jax.jit, static_argnums=0)
    def train(
        make_tx: Callable[[Any], optax.GradientTransformation],
        params: Any,
        other: Any,
        rate: Any,
        images: jax.Array,
        labels: jax.Array,
        indices: jax.Array,
        seed: Any,
    ) -> Any:
        tx = make_tx(rate)

        def body(state: Any, scanned: Any) -> tuple[Any, None]:
            params, other, opt_state = state
            chosen, key = scanned
            batch = images[chosen], labels[chosen]
            batch = batch if setup.augment is None else setup.augment(key, batch)
            grads, other = jax.grad(loss_fn, has_aux=True)(params, other, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), other, opt_state), None

        keys = jax.random.split(jax.random.key(seed), len(indices))
        state = params, other, tx.init(params)
        (params, other, _), _ = lax.scan(body, state, (indices, keys))
        return params, other

    @jax.jit
    def test(
        params: Any, other: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params, other, copy=True)
        model.eval()
        logits = model(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return 100 * jnp.mean(logits.argmax(-1) == labels), loss

    return Network(start, train, test)


def pretrain(setup: Setup, network: Network, seed: int) -> dict[str, Any]:
    """Arrays of the network, and how well it does on the classes that it has seen."""
    episode = draw(setup, seed)
    num_steps, batch_size, rate = setup.first
    order = tasks.shuffled(len(episode.old), batch_size, num_steps, seed)
    images, labels = setup.train
    state = network.train(
        functools.partial(osc.onecycle_adamw, total_steps=num_steps),
        *network.start(seed),
        rate,
        images,
        episode.targets[0][labels],
        episode.old[order],
        seed,
    )
    images, labels = (array[episode.tests[0]] for array in setup.test)
    accuracy, _ = network.test(*state, images, episode.targets[0][labels])
    return {"accuracy": float(accuracy), "arrays": jax.tree.leaves(state)}


def restore(network: Network, arrays: list[Any]) -> Any:
    """Parameters and the network's other state, from what ``pretrain`` keeps."""
    treedef = jax.tree.structure(jax.eval_shape(network.start, 0))
    return jax.tree.unflatten(treedef, [np.float32(array) for array in arrays])


def fine_tune(
    setup: Setup,
    network: Network,
    arm: Arm,
    make_arm_tx: Callable[[Any], optax.GradientTransformation],
    pretrained: Any,
    rate: float,
    count: int,
    seed: int,
) -> tuple[float, float]:
    """Accuracy in % and loss on test images of the new classes."""
    episode = draw(setup, seed)
    params, other = network.start(10_000 + seed)
    if arm.pretrained:
        trained, other = pretrained
        params = jax.tree.map(
            lambda k, new, old: new if k == setup.num_groups - 1 else old,
            setup.groups(params),
            params,
            trained,
        )
    num_steps, batch_size = setup.then
    examples = episode.new[: count // setup.num_new].ravel()
    order = tasks.shuffled(count, batch_size, num_steps, seed)
    state = network.train(
        make_arm_tx,
        params,
        other,
        np.float32(rate),
        setup.train[0],
        episode.targets[1][setup.train[1]],
        examples[order],
        seed,
    )
    images, labels = (array[episode.tests[1]] for array in setup.test)
    accuracy, loss = network.test(*state, images, episode.targets[1][labels])
    return float(accuracy), float(loss)


def tune_and_run(
    run: Callable[[float, int], tuple[float, float]],
    rates: Sequence[float],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """The best rate for the tuning seeds, and what the others get at it."""
    tuning = np.array([[run(rate, seed) for seed in tuning_seeds] for rate in rates])
    best = rates[int(tuning[..., 0].mean(1).argmax())]
    results = np.array([run(best, seed) for seed in seeds])
    return {
        "rates": list(rates),
        "tuning accuracy": tuning[..., 0],
        "tuning loss": tuning[..., 1],
        "rate": best,
        "accuracy": results[:, 0],
        "loss": results[:, 1],
    }


# --- what comes out -------------------------------------------------------------------


def paired(differences: np.ndarray) -> str:
    """Mean ± standard error (n), and how many are above and below 0."""
    n = len(differences)
    error = differences.std(ddof=1) / n**0.5 if n > 1 else np.nan
    won, lost = (differences > 0).sum(), (differences < 0).sum()
    return f"{differences.mean():+.2f} ± {error:.2f} (n={n}, {won}:{lost})"


def effect(accuracies: dict[Arm, np.ndarray], factor: str) -> np.ndarray:
    """Accuracy with an addition less that without, by seed: mean over the others."""
    field, levels = FACTORS[factor]
    others = [pair for name, pair in FACTORS.items() if name != factor]
    differences = []
    for values in itertools.product(*[levels for _, levels in others]):
        arm = Arm(**{name: v for (name, _), v in zip(others, values, strict=True)})
        without, with_it = (
            accuracies[arm._replace(**{field: level})] for level in levels
        )
        differences.append(with_it - without)
    return np.mean(differences, axis=0)


def table(
    records: dict[tuple[int, str], dict[str, Any]], rates: Sequence[float]
) -> list[dict[str, Any]]:
    """A row per number of images and arm."""
    before = {"+ discriminative": "full", "+ one-cycle": "+ discriminative"}
    before["+ unfreezing"] = "+ one-cycle"
    rows = []
    for (count, name), record in records.items():

        def less(other: str, mine: Any = record["accuracy"], count: int = count) -> str:
            if (count, other) not in records:
                return ""
            return paired(np.subtract(mine, records[count, other]["accuracy"]))

        at_edge = record["rate"] in (rates[0], rates[-1])
        tuned = np.mean(record["tuning accuracy"], axis=1)
        good = np.asarray(rates)[tuned >= tuned.max() - 2]
        rows.append(
            {
                "images": count,
                "arm": name,
                "peak rate": f"{record['rate']:g}" + " (edge)" * at_edge,
                "within 2 points": f"{good[0]:g} to {good[-1]:g}",
                "accuracy (%)": harness.mean_and_std(record["accuracy"]),
                "less the arm before": less(before.get(name, "")),
                "less full": "" if name == "full" else less("full"),
            }
        )
    return rows


def main() -> None:
    args = harness.parse_args(__doc__, data="CIFAR-10: an .npz of JPEGs or the archive")
    arms, rates = LADDER | OTHERS, RATES
    # The number of images was chosen on seeds 0 to 9.
    seeds = range(100, 100 + NUM_SEEDS)
    tuning_seeds = range(1000, 1000 + NUM_TUNING_SEEDS)
    if args.smoke:
        arms = {name: LADDER[name] for name in ("full", "+ unfreezing")}
        rates, seeds, tuning_seeds = RATES[2:4], seeds[:2], tuning_seeds[:1]
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    setup = digits(args.smoke) if args.data is None else cifar10(args.data)
    kind = "smoke" if args.smoke else "digits" if args.data is None else "cifar10"
    resumable = functools.partial(
        harness.resumable, without=("plotting", "overhead", "range_test_quality")
    )
    parts = args.out / "parts" / "transfer" / kind
    first = make_network(setup, 10 - setup.num_new)
    then = make_network(setup, setup.num_new)
    make_arm_tx = {
        arm: functools.partial(
            make_tx, arm, setup.groups, setup.num_groups, setup.then[0]
        )
        for arm in arms.values()
    }
    every_seed = [*tuning_seeds, *seeds]
    members = list(itertools.product(setup.counts, arms))
    with harness.progress(len(every_seed) + len(members)) as begin:

        def learn_first(seed: int) -> dict[str, Any]:
            begin(f"first training, seed {seed}")
            return resumable(
                parts / f"first-{seed}.json", lambda: pretrain(setup, first, seed)
            )

        learned = harness.in_threads(learn_first, every_seed)
        pretrained = {
            seed: restore(first, record["arrays"])
            for seed, record in zip(every_seed, learned, strict=True)
        }

        def run_arm(member: tuple[int, str]) -> dict[str, Any]:
            count, name = member
            begin(f"{name}, {count} images")

            def run(rate: float, seed: int) -> tuple[float, float]:
                arm, start = arms[name], pretrained[seed]
                return fine_tune(
                    setup, then, arm, make_arm_tx[arm], start, rate, count, seed
                )

            path = parts / f"{count}-{name.replace(' ', '_')}.json"
            return resumable(
                path, lambda: tune_and_run(run, rates, tuning_seeds, seeds)
            )

        found = harness.in_threads(run_arm, members)
    records = dict(zip(members, found, strict=True))

    rows = table(records, rates)
    seen = harness.mean_and_std(record["accuracy"] for record in learned)
    num_steps, batch_size = setup.then
    claim = {
        "arms": ", ".join(name for name in arms if name in LADDER),
        "steps": f"{num_steps} x {batch_size}",
        "cost": "no step more",
        "command": "python benchmarks/transfer.py"
        + (" --data CIFAR10" if args.data else ""),
    }
    harness.report(
        "transfer",
        f"{setup.name}: {setup.num_new} new classes in {num_steps} steps of "
        f"{batch_size}, after {10 - setup.num_new} others (of which {seen} % right); "
        "mean ± s.d.; differences ± s.e. (n, won:lost)",
        rows,
        {
            "first": {
                seed: record["accuracy"]
                for seed, record in zip(every_seed, learned, strict=True)
            },
            "classes": {
                seed: np.unique(np.asarray(setup.train[1])[draw(setup, seed).new])
                for seed in every_seed
            },
            "arms": {f"{count}, {name}": r for (count, name), r in records.items()},
        },
        args.out,
        {
            "question": "Does each part of ULMFiT's recipe help on few images?",
            "arms": claim["arms"],
            "steps": claim["steps"],
            "mean ± std (n)": "; ".join(
                f"{count} images: "
                + ", ".join(
                    harness.mean_and_std(records[count, name]["accuracy"])
                    for name in arms
                    if name in LADDER
                )
                for count in setup.counts
            )
            + " %",
            "cost": claim["cost"],
            "command": claim["command"],
        },
    )
    if args.smoke:
        return
    effects = {
        f"{count}, {factor}": effect(
            {arms[name]: np.array(records[count, name]["accuracy"]) for name in arms},
            factor,
        )
        for count in setup.counts
        for factor in FACTORS
    }
    harness.report(
        "transfer_effects",
        "Accuracy with each addition less that without, mean over the four "
        "combinations of the two others; mean ± s.e. (n, won:lost)",
        [
            {"arm": factor}
            | {
                f"{count} images": paired(effects[f"{count}, {factor}"])
                for count in setup.counts
            }
            for factor in FACTORS
        ],
        {"effects": effects},
        args.out,
        {
            "question": "What does each addition bring, with and without the others?",
            "arms": ", ".join(FACTORS) + ": with less without",
            "steps": claim["steps"],
            "mean ± std (n)": "; ".join(
                f"{count} images: "
                + ", ".join(
                    harness.mean_and_std(effects[f"{count}, {factor}"])
                    for factor in FACTORS
                )
                for count in setup.counts
            )
            + " points of accuracy",
            "cost": claim["cost"],
            "command": claim["command"],
        },
    )


if __name__ == "__main__":
    main()
