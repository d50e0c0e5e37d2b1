"""Which peak does a rule take, given what probes saw? Shared by what judges rules.

The rules of fast.ai are transcribed from its ``callback.schedule``, with its ladder,
smoothing and trimming.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import harness
import numpy as np
from peaks_and_probes import MINI_PEAKS

import optax_superconv as osc

METHODS = ("knee", "halfway", "steepest", "minimum", "middle", "divergence")


class Cell(NamedTuple):
    """A task with an optimizer, as ``peaks_and_probes`` measured it."""

    task: str
    optimizer: str
    chooses: bool
    steps: int
    peaks: np.ndarray  # (n,)
    losses: np.ndarray  # (n, seeds), held-out
    untrained: np.ndarray  # (seeds,)
    probes: list[dict[str, Any]]  # of each probing seed


def as_result(losses, low: float, diverged: bool, optimizer=None) -> Any:
    """The range test of which losses are kept, NaN after their end."""
    rates = np.geomspace(low, 10.0, len(losses))
    known = np.flatnonzero(np.isfinite(losses))
    n = int(known[-1]) + 1 if known.size else 0
    losses = np.asarray(losses[:n], np.float64)
    weights = 0.98 ** np.arange(n)
    averages = np.convolve(losses, weights)[:n] / np.cumsum(weights)
    return osc.RangeTestResult(
        rates[:n], losses, averages, diverged, optimizer=optimizer
    )


def arrays_of(record: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Peaks, losses, and those of the untrained network."""
    return tuple(np.asarray(record[n]) for n in ("peaks", "losses", "untrained"))  # pyright: ignore[reportReturnType]  # Three.


def load(folder: pathlib.Path) -> list[Cell]:
    """What ``peaks_and_probes`` stored there, or else what is in the repository."""
    if not (folder / "peaks_and_probes.json").exists():
        folder = harness.RESULTS
    record = json.loads((folder / "peaks_and_probes.json").read_text())["evidence"]
    with np.load(folder / "peaks_and_probes.npz") as stored:
        curves = dict(stored)
    cells = []
    for key, found in record["tasks"].items():
        task, optimizer = key.split()
        probes = found["probes"]
        for kind, low in (("curves", 1e-6), ("fastai", 1e-7), ("slow", 1e-6)):
            for k, probe in enumerate(probes):
                probe[kind] = [
                    as_result(losses, low, diverged, optimizer)
                    for losses, diverged in zip(
                        curves[f"{key} {kind}"][k],
                        probe[kind]["diverged"],
                        strict=True,
                    )
                ]
        peaks, losses, untrained = arrays_of(found)
        cells.append(
            Cell(
                task,
                optimizer,
                found["chooses"],
                found["steps"],
                peaks,
                losses,
                untrained,
                probes,
            )
        )
    return cells


# --- what others read off a range test ------------------------------------------------


