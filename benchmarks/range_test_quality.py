"""Which peak for one cycle: by which rule, at what cost, and how far off the best?

Judges rules by what ``peaks_and_probes`` measured, so nothing is trained here. The
regret of a rate is the held-out loss of one cycle at this peak over that at the best of
17. Constants (the best constant rate, the factors that rules are multiplied by) and the
default of ``suggest_learning_rate`` come from the half of the tasks that chooses; the
other half reports. Where a rule finds no rate, that counts as the untrained network.

    python benchmarks/range_test_quality.py [--smoke] [--out FOLDER]

About two minutes. The probes' steps are not deducted from the runs.
"""

from collections.abc import Sequence
from typing import Any

import harness
import numpy as np
import rules
from rules import Cell, Rule

OPTIMIZERS = ("adamw", "sgd")


def bootstrap(values: Sequence[float], draws: int) -> dict[str, Any]:
    """Geometric mean and worst of the tasks, with 5 to 95 % over draws of tasks."""
    array = np.asarray(values)
    picked = np.random.default_rng(0).integers(len(array), size=(draws, len(array)))
    means = np.exp(np.log(array)[picked].mean(axis=1))
    worst = array[picked].max(axis=1)
    return {
        "mean": rules.geometric_mean(array),
        "mean_interval": np.percentile(means, [5, 95]),
        "worst": array.max(),
        "worst_interval": np.percentile(worst, [5, 95]),
    }


def show(found: dict[str, Any]) -> str:
    def one(value) -> str:
        return f"{value:.2f}" if value < 99.5 else f"{value:.0f}"

    low, high = map(one, found["mean_interval"])
    least = one(found["worst_interval"][0])
    return f"{one(found['mean'])} ({low} to {high}), {one(found['worst'])} ({least})"


def judge(
    cells: Sequence[Cell], rates: Sequence[Sequence[float]], factor: float, draws: int
) -> dict[str, Any]:
    """Of one optimizer and half."""
    each = {
        cell.task: rules.regret_of(cell, found, factor)
        for cell, found in zip(cells, rates, strict=True)
    }
    found = bootstrap([*each.values()], draws)
    return found | {"tasks": each, "rates": {c.task: r for c, r in zip(cells, rates)}}  # noqa: B905


def all_but_one(cells: Sequence[Cell], draws: int) -> dict[str, Any]:
    """The whole grid: its best on all seeds but one, judged on that one, in turn."""
    each = {}
    for cell in cells:
        seeds = range(cell.losses.shape[1])
        picked = [np.delete(cell.losses, k, axis=1).mean(1).argmin() for k in seeds]
        judged = np.mean([cell.losses[p, k] for k, p in enumerate(picked)])
        each[cell.task] = float(judged / cell.losses.mean(1).min())
    return bootstrap([*each.values()], draws) | {"tasks": each}


def halves(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    return {
        f"{optimizer}: {half}": [
            cell
            for cell in cells
            if cell.optimizer == optimizer and cell.chooses == (half == "chose")
        ]
        for optimizer in OPTIMIZERS
        for half in ("chose", "report")
    }


def rows_of(
    name: str, rule: Rule, parts: dict[str, list[Cell]], draws: int
) -> dict[str, dict[str, Any]]:
    """A rule as it is, and with factors that the choosing half fits."""
    rates = {
        part: [[r for probe in c.probes for r in rule.read(c, probe)] for c in cells]
        for part, cells in parts.items()
    }
    factors = {
        optimizer: rules.fitted_factor(
            parts[f"{optimizer}: chose"], rates[f"{optimizer}: chose"]
        )
        for optimizer in OPTIMIZERS
    }
    pairs = [
        (c, probe) for cells in parts.values() for c in cells for probe in c.probes
    ]
    steps = [rule.steps(*pair) for pair in pairs]
    found = [rate for part in rates.values() for each in part for rate in each]
    common = {
        "steps": float(np.mean(steps)),
        "share": float(
            np.mean([s / c.steps for s, (c, _) in zip(steps, pairs, strict=True)])
        ),
        "none": int(np.sum(~np.isfinite(found))),
        "of": len(found),
    }
    rows = {}
    for label, by in (
        (name, dict.fromkeys(OPTIMIZERS, 1.0)),
        (f"{name}, fitted", factors),
    ):
        rows[label] = (
            common
            | {"factors": by}
            | {
                part: judge(cells, rates[part], by[part.split(":")[0]], draws)
                for part, cells in parts.items()
            }
        )
    return rows


def constant_rows(parts: dict[str, list[Cell]], draws: int) -> dict[str, Any]:
    """What asks for no probe, and what asks for the whole grid."""
    best = {
        optimizer: rules.fitted_factor(
            cells := parts[f"{optimizer}: chose"], [[1.0]] * len(cells)
        )
        for optimizer in OPTIMIZERS
    }
    rows = {}
    for label, by in (
        ("best constant", best),
        ("1e-3 / 0.1", {"adamw": 1e-3, "sgd": 0.1}),
    ):
        rows[label] = {"steps": 0, "share": 0, "none": 0, "of": 1, "factors": by} | {
            part: judge(cells, [[1.0]] * len(cells), by[part.split(":")[0]], draws)
            for part, cells in parts.items()
        }
    lengths = [17 * 4 * cell.steps for cells in parts.values() for cell in cells]
    rows["the whole grid, 4 seeds"] = {
        "steps": float(np.mean(lengths)),
        "share": 68,
        "none": 0,
        "of": 1,
        "factors": {},
    } | {part: all_but_one(cells, draws) for part, cells in parts.items()}
    return rows


def main() -> None:
    args = harness.parse_args(__doc__)
    draws = 100 if args.smoke else 2000
    cells = rules.load()
    parts = halves(cells)
    found = constant_rows(parts, draws)
    readers = [*rules.rules_that_read()]
    for name, rule in readers[:1] if args.smoke else readers:
        found |= rows_of(name, rule, parts, draws)
    rows = []
    for name, row in found.items():
        by = " / ".join(f"{row['factors'].get(o, 1):.2g}" for o in OPTIMIZERS)
        rows.append(
            {
                "rule": name,
                "times": by,
                "steps": f"{row['steps']:.0f}",
                "of a run": f"{row['share']:.2f}",
                "none": f"{row['none']} of {row['of']}",
            }
            | {part: show(row[part]) for part in parts}
        )
    told = [
        f"{part} {show(found['default'][part])}"
        for part in parts
        if "default" in found and "report" in part
    ]
    harness.report(
        args,
        "range_test_quality",
        "Held-out loss of one cycle at the chosen peak over that at the best of 17: "
        "geometric mean over tasks (5 to 95 %), worst task (5 %)",
        rows,
        {"rules": found},
        "Which reading of which probe is a good peak for one cycle?",
        f"{len(found)} rules, {len(cells)} tasks x optimizers",
        "as `peaks_and_probes`",
        "; ".join(told) or "-",
        "see the file",
    )


if __name__ == "__main__":
    main()
