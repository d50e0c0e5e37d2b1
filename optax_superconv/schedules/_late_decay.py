r"""When should the rate fall? Late, and from the value that it has then.

A run can hold a large rate and decay it only at the end. Its minimum is as good as that
of a run that decays from the start (Hägele et al., 2024). Its length need not be known
beforehand, and a cooldown can start from any of its checkpoints. :func:`with_cooldown`
ends any schedule this way,

.. math:: v(t) = E + (v_b - E)\, g\big((T - t)/C\big), \qquad b = T - C \le t \le T,

where :math:`T` is ``total_steps``, :math:`C` is ``cooldown_steps``, :math:`E` is
``end_value`` and :math:`g` is the shape. :math:`v_b` is the schedule's value at step b,
where the cooldown begins. :func:`warmup_stable_decay_schedule` is a warm-up and a
constant with such an end.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import wide_dtype
from optax_superconv.schedules import _phases
from optax_superconv.schedules._onecycle import check_cycle
from optax_superconv.schedules._phases import Phase, Shape, phase_schedule


def warmup_stable_decay_schedule(
    peak_value: ArrayLike,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    init_value: ArrayLike = 0.0,
    end_value: ArrayLike = 0.0,
    shape: Shape = "1-sqrt",
) -> optax.Schedule:
    r"""A linear warm-up, a constant, and a decay over the last steps.

    .. math::
      \eta_t = \begin{cases}
        \eta_0 + (M - \eta_0)\, t/W & t \le W \\
        M & W < t \le T - D \\
        E + (M - E)\, g\big((T - t)/D\big) & t > T - D
      \end{cases}

    with peak :math:`M`, warm-up :math:`W`, decay :math:`D`, total :math:`T`, initial
    value :math:`\eta_0`, end :math:`E` and shape :math:`g`. If there are warm-up steps,
    the default ``init_value`` of 0 means that the first update changes no parameter.

    It differs from other implementations:

    1. ``end_value`` belongs to step T, one step after the last update, and it also
       holds after step T. transformers, timm and levanter have it at step T too.
       MaxText reaches it at step T - 1, since its linear decay takes D - 1 steps.
    2. Durations are whole steps. MaxText and levanter truncate a fraction of the run.
    3. ``end_value`` is a value, not a ratio to the peak. In transformers the warm-up
       also starts at the end value. Here it starts at ``init_value``.
    4. ``"exponential"`` is geometric. It is MiniCPM's halving every h steps for
       ``end_value = peak_value * 0.5 ** (decay_steps / h)``. timm's ``"exp"`` has
       another form, so that it can reach 0.

    Args:
      peak_value: The constant rate, at least 0. The rate at step ``warmup_steps`` is
        exactly this.
      total_steps: Steps of the whole run, at least 1.
      warmup_steps: Steps up to the peak, at least 0 and less than ``total_steps``.
      decay_steps: Steps of the decay, at least 1. Warm-up and decay together are at
        most ``total_steps``. None is ``round(0.2 * total_steps)``, but at least 1, and
        at most the number of steps that the warm-up leaves.
      init_value: Rate at step 0, at least 0 and at most the peak. Without warm-up steps
        the run starts at the peak.
      end_value: Rate from step ``total_steps`` on, at least 0 and at most the peak.
      shape: Shape of the decay; see :class:`Phase`. ``"exponential"`` needs
        ``peak_value`` and ``end_value`` above 0, so it needs an ``end_value``, whose
        default is 0.

    Returns:
      A schedule ``count -> value``; see :func:`phase_schedule`.

    Examples:
      >>> import optax_superconv as osc
      >>> schedule = osc.warmup_stable_decay_schedule(
      ...     1.0, 100, warmup_steps=10, decay_steps=20)
      >>> print([round(float(schedule(t)), 4) for t in (0, 5, 10, 80, 85, 90, 100)])
      [0.0, 0.5, 1.0, 1.0, 0.5, 0.2929, 0.0]

    References:
      Hu et al., `MiniCPM: Unveiling the Potential of Small Language Models with
      Scalable Training Strategies <https://arxiv.org/abs/2404.06395>`_, 2024;
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024 (1-sqrt).
    """
    total = _checks.steps("total_steps", total_steps, at_least=1)
    of = "total_steps", total
    warmup = _checks.steps("warmup_steps", warmup_steps, below=of)
    if decay_steps is None:
        decay_steps = min(max(round(0.2 * total), 1), total - warmup)
    decay = _checks.steps("decay_steps", decay_steps, at_least=1)
    _checks.steps("warmup_steps + decay_steps", warmup + decay, at_most=of)
    check_cycle({"peak_value": peak_value, "init_value": init_value}, "linear")
    check_cycle({"peak_value": peak_value, "end_value": end_value}, shape)
    phases = [
        Phase(warmup, peak_value),
        Phase(total - warmup - decay, peak_value),
        Phase(decay, end_value, shape),
    ]
    return phase_schedule(init_value, phases)


def with_cooldown(
    schedule: optax.ScalarOrSchedule,
    total_steps: int,
    cooldown_steps: int,
    *,
    end_value: ArrayLike = 0.0,
    shape: Shape = "1-sqrt",
) -> optax.Schedule:
    r"""Follows ``schedule``, then moves to ``end_value`` in ``cooldown_steps``.

    .. math::
      v(t) = \begin{cases}
        s(t) & t \le T - C \\
        E + \big(s(T - C) - E\big)\, g\big((T - t)/C\big) & t > T - C
      \end{cases}

    with schedule :math:`s`, total :math:`T`, cooldown :math:`C`, end :math:`E` and
    shape :math:`g`. During the cooldown :math:`s` is frozen at its value at step T - C.
    Several cooldowns of one long run differ only in ``total_steps``. They share every
    step before the first of them begins.

    Args:
      schedule: A schedule ``count -> value``, of a rate or of anything else, or a
        finite number, which is a constant.
      total_steps: Step at which ``end_value`` is reached, at least 1.
      cooldown_steps: Steps of the cooldown, at least 1 and at most ``total_steps``.
      end_value: Value from step ``total_steps`` on, a finite number or an array of
        them. It may be above the schedule, for a momentum that rises.
      shape: Shape of the cooldown; see :class:`Phase`. ``"exponential"`` needs
        a schedule that is above 0 at step T - C, and an ``end_value`` above 0, whose
        default is 0.

    Returns:
      A schedule that broadcasts over counts and values; see :func:`phase_schedule`.

    Examples:
      >>> import optax
      >>> import optax_superconv as osc
      >>> cosine = optax.cosine_decay_schedule(1.0, 100)
      >>> schedule = osc.with_cooldown(cosine, 60, 10, shape="linear")
      >>> print([round(float(schedule(t)), 2) for t in (0, 25, 50, 55, 60, 99)])
      [1.0, 0.85, 0.5, 0.25, 0.0, 0.0]

    References:
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024;
      Zhai et al., `Scaling Vision Transformers <https://arxiv.org/abs/2106.04560>`_,
      2022 (a cooldown from any checkpoint).
    """
    total = _checks.steps("total_steps", total_steps, at_least=1)
    of = "total_steps", total
    length = _checks.steps("cooldown_steps", cooldown_steps, at_least=1, at_most=of)
    if not callable(schedule):
        _checks.number("schedule", schedule)
    _checks.number("end_value", end_value)
    _phases.check_shape("shape", shape)
    begin = total - length

    def before(count: Any) -> ArrayLike:
        return schedule(count) if callable(schedule) else cast(ArrayLike, schedule)

    if shape == "exponential":
        _phases.check_positive("end_value", end_value)
        with jax.ensure_compile_time_eval():
            _phases.check_positive(
                f"schedule({begin})", before(jnp.asarray(begin, jnp.int32))
            )

    def cooled(count: ArrayLike) -> jax.Array:
        count = _phases.as_count(count, wide_dtype(end_value))
        value = before(jnp.minimum(count, begin))
        dtype = wide_dtype(value, end_value)
        start, end = jnp.asarray(value, dtype), jnp.asarray(end_value, dtype)
        # Subtract as integers: float32 does not hold counts above 2**24.
        elapsed = jnp.clip(count, begin, total) - begin
        return _phases.move(start, end, shape, elapsed, length)

    return cooled
