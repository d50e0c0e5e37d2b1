r"""Which peak suits another schedule, if one schedule's is known?

A schedule that spends longer near its peak wants a lower one. How much lower follows
from the bound on the last iterate of SGD with rates :math:`\gamma s_t`, for a convex
function with gradients of at most G, started at a distance D of its minimum,

.. math::
  \frac{D^2}{\gamma}\, t_1 + \gamma\, G^2 (t_2 + t_3), \qquad
  t_1 = \frac{1}{2 A_1}, \quad t_2 = \frac{C_1}{2 A_1}, \quad
  t_3 = \frac12 \sum_{k<T} \frac{s_k}{A_{k+1}} \frac{C_k}{A_k},

where :math:`A_k` and :math:`C_k` are the sums of s and of :math:`s^2` from step k to
the last. Its minimum is at :math:`\gamma^* = (D/G) \sqrt{t_1 / (t_2 + t_3)}`. D and G
belong to the task, so they cancel where two schedules are compared.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np
import optax

from optax_superconv import _checks

# JAX evaluates longer runs at once. It then rounds otherwise, and the last rates of a
# decay are so small that this moves a peak by up to 1e-7.
_LONG = 1024
_NOTHING = 1e-12  # Of the highest rate. What rounding leaves of 0 is below.


def transfer_peak(
    peak: float,
    from_schedule: optax.Schedule | float,
    to_schedule: optax.Schedule | float,
    total_steps: int,
    *,
    to_total_steps: int | None = None,
) -> float:
    r"""Carries a peak tuned for one schedule to another schedule or length.

    .. math::
      P' = P\, \frac{\gamma'}{\gamma}, \qquad
      \gamma = \bigg( C_1 + A_1 \sum_{k<T} \frac{s_k}{A_{k+1}} \frac{C_k}{A_k}
      \bigg)^{-1/2}, \quad
      A_k = \sum_{p=k}^{T} s_p, \quad C_k = \sum_{p=k}^{T} s_p^2

    with the peak P and the rates s of a schedule, divided by the highest of them;
    :math:`\gamma'` is that of the other schedule. This is the best constant factor of
    each schedule in the bound for the last iterate of a convex Lipschitz function under
    SGD without momentum (theorem 10 of Defazio et al.). For other optimizers, Adam for
    instance, and for networks it is a start, to be tuned further. The bound does not
    know how far the curvature lets a rate go, so with SGD a peak that is carried up may
    be unstable.

    Steps at a rate of 0 change nothing, so they are left out, and with them those below
    1e-12 of the highest rate, which rounding leaves of 0. For a schedule that ends on a
    few steps at a rate far below the ones before, the bound says little, and the peak
    comes out too low.

    Args:
      peak: The peak that is known, above 0. It may be traced, then it is not
        checked, and the result is traced as well.
      from_schedule: The schedule that it was tuned for, or a number for a constant
        rate. Only its shape matters: all values may have any common factor. At steps 0
        to ``total_steps - 1`` it is finite and at least 0, and not always 0.
      to_schedule: The schedule whose peak is asked for, likewise.
      total_steps: Steps of the whole run, at least 1. Each schedule is evaluated at
        every step.
      to_total_steps: Steps of the run with ``to_schedule``, at least 1. None is
        ``total_steps``.

    Returns:
      The peak for ``to_schedule``, which is its highest value within the run.

    Raises:
      TypeError: Under ``jit``, for a schedule of traced values.

    Examples:
      >>> import optax
      >>> import optax_superconv as osc
      >>> linear = optax.linear_schedule(1.0, 0.0, 1000)
      >>> cosine = optax.cosine_decay_schedule(1.0, 1000)
      >>> print(f"{osc.transfer_peak(0.1, linear, cosine, 1000):.4f}")
      0.0972
      >>> print(f"{osc.transfer_peak(0.1, linear, 1.0, 1000):.4f}")  # To a constant.
      0.0345

    References:
      Defazio, Cutkosky, Mehta and Mishchenko, `Optimal Linear Decay Learning Rate
      Schedules and Further Refinements <https://arxiv.org/abs/2310.07831>`_, 2023;
      Schaipp, Hägele, Taylor, Simsekli and Bach, `The Surprising Agreement Between
      Convex Optimization Theory and Learning-Rate Scheduling for Large Model Training
      <https://arxiv.org/abs/2501.18965>`_, 2025.
    """
    _checks.single_number("peak", peak, _checks.POSITIVE)
    total = _checks.steps("total_steps", total_steps, at_least=1)
    to_total = total
    if to_total_steps is not None:
        to_total = _checks.steps("to_total_steps", to_total_steps, at_least=1)
    known = _best_factor(_shape("from_schedule", from_schedule, total))
    asked = _best_factor(_shape("to_schedule", to_schedule, to_total))
    return peak * (asked / known)


def _best_factor(rates: np.ndarray) -> float:
    """In units of D / G, for rates above 0."""
    sums = np.cumsum(rates[::-1])[::-1]
    squares = np.cumsum(rates[::-1] ** 2)[::-1]
    terms = rates[:-1] / sums[1:] * (squares[:-1] / sums[:-1])
    return 1 / math.sqrt(squares[0] + sums[0] * terms.sum())


def _shape(name: str, schedule: Any, total: int) -> np.ndarray:
    """The rates above 0 of a run, over the highest."""
    _checks.number_or_schedule(name, schedule, _checks.POSITIVE)
    if not callable(schedule):
        return np.ones(total)
    rates = _evaluate(name, schedule, total)
    size = rates.shape
    _checks.require(size == (total,), name, "one number a step", f"shape {size}")
    good = np.isfinite(rates) & (rates >= 0)
    first = int(np.argmin(good))
    rule, got = "finite and at least 0 at every step", f"{rates[first]} at step {first}"
    _checks.require(good[first], name, rule, got)
    highest = rates.max()
    _checks.require(highest > 0, name, "above 0 at some step of the run", "0 at all")
    shape = rates / highest
    return shape[shape > _NOTHING]


def _evaluate(name: str, schedule: Callable[[Any], Any], total: int) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        rates = None
        if total > _LONG and isinstance(schedule(0), jax.Array):
            with contextlib.suppress(TypeError, IndexError):
                rates = jax.vmap(schedule)(np.arange(total, dtype=np.int32))
        if rates is None:  # Short, or of Python, which is quick and in float64.
            rates = [schedule(count) for count in range(total)]
    if any(isinstance(rate, jax.core.Tracer) for rate in jax.tree.leaves(rates)):
        raise TypeError(
            f"`{name}` must be a schedule of known values, got traced ones. Only its "
            "shape matters, so build it around a number."
        )
    return np.asarray(rates, np.float64)
