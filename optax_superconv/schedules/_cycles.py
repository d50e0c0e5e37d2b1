"""Which cycles repeat?"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import wide_dtype
from optax_superconv.schedules import _phases


def cyclical_schedule(
    base_value: ArrayLike,
    peak_value: ArrayLike,
    steps_up: int,
    steps_down: int | None = None,
    *,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: ArrayLike = 1.0,
) -> optax.Schedule:
    r"""Cycles linearly between ``base_value`` and ``peak_value``, for ever.

    .. math:: v(t) = b + (M - b)\, x_t\, k_t

    where :math:`b` is ``base_value`` and :math:`M` is ``peak_value``. :math:`x_t` rises
    from 0 to 1 in ``steps_up`` steps and falls back to 0 in ``steps_down`` steps. The
    factor :math:`k_t` of the amplitude depends on ``mode``. In the paper's text, both
    bounds of ``"exp_range"`` decline. Here only the amplitude declines, as in PyTorch.

    Args:
      base_value: Value at the ends of each cycle, at least 0. It may be above
        ``peak_value``, for a momentum that cycles the other way.
      peak_value: Value at step ``steps_up``, at least 0. In mode ``"exp_range"`` the
        amplitude is already smaller there.
      steps_up: Steps from base to peak, at least 1.
      steps_down: Steps from peak to base, at least 1. None is ``steps_up``.
      mode: ``"triangular"``: :math:`k_t` is 1. ``"triangular2"``: it is :math:`2^{-c}`
        in cycle c = 0, 1, ... ``"exp_range"``: it is :math:`\gamma^t`.
      gamma: Factor :math:`\gamma` per step in mode ``"exp_range"``, in (0, 1]. The
        default of 1 keeps the amplitude constant. Other modes do not use it.

    Returns:
      A schedule that broadcasts over counts and values; see :func:`phase_schedule`.

    Examples:
      >>> import optax_superconv as osc
      >>> schedule = osc.cyclical_schedule(0.001, 0.006, 2000, mode="triangular2")
      >>> print([round(float(schedule(t)), 4) for t in (0, 1000, 2000, 4000, 6000)])
      [0.001, 0.0035, 0.006, 0.001, 0.0035]

    References:
      Smith, `Cyclical Learning Rates for Training Neural Networks
      <https://arxiv.org/abs/1506.01186>`_, 2017 (section 3).
    """
    _checks.number("base_value", base_value, _checks.NON_NEGATIVE)
    _checks.number("peak_value", peak_value, _checks.NON_NEGATIVE)
    up = _checks.steps("steps_up", steps_up, at_least=1)
    down = up
    if steps_down is not None:
        down = _checks.steps("steps_down", steps_down, at_least=1)
    _checks.steps("steps_up + steps_down", up + down)
    _checks.choice("mode", mode, ("triangular", "triangular2", "exp_range"))
    concrete_gamma = _checks.number("gamma", gamma, _checks.FRACTION)

    def schedule(count: ArrayLike) -> jax.Array:
        dtype = wide_dtype(base_value, peak_value)
        base, peak = jnp.asarray(base_value, dtype), jnp.asarray(peak_value, dtype)
        count = jnp.maximum(_phases.as_count(count, dtype), 0)
        step = count % (up + down)
        is_up = step <= up
        length = jnp.where(is_up, up, down).astype(dtype)
        to_peak = jnp.where(is_up, up - step, step - up).astype(dtype) / length
        to_base = jnp.where(is_up, step, up + down - step).astype(dtype) / length
        scale = jnp.ones([], dtype)
        if mode == "triangular2":
            scale = jnp.exp2(-(count // (up + down)).astype(dtype))
        elif mode == "exp_range":
            # The logarithm of gamma is in float64, because the count multiplies it.
            log_gamma = (
                jnp.log(gamma) if concrete_gamma is None else np.log(concrete_gamma)
            )
            scale = jnp.exp(jnp.asarray(log_gamma, dtype) * count.astype(dtype))
        # Computed from the smaller end, so that it keeps its relative precision.
        from_base = base + (peak - base) * to_base * scale
        from_peak = peak + (base - peak) * (to_peak + to_base * (1 - scale))
        return jnp.where(base < peak, from_base, from_peak)

    return schedule
