r"""Which value at which step?

:func:`phase_schedule` answers. It joins phases, and each phase moves from the value
before it, :math:`S`, to its own ``end_value``, :math:`E`,

.. math:: v(t) = E + (S - E)\, g(r), \qquad r = \text{remaining steps} / \text{steps},

with a shape :math:`g` from :math:`g(1) = 1` to :math:`g(0) = 0`. Many schedules are
such lists of phases. One-cycle is a rise and a fall of the rate. Its momentum is a fall
and a rise. Slanted triangles, flat then cosine, warm restarts and SWA's schedule are
other lists.

A named shape computes a fall from the steps that remain, and a rise from the steps that
have elapsed. So the small end of a phase keeps its relative precision in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks

Shape = (
    Literal["linear", "cosine", "1-sqrt", "exponential"]
    | Callable[[ArrayLike], ArrayLike]
)


class Phase(NamedTuple):
    """One phase of a schedule: its length, its end and its curve.

    Attributes:
      steps: Length in steps, a Python int of at least 0. A phase of 0 steps is a jump.
      end_value: Value at the end of the phase, a finite number or an array of them.
      shape: ``"linear"``, ``"cosine"``, ``"1-sqrt"``, ``"exponential"`` or a function.
        ``"exponential"`` is geometric, and both ends of the phase must be above 0. A
        function takes an array of remaining fractions and goes from g(1) = 1 to
        g(0) = 0.

    Examples:
      >>> import optax_superconv as osc
      >>> osc.Phase(10, end_value=0.1)
      Phase(steps=10, end_value=0.1, shape='linear')
    """

    steps: int
    end_value: ArrayLike
    shape: Shape = "linear"


# Each shape as g(remaining) and as 1 - g(remaining). Both are free of cancellation.
_FALLS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "linear": lambda remaining, elapsed: remaining,
    "cosine": lambda remaining, elapsed: jnp.sin(0.5 * math.pi * remaining) ** 2,
    "1-sqrt": lambda remaining, elapsed: remaining / (1 + jnp.sqrt(elapsed)),
}
_RISES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "linear": lambda remaining, elapsed: elapsed,
    "cosine": lambda remaining, elapsed: jnp.sin(0.5 * math.pi * elapsed) ** 2,
    "1-sqrt": lambda remaining, elapsed: jnp.sqrt(elapsed),
}


def check_shape(name: str, shape: Shape) -> None:
    if not callable(shape):
        _checks.choice(name, shape, (*_FALLS, "exponential"))
        return
    with jax.ensure_compile_time_eval():
        ends = shape(jnp.asarray([1.0, 0.0]))
    if isinstance(ends, jax.core.Tracer):
        return
    _checks.require(
        np.shape(ends) == (2,) and np.allclose(ends, [1.0, 0.0], atol=1e-6),
        name,
        "a function of an array with shape(1) == 1 and shape(0) == 0",
        f"{ends} at [1, 0]",
    )


def check_positive(name: str, value: Any) -> None:
    rule = 'above 0 with shape="exponential"'
    _checks.number(name, value, rule, lambda array: array > 0)


def check_cycle(
    values: dict[str, Any],
    shape: Any,
    rule: str = "finite and at least 0",
    holds: Callable[[np.ndarray], np.ndarray] = _checks.non_negative,
) -> None:
    """Checks the values that a cycle moves between. The first one is the largest."""
    check_shape("shape", shape)
    (top_name, top_value), *others = values.items()
    top = _checks.number(top_name, top_value, rule, holds)
    for name, value in others:
        low = _checks.number(name, value, rule, holds)
        if low is not None and top is not None:
            limit = f"at most `{top_name}` ({top_value})"
            _checks.require(np.all(low <= top), name, limit, value)
    if shape == "exponential":
        for name, value in values.items():
            check_positive(name, value)


def float_dtype(*values: ArrayLike) -> np.dtype:
    """The widest float dtype among the values, at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*values)
    wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 4
    return dtype if wide else np.dtype(jnp.float32)


def as_count(count: ArrayLike, dtype: np.dtype) -> jax.Array:
    """A whole count in int32 or wider, any other count in ``dtype``."""
    if not isinstance(count, jax.Array):  # JAX would wrap what int32 does not hold.
        count = np.clip(count, -_checks.MAX_STEPS, _checks.MAX_STEPS)
    count = jnp.asarray(count)
    if not jnp.issubdtype(count.dtype, jnp.integer):
        return count.astype(dtype)
    return count.astype(jnp.int32) if count.dtype.itemsize < 4 else count


