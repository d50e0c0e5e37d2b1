"""What does one cycle reach at each peak rate, and what do cheap probes see before it?

The measurements by which ``range_test_quality`` judges which peak to take; it trains
nothing itself, so another rule costs no training either. On each task of ``suite``:

* the held-out loss of ``onecycle_sgd`` and ``onecycle_adamw`` at 21 peaks, a quarter of
  a decade apart, from 5 seeds. A run that ends worse than it began counts as that;
* from 5 other seeds, on the optimizer that will train: range tests of 100 and 200
  steps, some with fast.ai's ladder, repeated with other orders of the batches; the
  convergence threshold of 100 steps; the limit that the curvature sets at the start;
  and eight one cycles of a 20th and of a 40th of the steps, 3/4 of a decade apart,
  with the loss on examples that they were trained on.

    python benchmarks/peaks_and_probes.py [--smoke] [--data CIFAR10] [--out FOLDER]

About 35 minutes on two cores with CIFAR-10, of which two tasks are made; what an
interruption leaves is not run again. Curves are in ``peaks_and_probes.npz``.
"""

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import suite
import tasks

import optax_superconv as osc

MOMENTUM, B2 = 0.9, 0.99  # The mean of the cycle's momentum, and the recipe's b2.
CYCLES: Any = {"adamw": osc.onecycle_adamw, "sgd": osc.onecycle_sgd}
PEAKS = np.logspace(-4, 1, 21)
LADDERS = {"adamw": (1e-5, 10.0), "sgd": (1e-4, 100.0)}  # of thresholds
MINI_PEAKS = {
    "adamw": np.logspace(-5, 0.25, 8),
    "sgd": np.logspace(-4, 1.25, 8),
}
MINI_PARTS = (20, 40)

# Seeds of the tasks that choose, of those that report, and of the probes of both.
TUNING, REPORTING, PROBING = 0, 10, 20


def final_losses(task, optimizer, peaks, seeds) -> tuple[np.ndarray, list[float]]:
    """(peaks, seeds) held-out losses after one cycle, and (seeds) before it."""
    make_tx = functools.partial(CYCLES[optimizer], total_steps=task.num_steps)
    training = tasks.Training(task, make_tx)
    starts = {seed: training.start(seed) for seed in seeds}
    untrained = {s: float(training.held_out_loss(start)) for s, start in starts.items()}

    def run(member) -> float:
        peak, seed = member
        indices = tasks.batch_indices(task, task.num_steps, seed)
        state, _ = training.run(starts[seed], np.float32(peak), indices, seed)
        return float(jnp.fmin(training.held_out_loss(state), untrained[seed]))

    members = [(peak, seed) for peak in peaks for seed in seeds]
    losses = np.reshape(harness.in_threads(run, members), (len(peaks), len(seeds)))
    return losses, [*untrained.values()]


def range_tests(training, state, seed, repeats, num_steps, **options) -> dict[str, Any]:
    """(repeats, num_steps) losses, NaN from their end on, and whether they diverged."""
    losses, diverged = np.full((repeats, num_steps), np.nan), []
    for k in range(repeats):
        batches = training.batches(seed + 100 * k, num_steps)
        found = osc.range_test(
            lambda state, batch: training.step(state, 1.0, batch),
            state,
            batches,
            num_steps=num_steps,
            **options,
        )
        losses[k, : len(found.losses)] = found.losses
        diverged.append(bool(found.diverged))
    return {"losses": losses, "diverged": diverged}


def threshold(training, state, seed, optimizer, num_steps) -> dict[str, Any]:
    low, high = LADDERS[optimizer]
    try:
        found = osc.convergence_threshold(
            lambda state, batch: training.step(state, 1.0, batch),
            state,
            training.batches(seed, num_steps),
            num_steps=num_steps,
            min_learning_rate=low,
            max_learning_rate=high,
        )
    except ValueError as error:  # No rate converges, or all do: 16 runs, no answer.
        return {"rate": np.nan, "steps": 16 * num_steps, "error": str(error)}
    return {"rate": found.threshold, "steps": num_steps * len(found.rates)}


def curvature_limit(training, state, seed, optimizer) -> float:
    """At the start, on one batch; Adam's second moment is that of 20 batches there."""
    preconditioner, name = None, "nesterov"
    params, other, _ = state
    batches = training.batches(seed, 20)
    if optimizer == "adamw":
        held = osc.set_hyperparams(state[2], {"learning_rate": 1e-12})
        state = (params, other, held)
        for batch in batches:
            state, _ = training.step(state, 1.0, batch)
        adam = optax.tree.get(state[2], "ScaleByScheduledAdamState")
        nu_hat = optax.tree.bias_correction(adam.nu, B2, adam.count)
        preconditioner = jax.tree.map(lambda nu: jnp.sqrt(nu) + 1e-8, nu_hat)
        name = "adam"
    find = jax.jit(
        lambda params, preconditioner: osc.sharpness(
            training.loss_fn, params, other, batches[0], preconditioner=preconditioner
        )
    )
    found = find(params, preconditioner)
    return float(osc.stability_limit(found, optimizer=name, momentum=MOMENTUM))


