"""What do a range test and short cycles say of the peak, and of the weight decay?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from optax_superconv import _checks
from optax_superconv.finders import _auto_results, _members, _runs
from optax_superconv.finders._auto_results import ShortCycles
from optax_superconv.finders._range_test import RangeTestResult, range_test
from optax_superconv.finders._steps import RATE, Form, Optimizer
from optax_superconv.finders._suggestions import suggest_learning_rate
from optax_superconv.schedules._onecycle import onecycle

DECAY = "weight_decay"
MOMENTUM: dict[Optimizer, str] = {"adamw": "b1", "sgd": "momentum"}

# The best constant peaks on the tasks of benchmarks/range_test_quality.py that were
# there to choose.
USUAL: dict[Optimizer, float] = {"adamw": 0.016, "sgd": 0.16}

# Three short cycles of such a part of the run are spared from the range test: SGD makes
# them always, AdamW where the test suggests nothing.
PARTS: dict[Optimizer, int] = {"adamw": 40, "sgd": 20}
RANGE_STEPS, LEAST_RANGE_STEPS, LEAST_CYCLE_STEPS = 200, 20, 10
BESIDE_CYCLES = 50  # Fewer do not make a range test that others follow.

# Of what a range test suggests. A run with AdamW that decays as much as below does best
# above the knee, and forgives a peak that is too high.
FACTOR = 3.0

# Peak x weight decay x steps. If it is k, a run shrinks its weights by exp(-k / 2), or
# with SGD, whose momentum repeats its coupled decay, by ten times that exponent. A
# strong decay keeps weights down where the peak is too low, so a peak that was not
# measured gets the weaker one. Nor may a run forget faster than it learns.
KAPPAS: dict[Optimizer, float] = {"adamw": 5.0, "sgd": 0.1}
WEAK_KAPPAS: dict[Optimizer, float] = {"adamw": 1.0, "sgd": 0.1}
STEPS_TO_FORGET = 400


class Asked(NamedTuple):
    """What is to be trained, and on what."""

    form: Form
    state: Any
    source: Iterator[Any]
    total_steps: int
    optimizer: Optimizer
    has_decay: bool  # whether the state has a dial for it, which is not 0
    progress: bool
    calls: list[int]  # of the step, in one place

    def used(self) -> int:
        """Training steps until now, those that were made twice included."""
        return -(-self.calls[0] // self.form.accumulation_steps)


def decay_for(
    peak: Any, total_steps: int, optimizer: Optimizer, kappas: dict[Optimizer, float]
) -> Any:
    """The decay that makes that product, or the most that does not forget too soon."""
    most = (0.1 if optimizer == "sgd" else 1.0) / STEPS_TO_FORGET
    return min(kappas[optimizer] / total_steps, most) / peak


class Found(NamedTuple):
    """A peak, and how it came about."""

    peak: float
    kappas: dict[Optimizer, float]
    range_test: RangeTestResult | None
    short_cycles: ShortCycles | None
    reasons: tuple[str, ...]


def counted(form: Form, calls: list[int]) -> Form:
    """The form, whose step counts."""

    def step(*args: Any) -> Any:
        calls[0] += 1
        return form.step(*args)

    return form._replace(step=step)


def _range_test(asked: Asked, num_steps: int) -> RangeTestResult:
    return range_test(
        lambda state, batch: asked.form.step(state, {}, batch),
        asked.state,
        asked.source,
        num_steps=num_steps,
        accumulation_steps=asked.form.accumulation_steps,
        progress=asked.progress,
    )


def _short_cycles(asked: Asked, peaks: np.ndarray, num_steps: int) -> ShortCycles:
    """A one cycle at each peak, side by side."""
    count, size = np.arange(num_steps), len(peaks)
    rate, momentum = (np.asarray(path(count)) for path in onecycle(1.0, num_steps))
    values = {
        RATE: np.float32(np.outer(peaks, rate)),
        MOMENTUM[asked.optimizer]: np.broadcast_to(momentum, (size, num_steps)),
    }
    if asked.has_decay:
        decays = decay_for(peaks, asked.total_steps, asked.optimizer, WEAK_KAPPAS)
        values[DECAY] = np.float32(decays)
    members = _members.one_by_one(asked.form, asked.state, values)
    title, form, source = "short cycles", asked.form, asked.source
    losses = _members.train(
        title, num_steps, source, form, size, members, asked.progress
    )
    ends = losses[:, num_steps // 2 :].mean(axis=1)
    scores = np.where(np.isfinite(losses).all(axis=1), ends, np.inf)
    return ShortCycles(np.asarray(peaks, np.float32), losses, scores)


def _check_learns(is_met: Any, test: RangeTestResult, cycles: ShortCycles) -> None:
    """Raises, with what was seen."""
    _checks.require(
        bool(is_met),
        "step_fn",
        "a step that lowers the loss at some rate, within the steps of the probes "
        "(a larger `budget` has more)",
        f"({_auto_results.told_of(test)} {_auto_results.told_of_cycles(cycles)})",
    )


def _learns(test: RangeTestResult, cycles: ShortCycles, usual: float) -> bool:
    """Whether a short cycle lowers the loss; raises if none, and the usual rate harms.

    On a plateau, nothing is seen of either.
    """
    first = test.losses[: max(3, len(test.losses) // 10)]
    last = cycles.losses.shape[1] - cycles.losses.shape[1] // 2
    doubt = 3 * _runs.noise(test.losses) * math.sqrt(1 / len(first) + 1 / last)
    falls = float(np.median(first)) - cycles.scores
    nearest = np.abs(np.log(cycles.peak_learning_rates / usual)).argmin()
    learns = bool(falls.max() > doubt)
    _check_learns(learns or -falls[nearest] < doubt, test, cycles)
    return learns


def _ceiling(test: RangeTestResult) -> float:
    """The rate at which divergence was seen."""
    return float(test.learning_rates[-1]) if test.diverged else math.inf


def _usually(
    asked: Asked,
    allowed: int,
    test: RangeTestResult,
    cycles: ShortCycles | None,
    reasons: list[str],
    more: str,
) -> Found:
    """The usual peak, with a warning; raises if it diverged."""
    peak = USUAL[asked.optimizer]
    _checks.require(
        peak < _ceiling(test),
        "budget",
        "large enough for probes that tell a rate, where the usual one, "
        f"{peak}, diverges",
        f"one that was used up ({_auto_results.told_of(test)})",
    )
    warnings.warn(
        f"`budget` leaves {allowed} steps to the probes. {' '.join(reasons)} So the "
        f"peak is a usual one. {more}",
        stacklevel=5,
    )
    reasons = [*reasons, _auto_results.USUALLY]
    return Found(peak, WEAK_KAPPAS, test, cycles, tuple(reasons))


def _spared(asked: Asked) -> int:
    """Steps for short cycles."""
    part = max(LEAST_CYCLE_STEPS, asked.total_steps // PARTS[asked.optimizer])
    return 3 * part + 1  # The first step is made twice, to see that the rate acts.


def _from_cycles(
    asked: Asked,
    allowed: int,
    test: RangeTestResult,
    suggested: float | None,
    reasons: list[str],
) -> Found:
    """What short cycles tell after a range test, or that no step is left for them."""
    kind, left = asked.optimizer, allowed - asked.used() - 1
    longest = max(LEAST_CYCLE_STEPS, asked.total_steps // 20)
    size, step = min(5, max(3, left // longest)), 1.0
    if suggested is not None:
        size, step = (5, 0.25) if size == 5 else (3, 0.5)
    num_steps = min(left // size, longest)
    if num_steps < LEAST_CYCLE_STEPS:
        enough = BESIDE_CYCLES + _spared(asked)
        enough = math.ceil(100 * enough / asked.total_steps) / 100
        more = f"A `budget` of {enough:.2f} would pay for short cycles."
        return _usually(asked, allowed, test, None, reasons, more)
    decades = step * (np.arange(size) - (size - 1) / 2)
    top = (suggested or USUAL[kind]) * 10.0 ** decades[-1]
    if suggested is None:
        top = min(top, _ceiling(test))
    cycles = _short_cycles(asked, top * 10.0 ** (decades - decades[-1]), num_steps)
    reasons.append(_auto_results.told_of_cycles(cycles))
    if suggested is not None:
        _check_learns(np.isfinite(cycles.scores).any(), test, cycles)
    elif not _learns(test, cycles, USUAL[kind]):
        reasons.append(_auto_results.PLATEAU)
        more = "A larger `budget` may see more."
        return _usually(asked, allowed, test, cycles, reasons, more)
    reasons.append(_auto_results.SHORT)
    peak = float(cycles.peak_learning_rates[cycles.scores.argmin()])
    return Found(peak, WEAK_KAPPAS, test, cycles, tuple(reasons))


def probed(asked: Asked, allowed: int) -> Found:
    """What so many steps tell; the usual peak if there are none."""
    kind = asked.optimizer
    if not allowed:
        return Found(USUAL[kind], WEAK_KAPPAS, None, None, (_auto_results.USUALLY,))
    spared = _spared(asked)
    if allowed - spared < BESIDE_CYCLES:
        spared = 0
    test = _range_test(asked, min(RANGE_STEPS, allowed - spared - 1))
    reasons = [_auto_results.told_of(test)]
    suggested = None
    try:
        suggested = suggest_learning_rate(test, optimizer=kind)
        reasons.append(
            f"It suggests {suggested:.3g}, on a smoothed curve by "
            f"{_auto_results.METHODS[kind]}."
        )
    except ValueError:
        reasons.append(_auto_results.NO_RATE)
    left = allowed - asked.used() - 1
    if suggested is not None and (kind == "adamw" or left < _spared(asked) - 1):
        raised = kind == "adamw" and asked.has_decay
        raised &= FACTOR * suggested < _ceiling(test)
        peak = FACTOR * suggested if raised else suggested
        reasons += [*[_auto_results.RAISED] * raised, _auto_results.sure_of(test)]
        return Found(peak, KAPPAS, test, None, tuple(reasons))
    return _from_cycles(asked, allowed, test, suggested, reasons)
