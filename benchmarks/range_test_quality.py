"""Which reading of a range test is a good peak rate for one cycle?

Each task is trained by ``onecycle_sgd`` and ``onecycle_adamw`` at 17 peak rates, a
quarter of a decade apart, from several seeds. A rule reads a rate off a probe of the
same task; its regret is the held-out loss of one cycle at that rate over that at the
best of the 17, both means over the seeds, interpolated in the logs between rates;
beyond the grid, that of its end. A run that ends worse than it began, and a probe that
suggests nothing, count as the untrained network. Half of the tasks chose the default of
``suggest_learning_rate`` (its constants were fitted to them); the other half report
what it is worth.

    python benchmarks/range_test_quality.py [--smoke] [--data CIFAR10] [--out FOLDER]

About 25 minutes on two cores with CIFAR-10, 10 without; what an interruption leaves is
not run again. The rules of fast.ai are transcribed from its ``callback.schedule``, with
its ladder, smoothing and trimming. The probes' steps are not deducted from the runs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks

import optax_superconv as osc

NUM_SEEDS = 5
MOMENTUM, B2 = 0.9, 0.99
CYCLES: Any = {"sgd": osc.onecycle_sgd, "adamw": osc.onecycle_adamw}
CONSTANT = {
    "sgd": lambda rate: optax.sgd(rate, MOMENTUM, nesterov=True),
    "adamw": lambda rate: optax.adamw(rate, MOMENTUM, B2, weight_decay=1e-2),
}
GRIDS = {"sgd": np.logspace(-3.5, 0.5, 17), "adamw": np.logspace(-4, 0, 17)}

# In turn, as they were listed before any of them was run.
CHOOSING = {
    "digits-mlp": tasks.digits_mlp,
    "sums-transformer": tasks.sums_transformer,
    "diabetes-mlp": tasks.diabetes_mlp,
    "digits-autoencoder": tasks.digits_autoencoder,
    "digits-deep-mlp": tasks.digits_deep_mlp,
}
REPORTING = {
    "digits-cnn": tasks.digits_cnn,
    "friedman-mlp": tasks.friedman_mlp,
    "least-squares": tasks.least_squares,
    "cancer-linear": tasks.cancer_linear,
}
METHODS = ("knee", "valley", "steepest", "minimum", "divergence")

# --- what is run ----------------------------------------------------------------------


def final_losses(task, optimizer, rates, seeds) -> tuple[np.ndarray, list[float]]:
    """(rates, seeds) held-out losses after one cycle, and (seeds) before it."""
    make_tx = functools.partial(CYCLES[optimizer], total_steps=task.num_steps)
    training = tasks.Training(task, make_tx)
    starts = [training.start(seed) for seed in seeds]
    untrained = [float(training.held_out_loss(start)) for start in starts]

    def run(member) -> float:
        rate, seed = member
        indices = tasks.batch_indices(task, task.num_steps, seed)
        state, _ = training.run(starts[seed], np.float32(rate), indices, seed)
        return float(jnp.fmin(training.held_out_loss(state), untrained[seed]))

    members = [(rate, seed) for rate in rates for seed in seeds]
    losses = np.reshape(harness.in_threads(run, members), (len(rates), len(seeds)))
    return losses, untrained


def probes(task, optimizer, n, seeds) -> list[dict[str, Any]]:
    """What each seed's probes of ``n`` steps give, all from its fresh start."""
    training = tasks.Training(task, CONSTANT[optimizer])

    def run(seed) -> dict[str, Any]:
        state = training.start(seed)

        def curve(seed, **options) -> dict[str, Any]:
            options |= {"num_steps": n, "pass_hyperparams": True}
            batches = training.batches(seed, n)
            found = osc.range_test(training.step, state, batches, **options)
            names = ("learning_rates", "losses", "smoothed_losses", "diverged")
            return {name: getattr(found, name) for name in names}

        return {
            # Three repeats for the median, in other orders of the batches.
            "curves": [curve(seed + 100 * k) for k in range(3)],
            "fastai": curve(seed, min_learning_rate=1e-7),
            "curvature": curvature_limit(training, state, seed, optimizer),
            "threshold": threshold(training, state, seed, n),
        }

    return harness.in_threads(run, seeds)


