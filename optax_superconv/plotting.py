"""What do the dials, the range test, the grid and the threshold look like?

Needs matplotlib (``pip install 'optax-superconv[plot]'``), imported when first used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np
import optax

from optax_superconv import _checks
from optax_superconv.finders import _suggestions
from optax_superconv.finders._grid_test import GridTestResult, combination_at, named
from optax_superconv.finders._range_test import RangeTestResult
from optax_superconv.finders._suggestions import Method, smooth_curve
from optax_superconv.finders._threshold import ThresholdResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_grid", "plot_range_test", "plot_schedule", "plot_threshold"]


def _check_kind(result: Any, kind: type) -> None:
    if not isinstance(result, kind):
        got = type(result).__name__
        raise TypeError(f"`result` must be a {kind.__name__}, got a {got}.")


def _axes(ax: Axes | None) -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        needs = "plots need matplotlib: pip install 'optax-superconv[plot]'."
        raise ImportError(needs) from error
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax


def _zoom(ax: Axes, low: float, high: float) -> None:
    """Between two losses: an explosion would flatten everything else."""
    if high > low:
        margin = 0.1 * (high - low)
        ax.set_ylim(low - margin, high + margin)


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

    first = _axes(ax)
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
    ax = _axes(ax)
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
        _zoom(ax, min(lows), max(curve.values.max() for curve in curves))
    if method is not None:
        with contextlib.suppress(ValueError):  # No suggestion in these curves.
            rate = _suggestions.suggest_learning_rate(results, method=method)
            label = f"{method}: {rate:.2g}"
            ax.axvline(rate, color="C1", linestyle="--", label=label)
            ends = _suggestions.suggest_interval(results, method=method)
            ax.axvspan(*ends, color="C1", alpha=0.3, linewidth=0, label="90 %")
    ax.legend()
    return ax


def plot_grid(
    result: GridTestResult,
    ax: Axes | None = None,
    *,
    kind: Literal["curves", "scores"] | None = None,
) -> Axes:
    """Draws the curves of a grid test, or a map of its scores.

    * ``"curves"``: the loss of every combination over the rate (smoothed), or over the
      step at constant values (averaged over a twentieth of the run). Lines are coloured
      from best to worst, and the best is drawn thick.
    * ``"scores"``: with one axis, its scores as points; otherwise a map of the scores
      over the first two axes of length above 1, the best marked by a star. Of further
      axes, each cell shows the best; the title says which. Combinations that diverged
      have no colour, and outliers the same as all scores that lie above the median by
      twice as much as it lies above the best.

    Args:
      result: Result of :func:`optax_superconv.grid_test`.
      ax: Where to draw; None is new axes.
      kind: ``"curves"`` or ``"scores"``; None is ``"curves"`` for one axis and
        ``"scores"`` for more.

    Returns:
      The axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> step_fn = lambda w, h, x: (w, (h["decay"] - 0.1) ** 2 + h["momentum"])
      >>> result = osc.grid_test(
      ...     step_fn, jnp.zeros(()), [None], mode="constant", num_steps=5,
      ...     grid={"decay": [0.0, 0.1, 0.2], "momentum": [0.5, 0.9]},
      ...     pass_hyperparams=True)
      >>> ax = osc.plotting.plot_grid(result)
      >>> print(ax.get_ylabel(), "|", ax.get_xlabel())
      decay | momentum
    """
    _check_kind(result, GridTestResult)
    if kind is not None:
        _checks.choice("kind", kind, ["curves", "scores"])
    long = [name for name, axis in result.axes.items() if len(axis) > 1]
    ax = _axes(ax)
    if kind == "curves" or (kind is None and len(long) <= 1):
        _draw_curves(result, ax, long)
    elif len(long) <= 1:
        _draw_points(result, ax, (long or list(result.axes))[0])
    else:
        _draw_map(result, ax, *long)
    return ax


def _draw_curves(result: GridTestResult, ax: Axes, long: list[str]) -> None:
    from matplotlib import colormaps

    curves = result.losses.reshape(result.scores.size, -1)
    order = result.scores.ravel().argsort(kind="stable")
    colors = colormaps["viridis"](np.linspace(0.0, 0.9, len(order)))
    lows: list[float] = []
    high = -np.inf
    for rank, k in reversed(list(enumerate(order))):
        combination = combination_at(result.axes, k)
        try:
            if result.learning_rates is None:
                losses = curves[k][np.isfinite(curves[k])]
                span = max(1, min(curves.shape[1] // 20, losses.size))
                x = np.arange(span - 1, losses.size)
                y = np.convolve(losses, np.full(span, 1 / span), mode="valid")
            else:
                smooth = smooth_curve(result.curve(**combination))
                x, y = 10**smooth.log_rates, smooth.values
        except ValueError:  # Too short to smooth, or not even one loss.
            continue
        width, suffix = (1.0, "") if rank else (2.5, " (best)")
        (line,) = ax.plot(x, y, color=colors[rank], linewidth=width)
        if rank == 0 or len(order) <= 8:
            shown = named({name: combination[name] for name in long})
            line.set_label((shown or "loss") + suffix)
        lows.append(y.min())
        high = y[: int(y.argmin()) + 1].max()  # At last, of the best.
    _zoom(ax, min(lows), high)
    ax.set(xlabel="step", ylabel="loss, smoothed")
    if result.learning_rates is not None:
        ax.set(xlabel="learning rate", xscale="log")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], fontsize="small")


def _draw_points(result: GridTestResult, ax: Axes, name: str) -> None:
    order = result.axes[name].argsort()
    ticks = [f"{value:.4g}" for value in result.axes[name][order]]
    scores = result.scores.ravel()[order]
    scores = np.where(np.isfinite(scores), scores, np.nan)
    places = range(len(ticks))  # Values of 0 and of many decades fit.
    ax.plot(places, scores, "o-", color="C0")
    best = int(np.nanargmin(scores))
    label = f"best: {ticks[best]}"
    ax.plot(best, scores[best], "*", color="C1", ms=16, label=label)
    ax.set_xticks(places, ticks)
    ax.set(xlabel=name, ylabel="score")
    ax.legend()


def _draw_map(
    result: GridTestResult, ax: Axes, row: str, column: str, *others: str
) -> None:
    names = list(result.axes)
    scores = np.where(np.isfinite(result.scores), result.scores, np.nan)
    rest = [k for k, name in enumerate(names) if name not in (row, column)]
    # fmin leaves out NaN, and is silent where all are.
    values = np.fmin.reduce(scores, axis=tuple(rest)) if rest else scores
    finite = values[np.isfinite(values)]
    # An exploded score leaves the others their colours.
    top = min(finite.max(), 3 * np.median(finite) - 2 * finite.min())
    image = ax.imshow(values, aspect="auto", origin="lower", cmap="viridis_r", vmax=top)
    ax.set(facecolor="0.85", ylabel=row, xlabel=column)
    star = []
    for set_ticks, name in ((ax.set_yticks, row), (ax.set_xticks, column)):
        axis = result.axes[name]
        set_ticks(range(len(axis)), [f"{value:.4g}" for value in axis])
        star.append(int(np.flatnonzero(axis == result.best[name])[0]))
    middle = (finite.min() + top) / 2
    for (i, j), value in np.ndenumerate(values):
        shown = f"{value:.3g}" if np.isfinite(value) else "diverged"
        color = "w" if value > middle else "k"
        ax.text(j, i, shown, ha="center", va="center", color=color)
    i, j = star
    ax.plot(j, i + 0.28, "*", color="C1", markeredgecolor="k", ms=14)
    if others:
        best = named({name: result.best[name] for name in others})
        title = f"lowest over {', '.join(others)}; star: {best}"
        ax.set_title(title, fontsize="medium")
    extend = "max" if top < finite.max() else "neither"
    ax.figure.colorbar(image, ax=ax, label="score", extend=extend)


_REGIME_COLORS = {"too slow": "0.6", "1": "C0", "2": "C2", "3": "C3"}


def plot_threshold(result: ThresholdResult, ax: Axes | None = None) -> Axes:
    """Draws the end loss over the rate, the regimes, and the threshold.

    Both axes are logarithmic where all losses are above 0. Triangles at the edges stand
    for losses beyond them, crosses for runs that diverged.

    Args:
      result: Result of :func:`optax_superconv.convergence_threshold`.
      ax: Where to draw; None is new axes.

    Returns:
      The axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> step_fn = lambda w, rate, batch: (w - 2 * rate * w, w @ w)
      >>> result = osc.convergence_threshold(
      ...     step_fn, jnp.ones(2), [None], num_steps=50, pass_hyperparams=True)
      >>> print(osc.plotting.plot_threshold(result).get_xlabel())
      learning rate
    """
    _check_kind(result, ThresholdResult)
    ax = _axes(ax)
    rates, ends = result.rates, result.end_losses
    first = float(result.losses[0, 0])
    logarithmic = first > 0 and np.nanmin(ends) >= 0 and result.target_loss > 0
    to, back = (np.log10, lambda x: 10**x) if logarithmic else (float, float)
    bottom, fall = to(result.target_loss), to(first) - to(result.target_loss)
    # What lies far below the target or above the first loss is drawn at the edges.
    low, high = back(bottom - 2 * fall), back(bottom + 1.5 * fall)
    ax.set_yscale("log" if logarithmic else "linear")
    ax.set_ylim(back(bottom - 2.15 * fall), back(bottom + 1.65 * fall))
    outside = [~np.isfinite(ends), ends > high, ends < low]
    marks = np.select(outside, ["x", "^", "v"], "o")
    shown = np.clip(np.nan_to_num(ends, nan=high), low, high)
    ax.plot(rates, shown, color="0.8")
    regimes = np.array(result.regimes)
    for regime, color in _REGIME_COLORS.items():
        label = f"regime {regime}" if regime in "123" else regime
        for mark in np.unique(marks[regimes == regime]):
            these = (regimes == regime) & (marks == mark)
            ax.plot(rates[these], shown[these], mark, color=color, label=label)
            label = "_"  # One entry in the legend.
    ax.axhline(result.target_loss, color="0.5", linestyle=":", label="target")
    label = f"threshold: {result.threshold:.3g}"
    ax.axvline(result.threshold, color="C1", linestyle="--", label=label)
    ax.axvspan(*result.suggested_band, color="C1", alpha=0.2, label="suggested band")
    ax.set(xscale="log", xlabel="learning rate", ylabel="end loss")
    ax.legend(fontsize="small")
    return ax