def _interpolate(
    start: jax.Array,
    end: jax.Array,
    shape: Shape,
    elapsed: jax.Array,
    remaining: jax.Array,
) -> jax.Array:
    """The value between ``start`` and ``end``. The fractions are strictly in (0, 1)."""
    rising = end > start
    if shape == "exponential":
        log_ratio = jnp.log(end) - jnp.log(start)
        up = start * jnp.exp(elapsed * log_ratio)
        down = end * jnp.exp(-remaining * log_ratio)
    else:
        if callable(shape):
            fall = jnp.asarray(shape(remaining), remaining.dtype)
            rise = 1 - fall
        else:
            fall = _FALLS[shape](remaining, elapsed)
            rise = _RISES[shape](remaining, elapsed)
        up = start + (end - start) * rise
        down = end + (start - end) * fall
    value = jnp.where(rising, up, down)
    # Rounding must not move a value beyond the ends: the peak is exact.
    low, high = jnp.where(rising, start, end), jnp.where(rising, end, start)
    return jnp.where(value < low, low, jnp.where(value > high, high, value))


def move(
    start: jax.Array,
    end: jax.Array,
    shape: Shape,
    elapsed: jax.Array,
    steps: int | jax.Array,
) -> jax.Array:
    """The value after ``elapsed`` of the ``steps`` of a phase, exact at both ends."""
    dtype = start.dtype
    remaining = steps - elapsed
    inside = (elapsed > 0) & (remaining > 0)
    # A shape may have no derivative at its ends, so it is not evaluated there.
    # XLA turns a division by a constant length into a product with its inverse. This
    # is such a product, so that a length that is data gives the same bits.
    per_step = 1 / jnp.maximum(steps, 1).astype(dtype)
    fractions = (
        jnp.where(inside, part.astype(dtype) * per_step, 0.5)
        for part in (elapsed, remaining)
    )
    curve = _interpolate(start, end, shape, *fractions)
    return jnp.where(inside, curve, jnp.where(elapsed > 0, end, start))


def phase_schedule(
    init_value: ArrayLike, phases: Iterable[Phase | tuple]
) -> optax.Schedule:
    r"""Moves through ``phases``, then stays at the last value.

    .. math:: v(t) = E_k + (S_k - E_k)\, g_k(r), \qquad r = (b_{k+1} - t) / n_k

    is the value in phase k. This phase lasts :math:`n_k` steps, up to step
    :math:`b_{k+1}`. It starts at :math:`S_k`, where the phase before ends, and ends at
    :math:`E_k`. The shapes are

    * ``"linear"``: :math:`g(r) = r`,
    * ``"cosine"``: :math:`g(r) = \sin^2(\pi r / 2)`,
    * ``"1-sqrt"``: :math:`g(r) = 1 - \sqrt{1 - r}`,
    * ``"exponential"``: :math:`v = S^r E^{1-r}`.

    Args:
      init_value: Value at step 0, a finite number or an array of them.
      phases: The phases in order, as :class:`Phase` or plain tuples. Without phases the
        schedule is constant. Together they have at most 2**31 - 1 steps. A phase of 0
        steps is a jump: at the step where it begins, the schedule is already at its
        ``end_value``.

    Returns:
      A schedule ``count -> value``. It broadcasts over counts and values. It holds
      ``init_value`` before step 0 and the last ``end_value`` from the last step on. It
      is float32, or float64 if a value is. The values may be traced, batched by
      ``vmap`` or differentiated. The durations are Python ints.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> schedule = osc.phase_schedule(0.0, [
      ...     osc.Phase(2, 1.0), osc.Phase(1, 1.0), osc.Phase(2, 0.1, "exponential")])
      >>> print([round(float(value), 3) for value in schedule(jnp.arange(7))])
      [0.0, 0.5, 1.0, 1.0, 0.316, 0.1, 0.1]

    References:
      Loshchilov and Hutter, `SGDR: Stochastic Gradient Descent with Warm Restarts
      <https://arxiv.org/abs/1608.03983>`_, 2017 (the cosine shape, eq. 5);
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024 (1-sqrt).
    """
    _checks.number("init_value", init_value)
    checked: list[Phase] = []
    start_name, start = "init_value", init_value
    for k, item in enumerate(phases):
        if not isinstance(item, tuple):
            raise TypeError(
                f"`phases[{k}]` must be a Phase or a tuple (steps, end_value, shape), "
                f"got {item!r} of type {type(item).__name__}."
            )
        phase = item if isinstance(item, Phase) else Phase(*item)
        name = f"phases[{k}]"
        phase = phase._replace(steps=_checks.steps(f"{name}.steps", phase.steps))
        _checks.number(f"{name}.end_value", phase.end_value)
        check_shape(f"{name}.shape", phase.shape)
        if phase.shape == "exponential" and phase.steps > 0:
            check_positive(start_name, start)
            check_positive(f"{name}.end_value", phase.end_value)
        checked.append(phase)
        start_name, start = f"{name}.end_value", phase.end_value
    _checks.steps("phases", sum(phase.steps for phase in checked))

    def schedule(count: ArrayLike) -> jax.Array:
        dtype = float_dtype(init_value, *(phase.end_value for phase in checked))
        count = as_count(count, dtype)
        begin = 0
        value = start = jnp.asarray(init_value, dtype)
        for phase in checked:
            end = jnp.asarray(phase.end_value, dtype)
            if phase.steps == 0:
                value = jnp.where(count >= begin, end, value)
            else:
                # Subtract as integers: float32 does not hold counts above 2**24.
                elapsed = jnp.clip(count, begin, begin + phase.steps) - begin
                moved = move(start, end, phase.shape, elapsed, phase.steps)
                value = jnp.where(elapsed > 0, moved, value)
            begin += phase.steps
            start = end
        return jnp.broadcast_to(value, jnp.broadcast_shapes(count.shape, value.shape))

    return schedule


