"""What do the dials, the range test, the grid and the threshold look like?

Needs matplotlib (``pip install 'optax-superconv[plot]'``), imported when first used.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np
import optax

from optax_superconv import _checks
from optax_superconv.finders import _runs
from optax_superconv.finders._grid_test import GridTestResult
from optax_superconv.finders._range_test import RangeTestResult
from optax_superconv.finders._suggestions import (
    Method,
    as_results,
    smooth_curve,
    suggest_interval,
    suggest_learning_rate,
)
from optax_superconv.finders._threshold import ThresholdResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_grid", "plot_range_test", "plot_schedule", "plot_threshold"]

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
      schedule_or_mapping: A schedule, or a mapping from names to at least one schedule.
      total_steps: Steps of the run, at least 1; drawn from 0 to ``total_steps``, at
        most 2,001 of them.
      ax: Where to draw; None is new axes.

    Returns:
      The axes of the first schedule.

    Raises:
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

    Raises:
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
    results = as_results("result", result)
    if method is not None:
        _checks.choice("method", method, get_args(Method))
    ax = _axes(ax)
    held_out = results[0].eval_losses is not None
    ax.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="held-out loss" if held_out else "loss",
    )
    lows: list[float] = []
    highs: list[float] = []
    for k, test in enumerate(results):
        read = test.losses if test.eval_losses is None else test.eval_losses
        label = None if k else ax.get_ylabel()
        ax.plot(test.learning_rates, read, color="0.75", label=label)
        try:
            curve = smooth_curve(test)
        except ValueError:  # Too few points to smooth: the losses alone are drawn.
            continue
        label = None if lows else "smoothed"
        alpha = 1 / len(results) ** 0.5
        rates = 10**curve.log_rates
        ax.plot(rates, curve.values, color="C0", alpha=alpha, label=label)
        lows.append(min(curve.losses.min(), curve.values.min()))
        highs.append(curve.values.max())
    if lows and (margin := 0.1 * (max(highs) - min(lows))) > 0:
        # An explosion would flatten everything else.
        ax.set_ylim(min(lows) - margin, max(highs) + margin)
    if method is not None:
        with contextlib.suppress(ValueError):  # No suggestion in these curves.
            rate = suggest_learning_rate(results, method=method)
            label = f"{method}: {rate:.2g}"
            ax.axvline(rate, color="C1", linestyle="--", label=label)
            ends = suggest_interval(results, method=method)
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

    Raises:
      ImportError: If matplotlib is missing.

    Examples:
      >>> import matplotlib
      >>> matplotlib.use("Agg")
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> step_fn = lambda w, h, x: (w, (h["decay"] - 0.1) ** 2 + h["momentum"])
      >>> result = osc.grid_test(
      ...     step_fn, jnp.zeros(()), [None], mode="constant", num_steps=5,
      ...     grid={"decay": [0.0, 0.1, 0.2], "momentum": [0.5, 0.9]})
      >>> ax = osc.plotting.plot_grid(result)
      >>> print(ax.get_ylabel(), "|", ax.get_xlabel())
      decay | momentum
    """
    if not isinstance(result, GridTestResult):
        raise TypeError(
            f"`result` must be a GridTestResult, got a {type(result).__name__}."
        )
    if kind is not None:
        _checks.choice("kind", kind, ["curves", "scores"])
    long = [name for name, axis in result.axes.items() if len(axis) > 1]
    ax = _axes(ax)
    if kind == "curves" or (kind is None and len(long) <= 1):
        _draw_curves(result, ax, long)
    elif len(long) <= 1:
        (name,) = long or list(result.axes)[:1]
        values = result.axes[name]
        scores = np.where(np.isfinite(result.scores), result.scores, np.nan).ravel()
        order = values.argsort()
        values, scores = values[order], scores[order]
        places = range(len(values))  # Values of 0 and of many decades fit.
        ax.plot(places, scores, "o-", color="C0")
        ax.set_xticks(places, [f"{v:.4g}" for v in values])
        lowest = int(np.nanargmin(scores))
        label = f"best: {values[lowest]:.4g}"
        ax.plot(lowest, scores[lowest], "*", color="C1", ms=16, label=label)
        ax.set_xlabel(name)
        ax.set_ylabel("score")
        ax.legend()
    else:
        _draw_map(result, ax, long[0], long[1])
    return ax


