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
fewer seeds, are for the picture. The optimizer is ``sgd`` without momentum,
then a projection of all weights to the unit sphere, then averages. The threshold is
that of ``convergence_threshold`` with the same 40,000 steps and the authors' target, a
training loss of 0.01.
"""

import functools
from collections.abc import Mapping, Sequence
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
# Of the accuracies with a single feature.
BEST = {"best feature": 1, "second feature": 2, "median feature": NUM_FEATURES // 2}


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
        # On the borders between the classes, but for one.
        first = rng.uniform(-2, 2, (len(labels), NUM_FEATURES))
        second = np.abs(first) - 2 * rng.integers(0, 2, first.shape)
        inputs = np.stack([first, second], axis=-1)
        inputs[:, feature] = draw_points(rng, labels)
        return inputs.reshape(len(labels), -1), labels

    train, test = examples(budget.num_train), examples(budget.num_test)
    only = [with_only(feature) for feature in range(NUM_FEATURES)]
    inputs, labels = map(np.stack, zip(*only, strict=True))
    head = rng.normal(size=WIDTH)
    head *= HEAD_NORM / np.linalg.norm(head)
    weights = rng.normal(size=(2 * NUM_FEATURES + WIDTH, WIDTH))
    weights /= np.linalg.norm(weights)
    start = np.split(weights, [2 * NUM_FEATURES])
    problem = Problem(train, test, (inputs, labels), head, start)
    return jax.tree.map(lambda array: array.astype(np.float32), problem)


def make_orders(seed: int, budget: Budget) -> list[np.ndarray]:
    """(steps, batch size) indices of examples, for pre-training and fine-tuning."""
    lengths = budget.pretrain_steps, budget.finetune_steps
    return [
        tasks.shuffled(budget.num_train, BATCH_SIZE, steps, seed + 10_000 * k)
        for k, steps in enumerate(lengths)
    ]


# --- the network and its training -----------------------------------------------------


def logits_of(params, head, inputs) -> jax.Array:
    """Layer norms without scale or bias make it invariant to the weights' scale."""
    hidden = inputs
    for kernel in params:
        hidden = hidden @ kernel
        hidden = hidden - hidden.mean(-1, keepdims=True)
        variance = jnp.mean(hidden**2, -1, keepdims=True)
        hidden = jax.nn.relu(hidden * lax.rsqrt(variance + EPS))
    return hidden @ head


def loss_fn(params, head, batch) -> jax.Array:
    logits = logits_of(params, head, batch[0])
    return optax.sigmoid_binary_cross_entropy(logits, batch[1]).mean()


def accuracy(params, head, batch) -> jax.Array:
    """In %."""
    return 100 * jnp.mean((logits_of(params, head, batch[0]) > 0) == batch[1])


to_sphere = optax.projections.projection_l2_sphere


def make_tx(rate, *averages) -> optax.GradientTransformation:
    """SGD whose updates end on the unit sphere, of all parameters together."""

    def project(updates, params) -> Any:
        after = to_sphere(optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, after, params)

    sgd = osc.sgd(rate, 0.0, nesterov=False)
    return optax.chain(sgd, optax.stateless(project), *averages)


