"""Is there a better minimum to be had from a rate at which training does not converge?

The synthetic task of Sadrtdinov et al. (2024), and seven of their claims. Each of 16
features, of two numbers, says the class: inside or outside of a tick. A network of
three layers whose weights stay on a sphere trains on 512 examples, for 40,000 steps of
SGD at a constant rate; then either for 20,000 at a small rate, or its last weights are
averaged. A rate just above the convergence threshold, 0.01, is compared with direct
training just below it, at 0.0056: at the one training converges, at the other it does
not (1). There the network leans on fewer features (2), fine-tuning regains what the
rate had cost (3), and more than it regains from a much larger rate (4); accuracy after
fine-tuning is at its best (5) at whatever rate (6), and that of averages is better
still (7). All seven are reported as measured. The first four hold. The last three are
not confirmed: the gain on direct training is small, as it is a large one in the seeds
where the network has come to lean on one feature and a loss in the others.

    python benchmarks/large_rate_regimes.py [--smoke] [--out FOLDER]

About four minutes on two cores; what an interruption leaves is not run again. The five
rates that are compared and the seeds were fixed before the run; differences are paired
within a seed, which has its own data, start and order of batches. The other rates, from
fewer seeds, are for the picture. The optimizer is ``late_decay_sgd`` without momentum,
then a projection of all weights to the unit sphere, then averages. The threshold is
that of ``convergence_threshold`` with the same 40,000 steps and the authors' target, a
training loss of 0.01.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks
from jax import lax

import optax_superconv as osc

NUM_FEATURES, WIDTH, BATCH_SIZE = 16, 32, 16
MARGIN = 0.1 * 2**0.5
HEAD_NORM, EPS = 10.0, 1e-7
COUNTS = (5, 20, 50)  # last checkpoints that are averaged
LOW, HIGH = 3.2e-5, 7.5e-3  # rates of fine-tuning
TARGET_LOSS = 1e-2
LEANING = 60  # % with a single feature: the network leans on it

DIRECT, ABOVE, TOO_LARGE = 5.6e-3, 1e-2, 1.78e-2
COMPARED = (DIRECT, 7.5e-3, ABOVE, 1.33e-2, TOO_LARGE)
SURVEY = (1e-3, 1.78e-3, 3.2e-3, 2.4e-2, 3.2e-2, 5.6e-2, 0.1, 0.32, 1.0)
SEEDS = range(100, 140)
NUM_SURVEY_SEEDS, NUM_THRESHOLD_SEEDS = 12, 8
GROUP = 4  # seeds that train in one program
STAGES = {
    "pre-trained": "pre-trained",
    "low": f"fine-tuned at {LOW:g}",
    "high": f"fine-tuned at {HIGH:g}",
    **{f"SWA{count}": f"SWA{count}" for count in COUNTS},
}
# Modules of the package and of the benchmarks that this one does not use.
UNUSED = (
    "plotting",
    "groups",
    "late_decay_minimum_norm",
    "late_decay_training",
    "overhead",
    "range_test_quality",
    "transfer",
)


class Budget(NamedTuple):
    num_train: int = 512
    num_test: int = 2000
    num_feature_test: int = 1000
    pretrain_steps: int = 40_000
    finetune_steps: int = 20_000
    spacing: int = 100  # steps from checkpoint to checkpoint, for averages


# --- data -----------------------------------------------------------------------------


def classify(points: np.ndarray) -> np.ndarray:
    """0 or 1 for each of (..., 2) points in the square [-2, 2], and -1 in between."""
    distance = points[..., 1] - np.abs(points[..., 0])  # above the tick
    below = (distance >= MARGIN - 2) & (distance <= -MARGIN)
    beyond = (distance >= MARGIN) | (distance <= -2 - MARGIN)
    return np.where(below, 0, np.where(beyond, 1, -1))


def draw_points(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """(..., 2), uniform within the class of each label."""
    # 0.43 of the square belongs to either class.
    pool = rng.uniform(-2, 2, (3 * labels.size + 100, 2))
    classes, points = classify(pool), np.empty((*labels.shape, 2))
    for label in (0, 1):
        chosen = labels == label
        points[chosen] = pool[classes == label][: chosen.sum()]
    return points


def draw_border(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """(*shape, 2), on the borders between the classes."""
    first = rng.uniform(-2, 2, shape)
    second = np.abs(first) - 2 * rng.integers(0, 2, shape)
    return np.stack([first, second], axis=-1)


class Problem(NamedTuple):
    """One seed's, or with a leading axis many seeds'."""

    train: tuple[np.ndarray, np.ndarray]  # (examples, 2 * features), (examples,)
    test: tuple[np.ndarray, np.ndarray]
    # The same with a leading axis: the feature that alone says the class.
    features: tuple[np.ndarray, np.ndarray]
    head: np.ndarray  # (width,), of norm HEAD_NORM, not trained
    start: list[np.ndarray]  # (inputs, width) and (width, width), on the sphere


def make_problem(seed: int, budget: Budget) -> Problem:
    rng = np.random.default_rng(seed)

    def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 2, count)
        each = np.repeat(labels[:, None], NUM_FEATURES, axis=1)
        return draw_points(rng, each).reshape(count, -1), labels

    def with_only(feature: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 2, budget.num_feature_test)
        inputs = draw_border(rng, (len(labels), NUM_FEATURES))
        inputs[:, feature] = draw_points(rng, labels)
        return inputs.reshape(len(labels), -1), labels

    train, test = examples(budget.num_train), examples(budget.num_test)
    only = [with_only(feature) for feature in range(NUM_FEATURES)]
    features = [np.stack(part) for part in zip(*only, strict=True)]
    head = rng.normal(size=WIDTH)
    weights = rng.normal(size=(2 * NUM_FEATURES + WIDTH, WIDTH))
    weights /= np.linalg.norm(weights)
    problem = Problem(
        train,
        test,
        (features[0], features[1]),
        HEAD_NORM * head / np.linalg.norm(head),
        np.split(weights, [2 * NUM_FEATURES]),
    )
    return jax.tree.map(lambda array: array.astype(np.float32), problem)


def make_orders(seed: int, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """(steps, batch size) indices of examples, for pre-training and fine-tuning."""
    draw = functools.partial(tasks.shuffled, budget.num_train, BATCH_SIZE)
    return (
        draw(budget.pretrain_steps, seed),
        draw(budget.finetune_steps, 10_000 + seed),
    )


# --- the network and its training -----------------------------------------------------


def logits_of(params: Any, head: Any, inputs: Any) -> jax.Array:
    """Layer norms without scale or bias make it invariant to the weights' scale."""
    hidden = inputs
    for kernel in params:
        hidden = hidden @ kernel
        hidden = hidden - hidden.mean(-1, keepdims=True)
        variance = jnp.mean(hidden**2, -1, keepdims=True)
        hidden = jax.nn.relu(hidden * lax.rsqrt(variance + EPS))
    return hidden @ head