def _named(combination: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:.4g}" for name, value in combination.items())


def _draw_curves(result: GridTestResult, ax: Axes, long: list[str]) -> None:
    from matplotlib import colormaps

    names = list(result.axes)
    scores = result.scores.ravel()
    order = scores.argsort(kind="stable")
    colors = colormaps["viridis"](np.linspace(0.0, 0.9, len(scores)))
    combinations = [
        dict(zip(names, map(float, values), strict=True))
        for values in itertools.product(*result.axes.values())
    ]
    curves = result.losses.reshape(len(scores), -1)
    bottoms: list[float] = []
    tops: list[float] = []
    for rank, k in reversed(list(enumerate(order))):
        losses = curves[k]
        if result.learning_rates is None:
            n = int(np.argmin(np.append(np.isfinite(losses), False)))
            if n == 0:
                continue
            span = max(1, min(len(losses) // 20, n))
            x = np.arange(span - 1, n)
            y = np.convolve(losses[:n], np.full(span, 1 / span), mode="valid")
        else:
            try:
                smooth = smooth_curve(result.curve(**combinations[k]))
            except ValueError:  # Too short to smooth.
                continue
            x, y = 10**smooth.log_rates, smooth.values
        label = _named({name: combinations[k][name] for name in long})
        width, suffix = (2.5, " (best)") if rank == 0 else (1.0, "")
        (line,) = ax.plot(x, y, color=colors[rank], linewidth=width)
        if rank == 0 or len(scores) <= 8:
            line.set_label((label or "loss") + suffix)
        bottoms.append(y.min())
        tops.append(y[: int(y.argmin()) + 1].max())  # At last, of the best.
    # An explosion would flatten everything else.
    low, high = min(bottoms), tops[-1]
    if high > low:
        ax.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))
    if result.learning_rates is None:
        ax.set_xlabel("step")
    else:
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
    ax.set_ylabel("loss, smoothed")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], fontsize="small")


def _draw_map(result: GridTestResult, ax: Axes, row: str, column: str) -> None:
    names = list(result.axes)
    others = [name for name in names if name not in (row, column)]
    scores = np.where(np.isfinite(result.scores), result.scores, np.nan)
    kept = [names.index(row), names.index(column)]
    rest = tuple(k for k in range(len(names)) if k not in kept)
    # fmin leaves out NaN, and is silent where all are.
    values = np.fmin.reduce(scores, axis=rest) if rest else scores
    finite = values[np.isfinite(values)]
    # An explosion would flatten everything else.
    top = min(finite.max(), 3 * np.median(finite) - 2 * finite.min())
    image = ax.imshow(values, aspect="auto", origin="lower", cmap="viridis_r", vmax=top)
    ax.set_facecolor("0.85")
    for set_ticks, name in ((ax.set_yticks, row), (ax.set_xticks, column)):
        set_ticks(
            range(len(result.axes[name])), [f"{v:.4g}" for v in result.axes[name]]
        )
    ax.set_ylabel(row)
    ax.set_xlabel(column)
    middle = (finite.min() + top) / 2
    for (i, j), value in np.ndenumerate(values):
        shown = f"{value:.3g}" if np.isfinite(value) else "diverged"
        dark = value > middle
        ax.text(j, i, shown, ha="center", va="center", color="w" if dark else "k")
    i, j = (
        int(np.flatnonzero(result.axes[name] == result.best[name])[0])
        for name in (row, column)
    )
    ax.plot(j, i + 0.28, "*", color="C1", markeredgecolor="k", ms=14)
    long = [name for name in others if len(result.axes[name]) > 1]
    if long:
        best = _named({name: result.best[name] for name in long})
        ax.set_title(f"lowest over {', '.join(long)}; star: {best}", fontsize="medium")
    extend = "max" if top < finite.max() else "neither"
    ax.figure.colorbar(image, ax=ax, label="score", extend=extend)


