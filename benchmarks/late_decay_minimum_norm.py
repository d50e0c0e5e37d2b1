"""Does a large rate that is kept long enough lead to the minimum-norm solution?

The homogeneous model f(x; w) = ||w||^2 w'x in 40 dimensions has many minima on 20
examples: all a = ||w||^2 w that interpolate them. SGD with batches of one, and labels
with fresh noise at each step, starts on a minimum far from the shortest (||a|| = 3),
stays at a large rate for T1 steps, and then at a small one for 4,000. As T1 grows from
0 to 10,000, the median norm, distance to the minimum-norm interpolator and test loss
fall: at T1 = 3,000 the test loss is below a tenth of that at T1 = 0, and it falls
further up to T1 = 10,000, about to that of the minimum-norm interpolator, where it
stays: twice as many steps bring nothing more. As many steps at the small rate alone
hardly move it.

    python benchmarks/late_decay_minimum_norm.py [--smoke] [--out FOLDER]

Half a minute on two cores; what an interruption leaves is not run again. The model and
the claim are those of Ren, Ma and Ying (2024); dimensions, rates, lengths, the start on
the minima and the noise were chosen here. The test loss is the exact one for Gaussian
inputs and clean labels: half the squared distance to the teacher. All runs of a seed
see the same examples with the same noise, so that they branch off one path.

How far a run travels along the minima goes with the sum of its squared rates rather
than of its rates: smaller rates with as large a sum of squares end in about the same
place, with as large a sum far behind. Without noise in the labels all gradients vanish
at a minimum: SGD leaves only those that are too sharp for its rate.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_superconv as osc

NUM_SEEDS, NUM_EXAMPLES, DIM, GAMMA = 64, 20, 40, 2
START_NORM, NOISE = 3.0, 0.5
LARGE, SMALL = 1e-2, 2e-4
LENGTHS = (0, 100, 300, 1000, 3000, 10_000, 20_000)
COOLDOWN = 4000

# --- the model ------------------------------------------------------------------------


class Problem(NamedTuple):
    """One seed's, or with a leading axis many seeds'."""

    inputs: np.ndarray  # (examples, dim)
    labels: np.ndarray  # (examples,), without noise
    teacher: np.ndarray  # (dim,), of norm 1
    minimum_norm: np.ndarray  # (dim,), the shortest interpolator
    start: np.ndarray  # (dim,), an interpolator of norm START_NORM


def make_problem(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(NUM_EXAMPLES, DIM))
    teacher = rng.normal(size=DIM)
    teacher /= np.linalg.norm(teacher)
    labels = inputs @ teacher
    inverse = np.linalg.pinv(inputs)
    minimum_norm = inverse @ labels
    direction = rng.normal(size=DIM)
    direction -= inverse @ (inputs @ direction)
    direction /= np.linalg.norm(direction)
    length = np.sqrt(START_NORM**2 - minimum_norm @ minimum_norm)
    start = minimum_norm + length * direction
    arrays = (inputs, labels, teacher, minimum_norm, start)
    return Problem(*(array.astype(np.float32) for array in arrays))


def to_alpha(w) -> jax.Array:
    """What the model multiplies its inputs with."""
    return jnp.linalg.norm(w) ** GAMMA * w


def to_w(alpha) -> jax.Array:
    return alpha / jnp.linalg.norm(alpha) ** (GAMMA / (GAMMA + 1))


# --- training -------------------------------------------------------------------------


class Arm(NamedTuple):
    """A rate for some steps, then a smaller one."""

    rate: float
    steps: int
    noise: float = NOISE
    then_rate: float = SMALL
    then_steps: int = COOLDOWN

    @property
    def num_steps(self) -> int:
        return self.steps + self.then_steps

    @property
    def rates(self) -> np.ndarray:
        """(num_steps,)."""
        phases = [osc.Phase(self.steps, self.rate), osc.Phase(0, self.then_rate)]
        schedule = osc.phase_schedule(self.rate, phases)
        return np.asarray(schedule(np.arange(self.num_steps)))


class Examples(NamedTuple):
    """What each seed sees at each step; a shorter run sees the beginning."""

    chosen: jax.Array  # (seeds, steps)
    noise: jax.Array  # (seeds, steps), of variance 1


def draw_examples(num_seeds: int, num_steps: int) -> Examples:
    chosen_key, noise_key = jax.random.split(jax.random.key(0))
    shape = num_seeds, num_steps
    return Examples(
        jax.random.randint(chosen_key, shape, 0, NUM_EXAMPLES),
        jax.random.normal(noise_key, shape),
    )


@jax.jit
def train(problems, examples, rates, noise, num_steps) -> jax.Array:
    """(seeds, dim) alphas at the end; one program for all arms, so rates are padded."""
    tx = osc.scale_by_learning_rate(lambda count: rates[count])

    def loss_fn(w, x, y) -> jax.Array:
        return 0.5 * (to_alpha(w) @ x - y) ** 2

    def run(problem, examples) -> jax.Array:
        def step(count, state) -> Any:
            w, opt_state = state
            chosen = examples.chosen[count]
            y = problem.labels[chosen] + noise * examples.noise[count]
            grads = jax.grad(loss_fn)(w, problem.inputs[chosen], y)
            updates, opt_state = tx.update(grads, opt_state, w)
            return optax.apply_updates(w, updates), opt_state

        w = to_w(problem.start)
        return to_alpha(lax.fori_loop(0, num_steps, step, (w, tx.init(w)))[0])

    return jax.vmap(run)(problems, examples)


def measure(problems, alphas) -> dict[str, np.ndarray]:
    """(seeds,) each; NaN where the run diverged."""
    alphas = np.asarray(alphas, np.float64)

    def distance(others) -> np.ndarray:
        return np.linalg.norm(alphas - others, axis=1)

    return {
        "norm": distance(0),
        "distance": distance(problems.minimum_norm),
        "test loss": 0.5 * distance(problems.teacher) ** 2,
    }


# --- what is compared -----------------------------------------------------------------

CONTROL = Arm(SMALL, max(LENGTHS))
LATE = {length: Arm(LARGE, length) for length in LENGTHS}
# Sums of squares of 0.01, 0.03, 0.1, 0.3 and 1 before the decay, as in LATE.
TRAVEL = {
    5e-3: [Arm(5e-3, steps) for steps in (400, 1200, 4000, 12_000, 40_000)],
    2.5e-3: [Arm(2.5e-3, steps) for steps in (1600, 4800, 16_000, 48_000)],
}
# As large a sum of rates as 1,000 steps at 0.01, and then as large a sum of squares.
SAME_SUM = (Arm(5e-3, 2000), Arm(2.5e-3, 4000))
SAME_SQUARES = (Arm(5e-3, 4000), Arm(2.5e-3, 16_000))
CLEAN = [Arm(rate, 3000, 0.0, 1e-3, 2000) for rate in (3e-3, 1.2e-2, 1.6e-2, 2e-2)]


def is_stable(norms) -> np.ndarray:
    return np.isfinite(np.asarray(norms, np.float64))


def verdicts(test_losses: Mapping[int, float]) -> dict[str, bool]:
    """The claim, of medians by T1."""
    lengths = [length for length in sorted(test_losses) if length <= 10_000]
    falling = np.diff([test_losses[length] for length in lengths]) < 0
    return {
        "test loss at T1 = 3000 below 0.1 of that at T1 = 0": bool(
            test_losses.get(3000, np.inf) < 0.1 * test_losses[0]
        ),
        "test loss falls from each T1 to the next, up to 10000": bool(falling.all()),
    }


def draw(found, late, travel, shortest, path) -> None:
    with harness.figure(path, [["left", "right"]], (9, 4)) as (_, axes):
        left, right = axes.values()
        for k, (name, values) in enumerate(shortest.items()):
            label = name + " to the minimum norm" * (name == "distance")
            spread = [harness.quartiles(found[arm][name]) for arm in late.values()]
            low, median, high = np.transpose(spread)
            left.plot([*late], median, "o-", color=f"C{k}", label=label)
            left.fill_between([*late], low, high, color=f"C{k}", alpha=0.2)
            if name != "distance":
                left.axhline(np.median(values), color=f"C{k}", ls="--", lw=1)
        left.plot([], [], "k--", lw=1, label="of the minimum-norm interpolator")
        left.set_xscale("symlog", linthresh=100, linscale=0.5)
        left.set(yscale="log", xlabel=f"steps at {LARGE:g} before the decay, T1")
        left.set_ylabel("at the end: median, quartiles")

        by_rate = {LARGE: [arm for arm in late.values() if arm.steps]} | dict(travel)
        for marker, (rate, arms) in zip("osD", by_rate.items(), strict=False):
            medians = [harness.quartiles(found[arm]["test loss"])[1] for arm in arms]
            squares = [np.sum(arm.rates**2) for arm in arms]
            right.plot(squares, medians, marker + "-", label=f"rate {rate:g}")
        right.axhline(np.median(shortest["test loss"]), color="k", ls="--", lw=1)
        right.set(xscale="log", yscale="log", ylabel="test loss at the end, median")
        right.set_xlabel("sum of squared rates over the run")
        lengths = [0, 100, 1000, 10_000]
        left.set_xticks(lengths, [f"{length:,}" for length in lengths])
        for ax, ticks in ((left, [0.1, 0.3, 1, 3]), (right, [0.3, 0.5, 1, 2])):
            ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
            ax.legend()


def main() -> None:
    args = harness.parse_args(__doc__)
    num_seeds, late, travel, control = NUM_SEEDS, LATE, TRAVEL, CONTROL
    groups: dict[str, Sequence[Arm]] = {
        "as large a sum of rates": SAME_SUM,
        "as large a sum of squares": SAME_SQUARES,
        "clean labels": CLEAN,
    }
    if args.smoke:
        short = {"then_steps": 50}
        num_seeds = 4
        late = {n: Arm(LARGE, n, **short) for n in (0, 30, 300)}
        travel = {5e-3: [Arm(5e-3, 100, **short)]}
        control = Arm(SMALL, 300, **short)
        groups = {"clean labels": [CLEAN[1]._replace(steps=100, **short)]}
    drawn = [make_problem(seed) for seed in range(num_seeds)]
    problems = Problem(*map(np.stack, zip(*drawn, strict=True)))
    shortest = measure(problems, problems.minimum_norm)
    rows_of = {
        **{f"T1 = {length}": arm for length, arm in late.items()},
        "small rate alone": control,
        **{
            f"{name}, {arm.rate:g} for {arm.steps}": arm
            for name, arms in groups.items()
            for arm in arms
        },
    }
    arms = dict.fromkeys([*rows_of.values(), *itertools.chain(*travel.values())])
    longest = max(arm.num_steps for arm in arms)
    examples = draw_examples(num_seeds, longest)

    def run(arm: Arm) -> dict[str, np.ndarray]:
        rates = np.pad(arm.rates, (0, longest - arm.num_steps))
        alphas = train(problems, examples, rates, arm.noise, arm.num_steps)
        return measure(problems, alphas)

    done = harness.sweep(run, [(arm,) for arm in arms], args.parts)
    found = {arm: kept for (arm,), kept in done.items()}

    show = functools.partial(harness.median_and_quartiles, digits=3)
    rows = [
        {
            "arm": name,
            "sum of rates": f"{arm.rates.sum():.3g}",
            "of squares": f"{np.sum(arm.rates**2):.3g}",
            **{key: show(values) for key, values in found[arm].items()},
            "stable (%)": f"{100 * is_stable(found[arm]['norm']).mean():.0f}",
        }
        for name, arm in rows_of.items()
    ]
    of_shortest = {key: show(values) for key, values in shortest.items()}
    rows.append(dict.fromkeys(rows[0], "") | {"arm": "minimum norm"} | of_shortest)
    median_of = {arm: harness.quartiles(found[arm]["test loss"])[1] for arm in arms}
    medians = {length: median_of[arm] for length, arm in late.items()}
    held = verdicts(medians)
    harness.report(
        args,
        "late_decay_minimum_norm",
        f"{LARGE:g} for T1 steps, then {SMALL:g} for {COOLDOWN}; medians (quartiles) "
        f"of {num_seeds} seeds, of those stable",
        rows,
        {
            "shortest": shortest,
            "verdicts": held,
            "arms": [arm._asdict() | found[arm] for arm in arms],
        },
        "Does a large rate that is kept long enough lead to the minimum-norm solution?",
        f"{LARGE:g} for T1 = {', '.join(map(str, late))} steps, then {SMALL:g}",
        f"T1 + {COOLDOWN}",
        "test loss, median: "
        + ", ".join(f"{median:.3f}" for median in medians.values())
        + f" (n={num_seeds}); of the minimum norm "
        f"{np.median(shortest['test loss']):.3f}",
        "no step more than the largest T1",
    )
    for claim, holds in held.items():
        print(f"{claim}: {'holds' if holds else 'DOES NOT HOLD'}")
    draw(found, late, travel, shortest, args.out / "late_decay_minimum_norm.png")


if __name__ == "__main__":
    main()