def loss_fn(params: Any, head: Any, inputs: Any, labels: Any) -> jax.Array:
    logits = logits_of(params, head, inputs)
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def accuracy(params: Any, head: Any, examples: Any) -> jax.Array:
    """In %."""
    inputs, labels = examples
    return 100 * jnp.mean((logits_of(params, head, inputs) > 0) == labels)


to_sphere = optax.projections.projection_l2_sphere


def stay_on_sphere() -> optax.GradientTransformation:
    """Updates that end on the unit sphere, of all parameters together."""

    def project(updates: Any, params: Any) -> Any:
        after = to_sphere(optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, after, params)

    return optax.stateless(project)


def make_tx(rate: Any, *averages: Any) -> Any:
    return optax.chain(
        osc.late_decay_sgd(rate, None, momentum=0.0, nesterov=False),
        stay_on_sphere(),
        *averages,
    )


@functools.partial(jax.jit, static_argnames="spacing")
def train(
    params: Any,
    rates: jax.Array,
    problems: Problem,
    orders: Any,
    spacing: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """The last parameters, and averages, of each seed (axis 0) and rate (axis 1)."""
    # The last sample is the last step's.
    last, counts = orders.shape[1] - 1, COUNTS if spacing else ()
    averages = {
        f"SWA{n}": osc.swa_params(last - (n - 1) * spacing, spacing, name=f"SWA{n}")
        for n in counts
    }

    def run(params: Any, rate: Any, problem: Problem, order: Any) -> tuple[Any, Any]:
        tx = make_tx(rate, *averages.values())

        def body(state: Any, chosen: jax.Array) -> tuple[Any, None]:
            params, opt_state = state
            inputs, labels = (array[chosen] for array in problem.train)
            grads = jax.grad(loss_fn)(params, problem.head, inputs, labels)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, opt_state), _ = lax.scan(body, (params, tx.init(params)), order)
        return params, {
            name: osc.eval_params(opt_state, params, name=name) for name in averages
        }

    over_rates = jax.vmap(run, in_axes=(0, 0, None, None))
    return jax.vmap(over_rates, in_axes=(0, None, 0, 0))(
        params, rates, problems, orders
    )