def step(tx, state, chosen, examples, head) -> tuple[Any, jax.Array]:
    """On the chosen examples."""
    params, opt_state = state
    batch = tuple(array[chosen] for array in examples)
    loss, grads = jax.value_and_grad(loss_fn)(params, head, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


@functools.partial(jax.jit, static_argnames="spacing")
def train(params, rates, problems, orders, spacing=0) -> tuple[Any, dict[str, Any]]:
    """The last parameters, and averages, of each seed (axis 0) and rate (axis 1)."""
    # The last sample is the last step's.
    last, counts = orders.shape[1] - 1, COUNTS if spacing else ()
    averages = {
        f"SWA{n}": osc.swa_params(last - (n - 1) * spacing, spacing, name=f"SWA{n}")
        for n in counts
    }

    def run(params, rate, problem, order) -> tuple[Any, Any]:
        tx = make_tx(rate, *averages.values())

        def body(state, chosen) -> tuple[Any, None]:
            return step(tx, state, chosen, problem.train, problem.head)[0], None

        (params, opt_state), _ = lax.scan(body, (params, tx.init(params)), order)
        return params, {
            name: osc.eval_params(opt_state, params, name=name) for name in averages
        }

    over_rates = jax.vmap(run, in_axes=(0, 0, None, None))
    over_seeds = jax.vmap(over_rates, in_axes=(0, None, 0, 0))
    return over_seeds(params, rates, problems, orders)


@jax.jit
def evaluate(params, problems) -> dict[str, jax.Array]:
    """(seeds, rates) accuracies, and of each feature (seeds, rates, features)."""

    def run(params, problem) -> dict[str, jax.Array]:
        measure = functools.partial(accuracy, params, problem.head)
        parts = {"train": measure(problem.train), "test": measure(problem.test)}
        return parts | {"features": lax.map(measure, problem.features)}

    return jax.vmap(jax.vmap(run, in_axes=(0, None)))(params, problems)


@jax.jit
def compare(first, second, problems) -> dict[str, jax.Array]:
    """(seeds, rates): the angle between two networks, and the barriers on the way.

    A barrier is how far the error, on the segment projected to the sphere, rises above
    the line between the errors at its ends.
    """

    def run(first, second, problem) -> dict[str, jax.Array]:
        positions = jnp.linspace(0, 1, 21)

        def errors(position) -> jax.Array:
            between = jax.tree.map(
                lambda a, b: (1 - position) * a + position * b, first, second
            )
            measure = functools.partial(accuracy, to_sphere(between), problem.head)
            return 100 - jnp.stack([measure(problem.train), measure(problem.test)])

        curve = lax.map(errors, positions)
        line = curve[0] + positions[:, None] * (curve[-1] - curve[0])
        train, test = jnp.max(curve - line, axis=0)
        angle = jnp.arccos(jnp.clip(optax.tree.vdot(first, second), -1, 1))
        return {"angle": angle, "train barrier": train, "test barrier": test}

    return jax.vmap(jax.vmap(run, in_axes=(0, 0, None)))(first, second, problems)


def run_group(budget: Budget, rates, seeds) -> dict[str, Any]:
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
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), params)
    finetune_rates = np.repeat(np.array([LOW, HIGH], np.float32), count)
    finetuned, _ = train(twice, finetune_rates, problems, finetune_orders)
    low = jax.tree.map(lambda a: a[:, :count], finetuned)
    high = jax.tree.map(lambda a: a[:, count:], finetuned)
    found = {"pre-trained": params, "low": low, "high": high, **averages}
    return {
        **{name: evaluate(params, problems) for name, params in found.items()},
        "low to high": compare(low, high, problems),
    }


@jax.jit
def epoch(params, rate, orders, examples, head) -> tuple[Any, jax.Array]:
    """A step of the search, whose loss is the mean over the epoch's batches."""
    tx = make_tx(rate)

    def body(state, chosen) -> tuple[Any, jax.Array]:
        return step(tx, state, chosen, examples, head)

    (params, _), losses = lax.scan(body, (params, tx.init(params)), orders)
    return params, losses.mean()


def between(low: float, high: float) -> dict[str, float]:
    return {"min_learning_rate": low, "max_learning_rate": high}


def find_threshold(budget: Budget, seed: int, **options) -> dict[str, Any]:
    problem = jax.device_put(make_problem(seed, budget))
    per_epoch = budget.num_train // BATCH_SIZE
    num_epochs = budget.pretrain_steps // per_epoch
    order = make_orders(seed, budget)[0][: num_epochs * per_epoch]
    found = osc.convergence_threshold(
        lambda *step: epoch(*step, problem.train, problem.head),
        problem.start,
        jnp.reshape(order, (num_epochs, per_epoch, BATCH_SIZE)),
        num_steps=num_epochs,
        stacked=True,
        pass_hyperparams=True,
        **options,
    )
    names = ("threshold", "rates", "end_losses", "regimes")
    return {name.replace("_", " "): getattr(found, name) for name in names}


# --- what comes out -------------------------------------------------------------------


Results = Mapping[float, Mapping[str, Mapping[str, np.ndarray]]]  # rate, stage, what