def _onecycle(
    total_steps: int,
    warmup_steps: int | None,
    annihilation_steps: int,
    init_value: ArrayLike,
    peak_value: ArrayLike,
    end_value: ArrayLike,
    shape: Shape,
) -> optax.Schedule:
    """Moves from the initial value to the peak, back to it, and then to the end."""
    total_steps = _checks.steps("total_steps", total_steps, at_least=1)
    if warmup_steps is None:
        warmup_steps = round(0.3 * total_steps)
    below = f"less than `total_steps` ({total_steps})"
    warmup_steps = _checks.steps("warmup_steps", warmup_steps, below=below)
    _checks.require(
        warmup_steps < total_steps,
        "warmup_steps",
        f"at least 0 and {below}",
        warmup_steps,
    )
    annihilation_steps = _checks.steps("annihilation_steps", annihilation_steps)
    _checks.require(
        warmup_steps + annihilation_steps <= total_steps,
        "warmup_steps + annihilation_steps",
        f"at most `total_steps` ({total_steps})",
        f"{warmup_steps} + {annihilation_steps}",
    )
    phases = [Phase(warmup_steps, peak_value, shape)]
    fall_steps = total_steps - warmup_steps - annihilation_steps
    if annihilation_steps and fall_steps:
        phases.append(Phase(fall_steps, init_value, shape))
    # If no step is left for the return, the annihilation starts at the peak.
    phases.append(Phase(annihilation_steps or fall_steps, end_value, shape))
    return phase_schedule(init_value, phases)


def onecycle_schedule(
    peak_value: ArrayLike,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    init_value: ArrayLike | None = None,
    end_value: ArrayLike = 0.0,
    annihilation_steps: int = 0,
    shape: Shape = "cosine",
) -> optax.Schedule:
    r"""One cycle of the learning rate: up to the peak, then down to the end.

    .. math::
      \eta_t = \begin{cases}
        \eta_0 + (M - \eta_0)\,(1 - g(1 - t/W)) & t \le W \\
        E + (M - E)\, g\big((T - t)/(T - W)\big) & t > W
      \end{cases}

    with peak :math:`M`, warm-up :math:`W`, total :math:`T`, initial value
    :math:`\eta_0`, end :math:`E` and shape :math:`g`. With ``annihilation_steps`` = A
    the rate is back at its initial value at step T - A. From there it falls to the end,
    as in the paper.

    It differs from other implementations:

    1. The run is steps 0 to T - 1, and ``end_value`` belongs to step T. So every step
       trains. ``end_value`` also holds after step T. PyTorch reaches its end at step
       T - 1. At step T its rate can be negative (linear) or rises again (cosine), and
       any later step raises an error.
    2. Durations are whole steps. So the rate reaches the peak exactly, for every T.
    3. ``end_value`` is a value, not a divisor of the peak or of the initial value.

    Args:
      peak_value: The highest rate, at least 0. The rate at step ``warmup_steps`` is
        exactly this.
      total_steps: Steps of the whole run, at least 1.
      warmup_steps: Steps up to the peak, at least 0 and less than ``total_steps``. None
        is ``round(0.3 * total_steps)``.
      init_value: Rate at step 0, at least 0 and at most the peak. Without warm-up steps
        the run starts at the peak. None is ``peak_value / 25``.
      end_value: Rate from step ``total_steps`` on, at least 0 and at most the peak.
        With ``annihilation_steps`` it is at most ``init_value``.
      annihilation_steps: Steps of the final fall from the initial value, at least 0. 0
        means that the rate falls from the peak to ``end_value`` in one phase. Warm-up
        and annihilation together are at most ``total_steps``. If they fill the run, the
        final fall starts at the peak.
      shape: Shape of every phase; see :class:`Phase`. ``"exponential"`` needs all three
        values above 0, so it needs an ``end_value``, whose default is 0.

    Returns:
      A schedule ``count -> value``; see :func:`phase_schedule`.

    Examples:
      >>> import optax_superconv as osc
      >>> schedule = osc.onecycle_schedule(1.0, 10, warmup_steps=4, shape="linear")
      >>> print([round(float(schedule(t)), 3) for t in (0, 2, 4, 7, 10, 99)])
      [0.04, 0.52, 1.0, 0.5, 0.0, 0.0]

    References:
      Smith and Topin, `Super-Convergence: Very Fast Training of Neural Networks Using
      Large Learning Rates <https://arxiv.org/abs/1708.07120>`_, 2018;
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018 (section 4.1).
    """
    _checks.number("peak_value", peak_value)
    if init_value is None:
        init_value = cast(jax.Array, peak_value) / 25  # Or a number, likewise.
    values = {
        "peak_value": peak_value,
        "init_value": init_value,
        "end_value": end_value,
    }
    check_cycle(values, shape)
    if annihilation_steps:
        check_cycle({"init_value": init_value, "end_value": end_value}, shape)
    return _onecycle(
        total_steps,
        warmup_steps,
        annihilation_steps,
        init_value,
        peak_value,
        end_value,
        shape,
    )


