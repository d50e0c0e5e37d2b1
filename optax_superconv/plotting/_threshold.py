"""At which rates does a run converge, and where is the threshold?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optax_superconv.finders._threshold import ThresholdResult
from optax_superconv.plotting._axes import check_kind, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    check_kind(result, ThresholdResult)
    ax = new_axes(ax)
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
    band = result.band_before_fine_tuning
    ax.axvspan(*band, color="C1", alpha=0.2, label="before fine-tuning")
    ax.set(xscale="log", xlabel="learning rate", ylabel="end loss")
    ax.legend(fontsize="small")
    return ax
