"""Which optimizer, ready to use? The links, chained."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._trees import LabelFn, Labels
from optax_superconv.schedules._onecycle import onecycle
from optax_superconv.schedules._phases import Shape
from optax_superconv.transforms._groups import Multipliers, grouped
from optax_superconv.transforms._learning_rate import scale_by_learning_rate
from optax_superconv.transforms._momentum import (
    scale_by_scheduled_adam,
    scheduled_trace,
)
from optax_superconv.transforms._weight_decay import decayed_weights


def decay_link(
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
    multipliers: Multipliers | None = None,
    param_labels: Labels | LabelFn | None = None,
) -> list[optax.GradientTransformation]:
    """No link for a constant 0: the chain is one that needs no parameters."""
    link = decayed_weights(weight_decay, mask, grouped(multipliers, param_labels))
    # An array may be a dial of optax.inject_hyperparams, whose value will change.
    is_constant = not callable(weight_decay) and not isinstance(weight_decay, jax.Array)
    return [] if is_constant and _checks.is_zero(weight_decay) else [link]


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.9,
    *,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = "matrices",
    multipliers: Multipliers | None = None,
    param_labels: Labels | LabelFn | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum, each of whose numbers may be a schedule, read and set.

    .. math:: m_t = \mu_t m_{t-1} + (g_t + \lambda_t \theta_t), \qquad
              \theta_{t+1} = \theta_t - \eta_t (g_t + \lambda_t \theta_t + \mu_t m_t)

    (without Nesterov, :math:`\theta_t - \eta_t m_t`). The weight decay is coupled: it
    is added to the gradient before the momentum, as in PyTorch. It is
    ``chain(add_decayed_weights(weight_decay, mask), scheduled_trace(momentum, ...),
    scale_by_learning_rate(learning_rate, ...))``.

    Args:
      learning_rate: A finite number, or a schedule ``count -> rate``.
      momentum: :math:`\mu` in [0, 1), or a schedule.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule. A Python or
        NumPy 0 is a chain without that link, which needs no parameters in ``update``.
      mask: What is decayed; see :func:`add_decayed_weights`. Of a leaf whose multiplier
        is an array, the leading axis is one of layers and does not make it a matrix.
      multipliers: Factors of the rates of groups; see :func:`scale_by_group`.
      param_labels: Which parameter is in which group; see :func:`scale_by_group`.
      accumulator_dtype: Dtype of the momentum; see :func:`scheduled_trace`.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``weight_decay``, ``momentum``,
      ``learning_rate`` (and ``learning_rate/<label>``) and ``cooldown``.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> loss_fn = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = osc.sgd(0.1)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for step in range(60):
      ...     if step == 40:  # Enough: decay over the next 20 steps.
      ...         state = osc.start_cooldown(state, 20)
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2))
      [3. 3.]

    References:
      Sutskever et al., `On the importance of initialization and momentum in deep
      learning <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
    """
    _checks.number_or_schedule("momentum", momentum, _checks.DECAY)
    return optax.chain(
        *decay_link(weight_decay, mask, multipliers, param_labels),
        scheduled_trace(
            momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype
        ),
        scale_by_learning_rate(
            learning_rate, multipliers=multipliers, param_labels=param_labels
        ),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.99,
    *,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    mask: Any = "matrices",
    multipliers: Multipliers | None = None,
    param_labels: Labels | LabelFn | None = None,
    nesterov: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW, each of whose numbers may be a schedule, read and set.

    .. math:: \theta_{t+1} = \theta_t - \eta_t
              \Big(\frac{m_t / w_t}{\sqrt{v_t / w'_t} + \epsilon}
              + \lambda_t \theta_t\Big)

    with the moments of :func:`scale_by_scheduled_adam`. The weight decay is decoupled,
    times the learning rate. It is ``chain(scale_by_scheduled_adam(b1, b2, ...),
    add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate,
    ...))``.

    Late decay is ``adamw(warmup_stable_decay_schedule(...))``; a run without a planned
    end has a warm-up for its rate, and :func:`start_cooldown` ends it; an average of
    the parameters is chained behind.

    Args:
      learning_rate: A finite number, or a schedule ``count -> rate``.
      b1: Decay of the first moment in [0, 1), or a schedule.
      b2: Decay of the second moment in [0, 1), or a schedule.
      eps: Number that is added to the root of the second moment, at least 0, or a
        schedule.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule; see
        :func:`add_decayed_weights`. A Python or NumPy 0 is a chain without that link,
        which needs no parameters in ``update``.
      mask: What is decayed; see :func:`add_decayed_weights`. Of a leaf whose multiplier
        is an array, the leading axis is one of layers and does not make it a matrix.
      multipliers: Factors of the rates of groups; see :func:`scale_by_group`.
      param_labels: Which parameter is in which group; see :func:`scale_by_group`.
      nesterov: Whether to use Nesterov momentum.
      mu_dtype: Dtype of the first moment; see :func:`scale_by_scheduled_adam`.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``b1``, ``b2``, ``eps``,
      ``weight_decay``, ``learning_rate`` (and ``learning_rate/<label>``) and
      ``cooldown``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> rate = osc.warmup_stable_decay_schedule(1e-3, 1000, warmup_steps=100)
      >>> tx = osc.adamw(rate, b2=0.95)
      >>> applied = osc.read_hyperparams(tx.init(jnp.zeros((2, 2))))
      >>> print({name: round(float(value), 3) for name, value in applied.items()})
      ... # doctest: +NORMALIZE_WHITESPACE
      {'b1': 0.9, 'b2': 0.95, 'eps': 0.0, 'weight_decay': 0.01, 'learning_rate': 0.0,
       'cooldown': 0.0}

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015;
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    return optax.chain(
        scale_by_scheduled_adam(b1, b2, eps=eps, mu_dtype=mu_dtype, nesterov=nesterov),
        *decay_link(weight_decay, mask, multipliers, param_labels),
        scale_by_learning_rate(
            learning_rate, multipliers=multipliers, param_labels=param_labels
        ),
    )


def onecycle_sgd(
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
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = "matrices",
    multipliers: Multipliers | None = None,
    param_labels: Labels | LabelFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD whose learning rate cycles up and down while its momentum does the reverse.

    It is ``sgd(*onecycle(peak_learning_rate, total_steps, ...), ...)``, which also
    takes what is not named here.

    Args:
      peak_learning_rate: The highest rate, at least 0. :func:`range_test` helps to find
        it.
      total_steps: Optimizer steps of the whole run, at least 1; see :func:`onecycle`,
        also for the durations, rates and momenta that follow.
      warmup_steps: Steps up to the peak. None is ``round(0.3 * total_steps)``.
      init_learning_rate: Rate at step 0. None is ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on.
      annihilation_steps: Steps of the final fall from the initial rate. None is 0.
      shape: Shape of every phase; see :func:`onecycle_schedule`.
      max_momentum: Momentum at the start and the end.
      base_momentum: Momentum at the peak of the rate.
      weight_decay: Strength of the coupled decay, or a schedule; see :func:`sgd`.
      mask: What is decayed; see :func:`add_decayed_weights`. Of a leaf whose multiplier
        is an array, the leading axis is one of layers and does not make it a matrix.
      multipliers: Factors of the rates of groups; see :func:`scale_by_group`.
      param_labels: Which parameter is in which group; see :func:`scale_by_group`.

    Returns:
      The optimizer; see :func:`sgd`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> loss_fn = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = osc.onecycle_sgd(0.1, total_steps=100)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2))
      [3. 3.]

    References:
      Smith and Topin, `Super-Convergence: Very Fast Training of Neural Networks Using
      Large Learning Rates <https://arxiv.org/abs/1708.07120>`_, 2018;
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018.
    """
    learning_rate, momentum = onecycle(
        peak_learning_rate,
        total_steps,
        warmup_steps=warmup_steps,
        init_learning_rate=init_learning_rate,
        end_learning_rate=end_learning_rate,
        annihilation_steps=annihilation_steps,
        shape=shape,
        max_momentum=max_momentum,
        base_momentum=base_momentum,
    )
    return sgd(
        learning_rate,
        momentum,
        weight_decay=weight_decay,
        mask=mask,
        multipliers=multipliers,
        param_labels=param_labels,
    )


def onecycle_adamw(
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
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    mask: Any = "matrices",
    multipliers: Multipliers | None = None,
    param_labels: Labels | LabelFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose learning rate cycles up and down while its b1 does the reverse.

    It is ``adamw(*onecycle(peak_learning_rate, total_steps, ...), ...)``, which also
    takes what is not named here. Its b2 is 0.99 and does not cycle with b1.

    Args:
      peak_learning_rate: The highest rate, at least 0. :func:`range_test` helps to find
        it.
      total_steps: Optimizer steps of the whole run, at least 1; see :func:`onecycle`,
        also for the durations, rates and momenta that follow.
      warmup_steps: Steps up to the peak. None is ``round(0.3 * total_steps)``.
      init_learning_rate: Rate at step 0. None is ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on.
      annihilation_steps: Steps of the final fall from the initial rate. None is 0.
      shape: Shape of every phase; see :func:`onecycle_schedule`.
      max_momentum: b1 at the start and the end.
      base_momentum: b1 at the peak of the rate.
      weight_decay: Strength of the decoupled decay, or a schedule; see :func:`adamw`.
      mask: What is decayed; see :func:`add_decayed_weights`. Of a leaf whose multiplier
        is an array, the leading axis is one of layers and does not make it a matrix.
      multipliers: Factors of the rates of groups; see :func:`scale_by_group`.
      param_labels: Which parameter is in which group; see :func:`scale_by_group`.

    Returns:
      The optimizer; see :func:`adamw`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.onecycle_adamw(0.5, total_steps=100)
      >>> applied = osc.read_hyperparams(tx.init(jnp.zeros((2, 2))))
      >>> print(round(float(applied["learning_rate"]), 3), applied["b1"])
      0.02 0.95

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018;
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    learning_rate, b1 = onecycle(
        peak_learning_rate,
        total_steps,
        warmup_steps=warmup_steps,
        init_learning_rate=init_learning_rate,
        end_learning_rate=end_learning_rate,
        annihilation_steps=annihilation_steps,
        shape=shape,
        max_momentum=max_momentum,
        base_momentum=base_momentum,
    )
    return adamw(
        learning_rate,
        b1,
        weight_decay=weight_decay,
        mask=mask,
        multipliers=multipliers,
        param_labels=param_labels,
    )
