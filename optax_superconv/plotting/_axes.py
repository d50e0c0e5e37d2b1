"""Where is it drawn, and which part of it is shown?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_kind(result: Any, kind: type) -> None:
    if not isinstance(result, kind):
        got = type(result).__name__
        raise TypeError(f"`result` must be a {kind.__name__}, got a {got}.")


def new_axes(ax: Axes | None) -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        needs = "plots need matplotlib: pip install 'optax-superconv[plot]'."
        raise ImportError(needs) from error
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax


def without_outliers(values: np.ndarray) -> float:
    """The highest value, or less: twice as far above the median as that has come up."""
    return min(values.max(), 3 * np.median(values) - 2 * values.min())


def zoom(ax: Axes, low: float, high: float, *, least: float = 0.0) -> None:
    """Between two losses: an explosion would flatten everything else.

    ``least`` is how much is seen, as a fraction of the losses.
    """
    missing = least * max(abs(low), abs(high)) - (high - low)
    margin = 0.1 * (high - low) + max(missing / 2, 0.0)
    if margin > 0:
        ax.set_ylim(low - margin, high + margin)
