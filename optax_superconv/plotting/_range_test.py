"""Where in the curves of range tests does a suggestion come from?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_superconv.finders import _readings, _suggestions
from optax_superconv.finders._range_test import RangeTestResult
from optax_superconv.finders._readings import Curve, Method
from optax_superconv.finders._steps import Optimizer
from optax_superconv.plotting._axes import new_axes, without_outliers, zoom

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_range_test(
    result: RangeTestResult | Sequence[RangeTestResult],
    ax: Axes | None = None,
    *,
    method: Method | None = None,
    optimizer: Optimizer | None = None,
) -> Axes:
    """Draws the losses of one or several range tests over the rate, and a suggestion.

    The dark lines are the smoothings that ``method`` reads, and the dots are what it
    suggests from each. The dashed line is the suggestion, the median of several, on a
    band of their 90 % interval. What lies far above the start of the curves is out of
    view.

    Args:
      result: Result of :func:`optax_superconv.range_test`, or a sequence of at least
        one.
      ax: Where to draw; None is new axes.
      method: Method of :func:`optax_superconv.suggest_learning_rate`. None is that of
        the optimizer; without one, no suggestion is drawn, and smoothings are as wide
        as the noise asks for.
      optimizer: ``"sgd"`` or ``"adamw"``. None is what the results tell, if they do.

    Returns:
      The axes. Held-out losses are drawn in place of the losses where the test took
      them. Curves that hold no suggestion are drawn without one, and the legend says of
      how many there is one.

    Examples:
      >>> import numpy as np
      >>> import optax_superconv as osc
      >>> rates = np.geomspace(1e-6, 1.0, 61)
      >>> losses = 2 - 1 / (1 + (1e-3 / rates) ** 2)
      >>> result = osc.RangeTestResult(rates, losses, losses, False)
      >>> ax = osc.plotting.plot_range_test(result, optimizer="adamw")
      >>> print(ax.get_xscale(), ax.get_legend().get_texts()[-1].get_text())
      log knee: 0.014
    """
    results = _suggestions.as_results("result", result)
    told = {test.optimizer for test in results}
    asked = method is not None or optimizer is not None
    if asked or (len(told) == 1 and None not in told):
        method = _suggestions.method_for("result", results, method, optimizer)
    ax = new_axes(ax)
    held_out = results[0].eval_losses is not None
    shown = "held-out loss" if held_out else "loss"
    ax.set(xscale="log", xlabel="learning rate", ylabel=shown)
    one = len(results) == 1
    raw: dict[str, Any] = {"color": "0.75" if one else "0.88", "linewidth": 1}
    smooth: dict[str, Any] = {"color": "C0" if one else "0.45", "linewidth": 1.5}
    for k, test in enumerate(results):
        label = "_" if k else shown  # One entry in the legend.
        ax.plot(test.learning_rates, _losses_of(test), label=label, zorder=1, **raw)
    curves: list[tuple[RangeTestResult, Curve, float]] = []
    for test in results:
        with contextlib.suppress(ValueError):  # Too few losses to smooth.
            curves.append((test, *_readings.reading(test, method)))
    for k, (_, curve, _) in enumerate(curves):
        label = "_" if k else "smoothed"
        ax.plot(10**curve.log_rates, curve.values, label=label, zorder=2, **smooth)
    holding = [entry for entry in curves if np.isfinite(entry[2])]
    if method is not None:
        _mark(ax, method, holding, len(results))
    if curves:
        # The fall fills the axes, and the noise of a flat curve does not.
        views = [_view(curve) for _, curve, _ in holding or curves]
        low, high = min(v[0] for v in views), max(v[1] for v in views)
        zoom(ax, low, high, least=0.0 if holding else 0.1)
    else:
        losses = np.concatenate([_losses_of(test) for test in results])
        losses = losses[np.isfinite(losses)]
        if losses.size:
            zoom(ax, losses.min(), without_outliers(losses), least=0.1)
    ax.legend()
    return ax


def _losses_of(test: RangeTestResult) -> np.ndarray:
    return test.losses if test.eval_losses is None else test.eval_losses


def _view(curve: Curve) -> tuple[float, float]:
    """The losses to be seen of a curve: its fall, and the noise."""
    falling = curve.values[: int(curve.values.argmin()) + 1]
    low = min(curve.losses.min(), falling[-1])
    return low, max(curve.start + 2 * curve.noise, falling.max())


def _mark(
    ax: Axes,
    method: Method,
    holding: list[tuple[RangeTestResult, Curve, float]],
    num_results: int,
) -> None:
    """The suggestion of the curves that hold one."""
    if not holding:
        ax.plot([], [], " ", label=f"{method}: none")
        return
    tests = [test for test, _, _ in holding]
    rates = np.array([rate for _, _, rate in holding])
    heights = [
        np.interp(np.log10(rate), curve.log_rates, curve.values)
        for _, curve, rate in holding
    ]
    if len(tests) > 1:
        low, high = _suggestions.suggest_interval(tests, method=method)
        label = f"90 %: {low:.2g} to {high:.2g}"
        ax.axvspan(low, high, color="C1", alpha=0.2, linewidth=0, label=label, zorder=0)
    rate = _suggestions.suggest_learning_rate(tests, method=method)
    label = f"{method}: {rate:.2g}"
    if len(tests) < num_results:
        label += f" ({len(tests)} of {num_results})"
    ax.axvline(rate, color="C1", linestyle="--", label=label, zorder=3)
    label = "of each" if num_results > 1 else "_"
    ax.plot(rates, heights, "o", color="C1", mec="w", label=label, zorder=4)
