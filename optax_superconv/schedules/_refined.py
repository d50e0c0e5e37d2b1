r"""Which schedule would have suited the run that has just ended?

The gradient norms of a finished run say: a step should be short where gradients are
long, and the shorter the fewer steps follow it,

.. math:: \eta_t \propto w_t \sum_{p > t} w_p,

with weights :math:`w = G^{-2}` for SGD, G the l2 norms, and :math:`w = G^{-1}` for
Adam, G the l1 norms. Norms that stand still give a rate that falls linearly to 0.
:func:`record_gradient_norms` collects them, :func:`refined_schedule` draws the
consequence.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import wide_dtype
from optax_superconv.schedules._phases import as_count

_POWERS = {"adam": -1.0, "sgd": -2.0}
_SAMPLES = 10_000  # Of the paper's smoothing, at least.
_TRIM = 2  # Norms at either end, which the smoothing leaves out.


def refined_schedule(
    gradient_norms: ArrayLike,
    peak_value: ArrayLike,
    total_steps: int,
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    smoothing: float = 0.1,
) -> optax.Schedule:
    r"""The schedule that the gradient norms of a finished run ask for.

    .. math:: \eta_t = M\, \frac{w_t \sum_{p>t} w_p}{\max_s w_s \sum_{p>s} w_p}

    with peak :math:`M` and weights :math:`w = G^{-1}` (``"adam"``) or :math:`G^{-2}`
    (``"sgd"``) of the norms G. The n values are those at n equally spaced steps from 0
    to T, with straight lines between, so that 0 falls on step T. From there the rate
    is 0.

    Tune the peak again: the best peak of the refined schedule is not that of the run
    which gave the norms. At the beginning the norms change fast, and so does the
    result. It may rise and fall there. Do not trust its first tenth blindly, and
    multiply a warm-up into it.

    Smoothing, as in the paper: the first 2 and last 2 norms are left out, the others
    resampled linearly to 10,000 where they are fewer, and a running median taken,
    which at the end of the run continues into the reflected signal. Its width is a
    fraction of the run's length, as the paper words it, however many norms there are.

    Args:
      gradient_norms: Norms at equal distances over a whole run, at least 2, or 6 with
        smoothing: l1 norms for Adam, l2 norms for SGD. All are finite and at least 0,
        and above 0 after the smoothing, because 0 asks for an infinite rate. The norms
        of :func:`record_gradient_norms` are
        ``optax.tree.get(opt_state, "gradient_norms")``.
      peak_value: The highest rate, at least 0.
      total_steps: Steps of the run to come, at least 1. It need not be as long as the
        one that gave the norms.
      optimizer: ``"adam"`` or ``"sgd"``, the latter with or without momentum.
      smoothing: Width of the running median as a fraction of the run, at least 0 and
        less than 1; with 0 nothing is left out and nothing smoothed.

    Returns:
      A schedule that broadcasts over counts and values; see :func:`phase_schedule`.

    Raises:
      TypeError: Under ``jit``, for traced norms, because they are data of a finished
        run.

    Examples:
      >>> import optax_superconv as osc
      >>> norms = [2.0, 1.0, 1.0, 1.0]
      >>> schedule = osc.refined_schedule(
      ...     norms, 1.0, 30, optimizer="sgd", smoothing=0.0)
      >>> print([round(float(schedule(t)), 3) for t in (0, 10, 15, 20, 30)])
      [0.375, 1.0, 0.75, 0.5, 0.0]

    References:
      Defazio, Cutkosky, Mehta and Mishchenko, `Optimal Linear Decay Learning Rate
      Schedules and Further Refinements <https://arxiv.org/abs/2310.07831>`_, 2023.
    """
    total = _checks.steps("total_steps", total_steps, at_least=1)
    _checks.number("peak_value", peak_value, _checks.NON_NEGATIVE)
    _checks.choice("optimizer", optimizer, _POWERS)
    smoothing = _checks.scalar("smoothing", smoothing, _checks.DECAY)
    norms = _check_norms(gradient_norms, at_least=2 + (2 * _TRIM if smoothing else 0))
    if smoothing:
        norms = _smooth(norms[_TRIM:-_TRIM], smoothing)
    positive = "above 0" + (" after the smoothing" if smoothing else "")
    _checks.require(np.all(norms > 0), "gradient_norms", positive, norms.min())
    # From the last step back: the rate is computed in what remains of the run, so that
    # the end keeps its relative precision.
    weights = (norms[::-1] / norms.min()) ** _POWERS[optimizer]
    rates = weights * np.concatenate([[0.0], np.cumsum(weights[:-1])])
    rates = rates / rates.max()
    last = len(rates) - 1

    def schedule(count: ArrayLike) -> jax.Array:
        dtype = wide_dtype(peak_value)
        peak, table = jnp.asarray(peak_value, dtype), jnp.asarray(rates, dtype)
        remaining = total - jnp.clip(as_count(count, dtype), 0, total)
        nearest = jnp.round(remaining.astype(dtype) * (last / total)).astype(jnp.int32)
        # How far from it, `total` being the next. Both products may wrap around int32,
        # their difference does not, so for whole counts it is exact.
        whole = jnp.issubdtype(remaining.dtype, jnp.integer)
        kind = jnp.int32 if whole else dtype
        rest = remaining.astype(kind) * last - nearest.astype(kind) * total
        part = jnp.abs(rest).astype(dtype) / total
        neighbour = nearest + jnp.sign(rest).astype(jnp.int32)
        return peak * (table[nearest] * (1 - part) + table[neighbour] * part)

    return schedule


def _check_norms(gradient_norms: Any, at_least: int) -> np.ndarray:
    name = "gradient_norms"
    if isinstance(gradient_norms, jax.core.Tracer):
        raise TypeError(
            f"`{name}` must be the norms of a finished run, got a traced value of type "
            f"{type(gradient_norms).__name__}. Build the schedule outside `jit`."
        )
    norms = np.asarray(gradient_norms)
    kinds = (jnp.floating, jnp.integer)
    if not any(jnp.issubdtype(norms.dtype, kind) for kind in kinds):
        raise TypeError(
            f"`{name}` must be numbers, got {gradient_norms!r} of type "
            f"{type(gradient_norms).__name__}."
        )
    _checks.require(norms.ndim == 1, name, "one-dimensional", f"shape {norms.shape}")
    _checks.require(
        len(norms) >= at_least, name, f"at least {at_least} norms", len(norms)
    )
    norms = norms.astype(np.float64)
    good = np.isfinite(norms) & (norms >= 0)
    first = int(np.argmin(good))
    _checks.require(
        np.all(good),
        name,
        "finite and at least 0 (a record is -1 where its run did not get, or met no "
        "finite norm; `norms[norms >= 0]` leaves these out)",
        f"{norms[first]} at index {first}",
    )
    return norms


def _smooth(norms: np.ndarray, fraction: float) -> np.ndarray:
    """A running median over a fraction of the run, at the end into its reflection."""
    # Only here, for SciPy takes a while to import.
    from scipy.ndimage import median_filter

    if len(norms) < _SAMPLES:
        even = np.linspace(0.0, len(norms) - 1, _SAMPLES)
        norms = np.interp(even, np.arange(len(norms)), norms)
    width = 2 * int(fraction * len(norms) / 2) + 1
    continued = np.pad(norms, (0, 2 * width), mode="reflect")
    return median_filter(continued, width, mode="nearest")[: len(norms)]
