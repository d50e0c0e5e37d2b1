"""Which combination of a grid is the best, and is it by much?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optax_superconv import _checks
from optax_superconv.finders._grid_results import (
    GridTestResult,
    combination_at,
    named,
    tied,
)
from optax_superconv.finders._readings import smooth_curve
from optax_superconv.plotting._axes import check_kind, new_axes, without_outliers, zoom

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_grid(
    result: GridTestResult,
    ax: Axes | None = None,
    *,
    kind: Literal["curves", "scores"] | None = None,
) -> Axes:
    """Draws the curves of a grid test, or a map of its scores.

    * ``"curves"``: the loss of every combination over the rate (smoothed), or over the
      step at constant values (averaged over a twentieth of the run). Lines are coloured
      from best to worst, and the best is drawn thick. Stars are at their lowest point,
      or at their end.
    * ``"scores"``: with one axis, its scores as points; otherwise a map of the scores
      over the first two axes of length above 1. Of further axes, each cell shows the
      best; the title says which. Combinations that diverged
      have no colour, and outliers the same as all scores that lie above the median by
      twice as much as it lies above the best.

    A full star marks the best. Hollow stars mark what the test has not told apart from
    it: equal scores, and margins of less than 2 of the standard errors that
    ``margin_in_errors`` counts. At constant values of fewer than 100 steps these are
    not known.

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
    check_kind(result, GridTestResult)
    if kind is not None:
        _checks.choice("kind", kind, ["curves", "scores"])
    long = [name for name, axis in result.axes.items() if len(axis) > 1]
    ax = new_axes(ax)
    if kind == "curves" or (kind is None and len(long) <= 1):
        _draw_curves(result, ax, long)
    elif len(long) <= 1:
        _draw_points(result, ax, (long or list(result.axes))[0])
    else:
        _draw_map(result, ax, *long)
    return ax


_TIED = "not told apart from the best"


def _star(ax: Axes, x: Any, y: Any, *, best: bool = False, label: str = "_") -> None:
    """A star, or several, hollow but for the best."""
    face = "C1" if best else "w"
    ax.plot(x, y, "*", mfc=face, mec="k", ms=14, label=label, zorder=3)


def _draw_curves(result: GridTestResult, ax: Axes, long: list[str]) -> None:
    from matplotlib import colormaps

    curves = result.losses.reshape(result.scores.size, -1)
    order = result.scores.ravel().argsort(kind="stable")
    colors = colormaps["viridis"](np.linspace(0.0, 0.9, len(order)))
    ties = tied(result).ravel()
    lows: list[float] = []
    stars: list[tuple[float, float]] = []
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
        lowest = int(y.argmin())
        lows.append(y[lowest])
        high = y[: lowest + 1].max()  # At last, of the best.
        if ties[k]:
            at = -1 if result.learning_rates is None else lowest
            stars.append((x[at], y[at]))
    *others, best = stars
    if others:
        _star(ax, *zip(*others, strict=True), label=_TIED)
    _star(ax, *best, best=True)
    zoom(ax, min(lows), high)
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
    best = int(np.flatnonzero(result.axes[name][order] == result.best[name])[0])
    others = np.flatnonzero(tied(result).ravel()[order])
    others = others[others != best]
    _star(ax, best, scores[best], best=True, label=f"best: {ticks[best]}")
    if others.size:
        _star(ax, others, scores[others], label=_TIED)
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
    top = without_outliers(finite)
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
    _star(ax, j, i + 0.28, best=True)
    ties = np.logical_or.reduce(tied(result), axis=tuple(rest))
    ties[i, j] = False
    title = []
    if others:
        best = named({name: result.best[name] for name in others})
        title.append(f"lowest over {', '.join(others)}; star: {best}")
    if ties.any():
        rows, columns = np.nonzero(ties)
        _star(ax, columns, rows + 0.28)
        title.append(f"hollow star: {_TIED}")
    ax.set_title("\n".join(title), fontsize="medium")
    extend = "max" if top < finite.max() else "neither"
    ax.figure.colorbar(image, ax=ax, label="score", extend=extend)
