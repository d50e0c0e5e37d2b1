"""Where is it drawn, and which part of it is shown?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def zoom(ax: Axes, low: float, high: float) -> None:
    """Between two losses: an explosion would flatten everything else."""
    if high > low:
        margin = 0.1 * (high - low)
        ax.set_ylim(low - margin, high + margin)
