"""What did the probes of ``auto_onecycle`` see, and what was chosen?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optax_superconv.finders._auto_results import AutoOneCycleResult
from optax_superconv.plotting._axes import check_kind
from optax_superconv.plotting._range_test import plot_range_test

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_auto(result: AutoOneCycleResult, ax: Axes | None = None) -> Axes:
    """Draws the range test, the short cycles' mean losses, and the chosen peak.

    Losses are over the rate: that of the step in the range test, the peak of a short
    cycle. A cycle that diverged has no point.

    Args:
      result: Result of :func:`optax_superconv.auto_onecycle` with a budget above 0.
      ax: Where to draw; None is new axes.

    Returns:
      The axes.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.sgd(0.1)
      >>> @jax.jit
      ... def step_fn(state, x):
      ...     w, opt_state = state
      ...     loss, grad = jax.value_and_grad(lambda w: ((w - x) ** 2).mean())(w)
      ...     updates, opt_state = tx.update(grad, opt_state, w)
      ...     return (w + updates, opt_state), loss
      >>> w = jnp.zeros(())
      >>> result = osc.auto_onecycle(step_fn, (w, tx.init(w)), [jnp.ones(8)], 1000)
      >>> ax = osc.plotting.plot_auto(result)
      >>> print(ax.get_xlabel(), "|", ax.get_legend().get_texts()[-1].get_text())
      learning rate | peak: 0.4
    """
    check_kind(result, AutoOneCycleResult)
    test, cycles = result.range_test, result.short_cycles
    if test is None:
        raise ValueError(
            f"`result` must be one of a `budget` above 0, with probes, got {result}."
        )
    ax = plot_range_test(test, ax, optimizer=result.optimizer)
    if cycles is not None:
        ended = np.isfinite(cycles.scores)
        x, y = cycles.peak_learning_rates[ended], cycles.scores[ended]
        ax.plot(x, y, "o-", color="C2", label="short cycles")
        low, high = ax.get_ylim()
        margin = 0.05 * (max(high, y.max()) - min(low, y.min()))
        ax.set_ylim(min(low, y.min() - margin), max(high, y.max() + margin))
    peak = result.hyperparams["peak_learning_rate"]
    ax.axvline(peak, color="C3", label=f"peak: {peak:.2g}", zorder=3)
    ax.legend()
    return ax
