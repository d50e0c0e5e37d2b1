"""Which peak for one cycle: by which rule, at what cost, and how far off the best?

Judges rules by what ``peaks_and_probes`` measured, so nothing is trained here. The
regret of a rate is the held-out loss of one cycle at this peak over that at the best of
21. Constants (the best constant rate, the factors that rules are multiplied by) and the
defaults of ``suggest_learning_rate`` come from the half of the tasks that chooses; the
other half reports. Where a rule finds no rate, it says so, and a user takes a usual
one: such a case counts as 0.001 with AdamW and 0.1 with SGD. A second table shows the
default task by task.

    python benchmarks/range_test_quality.py [--smoke] [--out FOLDER]

About a minute, from what is in FOLDER or else in ``benchmarks/results``. The steps of
probes are not deducted from the runs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import harness
import numpy as np
import rules
from rules import Cell, Rule

import optax_superconv as osc

OPTIMIZERS: tuple[str, ...] = ("adamw", "sgd")
HALVES = ("chose", "report")
Parts = dict[tuple[str, str], list[Cell]]  # by optimizer and half
ByOptimizer = dict[str, float]
USUAL: ByOptimizer = {"adamw": 1e-3, "sgd": 0.1}  # where a rule finds no rate


def parts_of(cells: Sequence[Cell]) -> Parts:
    return {
        (optimizer, half): [
            cell
            for cell in cells
            if cell.optimizer == optimizer and cell.chooses == (half == "chose")
        ]
        for optimizer in OPTIMIZERS
        for half in HALVES
    }


# --- one rule -------------------------------------------------------------------------


def bootstrap(tasks: dict[str, float], draws: int) -> dict[str, Any]:
    """Geometric mean and worst of the tasks, with 5 to 95 % over draws of tasks."""
    array = np.array([*tasks.values()])
    picked = np.random.default_rng(0).integers(len(array), size=(draws, len(array)))
    means, worst = np.exp(np.log(array)[picked].mean(axis=1)), array[picked].max(axis=1)
    return {
        "mean": rules.geometric_mean(array),
        "mean_interval": np.percentile(means, [5, 95]),
        "median": float(np.median(array)),
        "worst": array.max(),
        "worst_interval": np.percentile(worst, [5, 95]),  # Its high end is the worst.
        "tasks": tasks,
    }


def read_all(rule: Rule, cells: Sequence[Cell]) -> list[list[float]]:
    return [[r for probe in c.probes for r in rule.read(c, probe)] for c in cells]


def judged(
    cells: Sequence[Cell],
    rates: Sequence[Sequence[float]],
    factor: float,
    otherwise: float,
    draws: int,
) -> dict[str, Any]:
    """What rates read off tasks, times a factor, are worth."""
    pairs = zip(cells, rates, strict=True)
    tasks = {c.task: rules.regret_of(c, r, factor, otherwise) for c, r in pairs}
    missing = np.mean([not np.isfinite(r) for each in rates for r in each])
    return bootstrap(tasks, draws) | {"none": float(missing)}


def of_rule(
    name: str, rule: Rule, parts: Parts, draws: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A rule as it is, and with the factors that the choosing half fits."""
    rates = {part: read_all(rule, cells) for part, cells in parts.items()}
    fitted = {}
    for o in OPTIMIZERS:
        chose = (o, "chose")
        fitted[o] = rules.fitted_factor(parts[chose], rates[chose], USUAL[o])
    every = [(c, p) for cells in parts.values() for c in cells for p in c.probes]
    steps = np.array([rule.steps(cell, probe) for cell, probe in every])
    share = steps / [cell.steps for cell, _ in every]
    cost = {"steps": float(steps.mean()), "share": float(share.mean())}
    as_it_is = dict.fromkeys(OPTIMIZERS, 1.0)
    for label, factors in ((name, as_it_is), (f"{name}, fitted", fitted)):
        if label.startswith("default") and factors is fitted:
            continue  # A default that were fitted would be another rule.
        found = {
            part: judged(cells, rates[part], factors[part[0]], USUAL[part[0]], draws)
            for part, cells in parts.items()
        }
        yield label, cost | {"factors": factors, "parts": found}


# --- no probe, and the whole grid -----------------------------------------------------


def best_constants(parts: Parts) -> ByOptimizer:
    chose = {optimizer: parts[optimizer, "chose"] for optimizer in OPTIMIZERS}
    return {o: rules.fitted_factor(c, [[1.0]] * len(c)) for o, c in chose.items()}


def of_constant(parts: Parts, rates: ByOptimizer, draws: int) -> dict[str, Any]:
    found = {
        part: judged(cells, [[1.0]] * len(cells), rates[part[0]], np.nan, draws)
        for part, cells in parts.items()
    }
    return {"steps": 0, "share": 0, "factors": rates, "parts": found}


def all_but_one(cell: Cell) -> float:
    """The best peak on all seeds but one, judged on that one, in turn."""
    seeds = range(cell.losses.shape[1])
    picked = [np.delete(cell.losses, k, axis=1).mean(1).argmin() for k in seeds]
    found = np.mean([cell.losses[p, k] for k, p in enumerate(picked)])
    return float(found / cell.losses.mean(1).min())


