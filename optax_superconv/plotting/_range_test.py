"""Where in the curves of range tests does a suggestion come from?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from optax_superconv import _checks
from optax_superconv.finders import _suggestions
from optax_superconv.finders._range_test import RangeTestResult
from optax_superconv.finders._suggestions import Method, smooth_curve
from optax_superconv.plotting._axes import new_axes, zoom

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_range_test(
    result: RangeTestResult | Sequence[RangeTestResult],
    ax: Axes | None = None,
    *,
    method: Method | None = "knee",
) -> Axes:
    """Draws the losses of one or several range tests over the rate, and a suggestion.

    Args:
      result: Result of :func:`optax_superconv.range_test`, or a sequence of at least
        one. The suggestion is then their median, on a band of their 90 % interval.
      ax: Where to draw; None is new axes.
      method: Method of :func:`optax_superconv.suggest_learning_rate`. None draws no
        suggestion.

    Returns:
      The axes. Held-out losses are drawn in place of the losses where the test took
      them. A curve that holds no suggestion is drawn without one.

    Examples:
      >>> import numpy as np
      >>> import optax_superconv as osc
      >>> rates = np.geomspace(1e-6, 1.0, 61)
      >>> losses = 2 - 1 / (1 + (1e-3 / rates) ** 2)
      >>> result = osc.RangeTestResult(rates, losses, losses, False)
      >>> print(osc.plotting.plot_range_test(result).get_xscale())
      log
    """
    results = _suggestions.as_results("result", result)
    if method is not None:
        _checks.choice("method", method, get_args(Method))
    ax = new_axes(ax)
    shown = "loss" if results[0].eval_losses is None else "held-out loss"
    ax.set(xscale="log", xlabel="learning rate", ylabel=shown)
    curves = []
    for k, test in enumerate(results):
        read = test.losses if test.eval_losses is None else test.eval_losses
        ax.plot(test.learning_rates, read, color="0.75", label="_" if k else shown)
        with contextlib.suppress(ValueError):  # Too few points to smooth.
            curves.append(smooth_curve(test))
    for k, curve in enumerate(curves):
        style = {"color": "C0", "alpha": len(results) ** -0.5}
        label = "_" if k else "smoothed"
        ax.plot(10**curve.log_rates, curve.values, label=label, **style)
    if curves:
        lows = [min(curve.losses.min(), curve.values.min()) for curve in curves]
        zoom(ax, min(lows), max(curve.values.max() for curve in curves))
    if method is not None:
        with contextlib.suppress(ValueError):  # No suggestion in these curves.
            rate = _suggestions.suggest_learning_rate(results, method=method)
            label = f"{method}: {rate:.2g}"
            ax.axvline(rate, color="C1", linestyle="--", label=label)
            ends = _suggestions.suggest_interval(results, method=method)
            ax.axvspan(*ends, color="C1", alpha=0.3, linewidth=0, label="90 %")
    ax.legend()
    return ax