def curvature_limit(training, state, seed, optimizer) -> float:
    """At the start, on one batch; Adam's second moment is that of 20 batches there."""
    preconditioner, name = None, "nesterov"
    params, other, _ = state
    batches = training.batches(seed, 20)
    if optimizer == "adamw":
        for batch in batches:
            state, _ = training.step(state, 1e-12, batch)
        adam = optax.tree.get(state[2], "ScaleByAdamState")
        nu_hat = optax.tree.bias_correction(adam.nu, B2, adam.count)
        preconditioner, name = (
            jax.tree.map(lambda nu: jnp.sqrt(nu) + 1e-8, nu_hat),
            "adam",
        )
    found = osc.sharpness(
        training.loss_fn, params, other, batches[0], preconditioner=preconditioner
    )
    return float(osc.stability_limit(found, optimizer=name, momentum=MOMENTUM))


def threshold(training, state, seed, n) -> dict[str, Any]:
    batches = training.batches(seed, n)
    try:
        found = osc.convergence_threshold(
            training.step,
            state,
            batches,
            num_steps=n,
            min_learning_rate=1e-4,
            max_learning_rate=100.0,
            pass_hyperparams=True,
        )
    except ValueError as error:
        return {"error": str(error), "rate": np.nan, "steps": 16 * n}
    return {"rate": found.threshold, "steps": n * len(found.rates)}


# --- rules ----------------------------------------------------------------------------


