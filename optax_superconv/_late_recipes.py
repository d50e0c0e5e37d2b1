"""Which optimizer for a run that stays high and decays late?"""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv.schedules import _phases
from optax_superconv.schedules._cycles import check_cycle
from optax_superconv.schedules._late_decay import warmup_stable_decay_schedule
from optax_superconv.schedules._phases import Phase, Shape, phase_schedule
from optax_superconv.transforms._cooldown import triggered_cooldown
from optax_superconv.transforms._link import check_transformation
from optax_superconv.transforms._momentum import (
    scale_by_scheduled_adam,
    scheduled_trace,
)
from optax_superconv.transforms._weight_decay import add_decayed_weights


def _late_decay_rate(
    peak: ArrayLike,
    init: ArrayLike,
    end: ArrayLike,
    total_steps: int | None,
    warmup_steps: int,
    decay_steps: int | None,
    shape: Shape,
) -> optax.GradientTransformationExtraArgs:
    """Warm-up, stable, decay: at a step that is known, or when it is triggered."""
    rates = {"init_learning_rate": init, "end_learning_rate": end}
    check_cycle({"peak_learning_rate": peak} | rates, "linear")
    if shape == "exponential":
        _phases.check_positive("peak_learning_rate", peak)
        _phases.check_positive("end_learning_rate", end)
    if total_steps is None:
        _checks.require(
            decay_steps is None,
            "decay_steps",
            "None with `total_steps=None` (give the length to `start_cooldown`)",
            decay_steps,
        )
        warmup_steps = _checks.steps("warmup_steps", warmup_steps)
        schedule = phase_schedule(init, [Phase(warmup_steps, peak)])
    else:
        schedule = warmup_stable_decay_schedule(
            peak,
            total_steps,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            init_value=init,
            end_value=end,
            shape=shape,
        )
    return triggered_cooldown(schedule, end_value=end, shape=shape)


def _last(
    average: optax.GradientTransformation | None,
) -> list[optax.GradientTransformation]:
    if average is None:
        return []
    check_transformation("average", average, " such as `ema_params(0.999)`")
    return [average]