def mini_training(task, optimizer, part) -> tasks.Training:
    num_steps = max(task.num_steps // part, 4)
    make_tx = functools.partial(CYCLES[optimizer], total_steps=num_steps)
    return tasks.Training(task._replace(num_steps=num_steps), make_tx)


def mini_cycles(training, peaks, seed) -> list[float]:
    """The loss that each of the short cycles reaches on what it was trained on."""
    task = training.task
    indices = tasks.batch_indices(task, task.num_steps, seed)
    seen = training.gather(None, np.unique(indices)[:1000], jax.random.key(seed))
    start, losses = training.start(seed), []
    for peak in peaks:
        state, _ = training.run(start, np.float32(peak), indices, seed)
        losses.append(float(training.loss_on(state, seen)))
    return losses


def probes(task, optimizer, num_steps, repeats, seeds) -> list[dict[str, Any]]:
    """What the probes from each seed's start see."""
    cycle = functools.partial(CYCLES[optimizer], 1.0, task.num_steps)
    training = tasks.Training(task, lambda _: cycle())
    minis = [mini_training(task, optimizer, part) for part in MINI_PARTS]
    peaks = MINI_PEAKS[optimizer]

    def run(seed) -> dict[str, Any]:
        state = training.start(seed)
        tests = functools.partial(range_tests, training, state, seed)
        return {
            "curves": tests(repeats, num_steps),
            "fastai": tests(min(repeats, 3), num_steps, min_learning_rate=1e-7),
            "slow": tests(1, 2 * num_steps),
            "threshold": threshold(training, state, seed, optimizer, num_steps),
            "curvature": curvature_limit(training, state, seed, optimizer),
            "minis": [mini_cycles(mini, peaks, seed) for mini in minis],
        }

    return harness.in_threads(run, seeds)


# --- what comes out -------------------------------------------------------------------


def row_of(member: tuple[str, str], chooses: bool, record: Any) -> dict[str, Any]:
    name, optimizer = member
    peaks, losses = np.asarray(record["peaks"]), np.asarray(record["losses"])
    means = losses.mean(axis=1)
    best = peaks[means.argmin()]
    near = peaks[means <= 1.05 * means.min()]
    return {
        "task": name,
        "optimizer": optimizer,
        "half": "chooses" if chooses else "reports",
        "steps": record["steps"],
        "untrained": f"{np.mean(record['untrained']):.3g}",
        "best": f"{means.min():.3g} ± {losses[means.argmin()].std(ddof=1):.1g}",
        "at": f"{best:.2g}" + " (edge)" * (best in (peaks[0], peaks[-1])),
        "within 5 %": f"{near[0]:.2g} to {near[-1]:.2g}",
    }


def main() -> None:
    args = harness.parse_args(__doc__, takes_data=True)
    members = suite.members(with_cifar10=args.data is not None)
    every, count, num_steps, repeats = 1, 5, 100, 5
    if args.smoke:
        members = {("noisy_cancer", "adamw"): True}
        every, count, num_steps, repeats = 10, 2, 40, 1

    def compute(name: str, optimizer: str) -> dict[str, Any]:
        task = suite.task_of(name, args.data)
        first = TUNING if members[name, optimizer] else REPORTING
        peaks = PEAKS[::every]
        seeds = range(first, first + count)
        losses, untrained = final_losses(task, optimizer, peaks, seeds)
        seeds = range(PROBING, PROBING + count)
        return {
            "steps": task.num_steps,
            "peaks": peaks,
            "losses": losses,
            "untrained": untrained,
            "probes": probes(task, optimizer, num_steps, repeats, seeds),
        }

    # One after the other, as each has threads of its own.
    found = harness.sweep(compute, members, args.parts, workers=1)
    rows = [row_of(key, members[key], record) for key, record in found.items()]
    curves, evidence = {}, {}
    for (name, optimizer), record in found.items():
        key = f"{name} {optimizer}"
        each = record.pop("probes")
        for kind in ("curves", "fastai", "slow"):
            losses = [probe[kind].pop("losses") for probe in each]
            curves[f"{key} {kind}"] = np.asarray(losses, np.float32)
        chooses = members[name, optimizer]
        evidence[key] = record | {"chooses": chooses, "probes": each}
    path = harness.evidence_file(args.out, "peaks_and_probes.npz")
    np.savez_compressed(path, **curves)
    lengths = [record["steps"] for record in found.values()]
    harness.report(
        args,
        "peaks_and_probes",
        f"Held-out loss of one cycle at the best of {len(PEAKS[::every])} peaks, "
        f"mean ± s.d. of {count} seeds",
        rows,
        {"tasks": evidence},
        "What does one cycle reach at each peak rate?",
        f"{len(PEAKS)} peaks, {len(found)} tasks x optimizers",
        f"{min(lengths)} to {max(lengths)}",
        "see the file",
        "none",
    )


if __name__ == "__main__":
    main()
