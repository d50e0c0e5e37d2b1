"""Which values do schedules, or the dials of an optimizer, take over a run?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from optax_superconv import _checks
from optax_superconv.plotting._axes import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_schedule(
    schedule_or_mapping: optax.Schedule | Mapping[str, optax.Schedule],
    total_steps: int,
    ax: Axes | None = None,
) -> Axes:
    """Draws one schedule, or several by name, over the steps of a run.

    Each schedule of a mapping has a y-axis of its own, in its own colour, since rates
    and momenta differ by orders of magnitude.

    Args:
      schedule_or_mapping: A schedule, or a mapping from names to at least one schedule.
      total_steps: Steps of the run, at least 1; drawn from 0 to ``total_steps``, at
        most 2,001 of them.
      ax: Where to draw; None is new axes.

    Returns:
      The axes of the first schedule.

    Examples:
      >>> import optax_superconv as osc
      >>> ax = osc.plotting.plot_schedule({
      ...     "learning rate": osc.onecycle_schedule(1.0, 100),
      ...     "momentum": osc.onecycle_momentum_schedule(100)}, total_steps=100)
      >>> print(ax.get_ylabel(), len(ax.figure.axes))
      learning rate 2
    """
    total_steps = _checks.steps("total_steps", total_steps, at_least=1)
    schedules: Any = schedule_or_mapping
    if not isinstance(schedules, Mapping):
        schedules = {"value": schedules}
    _checks.require(len(schedules) > 0, "schedule_or_mapping", "at least one", "none")
    for name, schedule in schedules.items():
        _checks.function(f"schedule_or_mapping[{name!r}]", schedule)

    first = new_axes(ax)
    first.set_xlabel("step")
    steps = np.unique(np.linspace(0, total_steps, 2001).astype(np.int32))
    for k, (name, schedule) in enumerate(schedules.items()):
        axes = first if k == 0 else first.twinx()
        if k > 1:
            axes.spines["right"].set_position(("axes", 1 + 0.15 * (k - 1)))
        values = jax.vmap(schedule)(steps)  # Optax's own do not all broadcast.
        color = f"C{k}"
        axes.plot(steps, values, color=color)
        axes.set_ylabel(name, color=color)
    return first
