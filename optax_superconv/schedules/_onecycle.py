"""Which rate rises once and falls, and which momentum against it?"""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv.schedules import _phases
from optax_superconv.schedules._phases import Phase, Shape, phase_schedule


def check_cycle(
    values: dict[str, Any],
    shape: Any,
    rule: _checks.Rule = _checks.NON_NEGATIVE,
) -> None:
    """Checks the values that a cycle moves between. The first one is the largest."""
    _phases.check_shape("shape", shape)
    (top_name, top_value), *others = values.items()
    top = _checks.number(top_name, top_value, rule)
    for name, value in others:
        low = _checks.number(name, value, rule)
        if low is not None and top is not None:
            limit = f"at most `{top_name}` ({top_value})"
            _checks.require(np.all(low <= top), name, limit, value)
    if shape == "exponential":
        for name, value in values.items():
            _phases.check_positive(name, value)


def _checked_init(
    kind: str,
    peak: ArrayLike,
    init: ArrayLike | None,
    end: ArrayLike,
    annihilation_steps: Any,
    shape: Shape,
) -> ArrayLike:
    """The initial rate; the rates are checked as ``peak_<kind>`` and the like."""
    _checks.number(f"peak_{kind}", peak)
    if annihilation_steps is not None:
        _checks.steps("annihilation_steps", annihilation_steps)
    if init is None:
        init = cast(jax.Array, peak) / 25  # Or a number, likewise.
    lower = {f"init_{kind}": init, f"end_{kind}": end}
    check_cycle({f"peak_{kind}": peak} | lower, shape)
    if annihilation_steps:
        check_cycle(lower, shape)
    return init


def _onecycle(
    total: tuple[str, int],
    warmup_steps: int | None,
    annihilation_steps: int,
    values: tuple[ArrayLike, ArrayLike, ArrayLike],
    shape: Shape,
) -> optax.Schedule:
    """Moves from the initial value to the peak, back to it, and then to the end."""
    init_value, peak_value, end_value = values
    total_steps = _checks.steps(*total, at_least=1)
    if warmup_steps is None:
        warmup_steps = round(0.3 * total_steps)
    total = total[0], total_steps
    warmup_steps = _checks.steps("warmup_steps", warmup_steps, below=total)
    annihilation_steps = _checks.steps("annihilation_steps", annihilation_steps)
    both = warmup_steps + annihilation_steps
    _checks.steps("warmup_steps + annihilation_steps", both, at_most=total)
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
    init = _checked_init(
        "value", peak_value, init_value, end_value, annihilation_steps, shape
    )
    return _onecycle(
        ("total_steps", total_steps),
        warmup_steps,
        annihilation_steps,
        (init, peak_value, end_value),
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
    check_cycle(values, shape, _checks.DECAY)
    return _onecycle(
        ("total_steps", total_steps),
        warmup_steps,
        annihilation_steps,
        (max_momentum, base_momentum, max_momentum),
        shape,
    )


def onecycle(
    peak_learning_rate: ArrayLike,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    init_learning_rate: ArrayLike | None = None,
    end_learning_rate: ArrayLike = 0.0,
    annihilation_steps: int | None = None,
    shape: Shape = "cosine",
    max_momentum: ArrayLike = 0.95,
    base_momentum: ArrayLike = 0.85,
) -> tuple[optax.Schedule, optax.Schedule]:
    """One cycle of the learning rate, and of the momentum against it.

    The pair is :func:`onecycle_schedule` and :func:`onecycle_momentum_schedule` with
    the same durations and the same shape, so that the momentum is lowest where the rate
    is highest. It makes any optimizer of two such values a one-cycle optimizer:
    ``sgd(*onecycle(1.0, 1000))``, ``adamw(*onecycle(0.01, 1000), b2=0.95)``.

    Args:
      peak_learning_rate: The highest rate, at least 0. :func:`range_test` helps to find
        it.
      total_steps: Optimizer steps of the whole run, at least 1; after them the end
        values hold. Under ``optax.MultiSteps`` an optimizer step is one that is
        emitted.
      warmup_steps: Steps up to the peak, at least 0 and less than ``total_steps``. None
        is ``round(0.3 * total_steps)``.
      init_learning_rate: Rate at step 0, at least 0 and at most the peak. None is
        ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on, at least 0 and at most the
        peak, or at most the initial rate with ``annihilation_steps``.
      annihilation_steps: Steps of the final fall from the initial rate, at least 0.
        Warm-up and annihilation together are at most ``total_steps``. During them the
        momentum stays at its highest. None is 0.
      shape: Shape of every phase; see :func:`onecycle_schedule`.
      max_momentum: Momentum (SGD's) or b1 (Adam's) at the start and the end, in [0, 1).
      base_momentum: Momentum at the peak of the rate, in [0, 1) and at most
        ``max_momentum``.

    Returns:
      The schedules of the rate and of the momentum.

    Examples:
      >>> import optax_superconv as osc
      >>> learning_rate, momentum = osc.onecycle(1.0, 100)
      >>> for t in (0, 15, 30, 65, 100):
      ...     print(round(float(learning_rate(t)), 2), round(float(momentum(t)), 2))
      0.04 0.95
      0.52 0.9
      1.0 0.85
      0.5 0.9
      0.0 0.95

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018.
    """
    init, end = init_learning_rate, end_learning_rate
    # Not a number, which optax.inject_hyperparams would trace.
    annihilation_steps = 0 if annihilation_steps is None else annihilation_steps
    init = _checked_init(
        "learning_rate", peak_learning_rate, init, end, annihilation_steps, shape
    )
    rate = _onecycle(
        ("total_steps", total_steps),
        warmup_steps,
        annihilation_steps,
        (init, peak_learning_rate, end),
        shape,
    )
    momentum = onecycle_momentum_schedule(
        total_steps,
        max_momentum=max_momentum,
        base_momentum=base_momentum,
        warmup_steps=warmup_steps,
        annihilation_steps=annihilation_steps,
        shape=shape,
    )
    return rate, momentum