def late_decay_sgd(
    peak_learning_rate: ArrayLike,
    total_steps: int | None,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    init_learning_rate: ArrayLike = 0.0,
    end_learning_rate: ArrayLike = 0.0,
    shape: Shape = "1-sqrt",
    momentum: optax.ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = "matrices",
    accumulator_dtype: Any = None,
    average: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD that stays at a large rate and decays it late, or when you say so.

    .. math:: m_t = \mu_t m_{t-1} + (g_t + \lambda_t \theta_t), \qquad
              \theta_{t+1} = \theta_t - \eta_t (g_t + \lambda_t \theta_t + \mu_t m_t)

    (without Nesterov, :math:`\theta_t - \eta_t m_t`), with the rate of
    :func:`warmup_stable_decay_schedule`. Without ``total_steps`` the rate stays at the
    peak until :func:`start_cooldown` is called on the state. The state is the same with
    and without ``total_steps``, so a checkpoint of an open-ended run continues in a run
    of known length, and the trigger works there too: it decays earlier.

    Args:
      peak_learning_rate: The rate between warm-up and decay, at least 0.
        :func:`convergence_threshold` finds the largest that converges.
      total_steps: Optimizer steps of the whole run, at least 1, or None for a run
        without a planned end. Under ``optax.MultiSteps`` an optimizer step is one that
        is emitted.
      warmup_steps: Steps of the linear warm-up, at least 0 and below ``total_steps``.
      decay_steps: Steps of the decay at the end, at least 1. Warm-up and decay together
        are at most ``total_steps``. None is ``round(0.2 * total_steps)``, but at least
        1, and at most the number of steps that the warm-up leaves. Without
        ``total_steps`` it must be None.
      init_learning_rate: Rate at step 0, at least 0 and at most the peak. Without
        warm-up steps the run starts at the peak.
      end_learning_rate: Rate at the end of the decay, at least 0 and at most the peak.
      shape: Shape of the decay; see :class:`Phase`. ``"exponential"`` needs the peak
        and the end above 0. The default ``end_learning_rate`` is 0.
      momentum: :math:`\mu` in [0, 1), or a schedule.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule; coupled.
      weight_decay_mask: What is decayed; see :func:`onecycle_sgd`.
      accumulator_dtype: Dtype of the momentum; see :func:`scheduled_trace`.
      average: An average of the parameters, the last in the chain: :func:`ema_params`,
        :func:`swa_params`, :func:`lawa_params` or another. Several are an
        ``optax.chain`` of them. :func:`eval_params` reads it. Under
        ``optax.inject_hyperparams`` name it in ``static_args``. None is no average.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``, ``momentum``,
      ``weight_decay`` and ``cooldown`` (of a triggered decay, not of the planned one).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> loss_fn = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = osc.late_decay_sgd(0.1, None, average=osc.ema_params(0.9))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for step in range(100):
      ...     if step == 80:  # Enough: decay over the next 20 steps.
      ...         state = osc.start_cooldown(state, 20)
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2), osc.eval_params(state, params).round(2))
      [3. 3.] [3. 3.]

    References:
      Ren, Ma and Ying, `Understanding the Generalization Benefits of Late Learning Rate
      Decay <https://arxiv.org/abs/2401.11600>`_, 2024;
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024.
    """
    _checks.number_or_schedule("momentum", momentum, _checks.DECAY)
    rate = _late_decay_rate(
        peak_learning_rate,
        init_learning_rate,
        end_learning_rate,
        total_steps,
        warmup_steps,
        decay_steps,
        shape,
    )
    return optax.chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scheduled_trace(
            momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype
        ),
        rate,
        *_last(average),
    )


def late_decay_adamw(
    peak_learning_rate: ArrayLike,
    total_steps: int | None,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    init_learning_rate: ArrayLike = 0.0,
    end_learning_rate: ArrayLike = 0.0,
    shape: Shape = "1-sqrt",
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.99,
    eps: ArrayLike = 1e-8,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    weight_decay_mask: Any = "matrices",
    mu_dtype: Any = None,
    average: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW that stays at a large rate and decays it late, or when you say so.

    .. math:: \theta_{t+1} = \theta_t - \eta_t
              \Big(\frac{m_t / w_t}{\sqrt{v_t / w'_t} + \epsilon}
              + \lambda_t \theta_t\Big)

    with the moments of :func:`scale_by_scheduled_adam` and the rate of
    :func:`warmup_stable_decay_schedule`. Without ``total_steps`` the rate stays at the
    peak until :func:`start_cooldown` is called on the state. The state is the same with
    and without ``total_steps``, so a checkpoint of an open-ended run continues in a run
    of known length, and the trigger works there too: it decays earlier.

    Args:
      peak_learning_rate: The rate between warm-up and decay, at least 0. With language
        models it is about half of the best peak of a cosine (Hägele et al.).
      total_steps: Optimizer steps of the whole run, at least 1, or None for a run
        without a planned end. Under ``optax.MultiSteps`` an optimizer step is one that
        is emitted.
      warmup_steps: Steps of the linear warm-up, at least 0 and below ``total_steps``.
      decay_steps: Steps of the decay at the end, at least 1. Warm-up and decay together
        are at most ``total_steps``. None is ``round(0.2 * total_steps)``, but at least
        1, and at most the number of steps that the warm-up leaves. Without
        ``total_steps`` it must be None.
      init_learning_rate: Rate at step 0, at least 0 and at most the peak. Without
        warm-up steps the run starts at the peak.
      end_learning_rate: Rate at the end of the decay, at least 0 and at most the peak.
      shape: Shape of the decay; see :class:`Phase`. ``"exponential"`` needs the peak
        and the end above 0. The default ``end_learning_rate`` is 0.
      b1: Decay of the first moment in [0, 1), or a schedule.
      b2: Decay of the second moment in [0, 1), or a schedule.
      eps: Number that is added to the root of the second moment, at least 0.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule. It is
        decoupled, times the learning rate.
      weight_decay_mask: What is decayed; see :func:`onecycle_adamw`.
      mu_dtype: Dtype of the first moment; see :func:`scale_by_scheduled_adam`.
      average: An average of the parameters, the last in the chain: :func:`ema_params`,
        :func:`swa_params`, :func:`lawa_params` or another. Several are an
        ``optax.chain`` of them. :func:`eval_params` reads it. Under
        ``optax.inject_hyperparams`` name it in ``static_args``. None is no average.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``, ``b1``,
      ``weight_decay`` and ``cooldown`` (of a triggered decay, not of the planned one).

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.late_decay_adamw(1e-3, 1000, warmup_steps=100)
      >>> state = tx.init(jnp.zeros((2, 2)))
      >>> print(list(osc.read_hyperparams(state)))
      ['b1', 'weight_decay', 'cooldown', 'learning_rate']

    References:
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024;
      Hu et al., `MiniCPM: Unveiling the Potential of Small Language Models
      <https://arxiv.org/abs/2404.06395>`_, 2024, section 4 (warm-up, stable, decay).
    """
    rate = _late_decay_rate(
        peak_learning_rate,
        init_learning_rate,
        end_learning_rate,
        total_steps,
        warmup_steps,
        decay_steps,
        shape,
    )
    return optax.chain(
        scale_by_scheduled_adam(b1, b2, eps=eps, mu_dtype=mu_dtype, nesterov=nesterov),
        add_decayed_weights(weight_decay, weight_decay_mask),
        rate,
        *_last(average),
    )