@jax.jit
def evaluate(params: Any, problems: Problem) -> dict[str, jax.Array]:
    """(seeds, rates) accuracies, and of each feature (seeds, rates, features)."""

    def run(params: Any, problem: Problem) -> dict[str, jax.Array]:
        measure = functools.partial(accuracy, params, problem.head)
        return {
            "train": measure(problem.train),
            "test": measure(problem.test),
            "features": lax.map(measure, problem.features),
        }

    return jax.vmap(jax.vmap(run, in_axes=(0, None)))(params, problems)


@jax.jit
def compare(first: Any, second: Any, problems: Problem) -> dict[str, jax.Array]:
    """(seeds, rates): the angle between two networks, and the barriers on the way.

    A barrier is how far the error, on the segment projected to the sphere, rises above
    the line between the errors at its ends.
    """

    def run(first: Any, second: Any, problem: Problem) -> dict[str, jax.Array]:
        positions = jnp.linspace(0, 1, 21)

        def errors(position: Any) -> jax.Array:
            between = jax.tree.map(
                lambda a, b: (1 - position) * a + position * b, first, second
            )
            measure = functools.partial(accuracy, to_sphere(between), problem.head)
            return 100 - jnp.stack([measure(problem.train), measure(problem.test)])

        curve = lax.map(errors, positions)
        line = curve[0] + positions[:, None] * (curve[-1] - curve[0])
        barriers = jnp.max(curve - line, axis=0)
        cosine = jnp.clip(optax.tree.vdot(first, second), -1, 1)
        return {
            "angle": jnp.arccos(cosine),
            "train barrier": barriers[0],
            "test barrier": barriers[1],
        }

    over_rates = jax.vmap(run, in_axes=(0, 0, None))
    return jax.vmap(over_rates)(first, second, problems)


