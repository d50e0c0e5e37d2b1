"""Is the peak of one cycle, carried by transfer_peak, as good as one tuned anew?

Each task is trained under five schedules by AdamW, and all but the transformer by SGD
with Nesterov momentum, at 7 and 9 peaks half a decade apart, from two seeds. The best
peak of a schedule is the minimum of the parabola through the best of the grid and its
two neighbours, in the logs of peak and mean held-out loss, or the best of the grid at
an edge. ``transfer_peak`` carries that of one cycle to each other schedule. The regret
of a peak is the loss there over that at the best of the grid under the same schedule,
interpolated in the logs between peaks (``rules.regret``). A run that ends worse than it
began counts as the untrained network. The control is the same peak, unchanged; the row
of one cycle says what the interpolation alone costs.

    python benchmarks/schedule_peaks.py [--smoke] [--out FOLDER]

About five minutes on two cores; what an interruption leaves is not run again. Momentum
is constant in all arms.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax.numpy as jnp
import numpy as np
import optax
import rules
import suite
import tasks

import optax_superconv as osc

NUM_SEEDS = 2
TASKS = {
    "digits-deep-mlp": suite.digits_deep_mlp,
    "sums-transformer": suite.sums_transformer,
    "friedman": suite.friedman,
    "digits-autoencoder": suite.digits_autoencoder,
}
OPTIMIZERS: Any = {
    "adamw": functools.partial(osc.adamw, b1=0.9, b2=0.99, weight_decay=1e-2),
    "sgd": functools.partial(osc.sgd, momentum=0.9, nesterov=True),
}
GRIDS = {"adamw": np.logspace(-4, -1, 7), "sgd": np.logspace(-3.5, 0.5, 9)}

# --- schedules ------------------------------------------------------------------------


def cosine(peak, total) -> optax.Schedule:
    warmup = total // 20
    phases = [osc.Phase(warmup, peak), osc.Phase(total - warmup, 0.0, "cosine")]
    return osc.phase_schedule(0.0, phases)


def late(peak, total, decay=None, shape: Any = "linear") -> optax.Schedule:
    """After the warm-up, unless ``decay`` says how many steps."""
    warmup = total // 20
    return osc.warmup_stable_decay_schedule(
        peak,
        total,
        warmup_steps=warmup,
        decay_steps=decay or total - warmup,
        shape=shape,
    )


SCHEDULES: dict[str, Callable[[Any, int], optax.Schedule]] = {
    "one cycle": osc.onecycle_schedule,
    "cosine": cosine,
    "linear": late,
    "1-sqrt": lambda peak, total: late(peak, total, shape="1-sqrt"),
    "late decay": lambda peak, total: late(peak, total, total // 5),
}

# --- what is run ----------------------------------------------------------------------


@functools.cache
def training_of(make_task, optimizer) -> tasks.Training:
    """Takes the rates of all steps, so one program serves all schedules."""

    def make_tx(rates) -> optax.GradientTransformation:
        return OPTIMIZERS[optimizer](lambda count: jnp.atleast_1d(rates)[count])

    return tasks.Training(make_task(), make_tx)


def final_losses(make_task, optimizer, schedule, peaks, seeds) -> dict[str, Any]:
    """(peaks, seeds) held-out losses after a run, and (seeds) before it."""
    training = training_of(make_task, optimizer)
    steps = training.task.num_steps
    starts = [training.start(seed) for seed in seeds]
    untrained = [float(training.held_out_loss(start)) for start in starts]

    def run(member) -> float:
        peak, seed = member
        rates = SCHEDULES[schedule](peak, steps)(np.arange(steps))
        indices = tasks.batch_indices(training.task, steps, seed)
        state, _ = training.run(starts[seed], rates, indices, seed)
        return float(jnp.fmin(training.held_out_loss(state), untrained[seed]))

    members = [*itertools.product(peaks, seeds)]
    losses = np.reshape(harness.in_threads(run, members), (len(peaks), len(seeds)))
    return {"peaks": peaks, "losses": losses, "untrained": untrained, "steps": steps}


# --- what comes out -------------------------------------------------------------------


def best_peak(record) -> float:
    """By the parabola through three of the grid, unless the best is at its edge."""
    x = np.log(record["peaks"])
    y = np.log(np.mean(record["losses"], axis=1))
    k = int(y.argmin())
    if k in (0, len(x) - 1):
        return float(np.exp(x[k]))
    near = slice(k - 1, k + 2)
    curvature, slope, _ = np.polyfit(x[near] - x[k], y[near], 2)
    return float(np.exp(x[k] - slope / (2 * curvature)))


def regret_at(record, peak: float) -> float:
    peaks, losses, untrained = rules.arrays_of(record)
    cell = rules.Cell("", "", False, 0, peaks, losses, untrained, [])
    return rules.regret(cell, peak)


def summary(values: Sequence[float]) -> str:
    """Geometric mean and worst of the tasks."""
    return f"{rules.geometric_mean(values):.2f}, {max(values):.2f}"


def mean_and_range(ratios: Sequence[float]) -> str:
    """Geometric mean of the tasks, lowest and highest."""
    mean = np.exp(np.mean(np.log(ratios)))
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    args = harness.parse_args(__doc__)
    makers, every, seeds = TASKS, 1, range(NUM_SEEDS)
    if args.smoke:
        makers, every, seeds = {"noisy-cancer": suite.noisy_cancer}, 3, range(1)

    def compute(name: str, optimizer: str, schedule: str) -> dict[str, Any]:
        grid = GRIDS[optimizer][::every]
        return final_losses(makers[name], optimizer, schedule, grid, seeds)

    members = [
        member
        for member in itertools.product(makers, OPTIMIZERS, SCHEDULES)
        if member[:2] != ("sums-transformer", "sgd")
    ]
    # One after the other, as each has threads of its own.
    found = harness.sweep(compute, members, args.parts, workers=1)

    peaks = {member: best_peak(record) for member, record in found.items()}
    results: dict[Any, dict[str, float]] = {}
    for name, optimizer, schedule in members:
        member, tuned = (name, optimizer, schedule), peaks[name, optimizer, "one cycle"]
        steps = found[member]["steps"]
        known, asked = (SCHEDULES[k](1.0, steps) for k in ("one cycle", schedule))
        carried = osc.transfer_peak(tuned, known, asked, steps)
        results[member] = {
            "peak": peaks[member],
            "predicted": carried / tuned,
            "measured": peaks[member] / tuned,
            "carried": regret_at(found[member], carried),
            "unchanged": regret_at(found[member], tuned),
        }
    rows, told = [], []
    for optimizer, schedule in itertools.product(OPTIMIZERS, SCHEDULES):
        of_tasks = [v for k, v in results.items() if k[1:] == (optimizer, schedule)]
        columns = {key: [v[key] for v in of_tasks] for key in of_tasks[0]}
        rows.append(
            {
                "arm": f"{optimizer}, {schedule}",
                "predicted ratio": f"{np.mean(columns['predicted']):.2f}",
                "measured ratio": mean_and_range(columns["measured"]),
                "regret, carried": summary(columns["carried"]),
                "regret, unchanged": summary(columns["unchanged"]),
            }
        )
    for optimizer in OPTIMIZERS:
        others = [
            v for k, v in results.items() if k[1] == optimizer and k[2] != "one cycle"
        ]
        both = [summary([v[key] for v in others]) for key in ("carried", "unchanged")]
        told.append(f"{optimizer} " + " / ".join(both))
    harness.report(
        args,
        "schedule_peaks",
        "Held-out loss at the peak of one cycle, carried and unchanged, over that at "
        "the best of a grid: geometric mean over tasks, worst task",
        rows,
        {
            "tasks": {" ".join(key): record for key, record in found.items()},
            "results": {" ".join(key): values for key, values in results.items()},
        },
        "Is a peak tuned for one cycle, carried by `transfer_peak`, as good for "
        "another schedule as one tuned for it?",
        f"carried / unchanged; {len(SCHEDULES) - 1} schedules, {len(makers)} tasks",
        " to ".join(str(f({r["steps"] for r in found.values()})) for f in (min, max)),
        "regret, mean and worst: " + "; ".join(told),
        "one grid for all schedules, instead of one for each",
    )


if __name__ == "__main__":
    main()
