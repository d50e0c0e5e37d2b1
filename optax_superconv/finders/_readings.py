"""What does a method read off the curve of a range test?

A suggestion is a point of the curve. It is read from a smoothing without lag, not from
the running average that decides when to stop: that one trails the loss by decades of
the rate.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from optax_superconv import _checks
from optax_superconv.finders import _runs
from optax_superconv.finders._range_test import RangeTestResult

Method = Literal["knee", "halfway", "steepest", "minimum", "middle", "divergence"]

# Standard deviation, in decades of the rate, of the kernel that smooths a curve for the
# knee, and how much of the fall is done there. Of the pairs whose spread stays below
# 1.9 in each of 8 families of 200 curves with noise of 0.2 on a fall of 1.8, the one
# with the least regret of one cycle on five small tasks: three networks on digits, sums
# in words, diabetes. It is wide on purpose: an explosion close to the fall
# draws the knee down, where kernels that follow the losses closely ended too high.
_WIDE = 0.8
_KNEE = 0.9
_MIN_POINTS = 10


class Curve(NamedTuple):
    """A range test's losses without noise and without lag."""

    log_rates: np.ndarray  # (n,), decades
    values: np.ndarray  # (n,)
    slopes: np.ndarray  # (n,), per decade
    errors: np.ndarray  # (n,), standard errors of the values
    losses: np.ndarray  # (n,), as they were
    start: float  # level of the first losses
    noise: float  # standard deviation of a loss
    steady: np.ndarray  # (n,), the values without losses that stand alone


def _climb(losses: np.ndarray, start: float, noise: float, after: int) -> int | None:
    """Where the losses leave their noise above the start, from ``after`` on."""
    level = start + max(0.25 * (start - losses.min()), 6 * noise)
    above = np.flatnonzero(losses[after:] > level)
    return after + int(above[0]) if above.size else None