def run_group(
    seeds: Sequence[int], rates: Sequence[float], budget: Budget
) -> dict[str, Any]:
    """What each seed (axis 0) and rate (axis 1) of pre-training comes to."""
    each = [make_problem(seed, budget) for seed in seeds]
    problems = jax.tree.map(lambda *arrays: np.stack(arrays), *each)
    orders = zip(*(make_orders(seed, budget) for seed in seeds), strict=True)
    pretrain_orders, finetune_orders = map(np.stack, orders)
    # SGD without momentum has no memory, so the last part may have an optimizer of its
    # own, and no average costs anything before.
    tail_steps = budget.spacing * max(COUNTS)
    body, tail = np.split(pretrain_orders, [-tail_steps], axis=1)

    count, plr = len(rates), np.asarray(rates, np.float32)
    start = jax.tree.map(
        lambda array: np.repeat(array[:, None], count, axis=1), problems.start
    )
    params, _ = train(start, plr, problems, body)
    params, averages = train(params, plr, problems, tail, budget.spacing)
    finetuned, _ = train(
        jax.tree.map(lambda array: jnp.concatenate([array, array], axis=1), params),
        np.repeat(np.array([LOW, HIGH], np.float32), count),
        problems,
        finetune_orders,
    )
    low = jax.tree.map(lambda a: a[:, :count], finetuned)
    high = jax.tree.map(lambda a: a[:, count:], finetuned)
    found = {"pre-trained": params, "low": low, "high": high, **averages}
    return {
        **{name: evaluate(params, problems) for name, params in found.items()},
        "low to high": compare(low, high, problems),
    }


# --- the threshold --------------------------------------------------------------------


@jax.jit
def epoch(
    params: Any, rate: Any, orders: Any, examples: Any, head: Any
) -> tuple[Any, jax.Array]:
    """A step of the search, whose loss is the mean over the epoch's batches."""
    tx = make_tx(rate)

    def body(params: Any, chosen: jax.Array) -> tuple[Any, jax.Array]:
        inputs, labels = (array[chosen] for array in examples)
        loss, grads = jax.value_and_grad(loss_fn)(params, head, inputs, labels)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates), loss

    params, losses = lax.scan(body, params, orders)
    return params, losses.mean()


def find_threshold(seed: int, budget: Budget, **options: Any) -> dict[str, Any]:
    problem = jax.device_put(make_problem(seed, budget))
    per_epoch = budget.num_train // BATCH_SIZE
    num_epochs = budget.pretrain_steps // per_epoch
    order = make_orders(seed, budget)[0][: num_epochs * per_epoch]
    found = osc.convergence_threshold(
        lambda *step: epoch(*step, problem.train, problem.head),
        problem.start,
        jnp.reshape(order, (num_epochs, per_epoch, BATCH_SIZE)),
        num_steps=num_epochs,
        **options,
    )
    return {
        "threshold": found.threshold,
        "rates": found.rates,
        "end losses": found.end_losses,
        "regimes": found.regimes,
    }


# --- what comes out -------------------------------------------------------------------


class Difference(NamedTuple):
    """Paired, within a seed."""

    mean: float
    error: float  # standard error
    wins: int
    losses: int
    n: int

    def __str__(self) -> str:
        counts = f"n={self.n}, {self.wins}:{self.losses}"
        return f"{self.mean:+.2f} ± {self.error:.2f} ({counts})"


