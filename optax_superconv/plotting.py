"""What do the dials and the range test look like?

Needs matplotlib (``pip install 'optax-superconv[plot]'``), imported when first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import jax
import numpy as np
import optax

from optax_superconv import _checks
from optax_superconv._range_test import RangeTestResult
from optax_superconv._suggestions import Method, smooth_curve, suggest_learning_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_range_test", "plot_schedule"]

_MAX_POINTS = 2001


def _axes(ax: Axes | None) -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "optax_superconv.plotting needs matplotlib: pip install "
            "'optax-superconv[plot]'."
        ) from error
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax


def plot_schedule(
    schedule_or_mapping: optax.Schedule | Mapping[str, optax.Schedule],
    total_steps: int,
    ax: Axes | None = None,
) -> Axes:
    """Draws one schedule, or several by name, over the steps of a run.

    Each schedule of a mapping has a y-axis of its own, in its own colour, since rates
    and momenta differ by orders of magnitude.

    Args:
      schedule_or_mapping: A schedule, or a mapping from names to schedules.
      total_steps: Steps of the run, at least 1; drawn from 0 to ``total_steps``, at
        most 2,001 of them.
      ax: Where to draw; None is new axes.

    Returns:
      The axes of the first schedule.

    Raises:
      ValueError: If ``total_steps`` is below 1, or the mapping is empty.
      TypeError: If something is no schedule.
      ImportError: If matplotlib is missing.

    Examples:
      >>> import matplotlib
      >>> matplotlib.use("Agg")
      >>> import optax_superconv as osc
      >>> ax = osc.plotting.plot_schedule({
      ...     "learning rate": osc.onecycle_schedule(1.0, 100),
      ...     "momentum": osc.onecycle_momentum_schedule(100)}, total_steps=100)
      >>> print(ax.get_ylabel(), len(ax.figure.axes))
      learning rate 2
    """
    total_steps = _checks.steps("total_steps", total_steps, at_least=1)
    schedules: Mapping[str, Any] = (
        schedule_or_mapping
        if isinstance(schedule_or_mapping, Mapping)
        else {"value": schedule_or_mapping}
    )
    _checks.require(
        len(schedules) > 0, "schedule_or_mapping", "at least one schedule", "none"
    )
    for name, schedule in schedules.items():
        _checks.function(f"schedule_or_mapping[{name!r}]", schedule)

    first = _axes(ax)
    first.set_xlabel("step")
    steps = np.unique(np.linspace(0, total_steps, _MAX_POINTS).astype(np.int32))
    for k, (name, schedule) in enumerate(schedules.items()):
        axes = first if k == 0 else first.twinx()
        if k > 1:
            axes.spines["right"].set_position(("axes", 1 + 0.15 * (k - 1)))
        values = jax.vmap(schedule)(steps)  # Optax's own do not all broadcast.
        color = f"C{k}"
        axes.plot(steps, values, color=color)
        axes.set_ylabel(name, color=color)
    return first


def plot_range_test(
    result: RangeTestResult,
    ax: Axes | None = None,
    *,
    method: Method | None = "valley",
) -> Axes:
    """Draws the losses of a range test over the rate, and a suggestion.

    Args:
      result: Of :func:`optax_superconv.range_test`.
      ax: Where to draw; None is new axes.
      method: Of :func:`optax_superconv.suggest_learning_rate`; None draws none.

    Returns:
      The axes. A curve that holds no suggestion is drawn without one.

    Raises:
      ValueError: For an unknown method.
      TypeError: If ``result`` is no range test's.
      ImportError: If matplotlib is missing.

    Examples:
      >>> import matplotlib
      >>> matplotlib.use("Agg")
      >>> import numpy as np
      >>> import optax_superconv as osc
      >>> rates = np.geomspace(1e-6, 1.0, 61)
      >>> losses = 2 - 1 / (1 + (1e-3 / rates) ** 2)
      >>> result = osc.RangeTestResult(rates, losses, losses, False)
      >>> print(osc.plotting.plot_range_test(result).get_xscale())
      log
    """
    if not isinstance(result, RangeTestResult):
        raise TypeError(
            f"`result` must be a RangeTestResult, got a {type(result).__name__}."
        )
    if method is not None:
        _checks.choice("method", method, get_args(Method))
    ax = _axes(ax)
    ax.plot(result.learning_rates, result.losses, color="0.75", label="loss")
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("loss")
    try:
        curve = smooth_curve(result)
    except ValueError:  # Too few points to smooth: the losses alone are drawn.
        return ax
    ax.plot(10**curve.log_rates, curve.values, color="C0", label="smoothed")
    # An explosion would flatten everything else.
    finite = result.losses[: len(curve.values)]
    low, high = min(finite.min(), curve.values.min()), curve.values.max()
    margin = 0.1 * (high - low)
    if margin > 0:
        ax.set_ylim(low - margin, high + margin)
    if method is not None:
        try:
            rate = suggest_learning_rate(result, method=method)
        except ValueError:  # No suggestion in this curve.
            pass
        else:
            label = f"{method}: {rate:.2g}"
            ax.axvline(rate, color="C1", linestyle="--", label=label)
    ax.legend()
    return ax