_REGIME_COLORS = {
    "too slow": "0.6",
    "1": "C0",
    "2": "C2",
    "2A": "C2",
    "2B": "C4",
    "3": "C3",
}


def plot_threshold(result: ThresholdResult, ax: Axes | None = None) -> Axes:
    """Draws the end loss over the rate, the regimes, and the threshold.

    Both axes are logarithmic where all losses are above 0. Triangles at the edges stand
    for losses beyond them, crosses for runs that diverged. Where there was fine-tuning,
    hollow marks show its end losses.

    Args:
      result: Result of :func:`optax_superconv.convergence_threshold`.
      ax: Where to draw; None is new axes.

    Returns:
      The axes.

    Raises:
      ImportError: If matplotlib is missing.

    Examples:
      >>> import matplotlib
      >>> matplotlib.use("Agg")
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> @jax.jit
      ... def step_fn(w, learning_rate, batch):
      ...     loss, grad = jax.value_and_grad(lambda w: (w**2).sum())(w)
      ...     return w - learning_rate * grad, loss
      >>> result = osc.convergence_threshold(step_fn, jnp.ones(2), [None], num_steps=50)
      >>> print(osc.plotting.plot_threshold(result).get_xlabel())
      learning rate
    """
    if not isinstance(result, ThresholdResult):
        raise TypeError(
            f"`result` must be a ThresholdResult, got a {type(result).__name__}."
        )
    ax = _axes(ax)
    rates, ends = result.rates, result.end_losses
    first = float(result.losses[0, 0])
    tuned = np.full(len(rates), np.nan)
    if result.finetuned_losses is not None:
        tuned = _runs.end_losses(result.finetuned_losses)
    logarithmic = first > 0 and np.nanmin(ends) >= 0 and result.target_loss > 0
    # What lies far below the target or above the first loss is drawn at the edges.
    if logarithmic:
        fall = first / result.target_loss
        low, high = result.target_loss / fall**2, first * fall**0.5
        ax.set_yscale("log")
        ax.set_ylim(low / fall**0.15, high * fall**0.15)
    else:
        fall = first - result.target_loss
        low, high = result.target_loss - fall, first + fall
        ax.set_ylim(low - 0.1 * fall, high + 0.1 * fall)

    def draw(values: np.ndarray, at: np.ndarray, label: str, **style: Any) -> None:
        outside = [~np.isfinite(values), values > high, values < low]
        marks = np.select(outside, ["x", "^", "v"], "o")
        shown = np.clip(np.where(outside[0], high, values), low, high)
        for mark in np.unique(marks[at]):
            these = at & (marks == mark)
            ax.plot(rates[these], shown[these], mark, label=label, **style)
            label = "_"  # One entry in the legend.

    ax.plot(rates, np.clip(np.nan_to_num(ends, nan=high), low, high), color="0.8")
    regimes = np.array(result.regimes)
    for regime, color in _REGIME_COLORS.items():
        name = f"regime {regime}" if regime[0] in "123" else regime
        draw(ends, regimes == regime, name, color=color)
    draw(tuned, np.isfinite(tuned), "fine-tuned", mfc="none", color="k")
    ax.axhline(result.target_loss, color="0.5", linestyle=":", label="target")
    ax.axvline(
        result.threshold,
        color="C1",
        linestyle="--",
        label=f"threshold: {result.threshold:.3g}",
    )
    ax.axvspan(*result.suggested_band, color="C1", alpha=0.2, label="suggested band")
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("end loss")
    ax.legend(fontsize="small")
    return ax