def paired(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    apart = ours - theirs
    error = apart.std(ddof=1) / math.sqrt(len(apart))
    wins, losses = int((apart > 0).sum()), int((apart < 0).sum())
    return Difference(float(apart.mean()), float(error), wins, losses, len(apart))


def nth_best(features: np.ndarray, n: int) -> np.ndarray:
    """Accuracy with the feature that comes n-th, from (..., features)."""
    return np.sort(features, axis=-1)[..., -n]


class Claim(NamedTuple):
    claim: str
    measured: Any
    asked: str = ""
    holds: bool | None = None

    @property
    def verdict(self) -> str:
        return "" if self.holds is None else "holds" if self.holds else "not confirmed"


def judge(results: Mapping[float, Mapping[str, Any]]) -> list[Claim]:
    """The seven claims, of results by rate."""
    direct, above, large = (results[rate] for rate in (DIRECT, ABOVE, TOO_LARGE))
    trains = [at["pre-trained"]["train"] for at in (direct, above)]
    train = [accuracies.mean() for accuracies in trains]
    converged = [int((accuracies >= 99.5).sum()) for accuracies in trains]

    def less_direct(stage: str, n: int) -> Difference:
        at_direct = nth_best(direct["pre-trained"]["features"], n)
        return paired(nth_best(above[stage]["features"], n), at_direct)

    best = less_direct("low", 1)
    recovered = paired(above["low"]["test"], above["pre-trained"]["test"])
    hurt = paired(large["low"]["test"], above["low"]["test"])
    gain = paired(above["low"]["test"], direct["pre-trained"]["test"])
    apart = paired(above["high"]["test"], above["low"]["test"])
    averaged = paired(above["SWA20"]["test"], above["low"]["test"])
    leans = nth_best(above["pre-trained"]["features"], 1) >= LEANING
    by_leaning = [
        Claim(
            f"  where a feature alone had {word} {LEANING} % before",
            paired(above["low"]["test"][some], direct["pre-trained"]["test"][some]),
        )
        for word, some in (("at least", leans), ("less than", ~leans))
        if some.sum() > 1
    ]
    return [
        Claim(
            f"1 threshold: train accuracy at {DIRECT:g}, at {ABOVE:g}",
            f"{train[0]:.2f}, {train[1]:.2f} ({converged[0]}, {converged[1]} of "
            f"{len(trains[0])} seeds above 99.5)",
            "at least 99.5, below 90",
            bool(train[0] >= 99.5 and train[1] < 90),
        ),
        Claim(
            f"2 sparsity: best single feature, {ABOVE:g} then {LOW:g}, less direct",
            best,
            "above 3 s.e.",
            best.mean > 3 * best.error,
        ),
        Claim("  before fine-tuning", less_direct("pre-trained", 1)),
        Claim("  second best feature", less_direct("low", 2)),
        Claim("  median feature", less_direct("low", NUM_FEATURES // 2)),
        Claim(
            f"3 recovery: {ABOVE:g} then {LOW:g}, less {ABOVE:g}",
            recovered,
            "above 5 s.e.",
            recovered.mean > 5 * recovered.error,
        ),
        Claim(
            f"4 too large hurts: {TOO_LARGE:g} less {ABOVE:g}, both then {LOW:g}",
            hurt,
            "below -2 s.e.",
            hurt.mean < -2 * hurt.error,
        ),
        Claim(
            f"5 best above the threshold: {ABOVE:g} then {LOW:g}, less direct",
            gain,
            "above 2 s.e.",
            gain.mean > 2 * gain.error,
        ),
        *by_leaning,
        Claim(
            f"6 at any rate of fine-tuning: {ABOVE:g} then {HIGH:g}, less then {LOW:g}",
            apart,
            "within 2 s.e.",
            abs(apart.mean) <= 2 * apart.error,
        ),
        Claim(
            f"7 averages beat fine-tuning: SWA20 at {ABOVE:g}, less then {LOW:g}",
            averaged,
            "above 2 s.e.",
            averaged.mean > 2 * averaged.error,
        ),
        Claim(
            f"  SWA20 at {ABOVE:g}, less direct",
            paired(above["SWA20"]["test"], direct["pre-trained"]["test"]),
        ),
    ]


def table(results: Mapping[float, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per rate of pre-training: means over seeds."""
    direct = results[DIRECT]["pre-trained"]["test"]
    rows = []
    for rate, at in sorted(results.items()):
        tests = {stage: at[stage]["test"] for stage in STAGES}
        best = [
            nth_best(at[stage]["features"], 1).mean()
            for stage in ("pre-trained", "low")
        ]
        between = {name: values.mean() for name, values in at["low to high"].items()}
        is_paired = len(tests["low"]) == len(direct) and rate != DIRECT
        rows.append(
            {
                "rate": f"{rate:g}",
                "n": len(tests["low"]),
                "train": f"{at['pre-trained']['train'].mean():.1f}",
                **{
                    STAGES[stage]: f"{test.mean():.1f}" for stage, test in tests.items()
                },
                f"{LOW:g} less direct": str(paired(tests["low"], direct))
                if is_paired
                else "",
                "best feature": " → ".join(f"{value:.1f}" for value in best),
                "barrier": "{train barrier:.1f}, {test barrier:.1f}".format(**between),
                "angle": f"{between['angle']:.2f}",
            }
        )
    return rows


def draw(
    results: Mapping[float, Mapping[str, Any]],
    threshold: float,
    path: pathlib.Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic(
        [["test", "test"], ["feature", "barrier"]],
        figsize=(9, 7),
        dpi=150,
        layout="constrained",
    )
    rates = sorted(results)

    def curve(axis: str, label: str, style: str, at: Mapping[float, Any]) -> None:
        means = [at[rate].mean() for rate in rates]
        errors = [at[rate].std(ddof=1) / math.sqrt(len(at[rate])) for rate in rates]
        axes[axis].errorbar(rates, means, errors, fmt=style, label=label, capsize=2)

    styles = {"pre-trained": "o-", "low": "s-", "high": "^--", "SWA20": "D-."}
    for stage, style in styles.items():
        tests = {rate: results[rate][stage]["test"] for rate in rates}
        curve("test", STAGES[stage], style, tests)
    for stage in ("pre-trained", "low"):
        best = {rate: nth_best(results[rate][stage]["features"], 1) for rate in rates}
        curve("feature", STAGES[stage], styles[stage], best)
    for part, style in {"train": "o-", "test": "s-"}.items():
        name = f"{part} barrier"
        barriers = {rate: results[rate]["low to high"][name] for rate in rates}
        curve("barrier", part, style, barriers)
    labels = {
        "test": "test accuracy (%)",
        "feature": "best single feature (%)",
        "barrier": f"error barrier, {LOW:g} to {HIGH:g} (points)",
    }
    for name, label in labels.items():
        # In the legend of the largest alone.
        what = "convergence threshold" if name == "test" else None
        axes[name].axvline(threshold, color="k", ls=":", label=what)
        axes[name].set(xscale="log", xlabel="rate of pre-training", ylabel=label)
        axes[name].grid(alpha=0.3)
        axes[name].legend(fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)


def by_rate(
    groups: Sequence[Mapping[str, Any]], rates: Sequence[float]
) -> dict[float, dict[str, dict[str, np.ndarray]]]:
    """Results of groups of seeds, (seeds, rates, ...) each, as one per rate."""

    def joined(stage: str, name: str, k: int) -> np.ndarray:
        parts = [np.asarray(group[stage][name])[:, k] for group in groups]
        return np.concatenate(parts).astype(np.float64)

    return {
        rate: {
            stage: {name: joined(stage, name, k) for name in values}
            for stage, values in groups[0].items()
        }
        for k, rate in enumerate(rates)
    }


def to_evidence(at: Mapping[str, Any]) -> dict[str, Any]:
    """By seed, rounded; of the features the best, the second and the median."""
    kept = {}
    for stage, values in at.items():
        columns = {name: array for name, array in values.items() if name != "features"}
        if "features" in values:
            columns |= {
                f"{name} feature": nth_best(values["features"], n)
                for name, n in (
                    ("best", 1),
                    ("second", 2),
                    ("median", NUM_FEATURES // 2),
                )
            }
        kept[stage] = {name: array.round(3) for name, array in columns.items()}
    return kept


def main() -> None:
    args = harness.parse_args(__doc__)
    budget, seeds = Budget(), SEEDS
    survey: Sequence[float] = SURVEY
    num_survey, num_thresholds = NUM_SURVEY_SEEDS, NUM_THRESHOLD_SEEDS
    options: dict[str, Any] = {
        "bounds": (1e-3, 3.2e-2),
        "num_rates": 7,
        "rtol": 0.05,
        "target_loss": TARGET_LOSS,
    }
    if args.smoke:
        budget = Budget(64, 50, 20, 64, 8, spacing=1)
        seeds, survey, num_survey, num_thresholds = seeds[:2], (), 0, 1
        options |= {"bounds": (1e-3, 1.0), "num_rates": 3, "target_loss": 0.1}
        jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    kind = "smoke" if args.smoke else "full"
    parts = args.out / "parts" / "large_rate_regimes" / kind
    jobs: dict[str, Callable[[], Any]] = {}
    for name, rates, some in (
        ("compared", COMPARED, seeds),
        ("survey", survey, seeds[:num_survey]),
    ):
        for k in range(0, len(some), GROUP):
            group = some[k : k + GROUP]
            jobs[f"{name}-{group[0]}"] = functools.partial(
                run_group, group, rates, budget
            )
    for seed in seeds[:num_thresholds]:
        jobs[f"threshold-{seed}"] = functools.partial(
            find_threshold, seed, budget, **options
        )
    with harness.progress(len(jobs)) as begin:

        def run(name: str) -> dict[str, Any]:
            begin(name)
            return harness.resumable(parts / f"{name}.json", jobs[name], without=UNUSED)

        found = dict(zip(jobs, harness.in_threads(run, jobs), strict=True))

    def parts_of(name: str) -> list[Any]:
        return [part for job, part in found.items() if job.startswith(name)]

    results = by_rate(parts_of("compared"), COMPARED)
    results |= by_rate(parts_of("survey"), survey)
    thresholds = [part["threshold"] for part in parts_of("threshold")]
    claims = judge(results)
    rows = table(results)
    steps = f"{budget.pretrain_steps} + {budget.finetune_steps}"
    command = "python benchmarks/large_rate_regimes.py"
    harness.report(
        "large_rate_regimes",
        "Tick task, by rate of pre-training: accuracies in %, means over n seeds; "
        "differences ± s.e. (n, won:lost); best single feature → after "
        f"{LOW:g}; barrier (train, test, in points) and angle from {LOW:g} to "
        f"{HIGH:g}; threshold {min(thresholds):.2g} to {max(thresholds):.2g} "
        f"(n={len(thresholds)})",
        rows,
        {
            "seeds": list(seeds),
            "rates": {
                f"{rate:g}": to_evidence(at) for rate, at in sorted(results.items())
            },
            "thresholds": parts_of("threshold"),
        },
        args.out,
        {
            "question": "What becomes of training above the convergence threshold?",
            "arms": f"{ABOVE:g}, then {LOW:g}, averaged / {DIRECT:g} throughout",
            "steps": steps,
            "mean ± std (n)": ", ".join(
                harness.mean_and_std(results[rate][stage]["test"])
                for rate, stage in (
                    (ABOVE, "pre-trained"),
                    (ABOVE, "low"),
                    (ABOVE, "SWA20"),
                    (DIRECT, "pre-trained"),
                )
            )
            + " %",
            "cost": f"{budget.finetune_steps} steps of fine-tuning, none of averages",
            "command": command,
        },
    )
    verdicts = {claim.claim: claim.holds for claim in claims if claim.asked}
    harness.report(
        "large_rate_claims",
        f"Seven claims of Sadrtdinov et al. (2024) on {len(seeds)} seeds: points of "
        "accuracy, mean ± s.e. (n, won:lost)",
        [
            {
                "arm": claim.claim,
                "measured": str(claim.measured),
                "asked": claim.asked,
                "verdict": claim.verdict,
            }
            for claim in claims
        ],
        {"verdicts": verdicts},
        args.out,
        {
            "question": "Which claims about large rates hold on the tick task?",
            "arms": ", ".join(claim[:1] for claim, holds in verdicts.items() if holds)
            + f" of {len(verdicts)} hold",
            "steps": steps,
            "mean ± std (n)": "± s.e.: "
            + "; ".join(
                f"{claim.claim[:1]}: {claim.measured}"
                for claim in claims
                if claim.asked
            ),
            "cost": "none",
            "command": command,
        },
    )
    threshold = math.exp(np.mean(np.log(thresholds)))
    draw(results, threshold, args.out / "large_rate_regimes.png")


if __name__ == "__main__":
    main()