def fastai_curve(result, num_steps=100) -> tuple[np.ndarray, np.ndarray]:
    """Rates and losses as fast.ai's rules see them: up to 4 times the best, trimmed."""
    losses = result.smoothed_losses
    over = ~(losses <= 4 * np.fmin.accumulate(losses))
    count = int(np.argmax(over)) + 1 if over.any() else len(losses)
    part = slice(num_steps // 10, max(count - 5, 0))
    return result.learning_rates[part], losses[part]


def fastai_valley(result, num_steps: int = 100) -> float:
    """Half-way along the longest run of falling losses, gaps allowed."""
    rates, losses = fastai_curve(result, num_steps)
    longest = np.ones(len(losses), int)
    for i in range(1, len(losses)):
        lower = longest[:i][losses[i] < losses[:i]]
        longest[i] = 1 + (lower.max() if lower.size else 0)
    end = int(longest.argmax())
    start = end - int(longest[end])
    third = (end - start) / 3
    return rates[start + int(third) + int(third / 2)]


def fastai_slide(result, num_steps: int = 100) -> float:
    """Leftwards from the end, to where the slope changes by less than 0.005."""
    rates, losses = fastai_curve(result, num_steps)
    slopes, right, found = np.gradient(losses), -1, rates[-16]
    while right - 15 >= -len(losses) and (
        abs(slopes[right] - slopes[right - 15]) > 0.005
    ):
        found = rates[right - 15]
        right -= 1
    return found


def fastai_minimum(result, num_steps: int = 100) -> float:
    rates, losses = fastai_curve(result, num_steps)
    return rates[losses.argmin()] / 10


def fastai_steep(result, num_steps: int = 100) -> float:
    rates, losses = fastai_curve(result, num_steps)
    return rates[np.argmin(np.diff(losses) / np.diff(np.log(rates)))]


FASTAI = {
    "fastai.valley": fastai_valley,
    "fastai.slide": fastai_slide,
    "fastai.minimum": fastai_minimum,
    "fastai.steep": fastai_steep,
}

# --- rules ----------------------------------------------------------------------------


class Rule(NamedTuple):
    """``read`` gives the rates of repeats of a probe, NaN where it finds none."""

    read: Callable[[Cell, dict[str, Any]], Sequence[float]]
    steps: Callable[[Cell, dict[str, Any]], float]


def read_or_nan(rule: Callable[..., float], result) -> float:
    try:
        return float(rule(result))
    except (ValueError, IndexError):
        return np.nan


def of_curves(rule: Callable[..., float], kind: str = "curves", size: int = 1) -> Rule:
    """Medians of the readings of every ``size`` range tests that follow each other."""

    def read(cell, probe) -> list[float]:
        found = np.array([read_or_nan(rule, curve) for curve in probe[kind]])
        starts = range(1 if size == len(found) else len(found))
        parts = [np.take(found, range(k, k + size), mode="wrap") for k in starts]
        held = [part[np.isfinite(part)] for part in parts]
        return [float(np.median(part)) if part.size else np.nan for part in held]

    def steps(cell, probe) -> float:
        return size * float(np.mean([len(curve.losses) for curve in probe[kind]]))

    return Rule(read, steps)


def lowest_mini(part: int) -> Rule:
    """The peak of the short one cycles with the lowest loss on its training examples.

    That of the parabola through it and its neighbours, at most half a spacing away.
    """
    column = {20: 0, 40: 1}[part]

    def read(cell, probe) -> list[float]:
        losses = np.array(probe["minis"][column], float)
        losses = np.where(np.isfinite(losses), losses, np.inf)
        x, best = np.log(MINI_PEAKS[cell.optimizer]), int(losses.argmin())
        if best in (0, len(x) - 1):
            return [float(np.exp(x[best]))]
        y = np.log(np.maximum(losses[best - 1 : best + 2], 1e-30))
        bend = y[0] - 2 * y[1] + y[2]
        if not np.isfinite(bend) or bend <= 0:
            return [float(np.exp(x[best]))]
        shift = np.clip(0.5 * (y[0] - y[2]) / bend, -0.5, 0.5)
        return [float(np.exp(x[best] + shift * (x[1] - x[0])))]

    return Rule(read, lambda cell, probe: 8 * (cell.steps // part))


def threshold_of(probe) -> float:
    return probe["threshold"]["rate"] or np.nan


def half_threshold() -> Rule:
    return Rule(
        lambda cell, probe: [threshold_of(probe) / 2],
        lambda cell, probe: probe["threshold"]["steps"],
    )


def half_threshold_below_curvature() -> Rule:
    def read(cell, probe) -> list[float]:
        return [min(threshold_of(probe) / 2, probe["curvature"] or np.nan)]

    return Rule(read, lambda cell, probe: probe["threshold"]["steps"] + 40)


def suggested(method: str) -> Callable[..., float]:
    return functools.partial(osc.suggest_learning_rate, method=method)  # pyright: ignore[reportArgumentType]  # One of METHODS.


def rules_that_read() -> Iterator[tuple[str, Rule]]:
    yield "default", of_curves(osc.suggest_learning_rate, "slow")  # As it is advised.
    for method in METHODS:
        yield f"{method}, 200 steps", of_curves(suggested(method), "slow")
        for size in (1, 3, 5):
            name = method + f", median of {size}" * (size > 1)
            yield name, of_curves(suggested(method), size=size)
    for name, rule in FASTAI.items():
        longer = functools.partial(rule, num_steps=200)
        yield f"{name}, 200 steps", of_curves(longer, "slow")
        for size in (1, 3):
            label = name + f", median of {size}" * (size > 1)
            yield label, of_curves(rule, "fastai", size)
    yield "threshold / 2", half_threshold()
    yield "min(threshold / 2, curvature)", half_threshold_below_curvature()
    for part in (20, 40):
        yield f"8 one cycles of T/{part}", lowest_mini(part)


# --- regret ---------------------------------------------------------------------------


def regret(cell: Cell, rate: float) -> float:
    """The loss at a rate over that at the best of the grid.

    Both are means over the seeds, interpolated in the logs. NaN counts as the untrained
    network, as do rates a thousand times below the grid or ten times above.
    """
    means = cell.losses.mean(axis=1)
    untrained = np.log(cell.untrained.mean() / means.min())
    if not np.isfinite(rate) or rate <= 0:
        return float(np.exp(untrained))
    x = np.log([cell.peaks[0] / 1e3, *cell.peaks, cell.peaks[-1] * 10])
    y = [untrained, *np.log(means / means.min()), untrained]
    return float(np.exp(np.interp(np.log(rate), x, y)))


def regret_of(
    cell: Cell, rates: Sequence[float], factor: float = 1.0, otherwise: float = np.nan
) -> float:
    """Mean over what was read off all probes of a task; ``otherwise`` for no rate."""
    taken = [factor * rate if np.isfinite(rate) else otherwise for rate in rates]
    return float(np.mean([regret(cell, rate) for rate in taken]))


def geometric_mean(values: Any) -> float:
    return float(np.exp(np.mean(np.log(values))))


def fitted_factor(
    cells: Sequence[Cell],
    rates: Sequence[Sequence[float]],
    otherwise: float = np.nan,
) -> float:
    """To rates read off each cell: that with the least geometric mean of regrets."""

    def score(exponent: float) -> float:
        pairs = zip(cells, rates, strict=True)
        found = [regret_of(c, r, 10**exponent, otherwise) for c, r in pairs]
        return geometric_mean(found)

    return float(10 ** min(np.arange(-50, 21) / 10, key=score))