def smooth_curve(result: RangeTestResult, *, bandwidth: float | None = None) -> Curve:
    """Local linear regression of the finite losses on the log of the rate.

    Centred, so without lag; linear, so without bias where the curve begins and ends;
    and with losses capped above the start by a quarter of the fall. Without a
    ``bandwidth``, it is as wide as the noise asks for, and the curve ends where the
    losses climb above their start, so that an explosion does not reach back.
    """
    held_out = result.eval_losses
    all_losses = result.losses if held_out is None else held_out
    bad = np.flatnonzero(~np.isfinite(all_losses))
    n = int(bad[0]) if bad.size else len(all_losses)
    if n < _MIN_POINTS:
        last = float(result.learning_rates[max(n - 1, 0)])
        remedy = "run the range test with more `num_steps`"
        if result.diverged or bad.size:
            # No rate is at fault for what ends at the lowest that anyone tries.
            remedy = (
                "look for what is not the rate's fault: a number that rounds to another"
                " in low precision, a loss scale, a bad batch"
                if last < 1e-5
                else "run the range test with a lower `min_learning_rate`"
            )
        raise ValueError(
            f"`result` must be a curve of at least {_MIN_POINTS} finite losses, got one"
            f" of {n}, the last at a rate of {last:.2g}: {remedy}."
        )
    losses = np.asarray(all_losses[:n], np.float64)
    log_rates = np.log10(np.asarray(result.learning_rates[:n], np.float64))
    start = float(np.median(losses[: max(3, n // 10)]))
    fall = max(start - losses.min(), 0.0)
    capped = np.minimum(losses, start + 0.25 * fall)
    noise = _runs.noise(capped)

    spacing = float(np.median(np.diff(log_rates)))
    if bandwidth is None:
        # The optimal width goes with the noise to the power 2/5 and with the density of
        # the points to the power -1/5; 0.5 is right for a tenth of noise, 12 a decade.
        relative = min(10 * noise / fall, 1.0) if fall else 1.0
        bandwidth = max(float(0.5 * relative**0.4 * (12 * spacing) ** 0.2), 0.12)
        end = _climb(losses, start, noise, int(losses.argmin()))
        end = max(end or n, _MIN_POINTS)
        log_rates, capped = log_rates[:end], capped[:end]
    distance = log_rates - log_rates[:, None]
    kernel = np.exp(-0.5 * (distance / max(bandwidth, 1.5 * spacing)) ** 2)
    s0, s1, s2 = ((kernel * distance**k).sum(axis=1, keepdims=True) for k in range(3))
    determinant = s0 * s2 - s1**2
    to_values = kernel * (s2 - s1 * distance) / determinant
    to_slopes = kernel * (s0 * distance - s1) / determinant
    ends = np.pad(capped, 1, mode="edge")
    middle = np.median([ends[:-2], ends[1:-1], ends[2:]], axis=0)
    return Curve(
        log_rates,
        to_values @ capped,
        to_slopes @ capped,
        noise * np.sqrt((to_values**2).sum(axis=1)),
        losses,
        start,
        noise,
        to_values @ middle,
    )


def _fall_of(curve: Curve) -> tuple[int, int]:
    """Where the fall to the lowest point begins and ends."""
    lowest = int(curve.values.argmin())
    return int(curve.values[: lowest + 1].argmax()), lowest


def _check_fall(result: RangeTestResult, curve: Curve) -> None:
    """Raises unless the curve falls by more than noise makes it fall."""
    highest, lowest = _fall_of(curve)
    doubt = 5 * np.hypot(curve.errors[highest], curve.errors[lowest])
    doubt = max(doubt, 1e-6 * np.abs(curve.values).max())
    falls = [x[highest] - x[lowest] for x in (curve.values, curve.steady)]
    if not min(falls) > doubt:
        why = _why(result, curve, doubt)
        raise ValueError(f"`result` must be a curve with a fall in it, got {why}.")


def _why(result: RangeTestResult, curve: Curve, doubt: float) -> str:
    """What a curve without a fall is, and what to do."""
    rises = np.flatnonzero(curve.steady > curve.steady[0] + doubt)
    if not rises.size and not result.diverged:
        return (
            "one that is flat up to the highest rate: run the range test with a higher "
            "`max_learning_rate`"
        )
    if rises.size and rises[0] <= max(3, len(curve.losses) // 10):
        return (
            "one that rises from the start: run the range test with a lower "
            "`min_learning_rate`"
        )
    return (
        "one that is flat until it diverges, a plateau at the start or noise: run the "
        "range test with more `num_steps`, or compare short runs by `grid_test` with "
        "mode='constant'"
    )


def _curve_for(result: RangeTestResult, method: Method | None) -> Curve:
    """The smoothing that a method reads."""
    return smooth_curve(result, bandwidth=_WIDE if method == "knee" else None)


def reading(result: RangeTestResult, method: Method | None) -> tuple[Curve, float]:
    """The smoothing that a method reads, and what it suggests: NaN if nothing."""
    curve = _curve_for(result, method)
    if method is None:
        return curve, np.nan
    try:
        return curve, _read(result, curve, method)
    except ValueError:
        return curve, np.nan


def suggest(result: RangeTestResult, method: Method) -> float:
    """What one curve suggests."""
    return _read(result, _curve_for(result, method), method)


def _read(result: RangeTestResult, curve: Curve, method: Method) -> float:
    """What a method suggests from the smoothing that it reads."""
    log_rates, values = curve.log_rates, curve.values
    lowest = int(values.argmin())
    if method == "middle":
        _check_fall(result, curve)
        climb = _climb(curve.losses, curve.start, curve.noise, lowest)
        if climb is not None or result.diverged:
            low = _read(result, curve, "minimum")
            return math.sqrt(low * _read(result, curve, "divergence"))
        # Batch norms, for instance, keep a loss from exploding. On the plateau that
        # they leave, noise says where it is lowest; so it counts from its beginning,
        # and up to where half of the fall is lost again.
        doubt = 3 * np.hypot(curve.errors, curve.errors[lowest])
        first = int(np.argmax(values <= values[lowest] + doubt))
        if first >= 0.95 * len(values):  # It still falls.
            return _read(result, curve, "divergence")  # Says so.
        half = values[[*_fall_of(curve)]].mean()
        lost = np.flatnonzero(values[lowest:] > half)
        last = lowest + int(lost[0]) - 1 if lost.size else len(values) - 1
        return float(10 ** ((log_rates[first] - 1 + log_rates[last]) / 2))
    if method == "divergence":
        # Not from the smoothing, which sees a jump late.
        climb = _climb(curve.losses, curve.start, curve.noise, lowest)
        _checks.require(
            climb is not None or result.diverged,
            "result",
            "a range test that diverged (run it with a higher `max_learning_rate`)",
            f"one that reached {result.learning_rates[-1]:.3g} without diverging",
        )
        last = (len(curve.losses) if climb is None else climb) - 1
        _checks.require(
            last >= len(curve.losses) // 10,
            "result",
            "a range test that starts below divergence (run it with a lower "
            "`min_learning_rate`)",
            "one that rises from the start",
        )
        return float(result.learning_rates[last])

    # A wide kernel levels a fall that begins late, so another one says whether it is.
    _check_fall(result, smooth_curve(result) if method == "knee" else curve)
    highest, lowest = _fall_of(curve)
    fall = values[highest] - values[lowest]
    if method == "minimum":
        return float(10 ** log_rates[lowest] / 10)
    falling = slice(highest, lowest + 1)
    if method == "steepest":
        return float(10 ** log_rates[falling][curve.slopes[falling].argmin()])
    level = values[highest] - (_KNEE if method == "knee" else 0.5) * fall
    last = highest + int(np.flatnonzero(values[falling] >= level)[-1])
    pair = [last + 1, last]  # np.interp wants rising values.
    return float(10 ** np.interp(level, values[pair], log_rates[pair]))