def fastai_curve(curve, num_steps=100) -> tuple[np.ndarray, np.ndarray]:
    """Rates and losses as fast.ai's rules see them: up to 4 times the best, trimmed."""
    losses = np.asarray(curve["smoothed_losses"], np.float64)
    over = ~(losses <= 4 * np.fmin.accumulate(losses))
    count = int(np.argmax(over)) + 1 if over.any() else len(losses)
    part = slice(num_steps // 10, max(count - 5, 0))
    return np.asarray(curve["learning_rates"])[part], losses[part]


def fastai_valley(curve) -> float:
    """Half-way along the longest run of falling losses, gaps allowed."""
    rates, losses = fastai_curve(curve)
    longest = np.ones(len(losses), int)
    for i in range(1, len(losses)):
        lower = longest[:i][losses[i] < losses[:i]]
        longest[i] = 1 + (lower.max() if lower.size else 0)
    end = int(longest.argmax())
    start = end - int(longest[end])
    third = (end - start) / 3
    return rates[start + int(third) + int(third / 2)]


def fastai_slide(curve) -> float:
    """Leftwards from the end, to where the slope changes by less than 0.005."""
    rates, losses = fastai_curve(curve)
    slopes, right, found = np.gradient(losses), -1, rates[-16]
    while right - 15 >= -len(losses) and (
        abs(slopes[right] - slopes[right - 15]) > 0.005
    ):
        found = rates[right - 15]
        right -= 1
    return found


def fastai_minimum(curve) -> float:
    rates, losses = fastai_curve(curve)
    return rates[losses.argmin()] / 10


def fastai_steep(curve) -> float:
    rates, losses = fastai_curve(curve)
    return rates[np.argmin(np.diff(losses) / np.diff(np.log(rates)))]


def steepest(curve, by_rate=False) -> float:
    """As in torch-lr-finder, of the running average but its first 10 and last 5.

    Per step there; with ``by_rate`` per unit of the rate.
    """
    losses = np.asarray(curve["smoothed_losses"], np.float64)[10:-5]
    rates = np.asarray(curve["learning_rates"])[10:-5]
    return rates[int(np.nanargmin(np.gradient(losses, *[rates] * by_rate)))]


def suggested(*curves, **options) -> float:
    """By the package; what is not finite came back as None."""

    def as_result(curve) -> osc.RangeTestResult:
        names = ("learning_rates", "losses", "smoothed_losses")
        arrays = {name: np.asarray(curve[name], np.float64) for name in names}
        return osc.RangeTestResult(**arrays, diverged=curve["diverged"])

    return osc.suggest_learning_rate([*map(as_result, curves)], **options)


CURVE_RULES: dict[str, Callable[..., float]] = {
    "fastai.valley": fastai_valley,
    "fastai.slide": fastai_slide,
    "fastai.minimum": fastai_minimum,
    "fastai.steep": fastai_steep,
    "steepest by index": steepest,
    "steepest by rate": functools.partial(steepest, by_rate=True),
    **{method: functools.partial(suggested, method=method) for method in METHODS},
    "default": suggested,
}


def readings(probe) -> dict[str, tuple[float, int]]:
    """By each rule: the rate that it reads off a probe, and what that took in steps."""

    def read(rule, *curves) -> float:
        try:
            return float(rule(*curves))
        except (ValueError, IndexError):
            return np.nan

    curve, limit = probe["curves"][0], probe["threshold"]
    n = len(curve["losses"])
    found = {
        name: (read(rule, probe["fastai"] if "fastai" in name else curve), n)
        for name, rule in CURVE_RULES.items()
    }
    found["default, median of 3"] = read(suggested, *probe["curves"]), 3 * n
    for factor in (0.5, 1, 1.5, 2, 3):
        rate = factor * (limit["rate"] or np.nan)
        found[f"threshold x {factor}"] = rate, limit["steps"]
    return found | {"curvature limit": (probe["curvature"] or np.nan, 40)}


# --- what comes out -------------------------------------------------------------------


def regret(record, rate) -> float:
    """The loss at a rate over that at the best of the grid."""
    means = np.mean(record["losses"], axis=1)
    if not np.isfinite(rate):
        return float(np.mean(record["untrained"]) / means.min())
    log_losses = np.log(means / means.min())
    at_rate = np.interp(np.log(rate), np.log(record["rates"]), log_losses)
    return float(np.exp(at_rate))


def summary(values: Sequence[float]) -> str:
    """Geometric mean and worst of the tasks."""
    if not values:
        return "-"
    return f"{np.exp(np.mean(np.log(values))):.2f}, {max(values):.2f}"


def spread(rates: Sequence[float]) -> float:
    found = np.asarray([rate for rate in rates if np.isfinite(rate)])
    return float(found.max() / found.min()) if found.size else np.nan


def synthetic_spread(noise, rule, families, draws) -> float:
    """5 to 95 % over noisy curves that fall by 1.8 around a rate of 10**-2.5.

    The worst of several families of draws.
    """
    rates = np.geomspace(1e-7, 10, 100)
    x = np.log10(rates)
    smooth = 2.3 - 1.8 / (1 + np.exp(-2 * (x + 2.5))) + 0.02 * np.exp(4 * x)
    weights = 0.98 ** np.arange(100)

    def suggestion(seed: Sequence[int]) -> float:
        losses = smooth + noise * np.random.default_rng(seed).normal(size=100)
        averages = np.convolve(losses, weights)[:100] / np.cumsum(weights)
        curve = {"losses": losses, "smoothed_losses": averages, "diverged": False}
        return rule({"learning_rates": rates} | curve)

    found = [[suggestion((k, seed)) for seed in range(draws)] for k in range(families)]
    low, high = np.percentile(found, [5, 95], axis=1)
    return float(np.max(high / low))


def main() -> None:
    args = harness.parse_args(__doc__, takes_data=True)
    makers, every, n, seeds = CHOOSING | REPORTING, 1, 100, range(NUM_SEEDS)
    curves_each = (5, 200)
    if args.data is not None:
        makers["cifar10-resnet9"] = functools.partial(tasks.cifar10_resnet, args.data)
    if args.smoke:
        makers = {"cancer-linear": tasks.cancer_linear}
        every, n, seeds, curves_each = 8, 60, range(1), (1, 20)

    def compute(name: str, optimizer: str) -> dict[str, Any]:
        task, rates = makers[name](), GRIDS[optimizer][::every]
        losses, untrained = final_losses(task, optimizer, rates, seeds)
        return {
            "rates": rates,
            "losses": losses,
            "untrained": untrained,
            "steps": task.num_steps,
            "probes": probes(task, optimizer, n, seeds),
        }

    # One after the other, as each has threads of its own.
    members = itertools.product(makers, GRIDS)
    found = harness.sweep(compute, members, args.parts, workers=1)
    records = {" ".join(key): record for key, record in found.items()}

    read = {key: [*map(readings, r["probes"])] for key, r in records.items()}
    rules = [*next(iter(read.values()))[0]]
    picked, regrets, rows, told = {}, {}, [], []
    for rule in rules:
        rates = {key: [found[rule][0] for found in read[key]] for key in records}
        losses = {key: [regret(records[key], r) for r in rates[key]] for key in records}
        steps = [found[rule][1] for probes in read.values() for found in probes]
        row = {
            "rule": rule,
            "steps": f"{np.mean(steps):.0f}",
            "spread": f"{np.nanmedian([*map(spread, rates.values())]):.1f}",
            "none": sum(not np.isfinite(rate) for v in rates.values() for rate in v),
        }
        for optimizer, half in itertools.product(GRIDS, ("chose", "report")):
            values = [
                float(np.mean(losses[f"{name} {optimizer}"]))
                for name in makers
                if (name in CHOOSING) == (half == "chose")
            ]
            row[f"{optimizer}: {half}"] = summary(values)
            if rule == "default" and half == "report":
                told.append(f"{optimizer} {harness.mean_and_std(values)}")
        rows.append(row)
        picked[rule], regrets[rule] = rates, losses
    lengths = [record["steps"] for record in records.values()]
    harness.report(
        args,
        "range_test_quality",
        "Held-out loss of one cycle at the suggested peak over that at the best of 17: "
        "geometric mean over tasks, worst task",
        rows,
        {
            "tasks": {
                key: {k: v for k, v in record.items() if k != "probes"}
                for key, record in records.items()
            },
            "picked": picked,
            "regret": regrets,
        },
        "Which reading of a range test is a good peak for one cycle?",
        f"{len(rules)} rules, {len(records)} tasks x optimizers",
        f"{n} a test, {min(lengths)} to {max(lengths)} a run",
        "regret of the default on the tasks that report it: " + ", ".join(told),
        f"{n} steps",
    )

    names = (*METHODS[:-1], "default", "fastai.valley", "fastai.slide")
    spreads = {
        name: {
            noise: synthetic_spread(noise, CURVE_RULES[name], *curves_each)
            for noise in (0.02, 0.05, 0.1, 0.2)
        }
        for name in names
    }
    told = [
        ", ".join(f"{v:.2f}" for v in spreads[name].values())
        for name in ("default", "fastai.valley")
    ]
    harness.report(
        args,
        "range_test_spread",
        "5 to 95 % of the suggestion over 200 noisy curves, high over low, worst of 5",
        [
            {"rule": name} | {f"noise {k}": f"{v:.2f}" for k, v in values.items()}
            for name, values in spreads.items()
        ],
        {"spreads": spreads},
        "How far does noise move a suggestion?",
        "default / fast.ai's valley, noise of 0.02, 0.05, 0.1, 0.2 on 1.8",
        "100",
        "5 to 95 %, high over low, worst of 5 (n=200): " + " / ".join(told),
        "none",
    )


if __name__ == "__main__":
    main()
