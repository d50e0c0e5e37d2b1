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
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import wide_dtype

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
    rule = _checks.Rule('above 0 with shape="exponential"', lambda x: x > 0)
    _checks.number(name, value, rule)


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
    phases = _checks.items("phases", phases, "phases in a sequence")
    checked: list[Phase] = []
    start_name, start = "init_value", init_value
    for k, item in enumerate(phases):
        if not isinstance(item, tuple) or not 2 <= len(item) <= 3:
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
        dtype = wide_dtype(init_value, *(phase.end_value for phase in checked))
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