def by_rate(groups: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> Results:
    """Results of groups of seeds, (seeds, rates, ...) each, as one per rate."""

    def joined(stage: str, k: int) -> dict[str, np.ndarray]:
        found = {
            name: np.concatenate([np.asarray(g[stage][name])[:, k] for g in groups])
            for name in groups[0][stage]
        }
        features = np.sort(found.pop("features", np.zeros((1, NUM_FEATURES))), axis=-1)
        if stage in STAGES:
            found |= {name: features[:, -n] for name, n in BEST.items()}
        return found

    stages = groups[0] if groups else ()
    return {
        rate: {stage: joined(stage, k) for stage in stages}
        for k, rate in enumerate(rates)
    }


class Claim(NamedTuple):
    claim: str
    measured: Any
    asked: str = ""
    holds: bool | None = None


def claimed(claim: str, ours, theirs, asked: str = "") -> Claim:
    """``asked`` of the differences: above, below or within a number of errors."""
    found = harness.paired(ours, theirs)
    if not asked:
        return Claim(claim, found)
    word, factor, _ = asked.split()
    limit = float(factor) * found.error
    holds = {
        "above": found.mean > limit,
        "below": found.mean < limit,
        "within": abs(found.mean) <= limit,
    }
    return Claim(claim, found, asked, holds[word])


def judge(results: Results) -> list[Claim]:
    """The seven claims, of results by rate."""
    direct, above = results[DIRECT]["pre-trained"], results[ABOVE]
    before, low = above["pre-trained"], above["low"]
    trains = [at["train"] for at in (direct, before)]
    means = [accuracies.mean() for accuracies in trains]
    converged = [int((accuracies >= 99.5).sum()) for accuracies in trains]
    leans = before["best feature"] >= LEANING
    threshold = Claim(
        f"1 threshold: train accuracy at {DIRECT:g}, at {ABOVE:g}",
        f"{means[0]:.2f}, {means[1]:.2f} ({converged[0]}, {converged[1]} of "
        f"{len(leans)} seeds above 99.5)",
        "at least 99.5, below 90",
        bool(means[0] >= 99.5 and means[1] < 90),
    )
    then_low = f"{ABOVE:g} then {LOW:g}, less"

    def less_direct(claim: str, at, name: str = "test", asked: str = "") -> Claim:
        return claimed(claim, at[name], direct[name], asked)

    def less_low(claim: str, accuracies, asked: str) -> Claim:
        return claimed(claim, accuracies, low["test"], asked)

    sparsity = f"2 sparsity: best single feature, {then_low} direct"
    recovery = f"3 recovery: {then_low} {ABOVE:g}"
    too_large = f"4 too large hurts: {TOO_LARGE:g} less {ABOVE:g}, both then {LOW:g}"
    best = f"5 best above the threshold: {then_low} direct"
    any_rate = (
        f"6 at any rate of fine-tuning: {ABOVE:g} then {HIGH:g}, less then {LOW:g}"
    )
    averages = f"7 averages beat fine-tuning: SWA20 at {ABOVE:g}, less then {LOW:g}"
    return [
        threshold,
        less_direct(sparsity, low, "best feature", "above 3 s.e."),
        less_direct("  before fine-tuning", before, "best feature"),
        less_direct("  second best feature", low, "second feature"),
        less_direct("  median feature", low, "median feature"),
        claimed(recovery, low["test"], before["test"], "above 5 s.e."),
        less_low(too_large, results[TOO_LARGE]["low"]["test"], "below -2 s.e."),
        less_direct(best, low, "test", "above 2 s.e."),
        *(
            claimed(
                f"  where a feature alone had {word} {LEANING} % before",
                low["test"][some],
                direct["test"][some],
            )
            for word, some in (("at least", leans), ("less than", ~leans))
            if some.sum() > 1
        ),
        less_low(any_rate, above["high"]["test"], "within 2 s.e."),
        less_low(averages, above["SWA20"]["test"], "above 2 s.e."),
        less_direct(f"  SWA20 at {ABOVE:g}, less direct", above["SWA20"]),
    ]


def draw(results: Results, threshold: float, path) -> None:
    """Means and standard errors over the rate of pre-training."""
    rates = sorted(results)
    barrier = f"error barrier, {LOW:g} to {HIGH:g} (points)"
    layout = [["test accuracy (%)"] * 2, ["best single feature (%)", barrier]]
    # Label, style, stage and what of it, by axes.
    styles = {"pre-trained": "o-", "low": "s-", "high": "^--", "SWA20": "D-."}
    curves = {
        layout[0][0]: [(STAGES[k], style, k, "test") for k, style in styles.items()],
        layout[1][0]: [
            (STAGES[k], styles[k], k, "best feature") for k in ("pre-trained", "low")
        ],
        barrier: [
            ("train", "o-", "low to high", "train barrier"),
            ("test", "s-", "low to high", "test barrier"),
        ],
    }
    with harness.figure(path, layout, (9, 7)) as (_, axes):
        for name, ax in axes.items():
            for label, style, stage, what in curves[name]:
                samples = [results[rate][stage][what] for rate in rates]
                harness.curve(ax, rates, samples, style, label)
            # In the legend of the largest alone.
            label = "convergence threshold" if name == layout[0][0] else None
            ax.axvline(threshold, color="k", ls=":", label=label)
            ax.set(xscale="log", xlabel="rate of pre-training", ylabel=name)
            ax.legend()


def main() -> None:
    args = harness.parse_args(__doc__)
    budget, seeds = Budget(), SEEDS
    survey, num_survey, num_thresholds = SURVEY, NUM_SURVEY_SEEDS, NUM_THRESHOLD_SEEDS
    options: dict[str, Any] = {"num_rates": 7} | between(1e-3, 3.2e-2)
    options |= {"rtol": 0.05, "target_loss": TARGET_LOSS}
    if args.smoke:
        budget = Budget(64, 50, 20, 64, 8, spacing=1)
        seeds, survey, num_survey, num_thresholds = seeds[:2], (), 0, 1
        options |= {"num_rates": 3, "target_loss": 0.1} | between(1e-3, 1.0)
    results: dict[float, Any] = {}
    for rates, some in ((COMPARED, seeds), (survey, seeds[:num_survey])):
        groups = [tuple(some[k : k + GROUP]) for k in range(0, len(some), GROUP)]
        done = harness.sweep(
            functools.partial(run_group, budget),
            [(rates, group) for group in groups],
            args.parts / "runs",
        )
        results |= by_rate([*done.values()], rates)
    searched = harness.sweep(
        functools.partial(find_threshold, budget, **options),
        [(seed,) for seed in seeds[:num_thresholds]],
        args.parts / "thresholds",
    )
    thresholds = [found["threshold"] for found in searched.values()]
    steps = f"{budget.pretrain_steps} + {budget.finetune_steps}"
    at_above = [results[ABOVE][k]["test"] for k in ("pre-trained", "low", "SWA20")]
    harness.report(
        args,
        "large_rate_regimes",
        "Tick task, by rate of pre-training: accuracies in %; threshold "
        f"{min(thresholds):.2g} to {max(thresholds):.2g} (n={len(thresholds)})",
        [
            {"rate": f"{rate:g}"}
            | {"train": harness.mean_and_std(at["pre-trained"]["train"])}
            | {name: harness.mean_and_std(at[k]["test"]) for k, name in STAGES.items()}
            for rate, at in sorted(results.items())
        ],
        {
            "seeds": list(seeds),
            "rates": {
                f"{rate:g}": jax.tree.map(lambda array: array.round(3), at)
                for rate, at in sorted(results.items())
            },
            "thresholds": [*searched.values()],
        },
        "What becomes of training above the convergence threshold?",
        f"{ABOVE:g}, then {LOW:g}, averaged / {DIRECT:g} throughout",
        steps,
        harness.mean_and_std(*at_above, results[DIRECT]["pre-trained"]["test"]) + " %",
        f"{budget.finetune_steps} steps of fine-tuning, none of averages",
    )
    lowest, highest = min(thresholds), max(thresholds)
    found = f"{lowest:.4f} to {highest:.4f}"
    where = f"convergence threshold, {len(thresholds)} seeds"
    claims = [Claim(where, found), *judge(results)]
    verdicts = {claim.claim: claim.holds for claim in claims if claim.asked}
    words = {None: "", True: "holds", False: "not confirmed"}
    harness.report(
        args,
        "large_rate_claims",
        f"Seven claims of Sadrtdinov et al. (2024) on {len(seeds)} seeds: points of "
        "accuracy, mean ± s.e. (n, won:lost)",
        [
            {
                "arm": claim.claim,
                "measured": str(claim.measured),
                "asked": claim.asked,
                "verdict": words[claim.holds],
            }
            for claim in claims
        ],
        {"verdicts": verdicts},
        "Which claims about large rates hold on the tick task?",
        ", ".join(claim[:1] for claim, holds in verdicts.items() if holds)
        + f" of {len(verdicts)} hold",
        steps,
        "± s.e.: "
        + "; ".join(f"{c.claim[:1]}: {c.measured}" for c in claims if c.asked),
        "none",
    )
    threshold = np.exp(np.mean(np.log(thresholds)))
    draw(results, threshold, args.out / "large_rate_regimes.png")


if __name__ == "__main__":
    main()