def of_grid(parts: Parts, draws: int) -> dict[str, Any]:
    cells = [cell for part in parts.values() for cell in part]
    runs = len(cells[0].peaks) * (cells[0].losses.shape[1] - 1)
    found = {
        part: bootstrap({c.task: all_but_one(c) for c in cells}, draws) | {"none": 0.0}
        for part, cells in parts.items()
    }
    steps = runs * float(np.mean([cell.steps for cell in cells]))
    ones = dict.fromkeys(OPTIMIZERS, 1.0)
    return {"steps": steps, "share": runs, "factors": ones, "parts": found}


# --- what comes out -------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.2f}" if value < 99.5 else f"{value:.3g}"


def show(found: dict[str, Any]) -> str:
    """``mean (5 to 95 %), median, worst (5 %)``."""
    interval = " to ".join(map(number, found["mean_interval"]))
    middle, worst = number(found["median"]), number(found["worst"])
    least = number(found["worst_interval"][0])
    return f"{number(found['mean'])} ({interval}), {middle}, {worst} ({least})"


def row_of(name: str, found: dict[str, Any]) -> dict[str, str]:
    parts = found["parts"]

    def by_optimizer(form: str, values: ByOptimizer) -> str:
        shown = [form.format(values[optimizer]) for optimizer in OPTIMIZERS]
        return shown[0] if shown[0] == shown[1] else " / ".join(shown)

    none = {
        o: float(np.mean([parts[o, half]["none"] for half in HALVES]))
        for o in OPTIMIZERS
    }
    return {
        "rule": name,
        "times": by_optimizer("{:.2g}", found["factors"]),
        "steps": f"{found['steps']:.0f}",
        "of a run": f"{found['share']:.2f}",
        "none": by_optimizer("{:.0%}", none),
    } | {f"{o}: {half}": show(parts[o, half]) for o in OPTIMIZERS for half in HALVES}


def report_tasks(args, parts: Parts) -> None:
    """What the default reads off tests of two lengths, on each task."""
    kinds = {"200 steps": "slow", "100 steps": "curves"}
    rows, kept = [], {}
    none: dict[str, list[float]] = {length: [] for length in kinds}  # in %
    for (optimizer, half), cells in parts.items():
        for cell in cells:
            best = cell.peaks[cell.losses.mean(axis=1).argmin()]
            row = {"task": cell.task, "optimizer": optimizer, "half": half}
            row["best peak"] = f"{best:.2g}"
            row["regret, usual"] = number(rules.regret(cell, USUAL[optimizer]))
            for length, kind in kinds.items():
                rule = rules.of_curves(osc.suggest_learning_rate, kind)
                (rates,) = read_all(rule, [cell])
                none[length].append(100 * np.isnan(rates).mean())
                ratios = harness.median_and_quartiles(np.divide(rates, best))
                row[f"read / best, {length}"] = ratios
                row[f"none, {length}"] = f"{none[length][-1]:.0f}%"
                regret = rules.regret_of(cell, rates, otherwise=USUAL[optimizer])
                row[f"regret, {length}"] = number(regret)
                kept[f"{cell.task} {optimizer}, {length}"] = rates
            rows.append(row)
    harness.report(
        args,
        "range_test_tasks",
        "What the default reads off a test, over the best of 21 peaks: median and "
        "quartiles; tests without a reading; mean regret of one cycle at what is read",
        rows,
        {"rates": kept},
        "On which tasks does the default miss?",
        "tests of " + ", ".join(kinds),
        "as `peaks_and_probes`",
        f"tests without a reading: {harness.mean_and_std(*none.values())} % of a task",
        "as `range_test_quality`",
    )


def main() -> None:
    args = harness.parse_args(__doc__)
    draws = 100 if args.smoke else 2000
    parts = parts_of(rules.load(args.out))
    found = {
        "best constant": of_constant(parts, best_constants(parts), draws),
        "usual constant": of_constant(parts, USUAL, draws),
        "whole grid, 4 seeds": of_grid(parts, draws),
    }
    readers = [*rules.rules_that_read()]
    for name, rule in readers[:1] if args.smoke else readers:
        found |= dict(of_rule(name, rule, parts, draws))
    rows = [row_of(name, row) for name, row in found.items()]
    default = found["default"]["parts"]
    told = [f"{o} {show(default[o, 'report'])}" for o in OPTIMIZERS]
    evidence = {
        name: row | {"parts": {": ".join(p): v for p, v in row["parts"].items()}}
        for name, row in found.items()
    }
    sizes = ", ".join(f"{len(cells)} {' '.join(p)}" for p, cells in parts.items())
    harness.report(
        args,
        "range_test_quality",
        "Held-out loss of one cycle at the chosen peak over that at the best of 21: "
        "geometric mean over tasks (5 to 95 %), median, worst (5 %). No rate counts "
        "as the usual constant",
        rows,
        {"rules": evidence},
        "Which reading of which probe is a good peak for one cycle?",
        f"{len(found)} rules on tasks: {sizes}",
        "as `peaks_and_probes`",
        "default on tasks that report: " + "; ".join(told),
        "see the file",
    )
    report_tasks(args, {k: v[:1] for k, v in parts.items()} if args.smoke else parts)


if __name__ == "__main__":
    main()