def onecycle_momentum_schedule(
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    max_momentum: ArrayLike = 0.95,
    base_momentum: ArrayLike = 0.85,
    annihilation_steps: int = 0,
    shape: Shape = "cosine",
) -> optax.Schedule:
    r"""One cycle of the momentum: down to the lowest value, then up again.

    .. math:: \beta_t = \beta_{\max} - (\beta_{\max} - \beta_{\text{base}})
              \frac{\eta_t - \eta_0}{M - \eta_0}

    is the mirror image of the rate :math:`\eta_t` of :func:`onecycle_schedule` with
    ``end_value`` = ``init_value``. (With the geometric ``"exponential"`` shape it is
    not.) In Smith's experiments (2018, table 1) this cycle does as well as the best
    constant momentum, and its two bounds need no search.

    Args:
      total_steps: Steps of the whole run, at least 1.
      warmup_steps: Steps down to ``base_momentum``, at least 0 and less than
        ``total_steps``. None is ``round(0.3 * total_steps)``.
      max_momentum: Momentum at step 0 and from step ``total_steps`` on, in [0, 1).
        Without warm-up steps the run starts at ``base_momentum``.
      base_momentum: The lowest momentum, in [0, 1) and at most ``max_momentum``. The
        momentum at step ``warmup_steps`` is exactly this.
      annihilation_steps: Steps at the end with the maximal momentum, at least 0. 0
        means that the momentum reaches its maximum at step ``total_steps``. Warm-up and
        annihilation together are at most ``total_steps``. If they fill the run, the
        momentum rises during the annihilation.
      shape: Shape of every phase; see :class:`Phase`. ``"exponential"`` needs both
        momenta above 0.

    Returns:
      A schedule ``count -> value``; see :func:`phase_schedule`.

    Examples:
      >>> import optax_superconv as osc
      >>> schedule = osc.onecycle_momentum_schedule(10, warmup_steps=4, shape="linear")
      >>> print([round(float(schedule(t)), 3) for t in (0, 2, 4, 7, 10, 99)])
      [0.95, 0.9, 0.85, 0.9, 0.95, 0.95]

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018 (section 4.2).
    """
    values = {"max_momentum": max_momentum, "base_momentum": base_momentum}
    check_cycle(values, shape, _checks.DECAY_RULE, _checks.decay_rate)
    return _onecycle(
        total_steps,
        warmup_steps,
        annihilation_steps,
        max_momentum,
        base_momentum,
        max_momentum,
        shape,
    )


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
    rule = "finite and at least 0"
    _checks.number("base_value", base_value, rule, _checks.non_negative)
    _checks.number("peak_value", peak_value, rule, _checks.non_negative)
    up = _checks.steps("steps_up", steps_up, at_least=1)
    down = up
    if steps_down is not None:
        down = _checks.steps("steps_down", steps_down, at_least=1)
    _checks.steps("steps_up + steps_down", up + down)
    _checks.choice("mode", mode, ("triangular", "triangular2", "exp_range"))
    concrete_gamma = _checks.number(
        "gamma", gamma, "above 0 and at most 1", lambda g: (g > 0) & (g <= 1)
    )

    def schedule(count: ArrayLike) -> jax.Array:
        dtype = float_dtype(base_value, peak_value)
        base, peak = jnp.asarray(base_value, dtype), jnp.asarray(peak_value, dtype)
        count = jnp.maximum(as_count(count, dtype), 0)
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
